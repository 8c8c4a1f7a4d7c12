"""Files of a run that an editor or a cut-off copy has changed: what is still whole is used, the rest is named."""

import json
import shutil

import pytest
import torch
from omegaconf import OmegaConf

from children import TINY
from recipes import compare, config, log
from recipes.checkpoint import CheckpointError, Store, read
from recipes.provenance import note_session
from recipes.run import Run, open_run
from recipes.settings import RunError, config_to_resume, load_config

STATE = {  # as a run on a CPU has it
    "weights": "model", "meter": {"loss": 0.5, "count": 1}, "scaler": {}, "parts": 1, "data": None, "metrics": None,
}  # fmt: skip
GONE = "gone"
DAMAGED = {
    "another step": {"step": 2},
    "a step beyond the end": {"step": 40},
    "no files": {"files": {}},
    "no optimizer": {"files": {"model.safetensors": {"bytes": 1, "crc32": 1}}},
    "a list of files": {"files": [1]},
    "no step": {"step": GONE},
    "no scaler": {"scaler": GONE},
    "no meter": {"meter": GONE},
    "no weights": {"weights": GONE},
    "parts": {"parts": "x"},
    "null": b"null",
    "nested": b"[" * 100_000,
    "bytes": b"\xff\x00",
    "half": b'{"step": 4',
}


def written(folder, *steps, keep=9) -> Store:
    store = Store(folder, keep)
    for step in steps:
        weights = {"w": torch.full((4,), float(step))}
        store.save(step, {"model": weights, "optimizer": weights}, STATE)
    return store


def edit(path, changes, *, older: bool) -> None:
    """Change values of a state.json, or remove those of GONE; an older one has no checksum of itself."""
    if isinstance(changes, bytes):
        path.write_bytes(changes)
        return
    state = json.loads(path.read_text()) | changes | ({"crc32": GONE} if older else {})
    path.write_text(json.dumps({key: value for key, value in state.items() if value != GONE}))


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("damage", DAMAGED)
def test_a_state_that_is_not_what_was_written(tmp_path, damage, older):
    store = written(tmp_path, 2, 4)
    edit(tmp_path / "step-00000004" / "state.json", DAMAGED[damage], older=older)
    newest, (problem,) = store.newest()
    assert newest.state["step"] == 2 and f"{tmp_path}/step-00000004/state.json is damaged: " in problem


def test_what_a_state_is_checked_against(tmp_path):
    """Its own checksum, whatever its indent; older ones, without any, are read as before."""
    written(tmp_path, 4)
    path = tmp_path / "step-00000004"
    assert read(path).state.items() >= STATE.items() and "crc32" not in read(path).state
    edit(path / "state.json", {}, older=False)
    assert read(path).state["step"] == 4
    edit(path / "state.json", {"meter": {"loss": 0.75, "count": 1}}, older=False)
    with pytest.raises(CheckpointError, match=r"state\.json is damaged: it has the checksum \d+, but \d+ was written"):
        read(path)
    edit(path / "state.json", {}, older=True)
    assert read(path).state["meter"]["loss"] == 0.75
    path.rename(path.with_name("step-00000003"))
    with pytest.raises(CheckpointError, match="it is of step 4, and its folder of step 3"):
        read(path.with_name("step-00000003"))


def test_a_best_one_without_its_score_is_reported(tmp_path, capsys):
    store = written(tmp_path)
    path = store.save(4, {"model": {"w": torch.zeros(1)}}, {**STATE, "metrics": {"top1": 50.0}}, best=True)
    run = Run(tmp_path, None, store)
    assert run.best("top1") == 50
    edit(path / "state.json", {"metrics": None}, older=True)
    assert run.best("top1") is None
    assert "damaged checkpoint skipped" in capsys.readouterr().out


def test_copies_under_other_names_stay(tmp_path):
    """They are neither counted nor removed, resumed or set aside."""
    store, weights = written(tmp_path, 1, 2, keep=2), {"model": {"w": torch.zeros(1)}}
    best = store.save(1, weights, STATE, best=True)
    copies = ["step-00000002-mine", "step-00000002.bak", "step-2", "step-000000002", "best-before", "best-00000001 (2)"]
    for name in copies:
        shutil.copytree(best if name.startswith("best") else tmp_path / "step-00000002", tmp_path / name)
    (tmp_path / "step-00000002.bak" / "model.safetensors").write_bytes(b"")
    written(tmp_path, 3, keep=2).save(3, weights, STATE, best=True)
    own = ["best-00000003", "step-00000002", "step-00000003"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*copies, *own])
    store.set_aside(newer_than=2)
    assert {path.name for path in tmp_path.iterdir()} == {*copies, *own[:2], "corrupt-step-00000003"}
    newest, problems = store.newest()
    assert newest.state["step"] == 2 and not problems


def test_checkpoints_of_long_runs_are_in_order(tmp_path):
    assert written(tmp_path, 99_999_999, 100_000_000).newest()[0].state["step"] == 100_000_000


def begun(folder, *overrides, scores=(50.0,)):
    """A run's folder with an evaluation or more."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(config.compose([*TINY, *overrides]), resolve=True))
    (folder / "sessions.jsonl").write_text(json.dumps({"overrides": [*TINY, *overrides]}) + "\n")
    lines = [{"step": step, "epoch": step / 9, "val_top1": score} for step, score in enumerate(scores, 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


LINES = [b"null", b"3", b"[]", b"{}", b"[" * 100_000, b'{"step": "x"}', b'{"step": 9, "val_top1": [1]}', b'{"loss": 1}']


def test_lines_of_a_log_that_are_no_lines_of_a_log(tmp_path):
    """As those that a kill left: passed over, wherever the log is read."""
    run = begun(tmp_path / "run", scores=(50.0, 60.0))
    first, last = (run / "metrics.jsonl").read_bytes().splitlines()
    (run / "metrics.jsonl").write_bytes(b"\n".join([first, *LINES, last]))
    found = log.history(run / "metrics.jsonl")
    assert [line["step"] for line in found] == [1, 2]
    assert log.epoch_table([*found, {"step": 3, "lr": 1.0, "val_top1": 1.0}], "top1").row_count == 3
    (row,) = compare.readable([run])
    assert (row.value, row.steps) == (60, 2)


@pytest.mark.parametrize("line", [*LINES[:5], b'{"overrides": 3}'])
def test_lines_of_starts_that_are_none(tmp_path, line):
    run = begun(tmp_path / "run", "train.steps=3")
    path = run / "sessions.jsonl"
    path.write_bytes(line + b"\n" + path.read_bytes())
    assert config_to_resume(run, []).train.steps == 3
    path.write_bytes(line)
    with pytest.raises(RunError, match="has lost the command that started it"):
        config_to_resume(run, [])


def test_a_start_without_a_number_of_threads(tmp_path, capsys):
    """As older versions wrote it: nothing is known that could differ."""
    run = begun(tmp_path / "run", "train.steps=3")
    note_session(run, [], 2, "cpu")
    assert "CPU threads" not in capsys.readouterr().out


CONFIGS = {
    b"": "it has no group data, hardware, model, train",
    b"3\n": "Invalid loaded object type: int",
    b"- 3\n": "it is a list",
    b"seed: 0 # caf\xe9": "'utf-8' codec can't decode byte 0xe9",
    b"\xff\xfe\x00": "decode",
    b"{": "expected the node content",
    b"model: {name: test_resnet}\ndata: {}\ntrain: {}\ntask:\nhardware: {}": "it has no group task",
    b"model: 3\ndata: {}\ntrain: {}\nhardware:\n": "it has no group hardware, model",
}


@pytest.mark.parametrize("text", CONFIGS)
def test_a_configuration_that_is_none(tmp_path, text):
    (tmp_path / "config.yaml").write_bytes(text)
    (tmp_path / "sessions.jsonl").touch()
    with pytest.raises(RunError) as error:
        load_config(tmp_path)
    said = str(error.value)
    assert said.startswith(f"config.yaml in {tmp_path} is not a run's configuration: ") and CONFIGS[text] in said


def test_resume_auto_says_which_run_it_skips(tmp_path, capsys):
    damaged, run = begun(tmp_path / "damaged"), begun(tmp_path / "run")
    (damaged / "config.yaml").write_text("model: {name: test_resnet}\ndata: {name: digits}\ntrain: {st")
    typed = [*TINY, f"out={tmp_path}", "resume=auto"]
    assert open_run(config.compose(typed), []).folder == run
    said = " ".join(capsys.readouterr().out.split())
    assert f"resume=auto: config.yaml in {damaged} is not a run's configuration: " in said
    with pytest.raises(RunError, match="is not a run's configuration"):
        open_run(config.compose([*typed, "name=damaged"]), [])


def test_runs_that_cannot_be_read_do_not_hide_the_others(tmp_path, capsys):
    runs = [begun(tmp_path / name) for name in ("a", "b", "c")]
    (runs[0] / "config.yaml").write_text("model: 3")
    (runs[1] / "data.json").write_text("[]")
    assert [row.folder for row in compare.readable(runs)] == [runs[2]]
    said = " ".join(capsys.readouterr().out.split())
    assert f"left out: config.yaml in {runs[0]} is not" in said and f"left out: {runs[1]}/data.json is not" in said
