"""Several processes, one run: the same curve, the same metrics, one decision, however the work is shared out."""

import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import timm
import torch
import torch.distributed as dist
from PIL import Image
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import zoo
from children import SMALL, flags_restored, lines, lost_after, note_overrides, train_here
from ranks import assert_bits, on_ranks
from recipes import checkpoint, config, data_record, distributed, log, plan, stop, train
from recipes import eval as evaluation
from recipes.config import ConfigError
from recipes.data import DataError, Source
from recipes.run import Run, RunError, find_checkpoint, find_weights
from recipes.stop import REQUEUE, SIGNALS, Stop
from recipes.tasks import classify

# the default recipe (Mixup, drop path, EMA, clipping) in four parts; 181 validation images do not divide by anything
SHARED = [
    *SMALL, "data.val_fraction=0.1005", "data.eval_batch_size=90", "train.accumulate=4", "train.steps=6",
    "train.eval_every=0.1", "train.save_every=3", "sched.warmup=0", "data.workers=0",
]  # fmt: skip
NUMBERS = ("loss", "grad_norm", "lr", "val_loss", "val_top1", "val_top5")
FSDP = "hardware.parallel=fsdp"


def curve(run: Path) -> list[dict]:
    return [{key: line[key] for key in ("step", *NUMBERS) if key in line} for line in lines(run)]


def assert_same_curve(run: Path, other: Path) -> None:
    for one, two in zip(curve(run), curve(other), strict=True):
        assert one == pytest.approx(two, rel=2e-4), (one, two)


def weights(run: Path, kind: str = "step") -> dict[str, torch.Tensor]:
    found, problems = checkpoint.Store(run / "checkpoints").newest(kind)
    assert problems == []
    return found.tensors("model")


def assert_close(run: Path, other: Path, kind: str = "step") -> None:
    ours, theirs = weights(run, kind), weights(other, kind)
    assert ours.keys() == theirs.keys()
    for name in ours:  # Adam turns a gradient of nearly nothing into a whole step, whichever sign it has
        assert torch.allclose(ours[name].double(), theirs[name].double(), rtol=1e-3, atol=2e-3), name


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """One process, two that share the batch, two that share the parameters as well."""
    out = tmp_path_factory.mktemp("out")
    train_here(out, *SHARED, "name=alone")
    assert on_ranks(2, train_here, out, *SHARED, "name=ddp") == [None, None]
    assert on_ranks(2, train_here, out, *SHARED, FSDP, "name=fsdp") == [None, None]
    for name in ("alone", "ddp", "fsdp"):  # these were begun without a command line
        own = [FSDP] if name == "fsdp" else []
        note_overrides(out / name, [*SHARED, *own])
    return out


def test_one_curve(runs):
    assert len(curve(runs / "alone")) == 8
    assert_same_curve(runs / "ddp", runs / "alone")
    assert_same_curve(runs / "fsdp", runs / "ddp")
    assert_close(runs / "ddp", runs / "alone")
    assert_close(runs / "fsdp", runs / "alone", "best")


def test_two_halves_give_the_same_bits_on_one_process_and_on_two(tmp_path):
    """The sum of two gradients has no order: Mixup, drop path, statistics and all else must be the same to the bit."""
    halves = [*SHARED, "train.accumulate=2", "train.steps=3", "train.clip_grad=null"]
    train_here(tmp_path, *halves, "name=alone")
    assert on_ranks(2, train_here, tmp_path, *halves, "name=ddp") == [None, None]
    ours, theirs = weights(tmp_path / "ddp"), weights(tmp_path / "alone")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert_bits(curve(tmp_path / "ddp"), curve(tmp_path / "alone"))


def test_only_one_process_writes(runs):
    files = {name: {path.name for path in (runs / name).iterdir()} for name in ("alone", "ddp", "fsdp")}
    assert files["ddp"] == files["fsdp"] == files["alone"]
    assert [line["step"] for line in lines(runs / "ddp") if "loss" in line] == [1, 2, 3, 4, 5, 6]
    session = (runs / "ddp" / "sessions.jsonl").read_text().splitlines()
    assert len(session) == 1 and json.loads(session[0])["processes"] == 2


def test_what_sharded_processes_leave(runs):
    folder = runs / "fsdp" / "checkpoints"
    assert {path.name for path in (folder / "step-00000006" / "sharded").iterdir()} == {
        ".metadata", "__0_0.distcp", "__1_0.distcp"
    }  # fmt: skip
    best = find_checkpoint(runs / "fsdp")
    assert not best.sharded and best.tensors("model").keys() == best.tensors("ema").keys()
    file = best.path / "ema.safetensors"
    overlay = {"file": str(file), "num_classes": 10}  # timm would leave out a classifier of another size
    model = timm.create_model("test_resnet", num_classes=10, pretrained=True, pretrained_cfg_overlay=overlay)
    saved = best.tensors("ema")
    assert all(torch.equal(tensor, saved[name]) for name, tensor in model.state_dict().items())
    shard = folder / "step-00000006" / "sharded" / "__1_0.distcp"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-7] + b"damaged")
    try:
        found, problems = checkpoint.Store(folder).newest()
        assert found.state["step"] == 3 and "__1_0.distcp is damaged" in problems[0]
    finally:
        shard.write_bytes(whole)


@pytest.mark.parametrize(
    ("begun", "ranks", "parallel"),
    [
        ("fsdp", 1, "fsdp"),
        pytest.param("fsdp", 4, "fsdp", marks=pytest.mark.slow),
        pytest.param("fsdp", 2, "ddp", marks=pytest.mark.slow),
        ("ddp", 2, "fsdp"),
        pytest.param("ddp", 1, "ddp", marks=pytest.mark.slow),
    ],
)
def test_a_run_goes_on_with_another_number_of_processes(runs, tmp_path, begun, ranks, parallel):
    run = lost_after(3, runs / begun, tmp_path / "run")
    assert on_ranks(ranks, train_here, tmp_path, f"resume={run}", f"hardware.parallel={parallel}") == [None] * ranks
    assert_same_curve(run, runs / "alone")


@pytest.mark.parametrize("begun", ["ddp", "fsdp"])
def test_as_many_processes_end_with_the_same_bits(runs, tmp_path, begun):
    run = lost_after(3, runs / begun, tmp_path / "run")
    assert on_ranks(2, train_here, tmp_path, f"resume={run}") == [None, None]
    assert curve(run) == curve(runs / begun)
    for file in ("step-00000006/model.safetensors", "step-00000006/sharded/__1_0.distcp"):
        whole = runs / begun / "checkpoints" / file
        assert whole.exists() == (begun == ("fsdp" if "sharded" in file else "ddp"))
        if whole.exists():
            assert whole.read_bytes() == (run / "checkpoints" / file).read_bytes()


@pytest.mark.slow
def test_three_processes_go_on_with_the_same_bits(tmp_path):
    """Three gradients have an order of summation, which must not depend on when a process was started."""
    thirds = [*SHARED, "data.batch_size=36", "train.accumulate=3"]
    assert on_ranks(3, train_here, tmp_path, *thirds, "name=whole") == [None] * 3
    note_overrides(tmp_path / "whole", thirds)
    run = lost_after(3, tmp_path / "whole", tmp_path / "run")
    assert on_ranks(3, train_here, tmp_path, f"resume={run}") == [None] * 3
    ours, theirs = weights(run), weights(tmp_path / "whole")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def evaluate_here(*overrides: str) -> None:
    with flags_restored():
        evaluation.main.__wrapped__(config.compose(overrides, "eval"))


def test_a_sharded_step_is_weights(runs, tmp_path, capsys):
    """Of a run that was lost before anything was evaluated."""
    run = lost_after(3, runs / "fsdp", tmp_path / "run")
    Image.new("RGB", (8, 8)).save(tmp_path / "image.png")
    asked = [f"run={run}", f"predict={tmp_path / 'image.png'}"]
    assert on_ranks(2, evaluate_here, *asked) == [None, None]
    step = run / "checkpoints" / "step-00000003"
    dcp_to_torch_save(step / "sharded", tmp_path / "step.pth")
    saved = zoo.reader.read(tmp_path / "step.pth").entries
    for given, kind in (("auto", "ema"), ("raw", "raw"), ("ema", "ema")):
        chosen = [*SMALL, f"model.checkpoint={run}", f"model.weights={given}"]
        state = task_model(chosen).state_dict()
        assert f"step-00000003/sharded: layout 'as is', {kind} weights" in capsys.readouterr().out.replace("\n", "")
        assert state.keys() == saved[kind].keys()
        assert all(torch.equal(tensor, saved[kind][name]) for name, tensor in state.items()), given
    assert not all(torch.equal(tensor, saved["raw"][name]) for name, tensor in saved["ema"].items())
    with pytest.raises(ConfigError, match=r"step-00000003 is a sharded checkpoint .*\. The run folder works as well"):
        task_model([*SMALL, f"model.checkpoint={step}"])


def task_model(overrides: list[str]) -> torch.nn.Module:
    task = classify.Task(config.compose(overrides))
    return task.build_model(task.build_data())


@pytest.mark.parametrize(
    ("ranks", "batch"),
    [(2, 90), pytest.param(3, 7, marks=pytest.mark.slow), pytest.param(7, 25, marks=pytest.mark.slow)],
)
def test_an_evaluation_counts_every_image_once(runs, tmp_path, ranks, batch):
    evaluate_here(f"run={runs / 'ddp'}", f"out={tmp_path / 'alone'}")
    overrides = [f"run={runs / 'ddp'}", f"out={tmp_path / 'many'}", f"data.eval_batch_size={batch}"]
    assert on_ranks(ranks, evaluate_here, *overrides) == [None] * ranks
    alone, many = (json.loads((tmp_path / name / "eval.json").read_text()) for name in ("alone", "many"))
    assert many["images"] == 181
    assert [many[key] for key in ("top1", "top5")] == [alone[key] for key in ("top1", "top5")]
    assert many["loss"] == pytest.approx(alone["loss"], rel=1e-6)


def counted() -> tuple[int, list[int]]:
    distributed.join(config.compose([]))
    metrics = classify.Metrics(8)
    if distributed.rank() < 2:  # the third has no image at all
        metrics.update(torch.eye(8)[: 3 + distributed.rank()], torch.arange(3 + distributed.rank()))
    metrics.compute()
    return int(metrics.confusion.compute().sum()), distributed.gathered(distributed.rank())


def test_metrics_of_ranks_with_unequal_numbers_of_images():
    assert on_ranks(3, counted) == [(7, [0, 1, 2])] * 3


def interrupted(out: Path) -> None:
    """The second process alone gets a signal, while its third step is noted."""
    noted = log.Log.step

    def step(self, step, *args, **kwargs):
        if step == 3 and distributed.rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        noted(self, step, *args, **kwargs)

    log.Log.step = step
    train_here(out, *SHARED, "train.steps=40", "name=stopped")


def test_a_signal_to_one_stops_all_after_the_same_step(tmp_path):
    ended = on_ranks(2, interrupted, tmp_path)
    assert [type(end) for end in ended] == [SystemExit] * 2 and ended[0].code == ended[1].code != 0
    saved, _ = checkpoint.Store(tmp_path / "stopped" / "checkpoints").newest()
    assert saved.state["step"] == 3 == lines(tmp_path / "stopped")[-1]["step"]


def signalled_in_the_report(out: Path) -> None:
    """SIGTERM, and again once the run has saved and reports."""
    reported = Run.report

    def report(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        reported(*args, **kwargs)

    Run.report = report
    interrupted(out)


def test_a_signal_that_comes_again_after_the_save_changes_no_status(tmp_path):
    assert [end.code for end in on_ranks(2, signalled_in_the_report, tmp_path)] == [REQUEUE] * 2


def signalled_twice(number: int) -> int | None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell has the tests in its background
    with Stop() as stop:
        for _ in range(2):
            os.kill(os.getpid(), number)
        stop.agree()
    return stop.signal


def hung(end, within=nullcontext, again=(0.3, 0.3)) -> None:
    """Waits in C++ for what never comes, where no handler of Python's is called."""
    stop.AGAIN = dict(zip((signal.SIGINT, signal.SIGTERM), again, strict=True))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True, timeout=timedelta(seconds=100))
    with Stop(), within():
        end.send("waits")
        store.get("what never comes")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_second_signal_ends_what_hangs(capfd, number, status):
    context = multiprocessing.get_context("fork")
    mine, theirs = context.Pipe()
    process = context.Process(target=hung, args=(theirs,))
    process.start()
    assert mine.recv() == "waits"
    for _ in range(3):  # the second comes too soon
        os.kill(process.pid, number)
        time.sleep(0.01 if process.is_alive() else 0)
    time.sleep(0.5)
    assert process.is_alive()
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == status
    assert f"{number.name} again: this process ends at once, without saving" in capfd.readouterr().err


def test_sigterm_is_what_torchrun_makes_of_a_second_ctrl_c(capfd):
    context = multiprocessing.get_context("fork")
    mine, theirs = context.Pipe()
    process = context.Process(target=hung, args=(theirs,), kwargs={"again": (2.0, 100.0)})
    process.start()
    assert mine.recv() == "waits"
    for number in (signal.SIGINT, signal.SIGTERM):  # the second comes too soon
        os.kill(process.pid, number)
        time.sleep(0.5)  # of two at the same time, the second may be handled first
    time.sleep(1.5)
    assert process.is_alive()
    os.kill(process.pid, signal.SIGTERM)
    process.join(60)
    assert process.exitcode == 143
    assert "SIGTERM after SIGINT: this process ends at once, without saving" in capfd.readouterr().err


def test_sigterm_waits_for_a_checkpoint_and_ctrl_c_does_not(capfd):
    context = multiprocessing.get_context("fork")
    mine, theirs = context.Pipe()
    process = context.Process(target=hung, args=(theirs, stop.saving))
    process.start()
    assert mine.recv() == "waits"
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
        os.kill(process.pid, number)
        time.sleep(0.5)
    assert process.is_alive()
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    assert process.exitcode == 130 and "SIGTERM" not in capfd.readouterr().err


def test_a_stop_leaves_signals_as_they_were():
    before = [signal.getsignal(number) for number in SIGNALS]
    files = len(os.listdir("/proc/self/fd"))
    with Stop():
        assert len(os.listdir("/proc/self/fd")) == files + 2
    assert [signal.getsignal(number) for number in SIGNALS] == before
    assert len(os.listdir("/proc/self/fd")) == files and signal.set_wakeup_fd(-1) == -1


def test_what_a_scheduler_sends_may_come_more_than_once():
    """Slurm's SIGTERM reaches torchrun, which hands it on, and the processes too."""
    assert on_ranks(1, signalled_twice, signal.SIGTERM) == [signal.SIGTERM]
    assert on_ranks(1, signalled_twice, signal.SIGUSR1) == [signal.SIGUSR1]
    assert on_ranks(1, hung_up) == [signal.SIGHUP]
    assert isinstance(on_ranks(1, signalled_twice, signal.SIGINT)[0], KeyboardInterrupt)


def hung_up() -> int | None:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may run under nohup
    return signalled_twice(signal.SIGHUP)


def under_nohup() -> int | None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    return signalled_twice(signal.SIGHUP)


def test_a_signal_that_nohup_ignores_stays_ignored():
    assert on_ranks(1, under_nohup) == [None]


def in_the_middle_of_a_line() -> int | None:
    """The handler cannot print: a file refuses to be written within a write."""

    def reentrant(*_):
        raise RuntimeError("reentrant call inside <_io.BufferedWriter>")

    stop.say = reentrant
    return signalled_twice(signal.SIGTERM)


def test_a_signal_in_the_middle_of_a_line_is_noted():
    assert on_ranks(1, in_the_middle_of_a_line) == [signal.SIGTERM]


def told(number: int) -> str:
    """What a launched process says of a signal."""
    said = []
    stop.say = lambda text, style: said.append(text)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    with Stop():
        os.kill(os.getpid(), number)
    return said[0]


def test_what_ctrl_c_will_do_again_depends_on_torchrun(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert "press Ctrl-C again to stop at once" in on_ranks(1, told, signal.SIGINT)[0]
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    assert "press Ctrl-C again after 5 seconds to stop at once" in on_ranks(1, told, signal.SIGINT)[0]
    assert on_ranks(1, told, signal.SIGHUP) == ["stopping after this step and saving"]


def stopped_in_evaluation(out: Path) -> None:
    """The second process alone gets a signal, in the first of two rounds of its first evaluation."""
    predict = classify.Task.predict

    def function(self, model, images):
        if distributed.rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return predict(self, model, images)

    classify.Task.predict = function
    train_here(out, *SHARED, "train.save_every=100", "name=cut-off")


def test_a_signal_cuts_an_evaluation_off_and_it_is_made_up_for(runs, tmp_path):
    ended = on_ranks(2, stopped_in_evaluation, tmp_path)
    assert [type(end) for end in ended] == [SystemExit] * 2 and ended[0].code == ended[1].code == REQUEUE
    run = tmp_path / "cut-off"
    saved, _ = checkpoint.Store(run / "checkpoints").newest()
    assert saved.state["step"] == 5 == lines(run)[-1]["step"] and not any("val_loss" in line for line in lines(run))
    note_overrides(run, SHARED)
    assert on_ranks(2, train_here, tmp_path, f"resume={run}") == [None, None]
    assert_bits(curve(run), curve(runs / "ddp"))


def poisoned(out: Path) -> None:
    loss = classify.Task.loss

    def function(self, model, images, targets, *, draw):
        bad = distributed.rank() == 1 and draw // 4 == 2
        return loss(self, model, images * math.nan if bad else images, targets, draw=draw)

    classify.Task.loss = function
    train_here(out, *SHARED, "name=poisoned")


def test_no_number_on_one_is_none_on_any(tmp_path):
    ended = on_ranks(2, poisoned, tmp_path)
    assert [type(end) for end in ended] == [train.NotFinite] * 2 and "at step 2" in str(ended[0])
    listed = (tmp_path / "poisoned" / "nonfinite" / "step-00000002.txt").read_text().splitlines()
    assert len(set(listed)) == 32 and [str(end) for end in ended] == [str(ended[0])] * 2
    saved, _ = checkpoint.Store(tmp_path / "poisoned" / "checkpoints").newest()
    assert saved.state["step"] == 2
    assert all(tensor.isfinite().all() for tensor in saved.tensors("model").values())


def unreadable(out: Path) -> None:
    draw = Source.draw

    def function(self, index, epoch, copy=0, **options):
        if distributed.rank() == 1 and getattr(Source, "drawn", 0) > 40:
            raise DataError("the disk is gone")
        Source.drawn = getattr(Source, "drawn", 0) + 1
        return draw(self, index, epoch, copy, **options)

    Source.draw = function
    train_here(out, *SHARED, "name=unreadable")


def test_what_one_cannot_read_stops_all_with_one_error(tmp_path):
    ended = on_ranks(2, unreadable, tmp_path)
    assert [type(end) for end in ended] == [DataError] * 2
    assert all("the disk is gone" in str(end) for end in ended)


def test_a_folder_that_one_cannot_make_is_an_error_of_all(tmp_path):
    (tmp_path / "file").write_text("in the way")
    ended = on_ranks(2, train_here, tmp_path / "file", *SHARED)
    assert [type(end) for end in ended] == [RunError] * 2 and "cannot write to the run folder" in str(ended[1])


def full(out: Path) -> None:
    """From the second checkpoint on the first process finds no room; the other has nothing to do with it."""
    written = checkpoint._write_part

    def function(path, tree):
        if "step-00000006" in str(path):
            raise OSError(28, "No space left on device")
        written(path, tree)

    checkpoint._write_part = function
    train_here(out, *SHARED, "name=full")


def full_of_shards(out: Path) -> None:
    """As `full`, on the second process, which alone cannot write its part."""
    from torch.distributed.checkpoint.filesystem import FileSystemWriter

    written = FileSystemWriter.write_data

    def function(self, plan, planner):
        if distributed.rank() == 1 and "step-00000006" in str(self.path):
            raise OSError(28, "No space left on device")
        return written(self, plan, planner)

    FileSystemWriter.write_data = function
    train_here(out, *SHARED, FSDP, "name=full")


@pytest.mark.parametrize("function", [full, pytest.param(full_of_shards, marks=pytest.mark.slow)])
def test_a_full_disk_is_an_error_of_all(tmp_path, function):
    ended = on_ranks(2, function, tmp_path)
    assert [type(end) for end in ended] == [checkpoint.CheckpointError] * 2
    assert all("No space left on device" in str(end) and "is intact" in str(end) for end in ended)
    checkpoints = tmp_path / "full" / "checkpoints"
    assert not list(checkpoints.glob(".writing-*"))
    saved, problems = checkpoint.Store(checkpoints).newest()
    assert saved.state["step"] == 3 and problems == []


def lost() -> str:
    distributed.join(config.compose([]))
    if distributed.rank() == 1:
        os._exit(1)
    try:
        with config.reported("train"):
            distributed.gathered(0)
    except SystemExit as end:
        return f"status {end.code}"


def test_a_lost_process_ends_the_others_in_words(capfd):
    with pytest.raises(EOFError):
        on_ranks(2, lost)
    said = capfd.readouterr().err
    assert "error: another process of this run is gone" in said and "Traceback" not in said


def slow() -> str:
    distributed.join(config.compose(["hardware.timeout=3"]))
    if distributed.rank() == 1:
        time.sleep(4)
        return "late"
    try:
        with config.reported("train"):
            distributed.gathered(0)
    except SystemExit as end:
        return f"status {end.code}"


def test_a_process_that_does_not_answer_is_not_called_gone(capfd):
    assert on_ranks(2, slow) == ["status 2", "late"]
    said = capfd.readouterr().err
    assert "error: another process of this run did not answer for hardware.timeout=3 seconds" in said
    assert "set a longer time: hardware.timeout=6" in said and "gone" not in said and "Traceback" not in said


def broken_log(out: Path) -> None:
    written = log.Jsonl.write

    def write(self, line):
        with log.writing(self.path):
            if line["step"] == 2:
                raise OSError(28, "No space left on device")
        written(self, line)

    log.Jsonl.write = write
    train_here(out, *SHARED, "name=broken")


def test_a_log_that_fails_is_an_error_of_all(tmp_path):
    """Only the first process writes it; both must come to save the state."""
    ended = on_ranks(2, broken_log, tmp_path)
    assert [type(end) for end in ended] == [log.LogError] * 2
    assert all("No space left on device\nthe state after step 2 is saved; resume with: " in str(end) for end in ended)
    saved, problems = checkpoint.Store(tmp_path / "broken" / "checkpoints").newest()
    assert saved.state["step"] == 2 and problems == []


def own_copy(folder: Path) -> None:
    os.chdir(folder / str(distributed.rank()))
    small = ["model=timm", "model.name=test_resnet", "data.img_size=32", "data.workers=0", "data.batch_size=4"]
    train_here(folder / "out", *small, "data=imagefolder", "data.root=photos", "name=run")


def test_copies_of_a_folder_that_differ_are_an_error_of_all(tmp_path):
    for split, name in ((split, name) for split in ("train", "val") for name in ("ant", "bee")):
        folder = tmp_path / "0" / "photos" / split / name
        folder.mkdir(parents=True)
        for index in range(4):
            Image.new("RGB", (8, 8)).save(folder / f"{index}.png")
    shutil.copytree(tmp_path / "0", tmp_path / "1")
    for split in ("train", "val"):
        (tmp_path / "1" / "photos" / split / "bee").rename(tmp_path / "1" / "photos" / split / "cow")
    (tmp_path / "1" / "photos" / "train" / "ant" / "0.png").unlink()
    first, second = on_ranks(2, own_copy, tmp_path)
    assert type(first) is type(second) is DataError and str(first) == str(second)
    said = r"rank 1 on \S+ has 'cow' as class 1, not 'bee', 7 training images, not 8\n"
    assert re.search(said, str(first)) and not (tmp_path / "out").exists()


def compared() -> list[str | None]:
    """What is said where the second process has the same, the same to measure alone, other labels, another class."""
    distributed.join(config.compose([]))
    data, last = classify.Task(config.compose(SMALL)).build_data(), distributed.rank() == 1
    said = []
    for change in (
        lambda: data,
        lambda: replace(data, train=None),
        lambda: relabelled(data, last),
        lambda: named(data, last),
    ):
        try:
            said.append(data_record.check_alike(change()))
        except DataError as error:
            said.append(str(error).splitlines()[1].partition(" has ")[2])
    return said


def relabelled(data, really: bool):
    data.val.records.labels[0] += really
    return data


def named(data, really: bool):
    return replace(data, num_classes=11, class_names=[*data.class_names, "X"]) if really else data


def test_what_processes_compare():
    first, second = on_ranks(2, compared)
    ten = "0, 1, 2, 3, 4, 5, 6, 7, ..."
    others = "the same number of images, but other images or other labels"
    assert first == second == [None, None, others, f"11 classes ({ten}), not 10 ({ten})"]


def measured_with_others(run: Path, out: Path) -> None:
    build = classify.Task.build_data

    def function(self):
        data = build(self)
        data.val.records.labels[: distributed.rank()] += 1
        return data

    classify.Task.build_data = function
    evaluate_here(f"run={run}", f"out={out}")


def test_an_evaluation_of_other_data_on_one_process_is_none(runs, tmp_path):
    ended = on_ranks(2, measured_with_others, runs / "ddp", tmp_path)
    assert [type(end) for end in ended] == [DataError] * 2 and list(tmp_path.iterdir()) == []


def while_it_trains(run: Path) -> tuple[str, dict[str, list]]:
    """The best checkpoint is replaced when the first process has read it, and the second has not."""
    distributed.join(config.compose([]))
    tensors = checkpoint.Checkpoint.tensors

    def function(self, part):
        read = distributed.first(lambda: tensors(self, part))
        if distributed.rank() == 1 and self.path.name != "best-00000099":
            self.path.rename(self.path.with_name("best-00000099"))
        return read if distributed.rank() == 0 else tensors(self, part)

    checkpoint.Checkpoint.tensors = function
    kept = find_weights(run)
    return kept.checkpoint.path.name, {name: tensor.tolist() for name, tensor in kept.tensors.items()}


def test_all_processes_read_the_same_weights_of_a_run_in_progress(runs, tmp_path):
    run = shutil.copytree(runs / "ddp", tmp_path / "run")
    (one, ours), (two, theirs) = on_ranks(2, while_it_trains, run)
    assert one == two == "best-00000099" and ours == theirs


def measured_where_one_lacks_some(run: Path, file: Path, folder: Path) -> None:
    """The second process has no folder of the run, no copy of one file, and a broken one of another."""
    own = folder / str(distributed.rank())
    own.mkdir()
    os.chdir(own)
    for name in ("whole", "gone", "broken"):
        shutil.copy(file, f"{name}.safetensors")
    if distributed.rank() == 0:
        shutil.copytree(run, "run")
    else:
        os.remove("gone.safetensors")
        Path("broken.safetensors").write_bytes(b"no weights")
    sources = "[run,gone.safetensors,broken.safetensors,whole.safetensors]"
    small = ["model=timm", "model.name=test_resnet", "data.val_fraction=0.1005", "data.img_size=32", "data.workers=0"]
    evaluate_here(*small, f"checkpoint={sources}", f"out={folder / 'out'}")


def test_what_one_process_cannot_measure_no_other_does(runs, tmp_path):
    best = find_checkpoint(runs / "ddp")
    ended = on_ranks(2, measured_where_one_lacks_some, runs / "ddp", best.place("ema"), tmp_path)
    said = "3 of 4 could not be evaluated, see above: run, gone.safetensors, broken.safetensors"
    assert [type(end) for end in ended] == [RunError] * 2 and [str(end) for end in ended] == [said] * 2
    (one,) = json.loads((tmp_path / "out" / "eval.json").read_text())
    values = {key.removeprefix("val_"): value for key, value in best.state["metrics"].items()}
    assert one["name"] == "whole.safetensors" and one["images"] == 181
    assert one["top1"] == pytest.approx(values["top1"], abs=0.01)


def answered_by_one(run: Path, image: Path) -> None:
    build = classify.Task.build_model

    def function(self, *args, **kwargs):
        assert distributed.rank() == 0
        return build(self, *args, **kwargs)

    classify.Task.build_model = function
    evaluate_here(f"run={run}", f"predict={image}")


def test_one_process_alone_builds_the_model_that_answers(runs, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "image.png")
    assert on_ranks(2, answered_by_one, runs / "ddp", tmp_path / "image.png") == [None, None]
    first, second = on_ranks(2, answered_by_one, runs / "ddp", tmp_path / "none.png")
    assert type(first) is type(second) is RunError and str(first) == str(second)


@pytest.mark.parametrize(
    ("accumulate", "parts", "world", "expected"),
    [(1, None, 1, 1), (4, None, 2, 4), (1, None, 2, 2), (4, None, 8, 8), (2, None, 3, 6), (1, 4, 2, 4), (1, 4, 1, 4)],
)
def test_parts_of_a_batch(monkeypatch, accumulate, parts, world, expected):
    monkeypatch.setattr(distributed, "size", lambda: world)
    cfg = config.compose(["data.batch_size=48", f"train.accumulate={accumulate}"])
    source = range(480)
    plans = plan.make(cfg, source, parts)
    assert (plans.parts, plans.batch, plans.per_epoch) == (expected, 48, 10)
    ranks = []
    for rank in range(world):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        ranks += [plans.part(3, turn) for turn in range(plans.accumulate)]
    assert sorted(ranks) == list(range(3 * expected, 4 * expected))


def test_a_batch_that_processes_cannot_share(monkeypatch):
    monkeypatch.setattr(distributed, "size", lambda: 3)
    with pytest.raises(
        ConfigError, match=r"on 3 process.es.; choose a multiple of 3, or start 2 or 4 process.es.: a res"
    ):
        plan.make(config.compose(["data.batch_size=32"]), range(480))
    with pytest.raises(ConfigError, match=r"choose a multiple of 12, or start 2 or 4 process.es.: a resumed run"):
        plan.make(config.compose(["data.batch_size=32"]), range(480), parts=4)
    with pytest.raises(ConfigError, match=r"choose a multiple of 12$"):  # no number of processes shares 33 in four
        plan.make(config.compose(["data.batch_size=33", "train.accumulate=4"]), range(480))
    monkeypatch.setattr(distributed, "size", lambda: 64)
    with pytest.raises(ConfigError, match=r"choose a multiple of 64, or start 32 process.es.: a resumed run"):
        plan.make(config.compose(["data.batch_size=32"]), range(480))


def test_alone_nothing_is_asked():
    assert (distributed.rank(), distributed.size(), distributed.job()) == (0, 1, None)
    assert distributed.first(lambda: 3) == 3 and distributed.gathered(4) == [4] and distributed.highest(5) == 5
    assert list(distributed.together(iter("ab"), DataError, 3)) == ["a", "b", None]
    assert not dist.is_initialized() and zoo.variants()


def test_processes_meet_under_a_name_that_predecessors_did_not_have():
    """Those of an earlier start have left their words in the store, and one of them is met before its successor."""
    store, timeout, names = dist.HashStore(), timedelta(seconds=30), []
    for _ in range(2):
        with ThreadPoolExecutor(3) as ranks:
            found = [ranks.submit(distributed.meet, store, number, 3, timeout) for number in (2, 0)]
            time.sleep(0.1)  # rank 0 has answered rank 2, and in the second round the hello that rank 1 left
            found.append(ranks.submit(distributed.meet, store, 1, 3, timeout))
            (name,) = {one.result() for one in found}
        names.append(name)
    assert names[0] != names[1]


def test_who_does_not_come_is_named():
    store, soon = dist.HashStore(), timedelta(seconds=0.2)
    with pytest.raises(dist.DistError, match="nothing was heard of rank 1, 2"):
        distributed.meet(store, 0, 3, soon)
    with pytest.raises(dist.DistError):
        distributed.meet(store, 1, 3, soon)
