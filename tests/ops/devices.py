"""Where tests run the kernels: on a GPU, or on a CPU under Triton's interpreter (test_interpreter.py)."""

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
needs_kernels = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="no GPU; test_interpreter.py runs these")
