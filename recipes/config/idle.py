"""Keys that the rest of a configuration leaves without effect: whoever types one expects another thing to happen."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig, OmegaConf
from timm.optim import get_optimizer_info, list_optimizers

from recipes.config.errors import ConfigError

_PARQUET = ("arrow", "parquet", "imagenet", "arrow_masks")
_MASKS = ("masks", "arrow_masks")

# the sources that read a key of `data`; what is not here, all do
READ = {
    "hub": (*_PARQUET, "tar"),  # which says that it reads no hub
    "root": (*_PARQUET, "tar", "folder", "masks", "coco"),
    "image_key": _PARQUET, "label_key": ("arrow", "parquet", "imagenet", "tar"),
    "train_split": (*_PARQUET, "tar", "folder"), "val_split": (*_PARQUET, "tar", "folder"),
    "num_classes": (*_PARQUET, "tar", "masks"), "shuffle_buffer": ("parquet", "tar"),
    "val_fraction": ("digits", "scenes"), "split_seed": ("digits", "scenes"),
    "subset": ("imagenet",), "real": ("imagenet",),
    "train_count": ("scenes",), "val_count": ("scenes",), "things": ("scenes",),
    "train_images": ("masks", "coco"), "val_images": ("masks", "coco"),
    "train_masks": ("masks",), "val_masks": ("masks",), "train_list": ("masks",), "val_list": ("masks",),
    "image_suffix": ("masks",), "mask_suffix": ("masks",), "mask_key": ("arrow_masks",),
    "class_names": _MASKS, "reduce_zero_label": _MASKS, "label_ids": _MASKS, "left_out": (*_MASKS, "scenes"),
    "train_json": ("coco",), "val_json": ("coco",),
}  # fmt: skip
SOURCES = {source for sources in READ.values() for source in sources}  # of one that was added nothing is known here
WHOLE = ("interpolation", "crop_pct", "crop_mode")  # how an image becomes one of the model's size, to be classified
SIDES = ("short_side", "long_side", "side_multiple", "antialias")  # how one with labels in it is resized
OPTIMIZER = ("betas", "eps", "momentum")  # what timm leaves away in silence where an optimiser has it not
TEACHER = ("pretrained", "img_size", "weight", "temperature")
DENSE = ("segment", "detect")  # tasks whose images are changed as `task` and `data` say, not as `augment` does
# keys that have an effect with one value of another key
WITH = {
    "train.epochs": {"train.steps": None}, "train.eval_every": {"train.eval_steps": None},
    "sched.milestones": {"sched.sched": "step"}, "sched.gamma": {"sched.sched": "step"},
    "sched.power": {"sched.sched": "poly"}, "sched.warmup_lr": {"sched.warmup_ratio": None},
    "sched.decay_from": {"sched.warmup_ratio": None}, "teacher.temperature": {"teacher.kind": "soft"},
    "task.target_threshold": {"task.loss": "binary_cross_entropy"}, "task.stride": {"task.inference": "slide"},
    "task.category_cap": {"task.crop": True}, "data.cache_dir": {"data.cache": "disk"},
}  # fmt: skip
# keys that have an effect with every value but one of another key
WITHOUT = {
    "train.ema_warmup": {"train.ema": None}, "train.ema_every": {"train.ema": None},
    "train.ema_evaluated": {"train.ema": None},
    "sched.warmup_lr": {"sched.warmup": 0}, "sched.warmup_ratio": {"sched.warmup": 0},
    "sched.decay_from": {"sched.warmup": 0},
    "augment.re_mode": {"augment.re_prob": 0}, "augment.switch_prob": {"augment.mixup": 0, "augment.cutmix": 0},
    "task.auxiliary": {"task.head": "semantic_fpn"}, "task.left_out_weight": {"data.left_out": []},
    "data.cache_gb": {"data.cache": None},
}  # fmt: skip
OFF = {"task.auxiliary": False}  # the value that asks for nothing, where the default asks for something


def check_read(cfg: DictConfig, typed: dict[str, Any], defaults: dict[str, Any]) -> None:
    """Raise ConfigError for a key of `typed`, each with its value, that is not its default and that nothing reads.

    Not where a run has a configuration of its own, with which the command is met later.
    """
    if cfg.get("run") is not None or cfg.get("resume") is not None:
        return
    idle = defaults | OFF
    for key in (key for key, value in typed.items() if key in defaults and value != idle[key]):
        needed = _needed(cfg, key)
        if needed:
            raise ConfigError(f"{key}={typed[key]} has no effect here: it needs {needed}")


def _needed(cfg: DictConfig, key: str) -> str | None:
    """What a key needs to have an effect; None where it has one."""
    group, _, rest = key.partition(".")
    if group == "data" and cfg.data.source in SOURCES and cfg.data.source not in READ.get(rest, SOURCES):
        return f"data.source={' or '.join(READ[rest])}, and data={cfg.data.name} has {cfg.data.source}"
    if group == "data" and rest in WHOLE and cfg.task.name != "classify":
        return "task=classify; else images are resized as data.short_side and data.long_side say, and bilinearly"
    if group == "data" and rest in SIDES and cfg.task.name == "classify":
        return "labels in the image, task=segment or detect; the size of what is classified is data.img_size"
    if key == "img_size" and not is_size_of_images(cfg):
        return resized_by(cfg)
    if group == "teacher" and rest in TEACHER and cfg.teacher.kind is None:
        return "teacher.kind=soft, hard or feature"
    if group == "optim" and rest in OPTIMIZER and not _takes(cfg.optim.opt, rest):
        return f"an optimiser that has {rest}, and optim.opt={cfg.optim.opt} has none"
    if group == "augment" and rest != "repeats" and cfg.task.name in DENSE:
        said = "mirrored by data.hflip" if rest == "hflip" else "changed as keys of task and data.hflip say"
        return f"task=classify; images with labels in them are {said}"
    if key == "augment.label_smoothing":
        return _needed_to_smooth(cfg)
    if key == "model.weights" and "train" in cfg and cfg.model.checkpoint is None and cfg.model.backbone is None:
        return "model.checkpoint= or model.backbone=, of which it says the weights"
    if key == "augment.mix_prob" and not (cfg.augment.mixup or cfg.augment.cutmix):
        return "augment.mixup or augment.cutmix, and both are 0"
    if key == "data.left_out" and cfg.task.name == "detect":
        return "task=segment, which leaves these classes out of its means"
    return _other_value(cfg, key)


def _other_value(cfg: DictConfig, key: str) -> str | None:
    """The value of another key that a key needs, by the tables above."""
    for other, value in WITH.get(key, {}).items():
        if (found := OmegaConf.select(cfg, other)) != value:
            return f"{other}={_written(value)}, and it is {_written(found)}"
    for other, value in WITHOUT.get(key, {}).items():
        if OmegaConf.select(cfg, other) == value:
            return f"another {other} than {_written(value)}"
    return None


def _written(value: Any) -> str:
    """As it is typed."""
    return "null" if value is None else str(value).lower()


def _needed_to_smooth(cfg: DictConfig) -> str | None:
    threshold = cfg.task.get("target_threshold")
    said = f"task.target_threshold=null: above {threshold} a share counts in full, else not at all"
    return None if threshold is None else said


def check_smoothing(cfg: DictConfig, classes: int) -> None:
    """Raise ConfigError where smoothing, which nobody need have typed, lifts every class above the threshold."""
    threshold, smoothing = cfg.task.target_threshold, cfg.augment.label_smoothing
    if threshold is not None and threshold < smoothing / classes:
        raise ConfigError(
            f"task.target_threshold={threshold} with augment.label_smoothing={smoothing}: all {classes} classes of "
            "every image would count in full. Give augment.label_smoothing=0"
        )


def is_size_of_images(cfg: DictConfig) -> bool:
    """Whether `data.img_size` is that of what an evaluation shows the model: the whole image, or windows of it."""
    return cfg.task.name == "classify" or cfg.data.source == "scenes" or cfg.task.get("inference") == "slide"


def resized_by(cfg: DictConfig) -> str:
    """What gives images another size where `img_size=` does not."""
    slide = " (of windows: task.inference=slide)" if cfg.task.name == "segment" else ""
    return f"data=scenes; data.short_side= and data.long_side= resize the images of data={cfg.data.name}{slide}"


def _takes(opt: str, option: str) -> bool:
    """Whether timm hands such an option to an optimiser; what is none of timm's is named elsewhere."""
    name = opt.lower().rpartition("_")[2]  # timm's lookahead_ is a prefix
    return name not in list_optimizers() or getattr(get_optimizer_info(name), f"has_{option}")
