"""The provenance of a run: sessions.jsonl has a line for every start, with command, versions and git state."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import secrets
import shlex
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

from recipes import config, distributed, shell
from recipes.checkpoint import flush
from recipes.console import say
from recipes.log import history

PACKAGES = (
    *("attention-backbones", "torch", "timm", "triton", "torchvision", "torchmetrics", "datasets", "hydra-core"),
    *("numpy", "safetensors"),
)
SESSIONS = "sessions.jsonl"
SWEEP = "RECIPES_SWEEP"  # environment variable: the sweep that a run belongs to


def sessions(folder: Path) -> list[dict[str, Any]]:
    """Every start of the run, except lines that a full disk or a power cut left unreadable."""
    return [start for start in history(folder / SESSIONS) if "overrides" in start]


def first_session(folder: Path) -> dict[str, Any]:
    """How the run was started."""
    return sessions(folder)[0]


def first_overrides(folder: Path) -> list[str]:
    """What was typed to start the run."""
    return first_session(folder)["overrides"]


def note_session(folder: Path, overrides: list[str], step: int, device: str, taught: int | None = None) -> None:
    """Append this start of the run, which continues from `step`, on the `device` of the configuration.

    taught  a checksum of the teacher's weights, if there is a teacher
    """
    line = {
        "id": secrets.token_hex(4),  # the first one identifies the run: another run may have the same folder name
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "from_step": step,
        "command": shlex.join(shell.typed()),
        "overrides": overrides,
        "searched": config.searched(),
        "sweep": os.environ.get(SWEEP),
        "python": platform.python_version(),
        "machine": platform.platform(),
        "device": named(device),
        "threads": torch.get_num_threads(),
        "processes": distributed.size(),
        "job": distributed.job(),
        "agents": distributed.agents(),
        "versions": versions(),
        "git": _git(),
        "teacher": taught,
    }
    if step and (before := first_session(folder).get("threads")) not in (None, line["threads"]):
        say(f"started with {before} CPU threads, resumed with {line['threads']}: last digits may differ", "yellow")
    if step and sessions(folder)[-1].get("teacher") not in (None, taught):
        say("the teacher's weights are not those of the last start: the result differs from here on", "yellow")
    path = folder / SESSIONS
    cut_off = path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")  # a line that was not written completely
    with open(path, "a") as file:
        file.write("\n" * cut_off + json.dumps(line) + "\n")
        flush(file)


def versions() -> dict[str, str]:
    """Versions of the packages that a result may depend on."""
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return {**found, "torch": torch.__version__}  # with its build: CUDA, ROCm or CPU


def named(device: str) -> str:
    """The GPU's name if a run on `device` (auto, cpu, cuda, cuda:1) uses one, else the CPU architecture."""
    on_gpu = device.startswith(("auto", "cuda")) and torch.cuda.is_available()
    return torch.cuda.get_device_name(None if device == "auto" else device) if on_gpu else platform.machine()


def _git(here: Path = Path(__file__).parent) -> dict[str, Any] | None:
    """Commit and changed files of the checkout that this code runs from; None without one."""

    # this checkout's code is run already: git may trust it, whoever owns it, but no other one around an installation
    git = ["git", "-c", f"safe.directory={here.resolve().parent}"]

    def ask(*words: str) -> str:
        return subprocess.run([*git, *words], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        ask("ls-files", "--error-unmatch", "__init__.py")  # installed, it may lie in a repository of somebody else's
        return {"commit": ask("rev-parse", "HEAD"), "changed": ask("status", "--porcelain").splitlines()}
    except subprocess.CalledProcessError as error:
        if "safe.directory" in error.stderr:  # in git's advice, whatever the language
            say(f"the commit of this code is not recorded: git refuses to read it: {error.stderr.strip()}", "yellow")
        return None  # not from a checkout
    except OSError:
        return None  # without git
