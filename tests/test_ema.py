"""The average of the weights, and the mode in which a model learns."""

import re
from itertools import count
from math import nan

import pytest
import torch

from children import SMALL, lines, train_here
from recipes import checkpoint, config
from recipes.state import make_ema
from recipes.tasks.classify import Task


def test_ema_warms_up_as_tensorflow_s():
    """Whose rule is (1 + n) / (10 + n) from n = 0 on, after a first update that takes the weights as they are."""
    ema = make_ema(config.compose(["train.ema=0.9"]), torch.nn.Linear(1, 1))
    assert [ema.get_decay(n) for n in (1, 2, 3, 11)] == pytest.approx([0, 1 / 10, 2 / 11, 10 / 19])
    expected = [min(0.9, (1 + n) / (10 + n)) for n in range(200)]
    assert [ema.get_decay(n + 2) for n in range(200)] == pytest.approx(expected)
    ema = make_ema(config.compose(["train.ema=0.9", "train.ema_warmup=false"]), torch.nn.Linear(1, 1))
    assert [ema.get_decay(n) for n in range(1, 10)] == [0, *[0.9] * 8]


@pytest.mark.parametrize(("warmup", "decays"), [("true", [0, 1 / 10, 2 / 11]), ("false", [0, 0.7, 0.7])])
def test_the_average_of_each_step(tmp_path, warmup, decays):
    how = ["train.steps=3", "train.save_every=1", "train.keep=9", "train.ema=0.7", f"train.ema_warmup={warmup}"]
    train_here(tmp_path, *SMALL, "sched.warmup=0", *how, "name=run")
    store = checkpoint.Store(tmp_path / "run" / "checkpoints")
    average = {}
    for step, decay in enumerate(decays, 1):
        for name, tensor in weights(store, step, "model").items():
            if tensor.is_floating_point():
                average[name] = decay * average.get(name, tensor) + (1 - decay) * tensor
                torch.testing.assert_close(weights(store, step, "ema")[name], average[name], msg=f"{name}, step {step}")


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """Every checkpoint of three steps whose average moves every second step and is not what is evaluated."""
    folder = tmp_path_factory.mktemp("kept")
    how = ["train.steps=3", "train.save_every=1", "train.keep=9", "train.ema_every=2", "train.ema_evaluated=false"]
    train_here(folder, *SMALL, "sched.warmup=0", *how, "name=run")
    return checkpoint.Store(folder / "run" / "checkpoints")


def weights(store, step, name):
    return checkpoint.read(store.folder / f"step-{step:08d}").tensors(name)


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def test_the_average_may_move_every_so_many_steps(kept):
    averages = [weights(kept, step, "ema") for step in (1, 2, 3)]
    models = [weights(kept, step, "model") for step in (1, 2, 3)]
    assert not same(averages[0], averages[1]) and same(averages[1], averages[2])
    assert same(averages[1], weights(kept, 2, "model"))  # the first time, it takes the weights as they are
    assert not same(models[1], models[2])


def test_the_average_may_be_kept_and_not_evaluated(kept):
    best, _ = kept.newest("best")
    assert best.state["weights"] == "model" and same(best.tensors("model"), weights(kept, 3, "model"))
    assert not same(best.tensors("ema"), best.tensors("model"))


def test_before_its_first_update_the_average_is_not_evaluated(tmp_path, capsys):
    """It holds the initial weights until then."""
    how = ["train.steps=3", "train.eval_steps=1", "train.ema=0.7", "train.ema_every=2"]
    train_here(tmp_path, *SMALL, "sched.warmup=0", *how, "name=run")
    assert re.findall(r"validation \((\w+) weights\)", capsys.readouterr().out) == ["model", "ema", "ema"]


def test_a_skipped_step_is_no_update(tmp_path, monkeypatch):
    """The first update takes the weights as they are: if the first step is skipped, it is that of the second."""
    loss, number = Task.loss, count()
    monkeypatch.setattr(Task, "loss", lambda *args, **draw: loss(*args, **draw) * (nan if next(number) == 0 else 1))
    how = ["train.steps=3", "train.save_every=1", "train.keep=9", "train.ema=0.7", "train.ema_warmup=false"]
    train_here(tmp_path, *SMALL, "sched.warmup=0", "train.skip_nonfinite=1", *how, "name=run")
    store = checkpoint.Store(tmp_path / "run" / "checkpoints")
    assert same(weights(store, 2, "ema"), weights(store, 2, "model"))
    assert not same(weights(store, 3, "ema"), weights(store, 3, "model"))
    assert [checkpoint.read(store.folder / f"step-0000000{step}").state["averages"] for step in (1, 2, 3)] == [0, 1, 2]


def test_learning_in_evaluation_mode(tmp_path):
    """Parameters move, norms keep their statistics: through an evaluation, and in several parts."""
    how = ["train.eval_mode=true", "train.steps=4", "train.eval_every=0.04", "train.accumulate=2", "train.ema=null"]
    train_here(tmp_path, *SMALL, "sched.warmup=0", *how, "name=run")
    found, _ = checkpoint.Store(tmp_path / "run" / "checkpoints").newest()
    tensors = found.tensors("model")
    means = [tensor for name, tensor in tensors.items() if name.endswith("running_mean")]
    assert means and not any(mean.any() for mean in means)
    biases = [tensor for name, tensor in tensors.items() if name.endswith("bn1.bias")]
    assert biases and all(bias.any() for bias in biases)


def test_an_evaluation_leaves_the_model_learning(tmp_path):
    """Without an average it is the model itself that answers, in evaluation mode: its norms then move again."""
    how = ["train.steps=4", "train.eval_every=0.04", "train.save_every=1", "train.keep=9", "train.ema=null"]
    train_here(tmp_path, *SMALL, "sched.warmup=0", *how, "name=run")
    store = checkpoint.Store(tmp_path / "run" / "checkpoints")
    assert sum("val_loss" in line for line in lines(tmp_path / "run")) > 1
    for step in (1, 2, 3):
        before, after = weights(store, step, "model"), weights(store, step + 1, "model")
        means = [name for name in after if name.endswith("running_mean")]
        assert means and not any(torch.equal(before[name], after[name]) for name in means)
