"""The error bound for every implementation: about twice the error of the reference in the same dtype.

    error(implementation) <= 2 * error(reference in the dtype) + 4 * eps(dtype) * max|truth|

The truth is the reference in float64, on inputs rounded to the dtype. A gradient of few elements is a sum of many terms
that may cancel by chance: its root mean square counts where that is more than the truth. On a GPU the larger error of
the reference there and on the CPU counts, since each sums in an order of its own. No tolerance is tuned by hand. Where
a GPU multiplies float32 in TF32, eps is TF32's: libraries may still multiply the small matrices of the reference
exactly.
"""

import torch
from torch import Tensor
from torch.autograd.functional import jvp

from ..precision import precision
from .cases import Case, gradients

FEW = 4  # elements up to which all may be small by chance: one is below a tenth of what is usual in 8 of 100 calls


class ErrorBound:
    """The error bound of a case in one dtype on one device: the truth, and the error of the reference in the dtype."""

    def __init__(self, case: Case, dtype: torch.dtype, device: str = "cpu") -> None:
        self.case, self.device = case, device
        self.rounded = {name: t.to(device, dtype) for name, t in case.make().items()}
        exact = {name: t.double() for name, t in self.rounded.items()}
        self.truth = gradients(case, exact, "reference")
        self.sizes = {name: root_mean_square(case, exact, name) for name, t in exact.items() if t.numel() <= FEW}
        self.eager: dict[str, list[Tensor]] = {}
        self.largest = max(t.norm() for t in self.truth)
        self.eps = eps_of(dtype, device)

    def reference(self, place: str) -> list[Tensor]:
        """The answers of the reference in the dtype, computed on the device `place`."""
        if place not in self.eager:
            answers = gradients(self.case, {name: t.to(place) for name, t in self.rounded.items()}, "reference")
            self.eager[place] = [t.to(self.device) for t in answers]
        return self.eager[place]

    def shares(self, impl: str) -> dict[str, float]:
        """The errors of the output and of every input's gradient as shares of the allowed error; above 1 is a failure.

        The reference on the CPU, which is slow in half precision, only runs if the one on the device does not suffice.
        """
        got, found = gradients(self.case, self.rounded, impl), {}
        for i, name in enumerate(("output", *self.rounded)):
            for place in dict.fromkeys((self.device, "cpu")):
                given = self.truth[i], self.reference(place)[i], got[i], self.largest, self.eps
                value = share(*given, self.sizes.get(name, 0.0))
                found[name] = min(value, found.get(name, value))
                if found[name] <= 1:
                    break
        return found


def root_mean_square(case: Case, inputs: dict[str, Tensor], name: str) -> Tensor:
    """The largest root mean square of an element of an input's gradient, over probes that `gradients` could draw."""

    def call(given: Tensor) -> Tensor:
        return case.call(impl="reference", **inputs | {name: given})

    ones = torch.eye(inputs[name].numel()).to(inputs[name]).unflatten(1, inputs[name].shape)
    return max(jvp(call, inputs[name], one)[1].norm() for one in ones)


def eps_of(dtype: torch.dtype, device: str) -> float:
    """The precision of a dtype, or of TF32 where that is how float32 is multiplied."""
    in_tf32 = device == "cuda" and dtype == torch.float32 and precision() == "tf32"
    return torch.finfo(torch.float16 if in_tf32 else dtype).eps  # float16 and TF32 have 10 bits after the point


def share(
    truth: Tensor,
    eager: Tensor,
    got: Tensor,
    largest: Tensor | float = 0.0,
    eps: float | None = None,
    usual: Tensor | float = 0.0,
) -> float:
    """One tensor's error divided by the allowed error: `truth` in float64, the others in the dtype under test.

    Where the truth is zero throughout, as is the gradient of a softmax over one key with respect to its logit, it is
    replaced by `largest`, the largest norm of the other tensors: such a gradient is a sum of terms that cancel, and
    the rounding errors of all of them remain. For the same reason the truth counts as no less than `usual`, if that is
    known. `eps` is the dtype's unless given. NaN if one of the tensors has NaN, infinity if the shape or the dtype
    differs from the reference's.
    """
    if got.dtype != eager.dtype or got.shape != truth.shape:
        return float("inf")
    error, eps = (got.double() - truth).abs().max(), torch.finfo(got.dtype).eps if eps is None else eps
    scale = max(truth.abs().max(), usual) if truth.any() else largest
    allowed = 2 * (eager.double() - truth).abs().max() + 4 * eps * scale
    return 0.0 if error == 0 else float(error / allowed)


def broken(found: dict[str, float]) -> str:
    """What exceeds the allowed error, for a message; empty if nothing does."""
    return ", ".join(f"{name}: {value:.2f} of the allowed error" for name, value in found.items() if not value <= 1)
