"""Read sharded checkpoints without executing anything in them.

torch.distributed.checkpoint stores its index as a pickle, and values that are not tensors as files that torch.load
would unpickle without restriction. Here the index may only name the classes that torch itself writes there, and
everything else is limited to tensors and plain values.
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
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

# what an index is made of: modules, and the names in them
KNOWN = {
    "torch.distributed.checkpoint.metadata": {
        *("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta"),
        *("TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"),
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))},
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"},
}

YOUNGER = ("class_weights",)  # tensors of models that older checkpoints lack; the configuration determines them too


class Refused(pickle.UnpicklingError):
    """A sharded checkpoint asks for something that no such checkpoint needs."""


class _Index(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in KNOWN.get(module, ()):
            raise Refused(f"it asks for {module}.{name}, which no checkpoint index contains; nothing was executed")
        return super().find_class(module, name)


class Reader(dcp.FileSystemReader):
    """Reads what `torch.distributed.checkpoint.save` wrote into a folder. Raises Refused for any other class."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        metadata = _Index(io.BytesIO((Path(self.path) / ".metadata").read_bytes())).load()
        if not isinstance(metadata, Metadata):
            raise Refused(f"the index of {self.path} is a {type(metadata).__name__}, not Metadata")
        inside = {Path(self.path).resolve()}
        for info in metadata.storage_data.values():
            if (Path(self.path) / info.relative_path).resolve().parent not in inside:
                raise Refused(f"its index names {info.relative_path!r}, which is outside its folder")
        if getattr(metadata, "storage_meta", None) is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class Planner(dcp.DefaultLoadPlanner):
    """Load planner that only accepts plain values beside tensors."""

    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        torch.load(value, weights_only=True)  # raises where there is more than that, which torch would then unpickle
        value.seek(0)
        super().load_bytes(read_item, value)


def load(states: dict[str, Any], folder: Path) -> None:
    """Fill nested state dicts of matching names and shapes, sharded or whole, from the folder. Raises Refused.

    Entries that an older checkpoint lacks (YOUNGER) are removed from them. All processes of a run must call this.
    """
    index = Reader(folder).read_metadata().state_dict_metadata  # torch 2.9 does not say why there is no index
    for part, state in states.items():
        for name in YOUNGER:
            if f"{part}.{name}" not in index:
                state.pop(name, None)
    _fill(states, folder)


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
