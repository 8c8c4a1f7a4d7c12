"""Files that want to do harm, or only look like checkpoints: each is written by a function of its path and a canary.

Whatever they would run makes the canary, a file that is not there before.
"""

import io
import json
import os
import pickle
import stat
import struct
import subprocess
import zipfile
from collections import OrderedDict

import torch
from safetensors.torch import save
from torch import nn

HUGE = 2_684_354_560  # float32 elements: 10 GiB
DEEPEST = 40  # nested levels


class Runs:
    """Unpickles by calling `function(*arguments)`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class WithState:
    """Unpickles by calling its `__setstate__`."""

    def __init__(self, canary):
        self.canary = canary

    def __setstate__(self, state):
        os.mkdir(state["canary"])


class Place:
    """A storage that a pickle refers to by torch's persistent id."""

    def __init__(self, numel=4, key="0"):
        self.identity = ("storage", torch.FloatStorage, key, "cpu", numel)


class Crafted:
    """Unpickles as a tensor with this place in its storage."""

    def __init__(self, size, stride, offset=0, place=None):
        self.call = torch._utils._rebuild_tensor_v2, (place or Place(), offset, size, stride, False, OrderedDict())

    def __reduce__(self):
        return self.call


class Referring(pickle.Pickler):
    def persistent_id(self, obj):
        return obj.identity if isinstance(obj, Place) else None


def pickled(content):
    buffer = io.BytesIO()
    Referring(buffer, 2).dump(content)
    return buffer.getvalue()


def archive(index, entries=(), compression=zipfile.ZIP_STORED, behind=b""):
    """What torch.save would write with this pickle, and further entries; all of it behind other bytes."""
    buffer = io.BytesIO(behind)
    with zipfile.ZipFile(buffer, "a" if behind else "w", compression) as out:
        out.writestr("archive/data.pkl", index)
        out.writestr("archive/data/0", struct.pack("<4f", 1, 2, 3, 4))
        for name, data in entries:
            out.writestr(name, data)
    return buffer.getvalue()


def saved(content, **options):
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def legacy(content):
    return saved(content, _use_new_zipfile_serialization=False)


STATE = {"stem.conv1.weight": torch.zeros(3, 7)}

# what asks for something to be run -> the content of the file, by its canary
RUNNING = {
    "system": lambda canary: Runs(os.system, f"touch {canary}"),
    "eval": lambda canary: Runs(eval, f"open({str(canary)!r}, 'w')"),
    "exec": lambda canary: Runs(exec, f"open({str(canary)!r}, 'w')"),
    "process": lambda canary: Runs(subprocess.Popen, ["touch", str(canary)]),
    "open": lambda canary: Runs(open, str(canary), "w"),
    "imported": lambda canary: Runs(getattr, Runs(__import__, "os"), "system"),
    "inside weights": lambda canary: {"model": {"a": torch.zeros(1), "b": Runs(os.mkdir, str(canary))}},
    "nested reduce": lambda canary: Runs(OrderedDict, [["a", Runs(print, Runs(os.mkdir, str(canary)))]]),
    "a pickle in a pickle": lambda canary: Runs(pickle.loads, pickle.dumps(Runs(os.mkdir, str(canary)))),
    "a file in a pickle": lambda canary: Runs(torch.load, str(canary)),
    "setstate": lambda canary: WithState(str(canary)),
    "a module": lambda canary: nn.Linear(1, 1),
    "a buffer of 10 GB": lambda canary: Runs(bytearray, 10**10),
    "a tensor without data": lambda canary: {"w": torch.empty(3, device="meta")},
    "a sparse tensor": lambda canary: {"w": torch.eye(3).to_sparse()},
}


def nested(opcode, count, end):
    """A state dict beside something nested `count` deep."""
    head = pickled({"model": {"w": Crafted((4,), (1,))}})[:-1]
    return archive(head + b"X\5\0\0\0extra" + opcode * count + end + b"s.")


def laughs():
    """Thirty lists, each of ten references to the one before."""
    rows = [0]
    for _ in range(30):
        rows = [rows] * 10
    return rows


def doubled(end):
    """Lists, each of which holds the one before twice, then opcodes that use the last: written out it has no end."""
    lists = b"".join(b"](h%ch%ceq%c" % (i, i, i + 1) for i in range(DEEPEST))
    return b"]q\0" + lists + end.replace(b"LAST", b"h%c" % DEEPEST)


def hashed():
    """The same of tuples, as the type of a number of numpy's."""
    tuples = b"".join(b"h%ch%c\x86q%c" % (i, i, i + 1) for i in range(DEEPEST))
    kind = b"cnumpy\ndtype\nh%c\x85R" % DEEPEST
    return b")q\0" + tuples + b"cnumpy.core.multiarray\nscalar\n" + kind + b"N\x86R."


def copied():
    """A mapping of a thousand pairs, made ten thousand times."""
    pairs = b"K\1N\x86q\0](" + b"h\0" * 1000 + b"eq\1ccollections\nOrderedDict\nq\2"
    return pairs + b"h\2h\1\x85R" * 10_000 + b"."


def listing(keys):
    """Torch's old format with this pickle in place of the list of its storages."""
    return b"".join(pickle.dumps(part, 2) for part in (torch.serialization.MAGIC_NUMBER, 1001, {}, {})) + keys


def endless():
    loop = []
    loop.append(loop)
    return loop


def with_key(key):
    return b"}" + key + b"Ns."


def jit():
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(nn.Linear(1, 1)), buffer)
    return buffer.getvalue()


def with_link():
    entry = zipfile.ZipInfo("archive/data/1")
    entry.external_attr = (stat.S_IFLNK | 0o777) << 16
    return archive(pickled({"w": Crafted((4,), (1,))}), [(entry, "/etc/passwd")])


def with_size(size):
    """The list at the archive's end gives the storage another size than it has."""
    data = bytearray(saved(STATE))
    place = data.rindex(b"PK\1\2", 0, data.rindex(b"data/0"))
    struct.pack_into("<II", data, place + 20, size, size)
    return bytes(data)


PICKLE = pickled({"w": Crafted((4,), (1,))})
END = struct.Struct(
    "<HHIIH"
)  # the archive's last bytes: entries on this disk and on all, their list, a comment's length


def at_the_end(data, **changed):
    """An archive with other figures at its end."""
    said = dict(zip(("here", "all", "length", "offset", "comment"), END.unpack(data[-END.size :]), strict=True))
    return data[: -END.size] + END.pack(*(said | changed).values())


def long_end(data):
    """The record of an archive's end for large ones."""
    _, count, length, offset, _ = END.unpack(data[-END.size :])
    return b"PK\6\6" + struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, count, count, length, offset)


def two_lists(to_first):
    """Two archives, one behind the other, each with its record: the end points to that of the first, or of its own."""
    first = archive(PICKLE)
    record = len(first) - 22
    second = archive(PICKLE, behind=first[:-22] + long_end(first))
    place = record if to_first else len(second) - 22
    return second[:-22] + long_end(second) + b"PK\6\7" + struct.pack("<IQI", 0, place, 1) + second[-22:]


def declaring(numel):
    """Torch's old format, whose storage has this many elements as it says, in the pickle and behind it."""
    long = b"\x8a\x05" + numel.to_bytes(5, "little")
    return (
        legacy(STATE).replace(b"K\x15N", long + b"N").replace((21).to_bytes(8, "little"), numel.to_bytes(8, "little"))
    )


def safetensors(header, data=bytes(16)):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(shape, begin, end, dtype="F32"):
    return {"w": {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}}


PAGE = b"\n<!DOCTYPE html>\n<html><head><title>Google Drive - Virus scan warning</title></head><body>" + bytes(600)
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 113456789\n"

# file -> its bytes, by a function, and what the error says
DATA = {
    # pickles
    "state-of-a-class": (lambda: archive(b"cargparse\nNamespace\n}X\1\0\0\0aK\1sb."), "sets the state of something"),
    "state-of-a-tensor": (
        lambda: archive(pickled(Crafted((4,), (1,)))[:-1] + b"(NK\0)tb."),
        "sets the state of something",
    ),
    "call-of-a-value": (lambda: archive(b"]Nq\0\x85R."), "calls something unnamed"),
    "call-of-a-storage": (lambda: archive(b"ctorch\nFloatStorage\nK\1\x85R."), r"calls torch\.FloatStorage"),
    "encoding": (
        lambda: archive(pickled(Runs(__import__("_codecs").encode, "a", "punycode"))),
        "encodes text as 'punycode'",
    ),
    "stack-global": (lambda: archive(pickle.dumps(Runs(os.system, "true"), 4)), "torch.save does not write"),
    "extension": (lambda: archive(b"\x82\1."), "EXT1"),
    "instance": (lambda: archive(b"(S'true'\nios\nsystem\n."), "STRING"),
    "another-reference": (lambda: archive(b"X\1\0\0\0aQ."), "something other than a storage"),
    "long-string": (lambda: archive(b"X\xff\xff\xff\xffabc."), "cannot be read"),
    "long-number": (lambda: archive(b"\x8b\xff\xff\xff\x7f" + b"\1" * 1000 + b"."), "cannot be read"),
    "long-bytes": (lambda: archive(b"\x8e" + b"\xff" * 8 + b"."), "cannot be read"),
    "memo": (lambda: archive(b"]r\xff\xff\xff\xffr\xff\xff\xff\x7f."), "holds no state dict"),
    "unknown-memo": (lambda: archive(b"h\5."), "cannot be read"),
    "laughs": (lambda: archive(pickled({"model": {"w": Crafted((4,), (1,))}, "x": laughs()})), "expands to"),
    "endless": (lambda: archive(pickled({"model": {"w": Crafted((4,), (1,))}, "x": endless()})), "expands to"),
    "deep-lists": (lambda: nested(b"]", 200_000, b"a" * 199_999), "nested more than"),
    "deep-tuples": (lambda: nested(b")" + b"\x85" * 199_999, 1, b""), "nested more than"),
    "deep-key": (lambda: archive(with_key(b")" + b"\x85" * 500_000)), "tuple as a key"),
    "key-without-end": (lambda: archive(with_key(b")" + b"2\x86" * 200)), "a pickle with DUP"),
    "doubled-path": (lambda: archive(doubled(b"cpathlib\nPosixPath\nLAST\x85R.")), "a path or a device with a list"),
    "doubled-device": (lambda: archive(doubled(b"ctorch\ndevice\nLAST\x85R.")), "a path or a device with a list"),
    "doubled-codec": (
        lambda: archive(doubled(b"c_codecs\nencode\nX\1\0\0\0aLAST\x86R.")),
        "encodes something that is not text",
    ),
    "doubled-pair": (lambda: archive(doubled(b"ccollections\nOrderedDict\nLAST\x85R.")), "tuple|list as a key"),
    "doubled-number": (lambda: archive(hashed()), "holds no state dict"),
    "doubled-storages": (lambda: listing(doubled(b"](LASTe.")), "does not list the storages"),
    "no-pairs": (lambda: archive(b"ccollections\nOrderedDict\n](K\1e\x85R."), "from items that are not pairs"),
    "no-utf-8": (lambda: archive(b"}U\2\xff\xfeNs."), "text that is not UTF-8"),
    "copied-pairs": (lambda: archive(copied()), "expands to"),
    "many-dicts": (lambda: archive(b"}" * 3_000_000 + b"."), "opcodes"),
    "long-pickle": (lambda: archive(b"X\0\0\0\x05" + bytes(0x05000000) + b"."), "an index of"),
    # tensors
    "stride-negative": (lambda: archive(pickled({"w": Crafted((4,), (-1,), 3)})), "does not lie in"),
    "stride-huge": (lambda: archive(pickled({"w": Crafted((2,), (2**62,))})), "does not lie in"),
    "offset-outside": (lambda: archive(pickled({"w": Crafted((2,), (1,), 3)})), "does not lie in"),
    "offset-negative": (lambda: archive(pickled({"w": Crafted((2,), (1,), -1)})), "does not lie in"),
    "shape-huge": (lambda: archive(pickled({"w": Crafted((HUGE,), (1,))})), "does not lie in"),
    "shape-repeated": (lambda: archive(pickled({"w": Crafted((HUGE,), (0,))})), "declares 10,737,418,240 bytes"),
    "shape-beside-0": (lambda: archive(pickled({"w": Crafted((0, 2**62, 2**62), (1, 1, 1))})), "which is too large"),
    "shape-over-64-bits": (lambda: archive(pickled({"w": Crafted((0, 2**70), (1, 1))})), "does not lie in"),
    "stride-over-64-bits": (lambda: archive(pickled({"w": Crafted((1,), (2**63,))})), "does not lie in"),
    "name-long": (
        lambda: archive(pickled({"w" * 1001: Crafted((4,), (1,))})),
        "'w{40}' ... of 1,001 characters: refused",
    ),
    "shape-of-many": (lambda: archive(pickled({"w": Crafted((1,) * 5000, (0,) * 5000)})), "invalid description"),
    "shape-of-text": (lambda: archive(pickled({"w": Crafted(("a",), (1,))})), "invalid description"),
    "storage-huge": (lambda: archive(pickled({"w": Crafted((4,), (1,), place=Place(HUGE))})), "2,684,354,560 elements"),
    "storage-missing": (lambda: archive(pickled({"w": Crafted((4,), (1,), place=Place(4, "../0"))})), "has 0 bytes"),
    "legacy-10-gb": (lambda: declaring(HUGE), "2,684,354,560 elements"),
    "legacy-other-size": (lambda: legacy(STATE).replace((21).to_bytes(8, "little"), bytes(8)), "21 elements"),
    "legacy-cut-off": (lambda: legacy(STATE)[:-10], "truncated, or refused"),
    "plain-pickle": (lambda: pickle.dumps({"model": [1.0]}, 2), "not one of torch.save"),
    "class-long": (lambda: archive(b"cos\n" + b"a" * 1_000_000 + b"\n."), r"asks for os\.a{197}, which is not data"),
    # archives
    "bomb": (lambda: archive(bytes(200_000_000), compression=zipfile.ZIP_DEFLATED), "would expand from"),
    "compressed": (lambda: archive(pickled({}), compression=zipfile.ZIP_DEFLATED), "compressed or encrypted"),
    "upwards": (lambda: archive(b"}.", [("../escaped", b"x")]), "points outside"),
    "upwards-inside": (lambda: archive(b"}.", [("archive/data/../../../escaped", b"x")]), "points outside"),
    "backslashes": (lambda: archive(b"}.", [("archive\\..\\..\\escaped", b"x")]), "points outside"),
    "absolute": (lambda: archive(b"}.", [("/tmp/escaped", b"x")]), "points outside"),
    "drive": (lambda: archive(b"}.", [("C:/escaped", b"x")]), "points outside"),
    "link": (with_link, "holds a link"),
    "outside": (lambda: archive(b"}.", [("other/data.pkl", b"}.")]), "outside of its folder"),
    "size-too-large": (lambda: with_size(600), "it does not"),
    "size-of-gigabytes": (lambda: with_size(0x7FFFFFFF), "would expand from"),
    "size-too-small": (lambda: with_size(80), "21 elements, but it has 80 bytes"),
    "archive-cut-off": (lambda: saved(STATE)[:-200], "truncated or damaged"),
    "two-lists": (lambda: two_lists(to_first=True), "could be read in two ways"),
    "two-archives": (lambda: archive(PICKLE) + archive(PICKLE), "could be read in two ways"),
    "list-elsewhere": (lambda: at_the_end(archive(PICKLE), offset=0), "could be read in two ways"),
    "entries-uncounted": (lambda: at_the_end(archive(PICKLE), here=1, all=1), "could be read in two ways"),
    "comment": (lambda: at_the_end(archive(PICKLE), comment=3) + b"abc", "could be read in two ways"),
    "large-letters": (lambda: archive(PICKLE, [("archive/DATA.PKL", b"}.")]), "two entries with the same name"),
    "zero-in-a-name": (
        lambda: archive(PICKLE, [("archive/data/1-", b"x")]).replace(b"data/1-", b"data/1\0"),
        "a null byte in its name, 'archive/data/1\\\\x00'",
    ),
    "jit": (jit, "is a TorchScript program"),
    "numpy": (lambda: archive(b"}.", [("archive/w.npy", b"x")]), "is a NumPy archive"),
    "other-archive": (lambda: archive(b"}.").replace(b"data.pkl", b"data.txt"), "it has no data.pkl"),
    # safetensors
    "header-beyond": (lambda: safetensors(entry([4], 0, 1600)), "damaged safetensors"),
    "header-huge-shape": (lambda: safetensors(entry([HUGE], 0, 16)), "damaged safetensors"),
    "header-overflow": (lambda: safetensors(entry([2**62, 2**62], 0, 16)), "damaged safetensors"),
    "header-beside-0": (lambda: safetensors(entry([0, 2**62, 2**62], 0, 0), b""), "which is too large"),
    "header-overlap": (
        lambda: safetensors(entry([4], 0, 16) | {"v": entry([4], 0, 16)["w"]}),
        "damaged safetensors",
    ),
    "header-negative": (lambda: safetensors(entry([-4], 0, 16)), "damaged safetensors"),
    "header-dtype": (lambda: safetensors(entry([4], 0, 16, "X32")), "damaged safetensors"),
    "header-long-dtype": (lambda: safetensors(entry([4], 0, 16, "X" * 1_000_000)), "damaged safetensors"),
    "header-other-dtype": (lambda: safetensors(entry([8], 0, 16, "U16")), "of an unsupported type, 'U16'"),
    "header-no-json": (lambda: safetensors(b"{" * 1000), "damaged safetensors"),
    "header-longer-than-file": (lambda: (10**10).to_bytes(8, "little") + b"{" + bytes(100), "damaged safetensors"),
    "safetensors-cut-off": (lambda: save(STATE)[:-10], "damaged safetensors"),
    # no checkpoints
    "page": (lambda: PAGE, r"is a web page \('Google Drive - Virus scan warning'\)"),
    "pointer": (lambda: POINTER, "is a Git LFS pointer to a file of 113,456,789 bytes"),
    "text": (
        lambda: b"404: Not Found\nhttps://example.org/w.pth",
        "is text, not weights: it begins with '404: Not Found",
    ),
    "zeros": (lambda: bytes(5000), "nothing but zeros"),
    "gzip": (lambda: b"\x1f\x8b\x08" + bytes(100), "compressed with gzip"),
    "tar-of-torch": (
        lambda: b"storages".ljust(257, b"\0") + b"ustar".ljust(255, b"\0"),
        "tar format of torch before 0.2",
    ),
    "tar": (lambda: b"weights.pth".ljust(257, b"\0") + b"ustar".ljust(255, b"\0"), "tar archive of files"),
    "part.crdownload": (lambda: saved(STATE)[:500], "is an incomplete download"),
}
