"""Laws of the tables of layouts: no two keys meet, every rule matches something, the way back gives the file back."""

import pytest
import timm
import torch

import golden
from families import BUILT_WITH, HEADLESS, RECORDS, TIMM_MODELS
from test_golden import FOLDER, is_dense
from zoo.checkpoint import layouts_of
from zoo.convert import Layout
from zoo.layouts import LAYOUTS
from zoo.registry import class_of, variants


def cases():
    """(layout, state dict in it, our class, arguments of the model) of every record, and of `TIMM_MODELS`."""
    states = []
    for stem, model in RECORDS.items():
        record = golden.load(FOLDER / f"{stem}.json")
        args = variants()[model] | BUILT_WITH.get(stem, {}) | {"feature_norms": is_dense(stem)}
        states.append((stem, model, args, record["entries"]))
        if stem in HEADLESS:
            entries = headless(record["entries"], args)
            states.append((f"{stem}-headless", model, args | {"feature_norms": True}, entries))
    for name, model in TIMM_MODELS.items():
        state = timm.create_model(name, device="meta").state_dict()
        states.append(
            (f"timm-{name}", model, variants()[model], [(k, list(v.shape), "value") for k, v in state.items()])
        )
    for stem, model, args, entries in states:
        for layout in layouts_of(class_of(model))[:-1]:
            if not layout.unknown(key for key, *_ in entries):
                yield pytest.param(layout, entries, class_of(model), args, id=f"{stem}-{layout.name}")


def headless(entries, args):
    """The entries of a classifier with norms `norm0` to `norm3` on its stages instead of the head."""
    norms = [[f"norm{i}.{part}", [dim], "value"] for i, dim in enumerate(args["dims"]) for part in ("weight", "bias")]
    return [entry for entry in entries if not entry[0].startswith(("norm.", "head."))] + norms


CASES = list(cases())
LAYOUT_CASES = {(case.values[2].__name__, case.values[0].name): [] for case in CASES}
for case in CASES:
    LAYOUT_CASES[case.values[2].__name__, case.values[0].name].append(case)


def shapes(state):
    """Tables by the number of their entries: those of windows that are not square are flat until a model says more."""
    return {key: value.numel() if key.endswith(".rpb") else value.shape for key, value in state.items()}


@pytest.mark.parametrize(("layout", "entries", "cls", "args"), CASES)
def test_laws(layout, entries, cls, args):
    state = golden.filled(entries, torch.float32)
    ours = layout.to_ours(state)  # raises where two keys meet
    with torch.device("meta"):
        want = cls(**args).state_dict()
    if args.get("feature_norms"):
        want = {key: value for key, value in want.items() if not key.startswith("head.")}
    assert shapes(ours) == shapes(want)
    dropped = {key for key in state if layout.drops(key)}
    back = layout.to_theirs(ours)
    assert back.keys() == state.keys() - dropped
    assert all(torch.equal(back[key], state[key]) for key in back)


@pytest.mark.parametrize("name", LAYOUT_CASES, ids="-".join)
def test_every_rule_matches_something(name):
    layout = LAYOUT_CASES[name][0].values[0]
    keys = {key for case in LAYOUT_CASES[name] for key, *_ in case.values[1]}
    for theirs, ours in layout.rules.items():
        alone = Layout("alone", {theirs: ours})
        assert any(alone.ours(key) for key in keys), f"no key for {theirs}"
    for template in layout.drop:
        assert any(Layout("alone", {}, (template,)).drops(key) for key in keys), f"nothing to drop for {template}"
    names = {layout.ours(key) for key in keys if not layout.drops(key)}
    for template in layout.changes:
        only = Layout("alone", {template: template})
        assert any(only.ours(key) for key in names), f"nothing to change for {template}"


def test_every_layout_has_a_case():
    assert {(cls, layout.name) for cls, layouts in LAYOUTS.items() for layout in layouts} == LAYOUT_CASES.keys()


def test_numbers_that_shift():
    layout = Layout("shifted", {"levels.{i}.down.{j}": "stages.{i+1}.down.{j}"})
    assert layout.ours("levels.2.down.0.weight") == "stages.3.down.0.weight"
    assert layout.theirs("stages.3.down.0.weight") == "levels.2.down.0.weight"


def test_strictness():
    two = Layout("two", {"a": "x", "b": "x"})
    tensor = torch.zeros(1)
    with pytest.raises(ValueError, match=r"two entries the name x\.weight"):
        two.to_ours({"a.weight": tensor, "b.weight": tensor})
    with pytest.raises(ValueError, match=r"no rule for ab\.weight"):
        two.to_ours({"ab.weight": tensor})
    with pytest.raises(ValueError, match="2 rules speak of"):
        Layout("both", {"a": "x", "a.b": "y"}).ours("a.b.weight")
