"""`python -m recipes.data.bench`: where it writes what it measured."""

import shlex

import pytest

from recipes.data import bench
from recipes.data.speed import Rates

CASE = "500x375 at 224, archives"


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """Nothing is: these are the rates of every case."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(bench, "rates", lambda *_: Rates(32, 0, 96, {"ours": 120.4}))


def test_a_folder_that_is_missing_is_made(measured, monkeypatch, capsys, tmp_path):
    out = tmp_path / "some" / "folder"
    given = ["--scale", "0.05", "--workers", "0", "--out", str(out), "--cases", CASE]
    monkeypatch.setattr("sys.argv", ["bench", *given])
    bench.main()
    text = (out / "data_cpu.md").read_text()
    assert text.strip() in capsys.readouterr().out and f"| {CASE} | 96 | 120 | - | - | - |" in text
    (command,) = (line.removeprefix("- command: ") for line in text.splitlines() if line.startswith("- command: "))
    assert shlex.split(command) == ["python", "-m", "recipes.data.bench", *given]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--scale", "0"], "--scale: 0: expected a number above 0"),
        (["--seconds", "nan"], "--seconds: nan: expected a number above 0"),
        (["--workers", "-1"], "--workers: invalid choice: -1"),
        (["--out", "/dev/null"], "cannot write to /dev/null"),
    ],
)
def test_what_cannot_be_measured_or_written_is_said_first(monkeypatch, capsys, given, said):
    monkeypatch.setattr(bench, "write", lambda *_: pytest.fail("it began"))
    monkeypatch.setattr("sys.argv", ["bench", *given])
    with pytest.raises(SystemExit) as end:
        bench.main()
    assert end.value.code == 2 and said in capsys.readouterr().err
