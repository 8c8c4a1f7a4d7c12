"""Export a checkpoint or a model as an ONNX file or a `torch.export` program, and compare it with what it came from.

    python -m zoo.export gcvit_1k_tiny.pth.tar gcvit_t.onnx
    python -m zoo.export maxvit_t.safetensors maxvit_t.pt2 --size 256 320 --dynamic

MODEL is a file of weights, whose model is recognised, a folder that `zoo.save_for_hf` wrote, or a name of timm's: with
a tag its weights are downloaded, without one it has none. What was written is read again and run on random and on
smooth images beside the model itself. The exit code is 1, and the file stays, where they differ by more than the
tolerance. Models that rank (BiFormer regions, SG-Former tokens) may: rounding swaps two that rank nearly alike.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import timm
import torch
from timm.models._input import get_model_input_config
from torch import Tensor, nn

from .checkpoint import load_checkpoint
from .errors import CheckpointError
from .files import whole
from .reader import read
from .recognise import hint, part_hint, recognise
from .registry import variants

OPSET = 18
SUFFIXES = (".onnx", ".pt2")
INSTALL = "pip install onnx onnxruntime onnxscript"
Run = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Difference:
    """How far an exported model is from the one it came from, on one batch."""

    images: str
    absolute: float
    relative: float  # to the largest logit
    agreeing: float  # share of images with the same first class


def build(source: str, *, model: str | None = None, weights: str = "auto") -> nn.Module:
    """The model that a file, a folder or a name of timm's stands for, in evaluation mode.

    Raises CheckpointError where a file is not recognised, and for a folder or a name that timm does not know.
    """
    path = Path(source)
    if path.is_file():
        return _from_file(path, model, weights).eval()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise CheckpointError(f"{path} is a folder without config.json: expected one that zoo.save_for_hf wrote")
        return timm.create_model(f"local-dir:{path}", pretrained=True).eval()
    name, _, tag = source.partition(".")
    if not timm.is_model(name):
        raise CheckpointError(f"{source} is neither a file, nor a folder, nor a model of timm's or the zoo's")
    try:
        timm.get_pretrained_cfg(source)
    except RuntimeError as error:
        raise CheckpointError(f"{source} is neither a file, nor a folder, nor one of {name}'s weights") from error
    return timm.create_model(source, pretrained=bool(tag)).eval()


def _from_file(path: Path, model: str | None, weights: str) -> nn.Module:
    checkpoint = read(path)
    state = next(iter(checkpoint.entries.values()))
    found = recognise(state, hint(str(path), checkpoint.meta))
    name = model or found.model
    if name is None:
        raise CheckpointError(f"{path}: {found.message}{part_hint(state, path) or '. Give --model'}")
    built = timm.create_model(name, **({} if found.classes is None else {"num_classes": found.classes}))
    report = load_checkpoint(built, path, weights=weights)
    print(report.message)
    return built


def export(model: nn.Module, image: Tensor, out: Path, *, dynamic: bool = False) -> None:
    """Write `model` for images like `image`, (B, C, H, W), as its suffix says; `dynamic`: for any number of them."""
    shapes = ({0: torch.export.Dim("batch", max=4096)},) if dynamic else None
    if out.suffix == ".pt2":
        torch.export.save(torch.export.export(model, (image,), dynamic_shapes=shapes), out)
        return
    torch.onnx.export(
        model,
        (image,),
        out,
        opset_version=OPSET,
        dynamo=True,
        dynamic_shapes=shapes,
        input_names=["image"],
        output_names=["logits"],
        external_data=False,
        verbose=False,
    )


def reader(path: Path) -> Run | None:
    """What an exported file computes; None for ONNX without its runtime."""
    if path.suffix == ".pt2":
        return torch.export.load(path).module()
    if find_spec("onnxruntime") is None:
        return None
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda image: torch.from_numpy(session.run(None, {"image": image.numpy()})[0])


def images(shape: Sequence[int]) -> dict[str, Tensor]:
    """Noise, and waves as slow as the content of photographs; both (B, C, H, W) with deviation 1."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(*shape, generator=generator)
    coarse = torch.randn(*shape[:2], 4, 4, generator=generator)
    smooth = nn.functional.interpolate(coarse, tuple(shape[2:]), mode="bicubic")
    return {"random": noise, "smooth": smooth / smooth.std()}


@torch.no_grad()
def compare(model: nn.Module, run: Run, batches: dict[str, Tensor]) -> list[Difference]:
    """What `run` gives beside what `model` gives, batch by batch."""
    found = []
    for name, batch in batches.items():
        want, got = model(batch), run(batch)
        absolute, largest = float((want - got).abs().max()), float(want.abs().max())
        agreeing = float((want.argmax(-1) == got.argmax(-1)).float().mean())
        found.append(Difference(name, absolute, absolute / (largest or 1.0), agreeing))
    return found


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m zoo.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", metavar="MODEL", help="a file, a folder, or a model's name")
    parser.add_argument("out", type=Path, metavar="OUT", help="a file that ends in .onnx or .pt2")
    parser.add_argument("--model", metavar="NAME", help="the zoo's model that a file is of; default: as recognised")
    parser.add_argument("--weights", choices=("auto", "raw", "ema"), default="auto", help="which of the file's weights")
    parser.add_argument("--size", type=int, nargs=2, metavar=("H", "W"), help="of the images; default: the model's own")
    parser.add_argument("--batch", type=int, default=1, help="images at once (%(default)s)")
    parser.add_argument("--dynamic", action="store_true", help="any number of images at once")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="of the largest logit (%(default)s)")
    parser.add_argument("--force", action="store_true", help="replace OUT where it exists")
    args = parser.parse_args(argv)
    if args.out.suffix not in SUFFIXES:
        parser.error(f"OUT is {args.out}: its name must end in {' or '.join(SUFFIXES)}")
    if args.model is not None and args.model not in variants():
        parser.error(f"no model is called {args.model}: expected one of {', '.join(variants())}")
    if args.batch < 1 or min(args.size or (32, 32)) < 32:
        parser.error(f"--batch {args.batch}, --size {args.size}: expected an image, of 32 pixels a side, at least")
    if args.out.suffix == ".onnx" and not (find_spec("onnx") and find_spec("onnxscript")):
        parser.error(f"ONNX needs onnx and onnxscript: {INSTALL}")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        model = build(args.source, model=args.model, weights=args.weights)
        channels, *size = get_model_input_config(model)["input_size"]
        # an exporter takes a batch of one for a constant
        shape = [max(args.batch, 2 if args.dynamic else 1), channels, *(args.size or size)]
        with whole(args.out, force=args.force) as temporary:
            export(model, torch.zeros(shape), temporary, dynamic=args.dynamic)
    except CheckpointError as error:
        print(error, file=sys.stderr)
        return 2
    opset = f", opset {OPSET}" if args.out.suffix == ".onnx" else ""
    print(f"written: {args.out}, {args.out.stat().st_size:,} bytes{opset}, for {_said(shape, args.dynamic)}")
    return report(model, args.out, [shape[0] + args.dynamic, *shape[1:]], args.tolerance)


def _said(shape: Sequence[int], dynamic: bool) -> str:
    return " x ".join(map(str, ["any number of images" if dynamic else shape[0], *shape[1:]]))


def report(model: nn.Module, out: Path, shape: Sequence[int], tolerance: float) -> int:
    """Print how far the exported file is from `model` on images of this shape; 1 where that is over the tolerance."""
    run = reader(out)
    if run is None:
        print(f"not compared with PyTorch: that needs onnxruntime, {INSTALL}")
        return 0
    found = compare(model, run, images(shape))
    for d in found:
        print(
            f"{d.images} images: differs by {d.absolute:.1e} at most, {d.relative:.1e} of the largest logit; "
            f"first classes agree on {d.agreeing:.0%}"
        )
    if bad := [d.images for d in found if not d.relative <= tolerance]:
        print(f"over the tolerance of {tolerance:g} on {' and '.join(bad)} images", file=sys.stderr)
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
