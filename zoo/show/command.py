"""Pictures of what a model's attention does with an image.

python -m zoo.show model=biformer_t image=cat.jpg
python -m zoo.show model=maxvit_t.timm_tf_in1k image=cat.jpg query=120,90 stage=1 out=pictures
python -m zoo.show checkpoint=gcvit_1k_tiny.pth.tar img_size=256,320 only=query

model       a name of the zoo or of timm; with a tag its weights are downloaded where possible, without one random
checkpoint  a weights file, a run, or a folder of zoo.save_for_hf: the model is recognised unless model= names it
image       a file; default: flower, which like china comes with scikit-learn
query       y,x: the pixel whose attention is shown, in the image as the model sees it; default: the middle
stage       the number of a stage, from 0; default: all
block       which of its blocks with such attention, from 0; default: the first
head        the number of a head, from 0; default: the mean of all
img_size    pixels a side, or height,width: the image is cropped to it, and a model of the zoo is built for it
only        names of pictures, separated by commas
out         the folder for <model>-<picture>.png; default: inside

With model=, other keys are arguments of its constructor: model=biformer_t topk=[2,8,16] n_win=5. Those of a checkpoint
that lies in a run or in a folder of zoo.save_for_hf are known.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from inspect import signature
from typing import Any

from ops.tool import tool

from ..errors import CheckpointError, plain_warnings
from ..registry import class_of, variants
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
        given = settings(args.settings)
        arguments = {key: given.pop(key) for key in [*given] if key not in KEYS}
        check(arguments, given.get("model"))
    except ShowError as error:
        parser.error(str(error))
    if "model" not in given and "checkpoint" not in given:
        parser.error("give model=NAME, checkpoint=FILE, or both")
    vars(args).update({key: None for key in KEYS} | {"image": "flower", "out": "inside", "block": 0} | given)
    args.arguments = arguments
    return args


def settings(words: Iterable[str]) -> dict[str, Any]:
    """The values of all words by their keys. Raises ShowError for a key that is given twice."""
    found = {}
    for key, value in map(setting, words):
        if key in found:
            raise ShowError(f"{key}= is given more than once: expected one value")
        found[key] = value
    return found


def setting(text: str) -> tuple[str, Any]:
    """Key and value of one word. Raises ShowError for what is not a setting, and for a value that does not fit."""
    key, equals, value = text.partition("=")
    if not equals:
        raise ShowError(f"{text} is not a setting: expected KEY=VALUE, such as model=biformer_t")
    if key not in KEYS:
        return key, literal(value)
    try:
        found = KEYS[key](value)
    except ValueError:
        raise ShowError(
            f"{text}: expected {'numbers separated by a comma' if key in LENGTHS else 'a number'}"
        ) from None
    if key in LENGTHS and len(found) not in LENGTHS[key]:
        raise ShowError(f"{text}: expected {' or '.join(map(str, LENGTHS[key]))} numbers separated by commas")
    return key, found


def literal(text: str) -> Any:
    """A number, true, false, null, or a list of such; any other text is itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def check(arguments: Mapping[str, Any], model: str | None) -> None:
    """Raise ShowError for keys that neither the command nor the model takes, except where only timm knows the model,
    which refuses them itself.
    """
    architecture = None if model is None else model.partition(".")[0]
    if architecture is not None and architecture not in variants():
        return
    taken = taken_by(architecture) if architecture else []
    for key in (key for key in arguments if key not in taken):
        if near := get_close_matches(key, [*KEYS, *taken], 1):
            raise ShowError(f"unknown key {key}: did you mean {near[0]}?")
        others = f"an argument of {architecture}, {', '.join(taken)}" if taken else "with model= its arguments"
        raise ShowError(f"unknown key {key}: expected one of {', '.join(KEYS)}, or {others}")


def taken_by(name: str) -> list[str]:
    """The arguments of the constructor of a model of the zoo that are not keys of this command."""
    return [key for key in signature(class_of(name)).parameters if key not in KEYS]


@plain_warnings()
@tool
def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        written(args)
    except (CheckpointError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def written(args: argparse.Namespace) -> None:
    """Build the model, draw and write the pictures, and print what was written."""
    size = args.img_size if args.img_size is None or len(args.img_size) == 2 else args.img_size * 2
    photo = load(args.image)
    model, name, note = build(args.model, args.checkpoint, size, **args.arguments)
    asked = {key: getattr(args, key) for key in ("query", "stage", "block", "head", "only")}
    for picture in pictures(model, photo, img_size=size, note=note, **asked):
        print(f"written: {picture.save(args.out, name)}")
        print(f"  {picture.caption}")
