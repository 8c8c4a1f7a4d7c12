"""What a file that is not a checkpoint is instead, told from its first bytes."""

import os
import re
import shlex
from pathlib import Path

# what download programs put beside a file, or at the end of its name, until it is complete
BESIDE = (".aria2", ".part", ".crdownload", ".incomplete")

MAGIC = {
    b"\x1f\x8b": "is compressed with gzip: unpack it first",
    b"BZh": "is compressed with bzip2: unpack it first",
    b"\xfd7zXZ": "is compressed with xz: unpack it first",
    b"7z\xbc\xaf": "is a 7z archive: unpack it first",
    b"Rar!": "is a RAR archive: unpack it first",
    b"\x89HDF": "is an HDF5 file, as written by Keras, which is not supported",
    b"\x93NUMPY": "is a NumPy array, not a state dict",
    b"\x08": "seems to be an ONNX model, which holds no state dict: get the weights that it was exported from",
}
# what torch.distributed.checkpoint writes: the index of a folder, and the ending of the names of the parts beside it
INDEX, PART = ".metadata", ".distcp"
LFS = b"version https://git-lfs.github.com/spec/"


def unfinished(path: Path) -> str:
    """Why this file is an incomplete download; empty where it is not."""
    for ending in BESIDE:
        if path.name.endswith(ending):
            return f"is an incomplete download: its name ends in {ending}"
        if os.path.exists(f"{path}{ending}"):  # False for a name that would be too long
            return f"is an incomplete download: {path.name}{ending} lies beside it. Finish it, or start again"
    return ""


def shared_out(path: Path) -> str:
    """Why a file or folder of torch.distributed.checkpoint is not a weights file; empty for any other path."""
    if path.suffix == PART:
        what, folder = "is a part of a sharded checkpoint", path.parent
    else:
        # recipes/checkpoint.py puts the parts into a folder inside the step's
        folder = next((place for place in (path, path / "sharded") if os.path.isfile(place / INDEX)), None)
        if folder is None:
            return ""
        what = "is a sharded checkpoint"
    command = f"python -m torch.distributed.checkpoint.format_utils dcp_to_torch {shlex.quote(str(folder))} weights.pth"
    return f"{what} (torch.distributed.checkpoint), not a weights file: {command} converts it to one, if you trust it"


def what_else(head: bytes) -> str:
    """What a file that begins with these bytes is, as the rest of a sentence."""
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if re.match(rb"<(!doctype html|html|head|\?xml)", text, re.IGNORECASE):
        return (
            f"is a web page{_title(text)}, not weights: the link needs a login or a click, or is dead. Download the "
            "file in a browser"
        )
    if text.startswith(LFS):
        size = re.search(rb"size (\d+)", text)
        real = f" of {int(size[1]):,} bytes" if size else ""
        return f"is a Git LFS pointer to a file{real}, not the file: run `git lfs pull`, or download the file itself"
    if not head.strip(b"\0"):
        return "begins with nothing but zeros, as an incomplete download does. Download it again"
    if head[257:262] == b"ustar":
        return _tar(head)
    for magic, what in MAGIC.items():
        if head.startswith(magic):
            return what
    if head.isascii() and b"\0" not in head:
        return f"is text, not weights: it begins with {text[:60].decode()!r}"
    return f"is not a checkpoint, or is damaged: it begins with {head[:8].hex(' ')}"


def _title(text: bytes) -> str:
    found = re.search(rb"<title[^>]*>\s*([^<]{1,80})", text, re.IGNORECASE)
    return f" ({found[1].decode('utf-8', 'replace').strip()!r})" if found else ""


def _tar(head: bytes) -> str:
    if head.startswith((b"storages\0", b"tensors\0", b"pickle\0", b"./storages\0")):
        return (
            "is in the tar format of torch before 0.2, which cannot be read without running code from the file: if you "
            "trust it, load it with torch and save its state dict again"
        )
    return "is a tar archive of files: unpack it first"
