"""The cases that kernels are checked with have every window, dilation and the like that a released model uses."""

import importlib
import inspect

import pytest
import torch

import ops
from builds import MODULES
from ops.check.tables import RELEASED
from zoo.registry import class_of, variants

# one variant for each set of windows, dilations and channels of a head
FAST = [
    *("maxvit_t", "gcvit_t", "davit_t", "nat_m", "dinat_t", "dinats_t", "nat_iso_s", "dinat_iso_s", "biformer_t"),
    *("biformer_stl", "litv2_s", "sgformer_s", "sgformer_m", "stvit_s", "stvit_b"),
]
KINDS = {
    # a query of another size is shared by all windows
    "window_attention": lambda q, k, v, bias, window, partition, outside, **_: (
        *(tuple(window), partition, k.shape[-1], bias is not None, outside is not None),
        q.shape != k.shape,
    ),
    "neighborhood_attention": lambda q, window, dilation, bias, **_: (widest(window), widest(dilation), q.shape[-1]),
    "routed_attention": lambda q, topk, **_: (topk, q.shape[-1]),
    "channel_attention": lambda q, **_: q.shape[-1],
    "super_tokens": lambda x, cell, **_: (tuple(cell), x.shape[-1]),
    "significance": lambda q, window, **_: (window, q.shape[-1]),
    "reallocate_tokens": lambda weights, shares, **_: (tuple(weight.numel() for weight in weights), tuple(shares)),
}


def widest(axes):
    return axes if isinstance(axes, int) else max(axes)


@pytest.fixture
def called(monkeypatch):
    """What is called while the test runs, by all that decides which kernels run and how."""
    found = set()

    def noting(name, op):
        signature = inspect.signature(op)

        def wrapped(*args, **kwargs):
            given = signature.bind(*args, **kwargs)
            given.apply_defaults()
            found.add((name, KINDS[name](**given.arguments)))
            return op(*args, **kwargs)

        return wrapped

    for name in KINDS:
        op = getattr(ops, name)
        for module in [ops, *map(importlib.import_module, MODULES)]:
            if hasattr(module, name):
                monkeypatch.setattr(module, name, noting(name, op))
    return found


def run(model):
    args = variants()[model]
    with torch.device("meta"), torch.no_grad():
        # what no window divides shows which query is shared: where the map is one window its shape does not
        class_of(model)(**args)(torch.empty(1, 3, args["img_size"] + 13, args["img_size"] + 13))
        class_of(model)(**args)(torch.empty(1, 3, args["img_size"], args["img_size"]))


def check(called):
    needed = set(called)
    called.clear()
    with torch.no_grad():
        for case in RELEASED:
            case.call(impl="reference", **case.make())
    assert needed, "no op was called"
    assert not needed - called


@pytest.mark.parametrize("model", FAST)
def test_a_case_for_all_that_a_model_uses(model, called):
    run(model)
    check(called)


@pytest.mark.slow
def test_a_case_for_all_that_any_model_uses(called):
    for model in variants():
        run(model)
    check(called)
