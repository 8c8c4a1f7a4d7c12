"""Limits on processes: data workers that cannot be started, or have no room for their threads, end a run in words."""

import errno
import os
import threading

import pytest

from recipes.data import DataError
from source_cases import all_of, make


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.ENOMEM])
def test_a_worker_that_cannot_be_started(monkeypatch, number):
    """As where a limit on processes, or on memory, is reached."""
    source = make().val

    def limited():
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fork", limited)
    with pytest.raises(DataError, match=r"to read the validation set of digits cannot be started: .*ulimit -u"):
        all_of(source, workers=2)
    assert not source.idle


def test_a_worker_that_may_have_no_thread(monkeypatch, capfd):
    """As where a limit on processes leaves room for it alone; it ends, and is not waited for."""
    source, parent, start = make().val, os.getpid(), threading.Thread.start

    def limited(thread):
        if os.getpid() != parent:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)
    with pytest.raises(DataError, match=r"a process reading the validation set of digits died: .*data\.workers"):
        all_of(source, workers=1)
    assert "a process that reads data ends: can't start new thread; raise the limit" in capfd.readouterr().err
