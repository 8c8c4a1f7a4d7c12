"""Loader throughput without a model, beside timm's: python -m recipes.data data=imagefolder data.root=..."""

import argparse
import sys
import time
from collections.abc import Sequence

from recipes.config import compose, reported
from recipes.data import Data, build
from recipes.data.speed import measure

SECONDS, TURNS = 3.0, 5


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m recipes.data", description=__doc__)
    parser.add_argument("overrides", nargs="*", help="key=value as for train.py")
    return parser.parse_args(arguments)


def main() -> None:
    """Print images per second for the configured training and validation sets, as medians over alternating turns."""
    args = parse(sys.argv[1:])
    with reported("train"):
        cfg = compose(args.overrides)
        began = time.perf_counter()
        data = build(cfg)
        print(f"{cfg.data.name}: {_sizes(data)}, opened in {time.perf_counter() - began:.2f} s")
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
