"""Channel attention by the kernels beside it: what is launched, and the operator that torch sees."""

from functools import partial

import torch
from torch import Tensor

from ..launching import launch, power_of_two, precision
from ..packing import apart, as_given
from ..registration import register, under_autocast
from . import reference
from .kernels import gram_kernel, mix_kernel

TILE = 128  # tokens
PROGRAMS = 1024  # about as many share the sums over all tokens: a few for each multiprocessor


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """(B, H, W, heads, D); the arguments are those of `ops.channel_attention`."""
    return operator(*under_autocast(q, k, v), scale)[0]


def outputs(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The result (B, H, W, heads, D), and the attention (B, heads, D, D) in float32."""
    B, _, _, heads, D = q.shape
    return q.new_empty(q.shape), q.new_empty((B, heads, D, D), dtype=torch.float32)


def forward(q, k, v, scale):
    attention = (gram(k, v) * scale).softmax(-1)
    out = q.new_empty(q.shape)
    mix(q, attention.transpose(2, 3), out, q.shape[3])
    return out, attention


def backward(grad, q, k, v, scale, out, attention, lay=apart):
    change = gram(grad, q)
    logits = attention * (change - (change * attention).sum(-1, keepdim=True)) * scale  # (B, heads, D, D)
    (dq, dk, dv), pitches = lay(q, k, v)
    mix(grad, attention, dq, pitches[0])
    mix(v, logits.transpose(2, 3), dk, pitches[1])
    mix(k, logits, dv, pitches[2])
    return dq, dk, dv


def gram(x: Tensor, y: Tensor) -> Tensor:
    """(B, heads, D, D) in float32: the sums over all tokens of x[t, i] * y[t, j]."""
    B, H, W, heads, D = x.shape
    tiles = -(-H * W // TILE)
    groups = min(tiles, max(PROGRAMS // max(B * heads, 1), 1))
    share = -(-tiles // groups)
    groups = -(-tiles // share)
    sums = x.new_empty((groups, B, heads, D, D), dtype=torch.float32)
    given = (x, y, sums, x.stride(), y.stride(), B, share, heads, H, W)
    launch(gram_kernel, groups * B * heads, *given, **constants(D))
    return sums.sum(0)


def mix(x: Tensor, matrix: Tensor, out: Tensor, pitch: int) -> None:
    """Fills `out`, whose tokens lie `pitch` heads apart, with tokens x times their heads' matrices (B, heads, D, D)."""
    B, H, W, heads, D = x.shape
    tiles = -(-H * W // TILE)
    given = (x, matrix, out, x.stride(), matrix.stride(), pitch, tiles, heads, H, W)
    launch(mix_kernel, B * tiles * heads, *given, **constants(D))


def constants(D: int) -> dict[str, int | str]:
    return dict(D=D, BLOCK=TILE, BLOCK_D=max(power_of_two(D), 16), PRECISION=precision())


operator = register(
    "channel_attention",
    "Tensor q, Tensor k, Tensor v, float scale",
    outputs=outputs,
    forward=forward,
    backward=backward,
    as_given=partial(backward, lay=as_given),
    specification=reference.attend,
)
