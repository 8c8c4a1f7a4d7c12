"""How dense images are looked at and measured: in windows, several times, one by one, at their own sizes."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf

from children import evaluate_here, train_here
from dense_cases import TASKS, TINY, mask, picture
from recipes import config, hardware
from recipes.evaluate import evaluate
from recipes.task import create
from recipes.tasks import detect, segment


def test_what_is_found_does_not_depend_on_the_batch():
    """Images of other sizes beside it would be filled up to its size, or it to theirs."""
    task = detect.Task(config.compose([*TASKS["detect"], *TINY]))
    model = task.build_model(task.build_data()).eval()
    model.heads.score_thresh = 0.0
    images = [
        torch.rand(3, *size, generator=torch.Generator().manual_seed(0)) for size in ((64, 64), (96, 37), (64, 64))
    ]
    with torch.no_grad():
        together, alone = task.predict(model, images), [task.predict(model, [image])[0] for image in images]
    for one, other, image in zip(together, alone, images, strict=True):
        assert one["size"] == image.shape[1:] and len(one["boxes"]) == len(other["boxes"]) > 10
        torch.testing.assert_close(one["boxes"], other["boxes"], rtol=1e-4, atol=1e-3)


def test_masks_are_left_in_their_boxes():
    """At the images' own size they are pasted later, one by one: all at once take 5 MB an object at 1333 x 1000."""
    task = detect.Task(config.compose([*TASKS["masks"], "task.channels=16", *TINY]))
    model = task.build_model(task.build_data()).eval()
    with torch.no_grad():
        found = task.predict(model, [torch.rand(3, 64, 80, generator=torch.Generator().manual_seed(0))])[0]
    assert "masks" not in found and found["box_masks"].shape == (len(found["boxes"]), 1, 28, 28)


def test_dense_images_are_measured_one_by_one(monkeypatch):
    """Whatever the recipe, unless the data, which may be small, or a person says another number."""
    sizes = []
    for given in (["recipe=finetune", "data.eval_batch_size=null"], ["recipe=quick"], ["data.eval_batch_size=3"]):
        task = segment.Task(config.compose([*TASKS["segment"], *TINY[:5], "data.workers=0", *given]))
        monkeypatch.setattr(
            task,
            "predict",
            lambda model, images: sizes.append(len(images)) or [torch.zeros(11, 64, 64)] * len(images),
        )
        evaluate(task.cfg, task, torch.nn.Identity(), task.build_data(), hardware.setup(task.cfg))
    assert sizes == [1] * 7 + [7] + [3, 3, 1]
    for recipe in ("finetune", "paper"):
        for case in (["task=segment", "data=ade20k"], ["task=detect", "data=coco"]):
            cfg = config.compose(["model=dinat_t", f"recipe={recipe}", *case])
            assert cfg.data.eval_batch_size is None and create(cfg).eval_batch_size == 1
    assert create(config.compose([])).eval_batch_size == 128


def test_classes_of_which_nothing_is_there_are_named(tmp_path, capsys):
    """Masks of 0 and 255, say, in which all that is labelled is one class: its IoU alone would be 100 %."""
    for split in ("train", "val"):
        for name in "ab":
            picture(tmp_path / "images" / split / f"{name}.jpg", (64, 64))
            mask(tmp_path / "masks" / split / f"{name}.png", (0, 255), (64, 64))
    data = ["data=masks", f"data.root={tmp_path}", "data.class_names=[ground,thing]"]
    tiny = [text for text in TINY if "count" not in text and "batch_size" not in text]
    train_here(tmp_path / "out", "task=segment", *tiny, *data, "data.batch_size=2", "task.head=fcn", "name=two")
    said = "note: 1 of the 2 classes (thing) have no pixel in the validation set"
    assert capsys.readouterr().out.count(said) == 1  # of the first evaluation
    evaluate_here(f"run={tmp_path / 'out' / 'two'}", f"out={tmp_path}")
    said += ": whether the model finds them is not evaluated. 255 in a mask means unlabelled"
    assert f"{said}, unless data.label_ids names it, as [0,255] does" in capsys.readouterr().out


def test_training_masks_without_a_label_are_named():
    """Whose loss is 0, as that of a model which makes no mistake."""
    cfg = config.compose(["task=segment", *TINY])
    task, data = create(cfg), SimpleNamespace(class_names=["a", "b"], num_classes=2, left_out=())
    metrics = task.metrics(data)
    metrics.confusion.update(torch.arange(2), torch.arange(2))
    assert task.remarks(data, metrics) == []  # of an evaluation alone
    for labels, said in ((255, "no pixel of the training images so far is labelled, all are 255"), (1, None)):
        task.loss(lambda images, targets: {"loss": images.sum()}, torch.zeros(1), torch.full((1, 2, 2), labels), draw=0)
        assert [remark[: len(said or "")] for remark in task.remarks(data, metrics)] == ([said] if said else [])


def test_categories_of_which_nothing_is_there_are_named():
    cfg = config.compose(["task=detect", *TINY])
    task, data = create(cfg), SimpleNamespace(class_names=[*"abcdefg"], num_classes=7)
    metrics = task.metrics(data)
    metrics.values = {"box_ap": 5.0, "box_ap/b": 5.0}
    assert task.remarks(data, metrics)[0].startswith(
        "6 of the 7 classes (a, c, d, e, f and 1 more) have no object in the"
    )
    metrics.values |= {f"box_ap/{name}": 0.0 for name in "acdefg"}
    assert task.remarks(data, metrics) == []


def test_ways_to_look_at_an_image():
    """A window as large as the image, and one scale, are the whole image; other ways are other numbers."""
    cfg = config.compose([*TASKS["segment"], *TINY])
    task, images = segment.Task(cfg), [torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))] * 2
    model = task.build_model(task.build_data()).eval()
    found = {}
    for name, changes in (("whole", {}), ("one", {"inference": "slide"}), ("slide", {"inference": "slide"}),
                          ("flip", {"flip": True}), ("scales", {"scales": [0.5, 1.0]})):  # fmt: skip
        task.cfg = OmegaConf.merge(cfg, {"task": changes, "data": {"img_size": 40 if name == "slide" else 64}})
        with torch.no_grad():
            logits = task.predict(model, images)
        assert len(logits) == 2 and logits[0].shape == (11, 64, 64)
        found[name] = logits[0].softmax(0)
    assert torch.allclose(found["whole"], found["one"], atol=1e-6)
    for name in ("slide", "flip", "scales"):
        assert not torch.allclose(found["whole"], found[name], atol=1e-4), name


def test_several_looks_are_averaged_at_the_images_own_sizes():
    """As mmsegmentation: the logits of each are enlarged, twice, then made shares, and these averaged."""
    task = segment.Task(config.compose([*TASKS["segment"], *TINY, "task.scales=[0.5,1.5]", "task.flip=true"]))
    model = task.build_model(task.build_data()).eval()
    images = [torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    sizes = [(90, 130), (41, 64)]

    def enlarged(maps, size):
        return F.interpolate(maps, size, mode="bilinear", align_corners=False)

    with torch.no_grad():
        found = task.predict_with(model, images, [{"size": list(size)} for size in sizes])
        for logits, image, size in zip(found, images, sizes, strict=True):
            shares = []
            for side in (32, 96):
                seen = enlarged(image[None], (side, side))
                for logit in (model(seen), model(seen.flip(-1)).flip(-1)):
                    shares.append(enlarged(enlarged(logit, (side, side)), size).softmax(1))
            torch.testing.assert_close(logits.exp(), torch.cat(shares).mean(0))
        alike = task.predict_with(model, images, [{"size": (90, 130)}] * 2)
        torch.testing.assert_close(alike[0], found[0])
        assert [logits.shape for logits in task.predict(model, images)] == [(11, 64, 64)] * 2
        task.cfg.task.update({"scales": [1.0], "flip": False})
        assert task.predict_with(model, images, [{"size": size} for size in sizes])[0].shape == (11, 64, 64)


@pytest.mark.parametrize(("inference", "side", "windows"), [("whole", 64, 1), ("slide", 40, 4)])
def test_an_evaluation_enlarges_no_image_that_it_made_smaller(inference, side, windows):
    """Images of 64 pixels, seen at 32 by one scale: at two of them the model sees them, or windows, as they are."""
    cfg = config.compose([*TASKS["segment"], *TINY, "task.flip=true"])
    cfg = OmegaConf.merge(cfg, {"data": {"short_side": 32}, "task": {"scales": [1.0, 2.0], "inference": inference}})
    task, seen = create(cfg), []
    data = task.build_data()
    task.cfg = OmegaConf.merge(cfg, {"data": {"img_size": side}})

    class Watched(torch.nn.Module):
        def forward(self, images):
            seen.append(images)
            return images.new_zeros(len(images), 11, *images.shape[2:])

    evaluate(cfg, task, Watched(), data, hardware.setup(cfg))
    image = data.val.image(0)
    whole = data.val.normalize(image)
    assert [tuple(images.shape) for images in seen[:3]] == [(2, 3, 32, 32)] * 2 + [(2, 3, side, side)]
    assert torch.equal(seen[2][0], whole[:, :side, :side])
    assert torch.equal(seen[2 + windows][0], whole.flip(-1)[:, :side, :side])
    images = task.prepare(image)  # a person's own image is looked at alike
    assert torch.equal(images[0][0], seen[0][0]) and torch.equal(images[0][1], whole)
    assert task.predict(Watched(), images)[0].shape == (11, 64, 64)


def test_looks_of_several_sizes_are_averaged():
    """Whether images are seen together, being of one size, or apart."""
    task = segment.Task(config.compose([*TASKS["segment"], *TINY, "task.scales=[0.5,1.5]", "task.flip=true"]))
    model, seen = task.build_model(task.build_data()).eval(), torch.Generator().manual_seed(0)
    one, two, wide = (
        [torch.rand(3, *size, generator=seen) for size in ((32, width), (96, 96))] for width in (32, 32, 40)
    )

    def expected(looks):
        ways = [(model(look[None]), model(look[None].flip(-1)).flip(-1)) for look in looks]
        at_sizes = (
            F.interpolate(logits, look.shape[1:], mode="bilinear", align_corners=False)
            for look, both in zip(looks, ways, strict=True)
            for logits in both
        )
        large = [F.interpolate(logits, (90, 130), mode="bilinear", align_corners=False) for logits in at_sizes]
        return torch.cat(large).softmax(1).mean(0)

    with torch.no_grad():
        for images in ([one, two], [one, wide]):
            found = task.predict_with(model, images, [{"size": (90, 130)}] * 2)
            for logits, looks in zip(found, images, strict=True):
                torch.testing.assert_close(logits.exp(), expected(looks))
