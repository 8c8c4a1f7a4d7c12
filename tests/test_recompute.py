"""Gradient checkpointing in a run, which learns the same but for timm's norms; a model that has none is refused."""

import pytest
import timm
import torch

from children import train_here
from families import SMALL
from recipes import checkpoint, models
from recipes.config import ConfigError
from zoo.heads import segmenter

STEPS = ["train.steps=2", "data.batch_size=4", "data.img_size=32", "data.workers=0", "train.eval_every=9"]
PARTS = ("model", "ema", "optimizer")


@pytest.mark.parametrize("task", ["classify", "segment"])
def test_a_run_learns_the_same(tmp_path, monkeypatch, task):
    """Weights, moments, the average and the statistics of batch norms, in micro-batches too."""
    calls, recomputed = [], torch.utils.checkpoint.checkpoint
    monkeypatch.setattr("zoo.blocks.recompute.checkpoint", lambda *a, **k: calls.append(a) or recomputed(*a, **k))
    small = [f"+model.{key}={[*sides]}" for key, sides in SMALL["stvit_b"].items()]
    given = ["model=stvit_b", *small, f"task={task}", *STEPS, "train.accumulate=2", "train.ema=0.5"]
    tensors = []
    for again in ("false", "true"):
        train_here(tmp_path, *given, f"train.grad_checkpointing={again}", f"name=run-{again}")
        found, _ = checkpoint.Store(tmp_path / f"run-{again}" / "checkpoints").newest()
        tensors.append({(part, key): tensor for part in PARTS for key, tensor in found.tensors(part).items()})
        assert bool(calls) == (again == "true")
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensor, tensors[1][key]) for key, tensor in tensors[0].items())


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["model=timm", "model.name=test_resnet"], True),
        (["model=timm", "model.name=test_resnet", "task=segment"], True),
        (["model=timm", "model.name=test_resnet", "train.eval_mode=true"], False),
        (["model=timm", "model.name=test_convnext", "task=segment"], False),  # whose head alone has batch norms
        (["model=stvit_b", *(f"+model.{key}={[*sides]}" for key, sides in SMALL["stvit_b"].items())], False),
    ],
)
def test_a_run_says_that_statistics_differ(tmp_path, capsys, given, told):
    train_here(tmp_path, *given, *STEPS, "train.grad_checkpointing=true", "name=run")
    said = "train.grad_checkpointing=true: batch norms of timm's models record their statistics twice with it\n"
    assert (said in capsys.readouterr().out) == told


@pytest.mark.parametrize("name", ["dla34", "test_convnext"])
def test_a_model_that_cannot_is_refused(name):
    model = timm.create_model(name) if name == "dla34" else segmenter(name, 3, feature_cls="fx")
    with pytest.raises(ConfigError, match=rf"^train\.grad_checkpointing=true: {name} cannot compute parts of itself"):
        models.checkpoint_gradients(model, name)
