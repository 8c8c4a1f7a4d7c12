"""Token reallocation (SG-Former): significant tokens stay fine-grained, the others are merged."""

from typing import Any

import torch
from torch import Tensor

from ..checks import check_devices, check_dtypes, check_kind, check_map, check_numbers, factor, pair, whole
from ..dispatch import choose
from . import reference
from .torch_path import merge as torch_merge
from .torch_path import received as torch_received

WINDOW = 128  # tokens of a window at most in the kernel of `significance`, which processes it as one tile


def significance(
    q: Tensor,
    k: Tensor,
    window: int | tuple[int, int] | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """The attention that each key receives: its column of the softmax, averaged over queries and heads. No gradient.

        out[j] = mean over heads and i of softmax_j(scale * q[i] . k[j])

    q          (B, H, W, heads, D), any strides
    k          (B, h, w, heads, D); with `window`, the same shape as q
    window     None: every query attends to every key. Tokens, for both axes or (wh, ww): attention is inside contiguous
               tiles of the map; where these do not divide it, tokens outside neither attend nor are attended to
    scale      factor on the logits; None: D ** -0.5
    returns    (B, h, w), in float32 at least: rounded further, many tokens would be equal

    Raises ValueError for invalid shapes and dtypes, and what `ops.dispatch.choose` raises for `impl`.
    Source: SG-Former, https://arxiv.org/abs/2308.12216, section 3.2.
    """
    window_ = pair("window", window) if window is not None else None
    if q.dim() != 5 or k.dim() != 5 or q.shape[0] != k.shape[0] or q.shape[3:] != k.shape[3:]:
        raise ValueError(f"q and k are {q.shape}, {k.shape}: expected (B, H, W, heads, D) and (B, h, w, heads, D)")
    if window_ is not None and (q.shape != k.shape or window_[0] < 1 or window_[1] < 1):
        raise ValueError(f"q and k are {q.shape}, {k.shape} for window {window}: expected one shape and at least 1 x 1")
    check_map("q", q)
    check_map("k", k)
    check_dtypes("q, k", [q, k])
    scale_ = factor(scale, q.shape[-1])
    if torch.jit.is_scripting():
        return torch_received(q.detach(), k.detach(), window_, scale_)
    else:
        unfit = None
        if window_ is not None and window_[0] * window_[1] > WINDOW:
            unfit = f"a window has {window_[0] * window_[1]} tokens, and this kernel takes up to {WINDOW}"
        received = {"triton": _triton_received, "torch": torch_received, "reference": reference.received}
        name = choose(impl, q, op="significance", unfit=unfit)
        return received[name](q.detach(), k.detach(), window_, scale_)


def rank_tokens(significance: Tensor, impl: str = "auto") -> Tensor:
    """(B, H, W) -> (B, 2, H * W) int64: row-major pixel indices in ascending order of significance.

    Both rows are stable sorts and differ only in ties: row 0 keeps equal tokens in row-major order, row 1 in
    column-major order. NaN comes last.

    Raises ValueError for another number of axes, a map without pixels or an invalid dtype, and what
    `ops.dispatch.choose` raises for `impl`.
    """
    if significance.dim() != 3:
        raise ValueError(f"significance is {significance.shape}: expected (B, H, W)")
    if significance.shape[1] == 0 or significance.shape[2] == 0:
        raise ValueError(f"significance is {significance.shape}: expected a map of at least 1 x 1 pixels")
    check_kind("significance", significance)
    if torch.jit.is_scripting():
        return reference.rank(significance)
    else:
        name = choose(impl, significance, op="rank_tokens", channels=None)
        return _triton_rank(significance.detach()) if name == "triton" else reference.rank(significance)


def reallocate_tokens(
    x: Tensor,
    significance: Tensor | None,
    weights: list[Tensor],
    biases: list[Tensor],
    shares: list[int],
    order: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Sorts tokens by significance, cuts them into groups by rank, and merges runs of each group by a learned sum.

    The sorted tokens are cut at the cumulative `shares` (rounded down). Group g is cut into runs of weights[g].numel()
    tokens, and each run becomes one token,  weights[g] @ run + biases[g],  the same for all channels. Where the runs do
    not divide the group, its last run is padded with zeros.

    x             (B, H, W, C), any strides
    significance  (B, H, W): determines the order through `rank_tokens`; may be None if `order` is given
    weights       for each group (1, run), as in a Linear(run, 1); cast to the dtype of x
    biases        for each group (1,); cast to the dtype of x
    shares        relative sizes of the groups, least significant first: [1, 2, 1] is a quarter, a half, a quarter
    order         (B, 2, H * W) int64, used instead of ranking, as `rank_tokens` returns it
    returns       two sequences (B, M, C), from the row-major and the column-major order; M is the number of runs

    Gradients reach x, weights and biases, never the order. Raises ValueError for invalid shapes and dtypes, and what
    `ops.dispatch.choose` raises for `impl`. Source: SG-Former, https://arxiv.org/abs/2308.12216, section 3.3.
    """
    if x.dim() != 4:
        raise ValueError(f"x is {x.shape}: expected (B, H, W, C)")
    check_map("x", x)
    shares = [whole("a share", share) for share in shares]
    _check_merge(x, weights, biases, shares)
    if order is None:
        if significance is None:
            raise ValueError("neither a significance nor an order is given: expected one of them")
        if significance.shape != x.shape[:3]:
            raise ValueError(f"significance is {significance.shape}: expected (B, H, W), {list(x.shape[:3])}")
        check_devices("x, significance", [x, significance])
        order = rank_tokens(significance, impl)
    elif list(order.shape) != [x.shape[0], 2, x.shape[1] * x.shape[2]]:
        raise ValueError(
            f"order is {order.shape}: expected (B, 2, H * W), ({x.shape[0]}, 2, {x.shape[1] * x.shape[2]})"
        )
    else:
        check_numbers("order", order, x, x.shape[1] * x.shape[2])
        order = order.long()
    weights, biases = [weight.to(x.dtype) for weight in weights], [bias.to(x.dtype) for bias in biases]
    if torch.jit.is_scripting():
        merged = torch_merge(x, order, weights, biases, shares)
    else:
        name = choose(impl, x, op="reallocate_tokens", channels=None)
        if name == "reference":
            by_rows = reference.merge(x, order[:, 0], weights, biases, shares)
            return by_rows, reference.merge(x, order[:, 1], weights, biases, shares)
        merge = _triton_merge if name == "triton" else torch_merge
        merged = merge(x, order, weights, biases, shares)
    return merged[:, 0], merged[:, 1]


def _check_merge(x: Tensor, weights: list[Tensor], biases: list[Tensor], shares: list[int]) -> None:
    if len(weights) != len(shares) or len(biases) != len(shares) or len(shares) == 0 or min(shares) < 1:
        raise ValueError(
            f"{len(weights)} weights, {len(biases)} biases, shares {shares}: expected one of each "
            "per group, with shares at least 1"
        )
    for i in range(len(shares)):
        weight, bias = weights[i], biases[i]
        if weight.dim() != 2 or weight.shape[0] != 1 or weight.shape[1] < 1 or list(bias.shape) != [1]:
            raise ValueError(
                f"the weight of group {i} is {weight.shape} and its bias {bias.shape}: expected (1, run) and (1,), "
                "as in a Linear(run, 1)"
            )
        check_kind(f"the weight of group {i}", weight)
        check_kind(f"the bias of group {i}", bias)
        check_devices(f"x, the weight and the bias of group {i}", [x, weight, bias])


def _triton_received(*args: Any) -> Tensor:
    from .triton_path import received  # triton is only imported where it runs

    return received(*args)


def _triton_rank(*args: Any) -> Tensor:
    from .triton_path import ranked  # as above

    return ranked(*args)


def _triton_merge(*args: Any) -> Tensor:
    from .triton_path import merge  # as above

    return merge(*args)
