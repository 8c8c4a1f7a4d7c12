"""Script, trace, compile and export: what each of them gives is what the model gives, by the same rankings."""

import pytest
import torch

from families import SMALL
from rankings import Ranked, rankings
from test_models import every_small, small, trained

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
