"""How commands end where nobody reads what they print, where it cannot be written, and where they are interrupted."""

import errno
import inspect
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ops.tool import ToolError, overwrite, replaced, tool, writable


def printing(monkeypatch, end, buffered, then=None, text="a line"):
    """What becomes of a command that prints to this file, or only puts it into the buffer, and ends with `then`."""

    @tool
    def main(text):
        print(text, flush=not buffered)
        if then is not None:
            raise then
        return 0

    with monkeypatch.context() as patch, os.fdopen(end, "w") as file:
        patch.setattr("sys.stdout", file)
        return main(text)


def pipe_without_reader():
    reader, writer = os.pipe()
    os.close(reader)
    return writer


@pytest.mark.parametrize("buffered", [False, True])
def test_nobody_reads(monkeypatch, capfd, buffered):
    with pytest.raises(SystemExit) as end:
        printing(monkeypatch, pipe_without_reader(), buffered)
    assert end.value.code == 141 and capfd.readouterr() == ("", "")


@pytest.mark.parametrize("lines", [1, 100_000])  # more than the buffer takes is lost from it
@pytest.mark.parametrize("buffered", [False, True])
def test_a_full_disk_under_the_output(monkeypatch, capfd, buffered, lines):
    with pytest.raises(SystemExit) as end:
        printing(monkeypatch, os.open("/dev/full", os.O_WRONLY), buffered, text=lines * "a line\n")
    said = f"standard output cannot be written: {os.strerror(errno.ENOSPC)}"
    assert (end.value.code, str(end.value)) == (2, said) and capfd.readouterr().err == f"error: {said}\n"


@pytest.mark.parametrize(("then", "code"), [(SystemExit("wrong"), "wrong"), (KeyboardInterrupt(), 130)])
def test_why_it_ended_counts_more(monkeypatch, capfd, then, code):
    with pytest.raises(SystemExit) as end:
        printing(monkeypatch, pipe_without_reader(), True, then)
    assert end.value.code == code and capfd.readouterr() == ("", "")


def test_other_errors_are_its_own(monkeypatch, tmp_path):
    """Also one of the same kind, about another file."""
    with open(tmp_path / "said", "w") as file, pytest.raises(OSError, match=r"No space left on device: 'model\.pth'"):
        given = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "model.pth")
        printing(monkeypatch, os.dup(file.fileno()), True, given)
    assert (tmp_path / "said").read_text() == "a line\n\n"


def test_a_file_that_cannot_be_written(monkeypatch, tmp_path, capsys):
    @tool
    def main():
        overwrite(tmp_path / "folder" / "page.md", "text")

    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    said = f"error: could not write {tmp_path / 'folder' / 'page.md'}: [Errno 2] No such file or directory"
    assert capsys.readouterr().err.startswith(said)


STARTS = """
import os, runpy, sys, time
end_with, parent = runpy.run_path(sys.argv[1])["end_with"], os.getpid()
if worker := os.fork():
    print(worker, flush=True)
else:
    end_with(parent)
time.sleep(600)
"""


def test_processes_end_with_the_command_that_started_them():
    """Whatever killed it: nobody gives them work or takes their results any more."""
    parent = subprocess.Popen([sys.executable, "-c", STARTS, inspect.getfile(tool)], stdout=subprocess.PIPE, text=True)
    worker = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    end = time.monotonic() + 60
    while Path(f"/proc/{worker}").exists() and "(zombie)" not in Path(f"/proc/{worker}/status").read_text():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_what_cannot_be_encoded_is_replaced(monkeypatch, tmp_path):
    with open(tmp_path / "said", "w", encoding="ascii") as file, monkeypatch.context() as patch:
        patch.setattr("sys.stdout", file)
        tool(print)("n\xe4m")
    assert (tmp_path / "said").read_text() == "n?m\n"


def test_what_it_returns_is_given_back(monkeypatch):
    assert printing(monkeypatch, os.open(os.devnull, os.O_WRONLY), True) == 0
    monkeypatch.setattr("sys.stdout", None)  # as where a shell closed it
    assert tool(lambda: 3)() == 3


def test_what_is_no_file_stays_what_it_is(tmp_path):
    """A rename would put a file in its place, also in that of a device."""
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path / "pipe", tmp_path):
        with pytest.raises(OSError, match="is a folder, a pipe or a device: give the name of a file"), replaced(place):
            pytest.fail("before it is written")
        with pytest.raises(ToolError, match=f": {place} is a folder, a pipe") as end:
            writable(tmp_path, place)
        assert end.value.code == 2
    assert (tmp_path / "pipe").is_fifo() and os.listdir(tmp_path) == ["pipe"]
