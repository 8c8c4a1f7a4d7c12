"""The zip archives that `torch.save` writes, checked before torch reads them."""

import io
import stat
import struct
import zipfile
from pathlib import Path
from typing import Any

from .described import Name, Storage
from .errors import CheckpointError
from .pickled import INSTEAD, STORAGES, describe

LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, lengths of the name and of the extra field
# the records at the end. END: signature, numbers of entries on this disk and on all, length and offset of their list;
# END64: the same with more bits; LOCATOR: where END64 lies
END64, LOCATOR, END = struct.Struct("<4s20x4Q"), struct.Struct("<4s4xQ4x"), struct.Struct("<4s4x2H2I2x")
LARGEST_PICKLE = 2**26  # bytes; the names, shapes and arguments of a training checkpoint take less than a million

# zip archives of other programs: the ending of an entry that identifies one, and what to do
OTHERS = {
    "constants.pkl": "is a TorchScript program (torch.jit.save), which is code: load it where it was made and save its "
    "state_dict()",
    "archive_format": "is an exported program (torch.export.save), which is code: save the state_dict() of its module",
    ".npy": "is a NumPy archive, not one of torch.save",
    ".safetensors": "is a zip archive of weights files: unpack it first",
    ".pth": "is a zip archive of weights files: unpack it first",
}


def content(path: Path) -> Any:
    """A description of what `torch.save` put into the archive; no tensor is read.

    Raises CheckpointError for an archive that is truncated, expands far beyond its size, contradicts itself, or was not
    made by torch.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = {entry.filename: entry for entry in archive.infolist()}
            _check_end(path, len(archive.infolist()))
            if len({name.lower() for name in entries}) < len(archive.infolist()):  # torch ignores case
                raise CheckpointError("holds two entries with the same name: refused")
            root = _checked(list(entries.values()), path)
            index = entries[f"{root}/data.pkl"]
            if index.file_size > LARGEST_PICKLE:
                raise CheckpointError(
                    f"has an index of {index.file_size:,} bytes, over {LARGEST_PICKLE:,}: refused. If it holds NumPy "
                    "arrays, save them as tensors"
                )
            pickle = archive.read(index)
    except zipfile.BadZipFile as error:
        raise CheckpointError(
            f"({path.stat().st_size:,} bytes) is a truncated or damaged zip archive ({error}): download it again"
        ) from error
    sizes = {name: entry.file_size for name, entry in entries.items()}
    return describe(io.BytesIO(pickle), lambda identity: _storage(identity, root, sizes))


def _check_end(path: Path, count: int) -> None:
    """Raise CheckpointError unless the list of the `count` entries lies directly before the records at the end.

    In an archive with a comment, or with anything before or between these, zipfile and torch might read different
    lists.
    """
    size, long = path.stat().st_size, END64.size + LOCATOR.size
    with path.open("rb") as file:
        file.seek(max(0, size - long - END.size))
        tail = file.read().rjust(long + END.size, b"\0")
    signature, *said = END.unpack_from(tail, long)
    begin, same = size - END.size, signature == b"PK\5\6"
    locator, place = LOCATOR.unpack_from(tail, END64.size)
    if locator == b"PK\6\7":
        signature, *said = END64.unpack_from(tail)
        begin -= long
        same = same and signature == b"PK\6\6" and place == begin
    here, all_entries, length, offset = said
    if not same or here != count or all_entries != count or offset + length != begin:
        raise CheckpointError(
            f"does not end like an archive of torch.save, and could be read in two ways: refused. {INSTEAD}"
        )


def _checked(entries: list[zipfile.ZipInfo], path: Path) -> str:
    """The folder that all entries lie in, after checking them."""
    size, unfolded = path.stat().st_size, sum(entry.file_size for entry in entries)
    if unfolded > 8 * size + 2**20:
        raise CheckpointError(f"would expand from {size:,} to {unfolded:,} bytes: refused")
    for entry in entries:
        _check_name(entry)
    root = entries[0].filename.partition("/")[0] if entries else ""
    names = {entry.filename for entry in entries}
    for ending, what in OTHERS.items():
        if any(name.endswith(ending) for name in names):
            raise CheckpointError(what)
    if f"{root}/data.pkl" not in names:
        raise CheckpointError(
            f"is a zip archive, but not one of torch.save: it has no data.pkl, only {sorted(names)[:3]}"
        )
    if outside := [name for name in names if not name.startswith(f"{root}/")]:
        raise CheckpointError(f"holds {outside[0]!r} outside of its folder {root!r}: refused")
    _check_places(entries, path)
    return root


def _check_name(entry: zipfile.ZipInfo) -> None:
    parts = entry.filename.replace("\\", "/").split("/")
    if ".." in parts or parts[0] == "" or ":" in parts[0]:
        raise CheckpointError(f"holds an entry named {entry.filename!r}, which points outside: refused")
    if "\0" in entry.orig_filename:  # where the name ends for zipfile, but not for torch
        raise CheckpointError(f"holds an entry with a null byte in its name, {entry.orig_filename!r}: refused")
    if stat.S_ISLNK(entry.external_attr >> 16):
        raise CheckpointError(f"holds a link, {entry.filename!r}: refused")


def _check_places(entries: list[zipfile.ZipInfo], path: Path) -> None:
    """Raise CheckpointError unless every entry lies uncompressed in a place of its own, so that torch can map it."""
    end, size = 0, path.stat().st_size
    with path.open("rb") as file:
        for entry in sorted(entries, key=lambda entry: entry.header_offset):
            stored = entry.compress_type == zipfile.ZIP_STORED and entry.compress_size == entry.file_size
            if not stored or entry.flag_bits & 1:
                raise CheckpointError(
                    f"holds {entry.filename!r} compressed or encrypted, which torch never does: refused"
                )
            file.seek(entry.header_offset)
            header = file.read(LOCAL_HEADER.size).ljust(LOCAL_HEADER.size, b"\0")
            signature, *lengths = LOCAL_HEADER.unpack(header)
            begin = entry.header_offset + LOCAL_HEADER.size + sum(lengths)
            if signature != b"PK\3\4" or entry.header_offset < end or begin + entry.file_size > size:
                raise CheckpointError(
                    f"says that {entry.filename!r}, {entry.file_size:,} bytes, lies at {begin:,}, but it does not: "
                    "damaged, or refused"
                )
            end = begin + entry.file_size


def _storage(identity: Any, root: str, sizes: dict[str, int]) -> Storage:
    """The storage that a persistent id names: its bytes are one entry of the archive."""
    storage, key = identified(identity)
    held = sizes.get(f"{root}/data/{key}")
    if held is None or storage.numel * storage.dtype.itemsize > held:
        raise CheckpointError(
            f"says that storage {key!r} has {storage.numel:,} elements, but it has {held or 0:,} bytes: refused"
        )
    return storage


def identified(identity: Any) -> tuple[Storage, str]:
    """The storage and its key in torch's persistent id, ("storage", type, key, location, elements, no view)."""
    if not isinstance(identity, tuple) or len(identity) not in (5, 6) or identity[0] != "storage":
        raise CheckpointError("refers to something other than a storage: refused")
    _, kind, key, _, numel, *view = identity
    known = isinstance(kind, Name) and kind.text in STORAGES and isinstance(key, str) and type(numel) is int
    if not known or numel < 0 or view not in ([], [None]):
        raise CheckpointError("has an invalid description of a storage: refused")
    return Storage(STORAGES[kind.text], numel), key
