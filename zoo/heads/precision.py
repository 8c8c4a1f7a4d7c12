"""Where mixed precision ends: positions in an image need more digits than bfloat16 has, which above 512 resolves only
every fourth pixel."""

from typing import Any

import torch
from torch import Tensor, nn

HALVES = (torch.float16, torch.bfloat16)


def predicts_in_single(*modules: nn.Module | None) -> None:
    """Make these modules return float32 where they compute in half precision; None is skipped."""
    for module in modules:
        if module is not None:
            module.register_forward_hook(_raised)


def _raised(module: nn.Module, args: Any, outputs: Any) -> Any:
    return _raise(outputs)


def _raise(outputs: Any) -> Any:
    """A tensor, or lists and dicts of tensors."""
    if isinstance(outputs, Tensor):
        return outputs.float() if outputs.dtype in HALVES else outputs
    if isinstance(outputs, dict):
        return {key: _raise(value) for key, value in outputs.items()}
    return type(outputs)(map(_raise, outputs))
