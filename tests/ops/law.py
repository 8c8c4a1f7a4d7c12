"""The law that every implementation is held to: at most twice as wrong as the reference in its dtype."""

import torch
from op_cases import Case, gradients
from torch import Tensor


def hold(case: Case, impl: str, dtype: torch.dtype, device: str = "cpu") -> None:
    """Compares the output and every gradient; the truth is the reference in float64, on the same rounded inputs."""
    rounded = {name: t.to(device, dtype) for name, t in case.make().items()}
    truth = gradients(case, {name: t.double() for name, t in rounded.items()}, "reference")
    eager = gradients(case, rounded, "reference")
    got = gradients(case, rounded, impl)
    for name, t, e, g in zip(("output", *rounded), truth, eager, got, strict=True):
        assert g.dtype == dtype
        check(name, t, e, g)


def check(name: str, truth: Tensor, eager: Tensor, got: Tensor) -> None:
    """One tensor: `truth` in float64, the others in the dtype under test."""
    assert got.dtype == eager.dtype and got.shape == truth.shape
    error, eps = (got.double() - truth).abs().max(), torch.finfo(got.dtype).eps
    allowed = 2 * (eager.double() - truth).abs().max() + 4 * eps * truth.abs().max()
    assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"
