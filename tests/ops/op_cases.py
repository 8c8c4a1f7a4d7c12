"""The table of op calls that the tests run through: an op joins by its rows."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import ops


@dataclass(frozen=True)
class Case:
    """`make()` gives float64 inputs by name; `call(impl=..., **inputs)` runs the op on them."""

    op: str
    name: str
    make: Callable[[], dict[str, Tensor]]
    call: Callable[..., Tensor]

    def __str__(self):
        return f"{self.op}-{self.name}"


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(i * n for i, n in enumerate(shape)))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def packed(B: int, H: int, W: int, heads: int, D: int) -> Tensor:
    return random(B, H, W, 3, heads, D)


def window_case(name, H, W, window, *, partition="block", heads=2, D=8, bias=True, outside=False, shared=False, B=2):
    def make():
        inputs = {"qkv": packed(B, H, W, heads, D)}
        if bias:
            inputs["bias"] = random(heads, 2 * window[0] - 1, 2 * window[1] - 1)
        if outside:
            inputs |= {"k0": random(heads, D, seed=1), "v0": random(heads, D, seed=2)}
        if shared:
            inputs["query"] = random(B, *window, heads, D)
        return inputs

    def call(qkv, bias=None, k0=None, v0=None, query=None, impl="auto"):
        q, k, v = qkv.unbind(3)
        return ops.window_attention(
            q if query is None else query,
            k,
            v,
            bias,
            window=window,
            partition=partition,
            outside=None if k0 is None else (k0, v0),
            impl=impl,
        )

    return Case("window_attention", name, make, call)


def channels_first_case():
    """q, k and v as permuted NCHW tensors: no axis lies where it usually does."""

    def make():
        return {name: random(2, 3 * 8, 9, 11, seed=i) for i, name in enumerate("qkv")} | {"bias": random(3, 7, 7)}

    def call(q, k, v, bias, impl="auto"):
        q, k, v = (t.unflatten(1, (3, 8)).permute(0, 3, 4, 1, 2) for t in (q, k, v))
        return ops.window_attention(q, k, v, bias, window=(4, 4), impl=impl)

    return Case("window_attention", "channels_first", make, call)


def neighborhood_case(name, H, W, window, dilation, *, heads=2, D=8, bias=True, outside=False, B=2):
    def make():
        inputs = {"qkv": packed(B, H, W, heads, D)}
        inputs |= {"k0": random(heads, D, seed=1), "v0": random(heads, D, seed=2)} if outside else {}
        return inputs | ({"bias": random(heads, 2 * window[0] - 1, 2 * window[1] - 1)} if bias else {})

    def call(qkv, bias=None, k0=None, v0=None, impl="auto"):
        return ops.neighborhood_attention(
            *qkv.unbind(3),
            bias,
            window=window,
            dilation=dilation,
            outside=None if k0 is None else (k0, v0),
            impl=impl,
        )

    return Case("neighborhood_attention", name, make, call)


def routed_case(name, H, W, regions, topk):
    q, k, _ = packed(2, H, W, 2, 8).unbind(3)
    route = ops.route_regions(q, k, regions, topk)  # the float64 ranking, whatever the dtype under test

    def call(qkv, impl="auto"):
        return ops.routed_attention(*qkv.unbind(3), regions=regions, topk=topk, route=route, impl=impl)

    return Case("routed_attention", name, lambda: {"qkv": packed(2, H, W, 2, 8)}, call)


def channel_case(name, H, W, heads, D):
    def call(qkv, impl="auto"):
        return ops.channel_attention(*qkv.unbind(3), scale=(D * H * W) ** -0.5, impl=impl)

    return Case("channel_attention", name, lambda: {"qkv": packed(2, H, W, heads, D)}, call)


def pooled_case(name, H, W, keys):
    def make():
        return {"q": random(2, H, W, 2, 8), "kv": random(2, *keys, 2, 2, 8)}

    def call(q, kv, impl="auto"):
        return ops.pooled_attention(q, *kv.unbind(-3), impl=impl)

    return Case("pooled_attention", name, make, call)


def super_case(name, H, W, cell, iterations=1, differentiable=False):
    def call(x, impl="auto"):
        tokens, affinity = ops.super_tokens(x, cell, iterations, differentiable, impl=impl)
        return ops.scatter_super_tokens(tokens, affinity, cell, impl=impl)

    return Case("super_tokens", name, lambda: {"x": random(2, H, W, 6)}, call)


def reallocate_case(name, H, W, runs, shares):
    order = ops.rank_tokens(random(2, H, W))

    def make():
        weights = {f"weight{i}": random(1, run, seed=i) for i, run in enumerate(runs)}
        return {"x": random(2, H, W, 6), **weights, "biases": random(len(runs), 1)}

    def call(x, biases, impl="auto", **weights):
        sequences = ops.reallocate_tokens(x, None, list(weights.values()), list(biases), shares, order, impl=impl)
        return torch.cat(sequences, 1)

    return Case("reallocate_tokens", name, make, call)


def significance_case(name, H, W, keys, window=None):
    """The attention that keys receive, as factors on a map: q and k get no gradient."""

    def make():
        return {"q": random(2, H, W, 2, 8), "k": random(2, *keys, 2, 8, seed=1), "x": random(2, *keys)}

    def call(q, k, x, impl="auto"):
        return x * ops.significance(q, k, window, impl=impl).to(x.dtype)

    return Case("significance", name, make, call)


CASES = [
    window_case("block", 14, 14, (7, 7)),
    window_case("grid", 14, 14, (7, 7), partition="grid"),
    window_case("one_window", 7, 7, (7, 7)),
    window_case("no_bias", 8, 12, (4, 4), bias=False),
    window_case("block_odd", 33, 97, (7, 7), D=4, B=1),
    window_case("grid_odd", 33, 97, (7, 7), partition="grid", D=4, B=1),
    window_case("odd_no_bias", 9, 10, (4, 4), bias=False),
    window_case("rectangular", 9, 13, (4, 3)),
    window_case("rectangular_grid", 9, 13, (4, 3), partition="grid", heads=3),
    window_case("small_map", 3, 5, (7, 7)),
    window_case("small_map_grid", 3, 5, (7, 7), partition="grid"),
    window_case("one_pixel", 1, 1, (7, 7)),
    window_case("one_token", 5, 4, (1, 1)),
    window_case("outside", 9, 13, (4, 3), outside=True),
    window_case("outside_grid", 9, 13, (4, 3), partition="grid", outside=True),
    window_case("outside_no_bias", 6, 5, (4, 4), outside=True, bias=False),
    window_case("shared", 8, 12, (4, 4), shared=True),
    window_case("shared_odd", 9, 13, (4, 3), shared=True),
    window_case("shared_outside", 9, 13, (4, 3), shared=True, outside=True, partition="grid"),
    window_case("large", 18, 20, (9, 9), D=4),  # more than 64 tokens: the other branch of the torch path
    window_case("large_no_bias", 18, 20, (9, 9), D=4, bias=False),
    window_case("large_grid", 17, 20, (9, 9), D=4, partition="grid", bias=False),
    channels_first_case(),
    neighborhood_case("k3", 7, 9, (3, 3), 1),
    neighborhood_case("k7_dilated", 15, 14, (7, 7), 2),
    neighborhood_case("mixed", 11, 10, (5, 3), (2, 3)),
    neighborhood_case("no_bias", 7, 9, (3, 5), 1, bias=False),
    neighborhood_case("exact", 15, 10, (5, 5), (3, 2)),
    neighborhood_case("tiles", 20, 33, (5, 7), (1, 2)),
    neighborhood_case("outside", 4, 18, (5, 3), (2, 5), outside=True),
    neighborhood_case("outside_far", 3, 2, (5, 5), 9, bias=False, outside=True),
    routed_case("top1", 6, 9, (3, 3), 1),
    routed_case("top4", 8, 6, (4, 3), 4),
    routed_case("pixels", 5, 7, (5, 7), 3),
    routed_case("all", 9, 10, (3, 2), 6),
    routed_case("blocks", 44, 36, (4, 3), 5),  # more than one block in every dtype of the torch path
    channel_case("small", 5, 7, 2, 8),
    channel_case("wide", 9, 6, 1, 24),
    pooled_case("map", 6, 9, (3, 4)),
    pooled_case("sequence", 5, 7, (11,)),
    super_case("divides", 8, 12, (4, 4)),
    super_case("odd", 9, 10, (4, 3)),
    super_case("iterations", 8, 8, (2, 4), iterations=3),
    super_case("differentiable", 7, 8, (3, 4), iterations=2, differentiable=True),
    reallocate_case("thirds", 8, 6, [4, 3, 1], [1, 2, 1]),
    reallocate_case("halves_odd", 7, 5, [2, 1], [1, 1]),
    reallocate_case("empty_groups", 1, 1, [3, 2, 1], [1, 2, 1]),
    significance_case("map", 6, 9, (3, 4)),
    significance_case("large", 40, 50, (20, 20)),  # more than one block of queries in the torch path
    significance_case("windows", 8, 6, (8, 6), window=(4, 3)),
    significance_case("windows_odd", 7, 10, (7, 10), window=(3, 4)),
]

# op: what it has besides its reference
HAS = {
    "window_attention": ("torch",),
    "pooled_attention": ("torch",),
    "routed_attention": ("torch",),
    "channel_attention": ("torch",),
    "super_tokens": ("torch",),
    "neighborhood_attention": ("torch",),
    "reallocate_tokens": ("torch",),
    "significance": ("torch",),
}


def gradients(case: Case, inputs: dict[str, Tensor], impl: str) -> list[Tensor]:
    """The output and the gradient of every input, zeros where there is none."""
    inputs = {name: t.detach().requires_grad_() for name, t in inputs.items()}
    out = case.call(impl=impl, **inputs)
    probe = random(*out.shape, seed=7).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, list(inputs.values()), probe, materialize_grads=True)]
