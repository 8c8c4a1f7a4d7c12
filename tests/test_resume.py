"""A run that is killed and resumed ends with the weights, bit for bit, of one that was left alone."""

import errno
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException

from children import assert_same, evaluated, finish, no_space, start, succeed, train_here, trained, wait_for
from recipes import checkpoint, optim
from recipes.data.seeding import seed_all
from recipes.packing import unpack

# the default recipe (augmentation, Mixup, drop path, EMA) on the default model, made small
DEFAULT = [
    "model=maxvit_t", "model.stem_dim=16", "model.dims=[32,32,32,64]", "model.depths=[1,1,1,1]", "data.batch_size=32",
    "data.val_fraction=0.1", "data.workers=2", "train.accumulate=2", "train.steps=14", "train.eval_every=0.15",
    "train.save_every=4", "train.log_every=1",
]  # fmt: skip
STEP = 6  # of the first evaluation: 0.15 of 40 steps


def killed(run: Path, when: str) -> None:
    """Start or resume the run and kill it at a chosen moment, with no chance to tidy up."""
    child = start("train.py", *DEFAULT, f"name={run.name}", "resume=auto", cwd=run.parents[1])
    checkpoints = run / "checkpoints"
    moments = {
        "mid-epoch": lambda: trained(run, STEP - 1),
        "evaluation": lambda: trained(run, STEP),
        "save": lambda: any(checkpoints.glob(".writing-step-*")),
    }
    wait_for(child, moments[when])
    os.kill(child.pid, signal.SIGKILL)
    finish(child)
    assert child.returncode == -signal.SIGKILL
    if when == "save":
        assert any(checkpoints.glob(".writing-step-*")), "the save had ended before the kill"
    if when == "evaluation":
        assert not evaluated(run, STEP), "the evaluation had ended before the kill"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    train_here(folder, *DEFAULT, "name=whole")
    assert (folder / "whole" / "checkpoints" / "step-00000014").is_dir()
    return folder / "whole"


@pytest.mark.slow  # tests/test_lost.py kills at any moment; this one, at the three that matter
def test_killed_in_every_way_one_after_the_other(tmp_path, undisturbed):
    run = tmp_path / "runs" / "again"
    # the first has no checkpoint yet and begins anew
    for when in ("save", "mid-epoch", "evaluation", "save"):
        killed(run, when)
    # resume=<folder> alone takes the run's own configuration; another number of workers changes nothing
    output = succeed("train.py", "resume=runs/again", "data.workers=0", cwd=tmp_path)
    assert "resuming runs/again from step 4" in output
    assert_same(run, undisturbed)


def test_a_store_passes_over_all_that_is_not_whole(tmp_path):
    store = checkpoint.Store(tmp_path, keep=9)
    for step in (1, 2, 3, 4, 5):
        store.save(step, {"model": {"w": torch.full((4,), float(step))}}, {})
    (tmp_path / "step-00000005" / "model.safetensors").unlink()
    (tmp_path / "step-00000004" / "state.json").write_text('{"step": 4')
    with open(tmp_path / "step-00000003" / "model.safetensors", "r+b") as file:
        file.truncate(90)
    newest, problems = store.newest()
    assert newest.state["step"] == 2 and len(problems) == 3
    assert [name in problem for name, problem in zip("543", problems, strict=True)] == [True] * 3
    assert newest.tensors("model")["w"].tolist() == [2.0] * 4


def test_a_store_keeps_the_newest_and_one_best(tmp_path):
    store = checkpoint.Store(tmp_path, keep=2)
    for step in range(1, 6):
        store.save(step, {"model": {"w": torch.zeros(1)}}, {})
        if step in (1, 4):
            store.save(step, {"model": {"w": torch.zeros(1)}}, {}, best=True)
            assert len(list(tmp_path.glob("best-*"))) == 1
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["best-00000004", "step-00000004", "step-00000005"]


def test_a_best_one_replaces_that_of_a_later_step(tmp_path):
    """A run that goes on from an earlier step may find better weights before it comes to that step again."""
    store = checkpoint.Store(tmp_path)
    for step in (8, 7):
        assert store.save(step, {"model": {"w": torch.zeros(1)}}, {}, best=True).exists()
    assert [path.name for path in tmp_path.iterdir()] == ["best-00000007"]


@pytest.mark.parametrize("damaged", [True, False])
def test_a_best_one_of_the_same_step_is_replaced(tmp_path, damaged):
    """A run that goes on from before it measures that step again."""
    store = checkpoint.Store(tmp_path)
    path = store.save(4, {"model": {"w": torch.zeros(1)}}, {"metrics": {"top1": 1.0}}, best=True)
    if damaged:
        (path / "model.safetensors").write_bytes(b"")
    store.save(4, {"model": {"w": torch.ones(1)}}, {"metrics": {"top1": 2.0}}, best=True)
    found, problems = store.newest("best")
    assert found.tensors("model")["w"] == 1 and found.state["metrics"] == {"top1": 2.0} and not problems
    assert [path.name for path in tmp_path.iterdir()] == ["best-00000004"]


@pytest.mark.parametrize("new", [True, False])
def test_a_best_one_that_a_kill_left_half_replaced(tmp_path, monkeypatch, new):
    """Between two renames: the new one is whole then, under its temporary name; the old one, if there is only that."""
    store = checkpoint.Store(tmp_path)
    store.save(4, {"model": {"w": torch.zeros(1)}}, {}, best=True)
    rename = os.rename

    def killed(path, target):
        if Path(target).name == "best-00000004":
            raise KeyboardInterrupt
        rename(path, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "rename", killed)
        store.save(4, {"model": {"w": torch.ones(1)}}, {}, best=True)
    assert not list(tmp_path.glob("best-*"))
    if not new:
        checkpoint.shutil.rmtree(tmp_path / ".writing-best-00000004")
    store.clean()  # when the run is resumed
    found, problems = store.newest("best")
    assert found.tensors("model")["w"] == int(new) and not problems
    assert [path.name for path in tmp_path.iterdir()] == ["best-00000004"]


def test_a_step_of_another_run_is_replaced(tmp_path):
    """One that this process neither wrote nor resumed from may hold any weights."""
    checkpoint.Store(tmp_path).save(4, {"model": {"w": torch.zeros(1)}}, {})
    store = checkpoint.Store(tmp_path)
    for value in (1, 2):  # the second time it is there already
        store.save(4, {"model": {"w": torch.full((1,), float(value))}}, {})
        assert store.newest()[0].tensors("model")["w"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000004"]


def test_a_run_folder_is_not_made_again(tmp_path):
    with pytest.raises(checkpoint.CheckpointError, match=r"could not write .* No such file or directory"):
        checkpoint.Store(tmp_path / "run" / "checkpoints").save(1, {"model": {"w": torch.zeros(1)}}, {})
    assert not list(tmp_path.iterdir())


def test_the_new_best_is_there_before_the_old_one_goes(tmp_path, monkeypatch):
    store = checkpoint.Store(tmp_path)
    store.save(1, {"model": {"w": torch.zeros(1)}}, {}, best=True)
    monkeypatch.setattr(checkpoint.shutil, "rmtree", lambda *_, **__: None)
    rename = checkpoint.Path.rename

    def watched(path, target):
        assert len(list(tmp_path.glob("best-*"))) == 2
        return rename(path, target)

    monkeypatch.setattr(checkpoint.Path, "rename", watched)
    store.save(2, {"model": {"w": torch.ones(1)}}, {}, best=True)
    found, _ = store.newest("best")
    assert found.state["step"] == 2


def test_a_state_dict_survives_the_file(tmp_path):
    tree = {"state": {0: {"step": torch.tensor(3.0), "momenta": [torch.eye(2), None]}}, "param_groups": [{"lr": 0.1}]}
    checkpoint.write(tmp_path / "step-1", {"optimizer": tree}, {"step": 1})
    again = checkpoint.read(tmp_path / "step-1").tree("optimizer")
    assert again["state"][0]["step"] == 3 and torch.equal(again["state"][0]["momenta"][0], torch.eye(2))
    assert again["state"][0]["momenta"][1] is None and again["param_groups"] == [{"lr": 0.1}]


def test_what_a_state_dict_holds_beside_tensors(tmp_path):
    """A list, a tuple and a dtype come back as what they were; a file of before, whose tuples are lists, is read."""
    tree = {"betas": (0.9, (1, None)), "steps": [1, 2], "dtype": torch.bfloat16, "none": ()}
    checkpoint.write(tmp_path / "step-1", {"optimizer": tree}, {"step": 1})
    assert checkpoint.read(tmp_path / "step-1").tree("optimizer") == tree
    old = {"dict": [["betas", {"list": [{"value": 0.9}, {"tensor": "a"}]}]]}
    assert unpack(old, {"a": 3}) == {"betas": [0.9, 3]}
    with pytest.raises(ValueError, match="'load' in the state of an optimiser is not a dtype"):
        unpack({"dtype": "load"}, {})


def test_an_error_while_writing_leaves_nothing(tmp_path, monkeypatch):
    store = checkpoint.Store(tmp_path)
    store.save(1, {"model": {"w": torch.zeros(1)}}, {})
    monkeypatch.setattr(checkpoint.json, "dump", no_space)
    with pytest.raises(checkpoint.CheckpointError, match="No space left on device"):
        store.save(2, {"model": {"w": torch.zeros(1)}}, {})
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


@pytest.mark.parametrize("said", ["[enforce fail at inline_container.cc] unexpected pos 704 vs 598", None])
def test_an_error_of_torch_that_hides_a_full_disk(tmp_path, monkeypatch, said):
    """The free space is added unless the system's own error is known."""
    cause = RuntimeError(said) if said else OSError(errno.EROFS, os.strerror(errno.EROFS))

    def full(*_, **__):
        raise CheckpointException("write", {1: (cause, None)})

    monkeypatch.setattr(checkpoint.dcp, "save", full)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: SimpleNamespace(free=2**19))
    with pytest.raises(checkpoint.CheckpointError) as raised:
        checkpoint.Store(tmp_path).save(2, {checkpoint.SHARDED: {}}, {})
    added = f" (free space in {tmp_path}: 0.5 MiB)" if said else ""
    assert str(raised.value) == f"could not write the checkpoint {tmp_path}/step-00000002: on rank 1: {cause}{added}"
    assert not list(tmp_path.iterdir())


def test_an_old_checkpoint_that_cannot_be_removed_stops_nothing(tmp_path, monkeypatch, capsys):
    store = checkpoint.Store(tmp_path, keep=1)
    store.save(1, {"model": {"w": torch.zeros(1)}}, {})
    remove = checkpoint.shutil.rmtree

    def busy(path, ignore_errors=False):
        if path.name == ".writing-step-00000001" and not ignore_errors:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(path))
        remove(path, ignore_errors=ignore_errors)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "rmtree", busy)
        for step in (2, 3):
            store.save(step, {"model": {"w": torch.full((1,), float(step))}}, {})
    left = tmp_path / ".writing-step-00000001"
    said = f"the old checkpoint {tmp_path}/step-00000001 could not be removed: [Errno 16] Device or resource busy: "
    assert capsys.readouterr().out == f"{said}'{left}'; remove {left} by hand\n"
    newest, problems = store.newest()
    assert newest.tensors("model")["w"] == 3 and not problems
    assert sorted(path.name for path in tmp_path.iterdir()) == [left.name, "step-00000003"]
    store.clean()  # when the run is resumed
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]


def test_moments_of_a_channels_last_model_keep_their_strides(tmp_path):
    def make():
        torch.manual_seed(0)
        model = torch.nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last)
        return model, torch.optim.AdamW(model.parameters())

    (model, optimizer), (other, resumed) = make(), make()
    model(torch.ones(1, 3, 5, 5)).sum().backward()
    optimizer.step()
    checkpoint.write(tmp_path / "step-1", {"optimizer": optimizer.state_dict()}, {"step": 1})
    optim.load_state(resumed, checkpoint.read(tmp_path / "step-1").tree("optimizer"))
    for key in ("exp_avg", "exp_avg_sq"):
        moment, loaded = optimizer.state[model.weight][key], resumed.state[other.weight][key]
        assert torch.equal(moment, loaded) and moment.stride() == loaded.stride() != moment.contiguous().stride()


def test_model_randomness_is_a_function_of_the_step():
    def draw(*key):
        seed_all(*key)
        return torch.rand(3).tolist()

    assert draw(0, 1, 5, 0, 0) == draw(0, 1, 5, 0, 0)
    keys = [(0, 1, 5, 0, 0), (0, 1, 6, 0, 0), (0, 1, 5, 1, 0), (0, 1, 5, 0, 1), (1, 1, 5, 0, 0), (0, 0)]
    assert len({tuple(draw(*key)) for key in keys}) == len(keys)


def test_damage_in_the_first_of_several_blocks_is_found(tmp_path):
    checkpoint.write(tmp_path / "step-1", {"model": {"w": torch.zeros(2**21)}}, {"step": 1})  # 8 MiB
    file = tmp_path / "step-1" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[5000] ^= 1
    file.write_bytes(content)
    with pytest.raises(checkpoint.CheckpointError, match="is damaged"):
        checkpoint.read(tmp_path / "step-1")


def test_tensors_that_share_their_memory_are_both_kept(tmp_path):
    tied = torch.randn(3, 3)
    checkpoint.write(tmp_path / "step-1", {"model": {"a": tied, "b": tied}}, {"step": 1})
    found = checkpoint.read(tmp_path / "step-1").tensors("model")
    assert torch.equal(found["a"], tied) and torch.equal(found["b"], tied)
