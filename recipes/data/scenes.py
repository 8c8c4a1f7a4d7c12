"""Scenes: scikit-learn's scans of digits on textured backgrounds, with exact masks and boxes. No download.

Scene `index` of a split is a function of (data.split_seed, split, index) and the size: the same for every seed of a
run, so that runs are evaluated on the same images. The scans are split first; none occurs in both splits.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from recipes.data import digits
from recipes.data.build import SPLITS
from recipes.data.errors import DataError
from recipes.data.seeding import Stream

BACKGROUND = 10  # the class of everything but digits
SIDES = (0.35, 0.65)  # of a scan, as shares of the scene's short side
SHRINK = 0.985  # factor on the size of a scan from one attempt to place it to the next
SEEN = 0.8  # minimum share of an object's pixels that must remain visible
SHARED = 0.3  # maximum overlap of two scans, as a share of the smaller one, at the first attempt
CONTRAST = 90.0  # minimum difference in grey levels between a digit and the background under it
MOST = 12  # things; more would have to overlap
SMALLEST = 32  # pixels of the short side


@dataclass(frozen=True)
class Thing:
    """A scan in a scene, on top of those before it.

    row   index among the split's scans
    ink   (side, side) share of ink in each pixel; from one half on, the pixel belongs to the digit
    """

    row: int
    label: int
    top: int
    left: int
    ink: np.ndarray
    colour: np.ndarray

    @property
    def place(self) -> tuple[slice, slice]:
        side = len(self.ink)
        return slice(self.top, self.top + side), slice(self.left, self.left + side)


class Scenes:
    """`count` scenes of `size` (height, width), of `things` (fewest, most) scans each."""

    def __init__(
        self, scans: digits.Digits, count: int, size: tuple[int, int], things: tuple[int, int], key: tuple[int, int]
    ):
        self.scans, self.count, self.size, self.things, self.key = scans, count, size, things, key
        self.kept: tuple[int, Any] = (-1, None)  # image and labels of a scene are requested one after the other

    def __len__(self) -> int:
        return self.count

    def where(self, index: int) -> str:
        return f"scene {index} of {self.count}"

    def image(self, index: int) -> Image.Image:
        return Image.fromarray(self._scene(index)[0])

    def semantic(self, index: int) -> np.ndarray:
        _, things, owner = self._scene(index)
        classes = np.array([*(thing.label for thing in things), BACKGROUND], np.uint8)
        return classes[owner]  # the last where there is no thing: -1

    def instances(self, index: int, *, masks: bool) -> dict[str, Any]:
        _, things, owner = self._scene(index)
        seen = owner == np.arange(len(things))[:, None, None]  # (N, H, W)
        found = {
            "boxes": np.stack([box(mask) for mask in seen]),
            "labels": np.array([thing.label for thing in things], np.int64),
            "area": seen.sum((1, 2)).astype(np.float32),
            "crowd": np.zeros(len(things), bool),
            "size": self.size,
        }
        return found | ({"masks": seen} if masks else {})

    def _scene(self, index: int) -> tuple[np.ndarray, list[Thing], np.ndarray]:
        """(H, W, 3) uint8 image, its things from bottom to top, and (H, W) which of them is visible, -1 for none."""
        if self.kept[0] != index:
            self.kept = (index, self._made(index))
        return self.kept[1]

    def _made(self, index: int) -> tuple[np.ndarray, list[Thing], np.ndarray]:
        rng = np.random.default_rng([Stream.SCENES, *self.key, index])
        ground = texture(rng, self.size)
        things, owner = [], np.full(self.size, -1)
        for _ in range(int(rng.integers(self.things[0], self.things[1] + 1))):
            thing, owner = self._placed(rng, ground, things, owner)
            things.append(thing)
        image = ground.copy()
        for thing in things:
            part, ink = image[thing.place], thing.ink[..., None]
            image[thing.place] = part + (thing.colour - part) * ink
        return image.round().clip(0, 255).astype(np.uint8), things, owner

    def _placed(
        self, rng: np.random.Generator, ground: np.ndarray, things: list[Thing], owner: np.ndarray
    ) -> tuple[Thing, np.ndarray]:
        """Place one more thing so that enough of all others stays visible; each try is smaller and may overlap more."""
        sizes = [(thing.ink >= 0.5).sum() for thing in things]
        for attempt in itertools.count():
            room = SHRINK**attempt
            side = max(round(min(self.size) * float(rng.uniform(*SIDES)) * room), 8)
            top, left = (int(rng.integers(length - side + 1)) for length in self.size)
            if any(shared((top, left, side), other) * room > SHARED for other in things):
                continue
            thing = self._thing(rng, ground, top, left, side)
            covered = owner.copy()
            covered[thing.place][thing.ink >= 0.5] = len(things)
            visible = np.bincount(covered[covered >= 0], minlength=len(things))
            if all(visible[number] >= SEEN * size for number, size in enumerate(sizes)):
                return thing, covered

    def _thing(self, rng: np.random.Generator, ground: np.ndarray, top: int, left: int, side: int) -> Thing:
        row = int(rng.integers(len(self.scans.labels)))
        scan = Image.fromarray(self.scans.scans[row]).resize((side, side), Image.Resampling.BICUBIC)
        ink = np.asarray(scan, np.float32) / 255
        colour = contrasting(rng, float(ground[top : top + side, left : left + side].mean()))
        return Thing(row, int(self.scans.labels[row]), top, left, ink, colour)


def shared(square: tuple[int, int, int], other: Thing) -> float:
    """The overlap of a square (top, left, side) and a scan, as a share of the smaller of the two."""
    (*corner, side), length = square, len(other.ink)
    places = zip(corner, (other.top, other.left), strict=True)
    down, right = (max(0, min(a + side, b + length) - max(a, b)) for a, b in places)
    return down * right / min(side, length) ** 2


def texture(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """(H, W, 3) float32 background: noise of several grain sizes in two colours, and stripes."""
    height, width = size
    grey = np.zeros(size, np.float32)
    for grain in (2, 4, 8, 16, 32):
        noise = Image.fromarray(rng.standard_normal((grain + 1, grain + 1), np.float32))
        grey += np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC)) / grain**0.5
    angle, waves, phase = rng.uniform(0, np.pi), rng.uniform(2, 12), rng.uniform(0, 2 * np.pi)
    down, right = np.mgrid[0:height, 0:width].astype(np.float32) / min(size)
    grey += rng.uniform(0, 1) * np.sin(2 * np.pi * waves * (down * np.sin(angle) + right * np.cos(angle)) + phase)
    share = ((grey - grey.min()) / (grey.max() - grey.min()))[..., None].astype(np.float32)
    middle = rng.uniform(20, 110, 3)
    one, other = (np.clip(middle + rng.uniform(-40, 40, 3), 0, 255).astype(np.float32) for _ in range(2))
    return one + (other - one) * share + 4 * rng.standard_normal((height, width, 1), np.float32)


def contrasting(rng: np.random.Generator, grey: float) -> np.ndarray:
    """A colour whose channels are all at least `CONTRAST` above a grey level: light ink, as in the scans."""
    return rng.uniform(min(grey + CONTRAST, 240), 255, 3).astype(np.float32)


def box(mask: np.ndarray) -> np.ndarray:
    """(4,) float32 x0, y0, x1, y1 of a mask (H, W): its pixels lie between the edges."""
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], np.float32)


def load(cfg, splits: Sequence[str], size: tuple[int, int], kind: str) -> tuple[list[Scenes], list[str]]:
    """Scenes of each split ("train", "val"), and class names; the last one of a label map is the background.

    Raises DataError for numbers from which no scene can be made.
    """
    _check(cfg, size)
    scans = dict(zip(SPLITS, digits.load(size, cfg.val_fraction, cfg.split_seed), strict=True))
    found = [
        Scenes(scans[split], cfg[f"{split}_count"], size, tuple(cfg.things), (cfg.split_seed, SPLITS.index(split)))
        for split in splits
    ]
    return found, [*digits.CLASSES, *(["background"] if kind == "semantic" else [])]


def _check(cfg, size: tuple[int, int]) -> None:
    if min(size) < SMALLEST:
        raise DataError(f"data.img_size={cfg.img_size} is too small for scenes: expected at least {SMALLEST} pixels")
    things = [] if cfg.things is None else list(cfg.things)
    if len(things) != 2 or not 1 <= things[0] <= things[1] <= MOST:
        raise DataError(f"data.things={things or 'null'}: expected [fewest,most] scans per scene, 1 to {MOST}")
    for key in ("train_count", "val_count"):
        if cfg[key] is None or cfg[key] < 1:
            given = "null" if cfg[key] is None else cfg[key]
            raise DataError(f"data.{key}={given}: expected at least one scene")
