"""The loop and what it leaves in the run folder; what it says when something is wrong."""

import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from children import (
    PATIENCE,
    QUICK,
    SMALL,
    finish,
    fork,
    lines,
    no_space,
    note_overrides,
    poisoned,
    renumber,
    start,
    train_here,
    trained,
    wait_for,
)
from recipes import checkpoint, config, distributed, export, log, train
from recipes.run import Run, open_run
from recipes.settings import RunError, config_to_evaluate, config_to_resume
from recipes.tasks import classify
from recipes.weights import find_checkpoint, find_weights


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
        train_here(tmp_path, *QUICK, "train.steps=3", f"++data.on_bad_image={how}", f"name={how}")
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


def test_a_folder_goes_on_under_its_own_name(tmp_path, run):
    copy = shutil.copytree(run, tmp_path / "copy")
    note_overrides(copy, QUICK)
    with pytest.raises(RunError, match=r"copy goes on in that folder, and name=b is another: .* model\.checkpoint="):
        train_here(tmp_path, f"resume={copy}", "name=b")
    train_here(tmp_path, f"resume={copy}", "name=copy")  # a finished run: nothing is left to do


def test_a_folder_goes_on_where_it_lies(tmp_path, run):
    copy = shutil.copytree(run, tmp_path / "copy")
    note_overrides(copy, QUICK)
    typed = [f"resume={copy}", "out=elsewhere"]
    with pytest.raises(RunError, match=r"copy goes on in that folder, and out=elsewhere is not where it lies: leave o"):
        open_run(config.compose(typed), typed)
    for typed in ([f"resume={copy}"], [f"resume={copy}", f"out={tmp_path}"]):
        assert open_run(config.compose(typed), typed).folder == copy


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


def test_a_run_is_in_use_until_the_next_of_its_process(tmp_path):
    """As in a sweep, whose finished runs may be resumed elsewhere."""
    lock = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'a'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    for name in ("first", "second"):
        train_here(tmp_path, *QUICK, "train.steps=1", f"name={name}")
    taken = [
        subprocess.run([sys.executable, "-c", lock, tmp_path / name / ".lock"], stderr=subprocess.DEVNULL).returncode
        for name in ("first", "second")
    ]
    assert taken == [0, 1]


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


def test_a_run_that_failed_in_its_first_step_goes_on_as_a_new_one(tmp_path, monkeypatch, run):
    """Nothing is measured before something is learned."""
    options = [*QUICK, f"out={tmp_path}", "name=run"]
    with monkeypatch.context() as patch, pytest.raises(train.NotFinite, match=r"the state after step 0 is saved"):
        patch.setattr(classify.Task, "loss", poisoned(classify.Task.loss, {0}))
        train_here(tmp_path, *options)
    note_overrides(tmp_path / "run", options)
    train_here(tmp_path, f"resume={tmp_path / 'run'}")
    measured = [[line["step"] for line in lines(folder) if "val_top1" in line] for folder in (tmp_path / "run", run)]
    assert measured[0] == measured[1] == [5, 6]


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

    monkeypatch.setattr("recipes.run.draw_curves", no_space)
    unwritten = f"could not write {folder / 'curves.png'}: [Errno 28] No space left on device"
    for finished, then in ((True, ""), (False, f"; then resume with: {begun.resume_command}")):
        (folder / "README.md").unlink()
        with pytest.raises(RunError) as raised:
            begun.report(task, made, task.build_model(made, pretrained=False), finished=finished)
        assert str(raised.value) == unwritten + then
        said = capsys.readouterr().out.replace("\n", "")
        assert "evaluations" in said and "best top1" in said and "evaluate with: " in said
        assert (folder / "README.md").exists() and ("resume with: " in said) != finished


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
