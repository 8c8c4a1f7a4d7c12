"""What the loop says when something is wrong, and what is left then: losses, options, folders, logs, disks."""

import contextlib
import errno
import json
import os
import signal
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from omegaconf import OmegaConf
from PIL import Image
from torch._inductor.exc import InductorError

import zoo
from children import QUICK, files_up_to, lines, no_space, note_overrides, poisoned, train_here
from recipes import checkpoint, config, console, data, distributed, log, models, stop, train
from recipes.data import DataError
from recipes.run import Run, open_run
from recipes.settings import RunError
from recipes.state import State
from recipes.tasks import classify


@pytest.mark.parametrize(
    "typed", ["name=", "name=.", "name= resume=auto", "name=..", "name=a/../..", "name=/absolute", "name='~/run'"]
)
def test_a_name_of_no_folder_below_out_is_refused(tmp_path, typed):
    out = tmp_path / "out"
    with pytest.raises(RunError, match=f"does not name a folder below out={out}: "):
        train_here(out, *QUICK, *typed.split())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("typed", ["name", "out"])
def test_a_folder_from_which_no_weights_could_be_read_is_refused(tmp_path, typed):
    given = {"out": str(tmp_path), "name": "run"}
    cfg = OmegaConf.merge(config.compose(QUICK), {**given, typed: f"{given[typed]}\udcff"})
    with pytest.raises(RunError, match=r"\\udcff.*: the name of a run folder must be UTF-8, .* another name= or out="):
        open_run(cfg, [])


@pytest.mark.parametrize("typed", ["name", "resume=auto out"])
def test_a_name_that_is_too_long_for_a_file(tmp_path, monkeypatch, typed):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunError, match=r"cannot write to the run folder .*: .*File name too long"):
        train.main.__wrapped__(config.compose([*QUICK, *f"{typed}={300 * 'x'}".split()]))
    assert not list(tmp_path.rglob("config.yaml"))


@pytest.mark.parametrize("file", ["README.md", "data.json", "metrics.jsonl", "curves.png"])
def test_files_of_others_are_not_written_over(tmp_path, file):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / file).write_text("notes")
    with pytest.raises(RunError, match=rf"mine holds no run, but {file}, which a new run would write over: pass ano"):
        train_here(tmp_path, *QUICK, "name=mine")
    assert [path.read_text() for path in (tmp_path / "mine").iterdir()] == ["notes"]


def test_a_start_that_failed_can_be_repeated(tmp_path, monkeypatch):
    """As on a full disk, before the configuration is written; other files that are there stay."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with monkeypatch.context() as patched, pytest.raises(RunError, match="No space left on device"):
        patched.setattr("recipes.run.OmegaConf.to_yaml", no_space)
        train_here(tmp_path, *QUICK, "name=run")
    assert {path.name for path in (tmp_path / "run").iterdir()} == {".lock", "data.json", "notes.txt", "sessions.jsonl"}
    train_here(tmp_path, *QUICK, "train.steps=2", "name=run")
    assert (tmp_path / "run" / "README.md").is_file() and (tmp_path / "run" / "notes.txt").read_text() == "mine"


def test_nan_stops_with_the_good_state_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(classify.Task, "loss", poisoned(classify.Task.loss, {4}))
    with pytest.raises(train.NotFinite, match=r"at step 4 .* the loss is nan") as error:
        train_here(tmp_path, *QUICK, "name=poisoned")
    saved, _ = checkpoint.Store(tmp_path / "poisoned" / "checkpoints").newest()
    assert saved.state["step"] == 4
    assert all(tensor.isfinite().all() for tensor in saved.tensors("model").values())
    file = tmp_path / "poisoned" / "nonfinite" / "step-00000004.txt"
    indices = file.read_text().splitlines()
    assert len(set(indices)) == 32 and max(map(int, indices)) < 1617
    assert f"images were {', '.join(indices[:5])} and 27 more, all listed in {file}\nlook at" in str(error.value)


def test_what_cannot_be_trained_as_configured_begins_again_under_its_name(tmp_path, monkeypatch):
    """It is known at the first step only; a run with a checkpoint stays."""

    loss = classify.Task.loss

    def refusing(at):
        def function(self, *args, draw):
            if draw == at:
                raise config.ConfigError("batches of one image")
            return loss(self, *args, draw=draw)

        return function

    for at, stays in ((0, False), (4, True)):
        monkeypatch.setattr(classify.Task, "loss", refusing(at))
        with pytest.raises(config.ConfigError, match="batches of one image"):
            train_here(tmp_path, *QUICK, "name=run")
        assert (tmp_path / "run" / "config.yaml").is_file() == stays
    assert [line["step"] for line in lines(tmp_path / "run")][:4] == [1, 2, 3, 4]


def test_a_step_without_memory_left_says_what_needs_less(tmp_path, monkeypatch):
    """Of a new run: this one keeps its batches, and what it has saved."""
    loss, full = classify.Task.loss, [4]

    def filling(self, *args, draw):
        if draw in full:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nof which")
        return loss(self, *args, draw=draw)

    monkeypatch.setattr(classify.Task, "loss", filling)
    with pytest.raises(RunError) as error:
        train_here(tmp_path, *QUICK, "name=run")
    assert str(error.value) == (
        "out of memory at step 4, with 32 images at a time: CUDA out of memory. Tried to allocate 2 GiB\nstart a new "
        "run with hardware.amp=bfloat16 or train.grad_checkpointing=true or train.micro_batch=16 or a smaller "
        f"data.batch_size; what this one has saved stays in {tmp_path}/run/checkpoints"
    )
    assert checkpoint.Store(tmp_path / "run" / "checkpoints").newest()[0].state["step"] == 3
    for full[0] in (0, None):  # what has saved nothing begins again under its name
        with contextlib.suppress(RunError):
            train_here(tmp_path, *QUICK, "name=other", "train.micro_batch=16")
    assert lines(tmp_path / "other")[-1]["step"] == 6


@pytest.mark.parametrize("method", ["create", "load"])
def test_a_model_without_memory_for_it(tmp_path, monkeypatch, method):
    """As it is placed, and as a checkpoint is loaded to go on: nothing is written, so that it can be repeated."""
    options, run = [*QUICK, "train.steps=3", "name=run"], tmp_path / "run"
    if method == "load":
        train_here(tmp_path, *options)
        note_overrides(run, options)
        options = [f"resume={run}"]
        monkeypatch.setattr(config, "overrides", lambda: options)
    before = sorted(path.name for path in tmp_path.rglob("*"))

    def filling(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nof which")

    monkeypatch.setattr(State, method, filling)
    with pytest.raises(RunError, match=r"^out of memory before the first step: test_resnet and what is kept beside it"):
        train_here(tmp_path, *options)
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_an_evaluation_without_memory_left_can_be_repeated(tmp_path, monkeypatch):
    predict, options = classify.Task.predict, [*QUICK, "name=run"]

    def filling(self, model, images):
        if len(images) > 100:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return predict(self, model, images)

    monkeypatch.setattr(classify.Task, "predict", filling)
    with pytest.raises(RunError, match=r"after step 5: CUDA out of memory\nresume .*eval_batch_size than 128") as error:
        train_here(tmp_path, *options)
    assert f"the state after step 5 is saved; resume with: python train.py resume={tmp_path}/run" in str(error.value)
    note_overrides(tmp_path / "run", options)
    monkeypatch.setattr(config, "overrides", lambda: [f"resume={tmp_path / 'run'}", "data.eval_batch_size=64"])
    train_here(tmp_path, *config.overrides())
    assert [line["step"] for line in lines(tmp_path / "run") if "val_top1" in line] == [5, 6]


def test_a_list_of_images_that_cannot_be_written_hides_no_error(tmp_path, monkeypatch):
    monkeypatch.setattr(classify.Task, "loss", poisoned(classify.Task.loss, {0}))
    path = tmp_path / "run" / "nonfinite"
    path.parent.mkdir()
    path.write_text("in the way")
    said = rf"is nan .* and 27 more, but the list of all of them could not be written to {path}/step-00000000.txt: "
    with pytest.raises(train.NotFinite, match=said):
        train_here(tmp_path, *QUICK, "name=run")


def test_images_are_listed_whatever_their_names(tmp_path):
    """A name in Latin-1 on a disk that is read as UTF-8."""
    Run.list_images(SimpleNamespace(folder=tmp_path), 3, ["größe.png", os.fsdecode(b"gr\xf6\xdfe.png")])
    found = (tmp_path / "nonfinite" / "step-00000003.txt").read_text("utf-8")
    assert found == "größe.png\ngr\\udcf6\\udcdfe.png\n"


def test_images_that_lie_in_files_are_called_by_them(tmp_path):
    for name in ("train/a/0", "train/b/1", "val/a/2", "val/b/3"):
        path = tmp_path / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(path)
    source = data.build(config.compose(["data=imagefolder", f"data.root={tmp_path}"])).train
    assert train.named(source, [1, 0]) == [f"{tmp_path}/train/b/1.png", f"{tmp_path}/train/a/0.png"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.batch_size=33", "cannot be split into train.accumulate=2"),
        ("data.batch_size=4000", "fewer than one batch"),
        ("sched.cooldown=1", "cooldown of 50 steps does not fit into 6"),
        ("hardware.device=cuda:9", "hardware.device=cuda:9"),
        ("train.save_every=0", "train.save_every=0: expected a number in .1, infinity"),
        ("model.num_classes=7", "model.num_classes=7 is less than the 10 classes"),
        ("optim.opt=adamwx", "is not an optimiser of timm .did you mean adamw"),
        ("+model.kwargs={no_such: 1}", "could not be built"),
        ("logger.wandb=true", "logger.wandb=true does not set the project of the run: type logger=wandb"),
        ("+model.in_chans=1", "all images have three channels here, greyscale ones too"),
    ],
)
def test_bad_options(tmp_path, override, message):
    with pytest.raises(Exception, match=message) as error:
        train_here(tmp_path, *QUICK, "train.accumulate=2", override)
    assert isinstance(error.value, (config.ConfigError, RuntimeError))
    assert not list(tmp_path.iterdir()), "an experiment that cannot begin leaves no folder"


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["model.checkpoint"], "does not exist .*; expected a weights file"),
        (["teacher.kind=soft", "teacher.checkpoint"], "is not a run folder: give one, or teacher.name= beside a file"),
    ],
)
def test_weights_whose_name_is_too_long_for_a_file(tmp_path, typed, said):
    with pytest.raises((config.ConfigError, zoo.CheckpointError), match=said):
        train_here(tmp_path, *QUICK, *typed[:-1], f"{typed[-1]}={300 * 'x'}")


def test_a_batch_norm_on_one_value_is_explained(tmp_path, monkeypatch):
    parts = [*QUICK, "data.batch_size=2", "train.micro_batch=1", "data.workers=0"]
    with pytest.raises(config.ConfigError, match=r"^test_resnet cannot .* one image .* train\.micro_batch=2 or more, "):
        train_here(tmp_path, *parts)

    def failing(*_, draw):
        raise ValueError(f"another, in part {draw}")

    monkeypatch.setattr(classify.Task, "loss", failing)
    with pytest.raises(ValueError, match="another, in part 0"):
        train_here(tmp_path, *parts)


def test_one_class_alone_is_refused_before_anything_is_trained(tmp_path):
    for split in ("train", "val"):
        (tmp_path / "photos" / split / "cat").mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "photos" / split / "cat" / "one.png")
    photos = ["data=imagefolder", f"data.root={tmp_path / 'photos'}", "data.batch_size=1"]
    with pytest.raises(DataError, match="data=imagefolder has only one class, cat: there is nothing to learn"):
        train_here(tmp_path, "model=timm", "model.name=test_resnet", *photos, "name=run")
    assert not (tmp_path / "run").exists()


def test_a_model_of_more_classes_than_the_data(tmp_path):
    train_here(tmp_path, *QUICK, "train.steps=2", "model.num_classes=12", "augment.mixup=0.2", "name=run")
    noted = json.loads((tmp_path / "run" / "data.json").read_text())
    assert noted["num_classes"] == 12 and noted["class_names"][8:] == ["8", "9", "10", "11"]
    assert "val_top1" in lines(tmp_path / "run")[-1]


@pytest.mark.parametrize(
    "error", [LocalEntryNotFoundError("no network\nand more"), zoo.CheckpointError(f"do so, or pass {models.OVERLAY}")]
)
def test_released_weights_that_cannot_be_had(error):
    """timm's model, or one of the zoo, asks the hub in vain: the message names the key that takes a file."""

    def unreachable(*_, **options):
        raise error

    with pytest.raises((config.ConfigError, zoo.CheckpointError), match=r"model.checkpoint=<file>") as raised:
        models.build(unreachable, "test_resnet", {"pretrained": True}, {"img_size": 32})
    assert "overlay" not in str(raised.value) and "and more" not in str(raised.value)
    unreachable.__module__ = "zoo.heads.segmenter"  # which gives them to its backbone
    with pytest.raises((config.ConfigError, zoo.CheckpointError), match=r"model.backbone=<file>"):
        models.build(unreachable, "test_resnet", {"pretrained": True}, {})


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RunError, match="cannot write to the run folder"):
        train_here(tmp_path / "file", *QUICK)


def test_a_log_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    sink = log.Jsonl(tmp_path / "metrics.jsonl")
    with pytest.raises(log.LogError, match=r"could not write .*metrics.jsonl: .*No space left on device$"):
        sink.write({"step": 1})
    monkeypatch.setattr("ops.tool.secrets.token_hex", lambda _: "0")
    (tmp_path / ".validation-0.png").symlink_to("/dev/full")
    with pytest.raises(log.LogError, match=r"could not write .*validation.png: .*No space left on device"):
        sink.picture(2, Image.new("RGB", (8, 8)))
    sink = log.Jsonl(tmp_path / "limited.jsonl")
    with files_up_to(8), pytest.raises(log.LogError, match=r"could not write .*limited.jsonl: .*File too large$"):
        sink.write({"step": 1})


def test_a_log_that_fails_is_an_error_though_a_signal_came(tmp_path, monkeypatch, capsys):
    """At the last evaluation, after which nothing is left to be done but what the log lacks."""
    written, write_checkpoint, saving = log.Jsonl.write, checkpoint.write, []

    def write(self, line):
        with log.writing(self.path):
            if "val_top1" in line:
                os.kill(os.getpid(), signal.SIGTERM)
                no_space()
        written(self, line)

    def noted(*args):
        saving.append(stop._SAVING.is_set())
        write_checkpoint(*args)

    monkeypatch.setattr(log.Jsonl, "write", write)
    monkeypatch.setattr(checkpoint, "write", noted)
    with pytest.raises(log.LogError, match=r"No space left on device\nthe state after step 2 is saved; resume with"):
        train_here(tmp_path, *QUICK, "train.steps=2", "name=run")
    assert saving == [True, True] and not stop._SAVING.is_set()
    said = capsys.readouterr().out.replace("\n", " ")
    assert "and saving; another SIGTERM, after 30 seconds, stops at once, without saving" in said


@pytest.mark.parametrize("number", [signal.SIGUSR1, None])
def test_a_signal_that_ends_the_compiler_too_is_a_stop(tmp_path, monkeypatch, number):
    """As one to the process group: the compiler that torch has called dies of it. Any other error of it is one."""
    loss, before = classify.Task.loss, {}

    def compiled(self, model, images, targets, *, draw):
        if draw < 4:
            return loss(self, model, images, targets, draw=draw)
        before.update({name: tensor.clone() for name, tensor in model.state_dict().items()})
        loss(self, model, images, targets, draw=draw)  # of a graph before: the statistics of norms have changed
        if number:
            os.kill(os.getpid(), number)
        raise InductorError(RuntimeError("C++ compile error"), None)

    monkeypatch.setattr(classify.Task, "loss", compiled)
    with pytest.raises(SystemExit if number else InductorError) as ended:
        train_here(tmp_path, *QUICK, "name=run")
    saved, _ = checkpoint.Store(tmp_path / "run" / "checkpoints").newest()
    if number is None:
        assert saved.state["step"] == 3
        return
    assert ended.value.code == stop.REQUEUE and saved.state["step"] == 4
    tensors = saved.tensors("model")
    assert before.keys() == tensors.keys() and all(before[name].equal(tensors[name]) for name in before)


@pytest.mark.parametrize(("processes", "at", "saved"), [(1, 0, None), (2, 0, None), (1, 4, 4), (2, 4, 3)])
def test_a_machine_that_cannot_compile(tmp_path, monkeypatch, processes, at, saved):
    """Before the first step nothing is left of the run; later a single process saves."""
    loss, run = classify.Task.loss, tmp_path / "run"

    def compiled(self, *args, draw):
        if draw < at:
            return loss(self, *args, draw=draw)
        monkeypatch.setattr(distributed, "size", lambda: processes)  # only for what is done about the error
        raise InductorError(OSError(errno.ENOSPC, "No space left on device"), None)

    monkeypatch.setattr(classify.Task, "loss", compiled)
    with pytest.raises(RunError, match=r"could not compile: .*left on device\nset TMPDIR .*=false") as error:
        train_here(tmp_path, *QUICK, "name=run")
    newest, _ = checkpoint.Store(run / "checkpoints").newest()
    assert (newest and newest.state["step"]) == saved and (run / "config.yaml").exists() == (saved is not None)
    assert str(error.value).endswith(f"resume with: python train.py resume={run}") == (saved == 4)


def test_a_full_disk_under_the_output_does_not_end_a_run(tmp_path, monkeypatch, capfd):
    with open("/dev/full", "w") as full:
        output = console.Output(file=full)
        monkeypatch.setattr(console, "CONSOLE", output)
        monkeypatch.setattr("recipes.log.CONSOLE", output)
        monkeypatch.setattr("recipes.run.CONSOLE", output)
        train_here(tmp_path, *QUICK, "train.steps=2", "name=run")
    assert lines(tmp_path / "run")[-1]["step"] == 2
    assert capfd.readouterr().err.count("nothing more is printed") == 1
