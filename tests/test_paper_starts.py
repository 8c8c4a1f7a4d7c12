"""What recipe=paper says about the weights that a published training starts from."""

from types import SimpleNamespace

import pytest
from torch import nn

from recipes import models, papers
from recipes.config import ConfigError, compose
from zoo.releases import find

DATA = SimpleNamespace(num_classes=1000, img_size=None)
PRETRAINED = "model.pretrained=true"


def said(capsys, task, *typed):
    """What building the model of a recipe prints, with a model that needs no weights."""

    def build(name, **options):
        return nn.Identity()

    models.create(compose(["recipe=paper", f"task={task}", *typed]), DATA, make=build)
    return " ".join(capsys.readouterr().out.split())


STARTS = {  # model, phase, what is advised
    ("dinat_l", None): "model.name=dinat_l.shilabs_in22k model.pretrained=true or model.checkpoint=<file>",
    ("dinats_l", None): "model.name=dinats_l.shilabs_in22k model.pretrained=true or model.checkpoint=<file>",
    ("dinat_l_384", None): "model.checkpoint=<file of dinat_l.shilabs_in22k>",
    ("dinat_l_384_k11", None): "model.name=dinat_l_384_k11.shilabs_in22k model.pretrained=true or model.checkpoint=<",
    ("maxvit_t_384", None): "model.checkpoint=<file of maxvit_t.timm_tf_in1k>",
    ("maxvit_b_384", "imagenet1k_finetune_384"): "model.checkpoint=<file of maxvit_b.timm_tf_in1k>",
    ("maxvit_b_384", "imagenet21k_to_1k_384"): "model.checkpoint=<file of maxvit_b.timm_tf_in21k>",
    ("maxvit_xl_512", None): "model.checkpoint=<file of maxvit_xl.timm_tf_in21k>",
    ("gcvit_l_384", None): "model.checkpoint=<file>",
    ("gcvit_l_512", None): "model.checkpoint=<file>",
    ("litv2_b", "imagenet1k_finetune_384"): "model.pretrained=true or model.checkpoint=<file>",
    ("stvit_s", "imagenet1k_finetune_384"): "model.pretrained=true or model.checkpoint=<file>",
}


@pytest.mark.parametrize(("model", "phase"), STARTS)
def test_a_fine_tuning_is_told_where_to_start(model, phase, capsys):
    """By the name of a release only where this name is not that of the result."""
    given = [f"model={model}", *([f"paper.phase={phase}"] if phase else [])]
    found = said(capsys, "classify", *given)
    assert "none are given: the model starts from scratch" in found and f". Give {STARTS[model, phase]}" in found
    result = find(model).name if not STARTS[model, phase].startswith(PRETRAINED) else None
    loads = f"but {PRETRAINED} loads {result}, trained on"
    assert (loads in said(capsys, "classify", *given, PRETRAINED)) == (result is not None)
    assert not said(capsys, "classify", *given, PRETRAINED, "+model.pretrained_cfg_overlay.file=mine.pth")


@pytest.mark.parametrize("task", ["segment", "detect"])
def test_dense_models_of_size_l_start_from_imagenet_22k(task, capsys):
    for model in ("dinat_l", "dinats_l"):
        start = f"model.name={model}.shilabs_in22k"
        assert f". Give {start} {PRETRAINED} or model.backbone=" in said(capsys, task, f"model={model}")
        found = said(capsys, task, f"model={model}", PRETRAINED)
        assert f"starts from weights of an ImageNet classifier ({model}.shilabs_in22k), but {PRETRAINED} loads" in found
        assert f"loads {model}.shilabs_in22k_ft_in1k, trained on ImageNet-22k, then 1k at 224 pixels" in found
        assert not said(capsys, task, f"model={model}", start, PRETRAINED)
    assert not said(capsys, task, "model=dinat_b", PRETRAINED)
    assert f". Give {PRETRAINED} or model.backbone=" in said(capsys, task, "model=dinat_b")


def test_nothing_is_said_where_training_starts_from_scratch(capsys):
    assert not said(capsys, "classify", "model=maxvit_t")


@pytest.mark.parametrize("task", ["classify", "segment", "detect"])
def test_a_recipe_starts_from_a_release_that_there_is(task):
    """Of the variant, or of one at another size; each is there to be loaded by its name."""
    for phase, table in papers.tables(task).items():
        for model, name in table.get("releases", {}).items():
            assert model in table["models"] and table["starts"], phase
            assert find(name).loadable and find(name).name == name and model.startswith(find(name).model), phase


@pytest.mark.parametrize("key", ["file=mine.pth", "url=https://example.com/a.pth", "hf_hub_id=me/mine"])
def test_weights_in_an_overlay_are_asked_for(key):
    given = [f"+model.pretrained_cfg_overlay.{key}", "model=nat_m"]
    with pytest.raises(ConfigError, match=rf"overlay\.{key} has no effect with model\.pretrained=false: give model"):
        models.create(compose(given), DATA, make=lambda name, **options: nn.Identity())
    models.create(compose(given), DATA, pretrained=False, make=lambda name, **options: nn.Identity())
    models.create(compose([*given, PRETRAINED]), DATA, make=lambda name, **options: nn.Identity())


def test_an_overlay_of_other_things_needs_no_weights():
    given = ["+model.pretrained_cfg_overlay.num_classes=7", "model=nat_m"]
    models.create(compose(given), DATA, make=lambda name, **options: nn.Identity())
