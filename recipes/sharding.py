"""FSDP2: each device keeps a part of every parameter, its gradient and moments; blocks are gathered while they run.

https://arxiv.org/abs/2304.11277, and torch.distributed.fsdp.fully_shard, which is its second version.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from recipes import distributed, optim
from recipes.sharded_reader import YOUNGER_OPTIONS
from zoo.backbone import Backbone


def shard(model: nn.Module, device: str, amp: torch.dtype | None) -> None:
    """Shard the parameters over all processes, in place, block by block; buffers stay whole on each.

    amp  parameters are gathered in this precision and computed with under autocast; gradients are summed in float32.
         Batch norms are gathered in float32, as their statistics are, and on a CPU so are layer norms.
    """
    mesh = init_device_mesh(device, (distributed.size(),))
    policy = MixedPrecisionPolicy(param_dtype=amp, reduce_dtype=torch.float32, cast_forward_inputs=False)
    model.to(memory_format=torch.contiguous_format)  # FSDP2 takes no channels-last parameters
    for module in [*blocks(model), model]:
        norms = [] if amp is None else [norm for norm in module.modules() if _is_exact_norm(norm, device)]
        if norms:
            fully_shard(norms, mesh=mesh, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))
        fully_shard(module, mesh=mesh, mp_policy=policy)


def is_sharded(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)


@contextmanager
def kept_whole(model: nn.Module) -> Iterator[None]:
    """Gather all parameters of a sharded model on every device, so that no forward pass waits for another process.

    In an evaluation the number of forward passes depends on the sizes and windows of a process's images. All processes
    must enter and leave this together.
    """
    parts = [module for module in model.modules() if is_sharded(module)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(part is not model, recurse=False)  # by default the outermost keeps its own
            part.reshard()


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor, gathered on all devices; any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered(model: nn.Module) -> dict[str, Tensor]:
    """The whole state dict of a sharded model, on rank 0's CPU and empty elsewhere. All processes must call this."""
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def tree(models: dict[str, nn.Module], optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
    """State dicts by name, and that of `optimizer`, which steps the first model; each process has its part of a tensor.

    Keys are names of parameters, so that any number of processes, including one, can read them. An optimiser without
    state is given one to be loaded into: torch takes a step with it, which must not become part of the training.
    """
    states: dict[str, Any] = {name: get_model_state_dict(model) for name, model in models.items()}
    if optimizer is not None:
        states["optimizer"] = get_optimizer_state_dict(next(iter(models.values())), optimizer)
    return states


def load_tree(states: dict[str, Any], models: dict[str, nn.Module], optimizer: torch.optim.Optimizer) -> None:
    """Load what `tree` returned, except for `optim.LOOPS`."""
    for name, model in models.items():
        set_model_state_dict(model, states[name])
    if "optimizer" in states:
        state = states["optimizer"]
        state = {**state, "param_groups": optim.with_own_loops(optimizer, state["param_groups"])}
        set_optimizer_state_dict(next(iter(models.values())), optimizer, state)


def load_whole(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Load a whole state dict, which every process has read, into a model, sharded or not."""
    if is_sharded(model):
        set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True))
    else:
        model.load_state_dict(state)


def load_whole_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load an optimiser's whole state dict, with parameters numbered by torch, into that of a sharded model.

    `optim.LOOPS` stay as they are.
    """
    saved = {key for group in state["param_groups"] for key in group}
    for group in optimizer.param_groups:  # in which torch keeps what was not saved
        for option in set(YOUNGER_OPTIONS) - saved:
            group.pop(option, None)
    called = {parameter: name for name, parameter in model.named_parameters()}
    names = [called[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    named = {
        "state": {names[index]: moments for index, moments in state["state"].items()},
        "param_groups": [
            {**group, "params": [names[index] for index in group["params"]]}
            for group in optim.with_own_loops(optimizer, state["param_groups"])
        ],
    }
    set_optimizer_state_dict(model, optimizer, named, options=StateDictOptions(full_state_dict=True))


def blocks(model: nn.Module) -> list[nn.Module]:
    """The modules that are gathered one at a time: the blocks of our models, the repeated parts of others."""
    if isinstance(model, Backbone):
        return [block for stage in model.stages for block in stage.blocks]
    return list(_repeated(model))


def _repeated(module: nn.Module) -> Iterator[nn.Module]:
    """The elements of the innermost lists whose elements are made of several modules with parameters.

    ResNet's bottlenecks, Swin's and ViT's blocks; not the convolution and norm of a shortcut.
    """
    for child in module.children():
        inner = list(_repeated(child))
        if inner:
            yield from inner
        elif isinstance(module, (nn.Sequential, nn.ModuleList)) and _is_composite(child):
            yield child


def _is_composite(module: nn.Module) -> bool:
    return any(next(child.parameters(), None) is not None for child in module.children())


def _is_exact_norm(module: nn.Module, device: str) -> bool:
    """Whether a norm, not sharded yet, has weights that must be gathered in float32."""
    if isinstance(module, nn.LayerNorm):  # on GPUs autocast converts what was gathered
        needed = module.elementwise_affine and device == "cpu"
    else:
        needed = isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine
    return needed and not is_sharded(module)
