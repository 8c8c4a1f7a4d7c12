"""What is NAT's and its relatives' alone: dilations, small maps, tables of another window."""

import numpy as np
import pytest
import torch
from timm.models import create_model

import ops
import zoo
from builds import small, trained
from zoo.blocks import WindowAttention
from zoo.dinat import NeighborhoodAttention
from zoo.dinats import PatchMerging
from zoo.recognise import recognise
from zoo.registry import class_of


def dilations(model):
    return [[block.attn.fn.dilation for block in stage.blocks] for stage in model.stages]


# as their authors' configurations print them
PRINTED = {
    ("nat_m", None): [[1] * 3, [1] * 4, [1] * 6, [1] * 5],
    ("dinat_m", None): [[1, 8, 1], [1, 4, 1, 4], [1, 2] * 3, [1] * 5],
    ("dinat_l", None): [[1, 8, 1], [1, 4, 1, 4], [1, 2] * 9, [1] * 5],
    ("dinat_l_384", None): [[1, 13, 1], [1, 6, 1, 6], [1, 3] * 9, [1] * 5],
    ("dinat_l_384_k11", None): [[1, 8, 1], [1, 4, 1, 4], [1, 2] * 9, [1] * 5],
    ("dinat_m", "detection"): [[1, 28, 1], [1, 7, 1, 14], [1, 3, 1, 5, 1, 7], [1, 3, 1, 3, 1]],
    ("dinat_t", "detection"): [[1, 28, 1], [1, 7, 1, 14], [1, 3, 1, 5, 1, 7] * 3, [1, 3, 1, 3, 1]],
    ("dinat_m", "segmentation"): [[1, 16, 1], [1, 4, 1, 8], [1, 2, 1, 3, 1, 4], [1, 2, 1, 2, 1]],
    ("dinat_l", "segmentation"): [
        [1, 20, 1],
        [1, 5, 1, 10],
        [1, 2, 1, 3, 1, 4, 1, 5, 1, 2, 1, 3, 1, 4, 1, 5, 1, 5],
        [1, 2, 1, 2, 1],
    ],
    ("dinat_l", "mask2former"): [[1, 14, 1], [1, 4, 1, 7], [1, 2, 1, 3] * 4 + [1, 3], [1] * 5],
    ("dinats_t", None): [[1, 8], [1, 4], [1, 2] * 3, [1, 1]],
    ("dinats_l_384", None): [[1, 13], [1, 6], [1, 3] * 9, [1, 1]],
    ("dinats_s", "detection"): [[1, 28], [1, 14], [1, 3, 1, 5, 1, 7] * 3, [1, 3]],
    ("dinats_b", "segmentation"): [[1, 16], [1, 8], [1, 2, 1, 3, 1, 4] * 3, [1, 2]],
    ("dinats_l", "segmentation"): [
        [1, 20],
        [1, 10],
        [1, 2, 1, 3, 1, 4, 1, 5, 1, 2, 1, 3, 1, 4, 1, 5, 1, 5],
        [1, 2],
    ],
    ("nat_iso_s", None): [[1, 1, 1]] * 4,
    ("dinat_iso_s", None): [[1, 2, 1], [2, 1, 2]] * 2,
}


@pytest.mark.parametrize(("name", "preset"), PRINTED)
def test_presets(name, preset):
    model = create_model(name, device="meta", **({"dilations": preset} if preset else {}))
    assert dilations(model) == PRINTED[name, preset]


def test_dilations_by_hand():
    lists = [[1, 2, 3], [4], [1, 5], [7]]
    model = create_model("dinat_m", device="meta", dilations=lists)
    assert dilations(model) == [[1, 2, 3], [4] * 4, [1, 5] * 3, [7] * 5]
    assert dilations(create_model("dinats_t", device="meta", dilations=3)) == [[3] * n for n in (2, 2, 6, 2)]
    for wrong in ([[1]] * 3, [[1] * 4, [1], [1], [1]], [[], [1], [1], [1]]):
        with pytest.raises(ValueError, match=r"a list per stage, of at most \(3, 4, 6, 5\) numbers"):
            create_model("dinat_m", dilations=wrong)
    with pytest.raises(ValueError, match=r"dilations is 'clasification': expected .*'classification', "):
        create_model("dinat_m", dilations="clasification")
    with pytest.raises(ValueError, match=r"dilations is 2.5: expected a list per stage, of at most \(3, 4, 6, 5\)"):
        create_model("dinat_m", dilations=2.5)
    with pytest.raises(ValueError, match=r"dilation is 1.5: expected an odd window and a dilation of 1 or more"):
        create_model("dinat_m", dilations=[[1.5], [1], [1], [1]])


@pytest.mark.parametrize("name", ["nat_m", "nat_iso_s"])
def test_dilations_of_numpy(name):
    assert {2} == {dilation for stage in dilations(create_model(name, dilations=np.int64(2))) for dilation in stage}


@pytest.mark.parametrize("wrong", ["classification", 2.5])
def test_isotropic_models_have_no_presets(wrong):
    with pytest.raises(ValueError, match=f"dilation is {wrong!r}: expected an odd window and a dilation of 1 or more"):
        create_model("nat_iso_s", dilations=wrong)


@pytest.mark.parametrize("given", [{"depths": [1, 2]}, {"depths": [1] * 5}, {"dims": [32] * 3}, {"dims": [32] * 5}])
@pytest.mark.parametrize("name", ["nat_m", "dinats_t"])
def test_stages_have_all_their_numbers(name, given):
    with pytest.raises(ValueError, match="expected one number per stage in each"):
        create_model(name, device="meta", **given)


@pytest.mark.parametrize("size", [(10, 30), (5, 6), (1, 33)])
def test_small_maps_are_filled_before_the_projection(size):
    torch.manual_seed(0)
    attention = trained(NeighborhoodAttention(64, 2, 5, 3)).double()
    x = torch.randn(2, *size, 64, dtype=torch.float64)
    height, width = (max(15, side) for side in size)
    filled = torch.nn.functional.pad(x, [0, 0, 0, width - size[1], 0, height - size[0]])
    want = attention(filled)[:, : size[0], : size[1]]
    torch.testing.assert_close(attention(x), want, rtol=0, atol=1e-12)
    with ops.implementation("reference"):
        torch.testing.assert_close(attention(x), want, rtol=0, atol=1e-12)


def test_tables_decay_and_scales():
    assert small("dinat_b").no_weight_decay() == set()
    scales = [key for key, _ in small("dinat_b").named_parameters() if key.endswith("scale.gamma")]
    assert len(scales) == 2 * 6
    with_scale = {name for name in zoo.variants() if zoo.variants()[name].get("layer_scale") and "nat" in name}
    assert with_scale == {"nat_s", "nat_b", "dinat_b"}


def test_weights_for_another_window(tmp_path):
    """As the authors made their 11 x 11 model of a 7 x 7 one."""
    model = trained(small("dinat_b"))
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    wider = small("dinat_b", window_size=11, dilations=1)
    report = zoo.load_checkpoint(wider, tmp_path / "weights.pth")
    assert len(report.resized) == 6 and not report.head_remade
    assert wider.stages[0].blocks[0].attn.fn.rpb.shape == (1, 21, 21)


@pytest.mark.parametrize("layout", ["transformers", "transformers-nat"])
def test_queries_keys_and_values_apart(layout, tmp_path):
    model = trained(small("dinat_b"))
    found = next(known for known in zoo.layouts.LAYOUTS["DiNAT"] if known.name == layout)
    theirs = found.to_theirs(model.state_dict())
    key = next(key for key in theirs if key.endswith("levels.1.layers.0.attention.self.value.weight"))
    assert torch.equal(theirs[key], model.stages[1].blocks[0].attn.fn.qkv.weight[2 * 64 :])
    torch.save(theirs, tmp_path / "weights.pth")
    again = small("dinat_b").eval()
    assert zoo.load_checkpoint(again, tmp_path / "weights.pth").layout == layout
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(again(x), model(x))
    del theirs[key]
    torch.save(theirs, tmp_path / "weights.pth")
    with pytest.raises(zoo.CheckpointError, match="no name for"):
        zoo.load_checkpoint(again, tmp_path / "weights.pth")


@pytest.mark.parametrize(
    ("layout", "name", "other"), [("transformers", "dinat_m", "nat_m"), ("transformers-nat", "nat_m", "dinat_m")]
)
def test_names_of_transformers_tell_nat_from_dinat(layout, name, other, tmp_path):
    """No tensor does: the same weights at other dilations are another model."""
    model = create_model(name)
    known = next(known for known in zoo.layouts.LAYOUTS["DiNAT"] if known.name == layout)
    state = known.to_theirs(model.state_dict())
    assert recognise(state, "pytorch_model.bin").model == name
    torch.save(state, tmp_path / "pytorch_model.bin")
    for same in (create_model(name), class_of(name)(**zoo.variants()[name])):  # the second does not know its name
        assert zoo.load_checkpoint(same, tmp_path / "pytorch_model.bin").others == ""
    report = zoo.load_checkpoint(create_model(other), tmp_path / "pytorch_model.bin")
    family = name.partition("_")[0]
    assert report.others == f"{family}_"
    assert f"of a model called {family}_..., from which {other} differs in what has no weights" in report.message


@pytest.mark.parametrize(
    "built", [{}, {"features_only": True}, {"features_only": True, "feature_norms": True}], ids=str
)
def test_dilations_of_a_dense_backbone_are_asked_for(built, tmp_path, caplog):
    """Its tensors, such as those of Mask2Former's, fit a model with a classifier's dilations too."""
    source = create_model("dinat_m", dims=[32] * 4, depths=[1] * 4, feature_norms=True, dilations="mask2former")
    known = next(known for known in zoo.layouts.LAYOUTS["DiNAT"] if known.name == "official")
    names = known.to_theirs({key: x for key, x in source.state_dict().items() if not key.startswith("head.")})
    inside = {f"backbone.{key}": x for key, x in names.items()} | {"sem_seg_head.query.weight": torch.zeros(2)}
    torch.save({"model": inside}, tmp_path / "mask2former.pth")
    torch.save(names, tmp_path / "backbone.pth")
    said = "the authors' dilations for that, which no tensor shows, are not 'classification', as this model's: give"
    for own, asked in (({}, True), ({"dilations": "mask2former"}, False), ({"dilations": [[1]] * 4}, False)):
        model = create_model("dinat_m", dims=[32] * 4, depths=[1] * 4, **built, **own)
        report = zoo.load_checkpoint(model, tmp_path / "mask2former.pth", part="backbone")
        assert (said in report.message) == asked and report.left_out["sem_seg_head"] == 1
        overlay = {"file": str(tmp_path / "backbone.pth")}
        caplog.clear()
        sizes = {"dims": [32] * 4, "depths": [1] * 4}
        create_model("dinat_m", pretrained=True, pretrained_cfg_overlay=overlay, **sizes, **built, **own)
        assert any(said in row.message and row.levelname == "WARNING" for row in caplog.records) == asked


def test_weights_of_classifiers_ask_for_no_dilations(tmp_path):
    torch.save(small("dinat_b").state_dict(), tmp_path / "weights.pth")
    for given in ({}, {"feature_norms": True}, {"num_classes": 0}):
        model = small("dinat_b", dilations="classification", **given)
        assert "dilations" not in zoo.load_checkpoint(model, tmp_path / "weights.pth").message


def test_merging_goes_column_by_column():
    merge = PatchMerging(2, 8).double()
    torch.nn.init.eye_(merge.reduction.weight)
    merge.norm = torch.nn.Identity()
    x = torch.randn(1, 3, 4, 2, dtype=torch.float64)
    out = merge(x)
    assert out.shape == (1, 2, 2, 8)
    torch.testing.assert_close(out[0, 0, 1], torch.cat([x[0, 0, 2], x[0, 1, 2], x[0, 0, 3], x[0, 1, 3]]))
    assert (out[0, 1, 0, 2:4] == 0).all() and (out[0, 1, 0, 6:] == 0).all()  # the row that was filled in


def test_vitrpb_attends_to_a_whole_map():
    """A map smaller than the window is one window; the table's middle is used."""
    model = trained(small("vitrpb_s")).double()
    x = torch.randn(1, 3, 96, 80, dtype=torch.float64)
    cut = trained(small("vitrpb_s", img_size=(96, 80))).double()
    assert {m.window for m in cut.modules() if isinstance(m, WindowAttention)} == {(6, 5)}
    state = {key: value[:, 1:-1, 2:-2] if key.endswith("rpb") else value for key, value in model.state_dict().items()}
    cut.load_state_dict(state)
    torch.testing.assert_close(model(x), cut(x), rtol=0, atol=1e-10)


@pytest.mark.parametrize("given", [{"dilations": 2}, {"window_size": 7}])
def test_vitrpb_has_neither_dilations_nor_windows(given):
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{next(iter(given))}'"):
        create_model("vitrpb_s", device="meta", **given)


def test_vitrpb_for_another_size(tmp_path):
    """The table is interpolated as one that is loaded is; a wide map is then attended as a whole, by the new window."""
    model = trained(small("vitrpb_s"))
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    built = small("vitrpb_s", img_size=(96, 250)).eval()
    zoo.load_checkpoint(built, tmp_path / "weights.pth")
    model.set_input_size((96, 250))
    assert model.img_size == (96, 250) and {m.window for m in model.modules() if hasattr(m, "window")} == {(6, 16)}
    x = torch.randn(1, 3, 96, 250)
    assert torch.equal(model(x), built(x))
