"""recipe=paper is what is published: every resolved value against the facts, by rules that are written here.

Nothing of recipes/ is imported: the configurations come from a process of their own.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import facts
import zoo

FACTS = facts.classification()
SCRIPT = Path(__file__).with_name("composed.py")
CLASSIFY = Path(__file__).parents[1] / "recipes" / "papers" / "classify"
# how long a script's words for the schedule are in ours; what is counted from the start is timm's
SCHEDULES = {
    r"cosine\b": {"sched.sched": "cosine"},
    r"linear$": {"sched.sched": "linear"},
    r"constant( in effect \(\"linear\".*)?$": {"sched.sched": "constant"},
    r".*per iteration": {"sched.per": "step", "sched.decay_from": "start"},
    r".*per epoch": {"sched.per": "epoch", "sched.decay_from": "start"},
}
SAME = {
    "lr": "optim.lr", "batch_size": "data.batch_size", "weight_decay": "optim.weight_decay", "betas": "optim.betas",
    "eps": "optim.eps", "clip_grad": "train.clip_grad", "drop_path": "train.drop_path_rate", "min_lr": "sched.min_lr",
    "label_smoothing": "augment.label_smoothing", "mixup": "augment.mixup", "cutmix": "augment.cutmix",
    "mix_prob": "augment.mix_prob", "switch_prob": "augment.switch_prob", "random_erasing": "augment.re_prob",
    "color_jitter": "augment.color_jitter", "img_size": "data.img_size", "optimizer": "optim.opt",
}  # fmt: skip
RULES = {"absolute": None, "linear/512": 512}
# about the model or the machine: other tests hold them, or nothing in a recipe does
ELSEWHERE = {
    "source",
    "note",
    "iters",
    "amp",
    "window",
    "dilations",
    "kernel_size",
    "multi_lr",
    "lr_rule",
    "min_lr_rule",
}


@pytest.fixture(scope="module")
def composed():
    cases = list(FACTS)
    # beside the script lies a folder `ops`, of tests, which hides the package if an editable install has a finder
    env = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[1])}
    options = {"input": json.dumps(cases), "capture_output": True, "text": True, "check": True, "env": env}
    run = subprocess.run([sys.executable, SCRIPT], **options)
    return dict(zip(cases, json.loads(run.stdout), strict=True))


def expected(fact):
    """{key: value} as a fact has it, and the keys of which it says nothing."""
    said, unknown = {}, set()
    for field, value in fact.items():
        if field in ELSEWHERE:
            continue
        for key, found in READ.get(field, same)(field, value, fact).items():
            if found is None and value is not False and not key.startswith("model."):
                unknown.add(key)
            else:
                said[key] = found
    return said, unknown - said.keys()


def same(field, value, fact):
    if field == "optimizer" and value is None:  # recipe=paper leaves it to optim=
        return {}
    return {SAME[field]: None if value is False else value}


def epochs(_, value, fact):
    run = fact.get("epochs_run", value)
    return {"train.epochs": run, "sched.cooldown": None if run is None else run - value}


def warmup(_, value, fact):
    if value is None:
        return {"sched.warmup": None, "sched.unit": None}
    unit = "epochs" if "epochs" in value else "iters"
    said = {"sched.warmup": value[unit]}
    said |= {"sched.unit": {"epochs": "epochs", "iters": "steps"}[unit]} if value[unit] else {}
    return said | ({"sched.warmup_lr": value["from"]} if "from" in value else {})


def schedule(_, value, fact):
    if value is None:
        return {"sched.sched": None}
    if value.startswith("constant in effect at batch 512"):
        assert fact["lr"] * fact["batch_size"] / 512 == fact["min_lr"]
        return {}
    found = [said for words, said in SCHEDULES.items() if re.match(words, value)]
    assert any("sched.sched" in said for said in found), value
    return {key: found for said in found for key, found in said.items()}


def no_decay(_, value, fact):
    if value is None:
        return {"optim.filter_bias_and_bn": None}
    return {"optim.filter_bias_and_bn": "regex" in value or value["ndim_le_1"]}  # by name: test_schedule.py


def layer_scale(_, value, fact):
    """A number for all blocks, or the stages that have it, counted from 1; its first value there is the model's."""
    if isinstance(value, dict):
        return {"model.scaled_stages": [stage - 1 for stage in value["stages"]]}
    return {} if value is None else {"model.layer_scale": value or None, "model.scaled_stages": None}


def randaugment(_, value, fact):
    if isinstance(value, dict):
        wide = value.get("trivialaugment")
        value = wide or f"rand-m{value['magnitude']}(-mmax15)?-n{value['layers']}-p1.0"
    return {"augment.auto_augment": value}


def repeated(_, value, fact):
    return {"augment.repeats": None if value is None else 3 if value else 1}


def ema(_, value, fact):
    if not value:
        return {"train.ema": None}
    every = {"train.ema_every": value["every_iters"]} if "every_iters" in value else {}
    return {"train.ema": value["decay"], "train.ema_evaluated": value["evaluated"], **every}


def crop(_, value, fact):
    if value is None:
        return {"data.crop_pct": None, "data.crop_mode": None, "augment.scale": None}
    scale = {"rrc 0.08-1": {"augment.scale": [0.08, 1.0]}, "224": {}, None: {"augment.scale": None}}[value["train"]]
    mode = "squash" if "squash" in value["eval_mode"] else value["eval_mode"].split()[0]
    return {"data.crop_pct": value["eval_pct"], "data.crop_mode": mode, **scale}


def interpolation(_, value, fact):
    value = value or {"train": None, "eval": None}
    return {"augment.interpolation": value["train"], "data.interpolation": value["eval"]}


def loss(_, value, fact):
    return {
        "task.loss": "binary_cross_entropy",
        "augment.label_smoothing": float(re.fullmatch(r"sigmoid, label smoothing (.*)", value)[1]),
    }


READ = {
    "epochs": epochs, "epochs_run": lambda *_: {}, "warmup": warmup, "schedule": schedule, "no_decay": no_decay,
    "layer_scale": layer_scale, "randaugment": randaugment, "repeated_aug": repeated, "ema": ema, "crop": crop,
    "interpolation": interpolation, "loss": loss,
}  # fmt: skip


@pytest.mark.parametrize("model, phase", FACTS)
def test_every_value_is_the_published_one(model, phase, composed):
    found, (said, unknown) = composed[model, phase], expected(FACTS[model, phase])
    cfg = found["cfg"]
    augment = said.pop("augment.auto_augment", None)
    assert augment is None or re.fullmatch(augment, cfg["augment.auto_augment"])
    assert {key: cfg.get(key) for key in said} == said
    assert not said.keys() & set(found["chosen"])
    assert unknown <= set(found["chosen"])


@pytest.mark.parametrize("model, phase", FACTS)
def test_rates_are_scaled_as_published(model, phase, composed):
    fact, cfg = FACTS[model, phase], composed[model, phase]["cfg"]
    if fact["lr_rule"] is not None:
        assert cfg["optim.lr_base_batch"] == RULES[fact["lr_rule"]]
    rules = {fact["min_lr_rule"] if fact["min_lr"] is not None else None, (fact["warmup"] or {}).get("from_rule")}
    for rule in rules - {None}:
        assert cfg["sched.lr_base_batch"] == RULES[rule]


@pytest.mark.parametrize("model, phase", FACTS)
def test_parts_are_what_a_device_had(model, phase, composed):
    """So that one device does, one after the other, what theirs did side by side."""
    cfg, stated = composed[model, phase]["cfg"], re.match(r"(\d+) per GPU", FACTS[model, phase].get("note", ""))
    assert cfg["data.batch_size"] % cfg["train.micro_batch"] == 0
    if stated:
        assert cfg["train.micro_batch"] == int(stated[1])


def test_normalisation(composed):
    """ImageNet's statistics, but for MaxViT above 224 pixels, which takes [-1, 1]."""
    for (model, _), found in composed.items():
        wide = model.startswith("maxvit") and found["cfg"]["data.img_size"] > 224
        expected = ([0.5] * 3, [0.5] * 3) if wide else ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
        assert (found["cfg"]["data.mean"], found["cfg"]["data.std"]) == expected, model


def test_no_family_decays_its_rate_by_layer(composed):
    assert {found["cfg"]["optim.layer_decay"] for found in composed.values()} == {None}


def merged(node):
    """The keys of a mapping in YAML, with those that are merged into it; fails where merged mappings share a key."""
    own = [key.value for key, _ in node.value if key.value != "<<"]
    for _, value in (pair for pair in node.value if pair[0].value == "<<"):
        keys = [key for each in getattr(value, "value", []) if value.id == "sequence" for key in merged(each)]
        assert len(keys) == len(set(keys)), sorted(key for key in set(keys) if keys.count(key) > 1)
        own += keys or merged(value)
    return list(dict.fromkeys(own))


def mappings(node):
    if isinstance(node, yaml.MappingNode):
        yield node
    children = [value for _, value in node.value] if isinstance(node, yaml.MappingNode) else node.value
    for child in children if isinstance(node, yaml.CollectionNode) else []:
        yield from mappings(child)


TABLES = sorted(CLASSIFY.parent.glob("*/[a-z]*.yaml"))


@pytest.mark.parametrize("path", TABLES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_merged_values_do_not_depend_on_their_order(path):
    """PyYAML changed which of several merged mappings wins."""
    common = path.with_name("_common.yaml")
    text = (common.read_text() if common.is_file() else "") + path.read_text()
    assert sum(bool(merged(node)) for node in mappings(yaml.compose(text, yaml.SafeLoader))) > 3


def test_every_model_has_its_place():
    """A variant of the facts that is none of the zoo's would be an error in `facts`; a model in none is listed."""
    unpublished = yaml.safe_load((CLASSIFY / "_unpublished.yaml").read_text())
    # of the README, as LITv2-S
    ablations = {f"litv2_s_a{share}" for share in ("00", "02", "04", "05", "07", "09", "10")}
    named = {model for model, _ in FACTS}
    assert not named & (ablations | unpublished.keys())
    assert set(zoo.variants()) == named | ablations | unpublished.keys()
