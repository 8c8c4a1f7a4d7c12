"""Files of weights: what is recognised, what is refused, and that a refusal runs nothing and changes nothing."""

import argparse
import collections
import datetime
import os
import pickle
import sys

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

import zoo
from builds import NAME, refused, same, small, state_of, timm_state, trained, without
from families import SMALL
from zoo.checkpoint import layouts_of, load_checkpoint
from zoo.reader import read

WRAPPED = {
    "bare": lambda s: s,
    "model": lambda s: {"model": s, "epoch": 3, "args": argparse.Namespace(lr=0.1)},
    "state_dict": lambda s: {
        "state_dict": s,
        "metric": np.float64(81.5),
        "history": np.arange(3.0),
        "best": np.int64(2),
    },
    "records": lambda s: {
        "state_dict": s,
        "lr_scheduler": {"milestones": collections.Counter([8, 11, 11])},
        "losses": collections.defaultdict(list, train=[0.5, 0.25]),
        "seen": {"train", "val"},
        "time": datetime.datetime(2022, 3, 4),
        "took": datetime.timedelta(hours=3),
    },
    "prefixes": lambda s: {"model": {f"module.backbone.{k}": v for k, v in s.items()}},
    "compiled": lambda s: {f"_orig_mod.{k}": v for k, v in s.items()},
    "nested": lambda s: {"model_ema": {"module": s}},
}


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("layout", ["zoo", "timm"])
@pytest.mark.parametrize("wrap", WRAPPED)
def test_wrapped(tmp_path, source, wrap, layout, legacy):
    path = tmp_path / "weights.pth.tar"
    state = timm_state(source) if layout == "timm" else state_of(source)
    torch.save(WRAPPED[wrap](state), path, _use_new_zipfile_serialization=not legacy)
    model = small(NAME)
    report = load_checkpoint(model, path)
    assert same(model, state_of(source))
    assert (report.layout, report.head_remade, report.resized) == (layout, False, [])


def test_safetensors(tmp_path, source):
    path = tmp_path / "wrongly_named.pth"
    save_file(timm_state(source), path)
    model = small(NAME)
    load_checkpoint(model, path)
    assert same(model, state_of(source))


@pytest.mark.parametrize("begins", [b"\x80\x04", b"PK"])
def test_safetensors_that_begins_like_a_pickle_or_an_archive(tmp_path, begins):
    """The first bytes are the length of the header, whatever that is."""
    path, state = tmp_path / "model.safetensors", {"stem.conv1.weight": torch.randn(2)}
    save_file(state, path, {"note": "x" * 999})
    longer = int.from_bytes(begins, "little") - int.from_bytes(path.read_bytes()[:8], "little")
    save_file(state, path, {"note": "x" * (999 + longer)})
    assert path.read_bytes().startswith(begins)
    assert torch.equal(read(path).entries["raw"]["stem.conv1.weight"], state["stem.conv1.weight"])


def test_figures_that_are_tensors_too(tmp_path, source):
    """However many numbers of a training lie beside the weights, and beside an average."""
    path, figures = tmp_path / "weights.pth", {name: torch.tensor(3.0) for name in ("epoch", "loss", "best")}
    torch.save({"state_dict": timm_state(source), "ema": {"module": state_of(source), **figures}, **figures}, path)
    found = zoo.describe(path)
    assert found.places == {"raw": ("state_dict",), "ema": ("ema", "module")}
    model = small(NAME)
    load_checkpoint(model, path)
    assert same(model, state_of(source))
    torch.save({**state_of(source), "ema": state_of(source)}, path)
    assert zoo.describe(path).places == {"raw": ()}


def test_raw_and_averaged(tmp_path, source):
    path = tmp_path / "both.pth"
    other = trained(small(NAME, drop_rate=0.5))
    other.head.fc.bias.data += 1
    torch.save({"state_dict": state_of(source), "state_dict_ema": state_of(other)}, path)
    for weights, wanted in (("auto", source), ("raw", source), ("ema", other)):
        model = small(NAME)
        assert load_checkpoint(model, path, weights=weights).entry == ("ema" if weights == "ema" else "raw")
        assert same(model, state_of(wanted))
    torch.save({"state_dict": state_of(source)}, path)
    with pytest.raises(zoo.CheckpointError, match=r"no ema weights, only raw: choose other weights$"):
        load_checkpoint(small(NAME), path, weights="ema")
    with pytest.raises(ValueError, match="'auto', 'raw' or 'ema'"):
        load_checkpoint(small(NAME), path, weights="best")


@pytest.mark.parametrize(
    ("name", "layout", "entry", "warns"),
    [(NAME, "zoo", "raw", True), ("sgformer_b", "official", "ema", False), ("stvit_b", "official", "raw", False)],
)
def test_which_of_two_is_pretrained(tmp_path, caplog, name, layout, entry, warns):
    """A warning, as timm's checkpoint_path takes the average, unless the weights that are published decide."""
    path, model = tmp_path / "both.pth", trained(small(name))
    states = {"raw": state_of(model), "ema": state_of(trained(model))}
    (names,) = (known for known in layouts_of(type(model)) if known.name == layout)
    raw, averaged = (names.to_theirs(state) for state in states.values())
    caplog.set_level("INFO", "zoo")
    for file, taken in (({"state_dict": raw, "state_dict_ema": averaged}, entry), ({"state_dict": raw}, "raw")):
        torch.save(file, path)
        assert same(small(name, pretrained=True, pretrained_cfg_overlay={"file": str(path)}), states[taken])
        (said,) = (row for row in caplog.records if f"{path}: layout '{layout}', {taken} weights" in row.getMessage())
        assert said.levelname == ("WARNING" if warns and len(file) == 2 else "INFO")
        assert ("weights use zoo.load_checkpoint(model, file, weights=" in said.getMessage()) == (len(file) == 2)
        caplog.clear()


@pytest.mark.parametrize("name", ["model_state", "model_without_ddp", "parameters", "weight"])
def test_a_name_of_its_own_around_the_weights(tmp_path, source, name):
    """Whatever it is, if nothing else holds tensors by name; the moments of an optimiser, whatever its name, do not."""
    path, state = tmp_path / "weights.pth", state_of(source)
    optimizer = torch.optim.AdamW(source.parameters())
    for parameter in source.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    beside = {"optim": optimizer.state_dict(), "epoch": torch.tensor(3), "loss": torch.tensor(0.5), 7: {"lr": 0.1}}
    torch.save({name: {f"module.{key}": value for key, value in state.items()}, **beside}, path)
    model = small(NAME)
    assert load_checkpoint(model, path).message.endswith(f"raw weights under {name!r}") and same(model, state)
    overlay = {"file": str(path)}
    assert same(small(NAME, pretrained=True, pretrained_cfg_overlay=overlay), state)
    torch.save({name: {"module": state}, **beside}, path)
    assert zoo.describe(path).places == {"raw": (name, "module")}
    for other in (state, {"best": state}):
        torch.save({name: state, "other": other, **beside}, path)
        refused(path, rf"Tensors lie under {name}, other(\.best)?: save only those")


def test_one_word_before_every_name(tmp_path, caplog):
    path, source = tmp_path / "weights.pth", trained(timm.create_model("gcvit_xxt"))
    caplog.set_level("INFO", "zoo")
    layouts = zoo.layouts.LAYOUTS["GCViT"]
    state = layouts[1].to_theirs(source.state_dict())
    for prefix, part in (
        ("net", "net"),
        ("module.teacher.backbone", "teacher"),
        ("_forward_module", "_forward_module"),
    ):
        torch.save({f"{prefix}.{key}": value for key, value in state.items()}, path)
        model = timm.create_model("gcvit_xxt")
        report = load_checkpoint(model, path)
        assert report.message == f"{path}, part {part!r}: layout 'timm', raw weights" and not report.left_out
        assert same(model, source.state_dict())
    overlay = {"file": str(path)}
    model = timm.create_model("gcvit_xxt", pretrained=True, pretrained_cfg_overlay=overlay)
    assert same(model, source.state_dict()) and "part '_forward_module': layout 'timm'" in caplog.text
    # the model need not be a variant
    args = {"depths": (1, 1, 2, 1), "num_classes": 5}
    source = trained(timm.create_model("gcvit_xxt", **args))
    torch.save({f"net.{key}": value for key, value in source.state_dict().items()}, path)
    model = timm.create_model("gcvit_xxt", **args)
    assert "part 'net'" in load_checkpoint(model, path).message and same(model, source.state_dict())
    model = timm.create_model("gcvit_xxt", pretrained=True, pretrained_cfg_overlay=overlay, **args)
    assert same(model, source.state_dict())
    # names of another model are its own
    other = nn.Sequential(small(NAME))
    torch.save(other.state_dict(), path)
    assert load_checkpoint(other, path).layout == "as is"


def test_harmless_foreign_classes(tmp_path, source):
    """A configuration of a package that is not installed comes back as a plain mapping; nothing is imported."""
    path = tmp_path / "config.pth"
    module = type(sys)("yacs.config")
    module.CfgNode = type("CfgNode", (dict,), {"__module__": "yacs.config"})
    sys.modules |= {"yacs": type(sys)("yacs"), "yacs.config": module}
    try:
        node = module.CfgNode(MODEL=module.CfgNode(DEPTH=2))
        node.__dict__["frozen"] = True
        torch.save({"model": state_of(source), "config": node}, path)
    finally:
        del sys.modules["yacs"], sys.modules["yacs.config"]
    model = small(NAME)
    load_checkpoint(model, path)
    assert same(model, state_of(source))
    assert "yacs" not in sys.modules


def test_history_of_mmengine(tmp_path, source):
    """What its runs write beside the weights: buffers of figures, as instances that hold arrays."""
    path, module = tmp_path / "epoch_12.pth", type(sys)("mmengine.logging.history_buffer")
    module.HistoryBuffer = type("HistoryBuffer", (), {"__module__": module.__name__})
    buffer = module.HistoryBuffer()
    buffer.__dict__ = {"max_length": 1000, "_log_history": np.arange(3.0), "_count_history": np.arange(3)}
    packages = dict.fromkeys(("mmengine", "mmengine.logging"), type(sys)("mmengine")) | {module.__name__: module}
    sys.modules |= packages
    try:
        torch.save({"state_dict": state_of(source), "message_hub": {"train/loss": buffer}}, path)
    finally:
        for name in packages:
            del sys.modules[name]
    model = small(NAME)
    load_checkpoint(model, path)
    assert same(model, state_of(source))
    assert "mmengine" not in sys.modules


@pytest.mark.parametrize(("weights", "average"), [("auto", True), ("ema", True), ("raw", False)])
def test_the_average_of_mmengine_is_where_others_have_the_weights(tmp_path, source, weights, average):
    """And the weights where others have the average: its own programs evaluate `state_dict`."""
    state = state_of(source)
    other = {key: value + 1 for key, value in state.items()}
    beside = {"module." + key: value for key, value in other.items()} | {"steps": torch.tensor(9)}
    torch.save({"state_dict": state, "ema_state_dict": beside}, tmp_path / "epoch_3.pth")
    model = small(NAME)
    report = load_checkpoint(model, tmp_path / "epoch_3.pth", weights=weights)
    assert same(model, state if average else other) and report.entry == ("ema" if average else "raw")


def test_a_part_that_only_the_weights_have(tmp_path, source):
    """An average of another model beside them does not matter, unless it is asked for."""
    state = {f"backbone.{key}": value for key, value in state_of(source).items()} | {"neck.x": torch.zeros(2)}
    torch.save({"state_dict": state, "ema": {"student.x": torch.zeros(2)}}, tmp_path / "two.pth")
    model = small(NAME)
    assert load_checkpoint(model, tmp_path / "two.pth", part="backbone").left_out == {"neck": 1}
    assert same(model, state_of(source))
    with pytest.raises(zoo.CheckpointError, match="has no ema weights, only raw"):
        load_checkpoint(model, tmp_path / "two.pth", part="backbone", weights="ema")


@pytest.mark.parametrize("given", [{}, {"features_only": True}])
def test_the_model_keeps_no_second_copy_of_its_weights(tmp_path, source, given):
    path = tmp_path / "weights.pth"
    torch.save(state_of(source), path)
    model = small(NAME, pretrained=True, pretrained_cfg_overlay={"file": str(path)}, **given)
    assert model.pretrained_cfg["file"] == str(path)
    fresh = small(NAME, **given)
    assert len(pickle.dumps(model)) < 1.1 * len(pickle.dumps(fresh))


def test_a_compiled_model(tmp_path, source):
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    model = small(NAME)
    load_checkpoint(torch.compile(nn.DataParallel(model)), tmp_path / "weights.pth")
    assert same(model, source.state_dict())


def test_a_model_whose_blocks_are_compiled(tmp_path, source):
    """Its names go through `_orig_mod`: files of it fit other models, and files of others fit it."""
    plain, compiled = tmp_path / "plain.pth", tmp_path / "compiled.pth"
    torch.save(source.state_dict(), plain)
    model, other = small(NAME), small(NAME)
    for stage in model.stages:
        stage.blocks[-1] = torch.compile(stage.blocks[-1])
    wrapped = [stage.blocks[-1] for stage in model.stages]
    load_checkpoint(model, plain)
    assert [stage.blocks[-1] for stage in model.stages] == wrapped
    torch.save({"model": model.state_dict()}, compiled)
    assert any("._orig_mod." in name for name in model.state_dict())
    load_checkpoint(other, compiled)
    assert same(other, source.state_dict()) and zoo.identify(model.state_dict()) == zoo.identify(source.state_dict())


def test_a_model_without_memory(tmp_path, source):
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="the model is on the meta device, without memory for weights"):
        load_checkpoint(small(NAME, device="meta"), tmp_path / "weights.pth")


def test_own_names_need_no_other_way(source):
    for state in (without(state_of(source), "head.fc."), state_of(small(NAME, depths=(1, 1, 2, 2)))):
        with pytest.raises(RuntimeError, match=r"(Missing|Unexpected) key") as error:
            small(NAME).load_state_dict(without(state, "stem.conv1."))
        assert "pretrained_cfg_overlay" not in str(error.value)


def test_a_model_of_timm(tmp_path):
    path = tmp_path / "resnet.safetensors"
    source = trained(timm.create_model("test_resnet", num_classes=4))
    save_file(state_of(source), path)
    model = timm.create_model("test_resnet", num_classes=4)
    load_checkpoint(model, path)
    assert same(model, state_of(source))
    assert load_checkpoint(timm.create_model("test_resnet", num_classes=5), path).head_remade
    with pytest.raises(zoo.CheckpointError, match="in none of the layouts of this model"):
        load_checkpoint(small(NAME), path)


def test_what_timm_loads_as_it_stands(tmp_path, source):
    """`checkpoint_path` takes the zoo's names alone, and says what takes others."""
    args = {"num_classes": 7, **SMALL[NAME], "checkpoint_path": tmp_path / "weights.pth"}
    torch.save(state_of(source), args["checkpoint_path"])
    assert same(timm.create_model(NAME, **args), state_of(source))
    torch.save({"model": timm_state(source)}, args["checkpoint_path"])
    with pytest.raises(RuntimeError, match=r"Missing key.*\n.*\n.*pretrained_cfg_overlay=dict\(file=...\) to .*$"):
        timm.create_model(NAME, **args)
    with pytest.raises(RuntimeError, match=r"size mismatch for head\.fc\.weight") as error:
        source.load_state_dict(small(NAME, num_classes=3).state_dict())
    assert "pretrained_cfg_overlay" not in str(error.value)


def test_another_model(tmp_path):
    path = tmp_path / "mixed_up.pth"
    torch.save(timm.create_model("maxvit_t_tv").state_dict(), path)
    message = refused(path, "does not fit this MaxViT")
    assert "It holds maxvit_t_tv in layout 'zoo'" in message
    torch.save(timm.create_model("test_vit").state_dict(), path)
    refused(path, r"in none of the layouts of this model \(timm, zoo\).*no name for cls_token")
    torch.save(small(NAME, depths=(1, 1, 1, 1)).state_dict(), path)
    refused(path, r"missing: stages\.2\.blocks\.1")
    torch.save(small(NAME, depths=(1, 1, 2, 2)).state_dict(), path)
    refused(path, r"left over: stages\.3\.blocks\.1")
    torch.save(small(NAME, stem_dim=8).state_dict(), path)
    refused(path, r"of another shape: stem\.conv1\.weight \(8, 3, 3, 3\) instead of \(16, 3, 3, 3\)")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_parameters_under_any_name(tmp_path, source, suffix):
    """What asks for gradients, as `dict(model.named_parameters())` does; torch's format by the name of another."""
    path = tmp_path / f"weights{suffix}"
    torch.save({**state_of(source), **dict(source.named_parameters())}, path)
    model = small(NAME, pretrained=True, pretrained_cfg_overlay={"file": str(path)})
    assert same(model, state_of(source)) and all(p.is_leaf and p.requires_grad for p in model.parameters())
    model = small(NAME)
    load_checkpoint(model, path)
    assert same(model, state_of(source))


def test_values_that_are_no_weights(tmp_path, source):
    path, state = tmp_path / "weights.pth", state_of(source)
    torch.save({k: v.to(torch.int8) if v.dim() == 4 else v for k, v in state.items()}, path)
    refused(path, r"of integers: stem\.conv1\.weight int8")
    eighths = {k: v.to(torch.float8_e4m3fn) if v.dim() == 4 else v for k, v in state.items()}
    for save, file in ((torch.save, path), (save_file, tmp_path / "eighths.safetensors")):
        save(eighths, file)
        refused(file, r"\d+ of 8 bits: st.* float8_e4m3fn")
    counter = next(k for k in state if k.endswith("num_batches_tracked"))
    torch.save(state | {counter: torch.tensor(3.0).to(torch.float8_e4m3fn)}, path)
    refused(path, f"1 of 8 bits: {counter} float8_e4m3fn")
    state["stem.conv1.weight"][0, 0] = torch.nan
    state["head.fc.bias"][1] = torch.inf
    torch.save(state, path)
    refused(path, rf"NaN or infinity in 2 of {len(state)} tensors: stem\.conv1\.weight, head\.fc\.bias\. Its training")
    state = state_of(source)
    state["stem.conv1.weight"][0, 0] = 1e6
    torch.save(state, path)
    said = rf"too large for the types of this MaxViT in 1 of {len(state)} tensors: stem\.conv1\.weight float16\. Build"
    refused(path, said, small(NAME, dtype=torch.float16))
    with pytest.raises(zoo.CheckpointError, match=said):
        small(NAME, dtype=torch.float16, pretrained=True, pretrained_cfg_overlay={"file": str(path)})
    assert load_checkpoint(small(NAME, dtype=torch.bfloat16), path).message.endswith("raw weights")
    state = {f"net.{k}": v for k, v in timm.create_model("maxvit_t_tv").state_dict().items()}
    torch.save(state | {"neck.weight": torch.zeros(2)}, path)
    refused(
        path, r"reads it without neck\. For use in a command, python -m zoo\.convert IN OUT --part net extracts it\. "
    )


def test_unreadable(tmp_path):
    path = tmp_path / "broken.pth"
    refused(path, "does not exist")
    refused(tmp_path, "is a folder")
    path.write_bytes(b"")
    refused(path, "is empty")
    path.write_bytes(b"\x80\x02")
    refused(path, "too short")
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n")
    refused(path, "broken.pth")
    path.write_bytes(os.urandom(5000))
    refused(path, "broken.pth")
    torch.save([1, 2], path)
    refused(path, "holds no state dict.*found list")
    torch.save({"epoch": 3, "lr": 0.1}, path)
    refused(path, "expected tensors by name, found epoch, lr")


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_truncated(tmp_path, source, kind):
    path = tmp_path / "whole"
    if kind == "safetensors":
        save_file(state_of(source), path)
    else:
        torch.save(state_of(source), path, _use_new_zipfile_serialization=kind == "zip")
    whole = path.read_bytes()
    for part in (0.01, 0.5, 0.9, 0.999):
        path.write_bytes(whole[: int(part * len(whole))])
        refused(path, "whole")


def test_reading_restores_torch_settings(tmp_path, source):
    path = tmp_path / "settings.pth"
    torch.save(state_of(source), path)
    before = set(torch.serialization.get_safe_globals())  # torch keeps a set: its order is no promise
    read(path)
    assert set(torch.serialization.get_safe_globals()) == before


def test_a_folder(tmp_path, source):
    save_file(timm_state(source), tmp_path / "model.safetensors")
    overlay = {"file": str(tmp_path)}
    model = small(NAME, pretrained=True, pretrained_cfg_overlay=overlay)
    assert same(model, state_of(source))
    with pytest.raises(zoo.CheckpointError, match="has none of the files"):
        small(NAME, pretrained=True, pretrained_cfg_overlay={"file": str(tmp_path.parent)})


@pytest.mark.parametrize("name", ["model_best.pth.tar", "a.bin", "any.safetensors"])
def test_a_folder_with_one_file_under_another_name(tmp_path, source, name):
    """As timm opens it; of several files none is taken for the one that is meant."""
    shared = zoo.save_for_hf(source, tmp_path / "shared")
    (shared / "model.safetensors").unlink()
    if name.endswith(".safetensors"):
        save_file(source.state_dict(), shared / name)
    else:
        torch.save(source.state_dict(), shared / name)
    assert same(timm.create_model(f"local-dir:{shared}", pretrained=True), state_of(source))
    torch.save(source.state_dict(), shared / "other.pth")
    with pytest.raises(zoo.CheckpointError, match=rf"several others \({name}, other\.pth\): pass .*file="):
        timm.create_model(f"local-dir:{shared}", pretrained=True)
    overlay = {"file": str(shared / "other.pth")}
    assert same(timm.create_model(f"local-dir:{shared}", True, pretrained_cfg_overlay=overlay), state_of(source))
    torch.save(source.state_dict(), shared / "pytorch_model.bin")
    assert same(timm.create_model(f"local-dir:{shared}", pretrained=True), state_of(source))
