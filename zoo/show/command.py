"""Pictures of what a model's attention does with an image.

python -m zoo.show model=biformer_t image=cat.jpg
python -m zoo.show model=maxvit_t.timm_tf_in1k image=cat.jpg query=120,90 stage=1 out=pictures
python -m zoo.show checkpoint=gcvit_1k_tiny.pth.tar img_size=256,320 only=query

model       a name of the zoo or of timm; with a tag its weights are downloaded, without one they are random
checkpoint  a weights file: the model is recognised unless model= names it
image       a file; default: flower, which like china comes with scikit-learn
query       y,x: the pixel whose attention is shown, in the image as the model sees it; default: the middle
stage       the number of a stage, from 0; default: all
block       which of its blocks with such attention, from 0; default: the first
head        the number of a head, from 0; default: the mean of all
img_size    pixels a side, or height,width: the image is cropped to it, and a model of the zoo is built for it
only        names of pictures, separated by commas
out         the folder for <model>-<picture>.png; default: inside
"""

import argparse
import sys
from collections.abc import Callable
from difflib import get_close_matches
from typing import Any

from ..errors import CheckpointError, plain_warnings
from .families import pictures
from .image import load
from .picture import ShowError
from .source import build


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


KEYS: dict[str, Callable[[str], Any]] = {
    "model": str,
    "checkpoint": str,
    "image": str,
    "out": str,
    "query": numbers,
    "img_size": numbers,
    "stage": int,
    "block": int,
    "head": int,
    "only": lambda text: text.split(","),
}
LENGTHS = {"query": (2,), "img_size": (1, 2)}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m zoo.show", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="as above")
    args = parser.parse_args(argv)
    try:
        given = dict(setting(text) for text in args.settings)
    except ShowError as error:
        parser.error(str(error))
    if "model" not in given and "checkpoint" not in given:
        parser.error("give model=NAME, checkpoint=FILE, or both")
    vars(args).update({key: None for key in KEYS} | {"image": "flower", "out": "inside", "block": 0} | given)
    return args


def setting(text: str) -> tuple[str, Any]:
    """Key and value of one argument. Raises ShowError for an unknown key, and for a value that does not fit."""
    key, equals, value = text.partition("=")
    if not equals:
        raise ShowError(f"{text} is not a setting: expected KEY=VALUE, such as model=biformer_t")
    if key not in KEYS:
        near = get_close_matches(key, KEYS, 1)
        raise ShowError(
            f"unknown key {key}: " + (f"did you mean {near[0]}?" if near else f"expected one of {', '.join(KEYS)}")
        )
    try:
        found = KEYS[key](value)
    except ValueError:
        raise ShowError(
            f"{text}: expected {'numbers separated by a comma' if key in LENGTHS else 'a number'}"
        ) from None
    if key in LENGTHS and len(found) not in LENGTHS[key]:
        raise ShowError(f"{text}: expected {' or '.join(map(str, LENGTHS[key]))} numbers separated by commas")
    return key, found


@plain_warnings()
def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        written(args)
    except (CheckpointError, ShowError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def written(args: argparse.Namespace) -> None:
    """Build the model, draw and write the pictures, and print what was written."""
    size = args.img_size if args.img_size is None or len(args.img_size) == 2 else args.img_size * 2
    photo = load(args.image)
    model, name, note = build(args.model, args.checkpoint, size)
    asked = {key: getattr(args, key) for key in ("query", "stage", "block", "head", "only")}
    for picture in pictures(model, photo, img_size=size, note=note, **asked):
        print(f"written: {picture.save(args.out, name)}")
        print(f"  {picture.caption}")
