"""The content of a pickle of tensors, found without importing, building or calling anything that it names.

The standard library's tokeniser gives the opcodes; the few that `torch.save` writes are followed on a stack of plain
data. A tensor becomes a `TensorInfo`, an instance of a class on the list becomes plain data, and anything else is
refused by name. So sizes, shapes and bounds are checked before torch reads the file.
"""

import pickletools
import struct
from collections.abc import Callable
from pathlib import PurePosixPath
from typing import Any, BinaryIO

import torch

from .described import MOST, Name, Other, Record, Storage, TensorInfo
from .errors import CheckpointError

STORAGES = {
    f"torch.{word}Storage": dtype
    for word, dtype in {
        "Double": torch.float64,
        "Float": torch.float32,
        "Half": torch.float16,
        "BFloat16": torch.bfloat16,
        "Long": torch.int64,
        "Int": torch.int32,
        "Short": torch.int16,
        "Char": torch.int8,
        "Byte": torch.uint8,
        "Bool": torch.bool,
    }.items()
} | dict.fromkeys(("torch.UntypedStorage", "torch.storage.UntypedStorage"), torch.uint8)
DTYPES = {str(dtype): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}

# names that old training programs pickled beside the weights: configurations, arguments, results, paths
MAPPINGS = (
    "yacs.config.CfgNode",
    "easydict.EasyDict",
    "mmengine.config.config.ConfigDict",
    "mmcv.utils.config.ConfigDict",
    "mmcv.utils.config.Config",
    "addict.addict.Dict",
)
RECORDS = ("argparse.Namespace", "types.SimpleNamespace", "mmengine.logging.history_buffer.HistoryBuffer")
DEFAULT = "collections.defaultdict"
BUILTINS = "__builtin__"  # the module's name in the pickles that torch.save writes
FACTORIES = ("list", "dict", "int", "float")  # what a defaultdict calls for a missing key
TIMES = ("datetime.datetime", "datetime.date", "datetime.timedelta")
PATHS = tuple(
    f"{module}.{kind}Path"
    for module in ("pathlib", "pathlib._local")  # the second is Python 3.13's
    for kind in ("Posix", "Windows", "PurePosix", "PureWindows")
)
NUMPY = ("numpy.dtype", "numpy.ndarray")
SCALAR = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
ARRAY = ("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct")
# NumPy's type codes -> struct's, little-endian
NUMBERS = {"f2": "e", "f4": "f", "f8": "d", "i1": "b", "i2": "h", "i4": "i", "i8": "q"}
NUMBERS |= {"u1": "B", "u2": "H", "u4": "I", "u8": "Q", "b1": "?"}


def describe(file: BinaryIO, storage: Callable[[Any], Storage]) -> Any:
    """The content of the pickle that begins here, as dicts, lists, tuples, numbers, strings and `TensorInfo`.

    file     is left at the end of the pickle
    storage  turns torch's persistent id into a `Storage`, or raises CheckpointError
    Raises CheckpointError for a name that is not on the list, for tensors that do not lie in their storages, and for
    too many opcodes.
    """
    machine = _Machine(storage)
    for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        if opcode.name == "STOP":
            return machine.stack.pop()
        if count == MOST:
            raise CheckpointError(f"has a pickle of more than {MOST:,} opcodes: refused")
        if opcode.name not in _Machine.STEPS:
            raise CheckpointError(f"has a pickle with {opcode.name}, which {_unread(opcode)}")
        _Machine.STEPS[opcode.name](machine, argument)
    raise CheckpointError("has a pickle without an end")


class _Machine:
    """The stack of an unpickler, with descriptions on it."""

    STEPS: dict[str, Callable[["_Machine", Any], None]]

    def __init__(self, storage: Callable[[Any], Storage]) -> None:
        self.storage = storage
        self.stack: list[Any] = []
        self.outer: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.copied = 0

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def since_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.outer.pop()
        return items

    def mark(self, _: None) -> None:
        self.outer.append(self.stack)
        self.stack = []

    def text(self, argument: str) -> None:
        """A byte string of Python 2: the tokeniser decodes it as Latin-1, torch as UTF-8."""
        try:
            self.push(argument.encode("latin-1").decode("utf-8"))
        except UnicodeDecodeError as error:
            raise CheckpointError(f"has text that is not UTF-8, which torch expects: refused. {INSTEAD}") from error

    def name(self, argument: str) -> None:
        name = argument.replace(" ", ".")
        if name not in _KNOWN:
            raise CheckpointError(f"asks for {_spelled(name)[:200]}, which is not data: {REFUSED}. {INSTEAD}")
        self.push(Name(name))

    def tuple(self, count: int | None) -> None:
        items = self.since_mark() if count is None else [self.stack.pop() for _ in range(count)][::-1]
        self.push(tuple(items))

    def put(self, place: int) -> None:
        self.memo[place] = self.stack[-1]

    def extend(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], list):
            raise CheckpointError("appends to something that is not a list: refused")
        self.stack[-1].extend(items)

    def update(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], dict):
            raise CheckpointError("sets items of something that is not a mapping: refused")
        _fill(self.stack[-1], zip(items[::2], items[1::2], strict=True))

    def pair(self) -> list[Any]:
        value, key = self.stack.pop(), self.stack.pop()
        return [key, value]

    def call(self, _: None) -> None:
        arguments, what = self.stack.pop(), self.stack.pop()
        make = _MAKERS.get(what.text) if isinstance(what, Name) else None
        if make is None or not isinstance(arguments, tuple):
            raise CheckpointError(f"calls {what.text if isinstance(what, Name) else 'something unnamed'}: {REFUSED}")
        # many short calls may refer to one long list, and each copies it
        if make in (_ordered, _counted, _set):
            self.copied += sum(map(len, arguments))
        if self.copied > MOST:
            raise CheckpointError(f"expands to more than {MOST:,} values: refused")
        self.push(make(*arguments))

    def build(self, _: None) -> None:
        state, what = self.stack.pop(), self.stack[-1]
        if isinstance(what, Record) and isinstance(state, dict):
            _fill(what, state.items())
        elif isinstance(what, Other):
            what.detail = (what.detail, state)
        elif not isinstance(what, dict):
            raise CheckpointError("sets the state of something that has none: refused")


def _unread(opcode: pickletools.OpcodeInfo) -> str:
    if opcode.proto > torch.serialization.DEFAULT_PROTOCOL:
        return "torch.save does not write by default: save it again with torch.save, without pickle_protocol"
    return f"is not needed to hold weights: refused. {INSTEAD}"


REFUSED = "refused, and nothing in it was run"
INSTEAD = "If you trust it, load it where it was made, and save only its state dict with torch.save"


def _steps() -> dict[str, Callable[[_Machine, Any], None]]:
    """What each opcode does; only those that torch.save writes, and that torch.load(weights_only=True) thus reads."""
    constants = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
    steps = {op: (lambda m, _, value=value: m.push(value)) for op, value in constants.items()}
    arguments = ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE")
    steps |= dict.fromkeys(arguments, _Machine.push)
    tuples = {"TUPLE": None, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
    steps |= {op: (lambda m, _, count=count: m.tuple(count)) for op, count in tuples.items()}
    steps |= dict.fromkeys(("BINPUT", "LONG_BINPUT"), _Machine.put)
    steps |= dict.fromkeys(("BINGET", "LONG_BINGET"), lambda m, place: m.push(m.memo[place]))
    steps |= dict.fromkeys(("REDUCE", "NEWOBJ"), _Machine.call)
    return steps | {
        "PROTO": lambda m, _: None,
        "MARK": _Machine.mark,
        "GLOBAL": _Machine.name,
        "SHORT_BINSTRING": _Machine.text,
        "BUILD": _Machine.build,
        "EMPTY_LIST": lambda m, _: m.push([]),
        "EMPTY_DICT": lambda m, _: m.push({}),
        "APPEND": lambda m, _: m.extend([m.stack.pop()]),
        "APPENDS": lambda m, _: m.extend(m.since_mark()),
        "SETITEM": lambda m, _: m.update(m.pair()),
        "SETITEMS": lambda m, _: m.update(m.since_mark()),
        "BINPERSID": lambda m, _: m.push(m.storage(m.stack.pop())),
    }


_Machine.STEPS = _steps()


def _spelled(name: str) -> str:
    """As people write it: a pickle says posix for os."""
    module, _, rest = name.partition(".")
    written = {"posix": "os", "nt": "os", "__builtin__": "builtins"}.get(module, module)
    return f"{written}.{rest}"


def _fill(mapping: dict[Any, Any], items: Any) -> None:
    for key, value in items:
        # hashing a tuple goes through all its items, which may never end
        if not isinstance(key, (str, int, float, bool, bytes, type(None))):
            raise CheckpointError(f"has a mapping with a {type(key).__name__} as a key: refused")
        mapping[key] = value


def _tensor(
    storage: Storage, offset: int, shape: Any, stride: Any, *rest: Any, dtype: torch.dtype | None = None
) -> TensorInfo:
    """The tensor that torch would rebuild; its elements must lie in the storage."""
    sized = isinstance(storage, Storage) and len(shape) == len(stride) <= 64
    numbers = [offset, *shape, *stride] if sized else []
    if not sized or not all(type(n) is int for n in numbers):
        raise CheckpointError("has an invalid description of a tensor: refused")
    last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    held = storage.numel * storage.dtype.itemsize // (dtype or storage.dtype).itemsize
    if not all(0 <= n < 2**63 for n in numbers) or (0 not in shape and last >= held):
        raise CheckpointError(
            f"has a tensor of shape {_short(shape)}, strides {_short(stride)} and offset {offset} that does not lie in "
            f"its storage of {storage.numel} elements: refused"
        )
    return TensorInfo(dtype or storage.dtype, tuple(shape))


def _short(numbers: Any) -> str:
    return str(tuple(numbers[:8])) + (" ..." if len(numbers) > 8 else "")


def _typed_tensor(
    storage: Storage, offset: int, shape: Any, stride: Any, grad: Any, hooks: Any, dtype: Name, *rest: Any
) -> TensorInfo:
    return _tensor(storage, offset, shape, stride, dtype=DTYPES[dtype.text])


def _ordered(pairs: Any = ()) -> dict[Any, Any]:
    made: dict[Any, Any] = {}
    for pair in pairs:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise CheckpointError("makes a mapping from items that are not pairs: refused")
        _fill(made, [pair])
    return made


def _counted(counts: Any = ()) -> dict[Any, Any]:
    """A Counter, such as the milestones of torch's MultiStepLR."""
    return _ordered(counts.items() if isinstance(counts, dict) else counts)


def _set(items: Any = ()) -> list[Any]:
    """In the order of the file. torch hashes the items when it reads the file, which may never end for tuples."""
    if not isinstance(items, list) or not all(isinstance(item, (str, int, float, bool, bytes)) for item in items):
        raise CheckpointError("has a set of items that are neither numbers nor strings: refused")
    return items


def _word(part: Any) -> str:
    """Part of a name. A list that contains itself many times over would take forever to write out."""
    if not isinstance(part, (str, int)):
        raise CheckpointError(f"names a path or a device with a {type(part).__name__}: refused")
    return str(part)


def _number(kind: Other, value: bytes) -> Any:
    """A NumPy scalar as a number."""
    letters, state = kind.detail if isinstance(kind.detail, tuple) else (kind.detail, ())
    code = NUMBERS.get(letters) if isinstance(letters, str) else None
    order = ">" if state[1:2] == (">",) else "<"
    return struct.unpack(f"{order}{code}", value)[0] if code else Other("numpy.scalar")


def _bytes(text: str, encoding: str) -> bytes:
    if not isinstance(text, str) or not isinstance(encoding, str):
        raise CheckpointError("encodes something that is not text: refused")
    if encoding not in ("latin1", "latin-1"):
        raise CheckpointError(f"encodes text as {encoding[:40]!r}, which torch.save does not: refused")
    return text.encode("latin-1")


_MAKERS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _ordered,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _typed_tensor,
    "torch._utils._rebuild_parameter": lambda data, *rest: data,
    "torch.Size": lambda sizes=(): sizes,
    "torch.device": lambda *parts: ":".join(map(_word, parts)),
    "_codecs.encode": _bytes,
    "numpy.dtype": lambda code, *rest: Other("numpy.dtype", code),
    **dict.fromkeys(SCALAR, _number),
    **dict.fromkeys(ARRAY, lambda *rest: Other("numpy.ndarray")),
    **dict.fromkeys(PATHS, lambda *parts: str(PurePosixPath(*map(_word, parts)))),
    **dict.fromkeys(MAPPINGS, _ordered),
    **dict.fromkeys(RECORDS, lambda: Record()),
    **{name: (lambda *state, name=name: Other(name)) for name in TIMES},
    "collections.Counter": _counted,
    DEFAULT: lambda *factory: {},
    f"{BUILTINS}.set": _set,
}
_KNOWN = {*_MAKERS, *STORAGES, *DTYPES, *NUMPY, *(f"{BUILTINS}.{name}" for name in FACTORIES)}
