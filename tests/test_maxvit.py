"""What is MaxViT's alone: its tables, its windows, its batch norms."""

import pytest
import torch
from timm.models import create_model
from torch import nn

import zoo
from builds import small, trained
from zoo.blocks import WindowAttention

every_maxvit = pytest.mark.parametrize("name", ["maxvit_t", "maxvit_t_tv"])


def windows(model):
    return {(m.partition, m.window) for m in model.modules() if isinstance(m, WindowAttention)}


@pytest.mark.parametrize("name", [name for name in zoo.variants() if name.startswith("maxvit_")])
def test_windows(name):
    model = create_model(name, device="meta")
    windows = {m.window for m in model.modules() if isinstance(m, WindowAttention)}
    assert windows == {(zoo.variants()[name]["img_size"] // 32,) * 2}


@every_maxvit
def test_tables_do_not_decay(name):
    model = small(name)
    tables = {key for key, _ in model.named_parameters() if key.endswith(".rpb")}
    assert model.no_weight_decay() == tables and len(tables) == 10


@every_maxvit
def test_windows_for_another_size(name):
    model = trained(small(name, img_size=64))
    x = torch.randn(1, 3, 96, 128)
    before = model(x)
    model.set_input_size(img_size=(96, 128))
    assert {m.window for m in model.modules() if isinstance(m, WindowAttention)} == {(3, 4)}
    assert not torch.allclose(before, model(x), rtol=1e-3)
    built = trained(small(name, img_size=(96, 128)))
    assert {k: v.shape for k, v in built.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
    model.set_input_size(window_size=2, grid_size=(1, 2))
    assert windows(model) == {("block", (2, 2)), ("grid", (1, 2))}
    model.set_input_size(grid_size=5, partition_ratio=16)
    assert windows(model) == {("block", (6, 8)), ("grid", (5, 5))} and model.img_size == (96, 128)
    model.set_input_size(64)
    assert windows(model) == {("block", (4, 4)), ("grid", (4, 4))} and model._model_args["partition_ratio"] == 16
    model = small(name, img_size=64, partition_ratio=16)
    model.set_input_size((96, 128))
    assert windows(model) == {("block", (6, 8)), ("grid", (6, 8))}
    assert windows(small(name, img_size=64, window_size=5)) == {("block", (5, 5)), ("grid", (2, 2))}


@every_maxvit
def test_sync_batch_norm(name):
    """torch's conversion finds the batch norms and, outside a process group's training, changes nothing."""
    model = trained(small(name))
    x = torch.randn(1, 3, 64, 64)
    before = model(x)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert sum(isinstance(m, nn.SyncBatchNorm) for m in model.modules()) == 1 + 3 * 5
    torch.testing.assert_close(model.eval()(x), before)


@every_maxvit
def test_momentum_of_batch_norms(name):
    for given, momentum in (({}, 0.1), ({"bn_momentum": 0.01}, 0.01)):
        norms = [m for m in small(name, **given).modules() if isinstance(m, nn.BatchNorm2d)]
        assert len(norms) == 1 + 3 * 5 and {(m.momentum, m.eps) for m in norms} == {(momentum, 1e-3)}


def test_logits_are_scaled_by_the_width_of_a_head():
    """32 channels in every variant; dims that 32 does not divide have wider heads."""
    model = create_model("maxvit_t", stem_dim=8, dims=(64, 48, 80), depths=(1, 1, 1), device="meta")
    found = {(m.qkv.in_features, m.heads, m.scale) for m in model.modules() if isinstance(m, WindowAttention)}
    assert found == {(64, 2, 32**-0.5), (48, 1, 48**-0.5), (80, 2, 40**-0.5)}
