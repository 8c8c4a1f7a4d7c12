"""`python -m zoo.bench`: whole models beside their twins."""

import json
import time
from functools import partial

import pytest
import timm
import torch
from torch import nn

from zoo import bench
from zoo.bench_profile import by_module, kind
from zoo.registry import variants
from zoo.table import gflops, parameters


def test_ours_beside_timm(tmp_path, capsys):
    bench.main(["gcvit_xxt", "--batch", "1", "--repeats", "1", "--out", str(tmp_path)])
    assert "| gcvit_xxt | forward |" in capsys.readouterr().out
    numbers = json.loads((tmp_path / "models_cpu_inference.json").read_text())
    (row,) = numbers["rows"]
    assert set(row["images_a_second"]) == {"ours", "timm"} and all(share > 0 for share in row["share"].values())
    assert numbers["command"].startswith("python -m zoo.bench") and row["rate"] > 0
    assert "| gcvit_xxt | forward |" in (tmp_path / "models_cpu_inference.md").read_text()


def test_each_precision_has_a_file_of_its_own(tmp_path):
    command = ["stvit_s", "--batch", "1", "--repeats", "1", "--out", str(tmp_path)]
    bench.main(command)
    bench.main([*command, "--dtype", "bfloat16"])
    names = {path.stem for path in tmp_path.glob("*.json")}
    assert names == {"models_cpu_inference", "models_cpu_inference_bfloat16"}
    args = bench.parse([*command, "--train", "--compile", "--dtype", "float16"])
    assert bench.stem(args, "models") == "models_cpu_training_float16_compiled"


def test_training_counts_the_backward_too():
    args = bench.parse(["stvit_s", "--batch", "1", "--repeats", "1", "--train"])
    row = bench.measure("stvit_s", args)
    speed = row.images_a_second["ours"]
    assert row.mode == "forward+backward" and set(row.images_a_second) == {"ours"}
    assert row.share["ours"] == pytest.approx(3 * 2e9 * row.gflops * speed / row.rate)


class Layers(nn.Module):
    def __init__(self, count):
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(3, 3) for _ in range(count)))

    def forward(self, x):
        return self.layers(x)


def test_each_of_many_models_is_compiled(monkeypatch):
    """torch counts the graphs of a forward method, which all models of the zoo share, and compiles no more after 8."""
    monkeypatch.setattr(bench, "large_product", lambda *_: (lambda: None, 1.0))
    monkeypatch.setattr(bench, "gflops", lambda *_: 1.0)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    args = bench.parse(["davit_t", "--batch", "1", "--repeats", "1", "--compile"])
    for count in range(1, 10):
        monkeypatch.setattr(bench, "build", lambda *_, count=count: ({"ours": Layers(count)}, torch.ones(2, 3)))
        with torch._dynamo.config.patch(recompile_limit=8):  # timm's optimisers raise it
            bench.measure("davit_t", args)
        assert len(graphs) == count


def test_profile(tmp_path, capsys):
    bench.main(["stvit_s", "--batch", "1", "--profile", "--train", "--out", str(tmp_path)])
    text = (tmp_path / "profile_cpu_training.md").read_text()
    assert text in capsys.readouterr().out
    kinds, modules = (part for part in text.split("\n\n") if part.startswith("| ours"))
    assert "kind of operator, forward+backward" in kinds and "module, forward" in modules
    assert {"matmul", "convolution"} < names(kinds)
    assert {"Linear", "Conv2d, depthwise"} < names(modules)
    for part in (kinds, modules):
        assert sum(int(line.split("|")[2].strip(" %")) for line in rows(part)) == pytest.approx(100, abs=10)


def rows(part):
    return part.splitlines()[2:]


def names(part):
    return {line.split("|")[1].strip() for line in rows(part)}


def test_time_inside_a_module_is_not_that_of_its_parts():
    class Slow(torch.nn.Module):
        def forward(self, x):
            time.sleep(0.02)
            return x

    class Outer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.slow = Slow()

        def forward(self, x):
            return self.slow(self.slow(x))

    seconds = by_module(Outer(), torch.zeros(1))
    assert seconds["Slow"] >= 0.04 and seconds["Outer"] < 0.02


@pytest.mark.parametrize(
    ("operator", "expected"),
    [
        ("aten::addmm", "matmul"),
        ("aten::bmm", "matmul"),
        ("aten::mkldnn_convolution", "convolution"),
        ("aten::convolution_backward", "convolution"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", "attention"),
        ("aten::native_layer_norm", "norm"),
        ("aten::copy_", "copy"),
        ("aten::add_", "elementwise arithmetic"),
        ("aten::gelu_backward", "activation"),
        ("aten::_softmax", "softmax"),
        ("mkldnn::_linear_pointwise", "matmul"),
        ("torchvision::deform_conv2d", "convolution"),
        ("attention_backbones::window_attention", "attention"),
        ("aten::_to_copy", "copy"),
        ("aten::cat", "copy"),
        ("aten::scatter_add_", "gather, sort"),
        ("aten::cumsum", "pooling, sums"),
        ("aten::addcdiv_", "elementwise arithmetic"),
        ("aten::new_empty", "fill, allocate"),
        ("aten::normal_", "other"),
        ("aten::cummax", "other"),
        ("aten::upsample_bilinear2d", "other"),
        ("aten::unheard_of", "other"),
    ],
)
def test_kinds_of_operators(operator, expected):
    assert kind(operator) == expected


def test_a_model_of_timm_s_at_another_size(tmp_path, capsys):
    command = ["test_resnet", "gcvit_xxt", "maxvit_t_tv", "--size", "64", "96", "--batch", "1", "--repeats", "1"]
    bench.main([*command, "--out", str(tmp_path)])
    assert "batch 1, 64 x 96, float32" in capsys.readouterr().out
    numbers = json.loads((tmp_path / "models_cpu_inference_64x96.json").read_text())
    assert [set(row["images_a_second"]) for row in numbers["rows"]] == [{"timm"}, {"ours", "timm"}, {"ours"}]
    assert [row["gflops"] for row in numbers["rows"]] == [gflops(name, (64, 96)) for name in command[:3]]
    cells = [line.split(" | ") for line in bench.table([bench.Row(**row) for row in numbers["rows"]]).splitlines()[2:]]
    assert [len(row) for row in cells] == [10, 10, 10]
    assert [row[4] == "-" for row in cells] == [True, False, False]
    assert [row[6] for row in cells] == ["timm", "timm", "-"] and [row[9] == "- |" for row in cells] == [1, 0, 1]


@pytest.mark.parametrize(
    ("name", "sides", "why"),
    [
        ("maxvit_t", (250, 250), "timm's maxvit_t takes no images of 250 x 250: height (32) must be divisible"),
        ("gcvit_xxt", (40, 40), "timm's gcvit_xxt takes no images of 40 x 40: shape"),
        ("gcvit_xxt", (31, 31), "timm's gcvit_xxt takes no images of 31 x 31: division by zero"),
        ("maxvit_t_tv", (64, 64), "torchvision's maxvit_t_tv takes no images of 64 x 64: it is made for its own size"),
    ],
)
@pytest.mark.parametrize("train", [False, True])
def test_a_twin_that_does_not_take_the_size_is_left_out(name, sides, why, train, capsys):
    args = bench.parse([name, "--batch", "2", "--size", *map(str, sides), *["--train"] * train])
    models, images = bench.build(name, args)
    assert models.keys() == {"ours"} and models["ours"].training == train and images.shape == (2, 3, *sides)
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"left out: {why}")


def test_twins_at_a_size_that_both_take(capsys):
    models, _ = bench.build("gcvit_xxt", bench.parse(["gcvit_xxt", "--batch", "1", "--size", "64", "64", "--train"]))
    assert models.keys() == {"ours", "timm"} and all(model.training for model in models.values())
    assert not capsys.readouterr().err


@pytest.mark.parametrize(("name", "side"), [("crossvit_tiny_240", "64"), ("litv2_s", "24")])
def test_a_model_that_does_not_take_the_size(name, side, capsys):
    with pytest.raises(SystemExit) as stopped:
        bench.main([name, "--batch", "1", "--repeats", "1", "--size", side, side])
    assert stopped.value.code == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"error: {name} takes no images of {side} x {side}: ")


def test_too_few_values_for_batch_norms_in_training(capsys):
    with pytest.raises(SystemExit):
        bench.main(["stvit_s", "--batch", "1", "--repeats", "1", "--size", "32", "32", "--train"])
    assert "stvit_s takes no images of 32 x 32: Expected more than 1 value per channel" in capsys.readouterr().err


def test_memory_that_runs_out_is_no_refusal(monkeypatch):
    def exhausted(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(bench, "place", exhausted)
    with pytest.raises(torch.OutOfMemoryError):
        bench.build("test_resnet", bench.parse(["test_resnet", "--size", "64", "64"]))


def test_cost_at_a_size():
    """By hand: of a convolution its weights once for every pixel of its map, of attention its keys for every query."""
    at, twice = gflops("test_resnet", 64), gflops("test_resnet", (64, 128))
    classifier = 1000 * timm.create_model("test_resnet").num_features / 1e9
    assert twice - classifier == pytest.approx(2 * (at - classifier))
    model = timm.create_model("test_vit", img_size=64)
    tokens, blocks, dim = (64 // 16) ** 2 + 1, len(model.blocks), model.embed_dim
    weights = sum(m.weight.numel() * tokens for m in model.blocks.modules() if isinstance(m, torch.nn.Linear))
    attention = blocks * 2 * tokens**2 * dim
    ends = dim * 3 * 16**2 * (tokens - 1) + 1000 * dim
    assert gflops("test_vit", 64) == pytest.approx((weights + attention + ends) / 1e9)
    assert gflops("nat_m") == gflops("nat_m", 224) < gflops("nat_m", (224, 256))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["davit_tiniest"], "no model is called davit_tiniest"),
        (["test_vit.nosuch"], "test_vit.nosuch: Invalid pretrained tag"),
        (["maxvit_t.timm_tf_in1k"], "expected models of the zoo without a tag, such as maxvit_t, and --size"),
        (["--batch", "0"], "argument --batch: 0: expected at least 1"),
        (["--size", "32", "-1"], "argument --size: -1: expected at least 1"),
        (["--profile", "--compile"], "leave one of them out"),
    ],
)
def test_bad_arguments_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        bench.parse(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", bench.TWINS)
def test_twins_have_the_same_parameters(name):
    """But for classifiers and buffers, a twin is the same architecture, for images of the same size."""
    with torch.device("meta"):
        twin = bench.twin_of(name)
    assert sum(p.numel() for p in twin.parameters()) == pytest.approx(parameters(name), rel=2e-3)
    if bench.TWINS[name][0] == "timm":
        assert twin.default_cfg["input_size"] == (3, *2 * [variants()[name]["img_size"]])


def test_default_models_exist():
    assert set(bench.DEFAULT) <= set(variants())
