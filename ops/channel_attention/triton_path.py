"""Channel attention with Triton: launches the kernels and registers them as a torch operator."""

from typing import Any

import torch
from torch import Tensor

from ..dispatch import under_autocast
from ..launching import launch, power_of_two
from ..packing import apart, as_given
from ..precision import precision
from ..registration import register
from ..tiles import strides
from . import reference
from .kernels import attention_kernel, change_kernel, gram_kernel, mix_kernel

TILE = 128  # tokens
PROGRAMS = 1024  # about how many share the sums over all tokens: a few for each multiprocessor
NUMBERS = 512  # elements of rows per program: a thread loads four at once, and small batches still have many programs


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """(B, H, W, heads, D); the arguments are those of `ops.channel_attention`."""
    return operator(*under_autocast(q, k, v), scale)[0]


def outputs(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The result (B, H, W, heads, D), and the attention (B, heads, D, D) in float32."""
    B, _, _, heads, D = q.shape
    return q.new_empty(q.shape), q.new_empty((B, heads, D, D), dtype=torch.float32)


def forward(q, k, v, scale):
    out, attention = outputs(q, k, v, scale)
    by_rows(attention_kernel, gram(k, v), attention, scale=scale)
    mix(q, attention.transpose(2, 3), out, q.shape[3])
    return out, attention


def backward(grad, q, k, v, scale, out, attention, lay=apart):
    logits = torch.empty_like(attention)  # (B, heads, D, D): their gradients, times scale
    by_rows(change_kernel, gram(grad, q), attention, logits, scale=scale)
    (dq, dk, dv), pitches = lay(q, k, v)
    mix(grad, attention, dq, pitches[0])
    mix(v, logits.transpose(2, 3), dk, pitches[1])
    mix(k, logits, dv, pitches[2])
    return dq, dk, dv


def gram(x: Tensor, y: Tensor) -> Tensor:
    """(groups, B, heads, D, D) in float32: the sums of x[t, i] * y[t, j] over the tokens of each group."""
    B, H, W, heads, D = x.shape
    tiles = -(-H * W // TILE)
    groups = min(tiles, max(PROGRAMS // max(B * heads, 1), 1))
    share = -(-tiles // groups)
    groups = -(-tiles // share)
    sums = x.new_empty((groups, B, heads, D, D), dtype=torch.float32)
    given = (x, y, sums, *strides(x, y), B, share, heads, H, W)
    launch(gram_kernel, groups * B * heads, *given, **constants(x))
    return sums


def by_rows(kernel: Any, sums: Tensor, *tensors: Tensor, scale: float) -> None:
    """Runs a kernel that sums groups (groups, B, heads, D, D); the tensors are contiguous (B, heads, D, D), float32."""
    groups, B, heads, D, _ = sums.shape
    width = max(power_of_two(D), 16)
    rows, height = B * heads * D, max(NUMBERS // width, 1)
    given = (sums, *tensors, groups, rows, scale)
    launch(kernel, -(-rows // height), *given, D=D, ROWS=height, BLOCK_D=width)


def mix(x: Tensor, matrix: Tensor, out: Tensor, pitch: int) -> None:
    """Fills `out`, whose tokens are `pitch` heads apart, with x times the matrix (B, heads, D, D) of each head."""
    B, H, W, heads, _ = x.shape
    tiles = -(-H * W // TILE)
    given = (x, matrix, out, *strides(x), matrix.stride(), pitch, tiles, heads, H, W)
    launch(mix_kernel, B * tiles * heads, *given, **constants(x))


def constants(x: Tensor) -> dict[str, int | str]:
    D = x.shape[4]
    return dict(D=D, BLOCK=TILE, BLOCK_D=max(power_of_two(D), 16), PRECISION=precision(x.dtype))


operator = register(
    "channel_attention",
    "Tensor q, Tensor k, Tensor v, float scale",
    outputs=outputs,
    forward=forward,
    backward=backward,
    as_given=lambda needed, *given: backward(*given, lay=as_given),
    specification=reference.attend,
    reads_result=lambda *args: False,
)
