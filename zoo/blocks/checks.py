"""Checks of arguments that a layer would only reject later, without naming them."""

import sys
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

from timm.layers import to_2tuple

LARGEST = sys.float_info.max


def check_model(in_chans: Any, num_classes: Any, **args: Any) -> None:
    """Raise ValueError for impossible images or classes, and like `check_stages`; families call it before all else."""
    check_count("in_chans", in_chans, "the number of channels of an image")
    check_classes(num_classes)
    check_stages(**args)


def check_stages(**args: Any) -> None:
    """Raise ValueError unless all arguments have one number per stage, there is a stage, and none is without blocks.

    The channels and the blocks of the stages are those called `dims` and `depths`.
    """
    lengths = {len(value) if isinstance(value, Sequence) else 0 for value in args.values()}
    if len(lengths) > 1 or 0 in lengths:
        given = ", ".join(f"{name} is {value!r}" for name, value in args.items())
        raise ValueError(f"{given}: expected one number per stage in each")
    for name, unit in (("dims", "channel"), ("depths", "block")):
        if not _are_counts(args.get(name, ())):
            raise ValueError(f"{name} is {args[name]!r}: expected at least one {unit} per stage")


def check_count(name: str, value: Any, unit: str) -> None:
    """Raise ValueError unless this is a whole number of at least 1; `unit` is what it counts."""
    if not _are_counts([value]):
        raise ValueError(f"{name} is {value!r}: expected {unit}, 1 or more")


def number(name: str, value: Any, expected: str, least: float = -LARGEST, most: float = LARGEST) -> float:
    """A number as a Python float. Raises ValueError unless it is finite, and from `least` to `most`."""
    if not isinstance(value, Real) or not least <= value <= most:
        raise ValueError(f"{name} is {value!r}: expected {expected}")
    return float(value)


def check_classes(num_classes: Any) -> None:
    """Raise ValueError unless this is a number of classes."""
    if not isinstance(num_classes, Integral) or num_classes < 0:
        raise ValueError(f"num_classes is {num_classes!r}: expected the number of classes, or 0 for no classifier")


def check_heads(dim: int, heads: int) -> None:
    """Raise ValueError unless `dim` channels divide into `heads` heads of equal width."""
    if not _are_counts((dim, heads)) or dim % heads:
        raise ValueError(f"dim {dim} does not divide into {heads} heads")


def image_sides(img_size: Any) -> tuple[int, int]:
    """(height, width) in pixels of an image given so, or as one number. Raises ValueError if there are none."""
    sides = [img_size] * 2 if isinstance(img_size, Integral) else img_size
    if not isinstance(sides, Sequence) or len(sides) != 2 or not _are_counts(sides):
        raise ValueError(f"img_size is {img_size!r}: expected pixels a side, or (height, width)")
    return int(sides[0]), int(sides[1])


def plain(sides: Sequence[int]) -> int | tuple[int, int]:
    """(height, width) as one number where they are equal."""
    height, width = sides
    return height if height == width else (height, width)


def window_sides(window: int | tuple[int, int], name: str = "window", unit: str = "token") -> tuple[int, int]:
    """(vertical, horizontal) tokens of a window given so, or as one number. Raises ValueError if there are none.

    name, unit  of what else is given in this form, and of what its sides count, for the message
    """
    sides = to_2tuple(window)
    if len(sides) != 2 or not _are_counts(sides):
        raise ValueError(f"{name} is {window}: expected at least 1 {unit} a side, or (vertical, horizontal)")
    return sides


def _are_counts(numbers: Sequence[Any]) -> bool:
    return all(isinstance(n, Integral) and not isinstance(n, bool) and n > 0 for n in numbers)
