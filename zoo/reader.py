"""Reads the tensors of a weights file without running anything that is in it.

First the file is described: its pickle is followed without calling anything (`pickled.py`), and every size, shape and
offset in it is checked. Only then does torch or safetensors read the tensors, mapped from the file where its format
allows.
"""

import os
import stat
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from . import archive, described, pickled
from .described import Other, Storage, TensorInfo
from .errors import CheckpointError, listed
from .files import unreadable, weights_in
from .formats import shared_out, unfinished, what_else

# where training programs put the weights, and their moving average
RAW = (
    *("model", "state_dict", "model_state_dict", "module", "net", "network", "params", "weights", "student"),
    "checkpoint",
)
EMA = ("model_ema", "state_dict_ema", "ema", "ema_state_dict", "params_ema", "teacher", "ema_model")
OPTIMIZERS = ("optimizer", "optimizers", "lr_scheduler", "scheduler", "scaler", "amp", "loss_scaler")

LONGEST = 4000  # characters of a message: the keys and names that a file gives may have millions
LEGACY = 0x1950A86A20F9469CFC6C  # what files of torch.save began with before they were zip archives
SAFE_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


class Inert:
    """Stands in for harmless foreign classes when torch reads a file: accepts anything, keeps nothing."""

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _default(*factory: Any) -> OrderedDict:
    """A defaultdict without its factory, of a type that torch can fill."""
    return OrderedDict()


# torch must know the names that `pickled.py` lets through; none of them is imported
_INERT = (*pickled.RECORDS, *pickled.PATHS, *pickled.NUMPY, *pickled.SCALAR, *pickled.ARRAY, *pickled.TIMES)
_FACTORIES = (f"builtins.{name}" for name in pickled.FACTORIES)
ALIASES: list[Any] = [
    *((Inert, name) for name in (*_INERT, *_FACTORIES)),
    *((OrderedDict, name) for name in pickled.MAPPINGS),
    (_default, pickled.DEFAULT),
]
_ALIASED = threading.Lock()  # torch keeps one list of them for all threads


@dataclass(frozen=True)
class Description:
    """What a file holds, without its tensors.

    format   "zip", "legacy" (torch before 1.6) or "safetensors"
    entries  state dicts by kind, "raw" and "ema": name -> type and shape
    places   kind -> the keys that lead to that state dict in the file, outermost first
    meta     plain data beside the weights: epoch, results, arguments; for a safetensors file its metadata
    """

    path: str
    format: str
    entries: dict[str, dict[str, TensorInfo]]
    places: dict[str, tuple[str, ...]]
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def first(self) -> dict[str, TensorInfo]:
        """The raw weights, or the average of a file that has only this, or that others evaluate by it (MMEngine's)."""
        return next(iter(self.entries.values()))


@dataclass
class Checkpoint:
    """What a file holds: `entries` are its state dicts by kind, "raw" and "ema"; the rest as in `Description`."""

    path: str
    entries: dict[str, dict[str, Tensor]]
    meta: dict[str, Any] = field(default_factory=dict)
    places: dict[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def first(self) -> dict[str, Tensor]:
        """As of a `Description`."""
        return next(iter(self.entries.values()))


def read(path: str | Path) -> Checkpoint:
    """Read .safetensors, or anything that `torch.save` wrote, bare or inside a training checkpoint.

    Raises CheckpointError for a file that is missing, empty, truncated, not a checkpoint or without weights, or that
    names anything other than tensors and plain data.
    """
    found = describe(path)
    tensors = load_file(path) if found.format == "safetensors" else _torch_load(Path(path), found.format)
    entries = {}
    for kind, state in found.entries.items():
        entries[kind] = _as_described(tensors, found.places[kind], state, found.path)
    return Checkpoint(found.path, entries, found.meta, found.places)


def where(checkpoint: Checkpoint, kind: str) -> str:
    """For messages: the keys that lead to the weights of a kind, if they are not under one of the usual names."""
    place = checkpoint.places.get(kind, ())
    return f" under {'.'.join(place)[:80]!r}" if place and place[0] not in (*RAW, *EMA) else ""


def _as_described(
    content: Any, place: tuple[str, ...], state: Mapping[str, TensorInfo], path: str
) -> dict[str, Tensor]:
    """The state dict at `place` in what was read. Raises CheckpointError if it is not the one that was described."""
    for key in place:
        content = content.get(key) if isinstance(content, Mapping) else None
    read = content if isinstance(content, Mapping) else {}
    if other := [name for name, info in state.items() if not _is(read.get(name), info)]:
        raise CheckpointError(
            f"{path} was checked, and then something else was read from it: {len(other)} of {len(state)} tensors are "
            f"missing or have another type or shape, {listed(name[:80] for name in other)}. Refused"
        )
    # tensors that were saved as parameters require gradients, which no copy of a model may hold
    return {name: read[name].detach() for name in state}


def _is(value: Any, info: TensorInfo) -> bool:
    return isinstance(value, Tensor) and value.dtype == info.dtype and tuple(value.shape) == info.shape


def describe(path: str | Path) -> Description:
    """What a weights file holds, without reading its tensors. Raises CheckpointError as `read` does."""
    path = Path(path)
    try:
        _check_file(path)
        kind, content, meta = _content(path)
        described.check(content, path.stat().st_size)
        found = _entries(content)
        meta |= _beside(content, found)
    except CheckpointError as error:
        raise CheckpointError(f"{path} {str(error)[:LONGEST]}") from error
    except PermissionError as error:
        raise CheckpointError(unreadable(error.filename or path, error)) from error
    except Exception as error:
        # a broken file can fail anywhere in its reader, with any exception
        why = f"{type(error).__name__}: {error}"[:300]
        raise CheckpointError(
            f"{path} ({path.stat().st_size:,} bytes) cannot be read: truncated, or not a checkpoint ({why})"
        ) from error
    if not found:
        raise CheckpointError(f"{path} holds no state dict: expected tensors by name, found {_held(content)}")
    states = {kind: state for kind, (_, state) in found.items()}
    return Description(str(path), kind, states, {kind: place for kind, (place, _) in found.items()}, meta)


def _check_file(path: Path) -> None:
    """Raise CheckpointError for anything but a regular file, which can be read at any offset."""
    try:
        kind = path.stat().st_mode
    except PermissionError:
        raise
    except OSError as error:
        why = "" if isinstance(error, FileNotFoundError) else f" ({error.strerror})"
        raise CheckpointError(f"does not exist{why}; expected a weights file") from error
    if why := shared_out(path):
        raise CheckpointError(why)
    if stat.S_ISDIR(kind):
        raise CheckpointError(f"is a folder; expected a weights file{_inner(path)}")
    if not stat.S_ISREG(kind):
        raise CheckpointError("is a pipe or a device; expected a weights file: save it as a file first")


def _inner(folder: Path) -> str:
    """For messages: the weights in a folder. Raises PermissionError."""
    try:
        found = listed(str(file.relative_to(folder)) for file in weights_in(folder))
    except PermissionError:
        raise
    except OSError as error:
        return f"; {unreadable(error.filename or folder, error)}"
    return f", one of {found}" if found else ""


def _content(path: Path) -> tuple[str, Any, dict[str, Any]]:
    """Format, described content and metadata of a file."""
    with path.open("rb") as file:
        head = file.read(512)
    if len(head) < 9:
        raise CheckpointError("is empty" if not head else "is too short to be a checkpoint")
    if hint := unfinished(path):
        raise CheckpointError(hint)
    if head[8:9] == b"{":  # after a number, which may look like the beginning of another format
        return "safetensors", *_safetensors(path)
    if head.startswith(b"PK"):
        return "zip", archive.content(path), {}
    if head.startswith(b"\x80"):
        return "legacy", _legacy(path), {}
    raise CheckpointError(what_else(head))


def _safetensors(path: Path) -> tuple[dict[str, TensorInfo], dict[str, Any]]:
    if not _is_text(path):
        raise CheckpointError("has a name that is not valid UTF-8, which safetensors cannot open: rename it")
    try:
        with safe_open(path, framework="pt") as file:
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            state = {name: TensorInfo(SAFE_DTYPES[p.get_dtype()], tuple(p.get_shape())) for name, p in parts.items()}
            return state, dict(file.metadata() or {})
    except SafetensorError as error:
        raise CheckpointError(f"is a damaged safetensors file: {str(error)[:300]}") from error
    except KeyError as error:
        raise CheckpointError(f"holds tensors of an unsupported type, {error}: convert them to float32") from error


def _legacy(path: Path) -> Any:
    """A file of torch before 1.6: magic number, version, machine, content, keys of the storages, and their bytes."""
    storages: dict[str, Storage] = {}

    def note(identity: Any) -> Storage:
        storage, key = archive.identified(identity)
        if storages.setdefault(key, storage) != storage:
            raise CheckpointError(f"gives storage {key!r} two sizes: refused")
        return storage

    with path.open("rb") as file:
        first = pickled.describe(file, note)
        if first != LEGACY:
            described.check(first, path.stat().st_size)
            what = f"found {_held(first)}. Load it where it was made and save its tensors"
            raise CheckpointError(f"is a pickle, but not one of torch.save: {what}")
        for _ in range(2):
            pickled.describe(file, note)
        content, keys = pickled.describe(file, note), pickled.describe(file, note)
        _check_storages(file, storages, keys)
    return content


def _check_storages(file: BinaryIO, storages: dict[str, Storage], keys: Any) -> None:
    """Check the storages, which follow the pickles, each after its number of elements."""
    named = isinstance(keys, list) and all(isinstance(key, (str, int)) for key in keys)
    if not named or not storages.keys() <= set(map(str, keys)):
        raise CheckpointError("does not list the storages that its tensors lie in: refused")
    size = os.fstat(file.fileno()).st_size
    for key in keys:
        storage, numel = storages.get(key), int.from_bytes(file.read(8), "little", signed=True)
        left = size - file.tell()
        if storage is None or numel != storage.numel or numel * storage.dtype.itemsize > left:
            said = f"{storage.numel:,} elements" if storage else "nothing"
            raise CheckpointError(
                f"says that storage {key!r} has {said}, but {left:,} bytes are left: truncated, or refused"
            )
        file.seek(numel * storage.dtype.itemsize, os.SEEK_CUR)


def _is_text(path: Path) -> bool:
    """Whether a name is valid UTF-8; Python keeps other bytes as lone surrogates."""
    return not any("\ud800" <= letter <= "\udfff" for letter in str(path))


def _torch_load(path: Path, kind: str) -> Any:
    with _ALIASED, torch.serialization.safe_globals(ALIASES):
        try:
            # torch goes by the name: it would not look for its own format, or not find a file whose name is not UTF-8
            if path.suffix == ".safetensors" or not _is_text(path):
                with path.open("rb") as file:
                    return torch.load(file, map_location="cpu", weights_only=True)
            # mapped, not read: what is not used costs no memory
            return torch.load(path, map_location="cpu", weights_only=True, mmap=kind == "zip")
        except Exception as error:
            why = f"{type(error).__name__}: {error}"[:300]
            raise CheckpointError(f"{path} cannot be read by torch ({why})") from error


Found = dict[str, tuple[tuple[str, ...], dict[str, TensorInfo]]]


def _entries(content: Any) -> Found:
    """Kind -> the keys that lead to its state dict, and the state dict."""
    if not isinstance(content, Mapping):
        return {}
    bare, found = _state(content), {}
    for kind, names in (("raw", RAW), ("ema", EMA)):
        for name in names:
            if kind not in found and (nested := _nested(content.get(name), (name,))):
                found[kind] = nested
    if "steps" in found.get("ema", ((), {}))[1]:
        # MMEngine's: its documentation says that the parameters themselves are saved in the average's place, and its
        # programs evaluate the other entry, which therefore goes first here
        found = {"ema": found["raw"], "raw": found["ema"]} if "raw" in found else found
    if not found and (only := _only(content)):
        found["raw"] = only
    # an epoch, a loss and a best accuracy may be tensors too, and may outnumber the wrapper beside them
    if bare and all(len(state) <= len(bare) for _, state in found.values()):
        return {"raw": ((), bare)}
    return found


def _only(content: Mapping[Any, Any]) -> tuple[tuple[str, ...], dict[str, TensorInfo]] | None:
    """The state dict under a name that is none of the usual ones, if nothing else in the file holds tensors by name."""
    holding = [name for name, value in content.items() if _places({name: value}, _is_state)]
    named = holding[0] if len(holding) == 1 else None
    return _nested(content[named], (named,)) if isinstance(named, str) else None


def _nested(content: Any, place: tuple[str, ...]) -> tuple[tuple[str, ...], dict[str, TensorInfo]] | None:
    """The state dict in `content`, or up to two wrappers deeper: an average is often kept as {"module": ...}."""
    if not isinstance(content, Mapping):
        return None
    state = _state(content)
    inner = [name for name in RAW if isinstance(content.get(name), Mapping)] if len(place) < 3 else []
    deeper = _nested(content[inner[0]], (*place, inner[0])) if inner else None
    if deeper and len(deeper[1]) > len(state):
        return deeper
    return (place, state) if state else None


def _state(content: Mapping[Any, Any]) -> dict[str, TensorInfo]:
    """The tensors of a mapping that is mostly tensors by name."""
    tensors = {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, TensorInfo)}
    return tensors if 2 * len(tensors) > len(content) else {}


def _held(content: Any) -> str:
    """What a file without a state dict holds in its place, for messages."""
    if not isinstance(content, Mapping):
        kinds = {TensorInfo: "a bare tensor", list: "list", tuple: "tuple"}
        found = kinds.get(type(content)) or getattr(content, "name", type(content).__name__)
        return f"{found} of {len(content)}" if isinstance(content, (list, tuple)) else found
    keys = ", ".join(str(key)[:80] for key in list(content)[:20]) or "nothing"
    if arrays := ["itself"] if _is_of_arrays(content) else _places(content, _is_of_arrays):
        return f"NumPy arrays in {listed(arrays)}: if you trust it, load it and save torch.from_numpy of each"
    if inner := _places(content, _is_state):
        return f"{keys}. Tensors lie under {listed(inner)}: save only those with torch.save"
    return keys


def _places(content: Mapping[Any, Any], fits: Callable[[Any], bool], deepest: int = 3) -> list[str]:
    """The keys, with dots between them, that lead to what `fits`; not into the states of optimisers."""
    found = []
    for key, value in content.items():
        if key in OPTIMIZERS or (isinstance(value, Mapping) and "param_groups" in value):
            continue
        if fits(value):
            found.append(str(key)[:80])
        elif isinstance(value, Mapping) and deepest > 1:
            found += [f"{str(key)[:80]}.{inner}" for inner in _places(value, fits, deepest - 1)]
    return found


def _is_state(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(_state(value))


def _is_of_arrays(value: Any) -> bool:
    items = value.values() if isinstance(value, Mapping) else ()
    return 2 * sum(isinstance(item, Other) and item.name == "numpy.ndarray" for item in items) > len(items)


def _beside(content: Any, found: Found) -> dict[str, Any]:
    """Plain data beside the weights, without the states of optimisers."""
    if not isinstance(content, Mapping) or any(not place for place, _ in found.values()):
        return {}
    taken = {place[0] for place, _ in found.values()} | set(OPTIMIZERS)
    kept = {key: value for key, value in content.items() if key not in taken and not _tensors(value)}
    return described.plain(kept)


def _tensors(value: Any) -> bool:
    """Whether this holds weights of something else."""
    return isinstance(value, TensorInfo) or _is_state(value)
