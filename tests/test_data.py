"""Samples are functions of (seed, epoch, index): order, workers, restarts and ranks change nothing."""

import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

import recipes.data.__main__ as speed
from children import FORKS, PATIENCE, ROOT
from recipes import plan, stop
from recipes.config import compose
from recipes.data import DataError, Mix, Source, batches, batches_per_epoch, bench, loader, worker_count
from recipes.data.digits import Digits, load
from recipes.data.loader import plan_batches
from recipes.data.seeding import Stream, preserved, reseed, seed_of
from recipes.data.speed import Plain, timm_loader
from recipes.data.stream_order import Batch
from source_cases import MIX, all_of, config, make, same


@pytest.fixture(scope="module")
def digits():
    return make()


@pytest.fixture(scope="module")
def small(digits):
    """300 training digits with the same transform: an epoch of 4 batches of 64 and a rest."""
    records = digits.train.records
    part = Digits(records.scans[:300], records.labels[:300], records.rows[:300], records.size)
    return Source(part, digits.train.transform, name="300 digits", seed=0)


def test_digits_split(digits):
    rows = [set(source.records.rows.tolist()) for source in (digits.train, digits.val)]
    assert not rows[0] & rows[1] and rows[0] | rows[1] == set(range(1797))
    scans = [{scan.tobytes() for scan in source.records.scans} for source in (digits.train, digits.val)]
    assert not scans[0] & scans[1]
    shares = [np.bincount(source.records.labels) / len(source) for source in (digits.train, digits.val)]
    assert np.abs(shares[0] - shares[1]).max() < 0.005
    assert (digits.num_classes, digits.class_names, digits.img_size) == (10, list("0123456789"), 32)


def test_digits_split_is_its_own_seed(digits):
    assert (make().train.records.rows == digits.train.records.rows).all()
    assert (make(split_seed=1).train.records.rows[:100] != digits.train.records.rows[:100]).any()


@pytest.mark.parametrize("share, held", [(0.0001, 1), (0.005, 9), (0.9999, 1797), (0.9945, 1788), (None, 0)])
def test_a_split_has_scans_of_each_class_on_both_sides(share, held):
    with pytest.raises(DataError, match=rf"={share}: {held} of the 1797 .* a share from 0\.0056 to 0\.9944"):
        load((8, 8), share, 0)
    for fits in (0.0056, 0.9944):
        assert all(len(set(part.labels)) == 10 for part in load((8, 8), fits, 0))


def test_digits_are_real_scans(digits):
    image, label = digits.val.sample(0, 0)
    assert image.shape == (3, 32, 32) and image.dtype == torch.float32 and label == digits.val.label(0)
    assert torch.equal(image[0], image[1]) and image.min() >= -1 and image.max() <= 1 and image.std() > 0.3
    assert digits.val.image(0).mode == "RGB" and digits.val.image(0).size == (32, 32)


def test_sample_is_a_function_of_seed_epoch_index(digits):
    one = digits.train.sample(5, 2)[0]
    digits.train.sample(6, 2), digits.train.sample(5, 3)
    assert torch.equal(one, digits.train.sample(5, 2)[0])
    assert torch.equal(one, make().train.sample(5, 2)[0])
    others = [digits.train.sample(5, 3), digits.train.sample(5, 2, copy=1)]
    reseeded = Source(digits.train.records, digits.train.transform, name="", seed=1)
    assert not any(torch.equal(one, other[0]) for other in [*others, reseeded.sample(5, 2)])


def test_validation_is_the_same_in_every_epoch(digits):
    assert torch.equal(digits.val.sample(3, 0)[0], digits.val.sample(3, 7)[0])


def test_workers_change_nothing(small):
    expected = all_of(small, epoch=1)
    for workers in (1, 2):
        assert same(expected, all_of(small, epoch=1, workers=workers))
        assert not same(expected, all_of(small, epoch=2, workers=workers))  # the same workers, another epoch
        assert same(expected, all_of(small, epoch=1, workers=workers))


def test_another_process_draws_the_same(digits):
    here, there = FORKS.Pipe(duplex=False)
    process = FORKS.Process(target=_draw, args=(there,))
    process.start()
    there.close()
    drawn = here.recv()
    process.join()
    later = all_of(digits.train, batch_size=7, seed=3, epoch=4, start=190)[10:]
    assert drawn == [x.double().sum().item() for x, _ in later] and len(drawn) == 1437 // 7 - 200


def _draw(said):
    stream = batches(make().train, batch_size=7, seed=3, epoch=4, train=True, start=200, workers=0)
    said.send([x.double().sum().item() for x, _ in stream])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("start", [0, 1, 3, 4, 9])
def test_start_continues(small, start, workers):
    whole = all_of(small, epoch=3)
    assert len(whole) == batches_per_epoch(small, 64) == 4
    assert same(whole[start:], all_of(small, epoch=3, start=start, workers=workers))


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_off_iterations_leave_no_trace(small, workers):
    expected = all_of(small)
    stream = batches(small, batch_size=64, seed=0, epoch=5, train=True, workers=workers)
    next(stream)
    del stream
    assert same(expected, all_of(small, workers=workers))
    pair = [batches(small, batch_size=64, seed=0, epoch=0, train=True, workers=workers) for _ in range(2)]
    for expected_batch, one, other in zip(expected[:3], *pair, strict=False):  # two at the same time
        assert same([expected_batch], [one]) and same([expected_batch], [other])


def test_order_changes_with_epoch_and_seed(small):
    labels = [torch.cat([y for _, y in all_of(small, **case)]) for case in ({}, {"epoch": 1}, {"seed": 1})]
    assert not torch.equal(labels[0], labels[1]) and not torch.equal(labels[0], labels[2])
    assert (labels[0].bincount(minlength=10) - torch.tensor(np.bincount(small.records.labels))).abs().sum() == 300 - 256


def test_evaluation_sees_every_sample_once(digits):
    expected = torch.tensor(digits.val.records.labels)
    for world in (1, 2, 7):
        parts = [all_of(digits.val, train=False, batch_size=50, rank=rank, world=world) for rank in range(world)]
        labels = torch.cat([y for part in parts for _, y in part])
        assert len(labels) == 360 and torch.equal(labels.sort()[0], expected.sort()[0])
    assert torch.equal(torch.cat([y for _, y in all_of(digits.val, train=False)]), expected)


def test_ranks_share_one_order(small):
    """Two ranks with batches of 16 see in step k what one rank sees in its micro-batches 2k and 2k + 1."""
    alone = all_of(small, batch_size=16)
    ranks = [all_of(small, batch_size=16, rank=rank, world=2) for rank in range(2)]
    together = [batch for pair in zip(*ranks, strict=True) for batch in pair]
    assert same(alone[: len(together)], together) and len(together) == 300 // 32 * 2


def test_repeats(small):
    images, labels = all_of(small, batch_size=6, repeats=3)[0]
    assert labels.unique_consecutive().numel() <= 2
    assert not torch.equal(images[0], images[1]) and labels[0] == labels[1] == labels[2]
    assert len(all_of(small, repeats=3)) == batches_per_epoch(small, 64) == 4


@pytest.mark.parametrize("world", [1, 2, 4])
def test_copies_of_an_image_lie_in_different_parts(small, world):
    """A step of 24 is shared by four parts of six, on one, two or four processes; its samples are the same."""
    given = {"seed": 0, "epoch": 2, "train": True, "repeats": 3}
    whole = [batch.keys for batch in plan_batches(small, batch_size=24, **given)]
    ranks = [
        plan_batches(small, batch_size=6, **given, world=world, rank=rank, micro_batches=4) for rank in range(world)
    ]
    parts = [batch.keys for each in zip(*ranks, strict=True) for batch in each]
    assert parts == [step[part::4] for step in whole for part in range(4)] and len(whole) == 300 // 24
    assert all(len({index for index, _, _ in part}) == 6 for part in parts)
    for rank, planned in enumerate(ranks):
        rest = plan_batches(small, batch_size=6, **given, world=world, rank=rank, micro_batches=4, start=5)
        assert [batch.keys for batch in rest] == [batch.keys for batch in planned[5:]]


@pytest.mark.parametrize("repeats", [1, 3])
def test_the_order_is_a_permutation_cut_into_parts(small, repeats):
    """Written out: each image of a permutation `repeats` times in a row, a step of 24 of these shared by four parts."""
    shuffled = torch.randperm(300, generator=torch.Generator().manual_seed(seed_of(Stream.ORDER, 7, 2))).tolist()
    keys = [(index, 2, copy) for index in shuffled[: 300 // repeats] for copy in range(repeats)]
    steps = [keys[first : first + 24] for first in range(0, 288, 24)]
    parts = [step[6 * p : 6 * p + 6] if repeats == 1 else step[p::4] for step in steps for p in range(4)]
    given = {"seed": 7, "epoch": 2, "train": True, "repeats": repeats, "micro_batches": 4, "world": 2, "start": 3}
    planned = plan_batches(small, batch_size=6, **given, rank=1)
    expected = [Batch(part) for part in parts[1::2][3:]]
    assert list(planned) == expected and len(planned) == 21 and planned[-1] == expected[-1]
    assert list(planned[2:5]) == expected[2:5] and list(planned[-4:]) == expected[-4:]
    assert all(type(number) is int for key in planned[0].keys for number in key)


def test_the_images_of_a_step_need_the_order_once_and_no_other_batches(small, monkeypatch):
    cfg = compose(["data.batch_size=24", "seed=7"])
    made, drawn, permuted = [], [], torch.randperm
    monkeypatch.setattr(loader, "Batch", lambda keys: made.append(keys) or Batch(keys))
    monkeypatch.setattr(torch, "randperm", lambda *args, **kwargs: drawn.append(args) or permuted(*args, **kwargs))
    loader.order.cache_clear()
    found = plan.images_of(cfg, plan.Plan(3, 2, 4, 12, 24, 12), small, 14)
    assert len(made) == 8 and len(drawn) == 1
    shuffled = permuted(300, generator=torch.Generator().manual_seed(seed_of(Stream.ORDER, 7, 1))).tolist()[48:72]
    parts = [shuffled[first : first + 3] for first in range(0, 24, 3)]
    assert found == [index for rank in range(4) for part in parts[rank::4] for index in part]


def test_parts_without_copies_are_slices(small):
    given = {"seed": 0, "epoch": 2, "train": True}
    whole = [key for batch in plan_batches(small, batch_size=24, **given) for key in batch.keys]
    parts = [batch.keys for batch in plan_batches(small, batch_size=6, **given, micro_batches=4)]
    assert parts == [whole[first : first + 6] for first in range(0, len(whole), 6)]


@pytest.mark.parametrize("recipe", ["quick", "paper", "finetune"])
def test_what_must_not_be_mirrored_is_not(recipe):
    """Whatever the recipe: the data says it, or the person whose data it is."""
    digits, photos = (compose([f"recipe={recipe}", data]) for data in ("data=digits", "data=imagefolder"))
    signs = compose([f"recipe={recipe}", "data=imagefolder", "data.hflip=0"])
    assert (digits.augment.hflip, photos.augment.hflip, signs.augment.hflip) == (0, 0.5, 0)


@pytest.mark.parametrize("workers", [0, 2])
def test_global_random_state_is_untouched(digits, workers):
    def draw():
        return random.random(), np.random.rand(), torch.rand(()).item()

    random.seed(7), np.random.seed(7), torch.manual_seed(7)
    expected = [draw() for _ in range(4)]
    random.seed(7), np.random.seed(7), torch.manual_seed(7)
    stream = batches(digits.train, batch_size=8, seed=0, epoch=0, train=True, workers=workers)
    seen = [draw()]
    batch = next(stream)
    seen.append(draw())
    next(stream)
    seen.append(draw())
    digits.train.sample(0, 0)
    Mix(OmegaConf.create(MIX), 10)(*batch, seed=0, step=0)
    seen.append(draw())
    assert seen == expected


def test_streams():
    assert seed_of(0, 1) == seed_of(0, 1) != seed_of(1, 0) and seed_of(0) != seed_of(0, 0, 1)
    with preserved():
        reseed(1, 2)
        one = random.random(), np.random.rand(), torch.rand(()).item()
        reseed(1, 3)
        two = random.random(), np.random.rand(), torch.rand(()).item()
    assert all(a != b for a, b in zip(one, two, strict=True))


def test_batch_larger_than_the_data(digits):
    with pytest.raises(DataError, match=r"1437 images, fewer than one batch of 4096: set data.batch_size="):
        batches(digits.train, batch_size=2048, world=2, seed=0, epoch=0, train=True)


def test_worker_count(digits, monkeypatch):
    assert worker_count(digits.train) == 0 and worker_count(digits.train, 3) == 3
    monkeypatch.setattr("recipes.data.loader.TINY", 10)
    for cores, expected in ((1, 0), (2, 1), (5, 4), (64, 4)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: set(range(cores)))
        assert worker_count(digits.train) == expected
    # of eight machines: the processes of this one share its cores
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
    assert worker_count(digits.train) == 2


def test_workers_end_with_a_killed_parent(digits):
    ours, theirs = multiprocessing.get_context("fork").Pipe()

    # forked children must not meet the idle workers of other tests
    source = Source(digits.train.records, digits.train.transform, name="", seed=0)

    def parent():
        stream = batches(source, batch_size=8, seed=0, epoch=0, train=True, workers=2)
        next(stream)
        theirs.send([process.pid for process in multiprocessing.active_children()])
        time.sleep(600)

    child = multiprocessing.get_context("fork").Process(target=parent)
    child.start()
    workers = ours.recv()
    assert len(workers) == 2 and all(alive(pid) for pid in workers)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    limit = time.monotonic() + 30
    while any(alive(pid) for pid in workers):
        assert time.monotonic() < limit, "workers outlive their parent"
        time.sleep(0.1)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_bug_in_a_worker_keeps_its_traceback(digits):
    source = Source(digits.val.records, lambda image: 1 / 0, name="the broken set", seed=0)
    with pytest.raises(DataError, match=r"(?s)sample 0 of the broken set .*row .*ZeroDivisionError"):
        all_of(source, train=False, workers=1)


def test_a_worker_that_is_killed(digits):
    def deadly(image):
        os.kill(os.getpid(), signal.SIGKILL)

    source = Source(digits.val.records, deadly, name="the deadly set", seed=0)
    with pytest.raises(DataError, match=r"a process reading the deadly set died: .*data\.workers"):
        all_of(source, train=False, workers=1)
    assert not source.idle


FULL_SHM = """
import sys
from recipes.data import Source
from source_cases import all_of, make

if sys.argv[1] == "lists":  # as for images of different sizes
    Source.collate = lambda self, samples: tuple(map(list, zip(*samples)))
all_of(make().train, workers=2)
"""


@pytest.mark.parametrize("batch", ["stacked", "lists"])
def test_no_room_to_hand_over_batches(batch):
    """As in a container, where /dev/shm may be small."""
    mount = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=64k none /dev/shm && exec "$@"', "sh"]
    if shutil.which("unshare") is None or subprocess.run([*mount, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    command, env = [*mount, sys.executable, "-c", FULL_SHM, batch], {**os.environ, "PYTHONPATH": str(ROOT / "tests")}
    done = subprocess.run(command, cwd=ROOT, env=env, text=True, capture_output=True, timeout=PATIENCE)
    # PyTorch 2.9 does not ask for room first, so that a worker dies of a bus error
    said = "DataError: (the training set of digits: unable|a process reading the training set of digits died).*/dev/shm"
    assert re.search(f"(?s){said}.* is full.* give the container a larger one", done.stderr)


def test_a_bug_in_a_collation_keeps_its_traceback(digits, monkeypatch):
    monkeypatch.setattr(Source, "collate", lambda self, samples: torch.zeros(2).view(3))
    for workers in (0, 1):
        source = Source(digits.val.records, digits.val.transform, name="the broken set", seed=0)
        with pytest.raises(DataError, match=r"(?s)^the broken set: Traceback .*RuntimeError: shape '\[3\]' is invalid"):
            all_of(source, train=False, workers=workers)


def test_speed_is_printed(monkeypatch, capsys):
    monkeypatch.setattr(speed, "SECONDS", 0.1)
    monkeypatch.setattr(speed, "TURNS", 1)
    monkeypatch.setattr(sys, "argv", ["recipes.data", "data.workers=0", "data.img_size=32"])
    speed.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("digits: 1437 training and 360 validation images, 10 classes, 32 px")
    assert all("ours" in line and "timm" in line and "0 workers" in line for line in lines[1:]) and len(lines) == 3


def test_speed_of_dense_data_is_printed_alone(monkeypatch, capsys):
    """timm's loader reads no label maps."""
    monkeypatch.setattr(speed, "SECONDS", 0.1)
    monkeypatch.setattr(speed, "TURNS", 1)
    given = ["task=segment", "data=scenes", "data.img_size=32", "data.train_count=20", "data.val_count=4"]
    monkeypatch.setattr(sys, "argv", ["recipes.data", *given])
    speed.main()
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.startswith("scenes: 20 training and 4 validation images, 11 classes, 32 px") and len(lines) == 2
    assert all("ours" in line and "timm" not in line for line in lines)


@pytest.mark.parametrize("number", stop.SIGNALS)
def test_signals_wait_until_workers_are_set_up(number):
    """A worker that is not forked would die by one, while this process fills its pipe."""
    arrived, started = [], []

    class Loader:
        def __iter__(self):
            signal.raise_signal(number)
            started.append(list(arrived))
            return iter(())

    before = signal.signal(number, lambda number, frame: arrived.append(number))
    try:
        loader._started(Loader())
    finally:
        signal.signal(number, before)
    assert (started, arrived) == ([[]], [number])


@pytest.mark.parametrize("chosen, taken", [(None, "fork"), ("spawn", None), ("forkserver", None)])
def test_workers_are_forked_unless_the_program_chose_otherwise(monkeypatch, chosen, taken):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda allow_none: chosen)
    assert loader._context() == taken


def test_the_table_of_the_loader(monkeypatch, capsys, tmp_path):
    """Every kind of set; where timm's loader takes part, its labels are those of our batches."""
    cases = ["500x375 at 224", "2048x1536 at 224", "500x375 at 224, archives", "500x375 at 224, parquet"]
    given = ["--seconds", "0.1", "--turns", "1", "--scale", "0.1", "--workers", "0", "--out", str(tmp_path), "--cases"]
    monkeypatch.setattr(sys, "argv", ["bench", *given, *cases])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(bench.SIZES, "2048x1536", ((400, 300), 400))
    bench.main()
    text = (tmp_path / "data_cpu.md").read_text()
    assert text.strip() in capsys.readouterr().out
    rows = [
        line.split(" | ") for line in text.splitlines() if line.startswith("| 500x375") or line.startswith("| 2048")
    ]
    assert [len(row) for row in rows] == [6] * 4 and [row[3] == "-" for row in rows] == [False, False, True, True]


def test_timm_learns_from_images_of_the_same_size(digits):
    cfg = OmegaConf.merge(config(), {"data": {"eval_img_size": 48}})
    loader = timm_loader(cfg, Plain(digits.train, [3, 1, 2]), 3, train=True, workers=0, prefetch=False)
    assert next(iter(loader))[0].shape[2:] == digits.train.sample(3, 0)[0].shape[1:]


def test_timm_is_given_the_same(digits):
    """The peer of the measurement: the same images, and in an evaluation the same tensors."""
    cfg = config()
    for prefetch in (True, False):
        loader = timm_loader(cfg, Plain(digits.val, [3, 1, 2]), 3, train=False, workers=0, prefetch=prefetch)
        ((images, labels),) = list(loader)
        expected = torch.stack([digits.val.sample(index, 0)[0] for index in (3, 1, 2)])
        assert torch.allclose(images, expected, atol=1e-5) and labels.tolist() == [
            digits.val.label(i) for i in (3, 1, 2)
        ]


@pytest.mark.parametrize("error", [ConnectionResetError("gone"), BrokenPipeError("gone"), EOFError("gone")])
def test_a_worker_that_is_left_alone_is_silent(capsys, error):
    """Its parent ends, by a second Ctrl-C for one, while it hands over a batch; other errors are printed."""
    loader._unless_left_alone(type(error), error, None)
    assert capsys.readouterr().err == ""
    loader._unless_left_alone(ValueError, ValueError("a fault"), None)
    assert "ValueError: a fault" in capsys.readouterr().err


@pytest.mark.parametrize("error", [ConnectionResetError("gone"), EOFError("gone"), RuntimeError("gone")])
def test_a_worker_that_is_gone_is_told_alike(small, monkeypatch, error):
    """Whether it is killed before, while, or after it hands over a batch."""

    def lost(loader):
        raise error

    monkeypatch.setattr("recipes.data.loader._started", lost)
    with pytest.raises(DataError, match=r"a process reading 300 digits died: gone\. Lower"):
        next(batches(small, batch_size=4, train=True, seed=0, epoch=0, workers=0))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        ("worker (pid 7) is killed by signal: Bus error. It may be out of shared memory. ",
         "a process reading 300 digits died: worker (pid 7) is killed by signal: Bus error. It may be out of shared "
         "memory. Lower data.workers or free memory; if /dev/shm is full, give the container a larger one (docker run "
         "--shm-size=8g), or set data.workers=0"),
        ("Caught RuntimeError in pin memory thread for device 0.", "300 digits could not be read: Caught RuntimeError "
         "in pin memory thread for device 0."),
    ],
)  # fmt: skip
def test_what_the_loader_raises_is_told_apart(small, monkeypatch, error, said):
    def lost(loader):
        raise RuntimeError(error)

    monkeypatch.setattr("recipes.data.loader._started", lost)
    with pytest.raises(DataError) as raised:
        next(batches(small, batch_size=4, train=True, seed=0, epoch=0, workers=0))
    assert str(raised.value) == said
