"""Where a streamed training set is after so many batches: what a checkpoint says of it."""

import hashlib
from typing import Any

from recipes.data import law
from recipes.data.errors import DataError
from recipes.data.loader import law_of
from recipes.data.source import Source

ADVICE = {
    "ranks": "start it with that many processes",
    "workers": "give data.workers={}",
    "images": "give it the shards that it was begun with",
    "shards": "give it the shards that it was begun with",
}


def position(source: Source, *, epoch: int, start: int, **options: Any) -> dict[str, Any] | None:
    """The state of a source in shards after `start` batches of each rank in an epoch; None for one read by index.

    options  batch_size, seed, workers, world, repeats, as `batches` takes them
    Nothing of it has to be restored, all is arithmetic: it is there to be read, and for `check_position` to compare.
    """
    found = law_of(source, **options)
    if found is None:
        return None
    names = source.records.names
    shards = "\n".join(f"{name} {count}" for name, count in zip(names, found.counts, strict=True))
    return {
        "ranks": found.world,
        "workers": found.readers,
        "images": sum(found.counts),
        "shards": hashlib.sha256(shards.encode()).hexdigest()[:16],
        "epoch": epoch,
        "batch": start,
        "readers": law.position(found, names, epoch, start),
    }


def check_position(saved: dict[str, Any] | None, now: dict[str, Any] | None) -> None:
    """Raise DataError where a streamed set would go on in another order than that in which it was begun."""
    if saved is None or now is None:
        return
    wrong = [key for key in ADVICE if saved[key] != now[key]]
    if wrong:
        said = "; ".join(
            f"{key}: it was begun with {saved[key]}, now {now[key]} ({ADVICE[key].format(saved[key])})" for key in wrong
        )
        raise DataError(f"the order of a streamed training set would change in mid-run: {said}; or begin a new run")
