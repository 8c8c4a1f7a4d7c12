"""What can be seen of a run: trackers, evaluations, the card, pictures, where the time goes."""

import ast
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
from timm.data import resolve_data_config

import zoo
from children import QUICK, lines, no_space, note_overrides, rendered, train_here, trained
from families import SMALL as SMALL_MODELS
from recipes import card, compare, config, export, log
from recipes.checkpoint import Store
from recipes.clock import Startup, Timed
from recipes.config import ConfigError
from recipes.data.build import preprocessing
from recipes.log import epoch_table
from recipes.run import Run
from recipes.settings import RunError
from recipes.trackers import TensorBoard
from zoo import show
from zoo.show import source


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
def test_a_log_that_fails_stops_the_run_and_loses_nothing(two_runs, tmp_path, monkeypatch, capsys, file):
    pytest.importorskip("tensorboard")
    write = log.Through.write

    def full(self, data):
        if file in str(self.name) and trained(tmp_path / "run", 2):
            no_space()
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
    both = lines(tmp_path / "run"), lines(two_runs / "one")
    ours, whole = ({line["step"]: line["loss"] for line in found if "loss" in line} for found in both)
    mean = (whole.pop(3) + whole[4]) / 2  # the line of step 4 is of the steps since that of 2
    assert ours == {**whole, 4: pytest.approx(mean, rel=1e-12)}


def test_curves_that_cannot_be_written_lose_no_step(tmp_path, monkeypatch):
    monkeypatch.setattr("recipes.run.draw_curves", no_space)
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


@pytest.mark.parametrize("behind", [7200, 0])
def test_tensorboard_shows_the_later_start_whatever_the_clock(tmp_path, monkeypatch, behind):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    clock = time.time()
    for start, (done, late) in enumerate([(0, 0), (3, behind), (5, 2 * behind)]):
        monkeypatch.setattr(time, "time", lambda late=late: clock - late)
        sink = TensorBoard(tmp_path / "tensorboard", done)
        for step in range(done + 1, done + 6):
            sink.write({"step": step, "loss": start})
        sink.close()
    (tmp_path / "tensorboard" / "events.out.tfevents.profile").touch()
    read = events.EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("training/loss")
    assert [(event.step, event.value) for event in read] == list(enumerate([0, 0, 0, 1, 1, 2, 2, 2, 2, 2], start=1))


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


@pytest.mark.parametrize("kind", ["UsageError", ValueError, RuntimeError, PermissionError])
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


def test_table_of_evaluations(two_runs):
    history = lines(two_runs / "one")
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


def test_weights_with_a_loss_that_is_not_finite_are_not_the_best(two_runs, tmp_path):
    """They were not kept, whatever their score."""
    run = shutil.copytree(two_runs / "one", tmp_path / "one")
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


def test_the_card_loads_the_model(two_runs, monkeypatch):
    card = (two_runs / "one" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: timm\n") and "trained on `digits`" in card and torch.__version__ in card
    monkeypatch.chdir(two_runs)
    said: dict = {}
    exec(re.search(r"```python\n(.*?)```", card, re.S)[1], said)
    best, _ = Store(two_runs / "one" / "checkpoints").newest("best")
    kept = best.tensors(best.state["weights"])
    assert all(torch.equal(kept[name], tensor) for name, tensor in said["model"].state_dict().items())
    assert f"| top1 | {best.state['metrics']['top1']:.4f} |" in card
    prepared = resolve_data_config({}, model=said["model"])
    assert prepared["mean"] == (0.5,) * 3 and prepared["input_size"] == (3, 32, 32)  # of digits, not of ImageNet


def test_the_card_is_of_what_is_left(tmp_path, monkeypatch, capsys):
    """Of a run whose best weights, and the record of whose starts, were removed as it trained."""
    report = Run.report

    def of_what_is_left(self, *args, **how):
        shutil.rmtree(*(self.folder / "checkpoints").glob("best-*"))
        (self.folder / "sessions.jsonl").unlink()
        report(self, *args, **how)

    monkeypatch.setattr(Run, "report", of_what_is_left)
    train_here(tmp_path, *QUICK, "name=run")
    text = (tmp_path / "run" / "README.md").read_text()
    assert "Its best weights are gone." in text and "`sessions.jsonl` is gone." in text and "At the last" not in text
    assert f"the best weights are gone from {tmp_path}/run/checkpoints: an evaluation" in capsys.readouterr().out


@pytest.mark.parametrize("typed", [[], ["task=segment", "data.train_count=32", "data.val_count=4"]])
def test_the_card_of_any_name_is_python(tmp_path, typed):
    name = 'a"b\\c é'
    train_here(tmp_path, *QUICK, *typed, "data.batch_size=8", "train.steps=1", config.quote("name", name))
    text = (tmp_path / name / "README.md").read_text()
    code = ast.parse("".join(re.findall(r"```python\n(.*?)```", text, re.S)))
    names = [node.value for node in ast.walk(code) if isinstance(node, ast.Constant)]
    assert any(str(name).endswith(".safetensors") and Path(name).is_file() for name in names)


def test_the_card_of_a_run_that_started_from_a_file_loads_its_own(two_runs, tmp_path, monkeypatch):
    """It has one overlay, which names the run's weights, and what it says of sharing runs as it stands."""
    (file,) = (two_runs / "one" / "checkpoints").glob("best-*/ema.safetensors")
    overlay = [f"+model.pretrained_cfg_overlay.{one}" for one in (f"file={file}", "num_classes=10")]
    train_here(tmp_path, *QUICK, "train.steps=1", "model.pretrained=true", *overlay, "name=run")
    blocks = re.findall(r"```python\n(.*?)```", (tmp_path / "run" / "README.md").read_text(), re.S)
    monkeypatch.chdir(tmp_path)
    said: dict = {}
    exec(blocks[0], said)
    assert said["model"].pretrained_cfg["file"].startswith(str(tmp_path / "run"))
    exec(blocks[1], {})
    assert json.loads(Path("shared/config.json").read_text())["label_names"] == [str(digit) for digit in range(10)]


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


def test_a_run_is_drawn_as_it_was_trained(two_runs, tmp_path, capsys):
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
    assert_drawn_alike(source.build(None, str(two_runs / "one"), None)[0], export.build(two_runs / "one"))
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


def test_runs_that_cannot_be_drawn(two_runs, tmp_path):
    run = shutil.copytree(two_runs / "one", tmp_path / "run")
    (state,) = run.glob("checkpoints/best-*/state.json")
    state.write_text("{}")
    with pytest.raises(zoo.CheckpointError, match=r"state.json, which describes the weights .*, cannot be read \(KeyE"):
        source.build(None, str(run), None)
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(zoo.CheckpointError, match="is a run without a checkpoint yet"):
        source.build(None, str(run), None)


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
