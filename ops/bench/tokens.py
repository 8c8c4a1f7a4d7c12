"""The peers of super tokens and of token reallocation: what their authors' code does, step by step."""

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import reallocate_tokens, scatter_super_tokens, significance, super_tokens
from .cases import Call
from .contest import Contest, Peer, heads_first
from .windows import Partition


def super_contest(call: Call, batch: int, device: str, dtype: torch.dtype) -> Contest:
    """From pixels to super tokens and straight back."""
    (H, W), C, cell = call.size, call.dim, call["cell"]
    h, w = H // cell[0], W // cell[1]
    part = Partition((H, W), cell, grid=False)
    x = torch.randn(batch, H, W, C, device=device, dtype=dtype)

    def op(x: Tensor, impl: str = "auto") -> Tensor:
        tokens, affinity = super_tokens(x, cell, impl=impl)
        return scatter_super_tokens(tokens, affinity, cell, impl=impl)

    def nine(tokens: Tensor) -> Tensor:  # (B, C, h, w) -> (B, h * w, C, 9)
        return F.unfold(tokens, 3, padding=1).view(batch, C, 9, h * w).permute(0, 3, 1, 2)

    def back(parts: Tensor) -> Tensor:  # (B, h * w, C, 9) -> (B, C, h, w)
        return F.fold(parts.permute(0, 2, 3, 1).flatten(1, 2), (h, w), 3, padding=1)

    def unfolded(x: Tensor) -> Tensor:
        pixels = part.cut(x).unflatten(0, (batch, h * w))
        with torch.no_grad():
            means = pixels.mean(2).transpose(1, 2).unflatten(2, (h, w))
            affinity = (pixels @ nine(means) * C**-0.5).softmax(-1)
            total = back(affinity.sum(2).unsqueeze(2))
        tokens = back(pixels.mT @ affinity) / (total + 1e-12)
        return part.join(affinity @ nine(tokens).mT)

    return Contest({"x": x}, op, {"unfold": Peer(unfolded)})


def reallocation_contest(call: Call, batch: int, device: str, dtype: torch.dtype) -> Contest:
    """Ranking by a given significance, and merging; groups are padded to whole runs."""
    (H, W), C, runs, shares = call.size, call.dim, call["runs"], call["shares"]
    inputs = {"x": torch.randn(batch, H, W, C, device=device, dtype=dtype)}
    inputs |= {f"weight{i}": torch.randn(1, run, device=device, dtype=dtype) for i, run in enumerate(runs)}
    inputs |= {f"bias{i}": torch.randn(1, device=device, dtype=dtype) for i in range(len(runs))}
    # in float32, as in the models (sorting wider dtypes takes longer), and without ties: the authors' sort is not
    # stable, that of the op is. All of these integers are exact in float32
    given = torch.stack([torch.randperm(H * W, device=device) for _ in range(batch)]).view(batch, H, W).float()
    ends = [H * W * sum(shares[: i + 1]) // sum(shares) for i in range(len(shares))]
    sizes = [end - start for start, end in zip([0, *ends], ends, strict=False)]

    def learned(merge: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        return [merge[f"weight{i}"] for i in range(len(runs))], [merge[f"bias{i}"] for i in range(len(runs))]

    def op(x: Tensor, impl: str = "auto", **merge: Tensor) -> tuple[Tensor, Tensor]:
        return reallocate_tokens(x, given, *learned(merge), list(shares), impl=impl)

    def gathered(x: Tensor, **merge: Tensor) -> tuple[Tensor, Tensor]:
        weights, biases = learned(merge)
        return sequence(x, given, weights, biases), sequence(x.transpose(1, 2), given.mT, weights, biases)

    def sequence(x: Tensor, values: Tensor, weights: list[Tensor], biases: list[Tensor]) -> Tensor:
        order = values.flatten(1).sort(1).indices
        ranked = x.flatten(1, 2).gather(1, order[:, :, None].expand(-1, -1, C))
        merged = []
        for group, weight, bias in zip(ranked.split(sizes, 1), weights, biases, strict=True):
            group = F.pad(group, (0, 0, 0, -group.shape[1] % weight.numel()))
            merged.append(F.linear(group.unflatten(1, (-1, weight.numel())).mT, weight, bias).squeeze(-1))
        return torch.cat(merged, 1)

    return Contest(inputs, op, {"gather": Peer(gathered)}, results=2)


def significance_contest(call: Call, batch: int, device: str, dtype: torch.dtype) -> Contest:
    (H, W), heads, dim, window = call.size, call.heads, call.dim, call["window"]
    inputs = {"q": torch.randn(batch, H, W, heads, dim, device=device, dtype=dtype)}
    inputs["k"] = torch.randn(batch, *call["keys"], heads, dim, device=device, dtype=dtype)

    def op(q: Tensor, k: Tensor, impl: str = "auto") -> Tensor:
        return significance(q, k, window, impl=impl)

    def softmax(q: Tensor, k: Tensor) -> Tensor:
        logits = heads_first(q) * dim**-0.5 @ heads_first(k).mT
        return logits.softmax(-1, dtype=torch.float32).mean((1, 2)).view(batch, *call["keys"])

    def in_windows(q: Tensor, k: Tensor) -> Tensor:
        part = Partition((H, W), window, grid=False)
        inside = part.cut(torch.ones(1, H, W, 1, device=device)).repeat(batch, 1, 1)  # (windows, tokens, 1)
        q, k = (heads_first(part.cut(t.flatten(3)).unflatten(2, (heads, dim))) for t in (q, k))
        logits = q * dim**-0.5 @ k.mT + inside.log().mT.unsqueeze(1)
        received = logits.softmax(-1, dtype=torch.float32) * inside.unsqueeze(1)
        mean = received.sum(2).mean(1) / inside.sum(1)
        return part.join(mean.unsqueeze(-1)).squeeze(-1)

    return Contest(inputs, op, {"softmax": Peer(softmax if window is None else in_windows)}, learned=False)
