"""python -m recipes.data ... --check: every image that cannot be used is listed, whatever the data set."""

import sys

import pytest
from PIL import ExifTags, Image

import recipes.data.__main__ as command
from dense_cases import mask, picture
from recipes.data import check
from recipes.data.source import Source
from shard_cases import members, write_tar
from source_cases import all_of, make, photos

pytestmark = pytest.mark.usefixtures("own_caches")


@pytest.fixture
def run(monkeypatch, capsys):
    """The exit status and the lines that a check prints, without the first, which has the sizes."""

    def run(*overrides):
        monkeypatch.setattr(sys, "argv", ["recipes.data", *overrides, "--check"])
        with pytest.raises(SystemExit) as ended:
            command.main()
        printed = capsys.readouterr()
        assert printed.err == ""
        return ended.value.code, printed.out.splitlines()[1:]

    return run


@pytest.fixture
def folder(tmp_path):
    return photos(tmp_path / "photos")


def of(folder, *more):
    return "data=imagefolder", f"data.root={folder}", "data.img_size=32", *more


@pytest.mark.parametrize("more", [["data.workers=0"], ["data.workers=2"], ["data.on_bad_image=replace"],
                         ["data.cache=disk"]], ids=str)  # fmt: skip
def test_every_bad_image_is_listed(folder, run, more):
    bad = [folder / "train" / "ant" / "1.jpg", folder / "train" / "cat" / "2.jpg", folder / "val" / "bee" / "0.jpg"]
    for path in bad:
        path.write_bytes(path.read_bytes()[:300])
    (folder / "val" / "bee" / "link.jpg").symlink_to("gone.jpg")
    status, lines = run(*of(folder, *more))
    assert status == 1 and len(lines) == 5
    for line, path in zip(lines, [*bad, folder / "val" / "bee" / "link.jpg"], strict=False):
        assert line.startswith(f"cannot read the image {path}: ")
    assert lines[-1] == "19 of 19 images read: 4 cannot be used, 0 have an EXIF orientation that is not applied"


def test_what_is_whole_and_what_is_rotated(folder, run):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 3
    for name in ("ant/2.jpg", "cat/0.jpg"):
        Image.new("RGB", (40, 36)).save(folder / "val" / name, exif=exif)
    status, lines = run(*of(folder))
    first = f"the first is {folder}/val/ant/2.jpg (3): set data.exif_orientation=true"
    assert status == 0 and lines[0].startswith(
        "2 of 9 images in the validation set of imagefolder have an EXIF orientation that is not applied, " + first
    )
    assert lines[1:] == ["18 of 18 images read: 0 cannot be used, 2 have an EXIF orientation that is not applied"]
    status, lines = run(*of(folder, "data.exif_orientation=true"))
    assert lines == ["18 of 18 images read: 0 cannot be used, 0 have an EXIF orientation that is not applied"]


def test_names_that_a_terminal_would_act_on(folder, run, capsys):
    """Wherever they are printed: in a check, of a rotated image, and beside a replacement."""
    bad, turned = (folder / "train" / "ant" / f"0\x1b[{letter}.jpg" for letter in "KJ")
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 3
    Image.new("RGB", (40, 36)).save(turned, exif=exif)
    bad.write_bytes(b"no image")
    _, lines = run(*of(folder))
    assert "\x1b" not in "".join(lines) and r"0\x1b[K.jpg: UnidentifiedImageError" in lines[0]
    assert r"0\x1b[J.jpg (3)" in lines[1]
    data = make("imagefolder", root=str(folder), on_bad_image="replace")
    all_of(data.train, batch_size=11, train=False)
    said = capsys.readouterr().err
    assert "\x1b" not in said and r"0\x1b[J.jpg in the training" in said and r"0\x1b[K.jpg: Unident" in said


def test_labels_are_read_too(tmp_path, run):
    for split in ("train", "val"):
        for name in "abc":
            picture(tmp_path / "images" / split / f"{name}.jpg")
            mask(tmp_path / "masks" / split / f"{name}.png", (0, 2))
    mask(tmp_path / "masks" / "train" / "b.png", (0, 2), size=(30, 21))
    mask(tmp_path / "masks" / "val" / "a.png", (0, 7))
    given = ["task=segment", "data=masks", f"data.root={tmp_path}", "data.num_classes=3", "data.img_size=32"]
    status, (fit, label, counts) = run(*given, "data.workers=1")
    assert status == 1 and counts.startswith("6 of 6 images read: 2 cannot be used")
    assert "train/b.jpg has 30 x 20 pixels but its mask 30 x 21" in fit
    assert "val/a.jpg has label 7 at row 0, column 15: expected 0 ... 2" in label


@pytest.mark.parametrize("workers", [0, 2])
def test_samples_of_archives(tmp_path, run, workers):
    for split in ("train", "validation"):
        samples = {str(number): members(number) for number in range(40)}
        for number in (3, 17, 39):
            samples[str(number)]["png"] = b"no image"
        write_tar(tmp_path / f"{split}-0.tar", samples)
    status, lines = run("data=webdataset", f"data.root={tmp_path}", f"data.workers={workers}")
    assert status == 1 and lines[-1].startswith("80 of 80 images read: 6 cannot be used")
    assert [line.split("(")[1].split(")")[0] for line in lines[:-1]] == ["3.png", "17.png", "39.png"] * 2


def test_an_interrupted_check_says_how_far_it_came(folder, run, monkeypatch):
    monkeypatch.setattr(check, "BATCH", 1)
    plain = Source.image

    def image(source, index):
        if index == 4:
            raise KeyboardInterrupt
        return plain(source, index)

    monkeypatch.setattr(Source, "image", image)
    status, lines = run(*of(folder))
    assert status == 130 and lines == [
        "4 of 18 images read: 0 cannot be used, 0 have an EXIF orientation that is not applied"
    ]
