"""train.py and eval.py as their users meet them, in processes watched from outside; or in this one."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import math
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Container, Iterator
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console

from flags import flags_restored
from recipes import checkpoint, config, train

ROOT = Path(__file__).parents[1]
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["recipes.train"])
TINY = ["model=timm", "model.name=test_resnet", "data.img_size=32"]
PLAIN = [*TINY, "data.val_fraction=0.1"]  # eval.py takes it too
SMALL = [*PLAIN, "train.log_every=1"]
QUICK = [*SMALL, "train.steps=6", "train.eval_every=0.1", "train.save_every=3", "sched.warmup=0"]
TIMES = ("images_per_s", "val_images_per_s", "data_wait", "memory_mib")  # what a log has that two runs do not share
PATIENCE = 800  # seconds until what does not end has hung, on a machine that has much else to do


def start(script: str, *overrides: str, cwd: Path) -> subprocess.Popen:
    """`python <script>` with these overrides, one thread, its output in one pipe."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "160"}
    command = [sys.executable, str(ROOT / script), *overrides]
    return subprocess.Popen(command, cwd=cwd, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def fork(*overrides: str, cwd: Path) -> Forked:
    """train.py with these overrides in a process of its own that need not import anything first."""
    child = Forked(cwd, overrides)
    child.start()
    return child


class Forked(FORKS.Process):
    """A process that begins as a copy of one with everything imported; what it says goes to a file."""

    def __init__(self, cwd: Path, overrides: tuple[str, ...]):
        cwd.mkdir(exist_ok=True)
        self.said = cwd / f"said-{time.monotonic_ns()}.txt"
        self.said.touch()  # the process may be killed before it opens it
        super().__init__(target=_train, args=(cwd, self.said, overrides))

    def output(self) -> str:
        """Wait for the end and give back what it said; `exitcode` is set."""
        self.join(PATIENCE)
        return self.said.read_text()


def _train(cwd: Path, said: Path, overrides: tuple[str, ...]) -> None:
    # data workers are forked, as where a command starts the run: others import everything, which takes them ten seconds
    multiprocessing.set_start_method("fork", force=True)
    os.chdir(cwd)
    file = os.open(said, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.argv[:] = ["train.py", *overrides]
    os.environ["COLUMNS"] = "160"
    train.main()


def finish(child: subprocess.Popen) -> str:
    """Wait for the end and give back what it said; `child.returncode` is set."""
    output, _ = child.communicate(timeout=PATIENCE)
    return output


def succeed(script: str, *overrides: str, cwd: Path) -> str:
    """Run to the end, which must be a good one."""
    child = start(script, *overrides, cwd=cwd)
    output = finish(child)
    assert child.returncode == 0, output
    return output


def fail(script: str, *overrides: str, cwd: Path) -> str:
    """Run to the end, which must be an error said in words."""
    child = start(script, *overrides, cwd=cwd)
    output = finish(child)
    assert child.returncode not in (0, None), output
    assert "Traceback" not in output, output
    return output


def wait_for(child: subprocess.Popen | Forked, happened: Callable[[], bool]) -> None:
    """Look, often, until something has happened; the child must still be running then."""
    forked, limit = isinstance(child, Forked), time.monotonic() + PATIENCE
    while not happened():
        runs = child.is_alive() if forked else child.poll() is None
        assert runs, f"ended too early:\n{child.output() if forked else finish(child)}"
        assert time.monotonic() < limit, f"waited for {PATIENCE} s"
        time.sleep(0.001)


def lines(run: Path) -> list[dict]:
    """The whole lines of a run's metrics.jsonl."""
    path = run / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def newest(run: Path, kind: str = "step") -> checkpoint.Checkpoint:
    """A run's newest checkpoint; none may be damaged."""
    found, problems = checkpoint.Store(run / "checkpoints").newest(kind)
    assert problems == []
    return found


def poisoned(loss: Callable[..., Any], steps: Container[int], accumulate: int = 1) -> Callable[..., Any]:
    """A task's loss, of images that are no numbers in these steps: running statistics of the norms are hit as well.

    accumulate  draws of a step
    """

    def function(self, model, images, targets, *, draw):
        no_numbers = draw // accumulate in steps
        return loss(self, model, images * math.nan if no_numbers else images, targets, draw=draw)

    return function


def no_space(*_: Any, **__: Any) -> NoReturn:
    """Stands for what writes, to a full disk."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextlib.contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """No file of this process grows beyond so many bytes: the system's own error, as from a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def closed(path: Path, mode: int = 0) -> Iterator[None]:
    """Within, a file or a folder has these permissions, and they bind root too, who does without two capabilities."""
    before, libc = path.stat().st_mode, ctypes.CDLL(None)
    header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()  # version 3, of this thread
    path.chmod(mode)
    if os.geteuid() == 0:
        assert libc.capget(header, sets) == 0
        effective = sets[0]
        sets[0] &= ~0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        assert libc.capset(header, sets) == 0
    try:
        yield
    finally:
        if os.geteuid() == 0:
            sets[0] = effective
            assert libc.capset(header, sets) == 0
        path.chmod(before)


def rendered(table: Any) -> str:
    """A rich table as the text that a wide terminal shows."""
    console = Console(width=200)
    with console.capture() as captured:
        console.print(table)
    return captured.get()


def trained(run: Path, step: int) -> bool:
    """Whether the log has the training line of a step."""
    return any(line["step"] == step and "loss" in line for line in lines(run))


def evaluated(run: Path, step: int) -> bool:
    """Whether the log has the validation line of a step."""
    return any(line["step"] == step and "val_loss" in line for line in lines(run))


def assert_same(run: Path, other: Path, damaged: tuple[str, ...] = ()) -> None:
    """Newest and best checkpoints of two finished runs hold the same bytes, and their logs the same numbers.

    damaged  checkpoints of the first run that it found damaged and put aside
    """
    folders = [folder / "checkpoints" for folder in (run, other)]
    names = [{path.name for path in folder.iterdir()} for folder in folders]
    assert names[0] == names[1] | {f"corrupt-{name}" for name in damaged}
    files = sorted(folders[1].rglob("*.safetensors"))
    assert len(files) == 8  # model, ema and optimizer of two steps, model and ema of the best
    for file in files:
        assert file.read_bytes() == (folders[0] / file.relative_to(folders[1])).read_bytes(), file
    logs = [[{k: v for k, v in line.items() if k not in TIMES} for line in lines(path)] for path in (run, other)]
    assert logs[0] == logs[1]


def train_here(folder: Path, *overrides: str) -> None:
    """What train.py does, in this process."""
    with flags_restored():
        train.main.__wrapped__(config.compose([*overrides, f"out={folder}"]))


def evaluate_here(*overrides: str) -> None:
    """What eval.py does, in this process."""
    from recipes import eval as evaluation  # which takes seconds: a process that only trains need not wait for it

    with flags_restored():
        evaluation.main.__wrapped__(config.compose(overrides, "eval"))


def renumber(checkpoint: Path, newer: Path) -> None:
    """Rename a checkpoint as if a later step had written it, without the checksum of its state."""
    state = json.loads((checkpoint / "state.json").read_text()) | {"step": int(newer.name[-8:])}
    state.pop("crc32", None)
    (checkpoint / "state.json").write_text(json.dumps(state))
    checkpoint.rename(newer)


def lost_after(step: int, run: Path, copy: Path) -> Path:
    """A copy of a run that was lost after a step, the only one that it has a checkpoint of."""
    shutil.copytree(run, copy)
    for path in (copy / "checkpoints").iterdir():
        if path.name != f"step-{step:08}":
            shutil.rmtree(path)
    return copy


def note_overrides(run: Path, overrides: list[str]) -> None:
    """Let a run of `train_here`, which had no command line, have been begun with these overrides and one thread."""
    path = run / "sessions.jsonl"
    first = json.loads(path.read_text().splitlines()[0])
    path.write_text(json.dumps({**first, "overrides": overrides, "threads": 1}) + "\n")
