"""Shards for the tests: images whose colour tells which sample they are."""

import io
import json
import tarfile
from pathlib import Path

import datasets
import numpy as np
from PIL import Image

COUNTS = (7, 30, 1, 22, 40, 13)  # samples of the training shards: 113


def picture(number: int) -> bytes:
    """A PNG of one colour, the number of the sample."""
    buffer = io.BytesIO()
    Image.new("RGB", (36, 34), (number % 256, number // 256, 50)).save(buffer, "PNG")
    return buffer.getvalue()


def number_of(image: Image.Image) -> int:
    """Which sample an image is."""
    red, green, _ = image.getpixel((0, 0))
    return red + 256 * green


def members(number: int, label: str = "cls") -> dict[str, bytes]:
    """The members of a sample, by extension."""
    text = str(number % 5) if label == "cls" else json.dumps({"label": number % 5})
    return {label: text.encode(), "png": picture(number), "txt": b"a caption"}


def write_tar(path: Path, samples: dict[str, dict[str, bytes]]) -> None:
    """An archive of samples: key -> extension -> bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for key, parts in samples.items():
            for extension, data in parts.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))


def tars(root: Path, counts=COUNTS, label: str = "cls") -> str:
    """Training shards of so many samples, one validation shard of 20."""
    start = 0
    for split, sizes in (("train", counts), ("validation", (20,))):
        for shard, size in enumerate(sizes):
            samples = {f"dir/{number:05}": members(number, label) for number in range(start, start + size)}
            write_tar(root / f"set-{split}-{shard:03}.tar", samples)
            start += size
        start = 0
    return str(root)


def parquets(root: Path, counts=COUNTS) -> str:
    """The same samples as parquet files with row groups of eight rows."""
    kind = datasets.ClassLabel(names=list("abcde"))
    features = datasets.Features({"image": datasets.Image(), "label": kind})
    start = 0
    for split, sizes in (("train", counts), ("validation", (20,))):
        for shard, size in enumerate(sizes):
            numbers = np.arange(start, start + size).tolist()
            images = [{"bytes": picture(number), "path": None} for number in numbers]
            table = {"image": images, "label": [number % 5 for number in numbers]}
            (root / "data").mkdir(parents=True, exist_ok=True)
            file = root / "data" / f"{split}-{shard:05}-of-{len(sizes):05}.parquet"
            datasets.Dataset.from_dict(table, features=features).to_parquet(file, batch_size=8)
            start += size
        start = 0
    return str(root)
