"""Weights of classes in a segmenter: what they change, and files with, without and of other ones."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import zoo
from dense_cases import tiny
from ranks import on_ranks
from recipes import config, distributed
from zoo.heads import segmenter


def test_weights_of_classes_survive_meta():
    weights = [1.0, 2.0, 3.0, 4.0, 0.1]
    model = nn.Sequential(tiny(class_weights=weights, device="meta").to("meta"))
    model.to_empty(device="cpu").double()  # of memory that may hold anything
    torch.testing.assert_close(model[0].class_weights, torch.tensor(weights).double())
    model[0].class_weights = torch.ones(5)
    assert torch.equal(model.double()[0].class_weights, torch.ones(5).double())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_classes_stay_in_single_precision(dtype):
    """As the logits do, from which their logarithms are subtracted."""
    weights = torch.tensor([0.3, 1.0, 2.0, 1.0, 1.0])
    model = tiny(class_weights=weights.tolist()).to(dtype)
    assert torch.equal(model.class_weights, weights)
    images, targets = torch.randn(2, 3, 64, 64, dtype=dtype), torch.randint(5, (2, 64, 64))
    loss = sum(model(images, targets).values())
    loss.backward()
    assert loss.isfinite() and model.decode_head.classifier.weight.grad.isfinite().all()


@torch.no_grad()
def test_a_file_predicts_the_same_whichever_weights_of_classes_a_model_has(tmp_path):
    images, path, small = torch.randn(1, 3, 64, 64), tmp_path / "w.pth", {"head": "fcn", "channels": 8}
    saved = segmenter("test_resnet", 3, **small, class_weights=[0.2, 1.0, 4.0]).eval()
    torch.save(saved.state_dict(), path)
    for given in (None, [0.2, 1.0, 4.0], [1.0, 3.0, 0.5]):
        read, copied = (segmenter("test_resnet", 3, **small, class_weights=given).eval() for _ in range(2))
        assert zoo.load_checkpoint(read, path).layout == "zoo"
        copied.load_state_dict(saved.state_dict())
        assert torch.equal(read(images), copied(images))
        torch.testing.assert_close(read(images), saved(images))
        assert given != [0.2, 1.0, 4.0] or torch.equal(read(images), saved(images))
        kept = read.state_dict().get("class_weights")
        assert kept is None if given is None else kept.tolist() == pytest.approx(given)
        learned, here = (
            saved.auxiliary_head.classifier.bias - saved.class_weights.log(),
            torch.tensor(given or [1.0] * 3),
        )
        torch.testing.assert_close(read.auxiliary_head.classifier.bias, learned + here.log())
    other = segmenter("test_resnet", 4, **small, class_weights=[1.0, 2.0, 3.0, 4.0])
    assert zoo.load_checkpoint(other, path).head_remade and other.class_weights.tolist() == [1.0, 2.0, 3.0, 4.0]
    half = saved.state_dict() | {"class_weights": torch.full((2,), 0.5)}
    with pytest.raises(
        zoo.CheckpointError, match=r"class_weights is \(2,\), and decode_head.*\(3,\): expected a weight"
    ):
        segmenter("test_resnet", 3, **small).load_state_dict(half)


@torch.no_grad()
def test_files_of_earlier_versions_have_no_weights_of_classes():
    images, weights = torch.randn(1, 3, 64, 64), [0.2, 1.0, 4.0]
    one, two = (segmenter("test_resnet", 3, head="fcn", channels=8, class_weights=weights).eval() for _ in range(2))
    state = one.state_dict()
    del state["class_weights"]
    two.load_state_dict(state)
    assert torch.equal(one(images), two(images)) and torch.equal(one.class_weights, two.class_weights)


@pytest.mark.parametrize("layout", ["zoo", "mmseg"])
@torch.no_grad()
def test_files_without_weights_of_classes_predict_the_same(layout, tmp_path):
    """They are of a segmenter whose pixels all counted the same."""
    images, small = torch.randn(1, 3, 64, 64), {"head": "fcn", "channels": 8}
    plain = segmenter("test_resnet", 3, **small).eval()
    state = plain.state_dict()
    torch.save(state if layout == "zoo" else {"state_dict": plain.layouts()[0].to_theirs(state)}, tmp_path / "file.pth")
    model = segmenter("test_resnet", 3, **small, class_weights=[0.2, 1.0, 4.0]).eval()
    assert zoo.load_checkpoint(model, tmp_path / "file.pth").layout == layout
    torch.testing.assert_close(model(images), plain(images))
    shift = torch.tensor([0.2, 1.0, 4.0]).log()
    assert torch.equal(model.auxiliary_head.classifier.bias, plain.auxiliary_head.classifier.bias + shift)
    assert model.class_weights.tolist() == pytest.approx([0.2, 1.0, 4.0])
    other = segmenter("test_resnet", 4, **small, class_weights=[1.0, 2.0, 3.0, 4.0])
    before = other.decode_head.classifier.bias.clone()
    assert zoo.load_checkpoint(other, tmp_path / "file.pth").head_remade
    assert torch.equal(other.decode_head.classifier.bias, before)


@torch.no_grad()
def test_weights_of_classes_in_other_precisions():
    small, given, images = {"head": "fcn", "channels": 8}, [0.2, 1.0, 4.0], torch.randn(1, 3, 64, 64).double()
    saved, read = (segmenter("test_resnet", 3, **small, class_weights=w).double().eval() for w in (given, None))
    read.load_state_dict(saved.state_dict())
    torch.testing.assert_close(read(images), saved(images), rtol=1e-13, atol=1e-13)
    saved, read = (segmenter("test_resnet", 3, **small, class_weights=given).bfloat16() for _ in range(2))
    read.load_state_dict(saved.state_dict())
    assert all(torch.equal(x, saved.state_dict()[name]) for name, x in read.state_dict().items())


def shared_out(folder: Path) -> list[tuple[list[float], float]]:
    """The weights of classes of a shared segmenter that read another's, and how far its bias is from where it must be.

    From a whole state dict, from one that is shared out too, and from a checkpoint, which is read in place.
    """
    distributed.join(config.compose([]))
    mesh, whole = init_device_mesh("cpu", (dist.get_world_size(),)), StateDictOptions(full_state_dict=True)

    def made(weights: list[float]) -> nn.Module:
        torch.manual_seed(0)
        model = segmenter("test_resnet", 3, head="fcn", channels=8, class_weights=weights)
        with torch.no_grad():
            model.decode_head.classifier.bias.copy_(torch.tensor([0.5, -1.0, 2.0]))
        return model

    saved, shared = made([1.0, 2.0, 3.0]), fully_shard(made([1.0, 2.0, 3.0]), mesh=mesh)
    dcp.save({"model": get_model_state_dict(saved)}, checkpoint_id=folder)
    learned, found = saved.decode_head.classifier.bias.detach() - torch.tensor([1.0, 2.0, 3.0]).log(), []
    for way in ("whole", "shared out", "checkpoint"):
        model = fully_shard(made([1.0, 1.0, 0.5]), mesh=mesh)
        state = get_model_state_dict(model)
        if way == "whole":
            set_model_state_dict(model, saved.state_dict(), options=whole)
        elif way == "shared out":
            model.load_state_dict(shared.state_dict())
        else:
            dcp.load({"model": state}, checkpoint_id=folder)
            set_model_state_dict(model, state)
        bias = get_model_state_dict(model, options=whole)["decode_head.classifier.bias"]
        off = float((bias - learned - torch.tensor([1.0, 1.0, 0.5]).log()).abs().max())
        found.append((model.class_weights.tolist(), off))
    return found


def test_shared_segmenters_read_other_weights_of_classes(tmp_path):
    for rank in on_ranks(2, shared_out, tmp_path):
        assert [weights for weights, _ in rank] == [[1.0, 1.0, 0.5]] * 3
        assert max(off for _, off in rank) < 1e-6
