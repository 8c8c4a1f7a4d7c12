"""Laws of the tables of layouts: no two keys meet, every rule matches something, the way back gives the file back."""

import re

import pytest
import timm
import torch

import golden
import zoo
from families import BUILT_WITH, HEADLESS, RECORDS, TIMM_MODELS
from golden_cases import is_dense
from zoo.checkpoint import layouts_of
from zoo.convert import Group, Layout, command
from zoo.files import whole
from zoo.layouts import LAYOUTS
from zoo.reader import Checkpoint
from zoo.registry import class_of, variants


def cases():
    """(layout, state dict in it, our class, arguments of the model) of every record, and of `TIMM_MODELS`."""
    states = []
    for stem, model in RECORDS.items():
        record = golden.load(golden.FOLDER / f"{stem}.json")
        args = variants()[model] | BUILT_WITH.get(stem, {}) | {"feature_norms": is_dense(stem)}
        states.append((stem, model, args, record["entries"]))
        if stem in HEADLESS:
            entries = headless(record["entries"], args, HEADLESS[stem])
            states.append((f"{stem}-headless", model, args | {"feature_norms": True}, entries))
    for name, model in TIMM_MODELS.items():
        state = timm.create_model(name, device="meta").state_dict()
        states.append(
            (f"timm-{name}", model, variants()[model], [(k, list(v.shape), "value") for k, v in state.items()])
        )
    states += [(f"{prefix}-of-transformers", m, variants()[m], transformers(m, prefix)) for m, prefix in TRANSFORMERS]
    states.append(("biformer_stl_nchw", "biformer_stl_nchw", variants()["biformer_stl_nchw"], convolutional()))
    for stem, model, args, entries in states:
        for layout in layouts_of(class_of(model))[:-1]:
            if not layout.unknown(key for key, *_ in entries):
                yield pytest.param(layout, entries, class_of(model), args, id=f"{stem}-{layout.name}")


# no record has these names: they are written down by hand, not read from a file of Hugging Face's
TRANSFORMERS = [("dinat_b", "dinat"), ("nat_s", "nat")]


def transformers(name, prefix):
    """Names and shapes of Hugging Face's classifier; both variants have factors on their branches."""
    args = variants()[name]
    dims, depths = args["dims"], args["depths"]
    entries = {
        "classifier": (1000, dims[3]),
        f"{prefix}.layernorm": (dims[3],),
        f"{prefix}.embeddings.norm": (dims[0],),
    }
    for i, shape in enumerate([(dims[0] // 2, 3, 3, 3), (dims[0], dims[0] // 2, 3, 3)]):
        entries[f"{prefix}.embeddings.patch_embeddings.projection.{i}"] = shape
    plain = {}
    for i, (dim, depth) in enumerate(zip(dims, depths, strict=True)):
        level, hidden = f"{prefix}.encoder.levels.{i}", int(dim * args["mlp_ratio"])
        for layer in [f"{level}.layers.{j}" for j in range(depth)]:
            entries |= {f"{layer}.attention.self.{part}": (dim, dim) for part in ("query", "key", "value")}
            entries |= {f"{layer}.layernorm_{place}": (dim,) for place in ("before", "after")}
            entries |= {f"{layer}.attention.output.dense": (dim, dim), f"{layer}.intermediate.dense": (hidden, dim)}
            entries |= {f"{layer}.output.dense": (dim, hidden)}
            plain |= {f"{layer}.attention.self.rpb": (dim // 32, 13, 13), f"{layer}.layer_scale_parameters": (2, dim)}
        if i < 3:
            entries[f"{level}.downsample.norm"] = (dims[i + 1],)
            plain[f"{level}.downsample.reduction.weight"] = (dims[i + 1], dim, 3, 3)
    plain |= {f"{key}.weight": shape for key, shape in entries.items()}
    plain |= {f"{key}.bias": shape[:1] for key, shape in entries.items()}
    return [(key, list(shape), "value") for key, shape in plain.items()]


def convolutional():
    """Names and shapes of BiFormer's NCHW code: linear layers are convolutions, two of them are called otherwise."""
    entries = []
    for key, shape, kind in golden.load(golden.FOLDER / "biformer_stl_224x224.json")["entries"]:
        key = key.replace(".attn.qkv.qkv.", ".attn.qkv_linear.").replace(".attn.wo.", ".attn.output_linear.")
        linear = len(shape) == 2 and not key.startswith("head.")
        entries.append([key, [*shape, 1, 1] if linear else shape, kind])
    return entries


def headless(entries, args, norm):
    """The entries of a classifier with norms `{norm}0` to `{norm}3` on its stages instead of the head."""
    norms = [[f"{norm}{i}.{part}", [dim], "value"] for i, dim in enumerate(args["dims"]) for part in ("weight", "bias")]
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
    whole = layout.to_theirs(ours, constants=True)
    assert {key: value.shape for key, value in whole.items()} == {key: value.shape for key, value in state.items()}
    assert all(whole[key].dtype == state[key].dtype for key in dropped)


@pytest.mark.parametrize("name", LAYOUT_CASES, ids="-".join)
def test_every_rule_matches_something(name):
    layout = LAYOUT_CASES[name][0].values[0]
    keys = {key for case in LAYOUT_CASES[name] for key in layout.units(entry[0] for entry in case.values[1])}
    for theirs, ours in layout.rules.items():
        alone = Layout("alone", {theirs: ours})
        assert any(alone.ours(key) for key in keys), f"no key for {theirs}"
    for template, constant in layout.drop.items():
        assert any(Layout("alone", {}, {template: constant}).drops(key) for key in keys), f"nothing to drop: {template}"
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
    with pytest.raises(ValueError, match="2 rules apply to"):
        Layout("both", {"a": "x", "a.b": "y"}).ours("a.b.weight")
    (official,) = LAYOUTS["ViTRPB"]
    with pytest.raises(ValueError, match=r"expects another shape for layers\.0\.attn\.rpb than \(3, 25\)"):
        official.to_theirs({"stages.0.blocks.0.attn.fn.rpb": torch.zeros(3, 25)}, constants=True)
    with pytest.raises(ValueError, match="a table of 9 x 25 relative positions is not for square windows"):
        official.to_theirs({"stages.0.blocks.0.attn.fn.rpb": torch.zeros(3, 9, 25)}, constants=True)


def test_groups():
    """Three tensors that are one here, and one that is two."""
    cat = Group(("{i}.q", "{i}.k", "{i}.v"), ("{i}.qkv",), lambda t: [torch.cat(t)], lambda t: t[0].chunk(3))
    two = Group(("{i}.both",), ("{i}.one", "{i}.two"), lambda t: t[0].unbind(), lambda t: [torch.stack(t)])
    rules = {"{i}.qkv": "x.{i}.qkv", "{i}.one": "x.{i}.one", "{i}.two": "x.{i}.two"}
    layout = Layout("apart", rules, groups=(cat, two))
    theirs = {f"{i}.{part}.weight": torch.randn(2, 2) for i in (0, 1) for part in "qkv"} | {"0.both": torch.randn(2, 5)}
    ours = layout.to_ours(theirs)
    assert ours.keys() == {"x.0.qkv.weight", "x.1.qkv.weight", "x.0.one", "x.0.two"}
    assert torch.equal(ours["x.1.qkv.weight"], torch.cat([theirs[f"1.{part}.weight"] for part in "qkv"]))
    assert torch.equal(ours["x.0.two"], theirs["0.both"][1])
    back = layout.to_theirs(ours)
    assert back.keys() == theirs.keys() and all(torch.equal(back[key], theirs[key]) for key in back)
    del theirs["1.k.weight"]
    assert layout.unknown(theirs) == ["1.q.weight", "1.v.weight"]
    with pytest.raises(ValueError, match=r"no rule for 1\.q\.weight, 1\.v\.weight"):
        layout.to_ours(theirs)
    with pytest.raises(ValueError, match=r"0\.both makes 3 tensors: expected 2"):
        layout.to_ours({"0.both": torch.zeros(3, 5)})
    with pytest.raises(ValueError, match=r"no name for our x\.0\.three"):
        layout.to_theirs({"x.0.three": torch.zeros(1)})


def test_a_model_that_is_named_is_looked_at():
    def of(model, **args):
        with torch.device("meta"):
            return class_of(model)(**variants()[model] | args).state_dict()

    def convert(state, model):
        return command.convert(Checkpoint("w.pth", {"raw": state}), model=model).state

    state = of("nat_m")
    for other in (state, of("nat_m", in_chans=1, num_classes=3), of("nat_m", feature_norms=True)):
        assert convert(other, "dinat_m").keys() == other.keys()
    headless = {key: value for key, value in state.items() if not key.startswith("head.")}
    assert convert(headless, "nat_m").keys() == headless.keys()
    with pytest.raises(zoo.CheckpointError, match=r"w\.pth is not nat_t, as --model says.*missing: stages\.2"):
        convert(state, "nat_t")
    for key in ("stages.0.blocks.0.attn.fn.rpb", "head.before.weight", "head.fc.bias"):
        said = "its classifier has no" if key == "head.fc.bias" else "1 missing:"
        with pytest.raises(zoo.CheckpointError, match=f"is not nat_m, as --model says.*{said} {key}"):
            convert({k: v for k, v in state.items() if k != key}, "nat_m")
    for key, shape in (("stages.0.blocks.0.attn.fn.rpb", (2, 0, 0)), ("stem.conv1.weight", (32, 0, 3, 3))):
        said = re.escape(f"{key} {shape} instead of")
        with pytest.raises(zoo.CheckpointError, match=f"is not nat_m, as --model says.*{said}"):
            convert(state | {key: torch.zeros(shape)}, "nat_m")


@pytest.mark.parametrize("out", ["file/out.pth", f"{'a' * 300}.pth", f"{'a' * 300}/out.pth"])
def test_places_that_cannot_be(tmp_path, out):
    (tmp_path / "file").touch()
    with pytest.raises(zoo.CheckpointError, match="could not write"), whole(tmp_path / out) as temporary:
        temporary.touch()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_longest_name(tmp_path):
    with whole(tmp_path / f"{'a' * 251}.pth") as temporary:
        temporary.touch()
    assert [len(path.name) for path in tmp_path.iterdir()] == [255]
