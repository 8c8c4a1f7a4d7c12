"""Initial values of weights."""

import pytest
import torch
from timm.models import create_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from builds import NAME, every_small, small
from ranks import on_ranks
from zoo.blocks import init_normal


def test_no_weight_is_far_from_the_others():
    """timm's truncated normal has a few infinite values in so many, which are cut off where it is truncated."""
    torch.manual_seed(1)  # draws such values
    weights = torch.empty(2**25)
    init_normal(weights)
    assert weights.abs().max() <= 0.12
    assert weights.std() == pytest.approx(0.02, rel=1e-3) and abs(weights.mean()) < 1e-4


@every_small
def test_a_model_from_the_meta_device_starts_as_a_new_one(name):
    one, other = small(name).state_dict(), create(name, seed=1).state_dict()
    model = small(name, device="meta").to_empty(device="cpu")
    for tensor in model.state_dict().values():
        tensor.fill_(float("nan") if tensor.is_floating_point() else -1)
    torch.manual_seed(2)
    model.init_weights()
    for key, value in model.state_dict().items():
        if torch.equal(one[key], other[key]):  # zeros, ones, positions, statistics
            assert torch.equal(value, one[key]), key
        else:
            assert value.isfinite().all() and not torch.equal(value, one[key]), key
            if value.numel() >= 64:
                error = 8 * one[key].std() / value.numel() ** 0.5  # of statistics of so many values
                assert abs(value.mean() - one[key].mean()) < error, key
                assert abs(value.std() - one[key].std()) < error, key


def create(name, seed):
    model = small(name)
    torch.manual_seed(seed)
    model.init_weights()
    return model


@pytest.mark.parametrize("place", ["device", "context"])
def test_weights_on_the_meta_device_are_refused(tmp_path, place):
    torch.save(small(NAME).state_dict(), tmp_path / "weights.pth")
    given = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(tmp_path / "weights.pth")}}
    with pytest.raises(ValueError, match="pretrained=True on the meta device, without memory for weights"):
        if place == "device":
            small(NAME, device="meta", **given)
        else:
            with torch.device("meta"):
                create_model(NAME, **given)


def test_a_device_by_its_number():
    """The first one too: without a GPU that is an error, not the CPU."""
    if torch.cuda.is_available():
        assert next(small(NAME, device=0).parameters()).device == torch.device("cuda", 0)
    else:
        with pytest.raises((AssertionError, RuntimeError)):
            small(NAME, device=0)


def positions_of_shards():
    model = small("sgformer_b", device="meta")
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    model.to_empty(device="cpu").init_weights()
    assert all(parameter.full_tensor().isfinite().all() for parameter in model.parameters())
    return model.stem.position.table.full_tensor().tolist()


def test_a_sharded_model_is_initialised():
    assert on_ranks(2, positions_of_shards) == [small("sgformer_b").stem.position.table.tolist()] * 2
