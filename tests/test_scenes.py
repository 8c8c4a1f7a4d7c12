"""Scenes: real scans, exact labels whatever lies over what, the same for everyone who asks."""

import numpy as np
import pytest

from recipes.config import compose
from recipes.data import DataError, scenes
from recipes.data.scenes import BACKGROUND, SEEN


def make(size=(96, 128), kind="semantic", **changes):
    cfg = compose(["data=scenes", "task=segment", *(f"data.{key}={value}" for key, value in changes.items())]).data
    found, names = scenes.load(cfg, ("train", "val"), size, kind)
    return *found, names


@pytest.fixture(scope="module")
def splits():
    return make()


def test_a_scene_is_a_function_of_seed_split_and_index(splits):
    train, val, names = splits
    assert names == [*"0123456789", "background"] and make(kind="instances")[2] == list("0123456789")
    before = np.asarray(train.image(7)), train.semantic(7)
    train.image(3)
    again = make()[0]
    assert (np.asarray(again.image(7)) == before[0]).all() and (again.semantic(7) == before[1]).all()
    others = [train.image(8), val.image(7), make(split_seed=1)[0].image(7)]
    assert all((np.asarray(other) != before[0]).any() for other in others)


def test_no_scan_is_in_both_splits(splits):
    whole = [{scan.tobytes() for scan in split.scans.scans} for split in splits[:2]]
    assert not whole[0] & whole[1]
    used = [
        {split.scans.scans[thing.row].tobytes() for index in range(60) for thing in split._scene(index)[1]}
        for split in splits[:2]
    ]
    assert len(used[1]) > 100 and not used[0] & used[1] and used[1] <= whole[1]


def test_labels_are_exact(splits):
    """Every pixel is painted here by hand, scan after scan; boxes are the least and largest places of what is left."""
    overlapping = 0
    for index in range(12):
        things, owner = splits[0]._scene(index)[1], {}
        for number, thing in enumerate(things):
            for row, column in zip(*np.nonzero(thing.ink >= 0.5), strict=True):
                place = (thing.top + row, thing.left + column)
                overlapping += place in owner
                owner[place] = number
        labels, found = splits[0].semantic(index), splits[0].instances(index, masks=True)
        assert labels.shape == (96, 128) and len(things) == len(found["labels"]) >= 3
        for place in np.ndindex(labels.shape):
            assert labels[place] == (things[owner[place]].label if place in owner else BACKGROUND)
        for number, thing in enumerate(things):
            mine = np.array([place for place, top in owner.items() if top == number])
            assert found["labels"][number] == thing.label == splits[0].scans.labels[thing.row]
            assert found["masks"][number].sum() == len(mine) == found["area"][number]
            assert found["masks"][number][tuple(mine.T)].all()
            (top, left), (bottom, right) = mine.min(0), mine.max(0) + 1
            assert found["boxes"][number].tolist() == [left, top, right, bottom]
            assert len(mine) >= SEEN * (thing.ink >= 0.5).sum(), "an object that is nearly hidden is no label"
    assert overlapping > 100


def test_scenes_hold_several_scans_of_several_sizes(splits):
    counts = [len(splits[0]._scene(index)[1]) for index in range(100)]
    assert set(counts) == {3, 4}
    sides = [len(thing.ink) for index in range(50) for thing in splits[0]._scene(index)[1]]
    assert max(sides) > 1.7 * min(sides)
    assert {len(make(things="[6,6]")[0]._scene(index)[1]) for index in range(10)} == {6}


def test_scans_can_be_told_from_the_ground(splits):
    for index in range(10):
        image, labels = np.asarray(splits[0].image(index), float), splits[0].semantic(index)
        for thing in splits[0]._scene(index)[1]:
            part = np.zeros(labels.shape, bool)
            part[thing.place] = True
            ground = image[part & (labels == BACKGROUND)].mean()
            assert abs(thing.colour.mean() - ground) > 40


@pytest.mark.parametrize(
    ("changes", "size", "said"),
    [
        ({"things": "[0,3]"}, (64, 64), "expected [fewest,most] scans per scene"),
        ({"things": "[5,3]"}, (64, 64), "expected [fewest,most] scans per scene"),
        ({"things": "null"}, (64, 64), "data.things=null: expected [fewest,most] scans per scene"),
        ({"train_count": "null"}, (64, 64), "data.train_count=null: expected at least one scene"),
        ({"val_count": 0}, (64, 64), "data.val_count=0: expected at least one scene"),
        ({}, (16, 64), "too small for scenes: expected at least 32 pixels"),
    ],
)
def test_scenes_that_cannot_be(changes, size, said):
    with pytest.raises(DataError) as error:
        make(size, **changes)
    assert said in str(error.value)
