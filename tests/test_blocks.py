"""What the blocks refuse in every family, before any layer is built of it."""

import pytest
import torch

from builds import every_small
from families import SMALL
from zoo.backbone import Head
from zoo.blocks import check_heads, drop_path_rates
from zoo.registry import class_of, variants


def build(name, **kwargs):
    return class_of(name)(**variants()[name] | SMALL[name] | kwargs)


@pytest.mark.parametrize(
    ("depths", "says"),
    [
        ((1, 1, 0, 1), r"depths is \(1, 1, 0, 1\): expected at least one block per stage"),
        ([1, -1, 1, 1], r"depths is \[1, -1, 1, 1\]: expected at least one block per stage"),
        ((1, 1, 1.5, 1), r"depths is \(1, 1, 1.5, 1\): expected at least one block per stage"),
        (4, "depths is 4.*: expected one number per stage in each"),
        ((), r"depths is \(\).*: expected one number per stage in each"),
    ],
)
@every_small
def test_depths(name, depths, says):
    with pytest.raises(ValueError, match=says):
        build(name, depths=depths)


@pytest.mark.parametrize(
    ("dims", "says"),
    [
        (64, "dims is 64, .*: expected one number per stage in each"),
        ((32, 64, 0, 64), r"dims is \(32, 64, 0, 64\): expected at least one channel per stage"),
        ((32, 64, 64.0, 64), r"dims is \(32, 64, 64.0, 64\): expected at least one channel per stage"),
    ],
)
@pytest.mark.parametrize("name", [name for name, args in SMALL.items() if "dims" in args])
def test_dims(name, dims, says):
    with pytest.raises(ValueError, match=says):
        build(name, dims=dims)


@pytest.mark.parametrize("rate", [1.5, -1, float("nan"), "0.1"])
@pytest.mark.parametrize("key", ["drop_rate", "drop_path_rate"])
@every_small
def test_drop_rates(name, key, rate):
    with pytest.raises(ValueError, match=rf"^{key} is .*: expected a probability, from 0 to 1"):
        build(name, **{key: rate})


def test_a_whole_drop_rate_scripts():
    torch.jit.script(Head(4, 2, drop_rate=0))


def test_a_drop_path_rate_of_one():
    assert drop_path_rates(1, [1, 2]) == [[0], [0.5, 1]]


@pytest.mark.parametrize("heads", [0, 2.0])
def test_heads(heads):
    with pytest.raises(ValueError, match=f"dim 64 does not divide into {heads} heads"):
        check_heads(64, heads)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"img_size": 0}, "img_size is 0: expected pixels a side"),
        ({"in_chans": 0}, "in_chans is 0: expected the number of channels of an image, 1 or more"),
        ({"in_chans": -1}, "in_chans is -1: expected the number of channels of an image, 1 or more"),
        ({"num_classes": -5}, "num_classes is -5: expected the number of classes"),
        ({"num_classes": float("nan")}, "num_classes is nan: expected the number of classes"),
    ],
)
@every_small
def test_images_and_classes(name, given, says):
    with pytest.raises(ValueError, match=says):
        build(name, **given)
