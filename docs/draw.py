"""The figures of the blocks, as SVG: the layers of a block, and below them who attends to whom on a map.

python -m docs.draw  # writes docs/images/block-<family>.svg
"""

from argparse import ArgumentParser
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from pathlib import Path

IMAGES = Path(__file__).parent / "images"
CELL, GAP, TOP, WIDTH = 13, 44, 104, 720
SIDE = 12  # tokens of the map that neighborhoods are drawn on
COLOURS = {"": "#f1f5f9", "query": "#f59e0b", "key": "#93c5fd", "more": "#3b82f6", "most": "#1e3a8a"}
FONT = 'font-family="sans-serif" font-size="12" fill="#1f2937"'
Place = tuple[int, int]


@dataclass(frozen=True)
class Panel:
    """A map of tokens: `of(row, column)` names the colour of each token, with lines between tiles of `tile` tokens."""

    title: str
    side: int
    of: Callable[[int, int], str]
    tile: int = 0


def attends(query: Place, keys: Callable[[int, int], bool]) -> Callable[[int, int], str]:
    return lambda r, c: "query" if (r, c) == query else "key" if keys(r, c) else ""


def tile_of(query: Place, side: int) -> Callable[[int, int], bool]:
    return lambda r, c: r // side == query[0] // side and c // side == query[1] // side


def near(query: Place, window: int, dilation: int) -> Callable[[int, int], bool]:
    """The rule of neighborhoods: at a border the window shifts inward along positions equal modulo the dilation."""

    def along(q: int, k: int) -> bool:
        first = min(max(q // dilation - window // 2, 0), (SIDE - q % dilation + dilation - 1) // dilation - window)
        return k % dilation == q % dilation and first <= k // dilation < first + window

    return lambda r, c: along(query[0], r) and along(query[1], c)


def significance(r: int, c: int) -> str:
    return ("most", "more", "key", "")[min(((r - 4) ** 2 + (c - 7) ** 2) // 9, 3)]


Q, CORNER = (5, 6), (0, 1)
FIGURES = {
    "maxvit": (
        ["MBConv", "block attention", "MLP", "grid attention", "MLP"],
        [
            Panel("block: the tile around the query", 12, attends(Q, tile_of(Q, 4)), 4),
            Panel("grid: tokens spaced evenly", 12, attends(Q, lambda r, c: r % 3 == Q[0] % 3 and c % 3 == Q[1] % 3)),
        ],
    ),
    "nat": (
        ["neighborhood attention", "MLP", "dilated attention (DiNAT)", "MLP"],
        [
            Panel("the nearest 5 x 5", SIDE, attends(Q, near(Q, 5, 1))),
            Panel("shifted at a border", SIDE, attends(CORNER, near(CORNER, 5, 1))),
            Panel("dilation 2", SIDE, attends(Q, near(Q, 5, 2))),
        ],
    ),
    "biformer": (
        ["position encoding", "routed attention", "MLP"],
        [
            Panel("the region of the query", 12, lambda r, c: "query" if tile_of(Q, 3)(r, c) else "", 3),
            Panel(
                "keys: the most related regions",
                12,
                attends(Q, lambda r, c: (r // 3, c // 3) in {(1, 2), (0, 3), (3, 1)}),
                3,
            ),
        ],
    ),
    "litv2": (
        ["HiLo attention", "MLP with a convolution"],
        [
            Panel("high frequencies: windows of 2 x 2", 12, attends(Q, tile_of(Q, 2)), 2),
            Panel("low frequencies: a query of the map ...", 12, attends(Q, lambda r, c: False)),
            Panel("... and the pooled map", 6, lambda r, c: "key"),
        ],
    ),
    "gcvit": (
        ["window attention", "MLP", "global-query attention", "MLP"],
        [
            Panel("local: queries of the window", 12, attends(Q, tile_of(Q, 4)), 4),
            Panel("one window of queries ...", 4, lambda r, c: "query"),
            Panel("... attends to every window", 12, lambda r, c: "key", 4),
        ],
    ),
    "davit": (
        ["window attention", "MLP", "channel attention", "MLP"],
        [
            Panel("tokens, inside windows", 12, attends(Q, tile_of(Q, 4)), 4),
            Panel("channels, over all tokens", 8, lambda r, c: "query" if r == c == 3 else "key" if r == 3 else ""),
        ],
    ),
    "sgformer": (
        ["hybrid attention", "MLP", "guided attention", "MLP"],
        [
            Panel("hybrid: windows ...", 12, attends(Q, tile_of(Q, 4)), 4),
            Panel("... show how significant tokens are", 12, significance),
            Panel("guided: the merged tokens", 6, lambda r, c: ("key", "more", "most")[r // 2]),
        ],
    ),
    "stvit": (
        ["position encoding", "pixels to super tokens", "attention", "back to pixels", "MLP"],
        [
            Panel("a pixel and the 3 x 3 cells around it", 12, attends(Q, lambda r, c: 1 <= c // 3 <= 3 and r < 9), 3),
            Panel("super tokens attend to all", 4, lambda r, c: "query" if (r, c) == (1, 2) else "key"),
        ],
    ),
}


def svg(layers: list[str], panels: list[Panel]) -> str:
    """A figure: boxes with arrows between them in a row, the maps below."""
    parts = [*_layers(layers)]
    x = 12
    for panel in panels:
        parts += _panel(panel, x)
        x += max(12 * CELL, 7 * len(panel.title)) + GAP
    height = TOP + 12 * CELL + 12
    width = max(WIDTH, x - GAP + 12)
    view = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {view}>\n' + "\n".join(parts) + "\n</svg>\n"


def _layers(names: list[str]) -> list[str]:
    parts, x = [], 12
    for i, name in enumerate(names):
        width = 7 * len(name) + 16
        if i:
            parts.append(f'<path d="M{x - 18} 34h12m-4 -4l4 4l-4 4" fill="none" stroke="#475569"/>')
        parts.append(f'<rect x="{x}" y="18" width="{width}" height="32" rx="5" fill="#e2e8f0" stroke="#64748b"/>')
        parts.append(f'<text x="{x + width / 2:g}" y="38" text-anchor="middle" {FONT}>{escape(name)}</text>')
        x += width + 24
    return parts


def _panel(panel: Panel, x: int) -> list[str]:
    parts = [f'<text x="{x}" y="{TOP - 10}" {FONT}>{escape(panel.title)}</text>']
    cells = [(r, c) for r in range(panel.side) for c in range(panel.side)]
    for name, colour in COLOURS.items():
        path = "".join(
            f"M{x + c * CELL} {TOP + r * CELL}h{CELL}v{CELL}h-{CELL}z" for r, c in cells if panel.of(r, c) == name
        )
        parts += [f'<path d="{path}" fill="{colour}" stroke="#cbd5e1"/>'] if path else []
    side = panel.side * CELL
    for i in range(panel.tile, panel.side, panel.tile) if panel.tile else ():
        lines = f"M{x + i * CELL} {TOP}v{side}M{x} {TOP + i * CELL}h{side}"
        parts.append(f'<path d="{lines}" stroke="#475569" stroke-width="1.5"/>')
    return parts


def figures() -> dict[str, str]:
    """File name -> SVG of every family."""
    return {f"block-{family}.svg": svg(*content) for family, content in FIGURES.items()}


if __name__ == "__main__":
    ArgumentParser(prog="python -m docs.draw", description=__doc__).parse_args()
    for name, text in figures().items():
        (IMAGES / name).write_text(text)
