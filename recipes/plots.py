"""Plots of a run: its curves and confusions. Drawn without a display."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch.nn.functional as F
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image
from torch import Tensor

from ops.tool import replaced
from recipes.pictures import save_picture

WRITTEN_OUT = 20  # number of classes up to which names and counts are legible
MOST_BARS = 60
AS_WRITTEN = rc_context({"text.parse_math": False})  # names of classes and runs may have dollars
SLANTED = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG atomically."""
    with replaced(path) as temporary, _boxes_for_letters():
        FigureCanvasAgg(figure).print_png(temporary)


@contextmanager
def _boxes_for_letters() -> Iterator[None]:
    """Within, letters that the font lacks, as in Chinese names, are drawn as boxes without a warning for each."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from", UserWarning)
        yield


@AS_WRITTEN
def draw_curves(path: Path, history: list[dict[str, Any]], score: str) -> None:
    """Training and validation loss, the score, and the learning rate over the steps."""
    figure = Figure(figsize=(13, 3.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for axes, keys in ((left, ("loss", "val_loss")), (middle, (f"val_{score}",)), (right, ("lr",))):
        for key in keys:
            _plot(axes, history, key, label=key)
        _finish(axes)
    save_figure(figure, path)


@AS_WRITTEN
def draw_together(path: Path, histories: dict[str, list[dict[str, Any]]], score: str) -> None:
    """Training loss, validation loss and score of several runs over the steps, as far as any of them has these.

    histories  by label
    """
    keys = dict.fromkeys(("loss", "val_loss", f"val_{score}"))
    keys = [key for key in keys if any(line.get(key) is not None for lines in histories.values() for line in lines)]
    figure = Figure(figsize=(5 * len(keys), 4 + 0.18 * len(histories)), layout="constrained")
    for axes, key in zip(figure.subplots(1, len(keys), squeeze=False)[0], keys, strict=True):
        for history in histories.values():
            _plot(axes, history, key, label=None)
        axes.set_title(key)
        _finish(axes)
    lines = [f"C{index % 10}" for index in range(len(histories))]
    handles = [Line2D([], [], color=colour, label=label) for colour, label in zip(lines, histories, strict=True)]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(3, len(histories)), fontsize=8)
    save_figure(figure, path)


def _plot(axes: Any, history: list[dict[str, Any]], key: str, label: str | None) -> None:
    points = [(line["step"], line[key]) for line in history if line.get(key) is not None]
    marker = "." if key.startswith("val") or len(points) == 1 else None  # a single point draws no line
    axes.plot(*(zip(*points, strict=True) if points else ((), ())), label=label, marker=marker)


def _finish(axes: Any) -> None:
    axes.set_xlabel("step")
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()


@AS_WRITTEN
def draw_confusion(path: Path, counts: Tensor, names: list[str]) -> None:
    """Rows are true classes, columns predicted ones; shades are shares of the true class.

    counts  (classes, classes) integers. With many classes the names are left out and the diagonal is white, so that
    the confusions stand out.
    """
    classes = len(counts)
    shares = counts.cpu().double() / counts.sum(1, keepdim=True).clamp(min=1)
    side = min(max(4.5, 0.45 * classes + 2), 11)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    if classes > WRITTEN_OUT:
        _draw_many(figure, axes, shares)
    else:
        _draw_few(axes, counts, shares, names)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    accuracy = counts.diagonal().sum().item() / max(counts.sum().item(), 1)
    axes.set_title(f"{counts.sum().item()} images, {100 * accuracy:.2f} % correct\n{_worst(shares, names)}")
    save_figure(figure, path)


@AS_WRITTEN
def draw_found(path: Path, picture: Image.Image | None, values: dict[str, float], title: str) -> None:
    """A picture of predictions, if there is one, at full resolution, beside a bar for each class, lowest on top.

    values  of the classes, in percent
    """
    ranked = sorted(values.items(), key=lambda item: item[1])
    if len(ranked) > MOST_BARS:
        title = f"{title}\nthe {MOST_BARS} lowest of {len(ranked)} classes"
    ranked = ranked[:MOST_BARS]
    figure = Figure(figsize=(5, max(3.0, 1 + 0.2 * len(ranked))), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh([name for name, _ in ranked], [value for _, value in ranked])
    axes.bar_label(bars, fmt="%.1f", padding=2, fontsize=7)
    axes.set_xlim(0, 110)
    axes.set_xticks(range(0, 101, 20))
    axes.margins(y=0.01)
    axes.invert_yaxis()
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3, axis="x")
    save_picture(_joined(picture, _drawn(figure)), path)


def _drawn(figure: Figure) -> Image.Image:
    canvas = FigureCanvasAgg(figure)
    with _boxes_for_letters():
        canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def _joined(left: Image.Image | None, right: Image.Image) -> Image.Image:
    if left is None:
        return right
    sheet = Image.new("RGB", (left.width + right.width, max(left.height, right.height)), "white")
    sheet.paste(left)
    sheet.paste(right, (left.width, 0))
    return sheet


def _worst(shares: Tensor, names: list[str]) -> str:
    mistakes = shares.clone().fill_diagonal_(0).flatten()
    top = mistakes.topk(min(3, len(mistakes)))
    pairs = [(share, *divmod(index, len(names))) for share, index in zip(*(t.tolist() for t in top), strict=True)]
    said = [f"{names[true]} as {names[taken]} ({100 * share:.0f} %)" for share, true, taken in pairs if share > 0]
    return "most confused: " + ", ".join(said) if said else "no mistakes"


def _draw_few(axes: Any, counts: Tensor, shares: Tensor, names: list[str]) -> None:
    axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(names)), names, **({} if max(map(len, names)) < 3 else SLANTED))
    axes.set_yticks(range(len(names)), names)
    for row, column in counts.nonzero().tolist():
        colour = "white" if shares[row, column] > 0.5 else "black"
        axes.text(column, row, str(counts[row, column].item()), ha="center", va="center", color=colour, fontsize=8)


def _draw_many(figure: Figure, axes: Any, shares: Tensor) -> None:
    mistakes = shares.clone().fill_diagonal_(0)
    blocks = -(-len(shares) // 250)  # a cell must be at least about two pixels wide to be seen
    if blocks > 1:
        mistakes = F.max_pool2d(mistakes[None], blocks, ceil_mode=True)[0]
    extent = (0, len(shares), len(shares), 0)
    image = axes.imshow(mistakes.numpy(), cmap="magma_r", vmin=0, interpolation="nearest", extent=extent)
    figure.colorbar(image, ax=axes, label="share of the true class that is misclassified", shrink=0.8)
