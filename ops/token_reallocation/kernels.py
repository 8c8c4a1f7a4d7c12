"""Token reallocation as Triton kernels: attention is summed by key without being stored, and ranked tokens are merged.

No two programs write to the same location. The gradient of the tokens is gathered too: each occurs once in each order.
"""

import triton
from triton import language as tl

from ..launching import FORWARD, PAIR, SMALL, Choices, choice, tuned
from ..tiles import LOG2E, load_tokens, offset, wide

# arguments that change with the map, the strides of the order of its tokens included
SIZES = (
    *("heads", "H", "W", "keys", "columns", "parts", "images", "share", "windows", "tiles", "merged"),
    *("sections", "image_step", "order_step", "rank_step"),
)


@tuned(SIZES, FORWARD)
def normalise_kernel(
    Q, K, Lse, strides_q, strides_k, keys, columns, parts, heads, H, W, scale,
    D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The base-2 logarithm of the sum of each query's exponentials over all keys; Lse is (B, heads, H * W)."""
    part, rest = tl.program_id(0) % parts, tl.program_id(0) // parts
    head, image = rest % heads, rest // heads
    token = part * BLOCK + tl.arange(0, BLOCK)
    inside = token < H * W
    q = load_tokens(Q, offset(strides_q, image, head, token // W, token % W), strides_q, inside, D, BLOCK_D)
    best, total = tl.full([BLOCK], float("-inf"), tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in range(0, keys, BLOCK):
        key = start + tl.arange(0, BLOCK)
        k = load_tokens(
            K, offset(strides_k, image, head, key // columns, key % columns), strides_k, key < keys, D, BLOCK_D
        )
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)
        logits = tl.where((key < keys)[None, :], logits, float("-inf"))
        new = tl.maximum(best, tl.max(logits, 1))
        total = total * tl.exp2(best - new) + tl.sum(tl.exp2(logits - new[:, None]), 1)
        best = new
    place = (image.to(tl.int64) * heads + head) * H * W + token
    tl.store(Lse + place, best + tl.log2(total), mask=inside)


@tuned(SIZES, FORWARD)
def receive_kernel(
    Q, K, Lse, Sums, strides_q, strides_k, keys, columns, parts, images, share, heads, H, W, scale,
    D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What a tile of keys receives from `share` tiles of queries of all heads; Sums is (groups, B, keys)."""
    part, rest = tl.program_id(0) % parts, tl.program_id(0) // parts
    image, group = rest % images, rest // images
    key = part * BLOCK + tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], tl.float32)
    for head in range(heads):
        start_k = offset(strides_k, image, tl.full([], head, tl.int32), key // columns, key % columns)
        k = load_tokens(K, start_k, strides_k, key < keys, D, BLOCK_D)
        for tile in range(group * share, group * share + share):
            token = tile * BLOCK + tl.arange(0, BLOCK)
            inside = token < H * W
            start_q = offset(strides_q, image, tl.full([], head, tl.int32), token // W, token % W)
            q = load_tokens(Q, start_q, strides_q, inside, D, BLOCK_D)
            place = (image.to(tl.int64) * heads + head) * H * W + token
            lse = tl.load(Lse + place, mask=inside, other=float("inf"))
            logits = tl.dot(k, tl.trans(q), input_precision=PRECISION) * (scale * LOG2E)  # (keys, queries)
            sums += tl.sum(tl.exp2(logits - lse[None, :]), 1)
    tl.store(Sums + (group * images + image).to(tl.int64) * keys + key, sums, mask=key < keys)


@tuned(SIZES, PAIR)
def receive_window_kernel(
    Q, K, Out, strides_q, strides_k, columns, windows, heads, H, W, scale,
    D: tl.constexpr, WH: tl.constexpr, WW: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The attention that each token receives in its window, averaged over heads and queries; Out is (B, H, W)."""
    window, image = tl.program_id(0) % windows, tl.program_id(0) // windows
    lane = tl.arange(0, BLOCK_N)
    y, x = window // columns * WH + lane // WW, window % columns * WW + lane % WW
    inside = (lane < WH * WW) & (y < H) & (x < W)
    sums = tl.zeros([BLOCK_N], tl.float32)
    for number in range(heads):
        head = tl.full([], number, tl.int32)
        q = load_tokens(Q, offset(strides_q, image, head, y, x), strides_q, inside, D, BLOCK_D)
        k = load_tokens(K, offset(strides_k, image, head, y, x), strides_k, inside, D, BLOCK_D)
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)
        logits = tl.where(inside[None, :], logits, float("-inf"))
        p = tl.exp2(logits - tl.max(logits, 1)[:, None])
        p = tl.where(inside[:, None], p / tl.sum(p, 1)[:, None], 0.0)
        sums += tl.sum(p, 0)
    mean = sums / (heads * tl.sum(inside.to(tl.float32), 0))
    tl.store(Out + (image.to(tl.int64) * H + y) * W + x, mean, mask=inside)


@triton.jit
def load_pixels(X, strides, image, pixel, width, known, channel, C):
    """(N, channels) of pixels of an image, by their indices; zeros where not known."""
    pixel = pixel.to(tl.int32)  # a 64-bit division calls a subroutine
    y, x = wide(pixel // width, strides[4]), wide(pixel % width, strides[4])
    place = (y * strides[1] + x * strides[2])[:, None] + (wide(channel, strides[4]) * strides[3])[None, :]
    mask = known[:, None] & (channel < C)[None, :]
    return tl.load(X + image.to(tl.int64) * strides[0] + place, mask=mask, other=0.0)


@triton.jit
def end_of(g: tl.constexpr, tokens, ends, GROUPS: tl.constexpr):
    """One past the last token of group `g`. The entry of `ends` after all groups says whether products need 64 bits."""
    return (wide(tokens, ends[GROUPS]) * ends[g] // ends[GROUPS - 1]).to(tl.int32)


@triton.jit
def group_of(number, tokens, runs, ends, each, GROUPS: tl.constexpr, RUNS: tl.constexpr, MEMBERS: tl.constexpr):
    """The group of piece `number`, where the pieces of each group follow those of the group before it.

    A group has `each` pieces for every RUNS runs or, if RUNS is None, one for every MEMBERS members of a run. `runs`
    has the run length of each group, `ends` the sum of the shares up to and including it. Both depend on the model and
    not on the map, hence tuples. Returns the piece's index in the group, the group's first token, one past its last,
    the length of a run, and how many runs, weights and groups come before it.
    """
    begin, first, place, weights = 0, 0, 0, 0
    piece, own_first, own_last, own_run, own_place, own_weights, own_group = number, 0, 0, 0, 0, 0, 0
    for g in tl.static_range(GROUPS):
        run, last = runs[g], end_of(g, tokens, ends, GROUPS)
        # the last group that does not begin after the piece: the group after an empty one begins where that does
        here = number >= begin
        piece, own_run = tl.where(here, number - begin, piece), tl.where(here, run, own_run)
        own_first, own_last = tl.where(here, first, own_first), tl.where(here, last, own_last)
        own_place, own_weights = tl.where(here, place, own_place), tl.where(here, weights, own_weights)
        own_group = tl.where(here, g, own_group)
        count = tl.cdiv(last - first, run)
        begin += tl.cdiv(run, MEMBERS) if RUNS is None else each * tl.cdiv(count, RUNS)
        first, place, weights = last, place + count, weights + run
    return piece, own_first, own_last, own_run, own_place, own_weights, own_group


@triton.jit
def members_of(ranked, step, first, last, number, start, run, runs, RUNS: tl.constexpr, MEMBERS: tl.constexpr):
    """In RUNS x MEMBERS lanes, the members from `start` on of the runs from `number` on: member, run, pixel, known."""
    lane = tl.arange(0, RUNS * MEMBERS)
    member, number = start + lane % MEMBERS, number + lane // MEMBERS
    rank = first + number * run + member
    known = (member < run) & (number < runs) & (rank < last)
    return member, number, tl.load(ranked + rank * step, mask=known, other=0), known


@tuned(SIZES, SMALL)
def merge_kernel(
    X, Order, Weights, Biases, Out, strides_x, image_step, order_step, rank_step, runs, ends, images, merged, H, W, C,
    GROUPS: tl.constexpr, RUNS: tl.constexpr, MEMBERS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """RUNS runs of one group, in one order: weight @ run + bias. Out is a contiguous (B, 2, merged, C).

    Programs are ordered by group, over all images: the least significant tokens are merged in the longest runs, so the
    longest programs start first.
    """
    blocks = tl.cdiv(C, BLOCK_C)
    each = images * 2 * blocks
    piece, first, last, run, place, weights, group = group_of(
        tl.program_id(0), H * W, runs, ends, each, GROUPS, RUNS, MEMBERS
    )
    count = tl.cdiv(last - first, run)
    block, rest = piece % blocks, piece // blocks
    tile, rest = rest % tl.cdiv(count, RUNS), rest // tl.cdiv(count, RUNS)
    order, image = rest % 2, rest // 2
    channel = block * BLOCK_C + tl.arange(0, BLOCK_C)
    ranked = Order + image.to(tl.int64) * image_step + order * order_step
    weighed = tl.zeros([RUNS * MEMBERS, BLOCK_C], tl.float32)
    member, _, pixel, known = members_of(ranked, rank_step, first, last, tile * RUNS, 0, run, count, RUNS, MEMBERS)
    for start in range(0, run, MEMBERS):
        # the next members are loaded before these are used, or each iteration would wait for two loads in a row
        ahead, _, next_pixel, next_known = members_of(
            ranked, rank_step, first, last, tile * RUNS, start + MEMBERS, run, count, RUNS, MEMBERS
        )
        weight = tl.load(Weights + weights + member, mask=member < run, other=0.0).to(tl.float32)
        weighed += weight[:, None] * load_pixels(X, strides_x, image, pixel, W, known, channel, C).to(tl.float32)
        member, pixel, known = ahead, next_pixel, next_known
    sums = tl.sum(weighed.reshape(RUNS, MEMBERS, BLOCK_C), 1) + tl.load(Biases + group).to(tl.float32)
    number = tile * RUNS + tl.arange(0, RUNS)
    start = ((image * 2 + order).to(tl.int64) * merged + place + tile * RUNS) * C
    out = (tl.arange(0, RUNS) * C)[:, None] + channel[None, :]
    tl.store(Out + start + out, sums.to(Out.dtype.element_ty), mask=(number < count)[:, None] & (channel < C)[None, :])


@tuned(SIZES, SMALL)
def backward_weight_kernel(
    X, Order, Grad, Sums, strides_x, image_step, order_step, rank_step, strides_g, runs, ends, parts, sections, H, W, C,
    GROUPS: tl.constexpr, RUNS: tl.constexpr, MEMBERS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The gradients of MEMBERS weights of one group, and of its bias, over a section of its runs in one order.

    Sums is (B * 2 * sections, all weights followed by all biases), so that a single sum over rows remains for all
    groups. If a group has fewer tiles than there are sections, the last sections have none and write zeros.
    """
    part, flat = tl.program_id(0) % parts, tl.program_id(0) // parts
    part, first, last, run, place, weights, group = group_of(part, H * W, runs, ends, 1, GROUPS, None, MEMBERS)
    width = GROUPS
    for g in tl.static_range(GROUPS):
        width += runs[g]
    section, rest = flat % sections, flat // sections
    order, image = rest % 2, rest // 2
    count = tl.cdiv(last - first, run)
    tiles = tl.cdiv(count, RUNS)
    share = tl.cdiv(tiles, sections)
    ranked = Order + image.to(tl.int64) * image_step + order * order_step
    begin = image.to(tl.int64) * strides_g[0] + order * strides_g[1]
    weighed, total = tl.zeros([RUNS * MEMBERS], tl.float32), tl.zeros([RUNS * MEMBERS], tl.float32)
    for tile in range(section * share, tl.minimum(section * share + share, tiles)):
        _, number, pixel, known = members_of(
            ranked, rank_step, first, last, tile * RUNS, part * MEMBERS, run, count, RUNS, MEMBERS
        )
        start_g = wide(place + number, strides_g[4]) * strides_g[2]
        for start in range(0, C, BLOCK_C):
            channel = start + tl.arange(0, BLOCK_C)
            tokens = load_pixels(X, strides_x, image, pixel, W, known, channel, C)
            mask = known[:, None] & (channel < C)[None, :]  # every run has a first member, which counts for its bias
            place_g = start_g[:, None] + (wide(channel, strides_g[4]) * strides_g[3])[None, :]
            grad = tl.load(Grad + begin + place_g, mask=mask, other=0.0).to(tl.float32)
            weighed += tl.sum(tokens.to(tl.float32) * grad, 1)
            total += tl.sum(grad, 1)
    member = part * MEMBERS + tl.arange(0, MEMBERS)
    out = Sums + flat.to(tl.int64) * width
    tl.store(out + weights + member, tl.sum(weighed.reshape(RUNS, MEMBERS), 0), mask=member < run)
    # every run occurs once per member
    total = tl.sum(tl.where(tl.arange(0, RUNS * MEMBERS) % MEMBERS == 0, total, 0.0), 0)
    tl.store(out + (width - GROUPS + group), total, mask=part == 0)


# with four warps float32 needs so many registers that the compiler spills an address
@tuned(SIZES, Choices(SMALL.half, (choice(8, 1),)))
def backward_tokens_kernel(
    Rank, Weights, Grad, DX, strides_g, runs, ends, tiles, H, W, C,
    GROUPS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The gradient of a tile of tokens: a token's rank in each order gives the run that it was merged into.

    Rank is a contiguous (B, 2, H * W), DX (B, H, W, C).
    """
    blocks = tl.cdiv(C, BLOCK_C)
    block, rest = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    tile, image = rest % tiles, rest // tiles
    pixel = tile * BLOCK + tl.arange(0, BLOCK)
    channel = block * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = pixel < H * W
    mask = inside[:, None] & (channel < C)[None, :]
    out = tl.zeros([BLOCK, BLOCK_C], tl.float32)
    for order in tl.static_range(2):
        rank = tl.load(Rank + (image * 2 + order).to(tl.int64) * H * W + pixel, mask=inside, other=0).to(tl.int32)
        place, weight = tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.float32)
        first, start, weights = 0, 0, 0
        for g in tl.static_range(GROUPS):
            run, last = runs[g], end_of(g, H * W, ends, GROUPS)
            here = inside & (rank >= first) & (rank < last)
            place = tl.where(here, start + (rank - first) // run, place)
            found = tl.load(Weights + weights + (rank - first) % run, mask=here, other=0.0)
            weight = tl.where(here, found.to(tl.float32), weight)
            first, start, weights = last, start + tl.cdiv(last - first, run), weights + run
        begin = image.to(tl.int64) * strides_g[0] + order * strides_g[1]
        place_g = wide(place, strides_g[4]) * strides_g[2]
        place_g = place_g[:, None] + (wide(channel, strides_g[4]) * strides_g[3])[None, :]
        grad = tl.load(Grad + begin + place_g, mask=mask, other=0.0)
        out += weight[:, None] * grad.to(tl.float32)
    start = (image.to(tl.int64) * H * W + tile * BLOCK) * C
    place = (tl.arange(0, BLOCK) * C)[:, None] + channel[None, :]
    tl.store(DX + start + place, out.to(DX.dtype.element_ty), mask=mask)
