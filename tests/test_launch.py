"""What processes are told when they are started, and what they say where that is half of it."""

import os
import socket

import pytest

from recipes import config, distributed, train
from recipes import eval as evaluation
from recipes.config import ConfigError


@pytest.mark.parametrize("command", [train, evaluation])
def test_a_job_can_be_sent_to_another_machine(command):
    """Slurm's launcher pickles the function that a command calls, by value."""
    cloudpickle = pytest.importorskip("cloudpickle")
    assert len(cloudpickle.dumps(command.main.__wrapped__)) > 100


@pytest.mark.parametrize("call", [(os._exit, 1), (divmod, 1, 0)], ids=["killed", "failed"])
def test_a_job_without_a_result(tmp_path, monkeypatch, call):
    """The message names its log; what it has in it is not repeated."""
    submitit = pytest.importorskip("submitit")
    monkeypatch.setattr(submitit.LocalJob, "_results_timeout_s", 0)
    job = submitit.LocalExecutor(tmp_path / "the logs").submit(*call)
    said = config._explained(job.exception(), "train", ())
    assert said.startswith(f"a job of this sweep ended without a result, see {job.paths.stderr}. Others may")
    assert said.endswith("; the same command with name= and resume=auto resumes those that stopped")
    assert config._explained(job.exception(), "eval", ()).endswith("Others may still be running")


def test_a_launcher_that_cannot_start_jobs(tmp_path, monkeypatch):
    submitit = pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(RuntimeError) as error:
        submitit.SlurmExecutor(tmp_path).submit(divmod, 1, 1)
    assert "there is no srun on this machine: start it where there is" in config._explained(error.value, "train", ())
    failed = submitit.core.utils.FailedJobError("sbatch: error: invalid partition\nmore")
    said = "a job of this sweep could not be started: sbatch: error: invalid partition"
    assert config._explained(failed, "train", ()) == said
    missing = ModuleNotFoundError("No module named 'submitit'", name="submitit")
    assert "needs the package submitit, which is not installed" in config._explained(missing, "train", ())
    assert config._explained(RuntimeError("other"), "train", ()) is None


@pytest.mark.parametrize("given", [("RANK", "LOCAL_RANK"), ("RANK", "MASTER_ADDR", "MASTER_PORT")])
def test_a_launch_that_says_half_is_no_run_of_one(monkeypatch, given):
    for name in ("WORLD_SIZE", *given):
        monkeypatch.setenv(name, "2")
    missing = ", ".join(name for name in distributed.LAUNCHED if name not in ("WORLD_SIZE", *given))
    with pytest.raises(ConfigError, match=f"WORLD_SIZE=2, but {missing} is not set"):
        distributed.join(config.compose())


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"WORLD_SIZE": "two", "MASTER_PORT": "-1"}, "whole numbers .*, got WORLD_SIZE=two, MASTER_PORT=-1"),
        ({"RANK": "2"}, "RANK=2, WORLD_SIZE=2: .* RANK must be below"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR=, MASTER_PORT=29500: expected the name or address"),
        ({"MASTER_PORT": "999999"}, "MASTER_PORT=999999: .* port that is free there, up to 65535"),
    ],
)
def test_numbers_that_no_launcher_gives(monkeypatch, wrong, said):
    where = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in (where | wrong).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=said):
        distributed.join(config.compose())


@pytest.mark.parametrize("executor, missing", [("slurm", "SLURM_JOB_ID"), ("local", "SUBMITIT_LOCAL_JOB_ID")])
def test_a_variable_that_a_job_of_submitit_has_left(monkeypatch, executor, missing):
    pytest.importorskip("submitit")
    monkeypatch.setenv("SUBMITIT_EXECUTOR", executor)
    with pytest.raises(ConfigError, match=f"SUBMITIT_EXECUTOR={executor} is set, but .*{missing}.*: unset SUBMITIT"):
        distributed.join(config.compose())


def test_tasks_of_srun_without_a_launcher_are_named(monkeypatch, capsys):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    distributed.join(config.compose())
    assert "srun has started 8 processes of this command, and each is a separate run" in capsys.readouterr().out
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    distributed.join(config.compose())
    assert capsys.readouterr().out == "" and distributed.size() == 1


def test_a_port_that_is_taken_is_said_to_be(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        where = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in where.items():
            monkeypatch.setenv(name, str(value))
        said = rf"of 2 could not connect to the others at 127.0.0.1, port {port} .*within hardware.timeout=3 s.*in use"
        with pytest.raises(ConfigError, match=said):
            distributed.join(config.compose(["hardware.timeout=3"]))
