"""Decoded images that are kept: the same pixels, fewer decodings, within bounds, whatever happens to files."""

import hashlib
import os
import pickle
import pwd
import time
from multiprocessing import get_context
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import ExifTags, Image, ImageColor

from children import FORKS, files_up_to
from recipes.data import DataError, folder
from recipes.data.cache import Cache, cache_path
from recipes.data.encoded import Encoded
from recipes.data.images import orientation
from shard_cases import tars
from source_cases import all_of, make, photos, same

pytestmark = pytest.mark.usefixtures("own_caches")


@pytest.fixture
def decoded(monkeypatch):
    """The images that are decoded in this process."""
    found, original = [], Encoded.image

    def image(self, index):
        found.append(index)
        return original(self, index)

    monkeypatch.setattr(Encoded, "image", image)
    return found


@pytest.mark.parametrize("kind", ["ram", "disk"])
@pytest.mark.parametrize("workers", [0, 2])
def test_same_pixels(tmp_path, kind, workers):
    root = str(photos(tmp_path / "photos"))
    plain, kept = make("imagefolder", root=root, jpeg="full"), make("imagefolder", root=root, cache=kind)
    for epoch in range(3):
        for name, train in (("train", True), ("val", False)):
            given = dict(batch_size=4, epoch=epoch, train=train)
            expected = all_of(getattr(plain, name), **given)
            assert same(expected, all_of(getattr(kept, name), **given, workers=workers))


@pytest.mark.parametrize("kind", ["ram", "disk"])
def test_each_is_decoded_once(tmp_path, decoded, kind):
    source = make("imagefolder", root=str(photos(tmp_path / "photos")), cache=kind).train
    for epoch in range(3):
        all_of(source, batch_size=3, epoch=epoch)
    assert sorted(decoded) == list(range(9))


@pytest.mark.parametrize("kind", ["ram", "disk"])
def test_workers_share_what_they_keep(tmp_path, decoded, kind):
    source = make("imagefolder", root=str(photos(tmp_path / "photos")), cache=kind).val
    all_of(source, train=False, batch_size=2, workers=2)
    all_of(source, train=False, batch_size=9)
    assert not decoded  # in this process: the workers had decoded them all


def test_the_next_run_finds_the_disk(tmp_path, decoded):
    root = str(photos(tmp_path / "photos"))
    all_of(make("imagefolder", root=root, cache="disk").val, train=False)
    del decoded[:]
    all_of(make("imagefolder", root=root, cache="disk").val, train=False)
    assert not decoded
    all_of(make("imagefolder", root=root, cache="disk", exif_orientation=True).val, train=False)
    assert len(decoded) == 9  # decoded by another rule
    assert len(list((tmp_path / "cache" / "attention-backbones" / "images").iterdir())) == 4
    make("imagefolder", root=root, cache="disk", cache_dir=str(tmp_path / "there"))
    assert len(list((tmp_path / "there").iterdir())) == 2


@pytest.mark.parametrize("kind", ["ram", "disk"])
def test_changed_files_are_decoded_anew(tmp_path, decoded, kind):
    root = photos(tmp_path / "photos")
    source = make("imagefolder", root=str(root), cache=kind).val
    before = [source.image(index) for index in range(9)]
    path = source.where(4)
    Image.new("RGB", (40, 36), "white").save(path)
    os.utime(path, ns=(1, 1))
    after = [source.image(index) for index in range(9)]
    assert after[4].getpixel((3, 3)) == (255, 255, 255) and decoded == [*range(9), 4]
    assert [image.tobytes() for image in after[:4]] == [image.tobytes() for image in before[:4]]
    os.unlink(path)
    with pytest.raises(DataError, match=r"Is the folder still there\?"):
        source.image(4)


def coloured(path, colour):
    Image.new("RGB", (8, 8), colour).save(path)
    return path.read_bytes()


@pytest.mark.parametrize("source", ["arrow", "parquet"])
def test_columns_are_kept_apart(tmp_path, source):
    columns = {name: [coloured(tmp_path / "one.png", name)] * 2 for name in ("red", "blue")}
    for split in ("train", "validation"):
        pq.write_table(pa.table({**columns, "label": [0, 1]}), tmp_path / f"{split}.parquet")
    given = {"source": source, "root": str(tmp_path), "cache": "disk"}
    for name, pixel in (("red", (255, 0, 0)), ("blue", (0, 0, 255)), ("red", (255, 0, 0))):
        assert make("parquet_stream", image_key=name, **given).train.image(0).getpixel((0, 0)) == pixel


def test_changed_files_that_a_table_names_are_decoded_anew(tmp_path):
    files = [{"bytes": None, "path": str(tmp_path / f"{i}.png")} for i in range(2)]
    for split in ("train", "validation"):
        pq.write_table(pa.table({"image": files, "label": [0, 1]}), tmp_path / f"{split}.parquet")
    for colour in ("red", "blue"):
        for file in files:
            coloured(Path(file["path"]), colour)
        data = make("parquet_stream", source="arrow", root=str(tmp_path), cache="disk")
        assert data.train.image(1).getpixel((0, 0)) == ImageColor.getrgb(colour)


@pytest.mark.parametrize("kind", ["ram", "disk"])
def test_bounds(tmp_path, decoded, capfd, kind):
    """9 images of 40 x 36 x 3 = 4320 bytes, and room for five."""
    source = make("imagefolder", root=str(photos(tmp_path / "photos")), cache=kind, cache_gb=5 * 4320 / 1e9).train
    assert same(*(all_of(source, batch_size=9) for _ in range(2)))
    assert len(decoded) == 9 + 4
    assert capfd.readouterr().err.count("takes no more images: it has reached the 2.16e-05 GB of data.cache_gb") == 1
    assert os.fstat(source.cache.fd).st_size < 5 * 4320 + 1000


def test_a_full_disk_costs_time_alone(tmp_path, decoded, capfd):
    """A limit on the size of files stands for the disk; the image that did not fit is not there afterwards."""
    root = str(photos(tmp_path / "photos"))
    plain = all_of(make("imagefolder", root=root).val, train=False)
    source = make("imagefolder", root=root, cache="disk").val
    with files_up_to(3 * 4320 + 2000):
        found = all_of(source, train=False)
    assert same(plain, found) and "takes no more images: [Errno 27] File too large" in capfd.readouterr().err
    del decoded[:]
    assert same(plain, all_of(make("imagefolder", root=root, cache="disk").val, train=False)) and 5 <= len(decoded) <= 6


@pytest.mark.parametrize(("umask", "mode"), [(0o000, 0o666), (0o002, 0o664), (0o077, 0o600)])
def test_others_may_share_the_disk(tmp_path, umask, mode):
    root, before = str(photos(tmp_path / "photos")), os.umask(umask)
    try:
        make("imagefolder", root=root, cache="disk", cache_dir=str(tmp_path / "there"))
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "there").iterdir()} == {mode}


def test_damaged_pixels_are_decoded_anew(tmp_path, decoded):
    source = make("imagefolder", root=str(photos(tmp_path / "photos")), cache="disk").val
    right = source.image(2).tobytes()
    with open(source.cache.path, "r+b") as file:
        file.seek(-100, os.SEEK_END)
        file.write(bytes(50))
    assert source.image(2).tobytes() == right and decoded == [2, 2]


def test_a_file_of_another_kind_is_replaced(tmp_path):
    root = str(photos(tmp_path / "photos"))
    path = make("imagefolder", root=root, cache="disk").val.cache.path
    for content in (b"", b"something else" * 99):
        path.write_bytes(content)
        source = make("imagefolder", root=root, cache="disk").val
        assert source.image(0).tobytes() == make("imagefolder", root=root).val.image(0).tobytes()


def child(root):
    """A process that fills the cache on disk: it says when it begins, then what all images together are."""
    here, there = FORKS.Pipe(duplex=False)
    process = FORKS.Process(target=_fill, args=(root, os.environ["XDG_CACHE_HOME"], there))
    process.start()
    there.close()
    return process, here


def _fill(root, home, said):
    os.environ["XDG_CACHE_HOME"] = home
    source = make("imagefolder", root=root, cache="disk").train
    said.send("begun")
    pixels = b"".join(source.image(index).tobytes() for _ in range(2) for index in range(len(source)))
    said.send(hashlib.sha256(pixels).hexdigest())


def test_processes_that_are_killed_leave_the_cache_whole(tmp_path):
    root = str(photos(tmp_path / "photos", count=200))
    for delay in (0.0, 0.02):
        process, said = child(root)
        assert said.recv() == "begun"
        time.sleep(delay)
        process.kill()
        process.join()
    plain, kept = (make("imagefolder", root=root, cache=cache).train for cache in (None, "disk"))
    assert all(kept.image(index).tobytes() == plain.image(index).tobytes() for index in range(600))


def test_several_processes_fill_one_file(tmp_path):
    root = str(photos(tmp_path / "photos", count=20))
    said = [said for _, said in [child(root) for _ in range(3)]]
    assert [each.recv() for each in said] == ["begun"] * 3
    assert len({each.recv() for each in said}) == 1
    plain, kept = (make("imagefolder", root=root, cache=cache).train for cache in (None, "disk"))
    assert all(kept.image(index).tobytes() == plain.image(index).tobytes() for index in range(60))


@pytest.mark.parametrize("content", [None, b"", b"of an older version" * 99])
def test_ranks_that_start_together_share_one_file(tmp_path, monkeypatch, content):
    """Another rank opens the same path right after this one did, or found none."""
    path, plain, other = tmp_path / "images.rgb", os.open, []
    if content is not None:
        path.write_bytes(content)

    def opened(*args, **kwargs):
        try:
            return plain(*args, **kwargs)
        finally:
            if not other:
                other.append(path)
                other[0] = Cache(3, 10_000, path)

    monkeypatch.setattr(os, "open", opened)
    first = Cache(3, 10_000, path)
    monkeypatch.undo()
    assert os.fstat(first.fd).st_ino == os.fstat(other[0].fd).st_ino == path.stat().st_ino
    assert os.listdir(tmp_path) == [path.name]


def test_memory_reaches_workers_that_are_not_forked(tmp_path):
    source = make("imagefolder", root=str(photos(tmp_path / "photos")), cache="ram").val
    expected = source.image(1).tobytes()
    with get_context("spawn").Pool(1) as pool:
        assert pool.apply(_kept, (source.cache, source.records)) == expected
    copied = pickle.loads(pickle.dumps(source.cache))
    assert copied.image(source.records, 1).tobytes() == expected


def _kept(cache, records):
    records.image = None  # nothing may be decoded
    return cache.image(records, 1).tobytes()


def test_what_cannot_be_kept(tmp_path):
    with pytest.raises(DataError, match=r"data.cache=ram is for decoded image files, and data=digits has none"):
        make(cache="ram")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot use .*set another data.cache_dir="):
        make("imagefolder", root=str(photos(tmp_path / "photos")), cache="disk", cache_dir=str(tmp_path / "file"))


@pytest.mark.parametrize("name", ["imagefolder", "webdataset"])
def test_a_user_without_a_home_folder(tmp_path, monkeypatch, capsys, name):
    """As in a container that is started with a number for a user: a folder called ~ would be made."""
    for variable in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)
    monkeypatch.setattr(folder, "RACY", -1_000_000_000)
    monkeypatch.chdir(tmp_path)
    root = str(photos(tmp_path / "photos") if name == "imagefolder" else tars(tmp_path / "photos", (3,)))
    for _ in range(2):
        assert make(name, root=root).val.records.labels.size in (9, 20)
        said = capsys.readouterr().err
        assert said.count("is not cached for the next run: this user has no home folder; set HOME, or XDG_CACHE_H") == 2
    with pytest.raises(DataError, match=r"data\.cache=disk has no folder: .*; or set data\.cache_dir="):
        make(name, root=root, cache="disk")
    with pytest.raises(DataError, match=r"data\.cache_dir=~/c: this user has no home folder that ~ could stand for"):
        make(name, root=root, cache="disk", cache_dir="~/c")
    make(name, root=root, cache="disk", cache_dir="c")
    assert {path.name for path in tmp_path.iterdir()} == {"c", "photos"}


def test_scaled_decoding_gives_way(tmp_path):
    """A sample must not depend on whether its image was kept."""
    root = str(photos(tmp_path / "photos"))
    assert make("imagefolder", root=root).train.late
    assert not make("imagefolder", root=root, cache="ram").train.late


@pytest.mark.parametrize("kind", ["ram", "disk"])
def test_the_orientation_is_kept(tmp_path, decoded, kind):
    root = photos(tmp_path / "photos", count=1)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 8
    Image.new("RGB", (40, 36)).save(root / "val" / "bee" / "0.jpg", exif=exif)
    source = make("imagefolder", root=str(root), cache=kind).val
    for _ in range(2):
        assert [orientation(source.image(index)) for index in range(3)] == [1, 8, 1]
    assert decoded == [0, 1, 2]


def test_rows(tmp_path):
    cache = Cache(3, 10_000, cache_path(str(tmp_path), "a", "set"))
    assert cache.path.parent == tmp_path and cache.path != cache_path(str(tmp_path), "another")
    assert torch.tensor(cache._row(2)[1:]).tolist() == [0, 0, 0, 0, 0]
