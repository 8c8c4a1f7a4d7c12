"""Checks the implementations of all ops on this machine: `python -m ops.check --help`."""

from .command import main, parse

__all__ = ["main", "parse"]
