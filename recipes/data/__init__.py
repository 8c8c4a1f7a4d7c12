"""Images and labels for training and evaluation.

    data = build(cfg)                            # cfg: the whole configuration, see recipes/conf
    for images, labels in batches(data.train, batch_size=64, seed=0, epoch=0, train=True): ...

Sample `index` of epoch `epoch` is a function of (seed, epoch, index): neither the number of workers nor a restart nor
what was read before changes it. Nothing here uses the network unless a data set of the hub is asked for by name.
"""

from recipes.data.build import Data, build
from recipes.data.errors import BadImage, DataError, Misread, NoBatch
from recipes.data.loader import batches, batches_per_epoch, worker_count
from recipes.data.mix import Mix
from recipes.data.position import check_position, stream_state
from recipes.data.source import Source

__all__ = [
    "BadImage",
    "Data",
    "DataError",
    "Misread",
    "Mix",
    "NoBatch",
    "Source",
    "batches",
    "batches_per_epoch",
    "build",
    "check_position",
    "stream_state",
    "worker_count",
]
