"""What can be seen of a run: trackers, evaluations, the card, several runs side by side, where the time goes."""

import errno
import io
import json
import os
import re
import runpy
import shlex
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from rich.console import Console
from timm.data import resolve_data_config

import zoo
from children import SMALL, lines, note_overrides, train_here, trained
from families import SMALL as SMALL_MODELS
from recipes import card, compare, config, export, log
from recipes.checkpoint import Store
from recipes.clock import Startup, Timed
from recipes.config import ConfigError
from recipes.data.build import preprocessing
from recipes.log import epoch_table
from recipes.plots import draw_together
from recipes.settings import RunError
from recipes.trackers import TensorBoard
from zoo import show
from zoo.show import source

QUICK = [*SMALL, "train.steps=6", "train.eval_every=0.1", "train.save_every=3", "sched.warmup=0"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Two runs that differ in seed and rate."""
    folder = tmp_path_factory.mktemp("seen")
    train_here(folder, *QUICK, "name=one")
    train_here(folder, *QUICK, "name=two", "seed=3", "optim.lr=0.01")
    return folder


def rendered(table) -> str:
    console = Console(width=200)
    with console.capture() as captured:
        console.print(table)
    return captured.get()


def test_tensorboard_and_its_resumption(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    options = [*QUICK, "logger=tensorboard", f"out={tmp_path}", "name=run"]
    train_here(tmp_path, *options)
    note_overrides(tmp_path / "run", options)
    checkpoints = tmp_path / "run" / "checkpoints"
    for path in checkpoints.glob("step-00000006"):
        path.rename(checkpoints / "corrupt-step-00000006")
    train_here(tmp_path, f"resume={tmp_path / 'run'}")
    read = events.EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    for tag, key in (("training/loss", "loss"), ("training/grad_norm", "grad_norm"), ("validation/top1", "val_top1")):
        expected = [(line["step"], line[key]) for line in lines(tmp_path / "run") if key in line]
        assert [event.step for event in read.Scalars(tag)] == [step for step, _ in expected]
        assert [event.value for event in read.Scalars(tag)] == pytest.approx([value for _, value in expected])


@pytest.mark.parametrize("file", ["events.out.tfevents", "metrics.jsonl"])
def test_a_log_that_fails_stops_the_run_and_loses_nothing(runs, tmp_path, monkeypatch, capsys, file):
    pytest.importorskip("tensorboard")
    write = log.Through.write

    def full(self, data):
        if file in str(self.name) and trained(tmp_path / "run", 2):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(self, data)

    options = [*QUICK, "train.save_every=100", "logger=tensorboard", f"out={tmp_path}", "name=run"]
    monkeypatch.setattr(log.Through, "write", full)
    said = r"(?s)could not write \S+: .*No space left on device\nthe state after step 3 is saved; resume with: .*resume"
    with pytest.raises(log.LogError, match=said):
        train_here(tmp_path, *options)
    assert "Traceback" not in capsys.readouterr().err
    monkeypatch.undo()
    note_overrides(tmp_path / "run", options)
    assert [line["step"] for line in lines(tmp_path / "run")] == [1, 2]
    train_here(tmp_path, f"resume={tmp_path / 'run'}")
    both = lines(tmp_path / "run"), lines(runs / "one")
    ours, whole = ({line["step"]: line["loss"] for line in found if "loss" in line} for found in both)
    mean = (whole.pop(3) + whole[4]) / 2  # the line of step 4 is of the steps since that of 2
    assert ours == {**whole, 4: pytest.approx(mean, rel=1e-12)}


def test_curves_that_cannot_be_written_lose_no_step(tmp_path, monkeypatch):
    def full(path, *_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("recipes.run.draw_curves", full)
    said = r"(?s)could not write \S+curves.png: .*No space left on device\nthe state after step 5 is saved; resume with"
    with pytest.raises(RunError, match=said):
        train_here(tmp_path, *QUICK, "train.save_every=100", f"out={tmp_path}", "name=run")
    assert Store(tmp_path / "run" / "checkpoints").newest("step")[0].state["step"] == 5


def test_tensorboard_has_pictures(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    sink = TensorBoard(tmp_path / "tensorboard", 0)
    sink.picture(7, Image.new("RGB", (8, 6), (255, 0, 0)))
    sink.close()
    (shown,) = events.EventAccumulator(str(tmp_path / "tensorboard")).Reload().Images("validation/picture")
    with Image.open(io.BytesIO(shown.encoded_image_string)) as picture:
        assert (shown.step, picture.size, picture.getpixel((0, 0))) == (7, (8, 6), (255, 0, 0))


def test_tensorboard_that_cannot_begin_says_how_to_go_on(tmp_path):
    pytest.importorskip("tensorboard")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tensorboard").write_text("in the way")
    with pytest.raises(log.LogError, match=r"could not write \S+tensorboard: .*; then resume with: .* resume=\S+run$"):
        train_here(tmp_path, *QUICK, "logger=tensorboard", "name=run")


def test_a_tracker_that_cannot_be_leaves_no_folder(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="pip install wandb"):
        train_here(tmp_path, *QUICK, "logger=wandb", "name=run")
    with pytest.raises(ConfigError, match=r"logger\.mode=offlin is unknown .did you mean offline"):
        train_here(tmp_path, *QUICK, "logger=wandb", "logger.mode=offlin", "name=run")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["UsageError", ValueError])
def test_wandb_that_refuses_says_how_to_go_on(tmp_path, monkeypatch, kind):
    wandb = pytest.importorskip("wandb")
    error = getattr(wandb.errors, kind) if isinstance(kind, str) else kind

    def init(**options):
        asked.append(options["mode"])
        if options["mode"] != "offline":
            raise error("no account")
        return SimpleNamespace(define_metric=lambda *_, **__: None, log=logged.append, finish=lambda: None)

    asked, logged = [], []
    options = [*QUICK, "train.steps=2", "logger=wandb", "name=run"]
    monkeypatch.setattr(wandb, "init", init)
    said = r"(?s)refuses the run: no account.* resume=\S+run logger=wandb logger.mode=offline"
    with pytest.raises(ConfigError, match=said) as refused:
        train_here(tmp_path, *options)
    note_overrides(tmp_path / "run", options)
    typed = shlex.split(str(refused.value).splitlines()[-1])[-3:]
    monkeypatch.setattr(config, "overrides", lambda: typed)
    train_here(tmp_path, *typed)
    assert asked == [None, "offline"]  # what is not given is for WANDB_MODE to say
    assert [line["step"] for line in logged if "loss" in line] == [1, 2]


def test_wandb_that_fails_in_mid_run(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")

    def fail(line):
        raise wandb.errors.CommError("its service is gone")

    run = SimpleNamespace(define_metric=lambda *_, **__: None, log=fail, finish=lambda: fail(None))
    monkeypatch.setattr(wandb, "init", lambda **_: run)
    said = r"could not write to Weights & Biases: its service is gone\nthe state after step 1 is saved"
    with pytest.raises(log.LogError, match=said):
        train_here(tmp_path, *QUICK, "logger=wandb", "name=run")


def test_wandb_offline_beside_tensorboard(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    pytest.importorskip("tensorboard")
    monkeypatch.setenv("WANDB_SILENT", "true")
    chosen = ["logger=[wandb,tensorboard]", "logger.mode=offline"]
    train_here(tmp_path, *QUICK, "train.steps=2", *chosen, "name='w: 100%'")
    (written,) = (tmp_path / "w: 100%" / "wandb").glob("offline-run-*/run-*.wandb")
    assert re.fullmatch(r"run-w- 100--[0-9a-f]{8}\.wandb", written.name) and written.stat().st_size > 1000
    assert list((tmp_path / "w: 100%" / "tensorboard").glob("events.*"))


def test_wandb_knows_runs_of_the_same_name_apart(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    asked = []

    def init(**options):
        asked.append(options["id"])
        raise wandb.errors.UsageError("no account")

    monkeypatch.setattr(wandb, "init", init)

    def start(*overrides):
        with pytest.raises(ConfigError, match="refuses the run"):
            train_here(tmp_path, *overrides)

    begun = [*QUICK, "logger=wandb"]
    for name in ("one/a", "two/a"):
        start(*begun, f"name={name}")
        note_overrides(tmp_path / name, begun)
        start(f"resume={tmp_path / name}")
    assert asked[0] == asked[1] != asked[2] == asked[3] and all(name.startswith("a-") for name in asked)
    path = tmp_path / "two" / "a" / "sessions.jsonl"
    first = json.loads(path.read_text().splitlines()[0])
    path.write_text(json.dumps({key: value for key, value in first.items() if key != "id"}) + "\n")
    start(f"resume={tmp_path / 'two' / 'a'}")
    assert asked[-1] == "a"  # as it was begun, before runs had an id


def test_table_of_evaluations(runs):
    history = lines(runs / "one")
    text = rendered(epoch_table(history, "top1"))
    evaluations = [line for line in history if "val_top1" in line]
    best = max(line["val_top1"] for line in evaluations)
    assert f"{best:.2f} *" in text and all(f"{line['val_loss']:.4f}" in text for line in evaluations)
    assert rendered(epoch_table(history, "top1", rows=1)).count("\n") == text.count("\n") - 1


def test_of_equal_evaluations_the_first_is_the_best():
    """Whose weights are kept."""
    history = [{"step": step, "epoch": 1.0, "val_top1": value} for step, value in ((1, 5.0), (2, 7.0), (3, 7.0))]
    marked = [line for line in rendered(epoch_table(history, "top1")).splitlines() if "*" in line]
    assert len(marked) == 1 and " 2 " in marked[0]


def test_weights_with_a_loss_that_is_not_finite_are_not_the_best(runs, tmp_path):
    """They were not kept, whatever their score."""
    run = shutil.copytree(runs / "one", tmp_path / "one")
    best = compare.read(run).best
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 7, "epoch": 1.0, "val_top1": 100.0, "val_loss": None}) + "\n")
    assert compare.read(run).best == best
    table = rendered(epoch_table(lines(run), "top1"))
    assert f"{best['val_top1']:.2f} *" in table and "100.00 " in table and "100.00 *" not in table


def test_no_training_loss_is_shown_twice():
    """Evaluated twice between two lines of the log: the second time there is nothing new to show."""
    trained = {"step": 10, "loss": 0.75, "lr": 0.1, "images_per_s": 9.0}
    history = [trained, *({"step": step, "epoch": step / 6, "val_top1": step / 1.0} for step in (12, 18))]
    first, second = rendered(epoch_table(history, "top1")).splitlines()[-3:-1]
    assert "0.7500" in first and "0.7500" not in second and second.count(" - ") == 4  # the loss of validation, too


def test_the_training_loss_of_an_evaluation_is_the_mean_since_the_one_before():
    """Of the steps: a line counts as many times as steps that it is the mean of, which skipped ones are not."""
    logged = [(10, 4.0, 0), (12, 1.0, 0), (20, 2.0, 0), (30, 5.0, 6), (40, None, 10)]
    history = [
        {"step": step, "loss": loss, "lr": step / 100, "images_per_s": 9.0, **({"skipped": skipped} if skipped else {})}
        for step, loss, skipped in logged
    ]
    history[2:2] = [{"step": 12, "epoch": 2.0, "val_top1": 1.0}]
    history += [{"step": 40, "epoch": 7.0, "val_top1": 2.0}]
    first, second = rendered(epoch_table(history, "top1")).splitlines()[-3:-1]
    assert "3.5000" in first and "1.20e-01" in first  # (10 * 4 + 2 * 1) / 12
    assert "3.0000" in second and "4.00e-01" in second  # (8 * 2 + 4 * 5) / 12


def test_the_card_loads_the_model(runs, monkeypatch):
    card = (runs / "one" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: timm\n") and "trained on `digits`" in card and torch.__version__ in card
    monkeypatch.chdir(runs)
    said: dict = {}
    exec(re.search(r"```python\n(.*?)```", card, re.S)[1], said)
    best, _ = Store(runs / "one" / "checkpoints").newest("best")
    kept = best.tensors(best.state["weights"])
    assert all(torch.equal(kept[name], tensor) for name, tensor in said["model"].state_dict().items())
    assert f"| top1 | {best.state['metrics']['top1']:.4f} |" in card
    prepared = resolve_data_config({}, model=said["model"])
    assert prepared["mean"] == (0.5,) * 3 and prepared["input_size"] == (3, 32, 32)  # of digits, not of ImageNet


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["model=nat_m"], "random weights."),
        (
            ["model=gcvit_xt", "model.pretrained=true"],
            "the pretrained weights of gcvit_xt, under the licence cc-by-nc-sa-4.0.",
        ),
        (
            ["model=timm", "model.name=resnet18.a1_in1k", "model.pretrained=true"],
            "of resnet18.a1_in1k, under the licence apache-2.0.",
        ),
        (
            ["model=timm", "model.name=hf-hub:me/mine", "model.pretrained=true"],
            "of hf-hub:me/mine, of which no licence is known.",
        ),
        (
            ["model=gcvit_xt", "model.checkpoint=files/gcvit_1k_xtiny.pth.tar"],
            "gcvit_1k_xtiny.pth.tar, under the licence cc-by-nc-sa-4.0.",
        ),
        (["model=gcvit_xt", "model.checkpoint=runs/first"], "runs/first, of which no licence is known."),
        (
            ["model=gcvit_xt", "model.pretrained=true", "+model.pretrained_cfg_overlay.file=mine.pth"],
            "mine.pth, of which no licence is known.",
        ),
        (
            ["task=segment", "model.backbone=gcvit_1k_xtiny.pth.tar", "model=gcvit_xt"],
            "under the licence cc-by-nc-sa-4.0.",
        ),
    ],
)
def test_the_card_says_what_a_run_started_from(typed, said):
    assert card.begins(config.compose(typed)).endswith(said)


def test_a_shared_run_is_prepared_as_it_was_measured(tmp_path, monkeypatch):
    """From the card to the hub: what the model was shown is in config.json, not what its release was."""
    options = ["model=nat_m", "model.depths=[1,1,1,1]", *QUICK[2:], "data.crop_pct=0.6", "data.crop_mode=squash"]
    train_here(tmp_path, *options, "train.steps=1", "name=run")
    said: dict = {}
    monkeypatch.chdir(tmp_path)
    exec(re.search(r"```python\n(.*?)```", (tmp_path / "run" / "README.md").read_text(), re.S)[1], said)
    zoo.save_for_hf(said["model"], "shared")
    kept = preprocessing(OmegaConf.load("run/config.yaml"))
    assert kept == preprocessing(config.compose(["model=timm", "model.name=local-dir:shared", "data=imagefolder"]))
    assert (kept.size, kept.mean, kept.crop_pct, kept.crop_mode) == ((32, 32), (0.5,) * 3, 0.6, "squash")


def test_a_run_is_drawn_as_it_was_trained(runs, tmp_path, capsys):
    """Its folder, that of a checkpoint, and a file: with arguments that no weight shows, and its normalisation."""
    sizes = [f"model.{key}={list(value)}" for key, value in SMALL_MODELS["biformer_t"].items() if key != "heads"]
    sizes += ["+model.heads=[1,2,2,2]", "+model.topk=[2,3,4]", "+model.n_win=3"]
    options = ["model=biformer_t", *sizes, *QUICK[2:]]
    train_here(tmp_path, *options, "train.steps=1", "name=run")
    run, model = tmp_path / "run", export.build(tmp_path / "run")
    best = run / "checkpoints" / "best-00000001"
    for name in ("best-before-tuning", "best-00000001.old"):  # the user's own
        shutil.copytree(best, best.with_name(name))
    for place in (run, best, best / "ema.safetensors"):
        found, name, note = source.build(None, str(place), None)
        assert (name, found.img_size) == ("biformer_t", (32, 32)) and note.endswith("best-00000001/ema.safetensors")
        assert_drawn_alike(found, model)
    assert "no classifier" not in capsys.readouterr().out
    asked = source.build("biformer_t", str(run), (48, 64), n_win=2)[0]
    assert asked.img_size == (48, 64) and asked.stages[0].blocks[0].attn.fn.n_win == (2, 2)
    with pytest.raises(zoo.CheckpointError, match=r"is of biformer_t, says .*config.yaml, not of nat_m: leave out"):
        source.build("nat_m", str(run), None)

    # what timm alone knows, and what started from a folder
    assert_drawn_alike(source.build(None, str(runs / "one"), None)[0], export.build(runs / "one"))
    shared = zoo.save_for_hf(model, tmp_path / "shared")
    cfg = OmegaConf.load(run / "config.yaml")
    cfg.model.name = f"local-dir:{shared}"
    OmegaConf.save(cfg, run / "config.yaml")
    assert_drawn_alike(source.build(None, str(run), None)[0], model)


def assert_drawn_alike(model, other):
    image = Image.effect_noise((50, 40), 90)
    for one, two in zip(show.pictures(model, image), show.pictures(other, image), strict=True):
        assert one.data.keys() == two.data.keys()
        assert all(torch.equal(value, two.data[key]) for key, value in one.data.items())


def test_runs_that_cannot_be_drawn(runs, tmp_path):
    run = shutil.copytree(runs / "one", tmp_path / "run")
    (state,) = run.glob("checkpoints/best-*/state.json")
    state.write_text("{}")
    with pytest.raises(zoo.CheckpointError, match=r"state.json, which describes the weights .*, cannot be read \(KeyE"):
        source.build(None, str(run), None)
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(zoo.CheckpointError, match="is a run without a checkpoint yet"):
        source.build(None, str(run), None)


def test_runs_side_by_side(runs, tmp_path, capsys):
    (runs / "no run").mkdir()
    (runs / "broken").mkdir()
    (runs / "broken" / "config.yaml").write_text("{")
    compare.main([*map(str, sorted(runs.iterdir())), "--out", str(tmp_path / "both.png")])
    said = capsys.readouterr().out
    assert f"left out: {runs / 'no run'} holds no run" in said
    assert f"left out: config.yaml in {runs / 'broken'} is not a run's configuration" in said
    rows = compare.readable([runs / "one", runs / "two"])
    assert rows[0].value >= rows[1].value
    assert compare.different(rows) == ["seed", "optim.lr"]
    text = rendered(compare.table(compare.named(rows), ["seed", "optim.lr"]))
    assert "0.01" in text and all(f"{row.value:.2f}" in text for row in rows)
    with Image.open(tmp_path / "both.png") as picture:
        assert picture.width > 600 and len(picture.getcolors(1 << 20)) > 20


def test_copies_of_a_run_are_no_seeds_and_its_speed_is_the_median(runs, tmp_path):
    copy = shutil.copytree(runs / "one", tmp_path / "copy")
    with (copy / "metrics.jsonl").open("a") as file:
        for speed in (9e9, 7.0, 5.0, 1.0, 2e9):
            file.write(json.dumps({"step": 6, "loss": 1.0, "images_per_s": speed}) + "\n")
    rows = compare.readable([runs / "one", copy])
    assert len(rows) == 2 and compare.seeds(rows) == []
    speeds = sorted(line["images_per_s"] for line in log.history(copy / "metrics.jsonl") if "images_per_s" in line)
    assert rows[1].speed == speeds[5] and len(speeds) == 11


def test_a_folder_stands_for_the_runs_below_it(runs, tmp_path, capsys):
    below, file = tmp_path / "runs", tmp_path / "a.json"
    places = [shutil.copytree(runs / "one", below / "one"), shutil.copytree(runs / "two", below / "more" / "two")]
    again = os.path.relpath(places[0])
    compare.main([*map(str, (places[0], below, again)), "--json", str(file), "--out", str(tmp_path / "a.png")])
    assert sorted(row["folder"] for row in json.loads(file.read_text())[0]["rows"]) == sorted(map(str, places))
    assert "left out" not in capsys.readouterr().out


def test_runs_of_several_tasks_have_a_table_each(runs, tmp_path, capsys):
    other = shutil.copytree(runs / "one", tmp_path / "dense")
    cfg = OmegaConf.load(other / "config.yaml")
    OmegaConf.save(OmegaConf.merge(cfg, {"task": {"name": "segment"}}), other / "config.yaml")
    (other / "metrics.jsonl").write_text('{"step": 3, "val_miou": 7.25, "val_loss": 2.0}\n')
    given = [str(folder) for folder in (other, runs / "one", runs / "two")]
    compare.main([*given, "--out", str(tmp_path / "all.png")])
    said = capsys.readouterr().out
    assert said.count("best miou") == said.count("best top1") == 1
    assert "2 runs" in said and re.search(r": 1 run *\n", said)
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["all-miou.png", "all-top1.png"]
    compare.main([*given, "--score", "loss", "--out", str(tmp_path / "loss.png")])
    said = capsys.readouterr().out
    assert re.search(r"segment, digits, 10 classes: 1 run *\n", said) and "classify, digits, 10 classes: 2 runs" in said
    assert sorted(path.name for path in tmp_path.glob("loss*")) == ["loss-classify.png", "loss-segment.png"]


def as_measured(run, folder, **data):
    """A copy of a run whose data.json and data configuration say something else."""
    shutil.copytree(run, folder)
    cfg = OmegaConf.load(folder / "config.yaml")
    OmegaConf.save(OmegaConf.merge(cfg, {"data": data.pop("cfg", {})}), folder / "config.yaml")
    noted = json.loads((folder / "data.json").read_text())
    (folder / "data.json").write_text(json.dumps(noted | data))
    return folder


def test_runs_on_other_classes_have_a_table_of_their_own(runs, tmp_path, capsys):
    few = as_measured(runs / "one", tmp_path / "few", num_classes=2, class_names=["sky", "ground"])
    compare.main([str(few), str(runs / "one"), str(runs / "two"), "--out", str(tmp_path / "all.png")])
    said = capsys.readouterr().out
    assert re.search(r"classify, digits, 2 classes: 1 run *\n", said) and "classify, digits, 10 classes: 2 runs" in said
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["all-10-classes.png", "all-2-classes.png"]
    assert "not evaluated on the same images" not in said


def test_runs_of_which_some_classes_do_not_count_have_a_table_of_their_own(runs, tmp_path, capsys):
    fewer = as_measured(runs / "one", tmp_path / "fewer", left_out=[0])
    compare.main([str(fewer), str(runs / "one"), "--out", str(tmp_path / "all.png")])
    said = capsys.readouterr().out
    assert "classify, digits, 10 classes but 1: 1 run" in said and "classify, digits, 10 classes: 1 run" in said
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["all-1.png", "all-2.png"]


def test_runs_on_other_images_are_told(runs, tmp_path, capsys):
    cfg = {"val_fraction": 0.02}
    less = as_measured(runs / "one", tmp_path / "less", images={"train": 1761, "val": 36}, cfg=cfg)
    compare.main([str(less), str(runs / "one"), "--out", str(tmp_path / "all.png")])
    said = capsys.readouterr().out
    assert "2 runs" in said and "not evaluated on the same images, so the scores are not comparable: " in said
    assert "less (images=36, data.val_fraction=0.02)" in said
    assert "one (images=180, data.val_fraction=0.1)" in said
    compare.main([str(runs / "one"), str(runs / "two"), "--out", str(tmp_path / "all.png")])
    assert "not measured" not in capsys.readouterr().out
    fewer = as_measured(runs / "one", tmp_path / "fewer", cfg={"things": [1, 1]})
    compare.main([str(fewer), str(runs / "one"), "--out", str(tmp_path / "all.png")])
    assert re.search(r"not evaluated on the same images.*data\.things=\[1, 1\]", capsys.readouterr().out)


def scored(name, value, **cfg):
    best = {"step": 1, "val_top1": value, "val_loss": value}
    return compare.Row(Path(name), cfg, [best], "top1", best, name=name)


def test_seeds_have_mean_and_deviation(capsys):
    rows = [scored("a", 80.0, seed=0, lr=1), scored("b", 84.0, seed=1, lr=1, out="b"), scored("c", 70.0, seed=0, lr=2)]
    assert [[row.folder.name for row in group] for group in compare.seeds(rows)] == [["a", "b"]]
    compare._print_seeds(rows)
    assert "82.00 ± 2.83 (2)" in capsys.readouterr().out
    compare._print_seeds(rows[1:])
    assert capsys.readouterr().out == ""
    compare._print_seeds([*rows, scored("a2", 80.0, seed=0, lr=1)])
    said = "a, a2 have the same seed=0, and all of them count: if they are copies of a run, name only one"
    assert said in capsys.readouterr().out


def test_what_is_compared_as_json(runs, tmp_path):
    other = shutil.copytree(runs / "one", tmp_path / "other")
    OmegaConf.save(OmegaConf.merge(OmegaConf.load(other / "config.yaml"), {"seed": 7}), other / "config.yaml")
    given = [str(runs / "one"), str(runs / "two"), str(other)]
    compare.main([*given, "--out", str(tmp_path / "a.png"), "--json", str(tmp_path / "new" / "a.json")])
    (table,) = json.loads((tmp_path / "new" / "a.json").read_text())
    best = {name: max(line.get("val_top1", 0) for line in lines(runs / name)) for name in ("one", "two")}
    expected = dict(zip(given, [*best.values(), best["one"]], strict=True))
    assert {row["folder"]: row["best"] for row in table["rows"]} == expected
    assert (table["task"], table["score"], table["classes"]) == ("classify", "top1", 10)
    assert all(row["images"] == 180 and row["config"].keys() == {"seed", "optim.lr"} for row in table["rows"])
    (group,) = table["seeds"]
    assert group == {"folders": given[::2], "seeds": [0, 7], "mean": best["one"], "std": 0.0, "n": 2}


def test_scores_have_the_decimals_that_tell_them_apart():
    def loss(*values):
        return compare.decimals([compare.Row(Path(), {}, [], "loss", {"val_loss": value}) for value in values])

    assert compare.decimals([scored("a", 80.0), scored("b", 80.0), scored("c", 81.0)]) == 2
    assert compare.decimals([scored("a", 80.001), scored("b", 80.004)]) == 3
    assert (loss(2.3, 2.4), loss(2.30001, 2.30002), loss(2.0, 2.0 + 1e-9)) == (4, 5, 6)


def test_a_score_that_there_is_not(runs, tmp_path, capsys):
    with pytest.raises(SystemExit, match="none of these folders holds a run with an evaluation with top9"):
        compare.main([str(runs / "one"), "--score", "top9", "--out", str(tmp_path / "a.png")])
    said = capsys.readouterr().out
    assert "one has no evaluation with top9; its evaluations have top1, top5, loss, images_per_s" in said


def test_pictures_have_no_empty_panel(tmp_path):
    def width(*keys):
        draw_together(tmp_path / "a.png", {"one": [{"step": 1, **dict.fromkeys(keys, 2.0)}]}, "ap")
        with Image.open(tmp_path / "a.png") as picture:
            return picture.width

    assert width("loss", "val_loss", "val_ap") == 1500 and width("loss", "val_ap") == 1000


def test_what_follows_from_another_model_is_not_told_apart():
    def row(model, depths, lr):
        cfg = {"model.name": model, "model.depths": depths, "optim.lr": lr, "train.keep": depths}
        return compare.Row(Path(model), cfg, [], "top1", {})

    assert compare.different([row("a", 1, 0.1), row("b", 2, 0.1)]) == ["model.name"]
    assert compare.different([row("a", 1, 0.1), row("b", 2, 0.1), row("a", 3, 0.1)]) == ["model.name", "model.depths"]


def test_twice_as_many_runs_take_twice_as_long():
    class Config(dict):
        asked = 0

        def get(self, key, default=None):
            Config.asked += 1
            return super().get(key, default)

    def asked(count):
        Config.asked = 0
        cfgs = [Config({"model.name": f"m{number % 3}", "model.depths": 1, "seed": number}) for number in range(count)]
        assert compare.different([compare.Row(Path(), cfg, [], "top1", {}) for cfg in cfgs]) == ["model.name", "seed"]
        return Config.asked

    assert asked(200) < 2.2 * asked(100)


def test_the_speed_of_a_run_is_its_median():
    def speed(*found):
        return compare.Row(Path(), {}, [{"step": 1, "images_per_s": each} for each in found], "top1", {}).speed

    assert (speed(1, 99), speed(99, 1, 2), speed()) == (50, 2, None)


def test_runs_are_called_by_what_tells_them_apart(runs, tmp_path, capsys):
    def names(*folders):
        return [row.name for row in compare.named([compare.Row(Path(it), {}, [], "top1", {}) for it in folders])]

    assert names("runs/one", "runs/two") == ["one", "two"]
    assert names("runs/one") == names(Path("runs/one").absolute()) == ["one"]
    assert names("seg/runs/one", "seg/other/one") == ["runs/one", "other/one"]
    assert names("runs/one", Path("runs/again/one").absolute()) == ["one", "again/one"]

    shutil.copytree(runs / "one", tmp_path / "there" / "one")
    shutil.copytree(runs / "one", tmp_path / "here" / "one")
    drawn = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "draw_together", lambda path, curves, score: drawn.extend(curves))
        given = [str(tmp_path / name / "one") for name in ("there", "here", "there")]
        compare.main([*given, "--out", str(tmp_path / "both.png")])
    assert drawn == ["there/one", "here/one"] and "2 runs" in capsys.readouterr().out


def test_runs_that_differ_in_much_can_be_read(capsys, monkeypatch):
    """More keys than a terminal has room for: columns would be one letter wide."""
    keys = {f"group.key_{letter}": 0.25 for letter in "abcdefghij"}
    line = {"step": 1, "val_top1": 1.0, "val_loss": 2.0}
    rows = [compare.Row(Path(), {**keys, "seed": name}, [line], "top1", line, name=name) for name in ("one", "two")]
    monkeypatch.setattr(compare.CONSOLE, "_width", 90)
    compare._print(rows, ["seed", *keys])
    said = capsys.readouterr().out
    assert "best top1" in said and "val loss" in said and "2.0000" in said
    assert f"one: seed=one {' '.join(f'{key}=0.25' for key in keys)}\n" in said
    compare._print(rows, ["seed"])
    assert "one:" not in (said := capsys.readouterr().out) and "seed" in said


def test_the_least_loss_is_the_best(runs, tmp_path):
    rows = compare.readable([runs / "one", runs / "two"], "loss")
    losses = [min(line["val_loss"] for line in lines(row.folder) if "val_loss" in line) for row in rows]
    assert [row.value for row in rows] == losses == sorted(losses)
    compare.main([str(runs / "one"), "--score", "loss", "--out", str(tmp_path / "a" / "folder" / "loss.png")])
    assert (tmp_path / "a" / "folder" / "loss.png").is_file()
    with pytest.raises(SystemExit, match="could not write"):
        compare.main([str(runs / "one"), "--out", str(runs / "one" / "config.yaml" / "loss.png")])


def test_nothing_to_compare(tmp_path):
    with pytest.raises(SystemExit, match="none of these folders") as error:
        compare.main([str(tmp_path / "nothing")])
    assert error.value.code not in (0, None)


def test_startup_is_told_by_cause():
    startup = Startup()
    age = time.perf_counter() - startup.last
    assert 0.1 < age < 86_400  # this process is older than its import of torch
    startup.mark("imports")
    time.sleep(0.02)
    startup.mark("data")
    time.sleep(0.05)
    startup.begin("first step")
    startup.split("first step", "first batch", 0.02)
    assert list(startup.causes) == ["imports", "data", "first batch", "first step"]
    assert startup.causes["imports"] > age - 0.01 and 0.02 <= startup.causes["data"] < 1
    assert startup.causes["first batch"] == 0.02 and 0.03 <= startup.causes["first step"] < 1
    startup.begin("configuration")  # of the next run of a sweep
    assert startup.causes == {} and time.perf_counter() - startup.last < 1


def test_waiting_is_timed():
    def slow():
        for item in range(2):
            time.sleep(0.02)
            yield item

    timed = Timed(slow())
    assert next(timed) == 0
    os.sched_yield()
    assert 0.02 <= timed.taken() < 1 and timed.taken() == 0
    assert list(timed) == [1]


@pytest.mark.parametrize("module", ["zoo.table", "zoo.releases"])
def test_help_is_no_work(module, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises(SystemExit) as done:
        runpy.run_module(module, run_name="__main__")
    assert done.value.code == 0 and capsys.readouterr().out.startswith(f"usage: python -m {module} [-h]")
