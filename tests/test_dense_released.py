"""Released segmenters and detectors through eval.py: backbone, head and sizes are found from the file.

The data are made of what the model itself finds, so that only the right model, built and fed rightly, finds it again.
"""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as tools
from safetensors.torch import save_file
from torchvision.transforms.v2 import functional as F

import zoo
from children import evaluate_here
from recipes import config, eval_dense_models, papers, predict_weights
from recipes.config import ConfigError
from recipes.task import create
from test_eval_models import find
from zoo.heads import detector, segmenter
from zoo.heads.recognise import recognise_dense
from zoo.releases import RELEASES, candidates

SIZES = ((64, 96), (75, 53))  # (height, width)
AS_THEY_ARE = ["data.short_side=null", "data.long_side=null", "data.img_size=64", "data.workers=0"]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def save(model, path, changes=()):
    """The model as a file in the published names, which it then loads itself: rounding is the same."""
    state = model.layouts()[0].to_theirs(model.state_dict()) | dict(changes)
    torch.save({"state_dict": state, "meta": {"CLASSES": ("a",)}}, path)
    zoo.load_checkpoint(model, path)
    return path


def pictures(folder):
    folder.mkdir(parents=True)
    rng, found = np.random.default_rng(0), []
    for number, size in enumerate(SIZES):
        coarse = rng.integers(0, 255, (6, 7, 3)).astype(np.uint8)
        image = Image.fromarray(coarse).resize(size[::-1], Image.Resampling.BICUBIC)
        image.save(folder / f"{number}.png")
        found.append(F.normalize(F.pil_to_tensor(image).float() / 255, MEAN, STD))
    return found


@pytest.fixture(scope="module")
def ade(tmp_path_factory):
    """A DiNAT with UPerNet, dilated for segmentation; images of ADE20K's layout that it has labelled."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("ade")
    model = segmenter("dinat_m", 150, channels=32, dilations="segmentation").eval()
    path = save(model, root / "upernet_dinat_mini.pth")
    (root / "annotations" / "validation").mkdir(parents=True)
    for number, image in enumerate(pictures(root / "images" / "validation")):
        with torch.no_grad():
            labels = model(image[None]).argmax(1)[0]
        assert len(labels.unique()) > 3
        Image.fromarray((labels + 1).numpy().astype(np.uint8)).save(
            root / "annotations" / "validation" / f"{number}.png"
        )
    names = "".join(f"thing {number}\n" for number in range(150))
    (root / "objectInfo150.txt").write_text(names)
    return root, path


def measured(tmp_path, *overrides):
    evaluate_here(*overrides, *AS_THEY_ARE, f"out={tmp_path}")
    return json.loads((tmp_path / "eval.json").read_text())


def test_a_segmenter_is_found_from_its_file(ade, tmp_path, capsys):
    root, path = ade
    here = [f"checkpoint={path}", "task=segment", "data=ade20k", f"data.root={root}", "data.image_suffix=.png"]
    found = measured(tmp_path, *here)
    assert found["model"] == "dinat_m" and found["miou"] > 99.9 and found["images"] == 2
    assert "published" not in found  # which is of short sides of 512
    assert found["preprocessing"]["antialias"] is False
    said = " ".join(capsys.readouterr().out.split())
    assert "is evaluated as upernet on dinat_m, UPerNet 160k of SHI-Labs" in said
    other = measured(tmp_path, *here, "model=dinat_m", "model.dilations=1")
    assert other["miou"] < 90  # what is asked for goes before what is usual


def test_a_segmenter_without_its_name_or_for_other_data(ade, tmp_path):
    root, path = ade
    unnamed = path.rename(root / "weights.pth")
    try:
        with pytest.raises(
            ConfigError, match=r"the backbone of .*dinat_m.* which differ only in what has no weights.*model="
        ):
            find(unnamed, "task=segment", "data=ade20k")
        cfg = find(unnamed, "task=segment", "data=ade20k", "model=dinat_m").cfg
        assert cfg.model.dilations == "segmentation" and cfg.task.channels == 32 and cfg.task.auxiliary
        with pytest.raises(ConfigError, match="holds upernet for 150 classes: expected task=segment"):
            find(unnamed, "task=detect")
        with pytest.raises(ConfigError, match=r"nothing to evaluate. Give the data that it was trained for"):
            measured(tmp_path, f"checkpoint={unnamed}", "task=segment", "model=dinat_m", "data.val_count=2")
    finally:
        unnamed.rename(path)


def renamed(path, meta):
    """The file with other metadata."""
    torch.save(torch.load(path, weights_only=True) | {"meta": meta}, path)
    return path


def test_a_segmenter_predicts_without_its_data(ade, tmp_path, capsys, monkeypatch):
    root, path = ade
    image, given = root / "images" / "validation" / "1.png", [f"checkpoint={path}", "task=segment", *AS_THEY_ARE]
    classes = set(np.unique(np.array(Image.open(root / "annotations" / "validation" / "1.png"))) - 1)

    def named(*typed):
        monkeypatch.setattr(config, "overrides", lambda: [*given, *typed])
        evaluate_here(*given, *typed, f"predict={image}", f"out={tmp_path}")
        said = capsys.readouterr().out
        rows = [line.split("│")[1].strip() for line in said.splitlines() if "│" in line]
        return rows, (tmp_path / "1-found.png").read_bytes(), said

    rows, picture, said = named("data=ade20k")
    assert set(map(int, rows)) == classes and "nothing names the 150 classes" in said  # a single name is none for them
    assert named()[:2] == (rows, picture)
    there, seen, _ = named("data=ade20k", f"data.root={root}", "data.image_suffix=.png")
    assert there == [f"thing {row}" for row in rows] and seen == picture
    try:
        for meta in ({"CLASSES": list("abc") * 50}, {"dataset_meta": {"classes": tuple("abc" * 50)}}):
            renamed(path, meta)
            assert named("data=ade20k")[0] == ["abc"[int(row) % 3] for row in rows]
        assert named("data=masks", f"data.class_names={list('xyz' * 50)}")[0] == ["xyz"[int(row) % 3] for row in rows]
        with pytest.raises(ConfigError, match=r"data.class_names has 2 names, and the model 150 classes"):
            named("data=masks", "data.class_names=[sky,ground]")
    finally:
        renamed(path, {"CLASSES": ("a",)})


def test_images_are_resized_as_published_where_no_data_is_named(ade, tmp_path, capsys):
    def sides(path, *typed):
        cfg = predict_weights.configuration(config.compose([f"checkpoint={path}", *typed], "eval"), str(path))
        return cfg.data.short_side, cfg.data.long_side, cfg.data.antialias, cfg.data.mean

    root, path = ade
    assert sides(path, "task=segment") == (512, 2048, False, None)
    for head in DETECTORS:
        assert sides(of_detector(head, tmp_path)[1], "task=detect") == (800, 1333, False, None)
    said = "images are not resized: give data.short_side= and data.long_side="
    assert said not in capsys.readouterr().out
    unnamed = path.rename(root / "weights.pth")
    try:
        assert sides(unnamed, "task=segment", "model=dinat_m") == (None, None, False, None)
    finally:
        unnamed.rename(path)
    assert said in capsys.readouterr().out


@pytest.mark.parametrize("typed", [(), ("model.dilations=segmentation",)])
def test_training_from_a_released_file_says_what_no_weight_shows(typed, tmp_path, capsys):
    """DiNAT's segmenters have other dilations than its classifiers, and the same tensors."""
    path = save(segmenter("dinat_m", 150, channels=8, dilations="segmentation"), tmp_path / "upernet_dinat_mini.pth")
    given = ["model=dinat_m", "task=segment", "task.head=upernet", "task.channels=8", "data.val_count=2", *typed]
    task = create(config.compose([*given, "data.train_count=4", "data.batch_size=4", f"model.checkpoint={path}"]))
    model = task.build_model(task.build_data())
    said = "is from a model with model.dilations=segmentation, which this one is built without: give it"
    assert (said in capsys.readouterr().out) == (not typed) and model.num_classes == 11


@pytest.mark.parametrize("typed", [(), ("+model.windows=[0,0,4,1]",)])
def test_training_from_a_released_file_says_what_its_name_tells(typed, tmp_path, capsys):
    """LITv2's faster detectors have other windows, and the same tensors."""
    _, path = of_detector("retinanet", tmp_path)
    given = ["model=litv2_s", "task=detect", "task.head=retinanet", "task.channels=16", "data.val_count=2", *typed]
    task = create(config.compose([*given, "data.train_count=4", "data.batch_size=4", f"model.checkpoint={path}"]))
    task.build_model(task.build_data())
    said = "is from a model with +model.windows=[0,0,4,1], which this one is built without: give it as well"
    assert (said in capsys.readouterr().out) == (not typed)


def test_a_classifier_that_predicts_nothing_may_be_new_in_an_evaluation(tmp_path, capsys):
    given = ["task=segment", "task.head=fcn", "task.channels=8", "data.val_count=2", "model=timm"]
    model = segmenter("test_resnet", 11, head="fcn", channels=8)
    state = model.state_dict()
    del state["auxiliary_head.classifier.weight"], state["auxiliary_head.classifier.bias"]
    torch.save(state, tmp_path / "own.pth")
    cfg = config.compose([*given, "model.name=test_resnet", f"model.checkpoint={tmp_path / 'own.pth'}"], "eval")
    task = create(cfg)
    task.build_model(task.build_data())
    said = "not in the file for 11 classes, and newly initialised: auxiliary_head.classifier"
    assert said in " ".join(capsys.readouterr().out.split())
    del state["decode_head.classifier.weight"], state["decode_head.classifier.bias"]
    torch.save(state, tmp_path / "own.pth")
    with pytest.raises(ConfigError, match="no classifier for 11 classes in the file"):
        task.build_model(task.build_data())


def of_gcvit(folder, **windows):
    """A segmenter's file."""
    return save(segmenter("gcvit_xxt", 150, head="fcn", channels=8, auxiliary=False, **windows), folder / "fcn.pth")


def said_in_training(path, capsys, *typed):
    given = ["model=gcvit_xxt", "task=segment", "task.head=fcn", "task.channels=8", "task.auxiliary=false", *typed]
    task = create(config.compose([*given, "data.train_count=4", "data.val_count=2", f"model.checkpoint={path}"]))
    task.build_model(task.build_data())
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ({"img_size": 224}, {"img_size": 224, "window_size": None}),
        ({"window_size": (12, 12, 24, 12)}, {"img_size": None, "window_size": [12, 12, 24, 12]}),
        ({"window_size": 24}, {"img_size": None, "window_size": 24}),
    ],
    ids=str,
)
def test_windows_are_those_of_the_file(given, shown, tmp_path):
    """Not those for the data's images; what is asked for goes before."""
    path = of_gcvit(tmp_path, **given)
    here = find(path, "task=segment", "data=ade20k").cfg.model
    assert {key: here.get(key) for key in shown} == shown
    for typed, asked in (("model.img_size=64", {"img_size": 64}), ("+model.window_size=5", {"window_size": 5})):
        other = find(path, "task=segment", "data=ade20k", typed).cfg.model
        assert {key: other.get(key) for key in shown} == {"img_size": None, "window_size": None} | asked


def test_training_from_other_windows_says_so(tmp_path, capsys):
    path, said = (
        of_gcvit(tmp_path, img_size=224),
        "is from a model with model.img_size=224, which this one is built without",
    )
    assert said in said_in_training(path, capsys)  # windows for the data's images of 64 pixels
    for same in ("data.img_size=224", "model.img_size=224", "model.img_size=222", "+model.window_size=[7,7,14,7]"):
        assert "built without" not in said_in_training(path, capsys, same), same
    assert "built without" not in said_in_training(path, capsys, "model.img_size=64")  # asked for
    path, said = (
        of_gcvit(tmp_path, window_size=24),
        "is from a model with +model.window_size=24, which this one is built without",
    )
    for other in ("data.img_size=64", "model.img_size=224"):
        assert said in said_in_training(path, capsys, other), other
    for asked in ("+model.window_size=24", "+model.window_size=5", "model.img_size=64"):
        assert "built without" not in said_in_training(path, capsys, asked), asked


def test_windows_that_the_file_does_not_say(tmp_path, capsys):
    path = of_gcvit(tmp_path, window_size=24, rel_pos_bias=False)
    said = r"the backbone of .*; the windows are not in it: give window_size=, here as \+model.window_size="
    for typed in ((), ("model.img_size=384",)):
        with pytest.raises(ConfigError, match=said):
            find(path, "task=segment", "data=ade20k", *typed)
    here = find(path, "task=segment", "data=ade20k", "+model.window_size=24").cfg.model
    assert (here.rel_pos_bias, here.window_size) == (False, 24)
    assert "here as +model.window_size=" in said_in_training(path, capsys, "+model.rel_pos_bias=false")
    assert "here as" not in said_in_training(path, capsys, "+model.rel_pos_bias=false", "+model.window_size=24")


def test_a_file_in_our_names_is_said_to_need_its_sizes(tmp_path):
    """Among them the channels, which a run's recipe sets and the file does not say."""
    path = tmp_path / "ema.safetensors"
    save_file(segmenter("nat_m", 3, head="semantic_fpn", channels=16).state_dict(), path)
    with pytest.raises(ConfigError, match=r"model=<backbone> task.head=<head> task.channels=.* run=runs/<name>"):
        find(path, "task=segment", "data=ade20k")


def test_published_figures_of_dense_models(ade):
    _, path = ade
    assert find(path, "task=segment", "data=ade20k").published() == 45.8
    for other in (
        "data.short_side=640",
        "task.flip=true",
        "task.inference=slide",
        "data=voc",
        "data.antialias=true",
        "data.side_multiple=32",
    ):
        assert find(path, "task=segment", "data=ade20k", other).published() is None, other
    for dilations, figure in (("segmentation", 45.8), ("1", None)):
        typed = find(path, "task=segment", "data=ade20k", "model=dinat_m", f"model.dilations={dilations}")
        assert typed.published() == figure, dilations


def test_published_figures_are_of_images_as_in_the_recipes():
    for task, word in (("segment", "segmentation"), ("detect", "detection")):
        for model in {model for phase in papers.tables(task).values() for model in phase["models"]}:
            values = papers.recipe(model, task=task).values
            short = values["data.short_side"]
            sides = short if isinstance(short, int) else max(short or [0]), values["data.long_side"]
            for release in candidates(model, "official", task=word):
                assert eval_dense_models.sides(release) == sides, release


@pytest.mark.parametrize(("model", "figure"), [("dinat_l", 54.0), ("dinats_l", 53.4)])
def test_large_models_whose_configurations_are_named_otherwise(model, figure):
    (release,) = candidates(model, "official", task="segmentation")
    cfg = config.compose(
        [f"model={model}", "task=segment", "data=ade20k", "data.root=x", "data.antialias=false"], "eval"
    )
    assert eval_dense_models.published(cfg, release) == figure
    cfg.data.short_side = 640
    assert eval_dense_models.published(cfg, release) is None


DETECTORS = {
    "mask_rcnn": ("nat_m", "nat_mini_maskrcnn.pth", 46.5),
    "retinanet": ("litv2_s", "retinanet_litv2_s_fpn_1x_coco_ws_4.pth", 43.7),
}


def of_detector(head, folder):
    """A detector in a file of mmdetection's names, sure enough of what it finds."""
    torch.manual_seed(1)
    name, file, _ = DETECTORS[head]
    own = {"windows": (0, 0, 4, 1)} if name.startswith("litv2") else {}
    model = detector(name, 3, head=head, channels=16, **own).eval()
    sure = {"bbox_head.retina_cls.bias": torch.zeros(27)} if head == "retinanet" else {}
    return model, save(model, folder / file, sure)


def annotate(model, root):
    """What the model finds, as COCO's file of what is there."""
    names = [{"id": label, "name": f"thing {label}"} for label in (2, 5, 9)]
    images, things = [], []
    for number, image in enumerate(pictures(root / "val2017")):
        with torch.no_grad():
            found = model([image])[0]
        assert len(found["boxes"]) > 20
        height, width = image.shape[1:]
        images.append({"id": number, "file_name": f"{number}.png", "height": height, "width": width})
        masks = found["masks"][:, 0] >= 0.5 if "masks" in found else torch.ones(len(found["boxes"]), height, width)
        rows = zip(found["boxes"].double(), found["labels"].tolist(), masks, strict=True)
        for box, label, mask in rows:
            code = tools.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))
            size = (box[2:] - box[:2]).tolist()
            things.append({
                "id": len(things) + 1, "image_id": number, "category_id": names[label]["id"], "iscrowd": 0,
                "bbox": [*box[:2].tolist(), *size], "area": size[0] * size[1],
                "segmentation": {"size": [height, width], "counts": code["counts"].decode()},
            })  # fmt: skip
    (root / "annotations").mkdir()
    content = {"images": images, "annotations": things, "categories": names}
    (root / "annotations" / "instances_val2017.json").write_text(json.dumps(content))


@pytest.mark.parametrize("head", [pytest.param("mask_rcnn", marks=pytest.mark.slow), "retinanet"])
def test_a_detector_is_found_from_its_file(head, tmp_path, capsys):
    """Its published figure is of images of 800 to 1333 pixels: for LITv2 only its authors' configurations say so."""
    model, path = of_detector(head, tmp_path)
    annotate(model, tmp_path)
    here = [f"checkpoint={path}", "task=detect", "data=coco", f"data.root={tmp_path}"]
    found = measured(tmp_path / "out", *here)
    assert found["model"] == DETECTORS[head][0] and found["box_ap"] > 99
    assert ("mask_ap" in found) == (head == "mask_rcnn") and found.get("mask_ap", 99) > 60
    assert f"is evaluated as {head} on {DETECTORS[head][0]}" in " ".join(capsys.readouterr().out.split())
    evaluated = find(path, "task=detect", "data=coco")
    assert evaluated.published() == DETECTORS[head][2] and evaluated.cfg.data.antialias is False
    assert find(path, "task=detect", "data=coco", "data.antialias=true").published() is None
    assert evaluated.cfg.model.get("windows") == ([0, 0, 4, 1] if head == "retinanet" else None)


def test_a_detector_predicts_without_its_data(tmp_path, capsys):
    _, path = of_detector("retinanet", tmp_path)
    renamed(path, {"CLASSES": ("cat", "dog", "bird")})
    pictures(tmp_path / "photos")
    for data in ([], ["data=coco"]):
        given = [f"checkpoint={path}", "task=detect", *data, *AS_THEY_ARE[:2]]
        evaluate_here(*given, f"predict={tmp_path / 'photos'}", f"out={tmp_path / 'found'}")
        said = capsys.readouterr().out
        assert "litv2_s" in said and {"cat", "dog", "bird"} & set(said.split())
    assert sorted(file.name for file in (tmp_path / "found").iterdir()) == ["0-found.png", "1-found.png"]


def test_classes_that_no_tensor_shows(tmp_path):
    """Of a detector in our names; a segmenter's classifier shows them."""
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    save_file(detector("test_resnet", 3, head="fcos", channels=32).state_dict(), tmp_path / "own.safetensors")
    given = [f"checkpoint={tmp_path / 'own.safetensors'}", "model=timm", "model.name=test_resnet", "task.channels=32"]
    given += [f"predict={tmp_path / 'a.png'}", f"out={tmp_path}"]
    with pytest.raises(ConfigError, match=r"own.safetensors does not show how many classes .* give model.num_classes="):
        evaluate_here(*given, "task=detect", "task.head=fcos")
    evaluate_here(*given, "task=detect", "task.head=fcos", "model.num_classes=3")
    save_file(segmenter("test_resnet", 3, head="fcn", channels=32).state_dict(), tmp_path / "own.safetensors")
    evaluate_here(*given, "task=segment", "task.head=fcn")


def test_names_of_mask_rcnn_as_published():
    """Neck and heads as mmdetection names them; those of RetinaNet and of segmenters are held to records."""
    model = detector("resnet18", 80, head="mask_rcnn", channels=16)
    names = {key: list(value.shape) for key, value in model.layouts()[0].to_theirs(model.state_dict()).items()}
    modules = {key.rpartition(".")[0] for key in names if not key.startswith("backbone.")}
    assert modules == {
        *(f"neck.{convs}.{i}.conv" for convs in ("lateral_convs", "fpn_convs") for i in range(4)),
        *(f"rpn_head.rpn_{part}" for part in ("conv", "cls", "reg")),
        *(f"roi_head.bbox_head.{part}" for part in ("shared_fcs.0", "shared_fcs.1", "fc_cls", "fc_reg")),
        *(f"roi_head.mask_head.convs.{i}.conv" for i in range(4)),
        *(f"roi_head.mask_head.{part}" for part in ("upsample", "conv_logits")),
    }
    assert names["roi_head.bbox_head.fc_cls.weight"] == [81, 1024] and names["roi_head.bbox_head.fc_reg.bias"] == [320]
    assert names["roi_head.mask_head.conv_logits.weight"] == [80, 256, 1, 1]


def test_rows_whose_heads_no_one_compared_say_so():
    for release in RELEASES:
        if release.task == "detection" and not release.foreign:
            assert ("were never compared" in release.note) == release.method.startswith("Cascade")


def test_what_is_in_files():
    """Names and shapes suffice; what is in neither library's names is nothing."""
    for head, options in (("upernet", {"auxiliary": False}), ("semantic_fpn", {}), ("fcn", {"auxiliary": True})):
        model = segmenter("resnet18", 7, head=head, channels=24, **options)
        found = recognise_dense(model.layouts()[0].to_theirs(model.state_dict()))
        assert (found.task, found.head, found.classes, found.options["channels"]) == ("segment", head, 7, 24)
        assert found.options.get("auxiliary", False) == options.get("auxiliary", False)
        assert found.backbone.candidates == () and found.arguments("resnet18") == {}
    for head in ("mask_rcnn", "faster_rcnn", "cascade_mask_rcnn", "retinanet"):
        model = detector("resnet18", 7, head=head, channels=24)
        found = recognise_dense(model.layouts()[0].to_theirs(model.state_dict()))
        assert (found.task, found.head, found.classes, found.options) == ("detect", head, 7, {"channels": 24})
    assert recognise_dense(model.state_dict()) is None
