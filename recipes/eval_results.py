"""The results of an evaluation: as tables and as files, with confidence intervals."""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Column, Table
from torch import Tensor

from ops.tool import replaced
from recipes import distributed
from recipes.console import CONSOLE, say
from recipes.json_file import finite
from recipes.settings import RunError, writing
from recipes.tasks.classify import among, likeliest, of_model

Record = dict[str, Any]
FILES = ("{}-images.csv", "{}-classes.csv", "{}.png", "{}.json")  # of an evaluation; the last identifies it
SAME = ("weights", "images", "amp", "config")  # what two evaluations of the same thing have in common
LIKELIEST = 5  # classes of an image that are recorded
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


class Answers:
    """The most likely classes of every image, in the order of the data set; each process records those that it saw.

    subset  the model's classes that are predicted, as in the metrics; None for all
    """

    def __init__(self, subset: tuple[int, ...] | None = None):
        self.subset, self.rows, self.seen = subset, [], 0

    def note(self, predictions: Tensor, targets: Tensor) -> None:
        """Logits (B, the model's classes) and labels (B,) of the next batch of this process."""
        logits = among(predictions.float().cpu(), self.subset)
        places = likeliest(logits, LIKELIEST)
        classes, shares = of_model(places, self.subset), logits.softmax(-1).gather(1, places)
        for label, chosen, share in zip(targets.tolist(), classes.tolist(), shares.tolist(), strict=True):
            index = distributed.rank() + self.seen * distributed.size()  # how an evaluation distributes images
            self.rows.append((index, label, chosen, [round(each, 6) for each in share]))
            self.seen += 1

    def table(self, data: Any) -> list[Record]:
        """One row per image, with its label; all processes must call this.

        An image that was replaced, as it could not be decoded, has no answer: the one recorded is of another image.
        """
        own = [_without_answer(data, *row) if row[0] in data.val.named else row for row in self.rows]
        rows = sorted(row for part in distributed.gathered(own) for row in part)
        return [_answer(data, *row) for row in rows]


def _without_answer(data: Any, index: int, _: int, chosen: list[int], shares: list[float]) -> tuple[Any, ...]:
    return index, data.val.label(index), [""] * len(chosen), [""] * len(shares)


def _answer(data: Any, index: int, label: int, chosen: list[int | str], shares: list[float | str]) -> Record:
    row = {"image": data.val.where(index), "label": _label(data, label)}
    for place, (cls, share) in enumerate(zip(chosen, shares, strict=True), 1):
        row |= {f"class{place}": cls, f"share{place}": share}
    return row


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
    answers  one row per image, if they were asked for
    """

    record: Record
    keys: list[str]
    task: Any
    data: Any
    metrics: Any
    answers: list[Record]

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
        """Write <stem>.json, .png and, if there are any, -classes.csv and -images.csv. Raises RunError."""
        folder = results.folder
        with _writing(folder):
            results.make_way(stem, self.record)
            write_json(folder / f"{stem}.json", self.record)
            self.task.picture(folder / f"{stem}.png", self.data, self.metrics)
            for what, rows in (("classes", self.task.classes(self.data, self.metrics)), ("images", self.answers)):
                if rows:
                    write_csv(folder / f"{stem}-{what}.csv", rows)
        say(f"written to {folder}: {', '.join(sorted(_there(folder, stem)))}")


class Results:
    """The folder that evaluations are written to; results of another evaluation in it are kept.

    Their files are moved to earlier/<number>, one folder for everything that a command moves.
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

    def write_list(self, stem: str, records: list[Record]) -> None:
        """Several evaluations as <stem>.json. Raises RunError."""
        with _writing(self.folder):
            self.make_way(stem, records)
            write_json(self.folder / f"{stem}.json", records)

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


def _writing(folder: Path) -> AbstractContextManager[None]:
    return writing(
        f"the evaluation could not be written to {folder}", "give out=<a folder with space that is writable>"
    )


def _there(folder: Path, stem: str) -> list[str]:
    return [name for name in (form.format(stem) for form in FILES) if (folder / name).is_file()]


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


def _label(data: Any, label: int) -> int | str:
    """A label as a class of the model; all labels of the image, separated by spaces, if it has several."""
    if data.truths is not None:
        return " ".join(str(truth) for truth in data.truths[label] if truth >= 0)
    return label if data.subset is None else data.subset[label]


def record(
    about: Record, values: dict[str, float], count: int, published: float | None = None, score: str = "top1"
) -> Record:
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
        table.add_row(record["name"], record["model"], _size(record["img_size"]), *cells)
    CONSOLE.print(table)


def _cell(record: Record, key: str) -> str:
    if key not in record:
        return ""
    if key.startswith("top"):
        low, high = record[f"{key}_interval"]
        return f"{record[key]:.2f} ± {(high - low) / 2:.2f}"
    return format(record[key], {"published": ".2f", "difference": "+.2f"}.get(key, ".4g"))


def _size(size: int | Sequence[int]) -> str:
    return str(size) if isinstance(size, int) else "x".join(map(str, size))


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file atomically."""
    with replaced(path) as temporary:
        temporary.write_text(json.dumps(finite(content), indent=1) + "\n")


def write_csv(path: Path, rows: Iterable[Record]) -> None:
    """Write a CSV file atomically; the columns are those of the first row."""
    rows = list(rows)
    # a path may contain bytes that are not UTF-8: they are escaped
    how = {"newline": "", "encoding": "utf-8", "errors": "backslashreplace"}
    with replaced(path) as temporary, open(temporary, "w", **how) as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
