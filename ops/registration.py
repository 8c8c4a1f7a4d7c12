"""Kernels as torch operators: traced without running, differentiable, and computed by the reference on CPUs."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._C._profiler import _RecordFunctionFast
from torch._ops import OpOverload
from torch.autograd import profiler
from torch.utils.flop_counter import FlopCounterMode, flop_registry, register_flop_formula

from .dispatch import NO_SECOND, refuse_batched, unseen
from .launching import interpreted
from .recording import is_recording

NAMESPACE = "attention_backbones"

_libraries: dict[str, torch.library.Library] = {}  # an operator lasts as long as its library


def register(
    name: str,
    arguments: str,
    *,
    outputs: Callable[..., tuple[Tensor, ...]],
    forward: Callable[..., tuple[Tensor, ...]],
    backward: Callable[..., Sequence[Tensor | None]] | None,
    specification: Callable[..., Tensor],
    as_given: Callable[..., Sequence[Tensor | None]] | None = None,
    results: int = 2,
    reads_result: Callable[..., bool] = lambda *args: True,
) -> Callable[..., tuple[Tensor, ...]]:
    """Registers `attention_backbones::<name>` and `<name>_backward`, which has no derivative.

    Returns a function of the same arguments, which calls the operator only where something has to see one.

    arguments      as in an operator's schema, tensors first: "Tensor q, Tensor? bias, int[] window, float scale"
    outputs        (*arguments) -> the tensors that forward returns, uninitialised; the first is the result, the others
                   are saved for backward
    forward        (*arguments) -> the same tensors, filled
    backward       (gradient of the result, *arguments, *outputs) -> a gradient, or None, for each tensor argument; None
                   if the operator has no gradient
    specification  (*arguments) -> the result, in ordinary operators: what runs on CPU tensors, so that the operator can
                   be traced and checked there
    as_given       (for each argument whether its gradient is needed, gradient of the result, *arguments, *outputs) like
                   backward, but the gradients of arguments that are packed are packed too, and one that is not needed
                   may be None. It runs where no operator is needed, since operators may not return views of one tensor
                   and have to return every gradient. None: backward itself
    results        how many tensors forward returns; if one, the operator returns that tensor, not a tuple
    reads_result   (*arguments) -> whether backward reads the result. If not, backward gets None in its place: the
                   result is not saved and may be changed in place
    """
    count = sum(argument.split()[0].startswith("Tensor") for argument in arguments.split(","))
    kernels = Kernels(name, count, outputs, forward, backward, specification, as_given, results, reads_result)
    op = define(name, arguments, results, kernels.like_outputs, kernels.forward_together, kernels.on_cpu)
    count_flops(op, specification, 1)
    run = kernels.run
    if backward is None:
        return lambda *args: run(*args) if unseen(args[:count]) else op(*args)
    given = ", ".join(["Tensor grad", arguments, "Tensor? out0", *(f"Tensor out{i}" for i in range(1, results))])
    made = kernels.like_arguments, kernels.gradients, kernels.gradients
    kernels.backward_op = backward_op = define(f"{name}_backward", given, count, *made)
    # each matmul has two gradients; recomputation is not counted as a cost of the model
    count_flops(backward_op, lambda grad, *args: specification(*args[:-results]), 2)
    torch.library.register_autograd(op, kernels.differentiate, setup_context=kernels.keep, lib=_libraries[name])
    torch.library.register_autograd(backward_op, kernels.refuse, lib=_libraries[f"{name}_backward"])
    methods = {"forward": kernels.run_and_keep, "backward": kernels.differentiate}
    function = type(name, (torch.autograd.Function,), methods)

    def call(*args: Any) -> Tensor | tuple[Tensor, ...]:
        if not unseen(args[:count]):
            return op(*args)
        return function.apply(*args) if torch.is_grad_enabled() else run(*args)

    return call


@dataclass(eq=False)
class Kernels:
    """The functions that `register` was given, as an operator and as autograd call them.

    count        how many arguments are tensors; they come first
    backward_op  the operator of `backward`, once it is defined
    """

    name: str
    count: int
    outputs: Callable[..., tuple[Tensor, ...]]
    forward: Callable[..., tuple[Tensor, ...]]
    backward: Callable[..., Sequence[Tensor | None]] | None
    specification: Callable[..., Tensor]
    as_given: Callable[..., Sequence[Tensor | None]] | None
    results: int
    reads_result: Callable[..., bool]
    backward_op: OpOverload | None = None

    def run(self, *args: Any) -> Tensor | tuple[Tensor, ...]:
        """The kernel; its tensor alone if it returns one."""
        with shown(self.name):
            output = self.forward_together(*args)
        return output[0] if self.results == 1 else output

    def forward_together(self, *args: Any) -> tuple[Tensor, ...]:
        together(args[: self.count], self.name)
        return self.forward(*args)

    def on_cpu(self, *args: Any) -> tuple[Tensor, ...]:
        if interpreted():
            return self.forward_together(*args)
        # the other outputs are not used here: by_specification starts from the arguments
        return (self.specification(*args).contiguous(), *(other.zero_() for other in self.outputs(*args)[1:]))

    def like_outputs(self, *args: Any) -> tuple[Tensor, ...]:
        together(args[: self.count], self.name)
        return self.forward(*args) if is_recording() else self.outputs(*args)

    def gradients(self, grad: Tensor, *args: Any) -> tuple[Tensor, ...]:
        """A tensor for every tensor argument, as an operator has to return: an empty one for what is not learned."""
        made = zip(args[: self.count], self.backward(grad, *args), strict=True)
        return tuple(returned(x, t) if learned(x) else grad.new_empty(0) for x, t in made)

    def like_arguments(self, grad: Tensor, *args: Any) -> tuple[Tensor, ...]:
        together((grad, *args[: self.count]), self.name)
        if is_recording():
            return self.gradients(grad, *args)
        return tuple(t.new_empty(t.shape) if learned(t) else grad.new_empty(0) for t in args[: self.count])

    def by_specification(self, grad: Tensor, *args: Any) -> list[Tensor | None]:
        """The gradients of the specification, for CPU tensors."""
        leaves = [t.detach().requires_grad_() if learned(t) else t for t in args[: self.count]]
        with torch.enable_grad():
            out = self.specification(*leaves, *args[self.count :])
        found = iter(torch.autograd.grad(out, [leaf for leaf in leaves if learned(leaf)], grad))
        return [next(found) if learned(leaf) else None for leaf in leaves]

    def run_and_keep(self, ctx: Any, *args: Any) -> Tensor | tuple[Tensor, ...]:
        output = self.run(*args)
        self.keep(ctx, args, output)
        return output

    def keep(self, ctx: Any, inputs: tuple, output: Tensor | tuple[Tensor, ...]) -> None:
        result, *rest = output if self.results > 1 else (output,)
        ctx.save_for_backward(*inputs[: self.count], result if self.reads_result(*inputs) else None, *rest)
        ctx.others = inputs[self.count :]
        # otherwise autograd would materialise zero gradients for each
        ctx.mark_non_differentiable(*rest)
        ctx.set_materialize_grads(False)

    def differentiate(self, ctx: Any, grad: Tensor | None, *unused: None) -> tuple:
        if grad is None:  # nothing computed from the result has a gradient
            return (None,) * (self.count + len(ctx.others))
        refuse_batched(grad, f"the 'triton' kernel of {self.name}")
        kept = ctx.saved_tensors  # unpacked once: activation checkpointing refuses a second time
        given, made, nothing = kept[: self.count], kept[self.count :], [None] * len(ctx.others)
        # a second derivative has to reach the operator, which raises the error
        if not torch.is_grad_enabled() and unseen((grad, *given)):
            inputs = (grad, *given, *ctx.others, *made)
            with shown(f"{self.name}_backward"):
                found = self.as_given(ctx.needs_input_grad, *inputs) if self.as_given else self.backward(*inputs)
            return (*found, *nothing)
        if grad.device.type == "cpu" and not interpreted():
            # not through an operator: autograd is disabled inside one
            return (*self.by_specification(grad, *given, *ctx.others), *nothing)
        found = self.backward_op(grad, *given, *ctx.others, *made)
        found = found if self.count > 1 else [found]
        return (*(gradient if learned(t) else None for t, gradient in zip(given, found, strict=True)), *nothing)

    def refuse(self, ctx: Any, *grads: Tensor) -> tuple:
        raise RuntimeError(f"the 'triton' kernel of {self.name} {NO_SECOND}")


def define(name: str, arguments: str, made: int, fake: Callable, on_gpu: Callable, on_cpu: Callable) -> OpOverload:
    """Defines an operator that returns `made` tensors, replacing any operator of that name.

    It has a library of its own: the wrappers of `torch.library.custom_op` take longer than the functions they wrap.
    """
    _libraries.pop(name, None)
    library = _libraries[name] = torch.library.Library(NAMESPACE, "FRAGMENT")
    library.define(f"{name}({arguments}) -> ({tensors(made)})", tags=(torch.Tag.pt2_compliant_tag,))
    fake, on_gpu, on_cpu = (alone(function) if made == 1 else function for function in (fake, on_gpu, on_cpu))
    library.impl(name, on_gpu, "CUDA")
    library.impl(name, on_cpu, "CPU")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=library)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def shown(name: str) -> AbstractContextManager[Any]:
    """Context that profiles show as the operator of this name, in calls that need none."""
    # this records what an operator does; torch.profiler.record_function is an annotation, which has no time on a GPU
    return _RecordFunctionFast(f"{NAMESPACE}::{name}") if profiler._is_profiler_enabled else nullcontext()


def count_flops(op: OpOverload, specification: Callable[..., Tensor], times: int) -> None:
    """Makes torch's FlopCounterMode count an operator as `times` the FLOPs of its specification."""

    def formula(*args: Any, out_val: Any = None) -> int:
        shapes = [torch.empty_like(arg, device="meta") if isinstance(arg, Tensor) else arg for arg in args]
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            specification(*shapes)
        return times * counter.get_total_flops()

    flop_registry.pop(op.overloadpacket, None)  # of an earlier operator of that name
    register_flop_formula(op.overloadpacket, get_raw=True)(formula)


def together(given: Sequence[Tensor | None], name: str) -> None:
    """Raises ValueError for tensors on different devices: a kernel would read one device's addresses on another."""
    place = given[0].get_device()  # an integer, which is faster than a torch.device
    for t in given:
        if t is not None and t.get_device() != place:
            devices = ", ".join(dict.fromkeys(str(t.device) for t in given if t is not None))
            raise ValueError(f"{name}'s tensors are on {devices}: expected one device")


def learned(argument: Tensor | None) -> bool:
    """Whether an argument can have a gradient: it is given, and not a tensor of indices."""
    return argument is not None and argument.is_floating_point()


def returned(argument: Tensor, gradient: Tensor | None) -> Tensor:
    """A gradient as an operator returns it: like its argument, contiguous, zeros where there is none."""
    if gradient is None:
        return argument.new_zeros(argument.shape)
    return gradient.to(argument.dtype).contiguous()


def alone(function: Callable[..., tuple[Tensor]]) -> Callable[..., Tensor]:
    """The same function, returning the single tensor itself."""
    return lambda *args: function(*args)[0]


def tensors(count: int) -> str:
    return ", ".join(["Tensor"] * count)
