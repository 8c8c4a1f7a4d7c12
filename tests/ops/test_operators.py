"""The kernels' operators as torch sees them, on any machine: on CPU tensors they compute their references."""

import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("under the interpreter the kernels run instead", allow_module_level=True)

from torch.utils.flop_counter import FlopCounterMode

from ops import super_tokens
from ops.check.cases import packed, random
from ops.registration import NAMESPACE, together
from ops.window_attention.triton_path import attend as window_attend

ROOT = Path(__file__).parents[2]
PATHS = [
    importlib.import_module(f"ops.{op}.triton_path")
    for op in (
        *("channel_attention", "neighborhood_attention", "routed_attention"),
        *("super_token_attention", "token_reallocation"),
    )
]


def leaves(*tensors):
    return [t.float().requires_grad_() for t in tensors]


def window_arguments(bias, outside):
    q, k, v = leaves(*packed(1, 5, 6, 2, 8).unbind(3))
    (bias,) = leaves(random(2, 7, 7)) if bias else [None]
    k0, v0 = leaves(random(2, 8, seed=1), random(2, 8, seed=2)) if outside else (None, None)
    return q, k, v, bias, k0, v0, [4, 4], False, 0.3


def neighborhood_arguments(bias, outside):
    q, k, v = leaves(*packed(1, 5, 7, 2, 8).unbind(3))
    (bias,) = leaves(random(2, 5, 5)) if bias else [None]
    k0, v0 = leaves(random(2, 8, seed=1), random(2, 8, seed=2)) if outside else (None, None)
    return q, k, v, bias, k0, v0, [3, 3], [2 if outside else 1, 2], 0.3


CALLS = {
    "neighborhood_attention": lambda: neighborhood_arguments(True, True),
    "neighborhood_attention-plain": lambda: neighborhood_arguments(False, False),
    "routed_attention": lambda: (
        *leaves(*packed(2, 6, 6, 2, 8).unbind(3)),
        torch.tensor([[[0, 2], [1, 0], [3, 1], [2, 3]]] * 2),
        [2, 2],
        0.3,
    ),
    "significance": lambda: (*(t.float() for t in packed(1, 4, 6, 2, 8).unbind(3)[:2]), [2, 3], 0.3),
    "merged_tokens": lambda: (
        leaves(random(2, 4, 6, 5))[0],
        torch.stack([torch.arange(24), torch.arange(24).flip(0)]).expand(2, -1, -1).contiguous(),
        *leaves(random(5), random(2)),
        [3, 2],
        [1, 1],
    ),
    "super_token_share": lambda: (*leaves(random(2, 7, 9, 6), random(2, 2, 3, 6)), [4, 3]),
    "super_token_average": lambda: (*leaves(random(2, 7, 9, 6), random(2, 7, 9, 9).softmax(-1)), [4, 3], True),
    "super_token_distribute": lambda: (*leaves(random(2, 2, 3, 6), random(2, 7, 9, 9).softmax(-1)), [4, 3]),
    "channel_attention": lambda: (*leaves(*packed(2, 5, 6, 2, 8).unbind(3)), 0.1),
    "window_attention": lambda: window_arguments(True, True),
    "window_attention-plain": lambda: window_arguments(False, False),
    "window_attention-shared": lambda: (leaves(random(1, 4, 4, 2, 8))[0], *window_arguments(False, False)[1:]),
    "ranked_tokens": lambda: (random(2, 4, 6).float(),),
}


def operator(name):
    return getattr(getattr(torch.ops, NAMESPACE), name.partition("-")[0]).default


@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name):
    """Schema, registration of autograd, fake tensors, and tracing with dynamic sizes."""
    torch.library.opcheck(operator(name), CALLS[name]())


# pixels, keys that each meets, channels of all heads, products; maps that windows and cells do not divide are filled
PRODUCTS = {
    "neighborhood_attention-plain": 35 * 9 * 16 * 2,
    "routed_attention": 72 * 2 * 9 * 16 * 2,
    "significance": 24 * 6 * 16,
    "merged_tokens": 2 * 24 * 2 * 5,
    "super_token_share": 2 * 72 * 9 * 6,
    "super_token_average": 2 * 72 * 9 * 6,
    "super_token_distribute": 2 * 72 * 9 * 6,
    "channel_attention": 60 * 8 * 16 * 2,
    "window_attention": 64 * 16 * 16 * 2,
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_flops(name):
    """What torch counts where kernels run, and no operator of its own: multiplications and additions of products."""
    arguments = [x.detach().to("meta") if isinstance(x, torch.Tensor) else x for x in CALLS[name]()]
    with FlopCounterMode(display=False) as forward:
        out = operator(name)(*arguments)
    assert forward.get_total_flops() == 2 * PRODUCTS[name]
    if name == "significance":  # has no gradient
        return
    out = out if isinstance(out, tuple) else (out,)
    with FlopCounterMode(display=False) as backward:
        operator(f"{name.partition('-')[0]}_backward")(torch.empty_like(out[0]), *arguments, *out)
    assert backward.get_total_flops() == 2 * forward.get_total_flops()


def test_super_tokens_of_halves_are_averages_as_in_the_reference(far):
    """Also of one that no pixel is near to: float16 has no divisor as small as 1e-12."""
    tokens, affinity = super_tokens(far, 8, impl="reference")
    found, _ = operator("super_token_average")(far, affinity, [8, 8], False)
    assert torch.equal(found, tokens)


class Attention(torch.nn.Module):
    def forward(self, q):
        return window_attend(q, q, q, None, (4, 4), False, 0.3, None)


def test_export_sees_one_operator():
    q = packed(1, 5, 6, 2, 8).select(3, 0).float()
    program = torch.export.export(Attention(), (q,))
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert names[0] == "attention_backbones.window_attention.default"
    torch.testing.assert_close(program.module()(q), Attention()(q))


def test_a_program_is_loaded_where_no_op_has_run(tmp_path):
    q = packed(1, 5, 6, 2, 8).select(3, 0).float()
    torch.export.save(torch.export.export(Attention(), (q,)), tmp_path / "program.pt2")
    torch.save((q, Attention()(q)), tmp_path / "answer.pt")
    code = (
        "import sys, torch; q, want = torch.load('answer.pt'); import ops.operators\n"
        "assert torch.equal(torch.export.load('program.pt2').module()(q), want)\n"
        "print(*sorted(name for name in sys.modules if name.endswith('.triton_path')))"
    )
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": paths}
    child = subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    found = [f"ops.{path.parent.name}.triton_path" for path in ROOT.glob("ops/*/triton_path.py")]
    assert child.stdout.split() == sorted(found)


def test_tensors_on_several_gpus_are_refused():
    """Of which no tensor is needed to tell."""
    first, second = (SimpleNamespace(get_device=lambda i=i: i, device=torch.device("cuda", i)) for i in (0, 1))
    together((first, None, first), "op")
    with pytest.raises(ValueError, match="op's tensors are on cuda:0, cuda:1: expected one device"):
        together((first, None, first, second), "op")


@pytest.mark.skipif(torch.__version__ < "2.10", reason="torch 2.9 crashes where an operator is defined again")
def test_defined_again_an_operator_is_the_new_one():
    q, k, v = leaves(*packed(1, 5, 6, 2, 8).unbind(3))
    before = PATHS[0].attend(q, k, v, 0.1)
    again = importlib.reload(PATHS[0]).attend(q, k, v, 0.1)
    torch.testing.assert_close(again, before)
    torch.library.opcheck(operator("channel_attention"), (q, k, v, 0.1), test_utils="test_autograd_registration")
