"""Triton's interpreter without work that has no effect: what is interpreted in tests takes less than half its time.

This changes private parts of the package. Where a release of it has none of them, tests only take longer.
"""

import dataclasses

from triton.runtime import interpreter


def lighten() -> None:
    """Change the interpreter of this process."""
    # sums and products of integers are taken once more, in 64 bits, for an assertion that is made under `debug` only
    options = interpreter.interpreter_builder.options
    if hasattr(options, "sanitize_overflow"):
        interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=options.debug)
    if hasattr(interpreter, "_patch_lang"):
        patch_once_a_launch()


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
