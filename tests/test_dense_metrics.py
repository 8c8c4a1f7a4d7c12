"""Metrics against independent counts, and however many processes share the images."""

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pycocotools import mask as tools
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ranks import on_ranks
from recipes import config, distributed
from recipes.data import DataError
from recipes.metrics.confusion import Confusion
from recipes.metrics.detection import Detection, at_size, boxes_at, masks_at
from recipes.metrics.segmentation import Segmentation
from zoo.heads.paste import paste
from zoo.heads.segmenter import pixel_loss

NAMES = ["ant", "bee", "cat", "dog", "elk"]  # of an elk nothing is there or found
FILES = Path(__file__).parent / "detections"  # objects and detections in COCO's formats, made up once


def maps(count=5, seed=0):
    """Logits at half the size of their label maps, (7 + n, 10 + n) pixels, some of which are not labelled."""
    generator = torch.Generator().manual_seed(seed)
    for number in range(count):
        size = (2 * (4 + number), 2 * (5 + number))
        labels = torch.randint(4, size, generator=generator)
        labels[torch.rand(size, generator=generator) < 0.2] = 255
        logits = torch.randn(5, size[0] // 2, size[1] // 2, generator=generator)
        logits[4] = -9
        yield logits, {"labels": labels, "index": number}


def test_an_image_that_has_no_loss_is_not_left_out():
    metrics = Segmentation(NAMES)
    for number, (logits, target) in enumerate(maps()):
        metrics.update([logits * torch.nan if number == 2 else logits], [target])
    assert metrics.compute()["loss"] == torch.inf


def counted(left_out=()):
    """mIoU, mAcc, aAcc and IoU of each class, pixel by pixel."""
    both, true, found, right = {}, {}, {}, 0
    for logits, target in maps():
        large = F.interpolate(logits[None], target["labels"].shape, mode="bilinear")[0]
        for place in np.ndindex(target["labels"].shape):
            label = int(target["labels"][place])
            if label == 255:
                continue
            taken = max(range(5), key=lambda k, large=large, place=place: large[(k, *place)].item())
            true[label] = true.get(label, 0) + 1
            found[taken] = found.get(taken, 0) + 1
            if label == taken:
                both[label] = both.get(label, 0) + 1
                right += 1
    iou = {k: 100 * both.get(k, 0) / (true.get(k, 0) + found.get(k, 0) - both.get(k, 0)) for k in true | found}
    kept = [k for k in iou if k not in left_out]
    return {
        "miou": sum(iou[k] for k in kept) / len(kept),
        "macc": sum(100 * both.get(k, 0) / true[k] for k in kept) / len(kept),
        "aacc": 100 * right / sum(true.values()),
        **{f"iou/{NAMES[k]}": value for k, value in iou.items()},
    }


@pytest.mark.parametrize("left_out", [(), (1,)])
def test_miou_is_a_plain_count(left_out):
    metrics = Segmentation(NAMES, left_out)
    for logits, target in maps():
        metrics.update([logits], [target])
    values, expected = metrics.compute(), counted(left_out)
    assert len(expected) == 7 and values.keys() == {*expected, "loss"}
    assert {key: values[key] for key in expected} == pytest.approx(expected, abs=1e-4)
    assert metrics.confusion.counts.dtype == torch.int64


def test_loss_is_that_of_a_labelled_pixel():
    metrics = Segmentation(NAMES)
    metrics.update(*map(list, zip(*maps(), strict=True)))
    large = [(F.interpolate(logits[None], t["labels"].shape, mode="bilinear")[0], t["labels"]) for logits, t in maps()]
    logits = torch.cat([part.flatten(1) for part, _ in large], 1).T
    labels = torch.cat([labels.flatten() for _, labels in large])
    expected = F.cross_entropy(logits, labels, ignore_index=255)
    assert metrics.compute()["loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_nothing_to_measure_is_an_error():
    metrics = Segmentation(NAMES)
    metrics.update([torch.zeros(5, 4, 4)], [{"labels": torch.full((4, 4), 255), "index": 0}])
    with pytest.raises(DataError, match="no pixel of the validation set is labelled"):
        metrics.compute()
    metrics = Segmentation(NAMES, (1, 2))
    metrics.update([torch.randn(5, 4, 4)], [{"labels": torch.tensor([1, 2, 255, 2]).expand(4, 4), "index": 0}])
    with pytest.raises(DataError, match=r"of classes in data.left_out \(bee, cat\): there is nothing to evaluate"):
        metrics.compute()
    with pytest.raises(DataError, match="no object to find"):
        found = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "scores": torch.zeros(0)}
        true = {**found, "index": 0, "size": (4, 4), "area": torch.zeros(0), "crowd": torch.zeros(0, dtype=torch.bool)}
        empty = Detection(NAMES, masks=False)
        empty.update([{**found, "size": (4, 4)}], [true])
        empty.compute()


def segmented_by(ranks):
    distributed.join(config.compose([]))
    metrics = Segmentation(NAMES, (1,))
    for logits, target in list(maps(7))[distributed.rank() :: ranks]:
        metrics.update([logits], [target])
    return metrics.compute()


def test_miou_of_two_processes_is_that_of_one():
    (alone,), both = on_ranks(1, segmented_by, 1), on_ranks(2, segmented_by, 2)
    for values in both:
        assert values.pop("loss") == pytest.approx(alone["loss"], rel=1e-12)
        assert values == {key: value for key, value in alone.items() if key != "loss"}


def samples():
    """The files as predictions and targets: the first image's prediction comes at another size than the image's."""
    truth = json.loads((FILES / "truth.json").read_text())
    found = json.loads((FILES / "found.json").read_text())
    for image in truth["images"]:
        mine, theirs = (
            [row for row in rows if row["image_id"] == image["id"]] for rows in (truth["annotations"], found)
        )
        size = (image["height"], image["width"])
        yield (
            {**objects(theirs, size), "scores": torch.tensor([row["score"] for row in theirs]), "size": size},
            {
                **objects(mine, size),
                "area": torch.tensor([row["area"] for row in mine]),
                "crowd": torch.tensor([bool(row["iscrowd"]) for row in mine]),
                "index": image["id"],
                "size": size,
            },
        )


def objects(rows, size):
    boxes = torch.tensor([row["bbox"] for row in rows], dtype=torch.float64).reshape(-1, 4)
    masks = [torch.from_numpy(tools.decode(row["segmentation"])) for row in rows]
    return {
        "boxes": torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1),
        "labels": torch.tensor([row["category_id"] - 1 for row in rows], dtype=torch.int64),
        "masks": torch.stack(masks).float() if masks else torch.zeros(0, *size),
    }


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_ap_is_pycocotools_own(kind):
    metrics = Detection(["a", "b", "c"], masks=True)
    for prediction, target in samples():
        metrics.update([prediction], [target])
    values, ours = metrics.compute(), {"bbox": "box", "segm": "mask"}[kind]
    found = json.loads((FILES / "found.json").read_text())
    if kind == "segm":  # with boxes beside masks, pycocotools would tell small from large by the box
        found = [{key: value for key, value in row.items() if key != "bbox"} for row in found]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(FILES / "truth.json")
        theirs = COCOeval(truth, truth.loadRes(found), kind)
        theirs.evaluate()
        theirs.accumulate()
        theirs.summarize()
    names = ["ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large"]
    expected = {f"{ours}_{name}": round(100 * value, 4) for name, value in zip(names, theirs.stats, strict=False)}
    assert all(5 < value < 95 for value in expected.values()), "values that a wrong rule could not reach by chance"
    assert {key: values[key] for key in expected} == expected
    assert values[f"{ours}_ar100"] == round(100 * theirs.stats[8], 4)
    assert np.mean([values[f"{ours}_ap/{name}"] for name in "abc"]) == pytest.approx(values[f"{ours}_ap"], abs=1e-3)


def detected_by(ranks):
    distributed.join(config.compose([]))
    metrics = Detection(["a", "b", "c"], masks=True)
    for prediction, target in list(samples())[distributed.rank() :: ranks]:
        metrics.update([prediction], [target])
    return metrics.compute()


def test_ap_of_two_processes_is_that_of_one():
    (alone,), both = on_ranks(1, detected_by, 1), on_ranks(2, detected_by, 2)
    assert len(alone) > 15 and both == [alone, alone]


def test_predictions_are_measured_at_the_size_of_their_image():
    mask = torch.zeros(1, 1, 10, 20)
    mask[..., 2:6, 4:10] = 1
    found = {"boxes": torch.tensor([[4.0, 2, 10, 6]]), "labels": torch.tensor([1]), "scores": torch.tensor([0.9])}
    scaled = at_size({**found, "masks": mask, "size": (10, 20)}, (20, 40))
    assert scaled["boxes"].tolist() == [[8, 4, 20, 12]] and scaled["masks"].shape == (1, 20, 40)
    expected = torch.zeros(20, 40, dtype=torch.bool)
    expected[4:12, 8:20] = True
    assert torch.equal(scaled["masks"][0], expected)
    none = {key: value[:0] for key, value in {**found, "masks": mask}.items()}
    assert at_size({**none, "size": (10, 20)}, (5, 5))["masks"].shape == (0, 5, 5)


def discs(count):
    """Shares of a disc in a box, steeper than what a network gives."""
    places = (torch.arange(28) + 0.5) / 28 * 2 - 1
    return (4 * (0.9 - torch.hypot(places, places[:, None]))).sigmoid().expand(count, 1, 28, 28)


def test_masks_in_boxes_are_pasted_once_at_the_size_of_the_image():
    boxes = torch.tensor([[3.3, 2.1, 6.9, 5.2], [0.0, 0.0, 20.0, 10.0]])  # as the network saw them, at a quarter
    found = {"boxes": boxes, "labels": torch.tensor([1, 0]), "scores": torch.tensor([0.9, 0.8]), "size": (10, 20)}
    masks = at_size({**found, "box_masks": discs(2)}, (40, 80))["masks"]
    y, x = torch.meshgrid(torch.arange(40) + 0.5, torch.arange(80) + 0.5, indexing="ij")
    for mask, (left, top, right, bottom) in zip(masks, (4 * boxes).tolist(), strict=True):
        across, down = (2 * (x - left) / (right - left) - 1, 2 * (y - top) / (bottom - top) - 1)
        disc = torch.hypot(across, down) <= 0.9
        assert (mask & disc).sum() / (mask | disc).sum() > 0.97
    twice = at_size({**found, "masks": paste(discs(2), boxes, (10, 20))}, (40, 80))["masks"]
    assert (masks[0] & twice[0]).sum() / (masks[0] | twice[0]).sum() < 0.9


def test_masks_in_boxes_are_measured():
    """Objects that are discs are found as discs, image by image, a mask at a time."""
    boxes = torch.tensor([[2.0, 3.0, 30.0, 17.0], [20.5, 10.0, 60.0, 39.5]])
    found = {"boxes": boxes / 2, "labels": torch.tensor([0, 1]), "scores": torch.tensor([0.9, 0.8]), "size": (20, 40)}
    masks = at_size({**found, "box_masks": discs(2)}, (40, 80))["masks"]
    area, crowd = masks.sum((1, 2)), torch.zeros(2, dtype=torch.bool)
    true = {"boxes": boxes, "labels": found["labels"], "masks": masks, "area": area, "crowd": crowd}
    metrics = Detection(["a", "b"], masks=True)
    metrics.update([{**found, "box_masks": discs(2)}], [{**true, "index": 0, "size": (40, 80)}])
    values = metrics.compute()
    assert values["mask_ap"] == values["box_ap"] == 100
    many = {**found, "boxes": torch.tensor([[0.0, 0.0, 9.0, 9.0]]).expand(10**6, 4), "box_masks": discs(10**6)}
    assert next(masks_at(many, (2000, 3000))).shape == (2000, 3000)  # 6 TB of all


def test_nothing_of_a_gpu_has_no_fixed_order(monkeypatch):
    """Where algorithms must be deterministic, torch refuses sums and means within the cross entropy of label maps."""
    given, entropy = [], F.cross_entropy
    monkeypatch.setattr(F, "cross_entropy", lambda *args, **kwargs: given.append(kwargs) or entropy(*args, **kwargs))
    metrics = Segmentation(NAMES)
    for logits, target in maps(1):
        metrics.update([logits], [target])
        pixel_loss(logits[None], target["labels"][None], 255)
    assert [kwargs["reduction"] for kwargs in given] == ["none", "none"]


def test_a_model_of_more_classes_is_not_measured():
    with pytest.raises(ValueError, match="class 4 was predicted, of 3"):
        Confusion(3).update(torch.full((2, 2), 4), torch.zeros(2, 2, dtype=torch.int64))


def test_boxes_of_an_image_whose_sides_were_resized_by_different_factors():
    found = boxes_at({"boxes": torch.tensor([[4.0, 2, 10, 6]]), "size": (10, 20)}, (30, 40))
    assert found.tolist() == [[8, 6, 20, 18]]
