"""Triton's interpreter without work that has no effect: what is interpreted in tests takes less than half its time.

This changes private parts of the package. Where a release of it has none of them, tests only take longer.
"""

import dataclasses

from triton.language import core
from triton.runtime import interpreter


def lighten() -> None:
    """Change the interpreter of this process."""
    # sums and products of integers are taken once more, in 64 bits, for an assertion that is made under `debug` only
    options = interpreter.interpreter_builder.options
    if hasattr(options, "sanitize_overflow"):
        interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=options.debug)
    if hasattr(interpreter, "_patch_lang"):
        patch_once_a_launch()
    if hasattr(interpreter, "_get_np_dtype"):
        describe_once()


def patch_once_a_launch() -> None:
    """The language is patched where a launch begins, for each module: at the calls of its functions it already is."""
    patch, run, patched = interpreter._patch_lang, interpreter.GridExecutor.__call__, set()

    def first(fn):
        if id(fn.__globals__) not in patched:
            patched.add(id(fn.__globals__))
            return patch(fn)

    def launch(*args, **kwargs):
        patched.clear()
        return run(*args, **kwargs)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = first, launch


def describe_once() -> None:
    """A block's type, what its tensors know of their shape, and numpy's dtype for it are found once for each."""
    of_type, of_tensor, of_array = core.block_type.__init__, core.tensor.__init__, interpreter._get_np_dtype
    types, tensors, arrays = {}, {}, {}

    def begin_type(self, element_ty, shape):
        if type(element_ty) is not core.dtype:  # pointers are told apart by more than a name
            return of_type(self, element_ty, shape)
        key = (element_ty.name, *(getattr(side, "value", side) for side in shape))
        if key not in types:
            of_type(self, element_ty, shape)
            types[key] = self.__dict__ | {"key": key}
        self.__dict__ = types[key]

    def begin_tensor(self, handle, type):
        key = type.name if type.__class__ is core.dtype else type.__dict__.get("key")
        if key not in tensors:
            of_tensor(self, handle, type)
            if key is not None:
                tensors[key] = self.__dict__.copy()
        else:
            self.__dict__.update(tensors[key], handle=handle, type=type)

    def array(tt_dtype):
        if tt_dtype.name not in arrays:
            arrays[tt_dtype.name] = of_array(tt_dtype)
        return arrays[tt_dtype.name]

    core.block_type.__init__, core.tensor.__init__, interpreter._get_np_dtype = begin_type, begin_tensor, array
