"""Several runs side by side: python -m recipes.compare runs/*

Prints a table, the best run first, with the keys in which their configurations differ, and draws their curves together;
of runs of several tasks a table and a picture for each score.
"""

from __future__ import annotations

import argparse
import os
import secrets
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from omegaconf.errors import ConfigAttributeError
from rich.measure import Measurement
from rich.table import Column, Table
from yaml import YAMLError

from recipes.config import SWEEP_ENDS
from recipes.config.checks import flat, is_in
from recipes.log import CONSOLE, history, say
from recipes.plots import draw_together
from recipes.provenance import SWEEP, sessions
from recipes.settings import FREE, RunError, load_config, runs_in
from recipes.task import create as create_task

LOWER = ("loss",)  # what is better where it is less


@dataclass(frozen=True)
class Row:
    """One run: its configuration, its log, and of its evaluations the best."""

    folder: Path
    cfg: dict[str, Any]
    history: list[dict[str, Any]]
    score: str
    best: dict[str, Any]

    @property
    def value(self) -> float:
        return self.best[f"val_{self.score}"]


def read(folder: Path, score: str | None = None) -> Row:
    """A run as the table needs it. Raises RunError where the folder holds no run, or one without an evaluation."""
    try:
        cfg = load_config(folder)
        score = score or create_task(cfg).score
    except (YAMLError, ConfigAttributeError) as error:
        raise RunError(f"{folder} has a config.yaml that is none: {error}") from error
    lines = history(folder / "metrics.jsonl")
    found = [line for line in lines if line.get(f"val_{score}") is not None]
    if not found:
        raise RunError(f"{folder} has no evaluation with val_{score} yet")
    best = min if score in LOWER else max
    return Row(folder, flat(cfg), lines, score, best(found, key=lambda line: line[f"val_{score}"]))


def readable(folders: Sequence[Path], score: str | None = None) -> list[Row]:
    """The runs that can be compared, best first; says which cannot, and why."""
    rows = []
    for folder in folders:
        try:
            rows.append(read(folder, score))
        except RunError as error:
            say(f"left out: {error}", "yellow")
    return sorted(rows, key=lambda row: row.value, reverse=score not in LOWER)


def different(rows: Sequence[Row]) -> list[str]:
    """The keys that tell the runs apart.

    What only follows from another model or data set (its depths, its mean colour) is left out beside the name.
    """
    keys = dict.fromkeys(key for row in rows for key in row.cfg if not is_in(key, FREE))
    pairs = list(combinations(rows, 2))
    return [key for key in keys if any(_differ(key, *pair) for pair in pairs)]


def _differ(key: str, one: Row, other: Row) -> bool:
    name = f"{key.split('.')[0]}.name"
    comparable = key == name or one.cfg.get(name) == other.cfg.get(name)
    return comparable and one.cfg.get(key) != other.cfg.get(key)


def names(rows: Sequence[Row]) -> list[str]:
    """What the runs are called: their paths without the folders that all of them are in."""
    shared = os.path.commonpath([row.folder.absolute().parent for row in rows])
    return [os.path.relpath(row.folder, shared) for row in rows]


def table(rows: Sequence[Row], keys: Sequence[str]) -> Table:
    score = rows[0].score
    heads = ("run", f"best {score}", "at step", "val loss", "steps", "images/s", *keys)
    drawn = Table(*(Column(head, overflow="fold") for head in heads), title=f"{len(rows)} run{'s' * (len(rows) > 1)}")
    for name, row in zip(names(rows), rows, strict=True):
        speeds = [line["images_per_s"] for line in row.history if line.get("images_per_s")]
        drawn.add_row(
            name,
            f"{row.value:.2f}",
            str(row.best["step"]),
            f"{row.best['val_loss']:.4f}" if row.best.get("val_loss") is not None else "-",
            str(max(line["step"] for line in row.history)),
            f"{sorted(speeds)[len(speeds) // 2]:.1f}" if speeds else "-",
            *(str(row.cfg.get(key, "-")) for key in keys),
        )
    return drawn


def show(folders: Sequence[Path], picture: Path, score: str | None = None) -> bool:
    """Print the table and draw the curves of those runs that can be read; whether there was one.

    Runs of several tasks have a table and a picture for each of their scores, which cannot be compared.
    """
    rows = readable(folders, score)
    scores = dict.fromkeys(row.score for row in rows)
    for one in scores:
        path = picture if len(scores) == 1 else picture.with_stem(f"{picture.stem}-{one}")
        _show([row for row in rows if row.score == one], path)
    return bool(rows)


def _show(rows: Sequence[Row], picture: Path) -> None:
    keys = different(rows)
    _print(rows, keys)
    curves = {_label(name, row, keys[:2]): row.history for name, row in zip(names(rows), rows, strict=True)}
    draw_together(picture, curves, rows[0].score)
    say(f"curves: {picture}")


def _print(rows: Sequence[Row], keys: Sequence[str]) -> None:
    """The table, with what tells the runs apart in lines below it where the columns would be narrower than words."""
    whole = table(rows, keys)
    unbound = CONSOLE.options.update_width(1_000_000)
    if Measurement.get(CONSOLE, unbound, whole).maximum <= CONSOLE.width:
        CONSOLE.print(whole)
        return
    CONSOLE.print(table(rows, []))
    for name, row in zip(names(rows), rows, strict=True):
        say(_label(f"{name}:", row, keys))


def _label(name: str, row: Row, keys: Sequence[str]) -> str:
    return " ".join([name, *(f"{key}={row.cfg.get(key)}" for key in keys)])


class AfterSweep(Callback):
    """Hydra's callback that compares the runs of a sweep (-m) when it is over, by an error or Ctrl-C too."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        os.environ[SWEEP] = secrets.token_hex(4)  # inherited by launchers that start processes of their own
        SWEEP_ENDS.append(partial(show_sweep, Path(str(config.out))))
        if str(config.hydra.sweeper.get("direction")) == "Direction.minimize":
            say("this search goes for the smallest score: hydra/sweeper=search goes for the largest", "yellow")


def show_sweep(out: Path) -> None:
    """Compare the runs in `out` that this sweep made, if there are any."""
    folders = [path for path in runs_in(out) if _of_this_sweep(path)]
    if folders:
        show(folders, out / f"sweep-{os.environ[SWEEP]}.png")


def _of_this_sweep(folder: Path) -> bool:
    return any(start.get("sweep") == os.environ[SWEEP] for start in sessions(folder))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m recipes.compare", description="Several runs side by side.")
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    parser.add_argument("--out", type=Path, default=Path("compare.png"), help="where the curves go")
    parser.add_argument("--score", help="what to sort by: top1, top5, loss, ...; default: the task's own")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    # runs/* has pictures of sweeps too, and may name again what is named before it
    folders = [path for path in dict.fromkeys(args.runs) if not path.is_file()]
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        shown = show(folders, args.out, args.score)
    except OSError as error:
        sys.exit(f"error: could not write {args.out}: {error}")
    if not shown:
        sys.exit("error: none of these folders holds a run with an evaluation")


if __name__ == "__main__":
    main()
