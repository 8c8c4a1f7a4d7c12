"""The recorded answers of natten 0.17.5 (op_na2d.json), and what our implementations answer to the same."""

import json
from pathlib import Path

import numpy as np
import torch

import ops

RECORD = json.loads(Path(__file__).with_name("op_na2d.json").read_text())


def case_id(case):
    return f"{case['size']}-k{case['kernel']}-d{case['dilation']}-{'bias' if case['rpb'] else 'no_bias'}"


def answers(case, impl, dtype=torch.float64, device="cpu"):
    """What an implementation answers, by the names of the record."""
    rng = np.random.default_rng(case["seed"])
    shape = (1, RECORD["heads"], *case["size"], RECORD["dim"])
    shapes = [shape] * 3 + [(RECORD["heads"], *(2 * n - 1 for n in case["kernel"]))] * case["rpb"]
    inputs = [torch.from_numpy(rng.standard_normal(s)).to(device, dtype).requires_grad_() for s in shapes]
    q, k, v = (t.permute(0, 2, 3, 1, 4) for t in inputs[:3])
    out = ops.neighborhood_attention(
        q,
        k,
        v,
        inputs[3] if case["rpb"] else None,
        window=tuple(case["kernel"]),
        dilation=tuple(case["dilation"]),
        scale=RECORD["scale"],
        impl=impl,
    )
    out = out.permute(0, 3, 1, 2, 4)
    probe = torch.from_numpy(np.random.default_rng(7).standard_normal(shape)).to(device, dtype)
    names = ["dq", "dk", "dv", "drpb"][: len(inputs)]
    return dict(zip(["out", *names], [out, *torch.autograd.grad(out, inputs, probe)], strict=True))
