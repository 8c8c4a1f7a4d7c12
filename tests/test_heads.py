"""Heads of segmentation: the published answers in float64, losses, inference."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import golden
import zoo
from flags import deterministic
from head_records import DIMS, Given, inputs, load
from zoo.heads import Segmenter, inference, segmenter
from zoo.heads.fpn import FPN
from zoo.heads.layers import PixelHead, averages, masked_averages
from zoo.heads.segmenter import AUXILIARY_WEIGHT, auxiliary_head, pixel_loss
from zoo.heads.semantic_fpn import SemanticFPN
from zoo.heads.upernet import UPerNet

RECORDS = ("uperhead_c64_60x84", "fcnhead_aux_c64_128x160", "semfpn_64x64")
WHOLE = "inference_tiny"


class Tiny(Given):
    """The backbone of the record of a whole segmenter."""

    def __init__(self):
        super().__init__((8, 12, 16, 20))
        convs = [
            nn.Conv2d(3, 8, 4, 4),
            nn.Conv2d(8, 12, 3, 2, 1),
            nn.Conv2d(12, 16, 3, 2, 1),
            nn.Conv2d(16, 20, 3, 2, 1),
        ]
        self.convs = nn.ModuleList(convs)

    def forward(self, images):
        features = []
        for conv in self.convs:
            images = F.gelu(conv(images))
            features.append(images)
        return features


def head_of(record):
    """The record's head alone, as a part of a Segmenter over maps that are given, with the record's weights."""
    stem, maps = record["name"], inputs(record)
    if stem.startswith("fcnhead"):
        decode = auxiliary_head(256, 150, channels=64)
        prefix, neck = "auxiliary_head", None
    elif stem.startswith("semfpn"):
        decode, prefix, neck = SemanticFPN(256, 150), "decode_head", FPN(DIMS)
    else:
        decode, prefix, neck = UPerNet(DIMS, 150, channels=64), "decode_head", None
    model = Segmenter(Given(maps=maps), decode, neck=neck).double().eval()
    state = model.layouts()[0].to_ours(golden.official_state_dict(record))
    model.load_state_dict({name.replace(prefix, "decode_head", 1): value for name, value in state.items()})
    return model, maps, prefix


@pytest.fixture(params=RECORDS)
def record(request):
    return load(request.param)


def test_every_head_record_is_used():
    stems = {path.stem for path in (golden.FOLDER / "heads").glob("*.json") if not path.stem.startswith("det_")}
    assert stems == {*RECORDS, WHOLE}


def test_heads_in_float64(record):
    """Logits, the gradients of the maps, and the norms of every parameter's gradient, in the published names."""
    model, maps, prefix = head_of(record)
    logits = model.decode_head(model.neck(maps))
    (logits * golden.probe(logits.shape)).sum().backward()
    assert golden.relative_error(logits.detach(), golden.unpack(record["logits"])) < 1e-9
    for x, where, want in zip(maps, record["input_grad_positions"], record["input_grad_samples"], strict=True):
        assert (x.grad is None) == (want is None)
        if want is not None:
            assert golden.relative_error(golden.samples(x.grad, where), golden.unpack(want)) < 1e-9
    theirs = model.layouts()[0].theirs
    norms = {theirs(k).replace("decode_head", prefix, 1): float(p.grad.norm()) for k, p in model.named_parameters()}
    assert norms == pytest.approx(record["grad_norms"], rel=1e-9)
    assert sum(p.numel() for p in model.parameters()) == record["parameters"]


def test_losses_as_published(record):
    model, _, prefix = head_of(record)
    height, width = record["image_size"]
    labels = golden.np.random.default_rng(100).integers(0, 150, (2, height, width))
    labels[golden.np.random.default_rng(101).random((2, height, width)) < 0.1] = 255
    losses = model(torch.zeros(2, 3, height, width), torch.from_numpy(labels))
    weight = AUXILIARY_WEIGHT if prefix == "auxiliary_head" else 1.0
    assert weight * losses["decode"].item() == pytest.approx(record["training_loss"]["values"]["loss_ce"], rel=1e-9)


def test_loss_without_labels_is_zero():
    logits = torch.randn(1, 3, 4, 4, requires_grad=True)
    loss = pixel_loss(logits, torch.full((1, 8, 8), 255), 255)
    loss.backward()
    assert loss == 0 and not logits.grad.any()


def test_logits_are_enlarged_in_float32():
    """Under mixed precision the largest class of a pixel is that of the head's own logits, enlarged in full."""
    torch.manual_seed(0)
    model, images = segmenter("resnet18", 20, channels=16).eval(), torch.randn(1, 3, 64, 96)
    small = []
    for head in (model.decode_head, model.auxiliary_head):
        head.classifier.register_forward_hook(lambda module, args, out: small.append(out))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found, losses = model(images), model(images, torch.zeros(1, 64, 96, dtype=torch.int64))
    assert {logits.dtype for logits in small} == {torch.bfloat16} and len(small) == 3
    assert torch.equal(found, F.interpolate(small[0].float(), (64, 96), mode="bilinear"))
    exact = [pixel_loss(logits.float(), torch.zeros(1, 64, 96, dtype=torch.int64), 255) for logits in small[1:]]
    assert losses == {"decode": exact[0], "auxiliary": AUXILIARY_WEIGHT * exact[1]}


@pytest.mark.parametrize("side", [1, 2, 3, 6])
def test_averages_without_atomics(side, monkeypatch):
    x = torch.randn(2, 3, 5, 13, dtype=torch.float64, requires_grad=True)
    parts, exact = masked_averages(x, side), F.adaptive_avg_pool2d(x, side)
    assert torch.allclose(parts, exact, rtol=1e-12)
    weights = torch.randn_like(exact)
    one, other = (torch.autograd.grad((y * weights).sum(), x)[0] for y in (parts, exact))
    assert torch.allclose(one, other, rtol=1e-12)
    with deterministic():
        with monkeypatch.context() as patched:
            patched.setattr(F, "adaptive_avg_pool2d", lambda *_: pytest.fail("its backward on a GPU is refused"))
            assert averages(x.to("meta"), side).shape == (2, 3, side, side)
        assert torch.equal(averages(x, side), exact)  # a CPU's is deterministic


@pytest.mark.parametrize("side", [1, 6])
def test_averages_of_large_values_in_half_precision(side):
    """A sum over the map is no half; autocast would compute matmuls in its own type, as pooling is not."""
    x = torch.randn(2, 3, 33, 47) + 70
    exact = F.adaptive_avg_pool2d(x.half().float(), side)
    assert torch.allclose(masked_averages(x.half(), side).float(), exact, rtol=1e-3)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(masked_averages(x, side), F.adaptive_avg_pool2d(x, side), rtol=1e-6)
        compiled = torch.compile(averages, backend="eager", dynamic=True, fullgraph=True)
        assert torch.allclose(compiled(x, side), F.adaptive_avg_pool2d(x, side), rtol=1e-6)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The record of a whole segmenter and the model, loaded from a file in the published layout."""
    record, path = load(WHOLE), tmp_path_factory.mktemp("whole") / "released.pth"
    torch.save({"state_dict": golden.official_state_dict(record), "meta": {"CLASSES": ["a"]}}, path)
    decode, second = UPerNet((8, 12, 16, 20), 19, channels=16), auxiliary_head(16, 19, channels=16)
    model = Segmenter(Tiny(), decode, auxiliary_head=second).double().eval()
    assert zoo.load_checkpoint(model, path).layout == "mmseg"
    return record, model


def test_weights_of_classes():
    """As mmseg's before 1.0: a weighted sum over the labelled pixels, divided by the number of all."""
    logits, targets = torch.randn(2, 3, 4, 5), torch.randint(3, (2, 4, 5))
    targets[0, 0] = 255
    weights = torch.tensor([1.0, 0.25, 3.0])
    each = F.cross_entropy(logits, targets, ignore_index=255, reduction="none")
    want = sum(float(weights[label]) * each[targets == label].sum() for label in range(3)) / 40
    torch.testing.assert_close(pixel_loss(logits, targets, 255, weights), want)
    model = segmenter("resnet18", 3, channels=8, class_weights=weights.tolist()).eval()
    images, targets = torch.randn(2, 3, 32, 32), torch.ones(2, 32, 32, dtype=torch.long)
    plain = segmenter("resnet18", 3, channels=8).eval()
    plain.load_state_dict({name: tensor for name, tensor in model.state_dict().items() if name != "class_weights"})
    losses, others = model(images, targets), plain(images, targets)
    for name in ("decode", "auxiliary"):
        torch.testing.assert_close(losses[name], 0.25 * others[name])
    with torch.no_grad():
        shares, weighted = model(images).softmax(1), plain(images).softmax(1) / weights[:, None, None]
    torch.testing.assert_close(shares, weighted / weighted.sum(1, keepdim=True))
    for wrong in ([1, 2], [1, 2, 0], [1, 2, float("nan")], [1, 2, float("inf")], [1, 2, "3"]):
        with pytest.raises(ValueError, match="expected a number above 0 for each of 3 classes"):
            segmenter("resnet18", 3, channels=8, class_weights=wrong)
    with pytest.raises(ValueError, match="ignore_index is 2, one of the 3 classes"):
        segmenter("resnet18", 3, channels=8, ignore_index=2)(images, targets)


INFERENCE = {
    "whole_logits_at_50x70": partial(inference.whole, size=(50, 70)),
    "slide_logits_crop48_stride32_at_80x112": partial(inference.slide, crop=(48, 48), stride=(32, 32)),
    "slide_logits_crop48_stride30_at_50x70": partial(inference.slide, crop=(48, 48), stride=(30, 30), size=(50, 70)),
    "slide_logits_crop96_stride64_at_80x112": partial(inference.slide, crop=(96, 96), stride=(64, 64)),
    "whole_logits_flipped_input_at_80x112": lambda model, x: inference.whole(model, x.flip(3)).flip(3),
    "tta_probabilities_image0": lambda model, x: inference.augmented(model, x[:1], scales=(1.0, (64, 96)))[0],
}


@pytest.mark.parametrize("name", INFERENCE)
@torch.no_grad()
def test_inference_as_published(whole, name):
    record, model = whole
    out, want = INFERENCE[name](model, golden.image(80, 112)), record["outputs"][name]
    assert list(out.shape) == want["shape"]
    assert golden.relative_error(golden.samples(out, want["positions"]), golden.unpack(want["samples"])) < 1e-9


@torch.no_grad()
def test_labels_as_published(whole):
    record, model = whole
    labels = inference.augmented(model, golden.image(80, 112)[:1], scales=(1.0, (64, 96))).argmax(1)
    assert torch.equal(labels.double(), golden.unpack(record["outputs"]["tta_argmax_image0"]["full"]))


def test_inference_at_scales_and_wrong_strides():
    model = nn.Conv2d(3, 2, 1)
    seen = []
    model.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape[-2:])))
    out = inference.augmented(model, torch.randn(1, 3, 9, 13), scales=(0.5, 1.5), flip=False, size=(20, 30))
    assert seen == [(5, 7), (14, 20)] and out.shape == (1, 2, 20, 30)
    torch.testing.assert_close(out.sum(1), torch.ones(1, 20, 30))
    with pytest.raises(ValueError, match="stride"):
        inference.slide(model, torch.randn(1, 3, 9, 13), (4, 4), (5, 4))


def test_windows_are_averaged_in_place(monkeypatch):
    """At the size of a photograph a second tensor of logits is as large as all else."""
    model, x = nn.Conv2d(3, 2, 1), torch.randn(1, 3, 9, 13, requires_grad=True)
    want = model(x)
    monkeypatch.setattr(torch.Tensor, "__truediv__", None)
    out = inference.slide(model, x, (4, 5), (3, 3))
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), x)[0] for y in (out, want)))


def test_classifiers_of_pixels_start_small():
    classifier = PixelHead(256, 64, 0.0).classifier
    assert classifier.weight.std().item() == pytest.approx(0.01, rel=0.1) and not classifier.bias.any()


def test_dropout_is_of_whole_channels():
    head = PixelHead(64, 64, 0.5).train()
    nn.init.eye_(head.classifier.weight.data.flatten(1))
    kept = head.classify(torch.ones(1, 64, 4, 4)).count_nonzero((2, 3))
    assert set(kept.flatten().tolist()) == {0, 16}
