"""The configuration of a run met with what is typed to evaluate it, and run folders found again."""

import json
import pwd
import re
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from children import TINY, no_space
from recipes import config, distributed
from recipes.checkpoint import Store
from recipes.config import ConfigError
from recipes.config.contents import flat
from recipes.config.given import expanded, with_task_of_run
from recipes.data.build import DataError, build, preprocessing
from recipes.provenance import note_session, sessions
from recipes.run import Run, open_run
from recipes.settings import RunError, config_to_evaluate, config_to_resume, load_config, runs_in


def begun(folder, *overrides, job=None, agents=(), model=TINY):
    """A run's folder as it is before the first step."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(config.compose([*model, *overrides]), resolve=True))
    session = {"overrides": [*model, *overrides], "job": job, "agents": agents}
    (folder / "sessions.jsonl").write_text(json.dumps(session) + "\n")
    return folder


def test_an_evaluation_at_another_size(tmp_path):
    run = begun(tmp_path / "run", "data.eval_img_size=48")
    assert preprocessing(config_to_evaluate(run, [f"run={run}", "out=there"])).size == (48, 48)
    for typed, size in (("img_size=96", (96, 96)), ("img_size=[64,96]", (64, 96)), ("img_size=null", (48, 48))):
        assert preprocessing(config_to_evaluate(run, [f"run={run}", typed])).size == size


def test_ways_to_look_are_those_of_the_evaluation(tmp_path):
    run = begun(tmp_path / "run", "task=segment")
    typed = ["task=segment", "task.flip=true", "task.scales=[0.5,1.0]", "task.inference=slide", "task.stride=[8,8]"]
    task = config_to_evaluate(run, [f"run={run}", *typed]).task
    assert (task.flip, task.scales, task.inference, task.stride) == (True, [0.5, 1.0], "slide", [8, 8])


def test_a_size_that_images_of_a_dense_task_do_not_get_is_refused(tmp_path):
    """Data with labels in it is resized by its sides, whatever data.img_size is."""
    data = ["data=masks", "data.root=there", "data.num_classes=3"]
    run = begun(tmp_path / "run", "task=segment", *data)
    with pytest.raises(RunError, match=r"img_size=96 would have no effect: it needs .*data\.short_side= and"):
        config_to_evaluate(run, [f"run={run}", "img_size=96"])
    assert config_to_evaluate(run, ["img_size=96", "task.inference=slide"]).data.img_size == 96
    scenes = begun(tmp_path / "scenes", "task=detect")
    assert config_to_evaluate(scenes, ["img_size=96"]).data.img_size == 96
    with pytest.raises(RunError, match=r"data\.img_size=96 would have no effect: it needs .*data\.short_side= and"):
        config_to_evaluate(run, ["data.img_size=96"])
    with pytest.raises(ConfigError, match=r"img_size=96 has no effect here: it needs .*data\.short_side= and"):
        config.compose(["checkpoint=a.pth", "task=segment", *data, "img_size=96"], "eval")


def test_another_dense_data_set_is_resized_as_the_run_s(tmp_path, capsys):
    run = begun(tmp_path / "run", "task=detect", "data=coco_json", "data.root=there")
    found = config_to_evaluate(run, ["data=coco", "data.root=here", "data.long_side=900"]).data
    assert (found.short_side, found.long_side) == (640, 900)
    said = capsys.readouterr().out
    assert "preprocessed like the run's images" in said and "data.short_side=640" in said and "crop_pct" not in said


def test_a_run_goes_on_as_before_where_its_recipe_sets_a_younger_key(tmp_path):
    paper = ["task=segment", "recipe=paper", "data=ade20k", "data.root=there"]
    run = begun(tmp_path / "run", *paper, model=["model=nat_m"])
    assert config_to_resume(run, []).data.antialias is False
    path = run / "config.yaml"
    path.write_text("".join(line for line in path.read_text().splitlines(True) if "antialias" not in line))
    assert config_to_resume(run, []).data.antialias is None
    with pytest.raises(RunError, match=r"data\.antialias: the run has None, now False"):
        config_to_resume(run, ["data.antialias=false"])
    for typed, antialias in ((["task.flip=true"], None), (["data.antialias=false"], False)):
        assert config_to_evaluate(run, typed).data.antialias is antialias
    assert config_to_evaluate(run, ["data=voc", "data.root=here"]).data.antialias is None


def test_a_run_whose_recipe_has_another_value_now_is_told_how_to_go_on(tmp_path):
    run = begun(tmp_path / "run")
    path, config = run / "config.yaml", load_config(run)
    config.augment.hflip, config.optim.betas = 0.5, [0.9, 0.95]
    path.write_text(OmegaConf.to_yaml(config))
    with pytest.raises(RunError, match=r"hflip: the run has 0\.5, now 0") as error:
        config_to_resume(run, [])
    given = ["augment.hflip=0.5", "optim.betas=[0.9,0.95]"]
    assert f"to resume as before give {' '.join(given)}, or start" in str(error.value)
    assert config_to_resume(run, given).augment.hflip == 0.5
    with pytest.raises(RunError, match="leave these out to resume, or start"):
        config_to_resume(run, ["augment.hflip=0.25", "optim.betas=[0.9,0.95]"])


def test_a_recipe_that_makes_no_sense_any_more_is_refused(tmp_path):
    """Where the run was not started with it: what it was started with goes on."""
    (tmp_path / "recipe").mkdir()
    recipe, run = tmp_path / "recipe" / "own.yaml", tmp_path / "run"
    recipe.write_text("# @package _global_\ntrain: {save_every: 5}\n")
    run.mkdir()
    session = {"overrides": [*TINY, "recipe=own"], "searched": [str(tmp_path)]}
    cfg = config.compose(session["overrides"], searched=session["searched"])
    (run / "config.yaml").write_text(OmegaConf.to_yaml(cfg, resolve=True))
    (run / "sessions.jsonl").write_text(json.dumps(session) + "\n")
    assert config_to_resume(run, []).train.save_every == 5
    recipe.write_text(recipe.read_text().replace("5", "0"))
    with pytest.raises(ConfigError, match=r"^train\.save_every=0: expected a number in \[1, infinity\)"):
        config_to_resume(run, [])


@pytest.mark.parametrize("typed", ["seed=3", "task=segment", "task.loss=binary_cross_entropy", "++train.steps=3"])
def test_what_would_change_nothing_is_refused(tmp_path, typed):
    run = begun(tmp_path / "run")
    config_to_evaluate(run, [f"run={run}", "task=classify", "save_predictions=true"])
    with pytest.raises(RunError, match="would have no effect") as error:
        config_to_evaluate(run, [f"run={run}", typed, "hardware=cpu"])
    assert f" {typed} would" in str(error.value)
    with pytest.raises(RunError, match=r"already determines the model and its weights; leave out weights=ema"):
        config_to_evaluate(run, ["weights=ema"])


@pytest.mark.parametrize(
    "typed",
    ["data.batch_size=8", "data.hflip=0.3", "hardware.parallel=fsdp", "hardware.sync_bn=true"],
)
def test_what_only_training_reads_is_refused(tmp_path, typed):
    run = begun(tmp_path / "run")
    with pytest.raises(RunError, match=rf"^{typed} would have no effect: it needs train\.py, as only training reads"):
        config_to_evaluate(run, [f"run={run}", typed])
    given = ["hardware.amp=bfloat16", "hardware.timeout=60", "data.eval_batch_size=8"]
    found = config_to_evaluate(run, [f"run={run}", *given, f"++{typed}"])  # as of config=
    assert (found.hardware.amp, found.data.eval_batch_size) == ("bfloat16", 8)


def test_another_data_set_is_prepared_as_the_run_s(tmp_path, capsys):
    run = begun(tmp_path / "run", "data=digits", "data.crop_mode=squash")
    cfg = config_to_evaluate(run, ["data=cifar10", "data.std=[0.1,0.2,0.3]"])
    assert cfg.data.hub == "uoft-cs/cifar10"
    found = preprocessing(cfg)
    assert (found.mean, found.std, found.size, found.crop_mode) == ((0.5,) * 3, (0.1, 0.2, 0.3), (32, 32), "squash")
    assert "data=cifar10 is preprocessed like the run's images, data.mean=[0.5,0.5,0.5]; " in capsys.readouterr().out
    config_to_evaluate(run, ["data=digits"])
    assert capsys.readouterr().out == ""


def test_sizes_that_the_run_s_data_brought(tmp_path):
    run = begun(tmp_path / "run", "data=cifar10", "data.img_size=null", "data.eval_img_size=48")
    found = config_to_evaluate(run, ["data=digits", "data.img_size=40"])
    assert preprocessing(found).size == (48, 48) and preprocessing(found, train=True).size == (40, 40)


def test_data_that_was_moved_stays_where_it_is_now(tmp_path):
    """The command that goes on, as a run prints it, names no data."""
    run = begun(tmp_path / "run", "data=imagefolder", "data.root=first")
    assert config_to_evaluate(run, []).data.root == config_to_resume(run, []).data.root == "first"
    for typed in (["data.root=second", "hardware=cpu"], [], ["data.root=third"], ["train.keep=1"]):
        note_session(run, [f"resume={run}", *typed], 0, "cpu")
    assert config_to_evaluate(run, []).data.root == config_to_resume(run, []).data.root == "third"
    assert config_to_resume(run, ["data.root=fourth"]).data.root == "fourth"
    assert config_to_evaluate(run, ["data=imagenet_a", "data.root=other"]).data.root == "other"
    assert config_to_resume(run, []).hardware.device == "auto"  # of one start


def test_images_that_were_replaced_are_replaced_in_evaluations(tmp_path):
    run = begun(tmp_path / "run", "data=imagefolder", "data.root=photos")
    for typed, data in (("data.on_bad_image=replace", ("photos", "replace")), ("data.root=here", ("here", "replace"))):
        note_session(run, [f"resume={run}", typed], 0, "cpu")
        for found in (config_to_evaluate(run, []), config_to_resume(run, [])):
            assert (found.data.root, found.data.on_bad_image) == data
    assert config_to_resume(run, ["data.on_bad_image=raise"]).data.on_bad_image == "raise"


def test_the_task_of_an_evaluation_is_that_of_its_run(tmp_path, monkeypatch, capsys):
    """So that Hydra knows the keys of that task."""
    segment, classify = begun(tmp_path / "my run", "task=segment"), begun(tmp_path / "other")
    typed = [config.quote("run", str(segment)), "task.flip=true"]
    assert with_task_of_run(typed) == ["task=segment", *typed]
    assert with_task_of_run([*typed, f"run={classify}"]) == ["task=classify", *typed, f"run={classify}"]
    assert with_task_of_run(["-m", *typed]) == ["-m", "task=segment", *typed]
    for others in (["checkpoint=a.pth"], ["-m", f"run={segment},{classify}"], [f"run={segment}", "task=detect"]):
        assert with_task_of_run(others) == others
    resumed = [config.quote("resume", str(segment)), "task.crop=false"]
    assert with_task_of_run(resumed, "train") == ["task=segment", *resumed]
    assert with_task_of_run(["resume=auto", "task.crop=false"], "train") == ["resume=auto", "task.crop=false"]
    said = []
    monkeypatch.setattr("sys.argv", ["eval.py", *typed])
    config.main("eval")(lambda cfg: said.append((cfg.run, cfg.task.name, cfg.task.flip)))()
    assert said == [(str(segment), "segment", True)]
    monkeypatch.setattr("sys.argv", ["eval.py", "run=missing", "task.flip=true"])
    with pytest.raises(SystemExit):
        config.main("eval", errors=(RunError,))(lambda cfg: None)()
    assert "error: missing holds no run: missing/config.yaml does not exist" in capsys.readouterr().err


def test_a_home_folder_is_found_in_quotes_too(tmp_path, monkeypatch):
    """No shell resolves its ~ there, and Hydra cannot parse it without."""
    monkeypatch.setenv("HOME", str(tmp_path))
    keys = ("out", "resume", "model.checkpoint", "teacher.checkpoint")
    cfg = config.compose([*(f'{key}="~/{key}"' for key in keys), "teacher.kind=soft", 'model.backbone="~unknown/b"'])
    assert [OmegaConf.select(cfg, key) for key in keys] == [f"{tmp_path}/{key}" for key in keys]
    assert cfg.model.backbone == "~unknown/b"
    cfg = config.compose(["checkpoint=['~/a','b~']", 'predict="~/*.jpg"', 'out="~/found"'], "eval")
    assert (cfg.checkpoint, cfg.predict, cfg.out) == ([f"{tmp_path}/a", "b~"], f"{tmp_path}/*.jpg", f"{tmp_path}/found")
    with pytest.raises(ConfigError, match=f"With the whole path it can: model.checkpoint={tmp_path}/x.pth$"):
        config.compose(["model.checkpoint=~/x.pth"])
    run = begun(tmp_path / "run", "task=segment")
    assert with_task_of_run(['run="~/run"'])[0] == "task=segment"
    assert "model.name=test_resnet" in " ".join(expanded(["config=~/run/config.yaml"]))
    assert config_to_evaluate(run, ['run="~/run"']).task.name == "segment"


def test_a_user_without_a_home_folder(monkeypatch):
    """As in a container that is started with a number for a user."""
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)
    said = "this user has no home folder that ~ could stand for: give the whole path, or set HOME"
    for name, typed in (("train", 'out="~/runs"'), ("train", "data.root=~/photos"), ("eval", "checkpoint=['~/a']")):
        with pytest.raises(ConfigError, match=rf"^{typed.split('=')[0]}=\S*: {said}$"):
            config.compose([typed], name)
    with pytest.raises(DataError, match=rf"^cannot read data\.root=~/photos: {said}$"):
        build(config.compose(["data=imagefolder", 'data.root="~/photos"']))


def test_a_key_that_was_typed_is_no_near_match():
    with pytest.raises(ConfigError, match=r"unknown key 'task\.flip' here: it belongs to task=segment"):
        config.compose(["task.flip=true"], "eval")
    with pytest.raises(ConfigError, match=r"unknown key 'recipe'; "):
        config.compose(["recipe=quick"], "eval")


BEST = "the weights of other steps are evaluated, so that another checkpoint may be the best"
EFFECTS = {
    "hardware.amp=bfloat16": "None to bfloat16: from here on numbers are rounded differently, and the result differs",
    "hardware.sync_bn=true": "False to True: on several GPUs batch norms take statistics over other images, and the "
    "result differs",
    "train.eval_every=2": f"1 to 2: {BEST}",
    "train.eval_steps=2": f"None to 2: {BEST}",
    "hardware.threads=1": "None to 1: the result may differ in its last digits",
    "train.grad_checkpointing=true": "False to True: the result may differ in its last digits; batch norms of timm's "
    "models record their statistics twice with it",
    "data.eval_batch_size=2": "None to 2: the result may differ in its last digits",
}


@pytest.mark.parametrize("typed", EFFECTS)
def test_going_on_says_what_a_change_does(tmp_path, capsys, typed):
    run = begun(tmp_path / "run")
    config_to_resume(run, [f"resume={run}", typed])
    said = " ".join(capsys.readouterr().out.split())
    assert said == f"{typed.partition('=')[0]} changes from {EFFECTS[typed]}"


def test_going_on_refuses_what_nothing_reads(tmp_path):
    run = begun(tmp_path / "run")
    for typed in ("data.root=there", "data.on_bad_image=replace", "data.cache_gb=8"):
        with pytest.raises(RunError, match=rf"^{re.escape(typed)}(\.0)? would have no effect: it needs "):
            config_to_resume(run, [f"resume={run}", typed])
    note_session(run, ["data.root=there"], 0, "cpu")  # as was accepted once
    assert config_to_resume(run, [f"resume={run}"]).data.root == "there"


def test_runs_lie_at_any_depth(tmp_path):
    for name in ("a", "exp/b", "exp/c/d", "a/wandb/files", ".away/e"):
        begun(tmp_path / name)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "config.yaml").write_text("of: something else")
    assert [str(run.relative_to(tmp_path)) for run in runs_in(tmp_path)] == ["a", "exp/b", "exp/c/d"]
    assert list(runs_in(tmp_path / "nothing")) == []
    typed = [*TINY, f"out={tmp_path}", "resume=auto"]
    assert open_run(config.compose(typed), []).folder == tmp_path / "exp/c/d"


def test_a_run_that_has_lost_its_starts_is_said(tmp_path, capsys):
    for name in ("a", "b"):
        begun(tmp_path / name)
        (tmp_path / name / "metrics.jsonl").touch()
    (tmp_path / "a" / "sessions.jsonl").unlink()
    assert list(runs_in(tmp_path)) == [tmp_path / "b"]
    said = capsys.readouterr().err
    assert said == (
        f"{tmp_path / 'a'} is left out: it has lost sessions.jsonl, with how it was started; restore it from a copy\n"
    )


def test_a_folder_that_cannot_be_read_holds_no_runs(tmp_path, monkeypatch, capsys):
    """Such as lost+found, or somebody else's."""
    for name in ("lost+found", "run"):
        (tmp_path / name).mkdir()
    for name in ("config.yaml", "sessions.jsonl"):
        (tmp_path / "run" / name).touch()
    read = Path.iterdir

    def refuse(path):
        if path.name == "lost+found":
            raise PermissionError(13, "Permission denied")
        return read(path)

    monkeypatch.setattr(Path, "iterdir", refuse)
    assert list(runs_in(tmp_path)) == [tmp_path / "run"]
    assert f"{tmp_path / 'lost+found'} is left out: Permission denied" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["exp/a", None])
def test_a_restart_finds_its_run_in_a_folder(tmp_path, monkeypatch, name):
    given = [f"out={tmp_path}", *([f"name={name}"] if name else [])]
    begun(tmp_path / "exp" / "a", *given, job="launch")
    begun(tmp_path / "exp" / "other", *given, job="another")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "launch")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert open_run(config.compose([*TINY, *given]), [*TINY, *given]).folder == tmp_path / "exp" / "a"


@pytest.mark.parametrize("name", ["exp/a", None])
def test_a_restart_that_torchrun_does_not_count_finds_its_run(tmp_path, monkeypatch, name):
    """A machine has joined or left: rank 0 may be another agent's, but one of those that began is there."""
    given = [f"out={tmp_path}", *([f"name={name}"] if name else [])]
    begun(tmp_path / "exp" / "a", *given, job="none", agents=("one-7-99", "two-7-99"))
    begun(tmp_path / "exp" / "other", *given, job="none", agents=("one-7-55",))  # as in a container started again
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    monkeypatch.setattr(distributed._JOINED, "agents", ["three-7-12", "two-7-99"])
    assert open_run(config.compose([*TINY, *given]), [*TINY, *given]).folder == tmp_path / "exp" / "a"
    monkeypatch.setattr(distributed._JOINED, "agents", ["three-7-12"])
    if name is None:
        assert open_run(config.compose([*TINY, *given]), [*TINY, *given]).known is False
    else:
        with pytest.raises(RunError, match="already holds a run"):
            open_run(config.compose([*TINY, *given]), [*TINY, *given])


def test_a_start_that_the_disk_did_not_take_whole(tmp_path, monkeypatch):
    run = begun(tmp_path / "run", "train.steps=3", job="launch")
    path = run / "sessions.jsonl"
    first = path.read_text()
    path.write_text(first + first[: len(first) // 2])
    assert config_to_resume(run, []).train.steps == 3
    note_session(run, ["train.keep=1"], 0, "cpu")
    assert [start["overrides"] for start in sessions(run)] == [[*TINY, "train.steps=3"], ["train.keep=1"]]
    path.write_text(first[: len(first) // 2])
    with pytest.raises(RunError, match="has lost the command that started it"):
        config_to_resume(run, [])
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "launch")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    typed = [*TINY, f"out={tmp_path}"]
    assert open_run(config.compose(typed), typed).known is False  # another's is passed over


def test_a_run_with_a_key_that_has_another_name_now(tmp_path):
    run = begun(tmp_path / "run")
    path = run / "config.yaml"
    path.write_text(path.read_text().replace("real_labels: false", "real: false"))
    assert "real_labels" not in path.read_text() and load_config(run).data.real_labels is False
    assert config_to_resume(run, []).data.real_labels is False


def test_a_run_is_read_with_the_keys_that_it_lacks(tmp_path, capsys):
    """With their defaults, whatever sets them otherwise: data=scenes leaves the background out."""
    younger = {
        "hardware.sync_bn": False, "data.left_out": [], "data.max_pixels": 89478485, "data.cache": None,
        "task.left_out_weight": 1.0, "model.backbone": None, "seed": 0,
    }  # fmt: skip
    run = begun(tmp_path / "run", "task=segment")
    cfg = OmegaConf.load(run / "config.yaml")
    for key in younger:
        group, _, rest = f".{key}".rpartition(".")
        del (OmegaConf.select(cfg, group[1:]) if group else cfg)[rest]
    OmegaConf.save(cfg, run / "config.yaml")
    for found in (load_config(run), config_to_evaluate(run, []), config_to_resume(run, [])):
        assert {key: OmegaConf.select(found, key) for key in younger} == younger
    assert "changes from" not in capsys.readouterr().out


def test_a_configuration_written_by_hand_keeps_its_groups(tmp_path):
    (tmp_path / "config.yaml").write_text("model: {name: test_resnet}\ndata: {name: own}\ntask: {name: own}\n")
    cfg = load_config(tmp_path)
    assert (cfg.model.weights, cfg.data.img_size, cfg.seed) == ("auto", None, 0) and "source" not in cfg.data
    assert "train" not in cfg and "augment" not in cfg and flat(cfg.task) == {"name": "own"}


@pytest.mark.parametrize("name", ["local-dir:../../../models/x", "hf-hub:timm/resnet18"])
def test_a_run_of_an_address_lies_in_its_folder(tmp_path, name):
    """The slashes of neither name make folders."""
    cfg = config.compose(TINY)
    cfg.out, cfg.model.name, cfg.data.name = str(tmp_path), name, "own/birds"
    folder = open_run(cfg, []).folder
    assert folder.parent == tmp_path and folder.name.startswith(f"{re.sub('[/:]', '-', name)}-own-birds-")


@pytest.mark.parametrize("best", [True, False])
@pytest.mark.parametrize("known", [True, False])
def test_a_run_that_cannot_go_on_keeps_the_configuration_of_its_weights(tmp_path, known, best):
    folder = begun(tmp_path / "run")
    run = Run(folder, load_config(folder), Store(folder / "checkpoints"), known=known)
    run.metrics.touch()
    if best:
        run.store.save(1, {"model": {"w": torch.zeros(1)}}, {"metrics": {"top1": 50.0}}, best=True)
    run.withdraw()
    assert run.metrics.exists() == (folder / "config.yaml").exists() == (known or best)


def test_a_file_that_cannot_be_written_stays_as_it_was(tmp_path, monkeypatch):
    folder = begun(tmp_path / "run")
    run = Run(folder, load_config(folder), Store(folder / "checkpoints"))
    listed = folder / "nonfinite" / "step-00000003.txt"
    assert str(listed) in run.list_images(3, ["a.png"])
    monkeypatch.setattr("recipes.run.flush", no_space)
    assert "could not be written" in run.list_images(3, ["b.png"])
    assert listed.read_text() == "a.png\n" and list(listed.parent.iterdir()) == [listed]
