"""The benchmark runs, checks agreement, and writes what it says it writes."""

import json

import pytest
import torch

from ops import bench


def test_writes_its_table(tmp_path, capsys):
    bench.main(
        [
            "window_attention",
            "--cases",
            "block 7x7",
            "--peers",
            "timm",
            "sdpa",
            "--batch",
            "2",
            "--repeats",
            "1",
            "--out",
            str(tmp_path),
            "--json",
            str(tmp_path / "numbers.json"),
        ]
    )
    text = (tmp_path / "window_attention_cpu.md").read_text()
    assert text in capsys.readouterr().out
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert numbers == json.loads((tmp_path / "window_attention_cpu.json").read_text())
    assert [row["mode"] for row in numbers["rows"]] == ["forward", "forward+backward"]
    for row in numbers["rows"]:
        assert set(row["ms"]) == {"ours", "timm", "sdpa"} and min(row["ms"].values()) > 0 and not row["missing"]
        assert set(row["mib"]) == {"ours", "timm", "sdpa"} and min(row["mib"].values()) > 0
        assert f"{row['ms']['ours'] / row['ms']['timm']:.2f}" in text
    for fact in ("date", "device", "versions", "command"):
        assert numbers[fact] and f"- {fact}: {numbers[fact]}" in text


def test_a_peer_that_disagrees_is_not_timed(monkeypatch):
    make = bench.OPS["window_attention"].peers

    def wrong(**settings):
        x, module, peers = make(**settings)
        return x, module, {"ours": peers["ours"], "wrong": lambda x: 1.01 * peers["ours"](x)}

    op = bench.Op(cases=bench.OPS["window_attention"].cases, peers=wrong, about="")
    row = bench.measure(
        op, "block 7x7x512 window 7", "forward", batch=1, repeats=1, device="cpu", dtype=torch.float32, only=None
    )
    assert set(row.ms) == {"ours"} and "disagrees: relative error 1.0e-02" in row.missing["wrong"]
    assert "wrong, forward: not timed, disagrees" in bench.table([row])


def test_unknown_op_is_refused(capsys):
    with pytest.raises(SystemExit):
        bench.main(["windw_attention"])
    assert "window_attention" in capsys.readouterr().err


def test_the_most_that_is_held_is_counted():
    def run():
        first = torch.ones(2**20)
        second = first + 1
        del first
        third = second + 1
        del second
        return third

    assert bench.held(run) == pytest.approx(8, abs=0.01)  # MiB of two tensors at a time


def test_the_memory_of_each_peer_is_in_the_table():
    row = bench.Row("case", "forward", ms={"ours": 2.0, "other": 8.0}, mib={"ours": 3.0, "other": 30.0})
    assert bench.table([row]).splitlines()[-1] == "| case | forward | 2.00 (3 MiB) | 8.00 (30 MiB) | 0.25 (0.10) |"


def test_a_case_may_have_a_batch_of_its_own():
    case = "42x35x256 top 16, one image"
    settings = {"repeats": 1, "device": "cpu", "dtype": torch.float32, "only": None}
    row = bench.measure(bench.OPS["routed_attention"], case, "forward+backward", batch=64, **settings)
    # not a map of 64 images
    assert row.mib["ours"] < min(row.mib["gathered"], row.mib["sdpa"]) < 200 and not row.missing
