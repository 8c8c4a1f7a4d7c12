"""Several machines, one run: what they need to share, and what is said where they do not."""

import os
import shutil
from pathlib import Path

import pytest
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from children import lost_after, newest, train_here
from ranks import FSDP, SHARED, on_ranks
from recipes import checkpoint, distributed
from recipes.run import RunError


def machine(folder: Path, *overrides: str) -> None:
    """Train as one of two machines with a disk each, in the same folder by name."""
    os.environ["LOCAL_RANK"] = "0"
    os.chdir(folder / os.environ["RANK"])
    train_here(Path("runs"), *SHARED, *overrides)


@pytest.fixture
def disks(tmp_path):
    for rank in ("0", "1"):
        (tmp_path / rank / "runs").mkdir(parents=True)
    return tmp_path


def refused(disks: Path, *overrides: str) -> str:
    """What both processes say, each of them the same."""
    first, second = on_ranks(2, machine, disks, *overrides)
    assert type(first) is type(second) is RunError and str(first) == str(second)
    assert "must lie in a folder that all machines share, under the same path" in str(first)
    return str(first)


def contents(disk: Path) -> set[str]:
    return {path.name for path in disk.rglob("*") if path.is_file()}


@pytest.mark.parametrize("before", [False, True], ids=["none", "older"])
def test_a_sharded_run_needs_a_shared_folder(runs, disks, before):
    if before:  # a run of that name, on both
        for rank in ("0", "1"):
            lost_after(3, runs / "fsdp", disks / rank / "runs" / "run")
        (disks / "1" / "runs" / "run" / "sessions.jsonl").write_text("")
    said = refused(disks, FSDP, "name=run", "resume=auto")
    assert f"{disks / '1' / 'runs' / 'run'} is not the folder that the first process sees" in said
    assert said.startswith("on rank 1, ") and "or set hardware.parallel=ddp" in said
    assert (disks / "0" / "runs" / "run" / "config.yaml").exists() == before  # the name of a new one stays free
    if not before:
        assert not contents(disks / "1")


def test_a_checkpoint_that_another_machine_lacks_is_not_resumed(runs, disks):
    lost_after(3, runs / "ddp", disks / "0" / "runs" / "run")
    missing = f"{disks / '1' / 'runs' / 'run' / 'checkpoints' / 'step-00000003'} is missing, or not the checkpoint"
    assert missing in refused(disks, "name=run", "resume=auto")
    other = lost_after(3, runs / "alone", disks / "1" / "runs" / "run")
    assert missing in refused(disks, "name=run", "resume=auto")
    shutil.rmtree(other)
    shutil.copytree(disks / "0" / "runs" / "run", other)  # the same files do as well
    assert on_ranks(2, machine, disks, "name=run", "resume=auto") == [None, None]
    assert newest(disks / "0" / "runs" / "run").state["step"] == 6


@pytest.mark.parametrize("typed", [["name=run", "resume=auto"], ["name=run"], ["resume=auto"]], ids=" ".join)
def test_a_run_of_another_machine_is_not_begun_again(runs, disks, typed):
    lost_after(3, runs / "ddp", disks / "1" / "runs" / "run")
    said = refused(disks, *typed)
    assert f"{disks / '1' / 'runs' / 'run'} holds a run, which the first process does not see" in said
    assert not contents(disks / "0")


def elsewhere(out: Path) -> None:
    """From the second checkpoint on the second process writes to a disk of its own."""
    written = FileSystemWriter.write_data

    def function(self, plan, planner):
        if distributed.rank() == 1 and "step-00000006" in str(self.path):
            self.path = out / "elsewhere"
            self.path.mkdir()
        return written(self, plan, planner)

    FileSystemWriter.write_data = function
    train_here(out, *SHARED, FSDP, "name=run")


def test_shards_that_go_elsewhere_make_no_checkpoint(tmp_path):
    ended = on_ranks(2, elsewhere, tmp_path)
    assert [type(end) for end in ended] == [checkpoint.CheckpointError] * 2
    for end in map(str, ended):
        assert "__1_0.distcp is missing; do all machines still share the run's folder?" in end and "is intact" in end
    assert newest(tmp_path / "run").state["step"] == 3
