"""The results of an evaluation: as tables and as files, with confidence intervals."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Collection, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Column, Table

from ops.tool import replaced
from recipes.console import CONSOLE, say
from recipes.json_file import finite
from recipes.settings import RunError, writing
from zoo.errors import listed

Record = dict[str, Any]
# of an evaluation, the last of which identifies it; labels are a folder
FILES = ("{}-labels", "{}-objects.json", "{}-images.csv", "{}-classes.csv", "{}.png", "{}.json")
SAME = ("weights", "images", "amp", "config")  # what two evaluations of the same thing have in common
NORMAL = 1.959964  # two-sided 95 % of the normal distribution


def interval(share: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of `count` images; in percent, like `share`.

    E. B. Wilson 1927, Probable inference, the law of succession, and statistical inference.
    """
    if not count:
        return 0.0, 100.0
    p, square = share / 100, NORMAL**2
    middle = (p + square / (2 * count)) / (1 + square / count)
    width = NORMAL / (1 + square / count) * math.sqrt(p * (1 - p) / count + square / (4 * count**2))
    return max(100 * (middle - width), 0.0), min(100 * (middle + width), 100.0)  # rounding may exceed both ends


class Entry(NamedTuple):
    """One evaluation in a table of several.

    keys   the values of `record` that the table shows
    score  the one that it is sorted by
    """

    record: Record
    keys: list[str]
    score: str


@dataclass
class Measurement:
    """The result of an evaluation, and how to print and write it.

    keys     the values of `record` that a table shows
    task     the recipes.task.Task that was evaluated, with its data and its metrics
    answers  what was predicted for each image, if that was asked for, as recipes.task.Answers has it
    """

    record: Record
    keys: list[str]
    task: Any
    data: Any
    metrics: Any
    answers: dict[str, bytes]

    def show(self) -> None:
        show([self.record], self.keys, self.title)
        for text in self.task.remarks(self.data, self.metrics):
            say(f"note: {text}", "yellow")

    @property
    def entry(self) -> Entry:
        return Entry(self.record, self.keys, self.task.score)

    @property
    def title(self) -> str:
        return f"{self.record['name']}: {self.record['images']} images of {self.record['data']}"

    def write(self, results: Results, stem: str) -> None:
        """Write <stem>.json, .png and, if there are any, -classes.csv and the answers. Raises RunError."""
        folder = results.folder
        with _writing(folder):
            results.make_way(stem, self.record)
            write_json(folder / f"{stem}.json", self.record)
            self.task.picture(folder / f"{stem}.png", self.data, self.metrics)
            if rows := self.task.classes(self.data, self.metrics):
                write_csv(folder / f"{stem}-classes.csv", rows)
            results.move_labels(stem, {Path(ending).name for ending in self.answers if ending.startswith("-labels/")})
            for ending, content in self.answers.items():
                _write(folder / f"{stem}{ending}", content)
        say(f"written to {folder}: {', '.join(sorted(_there(folder, stem)))}")


class Results:
    """The folder that evaluations are written to; results of another evaluation in it are kept.

    Those in the place of new ones are moved to earlier/<number>, one folder for everything that a command moves.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    @cached_property
    def earlier(self) -> Path:
        """A new folder, which is created."""
        there = self.folder / "earlier"
        used = [int(path.name) for path in there.iterdir() if path.name.isdecimal()] if there.is_dir() else []
        made = there / str(max(used, default=0) + 1)
        made.mkdir(parents=True)
        return made

    def check_writable(self) -> None:
        """Raise RunError if nothing could be written to the folder, which may not exist yet."""
        there = next(path for path in (self.folder, *self.folder.absolute().parents) if os.path.exists(path))
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            raise RunError(f"results cannot be written to {self.folder}: give out=<a writable folder>")

    def write_list(self, records: list[Record]) -> None:
        """Several evaluations as eval.json. Raises RunError."""
        with _writing(self.folder):
            self.make_way("eval", records)
            write_json(self.folder / "eval.json", records)

    def make_way(self, stem: str, content: Record | list[Record]) -> None:
        """Move the files of a stem away if they belong to another evaluation than `content`, and report it.

        Those of the same evaluation stay and are overwritten.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        files = _there(self.folder, stem)
        if not files or _asked(_read(self.folder / f"{stem}.json")) == _asked(content):
            return
        for file in files:
            os.rename(self.folder / file, self.earlier / file)
        say(f"{self.folder} held another evaluation: {', '.join(sorted(files))} moved to {self.earlier}", "yellow")

    def move_labels(self, stem: str, names: Collection[str]) -> None:
        """Move label maps of a stem away that are not among `names`, if there are any of these, and report it.

        They are of images that have no answer any more, as they were renamed or cannot be decoded.
        """
        part = f"{stem}-labels"
        there = sorted(path.name for path in (self.folder / part).glob("*.png"))
        others = [name for name in there if name not in names] if names else []
        for name in others:
            (self.earlier / part).mkdir(exist_ok=True)
            os.rename(self.folder / part / name, self.earlier / part / name)
        if others:
            said = f"{self.folder / part} held maps of images without a new answer"
            say(f"{said}: {listed(others, 5)} moved to {self.earlier}", "yellow")


def _writing(folder: Path) -> AbstractContextManager[None]:
    return writing(
        f"the evaluation could not be written to {folder}", "give out=<a folder with space that is writable>"
    )


def _there(folder: Path, stem: str) -> list[str]:
    return [name for name in (form.format(stem) for form in FILES) if (folder / name).exists()]


def _read(path: Path) -> Any:
    """The contents of an evaluation's file; None if it does not exist or is not JSON."""
    try:
        return json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def _asked(content: Any) -> Any:
    """What identifies an evaluation, as in JSON; for several, in any order. None if it is not recorded."""
    if isinstance(content, list):
        return sorted(json.dumps(_asked(one), sort_keys=True) for one in content)
    if not isinstance(content, dict) or not content.keys() >= set(SAME):
        return None
    return json.loads(json.dumps(finite({key: content[key] for key in SAME})))


def record(about: Record, values: dict[str, float], count: int, published: float | None, score: str) -> Record:
    """The record of one evaluation: `about` it, its values, intervals of its shares and the published figure.

    count  number of images that the shares refer to
    score  the value that the published figure is compared with
    """
    shares = {key: value for key, value in values.items() if key.startswith("top")}
    bounds = {f"{key}_interval": [round(end, 4) for end in interval(share, count)] for key, share in shares.items()}
    told = {} if published is None else {"published": published, "difference": round(values[score] - published, 4)}
    return {**about, **values, **bounds, **told}


def show(records: Sequence[Record], keys: Sequence[str], title: str) -> None:
    """Print the values `keys` of one evaluation as a column, or of several with one line each."""
    if len(records) > 1:
        _show_several(records, keys, title)
        return
    (only,) = records
    table = Table("metric", "value", title=title)
    for key in keys:
        table.add_row(key, _said(only, key))
    if "published" in only:
        table.add_row("published", f"{only['published']:.2f} %")
        table.add_row("difference", f"{only['difference']:+.2f}")
    CONSOLE.print(table)


def _said(record: Record, key: str) -> str:
    if not key.startswith("top"):
        return f"{record[key]:.4g}"
    low, high = record[f"{key}_interval"]
    return f"{record[key]:.2f} %  (95 %: {low:.2f} ... {high:.2f})"


def _show_several(records: Sequence[Record], keys: Sequence[str], title: str) -> None:
    told = [key for key in ("published", "difference") if any(key in record for record in records)]
    # folded, not cut off: files of one model start alike, and without a terminal a line has 80 characters
    table = Table(*(Column(head, overflow="fold") for head in ("weights", "model", "size")), title=title)
    for key in (*keys, *told):
        table.add_column(key, justify="right", overflow="fold")
    for record in records:
        cells = [_cell(record, key) for key in (*keys, *told)]
        table.add_row(record["name"], record["model"], _size(record), *cells)
    CONSOLE.print(table)


def _cell(record: Record, key: str) -> str:
    if key not in record:
        return ""
    if key.startswith("top"):
        low, high = record[f"{key}_interval"]
        return f"{record[key]:.2f} ± {(high - low) / 2:.2f}"
    return format(record[key], {"published": ".2f", "difference": "+.2f"}.get(key, ".4g"))


def _size(record: Record) -> str:
    """The size of images; where dense tasks resize them, their short side, and the most for the long one."""
    size, prep = record["img_size"], record.get("preprocessing", {})
    short, long = (prep.get(key) for key in ("short_side", "long_side"))
    if short or long:
        short = max(short) if isinstance(short, Sequence) else short
        return f"{short or ''}/{long or ''}"
    return str(size) if isinstance(size, int) else "x".join(map(str, size))


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file atomically."""
    with replaced(path) as temporary:
        temporary.write_text(json.dumps(finite(content), indent=1) + "\n")


def write_csv(path: Path, rows: Iterable[Record]) -> None:
    """Write a CSV file atomically; see `as_csv`."""
    _write(path, as_csv(rows))


def as_csv(rows: Iterable[Record]) -> bytes:
    """A CSV file, whose columns are those of the first row."""
    rows, file = list(rows), io.StringIO(newline="")
    writer = csv.DictWriter(file, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue().encode(errors="backslashreplace")  # a path may contain bytes that are not UTF-8


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced(path) as temporary:
        temporary.write_bytes(content)
