"""From the `data` and `augment` groups of a configuration to training and validation sources."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import timm
from omegaconf import DictConfig
from timm.data import DEFAULT_CROP_PCT, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from recipes.data import (
    arrow,
    digits,
    folder,
    imagenet,
    parquet,
    tar,
)
from recipes.data.cache import Cache, cache_path
from recipes.data.encoded import Encoded
from recipes.data.errors import DataError
from recipes.data.files import looking, note_once, root_of
from recipes.data.images import Decoding
from recipes.data.source import Records, Source, check_labels
from recipes.data.transforms import eval_transform, train_transform
from zoo.beside import config_of
from zoo.blocks import image_sides, plain
from zoo.errors import first_line, listed

Size = tuple[int, int]
SPLITS = ("train", "val")
WORDS = {"train": "training", "val": "validation"}


@dataclass(frozen=True)
class Data:
    """The training and validation data of an experiment; `mean`, `std`, `img_size` are those of training images.

    train        None in an evaluation; so is `val` when a run only predicts on images
    num_classes  the model's; `class_names` are those of the labels, fewer if there is a subset
    subset       the model's classes that the labels index; None for all
    truths       (N, most) all labels of each validation image, padded with -1, if images may have several (ReaL); a
                 validation label is then the number of the image
    left_out     classes that do not count in means over classes
    """

    train: Source | None
    val: Source | None
    num_classes: int
    class_names: list[str]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    img_size: int | Size
    subset: tuple[int, ...] | None = None
    truths: np.ndarray | None = None
    left_out: tuple[int, ...] = ()


@dataclass(frozen=True)
class Preprocessing:
    """How images are preprocessed for the model."""

    size: Size
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_pct: float
    crop_mode: str


def build(cfg: DictConfig) -> Data:
    """The data of a composed configuration: reads cfg.data, cfg.augment, cfg.model, cfg.seed.

    Without an `augment` group, as in an evaluation, the training set is neither needed nor looked for.
    Raises DataError if the data cannot be used as requested.
    """
    prep, learned = preprocessing(cfg), preprocessing(cfg, train=True)
    splits = splits_of(cfg)
    found, names = _records(cfg.data, learned.size, splits)
    for records, split in zip(found, splits, strict=True):
        check_labels(records.labels, len(names), _split_name(cfg, split))
    if "train" in splits:
        _note_unlearned(*found, names)
    truths, subset = _meaning(cfg.data, found[-1], splits)
    preps = {"train": learned, "val": prep}
    sources = {split: _source(cfg, records, split, preps[split]) for records, split in zip(found, splits, strict=True)}
    return Data(
        train=sources.get("train"),
        val=sources["val"],
        num_classes=len(names) if subset is None else len(imagenet.synsets()),
        class_names=names,
        mean=prep.mean,
        std=prep.std,
        img_size=plain(learned.size),
        subset=subset,
        truths=truths,
    )


def splits_of(cfg: DictConfig) -> tuple[str, ...]:
    """The splits that a configuration needs: an evaluation, which has no `augment` group, only validation's."""
    return SPLITS if "augment" in cfg else SPLITS[1:]


def _note_unlearned(train: Records, val: Records, names: Sequence[str]) -> None:
    """Note the classes without a training image."""
    seen = np.isin(np.arange(len(names)), train.labels)
    if not seen.all():
        lacking = [name for name, known in zip(names, seen.tolist(), strict=True) if not known]
        note_once(
            f"{len(lacking)} of {len(names)} classes have no training image: {listed(lacking)}; "
            f"{np.count_nonzero(~seen[val.labels])} validation images are of these classes"
        )


def _source(cfg: DictConfig, records: Records, split: str, prep: Preprocessing) -> Source:
    learns = split == "train"
    if learns:
        given = {"size": prep.size, "mean": prep.mean, "std": prep.std, "interpolation": prep.interpolation}
        transform = train_transform(cfg.augment, **given)
    else:
        transform = eval_transform(**vars(prep))
    late = learns and cfg.data.jpeg == "scaled" and cfg.data.cache is None  # the cache holds whole images
    return Source(records, transform, late=late, **source_options(cfg, records, split))


def _split_name(cfg: DictConfig, split: str) -> str:
    """What messages call a split."""
    return f"the {WORDS[split]} set of {cfg.data.name}"


def source_options(cfg: DictConfig, records: Any, split: str) -> dict[str, Any]:
    """The options of a source that any task has; from now on the records decode images as cfg.data says."""
    if isinstance(records, Encoded):
        records.decoding = decoding(cfg)
    return {
        "name": _split_name(cfg, split),
        "seed": cfg.seed,
        "replace": cfg.data.on_bad_image == "replace",
        "cache": _cache_of(cfg.data, records, split),
    }


def _meaning(data: DictConfig, val: Records, splits: Sequence[str]) -> tuple[np.ndarray | None, tuple[int, ...] | None]:
    """The meaning of labels of ImageNet's variants: `truths` and `subset` of Data."""
    if data.source != "imagenet" or not (data.real_labels or data.subset):
        return None, None
    if "train" in splits:
        raise DataError(f"data={data.name} is for evaluation only: train on data=imagenet and give it to eval.py")
    truths = imagenet.truths(val) if data.real_labels else None
    if truths is not None:
        val.labels = np.arange(len(truths))
    return truths, imagenet.subset(data)


def preprocessing(cfg: DictConfig, *, train: bool = False) -> Preprocessing:
    """cfg.data's values; null values come from the model's released preprocessing, else they are ImageNet's.

    train  for training images, whose size `data.eval_img_size` does not change
    """
    known: Mapping[str, Any] = released(cfg.model.name)
    default = {
        "mean": known.get("mean") or IMAGENET_DEFAULT_MEAN,
        "std": known.get("std") or IMAGENET_DEFAULT_STD,
        "interpolation": known.get("interpolation") or "bicubic",
        "crop_pct": known.get("crop_pct") or DEFAULT_CROP_PCT,
        "crop_mode": known.get("crop_mode") or "center",
    }
    values = {key: value if cfg.data[key] is None else cfg.data[key] for key, value in default.items()}
    values |= {key: tuple(values[key]) for key in ("mean", "std")}
    size = None if train else cfg.data.eval_img_size
    size = size or cfg.data.img_size or cfg.model.img_size or tuple(known.get("input_size", (3, 224, 224))[-2:])
    return Preprocessing(size=image_sides(size), **values)


def decoding(cfg: DictConfig) -> Decoding:
    """How cfg.data lets image files be decoded."""
    return Decoding(cfg.data.exif_orientation, cfg.data.max_pixels)


def released(name: str) -> Mapping[str, Any]:
    """timm's pretrained configuration of a name or an address; empty if it has none."""
    if ":" in name:  # an address, hf-hub:user/name or local-dir:folder: read its config.json
        return _addressed(name)
    cfg = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    return cfg.to_dict() if cfg is not None else {}


@cache
def _addressed(name: str) -> Mapping[str, Any]:
    try:
        return config_of(name)[0]
    except (OSError, ValueError, KeyError) as error:  # no network, no such folder, no configuration
        raise DataError(
            f"the preprocessing of {name} is unknown: {first_line(error)}; without its config.json, set model.name= to "
            "a name that timm knows, and model.checkpoint=<file>"
        ) from error


def _records(data: DictConfig, size: Size, splits: Sequence[str]) -> tuple[list[Records], list[str]]:
    """The records of each split, and the names of the classes."""
    if data.source == "digits":
        return digits.load(size, data.val_fraction, data.split_seed)[-len(splits) :], digits.CLASSES
    readers = {
        "folder": folder,
        "arrow": arrow,
        "tar": tar,
        "parquet": parquet,
        "imagenet": imagenet,
    }
    if data.source in readers:
        with looking(data):
            return readers[data.source].load(data, splits)
    raise DataError(
        f"data.source={data.source} has no image labels: expected digits, {', '.join(readers)}; "
        "or set task=segment or task=detect"
    )


def _cache_of(data: DictConfig, records: Any, split: str) -> Cache | None:
    """The cache for the decoded images of a split, if cfg.data asks for one."""
    if data.cache is None:
        return None
    if not isinstance(records, Encoded):
        raise DataError(
            f"data.cache={data.cache} is for decoded image files, and data={data.name} has none: leave it out"
        )
    root = root_of(data).resolve() if data.root else data.hub
    path = cache_path(data.cache_dir, data.source, root, split, records.decoding) if data.cache == "disk" else None
    return Cache(len(records), int(data.cache_gb * 1e9), path)
