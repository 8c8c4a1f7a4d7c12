"""Keys and values of Hydra's overrides: how they are read, and how to write those that it would misread."""

import re
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, QuotedString
from hydra.errors import HydraException


def key_of(override: str) -> str:
    """The key that an override sets, adds (`+`) or removes (`~`)."""
    return override.partition("=")[0].lstrip("+~")


def written(value: Any) -> str:
    """A value in Hydra's grammar."""
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(written, value)) + "]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{written(item)}" for key, item in value.items()) + "}"
    if isinstance(value, str):
        return quote("key", value).removeprefix("key=")
    return "null" if value is None else str(value).lower()  # True, False, and numbers: 1e-05, inf


def quote(key: str, value: str) -> str:
    """The override `key=value` that Hydra reads as exactly that text: with quotes only where they are needed.

    For a shell, wrap it in shlex.quote.
    """
    forms = [value, f'"{_escape(value, chr(34))}"', f"'{_escape(value, chr(39))}'"]
    for form in forms:
        if reads_as(f"{key}={form}") == value:
            return f"{key}={form}"
    raise ValueError(f"no way to write {value!r} on Hydra's command line")


def reads_as(override: str) -> object:
    """The value that Hydra reads; None for what it refuses or takes for several values."""
    try:
        parsed = OverridesParser.create().parse_override(override)
    except HydraException:
        return None
    return None if parsed.is_sweep_override() else parsed.value()


def readings(override: str) -> list[object]:
    """The values that Hydra reads, of which `a,b` has several; none for what it refuses, or does not list."""
    try:
        parsed = OverridesParser.create().parse_override(override)
    except HydraException:
        return []
    if not isinstance(parsed.value(), ChoiceSweep):
        return [] if parsed.is_sweep_override() else [parsed.value()]
    return [item.text if isinstance(item, QuotedString) else item for item in parsed.value().list]


def _escape(text: str, quote: str) -> str:
    # a backslash stands for itself, unless a quote follows, or the end of the text and with it the closing quote
    doubled = re.sub(rf"(\\+)(?={quote}|\Z)", r"\1\1", text)
    return doubled.replace(quote, "\\" + quote)
