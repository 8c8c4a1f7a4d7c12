"""Compare several runs: python -m recipes.compare runs

Prints a table, best run first, with the keys in which the configurations differ, and plots the curves together; runs
with other tasks, scores or classes have a table and a plot of their own. For runs that differ only in their seed it
gives mean and standard deviation. --json also writes all of it to a file.
"""

from __future__ import annotations

import argparse
import os
import secrets
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from omegaconf.errors import ConfigAttributeError
from rich.measure import Measurement
from rich.table import Column, Table

from ops.tool import ToolError, check_file, tool
from recipes import data_record
from recipes.config import SWEEP_ENDS
from recipes.config.checks import is_in
from recipes.config.contents import flat
from recipes.console import CONSOLE, note, say
from recipes.eval_results import write_json
from recipes.log import history, rankable
from recipes.names import apart, part
from recipes.plots import draw_together
from recipes.provenance import SWEEP
from recipes.settings import FREE, RunError, has_config, load_config, runs_in, starts
from recipes.task import create as create_task

LOWER = ("loss",)  # scores of which lower is better
IMAGES = (  # which are held out, and what is asked of them
    "data.name", "data.hub", "data.val_split", "data.val_fraction", "data.split_seed", "data.subset",
    "data.real_labels", "data.val_images", "data.val_masks", "data.val_list", "data.val_json", "data.things",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One run: its configuration, its log, its best evaluation, and what it recorded about its data.

    name  what it is called in its table, see `named`
    """

    folder: Path
    cfg: dict[str, Any]
    history: list[dict[str, Any]]
    score: str
    best: dict[str, Any]
    data: dict[str, Any] = field(default_factory=dict)
    name: str = ""

    @property
    def value(self) -> float:
        return self.best[f"val_{self.score}"]

    @property
    def task(self) -> str:
        return self.cfg["task.name"]

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes that it is evaluated on."""
        return tuple(data_record.words(self.data.get("class_names") or ()))

    @property
    def measured(self) -> tuple[Hashable, ...]:
        """What its scores measure: task, score and classes, of which some may not count."""
        uncounted = tuple(self.data.get("left_out") or ())
        return self.task, self.score, self.data.get("num_classes"), self.classes, uncounted

    @property
    def images(self) -> tuple[Any, ...]:
        """What identifies the validation images, as far as a run records it: their number and a digest first."""
        keys = (str(self.cfg.get(key)) for key in IMAGES)  # some are lists
        count, digest = ((self.data.get(key) or {}).get("val") for key in ("images", "labels"))
        return count, digest and digest[:8], *keys

    @property
    def speed(self) -> float | None:
        """The median training speed, in images per second."""
        speeds = [line["images_per_s"] for line in self.history if line.get("images_per_s")]
        return median(speeds) if speeds else None

    @property
    def steps(self) -> int:
        return max(line["step"] for line in self.history)


def read(folder: Path, score: str | None = None) -> Row:
    """A run as the table needs it. Raises RunError if the folder holds no run, or one without an evaluation."""
    cfg = load_config(folder)
    try:
        score = score or create_task(cfg).score
    except ConfigAttributeError as error:
        raise RunError(f"config.yaml in {folder} is not a run's configuration: {error}") from error
    lines = history(folder / "metrics.jsonl")
    found = rankable(lines, score)
    if not found:
        scores = dict.fromkeys(key.removeprefix("val_") for line in lines for key in line if key.startswith("val_"))
        there = ", ".join(key for key in scores if "/" not in key)  # without those of single classes
        raise RunError(
            f"{folder} has no evaluation with {score}; its evaluations have {there}"
            if there
            else f"{folder} has no evaluation yet"
        )
    best = (min if score in LOWER else max)(found, key=lambda line: line[f"val_{score}"])
    return Row(folder, flat(cfg), lines, score, best, data_record.read(folder))


def readable(folders: Sequence[Path], score: str | None = None) -> list[Row]:
    """The runs that can be compared, best first; reports those that cannot, and why."""
    rows = []
    for folder in folders:
        try:
            rows.append(read(folder, score))
        except RunError as error:
            say(f"left out: {error}", "yellow")
    return sorted(rows, key=lambda row: row.value, reverse=score not in LOWER)


def different(rows: Sequence[Row]) -> list[str]:
    """The keys in which the runs differ.

    Where models or data sets differ, their names are listed but not what follows from them (depths, mean colour).
    """
    keys = [key for key in dict.fromkeys(key for row in rows for key in row.cfg) if not is_in(key, FREE)]
    return [key for key in keys if any(_differ(key, group) for group in _comparable(key, rows))]


def _comparable(key: str, rows: Sequence[Row]) -> list[list[Row]]:
    """The runs in groups of the same model, data set, ..., whichever the key is about."""
    name = f"{key.split('.')[0]}.name"
    return grouped(rows, lambda row: None if key == name else str(row.cfg.get(name)))


def _differ(key: str, rows: Sequence[Row]) -> bool:
    return any(row.cfg.get(key) != rows[0].cfg.get(key) for row in rows[1:])


def named(rows: Sequence[Row]) -> list[Row]:
    """The runs of one table with their names: their paths without the folders that all of them share."""
    names = apart([row.folder for row in rows])
    return [replace(row, name=name) for row, name in zip(rows, names, strict=True)]


def seeds(rows: Sequence[Row]) -> list[list[Row]]:
    """The runs that differ only in their `seed`: one group for each configuration that has several."""

    def but_seed(row: Row) -> Hashable:
        return str((row.images, {k: row.cfg[k] for k in sorted(row.cfg) if k != "seed" and not is_in(k, FREE)}))

    return [group for group in grouped(rows, but_seed) if len(set(map(_seed, group))) > 1]


def decimals(rows: Sequence[Row]) -> int:
    """As many as are needed to tell the scores apart: at least two, four for a loss, and at most six."""
    values = {row.value for row in rows}
    fewest = 4 if rows[0].score in LOWER else 2
    return next((n for n in range(fewest, 6) if len({f"{value:.{n}f}" for value in values}) == len(values)), 6)


def table(rows: Sequence[Row], keys: Sequence[str], what: str | None = None) -> Table:
    """One row per run; `what` names the table where there are several."""
    score, digits = rows[0].score, decimals(rows)
    heads = ("run", f"best {score}", "at step", "val loss", "steps", "images/s", *keys)
    title = f"{what}: " * (what is not None) + f"{len(rows)} run{'s' * (len(rows) > 1)}"
    drawn = Table(*(Column(head, overflow="fold") for head in heads), title=title)
    for row in rows:
        drawn.add_row(
            row.name,
            f"{row.value:.{digits}f}",
            str(row.best["step"]),
            f"{row.best['val_loss']:.4f}" if row.best.get("val_loss") is not None else "-",
            str(row.steps),
            f"{row.speed:.1f}" if row.speed else "-",
            *(str(row.cfg.get(key, "-")) for key in keys),
        )
    return drawn


def show(folders: Sequence[Path], picture: Path, score: str | None = None, kept: Path | None = None) -> bool:
    """Print the table and plot the curves of the runs that can be read; returns whether there was any.

    Runs whose scores cannot be compared, of other tasks or classes, have a table and a plot each.
    kept  JSON file that all of it is written to
    """
    tables = [named(rows) for rows in grouped(readable(folders, score), lambda row: row.measured)]
    told = _suffixes(tables) if len(tables) > 1 else [None] * len(tables)
    for rows, suffix in zip(tables, told, strict=True):
        path = picture if suffix is None else picture.with_stem(f"{picture.stem}-{suffix}")
        _show(rows, path, None if suffix is None else _about(rows[0]))
    if tables and kept is not None:
        write_json(kept, [record(rows) for rows in tables])
        say(f"written: {kept}")
    return bool(tables)


def grouped(rows: Iterable[Row], key: Callable[[Row], Hashable]) -> list[list[Row]]:
    """The rows of each key, in their order."""
    groups: dict[Hashable, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return list(groups.values())


def _suffixes(tables: Sequence[Sequence[Row]]) -> list[str]:
    """Suffixes for the plots of several tables: as short as tells them apart, or numbers where nothing does."""
    firsts = [rows[0] for rows in tables]
    columns = [
        [row.score for row in firsts],
        [row.task for row in firsts],
        [part(str(row.cfg.get("data.name"))) for row in firsts],
        [f"{row.data.get('num_classes', 'unknown')}-classes" for row in firsts],
    ]
    for count in range(1, len(columns) + 1):
        for chosen in combinations(columns, count):
            found = ["-".join(parts) for parts in zip(*chosen, strict=True)]
            if len(set(found)) == len(found):
                return found
    return [str(number) for number in range(1, len(tables) + 1)]


def _about(row: Row) -> str:
    uncounted = len(row.data.get("left_out") or ())
    classes = f"{row.data.get('num_classes', 'unknown')} classes" + (f" but {uncounted}" if uncounted else "")
    return f"{row.task}, {row.cfg.get('data.name')}, {classes}"


def _show(rows: Sequence[Row], picture: Path, what: str | None) -> None:
    keys = different(rows)
    _print(rows, keys, what)
    _say_images(rows)
    _print_seeds(rows)
    curves = {_label(row.name, row, keys[:2]): row.history for row in rows}
    draw_together(picture, curves, rows[0].score)
    say(f"curves: {picture}")


def _say_images(rows: Sequence[Row]) -> None:
    """Warn if the runs of one table were evaluated on different images."""
    groups = grouped(rows, lambda row: row.images)
    if len(groups) == 1:
        return
    columns = zip(("images", "labels", *IMAGES), *(group[0].images for group in groups), strict=True)
    differing = [(key, values) for key, *values in columns if len(set(values)) > 1]
    parts = []
    for place, group in enumerate(groups):
        said = ", ".join(f"{key}={values[place]}" for key, values in differing)
        parts.append(f"{_called(group)} ({said})")
    say(f"not evaluated on the same images, so the scores are not comparable: {'; '.join(parts)}", "yellow")


def _called(rows: Sequence[Row]) -> str:
    return ", ".join(row.name for row in rows)


def _print_seeds(rows: Sequence[Row]) -> None:
    """Print mean and standard deviation of runs that differ only in their seed, if there are any."""
    groups = seeds(rows)
    if not groups:
        return
    score, digits = rows[0].score, decimals(rows)
    heads = ("runs", f"best {score}, mean ± standard deviation (n)", "seeds")
    drawn = Table(*(Column(head, overflow="fold") for head in heads), title="over seeds")
    for group in groups:
        mean, deviation = _statistics(group)
        drawn.add_row(
            _called(group),
            f"{mean:.{digits}f} ± {deviation:.{digits}f} ({len(group)})",
            ", ".join(str(_seed(row)) for row in group),
        )
    CONSOLE.print(drawn)
    for same in (same for group in groups for same in grouped(group, _seed) if len(same) > 1):
        told = f"{_called(same)} have the same seed={_seed(same[0])}"
        say(f"{told}, and all of them count: if they are copies of a run, name only one", "yellow")


def _seed(row: Row) -> Any:
    return row.cfg.get("seed")


def _statistics(group: Sequence[Row]) -> tuple[float, float]:
    """Mean and standard deviation of the best scores of several runs, the latter with n - 1."""
    values = [row.value for row in group]
    return fmean(values), stdev(values)


def record(rows: Sequence[Row]) -> dict[str, Any]:
    """One table as JSON: what it is about, its rows, and under `seeds` the statistics of those that differ in seed."""
    keys, first = different(rows), rows[0]
    return {
        "task": first.task,
        "score": first.score,
        "classes": first.data.get("num_classes"),
        "rows": [
            {
                "run": row.name,
                "folder": str(row.folder),
                "best": row.value,
                "step": row.best["step"],
                "val_loss": row.best.get("val_loss"),
                "steps": row.steps,
                "images_per_s": row.speed,
                "data": row.cfg.get("data.name"),
                "images": row.images[0],
                "config": {key: row.cfg.get(key) for key in keys},
            }
            for row in rows
        ],
        "seeds": [
            {
                "folders": [str(row.folder) for row in group],
                "seeds": [_seed(row) for row in group],
                **dict(zip(("mean", "std"), _statistics(group), strict=True)),
                "n": len(group),
            }
            for group in seeds(rows)
        ],
    }


def _print(rows: Sequence[Row], keys: Sequence[str], what: str | None = None) -> None:
    """Print the table; where its columns would be narrower than words, the keys that differ go on lines below it."""
    whole = table(rows, keys, what)
    unbound = CONSOLE.options.update_width(1_000_000)
    if Measurement.get(CONSOLE, unbound, whole).maximum <= CONSOLE.width:
        CONSOLE.print(whole)
        return
    CONSOLE.print(table(rows, [], what))
    for row in rows:
        say(_label(f"{row.name}:", row, keys))


def _label(name: str, row: Row, keys: Sequence[str]) -> str:
    return " ".join([name, *(f"{key}={row.cfg.get(key)}" for key in keys)])


class AfterSweep(Callback):
    """Hydra callback that compares the runs of a sweep (-m) when it ends, even by an error or Ctrl-C."""

    def __init__(self) -> None:
        self.outs: list[Path] = []

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        os.environ[SWEEP] = secrets.token_hex(4)  # inherited by launchers that start processes of their own
        self.outs = [_typed(config.out)]
        SWEEP_ENDS.append(partial(show_sweep, self.outs))
        if str(config.hydra.sweeper.get("direction")) == "Direction.minimize":
            say("this search minimises the score; hydra/sweeper=search maximises it", "yellow")

    def on_job_start(self, config: DictConfig, **_: Any) -> None:
        resumed = [] if config.resume in (None, "auto") else [_typed(config.resume).parent]
        for out in (_typed(config.out), *resumed):  # either may be what is varied
            if out not in self.outs:
                self.outs.append(out)


def _typed(folder: Any) -> Path:
    return Path(os.path.expanduser(str(folder)))


def show_sweep(outs: list[Path]) -> None:
    """Compare the runs in the folders `outs` that this sweep made, if there are any; the picture is beside the first.

    A picture that cannot be written is no error of the sweep.
    """
    found = {out: [path for path in runs_in(out) if _of_this_sweep(path)] for out in outs}
    held = [out for out in outs if found[out]]
    if held:
        folders = list(dict.fromkeys(path for out in held for path in found[out]))
        try:
            show(folders, held[0] / f"sweep-{os.environ[SWEEP]}.png")
        except OSError as error:
            note(f"the curves of this sweep could not be drawn: {error}")


def _of_this_sweep(folder: Path) -> bool:
    return any(start.get("sweep") == os.environ[SWEEP] for start in starts(folder))


def _runs(path: Path) -> list[Path]:
    """A run folder, or all below a folder that is none; itself where it cannot be looked at, as `read` says then."""
    try:
        return [path] if has_config(path) else list(runs_in(path)) or [path]
    except RunError:
        return [path]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m recipes.compare", description="Compare several runs.")
    parser.add_argument("runs", nargs="+", type=Path, help="run folders, or folders of them")
    parser.add_argument("--out", type=Path, default=Path("compare.png"), help="picture of the curves")
    parser.add_argument("--score", help="score to sort by: top1, top5, loss, ...; default: the task's own")
    parser.add_argument("--json", type=Path, help="also write rows and statistics to this file")
    return parser.parse_intermixed_args(argv)


@tool
def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    # runs/* also matches pictures of sweeps, and may repeat what was named before it; a name may be too long for Path
    given = [path for path in args.runs if not os.path.isfile(path)]
    if not given:
        raise ToolError(f"{', '.join(map(str, args.runs))}: a file is no run; give the folder that train.py made")
    folders: dict[Path, Path] = {}
    for run in (run for path in given for run in _runs(path)):
        folders.setdefault(run.resolve(), run)
    CONSOLE.optional = True  # picture and JSON are written though nobody reads the tables
    try:
        written = [path for path in (args.out, args.json) if path is not None]
        for path in written:
            check_file(path)
        if args.out.suffix.lower() != ".png":
            raise ToolError(f"--out {args.out}: the curves are a PNG, so give a name that ends in .png")
        for path in written:
            path.parent.mkdir(parents=True, exist_ok=True)
        shown = show(list(folders.values()), args.out, args.score, args.json)
    except OSError as error:
        raise ToolError(f"could not write {args.out}{f' or {args.json}' if args.json else ''}: {error}") from error
    if not shown:
        with_score = f" with {args.score}" if args.score else ""
        raise ToolError(f"none of these folders holds a run with an evaluation{with_score}")


if __name__ == "__main__":
    main()
