"""Export a checkpoint or a model as an ONNX file or a `torch.export` program, and compare it with the original.

    python -m zoo.export gcvit_1k_tiny.pth.tar gcvit_t.onnx
    python -m zoo.export maxvit_t.safetensors maxvit_t.pt2 --size 256 320 --dynamic
    python -m zoo.export gcvit_t.timm_in1k maps.onnx --features 1 2 3 --dynamic --any-size

MODEL is a weights file of a classifier or a released segmenter, which is recognised, a folder that `zoo.save_for_hf`
wrote, or a timm model name: with a tag its weights are downloaded, without one it has random weights. The written file
is read again and run on random and on smooth images, as is the model itself. If they differ by more than the tolerance,
the exit code is 1, and the file is kept. Models that rank (BiFormer regions, SG-Former tokens) may differ: rounding
swaps two that rank nearly alike.

The file says how images are prepared for it and, where that is known, what its classes are called: config.json in the
metadata of ONNX, and in the extra files of a program.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from timm.models import get_model_input_config
from timm.utils import unwrap_model
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx.experimental import _config as shapes_config

from ops.onnx_export import tracing_for_onnx
from ops.tool import positive, tool

from .errors import CheckpointError, first_line, plain_warnings
from .exportable import build
from .exported import ABOUT, Run, about, compare, images, name_classes, names
from .files import whole, write_whole
from .registry import variants

OPSET = 18
SUFFIXES = (".onnx", ".pt2")
INSTALL = "pip install onnx onnxruntime onnxscript"
# smallest side in pixels, and that of a program for any size, since torch specialises on a map of one pixel
LEAST, LEAST_OF_ANY = 32, 64
SIZES_SINCE = "2.13"  # of torch; versions before specialise on the remainders of maps that they pool
DIMS = {0: "batch", 2: "height", 3: "width"}  # names of those of images


def export(model: nn.Module, image: Tensor, out: str | Path, *, dynamic: bool = False, any_size: bool = False) -> None:
    """Write `model` for images like `image`, (B, C, H, W), in the format of `out`'s suffix; see also `program`.

    Raises ValueError for another suffix than .onnx and .pt2.
    """
    model, out = unwrap_model(model), Path(out)
    if out.suffix not in SUFFIXES:
        raise ValueError(f"{out}: expected a name that ends in {' or '.join(SUFFIXES)}")
    with nullcontext() if out.suffix == ".pt2" else tracing_for_onnx():
        made = program(model, image, dynamic=dynamic, any_size=any_size)
    said = json.dumps(about(model, image))
    if out.suffix == ".pt2":
        write_whole(out, lambda file: torch.export.save(made, file, extra_files={ABOUT: said}))
        return
    with _sizes_may_be_one(any_size):  # the conversion traces once more
        converted = torch.onnx.export(
            made,
            (),
            opset_version=OPSET,
            dynamo=True,
            input_names=["image"],
            output_names=names(model),
            dynamic_shapes=(DIMS,),  # the program's own names are lost: this renames what varies
            verbose=False,
            # torch's optimisation has a rewrite that is wrong where a batch has as many matrices as these have rows
            optimize=False,
        )
    _fold(converted.model)
    converted.model.metadata_props[ABOUT] = said
    converted.save(out, external_data=False)


def _fold(model: Any) -> None:
    """Make constants of what depends on no input in a model of ONNX; its runtime optimises the rest."""
    from onnxscript import optimizer

    optimizer.inline(model)
    optimizer.fold_constants(model)
    optimizer.remove_unused_nodes(model)


def program(model: nn.Module, image: Tensor, *, dynamic: bool = False, any_size: bool = False) -> ExportedProgram:
    """The program of `model` for images like `image`, (B, C, H, W); B must be 2 or more with `dynamic`.

    dynamic   for any number of images
    any_size  for images of any height and width of at least 64 pixels each
    Raises ValueError for a model in training mode or that has no single graph for all sizes, and with `any_size` before
    torch 2.13.
    """
    model = unwrap_model(model)
    if any_size and torch.__version__ < SIZES_SINCE:
        raise ValueError(f"torch is {torch.__version__}: programs for any size need {SIZES_SINCE}, which pools any map")
    if model.training:  # its batch norms and dropout would be part of the program
        raise ValueError(f"{type(model).__name__} is in training mode: call model.eval() first")
    dims = {0: Dim(DIMS[0])} if dynamic else {}
    if any_size:
        # large enough for several windows everywhere: torch would specialise on a single one
        image = image.new_zeros(*image.shape[:2], 4 * image.shape[2] + 32, 4 * image.shape[3] + 96)
        dims |= {side: Dim(DIMS[side], min=LEAST_OF_ANY) for side in (2, 3)}
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


def reader(path: Path) -> Run | None:
    """A function that runs an exported file; None for ONNX without its runtime."""
    if path.suffix == ".pt2":
        return torch.export.load(path).module()
    if find_spec("onnxruntime") is None:
        return None
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda image: [torch.from_numpy(output) for output in session.run(None, {"image": image.numpy()})]


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m zoo.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", metavar="MODEL", help="a file, a folder, or a model's name")
    parser.add_argument("--model", metavar="NAME", help="the zoo's model that a file holds; default: as recognised")
    parser.add_argument(
        "--features", type=int, nargs="*", metavar="I", help="maps, not logits: of all stages, or of these, from 0"
    )
    parser.add_argument("--labels", type=Path, metavar="FILE", help="names of the classes, a line each, in their order")
    args = parse_written(parser, argv)
    if args.model is not None and args.model not in variants():
        parser.error(f"no model is called {args.model}: expected one of {', '.join(variants())}")
    return args


def parse_written(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """The arguments of a command: its own, which say what to export, and those added here, which say where and how."""
    parser.add_argument("out", type=Path, metavar="OUT", help="a file whose name ends in .onnx or .pt2")
    parser.add_argument("--weights", choices=("auto", "raw", "ema"), default="auto", help="which of the file's weights")
    parser.add_argument("--size", type=int, nargs=2, metavar=("H", "W"), help="of the images; default: the model's own")
    parser.add_argument("--batch", type=positive, default=1, help="images at once (%(default)s)")
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
    try:
        str(args.out).encode()
    except UnicodeEncodeError:
        parser.error(f"OUT is {str(args.out)!a}: expected a path in UTF-8, or what is written could not be read")
    if min(args.size or (LEAST,)) < LEAST:
        parser.error(f"--size {args.size}: expected at least {LEAST} pixels a side")
    if not args.tolerance >= 0:  # neither is nan
        parser.error(f"--tolerance {args.tolerance:g}: expected a share from 0")
    if args.out.suffix == ".onnx" and not (find_spec("onnx") and find_spec("onnxscript")):
        parser.error(f"ONNX needs onnx and onnxscript: {INSTALL}")
    return args


@plain_warnings()
@tool
def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        model = build(args.source, model=args.model, weights=args.weights, features=args.features)
        if args.labels is not None:
            name_classes(model, _lines(args.labels))
        shapes = write(model, args)
    except (CheckpointError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    return report(model, args.out, shapes, args.tolerance)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"could not read --labels {path}: {error}") from error


def write(model: nn.Module, args: argparse.Namespace) -> list[list[int]]:
    """Write `model` as the arguments of `parse_written` say, and return the shapes of images to compare it on.

    Raises CheckpointError if the file cannot be written, or the model takes no other sizes; ValueError as `program`.
    """
    channels, *size = get_model_input_config(getattr(model, "model", model))["input_size"]
    # an exporter treats a batch of one as a constant
    shape = [max(args.batch, 2 if args.dynamic else 1), channels, *(args.size or size)]
    image = torch.zeros(shape)
    known = about(model, image)
    what = known.get("architecture", type(model).__name__)
    if args.size:
        _check_size(model, what, (channels, *args.size), "")
    for other in others(*shape[2:]) if args.any_size else ():
        _check_size(model, what, (channels, *other), ", so leave out --any-size")
    print(f"exporting {what} for {_said(shape, args)} ...", flush=True)  # which may take a minute
    try:
        with whole(args.out, force=args.force) as temporary:
            export(model, image, temporary, dynamic=args.dynamic, any_size=args.any_size)
    except RuntimeError as error:
        if type(error).__name__ != "SerializeError":  # which has no public name: torch has no format for a program
            raise
        instead = "leave out --any-size and give --size H W" if args.any_size else "export to a name that ends in .onnx"
        raise CheckpointError(f"torch.export cannot save {what}: {first_line(error)}; {instead}") from error
    opset = f", opset {OPSET}" if args.out.suffix == ".onnx" else ""
    print(f"written: {args.out}, {args.out.stat().st_size:,} bytes{opset}, for {_said(shape, args)}")
    nameless = names(model) == ["logits"] and "label_names" not in known
    print(f"its {ABOUT}: {', '.join(known)}{'; --labels FILE gives the classes names' * nameless}")
    shapes = [[shape[0] + args.dynamic, *shape[1:]]]
    if args.any_size:
        shapes += [[*shapes[0][:2], *other] for other in others(*shape[2:])]
    return shapes


def _check_size(model: nn.Module, what: str, shape: tuple[int, ...], advice: str) -> None:
    """Raise CheckpointError for a model that refuses images of other sizes than its own, as some of timm's do."""
    try:
        with torch.no_grad():
            model(torch.zeros(1, *shape))
    except (AssertionError, RuntimeError) as error:
        raise CheckpointError(f"{what} takes no images of {shape[1]} x {shape[2]}{advice}: {error}") from error


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
        try:
            found = compare(model, run, images(shape))
        except RuntimeError as error:  # of a condition on sizes, which a program checks when it runs
            print(f"{out} refuses images of {shape[2]} x {shape[3]}: {first_line(error)}", file=sys.stderr)
            return 1
        for d in found:
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
