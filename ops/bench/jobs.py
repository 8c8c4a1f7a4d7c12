"""Which calls `ops.bench` times, and in which order."""

import argparse
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from .cases import BASE, MODELS, SMALL, Call, calls
from .contest import COMPILED


@dataclass(frozen=True)
class Job:
    """A call in one dtype, with its image size and batch size."""

    call: Call
    stages: tuple[str, ...]
    image: str
    batch: int
    dtype: str
    turn: int = 1  # its number among the calls of the same op, models, image size and dtype


def plan(args: argparse.Namespace) -> list[Job]:
    """All calls that the command line asks for, most important first.

    Dtypes and image sizes are in the order given, T variants before B. Within these the ops take turns, beginning with
    the earliest stages, whose maps are the largest.
    """
    jobs = []
    for dtype in args.dtypes:
        for image, batch in zip(args.images, args.batches, strict=True):
            for models in (SMALL, BASE):
                chosen = {name: MODELS[name] for name in models if name in args.models}
                jobs += in_turn([Job(c, tuple(s), image, batch, dtype) for c, s in calls(sides(image), chosen).items()])
    return [job for job in jobs if job.call.op in args.ops and args.cases in f"{job.call.op} {job.call}"]


def in_turn(jobs: Sequence[Job]) -> list[Job]:
    """The first call of each op, then the second of each, and so on."""
    seen: Counter[str] = Counter()
    turns = []
    for job in jobs:
        seen[job.call.op] += 1
        turns.append(replace(job, turn=seen[job.call.op]))
    return sorted(turns, key=lambda job: job.turn)


def sides(image: str) -> tuple[int, int]:
    """ "224" or "800x1344" as (rows, columns). Raises ValueError unless both are multiples of 32."""
    numbers = [int(side) if side.isdecimal() else 0 for side in image.split("x")]
    if len(numbers) > 2 or any(side < 32 or side % 32 for side in numbers):
        raise ValueError(f"image is {image}: expected one or two multiples of 32, such as 224 or 800x1344")
    return numbers[0], numbers[-1]


def asked(job: Job, args: argparse.Namespace, peer: str) -> bool:
    """Whether to time a peer in a job."""
    if peer in COMPILED and args.compiled is not None and (job.turn > args.compiled or job.image != args.images[0]):
        return False
    return args.peers is None or peer in args.peers
