"""What the blocks refuse in every family, before any layer is built of it."""

import pytest
import torch

from builds import bare, every_small
from families import SMALL
from zoo.backbone import Head
from zoo.blocks import check_heads, drop_path_rates


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
        bare(name, depths=depths)


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
        bare(name, dims=dims)


@pytest.mark.parametrize("rate", [1.5, -1, float("nan"), "0.1"])
@pytest.mark.parametrize("key", ["drop_rate", "drop_path_rate"])
@every_small
def test_drop_rates(name, key, rate):
    with pytest.raises(ValueError, match=rf"^{key} is .*: expected a probability, from 0 to 1"):
        bare(name, **{key: rate})


def test_a_whole_drop_rate_scripts():
    torch.jit.script(Head(4, 2, drop_rate=0))


def test_a_drop_path_rate_of_one():
    assert drop_path_rates(1, [1, 2]) == [[0], [0.5, 1]]


@pytest.mark.parametrize("heads", [0, 2.0])
def test_heads(heads):
    with pytest.raises(ValueError, match=f"dim 64 does not divide into {heads} heads"):
        check_heads(64, heads)
