"""Run checkpoints: a folder of safetensors and one JSON file that is written atomically.

    checkpoints/step-00000120/   model.safetensors  ema.safetensors  optimizer.safetensors  state.json
    checkpoints/best-00000080/   model.safetensors  ema.safetensors  state.json

A folder is written under a temporary name in the same place, flushed to disk and renamed. A new best checkpoint is
in place before the old one is removed, so that there always is one. state.json has the length and checksum of every
other file, and a checksum of its own contents. Folders with other names are somebody's copies and stay as they are.
There are no pickles, except where parameters are sharded: then every process writes its part of a step's tensors with
torch.distributed.checkpoint.

    checkpoints/step-00000120/   sharded/.metadata  sharded/__0_0.distcp  sharded/__1_0.distcp  state.json
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import re
import shutil
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from recipes import distributed, json_file, sharded_reader
from recipes.console import say
from recipes.json_file import NUMBER
from recipes.packing import pack, unpack
from zoo.files import entries, is_absent, save_tensors, unreadable

TEMPORARY = ".writing-"
REPLACED = "-before"  # the end of the temporary name of one that is being replaced
CORRUPT = "corrupt-"
SHARDED = "sharded"  # the folder that all processes write together
UNFIT = ("Missing key in checkpoint", "Size mismatch between saved")  # torch's words for what is no damage
CHECKSUM = "crc32"  # in state.json: that of everything else in it, which older checkpoints lack
KINDS = {"step": int, "files": {...: {"bytes": int, "crc32": int}}, CHECKSUM: (int, None)}
OLDER = {  # what is checked without a checksum
    "weights": str, "meter": {...: NUMBER}, "scaler": {...: NUMBER}, "data": (dict, None),
    **dict.fromkeys(("skipped", "overflowed", "averages", "parts"), (int, None)),
}  # fmt: skip


class CheckpointError(RuntimeError):
    """A run checkpoint could not be written or read; the message says which, why, and what remains."""


class Unreadable(CheckpointError):
    """Nothing tells whether there is a checkpoint, or whether it is whole: it cannot be looked at."""


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint on disk whose files have been checked against `state.json`."""

    path: Path
    state: dict[str, Any]

    def tensors(self, part: str) -> dict[str, Tensor]:
        """Tensors of `model`, `ema` or `optimizer` on the CPU; of a sharded one, of `model` or `ema`, assembled.

        Any process may call this alone. Raises CheckpointError if a sharded one holds more than its tensors.
        """
        if self.sharded:
            with self._reading():
                return sharded_reader.whole(self.path / SHARDED, part)
        with safe_open(self.path / f"{part}.safetensors", framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)

    def place(self, part: str) -> Path:
        """The file of a part, or the folder of all parts of a sharded checkpoint."""
        return self.path / (SHARDED if self.sharded else f"{part}.safetensors")

    def tree(self, part: str) -> Any:
        """The nested state dict that `pack` saved as `part`."""
        with safe_open(self.path / f"{part}.safetensors", framework="pt") as file:
            return unpack(json.loads(file.metadata()["tree"]), self.tensors(part))

    def has(self, part: str) -> bool:
        if self.sharded:
            with self._reading():
                return bool(sharded_reader.names(self.path / SHARDED, part))
        return f"{part}.safetensors" in self.state["files"]

    def is_here(self) -> bool:
        """Whether this process finds it too, as the one that opened it did: machines may have folders of one name."""
        try:
            return _checksum(_read_state(self.path)) == _checksum(self.state)
        except (OSError, CheckpointError):
            return False

    @property
    def sharded(self) -> bool:
        """Whether the tensors are sharded, as written by several processes."""
        return f"{SHARDED}/.metadata" in self.state["files"]

    def fill(self, states: dict[str, Any]) -> None:
        """Read a sharded checkpoint into nested state dicts of matching names and shapes, sharded or whole.

        All processes of a run must call this. Raises CheckpointError, on all, if names or shapes do not match, or if
        it holds more than tensors and plain values.
        """
        with self._reading():
            sharded_reader.load(states, self.path / SHARDED)

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except (CheckpointException, sharded_reader.Refused) as error:
            cause = _cause(error)
            advice = "if you remove it, the one before is used"
            if any(text in cause for text in UNFIT):
                advice = "it is of another model, or another version of this program: resume with the one that wrote it"
            raise CheckpointError(f"could not read the checkpoint {self.path}: {cause}; {advice}") from error


def write(path: Path, parts: dict[str, Any], state: dict[str, Any]) -> None:
    """Write the checkpoint `path` from named state dicts and a state that JSON can hold.

    All processes of a run must call this: each writes its part of what is sharded, rank 0 everything else.
    Only the last folder above it may be missing: that of a run, which has been removed then, is not made again.
    Raises CheckpointError, on all, if a disk fails; nothing of the checkpoint is left then.
    """
    temporary = path.with_name(f"{TEMPORARY}{path.name}")
    try:
        distributed.first(lambda: _write_whole(temporary, {k: v for k, v in parts.items() if k != SHARDED}))
        if SHARDED in parts:
            dcp.save(parts[SHARDED], checkpoint_id=temporary / SHARDED)
        distributed.first(lambda: _finish(temporary, path, state))
    except (OSError, SafetensorError, CheckpointException) as error:
        free = distributed.first(lambda: _abandon(temporary))
        disk = f" (free space in {path.parent}: {free})" if _is_unclear(error) else ""
        raise CheckpointError(f"could not write the checkpoint {path}: {_cause(error)}{disk}") from error


def _write_whole(temporary: Path, parts: dict[str, Any]) -> None:
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.parent.mkdir(exist_ok=True)
    temporary.mkdir()
    for name, tree in parts.items():
        _write_part(temporary / f"{name}.safetensors", tree)


def _finish(temporary: Path, path: Path, state: dict[str, Any]) -> None:
    if (temporary / SHARDED).exists():
        _check_shards(temporary / SHARDED)
    found = sorted(file for file in temporary.rglob("*") if file.is_file())
    whole = {**state, "files": {file.relative_to(temporary).as_posix(): _fingerprint(file) for file in found}}
    with open(temporary / "state.json", "w") as file:
        json.dump({**whole, CHECKSUM: _checksum(whole)}, file, indent=1)
        flush(file)
    for folder in {file.parent for file in found} | {temporary}:
        _sync(folder)
    before = temporary.with_name(temporary.name + REPLACED)
    if path.exists():  # a folder cannot be renamed over another; killed in between, `Store.clean` does the rest
        path.rename(before)
    os.rename(temporary, path)
    _sync(path.parent)
    shutil.rmtree(before, ignore_errors=True)


def _check_shards(folder: Path) -> None:
    """Raise OSError unless the parts of all processes are there: one without this folder makes its own elsewhere."""
    try:
        sharded_reader.check(folder)
    except sharded_reader.Refused as error:
        raise OSError(f"{error}; do all machines still share the run's folder?") from error


def _cause(error: BaseException) -> str:
    if isinstance(error, CheckpointException):
        return "; ".join(f"on rank {rank}: {_said(failure)}" for rank, (failure, _) in error.failures.items())
    return str(error)


def _said(failure: BaseException) -> str:
    if isinstance(failure, pickle.UnpicklingError) and not isinstance(failure, sharded_reader.Refused):
        return "it holds something else than tensors and plain values, or is damaged; nothing in it was run"
    return str(failure) or type(failure).__name__


def _is_unclear(error: BaseException) -> bool:
    """Whether torch hides what a disk has reported: its error for a full one is `unexpected pos 704 vs 598`."""
    found = [cause for cause, _ in error.failures.values()] if isinstance(error, CheckpointException) else []
    return any(not isinstance(cause, OSError) for cause in found)


def _abandon(temporary: Path) -> str:
    """Remove what could not be written; returns how much space was free before."""
    try:
        free = f"{shutil.disk_usage(temporary.parent).free / 2**20:.1f} MiB"
    except OSError as error:
        free = f"unknown, {error}"
    shutil.rmtree(temporary, ignore_errors=True)
    return free


def read(path: Path) -> Checkpoint:
    """Open a checkpoint and check its state and every file against the checksums recorded when it was written.

    Raises CheckpointError, which names the file and what is wrong with it: Unreadable unless it is missing or damaged.
    """
    try:
        state = _read_state(path)
        for name, expected in state["files"].items():
            found = _fingerprint(path / name)
            if found != expected:
                raise CheckpointError(f"{path / name} is damaged: it has {found}, but {expected} was written")
    except OSError as error:
        if isinstance(error, IsADirectoryError) or is_absent(error):
            raise CheckpointError(f"{path} is not a complete checkpoint: {type(error).__name__}: {error}") from error
        raise Unreadable(
            f"{unreadable(error.filename or path, error)}; make it readable, or move {path} away to do without it"
        ) from error
    return Checkpoint(path, state)


def _read_state(path: Path) -> dict[str, Any]:
    """The contents of state.json, without their checksum."""
    try:
        state = json_file.read(path / "state.json", KINDS)
        if (written := state.pop(CHECKSUM, None)) is None:
            _check_older(state, best=path.name.startswith("best"))
        elif written != (found := _checksum(state)):
            raise ValueError(f"it has the checksum {found}, but {written} was written")
        if state["step"] != _step(path):
            raise ValueError(f"it is of step {state['step']}, and its folder of step {_step(path)}")
    except ValueError as error:
        raise CheckpointError(f"{path / 'state.json'} is damaged: {error}") from error
    return state


def _check_older(state: dict[str, Any], *, best: bool) -> None:
    """Raise ValueError if what was written without a checksum is not what a run needs."""
    json_file.check(state, {**OLDER, "metrics": {...: NUMBER} if best else None})
    parts = {"model", state["weights"]} | (set() if best else {"optimizer"})
    missing = {f"{part}.safetensors" for part in parts} - state["files"].keys()
    if missing and f"{SHARDED}/.metadata" not in state["files"]:
        raise ValueError(f"it does not list {', '.join(sorted(missing))}")


class Store:
    """The checkpoints of one run: the newest `keep` steps, and the best."""

    def __init__(self, folder: Path, keep: int = 2):
        self.folder, self.keep = folder, max(keep, 1)
        self.own: set[int] = set()  # steps whose checkpoint this process has written or resumed from

    def clean(self) -> None:
        """Remove what a killed run left half-written, after finishing the replacement of a checkpoint."""
        for before in self._unfinished(REPLACED):
            new = before.with_name(before.name.removesuffix(REPLACED))
            path = new.with_name(new.name.removeprefix(TEMPORARY))
            if not path.exists():
                (new if new.exists() else before).rename(path)
        for path in self._unfinished():
            shutil.rmtree(path)

    def save(self, step: int, parts: dict[str, Any], state: dict[str, Any], *, best: bool = False) -> Path:
        """Write `step-<step>` unless this process has it, or `best-<step>`, then remove the ones that it supersedes.

        Any other one of the same name is replaced. A best one is from before a stop, and damaged or with a lower score;
        a step's was left by another run, whose folder was removed while it trained.
        """
        kind = "best" if best else "step"
        path = self.folder / f"{kind}-{step:08d}"
        if best or not distributed.first(lambda: step in self.own and path.exists()):
            write(path, parts, {"step": step, **state})
            if not best:
                self.own.add(step)
        distributed.first(lambda: self._remove(self._superseded(path) if best else self._paths(kind)[self.keep :]))
        return path

    def _superseded(self, best: Path) -> list[Path]:
        """The best ones from before, also of later steps: the run may have resumed at an earlier one."""
        return [path for path in self._paths("best") if path != best]

    def _remove(self, old_ones: list[Path]) -> None:
        """What cannot be removed is reported and stays: the newer ones are intact, and the run can go on."""
        for old in old_ones:
            doomed = old.with_name(TEMPORARY + old.name)  # killed while removing, it must not look like a checkpoint
            try:
                old.rename(doomed)
                shutil.rmtree(doomed)
            except OSError as error:
                left = doomed if doomed.exists() else old
                say(f"the old checkpoint {old} could not be removed: {error}; remove {left} by hand", "yellow")

    def newest(self, kind: str = "step") -> tuple[Checkpoint | None, list[str]]:
        """The newest intact checkpoint of a kind, and for each newer, damaged one, what is wrong with it.

        Raises Unreadable at one that cannot be looked at, which may be whole, and for their folder.
        """
        problems = []
        for path in self._paths(kind):
            try:
                return read(path), problems
            except CheckpointError as error:
                if path not in self._paths(kind):  # a run in progress has replaced it by a newer one
                    return self.newest(kind)
                if isinstance(error, Unreadable):
                    raise
                problems.append(str(error))
        return None, problems

    def intact(self, kind: str = "step") -> Checkpoint | None:
        """The newest intact checkpoint of a kind; reports damaged ones. Raises Unreadable as `newest` does."""
        found, problems = self.newest(kind)
        for problem in problems:
            say(f"damaged checkpoint skipped: {problem}", "yellow")
        return found

    def set_aside(self, newer_than: int) -> None:
        """Rename damaged step checkpoints newer than the one resumed, whose names will be written again."""
        for path in self._paths("step"):
            if _step(path) > newer_than:
                aside = path.with_name(CORRUPT + path.name)
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)

    def _paths(self, kind: str) -> list[Path]:
        """The checkpoints of a kind, newest first, without folders of other names than `save` gives: copies."""
        own = re.compile(rf"{kind}-([0-9]{{8}}|[1-9][0-9]{{8,}})")
        return sorted((path for path in self._entries() if own.fullmatch(path.name)), key=_step, reverse=True)

    def _unfinished(self, end: str = "") -> list[Path]:
        """What has a temporary name, with this end."""
        return [path for path in self._entries() if path.name.startswith(TEMPORARY) and path.name.endswith(end)]

    def _entries(self) -> list[Path]:
        """What lies in the folder; nothing before the first checkpoint. Raises Unreadable if it cannot be looked at."""
        try:
            return entries(self.folder)
        except OSError as error:
            raise Unreadable(unreadable(self.folder, error)) from error


def _step(path: Path) -> int:
    """The step in the name of a checkpoint."""
    return int(path.name.partition("-")[2])


def flush(file: Any) -> None:
    """Push a file's contents to the disk."""
    file.flush()
    os.fsync(file.fileno())


def _sync(path: Path) -> None:
    """Push a file's contents, or a folder's entries, to the disk: a rename in it survives a power cut then."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_part(path: Path, tree: Any) -> None:
    tensors: dict[str, Tensor] = {}
    plan = json.dumps(pack(tree, tensors))
    seen: set[int] = set()
    for name, tensor in tensors.items():
        flat = tensor.detach().cpu().contiguous()
        # tied weights share one storage; safetensors needs one each
        tensors[name] = flat.clone() if flat.data_ptr() in seen else flat
        seen.add(flat.data_ptr())
    save_tensors(tensors, path, {"tree": plan})
    _sync(path)


def _checksum(state: dict[str, Any]) -> int:
    """That of a state as JSON has it, however it is indented."""
    return zlib.crc32(json.dumps(state).encode())


def _fingerprint(path: Path) -> dict[str, int]:
    checksum, size = 0, 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            checksum, size = zlib.crc32(block, checksum), size + len(block)
    return {"bytes": size, "crc32": checksum}
