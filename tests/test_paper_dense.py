"""recipe=paper of segmentation and detection against the fact base, value by value.

Nothing of recipes/ is imported: published.py has the configurations from a process of their own.
"""

import re
from fnmatch import fnmatch
from functools import cache

import pytest
import timm

import facts
import zoo
from published import UNKNOWN, compare, composed, expected, nothing
from zoo.recognise import layouts_of
from zoo.registry import class_of

FACTS = facts.dense()
HEADS = {
    "upernet": "upernet", "semfpn": "semantic_fpn", "cascade": "cascade_mask_rcnn", "maskrcnn": "mask_rcnn",
    "retinanet": "retinanet",
}  # fmt: skip
WHOLE = "whole, keep-ratio (2048,512)"
SEGMENT = {
    "data.short_side": 512, "data.long_side": 2048, "data.img_size": 512, "data.hflip": 0.5, "task.jitter": [0.5, 2.0],
    "task.crop": True, "task.category_cap": 0.75, "task.photometric": True, "data.antialias": False,
}  # fmt: skip
DETECT = {
    "data.long_side": 1333, "data.hflip": 0.5, "task.jitter": [1.0, 1.0], "task.crop": False, "task.photometric": False,
    "data.antialias": False,
}  # fmt: skip
IMAGES = {
    "512 (resize (2048,512) x 0.5-2, cat_max_ratio 0.75, flip 0.5, photometric)": SEGMENT,
    "short side 800, long <= 1333, flip 0.5": {**DETECT, "data.short_side": 800, "task.precrop": 0.0},
    "short side 480-800 step 32, or 400/500/600 -> crop 384-600 -> 480-800; long <= 1333, flip 0.5": {
        **DETECT, "data.short_side": [*range(480, 801, 32)], "task.precrop": 0.5,
    },
    WHOLE: {"task.inference": "whole", "data.side_multiple": None},
    "whole, AlignResize to multiples of 32, (2048,512)": {"task.inference": "whole", "data.side_multiple": 32},
    "(1333,800) keep-ratio": {"data.side_multiple": None},
}  # fmt: skip
PRECISIONS = {
    True: "float16", "fp16, static loss scale 512": "float16", "apex": "float16", False: None, None: UNKNOWN
}  # fmt: skip
SCHEDULES = {
    "poly power 1.0": {"sched.sched": "poly", "sched.power": 1.0},
    "poly power 0.9": {"sched.sched": "poly", "sched.power": 0.9},
    "cosine, min_lr_ratio 1e-8": {"sched.sched": "cosine"},
    "cosine": {"sched.sched": "cosine"},
    "step x0.1": {"sched.sched": "step", "sched.gamma": 0.1, "sched.cooldown": 0},
    None: {"sched.sched": UNKNOWN},
}
# tokens a side of all windows; MaxViT's follow the image, 32 pixels a token
SWIN = {"model.window_size": 7}
WINDOWS = {"7": SWIN, "[7, 7, 7, 7]": SWIN, "[24, 24, 24, 24]": {"model.window_size": [24] * 4}} | {
    str(side // 32): {"data.img_size": side, "data.long_side": side, "model.window_size": None, "model.img_size": None}
    for side in (640, 896)
}


@pytest.fixture(scope="module")
def found():
    return composed(list(FACTS))


def length(_, value, fact):
    """Epochs, or steps, of which the fact base counts those that the rate decays in."""
    if value is not None:
        return {"train.epochs": value, "train.steps": None}
    decay, whole = fact["iters"], re.search(r"train_steps (\d+)", fact.get("note", ""))
    if decay is None:
        return {"train.epochs": UNKNOWN, "train.steps": UNKNOWN}
    steps = int(whole[1]) if whole else decay
    return {"train.epochs": None, "train.steps": steps, "sched.cooldown": steps - decay}


def warmup(_, value, fact):
    if not value:
        return {"sched.warmup": UNKNOWN if value is None else 0}
    start = {"sched.warmup_lr": value["from"], "sched.warmup_ratio": None} if "from" in value else {}
    ratio = {"sched.warmup_ratio": value["ratio"]} if "ratio" in value else {}
    return {"sched.warmup": value["iters"], "sched.unit": "steps", **start, **ratio}


def unmixed(_, value, fact):
    assert value in (0.0, None) and value == fact["mixup"] == fact["cutmix"]
    return {}


def crop(_, value, fact):
    unknown = {
        key: UNKNOWN for said in IMAGES.values() for key in said if key not in ("data.img_size", "data.long_side")
    }
    return unknown if value is None else IMAGES[value["train"]] | IMAGES[value["eval_mode"]]


def interpolation(_, value, fact):
    """What images are rescaled by, with no key."""
    assert value in (None, {"train": "bilinear", "eval": "bilinear"})
    return {}


READ = {
    **dict.fromkeys(("iters", "switch_prob"), nothing),
    "epochs": length, "warmup": warmup, "mix_prob": unmixed, "crop": crop, "interpolation": interpolation,
    "schedule": lambda _, value, fact: SCHEDULES[value],
    "layer_scale": lambda _, value, fact: {"model.layer_scale": value or None},
    "amp": lambda _, value, fact: {"hardware.amp": PRECISIONS[value]},
    "window": lambda _, value, fact: WINDOWS[str(value)],
    "hilo_window": lambda _, value, fact: {"model.windows": [0, 0, value, 1]},
    "norm_layers": lambda _, value, fact: {
        "task.norm_eval": {"backbone BN in eval mode, gradients kept": True}[value]
    },
    # whose pyramid begins there
    "fpn_start_level": lambda _, value, fact: {"task.head": {1: "retinanet", None: UNKNOWN}[value]},
}  # fmt: skip


def of_the_phase(model, phase, fact):
    """What prose says of all records of a method: the head, and how its batch norms count."""
    said = {"task.head": next(head for name, head in HEADS.items() if f"_{name}_" in phase)}
    if model.startswith("nat"):
        said["model.dilations"] = 1
    if "ade20k" in phase:
        return {**said, "task.dropout": 0.1, "hardware.sync_bn": "BN, not SyncBN" not in fact.get("note", "")}
    return {**said, "hardware.sync_bn": True} if phase == "coco_cascade_maskrcnn_3x" else said


def besides(cfg, fact):
    """Keys of which prose tells, or another test, or that have no effect here."""
    keys = {key for key, value in cfg.items() if key.startswith("model.") and value is None}  # of other families
    if fact["no_decay"] is not None:
        keys |= {"data.mean", "data.std", "optim.no_decay", "optim.model_lr_scales", "train.micro_batch"}
    return keys | ({"sched.unit", "sched.warmup_ratio"} if fact["warmup"] is False else set())


def test_the_fact_base_has_what_is_tested():
    assert len(FACTS) == 70 and {model for model, _, _ in FACTS} <= zoo.variants().keys()


@pytest.mark.parametrize("model, phase, task", FACTS)
def test_every_value_is_the_published_one(model, phase, task, found):
    fact, each = FACTS[model, phase, task], found[model, phase, task]
    said = expected(fact, READ)
    assert sum(value != UNKNOWN for value in said.values()) >= 9
    compare(each, {**said, **of_the_phase(model, phase, fact)}, besides(each["cfg"], fact))
    if each["cfg"]["sched.sched"] == "step":
        assert each["cfg"]["sched.min_lr"] == 0.0


def test_parts_are_what_norms_saw(found):
    """A device's two images, of MaxViT as many as are chosen; all of a step where the norms of segmenters see all."""
    for (model, _, task), each in found.items():
        cfg = each["cfg"]
        whole = task == "segment" and cfg["hardware.sync_bn"]
        assert cfg["train.micro_batch"] == (None if whole else 8 if model.startswith("maxvit") else 2), model


def test_images_are_normalised_as_imagenet(found):
    told = [each["cfg"] for case, each in found.items() if FACTS[case]["no_decay"] is not None]
    kinds = {(*cfg["data.mean"], *cfg["data.std"], cfg["optim.model_lr_scales"]) for cfg in told}
    assert kinds == {(0.485, 0.456, 0.406, 0.229, 0.224, 0.225, False)}


@cache
def names_of(model):
    """Of each parameter of a dense model's backbone: our name, and that in the authors' files."""
    layout = layouts_of(class_of(model))[0]
    backbone = timm.create_model(model, features_only=True, feature_norms=True, device="meta")
    ours = [name.removeprefix("model.") for name, _ in backbone.named_parameters()]
    return {f"backbone.model.{name}": layout.theirs(name) for name in ours}


@pytest.mark.parametrize("model, phase, task", [case for case, fact in FACTS.items() if fact["no_decay"] is not None])
def test_what_does_not_decay_is_what_the_authors_name(model, phase, task, found):
    """Their configurations exempt parameters by parts of their names; ours are others, and heads have none of these."""
    cfg, fact = found[model, phase, task]["cfg"], FACTS[model, phase, task]
    words = fact["no_decay"]["substrings"]
    assert fact["no_decay"] == {"ndim_le_1": False, "bias": False, "names": [], "substrings": words}
    patterns, names = cfg["optim.no_decay"] or [], names_of(model)
    theirs = {ours for ours, name in names.items() if any(word in f"backbone.{name}" for word in words)}
    assert bool(theirs) == bool(words)
    assert {name for name in names if any(fnmatch(name, pattern) for pattern in patterns)} == theirs
    assert all(pattern.startswith("backbone.") for pattern in patterns)
