"""The learning rate of every step and every parameter."""

import shutil

import pytest
import torch

from children import SMALL, note_overrides, train_here
from recipes import checkpoint, config, optim
from recipes.tasks import classify

LITV2 = [
    "model=litv2_s", "model.dims=[32,64,128,128]", "model.depths=[1,1,2,1]", "model.heads=[1,2,4,4]",
    "data.val_fraction=0.1", "data.img_size=32", "data.batch_size=8", "sched.warmup=0",
]  # fmt: skip
OFFSETS = {f"stages.{i}.downsample.offset.weight" for i in (1, 2, 3)}


def test_schedule_is_a_function_of_the_step():
    rate = optim.Schedule(100, 1.0, "cosine", warmup=10, warmup_lr=0.1, min_lr=0.2, cooldown=10)
    assert rate(0) == 0.1 and rate(5) == pytest.approx(0.55) and rate(10) == 1.0
    assert rate(50) == pytest.approx(0.6) and rate(90) == rate(99) == 0.2
    linear = optim.Schedule(100, 1.0, "linear", min_lr=0.0)
    assert [linear(step) for step in (0, 25, 75)] == [1.0, 0.75, 0.25]
    assert {optim.Schedule(100, 1.0, "constant")(step) for step in range(100)} == {1.0}


def test_optimizer_groups():
    cfg = config.compose(["optim.layer_decay=0.5", "optim.lr_base_batch=16", "data.batch_size=32"])
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    model.group_matcher = lambda coarse=False: {"stem": r"^0", "blocks": r"^(\d+)"}
    optimizer = optim.create(cfg, model)
    optim.set_lr(optimizer, optim.base_lr(cfg))
    by_shape = {(tuple(g["params"][0].shape), g["lr_scale"]): g for g in optimizer.param_groups}
    scales = sorted({scale for _, scale in by_shape})
    assert len(by_shape) == 4 and scales[0] == 0.5 * scales[1]
    for (shape, scale), group in by_shape.items():
        assert group["lr"] == pytest.approx(2e-3 * scale)
        assert group["weight_decay"] == (0 if len(shape) == 1 else cfg.optim.weight_decay)


def made(*overrides):
    """The model and its optimiser before the first step."""
    cfg = config.compose(overrides)
    task = classify.Task(cfg)
    model = task.build_model(task.build_data())
    return model, optim.create(cfg, model)


def by_name(model, optimizer, key):
    """An option of the optimiser for each parameter, by name; every parameter is in one group."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = [(names[parameter], group[key]) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(name for name, _ in found) == sorted(names.values())
    return dict(found)


@pytest.mark.parametrize("opt", ["adamw", "lookahead_adamw", "lamb"])
def test_a_model_s_own_factors_on_the_rate(opt):
    model, optimizer = made(*LITV2, f"optim.opt={opt}")
    for lr in (0.5, 0.2):
        optim.set_lr(optimizer, lr)
        rates = by_name(model, optimizer, "lr")
        assert rates == {name: 0.01 * lr if name in OFFSETS else lr for name in rates}
    decay = by_name(model, optimizer, "weight_decay")
    assert decay == {name: 0.05 if p.ndim > 1 else 0 for name, p in model.named_parameters()}
    inner = getattr(optimizer, "_base_optimizer", optimizer)
    assert by_name(model, inner, "lr") == rates


def test_a_model_s_own_factors_multiply_those_of_layer_decay(monkeypatch):
    model, optimizer = made(*LITV2, "optim.layer_decay=0.5")
    scales = by_name(model, optimizer, "lr_scale")
    monkeypatch.setattr(type(model), "lr_scales", lambda self: {})
    alone = by_name(*made(*LITV2, "optim.layer_decay=0.5"), "lr_scale")
    assert len({alone[name] for name in OFFSETS}) == 3
    assert scales == {name: alone[name] * (0.01 if name in OFFSETS else 1) for name in alone}


def test_a_model_of_timm_s_has_one_rate():
    model, optimizer = made(*SMALL)
    optim.set_lr(optimizer, 0.5)
    assert set(by_name(model, optimizer, "lr").values()) == {0.5}


def test_offsets_learn_at_their_rate_and_a_resumed_run_keeps_it(tmp_path):
    options = [*LITV2, "train.steps=3", "train.save_every=1", "train.keep=9"]
    train_here(tmp_path, *options, "name=whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for name in ("best-00000003", "step-00000002", "step-00000003"):
        shutil.rmtree(tmp_path / "cut" / "checkpoints" / name)
    note_overrides(tmp_path / "cut", options)
    first, _ = checkpoint.Store(tmp_path / "cut" / "checkpoints").newest()
    for name in OFFSETS:  # all zeros at first, and Adam's first update of a parameter is its rate
        assert first.tensors("model")[name].abs().max() == pytest.approx(1e-5, rel=1e-3)
        assert first.tensors("model")[name.replace("weight", "bias")].abs().max() == pytest.approx(1e-3, rel=1e-3)
    train_here(tmp_path, f"resume={tmp_path / 'cut'}")
    for file in (tmp_path / "whole" / "checkpoints" / "step-00000003").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "cut" / file.relative_to(tmp_path / "whole")).read_bytes(), file
    model, optimizer = made(*LITV2)
    saved, _ = checkpoint.Store(tmp_path / "cut" / "checkpoints").newest()
    optim.load_state(optimizer, saved.tree("optimizer"))
    scales = by_name(model, optimizer, "lr_scale")
    assert scales == {name: 0.01 if name in OFFSETS else 1 for name in scales}
