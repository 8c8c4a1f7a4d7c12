"""Label maps, boxes and masks move together with their images; a batch is a function of seed, epoch and index."""

import colorsys
from itertools import product
from statistics import fmean

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from dense_cases import all_of, build
from recipes.data import dense, paired
from recipes.data.seeding import reseed
from recipes.data.transforms import Normalize


def equal(one, other):
    """Whether two nested batches hold the same bits."""
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


SCENES = [
    "data.img_size=64",
    "data.train_count=24",
    "data.val_count=6",
    "task.jitter=[0.5,2.0]",
    "task.photometric=true",
]


@pytest.mark.parametrize("task", ["segment", "detect"])
def test_batches_are_functions_of_seed_epoch_and_index(task):
    source = build(task, *SCENES, "task.crop=true").train
    whole = all_of(source, epoch=1)
    assert len(whole) == 6 and not equal(whole, all_of(source, epoch=2))
    assert equal(whole[4:], all_of(source, epoch=1, start=4))
    assert equal(whole, all_of(source, epoch=1, workers=1))
    halves = [all_of(source, epoch=1, batch_size=2, world=2, rank=rank) for rank in (0, 1)]
    for images, one, two in zip((batch[0] for batch in whole), *halves, strict=True):
        assert equal(list(images), [*one[0], *two[0]])
    state = torch.get_rng_state()
    all_of(source)
    assert torch.equal(state, torch.get_rng_state())


def test_shapes():
    data = build("segment", *SCENES)
    images, labels = all_of(data.train)[0]
    assert images.shape == (4, 3, 64, 64) and images.dtype == torch.float32
    assert (
        labels.shape == (4, 64, 64)
        and labels.dtype == torch.int64
        and set(labels.unique().tolist()) <= {*range(11), 255}
    )
    assert (data.num_classes, data.left_out, data.class_names[10]) == (11, (10,), "background")
    images, targets = all_of(data.val, train=False)[0]
    assert [image.shape for image in images] == [(3, 64, 64)] * 4
    assert [target["index"] for target in targets] == [0, 1, 2, 3] and targets[0]["labels"].dtype == torch.int64
    data = build("detect", *SCENES, masks=False)
    images, targets = all_of(data.train)[0]
    assert type(images) is list and "masks" not in targets[0] and targets[0]["boxes"].shape[1] == 4
    assert (data.num_classes, data.left_out) == (10, ())


class Blocks:
    """An image of blocks whose colour says their class, and whose objects are the blocks."""

    def __init__(self, size=(48, 80), block=16):
        rows, columns = (np.arange(side) // block for side in size)
        self.ids = rows[:, None] * 5 + columns  # (H, W)
        self.size = size

    def __len__(self):
        return 1

    def where(self, index):
        return "blocks"

    def image(self, index):
        return Image.fromarray(np.stack([16 * self.ids] * 3, -1).astype(np.uint8))

    def semantic(self, index):
        return self.ids

    def instances(self, index, *, masks):
        masks = self.ids == np.arange(15)[:, None, None]
        boxes = [[c % 5 * 16, c // 5 * 16, c % 5 * 16 + 16, c // 5 * 16 + 16] for c in range(15)]
        area, crowd = masks.sum((1, 2)).astype(np.float32), np.arange(15) == 3
        labels = {"boxes": np.array(boxes, np.float32), "labels": np.arange(15), "area": area, "crowd": crowd}
        return {**labels, "masks": masks, "size": self.size}


def blocks(kind, crop=(40, 64), train=True, jitter=(0.5, 2.0), vflip=0.0, **options):
    data = OmegaConf.create({"short_side": None, "long_side": None, "hflip": 0.5, "vflip": vflip})
    task = OmegaConf.create({"jitter": list(jitter), "crop": True, "category_cap": 0.75, "photometric": False})
    transform = paired.evaluation(data) if not train else None
    transform = transform or paired.training(data, task, crop, (0, 0, 0), semantic=kind == "semantic")
    plain = Normalize((0, 0, 0), (1, 1, 1))
    return dense.KINDS[kind](
        Blocks(), transform, normalize=plain, classes=15, train=train, name="blocks", seed=0, **options
    )


@pytest.mark.parametrize("vflip", [0.0, 1.0])
def test_label_maps_move_with_their_image(vflip):
    source, mirrored, padded = blocks("semantic", vflip=vflip), 0, 0
    for epoch in range(20):
        image, target = source.sample(0, epoch)
        labels, shown = target["labels"], image[0] * 255 / 16
        assert image.shape == (3, 40, 64) and labels.shape == (40, 64)
        inside = labels != 255
        padded += bool((~inside).any())
        right = (shown[inside] - labels[inside]).abs() < 0.5  # colours are mixed along the edges of blocks
        assert right.float().mean() > 0.7 and (image[0][~inside] == 0).all()
        row = labels[0][inside[0]]
        mirrored += bool(row[0] > row[-1])
        column = labels[:, 32][inside[:, 32]]
        assert (column[0] >= column[-1] and vflip) or (column[0] <= column[-1] and not vflip)
    assert 3 < mirrored < 17 and 0 < padded < 17


def test_boxes_and_masks_move_with_their_image():
    source = blocks("instances", masks=True)
    for epoch in range(20):
        image, target = source.sample(0, epoch)
        assert len(target["boxes"]) == len(target["masks"]) == len(target["labels"]) > 0
        assert 3 not in target["labels"], "a crowd is no object to learn"
        for found, mask, label in zip(target["boxes"], target["masks"], target["labels"].tolist(), strict=True):
            rows, columns = torch.nonzero(mask, as_tuple=True)
            edges = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert (found - torch.tensor(edges)).abs().max() <= 1.5
            assert ((image[0][mask] * 255 / 16 - label).abs() < 0.5).float().mean() > 0.25
    kept = source.sample(0, 0)[1]["labels"].tolist()
    assert kept != blocks("instances", masks=True).sample(0, 1)[1]["labels"].tolist()


def test_an_evaluation_keeps_labels_at_their_own_size():
    image, target = blocks("instances", train=False, masks=True).sample(0, 0)
    assert image.shape == (3, 48, 80) and target["crowd"].tolist() == [number == 3 for number in range(15)]
    source = blocks("semantic", train=False)
    source.transform = paired.Rescale([24])
    image, target = source.sample(0, 0)
    assert image.shape == (3, 24, 40) and target["labels"].shape == (48, 80) and target["size"] == (48, 80)


@pytest.mark.parametrize(
    ("short", "long", "jitter", "size", "expected"),
    [
        (None, None, (1, 1), (37, 91), (37, 91)),
        ([20], None, (1, 1), (40, 80), (20, 40)),
        ([20], 30, (1, 1), (40, 80), (15, 30)),
        (None, 64, (1, 1), (32, 16), (64, 32)),
        ([20], 30, (2, 2), (40, 80), (30, 60)),
        ([1], None, (0.1, 0.1), (3, 900), (1, 30)),
    ],
)
def test_rescaling(short, long, jitter, size, expected):
    image = tv_tensors.Image(torch.zeros(3, *size, dtype=torch.uint8))
    mask = tv_tensors.Mask(torch.zeros(size, dtype=torch.uint8))
    image, target = paired.Rescale(short, long, jitter)(image, {"labels": mask})
    assert image.shape == (3, *expected) and target["labels"].shape == expected


def test_several_short_sides_are_all_drawn():
    image = tv_tensors.Image(torch.zeros(3, 40, 50, dtype=torch.uint8))
    rescale = paired.Rescale([20, 30, 40])
    assert {rescale(image).shape[1] for _ in range(40)} == {20, 30, 40}
    data = OmegaConf.create({"short_side": [20, 30, 40], "long_side": None})
    assert paired.evaluation(data)(image).shape == (3, 40, 50)


def test_sides_go_up_to_a_multiple():
    data = OmegaConf.create({"short_side": 50, "long_side": 70, "side_multiple": 32})
    assert paired.evaluation(data)(tv_tensors.Image(torch.zeros(3, 100, 200, dtype=torch.uint8))).shape == (3, 64, 96)
    data.side_multiple = None
    assert paired.evaluation(data)(tv_tensors.Image(torch.zeros(3, 100, 200, dtype=torch.uint8))).shape == (3, 35, 70)


@pytest.mark.parametrize("antialias", [True, False])
def test_sides_go_up_to_a_multiple_in_a_second_step(antialias):
    image = tv_tensors.Image(torch.randint(256, (3, 100, 200), dtype=torch.uint8))
    mask = tv_tensors.Mask(torch.arange(20000).reshape(100, 200).remainder(251).byte())
    found, target = paired.Rescale([50], 70, multiple=32, antialias=antialias)(image, {"labels": mask})
    small = F.resize(image, [35, 70], antialias=antialias)
    assert torch.equal(found, F.resize(small, [64, 96], antialias=antialias))
    small = F.resize(mask, [35, 70], interpolation=F.InterpolationMode.NEAREST)
    assert torch.equal(target["labels"], F.resize(small, [64, 96], interpolation=F.InterpolationMode.NEAREST))


SCALES = [0.5, 0.75, 1.0, 1.25, 1.5, 1.75]


def test_each_scale_is_resized_from_the_image_itself():
    """Sizes as mmsegmentation's for (2048, 512): those of the resized image times 1.75 would be 896 x 1195."""
    image = tv_tensors.Image(torch.randint(256, (3, 1024, 1365), dtype=torch.uint8))
    data = OmegaConf.create({"short_side": 512, "long_side": 2048, "antialias": False})
    sizes = [[256, 341], [384, 512], [512, 683], [640, 853], [768, 1024], [896, 1194]]
    found = paired.evaluation(data, SCALES)(image)
    for planes, size in zip(found, sizes, strict=True):
        assert torch.equal(planes, F.resize(image, size, antialias=False)), size
    assert torch.equal(paired.evaluation(data, [1.0])(image), found[2])
    data.side_multiple = 32
    assert torch.equal(paired.evaluation(data, [0.5])(image)[0], F.resize(found[0], [256, 352], antialias=False))


@pytest.mark.parametrize(
    ("short", "long", "scale", "expected"),
    [
        (None, None, 1.5, (60, 120)),
        (None, None, 0.02, (1, 2)),
        (10, None, 0.75, (7, 14)),  # whole pixels: 7, not 7.5
        (None, 30, 0.55, (8, 16)),  # 16, not 16.5
        (10, 15, 2.0, (15, 30)),
        ([10, 30, 20], None, 0.5, (15, 30)),
    ],
)
def test_scales_are_of_the_limits(short, long, scale, expected):
    data = OmegaConf.create({"short_side": short, "long_side": long})
    (found,) = paired.evaluation(data, [scale])(tv_tensors.Image(torch.zeros(3, 40, 80, dtype=torch.uint8)))
    assert found.shape == (3, *expected)


def test_batches_of_several_scales():
    data = build("segment", *SCENES, "task.scales=[0.5,1.0,1.5]")
    plain = all_of(build("segment", *SCENES).val, train=False, batch_size=2)
    batches = all_of(data.val, train=False, batch_size=2)
    assert equal(batches, all_of(data.val, train=False, batch_size=2, workers=1))
    for (images, targets), (unscaled, same) in zip(batches, plain, strict=True):
        assert [[look.shape[1] for look in image] for image in images] == [[32, 64, 96]] * 2
        assert {look.dtype for image in images for look in image} == {torch.float32}
        assert equal([image[1] for image in images], unscaled) and equal(targets, same)
    assert isinstance(all_of(data.train)[0][0], Tensor)


def test_parts_are_drawn_within_limits():
    image = tv_tensors.Image(torch.zeros(3, 500, 300, dtype=torch.uint8))
    sizes = [tuple(paired.PartOf(384, 600)(image).shape[1:]) for _ in range(60)]
    assert {width for _, width in sizes} == {300}
    heights = {height for height, _ in sizes}
    assert min(heights) >= 384 and max(heights) <= 500 and len(heights) > 20


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_parts_are_resized_as_often_as_asked_for(share):
    """What is resized whole keeps its shape, 1 : 2; of a part at 400 to 600 pixels at most 600 are left."""
    data = OmegaConf.create({"short_side": [40, 48], "long_side": 1333, "hflip": 0.0, "vflip": 0.0})
    task = OmegaConf.create({"jitter": [1, 1], "crop": False, "photometric": False, "precrop": share})
    transform = paired.training(data, task, (1, 1), (0, 0, 0), semantic=False)
    reseed(0)
    whole, kept = 0, []
    for _ in range(60):
        boxes = tv_tensors.BoundingBoxes([[20.0, 10.0, 30.0, 40.0]], format="XYXY", canvas_size=(50, 100))
        image = tv_tensors.Image(torch.zeros(3, 50, 100, dtype=torch.uint8))
        image, target = transform(image, {"boxes": boxes})
        height, width = image.shape[1:]
        assert min(height, width) in (40, 48)
        whole += width == 2 * height
        kept.append(len(target["boxes"]))
        assert (target["boxes"] >= 0).all() and (target["boxes"][:, 2] <= width).all()
    assert {0.0: whole == 60, 0.5: 15 < whole < 45, 1.0: whole == 0}[share]
    assert (0 in kept) == (share > 0)


def test_parts_are_of_images_of_at_most_the_long_side():
    data = OmegaConf.create({"short_side": [480, 800], "long_side": 1333, "hflip": 0.0, "vflip": 0.0})
    task = OmegaConf.create({"jitter": [1, 1], "crop": False, "photometric": False, "precrop": 1.0})
    rescale, _ = paired.training(data, task, (1, 1), (0, 0, 0), semantic=False).transforms[0].transforms
    image = tv_tensors.Image(torch.zeros(3, 30, 120, dtype=torch.uint8))
    assert {tuple(rescale(image).shape) for _ in range(20)} == {(3, 333, 1333)}


@pytest.mark.parametrize("unlabelled", [[], [0, 2]], ids=["labelled", "half of it unlabelled"])
def test_crops_are_capped(unlabelled):
    """One class fills all but a corner: with a cap the crop looks for it. Pixels without a label are no second one."""
    labels = torch.zeros(64, 64, dtype=torch.uint8)
    labels[:24, :24] = 1
    labels.unflatten(1, (16, 4))[:, :, unlabelled] = 255
    image = tv_tensors.Image(labels.expand(3, 64, 64).clone())
    shares = {}
    for cap in (1.0, 0.75):
        reseed(0)
        crop = paired.Crop((32, 32), cap)
        cropped = [crop(image, {"labels": tv_tensors.Mask(labels)})[1]["labels"] for _ in range(60)]
        shares[cap] = np.mean([float((part[part != 255] == 0).float().mean()) < 0.75 for part in cropped])
    assert shares[1.0] < 0.25 < 0.6 < shares[0.75]


COLOURS = torch.randint(256, (3, 8, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
COLOURS[:, 0] = torch.arange(0, 256, 17, dtype=torch.uint8)  # greys, from black to white
COLOURS[1:, 1] = 0


@pytest.mark.parametrize("amount", [-32.0, -7.3, 0.0, 18.6, 32.0])
def test_brightness_is_a_summand(amount):
    expected = np.clip(COLOURS.numpy().astype(np.float32) + np.float32(amount), 0, 255).astype(np.uint8)
    assert np.array_equal(paired.brightened(COLOURS, amount), expected)


@pytest.mark.parametrize("factor", [0.5, 0.83, 1.0, 1.27, 1.5])
def test_contrast_is_a_factor(factor):
    expected = np.clip(COLOURS.numpy().astype(np.float32) * np.float32(factor), 0, 255).astype(np.uint8)
    assert np.array_equal(paired.contrasted(COLOURS, factor), expected)


def by_hsv(change):
    """COLOURS with each pixel's (hue, saturation, value) changed, in double precision."""
    pixels = [colorsys.rgb_to_hsv(*(value / 255 for value in pixel)) for pixel in COLOURS.flatten(1).T.tolist()]
    changed = [[255 * value for value in colorsys.hsv_to_rgb(*change(*pixel))] for pixel in pixels]
    return torch.tensor(changed, dtype=torch.float64).round().to(torch.uint8).T.reshape(COLOURS.shape)


@pytest.mark.parametrize("factor", [0.51, 0.8317, 1.0, 1.2731, 1.49])  # of which none falls between two values
def test_saturation_is_a_factor_on_that_of_hsv(factor):
    expected = by_hsv(lambda hue, saturation, value: (hue, min(1.0, factor * saturation), value))
    assert torch.equal(paired.saturated(COLOURS, factor), expected)


@pytest.mark.parametrize("share", [-0.0973, -0.0413, 0.0, 0.0071, 0.0831])
def test_hue_turns_on_its_circle(share):
    expected = by_hsv(lambda hue, saturation, value: ((hue + share) % 1, saturation, value))
    assert torch.equal(paired.turned(COLOURS, share), expected)


def test_colours_are_distorted_as_mmsegmentation_does():
    """Each of the four half of the time, contrast second or last; labels stay as they are."""
    order = [paired.brightened, paired.contrasted, paired.saturated, paired.turned, paired.contrasted]
    limits = {
        paired.brightened: (-32, 32), paired.contrasted: (0.5, 1.5), paired.saturated: (0.5, 1.5),
        paired.turned: (-0.1, 17 / 180),
    }  # fmt: skip
    reseed(0)
    drawn = [paired.Distort().make_params([])["steps"] for _ in range(2000)]
    amounts = {change: [amount for steps in drawn for kind, amount in steps if kind is change] for change in limits}
    for change, (least, most) in limits.items():
        found, span = amounts[change], most - least
        assert 900 < len(found) < 1100
        assert least <= min(found) < least + 0.02 * span and most - 0.02 * span < max(found) <= most
    kinds = [[kind for kind, _ in steps] for steps in drawn]
    assert {tuple(steps) for steps in kinds} == {
        tuple(kind for kind, bit in zip(order, bits, strict=True) if bit)
        for bits in product((0, 1), repeat=5) if bits[1] + bits[4] < 2
    }  # fmt: skip
    both = [steps for steps in kinds if {paired.contrasted, paired.saturated} <= set(steps)]
    assert 0.4 < fmean(steps.index(paired.contrasted) < steps.index(paired.saturated) for steps in both) < 0.6
    labels = tv_tensors.Mask(torch.arange(128, dtype=torch.uint8).view(8, 16))
    image, target = v2.Compose([paired.Distort()] * 9)(tv_tensors.Image(COLOURS), {"labels": labels})
    assert torch.equal(target["labels"], labels) and not torch.equal(image, COLOURS)
    assert image.dtype == torch.uint8 and isinstance(image, tv_tensors.Image)


def test_pixels_that_a_smaller_image_is_made_of():
    """At a fourth, of the two in the middle, as OpenCV has it; with antialiasing of all."""
    image = tv_tensors.Image(2 * torch.randint(128, (3, 32, 40), dtype=torch.uint8))
    middle = (image[:, 1::4].float() + image[:, 2::4]) / 2
    middle = ((middle[..., 1::4] + middle[..., 2::4]) / 2).as_subclass(Tensor)
    task = OmegaConf.create({"jitter": [1, 1], "crop": False, "photometric": False, "precrop": 0.0})
    for value, plain in ((False, True), (True, False), (None, False), ("older", False)):
        data = OmegaConf.create({"short_side": 8, "long_side": None, "hflip": 0.0, "vflip": 0.0})
        if value != "older":
            data.antialias = value
        boxes = tv_tensors.BoundingBoxes([[0.0, 0.0, 40.0, 32.0]], format="XYXY", canvas_size=(32, 40))
        learned, _ = paired.training(data, task, (1, 1), (0, 0, 0), semantic=False)(image, {"boxes": boxes})
        for found in (learned, paired.evaluation(data)(image)):
            assert ((found.as_subclass(Tensor) - middle).abs().max() <= 0.5) == plain
        data.short_side = None
        parts = paired.training(data, OmegaConf.merge(task, {"precrop": 1.0}), (1, 1), (0, 0, 0), semantic=False)
        assert parts.transforms[0].transforms[0].antialias != plain


def test_sides_are_rounded_half_up():
    rescale = paired.Rescale([512])
    assert rescale(tv_tensors.Image(torch.zeros(3, 1024, 1025, dtype=torch.uint8))).shape == (3, 512, 513)


def test_crops_reach_the_last_column():
    image = tv_tensors.Image(torch.arange(3, dtype=torch.uint8).expand(3, 4, 3).contiguous())
    reseed(0)
    assert {int(paired.Crop((4, 2))(image)[0, 0, 0]) for _ in range(40)} == {0, 1}
