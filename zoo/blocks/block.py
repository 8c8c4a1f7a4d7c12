"""The parts of all blocks, the block that GC ViT, NAT and their relatives share, and the rates of drop path."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from timm.layers import DropPath, LayerScale
from torch import Tensor, nn

from .checks import number


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
        if layer_scale is not None:
            layer_scale = number("layer_scale", layer_scale, "the first value of the factors on the branches, or None")
        options = {"dim": dim, "drop_path": drop_path, "scale": layer_scale}
        attn = self.branch(nn.LayerNorm(dim), attention, **options)
        mlp = Residual(nn.LayerNorm(dim), Mlp(dim, hidden_units(dim, mlp_ratio)), **options)
        super().__init__(OrderedDict(attn=attn, mlp=mlp))


def hidden_units(dim: int, mlp_ratio: Any) -> int:
    """The hidden units of an MLP. Raises ValueError unless the ratio is a number."""
    return int(dim * number("mlp_ratio", mlp_ratio, "hidden units of an MLP per channel"))


def drop_path_rates(rate: float, depths: Sequence[int], *, reached: bool = True) -> list[list[float]]:
    """A linear ramp from 0 over all blocks, one list per stage.

    reached   True: the last block has `rate`, as torch.linspace(0, rate, N); False: block b has rate * b / N, as in the
              authors' MaxViT
    Raises ValueError unless `rate` is a probability.
    """
    rate = number("drop_path_rate", rate, "a probability, from 0 to 1", 0, 1)
    total = sum(depths)
    last = max(total - 1, 1) if reached else total
    ramp = iter([rate * block / last for block in range(total)])
    return [[next(ramp) for _ in range(depth)] for depth in depths]
