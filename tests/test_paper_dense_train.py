"""Published recipes of dense tasks in use: which is taken, what a model is built with, a few steps on tiny data."""

import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import facts
from children import lines, train_here
from recipes import models
from recipes.config import ConfigError, compose
from recipes.plan import Plan
from recipes.statistics import Statistics
from recipes.tasks import segment
from zoo.heads import detector
from zoo.recognise import layouts_of

# families, or sizes of them, whose dense training is not in the fact base, with the reason
UNPUBLISHED = {
    ("segment", "maxvit_t"): "the authors report no ADE20K",
    ("segment", "gcvit_t"): "neither code nor recipe",
    ("segment", "davit_s"): "the released files are of size T",
    ("segment", "sgformer_s"): "neither code nor recipe",
    ("segment", "stvit_s"): "neither code nor recipe",
    ("detect", "gcvit_s"): "the released files are of size T",
    ("detect", "davit_b"): "the released files are of size T",
    ("detect", "sgformer_s"): "neither code nor recipe",
    ("detect", "stvit_b"): "neither code nor recipe",
}


@pytest.mark.parametrize(("task", "model"), UNPUBLISHED)
def test_what_is_not_published_is_refused(task, model):
    assert (model, task) not in {(model, task) for model, _, task in facts.dense()}
    with pytest.raises(ConfigError, match=f"no published recipe for {model}, task={task}: expected one of .*litv2_s"):
        compose(["recipe=paper", f"task={task}", f"model={model}"])


def test_the_first_phase_is_the_default():
    for task, model, head in (
        ("segment", "biformer_s", "upernet"), ("segment", "litv2_s", "semantic_fpn"),
        ("detect", "davit_t", "mask_rcnn"), ("detect", "dinat_b", "cascade_mask_rcnn"),
        ("detect", "maxvit_t", "cascade_mask_rcnn"),
    ):  # fmt: skip
        assert compose(["recipe=paper", f"task={task}", f"model={model}"]).task.head == head
    short = compose(["recipe=paper", "task=detect", "model=davit_t"])
    assert (short.train.epochs, short.data.batch_size) == (12, 16)
    with pytest.raises(ConfigError, match=r"paper\.phase=coco_maskrcnn_3x is not published for biformer_s"):
        compose(["recipe=paper", "task=detect", "model=biformer_s", "paper.phase=coco_maskrcnn_3x"])


def test_the_command_line_beats_a_dense_recipe():
    given = ["model.n_win=7", "hardware.amp=null", "task.head=fcn", "optim.no_decay=[*rpb]", "train.drop_path_rate=0.0"]
    cfg = compose([*given, "recipe=paper", "task=segment", "model=biformer_s"])
    assert (cfg.model.n_win, cfg.hardware.amp, cfg.task.head) == (7, None, "fcn")
    assert (cfg.optim.no_decay, cfg.train.drop_path_rate, cfg.train.steps) == (["*rpb"], 0.0, 160000)


def test_norms_of_the_backbone_may_keep_their_statistics():
    small = {"dims": (32, 64, 96, 128), "heads": (1, 2, 3, 4), "depths": (1, 1, 1, 1)}
    model = detector("biformer_s", 3, head="retinanet", norm_eval=True, **small)
    plan = Plan(micro=1, accumulate=2, world=1, per_epoch=1, steps=1, evaluate_every=1)
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert len(norms) == 5 and not Statistics(model, plan).tensors
    for _ in range(2):
        before = [norm.running_mean.clone() for norm in norms]
        boxes = torch.tensor([[4.0, 4.0, 40.0, 40.0]])
        loss = sum(model([torch.rand(3, 64, 64)], [{"boxes": boxes, "labels": torch.tensor([1])}]).values())
        loss.backward()
        assert all(torch.equal(norm.running_mean, mean) for norm, mean in zip(norms, before, strict=True))
        assert all(norm.weight.grad is not None and norm.weight.grad.any() for norm in norms)
        model.eval().train()
    assert len(Statistics(detector("biformer_s", 3, head="retinanet", **small), plan).tensors) == 10


def test_a_recipe_starts_from_a_file_of_a_classifier(tmp_path):
    """As its header says: the backbone is the file's, under the options of the recipe."""
    shape = {"dims": (32, 32, 32, 32), "depths": (3, 4, 6, 5)}
    classifier = timm.create_model("dinat_m", num_classes=7, **shape)
    torch.save(layouts_of(type(classifier))[0].to_theirs(classifier.state_dict()), tmp_path / "dinat.pth")
    cfg = compose([
        "recipe=paper", "task=segment", "model=dinat_m", "data=scenes", "data.train_count=16", "data.val_count=2",
        "task.channels=32", "model.dims=[32,32,32,32]", "model.pretrained=true",
        f"+model.pretrained_cfg_overlay.file={tmp_path}/dinat.pth",
    ])  # fmt: skip
    task = segment.Task(cfg)
    model = task.build_model(task.build_data())
    inner = model.backbone.model
    assert torch.equal(inner.stages[2].blocks[3].attn.fn.rpb, classifier.stages[2].blocks[3].attn.fn.rpb)
    assert [block.attn.fn.dilation for block in inner.stages[2].blocks] == [1, 2, 1, 3, 1, 4]


@pytest.mark.parametrize("given", [[], ["model.backbone=runs/digits"]])
def test_a_recipe_that_starts_from_nothing_says_so(given, monkeypatch, capsys):
    cfg = compose([
        "recipe=paper", "task=segment", "model=dinat_m", "data=scenes", "data.train_count=16", "data.val_count=2",
        "task.channels=32", "model.dims=[32,32,32,32]", *given,
    ])  # fmt: skip
    monkeypatch.setattr(models, "start_backbone", lambda *given: None)
    task = segment.Task(cfg)
    task.build_model(task.build_data())
    said = " ".join(capsys.readouterr().out.split())
    assert ("starts from weights of an ImageNet classifier, but none are given" in said) == (not given)


def picture(path, values, mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values.astype(np.uint8), mode).save(path)


def ade20k(folder):
    draw = np.random.default_rng(0)
    for split in ("training", "validation"):
        for i in range(2):
            picture(folder / "images" / split / f"{i}.jpg", draw.integers(0, 256, (64, 96, 3)))
            picture(
                folder / "annotations" / split / f"{i}.png",
                draw.integers(0, 151, (8, 12)).repeat(8, 0).repeat(8, 1),
                "L",
            )
    rows = "".join(f"{number}\t0.1\t1\t1\t0\tthing {number}\n" for number in range(1, 151))
    (folder / "objectInfo150.txt").write_text("Idx\tRatio\tTrain\tVal\tStuff\tName\n" + rows)


def coco(folder):
    draw = np.random.default_rng(0)
    kinds = [{"id": number, "name": f"kind {number}"} for number in range(1, 81)]
    (folder / "annotations").mkdir()
    for split in ("train", "val"):
        images, objects = [], []
        for i in range(2):
            picture(folder / f"{split}2017" / f"{i}.jpg", draw.integers(0, 256, (64, 96, 3)))
            images.append({"id": i, "file_name": f"{i}.jpg", "width": 96, "height": 64})
            box = {"bbox": [8, 8, 40, 32], "segmentation": [[8, 8, 48, 8, 48, 40, 8, 40]], "area": 1280.0}
            objects.append({"id": i + 1, "image_id": i, "category_id": 7, "iscrowd": 0, **box})
        said = json.dumps({"images": images, "annotations": objects, "categories": kinds})
        (folder / "annotations" / f"instances_{split}2017.json").write_text(said)


SMALL = {
    "nat_m": ["model.dims=[32,64,96,128]", "model.depths=[1,1,1,1]"],
    "biformer_s": ["model.dims=[32,64,96,128]", "model.heads=[1,2,3,4]", "model.depths=[1,1,1,1]"],
}


@pytest.mark.slow
@pytest.mark.parametrize("model", SMALL)
@pytest.mark.parametrize("task", ["segment", "detect"])
def test_a_published_recipe_trains(tmp_path, model, task):
    """Two steps of the recipe as it is, but for the width of the model, the precision, and two images of 96 pixels."""
    {"segment": ade20k, "detect": coco}[task](tmp_path)
    folder = ["data=" + {"segment": "ade20k", "detect": "coco"}[task], f"data.root={tmp_path}", "data.workers=0"]
    shape = ["data.batch_size=2", "train.steps=2", "train.log_every=1", "hardware.amp=null", "data.cache=null"]
    sizes = ["data.short_side=96", "data.long_side=160", *(["data.img_size=64"] if task == "segment" else [])]
    train_here(
        tmp_path, "recipe=paper", f"task={task}", f"model={model}", *SMALL[model], *folder, *shape, *sizes, "name=run"
    )
    found = lines(tmp_path / "run")
    losses = [line["loss"] for line in found if "loss" in line]
    rates = [line["lr"] for line in found if "lr" in line]
    assert len(losses) == 2 and all(np.isfinite(losses))
    ratio, length = (1e-6, 1500) if task == "segment" else (0.001, 500)
    peak, left = (6e-5, 0.5) if task == "segment" else (1e-4, None)
    first = peak * ratio
    second = peak * (ratio + (1 - ratio) / length) * (left or 1)
    assert rates[0] == pytest.approx(first) and rates[1] == pytest.approx(second)
