"""What happens to tokens before attention: SG-Former's significance and runs, STViT's super tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from ops import rank_tokens, reallocate_tokens, super_tokens

from . import canvas
from .attention import merged
from .calls import Call
from .look import Drawn, Look


def significance(look: Look) -> Drawn:
    """How much attention tokens receive, and, below, how many of them are merged into one."""
    ranked, reallocated = look.of(rank_tokens), look.of(reallocate_tokens)
    title = look.title("significance, and how many tokens become one")
    figure, axes = canvas.panels(2, len(ranked), title, ratio=look.ratio)
    data = {}
    for (above, below), rank, call in zip(axes.T, ranked, reallocated, strict=True):
        received, (run, size) = rank.arguments["significance"][0], merged(call)
        token = look.pixels(call)
        canvas.backdrop(above, look.image, f"stage {call.stage}: significance")
        canvas.heat(above, stretched(received), token)
        canvas.backdrop(below, look.image, f"{run.numel()} tokens become {int(run.max()) + 1}")
        canvas.lengths(below, size, token)
        data |= {f"significance_{call.stage}": received, f"run_{call.stage}": run, f"size_{call.stage}": size}
    return figure, data


def stretched(values: Tensor) -> Tensor:
    """Scaled to 0 to 1; the least and the most significant 2 % are clipped."""
    low, high = torch.quantile(values.float(), torch.tensor([0.02, 0.98], device=values.device))
    return ((values - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)


def superpixels(look: Look) -> Drawn:
    """Borders between tokens of different super tokens over the image, and, below, the largest share of each."""
    calls = look.of(super_tokens)
    figure, axes = canvas.panels(2, len(calls), look.title("super tokens"), ratio=look.ratio)
    data = {}
    for (above, below), call in zip(axes.T, calls, strict=True):
        owner, share = owners(call)
        token, (h, w) = look.pixels(call), call.result[0].shape[1:3]
        canvas.backdrop(above, look.image, f"stage {call.stage}: {h} x {w} super tokens", faded=False)
        canvas.outline(above, owner + 1, token, canvas.RULES, 0.8)
        canvas.backdrop(below, look.image, f"its share: {float(share.min()):.2f} to {float(share.max()):.2f}")
        canvas.tiles(below, share, token)
        data |= {f"owner_{call.stage}": owner, f"share_{call.stage}": share}
    return figure, data


def owners(call: Call) -> tuple[Tensor, Tensor]:
    """For each pixel (H, W) in a call of super_tokens: the number of the super token that has the largest share in it,
    row by row, -1 for one beyond the grid; and that share.
    """
    tokens, affinity = call.result
    (H, W), (h, w), cell = affinity.shape[1:3], tokens.shape[1:3], call.arguments["cell"]
    share, entry = affinity[0].max(-1)
    y = torch.arange(H, device=entry.device)[:, None] // cell[0] + entry // 3 - 1
    x = torch.arange(W, device=entry.device) // cell[1] + entry % 3 - 1
    inside = (y >= 0) & (y < h) & (x >= 0) & (x < w)
    return torch.where(inside, y * w + x, -1), share
