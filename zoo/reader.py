"""Opens a file of weights and gives its tensors, running nothing that is in it."""

import argparse
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from .errors import CheckpointError

# where training programs put the weights, and their moving average
RAW = ("model", "state_dict", "model_state_dict", "module", "net", "network", "params", "weights")
EMA = ("model_ema", "state_dict_ema", "ema", "ema_state_dict", "params_ema")

# Classes that old training programs pickled beside the weights (configurations, arguments, metrics). Names that are not
# of the standard library or numpy are aliased to a harmless class, never imported.
_MULTIARRAY = np._core.multiarray if hasattr(np, "_core") else np.core.multiarray
ALIASES: list[Any] = [
    argparse.Namespace,
    np.dtype,
    np.ndarray,
    *(
        (OrderedDict, name)
        for name in ("yacs.config.CfgNode", "easydict.EasyDict", "mmengine.config.config.ConfigDict")
    ),
    *(
        (OrderedDict, name)
        for name in ("mmcv.utils.config.ConfigDict", "addict.addict.Dict", "mmcv.utils.config.Config")
    ),
    *(
        (getattr(_MULTIARRAY, name), f"numpy.{core}.multiarray.{name}")
        for name in ("scalar", "_reconstruct")
        for core in ("core", "_core")
    ),
    *(
        type(np.dtype(kind))
        for kind in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "?", "U", "S")
    ),
]


@dataclass
class Checkpoint:
    """What a file holds: `entries` are its state dicts by kind, "raw" and "ema"."""

    path: str
    entries: dict[str, dict[str, Tensor]]


def read(path: str | Path) -> Checkpoint:
    """Read .safetensors, or anything that `torch.save` wrote, bare or inside a training checkpoint.

    Raises CheckpointError for a file that is missing, empty, truncated, no checkpoint, without weights, or that names
    anything other than tensors and plain data.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path} is {'a folder' if path.is_dir() else 'not there'}; expected a file of weights")
    try:
        content = _open(path)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        raise CheckpointError(_refusal(path, error)) from error
    except Exception as error:
        # a broken file can fail anywhere in its reader, with anything
        why = f"{type(error).__name__}: {error}"
        raise CheckpointError(
            f"{path} ({path.stat().st_size:,} bytes) cannot be read: truncated, or no checkpoint ({why})"
        ) from error
    entries = _entries(content)
    if not entries:
        held = ", ".join(map(str, content)) if isinstance(content, Mapping) else type(content).__name__
        raise CheckpointError(f"{path} holds no state dict: expected tensors by name, found {held or 'nothing'}")
    return Checkpoint(str(path), entries)


def _open(path: Path) -> Any:
    with path.open("rb") as file:
        head = file.read(9)
    if len(head) < 9:
        raise CheckpointError(f"{path} is {'empty' if not head else 'too short to be a checkpoint'}")
    if head[8:] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size:
        try:
            return load_file(path)
        except SafetensorError as error:
            raise CheckpointError(f"{path} is a damaged safetensors file: {error}") from error
    zipped = head.startswith(b"PK")
    if zipped:
        _refuse_bomb(path)
    with torch.serialization.safe_globals(ALIASES):
        # mapped, not read: a file that is refused later has cost no memory
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)


def _refuse_bomb(path: Path) -> None:
    """torch stores tensors uncompressed; an archive that unfolds to many times its size is no checkpoint."""
    with zipfile.ZipFile(path) as archive:
        unfolded = sum(entry.file_size for entry in archive.infolist())
    if unfolded > 8 * path.stat().st_size + 2**20:
        raise CheckpointError(f"{path} would unfold from {path.stat().st_size:,} to {unfolded:,} bytes; refused")


def _refusal(path: Path, error: Exception) -> str:
    text = str(error)
    name = text.partition("GLOBAL ")[2].partition(" ")[0]
    if not name:
        return f"{path} is not a checkpoint that can be read safely: {text.splitlines()[0]}"
    return (
        f"{path} asks for {name}, which is not data: refused, and nothing of it was run. If you trust its source, "
        f"load it there and save only its state dict (torch.save(model.state_dict(), ...) or safetensors)"
    )


def _entries(content: Any) -> dict[str, dict[str, Tensor]]:
    if not isinstance(content, Mapping):
        return {}
    if state := _state(content):
        return {"raw": state}
    found = {}
    for kind, names in (("raw", RAW), ("ema", EMA)):
        for name in names:
            if name in content and kind not in found and (state := _nested(content[name])):
                found[kind] = state
    return found


def _nested(content: Any) -> dict[str, Tensor]:
    """The state dict in `content`, or one wrapper deeper (an averaged model is often kept as {"module": ...})."""
    if not isinstance(content, Mapping):
        return {}
    inner = next((content[name] for name in RAW if isinstance(content.get(name), Mapping)), {})
    return _state(content) or _state(inner)


def _state(content: Mapping[Any, Any]) -> dict[str, Tensor]:
    """The tensors of a mapping that is mostly tensors by name."""
    tensors = {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, Tensor)}
    return tensors if 2 * len(tensors) > len(content) else {}
