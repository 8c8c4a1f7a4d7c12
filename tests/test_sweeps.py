"""Hydra as people use it: sweeps, searches, completion, a configuration printed and given back."""

import json
import os
import pwd
import re
import runpy
import subprocess
import sys
import tempfile
import weakref
from pathlib import Path

import pytest
import torch
from hydra._internal.utils import get_args_parser
from omegaconf import OmegaConf

from children import ROOT, SMALL, fork
from recipes import config, shell
from recipes.config import ConfigError, compose, groups
from recipes.config.contents import flat
from recipes.config.given import expanded, with_task_of_run
from recipes.settings import RunError

QUICK = [*SMALL, "train.steps=3", "sched.warmup=0"]
RUNS = ("3/s-0", "None/s-1")


def sweep(*overrides, cwd):
    child = fork("-m", *QUICK, *overrides, cwd=cwd)
    output = child.output()
    assert {path.name for path in cwd.iterdir()} == {"runs", child.said.name}, "Hydra wrote something"
    return child.exitcode, output


def scores(runs: Path) -> dict[str, float]:
    """The best score of every run by its folder's name."""
    found = {}
    for path in runs.glob("*/checkpoints/best-*/state.json"):
        found[path.parents[2].name] = json.loads(path.read_text())["metrics"]["top1"]
    return found


def test_models_and_seeds(tmp_path):
    code, output = sweep("model.name=test_resnet,test_vit", "seed=0,1", "name=s", cwd=tmp_path)
    assert code == 0, output
    runs = tmp_path / "runs"
    chosen = [OmegaConf.load(runs / f"s-{number}" / "config.yaml") for number in range(4)]
    models = ["test_resnet", "test_resnet", "test_vit", "test_vit"]
    assert [(cfg.model.name, cfg.seed) for cfg in chosen] == list(zip(models, [0, 1, 0, 1], strict=True))
    last = output[output.rindex("4 runs") :]
    assert "model.name" in last and "seed" in last and all(f"s-{number}" in last for number in range(4))
    assert len(list(runs.glob("sweep-*.png"))) == 1


def test_a_run_that_fails_does_not_stop_the_others(tmp_path):
    code, output = sweep("data.batch_size=32,4000,16", "name=s", cwd=tmp_path)
    assert code == 2 and "Traceback" not in output, output
    assert "error in run 1 (" in output and output.count("fewer than one batch of 4000") == 1
    assert output.endswith("error: 1 of 3 runs failed, see above: 1\n")
    assert sorted(scores(tmp_path / "runs")) == ["s-0", "s-2"]
    assert "2 runs" in output


def test_nothing_is_left_of_the_run_before(tmp_path):
    """Each run has its own number of threads, and its own folder of runs, all of which are in the table."""
    own = torch.get_num_threads()
    child = fork("-m", *QUICK, "name=s", "hardware.threads=3,null", "out=runs/${hardware.threads}", cwd=tmp_path)
    output = child.output()
    assert child.exitcode == 0 and "2 runs" in output, output
    threads = [json.loads((tmp_path / "runs" / run / "sessions.jsonl").read_text())["threads"] for run in RUNS]
    assert threads == [3, own]


def test_runs_elsewhere_are_in_the_table(tmp_path):
    """The picture lies beside the runs, which may be in no folder but those that the sweep goes through."""
    first = fork("-m", *QUICK, "out=a,b", "name=s", cwd=tmp_path)
    assert "2 runs" in first.output() and first.exitcode == 0
    assert [path.parent.name for path in tmp_path.glob("*/sweep-*.png")] == ["a"]
    again = fork("-m", "resume=b/s-1,a/s-0", cwd=tmp_path)
    assert "2 runs" in again.output() and again.exitcode == 0
    assert sorted(path.parent.name for path in tmp_path.glob("*/sweep-*.png")) == ["a", "b"]


def test_runs_of_a_sweep_are_resumed_by_name(tmp_path):
    """The newest run of the same model and data may be another one of the same sweep."""
    child = fork("-m", *QUICK, "seed=0,1", "resume=auto", cwd=tmp_path)
    output = child.output()
    assert child.exitcode == 2 and "error in run 1 (" in output, output
    assert "which in a sweep (-m) may be another of its runs: pass name=" in output
    assert [path for path in tmp_path.iterdir() if path != child.said] == []


def test_search(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    arguments = ["hydra/sweeper=search", "hydra.sweeper.n_trials=3", f"hydra.sweep.dir={tmp_path / 'runs' / 'found'}"]
    code, output = sweep(*arguments, "optim.lr=tag(log,interval(1e-4,1e-1))", "name=s", cwd=tmp_path)
    assert code == 0, output
    found = OmegaConf.load(tmp_path / "runs" / "found" / "optimization_results.yaml")
    assert found.best_value == max(scores(tmp_path / "runs").values())
    rates = [OmegaConf.load(tmp_path / "runs" / f"s-{number}" / "config.yaml").optim.lr for number in range(3)]
    assert len(set(rates)) == 3 and found.best_params["optim.lr"] in rates


def test_a_search_goes_on_without_runs_that_fail(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    (tmp_path / "runs" / "s-1").mkdir(parents=True)
    (tmp_path / "runs" / "s-1" / "config.yaml").touch()
    code, output = sweep("hydra/sweeper=search", "hydra.sweeper.n_trials=3", "seed=choice(0,1)", "name=s", cwd=tmp_path)
    assert code == 0 and output.endswith("1 of 3 runs failed, see above: 1\n"), output
    assert "already holds a run: a search that is resumed counts its runs from 0 again: pass another name=" in output
    assert sorted(scores(tmp_path / "runs")) == ["s-0", "s-2"]


def test_a_search_without_a_score(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    lost = ["optim.lr=choice(1e30)", "train.steps=1", "train.clip_grad=null", "train.ema=null"]
    code, output = sweep("hydra/sweeper=search", "hydra.sweeper.n_trials=2", *lost, "name=s", cwd=tmp_path)
    assert code == 2 and "Traceback" not in output, output
    assert output.endswith("error: the search has no best run: none ended with a finite loss in its best evaluation\n")


def test_a_user_without_a_name_may_sweep(monkeypatch):
    """As in a container that is started with a number for a user."""
    for variable in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)
    groups.register()
    assert str(os.getuid()) in OmegaConf.create({"dir": "${scratch:}"}).dir


def test_no_other_has_what_hydra_writes_in_a_sweep(monkeypatch, tmp_path):
    """Under a name that can be foreseen another user could have made the folder, or a link."""
    groups.register()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / f"multirun-{os.getuid()}").symlink_to("nowhere")
    groups.clear_scratch()
    cfg = OmegaConf.create({"dir": "${scratch:}", "again": "${scratch:}"})
    assert cfg.dir == cfg.again and Path(cfg.dir).parent == tmp_path and Path(cfg.dir).stat().st_mode & 0o777 == 0o700
    groups.clear_scratch()
    groups.clear_scratch()
    assert [path.name for path in tmp_path.iterdir()] == [f"multirun-{os.getuid()}"]


def test_a_search_is_for_one_process(monkeypatch, capsys):
    monkeypatch.setattr(config, "is_search", lambda: True)
    config._refuse_shared_search()
    monkeypatch.setattr("recipes.distributed.size", lambda: 2)
    with pytest.raises(SystemExit):
        config._refuse_shared_search()
    assert "a search chooses its values in one process: start it with `python`" in capsys.readouterr().err


def test_a_run_that_failed_keeps_no_memory(monkeypatch, capsys):
    """Hydra holds its error until the sweep ends, and an error the variables of the functions that it passed."""
    monkeypatch.setattr(config, "_RUNS", {})
    left, held = [], []

    def train():
        model = torch.nn.Linear(2, 2)
        left.append(weakref.ref(model))
        try:
            model(torch.zeros(3))
        except RuntimeError as error:
            raise RunError("it does not fit") from error

    for _ in range(2):
        with pytest.raises(RunError) as found, config._noted("train", (RunError,)):
            train()
        held.append(found.value)
    assert len(held) == 2 and not any(model() for model in left)
    assert capsys.readouterr().err.count("it does not fit") == 2


def test_a_run_that_is_done_keeps_no_memory(monkeypatch):
    """Even where it is part of a cycle, as what asked a configuration for a key that is absent."""
    monkeypatch.setattr(config, "_RUNS", {})
    with config._noted("train", (RunError,)):
        model = torch.nn.Linear(2, 2)
        model.itself, left = [model], weakref.ref(model)
        del model
    assert left() is None


def complete(line: str, script: str = "train.py", *flags: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "COMP_LINE": line, "COMP_POINT": str(len(line))}
    command = [sys.executable, *flags, str(ROOT / script), "-sc", "query=bash"]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=True)


@pytest.mark.parametrize(
    "typed, expected",
    [
        ("model=davit_", {"model=davit_t", "model=davit_l_384"}),
        ("model=davit_t model.dep", {"model.depths."}),
        ("optim.l", {"optim.lr=", "optim.layer_decay="}),
        ("rec", {"recipe"}),
        ("recipe=", {"recipe=quick", "recipe=paper"}),
    ],
)
def test_completion(typed, expected):
    assert expected <= set(complete(f"python train.py {typed}").stdout.split())


def test_completion_imports_no_torch():
    done = complete("python train.py model=", "train.py", "-X", "importtime")
    assert "model=maxvit_t" in done.stdout
    names = {line.rpartition("|")[2].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert "hydra" in names and not names & {"torch", "timm", "zoo", "numpy", "matplotlib"}
    assert "run=" in complete("python eval.py ru", "eval.py").stdout


def test_completion_in_bash():
    python = Path(sys.executable).parent
    lines = f"""
        export PATH={python}:$PATH
        eval "$(python train.py -sc install=bash)"
        COMP_LINE="python train.py data=fash" COMP_POINT=26 COMP_CWORD=2
        hydra_bash_completion
        echo "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(["bash", "-c", lines], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "data=fashion_mnist"


def test_completion_knows_every_model():
    assert shell.TABLE.read_text() == shell.render(), "run `make docs`"


@pytest.mark.parametrize("module", ["papers", "shell"])
def test_what_writes_a_file_of_ours_has_help(module, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    monkeypatch.delitem(sys.modules, "recipes.shell")
    with pytest.raises(SystemExit):
        runpy.run_module(f"recipes.{module}", run_name="__main__")
    assert capsys.readouterr().out.startswith(f"usage: python -m recipes.{module} ")


GIVEN = [
    ["model=davit_t", "optim.lr=3e-5", "data=cifar10"],
    ["recipe=paper", "model=maxvit_t_tv", "data=imagenet"],
    [
        "model=timm",
        "model.name=resnet50",
        "+model.act_layer=silu",
        "data=imagefolder",
        'data.root="a,b \\"c\\""',
        "optim.betas=[0.9,0.95]",
    ],
    ["task=segment", "model=litv2_s", "task.head=fcn"],
    ["task=detect", "recipe=paper", "model=nat_t", "data=coco", "data.root=coco"],
    ["logger=[wandb,tensorboard]", "logger.mode=offline", "+model.more={a: [1, x], b: null}"],
]


@pytest.mark.parametrize("overrides", GIVEN, ids=[" ".join(each) for each in GIVEN])
def test_a_configuration_is_given_back(tmp_path, overrides):
    cfg = compose(overrides)
    OmegaConf.save(cfg, tmp_path / "it.yaml")
    assert flat(compose(expanded([f"config={tmp_path / 'it.yaml'}"]))) == flat(cfg)
    changed = compose(expanded(["seed=7", f"config={tmp_path / 'it.yaml'}"]))
    assert flat(changed) == {**flat(cfg), "seed": 7}


WRONG = [
    (["=2"], "=2 has no key, as where a variable of the shell is not set"),
    (["config="], "config= is empty: give a name, or leave it out"),
    (["-m", "data=digits,null"], "data=digits,null is not an option of data: expected one of the"),
    (["--lr=3"], "--lr=3 is no option: a key is given without dashes, optim.lr=3"),
    (["--name=foo"], "--name=foo is no option: a key is given without dashes, name=foo"),
    (["--lr_base_batch", "3"], "without dashes, optim.lr_base_batch=<value> or sched.lr_base_batch=<value>"),
]


@pytest.mark.parametrize("typed, said", WRONG, ids=[" ".join(typed) for typed, _ in WRONG])
def test_arguments_that_hydra_misreads(typed, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        expanded(typed)


@pytest.mark.parametrize("name", ["train", "eval"])
def test_options_of_hydra_are_no_keys(name):
    for option in (option for action in get_args_parser()._actions for option in action.option_strings):
        assert expanded([option], name) == [option]
    assert expanded(["--hydra-help", "name=first", "model=timm"], name) == ["--hydra-help"]


@pytest.mark.parametrize("name, key", [("train", "resume"), ("eval", "run")])
def test_the_task_of_runs(tmp_path, name, key):
    for folder, task in (("a", "segment"), ("b", "segment"), ("c", "detect")):
        (tmp_path / folder).mkdir()
        OmegaConf.save(compose([f"task={task}"]), tmp_path / folder / "config.yaml")
    a, b, c, none = (tmp_path / folder for folder in "abcd")
    for typed in (f"{a}", f"{a},{b}", f"choice({none},{b})"):
        assert with_task_of_run([f"{key}={typed}"], name) == ["task=segment", f"{key}={typed}"]
    for typed in (f"{a},{c}", "auto,3", f"{none},{none}"):
        assert with_task_of_run([f"{key}={typed}"], name) == [f"{key}={typed}"]
    with pytest.raises(RunError, match="holds no run"):
        with_task_of_run([f"{key}={none}"], name)
    for typed in ("", '""'):
        with pytest.raises(ConfigError, match=f"^{key}= is empty: give a name, or leave it out"):
            with_task_of_run([f"{key}={typed}"], name)


@pytest.mark.parametrize("flags", [["-m"], ["--cfg", "job"], ["--config-dir", "mine"]], ids=" ".join)
def test_flags_before_a_configuration(tmp_path, flags):
    """Hydra reads what is neither a flag nor its value only where it stands together."""
    OmegaConf.save(compose(["seed=3"]), tmp_path / "it.yaml")
    (tmp_path / "mine").mkdir()
    given = f"config={tmp_path / 'it.yaml'}"
    beside = [["optim.lr=1", *flags, given], [given, *flags, "optim.lr=1"]]
    for typed in (
        [*flags, given],
        [*flags, given, "optim.lr=1"],
        [given, *flags],
        [*flags, "optim.lr=1", given],
        *beside,
    ):
        found = get_args_parser().parse_args(expanded(typed))
        assert "++seed=3" in found.overrides and ("optim.lr=1" in typed) == (found.overrides[-1] == "optim.lr=1")
        assert found.multirun == (flags == ["-m"]) and (found.cfg == "job") == ("job" in flags)


@pytest.mark.parametrize(
    "option", ["recipe=finetune", "model=nat_m", "data=cifar10", "optim=sgd", "logger=wandb", "~optim"]
)
def test_an_option_beside_a_configuration(tmp_path, option):
    """The file has every key that the option would set: it would be passed over, or mixed with the file's."""
    OmegaConf.save(compose(), tmp_path / "it.yaml")
    with pytest.raises(ConfigError, match=f"already sets every key.*leave out {option} and"):
        expanded([f"config={tmp_path / 'it.yaml'}", "seed=7", option])


def test_a_configuration_that_is_none(tmp_path):
    (tmp_path / "list.yaml").write_text("- 1\n")
    for name in ("nothing.yaml", "list.yaml"):
        with pytest.raises(ConfigError, match="is not a configuration"):
            expanded([f"config={tmp_path / name}"])


def test_a_configuration_of_some_keys(tmp_path):
    (tmp_path / "some.yaml").write_text("train: {steps: 2}\n")
    (tmp_path / "beside.yaml").write_text("run: runs/first\nimg_size: 40\n")
    assert expanded([f"config={tmp_path / 'beside.yaml'}"], "eval") == ["run=runs/first", "++img_size=40"]
    with pytest.raises(
        ConfigError, match=r"it has no model\.name; give a run's .* is a recipe: put it into .* recipe/"
    ):
        expanded([f"config={tmp_path / 'some.yaml'}"])


BESIDE_A_RUN = [
    ["run=runs/first"],
    ["run='runs/my run (1)'", "img_size=40", "save_predictions=true"],
    ["run=runs/first", "data=cifar10", "data.crop_pct=0.5"],
    ["run=runs/first", "task=segment", "task.flip=true", "data=ade20k", "hardware.threads=1"],
]


@pytest.mark.parametrize("overrides", BESIDE_A_RUN, ids=[" ".join(each) for each in BESIDE_A_RUN])
def test_a_print_of_the_evaluation_of_a_run_is_given_back(tmp_path, overrides):
    """What was not typed is the run's own, and no default."""
    OmegaConf.save(compose(overrides, "eval"), tmp_path / "it.yaml")
    again = expanded([f"config={tmp_path / 'it.yaml'}"], "eval")
    assert {text.lstrip("+").replace('"', "'") for text in again} == set(overrides)


def test_a_print_of_the_evaluation_of_a_file_is_given_back(tmp_path):
    """Whose model is found from the weights."""
    cfg = compose(["checkpoint=a.pth", "img_size=96"], "eval")
    OmegaConf.save(cfg, tmp_path / "it.yaml")
    assert flat(compose(expanded([f"config={tmp_path / 'it.yaml'}"], "eval"), "eval")) == flat(cfg)


def test_a_configuration_of_a_training_measures_nothing(tmp_path):
    OmegaConf.save(compose(), tmp_path / "it.yaml")
    with pytest.raises(ConfigError, match=r"it\.yaml is for train\.py: give the output of eval\.py --cfg job, or only"):
        expanded([f"config={tmp_path / 'it.yaml'}"], "eval")


def test_what_is_printed_is_given_back(tmp_path):
    def printed(*arguments: str) -> str:
        child = fork(*arguments, "--cfg", "job", "--resolve", cwd=tmp_path)
        text = child.output()
        assert child.exitcode == 0
        return text

    text = printed("model=davit_t", "optim.lr=0.5")
    (tmp_path / "printed.yaml").write_text(text)
    assert "${" not in text and "lr: 0.5" in text
    assert printed("config=printed.yaml") == text
