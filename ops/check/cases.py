"""The calls of ops to check: how each kind of call makes its inputs and runs the op."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import ops


@dataclass(frozen=True)
class Case:
    """`make()` returns float64 inputs by name; `call(impl=..., **inputs)` runs the op on them."""

    op: str
    name: str
    make: Callable[[], dict[str, Tensor]]
    call: Callable[..., Tensor]

    def __str__(self):
        return f"{self.op}-{self.name}"


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(i * n for i, n in enumerate(shape)))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def packed(B: int, H: int, W: int, heads: int, D: int, sharp: float = 1) -> Tensor:
    """sharp is about the standard deviation of the logits."""
    qkv = random(B, H, W, 3, heads, D)
    qkv[:, :, :, 0] *= sharp
    return qkv


def window_case(
    name, H, W, window, *, partition="block", heads=2, D=8, bias=True, outside=False, shared=False, B=2, sharp=1
):
    def make():
        inputs = {"qkv": packed(B, H, W, heads, D, sharp)}
        if bias:
            inputs["bias"] = random(heads, 2 * window[0] - 1, 2 * window[1] - 1)
        if outside:
            inputs |= {"k0": random(heads, D, seed=1), "v0": random(heads, D, seed=2)}
        if shared:
            inputs["query"] = random(B, *window, heads, D)
        return inputs

    def call(qkv, bias=None, k0=None, v0=None, query=None, impl="auto"):
        q, k, v = ops.unpack(qkv)
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
    """q, k and v as permuted NCHW tensors: no axis has its usual stride."""

    def make():
        return {name: random(2, 3 * 8, 9, 11, seed=i) for i, name in enumerate("qkv")} | {"bias": random(3, 7, 7)}

    def call(q, k, v, bias, impl="auto"):
        q, k, v = (t.unflatten(1, (3, 8)).permute(0, 3, 4, 1, 2) for t in (q, k, v))
        return ops.window_attention(q, k, v, bias, window=(4, 4), impl=impl)

    return Case("window_attention", "channels_first", make, call)


def neighborhood_case(name, H, W, window, dilation, *, heads=2, D=8, bias=True, outside=False, B=2, sharp=1):
    def make():
        inputs = {"qkv": packed(B, H, W, heads, D, sharp)}
        inputs |= {"k0": random(heads, D, seed=1), "v0": random(heads, D, seed=2)} if outside else {}
        return inputs | ({"bias": random(heads, 2 * window[0] - 1, 2 * window[1] - 1)} if bias else {})

    def call(qkv, bias=None, k0=None, v0=None, impl="auto"):
        return ops.neighborhood_attention(
            *ops.unpack(qkv),
            bias,
            window=window,
            dilation=dilation,
            outside=None if k0 is None else (k0, v0),
            impl=impl,
        )

    return Case("neighborhood_attention", name, make, call)


def routed_case(name, H, W, regions, topk, *, heads=2, D=8, B=2, sharp=1):
    def ranked():  # in float64, whatever the dtype under test
        q, k, _ = packed(B, H, W, heads, D, sharp).unbind(3)
        return ops.route_regions(q, k, regions, topk)

    route = OnDevices(ranked)

    def make():
        route.prepare()
        return {"qkv": packed(B, H, W, heads, D, sharp)}

    def call(qkv, impl="auto"):
        return ops.routed_attention(*qkv.unbind(3), regions, topk, route.on(qkv.device), impl=impl)

    return Case("routed_attention", name, make, call)


class OnDevices:
    """A tensor, computed on the CPU by the first `prepare` and copied to each device once.

    A case computes it with its inputs: its call may be recorded by a compiler or in a CUDA graph.
    """

    def __init__(self, compute: Callable[[], Tensor]) -> None:
        self.compute, self.copies = compute, {}

    def prepare(self) -> None:
        if not self.copies:
            self.copies[torch.device("cpu")] = self.compute()

    def on(self, device: torch.device) -> Tensor:
        if device not in self.copies:
            self.copies[device] = self.copies[torch.device("cpu")].to(device)
        return self.copies[device]


def channel_case(name, H, W, heads, D):
    def call(qkv, impl="auto"):
        return ops.channel_attention(*ops.unpack(qkv), scale=(D * H * W) ** -0.5, impl=impl)

    return Case("channel_attention", name, lambda: {"qkv": packed(2, H, W, heads, D)}, call)


def pooled_case(name, H, W, keys):
    def make():
        return {"q": random(2, H, W, 2, 8), "kv": random(2, *keys, 2, 2, 8)}

    def call(q, kv, impl="auto"):
        return ops.pooled_attention(q, *kv.unbind(-3), impl=impl)

    return Case("pooled_attention", name, make, call)


def super_case(name, H, W, cell, iterations=1, differentiable=False, *, C=6):
    def call(x, impl="auto"):
        tokens, affinity = ops.super_tokens(x, cell, iterations, differentiable, impl=impl)
        return ops.scatter_super_tokens(tokens, affinity, cell, impl=impl)

    return Case("super_tokens", name, lambda: {"x": random(2, H, W, C)}, call)


def reallocate_case(name, H, W, runs, shares):
    order = OnDevices(lambda: ops.rank_tokens(random(2, H, W)))

    def make():
        order.prepare()
        weights = {f"weight{i}": random(1, run, seed=i) for i, run in enumerate(runs)}
        return {"x": random(2, H, W, 6), **weights, "biases": random(len(runs), 1)}

    def call(x, biases, impl="auto", **weights):
        merge = list(weights.values()), list(biases)
        sequences = ops.reallocate_tokens(x, None, *merge, shares, order.on(x.device), impl=impl)
        return torch.cat(sequences, 1)

    return Case("reallocate_tokens", name, make, call)


def significance_case(name, H, W, keys, window=None, *, D=8):
    """The attention that keys receive, multiplied by a map: q and k get no gradient."""

    def make():
        return {"q": random(2, H, W, 2, D), "k": random(2, *keys, 2, D, seed=1), "x": random(2, *keys)}

    def call(q, k, x, impl="auto"):
        return x * ops.significance(q, k, window, impl=impl).to(x.dtype)

    return Case("significance", name, make, call)


def gradients(case: Case, inputs: dict[str, Tensor], impl: str) -> list[Tensor]:
    """The output and the gradient of every input, zeros for an input without one."""
    inputs = {name: t.detach().requires_grad_() for name, t in inputs.items()}
    out = case.call(impl=impl, **inputs)
    probe = random(*out.shape, seed=7).to(out)
    return [out.detach(), *torch.autograd.grad(out, list(inputs.values()), probe, materialize_grads=True)]
