"""The order of streamed epochs: every sample once, every position by arithmetic."""

import numpy as np
import pytest

from recipes.data.stream_order import Streamed, StreamOrder, readers_at

COUNTS = (7, 30, 1, 22, 40, 13)
NAMES = [f"shard{number}" for number in range(len(COUNTS))]
ORDERS = [
    StreamOrder(COUNTS, buffer, 0, world, readers, batch, repeats)
    for buffer, world, readers, batch, repeats in (
        (10, 1, 1, 8, 1), (10, 2, 3, 4, 1), (1, 1, 2, 5, 1), (1000, 3, 1, 7, 1), (16, 2, 2, 6, 3), (5, 1, 4, 9, 2),
    )
]  # fmt: skip


def keys(planned):
    return [batch.keys for batch in planned]


@pytest.mark.parametrize("order", ORDERS)
def test_every_sample_at_most_once(order):
    for epoch in range(3):
        seen = [key for rank in range(order.world) for batch in Streamed(order, epoch, rank) for key in batch.keys]
        assert len(seen) == order.world * order.batches * order.batch and len(set(seen)) == len(seen)
        if order.repeats == 1:  # what no batch needs is less than one batch of every rank
            assert len({index for index, _, _ in seen}) > 113 - order.world * order.batch
        assert all(copy in range(order.repeats) and when == epoch for _, when, copy in seen)


@pytest.mark.parametrize("order", ORDERS)
def test_any_start_continues(order):
    """A reader that begins anywhere is told to read what it needs and nothing else, in the order of its part."""
    for rank in range(order.world):
        whole = Streamed(order, 1, rank)
        for start in range(order.batches + 1):
            rest = Streamed(order, 1, rank, start)
            assert keys(rest) == keys(whole)[start:]
            held, read = [set() for _ in range(order.readers)], [[] for _ in range(order.readers)]
            for number, batch in enumerate(rest, start):
                reader = number % order.readers
                assert batch.opens == (not read[reader])
                read[reader] += batch.reads
                held[reader] |= set(batch.reads)
                needed = {index for index, _, _ in batch.keys}
                assert needed <= held[reader] and len(held[reader]) <= order.buffer + len(needed)
                held[reader] -= set(batch.done)
            for reader in range(order.readers):
                part = order.part(1, rank, reader).tolist()
                assert read[reader] == [index for index in part if index in set(read[reader])]
                given = {
                    index
                    for batch in rest[(reader - start) % order.readers :: order.readers]
                    for index, _, _ in batch.keys
                }
                assert (
                    len(set(read[reader]) - given) < order.buffer
                )  # held at the end, where repeats cut the last short


def test_the_order_is_a_function_of_seed_epoch_and_law():
    order = ORDERS[0]
    base = keys(Streamed(order, 0, 0))
    indices = [[index for index, _, _ in batch] for batch in base]
    for other in (
        StreamOrder(COUNTS, 10, 1, 1, 1, 8),
        StreamOrder(COUNTS, 11, 0, 1, 1, 8),
        StreamOrder(COUNTS, 10, 0, 1, 2, 8),
    ):
        assert keys(Streamed(other, 0, 0)) != base
    assert [[index for index, _, _ in batch.keys] for batch in Streamed(order, 1, 0)] != indices
    # written down so that a change of the order, which would change runs that go on, is seen
    assert indices[0] == RECORDED


RECORDED = [3, 7, 11, 5, 14, 15, 16, 10]


def test_what_is_left_out_changes_with_the_epoch():
    order = StreamOrder((10,) * 10, 10, 0, 1, 1, 8)
    left = [
        set(range(100)) - {i for batch in Streamed(order, epoch, 0) for i, _, _ in batch.keys} for epoch in range(200)
    ]
    assert all(len(rest) == 4 for rest in left) and len(set().union(*left)) > 95


def test_shuffling():
    """The buffer moves samples by about its size, forwards and back."""
    order = StreamOrder((1000,) * 20, 300, 0, 1, 1, 10)
    given = order.given(0, 0, 0)
    assert sorted(given.tolist()) == list(range(20_000))
    late = np.arange(20_000) - given
    assert late.min() >= -299 and 200 < np.abs(late).mean() < 400
    shards = [order.sequence(epoch)[::1000] // 1000 for epoch in range(2)]
    assert shards[0].tolist() != shards[1].tolist() and set(shards[0]) == set(range(20))


def test_position():
    order = StreamOrder(COUNTS, 10, 0, 2, 2, 4)
    assert all(reader["held"] == 0 and reader["next"] == reader["oldest"] for reader in readers_at(order, NAMES, 0, 0))
    for start in range(1, order.batches + 1):
        for found in readers_at(order, NAMES, 0, start):
            rank, reader = found["rank"], found["reader"]
            rest = Streamed(order, 0, rank, start)[(reader - start) % 2 :: 2]
            done = Streamed(order, 0, rank)[:start][reader::2]
            read = {index for batch in done for index in batch.reads}
            assert found["held"] == len(read) - len({key for batch in done for key in batch.keys}) <= 10
            first = next(iter(rest[0].reads), None) if rest else None
            assert found["oldest"] == (None if first is None else place(first))
            part = order.part(0, rank, reader)
            assert found["next"] == (None if len(read) == len(part) else place(part[len(read)]))
            assert found["seed"] == order.buffer_seed(0, rank, reader)


def place(index):
    shard = int(np.searchsorted(np.cumsum(COUNTS), index, side="right"))
    return [NAMES[shard], int(index - sum(COUNTS[:shard]))]


def test_parts_of_a_plan_are_those_of_a_list():
    plan = Streamed(ORDERS[0], 1, 0, 3)
    whole = list(plan)
    assert len(plan) == len(whole) == ORDERS[0].batches - 3 and len(Streamed(ORDERS[0], 1, 0, 1000)) == 0
    for place in (slice(2), slice(-2, None), slice(1, None, 3), slice(5, 2), slice(None)):
        assert plan[place] == whole[place]
    assert plan[-1] == whole[-1] and plan[2] == whole[2]
    with pytest.raises(IndexError):
        plan[len(whole)]


def test_a_plan_is_made_as_it_is_reached(monkeypatch):
    asked, given = [], StreamOrder.given
    monkeypatch.setattr(StreamOrder, "given", lambda *args: asked.append(args[1:]) or given(*args))
    order = StreamOrder((1000,) * 20, 50, 12345, 2, 100, 8)
    plan = iter(Streamed(order, 0, 1))
    assert not asked
    assert [len(next(plan).keys) for _ in range(3)] == [8] * 3 and asked == [(0, 1, 0), (0, 1, 1), (0, 1, 2)]
    # 200 readers, of which none is computed twice
    first, second = (readers_at(order, NAMES * 5, 0, start) for start in (4, 5))
    assert len(asked) == len(set(asked)) == 200 and first != second
