"""The position in a streamed training set after a number of batches, as stored in a checkpoint."""

import hashlib
from typing import Any

from recipes.data import stream_order
from recipes.data.errors import DataError
from recipes.data.loader import stream_order_of
from recipes.data.source import Source

ADVICE = {
    "ranks": "start it with that many processes",
    "workers": "set data.workers={}",
    "images": "give it the shards that it was started with",
    "shards": "give it the shards that it was started with",
}


def stream_state(
    source: Source, *, epoch: int, start: int, readers: bool = True, **options: Any
) -> dict[str, Any] | None:
    """The state of a source in shards after `start` batches of each rank in an epoch; None for one read by index.

    readers  whether to add the position of every reader, which takes the order of the whole epoch on all ranks
    options  batch_size, seed, workers, world, repeats, as for `batches`
    Nothing of it has to be restored, as all is arithmetic: it is for information, and for `check_position`, which does
    not look at the readers.
    """
    found = stream_order_of(source, **options)
    if found is None:
        return None
    names = source.records.names
    shards = "\n".join(f"{name} {count}" for name, count in zip(names, found.counts, strict=True))
    state = {
        "ranks": found.world,
        "workers": found.readers,
        "images": sum(found.counts),
        "shards": hashlib.sha256(shards.encode()).hexdigest()[:16],
        "epoch": epoch,
        "batch": start,
    }
    return state | ({"readers": stream_order.readers_at(found, names, epoch, start)} if readers else {})


def check_position(saved: dict[str, Any] | None, now: dict[str, Any] | None) -> None:
    """Raise DataError if a streamed set would continue in another order than the one in which it was started."""
    if saved is None or now is None:
        return
    wrong = [key for key in ADVICE if saved[key] != now[key]]
    if wrong:
        said = "; ".join(
            f"{key}: started with {saved[key]}, now {now[key]} ({ADVICE[key].format(saved[key])})" for key in wrong
        )
        raise DataError(f"the order of a streamed training set would change in mid-run: {said}; or start a new run")
