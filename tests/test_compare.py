"""`python -m recipes.compare`: several runs side by side, their scores, seeds, speeds and what tells them apart."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from PIL import Image

from children import lines, rendered
from recipes import compare, log, provenance
from recipes.plots import draw_together


def test_runs_side_by_side(two_runs, tmp_path, capsys):
    (two_runs / "no run").mkdir()
    (two_runs / "broken").mkdir()
    (two_runs / "broken" / "config.yaml").write_text("{")
    compare.main([*map(str, sorted(two_runs.iterdir())), "--out", str(tmp_path / "both.png")])
    said = capsys.readouterr().out
    assert f"left out: {two_runs / 'no run'} holds no run" in said
    assert f"left out: config.yaml in {two_runs / 'broken'} is not a run's configuration" in said
    rows = compare.readable([two_runs / "one", two_runs / "two"])
    assert rows[0].value >= rows[1].value
    assert compare.different(rows) == ["seed", "optim.lr"]
    text = rendered(compare.table(compare.named(rows), ["seed", "optim.lr"]))
    assert "0.01" in text and all(f"{row.value:.2f}" in text for row in rows)
    with Image.open(tmp_path / "both.png") as picture:
        assert picture.width > 600 and len(picture.getcolors(1 << 20)) > 20


def test_copies_of_a_run_are_no_seeds_and_its_speed_is_the_median(two_runs, tmp_path):
    copy = shutil.copytree(two_runs / "one", tmp_path / "copy")
    with (copy / "metrics.jsonl").open("a") as file:
        for speed in (9e9, 7.0, 5.0, 1.0, 2e9):
            file.write(json.dumps({"step": 6, "loss": 1.0, "images_per_s": speed}) + "\n")
    rows = compare.readable([two_runs / "one", copy])
    assert len(rows) == 2 and compare.seeds(rows) == []
    speeds = sorted(line["images_per_s"] for line in log.history(copy / "metrics.jsonl") if "images_per_s" in line)
    assert rows[1].speed == speeds[5] and len(speeds) == 11


def test_a_folder_stands_for_the_runs_below_it(two_runs, tmp_path, capsys):
    below, file = tmp_path / "runs", tmp_path / "a.json"
    places = [
        shutil.copytree(two_runs / "one", below / "one"),
        shutil.copytree(two_runs / "two", below / "more" / "two"),
    ]
    again = os.path.relpath(places[0])
    compare.main([*map(str, (places[0], below, again)), "--json", str(file), "--out", str(tmp_path / "a.png")])
    assert sorted(row["folder"] for row in json.loads(file.read_text())[0]["rows"]) == sorted(map(str, places))
    assert "left out" not in capsys.readouterr().out


def test_a_run_without_a_task_is_a_classifiers(two_runs, tmp_path):
    """The oldest runs have none."""
    old = shutil.copytree(two_runs / "one", tmp_path / "old")
    cfg = OmegaConf.load(old / "config.yaml")
    del cfg["task"]
    OmegaConf.save(cfg, old / "config.yaml")
    rows = compare.readable([old, two_runs / "one"])
    assert [row.task for row in rows] == ["classify"] * 2 and rows[0].value == rows[1].value


def test_runs_of_several_tasks_have_a_table_each(two_runs, tmp_path, capsys):
    other = shutil.copytree(two_runs / "one", tmp_path / "dense")
    cfg = OmegaConf.load(other / "config.yaml")
    OmegaConf.save(OmegaConf.merge(cfg, {"task": {"name": "segment"}}), other / "config.yaml")
    (other / "metrics.jsonl").write_text('{"step": 3, "val_miou": 7.25, "val_loss": 2.0}\n')
    given = [str(folder) for folder in (other, two_runs / "one", two_runs / "two")]
    compare.main([*given, "--out", str(tmp_path / "all.png")])
    said = capsys.readouterr().out
    assert said.count("best miou") == said.count("best top1") == 1
    assert "2 runs" in said and re.search(r": 1 run *\n", said)
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["all-miou.png", "all-top1.png"]
    compare.main([*given, "--score", "loss", "--out", str(tmp_path / "loss.png")])
    said = capsys.readouterr().out
    assert re.search(r"segment, digits, 10 classes: 1 run *\n", said) and "classify, digits, 10 classes: 2 runs" in said
    assert sorted(path.name for path in tmp_path.glob("loss*")) == ["loss-classify.png", "loss-segment.png"]


def as_measured(run, folder, **data):
    """A copy of a run whose data.json and data configuration say something else."""
    shutil.copytree(run, folder)
    cfg = OmegaConf.load(folder / "config.yaml")
    OmegaConf.save(OmegaConf.merge(cfg, {"data": data.pop("cfg", {})}), folder / "config.yaml")
    noted = json.loads((folder / "data.json").read_text())
    (folder / "data.json").write_text(json.dumps(noted | data))
    return folder


def test_runs_on_other_classes_have_a_table_of_their_own(two_runs, tmp_path, capsys):
    few = as_measured(two_runs / "one", tmp_path / "few", num_classes=2, class_names=["sky", "ground"])
    compare.main([str(few), str(two_runs / "one"), str(two_runs / "two"), "--out", str(tmp_path / "all.png")])
    said = capsys.readouterr().out
    assert re.search(r"classify, digits, 2 classes: 1 run *\n", said) and "classify, digits, 10 classes: 2 runs" in said
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["all-10-classes.png", "all-2-classes.png"]
    assert "not evaluated on the same images" not in said


def test_runs_on_data_with_a_slash_in_its_name_have_a_plot_each(two_runs, tmp_path):
    for name in ("birds", "trees"):
        as_measured(two_runs / "one", tmp_path / name, class_names=[name], cfg={"name": f"own/{name}"})
    assert compare.show([tmp_path / "birds", tmp_path / "trees"], tmp_path / "all.png")
    assert {path.name for path in tmp_path.glob("*.png")} == {"all-own-birds.png", "all-own-trees.png"}


def test_runs_of_which_some_classes_do_not_count_have_a_table_of_their_own(two_runs, tmp_path, capsys):
    fewer = as_measured(two_runs / "one", tmp_path / "fewer", left_out=[0])
    compare.main([str(fewer), str(two_runs / "one"), "--out", str(tmp_path / "all.png")])
    said = capsys.readouterr().out
    assert "classify, digits, 10 classes but 1: 1 run" in said and "classify, digits, 10 classes: 1 run" in said
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["all-1.png", "all-2.png"]


def test_runs_on_other_images_are_told(two_runs, tmp_path, capsys):
    cfg = {"val_fraction": 0.02}
    less = as_measured(two_runs / "one", tmp_path / "less", images={"train": 1761, "val": 36}, cfg=cfg)
    compare.main([str(less), str(two_runs / "one"), "--out", str(tmp_path / "all.png")])
    said = capsys.readouterr().out
    assert "2 runs" in said and "not evaluated on the same images, so the scores are not comparable: " in said
    assert "less (images=36, data.val_fraction=0.02)" in said
    assert "one (images=180, data.val_fraction=0.1)" in said
    compare.main([str(two_runs / "one"), str(two_runs / "two"), "--out", str(tmp_path / "all.png")])
    assert "not evaluated" not in capsys.readouterr().out
    fewer = as_measured(two_runs / "one", tmp_path / "fewer", cfg={"things": [1, 1]})
    compare.main([str(fewer), str(two_runs / "one"), "--out", str(tmp_path / "all.png")])
    assert re.search(r"not evaluated on the same images.*data\.things=\[1, 1\]", capsys.readouterr().out)
    changed = as_measured(two_runs / "two", tmp_path / "changed", labels={"train": "1" * 64, "val": "2" * 64})
    compare.main([str(changed), str(two_runs / "one"), "--out", str(tmp_path / "all.png")])
    said = capsys.readouterr().out
    assert "not evaluated on the same images" in said and "changed (labels=22222222)" in said


def scored(name, value, **cfg):
    best = {"step": 1, "val_top1": value, "val_loss": value}
    return compare.Row(Path(name), cfg, [best], "top1", best, name=name)


def test_seeds_have_mean_and_deviation(capsys):
    rows = [scored("a", 80.0, seed=0, lr=1), scored("b", 84.0, seed=1, lr=1, out="b"), scored("c", 70.0, seed=0, lr=2)]
    assert [[row.folder.name for row in group] for group in compare.seeds(rows)] == [["a", "b"]]
    compare._print_seeds(rows)
    assert "82.00 ± 2.83 (2)" in capsys.readouterr().out
    compare._print_seeds(rows[1:])
    assert capsys.readouterr().out == ""
    compare._print_seeds([*rows, scored("a2", 80.0, seed=0, lr=1)])
    said = "a, a2 have the same seed=0, and all of them count: if they are copies of a run, name only one"
    assert said in capsys.readouterr().out


def test_what_is_compared_as_json(two_runs, tmp_path):
    other = shutil.copytree(two_runs / "one", tmp_path / "other")
    OmegaConf.save(OmegaConf.merge(OmegaConf.load(other / "config.yaml"), {"seed": 7}), other / "config.yaml")
    given = [str(two_runs / "one"), str(two_runs / "two"), str(other)]
    compare.main([*given, "--out", str(tmp_path / "a.png"), "--json", str(tmp_path / "new" / "a.json")])
    (table,) = json.loads((tmp_path / "new" / "a.json").read_text())
    best = {name: max(line.get("val_top1", 0) for line in lines(two_runs / name)) for name in ("one", "two")}
    expected = dict(zip(given, [*best.values(), best["one"]], strict=True))
    assert {row["folder"]: row["best"] for row in table["rows"]} == expected
    assert (table["task"], table["score"], table["classes"]) == ("classify", "top1", 10)
    assert all(row["images"] == 180 and row["config"].keys() == {"seed", "optim.lr"} for row in table["rows"])
    (group,) = table["seeds"]
    assert group == {"folders": given[::2], "seeds": [0, 7], "mean": best["one"], "std": 0.0, "n": 2}


def test_scores_have_the_decimals_that_tell_them_apart():
    def loss(*values):
        return compare.decimals([compare.Row(Path(), {}, [], "loss", {"val_loss": value}) for value in values])

    assert compare.decimals([scored("a", 80.0), scored("b", 80.0), scored("c", 81.0)]) == 2
    assert compare.decimals([scored("a", 80.001), scored("b", 80.004)]) == 3
    assert (loss(2.3, 2.4), loss(2.30001, 2.30002), loss(2.0, 2.0 + 1e-9)) == (4, 5, 6)


def test_files_alone_are_no_runs(two_runs, tmp_path):
    given = [str(two_runs / "one" / "metrics.jsonl"), str(two_runs / "two" / "config.yaml")]
    with pytest.raises(SystemExit, match=re.escape(f"{', '.join(given)}: a file is no run; give the folder")):
        compare.main([*given, "--out", str(tmp_path / "a.png")])


def test_a_score_that_there_is_not(two_runs, tmp_path, capsys):
    with pytest.raises(SystemExit, match="none of these folders holds a run with an evaluation with top9"):
        compare.main([str(two_runs / "one"), "--score", "top9", "--out", str(tmp_path / "a.png")])
    said = capsys.readouterr().out
    assert "one has no evaluation with top9; its evaluations have top1, top5, loss, images_per_s" in said


def test_pictures_have_no_empty_panel(tmp_path):
    def width(*keys):
        draw_together(tmp_path / "a.png", {"one": [{"step": 1, **dict.fromkeys(keys, 2.0)}]}, "ap")
        with Image.open(tmp_path / "a.png") as picture:
            return picture.width

    assert width("loss", "val_loss", "val_ap") == 1500 and width("loss", "val_ap") == 1000


def test_what_follows_from_another_model_is_not_told_apart():
    def row(model, depths, lr):
        cfg = {"model.name": model, "model.depths": depths, "optim.lr": lr, "train.keep": depths}
        return compare.Row(Path(model), cfg, [], "top1", {})

    assert compare.different([row("a", 1, 0.1), row("b", 2, 0.1)]) == ["model.name"]
    assert compare.different([row("a", 1, 0.1), row("b", 2, 0.1), row("a", 3, 0.1)]) == ["model.name", "model.depths"]


def test_twice_as_many_runs_take_twice_as_long():
    class Config(dict):
        asked = 0

        def get(self, key, default=None):
            Config.asked += 1
            return super().get(key, default)

    def asked(count):
        Config.asked = 0
        cfgs = [Config({"model.name": f"m{number % 3}", "model.depths": 1, "seed": number}) for number in range(count)]
        assert compare.different([compare.Row(Path(), cfg, [], "top1", {}) for cfg in cfgs]) == ["model.name", "seed"]
        return Config.asked

    assert asked(200) < 2.2 * asked(100)


def test_the_speed_of_a_run_is_its_median():
    def speed(*found):
        return compare.Row(Path(), {}, [{"step": 1, "images_per_s": each} for each in found], "top1", {}).speed

    assert (speed(1, 99), speed(99, 1, 2), speed()) == (50, 2, None)


def test_runs_are_called_by_what_tells_them_apart(two_runs, tmp_path, capsys):
    def names(*folders):
        return [row.name for row in compare.named([compare.Row(Path(it), {}, [], "top1", {}) for it in folders])]

    assert names("runs/one", "runs/two") == ["one", "two"]
    assert names("runs/one") == names(Path("runs/one").absolute()) == ["one"]
    assert names("seg/runs/one", "seg/other/one") == ["runs/one", "other/one"]
    assert names("runs/one", Path("runs/again/one").absolute()) == ["one", "again/one"]

    shutil.copytree(two_runs / "one", tmp_path / "there" / "one")
    shutil.copytree(two_runs / "one", tmp_path / "here" / "one")
    drawn = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "draw_together", lambda path, curves, score: drawn.extend(curves))
        given = [str(tmp_path / name / "one") for name in ("there", "here", "there")]
        compare.main([*given, "--out", str(tmp_path / "both.png")])
    assert drawn == ["there/one", "here/one"] and "2 runs" in capsys.readouterr().out


def test_runs_that_differ_in_much_can_be_read(capsys, monkeypatch):
    """More keys than a terminal has room for: columns would be one letter wide."""
    keys = {f"group.key_{letter}": 0.25 for letter in "abcdefghij"}
    line = {"step": 1, "val_top1": 1.0, "val_loss": 2.0}
    rows = [compare.Row(Path(), {**keys, "seed": name}, [line], "top1", line, name=name) for name in ("one", "two")]
    monkeypatch.setattr(compare.CONSOLE, "_width", 90)
    compare._print(rows, ["seed", *keys])
    said = capsys.readouterr().out
    assert "best top1" in said and "val loss" in said and "2.0000" in said
    assert f"one: seed=one {' '.join(f'{key}=0.25' for key in keys)}\n" in said
    compare._print(rows, ["seed"])
    assert "one:" not in (said := capsys.readouterr().out) and "seed" in said


def test_the_least_loss_is_the_best(two_runs, tmp_path):
    rows = compare.readable([two_runs / "one", two_runs / "two"], "loss")
    losses = [min(line["val_loss"] for line in lines(row.folder) if "val_loss" in line) for row in rows]
    assert [row.value for row in rows] == losses == sorted(losses)
    compare.main([str(two_runs / "one"), "--score", "loss", "--out", str(tmp_path / "a" / "folder" / "loss.png")])
    assert (tmp_path / "a" / "folder" / "loss.png").is_file()
    with pytest.raises(SystemExit, match="could not write"):
        compare.main([str(two_runs / "one"), "--out", str(two_runs / "one" / "config.yaml" / "loss.png")])


def test_a_sweep_whose_picture_cannot_be_written(two_runs, monkeypatch, capsys):
    """As on a full disk, which is no error of the sweep, and hides none."""
    (start, *_) = (json.loads(line) for line in (two_runs / "one" / "sessions.jsonl").read_text().splitlines())
    monkeypatch.setenv(provenance.SWEEP, "x")
    monkeypatch.setattr(compare, "starts", lambda folder: [{**start, "sweep": "x"}])
    monkeypatch.setattr(compare, "draw_together", full_disk)
    compare.show_sweep([two_runs / "nothing", two_runs])
    said = capsys.readouterr()
    assert "2 runs" in said.out
    assert said.err == f"the curves of this sweep could not be drawn: no space for {two_runs / 'sweep-x.png'}\n"


def full_disk(picture, curves, score):
    raise OSError(f"no space for {picture}")


@pytest.mark.parametrize("name", ["nothing", pytest.param(300 * "x", id="too long for a file")])
def test_nothing_to_compare(tmp_path, name):
    with pytest.raises(SystemExit, match="none of these folders") as error:
        compare.main([str(tmp_path / name)])
    assert error.value.code not in (0, None)


def test_a_picture_is_called_what_it_is(two_runs, tmp_path):
    for name in ("curves.pdf", "curves"):
        with pytest.raises(SystemExit, match=rf"--out {tmp_path}/{name}: .* ends in \.png"):
            compare.main([str(two_runs / "one"), "--out", str(tmp_path / name)])
    assert not list(tmp_path.iterdir())


def test_what_is_no_file_is_not_replaced(two_runs, tmp_path):
    for given in (["--out", str(tmp_path)], ["--out", str(tmp_path / "a.png"), "--json", "/dev/full"]):
        with pytest.raises(SystemExit, match="is a folder, a pipe or a device: give the name of a file"):
            compare.main([str(two_runs / "one"), *given])
    assert Path("/dev/full").is_char_device() and not list(tmp_path.iterdir())
