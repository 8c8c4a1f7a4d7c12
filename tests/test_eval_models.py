"""Released weights through eval.py: the model found from the file, its release's preprocessing, what was published."""

import csv
import json
import shutil
import warnings
import weakref
from functools import cache
from multiprocessing import active_children

import numpy as np
import pytest
import timm
import torch
from omegaconf import OmegaConf
from PIL import Image
from timm.data import create_transform, resolve_data_config

import golden
import zoo
from children import evaluate_here
from families import BUILT_WITH, RECORDS
from golden_cases import is_dense
from ranks import on_ranks
from recipes import config, eval_dense_models, eval_models, eval_results
from recipes import eval as evaluation
from recipes.config import ConfigError
from recipes.config.quoting import written
from recipes.data import DataError, imagenet
from recipes.data.build import preprocessing
from recipes.settings import RunError
from zoo import beside, fetch, releases

FAST = ("torchvision_maxvit_t_224x224", "gc_vit_xxtiny_224x224", "nat_mini_224x224")
CLASSIFIERS = [stem for stem in RECORDS if not is_dense(stem)]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A validation set of ImageNet's shape: photographs of several sizes in folders named by synset."""
    root, rng = tmp_path_factory.mktemp("imagenet"), np.random.default_rng(0)
    for index, size in ((3, (300, 260)), (77, (250, 400)), (501, (224, 224)), (980, (500, 500))):
        folder = root / "val" / imagenet.synsets()[index]
        folder.mkdir(parents=True)
        coarse = rng.integers(0, 255, (9, 8, 3)).astype(np.uint8)
        Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(folder / "a.png")
    return root


def released(folder, stem, name=None):
    """The record's weights as a file in the layout that it was published in."""
    path = folder / (name or f"{stem}.pth")
    torch.save({"model": golden.official_state_dict(golden.load(golden.FOLDER / f"{stem}.json"))}, path)
    return path


def alone(stem, path, images):
    """The likeliest class of each image and its probability, by timm alone: its transform, its loading of the file."""
    built = BUILT_WITH.get(stem, {})
    model = timm.create_model(
        RECORDS[stem], pretrained=True, pretrained_cfg_overlay={"file": str(path)}, **built
    ).eval()
    named = json.loads((path.parent / "o" / "eval.json").read_text())["model"]
    cfg = timm.get_pretrained_cfg(named).to_dict()
    if "img_size" in built:
        cfg["input_size"] = (3, *size_of(built["img_size"]))
    transform = create_transform(**resolve_data_config(pretrained_cfg=cfg))
    pixels = torch.stack([transform(Image.open(file).convert("RGB")) for file in sorted(images.rglob("*.png"))])
    with torch.no_grad():
        shares = model(pixels).softmax(-1)
    return shares.max(-1)


def size_of(size):
    return (size, size) if isinstance(size, int) else size


def overrides_of(built):
    """How eval.py is told what a record was built with."""
    own = {"img_size" if key == "img_size" else f"model.{key}": value for key, value in built.items()}
    return [f"{key}={list(size_of(value))}" if key == "img_size" else f"{key}={value}" for key, value in own.items()]


@pytest.mark.parametrize("stem", [pytest.param(s, marks=() if s in FAST else pytest.mark.slow) for s in CLASSIFIERS])
def test_every_record(tmp_path, stem, images):
    path = released(tmp_path, stem)
    given = f"model={RECORDS[stem]}"  # some are alike but for what has no weights
    evaluate_here(
        *(f"checkpoint={path}", given, "data=imagenet", f"data.root={images}"),
        *(f"out={tmp_path / 'o'}", "save_predictions=true", *overrides_of(BUILT_WITH.get(stem, {}))),
    )
    with open(tmp_path / "o" / "eval-images.csv") as file:
        rows = list(csv.DictReader(file))
    best = alone(stem, path, images)
    assert [int(row["class1"]) for row in rows] == best.indices.tolist()
    assert [float(row["share1"]) for row in rows] == pytest.approx(best.values.tolist(), abs=2e-4)
    assert [int(row["label"]) for row in rows] == [3, 77, 501, 980]


def test_tables_agree_on_a_subset(tmp_path, images):
    """One image a class: what it is mistaken for is its likeliest class."""
    root, chosen = tmp_path / "imagenet-a", imagenet.subset(OmegaConf.create({"subset": "a"}))
    photos = sorted(images.rglob("*.png"))
    for index, photo in zip(chosen, photos, strict=False):
        (root / imagenet.synsets()[index]).mkdir(parents=True)
        shutil.copy(photo, root / imagenet.synsets()[index])
    model = ["model=timm", "model.name=test_resnet", "img_size=32"]
    evaluated(tmp_path, *model, "data=imagenet_a", f"data.root={root}", "save_predictions=true")
    with open(tmp_path / "eval-images.csv") as file, open(tmp_path / "eval-classes.csv") as other:
        rows, classes = list(csv.DictReader(file)), [row for row in csv.DictReader(other) if row["images"] == "1"]
    assert [int(row["label"]) for row in rows] == [int(row["class"]) for row in classes] == list(chosen[: len(photos)])
    names = [imagenet.class_names()[int(row["class1"])] for row in rows]
    assert names == [row["mistaken_for"] or row["name"] for row in classes]


def evaluated(tmp_path, *overrides):
    evaluate_here(*overrides, f"out={tmp_path}")
    return json.loads((tmp_path / "eval.json").read_text())


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Two files, named after nothing: of GC ViT's authors and of timm's port."""
    folder = tmp_path_factory.mktemp("files")
    released(folder, "gc_vit_xxtiny_224x224", "one.pth")
    state = golden.official_state_dict(golden.load(golden.FOLDER / "timm_gcvit_xxtiny_224x224.json"))
    torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}}, folder / "two.pt")
    return folder


def test_the_model_is_found_and_the_published_figure_named(tmp_path, small, images, capsys):
    found = evaluated(tmp_path, f"checkpoint={small / 'one.pth'}", "data=imagenet", f"data.root={images}")
    assert found["model"] == "gcvit_xxt.nvidia_in1k" and found["published"] == 79.9
    assert found["difference"] == pytest.approx(found["top1"] - 79.9)
    assert found["preprocessing"]["crop_pct"] == 1.0
    low, high = found["top1_interval"]
    assert low <= found["top1"] <= high and high - low > 40  # four images say little
    said = capsys.readouterr().out
    assert "published" in said and "79.90 %" in said and "996 of the 1000 classes have no image" in said


def test_otherwise_measured_is_not_compared(tmp_path, small, images):
    here = (f"checkpoint={small / 'one.pth'}", "data=imagenet", f"data.root={images}")
    found = evaluated(tmp_path, *here, "img_size=288")
    assert found["img_size"] == [288, 288] and "published" not in found
    assert "published" not in evaluated(tmp_path, *here, "data.crop_pct=0.8")
    assert "published" not in evaluated(tmp_path, *here[::2], f"data.root={images}", "data=imagenet_v2")


def saved(path, name, /, **built):
    """A model of timm as its own file."""
    torch.save(timm.create_model(name, **built).state_dict(), path)
    return path


def test_a_file_of_other_windows_is_no_release(tmp_path, images, capsys):
    """It is evaluated at its own size, which the tables show, and beside no figure."""
    path = saved(tmp_path / "mine.pth", "gcvit_xxtiny", img_size=256)
    found = evaluated(tmp_path, f"checkpoint={path}", "data=imagenet", f"data.root={images}")
    assert (found["model"], found["img_size"]) == ("gcvit_xxt", [256, 256]) and "published" not in found
    said = " ".join(capsys.readouterr().out.split())
    assert "is evaluated as gcvit_xxt with model.img_size=256; it matches no known release" in said
    assert "interpolated" not in said
    named = tmp_path / "gcvit_xxtiny_224_nvidia-d1d86009.pth"  # as the release is
    path.rename(named)
    for given in ([], ["model=gcvit_xxt"], ["model=timm", "model.name=gcvit_xxt.timm_in1k"]):
        here = find(named, *given, "data=imagenet")
        assert (here.cfg.model.img_size, here.release) == (256, None), given
    for asked in ("img_size=224", "model.img_size=224", "+model.window_size=7"):  # its tables are then interpolated
        here = find(named, asked, "data=imagenet")
        assert preprocessing(here.cfg).size == (224, 224) and here.release is here.published() is None, asked


@pytest.mark.parametrize(
    ("name", "built", "model", "shown"),
    [
        ("maxvit_tiny_tf_224", {"img_size": (224, 320)}, "maxvit_t", {"img_size": [224, 320]}),
        ("gcvit_xxt", {"window_size": (3, (3, 4), 5, 4)}, "gcvit_xxt", {"window_size": [3, [3, 4], 5, 4]}),
        ("maxvit_t_tv", {"window_size": 3, "grid_size": 5}, "maxvit_t_tv", {"window_size": 3, "grid_size": 5}),
        ("nat_s", {"window_size": 9}, "nat_s", {"window_size": 9}),
        ("vitrpb_s", {"img_size": (384, 320)}, "vitrpb_s", {"img_size": [384, 320]}),
    ],
)
def test_windows_are_those_of_the_file(tmp_path, name, built, model, shown):
    found = find(saved(tmp_path / "mine.pth", name, **built), "data=imagenet")
    assert found.cfg.model.name == model and found.published() is None
    assert {key: found.cfg.model[key] for key in shown} == shown
    assert preprocessing(found.cfg).size == tuple(shown.get("img_size", (224, 224)))


def test_a_file_for_images_of_one_channel(tmp_path, images):
    path = saved(tmp_path / "mine.pth", "gcvit_xxt", in_chans=1)
    with pytest.raises(ConfigError, match=r"model\.in_chans=1: all images have three .* give a file of a model"):
        evaluated(tmp_path, f"checkpoint={path}", "data=imagenet", f"data.root={images}")


def test_windows_that_the_file_does_not_show(tmp_path):
    path = saved(tmp_path / "mine.pth", "gcvit_xxt", window_size=24, rel_pos_bias=False)
    with pytest.raises(
        ConfigError, match=r"the windows are not in it: give window_size=, here as \+model.window_size="
    ):
        find(path)
    model = find(path, "+model.window_size=24").cfg.model
    assert (model.rel_pos_bias, model.window_size) == (False, 24)


def test_files_beside_which_their_model_is_described(tmp_path):
    """No tensor of DaViT shows its windows."""
    model = timm.create_model("davit_t", depths=(1, 1, 1, 1), window_size=5)
    folder = zoo.save_for_hf(model, tmp_path / "shared")
    assert find(folder / "model.safetensors").cfg.model.name == f"local-dir:{folder}"
    run = tmp_path / "run"
    file = run / "checkpoints" / "best-00000001" / "ema.safetensors"
    file.parent.mkdir(parents=True)
    shutil.copy(folder / "model.safetensors", file)
    about = {"num_classes": 1000, "img_size": [224, 224]}
    (run / "data.json").write_text(json.dumps(about))
    given = {"name": "davit_t", "depths": [1, 1, 1, 1], "window_size": 5}
    (run / "config.yaml").write_text(json.dumps({"model": given, "data": {"mean": None, "std": None}}))
    with pytest.raises(ConfigError, match=rf"ema.safetensors is of a run, .*: give run={run}, or name the model"):
        find(file)
    options = [f"model.{key}={written(value)}" for key, value in given.items() if key != "name"]
    assert find(file, "model=davit_t", *options).cfg.model.window_size == 5


def test_the_licence_of_what_a_file_is_taken_for(tmp_path, small, images, monkeypatch):
    """Whatever its name; not again where loading knows it by its name, nor for a file of no release."""
    monkeypatch.setattr(fetch, "_warned", set())
    with pytest.warns(zoo.LicenceWarning, match=r"gcvit_xxt\.nvidia_in1k: the licence of these weights"):
        find(small / "one.pth")
    fetch._warned.clear()
    path = shutil.copy(small / "one.pth", tmp_path / "gcvit_1k_xxtiny.pth.tar")
    with pytest.warns() as record:
        evaluated(tmp_path, f"checkpoint={path}", "data=imagenet", f"data.root={images}")
    assert [warning.category for warning in record].count(zoo.LicenceWarning) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        find(saved(tmp_path / "mine.pth", "gcvit_xxtiny", img_size=256))
        find(saved(tmp_path / "mine.pth", "gcvit_xxtiny", num_classes=7))


def test_published_figures_belong_to_one_of_two_kinds_of_weights(tmp_path, small):
    """Of a file that has both; one that has only an average is what was published."""
    state = torch.load(small / "one.pth")["model"]
    torch.save({"state_dict": state, "state_dict_ema": state}, tmp_path / "both.pth")
    torch.save({"state_dict_ema": state}, tmp_path / "ema.pth")
    found = {
        (name, kind): find(tmp_path / f"{name}.pth", "data=imagenet", f"weights={kind}").published()
        for name, kind in (("both", "auto"), ("both", "raw"), ("both", "ema"), ("ema", "auto"), ("ema", "ema"))
    }
    assert {case for case in found if found[case] is None} == {("both", "ema")} and 79.9 in found.values()


def test_several_become_one_table(tmp_path, small, images, capsys):
    (tmp_path / "broken.pth").write_bytes(b"not a checkpoint at all")
    for file in small.iterdir():
        shutil.copy(file, tmp_path)
    out = tmp_path / "out"
    with pytest.raises(RunError, match=r"1 of 3 could not be evaluated or written, see above: .*broken.pth"):
        evaluate_here(f"checkpoint={tmp_path}", "data=imagenet", f"data.root={images}", f"out={out}")
    table = json.loads((out / "eval.json").read_text())
    assert {row["name"] for row in table} == {"one.pth", "two.pt"}
    assert {row["model"] for row in table} == {"gcvit_xxt.nvidia_in1k", "gcvit_xxt.timm_in1k"}
    assert [row["top1"] for row in table] == sorted((row["top1"] for row in table), reverse=True)
    assert {path.name for path in out.iterdir()} >= {"one.pth.json", "two.pt.json", "one.pth-classes.csv", "two.pt.png"}
    assert "broken.pth is not evaluated" in capsys.readouterr().out


def test_nothing_is_left_of_what_is_measured(tmp_path, small, images, monkeypatch):
    """Neither processes that read images nor the data itself, when the next one is prepared."""
    before, measured_with, left = active_children(), [], []
    prepared, show = evaluation.prepared, eval_results.Measurement.show

    def noted(cfg):
        left.extend(source() for source in measured_with if source() is not None)
        machine, task, data = prepared(cfg)
        measured_with.append(weakref.ref(data.val))
        return machine, task, data

    def shown(self):
        left.extend(child for child in active_children() if child not in before)
        show(self)

    monkeypatch.setattr(evaluation, "prepared", noted)
    monkeypatch.setattr(eval_results.Measurement, "show", shown)
    here = ("data=imagenet", f"data.root={images}", "data.workers=1", f"out={tmp_path}")
    evaluate_here(f"checkpoint={small}", *here)
    assert len(measured_with) == 2 and not left


def test_three_processes_answer_as_one(tmp_path, small, images):
    """Four images: each process has at most two, and none is counted twice."""
    given = (f"checkpoint={small / 'one.pth'}", "data=imagenet", f"data.root={images}", "save_predictions=true")
    evaluate_here(*given, f"out={tmp_path / 'alone'}")
    assert on_ranks(3, evaluate_here, *given, f"out={tmp_path / 'many'}") == [None] * 3
    alone, many = (json.loads((tmp_path / name / "eval.json").read_text()) for name in ("alone", "many"))
    timed = {"images_per_s", "loss"}
    assert {k: v for k, v in many.items() if k not in timed} == {k: v for k, v in alone.items() if k not in timed}
    assert many["loss"] == pytest.approx(alone["loss"], rel=1e-6)
    for file in ("eval-classes.csv", "eval-images.csv"):
        assert (tmp_path / "many" / file).read_text() == (tmp_path / "alone" / file).read_text()


def test_files_of_one_name_are_kept_apart(tmp_path, small, images):
    for folder in ("first", "second"):
        (tmp_path / folder).mkdir()
        shutil.copy(small / "one.pth", tmp_path / folder / "model.pth")
    both = ",".join(str(tmp_path / folder / "model.pth") for folder in ("first", "second"))
    evaluate_here(f"checkpoint=[{both},{both}]", "data=imagenet", f"data.root={images}", f"out={tmp_path / 'out'}")
    kept = [path.name for path in (tmp_path / "out").glob("*model.pth.json")]
    table = json.loads((tmp_path / "out" / "eval.json").read_text())
    assert len({row["name"] for row in table}) == len(table) == len(kept) == 2
    assert {name.split("-")[-2] for name in kept} == {"first", "second"}


def test_tables_call_files_by_what_tells_them_apart(tmp_path):
    def made(*paths):
        for path in paths:
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).touch()
        return [str(tmp_path / path) for path in paths]

    assert eval_models.names(made("one/a.pth", "two/b.pth")) == ["a.pth", "b.pth"]
    runs = made("a/x/checkpoints/best/model.safetensors", "b/x/checkpoints/best/model.safetensors")
    assert eval_models.names([*runs, "davit_t.timm_msft_in1k"]) == ["a", "b", "davit_t.timm_msft_in1k"]
    assert eval_models.names(made("a/m.pth", "b/m.pth", "b/n.pth")) == ["a/m.pth", "b/m.pth", "b/n.pth"]
    assert eval_models.names(made("m.pth", "a/m.pth")) == ["m.pth", "a/m.pth"]


def test_stems_of_results_differ(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here" / "a").mkdir(parents=True)
    for path in ("m.pth", "here/m.pth", "here/a/m.pth", "here/eval"):
        (tmp_path / path).touch()
    monkeypatch.chdir(tmp_path / "here")
    assert eval_models.stems(["../m.pth", "m.pth", "./a/m.pth"]) == ["m.pth", "m.pth-2", "a-m.pth"]
    whole = f"{tmp_path}/here/m.pth".lstrip("/")
    (tmp_path / "here" / whole).parent.mkdir(parents=True)
    (tmp_path / "here" / whole).touch()
    name = whole.replace("/", "-")
    assert eval_models.stems([f"/{whole}", whole]) == [name, f"{name}-2"]
    assert eval_models.stems(["a", "hf-hub:timm/b", "eval"]) == ["a", "hf-hub-timm-b", "eval-2"]  # eval.json: the table
    named = ["x-objects-2", "x", "eval-objects-2", "y-objects"]  # x-objects.json: what x finds
    assert eval_models.stems(["x-objects", "x", "eval-objects", "y-objects"]) == named
    assert max(map(len, eval_models.stems([f"{300 * 'x'}/a", f"{300 * 'y'}/a"]))) == 255 - len("-objects.json")


def find(source, *overrides):
    cfg = config.compose([config.quote("checkpoint", str(source)), *overrides], "eval")
    return eval_models.find(cfg, *eval_models.sources(cfg))


def test_files_that_are_alike_are_told_apart_by_name(tmp_path):
    with pytest.raises(ConfigError, match=r"dinat_m.* which differ only in what has no weights.*Name a model with"):
        find(released(tmp_path, "nat_mini_224x224", "weights.pth"))
    found = find(released(tmp_path, "nat_mini_224x224", "dinat_mini_in1k_224 (1).pth"))
    assert found.cfg.model.name == "dinat_m.shilabs_in1k" and found.release.top1 == 81.8
    assert found.published() is None  # of digits
    for dilations, figure in (("classification", 81.8), ("1", None)):
        typed = find(found.cfg.model.checkpoint, "data=imagenet", "model=dinat_m", f"model.dilations={dilations}")
        assert typed.published() == figure, dilations
    assert find(tmp_path / "weights.pth", "model=nat_m").cfg.model.name == "nat_m.shilabs_in1k"


def test_names_of_releases_and_of_the_hub():
    for source in ("davit_t.timm_msft_in1k", "hf-hub:timm/davit_tiny.msft_in1k", "timm/davit_tiny.msft_in1k"):
        found = find(source)
        assert found.cfg.model.name == "davit_t.timm_msft_in1k" and found.cfg.model.pretrained
        assert found.cfg.model.checkpoint is None and round(found.release.top1, 2) == 82.69
    assert find("hf-hub:timm/resnet18.a1_in1k").cfg.model.name == "hf-hub:timm/resnet18.a1_in1k"


def test_addresses_say_how_they_want_their_images(tmp_path, images, monkeypatch):
    """Not as ImageNet's are by default: sizes, colours and crops of a shared model are its own."""
    own = {"input_size": (3, 64, 96), "mean": (0.1, 0.2, 0.3), "std": (0.5, 0.5, 0.5), "crop_pct": 1.0}
    model = timm.create_model("test_resnet", num_classes=1000)
    folder = zoo.save_for_hf(model, tmp_path / "shared", data_config=own | {"interpolation": "bilinear"})
    out = tmp_path / "out"
    assert eval_models.sources(OmegaConf.create({"checkpoint": str(folder)})) == [f"local-dir:{folder}"]
    (tmp_path / "shared-by-another").mkdir()
    (tmp_path / "shared-by-another" / "config.json").write_text('{"architectures": ["X"]}')
    with pytest.raises(ConfigError, match="contains no file of weights"):
        find(tmp_path / "shared-by-another")
    evaluate_here(f"checkpoint={folder}", "data=imagenet", f"data.root={images}", f"out={out}")
    found = json.loads((out / "eval.json").read_text())
    prep = found["preprocessing"]
    assert found["img_size"] == [64, 96] and prep["mean"] == [0.1, 0.2, 0.3] and prep["std"] == [0.5] * 3
    assert (prep["crop_pct"], prep["interpolation"]) == (1.0, "bilinear")
    monkeypatch.setattr(beside, "load_model_config_from_hf", lambda place: ({"mean": (0.5,) * 3}, place, {}))
    cfg = find("hf-hub:someone/something").cfg
    assert preprocessing(cfg).mean == (0.5,) * 3
    cfg.model.name = f"local-dir:{tmp_path}"
    with pytest.raises(DataError, match=r"is unknown: Config file not found"):
        preprocessing(cfg)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("davit_t.timm_msft", r"is not a file, folder or release \(did you mean davit_t.timm_msft_in1k"),
        ("nowhere.pth", r"nowhere.pth is not a file, folder or release"),
    ],
)
def test_names_of_nothing(source, said):
    with pytest.raises(ConfigError, match=said):
        find(source)


def test_folders_without_weights(tmp_path):
    with pytest.raises(ConfigError, match="contains no file of weights"):
        find(tmp_path)
    (tmp_path / "config.yaml").write_text("model: {}")
    with pytest.raises(ConfigError, match=r"is a run folder: give run="):
        find(tmp_path)


def test_nothing_given():
    with pytest.raises(ConfigError, match=r"nothing to evaluate: give run=runs/<name>, checkpoint=<file>"):
        config.compose(["data=digits"], "eval")
    with pytest.raises(ConfigError, match=r"to train, name one"):
        config.compose(["model=auto"])


def test_other_families_and_dense_files(tmp_path, images):
    torch.save({"a.weight": torch.zeros(2, 2), "a.bias": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(ConfigError, match=r"is not a model of the zoo. Name a model with model="):
        find(tmp_path / "other.pth")
    state = {f"net.{key}": value for key, value in timm.create_model("gcvit_xxt").state_dict().items()}
    torch.save(state, tmp_path / "alone.ckpt")
    assert find(tmp_path / "alone.ckpt").cfg.model.name == "gcvit_xxt"
    torch.save(state | {"loss.weight": torch.ones(10)}, tmp_path / "lightning.ckpt")
    with pytest.raises(ConfigError, match=r"part 'net' is gcvit_xxt.*zoo\.convert .*\.ckpt OUT --part net extracts it"):
        find(tmp_path / "lightning.ckpt")
    names = ("decode_head.convs.0.conv.weight", "decode_head.conv_seg.bias")
    torch.save(state | dict.fromkeys(names, torch.zeros(2)), tmp_path / "segmenter.pth")
    with pytest.raises(ConfigError, match=r"holds a backbone with fcn: evaluate it with task=segment"):
        find(tmp_path / "segmenter.pth")
    path = released(tmp_path, "seg_litv2_s_250x318")
    with pytest.raises(
        ConfigError, match=r"no classifier for 1000 classes.*left out: feature_norms.*nothing to evaluate"
    ):
        evaluate_here(f"checkpoint={path}", "data=imagenet", f"data.root={images}")


def test_interval_is_wilsons():
    # Newcombe 1998, Two-sided confidence intervals for the single proportion, table I, method 3
    for right, count, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)):
        found = eval_results.interval(100 * right / count, count)
        assert [end / 100 for end in found] == pytest.approx([low, high], abs=1e-4)
    for count in range(1, 50):  # no share is below none or above all
        ends = eval_results.interval(0.0, count)[0], eval_results.interval(100.0, count)[1]
        assert [f"{end:.2f}" for end in ends] == ["0.00", "100.00"]


def test_published_figures_belong_to_a_preprocessing():
    composed = cache(lambda model: config.compose([f"model={model}", "checkpoint=x", "data=imagenet"], "eval"))
    for name, release in eval_models.LOADABLE.items():
        if release.top1 is not None:
            cfg = OmegaConf.merge(composed(release.model))  # a copy
            cfg.model.name = name
            evaluated_model = eval_models.EvaluatedModel(name, cfg, release)
            assert evaluated_model.published() == release.top1
            for key, value in (("subset", "a"), ("real_labels", True)):
                cfg.data[key], usual = value, cfg.data[key]
                assert evaluated_model.published() is None
                cfg.data[key] = usual


def test_published_figures_of_segmenters_are_means_over_all_classes():
    release = next(r for r in releases.RELEASES if r.benchmark == "ADE20K" and r.task == "segmentation")
    sides = [f"data.short_side={release.img_size}", f"data.long_side={4 * release.img_size}", "data.antialias=false"]
    cfg = config.compose([f"model={release.model}", "task=segment", "data=ade20k", "data.root=x", *sides], "eval")
    assert eval_dense_models.published(cfg, release) == release.metrics["miou"]
    cfg.data.left_out = ["wall"]
    assert eval_dense_models.published(cfg, release) is None
