"""Every op through TorchScript, torch.compile and torch.export, and window attention through ONNX."""

import io
import subprocess
import sys
import warnings

import pytest
import torch
from torch import Tensor, nn

import ops
from ops.check.cases import packed, random
from ops.check.tables import CASES

FIRST = list({case.op: case for case in reversed(CASES)}.values())
ODD = [case for case in CASES if case.name in ("grid_odd", "outside", "shared_odd", "large")]


class Window(nn.Module):
    def __init__(self, partition: str = "block"):
        super().__init__()
        self.partition, self.bias = partition, nn.Parameter(random(2, 7, 5).float())

    def forward(self, qkv: Tensor) -> Tensor:
        q, k, v = qkv.unbind(3)
        return ops.window_attention(q, k, v, self.bias, window=(4, 3), partition=self.partition)


@pytest.fixture
def quiet():
    with warnings.catch_warnings():  # TorchScript is deprecated, and timm's contract still asks for it
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("name", [n for n in ops.__all__ if n != "implementation"])
def test_scripts(name, quiet):
    torch.jit.script(getattr(ops, name))


@pytest.mark.parametrize("partition", ["block", "grid"])
def test_scripted_module_answers_the_same(partition, quiet):
    model, x = Window(partition), packed(2, 9, 13, 2, 8).float()
    torch.testing.assert_close(torch.jit.script(model)(x), model(x), rtol=0, atol=1e-6)


def test_scripted_call_checks_its_arguments(quiet):
    q, k, v = packed(1, 4, 4, 1, 4).unbind(3)
    with pytest.raises(Exception, match="expected 'block' or 'grid'"):
        torch.jit.script(ops.window_attention)(q, k, v, None, window=(2, 2), partition="tile")


def test_scripted_call_takes_one_number_for_both_axes(quiet):
    q, k, v = packed(1, 4, 4, 1, 4).unbind(3)
    scripted, map_ = torch.jit.script(ops.window_attention), (q, k, v, None)
    assert torch.equal(scripted(*map_, window=2), scripted(*map_, window=(2, 2)))
    scripted = torch.jit.script(ops.significance)
    assert torch.equal(scripted(q, k, window=2), scripted(q, k, window=(2, 2)))


@pytest.mark.parametrize("case", FIRST + ODD, ids=str)
def test_compiles_as_one_graph(case):
    torch.compiler.reset()
    inputs = case.make()
    compiled = torch.compile(lambda t: case.call(**t), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(inputs), case.call(**inputs), rtol=0, atol=1e-13)


def test_compiled_model_follows_the_setting(marked_reference):
    model, x = Window(), packed(2, 9, 13, 2, 8).float()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    fast = compiled(x)
    with ops.implementation("reference"):
        assert torch.equal(compiled(x), model(x)) and not torch.equal(model(x), fast)
    assert torch.equal(compiled(x), fast)


@pytest.mark.slow
@pytest.mark.parametrize("case", FIRST, ids=str)
def test_inductor(case):
    torch.compiler.reset()
    inputs = {name: t.float().requires_grad_() for name, t in case.make().items()}
    out, want = torch.compile(lambda t: case.call(**t), fullgraph=True)(inputs), case.call(**inputs)
    torch.testing.assert_close(out, want, rtol=0, atol=1e-5)
    leaves = list(inputs.values())
    pairs = zip(*(torch.autograd.grad(t.sum(), leaves, materialize_grads=True) for t in (out, want)), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", FIRST, ids=str)
def test_exports(case):
    class Module(nn.Module):
        def forward(self, inputs):
            return case.call(**inputs)

    inputs = case.make()
    exported = torch.export.export(Module(), (inputs,))
    torch.testing.assert_close(exported.module()(inputs), case.call(**inputs), rtol=0, atol=1e-13)


@pytest.mark.parametrize("partition", ["block", "grid"])
def test_exports_with_any_batch(partition):
    model, batch = Window(partition), {0: torch.export.Dim("batch")}
    exported = torch.export.export(model, (packed(2, 9, 13, 2, 8).float(),), dynamic_shapes=(batch,)).module()
    x = packed(5, 9, 13, 2, 8).float()
    torch.testing.assert_close(exported(x), model(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize("grad", [True, False], ids=["products", "sdpa"])
def test_onnx_with_any_batch(grad, quiet):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, x, file = Window("grid"), packed(5, 9, 13, 2, 8).float(), io.BytesIO()
    with torch.set_grad_enabled(grad):
        torch.onnx.export(
            model, (x[:2],), file, dynamo=True, dynamic_shapes=({0: torch.export.Dim("batch")},), verbose=False
        )
    session = onnxruntime.InferenceSession(file.getvalue())
    (out,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(out), model(x), rtol=0, atol=1e-5)


def test_import_leaves_kernels_and_compilers_for_later():
    """Kernels are interpreted if the variable is set when they are defined, and torch's compiler takes seconds."""
    code = "import sys, ops; assert not {'triton', 'torch._dynamo'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_import_needs_torch_alone():
    others = [
        *("triton", "timm", "torchvision", "safetensors", "numpy.testing", "hydra", "omegaconf", "datasets", "wandb"),
        *("sklearn", "matplotlib", "rich", "torchmetrics", "pyarrow", "pycocotools"),
    ]
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({others}))\n"
        "import ops, torch; q = torch.ones(1, 4, 4, 1, 4)\n"
        "ops.window_attention(q, q, q, None, window=(2, 2)); assert not {'zoo', 'recipes'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_commands_do_without_triton():
    """Which is installed on Linux alone: the one that compiles says so, the others start."""
    code = (
        "from importlib.machinery import PathFinder; find = PathFinder.find_spec\n"
        "PathFinder.find_spec = lambda name, *given: None if name == 'triton' else find(name, *given)\n"
        "import ops.bench, zoo.bench, recipes.bench, recipes.data.bench\n"
        "from ops.check import main; from zoo import kernels\n"
        "assert main(['--cases', 'window_attention-one_pixel', '--dtypes', 'float32']) == 0\n"
        "kernels.main(['davit_t'])"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert child.returncode == 2 and "zoo.kernels needs the package triton" in child.stderr, child.stdout + child.stderr
    assert "ok      torch float32" in child.stdout
