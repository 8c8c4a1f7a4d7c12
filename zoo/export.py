"""Export a checkpoint or a model as an ONNX file or a `torch.export` program, and compare it with the original.

    python -m zoo.export gcvit_1k_tiny.pth.tar gcvit_t.onnx
    python -m zoo.export maxvit_t.safetensors maxvit_t.pt2 --size 256 320 --dynamic
    python -m zoo.export gcvit_t.timm_in1k maps.onnx --features 1 2 3 --dynamic --any-size

MODEL is a weights file of a classifier or a released segmenter, which is recognised, a folder that `zoo.save_for_hf`
wrote, or a timm model name: with a tag its weights are downloaded, without one it has random weights. The written file
is read again and run on random and on smooth images, as is the model itself. If they differ by more than the tolerance,
the exit code is 1, and the file is kept. Models that rank (BiFormer regions, SG-Former tokens) may differ: rounding
swaps two that rank nearly alike.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import FeatureInfo, get_model_input_config
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx.experimental import _config as shapes_config

from . import releases
from .checkpoint import load_checkpoint
from .errors import CheckpointError
from .files import whole
from .heads import segmenter
from .heads.recognise import TASKS, DenseRecognition, recognise_dense
from .reader import read
from .recognise import Recognition, hint, part_hint, recognise, without_prefix
from .registry import variants

OPSET = 18
SUFFIXES = (".onnx", ".pt2")
INSTALL = "pip install onnx onnxruntime onnxscript"
DENSE = 512  # default side, in pixels, of the images of released segmenters
# smallest side in pixels, and that of a program for any size, since torch specialises on a map of one pixel
LEAST, LEAST_OF_ANY = 32, 64
SIZES_SINCE = "2.13"  # of torch; versions before specialise on the remainders of maps that they pool
Run = Callable[[Tensor], Tensor | Sequence[Tensor]]


@dataclass(frozen=True)
class Difference:
    """How far an exported model is from the one it came from, on one batch."""

    images: str
    absolute: float
    relative: float  # to the largest number, of the output that differs most
    agreeing: float | None  # share of images, or of pixels, with the same top class; None: the outputs are not logits


def build(
    source: str, *, model: str | None = None, weights: str = "auto", features: Sequence[int] | None = None
) -> nn.Module:
    """The model that a file, a folder or a timm name stands for, in evaluation mode.

    features  stages whose maps it returns instead of logits; empty: those of all stages
    Raises CheckpointError if a file is not recognised, and for a folder or a name that timm does not know.
    """
    path = Path(source)
    create = timm.create_model if features is None else partial(_of_features, tuple(features))
    if path.is_file():
        return _from_file(create, path, model, weights).eval()
    if path.is_dir():
        if (path / "config.yaml").is_file():
            raise CheckpointError(
                f"{path} is the folder of a run: python -m recipes.export {path} OUT exports its model"
            )
        if not (path / "config.json").is_file():
            raise CheckpointError(f"{path} is a folder without config.json: expected one that zoo.save_for_hf wrote")
        return create(f"local-dir:{path}", pretrained=True).eval()
    name, _, tag = source.partition(".")
    if not timm.is_model(name):
        raise CheckpointError(f"{source} is neither a file, nor a folder, nor a model of timm or the zoo")
    try:
        timm.get_pretrained_cfg(source)
    except RuntimeError as error:
        raise CheckpointError(f"{source} is neither a file, nor a folder, nor a pretrained tag of {name}") from error
    return create(source, pretrained=bool(tag)).eval()


def _of_features(stages: tuple[int, ...], name: str, **kwargs: Any) -> nn.Module:
    try:
        return timm.create_model(name, features_only=True, **({"out_indices": stages} if stages else {}), **kwargs)
    except (AssertionError, IndexError) as error:  # what timm raises for a stage that does not exist
        raise CheckpointError(f"{name} has no features of stages {list(stages)}: {error}") from error


def _from_file(create: Callable[..., nn.Module], path: Path, model: str | None, weights: str) -> nn.Module:
    checkpoint = read(path)
    state = next(iter(checkpoint.entries.values()))
    dense = recognise_dense(state, hint(str(path), checkpoint.meta))
    if dense and dense.task == "segment" and create is timm.create_model:
        return _segmenter_from_file(dense, path, model, weights)
    if "decode_head.classifier.weight" in without_prefix(state):
        raise CheckpointError(
            f"{path} is a segmenter in the zoo's names, which do not say all of how it is built: export that of a run "
            "with python -m recipes.export RUN OUT; else load the file into a model and call zoo.export.export"
        )
    found = recognise(state, hint(str(path), checkpoint.meta))
    name = model or found.model
    if name is None:
        raise CheckpointError(f"{path}: {found.message}{part_hint(state, path) or '. Give --model'}")
    classes = {} if found.classes is None else {"num_classes": found.classes}
    if call := found.in_python(name, **classes):
        raise CheckpointError(_written_by(path, found, call))
    built = create(name, **classes, **found.arguments(name))
    report = load_checkpoint(built, path, weights=weights)
    print(report.message)
    return built


def _written_by(path: Path, found: Recognition, call: str) -> str:
    """For messages: how to export, in Python, a file whose model this command cannot build."""
    return (
        f"{path} is of {found.message}, which this command does not take. In Python, {call} takes it, "
        "zoo.load_checkpoint loads the file, and zoo.export.export writes the model"
    )


def _segmenter_from_file(found: DenseRecognition, path: Path, model: str | None, weights: str) -> nn.Module:
    """A segmenter without the auxiliary head, which only training uses."""
    name = model or found.backbone.model
    if name is None:
        raise CheckpointError(f"the backbone of {path} is {found.backbone.message}. Give --model")
    arguments = {"num_classes": found.classes, "head": found.head, **found.options}
    if call := found.backbone.in_python(name, "zoo.heads.segmenter", **arguments):
        raise CheckpointError(_written_by(path, found.backbone, call))
    release = releases.find(name, filename=path.name)
    shown = release.arguments if release and release.task == TASKS[found.task] else {}
    built = segmenter(
        name,
        found.classes,
        head=found.head,
        channels=found.options["channels"],
        auxiliary=False,
        **{**found.arguments(name), **shown},
    )
    built.pretrained_cfg["input_size"] = (3, DENSE, DENSE)
    print(load_checkpoint(built, path, weights=weights).message)
    return built


def export(model: nn.Module, image: Tensor, out: Path, *, dynamic: bool = False, any_size: bool = False) -> None:
    """Write `model` for images like `image`, (B, C, H, W), in the format of `out`'s suffix; see also `program`."""
    made = program(model, image, dynamic=dynamic, any_size=any_size)
    if out.suffix == ".pt2":
        torch.export.save(made, out)
        return
    for node in made.graph.nodes:
        if node.target is torch.ops.aten.argsort.stable:
            # ONNX sorts in one way, which is stable; torch's conversion rejects the overload that asks for that
            node.target = torch.ops.aten.argsort.default
            node.kwargs = {key: value for key, value in node.kwargs.items() if key != "stable"}
    with _sizes_may_be_one(any_size):  # the conversion traces once more
        torch.onnx.export(
            made,
            (),
            out,
            opset_version=OPSET,
            dynamo=True,
            input_names=["image"],
            output_names=names(model),
            external_data=False,
            verbose=False,
        )


def program(model: nn.Module, image: Tensor, *, dynamic: bool = False, any_size: bool = False) -> ExportedProgram:
    """The program of `model` for images like `image`, (B, C, H, W); B must be 2 or more with `dynamic`.

    dynamic   for any number of images
    any_size  for images of any height and width of at least 64 pixels each
    Raises ValueError for a model that has no single graph for all sizes, and with `any_size` before torch 2.13.
    """
    if any_size and torch.__version__ < SIZES_SINCE:
        raise ValueError(f"torch is {torch.__version__}: programs for any size need {SIZES_SINCE}, which pools any map")
    dims = {0: Dim("batch", max=4096)} if dynamic else {}
    if any_size:
        # large enough for several windows everywhere: torch would specialise on a single one
        image = image.new_zeros(*image.shape[:2], 4 * image.shape[2] + 32, 4 * image.shape[3] + 96)
        dims |= {2: Dim("height", min=LEAST_OF_ANY), 3: Dim("width", min=LEAST_OF_ANY)}
    with _sizes_may_be_one(any_size):
        return torch.export.export(
            model,
            (image,),
            dynamic_shapes=(dims,) if dims else None,
            # conditions that hold for every size, but that torch cannot prove, are checked when the program runs
            prefer_deferred_runtime_asserts_over_guards=any_size,
        )


def _sizes_may_be_one(any_size: bool) -> AbstractContextManager:
    """Without this torch assumes that no size is 1, and no map could be a single window."""
    return shapes_config.patch(backed_size_oblivious=True) if any_size else nullcontext()


def names(model: nn.Module) -> list[str]:
    """The names of the outputs: logits, or the features of each stage."""
    info = getattr(model, "feature_info", None)
    return [f"features{index}" for index in info.out_indices] if isinstance(info, FeatureInfo) else ["logits"]


def reader(path: Path) -> Run | None:
    """A function that runs an exported file; None for ONNX without its runtime."""
    if path.suffix == ".pt2":
        return torch.export.load(path).module()
    if find_spec("onnxruntime") is None:
        return None
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda image: [torch.from_numpy(output) for output in session.run(None, {"image": image.numpy()})]


def images(shape: Sequence[int]) -> dict[str, Tensor]:
    """Noise, and smooth images with frequencies as low as those of photographs; both (B, C, H, W) with deviation 1."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(*shape, generator=generator)
    coarse = torch.randn(*shape[:2], 4, 4, generator=generator)
    smooth = nn.functional.interpolate(coarse, tuple(shape[2:]), mode="bicubic")
    return {"random": noise, "smooth": smooth / smooth.std()}


@torch.no_grad()
def compare(model: nn.Module, run: Run, batches: dict[str, Tensor]) -> list[Difference]:
    """How the outputs of `run`, logits or maps, differ from those of `model`, batch by batch."""
    found = []
    for name, batch in batches.items():
        want, got = outputs(model(batch)), outputs(run(batch))
        absolute = [float((w - g).abs().max()) for w, g in zip(want, got, strict=True)]
        relative = [a / (float(w.abs().max()) or 1.0) for a, w in zip(absolute, want, strict=True)]
        agreeing = None
        if names(model) == ["logits"]:
            agreeing = float((want[0].argmax(1) == got[0].argmax(1)).float().mean())
        worst = max(range(len(want)), key=lambda i: relative[i] if relative[i] == relative[i] else torch.inf)
        found.append(Difference(name, absolute[worst], relative[worst], agreeing))
    return found


def outputs(given: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [given] if isinstance(given, Tensor) else list(given)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m zoo.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", metavar="MODEL", help="a file, a folder, or a model's name")
    parser.add_argument("--model", metavar="NAME", help="the zoo's model that a file holds; default: as recognised")
    parser.add_argument(
        "--features", type=int, nargs="*", metavar="I", help="maps, not logits: of all stages, or of these, from 0"
    )
    args = parse_written(parser, argv)
    if args.model is not None and args.model not in variants():
        parser.error(f"no model is called {args.model}: expected one of {', '.join(variants())}")
    return args


def parse_written(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """The arguments of a command: its own, which say what to export, and those added here, which say where and how."""
    parser.add_argument("out", type=Path, metavar="OUT", help="a file whose name ends in .onnx or .pt2")
    parser.add_argument("--weights", choices=("auto", "raw", "ema"), default="auto", help="which of the file's weights")
    parser.add_argument("--size", type=int, nargs=2, metavar=("H", "W"), help="of the images; default: the model's own")
    parser.add_argument("--batch", type=int, default=1, help="images at once (%(default)s)")
    parser.add_argument("--dynamic", action="store_true", help="any number of images at once")
    parser.add_argument(
        "--any-size", action="store_true", help=f"images of any height and width from {LEAST_OF_ANY} pixels"
    )
    parser.add_argument("--tolerance", type=float, default=1e-4, help="share of the largest logit (%(default)s)")
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")
    args = parser.parse_args(argv)
    if args.any_size and min(args.size or (LEAST_OF_ANY,)) < LEAST_OF_ANY:
        parser.error(f"--size {args.size}: with --any-size, expected at least {LEAST_OF_ANY} pixels a side")
    if args.out.suffix not in SUFFIXES:
        parser.error(f"OUT is {args.out}: its name must end in {' or '.join(SUFFIXES)}")
    if args.batch < 1 or min(args.size or (LEAST,)) < LEAST:
        parser.error(f"--batch {args.batch}, --size {args.size}: expected at least 1 image, of {LEAST} pixels a side")
    if args.out.suffix == ".onnx" and not (find_spec("onnx") and find_spec("onnxscript")):
        parser.error(f"ONNX needs onnx and onnxscript: {INSTALL}")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        model = build(args.source, model=args.model, weights=args.weights, features=args.features)
        shapes = write(model, args)
    except (CheckpointError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    return report(model, args.out, shapes, args.tolerance)


def write(model: nn.Module, args: argparse.Namespace) -> list[list[int]]:
    """Write `model` as the arguments of `parse_written` say, and return the shapes of images to compare it on.

    Raises CheckpointError if the file cannot be written, ValueError as `program` does.
    """
    channels, *size = get_model_input_config(getattr(model, "model", model))["input_size"]
    # an exporter treats a batch of one as a constant
    shape = [max(args.batch, 2 if args.dynamic else 1), channels, *(args.size or size)]
    with whole(args.out, force=args.force) as temporary:
        export(model, torch.zeros(shape), temporary, dynamic=args.dynamic, any_size=args.any_size)
    opset = f", opset {OPSET}" if args.out.suffix == ".onnx" else ""
    print(f"written: {args.out}, {args.out.stat().st_size:,} bytes{opset}, for {_said(shape, args)}")
    shapes = [[shape[0] + args.dynamic, *shape[1:]]]
    if args.any_size:
        shapes += [[*shapes[0][:2], *other] for other in others(*shape[2:])]
    return shapes


def _said(shape: Sequence[int], args: argparse.Namespace) -> str:
    count = "any number of images" if args.dynamic else shape[0]
    sides = ("any height", "width") if args.any_size else shape[2:]
    return " x ".join(map(str, [count, shape[1], *sides]))


def others(height: int, width: int) -> list[tuple[int, int]]:
    """Sizes to compare a program for any size at: one larger and one smaller, with odd sides where they can be."""
    larger, smaller = (5 * height // 4 | 1, 9 * width // 8 | 1), (height // 2 | 1, width // 3 | 1)
    return [larger, (max(smaller[0], LEAST_OF_ANY), max(smaller[1], LEAST_OF_ANY))]


def report(model: nn.Module, out: Path, shapes: Sequence[Sequence[int]], tolerance: float) -> int:
    """Print how far the exported file is from `model` on images of these shapes; 1 if that exceeds the tolerance."""
    run = reader(out)
    if run is None:
        print(f"not compared with PyTorch: that needs onnxruntime ({INSTALL})")
        return 0
    bad = []
    what = "feature" if names(model) != ["logits"] else "logit"
    for shape in shapes:
        for d in compare(model, run, images(shape)):
            agreeing = "" if d.agreeing is None else f"; top classes agree on {d.agreeing:.0%}"
            print(
                f"{d.images} images, {shape[2]} x {shape[3]}: differs by at most {d.absolute:.1e}, "
                f"{d.relative:.1e} of the largest {what}{agreeing}"
            )
            bad += [] if d.relative <= tolerance else [d.images]
    if bad:
        print(f"over the tolerance of {tolerance:g} on {' and '.join(dict.fromkeys(bad))} images", file=sys.stderr)
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
