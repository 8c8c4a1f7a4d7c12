"""The data of a run, held against data that it is gone on with or measured on."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from omegaconf import OmegaConf

from recipes import config, data_record
from recipes.data import Data, dense, imagenet
from recipes.data.coco import Coco
from recipes.data.folder import Folder, Listing
from recipes.data.tar import Tar
from recipes.settings import RunError
from recipes.tasks.classify import with_classes

ANIMALS = ["ant", "bee", "cow"]


class Images(list):
    """A source of so many images of one class."""

    def __init__(self, count, label=0):
        super().__init__(range(count))
        self.records = SimpleNamespace(labels=np.full(count, label))


def in_shards(labels, **counts):
    """A source in shards of these names and numbers of samples."""
    records = Tar.__new__(Tar)
    records.names = [f"{name}.tar" for name in counts]
    records.labels, records.counts = np.array(labels), np.array(list(counts.values()))
    source = Images(len(labels))
    source.records = records
    return source


def data(names, *, images=12, val=4, **others) -> Data:
    given = {"num_classes": len(names), "mean": (0.5,) * 3, "std": (0.5,) * 3, "img_size": 32}
    return Data(**given | {"train": Images(images), "val": Images(val), "class_names": list(names)} | others)


def test_names_and_boxes_are_part_of_what_processes_compare(tmp_path):
    def digest(records):
        return data_record._digest(records, None)

    def folder(name):
        return Folder(tmp_path, Listing({"ant": [name]}, {}, 0))

    def coco(file, x):
        row = {"id": 7, "file": file, "size": [8, 8], "objects": [{"bbox": [x, 0, 1, 1], "label": 1}]}
        return Coco(tmp_path, [row], [])

    given = [folder("a.png"), folder("b.png"), coco("a.png", 0), coco("b.png", 0), coco("a.png", 1)]
    assert len({digest(records) for records in given}) == len(given)
    assert digest(coco("a.png", 0)) == digest(given[2])
    assert digest(given[2]).startswith("23412ee4606ac34c")  # runs have recorded it


@pytest.fixture
def begun(tmp_path):
    """Writes what a run on some data recorded, and gives its folder."""

    def write(*args, **changes):
        (tmp_path / data_record.FILE).write_text(json.dumps(data_record.of(data(*args, **changes))))
        return tmp_path

    return write


@pytest.mark.parametrize(
    "names, said",
    [
        (
            ["bee", "cow", "zebra"],
            "class 0 is 'ant' in the run and 'bee' in the data (the run: ant, bee, cow; the ",
        ),
        (["ant", "bee"], "the run has 3 classes (ant, bee, cow), the data 2 (ant, bee)"),
        (map(str, range(10)), "the data 10 (0, 1, 2, 3, 4, 5 and 4 more)"),
    ],
)
def test_other_classes_are_refused(begun, names, said):
    run, other = begun(ANIMALS), data(list(names))
    for check in (lambda: data_record.check_classes(run, other, "photos"), lambda: data_record.check_same(run, other)):
        with pytest.raises(RunError) as error:
            check()
        assert said in str(error.value)


def test_classes_that_may_be_the_same(begun):
    run = begun(ANIMALS)
    data_record.check_classes(run, data(ANIMALS), "photos")
    data_record.check_classes(run, data("012"), "shards without names")
    run = begun(imagenet.synsets())
    data_record.check_classes(run, data(imagenet.class_names()), "imagenet_v2")
    chosen = imagenet.class_names()[6:206]
    data_record.check_classes(run, data(chosen, num_classes=1000, subset=tuple(range(6, 206))), "imagenet_a")
    data_record.check_classes(run, data(imagenet.class_names(), truths=np.zeros((4, 1))), "imagenet_real")
    with pytest.raises(RunError, match="cannot be evaluated on data=imagenet_v2: class 0 is 'n01440764' in the run"):
        data_record.check_classes(run, data(imagenet.class_names()[::-1]), "imagenet_v2")


def test_validation_may_lack_classes(begun):
    """The files that are measured declare fewer, or have no folder for some."""
    run = begun(ANIMALS)
    for names, labels, expected in (
        (["ant", "bee"], [0, 1, 1, 0], [0, 1, 1, 0]),
        (["ant", "cow"], [0, 1, 1, 0], [0, 2, 2, 0]),
        (["cow"], [0] * 4, [2] * 4),
    ):
        source = SimpleNamespace(records=SimpleNamespace(labels=np.array(labels)))
        found = data_record.with_classes_of(run, replace(data(names), val=source))
        assert (found.num_classes, found.class_names) == (3, ANIMALS) and source.records.labels.tolist() == expected
        data_record.check_classes(run, replace(found, val=range(4)), "photos")
    for names in (ANIMALS, ["bee", "ant"], ["ant", "cat"], ["ant", "bee", "cow", "dog"]):
        same = data(names)
        assert data_record.with_classes_of(run, same) is same


def test_numbered_folders_sort_as_text(begun):
    """Numbers that were counted and folders of these names are the same classes, but not in the same order."""
    counted = list(map(str, range(12)))
    folders = sorted(counted)
    lacking = [*(name for name in folders if name != "9"), "11"]  # with model.num_classes=12
    for there, here in ((counted, folders), (folders, counted), (counted, lacking), (lacking, counted)):
        run, val = begun(there), SimpleNamespace(records=SimpleNamespace(labels=np.arange(11)))
        found = data_record.with_classes_of(run, replace(data(here), val=val))
        with pytest.raises(RunError, match=r"class 2 is '(2|10)' in the run and '(10|2)' in the data .*leading zeros"):
            data_record.check_classes(run, found, "photos")
        assert val.records.labels.tolist() == list(range(11))
    for names in ([f"{number:02}" for number in range(12)], "abcdefghijkl"):
        data_record.check_classes(begun(counted), data(names), "photos")
        data_record.check_classes(begun(names), data(counted), "shards without names")


def test_validation_may_lack_classes_of_a_larger_model(begun):
    """model.num_classes=5, which the task has appended to the classes that it found."""
    run = begun([*ANIMALS, "3", "4"])
    for names, labels, expected in (
        (["ant", "cow"], [0, 1, 1, 0], [0, 2, 2, 0]),
        (["ant", "bee"], [0, 1, 1, 0], [0, 1, 1, 0]),
        (["cow"], [0] * 4, [2] * 4),
    ):
        source = SimpleNamespace(records=SimpleNamespace(labels=np.array(labels)))
        given = with_classes(replace(data(names), val=source), 5)
        found = data_record.with_classes_of(run, given)
        assert found.class_names == [*ANIMALS, "3", "4"] and source.records.labels.tolist() == expected
        data_record.check_classes(run, replace(found, val=range(4)), "photos")
    for names in (["ant", "cat"], ["bee", "ant"], ["ant", "1"]):  # the last has images, and is no class of the run
        source = SimpleNamespace(records=SimpleNamespace(labels=np.array([0, 1])))
        given = with_classes(replace(data(names), val=source), 5)
        assert data_record.with_classes_of(run, given) is given and source.records.labels.tolist() == [0, 1]
        with pytest.raises(RunError, match=r"in the run and .* in the data"):
            data_record.check_classes(run, replace(given, val=range(4)), "photos")


def test_a_run_goes_on_with_as_many_images(begun, capsys):
    run = begun(ANIMALS)
    data_record.check_same(run, data(ANIMALS))
    assert capsys.readouterr().out == ""
    with pytest.raises(RunError, match="the run has 12 training images, the data 9\nrestore the data"):
        data_record.check_same(run, data(ANIMALS, images=9))
    data_record.check_same(run, data(ANIMALS, val=5))
    assert "validation has 5 images, not 4 as before" in capsys.readouterr().out


def test_a_run_goes_on_with_the_same_labels(begun, capsys):
    run = begun(ANIMALS)
    with pytest.raises(RunError, match="as many training images, but other images or other labels\nrestore"):
        data_record.check_same(run, replace(data(ANIMALS), train=Images(12, label=1)))
    data_record.check_same(run, replace(data(ANIMALS), val=Images(4, label=1)))
    assert "validation has other images, or other labels, than before" in capsys.readouterr().out
    recorded = json.loads((run / data_record.FILE).read_text())
    (run / data_record.FILE).write_text(json.dumps({key: recorded[key] for key in (*data_record.KEYS, "images")}))
    data_record.check_same(run, replace(data(ANIMALS), train=Images(12, label=1)))  # an older run recorded no labels


@pytest.mark.parametrize(
    ("measured", "typed"),
    [(data(ANIMALS, val=5), {}), (replace(data(ANIMALS), val=Images(4, label=1)), {}), (None, {"split_seed": 7})],
    ids=["other number", "other labels", "otherwise drawn"],
)
def test_images_that_a_run_may_have_learned_from(begun, capsys, measured, typed):
    """Of its own data set: another is not what it was trained on."""
    run, cfg = begun(ANIMALS), config.compose(["data=digits"])
    OmegaConf.save(cfg, run / "config.yaml")
    data_record.say_other_images(run, data(ANIMALS), cfg.data)
    for other in ({"name": "mine"}, {}):
        assert capsys.readouterr().out == ""
        data_record.say_other_images(run, measured or data(ANIMALS), OmegaConf.merge(cfg.data, typed, other))
    said = f"of data=digits, or their labels or order, are not those that {run} was evaluated on as it trained"
    assert said in capsys.readouterr().out
    (run / data_record.FILE).unlink()  # an older run recorded nothing
    data_record.say_other_images(run, data(ANIMALS, val=5), cfg.data)
    assert capsys.readouterr().out == ""


def test_a_shard_that_is_another_is_named(begun):
    def shards(labels, **counts):
        return replace(data(ANIMALS), train=in_shards(labels, **counts))

    run = begun(ANIMALS)
    (run / data_record.FILE).write_text(json.dumps(data_record.of(shards([0, 1, 2], a=2, b=1))))
    data_record.check_same(run, shards([0, 1, 2], a=2, b=1))
    for labels, counts, said in (
        ([0, 1, 2], {"a": 1, "b": 2}, "shard 0 is a.tar with 2 images in the run and a.tar with 1 images in the data"),
        ([0, 1, 2], {"a": 2, "c": 1}, "shard 1 is b.tar with 1 images in the run and c.tar with 1 images in the data"),
        ([0, 1], {"a": 2}, "shard 1 is b.tar with 1 images in the run and none in the data"),
        ([0, 1, 1], {"a": 2, "b": 1}, "other labels"),
    ):
        with pytest.raises(RunError, match=said):
            data_record.check_same(run, shards(labels, **counts))


def test_runs_that_recorded_less(tmp_path):
    data_record.check_same(tmp_path, data(ANIMALS, images=9))
    (tmp_path / data_record.FILE).write_text(json.dumps({"num_classes": 3, "class_names": ANIMALS, "img_size": 32}))
    data_record.check_same(tmp_path, data(ANIMALS, images=9))
    assert data_record.described(tmp_path, config.compose(["model=nat_m"])).left_out == ()


@pytest.mark.parametrize(
    "damage, said",
    [
        (lambda text: text[: len(text) // 2], "line 1 column"),
        (lambda text: "[]", "it holds [], expected a mapping"),
        (lambda text: "null", "it holds None, expected a mapping"),
        (lambda text: "[" * 100_000, "it is nested too deeply"),
        (lambda text: b"\xff\xff", "can't decode byte 0xff"),
        (lambda text: text.replace('"num_classes": 3', '"num_classes": "3"'), "its 'num_classes' is '3'"),
        (lambda text: text.replace('"img_size": 32', '"img_size": [32]'), "its 'img_size' is [32]"),
        (lambda text: text.replace('"class_names"', '"names"'), "it has no 'class_names'"),
        (lambda text: text.replace('"val": 4', '"val": null'), "its 'images' is {'train': 12, 'val': None}"),
        (None, "Is a directory"),
    ],
)
def test_a_record_that_is_damaged(begun, damage, said):
    run = begun(ANIMALS)
    path = run / data_record.FILE
    if damage is None:
        path.unlink()
        path.mkdir()
    else:
        text = damage(path.read_text())
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    uses = (
        lambda: data_record.check_same(run, data(ANIMALS)),
        lambda: data_record.check_classes(run, data(ANIMALS), "photos"),
        lambda: data_record.described(run, config.compose(["model=nat_m"])),
    )
    for use in uses:
        with pytest.raises(RunError) as error:
            use()
        message = str(error.value)
        assert message.startswith(f"{path} is not a run's record of its data: ") and said in message
        assert "restore it from a copy, or remove it" in message


def test_numbers_as_names(begun):
    """Older runs recorded what a person gave, data.class_names=[3,7]."""
    data_record.check_same(begun([3, 7]), data(["3", "7"]))
    with pytest.raises(RunError, match="class 1 is '7' in the run and '8' in the data"):
        data_record.check_same(begun([3, 7]), data(["3", "8"]))


def test_data_without_images(begun, tmp_path):
    """What a task is given where the data is not: all of it but the images, and of its type."""
    cfg = config.compose(["model=nat_m", "data.mean=[0.5,0.5,0.5]", "data.std=[0.5,0.5,0.5]"])
    whole = data(ANIMALS, img_size=(32, 64), left_out=(1,))
    known = data_record.described(begun(ANIMALS, img_size=(32, 64), left_out=(1,)), cfg)
    assert known == replace(whole, train=None, val=None)
    cfg.data.subset = "a"
    with pytest.raises(RunError, match=r"cannot be evaluated on data=digits: the run has 3 classes .*, the data 1000"):
        data_record.described(begun(ANIMALS), cfg)
    names = imagenet.class_names()
    found = data_record.described(begun(names), cfg)
    assert (found.num_classes, found.subset[0], found.class_names[0]) == (1000, 6, names[6])
    with pytest.raises(RunError, match=r"has no data\.json, which lists its classes"):
        data_record.described(tmp_path / "none", cfg)


def test_validation_may_lack_the_highest_class(begun):
    """Readers that count are told how many classes there are, unless it was typed."""
    run = begun(ANIMALS)
    for source, given, expected in (("tar", None, 3), ("parquet", None, 3), ("arrow", 7, 7), ("folder", None, None)):
        cfg = OmegaConf.create({"source": source, "num_classes": given})
        data_record.count_classes(run, cfg)
        assert cfg.num_classes == expected


def test_labels_that_lie_in_images_are_not_numbered_anew(begun):
    kind = dense.KINDS["semantic"]
    val = kind.__new__(kind)
    val.records = SimpleNamespace(labels=np.array([0, 1]))
    some = replace(data([ANIMALS[0], ANIMALS[2]]), val=val)
    assert data_record.with_classes_of(begun(ANIMALS), some) is some
