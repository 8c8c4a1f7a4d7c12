"""The calls of each op that stages of models make, and how much such a call has to compute.

This is a table because `ops` does not depend on the models; a test compares it with their actual calls. Image sides are
multiples of 32, so that the feature maps of the stages are the image divided by 4, 8, 16 and 32.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

Size = tuple[int, int]

# model: channels and heads of its four stages. The T and B of each family, or the smallest if it has no T
SMALL = {
    "maxvit_t":   ((64, 128, 256, 512),  (2, 4, 8, 16)),
    "nat_t":      ((64, 128, 256, 512),  (2, 4, 8, 16)),
    "dinat_t":    ((64, 128, 256, 512),  (2, 4, 8, 16)),
    "biformer_t": ((64, 128, 256, 512),  (2, 4, 8, 8)),
    "litv2_s":    ((96, 192, 384, 768),  (3, 6, 12, 24)),
    "gcvit_t":    ((64, 128, 256, 512),  (2, 4, 8, 16)),
    "davit_t":    ((96, 192, 384, 768),  (3, 6, 12, 24)),
    "sgformer_s": ((64, 128, 256, 512),  (2, 4, 8, 16)),
    "stvit_s":    ((64, 128, 320, 512),  (1, 2, 5, 8)),
}  # fmt: skip
BASE = {
    "maxvit_b":   ((96, 192, 384, 768),  (3, 6, 12, 24)),
    "nat_b":      ((128, 256, 512, 1024), (4, 8, 16, 32)),
    "dinat_b":    ((128, 256, 512, 1024), (4, 8, 16, 32)),
    "biformer_b": ((96, 192, 384, 768),  (3, 6, 12, 8)),
    "litv2_b":    ((128, 256, 512, 1024), (4, 8, 16, 32)),
    "gcvit_b":    ((128, 256, 512, 1024), (4, 8, 16, 32)),
    "davit_b":    ((128, 256, 512, 1024), (4, 8, 16, 32)),
    "sgformer_b": ((96, 192, 384, 768),  (4, 6, 12, 24)),
    "stvit_b":    ((96, 192, 384, 512),  (2, 3, 6, 8)),
}  # fmt: skip
MODELS = SMALL | BASE


@dataclass(frozen=True)
class Call:
    """One call of an op, on a map of `size` with `heads` heads of `dim` channels; `options` are those of the op."""

    op: str
    size: Size
    heads: int
    dim: int
    options: tuple[tuple[str, Any], ...] = ()

    def __getitem__(self, option: str) -> Any:
        return dict(self.options)[option]

    def __str__(self) -> str:
        said = [f"{name} {written(value)}" if value is not True else name for name, value in self.options if value]
        return " ".join([f"{written(self.size)} {self.heads}x{self.dim}", *said])


def written(value: Any) -> str:
    """7 x 7 as "7", 25 x 42 as "25x42", other values as they are."""
    if isinstance(value, tuple):
        return str(value[0]) if len(set(value)) == 1 else "x".join(map(str, value))
    return str(value)


def call(op: str, size: Size, heads: int, dim: int, **options: Any) -> Call:
    return Call(op, size, heads, dim, tuple(options.items()))


def calls(image: Size, models: dict[str, tuple] = MODELS) -> dict[Call, list[str]]:
    """Every call for an image size, and the stages that make it, such as "davit_t 1", in the order of the table."""
    found: dict[Call, list[str]] = {}
    for model, (dims, heads) in models.items():
        for stage in range(4):
            size = (image[0] >> stage + 2, image[1] >> stage + 2)
            for made in FAMILIES[model.split("_")[0]](stage, size, heads[stage], dims[stage] // heads[stage]):
                found.setdefault(made, []).append(f"{model} {stage + 1}")
    return found


def windows(
    size: Size, heads: int, dim: int, window: int, *, grid=False, bias=False, attend_padding=False, shared=False
) -> Call:
    options = {"grid": grid, "bias": bias, "attend_padding": attend_padding, "shared": shared}
    return call("window_attention", size, heads, dim, window=(window, window), **options)


def maxvit(stage: int, size: Size, heads: int, dim: int) -> Iterator[Call]:
    for grid in (False, True):
        yield windows(size, heads, dim, 7, grid=grid, bias=True)


def gcvit(stage: int, size: Size, heads: int, dim: int) -> Iterator[Call]:
    for shared in (False, True):
        yield windows(size, heads, dim, (7, 7, 14, 7)[stage], bias=True, attend_padding=True, shared=shared)


def davit(stage: int, size: Size, heads: int, dim: int) -> Iterator[Call]:
    yield windows(size, heads, dim, 7, attend_padding=True)
    yield call("channel_attention", size, heads, dim)


def nat(stage: int, size: Size, heads: int, dim: int) -> Iterator[Call]:
    yield call("neighborhood_attention", size, heads, dim, window=(7, 7), dilation=(1, 1))


def dinat(stage: int, size: Size, heads: int, dim: int) -> Iterator[Call]:
    for dilation in {1, (8, 4, 2, 1)[stage]}:
        yield call("neighborhood_attention", size, heads, dim, window=(7, 7), dilation=(dilation, dilation))


def biformer(stage: int, size: Size, heads: int, dim: int) -> Iterator[Call]:
    if stage == 3:
        yield call("pooled_attention", size, heads, dim, keys=prod(size))
    else:
        whole = (-(-size[0] // 7) * 7, -(-size[1] // 7) * 7)
        yield call("routed_attention", whole, heads, dim, regions=(7, 7), topk=(1, 4, 16)[stage])


def litv2(stage: int, size: Size, heads: int, dim: int) -> Iterator[Call]:
    if stage == 2:
        low = heads * 9 // 10
        yield windows(size, heads - low, dim, 2, attend_padding=True)
        yield call("pooled_attention", size, low, dim, keys=prod(size) // 4)
    if stage == 3:
        yield call("pooled_attention", size, heads, dim, keys=prod(size))


def stvit(stage: int, size: Size, heads: int, dim: int) -> Iterator[Call]:
    cell = (8, 4, 1, 1)[stage]
    if cell > 1:
        yield call("super_token_attention", size, 1, heads * dim, cell=(cell, cell))
    tokens = (size[0] // cell, size[1] // cell)
    yield call("pooled_attention", tokens, heads, dim, keys=prod(tokens))


def sgformer(stage: int, size: Size, heads: int, dim: int) -> Iterator[Call]:
    if stage == 3:
        yield call("pooled_attention", size, heads, dim, keys=prod(size))
        return
    side, runs, shares = ((8, (196, 56, 28), (1, 2, 1)), (4, (49, 14, 7), (1, 2, 1)), (2, (2, 1), (1, 1)))[stage]
    reduced = (size[0] // side, size[1] // side)
    yield windows(size, heads // 2, dim, 7)
    yield call("significance", size, heads // 2, dim, window=(7, 7), keys=size)
    yield call("significance", size, heads // 2, dim, window=None, keys=reduced)
    yield call("pooled_attention", size, heads // 2, dim, keys=prod(reduced))
    yield call("token_reallocation", size, 1, heads * dim, runs=runs, shares=shares)
    yield call("pooled_attention", size, heads, dim, keys=merged(prod(size), runs, shares))


def merged(tokens: int, runs: tuple[int, ...], shares: tuple[int, ...]) -> int:
    """How many of `tokens` tokens are left after merging."""
    ends = [tokens * sum(shares[: i + 1]) // sum(shares) for i in range(len(shares))]
    return sum(-(-(end - start) // run) for start, end, run in zip([0, *ends], ends, runs, strict=False))


FAMILIES = {
    "maxvit": maxvit,
    "nat": nat,
    "dinat": dinat,
    "biformer": biformer,
    "litv2": litv2,
    "gcvit": gcvit,
    "davit": davit,
    "sgformer": sgformer,
    "stvit": stvit,
}


def attention(keys: int) -> tuple[int, int]:
    """Two matmuls forward and four backward; logits that a kernel recomputes are not counted twice."""
    return 2 * keys, 4 * keys


# multiply-adds of an op for one pixel and channel: forward, and for its gradients
PRODUCTS = {
    "window_attention": lambda c: attention(prod(c["window"])),
    "neighborhood_attention": lambda c: attention(prod(c["window"])),
    "routed_attention": lambda c: attention(routed_keys(c)),
    "pooled_attention": lambda c: attention(c["keys"]),
    # dim x dim for every pixel of a head: keys by values, attention by queries
    "channel_attention": lambda c: attention(c.dim),
    # each pixel is paired with nine tokens three times: association (without gradient), average and scatter (one each)
    "super_token_attention": lambda c: (27, 18),
    # each pixel is weighted once in both orders
    "token_reallocation": lambda c: (2, 4),
    "significance": lambda c: (prod(c["window"] or c["keys"]), 0),
}


def routed_keys(c: Call) -> int:
    return c["topk"] * prod(c.size) // prod(c["regions"])


def flops(c: Call, batch: int) -> tuple[int, int]:
    """FLOPs of the op's own matmuls, forward and backward; softmax and sums are not counted."""
    pixels = 2 * batch * prod(c.size) * c.heads * c.dim
    forward, backward = PRODUCTS[c.op](c)
    return forward * pixels, backward * pixels
