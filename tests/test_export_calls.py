"""`zoo.export.export` as a function: what is written is what the model computes when it is evaluated, or an error."""

import json

import numpy as np
import pytest
import timm
import torch
from torch import nn

import zoo
from builds import small, trained
from zoo import export
from zoo.exported import ABOUT, about


def written(model, image, path):
    """What the file of a model gives for an image."""
    export.export(model, image, path)
    found = export.reader(path)(image)
    return found[0] if isinstance(found, list) else found


@pytest.mark.parametrize("sides", [(64, 64), (64, 128)])
def test_onnx_where_a_cell_has_as_many_rows_as_there_are_cells(tmp_path, sides):
    """STViT's tokens are then of a shape that ONNX could broadcast otherwise."""
    pytest.importorskip("onnxruntime")
    model, image = trained(small("stvit_b")), torch.randn(1, 3, *sides)
    exact = model(image).detach()
    torch.testing.assert_close(written(model, image, tmp_path / "x.onnx"), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_a_model_in_training_mode_is_refused(tmp_path, suffix):
    with pytest.raises(ValueError, match=r"^MaxViT is in training mode: call model\.eval\(\) first$"):
        export.export(small("maxvit_t"), torch.zeros(1, 3, 64, 64), tmp_path / f"x{suffix}")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["x.foo", "x.PT2", "x"])
def test_other_endings_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match=r"expected a name that ends in \.onnx or \.pt2"):
        export.export(small("davit_t").eval(), torch.zeros(1, 3, 64, 64), tmp_path / name)


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel])
def test_wrapped_models_are_what_they_wrap(tmp_path, wrap):
    model, image = trained(small("davit_t")), torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(written(wrap(model), image, tmp_path / "x.pt2"), model(image))
    said = {ABOUT: ""}
    torch.export.load(tmp_path / "x.pt2", extra_files=said)
    assert json.loads(said[ABOUT])["architecture"] == "davit_t"
    zoo.save_for_hf(wrap(model), tmp_path / "shared")
    again = timm.create_model(f"local-dir:{tmp_path / 'shared'}", pretrained=True).eval()
    torch.testing.assert_close(again(image), model(image))


def test_models_without_a_classifier_give_features():
    image = torch.zeros(1, 3, 64, 64)
    pooled, unpooled, cut = (
        small("davit_t", num_classes=0),
        small("davit_t", num_classes=0, global_pool=""),
        small("dinat_b"),
    )
    cut.prune_intermediate_layers([1])
    found = [about(model, image)["outputs"] for model in (pooled, unpooled, cut)]
    width = pooled(image).shape[1]
    assert found[0] == [{"name": "features", "channels": width}]
    assert found[1] == [{"name": "features", "channels": width, "reduction": 32, "layout": "NCHW"}]
    channels, *sides = cut(image).shape[1:]
    assert found[2] == [{"name": "features", "channels": channels, "reduction": 8, "layout": "NCHW"}]
    assert np.array_equal(sides, [8, 8])


def test_any_number_of_images():
    model = small("davit_t").eval()
    made = export.program(model, torch.randn(2, 3, 32, 32), dynamic=True).module()
    images = torch.randn(1, 3, 32, 32).expand(5000, -1, -1, -1)
    torch.testing.assert_close(made(images)[-1], model(images[:1])[0], rtol=1e-4, atol=1e-5)


def test_sizes_that_a_model_does_not_take(tmp_path, capsys):
    out = str(tmp_path / "x.pt2")
    assert export.main(["vit_tiny_patch16_224", out, "--size", "64", "64"]) == 2
    assert "vit_tiny_patch16_224 takes no images of 64 x 64: " in capsys.readouterr().err


def test_programs_that_refuse_a_size_and_that_torch_cannot_save(tmp_path, monkeypatch, capsys):
    """Where torch found a condition that it checks when the program runs, and an operator of no format."""

    def refused(image):
        raise RuntimeError("Runtime assertion failed\nwith a trace")

    monkeypatch.setattr(export, "reader", lambda path: refused)
    model, out = small("davit_t").eval(), tmp_path / "x.pt2"
    assert export.report(model, out, [(1, 3, 64, 96)], 1e-4) == 1
    assert f"{out} refuses images of 64 x 96: Runtime assertion failed\n" in capsys.readouterr().err

    class SerializeError(RuntimeError):
        pass

    def unsaved(*args, **kwargs):
        raise SerializeError("op ceil is not in _SYM_OPS\nmore")

    monkeypatch.setattr(export, "export", unsaved)
    assert export.main(["test_resnet", str(out), "--size", "64", "64"]) == 2
    said = capsys.readouterr().err
    assert "torch.export cannot save test_resnet: op ceil is not in _SYM_OPS; export to a name that ends in" in said
