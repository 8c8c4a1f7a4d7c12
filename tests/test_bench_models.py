"""`python -m zoo.bench`: whole models beside their twins."""

import json

import pytest
import torch

from zoo import bench
from zoo.registry import variants
from zoo.table import parameters


def test_ours_beside_timm(tmp_path, capsys):
    bench.main(["gcvit_xxt", "--batch", "1", "--repeats", "1", "--out", str(tmp_path)])
    assert "| gcvit_xxt | forward |" in capsys.readouterr().out
    numbers = json.loads((tmp_path / "models_cpu_inference.json").read_text())
    (row,) = numbers["rows"]
    assert set(row["images_a_second"]) == {"ours", "timm"} and all(share > 0 for share in row["share"].values())
    assert numbers["command"].startswith("python -m zoo.bench") and "GFLOP/s" in numbers["matrix product"]
    assert "| gcvit_xxt | forward |" in (tmp_path / "models_cpu_inference.md").read_text()


def test_training_counts_the_backward_too():
    args = bench.parse(["stvit_s", "--batch", "1", "--repeats", "1", "--train"])
    row = bench.measure("stvit_s", args, rate=1e12)
    speed = row.images_a_second["ours"]
    assert row.mode == "forward+backward" and set(row.images_a_second) == {"ours"}
    assert row.share["ours"] == pytest.approx(3 * 2e9 * row.gflops * speed / 1e12)


def test_unknown_model(capsys):
    with pytest.raises(SystemExit):
        bench.parse(["davit_tiny"])
    assert "no model is called davit_tiny" in capsys.readouterr().err


@pytest.mark.parametrize("name", bench.TWINS)
def test_twins_have_the_same_parameters(name):
    """But for classifiers and buffers, a twin is the same architecture."""
    with torch.device("meta"):
        twin = bench.TWINS[name][1]()
    assert sum(p.numel() for p in twin.parameters()) == pytest.approx(parameters(name), rel=2e-3)


def test_default_models_exist():
    assert set(bench.DEFAULT) <= set(variants())
