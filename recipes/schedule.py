"""Print what the optimiser will do in a run, without its data: learning rates, weight decay, drop path.

    python -m recipes.schedule recipe=paper model=dinat_t
    python -m recipes.schedule recipe=paper model=dinat_t --out dinat_t       # CSV and JSON, every step
    python -m recipes.schedule model=litv2_s data=imagefolder --images 50000

The arguments are those of train.py. The schedule, the plan of steps and the groups are those of the run; the model is
built without memory for its weights. --out writes steps.csv, parameters.csv, blocks.csv and schedule.json to a folder.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from timm.layers import DropPath
from torch import nn

from ops.tool import ToolError, overwrite, replaced, tool
from recipes import config, optim, plan
from recipes.config import ConfigError
from recipes.config.quoting import key_of
from recipes.console import say
from recipes.data.build import Data, preprocessing
from recipes.freeze import freeze
from recipes.task import create as create_task

IMAGENET = 1_281_167  # training images of ImageNet-1k
SHOWN = 12  # rows of the printed table of rates


@dataclass(frozen=True)
class Parameter:
    """What the optimiser does with a parameter: `lr_scale` is its factor on the peak of the learning rate, `ends_scale`
    that on the ends of a schedule that shares them (sched.shared_floor).
    """

    name: str
    shape: tuple[int, ...]
    weight_decay: float
    lr_scale: float
    ends_scale: float = 1.0


@dataclass(frozen=True)
class Report:
    """A run's optimisation: its plan and schedule, and the settings of each parameter and each branch of a block.

    drop_path  probability that a branch is dropped, by the name of its module, in the order of the model
    images     the assumed number of training images
    """

    cfg: DictConfig
    plan: plan.Plan
    schedule: optim.Schedule
    parameters: list[Parameter]
    drop_path: dict[str, float]
    images: int

    @cached_property
    def scales(self) -> list[float]:
        """The factors on the learning rate, the largest first."""
        return [scale for scale, _ in self._factors]

    @cached_property
    def _factors(self) -> list[tuple[float, float]]:
        """Those on the peak, each with that on shared ends."""
        return sorted({(parameter.lr_scale, parameter.ends_scale) for parameter in self.parameters}, reverse=True)

    def rates(self, step: int) -> list[float]:
        """The learning rates of a step, one for each of `scales`."""
        return [self.schedule(step, *factors) for factors in self._factors]

    def save(self, folder: Path) -> None:
        """Write steps.csv, parameters.csv, blocks.csv and schedule.json."""
        folder.mkdir(parents=True, exist_ok=True)
        steps = ([step, step // self.plan.per_epoch, *self.rates(step)] for step in range(self.plan.steps))
        _csv(folder / "steps.csv", ["step", "epoch", *(_title(scale) for scale in self.scales)], steps)
        rows = ([p.name, "x".join(map(str, p.shape)), p.weight_decay, p.lr_scale] for p in self.parameters)
        _csv(folder / "parameters.csv", ["name", "shape", "weight_decay", "lr_scale"], rows)
        _csv(folder / "blocks.csv", ["name", "drop_path"], self.drop_path.items())
        overwrite(folder / "schedule.json", json.dumps(self.record(), indent=1) + "\n")

    def record(self) -> dict[str, Any]:
        """Everything except the rates of single steps, as plain data."""
        return {
            "model": self.cfg.model.name,
            "plan": asdict(self.plan),
            "schedule": asdict(self.schedule),
            "parameters": [asdict(parameter) for parameter in self.parameters],
            "drop_path": self.drop_path,
        }

    def text(self) -> str:
        """Text to print: data, steps, the rates at some of them, the groups of parameters, the ramp of drop path."""
        data = f"data={self.cfg.data.name} with {self.images} training images; change it with data= and --images"
        return "\n".join([data, "", *self._steps(), "", *self._rates(), "", *self._groups(), "", *self._ramp()])

    def _steps(self) -> list[str]:
        made = self.plan
        line = f"{made.steps} steps, {made.per_epoch} per epoch, of {made.batch} images"
        return [line + (f" in {made.micro_batches} micro-batches of {made.micro}" if made.micro_batches > 1 else "")]

    def _rates(self) -> list[str]:
        last, warmup = self.plan.steps - 1, self.schedule.warmup
        marks = {0, warmup, last, max(last - self.schedule.cooldown, 0)} - {self.plan.steps}
        marks |= {last * i // (SHOWN - len(marks)) for i in range(SHOWN - len(marks))}
        rows = [[f"{step}", f"{step / self.plan.per_epoch:.2f}", *map("{:.4g}".format, self.rates(step))]
                for step in sorted(step for step in marks if step <= last)]  # fmt: skip
        return _columns([["step", "epoch", *(_title(scale) for scale in self.scales)], *rows])

    def _groups(self) -> list[str]:
        sizes, names = Counter(), {}
        for parameter in self.parameters:
            group = (parameter.weight_decay, parameter.lr_scale)
            sizes[group] += 1
            names.setdefault(group, parameter.name)
        rows = [[f"{decay:g}", f"{scale:g}", f"{sizes[decay, scale]}", names[decay, scale]] for decay, scale in names]
        return _columns([["weight decay", "factor", "parameters", "the first"], *rows])

    def _ramp(self) -> list[str]:
        rows = [[name, f"{rate:.4f}"] for name, rate in self.drop_path.items()]
        return _columns([["branch", "drop path"], *rows]) if rows else ["no drop path"]


class SizeOnly:
    """Stands for a training set of which only the size is known."""

    def __init__(self, name: str, count: int):
        self.name, self.count = name, count

    def __len__(self) -> int:
        return self.count


def describe(cfg: DictConfig, images: int) -> Report:
    """What the optimiser of a composed configuration will do with this number of training images."""
    source = SizeOnly(f"the training set of {cfg.data.name}", images)
    model, beside = build(cfg, source)
    plans = plan.make(cfg, source)
    groups = parameters(model, optim.create(cfg, model, beside), beside)
    return Report(cfg, plans, optim.schedule(cfg, plans), groups, ramp(model), images)


def build(cfg: DictConfig, source: SizeOnly) -> tuple[nn.Module, nn.Module | None]:
    """The model of a configuration and what is trained beside it, without memory for their weights.

    Data without a number of classes has 1000.
    """
    cfg = OmegaConf.merge(cfg, {"data": {"eval_img_size": None}})  # nothing is evaluated here
    prep, classes = preprocessing(cfg), cfg.data.num_classes or 1000
    names = [str(number) for number in range(classes)]
    data = Data(source, None, classes, names, prep.mean, prep.std, prep.size)  # (height, width) for square ones too
    if cfg.teacher.kind != "feature":  # others are part of the loss alone, for classes that are not known here
        cfg = OmegaConf.merge(cfg, {"teacher": {"kind": None}})
    task = create_task(cfg)
    with torch.device("meta"):
        model = task.build_model(data, pretrained=False)
        learner = task.learner(model)
    freeze(model, cfg.train.freeze)
    return model, None if learner is model else learner.beside


def parameters(model: nn.Module, optimizer: torch.optim.Optimizer, beside: nn.Module | None) -> list[Parameter]:
    """The optimiser's settings for each trained parameter, in the order of the model, then of what is `beside` it."""
    groups = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
    others = [] if beside is None else beside.named_parameters(prefix="beside")
    return [
        Parameter(name, tuple(p.shape), groups[p]["weight_decay"], *optim.factors(groups[p]))
        for name, p in (*model.named_parameters(), *others)
        if p in groups
    ]


def ramp(model: nn.Module) -> dict[str, float]:
    """The probability with which each branch is dropped."""
    return {name: module.drop_prob for name, module in model.named_modules() if isinstance(module, DropPath)}


def _title(scale: float) -> str:
    return "lr" if scale == 1 else f"lr x {scale:g}"


def _csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    with replaced(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m recipes.schedule", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("overrides", nargs="*", help="key=value as for train.py; data=imagenet unless given")
    parser.add_argument("--images", type=int, default=IMAGENET, help="training images; default: those of ImageNet-1k")
    parser.add_argument("--out", type=Path, help="folder for CSV and JSON")
    args = parser.parse_intermixed_args(arguments)
    if args.images < 1:
        parser.error(f"--images {args.images}: expected at least 1 training image")
    return args


def _refuse_run(overrides: Sequence[str]) -> None:
    if runs := [text for text in overrides if key_of(text) == "resume"]:
        raise ConfigError(
            f"{' '.join(runs)} would have no effect: for the schedule of a run, give config=<its folder>/config.yaml"
        )


@tool
def main() -> None:
    """Print what the optimiser will do, and write it to the folder --out."""
    args = parse(sys.argv[1:])
    with config.reported("train"):
        _refuse_run(args.overrides)
        given = any(text.startswith(("data=", "config=")) for text in args.overrides)
        cfg = config.compose([*([] if given else ["data=imagenet"]), *config.expanded(args.overrides)])
        report = describe(cfg, args.images)
    if args.out:  # first: a reader of the output, such as head, may end before all is printed
        try:
            report.save(args.out)
        except OSError as error:
            raise ToolError(f"could not write to the folder --out {args.out}: {error}") from error
    say(report.text())
    if args.out:
        say(f"\nwritten to {args.out}")


if __name__ == "__main__":
    main()
