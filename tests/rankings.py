"""Rankings of one run of a model, handed to another.

Rounding swaps what ranks nearly alike, and one swap moves everything after it. So what runs in reduced precision, or
by another compiler, is compared by the rankings that the same model makes in float64.
"""

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

# class -> the function that ranks, by its name in the class's module
RANKERS = {
    "BiFormer": "route_regions",
    "BiFormerSTL": "route_regions",
    "BiFormerSTLNchw": "route_regions",
    "SGFormer": "rank_tokens",
}


class Ranked(nn.Module):
    """A model that does not rank: what its ranking function returns, call by call, is an input."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.train(model.training)

    def forward(self, x: Tensor, rankings: list[Tensor]) -> Tensor:
        with given(self.model, rankings):
            return self.model(x)


def ranks(model: nn.Module) -> bool:
    return type(model).__name__ in RANKERS


def given(model: nn.Module, rankings: list[Tensor]) -> AbstractContextManager[None]:
    """Within this context the ranking function of the model returns these, call by call."""
    left = iter(rankings)
    return ranking(model, lambda *args: next(left))


@torch.no_grad()
def rankings(model: nn.Module, x: Tensor) -> list[Tensor]:
    """What the model's ranking function returns for `x` in float64, call by call; empty where it has none."""
    if not ranks(model):
        return []
    rank, made = getattr(sys.modules[type(model).__module__], RANKERS[type(model).__name__]), []

    def recorded(*args):
        made.append(rank(*args))
        return made[-1]

    with ranking(model, recorded):
        copy.deepcopy(model).double()(x.double())
    return made


@contextmanager
def ranking(model: nn.Module, function: Callable[..., Tensor]) -> Iterator[None]:
    """Within this context models of this class rank by `function`."""
    if not ranks(model):
        yield
        return
    module, name = sys.modules[type(model).__module__], RANKERS[type(model).__name__]
    usual = getattr(module, name)
    setattr(module, name, function)
    try:
        yield
    finally:
        setattr(module, name, usual)
