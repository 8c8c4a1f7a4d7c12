"""The learning rate of every step and every parameter."""

import math

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from children import SMALL, lost_after, newest, note_overrides, train_here
from recipes import config, optim
from recipes.config import ConfigError
from recipes.plan import Plan
from recipes.settings import load_config
from recipes.tasks import classify
from recipes.tasks import detect as detection
from recipes.tasks import segment as segmentation

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


def rates(overrides, steps, per_epoch):
    """The rates of a composed configuration, whose data fills `per_epoch` steps."""
    cfg = config.compose(overrides)
    length = steps if cfg.train.steps is None else cfg.train.steps
    assert length == steps
    rate = optim.schedule(cfg, Plan(1, 1, 1, per_epoch, steps, per_epoch))
    return lambda *asked: [rate(step) for step in asked]


def near(*values):
    return pytest.approx(values, rel=1e-9, abs=1e-18)


def test_poly_by_iteration_with_a_warm_up_from_a_ratio():
    """mmsegmentation's 160k: (1 - n / 160000), times what rises from 1e-6 to 1 over 1500 steps."""
    rate = rates(["recipe=paper", "task=segment", "model=davit_t"], 160000, 1263)
    assert rate(0, 750) == near(6e-5 * 1e-6, 6e-5 * (1 - 750 / 160000) * (1e-6 + (1 - 1e-6) / 2))
    assert rate(1500, 80000, 159999) == near(6e-5 * (1 - 1500 / 160000), 3e-5, 6e-5 / 160000)


def test_poly_to_a_floor_without_warm_up():
    rate = rates(["recipe=paper", "task=segment", "model=litv2_s"], 80000, 1263)
    assert rate(0, 40000) == near(1e-4, 1e-6 + 99e-6 * 0.5**0.9)
    assert rate(79999) == near(1e-6 + 99e-6 * (1 / 80000) ** 0.9)


def test_cosine_with_a_warm_up_from_a_ratio():
    chosen = ["model=biformer_s", "paper.phase=ade20k_semfpn_80k"]
    rate = rates(["recipe=paper", "task=segment", *chosen], 80000, 631)
    assert rate(0, 40000, 60000) == near(2e-5, 2e-12 + (2e-4 - 2e-12) / 2, 2e-12 + (2e-4 - 2e-12) * (2 - 2**0.5) / 4)
    assert rate(500) == near((2e-12 + (2e-4 - 2e-12) * (1 + math.cos(math.pi * 500 / 80000)) / 2) * 0.55)


@pytest.mark.parametrize(("model", "epochs", "falls"), [("biformer_s", 12, (8, 11)), ("nat_m", 36, (27, 33))])
def test_steps_at_epochs(model, epochs, falls):
    """mmdetection's 1x and 3x, of 7330 steps an epoch: a tenth from the first step after these epochs on."""
    rate = rates(["recipe=paper", "task=detect", f"model={model}"], epochs * 7330, 7330)
    first, second = (epoch * 7330 for epoch in falls)
    assert rate(0, 250, 500) == near(1e-7, 1e-4 * (0.001 + 0.999 / 2), 1e-4)
    assert rate(first - 1, first, second - 1, second, epochs * 7330 - 1) == near(1e-4, 1e-5, 1e-5, 1e-6, 1e-6)


def test_a_decay_that_ends_before_the_run():
    """MaxViT-S: 6000 steps up from 0, a cosine to 90,000, then nothing, as its file has it."""
    chosen = ["model=maxvit_s", "paper.phase=coco_cascade_maskrcnn_modelgarden"]
    rate = rates(["recipe=paper", "task=detect", *chosen], 115750, 462)
    assert rate(0, 3000, 6000, 48000, 90000, 115749) == near(0, 1.5e-3, 3e-3, 1.5e-3, 0, 0)


def test_steps_need_milestones():
    with pytest.raises(config.ConfigError, match=r"sched\.milestones=\[8,11\], in epochs"):
        rates(["sched.sched=step", "train.steps=70"], 70, 7)
    rate = rates(["sched.sched=step", "sched.milestones=[8,2.5]", "sched.gamma=0.5", "optim.lr=1.0", "sched.min_lr=0.3",
                  "sched.warmup=0", "train.steps=100"], 100, 10)  # fmt: skip
    assert rate(24, 25, 79, 80, 99) == near(1, 0.5, 0.5, 0.3, 0.3)


def test_warm_up_and_cooldown_fit_into_the_run():
    """They cannot both have their way in the same step."""
    lengths = ["sched.unit=steps", "sched.warmup=6", "optim.lr=1.0", "sched.warmup_lr=0", "sched.min_lr=0.1"]
    rate = rates([*lengths, "sched.cooldown=4", "train.steps=10"], 10, 10)
    assert rate(3, 6, 9) == near(0.5, 0.1, 0.1)
    with pytest.raises(ConfigError, match="a cooldown of 5 steps does not fit into 10 steps with a warmup of 6: train"):
        rates([*lengths, "sched.cooldown=5", "train.steps=10"], 10, 10)


def test_a_decay_may_be_counted_from_the_start():
    """As timm's CosineLRScheduler has it: the warm-up replaces the first part of the cosine."""
    rate = optim.Schedule(100, 1.0, "cosine", warmup=10, min_lr=0.2, cooldown=20, begins=0)
    assert rate(9) == 0.9 and rate(10) == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi / 8)) / 2)
    assert rate(40) == pytest.approx(0.6) and rate(80) == rate(99) == 0.2


def test_a_rate_may_change_with_the_epoch():
    rate, smooth = optim.Schedule(100, 1.0, warmup=20, every=10), optim.Schedule(100, 1.0, warmup=20)
    assert [rate(step) for step in range(100)] == [smooth(step // 10 * 10) for step in range(100)]
    assert rate(0) == 0 and rate(10) == rate(19) == 0.5


def test_ends_are_scaled_or_shared():
    ends = {"warmup": 10, "warmup_lr": 0.002, "min_lr": 0.1}
    scaled, shared = optim.Schedule(100, 1.0, **ends), optim.Schedule(100, 1.0, **ends, shared=True)
    assert [scaled(step, 0.1) for step in range(100)] == pytest.approx([0.1 * scaled(step) for step in range(100)])
    assert shared(0, 0.1) == 0.002 and {shared(step, 0.1) for step in range(10, 100)} == {0.1}
    assert [shared(step) for step in range(100)] == [scaled(step) for step in range(100)]


SHARED = ["sched.shared_floor=true", "sched.min_lr=1e-4", "sched.warmup_lr=1e-4", "sched.warmup=2", "optim.lr=1e-2"]


def rates_by_name(*overrides):
    """The rate of each parameter in three steps: the first, the peak and the last."""
    model, optimizer = made(*overrides)
    rate = optim.schedule(config.compose(overrides), Plan(8, 1, 1, 10, 50, 10))
    found = []
    for step in (0, 20, 49):
        optim.set_lr(optimizer, rate, step)
        found.append(by_name(model, optimizer, "lr"))
    return {name: [rates[name] for rates in found] for name in found[0]}, by_name(model, optimizer, "lr_scale")


def test_only_a_model_s_own_factor_leaves_shared_ends_alone():
    """timm's schedulers multiply a whole rate by layer decay, its floor too."""
    alone, _ = rates_by_name(*LITV2, *SHARED)
    decayed, scales = rates_by_name(*LITV2, *SHARED, "optim.layer_decay=0.5", "optim.backbone_lr_scale=0.01")
    assert len(set(scales.values())) > 6
    for name, rates in decayed.items():
        outer = scales[name] / (0.01 if name in OFFSETS else 1)
        assert rates == pytest.approx([outer * rate for rate in alone[name]]), name
        assert name in OFFSETS or rates[2] < rates[1], name
    assert {tuple(alone[name]) for name in OFFSETS} == {(1e-4, 1e-4, 1e-4)}  # a hundredth of the peak is that floor


def test_a_backbone_without_a_rate_has_none_at_the_ends():
    rates, scales = rates_by_name(*LITV2, *SHARED, "optim.backbone_lr_scale=0")
    assert {name for name in rates if not any(rates[name])} == {name for name in scales if not scales[name]} != set()


def test_a_state_without_a_factor_on_the_ends_keeps_them():
    """Of a run that was begun when all factors left them alone: it goes on with its rates."""
    _, optimizer = made(*LITV2, *SHARED, "optim.layer_decay=0.5")
    for group in optimizer.param_groups:
        del group["ends_scale"]
    optim.set_lr(optimizer, optim.Schedule(10, 1.0, min_lr=0.25, cooldown=5, shared=True), 9)
    assert {group["lr"] for group in optimizer.param_groups} == {0.25}


@pytest.mark.parametrize(("typed", "rises"), [
    (["data.batch_size=8"], True), (["data.batch_size=16"], False),
    (["data.batch_size=8", "sched.sched=constant"], False),
])  # fmt: skip
def test_a_rate_that_rises_to_its_floor_is_said(typed, rises, capsys):
    """BiFormer's peak follows the batch, its floor does not."""
    optim.schedule(config.compose(["recipe=paper", "model=biformer_t", *typed]), Plan(8, 1, 1, 10, 3000, 10))
    expected = "the learning rate rises to sched.min_lr, 1e-05, from a peak of 7.81e-06 with data.batch_size=8: lower"
    assert (expected in " ".join(capsys.readouterr().out.split())) == rises


def test_ends_follow_the_batch():
    options = ["data.batch_size=64", "sched.warmup_lr=1e-3", "sched.min_lr=1e-2", "sched.warmup=1"]
    plans = Plan(64, 1, 1, 10, 30, 10)
    for base, scale in (("null", 1), ("16", 4)):
        rate = optim.schedule(config.compose([*options, f"sched.lr_base_batch={base}"]), plans)
        assert (rate.warmup_lr, rate.min_lr) == pytest.approx((1e-3 * scale, 1e-2 * scale))


def test_a_warmup_that_does_not_end_is_told_in_its_own_unit(capsys):
    optim.schedule(config.compose(["sched.warmup=2"]), Plan(64, 1, 1, 7, 8, 7))
    assert "this run of 8 steps ends during its warmup of 14 (sched.warmup=2 epochs)" in capsys.readouterr().out


@pytest.mark.parametrize(("milestones", "said"), [("[4,6]", True), ("[3,6]", False)])
def test_milestones_that_are_not_reached_are_said(capsys, milestones, said):
    optim.schedule(config.compose(["sched.sched=step", f"sched.milestones={milestones}"]), Plan(64, 1, 1, 7, 28, 7))
    expected = "this run of 28 steps ends before the learning rate falls, at step 28 (sched.milestones=[4, 6] epochs)"
    assert (expected in " ".join(capsys.readouterr().out.split())) == said


@pytest.mark.parametrize(("lengths", "said"), [(["sched.warmup=0.5"], True), (["sched.warmup=1"], False)])
def test_a_rate_for_an_epoch_and_lengths_of_less(capsys, lengths, said):
    made = optim.schedule(config.compose(["sched.per=epoch", *lengths]), Plan(64, 1, 1, 4, 16, 4))
    expected = "rate for an epoch, 4 steps: 0 in the first, as the warmup takes 2 steps and the cooldown 0;"
    assert made(0) == 0 and (expected in capsys.readouterr().out) == said


@pytest.mark.parametrize(
    ("options", "lr"),
    [
        (["optim.lr=1"], 1),
        (["optim.lr=1", "optim.lr_base_batch=256"], 4),
        (["optim.lr=1", "optim.lr_base_batch=256", "optim.lr_scaling=sqrt"], 2),
        (["optim=lamb"], 5e-3 / 2**0.5),
    ],
)
def test_the_peak_follows_the_batch(options, lr):
    assert optim.base_lr(config.compose([*options, "data.batch_size=1024"])) == pytest.approx(lr)


def test_weight_decay_by_name():
    model, optimizer = made(*LITV2, "optim.no_decay=['*.fc1.weight']", "optim.decay=['*.norm.weight','head.fc.bias']")
    decay = by_name(model, optimizer, "weight_decay")
    for name, parameter in model.named_parameters():
        spared = name.endswith(".fc1.weight") or parameter.ndim < 2
        spared = spared and not (name.endswith(".norm.weight") or name == "head.fc.bias")
        assert decay[name] == (0 if spared else 0.05), name
    assert {name for name in decay if name.endswith(".fc1.weight")} and decay["head.fc.bias"]
    scales = by_name(model, optimizer, "lr_scale")
    assert {name for name in scales if scales[name] != 1} == OFFSETS
    model, optimizer = made(*LITV2, "optim.no_decay=[stem]")  # modules, as for train.freeze
    decay = by_name(model, optimizer, "weight_decay")
    assert {decay[name] for name in decay if name.startswith("stem.")} == {0}
    with pytest.raises(
        config.ConfigError, match=r"optim.no_decay: no parameter matches \*.table; those of the model are stem"
    ):
        made(*LITV2, "optim.no_decay=['*.table']")


def test_optimizer_groups():
    cfg = config.compose(["optim.layer_decay=0.5", "optim.lr_base_batch=16", "data.batch_size=32"])
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    model.group_matcher = lambda coarse=False: {"stem": r"^0", "blocks": r"^(\d+)"}
    optimizer = optim.create(cfg, model)
    assert optim.set_lr(optimizer, optim.Schedule(10, optim.base_lr(cfg), "constant"), 3) == 2e-3
    by_shape = {(tuple(g["params"][0].shape), g["lr_scale"]): g for g in optimizer.param_groups}
    scales = sorted({scale for _, scale in by_shape})
    assert len(by_shape) == 4 and scales[0] == 0.5 * scales[1]
    for (shape, scale), group in by_shape.items():
        assert group["lr"] == pytest.approx(2e-3 * scale)
        assert group["weight_decay"] == (0 if len(shape) == 1 else cfg.optim.weight_decay)


def test_no_layer_learns_at_less_than_the_smallest_factor(tmp_path):
    """Deep models have so many that layer decay alone would freeze the lowest, as where a run began without a floor."""
    deep = ["model=nat_m", "model.depths=[2,2,14,2]", "model.dims=[32,32,32,32]", "data.img_size=32", "recipe=finetune"]
    scales = by_name(*made(*deep), "lr_scale")
    alone = by_name(*made(*deep, "optim.layer_decay_min_scale=0"), "lr_scale")
    assert min(alone.values()) == pytest.approx(0.75**21) and max(scales.values()) == 1
    assert scales == {name: max(0.03, scale) for name, scale in alone.items()}
    cfg = config.compose(deep)
    del cfg.optim.layer_decay_min_scale
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(cfg, resolve=True))
    assert load_config(tmp_path).optim.layer_decay_min_scale == 0


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


@pytest.mark.parametrize("decay", [0.05, 0.0])  # without it timm puts frozen parameters into its group, too
def test_a_frozen_parameter_of_integers_leaves_the_step_fused(decay):
    cfg = config.compose([f"optim.weight_decay={decay}"])
    model = nn.Linear(2, 2)
    model.quantised = nn.Parameter(torch.ones(2, dtype=torch.int8), requires_grad=False)
    optimizer = optim.create(cfg, model)
    assert all(parameter.requires_grad for group in optimizer.param_groups for parameter in group["params"])
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert {group["fused"] for group in optimizer.param_groups} == {True}


@pytest.mark.parametrize("opt", ["sgd", "sgdw", "lookahead_sgd"])
def test_descent_without_momentum(opt):
    """timm turns on Nesterov's, which torch refuses then."""
    model, given = nn.Linear(3, 2), [f"optim.opt={opt}", "optim.momentum=0", "optim.weight_decay=0", "optim.lr=0.5"]
    optimizer = optim.create(config.compose(given), model)
    model(torch.ones(1, 3)).sum().backward()
    before = model.weight.detach().clone()
    optimizer.step()
    torch.testing.assert_close(model.weight, before - 0.5)
    with pytest.raises(ConfigError, match=rf"optim\.opt={opt} does not take these options: Nesterov momentum requires"):
        optim.create(config.compose([*given, "+optim.nesterov=true"]), model)


@pytest.mark.parametrize("opt", ["adamw", "lookahead_adamw", "lamb"])
def test_a_model_s_own_factors_on_the_rate(opt):
    model, optimizer = made(*LITV2, f"optim.opt={opt}")
    for lr in (0.5, 0.2):
        optim.set_lr(optimizer, optim.Schedule(10, lr, "constant"), 3)
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


TINY = ["model=nat_m", "model.dims=[32,32,32,32]", "model.depths=[1,2,1,1]", "data.img_size=64", "data.train_count=8"]


def dense(task, *overrides):
    cfg = config.compose([f"task={task.__name__.rpartition('.')[2]}", *TINY, *overrides])
    it = task.Task(cfg)
    model = it.build_model(it.build_data())
    return model, optim.create(cfg, model)


@pytest.mark.parametrize("task", [segmentation, detection], ids=["segment", "detect"])
def test_factors_of_backbone_and_heads(task):
    model, optimizer = dense(task, "optim.backbone_lr_scale=0.1", "optim.head_lr_scale=10")
    optim.set_lr(optimizer, optim.Schedule(10, 0.5, "constant"), 3)
    rates = by_name(model, optimizer, "lr")
    assert rates == {name: pytest.approx(0.05 if name.startswith("backbone.") else 5.0) for name in rates}
    assert len(set(rates.values())) == 2


@pytest.mark.parametrize("task", [segmentation, detection], ids=["segment", "detect"])
def test_layer_decay_below_heads(task):
    """Five blocks in four stages; a stage's downsampler goes with its first, norms of levels with the last of all."""
    model, optimizer = dense(task, "optim.layer_decay=0.5")
    scales = by_name(model, optimizer, "lr_scale")
    begins = {0: 1, 1: 2, 2: 4, 3: 5}
    assert sum(name.startswith("backbone.model.feature_norms.") for name in scales) >= 6
    for name, scale in scales.items():
        part, _, rest = name.removeprefix("backbone.model.").partition(".")
        number = rest.split(".")
        layer = {"stem": 0, "feature_norms": 5}.get(part, 6)
        if part == "stages":
            layer = begins[int(number[0])] + (int(number[2]) if number[1] == "blocks" else 0)
        assert scale == 0.5 ** (6 - layer), name


def test_factors_of_a_classifier_and_of_its_own():
    model, optimizer = made(*LITV2, "optim.backbone_lr_scale=0.5")
    scales = by_name(model, optimizer, "lr_scale")
    assert scales == {name: 0.005 if name in OFFSETS else 1.0 if name.startswith("head.fc") else 0.5 for name in scales}
    model, optimizer = made(*LITV2, "optim.model_lr_scales=false")
    optim.set_lr(optimizer, optim.Schedule(10, 0.5, "constant"), 3)
    assert set(by_name(model, optimizer, "lr").values()) == {0.5}


def test_names_that_do_not_decay():
    chosen = [
        "optim.filter_bias_and_bn=false",
        "optim.no_decay=[backbone.*.rpb,backbone.*norm*]",
        "optim.layer_decay=null",
    ]
    model, optimizer = dense(segmentation, *chosen, "optim.weight_decay=0.01")
    decays = by_name(model, optimizer, "weight_decay")
    spared = {name for name, decay in decays.items() if decay == 0}
    inside = {name for name in decays if name.startswith("backbone.")}
    assert spared == {name for name in inside if "norm" in name or name.endswith("rpb")}
    assert {decays[name] for name in decays.keys() - spared} == {0.01}
    assert any("norm" in name for name in decays.keys() - inside) and any(n.endswith("bias") for n in inside - spared)
    with pytest.raises(config.ConfigError, match=r"optim\.no_decay: no parameter matches \*pos_embed; those of the"):
        dense(segmentation, "optim.no_decay=[*pos_embed]")


@pytest.mark.parametrize("opt, fused", [("adamw", True), ("lookahead_adamw", True), ("sgd", True), ("lamb", False)])
def test_steps_on_the_processor_are_fused_where_torch_can(opt, fused):
    model = torch.nn.Linear(3, 2)
    cfg = config.compose([f"optim.opt={opt}"])
    created = optim.create(cfg, model)
    assert all(bool(group.get("fused")) == fused for group in created.param_groups)
    elsewhere = optim.create(cfg, torch.nn.Linear(3, 2, device="meta"))
    assert not any(group.get("fused") for group in elsewhere.param_groups)
    model(torch.ones(1, 3)).sum().backward()
    before = model.weight.detach().clone()
    created.step()
    assert not torch.equal(model.weight, before)


@pytest.mark.parametrize("opt", ["adamw", "lookahead_adamw", "sgd"])
def test_a_loaded_state_keeps_the_loop_that_is_here(opt):
    """As of a run that went on from a GPU, or was begun where nothing was fused yet."""
    cfg = config.compose([f"optim.opt={opt}"])
    here, there = (optim.create(cfg, torch.nn.Linear(3, 2)) for _ in range(2))
    state = there.state_dict()
    state["param_groups"] = [{**group, "fused": None, "foreach": True, "lr": 0.5} for group in state["param_groups"]]
    optim.load_state(here, state)
    assert {(g["fused"], g["foreach"], g["lr"]) for g in here.param_groups} == {(True, None, 0.5)}
    assert {(g["fused"], g["foreach"]) for g in state["param_groups"]} == {(None, True)}  # left as it was given


def test_a_model_of_timm_s_has_one_rate():
    model, optimizer = made(*SMALL)
    optim.set_lr(optimizer, optim.Schedule(10, 0.5, "constant"), 3)
    assert set(by_name(model, optimizer, "lr").values()) == {0.5}


def test_offsets_learn_at_their_rate_and_a_resumed_run_keeps_it(tmp_path):
    options = [*LITV2, "train.steps=3", "train.save_every=1", "train.keep=9"]
    train_here(tmp_path, *options, "name=whole")
    cut = lost_after(1, tmp_path / "whole", tmp_path / "cut")
    note_overrides(cut, options)
    first = newest(cut)
    for name in OFFSETS:  # all zeros at first, and Adam's first update of a parameter is its rate
        assert first.tensors("model")[name].abs().max() == pytest.approx(1e-5, rel=1e-3)
        assert first.tensors("model")[name.replace("weight", "bias")].abs().max() == pytest.approx(1e-3, rel=1e-3)
    train_here(tmp_path, f"resume={cut}")
    for file in (tmp_path / "whole" / "checkpoints" / "step-00000003").glob("*.safetensors"):
        assert file.read_bytes() == (cut / file.relative_to(tmp_path / "whole")).read_bytes(), file
    model, optimizer = made(*LITV2)
    optim.load_state(optimizer, newest(cut).tree("optimizer"))
    scales = by_name(model, optimizer, "lr_scale")
    assert scales == {name: 0.01 if name in OFFSETS else 1 for name in scales}


@pytest.mark.parametrize(("opt", "betas", "count"), [("adamw", [0.9, 0.99, 0.999], 2), ("adan", [0.9, 0.99], 3)])
def test_an_optimizer_has_as_many_betas_as_it_has(opt, betas, count):
    model = torch.nn.Linear(2, 2)
    with pytest.raises(ConfigError, match=f"optim.opt={opt} takes {count} of them"):
        optim.create(config.compose([f"optim.opt={opt}", f"optim.betas={betas}"]), model)


def test_what_an_optimizer_draws_depends_on_the_step(tmp_path, monkeypatch):
    """Not on the micro-batches before it, of which each process has its own: Kron's weights drifted apart."""
    drawn, step = [], torch.amp.GradScaler.step
    monkeypatch.setattr(
        torch.amp.GradScaler, "step", lambda *given: drawn.append(torch.rand(()).item()) or step(*given)
    )
    for name, micro_batches in (("one", 1), ("two", 2)):
        train_here(tmp_path, *SMALL, "train.steps=2", f"train.accumulate={micro_batches}", f"name={name}")
    assert drawn[:2] == drawn[2:] and len(set(drawn)) == 2


def test_what_learns_beside_a_model_has_the_whole_rate_and_decay():
    beside = nn.Conv2d(2, 3, 1)
    group = optim.create(config.compose(["optim.weight_decay=0.05"]), nn.Linear(3, 2), beside).param_groups[-1]
    assert [id(p) for p in group["params"]] == [id(p) for p in beside.parameters()]
    assert (group["weight_decay"], group["lr_scale"]) == (0.05, 1.0)
