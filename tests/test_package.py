"""What the packages need, and that they need no more."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
TRAINING = (
    "hydra",
    "omegaconf",
    "datasets",
    "wandb",
    "sklearn",
    "matplotlib",
    "rich",
    "torchmetrics",
    "pyarrow",
    "pycocotools",
)


def imported(statement, *without):
    """Run `statement` in a new process where importing one of `without` is an error; our packages that it loaded."""
    blocked = f"import sys; sys.modules.update(dict.fromkeys({without!r}))"
    report = "print([name for name in ('zoo', 'ops', 'recipes') if name in sys.modules])"
    code = f"{blocked}\n{statement}\n{report}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_zoo_needs_torch_torchvision_and_timm():
    statement = "import timm, zoo; timm.create_model('maxvit_t', device='meta')"
    assert imported(statement, *TRAINING, "triton", "onnx", "pytest") == "['zoo', 'ops']"


def test_ops_need_torch():
    assert imported("import ops", *TRAINING, "triton", "timm", "torchvision", "safetensors") == "['ops']"


def test_importing_downloads_nothing():
    statement = (
        "import socket\n"
        "def refuse(*args, **kwargs): raise AssertionError('a connection while importing')\n"
        "socket.socket.connect = refuse\n"
        "import zoo, recipes.data, recipes.config"
    )
    assert imported(statement) == "['zoo', 'ops', 'recipes']"
