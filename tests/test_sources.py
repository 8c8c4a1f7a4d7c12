"""Image folders and tables: what is read, and what is said of what is wrong."""

import io
import os
import shutil
import time

import datasets
import huggingface_hub
import pytest
import torch
from PIL import Image

from recipes.config import compose
from recipes.data import DataError, folder, imagenet
from recipes.data.build import preprocessing
from recipes.data.errors import BadImage
from recipes.data.files import replace_file
from recipes.data.images import Decoding, open_labels, open_rgb
from recipes.eval_results import write_csv, write_json
from recipes.pictures import save_picture
from recipes.plots import draw_confusion
from shard_cases import tars
from source_cases import all_of, make, photos, same

pytestmark = pytest.mark.usefixtures("own_caches")


@pytest.fixture
def settled(monkeypatch):
    """Folders that were made just now count as unchanged for long, so that listings are kept."""
    monkeypatch.setattr(folder, "RACY", -1_000_000_000)


def test_imagefolder(tmp_path):
    root = photos(tmp_path / "photos")
    (root / "train" / ".cache").mkdir()
    (root / "train" / "ant" / ".hidden.jpg").write_bytes(b"")
    (root / "train" / "ant" / "notes.txt").write_text("not an image")
    (root / "train" / "bee" / "more").mkdir()
    Image.new("RGB", (8, 8)).save(root / "train" / "bee" / "more" / "UPPER.PNG")
    data = make("imagefolder", root=str(root))
    assert data.class_names == ["ant", "bee", "cat"] and data.num_classes == 3
    assert (len(data.train), len(data.val)) == (10, 9)
    found = [os.path.relpath(data.train.where(index), root / "train") for index in range(10)]
    assert found == sorted(found) and "bee/more/UPPER.PNG" in found
    assert [data.train.label(index) for index in range(10)] == [0] * 3 + [1] * 4 + [2] * 3
    images, labels = all_of(data.train, batch_size=4, workers=1)[0]
    assert images.shape == (4, 3, 32, 32) and labels.max() < 3


def test_files_that_are_no_images_are_counted(tmp_path, capsys, settled):
    root = photos(tmp_path / "photos")
    for name in ("a.HEIC", "b.heic", "c.txt", "README", ".hidden.txt"):
        (root / "train" / "ant" / name).write_bytes(b"")
    (root / "train" / "notes.txt").write_text("beside the classes")
    for _ in range(2):  # the second time from the kept listing
        assert len(make("imagefolder", root=str(root)).train) == 9
        errors = capsys.readouterr().err
        assert "train: 4 files are left out, as they are not .jpg, .jpeg" in errors and errors.count("left out") == 1
        assert errors.endswith(": 2 .heic, 1 without a suffix, 1 .txt\n")


def test_listing_is_kept_and_follows_changes(tmp_path, monkeypatch, settled):
    root = photos(tmp_path / "photos")
    make("imagefolder", root=str(root))
    with monkeypatch.context() as unchanged:
        unchanged.setattr(folder, "files_below", lambda *_: pytest.fail("scanned again though nothing changed"))
        assert len(make("imagefolder", root=str(root)).train) == 9
    shutil.copy(root / "train" / "ant" / "0.jpg", root / "train" / "ant" / "new.jpg")
    assert len(make("imagefolder", root=str(root)).train) == 10
    (root / "train" / "ant" / "new.jpg").unlink()
    assert len(make("imagefolder", root=str(root)).train) == 9
    for split in ("train", "val"):
        shutil.copytree(root / split / "ant", root / split / "dog")
    assert make("imagefolder", root=str(root)).class_names == ["ant", "bee", "cat", "dog"]
    for split in ("train", "val"):
        shutil.rmtree(root / split / "dog")
    assert make("imagefolder", root=str(root)).num_classes == 3


def test_fresh_folders_are_not_trusted(tmp_path):
    """A file that comes within one tick of the clock may leave the folder's time as it was."""
    make("imagefolder", root=str(photos(tmp_path / "photos")))
    assert not list((tmp_path / "cache").rglob("*.json"))


def test_folders_whose_times_are_set_back_are_listed_again(tmp_path, settled):
    """As by tar and rsync, when the rest of a data set follows its first part."""
    root = photos(tmp_path / "photos")
    make("imagefolder", root=str(root))
    assert list((tmp_path / "cache").rglob("*.json"))
    ant = root / "train" / "ant"
    before = ant.stat()
    shutil.copy(ant / "0.jpg", ant / "new.jpg")
    os.utime(ant, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert len(make("imagefolder", root=str(root)).train) == 10


def test_lossy_masks_are_refused():
    buffer = io.BytesIO()
    Image.new("L", (8, 8), 3).save(buffer, "JPEG")
    with pytest.raises(BadImage, match=r"a mask has classes as integers, which JPEG does not keep exactly"):
        open_labels(buffer, "0.jpg")


def test_images_above_the_limit_of_pillow(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    Image.new("RGB", (12, 10), "red").save(tmp_path / "a.png")
    with pytest.raises(
        BadImage, match=r"a.png: DecompressionBombError: Image size \(120 pixels\) exceeds limit of 100 pixels"
    ) as error:
        open_rgb(tmp_path / "a.png", "a.png", Decoding(max_pixels=50))
    assert error.value.advice == "Set data.max_pixels= to its pixels or more to read it, or data.on_bad_image=replace"
    assert open_rgb(tmp_path / "a.png", "a.png", Decoding(max_pixels=120)).size == (12, 10)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"classes": 3}', '{"classes": {}, "folders": [], "scanned": 0}'])
def test_damaged_listing_is_made_again(tmp_path, capsys, settled, text):
    root = photos(tmp_path / "photos")
    make("imagefolder", root=str(root))
    kept = list((tmp_path / "cache").rglob("*.json"))
    assert len(kept) == 2
    for path in kept:
        path.write_text(text)
    assert len(make("imagefolder", root=str(root)).train) == 9
    assert "scanning" in capsys.readouterr().err


def test_names_that_are_no_unicode(tmp_path):
    """What an old archive unpacks to: its bytes are spelled out wherever a name is shown or written."""
    root = photos(tmp_path / "photos")
    for split in ("train", "val"):
        os.rename(root / split / "cat", os.fsencode(root / split) + b"/caf\xe9")
    data = make("imagefolder", root=str(root))
    assert data.class_names == ["ant", "bee", "caf\\xe9"] and data.val.sample(8, 0)[1] == 2
    draw_confusion(tmp_path / "eval.png", torch.eye(3, dtype=torch.long), data.class_names)
    write_csv(tmp_path / "images.csv", [{"image": data.val.where(8)}])
    assert r"caf\udce9/2.jpg" in (tmp_path / "images.csv").read_text()


def test_links(tmp_path):
    root = photos(tmp_path / "photos")
    shutil.move(root / "train" / "cat", tmp_path / "elsewhere")
    (root / "train" / "cat").symlink_to(tmp_path / "elsewhere")
    (root / "train" / "ant" / "loop").symlink_to(root / "train" / "ant")
    assert len(make("imagefolder", root=str(root)).train) == 9


def test_many_files_are_listed_quickly(tmp_path):
    for number in range(20):
        (tmp_path / f"class{number:02}").mkdir()
        for file in range(1000):
            os.close(os.open(tmp_path / f"class{number:02}" / f"{file}.jpg", os.O_CREAT | os.O_WRONLY))
    began = time.process_time()
    listing = folder._scan(tmp_path)
    assert sum(map(len, listing.classes.values())) == 20_000
    assert time.process_time() - began < 0.4  # of this process: other work on the machine does not count


def missing(root):
    shutil.rmtree(root)


def no_val(root):
    shutil.rmtree(root / "val")


def no_classes(root):
    shutil.rmtree(root / "train")
    (root / "train").mkdir()


def empty_class(root):
    (root / "train" / "dog").mkdir()
    (root / "train" / "dog" / "readme.txt").write_text("")


def other_classes(root):
    (root / "val" / "cat").rename(root / "val" / "dog")


@pytest.mark.parametrize(
    "spoil, said",
    [
        (missing, "photos is not a folder: expected one with train/ and val/"),
        (no_val, r"has no folder val/: .* found train"),
        (no_classes, "train has no class folders"),
        (empty_class, r"the class folder .*train/dog has no image"),
        (other_classes, r"differ: only in train/: cat; only in val/: dog"),
    ],
)
def test_folders_that_are_wrong(tmp_path, spoil, said):
    spoil(photos(tmp_path / "photos"))
    with pytest.raises(DataError, match=said):
        make("imagefolder", root=str(tmp_path / "photos"))


def test_validation_may_lack_a_class(tmp_path):
    """Labels are numbered as in training; a run that is measured on such a folder numbers it likewise."""
    root = photos(tmp_path / "photos")
    shutil.rmtree(root / "val" / "bee")
    data = make("imagefolder", root=str(root))
    assert data.class_names == ["ant", "bee", "cat"] and data.val.records.labels.tolist() == [0] * 3 + [2] * 3
    assert data.val.where(3).endswith("val/cat/0.jpg")


def test_splits_are_the_folders_that_are_named(tmp_path):
    root = photos(tmp_path / "photos")
    (root / "val").rename(root / "test")
    (root / "train").rename(root / "learn")
    data = make("imagefolder", root=str(root), train_split="learn", val_split="test")
    assert data.train.where(0).startswith(f"{root}/learn/") and data.val.where(0).startswith(f"{root}/test/")
    with pytest.raises(DataError, match=r"no folder val/: .* or what data.val_split= names.* found learn, test"):
        make("imagefolder", root=str(root), train_split="learn")
    (root / "test").rename(root / "validation")
    assert make("imagefolder", root=str(root), train_split="learn").val.where(0).startswith(f"{root}/validation/")
    (root / "val").mkdir()
    with pytest.raises(DataError, match=r"both val/ and validation/: give data.val_split=val"):
        make("imagefolder", root=str(root), train_split="learn")


def test_folder_must_be_named():
    with pytest.raises(DataError, match=r"needs data.root="):
        make("imagefolder")


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("content", [b"", b"no image at all", None])
def test_unreadable_image_is_named(tmp_path, workers, content):
    root = photos(tmp_path / "photos")
    path = root / "val" / "bee" / "1.jpg"
    path.write_bytes(path.read_bytes()[:300] if content is None else content)
    source = make("imagefolder", root=str(root)).val
    with pytest.raises(DataError) as error:
        all_of(source, train=False, batch_size=4, workers=workers)
    assert str(path) in str(error.value) and "sample 4 of the validation set" in str(error.value)
    assert "Traceback" not in str(error.value)
    assert source.idle  # the workers are whole and wait
    source.idle.clear()


SCHEMAS = {  # data set -> (columns of image and label, classes, name of the validation split)
    "imagenet": ("image", "label", 1000, "validation"),
    "cifar10": ("img", "label", 10, "test"),
    "cifar100": ("img", "fine_label", 100, "test"),
    "fashion_mnist": ("image", "label", 10, "test"),
}


def png(colour, mode):
    buffer = io.BytesIO()
    Image.new(mode, (28, 28), colour).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def parquet(root, name, labels=(0, 1, 2, 3, 4, 5), named=True, splits=None):
    """Files with the columns and the names that the hub's have, split over two shards."""
    image, label, classes, val = SCHEMAS[name]
    names = list(imagenet.synsets()) if name == "imagenet" else [f"class {number}" for number in range(classes)]
    kind = datasets.ClassLabel(names=names) if named else datasets.Value("int64")
    features = datasets.Features({image: datasets.Image(), label: kind})
    for split in splits or ("train", val):
        for shard in range(2):
            part = labels[shard::2]
            grey = name == "fashion_mnist"
            images = [png(40 * row, "L") if grey else png((40 * row, 0, 0), "RGB") for row in range(len(part))]
            rows = {image: images, label: list(part)}
            file = root / "data" / f"{split}-0000{shard}-of-00002.parquet"
            file.parent.mkdir(parents=True, exist_ok=True)
            datasets.Dataset.from_dict(rows, features=features).to_parquet(file)
    return str(root)


@pytest.mark.parametrize("name", SCHEMAS)
def test_parquet(tmp_path, name):
    data = make(name, root=parquet(tmp_path / "files", name))
    assert data.num_classes == SCHEMAS[name][2] and data.class_names[1] in ("class 1", "goldfish")
    assert len(data.train) == len(data.val) == 6
    assert [data.train.label(index) for index in range(6)] == [0, 2, 4, 1, 3, 5]
    assert data.train.image(1).getpixel((0, 0))[0] == 40 and data.train.image(1).mode == "RGB"
    workers = [all_of(data.train, batch_size=2, workers=workers) for workers in (0, 1)]
    assert same(*workers)


def test_parquet_without_names(tmp_path):
    data = make("cifar10", root=parquet(tmp_path / "files", "cifar10", named=False))
    assert data.class_names == list("0123456789")


def test_parquet_errors(tmp_path):
    root = parquet(tmp_path / "files", "cifar10", named=False, labels=(0, 3, 12, 4))
    with pytest.raises(DataError, match=r"training set of cifar10 has label 12 at row 1, expected 0 ... 9"):
        make("cifar10", root=root)
    root = parquet(tmp_path / "unlabelled", "imagenet", named=False, labels=(-1, -1))
    with pytest.raises(DataError, match=r"label -1 at row 0.*a split without labels"):
        make("imagenet", root=root)
    root = parquet(tmp_path / "good", "cifar10")
    with pytest.raises(
        DataError, match=r"no \.parquet files of the split 'validation'.*found: data/test-00000-of-00002"
    ):
        make("cifar10", root=root, val_split="validation")
    with pytest.raises(DataError, match=r"no column 'picture', only img, label: set data.image_key="):
        make("cifar10", root=root, image_key="picture")
    with pytest.raises(DataError, match=r"data.root=/nowhere is not a folder"):
        make("cifar10", root="/nowhere")
    (tmp_path / "broken" / "data").mkdir(parents=True)
    for split in ("train", "test"):
        (tmp_path / "broken" / "data" / f"{split}-0.parquet").write_bytes(b"PAR1 but no more")
    with pytest.raises(DataError, match=r"cannot read the parquet file .*/train-0\.parquet"):
        make("cifar10", root=str(tmp_path / "broken"))


def test_tables_of_ones_own(tmp_path):
    """Images are prepared as for the model, and flipped."""
    data, cfg = make("arrow", root=parquet(tmp_path / "files", "imagenet")), compose(["data=arrow", "model=nat_m"])
    assert len(data.train) == len(data.val) == 6 and data.class_names == list(imagenet.synsets())
    assert (cfg.data.name, cfg.data.hflip, preprocessing(cfg).size) == ("arrow", 0.5, (224, 224))
    with pytest.raises(DataError, match=r"^data=arrow needs data\.root=<folder with \*\.parquet .*, or data\.hub=<"):
        make("arrow")


@pytest.mark.parametrize("source", ["arrow", "parquet"])
@pytest.mark.parametrize(
    "values, said",
    [
        (["cat", "dog"], "'cat' at row 0"),
        ([1.0, 0.5], "0.5 at row 1"),
        ([1.0, None], "None at row 1"),
        ([1.0, 0.0], None),
    ],
)
def test_labels_are_numbers(tmp_path, source, values, said):
    rows = {"img": [{"bytes": png((9, 9, 9), "RGB")["bytes"], "path": None}] * 2, "label": values}
    for split in ("train", "test"):
        features = {"img": datasets.Image(), "label": datasets.Value(type_of(values))}
        table = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
        table.to_parquet(tmp_path / f"{split}.parquet")
    changes = {"root": str(tmp_path), "source": source, "hub": None}
    if said is None:
        assert make("cifar10", **changes).val.records.labels.tolist() == [1, 0]
        return
    with pytest.raises(DataError, match=rf"column 'label' holds {said}, expected .* set data.label_key="):
        make("cifar10", **changes)


@pytest.mark.parametrize("source", ["arrow", "parquet"])
@pytest.mark.parametrize("labels", [[[0, 1, 1], [1, 0, 0]], [[1, 2], [0]], [[], [0]], [None, [2]]])
def test_several_labels_an_image(tmp_path, source, labels):
    features = datasets.Features({"img": datasets.Image(), "label": datasets.List(datasets.Value("int64"))})
    for split in ("train", "test"):
        rows = {"img": [png((9, 9, 9), "RGB")] * 2, "label": labels}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / f"{split}.parquet")
    with pytest.raises(DataError) as error:
        make("cifar10", root=str(tmp_path), source=source, hub=None)
    row = labels[0] is None
    assert (
        f"the column 'label' holds several labels, {labels[row]} at row {int(row)}: expected one per image, the number "
        "of a class; set data.label_key= to another column"
    ) in str(error.value)


@pytest.mark.parametrize("source", ["arrow", "parquet"])
@pytest.mark.parametrize("where", ["train-1", "test-0"])
def test_files_that_number_their_classes_otherwise(tmp_path, source, where):
    """Files that were made apart; labels would silently mean other classes."""

    def write(file, names):
        features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=names)})
        rows = {"img": [png((9, 9, 9), "RGB")] * 2, "label": [0, 1]}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / f"{file}.parquet")

    for file in ("train-0", "train-1", "test-0"):
        write(file, ["ant", "bee", "cat"])
    changes = {"root": str(tmp_path), "source": source, "hub": None, "num_classes": None}
    assert make("cifar10", **changes).class_names == ["ant", "bee", "cat"]
    write(where, ["ant", "cat"])
    with pytest.raises(DataError, match=rf"class 1 is 'bee' in .*train-0.parquet and 'cat' in .*{where}.parquet"):
        make("cifar10", **changes)


def test_what_datasets_saved_to_a_disk(tmp_path):
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["ant", "bee"])})
    rows = {"img": [png((40, 0, 0), "RGB"), png((9, 9, 9), "RGB")], "label": [1, 0]}
    table = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict({"train": table, "test": table}).save_to_disk(tmp_path / "saved")
    given = {"root": str(tmp_path / "saved"), "num_classes": None}
    own = make("arrow", root=given["root"], image_key="img", val_split="test")
    data = make("cifar10", **given)
    assert own.class_names == data.class_names and own.val.image(1).tobytes() == data.val.image(1).tobytes()
    assert data.class_names == ["ant", "bee"] and data.val.records.labels.tolist() == [1, 0]
    assert data.train.image(0).getpixel((0, 0)) == (40, 0, 0)
    said = rf"Read the output of save_to_disk of `datasets` with data\.source=arrow data\.root={tmp_path / 'saved'}$"
    for root in (tmp_path, tmp_path / "saved"):
        with pytest.raises(DataError, match=said):
            make("cifar10", source="parquet", hub=None, **{**given, "root": str(root)})
    with pytest.raises(DataError, match=r"has no split 'more', only test, train: set data\.train_split="):
        make("cifar10", val_split="more", **given)
    (tmp_path / "saved" / "test" / "data-00000-of-00001.arrow").write_bytes(b"no table")
    with pytest.raises(DataError, match="cannot read the saved files of 'test' under"):
        make("cifar10", **given)
    other = table.cast_column("label", datasets.ClassLabel(names=["bee", "ant"]))
    shutil.rmtree(tmp_path / "saved" / "test")
    other.save_to_disk(tmp_path / "saved" / "test")
    with pytest.raises(DataError, match=r"class 0 is 'ant' in .*saved/train and 'bee' in .*saved/test"):
        make("cifar10", **given)
    shown = table.with_format("pandas", columns=["label"])  # how it was looked at is saved too
    datasets.DatasetDict({"train": shown, "test": shown}).save_to_disk(tmp_path / "shown")
    assert make("cifar10", **{**given, "root": str(tmp_path / "shown")}).train.image(0).getpixel((0, 0)) == (40, 0, 0)


def test_hidden_tables_are_passed_over(tmp_path):
    root = parquet(tmp_path / "files", "cifar10")
    (tmp_path / "files" / "data" / "._train-00000-of-00002.parquet").write_bytes(b"macOS leaves these")
    assert len(make("cifar10", root=root).train) == 6


def test_archives_are_closed_with_their_source(tmp_path):
    def opened():
        links = [os.path.join("/proc/self/fd", name) for name in os.listdir("/proc/self/fd")]
        return [os.readlink(link) for link in links if os.path.lexists(link)]

    root = tars(tmp_path / "tars", counts=(7, 3))
    data = make("webdataset", root=root)
    data.train.image(0), data.train.image(9)
    assert len([path for path in opened() if path.startswith(root)]) == 2
    del data
    assert not [path for path in opened() if path.startswith(root)]


@pytest.mark.parametrize(
    "write",
    [
        lambda path: write_json(path, [1]),
        lambda path: write_csv(path, [{"a": 1}]),
        lambda path: save_picture(Image.new("RGB", (9, 9)), path),
        lambda path: draw_confusion(path, torch.eye(2, dtype=torch.long), ["a", "b"]),
    ],
)
def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path, write):
    """There is a folder in its place."""
    (tmp_path / "results").mkdir()
    with pytest.raises(IsADirectoryError):
        write(tmp_path / "results")
    assert os.listdir(tmp_path) == ["results"]


def test_a_listing_that_cannot_be_written_leaves_nothing(tmp_path, capsys):
    (tmp_path / "listing").mkdir()
    replace_file(tmp_path / "listing", b"content", "the listing")
    assert "the listing is not cached for the next run: " in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["listing"]


def type_of(values):
    return "string" if isinstance(values[0], str) else "float64"


def test_no_network_and_no_copy(monkeypatch):
    for module in (datasets.config, huggingface_hub.constants):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError) as error:
        make("cifar10")
    said = str(error.value)
    assert "cannot get uoft-cs/cifar10" in said and "data.root=" in said
    assert "columns img, label" in said and "splits train, test" in said and "data=digits" in said
