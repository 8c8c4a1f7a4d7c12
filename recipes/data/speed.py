"""Loader throughput, ours beside timm's: the same images, workers and augmentation, taking turns."""

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial

import torch
from omegaconf import DictConfig
from PIL import Image
from timm.data import create_loader
from torch.utils.data import Dataset

from recipes.data.build import Data, preprocessing
from recipes.data.dense import Dense
from recipes.data.encoded import Encoded
from recipes.data.loader import batches, plan_batches, worker_count
from recipes.data.shards import Shards
from recipes.data.source import Source
from recipes.data.transforms import allow_no_bits, timm_options
from recipes.task import create

Pass = Callable[[], Iterable]


@dataclass
class Rates:
    """Images per second, the median of the turns of each loader, of one split."""

    batch: int
    workers: int
    images: int
    rates: dict[str, float] = field(default_factory=dict)

    @property
    def ratio(self) -> float | None:
        """Ours divided by the faster of timm's two."""
        others = [rate for name, rate in self.rates.items() if name != "ours"]
        return self.rates["ours"] / max(others) if others else None


class Plain(Dataset):
    """What timm's own datasets do with a file: open it, convert it to RGB, transform it."""

    def __init__(self, source: Source, indices: list[int]):
        self.source, self.indices, self.transform = source, indices, None

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, number: int):
        index, records = self.indices[number], self.source.records
        if isinstance(records, Encoded):
            with Image.open(records.encoded(index)) as file:
                image = file.convert("RGB")
        else:
            image = records.image(index)
        return self.transform(image), self.source.label(index)


def measure(cfg: DictConfig, data: Data, split: str, *, seconds: float, turns: int) -> Rates:
    """Measure the loaders of one split (train or val) in turns of about `seconds` each."""
    train = split == "train"
    source = data.train if train else data.val
    workers = worker_count(source, cfg.data.workers)
    size = min(cfg.data.batch_size, len(source)) if train else cfg.data.eval_batch_size or create(cfg).eval_batch_size
    given = dict(batch_size=size, seed=cfg.seed, epoch=0, train=train, workers=workers)
    given |= {"repeats": cfg.augment.repeats} if train else {}
    planned = plan_batches(source, **given)
    rate = _rate(partial(_last, source, given, len(planned), max(1, 2 * workers)))  # starts the workers, too
    count = min(len(planned), max(1, round(rate * seconds / size)))
    indices = [index for batch in planned[-count:] for index, _, _ in batch.keys]
    peers: dict[str, Pass] = {"ours": partial(_last, source, given, len(planned), count)}
    known = not isinstance(source, Dense) and not isinstance(source.records, Shards)
    if known and cfg.augment.auto_augment != "ta_wide":
        for name, prefetch in (("timm", True), ("timm, no prefetcher", False)):
            loader = timm_loader(cfg, Plain(source, indices), size, train=train, workers=workers, prefetch=prefetch)
            peers[name] = partial(iter, loader)
    for peer in peers.values():
        _rate(peer)  # starts the workers, and brings the files into memory
    found = {name: [] for name in peers}
    for turn in range(turns):
        for name in sorted(peers, reverse=turn % 2):
            found[name].append(_rate(peers[name]))
    medians = {name: statistics.median(rates) for name, rates in found.items()}
    return Rates(size, workers, len(indices), medians)


def _last(source: Source, given: dict, total: int, count: int) -> Iterable:
    return batches(source, **given, start=max(0, total - count))


def _rate(peer: Pass) -> float:
    """Images per second of one whole pass; nothing is left for the workers to do when it ends."""
    began = time.perf_counter()
    count = sum(len(images) for images, _ in peer())
    return count / (time.perf_counter() - began)


def timm_loader(cfg: DictConfig, dataset: Plain, size: int, *, train: bool, workers: int, prefetch: bool):
    """timm's loader with the settings of the configuration, its batches normalised on the CPU."""
    prep = preprocessing(cfg, train=train)
    if train:
        how = timm_options(cfg.augment, prep.interpolation)
    else:
        how = {"crop_pct": prep.crop_pct, "crop_mode": prep.crop_mode, "interpolation": prep.interpolation}
    loader = create_loader(
        dataset,
        (3, *prep.size),
        size,
        is_training=train,
        mean=prep.mean,
        std=prep.std,
        num_workers=workers,
        use_prefetcher=prefetch,
        persistent_workers=workers > 0,
        device=torch.device("cpu"),
        **how,
    )
    allow_no_bits(dataset.transform)  # or timm fails with a newer Pillow
    return loader
