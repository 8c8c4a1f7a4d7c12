"""Names of files about images and models: short, distinct, and of no other image."""

import os

import pytest

from recipes.names import LONGEST, file_names


def test_an_own_name_is_kept_by_the_one_whose_it_is():
    """Without the dot, the first two would be called alike."""
    found = file_names(["r/.cat.jpg", "r/cat.jpg", "r/cat-2.jpg"], [".cat", "cat", "cat-2"])
    assert found == ["r-.cat.jpg", "r-cat.jpg", "cat-2"]
    assert file_names(["a:b", "x/a-b"], ["a:b", "a-b"]) == ["a-b", "x-a-b"]


@pytest.mark.parametrize("letter", ["x", "é"])
def test_names_that_are_too_long_lose_their_beginning(letter):
    folder = letter * 250
    found = file_names([f"{folder}/{name}" for name in "abb"] + ["c"], [*"aaa", folder], "-objects.json")
    assert [name[-4:].lstrip(letter) for name in found] == ["-a", "-b", "-b-2", ""]
    assert all(LONGEST - 2 < len(os.fsencode(f"{name}-objects.json")) <= LONGEST for name in found)


def test_names_lead_nowhere():
    for path in ("../../a", "/etc/passwd", "C:\\a\\b", "a\0b", "..", "..\\x"):
        (name,) = file_names([path], [path])
        assert not {*"/\\:\0"} & {*name} and not name.startswith(".")
