"""Small models of every family, and files of their weights."""

import pytest
import torch
from timm.models import create_model

import zoo
from families import CROPPED, ISOTROPIC, ROUNDED_DOWN, SMALL
from zoo.checkpoint import load_checkpoint
from zoo.export import SIZES_SINCE
from zoo.registry import class_of, variants
from zoo.releases import RELEASES

NAME = "maxvit_t"
FAMILIES = {class_of(name).__name__: class_of(name) for name in variants()}
# where a model may call an op
MODULES = {family.__module__ for family in FAMILIES.values()} | {"zoo.blocks.attention"}


def small(name, **kwargs):
    torch.manual_seed(0)
    return create_model(name, **{"num_classes": 7, **SMALL[name], **kwargs})


def bare(name, **kwargs):
    """A small model as its class makes it, without timm."""
    return class_of(name)(**variants()[name] | SMALL[name] | kwargs)


def smallest(family):
    """The released variant of a class with the fewest parameters."""
    released = {release.model for release in RELEASES}
    names = [name for name in variants() if class_of(name) is family and name in released]
    return min(names, key=lambda name: sum(p.numel() for p in create_model(name, device="meta").parameters()))


def trained(model):
    """Weights and statistics away from their first values, so that nothing is hidden by a zero or a one."""
    torch.manual_seed(1)
    for name, tensor in model.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2)
        elif tensor.is_floating_point():
            tensor.add_(0.1 * torch.randn_like(tensor))
    return model.eval()


every_small = pytest.mark.parametrize("name", SMALL)
since_sizes = pytest.mark.skipif(torch.__version__ < SIZES_SINCE, reason=f"torch {SIZES_SINCE} pools maps of any size")


def map_side(name, side, halvings):
    """Pixels along a side of the map after a stem of stride 4 and so many halvings."""
    if name in ISOTROPIC:
        return -(-side // 16)
    if name in CROPPED:
        return side // 4 >> halvings
    side = -(-side // 4)
    return side >> halvings if name in ROUNDED_DOWN else -(-side >> halvings)


def state_of(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(model, state):
    now = model.state_dict()
    return now.keys() == state.keys() and all(torch.equal(now[k], state[k]) for k in now)


def timm_state(model):
    (layout,) = zoo.layouts.LAYOUTS[type(model).__name__]
    return layout.to_theirs(model.state_dict())


def without(state, *prefixes):
    return {key: value for key, value in state.items() if not key.startswith(prefixes)}


def refused(path, match, model=None):
    model = small(NAME) if model is None else model
    before = state_of(model)
    with pytest.raises(zoo.CheckpointError, match=match) as error:
        load_checkpoint(model, path)
    assert same(model, before)
    return str(error.value)
