"""The law that every implementation is held to: at most twice as wrong as the reference in its dtype.

    error(implementation) <= 2 * error(reference in the dtype) + 4 * eps(dtype) * max|truth|

The truth is the reference in float64, on inputs that were rounded to the dtype. On a GPU the reference may be as wrong
as it is there or on the CPU: each adds up in an order of its own. Nothing is tuned by hand.
"""

import torch
from torch import Tensor

from .cases import Case, gradients


class Law:
    """What a case is held to in one dtype on one device: the truth, and how wrong the reference is in the dtype."""

    def __init__(self, case: Case, dtype: torch.dtype, device: str = "cpu") -> None:
        self.case, self.device = case, device
        self.rounded = {name: t.to(device, dtype) for name, t in case.make().items()}
        self.truth = gradients(case, {name: t.double() for name, t in self.rounded.items()}, "reference")
        self.eager: dict[str, list[Tensor]] = {}
        self.largest = max(t.norm() for t in self.truth)

    def reference(self, place: str) -> list[Tensor]:
        """The reference's answers in the dtype, as a device gives them."""
        if place not in self.eager:
            answers = gradients(self.case, {name: t.to(place) for name, t in self.rounded.items()}, "reference")
            self.eager[place] = [t.to(self.device) for t in answers]
        return self.eager[place]

    def shares(self, impl: str) -> dict[str, float]:
        """How much of the allowed error the output and the gradient of every input have; above 1 the law is broken.

        The reference on the CPU, which is slow in half precision, is only asked where that on the device allows less.
        """
        got, found = gradients(self.case, self.rounded, impl), {}
        for i, name in enumerate(("output", *self.rounded)):
            for place in dict.fromkeys((self.device, "cpu")):
                value = share(self.truth[i], self.reference(place)[i], got[i], self.largest)
                found[name] = min(value, found.get(name, value))
                if found[name] <= 1:
                    break
        return found


def shares(case: Case, impl: str, dtype: torch.dtype, device: str = "cpu") -> dict[str, float]:
    """`Law.shares` of one implementation."""
    return Law(case, dtype, device).shares(impl)


def share(truth: Tensor, eager: Tensor, got: Tensor, largest: Tensor | float = 0.0) -> float:
    """One tensor's error by what is allowed: `truth` in float64, the others in the dtype under test.

    Where the truth is zero throughout, as the gradient of what a softmax over one key is shifted by, `largest` stands
    in its place: the largest norm of the others, since such a gradient is a sum of terms that cancel, and the roundings
    of all of them are left. NaN where one of them is NaN, and infinity where the shape or the dtype is not the
    reference's.
    """
    if got.dtype != eager.dtype or got.shape != truth.shape:
        return float("inf")
    error, eps = (got.double() - truth).abs().max(), torch.finfo(got.dtype).eps
    scale = truth.abs().max() if truth.any() else largest
    allowed = 2 * (eager.double() - truth).abs().max() + 4 * eps * scale
    return 0.0 if error == 0 else float(error / allowed)


def broken(found: dict[str, float]) -> str:
    """What breaks the law, for a message; empty where all keep it."""
    return ", ".join(f"{name}: {value:.2f} of the allowed error" for name, value in found.items() if not value <= 1)
