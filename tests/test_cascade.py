"""Cascade Mask R-CNN: what three stages make of a region, their losses, and that they learn."""

import math

import pytest
import torch

from detector_cases import Pools, batch
from steps import losses_of
from zoo.heads import cascade, detector

STAGES = 3


def model(classes=2, samples=16):
    built = detector(
        Pools(), classes, head="cascade_mask_rcnn", channels=16, head_kwargs={"rpn_post_nms_top_n_train": 50}
    )
    for stage in built.heads.roi_heads:
        stage.fg_bg_sampler.batch_size_per_image = samples
    return built


def answering(rows):
    """A cascade whose predictors answer with their biases, whatever they see: (logits, deltas, mask logits) a stage."""
    built = model()
    for stage, (logits, deltas, masks) in zip(built.heads.roi_heads, rows, strict=True):
        box, mask = stage.box_predictor, stage.mask_predictor.mask_fcn_logits
        for layer, bias in ((box.cls_score, logits), (box.bbox_pred, deltas), (mask, masks)):
            torch.nn.init.zeros_(layer.weight)
            layer.bias.data = torch.tensor(bias)
    return built.heads.roi_heads


MAPS = {str(i): torch.zeros(1, 16, 32 >> i, 32 >> i) for i in range(4)}


def told(rows):
    """What it finds in one region of 30 x 40 pixels."""
    with torch.no_grad():
        (found,), losses = answering(rows).eval()(MAPS, [torch.tensor([[40.0, 50, 70, 90]])], [(128, 128)])
    assert losses == {}
    return {key: value[found["labels"].argsort()] for key, value in found.items()}


def test_scores_and_masks_are_means_over_the_stages():
    """Scores of the mean logits, as published; masks of the mean probabilities."""
    logits, masks = (
        ([0.0, 3.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 1.5]),
        ([0.0, 2.0, -1.0], [0.0, 0.5, 1.0], [0.0, -3.0, 4.0]),
    )
    found = told([(row, [0.0] * 12, mask) for row, mask in zip(logits, masks, strict=True)])
    parts = [1.0, math.exp(3 / 3), math.exp(1.5 / 3)]
    assert found["labels"].tolist() == [1, 2]
    assert found["scores"].tolist() == pytest.approx([part / sum(parts) for part in parts[1:]], rel=1e-5)
    assert found["masks"].shape == (2, 1, 28, 28)
    for label in (1, 2):
        mean = sum(1 / (1 + math.exp(-row[label])) for row in masks) / STAGES
        assert found["masks"][label - 1].flatten().tolist() == pytest.approx([mean] * 784, rel=1e-5)


def test_each_stage_moves_the_regions_of_the_one_before():
    """By deltas of the likeliest class, in tenths and twentieths of the side; the last by each class's, in 0.033."""
    right, left = [0.0, 2.0, 0.0], [0.0, 0.0, 2.0]  # the likeliest is 1, or 2
    deltas = [0.0] * 4 + [1.0, 0.0, 0.0, 0.0] + [-1.0, 0.0, 0.0, 0.0]
    found = told([(likely, deltas, [0.0] * 3) for likely in (left, right, right)])
    moved = -30 / 10 + 30 / 20
    expected = [[40 + moved + x, 50.0, 70 + moved + x, 90.0] for x in (0.033 * 30, -0.033 * 30)]
    torch.testing.assert_close(found["boxes"], torch.tensor(expected), rtol=0, atol=1e-4)


def test_what_the_next_stage_learns_from(monkeypatch):
    """A region that holds an object moves by the deltas of its class, others by the likeliest's; objects are left out,
    since every stage adds them itself."""
    deltas = [0.0] * 4 + [1.0, 0.0, 0.0, 0.0] + [-1.0, 0.0, 0.0, 0.0]
    heads, seen = answering([([0.0, 2.0, 0.0], deltas, [0.0] * 3)] * STAGES), []
    select = heads[1].select_training_samples
    monkeypatch.setattr(heads[1], "select_training_samples", lambda *given: seen.append(given[0]) or select(*given))
    target = {"boxes": torch.tensor([[40.0, 50, 70, 90]]), "labels": torch.tensor([2])}
    target["masks"] = torch.ones(1, 128, 128)
    regions = torch.tensor([[42.0, 50, 72, 90], [80, 90, 110, 120]])  # the first is one of the object
    heads(MAPS, [regions], [(128, 128)], [target])
    ((found,),) = seen
    expected = torch.tensor([[39.0, 50, 69, 90], [83, 90, 113, 120]])
    torch.testing.assert_close(found[found[:, 0].argsort()], expected, rtol=0, atol=1e-4)


def test_deviations_of_each_stage():
    """mmdet's `target_stds`, of which torchvision takes the inverses: a box moves by delta times deviation."""
    for stage, stds in zip(model().heads.roi_heads, ((0.1, 0.2), (0.05, 0.1), (0.033, 0.067)), strict=True):
        weights = [1 / stds[0]] * 2 + [1 / stds[1]] * 2
        assert list(stage.box_coder.weights) == pytest.approx(weights, rel=1e-12)


def test_losses_of_three_stages(monkeypatch):
    built, (images, targets) = model(5), batch()
    weights, values = (1.0, 0.5, 0.25), []
    for alike in (False, True):
        if alike:
            monkeypatch.setattr(cascade, "LOSS_WEIGHTS", (1.0,) * STAGES)
        torch.manual_seed(0)
        values.append({key: float(loss.detach()) for key, loss in built(images, targets).items()})
    kinds = ("loss_classifier", "loss_box_reg", "loss_mask")
    assert values[0].keys() == {
        "loss_objectness",
        "loss_rpn_box_reg",
        *(f"{k}_{i}" for k in kinds for i in range(STAGES)),
    }
    for kind in kinds:
        for i, weight in enumerate(weights):
            assert values[1][f"{kind}_{i}"] > 0
            assert values[0][f"{kind}_{i}"] == pytest.approx(weight * values[1][f"{kind}_{i}"], rel=1e-4)


def test_thresholds_of_each_stage():
    stages = model(samples=512).heads.roi_heads
    matchers = [stage.proposal_matcher for stage in stages]
    assert [m.high_threshold for m in matchers] == [m.low_threshold for m in matchers] == [0.5, 0.6, 0.7]
    assert {stage.fg_bg_sampler.positive_fraction for stage in stages} == {0.25}
    assert {(stage.score_thresh, stage.nms_thresh, stage.detections_per_img) for stage in stages} == {(0.05, 0.5, 100)}


def test_loss_of_boxes_is_ten_times_giou_over_all_regions():
    stage, labels = model().heads.roi_heads[0], torch.tensor([1, 0])
    regions = torch.tensor([[0.0, 0, 10, 10], [50, 50, 60, 60]])
    truth = [{"boxes": torch.tensor([[0.0, 0, 10, 20]])}]
    loss = cascade._box_loss(stage, [regions], torch.zeros(2, 12), labels, labels > 0, [torch.tensor([0, 0])], truth)
    assert float(loss) == pytest.approx(10 * 0.5 / 2)


def test_no_gradient_goes_through_the_regions_of_the_next_stage():
    deltas, regions = torch.zeros(1, 12, requires_grad=True), [torch.tensor([[0.0, 0, 10, 10]])]
    (found,) = cascade._refine(model().heads.roi_heads[0], regions, deltas, torch.tensor([1]), [(32, 32)])
    assert not found.requires_grad


def test_loss_falls():
    torch.manual_seed(0)
    built, (images, targets) = model(5, samples=8), batch()
    losses = losses_of(built, images, targets, lr=5e-4, steps=6)
    assert losses[-1] < 0.9 * losses[0]
