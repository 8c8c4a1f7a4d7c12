"""What a run says: a progress bar or plain lines, metrics.jsonl, and a tracker where one is chosen."""

from __future__ import annotations

import errno
import json
import math
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from recipes.plan import Plan

CONSOLE = Console(highlight=False, soft_wrap=True)


def say(text: str, style: str | None = None) -> None:
    """Print a line, above the progress bar where there is one."""
    CONSOLE.print(text, style=style, markup=False)


class LogError(RuntimeError):
    """A line of the log could not be written."""


class Sink(Protocol):
    """Takes one dictionary of numbers a line."""

    def write(self, line: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class Jsonl:
    """metrics.jsonl: one JSON object a line, written through line by line."""

    def __init__(self, path: Path):
        self.folder = path.parent
        self.file = open(path, "ab", buffering=0)  # noqa: SIM115 (closed by close)

    def write(self, line: dict[str, Any]) -> None:
        finite = {key: value if math.isfinite(value) else None for key, value in line.items()}
        text = (json.dumps(finite) + "\n").encode()
        try:
            if self.file.write(text) != len(text):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise LogError(
                f"could not write {self.file.name}: {error}; the checkpoints are whole: resume={self.folder} goes on"
            ) from error

    def close(self) -> None:
        self.file.close()


class Wandb:
    """Weights & Biases; `logger.mode=offline` keeps everything in the run folder."""

    def __init__(self, cfg: DictConfig, folder: Path):
        try:
            import wandb
        except ImportError as error:
            raise ImportError("logger=wandb needs the package: pip install wandb") from error
        self.run = wandb.init(
            project=cfg.logger.project,
            entity=cfg.logger.entity,
            mode=cfg.logger.mode,
            dir=folder,
            name=folder.name,
            id=folder.name,
            resume="allow",
            config=OmegaConf.to_container(cfg, resolve=True),
        )
        self.run.define_metric("*", step_metric="step")  # a resumed run counts on from its own step, not wandb's

    def write(self, line: dict[str, Any]) -> None:
        self.run.log(line)

    def close(self) -> None:
        self.run.finish()


def trackers(cfg: DictConfig, folder: Path) -> list[Sink]:
    """What is chosen to follow the run beside metrics.jsonl."""
    return [Wandb(cfg, folder)] if cfg.logger.wandb else []


@dataclass
class Meter:
    """Sums since the last line of the log; `loss`, `count` and `bad` are kept in checkpoints, times are not."""

    loss: float = 0.0
    count: int = 0
    images: int = 0
    seconds: float = 0.0
    bad: int = 0

    def add(self, loss: float, images: int, seconds: float, bad: int = 0) -> None:
        self.loss, self.count = self.loss + loss, self.count + 1
        self.images, self.seconds = self.images + images, self.seconds + seconds
        self.bad += bad

    def clear(self) -> None:
        self.loss, self.count, self.images, self.seconds, self.bad = 0.0, 0, 0, 0.0, 0

    def state(self) -> dict[str, float]:
        return {"loss": self.loss, "count": self.count, "bad": self.bad}


class Log:
    """Everything that is shown and written between the first step and the last."""

    def __init__(self, sinks: list[Sink], meter: Meter, plan: Plan, *, start: int, every: int, enabled: bool = True):
        self.sinks, self.meter, self.every = sinks if enabled else [], meter, every
        self.steps, self.per_epoch = plan.steps, plan.per_epoch
        self.start, self.begun = start, time.perf_counter()
        columns = (TextColumn("{task.description}"), BarColumn(None), MofNCompleteColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, console=CONSOLE, expand=True, disable=not (enabled and CONSOLE.is_terminal))
        self.plain = enabled and not CONSOLE.is_terminal
        self.task = self.bar.add_task("starting", total=plan.steps, completed=start)

    def __enter__(self) -> Log:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()
        for sink in self.sinks:
            sink.close()

    def step(
        self, step: int, *, loss: float, lr: float, grad_norm: float, images: int, seconds: float, bad: int = 0
    ) -> None:
        """Note an optimiser step; `step` counts the steps done, `seconds` is what it took with waiting for data.

        bad  how many of its images were replaced because they cannot be decoded; written where there are any
        """
        self.meter.add(loss, images, seconds, bad)
        speed = images / seconds
        self.bar.update(self.task, completed=step, description=_describe(step / self.per_epoch, loss, lr, speed))
        if step % self.every and step != self.steps:
            return
        meter = self.meter
        line = {
            "step": step,
            "epoch": step / self.per_epoch,
            "loss": meter.loss / meter.count,
            "lr": lr,
            "grad_norm": grad_norm,
            "images_per_s": round(meter.images / meter.seconds, 2),
            **({"bad_images": meter.bad} if meter.bad else {}),
        }
        meter.clear()
        self.write(line)
        if self.plain:
            text = _describe(line["epoch"], line["loss"], lr, line["images_per_s"])
            say(f"step {step}/{self.steps}  {text}  {_clock(self._left(step))} left")

    def evaluation(self, step: int, values: dict[str, float], which: str, best: bool) -> None:
        """Note the validation metrics of the weights after `step` steps; `which` says raw or ema weights."""
        self.write({"step": step, "epoch": step / self.per_epoch, **{f"val_{k}": v for k, v in values.items()}})
        text = "  ".join(f"{key} {value:.4g}" for key, value in values.items())
        say(f"step {step}  validation ({which} weights)  {text}{'  best so far' if best else ''}")

    def write(self, line: dict[str, Any]) -> None:
        for sink in self.sinks:
            sink.write(line)

    def watch(self, batches: Iterable[Any], total: int) -> Iterator[Any]:
        """Show a second bar while these batches are evaluated."""
        task = self.bar.add_task("evaluating", total=total)
        for batch in batches:
            yield batch
            self.bar.advance(task)
        self.bar.remove_task(task)

    def _left(self, step: int) -> float:
        return (time.perf_counter() - self.begun) / (step - self.start) * (self.steps - step)


def history(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a last line cut short by a kill is left out."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _describe(epoch: float, loss: float, lr: float, speed: float) -> str:
    return f"epoch {epoch:.2f}  loss {loss:.4f}  lr {lr:.2e}  {speed:.1f} images/s"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
