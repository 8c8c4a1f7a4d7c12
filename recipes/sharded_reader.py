"""Read sharded checkpoints without executing anything in them.

torch.distributed.checkpoint stores its index as a pickle, and values that are not tensors as files that torch.load
would unpickle without restriction. Here the index may only name the classes that torch itself writes there, of which
none is used before everything in the index has been checked, and all else is limited to tensors and plain values.
"""

from __future__ import annotations

import io
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from zoo import pickled

# what an index is made of: modules, and the names in them that become records, as those of `pickled.PATHS` do
RECORDS = {
    "torch.distributed.checkpoint.metadata": {
        *("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta"),
        *("TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"),
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
}
# what becomes a value; none of these can be changed by what the pickle does next
VALUES = {
    "torch": {"Size": tuple} | {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)},
    "collections": {"OrderedDict": dict},
}

YOUNGER = ("class_weights",)  # tensors of models that older checkpoints lack; the configuration determines them too
YOUNGER_OPTIONS = ("ends_scale",)  # the same of an optimiser's groups, which go on without, as they were begun


class Refused(pickle.UnpicklingError):
    """A sharded checkpoint asks for something that no such checkpoint needs, or is damaged."""


class _Record:
    """An instance of a class that an index names, as data: its state."""

    kind = ""

    def __init__(self, *_: Any) -> None:
        self.state: Any = {}

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Index(pickle.Unpickler):
    """Makes records in place of torch's instances: a pickle can set attributes of a class, for the whole process."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.kinds: dict[str, type[_Record]] = {}

    def find_class(self, module: str, name: str) -> Any:
        if name in VALUES.get(module, ()):
            return VALUES[module][name]
        if name not in RECORDS.get(module, ()) and f"{module}.{name}" not in pickled.PATHS:
            raise Refused(f"it asks for {module}.{name}, which no checkpoint index contains; nothing was executed")
        return self.kinds.setdefault(name, type(name, (_Record,), {"kind": name}))


class Reader(dcp.FileSystemReader):
    """Reads what `torch.distributed.checkpoint.save` wrote into a folder. Raises Refused for anything else."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        metadata = _read_index(Path(self.path))
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return metadata


def _read_index(folder: Path) -> Metadata:
    content = (folder / ".metadata").read_bytes()
    try:
        made = _Index(io.BytesIO(content)).load()
    except Refused:
        raise
    # the kinds that Python's documentation names for damaged pickles, and those of calls with unsuitable arguments
    except (
        *(pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError),
        *(KeyError, TypeError, ValueError, MemoryError, OverflowError, RecursionError),
    ) as error:
        raise Refused(f"its index, {folder / '.metadata'}, is damaged: {str(error) or type(error).__name__}") from error
    index = _state(made, "Metadata")
    tensors = _mapping(index.get("state_dict_metadata"))
    places = dict(map(_place, _mapping(index.get("storage_data")).items()))
    found = {_of(str, name): _entry(name, item, places) for name, item in tensors.items()}
    _check_files(folder, places)
    keys = {name: _of(tuple, key) for name, key in _mapping(index.get("planner_data")).items()}
    if any(type(word) not in (str, int) for key in keys.values() for word in key):
        raise Refused("its index has keys of state dicts that are neither text nor numbers")
    version = index.get("version")
    return Metadata(found, keys, places, version=None if version is None else _of(str, version))


def _entry(
    name: str, item: Any, places: dict[MetadataIndex, _StorageInfo]
) -> TensorStorageMetadata | BytesStorageMetadata:
    """What an index says of a tensor or of another value, all of which must be in the files."""
    if isinstance(item, _Record) and item.kind == "BytesStorageMetadata":
        if MetadataIndex(name) not in places:
            raise Refused(f"its index does not say where {name} is")
        return BytesStorageMetadata()
    tensor = _state(item, "TensorStorageMetadata")
    properties, size = _state(tensor.get("properties"), "TensorProperties", tuple), _size(tensor.get("size"))
    chunks = [_state(chunk, "ChunkStorageMetadata") for chunk in _of(list, tensor.get("chunks"))]
    found = [ChunkStorageMetadata(_size(chunk.get("offsets")), _size(chunk.get("sizes"))) for chunk in chunks]
    filled = {chunk.offsets: chunk.sizes.numel() for chunk in found if chunk.sizes.numel()}
    inside = all(
        len(size) == len(chunk.offsets) == len(chunk.sizes)
        and all(start + count <= side for start, count, side in zip(chunk.offsets, chunk.sizes, size, strict=True))
        for chunk in found
    )
    if not inside or sum(filled.values()) != size.numel():
        raise Refused(f"its index has parts of {name} that are not all of its {tuple(size)}")
    if not all(MetadataIndex(name, offsets) in places for offsets in filled):
        raise Refused(f"its index does not say where all parts of {name} are")
    return TensorStorageMetadata(TensorProperties(_of(torch.dtype, next(iter(properties), None))), size, found)


def _place(item: tuple[Any, Any]) -> tuple[MetadataIndex, _StorageInfo]:
    key, place = _state(item[0], "MetadataIndex"), _state(item[1], "_StorageInfo")
    offset, number = key.get("offset"), key.get("index")
    index = MetadataIndex(
        _of(str, key.get("fqn")),
        None if offset is None else _size(offset),
        None if number is None else _of(int, number),
    )
    if place.get("transform_descriptors"):
        raise Refused(f"its index says that {index.fqn} is compressed, which no checkpoint of a run is")
    begin, length = _size((place.get("offset"), place.get("length")))
    return index, _StorageInfo(_of(str, place.get("relative_path")), begin, length)


def _check_files(folder: Path, places: dict[MetadataIndex, _StorageInfo]) -> None:
    ends: dict[str, int] = {}
    for place in places.values():
        ends[place.relative_path] = max(ends.get(place.relative_path, 0), place.offset + place.length)
    for name, end in ends.items():
        # also where a link leads out
        if {"/", "\\", "\0"} & set(name) or (folder / name).resolve().parent != folder.resolve():
            raise Refused(f"its index names {name!r}, which is outside its folder")
        if not (folder / name).is_file():
            raise Refused(f"{folder / name} is missing")
        held = (folder / name).stat().st_size
        if held < end:
            raise Refused(f"{folder / name} is cut off: it has {held:,} bytes and should have {end:,}")


def _of(kind: type, value: Any) -> Any:
    if type(value) is not kind:
        raise Refused(f"its index has a {type(value).__name__} where a {kind.__name__} belongs")
    return value


def _mapping(value: Any) -> dict[Any, Any]:
    return {} if value is None else _of(dict, value)


def _state(item: Any, kind: str, form: type = dict) -> Any:
    """The state of a record of this kind."""
    if not isinstance(item, _Record) or item.kind != kind:
        raise Refused(f"its index has a {getattr(item, 'kind', type(item).__name__)} where a {kind} belongs")
    return _of(form, item.state)


def _size(value: Any) -> torch.Size:
    numbers = _of(tuple, value)
    if len(numbers) > 64 or not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
        raise Refused("its index has a size or an offset that cannot be one")
    return torch.Size(numbers)


class Planner(dcp.DefaultLoadPlanner):
    """Load planner that only accepts plain values beside tensors."""

    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        torch.load(value, weights_only=True)  # raises where there is more than that, which torch would then unpickle
        value.seek(0)
        super().load_bytes(read_item, value)


def load(states: dict[str, Any], folder: Path) -> None:
    """Fill nested state dicts of matching names and shapes, sharded or whole, from the folder. Raises Refused.

    Entries that an older checkpoint lacks (YOUNGER, YOUNGER_OPTIONS) are removed from them. All processes of a run must
    call this.
    """
    index = Reader(folder).read_metadata().state_dict_metadata  # torch 2.9 does not say why there is no index
    for part, state in states.items():
        _remove_younger(state, YOUNGER, part, index)
        for place, group in enumerate(state.get("param_groups", ())):
            _remove_younger(group, YOUNGER_OPTIONS, f"{part}.param_groups.{place}", index)
    _fill(states, folder)


def _remove_younger(entries: dict[str, Any], younger: tuple[str, ...], path: str, index: dict[str, Any]) -> None:
    for name in younger:
        if f"{path}.{name}" not in index:
            entries.pop(name, None)


def check(folder: Path) -> None:
    """Raise Refused unless the folder holds all that its index promises."""
    _read_index(folder)


def names(folder: Path, part: str) -> dict[str, TensorStorageMetadata]:
    """Shape and dtype of every tensor in the state dict that was saved as `part`; empty if there is none.

    Raises Refused.
    """
    index = Reader(folder).read_metadata().state_dict_metadata
    found = {key.removeprefix(f"{part}."): value for key, value in index.items() if key.startswith(f"{part}.")}
    return {name: value for name, value in found.items() if isinstance(value, TensorStorageMetadata)}


def whole(folder: Path, part: str) -> dict[str, Tensor]:
    """The tensors of the state dict that was saved as `part`, assembled on the CPU by this process alone.

    Raises Refused.
    """
    known = names(folder, part)
    promised = sum(info.size.numel() * info.properties.dtype.itemsize for info in known.values())
    held = sum(file.stat().st_size for file in folder.iterdir())
    if promised > held:  # before memory is asked for
        raise Refused(f"its index declares {promised:,} bytes of {part}, but {folder} holds only {held:,}")
    state = {name: torch.empty(info.size, dtype=info.properties.dtype) for name, info in known.items()}
    _fill({part: state}, folder, no_dist=True)
    return state


def _fill(states: dict[str, Any], folder: Path, *, no_dist: bool = False) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # a single process is intended
        dcp.load(states, storage_reader=Reader(folder), planner=Planner(), no_dist=no_dist)
