"""Several processes, one run: the same curve, the same metrics, one decision, however the work is shared out."""

import json
import math
import os
import re
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import timm
import torch
import torch.distributed as dist
from PIL import Image

import zoo
from children import SMALL, lines, lost_after, newest, no_space, note_overrides, train_here
from ranks import FSDP, SHARED, assert_bits, curve, on_ranks, weights
from recipes import checkpoint, config, data_record, distributed, log, plan, train
from recipes.config import ConfigError
from recipes.data import DataError, Source
from recipes.run import RunError
from recipes.tasks import classify
from recipes.weights import find_checkpoint


def assert_same_curve(run: Path, other: Path) -> None:
    for one, two in zip(curve(run), curve(other), strict=True):
        assert one == pytest.approx(two, rel=2e-4), (one, two)


def assert_close(run: Path, other: Path, kind: str = "step") -> None:
    ours, theirs = weights(run, kind), weights(other, kind)
    assert ours.keys() == theirs.keys()
    for name in ours:  # Adam turns a gradient of nearly nothing into a whole step, whichever sign it has
        assert torch.allclose(ours[name].double(), theirs[name].double(), rtol=1e-3, atol=2e-3), name


def test_one_curve(runs):
    assert len(curve(runs / "alone")) == 8
    assert_same_curve(runs / "ddp", runs / "alone")
    assert_same_curve(runs / "fsdp", runs / "ddp")
    assert_close(runs / "ddp", runs / "alone")
    assert_close(runs / "fsdp", runs / "alone", "best")


def test_two_halves_give_the_same_bits_on_one_process_and_on_two(tmp_path):
    """The sum of two gradients has no order: Mixup, drop path, statistics and all else must be the same to the bit."""
    halves = [*SHARED, "train.accumulate=2", "train.steps=3", "train.clip_grad=null"]
    train_here(tmp_path, *halves, "name=alone")
    assert on_ranks(2, train_here, tmp_path, *halves, "name=ddp") == [None, None]
    ours, theirs = weights(tmp_path / "ddp"), weights(tmp_path / "alone")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert_bits(curve(tmp_path / "ddp"), curve(tmp_path / "alone"))


def test_only_one_process_writes(runs):
    files = {name: {path.name for path in (runs / name).iterdir()} for name in ("alone", "ddp", "fsdp")}
    assert files["ddp"] == files["fsdp"] == files["alone"]
    assert [line["step"] for line in lines(runs / "ddp") if "loss" in line] == [1, 2, 3, 4, 5, 6]
    session = (runs / "ddp" / "sessions.jsonl").read_text().splitlines()
    assert len(session) == 1 and json.loads(session[0])["processes"] == 2


def test_what_sharded_processes_leave(runs):
    folder = runs / "fsdp" / "checkpoints"
    assert {path.name for path in (folder / "step-00000006" / "sharded").iterdir()} == {
        ".metadata", "__0_0.distcp", "__1_0.distcp"
    }  # fmt: skip
    best = find_checkpoint(runs / "fsdp")
    assert not best.sharded and best.tensors("model").keys() == best.tensors("ema").keys()
    file = best.path / "ema.safetensors"
    overlay = {"file": str(file), "num_classes": 10}  # timm would leave out a classifier of another size
    model = timm.create_model("test_resnet", num_classes=10, pretrained=True, pretrained_cfg_overlay=overlay)
    saved = best.tensors("ema")
    assert all(torch.equal(tensor, saved[name]) for name, tensor in model.state_dict().items())
    shard = folder / "step-00000006" / "sharded" / "__1_0.distcp"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-7] + b"damaged")
    try:
        found, problems = checkpoint.Store(folder).newest()
        assert found.state["step"] == 3 and "__1_0.distcp is damaged" in problems[0]
    finally:
        shard.write_bytes(whole)


@pytest.mark.parametrize(
    ("begun", "ranks", "parallel"),
    [
        ("fsdp", 1, "fsdp"),
        pytest.param("fsdp", 4, "fsdp", marks=pytest.mark.slow),
        pytest.param("fsdp", 2, "ddp", marks=pytest.mark.slow),
        ("ddp", 2, "fsdp"),
        pytest.param("ddp", 1, "ddp", marks=pytest.mark.slow),
    ],
)
def test_a_run_goes_on_with_another_number_of_processes(runs, tmp_path, begun, ranks, parallel):
    run = lost_after(3, runs / begun, tmp_path / "run")
    assert on_ranks(ranks, train_here, tmp_path, f"resume={run}", f"hardware.parallel={parallel}") == [None] * ranks
    assert_same_curve(run, runs / "alone")


@pytest.mark.parametrize("begun", ["ddp", "fsdp"])
def test_as_many_processes_end_with_the_same_bits(runs, tmp_path, begun):
    run = lost_after(3, runs / begun, tmp_path / "run")
    assert on_ranks(2, train_here, tmp_path, f"resume={run}") == [None, None]
    assert curve(run) == curve(runs / begun)
    for file in ("step-00000006/model.safetensors", "step-00000006/sharded/__1_0.distcp"):
        whole = runs / begun / "checkpoints" / file
        assert whole.exists() == (begun == ("fsdp" if "sharded" in file else "ddp"))
        if whole.exists():
            assert whole.read_bytes() == (run / "checkpoints" / file).read_bytes()


@pytest.mark.slow
def test_three_processes_go_on_with_the_same_bits(tmp_path):
    """Three gradients have an order of summation, which must not depend on when a process was started."""
    thirds = [*SHARED, "data.batch_size=36", "train.accumulate=3"]
    assert on_ranks(3, train_here, tmp_path, *thirds, "name=whole") == [None] * 3
    note_overrides(tmp_path / "whole", thirds)
    run = lost_after(3, tmp_path / "whole", tmp_path / "run")
    assert on_ranks(3, train_here, tmp_path, f"resume={run}") == [None] * 3
    ours, theirs = weights(run), weights(tmp_path / "whole")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def poisoned(out: Path) -> None:
    loss = classify.Task.loss

    def function(self, model, images, targets, *, draw):
        bad = distributed.rank() == 1 and draw // 4 == 2
        return loss(self, model, images * math.nan if bad else images, targets, draw=draw)

    classify.Task.loss = function
    train_here(out, *SHARED, "name=poisoned")


def test_no_number_on_one_is_none_on_any(tmp_path):
    ended = on_ranks(2, poisoned, tmp_path)
    assert [type(end) for end in ended] == [train.NotFinite] * 2 and "at step 2" in str(ended[0])
    listed = (tmp_path / "poisoned" / "nonfinite" / "step-00000002.txt").read_text().splitlines()
    assert len(set(listed)) == 32 and [str(end) for end in ended] == [str(ended[0])] * 2
    saved, _ = checkpoint.Store(tmp_path / "poisoned" / "checkpoints").newest()
    assert saved.state["step"] == 2
    assert all(tensor.isfinite().all() for tensor in saved.tensors("model").values())


def test_layers_without_a_gradient_are_named(tmp_path):
    options = ["model.name=nat_m", "+model.depths=[1,1]", "+model.dims=[32,64]", "+model.feature_norms=true"]
    ended = on_ranks(2, train_here, tmp_path, *SHARED, *options, "name=idle", "train.ema=null")
    assert [type(end) for end in ended] == [ConfigError] * 2
    assert "does not depend on feature_norms.0.weight, feature_norms.0.bias, feature_norms.1.weight" in str(ended[0])
    assert "train.freeze=[feature_norms.0,feature_norms.1]" in str(ended[0])
    options += ["train.freeze=[feature_norms.0,feature_norms.1]"]
    assert on_ranks(2, train_here, tmp_path, *SHARED, *options, "name=frozen", "train.steps=2") == [None, None]


def unreadable(out: Path) -> None:
    draw = Source.draw

    def function(self, index, epoch, copy=0, **options):
        if distributed.rank() == 1 and getattr(Source, "drawn", 0) > 40:
            raise DataError("the disk is gone")
        Source.drawn = getattr(Source, "drawn", 0) + 1
        return draw(self, index, epoch, copy, **options)

    Source.draw = function
    train_here(out, *SHARED, "name=unreadable")


def test_what_one_cannot_read_stops_all_with_one_error(tmp_path):
    ended = on_ranks(2, unreadable, tmp_path)
    assert [type(end) for end in ended] == [DataError] * 2
    assert all("the disk is gone" in str(end) for end in ended)


def test_a_folder_that_one_cannot_make_is_an_error_of_all(tmp_path):
    (tmp_path / "file").write_text("in the way")
    ended = on_ranks(2, train_here, tmp_path / "file", *SHARED)
    assert [type(end) for end in ended] == [RunError] * 2 and "cannot write to the run folder" in str(ended[1])


def full(out: Path) -> None:
    """From the second checkpoint on the first process finds no room; the other has nothing to do with it."""
    written = checkpoint._write_part

    def function(path, tree):
        if "step-00000006" in str(path):
            no_space()
        written(path, tree)

    checkpoint._write_part = function
    train_here(out, *SHARED, "name=full")


def full_of_shards(out: Path) -> None:
    """As `full`, on the second process, which alone cannot write its part."""
    from torch.distributed.checkpoint.filesystem import FileSystemWriter

    written = FileSystemWriter.write_data

    def function(self, plan, planner):
        if distributed.rank() == 1 and "step-00000006" in str(self.path):
            no_space()
        return written(self, plan, planner)

    FileSystemWriter.write_data = function
    train_here(out, *SHARED, FSDP, "name=full")


@pytest.mark.parametrize("function", [full, pytest.param(full_of_shards, marks=pytest.mark.slow)])
def test_a_full_disk_is_an_error_of_all(tmp_path, function):
    ended = on_ranks(2, function, tmp_path)
    assert [type(end) for end in ended] == [checkpoint.CheckpointError] * 2
    assert all("No space left on device" in str(end) and "is intact" in str(end) for end in ended)
    assert not list((tmp_path / "full" / "checkpoints").glob(".writing-*"))
    assert newest(tmp_path / "full").state["step"] == 3


def lost() -> str:
    distributed.join(config.compose([]))
    if distributed.rank() == 1:
        os._exit(1)
    try:
        with config.reported("train"):
            distributed.gathered(0)
    except SystemExit as end:
        return f"status {end.code}"


def test_a_lost_process_ends_the_others_in_words(capfd):
    with pytest.raises(EOFError):
        on_ranks(2, lost)
    said = capfd.readouterr().err
    assert "error: another process of this run is gone" in said and "Traceback" not in said


def lost_in_a_sweep(folder: Path) -> None:
    """The second process ends in the first of three runs."""
    noted = log.Log.step

    def step(self, step, *args, **kwargs):
        if distributed.rank() == 1:
            os._exit(1)
        noted(self, step, *args, **kwargs)

    log.Log.step = step
    os.chdir(folder)
    sys.argv[:] = ["train.py", "-m", *SHARED, "seed=0,1,2", "name=s"]
    try:
        train.main()
    except SystemExit as end:
        print(f"status {end.code}")


def test_a_lost_process_ends_a_sweep(tmp_path, capfd):
    with pytest.raises(EOFError):
        on_ranks(2, lost_in_a_sweep, tmp_path)
    said, errors = capfd.readouterr()
    assert errors.count("another process of this run is gone") == 1 and "Traceback" not in errors
    assert errors.endswith("error: 1 of 1 runs failed, see above: 0\n")
    assert "the sweep was stopped in run 0; any later runs were not started" in said and "status 2" in said
    assert [run.name for run in (tmp_path / "runs").glob("s-*")] == ["s-0"]


def slow() -> str:
    distributed.join(config.compose(["hardware.timeout=3"]))
    if distributed.rank() == 1:
        time.sleep(4)
        return "late"
    try:
        with config.reported("train"):
            distributed.gathered(0)
    except SystemExit as end:
        return f"status {end.code}"


def test_a_process_that_does_not_answer_is_not_called_gone(capfd):
    assert on_ranks(2, slow) == ["status 2", "late"]
    said = capfd.readouterr().err
    assert "error: another process of this run did not answer for hardware.timeout=3 seconds" in said
    assert "set a longer time: hardware.timeout=6" in said and "gone" not in said and "Traceback" not in said


def broken_log(out: Path) -> None:
    written = log.Jsonl.write

    def write(self, line):
        with log.writing(self.path):
            if line["step"] == 2:
                no_space()
        written(self, line)

    log.Jsonl.write = write
    train_here(out, *SHARED, "name=broken")


def test_a_log_that_fails_is_an_error_of_all(tmp_path):
    """Only the first process writes it; both must come to save the state."""
    ended = on_ranks(2, broken_log, tmp_path)
    assert [type(end) for end in ended] == [log.LogError] * 2
    assert all("No space left on device\nthe state after step 2 is saved; resume with: " in str(end) for end in ended)
    assert newest(tmp_path / "broken").state["step"] == 2


def own_copy(folder: Path) -> None:
    os.chdir(folder / str(distributed.rank()))
    small = ["model=timm", "model.name=test_resnet", "data.img_size=32", "data.workers=0", "data.batch_size=4"]
    train_here(folder / "out", *small, "data=imagefolder", "data.root=photos", "name=run")


def test_copies_of_a_folder_that_differ_are_an_error_of_all(tmp_path):
    for split, name in ((split, name) for split in ("train", "val") for name in ("ant", "bee")):
        folder = tmp_path / "0" / "photos" / split / name
        folder.mkdir(parents=True)
        for index in range(4):
            Image.new("RGB", (8, 8)).save(folder / f"{index}.png")
    shutil.copytree(tmp_path / "0", tmp_path / "1")
    for split in ("train", "val"):
        (tmp_path / "1" / "photos" / split / "bee").rename(tmp_path / "1" / "photos" / split / "cow")
    (tmp_path / "1" / "photos" / "train" / "ant" / "0.png").unlink()
    first, second = on_ranks(2, own_copy, tmp_path)
    assert type(first) is type(second) is DataError and str(first) == str(second)
    said = r"rank 1 on \S+ has 'cow' as class 1, not 'bee', 7 training images, not 8\n"
    assert re.search(said, str(first)) and not (tmp_path / "out").exists()


def compared() -> list[str | None]:
    """What is said where the second process has the same, the same to measure alone, other labels, another class."""
    distributed.join(config.compose([]))
    data, last = classify.Task(config.compose(SMALL)).build_data(), distributed.rank() == 1
    said = []
    for change in (
        lambda: data,
        lambda: replace(data, train=None),
        lambda: relabelled(data, last),
        lambda: named(data, last),
    ):
        try:
            said.append(data_record.check_alike(change()))
        except DataError as error:
            said.append(str(error).splitlines()[1].partition(" has ")[2])
    return said


def relabelled(data, really: bool):
    data.val.records.labels[0] += really
    return data


def named(data, really: bool):
    return replace(data, num_classes=11, class_names=[*data.class_names, "X"]) if really else data


def test_what_processes_compare():
    first, second = on_ranks(2, compared)
    six = "0, 1, 2, 3, 4, 5"
    others = "the same number of images, but other images or other labels"
    assert first == second == [None, None, others, f"11 classes ({six} and 5 more), not 10 ({six} and 4 more)"]


@pytest.mark.parametrize(
    ("accumulate", "parts", "world", "expected"),
    [(1, None, 1, 1), (4, None, 2, 4), (1, None, 2, 2), (4, None, 8, 8), (2, None, 3, 6), (1, 4, 2, 4), (1, 4, 1, 4)],
)
def test_parts_of_a_batch(monkeypatch, accumulate, parts, world, expected):
    monkeypatch.setattr(distributed, "size", lambda: world)
    cfg = config.compose(["data.batch_size=48", f"train.accumulate={accumulate}"])
    source = range(480)
    plans = plan.make(cfg, source, parts)
    assert (plans.micro_batches, plans.batch, plans.per_epoch) == (expected, 48, 10)
    ranks = []
    for rank in range(world):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        ranks += [plans.micro_batch(3, turn) for turn in range(plans.accumulate)]
    assert sorted(ranks) == list(range(3 * expected, 4 * expected))


def test_a_batch_that_processes_cannot_share(monkeypatch):
    monkeypatch.setattr(distributed, "size", lambda: 3)
    with pytest.raises(
        ConfigError, match=r"on 3 process.es.; choose a multiple of 3, or start 2 or 4 process.es.: a res"
    ):
        plan.make(config.compose(["data.batch_size=32"]), range(480))
    with pytest.raises(ConfigError, match=r"choose a multiple of 12, or start 2 or 4 process.es.: a resumed run"):
        plan.make(config.compose(["data.batch_size=32"]), range(480), micro_batches=4)
    with pytest.raises(ConfigError, match=r"choose a multiple of 12$"):  # no number of processes shares 33 in four
        plan.make(config.compose(["data.batch_size=33", "train.accumulate=4"]), range(480))
    monkeypatch.setattr(distributed, "size", lambda: 64)
    with pytest.raises(ConfigError, match=r"choose a multiple of 64, or start 32 process.es.: a resumed run"):
        plan.make(config.compose(["data.batch_size=32"]), range(480))


def test_alone_nothing_is_asked():
    assert (distributed.rank(), distributed.size(), distributed.job()) == (0, 1, None)
    assert distributed.first(lambda: 3) == 3 and distributed.gathered(4) == [4] and distributed.highest(5) == 5
    assert list(distributed.together(iter("ab"), DataError, 3)) == ["a", "b", None]
    assert not dist.is_initialized() and zoo.variants()


def test_processes_meet_under_a_name_that_predecessors_did_not_have():
    """Those of an earlier start have left their words in the store, and one of them is met before its successor."""
    store, timeout, names = dist.HashStore(), timedelta(seconds=30), []
    for _ in range(2):
        with ThreadPoolExecutor(3) as ranks:
            found = [ranks.submit(distributed.meet, store, number, 3, timeout) for number in (2, 0)]
            time.sleep(0.1)  # rank 0 has answered rank 2, and in the second round the hello that rank 1 left
            found.append(ranks.submit(distributed.meet, store, 1, 3, timeout))
            (name,) = {one.result() for one in found}
        names.append(name)
    assert names[0] != names[1]


def test_who_does_not_come_is_named():
    store, soon = dist.HashStore(), timedelta(seconds=0.2)
    with pytest.raises(dist.DistError, match="nothing was heard of rank 1, 2"):
        distributed.meet(store, 0, 3, soon)
    with pytest.raises(dist.DistError):
        distributed.meet(store, 1, 3, soon)
