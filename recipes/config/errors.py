"""The error of a wrong configuration, and near matches for its message."""

from collections.abc import Iterable
from difflib import get_close_matches


class ConfigError(ValueError):
    """The command line or a configuration file is wrong; the message says what to type instead."""


def near(word: object, options: Iterable[str]) -> str:
    """` (did you mean ...?)` for the options like `word`; nothing if none is."""
    matches = get_close_matches(str(word), list(options), n=3, cutoff=0.6)
    return f" (did you mean {' or '.join(matches)}?)" if matches else ""
