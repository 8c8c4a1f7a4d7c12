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


# MiB that a data worker holds with a small image, after a large one, and with a small one again
WORKER = """
import numpy as np, resource
from PIL import Image
from recipes.data import Source, batches
from zoo.allocator import keep_freed_memory

class Records:
    labels = np.zeros(3, np.int64)

    def image(self, index):
        return Image.new("RGB", (10_000, 10_000) if index == 1 else (9, 9)).resize((8, 8))

class Held(Source):
    def label(self, index):
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize() >> 20

    def collate(self, samples):
        return [], [held for _, held in samples]

    def finish(self, images):
        return images

granted = keep_freed_memory()
source = Held(Records(), lambda image: image, name="three images", seed=0)
print(granted, *(held for _, (held,) in batches(source, batch_size=1, seed=0, epoch=0, train=False, workers=1)))
"""


def test_a_data_worker_gives_a_large_image_back():
    out = subprocess.run([sys.executable, "-c", WORKER], capture_output=True, text=True, check=True)
    granted, before, _, after = out.stdout.split()
    if granted != "True":
        pytest.skip("this C library cannot keep what is freed")
    assert int(after) - int(before) < 100  # of 381; glibc by itself keeps up to 64
