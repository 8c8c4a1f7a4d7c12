"""Channel attention as Triton kernels: products over all tokens, and a small matrix applied to every token."""

from triton import language as tl

from ..launching import FORWARD, tuned
from ..tiles import load_tokens, offset, store_tokens

SIZES = ("images", "share", "pitch", "tiles", "heads", "H", "W")  # arguments that change with the map


@tuned(SIZES, FORWARD)
def gram_kernel(
    X, Y, Sums, strides_x, strides_y, images, share, heads, H, W,
    D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums of x[t, i] y[t, j] over `share` tiles of tokens of one head, into (groups, B, heads, D, D)."""
    head, rest = tl.program_id(0) % heads, tl.program_id(0) // heads
    image, group = rest % images, rest // images
    total = tl.zeros([BLOCK_D, BLOCK_D], tl.float32)
    for tile in range(group * share, group * share + share):
        token = tile * BLOCK + tl.arange(0, BLOCK)
        inside, y, x = token < H * W, token // W, token % W
        first = load_tokens(X, offset(strides_x, image, head, y, x), strides_x, inside, D, BLOCK_D)
        second = load_tokens(Y, offset(strides_y, image, head, y, x), strides_y, inside, D, BLOCK_D)
        total += tl.dot(tl.trans(first), second, input_precision=PRECISION)
    d = tl.arange(0, BLOCK_D)
    place = ((group * images + image) * heads + head).to(tl.int64) * (D * D) + d[:, None] * D + d[None, :]
    tl.store(Sums + place, total, mask=(d < D)[:, None] & (d < D)[None, :])


@tuned(SIZES, FORWARD)
def mix_kernel(
    X, Matrix, Out, strides_x, strides_m, pitch, tiles, heads, H, W,
    D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[t, i] = sum_j x[t, j] matrix[j, i] for one tile of tokens of one head."""
    head, rest = tl.program_id(0) % heads, tl.program_id(0) // heads
    tile, image = rest % tiles, rest // tiles
    token = tile * BLOCK + tl.arange(0, BLOCK)
    inside = token < H * W
    x = load_tokens(X, offset(strides_x, image, head, token // W, token % W), strides_x, inside, D, BLOCK_D)
    d = tl.arange(0, BLOCK_D)
    place = (
        image.to(tl.int64) * strides_m[0] + head * strides_m[1] + d[:, None] * strides_m[2] + d[None, :] * strides_m[3]
    )
    matrix = tl.load(Matrix + place, mask=(d < D)[:, None] & (d < D)[None, :], other=0.0).to(x.dtype)
    mixed = tl.dot(x, matrix, input_precision=PRECISION)
    store_tokens(Out, image.to(tl.int64) * H * W + token, head, pitch, inside, mixed, D, BLOCK_D)
