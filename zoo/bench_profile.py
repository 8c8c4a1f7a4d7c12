"""Where the time of a model goes: by kind of operator, and in the forward pass by type of module."""

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

# parts of operator names, of which the first match counts; the rest is "other". Names begin and end in "_" here
KINDS = {
    "attention": ("scaled_dot_product", "flash_attention", "efficient_attention", "attention_backbones"),
    "convolution": ("_conv",),
    "matmul": ("mm_", "_linear_", "matmul_"),
    "norm": ("norm_",),
    "softmax": ("softmax_",),
    "activation": ("gelu_", "silu_", "sigmoid_", "tanh_"),
    "copy": ("copy_", "_cat_", "_clone_", "_contiguous_", "_to_", "_pad", "_stack_"),
    "gather, sort": ("index", "gather_", "scatter_", "sort", "topk_", "embedding_"),
    "pooling, sums": ("_pool", "_mean_", "sum_"),
    "elementwise arithmetic": ("_add", "mul_", "sub_", "div_"),
    "fill, allocate": ("_fill_", "_zero", "_empty_", "_resize_"),
}


def kind(operator: str) -> str:
    name = f"_{operator.replace('::', '_')}_"
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "other")


def by_kind(run: Callable[[], None], device: str) -> Counter:
    """Seconds in each kind of operator; operators inside other operators are not counted twice."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # otherwise the profiler logs each of its stages
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
    with profile(activities=activities) as profiler:
        run()
    seconds: Counter = Counter()
    for event in profiler.key_averages():
        if event.key.startswith(("aten::", "attention_backbones::", "torchvision::", "mkldnn::")):
            spent = event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
            seconds[kind(event.key)] += spent / 1e6
    return seconds


def by_module(model: nn.Module, images: Tensor) -> Counter:
    """Seconds of one forward pass in modules of each type, without those in their submodules."""
    seconds: Counter = Counter()
    with timed(model, seconds), torch.inference_mode():
        model(images)
    return seconds


@contextmanager
def timed(model: nn.Module, seconds: Counter) -> Iterator[None]:
    """Context in which `seconds` counts the time in modules by type; on a GPU each waits for the one before it."""
    last, inside = [0.0], []

    def now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def account() -> None:
        moment = now()
        if inside:
            seconds[inside[-1]] += moment - last[0]
        last[0] = moment

    def enter(label: str, *unused: object) -> None:
        account()
        inside.append(label)

    def leave(*unused: object) -> None:
        account()
        inside.pop()

    handles = []
    for module in model.modules():
        handles.append(module.register_forward_pre_hook(partial(enter, label_of(module))))
        handles.append(module.register_forward_hook(leave))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def label_of(module: nn.Module) -> str:
    """The type; depthwise convolutions and kernel sizes are listed separately."""
    label = type(module).__name__
    if isinstance(module, nn.Conv2d):
        if module.groups == module.in_channels > 1:
            return f"{label}, depthwise"
        return f"{label}, {'x'.join(map(str, module.kernel_size))}"
    return label


def render(title: str, seconds: Counter, least: float = 0.01) -> list[str]:
    """A Markdown table of shares, largest first; shares below `least` are combined in one row."""
    total = sum(seconds.values())
    lines = [f"| {title} | share |", "|---|---:|"]
    small = sum(value for value in seconds.values() if value < least * total)
    lines += [f"| {name} | {value / total:.0%} |" for name, value in seconds.most_common() if value >= least * total]
    return lines + ([f"| less than {least:.0%} each | {small / total:.0%} |"] if small else [])
