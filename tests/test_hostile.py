"""Files that want to do harm: each ends in an error that says why, with nothing run and little memory taken."""

import json
import subprocess
import sys

import pytest

import hostile
import zoo
from zoo import inspect


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
    refused(path, "asks for .*, which is not data: refused, and nothing of it was run. If you trust it, load it where")
    assert not canary.exists()


def test_the_one_who_asks_is_named(tmp_path):
    path = tmp_path / "hostile.pth"
    path.write_bytes(hostile.saved({"model": hostile.STATE, "x": hostile.Runs(hostile.os.system, "true")}))
    refused(path, r"asks for os\.system")
    path.write_bytes(hostile.pickle.dumps(hostile.Runs(hostile.os.mkdir, str(tmp_path / "ran")), 2))
    refused(path, r"asks for os\.mkdir")
    assert not (tmp_path / "ran").exists()


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
