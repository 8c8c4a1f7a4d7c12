"""The Triton kernels: on a GPU where there is one, else under Triton's interpreter (test_interpreter.py)."""

import os

import pytest
import torch
from law import hold
from op_cases import (
    CASES,
    channel_case,
    gradients,
    packed,
    random,
    reallocate_case,
    routed_case,
    significance_case,
    super_case,
    window_case,
)

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
    window_case("narrow", 5, 9, (4, 4), D=17, heads=1, B=1),
]
# cases about blocks of the torch path: for the interpreter they are large, and for kernels nothing else
ELSEWHERE = {"routed_attention-blocks", "significance-large"}
SUITE = [case for case in [*CASES, *RELEASED] if case.op in WITH_KERNELS and str(case) not in ELSEWHERE]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", SUITE, ids=str)
def test_error_is_at_most_twice_the_references(case, dtype):
    hold(case, "triton", dtype, DEVICE)


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
