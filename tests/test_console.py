"""What commands print where it cannot be written or encoded."""

import io
import os
import sys
from pathlib import Path

import pytest
from rich.table import Table

from recipes import compare, console, eval_results, train
from zoo.errors import first_line


def test_output_that_cannot_be_written_is_an_error_unless_it_is_optional(capfd):
    with pytest.raises(OSError, match="No space left"):
        console.Output(file=open("/dev/full", "w")).print("needed")  # noqa: SIM115 (its buffer cannot be written)
    read, written = os.pipe()
    os.close(read)
    for end, why in ((os.open("/dev/full", os.O_WRONLY), "No space left on device"), (written, "Broken pipe")):
        output = console.Output(file=open(end, "w"))  # noqa: SIM115
        output.optional = True
        for line in range(2):
            output.print(line)
        output.file.close()  # as an exit does
        said = capfd.readouterr().err
        assert said.count("nothing more is printed, because standard output cannot be written: ") == 1 and why in said


def test_what_cannot_be_encoded_is_replaced(tmp_path, monkeypatch):
    with open(tmp_path / "log", "w", encoding="latin-1") as file:
        monkeypatch.setattr(sys, "stdout", file)
        console.replace_what_cannot_be_encoded()
        console.say("shortened… ±")
    assert (tmp_path / "log").read_text("latin-1") == "shortened? ±\n"


def test_names_are_printed_whole(monkeypatch):
    """Brackets are no markup, and words between colons no pictures: in lines, in titles and in cells."""
    name = "[b]:car:"
    monkeypatch.setattr(console.CONSOLE, "_file", file := io.StringIO())
    monkeypatch.setattr(console.CONSOLE, "quiet", False)
    console.say(name)
    console.CONSOLE.print(Table(name, title=name))
    figures = {"name": name, "model": "m", "img_size": 64, "top1": 80.0, "top1_interval": (79.0, 81.0)}
    for several in ([figures], [figures, figures]):
        eval_results.show(several, ["top1"], name)
    line = {"step": 1, "val_top1": 1.0}
    compare._print([compare.Row(Path(), {}, [line], "top1", line, name=name)], [], name)
    assert file.getvalue().count(name) == 9


def test_a_note_is_not_worth_an_error(monkeypatch):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr("sys.stderr", full)
        for _ in range(2):
            console.note("nobody reads this")
        with open(os.devnull) as nowhere:
            assert os.path.sameopenfile(full.fileno(), nowhere.fileno())


def test_help_may_be_cut_off(monkeypatch):
    """As by `--help | head -1`."""
    read, written = os.pipe()
    os.close(read)
    monkeypatch.setattr(sys, "argv", ["train.py", "--help"])
    with open(written, "w") as file:
        monkeypatch.setattr(sys, "stdout", file)
        train.main()


def test_an_error_without_a_message_is_told_by_its_type():
    assert first_line(OSError("\n no such host\nmore")) == "no such host"
    assert first_line(TimeoutError()) == first_line(TimeoutError("\n")) == "TimeoutError"


def test_progress_is_only_drawn_on_a_terminal(monkeypatch):
    for terminal in (False, True):
        monkeypatch.setattr(console, "CONSOLE", console.Output(file=io.StringIO(), force_terminal=terminal))
        assert list(console.tracked(iter("abc"), 3, "reading")) == ["a", "b", "c"]
        assert ("reading" in console.CONSOLE.file.getvalue()) == bool(console.CONSOLE.file.getvalue()) == terminal
