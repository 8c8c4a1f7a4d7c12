"""Rejects typed keys that have no effect with the rest of the configuration."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig, OmegaConf
from timm.optim import get_optimizer_info, list_optimizers

import zoo
from recipes.config.errors import ConfigError
from recipes.config.quoting import written

_PARQUET = ("arrow", "parquet", "imagenet", "arrow_masks")
_MASKS = ("masks", "arrow_masks")

# the sources that read a key of `data`; keys that are not listed are read by all
READ = {
    "hub": (*_PARQUET, "tar"),  # tar reads no hub, and says so itself
    "root": (*_PARQUET, "tar", "folder", "masks", "coco"),
    "image_key": _PARQUET, "label_key": ("arrow", "parquet", "imagenet", "tar"),
    "train_split": (*_PARQUET, "tar", "folder"), "val_split": (*_PARQUET, "tar", "folder"),
    "num_classes": (*_PARQUET, "tar", "masks"), "shuffle_buffer": ("parquet", "tar"),
    "val_fraction": ("digits", "scenes"), "split_seed": ("digits", "scenes"),
    "subset": ("imagenet",), "real_labels": ("imagenet",),
    "train_count": ("scenes",), "val_count": ("scenes",), "things": ("scenes",),
    "train_images": ("masks", "coco"), "val_images": ("masks", "coco"),
    "train_masks": ("masks",), "val_masks": ("masks",), "train_list": ("masks",), "val_list": ("masks",),
    "image_suffix": ("masks",), "mask_suffix": ("masks",), "mask_key": ("arrow_masks",),
    "class_names": _MASKS, "reduce_zero_label": _MASKS, "label_ids": _MASKS, "left_out": (*_MASKS, "scenes"),
    "train_json": ("coco",), "val_json": ("coco",),
}  # fmt: skip
MADE = ("digits", "scenes")  # sources without image files
DECODED = ("on_bad_image", "max_pixels", "exif_orientation", "jpeg")  # how files are decoded
SOURCES = {source for sources in READ.values() for source in sources}  # nothing is known here of others
WHOLE = ("interpolation", "crop_pct", "crop_mode")  # how an image to be classified gets the model's size
SIDES = ("short_side", "long_side", "side_multiple", "antialias")  # how an image with dense labels is resized
OPTIMIZER = ("betas", "eps", "momentum")  # what timm silently drops for optimisers without it
TEACHER = ("pretrained", "img_size", "weight", "temperature")
DENSE = ("segment", "detect")  # tasks whose images are augmented by `task` and `data`, not by `augment`
# keys that have an effect with one value of another key
WITH = {
    "train.epochs": {"train.steps": None}, "train.eval_every": {"train.eval_steps": None},
    "sched.milestones": {"sched.sched": "step"}, "sched.gamma": {"sched.sched": "step"},
    "sched.power": {"sched.sched": "poly"}, "sched.warmup_lr": {"sched.warmup_ratio": None},
    "sched.decay_from": {"sched.warmup_ratio": None}, "teacher.temperature": {"teacher.kind": "soft"},
    "task.target_threshold": {"task.loss": "binary_cross_entropy"}, "task.stride": {"task.inference": "slide"},
    "task.category_cap": {"task.crop": True}, "data.cache_dir": {"data.cache": "disk"},
    "train.drop_path_rate": {"model.drop_path_rate": None},
}  # fmt: skip
# keys that have an effect with every value but one of another key
WITHOUT = {
    "train.ema_warmup": {"train.ema": None}, "train.ema_every": {"train.ema": None},
    "train.ema_evaluated": {"train.ema": None},
    "sched.warmup_lr": {"sched.warmup": 0}, "sched.warmup_ratio": {"sched.warmup": 0},
    "sched.decay_from": {"sched.warmup": 0, "sched.sched": "step"},
    "optim.lr_scaling": {"optim.lr_base_batch": None}, "optim.layer_decay_min_scale": {"optim.layer_decay": None},
    "augment.re_mode": {"augment.re_prob": 0}, "augment.switch_prob": {"augment.mixup": 0, "augment.cutmix": 0},
    "task.auxiliary": {"task.head": "semantic_fpn"}, "task.left_out_weight": {"data.left_out": []},
    "data.cache_gb": {"data.cache": None},
}  # fmt: skip
# keys that only training reads, each with the one that has its effect in an evaluation, if the task has such a key
TRAINING = {
    "data.batch_size": "data.eval_batch_size", "data.hflip": "task.flip", "data.vflip": None,
    "data.jpeg": None, "data.shuffle_buffer": None, "data.train_count": "data.val_count",
    "data.train_images": "data.val_images", "data.train_masks": "data.val_masks",
    "data.train_list": "data.val_list", "data.train_json": "data.val_json",
    "data.train_split": "data.val_split", "model.drop_rate": None, "model.drop_path_rate": None,
    "hardware.parallel": None, "hardware.sync_bn": None, "task.loss": None, "task.target_threshold": None,
    "task.dropout": None, "task.left_out_weight": None, "task.jitter": "task.scales", "task.crop": None,
    "task.category_cap": None, "task.photometric": None, "task.precrop": None, "task.norm_eval": None,
}  # fmt: skip
OFF = {"task.auxiliary": False}  # the value that switches a key off, where it is on by default


def check_read(cfg: DictConfig, typed: dict[str, Any], defaults: dict[str, Any]) -> None:
    """Raise ConfigError for a key of `typed` (keys with values) that differs from its default and that nothing reads.

    Skipped where a run brings its own configuration, against which the command is checked later.
    """
    if cfg.get("run") is not None or cfg.get("resume") is not None:
        return
    idle = defaults | OFF
    for key in (key for key, value in typed.items() if key in defaults and value != idle[key]):
        if said := needed(cfg, key):
            given = "null" if typed[key] is None else typed[key]
            raise ConfigError(f"{key}={given} has no effect here: it needs {said}")


def needed(cfg: DictConfig, key: str) -> str | None:
    """What a key needs to have an effect; None where it has one."""
    group, _, rest = key.partition(".")
    if "train" not in cfg and (said := needed_to_evaluate(cfg, key)):
        return said
    if group == "data" and cfg.data.source in SOURCES and cfg.data.source not in READ.get(rest, SOURCES):
        return f"data.source={' or '.join(READ[rest])}, but data={cfg.data.name} has {cfg.data.source}"
    if group == "data" and rest in DECODED and cfg.data.source in MADE:
        return f"image files to decode, and data={cfg.data.name} has none"
    if group == "data" and rest in WHOLE and cfg.task.name != "classify":
        return "task=classify; in other tasks images are resized to data.short_side and data.long_side, bilinearly"
    if key == "data.jpeg" and cfg.task.name != "classify":
        return "task=classify; images with dense labels are decoded in full"
    if group == "data" and rest in SIDES and cfg.task.name == "classify":
        return "dense labels, task=segment or detect; the size of images to classify is data.img_size"
    if key == "img_size" and not is_size_of_images(cfg):
        return resized_by(cfg)
    if group == "teacher" and rest in TEACHER and cfg.teacher.kind is None:
        return "teacher.kind=soft, hard or feature"
    if group == "optim" and rest in OPTIMIZER and not _takes(cfg.optim.opt, rest):
        return f"an optimiser with {rest}, and optim.opt={cfg.optim.opt} has none"
    if group == "augment" and rest != "repeats" and cfg.task.name in DENSE:
        flips = rest in ("hflip", "vflip")
        said = f"flipped by data.{rest}" if flips else "augmented by the keys of task and by data.hflip and data.vflip"
        return f"task=classify; images with dense labels are {said}"
    if key in ("data.hflip", "data.vflip") and cfg.task.name == "classify" and cfg.augment[rest] != cfg.data[rest]:
        return f"augment.{rest}=${{{key}}}, its default, but that is {cfg.augment[rest]}"
    if key == "augment.label_smoothing":
        return _needed_to_smooth(cfg)
    if key == "model.weights" and "train" in cfg and cfg.model.checkpoint is None and cfg.model.backbone is None:
        return "model.checkpoint= or model.backbone=, whose weights it chooses"
    if key == "augment.mix_prob" and not (cfg.augment.mixup or cfg.augment.cutmix):
        return "augment.mixup or augment.cutmix, but both are 0"
    if key == "augment.color_jitter" and (given := cfg.augment.auto_augment) and "3a" not in given:
        return f"augment.auto_augment=null or 3a, but it is {given}"
    if key in ("sched.min_lr", "sched.per", "sched.decay_from") and _is_constant(cfg, warmup=key == "sched.per"):
        return "a schedule that changes, but sched.sched is constant"
    if key == "model.drop_rate" and cfg.task.name in DENSE and cfg.model.name in zoo.variants():
        return f"task=classify: {cfg.model.name} has no dropout but before its classifier"
    if key == "data.left_out" and cfg.task.name == "detect":
        return "task=segment, which leaves these classes out of its means"
    return _other_value(cfg, key)


def needed_to_evaluate(cfg: DictConfig, key: str) -> str | None:
    """What a key needs that has no effect in an evaluation; None for others."""
    if key == "seed" and cfg.data.on_bad_image != "replace":  # which draws the substitutes
        return "data.on_bad_image=replace: nothing else in an evaluation is random"
    if key not in TRAINING or (key == "data.train_split" and cfg.data.source != "folder"):  # it tells files apart
        return None
    group, _, rest = (TRAINING[key] or "").partition(".")
    instead = f"; in an evaluation there is {TRAINING[key]}=" if group and rest in cfg[group] else ""
    return f"train.py, as only training reads it{instead}"


def _other_value(cfg: DictConfig, key: str) -> str | None:
    """The value of another key that a key needs, by the tables above."""
    for other, value in WITH.get(key, {}).items():
        if (found := OmegaConf.select(cfg, other)) != value:
            return f"{other}={written(value)}, but it is {written(found)}"
    for other, value in WITHOUT.get(key, {}).items():
        if OmegaConf.select(cfg, other) == value:
            return f"a value of {other} other than {written(value)}"
    return None


def _is_constant(cfg: DictConfig, *, warmup: bool) -> bool:
    """Whether the learning rate never changes, apart from the warmup unless that counts."""
    return cfg.sched.sched == "constant" and not cfg.sched.cooldown and not (warmup and cfg.sched.warmup)


def _needed_to_smooth(cfg: DictConfig) -> str | None:
    threshold = cfg.task.get("target_threshold")
    said = f"task.target_threshold=null: targets above {threshold} count as 1, all others as 0"
    return None if threshold is None else said


def check_smoothing(cfg: DictConfig, classes: int) -> None:
    """Raise ConfigError if label smoothing, which may come from a recipe, lifts every class above the threshold."""
    threshold, smoothing = cfg.task.target_threshold, cfg.augment.label_smoothing
    if threshold is not None and threshold < smoothing / classes:
        raise ConfigError(
            f"task.target_threshold={threshold} with augment.label_smoothing={smoothing}: all {classes} classes of "
            "every image would count in full. Set augment.label_smoothing=0"
        )


def is_size_of_images(cfg: DictConfig) -> bool:
    """Whether `data.img_size` is the size of what the model sees in an evaluation: the whole image, or windows."""
    return cfg.task.name == "classify" or cfg.data.source == "scenes" or cfg.task.get("inference") == "slide"


def resized_by(cfg: DictConfig) -> str:
    """What `img_size=` needs to have an effect, and what resizes the images instead."""
    slide = " or, for the size of windows, task.inference=slide" if cfg.task.name == "segment" else ""
    return f"data=scenes{slide}; data.short_side= and data.long_side= resize the images of data={cfg.data.name}"


def optimizer_name(opt: str) -> str:
    """The optimiser that timm looks up for `optim.opt`, whose prefix `lookahead_` wraps another."""
    return opt.lower().rpartition("_")[2]


def _takes(opt: str, option: str) -> bool:
    """Whether timm passes this option to an optimiser; an unknown optimiser is reported elsewhere."""
    name = optimizer_name(opt)
    return name not in list_optimizers() or getattr(get_optimizer_info(name), f"has_{option}")
