"""Segmentation and detection on several processes: one curve, the same metrics, and no process waits for another's."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from children import finish, lines, train_here
from dense_cases import TINY
from detector_cases import HEADS, Pools, batch
from ranks import assert_bits, on_ranks, torchrun, weights
from recipes import checkpoint, config, distributed, hardware
from recipes.data.paired import IGNORE
from recipes.evaluate import evaluate
from recipes.tasks import segment
from zoo.heads import detector

# batch norms see two images each, whoever computes them
HALVES = [*TINY, "train.accumulate=2", "train.clip_grad=null"]
KINDS = {
    "segment": ["task=segment"],
    "fcos": ["task=detect", "task.head=fcos"],
    "mask_rcnn": ["task=detect", "task.head=mask_rcnn", "task.channels=32"],
    "cascade_mask_rcnn": ["task=detect", "task.head=cascade_mask_rcnn", "task.channels=32", "train.steps=2"],
}
FAST = ("segment", "fcos")
BATCHES = 1e-6  # convolutions in float32 answer a batch of one and a batch of two alike but for last bits
ALL = [pytest.param(kind, marks=() if kind in FAST else pytest.mark.slow) for kind in KINDS]


def curve(run: Path) -> list[dict]:
    """Losses, norms of gradients and everything measured."""
    kept = ("step", "loss", "grad_norm")
    return [
        {key: v for key, v in line.items() if key in kept or (key.startswith("val_") and "images_per_s" not in key)}
        for line in lines(run)
    ]


@pytest.mark.parametrize("kind", ALL)
def test_two_processes_train_as_one(tmp_path, kind):
    train_here(tmp_path, *KINDS[kind], *HALVES, "name=one")
    assert on_ranks(2, train_here, tmp_path, *KINDS[kind], *HALVES, "name=two") == [None, None]
    one, two = curve(tmp_path / "one"), curve(tmp_path / "two")
    assert any(key.startswith(("val_miou", "val_box_ap")) for line in one for key in line)
    assert_bits(two, one, val_loss=BATCHES)
    ours, theirs = weights(tmp_path / "two"), weights(tmp_path / "one")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_parameters_that_are_shared_out(tmp_path, kind):
    train_here(tmp_path, *KINDS[kind], *HALVES, "name=one")
    fsdp = [*KINDS[kind], *HALVES, "hardware.parallel=fsdp", "name=two"]
    assert on_ranks(2, train_here, tmp_path, *fsdp) == [None, None]
    for one, two in zip(curve(tmp_path / "one"), curve(tmp_path / "two"), strict=True):
        numbers = ("step", "loss", "grad_norm", "val_loss")
        assert {k: two[k] for k in numbers if k in two} == pytest.approx(
            {k: one[k] for k in numbers if k in one}, rel=2e-3
        )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["segment", "fcos", "mask_rcnn"])
def test_torchrun_trains_and_measures(tmp_path, kind):
    """As a user types it: the curve of one process, and eval.py's metrics of a run on two processes and on one."""
    train_here(tmp_path / "runs", *KINDS[kind], *HALVES, "name=one")
    child = torchrun("train.py", *KINDS[kind], *HALVES, "name=two", cwd=tmp_path)
    output = finish(child)
    assert child.returncode == 0, output
    assert_bits(curve(tmp_path / "runs" / "two"), curve(tmp_path / "runs" / "one"), val_loss=BATCHES)
    found = []
    for name in ("one", "two"):
        child = torchrun("eval.py", f"run=runs/{name}", f"out={name}", cwd=tmp_path)
        output = finish(child)
        assert child.returncode == 0, output
        found.append(json.loads((tmp_path / name / "eval.json").read_text()))
    best, _ = checkpoint.Store(tmp_path / "runs" / "one" / "checkpoints").newest("best")
    measured = {k: v for k, v in best.state["metrics"].items() if k not in ("images_per_s", "loss")}
    assert len(measured) > 3
    for each in found:
        assert {key: each[key] for key in measured} == measured


def step(head: str) -> list[torch.Tensor]:
    """Gradients after two steps, of which the second meets what the first left; rank 1 has no object to learn from."""
    cfg = config.compose(["task=detect", "model=timm", "model.name=test_resnet"])
    distributed.join(cfg)
    torch.manual_seed(0)
    model = detector(Pools(), 5, head=head, channels=32)
    forward = hardware.setup(cfg).wrapped(model)
    images, targets = batch(objects=distributed.rank() == 0)
    for _ in range(2):
        model.zero_grad()
        sum(forward(images, targets).values()).backward()
    return [parameter.grad.numpy() for parameter in model.parameters()]


@pytest.mark.parametrize("head", [pytest.param(h, marks=pytest.mark.slow if "cascade" in h else ()) for h in HEADS])
def test_a_process_without_objects_waits_for_no_gradient(head):
    one, two = on_ranks(2, step, head)
    assert all((a == b).all() for a, b in zip(one, two, strict=True)) and any(a.any() for a in one)


def remarked(labelled: int | None) -> list[str]:
    """What rank 0 remarks after an evaluation; of the training images, one of rank `labelled` has labels."""
    cfg = config.compose(["task=segment", *TINY])
    distributed.join(cfg)
    task, data = segment.Task(cfg), SimpleNamespace(class_names=["a", "b"], num_classes=2, left_out=())
    labels = torch.full((1, 2, 2), 0 if distributed.rank() == labelled else IGNORE)
    task.loss(lambda images, targets: {"loss": images.sum()}, torch.zeros(1), labels, draw=0)
    metrics = task.metrics(data)
    metrics.confusion.update(torch.arange(2), torch.arange(2))
    metrics.confusion.compute()
    return distributed.first(lambda: task.remarks(data, metrics))


def test_labels_that_another_process_sees_are_labels():
    assert on_ranks(2, remarked, 1) == [[], []]
    said, _ = on_ranks(2, remarked, None)
    assert len(said) == 1 and said[0].startswith("no pixel of the training images so far is labelled")


def measured(root, batch, amp):
    cfg = config.compose([
        "task=segment", "task.channels=8", "model=timm", "model.name=test_resnet", "data=masks", f"data.root={root}",
        "data.num_classes=3", "data.img_size=32", "data.workers=0", f"data.eval_batch_size={batch}",
        "hardware.parallel=fsdp", "hardware.timeout=60", f"hardware.amp={amp}",
    ])  # fmt: skip
    distributed.join(cfg)
    task, machine = segment.Task(cfg), hardware.setup(cfg)
    built = task.build_data()
    torch.manual_seed(0)
    model = machine.place(task.build_model(built))
    machine.shard(model)
    values = [evaluate(cfg, task, model, built, machine)[0] for _ in range(2)]
    model.train()
    with machine.autocast():
        loss = task.loss(model, torch.randn(2, 3, 32, 32), torch.zeros(2, 32, 32, dtype=torch.int64), draw=0)
    loss.backward()
    return values[0]["miou"], values[1]["miou"], all(p.grad is not None for p in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("amp", ["null", "bfloat16"])
def test_sharded_models_see_images_of_any_size(tmp_path, amp):
    """One process asks three times, the other once: neither may wait for the other's parameters."""
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        for number, size in enumerate([(40, 40), (40, 40), (56, 40), (40, 40), (40, 72)]):
            for kind, shape in (("images", (*size, 3)), ("masks", size)):
                (tmp_path / kind / split).mkdir(parents=True, exist_ok=True)
                drawn = generator.integers(0, 256 if kind == "images" else 3, shape, np.uint8)
                Image.fromarray(drawn).save(tmp_path / kind / split / f"{number}.png")
    (alone,), both = on_ranks(1, measured, tmp_path, 1, amp), on_ranks(2, measured, tmp_path, 4, amp)
    assert alone[0] == alone[1] > 0 and both[0] == both[1] and alone[2]
    assert both[0] == (alone if amp == "null" else pytest.approx(alone, abs=1.0))
