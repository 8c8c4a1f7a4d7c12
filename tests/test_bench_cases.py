"""The calls that `ops.bench` times are those that the models make."""

import importlib
from math import prod

import pytest
import torch

import ops
from builds import MODULES
from ops.bench.cases import MODELS, SMALL, call, calls, windows
from zoo.registry import class_of, variants


def window_attention(module, q, k, v, bias, window, partition="block", scale=None, outside=None):
    assert window[0] == window[1]
    options = {"grid": partition == "grid", "bias": bias is not None, "attend_padding": outside is not None}
    # by its shape alone a shared query cannot be told where the map is one window
    return windows(sizes(k), *k.shape[3:], window[0], shared=module == "zoo.gcvit", **options)


def neighborhood_attention(module, q, k, v, bias, window, dilation, outside):
    return call("neighborhood_attention", sizes(q), *q.shape[3:], window=(window,) * 2, dilation=(dilation,) * 2)


def routed_attention(module, q, k, v, regions, topk, route, scale):
    return call("routed_attention", sizes(q), *q.shape[3:], regions=regions, topk=topk)


def channel_attention(module, q, k, v):
    return call("channel_attention", sizes(q), *q.shape[3:])


def pooled_attention(module, q, k, v):
    return call("pooled_attention", sizes(q), *q.shape[3:], keys=prod(k.shape[1:-2]))


def super_tokens(module, x, cell, iterations, differentiable):
    assert iterations == 1 and not differentiable
    return call("super_token_attention", sizes(x), 1, x.shape[3], cell=cell)


def significance(module, q, k, window=None):
    return call("significance", sizes(q), *q.shape[3:], window=window, keys=sizes(k))


def reallocate_tokens(module, x, significance, weights, biases, shares, order):
    runs = tuple(weight.numel() for weight in weights)
    return call("token_reallocation", sizes(x), 1, x.shape[3], runs=runs, shares=tuple(shares))


def sizes(x):
    return tuple(x.shape[1:3])


OPS = [
    *(window_attention, neighborhood_attention, routed_attention, channel_attention, pooled_attention),
    *(super_tokens, significance, reallocate_tokens),
]


@pytest.fixture
def made(monkeypatch):
    """The calls made while the test runs, as the table writes them."""
    found = []

    def noting(op, module):
        def wrapped(*args, **kwargs):
            found.append(op(module, *args, **kwargs))
            return getattr(ops, op.__name__)(*args, **kwargs)

        return wrapped

    for name in MODULES:
        module = importlib.import_module(name)
        for op in OPS:
            if hasattr(module, op.__name__):
                monkeypatch.setattr(module, op.__name__, noting(op, name))
    return found


IMAGES = [(name, (224, 224)) for name in MODELS]
IMAGES += [pytest.param(name, (800, 1344), marks=() if name in SMALL else pytest.mark.slow) for name in MODELS]


@pytest.mark.parametrize(("name", "image"), IMAGES)
def test_calls_are_those_of_the_model(name, image, made):
    with torch.device("meta"):
        class_of(name)(**variants()[name])(torch.empty(1, 3, *image))
    assert set(made) == set(calls(image, {name: MODELS[name]}))
