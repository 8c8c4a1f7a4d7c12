"""What the optimiser does under recipe=paper, against the published schedules in closed form, written out here."""

import csv
import json
import math
import os
import re
import subprocess
import sys

import pytest
from omegaconf import OmegaConf

import facts
from children import PATIENCE, ROOT, SMALL, train_here
from recipes import console, optim, plan, schedule
from recipes.config import ConfigError, compose

FACTS = facts.classification()
FAST = [
    ("maxvit_t", "imagenet1k"), ("maxvit_s_384", "imagenet1k_finetune_384"), ("maxvit_b", "imagenet21k"),
    ("maxvit_xl_512", "imagenet21k_to_1k_512"), ("maxvit_t_tv", "torchvision"), ("nat_s", "imagenet1k"),
    ("nat_iso_b", "imagenet1k"), ("dinat_t", "imagenet1k"), ("dinats_b", "imagenet1k"), ("vitrpb_s", "imagenet1k"),
    ("dinat_l", "imagenet22k_to_1k_224"), ("dinats_l_384", "imagenet1k_finetune_384"), ("biformer_s", "imagenet1k"),
    ("biformer_stl", "imagenet1k"), ("litv2_s", "imagenet1k"), ("litv2_b", "imagenet1k_finetune_384"),
    ("gcvit_s", "imagenet1k"), ("gcvit_l_384", "imagenet1k_finetune_384"), ("davit_t", "imagenet1k"),
    ("sgformer_s", "imagenet1k"), ("stvit_b", "imagenet1k"), ("stvit_b", "imagenet1k_finetune_384"),
]  # fmt: skip
PUBLISHED = [case for case, fact in FACTS.items() if fact["lr"] is not None]
CASES = [case if case in FAST else pytest.param(*case, marks=pytest.mark.slow) for case in PUBLISHED]
IMAGES = 1_281_167
BLOCK = re.compile(r"stages\.\d+\.blocks\.\d+(?:\.(?:window|channel))?")  # DaViT's layers hold two


@pytest.fixture(scope="module")
def report():
    """What `python -m recipes.schedule` says of a case, made once."""
    made = {}

    def make(model, phase):
        if (model, phase) not in made:
            cfg = compose(["recipe=paper", f"model={model}", f"paper.phase={phase}", "data=imagenet"])
            made[model, phase] = schedule.describe(cfg, IMAGES)
        return made[model, phase]

    return make


def closed_form(fact, step, per_epoch, scale):
    """The published rate of a step, of parameters that learn at `scale` times the peak."""
    images = fact["batch_size"]

    def absolute(value, rule):
        return value * images / 512 if rule == "linear/512" else value

    peak, words = scale * absolute(fact["lr"], fact["lr_rule"]), fact["schedule"]
    if words.startswith("constant"):
        return peak
    floor = absolute(fact["min_lr"], fact["min_lr_rule"])
    warmup, epoch = fact["warmup"], step // per_epoch
    begin = absolute(warmup.get("from", 0.0), warmup.get("from_rule"))
    if "per epoch" in words:
        return timm_cosine(epoch, fact["epochs"], warmup["epochs"], begin, peak, floor)
    if "per iteration" in words:
        return timm_cosine(step, fact["epochs"] * per_epoch, warmup["epochs"] * per_epoch, begin, peak, floor)
    if fact["epochs"] == 400:  # torchvision's script: epochs, from a hundredth of the peak, its default
        return after_warmup(epoch, 400, warmup["epochs"], peak / 100, peak, floor, cosine)
    steps = warmup["iters"] if "iters" in warmup else warmup["epochs"] * per_epoch
    shape = {"cosine": cosine, "linear": lambda share: 1 - share}[words]
    return after_warmup(step, fact["epochs"] * per_epoch, steps, begin, peak, floor, shape)


def cosine(share):
    return (1 + math.cos(math.pi * share)) / 2


def timm_cosine(t, length, warmup, begin, peak, floor):
    """timm's CosineLRScheduler without a prefix: the warm-up replaces the cosine's first part; the floor follows."""
    if t < warmup:
        return begin + t * (peak - begin) / warmup
    return floor + (peak - floor) * cosine(t / length) if t < length else floor


def after_warmup(t, length, warmup, begin, peak, floor, shape):
    if t < warmup:
        return begin + t * (peak - begin) / warmup
    return floor + (peak - floor) * shape((t - warmup) / (length - warmup))


def telling(steps, per_epoch):
    """Steps to look at: the ends of epochs, what lies around them, and many between."""
    around = {start + i for start in range(0, steps, per_epoch) for i in (-1, 0, 1)}
    return sorted(step for step in around | set(range(0, steps, 197)) if 0 <= step < steps)


@pytest.mark.parametrize("model, phase", CASES)
def test_learning_rate_of_every_step(model, phase, report):
    fact, made = FACTS[model, phase], report(model, phase)
    per_epoch = IMAGES // made.plan.batch
    epochs = fact.get("epochs_run", fact["epochs"])
    assert made.plan.batch == (fact["batch_size"] or made.plan.batch)
    assert (made.plan.per_epoch, made.plan.steps) == (per_epoch, epochs * per_epoch)
    assert made.scales == [1.0, *fact.get("multi_lr", {}).values()]
    for step in telling(made.plan.steps, per_epoch):
        expected = [closed_form(fact, step, per_epoch, scale) for scale in made.scales]
        assert made.rates(step) == pytest.approx(expected, rel=1e-9), step


def published_decay(fact, name, shape):
    """The weight decay that a parameter had in its authors' code, where some had other shapes and names."""
    rule, table = fact["no_decay"], name.endswith("rpb")
    if "regex" in rule:  # TensorFlow's names: each vector is a bias, gamma or beta, a table relative_bias
        return 0 if len(shape) <= 1 or table else fact["weight_decay"]
    vector = len(shape) <= 1 and not (
        name.startswith("stages") and name.endswith("gamma") and "STViT" in fact["source"]
    )
    spared = (rule["ndim_le_1"] and vector) or (rule["bias"] and name.endswith(".bias"))
    return 0 if spared or (rule["substrings"] and table) else fact["weight_decay"]


@pytest.mark.parametrize("model, phase", CASES)
def test_weight_decay_and_factor_of_every_parameter(model, phase, report):
    fact, made = FACTS[model, phase], report(model, phase)
    if fact["weight_decay"] is None:  # chosen
        fact = {**fact, "weight_decay": made.cfg.optim.weight_decay}
    assert len(made.parameters) > 50
    for p in made.parameters:
        assert p.weight_decay == published_decay(fact, p.name, p.shape), p.name
        slow = "multi_lr" in fact and p.name.endswith(".offset.weight")
        assert p.lr_scale == (fact["multi_lr"]["conv_offset.weight"] if slow else 1.0), p.name


def test_tables_and_factors_that_are_no_vectors_are_there(report):
    """So that the rules about them are tested: decayed tables, spared ones, and STViT's factors."""
    decays = {
        (case[0], end): {p.weight_decay for p in report(*case).parameters if p.name.endswith(end)}
        for case, end in [
            (("nat_s", "imagenet1k"), "rpb"), (("nat_s", "imagenet1k"), "gamma"), (("gcvit_s", "imagenet1k"), "rpb"),
            (("maxvit_t", "imagenet1k"), "rpb"), (("maxvit_t_tv", "torchvision"), "rpb"),
            (("maxvit_t_tv", "torchvision"), "bias"), (("stvit_b", "imagenet1k"), "gamma"),
            (("sgformer_s", "imagenet1k"), "position.table"),
        ]
    }  # fmt: skip
    spared, whole = {0.0}, {0.05}
    assert list(decays.values()) == [whole, spared, whole, spared, spared, whole, whole, whole]


@pytest.mark.parametrize("model, phase", CASES)
def test_drop_path_of_every_block(model, phase, report):
    """A straight line over all blocks from 0 to the rate, in each branch of a block its value.

    The authors' MaxViT ends a block's share before the rate.
    """
    fact, made = FACTS[model, phase], report(model, phase)
    rate = made.cfg.train.drop_path_rate if fact["drop_path"] is None else fact["drop_path"]
    blocks = {}
    for name, drop in made.drop_path.items():
        blocks.setdefault(BLOCK.match(name)[0], []).append(round(drop, 12))
    depths = made.cfg.model.get("depths", [12])  # the isotropic models do not list them
    count = sum(depths) * (2 if model.startswith("davit") else 1)
    last = count if model.startswith("maxvit") and model != "maxvit_t_tv" else count - 1
    branches = [5 if model.startswith("maxvit") else 2] * count  # a convolution, two attentions, two MLPs
    if model.startswith("litv2"):  # no attention in two stages
        branches[: sum(depths[:2])] = [1] * sum(depths[:2])
    assert list(blocks.values()) == [[round(rate * block / last, 12)] * n for block, n in enumerate(branches)]


def test_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["schedule", "recipe=paper", "model=litv2_s", "--images", "4100", "train.epochs=2",
                                     "--out", str(tmp_path), "sched.warmup=1"])  # fmt: skip
    schedule.main()
    said = capsys.readouterr().out
    assert said.startswith("data=imagenet with 4100 training images; change it with data= and --images\n")
    assert "8 steps, 4 per epoch, of 1024 images in 8 micro-batches of 128" in said
    assert "lr x 0.01" in said and "stages.1.downsample.offset.weight" in said
    with open(tmp_path / "steps.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == list("00001111")
    assert float(rows[4]["lr"]) == pytest.approx(1e-5 + (1e-3 - 1e-5) / 2) and float(rows[0]["lr"]) == 1e-6
    assert [float(row["lr x 0.01"]) for row in rows[4:]] == pytest.approx([1e-5] * 4)
    record = json.loads((tmp_path / "schedule.json").read_text())
    assert record["plan"]["steps"] == 8 and record["schedule"]["shape"] == "cosine"
    for file, key in (("parameters.csv", "parameters"), ("blocks.csv", "drop_path")):
        assert len((tmp_path / file).read_text().splitlines()) == 1 + len(record[key]) > 20


def test_rates_by_layer_are_those_of_the_run():
    """Shared ends shrink with layer decay, but not with the factor of LITv2's offsets."""
    given = ["recipe=paper", "model=litv2_s", "data=imagenet", "train.epochs=30", "optim.layer_decay=0.5"]
    made = schedule.describe(compose(given), 4100)
    last = made.rates(made.plan.steps - 1)
    assert len(last) == len(made.scales) > 8
    floors = {p.lr_scale: p.ends_scale * 1e-5 for p in made.parameters}
    assert last == pytest.approx([floors[scale] for scale in made.scales], rel=0.02)
    assert {round(p.ends_scale / p.lr_scale, 9) for p in made.parameters} == {1.0, 100.0}


@pytest.mark.parametrize("images", ["-5", "0"])
def test_a_run_has_images(capsys, images):
    with pytest.raises(SystemExit, match="2"):
        schedule.parse(["model=nat_m", "--images", images])
    assert f"--images {images}: expected at least 1 training image" in capsys.readouterr().err


def test_the_schedule_of_a_stored_configuration(tmp_path, monkeypatch, capsys):
    OmegaConf.save(compose(["model=nat_m", "train.steps=10", "sched.warmup=0", "optim.lr=0.25"]), tmp_path / "it.yaml")
    monkeypatch.setattr("sys.argv", ["schedule", f"config={tmp_path / 'it.yaml'}", "--out", str(tmp_path / "out")])
    schedule.main()
    rows = list(csv.DictReader((tmp_path / "out" / "steps.csv").open()))
    assert len(rows) == 10 and float(rows[0]["lr"]) == pytest.approx(0.25, rel=0.1)
    assert "digits" in capsys.readouterr().out


def test_a_run_is_named_by_its_configuration(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["schedule", "model=nat_m", "resume=runs/x"])
    with pytest.raises(SystemExit, match="2"):
        schedule.main()
    assert "resume=runs/x would have no effect: for the schedule of a run, give config" in capsys.readouterr().err


def test_a_stored_configuration_in_a_fresh_process(tmp_path):
    """In which nothing has asked for the models yet."""
    OmegaConf.save(compose(["model=nat_m", "train.steps=10", "sched.warmup=0"]), tmp_path / "it.yaml")
    command = [sys.executable, "-m", "recipes.schedule", f"config={tmp_path / 'it.yaml'}"]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=PATIENCE)
    assert done.returncode == 0 and "digits" in done.stdout, done.stderr


def test_what_is_written_needs_a_folder(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr("sys.argv", ["schedule", "model=nat_m", "--images", "640", "--out", str(tmp_path / "file")])
    with pytest.raises(SystemExit, match=f"^could not write to the folder --out {tmp_path}/file: .*File exists"):
        schedule.main()


def test_what_is_asked_for_is_written_though_nobody_reads_on(tmp_path, monkeypatch):
    """As with `| head -1`."""
    read, end = os.pipe()
    os.close(read)
    monkeypatch.setattr(console.CONSOLE, "optional", False)  # as a run in this process may have left it
    monkeypatch.setattr(console.CONSOLE, "quiet", False)  # which a closed pipe changes
    monkeypatch.setattr("sys.argv", ["schedule", "model=nat_m", "--images", "640", "--out", str(tmp_path / "out")])
    monkeypatch.setattr("sys.stdout", open(end, "w"))  # noqa: SIM115
    with pytest.raises(SystemExit):
        schedule.main()
    del console.CONSOLE._buffer[:]  # older versions of rich keep there what they could not write
    assert len(list((tmp_path / "out").iterdir())) == 4


def test_parameters_are_those_of_the_size_of_training():
    given = ["model=timm", "model.name=test_vit", "+model.dynamic_img_size=true", "data.img_size=64"]
    made, larger = (schedule.describe(compose([*given, *more]), 640) for more in ([], ["data.eval_img_size=96"]))
    assert made.parameters == larger.parameters
    assert dict((p.name, p.shape) for p in made.parameters)["pos_embed"][1] == 17


def test_other_data_and_models():
    cfg = compose(["model=timm", "model.name=resnet18", "data=cifar10", "train.drop_path_rate=0.1", "train.epochs=2"])
    made = schedule.describe(cfg, 320)
    assert made.plan.steps == 20 and set(made.drop_path.values()) and "drop path" in made.text()
    assert made.parameters[-2].shape == (10, 512)
    frozen = schedule.describe(compose(["model=maxvit_t", "data=cifar10", "train.freeze=backbone"]), 320)
    assert [p.name for p in frozen.parameters] == ["head.fc.weight", "head.fc.bias"]
    dense = ["task=segment", "data=scenes", "model=timm", "model.name=test_vit", "data.img_size=64"]
    assert schedule.describe(compose(dense), 320).parameters


@pytest.mark.parametrize("kind", ["soft", "hard", "feature"])
def test_a_teacher_is_not_loaded(kind):
    """Only what is trained beside the model is listed, and classes of the data, which are not known, do not matter."""
    given = ["model=nat_m", "data=cifar10"]
    named = [f"teacher.kind={kind}", "teacher.name=test_resnet", "teacher.pretrained=true"]  # 1000 classes
    alone, taught = (schedule.describe(compose(overrides), 320) for overrides in (given, [*given, *named]))
    beside = [("beside.weight", (96, 512, 1, 1)), ("beside.bias", (96,))] if kind == "feature" else []
    assert taught.parameters[: len(alone.parameters)] == alone.parameters
    assert [(p.name, p.shape) for p in taught.parameters[len(alone.parameters) :]] == beside


def test_a_run_learns_at_what_is_written(tmp_path):
    rate = ["per=epoch", "warmup=1", "cooldown=1", "warmup_lr=1e-4", "min_lr=1e-5", "decay_from=start"]
    options = [*SMALL, "data.batch_size=400", "train.epochs=3", "optim.layer_decay=0.7"]
    options += [f"sched.{each}" for each in rate]
    train_here(tmp_path, *options, "name=run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    logged = [line["lr"] for line in lines if "lr" in line]
    made = schedule.describe(compose(options), 1617)
    assert len(logged) == made.plan.steps == 12 and len(set(logged)) == 3
    assert logged == pytest.approx([made.schedule(step) for step in range(12)], rel=1e-3)  # rounded in the log
    assert len(made.scales) > 2


def planned(*overrides):
    return plan.make(compose(["data=imagenet", "data.batch_size=1024", *overrides]), schedule.SizeOnly("set", 5000))


def parts(*overrides):
    made = planned(*overrides)
    return made.micro_batches, made.micro


def test_a_batch_in_parts_is_said(monkeypatch):
    """One device does what the authors' did together, or two half of it each; what is whole needs no word."""
    paper = ["recipe=paper", "model=biformer_t"]
    assert planned(*paper).describe(None, None) == [
        "1024 images per step: 8 micro-batches of 128, one after the other on one process"
    ]
    assert planned().describe(None, None) == planned().describe(None, 1) == []
    assert planned().describe(None, 2)[0] == "1024 images per step: all at once, on one process"
    monkeypatch.setattr(plan.distributed, "size", lambda: 2)
    assert planned(*paper).describe("ddp", None) == [
        "1024 images per step: 8 micro-batches of 128, 4 on each of 2 processes (ddp)"
    ]


def test_weights_that_have_learned_nothing_are_not_evaluated():
    plans = planned("train.steps=10", "train.eval_steps=4")
    assert [step for step in range(11) if plans.evaluates(step)] == [4, 8, 10]


def test_parts_are_no_larger_than_asked():
    assert parts() == (1, 1024)
    assert parts("train.micro_batch=128") == (8, 128)
    assert parts("train.micro_batch=100") == (16, 64)
    assert parts("train.micro_batch=128", "train.accumulate=16") == (16, 64)
    assert parts("train.micro_batch=2000") == (1, 1024)
    assert parts("data.batch_size=900", "train.micro_batch=128") == (9, 100)
    with pytest.raises(ConfigError, match=r"train.micro_batch=0: expected a number in \[1, infinity\)"):
        parts("train.micro_batch=0")


def test_epochs_that_are_no_step():
    for epochs in (0, 0.1):  # of 4 steps
        with pytest.raises(ConfigError, match=rf"^train.epochs={epochs} comes to 0 steps of 1024 images, expected "):
            planned(f"train.epochs={epochs}")


def test_a_constant_rate_cools_down_for_as_many_steps():
    rate = optim.Schedule(100, 1.0, "constant", min_lr=0.1, cooldown=10)
    assert (rate(89), rate(90)) == (1.0, 0.1)
