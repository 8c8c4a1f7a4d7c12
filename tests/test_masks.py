"""Images with label maps beside them: read from every layout, or refused in words."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from children import closed, train_here
from dense_cases import KINDS, all_of, build, mask, picture
from recipes.config import compose
from recipes.data import DataError, NoBatch, dense
from recipes.data.errors import BadImage
from recipes.data.images import open_labels
from recipes.data.masks import Classes


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
    (folder / "names.txt").write_text("0\tx\n1\ty\n2\tz z\n", "utf-8-sig")
    assert masks(folder, "data.class_names=names.txt").class_names == ["x", "y", "z z"]
    (folder / "names.txt").write_text("number\tname\n0\tx\n1\ty\n2\tz z\n")
    assert masks(folder, "data.class_names=names.txt").class_names == ["x", "y", "z z"]
    (folder / "names.txt").write_text("x\ny\nz z\n", "utf-8-sig")
    assert masks(folder, "data.class_names=names.txt").class_names == ["x", "y", "z z"]
    assert masks(folder).class_names == ["0", "1", "2"]
    data = masks(folder, "data.class_names=[0,2024,1.5]", "data.left_out=[2024]")
    assert (data.class_names, data.left_out) == (["0", "2024", "1.5"], (1,))


@pytest.mark.parametrize("place", [".", "images", "masks", "masks/train"])
def test_folders_that_may_not_be_entered(folder, place):
    with closed(folder / place, 0o644), pytest.raises(DataError, match=r"cannot read data\.root=.*Permission denied"):
        masks(folder)


def test_links_to_folders_are_followed(folder):
    """As where each city lies on another disk; a link back to a parent folder ends there."""
    for kind in ("images", "masks"):
        (folder / kind / "train" / "deep").rename(folder / f"{kind} elsewhere")
        (folder / kind / "train" / "far").symlink_to(folder / f"{kind} elsewhere")
        (folder / f"{kind} elsewhere" / "back").symlink_to(folder / kind / "train")
        (folder / f"{kind} elsewhere" / "self").symlink_to(".")
    source = masks(folder).train
    names = [source.where(index).removeprefix(f"{folder}/images/train/") for index in range(len(source))]
    assert names == ["a.jpg", "b.jpg", "far/c.jpg"] and values(source) == [[0, 2]] * 3


def test_folders_that_cannot_be_listed(folder):
    (folder / "images" / "train" / "loop").symlink_to("loop")
    with pytest.raises(DataError, match=r"cannot list the images: .*symbolic links.*images/train/loop"):
        masks(folder)


def test_255_may_be_a_class(folder):
    for path in (folder / "masks").rglob("*.png"):
        mask(path, (0, 255))
    assert values(masks(folder).train) == [[0, 255]] * 3
    both = masks(folder, "data.num_classes=2", "data.label_ids=[0,255]")
    assert values(both.train) == values(both.val) == [[0, 1]] * 3
    assert values(masks(folder, "data.num_classes=2", "data.label_ids=[255,1]").val) == [[0, 255]] * 3
    with pytest.raises(BadImage, match=r"has label -2: expected 0 \.\.\. 255") as refused:
        Classes([0, 255])(np.array([[-2, 255]]), "a.png")
    assert "data.label_ids=" in refused.value.advice


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
    mask(tmp_path / "annotations" / "training" / "ADE_1.png", (0, 151))
    said = r"ADE_1.jpg has label 151 at row 0, column 15, which stands for class 150: .*149\. Set data\.num_classes="
    with pytest.raises(DataError, match=said):
        data.train.sample(0, 0)


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
    with pytest.raises(DataError, match=r"no column 'mask', only image, annotation: set data.mask_key="):
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
    with pytest.raises(DataError, match=r"val.txt names 2007_9, but .*2007_9.jpg does not exist"):
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
    "size": "b.jpg has 30 x 20 pixels but its mask 20 x 30: expected the same size. Replace or remove it, or set ",
    "label": "b.jpg has label 3 at row 0, column 15: expected 0 ... 2, or 255 for unlabelled pixels. Set "
    "data.num_classes= or data.class_names= to the classes of the masks, or data.label_ids= to the values that stand "
    "for them, or, if only this mask is wrong, ",
    "colours": "b.png: a mask has one channel of classes as integers, but this PNG is RGB. Save masks as "
    "single-channel PNGs whose values are classes, or, if only this one is wrong, set ",
    "bytes": "cannot read the image",
}


@pytest.mark.parametrize("what", SPOILT)
def test_a_bad_mask_is_an_error_or_is_replaced(folder, what, capsys):
    spoil(folder, what)
    with pytest.raises(DataError) as error:
        all_of(masks(folder).train, batch_size=3)
    assert SPOILT[what] in str(error.value) and str(error.value).endswith("data.on_bad_image=replace")
    source = masks(folder, "data.on_bad_image=replace").train
    assert len(all_of(source, batch_size=3)[0][0]) == 3 and source.take_bad() == 1
    target = source.sample(1, 0)[1]
    assert target["index"] == 1 and target["shown"] in (0, 2)  # whose picture is drawn: that of b cannot be
    assert "bad image in the training set of masks" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["data.root=null"], "needs data.root=<folder with images/train and masks/train>"),
        (["data.train_images=null"], "data=masks needs data.train_images=<a path below data.root>"),
        (["data.val_masks=null"], "data=masks needs data.val_masks=<a path below data.root>"),
        (["data.train_masks=labels"], "has no folder labels"),
        (["data.mask_suffix=_mask.png"], "3 of 3 images in"),
        (["data.image_suffix=.tif"], "has no image (*.tif)"),
        (["data.num_classes=null"], "needs data.num_classes=, or data.class_names="),
        (["data.num_classes=1"], "has 1 class: expected two or more, such as background and object"),
        (["data.class_names=[sky]"], "has 1 class: expected two or more"),
        (["data.class_names=[sky,tree,sky]"], "several classes of data=masks have the name 'sky': give each its own"),
        (["data.class_names=twice.txt"], "several classes of data=masks have the name 'sky'"),
        (["data.class_names=[false,true]"], "data.class_names has false, which is not text: write such names in"),
        (["data.class_names=[sky,null]"], "data.class_names has null, which is not text"),
        (["data.class_names=[sky,[tree]]"], "data.class_names has \"['tree']\", which is not text"),
        (["data.class_names=[1,'1']"], "several classes of data=masks have the name '1'"),
        (["data.class_names=3"], "data.class_names=3: expected a list of names, or a file of them below data.root"),
        (["data.class_names=[a,b,c,d]"], "data.num_classes=3, but data.class_names has 4: give only the latter"),
        (["data.class_names=gone.txt"], "cannot read the names of the classes"),
        (["data.train_images=../images"], "leads out of its folder"),
        (["data.val_masks=/etc"], "leads out of its folder"),
        (["data.label_ids=[3,3]"], "data.label_ids=[3, 3]: expected different numbers"),
        (["data.label_ids=[1,2,256]"], "data.label_ids=[1, 2, 256]: expected different numbers, each 0 ... 255"),
        (["data.label_ids=[a,b,c]"], "data.label_ids=['a', 'b', 'c']: expected different numbers"),
        (["data.label_ids=[1,2]"], "data.label_ids has 2 values for 3 classes: expected one value per class"),
        (["data.label_ids=[0,1,2,3]"], "data.label_ids has 4 values for 3 classes"),
        (
            ["data.label_ids=[0,1,2]", "data.reduce_zero_label=true"],
            "data.reduce_zero_label=true and data.label_ids=[0, 1, 2] both say what the values of a mask mean: set",
        ),
        (["data.num_classes=300"], "has 300 classes: a mask can have at most 255"),
        (
            ["data.num_classes=255", "data.reduce_zero_label=true"],
            "data=masks has 255 classes: expected at most 254 with data.reduce_zero_label=true, which are the values 1 "
            "... 254 of a mask",
        ),
        (["data.left_out=[sky]"], "data.left_out names 'sky', which is not a class"),
        (["data.train_list=list.txt"], "cannot read the list of the split 'train'"),
        (["data.train_list=device.txt"], "device.txt is a pipe or a device: expected a file"),
        (["data.class_names=device.txt"], "device.txt is a pipe or a device: expected a file"),
    ],
)
def test_folders_that_do_not_fit(folder, more, said):
    (folder / "twice.txt").write_text("sky\ntree\nsky\n")
    (folder / "device.txt").symlink_to(os.devnull)
    with pytest.raises(DataError) as error:
        masks(folder, *more)
    assert said in str(error.value)


def test_a_task_needs_its_kind_of_labels(folder):
    with pytest.raises(DataError, match="data=digits has one label per image, but task=segment needs dense labels"):
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


def test_masks_of_one_bit(folder):
    for path in (folder / "masks" / "val").rglob("*.png"):
        Image.open(path).point(lambda value: 255 * (value > 0)).convert("1").save(path)
    labels = [
        target["labels"]
        for _, targets in all_of(masks(folder, "data.label_ids=[0,1,2]").val, train=False)
        for target in targets
    ]
    assert set(torch.cat([each.flatten() for each in labels]).tolist()) == {0, 1}


@pytest.mark.parametrize("bits", [2, 4])
def test_masks_of_few_bits(tmp_path, bits):
    """Pillow spreads them over 0 ... 255, where the last class would not be labelled."""
    labels = np.arange(2**bits, dtype=np.uint8).reshape(2, -1)
    pixels = labels if bits == 4 else np.pad(labels, ((0, 0), (0, 2)))
    (tmp_path / "mask.png").write_bytes(grey(pixels, bits))
    assert Image.open(tmp_path / "mask.png").getextrema() == (0, 255)
    found = open_labels(tmp_path / "mask.png", "mask")
    assert found.dtype == np.uint8 and np.array_equal(found, pixels)


@pytest.mark.parametrize("file", ["P5 4 2 20\n", "P2 4 2 20\n", "P5 4 2 7000\n", "P1 4 2\n", "tif"])
def test_masks_that_pillow_changes(tmp_path, file):
    labels = np.array([[0, 1, 2, 3], [3, 2, 1, 0]])
    if file == "tif":  # 0 is white
        tags = ((256, 4), (257, 2), (258, 8), (259, 1), (262, 0), (273, 8 + 2 + 8 * 12 + 4), (278, 2), (279, 8))
        entries = b"".join(struct.pack("<HHII", tag, 3, 1, value) for tag, value in tags)
        content = b"II*\0" + struct.pack("<IH", 8, 8) + entries + bytes(4) + labels.astype(np.uint8).tobytes()
    elif file.startswith("P5"):
        content = file.encode() + labels.astype(">u2" if "7000" in file else np.uint8).tobytes()
    else:
        labels = labels % 2 if file.startswith("P1") else labels
        content = (file + " ".join(map(str, labels.flatten()))).encode()
    (tmp_path / "mask").write_bytes(content)
    with Image.open(tmp_path / "mask") as image:
        assert not np.array_equal(np.array(image), labels)
    assert np.array_equal(open_labels(tmp_path / "mask", "mask"), labels)


def grey(pixels, bits):
    """A grey PNG of `bits` a pixel."""
    rows = [bytes([0, *np.packbits(np.unpackbits(row[:, None], axis=1)[:, -bits:])]) for row in pixels]
    parts = {
        b"IHDR": struct.pack(">IIBBBBB", *pixels.shape[::-1], bits, 0, 0, 0, 0),
        b"IDAT": zlib.compress(b"".join(rows)),
        b"IEND": b"",
    }
    chunks = (
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in parts.items()
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def test_lists_name_one_image_a_line(folder):
    picture(folder / "images" / "train" / "my photo.jpg")
    mask(folder / "masks" / "train" / "my photo.png", (0, 1))
    (folder / "list.txt").write_text("my photo  \n\nb\n", "utf-8-sig")
    source = masks(folder, "data.train_list=list.txt").train
    assert [source.records.name_of(index) for index in range(len(source))] == ["my photo.jpg", "b.jpg"]


def test_a_mask_of_an_image_that_is_turned(folder):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (20, 30)).save(folder / "images" / "train" / "b.jpg", exif=exif)
    with pytest.raises(DataError, match=r"expected the same size\. Its EXIF tag says .* data\.exif_orientation=true$"):
        masks(folder).train.sample(1, 0)
    assert masks(folder, "data.exif_orientation=true").train.sample(1, 0)[0].shape == (3, 32, 32)


def test_images_of_several_sizes_make_no_batch(folder):
    picture(folder / "images" / "train" / "b.jpg", size=(20, 30))
    mask(folder / "masks" / "train" / "b.png", (0, 1), size=(20, 30))
    with pytest.raises(DataError, match=r"images of \d+ x \d+, \d+ x \d+ pixels cannot form a batch: set task\.crop"):
        all_of(masks(folder, "task.crop=false", "task.jitter=[1,1]").train, batch_size=3)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_without_batches_is_not_to_be_resumed(folder, tmp_path, workers):
    """It would end there again. Its name is free for one that learns from one image at a time, in as large a batch."""
    picture(folder / "images" / "train" / "b.jpg", size=(20, 30))
    mask(folder / "masks" / "train" / "b.png", (0, 1), size=(20, 30))
    given = ["task=segment", "task.head=fcn", "task.channels=8", "task.auxiliary=false", "model=timm"]
    given += ["model.name=test_resnet", "data=masks", f"data.root={folder}", "data.num_classes=3", "train.steps=1"]
    given += ["data.short_side=null", "data.long_side=null", "data.batch_size=3", "task.crop=false"]
    given += ["task.jitter=[2,2]", f"data.workers={workers}"]
    with pytest.raises(NoBatch) as error:
        train_here(tmp_path / "runs", *given, "name=one")
    advice = "set task.crop=true, or train.micro_batch=1, which keeps the batch size, or data.batch_size=1"
    said = f"the training set of masks: images of 40 x 60, 60 x 40 pixels cannot form a batch: {advice}"
    assert str(error.value) == said
    if not workers:
        train_here(tmp_path / "runs", *given, "train.micro_batch=1", "name=one")


KEEPS = r"a resumed run keeps its configuration, so start a new one .* resume=\S*/one data\.on_bad_image=replace"


@pytest.mark.parametrize(
    ("more", "advice", "way_on"),
    [
        ([], r"set data\.exif_orientation=true", KEEPS),
        (["data.num_classes=2"], r"Set data\.num_classes= or data\.class_names= .*", KEEPS),
        (["data.mask_suffix=.jpg"], "Make the masks anew .*", r"resume with: .* resume=\S*/one"),
    ],
)
def test_how_to_go_on_where_all_images_are_bad(folder, tmp_path, more, advice, way_on):
    """Replacing them is not the way; and a run that is resumed keeps its configuration."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    for name in ("a", "b", "deep/c"):
        if not more:
            Image.new("RGB", (20, 30)).save(folder / "images" / "train" / f"{name}.jpg", exif=exif)
        for split in ("train", "val"):
            Image.new("L", (30, 20)).save(folder / "masks" / split / f"{name}.jpg")
    given = ["task=segment", "task.head=fcn", "task.channels=8", "task.auxiliary=false", "model=timm", "data=masks"]
    given += ["model.name=test_resnet", f"data.root={folder}", "data.num_classes=3", "train.steps=1", "data.workers=0"]
    with pytest.raises(BadImage, match=rf"{advice}\nthe state after step 0 is saved; {way_on}$"):
        train_here(tmp_path / "runs", *given, "data.batch_size=3", *more, "name=one")


@pytest.mark.parametrize(
    ("task", "given", "there"),
    [
        ("segment", ["data=masks", "data.num_classes=3"], "images/{0} and masks/{0}"),
        ("detect", ["data=coco_json"], "{0}.json and {0}"),
    ],
)
def test_what_is_missing_is_of_the_split_that_is_read(task, given, there):
    """An evaluation needs no training images."""
    options = {"masks": False} if task == "detect" else {}
    for command, split, more in (("train", "train", []), ("eval", "val", ["model=nat_m", "checkpoint=model.pth"])):
        with pytest.raises(DataError, match=f"needs data.root=<folder with {there.format(split)}>$"):
            dense.build(compose([f"task={task}", *given, *more], command), KINDS[task], **options)
