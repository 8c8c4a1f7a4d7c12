"""recipe=paper of classification is what is published: every resolved value against the facts, by rules written here.

Nothing of recipes/ is imported: published.py has the configurations from a process of their own.
"""

import ast
import re
from pathlib import Path

import pytest
import yaml

import facts
import zoo
from published import RULES, UNKNOWN, compare, composed, expected, nothing, or_unknown, same

FACTS = facts.classification()
CLASSIFY = Path(__file__).parents[1] / "recipes" / "papers" / "classify"
TIMM = "rand-m9-mstd0.5-inc1"  # who has it has the rest of timm's augmentations too
# how long a script's words for the schedule are in ours; what is counted from the start is timm's
SCHEDULES = {
    r"cosine\b": {"sched.sched": "cosine"},
    r"linear$": {"sched.sched": "linear"},
    r"constant( in effect \(\"linear\".*)?$": {"sched.sched": "constant"},
    r".*per iteration": {"sched.per": "step", "sched.decay_from": "start"},
    r".*per epoch": {"sched.per": "epoch", "sched.decay_from": "start"},
}


@pytest.fixture(scope="module")
def found():
    return composed([(*case, "classify") for case in FACTS])


def epochs(_, value, fact):
    run = fact.get("epochs_run", value)
    return {"train.epochs": or_unknown(run), "sched.cooldown": UNKNOWN if run is None else run - value}


def warmup(_, value, fact):
    if value is None:
        return {"sched.warmup": UNKNOWN, "sched.unit": UNKNOWN}
    unit = "epochs" if "epochs" in value else "iters"
    said = {"sched.warmup": value[unit]}
    said |= {"sched.unit": {"epochs": "epochs", "iters": "steps"}[unit]} if value[unit] else {}
    return said | (begin(value) if "from" in value else {})


def begin(value):
    return {"sched.warmup_lr": value["from"], "sched.lr_base_batch": RULES[value["from_rule"]]}


def schedule(_, value, fact):
    if value is None:
        return {"sched.sched": UNKNOWN}
    if value.startswith("constant in effect at batch 512"):
        assert fact["lr"] * fact["batch_size"] / 512 == fact["min_lr"]
        return {}
    said = [said for words, said in SCHEDULES.items() if re.match(words, value)]
    assert any("sched.sched" in each for each in said), value
    return {key: value for each in said for key, value in each.items()}


def layer_scale(_, value, fact):
    """A number for all blocks, or the stages that have it, counted from 1; its first value there is the model's."""
    if isinstance(value, dict):
        return {"model.layer_scale_stages": [stage - 1 for stage in value["stages"]]}
    return {} if value is None else {"model.layer_scale": value or None, "model.layer_scale_stages": None}


def randaugment(field, value, fact):
    """Layers of one magnitude are timm's n and m, each always applied; above 10, its m needs an mmax to have effect."""
    if not isinstance(value, dict) or "trivialaugment" in value:
        return same(field, value["trivialaugment"] if isinstance(value, dict) else value, fact)
    magnitude = value["magnitude"]
    highest = f"-mmax{magnitude}" if magnitude > 10 else ""
    return {"augment.auto_augment": f"rand-m{magnitude}{highest}-n{value['layers']}-p1.0"}


def crop(_, value, fact):
    if value is None:
        return {"data.crop_pct": UNKNOWN, "data.crop_mode": UNKNOWN, "augment.scale": UNKNOWN}
    scale = {"rrc 0.08-1": {"augment.scale": [0.08, 1.0]}, "224": {}, None: {"augment.scale": UNKNOWN}}[value["train"]]
    mode = "squash" if "squash" in value["eval_mode"] else value["eval_mode"].split()[0]
    return {"data.crop_pct": or_unknown(value["eval_pct"]), "data.crop_mode": mode, **scale}


def interpolation(_, value, fact):
    value = value or {"train": None, "eval": None}
    return {"augment.interpolation": or_unknown(value["train"]), "data.interpolation": or_unknown(value["eval"])}


def loss(_, value, fact):
    return {
        "task.loss": "binary_cross_entropy",
        "augment.label_smoothing": float(re.fullmatch(r"sigmoid, label smoothing (.*)", value)[1]),
    }


READ = {
    **dict.fromkeys(("iters", "epochs_run", "window", "dilations", "multi_lr"), nothing),
    "epochs": epochs, "warmup": warmup, "schedule": schedule, "layer_scale": layer_scale, "randaugment": randaugment,
    "crop": crop, "interpolation": interpolation, "loss": loss,
}  # fmt: skip


def besides(fact):
    """Keys of which prose tells, or another test, or that have no effect here."""
    keys = {"data.mean", "data.std", "train.micro_batch", "optim.no_decay", "optim.decay"}  # below; test_schedule.py
    keys |= {"task.loss", "train.ema_every", "train.ema_warmup"}
    if fact["randaugment"] == TIMM:
        keys |= {"augment.ratio", "augment.re_mode", "sched.shared_floor", "train.eval_mode"}
    if not fact["ema"]:
        keys.add("train.ema_evaluated")
    if not any((fact["warmup"] or {}).values()):
        keys |= {"sched.unit", "sched.warmup_lr"}
    if (fact["schedule"] or "").startswith("constant in effect"):
        keys |= {"sched.sched", "sched.per", "sched.decay_from"}
    return keys


@pytest.mark.parametrize("model, phase", FACTS)
def test_every_value_is_the_published_one(model, phase, found):
    fact = FACTS[model, phase]
    compare(found[model, phase, "classify"], expected(fact, READ), besides(fact))


@pytest.mark.parametrize("model, phase", FACTS)
def test_parts_are_what_a_device_had(model, phase, found):
    """So that one device does, one after the other, what theirs did side by side."""
    cfg = found[model, phase, "classify"]["cfg"]
    stated = re.match(r"(\d+) per GPU", FACTS[model, phase].get("note", ""))
    assert cfg["data.batch_size"] % cfg["train.micro_batch"] == 0
    if stated:
        assert cfg["train.micro_batch"] == int(stated[1])


def test_only_evaluation_mode_of_one_family(found):
    """STViT's script fine-tunes a model that it has put in evaluation mode."""
    learned = {case for case, each in found.items() if each["cfg"]["train.eval_mode"]}
    assert learned == {case for case in found if "runs in eval mode" in FACTS[case[:2]].get("note", "")} != set()


def test_normalisation(found):
    """ImageNet's statistics, but for MaxViT above 224 pixels and on ImageNet-21k, which takes [-1, 1]."""
    for (model, phase, _), each in found.items():
        wide = model.startswith("maxvit") and (each["cfg"]["data.img_size"] > 224 or "21k" in phase)
        expected = ([0.5] * 3, [0.5] * 3) if wide else ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
        assert (each["cfg"]["data.mean"], each["cfg"]["data.std"]) == expected, model


def test_all_mirror_half_of_the_images(found):
    assert {each["cfg"]["augment.hflip"] for each in found.values()} == {0.5}


def test_no_family_decays_its_rate_by_layer(found):
    assert {each["cfg"]["optim.layer_decay"] for each in found.values()} == {None}


@pytest.mark.parametrize("name", ["test_papers.py", "test_paper_dense.py", "published.py", "facts/__init__.py"])
def test_nothing_of_recipes_is_imported(name):
    """What is compared with the recipes must not come from them."""
    nodes = list(ast.walk(ast.parse((Path(__file__).parent / name).read_text())))
    named = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    named += [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
    assert named and not {"recipes", "train", "eval", "children", "composed"} & {name.split(".")[0] for name in named}


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
