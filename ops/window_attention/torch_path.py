"""Window attention in ordinary PyTorch operators, arranged for speed.

q, k and v are each copied once into windows and the result once back. Where PyTorch's fused attention is used, it reads
windows without a further copy. Elsewhere they are copied head by head for matmuls, and bias and mask are the initial
value to which the matmul adds the logits, so that they need no pass of their own. Without gradients, a few images are
processed at a time, so that the copies stay in the cache.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from ..dispatch import on_threads
from ..sizes import alike, ceil, compiled_for_any, covering, cropped, laid_out, surely

CACHED = 2**22  # bytes of a thread's cache for the images that are processed at a time without gradients
# keys up to which several threads are faster with matmuls: fused attention gains more from wide registers
FEW = 32 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 64


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    window: tuple[int, int],
    grid: bool,
    scale: float,
    outside: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """(B, H, W, heads, D); the arguments are those of `ops.window_attention`, `grid` for its partition."""
    B, H, W, heads, D = k.shape
    wh, ww = window
    Hx, Wx = covering(H, wh), covering(W, ww)
    if not torch.jit.is_scripting():  # noqa: SIM102 (TorchScript would compile what follows an `and`)
        if eager(k) and not learning(q, k, v, bias):
            step = at_once(k)
            if step < B:
                out = k.new_empty(B, Hx, Wx, heads, D)
                placed = tiles(out, wh, ww, grid)
                for i in range(0, B, step):
                    few = (t[i : i + step] for t in (q, k, v))
                    placed[i : i + step] = attend_tiles(*few, bias, window, grid, scale, outside)
                return out[:, :H, :W]
    out = attend_tiles(q, k, v, bias, window, grid, scale, outside)
    out = out.permute(0, 3, 1, 4, 2, 5, 6) if grid else out.transpose(2, 3)
    return cropped(laid_out(out).reshape(B, Hx, Wx, heads, D), H, W)


def at_once(k: Tensor) -> int:
    """How many images the caches of all threads hold, with q, k, v and the result, split as evenly as possible."""
    B = max(k.shape[0], 1)
    shares = -(-4 * k.numel() * k.element_size() // (CACHED * torch.get_num_threads()))
    return -(-B // min(max(shares, 1), B))


def eager(x: Tensor) -> bool:
    """Whether operators run eagerly on a CPU, in the dtype of `x`."""
    recorded = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return x.is_cpu and not recorded and not torch.is_autocast_enabled("cpu")


def learning(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> bool:
    """Whether any of these tensors needs a gradient."""
    learned = mask is not None and mask.requires_grad
    return differentiating() and (learned or q.requires_grad or k.requires_grad or v.requires_grad)


def differentiating() -> bool:
    """Whether autograd is enabled and may decide what runs.

    Not while torch.jit.trace records: it compares its graph with one traced without gradients, which must be the same.
    """
    if torch.jit.is_scripting():
        return torch.is_grad_enabled()
    else:
        return torch.is_grad_enabled() and not torch.jit.is_tracing()


def attend_tiles(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    window: tuple[int, int],
    grid: bool,
    scale: float,
    outside: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """The result as `tiles` returns it, in whole groups."""
    H, W, heads, D = k.shape[1:]
    wh, ww = window
    down, right = covering(H, wh) - H, covering(W, ww) - W
    shared = alike(q.shape[1:3], [wh, ww]) and not alike(q.shape[1:3], [H, W])
    mask = relative(bias.to(q.dtype), wh, ww) if bias is not None else None  # (heads, N, N)
    repeated = False
    if not (surely(down == 0) and surely(right == 0)):
        repeated = outside is not None and outside[0].requires_grad
        if outside is None:
            hidden = hide(H, W, wh, ww, grid, heads, k)  # (groups * heads, 1, N)
            mask = hidden if mask is None else hidden + mask.repeat(hidden.shape[0] // heads, 1, 1)
        k = extend(k, down, right, outside[0] if outside is not None else None)
        v = extend(v, down, right, outside[1] if outside is not None else None)
        q = q if shared else extend(q, down, right, None)
    k, v = tiles(k, wh, ww, grid), tiles(v, wh, ww, grid)
    q = q[:, None, None].expand(k.shape) if shared else tiles(q, wh, ww, grid)
    # the mask is the same in every window: heads need not be split off
    if (mask is None or surely(mask.shape[0] == heads)) and fused(q, k, v, mask, wh * ww, repeated):
        return sdpa(together(q), together(k), together(v), mask, scale).transpose(1, 2).reshape(k.shape)
    out = matrices(by_head(q), by_head(k), by_head(v), mask, heads, scale, repeated)
    return out.view(k.shape[0], k.shape[1], k.shape[2], heads, wh, ww, D).permute(0, 1, 2, 4, 5, 3, 6)


def fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, keys: int, repeated: bool) -> bool:
    """Whether PyTorch's fused attention is available and faster than matmuls.

    Its gradients of a row's logits sum to zero less closely, and a key that is `repeated` in a row adds up the error.
    On GPUs in float32 its error can be more than twice that of the reference, beyond the bound of ops.check.
    On CPUs it has no gradient of a mask, is slower in other gradients for up to 64 keys, and is slow for a few keys.
    """
    if k.dtype == torch.float32 and (k.is_cuda or (repeated and differentiating())):
        return False
    if not k.is_cpu:
        return True
    if not learning(q, k, v, mask):
        return not surely(keys <= few(k))
    return not surely(keys <= 64) and (mask is None or not mask.requires_grad)


def few(x: Tensor) -> int:
    """The number of keys up to which matmuls are faster without gradients."""
    if torch.jit.is_scripting():
        return 16
    else:
        return FEW if on_threads(x) else 16


def matrices(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, heads: int, scale: float, repeated: bool = False
) -> Tensor:
    """softmax(scale * q @ k.T + mask) @ v for a batch of matrices q (N, D), k and v (K, D), head after head.

    mask (M, 1 or N, K) is repeated over the batch.
    """
    N, K = q.shape[1], k.shape[1]
    if not fused(q, k, v, mask, K, repeated):
        if mask is None:
            logits = torch.baddbmm(q.new_empty([1, 1, 1]), q, k.transpose(1, 2), beta=0, alpha=scale)
        else:
            logits = mask.expand(-1, N, -1).repeat(q.shape[0] // mask.shape[0], 1, 1)
            logits = logits.baddbmm_(q, k.transpose(1, 2), alpha=scale)
        return torch.bmm(logits.softmax(-1).to(v.dtype), v)
    count = heads if mask is None else mask.shape[0]
    q, k, v = q.view(-1, count, N, q.shape[2]), k.view(-1, count, K, k.shape[2]), v.view(-1, count, K, v.shape[2])
    return sdpa(q, k, v, mask, scale)


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Fused attention of (matrices, heads, N, D), with a mask (heads, 1 or N, K)."""
    return F.scaled_dot_product_attention(q, k, v, None if mask is None else mask.unsqueeze(0), scale=scale)


def extend(x: Tensor, down: int, right: int, token: Tensor | None) -> Tensor:
    """Pads the map with `down` rows and `right` columns at its end, of zeros or of `token` (heads, D)."""
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


def together(x: Tensor) -> Tensor:
    """A copy of `tiles` in (B * groups, wh * ww, heads, D), returned as (B * groups, heads, wh * ww, D)."""
    return laid_out(x).flatten(3, 4).flatten(0, 2).transpose(1, 2)


def by_head(x: Tensor) -> Tensor:
    """A copy of `tiles` as (B * groups * heads, wh * ww, D)."""
    return laid_out(x.permute(0, 1, 2, 5, 3, 4, 6)).flatten(4, 5).flatten(0, 3)


def relative(bias: Tensor, wh: int, ww: int) -> Tensor:
    """(heads, 2*wh-1, 2*ww-1) -> (heads, N, N), query by key: entry key - query + window - 1 on each axis."""
    # query i sees the i-th window of the table's row, counted from the end
    views = bias.unfold(1, wh, 1).unfold(2, ww, 1)  # (heads, wh, ww, wh, ww)
    return views.flip(1, 2).reshape(bias.shape[0], wh * ww, wh * ww)


def hide(H: int, W: int, wh: int, ww: int, grid: bool, heads: int, like: Tensor) -> Tensor:
    """(groups * heads, 1, N): 0 for keys inside the map, -inf for those outside."""
    rows, cols = inside(H, wh, grid, like.device), inside(W, ww, grid, like.device)
    shown = rows[:, None, None, :, None] & cols[:, None, None, :]  # (rows and columns of groups, 1, wh, ww)
    zeros = torch.zeros([rows.shape[0], cols.shape[0], heads, wh, ww], dtype=like.dtype, device=like.device)
    return zeros.masked_fill_(~shown, float("-inf")).view(-1, 1, wh * ww)


def inside(side: int, window: int, grid: bool, device: torch.device) -> Tensor:
    """(groups, window): whether each token of a group is inside the map on one axis."""
    count = ceil(side, window)
    places = torch.arange(count * window, device=device) < side
    return places.view(window, count).t() if grid else places.view(count, window)
