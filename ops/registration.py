"""A kernel as an operator of torch: traced without running, differentiated, and on CPUs its reference."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .launching import interpreted
from .recording import is_recording

NAMESPACE = "attention_backbones"


def register(
    name: str,
    arguments: str,
    *,
    outputs: Callable[..., tuple[Tensor, ...]],
    forward: Callable[..., tuple[Tensor, ...]],
    backward: Callable[..., Sequence[Tensor | None]] | None,
    specification: Callable[..., Tensor],
    results: int = 2,
) -> Callable[..., tuple[Tensor, ...]]:
    """The operator `attention_backbones::<name>`, and beside it `<name>_backward`, which has no derivative.

    arguments      as in an operator's schema, tensors first: "Tensor q, Tensor? bias, int[] window, float scale"
    outputs        (*arguments) -> the tensors that forward returns, not filled; the first is the result, the others are
                   what its backward needs
    forward        (*arguments) -> the same, filled
    backward       (gradient of the result, *arguments, *outputs) -> a gradient, or None, for each tensor argument; None
                   where the operator has no gradient
    specification  (*arguments) -> the result, in ordinary operators: what runs on CPU tensors, so that the operator can
                   be traced and checked there
    results        how many tensors forward returns; where it is one, the operator returns that, not a tuple
    """
    count = sum(argument.split()[0].startswith("Tensor") for argument in arguments.split(","))

    def on_cpu(*args: Any) -> tuple[Tensor, ...]:
        if interpreted():
            return forward(*args)
        # what else forward returns is of no use here: by_specification starts from the arguments
        return (specification(*args).contiguous(), *(other.zero_() for other in outputs(*args)[1:]))

    def gradients(grad: Tensor, *args: Any) -> tuple[Tensor, ...]:
        return filled(grad, backward(grad, *args))

    def by_specification(grad: Tensor, *args: Any) -> list[Tensor | None]:
        leaves = [t.detach().requires_grad_() if learned(t) else t for t in args[:count]]
        with torch.enable_grad():
            out = specification(*leaves, *args[count:])
        found = iter(torch.autograd.grad(out, [leaf for leaf in leaves if learned(leaf)], grad))
        return [next(found) if learned(leaf) else None for leaf in leaves]

    def filled(grad: Tensor, found: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        # an operator has to return tensors: an empty one stands where there is no gradient
        return tuple(grad.new_empty(0) if t is None else t.contiguous() for t in found)

    def like_outputs(*args: Any) -> tuple[Tensor, ...]:
        return forward(*args) if is_recording() else outputs(*args)

    def like_arguments(grad: Tensor, *args: Any) -> tuple[Tensor, ...]:
        if is_recording():
            return gradients(grad, *args)
        return tuple(t.new_empty(t.shape) if learned(t) else grad.new_empty(0) for t in args[:count])

    def define(name: str, given: str, made: int, fake: Callable, on_gpu: Callable, on_cpu: Callable) -> Callable:
        schema = f"({given}) -> ({tensors(made)})"
        fake, on_gpu, on_cpu = (alone(function) if made == 1 else function for function in (fake, on_gpu, on_cpu))
        op = torch.library.custom_op(
            f"{NAMESPACE}::{name}", on_gpu, mutates_args=(), device_types="cuda", schema=schema
        )
        op.register_kernel("cpu")(on_cpu)
        op.register_fake(fake)
        return op

    op = define(name, arguments, results, like_outputs, forward, on_cpu)
    if backward is None:
        return op
    given = ", ".join(["Tensor grad", arguments, *(f"Tensor out{i}" for i in range(results))])
    backward_op = define(f"{name}_backward", given, count, like_arguments, gradients, gradients)

    def keep(ctx: Any, inputs: tuple, output: Tensor | tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs[:count], *(output if results > 1 else [output]))
        ctx.others = inputs[count:]

    def differentiate(ctx: Any, grad: Tensor, *unused: Tensor) -> tuple:
        given, made = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        if grad.device.type == "cpu" and not interpreted():
            # not by an operator: autograd is off inside one
            return (*by_specification(grad, *given, *ctx.others), *(None for _ in ctx.others))
        found = backward_op(grad, *given, *ctx.others, *made)
        found = found if count > 1 else [found]
        found = [gradient if learned(t) else None for t, gradient in zip(given, found, strict=True)]
        return (*found, *(None for _ in ctx.others))

    def refuse(ctx: Any, *grads: Tensor) -> tuple:
        raise RuntimeError(f"the 'triton' kernel of {name} has no second derivative: use impl='torch' for it")

    op.register_autograd(differentiate, setup_context=keep)
    backward_op.register_autograd(refuse)
    return op


def learned(argument: Tensor | None) -> bool:
    """Whether an argument can have a gradient: it is given, and no tensor of indices."""
    return argument is not None and argument.is_floating_point()


def alone(function: Callable[..., tuple[Tensor]]) -> Callable[..., Tensor]:
    """The same function, giving the one tensor itself."""
    return lambda *args: function(*args)[0]


def tensors(count: int) -> str:
    return ", ".join(["Tensor"] * count)


def under_autocast(*given: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the dtype that autocast, where it is on, has for matrix products; else as they are."""
    device = given[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return given
    return tuple(t.to(torch.get_autocast_dtype(device)) for t in given)
