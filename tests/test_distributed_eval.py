"""Several processes, one evaluation: every image counted once, of the same data and weights."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import zoo
from children import SMALL, evaluate_here, lost_after, renumber
from ranks import on_ranks
from recipes import checkpoint, config, distributed
from recipes.config import ConfigError
from recipes.data import DataError
from recipes.metrics.classification import Metrics
from recipes.run import RunError
from recipes.tasks import classify
from recipes.weights import find_checkpoint, find_weights


def test_a_sharded_step_is_weights(runs, tmp_path, capsys):
    """Of a run that was lost before anything was evaluated."""
    run = lost_after(3, runs / "fsdp", tmp_path / "run")
    Image.new("RGB", (8, 8)).save(tmp_path / "image.png")
    asked = [f"run={run}", f"predict={tmp_path / 'image.png'}"]
    assert on_ranks(2, evaluate_here, *asked) == [None, None]
    step = run / "checkpoints" / "step-00000003"
    dcp_to_torch_save(step / "sharded", tmp_path / "step.pth")
    saved = zoo.reader.read(tmp_path / "step.pth").entries
    for given, kind in (("auto", "ema"), ("raw", "raw"), ("ema", "ema")):
        chosen = [*SMALL, f"model.checkpoint={run}", f"model.weights={given}"]
        state = task_model(chosen).state_dict()
        assert f"step-00000003/sharded: layout 'as is', {kind} weights" in capsys.readouterr().out.replace("\n", "")
        assert state.keys() == saved[kind].keys()
        assert all(torch.equal(tensor, saved[kind][name]) for name, tensor in state.items()), given
    assert not all(torch.equal(tensor, saved["raw"][name]) for name, tensor in saved["ema"].items())
    with pytest.raises(ConfigError, match=r"step-00000003 is a sharded checkpoint .*\. The run folder works as well"):
        task_model([*SMALL, f"model.checkpoint={step}"])


def task_model(overrides: list[str]) -> torch.nn.Module:
    task = classify.Task(config.compose(overrides))
    return task.build_model(task.build_data())


@pytest.mark.parametrize(
    ("ranks", "batch"),
    [(2, 90), pytest.param(3, 7, marks=pytest.mark.slow), pytest.param(7, 25, marks=pytest.mark.slow)],
)
def test_an_evaluation_counts_every_image_once(runs, tmp_path, ranks, batch):
    evaluate_here(f"run={runs / 'ddp'}", f"out={tmp_path / 'alone'}")
    overrides = [f"run={runs / 'ddp'}", f"out={tmp_path / 'many'}", f"data.eval_batch_size={batch}"]
    assert on_ranks(ranks, evaluate_here, *overrides) == [None] * ranks
    alone, many = (json.loads((tmp_path / name / "eval.json").read_text()) for name in ("alone", "many"))
    assert many["images"] == 181
    assert [many[key] for key in ("top1", "top5")] == [alone[key] for key in ("top1", "top5")]
    assert many["loss"] == pytest.approx(alone["loss"], rel=1e-6)


def counted() -> tuple[int, list[int]]:
    distributed.join(config.compose([]))
    metrics = Metrics(8)
    if distributed.rank() < 2:  # the third has no image at all
        metrics.update(torch.eye(8)[: 3 + distributed.rank()], torch.arange(3 + distributed.rank()))
    metrics.compute()
    return int(metrics.confusion.compute().sum()), distributed.gathered(distributed.rank())


def test_metrics_of_ranks_with_unequal_numbers_of_images():
    assert on_ranks(3, counted) == [(7, [0, 1, 2])] * 3


def measured_with_others(run: Path, out: Path) -> None:
    build = classify.Task.build_data

    def function(self):
        data = build(self)
        data.val.records.labels[: distributed.rank()] += 1
        return data

    classify.Task.build_data = function
    evaluate_here(f"run={run}", f"out={out}")


def test_an_evaluation_of_other_data_on_one_process_is_none(runs, tmp_path):
    ended = on_ranks(2, measured_with_others, runs / "ddp", tmp_path)
    assert [type(end) for end in ended] == [DataError] * 2 and list(tmp_path.iterdir()) == []


def while_it_trains(run: Path) -> tuple[str, dict[str, list]]:
    """The best checkpoint is replaced when the first process has read it, and the second has not."""
    distributed.join(config.compose([]))
    tensors = checkpoint.Checkpoint.tensors

    def function(self, part):
        read = distributed.first(lambda: tensors(self, part))
        if distributed.rank() == 1 and self.path.name != "best-00000099":
            renumber(self.path, self.path.with_name("best-00000099"))
        return read if distributed.rank() == 0 else tensors(self, part)

    checkpoint.Checkpoint.tensors = function
    kept = find_weights(run)
    return kept.checkpoint.path.name, {name: tensor.tolist() for name, tensor in kept.tensors.items()}


def test_all_processes_read_the_same_weights_of_a_run_in_progress(runs, tmp_path):
    run = shutil.copytree(runs / "ddp", tmp_path / "run")
    (one, ours), (two, theirs) = on_ranks(2, while_it_trains, run)
    assert one == two == "best-00000099" and ours == theirs


def measured_where_one_lacks_some(run: Path, file: Path, folder: Path) -> None:
    """The second process has no folder of the run, no copy of one file, and a broken one of another."""
    own = folder / str(distributed.rank())
    own.mkdir()
    os.chdir(own)
    for name in ("whole", "gone", "broken"):
        shutil.copy(file, f"{name}.safetensors")
    if distributed.rank() == 0:
        shutil.copytree(run, "run")
    else:
        os.remove("gone.safetensors")
        Path("broken.safetensors").write_bytes(b"no weights")
    sources = "[run,gone.safetensors,broken.safetensors,whole.safetensors]"
    small = ["model=timm", "model.name=test_resnet", "data.val_fraction=0.1005", "data.img_size=32", "data.workers=0"]
    evaluate_here(*small, f"checkpoint={sources}", f"out={folder / 'out'}")


def test_what_one_process_cannot_measure_no_other_does(runs, tmp_path):
    best = find_checkpoint(runs / "ddp")
    ended = on_ranks(2, measured_where_one_lacks_some, runs / "ddp", best.place("ema"), tmp_path)
    said = "3 of 4 could not be evaluated or written, see above: run, gone.safetensors, broken.safetensors"
    assert [type(end) for end in ended] == [RunError] * 2 and [str(end) for end in ended] == [said] * 2
    (one,) = json.loads((tmp_path / "out" / "eval.json").read_text())
    values = {key.removeprefix("val_"): value for key, value in best.state["metrics"].items()}
    assert one["name"] == "whole.safetensors" and one["images"] == 181
    assert one["top1"] == pytest.approx(values["top1"], abs=0.01)


def answered_by_one(run: Path, image: Path) -> None:
    build = classify.Task.build_model

    def function(self, *args, **kwargs):
        assert distributed.rank() == 0
        return build(self, *args, **kwargs)

    classify.Task.build_model = function
    evaluate_here(f"run={run}", f"predict={image}")


def test_one_process_alone_builds_the_model_that_answers(runs, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "image.png")
    assert on_ranks(2, answered_by_one, runs / "ddp", tmp_path / "image.png") == [None, None]
    first, second = on_ranks(2, answered_by_one, runs / "ddp", tmp_path / "none.png")
    assert type(first) is type(second) is RunError and str(first) == str(second)
