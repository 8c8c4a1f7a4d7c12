"""The parts of detectors: mmdet's maps in float64, its anchors, matching and pooling, masks put into images."""

import math

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torchvision.models.detection._utils import Matcher
from torchvision.models.detection.image_list import ImageList

import golden
import zoo
from detector_cases import Pools
from head_records import DIMS, Given, inputs, load
from zoo.heads import Detector, detector
from zoo.heads.anchors import AlignedPooler, Anchors, BestMatcher
from zoo.heads.fpn import FPN
from zoo.heads.paste import paste


def released(tmp_path, record):
    torch.save({"state_dict": golden.official_state_dict(record)}, tmp_path / "released.pth")
    return tmp_path / "released.pth"


def check_gradients(maps, record):
    for x, where, want in zip(maps, record["input_grad_positions"], record["input_grad_samples"], strict=True):
        if where is None:
            assert x.grad is None
        else:
            assert golden.relative_error(golden.samples(x.grad, where), golden.unpack(want)) < 1e-8


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


@pytest.mark.parametrize("sides", [(1, 1), (2, 1), (2, 2), (4, 2), (16, 2), (3, 3)], ids=str)
def test_levels_of_narrow_maps(sides):
    """PyTorch leaves such results, or gradients of weights, unwritten in part: they hold what memory held."""
    torch.manual_seed(0)
    neck, maps = FPN([64], 64, extra=1, convolved=True), torch.randn(2, 64, *sides)

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
