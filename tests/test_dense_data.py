"""Label maps, boxes and masks: read from every layout, moved together with their images, or refused in words."""

import io
import json

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors

from recipes.config import compose
from recipes.data import DataError, batches, dense, paired
from recipes.data.seeding import reseed
from recipes.data.transforms import Normalize

KINDS = {"segment": "semantic", "detect": "instances"}


def build(task, *overrides, **options):
    if task == "detect":
        options = {"masks": True, **options}
    return dense.build(compose([f"task={task}", *overrides]), KINDS[task], **options)


def all_of(source, **options):
    options = {"batch_size": 4, "seed": 0, "epoch": 0, "train": True, "workers": 0} | options
    return list(batches(source, **options))


def equal(one, other):
    """Whether two nested batches hold the same bits."""
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


SCENES = [
    "data.img_size=64",
    "data.train_count=24",
    "data.val_count=6",
    "task.jitter=[0.5,2.0]",
    "task.photometric=true",
]


@pytest.mark.parametrize("task", ["segment", "detect"])
def test_batches_are_functions_of_seed_epoch_and_index(task):
    source = build(task, *SCENES, "task.crop=true").train
    whole = all_of(source, epoch=1)
    assert len(whole) == 6 and not equal(whole, all_of(source, epoch=2))
    assert equal(whole[4:], all_of(source, epoch=1, start=4))
    assert equal(whole, all_of(source, epoch=1, workers=1))
    halves = [all_of(source, epoch=1, batch_size=2, world=2, rank=rank) for rank in (0, 1)]
    for images, one, two in zip((batch[0] for batch in whole), *halves, strict=True):
        assert equal(list(images), [*one[0], *two[0]])
    state = torch.get_rng_state()
    all_of(source)
    assert torch.equal(state, torch.get_rng_state())


def test_shapes():
    data = build("segment", *SCENES)
    images, labels = all_of(data.train)[0]
    assert images.shape == (4, 3, 64, 64) and images.dtype == torch.float32
    assert (
        labels.shape == (4, 64, 64)
        and labels.dtype == torch.int64
        and set(labels.unique().tolist()) <= {*range(11), 255}
    )
    assert (data.num_classes, data.left_out, data.class_names[10]) == (11, (10,), "background")
    images, targets = all_of(data.val, train=False)[0]
    assert [image.shape for image in images] == [(3, 64, 64)] * 4
    assert [target["index"] for target in targets] == [0, 1, 2, 3] and targets[0]["labels"].dtype == torch.int64
    data = build("detect", *SCENES, masks=False)
    images, targets = all_of(data.train)[0]
    assert type(images) is list and "masks" not in targets[0] and targets[0]["boxes"].shape[1] == 4
    assert (data.num_classes, data.left_out) == (10, ())


class Blocks:
    """An image of blocks whose colour says their class, and whose objects are the blocks."""

    def __init__(self, size=(48, 80), block=16):
        rows, columns = (np.arange(side) // block for side in size)
        self.ids = rows[:, None] * 5 + columns  # (H, W)
        self.size = size

    def __len__(self):
        return 1

    def where(self, index):
        return "blocks"

    def image(self, index):
        return Image.fromarray(np.stack([16 * self.ids] * 3, -1).astype(np.uint8))

    def semantic(self, index):
        return self.ids

    def instances(self, index, *, masks):
        masks = self.ids == np.arange(15)[:, None, None]
        boxes = [[c % 5 * 16, c // 5 * 16, c % 5 * 16 + 16, c // 5 * 16 + 16] for c in range(15)]
        area, crowd = masks.sum((1, 2)).astype(np.float32), np.arange(15) == 3
        labels = {"boxes": np.array(boxes, np.float32), "labels": np.arange(15), "area": area, "crowd": crowd}
        return {**labels, "masks": masks, "size": self.size}


def blocks(kind, crop=(40, 64), train=True, jitter=(0.5, 2.0), **options):
    data = OmegaConf.create({"short_side": None, "long_side": None, "hflip": 0.5})
    task = OmegaConf.create({"jitter": list(jitter), "crop": True, "category_cap": 0.75, "photometric": False})
    transform = paired.evaluation(data) if not train else None
    transform = transform or paired.training(data, task, crop, (0, 0, 0), semantic=kind == "semantic")
    plain = Normalize((0, 0, 0), (1, 1, 1))
    return dense.KINDS[kind](
        Blocks(), transform, normalize=plain, classes=15, train=train, name="blocks", seed=0, **options
    )


def test_label_maps_move_with_their_image():
    source, mirrored, padded = blocks("semantic"), 0, 0
    for epoch in range(20):
        image, target = source.sample(0, epoch)
        labels, shown = target["labels"], image[0] * 255 / 16
        assert image.shape == (3, 40, 64) and labels.shape == (40, 64)
        inside = labels != 255
        padded += bool((~inside).any())
        right = (shown[inside] - labels[inside]).abs() < 0.5  # colours are mixed along the edges of blocks
        assert right.float().mean() > 0.7 and (image[0][~inside] == 0).all()
        row = labels[0][inside[0]]
        mirrored += bool(row[0] > row[-1])
    assert 3 < mirrored < 17 and 0 < padded < 17


def test_boxes_and_masks_move_with_their_image():
    source = blocks("instances", masks=True)
    for epoch in range(20):
        image, target = source.sample(0, epoch)
        assert len(target["boxes"]) == len(target["masks"]) == len(target["labels"]) > 0
        assert 3 not in target["labels"], "a crowd is no object to learn"
        for found, mask, label in zip(target["boxes"], target["masks"], target["labels"].tolist(), strict=True):
            rows, columns = torch.nonzero(mask, as_tuple=True)
            edges = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert (found - torch.tensor(edges)).abs().max() <= 1.5
            assert ((image[0][mask] * 255 / 16 - label).abs() < 0.5).float().mean() > 0.25
    kept = source.sample(0, 0)[1]["labels"].tolist()
    assert kept != blocks("instances", masks=True).sample(0, 1)[1]["labels"].tolist()


def test_an_evaluation_keeps_labels_at_their_own_size():
    image, target = blocks("instances", train=False, masks=True).sample(0, 0)
    assert image.shape == (3, 48, 80) and target["crowd"].tolist() == [number == 3 for number in range(15)]
    source = blocks("semantic", train=False)
    source.transform = paired.Rescale([24])
    image, target = source.sample(0, 0)
    assert image.shape == (3, 24, 40) and target["labels"].shape == (48, 80) and target["size"] == (48, 80)


@pytest.mark.parametrize(
    ("short", "long", "jitter", "size", "expected"),
    [
        (None, None, (1, 1), (37, 91), (37, 91)),
        ([20], None, (1, 1), (40, 80), (20, 40)),
        ([20], 30, (1, 1), (40, 80), (15, 30)),
        (None, 64, (1, 1), (32, 16), (64, 32)),
        ([20], 30, (2, 2), (40, 80), (30, 60)),
        ([1], None, (0.1, 0.1), (3, 900), (1, 30)),
    ],
)
def test_rescaling(short, long, jitter, size, expected):
    image = tv_tensors.Image(torch.zeros(3, *size, dtype=torch.uint8))
    mask = tv_tensors.Mask(torch.zeros(size, dtype=torch.uint8))
    image, target = paired.Rescale(short, long, jitter)(image, {"labels": mask})
    assert image.shape == (3, *expected) and target["labels"].shape == expected


def test_several_short_sides_are_all_drawn():
    image = tv_tensors.Image(torch.zeros(3, 40, 50, dtype=torch.uint8))
    rescale = paired.Rescale([20, 30, 40])
    assert {rescale(image).shape[1] for _ in range(40)} == {20, 30, 40}
    data = OmegaConf.create({"short_side": [20, 30, 40], "long_side": None})
    assert paired.evaluation(data)(image).shape == (3, 40, 50)


def test_crops_are_capped():
    """One class fills all but a corner: with a cap the crop looks for it."""
    labels = torch.zeros(64, 64, dtype=torch.uint8)
    labels[:24, :24] = 1
    image = tv_tensors.Image(labels.expand(3, 64, 64).clone())
    shares = {}
    for cap in (1.0, 0.75):
        reseed(0)
        crop = paired.Crop((32, 32), cap)
        cropped = [crop(image, {"labels": tv_tensors.Mask(labels)})[1]["labels"] for _ in range(60)]
        shares[cap] = np.mean([float((part == 0).float().mean()) < 0.75 for part in cropped])
    assert shares[1.0] < 0.25 < 0.6 < shares[0.75]


def picture(path, size=(30, 20), colour=(90, 120, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def mask(path, values, size=(30, 20), mode="L"):
    """Halves of two labels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    labels = np.full(size[::-1], values[0], np.uint8)
    labels[:, size[0] // 2 :] = values[1]
    image = Image.fromarray(labels)
    if mode == "P":
        image.putpalette([channel for number in range(256) for channel in (255 - number, number, 9)])
    image.save(path)


@pytest.fixture
def folder(tmp_path):
    for split in ("train", "val"):
        for name in ("a", "b", "deep/c"):
            picture(tmp_path / "images" / split / f"{name}.jpg")
            mask(tmp_path / "masks" / split / f"{name}.png", (0, 2))
    return tmp_path


def masks(folder, *more):
    overrides = ["data=masks", f"data.root={folder}", "data.num_classes=3", "data.short_side=null", "data.img_size=32"]
    return build("segment", *overrides, *more)


def values(source):
    return [sorted(np.unique(source.records.semantic(index)).tolist()) for index in range(len(source))]


def test_masks(folder):
    data = masks(folder, "data.class_names=[cat,dog,elk]")
    assert (len(data.train), len(data.val), data.class_names) == (3, 3, ["cat", "dog", "elk"])
    assert data.train.where(2).endswith("images/train/deep/c.jpg") and values(data.train) == [[0, 2]] * 3
    images, labels = all_of(data.train, batch_size=3)[0]
    assert images.shape == (3, 3, 32, 32) and {0, 2} <= set(labels.unique().tolist()) <= {0, 2, 255}
    (folder / "names.txt").write_text("x\ny\nz z\n")
    assert masks(folder, "data.class_names=names.txt").class_names == ["x", "y", "z z"]
    assert masks(folder).class_names == ["0", "1", "2"]


def test_ade20k(tmp_path):
    for split in ("training", "validation"):
        picture(tmp_path / "images" / split / "ADE_1.jpg")
        mask(tmp_path / "annotations" / split / "ADE_1.png", (0, 150))
    mask(tmp_path / "annotations" / "training" / "ADE_1.png", (255, 1))
    table = "Idx\tRatio\tTrain\tVal\tStuff\tName\n"
    table += "".join(f"{number}\t0.1\t1\t1\t0\tthing {number}, object\n" for number in range(1, 151))
    (tmp_path / "objectInfo150.txt").write_text(table)
    data = build("segment", "data=ade20k", f"data.root={tmp_path}")
    assert (values(data.train), values(data.val)) == ([[0, 255]], [[149, 255]])
    assert data.num_classes == 150 and data.class_names[149] == "thing 150, object"


def test_ade20k_as_parquet(tmp_path):
    import datasets

    rows = {"image": [], "annotation": []}
    for key, image in (("image", Image.new("RGB", (30, 20))), ("annotation", Image.new("L", (30, 20), 7))):
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        rows[key] = [{"bytes": buffer.getvalue(), "path": None}] * 2
    features = datasets.Features({key: datasets.Image() for key in rows})
    for split in ("train", "validation"):
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / f"{split}-0.parquet")
    overrides = ["data=ade20k_hub", f"data.root={tmp_path}", "data.short_side=null", "data.img_size=32"]
    data = build("segment", *overrides)
    assert values(data.train) == [[6], [6]] and all_of(data.train, batch_size=2)[0][1].shape == (2, 32, 32)
    with pytest.raises(DataError, match=r"no column 'mask' but image, annotation: give data.mask_key="):
        build("segment", *overrides, "data.mask_key=mask")


def test_cityscapes(tmp_path):
    for split in ("train", "val"):
        picture(tmp_path / "leftImg8bit" / split / "ulm" / "ulm_0_leftImg8bit.png")
        mask(tmp_path / "gtFine" / split / "ulm" / "ulm_0_gtFine_labelIds.png", (7, 4))
        mask(tmp_path / "gtFine" / split / "ulm" / "ulm_0_gtFine_labelTrainIds.png", (18, 255))
    overrides = ["data=cityscapes", f"data.root={tmp_path}"]
    data = build("segment", *overrides)
    assert values(data.train) == [[0, 255]] and (data.num_classes, data.class_names[18]) == (19, "bicycle")
    given = ["data.mask_suffix=_gtFine_labelTrainIds.png", "data.label_ids=null"]
    assert values(build("segment", *overrides, *given).val) == [[18, 255]]


def test_voc(tmp_path):
    for number in (1, 2, 3):
        picture(tmp_path / "JPEGImages" / f"2007_{number}.jpg")
        mask(tmp_path / "SegmentationClass" / f"2007_{number}.png", (0, 255 if number == 1 else 20), mode="P")
    lists = tmp_path / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("2007_1\n2007_3\n")
    (lists / "val.txt").write_text("2007_2\n")
    overrides = ["data=voc", f"data.root={tmp_path}"]
    data = build("segment", *overrides)
    assert values(data.train) == [[0, 255], [0, 20]] and (len(data.val), data.class_names[20]) == (1, "tvmonitor")
    (lists / "val.txt").write_text("2007_9\n")
    with pytest.raises(DataError, match=r"val.txt names 2007_9, but .*2007_9.jpg is not there"):
        build("segment", *overrides)
    (lists / "val.txt").write_text("../../2007_2\n")
    with pytest.raises(DataError, match="leads out of its folder"):
        build("segment", *overrides)


def spoil(folder, what):
    path = folder / "masks" / "train" / "b.png"
    if what == "size":
        mask(path, (0, 1), size=(20, 30))
    elif what == "label":
        mask(path, (0, 3))
    elif what == "colours":
        picture(path)
    else:
        path.write_bytes(path.read_bytes()[:40])


SPOILT = {
    "size": "b.jpg has 30 x 20 pixels and its mask 20 x 30: expected the same",
    "label": "b.jpg has label 3 at row 0, column 15: expected 0 ... 2, or 255",
    "colours": "a mask has one channel of classes, this one is RGB",
    "bytes": "cannot read the image",
}


@pytest.mark.parametrize("what", SPOILT)
def test_a_bad_mask_is_an_error_or_is_replaced(folder, what, capsys):
    spoil(folder, what)
    with pytest.raises(DataError) as error:
        all_of(masks(folder).train, batch_size=3)
    assert SPOILT[what] in str(error.value) and "data.on_bad_image=replace" in str(error.value)
    source = masks(folder, "data.on_bad_image=replace").train
    assert len(all_of(source, batch_size=3)[0][0]) == 3 and source.take_bad() == 1
    assert "bad image in the training set of masks" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["data.root=null"], "needs data.root=<folder with images/train and masks/train>"),
        (["data.train_masks=labels"], "has no folder labels"),
        (["data.mask_suffix=_mask.png"], "3 of 3 images in"),
        (["data.image_suffix=.tif"], "has no image (*.tif)"),
        (["data.num_classes=null"], "needs data.num_classes=, or data.class_names="),
        (["data.class_names=gone.txt"], "cannot read the names of the classes"),
        (["data.train_images=../images"], "leads out of its folder"),
        (["data.val_masks=/etc"], "leads out of its folder"),
        (["data.label_ids=[3,3]"], "data.label_ids=[3, 3]: expected different numbers"),
        (["data.label_ids=[255]"], "each 0 ... 254"),
        (["data.num_classes=300"], "has 300 classes: a mask tells 255 apart at the most"),
        (["data.left_out=[sky]"], "data.left_out names 'sky', which is no class"),
        (["data.train_list=list.txt"], "cannot read the list of the split 'train'"),
    ],
)
def test_folders_that_do_not_fit(folder, more, said):
    with pytest.raises(DataError) as error:
        masks(folder, *more)
    assert said in str(error.value)


def test_a_task_needs_its_kind_of_labels(folder):
    with pytest.raises(DataError, match="data=digits has one label an image, task=segment needs them in the image"):
        build("segment", "data=digits")
    with pytest.raises(DataError, match="data=masks has no instances labels, which task=detect needs"):
        build("detect", "data=masks", f"data.root={folder}", "data.num_classes=3")


def test_odd_sizes(folder):
    """Images of one pixel, and much longer than wide, are rescaled, cropped and padded like all others."""
    for number, size in enumerate([(1, 1), (301, 2), (3, 157)]):
        picture(folder / "images" / "train" / f"{number}.jpg", size)
        mask(folder / "masks" / "train" / f"{number}.png", (1, 1), size)
    images, labels = all_of(masks(folder, "data.short_side=24", "data.long_side=96").train, batch_size=6)[0]
    assert images.shape == (6, 3, 32, 32) and images.isfinite().all() and 1 in labels


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
    assert "1 training images without an object are left out" in said and "1 objects whose boxes have no size" in said
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
        ("image_id", 99, "annotations", "annotation 1 is of image 99, which it has not"),
        ("bbox", [1, 2, 3], "annotations", "annotation 1 has the box [1.0, 2.0, 3.0]"),
        ("bbox", None, "annotations", "lacks what COCO's format asks for"),
        ("file_name", "../val/x.jpg", "images", "which leads out of its folder"),
        ("file_name", "/etc/passwd", "images", "which leads out of its folder"),
        ("name", "bat", "categories", "have other categories"),
    ],
)
def test_annotations_that_do_not_fit(objects, key, value, part, said):
    change(objects, key, value, part=part)
    with pytest.raises(DataError) as error:
        coco(objects)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("key", "value", "part", "said"),
    [
        ("segmentation", [[1, 2]], "annotations", "segmentation cannot be read"),
        ("segmentation", {"size": [9, 9], "counts": [0, 81]}, "annotations", "whose mask is 9 x 9 pixels"),
        ("width", 31, "images", "has an object whose mask is 30 x 20 pixels, the image is said to have 31 x 20"),
    ],
)
def test_bad_objects_are_an_error_or_are_replaced(objects, key, value, part, said):
    change(objects, key, value, part=part)
    with pytest.raises(DataError) as error:
        all_of(coco(objects).train, batch_size=2)
    assert said in str(error.value)
    source = coco(objects, "data.on_bad_image=replace").train
    assert len(all_of(source, batch_size=2)[0][0]) == 2 and source.take_bad() == 1


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"images": []}', "it has no annotations, categories"),
        ("[]", "is no COCO annotation file"),
        ("{", "cannot read"),
    ],
)
def test_files_that_are_not_cocos(objects, content, said):
    (objects / "val.json").write_text(content)
    with pytest.raises(DataError, match=said):
        coco(objects)
