"""DaViT's channel groups: channels as tokens, each of which is an image of the whole map."""

from __future__ import annotations

from ops import channel_attention

from . import canvas
from .attention import channel_weights
from .look import Drawn, Look
from .picture import pick

SHOWN = 4


def channel_groups(look: Look) -> Drawn:
    """How much the channels of a group attend to each other, and, for one channel, those that it attends to most."""
    calls = look.of(channel_attention)
    figure, axes = canvas.panels(len(calls), 2 + SHOWN, look.title("channel groups"), ratio=look.ratio)
    data = {}
    for axes_of, call in zip(axes, calls, strict=True):
        found = channel_weights(call)  # (heads, D, D)
        group = look.head or 0
        matrix = pick("head", group, found, f"stage {call.stage}")
        before, after = call.arguments["q"][0, :, :, group], call.result[0, :, :, group]
        label = f"stage {call.stage}, group {group} of {len(found)}"
        canvas.tile(axes_of[0], matrix.sqrt(), label, cmap="inferno", vmin=0)
        channel = int(matrix.diagonal().argmin())  # the one that changes most
        for ax, taken in zip(axes_of[1:-1], matrix[channel].topk(SHOWN).indices.tolist(), strict=True):
            canvas.tile(ax, before[..., taken], f"channel {taken}, {float(matrix[channel, taken]):.0%}", cmap="gray")
        canvas.tile(axes_of[-1], after[..., channel], f"become channel {channel}", cmap="gray")
        data |= {f"matrix_{call.stage}": found}
    return figure, data
