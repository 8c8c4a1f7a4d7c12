"""How fast the data comes, without a model: python -m recipes.data data=imagenet data.root=... data.workers=8"""

import sys
import time

from recipes.config import compose, reported
from recipes.data import Data, Source, batches, build, worker_count

SECONDS = 5.0


def main() -> None:
    """Print images per second of the configured training and validation sets, for at least SECONDS each."""
    with reported("train"):
        cfg = compose(sys.argv[1:])
        began = time.perf_counter()
        data = build(cfg)
        print(f"{cfg.data.name}: {_sizes(data)}, opened in {time.perf_counter() - began:.2f} s")
        for split, source, size in (
            ("train", data.train, min(cfg.data.batch_size, len(data.train))),
            ("val", data.val, cfg.data.eval_batch_size),
        ):
            workers = worker_count(source, cfg.data.workers)
            rate = images_per_second(source, size, train=split == "train", workers=workers, repeats=cfg.augment.repeats)
            print(f"{split:5} {rate:9.0f} images/s, batches of {size}, {workers} workers")


def images_per_second(source: Source, size: int, *, train: bool, workers: int, repeats: int) -> float:
    """Images per second after the first batch, over as many epochs as SECONDS hold."""
    count, epoch, began = 0, 0, None
    while began is None or time.perf_counter() - began < SECONDS:
        for images, _ in batches(
            source, batch_size=size, seed=source.seed, epoch=epoch, train=train, workers=workers, repeats=repeats
        ):
            if began is None:
                began = time.perf_counter()  # starting the workers is not counted
                continue
            count += len(images)
            if time.perf_counter() - began >= SECONDS:
                break
        epoch += 1
        began = began or time.perf_counter()
    return count / (time.perf_counter() - began)


def _sizes(data: Data) -> str:
    images = f"{len(data.train)} training and {len(data.val)} validation images"
    return f"{images}, {data.num_classes} classes, {data.img_size} px"


if __name__ == "__main__":
    main()
