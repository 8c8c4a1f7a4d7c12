"""The generated tables of the pages: each is between marks, <!-- speed --> ... <!-- /speed -->.

python -m docs.render  # writes them into the pages
"""

import inspect
import json
import sys
from argparse import ArgumentParser
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ops
from recipes import papers
from zoo import table
from zoo.releases import RELEASES
from zoo.releases.render import FAMILIES, TASKS, _licence, family

DOCS = Path(__file__).parent
ROOT = DOCS.parent
# page -> functions of `ops`; rows of benchmarks
OPS = {
    "window": (["window_attention"], ["window_attention"]),
    "neighborhood": (["neighborhood_attention"], ["neighborhood_attention"]),
    "routed": (["routed_attention", "route_regions"], ["routed_attention"]),
    "channel": (["channel_attention"], ["channel_attention"]),
    "supertoken": (["super_tokens", "scatter_super_tokens"], ["super_token_attention"]),
    "reallocation": (
        ["significance", "rank_tokens", "reallocate_tokens"],
        ["significance", "token_reallocation"],
    ),
    "pooled": (["pooled_attention"], ["pooled_attention"]),
}
# files of measured calls; on a GPU, those of pooled attention are of a run of its own
CALLS = ("ops_*.json", "pooled_attention_cuda.json")


def pages() -> dict[Path, str]:
    """Every page with tables -> its text with these tables rendered anew."""
    found = {}
    for key in FAMILIES:
        marks = {"variants": variants(key), "releases": releases(key), "recipe": recipe(key), "speed": speed(key)}
        found[DOCS / "families" / f"{key}.md"] = marks
    for key, (functions, rows) in OPS.items():
        found[DOCS / "ops" / f"{key}.md"] = {"signature": signatures(functions), "speed": op_speed(rows)}
    return {path: filled(path, marks) for path, marks in found.items()}


def filled(path: Path, marks: dict[str, str]) -> str:
    """The text of a page with each table between its marks. Raises ValueError where the page or a mark is missing."""
    try:
        text = path.read_text("utf-8")
        for mark, rendered in marks.items():
            text = table.insert(text, f"\n{rendered}\n", mark)
    except (OSError, ValueError) as error:
        wanted = ", ".join(f"<!-- {mark} --> <!-- /{mark} -->" for mark in marks)
        said = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"{path}: {said}. Write the page with these marks, each on a line: {wanted}") from error
    return text


def variants(key: str) -> str:
    """The family's rows of the table of models, without the errors."""
    lines = table.between((DOCS / "models.md").read_text("utf-8")).splitlines()
    mine = lines[:2] + [line for line in lines[2:] if family(line.split("`")[1]) == key]
    return "".join("|".join(line.split("|")[:7]) + "|\n" for line in mine)


def releases(key: str) -> str:
    """Classifiers that load by their tag, and how many files there are for other tasks."""
    mine = [r for r in RELEASES if family(r.model) == key and not r.foreign]
    if not mine:
        return "No weights are known.\n"
    rows = [[f"`{r.name}`", r.top1 or "", r.img_size, r.data, _licence(r)] for r in mine if r.loadable]
    others = {title: sum(r.task == task for r in mine) for task, title in TASKS.items() if task != "classification"}
    said = " and ".join(f"{count} {title.lower()}" for title, count in others.items() if count)
    where = f"[checkpoints.md](../../checkpoints.md#{FAMILIES[key].lower().replace(' ', '-')})"
    end = f"Files, digests and sources are in {where}" + (f", along with {said} checkpoints" if said else "") + ".\n"
    return lines(["weights", "top-1", "pixels", "trained on", "licence"], rows, numbers=(1, 2)) + "\n" + end


def recipe(key: str) -> str:
    """The phases of the authors' recipes, with their models."""
    known = {task: _phases(task, key) for task in ("classify", "segment", "detect")}
    rows = [[f"`{task}`", f"`{phase}`", names] for task, phases in known.items() for phase, names in phases]
    if not rows:
        return "`recipes/papers` has no recipe of the authors yet; `recipe=quick` is the default.\n"
    end = "\nThe source of every value is in `recipes/papers` ([all values](../recipes.md)).\n"
    return lines(["task", "phase", "models"], rows) + end


def _phases(task: str, key: str) -> Iterator[tuple[str, str]]:
    for phase, entry in papers.tables(task).items():
        names = [name for name in entry["models"] if family(name) == key]
        if names:
            yield phase, ", ".join(f"`{name}`" for name in names)


def speed(key: str) -> str:
    """Speed of the family's models, on every device with measurements."""
    header = ["model", "mode", "images/s", "peak MiB", "twin", "its images/s", "its peak MiB", "ours / twin"]
    parts = []
    for file in sorted((ROOT / "benchmarks").glob("models_*.json")):
        measured = json.loads(file.read_text("utf-8"))
        rows = [_model_row(row) for row in measured["rows"] if family(row["model"]) == key]
        parts += [lines(header, rows, numbers=(2, 3, 5, 6, 7)) + "\n" + circumstances(measured)] if rows else []
    return "\n".join(parts) or "No measurements yet.\n"


def _model_row(row: dict[str, Any]) -> list[Any]:
    speeds, memory = row["images_a_second"], row["mib"]
    cells = [f"`{row['model']}`", row["mode"], f"{speeds['ours']:.1f}", f"{memory['ours']:.0f}"]
    twin = next((name for name in speeds if name != "ours"), None)
    if twin is None:
        return [*cells, "", "", "", ""]
    return [*cells, twin, f"{speeds[twin]:.1f}", f"{memory[twin]:.0f}", f"{speeds['ours'] / speeds[twin]:.2f}"]


def op_speed(names: list[str]) -> str:
    """Measured calls of models, beside the fastest other implementation."""
    header = ["call", "models", "dtype", "mode", "ours, ms", "peak MiB", "fastest peer", "its ms", "its peak MiB"]
    parts = []
    for file in sorted(file for name in CALLS for file in (ROOT / "benchmarks").glob(name)):
        measured = json.loads(file.read_text("utf-8"))
        rows = [_op_row(row) for row in measured["rows"] if row["op"] in names]
        parts += [lines(header, rows, numbers=(4, 5, 7, 8)) + "\n" + circumstances(measured)] if rows else []
    return "\n".join(parts) or "No measurements yet.\n"


def _op_row(row: dict[str, Any]) -> list[Any]:
    took, memory = row["ms"], row["mib"]
    call = f"{row['call']}, {row['image']} px, batch {row['batch']}"
    cells = [call, ", ".join(row["models"]), row["dtype"], row["mode"], f"{took['ours']:.3g}", f"{memory['ours']:.0f}"]
    peers = {name: ms for name, ms in took.items() if name != "ours"}
    if not peers:
        return [*cells, "", "", ""]
    best = min(peers, key=peers.get)
    return [*cells, best, f"{peers[best]:.3g}", f"{memory[best]:.0f}"]


def circumstances(measured: dict[str, Any]) -> str:
    """When, where and how it was measured."""
    said = "; ".join(measured[key] for key in ("device", "versions", "settings"))
    return f"{measured['date']}, {said}.\n`{measured['command']}`\n"


def signatures(functions: list[str]) -> str:
    """Signatures and docstrings of public functions, which document shapes and equations."""
    parts = []
    for name in functions:
        function = getattr(ops, name)
        head = str(inspect.signature(function)).replace("torch.", "")
        parts.append(f"```text\n{name}{head}\n\n{inspect.getdoc(function)}\n```\n")
    return "\n".join(parts)


def lines(header: list[str], rows: list[list[Any]], numbers: tuple[int, ...] = ()) -> str:
    """A table as Markdown; the columns `numbers` are right-aligned."""
    rule = ["---:" if i in numbers else "---" for i in range(len(header))]
    return "".join("| " + " | ".join(map(str, cells)) + " |\n" for cells in (header, rule, *rows))


if __name__ == "__main__":
    ArgumentParser(prog="python -m docs.render", description=__doc__).parse_args()
    try:
        for path, text in pages().items():
            path.write_text(text, "utf-8")
    except ValueError as error:
        sys.exit(f"error: {error}")
