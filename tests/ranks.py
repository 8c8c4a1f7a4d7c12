"""Several processes of one run: forked from the test, which is quick, or started by torchrun, as users do."""

import multiprocessing
import os
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from children import ROOT, SMALL, lines, newest

# the default recipe (Mixup, drop path, EMA, clipping) in four parts; 181 validation images do not divide by anything
SHARED = [
    *SMALL, "data.val_fraction=0.1005", "data.eval_batch_size=90", "train.accumulate=4", "train.steps=6",
    "train.eval_every=0.1", "train.save_every=3", "sched.warmup=0", "data.workers=0",
]  # fmt: skip
FSDP = "hardware.parallel=fsdp"
NUMBERS = ("loss", "grad_norm", "lr", "val_loss", "val_top1", "val_top5")


def on_ranks(count: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What the function gives in each of `count` processes that find each other like torchrun's.

    An exception comes back as itself, SystemExit too; a process that does not end within ten minutes fails the test.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("fork")
    ends, processes = [], []
    for rank in range(count):
        mine, theirs = context.Pipe(duplex=False)
        processes.append(context.Process(target=_rank, args=(rank, count, port, theirs, function, args)))
        processes[-1].start()
        theirs.close()
        ends.append(mine)
    try:
        return [_received(end) for end in ends]
    finally:
        for process in processes:
            process.join(10)
            process.kill()


def curve(run: Path) -> list[dict]:
    return [{key: line[key] for key in ("step", *NUMBERS) if key in line} for line in lines(run)]


def weights(run: Path, kind: str = "step") -> dict[str, torch.Tensor]:
    return newest(run, kind).tensors("model")


def assert_bits(two: list[dict], one: list[dict], *, val_loss: float = 1e-12) -> None:
    """Numbers are the same to the bit, but for the loss of an evaluation: a sum in float64 whose order differs.

    val_loss  by what that may differ, relative to it
    """
    for line, other in zip(two, one, strict=True):
        ours, theirs = line.pop("val_loss", 0.0), other.pop("val_loss", 0.0)
        assert ours == pytest.approx(theirs, rel=val_loss) and line == other


def _rank(rank: int, count: int, port: int, end: Any, function: Callable[..., Any], args: Any) -> None:
    where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in where.items()}, MASTER_ADDR="127.0.0.1")
    try:
        result = function(*args)
    except BaseException as error:
        traceback.print_exc()
        result = error
    end.send(result)
    if dist.is_initialized():
        dist.destroy_process_group()


def _received(end: Any) -> Any:
    assert end.poll(600), "a process did not end"
    return end.recv()


ALONE = ("--standalone", "--nproc-per-node=2")


def torchrun(
    script: str, *overrides: str, cwd: Path, options: tuple[str, ...] = (), place: tuple[str, ...] = ALONE
) -> subprocess.Popen:
    """`torchrun --nproc-per-node 2 <script>` with these overrides, its output in one pipe; or one of several agents."""
    launcher = [sys.executable, "-m", "torch.distributed.run", *place, *options]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "160"}
    command = [*launcher, str(ROOT / script), *overrides]
    return subprocess.Popen(command, cwd=cwd, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
