"""Times whole models beside timm's or torchvision's model of the same architecture (the twin), in one run.

    python -m zoo.bench davit_t gcvit_t --device cpu --threads 2 --out benchmarks
    python -m zoo.bench --device cuda --dtype bfloat16 --batch 128 --train
    python -m zoo.bench nat_t convnext_tiny --size 800 1344 --batch 2
    python -m zoo.bench stvit_s --profile

The share is the model's FLOP/s (twice its multiply-adds, times images per second) over those of a large matmul: a
perfect model would reach 100 %. Models that only timm has are listed in the columns of the twin; a twin that takes no
images of the size is left out. Model, twin and matmul alternate, so that a busy moment of the machine affects all of
them; the column GFLOP/s is that of the matmul. Weights are random: models of the zoo are named without a tag.
With `--profile`, it reports where the time of each model goes.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import timm
import torch
import torchvision
from torch import Tensor, nn

from ops.bench.measure import large_product, timings
from ops.bench.report import circumstances
from ops.tool import ToolError, overwrite, positive, tool, writable

from .allocator import keep_freed_memory
from .bench_profile import by_kind, by_module, render
from .errors import first_line
from .registry import variants
from .table import at_size, gflops

# the same architecture in another library, and how to build it
TWINS: dict[str, tuple[str, str | Callable[[], nn.Module]]] = {
    "maxvit_t": ("timm", "maxvit_tiny_tf_224"),
    "maxvit_s": ("timm", "maxvit_small_tf_224"),
    "maxvit_b": ("timm", "maxvit_base_tf_224"),
    "maxvit_l": ("timm", "maxvit_large_tf_224"),  # timm's XL of this size has as many classes as ImageNet-21k
    **{
        f"maxvit_{size}_{pixels}": ("timm", f"maxvit_{name}_tf_{pixels}")
        for size, name in (("t", "tiny"), ("s", "small"), ("b", "base"), ("l", "large"), ("xl", "xlarge"))
        for pixels in (384, 512)
    },
    "maxvit_t_tv": ("torchvision", torchvision.models.maxvit_t),
    "gcvit_xxt": ("timm", "gcvit_xxtiny"),
    "gcvit_xt": ("timm", "gcvit_xtiny"),
    "gcvit_t": ("timm", "gcvit_tiny"),
    "gcvit_s": ("timm", "gcvit_small"),
    "gcvit_b": ("timm", "gcvit_base"),
    "davit_t": ("timm", "davit_tiny"),
    "davit_s": ("timm", "davit_small"),
    "davit_b": ("timm", "davit_base"),
    "davit_l": ("timm", "davit_large"),
    "davit_h": ("timm", "davit_huge"),
    "davit_g": ("timm", "davit_giant"),
}

# what models of other libraries raise for images of a size that they do not take
REFUSALS = (AssertionError, RuntimeError, ValueError, ZeroDivisionError)

# the smallest model of each family that its paper compares with others
DEFAULT = (
    *("maxvit_t", "maxvit_t_tv", "nat_t", "dinat_t", "dinats_t", "biformer_t", "litv2_s"),
    *("gcvit_t", "davit_t", "sgformer_s", "stvit_s"),
)


@dataclass
class Row:
    """The results of one model and its twin in one mode, by source; shares are of `rate`, the matmul in FLOP/s."""

    model: str
    mode: str
    gflops: float
    rate: float
    images_a_second: dict[str, float]
    mib: dict[str, float]
    share: dict[str, float]


def step(model: nn.Module, images: Tensor, train: bool) -> None:
    if not train:
        with torch.inference_mode():
            model(images)
        return
    model(images).sum().backward()
    model.zero_grad(set_to_none=True)


def build(name: str, args: argparse.Namespace) -> tuple[dict[str, nn.Module], Tensor]:
    """The model, its twin if there is one that takes these images, and a batch of images.

    Raises ToolError if the model itself takes no images of the size.
    """
    ours = name in variants()
    with told(name, args, (ValueError,) if ours else REFUSALS):
        model, size = at_size(name, args.size)
        place(model, size, args)
    models = {"ours" if ours else "timm": model}
    if name in TWINS:
        models |= twins(name, size, args)
    return models, batch(args.batch, size, args)


def twins(name: str, size: tuple[int, int], args: argparse.Namespace) -> dict[str, nn.Module]:
    """The twin of a model by its library; nothing if it takes no images of the size, which is then said."""
    library = TWINS[name][0]
    try:
        with told(f"{library}'s {name}", args, REFUSALS):
            place(twin := twin_of(name, args.size), size, args)
    except ToolError as error:
        print(f"left out: {error}", file=sys.stderr)
        return {}
    return {library: twin}


@contextmanager
def told(model: str, args: argparse.Namespace, refusals: tuple[type[Exception], ...]) -> Iterator[None]:
    """Raises ToolError where a model, as it is built or run, refuses images of `--size`."""
    try:
        yield
    except refusals as error:
        if args.size is None or isinstance(error, torch.OutOfMemoryError):  # which is a RuntimeError
            raise
        size = " x ".join(map(str, args.size))
        raise ToolError(f"{model} takes no images of {size}: {first_line(error)}") from error


def place(model: nn.Module, size: tuple[int, int], args: argparse.Namespace) -> None:
    """Moves a model to where it is timed; at a size that was asked for, it is tried there."""
    model.to(args.device, getattr(torch, args.dtype), memory_format=torch.channels_last).train(args.train)
    if args.size is not None:  # one image may be too few for batch norms in training
        step(model, batch(args.batch if args.train else 1, size, args), args.train)


def batch(count: int, size: tuple[int, int], args: argparse.Namespace) -> Tensor:
    """Random images (count, 3, H, W)."""
    images = torch.randn(count, 3, *size, device=args.device, dtype=getattr(torch, args.dtype))
    return images.contiguous(memory_format=torch.channels_last)


def twin_of(name: str, size: tuple[int, int] | None = None) -> nn.Module:
    """The same architecture in another library, for images of a size. Raises ValueError if it only has its own size."""
    make = TWINS[name][1]
    if isinstance(make, str):
        return at_size(make, size)[0]
    if size is not None:
        raise ValueError("it is made for its own size alone")
    return make()


def measure(name: str, args: argparse.Namespace) -> Row:
    """Times one model, its twin if there is one, and a large matmul, in turn."""
    models, images = build(name, args)
    if args.compile:
        torch.compiler.reset()  # after 8 models with the same forward method, torch would compile no more of them
    runs = {
        source: partial(step, torch.compile(model) if args.compile else model, images, args.train)
        for source, model in models.items()
    }
    runs["product"], size = large_product(args.device, getattr(torch, args.dtype))
    ms, mib = timings(runs, args.repeats, args.device)
    rate = size / (ms.pop("product") / 1000)
    mib.pop("product")
    cost = gflops(name, args.size)
    operations = 2e9 * cost * (3 if args.train else 1)
    speed = {source: args.batch / (value / 1000) for source, value in ms.items()}
    share = {source: operations * value / rate for source, value in speed.items()}
    return Row(name, mode(args), cost, rate, speed, mib, share)


def profiled(name: str, args: argparse.Namespace) -> list[str]:
    """Tables of where the time of a model and of its twin goes."""
    models, images = build(name, args)
    lines = ["", f"## {name}"]
    for source, model in models.items():
        step(model, images, args.train)  # warm up
        kinds = by_kind(partial(step, model, images, args.train), args.device)
        lines += ["", *render(f"{source}: kind of operator, {mode(args)}", kinds)]
        lines += ["", *render(f"{source}: module, forward", by_module(model, images))]
    return lines


def mode(args: argparse.Namespace) -> str:
    return "forward+backward" if args.train else "forward"


def table(rows: list[Row]) -> str:
    """A Markdown table of ours, the twin, and ours divided by the twin."""
    lines = [
        "| model | mode | GFLOPs | GFLOP/s | ours, images/s | share | twin | its images/s | its share | ours / twin |",
        "|---|---|---:|---:|---:|---:|---|---:|---:|---:|",
    ]
    for row in rows:
        cells = [row.model, row.mode, f"{row.gflops:.2f}", f"{row.rate / 1e9:.0f}"]
        cells += [mark(row, "ours"), f"{row.share['ours']:.0%}"] if "ours" in row.share else ["-"] * 2
        twin = next((source for source in row.images_a_second if source != "ours"), None)
        cells += [twin, mark(row, twin), f"{row.share[twin]:.0%}"] if twin else ["-"] * 3
        speeds = row.images_a_second.values()
        cells += [f"{row.images_a_second['ours'] / row.images_a_second[twin]:.2f}" if len(speeds) == 2 else "-"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def mark(row: Row, source: str) -> str:
    memory = f" ({row.mib[source]:.0f} MiB)" if source in row.mib else ""
    return f"{row.images_a_second[source]:.1f}{memory}"


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m zoo.bench", description="Times models beside their twins.")
    parser.add_argument("models", nargs="*", help=f"from the zoo or timm; default: {' '.join(DEFAULT)}")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--batch", type=positive, default=8)
    parser.add_argument(
        "--size", type=positive, nargs=2, metavar=("H", "W"), help="of images; default: each model's own"
    )
    parser.add_argument("--threads", type=positive, help="CPU threads; default: torch's own choice")
    parser.add_argument("--repeats", type=positive, default=10)
    parser.add_argument("--compile", action="store_true", help="torch.compile the models; not with --profile")
    parser.add_argument("--train", action="store_true", help="forward and backward, in training mode")
    parser.add_argument("--profile", action="store_true", help="report where the time goes, instead of the speed")
    parser.add_argument("--out", type=Path, help="folder for models_<device>_<mode>.md and .json, or profile_....md")
    args = parser.parse_args(argv)
    unknown = sorted(name for name in set(args.models) if not timm.is_model(name))
    if unknown:
        parser.error(
            f"no model is called {', '.join(unknown)}: expected models of timm, or some of {', '.join(variants())}"
        )
    for name in args.models:
        try:
            timm.get_pretrained_cfg(name)
        except RuntimeError as error:
            parser.error(f"{name}: {error}")
    tagged = [name for name in args.models if "." in name and name.partition(".")[0] in variants()]
    if tagged:
        parser.error(
            f"{', '.join(tagged)}: weights are random here, so expected models of the zoo without a tag, such as "
            f"{tagged[0].partition('.')[0]}, and --size for images of another size than their own"
        )
    if args.profile and args.compile:
        parser.error("--profile reports operators and modules, which --compile fuses: leave one of them out")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here")
    return args


@tool
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if args.out is not None:
        writable(args.out)
    if args.device == "cpu":
        keep_freed_memory()  # as the training loop does
    if args.profile:
        profile(args)
        return
    rows, text = [], ""
    for name in args.models or DEFAULT:
        rows.append(measure(name, args))
        text = record(args, rows)
        print(table(rows[-1:]).splitlines()[-1], flush=True)
    print("\n" + text)


def record(args: argparse.Namespace, rows: list[Row]) -> str:
    """The page so far; written after every model, so that an interrupted run keeps what it measured."""
    facts = settings(args)
    text = page("Models", facts, ["", table(rows)])
    if args.out is not None:
        write(args, "models", text)
        numbers = json.dumps({**facts, "rows": [asdict(row) for row in rows]}, indent=1) + "\n"
        overwrite(args.out / f"{stem(args, 'models')}.json", numbers)
    return text


def profile(args: argparse.Namespace) -> None:
    lines = []
    for name in args.models or DEFAULT:
        lines += profiled(name, args)
    text = page("Where the time goes", settings(args), lines)
    print(text)
    if args.out is not None:
        write(args, "profile", text)


def settings(args: argparse.Namespace) -> dict[str, str]:
    timing = "one run, warmed up" if args.profile else f"medians of {args.repeats} alternating runs"
    size = [] if args.size is None else [" x ".join(map(str, args.size))]
    said = ", ".join([f"batch {args.batch}", *size, args.dtype, timing])
    return circumstances(args.device, "zoo.bench") | {"settings": said}


def page(title: str, facts: dict[str, str], lines: list[str]) -> str:
    return "\n".join([f"# {title}", "", *(f"- {key}: {value}" for key, value in facts.items()), *lines, ""])


def stem(args: argparse.Namespace, what: str) -> str:
    """The name of a file: runs with other settings must not overwrite it."""
    parts = [what, args.device, "training" if args.train else "inference"]
    parts += [args.dtype] * (args.dtype != "float32") + ["compiled"] * args.compile
    parts += [] if args.size is None else ["x".join(map(str, args.size))]
    return "_".join(parts)


def write(args: argparse.Namespace, what: str, text: str) -> None:
    overwrite(args.out / f"{stem(args, what)}.md", text)


if __name__ == "__main__":
    sys.exit(main())
