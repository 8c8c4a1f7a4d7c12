"""scikit-learn's scans of handwritten digits: 1,797 real images that come with a dependency, no download."""

import math

import numpy as np
from PIL import Image

from recipes.data.errors import DataError

CLASSES = [str(digit) for digit in range(10)]


class Digits:
    """Scans of 8 x 8 pixels with 17 grey levels, resized bicubically to `size` (height, width) when they are read."""

    def __init__(self, scans: np.ndarray, labels: np.ndarray, rows: np.ndarray, size: tuple[int, int]):
        self.scans = scans  # (N, 8, 8) uint8
        self.labels = labels
        self.rows, self.size = rows, size

    def image(self, index: int) -> Image.Image:
        return Image.fromarray(self.scans[index]).resize(self.size[::-1], Image.Resampling.BICUBIC).convert("RGB")

    def where(self, index: int) -> str:
        return f"scikit-learn's digits, row {self.rows[index]}"


def load(size: tuple[int, int], val_fraction: float, split_seed: int) -> tuple[Digits, Digits]:
    """Training and validation digits: disjoint, stratified by class, and a function of `split_seed`.

    Raises DataError for a share that leaves one of them without a scan of each class, or if the package is missing.
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise DataError("the scans of digits need the package scikit-learn: pip install scikit-learn") from error

    bunch = load_digits()
    scans = np.round(bunch.images * (255 / 16)).astype(np.uint8)
    labels = bunch.target.astype(np.int64)
    rows = np.arange(len(labels))
    held, least = math.ceil(len(rows) * (val_fraction or 0)), len(CLASSES)
    if not least <= held <= len(rows) - least:
        raise DataError(
            f"data.val_fraction={val_fraction}: {held} of the {len(rows)} scans would be held out: expected a share "
            f"from {least / len(rows):.4f} to {1 - least / len(rows):.4f}, with a scan of each class on both sides"
        )
    parts = train_test_split(rows, test_size=val_fraction, stratify=labels, random_state=split_seed)
    train, val = (Digits(scans[part], labels[part], part, size) for part in map(np.sort, parts))
    return train, val
