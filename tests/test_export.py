"""Script, trace, compile and export: what each of them gives is what the model gives."""

import pytest
import torch

from families import SMALL
from test_models import every_small, small, trained

# compilers take their time: the first variant of a class in every run, the others with the slow tests
one_fast = pytest.mark.parametrize(
    "name", [name if name == "maxvit_t" else pytest.param(name, marks=pytest.mark.slow) for name in SMALL]
)


@every_small
def test_torchscript(name):
    model = trained(small(name, scriptable=True))
    x = torch.randn(2, 3, 64, 96)
    torch.testing.assert_close(torch.jit.script(model)(x), model(x))


@one_fast
def test_full_graph(name):
    model = trained(small(name))
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 97, 33)
    logits = compiled(x)
    torch.testing.assert_close(logits, model(x), rtol=1e-4, atol=1e-5)
    logits.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@one_fast
def test_export_with_any_batch(name):
    model = trained(small(name))
    batch = torch.export.Dim("batch", max=64)
    program = torch.export.export(model, (torch.randn(2, 3, 64, 64),), dynamic_shapes=({0: batch},))
    for count in (1, 5):
        x = torch.randn(count, 3, 64, 64)
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-5)


@one_fast
def test_onnx(name, tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    model = trained(small(name))
    x = torch.randn(2, 3, 64, 64)
    path = tmp_path / "model.onnx"
    torch.onnx.export(
        model,
        (x,),
        path,
        opset_version=18,
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("batch", max=64)},),
        verbose=False,
    )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for count in (2, 3):
        x = torch.randn(count, 3, 64, 64)
        (logits,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), model(x).detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@every_small
def test_compiled(name):
    """The default compiler, forward and backward."""
    model = trained(small(name))
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True)
    x = torch.randn(2, 3, 64, 64)
    expected = model(x)
    torch.testing.assert_close(compiled(x), expected, rtol=1e-3, atol=1e-4)
    compiled(x).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
