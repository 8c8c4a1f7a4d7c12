"""`python -m recipes.bench`: our loop beside a bare one, and the way to the first step."""

import json
import re

import pytest
import torch

from children import SMALL
from flags import flags_restored
from recipes import bench, config

CAUSES = {"imports": 4.0, "configuration": 0.5, "data": 0.2, "model": 0.1, "first batch": 0.1, "first step": 0.1}
TINY = [*SMALL, "data.batch_size=8", "--block", "2", "--repeats", "3"]


def test_both_loops_take_turns(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "startup", lambda overrides, repeats: CAUSES)
    for _ in range(2):  # the same model again replaces its row
        with flags_restored():
            bench.main([*TINY, "--out", str(tmp_path)])
    (kept,) = json.loads((tmp_path / "loop_cpu.json").read_text())
    assert {name: len(ms) for name, ms in kept["ms"].items()} == {"ours": 3, "bare": 3}
    assert all(value > 0 for ms in kept["ms"].values() for value in ms)
    text = (tmp_path / "loop_cpu.md").read_text()
    assert text in capsys.readouterr().out and "| test_resnet, digits | 4.00 | 0.50 |" in text


def test_labels_are_smoothed_where_nothing_is_mixed():
    cfg = config.compose(["augment.mixup=0", "augment.cutmix=0", "augment.label_smoothing=0.1"])
    images = torch.randn(2, 3, 4, 4)
    same, targets = bench.mixing(cfg, 5)(images, torch.tensor([1, 4]))
    assert same is images
    assert torch.allclose(targets, torch.tensor([[0.02, 0.92, 0.02, 0.02, 0.02], [0.02, 0.02, 0.02, 0.02, 0.92]]))


def test_what_cannot_be_measured_or_kept_is_said_before_anything_is_measured(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "compare", lambda *_: pytest.fail("it began"))
    (tmp_path / "loop_cpu.json").write_text("[{")
    for given, said in (
        (["--repeats", "1"], "--repeats 1: the quartiles of the ratios need at least 2 turns"),
        (["--out", str(tmp_path / "loop_cpu.json")], f"error: cannot write to {tmp_path / 'loop_cpu.json'}: "),
        (["--out", str(tmp_path)], f"error: {tmp_path / 'loop_cpu.json'} cannot be read, so that no row can be added"),
    ):
        with pytest.raises(SystemExit) as error, flags_restored():
            bench.main([*TINY[:-1], "3", *given])
        assert error.value.code == 2 and said in capsys.readouterr().err
    assert (tmp_path / "loop_cpu.json").read_text() == "[{"


@pytest.mark.parametrize("other", ["task=segment", "task.loss=binary_cross_entropy"])
def test_what_the_bare_loop_does_not_compute_is_refused(other):
    with pytest.raises(config.ConfigError, match="the cross entropy of a classifier"):
        bench.compare([other], 1, 1)


@pytest.mark.parametrize(
    "typed", ["resume=RUN", "++resume=RUN", "name=mine", "out=RUN", "train.steps=9", "train.save_every=2"]
)
def test_what_the_measurement_determines_is_refused_before_a_run_is_touched(tmp_path, typed):
    typed = typed.replace("RUN", str(tmp_path))
    with pytest.raises(config.ConfigError, match=re.escape(f"{typed} would have no effect")):
        bench.compare([*SMALL, typed], 1, 1)
    assert not list(tmp_path.iterdir())


def test_the_length_in_a_whole_configuration_is_that_of_its_run():
    with flags_restored():
        ms = bench.compare([*SMALL, "data.batch_size=8", "++train.steps=900", "++train.eval_steps=1"], 1, 2)
    assert {name: len(each) for name, each in ms.items()} == {"ours": 2, "bare": 2}


def test_both_loops_train_the_same_parts_in_the_same_mode(monkeypatch):
    models, updates, loop = [], [], bench.bare

    class Average(bench.ModelEmaV3):
        def update(self, model, step):
            updates.append(step)
            super().update(model, step)

    def bare(cfg, data, model, *others):
        models.append(model)
        return loop(cfg, data, model, *others)

    monkeypatch.setattr(bench, "bare", bare)
    monkeypatch.setattr(bench, "ModelEmaV3", Average)
    given = ["train.freeze=[conv1]", "train.eval_mode=true", "train.ema=0.9", "train.ema_every=2"]
    with flags_restored():
        bench.compare([*SMALL, *given, "train.grad_checkpointing=true", "data.batch_size=8"], 2, 1)
    (model,) = models
    frozen = [name for name, weight in model.named_parameters() if not weight.requires_grad]
    assert frozen and all(name.startswith("conv1.") for name in frozen)
    assert model.grad_checkpointing and not any(module.training for module in model.modules())
    assert updates == [1, 2]  # in four steps


def test_ratio_is_of_medians():
    row = bench.loop_row("m", {"ours": [10.0, 30.0, 11.0], "bare": [10.0, 10.0, 20.0]})
    assert row.startswith("| m | 11.0 | 10.0 | 1.100 |")


@pytest.mark.slow
def test_the_way_to_the_first_step():
    causes = bench.startup([*SMALL], repeats=1)
    assert list(causes) == list(CAUSES) and causes["imports"] > 0.5


@pytest.mark.slow
def test_a_command_that_fails_says_why():
    with pytest.raises(SystemExit, match=r"(?s)status 2.*did you mean optim.lr"):
        bench.startup([*SMALL, "optim.lrr=1"], repeats=1)
