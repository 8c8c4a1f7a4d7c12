"""Which tokens a query attends to, and how much: windows, grids, neighborhoods, routed regions, frequencies."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ops import neighborhood_attention, pooled_attention, routed_attention, window_attention
from ops.dispatch import wide

from . import canvas
from .attention import reach, weights
from .calls import Call
from .look import Drawn, Look
from .picture import Absent


def attended(ax: Any, look: Look, call: Call, query: tuple[int, int], label: str) -> dict[str, Tensor]:
    """One panel: the tokens that a query attends to are outlined, and coloured by their weights."""
    token, found, seen = look.pixels(call), look.heads(weights(call, query)), reach(call, query)
    canvas.backdrop(ax, look.image, label)
    canvas.heat(ax, found, token)
    canvas.outline(ax, seen, token)
    canvas.mark(ax, query, token)
    return {"weights": found, "reach": seen}


def row(look: Look, calls: list[Call], labels: list[str], what: str) -> Drawn:
    """A panel per call, for the query; data are numbered by panel."""
    figure, axes = canvas.panels(1, len(calls), look.title(what), ratio=look.ratio)
    data = {}
    for i, (ax, call, label) in enumerate(zip(axes[0], calls, labels, strict=True)):
        found = attended(ax, look, call, look.token(call), label)
        data |= {f"{name}_{i}": value for name, value in found.items()}
    return figure, data


def stages(calls: list[Call]) -> list[str]:
    return [f"stage {call.stage}" for call in calls]


def block_and_grid(look: Look) -> Drawn:
    block = look.of(window_attention, within="block_attn.fn")
    grid = look.of(window_attention, within="grid_attn.fn")
    if look.stage is None:  # later maps are smaller, and the last is one window
        block, grid = block[:2], grid[:2]
    pairs = [call for pair in zip(block, grid, strict=True) for call in pair]
    labels = [f"stage {call.stage}, {look.module(call).partition}" for call in pairs]
    return row(look, pairs, labels, "what a token attends to in its block and in its grid")


def windows(look: Look) -> Drawn:
    calls = look.of(window_attention)
    return row(look, calls, stages(calls), "what a token attends to in its window")


def neighborhoods(look: Look) -> Drawn:
    """The query and the token in the corner, in the first block of each dilation of one stage."""
    calls = by_dilation(look)
    title = look.title(f"neighborhoods in stage {calls[0].stage}")
    figure, axes = canvas.panels(1, 2 * len(calls), title, ratio=look.ratio)
    data = {}
    for i, call in enumerate(calls):
        dilation = call.arguments["dilation"]
        for ax, query, where in ((axes[0, 2 * i], look.token(call), "query"), (axes[0, 2 * i + 1], (0, 0), "corner")):
            found = attended(ax, look, call, query, f"dilation {dilation}, {where}")
            data |= {f"{name}_{dilation}_{where}": value for name, value in found.items()}
    return figure, data


def by_dilation(look: Look) -> list[Call]:
    """The first call of each dilation in the chosen or the first stage; with a `block` other than 0 only that one's."""
    first = look.of(neighborhood_attention)[0]
    if look.block:
        return [first]
    calls: dict[int, Call] = {}
    for call in look.calls:
        if call.op is neighborhood_attention and call.stage == first.stage:
            calls.setdefault(call.arguments["dilation"], call)
    return list(calls.values())


def routes(look: Look) -> Drawn:
    """The regions that the query's region is routed to, the best numbered, and the query's attention inside them."""
    calls = look.of(routed_attention)
    figure, axes = canvas.panels(1, len(calls), look.title("regions that a query is routed to"), ratio=look.ratio)
    data = {}
    for ax, call in zip(axes[0], calls, strict=True):
        own, routed, regions = route(look, call)
        label = f"stage {call.stage}: {len(routed)} of {regions[0] * regions[1]} regions"
        found = attended(ax, look, call, look.token(call), label)
        cell = region(call)
        side = look.pixels(call, cell)
        canvas.outline(ax, numbered(regions, [own]), side, canvas.OWN)
        for rank, number in enumerate(routed[:9].tolist()):
            canvas.note(ax, str(rank + 1), divmod(number, regions[1]), side)
        data |= {f"{name}_{call.stage}": value for name, value in found.items()} | {f"routes_{call.stage}": routed}
    return figure, data


def region(call: Call) -> tuple[int, int]:
    """The size of a region in tokens, down and across."""
    (h, w), (rows, columns) = call.result.shape[1:3], call.arguments["regions"]
    return h // rows, w // columns


def route(look: Look, call: Call) -> tuple[int, Tensor, tuple[int, int]]:
    """The number of the query's region, the numbers of those that it is routed to, and how many there are."""
    (y, x), (down, across), regions = look.token(call), region(call), call.arguments["regions"]
    own = y // down * regions[1] + x // across
    return own, call.arguments["route"][0, own], regions


def numbered(regions: tuple[int, int], chosen: list[int]) -> Tensor:
    """(rows, columns) with 1 at the regions of these numbers."""
    labels = torch.zeros(regions[0] * regions[1], dtype=torch.long)
    labels[chosen] = 1
    return labels.view(regions)


def high_and_low(look: Look) -> Drawn:
    """A window of the high frequencies beside the pooled map of the low ones, and the spectra of both outputs."""
    halves = [call for call in look.calls if call.module.endswith((".hi", ".lo"))]
    shared = [call for call in look.of(pooled_attention, within=".lo") if partner(halves, call)]
    if not shared:
        raise Absent("no chosen stage has heads for both high and low frequencies, which this picture needs")
    low = shared[0]
    high = partner(halves, low)
    figure, axes = canvas.panels(1, 4, look.title(f"HiLo's two halves in stage {low.stage}"), ratio=look.ratio)
    data = attended(axes[0, 0], look, high, look.token(high), "Hi-Fi: a window")
    data |= {f"low_{name}": value for name, value in pooled(axes[0, 1], look, low).items()}
    data |= {"high_spectrum": spectrum(high.result), "low_spectrum": spectrum(low.result)}
    canvas.spectrum(axes[0, 2], data["high_spectrum"], "Hi-Fi: frequencies")
    canvas.spectrum(axes[0, 3], data["low_spectrum"], "Lo-Fi: frequencies")
    return figure, data


def partner(halves: list[Call], low: Call) -> Call | None:
    """The call for high frequencies of the same module as `low`."""
    return next((call for call in halves if call.module == low.module.removesuffix("lo") + "hi"), None)


def pooled(ax: Any, look: Look, call: Call) -> dict[str, Tensor]:
    side = look.module(call).window
    found = look.heads(weights(call, look.token(call)))
    canvas.backdrop(ax, look.image, f"Lo-Fi: {found.shape[0]} x {found.shape[1]} pooled keys")
    canvas.heat(ax, found, look.pixels(call, (side, side)))
    canvas.mark(ax, look.token(call), look.pixels(call))
    return {"weights": found}


def spectrum(result: Tensor) -> Tensor:
    """(H, W): the magnitude of each frequency of a map (1, H, W, heads, D), averaged over channels, 0 in the middle."""
    values = result[0].flatten(2).to(wide(result.dtype))  # in half precision CPUs have no transform
    return torch.fft.fftshift(torch.fft.fft2(values, dim=(0, 1)).abs().mean(2))
