"""The parts of all blocks, the block that GC ViT, NAT and their relatives share, and the rates of drop path."""

from collections import OrderedDict
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


class Mlp(nn.Module):
    """fc2(act(fc1(x))) over the last axis; `hidden` units in between. Raises ValueError if there are none."""

    def __init__(self, dim: int, hidden: int, act: type[nn.Module] = nn.GELU) -> None:
        super().__init__()
        if hidden < 1:
            raise ValueError(f"an MLP for {dim} channels has {hidden} hidden units: expected 1 or more")
        self.fc1 = nn.Linear(dim, hidden)
        self.act = act()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:  # (..., dim)
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Sequential):
    """Attention, then an MLP `mlp_ratio` times as wide; with gamma if `layer_scale` gives its first value."""

    branch: type[Residual] = Residual  # of the attention

    def __init__(
        self, dim: int, attention: nn.Module, mlp_ratio: float, drop_path: float, layer_scale: float | None = None
    ) -> None:
        options = {"dim": dim, "drop_path": drop_path, "scale": layer_scale}
        attn = self.branch(nn.LayerNorm(dim), attention, **options)
        mlp = Residual(nn.LayerNorm(dim), Mlp(dim, int(dim * mlp_ratio)), **options)
        super().__init__(OrderedDict(attn=attn, mlp=mlp))


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
