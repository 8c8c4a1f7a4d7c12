"""Sharded checkpoints: read back as written, and never run."""

import pickle
from pathlib import Path, PosixPath

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from ranks import on_ranks
from recipes import checkpoint, config, distributed, sharded_reader, sharding


class Hostile:
    """Unpickled, it would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (exec, (f"open({str(self.path)!r}, 'w').close()",))


def states(value=0.0):
    model = nn.Linear(3, 4)
    nn.init.constant_(model.weight, value)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.25)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return sharding.tree({"model": model}, optimizer)


@pytest.fixture
def written(tmp_path):
    folder = tmp_path / "step" / "sharded"
    dcp.save(states(value=2.0), checkpoint_id=folder)
    return folder


def opened(folder):
    return checkpoint.Checkpoint(folder.parent, {"files": {"sharded/.metadata": {}}})


def fill(folder):
    found = states()
    opened(folder).fill(found)
    return found


@pytest.mark.filterwarnings("error:.*the intent is to load in a single process")
def test_comes_back(written):
    found = fill(written)
    want = states(value=2.0)
    assert torch.equal(found["model"]["weight"], want["model"]["weight"])
    assert found["optimizer"]["param_groups"][0]["lr"] == 0.25
    assert torch.equal(found["optimizer"]["state"]["weight"]["exp_avg"], torch.full((4, 3), 0.1))


def test_what_is_younger_than_the_checkpoint_stays_as_the_model_has_it(tmp_path):
    """Weights of classes, which the first segmenters did not save."""
    folder = tmp_path / "step" / "sharded"
    dcp.save({"model": {"weight": torch.ones(3)}}, checkpoint_id=folder)
    found = {"model": {"weight": torch.zeros(3), "class_weights": torch.ones(2)}}
    opened(folder).fill(found)
    assert found["model"].keys() == {"weight"} and torch.equal(found["model"]["weight"], torch.ones(3))
    with pytest.raises(checkpoint.CheckpointError, match=r"Missing key in checkpoint state_dict: model\.bias"):
        opened(folder).fill({"model": {"bias": torch.ones(2)}})


def read_alone(folder):
    """The weights, read by the first of two processes; the other does not come."""
    distributed.join(config.compose([]))
    if distributed.rank() == 0:
        return opened(folder).tensors("model")["weight"].tolist()


def test_one_process_reads_alone(written):
    assert on_ranks(2, read_alone, written) == [states(value=2.0)["model"]["weight"].tolist(), None]


def test_a_part_is_read_without_a_model(written):
    found = opened(written)
    assert {name: tuple(tensor.shape) for name, tensor in found.tensors("model").items()} == {
        "weight": (4, 3), "bias": (4,)
    }  # fmt: skip
    assert torch.equal(found.tensors("model")["weight"], states(value=2.0)["model"]["weight"])
    assert found.has("model") and not found.has("ema") and found.tensors("ema") == {}


def changed(folder, change):
    """Change an index that torch wrote, as someone else could."""
    index = pickle.loads((folder / ".metadata").read_bytes())
    change(index)
    (folder / ".metadata").write_bytes(pickle.dumps(index))


def test_more_is_not_promised_than_there_is(written):
    def change(index):
        tensor = index.state_dict_metadata["model.weight"]
        tensor.size = tensor.chunks[0].sizes = torch.Size([2**40, 3])

    changed(written, change)
    with pytest.raises(checkpoint.CheckpointError, match=r"declares 13,194,139,533,328 bytes of model, but .* holds"):
        opened(written).tensors("model")


def weight(index):
    return index.state_dict_metadata["model.weight"]


def cut(index):
    """The last row is in no part."""
    weight(index).chunks[0].sizes = torch.Size([3, 3])


def moved(index):
    """One part, beyond the tensor."""
    weight(index).chunks[0].offsets = torch.Size([1, 0])


def lost(index):
    index.storage_data = {key: place for key, place in index.storage_data.items() if key.fqn != "model.weight"}


def negative(index):
    weight(index).size = (-4, -3)


def untyped(index):
    weight(index).properties.dtype = None


def listed(index):
    index.state_dict_metadata = [1, 2]


def compressed(index):
    next(iter(index.storage_data.values())).transform_descriptors = ["zstd"]


def numbered(index):
    next(iter(index.storage_data.values())).relative_path = 5


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (cut, r"parts of model\.weight that are not all of its \(4, 3\)"),
        (moved, r"parts of model\.weight that are not all"),
        (lost, r"does not say where all parts of model\.weight are"),
        (negative, r"a size or an offset that cannot be one"),
        (untyped, r"a NoneType where a dtype belongs"),
        (listed, r"a list where a dict belongs"),
        (compressed, r"is compressed"),
        (numbered, r"a int where a str belongs"),
    ],
)
def test_what_an_index_says_is_checked(written, change, said):
    """Otherwise memory as it was would be weights, or torch's errors would have no name of a file."""
    changed(written, change)
    for read in (lambda: opened(written).tensors("model"), lambda: fill(written)):
        with pytest.raises(checkpoint.CheckpointError, match=said):
            read()


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x80\x04]r\xff\xff\xff\xff.", b"\x80\x04N", b"\x80\x04)R."])
def test_a_damaged_index(written, content):
    whole = (written / ".metadata").read_bytes()
    for damaged in (content, whole[: len(whole) // 2]):
        (written / ".metadata").write_bytes(damaged)
        with pytest.raises(checkpoint.CheckpointError, match=r"its index, .*\.metadata, is damaged: ."):
            fill(written)


def test_a_file_that_is_cut_off(written):
    file = written / "__0_0.distcp"
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(
        checkpoint.CheckpointError, match=rf"0\.distcp is cut off: it has {size - 1:,} bytes and should"
    ):
        fill(written)
    file.write_bytes(bytes(size))
    with pytest.raises(checkpoint.CheckpointError, match="or is damaged; nothing in it was run"):
        fill(written)


def named(module, name):
    """How a pickle refers to a class."""
    return f"c{module}\n{name}\n".encode()


@pytest.mark.parametrize("module", ["pathlib", "pathlib._local"])
def test_an_index_may_have_paths_of_any_version_of_python(written, module):
    whole = (written / ".metadata").read_bytes()
    (written / ".metadata").write_bytes(b"\x80\x04" + named(module, "PosixPath") + b"0" + whole[2:])
    fill(written)


def test_an_index_changes_no_class(written):
    """A pickle can set attributes of the classes that it names: paths that are not resolved would leave the folder."""
    whole = (written / ".metadata").read_bytes()
    path, word = named("pathlib", "PosixPath"), b"X\x07\x00\x00\x00resolve"
    (written / ".metadata").write_bytes(
        b"\x80\x04" + path + b"N}" + word + named("pathlib", "PurePosixPath") + b"s\x86b0" + whole[2:]
    )
    with pytest.raises(checkpoint.CheckpointError, match=r"its index, .* is damaged"):
        fill(written)
    assert PosixPath.resolve is Path.resolve


def test_an_index_is_not_run(written, tmp_path):
    (written / ".metadata").write_bytes(pickle.dumps(Hostile(tmp_path / "ran")))
    with pytest.raises(checkpoint.CheckpointError, match=r"asks for builtins\.exec.* nothing was executed"):
        fill(written)
    assert not (tmp_path / "ran").exists()


def test_a_value_is_not_run(tmp_path):
    folder = tmp_path / "step" / "sharded"
    hostile = states()
    hostile["optimizer"]["param_groups"][0]["lr"] = Hostile(tmp_path / "ran")
    dcp.save(hostile, checkpoint_id=folder)
    with pytest.raises(checkpoint.CheckpointError, match="could not read the checkpoint"):
        fill(folder)
    assert not (tmp_path / "ran").exists()


def test_files_stay_in_their_folder(written):
    def change(index):
        next(iter(index.storage_data.values())).relative_path = "../../elsewhere"

    changed(written, change)
    with pytest.raises(checkpoint.CheckpointError, match=r"'../../elsewhere', which is outside its folder"):
        fill(written)


def test_a_link_out_of_the_folder_and_a_missing_file(written, tmp_path):
    file = written / "__0_0.distcp"
    file.rename(tmp_path / "elsewhere")
    with pytest.raises(checkpoint.CheckpointError, match=r"__0_0\.distcp is missing"):
        fill(written)
    file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(checkpoint.CheckpointError, match="which is outside its folder"):
        fill(written)


def test_names_must_fit(written):
    found = {"model": {"other": torch.zeros(2)}}
    with pytest.raises(checkpoint.CheckpointError, match="other"):
        opened(written).fill(found)


@pytest.mark.parametrize("found", [{"other": torch.zeros(2)}, {"weight": torch.zeros(2, 2)}])
def test_what_does_not_fit_is_not_to_be_removed(written, found):
    with pytest.raises(checkpoint.CheckpointError, match="of another model, or another version") as error:
        opened(written).fill({"model": found})
    assert "remove it" not in str(error.value)


def test_another_kind_of_index(written):
    (written / ".metadata").write_bytes(pickle.dumps(torch.Size([1])))
    with pytest.raises(checkpoint.CheckpointError, match="has a tuple where a Metadata belongs"):
        fill(written)


def test_what_is_known_is_there():
    for module, names in (sharded_reader.RECORDS | sharded_reader.VALUES).items():
        held = __import__(module, fromlist=["_"])
        assert all(hasattr(held, name) for name in names), module
