"""The law that every implementation is held to: at most twice as wrong as the reference in its dtype.

    error(implementation) <= 2 * error(reference in the dtype) + 4 * eps(dtype) * max|truth|

The truth is the reference in float64, on inputs that were rounded to the dtype. Nothing is tuned by hand.
"""

import torch
from torch import Tensor

from .cases import Case, gradients


def shares(case: Case, impl: str, dtype: torch.dtype, device: str = "cpu") -> dict[str, float]:
    """How much of the allowed error the output and the gradient of every input have; above 1 the law is broken."""
    rounded = {name: t.to(device, dtype) for name, t in case.make().items()}
    truth = gradients(case, {name: t.double() for name, t in rounded.items()}, "reference")
    eager = gradients(case, rounded, "reference")
    got = gradients(case, rounded, impl)
    return {name: share(*found) for name, *found in zip(("output", *rounded), truth, eager, got, strict=True)}


def share(truth: Tensor, eager: Tensor, got: Tensor) -> float:
    """One tensor's error by what is allowed: `truth` in float64, the others in the dtype under test.

    NaN where one of them is NaN, and infinity where the shape or the dtype is not the reference's.
    """
    if got.dtype != eager.dtype or got.shape != truth.shape:
        return float("inf")
    error, eps = (got.double() - truth).abs().max(), torch.finfo(got.dtype).eps
    allowed = 2 * (eager.double() - truth).abs().max() + 4 * eps * truth.abs().max()
    return 0.0 if error == 0 else float(error / allowed)


def broken(found: dict[str, float]) -> str:
    """What breaks the law, for a message; empty where all keep it."""
    return ", ".join(f"{name}: {value:.2f} of the allowed error" for name, value in found.items() if not value <= 1)
