"""Objects with boxes and masks in COCO's JSON (https://cocodataset.org/#format-data), and images in a folder."""

from __future__ import annotations

import json
import math
import os
import reprlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from recipes.console import say
from recipes.data.encoded import Files
from recipes.data.errors import BadImage, DataError
from recipes.data.files import Packed, content_of
from recipes.data.masks import places, safe
from zoo.errors import listed
from zoo.files import is_folder

REACH = 10  # a corner may lie this many sides of an image outside it
DIGITS = 7  # of five bits: the maximum of a run in pycocotools, which has 32 bits
ROW = ("file", "size", "objects")  # what is known of an image
PARTS = ("images", "annotations", "categories")
LARGEST = float(np.finfo(np.float32).max)  # boxes and areas are float32


class Coco(Files):
    """The images of one split; what is known of each is JSON.

    rows        of each image `id`, `file`, `size` (H, W) and `objects`
    categories  the ids of the classes, in the order of these
    """

    def __init__(self, folder: Path, rows: list[dict[str, Any]], categories: Sequence[Any]):
        self.folder, self.numbers, self.categories = folder, [row["id"] for row in rows], categories
        # without the id: runs record a digest of these
        self.rows = Packed([json.dumps({key: row[key] for key in ROW}).encode() for row in rows])

    def __len__(self) -> int:
        return len(self.rows)

    def where(self, index: int) -> str:
        return os.path.join(self.folder, self._row(index)["file"])

    def has_masks(self) -> bool:
        """Whether any object that is not a crowd has a segmentation."""
        things = (thing for index in range(len(self)) for thing in self._row(index)["objects"])
        return any(thing["segmentation"] for thing in things if not thing["crowd"])

    def instances(self, index: int, *, masks: bool) -> dict[str, Any]:
        row = self._row(index)
        objects, size = row["objects"], tuple(row["size"])
        corners = np.array([thing["bbox"] for thing in objects], np.float32).reshape(-1, 4)
        corners[:, 2:] += corners[:, :2]
        found = {
            "boxes": corners,
            "labels": np.array([thing["label"] for thing in objects], np.int64),
            "area": np.array([thing["area"] for thing in objects], np.float32),
            "crowd": np.array([thing["crowd"] for thing in objects], bool),
            "size": size,
        }
        if masks:
            shapes = [outlined(thing["segmentation"], size, self.where(index)) for thing in objects]
            found["masks"] = np.stack(shapes) if shapes else np.zeros((0, *size), bool)
        return found

    def _row(self, index: int) -> dict[str, Any]:
        return json.loads(self.rows[index])


def outlined(shape: Any, size: tuple[int, int], where: str) -> np.ndarray:
    """(H, W) bool mask of polygons, or of a run-length code. Raises BadImage for anything else."""
    from pycocotools import mask

    if not shape:
        raise BadImage(f"{where} has an object without a segmentation; task.head=faster_rcnn only needs boxes")
    try:
        if isinstance(shape, list):
            _check_corners(shape, size)
            return mask.decode(mask.merge(mask.frPyObjects(shape, *size))).astype(bool)
        if not isinstance(shape, dict) or not shape.keys() >= {"size", "counts"}:
            raise ValueError(f"it is {reprlib.repr(shape)}: expected polygons, or a run-length code, size and counts")
        if tuple(shape["size"]) == size:
            return mask.decode(_encoded(shape["counts"], size)).astype(bool)
    # pycocotools raises plain Exceptions, and there may be missing keys
    except Exception as error:
        raise BadImage(f"{where} has an object whose segmentation cannot be read: {error}") from error
    given, said = (" x ".join(map(str, reversed(sides))) for sides in (shape["size"], size))
    raise BadImage(f"{where} has an object whose mask has {given} pixels, but the image is listed with {said}")


def _check_corners(polygons: list[list[float]], size: tuple[int, int]) -> None:
    """pycocotools ends the process at a corner that is not finite, and takes memory for every pixel up to a corner."""
    places = [place for polygon in polygons for place in (polygon if isinstance(polygon, list) else [None])]
    if not all(isinstance(place, (int, float)) for place in places):
        raise ValueError(
            f"its polygons are {reprlib.repr(polygons)}: expected a list with a flat list of numbers for each, "
            "[[x, y, x, y, ...], ...]"
        )
    odd = next((polygon for polygon in polygons if len(polygon) % 2), None)
    if odd is not None:
        raise ValueError(
            f"a polygon has {len(odd)} numbers, {reprlib.repr(odd)}: expected an even number, x and y of each corner"
        )
    if not all(map(math.isfinite, places)):
        raise ValueError("a corner of a polygon is not a finite number")
    far = max(places, key=abs)
    if abs(far) > REACH * max(size):
        raise ValueError(f"a corner of a polygon lies at {far:g}, more than {REACH} sides away from the image")


def _encoded(counts: str | list[int], size: tuple[int, int]) -> Any:
    """A run-length code as pycocotools takes it, after a check that the runs fill the mask."""
    from pycocotools import mask

    runs = np.array(counts if isinstance(counts, list) else _runs(counts))
    if runs.min(initial=0) < 0 or runs.sum() != math.prod(size):
        odd = ", some of them negative" if runs.min(initial=0) < 0 else ""
        raise ValueError(f"its runs cover {runs.sum()} pixels{odd}: expected {math.prod(size)}")
    return mask.frPyObjects({"size": size, "counts": runs.tolist()}, *size)


def _runs(code: str) -> np.ndarray:
    """The runs of a compressed code: numbers with five bits per character, low ones first; 32 says that more follow.

    From the fourth on they are differences to the run two before. Raises ValueError for an invalid code.
    """
    symbols = np.frombuffer(code.encode(), np.uint8).astype(np.int64) - ord("0")
    ends = np.flatnonzero(symbols < 32)  # of the numbers
    if not len(symbols) or symbols.min() < 0 or symbols.max() > 63 or ends[-1:].tolist() != [len(symbols) - 1]:
        raise ValueError("its runs are not a complete run-length code")
    lengths = np.diff(ends, prepend=-1)
    if lengths.max() > DIGITS:
        raise ValueError("its runs are not a complete run-length code")
    starts = ends + 1 - lengths
    places = np.arange(len(symbols)) - np.repeat(starts, lengths)
    runs = np.add.reduceat((symbols & 31) << 5 * places, starts)
    runs -= np.where(symbols[ends] & 16, 1 << 5 * lengths, 0)  # the highest bit is a sign
    runs[1::2], runs[2::2] = runs[1::2].cumsum(), runs[2::2].cumsum()
    return runs


def load(cfg, splits: Sequence[str], size: tuple[int, int], kind: str) -> tuple[list[Coco], list[str]]:
    """Images of each split ("train", "val"), and category names; training images without an object are left out.

    Raises DataError for missing files, files not in COCO's format, and names that lead out of their folder.
    """
    try:
        import pycocotools  # noqa: F401
    except ImportError as error:
        raise DataError(f"data={cfg.name} needs the package pycocotools: pip install pycocotools") from error
    found = {split: _split(cfg, split) for split in splits}
    names = found["val"][2]
    for split, (_, _, others) in found.items():
        differing = set(others.items()) ^ set(names.items())
        if differing:
            number = min((number for number, _ in differing), key=str)  # ids may be texts in one of them
            one, other = (f"{named[number]!r}" if number in named else "missing" for named in (others, names))
            raise DataError(
                f"{cfg[f'{split}_json']} and {cfg.val_json} have different categories: id {number!r} is {one} in the "
                f"first and {other} in the second: expected the same ids and names in both"
            )
    if "train" in found:
        folder, rows, _ = found["train"]
        found["train"] = (folder, _to_learn_from(rows, cfg.name), names)
    if not any(map(_has_object, found["val"][1])):
        raise DataError(f"no validation image of {cfg.name} has an object: there is nothing to evaluate")
    for split, (folder, rows, _) in found.items():
        _check_files(folder, [row["file"] for row in rows], cfg[f"{split}_json"])
    return [Coco(folder, rows, list(names)) for folder, rows, _ in found.values()], list(names.values())


def _to_learn_from(rows: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    kept = list(filter(_has_object, rows))
    if not kept:
        raise DataError(f"no training image of {name} has an object: there is nothing to learn")
    if len(kept) < len(rows):
        say(f"{len(rows) - len(kept)} training images without an object are left out")
    return kept


def _has_object(row: dict[str, Any]) -> bool:
    """Whether there is an object that is not a crowd."""
    return any(not thing["crowd"] for thing in row["objects"])


def _check_files(folder: Path, files: list[str], named_by: str) -> None:
    """Raise DataError for missing images; folders are listed once, which is faster than checking each file."""
    there = {parent: _listed(folder / parent) for parent in {os.path.dirname(file) for file in files}}
    lost = [file for file in files if os.path.basename(file) not in there[os.path.dirname(file)]]
    if lost:
        raise DataError(
            f"{named_by} names {len(lost)} of {len(files)} images that are not in {folder}, such as {lost[0]}"
        )


def _listed(folder: Path) -> set[str]:
    return set(os.listdir(folder)) if is_folder(folder) else set()


def _split(cfg, split: str) -> tuple[Path, list[dict[str, Any]], dict[int, str]]:
    """The folder of the images, the annotations of each, and the categories."""
    root, (file, images) = places(cfg, split, ("json", "images"))
    if not is_folder(root / images):
        raise DataError(f"{root} has no folder {images}: give data.root= or data.{split}_images=")
    content = _content(root / file)
    names = _categories(content, str(root / file))
    rows = _rows(content, list(names), str(root / file))
    # pycocotools ranks equal scores by the ids of their images
    order = sorted(rows, key=lambda number: (isinstance(number, str), number)) if split == "val" else rows
    return root / images, [rows[number] for number in order], names


def _categories(content: dict[str, Any], file: str) -> dict[int, str]:
    """Names by id, sorted by id."""
    try:
        found = [(entry["id"], str(entry["name"])) for entry in content["categories"]]
    except (KeyError, TypeError) as error:
        raise DataError(
            f"{file}: a category lacks what COCO's format requires: {type(error).__name__}: {error}"
        ) from error
    if not found:
        raise DataError(f"{file} has no categories: expected one for each class, with its id and name")
    kinds = {type(number) for number, _ in found}
    if len(kinds) > 1 or not kinds <= {int, float, str}:
        raise DataError(
            f"{file}: the categories have the ids {reprlib.repr([number for number, _ in found])}: expected integers"
        )
    _check_different([number for number, _ in found], file, "id")
    _check_different([name for _, name in found], file, "name")  # results go by name
    return dict(sorted(found))


def _check_different(values: list[Any], file: str, key: str) -> None:
    """Raise DataError if two categories have the same value: one would replace the other."""
    twice = next((value for value, count in Counter(values).items() if count > 1), None)
    if twice is not None:
        raise DataError(f"{file}: several categories have the {key} {twice!r}: expected different ones")


def _content(path: Path) -> dict[str, Any]:
    """The contents of a file; a key whose value is null counts as missing."""
    try:
        content = json.loads(content_of(path), object_hook=_without_nulls)
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"cannot read the annotations {path}: {error}") from error
    missing = [key for key in PARTS if not isinstance(content, dict) or key not in content]
    if missing:
        raise DataError(f"{path} is not a COCO annotation file: it has no {', '.join(missing)}")
    for key in PARTS:
        _check_entries(content[key], f"{path}: {key}")
    return content


def _check_entries(entries: Any, where: str) -> None:
    """Raise DataError unless this is a list of objects."""
    if not isinstance(entries, list):
        raise DataError(f"{where} is {reprlib.repr(entries)}: expected a list of objects")
    for place, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise DataError(f"{where}[{place}] is {reprlib.repr(entry)}: expected an object, with its id")


def _without_nulls(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if value is not None}


def _rows(content: dict[str, Any], categories: list[int], file: str) -> dict[Any, dict[str, Any]]:
    """What `Coco` keeps of each image, by its id, in the order of the file."""
    rows: dict[Any, dict[str, Any]] = {}
    for place, image in enumerate(content["images"]):
        with _complete(f"{file}: images[{place}]", image):
            size, name = [int(image["height"]), int(image["width"])], safe(image["file_name"], file)
            if image["id"] in rows:
                raise DataError(f"{file}: several images have the id {image['id']!r}: expected different ones")
            rows[image["id"]] = {"id": image["id"], "file": name, "size": size, "objects": []}
    boxless = cornerless = 0
    for place, entry in enumerate(content["annotations"]):
        with _complete(f"{file}: annotations[{place}]", entry):
            thing = _thing(entry, categories, file)
            if entry["image_id"] not in rows:
                raise DataError(
                    f"{file}: annotation {entry.get('id')} is of image {entry['image_id']!r}, which is not in the file"
                )
            row = rows[entry["image_id"]]
        if thing is None or not _is_inside(thing["bbox"], row["size"]):
            boxless += 1
            continue
        given, thing["segmentation"] = thing["segmentation"], _with_corners(thing["segmentation"])
        cornerless += len(given) - len(thing["segmentation"]) if isinstance(given, list) else 0
        row["objects"].append(thing)
    if boxless:
        say(f"{file}: {boxless} objects whose boxes have no area, or lie outside their image, are left out")
    if cornerless:
        say(f"{file}: {cornerless} polygons with fewer than three corners are left out")
    return rows


@contextmanager
def _complete(where: str, entry: Any) -> Iterator[None]:
    """Raise DataError, with place and id, for an entry of the file that lacks something."""
    try:
        yield
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        called = f" (id {entry['id']})" if isinstance(entry, dict) and "id" in entry else ""
        raise DataError(
            f"{where}{called} lacks what COCO's format requires: {type(error).__name__}: {error}"
        ) from error


def _with_corners(segmentation: Any) -> Any:
    """Without polygons (x, y, x, y, ...) of fewer than three corners, which have no pixel; codes are unchanged."""
    if not isinstance(segmentation, list):
        return segmentation
    return [part for part in segmentation if not _is_short(part)]


def _is_short(part: Any) -> bool:
    """Whether this is a polygon of fewer than three corners; lists of points are none, and are refused when read."""
    return isinstance(part, list) and len(part) < 6 and not any(isinstance(place, list) for place in part)


def _is_inside(box: list[float], size: list[int]) -> bool:
    """Whether a part of a box (x, y, width, height) is inside an image of `size` (height, width)."""
    x, y, width, height = box
    return x < size[1] and y < size[0] and x + width > 0 and y + height > 0


def _thing(entry: dict[str, Any], categories: list[int], file: str) -> dict[str, Any] | None:
    """An object; None if its box has no area."""
    named, box = f"{file}: annotation {entry.get('id')}", [float(number) for number in entry["bbox"]]
    if entry["category_id"] not in categories:
        known = listed(list(map(repr, categories)), 10)
        raise DataError(f"{named} is of category {entry['category_id']!r}: expected one of {known}")
    if len(box) != 4 or not _are_finite(*box, box[0] + box[2], box[1] + box[3]):
        raise DataError(f"{named} has the box {box}: expected x, y, width and height")
    if min(box[2:]) <= 0:
        return None
    area, crowd = float(entry.get("area", box[2] * box[3])), entry.get("iscrowd", 0)
    if not 0 <= area <= LARGEST:
        raise DataError(f"{named} has the area {area}: expected a number of pixels, 0 or more")
    if crowd not in (0, 1):  # also false and true
        raise DataError(f"{named} has iscrowd={crowd!r}: expected 0 or 1")
    return {
        "bbox": box,
        "label": categories.index(entry["category_id"]),
        "area": area,
        "crowd": bool(crowd),
        "segmentation": entry.get("segmentation", []),
    }


def _are_finite(*numbers: float) -> bool:
    """Whether numbers are finite in float32; NaN is not."""
    return all(abs(number) <= LARGEST for number in numbers)
