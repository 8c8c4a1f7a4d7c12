"""Pictures of dense predictions: what is drawn, and that what is written can be read."""

from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

from recipes.config import compose
from recipes.pictures import SIDE, beside, colours, with_labels, with_objects
from recipes.plots import draw_confusion, draw_found, draw_together
from recipes.tasks import detect

NAMES = [f"a class of a long name, {number}" for number in range(150)]
GREY = (90, 90, 90)


def grey(width, height):
    return Image.new("RGB", (width, height), GREY)


def found_in(image):
    return {colour for _, colour in image.getcolors(1 << 24)}


def test_the_legend_names_what_is_shown():
    """And no other class, however many there are; lines end before the border."""
    shown = [3, 77, *range(120, 150)]
    sheet, tints = beside([(grey(64, 48), grey(64, 48))], NAMES, shown), colours(150)
    seen = found_in(sheet)
    assert {tints[number] for number in shown} <= seen
    assert not {tints[number] for number in range(150) if number not in shown and tints[number] in seen}
    plain = beside([(grey(64, 48), grey(64, 48))], NAMES, [])
    assert sheet.width == plain.width and sheet.height > plain.height + 150
    assert (np.asarray(sheet)[plain.height :, -4:] == 255).all()
    assert beside([(grey(64, 48), grey(64, 48))], NAMES, range(150)).height < 2 * sheet.height


def test_images_of_any_shape_stand_beside_each_other():
    pairs = [(grey(*size), grey(*size)) for size in ((333, 517), (517, 333), (3000, 20), (20, 3000), (1, 1))]
    sheet = beside(pairs, NAMES, [0])
    assert sheet.width > 4 * SIDE and sheet.height > 3 * SIDE and GREY in found_in(sheet)
    assert beside(pairs[3:4], NAMES, [0]).width > 100  # "found" is wider than the image


def test_labels_tint_their_pixels():
    labels = torch.tensor([[0, 1, 2, 255]]).repeat_interleave(2, 0)
    pixels = np.asarray(with_labels(grey(4, 2), labels, 3, bare=[1])).astype(float)
    for column, label in enumerate((0, None, 2, None)):
        tint = GREY if label is None else 0.35 * np.array(GREY) + 0.65 * np.array(colours(3)[label])
        assert abs(pixels[:, column] - tint).max() <= 1


def test_what_is_written_stays_in_the_image():
    """The word of a box at the right border, or below, is moved; large images have large words."""
    for size in ((400, 300), (4000, 3000)):
        image = grey(*size)
        box = torch.tensor([[size[0] - 9.0, size[1] - 7.0, size[0] - 1.0, size[1] - 1.0]])
        found = {"boxes": box, "labels": torch.tensor([7]), "scores": torch.tensor([0.75])}
        drawn = (np.asarray(with_objects(image, found, NAMES)) != GREY).any(2)
        rows, columns = drawn.any(1).nonzero()[0], drawn.any(0).nonzero()[0]
        assert len(columns) > 0.2 * size[0] and len(rows) > size[0] / 100 and columns[0] > 0


def test_masks_that_overlap_are_mixed():
    masks = torch.zeros(2, 40, 60, dtype=torch.bool)
    masks[0, :, :40], masks[1, :, 20:] = True, True
    boxes = torch.tensor([[0.0, 0, 40, 40], [20, 0, 60, 40]])
    found = {"boxes": boxes, "labels": torch.tensor([0, 1]), "masks": masks}
    pixel = np.asarray(with_objects(grey(60, 40), found, ["a", "b"]))[30, 30].astype(float)
    red, blue = np.array(colours(2), float)
    assert abs(pixel - (0.25 * np.array(GREY) + 0.25 * red + 0.5 * blue)).max() <= 2


def test_an_answer_has_what_is_sure_at_the_size_of_the_image():
    """The network saw a half of it; masks are pasted into the image itself."""
    boxes, masks = torch.tensor([[20.0, 30.0, 120.0, 130.0], [150, 5, 190, 40]]), torch.ones(2, 1, 28, 28)
    found = {"boxes": boxes, "labels": torch.tensor([2, 0]), "scores": torch.tensor([0.9, 0.4]), "box_masks": masks}
    task = detect.Task(compose(["task=detect", "task.head=mask_rcnn"]))
    data = SimpleNamespace(class_names=["a", "b", "c"])
    table, picture = task.answer(grey(400, 300), [{**found, "size": (150, 200)}], data, "x.png")
    assert table.row_count == 1 and list(table.columns[2].cells) == ["40, 60, 240, 260"]
    pixels, tint = np.asarray(picture), 0.5 * np.array(GREY) + 0.5 * np.array(colours(3)[2])
    assert picture.size == (400, 300) and abs(pixels[160, 140] - tint).max() <= 1
    assert (pixels[20:70, 310:370] == GREY).all()  # of the other, nothing


def test_a_picture_is_shown_pixel_for_pixel(tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (200, 300, 3), np.uint8))
    draw_found(tmp_path / "found.png", noise, {f"{name}": 50.0 for name in NAMES}, "IoU, mean 50 %")
    with Image.open(tmp_path / "found.png") as picture:
        assert np.array_equal(np.asarray(picture)[:200, :300], np.asarray(noise)) and picture.width > 700


def test_names_with_dollars_are_no_formulas(tmp_path):
    names = ["$^$", "$5 or $6_", "a_b"]
    draw_confusion(tmp_path / "confusion.png", torch.ones(3, 3, dtype=torch.long), names)
    draw_found(tmp_path / "found.png", None, dict.fromkeys(names, 50.0), "$^$")
    draw_together(tmp_path / "together.png", {name: [{"step": 1, "loss": 2.0}] for name in names}, "top1")
    assert len(list(tmp_path.iterdir())) == 3


def test_letters_that_the_font_lacks_are_no_warnings(tmp_path, recwarn):
    draw_confusion(tmp_path / "eval.png", torch.eye(2, dtype=torch.long), ["日本", "中国"])
    draw_found(tmp_path / "found.png", None, {"日本": 50.0}, "IoU")
    assert not recwarn.list
