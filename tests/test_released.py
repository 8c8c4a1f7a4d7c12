"""The cases that kernels are checked with have every window, dilation and the like that a released model uses."""

import importlib
import inspect
from math import prod

import pytest
import torch

import ops
from builds import MODULES
from ops.check.tables import RELEASED, SIMILAR
from zoo.registry import class_of, variants
from zoo.releases import RELEASES


def windows(q, k, bias, window, partition, outside, **_):
    """Nothing is outside windows that divide the map: how it is cut into them then only changes addresses."""
    edge = any(side % step for side, step in zip(k.shape[1:3], window, strict=True))
    shared = q.shape != k.shape  # a query of another size is shared by all windows
    return (*window, k.shape[-1], bias is not None, shared, *([partition, outside is not None] if edge else []))


def regions(q, regions, topk, **_):
    """The queries of a tile, at most 64, of which a region may have several, determine the keys of a tile."""
    pixels = prod(side // count for side, count in zip(q.shape[1:3], regions, strict=True))
    tile = next(lanes for lanes in (16, 32, 64) if pixels <= lanes or lanes == 64)
    return topk, q.shape[-1], tile, pixels > tile


# one variant for each set of windows, dilations and channels of a head; and what releases were trained with instead
FAST = [
    *("maxvit_t", "gcvit_t", "davit_t", "nat_m", "dinat_t", "dinats_t", "nat_iso_s", "dinat_iso_s", "biformer_t"),
    *("biformer_stl", "litv2_s", "sgformer_s", "sgformer_m", "stvit_s", "stvit_b"),
    *("maxvit_t_384", "maxvit_t_512", "davit_l_384", "gcvit_l_384", "gcvit_l_512", "vitrpb_s"),
]
OTHERWISE = [release for release in RELEASES if release.arguments and release.model in variants()]
KINDS = {
    "window_attention": windows,
    "neighborhood_attention": lambda q, window, dilation, bias, **_: (widest(window), widest(dilation), q.shape[-1]),
    "routed_attention": regions,
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


def run(model, **otherwise):
    args = {**variants()[model], **otherwise}
    with torch.device("meta"), torch.no_grad():
        built = class_of(model)(**args)
        # what no window divides shows which query is shared: where the map is one window its shape does not
        for side in (args["img_size"] + 13, args["img_size"]):
            built(torch.empty(1, 3, side, side))


def check(called):
    needed = set(called)
    called.clear()
    with torch.no_grad():
        for case in (*RELEASED, *SIMILAR):
            case.call(impl="reference", **{name: t.to("meta") for name, t in case.make().items()})
    assert needed, "no op was called"
    assert not needed - called


@pytest.mark.parametrize("model", FAST)
def test_a_case_for_all_that_a_model_uses(model, called):
    run(model)
    check(called)


def test_a_case_for_all_that_a_release_uses_in_place_of_its_model(called):
    for model, arguments in {(release.model, tuple(release.arguments.items())) for release in OTHERWISE}:
        run(model, **dict(arguments))
    check(called)


@pytest.mark.slow
def test_a_case_for_all_that_any_model_uses(called):
    for model in variants():
        run(model)
    check(called)
