"""The loop and what it leaves in the run folder; what it says when something is wrong."""

import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from omegaconf import OmegaConf
from PIL import Image

import zoo
from children import (
    PATIENCE,
    SMALL,
    finish,
    fork,
    lines,
    note_overrides,
    renumber,
    start,
    train_here,
    trained,
    wait_for,
)
from recipes import checkpoint, config, console, data, distributed, export, log, models, stop, train
from recipes.data import DataError
from recipes.run import Run
from recipes.settings import RunError, config_to_evaluate, config_to_resume
from recipes.tasks import classify
from recipes.weights import find_checkpoint, find_weights

QUICK = [*SMALL, "train.steps=6", "train.eval_every=0.1", "train.save_every=3", "sched.warmup=0"]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("out")
    train_here(folder, *QUICK, "name=first")
    return folder / "first"


def test_run_folder(run):
    cfg = OmegaConf.load(run / "config.yaml")
    assert cfg.train.steps == 6 and cfg.augment.mixup == 0.2 and cfg.optim.opt == "adamw"
    session = json.loads((run / "sessions.jsonl").read_text())
    assert session["versions"]["torch"] == torch.__version__ and session["from_step"] == 0
    assert json.loads((run / "data.json").read_text())["class_names"] == list("0123456789")
    with Image.open(run / "curves.png") as picture:
        assert picture.width > 600 and len(picture.getcolors(1 << 20)) > 20
    assert sorted(path.name.rpartition("-")[0] for path in (run / "checkpoints").iterdir()) == ["best", "step", "step"]
    assert not list(run.rglob(".writing-*")) and not list(run.rglob("*.pkl"))


def test_log_has_every_step_and_evaluation(run):
    steps = [line for line in lines(run) if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    assert all(line["images_per_s"] > 0 and line["grad_norm"] > 0 and line["memory_mib"] > 50 for line in steps)
    assert all(0 < line["data_wait"] < 1 for line in steps)
    rates = [line["lr"] for line in steps]
    assert rates[0] == 1e-3 and rates == sorted(rates, reverse=True)
    validation = [line for line in lines(run) if "val_top1" in line]
    assert [line["step"] for line in validation] == [5, 6]
    assert validation[-1]["val_top5"] >= validation[-1]["val_top1"]


def test_processes_count_bad_images_only_where_they_are_replaced(tmp_path, monkeypatch):
    """Each count is an exchange between processes: one for the evaluation, and one a step with `replace`."""
    counts = []
    monkeypatch.setattr(distributed, "total", lambda number: counts.append(number) or number)
    for how, expected in (("raise", 1), ("replace", 1 + 3)):
        counts.clear()
        train_here(tmp_path, *QUICK, "train.steps=3", f"data.on_bad_image={how}", f"name={how}")
        assert counts == [0] * expected


def test_checkpoint_is_the_model_of_the_run(run):
    newest, problems = checkpoint.Store(run / "checkpoints").newest()
    assert newest.state["step"] == 6 and problems == []
    cfg = OmegaConf.load(run / "config.yaml")
    task = classify.Task(cfg)
    model = task.build_model(task.build_data())
    model.load_state_dict(newest.tensors("model"))  # strict
    adam = newest.tree("optimizer")["state"]
    assert len(adam) == len(list(model.parameters())) and adam[0]["step"] == 6
    ema, raw = newest.tensors("ema"), newest.tensors("model")
    assert ema.keys() == raw.keys() and any(not torch.equal(ema[k], raw[k]) for k in raw)


def test_a_folder_is_used_once(run):
    with pytest.raises(RunError, match="already holds a run: pass resume=auto"):
        train_here(run.parent, *QUICK, "name=first")


@pytest.mark.parametrize("typed", ["name=", "name=.", "name= resume=auto"])
def test_a_name_that_is_empty_is_refused(tmp_path, typed):
    with pytest.raises(RunError, match=f"does not name a folder below out={tmp_path}"):
        train_here(tmp_path, *QUICK, *typed.split())
    assert not list(tmp_path.iterdir())


def test_a_folder_in_use_is_refused(tmp_path, run):
    shutil.copytree(run, tmp_path / "copy")
    holder = subprocess.Popen(
        ["python3", "-c", "import fcntl,sys,time; f=open(sys.argv[1],'w'); fcntl.lockf(f,fcntl.LOCK_EX); "
         "print('held',flush=True); time.sleep(60)", str(tmp_path / "copy" / ".lock")], stdout=subprocess.PIPE
    )  # fmt: skip
    try:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(RunError, match="in use by another process"):
            train_here(tmp_path, f"resume={tmp_path / 'copy'}")
    finally:
        holder.kill()


def test_resume_takes_the_run_s_configuration_and_refuses_another(run):
    note_overrides(run, QUICK)
    cfg = config_to_resume(run, ["train.keep=7", "data.workers=1", "hardware.threads=1"])
    assert (cfg.train.keep, cfg.train.steps, cfg.model.name) == (7, 6, "test_resnet")
    with pytest.raises(RunError, match=r"optim\.lr: the run has 0\.001, now 0\.5") as error:
        config_to_resume(run, ["optim.lr=0.5", "train.keep=7"])
    assert "train.keep" not in str(error.value)


def test_resume_of_a_run_that_is_older_than_a_key(run, tmp_path):
    shutil.copytree(run, tmp_path / "old")
    note_overrides(tmp_path / "old", QUICK)
    path = tmp_path / "old" / "config.yaml"
    path.write_text("".join(line for line in path.read_text().splitlines(True) if "skip_nonfinite" not in line))
    assert config_to_resume(tmp_path / "old", []).train.skip_nonfinite == 0
    with pytest.raises(RunError, match=r"train\.skip_nonfinite: the run has 0, now 3"):
        config_to_resume(tmp_path / "old", ["train.skip_nonfinite=3"])


def test_a_run_of_somebody_s_own_configuration_files_goes_on(tmp_path):
    """Without naming them again, wherever it is typed, until they are moved."""
    own = tmp_path / "own files"
    (own / "experiment").mkdir(parents=True)
    (own / "experiment" / "short.yaml").write_text("# @package _global_\ntrain: {steps: 1, ema: null}\n")
    child = fork(f"--config-dir={own}", *SMALL, "+experiment=short", "name=run", f"out={tmp_path}", cwd=tmp_path)
    assert "best top1" in child.output()
    run = tmp_path / "run"
    assert config_to_resume(run, []).train.steps == 1
    assert config_to_evaluate(run, [f"run={run}", "data.eval_batch_size=3"]).data.img_size == 32
    moved = own.rename(tmp_path / "moved")
    with pytest.raises(RunError, match=f"files in {own}, which no longer exists: give --config-dir="):
        config_to_resume(run, [])
    assert "best top1" in fork(f"--config-dir={moved}", f"resume={run}", cwd=tmp_path).output()


def test_resume_on_other_data(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "copy")
    note_overrides(copy, QUICK)
    noted = json.loads((copy / "data.json").read_text())
    assert noted["images"] == {"train": 1617, "val": 180}
    (copy / "data.json").write_text(json.dumps({**noted, "images": {"train": 1600, "val": 180}}))
    with pytest.raises(RunError, match="the run has 1600 training images, the data 1617"):
        train_here(tmp_path, f"resume={copy}")


def test_a_run_that_is_beyond_its_end_is_finished(run, tmp_path, capsys):
    """As one whose data has become less; it noted no numbers of images."""
    copy = shutil.copytree(run, tmp_path / "copy")
    shorter = [text.replace("train.steps=6", "train.steps=4") for text in QUICK]
    note_overrides(copy, shorter)
    (copy / "config.yaml").write_text((copy / "config.yaml").read_text().replace("steps: 6", "steps: 4"))
    (copy / "data.json").unlink()
    train_here(tmp_path, f"resume={copy}")
    said = capsys.readouterr().out
    assert "resume with" not in said
    assert f"this run is finished, all 4 steps; another starts from its weights with model.checkpoint={copy}" in said


def test_resume_of_nothing(tmp_path):
    with pytest.raises(RunError, match="holds no run"):
        train_here(tmp_path, f"resume={tmp_path}")


def test_nan_stops_with_the_good_state_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(classify.Task, "loss", poisoned(classify.Task.loss, at=4))
    with pytest.raises(train.NotFinite, match=r"at step 4 .* the loss is nan") as error:
        train_here(tmp_path, *QUICK, "name=poisoned")
    saved, _ = checkpoint.Store(tmp_path / "poisoned" / "checkpoints").newest()
    assert saved.state["step"] == 4
    assert all(tensor.isfinite().all() for tensor in saved.tensors("model").values())
    file = tmp_path / "poisoned" / "nonfinite" / "step-00000004.txt"
    indices = file.read_text().splitlines()
    assert len(set(indices)) == 32 and max(map(int, indices)) < 1617
    assert f"images were {', '.join(indices[:5])} and 27 more, all listed in {file}\nlook at" in str(error.value)


def test_weights_without_a_finite_loss_are_not_the_best(tmp_path, monkeypatch, capsys):
    """They predict the first class throughout, which may be right more often than what is learned later."""
    predict, calls = classify.Task.predict, []

    def function(self, model, images):
        calls.append(len(images))
        return predict(self, model, images) * (math.nan if len(calls) == 1 else 1)

    monkeypatch.setattr(classify.Task, "predict", function)
    options = ["data.eval_batch_size=2000", "train.steps=2", "train.eval_steps=1", "data.workers=0", "name=first"]
    train_here(tmp_path, *SMALL, *options)
    best, _ = checkpoint.Store(tmp_path / "first" / "checkpoints").newest("best")
    assert best.state["step"] == 2 and "these weights are not kept as the best" in capsys.readouterr().out


def test_the_best_is_the_first_of_equal_ones_also_after_a_resumption(tmp_path, monkeypatch):
    scores, evaluate = [50.0, 50.0, 40.0, 50.0, 40.0], train.evaluate

    def scored(*args):
        values, metrics = evaluate(*args)
        return values | {"top1": scores.pop(0)}, metrics

    def best():
        found, _ = checkpoint.Store(run / "checkpoints").newest("best")
        return found.state["step"], found.state["metrics"]["top1"]

    monkeypatch.setattr(train, "evaluate", scored)
    options = [*SMALL, "train.steps=3", "train.eval_steps=1", "train.save_every=1", "train.keep=9", "data.workers=0"]
    train_here(tmp_path, *options, "name=run")
    run = tmp_path / "run"
    assert best() == (1, 50.0)
    for step in (2, 3):
        shutil.rmtree(run / "checkpoints" / f"step-{step:08}")
    note_overrides(run, options)
    train_here(tmp_path, f"resume={run}")
    assert best() == (1, 50.0) and scores == []


def test_a_list_of_images_that_cannot_be_written_hides_no_error(tmp_path, monkeypatch):
    monkeypatch.setattr(classify.Task, "loss", poisoned(classify.Task.loss, at=0))
    path = tmp_path / "run" / "nonfinite"
    path.parent.mkdir()
    path.write_text("in the way")
    said = rf"is nan .* and 27 more, but the list of all of them could not be written to {path}/step-00000000.txt: "
    with pytest.raises(train.NotFinite, match=said):
        train_here(tmp_path, *QUICK, "name=run")


def test_images_that_lie_in_files_are_called_by_them(tmp_path):
    for name in ("train/a/0", "train/b/1", "val/a/2", "val/b/3"):
        path = tmp_path / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(path)
    source = data.build(config.compose(["data=imagefolder", f"data.root={tmp_path}"])).train
    assert train.named(source, [1, 0]) == [f"{tmp_path}/train/b/1.png", f"{tmp_path}/train/a/0.png"]


def test_a_run_that_failed_in_its_first_step_goes_on_as_a_new_one(tmp_path, monkeypatch, run):
    """Nothing is measured before something is learned."""
    options = [*QUICK, f"out={tmp_path}", "name=run"]
    with monkeypatch.context() as patch, pytest.raises(train.NotFinite, match=r"the state after step 0 is saved"):
        patch.setattr(classify.Task, "loss", poisoned(classify.Task.loss, at=0))
        train_here(tmp_path, *options)
    note_overrides(tmp_path / "run", options)
    train_here(tmp_path, f"resume={tmp_path / 'run'}")
    measured = [[line["step"] for line in lines(folder) if "val_top1" in line] for folder in (tmp_path / "run", run)]
    assert measured[0] == measured[1] == [5, 6]


def poisoned(loss, at):
    """The same loss, of images that are no numbers once: running statistics of the norms are hit as well."""

    def function(self, model, images, targets, *, draw):
        return loss(self, model, images * math.nan if draw == at else images, targets, draw=draw)

    return function


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.batch_size=33", "cannot be split into train.accumulate=2"),
        ("data.batch_size=4000", "fewer than one batch"),
        ("sched.cooldown=1", "cooldown of 50 steps does not fit into 6"),
        ("hardware.device=cuda:9", "hardware.device=cuda:9"),
        ("train.save_every=0", "train.save_every: 0 is too few"),
        ("model.num_classes=7", "model.num_classes=7 is less than the 10 classes"),
        ("optim.opt=adamwx", "is not an optimiser of timm .did you mean adamw"),
        ("+model.kwargs={no_such: 1}", "could not be built"),
        ("logger.wandb=true", "logger.wandb=true does not set the project of the run: type logger=wandb"),
        ("+model.in_chans=1", "all images have three channels here, greyscale ones too"),
    ],
)
def test_bad_options(tmp_path, override, message):
    with pytest.raises(Exception, match=message) as error:
        train_here(tmp_path, *QUICK, "train.accumulate=2", override)
    assert isinstance(error.value, (config.ConfigError, RuntimeError))
    assert not list(tmp_path.iterdir()), "an experiment that cannot begin leaves no folder"


def test_a_batch_norm_on_one_value_is_explained(tmp_path, monkeypatch):
    parts = [*QUICK, "data.batch_size=2", "train.micro_batch=1", "data.workers=0"]
    with pytest.raises(config.ConfigError, match=r"^test_resnet cannot .* one image .* train\.micro_batch=2 or more, "):
        train_here(tmp_path, *parts)

    def failing(*_, draw):
        raise ValueError(f"another, in part {draw}")

    monkeypatch.setattr(classify.Task, "loss", failing)
    with pytest.raises(ValueError, match="another, in part 0"):
        train_here(tmp_path, *parts)


def test_one_class_alone_is_refused_before_anything_is_trained(tmp_path):
    for split in ("train", "val"):
        (tmp_path / "photos" / split / "cat").mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "photos" / split / "cat" / "one.png")
    photos = ["data=imagefolder", f"data.root={tmp_path / 'photos'}", "data.batch_size=1"]
    with pytest.raises(DataError, match="data=imagefolder has only one class, cat: there is nothing to learn"):
        train_here(tmp_path, "model=timm", "model.name=test_resnet", *photos, "name=run")
    assert not (tmp_path / "run").exists()


def test_a_model_of_more_classes_than_the_data(tmp_path):
    train_here(tmp_path, *QUICK, "train.steps=2", "model.num_classes=12", "augment.mixup=0.2", "name=run")
    noted = json.loads((tmp_path / "run" / "data.json").read_text())
    assert noted["num_classes"] == 12 and noted["class_names"][8:] == ["8", "9", "10", "11"]
    assert "val_top1" in lines(tmp_path / "run")[-1]


@pytest.mark.parametrize(
    "error", [LocalEntryNotFoundError("no network\nand more"), zoo.CheckpointError(f"do so, or pass {models.OVERLAY}")]
)
def test_released_weights_that_cannot_be_had(error):
    """timm's model, or one of the zoo, asks the hub in vain: the message names the key that takes a file."""

    def unreachable(*_, **options):
        raise error

    with pytest.raises((config.ConfigError, zoo.CheckpointError), match=r"model.checkpoint=<file>") as raised:
        models.build(unreachable, "test_resnet", {"pretrained": True}, {"img_size": 32})
    assert "overlay" not in str(raised.value) and "and more" not in str(raised.value)
    unreachable.__module__ = "zoo.heads.segmenter"  # which gives them to its backbone
    with pytest.raises((config.ConfigError, zoo.CheckpointError), match=r"model.backbone=<file>"):
        models.build(unreachable, "test_resnet", {"pretrained": True}, {})


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RunError, match="cannot write to the run folder"):
        train_here(tmp_path / "file", *QUICK)


def test_a_log_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    sink = log.Jsonl(tmp_path / "metrics.jsonl")
    with pytest.raises(log.LogError, match=r"could not write .*metrics.jsonl: .*No space left on device$"):
        sink.write({"step": 1})
    monkeypatch.setattr("zoo.files.secrets.token_hex", lambda _: "0")
    (tmp_path / ".validation-0.png").symlink_to("/dev/full")
    with pytest.raises(log.LogError, match=r"could not write .*validation.png: .*No space left on device"):
        sink.picture(2, Image.new("RGB", (8, 8)))


def test_curves_that_another_clock_has_dated_are_drawn_anew(run):
    path, now = run / "curves.png", time.time()
    begun = Run(run, OmegaConf.load(run / "config.yaml"), checkpoint.Store(run / "checkpoints"))
    for age, drawn in ((30, False), (90, True), (-30, True)):
        os.utime(path, (now - age, now - age))
        before = path.stat().st_mtime_ns
        begun.draw("top1", every=60)
        assert (path.stat().st_mtime_ns != before) == drawn, age


def test_a_report_is_whole_without_its_curves(run, tmp_path, monkeypatch, capsys):
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    begun = Run(folder, OmegaConf.load(folder / "config.yaml"), checkpoint.Store(folder / "checkpoints"))
    task = classify.Task(begun.cfg)
    made = task.build_data()

    def failing(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("recipes.run.draw_curves", failing)
    unwritten = f"could not write {folder / 'curves.png'}: [Errno 28] No space left on device"
    for finished, then in ((True, ""), (False, f"; then resume with: {begun.resume_command}")):
        (folder / "README.md").unlink()
        with pytest.raises(RunError) as raised:
            begun.report(task, made, task.build_model(made, pretrained=False), finished=finished)
        assert str(raised.value) == unwritten + then
        said = capsys.readouterr().out.replace("\n", "")
        assert "evaluations" in said and "best top1" in said and "evaluate with: " in said
        assert (folder / "README.md").exists() and ("resume with: " in said) != finished


def test_a_log_that_fails_is_an_error_though_a_signal_came(tmp_path, monkeypatch, capsys):
    """At the last evaluation, after which nothing is left to be done but what the log lacks."""
    written, write_checkpoint, saving = log.Jsonl.write, checkpoint.write, []

    def write(self, line):
        with log.writing(self.path):
            if "val_top1" in line:
                os.kill(os.getpid(), signal.SIGTERM)
                raise OSError(28, "No space left on device")
        written(self, line)

    def noted(*args):
        saving.append(stop._SAVING.is_set())
        write_checkpoint(*args)

    monkeypatch.setattr(log.Jsonl, "write", write)
    monkeypatch.setattr(checkpoint, "write", noted)
    with pytest.raises(log.LogError, match=r"No space left on device\nthe state after step 2 is saved; resume with"):
        train_here(tmp_path, *QUICK, "train.steps=2", "name=run")
    assert saving == [True, True] and not stop._SAVING.is_set()
    said = capsys.readouterr().out.replace("\n", " ")
    assert "and saving; another SIGTERM, after 30 seconds, stops at once, without saving" in said


def test_a_run_is_exported_within_a_launch(run, monkeypatch):
    """A shell in a job of several processes has the variables of a launcher, and no process to meet."""
    for name, value in zip(distributed.LAUNCHED, ("1", "2", "1", "127.0.0.1", "1"), strict=True):
        monkeypatch.setenv(name, value)
    weights = find_checkpoint(run).tensors("ema")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in export.build(run).state_dict().items())
    assert (distributed.rank(), distributed.size()) == (1, 2)


def test_a_checkpoint_that_a_run_in_progress_replaces_is_looked_for_anew(run, tmp_path, monkeypatch, capsys):
    folder = Path(shutil.copytree(run / "checkpoints", tmp_path / "checkpoints"))
    read, (old,) = checkpoint.read, folder.glob("best-*")
    new = old.with_name("best-00000099")

    def replaced_first(path):
        if path == old:
            renumber(old, new)
        return read(path)

    monkeypatch.setattr(checkpoint, "read", replaced_first)
    assert find_checkpoint(tmp_path).path == new and capsys.readouterr().out == ""
    weights, place = find_weights(tmp_path).tensors, new.with_name("best-00000100")

    def replaced_again(self, part):
        if self.path == new:
            renumber(new, place)
        return tensors(self, part)

    tensors = checkpoint.Checkpoint.tensors
    monkeypatch.setattr(checkpoint.Checkpoint, "tensors", replaced_again)
    kept = find_weights(tmp_path)
    assert kept.checkpoint.path == place and kept.place == place / "ema.safetensors"
    assert all(torch.equal(tensor, weights[name]) for name, tensor in kept.tensors.items())

    def failing(self, part):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(checkpoint.Checkpoint, "tensors", failing)
    with pytest.raises(RunError, match=r"could not read \S+best-00000100: .*Input/output error"):
        find_weights(tmp_path)


def test_skipped_steps_count_in_the_speed_but_not_in_the_loss(tmp_path):
    plan = SimpleNamespace(steps=2, per_epoch=2, batch=8)
    with log.Log([log.Jsonl(tmp_path / "log")], log.Meter(), plan, start=0, every=2, memory=lambda: 0.0) as logs:
        for step, skipped in ((1, True), (2, False)):
            logs.step(step, 3.0 / step, lr=0.1, grad_norm=1.0, seconds=1.0, waited=0.25, skipped=skipped)
    (line,) = log.history(tmp_path / "log")
    assert (line["images_per_s"], line["data_wait"], line["loss"], line["skipped"]) == (8, 0.25, 1.5, 1)


def test_a_log_is_read_without_what_a_kill_or_a_power_cut_left(tmp_path):
    (tmp_path / "m.jsonl").write_bytes(b'{"step": 1}\n{"step": 2}\n\x00\x00\xff{"step": 3}\n{"step": 4}\n{"st')
    assert [line["step"] for line in log.history(tmp_path / "m.jsonl")] == [1, 2, 4]


def test_ctrl_c_saves_though_nobody_reads_the_output(tmp_path):
    """As `2>&1 | tee log`, which Ctrl-C ends first."""
    child = start("train.py", *QUICK, "train.steps=40", "train.save_every=1000", "name=run", cwd=tmp_path)
    run = tmp_path / "runs" / "run"
    wait_for(child, lambda: trained(run, 2))
    child.stdout.close()
    os.kill(child.pid, signal.SIGINT)
    assert child.wait(PATIENCE) == 130
    saved, _ = checkpoint.Store(run / "checkpoints").newest()
    assert 2 <= saved.state["step"] == max(line["step"] for line in lines(run)) < 40


def test_a_full_disk_under_the_output_does_not_end_a_run(tmp_path, monkeypatch, capfd):
    with open("/dev/full", "w") as full:
        output = console.Output(file=full)
        monkeypatch.setattr(console, "CONSOLE", output)
        monkeypatch.setattr("recipes.log.CONSOLE", output)
        monkeypatch.setattr("recipes.run.CONSOLE", output)
        train_here(tmp_path, *QUICK, "train.steps=2", "name=run")
    assert lines(tmp_path / "run")[-1]["step"] == 2
    assert capfd.readouterr().err.count("nothing more is printed") == 1


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path):
    child = start("train.py", *QUICK, "train.steps=40", "train.save_every=1000", "data.workers=1", 'name="my run=1"',
                  cwd=tmp_path)  # fmt: skip
    run = tmp_path / "runs" / "my run=1"
    wait_for(child, lambda: trained(run, 3))
    os.kill(child.pid, signal.SIGINT)
    output = finish(child)
    assert child.returncode == 130 and "Traceback" not in output, output
    command = output.split("resume with: ")[1].splitlines()[0]
    done = max(line["step"] for line in lines(run))
    assert done < 40
    assert config.compose(shlex.split(command)[2:]).resume == "runs/my run=1"
    saved, _ = checkpoint.Store(run / "checkpoints").newest()
    assert saved.state["step"] == done
