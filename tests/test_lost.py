"""Whatever stops a run, it goes on, and ends with the weights, bit for bit, of one that was left alone."""

import contextlib
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from children import (
    SMALL,
    Forked,
    assert_same,
    fork,
    lines,
    lost_after,
    note_overrides,
    poisoned,
    train_here,
    trained,
    wait_for,
)
from recipes import config, train
from recipes.checkpoint import CheckpointError, Store
from recipes.run import open_run
from recipes.settings import RunError
from recipes.stop import REQUEUE
from recipes.tasks import classify
from recipes.weights import find_checkpoint

# augmentation, Mixup, moving average, accumulation, three evaluations
RUN = [*SMALL, "train.steps=12", "train.eval_every=0.1", "train.save_every=2", "train.accumulate=2"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    return whole(tmp_path_factory.mktemp("undisturbed"), *RUN)


def whole(folder: Path, *overrides: str) -> Path:
    """A run from its start to its end."""
    child = fork(*overrides, "name=whole", "out=.", cwd=folder)
    assert child.output() and child.exitcode == 0, child.output()
    assert (folder / "whole" / "checkpoints" / "step-00000012").is_dir()
    return folder / "whole"


def resume(run: Path, undisturbed: Path, *overrides: str, damaged: tuple[str, ...] = ()) -> str:
    """Go on to the end, which must be the one of the undisturbed run; what was said. `damaged` as in `assert_same`."""
    child = fork(f"resume={run}", *overrides, cwd=run.parent)
    output = child.output()
    assert child.exitcode == 0, output
    assert_same(run, undisturbed, damaged)
    return output


def stopped(child: Forked, code: int) -> str:
    """The end of a process that stops by itself, in words; what it said."""
    output = child.output()
    assert child.exitcode == code and "Traceback" not in output, output
    return output


def saved(run: Path) -> int:
    """The step of the newest checkpoint, which must be whole."""
    newest, problems = Store(run / "checkpoints").newest()
    assert newest is not None and problems == [] and not list(run.rglob(".writing-*"))
    return newest.state["step"]


@pytest.mark.parametrize("kills", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_moments(tmp_path, undisturbed, kills):
    draw, began = random.Random(0), time.monotonic()
    assert fork(*RUN, "name=timed", cwd=tmp_path).output()
    life, killed, finished, resumed = time.monotonic() - began, 0, 0, 0
    while killed < kills:
        run = tmp_path / "runs" / f"run-{finished}"
        there = (run / "config.yaml").is_file()
        child = fork(*RUN, f"name={run.name}", "resume=auto", cwd=tmp_path)
        child.join(draw.uniform(0, life))
        child.kill()
        went_on = "resuming" in child.output()
        assert child.exitcode in (0, -signal.SIGKILL), child.output()
        resumed += went_on
        if child.exitcode == 0:
            finished += 1
        elif went_on or (not there and (run / "config.yaml").is_file()):  # else it had not come to the run yet
            killed += 1
    child = fork(*RUN, f"name=run-{finished}", "resume=auto", cwd=tmp_path)
    resumed += "resuming" in child.output()
    assert child.exitcode == 0 and resumed == killed == kills
    for number in range(finished + 1):
        assert_same(tmp_path / "runs" / f"run-{number}", undisturbed)
    print(f"killed {killed} times, resumed {resumed} times: the weights of {finished + 1} runs are equal")


@pytest.mark.parametrize("number, readers", [(signal.SIGTERM, 1), (signal.SIGUSR1, 0)])
def test_a_scheduler_stops_it(tmp_path, undisturbed, number, readers):
    child = fork(*RUN, "train.save_every=1000", f"data.workers={readers}", "name=run", "out=.", cwd=tmp_path)
    wait_for(child, lambda: trained(tmp_path / "run", 3))
    for pid in (*workers(child), child.pid):  # a scheduler signals every process
        os.kill(pid, number)
    output = stopped(child, REQUEUE)
    assert "resume with: python train.py resume=run" in output and "nothing to save" not in output
    assert 3 <= saved(tmp_path / "run") < 12
    resume(tmp_path / "run", undisturbed, "train.save_every=2", "data.workers=0")


def workers(child: Forked) -> list[int]:
    """The processes that read data for a child."""
    return [int(pid) for pid in Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()]


def test_a_data_worker_is_killed(tmp_path, undisturbed):
    child = fork(*RUN, "train.save_every=1000", "data.workers=2", "name=run", "out=.", cwd=tmp_path)
    wait_for(child, lambda: trained(tmp_path / "run", 3))
    os.kill(workers(child)[0], signal.SIGKILL)
    output = stopped(child, 2)
    assert "a process reading the training set of digits died" in output and "is saved; resume with" in output
    assert 3 <= saved(tmp_path / "run") < 12
    resume(tmp_path / "run", undisturbed, "train.save_every=2", "data.workers=0")


def test_the_disk_takes_no_more(tmp_path, undisturbed):
    child = fork(*RUN, "name=run", "out=.", cwd=tmp_path)
    wait_for(child, lambda: any((tmp_path / "run" / "checkpoints").glob("step-*")))
    # no file may grow beyond 100 kB from here on: the system's own error, as of a full disk
    resource.prlimit(child.pid, resource.RLIMIT_FSIZE, (100_000, 100_000))
    output = stopped(child, 2)
    assert "could not write the checkpoint" in output and "is intact" in output and "resume=" in output
    assert saved(tmp_path / "run") < 12
    resume(tmp_path / "run", undisturbed)


@pytest.fixture
def mounted(tmp_path):
    """A small file system of its own; the function remounts it with other options."""
    folder = tmp_path / "mounted"
    folder.mkdir()

    def mount(*options: str) -> None:
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", folder], check=True, capture_output=True
        )

    try:
        mount("size=20m")
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no file system can be mounted here: {error}")
    yield folder, lambda *options: mount("remount", *options)
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk(mounted, undisturbed):
    folder, remount = mounted
    child = fork(*RUN, "name=run", "out=.", "train.keep=9", cwd=folder)
    output = stopped(child, 2)
    assert "No space left on device" in output
    assert saved(folder / "run") < 12
    remount("size=64m")
    resume(folder / "run", undisturbed, "train.keep=2")


@contextlib.contextmanager
def read_only(folder: Path):
    """Nothing can be written in the folder, not even by root."""
    bind, lock = (["mount", "--bind", folder, folder], ["mount", "-o", "remount,bind,ro", folder])
    if subprocess.run(bind, capture_output=True, check=False).returncode:
        pytest.skip("no folder can be mounted here")
    try:
        subprocess.run(lock, check=True)
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_folder_that_becomes_read_only(tmp_path, undisturbed):
    run = tmp_path / "run"
    child = fork(*RUN, "name=run", "out=.", cwd=tmp_path)
    wait_for(child, lambda: trained(run, 3))
    with read_only(run / "checkpoints"):
        output = stopped(child, 2)
    assert "could not write the checkpoint" in output and "Read-only file system" in output and "is intact" in output
    with read_only(run):
        output = stopped(fork(f"resume={run}", cwd=tmp_path), 2)
    assert "cannot write to the run folder" in output and "Read-only file system" in output
    assert saved(run) < 12
    resume(run, undisturbed)


@pytest.mark.parametrize("harm", ["corrupt", "edited", "missing"])
def test_the_last_checkpoint_is_no_use(tmp_path, undisturbed, harm):
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    newest, before = (run / "checkpoints" / name for name in ("step-00000012", "step-00000010"))
    if harm == "missing":
        shutil.rmtree(newest)
    elif harm == "edited":
        text = (newest / "state.json").read_text()
        (newest / "state.json").write_text(text.replace('"step": 12', '"step": 10'))
    else:
        with open(newest / "model.safetensors", "r+b") as file:
            file.seek(-100, os.SEEK_END)
            file.write(b"\x00\xff" * 20)
    output = resume(run, undisturbed, damaged=() if harm == "missing" else (newest.name,))
    assert f"resuming {run} from step 10" in output and "its log reaches step 12" in output and before.exists()
    if harm != "missing":
        assert "damaged checkpoint skipped" in output and newest.name in output


def test_two_processes_in_one_folder(tmp_path, undisturbed):
    children = [fork(*RUN, "name=run", cwd=tmp_path) for _ in range(2)]
    outputs = [child.output() for child in children]
    assert sorted(child.exitcode for child in children) == [0, 2], outputs
    refused = outputs[[child.exitcode for child in children].index(2)]
    assert "is in use by another process" in refused or "already holds a run" in refused
    assert_same(tmp_path / "runs" / "run", undisturbed)


def test_a_folder_that_another_process_takes_first(tmp_path):
    """Both found it free; the second comes to it when the first has finished."""
    options = [*RUN, "train.steps=1", "name=run", f"out={tmp_path}"]
    late = open_run(config.compose(options), options)
    train_here(tmp_path, *options)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(RunError, match="already holds a run"):
        late.begin(options, classify.Task(late.cfg).build_data())
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_in_whose_place_another_run_trains(tmp_path, undisturbed):
    """The first process holds the lock of a folder that is elsewhere by now: nothing of it gets into the new one."""
    run, moved = tmp_path / "run", tmp_path / "moved"
    child = fork(*RUN, "name=run", "out=.", cwd=tmp_path)
    wait_for(child, lambda: trained(run, 3))
    os.kill(child.pid, signal.SIGSTOP)
    run.rename(moved)
    second = fork(*RUN, "name=run", "out=.", cwd=tmp_path)
    assert second.output() and second.exitcode == 0, second.output()
    os.kill(child.pid, signal.SIGCONT)
    output = stopped(child, 2)
    assert "the run folder run was removed or replaced while this run trained (another .lock is in it)" in output
    assert_same(run, undisturbed)
    resume(moved, undisturbed)


def test_a_folder_that_is_removed(tmp_path):
    options = [*RUN, "name=run", f"out={tmp_path}"]
    run = open_run(config.compose(options), options)
    run.begin(options, classify.Task(run.cfg).build_data())
    shutil.rmtree(run.folder)
    with pytest.raises(CheckpointError, match=r"was removed or replaced .*No such file or directory.* another name="):
        run.save(None)
    assert not run.folder.exists()
    (run.folder / "checkpoints").mkdir(parents=True)  # as an older version left it
    for more in ([], ["resume=auto"]):
        with pytest.raises(RunError, match=r"holds checkpoints but no config\.yaml.*move or remove the folder"):
            open_run(config.compose([*options, *more]), options)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Two classes of small pictures, in a folder."""
    folder, draw = tmp_path_factory.mktemp("photos"), random.Random(0)
    for split, count in (("train", 64), ("val", 8)):
        for name in ("cat", "dog"):
            (folder / split / name).mkdir(parents=True)
            for index in range(count):
                colour = tuple(draw.randrange(256) for _ in range(3))
                Image.new("RGB", (40, 40), colour).save(folder / split / name / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def photographed(photos, tmp_path_factory) -> Path:
    """An undisturbed run on the pictures."""
    return whole(tmp_path_factory.mktemp("photographed"), *_photo_run(photos))


def _photo_run(photos: Path) -> list[str]:
    return [*RUN, "data=imagefolder", f"data.root={photos}", "train.eval_every=1.5", "data.val_fraction=null"]


@pytest.mark.parametrize("split, workers", [("train", 0), ("train", 2), ("val", 0)])
def test_the_data_vanishes(tmp_path, photos, photographed, split, workers):
    data = tmp_path / "photos"
    shutil.copytree(photos, data)
    child = fork(
        *_photo_run(data), f"data.workers={workers}", "train.save_every=1000", "name=run", "out=.", cwd=tmp_path
    )
    wait_for(child, lambda: trained(tmp_path / "run", 3))
    (data / split).rename(data / "away")
    output = stopped(child, 2)
    assert f"{data / split}" in output and "is saved; resume with" in output
    assert 3 <= saved(tmp_path / "run") < 12
    (data / "away").rename(data / split)
    resume(tmp_path / "run", photographed, "train.save_every=2")


def test_better_weights_are_found_before_the_step_of_the_best(tmp_path, monkeypatch, capsys):
    """As by a run that goes on with more evaluations: the new best weights are those that everything shows."""
    right = 0.5  # of the answers

    def answers(self, model, images, targets):
        wrong = torch.arange(len(targets)) >= right * len(targets)
        return torch.nn.functional.one_hot((targets + wrong) % 10, 10).float()

    monkeypatch.setattr(classify.Task, "predict_with", answers)
    options = [*SMALL, "train.steps=3", "train.eval_steps=3", "train.save_every=1", "train.keep=9", f"out={tmp_path}"]
    train_here(tmp_path, *options, "name=run")
    checkpoints = tmp_path / "run" / "checkpoints"
    for step in (2, 3):
        shutil.rmtree(checkpoints / f"step-{step:08}")
    note_overrides(tmp_path / "run", [*options, "name=run", "train.eval_steps=1"])
    assert "best top1 50.00 after step 3" in capsys.readouterr().out
    right = 1.0
    train_here(tmp_path, f"resume={tmp_path / 'run'}")
    assert "best top1 100.00 after step 1" in capsys.readouterr().out
    assert "| top1 | 100.0000 |" in (tmp_path / "run" / "README.md").read_text()
    assert find_checkpoint(tmp_path / "run").path == checkpoints / "best-00000001"


SKIP = [*RUN, "train.skip_nonfinite=2"]


def test_steps_without_a_gradient_are_skipped(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(classify.Task, "loss", poisoned(classify.Task.loss, {3, 4, 6}, accumulate=2))
    options = [*SKIP, "train.keep=9", f"out={tmp_path}"]
    train_here(tmp_path, *options, "name=whole")
    assert capsys.readouterr().out.count("this step is skipped") == 3
    found = lines(tmp_path / "whole")
    assert [line["step"] for line in found if line.get("skipped")] == [4, 5, 7]
    assert all(line["loss"] is None for line in found if line.get("skipped"))
    # gone on with from between two skipped steps, it counts on and ends the same
    cut = lost_after(4, tmp_path / "whole", tmp_path / "cut")
    note_overrides(cut, [*options, "name=whole"])
    train_here(tmp_path, f"resume={cut}")
    assert "from step 4" in capsys.readouterr().out
    for part in ("model", "ema", "optimizer"):
        file = Path("checkpoints") / "step-00000012" / f"{part}.safetensors"
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "cut" / file).read_bytes()


def test_too_many_steps_without_a_gradient(tmp_path, monkeypatch):
    monkeypatch.setattr(classify.Task, "loss", poisoned(classify.Task.loss, {3, 4, 5}, accumulate=2))
    with pytest.raises(train.NotFinite, match=r"(?s)at step 5 .*after 2 steps that were skipped.*saved; resume with"):
        train_here(tmp_path, *SKIP, "name=run")
    newest, _ = Store(tmp_path / "run" / "checkpoints").newest()
    assert (newest.state["step"], newest.state["skipped"]) == (5, 2)
    assert all(tensor.isfinite().all() for tensor in newest.tensors("model").values())
    note_overrides(tmp_path / "run", [*SKIP, f"out={tmp_path}", "name=run"])
    written = newest.path.stat().st_ino
    with pytest.raises(
        train.NotFinite, match=r"at step 5 .*after 2 steps that were"
    ):  # it counts on, and stops as before
        train_here(tmp_path, f"resume={tmp_path / 'run'}")
    assert newest.path.stat().st_ino == written  # the checkpoint that was resumed is not written once more
