"""The Triton kernels: on a GPU where there is one, else under Triton's interpreter (test_interpreter.py)."""

import os

import pytest
import torch
from law import check, hold
from op_cases import (
    CASES,
    channel_case,
    gradients,
    neighborhood_case,
    packed,
    random,
    reallocate_case,
    routed_case,
    significance_case,
    super_case,
    window_case,
)
from test_neighborhood_recorded import RECORD, answers, unpack
from test_neighborhood_recorded import name as recorded_name
from torch.nn import functional as F

import ops

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
pytestmark = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="no GPU; test_interpreter.py runs these")

# the interpreter multiplies bfloat16 wrongly
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE == "cuda")
WITH_KERNELS = {
    *("window_attention", "channel_attention", "super_tokens", "routed_attention", "reallocate_tokens", "significance"),
    "neighborhood_attention",
}

# what released models use, each on the smallest map that has a border and an interior
RELEASED = [
    window_case("maxvit", 15, 15, (7, 7), D=32, B=1),
    window_case("maxvit_grid", 15, 15, (7, 7), partition="grid", D=32, B=1),
    window_case("maxvit_384", 13, 12, (12, 12), D=32, B=1),
    window_case("maxvit_512_grid", 16, 15, (16, 16), partition="grid", D=32, heads=1, B=1),
    window_case("gcvit_14", 15, 14, (14, 14), D=32, heads=1, B=1),
    window_case("gcvit_14_shared", 15, 14, (14, 14), D=32, heads=1, B=1, shared=True),
    window_case("gcvit_24", 24, 23, (24, 24), D=32, heads=1, B=1),
    window_case("gcvit_32_shared", 32, 31, (32, 32), D=32, heads=1, B=1, shared=True),
    window_case("davit_12", 13, 12, (12, 12), D=32, heads=1, B=1, bias=False, outside=True),
    window_case("davit", 15, 15, (7, 7), D=32, heads=3, B=1, bias=False, outside=True),
    window_case("hilo", 9, 15, (2, 2), D=32, bias=False, outside=True),
    window_case("sgformer_24", 15, 15, (7, 7), D=24, bias=False),
    window_case("widest", 5, 9, (4, 4), D=128, heads=1, B=1),
    channel_case("davit", 13, 14, 3, 32),
    channel_case("widest", 5, 6, 1, 128),
    channel_case("narrow", 5, 6, 2, 17),
    routed_case("biformer_1", 14, 21, (7, 7), 1),
    routed_case("biformer_4", 14, 14, (7, 7), 4),
    routed_case("biformer_16", 7, 14, (7, 7), 16),
    routed_case("larger_than_a_tile", 22, 9, (2, 1), 2),
    reallocate_case("sgformer", 21, 28, [196, 56, 28], [1, 2, 1]),
    significance_case("sgformer", 14, 14, (14, 14), (7, 7)),
    super_case("stvit_8", 20, 25, (8, 8)),
    super_case("stvit_4", 10, 13, (4, 4)),
    super_case("large_cells", 21, 12, (10, 11)),
    neighborhood_case("nat", 17, 19, (7, 7), 1, D=32, heads=1, B=1),
    neighborhood_case("dinat_2", 17, 15, (7, 7), 2, D=32, B=1),
    neighborhood_case("dinat_8", 57, 8, (7, 7), (8, 1), D=32, heads=1, B=1),
    neighborhood_case("dinat_13", 8, 92, (7, 7), (1, 13), D=32, heads=1, B=1),
    neighborhood_case("dinat_28", 197, 7, (7, 7), (28, 1), D=32, heads=1, B=1),
    neighborhood_case("dinat_11", 13, 12, (11, 11), 1, D=32, heads=1, B=1),
    neighborhood_case("dinat_11_2", 12, 23, (11, 11), (1, 2), D=32, heads=1, B=1),
    neighborhood_case("every_line_a_window", 14, 28, (7, 7), (2, 4), D=32, heads=1, B=1),
    neighborhood_case("every_line_a_window_outside", 13, 14, (7, 7), 2, D=32, heads=1, B=1, outside=True),
    neighborhood_case("outside_rows", 9, 15, (7, 7), 2, D=32, heads=1, outside=True),
    neighborhood_case("outside_both", 5, 8, (7, 7), 2, D=32, heads=1, outside=True),
    neighborhood_case("k13", 14, 17, (13, 13), 1, heads=1, B=1),
    neighborhood_case("large_table", 17, 18, (17, 17), 1, heads=1, B=1),
    neighborhood_case("one_key", 5, 9, (1, 1), 2, bias=False),
    neighborhood_case("widest", 5, 9, (3, 3), 1, D=128, heads=1, B=1),
    neighborhood_case("narrow", 5, 9, (3, 3), 1, D=17, heads=1, B=1),
    window_case("narrow", 5, 9, (4, 4), D=17, heads=1, B=1),
]
# cases about blocks of the torch path: for the interpreter they are large, and for kernels nothing else
ELSEWHERE = {"routed_attention-blocks", "significance-large", "neighborhood_attention-tiles"}
SUITE = [case for case in [*CASES, *RELEASED] if case.op in WITH_KERNELS and str(case) not in ELSEWHERE]
# interpreted, what no released model uses is run in one precision
PAIRS = [
    (case, dtype) for case in SUITE for dtype in DTYPES if DEVICE == "cuda" or dtype.itemsize == 4 or case in RELEASED
]


@pytest.mark.parametrize(("case", "dtype"), PAIRS, ids=[f"{case}-{str(dtype)[6:]}" for case, dtype in PAIRS])
def test_error_is_at_most_twice_the_references(case, dtype):
    hold(case, "triton", dtype, DEVICE)


@pytest.mark.parametrize("case", RECORD["cases"], ids=recorded_name)
def test_neighborhood_attention_recorded(case):
    eager, got = (answers(case, impl, torch.float32, DEVICE) for impl in ("reference", "triton"))
    for name in got:
        check(name, unpack(case[name]).to(DEVICE), eager[name], got[name])


def nearest(size, window, dilation):
    """(size, size): whether position j is one of the `window` nearest to i among those that are whole steps away."""
    near = torch.zeros(size, size, dtype=torch.bool)
    for i in range(size):
        steps = [j for j in range(size) if (j - i) % dilation == 0]
        near[i, sorted(steps, key=lambda j: abs(j - i))[:window]] = True
    return near


@pytest.mark.parametrize(
    ("H", "W", "window", "dilation"), [(9, 12, (7, 7), (1, 1)), (8, 7, (3, 3), (2, 2)), (7, 9, (7, 3), (1, 3))]
)
def test_neighborhood_attention_is_full_attention_with_a_mask(H, W, window, dilation):
    """The last of these covers the map."""
    q, k, v = packed(2, H, W, 2, 8).to(DEVICE, torch.float32).unbind(3)
    bias = random(2, 2 * window[0] - 1, 2 * window[1] - 1).to(DEVICE, torch.float32)
    rows, columns = (nearest(*axis) for axis in zip((H, W), window, dilation, strict=True))
    near = (rows[:, None, :, None] & columns[None, :, None, :]).flatten(2).flatten(0, 1).to(DEVICE)
    y, x = torch.arange(H * W, device=DEVICE) // W, torch.arange(H * W, device=DEVICE) % W
    entries = [(t - t[:, None]) // d + w - 1 for t, d, w in zip((y, x), dilation, window, strict=True)]
    mask = bias[:, entries[0].where(near, 0), entries[1].where(near, 0)].masked_fill(~near, float("-inf"))
    want = F.scaled_dot_product_attention(*(t.flatten(1, 2).transpose(1, 2) for t in (q, k, v)), mask, scale=0.7)
    out = ops.neighborhood_attention(q, k, v, bias, window, dilation, 0.7, impl="triton")
    torch.testing.assert_close(out.flatten(1, 2).transpose(1, 2), want)


@pytest.mark.parametrize(("window", "dilation"), [((7, 7), 1), ((3, 3), 3), ((5, 3), (2, 1))])
def test_neighborhood_attention_sees_exactly_its_number_of_keys(window, dilation):
    H, W = 10, 12
    values = torch.eye(H * W, device=DEVICE).view(1, H, W, 1, H * W)  # the output is then the attention itself
    q, k = (random(1, H, W, 1, H * W, seed=seed).to(DEVICE, torch.float32) for seed in (1, 2))
    seen = ops.neighborhood_attention(q, k, values, None, window, dilation, impl="triton")[0, :, :, 0] > 0
    assert (seen.sum(-1) == window[0] * window[1]).all()
    assert seen.view(H * W, H * W).diagonal().all()  # itself among them


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: the interpreter has one order only")
@pytest.mark.parametrize("case", SUITE, ids=str)
def test_same_bits_twice(case):
    """No kernel adds with atomics, so nothing depends on the order in which programs run."""
    inputs = {name: t.to(DEVICE, torch.float32) for name, t in case.make().items()}
    for first, second in zip(gradients(case, inputs, "triton"), gradients(case, inputs, "triton"), strict=True):
        assert torch.equal(first, second)


def window_call(q, bias):
    return ops.window_attention(q, q, q, bias, window=(4, 4), impl="triton")


def test_second_derivative_is_refused():
    q = packed(1, 5, 6, 1, 8).select(3, 0).to(DEVICE, torch.float32).requires_grad_()
    (grad,) = torch.autograd.grad(window_call(q, None).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative: use impl='torch'"):
        grad.sum().backward()


def test_autocast_decides_the_dtype():
    q, bias = random(1, 5, 6, 1, 8).to(DEVICE, torch.float32), random(1, 7, 7).to(DEVICE, torch.float32)
    with torch.autocast(DEVICE, torch.float16):
        got, want = window_call(q, bias), ops.window_attention(q, q, q, bias, window=(4, 4), impl="torch")
    assert got.dtype == want.dtype == torch.float16
    torch.testing.assert_close(got, want, rtol=0, atol=4e-3)


def test_too_many_channels():
    q = torch.zeros(1, 4, 4, 1, 129, device=DEVICE)
    with pytest.raises(RuntimeError, match="a head has 129 channels, and this kernel takes up to 128"):
        window_call(q, None)


def test_float64_is_refused():
    with pytest.raises(RuntimeError, match=r"torch.float64, and kernels take float32"):
        window_call(random(1, 4, 4, 1, 8).to(DEVICE), None)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_captured_in_a_graph():
    q, bias = random(1, 9, 10, 2, 32).cuda().half(), random(2, 7, 7).cuda().half()
    want = window_call(q, bias)  # compiles and tunes
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = window_call(q, bias)
    graph.replay()
    assert torch.equal(got, want)
