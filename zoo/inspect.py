"""Show what weights files contain: model, layout, wrapper, epoch, and what is missing or left over.

    python -m zoo.inspect gcvit_1k_tiny.pth.tar
    python -m zoo.inspect downloads --json

No tensor is loaded and nothing in a file is run; a file is read once, for its SHA-256. The exit code is 1 if a file
cannot be read.
"""

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ops.tool import ToolError, tool

from .described import TensorInfo
from .errors import CheckpointError, listed, printable
from .fetch import by_name
from .files import SUFFIXES, sha256, weights_in
from .formats import shared_out
from .heads.recognise import KINDS, recognise_dense, task_of_own
from .reader import describe
from .recognise import closest, compare, hint, parts, recognise, recognised_part, sole_part, without_prefix

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def inspect(path: Path, *, keys: bool = False) -> dict[str, Any]:
    """What a file contains, ready for JSON; `error` if it cannot be read. `keys`: also every name, type and shape."""
    said: dict[str, Any] = {"file": str(path)}
    try:
        if path.is_file():
            said |= {"bytes": path.stat().st_size, "sha256": sha256(path)}
        found = describe(path)
    except CheckpointError as error:
        return said | {"error": str(error)}
    except OSError as error:
        return said | {"error": printable(f"{path} cannot be read: {error.strerror}")}
    said |= {"format": found.format, "weights": {kind: ".".join(place) for kind, place in found.places.items()}}
    said |= _what(found.first, hint(found)) | {"meta": found.meta}
    said["release"] = release(path, found.meta, said["models"], said["sha256"])
    return said | ({"keys": {kind: _keys(state) for kind, state in found.entries.items()}} if keys else {})


def _keys(state: Mapping[str, TensorInfo]) -> dict[str, str]:
    return {key: f"{_kind(info)} {list(info.shape)}" for key, info in state.items()}


def _kind(info: TensorInfo) -> str:
    return str(info.dtype).removeprefix("torch.")


def _what(wrapped: Mapping[str, TensorInfo], name: str) -> dict[str, Any]:
    """Prefix, model, layout and sizes of a state dict; what is missing or left over compared with the closest model."""
    state = without_prefix(wrapped)
    if part := sole_part(state):
        state = {key.removeprefix(f"{part}."): info for key, info in state.items()}
    found = recognise(state, name)
    said: dict[str, Any] = {"prefix": _prefix(wrapped, state), "tensors": len(wrapped), "parts": dict(parts(state))}
    said |= {"summary": found.message, "model": found.model, "models": [model for model, _ in found.candidates]}
    said |= {"layout": found.candidates[0][1] if found.candidates else None, "classes": found.classes}
    learned = [i for key, i in state.items() if i.dtype.is_floating_point and not key.endswith(STATISTICS)]
    said |= {"parameters": sum(i.numel for i in learned), "dtypes": dict(Counter(map(_kind, state.values())))}
    if not found.candidates:
        said |= _dense(state, name)
        if inner := recognised_part(state, name):
            return said | {"part": f"{inner[0]}: {inner[1].message}"}
    near = None if found.candidates and found.exact else closest(state)
    if near is not None:
        model, layout, shapes = near
        names = ("missing", "left_over", "of_another_shape")
        said |= {"closest": model, "layout": layout} | dict(zip(names, compare(shapes, model), strict=True))
    return said


def _dense(state: Mapping[str, TensorInfo], name: str) -> dict[str, Any]:
    """What is known of a whole segmenter or detector; empty for anything else."""
    if found := recognise_dense(state, name):
        return {"summary": found.message, "classes": found.classes, "task": found.task}
    task = task_of_own(state)
    return {"summary": f"a {KINDS[task]} in the zoo's names", "task": task} if task else {}


def _prefix(wrapped: Mapping[str, TensorInfo], state: Mapping[str, TensorInfo]) -> str:
    """The prefix of every name; the counter of an average has none."""
    first = next(iter(state), "")
    return next((key.removesuffix(first) for key in wrapped if key.endswith(first)), "")


def release(path: Path, meta: Mapping[str, Any], models: Sequence[str], digest: str) -> str | None:
    """The release that a file is, or was converted from, by its names, why it is not ours to load, if it is not, and
    whether the SHA-256 is the same, as far as the source gives it; None if the file holds other `models`.
    """
    found = next((r for r in by_name(path, meta) if not models or r.model in models), None)
    if found is None:
        return None
    about = f"{found.source}: {found.foreign}" if found.foreign else found.source
    said, source = f"{found.name} ({about})", meta.get("source_sha256")
    if isinstance(source, str):  # possibly of a file that was itself converted
        same = found.sha256 and source.startswith(found.sha256)
        return f"{said}, converted{' from the same SHA-256' if same else ''}"
    if not found.sha256:
        return said
    return f"{said}, {'the same' if digest.startswith(found.sha256) else 'DIFFERENT'} SHA-256"


def files(paths: Iterable[Path]) -> list[Path]:
    """The given files, and those that `weights_in` finds in the given folders.

    A folder that is a sharded checkpoint stands for itself.
    """
    return [file for path in paths for file in _in(path)]


def _in(path: Path) -> list[Path]:
    try:
        return weights_in(path) if path.is_dir() and not shared_out(path) else [path]
    except OSError:  # a folder that cannot be read, or an invalid name: `inspect` says so
        return [path]


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m zoo.inspect", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="weights files, or folders of them")
    parser.add_argument("--keys", action="store_true", help="also list every name, type and shape")
    parser.add_argument("--json", action="store_true", help="print a JSON list instead of tables")
    return parser.parse_args(argv)


@tool
def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    paths = files(args.files)
    if not paths:
        print(f"no weights file ({', '.join(SUFFIXES)}) in {', '.join(map(str, args.files))}", file=sys.stderr)
        return 1
    found = [inspect(path, keys=args.keys) for path in paths]
    if args.json:
        print(json.dumps(found, indent=1))
    else:
        show(found)
    return int(any("error" in said for said in found))


def show(found: list[dict[str, Any]]) -> None:
    """Print what `inspect` found: one table of several files, or one of a single file."""
    try:
        from rich.console import Console
    except ModuleNotFoundError:
        raise ToolError("tables need rich: pip install rich, or use --json") from None
    console = Console(emoji=False)  # of names with colons
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = 160  # there is no screen with a width
    console.print(_one(found[0]) if len(found) == 1 else _several(found))
    for said in found:
        for kind, keys in said.get("keys", {}).items():
            console.print(_table([f"{said['file']}: {kind}", "type and shape"], keys.items()))
        if "error" in said and len(found) > 1:
            console.print(said["error"], markup=False, highlight=False)


def _table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(show_edge=False, pad_edge=False)  # a SHA-256 fits into a line of 80 columns
    for column in columns:
        table.add_column(Text(printable(column)), overflow="fold")  # names may contain what rich takes for markup
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    return table


def _several(found: Sequence[Mapping[str, Any]]) -> Any:
    columns = ("file", "model", "layout", "weights", "M", "classes", "epoch", "release")
    names = Counter(Path(said["file"]).name for said in found)
    return _table(columns, (_row(said, names) for said in found))


def _row(said: Mapping[str, Any], names: Mapping[str, int]) -> list[str]:
    name = Path(said["file"]).name
    name = said["file"] if names[name] > 1 else name  # model.safetensors of several folders
    if "error" in said:
        return [name, "cannot be read", *[""] * 6]
    near = said["summary"] if "task" in said else said.get("part", "not in the zoo")
    near = f"closest: {said['closest']}" if "closest" in said else near
    cells = [
        name,
        said["model"] or " or ".join(said["models"]) or near,
        said["layout"] or "",
        ", ".join(said["weights"]),
    ]
    cells += [f"{said['parameters'] / 1e6:.1f}", str(said["classes"] or ""), _cut(str(said["meta"].get("epoch", "")))]
    return [*cells, said["release"] or ""]


def _one(said: Mapping[str, Any]) -> Any:
    shown = {
        key: value for key, value in said.items() if key not in ("file", "keys") and value not in (None, [], {}, "")
    }
    return _table(["", said["file"]], [(key.replace("_", " "), _cell(key, value)) for key, value in shown.items()])


def _cell(key: str, value: Any) -> str:
    if key == "meta":
        return "\n".join(f"{_cut(name)}: {_cut(json.dumps(item))}" for name, item in value.items())
    if key in ("missing", "left_over", "of_another_shape"):
        return f"{len(value)}: {listed(value)}"
    if key == "weights":
        return ", ".join(f"{kind} ({_cut(place) or 'bare'})" for kind, place in value.items())
    if isinstance(value, dict):
        return ", ".join(f"{name} {count}" for name, count in value.items())
    return f"{value:,}" if isinstance(value, int) else ", ".join(value) if isinstance(value, list) else str(value)


def _cut(text: str) -> str:
    """At most 200 characters: text from a file may have millions."""
    return text if len(text) < 200 else f"{text[:200]} ..."


if __name__ == "__main__":
    sys.exit(main())
