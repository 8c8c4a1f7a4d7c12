"""What the blocks refuse in every family, before any layer is built of it."""

import pytest

from families import SMALL
from test_models import every_small
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
@every_small
def test_drop_path_rates(name, rate):
    with pytest.raises(ValueError, match=r"drop_path_rate is .*: expected a probability, from 0 to 1"):
        build(name, drop_path_rate=rate)


def test_a_drop_path_rate_of_one():
    assert drop_path_rates(1, [1, 2]) == [[0], [0.5, 1]]


@pytest.mark.parametrize("heads", [0, 2.0])
def test_heads(heads):
    with pytest.raises(ValueError, match=f"dim 64 does not divide into {heads} heads"):
        check_heads(64, heads)


@every_small
def test_images(name):
    with pytest.raises(ValueError, match="img_size is 0: expected pixels a side"):
        build(name, img_size=0)
