"""The calls of `ops` in a forward pass, in order: their arguments, results and the modules that made them."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from timm.models import get_notrace_functions, get_notrace_modules
from torch import Tensor, fx, nn
from torchvision.models.feature_extraction import NodePathTracer

import ops

from ..checkpoint import unwrapped

OPS = {getattr(ops, name) for name in ops.__all__} - {ops.unpack}  # which computes nothing


@dataclass(frozen=True)
class Call:
    """One call of an op.

    op         the function of `ops`
    module     dotted name of the module that called it, as in `model.get_submodule`
    arguments  by the names of the op's signature, including defaults
    result     what it returned
    """

    op: Callable[..., Any]
    module: str
    arguments: dict[str, Any]
    result: Any

    @property
    def stage(self) -> int:
        return int(self.module.split(".")[1])

    @property
    def block(self) -> int:
        return int(self.module.split(".")[3])

    def again(self, **changed: Any) -> Any:
        """The op's result with some arguments changed."""
        return self.op(**{**self.arguments, **changed})

    def with_arguments(self, **changed: Any) -> "Call":
        return replace(self, arguments={**self.arguments, **changed})


def record(model: nn.Module, x: Tensor) -> list[Call]:
    """The calls of ops in a forward pass of `model` on images `x`, (B, C, H, W), in evaluation mode.

    The model, which may be compiled or wrapped as for `show.pictures`, is traced by torch.fx, which sees every op as a
    single call, and its graph is run: the same operators on the same parameters as in the model's own forward pass. No
    hooks or anything else remain in the model.
    """
    model = unwrapped(model)
    tracer = NodePathTracer(
        leaf_modules=tuple(get_notrace_modules()), autowrap_functions=tuple(get_notrace_functions())
    )
    with evaluating(model), torch.no_grad():
        graph = fx.GraphModule(model, tracer.trace(model))
        noted = _Noted(graph, tracer.node_to_qualname)
        noted.run(x)
    return noted.calls


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards each module is in its previous mode."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


class _Noted(fx.Interpreter):
    """Runs a graph and records the calls of ops."""

    def __init__(self, graph: fx.GraphModule, paths: dict[fx.Node, str]) -> None:
        super().__init__(graph)
        self.paths = paths
        self.calls: list[Call] = []

    def run_node(self, n: fx.Node) -> Any:
        if n.op != "call_function" or n.target not in OPS:
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        bound = inspect.signature(n.target).bind(*args, **kwargs)
        bound.apply_defaults()
        result = n.target(*args, **kwargs)
        self.calls.append(Call(n.target, self.paths[n].rpartition(".")[0], dict(bound.arguments), result))
        return result
