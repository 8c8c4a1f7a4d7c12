"""What the PyTorch paths of several ops share: maps cut into groups of tokens, and attention inside such groups.

A map is extended to whole groups and cut into them as a view, of which each op makes one copy in the layout that it
needs. Attention is PyTorch's fused attention where that is faster, and matmuls elsewhere. A change here changes every
op that uses it; what only one op needs is in its own folder.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .dispatch import NO_SECOND, differentiating, learning, on_threads, watched
from .sizes import compiled_for_any, covering, laid_out, surely

CACHED = 2**22  # bytes of a thread's cache for the images that are processed at a time without gradients
HAS_AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"  # from which fused attention gains
HAS_TILES = HAS_AVX512 and torch.cpu._is_amx_tile_supported()  # AMX, which multiplies tiles in half precision
# vectors of bfloat16 are multiplied, and no tiles, as by AMD's CPUs since Zen 4
HAS_BFLOAT16 = HAS_AVX512 and not HAS_TILES and torch.cpu._is_avx512_bf16_supported()


class FewKeys(NamedTuple):
    """Numbers of keys up to which matmuls are faster on a CPU than fused attention."""

    serial: int  # without gradients, on one thread or in a graph
    threads: int  # without gradients, on several threads
    learnt: int  # with gradients


def few_keys(dtype: torch.dtype) -> FewKeys:
    """What was measured on CPUs like this one, for heads of 32 and 64 channels."""
    if dtype not in (torch.bfloat16, torch.float16):
        return FewKeys(16, 144 if HAS_BFLOAT16 else 32 if HAS_AVX512 else 64, 64)
    if HAS_TILES:
        return FewKeys(16, 32, 384)
    if dtype == torch.float16 or not HAS_AVX512:
        return FewKeys(0, 0, 0)  # matmuls convert each number by itself there
    return FewKeys(576, 576, 384) if HAS_BFLOAT16 else FewKeys(16, 16, 196)


def extend(x: Tensor, down: int, right: int, token: Tensor | None) -> Tensor:
    """Pads (B, H, W, heads, D) with `down` rows and `right` columns at its end, of zeros or of `token` (heads, D)."""
    if token is None:
        return F.pad(x, [0, 0, 0, 0, 0, right, 0, down])
    B, H, W, heads, D = x.shape
    token = token.to(x.dtype)
    if compiled_for_any(down == 0) or compiled_for_any(right == 0):  # sizes 0 and 1 would add guards
        rows, columns = torch.arange(H + down, device=x.device) < H, torch.arange(W + right, device=x.device) < W
        inside = (rows[:, None] & columns)[:, :, None, None]
        return torch.where(inside, F.pad(x, [0, 0, 0, 0, 0, right, 0, down]), token)
    x = torch.cat([x, token.expand(B, H, right, heads, D)], 2)
    return torch.cat([x, token.expand(B, down, W + right, heads, D)], 1)


def tiles(x: Tensor, wh: int, ww: int, grid: bool) -> Tensor:
    """A view of (B, H, W, heads, D) as (B, rows of groups, columns of groups, wh, ww, heads, D)."""
    H, W = x.shape[1], x.shape[2]
    if grid:
        return x.unflatten(2, [ww, W // ww]).unflatten(1, [wh, H // wh]).permute(0, 2, 4, 1, 3, 5, 6)
    return x.unflatten(2, [W // ww, ww]).unflatten(1, [H // wh, wh]).transpose(2, 3)


def by_head(x: Tensor) -> Tensor:
    """A copy of `tiles` as (B * groups * heads, wh * ww, D)."""
    return laid_out(x.permute(0, 1, 2, 5, 3, 4, 6)).flatten(4, 5).flatten(0, 3)


def hide(H: int, W: int, wh: int, ww: int, grid: bool, heads: int, like: Tensor) -> Tensor:
    """A mask for `by_matmuls` (groups * heads, 1, wh * ww): 0 for keys inside the map H x W, -inf for those outside."""
    around = [0, 0, 0, 0, 0, covering(W, ww) - W, 0, covering(H, wh) - H]
    mask = F.pad(like.new_zeros([1, H, W, 1, 1]), around, value=float("-inf"))
    return by_head(tiles(mask, wh, ww, grid).expand(-1, -1, -1, -1, -1, heads, -1)).transpose(1, 2)


def by_matmuls(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, heads: int, scale: float, repeated: bool = False
) -> Tensor:
    """softmax(scale * q @ k.T + mask) @ v for a batch of matrices q (N, D), k and v (K, D), head after head.

    mask (M, 1 or N, K) is repeated over the batch.
    """
    N, K = q.shape[1], k.shape[1]
    if not fused(q, k, v, mask, K, repeated):
        if mask is None:
            # with alpha=0 and beta=0 PyTorch leaves half precision unwritten
            beta = int(isinstance(scale, float) and scale == 0.0)
            logits = torch.baddbmm(q.new_zeros([1, 1, 1]), q, k.transpose(1, 2), beta=beta, alpha=scale)
        else:
            logits = mask.expand(-1, N, -1).repeat(q.shape[0] // mask.shape[0], 1, 1)
            if torch.jit.is_scripting():
                # its autocast does not see operators in place
                logits = torch.baddbmm(logits, q, k.transpose(1, 2), alpha=scale)
            elif watched(q, k, logits):
                # torch's FlopCounterMode does not see this operator in place
                logits = torch.baddbmm(logits, q, k.transpose(1, 2), alpha=scale)
            else:
                logits = logits.baddbmm_(q, k.transpose(1, 2), alpha=scale)
        return torch.bmm(logits.softmax(-1).to(v.dtype), v)
    count = heads if mask is None else mask.shape[0]
    q, k, v = q.view(-1, count, N, q.shape[2]), k.view(-1, count, K, k.shape[2]), v.view(-1, count, K, v.shape[2])
    return sdpa(q, k, v, mask, scale)


def fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, keys: int, repeated: bool) -> bool:
    """Whether PyTorch's fused attention is available and faster than matmuls.

    Its gradients of a row's logits sum to zero less closely. If one padding key fills many positions of a row, which is
    what `repeated` says, its gradient sums the rounding errors of all of them.
    On GPUs in float32 its error can be more than twice that of the reference, beyond the bound of ops.check.
    On CPUs it has no gradient of a mask, is slower in other gradients for up to `learnt_keys`, and for a few keys.
    """
    if k.dtype == torch.float32 and (k.is_cuda or (repeated and differentiating())):
        return False
    if not k.is_cpu:
        return True
    if not learning(q, k, v, mask):
        return not surely(keys <= matmul_keys(k))
    return not surely(keys <= learnt_keys(k)) and (mask is None or not mask.requires_grad)


def learnt_keys(x: Tensor) -> int:
    """The number of keys up to which matmuls are faster if gradients are needed."""
    if torch.jit.is_scripting():
        return 384 if x.element_size() == 2 else 64
    else:
        return few_keys(x.dtype).learnt


def matmul_keys(x: Tensor) -> int:
    """The number of keys up to which matmuls are faster without gradients."""
    if torch.jit.is_scripting():
        return 16
    else:
        few = few_keys(x.dtype)
        return few.threads if on_threads(x) else few.serial


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Fused attention of (matrices, heads, N, D), with a mask (heads, 1 or N, K)."""
    if not torch.jit.is_scripting():  # noqa: SIM102 (TorchScript would compile what follows an `and`)
        if isinstance(scale, Tensor):  # in compiled calls, of which a graph would have to be broken to read it
            q, scale = q * scale, 1.0
    out = F.scaled_dot_product_attention(q, k, v, None if mask is None else mask.unsqueeze(0), scale=scale)
    if not torch.jit.is_scripting():  # noqa: SIM102 (TorchScript would compile what follows an `and`)
        if out.requires_grad and not watched(out):
            refuse_second(out)
    return out


def refuse_second(out: Tensor) -> None:
    """Makes a second derivative through the result of fused attention an error that says what to do instead.

    This is a hook, since only a first derivative for which a graph is recorded tells that a second may follow. PyTorch
    chooses how it computes attention, and matmuls, one of its choices, do have a second derivative.
    """
    if out.grad_fn.name().startswith("ScaledDotProduct"):
        out.grad_fn.register_hook(refuse_if_recorded)


def refuse_if_recorded(grads: tuple, probes: tuple) -> tuple | None:
    return Refused.apply(*grads) if torch.is_grad_enabled() else None


class Refused(torch.autograd.Function):
    """Gradients that have no derivative."""

    @staticmethod
    def forward(ctx: Any, *grads: Tensor | None) -> tuple:
        return grads

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        raise RuntimeError(f"PyTorch's fused attention, which is used at this size and precision, {NO_SECOND}")
