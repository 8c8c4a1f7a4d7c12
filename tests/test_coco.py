"""Objects in COCO's JSON: read as they are, or refused in words, or left out and counted."""

import json
import os

import numpy as np
import pytest
from PIL import ExifTags, Image
from pycocotools import mask as tools

from children import closed, lines, train_here
from dense_cases import all_of, build, picture
from recipes.data import BadImage, DataError
from recipes.data.coco import outlined


@pytest.fixture
def objects(tmp_path):
    """Two splits of three images: with a polygon, a run-length code and a crowd; with a box; with nothing."""
    square = {"id": 1, "image_id": 5, "category_id": 7, "bbox": [2, 3, 10, 8], "area": 80.0, "iscrowd": 0,
              "segmentation": [[2, 3, 12, 3, 12, 11, 2, 11]]}  # fmt: skip
    code = {**square, "id": 2, "category_id": 3, "bbox": [0, 0, 1, 20], "area": 20.0,
            "segmentation": {"size": [20, 30], "counts": [0, 20, 580]}}  # fmt: skip
    things = [
        square, code, {**code, "id": 3, "iscrowd": 1}, {**square, "id": 4, "image_id": 6},
        {**square, "id": 5, "image_id": 6, "bbox": [4, 4, 0, 3]},
    ]  # fmt: skip
    for split in ("train", "val"):
        for name in "xyz":
            picture(tmp_path / split / f"{name}.jpg")
        files = [{"id": 5 + k, "file_name": f"{name}.jpg", "width": 30, "height": 20} for k, name in enumerate("xyz")]
        kinds = [{"id": 7, "name": "cat"}, {"id": 3, "name": "ant"}]
        write(tmp_path / f"{split}.json", {"images": files, "annotations": things, "categories": kinds})
    return tmp_path


def write(path, content):
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(("place", "mode"), [(".", 0), ("val", 0), ("val", 0o311)])
def test_folders_that_may_not_be_read(objects, place, mode):
    with closed(objects / place, mode), pytest.raises(DataError) as raised:
        coco(objects)
    said = str(raised.value)
    assert said.startswith(f"cannot read data.root={objects}: [Errno 13] Permission denied: '{objects}")
    assert said.endswith(": expected a folder that this user may read and enter, as well as those around it")


def coco(folder, *more, **options):
    return build(
        "detect",
        "data=coco_json",
        f"data.root={folder}",
        "data.short_side=null",
        "data.long_side=null",
        *more,
        **options,
    )


def test_coco(objects, capsys):
    data = coco(objects)
    assert data.class_names == ["ant", "cat"] and (len(data.train), len(data.val)) == (2, 3)
    said = capsys.readouterr().out
    assert "1 training images without an object are left out" in said and "1 objects whose boxes have no area" in said
    _, first = data.train.sample(0, 0)
    assert first["labels"].tolist() == [1, 0] and first["boxes"].tolist()[0] in ([2, 3, 12, 11], [18, 3, 28, 11])
    assert first["masks"].flatten(1).sum(1).tolist() == [80, 20]
    targets = all_of(data.val, train=False, batch_size=3)[0][1]
    assert [target["crowd"].tolist() for target in targets] == [[False, False, True], [False], []]
    assert targets[2]["boxes"].shape == (0, 4) and targets[2]["masks"].shape == (0, 20, 30)


def test_crops_without_an_object(objects):
    source = coco(objects, "data.img_size=4", "task.crop=true", "task.jitter=[2.0,2.0]").train
    found = [source.sample(1, epoch) for epoch in range(30)]
    empty = [target for _, target in found if not len(target["labels"])]
    assert 0 < len(empty) < 30 and empty[0]["boxes"].shape == (0, 4) and empty[0]["masks"].shape == (0, 4, 4)
    assert all(image.shape == (3, 4, 4) for image, _ in found)


def change(folder, key, value, at=0, part="annotations"):
    content = json.loads((folder / "train.json").read_text())
    content[part][at] = {**content[part][at], key: value}
    write(folder / "train.json", content)


@pytest.mark.parametrize(
    ("key", "value", "part", "said"),
    [
        ("category_id", 9, "annotations", "annotation 1 is of category 9: expected one of 3, 7"),
        ("image_id", 99, "annotations", "annotation 1 is of image 99, which is not in the file"),
        ("bbox", [1, 2, 3], "annotations", "annotation 1 has the box [1.0, 2.0, 3.0]"),
        ("bbox", [1, 2, float("nan"), 4], "annotations", "annotation 1 has the box [1.0, 2.0, nan, 4.0]"),
        ("bbox", [1, 2, 1e39, 4], "annotations", "annotation 1 has the box [1.0, 2.0, 1e+39, 4.0]"),
        ("area", float("nan"), "annotations", "annotation 1 has the area nan: expected a number of pixels, 0 or more"),
        ("area", -5, "annotations", "annotation 1 has the area -5.0: expected"),
        ("iscrowd", "0", "annotations", "annotation 1 has iscrowd='0': expected 0 or 1"),
        ("image_id", "5", "annotations", "annotation 1 is of image '5', which is not in the file"),
        ("category_id", "7", "annotations", "annotation 1 is of category '7': expected one of 3, 7"),
        ("bbox", ["a", 1, 2, 3], "annotations", "annotations[0] (id 1) lacks what COCO's format requires: ValueError"),
        ("bbox", None, "annotations", "annotations[0] (id 1) lacks what COCO's format requires: KeyError: 'bbox'"),
        ("image_id", None, "annotations", "(id 1) lacks what COCO's format requires: KeyError: 'image_id'"),
        ("height", None, "images", "images[0] (id 5) lacks what COCO's format requires: KeyError: 'height'"),
        ("name", None, "categories", "a category lacks what COCO's format requires: KeyError: 'name'"),
        ("file_name", "gone.jpg", "images", "names 1 of 2 images that"),
        ("file_name", "no/such/x.jpg", "images", "train, such as no/such/x.jpg"),
        ("file_name", "../val/x.jpg", "images", "which leads out of its folder"),
        ("file_name", "/etc/passwd", "images", "which leads out of its folder"),
        ("name", "bat", "categories", "different categories: id 7 is 'bat' in the first and 'cat' in the second"),
        ("name", "ant", "categories", "several categories have the name 'ant': expected different ones"),
        ("id", 3, "categories", "several categories have the id 3"),
        ("id", "3", "categories", "train.json: the categories have the ids ['3', 3]: expected integers"),
        ("height", float("inf"), "images", "images[0] (id 5) lacks what COCO's format requires: OverflowError"),
        ("id", [6], "images", "train.json: images[0] (id [6]) lacks what COCO's format requires: TypeError"),
        ("id", 6, "images", "train.json: several images have the id 6"),
    ],
)
def test_annotations_that_do_not_fit(objects, key, value, part, said):
    change(objects, key, value, part=part)
    with pytest.raises(DataError) as error:
        coco(objects)
    assert said in str(error.value) and not str(error.value).endswith("...")  # there are no other categories


def test_a_category_of_one_file(objects):
    content = json.loads((objects / "val.json").read_text())
    content["categories"].append({"id": 5, "name": "bee"})
    write(objects / "val.json", content)
    with pytest.raises(DataError, match=r"id 5 is missing in the first and 'bee' in the second: expected the same"):
        coco(objects)


@pytest.mark.parametrize(
    ("key", "value", "part", "said"),
    [
        ("segmentation", [[1, 2]], "annotations", "without a segmentation; task.head=faster_rcnn"),
        (
            "segmentation",
            [1, 2, 3, 4, 5, 6],
            "annotations",
            "its polygons are [1, 2, 3, 4, 5, 6]: expected a list with a flat list of numbers for each, [[x, y, ",
        ),
        ("segmentation", [[[2, 3], [12, 3], [2, 11]]], "annotations", "its polygons are [[[2, 3], [12, 3], [2, 11]]]"),
        ("segmentation", [{"size": [20, 30]}], "annotations", "its polygons are [{'size': [20, 30]}]: expected"),
        (
            "segmentation",
            [[2, 3, 1e9, 3, 12, 11]],
            "annotations",
            "x.jpg has an object whose segmentation cannot be "
            "read: a corner of a polygon lies at 1e+09, more than 10 sides away from the image",
        ),
        (
            "segmentation",
            [[2, 3, 12, 3, 12, 11, 2]],
            "annotations",
            "a polygon has 7 numbers, [2, 3, 12, 3, 12, 11, ...",
        ),
        ("segmentation", [[2, 3, float("nan"), 3, 12, 11]], "annotations", "a polygon is not a finite number"),
        ("segmentation", [], "annotations", "without a segmentation; task.head=faster_rcnn"),
        ("segmentation", True, "annotations", "cannot be read: it is True: expected polygons, or a run-length code, "),
        ("segmentation", "x", "annotations", "cannot be read: it is 'x': expected polygons"),
        ("segmentation", {"size": [20, 30]}, "annotations", "it is {'size': [20, 30]}: expected polygons, or"),
        ("segmentation", {"size": [9, 9], "counts": [0, 81]}, "annotations", "whose mask has 9 x 9 pixels"),
        (
            "segmentation",
            {"size": [20, 30], "counts": [0, 999]},
            "annotations",
            "its runs cover 999 pixels: expected 600",
        ),
        (
            "segmentation",
            {"size": [20, 30], "counts": [-1, 601]},
            "annotations",
            "its runs cover 600 pixels, some of them negative: expected 600",
        ),
        ("segmentation", {"size": [20, 30], "counts": "%%"}, "annotations", "are not a complete run-length code"),
        ("segmentation", {"size": [20, 30], "counts": ""}, "annotations", "are not a complete run-length code"),
        ("segmentation", {"size": [20, 30], "counts": "0"}, "annotations", "its runs cover 0 pixels: expected 600"),
        ("width", 31, "images", "has an object whose mask has 30 x 20 pixels, but the image is listed with 31 x 20"),
    ],
)
def test_bad_objects_are_an_error_or_are_replaced(objects, key, value, part, said):
    change(objects, key, value, part=part)
    with pytest.raises(DataError) as error:
        all_of(coco(objects).train, batch_size=2)
    assert said in str(error.value)
    source = coco(objects, "data.on_bad_image=replace").train
    assert len(all_of(source, batch_size=2)[0][0]) == 2 and source.take_bad() == 1


def test_codes_are_pycocotools_own():
    rng = np.random.default_rng(0)
    for size in ((1, 1), (37, 53), (300, 410)):
        for share in (0, 0.01, 0.5, 1):
            mask = rng.random(size) < share
            code = tools.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()
            assert np.array_equal(outlined({"size": list(size), "counts": code}, size, "x"), mask)
            if len(code) > 2:  # its last run is lost
                with pytest.raises(BadImage, match=r"its runs (are|cover)"):
                    outlined({"size": list(size), "counts": code[: len(code) // 2]}, size, "x")


def test_parts_that_are_no_polygon_are_left_out(objects, capsys):
    """Whatever comes first among the parts: pycocotools would take all for what the first is."""
    whole = [2, 3, 12, 3, 12, 11, 2, 11]
    for parts in ([whole, [1, 2]], [[1, 2, 3, 4], whole], [[], whole]):
        change(objects, "segmentation", parts)
        assert coco(objects).train.sample(0, 0)[1]["masks"].flatten(1).sum(1).tolist() == [80, 20]
        assert "train.json: 1 polygons with fewer than three corners are left out" in capsys.readouterr().out


def test_boxes_are_measured_as_they_are_written(objects):
    """pycocotools cuts none of them; what is learned ends with the image."""
    for split in ("train", "val"):
        content = json.loads((objects / f"{split}.json").read_text())
        content["annotations"][0] |= {"bbox": [-4, -4, 10, 12], "area": 99.0}
        write(objects / f"{split}.json", content)
    data = coco(objects, "data.hflip=0")
    assert data.train.sample(0, 0)[1]["boxes"].tolist()[0] == [0, 0, 6, 8]
    target = data.val.sample(0, 0)[1]
    assert target["boxes"].tolist()[0] == [-4, -4, 6, 8] and target["area"].tolist() == [99, 20, 20]


def test_images_are_measured_in_the_order_of_their_ids(objects):
    """In which pycocotools ranks equal scores; those of training keep the order of the file."""
    for split in ("train", "val"):
        content = json.loads((objects / f"{split}.json").read_text())
        write(objects / f"{split}.json", {**content, "images": content["images"][::-1]})
    data = coco(objects)
    names = [[source.records.name_of(index) for index in range(len(source))] for source in (data.train, data.val)]
    assert names == [["y.jpg", "x.jpg"], ["x.jpg", "y.jpg", "z.jpg"]]


def test_images_that_are_turned(objects, capsys):
    """Objects of the image that viewers show: by a tag that is not followed they lie elsewhere."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (20, 30)).save(objects / "train" / "x.jpg", exif=exif)
    with pytest.raises(DataError) as error:
        coco(objects).train.sample(0, 0)
    said = str(error.value)
    assert "objects belong to an image of 30 x 20. Its EXIF tag says that it is rotated, which is not applied" in said
    assert said.endswith("set data.exif_orientation=true")
    turned = coco(objects, "data.exif_orientation=true").train
    assert turned.sample(0, 0)[0].shape == (3, 20, 30)
    change(objects, "width", 20, part="images")
    change(objects, "height", 30, part="images")
    with pytest.raises(DataError, match=r"which is applied: set data\.exif_orientation=false$"):
        coco(objects, "data.exif_orientation=true", masks=False).train.sample(0, 0)
    exif[ExifTags.Base.Orientation] = 3
    picture(objects / "train" / "y.jpg")
    Image.new("RGB", (30, 20)).save(objects / "train" / "y.jpg", exif=exif)
    assert capsys.readouterr().err == ""
    source = coco(objects).train
    for epoch in range(2):
        source.sample(1, epoch)
    assert capsys.readouterr().err.count("y.jpg in the training set of coco_json has the EXIF orientation 3") == 1
    coco(objects, "data.exif_orientation=true").train.sample(1, 0)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"images": []}', "it has no annotations, categories"),
        ('{"images": 3, "annotations": [], "categories": []}', r"val\.json: images is 3: expected a list of objects"),
        ('{"images": [{}], "annotations": ["x"], "categories": []}', r"annotations\[0\] is 'x': expected an object"),
        (
            '{"images": [], "annotations": [], "categories": [{"id": [1], "name": "a"}]}',
            r"the categories have the ids \[\[1\]\]: expected integers",
        ),
        ("[" * 100_000, "cannot read the annotations .*(recursion|overflow)"),
        (None, r"val\.json is a pipe or a device: expected a file"),
        ('{"images": [], "annotations": [], "categories": []}', "val.json has no categories: expected one for each"),
        ("[]", "is not a COCO annotation file"),
        ("{", "cannot read"),
    ],
)
def test_files_that_are_not_cocos(objects, content, said):
    if content is None:
        (objects / "val.json").unlink()
        (objects / "val.json").symlink_to(os.devnull)
    else:
        (objects / "val.json").write_text(content)
    with pytest.raises(DataError, match=said):
        coco(objects)


@pytest.mark.parametrize("box", [[30, 2, 5, 5], [-9, 2, 9, 5], [3, 20, 4, 4], [3, -8, 4, 8]])
def test_boxes_outside_of_their_image_are_left_out(objects, box, capsys):
    """Beside it, where nobody could find them; those that reach into it are cut."""
    change(objects, "bbox", box)
    assert coco(objects).train.sample(0, 0)[1]["labels"].tolist() == [0]
    assert "2 objects whose boxes have no area, or lie outside their image" in capsys.readouterr().out
    change(objects, "bbox", [-4, -4, 10, 12])
    change(objects, "segmentation", [[-4, -4, 6, -4, 6, 8, -4, 8]])
    cut = coco(objects).train.sample(0, 0)[1]["boxes"].tolist()[0]
    assert cut in ([0, 0, 6, 8], [24, 0, 30, 8])


def test_null_is_as_good_as_no_key(objects):
    for key in ("area", "iscrowd", "segmentation"):
        change(objects, key, None)
    target = coco(objects, masks=False).train.sample(0, 0)[1]
    assert target["labels"].tolist() == [1, 0] and target["area"].tolist() == [80, 20]
    with pytest.raises(DataError, match=r"x\.jpg has an object without a segmentation; task\.head=faster_rcnn"):
        coco(objects).train.sample(0, 0)


@pytest.mark.parametrize(
    ("split", "said"),
    [
        ("train", "which task.head=mask_rcnn learns: expected task.head=faster_rcnn, retinanet or fcos"),
        ("val", "by which the masks of task.head=mask_rcnn are measured: expected another data.val_json=, or "),
    ],
)
def test_a_file_of_boxes_has_no_masks_to_learn(objects, split, said):
    """Said before a run begins; an object without one among others is a bad image."""
    content = json.loads((objects / f"{split}.json").read_text())
    things = content["annotations"]
    bare = [{**thing, "segmentation": value} for thing, value in zip(things, ([], None, {}, [[1, 2]], []), strict=True)]
    crowd = {**bare[2], "segmentation": things[2]["segmentation"]}  # which is not learned
    write(objects / f"{split}.json", {**content, "annotations": [*bare[:2], crowd, *bare[3:]]})
    given = ["model=timm", "model.name=test_resnet", "task=detect", "task.head=mask_rcnn", "data=coco_json"]
    given.append(f"data.root={objects}")
    with pytest.raises(DataError) as error:
        train_here(objects / "runs", *given, "data.on_bad_image=replace", "data.batch_size=2")
    assert str(error.value).startswith(f"no object of {split}.json has a segmentation, {said}")
    assert not (objects / "runs").exists()
    assert coco(objects, masks=False).train.sample(0, 0)[1]["labels"].tolist() == [1, 0]
    write(objects / f"{split}.json", {**content, "annotations": [*bare[:3], things[3]]})
    assert len(coco(objects).val) == 3


@pytest.mark.parametrize("key", ["train_json", "val_images"])
def test_files_and_folders_that_are_not_named(objects, key):
    with pytest.raises(DataError, match=f"data=coco_json needs data.{key}=<a path below data.root>"):
        coco(objects, f"data.{key}=null")


def test_nothing_to_learn_or_to_find(objects):
    content = json.loads((objects / "train.json").read_text())
    write(objects / "train.json", {**content, "annotations": [content["annotations"][2]]})  # a crowd
    with pytest.raises(DataError, match="no training image of coco_json has an object"):
        coco(objects)
    write(objects / "train.json", content)
    for things in ([], [content["annotations"][2]]):
        write(objects / "val.json", {**content, "annotations": things})
        with pytest.raises(DataError, match="no validation image of coco_json has an object: there is nothing to eval"):
            coco(objects)
    write(objects / "val.json", content)
    (objects / "val" / "z.jpg").unlink()
    with pytest.raises(DataError, match=r"val.json names 1 of 3 images that are not in .*val, such as z.jpg"):
        coco(objects)


@pytest.mark.parametrize("head", ["faster_rcnn", pytest.param("mask_rcnn", marks=pytest.mark.slow)])
def test_odd_images_through_the_loop(objects, tmp_path, head):
    """37 x 53 pixels, one image measured that has no object."""
    for split in ("train", "val"):
        content = json.loads((objects / f"{split}.json").read_text())
        content["images"] = [{**image, "width": 37, "height": 53} for image in content["images"]]
        content["annotations"] = [
            {**thing, "segmentation": [[2, 3, 12, 3, 12, 11, 2, 11]]} for thing in content["annotations"]
        ]
        write(objects / f"{split}.json", content)
        for name in "xyz":
            picture(objects / split / f"{name}.jpg", (37, 53))
    train_here(
        *(tmp_path / "out", "task=detect", f"task.head={head}", "task.channels=16", "model=timm"),
        *("model.name=test_resnet", "data=coco_json", f"data.root={objects}", "data.short_side=null"),
        *("data.long_side=null", "data.batch_size=2", "data.eval_batch_size=2", "data.workers=0", "train.steps=2"),
        *("train.save_every=2", "train.log_every=1", "sched.warmup=0", "name=odd"),
    )
    measured = [line for line in lines(tmp_path / "out" / "odd") if "val_box_ap" in line]
    assert len(measured) >= 1 and measured[-1]["step"] == 2
