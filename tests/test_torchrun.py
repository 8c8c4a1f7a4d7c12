"""torchrun and Slurm's launcher as users meet them: a lost process, a full disk, a stop."""

import contextlib
import os
import re
import resource
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from children import ROOT, finish, lines, start, trained, wait_for
from ranks import SHARED, torchrun, weights
from recipes import checkpoint, config

SHARED_LONG = [*SHARED, "train.steps=12", "train.eval_every=1"]


def worker(launcher: int, rank: int, variable: str = "RANK") -> int:
    """The process of a rank that torchrun, or another launcher with another variable, has started."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == launcher and f"{variable}={rank}" in (folder / "environ").read_text().split("\0"):
                return int(folder.name)
        except OSError:  # it has ended
            continue
    raise AssertionError(f"rank {rank} is not there")


def ranks_of(launcher: int) -> list[int]:
    """The ranks of the processes that torchrun has started."""
    found = []
    for rank in (0, 1):
        with contextlib.suppress(AssertionError):
            worker(launcher, rank)
            found.append(rank)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_lost_process_is_started_again(tmp_path, rank):
    """A run without a name, so that its new processes have to find it."""
    whole = torchrun("train.py", *SHARED_LONG, "out=whole", cwd=tmp_path)
    output = finish(whole)
    assert whole.returncode == 0, output
    hurt = torchrun("train.py", *SHARED_LONG, "out=hurt", cwd=tmp_path, options=("--max-restarts=3",))
    wait_for(hurt, lambda: any(trained(run, 5) for run in (tmp_path / "hurt").glob("*")))
    os.kill(worker(hurt.pid, rank), signal.SIGKILL)
    output = finish(hurt)
    assert hurt.returncode == 0, output
    assert "resuming hurt/" in output
    (run,), (other,) = (list((tmp_path / out).iterdir()) for out in ("hurt", "whole"))
    files = {path.relative_to(other) for path in other.rglob("*.safetensors")}
    assert len(files) >= 5 and files == {path.relative_to(run) for path in run.rglob("*.safetensors")}
    for file in files:
        assert (run / file).read_bytes() == (other / file).read_bytes(), file
    assert len((run / "sessions.jsonl").read_text().splitlines()) == 2


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("localhost", port)) == 0


def agent(port: int, *overrides: str, cwd: Path) -> subprocess.Popen:
    """One of two machines with a process each; a new one may take the place of one that is lost."""
    place = ("--nnodes=2", "--nproc-per-node=1", "--max-restarts=3", "--rdzv-id=two", "--rdzv-backend=c10d",
             f"--rdzv-endpoint=localhost:{port}")  # fmt: skip
    return torchrun("train.py", *SHARED_LONG, "hardware.timeout=60", *overrides, cwd=cwd, place=place)


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["one", "other", "agent"])
def test_a_process_on_one_of_two_machines_is_lost(tmp_path, monkeypatch, victim):
    """Only the agent that has lost a process counts the restart, and one that joins counts none."""
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")  # else torch cannot take in a new agent
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    first = agent(port, "out=runs", cwd=tmp_path)
    wait_for(first, lambda: answers(port))  # where they meet: the other may be lost
    second = agent(port, "out=runs", cwd=tmp_path)
    wait_for(first, lambda: any(trained(run, 5) for run in (tmp_path / "runs").glob("*")))
    if victim == "agent":
        process = worker(second.pid, *ranks_of(second.pid))
        for number in (second.pid, process):
            os.kill(number, signal.SIGKILL)
        second = agent(port, "out=runs", cwd=tmp_path)
    else:
        hurt = first if victim == "one" else second
        os.kill(worker(hurt.pid, *ranks_of(hurt.pid)), signal.SIGKILL)
    outputs = [finish(child) for child in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0), outputs
    assert any("resuming runs/" in output for output in outputs)
    (run,) = (tmp_path / "runs").iterdir()
    assert [line["step"] for line in lines(run) if "loss" in line] == list(range(1, 13))
    assert len((run / "sessions.jsonl").read_text().splitlines()) == 2


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_full_disk_ends_all_with_one_message(tmp_path, parallel):
    child = torchrun("train.py", *SHARED_LONG, "train.steps=400", f"hardware.parallel={parallel}", "name=full",
                     cwd=tmp_path)  # fmt: skip
    checkpoints = tmp_path / "runs" / "full" / "checkpoints"
    wait_for(child, lambda: any(checkpoints.glob("step-*")))
    for rank in (0, 1):  # from here on no file may grow beyond 100 kB: the system's own error, as from a full disk
        resource.prlimit(worker(child.pid, rank), resource.RLIMIT_FSIZE, (100_000, 100_000))
    began = time.monotonic()
    output = finish(child)
    assert child.returncode != 0 and time.monotonic() - began < 60
    said = re.findall(r"^(?:rank \d+: )?error: .*", output, re.MULTILINE)
    assert len(said) == 1 and "could not write the checkpoint" in said[0], output
    assert "is intact" in output and not list(checkpoints.glob(".writing-*"))
    saved, problems = checkpoint.Store(checkpoints).newest()
    assert saved is not None and problems == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("out=file/runs", "cannot write to the run folder"),
        ("data.batch_size=33", "cannot be split"),
        ("optim.lrr=1", "optim.lr"),
    ],
)
def test_what_cannot_begin_is_said_once(tmp_path, override, message):
    (tmp_path / "file").write_text("in the way")
    child = torchrun("train.py", *SHARED, override, cwd=tmp_path)
    output = finish(child)
    assert child.returncode != 0
    assert output.count("error: ") == 1 and message in output, output


@pytest.mark.slow
def test_a_stop_saves_whatever_reads_the_data(tmp_path):
    """torchrun hands SIGTERM to the processes and to all that they have started."""
    child = torchrun("train.py", *SHARED, "train.steps=400", "data.workers=1", "name=stopped", cwd=tmp_path)
    run = tmp_path / "runs" / "stopped"
    wait_for(child, lambda: trained(run, 5))
    child.send_signal(signal.SIGTERM)
    output = finish(child)
    assert "resume with: python train.py resume=runs/stopped" in output, output
    saved, _ = checkpoint.Store(run / "checkpoints").newest()
    assert saved.state["step"] >= max(line["step"] for line in lines(run) if "loss" in line)


@pytest.mark.slow
def test_a_batch_script_puts_its_job_back_into_the_queue(tmp_path):
    """The one of docs/trouble.md, which Slurm warns of its end."""
    (script,) = re.findall(r"```text\n(#SBATCH.*?)```", (ROOT / "docs" / "trouble.md").read_text(), re.DOTALL)
    typed = "--nproc-per-node 8 train.py model=maxvit_t name=big resume=auto hardware=gpu"
    assert typed in script
    ours = shlex.join(["--nproc-per-node=2", str(ROOT / "train.py"), *SHARED, "train.steps=4000", "name=big"])
    torchrun = shlex.join([sys.executable, "-m", "torch.distributed.run", "--standalone"])
    script = script.replace(typed, ours).replace("torchrun ", f"{torchrun} ")
    queued = "scontrol() { echo queued again: $*; }\n"
    env = {**os.environ, "OMP_NUM_THREADS": "1", "SLURM_JOB_ID": "7"}
    command = ["bash", "-c", queued + script]
    child = subprocess.Popen(
        command, cwd=tmp_path, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    run = tmp_path / "runs" / "big"
    wait_for(child, lambda: trained(run, 5))
    child.send_signal(signal.SIGUSR1)
    output = finish(child)
    assert output.rstrip().endswith("queued again: requeue 7") and "resume with: " in output, output
    saved, _ = checkpoint.Store(run / "checkpoints").newest()
    assert saved.state["step"] >= max(line["step"] for line in lines(run) if "loss" in line)


@pytest.mark.slow
def test_a_job_of_the_launcher_is_one_run(tmp_path):
    """Slurm's launcher on this machine: submitit starts two processes, as it would on a cluster."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    launcher = ["hydra/launcher=submitit_local", "hydra.launcher.tasks_per_node=2", "hydra.launcher.timeout_min=5"]
    child = start("train.py", "-m", *launcher, "hydra.launcher.submitit_folder=logs", *SHARED, "name=job", cwd=tmp_path)
    output = finish(child)
    assert child.returncode == 0, output
    run = tmp_path / "runs" / "job-0"  # the first of a sweep
    assert len(weights(run)) and lines(run)[-1]["step"] == 6
    said = "".join(path.read_text() for path in (tmp_path / "logs").rglob("*_log.out"))
    assert said.count("4 micro-batches of 8, 2 on each of 2 processes (ddp)") == 1


@pytest.mark.slow
def test_a_job_of_the_launcher_saves_before_it_is_queued_again(tmp_path):
    """Slurm warns all processes of the time limit; submitit then queues the job again and ends it."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    launcher = ["hydra/launcher=submitit_local", "hydra.launcher.tasks_per_node=2", "hydra.launcher.timeout_min=5",
                "hydra.launcher.submitit_folder=logs"]  # fmt: skip
    job = ["name=job", "resume=auto", "train.steps=12", "train.eval_every=1"]
    child = start("train.py", "-m", *launcher, *SHARED, *job, cwd=tmp_path)
    run = tmp_path / "runs" / "job-0"
    wait_for(child, lambda: trained(run, 3))
    (controller,) = (path.name.partition("_")[0] for path in (tmp_path / "logs").glob("*_0_log.out"))
    for rank in (0, 1):
        os.kill(worker(int(controller), rank, "SUBMITIT_LOCAL_GLOBALID"), signal.SIGUSR2)
    output = finish(child)
    assert child.returncode == 0, output
    said = (tmp_path / "logs" / f"{controller}_0_log.out").read_text()
    assert "Requeued job" in said and "resuming runs/job-0 from step" in said
    assert [line["step"] for line in lines(run) if "loss" in line] == list(range(1, 13))  # none is repeated


def test_the_example_for_slurm_composes():
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    import hydra

    config.compose([])  # registers the models
    with hydra.initialize_config_module("recipes.conf", version_base="1.3"):
        overrides = ["hydra/launcher=slurm", "hydra.launcher.partition=gpu", "hydra.launcher.nodes=2"]
        cfg = hydra.compose("train", overrides, return_hydra_config=True).hydra.launcher
    assert cfg._target_.endswith("SlurmLauncher") and (cfg.partition, cfg.nodes) == ("gpu", 2)
    assert cfg.tasks_per_node == cfg.gpus_per_node == 8
    assert (ROOT / "recipes/conf/hydra/launcher/slurm.yaml").exists()
