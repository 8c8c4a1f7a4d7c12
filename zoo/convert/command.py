"""Convert the weights of a file to another layout: the zoo's, the authors', timm's or torchvision's.

    python -m zoo.convert gcvit_1k_tiny.pth.tar gcvit_t.safetensors
    python -m zoo.convert model.safetensors given_back.pth --to official --wrapper model

OUT is written as safetensors or, if its name ends in .pth, .pth.tar, .pt or the like, with torch.save.
Model and layout are recognised from the file. Every tensor comes back bit for bit, in its own precision. Entries that
are not learned are left out of the zoo's layout and computed again on the way back: tables of relative position indices
(for square windows; other windows are refused), STViT's one-hot kernels. Not converted: optimisers, epochs and whatever
else is stored beside the weights, the second of raw and averaged weights, prefixes such as `module.`, and parts of the
file that are not a backbone.

The metadata of a safetensors file has `layout`, `weights` (raw or ema), `source` and `source_sha256` (the name and the
digest of IN), and where they are known `model`, `release` (as in checkpoints.md) and `license`, that of the release.
"""

import argparse
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ops.tool import tool

from ..checkpoint import only_part, part_of, select
from ..errors import CheckpointError, listed, plain_warnings, printable
from ..fetch import by_name, releases_in, warn_of_licence
from ..files import SUFFIXES, save_tensors, sha256, whole, write_whole
from ..fitting import fit
from ..layouts import LAYOUTS
from ..reader import Checkpoint, read, where
from ..recognise import CONV, OURS, hint, is_table, layouts_of, part_hint, recognise
from ..registry import class_of, variants
from ..releases import Release

ENDINGS = ", ".join(SUFFIXES[:-1]) + f" or {SUFFIXES[-1]}"
NAMES = [OURS.name, *dict.fromkeys(layout.name for layouts in LAYOUTS.values() for layout in layouts)]


@dataclass(frozen=True)
class Converted:
    """A state dict in the layout that was asked for, and what it was."""

    state: dict[str, Tensor]
    model: str | None
    source_layout: str
    entry: str
    release: Release | None


def convert(
    checkpoint: Checkpoint, *, to: str = OURS.name, model: str | None = None, weights: str = "auto"
) -> Converted:
    """The weights of a checkpoint in layout `to`.

    model    the variant of the zoo that the file must hold, except for other channels or sizes of images, another head
             or norms on features; None: recognised from names and shapes
    weights  "raw", "ema" or "auto", as in `load_checkpoint`
    Warns as `load_checkpoint` does of a licence that forbids commercial use. Raises CheckpointError if the model is not
    recognised, is not `model`, or has no such layout, or if the file does not say enough for that layout.
    """
    first = checkpoint.first
    found = recognise(first, hint(checkpoint))
    if model is None and not found.candidates:
        how = part_hint(first, checkpoint.path) or ": give --model or --part"
        raise CheckpointError(f"{checkpoint.path} is not a model of the zoo as it is{how}")
    named, model = model, model or found.model
    classes = {class_of(name) for name in ([model] if model else (name for name, _ in found.candidates))}
    if len(classes) > 1:
        raise CheckpointError(f"{checkpoint.path} is {found.message}, with --model")
    (cls,) = classes
    target = next((layout for layout in layouts_of(cls) if layout.name == to), None)
    if target is None:
        known = ", ".join(layout.name for layout in layouts_of(cls))
        raise CheckpointError(f"{cls.__name__} has no layout {to!r}, only {known}")
    layout, entry, ours = select(checkpoint, cls, weights)
    try:
        state = target.to_theirs(ours, constants=True)
    except ValueError as error:
        raise CheckpointError(f"{checkpoint.path} cannot be written in layout {to!r}: {error}") from error
    if named is not None:
        _check_model(checkpoint.path, ours, named)
    rows, _ = releases_in(checkpoint.path, checkpoint.meta, found, model)
    named = [r for r in by_name(checkpoint.path, checkpoint.meta) if r.model == model]
    release = next((r for r in named if r in rows or not r.loadable), None)  # those of dense models are parts of files
    warn_of_licence(release)
    # parts of one tensor share its memory, which safetensors does not write
    return Converted({key: value.clone().contiguous() for key, value in state.items()}, model, layout, entry, release)


def _check_model(path: str, state: Mapping[str, Tensor], model: str) -> None:
    """Raise CheckpointError if a state dict under our names could not be loaded into a variant."""
    args, conv = variants()[model], state[CONV].shape if CONV in state else ()
    if len(conv) == 4 and conv[1]:
        args["in_chans"] = conv[1]
    with torch.device("meta"):
        shapes, built = {name: torch.empty(tensor.shape) for name, tensor in state.items()}, class_of(model)(**args)
    want = built.state_dict()
    tables = [name for name, tensor in shapes.items() if name in want and is_table(name, tensor.shape)]
    same = [name for name in tables if shapes[name].shape[0] == want[name].shape[0]]
    shapes |= {name: want[name] for name in same}  # of other windows or images
    half = (built.head.fc.state_dict(prefix="head.fc.").keys() - state.keys()) if "head.fc.weight" in state else ()
    try:
        fit(shapes, built)
    except CheckpointError as error:
        raise CheckpointError(f"{path} is not {model}, as --model says: {error}") from error
    if half:
        raise CheckpointError(f"{path} is not {model}, as --model says: its classifier has no {listed(half)}")


def write(out: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str], wrapper: str | None) -> None:
    """Write safetensors with metadata, or use torch.save, with the weights bare or under the key `wrapper`."""
    if out.suffix == ".safetensors":
        save_tensors(state, out, {"format": "pt", **metadata})
        return
    write_whole(out, lambda file: torch.save({wrapper: dict(state)} if wrapper else dict(state), file))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m zoo.convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, metavar="IN", help="a weights file")
    parser.add_argument("out", type=Path, metavar="OUT", help=f"a file whose name ends in {ENDINGS}")
    parser.add_argument("--to", choices=NAMES, default=OURS.name, help="the layout to write (%(default)s)")
    parser.add_argument("--model", metavar="NAME", help="a model of the zoo; default: as recognised")
    parser.add_argument("--weights", choices=("auto", "raw", "ema"), default="auto", help="which of the file's weights")
    parser.add_argument("--part", metavar="NAME", help="convert only this part of the file, such as backbone")
    parser.add_argument("--wrapper", metavar="KEY", help="write {KEY: weights}, as the authors' programs read it")
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")
    args = parser.parse_args(argv)
    if args.out.suffix not in SUFFIXES:
        parser.error(f"OUT is {args.out}: its name must end in {ENDINGS}")
    if args.wrapper == "":
        parser.error("--wrapper is empty: expected a key, such as state_dict")
    if args.wrapper and args.out.suffix == ".safetensors":
        parser.error("--wrapper is for .pth and the like: a safetensors file has no key around the weights")
    if args.model is not None and args.model not in variants():
        parser.error(f"no model is called {args.model}: expected one of {', '.join(variants())}")
    return args


def _known(made: Converted) -> dict[str, str]:
    """What is known of the weights, for the metadata."""
    licence = made.release and made.release.licence
    known = {"model": made.model, "release": made.release and made.release.name, "license": licence}
    return {key: value for key, value in known.items() if value}


@plain_warnings()
@tool
def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        source = read(args.source)
        part = args.part or only_part(source)
        checkpoint, left_out = part_of(source, part)
        made = convert(checkpoint, to=args.to, model=args.model, weights=args.weights)
        metadata = {"layout": args.to, "weights": made.entry, "source": printable(args.source.name)}
        metadata |= {"source_sha256": sha256(args.source)} | _known(made)
        with whole(args.out, force=args.force) as temporary:
            write(temporary, made.state, metadata, args.wrapper)
    except CheckpointError as error:
        print(error, file=sys.stderr)
        return 2
    name = made.model or "one of several models that their weights do not tell apart"
    which = f"{args.source}{f', part {part!r}' if part else ''}"
    what = f"{name}, {made.entry} weights{where(checkpoint, made.entry)}"
    print(printable(f"{which}: {what}, layout {made.source_layout!r} -> {args.to!r}"))
    if left_out:
        print(printable(f"left out: {', '.join(left_out)}"))
    print(printable(f"written: {args.out}, {len(made.state)} tensors, {args.out.stat().st_size:,} bytes"))
    return 0
