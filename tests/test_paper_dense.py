"""recipe=paper of segmentation and detection against the fact base, value by value; the tables are not imported."""

from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import pytest
import timm
import yaml

import zoo
from recipes.config import ConfigError, compose
from zoo.recognise import layouts_of
from zoo.registry import class_of

ROOT = Path(__file__).parent
DENSE = {"ade20k": ("segment", "data=ade20k"), "coco": ("detect", "data=coco")}
LETTERS = {"mini": "m", "tiny": "t", "small": "s", "medium": "m", "base": "b", "large": "l"}
HEADS = {
    "upernet": "upernet", "semfpn": "semantic_fpn", "cascade": "cascade_mask_rcnn", "maskrcnn": "mask_rcnn",
    "retinanet": "retinanet",
}  # fmt: skip
# variants of the fact base that the zoo has no model for, with the reason; of dense tasks it has all
LEFT_OUT: dict[str, str] = {}
# families, or sizes of them, whose dense training is not in the fact base, with the reason
UNPUBLISHED = {
    ("segment", "maxvit_t"): "the authors report no ADE20K",
    ("segment", "gcvit_t"): "neither code nor recipe",
    ("segment", "davit_s"): "the released files are of size T",
    ("segment", "sgformer_s"): "neither code nor recipe",
    ("segment", "stvit_s"): "neither code nor recipe",
    ("detect", "gcvit_s"): "the released files are of size T",
    ("detect", "davit_b"): "the released files are of size T",
    ("detect", "sgformer_s"): "neither code nor recipe",
    ("detect", "stvit_b"): "neither code nor recipe",
}


def facts():
    text = (ROOT / "facts" / "recipes.yaml").read_text()
    return yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))["recipes"]


def model_of(family, variant):
    """Our name of a variant: dinat_s_tiny is dinats_t, small_ws2 of litv2 is litv2_s."""
    name = variant.replace("dinat_s_", "dinats_").removeprefix(f"{family}_")
    size = name.removeprefix("dinats_")
    return f"{'dinats' if name != size else family}_{LETTERS[size.split('_')[0]]}"


def phase_of(phase, variant):
    return f"{phase}_{variant.split('_')[1]}" if "_ws" in variant else phase


CASES = [
    (phase, family, variant, fact)
    for phase, families in facts().items()
    if phase.startswith(tuple(DENSE))
    for family, variants in families.items()
    for variant, fact in variants.items()
]
NAMES = [f"{phase}-{family}-{variant}" for phase, family, variant, _ in CASES]


@cache
def composed(phase, family, variant):
    task, data = DENSE[phase.split("_")[0]]
    chosen = [f"model={model_of(family, variant)}", f"paper.phase={phase_of(phase, variant)}"]
    return compose(["recipe=paper", f"task={task}", data, *chosen])


def test_the_fact_base_has_what_is_tested():
    models = {model_of(family, variant) for _, family, variant, _ in CASES}
    assert len(CASES) == 70 and models - zoo.variants().keys() == LEFT_OUT.keys()
    assert models & {model for _, model in UNPUBLISHED} == {"maxvit_t", "gcvit_t"}  # detected, not segmented


@pytest.mark.parametrize(("task", "model"), UNPUBLISHED)
def test_what_is_not_published_is_refused(task, model):
    with pytest.raises(ConfigError, match=f"no published recipe for {model}, task={task}: expected one of .*litv2_s"):
        compose(["recipe=paper", f"task={task}", f"model={model}"])


WHOLE = "whole, keep-ratio (2048,512)"
SEGMENT = {
    "data.short_side": 512, "data.long_side": 2048, "data.img_size": 512, "data.hflip": 0.5, "task.jitter": [0.5, 2.0],
    "task.crop": True, "task.category_cap": 0.75, "task.photometric": True,
}  # fmt: skip
DETECT = {
    "data.long_side": 1333, "data.hflip": 0.5, "task.jitter": [1.0, 1.0], "task.crop": False, "task.photometric": False
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
PRECISIONS = {True: "float16", "fp16, static loss scale 512": "float16", "apex": "float16", False: None}
SCHEDULES = {
    "poly power 1.0": {"sched.sched": "poly", "sched.power": 1.0},
    "poly power 0.9": {"sched.sched": "poly", "sched.power": 0.9},
    "cosine, min_lr_ratio 1e-8": {"sched.sched": "cosine"},
    "cosine": {"sched.sched": "cosine"},
    "step x0.1": {"sched.sched": "step", "sched.gamma": 0.1, "sched.min_lr": 0.0, "sched.cooldown": 0},
}
SAME = {
    "batch_size": "data.batch_size", "weight_decay": "optim.weight_decay", "betas": "optim.betas", "eps": "optim.eps",
    "lr": "optim.lr", "epochs": "train.epochs", "min_lr": "sched.min_lr", "optimizer": "optim.opt",
    "drop_path": "train.drop_path_rate", "label_smoothing": "augment.label_smoothing", "mixup": "augment.mixup",
    "cutmix": "augment.cutmix", "random_erasing": "augment.re_prob", "color_jitter": "augment.color_jitter",
    "img_size": "data.img_size", "steps": "sched.milestones", "dilations": "model.dilations", "regions": "model.n_win",
}  # fmt: skip


def expected(fact, family):
    """The keys that a record of the fact base speaks of, with their values; null there is unknown."""
    known = {key: value for key, value in fact.items() if value is not None}
    found = {SAME[key]: value for key, value in known.items() if key in SAME}
    for key, take in TAKES.items():
        if key in known:
            found |= take(known.pop(key), family)
    assert known.keys() <= SAME.keys() | {"source", "note", "no_decay", "iters", "switch_prob", "interpolation"}
    return found


def warmup(value, _):
    if value is False:
        return {"sched.warmup": 0}
    start = {"sched.warmup_lr": value["from"], "sched.warmup_ratio": None} if "from" in value else {}
    ratio = {"sched.warmup_ratio": value["ratio"]} if "ratio" in value else {}
    return {"sched.warmup": value["iters"], "sched.unit": "steps", **start, **ratio}


def window(value, family):
    """Tokens a side of all windows; MaxViT's follow the image, 32 pixels a token."""
    if family == "maxvit":
        return {"data.img_size": 32 * value, "model.window": None, "model.img_size": None}
    if family == "gcvit":
        return {"model.window_size": value}
    assert value in (7, [7] * 4)
    return {"model.window": 7}


TAKES = {
    "lr_rule": lambda value, _: {"optim.lr_base_batch": {"absolute": None}[value]},
    "min_lr_rule": lambda value, _: {"absolute": {}}[value],
    "warmup": warmup,
    "schedule": lambda value, _: SCHEDULES[value],
    "clip_grad": lambda value, _: {"train.clip_grad": {False: None}[value]},
    "layer_scale": lambda value, _: {"model.layer_scale": value or None},
    "mix_prob": lambda value, _: {0.0: {"augment.mixup": 0.0, "augment.cutmix": 0.0}}[value],
    "randaugment": lambda value, _: {"augment.auto_augment": {False: None}[value]},
    "repeated_aug": lambda value, _: {"augment.repeats": {False: 1}[value]},
    "ema": lambda value, _: {"train.ema": (value and value["decay"]) or None},
    "amp": lambda value, _: {"hardware.amp": PRECISIONS[value]},
    "crop": lambda value, _: IMAGES[value["train"]] | IMAGES[value["eval_mode"]],
    "window": window,
    "hilo_window": lambda value, _: {"model.windows": [0, 0, value, 1]},
    "norm_layers": lambda value, _: {"task.norm_eval": {"backbone BN in eval mode, gradients kept": True}[value]},
    "fpn_start_level": lambda value, _: {"task.head": {1: "retinanet"}[value]},  # whose pyramid begins there
}


def at(cfg, key):
    group, _, name = key.partition(".")
    return cfg[group].get(name)


@pytest.mark.parametrize(("phase", "family", "variant", "fact"), CASES, ids=NAMES)
def test_every_published_value_is_composed(phase, family, variant, fact):
    cfg = composed(phase, family, variant)
    wanted = expected(fact, family)
    assert len(wanted) >= 9
    assert {key: at(cfg, key) for key in wanted} == wanted
    if fact["iters"] is not None:  # which may count the decay alone
        assert cfg.train.epochs is None and cfg.train.steps - cfg.sched.cooldown == fact["iters"]
    else:
        assert cfg.train.steps is None and cfg.train.epochs
    if fact.get("norm_layers") is None and "coco" in phase:
        assert cfg.task.norm_eval is False
    assert cfg.task.head == next(head for name, head in HEADS.items() if f"_{name}_" in phase)
    if fact["interpolation"] is not None:  # what images are rescaled by, with no key
        assert set(fact["interpolation"].values()) == {"bilinear"}


def test_norms_of_heads_are_synchronised_as_published():
    for phase, family, variant, fact in CASES:
        synced = composed(phase, family, variant).hardware.sync_bn
        if "ade20k" in phase or "cascade" in phase:
            assert synced == ("BN, not SyncBN" not in fact.get("note", "")), (phase, variant)
        else:
            assert not synced


@cache
def names_of(model):
    """Of each parameter of a dense model's backbone: our name, and that in the authors' files."""
    layout = layouts_of(class_of(model))[0]
    backbone = timm.create_model(model, features_only=True, feature_norms=True, device="meta")
    ours = [name.removeprefix("model.") for name, _ in backbone.named_parameters()]
    return {f"backbone.model.{name}": layout.theirs(name) for name in ours}


EXEMPT = [case for case in CASES if case[3]["no_decay"] is not None]


@pytest.mark.parametrize(
    ("phase", "family", "variant", "fact"), EXEMPT, ids=lambda part: part if isinstance(part, str) else ""
)
def test_what_does_not_decay_is_what_the_authors_name(phase, family, variant, fact):
    """Their configurations exempt parameters by parts of their names; ours are others, and heads have none of these."""
    optim, words = composed(phase, family, variant).optim, fact["no_decay"]["substrings"]
    assert fact["no_decay"] == {"ndim_le_1": False, "bias": False, "names": [], "substrings": words}
    patterns, names = optim.no_decay or [], names_of(model_of(family, variant))
    theirs = {ours for ours, name in names.items() if any(word in f"backbone.{name}" for word in words)}
    assert optim.filter_bias_and_bn is False and bool(theirs) == bool(words)
    assert {name for name in names if any(fnmatch(name, pattern) for pattern in patterns)} == theirs
    assert all(pattern.startswith("backbone.") for pattern in patterns)


def test_the_first_phase_is_the_default():
    for task, model, head in (
        ("segment", "biformer_s", "upernet"), ("segment", "litv2_s", "semantic_fpn"),
        ("detect", "davit_t", "mask_rcnn"), ("detect", "dinat_b", "cascade_mask_rcnn"),
        ("detect", "maxvit_t", "cascade_mask_rcnn"),
    ):  # fmt: skip
        assert compose(["recipe=paper", f"task={task}", f"model={model}"]).task.head == head
    short = compose(["recipe=paper", "task=detect", "model=davit_t"])
    assert (short.train.epochs, short.data.batch_size) == (12, 16)
    with pytest.raises(ConfigError, match=r"paper\.phase=coco_maskrcnn_3x is not published for biformer_s"):
        compose(["recipe=paper", "task=detect", "model=biformer_s", "paper.phase=coco_maskrcnn_3x"])


def test_the_command_line_beats_a_dense_recipe():
    given = ["model.n_win=7", "hardware.amp=null", "task.head=fcn", "optim.no_decay=[*rpb]", "train.drop_path_rate=0.0"]
    cfg = compose([*given, "recipe=paper", "task=segment", "model=biformer_s"])
    assert (cfg.model.n_win, cfg.hardware.amp, cfg.task.head) == (7, None, "fcn")
    assert (cfg.optim.no_decay, cfg.train.drop_path_rate, cfg.train.steps) == (["*rpb"], 0.0, 160000)
