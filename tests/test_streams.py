"""Training sets in shards: read from front to back, resumed anywhere, by the number of workers they were begun with."""

import json
import os
import shutil
import time
from pathlib import Path

import datasets
import fsspec
import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from children import lost_after, note_overrides, train_here
from recipes import distributed, plan
from recipes.config import compose
from recipes.data import DataError, batches, build, check_position, parquet, stream_order, stream_state, tar
from recipes.data.loader import plan_batches
from recipes.hardware import Hardware
from recipes.state import State
from shard_cases import COUNTS, number_of, parquets, picture, tars
from source_cases import all_of, make, same

WRITE = {"webdataset": tars, "parquet_stream": parquets}
SMALL = [
    "model=timm", "model.name=test_resnet", "data.img_size=32", "data.batch_size=8", "data.shuffle_buffer=12",
    "train.log_every=1", "train.save_every=3", "train.eval_every=1", "train.epochs=2",
]  # fmt: skip


pytestmark = pytest.mark.usefixtures("own_caches")


@pytest.fixture(params=WRITE)
def kind(request):
    return request.param


def made(kind, tmp_path, **changes):
    return make(kind, root=WRITE[kind](tmp_path / kind), **({"shuffle_buffer": 12} | changes))


def test_shards_that_are_no_files(kind, tmp_path):
    root = Path(WRITE[kind](tmp_path / kind))
    shard = next(path for path in root.rglob("*train*") if path.is_file())
    shard.unlink()
    shard.symlink_to(os.devnull)
    with pytest.raises(DataError, match=f"files of the split 'train': {shard} is a pipe or a device: expected a file"):
        make(kind, root=str(root))


def test_samples(kind, tmp_path):
    data = made(kind, tmp_path)
    assert (len(data.train), len(data.val), data.num_classes) == (sum(COUNTS), 20, 5)
    assert data.class_names == list("abcde" if kind == "parquet_stream" else "01234")
    for index in (112, 0, 37, 36, 38, 7, 6, 99):  # in no order
        assert number_of(data.train.image(index)) == index and data.train.label(index) == index % 5
    shard = {"webdataset": "set-train-003.tar", "parquet_stream": "train-00003-of-00006.parquet"}[kind]
    assert f"{shard}, sample 2" in data.train.where(40)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_batches_follow_the_law(kind, tmp_path, workers):
    source = made(kind, tmp_path).train
    planned = plan_batches(source, batch_size=8, seed=0, epoch=2, train=True, workers=workers)
    came = all_of(source, batch_size=8, epoch=2, workers=workers)
    assert len(came) == len(planned) == 14
    for (images, labels), batch in zip(came, planned, strict=True):
        assert labels.tolist() == [index % 5 for index, _, _ in batch.keys]
        expected = torch.stack([source.sample(*key)[0] for key in batch.keys])
        assert torch.equal(images, expected)  # a sample is what it is, whoever reads it, in whatever order


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("start", [1, 5, 13, 14])
def test_start_continues(kind, tmp_path, start, workers):
    source = made(kind, tmp_path).train
    whole = all_of(source, batch_size=8, epoch=1, workers=workers, repeats=2)
    assert same(whole[start:], all_of(source, batch_size=8, epoch=1, workers=workers, repeats=2, start=start))


def test_ranks_share_the_epoch(kind, tmp_path):
    source = made(kind, tmp_path).train
    for workers in (1, 2):
        planned = [
            plan_batches(source, batch_size=8, seed=0, epoch=0, train=True, workers=workers, rank=rank, world=3)
            for rank in range(3)
        ]
        seen = [index for part in planned for batch in part for index, _, _ in batch.keys]
        assert [len(part) for part in planned] == [4, 4, 4] and len(set(seen)) == len(seen) == 96
    one = all_of(source, batch_size=8, workers=2, rank=1, world=3)
    assert [y.tolist() for _, y in one] == [[index % 5 for index, _, _ in batch.keys] for batch in planned[1]]


def test_evaluation_sees_every_sample_once(kind, tmp_path):
    val = made(kind, tmp_path).val
    for world, workers in ((1, 0), (1, 2), (3, 1)):
        parts = [all_of(val, train=False, batch_size=6, rank=r, world=world, workers=workers) for r in range(world)]
        assert sorted(label for part in parts for _, y in part for label in y.tolist()) == sorted(
            i % 5 for i in range(20)
        )
    labels = torch.cat([y for _, y in all_of(val, train=False, batch_size=6)])
    assert labels.tolist() == [index % 5 for index in range(20)]


def test_broken_off_iterations_leave_no_trace(kind, tmp_path):
    source = made(kind, tmp_path).train
    expected = all_of(source, batch_size=8, workers=2)
    stream = batches(source, batch_size=8, seed=0, epoch=5, train=True, workers=2)
    next(stream)
    del stream
    assert same(expected, all_of(source, batch_size=8, workers=2))


def test_going_on_reads_what_is_needed_alone(tmp_path, monkeypatch):
    """Neither the shards before nor the row groups before in a shard are read again."""
    read = []
    source = made("parquet_stream", tmp_path, shuffle_buffer=4).train
    original = parquet._Rows.cell

    def cell(self, row):
        before = self.group
        value = original(self, row)
        if self.group != before:
            read.append(self.group)
        return value

    monkeypatch.setattr(parquet._Rows, "cell", cell)
    assert len(all_of(source, batch_size=8)) == 14
    whole = len(read)
    read.clear()
    all_of(source, batch_size=8, start=12)
    assert len(read) <= 5 < 16 <= whole  # 20 samples of at most 3 shards, in row groups of 8


def test_a_reader_holds_a_buffer_and_no_more(kind, tmp_path):
    source, most = made(kind, tmp_path, shuffle_buffer=12).train, []
    forget = source.records.forget

    def watched(indices):
        most.append(len(source.records.held))
        forget(indices)

    source.records.forget = watched
    all_of(source, batch_size=8)
    assert 12 <= max(most) <= 12 + 8 and not source.records.held


def test_index_is_kept_and_follows_changes(kind, tmp_path, monkeypatch, capsys):
    root = WRITE[kind](tmp_path / kind)
    make(kind, root=root)
    module = {"webdataset": tar, "parquet_stream": parquet}[kind]
    with monkeypatch.context() as patch:
        patch.setattr(module, "_index", lambda *_: pytest.fail("indexed again though nothing changed"))
        assert len(make(kind, root=root).train) == sum(COUNTS)
    WRITE[kind](tmp_path / kind, counts=(3, *COUNTS[1:]))
    assert len(make(kind, root=root).train) == sum(COUNTS) - 4
    for file in (tmp_path / "cache").rglob("*.npz"):
        file.write_bytes(b"PK nothing")
    assert len(make(kind, root=root).train) == sum(COUNTS) - 4
    assert "reading the shards again" in capsys.readouterr().err


def test_a_shard_that_changes_under_way_is_an_error(kind, tmp_path):
    data = made(kind, tmp_path)
    time.sleep(0.01)
    WRITE[kind](tmp_path / kind, counts=COUNTS[::-1])
    with pytest.raises(DataError, match="was changed while it was in use"):
        all_of(data.train, batch_size=8)


def test_a_shard_may_get_other_permissions_under_way(kind, tmp_path):
    data = made(kind, tmp_path)
    time.sleep(0.01)
    for path in data.train.records.paths:
        os.chmod(path, 0o400)  # as a hard link of a backup does, this sets the time of change
    assert len(all_of(data.train, batch_size=8)) > 0


def test_bad_images_in_shards(kind, tmp_path, monkeypatch):
    monkeypatch.setattr("shard_cases.picture", lambda number: b"" if number % 10 == 3 else picture(number))
    data = made(kind, tmp_path, on_bad_image="replace")
    labels = [y for _, y in all_of(data.train, batch_size=8, workers=2)]
    assert len(labels) == 14 and data.train.bad == len(data.train.named) > 8
    assert all(index % 10 == 3 for index in data.train.named)
    strict = make(kind, root=str(tmp_path / kind))
    with pytest.raises(DataError, match=r"sample \d+ of the training set of .*, sample \d+.*on_bad_image=replace"):
        all_of(strict.train, batch_size=8)


def options(**changes):
    return {"batch_size": 8, "seed": 0, "workers": 2, "world": 1} | changes


def test_state(kind, tmp_path):
    source = made(kind, tmp_path).train
    state = json.loads(json.dumps(stream_state(source, epoch=1, start=5, **options())))
    assert (state["ranks"], state["workers"], state["images"], state["epoch"], state["batch"]) == (1, 2, 113, 1, 5)
    assert [reader["reader"] for reader in state["readers"]] == [0, 1]
    for reader in state["readers"]:
        shard, offset = reader["next"]
        assert shard in source.records.names and 0 <= offset < COUNTS[source.records.names.index(shard)]
        assert 0 < reader["held"] <= 12 and reader["seed"] > 0
    check_position(state, stream_state(source, epoch=1, start=5, **options()))
    for change, said in (
        (options(workers=3), r"workers: started with 2, now 3 \(set data.workers=2\)"),
        (options(world=2), r"ranks: started with 1, now 2 \(start it with that many processes\)"),
    ):
        with pytest.raises(DataError, match=said):
            check_position(state, stream_state(source, epoch=1, start=5, **change))
    other = make(kind, root=WRITE[kind](tmp_path / "more", counts=(*COUNTS, 9))).train
    with pytest.raises(DataError, match=r"images: started with 113, now 122 .*shards"):
        check_position(state, stream_state(other, epoch=1, start=5, **options()))


def test_the_readers_are_noted_on_rank_0_alone(tmp_path, monkeypatch):
    """What they hold takes the order of the epoch on all ranks, and only rank 0 writes it."""
    source = made("webdataset", tmp_path).train
    cfg = compose([*SMALL, "data=webdataset", f"data.root={tmp_path}", "data.workers=2"])
    machine = Hardware(torch.device("cpu"), None, torch.preserve_format, compile=False)
    now = State.create(cfg, torch.nn.Linear(1, 1), machine, plan.make(cfg, source), source, lambda model: model)
    alone = now.extras()["data"]
    assert len(alone.pop("readers")) == 2
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    monkeypatch.setattr(stream_order, "readers_at", None)
    assert now.extras()["data"] == alone


def test_a_set_that_is_read_by_index_has_no_state():
    assert stream_state(make().train, epoch=0, start=3, **options()) is None
    check_position(None, None)


@pytest.mark.parametrize("kind, workers", [("webdataset", 2), ("parquet_stream", 1)], indirect=["kind"])
def test_training_goes_on_exactly(kind, tmp_path, workers):
    """Broken off in the middle of an epoch and gone on with, a run ends with the weights of one left alone."""
    root = WRITE[kind](tmp_path / "data")
    given = [*SMALL, f"data={kind}", f"data.root={root}", f"data.workers={workers}"]
    train_here(tmp_path, *given, "name=whole", "train.keep=99")
    for step in (9, 18):
        part = lost_after(step, tmp_path / "whole", tmp_path / f"from{step}")
        note_overrides(part, given)
        train_here(tmp_path, *given, f"resume={part}")
        file = "checkpoints/step-00000028/model.safetensors"
        assert (part / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    more = [*given[:-1], f"data.workers={workers + 1}"]
    part = lost_after(9, tmp_path / "whole", tmp_path / "other")
    note_overrides(part, more)
    said = rf"workers: started with {workers}, now {workers + 1} \(set data.workers={workers}\)"
    with pytest.raises(DataError, match=said):
        train_here(tmp_path, *more, f"resume={part}")
    state = json.loads((part / "checkpoints" / "step-00000009" / "state.json").read_text())["data"]
    assert state["batch"] == 9 and len(state["readers"]) == workers


def test_shards_that_are_wrong(kind, tmp_path):
    suffix = {"webdataset": "tar", "parquet_stream": "parquet"}[kind]
    with pytest.raises(DataError, match=r"needs data.root="):
        make(kind)
    with pytest.raises(DataError, match=r"data.root=/nowhere is not a folder"):
        make(kind, root="/nowhere")
    root = WRITE[kind](tmp_path / "good")
    with pytest.raises(DataError, match=rf"has no .{suffix} files of the split 'dev'.*found: "):
        make(kind, root=root, val_split="dev")
    file = next(path for path in (tmp_path / "good").rglob(f"*train*3*.{suffix}"))
    os.truncate(file, 2600)
    with pytest.raises(DataError, match=f"cannot read the .*{file.name}"):
        make(kind, root=root)


def test_a_buffer_of_nothing(kind, tmp_path):
    with pytest.raises(DataError, match=r"data.shuffle_buffer=0: expected at least 1"):
        made(kind, tmp_path, shuffle_buffer=0)


@pytest.mark.parametrize("name", ["train-validation-1", "train-validation/1"])
def test_a_file_of_two_splits(kind, tmp_path, name):
    root = WRITE[kind](tmp_path)
    file = next(path for path in tmp_path.rglob("*validation-00*"))
    (tmp_path / name).parent.mkdir(exist_ok=True)
    shutil.copy(file, tmp_path / f"{name}{file.suffix}")
    with pytest.raises(
        DataError, match=rf"{name}.* may belong to 'train' and 'validation', as 'train-validation.*both"
    ):
        make(kind, root=root)
    data = make(kind, root=root, train_split="validation", val_split="validation")  # both the same on purpose
    assert len(data.train) == len(data.val) == 40


def test_hub(tmp_path, monkeypatch):
    """A name of the hub is resolved by `datasets` and read in place, through its file system: here one in memory."""
    memory = fsspec.filesystem("memory")
    files = {"train": [], "validation": []}
    for path in sorted(Path(parquets(tmp_path)).rglob("*.parquet")):
        memory.pipe(f"/hub/{path.name}", path.read_bytes())
        files[path.name.split("-")[0]].append(f"memory://hub/{path.name}")
    asked = []

    def builder(name):
        asked.append(name)
        return OmegaConf.create({"config": {"data_files": files}})

    monkeypatch.setattr(datasets, "load_dataset_builder", builder)
    data = make("parquet_stream", hub="someone/images", shuffle_buffer=12)
    assert set(asked) == {"someone/images"} and len(data.train) == 113 and data.class_names == list("abcde")
    local = made("parquet_stream", tmp_path / "local")
    assert same(all_of(data.train, batch_size=8, workers=2), all_of(local.train, batch_size=8, workers=2))
    with pytest.raises(
        DataError, match=r"someone/images has no parquet files of the split 'dev', only train, validation"
    ):
        make("parquet_stream", hub="someone/images", val_split="dev")


def test_epochs_differ(kind, tmp_path):
    source = made(kind, tmp_path).train
    labels = [
        torch.cat([y for _, y in all_of(source, batch_size=8, **case)]) for case in ({}, {"epoch": 1}, {"seed": 1})
    ]
    assert not torch.equal(labels[0], labels[1]) and not torch.equal(labels[0], labels[2])
    assert np.abs(np.bincount(labels[0]) - 113 / 5).max() < 3


def test_configs_compose(tmp_path):
    cfg = compose(["data=webdataset", f"data.root={tars(tmp_path / 'data')}", "data.img_size=32"])
    assert len(build(cfg).train) == 113
