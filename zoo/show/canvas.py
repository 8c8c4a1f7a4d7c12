"""Drawing: the image in grey, heat over it, outlines of tokens, the query."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from torch import Tensor

from .picture import ShowError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OWN, REACH, RULES = "#ffb703", "#2ec4f1", "#ffffff"
SIDE = 2.6  # inches of a panel
DPI = 100


def panels(rows: int, columns: int, title: str, *, ratio: float) -> tuple[Figure, np.ndarray]:
    """A figure with a title, also its label, and (rows, columns) axes without ticks, each of height by width `ratio`.

    Raises ShowError if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise ShowError("pictures need matplotlib: pip install matplotlib") from None
    figure = Figure(dpi=DPI, layout="constrained", label=title)
    lines = wrapped(figure, title, 9, SIDE * columns - 0.1)
    figure.set_size_inches(SIDE * columns, (SIDE * ratio + 0.28) * rows + 0.15 + 0.15 * (1 + lines.count("\n")))
    figure.suptitle(lines, fontsize=9, color="0.25", parse_math=False)
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.set_axis_off()
    return figure, axes


def wrapped(figure: Figure, text: str, fontsize: int, width: float) -> str:
    """`text` in as few lines as fit into a `width` in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.font_manager import FontProperties

    measure, font = FigureCanvasAgg(figure).get_renderer().get_text_width_height_descent, FontProperties(size=fontsize)
    lines = [text]
    while (most := max(map(len, lines))) > 1 and max(measure(line, font, False)[0] for line in lines) > width * DPI:
        lines = textwrap.wrap(text, most - 1)
    return "\n".join(lines)


def label(ax: Any, text: str) -> None:
    """Write `text` above a panel."""
    ax.set_title(wrapped(ax.figure, text, 8, SIDE - 0.1), fontsize=8, parse_math=False)


def backdrop(ax: Any, image: Image.Image, text: str, *, faded: bool = True) -> None:
    """Draw the image, grey and light if `faded`, with pixels as coordinates: its first pixel spans 0 to 1."""
    values = np.asarray(image.convert("L" if faded else "RGB"), dtype=float) / 255
    height, width = values.shape[:2]
    shown = {"cmap": "gray", "vmin": -0.6, "vmax": 1.25} if faded else {}
    ax.imshow(values, extent=(0, width, height, 0), **shown)
    ax.set_xlim(0, width)
    ax.set_ylim(height, 0)
    label(ax, text)


def heat(ax: Any, values: Tensor, token: tuple[float, float]) -> None:
    """A map (h, w) of non-negative values over the image, 0 transparent; `token` is pixels down and across."""
    from matplotlib import colormaps

    shares = (values / values.max().clamp(min=1e-30)).clamp(0, 1).double().cpu().numpy()
    colours = colormaps["inferno"](0.15 + 0.65 * shares)
    colours[..., 3] = 0.75 * shares**0.35
    _over(ax, colours, token)


def tiles(ax: Any, values: Tensor, token: tuple[float, float], cmap: str = "viridis", **shown: Any) -> None:
    """A map (h, w) in opaque colours."""
    _over(ax, values.double().cpu().numpy(), token, cmap=cmap, **shown)


def _over(ax: Any, values: np.ndarray, token: tuple[float, float], **shown: Any) -> None:
    limits = ax.get_xlim(), ax.get_ylim()
    extent = (0, values.shape[1] * token[1], values.shape[0] * token[0], 0)
    ax.imshow(values, extent=extent, interpolation="nearest", **shown)
    ax.set(xlim=limits[0], ylim=limits[1])  # nothing is drawn beyond the image


def outline(ax: Any, labels: Tensor, token: tuple[float, float], colour: str = REACH, width: float = 1.4) -> None:
    """Lines where neighbours of an integer map (h, w) differ; it counts as 0 beyond its border."""
    from matplotlib.collections import LineCollection

    padded = np.pad(labels.long().cpu().numpy(), 1)
    down, across = token
    rows, columns = np.nonzero(padded[1:, 1:-1] != padded[:-1, 1:-1])
    lines = [((x * across, y * down), ((x + 1) * across, y * down)) for y, x in zip(rows, columns, strict=True)]
    rows, columns = np.nonzero(padded[1:-1, 1:] != padded[1:-1, :-1])
    lines += [((x * across, y * down), (x * across, (y + 1) * down)) for y, x in zip(rows, columns, strict=True)]
    ax.add_collection(LineCollection(lines, colors=colour, linewidths=width, capstyle="projecting"))


def mark(ax: Any, position: Sequence[int], token: tuple[float, float]) -> None:
    """The query: the token at (row, column) of a map."""
    dot(ax, *((p + 0.5) * side for p, side in zip(position, token, strict=True)))


def dot(ax: Any, y: float, x: float) -> None:
    """A mark at a place in a panel's own coordinates."""
    ax.plot(x, y, "o", markersize=6, color="white", markeredgecolor="black")


def note(ax: Any, text: str, cell: Sequence[int], side: tuple[float, float]) -> None:
    """A few letters in the upper left of the cell at (row, column)."""
    from matplotlib.patheffects import withStroke

    style = {"fontsize": 7, "color": "white", "va": "top", "ha": "left", "weight": "bold", "clip_on": True}
    letters = ax.text(cell[1] * side[1] + 2, cell[0] * side[0] + 2, text, **style)
    letters.set_path_effects([withStroke(linewidth=1.6, foreground="black")])


def spectrum(ax: Any, values: Tensor, text: str) -> None:
    """Magnitudes (H, W) with the constant part in the middle, from a three-hundredth of the largest to the largest."""
    shares = (values / values.max()).clamp(min=1e-12).log10()
    tile(ax, shares, text, cmap="inferno", vmin=-2.5, vmax=0)


def lengths(ax: Any, size: Tensor, token: tuple[float, float]) -> None:
    """How many tokens are merged with each token of a map (h, w), brighter where fewer, with a legend."""
    from matplotlib import colormaps

    def colour(length: float) -> tuple[float, ...]:
        return colormaps["viridis"](0.95 - 0.85 * math.log(length) / max(math.log(longest), 1))

    longest = float(size.max())
    colours = {length: colour(length) for length in sorted(size.unique().tolist())}
    _over(ax, np.array([[(*colours[n][:3], 0.7) for n in row] for row in size.tolist()]), token)
    for length, shade in colours.items():
        ax.plot([], [], "s", color=shade, markersize=5, label=f"{length}")
    ax.legend(fontsize=6, loc="lower right", handletextpad=0.1, borderpad=0.3, labelspacing=0.2, framealpha=0.85)


def tile(ax: Any, values: Tensor, text: str, **shown: Any) -> None:
    """A map on its own, of values (h, w) or of colours from 0 to 1, (h, w, 3); the mark of a cell is `dot` there."""
    ax.imshow(values.double().cpu().numpy(), interpolation="nearest", **shown)
    label(ax, text)
