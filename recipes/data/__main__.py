"""Loader throughput without a model, beside timm's; with --check every image is read, and those that cannot be used are
listed: python -m recipes.data data=imagefolder data.root=... [--check]
"""

import argparse
import sys
import time
from collections.abc import Sequence

from ops.tool import tool
from recipes.config import compose, expanded, reported
from recipes.data import Data
from recipes.data.check import check
from recipes.data.speed import measure
from recipes.task import create

SECONDS, TURNS = 3.0, 5


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m recipes.data", description=__doc__)
    parser.add_argument("overrides", nargs="*", help="key=value as for train.py")
    parser.add_argument("--check", action="store_true", help="read every image; exit status 1 if one cannot be used")
    return parser.parse_intermixed_args(arguments)


@tool
def main() -> None:
    """Measure or check the configured training and validation sets."""
    args = parse(sys.argv[1:])
    with reported("train"):
        cfg = compose(expanded(args.overrides))
        if args.check:
            cfg.data.cache = None  # an image in a cache would not be decoded
        task, began = create(cfg), time.perf_counter()
        data = task.build_data()
        print(f"{cfg.data.name}: {_sizes(data)}, opened in {time.perf_counter() - began:.2f} s")
        if args.check:
            sys.exit(min(1, check(data, cfg.data.workers)))
        # images per second, as medians over alternating turns
        for split in ("train", "val"):
            found = measure(cfg, data, split, seconds=SECONDS, turns=TURNS)
            rates = "  ".join(f"{name} {rate:.0f}" for name, rate in found.rates.items())
            ratio = f"  ours / timm {found.ratio:.2f}" if found.ratio else ""
            print(f"{split:5} images/s: {rates}{ratio}  (batches of {found.batch}, {found.workers} workers)")


def _sizes(data: Data) -> str:
    images = f"{len(data.train)} training and {len(data.val)} validation images"
    return f"{images}, {data.num_classes} classes, {data.img_size} px"


if __name__ == "__main__":
    main()
