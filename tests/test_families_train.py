"""Every family learns: one short epoch on the default data, by the loop, the recipe and the log of a user's run."""

from statistics import fmean

import pytest

from builds import FAMILIES, smallest
from children import lines, train_here


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_one_epoch(family, tmp_path):
    name = smallest(FAMILIES[family])
    # half the recipe's batch: in 44 steps a transformer of 16 x 16 patches, timm's as ours, hardly begins to learn
    options = ["data=digits", "recipe=quick", "train.epochs=1", "data.batch_size=16", "train.log_every=1"]
    train_here(tmp_path, f"model={name}", *options, "name=run")
    losses = [line["loss"] for line in lines(tmp_path / "run") if "loss" in line]
    first, last = fmean(losses[:10]), fmean(losses[-10:])
    print(f"{name}: {len(losses)} steps, loss {first:.3f} -> {last:.3f}")
    assert len(losses) == 89
    assert last < 0.9 * first
