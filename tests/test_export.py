"""Script, trace, compile and export: what each of them gives is what the model gives, by the same rankings."""

import pytest
import torch

from families import SMALL
from rankings import Ranked, ranking, rankings
from test_models import every_small, small, trained
from zoo.export import SIZES_SINCE, program
from zoo.heads import segmenter
from zoo.heads.segmenter import HEADS

# compilers take their time: the first variant of a class in every run, the others with the slow tests
one_fast = pytest.mark.parametrize(
    "name", [name if name == "maxvit_t" else pytest.param(name, marks=pytest.mark.slow) for name in SMALL]
)


def with_rankings(ranked, x):
    return x, rankings(ranked.model, x)


def any_batch(inputs):
    """Dynamic shapes of an image and rankings."""
    batch = {0: torch.export.Dim("batch", max=64)}
    return batch, [batch] * len(inputs[1])


@every_small
def test_torchscript(name):
    model = trained(small(name, scriptable=True))
    x = torch.randn(2, 3, 64, 96)
    torch.testing.assert_close(torch.jit.script(model)(x), model(x))


@one_fast
def test_full_graph(name):
    model = Ranked(trained(small(name)))
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    inputs = with_rankings(model, torch.randn(2, 3, 97, 33))
    logits = compiled(*inputs)
    torch.testing.assert_close(logits, model(*inputs), rtol=1e-4, atol=1e-5)
    logits.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@one_fast
def test_export_with_any_batch(name):
    model = Ranked(trained(small(name)))
    inputs = with_rankings(model, torch.randn(2, 3, 64, 64))
    program = torch.export.export(model, inputs, dynamic_shapes=any_batch(inputs))
    for count in (1, 5):
        inputs = with_rankings(model, torch.randn(count, 3, 64, 64))
        torch.testing.assert_close(program.module()(*inputs), model(*inputs), rtol=1e-4, atol=1e-5)


@one_fast
def test_onnx(name, tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    model = Ranked(trained(small(name)))
    inputs = with_rankings(model, torch.randn(2, 3, 64, 64))
    path = tmp_path / "model.onnx"
    torch.onnx.export(
        model,
        inputs,
        path,
        opset_version=18,
        dynamo=True,
        dynamic_shapes=any_batch(inputs),
        verbose=False,
    )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for count in (2, 3):
        x, orders = inputs = with_rankings(model, torch.randn(count, 3, 64, 64))
        names = [node.name for node in session.get_inputs()]
        (logits,) = session.run(None, dict(zip(names, [t.numpy() for t in (x, *orders)], strict=True)))
        torch.testing.assert_close(torch.from_numpy(logits), model(*inputs).detach(), rtol=1e-4, atol=1e-4)


def in_their_order(*args):
    """What ranks nearly alike may be swapped by rounding: here it stands as it lies, tokens or regions."""
    if len(args) == 1:  # tokens (B, H, W)
        return torch.arange(args[0].shape[1] * args[0].shape[2]).expand(args[0].shape[0], 2, -1)
    q, _, (rows, cols), topk = args
    return torch.arange(topk).expand(q.shape[0], rows * cols, -1)


since_sizes = pytest.mark.skipif(torch.__version__ < SIZES_SINCE, reason=f"torch {SIZES_SINCE} pools maps of any size")


@since_sizes
@one_fast
def test_export_with_any_size(name):
    """Sizes that the program was not made with: the least, of odd sides, of whole and of single windows."""
    model = trained(small(name))
    if name == "biformer_stl_nchw":
        with pytest.raises(ValueError, match="depends on the size of the image: no single program serves all sizes"):
            program(model, torch.randn(2, 3, 64, 96), any_size=True)
        return
    with ranking(model, in_their_order):
        made = program(model, torch.randn(2, 3, 64, 96), dynamic=True, any_size=True).module()
        for size in ((3, 3, 64, 64), (1, 3, 97, 70), (2, 3, 224, 224), (1, 3, 120, 640)):
            x = torch.randn(*size)
            torch.testing.assert_close(made(x), model(x), rtol=1e-4, atol=1e-5)


@since_sizes
@pytest.mark.parametrize("head", [HEADS[0], *(pytest.param(head, marks=pytest.mark.slow) for head in HEADS[1:])])
def test_segmenters_with_any_size(head):
    """In float64, since a logit may be next to nothing."""
    model = trained(segmenter(small("stvit_b", features_only=True), 5, head=head, channels=16)).double()
    made = program(model, torch.randn(2, 3, 64, 96).double(), dynamic=True, any_size=True).module()
    for size in ((3, 3, 64, 64), (1, 3, 97, 70), (2, 3, 224, 224), (1, 3, 120, 640)):
        x = torch.randn(*size).double()
        torch.testing.assert_close(made(x), model(x))


def test_export_with_any_size_has_a_least_torch(monkeypatch):
    monkeypatch.setattr("zoo.export.SIZES_SINCE", "99.0")
    with pytest.raises(ValueError, match=r"torch is .*: programs for any size need 99\.0"):
        program(small("davit_t"), torch.randn(2, 3, 64, 96), any_size=True)


@since_sizes
def test_positions_of_a_program_for_any_size():
    """As many tokens as the table has entries read it in order, whatever their sides; all others a resized one."""
    model = trained(small("sgformer_b", img_size=(64, 96))).stem.position
    tokens = {1: torch.export.Dim("h"), 2: torch.export.Dim("w")}
    made = torch.export.export(model, (torch.randn(2, 8, 9, 32),), dynamic_shapes=(tokens,)).module()
    for side in ((16, 24), (12, 32), (24, 16), (16, 23), (7, 5)):
        x = torch.randn(2, *side, 32)
        torch.testing.assert_close(made(x), model(x), rtol=0, atol=1e-6)


@pytest.mark.slow
@every_small
def test_compiled(name):
    """The default compiler, forward and backward."""
    model = Ranked(trained(small(name)))
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True)
    inputs = with_rankings(model, torch.randn(2, 3, 64, 64))
    torch.testing.assert_close(compiled(*inputs), model(*inputs), rtol=1e-3, atol=1e-4)
    compiled(*inputs).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
