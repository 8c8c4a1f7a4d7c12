"""An evaluation finds the number that training printed; a model says what it sees in an image."""

import json
import math
import shlex
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from omegaconf import OmegaConf
from PIL import Image
from sklearn.datasets import load_digits
from torch._inductor.exc import InductorError, InvalidCxxCompiler

import zoo
from children import PLAIN, SMALL, evaluate_here, lines, note_overrides, succeed, train_here
from recipes import checkpoint, config, console, eval_results, models, weights
from recipes import eval as evaluation
from recipes.config import ConfigError
from recipes.metrics.classification import Metrics
from recipes.metrics.segmentation import Segmentation
from recipes.plots import draw_confusion
from recipes.settings import RunError
from recipes.tasks import segment
from recipes.tasks.classify import Task
from recipes.weights import Kept, find_checkpoint


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("out")
    options = [*SMALL, "train.steps=8", "train.eval_every=0.1", "train.save_every=100", "name=first"]
    train_here(folder, *options)
    note_overrides(folder / "first", options)
    return folder / "first"


def test_finds_the_number_of_the_training(run):
    evaluate_here(f"run={run}")
    found = json.loads((run / "eval.json").read_text())
    best = max((line for line in lines(run) if "val_top1" in line), key=lambda line: line["val_top1"])
    assert {key: found[key] for key in ("top1", "top5", "loss")} == {
        key: best[f"val_{key}"] for key in ("top1", "top5", "loss")
    }
    assert found["images"] == 180 and found["images_per_s"] > 0
    with Image.open(run / "eval.png") as picture:
        assert picture.width > 400


def test_a_run_that_is_older_than_many_keys_is_evaluated(run, tmp_path):
    old = shutil.copytree(run, tmp_path / "old")
    cfg = OmegaConf.load(old / "config.yaml")
    for group, keys in (
        ("hardware", ("parallel", "sync_bn", "timeout")),
        ("data", ("on_bad_image", "max_pixels", "exif_orientation", "cache", "eval_img_size", "real_labels", "subset")),
    ):
        for key in keys:
            del cfg[group][key]
    OmegaConf.save(cfg, old / "config.yaml")
    evaluate_here(f"run={old}")
    evaluate_here(f"run={run}")
    found, whole = (json.loads((folder / "eval.json").read_text()) for folder in (old, run))
    assert all(found[key] == whole[key] for key in ("top1", "loss", "images", "preprocessing"))


def test_a_gpu_without_memory_left_is_explained(run, monkeypatch, tmp_path):
    def filling(*_):
        raise torch.OutOfMemoryError("CUDA out of memory\nof which")

    monkeypatch.setattr(Task, "predict", filling)
    with pytest.raises(RunError, match=r"^out of memory in an evaluation: CUDA out of memory\ngive a smaller data\."):
        evaluate_here(f"run={run}", f"out={tmp_path}")


def test_a_machine_that_cannot_compile_is_explained(run, monkeypatch, tmp_path):
    def uncompiled(*_):
        raise InductorError(InvalidCxxCompiler(), None)

    monkeypatch.setattr(Task, "predict", uncompiled)
    with pytest.raises(RunError, match=r"^torch\.compile could not compile: No working .*\ninstall a compiler"):
        evaluate_here(f"run={run}", f"out={tmp_path}")


def test_what_is_measured_is_written_though_it_cannot_be_printed(run, tmp_path, monkeypatch, capfd):
    with open("/dev/full", "w") as full, monkeypatch.context() as patch:
        patch.setattr(console.CONSOLE, "_file", full)
        patch.setattr(console.CONSOLE, "quiet", False)  # what it is afterwards ends with the test
        evaluate_here(f"run={run}", f"out={tmp_path}")
    assert json.loads((tmp_path / "eval.json").read_text())["images"] == 180 and (tmp_path / "eval.png").exists()
    assert capfd.readouterr().err.count("nothing more is printed") == 1


def test_ctrl_c_ends_an_evaluation_without_a_traceback(run, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluation, "of_run", interrupted)
    monkeypatch.setattr("sys.argv", ["eval.py", f"run={run}"])
    with pytest.raises(SystemExit, match="130"):
        evaluation.main()


def test_a_file_of_the_run_gives_the_same(run, tmp_path):
    evaluate_here(f"run={run}")
    file = find_checkpoint(run).path / "ema.safetensors"
    evaluate_here(*PLAIN, f"checkpoint={file}", f"out={tmp_path / 'there'}")
    there, here = (json.loads((path / "eval.json").read_text()) for path in (tmp_path / "there", run))
    assert (there["top1"], there["loss"]) == (here["top1"], pytest.approx(here["loss"]))


def test_an_evaluation_of_something_else_is_moved(run, tmp_path, capsys, monkeypatch):
    """Of the same thing it is replaced, however its images are fetched."""

    def kept(folder):
        return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}

    evaluate_here(f"run={run}", f"out={tmp_path}", "save_predictions=true")
    first = kept(tmp_path)
    assert first.keys() == {"eval.json", "eval.png", "eval-classes.csv", "eval-images.csv"}
    evaluate_here(f"run={run}", f"out={tmp_path}", "save_predictions=true")
    with monkeypatch.context() as typed:
        typed.setattr(config, "overrides", lambda: ["data.eval_batch_size=90"])
        evaluate_here(f"run={run}", f"out={tmp_path}", "save_predictions=true")
    assert not (tmp_path / "earlier").exists() and "moved" not in capsys.readouterr().out
    first = kept(tmp_path)
    with monkeypatch.context() as typed:
        typed.setattr(config, "overrides", lambda: ["img_size=64"])
        evaluate_here(f"run={run}", f"out={tmp_path}", "img_size=64")
    assert kept(tmp_path / "earlier" / "1") == first and json.loads(kept(tmp_path)["eval.json"])["img_size"] == [64, 64]
    said = "eval-classes.csv, eval-images.csv, eval.json, eval.png moved to"
    assert f"{tmp_path} held another evaluation: {said} {tmp_path / 'earlier' / '1'}" in capsys.readouterr().out
    second = kept(tmp_path)
    evaluate_here(f"run={run}", f"out={tmp_path}")
    assert kept(tmp_path / "earlier" / "1") == first and kept(tmp_path / "earlier" / "2") == second


def test_all_that_a_command_moves_lies_together(tmp_path):
    def record(weights, data):
        return {"weights": weights, "images": 4, "amp": None, "config": {"data.name": data, "data.mean": (0.5,)}}

    def write(data, stems=("a", "b")):
        results = eval_results.Results(tmp_path)
        for stem in stems:
            results.make_way(stem, record(stem, data))
            eval_results.write_json(tmp_path / f"{stem}.json", record(stem, data))
        results.write_list([record(stem, data) for stem in stems])

    write("imagenet")
    write("imagenet", ("b", "a"))
    assert not (tmp_path / "earlier").exists()
    (tmp_path / "a-images.csv").write_text("of imagenet")
    write("imagenet_v2")
    moved = {path.name for path in (tmp_path / "earlier" / "1").iterdir()}
    assert moved == {"a.json", "a-images.csv", "b.json", "eval.json"}
    write("imagenet_v2", ("a",))
    assert [path.name for path in (tmp_path / "earlier" / "2").iterdir()] == ["eval.json"]
    (tmp_path / "eval.json").write_text('{"top1": 1.0}')  # as older versions wrote it
    write("imagenet_v2", ("a",))
    assert (tmp_path / "earlier" / "3" / "eval.json").read_text() == '{"top1": 1.0}'


def test_label_maps_without_a_new_answer_are_moved(tmp_path, capsys):
    """Of images that were renamed, say; all of them stay where no label maps are written."""
    record = {"name": "a", "weights": "a", "images": 2, "amp": None, "config": {}}
    task = SimpleNamespace(picture=lambda *_: None, classes=lambda *_: [])

    def write(*names):
        answers = {f"-labels/{name}": name.encode() for name in names}
        results = eval_results.Results(tmp_path)
        eval_results.Measurement(record, [], task, None, None, answers).write(results, "eval")
        return {path.name for path in (tmp_path / "eval-labels").iterdir()}

    assert write("a.png", "b.png") == write() == {"a.png", "b.png"}
    (tmp_path / "eval-labels" / "notes.txt").touch()
    assert write("b.png", "c.png") == {"b.png", "c.png", "notes.txt"}
    said = f"held maps of images without a new answer: a.png moved to {tmp_path / 'earlier' / '1'}"
    assert f"{tmp_path / 'eval-labels'} {said}" in capsys.readouterr().out
    assert (tmp_path / "earlier" / "1" / "eval-labels" / "a.png").read_bytes() == b"a.png"
    write("b.png", "c.png")
    assert [path.name for path in (tmp_path / "earlier").iterdir()] == ["1"]


def test_numbers_that_json_has_not_are_null(tmp_path):
    """And do not make it another evaluation."""
    record = {
        "weights": "a", "images": 4, "amp": None, "config": {"data.mean": (math.nan, 0.5)}, "loss": math.inf,
    }  # fmt: skip
    eval_results.write_json(tmp_path / "a.json", record)
    text = (tmp_path / "a.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["loss"] is None
    assert json.loads(text) == {**record, "config": {"data.mean": [None, 0.5]}, "loss": None}
    eval_results.Results(tmp_path).make_way("a", record)
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_runs_in_a_list_are_measured_as_they_were_trained(run, tmp_path, capsys):
    """Each as run= does; one that cannot be does not stop the others."""
    evaluate_here(f"run={run}", f"out={tmp_path / 'alone'}")
    file = find_checkpoint(run).path / "ema.safetensors"
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / "config.yaml").write_text("model: {name: test_resnet}\ndata: {source: digits}\n")
    small = ["model=timm", "model.name=test_resnet", "data.val_fraction=0.02", "data.img_size=32"]
    with pytest.raises(RunError, match=r"1 of 3 could not be evaluated or written, see above: .*unfinished"):
        evaluate_here(*small, f"checkpoint=[{unfinished},{run},{file}]", f"out={tmp_path}")
    said = capsys.readouterr().out
    assert f"{unfinished} is not evaluated: {unfinished} has no intact checkpoint yet" in said
    assert "180 images of digits" in said and "36 images of digits" in said
    alone, listed = (json.loads((tmp_path / name).read_text()) for name in ("alone/eval.json", "first.json"))
    timed = {"images_per_s"}
    assert {k: v for k, v in listed.items() if k not in timed} == {k: v for k, v in alone.items() if k not in timed}
    table = json.loads((tmp_path / "eval.json").read_text())
    assert [(one["name"], one["images"]) for one in table] == [("first", 180), ("ema.safetensors", 36)]


def test_an_evaluation_that_cannot_be_written_is_printed(run, tmp_path, capsys):
    """And does not stop the others."""
    (tmp_path / "eval.json").mkdir()
    with pytest.raises(RunError, match=rf"the evaluation could not be written to {tmp_path}: .*give out="):
        evaluate_here(f"run={run}", f"out={tmp_path}")
    assert "first: 180 images of digits" in capsys.readouterr().out
    whole, out = find_checkpoint(run).path / "ema.safetensors", tmp_path / "several"
    files = [shutil.copy(whole, tmp_path / name) for name in ("one.safetensors", "two.safetensors")]
    (out / "one.safetensors.json").mkdir(parents=True)
    with pytest.raises(RunError, match=r"1 of 2 could not be evaluated or written, see above: \S*one\.safetensors$"):
        evaluate_here(*PLAIN, f"checkpoint=[{','.join(map(str, files))}]", f"out={out}")
    table = json.loads((out / "eval.json").read_text())
    assert [one["name"] for one in table] == ["one.safetensors", "two.safetensors"]
    assert "two.safetensors: 180 images of digits" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("how", ["amp=bfloat16", "channels_last=true", "compile=true"])
def test_faster_ways_find_the_same(run, tmp_path, how):
    file = find_checkpoint(run).path / "ema.safetensors"
    given = [*PLAIN, f"checkpoint={file}"]
    evaluate_here(*given, f"out={tmp_path / 'plain'}")
    evaluate_here(*given, f"out={tmp_path / 'faster'}", f"hardware.{how}")
    plain, faster = (json.loads((tmp_path / name / "eval.json").read_text()) for name in ("plain", "faster"))
    assert faster["loss"] == pytest.approx(plain["loss"], rel=0.02) and abs(faster["top1"] - plain["top1"]) < 3
    assert faster["amp"] == ("bfloat16" if how.startswith("amp") else None)


def test_a_speed_with_the_time_to_compile_is_said(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluation.hardware, "compiled", lambda model: model)
    given = [*PLAIN, f"checkpoint={find_checkpoint(run).path / 'ema.safetensors'}"]
    for how, said in (("false", False), ("true", True)):
        evaluate_here(*given, f"out={tmp_path / how}", f"hardware.compile={how}")
        assert ("note: images_per_s includes the time to compile the model" in capsys.readouterr().out) == said


def test_predict_names_the_classes(run, tmp_path, capsys):
    digit = Image.fromarray((load_digits().images[3] * 15).astype("uint8"))
    digit.resize((120, 90)).save(tmp_path / "cat 1.png")
    names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    recorded = json.loads((run / "data.json").read_text())
    (run / "data.json").write_text(json.dumps({**recorded, "class_names": names}))
    evaluate_here(f"run={run}", config.quote("predict", str(tmp_path / "cat 1.png")))
    (run / "data.json").write_text(json.dumps(recorded))
    said = capsys.readouterr().out
    assert sum(f"│ {name} " in said for name in names) == 5 and said.count("%") == 5
    shares = [float(word) for word in said.replace("│", " ").split() if word.replace(".", "").isdigit() and "." in word]
    assert shares == sorted(shares, reverse=True) and sum(shares) < 101


def test_predict_names_the_first_image_that_is_rotated(run, tmp_path, capsys):
    for name, orientation in (("a", 1), ("b", 6), ("c", 3)):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.new("RGB", (40, 30)).save(tmp_path / f"{name}.jpg", exif=exif)
    evaluate_here(f"run={run}", f"predict={tmp_path}")
    said = capsys.readouterr().out
    assert said.count("which is not applied") == 1 and f"{tmp_path / 'b.jpg'} has the EXIF orientation 6" in said


def test_predict_refuses_what_is_no_image(run, tmp_path):
    (tmp_path / "text.jpg").write_text("no image")
    with pytest.raises(RuntimeError, match=r"cannot read the image .*text\.jpg"):
        evaluate_here(f"run={run}", f"predict={tmp_path / 'text.jpg'}")


def test_run_without_a_checkpoint(tmp_path):
    (tmp_path / "config.yaml").write_text("model: {name: test_resnet}\ndata: {source: digits}\n")
    with pytest.raises(RunError, match="has no intact checkpoint yet"):
        evaluate_here(f"run={tmp_path}")


def test_data_of_other_classes(run):
    recorded = (run / "data.json").read_text()
    (run / "data.json").write_text(json.dumps({**json.loads(recorded), "num_classes": 9}))
    with pytest.raises(RunError, match=r"cannot be evaluated on data=digits: the run has 9 classes .* the data 10 \("):
        evaluate_here(f"run={run}")
    (run / "data.json").write_text(recorded)


def test_weights_of_another_shape(run):
    checkpoint = find_checkpoint(run)
    said = r"have other shapes than the requested model.*: size mismatch for weight: .*\. And 1 more$"
    with pytest.raises(RunError, match=said):
        tensors = {"weight": torch.zeros(3, 5), "bias": torch.zeros(4)}
        evaluation._fill(torch.nn.Linear(2, 3), Kept(checkpoint, "ema", tensors))


def test_a_run_with_tables_is_measured_at_another_size(tmp_path, capsys, monkeypatch):
    """They are interpolated, as those of its file are; the images are prepared as the run's were."""
    small = ["model=maxvit_t", "model.depths=[1,1,1,1]", "model.dims=[32,32,32,32]", "model.stem_dim=32"]
    prepared = ["data.mean=[0.1,0.1,0.1]", "data.crop_pct=0.7"]
    cut = ["data.batch_size=8", "data.val_fraction=0.02", "data.workers=0", "train.steps=1", "train.ema=null"]
    given = [*small, *cut, *prepared, "data.img_size=32"]
    train_here(tmp_path, *given, "name=tables")
    note_overrides(tmp_path / "tables", given)
    with monkeypatch.context() as typed:
        typed.setattr(config, "overrides", lambda: ["img_size=64"])
        evaluate_here(f"run={tmp_path / 'tables'}", "img_size=64", f"out={tmp_path / 'run'}")
    file = find_checkpoint(tmp_path / "tables").path / "model.safetensors"
    data = ["data=digits", "data.val_fraction=0.02", *prepared, "img_size=64", "data.workers=0"]
    evaluate_here(f"checkpoint={file}", *small, *data, f"out={tmp_path / 'file'}")
    assert capsys.readouterr().out.count("interpolated") == 2
    one, other = (json.loads((tmp_path / name / "eval.json").read_text()) for name in ("run", "file"))
    assert one["img_size"] == [64, 64] and one["preprocessing"]["crop_pct"] == 0.7
    assert one["loss"] == other["loss"] and one["preprocessing"] == other["preprocessing"]


@pytest.mark.parametrize("classes", [0, 7])
def test_a_folder_of_other_classes_is_not_measured(tmp_path, monkeypatch, classes):
    """Its classifier would be a new one, whose figures are chance; nor does it predict the classes of named data."""
    folder = zoo.save_for_hf(timm.create_model("test_resnet", num_classes=classes), tmp_path / "shared")
    has = "are for 7 classes" if classes else "have no classifier"
    for asked in ([], ["data=digits", config.quote("predict", str(tmp_path))]):
        monkeypatch.setattr(config, "overrides", lambda asked=asked: asked)
        Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
        with pytest.raises(
            ConfigError, match=rf"shared {has}, so a new one for 10 .*: there is nothing to evaluate\. Give"
        ):
            evaluate_here(f"checkpoint={folder}", *asked, f"out={tmp_path}")


def test_a_backbone_alone_is_not_measured():
    cfg = config.compose(
        ["model=gcvit_t", "model.pretrained=true", "task=segment", "data=ade20k", "data.root=x"], "eval"
    )
    with pytest.raises(
        ConfigError, match=r"gcvit_t are of a backbone, so its upernet starts from scratch: there is no"
    ):
        models._check_answers(torch.nn.Identity(), cfg)


def test_metrics_count_every_image_once():
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(37, 8, generator=generator), torch.randint(8, (37,), generator=generator)
    metrics = Metrics(8)
    for part, truth in zip(logits.split(10), labels.split(10), strict=True):
        metrics.update(part, truth)
    ranks = (logits > logits.gather(1, labels[:, None])).sum(1)
    values = metrics.compute()
    assert values["top1"] == pytest.approx(100 * (ranks < 1).double().mean().item(), abs=1e-3)
    assert values["top5"] == pytest.approx(100 * (ranks < 5).double().mean().item(), abs=1e-3)
    losses = -logits.double().log_softmax(1).gather(1, labels[:, None])
    assert values["loss"] == pytest.approx(losses.mean().item())


def test_tables_of_segmenters_say_what_is_in_the_mean():
    metrics = Segmentation(["ant", "bee", "sky"], left_out=(2,))
    found = torch.nn.functional.one_hot(torch.tensor([[0, 0, 1, 2], [1, 1, 2, 2]]), 3).permute(2, 0, 1).float()
    metrics.update([found], [{"labels": torch.tensor([[0, 1, 1, 2], [1, 1, 0, 2]])}])
    data = SimpleNamespace(class_names=metrics.names, left_out=metrics.left_out)
    rows = segment.Task(OmegaConf.create()).classes(data, metrics)
    counted = [row["iou"] for row in rows if row["in_mean"]]
    assert len(counted) == 2 and sum(counted) / 2 == pytest.approx(metrics.compute()["miou"], abs=1e-3)


def test_an_image_that_has_no_loss_is_not_left_out():
    logits = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    logits[3] = torch.nan
    metrics = Metrics(6)
    metrics.update(logits, torch.zeros(8, dtype=torch.int64))
    assert metrics.compute()["loss"] == torch.inf


def test_few_classes_have_no_top5():
    metrics = Metrics(3)
    metrics.update(torch.eye(3), torch.tensor([0, 1, 1]))
    assert metrics.compute().keys() == {"top1", "loss"}
    assert metrics.compute()["top1"] == pytest.approx(66.6667)


@pytest.mark.parametrize("classes", [2, 10, 100, 1000])
def test_confusion_picture(tmp_path, classes):
    counts = torch.eye(classes, dtype=torch.long) * 20
    counts[1, 0] = 30  # one pair is mistaken often: it must be seen
    draw_confusion(tmp_path / "c.png", counts, [f"class {i}" for i in range(classes)])
    before = (tmp_path / "c.png").read_bytes()
    counts[1, 0] = 0
    draw_confusion(tmp_path / "c.png", counts, [f"class {i}" for i in range(classes)])
    with Image.open(tmp_path / "c.png") as picture:
        assert 400 < picture.width < 1500
    assert before != (tmp_path / "c.png").read_bytes()


@pytest.mark.slow
def test_the_default_run_learns_to_read_with_its_attention(tmp_path):
    began = time.monotonic()
    output = succeed("train.py", "model=maxvit_t", cwd=tmp_path)
    (run,) = (tmp_path / "runs").iterdir()
    best = max((line for line in lines(run) if "val_top1" in line), key=lambda line: line["val_top1"])
    print(f"{time.monotonic() - began:.0f} s, {max(line['step'] for line in lines(run))} steps, {best}")
    assert best["val_top1"] > 90 and max(line["step"] for line in lines(run)) <= 250
    command = output.split("evaluate with: python ")[1].splitlines()[0]
    assert f"{best['val_top1']:.2f} %" in succeed(*shlex.split(command), cwd=tmp_path)
    assert change_without_attention(run) > 0.01


def change_without_attention(run: Path) -> float:
    """How far the logits move, relative to their norm, when all attention branches of the trained model give zero."""
    task = Task(OmegaConf.load(run / "config.yaml"))
    data = task.build_data()
    model = task.build_model(data, pretrained=False)
    model.load_state_dict(find_checkpoint(run).tensors("ema"))
    model.eval()
    images = torch.stack([data.val.sample(index, 0)[0] for index in range(64)])
    attentions = [module for module in model.modules() if hasattr(module, "qkv")]
    assert len(attentions) == 22  # a window and a grid attention in each of 2 + 2 + 5 + 2 blocks
    with torch.no_grad():
        whole = model(images)
        for module in attentions:
            module.proj.weight.zero_()
            module.proj.bias.zero_()
        return ((model(images) - whole).norm() / whole.norm()).item()


def test_the_table_of_several_keeps_their_names(capsys):
    """On 80 characters, which is what a file or a pipe gets."""
    names = [f"maxvit_t-of-the-{kind}-run.pth" for kind in ("first", "second")]
    figures = {"top1": 80.0, "top1_interval": (79.0, 81.0), "loss": 1.0, "images_per_s": 9.0, "published": 83.7}
    records = [
        {"name": n, "model": "maxvit_t_tv.tv_in1k", "img_size": [224, 224], "difference": 1, **figures} for n in names
    ]
    eval_results.show(records, ["top1", "loss", "images_per_s"], "9 images")
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    assert "".join(row[0] for row in rows if row) == "".join(names)


@pytest.mark.parametrize(
    ("sides", "said"),
    [({}, "512x512"), ({"short_side": 512, "long_side": 2048}, "512/2048"), ({"short_side": [480, 800]}, "800/")],
)
def test_the_table_of_several_has_the_size_that_images_get(capsys, sides, said):
    """Not that of windows, into which images of dense tasks are not resized."""
    record = {"name": "a.pth", "model": "nat_m", "img_size": [512, 512], "miou": 40.0, "preprocessing": sides}
    eval_results.show([record, record], ["miou"], "9 images")
    rows = [line.split("│") for line in capsys.readouterr().out.splitlines() if "nat_m" in line]
    assert [row[3].strip() for row in rows] == [said] * 2


def test_of_five_classes_all_would_be_among_the_first_five():
    assert set(Metrics(5).top) == {1} and set(Metrics(6).top) == {1, 5}


def test_a_step_that_cannot_be_read_is_said(run, monkeypatch):
    def damaged(*_):
        raise checkpoint.CheckpointError("sharded/__0_0.distcp is damaged")

    monkeypatch.setattr(checkpoint.Checkpoint, "tensors", damaged)
    with pytest.raises(RunError, match=r"__0_0\.distcp is damaged"):
        evaluate_here(f"run={run}")
    with pytest.raises(RunError, match=r"__0_0\.distcp is damaged"):
        weights.of_run(str(run))
