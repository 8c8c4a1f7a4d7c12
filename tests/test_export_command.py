"""`zoo.export` in Python and as a command: what is written, for which sizes, and how far it is from the model."""

import importlib

import pytest
import timm
import torch
from timm.models._input import get_model_input_config

import zoo
from builds import every_small, since_sizes, small, trained
from children import closed
from rankings import ranks
from zoo import export
from zoo.heads import detector, segmenter


@pytest.fixture
def shared(tmp_path):
    model = trained(small("davit_t", depths=(1, 1, 1, 1)))
    return model, zoo.save_for_hf(model, tmp_path / "shared")


def test_export_program(shared, tmp_path, capsys):
    model, folder = shared
    out = tmp_path / "model.pt2"
    assert export.main([str(folder), str(out), "--size", "64", "96", "--dynamic"]) == 0
    said = capsys.readouterr().out
    assert "any number of images x 3 x 64 x 96" in said and "random images, 64 x 96: differs by" in said
    assert "smooth images, 64 x 96: differs by" in said and "agree on 100%" in said
    x = torch.randn(5, 3, 64, 96)
    torch.testing.assert_close(torch.export.load(out).module()(x), model(x), rtol=1e-4, atol=1e-5)


def test_files_say_the_channels_of_images(tmp_path, capsys):
    """Such a file is no release, also under the name of one."""
    file = tmp_path / "maxvit_t-bc5ab103.pth"
    torch.save(timm.create_model("maxvit_t_tv", in_chans=1).state_dict(), file)
    assert export.build(str(file)).in_chans == 1
    assert "matches no known release" in capsys.readouterr().out


@since_sizes
def test_features_for_any_size(tmp_path, monkeypatch, capsys):
    folder = zoo.save_for_hf(trained(small("stvit_b", depths=(1, 1, 1, 1))), tmp_path / "shared")
    out = tmp_path / "maps.pt2"
    given = ["--features", "1", "3", "--size", "64", "96", "--dynamic", "--any-size"]
    assert export.main([str(folder), str(out), *given]) == 0
    said = capsys.readouterr().out
    assert "for any number of images x 3 x any height x width" in said and "agree" not in said
    for size in ("64 x 96", "81 x 109", "64 x 64"):
        assert f"smooth images, {size}: differs by" in said
    x, made = torch.randn(1, 3, 70, 130), torch.export.load(out).module()
    model = timm.create_model(f"local-dir:{folder}", pretrained=True, features_only=True, out_indices=(1, 3)).eval()
    # attention to the super tokens rounds otherwise in training, and where a CPU multiplies that of few keys itself
    monkeypatch.setattr(importlib.import_module("ops.pooled_attention"), "divided", lambda *few: False)
    with torch.no_grad():
        torch.testing.assert_close(made(x), model(x), rtol=1e-4, atol=1e-5)
    assert export.names(model) == ["features1", "features3"]
    assert export.main([str(folder), str(tmp_path / "x.pt2"), "--features", "1", "9"]) == 2
    assert "has no features of stages [1, 9]: " in capsys.readouterr().err
    for stages in (["2", "1"], ["1", "1"], ["-1", "3"]):
        assert export.main([str(folder), str(tmp_path / "x.pt2"), "--features", *stages]) == 2
        assert "name each stage once, the finest first" in capsys.readouterr().err
    monkeypatch.setattr(export, "SIZES_SINCE", "99.0")
    assert export.main([str(folder), str(tmp_path / "x.pt2"), *given]) == 2
    assert "programs for any size need 99.0" in capsys.readouterr().err and not (tmp_path / "x.pt2").exists()
    with pytest.raises(SystemExit):
        export.parse([str(folder), str(out), "--size", "32", "96", "--any-size"])
    assert "with --any-size, expected at least 64 pixels a side" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        export.parse([str(folder), str(out), "--tolerance", "-1"])
    assert "--tolerance -1: expected a share from 0" in capsys.readouterr().err


def test_export_segmenter(tmp_path, capsys):
    """A released file: its backbone is built for segmentation, and its auxiliary head is left out."""
    torch.manual_seed(0)
    model = trained(segmenter("dinat_m", 7, channels=16, dilations="segmentation"))
    path, out = tmp_path / "upernet_dinat_mini.pth", tmp_path / "model.pt2"
    torch.save({"state_dict": model.layouts()[0].to_theirs(model.state_dict())}, path)
    built = export.build(str(path))
    assert "left out: auxiliary_head" in capsys.readouterr().out and built.auxiliary_head is None
    assert get_model_input_config(built)["input_size"] == (3, 512, 512) and export.names(built) == ["logits"]
    x = torch.randn(1, 3, 64, 96)
    assert not built.training and torch.equal(built(x), model(x))
    assert export.main([str(path), str(tmp_path / "maps.pt2"), "--features"]) == 2
    said = capsys.readouterr().err
    assert "is a segmenter, upernet on dinat_m, 7 classes, whose maps this command does not export. Its part" in said
    assert "Its part 'backbone' is" in said
    path.rename(tmp_path / "some.pth")
    assert export.main([str(tmp_path / "some.pth"), str(out), "--force"]) == 2
    assert "Give --model" in capsys.readouterr().err


def test_detectors_are_not_exported(tmp_path, capsys):
    """Nor are their maps, but their backbone can be extracted."""
    model, path = detector("nat_m", 80, head="mask_rcnn", channels=16), tmp_path / "nat_mini_maskrcnn.pth"
    states = {"detector, mask_rcnn on nat_m, 80 classes": model.layouts()[0].to_theirs(model.state_dict())}
    states["detector in the zoo's names"] = model.state_dict()
    for what, state in states.items():
        torch.save({"state_dict": state}, path)
        for more in ([], ["--features"], ["--model", "nat_m"]):
            assert export.main([str(path), str(tmp_path / "x.pt2"), *more]) == 2
            said = capsys.readouterr().err
            assert said.startswith(f"{path} is a {what}: detectors are not exported, as the number of boxes")
            assert "Its part 'backbone' is" in said and f"zoo.convert {path} OUT --part backbone extracts it" in said


def test_maps_are_compared():
    """Of logits of pixels it is the classes that agree or not, of features their numbers alone."""
    images = {"random": torch.randn(2, 3, 8, 8)}
    net = torch.nn.Conv2d(3, 5, 1)
    (found,) = export.compare(net, lambda x: net(x).flip(1), images)
    assert found.agreeing < 0.9 and found.relative > 0.1
    (found,) = export.compare(net, lambda x: [2 * net(x)], images)
    assert found.agreeing == 1 and found.relative == pytest.approx(1)


def test_weights_that_may_not_be_read(shared, tmp_path, capsys):
    folder, path = shared[1], tmp_path / "x.pth"
    torch.save(shared[0].state_dict(), path)
    for private, source, named in (
        (tmp_path, path, path), (path, path, path), (tmp_path, folder, folder),
        (folder, folder, folder / "config.yaml"), (folder / "config.json", folder, folder / "config.json"),
    ):  # fmt: skip
        with closed(private):
            assert export.main([str(source), str(tmp_path / "x.onnx")]) == 2
        assert f"{named} is not readable by this user (Permission denied)" in capsys.readouterr().err


def test_export_keeps_what_is_there(shared, tmp_path, monkeypatch, capsys):
    out = tmp_path / "model.pt2"
    out.write_text("mine")
    monkeypatch.setattr(export, "export", lambda model, image, out, **options: out.write_bytes(b"program"))
    assert export.main([str(shared[1]), str(out), "--size", "64", "64"]) == 2
    assert "already exists" in capsys.readouterr().err and out.read_text() == "mine"


@pytest.mark.slow
@pytest.mark.parametrize("suffix", export.SUFFIXES)
@every_small
def test_every_family_is_exported(name, suffix, tmp_path, capsys):
    """What ranks may answer otherwise where rounding swaps two that rank nearly alike."""
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    model = trained(small(name))
    folder, out = zoo.save_for_hf(model, tmp_path / "shared"), tmp_path / f"model{suffix}"
    status = export.main([str(folder), str(out), "--size", "64", "96", "--batch", "2", "--dynamic"])
    said = capsys.readouterr().out
    assert status == 0 or (ranks(model) and suffix == ".onnx"), said
    opset = ", opset 18" if suffix == ".onnx" else ""
    assert f"{out.stat().st_size:,} bytes{opset}, for any number of images x 3 x 64 x 96" in said
    assert said.count("of the largest logit; top classes agree on") == 2


def test_export_says_what_differs(shared, tmp_path, monkeypatch, capsys):
    out = tmp_path / "model.pt2"
    monkeypatch.setattr(export, "export", lambda model, image, out, **options: out.write_bytes(b"program"))
    monkeypatch.setattr(export, "reader", lambda path: lambda image: shared[0](image) + 1)
    assert export.main([str(shared[1]), str(out), "--size", "64", "64"]) == 1
    assert "over the tolerance of 0.0001 on random and smooth images" in capsys.readouterr().err and out.exists()
    monkeypatch.setattr(export, "reader", lambda path: lambda image: shared[0](image) * torch.nan)
    assert export.main([str(shared[1]), str(out), "--size", "64", "64", "--force"]) == 1


def test_export_without_a_runtime(shared, tmp_path, monkeypatch, capsys):
    found = export.find_spec
    monkeypatch.setattr(export, "find_spec", lambda name: None if name == "onnxruntime" else found(name))
    monkeypatch.setattr(export, "export", lambda model, image, out, **options: out.write_bytes(b"onnx"))
    assert export.main([str(shared[1]), str(tmp_path / "model.onnx")]) == 0
    assert "not compared with PyTorch: that needs onnxruntime (pip install" in capsys.readouterr().out
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        export.parse(["davit_t", "model.onnx"])
    assert "ONNX needs onnx and onnxscript: pip install" in capsys.readouterr().err
