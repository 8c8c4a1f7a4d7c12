"""A model that processes share out: which blocks, which norms, on which devices, and that it computes the same."""

import re
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path

import pytest
import timm
import torch
from omegaconf import OmegaConf
from torch import nn

from children import SMALL, lost_after, note_overrides, poisoned, train_here
from families import SMALL as FAMILIES
from ranks import on_ranks
from recipes import checkpoint, config, distributed, hardware, optim, sharding
from recipes.config import ConfigError
from recipes.hardware import Hardware
from recipes.tasks import classify


@pytest.mark.parametrize("device", ["cuda:0", "mps"])
def test_a_device_that_processes_cannot_share(monkeypatch, device):
    monkeypatch.setattr(distributed, "size", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    with pytest.raises(ConfigError, match="cannot be used by 2 processes"):
        hardware.setup(config.compose([f"hardware.device={device}"]))


def test_synchronised_norms_are_refused_on_the_cpu(monkeypatch):
    monkeypatch.setattr(distributed, "size", lambda: 2)
    with pytest.raises(ConfigError, match="SyncBatchNorm only trains on GPUs, and this is cpu"):
        hardware.setup(config.compose(["hardware=cpu", "hardware.sync_bn=true"]))


def test_what_is_for_several_processes_is_said_on_one(monkeypatch, capsys):
    typed = ["hardware=cpu", "hardware.parallel=fsdp", "hardware.sync_bn=true"]
    hardware.setup(config.compose(typed))
    assert capsys.readouterr().out.splitlines() == [
        f"{text} has no effect with one process: see torchrun" for text in typed[1:]
    ]
    monkeypatch.setattr(distributed, "size", lambda: 2)
    hardware.setup(config.compose(typed[:2]))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("processes", [1, 2])
def test_an_evaluation_of_a_run_needs_no_synchronised_norms(monkeypatch, capsys, processes):
    monkeypatch.setattr(distributed, "size", lambda: processes)
    cfg = OmegaConf.to_container(config.compose(["hardware=cpu", "hardware.sync_bn=true"]))
    del cfg["augment"]
    hardware.setup(OmegaConf.create(cfg))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", ["maxvit_t", "biformer_t", "stvit_b", "test_resnet", "efficientnet_b0"])
def test_synchronised_norms_keep_names_and_answers(name):
    small = FAMILIES.get(name, {})
    model = timm.create_model(name, num_classes=3, **small).eval()
    images = torch.randn(2, 3, 64, 64)
    before, keys = model(images), list(model.state_dict())
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    machine = Hardware(torch.device("cpu"), None, torch.preserve_format, False, "ddp", sync_bn=True)
    model = machine.synced(model)
    assert norms == sum(isinstance(module, nn.SyncBatchNorm) for module in model.modules()) > 0
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert list(model.state_dict()) == keys
    assert torch.equal(model(images), before)  # in evaluation they are batch norms


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("test_resnet", {"BasicBlock", "Bottleneck"}),
        ("test_vit", {"Block"}),
        ("test_convnext", {"ConvNeXtBlock"}),
        ("test_efficientnet", {"ConvBnAct", "EdgeResidual", "InvertedResidual"}),
        ("swin_tiny_patch4_window7_224", {"SwinTransformerBlock"}),
    ],
)
def test_blocks_of_timm_s_models(name, kinds):
    model = timm.create_model(name, device="meta")
    assert {type(block).__name__ for block in sharding.blocks(model)} == kinds


def test_blocks_of_our_models():
    for name, small in FAMILIES.items():
        found = sharding.blocks(timm.create_model(name, device="meta", **small))
        assert len(found) == sum(small["depths"]), name


def sharded_as_whole(name: str, amp: str | None, again: bool = False) -> tuple[float, float]:
    """How far the logits and the norm of the gradient of a sharded model are from the whole one's.

    again  the sharded one computes its blocks again in the backward pass
    """
    distributed.join(config.compose([]))
    small = FAMILIES.get(name, {"num_classes": 10})
    torch.manual_seed(0)
    model = timm.create_model(name, **small)
    images = torch.randn(2, 3, 64, 64)
    machine = Hardware(torch.device("cpu"), hardware.DTYPES.get(amp), torch.preserve_format, False, "fsdp")
    found = []
    for shard in (False, True):
        if shard:
            machine.shard(model)
            model.zero_grad()
            model.set_grad_checkpointing(again)
        with machine.autocast():
            logits = model(images)
        logits.float().square().mean().backward()
        norm = sharding.whole(nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))
        found.append((logits.detach().float(), norm))
    (logits, norm), (same, other) = found
    return ((logits - same).norm() / logits.norm()).item(), abs(other / norm - 1).item()


@pytest.mark.parametrize(
    ("name", "amp", "again", "limit"),
    [
        ("maxvit_t", "bfloat16", True, 0.05),
        ("test_resnet", None, False, 1e-4),
        pytest.param("test_resnet", "bfloat16", False, 0.05, marks=pytest.mark.slow),
    ],
)
def test_a_sharded_model_computes_as_a_whole_one(name, amp, again, limit):
    assert max(map(max, on_ranks(2, sharded_as_whole, name, amp, again))) < limit


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_computes_sharded(name):
    assert max(map(max, on_ranks(2, sharded_as_whole, name, None))) < 1e-4


def learned_by_a_norm() -> list[float]:
    """The gradient of a sharded layer norm's bias, in mixed precision."""
    distributed.join(config.compose([]))
    machine = Hardware(torch.device("cpu"), torch.bfloat16, torch.preserve_format, False, "fsdp")
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8))
    machine.shard(model)
    learner = machine.wrapped(model)
    with machine.autocast():
        learner(torch.randn(20_000, 4)).sum().backward()
    return sharding.whole(model[1].bias.grad).tolist()


def test_sharded_layer_norms_learn_in_float32():
    """As whole ones do, see test_hardware."""
    assert on_ranks(2, learned_by_a_norm) == [[20_000.0] * 8] * 2


def refused_optimizers(*names: str) -> dict[str, str]:
    """What is said of optimisers that cannot step a shared model; "" of those that can."""
    distributed.join(config.compose([]))
    model, said = timm.create_model("test_resnet", num_classes=10), {}
    Hardware(torch.device("cpu"), None, torch.preserve_format, False, "fsdp").shard(model)
    for name in names:
        try:
            optim.create(config.compose([f"optim.opt={name}", "optim.layer_decay=0.9"]), model)
            said[name] = ""
        except ConfigError as error:
            said[name] = str(error)
    return said


def test_optimizers_that_cannot_step_a_shared_model_are_refused():
    for said in on_ranks(2, refused_optimizers, "adamw", "lamb", "muon", "lookahead_adamw", "adafactor"):
        *steps, unsaved, refused = said.values()
        assert steps == ["", "", ""]
        assert re.search(r"optim\.opt=lookahead_adamw cannot be saved where the model is sharded", unsaved)
        assert re.search(r"optim\.opt=adafactor cannot step a sharded model.*\nSet hardware\.parallel=ddp", refused)


def handed_over(folder: Path, opt: str, begun: str) -> tuple[list, list, float]:
    """The loops of an optimiser that begins whole, or shared out, and of one that goes on from it in the other way.

    And how far the weights of the two are apart after one more step of each.
    """
    kinds = ("ddp", "fsdp") if begun == "whole" else ("fsdp", "ddp")
    made = alike(kinds, f"optim.opt={opt}", "optim.layer_decay=0.9")
    (one, first), (two, second) = made
    before = loops(second)
    optim.set_lr(first, optim.Schedule(10, 0.25, "constant"), 0)
    learn(one, first)
    if begun == "whole":
        sharding.load_whole(two, one.state_dict())
        state = deepcopy(first.state_dict())  # a file's; torch keeps the tensors of what it is given
        sharding.load_whole_optimizer(two, second, state)
    else:
        hand_over(folder, *made)
    assert loops(second) == before and [g["lr"] for g in second.param_groups] == [g["lr"] for g in first.param_groups]
    for model, optimizer in made:
        learn(model, optimizer)
    ours, theirs = ({n: sharding.whole(p.detach()) for n, p in model.named_parameters()} for model in (one, two))
    return loops(first), loops(second), max((ours[name] - theirs[name]).abs().max().item() for name in ours)


def alike(kinds: Sequence[str], *typed: str) -> list[tuple[nn.Module, torch.optim.Optimizer]]:
    """Equal models, whole ("ddp") or shared out ("fsdp"), each with its optimiser."""
    cfg, made = config.compose(typed), []
    distributed.join(cfg)
    for kind in kinds:
        torch.manual_seed(0)
        model = timm.create_model("test_resnet", num_classes=10)
        if kind == "fsdp":
            Hardware(torch.device("cpu"), None, torch.preserve_format, False, "fsdp").shard(model)
        made.append((model, optim.create(cfg, model)))
    return made


def hand_over(folder: Path, first: tuple, second: tuple) -> None:
    """Load the second of two models, with their optimisers, with a sharded checkpoint of the first."""
    (one, optimizer), (two, other) = first, second
    checkpoint.write(folder / "step-1", {checkpoint.SHARDED: sharding.tree({"model": one}, optimizer)}, {"step": 1})
    states = sharding.tree({"model": two}, other)
    checkpoint.read(folder / "step-1").fill(states)
    sharding.load_tree(states, {"model": two}, other)


def loops(optimizer: torch.optim.Optimizer) -> list[dict]:
    return [{key: group[key] for key in optim.LOOPS if key in group} for group in optimizer.param_groups]


def learn(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


@pytest.mark.parametrize("begun", ["whole", "shared"])
@pytest.mark.parametrize("opt", ["sgd", "adamw"])
def test_each_goes_on_in_its_own_loop(tmp_path, opt, begun):
    """That of torch over whole tensors of the processor is none for parts of them, and is not lost on the way back."""
    for first, second, apart in on_ranks(2, handed_over, tmp_path, opt, begun):
        fused, other = (first, second) if begun == "whole" else (second, first)
        assert {group["fused"] for group in fused} == {True} and {group["fused"] for group in other} == {None}
        assert apart < 1e-6


def begun_without_ends(folder: Path, begun: str) -> tuple[set[float], set[float], bool]:
    """The last rates of an optimiser whose groups had no factor on the ends when it was saved, and of one that goes on.

    And whether the groups of the latter have one.
    """
    factors = ("optim.layer_decay=0.7", "optim.backbone_lr_scale=0.5", "sched.shared_floor=true")
    made = alike((begun, "fsdp"), *factors)
    (one, first), (two, second) = made
    learn(one, first)
    for group in first.param_groups:
        del group["ends_scale"]
    if begun == "fsdp":
        hand_over(folder, *made)
    else:
        sharding.load_whole_optimizer(two, second, deepcopy(first.state_dict()))
    for optimizer in (first, second):
        optim.set_lr(optimizer, optim.Schedule(10, 1.0, min_lr=0.25, cooldown=5, shared=True), 9)
    rates, others = ({group["lr"] for group in optimizer.param_groups} for optimizer in (first, second))
    return rates, others, any("ends_scale" in group for group in second.param_groups)


@pytest.mark.parametrize("begun", ["ddp", "fsdp"])
def test_groups_without_a_factor_on_the_ends_keep_them(tmp_path, begun):
    assert on_ranks(2, begun_without_ends, tmp_path, begun) == [({0.25}, {0.25}, False)] * 2


# the first two of four steps are skipped, so that the optimiser has no state until the third is done
SKIPPED = [
    *SMALL, "data.batch_size=16", "data.workers=0", "sched.warmup=0", "train.accumulate=2", "train.steps=4",
    "train.skip_nonfinite=2", "train.keep=9",
]  # fmt: skip


def skipping(out: Path, *options: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classify.Task, "loss", poisoned(classify.Task.loss, {0, 1}, accumulate=2))
        train_here(out, *SKIPPED, *options)


def finally_(run: Path) -> tuple[dict[str, torch.Tensor], set[float]]:
    """All tensors of a sharded checkpoint after the last step, and how many steps its optimiser has counted."""
    found = checkpoint.read(run / "checkpoints" / "step-00000004")
    tensors = {
        f"{part}.{name}": value for part in ("model", "optimizer") for name, value in found.tensors(part).items()
    }
    return tensors, {value.item() for name, value in tensors.items() if name.endswith(".step")}


def test_saving_before_the_optimizer_has_state_changes_nothing(tmp_path):
    for name, every in (("often", 1), ("once", 100)):
        options = (f"train.save_every={every}", "hardware.parallel=fsdp", f"name={name}")
        assert on_ranks(2, skipping, tmp_path, *options) == [None, None]
    (often, steps), (once, _) = finally_(tmp_path / "often"), finally_(tmp_path / "once")
    assert steps == {2} and often.keys() == once.keys()
    assert [name for name in once if not torch.equal(often[name], once[name])] == []
    # resumed from where there is no state yet, by processes that share the parameters and by one that has all of them
    cut = lost_after(2, tmp_path / "often", tmp_path / "cut")
    note_overrides(cut, [*SKIPPED, "hardware.parallel=fsdp"])
    assert on_ranks(2, train_here, tmp_path, f"resume={cut}") == [None, None]
    resumed, _ = finally_(cut)
    assert [name for name in once if not torch.equal(resumed[name], once[name])] == []
    alone = lost_after(2, tmp_path / "often", tmp_path / "alone")
    note_overrides(alone, [*SKIPPED, "hardware.parallel=fsdp"])
    train_here(tmp_path, f"resume={alone}", "hardware.parallel=ddp")
    found = checkpoint.read(alone / "checkpoints" / "step-00000004").tree("optimizer")
    assert {state["step"].item() for state in found["state"].values()} == {2}


def test_a_whole_checkpoint_without_state_of_the_optimizer_is_sharded(tmp_path):
    skipping(tmp_path, "train.save_every=1", "name=whole")
    cut = lost_after(2, tmp_path / "whole", tmp_path / "cut")
    note_overrides(cut, SKIPPED)
    assert on_ranks(2, train_here, tmp_path, f"resume={cut}", "hardware.parallel=fsdp") == [None, None]
    assert finally_(cut)[1] == {2}
