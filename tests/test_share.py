"""Folders and repositories that timm builds our models from again, as they were."""

import json

import pytest
import timm
import torch
from torch import nn

import zoo
from builds import every_small, small, trained
from children import files_up_to
from families import SMALL


def same(one, other, size=(64, 96), channels=3):
    x = torch.randn(2, channels, *size)
    return torch.equal(one.eval()(x), other.eval()(x))


@every_small
def test_local_folder(name, tmp_path):
    model = trained(small(name))
    folder = zoo.save_for_hf(model, tmp_path / "shared")
    assert {file.name for file in folder.iterdir()} == {"README.md", "config.json", "model.safetensors"}
    assert len({file.stat().st_mode for file in folder.iterdir()}) == 1
    again = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert again.num_classes == 7 and same(model, again)
    assert timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=3).num_classes == 3


def test_compiled_blocks_are_shared_as_blocks(tmp_path):
    model = trained(small("davit_t"))
    model.stages[0].blocks[0] = torch.compile(model.stages[0].blocks[0], backend="eager")
    again = timm.create_model(f"local-dir:{zoo.save_for_hf(model, tmp_path)}", pretrained=True)
    assert same(model, again) and hasattr(model.stages[0].blocks[0], "_orig_mod")


def test_other_sizes_and_channels(tmp_path):
    model = trained(small("maxvit_t", img_size=(96, 160), in_chans=1, drop_path_rate=0.3))
    folder = zoo.save_for_hf(model, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    assert config["architecture"] == "maxvit_t" and config["pretrained_cfg"]["input_size"] == [1, 96, 160]
    again = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert again.img_size == (96, 160) and same(model, again, (96, 160), channels=1)
    larger = timm.create_model(f"local-dir:{folder}", pretrained=True, img_size=128)
    assert larger.img_size == (128, 128) and larger(torch.randn(1, 1, 128, 128)).isfinite().all()
    model.set_input_size((128, 128))
    zoo.save_for_hf(model, folder)
    assert same(timm.create_model(f"local-dir:{folder}", pretrained=True), model, (128, 128), channels=1)


@pytest.mark.parametrize("pool", ["max", "avgmax", ""])
def test_another_classifier(pool, tmp_path):
    model = trained(small("stvit_b"))
    model.reset_classifier(0 if pool == "" else 5, pool)
    again = timm.create_model(f"local-dir:{zoo.save_for_hf(model, tmp_path)}", pretrained=True)
    assert (again.num_classes, again.global_pool) == (model.num_classes, pool) and same(model, again)


@pytest.mark.parametrize(
    ("name", "built", "changes"),
    [
        ("gcvit_s", {"window_size": 5}, ({"window_size": 4}, {"img_size": 96})),
        ("maxvit_t", {"window_size": 5}, ({"img_size": 96}, {"img_size": 128, "window_size": 2, "grid_size": (1, 3)})),
        ("maxvit_t", {"partition_ratio": 16}, ({"img_size": 96, "partition_ratio": 8}, {"img_size": 96})),
        ("sgformer_b", {}, ({"img_size": (96, 160)}, {"img_size": 64})),
        ("vitrpb_s", {}, ({"img_size": (96, 160)}, {"img_size": 64})),
    ],
)
def test_other_windows(name, built, changes, tmp_path):
    model = trained(small(name, **built))
    for windows in ({}, *changes):
        if windows:
            model.set_input_size(**windows)
        again = timm.create_model(f"local-dir:{zoo.save_for_hf(model, tmp_path)}", pretrained=True)
        assert same(model, again, (96, 160))


def test_hub(tmp_path, monkeypatch):
    """The uploaded folder, given back as a repository, is the model; nothing of this test leaves the machine."""
    kept = tmp_path / "repository"

    class Api:
        def __init__(self, **kwargs):
            pass

        def create_repo(self, repository, **kwargs):
            return type("Url", (), {"repo_id": repository})

        def file_exists(self, **kwargs):
            return False

        def upload_folder(self, folder_path, **kwargs):
            kept.mkdir()
            for file in sorted(type(kept)(folder_path).iterdir()):
                (kept / file.name).write_bytes(file.read_bytes())

    monkeypatch.setattr("timm.models._hub.HfApi", Api)
    model = trained(small("gcvit_s", img_size=96))
    zoo.push_to_hub(model, "someone/gcvit", description="Trained on [digits](https://example.org).", licence="mit")
    assert {file.name for file in kept.iterdir()} == {"README.md", "config.json", "model.safetensors"}
    card = (kept / "README.md").read_text()
    assert json.loads((kept / "config.json").read_text())["pretrained_cfg"]["license"] == "mit"
    assert "license: mit" in card and "Trained on [digits]" in card and '"hf-hub:someone/gcvit"' in card

    def download(repository, name, **kwargs):
        assert repository == "someone/gcvit"
        return str(kept / name)

    monkeypatch.setattr("timm.models._hub.hf_hub_download", download)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    again = timm.create_model("hf-hub:someone/gcvit", pretrained=True)
    assert again.img_size == (96, 96) and same(model, again, (96, 96))


def test_licence_is_the_weights(tmp_path):
    model = timm.create_model("gcvit_s.nvidia_in1k", **SMALL["gcvit_s"])
    zoo.save_for_hf(model, tmp_path)
    assert "license: cc-by-nc-sa-4.0" in (tmp_path / "README.md").read_text()


def test_weights_of_ones_own_have_no_others_licence(tmp_path):
    zoo.save_for_hf(small("gcvit_s"), tmp_path / "fresh")
    assert "license: unknown" in (tmp_path / "fresh" / "README.md").read_text()
    overlay = {"file": str(tmp_path / "fresh" / "model.safetensors")}
    zoo.save_for_hf(small("gcvit_s", pretrained=True, pretrained_cfg_overlay=overlay), tmp_path / "tuned")
    assert "license: unknown" in (tmp_path / "tuned" / "README.md").read_text()


def test_weights_of_ones_own_name_no_release(tmp_path):
    def release(folder):
        cfg = json.loads((folder / "config.json").read_text())["pretrained_cfg"]
        return cfg.get("tag"), cfg.get("origin_url")

    assert release(zoo.save_for_hf(small("gcvit_s"), tmp_path / "own")) == (None, None)
    again = timm.create_model(f"local-dir:{tmp_path / 'own'}", pretrained=True)
    assert again.pretrained_cfg["architecture"] == "gcvit_s"
    model = timm.create_model("gcvit_s.nvidia_in1k", **SMALL["gcvit_s"])
    tag, origin = release(zoo.save_for_hf(model, tmp_path / "released"))
    assert tag == "nvidia_in1k" and origin.startswith("https://")


def test_the_licence_that_is_given_stands_in_both_files(tmp_path):
    def licences(folder):
        card, config = (folder / name for name in ("README.md", "config.json"))
        cfg = json.loads(config.read_text())["pretrained_cfg"]
        return next(line for line in card.read_text().splitlines() if line.startswith("license: ")), cfg["license"]

    model = timm.create_model("gcvit_s.nvidia_in1k", **SMALL["gcvit_s"])
    given = {"model_config": {"label_names": ["cat"], "pretrained_cfg": {"tag": "mine"}}}
    assert licences(zoo.save_for_hf(model, tmp_path / "mit", licence="mit", **given)) == ("license: mit", "mit")
    assert json.loads((tmp_path / "mit" / "config.json").read_text())["pretrained_cfg"]["tag"] == "mine"
    assert licences(zoo.save_for_hf(model, tmp_path / "own"))[1] == "cc-by-nc-sa-4.0"
    assert licences(zoo.save_for_hf(small("gcvit_s"), tmp_path / "new")) == ("license: unknown", "unknown")


def test_features_cannot_be_shared(tmp_path):
    with pytest.raises(ValueError, match="returns only features: share the model without"):
        zoo.save_for_hf(small("davit_t", features_only=True), tmp_path / "features")
    assert not (tmp_path / "features").exists()


def test_what_timm_would_not_build_again(tmp_path):
    pruned, replaced = small("davit_t"), small("davit_t")
    pruned.prune_intermediate_layers([1])
    replaced.head.fc = nn.Sequential(replaced.head.fc)
    for model, names in ((pruned, r"head\.after\.bias, .* and \d+ more"), (replaced, r"head\.fc\.0\.bias, .*")):
        with pytest.raises(ValueError, match=rf"would not build this DaViT again: .* \({names}\)"):
            zoo.save_for_hf(model, tmp_path / "shared")
        with pytest.raises(ValueError, match="would not build this DaViT again"):
            zoo.push_to_hub(model, "someone/davit")
    assert not (tmp_path / "shared").exists()
    whole = trained(small("davit_t", num_classes=0))
    whole.prune_intermediate_layers([3], prune_head=False)  # drops nothing
    assert same(whole, timm.create_model(f"local-dir:{zoo.save_for_hf(whole, tmp_path)}", pretrained=True))


def test_what_cannot_be_shared(tmp_path):
    with pytest.raises(ValueError, match=r"Linear was not built by timm\.create_model"):
        zoo.save_for_hf(nn.Linear(1, 1), tmp_path / "shared")
    assert not (tmp_path / "shared").exists()
    (tmp_path / "file").touch()
    with pytest.raises(zoo.CheckpointError, match="could not write"):
        zoo.save_for_hf(small("davit_t"), tmp_path / "file")


def test_a_full_disk(tmp_path):
    model = small("davit_t")
    with files_up_to(10_000), pytest.raises(zoo.CheckpointError, match=r"could not write .*shared: "):
        zoo.save_for_hf(model, tmp_path / "shared")
    assert not any((tmp_path / "shared").iterdir())


def test_names_of_classes_are_kept(tmp_path):
    """Those of the configuration, for as many classes; the given ones instead of them."""

    def names(folder):
        cfg = timm.create_model(f"local-dir:{folder}", pretrained=True).pretrained_cfg
        assert json.loads((folder / "config.json").read_text()).get("label_names") == cfg.get("label_names")
        return cfg.get("label_names"), cfg.get("label_descriptions")

    known = {"label_names": list("abcdefg"), "label_descriptions": {name: name.upper() for name in "abcdefg"}}
    model = small("gcvit_s", pretrained_cfg_overlay={"num_classes": 7, **known})
    assert names(zoo.save_for_hf(model, tmp_path / "known")) == tuple(known.values())
    again = timm.create_model(f"local-dir:{tmp_path / 'known'}", pretrained=True)
    assert names(zoo.save_for_hf(again, tmp_path / "again")) == tuple(known.values())
    given = {"label_names": list("hijklmn")}
    assert names(zoo.save_for_hf(model, tmp_path / "given", model_config=given))[0] == given["label_names"]
    model.reset_classifier(3)
    assert names(zoo.save_for_hf(model, tmp_path / "other")) == (None, None)


def test_frozen_batch_norms_count_no_batches(tmp_path):
    """timm's have no counter; a model that is built anew needs none."""
    model, file = trained(small("stvit_b")), tmp_path / "weights.pth"
    torch.save(model.state_dict(), file)
    timm.utils.freeze(model)
    assert not any(name.endswith("num_batches_tracked") for name in model.state_dict())
    again = timm.create_model(f"local-dir:{zoo.save_for_hf(model, tmp_path / 'shared')}", pretrained=True).double()
    images = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    frozen = model.double().eval()(images)
    nn.init.zeros_(model.head.fc.weight)
    zoo.load_checkpoint(model, file)
    assert torch.equal(model(images), frozen)
    torch.testing.assert_close(again.eval()(images), frozen)
