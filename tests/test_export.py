"""Script, trace, compile and export: what each of them gives is what the model gives, by the same rankings.

Exported files say how images are prepared for them, and what comes out.
"""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform, resolve_data_config

import recipes.export
import zoo
from builds import every_small, since_sizes, small, trained
from children import SMALL as DIGITS
from children import train_here
from families import SMALL
from pages import ROOT, blocks
from rankings import Ranked, ranking, rankings
from zoo import export
from zoo.export import program
from zoo.exportable import build
from zoo.exported import about, name_classes
from zoo.heads import segmenter
from zoo.heads.segmenter import HEADS

# compilers take their time: the first variant of a class in every run, the others with the slow tests
one_fast = pytest.mark.parametrize(
    "name", [name if name == "maxvit_t" else pytest.param(name, marks=pytest.mark.slow) for name in SMALL]
)


def with_rankings(ranked, x):
    return x, rankings(ranked.model, x)


def any_batch(inputs):
    """Dynamic shapes of an image and rankings."""
    batch = {0: torch.export.Dim("batch", max=64)}
    return batch, [batch] * len(inputs[1])


@every_small
def test_torchscript(name):
    model = trained(small(name, scriptable=True))
    x, scripted = torch.randn(2, 3, 64, 96), torch.jit.script(model)
    torch.testing.assert_close(scripted(x), model(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert scripted(x).isfinite().all()


@one_fast
def test_full_graph(name):
    model = Ranked(trained(small(name)))
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    inputs = with_rankings(model, torch.randn(2, 3, 97, 33))
    logits = compiled(*inputs)
    torch.testing.assert_close(logits, model(*inputs), rtol=1e-4, atol=1e-5)
    logits.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@one_fast
def test_export_with_any_batch(name):
    model = Ranked(trained(small(name)))
    inputs = with_rankings(model, torch.randn(2, 3, 64, 64))
    program = torch.export.export(model, inputs, dynamic_shapes=any_batch(inputs))
    for count in (1, 5):
        inputs = with_rankings(model, torch.randn(count, 3, 64, 64))
        torch.testing.assert_close(program.module()(*inputs), model(*inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@every_small
def test_compiled_ahead_of_time(name, tmp_path):
    """A program for any number of images becomes a library."""
    model = Ranked(trained(small(name)))
    inputs = with_rankings(model, torch.randn(2, 3, 64, 96))
    program = torch.export.export(model, inputs, dynamic_shapes=any_batch(inputs))
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    compiled = torch._inductor.aoti_load_package(package)
    for count in (2, 3):
        inputs = with_rankings(model, torch.randn(count, 3, 64, 96))
        torch.testing.assert_close(compiled(*inputs), model(*inputs), rtol=1e-4, atol=1e-5)


@one_fast
def test_onnx(name, tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    model = Ranked(trained(small(name)))
    inputs = with_rankings(model, torch.randn(2, 3, 64, 64))
    path = tmp_path / "model.onnx"
    torch.onnx.export(
        model,
        inputs,
        path,
        opset_version=18,
        dynamo=True,
        dynamic_shapes=any_batch(inputs),
        verbose=False,
    )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for count in (2, 3):
        x, orders = inputs = with_rankings(model, torch.randn(count, 3, 64, 64))
        names = [node.name for node in session.get_inputs()]
        (logits,) = session.run(None, dict(zip(names, [t.numpy() for t in (x, *orders)], strict=True)))
        torch.testing.assert_close(torch.from_numpy(logits), model(*inputs).detach(), rtol=1e-4, atol=1e-4)


def in_their_order(*args):
    """What ranks nearly alike may be swapped by rounding: here it stands as it lies, tokens or regions."""
    if len(args) == 1:  # tokens (B, H, W)
        return torch.arange(args[0].shape[1] * args[0].shape[2]).expand(args[0].shape[0], 2, -1)
    q, _, (rows, cols), topk = args
    return torch.arange(topk).expand(q.shape[0], rows * cols, -1)


@since_sizes
@one_fast
def test_export_with_any_size(name):
    """Sizes that the program was not made with: the least, of odd sides, of whole and of single windows."""
    model = trained(small(name))
    if name == "biformer_stl_nchw":
        with pytest.raises(ValueError, match="depends on the size of the image: no single program serves all sizes"):
            program(model, torch.randn(2, 3, 64, 96), any_size=True)
        return
    with ranking(model, in_their_order):
        made = program(model, torch.randn(2, 3, 64, 96), dynamic=True, any_size=True).module()
        for size in ((3, 3, 64, 64), (1, 3, 97, 70), (2, 3, 224, 224), (1, 3, 120, 640)):
            x = torch.randn(*size)
            torch.testing.assert_close(made(x), model(x), rtol=1e-4, atol=1e-5)


@since_sizes
@pytest.mark.parametrize("head", [HEADS[0], *(pytest.param(head, marks=pytest.mark.slow) for head in HEADS[1:])])
def test_segmenters_with_any_size(head):
    """In float64, since a logit may be next to nothing."""
    model = trained(segmenter(small("stvit_b", features_only=True), 5, head=head, channels=16)).double()
    made = program(model, torch.randn(2, 3, 64, 96).double(), dynamic=True, any_size=True).module()
    for size in ((3, 3, 64, 64), (1, 3, 97, 70), (2, 3, 224, 224), (1, 3, 120, 640)):
        x = torch.randn(*size).double()
        torch.testing.assert_close(made(x), model(x))


def test_export_with_any_size_has_a_least_torch(monkeypatch):
    monkeypatch.setattr("zoo.export.SIZES_SINCE", "99.0")
    with pytest.raises(ValueError, match=r"torch is .*: programs for any size need 99\.0"):
        program(small("davit_t"), torch.randn(2, 3, 64, 96), any_size=True)


@since_sizes
def test_positions_of_a_program_for_any_size():
    """As many tokens as the table has entries read it in order, whatever their sides; all others a resized one."""
    model = trained(small("sgformer_b", img_size=(64, 96))).stem.position
    tokens = {1: torch.export.Dim("h"), 2: torch.export.Dim("w")}
    made = torch.export.export(model, (torch.randn(2, 8, 9, 32),), dynamic_shapes=(tokens,)).module()
    for side in ((16, 24), (12, 32), (24, 16), (16, 23), (7, 5)):
        x = torch.randn(2, *side, 32)
        torch.testing.assert_close(made(x), model(x), rtol=0, atol=1e-6)


@pytest.mark.slow
@every_small
def test_compiled(name):
    """The default compiler, forward and backward."""
    model = Ranked(trained(small(name)))
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True)
    inputs = with_rankings(model, torch.randn(2, 3, 64, 64))
    torch.testing.assert_close(compiled(*inputs), model(*inputs), rtol=1e-3, atol=1e-4)
    compiled(*inputs).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def said_in(path):
    """What an exported file says."""
    if path.suffix == ".pt2":
        found = {"config.json": ""}
        torch.export.load(path, extra_files=found)
        return json.loads(found["config.json"])
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return json.loads(session.get_modelmeta().custom_metadata_map["config.json"])


@pytest.mark.parametrize("any_size", [False, pytest.param(True, marks=since_sizes)])
def test_sizes_that_vary_have_names(any_size, tmp_path):
    """In inputs and outputs, and in the shapes that follow from them."""
    pytest.importorskip("onnxscript")
    onnx = pytest.importorskip("onnx")
    model = timm.create_model("test_resnet", features_only=True, out_indices=(1,)).eval()
    export.export(model, torch.zeros(2, 3, 64, 96), tmp_path / "x.onnx", dynamic=True, any_size=any_size)
    graph = onnx.load(tmp_path / "x.onnx").graph

    def sides(value):
        return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]

    varying = ["height", "width"] if any_size else []
    assert sides(graph.input[0]) == ["batch", 3, *(varying or [64, 96])]
    batch, _, *others = sides(graph.output[0])
    assert batch == "batch" and all(name in str(side) for name, side in zip(varying, others, strict=False))
    words = {word for v in graph.value_info for side in sides(v) for word in re.findall(r"[a-z_]\w*", str(side))}
    assert words == {"batch", *varying}


@pytest.mark.parametrize("name", ["litv2_s", "sgformer_b"])
def test_onnx_has_no_loops(name, tmp_path):
    """What ONNX has no operator for is computed by others, not converted to a loop over positions."""
    pytest.importorskip("onnxscript")
    onnx = pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    model, image = trained(small(name)), torch.rand(2, 3, 64, 64)
    export.export(model, image, str(tmp_path / "x.onnx"))  # a path may be text
    assert not {"Loop", "If", "Scan"} & {node.op_type for node in onnx.load(tmp_path / "x.onnx").graph.node}
    session = onnxruntime.InferenceSession(tmp_path / "x.onnx", providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"image": image.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), model(image).detach(), rtol=1e-3, atol=1e-3)


def test_a_classifier_says_how_to_use_it():
    image = torch.zeros(1, 3, 64, 96)
    model = timm.create_model("gcvit_xxt.nvidia_in1k", depths=(1, 1, 1, 1))
    said = about(model, image)
    assert said["architecture"] == "gcvit_xxt" and said["input_size"] == [3, 64, 96]
    wanted = resolve_data_config({"input_size": [3, 64, 96]}, model=model) | {"input_size": [3, 64, 96]}
    assert {key: said[key] for key in wanted} == wanted
    assert said["license"] == "cc-by-nc-sa-4.0" and said["versions"]["timm"] == timm.__version__
    assert said["num_classes"] == len(said["label_names"]) == 1000 and said["label_names"][0] == "n01440764"
    assert said["label_descriptions"]["n01440764"] == "tench, Tinca tinca" and said["outputs"] == [{"name": "logits"}]
    for other in (small("gcvit_s", num_classes=1000), small("gcvit_s")):  # nothing is known of random weights
        assert not {"label_names", "license"} & about(other, image).keys()
    plain = about(torch.nn.Conv2d(3, 5, 1), image)
    assert plain.keys() == {"input_size", "outputs", "versions"}


def test_maps_say_what_they_are():
    image = torch.zeros(1, 1, 64, 64)
    said = about(small("stvit_b", features_only=True, out_indices=(1, 3), in_chans=1), image)
    assert [output["name"] for output in said["outputs"]] == ["features1", "features3"]
    assert [(output["reduction"], output["layout"]) for output in said["outputs"]] == [(8, "NCHW"), (32, "NCHW")]
    assert said["input_size"] == [1, 64, 64] and len(said["mean"]) == 1 and "num_classes" not in said
    model = segmenter(small("stvit_b", features_only=True), 3, channels=16)
    name_classes(model, ["sky", "sea", "land"])
    said = about(model, image)
    assert said["outputs"] == [{"name": "logits", "channels": 3, "reduction": 1, "layout": "NCHW"}]
    assert said["label_names"] == ["sky", "sea", "land"] and said["architecture"] == "stvit_b"
    assert len(said["mean"]) == len(said["std"]) == 3 and "crop_pct" not in said
    with pytest.raises(ValueError, match="2 names are given, and the model has 3 classes: give one each"):
        name_classes(model, ["sky", "sea"])


def test_a_file_says_which_release_it_is(tmp_path, capsys):
    """By its name or that of its source, or by its tensors; others have no licence, and no names of classes."""
    image = torch.zeros(1, 3, 224, 224)

    def said(path):
        return about(export.build(str(path)), image), capsys.readouterr().out

    model = timm.create_model("gcvit_xxt")
    torch.save(zoo.checkpoint.layouts_of(type(model))[0].to_theirs(model.state_dict()), tmp_path / "mine.pth")
    found, printed = said(tmp_path / "mine.pth")
    assert len(found["label_names"]) == 1000 and "license" not in found and found["crop_pct"] == 1.0
    assert "is exported as gcvit_xxt.nvidia_in1k, judging by its tensors" in printed
    (tmp_path / "mine.pth").rename(tmp_path / "gcvit_1k_xxtiny.pth.tar")
    found, printed = said(tmp_path / "gcvit_1k_xxtiny.pth.tar")
    assert found["license"] == "cc-by-nc-sa-4.0" and "is exported as gcvit_xxt.nvidia_in1k\n" in printed
    about_it = {"model": "gcvit_xxt", "source": "gcvit_1k_xxtiny.pth.tar"}
    save_file(model.state_dict(), tmp_path / "converted.safetensors", metadata=about_it)
    assert said(tmp_path / "converted.safetensors")[0] == found
    save_file(model.state_dict(), tmp_path / "own.safetensors")
    found, printed = said(tmp_path / "own.safetensors")
    assert not {"license", "label_names"} & found.keys() and "matches no known release" in printed
    model = segmenter("litv2_s", 7, head="semantic_fpn", channels=16)
    torch.save(model.layouts()[0].to_theirs(model.state_dict()), tmp_path / "litv2_s_fpn_r50_512x512_80k_ade20k.pth")
    found, printed = said(tmp_path / "litv2_s_fpn_r50_512x512_80k_ade20k.pth")
    assert found["license"] == "apache-2.0" and found["num_classes"] == 7 and "label_names" not in found
    assert found["mean"] == (0.485, 0.456, 0.406) and "matches no known release" not in printed


def test_labels_are_given(tmp_path, monkeypatch, capsys):
    model = small("davit_t", depths=(1, 1, 1, 1))
    folder, labels, out = zoo.save_for_hf(model, tmp_path / "shared"), tmp_path / "labels.txt", tmp_path / "x.pt2"
    given = [str(folder), str(out), "--size", "64", "64", "--labels", str(labels)]
    assert export.main(given) == 2 and "could not read --labels" in capsys.readouterr().err
    labels.write_text("cat\n")
    assert export.main(given) == 2 and "1 names are given, and the model has 7 classes" in capsys.readouterr().err
    names = ["cat", "dog", "Bär", "owl", "elk", "emu", "eel"]
    labels.write_text("\n".join(names) + "\n", encoding="utf-8")
    assert export.main(given) == 0
    printed = capsys.readouterr().out
    assert (
        printed.startswith("exporting davit_t for 1 x 3 x 64 x 64 ...\n") and "gives the classes names" not in printed
    )
    assert said_in(out)["label_names"] == names
    monkeypatch.setattr(export, "export", lambda model, image, out, **options: out.write_bytes(b""))
    monkeypatch.setattr(export, "reader", lambda path: None)
    assert export.main([*given[:-2], "--force"]) == 0
    assert "num_classes, license, outputs, versions; --labels FILE gives the classes names" in capsys.readouterr().out


def test_a_run_says_how_its_images_are_prepared(tmp_path):
    given = ["data.std=[0.2,0.3,0.4]", "data.workers=0", "train.steps=1", "train.ema=null"]
    train_here(tmp_path, *DIGITS, *given, "name=run")
    assert recipes.export.main([str(tmp_path / "run"), str(tmp_path / "x.pt2")]) == 0
    said = said_in(tmp_path / "x.pt2")
    assert said["label_names"] == list("0123456789") and said["std"] == [0.2, 0.3, 0.4]
    assert said["input_size"] == [3, 32, 32] and "license" not in said
    assert said["notes"] == ["It started from random weights."]
    weights = next((tmp_path / "run").rglob("*.safetensors"))
    with pytest.raises(zoo.CheckpointError, match=rf"of a run: python -m recipes.export {tmp_path / 'run'} OUT"):
        build(str(weights))
    folder = zoo.save_for_hf(recipes.export.build(tmp_path / "run"), tmp_path / "shared")
    assert json.loads((folder / "config.json").read_text())["label_names"] == list("0123456789")
    cfg = timm.create_model(f"local-dir:{folder}", pretrained=True).pretrained_cfg
    assert list(cfg["label_names"]) == list("0123456789") and tuple(cfg["std"]) == (0.2, 0.3, 0.4)


def test_what_tensors_do_not_show_is_read_beside_them(tmp_path):
    """No tensor of DaViT shows its windows."""
    model = trained(small("davit_t", window_size=5))
    folder, x = zoo.save_for_hf(model, tmp_path / "shared"), torch.randn(1, 3, 64, 96)
    assert torch.equal(build(str(folder / "model.safetensors"))(x), model(x))


def test_the_page_on_weights_names_a_picture(tmp_path, monkeypatch, capsys):
    """Its sample prepares an image as timm does, and prints the class that the model finds."""
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = trained(timm.create_model("test_resnet", num_classes=7))
    name_classes(model, list("abcdefg"))
    export.export(model, torch.zeros(1, 3, 160, 160), Path("maxvit_t.onnx"))
    pixels = np.random.default_rng(0).integers(0, 256, (12, 20, 3), np.uint8)
    image = Image.fromarray(pixels).resize((300, 180), Image.Resampling.BICUBIC)
    image.save("cat.jpg")
    seen, run = [], onnxruntime.InferenceSession.run
    monkeypatch.setattr(onnxruntime.InferenceSession, "run", lambda *a: seen.append(a[2]["image"]) or run(*a))
    (sample,) = [block for block in blocks(ROOT / "docs" / "weights.md") if "custom_metadata_map" in block.text]
    exec(compile(sample.text, sample.page, "exec"), {})
    want = create_transform(**resolve_data_config(model=model))(Image.open("cat.jpg"))[None]
    assert np.abs(seen[0] - want.numpy()).max() < 1e-5
    assert capsys.readouterr().out == "abcdefg"[int(model(want).argmax())] + "\n"
