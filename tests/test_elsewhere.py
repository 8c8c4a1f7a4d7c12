"""The loop, the losses and the evaluation on a second device: nothing is left behind on the first."""

import pytest
import torch

from children import SMALL, TIMES, lines, train_here
from dense_cases import TASKS, TINY
from elsewhere import DEVICE, Device, Mixed
from flags import flags_restored
from recipes import hardware

SHORT = ["train.steps=2", "train.save_every=2", "train.eval_every=1", "data.workers=0", "sched.warmup=0"]
RUNS = {
    "classify": [*SMALL, *SHORT, "data.batch_size=8", "augment.cutmix=1.0", "task.loss=binary_cross_entropy"],
    "segment": [*TINY, *TASKS["segment"], *SHORT, "task.inference=slide", "task.stride=[40,40]", "task.flip=true"],
    "detect": [*TINY, *TASKS["detect"], *SHORT],
    "masks": [*TINY, *TASKS["masks"], *SHORT],
}
SLOW = [pytest.param("masks", marks=pytest.mark.slow)]


@pytest.fixture
def elsewhere(monkeypatch):
    """A machine whose only device is the second."""
    generator, autocast = torch.Generator, torch.autocast
    monkeypatch.setattr(hardware, "_device", lambda name: DEVICE)
    monkeypatch.setattr(hardware.Hardware, "scaler", lambda machine: torch.amp.GradScaler("cpu", enabled=False))
    # which know no device of this kind
    monkeypatch.setattr(torch, "Generator", lambda device=None: generator())
    monkeypatch.setattr(torch, "autocast", lambda kind, *args, **kwargs: autocast("cpu", *args, **kwargs))
    with Device(), flags_restored():
        yield


@pytest.mark.parametrize("kind", ["classify", "segment", "detect", *SLOW])
def test_a_run_elsewhere_is_the_run_here(tmp_path, request, kind):
    options = [*RUNS[kind], "hardware.deterministic=true", "logger=jsonl"]
    train_here(tmp_path, *options, "name=here")
    request.getfixturevalue("elsewhere")
    train_here(tmp_path, *options, "name=elsewhere")
    here, there = (learned(tmp_path / name) for name in ("here", "elsewhere"))
    assert len(here) == 3  # two steps and an evaluation
    for one, other in zip(here, there, strict=True):
        assert other == pytest.approx(one, rel=1e-3)


def learned(run) -> list[dict]:
    """What a run wrote about its losses and scores."""
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines(run)]


def test_what_is_left_behind_is_found(elsewhere):
    there = torch.ones(3, device=DEVICE)
    with pytest.raises(Mixed, match="from the CPU, the others from elsewhere"):
        there + torch.ones(3)
    with pytest.raises(Mixed, match="numpy knows no tensors of another device"):
        there.numpy()
    assert (there + torch.tensor(1.0)).tolist() == [2, 2, 2] and there.cpu().numpy().sum() == 3
