"""Signals: one to any process stops all after the same step, and a second one ends what hangs."""

import multiprocessing
import os
import signal
import time
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from children import lines, note_overrides, train_here
from ranks import SHARED, assert_bits, curve, on_ranks
from recipes import checkpoint, config, distributed, log, stop
from recipes.run import Run
from recipes.stop import REQUEUE, SIGNALS, Stop
from recipes.tasks import classify


@pytest.mark.parametrize("number", stop.WARNINGS)
def test_a_warning_before_the_first_step_requeues(number):
    with pytest.raises(SystemExit) as ended, stop.requeued():
        os.kill(os.getpid(), number)
    assert ended.value.code == REQUEUE and signal.getsignal(number) == signal.SIG_DFL
    came, before = [], signal.signal(number, lambda number, frame: came.append(number))  # such as submitit's
    try:
        with stop.requeued():
            os.kill(os.getpid(), number)
        assert came == [number]
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize("number", stop.WARNINGS)
def test_a_warning_between_the_runs_of_a_sweep_requeues(number, monkeypatch):
    monkeypatch.setattr(config, "job_number", lambda: 0)
    before = {each: signal.getsignal(each) for each in stop.WARNINGS}
    try:
        with stop.requeued():
            pass
        with pytest.raises(SystemExit) as ended:
            os.kill(os.getpid(), number)
        assert ended.value.code == REQUEUE
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def interrupted(out: Path, number: int = signal.SIGTERM) -> None:
    """The second process alone gets a signal, while its third step is noted."""
    noted = log.Log.step

    def step(self, step, *args, **kwargs):
        if step == 3 and distributed.rank() == 1:
            os.kill(os.getpid(), number)
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


def warned(out: Path, number: int) -> None:
    """As `interrupted`, with a handler in the manner of submitit, which queues the job again and ends it."""

    def handler(number, frame):
        saved, _ = checkpoint.Store(out / "stopped" / "checkpoints").newest()
        (out / f"rank-{distributed.rank()}").write_text(f"signal {number} after step {saved.state['step']}")
        raise SystemExit(144)

    signal.signal(number, handler)
    interrupted(out, number)


def test_a_warning_is_handed_on_once_the_run_is_saved(tmp_path):
    assert [end.code for end in on_ranks(2, warned, tmp_path, signal.SIGUSR2)] == [144, 144]
    (file,) = tmp_path.glob("rank-*")
    assert file.name == "rank-0" and file.read_text() == f"signal {signal.SIGUSR2.value} after step 3"


def test_other_signals_are_not_handed_on(tmp_path):
    assert [end.code for end in on_ranks(2, warned, tmp_path, signal.SIGTERM)] == [REQUEUE] * 2
    assert not list(tmp_path.glob("rank-*"))


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


def test_a_thread_that_cannot_be_started_is_told(monkeypatch):
    """As where a limit on processes is reached; signals are as they were."""
    before, files = [signal.getsignal(number) for number in SIGNALS], len(os.listdir("/proc/self/fd"))

    def limited(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("threading.Thread.start", limited)
    with pytest.raises(config.ConfigError, match=r"can't start new thread, which every run needs: .*ulimit -u"):
        Stop().__enter__()
    assert [signal.getsignal(number) for number in SIGNALS] == before
    assert len(os.listdir("/proc/self/fd")) == files


def test_what_a_scheduler_sends_may_come_more_than_once():
    """Slurm's SIGTERM reaches torchrun, which hands it on, and the processes too."""
    assert on_ranks(1, signalled_twice, signal.SIGTERM) == [signal.SIGTERM]
    assert on_ranks(1, signalled_twice, signal.SIGUSR1) == [signal.SIGUSR1]
    assert on_ranks(1, signalled_twice, signal.SIGUSR2) == [signal.SIGUSR2]
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
