"""How kernels multiply float32: whether one fits a GPU depends on it too. Needs only torch."""

from functools import cache

import torch

HOW = ("ieee", "tf32", "tf32x3")

_float32: str | None = None  # how float32 is multiplied, if torch's own matmuls do not decide


def multiply_float32(how: str) -> None:
    """Set how this process multiplies float32, for benchmarks and checks.

    how  "ieee" or "tf32", for torch's own matmuls too; or "tf32x3", for kernels alone: three matmuls in TF32, of the
         rounded values and of what rounding left, with nearly the precision of IEEE's
    """
    global _float32
    _float32 = how if how == "tf32x3" else None
    # torch's compiler asks the older API, which answers with an error once the newer one has allowed TF32
    torch.set_float32_matmul_precision("high" if how == "tf32" else "highest")


def precision(dtype: torch.dtype = torch.float32) -> str:
    """How `tl.dot` multiplies data of this dtype: in IEEE precision, unless the user allows TF32 for torch's own
    matmuls, which only float32 follows: binaries of other dtypes, and what was tuned for them, serve in both cases.

    `fp32_precision` reflects both of torch's APIs; the older getter raises an error once the newer API has been used.
    """
    if dtype != torch.float32:
        return "ieee"
    if _float32 is not None:
        return _float32
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" and has_tf32() else "ieee"


@cache
def has_tf32() -> bool:
    """Whether Triton supports TF32 on this GPU; of AMD's GPUs, only gfx942."""
    return torch.version.hip is None or "gfx942" in torch.cuda.get_device_properties().gcnArchName
