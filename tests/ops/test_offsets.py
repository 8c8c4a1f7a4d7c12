"""When kernels count in 64 bits: where offsets within one image need them, and nowhere else."""

import os

import pytest
import torch

pytest.importorskip("triton")

import ops
from ops.ahead import compile, distinct
from ops.recording import recording
from ops.tiles import backward_table_kernel, far_spread, strides


@pytest.mark.parametrize(
    "shape, steps, far",
    [
        ((2, 56, 56, 2, 32), (56 * 56 * 64, 56 * 64, 64, 32, 1), False),
        # images may lie as far from each other as they like: where one begins is always counted in 64 bits
        ((2, 4, 8, 1, 16), (2**40, 128, 16, 16, 1), False),
        ((2, 4, 8, 1, 16), (2**32, 2**30, 16, 16, 1), True),  # rows
        ((2, 4, 8, 1, 16), (2**32, 8, 1, 1, 2**28), True),  # channels
        ((1, 8200, 8200, 1, 32), (0, 0, 0, 0, 0), True),  # expanded: the result is not
        # gradients of a third of a packed map lie as far apart as the whole
        ((1, 4096, 4096, 1, 42), (4096 * 4096 * 42, 4096 * 42, 42, 42, 1), False),
        ((1, 4096, 4096, 1, 43), (4096 * 4096 * 43, 4096 * 43, 43, 43, 1), True),
        ((0, 56, 56, 2, 32), (0, 56 * 64, 64, 32, 1), False),
    ],
)
def test_far_spread(shape, steps, far):
    assert far_spread(shape, steps) is far


def test_one_far_spread_map_is_enough():
    near, far = torch.empty(1, 2, 2, 3, device="meta"), torch.empty(1, 32768, 32768, 3, device="meta")
    assert strides(near, near) == [(12, 6, 3, 1, None)] * 2
    assert [steps[-1] for steps in strides(near, far)] == [1, 1]


CALLS = {
    "window": lambda q: ops.window_attention(q, q, q, None, (7, 7)),
    "large window": lambda q: ops.window_attention(q, q, q, None, (14, 14)),
    "shared query": lambda q: ops.window_attention(q[:, :7, :7], q, q, None, (7, 7)),
    "neighborhood": lambda q: ops.neighborhood_attention(q, q, q, None, 7),
    "channel": lambda q: ops.channel_attention(q, q, q),
    "routed": lambda q: ops.routed_attention(q, q, q, (7, 7), 2, torch.empty(1, 49, 2, device="meta").long()),
    "super tokens": lambda q: ops.scatter_super_tokens(*ops.super_tokens(q[..., 0, :], (8, 8)), (8, 8)),
    "merged tokens": lambda q: torch.cat(
        ops.reallocate_tokens(q[..., 0, :], q[..., 0, 0], [q.new_empty(1, 4)], [q.new_empty(1)], [1])
    ),
    "merged tokens of large shares": lambda q: torch.cat(
        ops.reallocate_tokens(
            q[..., 0, :], q[..., 0, 0], [q.new_empty(1, 4)] * 2, [q.new_empty(1)] * 2, [2**20, 2**20 + 1]
        )
    ),
    "significance": lambda q: q[:, :7, :7, 0, 0] * ops.significance(q, q[:, :7, :7]),
    "significance in windows": lambda q: q[..., 0, 0] * ops.significance(q, q, (7, 7)),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("side, flag", [(56, None), (56 * 146, 1)])
def test_launches_say_whether_images_are_far_spread(call, side, flag):
    q = torch.empty(1, side, side, 1, 32, device="meta", dtype=torch.bfloat16, requires_grad=True)
    with recording() as launches:
        call(q).sum().backward()
    tuples = [value for launch in launches for value in launch.values if isinstance(value, tuple)]
    told = [steps for steps in tuples if len(steps) > 4]  # others are no map's
    assert told
    assert {steps[-1] for steps in told} == {flag}


@pytest.mark.parametrize("side, flag", [(215, None), (216, 1)])
def test_pairs_of_a_large_window_are_counted_in_64_bits(side, flag):
    """Of a table's gradient: 46,368 lanes of queries, and as many of keys, are just more than 2**31."""
    q = torch.empty(1, side, 215, 1, 16, device="meta", dtype=torch.bfloat16)
    bias = torch.empty(1, 2 * side - 1, 429, device="meta", requires_grad=True)
    with recording() as launches:
        ops.window_attention(q, q, q, bias, (side, 215)).sum().backward()
    (launch,) = (launch for launch in launches if launch.kernel is backward_table_kernel)
    assert launch.values[-1] == flag
    if os.environ.get("TRITON_INTERPRET") != "1":
        assert compile(launch, "sm_90").fits


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels cannot be compiled")
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_kernels_build_for_far_spread_images(call):
    q = torch.empty(1, 8176, 8176, 1, 32, device="meta", dtype=torch.bfloat16, requires_grad=True)
    with recording() as launches:
        call(q).sum().backward()
    for launch in distinct(launches):
        assert compile(launch, "sm_90").fits
