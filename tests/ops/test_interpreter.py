"""The kernels under Triton's interpreter: the variable is read when a kernel is defined, hence a child process."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SUITE = [Path(__file__).with_name(name) for name in ("test_kernels.py", "test_kernel_calls.py")]
# what a child runs, shared among the workers of a test run: about as much each, all together everything
OPS = ["window_attention", "neighborhood_attention"]
CHOSEN = [f"{op} and {other}float16" for op in OPS for other in ("", "not ")]
CHOSEN.append(" and ".join(f"not {op}" for op in OPS))

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="the package triton is not installed"
)


@pytest.mark.parametrize("chosen", CHOSEN)
def test_kernels(chosen):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen, *map(str, SUITE)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    child = subprocess.run(command, env=environment, cwd=SUITE[0].parents[2], capture_output=True, text=True)
    assert child.returncode == 0, child.stdout[-4000:] + child.stderr[-2000:]
    assert re.search(r"\b[1-9]\d* passed", child.stdout), child.stdout[-400:]
