"""The table of models: parameters and cost as counted here, beside the figures that the authors print.

    python -m zoo.table                 # prints the table
    python -m zoo.table docs/models.md  # writes it between the marks in that file

Counting takes a second or two per model.
"""

import argparse
import json
import re
from collections.abc import Iterator, Mapping
from importlib.resources import files
from pathlib import Path

import timm
import torch
from timm.layers import to_2tuple
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ops import implementation
from ops.tool import ToolError, replaced, tool

from .costs import DIFFERS, GFLOPS
from .registry import class_of, variants
from .releases import candidates

GOLDEN = files(__package__) / "golden.json"  # written by tests/measure_golden.py
HEADER = """\
| model | image | parameters | GFLOPs | printed | best published top-1 | error, float64 | float32 |
|---|---:|---:|---:|---:|---|---:|---:|
"""


def parameters(name: str) -> int:
    """Parameters of a variant with 1,000 classes."""
    with torch.device("meta"):
        return sum(p.numel() for p in class_of(name)(**variants()[name]).parameters())


def gflops(name: str, img_size: int | tuple[int, int] | None = None) -> float:
    """Multiply-adds in 10^9 of matrix multiplications and convolutions for one image.

    Papers call this FLOPs. Nothing is computed: the shapes alone run through the model.

    name      a variant, or any model of timm's
    img_size  of the image and of the model that is built for it; None: the model's own
    """
    with torch.device("meta"):
        model, size = at_size(name, img_size)
        image = torch.empty(1, 3, *size)
    counter = FlopCounterMode(display=False)
    # the references do what the equations say, and are counted whole; a fast path may compute more than needed
    with implementation("reference"), counter, torch.no_grad():
        model.eval()(image)
    return counter.get_total_flops() / 2e9


def at_size(name: str, img_size: int | tuple[int, int] | None = None) -> tuple[nn.Module, tuple[int, int]]:
    """A variant, or any model of timm's, with 1,000 classes, built for images of a size, and that size (H, W)."""
    given = {} if img_size is None else {"img_size": img_size}
    if name in variants():
        model = class_of(name)(**variants()[name] | given)
        return model, model.img_size
    try:
        model = timm.create_model(name, **given)
    except TypeError as error:  # it is built for no size
        if "img_size" not in str(error):
            raise
        model = timm.create_model(name)
    own = model.pretrained_cfg["input_size"][-2:] if img_size is None else to_2tuple(img_size)
    return model, tuple(own)


def row(name: str, errors: Mapping[str, tuple[float, float]]) -> str:
    """One line of the table; `errors`: model -> error against the published code in float64 and float32."""
    printed = GFLOPS.get(name)
    size = variants()[name]["img_size"]
    measured = (r for r in candidates(name) if r.img_size == size and r.top1)
    best = max(measured, key=lambda r: (r.loadable, r.top1), default=None)
    top1 = f"{best.top1:.1f} ({best.tag or best.source})" if best else ""
    error = [f"{e:.0e}" for e in errors[name]] if name in errors else ["", ""]
    cells = [f"`{name}`", size, f"{parameters(name) / 1e6:.1f} M", f"{gflops(name):.2f}"]
    cells += ["" if printed is None else f"{printed:g}{' *' if name in DIFFERS else ''}", top1, *error]
    return "| " + " | ".join(map(str, cells)) + " |\n"


def render() -> str:
    """The whole table as Markdown."""
    return "".join(lines())


def lines() -> Iterator[str]:
    """The table line by line: counting takes a second or two a model."""
    yield from HEADER.splitlines(keepends=True)
    errors = json.loads(GOLDEN.read_text("utf-8"))["errors"]
    yield from (row(name, errors) for name in variants())


def insert(text: str, table: str, mark: str = "models") -> str:
    """`text` with `table` between <!-- mark --> and <!-- /mark -->. Raises ValueError where these lines are missing."""
    return text.replace(_marked(text, mark), f"<!-- {mark} -->\n{table}<!-- /{mark} -->\n", 1)


def between(text: str) -> str:
    """The table of models that `insert` put into `text`. Raises ValueError where its marks are missing."""
    return _marked(text, "models").removeprefix("<!-- models -->\n").removesuffix("<!-- /models -->\n")


def _marked(text: str, mark: str) -> str:
    """The table and its marks."""
    found = re.search(rf"^<!-- {mark} -->\n.*?^<!-- /{mark} -->\n", text, re.DOTALL | re.MULTILINE)
    if found is None:
        raise ValueError(f"expected the lines <!-- {mark} --> and <!-- /{mark} --> around the table")
    return found[0]


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m zoo.table", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("page", nargs="?", type=Path, help="a Markdown file with the marks; default: print the table")
    return parser.parse_args(argv)


@tool
def main(argv: list[str] | None = None) -> None:
    path = parse(argv).page
    if path is None:
        for line in lines():
            print(line, end="", flush=True)
        return
    try:
        text = path.read_text("utf-8")
        between(text)  # before minutes of counting
        with replaced(path) as temporary:
            temporary.write_text(insert(text, render()), "utf-8")
    except (OSError, ValueError) as error:
        raise ToolError(f"{path}: {error}") from error


if __name__ == "__main__":
    main()
