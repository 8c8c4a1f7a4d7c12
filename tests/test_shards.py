"""Training sets in shards that are not as expected: archives, names, files of two splits, columns, the hub."""

import errno
import io
import os
import re
import tarfile
import time
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recipes.data import DataError
from shard_cases import members, number_of, parquets, picture, tars, write_tar
from source_cases import make

pytestmark = pytest.mark.usefixtures("own_caches")


def test_labels_in_json(tmp_path):
    data = make("webdataset", root=tars(tmp_path / "json", label="json"))
    assert data.train.label(8) == 3
    (tmp_path / "json" / "classes.txt").write_text("ant\nbee\ncat\ndog\nélan\n", "utf-8-sig")
    assert make("webdataset", root=str(tmp_path / "json")).class_names == ["ant", "bee", "cat", "dog", "élan"]


@pytest.mark.parametrize("order", [("json", "cls"), ("cls", "json")])
@pytest.mark.parametrize("said", [b'{"label": 4}', b'{"label": "cat"}', b"{"])
def test_a_number_of_its_own_counts_more_than_json(tmp_path, order, said):
    texts = {"json": said, "cls": b"1"}
    samples = {"0": {"png": picture(0), **{part: texts[part] for part in order}}}
    for split in ("train", "validation"):
        write_tar(tmp_path / f"{split}-0.tar", samples)
    assert make("webdataset", root=str(tmp_path)).train.label(0) == 1


def test_an_archive_that_is_overwritten_while_it_is_read(tmp_path):
    """Its bytes at the old positions may be images too."""
    train = make("webdataset", root=tars(tmp_path)).train
    train.image(0)
    time.sleep(0.01)
    file = tmp_path / "set-train-000.tar"
    with open(file, "r+b") as archive:
        archive.write(file.read_bytes())
    with pytest.raises(DataError, match=r"set-train-000\.tar was overwritten while it was in use: start again"):
        train.image(1)


def test_links_are_counted(tmp_path, capsys):
    """What tar writes for a folder whose equal files are links to one another."""
    tars(tmp_path)
    with tarfile.open(tmp_path / "set-train-002.tar", "a") as archive:
        for name, kind in (("a.png", tarfile.LNKTYPE), ("a.cls", tarfile.SYMTYPE), ("a.txt", tarfile.SYMTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "dir/00037.png"
            archive.addfile(info)
    said = "webdataset, split 'train': 2 links are left out, such as .*set-train-002.tar, a.png: pack with tar --deref"
    for _ in range(2):  # the second time from the kept index
        assert len(make("webdataset", root=str(tmp_path)).train) == 113
        errors = capsys.readouterr().err
        assert re.search(said, errors) and errors.count("links are left out") == 1
    with tarfile.open(tmp_path / "set-train-002.tar", "a") as archive:
        archive.addfile(tarfile.TarInfo("a.cls"))
    with pytest.raises(DataError, match=r"a.cls holds no label: b'' "):
        make("webdataset", root=str(tmp_path))
    write_tar(tmp_path / "set-train-002.tar", {"b": {"cls": b"1"}})
    with pytest.raises(DataError, match=r"the sample b has no image \(.*\)$"):
        make("webdataset", root=str(tmp_path))
    with tarfile.open(tmp_path / "set-train-002.tar", "a") as archive:
        info = tarfile.TarInfo("b.png")
        info.type, info.linkname = tarfile.LNKTYPE, "elsewhere"
        archive.addfile(info)
    with pytest.raises(DataError, match=r"the sample b has no image .*1 links are left out, such as .*, b.png: pack"):
        make("webdataset", root=str(tmp_path))


def test_archives_that_were_joined(tmp_path):
    root = tars(tmp_path / "good")
    files = [tmp_path / "good" / f"set-train-00{number}.tar" for number in (0, 1)]
    files[0].write_bytes(files[0].read_bytes() + bytes(tarfile.RECORDSIZE))
    assert len(make("webdataset", root=root).train) == 113
    files[0].write_bytes(files[0].read_bytes() + files[1].read_bytes())
    with pytest.raises(DataError, match=r"set-train-000.tar: there is more behind the block that ends an archive"):
        make("webdataset", root=root)


def test_members_never_leave_the_archive(tmp_path):
    """Names that climb out, links and devices: what is no sample is passed over, and nothing is written anywhere."""
    root = tmp_path / "a" / "b"
    write_tar(root / "validation-0.tar", {"0": members(0)})
    with tarfile.open(root / "train-0.tar", "w") as archive:
        for name, kind in (("evil.png", tarfile.SYMTYPE), ("hard.png", tarfile.LNKTYPE), ("dev.png", tarfile.CHRTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
        for number, key in enumerate(("../../up", "/absolute", "plain")):
            for extension, data in members(number).items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    before = sorted(tmp_path.rglob("*"))
    source = make("webdataset", root=str(root)).train
    assert [number_of(source.image(index)) for index in range(3)] == [0, 1, 2] and len(source) == 3
    assert "../../up.png" in source.where(0)
    assert [path for path in sorted(tmp_path.rglob("*")) if "cache" not in str(path)] == before
    assert not os.path.exists("/absolute.png")


CASES = {
    "no label": ({"0": {"png": picture(0)}}, "the sample 0 has no label: expected .cls, or .json with 'label'"),
    "no image": ({"0": {"cls": b"1", "npy": b"x"}}, r"the sample 0 has no image"),
    "no number": ({"0": {"cls": b"cat", "png": picture(0)}}, r"0.cls holds no label: b'cat' .*classes.txt"),
    "no class": ({"0": {"cls": b"9" * 20, "png": picture(0)}}, r"0.cls holds 9+ instead of a class number: expected"),
    "no JSON": ({"0": {"json": b"{", "png": picture(0)}}, r"0.json holds no label"),
    "a text in JSON": ({"0": {"json": b'{"label": "1"}', "png": picture(0)}}, r"0.json holds '1' instead of a class"),
    "a pickle": ({"0": {"pyd": b"cos\nsystem\n(S'false'\ntR.", "png": picture(0)}}, "has no label"),
    "two images": ({"0": {"png": picture(0), "jpg": picture(1), "cls": b"0"}}, "has two images, 0.png, 0.jpg"),
}


@pytest.mark.parametrize("name", CASES)
def test_archives_that_are_wrong(tmp_path, name):
    samples, said = CASES[name]
    write_tar(tmp_path / "train-0.tar", samples)
    write_tar(tmp_path / "validation-0.tar", {"0": members(0)})
    with pytest.raises(DataError, match=said):
        make("webdataset", root=str(tmp_path))


@pytest.mark.parametrize("place", [3, 4])
def test_an_archive_that_was_cut_between_members(tmp_path, place):
    """Of two samples, or of one."""
    root = tars(tmp_path / "good")
    file = tmp_path / "good" / "set-train-003.tar"
    with tarfile.open(file) as archive:
        cut = archive.getmembers()[place].offset
    os.truncate(file, cut)
    with pytest.raises(DataError, match=r"set-train-003.tar: the block that ends an archive is missing"):
        make("webdataset", root=root)


def test_compressed_archives_are_refused(tmp_path):
    root = tars(tmp_path / "good")
    with tarfile.open(tmp_path / "good" / "set-train-009.tar", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("x"))
    with pytest.raises(DataError, match=r"set-train-009.tar.*expected a whole, uncompressed tar file"):
        make("webdataset", root=root)
    with pytest.raises(DataError, match=r"only reads local archives, not data.hub=.*download them"):
        make("webdataset", root=root, hub="timm/imagenet-1k-wds")


@pytest.mark.parametrize("cell", ["images/1.jpg", {"bytes": None, "path": "images/1.jpg"}])
def test_names_of_images_in_place_of_them(tmp_path, cell):
    for split in ("train", "validation"):
        pq.write_table(pa.table({"image": [cell], "label": [0]}), tmp_path / f"{split}.parquet")
    source = make("parquet_stream", root=str(tmp_path), num_classes=2).val
    with pytest.raises(DataError, match=r"holds the name of an image, 'images/1.jpg', .* with data.source=arrow"):
        source.sample(0, 0)


def test_splits_of_other_names(tmp_path):
    root = tars(tmp_path / "data")
    os.rename(f"{root}/set-validation-000.tar", f"{root}/set-val-000.tar")
    with pytest.raises(DataError, match=r"other names in data.train_split= and data.val_split=; found: .*set-train"):
        make("webdataset", root=root)
    assert len(make("webdataset", root=root, val_split="val").val) == 20


@pytest.mark.parametrize(
    "train, val",
    [
        ("train-and-val/train-0", "train-and-val/validation-0"),
        ("train-and-val/train/0", "train-and-val/train/validation/0"),
        ("validation/train-0", "train/a-validation_0"),
    ],
)
def test_a_file_is_of_one_split(tmp_path, train, val):
    """The split that its name says, else the nearest folder."""
    for name, count in ((train, 12), (val, 6)):
        write_tar(tmp_path / f"{name}.tar", {str(number): members(number) for number in range(count)})
    data = make("webdataset", root=str(tmp_path))
    assert (len(data.train), len(data.val)) == (12, 6)


def test_folders_that_are_links(tmp_path):
    """One leads back into itself, which is read once; hidden ones are not read."""
    tars(tmp_path / "disk")
    for split in ("train", "validation"):
        (tmp_path / "elsewhere" / split).mkdir(parents=True)
        for number, file in enumerate(sorted((tmp_path / "disk").glob(f"*{split}*.tar"))):
            file.rename(tmp_path / "elsewhere" / split / f"{number}.tar")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "train").symlink_to(tmp_path / "elsewhere" / "train")
    (tmp_path / "elsewhere" / "train" / "again").symlink_to(tmp_path / "elsewhere" / "train")
    (tmp_path / "root" / "validation").symlink_to(tmp_path / "elsewhere" / "validation")
    (tmp_path / "elsewhere" / "validation" / ".hidden").mkdir()
    (tmp_path / "elsewhere" / "validation" / ".hidden" / "7.tar").write_bytes(b"no archive")
    data = make("webdataset", root=str(tmp_path / "root"))
    assert len(data.train) == 113 and number_of(data.train.image(0)) == 0 and len(data.val) == 20


def test_folders_that_may_not_be_read(tmp_path, monkeypatch, capsys):
    """The rest is read, but not silently without them; the folder itself must be readable."""
    root, scandir = Path(tars(tmp_path / "tars")), os.scandir
    (root / "lost+found").mkdir()
    closed = root / "lost+found"

    def refused(path):
        if str(path) == str(closed):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return scandir(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", refused)
        assert len(make("webdataset", root=str(root)).train) == 113
        said = "webdataset, split 'train': a folder is left out: "
        assert f"{said}[Errno 13] Permission denied: '{closed}'" in capsys.readouterr().err
        closed = root
        with pytest.raises(DataError, match=rf"cannot list data.root={root}: .*Permission denied"):
            make("webdataset", root=str(root))


@pytest.mark.parametrize("name", ["cifar10", "parquet_stream"])
def test_a_folder_that_is_called_a_file(tmp_path, name):
    """As Spark, Dask and Polars write a table."""
    rows = {"img": [{"bytes": picture(0), "path": None}] * 3, "label": [0, 1, 2]}
    features = datasets.Features({"img": datasets.Image(), "label": datasets.Value("int64")})
    for split in ("train", "test"):
        (tmp_path / f"{split}.parquet").mkdir()
        table = datasets.Dataset.from_dict(rows, features=features)
        table.to_parquet(tmp_path / f"{split}.parquet" / "part-00000.parquet")
        (tmp_path / f"{split}.parquet" / "_SUCCESS").touch()
    data = make(name, root=str(tmp_path), image_key="img", val_split="test", num_classes=None)
    assert data.train.records.labels.tolist() == data.val.records.labels.tolist() == [0, 1, 2]


def test_compressed_files_are_said_once(tmp_path, capsys):
    root = Path(parquets(tmp_path))
    for file in root.rglob("*.parquet"):
        file.with_name(f"{file.name}.gz").touch()
    (root / "data" / "train-9.parquet.gz").touch()
    make("parquet_stream", root=str(root), source="arrow")
    assert capsys.readouterr().err.count("1 compressed files are left out, such as data/train-9.parquet.gz") == 1


def test_compressed_archives_beside_others(tmp_path, capsys):
    root = tars(tmp_path)
    for name in ("train-1.tar.gz", "train-2.tar.zst", "set-train-000.tar.gz", "train-3.tar.idx"):
        (tmp_path / name).write_bytes(b"anything")
    assert len(make("webdataset", root=root).train) == 113
    assert "split 'train': 2 compressed files are left out, such as train-1.tar.gz" in capsys.readouterr().err
    (tmp_path / "dev.tar.xz").write_bytes(b"anything")
    with pytest.raises(DataError, match=r"no .tar files of the split 'dev'.*found: set-train.*, dev.tar.xz"):
        make("webdataset", root=root, val_split="dev")


def test_a_shard_whose_time_is_set_back_is_indexed_again(tmp_path):
    """As by rsync, or cp -p, of a file with other labels and of the same size."""
    root = labelled(tmp_path, (0, 1), val=(1, 0))
    assert make("webdataset", root=root).val.records.labels.tolist() == [1, 0]
    path = tmp_path / "validation-0.tar"
    before = path.stat()
    labelled(tmp_path, (0, 1), val=(0, 1))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    assert make("webdataset", root=root).val.records.labels.tolist() == [0, 1]


def labelled(root, train, val=(0,)):
    for split, labels in (("train", train), ("validation", val)):
        samples = {str(row): {"png": picture(row), "cls": str(label).encode()} for row, label in enumerate(labels)}
        write_tar(root / f"{split}-0.tar", samples)
    return str(root)


def test_counted_classes(tmp_path, capsys):
    root = labelled(tmp_path, (20221128, 7))
    with pytest.raises(DataError, match=r"largest of 3 labels is 20221128, .* 20221129 classes: .* data.num_classes="):
        make("webdataset", root=root)
    root = labelled(tmp_path, (1, 2, 3), (0, 1, 5))
    assert make("webdataset", root=root).num_classes == 6
    said = "3 of 6 classes have no training image: 0, 4, 5; 2 validation images are of these classes"
    assert said in capsys.readouterr().err
    assert make("webdataset", root=labelled(tmp_path, (0, 1))).num_classes == 2
    assert "training image" not in capsys.readouterr().err
    assert len(make("webdataset", root=labelled(tmp_path, (1200,)), num_classes=1201).class_names) == 1201


def test_labels_of_no_class(tmp_path):
    with pytest.raises(DataError, match=r"label -1 at row 0, expected numbers from 0 on: is this a split without"):
        make("webdataset", root=labelled(tmp_path, (-1,), (-1,)))
    (tmp_path / "classes.txt").write_text("ant\nbee\n")
    with pytest.raises(DataError, match=r"label 2 at row 1, expected 0 \.\.\. 1 for 2 classes: .* classes\.txt of"):
        make("webdataset", root=labelled(tmp_path, (1, 2)))


@pytest.mark.parametrize(
    "text, changes, said",
    [
        (b"ant\n\nbee\n", {}, r"classes.txt, line 2, has no name: expected one name per line"),
        (b"", {}, r"classes.txt, line 1, has no name"),
        (b"ant\nbee\nant\n", {}, r"classes.txt, line 3, has the name 'ant' in line 1 too"),
        ("ant\nélan\n".encode("latin-1"), {}, r"cannot read .*classes.txt: 'utf-8' codec.*in UTF-8"),
        (b"ant\nbee\ncat\n", {"num_classes": 2}, r"has the names of 3 classes, expected 2 .* at most"),
        (b"ant\r\nbee\r\n\r\n \n", {}, ["ant", "bee"]),
        (b"ant\nbee", {"num_classes": 4}, ["ant", "bee", "2", "3"]),
    ],
)
def test_names_of_classes(tmp_path, text, changes, said):
    root = labelled(tmp_path, (0, 1))
    (tmp_path / "classes.txt").write_bytes(text)
    if isinstance(said, list):
        assert make("webdataset", root=root, **changes).class_names == said
        return
    with pytest.raises(DataError, match=said):
        make("webdataset", root=root, **changes)


def test_columns(tmp_path):
    root = parquets(tmp_path / "data")
    with pytest.raises(DataError, match=r"has no column 'img', only image, label: set data.image_key="):
        make("parquet_stream", root=root, image_key="img")


def test_without_network(monkeypatch):
    def offline(name):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset_builder", offline)
    with pytest.raises(
        DataError, match=r"cannot get someone/images from the Hugging Face hub: ConnectionError: no route"
    ):
        make("parquet_stream", hub="someone/images")
