"""Every optimiser of timm's can be interrupted."""

import json

import pytest
import torch
from timm.optim import list_optimizers

from recipes import config, optim
from recipes.packing import pack, unpack

# Apex, bitsandbytes, and what needs second derivatives
NOT_HERE = ("fused", "bnb", "adahessian")


def tiny():
    """Moments of a weight with other strides are read from a file as contiguous ones."""
    torch.manual_seed(2)
    conv = torch.nn.Conv2d(2, 4, 2).to(memory_format=torch.channels_last)
    layers = torch.nn.Unflatten(1, (2, 2, 2)), conv, torch.nn.Flatten(), torch.nn.LayerNorm(4), torch.nn.Linear(4, 3)
    return torch.nn.Sequential(*layers)


def some_steps(model, optimizer, batches):
    torch.manual_seed(1)
    for batch in batches:
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()


def filed(state):
    """What a file gives back."""
    tensors = {}
    tree = json.loads(json.dumps(pack(state, tensors)))
    return unpack(tree, {name: tensor.clone() for name, tensor in tensors.items()})


def test_every_optimizer_goes_on_where_it_was():
    """Two steps, a file, two steps: what four steps in one go give."""
    batches = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(0))
    cfg, other = config.compose([]), []
    names = [name for name in list_optimizers() if not name.startswith(NOT_HERE)]
    assert len(names) > 50
    for name in [*names, "lookahead_adamw", "lookahead_sgd"]:
        cfg.optim.opt = name
        (whole, one), (cut, two) = ((model, optim.create(cfg, model)) for model in (tiny(), tiny()))
        some_steps(whole, one, batches[:2])
        cut.load_state_dict(whole.state_dict())
        optim.load_state(two, filed(one.state_dict()))
        some_steps(whole, one, batches[2:])
        some_steps(cut, two, batches[2:])
        if not all(map(torch.equal, whole.parameters(), cut.parameters())):
            other.append(name)
    assert other == []


@pytest.mark.parametrize("opt", ["bnbadamw", "fusedadamw", "lookahead_bnbadamw"])
def test_optimizers_that_are_not_here(opt, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(config.ConfigError, match=rf"optim\.opt={opt} is not available on this machine: CUDA required"):
        optim.create(config.compose([f"optim.opt={opt}"]), tiny())


def test_second_derivatives_are_not_taken():
    with pytest.raises(config.ConfigError, match=r"optim\.opt=adahessian needs second derivatives"):
        optim.create(config.compose(["optim.opt=adahessian"]), tiny())
