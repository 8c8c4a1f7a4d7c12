"""The recipes that any model takes: what they say, what they compute, that they run."""

import math
import shlex
from pathlib import Path

import pytest
import timm
import torch
from omegaconf import OmegaConf
from PIL import Image
from timm.models import create_model

import zoo
from children import SMALL, evaluate_here, lines, train_here
from pages import everywhere
from recipes import config, data, distributed, models, optim, papers, plan, schedule
from recipes.config import ConfigError, contents
from recipes.data import imagenet
from recipes.data.build import preprocessing
from recipes.papers.render import render
from recipes.tasks import classify

MODERN = ("a3", "a2", "deit3", "finetune", "linear_probe", "distill")
CONF = Path(config.__file__).parents[1] / "conf" / "recipe"
IMAGENET = ["data=imagenet", "data.root=imagenet"]
# Wightman, Touvron and Jegou 2021, Table 2; Touvron, Cord and Jegou 2022, Table 1; Touvron et al. 2021, Table 9
PUBLISHED = {
    "a2": {
        "train.epochs": 300, "data.img_size": 224, "data.batch_size": 2048, "data.crop_pct": 0.95, "optim.opt": "lamb",
        "optim.lr": 5e-3, "optim.weight_decay": 0.02, "sched.warmup": 5, "train.drop_path_rate": 0.05,
        "augment.repeats": 3, "augment.auto_augment": "rand-m7-mstd0.5-inc1", "augment.mixup": 0.1,
        "augment.cutmix": 1.0, "augment.label_smoothing": 0.0, "task.loss": "binary_cross_entropy",
    },
    "a3": {
        "train.epochs": 100, "data.img_size": 160, "data.eval_img_size": 224, "data.batch_size": 2048,
        "data.crop_pct": 0.95, "optim.opt": "lamb", "optim.lr": 8e-3, "optim.weight_decay": 0.02, "sched.warmup": 5,
        "train.drop_path_rate": 0.0, "augment.repeats": 1, "augment.auto_augment": "rand-m6-mstd0.5-inc1",
        "augment.mixup": 0.1, "augment.cutmix": 1.0, "augment.label_smoothing": 0.0,
        "task.loss": "binary_cross_entropy",
    },
    "deit3": {
        "train.epochs": 400, "data.batch_size": 2048, "data.crop_pct": 1.0, "optim.opt": "lamb", "optim.lr": 3e-3,
        "optim.weight_decay": 0.02, "sched.warmup": 5, "augment.repeats": 3, "augment.auto_augment": "3a",
        "augment.color_jitter": 0.3, "augment.mixup": 0.8, "augment.cutmix": 1.0, "augment.label_smoothing": 0.0,
        "task.loss": "binary_cross_entropy",
    },
    "distill": {
        "train.epochs": 300, "data.batch_size": 1024, "optim.opt": "adamw", "optim.lr": 5e-4,
        "optim.lr_base_batch": 512, "optim.weight_decay": 0.05, "augment.repeats": 3, "augment.mixup": 0.8,
        "augment.cutmix": 1.0, "augment.re_prob": 0.25, "augment.label_smoothing": 0.1,
        "train.drop_path_rate": 0.1, "teacher.kind": "hard",
    },
}  # fmt: skip


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_recipes_say_what_their_papers_say(recipe):
    cfg = contents.flat(config.compose([f"recipe={recipe}", *IMAGENET]))
    assert {key: cfg[key] for key in PUBLISHED[recipe]} == PUBLISHED[recipe]


@pytest.mark.parametrize("recipe", MODERN)
def test_recipes_go_with_every_model(recipe):
    """A recipe sets nothing of a model, and leaves every choice of group to the command line."""
    own = contents.flat(OmegaConf.load(CONF / f"{recipe}.yaml"))
    assert not [key for key in own if key.startswith(("model.", "hardware.", "logger."))]
    for model in (["model=davit_t"], ["model=timm", "model.name=resnet50"]):
        flat = contents.flat(config.compose([f"recipe={recipe}", *model, *IMAGENET, "optim.lr=0.123"]))
        assert {key: flat[key] for key in own if key != "optim.lr"} == {k: own[k] for k in own if k != "optim.lr"}
        assert flat["optim.lr"] == 0.123
    assert config.compose([f"recipe={recipe}", "optim=sgd"]).optim.lr == 0.1


@pytest.mark.parametrize("recipe", MODERN)
def test_headers_say_command_hardware_and_what_to_expect(recipe):
    header = [line for line in (CONF / f"{recipe}.yaml").read_text().splitlines() if line.startswith("# ")]
    text = "\n".join(header)
    assert f"train.py recipe={recipe} " in text and "# Hardware: " in text and "o expect: " in text
    assert "https://arxiv.org/abs/" in text


CLASSIFIES = {"a2", "a3", "deit3", "distill"}  # set keys that no other task has


@pytest.mark.parametrize("task", ["classify", "segment", "detect"])
@pytest.mark.parametrize("recipe", contents.options("recipe"))
def test_every_recipe_is_accepted_where_it_is_for(recipe, task):
    overrides = [f"recipe={recipe}", f"task={task}", "model=davit_t"]
    if recipe in CLASSIFIES and task != "classify":
        with pytest.raises(ConfigError, match=f"task={task} has no "):
            config.compose(overrides)
    else:
        config.compose(overrides)


CUT = ("train.accumulate=", "train.micro_batch=")
HEADERS = [line for file in sorted(CONF.rglob("*.yaml")) for line in file.read_text().splitlines()]
COMMANDS = [shlex.split(line[2:], comments=True) for line in HEADERS if line.startswith("# torchrun ")]
COMMANDS += [command for block in everywhere("bash") for command in block.commands()]
CUTTING = [command for command in COMMANDS if any(word.startswith(CUT) for word in command)]


@pytest.mark.parametrize("command", CUTTING, ids=" ".join)
def test_what_a_command_cuts_its_batch_by_counts(command, monkeypatch):
    """Else it is taken for what makes the batch fit."""
    processes = int(command[command.index("--nproc-per-node") + 1]) if "--nproc-per-node" in command else 1
    monkeypatch.setattr(distributed, "size", lambda: processes)
    typed = command[command.index("train.py") + 1 :]

    def parts(typed):
        return plan.make(config.compose(typed), schedule.SizeOnly("ImageNet", schedule.IMAGENET)).micro_batches

    assert parts(typed) > parts([word for word in typed if not word.startswith(CUT)])


def test_recipes_of_classification_are_refused_elsewhere():
    for recipe in ("a3", "a2", "deit3", "distill"):
        with pytest.raises(ConfigError, match=r"task=segment has no (task\.loss|teacher\.kind)"):
            config.compose([f"recipe={recipe}", "task=segment"])
    assert config.compose(["recipe=linear_probe", "task=segment"]).train.freeze == "backbone"


def test_binary_cross_entropy_is_a_yes_or_no_about_each_class():
    logits, targets = torch.tensor([[2.0, -1.0, 0.5]]), torch.tensor([[0.7, 0.3, 0.0]])

    def of(*yes):
        said = [-math.log(1 / (1 + math.exp(-x if y else x))) for x, y in zip((2.0, -1.0, 0.5), yes, strict=True)]
        return pytest.approx(sum(said) / 3, rel=1e-5)

    def loss(*overrides):
        task = classify.Task(config.compose(["task.loss=binary_cross_entropy", *overrides]))
        return task.criterion(logits, targets).item()

    assert loss("task.target_threshold=0.2") == of(True, True, False)
    assert loss("task.target_threshold=0.5") == of(True, False, False)
    soft = -(targets * torch.sigmoid(logits).log() + (1 - targets) * torch.sigmoid(-logits).log()).mean()
    assert loss() == pytest.approx(soft.item(), rel=1e-5)
    assert config.compose([]).task.loss == "cross_entropy"


def test_smoothing_does_not_make_every_class_right():
    """DeiT III counts every share above 0 in full, and smoothed targets have one of every class."""
    given = [*SMALL, "model.name=test_resnet", "task.loss=binary_cross_entropy", "task.target_threshold=0.0"]
    with pytest.raises(ConfigError, match=r"target_threshold=0.0 with .*smoothing=0.05: all 10 classes"):
        classify.Task(config.compose(given)).build_data()
    classify.Task(config.compose([*given, "augment.label_smoothing=0"])).build_data()
    classify.Task(config.compose([*given[:-1], "task.target_threshold=0.01"])).build_data()


def test_three_augmentations():
    """Grey, solarised or blurred, one of them always, and colours, which timm leaves out beside other policies."""
    cfg = config.compose(["recipe=deit3", "data=digits", "data.img_size=32"])
    built = data.build(cfg)
    *_, policy, jitter = built.train.transform.transforms[-2].transforms
    names = {op.aug_fn.__name__ for (op,) in policy.policy}
    assert names == {"solarize", "desaturate", "gaussian_blur_rand"}
    assert type(jitter).__name__ == "ColorJitter" and jitter.brightness == pytest.approx([0.7, 1.3])


def test_a_model_may_be_measured_at_another_size(tmp_path):
    options = [*SMALL, "data.eval_img_size=48", "train.steps=2", "data.workers=0"]
    cfg = config.compose(options)
    built = data.build(cfg)
    assert built.train.sample(0, 0)[0].shape == (3, 32, 32) and built.val.sample(0, 0)[0].shape == (3, 48, 48)
    assert built.img_size == 32 and preprocessing(cfg).size == (48, 48)
    train_here(tmp_path, *options, "name=run")
    trained = [line for line in lines(tmp_path / "run") if "val_loss" in line][-1]
    evaluate_here(f"run={tmp_path / 'run'}", f"out={tmp_path}")
    found = OmegaConf.load(tmp_path / "eval.json")
    assert found.loss == trained["val_loss"] and found.img_size == [48, 48]
    assert "48 x 48 pixels" in (tmp_path / "run" / "README.md").read_text()


def test_a_model_of_one_size_is_refused_before_it_trains():
    name = "vit_tiny_patch16_224"

    def build(*overrides):
        task = classify.Task(config.compose([*SMALL, f"model.name={name}", "data.eval_img_size=48", *overrides]))
        return task.build_model(task.build_data())

    with pytest.raises(
        ConfigError, match=r"data\.eval_img_size=48: vit_tiny_patch16_224 only takes images of the size"
    ):
        build()
    assert build("+model.dynamic_img_size=true").training


@pytest.mark.parametrize(
    ("name", "typed", "said"),
    [
        ("test_vit", ["data.img_size=40"], r"40 x 40 pixels \(.*\): set data\.img_size= to a size that it takes$"),
        ("test_vit", ["data.img_size=40", "data.eval_img_size=48"], "40 x 40 pixels"),
        ("vit_tiny_patch16_224", ["model.img_size=48"], r"32 x 32 pixels .*, or leave out model\.img_size=$"),
        ("test_convnext", ["data.img_size=[16,32]"], "16 x 32 pixels"),
    ],
)
def test_a_model_that_does_not_take_the_size_is_refused(tmp_path, name, typed, said):
    """Before there is a run folder."""
    with pytest.raises(ConfigError, match=f"^model.name={name} does not take images of {said}"):
        train_here(tmp_path, *SMALL, f"model.name={name}", *typed, "name=run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("typed", [["img_size=40"], ["data.eval_img_size=40"]])
def test_a_model_that_does_not_take_the_size_is_not_measured(tmp_path, typed):
    with pytest.raises(ConfigError, match=r"does not take images of 40 x 40 pixels|only takes images of the size"):
        evaluate_here("model=timm", "model.name=test_vit", "data=digits", *typed, f"out={tmp_path}")


def test_a_model_that_cannot_be_built_for_the_size():
    """As timm asserts where it builds one."""
    with pytest.raises(ConfigError, match=r"xcit_nano_12_p8_224 could not be built with .*'img_size': 41"):
        models.build(timm.create_model, "xcit_nano_12_p8_224", {}, {"img_size": 41})


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("cspresnet50d", {"pretrained": True}, "No pretrained weights exist for cspresnet50d"),
        ("resnet18", {"act_layer": "typo"}, "'typo'$"),
        ("resnet18", {"output_stride": 5}, "AssertionError$"),  # which says nothing
    ],
)
def test_what_timm_cannot_build(name, options, said):
    with pytest.raises(ConfigError, match=rf"^{name} could not be built with {{.*}}: {said}"):
        models.build(timm.create_model, name, options, {})


@pytest.mark.parametrize(
    ("name", "refused"), [("hrnet_w18_small", ["img_size", "drop_path_rate"]), ("poolformer_s12", ["img_size"])]
)
def test_a_model_is_built_with_what_it_takes(name, refused, capsys):
    """And without what its builder did not ask for; what was asked for is needed."""
    wishes = {"img_size": 64, "drop_path_rate": 0.1}
    with torch.device("meta"):
        model = models.build(timm.create_model, name, {"num_classes": 10}, wishes)
        assert capsys.readouterr().out == "".join(f"{name} takes no {key}; it is built without it\n" for key in refused)
        kept = {key: value for key, value in wishes.items() if key not in refused}
        assert model.created_with == {"model_name": name, "num_classes": 10, **kept}
        with pytest.raises(ConfigError, match=rf"{name} could not be built with .*argument\(s\): \['img_size'\]"):
            models.build(timm.create_model, name, {"img_size": 64}, {"drop_path_rate": 0.1})


def test_windows_are_those_of_the_size_that_is_learned():
    cfg = config.compose(["model=gcvit_xxt", "data.img_size=160", "data.eval_img_size=224"])
    task = classify.Task(cfg)
    model = task.build_model(task.build_data()).eval()
    same = timm.create_model("gcvit_xxt", num_classes=10, img_size=160)
    assert {k: t.shape for k, t in model.state_dict().items()} == {k: t.shape for k, t in same.state_dict().items()}
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 224, 224)).shape == (1, 10)


def test_the_optimiser_of_a_recipe():
    cfg = config.compose(["recipe=a3", "data.batch_size=1024"])
    optimizer = optim.create(cfg, create_model("nat_m", device="meta"))
    assert type(optimizer).__name__ == "Lamb" and optim.base_lr(cfg) == pytest.approx(4e-3)
    assert config.compose(["recipe=a3", "optim=lamb"]).optim.lr == 5e-3  # typed: it brings its own numbers
    assert config.compose(["recipe=a3", "optim=adamw"]).optim.opt == "adamw"


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    train_here(out, *SMALL, "train.steps=4", "data.workers=0", "name=first")
    return out / "first"


OWN = {
    "finetune": ["model.checkpoint={first}"],
    "linear_probe": ["model.checkpoint={first}"],
    "distill": ["teacher.checkpoint={first}"],
}


@pytest.mark.parametrize("recipe", MODERN)
def test_recipes_run(first, tmp_path, recipe):
    own = [text.format(first=first) for text in OWN.get(recipe, [])]
    small = ["data.batch_size=32", "data.eval_batch_size=128", "train.steps=3", "data.workers=0"]
    size = ["data.img_size=32", "data.eval_img_size=40"]
    train_here(tmp_path, *SMALL, f"recipe={recipe}", *own, *size, *small, "name=run")
    losses = [line["loss"] for line in lines(tmp_path / "run") if "loss" in line]
    assert len(losses) == 3 and all(map(math.isfinite, losses))
    assert losses[0] < 1 if recipe in ("a3", "a2", "deit3") else losses[0] > 1  # log 2 of a class, or log 10


def test_nothing_is_published_for_a_task_of_ones_own():
    said = "no published recipe for nat_m, task=number: none is for this task, choose another recipe="
    with pytest.raises(ConfigError, match=said):
        papers.recipe("nat_m", None, "number")


def test_what_has_no_recipe_is_on_the_page():
    """With its reason, and nothing of it has a table."""
    page = render()
    for task in ("classify", "segment", "detect"):
        assert papers.left_out(task)
        assert all(f"- {what}: {why}." in page for what, why in papers.left_out(task).items())
    assert not papers.left_out("number")


def test_every_phase_of_maxvit_says_how_fast_its_statistics_move():
    """No key of the configuration does."""
    for task in ("classify", "detect"):
        for phase, table in papers.tables(task).items():
            if phase.startswith("maxvit/"):
                assert any("+model.bn_momentum=0." in line for line in table["differs"]), phase


@pytest.fixture(scope="module")
def imagenet_look_alike(tmp_path_factory):
    """A thousand folders by synset with two training images of 32 pixels each; of every tenth class one to measure."""
    root = tmp_path_factory.mktemp("imagenet")
    for number, synset in enumerate(imagenet.synsets()):
        for file in [f"train/{synset}/0", f"train/{synset}/1", *([f"val/{synset}/0"] if number % 10 == 0 else [])]:
            path = root / f"{file}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (32, 32), (number % 256, number // 4, 80 * int(file[-1]))).save(path)
    return root


FAMILIES = sorted({phase.split("/")[0] for phase in papers.tables()})


def smallest(family):
    """The model of a family's tables with the fewest parameters, at its smallest size."""
    tables = [table for phase, table in papers.tables().items() if phase.split("/")[0] == family]
    names = {name for table in tables for name in table["models"]}
    assert names <= zoo.variants().keys()
    return min(names, key=lambda name: (sum(p.numel() for p in create_model(name, device="meta").parameters()), name))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_published_recipes_run_on_a_thousand_classes(family, imagenet_look_alike, tmp_path):
    """Twenty steps of recipe=paper, all of it but the size of image and batch, and cooldowns, which have no room."""
    name = smallest(family)
    small = ["data.img_size=64", "data.batch_size=8", "data.eval_batch_size=50", "train.steps=20", "train.log_every=1"]
    given = [
        f"model={name}",
        "recipe=paper",
        "sched.cooldown=0",
        "data=imagenet",
        f"data.root={imagenet_look_alike}",
        "data.workers=0",
    ]
    train_here(tmp_path, *given, *small, "name=run")
    losses = [line["loss"] for line in lines(tmp_path / "run") if "loss" in line]
    measured = [line for line in lines(tmp_path / "run") if "val_top1" in line]
    print(f"{name}: loss {losses[0]:.3f} ... {losses[-1]:.3f}, {measured[-1]}")
    assert len(losses) == 20 and all(map(math.isfinite, losses)) and measured[-1]["step"] == 20
    assert losses[0] == pytest.approx(math.log(1000), abs=1.0)
    cfg = OmegaConf.load(tmp_path / "run" / "config.yaml")
    assert cfg.optim.lr == papers.recipe(name).values["optim.lr"] and cfg.train.steps == 20
