"""A person's own images: which are meant, what their pictures are called, and folders that cannot be written."""

import time
from pathlib import Path

import pytest
from PIL import Image

from recipes import predict
from recipes.eval_results import Results
from recipes.settings import RunError


@pytest.fixture
def folder(tmp_path):
    for name in ("a.jpg", "b.PNG", "deep/a.png", "notes.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    return tmp_path


def test_which_images_are_meant(folder):
    def named(pattern):
        return [str(Path(path).relative_to(folder)) for path in predict.matching(f"{folder}{pattern}")]

    assert named("") == named("/") == ["a.jpg", "b.PNG"]
    assert named("/**/*.png") == ["deep/a.png"] and named("/a.jpg") == ["a.jpg"]
    (folder / "._a.jpg").touch()
    assert named("") == named("/*") == ["a.jpg", "b.PNG"]
    assert named("/notes.txt") == named("/*.txt") == ["notes.txt"] and named("/._a.jpg") == ["._a.jpg"]
    with pytest.raises(RunError, match=r"predict=.*/n\* matches no image file$"):
        named("/n*")
    (folder / "folder.png").mkdir()
    assert named("") == named("/*") == ["a.jpg", "b.PNG"]
    (folder / "x[1].jpg").touch()
    assert named("/x[1].jpg") == ["x[1].jpg"]
    with pytest.raises(RunError, match=r"predict=.*/\*.gif matches no file$"):
        named("/*.gif")
    (folder / "empty").mkdir()
    with pytest.raises(RunError, match="matches no image file"):
        named("/empty")


def test_pictures_of_images_that_are_called_alike():
    paths = ["photos/a.jpg", "photos/a.png", "../more/a.jpg", "photos/b.jpg"]
    names = ["photos-a.jpg-found.png", "photos-a.png-found.png", "more-a.jpg-found.png", "b-found.png"]
    assert predict.names(paths) == names
    paths = ["x/y/a.png", "x-y/a.png", "../x/y/a.png", "z/x-y-a.png-2.jpg"]
    names = ["x-y-a.png-found.png", "x-y-a.png-2-found.png", "x-y-a.png-3-found.png", "x-y-a.png-2-2-found.png"]
    assert predict.names(paths) == names


def test_pictures_of_many_images_are_named_at_once():
    begun = time.process_time()
    assert len(set(predict.names([f"photos/{number}.jpg" for number in range(30_000)]))) == 30_000
    assert time.process_time() - begun < 3  # comparing each name with all others takes more than ten seconds


def test_pictures_of_earlier_predictions(folder, capsys):
    """Which lie beside the images with out=FOLDER; another image whose name ends in the same way is one of them."""
    for path in ("a-found.png", "b-found.png", "lost-and-found.png"):
        (folder / path).touch()
    found = predict.matching(str(folder))
    assert [Path(path).name for path in found] == ["a.jpg", "b.PNG", "lost-and-found.png"]
    assert "2 pictures of earlier predictions (*-found.png) are left out" in capsys.readouterr().out
    assert predict.matching(str(folder / "a-found.png")) == [str(folder / "a-found.png")]


def test_folders_that_cannot_be_written(tmp_path):
    Results(tmp_path / "to" / "be" / "made").check_writable()
    assert not (tmp_path / "to").exists()
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "within"):
        with pytest.raises(RunError, match=r"cannot be written to .*file.*: give out="):
            Results(folder).check_writable()
        with pytest.raises(RunError, match=r"could not write .*a-found\.png: .*give out="):
            predict.write(Image.new("RGB", (3, 3)), folder / "a-found.png")
