"""Compares the training loop with a bare one, in one run, and measures the time to the first step.

    python -m recipes.bench model=maxvit_t
    python -m recipes.bench model=timm model.name=test_resnet data.img_size=32 --out benchmarks

The bare loop follows timm's, with the same model, images, augmentation, Mixup, optimiser, gradient clipping and weight
averaging, but without seeding, checks, logging or support for resuming. Blocks of steps of both alternate, so that a
busy moment of the machine affects both; figures are medians. `train.py` itself runs: the bare loop takes its turn
whenever a block has been logged.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import nn
from torch.utils.data import DataLoader, Dataset

from ops.tool import ToolError, command, overwrite, positive, tool, writable
from recipes import config, hardware, log, models, optim, plan, train
from recipes.config import ConfigError
from recipes.config.quoting import key_of
from recipes.data import Source, worker_count
from recipes.data.build import Data
from recipes.data.mix import Mix
from recipes.data.seeding import INIT, seed_all
from recipes.freeze import freeze
from recipes.provenance import versions
from recipes.run import open_run
from recipes.state import State, train_mode
from recipes.stop import Stop
from recipes.task import create as create_task

NEVER = 10**9
FOLDER = ("resume", "name", "out")  # keys of the run's folder, which a config=FILE lacks, and those of its length
LENGTH = ("train.steps", "train.epochs", "train.save_every", "train.eval_every", "train.eval_steps")
# trains like the command, and prints where the time went
CHILD = (
    "import json, runpy; runpy.run_module('recipes.train', run_name='__main__'); "
    "from recipes.clock import STARTUP; print(json.dumps(STARTUP.causes))"
)


class Plain(Dataset):
    """The same images and transforms, without reproducible randomness."""

    def __init__(self, source: Source):
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.source.transform(self.source.image(index)), self.source.label(index)


def bare(cfg: DictConfig, data: Data, model: nn.Module, machine: hardware.Hardware, plans: plan.Plan) -> Iterator[None]:
    """A training loop as in timm's train.py, with nothing around it; every `next` is an optimiser step."""
    if cfg.train.grad_checkpointing:
        models.checkpoint_gradients(model, cfg.model.name)
    frozen = [*freeze(model, cfg.train.freeze), *([model] if cfg.train.eval_mode else [])]
    optimizer = create_optimizer_v2(model, **options(cfg))
    ema = ModelEmaV3(model, decay=cfg.train.ema, use_warmup=cfg.train.ema_warmup) if cfg.train.ema else None
    workers = worker_count(data.train, cfg.data.workers)
    keep = {"num_workers": workers, "persistent_workers": workers > 0, "pin_memory": machine.device.type == "cuda"}
    loader = DataLoader(Plain(data.train), batch_size=plans.micro, shuffle=True, drop_last=True, **keep)
    mixup, criterion, scaler = mixing(cfg, data.num_classes), SoftTargetCrossEntropy(), machine.scaler()
    forward, rate, step, micro = machine.wrapped(model), optim.schedule(cfg, plans), 0, 0
    train_mode(model, frozen)
    while True:
        for images, targets in loader:
            images, targets = mixup(*machine.send(images, targets))
            with machine.autocast():
                loss = criterion(forward(images), targets) / plans.accumulate
            scaler.scale(loss).backward()
            micro += 1
            if micro % plans.accumulate:
                continue
            if cfg.train.clip_grad is not None:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), cfg.train.clip_grad)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            step += 1
            if ema is not None and step % cfg.train.ema_every == 0:
                ema.update(model, step // cfg.train.ema_every)
            for group in optimizer.param_groups:
                group["lr"] = rate(step)
            if step % cfg.train.log_every == 0:
                loss.item()
            yield


def options(cfg: DictConfig) -> dict[str, Any]:
    """The arguments of timm's optimiser."""
    given = {**OmegaConf.to_container(cfg.optim), "lr": optim.base_lr(cfg)}
    return {key: value for key, value in given.items() if value is not None and key not in optim.OURS - {"lr"}}


def mixing(cfg: DictConfig, classes: int) -> Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """timm's Mixup, which also smooths the labels; that alone if nothing is mixed, which timm's refuses."""
    mix = Mix(cfg.augment, classes)
    return mix.mixup or partial(mix, seed=0, step=0)  # which are for Mixup's random draws


@dataclass
class Turns:
    """Seconds of each block of steps of both loops; the first block of each is a warm-up and not counted."""

    other: Iterator[None]
    block: int
    repeats: int
    machine: hardware.Hardware
    stop: Stop
    seconds: dict[str, list[float]] = field(default_factory=lambda: {"ours": [], "bare": []})
    began: float = 0.0

    def after(self, step: int) -> None:
        """Called when our loop has done `step` steps: at the end of a block it is the other loop's turn."""
        if step % self.block:
            return
        self.seconds["ours"].append(self._now() - self.began)
        strict = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(False)  # the bare loop does not ask for them
        began = self._now()
        for _ in range(self.block):
            next(self.other)
        self.seconds["bare"].append(self._now() - began)
        torch.use_deterministic_algorithms(strict)
        if step == self.block * (self.repeats + 1):
            self.stop.noted = NEVER
        self.began = self._now()

    def _now(self) -> float:
        if self.machine.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


class Alternating(log.Log):
    """The log of a run that hands over to the other loop after every block."""

    turns: Turns

    def step(self, step: int, *args: Any, **kwargs: Any) -> None:
        super().step(step, *args, **kwargs)
        self.turns.after(step)


def compare(overrides: Sequence[str], block: int, repeats: int) -> dict[str, list[float]]:
    """Milliseconds per step of every block of our loop and of the bare one.

    Raises ConfigError for what the bare loop does not compute, and for keys that are determined here.
    """
    _refuse_own(overrides)
    steps = block * (repeats + 1)
    long = [f"train.steps={steps + 1}", f"train.save_every={NEVER}", f"train.eval_steps={NEVER}"]
    with tempfile.TemporaryDirectory() as out:
        cfg = config.compose([*overrides, *long, f"out={out}"])
        if (cfg.task.name, cfg.task.get("loss"), cfg.teacher.kind) != ("classify", "cross_entropy", None):
            raise ConfigError(
                "the bare loop computes the cross entropy of a classifier: leave out task, task.loss and teacher.kind"
            )
        run, machine, task = open_run(cfg, []), hardware.setup(cfg), create_task(cfg)
        data = task.build_data()
        plans = plan.make(cfg, data.train)
        seed_all(cfg.seed, INIT)
        ours, other = (machine.place(task.build_model(data)) for _ in range(2))
        now, stop = State.create(cfg, ours, machine, plans, data.train, task.learner), Stop()
        run.begin([], data)
        show = {"start": 0, "every": cfg.train.log_every, "memory": machine.memory}
        with Alternating(run.sinks(), now.meter, plans, **show) as logs:
            logs.turns = Turns(bare(cfg, data, other, machine, plans), block, repeats, machine, stop)
            logs.shown, logs.turns.began = True, time.perf_counter()
            train.Loop(run, machine, task, data, optim.schedule(cfg, plans), now, logs, stop).train()
    return {name: [1000 * each / block for each in found[1:]] for name, found in logs.turns.seconds.items()}


def _refuse_own(overrides: Sequence[str]) -> None:
    own = [text for text in overrides if key_of(text) in FOLDER]
    own += [text for text in overrides if key_of(text) in LENGTH and not text.startswith("++")]
    if own:
        raise ConfigError(
            f"{' '.join(own)} would have no effect: a new run is timed in a temporary folder, --block and --repeats "
            "give its steps, and nothing is saved or evaluated. Leave it out"
        )


def startup(overrides: Sequence[str], repeats: int) -> dict[str, float]:
    """Median seconds by cause, from the command to the end of its first step, in new processes."""
    found = []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as out:
            command = [sys.executable, "-c", CHILD, *overrides, "train.steps=1", f"out={out}"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ToolError(f"the run ended with status {done.returncode}:\n{done.stdout}{done.stderr}")
        found.append(json.loads(done.stdout.splitlines()[-1]))
    return {cause: statistics.median(each[cause] for each in found) for cause in found[0]}


def loop_row(name: str, ms: dict[str, list[float]]) -> str:
    """One line of the table of loops: medians, their ratio, and the quartiles of the ratios of single blocks."""
    ours, other = (statistics.median(ms[key]) for key in ("ours", "bare"))
    low, _, high = statistics.quantiles([a / b for a, b in zip(ms["ours"], ms["bare"], strict=True)], n=4)
    return f"| {name} | {ours:.1f} | {other:.1f} | {ours / other:.3f} | {low:.3f} ... {high:.3f} |"


def startup_row(name: str, causes: dict[str, float]) -> str:
    cells = [*causes.values(), sum(causes.values())]
    return f"| {name} | " + " | ".join(f"{seconds:.2f}" for seconds in cells) + " |"


def facts(args: argparse.Namespace, machine: str) -> dict[str, str]:
    named = ", ".join(f"{name} {version}" for name, version in versions().items())
    return {
        "date": datetime.date.today().isoformat(),
        "device": f"{machine}, {torch.get_num_threads()} CPU threads",
        "versions": f"python {platform.python_version()}, {named}",
        "settings": f"medians of {args.repeats} alternating blocks of {args.block} steps; of {args.starts} starts",
        "command": command("recipes.bench"),
    }


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m recipes.bench", description="Times our loop beside a bare one.")
    parser.add_argument("overrides", nargs="*", help="as for train.py: model=... data=... key=value")
    parser.add_argument("--block", type=positive, default=5, help="optimiser steps per turn")
    parser.add_argument("--repeats", type=positive, default=20, help="turns of each loop")
    parser.add_argument("--starts", type=positive, default=3, help="processes, started for the time to the first step")
    parser.add_argument("--out", type=Path, help="folder in which to add rows to loop_<device>.md and .json")
    args = parser.parse_intermixed_args(argv)
    if args.repeats < 2:
        parser.error("--repeats 1: the quartiles of the ratios need at least 2 turns")
    return args


def earlier(path: Path) -> list[dict[str, Any]]:
    """The rows that a file has. Raises ToolError if it cannot be read: before the work, and without replacing it."""
    try:
        return json.loads(path.read_text("utf-8")) if path.exists() else []
    except (OSError, ValueError) as error:
        raise ToolError(f"{path} cannot be read, so that no row can be added: {error}") from error


@tool
def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    if args.out is not None:
        writable(args.out)
    with config.reported("train"):
        args.overrides = config.expanded(args.overrides)
        cfg = config.compose(args.overrides)
        device = hardware.setup(cfg).device.type
        path = None if args.out is None else args.out / f"loop_{device}.json"
        kept = [] if path is None else earlier(path)
        ms, causes = compare(args.overrides, args.block, args.repeats), startup(args.overrides, args.starts)
    kind = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU"
    result = {"name": f"{cfg.model.name}, {cfg.data.name}", **facts(args, kind), "ms": ms, "startup": causes}
    if path is not None:  # first: a reader of the output, such as head, may end before all is printed
        kept = [*(old for old in kept if old["name"] != result["name"]), result]
        overwrite(path, json.dumps(kept, indent=1) + "\n")
        overwrite(path.with_suffix(".md"), render(kept))
    print(render([result]))


def render(results: list[dict[str, Any]]) -> str:
    """Both tables in Markdown."""
    lines = ["# The training loop", "", *__doc__.partition("\n\n")[2].partition("\n\n")[2].splitlines(), ""]
    for each in results:
        lines += [f"- {each['name']}: {each['date']}, {each['device']}, {each['settings']}, `{each['command']}`"]
        lines += [f"  ({each['versions']})"]
    lines += ["", "| model, data | ours, ms per step | bare, ms per step | ours / bare | quartiles of the blocks |"]
    lines += ["|---|---:|---:|---:|---|", *(loop_row(each["name"], each["ms"]) for each in results), ""]
    causes = list(results[0]["startup"])
    lines += ["Seconds from the command to the end of the first step:", ""]
    lines += [f"| model, data | {' | '.join(causes)} | total |", "|---|" + "---:|" * (len(causes) + 1)]
    lines += [startup_row(each["name"], each["startup"]) for each in results]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
