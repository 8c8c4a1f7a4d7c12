"""The law that every implementation is held to: at most twice as wrong as the reference in its dtype."""

import torch
from op_cases import Case, gradients


def hold(case: Case, impl: str, dtype: torch.dtype, device: str = "cpu") -> None:
    """Compares the output and every gradient; the truth is the reference in float64, on the same rounded inputs."""
    rounded = {name: t.to(device, dtype) for name, t in case.make().items()}
    truth = gradients(case, {name: t.double() for name, t in rounded.items()}, "reference")
    eager = gradients(case, rounded, "reference")
    got = gradients(case, rounded, impl)
    eps = torch.finfo(dtype).eps
    for name, t, e, g in zip(("output", *rounded), truth, eager, got, strict=True):
        assert g.dtype == dtype and g.shape == t.shape
        error, allowed = (g.double() - t).abs().max(), 2 * (e.double() - t).abs().max() + 4 * eps * t.abs().max()
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"
