"""Freed memory that is kept; in processes of their own, since it cannot be taken back."""

import subprocess
import sys

import pytest

# pages that the system had to map for tensors of 64 MiB, ten times, after the first
CODE = """
import resource, torch
from zoo.allocator import keep_freed_memory
granted = keep_freed_memory() if {kept} else False
torch.ones(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(2**24)
print(granted, (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * resource.getpagesize())
"""


def run(kept: bool) -> tuple[bool, int]:
    out = subprocess.run([sys.executable, "-c", CODE.format(kept=kept)], capture_output=True, text=True, check=True)
    granted, size = out.stdout.split()
    return granted == "True", int(size)


def test_tensors_are_not_mapped_anew():
    granted, mapped = run(kept=True)
    if not granted:
        pytest.skip("this C library cannot keep what is freed")
    assert mapped < run(kept=False)[1] / 4
