"""The output of a run: a progress bar or plain lines, and metrics.jsonl."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from recipes import distributed
from recipes.clock import STARTUP
from recipes.console import CONSOLE, say
from recipes.errors import RunError
from recipes.json_file import NUMBER, finite, fits
from recipes.pictures import save_picture
from recipes.plan import Plan
from zoo.files import is_absent, unreadable

LINES = (  # what a line of metrics.jsonl holds, and one of sessions.jsonl
    {"step": int, "skipped": (int, None), ...: (*NUMBER, None)},
    {"overrides": [str]},
)


class LogError(RuntimeError):
    """A line of the log could not be written."""


@contextlib.contextmanager
def writing(what: Path | str, *errors: type[Exception]) -> Iterator[None]:
    """Turn the system's errors and `errors` into LogError, which names what could not be written."""
    try:
        yield
    except (OSError, *errors) as error:
        raise LogError(f"could not write {what}: {error}") from error


class Through(io.FileIO):
    """A file that writes at once and completely, or raises OSError."""

    def write(self, data: bytes) -> int:
        rest = memoryview(data)
        while rest:  # of what a first write has no room for, the next one says why
            written = super().write(rest)
            if not written:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            rest = rest[written:]
        return len(data)


class Sink(Protocol):
    """Takes one dictionary of numbers per line, and pictures; raises LogError if it cannot."""

    def write(self, line: dict[str, Any]) -> None: ...

    def picture(self, step: int, image: Image.Image) -> None: ...

    def close(self) -> None: ...


class Jsonl:
    """metrics.jsonl: one JSON object per line, each written through at once."""

    def __init__(self, path: Path):
        self.path = path
        with writing(path):
            self.file = Through(path, "ab")

    def write(self, line: dict[str, Any]) -> None:
        with writing(self.path):
            self.file.write((json.dumps(finite(line)) + "\n").encode())

    def picture(self, step: int, image: Image.Image) -> None:
        """Written to a file beside it, as a line of text cannot hold it."""
        path = self.path.with_name("validation.png")
        with writing(path):
            save_picture(image, path)

    def close(self) -> None:
        with writing(self.path):
            self.file.close()


@dataclass
class Meter:
    """Sums since the last line of the log; checkpoints store `loss` and the counts, but not the times."""

    loss: float = 0.0
    count: int = 0
    skipped: int = 0
    seconds: float = 0.0
    timed: int = 0
    waited: float = 0.0
    bad: int = 0

    def add(self, loss: float, seconds: float, waited: float, skipped: bool, bad: int = 0) -> None:
        if skipped:
            self.skipped += 1
        else:
            self.loss, self.count = self.loss + loss, self.count + 1
        self.timed, self.seconds, self.waited = self.timed + 1, self.seconds + seconds, self.waited + waited
        self.bad += bad

    def clear(self) -> None:
        self.loss, self.count, self.skipped, self.bad = 0.0, 0, 0, 0
        self.timed, self.seconds, self.waited = 0, 0.0, 0.0

    def state(self) -> dict[str, float]:
        return {"loss": self.loss, "count": self.count, "skipped": self.skipped, "bad": self.bad}


class Log:
    """Everything that is printed and logged between the first step and the last.

    memory  called for each line: MiB in use, see Hardware.memory
    """

    def __init__(
        self,
        sinks: list[Sink],
        meter: Meter,
        plan: Plan,
        *,
        start: int,
        every: int,
        memory: Callable[[], float],
    ):
        self.sinks, self.meter, self.every = sinks, meter, every
        self.steps, self.per_epoch, self.batch, self.memory = plan.steps, plan.per_epoch, plan.batch, memory
        self.start, self.begun, self.shown = start, time.perf_counter(), False
        columns = (TextColumn("{task.description}"), BarColumn(None), MofNCompleteColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, console=CONSOLE, expand=True, disable=not CONSOLE.is_terminal)
        self.plain = not CONSOLE.is_terminal
        self.task = self.bar.add_task("starting", total=plan.steps, completed=start)

    def __enter__(self) -> Log:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()
        for sink in self.sinks:
            try:
                sink.close()
            except LogError as error:  # the state is saved, and an error that is being raised matters more
                say(f"{error}; its last lines may be missing", "yellow")

    def step(
        self,
        step: int,
        loss: float,
        *,
        lr: float,
        grad_norm: float,
        seconds: float,
        waited: float,
        skipped: bool,
        bad: int = 0,
    ) -> None:
        """Log an optimiser step; `step` counts the steps done, `seconds` is its duration, `waited` its wait for data.

        bad  how many of its images were replaced because they cannot be decoded; only written if there are any
        """
        if not self.shown:
            self._show_startup(waited)
        self.meter.add(loss, seconds, waited, skipped, bad)
        speed = self.batch / seconds
        self.bar.update(self.task, completed=step, description=_describe(step / self.per_epoch, loss, lr, speed))
        if step % self.every and step != self.steps:
            return
        line = self._line(step, lr, grad_norm)
        self.write(line)
        self.meter.clear()
        if self.plain:
            text = _describe(line["epoch"], line["loss"], lr, line["images_per_s"])
            say(f"step {step}/{self.steps}  {text}  {_clock(self._left(step))} left")

    def _line(self, step: int, lr: float, grad_norm: float) -> dict[str, float]:
        meter = self.meter
        line = {
            "step": step,
            "epoch": step / self.per_epoch,
            "loss": meter.loss / meter.count if meter.count else math.nan,
            "lr": lr,
            "grad_norm": grad_norm,
            "images_per_s": round(meter.timed * self.batch / meter.seconds, 2),
            "data_wait": round(meter.waited / meter.seconds, 4),
            "memory_mib": round(self.memory(), 1),
        }
        counts = {"skipped": meter.skipped, "bad_images": meter.bad}
        return line | {name: count for name, count in counts.items() if count}

    def _show_startup(self, waited: float) -> None:
        STARTUP.mark("first step")
        STARTUP.split("first step", "first batch", waited)
        say(STARTUP.text())
        self.shown = True

    def evaluation(self, step: int, values: dict[str, float], which: str, best: bool) -> None:
        """Log the validation metrics of the weights after `step` steps; `which` says model or ema weights."""
        self.write({"step": step, "epoch": step / self.per_epoch, **{f"val_{k}": v for k, v in values.items()}})
        text = "  ".join(f"{key} {value:.4g}" for key, value in values.items() if "/" not in key)
        say(f"step {step}  validation ({which} weights)  {text}{'  best so far' if best else ''}")

    def write(self, line: dict[str, Any]) -> None:
        """Pass a line to the sinks; all processes must call this, and an error on the writing one is raised on all."""

        def hand_on() -> None:
            for sink in self.sinks:
                sink.write(line)

        distributed.first(hand_on)

    def picture(self, step: int, image: Image.Image | None) -> None:
        """Pass on a picture of the predictions after `step` steps, if there is one."""
        for sink in self.sinks if image is not None else ():
            sink.picture(step, image)

    def watch(self, batches: Iterable[Any], total: int) -> Iterator[Any]:
        """Show a second progress bar while these batches are evaluated."""
        task = self.bar.add_task("evaluating", total=total)
        for batch in batches:
            yield batch
            self.bar.advance(task)
        self.bar.remove_task(task)

    def _left(self, step: int) -> float:
        return (time.perf_counter() - self.begun) / (step - self.start) * (self.steps - step)


def epoch_table(history: list[dict[str, Any]], score: str, rows: int = 30) -> Table:
    """The last `rows` evaluations of a run; the best is marked, of equal ones the first, as its weights are kept.

    Each has the mean training loss of the steps logged since the previous one, and their last learning rate and speed.
    """
    table = Table("epoch", "step", "train loss", f"val {score}", "val loss", "lr", "images/s", title="evaluations")
    found, losses, last, done = [], [], {}, 0
    for line in history:
        if "lr" in line:
            steps = line["step"] - done - (line.get("skipped") or 0)  # that the line averages over
            losses += [] if line.get("loss") is None else [(line["loss"], steps)]
            last, done = line, line["step"]
        if line.get(f"val_{score}") is not None:
            found.append((line, losses, last))
            losses, last = [], {}
    best = max(rankable(history, score), key=lambda line: line[f"val_{score}"], default=None)
    for line, losses, train in found[-rows:]:
        weight = sum(steps for _, steps in losses)
        value = f"{line[f'val_{score}']:.2f}"
        table.add_row(
            _number(line.get("epoch"), ".2f"),
            str(line["step"]),
            _number(sum(loss * steps for loss, steps in losses) / weight if weight else None, ".4f"),
            Text.assemble((value, "bold"), " *") if line is best else value,
            _number(line.get("val_loss"), ".4f"),
            _number(train.get("lr"), ".2e"),
            _number(train.get("images_per_s"), ".1f"),
        )
    return table


def rankable(history: list[dict[str, Any]], score: str) -> list[dict[str, Any]]:
    """The evaluations whose weights may be the best: those with a loss that is not finite, null here, are not kept."""
    return [line for line in history if line.get(f"val_{score}") is not None and line.get("val_loss", 0) is not None]


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def history(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl or sessions.jsonl, except those that a kill, a power cut or an editor damaged.

    There are none without a file. Raises RunError for one that cannot be read.
    """
    try:
        text = path.read_bytes()
    except OSError as error:
        if is_absent(error):
            return []
        raise RunError(unreadable(path, error)) from error
    found = []
    for line in text.splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            found.append(json.loads(line))
    return [line for line in found if fits(line, LINES)]


def _describe(epoch: float, loss: float, lr: float, speed: float) -> str:
    return f"epoch {epoch:.2f}  loss {loss:.4f}  lr {lr:.2e}  {speed:.1f} images/s"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
