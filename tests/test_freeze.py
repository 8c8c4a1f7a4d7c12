"""Frozen parts, and a run's folder as the weights to start from."""

import json
import shutil

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from children import SMALL, lines, lost_after, newest, note_overrides, train_here
from ranks import on_ranks
from recipes import config, weights
from recipes.config import ConfigError
from recipes.freeze import freeze
from recipes.settings import RunError
from recipes.state import train_mode
from recipes.tasks import classify
from recipes.weights import find_checkpoint
from zoo import CheckpointError

FIRST = [*SMALL, "train.steps=25", "train.ema=0.9", "optim.lr=4e-3", "name=first"]
PROBE = [
    *SMALL, "recipe=linear_probe", "augment.scale=[0.8,1.0]", "train.steps=20", "train.save_every=10", "train.ema=0.5",
    "train.accumulate=3", "data.batch_size=48", "optim.lr=2.0",
]  # fmt: skip


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A run of one's own work."""
    out = tmp_path_factory.mktemp("runs")
    train_here(out, *FIRST)
    return out / "first"


@pytest.fixture(scope="module")
def probe(first):
    options = [*PROBE, f"model.checkpoint={first}"]
    train_here(first.parent, *options, "name=probe")
    note_overrides(first.parent / "probe", options)
    return first.parent / "probe"


@pytest.mark.parametrize("name", ["maxvit_t", "davit_t", "test_resnet", "test_vit", "deit_tiny_distilled_patch16_224"])
def test_a_backbone_is_all_but_the_classifier(name):
    model = timm.create_model(name, num_classes=7, device="meta")
    frozen = freeze(model, "backbone")
    learns = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    heads = model.get_classifier()
    heads = heads if isinstance(heads, tuple) else (heads,)
    assert all(not parameter.requires_grad or parameter.shape[0] == 7 for parameter in model.parameters())
    assert len(learns) == 2 * len(heads) and not set(heads) & set(frozen) and model not in frozen
    train_mode(model, frozen)
    norms = [module for module in model.modules() if isinstance(module, torch.nn.modules.batchnorm._NormBase)]
    assert not any(norm.training for norm in norms) and all(head.training for head in heads) and model.training


def test_names_that_are_frozen():
    model = timm.create_model("maxvit_t", device="meta")
    frozen = freeze(model, ["stem", "stages.[01].*", "head.fc.bias"])
    still = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    expected = ("stem.", "stages.0.", "stages.1.", "head.fc.bias")
    assert still == {name for name, _ in model.named_parameters() if name.startswith(expected)}
    assert model.stem in frozen and model.stages[1] in frozen
    assert model.stages[2] not in frozen and model.head.fc not in frozen
    assert freeze(model, None) == []


def test_the_backbone_of_a_segmenter():
    from zoo.heads import segmenter

    model = segmenter("resnet18", 5, head="fcn")
    freeze(model, "backbone")
    learns = {name.partition(".")[0] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert "backbone" not in learns and len(learns) >= 2


@pytest.mark.parametrize(
    ("what", "said"),
    [
        (["stages.9"], r"freeze: no parameter matches stages\.9; .* are stem, .*=backbone works"),
        (["*"], "nothing of this"),
    ],
)
def test_names_that_cannot_be_frozen(what, said):
    with pytest.raises(ConfigError, match=said):
        freeze(timm.create_model("nat_m", device="meta"), what)


def test_a_linear_probe_leaves_the_backbone_as_it_was(first, probe):
    """Bit for bit, running statistics among them, in the moving average too, in three parts a step."""
    start, found = find_checkpoint(first).tensors("ema"), newest(probe)
    for part in ("model", "ema"):
        state = found.tensors(part)
        changed = {name for name in state if not torch.equal(state[name], start[name])}
        assert changed == {"fc.weight", "fc.bias"}, part
    assert any(name.endswith("running_var") for name in start)


def test_a_linear_probe_learns(probe):
    scores = [line["val_top1"] for line in lines(probe) if "val_top1" in line]
    assert scores[-1] > 3 * 10  # ten classes
    moments = newest(probe).tree("optimizer")
    assert len(moments["state"]) == 2 and sum(len(group["params"]) for group in moments["param_groups"]) == 2


def test_a_frozen_backbone_gets_no_gradient():
    model = timm.create_model("test_resnet", num_classes=3)
    freeze(model, "backbone")
    features = model.forward_features(torch.randn(2, 3, 32, 32))
    assert not features.requires_grad  # no graph is kept for it
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {"fc.weight", "fc.bias"}


def test_a_probe_that_was_stopped_ends_with_the_same_bits(probe, tmp_path):
    again = lost_after(10, probe, tmp_path / "probe")
    train_here(tmp_path, f"resume={again}")
    for part in ("model", "ema", "optimizer"):
        file = f"checkpoints/step-00000020/{part}.safetensors"
        assert (probe / file).read_bytes() == (again / file).read_bytes()


@pytest.mark.parametrize("parallel", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_two_processes_probe_as_one(first, tmp_path, parallel):
    options = [*PROBE, f"model.checkpoint={first}", "train.accumulate=2", "train.steps=4", "data.workers=0"]
    train_here(tmp_path, *options, "name=alone")
    shared = [*options, f"hardware.parallel={parallel}", "name=shared"]
    assert on_ranks(2, train_here, tmp_path, *shared) == [None, None]
    ours, theirs = (find_checkpoint(tmp_path / name).tensors("model") for name in ("shared", "alone"))
    start = find_checkpoint(first).tensors("ema")
    for name in theirs:
        assert torch.allclose(ours[name], theirs[name], rtol=1e-4, atol=1e-6), name
        assert name.startswith("fc.") or torch.equal(ours[name], start[name]), name


def made(run, *overrides):
    cfg = config.compose([*SMALL, f"model.checkpoint={run}", *overrides])
    task = classify.Task(cfg)
    return task.build_model(task.build_data())


def test_a_run_s_folder_is_its_best_weights(first):
    best = find_checkpoint(first)
    for kind, part in (("auto", "ema"), ("ema", "ema"), ("raw", "model")):
        saved = best.tensors(part)
        state = made(first, f"model.weights={kind}").state_dict()
        assert all(torch.equal(tensor, saved[name]) for name, tensor in state.items()), kind
        assert weights.of_run(str(first), kind).path == str(best.path / f"{part}.safetensors")
    assert not all(torch.equal(tensor, best.tensors("model")[name]) for name, tensor in best.tensors("ema").items())


def test_another_normalisation_than_the_run_s_is_said(first, capsys):
    """Features of a frozen backbone are worth less of images in other colours than it learned from."""
    made(first, "data.img_size=48", "data.crop_pct=0.5")
    assert "another normalisation" not in capsys.readouterr().out
    made(first, "data.std=[0.2,0.2,0.2]")
    said = capsys.readouterr().out
    assert "another normalisation than these: data.mean=[0.5,0.5,0.5] data.std=[0.5,0.5,0.5] restores it" in said


def test_fine_tuning_at_another_size_starts_from_a_run(tmp_path):
    """As recipe=paper does: MaxViT, DiNAT and GC ViT have a name for each size, and tables for each window."""
    small = ["data=digits", "model.depths=[1,1,1,1]", "model.dims=[32,32,32,32]", "data.workers=0"]
    run = ["data.img_size=64", "data.batch_size=8", "train.steps=1", "data.eval_batch_size=256", "name=first"]
    train_here(tmp_path, "recipe=paper", "model=maxvit_t", *small, *run)
    large = [*small, "data.img_size=96", f"model.checkpoint={tmp_path / 'first'}"]
    task = classify.Task(config.compose(["recipe=paper", "model=maxvit_t_384", *large]))
    ours, theirs = task.build_model(task.build_data()).state_dict(), find_checkpoint(tmp_path / "first").tensors("ema")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items() if not name.endswith("rpb"))
    tables = [name for name in ours if name.endswith("rpb")]
    assert len(tables) == 8 and {(theirs[name].shape[-1], ours[name].shape[-1]) for name in tables} == {(3, 5)}
    task.cfg.model.name = "maxvit_s_384"
    with pytest.raises(ConfigError, match="trained maxvit_t, and this is maxvit_s_384: give model=maxvit_t"):
        task.build_model(task.build_data())


def test_a_run_of_another_size_says_at_which_it_was_trained(tmp_path):
    """Timm's ViTs have positions for one size."""
    vit = ["model=timm", "model.name=test_vit", "data.img_size=32", "data.val_fraction=0.1", "data.workers=0"]
    train_here(tmp_path, *vit, "train.steps=1", "name=vit")

    def built(*size):
        task = classify.Task(config.compose([*vit, f"model.checkpoint={tmp_path / 'vit'}", *size]))
        return task.build_model(task.build_data())

    said = r"vit was trained at 32 pixels, and this model is built for \[48,64\]: set data\.img_size=32, or model"
    with pytest.raises(CheckpointError, match=said):
        built("data.img_size=[48,64]")
    size = ["data.img_size=[48,64]", "model.img_size=32", "+model.dynamic_img_size=true"]
    assert built(*size)(torch.zeros(1, 3, 48, 64)).shape == (1, 10)


def test_folders_that_are_no_start(first, tmp_path):
    with pytest.raises(RunError, match=r"holds no run: .*config\.yaml does not exist"):
        made(tmp_path)
    with pytest.raises(ConfigError, match="trained test_resnet, and this is test_vit: give model=test_resnet"):
        made(first, "model.name=test_vit")
    shutil.copytree(first, tmp_path / "empty", ignore=shutil.ignore_patterns("checkpoints"))
    with pytest.raises(RunError, match="has no intact checkpoint yet"):
        made(tmp_path / "empty")
    shutil.copytree(first, tmp_path / "plain")
    for path in (tmp_path / "plain" / "checkpoints").glob("*/state.json"):
        state = json.loads(path.read_text())
        del state["files"]["ema.safetensors"], state["crc32"]
        state["weights"] = "model"
        path.write_text(json.dumps(state))
    with pytest.raises(RunError, match=r"has no ema weights, as train.ema was null; auto takes those that it has$"):
        made(tmp_path / "plain", "model.weights=ema")


@pytest.fixture
def photos(tmp_path):
    """Three classes of one's own: noise of three colours."""
    draw = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 4)):
        for channel, name in enumerate("abc"):
            (tmp_path / "photos" / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = draw.integers(0, 120, (40, 40, 3)).astype(np.uint8)
                pixels[..., channel] += 100
                Image.fromarray(pixels).save(tmp_path / "photos" / split / name / f"{index}.png")
    return tmp_path / "photos"


@pytest.mark.parametrize("recipe", ["finetune", "linear_probe"])
def test_a_run_of_one_s_own_goes_on_with_other_classes(first, photos, tmp_path, recipe):
    options = ["model=timm", "model.name=test_resnet", f"model.checkpoint={first}", f"data.root={photos}"]
    small = ["data=imagefolder", "data.img_size=32", "data.batch_size=12", "train.epochs=8", "data.workers=0"]
    small += ["optim.lr=3e-3", "optim.layer_decay=0.9"] if recipe == "finetune" else []  # for 24 small steps
    train_here(tmp_path, f"recipe={recipe}", *options, *small, "name=second")
    state = find_checkpoint(tmp_path / "second").tensors("model")
    assert state["fc.weight"].shape[0] == 3
    same = all(torch.equal(tensor, state[name]) for name, tensor in find_checkpoint(first).tensors("ema").items()
               if not name.startswith("fc."))  # fmt: skip
    assert same == (recipe == "linear_probe")
    scores = [line["val_top1"] for line in lines(tmp_path / "second") if "val_top1" in line]
    assert max(scores) > 60


@pytest.mark.parametrize("least", [0, 0.03])
def test_layers_of_a_fine_tuned_model_learn_slower_the_deeper_they_are(least):
    from recipes import optim

    cfg = config.compose(["recipe=finetune", "model=nat_m", f"optim.layer_decay_min_scale={least}"])
    assert config.compose(["recipe=finetune", "model=nat_m"]).optim.layer_decay_min_scale == 0.03
    model = timm.create_model("nat_m", device="meta")
    scales = {group["lr_scale"] for group in optim.create(cfg, model).param_groups}
    depth = sum(len(stage.blocks) for stage in model.stages)
    if least:
        assert max(scales) == 1 and min(scales) == least and len(scales) > 12
    else:
        assert max(scales) == 1 and min(scales) < 0.75**depth and len(scales) > depth
