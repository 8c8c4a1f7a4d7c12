"""The residual branch that every block of the zoo consists of."""

from collections.abc import Sequence
from numbers import Real

from timm.layers import DropPath, LayerScale
from torch import Tensor, nn


class Residual(nn.Module):
    """x + drop_path(gamma * fn(norm(x))); `scale` is gamma's initial value, None leaves gamma out."""

    def __init__(
        self, norm: nn.Module, fn: nn.Module, *, dim: int = 0, drop_path: float = 0.0, scale: float | None = None
    ) -> None:
        super().__init__()
        self.norm = norm
        self.fn = fn
        self.scale = nn.Identity() if scale is None else LayerScale(dim, scale)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:  # (B, H, W, C)
        return x + self.drop_path(self.scale(self.fn(self.norm(x))))


def drop_path_rates(rate: float, depths: Sequence[int], *, reached: bool = True) -> list[list[float]]:
    """A linear ramp from 0 over all blocks, one list per stage.

    reached   True: the last block has `rate`, as torch.linspace(0, rate, N); False: block b has rate * b / N, as in the
              authors' MaxViT
    Raises ValueError unless `rate` is a probability.
    """
    if not isinstance(rate, Real) or not 0 <= rate <= 1:
        raise ValueError(f"drop_path_rate is {rate!r}: expected a probability, from 0 to 1")
    total = sum(depths)
    last = max(total - 1, 1) if reached else total
    ramp = iter([rate * block / last for block in range(total)])
    return [[next(ramp) for _ in range(depth)] for depth in depths]
