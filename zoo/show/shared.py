"""GC ViT's global query: one window of queries for the whole image, used in every window."""

from __future__ import annotations

import torch
from torch import Tensor

from ops import window_attention

from ..gcvit import GlobalAttention
from . import canvas
from .attention import weights
from .calls import Call
from .look import Drawn, Look


def global_query(look: Look) -> Drawn:
    """The queries as colours, and what the query of the chosen token attends to in every window."""
    calls = look.of(window_attention, GlobalAttention)
    figure, axes = canvas.panels(2, len(calls), look.title("the global query"), ratio=look.ratio)
    data = {}
    for (above, below), call in zip(axes.T, calls, strict=True):
        y, x = (p % side for p, side in zip(look.token(call), call.arguments["window"], strict=True))
        queries, found = call.arguments["q"][0].flatten(2), look.heads(weights(call, everywhere(call, (y, x))))
        canvas.tile(above, principal(queries), f"stage {call.stage}: {queries.shape[0]} x {queries.shape[1]} queries")
        canvas.dot(above, y, x)
        canvas.backdrop(below, look.image, f"attention of ({y}, {x}) in every window")
        canvas.heat(below, found, look.pixels(call))
        canvas.outline(below, window_numbers(call), look.pixels(call), canvas.RULES, 0.6)
        data |= {f"queries_{call.stage}": queries, f"weights_{call.stage}": found}
    return figure, data


def everywhere(call: Call, place: tuple[int, int]) -> list[tuple[int, int]]:
    """The tokens of a map at one position of their windows."""
    (h, w), (down, across) = call.result.shape[1:3], call.arguments["window"]
    return [(y, x) for y in range(place[0], h, down) for x in range(place[1], w, across)]


def window_numbers(call: Call) -> Tensor:
    """(H, W): which window a token is in, from 1."""
    (h, w), (down, across) = call.result.shape[1:3], call.arguments["window"]
    return torch.arange(h)[:, None] // down * -(-w // across) + torch.arange(w) // across + 1


def principal(tokens: Tensor) -> Tensor:
    """(h, w, C) -> (h, w, 3): their three principal components, each from 0 to 1."""
    flat = (tokens.flatten(0, 1) - tokens.mean((0, 1))).double()
    parts = flat @ torch.linalg.svd(flat, full_matrices=False).Vh[:3].T
    parts = (parts - parts.amin(0)) / (parts.amax(0) - parts.amin(0)).clamp(min=1e-12)
    return torch.nn.functional.pad(parts, (0, 3 - parts.shape[1])).unflatten(0, tokens.shape[:2])
