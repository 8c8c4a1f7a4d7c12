"""Valid ranges of the keys that hold numbers; values that are typed or come from files are checked at the start."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from timm.data.auto_augment import augment_and_mix_transform, auto_augment_transform, rand_augment_transform

from recipes.config.errors import ConfigError

# interval notation: [ and ] include the end, ( and ) exclude it; for lists it applies to every item
SIDE = "[1, 65535]"  # in pixels, as of a JPEG
CLASSES = "[1, 10000000]"  # each has a name, and a row of the classifier
RANGES = {
    "seed": "[0, inf)",
    "img_size": SIDE,
    "model.img_size": SIDE, "model.num_classes": CLASSES, "model.drop_rate": "[0, 1)",
    "model.drop_path_rate": "[0, 1)",
    "data.num_classes": CLASSES, "data.shuffle_buffer": "[1, inf)", "data.val_fraction": "(0, 1)",
    "data.split_seed": "[0, 4294967295]", "data.things": "[0, inf)",
    "data.short_side": SIDE, "data.long_side": SIDE, "data.side_multiple": SIDE,
    "data.img_size": SIDE, "data.eval_img_size": SIDE, "data.mean": "[0, 1]", "data.std": "(0, inf)",
    "data.crop_pct": "[0.05, 2]", "data.hflip": "[0, 1]", "data.vflip": "[0, 1]",
    "data.max_pixels": "[1, inf)", "data.cache_gb": "[0, inf)",
    "data.batch_size": "[1, inf)", "data.eval_batch_size": "[1, inf)", "data.workers": "[0, 1024]",
    "augment.scale": "(0, 1]", "augment.ratio": "(0, inf)", "augment.hflip": "[0, 1]", "augment.vflip": "[0, 1]",
    "augment.color_jitter": "[0, inf)", "augment.re_prob": "[0, 1]", "augment.mixup": "[0, inf)",
    "augment.cutmix": "[0, inf)", "augment.mix_prob": "[0, 1]", "augment.switch_prob": "[0, 1]",
    "augment.label_smoothing": "[0, 1)", "augment.repeats": "[1, inf)",
    "train.epochs": "[0, inf)", "train.steps": "[1, inf)", "train.accumulate": "[1, inf)",
    "train.micro_batch": "[1, inf)", "train.clip_grad": "(0, inf)", "train.skip_nonfinite": "[0, inf)",
    "train.save_every": "[1, inf)", "train.keep": "[1, inf)", "train.log_every": "[1, inf)",
    "train.ema": "[0, 1)", "train.ema_every": "[1, inf)", "train.drop_path_rate": "[0, 1)",
    "train.eval_every": "(0, inf)", "train.eval_steps": "[1, inf)",
    "optim.lr": "[0, inf)", "optim.lr_base_batch": "(0, inf)", "optim.weight_decay": "[0, inf)",
    "optim.betas": "[0, 1)", "optim.eps": "(0, inf)", "optim.momentum": "[0, 1)", "optim.layer_decay": "(0, 1]",
    "optim.layer_decay_min_scale": "[0, 1]", "optim.backbone_lr_scale": "[0, inf)",
    "optim.head_lr_scale": "[0, inf)",
    "sched.warmup": "[0, inf)", "sched.warmup_lr": "[0, inf)", "sched.warmup_ratio": "[0, inf)",
    "sched.min_lr": "[0, inf)", "sched.lr_base_batch": "(0, inf)", "sched.cooldown": "[0, inf)",
    "sched.power": "[0, inf)", "sched.milestones": "[0, inf)", "sched.gamma": "(0, inf)",
    "teacher.img_size": SIDE, "teacher.weight": "[0, 1]", "teacher.temperature": "(0, inf)",
    "task.target_threshold": "[0, 1)", "task.channels": "[1, inf)", "task.dropout": "[0, 1)",
    "task.left_out_weight": "[0, inf)", "task.jitter": "(0, inf)", "task.category_cap": "(0, 1]",
    "task.precrop": "[0, 1]", "task.scales": "(0, inf)", "task.stride": "[1, inf)",
    "hardware.threads": "[1, 4096]",  # each takes memory of the process
    "hardware.timeout": "(0, 2000000]",  # as milliseconds within 32 bits
}  # fmt: skip
LENGTHS = {
    "data.mean": (3,), "data.std": (3,), "augment.scale": (2,), "augment.ratio": (2,), "optim.betas": (2, 3),
    "task.jitter": (2,),
}  # fmt: skip
WHOLE = (  # in lists, too
    "img_size", "model.img_size", "teacher.img_size", "data.img_size", "data.eval_img_size", "data.short_side",
    "data.things", "task.stride",
)  # fmt: skip
EMPTY = ("sched.milestones", "task.scales")  # may have no items; the task refuses the latter with words of its own
RISING = ("augment.scale", "augment.ratio", "task.jitter")  # the smaller number comes first


def check_range(key: str, value: Any) -> None:
    """Raise ConfigError for a number out of range, and for an augmentation policy that timm cannot parse."""
    if key == "augment.auto_augment":
        _check_policy(value)
    elif key in RANGES and value is not None:
        said = _wrong(key, value if isinstance(value, list) else [value])
        if said:
            raise ConfigError(f"{key}={value}: expected {said}".replace(", inf)", ", infinity)"))


def _wrong(key: str, items: list[Any]) -> str | None:
    """What was expected in place of the items; None where they are right."""
    if key in LENGTHS and len(items) not in LENGTHS[key]:
        return f"{' or '.join(map(str, LENGTHS[key]))} numbers, {key}=[a,b,...]"
    kind, number = (int, "whole number") if key in WHOLE else (int | float, "number")
    if not items and key not in EMPTY:
        return f"{number}s in {RANGES[key]}"
    numbers = all(isinstance(item, kind) and not isinstance(item, bool) for item in items)
    if not numbers or not all(_holds(RANGES[key], item) for item in items):
        return f"{number}s in {RANGES[key]}" if len(items) > 1 else f"a {number} in {RANGES[key]}"
    return "the smaller number first" if key in RISING and items[0] > items[1] else None


def _holds(interval: str, number: float) -> bool:
    low, high = map(float, interval[1:-1].split(","))
    above = number >= low if interval[0] == "[" else number > low
    return above and (number <= high if interval[-1] == "]" else number < high)


def _check_policy(policy: str | None) -> None:
    if policy is None or policy == "ta_wide":
        return
    made: dict[str, Callable] = {"rand": rand_augment_transform, "augmix": augment_and_mix_transform}
    make = next((made[kind] for kind in made if policy.startswith(kind)), auto_augment_transform)
    try:
        make(policy, {"translate_const": 100, "img_mean": (124, 116, 104)})
    except (AssertionError, KeyError, ValueError, IndexError, TypeError) as error:
        raise ConfigError(
            f"augment.auto_augment={policy} is not a policy that timm reads ({error or type(error).__name__}): "
            "expected one such as rand-m9-mstd0.5-inc1, augmix-m3-w3, original or 3a, or ta_wide"
        ) from error
