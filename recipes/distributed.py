"""The processes of one run: which one writes, what they agree on, and what happens when one of them is lost.

torchrun, or Slurm through submitit, starts `size()` processes. A single process is rank 0 of 1, and everything here is
a no-op. What the processes agree on is exchanged between CPUs (gloo), without waiting for a GPU; tensors of the model
use the backend of their device.
"""

from __future__ import annotations

import atexit
import itertools
import os
import re
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from omegaconf import DictConfig
from torch import Tensor

from recipes.clock import started
from recipes.config import ConfigError
from recipes.console import CONSOLE, note, say
from zoo.errors import first_line

T = TypeVar("T")
CPU = torch.device("cpu")
TIMED_OUT = re.compile(r"tim(?:ed|ing) out|time ?out", re.IGNORECASE)  # as gloo, NCCL and the store word it
LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # what a launcher tells each process
LAST_PORT = 65535


@dataclass
class _Joined:
    """What this process has agreed on with the others when it met them.

    name      that of this start, which tells it from earlier ones of the same launch
    wait      seconds that it waits for the others
    agents    torchrun's, of all ranks
    restarts  the most that one of them counts
    apart     whether it is the only process now, see `apart`
    runs      how many runs it has begun, several in a sweep
    """

    name: str | None = None
    wait: float | None = None
    agents: Sequence[str] = ()
    restarts: int = 0
    apart: bool = False
    runs: int = 0


_JOINED = _Joined()


def rank() -> int:
    """The number of this process; 0 is the one that writes."""
    return int(os.environ["RANK"]) if _launched() else 0


def size() -> int:
    """How many processes this run has."""
    return int(os.environ["WORLD_SIZE"]) if _launched() else 1


def local_rank() -> int:
    """The number of this process on its machine, and of its GPU."""
    return int(os.environ["LOCAL_RANK"]) if _launched() else 0


def join(cfg: DictConfig) -> None:
    """Connect to the other processes of the launch, if there are any, waiting for up to `hardware.timeout` seconds.

    From here on only rank 0 prints; errors are printed by the process that meets them, see `report`.
    Raises ConfigError if the launcher has announced other processes that cannot be reached.
    """
    _read_submitit()
    _check_launch()
    _JOINED.runs += 1
    if size() == 1 or dist.is_initialized():
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    timeout = timedelta(seconds=cfg.hardware.timeout)
    try:
        store, number, count = next(dist.rendezvous("env://", timeout=timeout))
        _JOINED.name = meet(store, number, count, timeout)
        store = dist.PrefixStore(_JOINED.name, store)
        dist.init_process_group(backend, store=store, rank=number, world_size=count, timeout=timeout)
    except dist.DistError as error:
        where = f"{os.environ['MASTER_ADDR']}, port {os.environ['MASTER_PORT']} (MASTER_ADDR, MASTER_PORT)"
        raise ConfigError(
            f"process {rank()} of {size()} could not connect to the others at {where} within hardware.timeout="
            f"{cfg.hardware.timeout} seconds: {first_line(error)}"
        ) from error
    atexit.register(dist.destroy_process_group)
    _JOINED.wait = cfg.hardware.timeout
    if "TORCHELASTIC_RUN_ID" in os.environ:
        _JOINED.agents = sorted(set(gathered(_agent())))
        _JOINED.restarts = highest(_restarts())
    CONSOLE.quiet = rank() > 0


def meet(store: dist.Store, number: int, count: int, timeout: timedelta) -> str:
    """A name that these `count` processes have in common, and none of their predecessors had.

    torchrun's store may keep what processes left there that it has started again since, such as their addresses. The
    number of restarts cannot tell them apart: each agent counts its own, and not those that another one causes. So
    process 0 draws a name and answers whoever says hello until all have confirmed it. A hello is random, so that
    predecessors neither answer it nor confirm the name. Raises torch's DistError after `timeout`.
    """
    if number > 0:
        hello = secrets.token_hex(8)
        store.set(f"hello/{number}", hello)
        store.wait([f"answer/{number}/{hello}"], timeout)
        name = store.get(f"answer/{number}/{hello}").decode()
        store.set(f"here/{name}/{number}", "")
        return name
    name, missing, end = secrets.token_hex(8), set(range(1, count)), time.monotonic() + timeout.total_seconds()
    while missing:
        for other in sorted(missing):
            if store.check([f"hello/{other}"]):  # again and again: it may be a predecessor's
                store.set(f"answer/{other}/{store.get(f'hello/{other}').decode()}", name)
        missing = {other for other in missing if not store.check([f"here/{name}/{other}"])}
        if missing and time.monotonic() > end:
            raise dist.DistStoreError(f"nothing was heard of rank {', '.join(map(str, sorted(missing)))}")
        time.sleep(0.01 * bool(missing))
    return name


def first(action: Callable[[], T]) -> T:
    """Run `action` on rank 0 and return its result, or raise its error, on every rank. All ranks must call this."""
    if size() == 1:
        return action()
    result, error = None, None
    if rank() == 0:
        try:
            result = action()
        except Exception as failure:
            error = failure
    outcome = [result, error]
    dist.broadcast_object_list(outcome, device=CPU)
    if error or outcome[1]:
        raise error or outcome[1]
    return result if rank() == 0 else outcome[0]


def everywhere(action: Callable[[], T], errors: tuple[type[Exception], ...]) -> T:
    """Run `action` on each rank; one of the `errors` on any rank is raised on all of them. All ranks must call this.

    So no rank goes on alone, or waits in a collective that others have left.
    """
    result, error = None, None
    try:
        result = action()
    except errors as failure:
        if size() == 1:
            raise
        where = f"on rank {rank()}, {socket.gethostname()}: " if rank() else ""
        error = type(failure)(f"{where}{failure}")
    for failure in gathered(error):
        if failure:
            raise failure
    return result


def gathered(value: T) -> list[T]:
    """The values of all ranks, in their order."""
    if size() == 1:
        return [value]
    values: list[Any] = [None] * size()
    dist.all_gather_object(values, value)
    return values


def highest(number: int) -> int:
    """The largest of the ranks' numbers."""
    if size() == 1:
        return number
    most = torch.tensor(number)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return int(most)


def total(number: int) -> int:
    """The sum of the ranks' numbers."""
    if size() == 1:
        return number
    count = torch.tensor(number)
    dist.all_reduce(count)
    return int(count)


def mean(value: Tensor) -> Tensor:
    """The mean over all ranks, on the device of the value."""
    if size() == 1:
        return value
    added = value.clone()
    dist.all_reduce(added)
    return added / size()


def mean_in_order(_, bucket):  # DDP cannot read annotations that are strings
    """How DDP shares gradients on CPUs: summed in the order of ranks.

    In a ring the order of summation depends on the position of a gradient in its bucket, and DDP rebuilds its buckets
    after the first step: a resumed run would differ in its last digits from one that was never stopped.
    """
    mine = bucket.buffer()
    everyone = [torch.empty_like(mine) for _ in range(size())]
    dist.all_gather(everyone, mine)
    done = torch.futures.Future()
    done.set_result(sum(everyone) / size())
    return done


def together(batches: Iterator[T], errors: type[Exception], rounds: int | None = None) -> Iterator[T | None]:
    """Yield batches once every rank has its own: what one rank cannot read is an error on all, before any computes.

    rounds  the largest number of batches on any rank; ranks with fewer get None instead
    """
    for _ in itertools.count() if rounds is None else range(rounds):
        batch, error = None, None
        try:
            batch = next(batches, None)
        except errors as failure:
            error = failure
        if highest(int(error is not None)):
            failures = [failure for failure in gathered(error) if failure]
            raise error or failures[0]
        yield batch


@contextmanager
def apart() -> Iterator[None]:
    """Within, this process is the only one, whatever the launcher says: for a command that is not part of a run."""
    before, _JOINED.apart = _JOINED.apart, True
    try:
        yield
    finally:
        _JOINED.apart = before


def job() -> str | None:
    """The name of torchrun's launch, the same after it has restarted its processes; None without torchrun.

    Its `--rdzv-id`, if one was given; else the agent that started this process, which outlives it.
    """
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    return _agent() if name == "none" else name


def agents() -> Sequence[str]:
    """torchrun's agents that started the processes of all ranks, and outlive them; none without torchrun."""
    return _JOINED.agents or ([_agent()] if "TORCHELASTIC_RUN_ID" in os.environ else [])


def restarted() -> bool:
    """Whether one of torchrun's agents has started its processes again after it lost some."""
    return max(_restarts(), _JOINED.restarts) > 0


def _agent() -> str:
    """The agent that started this process: in containers, another one may have the same host name and number later."""
    number = os.getppid()
    return f"{socket.gethostname()}-{number}-{started(number)}"


def _restarts() -> int:
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def is_loss(error: Exception) -> bool:
    """Whether an error of gloo, NCCL or the store says that another process no longer answers."""
    return size() > 1 and (isinstance(error, dist.DistError) or "gloo/" in str(error))


def report(message: str, what: str = "error") -> None:
    """Print the error that ends a run, only once if several ranks meet the same one."""
    if _count(f"{what}: {message}") == 1:
        _print(f"{what}: {message}")
    _count("any")


def report_loss(error: Exception) -> None:
    """Print that another process is gone or did not answer in time, unless some process has printed the cause."""
    if _count("any") > 1:
        return
    if _JOINED.wait is not None and TIMED_OUT.search(str(error)):
        _print(
            f"error: another process of this run did not answer for hardware.timeout={_JOINED.wait} seconds, so this "
            f"one ends: {error}\nif that process hung, start again as after any stop (for a run, resume=<its folder>); "
            f"if it is only slow, set a longer time: hardware.timeout={2 * _JOINED.wait}"
        )
    else:
        _print(f"error: another process of this run is gone, so this one ends: {error}")


def _print(message: str) -> None:
    note(f"rank {rank()}: {message}" if rank() else message)


def _count(event: str) -> int:
    """How often an event has happened on all ranks in this run, including now; torchrun's own process counts."""
    if size() == 1 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return 1
    try:
        store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timeout=timedelta(seconds=10))
        start = _JOINED.name or os.environ["TORCHELASTIC_RESTART_COUNT"]  # not to count those of the last one
        return store.add(f"recipes/{start}/{_JOINED.runs}/{event}", 1)
    except dist.DistError:
        return 1  # torchrun itself is gone


def _launched() -> bool:
    return not _JOINED.apart and all(name in os.environ for name in LAUNCHED)


def _check_launch() -> None:
    """Raise ConfigError, or warn, if this process was started with others but would run on its own."""
    if _launched():
        _check_numbers()
        return
    if (count := os.environ.get("WORLD_SIZE", "1")) != "1":
        missing = ", ".join(name for name in LAUNCHED if name not in os.environ)
        raise ConfigError(
            f"WORLD_SIZE={count}, but {missing} is not set: each process would train on its own. torchrun sets all of "
            f"{', '.join(LAUNCHED)}; set them for every process, or unset WORLD_SIZE for a run of one process"
        )
    if (count := os.environ.get("SLURM_STEP_NUM_TASKS", "1")) != "1":  # some do start single-process runs so
        say(
            f"srun has started {count} processes of this command, and each is a separate run; for a single run, use "
            f"srun torchrun with one task per machine, or hydra/launcher=slurm, or set {', '.join(LAUNCHED)}",
            "yellow",
        )


def _check_numbers() -> None:
    """Raise ConfigError for invalid variables, before this process waits for others that it would never meet."""
    said = {name: os.environ[name] for name in LAUNCHED if name != "MASTER_ADDR"}
    if strange := [f"{name}={value}" for name, value in said.items() if not value.isdecimal()]:
        raise ConfigError(f"expected whole numbers in the environment, got {', '.join(strange)}: torchrun sets them")
    if rank() >= size():
        raise ConfigError(
            f"RANK={rank()}, WORLD_SIZE={size()}: the processes of a run are numbered from 0, so RANK must be below "
            "WORLD_SIZE"
        )
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    if size() > 1 and (not address or int(port) > LAST_PORT):
        raise ConfigError(
            f"MASTER_ADDR={address}, MASTER_PORT={port}: expected the name or address of the machine of rank 0, and a "
            f"port that is free there, up to {LAST_PORT}"
        )


def _read_submitit() -> None:
    """In a job of Hydra's submitit launcher, take from submitit what torchrun would set.

    Raises ConfigError where submitit cannot give it, as outside of a job.
    """
    if "SUBMITIT_EXECUTOR" not in os.environ or _launched():
        return
    try:
        from submitit.helpers import TorchDistributedEnvironment

        TorchDistributedEnvironment().export(set_cuda_visible_devices=False)
    except (ImportError, KeyError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"SUBMITIT_EXECUTOR={os.environ['SUBMITIT_EXECUTOR']} is set, but submitit does not find its job in the "
            f"environment ({type(error).__name__}: {error}): unset SUBMITIT_EXECUTOR, unless this is a job of "
            "hydra/launcher=slurm, which sets all that submitit needs"
        ) from error
