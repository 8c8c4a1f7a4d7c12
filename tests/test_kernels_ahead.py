"""Kernels build for GPUs that this machine does not have, and fit into their registers and shared memory."""

import os

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels cannot be compiled", allow_module_level=True)

import ops
from ops.ahead import TARGETS, compile, distinct, name, table
from ops.recording import recording
from zoo import kernels
from zoo.registry import variants

FAST = ["biformer_t", "davit_t", "maxvit_t", "nat_m", "sgformer_s", "stvit_s"]
OTHERS = sorted(set(TARGETS) - {"sm_90"})


@pytest.fixture(scope="module")
def launches():
    return distinct([launch for model in FAST for launch in kernels.launches(model, "bfloat16")])


def test_every_kernel_of_a_model_is_written_down(launches):
    found = {name(launch) for launch in launches}
    assert {"window_attention.forward_kernel", "window_attention.backward_keys_kernel"} < found
    assert {"channel_attention.gram_kernel", "super_token_attention.collect_kernel"} < found


def test_no_forward_spills(launches):
    costs = [compile(launch, "sm_90", 4) for launch in launches]
    assert all(cost.fits for cost in costs)
    assert not [cost for cost in costs if cost.spilled and "backward" not in cost.kernel], table(costs)


@pytest.mark.parametrize("target", OTHERS)
def test_other_targets(launches, target):
    """One binary of each kernel; `python -m zoo.kernels` builds them all."""
    costs = [compile(launch, target, 4) for launch in {name(launch): launch for launch in launches}.values()]
    assert all(cost.fits for cost in costs), table(costs)


@pytest.mark.slow
@pytest.mark.parametrize("model", sorted(variants()))
def test_all_kernels_of_all_models(model):
    costs = kernels.compile_models([model], ["sm_90"], kernels.DTYPES, [4, 8])
    assert all(cost.fits for cost in costs), table(costs)


def test_recording_runs_nothing():
    q = torch.empty(1, 9, 9, 2, 32, device="meta", requires_grad=True)
    with recording() as written:
        ops.window_attention(q, q, q, None, window=(7, 7)).sum().backward()
    assert [name(launch) for launch in written] == [
        "window_attention.forward_kernel",
        "window_attention.backward_keys_kernel",
    ]
    assert q.grad.shape == q.shape and q.grad.is_meta
