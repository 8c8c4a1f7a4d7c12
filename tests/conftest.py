"""Shared by all tests."""

import os

# two test processes on two cores, each with its own threads, would wait for each other most of the time
os.environ.setdefault("OMP_NUM_THREADS", "1")

import gc
import signal
import tempfile
import zlib
from pathlib import Path

import pytest
import torch
from torch.jit import _builtins

# a shell starts background jobs with Ctrl-C ignored, and a test that waits for it would wait for ever
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)


def cpu_kind():
    """What code for this CPU depends on: the width that torch vectorises to, and the instructions there are."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(errors="replace").splitlines() if info.exists() else []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{torch.backends.cpu.get_cpu_capability()}_{zlib.crc32(flags.encode()):08x}"


# inductor's cache does not tell CPUs apart: what was generated for 8 numbers at once corrupts memory where 16 are taken
kept = Path(tempfile.gettempdir(), f"torchinductor_{os.getuid()}_{cpu_kind()}")
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(kept))
# its first pass is where autograd starts threads; among fake devices it would start some that no process can fork with
torch.ones((), requires_grad=True).backward()
pytest.register_assert_rewrite("builds", "children", "elsewhere", "published", "ranks")

# TorchScript knows operators by the id of a function, also of one that is gone: whatever gets its id is taken for it
KEPT, register = [], _builtins._register_builtin


def keep(function, name):
    KEPT.append(function)
    register(function, name)


_builtins._register_builtin = keep


def pytest_collection_finish() -> None:
    """Modules and tests, half a million objects, live to the end: no collection need look at them again."""
    gc.freeze()


@pytest.fixture
def own_caches(monkeypatch, tmp_path):
    """Indices, listings and converted tables go to a folder of the test's own."""
    import datasets

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "huggingface")


@pytest.fixture
def source():
    """A model whose weights are written to a file."""
    from builds import NAME, small, trained

    return trained(small(NAME))


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """One process, two that share the batch, two that share the parameters as well."""
    from children import note_overrides, train_here
    from ranks import FSDP, SHARED, on_ranks

    out = tmp_path_factory.mktemp("out")
    train_here(out, *SHARED, "name=alone")
    assert on_ranks(2, train_here, out, *SHARED, "name=ddp") == [None, None]
    assert on_ranks(2, train_here, out, *SHARED, FSDP, "name=fsdp") == [None, None]
    for name in ("alone", "ddp", "fsdp"):  # these were begun without a command line
        own = [FSDP] if name == "fsdp" else []
        note_overrides(out / name, [*SHARED, *own])
    return out


@pytest.fixture(scope="session")
def two_runs(tmp_path_factory):
    """Two runs that differ in seed and rate."""
    from children import QUICK, train_here

    folder = tmp_path_factory.mktemp("two")
    train_here(folder, *QUICK, "name=one")
    train_here(folder, *QUICK, "name=two", "seed=3", "optim.lr=0.01")
    return folder
