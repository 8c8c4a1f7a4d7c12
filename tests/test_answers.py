"""What an evaluation predicted for each image: files that other tools measure, and that name images and classes."""

import contextlib
import io
import json
import os

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from dense_cases import all_of, build, mask, picture
from recipes import config
from recipes.answers import LabelMaps
from recipes.data.masks import values_of
from recipes.metrics.detection import Detection
from recipes.task import create

SIZE = (30, 20)


@pytest.fixture
def coco(tmp_path):
    """Four images whose ids and categories are not numbered from 0 on, with objects of all kinds but crowds."""
    rng, things = np.random.default_rng(0), []
    for number in range(12):
        x, y, width, height = (rng.integers(0, 8), rng.integers(0, 6), *rng.integers(6, 12, 2))
        box = [float(side) for side in (x, y, width, height)]
        corners = [x, y, x + width, y, x + width, y + height, x, y + height]
        things.append(
            {"id": number + 1, "image_id": 40 - number % 4, "category_id": (7, 3)[number % 3 == 0], "iscrowd": 0}
            | {"bbox": box, "area": box[2] * box[3], "segmentation": [[float(corner) for corner in corners]]}
        )
    files = [{"id": 40 - k, "file_name": f"{k}.jpg", "width": SIZE[0], "height": SIZE[1]} for k in range(4)]
    content = {"images": files, "annotations": things, "categories": [{"id": 7, "name": "a"}, {"id": 3, "name": "b"}]}
    for split in ("train", "val"):
        for k in range(4):
            picture(tmp_path / split / f"{k}.jpg", SIZE, (40 * k, 9, 9))
        (tmp_path / f"{split}.json").write_text(json.dumps(content))
    return tmp_path


def found_near(target, seed, classes=2):
    """Boxes and masks of an image, a little off, with scores; some are of the other class."""
    draw = torch.Generator().manual_seed(seed)
    count = len(target["boxes"])
    boxes = target["boxes"] + torch.randn(count, 4, generator=draw)
    masks = torch.roll(target["masks"], (1, 1), (1, 2)).float()
    labels = torch.where(torch.rand(count, generator=draw) < 0.2, (target["labels"] + 1) % classes, target["labels"])
    scores = torch.rand(count, generator=draw)
    return {"boxes": boxes, "labels": labels, "scores": scores, "masks": masks, "size": target["size"]}


def objects_of(folder, data):
    """Of predictions near the truth, the metrics and the file."""
    task = create(config.compose(["task=detect", "data=coco_json", f"data.root={folder}", "task.head=mask_rcnn"]))
    metrics, answers = task.metrics(data), task.answers(data)
    assert isinstance(metrics, Detection)
    for _, targets in all_of(data.val, train=False):
        predictions = [found_near(target, int(target["index"])) for target in targets]
        metrics.update(predictions, targets)
        answers.note(predictions, targets)
    return metrics.compute(), json.loads(answers.files(data, metrics)["-objects.json"])


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_others_measure_objects_as_the_evaluation_does(coco, kind):
    """pycocotools reads both files by itself."""
    plain = ["data.short_side=null", "data.long_side=null"]
    values, objects = objects_of(coco, build("detect", "data=coco_json", f"data.root={coco}", *plain))
    if kind == "segm":  # else the area of a mask is that of its box
        objects = [{key: value for key, value in thing.items() if key != "bbox"} for thing in objects]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(coco / "val.json"))
        measured = COCOeval(truth, truth.loadRes(objects), kind)
        measured.evaluate()
        measured.accumulate()
        measured.summarize()
    ours = values["box_ap" if kind == "bbox" else "mask_ap"]
    assert 5 < ours < 95 and ours == pytest.approx(100 * measured.stats[0], abs=1e-4)


def test_objects_of_images_without_a_file():
    """Scenes have no ids: an image has its index, a class its number from 1 on."""
    data = build("detect", "data=scenes", "data.val_count=3", "data.img_size=64")
    task = create(config.compose(["task=detect", "task.head=mask_rcnn"]))
    metrics = task.metrics(data)
    for _, targets in all_of(data.val, train=False):
        metrics.update([found_near(target, 0, 10) for target in targets], targets)
    metrics.compute()
    objects = json.loads(task.answers(data).files(data, metrics)["-objects.json"])
    assert {thing["image_id"] for thing in objects} == {0, 1, 2}
    assert {thing["category_id"] for thing in objects} <= set(range(1, 11))


@pytest.mark.parametrize(
    ("typed", "stored"),
    [
        ([], (2, 0)),
        (["data.label_ids=[7,40,255]", "data.num_classes=null", "data.class_names=[a,b,c]"], (255, 7)),
        (["data.reduce_zero_label=true"], (3, 1)),
    ],
)
def test_label_maps_have_the_values_of_masks(tmp_path, typed, stored):
    """And the sizes of their images; the maps of perfect predictions are the masks."""
    for split in ("train", "val"):
        for name, size in (("one", (30, 20)), ("two", (17, 9))):
            picture(tmp_path / "images" / split / f"{name}.jpg", size)
            mask(tmp_path / "masks" / split / f"{name}.png", stored, size)
    data = build("segment", "data=masks", f"data.root={tmp_path}", "data.num_classes=3", *typed)
    answers = LabelMaps(values_of(data.val.records))
    for _, targets in all_of(data.val, train=False):
        answers.note([torch.eye(3)[target["labels"]].movedim(2, 0) for target in targets], targets)
    files = answers.files(data, None)
    assert files.keys() == {"-labels/one.png", "-labels/two.png"}
    for name in ("one", "two"):
        with Image.open(io.BytesIO(files[f"-labels/{name}.png"])) as drawn:
            assert drawn.mode == "L"
            with Image.open(tmp_path / "masks" / "val" / f"{name}.png") as true:
                assert np.array_equal(np.asarray(drawn), np.asarray(true))


def names_of(data):
    """Of the label maps of all images, in the order of the data set."""
    answers = LabelMaps(None)
    for _, targets in all_of(data.val, train=False):
        answers.note([torch.zeros(3, *target["labels"].shape) for target in targets], targets)
    return [name.removeprefix("-labels/") for name in answers.files(data, None)]


def masked(root, names):
    """Images in folders, with their masks; returns what is typed to evaluate them."""
    for split in ("train", "val"):
        for name in names:
            picture(root / "images" / split / name, SIZE)
            mask(root / "masks" / split / f"{os.path.splitext(name)[0]}.png", (0, 1), SIZE)
    given = ["data=masks", f"data.root={root}", "data.num_classes=3", "data.short_side=null", "data.long_side=null"]
    return [*given, "data.on_bad_image=replace"]


def test_label_maps_are_named_after_images_below_their_folder(tmp_path):
    """However long or written its path; a folder is named where images are called alike, else a suffix."""
    root = tmp_path / ("d" * 120) / ("e" * 120)
    given = masked(root, ["a.jpg", "b/a.jpg", "b/c/d.jpg", "e.jpg", "e.png"])
    named = ["a.png", "b-a.png", "d.png", "e.jpg.png", "e.png.png"]
    assert names_of(build("segment", *given)) == named
    (root / "images" / "val" / "a.jpg").write_bytes(b"no image")  # without an answer, it keeps its name
    assert names_of(build("segment", *given)) == named[1:]


def test_label_maps_of_images_in_deep_folders(tmp_path):
    """A path that is longer than a name can be, in letters of two bytes."""
    deep = "/".join(["é" * 100] * 3)
    named = names_of(build("segment", *masked(tmp_path, ["a.jpg", f"{deep}/a.jpg"])))
    assert len({*named}) == 2 and "a.png" in named
    assert max(len(os.fsencode(name)) for name in named) <= 255 and all(name.endswith("a.png") for name in named)


@pytest.mark.parametrize(
    ("paths", "named"),
    [
        ([None], ["000000.png"]),
        ([None, "x/000000.png", "w/q.png"], ["000000.png", "x-000000.png", "q.png"]),
        (["x/y.png", "z/y.png", "w/q.png"], ["x-y.png", "z-y.png", "q.png"]),
        (["../../../y.png", ".y.png", "a\0b.png", "/", ".../"], None),
    ],
)
def test_label_maps_of_rows(tmp_path, paths, named):
    """After the images' own files, or by number where a table names none; nowhere else than in their folder."""
    rows = {"image": [], "annotation": []}
    for key, mode in (("image", "RGB"), ("annotation", "L")):
        buffer = io.BytesIO()
        Image.new(mode, SIZE, 1).save(buffer, "PNG")
        rows[key] = [{"bytes": buffer.getvalue(), "path": path} for path in paths]
    features = datasets.Features({key: datasets.Image() for key in rows})
    for split in ("train", "validation"):
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / f"{split}-0.parquet")
    found = names_of(build("segment", "data=ade20k_hub", f"data.root={tmp_path}", "data.short_side=null"))
    assert found == named if named else len({*found}) == len(paths)
    assert not any({*"/\0"} & {*name} or name.startswith((".", "-")) for name in found)


REPLACING = ["data.on_bad_image=replace", "data.short_side=null", "data.long_side=null"]


def test_an_image_that_is_replaced_has_no_label_map(tmp_path):
    """What was predicted is of another image."""
    for split in ("train", "val"):
        for k in range(4):
            picture(tmp_path / "images" / split / f"{k}.jpg", SIZE)
            mask(tmp_path / "masks" / split / f"{k}.png", (0, 1), SIZE)
    (tmp_path / "images" / "val" / "2.jpg").write_bytes(b"no image")
    data = build("segment", "data=masks", f"data.root={tmp_path}", "data.num_classes=2", *REPLACING)
    answers = LabelMaps(None)
    for _, targets in all_of(data.val, train=False):
        answers.note([torch.zeros(2, 20, 30) for _ in targets], targets)
    assert answers.files(data, None).keys() == {f"-labels/{k}.png" for k in (0, 1, 3)}


def test_an_image_that_is_replaced_has_no_objects(coco):
    (coco / "val" / "2.jpg").write_bytes(b"no image")
    _, objects = objects_of(coco, build("detect", "data=coco_json", f"data.root={coco}", *REPLACING))
    assert {thing["image_id"] for thing in objects} == {40, 39, 37}
