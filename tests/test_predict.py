"""A person's own images: which are meant, what their pictures are called, folders that cannot be written, and released
classifiers, which name what they see without their data.
"""

import re
import time
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config

import zoo
from children import closed, evaluate_here
from recipes import config, predict, predict_weights
from recipes import eval as evaluation
from recipes.config import ConfigError
from recipes.console import CONSOLE
from recipes.data import arrow, imagenet
from recipes.data.build import preprocessing
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


CLOSED = [(pattern, mode) for pattern in ("", "/*.jpg", "/deep/**/*.png", "/a.jpg") for mode in (0, 0o644)]
CLOSED.remove(("/*.jpg", 0o644))  # names may be listed then, and what they are of not looked at


@pytest.mark.parametrize(("pattern", "mode"), CLOSED)
def test_folders_that_may_not_be_read(folder, pattern, mode):
    said = rf"^predict={re.escape(f'{folder}{pattern}')} is not readable by this user \(Permission denied\)$"
    with closed(folder, mode), pytest.raises(RunError, match=said):
        predict.matching(f"{folder}{pattern}")


def test_a_folder_that_may_be_listed_only(folder):
    """Reading the image says that it may not be read."""
    with closed(folder, 0o644):
        assert predict.matching(f"{folder}/*.jpg") == [f"{folder}/a.jpg"]


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


def test_pictures_need_no_reader_of_what_is_printed(monkeypatch):
    """Where a folder is named for them, `| head -1` does not end the command that draws them."""
    seen = []
    monkeypatch.setattr(CONSOLE, "optional", False)
    monkeypatch.setattr(evaluation, "of_run", lambda cfg, run: seen.append(CONSOLE.optional))
    for given in (["predict=a.jpg"], ["predict=a.jpg", "out=found"], []):
        evaluate_here("run=first", *given)
    assert seen == [False, True, True]


def test_pictures_of_earlier_predictions(folder, capsys):
    """Which lie beside the images with out=FOLDER; another image whose name ends in the same way is one of them."""
    for path in ("a-found.png", "b-found.png", "lost-and-found.png"):
        (folder / path).touch()
    found = predict.matching(str(folder))
    assert [Path(path).name for path in found] == ["a.jpg", "b.PNG", "lost-and-found.png"]
    assert "2 pictures of earlier predictions (*-found.png) are left out" in capsys.readouterr().out
    assert predict.matching(str(folder / "a-found.png")) == [str(folder / "a-found.png")]


def test_names_that_are_too_long_for_a_file(tmp_path):
    name = 300 * "x"
    with pytest.raises(RunError, match=f"predict={name} matches no file"):
        predict.matching(name)
    Results(tmp_path / name).check_writable()  # its folder is; what cannot be made is said when it is written
    with pytest.raises(RunError, match="File name too long"):
        Results(tmp_path / name).write_list([])


def test_folders_that_cannot_be_written(tmp_path):
    Results(tmp_path / "to" / "be" / "made").check_writable()
    assert not (tmp_path / "to").exists()
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "within"):
        with pytest.raises(RunError, match=r"cannot be written to .*file.*: give out="):
            Results(folder).check_writable()
        with pytest.raises(RunError, match=r"could not write .*a-found\.png: .*give out="):
            predict.write(Image.new("RGB", (3, 3)), folder / "a-found.png")


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    Image.effect_noise((70, 50), 90).convert("RGB").save(path)
    return path


def classifier(folder, classes):
    """timm's smallest, as a file, and the options that name it."""
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=classes)
    torch.save(model.state_dict(), folder / "own.pth")
    return model.eval(), ["model=timm", "model.name=test_resnet", f"checkpoint={folder / 'own.pth'}"]


def likeliest(model, photo):
    """By timm alone, with the model's own preprocessing."""
    transform = create_transform(**resolve_data_config({}, model=model))
    with torch.no_grad():
        shares = model(transform(Image.open(photo))[None]).softmax(-1)[0]
    return [(index, f"{100 * shares[index]:.2f} %") for index in shares.topk(5).indices.tolist()]


@pytest.mark.parametrize("data", [[], ["data=imagenet"]], ids=["no data", "imagenet"])
def test_a_classifier_needs_no_data(data, photo, tmp_path, monkeypatch, capsys):
    """Neither a folder nor the hub; images are prepared as for the model, not as the default data is."""
    monkeypatch.setattr(arrow, "load", lambda *_: pytest.fail("the hub was asked"))
    model, given = classifier(tmp_path, 1000)
    evaluate_here(*given, *data, f"predict={photo}")
    said = capsys.readouterr().out
    for index, share in likeliest(model, photo):
        assert any(imagenet.class_names()[index] in line and share in line for line in said.splitlines())


def test_classes_are_as_many_as_the_classifier_has(photo, tmp_path, capsys):
    model, given = classifier(tmp_path, 7)
    evaluate_here(*given, f"predict={photo}")
    said = capsys.readouterr().out
    assert "nothing names the 7 classes: they are numbered" in said
    for index, share in likeliest(model, photo):
        assert any(line.split()[1:4:2] == [str(index), share.split()[0]] for line in said.splitlines())
    with pytest.raises(ConfigError, match=r"data=imagenet_a is a subset of ImageNet-1k's thousand classes, .* has 7"):
        evaluate_here(*given, "data=imagenet_a", f"predict={photo}")


def test_names_beside_a_shared_classifier(photo, tmp_path, capsys):
    model = timm.create_model("test_resnet", num_classes=3)
    names = ["a cat", "dog [/small]", "\x1b[2Jbird"]  # of which a terminal, or rich, would take a part for its own
    folder = zoo.save_for_hf(model, tmp_path / "shared", model_config={"label_names": names})
    evaluate_here(f"checkpoint={folder}", f"predict={photo}")
    said = capsys.readouterr().out
    headless = zoo.save_for_hf(timm.create_model("test_resnet", num_classes=0), tmp_path / "headless")
    with pytest.raises(ConfigError, match=r"headless does not show how many classes it has: .*give model.num_classes="):
        evaluate_here(f"checkpoint={headless}", f"predict={photo}")
    assert all(f"│ {name} " in said for name in ("a cat", "dog [/small]", r"\x1b[2Jbird"))


def test_data_that_is_named_is_read(tmp_path, monkeypatch):
    """With data.root= or if it needs no files; what a task defaults to is not named."""
    _, given = classifier(tmp_path, 10)

    def asked(*typed):
        monkeypatch.setattr(config, "overrides", lambda: [*given, *typed])
        cfg = predict_weights.configuration(config.compose([*given, *typed], "eval"), str(tmp_path / "own.pth"))
        return predict_weights.is_read(cfg), preprocessing(cfg)

    assert [asked(*typed)[0] for typed in ((), ("data=digits",), ("data=imagenet",))] == [False, True, False]
    assert asked("data=imagenet", "data.root=there")[0] and asked("data=cifar10")[0]
    own = timm.get_pretrained_cfg("test_resnet")
    assert (asked()[1].mean, asked()[1].size) == (own.mean, own.input_size[1:])
    monkeypatch.setattr(config, "overrides", list)
    random = config.compose(given[:2], "eval")
    assert predict_weights.configuration(random, None) == random and predict_weights.is_read(random)
    assert (asked("data=digits")[1].mean, asked("data=digits")[1].size) == ((0.5,) * 3, (64, 64))
    assert asked("data.mean=[0.1,0.1,0.1]", "img_size=48")[1].mean == (0.1,) * 3
    assert asked("data.mean=[0.1,0.1,0.1]", "img_size=48")[1].size == (48, 48)
