"""`python -m zoo.convert` and `zoo.inspect`, as their users meet them, and what `zoo.export` takes."""

import argparse
import json
import os
import pathlib
import stat

import numpy as np
import pytest
import timm
import torch
import torch.distributed.checkpoint as dcp
import torchvision
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import golden
import hostile
import zoo
import zoo.show.command
from builds import small, state_of
from children import files_up_to
from families import RECORDS
from zoo import export, fetch, inspect, show
from zoo.convert import command
from zoo.files import save_tensors
from zoo.heads import detector, segmenter

GCVIT = "gc_vit_xxtiny_224x224"


def official(stem, dtype=torch.float32):
    return golden.official_state_dict(golden.load(golden.FOLDER / f"{stem}.json"), dtype)


def learned(stem):
    return [key for key, _, kind in golden.load(golden.FOLDER / f"{stem}.json")["entries"] if kind == "value"]


@pytest.fixture
def released(tmp_path):
    """A file as GC ViT's authors released it, with what training programs keep beside the weights."""
    path = tmp_path / "gcvit_1k_xxtiny.pth.tar"
    beside = {"epoch": 299, "arch": "gc_vit_xxtiny", "metric": np.float64(79.9), "history": np.arange(3.0)}
    beside["args"] = argparse.Namespace(lr=0.1, output=pathlib.PurePosixPath("/runs/one"), size=(224, 224))
    beside["optimizer"] = {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 0.1}]}
    torch.save({"state_dict": official(GCVIT), **beside}, path)
    return path


# one of every kind of layout; `test_laws` of test_convert.py has all
FAST = {GCVIT, "torchvision_maxvit_t_224x224", "stvit_small_224x224", "timm_davit_tiny_224x224", "vitrpb_small_224x224"}


@pytest.mark.parametrize("stem", sorted(FAST))
def test_there_and_back(stem, tmp_path, capsys):
    """Every learned tensor comes back bit for bit; what holds no knowledge comes back with its shape and type."""
    state, source, layout = official(stem), tmp_path / "released.pth", layout_of(stem)
    torch.save({"model": {f"module.{key}": value for key, value in state.items()}}, source)
    ours, back = tmp_path / "ours.safetensors", tmp_path / "back.pth"
    model = ["--model", RECORDS[stem]]
    assert command.main([str(source), str(ours), *model]) == 0
    assert command.main([str(ours), str(back), "--to", layout, "--wrapper", "model", *model]) == 0
    assert f"layout 'zoo' -> '{layout}'" in capsys.readouterr().out
    found = torch.load(back, weights_only=True)["model"]
    assert {k: (v.shape, v.dtype) for k, v in found.items()} == {k: (v.shape, v.dtype) for k, v in state.items()}
    assert all(torch.equal(found[key], state[key]) for key in learned(stem))


@pytest.mark.parametrize("ending", [".pth", ".pth.tar", ".pt", ".bin", ".ckpt", ".pkl"])
def test_names_of_files_that_torch_saves(released, tmp_path, ending):
    """Every name that is read is written, with a key around the weights where one is asked for."""
    out = tmp_path / f"back{ending}"
    assert command.main([str(released), str(out), "--to", "official", "--wrapper", "model"]) == 0
    found, state = torch.load(out, weights_only=True)["model"], official(GCVIT)
    assert found.keys() == state.keys() and all(torch.equal(found[key], state[key]) for key in learned(GCVIT))
    assert inspect.inspect(out)["model"] == "gcvit_xxt" and out in zoo.files.weights_in(tmp_path)


def test_the_newest_best_checkpoint_has_the_weights_of_a_run(tmp_path):
    """While a run replaces its best checkpoint, there are two."""
    files = [tmp_path / "checkpoints" / f"best-{step:08d}" / "ema.safetensors" for step in (4, 12)]
    for file in files:
        file.parent.mkdir(parents=True)
        file.touch()
    assert zoo.files.weights_in(tmp_path) == files[1:]


def layout_of(stem):
    return next((name for name in ("timm", "torchvision") if stem.startswith(name)), "official")


def test_index_tables_are_torchvisions():
    """Torchvision's own model keeps them: what is computed again is what stands there."""
    model = timm.create_model("maxvit_t_tv")
    layout = zoo.layouts.LAYOUTS["TorchvisionMaxViT"][0]
    theirs = torchvision.models.maxvit_t().state_dict()
    made = layout.to_theirs(model.state_dict(), constants=True)
    tables = [key for key in theirs if key.endswith("relative_position_index")]
    assert made.keys() == theirs.keys() and len(tables) == 22
    assert all(torch.equal(made[key], theirs[key]) for key in tables)


def test_windows_that_are_not_square(tmp_path, capsys):
    source, out = tmp_path / "w.safetensors", tmp_path / "w.pth"
    save_file(state_of(timm.create_model("gcvit_xxt", img_size=(256, 320))), source)
    assert command.main([str(source), str(out), "--to", "official", "--model", "gcvit_xxt"]) == 2
    assert "is not for square windows" in capsys.readouterr().err and not out.exists()
    assert command.main([str(source), str(out), "--to", "timm", "--model", "gcvit_xxt"]) == 0


def test_metadata(released, tmp_path):
    out = tmp_path / "ours.safetensors"
    assert command.main([str(released), str(out)]) == 0
    with safe_open(out, framework="pt") as file:
        said = file.metadata()
    assert said.pop("source_sha256") == zoo.files.sha256(released)
    wanted = {"format": "pt", "model": "gcvit_xxt", "layout": "zoo", "weights": "raw", "source": released.name}
    assert said == wanted | {"release": "gcvit_xxt.nvidia_in1k", "license": "cc-by-nc-sa-4.0"}


def test_release_and_licence_of_a_converted_file(released, tmp_path, monkeypatch):
    """The command says what may not be used commercially; a file that was converted twice still says what it is."""
    once, twice = tmp_path / "once.safetensors", tmp_path / "twice.safetensors"
    for source, out in ((released, once), (once, twice)):
        monkeypatch.setattr(fetch, "_warned", set())
        with pytest.warns(zoo.LicenceWarning, match="gcvit_xxt.nvidia_in1k"):
            assert command.main([str(source), str(out)]) == 0
        assert inspect.inspect(out)["release"] == "gcvit_xxt.nvidia_in1k (NVIDIA), converted"
    digest = {"source_sha256": "bc5ab103" + "0" * 56, "source": "maxvit_t-bc5ab103.pth"}
    assert inspect.release(once, digest, [], "").endswith("converted from the same SHA-256")
    other = tmp_path / "gcvit_1k_tiny.pth"
    torch.save(official("timm_davit_tiny_224x224"), other)
    assert command.main([str(other), str(twice), "--force"]) == 0
    assert inspect.inspect(twice)["release"] is None and "license" not in inspect.inspect(twice)["meta"]
    tuned = tmp_path / "gcvit_1k_xxtiny.pth.tar"
    torch.save(timm.create_model("gcvit_xxt", num_classes=10).state_dict(), tuned)
    assert command.main([str(tuned), str(once), "--force"]) == 0
    assert not {"release", "license"} & inspect.inspect(once)["meta"].keys()


def test_the_only_part_of_a_file(tmp_path, capsys):
    source, out = tmp_path / "net.pth", tmp_path / "out.safetensors"
    torch.save({"model_state": {f"net.{key}": value for key, value in official(GCVIT).items()}, "epoch": 3}, source)
    said = inspect.inspect(source)
    assert (said["model"], said["layout"], said["prefix"]) == ("gcvit_xxt", "official", "net.")
    assert command.main([str(source), str(out)]) == 0
    said = f"{source}, part 'net': gcvit_xxt, raw weights under 'model_state', layout 'official' -> 'zoo'"
    assert capsys.readouterr().out.splitlines()[0] == said
    assert inspect.inspect(out)["model"] == "gcvit_xxt"


def test_metadata_tells_models_apart(tmp_path):
    """A converted file says which of the models it is that no weights tell apart."""
    source, out = tmp_path / "weights.pth", tmp_path / "ours.safetensors"
    torch.save(official("dinat_mini_160x192"), source)
    assert zoo.recognise(zoo.read(source).entries["raw"]).model is None
    assert command.main([str(source), str(out), "--model", "dinat_m"]) == 0
    assert inspect.inspect(out)["model"] == "dinat_m"
    assert command.main([str(source), str(out), "--force"]) == 0
    assert inspect.inspect(out)["models"] == ["nat_m", "dinat_m"]


def test_models_of_several_classes(tmp_path, capsys):
    """Both STL models are written alike in the zoo's layout, but not in their authors'."""
    source, out = tmp_path / "weights.safetensors", tmp_path / "out.pth"
    save_file(timm.create_model("biformer_stl").state_dict(), source)
    assert command.main([str(source), str(out), "--to", "official"]) == 2
    assert "biformer_stl or biformer_stl_nchw" in capsys.readouterr().err
    assert command.main([str(source), str(out), "--to", "official", "--model", "biformer_stl_nchw"]) == 0


def test_raw_and_averaged(tmp_path):
    source, out, state = tmp_path / "both.pth", tmp_path / "out.safetensors", official(GCVIT)
    torch.save({"state_dict": state, "state_dict_ema": {k: v + 1 for k, v in state.items()}}, source)
    for weights, added in (("raw", 0), ("ema", 1)):
        assert command.main([str(source), str(out), "--to", "official", "--weights", weights, "--force"]) == 0
        assert torch.equal(load_file(out)["norm.weight"], state["norm.weight"] + added)


def test_part_of_a_detector(tmp_path, capsys):
    source, out = tmp_path / "detector.pth", tmp_path / "out.safetensors"
    state = {f"backbone.{key}": value for key, value in official(GCVIT).items()} | {"neck.weight": torch.zeros(2)}
    torch.save({"state_dict": state, "meta": {"CLASSES": ("cat", "dog")}}, source)
    assert command.main([str(source), str(out)]) == 2
    assert "'backbone' is gcvit_xxt" in (said := capsys.readouterr().err) and "--part backbone extracts it" in said
    assert command.main([str(source), str(out), "--part", "backbone"]) == 0
    assert "left out: neck" in capsys.readouterr().out
    assert "gcvit_xxt" in inspect.inspect(source)["part"]


def test_a_name_tells_what_a_part_is(tmp_path):
    """As it does for other commands."""
    state = {f"backbone.{key}": value for key, value in official("nat_mini_224x224").items()}
    for name, said in (("nat_mini_mask_rcnn", "nat_m by its name"), ("best", "name the model")):
        torch.save(state | {"neck.weight": torch.zeros(2)}, tmp_path / f"{name}.pth")
        assert inspect.inspect(tmp_path / f"{name}.pth")["part"].endswith(said)


@pytest.mark.parametrize(
    ("name", "build", "says", "classes"),
    [
        ("upernet_dinat_mini", segmenter, "upernet on dinat_m", 150),
        ("nat_mini_maskrcnn", detector, "mask_rcnn on nat_m", 80),
        ("best", segmenter, "upernet on nat_m or dinat_m", 2),
        ("one", detector, "mask_rcnn on nat_m or dinat_m", 1),
    ],
)
def test_whole_models_for_dense_prediction(tmp_path, monkeypatch, capsys, name, build, says, classes):
    """Head, backbone as far as tensors and names show it, and classes; of one in the zoo's names that it is one."""
    with torch.device("meta"):
        made = build("nat_m", classes, head="upernet" if build is segmenter else "mask_rcnn", channels=16)
    state = {key: torch.zeros(value.shape, dtype=value.dtype) for key, value in made.state_dict().items()}
    path, own = tmp_path / f"{name}.pth", tmp_path / "ema.safetensors"
    torch.save({"state_dict": made.layouts()[0].to_theirs(state)}, path)
    save_file(state, own)
    said, found = inspect.inspect(path), inspect.inspect(own)
    assert said["summary"] == f"{says}, {classes} class{'es' * (classes > 1)}" and said["classes"] == classes
    assert said["part"].startswith("backbone: nat_m or dinat_m in layout 'official'") and "closest" not in said
    assert found["summary"] == f"a {build.__name__} in the zoo's names"
    assert found["task"] == said["task"] == ("segment" if build is segmenter else "detect")
    assert found["part"].startswith("backbone: nat_m or dinat_m in layout 'zoo'")
    monkeypatch.setenv("COLUMNS", "200")
    assert inspect.main([str(tmp_path)]) == 0
    table = capsys.readouterr().out
    assert said["summary"] in table and found["summary"] in table and "not in the zoo" not in table


def test_nothing_is_overwritten(released, tmp_path, capsys):
    out = tmp_path / "out.pth"
    out.write_text("mine")
    assert command.main([str(released), str(out)]) == 2
    assert "already exists" in capsys.readouterr().err and out.read_text() == "mine"
    assert command.main([str(released), str(out), "--force"]) == 0
    assert len(list(tmp_path.iterdir())) == 2
    (tmp_path / "link.pth").symlink_to("nowhere")
    assert command.main([str(released), str(tmp_path / "link.pth"), "--force"]) == 2
    assert "already exists" in capsys.readouterr().err and (tmp_path / "link.pth").is_symlink()


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_who_may_read_a_file_is_for_the_umask_to_say(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        save_tensors({"weight": torch.ones(2)}, tmp_path / "one.safetensors", {"a": "b"})
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "one.safetensors").stat().st_mode) == mode


@pytest.mark.parametrize("name", ["out.pth", "out.safetensors"])
def test_a_full_disk(released, tmp_path, capsys, name):
    with files_up_to(1000):
        assert command.main([str(released), str(tmp_path / name)]) == 2
    assert f"could not write {tmp_path / name}: " in (said := capsys.readouterr().err) and "File too large" in said
    assert list(tmp_path.iterdir()) == [released]


def test_a_full_disk_under_a_program_and_a_picture(tmp_path, capsys):
    """torch's own writer of programs would end the process."""
    picture = tmp_path / "nat_m-neighborhoods.png"
    picture.write_bytes(b"of before")
    drawn = ["model=nat_m", "img_size=64", "only=neighborhoods", f"out={tmp_path}"]
    for main, given, file in (
        (export.main, ["test_resnet", str(tmp_path / "out.pt2")], tmp_path / "out.pt2"),
        (show.command.main, drawn, picture),
    ):
        with files_up_to(1000):
            assert main(given) == 2
        assert f"could not write {file}: [Errno 27] File too large" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [picture] and picture.read_bytes() == b"of before"


def test_what_convert_does_not_do(released, tmp_path, capsys):
    out = str(tmp_path / "out.pth")
    assert command.main([str(released), out, "--to", "torchvision"]) == 2
    assert "GCViT has no layout 'torchvision', only official, timm, zoo" in capsys.readouterr().err
    torch.save(timm.create_model("test_vit").state_dict(), tmp_path / "vit.pth")
    assert command.main([str(tmp_path / "vit.pth"), out]) == 2
    assert "not a model of the zoo" in capsys.readouterr().err
    assert command.main([str(tmp_path / "vit.pth"), out, "--model", "davit_t"]) == 2
    assert "no name for cls_token" in capsys.readouterr().err
    endings = "its name must end in .pth, .pt, .tar, .bin, .safetensors, .ckpt or .pkl"
    for wrong, said in (
        (["b.onnx"], f"OUT is b.onnx: {endings}"),
        (["b.pth", "--model", "x"], "no model is called x"),
        (["b.safetensors", "--wrapper", "model"], "--wrapper is for .pth and the like"),
    ):
        with pytest.raises(SystemExit):
            command.parse(["a", *wrong])
        assert said in capsys.readouterr().err


def test_what_is_in_a_file(released):
    said = inspect.inspect(released, keys=True)
    assert said["meta"]["epoch"] == 299 and said["meta"]["metric"] == 79.9
    assert said["meta"]["args"] == {"lr": 0.1, "output": "/runs/one", "size": [224, 224]}
    assert said["meta"]["history"] == "<numpy.ndarray>" and "optimizer" not in said["meta"]
    assert (said["format"], said["weights"], said["prefix"]) == ("zip", {"raw": "state_dict"}, "")
    assert (said["model"], said["layout"], said["classes"]) == ("gcvit_xxt", "official", 1000)
    assert said["parameters"] == 11_995_428 and said["dtypes"] == {"float32": 226, "int64": 12}
    assert said["release"] == "gcvit_xxt.nvidia_in1k (NVIDIA)"
    assert said["keys"]["raw"]["norm.weight"] == "float32 [512]"
    assert "missing" not in said and json.loads(json.dumps(said)) == said


def test_releases_are_known_by_name_and_digest(tmp_path):
    path = tmp_path / "maxvit_t-bc5ab103.pth"
    torch.save({"a": torch.zeros(1)}, path)
    assert inspect.release(path, {}, [], "bc5ab103" + "0" * 56).endswith("the same SHA-256")
    assert inspect.inspect(path)["release"].endswith("DIFFERENT SHA-256")


def test_what_differs(tmp_path):
    path, state = tmp_path / "file.pth", official(GCVIT)
    del state["norm.weight"]
    state["head.weight"] = torch.zeros(5, 512)
    state["levels.0.blocks.0.mlp.fc1.bias"] = torch.zeros(3)
    torch.save({"model_ema": {"module": {f"module.{k}": v for k, v in state.items()}}}, path)
    said = inspect.inspect(path)
    assert said["weights"] == {"ema": "model_ema.module"} and said["prefix"] == "module."
    assert (said["closest"], said["models"], said["model"]) == ("gcvit_xxt", [], None)
    assert said["missing"] == ["head.before.weight"] and said["left_over"] == []
    assert said["of_another_shape"] == ["stages.0.blocks.0.mlp.fn.fc1.bias"]


def test_tables(released, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "page.pth").write_bytes(hostile.PAGE)
    (tmp_path / "._page.pth").write_bytes(b"macOS leaves these")
    assert inspect.main([str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert "._page" not in said and "gcvit_xxt" in said and "cannot be read" in said and "Virus" in said
    parts = {f"backbone.{key}": value for key, value in official(GCVIT).items()} | {"neck.weight": torch.zeros(1)}
    torch.save({"state_dict": parts}, tmp_path / "detector.pth")
    assert inspect.main([str(released), str(tmp_path / "detector.pth")]) == 0
    assert "backbone: gcvit_xxt in layout" in capsys.readouterr().out
    assert inspect.main([str(released), "--keys"]) == 0
    said = capsys.readouterr().out
    assert "11,995,428" in said and "epoch: 299" in said and "norm.weight" in said
    assert inspect.main([str(released), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["model"] == "gcvit_xxt"
    monkeypatch.setenv("COLUMNS", "80")
    inspect.show([found])
    assert found["sha256"] in capsys.readouterr().out  # in one line, to be copied
    monkeypatch.delenv("COLUMNS")
    inspect.show([found, {**found, "file": "a" * 40, "models": [], "model": "b" * 30}])
    assert "b" * 30 in capsys.readouterr().out  # not written to a screen
    for name in ("one", "other"):
        zoo.save_for_hf(small("davit_t", depths=(1, 1, 1, 1)), tmp_path / name)
    assert inspect.main([str(tmp_path / "one"), str(tmp_path / "other")]) == 0
    said = capsys.readouterr().out.replace("\n", "")
    assert "one/model.safetensors" in said and "other/model.safetensors" in said
    (tmp_path / "none").mkdir()
    assert inspect.main([str(tmp_path / "none")]) == 1
    assert "no weights file" in capsys.readouterr().err


def test_what_processes_shared_out_is_no_file_of_weights(tmp_path, capsys):
    """The command that is given makes one, which has the names and both kinds of weights."""
    state = small("davit_t", depths=(1, 1, 1, 1)).state_dict()
    folder = tmp_path / "step-1" / "sharded"
    dcp.save({"model": state, "ema": state, "optimizer": {"param_groups": [{"lr": 0.5}]}}, checkpoint_id=folder)
    command = f"python -m torch.distributed.checkpoint.format_utils dcp_to_torch {folder} weights.pth"
    for path, what in (
        (folder.parent, "is a sharded checkpoint"),
        (folder, "is a sharded checkpoint"),
        (folder / "__0_0.distcp", "is a part of a sharded checkpoint"),
    ):
        assert inspect.main([str(path), "--json"]) == 1
        (said,) = json.loads(capsys.readouterr().out)
        why = (
            f"{what} (torch.distributed.checkpoint), not a weights file: {command} converts it to one, if you trust it"
        )
        assert said["error"] == f"{path} {why}"
    dcp_to_torch_save(folder, tmp_path / "weights.pth")
    found = inspect.inspect(tmp_path / "weights.pth")
    assert found["weights"] == {"raw": "model", "ema": "ema"} and found["tensors"] == len(state)


def test_what_is_exported(released, tmp_path, capsys):
    """A file's model with its weights and classes; a name's."""
    model = export.build(str(released))
    assert model.pretrained_cfg["architecture"] == "gcvit_xxt" and not model.training
    assert torch.equal(model.head.before.weight, official(GCVIT)["norm.weight"])
    assert export.build("davit_t").pretrained_cfg["architecture"] == "davit_t"
    torch.save(timm.create_model("gcvit_xxt", img_size=256).state_dict(), tmp_path / "larger.pth")
    assert export.build(str(tmp_path / "larger.pth")).img_size == (256, 256)
    assert "larger.pth matches no known release" in capsys.readouterr().out
    state = official("dinat_mini_160x192") | {"head.weight": torch.zeros(7, 512), "head.bias": torch.zeros(7)}
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(zoo.CheckpointError, match=r"nat_m or dinat_m .* Give --model"):
        export.build(str(tmp_path / "weights.pth"))
    assert export.build(str(tmp_path / "weights.pth"), model="dinat_m").num_classes == 7
    inside = {f"net.{key}": value for key, value in state.items()}
    torch.save(inside, tmp_path / "net.ckpt")
    assert export.build(str(tmp_path / "net.ckpt"), model="dinat_m").num_classes == 7
    torch.save({**inside, "loss.weight": torch.zeros(2)}, tmp_path / "net.ckpt")
    with pytest.raises(
        zoo.CheckpointError,
        match=r"part 'net' is nat_m or dinat_m.*: name the model\. The command .*zoo\.convert .* --part net extracts",
    ):
        export.build(str(tmp_path / "net.ckpt"))
    assert export.main(["no_such_model", str(tmp_path / "x.pt2")]) == 2
    assert "neither a file, nor a folder, nor a model" in capsys.readouterr().err
    assert export.main([str(tmp_path), str(tmp_path / "x.pt2")]) == 2
    assert "a folder without config.json" in capsys.readouterr().err
    (tmp_path / "config.yaml").write_text("model:\n")
    assert export.main([str(tmp_path), str(tmp_path / "x.pt2")]) == 2
    assert f"the folder of a run: python -m recipes.export {tmp_path} OUT exports its model" in capsys.readouterr().err
    torch.save(
        {f"{name}.weight": torch.zeros(2) for name in ("backbone.x", "decode_head.classifier")}, tmp_path / "own.pth"
    )
    with pytest.raises(
        zoo.CheckpointError, match=r"own\.pth is a segmenter in the zoo's names.*recipes\.export RUN OUT"
    ):
        export.build(str(tmp_path / "own.pth"))
    assert export.main(["davit_t.safetensors", str(tmp_path / "x.pt2")]) == 2
    assert "neither a file, nor a folder, nor a pretrained tag of davit_t" in capsys.readouterr().err
    for given in (["--weights", "ema"], ["--model", "nat_m"]):
        assert export.main(["test_resnet", str(tmp_path / "out.onnx"), *given]) == 2
        assert "test_resnet says itself what it is: --model and --weights" in capsys.readouterr().err
    assert export.main(["test_vit", str(tmp_path / "out.onnx"), "--any-size"]) == 2
    assert "takes no images of 201 x 181, so leave out --any-size: Input height" in capsys.readouterr().err
    assert not (tmp_path / "out.onnx").exists()
    for wrong, said in (
        (["a", "b.pth"], "OUT is b.pth: its name must end in .onnx or .pt2"),
        (["a", "b\udcff.onnx"], r"OUT is 'b\udcff.onnx': expected a path in UTF-8"),
        (["a", "\udcff/b.pt2"], r"OUT is '\udcff/b.pt2': expected a path in UTF-8"),
        (["a", "b.pt2", "--model", "x"], "no model is called x: expected one of biformer_t, "),
        (["a", "b.pt2", "--size", "8", "8"], "--size [8, 8]: expected at least 32 pixels a side"),
    ):
        with pytest.raises(SystemExit, match="2"):
            export.parse(wrong)
        assert said in capsys.readouterr().err
