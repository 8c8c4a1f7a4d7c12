"""Runs, or files of theirs, that this user may not look at, or that links to a disk which is gone lead to.

They are said to be so: nothing is taken for missing or damaged, and nothing of the run is changed.
"""

import errno
import json
import os
import re
import shutil
from contextlib import contextmanager
from functools import partial

import pytest

from children import QUICK, closed, evaluate_here, lost_after, note_overrides, train_here
from ranks import on_ranks
from recipes import checkpoint, compare, config, data_record, distributed, eval_models, export, provenance, weights
from recipes.checkpoint import CheckpointError, Store
from recipes.config.given import with_task_of_run
from recipes.run import Run, open_run
from recipes.settings import RunError, config_to_evaluate, load_config, runs_in
from zoo import CheckpointError as ZooError
from zoo import beside, files, inspect

REFUSED = "is not readable by this user \\(Permission denied\\)"
GONE = "is a link to .*/gone/.*, which is not there"


@pytest.fixture
def run(two_runs, tmp_path):
    """A finished run of six steps."""
    copy = shutil.copytree(two_runs / "one", tmp_path / "runs" / "run")
    note_overrides(copy, QUICK)
    return copy


@contextmanager
def unmounted(path):
    """Within, a file or a folder is a link to where it was before."""
    kept = path.rename(path.with_name(f"kept-{path.name}"))
    path.symlink_to(path.parent / "gone" / path.name)
    try:
        yield
    finally:
        path.unlink()
        kept.rename(path)


def contents(run):
    """All files of a run, except the lock that whoever looks at it takes."""
    return {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != ".lock"}


WAYS = {
    "closed": (closed, REFUSED),
    "to be written only": (partial(closed, mode=0o300), REFUSED),
    "to be listed only": (partial(closed, mode=0o600), REFUSED),
    "unmounted": (unmounted, GONE),
}


@pytest.mark.parametrize("way", WAYS)
def test_checkpoints_that_cannot_be_looked_at(run, way, capsys):
    """A run without any would begin again, and cut its log."""
    hidden, said = WAYS[way]
    before, folder = contents(run), run / "checkpoints"
    with hidden(folder):
        for kind in ("step", "best"):
            with pytest.raises(CheckpointError, match=rf"^{folder} .*{said}$"):
                Store(folder).newest(kind)
        with pytest.raises(CheckpointError, match=said):
            train_here(run.parent, f"resume={run}")
        with pytest.raises(RunError, match=said):
            weights.find_checkpoint(run)
        with pytest.raises(RunError, match=said):
            evaluate_here(f"run={run}")
        assert export.main([str(run), str(run.parent / "model.onnx")]) == 2
        assert re.search(said, capsys.readouterr().err)
        with pytest.raises(ZooError, match=said):
            beside.locate(run)
        assert re.search(said, inspect.inspect(*inspect.files([run]))["error"])
    assert contents(run) == before and not (run.parent / "model.onnx").exists()


def test_processes_agree_on_checkpoints_that_cannot_be_looked_at(run):
    with unmounted(run / "checkpoints"):
        first, second = on_ranks(2, train_here, run.parent, f"resume={run}")
    assert isinstance(first, CheckpointError) and str(first) == str(second) and "which is not there" in str(first)


@pytest.mark.parametrize("way", ["closed", "unmounted"])
@pytest.mark.parametrize("name", [".", "state.json", "model.safetensors"])
def test_a_checkpoint_that_cannot_be_read_is_not_damaged(run, tmp_path, way, name):
    copy = lost_after(6, run, tmp_path / "copy")
    (only,) = (copy / "checkpoints").iterdir()
    before, (hidden, said) = contents(copy), WAYS[way]
    advice = f"; make it readable, or move {only} away to do without it"
    with hidden(only / name), pytest.raises(CheckpointError, match=f"{said}{advice}$"):
        train_here(tmp_path, f"resume={copy}")
    assert contents(copy) == before


def test_a_best_checkpoint_that_cannot_be_read_is_not_replaced_by_another(run):
    best = next((run / "checkpoints").glob("best-*"))
    with closed(best):
        for act in (weights.find_checkpoint, weights.find_weights, partial(weights.of_run, weights="raw")):
            with pytest.raises(RunError, match=rf"{best}/state\.json {REFUSED}"):
                act(run)
    assert weights.find_checkpoint(run).path == best


def test_a_disk_that_fails_is_no_damage(run, monkeypatch):
    def fails(path):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(checkpoint, "_fingerprint", fails)
    newest = run / "checkpoints" / "step-00000006"
    with pytest.raises(CheckpointError, match=f"^{newest} cannot be read: Input/output error; .* move {newest} away"):
        Store(run / "checkpoints").newest()


def test_what_remains_where_nothing_can_be_written_or_looked_at(run):
    begun = Run(run, load_config(run), Store(run / "checkpoints"))
    assert begun._left() == f"the previous checkpoint, {run}/checkpoints/step-00000006, is intact"
    with closed(run / "checkpoints"):
        assert begun._left() == (
            f"whether an earlier one is intact is not known: {run}/checkpoints is not readable by this user "
            "(Permission denied)"
        )
    shutil.rmtree(run / "checkpoints")
    assert begun._left() == "there is no earlier checkpoint"


@pytest.mark.parametrize("way", ["closed", "unmounted"])
def test_a_log_that_cannot_be_read(run, way, capsys):
    """It has lines: none is cut off, and a comparison goes on without them."""
    before, (hidden, said) = contents(run), WAYS[way]
    other = shutil.copytree(run, run.with_name("other"))
    with hidden(run / "metrics.jsonl"):
        with pytest.raises(RunError, match=rf"^{run}/metrics\.jsonl .*{said}$"):
            train_here(run.parent, f"resume={run}")
        compare.main([str(run), str(other), "--out", str(run.parent / "c.png")])
        out = " ".join(capsys.readouterr().out.split())
        assert f"left out: {run}/metrics.jsonl" in out and "1 run" in out
    assert contents(run) == before


@pytest.mark.parametrize("way", ["closed", "unmounted"])
def test_starts_that_cannot_be_read(run, way, tmp_path):
    hidden, said = WAYS[way]
    with hidden(run / "sessions.jsonl"):
        for act in (
            lambda: provenance.sessions(run),
            lambda: config_to_evaluate(run, []),
            lambda: evaluate_here(f"run={run}"),
            lambda: train_here(run.parent, f"resume={run}"),
        ):
            with pytest.raises(RunError, match=said):
                act()


def test_starts_of_another_run_that_cannot_be_read(run, monkeypatch, capsys):
    """Neither a sweep nor a start by torchrun ends because of them."""
    mine = shutil.copytree(run, run.with_name("mine"))
    note_overrides(mine, [*QUICK, f"out={run.parent}"])
    (start,) = provenance.sessions(mine)
    (mine / "sessions.jsonl").write_text(json.dumps({**start, "sweep": "x", "job": "launch"}) + "\n")
    monkeypatch.setenv(provenance.SWEEP, "x")
    with closed(run / "sessions.jsonl"):
        compare.show_sweep([run.parent])
        said = capsys.readouterr()
        note = f"left out: {run}/sessions.jsonl is not readable by this user (Permission denied)\n"
        assert "1 run" in said.out and said.err == note
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "launch")
        monkeypatch.setattr(distributed._JOINED, "restarts", 1)
        given = [*QUICK, f"out={run.parent}"]
        assert open_run(config.compose(given), given).folder == mine
        assert capsys.readouterr().err == note


@pytest.mark.parametrize("way", ["closed", "unmounted"])
@pytest.mark.parametrize("read", [load_config, data_record.read])
def test_files_of_a_run_that_cannot_be_read(run, read, way):
    name = "config.yaml" if read is load_config else "data.json"
    hidden, said = WAYS[way]
    with hidden(run / name), pytest.raises(RunError, match=rf"^{run}.*{said}$") as error:
        read(run)
    assert "restore" not in str(error.value)


@pytest.mark.parametrize("around", [False, True], ids=["itself", "around"])
def test_a_run_in_a_folder_that_may_not_be_entered(run, around, tmp_path, capsys):
    """Nobody says that there is none."""
    cfg = config.compose([f"checkpoint={run}"], "eval")
    typed = [*QUICK, f"out={run.parent}"]
    with closed(run.parent if around else run):
        for act in (
            lambda: load_config(run),
            lambda: evaluate_here(f"run={run}"),
            lambda: evaluate_here(f"checkpoint={run}", f"out={tmp_path}"),
            lambda: eval_models.find(cfg, str(run)),
            lambda: weights.names_a_folder(str(run)),
            lambda: open_run(config.compose([*typed, f"resume={run}"]), []),
            lambda: open_run(config.compose([*typed, "resume=auto", "name=run"]), []),
            lambda: open_run(config.compose([*typed, "name=run"]), []),
            lambda: with_task_of_run([f"run={run}"]),
        ):
            with pytest.raises(RunError, match=rf"^{run} {REFUSED}$"):
                act()
        assert with_task_of_run([f"run={run},{tmp_path}"]) == [f"run={run},{tmp_path}"]
        with pytest.raises(SystemExit):
            compare.main([str(run), "--out", str(tmp_path / "c.png")])
        assert f"left out: {run} is not readable" in " ".join(capsys.readouterr().out.split())
        assert list(runs_in(tmp_path)) == []
        assert f"{run.parent if around else run} is " in capsys.readouterr().err


def test_weights_in_a_folder_that_may_not_be_listed(tmp_path):
    (tmp_path / "weights").mkdir()
    cfg = config.compose([f"checkpoint={tmp_path / 'weights'}"], "eval")
    with closed(tmp_path / "weights", 0o300):
        with pytest.raises(RunError, match=rf"weights {REFUSED}"):
            weights.names_a_folder(str(tmp_path / "weights"))
        (source,) = eval_models.sources(cfg)
        with pytest.raises(ZooError, match=rf"weights {REFUSED}"):
            eval_models.find(cfg, source)


def test_what_is_not_there_and_what_cannot_be_looked_at(tmp_path):
    """The first holds nothing; of the second that is not known."""
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name in ("none", "none/below", "file/below"):
        assert files.entries(tmp_path / name) == []
    for name in ("file", "link", "link/below", "loop"):
        with pytest.raises(OSError) as error:
            files.entries(tmp_path / name)
        assert str(files.unreadable(name, error.value)).startswith(f"{name} cannot be read: ")
