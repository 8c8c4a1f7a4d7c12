"""Ops and models on a GPU that is not there: which tensors torch meets on the way, without a launch."""

import functools
import importlib.util

import pytest
import timm
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import zoo  # noqa: F401  registers the models
from ops import window_attention
from ops.check.cases import Case
from ops.check.tables import CASES, RELEASED, with_kernels

ONE_OF_EACH = {case.op: case for case in (*RELEASED, *CASES)}
IMPLS = ("triton", "torch", "reference") if importlib.util.find_spec("triton") else ("torch", "reference")
MODELS = ("maxvit_t", "dinat_m", "biformer_t", "litv2_s", "gcvit_xxt", "davit_t", "sgformer_s", "stvit_s")


@functools.cache
def asks_for_a_driver() -> bool:
    """Whether this version of torch cannot do without one even where nothing is computed."""
    with FakeTensorMode():
        x = torch.empty(1, 1, 8, 8, device="cuda")
        try:
            torch.nn.functional.scaled_dot_product_attention(x, x, x)
            x[..., torch.tensor([0], device="cuda")].sum()
        except RuntimeError as error:
            if "driver" not in str(error):
                raise
            return True
    return False


@pytest.fixture
def gpu():
    if asks_for_a_driver():
        pytest.skip(f"torch {torch.__version__} asks a driver about tensors that are not there")
    torch.compiler.reset()
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield torch.device("cuda")


def pairs():
    for case in ONE_OF_EACH.values():
        for impl in IMPLS:
            if impl != "triton" or with_kernels(case):
                yield pytest.param(case, impl, id=f"{case.op}-{impl}")


@pytest.mark.parametrize("case, impl", list(pairs()))
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "fullgraph"])
def test_an_op_stays_on_its_device(case: Case, impl: str, compiled: bool, request):
    made = case.make()
    expected = case.call(impl="reference", **made)
    device = request.getfixturevalue("gpu")
    inputs = {name: torch.empty(t.shape, dtype=torch.bfloat16, device=device) for name, t in made.items()}

    def call(**given):
        return case.call(impl=impl, **given)

    out = (torch.compile(call, fullgraph=True, backend="eager") if compiled else call)(**inputs)
    assert (out.device.type, out.shape, out.dtype) == ("cuda", expected.shape, torch.bfloat16)


@pytest.mark.skipif(len(IMPLS) < 3, reason="the package triton is not installed")
def test_tensors_are_on_one_device(gpu):
    q, bias = torch.empty(1, 8, 8, 2, 32, device=gpu), torch.empty(2, 7, 7)
    with pytest.raises(ValueError, match="the map and bias are on cuda:0, cpu: expected one device"):
        window_attention(q, q, q, bias, (4, 4), impl="triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [32, 128])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "fullgraph"])
def test_heads_of_many_channels(compiled, channels, dtype, gpu):
    """Whether kernels fit the shared memory of a GPU cannot be asked where there is none, nor by a compiler."""
    q = torch.empty(1, 8, 8, 2, channels, dtype=dtype, device=gpu)

    def call(q):
        return window_attention(q, q, q, None, (4, 4))

    out = (torch.compile(call, fullgraph=True, backend="eager") if compiled else call)(q)
    assert (out.device.type, out.shape, out.dtype) == ("cuda", q.shape, dtype)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_stays_on_its_device(name, gpu):
    with gpu:
        model = timm.create_model(name, num_classes=7).eval()
        images = torch.empty(2, 3, 224, 224)
    assert {p.device.type for p in model.parameters()} == {"cuda"}
    out = model(images)
    assert (out.device.type, out.shape) == ("cuda", (2, 7))


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_one_graph(name, gpu):
    with gpu:
        model = timm.create_model(name, num_classes=7)
        images = torch.empty(2, 3, 224, 224)
    out = torch.compile(model, fullgraph=True, backend="eager")(images)
    assert (out.device.type, out.shape) == ("cuda", (2, 7))
