"""What a file is that is no checkpoint, told from its first bytes."""

import os
import re
import shlex
from pathlib import Path

# what programs that download leave beside a file, or end its name with, until it is whole
BESIDE = (".aria2", ".part", ".crdownload", ".incomplete")

MAGIC = {
    b"\x1f\x8b": "is compressed by gzip: unpack it first",
    b"BZh": "is compressed by bzip2: unpack it first",
    b"\xfd7zXZ": "is compressed by xz: unpack it first",
    b"7z\xbc\xaf": "is a 7z archive: unpack it first",
    b"Rar!": "is a RAR archive: unpack it first",
    b"\x89HDF": "is an HDF5 file, such as Keras writes, which is not read here",
    b"\x93NUMPY": "is an array of numpy's, not a state dict",
    b"\x08": "seems to be an ONNX model, which holds no state dict: its weights must come from where it was exported",
}
# what torch.distributed.checkpoint writes: the index of a folder, and what the names of the parts beside it end in
INDEX, PART = ".metadata", ".distcp"
LFS = b"version https://git-lfs.github.com/spec/"


def unfinished(path: Path) -> str:
    """Why a download into this file is not complete, or nothing."""
    for ending in BESIDE:
        if path.name.endswith(ending):
            return f"is a download that is not complete: its name ends in {ending}"
        if os.path.exists(f"{path}{ending}"):  # of a name that would be too long it says no
            return f"is a download that is not complete: {path.name}{ending} lies beside it. Finish it, or start anew"
    return ""


def shared_out(path: Path) -> str:
    """Why a file or a folder of torch.distributed.checkpoint's is no file of weights, or nothing for any other."""
    if path.suffix == PART:
        what, folder = "is a part of a checkpoint that processes shared out", path.parent
    else:
        # recipes/checkpoint.py has the parts in a folder of the step's
        folder = next((place for place in (path, path / "sharded") if (place / INDEX).is_file()), None)
        if folder is None:
            return ""
        what = "is a checkpoint that processes shared out"
    command = f"python -m torch.distributed.checkpoint.format_utils dcp_to_torch {shlex.quote(str(folder))} weights.pth"
    return f"{what} (torch.distributed.checkpoint), no file of weights: {command} makes one of it, if you trust it"


def what_else(head: bytes) -> str:
    """What a file that begins with these bytes is, as the rest of a sentence."""
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if re.match(rb"<(!doctype html|html|head|\?xml)", text, re.IGNORECASE):
        return (
            f"is a web page{_title(text)}, not weights: the link wants a login or a click, or is dead. Fetch it by hand"
        )
    if text.startswith(LFS):
        size = re.search(rb"size (\d+)", text)
        real = f" of {int(size[1]):,} bytes" if size else ""
        return f"is git-lfs's pointer to a file{real}, not the file: run `git lfs pull`, or download the file itself"
    if not head.strip(b"\0"):
        return "begins with nothing but zeros: a download that was not completed. Fetch it again"
    if head[257:262] == b"ustar":
        return _tar(head)
    for magic, what in MAGIC.items():
        if head.startswith(magic):
            return what
    if head.isascii() and b"\0" not in head:
        return f"is text, not weights: it begins with {text[:60].decode()!r}"
    return f"is no checkpoint, or damaged: it begins with {head[:8].hex(' ')}"


def _title(text: bytes) -> str:
    found = re.search(rb"<title[^>]*>\s*([^<]{1,80})", text, re.IGNORECASE)
    return f" ({found[1].decode('utf-8', 'replace').strip()!r})" if found else ""


def _tar(head: bytes) -> str:
    if head.startswith((b"storages\0", b"tensors\0", b"pickle\0", b"./storages\0")):
        return (
            "is in the tar format of torch before 0.2, which can only be read by running what is in it: load it where "
            "you trust it, and save its state dict again"
        )
    return "is a tar archive of files: unpack it first"
