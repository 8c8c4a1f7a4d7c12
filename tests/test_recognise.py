"""Recognition by names and shapes: wrong file names, stacked prefixes, files mixed up, parts of detectors."""

import re
import time

import pytest
import timm
import torch

import zoo
import zoo.show.source
from builds import NAME, refused, small, timm_state, trained, without
from builds import state_of as weights_of
from families import ALIKE, SMALL
from zoo import export, heads, inspect, show
from zoo.checkpoint import layouts_of, load_checkpoint, part_of
from zoo.heads import segmenter
from zoo.heads.recognise import recognise_dense
from zoo.reader import Checkpoint
from zoo.recognise import Recognition, closest, compare, recognise, without_prefix
from zoo.registry import class_of, variants
from zoo.releases import RELEASES

# a released variant of each class
MODELS = [
    *("maxvit_t", "maxvit_t_tv", "gcvit_xxt", "davit_t", "biformer_t", "biformer_stl", "biformer_stl_nchw", "litv2_s"),
    *("sgformer_s", "stvit_s", "dinat_t", "dinats_t", "nat_iso_s", "vitrpb_s"),
]
CASES = [(model, layout.name) for model in MODELS for layout in layouts_of(class_of(model))]


def state_of(model, layout="official"):
    """A state dict without memory, as its source would name it."""
    with torch.device("meta"):
        state = class_of(model)(**variants()[model]).state_dict()
    known = next(known for known in layouts_of(class_of(model)) if known.name == layout)
    return known.to_theirs(state, constants=True)


def alike(model):
    """Models that no weights tell apart, and models that are one and the same."""
    same = {n for n, args in variants().items() if (class_of(n), args) == (class_of(model), variants()[model])}
    return same | next((group for group in ALIKE if model in group), set())


@pytest.mark.parametrize("file", ["dinat_s_large_384.pth", "dinat_s_large_1k_384.pth", "dinats_l_384.pth"])
def test_names_of_dinat_s_as_its_authors_write_them(file):
    assert recognise(state_of("dinats_l_384"), file).model == "dinats_l_384"


def prefixed(state, prefix):
    return {f"{prefix}{key}": value for key, value in state.items()}


@pytest.mark.parametrize(("model", "layout"), CASES, ids=str)
def test_wrongly_named(model, layout):
    """The name of another family's file, and five wrappers around the names, change nothing."""
    state = prefixed(state_of(model, layout), "module._orig_mod._fsdp_wrapped_module.backbone.encoder.")
    found = recognise(state, "gcvit_1k_base.pth.tar" if model != "gcvit_xxt" else "maxvit_t-bc5ab103.pth")
    # the second STL model differs from the first in what the zoo does not write differently
    models = {"biformer_stl", "biformer_stl_nchw"} if (model[:12], layout) == ("biformer_stl", "zoo") else alike(model)
    known = next(known for known in layouts_of(class_of(model)) if known.name == layout)
    models = {name for name in models if name.startswith(known.models)}
    assert found.exact and set(found.candidates) == {(name, layout) for name in models}
    assert found.classes == 1000 and not found.by_name
    assert found.model == (None if len(models) > 1 else min(models))


def test_mixed_up():
    """Two files that have each other's name."""
    names = {"davit_t": "biformer_tiny_best.pth", "biformer_t": "davit-tiny.pth"}
    assert [recognise(state_of(model), name).model for model, name in names.items()] == list(names)


@pytest.mark.parametrize(
    ("file", "model"),
    [
        ("nat_tiny.pth", "nat_t"),
        ("dinat_tiny_in1k_224.pth", "dinat_t"),
        ("downloads/DiNAT-Tiny.safetensors", "dinat_t"),
        ("nat_mini_1k.pth", "nat_m"),
        ("dinat_large_in22k.pth", "dinat_l"),
        ("dinat_large_in22k_in1k_384.pth", "dinat_l_384"),
        ("nat_iso_small.pth", "nat_iso_s"),
        ("dinats_large.pth", "dinats_l"),
        ("weights.pth", None),
        ("nat_and_dinat.pth", None),
        ("davit_t.pth", None),
        ("natural.pth", None),
    ],
)
def test_names_pick_among_equals(file, model):
    holds = model or "nat_t"
    found = recognise(state_of(holds), file)
    assert found.model == model and found.by_name == (model is not None)
    assert {name for name, _ in found.candidates} == alike(holds)
    said = "name the model" if model is None else f"{model} by its name"
    assert "differ only in what has no weights" in found.message and said in found.message


@pytest.mark.parametrize("group", ALIKE, ids=min)
def test_released_files_of_models_that_are_alike(group):
    files = {r.url.rpartition("/")[2]: r.model for r in RELEASES if r.model in group and r.loadable and not r.by_hand}
    state = state_of(min(group))
    assert {name for name, _ in recognise(state).candidates} == group
    assert {file: recognise(state, file).model for file in files} == files


def test_many_wrappers():
    """In time that goes by the length of a name, not by its square."""
    long, begun = f"{'module.' * 200_000}stem.norm", time.perf_counter()
    assert without_prefix({f"{long}.weight": 1, f"{long}.bias": 2}) == {"stem.norm.weight": 1, "stem.norm.bias": 2}
    assert time.perf_counter() - begun < 2
    assert without_prefix({"module.model.a": 1, "module.encoder.b": 2}) == {"model.a": 1, "encoder.b": 2}
    assert without_prefix({"backbone.": 1}) == {"": 1} and without_prefix({}) == {}


def test_numbers_of_many_digits():
    """Python makes no number of more than 4,300; ones of other scripts are none."""
    for number in ("1" * 5000, "10000", "٣"):
        assert recognise({f"levels.0.blocks.{number}.norm1.weight": torch.zeros(2)}) == Recognition((), exact=False)


def test_counter_of_an_average():
    state = prefixed(state_of("gcvit_xxt"), "module.") | {"n_averaged": torch.zeros((), dtype=torch.long)}
    assert recognise(state).model == "gcvit_xxt"


def test_counters_of_operations():
    """thop leaves two in every module."""
    state = state_of("gcvit_xxt")
    counted = {f"{key.rpartition('.')[0]}.total_ops": torch.zeros(1) for key in state}
    state |= {"total_ops": torch.zeros(1), "total_params": torch.zeros(1), **counted}
    assert recognise(prefixed(state, "module.")).model == "gcvit_xxt"


@pytest.mark.parametrize("layout", ["official", "zoo"])
def test_images_of_other_channels(layout):
    with torch.device("meta"):
        state = class_of("stvit_s")(**variants()["stvit_s"], in_chans=1).state_dict()
    known = next(known for known in layouts_of(class_of("stvit_s")) if known.name == layout)
    found = recognise(known.to_theirs(state, constants=True))
    assert found.model == "stvit_s" and found.exact


def test_names_that_no_layout_has():
    state = state_of("davit_t") | {"extra.weight": torch.zeros(3)}
    assert recognise(state).candidates == ()
    model, layout, shapes = closest(state)
    assert (model, layout) == ("davit_t", "official") and compare(shapes, model) == ([], ["extra.weight"], [])
    assert closest({"cls_token": torch.zeros(1)}) is None


def test_a_folder_says_what_it_holds(tmp_path):
    """What has no weights stands in the config.json that timm writes beside them."""
    zoo.save_for_hf(timm.create_model("dinat_m", num_classes=2), tmp_path)
    assert inspect.inspect(tmp_path / "model.safetensors")["model"] == "dinat_m"
    for said in ('{"architecture": "gcvit_t"}', '{"architecture": 3}', "[]", "{"):
        (tmp_path / "config.json").write_text(said)
        assert inspect.inspect(tmp_path / "model.safetensors")["models"] == ["nat_m", "dinat_m"]


def test_another_classifier():
    state = state_of("davit_t") | {"head.weight": torch.empty(21, 768), "head.bias": torch.empty(21)}
    assert recognise(state).classes == 21
    assert recognise(state | {"head.weight": torch.empty(())}).classes is None
    del state["head.weight"], state["head.bias"]
    found = recognise(state)
    assert (found.model, found.classes, found.exact) == ("davit_t", None, True)


def test_no_model_of_the_zoo():
    assert recognise({}) == recognise({"cls_token": torch.zeros(1)}) == Recognition((), exact=False)
    # our names with other shapes, and the authors' names with shapes that cannot be turned into ours
    assert recognise({"stem.conv1.weight": torch.zeros(3)}).candidates == ()
    wrong = state_of("stvit_s")
    wrong["layers.0.blocks.0.attn.stoken_refine.qkv.weight"] = torch.zeros(3)
    assert recognise(wrong).candidates == ()
    for shape in ((), (4,), (4, 0, 0), (4, 13, 13, 1)):  # of no table, whatever the windows are
        assert recognise(state_of("nat_m") | {"levels.1.blocks.0.attn.rpb": torch.zeros(shape)}).candidates == ()


def test_projections_apart_that_do_not_fit(tmp_path):
    """As Hugging Face names them: no model, and no end of a list of files."""
    names = [f"dinat.encoder.levels.0.layers.0.attention.self.{part}.weight" for part in ("query", "key", "value")]
    for shapes in (((4, 4), (4, 3), (4, 4)), ((7, 4), (5, 4), (0, 4))):  # the second add up to three of (4, 4)
        state = dict(zip(names, map(torch.zeros, shapes), strict=True))
        torch.save(state, tmp_path / "weights.pth")
        assert recognise(state).candidates == ()
        assert inspect.inspect(tmp_path / "weights.pth")["summary"] == "not a model of the zoo"
        said = " or ".join(f"{name} than {shape}" for name, shape in zip(names, shapes, strict=True))
        said = re.escape(f"layout 'transformers' expects another shape for {said}")
        refused(tmp_path / "weights.pth", said, small("dinat_b"))
    wrong = {"levels.0.blocks.0.attn.qkv.weight": torch.zeros(4), **dict.fromkeys(names, torch.zeros(()))}
    assert recognise(wrong).candidates == ()


def test_of_wrong_shapes():
    wrong = state_of("stvit_s")
    wrong["layers.0.blocks.0.attn.stoken_refine.qkv.weight"] = torch.zeros(3)
    with torch.device("meta"):
        model = class_of("stvit_s")(**variants()["stvit_s"])
    with pytest.raises(zoo.CheckpointError, match=r"expects another shape for .*qkv\.weight than \(3,\)"):
        zoo.checkpoint.select(Checkpoint("w.pth", {"raw": wrong}), type(model), "auto")


# how a GC ViT is built -> what its tables show of it
BUILT = [
    ({}, {"img_size": 224}),
    ({"img_size": (250, 318)}, {"img_size": (256, 320)}),  # the same windows
    ({"window_size": 24}, {"window_size": 24}),
    ({"window_size": (7, 7, 14, 7)}, {"img_size": 224}),
    ({"window_size": (3, (3, 4), 5, 4)}, {"window_size": [3, (3, 4), 5, 4]}),
    ({"window_size": (12, 12, 24, 12)}, {"img_size": 384}),  # as the published classifiers for 384 pixels
    ({"window_size": 24, "rel_pos_bias": False}, {"rel_pos_bias": False}),
]
UNSAID = "; the windows are not in it: give window_size="


@pytest.mark.parametrize(("given", "shown"), BUILT, ids=str)
@pytest.mark.parametrize("num_classes", [0, 3])
def test_tables_show_the_windows(given, shown, num_classes):
    with torch.device("meta"):
        state = class_of("gcvit_xxt")(**variants()["gcvit_xxt"] | given, num_classes=num_classes).state_dict()
    found = recognise(state)
    assert (found.model, found.arguments("gcvit_xxt"), found.arguments("gcvit_t")) == ("gcvit_xxt", shown, {})
    assert found.missing_args("gcvit_xxt") == (["window_size"] if "rel_pos_bias" in given else [])
    assert not found.missing_args("gcvit_t")
    assert found.message.endswith(UNSAID) == ("rel_pos_bias" in given)
    # in the authors' layout tables are flat
    flat = {key: value.flatten(1) if key.endswith(".rpb") else value for key, value in state.items()}
    assert recognise(flat).arguments("gcvit_xxt") == ({} if "rel_pos_bias" not in given else shown)


def built(model, layout, **given):
    """A state dict without memory of a variant with other arguments, as its source would name it."""
    with torch.device("meta"):
        state = class_of(model)(**variants()[model] | given).state_dict()
    return next(known for known in layouts_of(class_of(model)) if known.name == layout).to_theirs(state)


# how a MaxViT is built -> what its tables show of it
PARTITIONED = [
    ({}, {"img_size": 224}),
    ({"img_size": 250}, {"img_size": 256}),  # the same windows
    ({"img_size": (224, 320)}, {"img_size": (224, 320)}),
    ({"img_size": 512, "partition_ratio": 64}, {"img_size": 256}),
    ({"window_size": 8, "grid_size": 8}, {"img_size": 256}),
]


@pytest.mark.parametrize(("given", "shown"), PARTITIONED, ids=str)
@pytest.mark.parametrize(("model", "layout"), [case for case in CASES if case[0].startswith("maxvit")], ids=str)
def test_tables_of_maxvit_show_the_windows(model, layout, given, shown):
    found = recognise(built(model, layout, **given), "maxvit_tiny_tf_512.pth")
    if layout == "torchvision" and any(isinstance(size, tuple) for size in given.values()):
        shown = {}  # its tables are flat
    # variants for other sizes fit but for their windows; the name has nothing to decide
    assert (found.model, found.by_name, found.arguments(model)) == (model, False, shown)
    assert found.exact == (shown == {"img_size": 224}) and "differ only" not in found.message


@pytest.mark.parametrize(
    ("model", "given", "said", "shown"),
    [
        ("gcvit_l_512", {"img_size": 256}, "gcvit_l", {"img_size": 256}),
        ("maxvit_t_384", {"feature_norms": True}, "maxvit_t_384", {"img_size": 384}),
        # which do not show for which images
        ("gcvit_l", {"window_size": 24}, None, {"window_size": 24}),
        ("maxvit_t", {"window_size": 8, "grid_size": (3, 4)}, None, {"window_size": 8, "grid_size": (3, 4)}),
    ],
    ids=str,
)
def test_windows_tell_variants_for_other_images_apart(model, given, said, shown):
    """The one that is for these, else the first of the family; any of them, named, is built with the file's."""
    found = recognise(built(model, "zoo", **given))
    assert (found.model, found.exact) == (said, False) and len(found.candidates) == 3
    assert all(found.arguments(name) == shown for name, _ in found.candidates)
    models = [said] if said else [name for name, _ in found.candidates]
    assert found.message.startswith(f"{' or '.join(models)} in layout 'zoo' (with other windows")
    assert ("name the model" in found.message) == (said is None)


# model, how it is built -> what its shapes show of that, for each model that they fit
WINDOW = {"window_size": 9}
SHOWN = [
    ("nat_m", {}, {"nat_m": {}, "dinat_m": {}}),
    ("nat_m", WINDOW, {"nat_m": WINDOW, "dinat_m": WINDOW}),
    ("dinats_t", {"window_size": 5, "in_chans": 4}, {"dinats_t": {"window_size": 5, "in_chans": 4}}),
    ("dinat_l_384_k11", {}, {"dinat_l_384_k11": {}}),
    ("dinat_l", WINDOW, dict.fromkeys(("dinat_l", "dinat_l_384", "dinat_l_384_k11"), WINDOW)),
    ("vitrpb_s", {"img_size": (384, 320)}, {"vitrpb_s": {"img_size": (384, 320)}}),  # no neighborhood has such windows
    ("vitrpb_s", {"img_size": 384}, {"vitrpb_s": {"img_size": 384}}),
    ("vitrpb_s", {"img_size": 144}, {"nat_iso_s": WINDOW, "dinat_iso_s": WINDOW, "vitrpb_s": {"img_size": 144}}),
    ("sgformer_s", {"img_size": 448}, {"sgformer_s": {"img_size": 448}}),
    ("sgformer_s", {"img_size": (112, 456)}, {"sgformer_s": {}}),  # of no square image
    ("gcvit_xxt", {"in_chans": 1}, {"gcvit_xxt": {"in_chans": 1, "img_size": 224}}),
]


@pytest.mark.parametrize(("model", "given", "shown"), SHOWN, ids=str)
def test_shapes_show_windows_images_and_channels(model, given, shown):
    found = recognise(built(model, "zoo", **given))
    assert {name: found.arguments(name) for name, _ in found.candidates} == shown
    assert found.model == (model if len(shown) == 1 else None)


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ({}, {"img_size": 224}),
        ({"window_size": 24}, {"window_size": 24}),
        ({"window_size": (7, 7, 14, 7)}, {"img_size": 224}),
        ({"window_size": (12, 12, 24, 12)}, {"window_size": [12, 12, 24, 12]}),  # of no classifier for 384 pixels
    ],
    ids=str,
)
def test_windows_of_detectors(given, shown):
    model = heads.detector("gcvit_xxt", 3, head="retinanet", channels=16, **given).eval()
    found = recognise_dense(model.layouts()[0].to_theirs(model.state_dict()))
    assert found.backbone.model == "gcvit_xxt" and found.arguments("gcvit_xxt") == shown
    assert not found.backbone.missing_args("gcvit_xxt")
    again = heads.detector("gcvit_xxt", 3, head=found.head, **found.options, **shown).eval()
    again.load_state_dict(model.state_dict())
    images = torch.randn(1, 3, 128, 160)
    with torch.no_grad():
        for got, want in zip(again.backbone(images), model.backbone(images), strict=True):
            torch.testing.assert_close(got, want)


def test_norms_on_features_are_of_the_detection_code():
    """Of a backbone alone too, under our names: what it was given made the third stage's queries."""
    for norms, shown in ((False, {"img_size": 384}), (True, {"window_size": [12, 12, 24, 12]})):
        args = variants()["gcvit_xxt"] | {"window_size": (12, 12, 24, 12), "feature_norms": norms, "num_classes": 0}
        with torch.device("meta"):
            state = class_of("gcvit_xxt")(**args).state_dict()
        assert recognise(state).arguments("gcvit_xxt") == shown


WITHOUT_TABLES = {"window_size": 24, "rel_pos_bias": False}
CALL = re.escape("timm.create_model('gcvit_xxt', num_classes=3, rel_pos_bias=False, window_size=...)")
NOT_TAKEN = f", which .* does not take. In Python, {CALL} takes"


@pytest.mark.parametrize(
    ("build", "how"),
    [
        (export.build, NOT_TAKEN),
        (lambda path: export.build(path, features=[1]), NOT_TAKEN),
        (lambda path: show.source.build(None, path, None), ", with model=gcvit_xxt"),
        (lambda path: show.source.build("gcvit_xxt", path, (64, 64)), ", with model=gcvit_xxt"),
    ],
    ids=["export", "maps", "show", "show named"],
)
def test_commands_build_no_windows_that_they_do_not_know(build, how, tmp_path):
    path = tmp_path / "bare.pth"
    torch.save(timm.create_model("gcvit_xxt", num_classes=3, **WITHOUT_TABLES).state_dict(), path)
    with pytest.raises(zoo.CheckpointError, match=re.escape(UNSAID) + how):
        build(str(path))


def test_dense_models_of_windows_that_are_not_known(tmp_path):
    path = tmp_path / "fcn.pth"
    model = segmenter("gcvit_xxt", 3, head="fcn", channels=8, auxiliary=False, **WITHOUT_TABLES)
    state = model.layouts()[0].to_theirs(model.state_dict())
    torch.save(state, path)
    found = recognise_dense(state)
    assert found.arguments("gcvit_xxt") == {"rel_pos_bias": False}
    assert found.backbone.missing_args("gcvit_xxt") == ["window_size"]
    call = "zoo.heads.segmenter('gcvit_xxt', num_classes=3, head='fcn', channels=8, auxiliary=False, rel_pos_bias="
    with pytest.raises(zoo.CheckpointError, match=f"{re.escape(UNSAID)}, .* In Python, {re.escape(call)}"):
        export.build(str(path))
    with pytest.raises(zoo.CheckpointError, match=re.escape(UNSAID)):
        show.source.build(None, str(path), None)


def test_tables_that_show_no_windows():
    """Others in a stage than beside them, or of no window's sides."""
    state = state_of("gcvit_xxt", "zoo")
    for sides in ((47, 47), (0, 0), (12, 13)):
        state["stages.1.blocks.1.attn.fn.rpb"] = torch.empty(4, *sides)
        assert recognise(state).arguments("gcvit_xxt") == {}
        state["stages.1.blocks.0.attn.fn.rpb"] = torch.empty(4, *sides)
        assert recognise(state).arguments("gcvit_xxt") == ({} if 47 not in sides else {"window_size": [7, 24, 14, 7]})
        state["stages.1.blocks.0.attn.fn.rpb"] = torch.empty(4, 13, 13)
    del state["stages.1.blocks.1.attn.fn.rpb"]
    assert recognise(state).candidates == ()


@pytest.mark.parametrize("build", [export.build, lambda path: show.source.build(None, path, None)[0]])
def test_a_headless_file_is_built_with_its_windows(build, tmp_path):
    args = variants()["gcvit_xxt"] | {"window_size": 24, "num_classes": 0}
    torch.save(class_of("gcvit_xxt")(**args).state_dict(), tmp_path / "backbone.pth")
    assert [stage.query.window for stage in build(str(tmp_path / "backbone.pth")).stages] == [(24, 24)] * 4


def detector(model):
    state = {key: torch.zeros(value.shape, dtype=value.dtype) for key, value in state_of(model).items()}
    parts = {
        "neck.conv.weight": torch.zeros(1),
        "bbox_head.fc.weight": torch.zeros(1),
        "bbox_head.fc.bias": torch.zeros(1),
    }
    return prefixed(prefixed(state, "backbone.") | parts, "module.")


def test_a_part(tmp_path):
    """A detector's backbone is read where it is asked for, and the rest reported."""
    path, model = tmp_path / "detector.pth", class_of("gcvit_xxt")(**variants()["gcvit_xxt"])
    torch.save({"state_dict": detector("gcvit_xxt")}, path)
    with pytest.raises(
        zoo.CheckpointError, match=r"'backbone' is gcvit_xxt .*part='backbone' reads it without bbox_head, neck"
    ):
        load_checkpoint(model, path)
    report = load_checkpoint(model, path, part="backbone")
    assert report.left_out == {"neck": 1, "bbox_head": 2} and "left out: neck (1 tensors)" in report.message
    assert model.stem.conv1.weight.abs().sum() == 0
    with pytest.raises(zoo.CheckpointError, match=r"has no part 'trunk', only backbone, neck, bbox_head"):
        load_checkpoint(model, path, part="trunk")


def test_the_backbone_of_a_segmenter(tmp_path):
    """Its head is no part of it: BatchNorms and all are new."""
    path, args = tmp_path / "segmenter.pth", SMALL["biformer_t"]
    source = segmenter("biformer_t", 3, head="fcn", channels=8, auxiliary=False, **args)
    torch.save(source.state_dict(), path)
    model = timm.create_model("biformer_t", num_classes=3, **args)
    report = load_checkpoint(model, path, part="backbone")
    assert report.left_out.keys() == {"decode_head", "feature_norms"} and "head.before.norm.weight" in report.new
    assert torch.equal(model.stem.conv1.weight, source.backbone.model.stem.conv1.weight)


def test_features_of_an_existing_model(tmp_path):
    path, x, source = tmp_path / "weights.pth", torch.randn(1, 3, 64, 64), trained(small(NAME))
    torch.save(timm_state(source), path)
    expected = source.forward_intermediates(x, intermediates_only=True)
    for inner in (False, True):
        net = small(NAME, features_only=True, out_indices=(1, 2)).eval()
        report = load_checkpoint(net.model if inner else net, path)
        assert report.left_out["head"] == 6 and report.left_out.keys() == {"stages.3", "head"}
        assert "left out: stages.3 (" in report.message and not report.head_remade and not report.new
        assert all(torch.equal(got, want) for got, want in zip(net(x), expected[1:3], strict=True))


def test_norms_on_features(tmp_path, caplog):
    """Some levels' have none in the file, or none in the model; half of one is damage."""
    path, state = tmp_path / "dense.pth", weights_of(trained(small(NAME, features_only=True, feature_norms=True).model))
    torch.save(state, path)
    report = load_checkpoint(small(NAME), path)
    assert report.left_out == {"feature_norms": 8} and report.head_remade
    headless = small(NAME, num_classes=0, pretrained=True, pretrained_cfg_overlay={"file": str(path)})
    assert torch.equal(headless.stem.conv1.weight, state["stem.conv1.weight"])
    assert (
        "newly initialised: head.after.norm.weight" in caplog.text
        and "left out: feature_norms (8 tensors)" in caplog.text
    )
    torch.save(without(state, "feature_norms.0."), path)
    report = load_checkpoint(small(NAME, features_only=True, feature_norms=True), path)
    assert report.new == ["feature_norms.0.weight", "feature_norms.0.bias"] and report.new[0] in report.message
    torch.save(without(state, "feature_norms.0.bias"), path)
    refused(path, r"1 missing: feature_norms\.0\.bias", small(NAME, features_only=True, feature_norms=True))


def test_a_part_of_nothing():
    checkpoint = Checkpoint("w.pth", {"raw": {"a.b": torch.zeros(1)}})
    assert part_of(checkpoint, None) == (checkpoint, {})


@pytest.mark.parametrize(
    "release",
    [
        pytest.param(r, marks=() if r.model in MODELS else pytest.mark.slow, id=f"{r.model}.{r.tag}")
        for r in RELEASES
        if r.loadable
    ],
)
def test_released_layouts_convert(release):
    """The layout that a row names exists, holds all of the model, and is what a file in it is recognised as."""
    state = state_of(release.model, release.layout)
    assert (release.model, release.layout) in recognise(state).candidates
