"""Files that want to do harm: each ends in an error that says why, with nothing run and little memory taken."""

import datetime
import io
import json
import os
import re
import struct
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import PurePosixPath

import numpy as np
import pytest
import torch

import hostile
import zoo
from zoo import inspect
from zoo.described import Name, Other, Storage
from zoo.pickled import _number, _typed_tensor


def refused(path, match):
    with pytest.raises(zoo.CheckpointError, match=match) as error:
        zoo.read(path)
    message = str(error.value)
    assert message.startswith(str(path)) and len(message) < 700
    return message


@pytest.mark.parametrize("write", [hostile.saved, hostile.legacy], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", hostile.RUNNING)
def test_nothing_is_run(tmp_path, name, write):
    canary, path = tmp_path / "ran", tmp_path / "hostile.pth"
    content = {"model": dict(hostile.STATE), "extra": hostile.RUNNING[name](canary)}
    path.write_bytes(write(content))
    refused(path, "asks for .*, which is not data: refused, and nothing in it was run. If you trust it, load it where")
    assert not canary.exists()


def test_the_one_who_asks_is_named(tmp_path):
    path = tmp_path / "hostile.pth"
    path.write_bytes(hostile.saved({"model": hostile.STATE, "x": hostile.Runs(hostile.os.system, "true")}))
    refused(path, r"asks for os\.system")
    path.write_bytes(hostile.pickle.dumps(hostile.Runs(hostile.os.mkdir, str(tmp_path / "ran")), 2))
    refused(path, r"asks for os\.mkdir")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("module", ["pathlib", "pathlib._local"])
def test_paths_of_any_version_of_python_are_data(tmp_path, module):
    """Those that Python 3.13 saves have a module of their own."""
    path, saved = tmp_path / "weights.pth", hostile.saved({"model": hostile.STATE, "out": PurePosixPath("/runs/one")})
    with zipfile.ZipFile(io.BytesIO(saved)) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            data = re.sub(rb"cpathlib(\._local)?\n", f"c{module}\n".encode(), old.read(name))
            new.writestr(name, data)
    assert zoo.read(path).first.keys() == hostile.STATE.keys()


def test_a_terminal_is_told_nothing(tmp_path, capsys):
    path = tmp_path / "hostile.pth"
    path.write_bytes(hostile.archive(b"cos\x1b[2Kfine\nsystem\n."))
    assert "os\\x1b[2Kfine.system" in refused(path, "which is not data")
    path.write_bytes(hostile.saved({"model": hostile.STATE, "epoch": "\x1b]0;x\a", "\x1b[2J": 1}))
    inspect.main([str(path)])
    assert "\x1b" not in capsys.readouterr().out


@pytest.mark.parametrize("name", hostile.DATA)
def test_refused(tmp_path, name):
    make, match = hostile.DATA[name]
    path = tmp_path / (name if "." in name else f"{name}.pth")
    path.write_bytes(make())
    refused(path, match)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert not (tmp_path.parent / "escaped").exists()


def test_archives_of_many_entries(tmp_path):
    """More than 65,535 have another record at the end; so have few, where that is the archive's own."""
    path = tmp_path / "weights.pth"
    many = hostile.archive(hostile.PICKLE, [(f"archive/more/{i}", b"") for i in range(66_000)])
    for data in (many, hostile.two_lists(to_first=False), hostile.archive(hostile.PICKLE)):
        path.write_bytes(data)
        assert zoo.describe(path).entries["raw"].keys() == {"w"}


def test_what_is_read_is_what_was_described(tmp_path, monkeypatch):
    path = tmp_path / "weights.pth"
    path.write_bytes(hostile.saved({"model": {"a": torch.zeros(3), "b": torch.zeros(2), "c": torch.zeros(1)}}))
    for read, said in (
        ({"model": {"a": torch.zeros(3), "b": torch.zeros(3), "c": torch.zeros(1).half()}}, r"2 of 3 .*shape, b, c\."),
        ({"model": {"a": torch.zeros(3), "b": [0, 0]}}, r"2 of 3 .*shape, b, c\."),
        ({"model": 3}, r"3 of 3 .*shape, a, b, c\."),
        ([], r"3 of 3 .*shape, a, b, c\."),
    ):
        monkeypatch.setattr("zoo.reader._torch_load", lambda *_, read=read: read)
        refused(path, f"and then something else was read from it: {said}")


def test_threads_read_one_after_the_other(tmp_path, monkeypatch):
    """Which names torch takes for harmless is one list for all of them."""
    path, load, inside, most, read = tmp_path / "weights.pth", torch.load, [], [], []
    path.write_bytes(hostile.saved({"model": hostile.STATE, "time": datetime.datetime(2022, 3, 4)}))

    def slow(*args, **kwargs):
        inside.append(path)
        time.sleep(0.05)
        most.append(len(inside))
        content = load(*args, **kwargs)
        inside.pop()
        return content

    monkeypatch.setattr(torch, "load", slow)
    threads = [threading.Thread(target=lambda: read.append(zoo.read(path))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1, 1, 1] and len(read) == 3


def test_the_longest_name(tmp_path):
    path = tmp_path / f"{'a' * 251}.pth"
    path.write_bytes(hostile.saved(hostile.STATE))
    assert zoo.read(path).entries["raw"].keys() == hostile.STATE.keys()


def test_names_that_python_2_wrote(tmp_path):
    path = tmp_path / "weights.pth"
    path.write_bytes(hostile.legacy({"ab": torch.ones(2)}).replace(b"X\2\0\0\0ab", b"U\2\xc3\xa9"))
    assert torch.equal(zoo.read(path).entries["raw"]["é"], torch.ones(2))


def test_a_download_that_goes_on(tmp_path):
    path = tmp_path / "weights.pth"
    path.write_bytes(hostile.saved(hostile.STATE))
    assert zoo.read(path).entries
    (tmp_path / "weights.pth.aria2").touch()
    refused(path, r"weights\.pth\.aria2 lies beside it")


CHILD = """
import json, pathlib, resource, sys
import zoo
from zoo import inspect

def memory(kind):
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.partition(kind + ":")[2].split()[0]) // 1024  # MiB

resource.setrlimit(resource.RLIMIT_AS, (memory("VmSize") + 512 << 20,) * 2)
taken = {}
for path in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    # the most that was resident, from here on: a child's ru_maxrss begins with what its parent had
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    try:
        zoo.read(path)
        taken[path.name] = "was read"
    except zoo.CheckpointError:
        taken[path.name] = memory("VmHWM") - before
print(json.dumps(taken))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc and limits the address space")
def test_little_memory(tmp_path):
    """All of them, in a process that may take 512 MiB more; none makes more than a quarter of that resident."""
    for name, (make, _) in hostile.DATA.items():
        (tmp_path / name).write_bytes(make())
    done = subprocess.run([sys.executable, "-c", CHILD, tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    taken = json.loads(done.stdout)
    assert taken.keys() == hostile.DATA.keys()
    assert {name: mib for name, mib in taken.items() if mib == "was read" or mib > 128} == {}


OTHER = {"w": torch.zeros(1)}  # of no model of the zoo


def test_what_may_not_be_read(tmp_path, monkeypatch, capsys):
    """It is named, and the others of a list are shown all the same."""
    (tmp_path / "closed").mkdir()
    path, other = tmp_path / "weights.pth", tmp_path / "other.pth"
    for file in (path, other):
        file.write_bytes(hostile.saved(OTHER))

    def closed(method):
        def refuse(self, *args, **kwargs):
            if self.name in ("weights.pth", "closed"):
                raise PermissionError(13, "Permission denied", str(self))
            return method(self, *args, **kwargs)

        return refuse

    for name in ("open", "iterdir"):
        monkeypatch.setattr(type(path), name, closed(getattr(type(path), name)))
    refused(path, "is not readable by this user")
    refused(tmp_path / "closed", "is not readable by this user")
    monkeypatch.setenv("COLUMNS", "1000")
    assert inspect.main([*map(str, (path, tmp_path / "closed", tmp_path / ("a" * 300), other))]) == 1
    said = capsys.readouterr().out
    assert said.count("cannot be read: ") == 2 and "not readable" in said and "not in the zoo" in said


def test_what_is_no_file(tmp_path):
    refused(tmp_path / ("a" * 300), r"does not exist \(.*\); expected a weights file")
    refused(tmp_path / "none.pth", "does not exist; expected a weights file")
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", "is a pipe or a device")
    best, step = (tmp_path / "run" / "checkpoints" / name for name in ("best-00000010", "step-00000010"))
    for folder in (best, step):
        folder.mkdir(parents=True)
        (folder / "ema.safetensors").touch()
    refused(tmp_path / "run", rf"expected a weights file, one of checkpoints/{best.name}/ema\.safetensors$")
    (tmp_path / "model.safetensors").touch()
    refused(tmp_path, r"is a folder; expected a weights file, one of model\.safetensors$")


def test_markup_in_the_name_of_a_file(tmp_path, capsys):
    path = tmp_path / "[bold]a.pth"
    path.write_bytes(hostile.saved(OTHER))
    assert inspect.main([str(path), "--keys"]) == 0
    assert capsys.readouterr().out.replace("\n", "").count("[bold]a.pth") == 2


def test_figures_that_json_does_not_have(tmp_path, capsys):
    path = tmp_path / "weights.pth"
    path.write_bytes(hostile.saved({"model": OTHER, "best_loss": float("inf"), "all": [float("nan"), 1.0]}))
    inspect.main([str(path), "--json"])
    (said,) = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert said["meta"] == {"best_loss": "inf", "all": ["nan", 1.0]}


def test_long_texts(tmp_path, capsys):
    """Of which a file may have any number: keys, values, and the names of storages."""
    long, path, other = "a" * 1_000_000, tmp_path / "weights.pth", tmp_path / "weights.safetensors"
    other.write_bytes(hostile.save(hostile.STATE, {long: "x", "epoch": long}))
    for content in ({"model": hostile.STATE, long: 1}, {long: hostile.STATE}):
        path.write_bytes(hostile.saved(content))
        for given in ([path], [path, other], [other]):
            assert inspect.main(list(map(str, given))) == 0
            assert "aaa" in (said := capsys.readouterr().out) and len(said) < 10_000
    path.write_bytes(hostile.archive(hostile.pickled({"w": hostile.Crafted((4,), (1,), place=hostile.Place(4, long))})))
    with pytest.raises(zoo.CheckpointError, match="says that storage 'aaa") as error:
        zoo.read(path)
    assert len(str(error.value)) < 5000


ARRAYS = {"w": np.zeros(3, np.float32)}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([hostile.STATE], "found list of 1"),
        (torch.zeros(3), "found a bare tensor"),
        ({"best": {"of": hostile.STATE}, "optimizer": {"state": hostile.STATE}}, r"under best\.of: save only those"),
        ({"model": ARRAYS, "__author__": "x"}, "NumPy arrays in model: .* torch.from_numpy of each"),
        (ARRAYS, "NumPy arrays in itself"),
    ],
)
def test_what_is_no_state_dict(tmp_path, content, said):
    path = tmp_path / "weights.pth"
    path.write_bytes(hostile.saved(content))
    refused(path, f"holds no state dict: expected tensors by name, .*{said}")


def test_wrappers(tmp_path):
    path = tmp_path / "weights.pth"
    for content, places in (
        ({"ema_model": hostile.STATE, "step": 3}, {"ema": ("ema_model",)}),
        ({"checkpoint": {"model": hostile.STATE}}, {"raw": ("checkpoint", "model")}),
    ):
        path.write_bytes(hostile.saved(content))
        assert zoo.describe(path).places == places


def test_other_pickles(tmp_path):
    path = tmp_path / "weights.pth"
    path.write_bytes(hostile.saved(hostile.STATE, pickle_protocol=4))
    refused(path, "with FRAME, which torch.save does not write by default: .* without pickle_protocol$")
    path.write_bytes(hostile.pickle.dumps({"model": ARRAYS}, 2))
    refused(path, "not one of torch.save: found NumPy arrays in model")


def test_a_name_that_is_no_text(tmp_path):
    path = tmp_path / os.fsdecode(b"\xff.pth")
    path.write_bytes(hostile.saved(hostile.STATE))
    assert torch.equal(zoo.read(path).entries["raw"]["stem.conv1.weight"], hostile.STATE["stem.conv1.weight"])
    path = path.rename(path.with_suffix(".safetensors"))
    path.write_bytes(hostile.save(hostile.STATE))
    with pytest.raises(zoo.CheckpointError, match=r"a name that is not valid UTF-8.*rename it"):
        zoo.read(path)


def test_a_typed_view_lies_in_its_bytes():
    with pytest.raises(zoo.CheckpointError, match="does not lie in its storage"):
        _typed_tensor(Storage(torch.uint8, 8), 0, (3,), (1,), False, {}, Name("torch.float32"))


def test_scalars_of_either_byte_order():
    for order in "<>":
        assert _number(Other("numpy.dtype", ("f8", (3, order))), struct.pack(f"{order}d", 1.5)) == 1.5
