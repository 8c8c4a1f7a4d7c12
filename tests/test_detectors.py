"""Detection: mmdet's maps in float64, its anchors and pooling, any backbone, images without objects, training."""

import math
import pickle

import pytest
import torch
from timm.models import FeatureInfo
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torchvision.models.detection._utils import Matcher
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import batched_nms, box_iou

import golden
import zoo
from steps import losses_of
from test_heads import DIMS, Given, inputs, load
from zoo.heads import Detector, detector
from zoo.heads.anchors import AlignedPooler, Anchors, BestMatcher
from zoo.heads.fpn import FPN
from zoo.heads.paste import paste
from zoo.heads.rcnn import masks_in

HEADS = ("mask_rcnn", "cascade_mask_rcnn", "faster_rcnn", "retinanet", "fcos")


def released(tmp_path, record):
    torch.save({"state_dict": golden.official_state_dict(record)}, tmp_path / "released.pth")
    return tmp_path / "released.pth"


def check_gradients(maps, record):
    for x, where, want in zip(maps, record["input_grad_positions"], record["input_grad_samples"], strict=True):
        if where is None:
            assert x.grad is None
        else:
            assert golden.relative_error(golden.samples(x.grad, where), golden.unpack(want)) < 1e-8


class Pools(nn.Module):
    """A backbone without weights."""

    def __init__(self):
        super().__init__()
        rows = [{"num_chs": 3, "reduction": 4 * 2**i, "module": f"{i}"} for i in range(4)]
        self.feature_info = FeatureInfo(rows, (0, 1, 2, 3))

    def forward(self, x):
        return [nn.functional.avg_pool2d(x, 4 * 2**i) for i in range(4)]


def check_outputs(outputs, record):
    assert len(outputs) == len(record["outputs"])
    sum((x * golden.probe(x.shape)).sum() for x in outputs).backward()
    for x, want in zip(outputs, record["outputs"], strict=True):
        got = golden.samples(x, want["positions"]) if "positions" in want else x.detach()
        packed = want["samples"] if "positions" in want else want["full"]
        assert list(x.shape) == want["shape"]
        assert golden.relative_error(got, golden.unpack(packed)) < 1e-9


def test_fpn(tmp_path):
    record = load("det_fpn_maskrcnn_128x160")
    model = Detector(Given(), FPN(DIMS, extra=1), nn.Identity(), 80, zoo.heads.detection.RCNN).double()
    zoo.load_checkpoint(model, released(tmp_path, record))
    maps = inputs(record)
    check_outputs(model.neck(maps), record)
    check_gradients(maps, record)


@pytest.mark.parametrize("extra_relu", [False, True])
def test_levels_below_the_last_output(extra_relu):
    """mmdetection's `on_output`, with `relu_before_extra_convs` or without: only what follows the first is cut off."""
    torch.manual_seed(0)
    neck = FPN(DIMS, 8, extra=3, extra_from="output", extra_relu=extra_relu).double()
    maps = [torch.randn(2, dim, 48 // 2**i, 64 // 2**i, dtype=torch.float64) for i, dim in enumerate(DIMS)]
    found, plain = neck(maps), FPN(DIMS, 8).double()
    plain.load_state_dict(neck.state_dict(), strict=False)
    assert [tuple(x.shape[2:]) for x in found[3:]] == [(6, 8), (3, 4), (2, 2), (1, 1)]
    assert all(torch.equal(x, y) for x, y in zip(found[:4], plain(maps), strict=True))
    last = found[3]
    for i, conv in enumerate(neck.outputs[4:]):
        last = conv(last.clamp(min=0) if i and extra_relu else last)
        torch.testing.assert_close(found[4 + i], last)
    assert all(x.min() < 0 for x in found[3:])


def test_levels_below_the_last_lateral():
    """mmdetection's `on_lateral`: the first reads the coarsest map as the 1 x 1 convolution leaves it."""
    torch.manual_seed(0)
    neck = FPN(DIMS, 8, extra=2, extra_from="lateral").double()
    maps = [torch.randn(2, dim, 48 // 2**i, 64 // 2**i, dtype=torch.float64) for i, dim in enumerate(DIMS)]
    found, plain = neck(maps), FPN(DIMS, 8).double()
    plain.load_state_dict(neck.state_dict(), strict=False)
    assert all(torch.equal(x, y) for x, y in zip(found[:4], plain(maps), strict=True))
    last = torch.einsum("oc,bchw->bohw", neck.laterals[3].weight[:, :, 0, 0], maps[3])
    last = last + neck.laterals[3].bias[:, None, None]
    for conv, x in zip(neck.outputs[4:], found[4:], strict=True):
        last = nn.functional.conv2d(last, conv.weight, conv.bias, stride=2, padding=1)
        torch.testing.assert_close(x, last)
    with pytest.raises(ValueError, match="'top'; it must be one of pool, input, lateral, output"):
        FPN(DIMS, 8, extra=1, extra_from="top")


@pytest.mark.parametrize("sides", [(1, 1), (2, 1), (2, 2), (4, 2), (16, 2), (3, 3)], ids=str)
def test_levels_of_narrow_maps(sides):
    """PyTorch leaves such results, or gradients of weights, unwritten in part: they hold what memory held."""
    torch.manual_seed(0)
    neck, maps = FPN([64], 64, extra=1, extra_from="input"), torch.randn(2, 64, *sides)

    def answers(forward):
        fill_freed_memory()
        level = forward()
        return level.detach().float(), *torch.autograd.grad(level, conv.weight, torch.ones_like(level))

    conv = neck.outputs[1]
    expected = answers(lambda: conv(maps))
    with torch.autocast("cpu", torch.bfloat16):
        found = answers(lambda: neck([maps])[1])
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0.02 * float(want.abs().max()))


def fill_freed_memory():
    held = [torch.full((2**i,), float("nan")) for i in range(6, 19) for _ in range(8)]
    del held


def test_retinanet(tmp_path):
    record = load("det_retinanet_neck_head_72x120")
    model = detector(Given(), 80, head="retinanet").double()
    assert zoo.load_checkpoint(model, released(tmp_path, record)).layout == "mmdet"
    maps, heads = inputs(record), model.heads.head
    levels = model.neck(maps[1:])
    scores, boxes = heads.classification_head, heads.regression_head
    outputs = [scores.cls_logits(scores.conv(x)) for x in levels] + [boxes.bbox_reg(boxes.conv(x)) for x in levels]
    check_outputs(outputs, record)
    check_gradients(maps, record)


@pytest.mark.parametrize("head", ["retinanet", "fcos"])
def test_boxes_without_area_are_no_detections(head):
    """Three anchors, the surest of which stand right of the image and below it: they take no one's place."""
    heads = detector(Pools(), 1, head=head, channels=32, head_kwargs={"detections_per_img": 1}).heads
    anchors = torch.tensor([[40.0, 0, 60, 20], [0, 40, 20, 60], [0, 0, 20, 20]])
    outputs = {"cls_logits": torch.tensor([[[4.0], [3], [2]]]), "bbox_regression": torch.zeros(1, 3, 4)}
    if head == "fcos":  # sides, in those of the anchor, from its centre
        outputs |= {"bbox_regression": torch.full((1, 3, 4), 0.5), "bbox_ctrness": torch.zeros(1, 3, 1)}
    levels = {key: [value] for key, value in outputs.items()}
    (found,) = heads.postprocess_detections(levels, [[anchors]], [(32, 32)])
    assert found["boxes"].tolist() == [[0, 0, 20, 20]] and found["labels"].tolist() == [0]
    assert len(found["scores"]) == 1 and heads.detections_per_img == 1


@pytest.mark.parametrize("head", ["retinanet", "fcos"])
@torch.no_grad()
def test_how_many_are_detected_is_never_changed(head, monkeypatch):
    """Not while they are found either: threads share a detector."""
    settings = {"detections_per_img": 3, "score_thresh": 0.0}
    model = detector(Pools(), 1, head=head, channels=32, head_kwargs=settings).eval()
    seen, nms = [], lambda *args: seen.append(model.heads.detections_per_img) or batched_nms(*args)
    monkeypatch.setattr("torchvision.ops.boxes.batched_nms", nms)
    images = [torch.randn(3, 64, 64)] * 2
    assert [len(found["boxes"]) for found in model(images)] == [3, 3] and seen == [3, 3]
    model.heads.detections_per_img = 2
    assert [len(found["boxes"]) for found in model(images)] == [2, 2]


def test_which_anchors_learn_an_object():
    """Its best, from an IoU of the floor on, whatever else that one overlaps with."""
    few, many = torch.tensor([[0.2, 0.1, 0.0], [0.4, 0.5, 0.1]]), torch.tensor([[0.75, 0.1], [0.8, 0.9]])
    matcher = Matcher(0.7, 0.3, allow_low_quality_matches=True)
    assert BestMatcher(matcher, 0.3)(few).tolist() == [-2, 1, -1]  # between the thresholds, object 1, none
    assert BestMatcher(matcher, 0)(few).tolist() == [0, 1, -1]
    assert BestMatcher(matcher, 0.3)(many).tolist() == [0, 1]
    none = torch.tensor([[0.9, 0.0, 0.2], [0.0, 0.0, 0.0]])  # the second overlaps with no anchor, and has none
    assert BestMatcher(matcher, 0)(none).tolist() == [0, -1, -1]
    one = torch.tensor([[0.6, 0.5], [0.6, 0.5], [0.4, 0.4]])  # is the best of several: the last has it
    assert BestMatcher(matcher, 0)(one).tolist() == [2, 2]


def test_matching_needs_little_memory():
    """Beside the IoUs no number for each pair of an object and an anchor."""
    matcher, quality = BestMatcher(Matcher(0.7, 0.3, allow_low_quality_matches=True), 0), torch.rand(50, 20_000)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as measured:
        matcher(quality)
    assert max(event.self_cpu_memory_usage for event in measured.key_averages()) <= quality.numel()


def test_heads_match_from_their_floor_on():
    floors = {"mask_rcnn": 0.3, "faster_rcnn": 0.3, "cascade_mask_rcnn": 0.3, "retinanet": 0}
    for head, floor in floors.items():
        heads = detector(Pools(), 2, head=head, channels=16).heads
        assert getattr(heads, "rpn", heads).proposal_matcher.floor == floor


@pytest.mark.parametrize("head,count", [("faster_rcnn", 1000), ("mask_rcnn", 1000), ("cascade_mask_rcnn", 2000)])
def test_how_many_regions_are_proposed(head, count):
    rpn = detector(Pools(), 2, head=head, channels=16).heads.rpn
    assert rpn.train().post_nms_top_n() == count and rpn.eval().post_nms_top_n() == 1000
    thin = torch.tensor([[[3.0, 4, 3.0001, 9], [5, 5, 5, 9]]])  # a width counts, none does not
    (boxes,), _ = rpn.filter_proposals(thin, torch.zeros(1, 2, 1), [(16, 16)], [2])
    assert torch.equal(boxes, thin[0, :1])


def test_retinanet_averages_over_the_batch():
    """By anchors that learn an object: an image without one counts as if it had one."""
    torch.manual_seed(0)
    model = detector(Pools(), 5, head="retinanet", channels=16).double()
    images = [torch.randn(3, 64, 64, dtype=torch.float64) for _ in range(3)]
    boxes = [[[4.0, 4, 30, 40], [20, 10, 60, 50]], [[8.0, 8, 24, 26]], []]
    targets = [
        {"boxes": torch.tensor(rows, dtype=torch.float64).view(-1, 4), "labels": torch.arange(len(rows))}
        for rows in boxes
    ]
    heads, maps = model.heads, [torch.zeros(1, 1, 64 // s, 64 // s).double() for s in (8, 16, 32, 64)]
    anchors = heads.anchor_generator(ImageList(torch.zeros(1, 3, 64, 64), [(64, 64)]), [*maps, maps[-1]])[0]
    counts = [
        max(1, int((heads.proposal_matcher(box_iou(t["boxes"], anchors)) >= 0).sum())) if len(t["boxes"]) else 1
        for t in targets
    ]
    assert len(set(counts)) == 3
    alone = [{k: v.detach() for k, v in model([i], [t]).items()} for i, t in zip(images, targets, strict=True)]
    for key, loss in model(images, targets).items():
        want = sum(count * float(one[key]) for count, one in zip(counts, alone, strict=True)) / sum(counts)
        assert float(loss.detach()) == pytest.approx(want, rel=1e-9)


def test_boxes_of_an_rcnn_learn_by_l1():
    """Of regions proposed, and of those that hold an object, by the number of all that are drawn."""
    heads = detector(Pools(), 2, head="faster_rcnn", channels=16).heads
    deltas, wanted = torch.tensor([[0.0, 0, 1, 0], [5, 5, 5, 5]]), torch.tensor([[2.0, 0, 0.5, 0], [0, 0, 0, 0]])
    logits = torch.tensor([[1.0], [-2.0]])
    sought, moved = heads.rpn.compute_loss(logits, deltas, [torch.tensor([1.0, 0.0])], [wanted])
    assert float(moved) == 2.5 / 2
    assert float(sought) == pytest.approx((math.log1p(math.exp(-1)) + math.log1p(math.exp(-2))) / 2, rel=1e-6)

    layer = heads.roi_heads.box_predictor.bbox_pred
    nn.init.zeros_(layer.weight)
    nn.init.constant_(layer.bias, 2.0)
    target = {"boxes": torch.tensor([[8.0, 8, 24, 24]]), "labels": torch.tensor([1])}
    regions = torch.tensor([[8.0, 8, 24, 24], [40, 40, 60, 60]])  # the object, which is added once more, and none
    maps = {str(i): torch.zeros(1, 16, 16 >> i, 16 >> i) for i in range(4)}
    _, losses = heads.train().roi_heads(maps, [regions], [(64, 64)], [target])
    assert losses.keys() == {"loss_classifier", "loss_box_reg"}
    assert float(losses["loss_box_reg"].detach()) == pytest.approx(2 * 4 * 2 / 3, rel=1e-6)


def test_masks_to_learn_are_read_at_the_middle_of_pixels():
    """And where a part is covered by half or more it is all of it."""
    masks = torch.zeros(2, 4, 6, dtype=torch.uint8)
    masks[1, :, :3] = 1
    boxes = torch.tensor([[0.0, 0, 4, 4], [1, 0, 5, 4], [0, 0, 4, 4]])
    found = masks_in(masks, torch.tensor([1, 1, 0]), boxes, 2)
    assert found.tolist() == [[[True, True]] * 2, [[True, False]] * 2, [[False, False]] * 2]

    heads = detector(Pools(), 2, head="mask_rcnn", channels=16).train().heads.roi_heads
    last = heads.mask_predictor.mask_fcn_logits
    nn.init.zeros_(last.weight)
    last.bias.data = torch.tensor([9.0, 9.0, 1.0])
    large = torch.zeros(1, 64, 64, dtype=torch.uint8)
    large[:, :, 8:29] = 1
    target = {"boxes": torch.tensor([[8.0, 8, 36, 36]]), "labels": torch.tensor([2]), "masks": large}
    maps = {str(i): torch.zeros(1, 16, 16 >> i, 16 >> i) for i in range(4)}
    _, losses = heads(maps, [target["boxes"]], [(64, 64)], [target])
    want = 0.75 * math.log1p(math.exp(-1)) + 0.25 * math.log1p(math.exp(1))  # 21 of 28 columns are covered
    assert float(losses["loss_mask"].detach()) == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("head", ["mask_rcnn", "cascade_mask_rcnn"])
def test_background_moves_to_the_front(head, tmp_path):
    """mmdet: the last row of the classifier is the background, which has no box and no mask."""
    model = detector(Pools(), 3, head=head, channels=16)
    layout = next(layout for layout in model.layouts() if layout.name == "mmdet")
    state = layout.to_theirs(model.state_dict())
    stage = ".0" if head.startswith("cascade") else ""
    names = [f"roi_head.bbox_head{stage}.fc_cls", f"roi_head.bbox_head{stage}.fc_reg"]
    assert [len(state[f"{name}.bias"]) for name in names] == [4, 12]
    assert len(state[f"roi_head.mask_head{stage}.conv_logits.bias"]) == 3
    state[f"{names[0]}.bias"] = torch.tensor([1.0, 2.0, 3.0, 9.0])
    torch.save({"state_dict": state}, tmp_path / "file.pth")
    zoo.load_checkpoint(model, tmp_path / "file.pth")
    first = model.heads.roi_heads[0] if stage else model.heads.roi_heads
    assert first.box_predictor.cls_score.bias.tolist() == [9, 1, 2, 3]
    assert first.box_predictor.bbox_pred.weight[:4].count_nonzero() == 0
    assert first.mask_predictor.mask_fcn_logits.weight[0].count_nonzero() == 0


def test_anchors_are_not_rounded_and_a_stride_apart():
    maps = [torch.zeros(1, 1, 2, 3, dtype=torch.float64)]
    # a padded image whose sides are no multiple of the map's
    boxes = Anchors([64], [[10.0]])(ImageList(torch.zeros(1, 3, 150, 200), [(150, 200)]), maps)[0].view(2, 3, 3, 4)
    half = torch.tensor([5 * math.sqrt(2), 5 / math.sqrt(2)], dtype=torch.float64)  # width, height at a ratio of 1/2
    centre = torch.tensor([128.0, 64.0], dtype=torch.float64)
    torch.testing.assert_close(boxes[1, 2, 0], torch.cat([centre - half, centre + half]), rtol=1e-14, atol=0)


def test_pooling_reads_the_middle_of_pixels():
    ramp = torch.arange(32.0).expand(1, 1, 32, 32)
    pooled = AlignedPooler([4], 2)({"0": ramp}, [torch.tensor([[16.0, 16.0, 48.0, 48.0]])], [(128, 128)])
    # the left half of the box spans the pixels 4 to 7 of the map, whose mean is 5.5
    torch.testing.assert_close(pooled[0, 0, 0], torch.tensor([5.5, 9.5]))


def test_paste():
    mask = torch.tensor([[0.0, 1.0], [0.0, 1.0]])[None, None]
    out = paste(mask, torch.tensor([[2.0, 1.0, 6.0, 3.0]]), (4, 8))
    assert out.shape == (1, 1, 4, 8)
    # the mask's two columns are centred at 3 and 5; beyond them it fades towards 0 outside of the box
    torch.testing.assert_close(out[0, 0, 1], torch.tensor([0, 0, 0, 0.25, 0.75, 0.75, 0, 0]))


def test_paste_of_boxes_that_reach_out_of_the_image():
    masks, none = torch.ones(4, 1, 2, 2), torch.zeros(4, 8)
    boxes = torch.tensor([[-2.0, -1, 2, 2], [9, 1, 12, 3], [-5, 1, -2, 3], [2, -4, 6, -1]])
    out = paste(masks, boxes, (4, 8))[:, 0]
    assert out[0].count_nonzero() == 4 and all(torch.equal(one, none) for one in out[1:])


def test_masks_with_gradients_on():
    """The same as without, and they lead back to the network."""
    torch.manual_seed(0)
    model = detector(Pools(), 5, channels=8, head_kwargs={"rpn_post_nms_top_n_test": 4}).eval()
    image = torch.randn(3, 64, 64)
    masks = model([image])[0]["masks"]
    with torch.no_grad():
        assert len(masks) > 0 and torch.equal(masks, model([image])[0]["masks"])
    masks.sum().backward()
    assert model.neck.laterals[0].weight.grad.isfinite().all()


@pytest.mark.parametrize("head", ["mask_rcnn", "cascade_mask_rcnn"])
def test_masks_stay_in_their_boxes_where_asked(head):
    torch.manual_seed(0)
    few = {"rpn_post_nms_top_n_test": 20}
    model = detector("resnet18", 5, head=head, channels=16, head_kwargs=few).eval()
    images, _ = batch()
    with torch.no_grad():
        pasted, inside = model(images), model(images, paste_masks=False)
    for image, one, other in zip(images, pasted, inside, strict=True):
        assert "masks" not in other and other["box_masks"].shape == (len(one["boxes"]), 1, 28, 28)
        assert len(one["boxes"]) > 0 and torch.equal(
            one["masks"], paste(other["box_masks"], other["boxes"], image.shape[1:])
        )


def batch(objects=True):
    images = [torch.randn(3, 65, 90), torch.randn(3, 96, 80)]
    targets = []
    for image in images:
        count = 2 if objects and image is images[0] else 0
        boxes = torch.tensor([[5.0, 5.0, 40.0, 40.0], [20.0, 10.0, 60.0, 50.0]])[:count]
        masks = torch.zeros(count, *image.shape[1:], dtype=torch.uint8)
        masks[:, 12:38, 22:38] = 1
        targets.append({"boxes": boxes, "labels": torch.tensor([0, 4])[:count], "masks": masks})
    return images, targets


@pytest.mark.parametrize("head", HEADS)
def test_trains_and_detects(head):
    """On timm's ResNet; an image, or all, may hold no object."""
    torch.manual_seed(0)
    few = {"rpn_post_nms_top_n_train": 20, "rpn_post_nms_top_n_test": 20} if "rcnn" in head else {}
    model = detector("resnet18", 5, head=head, channels=32 if head == "fcos" else 16, head_kwargs=few)
    for objects in (False, True):
        loss = sum(model.train()(*batch(objects)).values())
        loss.backward()
        assert torch.isfinite(loss)
        assert [name for name, p in model.named_parameters() if p.grad is None] == []
    images, _ = batch()
    with torch.no_grad():
        found = model.eval()(images)
    for image, one in zip(images, found, strict=True):
        assert len(one["boxes"]) == len(one["scores"]) == len(one["labels"])
        assert set(one["labels"].tolist()) <= set(range(5))
        if "mask" in head:
            assert one["masks"].shape == (len(one["boxes"]), 1, *image.shape[1:]) and len(one["boxes"]) > 0


# all that a head gives, so that two precisions do not choose differently
OPEN = {"score_thresh": 0.0, "nms_thresh": 1.0, "topk_candidates": 10000, "detections_per_img": 10000}
REGIONS = {"rpn_nms_thresh": 1.0, "rpn_post_nms_top_n_test": 100, "rpn_post_nms_top_n_train": 50}


@pytest.mark.parametrize("head", [pytest.param(h, marks=pytest.mark.slow if "cascade" in h else ()) for h in HEADS])
def test_mixed_precision_keeps_places(head):
    """bfloat16 knows every second pixel from 256 on: nine tenths of the boxes stay within a quarter of one."""
    torch.manual_seed(0)
    model = detector(Pools(), 1, head=head, channels=32, head_kwargs=REGIONS if "rcnn" in head else OPEN)
    image = torch.randn(3, 64, 512)
    target = {
        "boxes": torch.tensor([[301.3, 5.1, 377.7, 49.9]]),
        "labels": torch.tensor([0]),
        "masks": torch.ones(1, *image.shape[1:], dtype=torch.uint8),
    }
    if "rcnn" in head:  # regions are compared, before the few that are best are chosen
        regions = []
        model.heads.rpn.register_forward_hook(lambda module, args, out: regions.append(out[0][0]))
        nn.init.normal_(model.heads.rpn.head.cls_logits.weight, std=1.0)  # scores that differ by more than rounding
        stages = [stage for stage in model.modules() if isinstance(stage, RoIHeads)]
        for stage in stages:
            stage.fg_bg_sampler.batch_size_per_image, stage.detections_per_img = 16, 8
    losses, boxes = [], []
    for enabled in (False, True):
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            losses.append(model.train()([image], [target]))
            with torch.no_grad():
                found = model.eval()([image])[0]
        boxes.append(regions[-1] if "rcnn" in head else found["boxes"])
        assert {value.dtype for key, value in found.items() if key != "labels"} == {torch.float32}
    near = torch.cdist(*boxes, p=math.inf).amin(1)
    assert len(near) >= 100 and near.quantile(0.9) < 0.25
    exact, mixed = ({key: float(loss.detach()) for key, loss in each.items()} for each in losses)
    assert mixed == pytest.approx(exact, rel=0.02, abs=0.01)
    sum(losses[1].values()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("head", ["retinanet", "faster_rcnn"])
def test_loss_falls(head):
    torch.manual_seed(0)
    model, (images, targets) = detector("resnet18", 5, head=head, channels=16), batch()
    losses = losses_of(model, images, targets, lr=2e-3, steps=14)
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("head", ["mask_rcnn", "retinanet"])
def test_a_backbone_with_maps_of_one_stride(head, tmp_path):
    small = {"depths": (1, 1, 1, 1), "dim": 32, "channels": 16}
    model, (images, targets) = detector("nat_iso_s", 5, head=head, **small), batch()
    sum(model(images, targets).values()).backward()
    assert all(p.grad is not None for p in model.parameters()) and model.divisor == 32
    torch.save(model.state_dict(), tmp_path / "file.pth")
    assert zoo.load_checkpoint(detector("nat_iso_s", 5, head=head, **small), tmp_path / "file.pth").layout == "zoo"


@torch.no_grad()
def test_a_backbone_with_three_maps():
    model = detector("pit_ti_224", 5, head="mask_rcnn", channels=16).eval()
    assert model.heads.rpn.anchor_generator.strides == (8, 16, 32, 64)
    assert model([torch.randn(3, 224, 200)])[0]["boxes"].shape[1] == 4


@pytest.mark.parametrize("head", HEADS)
def test_is_pickled(head):
    model = detector("nat_m", 3, head=head, depths=(1, 1, 1, 1), dims=(32,) * 4, channels=32)
    again = pickle.loads(pickle.dumps(model))
    assert [layout.name for layout in again.layouts()] == [layout.name for layout in model.layouts()]


def test_norms_of_features_that_are_read():
    """RetinaNet leaves the finest map: no norm of it waits for a gradient, and a file's is left aside."""
    model = detector("nat_m", 2, head="retinanet", channels=8)
    norms = model.backbone.model.feature_norms
    assert [type(norm) for norm in norms] == [nn.Identity, nn.LayerNorm, nn.LayerNorm, nn.LayerNorm]
    layout = model.layouts()[0]
    assert layout.drops("backbone.norm0.weight") and not layout.drops("backbone.norm1.weight")


@pytest.mark.parametrize(
    "change,says",
    [
        ({"labels": torch.tensor([0, 5])}, "labels are 0 to 5; expected 0 to 4"),
        ({"boxes": torch.tensor([[5.0, 5, 5, 9], [0, 0, 9, 9]])}, "no width"),
        ({"boxes": torch.tensor([[5.0, 5, torch.inf, 9], [0, 0, 9, 9]])}, "a corner that is not a finite number"),
        ({"boxes": torch.zeros(3, 4)}, r"boxes are \(3, 4\) and labels \(2,\); expected \(N, 4\) and \(N\)"),
        ({"labels": torch.tensor([[0], [1]])}, r"and labels \(2, 1\); expected"),
        ({"masks": torch.zeros(2, 9, 9)}, r"masks are \(2, 9, 9\)"),
        ({"boxes": torch.tensor([[5, 5, 9, 9], [0, 0, 9, 9]])}, r"boxes are torch\.int64 .* expected floats"),
        ({"boxes": torch.zeros(0, 4), "labels": torch.zeros(0)}, r"labels torch\.float32; expected .* integers"),
    ],
)
def test_bad_targets(change, says):
    model, (images, targets) = detector(Pools(), 5, channels=8), batch()
    with pytest.raises(ValueError, match=f"target 0: .*{says}"):
        model(images, [targets[0] | change, targets[1]])


@pytest.mark.parametrize("head", ["faster_rcnn", "retinanet", "fcos"])
def test_labels_of_other_integers(head):
    images, targets = batch()
    losses = []
    for dtype in (torch.long, torch.int32, torch.uint8):
        torch.manual_seed(0)
        model = detector(Pools(), 5, head=head, channels=32)
        losses.append(model(images, [target | {"labels": target["labels"].to(dtype)} for target in targets]))
    assert losses[0] == losses[1] == losses[2]


def test_bad_calls():
    model, (images, targets) = detector(Pools(), 5, channels=8), batch()
    for given in ([],), ([], []):
        with pytest.raises(ValueError, match="there are no images"):
            model.train(len(given) == 2)(*given)
    model.train()
    with pytest.raises(ValueError, match="in train mode and got no targets"):
        model(images)
    with pytest.raises(ValueError, match="in eval mode and got targets"):
        model.eval()(images, targets)
    with pytest.raises(ValueError, match="head is 'yolo'"):
        detector(Pools(), 5, head="yolo")
    with pytest.raises(ValueError, match="no anchors"):
        detector(Pools(), 5, head="fcos", anchor_size=8)
    for head, name in (
        ("mask_rcnn", "score_thresh"),  # it is box_score_thresh there
        ("faster_rcnn", "mask_head"),
        ("cascade_mask_rcnn", "box_score_thresh"),
        ("retinanet", "score_tresh"),
        ("fcos", "min_size"),
    ):
        with pytest.raises(ValueError, match=f"head_kwargs has {name}, which {head} does not read; it reads "):
            detector(Pools(), 5, head=head, channels=32, head_kwargs={name: 0.3})
    with pytest.raises(ValueError, match="channels is 16; it must be a multiple of 32"):
        detector(Pools(), 5, head="fcos", channels=16)


def test_fcos_norms_one_pixel_of_one_channel():
    """A small image alone is answered as it is among others."""
    model = detector(Pools(), 3, head="fcos", channels=32)
    maps = torch.randn(2, 32, 1, 1)
    alone, among = model.heads.head([maps[:1]]), model.heads.head([maps])
    for key in ("cls_logits", "bbox_regression", "bbox_ctrness"):
        torch.testing.assert_close(alone[key], among[key][:1])
    losses = model([torch.rand(3, 64, 64)], [{"boxes": torch.tensor([[4.0, 4, 40, 40]]), "labels": torch.tensor([1])}])
    assert all(loss.isfinite() for loss in losses.values())


@pytest.mark.parametrize("head,layers", [("mask_rcnn", 3), ("cascade_mask_rcnn", 9), ("retinanet", 1)])
def test_layers_for_other_classes_are_made_anew(head, layers, tmp_path):
    """A file for other classes keeps all else: an RPN's own classifier too."""
    large, model = detector(Pools(), 7, head=head, channels=16), detector(Pools(), 3, head=head, channels=16)
    state = large.layouts()[0].to_theirs(large.state_dict())
    torch.save(state, tmp_path / "file.pth")
    assert zoo.load_checkpoint(model, tmp_path / "file.pth").head_remade
    there, here = large.state_dict(), model.state_dict()
    other = {name.rpartition(".")[0] for name in here if here[name].shape != there[name].shape}
    assert len(other) == layers
    assert all(torch.equal(here[name], there[name]) for name in here if name.rpartition(".")[0] not in other)
    state.pop("neck.fpn_convs.0.conv.bias")
    torch.save(state, tmp_path / "file.pth")
    with pytest.raises(zoo.CheckpointError, match="neck"):
        zoo.load_checkpoint(model, tmp_path / "file.pth")


def test_what_trainers_ask_for():
    model = detector("litv2_s", 3, head="retinanet", channels=16)
    names = dict(model.named_parameters())
    scales = {f"backbone.model.{name}": scale for name, scale in model.backbone.model.lr_scales().items()}
    assert scales and model.lr_scales() == scales and scales.keys() <= names.keys()
    kept = detector("maxvit_t", 3, channels=16).no_weight_decay()
    assert kept and all(name.startswith("backbone.model.stages.") for name in kept)
    model.set_grad_checkpointing()
    assert all(stage.grad_checkpointing for stage in model.backbone.model.stages)


def test_as_many_samples_as_a_region_has_pixels():
    x = torch.randn(1, 1, 8, 8)
    pooled = AlignedPooler([1], 1)({"0": x}, [torch.tensor([[0.0, 0, 8, 8]])], [(8, 8)])
    assert pooled.item() == pytest.approx(x.mean().item(), abs=1e-6)


def test_fcos_keeps_what_is_as_sure_as_the_published():
    assert detector(Pools(), 2, head="fcos", channels=32).heads.score_thresh == 0.05


@pytest.mark.parametrize("head", ["retinanet", "fcos"])
def test_only_the_maps_are_compiled(head):
    """Objects and regions differ from batch to batch: graphs for them would never be used again."""
    torch.manual_seed(0)
    model, graphs = detector(Pools(), 3, head=head, channels=32), []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=backend)
    for count, sides in enumerate([(64, 50), (40, 60)]):
        images = [torch.randn(3, 96, side) for side in (96, *sides)]
        targets = [
            {
                "boxes": torch.tensor([[4.0, 4.0, 30.0, 40.0]]).expand(count, 4),
                "labels": torch.zeros(count, dtype=torch.long),
            }
            for _ in images
        ]
        torch.manual_seed(1)
        want = model(images, targets)
        torch.manual_seed(1)
        assert compiled(images, targets) == want
        assert len(graphs) == 1
    model.eval()
    detections = compiled(images)
    assert len(detections) == 3
    assert len(graphs) <= 2  # the mode is another
