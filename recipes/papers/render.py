"""docs/recipes.md, rendered from the tables: python -m recipes.papers > docs/recipes.md"""

from collections.abc import Iterator
from itertools import groupby
from typing import Any

from recipes import papers
from zoo.releases.render import FAMILIES, SAME_FAMILY

TASKS = {"classify": "Classification", "segment": "Segmentation", "detect": "Detection"}
HEADER = """\
# How the authors trained

This page lists what `recipe=paper` sets, for every model with a published recipe, and at the end of each task what has
no recipe here. It is rendered from the tables in `recipes/papers` (`make docs`). You can override every value on the
command line. Where a paper and the repository of its released weights differ, the recipe follows the repository, and
the other value is listed below the table.

A value with \\* is chosen: no source gives it. Where the models of a column differ, their values are listed one below
the other, in the order of the first row. Keys are those of the configuration; `null` means off, or not given.
Precision depends on the hardware (`hardware.amp`) unless a table sets it, and no family uses layer-wise learning rate
decay (`optim.layer_decay`). All flip half of the images horizontally, as `data.hflip` does unless the data says
otherwise.

`python -m recipes.schedule recipe=paper model=...` prints the schedule that results. With `--out FOLDER` it writes the
learning rate of every step, the weight decay and learning rate factor of every parameter, and the drop-path rate of
every block.
"""


def render() -> str:
    """The whole page, Markdown."""
    parts = [HEADER]
    for task, title in TASKS.items():
        parts += [f"## {title}", *_families(task), *_unpublished(task)]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def _families(task: str) -> Iterator[str]:
    for family, group in groupby(papers.tables(task).items(), key=lambda item: item[0].split("/")[0]):
        phases = dict(group)
        yield f"### {FAMILIES[SAME_FAMILY.get(family, family)]}"
        yield "\n".join(_table(task, phases))
        yield "\n".join(line for phase, table in phases.items() for line in _remarks(phase, table))


def _table(task: str, phases: dict[str, Any]) -> Iterator[str]:
    """A row for each key, a column for each phase."""
    yield "| key | " + " | ".join(f"`{phase.split('/')[1]}`" for phase in phases) + " |"
    yield "|---|" + "---|" * len(phases)
    first = next(iter(phases))
    yield "| models | " + " | ".join("<br>".join(table["models"]) for table in phases.values()) + " |"
    for key in sorted(papers.recipe(next(iter(phases[first]["models"])), first, task).values):
        yield f"| `{key}` | " + " | ".join(_cell(task, phase, table, key) for phase, table in phases.items()) + " |"


def _cell(task: str, phase: str, table: dict[str, Any], key: str) -> str:
    """The value of a key: one for all models of the phase, or one each, in their order."""
    found = []
    for model in table["models"]:
        recipe = papers.recipe(model, phase, task)
        found.append(_text(recipe.values[key]) + "*" * (key in recipe.chosen))
    same = len(set(found)) == 1
    return (found[0] if same else "<br>".join(found)).replace("*", r"\*")


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.5g}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_text, value)) + "]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _remarks(phase: str, table: dict[str, Any]) -> Iterator[str]:
    name = f"`{phase.split('/')[1]}`"
    yield f"- {name}: {table['source']}." + (f" It starts from {table['starts']}." if "starts" in table else "")
    if "releases" in table:
        yield f"    - Released: {', '.join(f'`{to}` starts from `{name}`' for to, name in table['releases'].items())}."
    for line in table.get("differs", []):
        yield f"    - {line}"
    for model, metrics in table.get("results", {}).items():
        figures = ", ".join(f"{metric} {value}" for metric, value in metrics.items())
        yield f"    - Published for {model}: {figures}."


def _unpublished(task: str) -> Iterator[str]:
    found = {f"`{model}`": why for model, why in papers.unpublished(task).items()} | papers.left_out(task)
    if found:
        yield "### Without a recipe"
        yield "\n".join(f"- {what}: {why}." for what, why in found.items())
