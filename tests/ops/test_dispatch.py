"""Which implementation runs, and what is said when one cannot."""

from contextlib import nullcontext
from threading import Event, Thread
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import forward_ad

import ops
from ops import dispatch
from ops.check.cases import packed, random
from ops.dispatch import SharedMemoryError, choose

BOTH, ALL = ("torch", "reference"), ("triton", "torch", "reference")
CPU = torch.zeros(1)
GPU = SimpleNamespace(
    is_cuda=True, is_cpu=False, is_meta=False, dtype=torch.bfloat16, device=torch.device("cuda"), shape=(1, 32)
)


def test_auto_takes_the_best_that_runs(monkeypatch):
    monkeypatch.setattr(dispatch, "HAS_TRITON", True)
    assert choose("auto", GPU, op="op", has=ALL) == "triton"
    assert choose("auto", CPU, op="op", has=ALL) == "torch"
    assert choose("auto", SimpleNamespace(**vars(GPU) | {"dtype": torch.float64}), op="op", has=ALL) == "torch"
    assert choose("auto", GPU, op="op", has=BOTH) == "torch"
    assert choose("auto", GPU, op="op", has=("reference",)) == "reference"
    monkeypatch.setattr(dispatch, "HAS_TRITON", False)
    assert choose("auto", GPU, op="op", has=ALL) == "torch"


def test_argument_then_context_then_variable(monkeypatch):
    monkeypatch.setenv("ZOO_ATTENTION", "reference")
    assert choose("auto", CPU, op="op", has=BOTH) == "reference"
    assert choose("torch", CPU, op="op", has=BOTH) == "torch"
    with ops.implementation("torch"):
        assert choose("auto", CPU, op="op", has=BOTH) == "torch"
        assert choose("reference", CPU, op="op", has=BOTH) == "reference"
        with ops.implementation("auto"):
            assert choose("auto", CPU, op="op", has=BOTH) == "reference"
    assert choose("auto", CPU, op="op", has=BOTH) == "reference"


def test_context_ends_with_an_error_inside():
    with pytest.raises(KeyError), ops.implementation("reference"):
        raise KeyError
    assert choose("auto", CPU, op="op", has=BOTH) == "torch"


def test_contexts_of_threads_end_in_any_order():
    other, ended, seen = Event(), Event(), []

    def inside():
        with ops.implementation("reference"):
            other.set()
            ended.wait()
            seen.append(choose("auto", CPU, op="op", has=BOTH))

    thread = Thread(target=inside)
    with ops.implementation("torch"):
        thread.start()
        other.wait()
    ended.set()
    thread.join()
    assert seen == ["reference"] and choose("auto", CPU, op="op", has=BOTH) == "torch"


def test_settings_reach_the_ops(monkeypatch, marked_reference):
    q, k, v = packed(1, 9, 9, 2, 8).float().unbind(3)
    bias = random(2, 7, 7).float()
    run = {impl: ops.window_attention(q, k, v, bias, window=(4, 4), impl=impl) for impl in BOTH}
    assert not torch.equal(run["torch"], run["reference"])
    assert torch.equal(ops.window_attention(q, k, v, bias, window=(4, 4)), run["torch"])
    with ops.implementation("reference"):
        assert torch.equal(ops.window_attention(q, k, v, bias, window=(4, 4)), run["reference"])
    monkeypatch.setenv("ZOO_ATTENTION", "reference")
    assert torch.equal(ops.window_attention(q, k, v, bias, window=(4, 4)), run["reference"])


def test_unknown_names_are_named(monkeypatch):
    with pytest.raises(ValueError, match=r"op's impl is 'cuda': expected one of 'auto', 'triton', 'torch', 'ref"):
        choose("cuda", CPU, op="op", has=BOTH)
    with pytest.raises(ValueError, match=r"ops.implementation is 'fast'"), ops.implementation("fast"):
        pass
    monkeypatch.setenv("ZOO_ATTENTION", "tritn")
    with pytest.raises(ValueError, match="ZOO_ATTENTION is 'tritn'"):
        choose("auto", CPU, op="op", has=BOTH)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("op", [ops.window_attention, ops.neighborhood_attention])
def test_a_trace_does_not_depend_on_gradients(op):
    """By torch's own check, which runs without them, where other operators are the fastest."""

    def call(qkv, bias, k0, v0):
        return op(*qkv.unbind(3), bias, window=(5, 5), outside=(k0, v0))

    given = packed(1, 8, 9, 2, 8), random(2, 9, 9), random(2, 8, seed=1), random(2, 8, seed=2)
    given = tuple(t.float().requires_grad_() for t in given)
    traced = torch.jit.trace(call, given)
    torch.testing.assert_close(traced(*given), call(*given))
    got, want = (torch.autograd.grad(f(*given).square().sum(), given) for f in (traced, call))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_what_is_named_never_falls_back(monkeypatch):
    with pytest.raises(RuntimeError, match="op has no 'triton' implementation in this version, only 'torch'"):
        choose("triton", GPU, op="op", has=BOTH)
    with pytest.raises(RuntimeError, match="the tensors are on 'cpu'"):
        choose("triton", CPU, op="op", has=ALL)
    with pytest.raises(RuntimeError, match=r"the tensors are torch.float64"):
        choose("triton", SimpleNamespace(**vars(GPU) | {"dtype": torch.float64}), op="op", has=ALL)
    monkeypatch.setattr(dispatch, "HAS_TRITON", False)
    with pytest.raises(RuntimeError, match="the package triton is not installed"):
        choose("triton", GPU, op="op", has=ALL)
    q, k, v = packed(1, 4, 4, 1, 4).unbind(3)
    with ops.implementation("triton"), pytest.raises(RuntimeError, match="window_attention was asked for its 'triton'"):
        ops.window_attention(q, k, v, None, window=(2, 2))
    with ops.implementation("triton"), pytest.raises(RuntimeError, match="pooled_attention has no 'triton'"):
        ops.pooled_attention(q, k, v)
    q = packed(1, 16, 16, 1, 4)[:, :, :, 0]
    with pytest.raises(RuntimeError, match="kernel but a window has 256 tokens, and this kernel takes up to 128: use"):
        ops.significance(q, q, 16, impl="triton")
    assert choose("auto", GPU, op="op", has=ALL, unfit="it is large") == "torch"


def test_tangents_go_by_the_reference_or_nowhere(monkeypatch):
    """A kernel would lose them without a word."""
    monkeypatch.setattr(dispatch, "HAS_TRITON", True)

    def asked(impl):
        return lambda x: x * ALL.index(choose(impl, GPU, op="op", has=ALL))

    reference = ALL.index("reference")
    assert torch.func.jvp(asked("auto"), (CPU,), (torch.ones(1),))[1] == reference
    assert torch.func.jacfwd(asked("auto"))(CPU) == torch.vmap(asked("auto"))(torch.ones(1, 1)) == reference
    with forward_ad.dual_level():
        assert choose("auto", GPU, op="op", has=ALL) == "reference"
        assert choose("torch", GPU, op="op", has=ALL) == "torch"
        with pytest.raises(RuntimeError, match=r"'triton' kernel, which does not run inside .* impl='auto' or 're"):
            choose("triton", GPU, op="op", has=ALL)
    assert choose("auto", GPU, op="op", has=ALL) == "triton"
    for follow in (torch.func.grad(lambda x: asked("triton")(x).sum()), torch.vmap(asked("triton"))):
        with pytest.raises(RuntimeError, match=r"inside torch.func's transforms"):
            follow(CPU)
    monkeypatch.setenv("ZOO_ATTENTION", "triton")
    for named in ("auto", "triton"):
        with pytest.raises(RuntimeError, match=r"inside torch.func's transforms"):
            torch.func.jvp(asked(named), (CPU,), (torch.ones(1),))


@pytest.mark.parametrize(
    ("dtype", "channels", "given", "runs"),
    [
        (torch.float32, 32, 64, "triton"),
        (torch.float32, 64, 64, "torch"),
        (torch.float32, 64, 99, "triton"),
        (torch.float32, 65, 99, "torch"),
        (torch.bfloat16, 64, 64, "triton"),
        (torch.bfloat16, 128, 64, "torch"),
        (torch.bfloat16, 128, 99, "triton"),
    ],
)
def test_a_gpu_with_little_shared_memory(monkeypatch, dtype, channels, given, runs):
    monkeypatch.setattr(dispatch, "HAS_TRITON", True)
    monkeypatch.setattr(dispatch, "_shared_memory", lambda device: given)
    x = SimpleNamespace(**vars(GPU) | {"dtype": dtype, "shape": (1, channels)})
    assert choose("auto", x, op="op", has=ALL) == runs
    assert choose("auto", x, op="op", has=ALL, channels=None) == "triton"
    if runs == "torch":
        said = rf"a head of {channels} channels in {dtype} needs .* program {given}:"
        with pytest.raises(SharedMemoryError, match=said):
            choose("triton", x, op="op", has=ALL)


def test_wide_heads_in_float32_do_not_fit_amd_gpus(monkeypatch):
    monkeypatch.setattr(dispatch, "HAS_TRITON", True)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    for dtype, channels, runs in ((torch.float16, 128, True), (torch.float32, 64, True), (torch.float32, 65, False)):
        x = SimpleNamespace(**vars(GPU) | {"dtype": dtype, "shape": (1, channels)})
        with nullcontext() if runs else pytest.raises(SharedMemoryError, match=r"needs 112 KiB .* program 64:"):
            assert choose("triton", x, op="op", has=ALL) == "triton"


@pytest.mark.parametrize(("capability", "runs"), [((7, 5), "torch"), ((8, 0), "triton"), ((12, 0), "triton")])
def test_kernels_are_for_gpus_that_they_were_made_for(monkeypatch, capability, runs):
    monkeypatch.setattr(dispatch, "HAS_TRITON", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert choose("auto", GPU, op="op", has=ALL) == runs
    assert choose("triton", GPU, op="op", has=ALL) == "triton"


@pytest.mark.parametrize(
    ("channels", "how", "runs"), [(64, "ieee", "triton"), (65, "ieee", "torch"), (128, "tf32", "triton")]
)
def test_wide_heads_in_exact_float32_run_no_kernel_unless_named(monkeypatch, channels, how, runs):
    """It would hold its tiles in memory, for lack of registers."""
    monkeypatch.setattr(dispatch, "HAS_TRITON", True)
    monkeypatch.setattr(dispatch, "_shared_memory", lambda device: 227)
    monkeypatch.setattr(dispatch, "precision", lambda: how)
    x = SimpleNamespace(**vars(GPU) | {"dtype": torch.float32, "shape": (1, channels)})
    assert choose("auto", x, op="op", has=ALL) == runs
    assert choose("auto", x, op="op", has=ALL, channels=None) == choose("triton", x, op="op", has=ALL) == "triton"


@pytest.mark.parametrize(("channels", "given", "runs"), [(64, 99, "torch"), (64, 163, "triton"), (128, 163, "torch")])
@pytest.mark.parametrize("how", ["tf32", "tf32x3"])
def test_tf32_takes_more_shared_memory(monkeypatch, how, channels, given, runs):
    monkeypatch.setattr(dispatch, "HAS_TRITON", True)
    monkeypatch.setattr(dispatch, "_shared_memory", lambda device: given)
    monkeypatch.setattr(dispatch, "precision", lambda: how)
    x = SimpleNamespace(**vars(GPU) | {"dtype": torch.float32, "shape": (1, channels)})
    assert choose("auto", x, op="op", has=ALL) == runs


def test_shared_memory_is_asked_for_in_autocasts_precision(monkeypatch):
    monkeypatch.setattr(dispatch, "HAS_TRITON", True)
    monkeypatch.setattr(dispatch, "_shared_memory", lambda device: 99)
    x = SimpleNamespace(**vars(GPU) | {"dtype": torch.float32, "shape": (1, 128)})
    assert choose("auto", x, op="op", has=ALL) == "torch"
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")  # true of a GPU that is there
    assert choose("auto", x, op="op", has=ALL) == "triton"
