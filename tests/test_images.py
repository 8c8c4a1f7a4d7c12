"""Odd images and broken ones: what they become, what is said of them, and that nothing crashes or hangs."""

import io
import os
import re
import struct
import zlib

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image, ImageOps
from PIL.TiffImagePlugin import IFDRational
from sklearn.datasets import load_sample_image

from children import lines, note_overrides, train_here
from recipes.data import BadImage, DataError, batches, build
from recipes.data.images import Decoding, Jpeg, open_labels, open_late, open_rgb, orientation, orientation_of
from recipes.data.transforms import reduction
from source_cases import all_of, config, make, photos, same


def photo(width=160, height=120):
    """A real photograph."""
    return Image.fromarray(load_sample_image("china.jpg")).resize((width, height))


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def header(kind, width, height):
    """The smallest file that claims to be so large."""
    if kind == "PNG":
        chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        end = struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
        return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk)) + end
    data = bytearray(encoded(photo(), "JPEG"))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def rotated(image=None, kind="JPEG"):
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(photo() if image is None else image, kind, exif=exif, quality=95)


PALETTE = photo().convert("P", palette=Image.Palette.ADAPTIVE)
RGBA = photo().convert("RGBA")
RGBA.putalpha(Image.linear_gradient("L").resize(RGBA.size))
WIDE = (np.asarray(photo().convert("L")).astype(np.uint16) << 8) | 0x80
# as files; what it must look like; mean error allowed, of 255
OVER_WHITE = Image.composite(photo(), Image.new("RGB", (160, 120), "white"), RGBA.getchannel("A"))
WHITE = Image.new("RGB", (160, 120), "white")
LONG = Image.new("RGB", (30_000, 3), "red")
GOOD = {
    "CMYK JPEG": (encoded(photo().convert("CMYK"), "JPEG", quality=95), photo(), 4),
    "grey JPEG": (encoded(photo().convert("L"), "JPEG", quality=95), photo().convert("L"), 2),
    "progressive JPEG": (encoded(photo(), "JPEG", progressive=True, quality=95), photo(), 4),
    "16-bit PNG": (encoded(Image.fromarray(WIDE), "PNG"), photo().convert("L"), 0),
    "16-bit TIFF": (encoded(Image.fromarray(WIDE), "TIFF"), photo().convert("L"), 0),
    "palette PNG": (encoded(PALETTE, "PNG"), PALETTE, 0),
    "palette GIF": (encoded(PALETTE, "GIF"), PALETTE, 0),
    "transparent palette": (encoded(PALETTE, "PNG", transparency=bytes(256)), WHITE, 0),
    "alpha PNG": (encoded(RGBA, "PNG"), OVER_WHITE, 1),
    "alpha WebP": (encoded(RGBA, "WEBP", lossless=True, exact=True), OVER_WHITE, 1),
    "bilevel PNG": (encoded(photo().convert("1"), "PNG"), photo().convert("1"), 0),
    "EXIF-rotated": (rotated(), photo(), 4),
    "30,000 pixels wide": (encoded(LONG, "PNG"), LONG, 0),
}  # fmt: skip
BAD = {
    "truncated JPEG": encoded(photo(), "JPEG")[:1500],
    "truncated PNG": encoded(photo(), "PNG")[:1500],
    "truncated WebP": encoded(photo(), "WEBP")[:1500],
    "zero bytes": b"",
    "text": b"once upon a time there was an image",
    "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EOF\n",
    "30,000 x 30,000 PNG": header("PNG", 30_000, 30_000),
    "30,000 x 30,000 JPEG": header("JPEG", 30_000, 30_000),
}


def difference(one, other):
    return np.abs(np.asarray(one, np.float64) - np.asarray(other.convert("RGB"), np.float64)).mean()


@pytest.mark.parametrize("name", GOOD)
def test_odd_images(name, recwarn):
    data, expected, error = GOOD[name]
    image = open_rgb(io.BytesIO(data), name)
    assert image.mode == "RGB" and image.size == expected.size and difference(image, expected) <= error


@pytest.mark.parametrize("name", BAD)
def test_bad_images_are_refused_by_name(name):
    for read in (open_rgb, lambda *args: undecoded(open_late(*args))):
        with pytest.raises(BadImage, match=f"cannot read the image {name}: ") as caught:
            read(io.BytesIO(BAD[name]), name, Decoding())
        assert "BytesIO" not in str(caught.value)


def test_pipes_and_devices_are_not_opened(tmp_path):
    """Opening a pipe waits for someone who writes into it."""
    device, pipe = tmp_path / "device.png", tmp_path / "pipe.png"
    device.symlink_to(os.devnull)
    os.mkfifo(pipe)
    for path in (device, pipe):
        for read in (open_rgb, open_late, open_labels, lambda path, name, _: orientation_of(path, name)):
            with pytest.raises(BadImage, match=f"the image x: OSError: {path} is a pipe or a device: expected a file"):
                read(str(path), "x", Decoding())


def undecoded(image):
    return image.decode() if isinstance(image, Jpeg) else image


def test_a_large_header_costs_no_memory():
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for kind in ("PNG", "JPEG"):
        for size, said in (
            (30_000, "DecompressionBomb"),
            (10_000, "10000 x 10000 pixels are more than data.max_pixels"),
        ):
            with pytest.raises(BadImage, match=said) as error:
                open_rgb(io.BytesIO(header(kind, size, size)), "bomb")
    assert error.value.advice == "Set data.max_pixels=100000000 or more to read it, or data.on_bad_image=replace"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB; the pixels are 2.7 GB


def test_orientation():
    turned = Decoding(exif_orientation=True)
    image = open_rgb(io.BytesIO(rotated()), "rotated", turned)
    assert image.size == (120, 160) and difference(image, photo().transpose(Image.Transpose.ROTATE_270)) < 4
    assert isinstance(open_late(io.BytesIO(rotated()), "rotated", Decoding()), Jpeg)
    late = open_late(io.BytesIO(rotated()), "rotated", turned)
    assert isinstance(late, Image.Image) and difference(late, image) == 0
    upright = open_late(io.BytesIO(encoded(photo(), "JPEG")), "upright", turned)
    assert isinstance(upright, Jpeg) and difference(upright.decode(), ImageOps.exif_transpose(photo())) < 6


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_tags_of_orientation(kind):
    exif = Image.Exif()
    for said, expected in ((1, 1), (3, 3), (8, 8), (0, 1), (9, 1)):
        exif[0x0112] = said
        assert orientation_of(io.BytesIO(encoded(photo(8, 6), kind, exif=exif)), "x") == expected
    for broken in (b"Exif\x00\x00no such tags", exif.tobytes()[:15]):
        data = encoded(photo(8, 6), kind, exif=broken)
        assert orientation_of(io.BytesIO(data), "x") == 1
        upright = open_rgb(io.BytesIO(data), "x", Decoding(exif_orientation=True))
        assert difference(upright, open_rgb(io.BytesIO(data), "x")) == 0
    plain = photo(8, 6)
    plain.getexif()[0x0112] = IFDRational(6)
    assert type(orientation(plain)) is int and orientation(plain) == 6


@pytest.mark.parametrize("mode, kind", [("RGB", "JPEG"), ("L", "JPEG"), ("CMYK", "JPEG"), ("P", "PNG"), ("RGBA", "PNG"),
                         ("I;16", "PNG"), ("RGBA", "WEBP")])  # fmt: skip
def test_the_orientation_outlives_the_conversion(mode, kind):
    source = Image.fromarray(WIDE) if mode == "I;16" else RGBA if mode == "RGBA" else photo().convert(mode)
    for read in (open_rgb, open_late):
        found = [read(io.BytesIO(rotated(source, kind)), "x", Decoding(applied)) for applied in (False, True)]
        assert [image.size for image in found] == [(160, 120), (120, 160)]
        assert list(map(orientation, found)) == [6, 1]


def test_a_tiff_is_always_upright():
    """Pillow rotates it when it is decoded: there is nothing to say or to set."""
    data = rotated(kind="TIFF")
    for applied in (False, True):
        found = open_rgb(io.BytesIO(data), "x", Decoding(applied))
        assert found.size == (120, 160) and orientation(found) == 1
    assert orientation_of(io.BytesIO(data), "x") == 1


ROTATED = r"\S*/(train|val)/\w+/\d.jpg in the (training|validation) set of imagefolder has the EXIF orientation 6,"


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("changes", [{}, {"jpeg": "full"}, {"cache": "ram"}, {"cache": "disk"}], ids=str)
def test_the_first_rotated_image_is_named(tmp_path, capfd, monkeypatch, changes, workers):
    """Once for each split, whatever the number of workers and epochs."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for path in photos(tmp_path / "photos").rglob("*.jpg"):
        path.write_bytes(rotated(photo(40, 36)))

    def said(**more):
        data = make("imagefolder", root=str(tmp_path / "photos"), **changes, **more)
        for epoch in range(2):
            all_of(data.train, batch_size=2, epoch=epoch, workers=workers)
            all_of(data.val, batch_size=2, train=False, workers=workers)
        return capfd.readouterr().err

    for _ in range(2):  # the second time from the cache, if it is on disk
        err = said()
        assert [match[2] for match in re.finditer(ROTATED, err)] == ["training", "validation"]
        assert err.count("\n") == 2 and "is not applied: set data.exif_orientation=true" in err
    assert said(exif_orientation=True) == ""
    monkeypatch.setenv("RANK", "1")
    assert said() == ""


@pytest.mark.parametrize("size", [(30_000, 3), (3, 30_000), (30_000, 40)])
def test_long_images_are_measured_and_trained_on(tmp_path, size):
    root = photos(tmp_path / "photos", count=1)
    for split in ("train", "val"):
        Image.new("RGB", size, (10, 200, 30)).save(root / split / "ant" / "0.jpg", quality=95)
    data = make("imagefolder", root=str(root), img_size=64, mean=[0, 0, 0], std=[1, 1, 1])
    for source in (data.train, data.val):
        assert source.sample(0, 0)[0].shape == (3, 64, 64)
    colour = data.val.sample(0, 0)[0].mean((1, 2)) * 255
    assert (colour - torch.tensor([10.0, 200.0, 30.0])).abs().max() < 6


def broken(root, *, every=BAD):
    """A folder of photographs among which are all bad ones: class `bee` is bad, whatever the names say."""
    photos(root, count=4)
    for split in ("train", "val"):
        for number, name in enumerate(every):
            (root / split / "bee" / f"bad{number}.jpg").write_bytes(every[name])
    return str(root)


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_are_replaced(tmp_path, capfd, workers):
    data = make("imagefolder", root=broken(tmp_path / "photos"), on_bad_image="replace")
    found = all_of(data.val, train=False, batch_size=7, workers=workers)
    assert [len(labels) for _, labels in found] == [7, 7, 6]  # 12 good ones, 8 bad ones: no batch is shorter
    assert data.val.bad == len(BAD) and data.val.take_bad() == 8 and data.val.take_bad() == 0
    said = capfd.readouterr().err
    for number in range(len(BAD)):
        assert said.count(f"bad image in the validation set of imagefolder, replaced by {tmp_path}") == 8
        assert said.count(f"/bee/bad{number}.jpg: ") == 1
    all_of(data.val, train=False, batch_size=7, workers=workers)
    assert data.val.bad == 8 and not capfd.readouterr().err  # counted anew, named once
    again = make("imagefolder", root=str(tmp_path / "photos"), on_bad_image="replace")
    assert same(found, all_of(again.val, train=False, batch_size=7))  # by the same, with any number of workers


def test_a_replacement_is_a_sample_of_its_own(tmp_path):
    data = make("imagefolder", root=broken(tmp_path / "photos"), on_bad_image="replace")
    bad = next(index for index in range(len(data.train)) if "bad0" in data.train.where(index))
    image, label = data.train.sample(bad, 3)
    ((index, by, why),) = data.train.take_news()
    assert index == bad and label == data.train.label(by) and "bad0.jpg" in why and "bad" not in data.train.where(by)
    assert torch.equal(image, data.train.sample(bad, 3)[0])
    partners = {(data.train.sample(bad, epoch), data.train.take_news()[0].by)[1] for epoch in range(9)}
    assert len(partners) > 1  # other epochs, other images


def test_bad_images_are_counted_in_the_log(tmp_path, capfd):
    """Every training image once an epoch, every validation image once: as many replaced as there are bad ones."""
    root = broken(tmp_path / "photos")
    given = ["model=timm", "model.name=test_resnet", "data=imagefolder", f"data.root={root}", "data.img_size=32"]
    given += ["data.batch_size=4", "data.workers=1", "train.epochs=2", "train.log_every=1", "data.on_bad_image=replace"]
    train_here(tmp_path, *given, "name=run")
    written = lines(tmp_path / "run")
    assert sum(line.get("bad_images", 0) for line in written if "loss" in line) == 2 * len(BAD)
    assert [line["val_bad_images"] for line in written if "val_loss" in line] == [len(BAD)] * 2
    assert capfd.readouterr().err.count("bad image in the training set") == len(BAD)  # named once in two epochs


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_images_are_errors_unless_replaced(tmp_path, workers):
    data = make("imagefolder", root=broken(tmp_path / "photos"))
    with pytest.raises(BadImage, match=r"sample \d+ of the validation set .*bee/bad0.jpg: .*on_bad_image=replace"):
        all_of(data.val, train=False, workers=workers)
    os.unlink(data.val.where(0))
    with pytest.raises(DataError, match=r"ant/0\.jpg") as error:
        all_of(data.val, train=False, workers=workers)
    assert not isinstance(error.value, BadImage)  # data.on_bad_image=replace would not help


def test_a_run_that_ends_at_a_bad_image_goes_on_without_it(tmp_path):
    root = broken(tmp_path / "photos")
    given = ["model=timm", "model.name=test_resnet", "data=imagefolder", f"data.root={root}", "data.img_size=32"]
    given += ["data.batch_size=4", "data.workers=0", "train.epochs=1"]
    with pytest.raises(BadImage, match=r"resume with: .* resume=\S*/run data\.on_bad_image=replace$"):
        train_here(tmp_path, *given, "name=run")
    note_overrides(tmp_path / "run", [*given, "data.on_bad_image=replace"])
    train_here(tmp_path, f"resume={tmp_path / 'run'}")
    assert lines(tmp_path / "run")[-1]["val_bad_images"] == len(BAD)


def test_nothing_but_bad_images(tmp_path):
    root = broken(tmp_path / "photos")
    for path in (tmp_path / "photos").rglob("*.jpg"):
        path.write_bytes(b"")
    data = make("imagefolder", root=root, on_bad_image="replace")
    with pytest.raises(DataError, match=r"none of the 64 images drawn to replace it could be decoded"):
        all_of(data.val, train=False)


def test_what_is_gone_is_never_replaced(tmp_path):
    data = make("imagefolder", root=broken(tmp_path / "photos"), on_bad_image="replace")
    os.unlink(data.val.where(0))
    with pytest.raises(DataError, match=r"ant/0.jpg.*Is the folder still there\?"):
        all_of(data.val, train=False)


def mutated(rng, files):
    """A real file with bits flipped, cut short, or with a piece of another put in."""
    data = bytearray(files[rng.integers(len(files))])
    kind = rng.integers(3)
    if kind == 0:
        for place in rng.integers(0, len(data), rng.integers(1, 20)):
            data[place] ^= 1 << rng.integers(8)
    elif kind == 1:
        del data[rng.integers(0, len(data)) :]
    else:
        place, size = rng.integers(0, len(data)), rng.integers(1, 400)
        data[place : place + size] = rng.bytes(size)
    return bytes(data)


@pytest.mark.timeout(180)
def test_a_thousand_mutated_images(tmp_path, capfd):
    """JPEG (two kinds), PNG, WebP (two kinds): each is decoded or replaced, none crashes or hangs the workers."""
    rng = np.random.default_rng(0)
    image = photo(96, 72)
    files = [
        encoded(image, "JPEG"), encoded(image, "JPEG", progressive=True), encoded(image, "PNG"),
        encoded(image.convert("P"), "PNG"), encoded(image, "WEBP"), encoded(image, "WEBP", lossless=True),
    ]  # fmt: skip
    for split in ("train", "val"):
        (tmp_path / split / "good").mkdir(parents=True)
        (tmp_path / split / "mutated").mkdir()
        for number in range(100):
            (tmp_path / split / "good" / f"{number}.jpg").write_bytes(files[number % len(files)])
    for number in range(1000):
        (tmp_path / "train" / "mutated" / f"{number:03}.jpg").write_bytes(mutated(rng, files))
    (tmp_path / "val" / "mutated" / "0.jpg").write_bytes(files[0])
    data = make("imagefolder", root=str(tmp_path), on_bad_image="replace")
    came = sum(len(labels) for _, labels in all_of(data.train, batch_size=50, workers=2))
    assert came == 1100
    with capfd.disabled():
        print(f"\n1000 mutated images: {1000 - data.train.bad} decoded, {data.train.bad} replaced, 0 crashed")
    assert 200 < data.train.bad < 1000 and data.train.bad == len(data.train.named)
    assert same(all_of(data.train, batch_size=50), all_of(data.train, batch_size=50, workers=1))


@pytest.mark.parametrize("crop, size, factor", [((224, 224), (224, 224), 1), ((447, 900), (224, 224), 1),
                         ((448, 900), (224, 224), 2), ((900, 4000), (224, 224), 4), ((9000, 4000), (224, 128), 8),
                         ((10, 9000), (224, 224), 1)])  # fmt: skip
def test_reduction(crop, size, factor):
    assert reduction(crop, size) == factor


def large(root):
    """Photographs from which most crops can be decoded at an eighth of their size."""
    for split in ("train", "val"):
        for name in ("ant", "bee"):
            (root / split / name).mkdir(parents=True)
            for number in range(3):
                photo(1200 + 7 * number, 901 + number).save(root / split / name / f"{number}.jpg")
    return str(root)


def test_scaled_decoding(tmp_path):
    """The same crop as of the whole image, up to what a finer decoding changes; the evaluation's bits never change."""
    plain = OmegaConf.merge(config("imagefolder"), {"augment": {"auto_augment": None, "re_prob": 0.0}})
    root = large(tmp_path)
    scaled, full = (
        build(OmegaConf.merge(plain, {"data": {"root": root, "jpeg": jpeg}})) for jpeg in ("scaled", "full")
    )
    assert scaled.train.late and not full.train.late and not scaled.val.late
    errors = []
    for index in range(6):
        assert torch.equal(scaled.val.sample(index, 0)[0], full.val.sample(index, 0)[0])
        for epoch in range(8):
            one, other = (data.train.sample(index, epoch)[0] for data in (scaled, full))
            errors.append((one - other).abs().mean().item())
            assert torch.equal(one, scaled.train.sample(index, epoch)[0])
    spread = full.train.sample(0, 0)[0].std().item()
    assert 0 < np.mean(errors) < 0.1 * spread and max(errors) < 0.3 * spread


def test_crops_that_are_small_keep_every_bit(tmp_path):
    root = photos(tmp_path / "photos")  # 40 x 36 pixels, for crops of 32
    scaled, full = (make("imagefolder", root=str(root), jpeg=jpeg) for jpeg in ("scaled", "full"))
    for index in range(len(full.train)):
        assert torch.equal(scaled.train.sample(index, 1)[0], full.train.sample(index, 1)[0])


def test_a_truncated_jpeg_is_found_late_too(tmp_path):
    root = large(tmp_path)
    path = tmp_path / "train" / "ant" / "0.jpg"
    path.write_bytes(path.read_bytes()[:20_000])
    source = make("imagefolder", root=root, on_bad_image="replace").train
    source.sample(0, 0)
    assert source.late and source.take_news()[0].index == 0
    stream = batches(source, batch_size=6, seed=0, epoch=0, train=True, workers=1)
    assert next(stream)[0].shape[0] == 6 and source.bad == 1
