"""Checks that need a device: bitwise determinism, memory, CUDA graphs, torch.compile, maps beyond 2**31 elements.

Every check returns what it found in words and raises Failed if it does not pass. All but `captured`, `large_map` and
`routed_memory` also run on CPU tensors, where the kernels are interpreted.
"""

from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import ops

from ..bench.measure import held
from .bound import share
from .cases import Case, gradients

MiB, GiB = 2**20, 2**30


class Failed(Exception):
    """A check did not pass."""


def inputs_of(case: Case, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: t.to(device, dtype) for name, t in case.make().items()}


def same_bits(case: Case, device: str) -> str:
    """No kernel adds with atomics, so nothing may depend on the order in which programs run.

    Under `torch.use_deterministic_algorithms` no operator may refuse; the kernels' first configurations run.
    """
    inputs, before = inputs_of(case, device, torch.float32), torch.are_deterministic_algorithms_enabled()
    try:
        for only in (False, True):
            torch.use_deterministic_algorithms(only)
            first, second = gradients(case, inputs, "triton"), gradients(case, inputs, "triton")
            if not all(torch.equal(a, b) for a, b in zip(first, second, strict=True)):
                raise Failed("two runs differ" + " under use_deterministic_algorithms" * only)
    finally:
        torch.use_deterministic_algorithms(before)
    return "equal"


def compiled(case: Case, device: str) -> str:
    """One graph, forward and backward, with the same answers as eager mode."""
    torch.compiler.reset()
    inputs = inputs_of(case, device, torch.float32)
    graph = torch.compile(lambda **given: case.call(impl="triton", **given), fullgraph=True, backend="aot_eager")
    same = Case(case.op, case.name, case.make, lambda impl, **given: graph(**given))
    for want, got in zip(gradients(case, inputs, "triton"), gradients(same, inputs, "triton"), strict=True):
        if share(want.double(), want, got) > 1:
            raise Failed(f"the graph's answer differs from that of eager mode by {(want - got).abs().max():.1e}")
    return "one graph"


def captured(case: Case, device: str) -> str:
    """A CUDA graph of the forward pass replays on new data in the same memory."""
    inputs = inputs_of(case, device, torch.float16)
    with torch.no_grad():
        case.call(impl="triton", **inputs)  # compiles and tunes, which cannot be captured
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = case.call(impl="triton", **inputs)
        for t in inputs.values():
            t.mul_(0.5)
        graph.replay()
        want = case.call(impl="triton", **inputs)
    if not torch.equal(got, want):
        raise Failed("the replay differs from a call")
    return "replayed"


def forward_memory(device: str) -> str:
    """The forward passes of softmax attention hold their result and one float32 for each query and head.

    Significance in windows and the spreading of super tokens hold their result alone. Not among these are super tokens
    and channel attention, whose sums lie in memory, and significance for one set of keys, of which a section sums each.
    """
    B, H, W, heads, D = shape = (1, 28, 28, 2, 32)
    q, k, v = torch.randn(B, H, W, 3, heads, D, device=device).unbind(3)
    bias, route = torch.randn(heads, 13, 13, device=device), ops.route_regions(q, k, (7, 7), 4)
    calls = {
        "window": lambda: ops.window_attention(q, k, v, bias, (7, 7), impl="triton"),
        "grid": lambda: ops.window_attention(q, k, v, bias, (7, 7), "grid", impl="triton"),
        "neighborhood": lambda: ops.neighborhood_attention(q, k, v, bias, 7, 2, impl="triton"),
        "routed": lambda: ops.routed_attention(q, k, v, (7, 7), 4, route, impl="triton"),
    }
    tokens, affinity = ops.super_tokens(q.flatten(3), (7, 7))
    alone = {
        "significance": lambda: ops.significance(q, k, (7, 7), impl="triton"),
        "scattering": lambda: ops.scatter_super_tokens(tokens, affinity, (7, 7), impl="triton"),
    }
    with torch.no_grad():
        for name, call in (calls | alone).items():
            needed = call().nbytes + 4 * B * H * W * heads * (name in calls)  # this also compiles
            if (most := held(call, device) * MiB) > needed:
                what = "result" + " and log-sum-exp" * (name in calls)
                raise Failed(f"{name}, for {shape}, holds {most:.0f} bytes; {what}: {needed}")
    return f"{', '.join(calls)}: only the result and a log-sum-exp; {', '.join(alone)}: only the result"


def packed_gradients(device: str) -> str:
    """The gradients of queries, keys and values of one packed map are written into one map, without a copy."""
    B, H, W, heads, D = 2, 9, 11, 2, 16
    bias, window = torch.randn(heads, 7, 7, device=device), torch.randn(B, 4, 4, heads, D, device=device)
    calls = {
        "window": lambda q, k, v: ops.window_attention(q, k, v, bias, (4, 4), impl="triton"),
        "large window": lambda q, k, v: ops.window_attention(q, k, v, None, (9, 11), impl="triton"),
        "shared query": lambda k, v: ops.window_attention(window, k, v, bias, (4, 4), impl="triton"),
        "neighborhood": lambda q, k, v: ops.neighborhood_attention(q, k, v, bias[:, :5, :5], 3, impl="triton"),
        "one neighborhood": lambda q, k, v: ops.neighborhood_attention(q, k, v, None, (9, 11), impl="triton"),
        "channel": lambda q, k, v: ops.channel_attention(q, k, v, impl="triton"),
    }
    for name, call in calls.items():
        x = torch.randn(B, H, W, 2 if name == "shared query" else 3, heads, D, device=device, requires_grad=True)
        grad = torch.randn(B, H, W, heads, D, device=device)
        (want,) = torch.autograd.grad(call(*x.unbind(3)), x, grad)
        parts = ops.unpack(x)
        found = torch.autograd.grad(call(*parts), [x, *parts], grad)
        if not torch.equal(found[0], want):
            raise Failed(f"{name}: the gradients differ from those of the parts, copied into one map")
        if len({t.untyped_storage().data_ptr() for t in found}) > 1:
            raise Failed(f"{name}: the gradients of the parts are not views of the map's gradient")
    return f"{', '.join(calls)}: no copy"


def ranked(device: str) -> str:
    """Tokens are ranked in the order of torch's stable sort: -0 equals 0, NaN comes last."""
    for size in ((14, 14), (28, 28), (40, 50), (80, 80)):  # sorted, counted, and by a sort of PyTorch
        values = torch.randn(2, *size, device=device).mul(4).round().div(2)
        values[:, 1, :4] = torch.tensor([float("nan"), -0.0, 0.0, float("-inf")], device=device)
        for given in (values, values.transpose(1, 2), values.half()):
            if not torch.equal(ops.rank_tokens(given, impl="triton"), ops.rank_tokens(given, impl="reference")):
                raise Failed(f"the order of {size[0]} x {size[1]} tokens differs from torch's")
    return "14 x 14, 28 x 28, 40 x 50 and 80 x 80 tokens, in both orders"


def far_apart(device: str) -> str:
    """Offsets beyond 2**31: tokens, or channels, that are this far apart in memory, most of which is never touched.

    Results and gradients must equal those of the same tokens stored close together, bit by bit: kernels compute offsets
    differently there.
    """
    if lacking(device, 9 * GiB):
        return "not run: less free memory than 9 GiB, of which one such map takes 8"
    small, large = calls_of_small_maps(device), calls_of_large_windows(device)
    for calls, size, row in ((small, (4, 8), 2**30), (large, (9, 9), 2**28)):
        near = torch.randn(1, *size, 1, 16, device=device).half()
        for what, strides in (("tokens", (2**32, row, 16, 16, 1)), ("channels", (2**32, size[1], 1, 1, 2**28))):
            far = spread_out(near, strides)
            for name, call in calls.items():
                if not all(map(torch.equal, with_gradient(call, far), with_gradient(call, near))):
                    raise Failed(f"{name}: wrong where {what} are {max(strides[1:])} elements apart")
            del far
    return f"{', '.join([*small, *large])}: tokens, and channels, more than 2**31 elements apart"


def calls_of_small_maps(device: str) -> dict[str, Callable[[Tensor], Tensor]]:
    """Of (1, 4, 8, 1, 16), by name: the small windows, cells and regions of each op, without tables."""
    order = ops.rank_tokens(torch.randn(1, 4, 8)).to(device)
    merge = [torch.ones(1, 2, device=device).half()], [torch.zeros(1, device=device).half()], [1]
    return {
        "window": lambda t: ops.window_attention(t, t, t, None, (2, 2), impl="triton"),
        "neighborhood": lambda t: ops.neighborhood_attention(t, t, t, None, 3, impl="triton"),
        "routed": lambda t: ops.routed_attention(t, t, t, (2, 2), 2, impl="triton"),
        "channel": lambda t: ops.channel_attention(t, t, t, impl="triton"),
        "significance": lambda t: ops.significance(t, t, (2, 2), impl="triton"),
        "super tokens": lambda t: ops.super_tokens(t[..., 0, :], (2, 2), impl="triton")[0],
        "merged tokens": lambda t: ops.reallocate_tokens(t[..., 0, :], None, *merge, order, impl="triton")[0],
    }


def calls_of_large_windows(device: str) -> dict[str, Callable[[Tensor], Tensor]]:
    """Of (1, 9, 9, 1, 16), by name: several tiles of keys, a query of all windows, keys outside the map, and tables."""
    table, query = torch.randn(1, 17, 17, device=device).half(), torch.randn(1, 9, 8, 1, 16, device=device).half()
    near, outside = table[:, :5, :5].contiguous(), (query[0, 0, 0], query[0, 0, 1])
    return {
        "large window": lambda t: ops.window_attention(t, t, t, table, 9, impl="triton"),
        "shared query": lambda t: ops.window_attention(query, t, t, None, (9, 8), outside=outside, impl="triton"),
        "window with a table": lambda t: ops.window_attention(t, t, t, near, 3, impl="triton"),
        "neighborhood with a table": lambda t: ops.neighborhood_attention(t, t, t, near, 3, impl="triton"),
    }


def with_gradient(call: Callable[[Tensor], Tensor], t: Tensor) -> list[Tensor]:
    """The result of a call, and its gradient if it has one."""
    t = t.detach().requires_grad_()
    out = call(t)
    return [out.detach(), *(torch.autograd.grad(out.square().sum(), t) if out.requires_grad else ())]


def spread_out(t: Tensor, strides: tuple[int, ...]) -> Tensor:
    """A copy with these strides, in uninitialised memory: on a CPU, pages that are never touched cost nothing."""
    far = torch.tensor([], dtype=t.dtype, device=t.device)
    far.set_(torch.UntypedStorage(strides[0] * t.element_size(), device=t.device), 0, t.shape, strides)
    return far.copy_(t)


def lacking(device: str, needed: int) -> bool:
    """Whether a GPU has fewer free bytes than these."""
    return device == "cuda" and torch.cuda.mem_get_info()[0] < needed


def large_map(device: str) -> str:
    """A map of more than 2**31 elements, in and out: its last windows must equal those of the same tokens alone."""
    side, heads, D = 8200, 1, 32
    if lacking(device, 5 * side * side * heads * D * 2):
        return "not run: less free memory than five such maps"
    q = torch.randn(1, side, side, heads, D, device=device, dtype=torch.bfloat16)
    corner = q[:, -16:, -16:].contiguous()
    with torch.no_grad():
        out = ops.window_attention(q, q, q, None, (8, 8), impl="triton")[:, -16:, -16:]
        want = ops.window_attention(corner, corner, corner, None, (8, 8), impl="triton")
    if not torch.equal(out, want):
        raise Failed("the last windows are wrong")
    return f"{q.numel()} elements"


def plain_attention(device: str) -> str:
    """Pooled attention is scaled_dot_product_attention: its fused kernel must support the models' shapes.

    A CPU multiplies matrices where keys are as few as the 49 of a classifier. Detectors have so many that none does.
    """
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    sizes = ((7, 7), (25, 42)) if device == "cuda" else ((25, 42),)
    for D, size in product((24, 32, 48, 64, 96), sizes):
        q, kv = (torch.randn(2, *shape, 2, D, device=device, dtype=dtype) for shape in ((14, 14, 1), (*size, 2)))
        q, (k, v) = q.squeeze(3).requires_grad_(), kv.unbind(3)
        try:
            with sdpa_kernel([SDPBackend.FLASH_ATTENTION]):
                out = ops.pooled_attention(q, k, v, impl="torch")
                out.sum().backward()
        except RuntimeError as error:
            raise Failed(f"heads of {D} channels: {error}") from error
        if not any("FlashAttention" in step for step in steps_of(out)):
            raise Failed(f"heads of {D} channels, {size[0] * size[1]} keys: PyTorch's fused attention was not called")
    return "the fused kernel takes heads of 24, 32, 48, 64 and 96 channels, views of a packed map"


def steps_of(out: Tensor) -> set[str]:
    """The names of the operations that a result's gradient passes through."""
    found, left = set(), [out.grad_fn]
    while left:
        if (node := left.pop()) is not None:
            found.add(node.name())
            left += [before for before, _ in node.next_functions]
    return found


def routed_memory(device: str) -> str:
    """One image of 600 x 500 with 20 channels, for which copies of the chosen keys would take about 100 GB."""
    q, k, v = torch.randn(1, 602, 504, 3, 1, 20, device=device).unbind(3)

    def run() -> tuple[Tensor, ...]:
        given = [t.detach().requires_grad_() for t in (q, k, v)]
        out = ops.routed_attention(*given, (7, 7), 4, impl="triton")
        return out, *torch.autograd.grad(out.sum(), given)

    most = held(run, device)
    if most >= 1024:
        raise Failed(f"forward and backward hold {most:.0f} MiB")
    return f"forward and backward hold {most:.0f} MiB"
