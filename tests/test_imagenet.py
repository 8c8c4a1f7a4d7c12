"""ImageNet and the sets of its classes: which label a folder, a number, a row of a file stands for."""

import json
import shutil
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchmetrics.functional.classification import multiclass_confusion_matrix

import recipes.data
from flags import deterministic
from recipes import config
from recipes.answers import MostLikely
from recipes.data import DataError, batches, imagenet
from recipes.eval_results import write_csv
from recipes.metrics.classification import MOST, Metrics, RealMetrics, likeliest
from recipes.settings import load_config
from recipes.tasks.classify import Task

CLASSES = (0, 6, 20, 999)  # of which 6 is one of ImageNet-A's, 20 none of ImageNet-R's


def draw(path, shade):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 36), (shade, 0, 0)).save(path)


def val(root, names):
    """Two images of one class in a folder each, `names` in the order of CLASSES."""
    for shade, name in enumerate(names):
        for number in range(2):
            draw(root / name / f"{number}.png", 10 * shade)
    return root


def make(name="imagenet", *overrides, root):
    return recipes.data.build(
        config.compose(["model=gcvit_xxt", f"data={name}", f"data.root={root}", *overrides], "eval")
    )


def labels(data):
    return {data.val.image(index).getpixel((0, 0))[0] // 10: data.val.label(index) for index in range(len(data.val))}


SYNSETS = [imagenet.synsets()[index] for index in CLASSES]


@pytest.mark.parametrize("names", [SYNSETS, list(map(str, CLASSES)), [f"{index:04d}" for index in CLASSES]])
@pytest.mark.parametrize("place", ["val", "validation", "", "imagenetv2-matched-frequency-format-val"])
def test_folders(tmp_path, names, place):
    val(tmp_path / place, names)
    data = make(root=tmp_path)
    assert labels(data) == dict(enumerate(CLASSES))
    assert data.train is None and data.num_classes == 1000 and len(data.val) == 8
    assert [data.class_names[index] for index in CLASSES] == ["tench", "stingray", "water ouzel", "toilet tissue"]


def test_a_split_of_another_name(tmp_path):
    val(tmp_path / "val", SYNSETS)
    with pytest.raises(DataError, match="has no mine/"):
        make("imagenet", "data.val_split=mine", root=tmp_path)
    (tmp_path / "val").rename(tmp_path / "mine")
    assert labels(make("imagenet", "data.val_split=mine", root=tmp_path)) == dict(enumerate(CLASSES))


def test_a_split_that_is_one_of_several_folders(tmp_path):
    val(tmp_path / "val", SYNSETS[:1])
    val(tmp_path / "valid", SYNSETS[1:2])
    assert make("imagenet", "data.val_split=valid", root=tmp_path).val.records.labels.tolist() == [6, 6]
    assert make("imagenet", "data.val_split=val", root=tmp_path).val.records.labels.tolist() == [0, 0]
    with pytest.raises(DataError, match=r"has val/ and valid/: give data.val_split=val or valid, or move all but one"):
        make(root=tmp_path)
    shutil.rmtree(tmp_path / "val")
    assert make("imagenet", "data.val_split=val", root=tmp_path).val.records.labels.tolist() == [6, 6]


def test_what_folders_have_no_use_for_is_told(tmp_path, capsys):
    val(tmp_path / "val", SYNSETS)
    make(root=tmp_path)
    assert "not used" not in capsys.readouterr().err
    make("imagenet", "data.num_classes=10", "data.label_key=fine", root=tmp_path)
    said = "not used for folders that are named after the classes of ImageNet-1k: "
    assert f"{said}data.num_classes=10, data.label_key=fine" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["val", "only", "."])
def test_folders_of_synsets_are_not_searched_for_tables(tmp_path, monkeypatch, place):
    val(tmp_path / place, SYNSETS)
    monkeypatch.setattr(imagenet, "files_below", lambda *_, **__: pytest.fail("searched"))
    monkeypatch.setattr(Path, "rglob", lambda *_: pytest.fail("searched"))
    assert labels(make(root=tmp_path)) == dict(enumerate(CLASSES))


def test_training_needs_its_folder(tmp_path):
    val(tmp_path / "val", SYNSETS)
    cfg = config.compose(["model=gcvit_xxt", "data=imagenet", f"data.root={tmp_path}"])
    with pytest.raises(DataError, match=r"has no train/: expected it .* by synset .*; found val"):
        recipes.data.build(cfg)
    val(tmp_path / "train", SYNSETS[:2])
    data = recipes.data.build(cfg)
    assert len(data.train) == 4 and data.train.label(3) == 6


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["tench", "goldfish"], r"has no val/ or validation/ or valid/.*found goldfish, tench"),
        (["n01440764", "n99999999"], r"1 folders that are not named after classes of ImageNet-1k: n99999999"),
        (["1", "1000"], r"after classes of ImageNet-1k: 1000\. .*Numbers start at 0"),
        (["n01440764", "7"], r"not named after classes of ImageNet-1k: 7\. Expected synsets .* not both"),
    ],
)
def test_folders_of_other_names(tmp_path, names, said):
    val(tmp_path, names)
    with pytest.raises(DataError, match=said):
        make(root=tmp_path)


def test_nothing_there(tmp_path):
    with pytest.raises(DataError, match=r"found no folders"):
        make(root=tmp_path)
    with pytest.raises(DataError, match=r"is not a folder: expected one with images by class"):
        make(root=tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"data=imagenet_v2 needs data.root="):
        recipes.data.build(config.compose(["model=gcvit_xxt", "data=imagenet_v2"], "eval"))


def parquet(root, names, paths=None):
    """One image a class in a file that declares `names`."""
    kind = datasets.ClassLabel(names=names) if names else datasets.Value("int64")
    features = datasets.Features({"image": datasets.Image(), "label": kind})
    draw(root.parent / "one.png", 0)
    content = (root.parent / "one.png").read_bytes()
    images = [{"bytes": content, "path": paths and paths[row]} for row in range(len(CLASSES))]
    root.mkdir(exist_ok=True)
    table = datasets.Dataset.from_dict({"image": images, "label": list(CLASSES)}, features=features)
    table.to_parquet(root / "validation-00000-of-00001.parquet")
    return root


def test_parquet_in_the_right_order_and_another(tmp_path):
    for names in (list(imagenet.class_names()), list(imagenet.synsets()), [str(i) for i in range(1000)], None):
        data = make(root=parquet(tmp_path / "files", names and unique(names)))
        assert [data.val.label(row) for row in range(4)] == list(CLASSES)
    shuffled = unique(sorted(imagenet.class_names()))
    with pytest.raises(
        DataError, match=r"its classes in another order than ImageNet-1k: class 0 is .* expected 'tench'"
    ):
        make(root=parquet(tmp_path / "other", shuffled))


def unique(names):
    """The hub's names: words that two classes share are told apart by what follows them."""
    return [name if name not in names[:place] else f"{name}, {place}" for place, name in enumerate(names)]


def test_a_subset_is_the_only_choice(tmp_path):
    val(tmp_path, [SYNSETS[1], imagenet.synsets()[11]])
    data = make("imagenet_a", root=tmp_path)
    assert data.num_classes == 1000 and len(data.class_names) == len(data.subset) == 200
    assert [data.subset[label] for label in labels(data).values()] == [6, 11]
    logits = torch.zeros(1, 1000)
    logits[0, 0], logits[0, 11] = 2.0, 1.0  # tench is none of the 200
    task = Task(config.compose(["model=gcvit_xxt", "data=imagenet_a"], "eval"))
    metrics = task.metrics(data)
    metrics.update(logits, torch.tensor([data.subset.index(11)]))
    assert metrics.compute()["top1"] == 100
    table, _ = task.answer(None, logits, data, "a.jpg")
    assert next(iter(table.columns[0].cells)) == imagenet.class_names()[11]
    answered = MostLikely(data.subset)
    answered.note(logits, torch.tensor([data.subset.index(11)]))
    (row,) = answered.table(data)
    assert (row["label"], row["class1"]) == (11, 11)
    assert {row[f"class{place}"] for place in range(2, 6)} < {*data.subset}
    assert row["share1"] == round(torch.tensor([1.0] + [0.0] * 199).softmax(0)[0].item(), 6)
    with pytest.raises(DataError, match=r"is not one of the 200 classes of data=imagenet_r: is it another data set"):
        make("imagenet_r", root=val(tmp_path / "r", [SYNSETS[2]]))
    with pytest.raises(DataError, match=r"Found \S+/n/0/\S+; expected folders named by WordNet ids \(n01498041"):
        make("imagenet_a", root=val(tmp_path / "n", ["0"]))


def test_training_on_what_is_for_measuring(tmp_path):
    for split in ("train", "val"):
        val(tmp_path / split, SYNSETS[1:2])
    with pytest.raises(DataError, match=r"data=imagenet_a is for evaluation only"):
        recipes.data.build(config.compose(["model=gcvit_xxt", "data=imagenet_a", f"data.root={tmp_path}"]))


def test_real_labels(tmp_path):
    """Some images have one label, some several, some none."""
    real = json.loads((files("timm.data") / "_info" / "imagenet_real_labels.json").read_text())
    one, several, none = (next(i for i, row in enumerate(real) if len(row) == count) for count in (1, 3, 0))
    for index in (one, several, none):
        draw(tmp_path / SYNSETS[0] / f"ILSVRC2012_val_{index + 1:08d}.JPEG", index % 200)
    data = make("imagenet_real", root=tmp_path)
    rows = [[truth for truth in data.truths[data.val.label(i)].tolist() if truth >= 0] for i in range(3)]
    found = {data.val.where(i)[-13:-5]: row for i, row in enumerate(rows)}
    assert found == {f"{index + 1:08d}": real[index] for index in (one, several, none)}
    task = Task(config.compose(["model=gcvit_xxt", "data=imagenet_real"], "eval"))
    metrics = task.metrics(data)
    order = [next(i for i in range(3) if f"{index + 1:08d}" in data.val.where(i)) for index in (one, several, none)]
    logits = torch.zeros(3, 1000)
    logits[order[0], (real[one][0] + 1) % 1000] = 1.0  # wrong
    logits[order[1], real[several][-1]] = 1.0  # its last label is as right as its first
    metrics.update(logits, torch.tensor([data.val.label(i) for i in range(3)]))
    assert metrics.compute()["top1"] == 50 and metrics.compute()["scored"] == 2
    others = tuple(index for index in range(1000) if index != (real[one][0] + 1) % 1000)
    metrics = RealMetrics(torch.from_numpy(data.truths), others)
    logits[order[0], real[one][0]] = 0.5
    metrics.update(logits, torch.tensor([data.val.label(i) for i in range(3)]))
    assert metrics.compute()["top1"] == 100  # what was likelier is not among these
    metrics = task.metrics(data)
    metrics.update(logits[order[2:]], torch.tensor([data.val.label(order[2])]))
    with pytest.raises(DataError, match="no image of the validation set has a label in ReaL: there is nothing to eval"):
        metrics.compute()
    task.picture(tmp_path / "none.png", data, metrics)
    assert not (tmp_path / "none.png").exists() and task.classes(data, metrics) == task.remarks(data, metrics) == []


@pytest.mark.parametrize("name", ["imagenet", "imagenet_real"])
def test_an_image_that_is_replaced_has_no_answer(tmp_path, name):
    """The one evaluated in its place has another label, and its answer is not one to the file that is named."""
    for number, synset in enumerate(SYNSETS, 1):
        draw(tmp_path / synset / f"ILSVRC2012_val_{number:08d}.JPEG", 10 * number)
    whole = [row["label"] for row in answered(make(name, root=tmp_path))]
    first = tmp_path / SYNSETS[0] / "ILSVRC2012_val_00000001.JPEG"
    first.write_bytes(b"no image")  # whose row the columns of the file are taken from
    data = make(name, "data.on_bad_image=replace", root=tmp_path)
    rows = answered(data)
    write_csv(tmp_path / "images.csv", rows)
    assert [row["label"] for row in rows] == whole and len(set(whole)) == len(rows) == 4
    (bad,) = (row for row in rows if row["image"] == str(first))
    assert {value for key, value in bad.items() if key not in ("image", "label")} == {""}
    assert all(row["class1"] == 7 and row["share1"] > 0 for row in rows if row is not bad)


def answered(data):
    """The table of a model that sees the same in every image."""
    answers = MostLikely()
    for images, targets in batches(data.val, batch_size=3, seed=0, epoch=0, train=False):
        answers.note(torch.eye(1000)[7].expand(len(images), -1), targets)
    return answers.table(data)


def test_runs_that_are_older_than_a_key(tmp_path):
    root = val(tmp_path / "photos", SYNSETS)
    cfg = config.compose(["model=gcvit_xxt", "data=imagenet", f"data.root={root}"], "eval")
    del cfg.data.real_labels
    (tmp_path / "run").mkdir()
    OmegaConf.save(cfg, tmp_path / "run" / "config.yaml")
    assert recipes.data.build(load_config(tmp_path / "run")).truths is None


def test_the_likeliest_class_is_that_of_argmax():
    """Also of logits that are equal, as the two largest often are in bfloat16."""
    logits = torch.randn(2000, 1000, generator=torch.Generator().manual_seed(0)).mul(2).bfloat16().float()
    most, found = logits.topk(5), likeliest(logits, 5)
    assert (most.indices[:, 0] != logits.argmax(1)).any() and torch.equal(found[:, 0], logits.argmax(1))
    assert torch.equal(found.sort(1).values, most.indices.sort(1).values)
    assert torch.equal(logits.gather(1, found), most.values) and likeliest(logits[:, :3], 5).shape == (2000, 3)


def test_of_classes_that_are_equally_likely_the_first_is_named_first():
    task = Task(config.compose(["model=gcvit_xxt", "data=imagenet"], "eval"))
    data = SimpleNamespace(subset=None, class_names=[str(index) for index in range(1000)])
    table, _ = task.answer(None, torch.zeros(1, 1000), data, "a.jpg")
    assert [*table.columns[0].cells] == ["0", "1", "2", "3", "4"] and {*table.columns[1].cells} == {"0.10 %"}
    few = SimpleNamespace(subset=None, class_names=["a", "b"])
    table, _ = task.answer(None, torch.tensor([[0.0, 1.0]]), few, "a.jpg")
    assert [*table.columns[0].cells] == ["b", "a"]


def test_real_labels_of_files(tmp_path):
    paths = [f"ILSVRC2012_val_{index + 1:08d}_n01440764.JPEG" for index in range(4)]
    data = make("imagenet_real", root=parquet(tmp_path / "files", None, paths))
    real = json.loads((files("timm.data") / "_info" / "imagenet_real_labels.json").read_text())
    assert [sorted(set(row.tolist()) - {-1}) for row in data.truths] == [sorted(labels) for labels in real[:4]]
    shutil.rmtree(tmp_path / "files")
    val(tmp_path / "named", SYNSETS[:1])
    with pytest.raises(DataError, match=r"ReaL identifies images by their published names.*this one is '0.png'"):
        make("imagenet_real", root=tmp_path / "named")


def metrics_of(order, sharp=10.0):
    """Metrics of a model that is right but for the order of its classes."""
    targets = torch.arange(len(order)).repeat(100 // len(order))
    logits = sharp * torch.nn.functional.one_hot(torch.tensor(order)[targets], len(order)).float()
    metrics = Metrics(len(order))
    metrics.update(logits, targets)
    metrics.compute()
    return metrics


def test_a_wrong_order_of_classes_is_noticed():
    task = Task(OmegaConf.create())
    data = type("Named", (), {"class_names": list("0123456789"), "subset": None, "truths": None})
    right, turned = list(range(10)), [*range(1, 10), 0]
    (said,) = task.remarks(data, metrics_of(turned))
    assert "as accurate as chance (0.00 %)" in said and "renaming of the classes, 100.0 % would be correct" in said
    assert task.remarks(data, metrics_of(right)) == []
    assert task.remarks(data, metrics_of(turned, sharp=0.0)) == []  # a model that knows nothing says so
    assert task.remarks(data, metrics_of([1, 0, 2, 3])) == []  # a quarter is chance, this is half
    assert task.remarks(data, metrics_of([3] * 10)) == []  # a young model takes all for one class: no order would help
    rows = task.classes(data, metrics_of(turned))
    assert [(row["top1"], row["mistaken_for"], row["times"]) for row in rows[:2]] == [(0.0, "1", 10), (0.0, "2", 10)]


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation makes; `known` ones are there before."""

    def __init__(self, *known):
        super().__init__()
        self.known, self.elements = {each.untyped_storage().data_ptr() for each in known}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        tensors = [each for each in tree_leaves(found) if isinstance(each, torch.Tensor)]
        made = [each.numel() for each in tensors if each.untyped_storage().data_ptr() not in self.known]
        self.elements = max([self.elements, *made])
        return found


@pytest.mark.parametrize("classes", [1000, 21841])
def test_a_batch_is_counted_in_the_memory_of_its_logits(classes):
    """Also with deterministic algorithms, with which torchmetrics' matrix has 128 times its own size."""
    generator = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(32, classes, generator=generator), torch.randint(classes, (32,), generator=generator)
    targets[0] = 255  # in masks this is no class
    metrics = Metrics(classes)
    known = [] if metrics.confusion is None else [metrics.confusion.counts]
    with deterministic():
        with Largest(*known) as largest:
            metrics.update(logits, targets)
        assert largest.elements == logits.numel()
        assert metrics.compute()["top1"] == round(100 * (logits.argmax(1) == targets).double().mean().item(), 4)
    if classes <= MOST:
        expected = multiclass_confusion_matrix(logits, targets, classes)
        assert torch.equal(metrics.confusion.compute(), expected) and metrics.confusion.counts.sum() == 32


def test_more_classes_than_a_matrix_is_kept_of(tmp_path):
    data = type("Many", (), {"class_names": list(map(str, range(MOST + 1))), "subset": None, "truths": None})
    task = Task(OmegaConf.create())
    metrics = task.metrics(data)
    metrics.update(torch.randn(2, MOST + 1), torch.tensor([0, MOST]))
    assert metrics.compute().keys() == {"top1", "top5", "loss"}
    task.picture(tmp_path / "none.png", data, metrics)
    assert not (tmp_path / "none.png").exists() and task.classes(data, metrics) == []
    (said,) = task.remarks(data, metrics)
    assert said.startswith("there is no confusion matrix of 5001 classes, only of up to 5000: no picture and no table")


def test_numbers_are_where_timm_has_them():
    assert np.array(imagenet.subset(OmegaConf.create({"subset": "r"}))).tolist() == sorted(
        imagenet.synsets().index(name)
        for name in (files("timm.data") / "_info" / "imagenet_r_synsets.txt").read_text().split()
    )
