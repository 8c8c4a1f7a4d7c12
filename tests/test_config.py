"""The configuration: everything composes, the command line goes first, errors say what to type."""

import inspect
import multiprocessing
import os
import re
import runpy
import shlex
import sys
from pathlib import Path
from types import ModuleType

import pytest
from hydra.errors import MissingConfigException
from omegaconf import OmegaConf

import zoo
from recipes import config, papers
from recipes.config import ConfigError, checks, compose, contents, help_text, main, quote
from recipes.config import overrides as given
from recipes.config.groups import register
from recipes.config.messages import PLUGINS, explain
from recipes.config.ranges import check_range
from zoo.releases import RELEASES, UNRELEASED

ROOT = Path(__file__).parents[1]
CONF = ROOT / "recipes" / "conf"
register()
GROUPS = [group for group in contents.groups() if group != "model"]


@pytest.mark.parametrize("model", sorted(zoo.variants()))
def test_every_model_composes(model):
    cfg = compose([f"model={model}"])
    expected = OmegaConf.to_container(OmegaConf.create(zoo.variants()[model]))
    assert "img_size" in expected
    expected |= {"name": model, "img_size": None}  # the data says the size
    composed = OmegaConf.to_container(cfg.model)
    assert {key: composed[key] for key in expected} == expected


@pytest.mark.parametrize("group, option", [(group, option) for group in GROUPS for option in contents.options(group)])
def test_every_option_composes(group, option):
    alone = [] if group == "recipe" else ["~recipe/by_task"]  # which changes keys of the task
    cfg = compose([f"{group}={option}", *alone])
    own = OmegaConf.to_container(OmegaConf.load(CONF / group / f"{option}.yaml"))
    own.pop("defaults", None)
    if group != "recipe":
        assert {key: cfg[group][key] for key in own} == own
    if f"- {group}: " in (CONF / "eval.yaml").read_text():
        found = compose([f"{group}={option}", "checkpoint=x.pth"], name="eval")[group]
        assert {key: found[key] for key in own} == own and (found == cfg[group] or group == "data")


TASKS = ("classify", "segment", "detect")
FILES = [
    "by_task/quick_segment",
    "by_task/quick_detect",
    *(f"by_task/paper_{task}" for task in TASKS),
    *contents.options("recipe"),
]


@pytest.mark.parametrize("name", FILES)
def test_recipes_invent_no_keys(name):
    """The struct flag guards the command line only: a mistyped key in a file would be a new key."""
    keys = {
        key for key in contents.flat(OmegaConf.load(CONF / "recipe" / f"{name}.yaml")) if not key.startswith("paper.")
    }
    task = OmegaConf.load(CONF / "task" / f"{name.partition('_')[2].partition('_')[2] or 'classify'}.yaml")
    hardware = OmegaConf.load(CONF / "hardware" / "auto.yaml")
    models = {key for model in zoo.variants() for key in inspect.signature(zoo.registry.class_of(model)).parameters}
    groups = {"task": task, "hardware": hardware, "model": models}
    assert keys <= set(contents.base("train")) | {f"{group}.{key}" for group, own in groups.items() for key in own}


def test_a_task_brings_its_data_and_its_quick_recipe():
    for task in ("segment", "detect"):
        cfg = compose([f"task={task}"])
        quick = contents.flat(OmegaConf.load(CONF / "recipe" / "by_task" / f"quick_{task}.yaml"))
        assert cfg.data.name == "scenes" and len(quick) >= 5
        assert {key: contents.flat(cfg)[key] for key in quick} == quick
        assert compose([f"task={task}", "model=maxvit_t"], name="eval").data.name == "scenes"
    cfg = compose(["data=ade20k", "task=segment", "data.batch_size=4", "task.head=fcn"])
    assert (cfg.data.name, cfg.data.batch_size, cfg.task.head) == ("ade20k", 4, "fcn")
    assert compose([]).data.name == "digits" and "head" not in compose([]).task


def asked(task):
    """The keys that recipe=paper takes from the tables of a task."""
    files = [CONF / "recipe" / "paper.yaml", CONF / "recipe" / "by_task" / f"paper_{task}.yaml"]
    found = [contents.flat(OmegaConf.load(file)).items() for file in files]
    return {key for items in found for key, value in items if str(value).startswith("${paper:")}


@pytest.mark.parametrize("task", TASKS)
def test_paper_tables_are_complete(task):
    """Every key that recipe=paper asks for is in every table, either published or chosen, and no other."""
    for phase, table in papers.tables(task).items():
        for model in table["models"]:
            recipe = papers.recipe(model, phase, task)
            assert recipe.values.keys() == asked(task), (phase, model)
            assert recipe.values.items() >= table["models"][model].items()
            assert recipe.chosen <= table["chosen"].keys()


@pytest.mark.parametrize("task", TASKS)
def test_published_values_make_sense(task):
    cases = [(model, phase) for phase, table in papers.tables(task).items() for model in table["models"]]
    assert len(cases) > 5
    for case in cases:
        for key, value in papers.recipe(*case, task).values.items():
            check_range(key, value)


def test_every_paper_value_can_be_given_another():
    """One command that overrides them all, with values that no table has."""
    words = {"augment.auto_augment": "3a", "augment.interpolation": "bilinear", "data.interpolation": "nearest",
             "data.crop_mode": "border", "augment.re_mode": "const", "sched.sched": "linear", "sched.per": "epoch",
             "sched.unit": "steps", "sched.decay_from": "warmup", "optim.decay": ["*.a"],
             "optim.no_decay": ["*.b"], "task.loss": "binary_cross_entropy"}  # fmt: skip
    recipe = papers.recipe("dinat_t").values
    others = {}
    for key in asked("classify"):
        value = recipe[key]
        number = 7 if value is None else not value if isinstance(value, bool) else None
        number = [item / 3 for item in value] if isinstance(value, list) else number
        other = words[key] if key in words else value + 1 if number is None else number
        others[key] = 0.37 if refused(key, other) else other
    typed = [f"{key}={str(value).replace(' ', '')}" for key, value in others.items()]
    cfg = contents.flat(compose(["recipe=paper", "model=dinat_t", *typed]))
    assert {key: cfg[key] for key in others} == others
    assert not [key for key in others if others[key] == recipe[key]]


def refused(key, value):
    try:
        check_range(key, value)
    except ConfigError:
        return True
    return False


def test_dense_tables_say_what_was_published():
    """The figures beside a recipe are those of the tables of releases, of the same model and method."""
    methods = {
        "ade20k_upernet_160k": "UPerNet 160k", "ade20k_semfpn_80k": "Semantic FPN 80k",
        "coco_maskrcnn_1x": "Mask R-CNN 1x", "coco_maskrcnn_3x": "Mask R-CNN 3x", "coco_retinanet_1x": "RetinaNet 1x",
        "coco_retinanet_3x": "RetinaNet 3x", "coco_cascade_maskrcnn_3x": "Cascade Mask R-CNN 3x",
        "coco_cascade_maskrcnn_paper": "Cascade Mask R-CNN, 896 pixels",
        "coco_cascade_maskrcnn_modelgarden": "Cascade Mask R-CNN, 640 pixels",
    }  # fmt: skip
    larger = dict.fromkeys(("maxvit_s", "maxvit_b"), "Cascade Mask R-CNN, 896 pixels, 200 epochs")
    known = [(found.model, found.method, found.metrics) for found in (*RELEASES, *UNRELEASED)]
    for task in TASKS[1:]:
        for phase, table in papers.tables(task).items():
            method = methods[phase.split("/")[1].partition("_ws")[0]]
            assert table["results"].keys() == table["models"].keys()
            for model, metrics in table["results"].items():
                own = larger.get(model, method) if phase.endswith("_modelgarden") else method
                assert (model, own, metrics) in known, (phase, model)


def test_paper_phases():
    assert compose(["recipe=paper"]).train.epochs == 300
    cfg = compose(["recipe=paper", "model=maxvit_l_384"])
    assert (cfg.train.drop_path_rate, cfg.data.crop_mode, cfg.train.epochs) == (0.6, "squash", 30)
    cfg = compose(["recipe=paper", "model=maxvit_l_384", "paper.phase=imagenet21k_to_1k_384"])
    assert (cfg.train.drop_path_rate, cfg.augment.mixup) == (0.5, 0.0)
    assert compose(["recipe=paper", "model=maxvit_t_tv"]).augment.auto_augment == "ta_wide"
    assert compose(["recipe=paper", "model=dinat_l"]).optim.lr == 5e-5  # of the released weights, not those before


def test_command_line_beats_recipe():
    for recipe in ("quick", "paper"):
        given = ["optim.lr=0.123", "train.epochs=7", "augment.mixup=0.3", "data.img_size=96", "optim.betas=[0.8,0.9]"]
        cfg = compose([*given, f"recipe={recipe}"])
        assert (cfg.optim.lr, cfg.train.epochs, cfg.augment.mixup, cfg.data.img_size) == (0.123, 7, 0.3, 96)
        assert cfg.optim.betas == [0.8, 0.9]


def test_another_optimiser_brings_its_rate():
    assert compose(["optim=sgd", "recipe=paper"]).optim.lr == 0.1
    assert compose(["optim=sgd", "optim.lr=0.2"]).optim.lr == 0.2


def test_model_arguments():
    assert compose(["model=maxvit_t", "model.depths=[2,2,5,3]"]).model.depths == [2, 2, 5, 3]
    assert compose(["model=timm", "model.name=resnet50", "+model.act_layer=silu"]).model.act_layer == "silu"
    assert compose(["model=timm", "model.name=resnet50.a1_in1k"]).model.name == "resnet50.a1_in1k"


ERRORS = [
    (["model=maxvit_tt"], "did you mean maxvit_t"),
    (["model=resnet50"], "type model=timm model.name=resnet50"),
    (["model=timm"], "model=timm needs the model's name"),
    (["model=timm", "model.name=resnet5"], "did you mean resnet50"),
    (["data=digit"], "did you mean digits"),
    (["recipe=papr"], "did you mean paper"),
    (["optim=sdg"], "did you mean sgd"),
    (["optim.lrr=1"], "did you mean optim.lr"),
    (["lr=1"], "did you mean optim.lr"),
    (["modle=maxvit_t"], "did you mean model"),
    (["model.depth=[1,1,1,1]"], "did you mean model.depths"),
    (["model.global_pool=max"], "+model.global_pool="),
    (["maxvit_t"], "is not of the form key=value: type, for example, model=maxvit_t"),
    (["train.epochs=many"], "train.epochs=many was read as str: expected a number"),
    (["train.steps=1.5"], "expected a whole number"),
    (["optim.lr=true"], "expected a number"),
    (["hardware.compile=3"], "expected true or false"),
    (["hardware.sync_bn=no"], "hardware.sync_bn=no was read as str: expected true or false"),
    (["task=segment", "task.flip=no"], "task.flip=no was read as str: expected true or false"),
    (["task=segment", "task.jitter=2"], "expected a list, task.jitter=[a,b]"),
    (["optim.opt=3"], "'optim.opt=\"3\"'"),
    (["augment.hflip=true"], "augment.hflip=true was read as bool: expected a number"),
    (["data.batch_size=null"], "data.batch_size=null: expected a whole number"),
    (["optim.no_decay=[1]"], "optim.no_decay=[1] was read as list: expected a list of strings"),
    (["model.checkpoint="], "model.checkpoint= is empty: give a name, or leave it out"),
    (["teacher.kind=soft", "teacher.name=resnet5"], "teacher.name=resnet5 is not a model of this zoo or of timm (did"),
    (["'model.checkpoint=a b.pth'"], "quotes around key and value: type 'model.checkpoint=a b.pth', and no others"),
    (["my key=1"], "my key=1 is not of the form key=value: type, for example,"),
    (["model.checkpoint={a:1}"], "model.checkpoint={a:1} was read as dict: expected a string"),
    (["hardware.timeout=1e14"], "hardware.timeout=100000000000000.0: expected a number in (0, 2000000]"),
    (["data.img_size=big"], "expected a whole number or [height,width]"),
    (["augment.scale=0.5"], "expected a list, augment.scale=[a,b]"),
    (["hardware.amp=bf16"], "did you mean bfloat16"),
    (["sched.sched=cosin"], "did you mean cosine"),
    (["model.weights=emma"], "did you mean ema"),
    (["recipe=paper", "model=davit_h"], "no published recipe for davit_h, task=classify (named in the paper"),
    (["recipe=paper", "model=timm", "model.name=resnet50"], "no published recipe for resnet50"),
    (["recipe=paper", "task=segment"], "no published recipe for maxvit_t, task=segment: expected one of biformer_b"),
    (["task=segment", "task.inference=slid"], "did you mean slide"),
    (["task=detect", "task.inference=slide"], "unknown key 'task.inference'"),
    (["recipe=paper", "paper.phase=imagenet22k"], "paper.phase=imagenet22k is not published for maxvit_t"),
    (["+optim.lr=3"], "optim.lr=3"),
    (["+train.epoch=1"], "nothing reads train.epoch (did you mean train.epochs"),
    (["++data.batchsize=8"], "nothing reads data.batchsize (did you mean data.batch_size"),
    (
        ["task=segment", "data.eval_img_size=96"],
        "task=segment has no data.eval_img_size: leave it out; data.short_side=",
    ),
    (["~nothing"], "'nothing' does not exist"),
    (["~augment"], "~augment would leave out augment, which is read: set its keys, augment.<key>="),
    (["augment=null"], "augment=null would leave out augment, which is read: set its keys, augment.<key>="),
    (["~data"], "~data would leave out data, which is read: choose another option, data=<option>"),
    (["~train.ema"], "~train.ema would leave out train.ema, which is read: give it another value, such as null"),
    (["~data.batch_size=32"], "~data.batch_size=32 would leave out data.batch_size, which is read"),
    (["recipe=null"], "recipe=null is not an option of recipe: expected a2, a3, deit3, distill, finetune, linear_"),
    (["model=[maxvit_t,nat_m]"], "lists; for one run each add -m and leave out the brackets"),
    (["logger=[wandb,null]"], "logger=[wandb,null] is not an option of logger: expected jsonl, tensorboard, wandb"),
    (["hydra/launcher=null"], "hydra/launcher=null is not an option of hydra/launcher"),
    (["task.name=segments"], "task.name=segments is no task: choose one, task=classify or task=detect or task=segment"),
    (["name=1e3"], "'name=\"1e3\"'"),
    (["resume=true"], "'resume=\"true\"'"),
    (["seed=0,1"], "for one run each: add -m"),
]


@pytest.mark.parametrize("overrides, said", ERRORS, ids=[" ".join(overrides) for overrides, _ in ERRORS])
def test_errors_say_what_to_type(overrides, said):
    with pytest.raises(ConfigError) as error:
        compose(overrides)
    assert said in str(error.value)


def test_weights_that_are_not_named():
    """As from a shell variable that is not set: random weights were evaluated."""
    for typed in ("checkpoint=", "checkpoint=[]"):
        with pytest.raises(ConfigError, match="checkpoint= is empty: give a name, or leave it out"):
            compose(["model=davit_t", typed], name="eval")


def test_files_that_ours_hide_are_refused(tmp_path):
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "mine.yaml").write_text("# @package _global_\ntrain: {steps: 3}\n")
    (tmp_path / "recipe" / "a2.yaml").write_text((CONF / "recipe" / "a2.yaml").read_text())
    checks.check_shadowed([str(tmp_path)])
    (tmp_path / "recipe" / "a2.yaml").write_text("# @package _global_\ntrain: {steps: 3}\n")
    with pytest.raises(ConfigError, match=r"a2.yaml would not be read, .*rename it, and pass recipe=<its new name>"):
        checks.check_shadowed([str(tmp_path)])


@pytest.mark.parametrize("name", ["my file (1).pth", "a,b.pth", "epoch=3.pth", "[best].pth", "1e3"])
def test_refused_names_are_shown_quoted(name):
    with pytest.raises(ConfigError) as error:
        compose([f"model.checkpoint={name}"])
    # the message holds the very words to type: a shell would hand them over as below
    typed = shlex.quote(quote("model.checkpoint", name))
    assert typed in str(error.value)
    assert compose(shlex.split(typed)).model.checkpoint == name


def test_keys_of_ones_own_serve_others():
    assert compose(["+side=48", "data.img_size=${side}", "++train.steps=3"]).data.img_size == 48


def test_names_that_no_message_can_guess():
    """Hydra reads these without complaint as something else; quoted they arrive."""
    for name in ("null", " leading", "trailing "):
        assert compose([quote("model.checkpoint", name)]).model.checkpoint == name


def test_help_lists_everything():
    text = help_text("train")
    for group in ("model", *GROUPS):
        for option in contents.options(group):
            assert option in text, f"{group}={option}"
    assert len(next(line for line in text.splitlines() if line.startswith("  maxvit ")).split()) == 1 + sum(
        name.startswith("maxvit") for name in zoo.variants()
    )
    assert "recipe=" not in help_text("eval")
    for name, models in (("train", len(zoo.variants()) + 1), ("eval", len(zoo.variants()) + 2)):  # timm, auto
        with pytest.raises(ConfigError, match=f"unknown model 'vit' .*: expected one of the {models} that .* lists"):
            compose(["model=vit"], name=name)


def test_help_begins_with_commands_that_compose():
    for name, key in (("train", "resume=auto"), ("eval", "run=runs/")):
        head = help_text(name).partition("\nmodel=\n")[0].splitlines()
        typed = [
            re.split(r"  +", line.strip())[0].split()[2:] for line in head if line.startswith(f"    python {name}")
        ]
        assert len(typed) > 3 and any(key in " ".join(words) for words in typed)
        for words in typed[1:]:  # the first says what can be given
            compose([word.replace("<name>", "first").replace("=...", "=folder") for word in words], name)


def test_help_names_keys_of_its_own_command():
    for name, words in (("train", []), ("eval", ["run=runs/first"])):
        keys = re.search(r"as key=value \((.*?)\)", help_text(name))[1].split()
        several = re.search(r"Several runs: -m (\S+)\.", help_text(name))[1]
        compose([*words, *keys], name)
        compose([*words, several.partition(",")[0]], name)


def test_help_breaks_off_no_sentence():
    for file in CONF.glob("*/*.yaml"):
        first = next(line for line in file.read_text().splitlines() if line.startswith("# ") and "# @" not in line)
        assert first.endswith((".", ":")), file


def test_every_key_is_documented():
    """Each key of the base files has its meaning in a trailing comment."""
    for name in ("common.yaml", "train.yaml", "eval.yaml"):
        lines = (CONF / name).read_text().split("\nhydra:")[0].splitlines()
        keys = [line for line in lines if ": " in line and not line.lstrip().startswith(("#", "-"))]
        assert len(keys) > 5
        assert [line for line in keys if "  # " not in line] == []


def test_every_option_file_says_what_it_is():
    for file in CONF.glob("*/*.yaml"):
        first = next(line for line in file.read_text().splitlines() if not line.startswith("# @"))
        assert first.startswith("# "), file


@main("train")
def script(cfg):
    """What train.py is here: it only says what it was given."""
    print("run", cfg.seed, cfg.optim.lr, given())
    if cfg.seed == 5:
        raise ConfigError("seed 5 is wrong")
    if cfg.seed == 6:
        raise OverflowError("seed 6 is too large")
    if cfg.seed == 7:
        sys.exit(130)  # as after Ctrl-C


def command(folder, *arguments):
    """Run the script in a process of its own, in an empty folder: exit status, output, errors, files left there."""
    work = folder / "work"
    work.mkdir()

    def child():
        os.chdir(work)
        sys.argv[:] = ["train.py", *arguments]
        with open(folder / "out", "w") as sys.stdout, open(folder / "err", "w") as sys.stderr:
            script()

    process = multiprocessing.get_context("fork").Process(target=child)  # without importing everything once more
    process.start()
    process.join(60)
    return process.exitcode, (folder / "out").read_text(), (folder / "err").read_text(), list(work.iterdir())


def test_command_writes_nothing(tmp_path):
    said = command(tmp_path, "optim.lr=0.5")
    assert said == (0, "run 0 0.5 ['optim.lr=0.5']\n", "", [])


def test_sweep(tmp_path):
    code, out, err, files = command(tmp_path, "-m", "seed=0,1", "optim.lr=0.5,0.6")
    assert (code, err, files) == (0, "", [])
    assert out.splitlines() == [
        f"run {seed} {lr} ['seed={seed}', 'optim.lr={lr}']" for seed in (0, 1) for lr in (0.5, 0.6)
    ]


def test_every_run_of_a_sweep_that_fails_is_reported(tmp_path):
    code, out, err, _ = command(tmp_path, "-m", "seed=0,5,1,6")
    assert code == 2 and [line.split()[1] for line in out.splitlines()] == ["0", "5", "1", "6"]
    assert "error in run 1 (seed=5): seed 5 is wrong\n" in err
    assert "error in run 3 (seed=6): Traceback" in err and "OverflowError: seed 6 is too large\n" in err
    assert err.count("seed 5 is wrong") == 1 and err.endswith("error: 2 of 4 runs failed, see above: 1, 3\n")


def test_a_sweep_that_is_stopped_names_the_run(tmp_path):
    code, out, err, _ = command(tmp_path, "-m", "seed=5,7,0")
    assert code == 130 and err.endswith("error: 1 of 2 runs failed, see above: 0\n")
    assert out.endswith("the sweep was stopped in run 1; any later runs were not started\n")


def test_a_search_without_a_best_run(monkeypatch, capsys):
    """Optuna's error says less than how many failed; what else fails after a sweep is not hidden."""
    monkeypatch.setattr(config, "_RUNS", {0: ConfigError("a"), 1: ConfigError("b")})
    with pytest.raises(SystemExit), config._summed():
        raise ValueError("No trials are completed yet.")
    assert capsys.readouterr().err == "error: 2 of 2 runs failed, see above: 0, 1\n"
    monkeypatch.setattr(config, "_RUNS", {0: ConfigError("a"), 1: None})
    with pytest.raises(ValueError, match="something else"), config._summed():
        raise ValueError("something else")


@pytest.mark.parametrize("option, extra", PLUGINS.items())
def test_plugins_that_are_missing(option, extra):
    """What brings them is named with the versions that work together; those of a plugin alone do not."""
    error = MissingConfigException(f"Could not load '{option}'.", option, ["basic"])
    said = f'{option} needs the packages of the extra `{extra}`: run pip install -e ".[{extra}]" in the repository'
    assert explain(error, [], "train").startswith(said)


@pytest.mark.parametrize("name", ["train", "eval"])
def test_ctrl_c_during_the_imports(name, monkeypatch):
    class Slow(ModuleType):
        def __getattr__(self, key):
            raise KeyboardInterrupt if key == "main" else AttributeError(key)

    monkeypatch.setattr(sys, "argv", [f"{name}.py"])
    monkeypatch.setitem(sys.modules, f"recipes.{name}", Slow(f"recipes.{name}"))
    with pytest.raises((SystemExit, KeyboardInterrupt)) as end:  # which would end the tests
        runpy.run_path(str(ROOT / f"{name}.py"))
    assert isinstance(end.value, SystemExit) and end.value.code == 130


def test_help_is_printed(tmp_path):
    code, out, err, files = command(tmp_path, "--help")
    assert (code, err, files) == (0, "", []) and out == help_text("train") + "\n"


WRONG = [
    (["optim.lrr=1"], "did you mean optim.lr"),
    (["optim.=1"], "optim. is not a key"),
    (["recipe/by_task=foo"], "unknown recipe/by_task 'foo'"),
    (["name=${seed}"], "expected a string, as ${...} gives with text around it: 'name=text-${seed}'"),
    (["seed=5"], "seed 5 is wrong"),
    (["hydra/launcher=basic"], "hydra/launcher=basic has an effect only in a sweep: add -m, or leave it out"),
    (["hydra.sweep.dir=a"], "hydra.sweep.dir=a has an effect only in a sweep"),
    (["recipe=paper", "model=davit_h"], "no published recipe"),
    (["name=my run (1)"], "'name=\"my run (1)\"'"),
    (["--config-dir=../own", "recipe=broken"], "recipe/broken.yaml"),
    (["-m", "seed=0,1", "model=maxvit_tt"], "did you mean maxvit_t"),
]


@pytest.mark.parametrize("arguments, said", WRONG, ids=[" ".join(arguments) for arguments, _ in WRONG])
def test_command_errors(tmp_path, arguments, said):
    (tmp_path / "own" / "recipe").mkdir(parents=True)
    (tmp_path / "own" / "recipe" / "broken.yaml").write_text("train: [\n")
    code, _, err, files = command(tmp_path, *arguments)
    assert code == 2 and files == []
    assert said in err and len(err.splitlines()) == 1
