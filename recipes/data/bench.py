"""Measures the data loader: python -m recipes.data.bench --out benchmarks

The images are scikit-learn's photographs, cropped and scaled to usual sizes, in a folder, archives and parquet files.
"""

import argparse
import datetime
import io
import os
import platform
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ops.tool import amount, command, overwrite, positive, tool, writable
from recipes.config import compose, reported
from recipes.data import build
from recipes.data.speed import Rates, measure

SIZES = {"500x375": ((500, 375), 600), "2048x1536": ((2048, 1536), 60)}  # width and height, training images
SHARDS = 8
PLAIN = ["augment.re_prob=0", "augment.auto_augment=null", "augment.color_jitter=0"]
POLICY = "augment.auto_augment=rand-m9-mstd0.5-inc1"
ABOUT = (
    "Images per second from the loader, on the CPU, as normalised float32 batches. The images are crops of "
    "scikit-learn's two photographs, JPEG at quality 90; files are in the page cache. `timm` is its create_loader on "
    "the same files, with its default prefetcher, which normalises whole batches, and without it; archives and parquet "
    "are not measured with timm. ours / timm is relative to the faster of the two."
)
CASES = {  # name -> (data set, size of the images, split, overrides)
    "500x375 at 224": ("imagefolder", "500x375", "train", []),
    "500x375 at 224, RandAugment": ("imagefolder", "500x375", "train", [POLICY]),
    "500x375 at 128": ("imagefolder", "500x375", "train", ["data.img_size=128"]),
    "2048x1536 at 224": ("imagefolder", "2048x1536", "train", []),
    "2048x1536 at 224, data.jpeg=full": ("imagefolder", "2048x1536", "train", ["data.jpeg=full"]),
    "500x375 at 224, data.cache=ram": ("imagefolder", "500x375", "train", ["data.cache=ram"]),
    "500x375 at 224, data.cache=disk": ("imagefolder", "500x375", "train", ["data.cache=disk"]),
    "500x375 at 224, evaluation": ("imagefolder", "500x375", "val", []),
    "500x375 at 224, archives": ("webdataset", "500x375", "train", []),
    "500x375 at 224, parquet": ("parquet_stream", "500x375", "train", []),
}


def photographs(size: tuple[int, int], count: int) -> list[bytes]:
    """JPEGs of random crops of scikit-learn's two photographs, scaled to `size` (width, height)."""
    from sklearn.datasets import load_sample_images

    rng, found = np.random.default_rng(0), []
    whole = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    for number in range(count):
        image = whole[number % 2]
        width, height = (int(side * rng.uniform(0.6, 1)) for side in image.size)
        left, top = (int(rng.integers(0, side)) for side in (image.width - width + 1, image.height - height + 1))
        buffer = io.BytesIO()
        image.resize(size, box=(left, top, left + width, top + height)).save(buffer, "JPEG", quality=90)
        found.append(buffer.getvalue())
    return found


def write(root: Path, kind: str, files: list[bytes]) -> str:
    """Writes the photographs, in two classes, as a folder or as eight shards; the validation split has half as many."""
    for split, part in (("train", files), ("val" if kind == "imagefolder" else "validation", files[: len(files) // 2])):
        {"imagefolder": _folder, "webdataset": _tars, "parquet_stream": _parquets}[kind](root / kind, split, part)
    return str(root / kind)


def _folder(root: Path, split: str, files: list[bytes]) -> None:
    for number, data in enumerate(files):
        path = root / split / str(number % 2) / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def _tars(root: Path, split: str, files: list[bytes]) -> None:
    root.mkdir(exist_ok=True)
    for shard in range(SHARDS):
        with tarfile.open(root / f"{split}-{shard}.tar", "w") as archive:
            for number, data in list(enumerate(files))[shard::SHARDS]:
                for name, content in ((f"{number}.jpg", data), (f"{number}.cls", str(number % 2).encode())):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))


def _parquets(root: Path, split: str, files: list[bytes]) -> None:
    import pyarrow
    from pyarrow.parquet import write_table

    root.mkdir(exist_ok=True)
    for shard in range(SHARDS):
        part = list(enumerate(files))[shard::SHARDS]
        images = [{"bytes": data, "path": None} for _, data in part]
        table = pyarrow.table({"image": images, "label": [number % 2 for number, _ in part]})
        write_table(table, root / f"{split}-{shard}.parquet", row_group_size=100)


def rates(case: str, root: Path, args: argparse.Namespace) -> Rates:
    """The measured rates of one case."""
    kind, size, split, overrides = CASES[case]
    given = [
        f"data={kind}",
        f"data.root={root / size / kind}",
        f"data.workers={args.workers}",
        f"++data.cache_dir={root}",  # also for cases without a cache
    ]
    cfg = compose([*given, "data.img_size=224", *PLAIN, "data.batch_size=32", "data.eval_batch_size=32", *overrides])
    return measure(cfg, build(cfg), split, seconds=args.seconds, turns=args.turns)


def table(found: dict[str, Rates]) -> str:
    """A row per case: images per second, and ours divided by the faster of timm's two."""
    names = ("ours", "timm", "timm, no prefetcher")
    lines = ["| case | images | " + " | ".join(names) + " | ours / timm |", "|---|---|---|---|---|---|"]
    for case, row in found.items():
        cells = [f"{row.rates[name]:.0f}" if name in row.rates else "-" for name in names]
        ratio = f"{row.ratio:.2f}" if row.ratio else "-"
        lines.append(f"| {case} | {row.images} | {' | '.join(cells)} | {ratio} |")
    return "\n".join(lines)


def report(found: dict[str, Rates], args: argparse.Namespace) -> str:
    """The table, and how it was measured."""
    packages = ("torch", "torchvision", "timm", "pillow", "numpy", "pyarrow")
    facts = {
        "date": datetime.date.today().isoformat(),
        "device": f"{platform.machine()} CPU ({torch.backends.cpu.get_cpu_capability()}), {os.cpu_count()} cores",
        "versions": f"python {platform.python_version()}, " + ", ".join(f"{name} {version(name)}" for name in packages),
        "settings": f"{args.workers} workers, batches of 32, random crop and horizontal flip, medians of {args.turns} "
        f"alternating turns of about {args.seconds:g} s, with the same images in each",
        "command": command("recipes.data.bench"),
    }
    return f"# The loader\n\n{ABOUT}\n\n" + "\n".join(f"- {k}: {v}" for k, v in facts.items()) + f"\n\n{table(found)}\n"


@tool
def main() -> None:
    """Measures every case, prints the table, and writes it to --out."""
    parser = argparse.ArgumentParser(prog="python -m recipes.data.bench", description="Times the loader beside timm's.")
    parser.add_argument("--workers", type=int, choices=range(257), default=2, metavar="N")
    parser.add_argument("--seconds", type=amount, default=3.0, help="length of one turn")
    parser.add_argument("--turns", type=positive, default=5)
    parser.add_argument("--scale", type=amount, default=1.0, help="factor on the numbers of images, for a quick look")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE")
    parser.add_argument("--out", type=Path, help="folder for data_cpu.md")
    args = parser.parse_args()
    if args.out:
        writable(args.out)
    with tempfile.TemporaryDirectory() as folder, reported("train"):
        os.environ["XDG_CACHE_HOME"] = folder
        root, found = Path(folder), {}
        for case in args.cases:
            kind, size, *_ = CASES[case]
            if not (root / size / kind).exists():
                (root / size).mkdir(exist_ok=True)
                write(root / size, kind, photographs(SIZES[size][0], round(SIZES[size][1] * args.scale)))
            found[case] = rates(case, root, args)
            print(f"{case}: {found[case].rates}", file=sys.stderr)
        text = report(found, args)
    if args.out:  # first: a reader of the output, such as head, may end before all is printed
        overwrite(args.out / "data_cpu.md", text)
    print(text)


if __name__ == "__main__":
    main()
