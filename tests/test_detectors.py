"""Detectors: any backbone, images without objects, training, masks in place, targets and calls that are wrong."""

import math
import pickle

import pytest
import torch
from torch import nn
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import batched_nms, box_iou

import zoo
from detector_cases import HEADS, Pools, batch
from steps import losses_of
from zoo.heads import detector
from zoo.heads.anchors import AlignedPooler
from zoo.heads.paste import paste
from zoo.heads.rcnn import masks_in


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
    without = detector("nat_m", 2, head="retinanet", channels=8, feature_norms=False).layouts()[0]
    assert not any(without.drops(f"backbone.norm{level}.weight") for level in range(4))


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
        ("fcos", "anchor_generator"),
        ("cascade_mask_rcnn", "rpn_anchor_generator"),
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
