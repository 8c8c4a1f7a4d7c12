"""What a user may not read is named, whichever command meets it, and none ends in a traceback."""

import pytest

from children import closed
from dense_cases import KINDS
from recipes.config import compose
from recipes.data import DataError, build, dense
from shard_cases import parquets, tars
from source_cases import photos

pytestmark = pytest.mark.usefixtures("own_caches")
TASKS = {"ade20k": "segment", "voc": "segment", "cityscapes": "segment", "coco": "detect"}


def read(name, root):
    """The data set of this name."""
    task = TASKS.get(name, "classify")
    cfg = compose([f"task={task}", f"data={name}", f"data.root={root}"])
    return build(cfg) if task == "classify" else dense.build(cfg, KINDS[task])


@pytest.fixture
def folder(tmp_path):
    """Something for each source."""
    root = photos(tmp_path / "private" / "set")
    tars(root, (3,))
    parquets(root, (3,))
    return root


@pytest.mark.parametrize("name", ["imagefolder", "webdataset", "parquet_stream", "arrow", "imagenet", *TASKS])
@pytest.mark.parametrize("mode", [0, 0o644], ids=oct)
@pytest.mark.parametrize("place", ["around", "itself"])
def test_data_that_may_not_be_entered(folder, capsys, name, mode, place):
    """0o644 may be listed, and nothing in it looked at."""
    with closed(folder.parent if place == "around" else folder, mode), pytest.raises(DataError) as raised:
        read(name, folder)
    said = str(raised.value) + capsys.readouterr().err  # archives and tables may lie below what is left out
    assert f"[Errno 13] Permission denied: '{folder}" in said
