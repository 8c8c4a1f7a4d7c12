"""Segmentation and detection through the loop, the evaluation and the questions of a person with images."""

import json
import os
import re
import shutil
import sys
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace

import pytest
import timm
import torch
from PIL import Image
from torch._export.serde.serialize import SerializeError

import zoo
from builds import FAMILIES, smallest
from children import evaluate_here, lines, lost_after, note_overrides, train_here
from dense_cases import TASKS, TINY
from ranks import on_ranks
from recipes import card, config, console, data_record, export
from recipes.checkpoint import Store
from recipes.config import ConfigError
from recipes.data import DataError
from recipes.eval import config_of, load
from recipes.settings import RunError
from recipes.task import create
from recipes.tasks import detect, segment
from recipes.weights import find_checkpoint, find_weights

SCORE = {"segment": "miou", "detect": "box_ap", "masks": "box_ap", "cascade": "box_ap"}
SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("masks", "cascade")]


@pytest.fixture(scope="module", params=["segment", "detect", *SLOW])
def run(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("out")
    train_here(folder, *TASKS[request.param], *TINY, f"name={request.param}")
    note_overrides(folder / request.param, [*TASKS[request.param], *TINY])
    return folder / request.param


def test_the_loop_trains_and_measures(run):
    losses = [line["loss"] for line in lines(run) if "loss" in line]
    assert len(losses) == 4 and losses[-1] < losses[0]
    score = f"val_{SCORE[run.name]}"
    measured = [line for line in lines(run) if score in line]
    assert [line["step"] for line in measured] == [2, 4] and ("val_loss" in measured[0]) == (run.name == "segment")
    kind = "iou" if run.name == "segment" else "box_ap"
    assert [key for key in measured[0] if key.startswith(f"val_{kind}/")][:2] == [f"val_{kind}/0", f"val_{kind}/1"]
    with Image.open(run / "validation.png") as picture:
        assert picture.width > 1000 and len(picture.getcolors(1 << 24)) > 1000


def test_a_detector_that_cannot_be_measured_is_not_trained(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    with pytest.raises(ConfigError, match="task=detect needs the package pycocotools: pip install pycocotools"):
        train_here(tmp_path, *TASKS["detect"], *TINY, "name=run")
    assert not list(tmp_path.iterdir())


def test_trackers_get_the_picture(run):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    read = events.EventAccumulator(str(run / "tensorboard")).Reload()
    assert [event.step for event in read.Images("validation/picture")] == [2, 4]


def best_of(run):
    cfg = config_of(run, [])
    return load(create(cfg), data_record.described(run, cfg), find_weights(run)).eval()


def test_the_card_loads_the_model(run, monkeypatch):
    text = (run / "README.md").read_text()
    assert "image-segmentation" in text or "object-detection" in text
    said: dict = {}
    monkeypatch.chdir(run)
    exec(re.search(r"```python\n(.*?)```", text, re.S)[1], said)
    best = find_checkpoint(run)
    weights = best.tensors(best.state["weights"])
    assert all(torch.equal(tensor, weights[name]) for name, tensor in said["model"].state_dict().items())
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():  # as in an evaluation, where no statistics of these images matter
        want, found = (
            model(images if run.name == "segment" else list(images)) for model in (best_of(run), said["model"])
        )
    torch.testing.assert_close(found, want)
    assert "The metrics are of images at their own size.\n" in text
    names = [*map(str, range(10)), *(["background"] if run.name == "segment" else [])]
    assert f"Classes, from 0: {', '.join(f'`{name}`' for name in names)}.\n" in text


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ([], "images at their own size."),
        (
            ["data=ade20k"],
            "resized so that the short side is 512 pixels but the long side is at most 2048 pixels (bilinear, with "
            "antialiasing).",
        ),
        (
            ["data=coco", "data.antialias=false", "data.long_side=null"],
            "is 800 pixels (bilinear, without antialiasing).",
        ),
        (
            ["data.long_side=100", "data.side_multiple=32", "task.flip=true", "task.scales=[0.5,1.0]"],
            "resized so that the long side is 100 pixels and enlarged to sides that are multiples of 32 (bilinear, "
            "with antialiasing), with `task.scales=[0.5,1.0]` `task.flip=true`.",
        ),
    ],
)
def test_the_card_says_how_images_were_resized(typed, said):
    prepared = create(config.compose(["model=nat_m", "task=segment", *typed])).preparation()
    assert card._measured(prepared).endswith(said)


def test_the_card_names_few_classes():
    few, many = (SimpleNamespace(num_classes=n, class_names=[f"thing {i}" for i in range(n)]) for n in (2, 150))
    assert card._classes(few) == "Classes, from 0: `thing 0`, `thing 1`."
    assert card._classes(many) == "Its 150 classes are in `data.json`, in the model's order."


def test_a_run_is_exported(run, tmp_path, capsys, monkeypatch):
    out = tmp_path / "model.pt2"
    if run.name != "segment":
        assert export.main([str(run), str(out)]) == 2
        assert f"{run} is a run of task=detect: detectors" in capsys.readouterr().err
        return
    assert export.main([str(run), str(out), "--dynamic"]) == 0
    assert "for any number of images x 3 x 64 x 64" in capsys.readouterr().out
    cfg, images = config_of(run, []), torch.randn(3, 3, 64, 64)
    task = create(cfg)
    model = load(task, data_record.described(run, cfg), find_weights(run)).eval()
    with torch.no_grad():
        torch.testing.assert_close(torch.export.load(out).module()(images), model(images))
    assert export.main([str(tmp_path), str(out)]) == 2
    assert "holds no run" in capsys.readouterr().err

    def unsaved(*args, **kwargs):
        raise SerializeError("Failed serializing node ceil\n Original exception Traceback")

    monkeypatch.setattr(export.export, "export", unsaved)
    assert export.main([str(run), str(out), "--any-size", "--force"]) == 2
    said = "torch.export cannot save test_resnet: Failed serializing node ceil; leave out --any-size and give"
    assert capsys.readouterr().err.strip() == f"{said} --size H W"
    monkeypatch.setattr(export.export, "LEAST_OF_ANY", 65)
    assert export.main([str(run), str(out), "--any-size"]) == 2
    assert (
        "has images of 64 x 64 pixels, and --any-size needs 65 or more a side: give --size" in capsys.readouterr().err
    )


def test_a_run_that_was_stopped_ends_with_the_same_bits(run, tmp_path):
    again = lost_after(2, run, tmp_path / "run")
    train_here(tmp_path, f"resume={again}")
    file = Path("checkpoints", "step-00000004", "model.safetensors")
    assert (run / file).read_bytes() == (again / file).read_bytes()
    assert numbers(run) == numbers(again)


def test_a_backbone_starts_from_that_of_another_run(run, tmp_path):
    """Before any step it is what that run ended with, whatever its task was."""
    best = find_checkpoint(run)
    weights = best.tensors(best.state["weights"])
    for given in (run, best.place(best.state["weights"])):
        task = segment.Task(config.compose([*TASKS["segment"], *TINY, f"model.backbone={given}"]))
        found = task.build_model(task.build_data()).backbone.state_dict()
        shared = [name for name in found if f"backbone.{name}" in weights]
        assert len(shared) > 50 and all(torch.equal(found[name], weights[f"backbone.{name}"]) for name in shared)
    with pytest.raises(ConfigError, match=r"model\.backbone: .* is from another model: \d+ tensors"):
        train_here(tmp_path, *TASKS["segment"], *TINY, "model.name=resnet18", f"model.backbone={run}")
    with pytest.raises(ConfigError, match="is for segmentation and detection"):
        train_here(tmp_path, "data=digits", *TINY[:3], "train.steps=4", f"model.backbone={run}")


def test_what_a_dense_model_starts_from_as_a_whole_is_of_its_task_and_head(run, tmp_path):
    mine, other = ("segment", "detect") if run.name == "segment" else ("detect", "segment")
    with pytest.raises(
        ConfigError, match=f"has task={mine}, and this is task={other}: give model.backbone={run} to start"
    ):
        train_here(tmp_path, *TASKS[other], *TINY, f"model.checkpoint={run}")
    with pytest.raises(
        zoo.CheckpointError, match=r"\nThe run has .*task\.channels=\w+: give the same, or model\.backbone="
    ):
        train_here(tmp_path, *TASKS[run.name], *TINY, "task.channels=64", f"model.checkpoint={run}")


def test_a_dense_model_starts_from_a_file_of_a_classifier(tmp_path):
    small = ["model=nat_m", "model.dims=[32,32,32,32]", "model.depths=[1,1,1,1]"]
    classifier = timm.create_model("nat_m", dims=(32, 32, 32, 32), depths=(1, 1, 1, 1), num_classes=7)
    file = tmp_path / "classifier.pth"
    torch.save({"state_dict": classifier.state_dict()}, file)
    typed = [*TASKS["segment"], *TINY[2:], "task.channels=16", *small]
    task = segment.Task(config.compose([*typed, f"model.backbone={file}"]))
    model = task.build_model(task.build_data())
    assert torch.equal(model.backbone.model.stem.conv1.weight, classifier.stem.conv1.weight)
    assert torch.equal(
        model.backbone.model.stages[3].blocks[0].attn.fn.qkv.weight, classifier.stages[3].blocks[0].attn.fn.qkv.weight
    )
    task = segment.Task(config.compose([*typed, f"model.checkpoint={file}"]))
    said = re.escape(f"\nGive model.backbone={file} to start the backbone from a classifier or from another dense")
    with pytest.raises(zoo.CheckpointError, match=said):
        task.build_model(task.build_data())
    file.write_bytes(b"<html>")
    with pytest.raises(zoo.CheckpointError) as refused:
        task.build_model(task.build_data())
    assert str(refused.value) == f"{file} is too short to be a checkpoint"


def numbers(run: Path) -> list[dict]:
    keys = ("step", "loss", "val_miou", "val_box_ap")
    return [{key: line[key] for key in keys if key in line} for line in lines(run)]


def test_an_evaluation_finds_the_number_of_the_training(run, tmp_path):
    evaluate_here(f"run={run}", f"out={tmp_path}")
    found = json.loads((tmp_path / "eval.json").read_text())
    best, _ = Store(run / "checkpoints").newest("best")
    for key, value in best.state["metrics"].items():
        if key != "images_per_s":
            assert found[key] == pytest.approx(value, rel=1e-6), key
    assert found["images"] == 7
    classes = (tmp_path / "eval-classes.csv").read_text().splitlines()
    assert len(classes) == 1 + (11 if run.name == "segment" else 10) and classes[1].startswith("0,")
    prep = found["preprocessing"]  # what was done to the images, not what is done to others that are classified
    assert (prep["short_side"], prep["long_side"], prep["interpolation"]) == (None, None, "bilinear")
    assert "crop_pct" not in prep and (run.name != "segment" or (prep["scales"], prep["flip"]) == ([1.0], False))
    with Image.open(tmp_path / "eval.png") as picture:
        assert picture.width > 1000


def test_two_processes_measure_what_one_does(run, tmp_path):
    """Seven images in batches of two: one process has an image more, and a batch more, than the other."""
    evaluate_here(f"run={run}", f"out={tmp_path / 'one'}", "save_predictions=true")
    saved = on_ranks(2, evaluate_here, f"run={run}", f"out={tmp_path / 'two'}", "save_predictions=true")
    assert saved == [None, None]
    check_same_answers(tmp_path / "one", tmp_path / "two")
    one, two = (json.loads((tmp_path / name / "eval.json").read_text()) for name in ("one", "two"))
    keys = [key for key in one if key.startswith(("miou", "macc", "aacc", "iou/", "box_", "mask_"))]
    assert len(keys) > 4 and [one[key] for key in keys] == [two[key] for key in keys]
    assert one.get("loss", 0) == pytest.approx(two.get("loss", 0), rel=1e-5)


def check_same_answers(one, two):
    """The same label maps, or the same objects but for last digits: batches had other sizes."""
    maps, others = ({path.name: path.read_bytes() for path in folder.glob("*-labels/*")} for folder in (one, two))
    assert maps == others and len(maps) in (0, 7)
    if not maps:
        objects, same = (json.loads((folder / "eval-objects.json").read_text()) for folder in (one, two))
        assert len(objects) == len(same) > 0
        for first, second in zip(objects, same, strict=True):
            assert first["bbox"] == pytest.approx(second["bbox"], abs=2e-3)
            assert first["score"] == pytest.approx(second["score"], rel=1e-5)
            assert [first[key] for key in ("image_id", "category_id")] == [second["image_id"], second["category_id"]]


def test_tasks_are_told_how_large_images_were(run, tmp_path, monkeypatch):
    sizes, kind = [], {"segment": segment, "detect": detect}[run.name].Task
    predict = kind.predict_with

    def told(self, model, images, targets):
        sizes.extend(tuple(target["size"]) for target in targets)
        return predict(self, model, images, targets)

    monkeypatch.setattr(kind, "predict_with", told)
    Image.new("RGB", (90, 50), "teal").save(tmp_path / "a.png")
    evaluate_here(f"run={run}", f"predict={tmp_path / 'a.png'}", f"out={tmp_path}")
    assert sizes == [(50, 90)]
    evaluate_here(f"run={run}", f"out={tmp_path}")
    assert sizes[1:] == [(64, 64)] * 7


def test_predict_draws_though_nobody_reads_what_it_prints(run, tmp_path, monkeypatch, capfd):
    for name in "ab":
        Image.new("RGB", (90, 50), "teal").save(tmp_path / f"{name}.png")
    with open("/dev/full", "w") as full:
        output = console.Output(file=full)
        monkeypatch.setattr(console, "CONSOLE", output)
        monkeypatch.setattr("recipes.eval.CONSOLE", output)
        evaluate_here(f"run={run}", f"predict={tmp_path}/*.png", f"out={tmp_path / 'found'}")
    assert sorted(os.listdir(tmp_path / "found")) == ["a-found.png", "b-found.png"]
    assert capfd.readouterr().err.count("nothing more is printed") == 1


def test_predict_draws_into_a_persons_images(run, tmp_path, capsys):
    for name, size in (("a", (90, 50)), ("b c", (33, 70))):
        Image.new("RGB", size, "teal").save(tmp_path / f"{name}.png")
    evaluate_here(f"run={run}", config.quote("predict", f"{tmp_path}/*.png"), f"out={tmp_path / 'found'}")
    assert sorted(os.listdir(tmp_path / "found")) == ["a-found.png", "b c-found.png"]
    said = capsys.readouterr().out
    assert "a.png" in said and ("pixels" in said if run.name == "segment" else "score" in said)
    if run.name == "detect":  # hardly trained
        assert "nothing scores 50 % or more" in " ".join(said.split())
    if run.name == "segment":
        assert Image.open(tmp_path / "found" / "a-found.png").size == (90, 50)
    with pytest.raises(RunError, match="matches no file"):
        evaluate_here(f"run={run}", f"predict={tmp_path}/*.bmp")


def test_what_stops_no_other_image_and_what_stops_all(run, tmp_path, capsys):
    Image.new("RGB", (40, 30), "teal").save(tmp_path / "z.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(RunError, match=r"1 of 2 images could not be read, see above: .*broken.png"):
        evaluate_here(f"run={run}", f"predict={tmp_path}", f"out={tmp_path / 'found'}")
    assert os.listdir(tmp_path / "found") == ["z-found.png"] and "cannot read the image" in capsys.readouterr().out
    with pytest.raises(DataError, match=r"cannot read the image .*broken.png"):
        evaluate_here(f"run={run}", f"predict={tmp_path / 'broken.png'}")
    for given in (f"predict={tmp_path / 'z.png'}", "data.val_count=1"):
        with pytest.raises(RunError, match=r"broken.png.*: give out=|could not write.*broken.png"):
            evaluate_here(f"run={run}", given, f"out={tmp_path / 'broken.png'}")


def test_an_answer_needs_a_run_with_a_checkpoint(run, tmp_path):
    with pytest.raises(RunError, match="holds no run"):
        evaluate_here(f"run={tmp_path / 'none'}", "predict=a.png")
    shutil.copy(run / "config.yaml", tmp_path)
    with pytest.raises(RunError, match="has no intact checkpoint yet"):
        evaluate_here(f"run={tmp_path}", "predict=a.png")


def test_two_processes_give_one_answer(run, tmp_path):
    Image.new("RGB", (40, 30), "teal").save(tmp_path / "z.png")
    given = (f"run={run}", f"predict={tmp_path / 'z.png'}", f"out={tmp_path / 'found'}")
    assert on_ranks(2, evaluate_here, *given) == [None, None]
    assert os.listdir(tmp_path / "found") == ["z-found.png"]


@pytest.mark.parametrize(
    ("task", "override", "said"),
    [
        ("segment", "task.head=upper", "head is 'upper'; it must be one of upernet, semantic_fpn, fcn"),
        ("segment", "data=digits", "data=digits has one label per image"),
        ("segment", "data.train_count=3", "fewer than one batch of 4"),
        ("detect", "data=ade20k", "data=ade20k needs data.root="),
        ("segment", "model.num_classes=20", "the data has 11 classes, and the model is evaluated on these"),
        ("segment", "task.scales=[]", "task.scales=[]: expected scales of the image above 0"),
        (
            "segment",
            "task.inference=slide task.stride=[200,200]",
            "expected two numbers from 1 to the window's [64, 64]",
        ),
        ("segment", "task.head=upernet data.batch_size=1", "task.head=upernet cannot train on one image at a time"),
        ("segment", "task.head=upernet train.accumulate=4", "task.head=upernet cannot train on one image at a time"),
        (
            "segment",
            "task.head=upernet data.batch_size=1 data.img_size=32",
            "or task.head=semantic_fpn with data.img_size=64 or more",
        ),
        (
            "segment",
            "task.head=semantic_fpn data.batch_size=1 data.img_size=32",
            "task.head=semantic_fpn cannot train on one image at a time of this size, as it has a batch norm on",
        ),
        ("segment", "task.left_out_weight=0", "task.left_out_weight=0: expected a number above 0"),
        ("segment", "data.left_out=[0,1,2,3,4,5,6,7,8,9,background]", "names every class of data=scenes: there is"),
        (
            "segment",
            "model.name=vit_tiny_patch16_224 +model.depth=4 data.short_side=48",
            "(Input height (48) doesn't match model (64).): give +model.dynamic_img_size=true, "
            "or, for images of at least this size, task.inference=slide",
        ),
        (
            "detect",
            "task.head=fcos model.name=swin_tiny_patch4_window7_224 data.short_side=96",
            "such as scene 0 of 7 (Input height (96) doesn't match model (64).): give +model.strict_img_size=false",
        ),
        ("detect", "train.eval_mode=true", "a detector only gives losses in training mode"),
    ],
)
def test_what_cannot_begin(tmp_path, task, override, said):
    with pytest.raises((ConfigError, DataError)) as error:
        # of other data than scenes there is no count to give
        tiny = [text for text in TINY if not override.startswith("data=") or "_count" not in text]
        train_here(tmp_path, f"task={task}", *tiny, *override.split())
    assert said in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "given",
    [
        "data.short_side=null",
        "data.short_side=96 task.inference=slide",
        "data.short_side=56 +model.dynamic_img_size=true",
        "data.short_side=54 model.name=swin_tiny_patch4_window7_224 +model.strict_img_size=false",
    ],
)
def test_images_that_a_model_for_one_size_takes(given):
    model = ["model.name=vit_tiny_patch16_224", "task.head=semantic_fpn", "task.channels=16"]
    task = create(config.compose([*TASKS["segment"], *TINY, *model, *given.split()]))
    assert task.build_model(task.build_data()).training


@pytest.mark.slow
@pytest.mark.parametrize("task", ["segment", "detect"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_begins_to_learn(tmp_path, family, task):
    own = [f"model={smallest(FAMILIES[family])}", "data.img_size=64", "data.train_count=64", "data.val_count=4"]
    steps = ["data.batch_size=8", "train.steps=16", "train.log_every=1", "sched.warmup=0", "train.save_every=16"]
    train_here(tmp_path, *TASKS[task], *own, *steps, "name=run")
    losses = [line["loss"] for line in lines(tmp_path / "run") if "loss" in line]
    first, last = fmean(losses[:3]), fmean(losses[-3:])
    print(f"{family} {task}: loss {first:.3f} -> {last:.3f}")
    assert last < 0.9 * first
