"""JSON that a run wrote and reads again: an editor, or a copy that was cut off, may have left something else there."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

NUMBER = (int, float)


def read(path: Path, kinds: dict[str, Any]) -> dict[str, Any]:
    """The mapping in a file, with values of these `kinds`, see `fits`.

    Raises OSError if the file cannot be read, and ValueError, which says what is wrong with its contents.
    """
    try:
        found = json.loads(path.read_bytes())
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    check(found, kinds)
    return found


def check(found: Any, kinds: dict[str, Any]) -> None:
    """Raise ValueError, which says what is wrong, unless a value is a mapping with values of these `kinds`."""
    if not isinstance(found, dict):
        raise ValueError(f"it holds {found!r:.60}, expected a mapping")
    wrong = [key for key, kind in kinds.items() if not fits(found.get(key), kind)]
    if wrong:
        raise ValueError(
            "; ".join(f"its {key!r} is {found[key]!r:.60}" if key in found else f"it has no {key!r}" for key in wrong)
        )


def fits(value: Any, kind: Any) -> bool:
    """Whether a value from JSON is of a kind.

    kind  a type, `object` for anything; None; a tuple of alternatives; [kind] for a list of any length, and of several
          kinds for one of just that many; {key: kind} for a mapping, where `...` stands for all other keys and a
          missing one counts as None
    """
    if isinstance(kind, tuple):
        return type(value) in kind or any(fits(value, one) for one in kind)  # mostly the first, which is quicker
    if isinstance(kind, list):
        kinds = kind * len(value) if isinstance(value, list) and len(kind) == 1 else kind
        return isinstance(value, list) and len(value) == len(kinds) and all(map(fits, value, kinds))
    if isinstance(kind, dict):
        others = kind.get(..., object)
        return isinstance(value, dict) and all(
            fits(value.get(key), kind.get(key, others)) for key in (kind.keys() | value.keys()) - {...}
        )
    return value is None if kind is None else kind in (type(value), object)


def finite(value: Any) -> Any:
    """A value for JSON, which has no infinity and no NaN: numbers that are not finite are null."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
