"""The block of GC ViT, of NAT and of their relatives."""

from collections import OrderedDict

from torch import nn

from .mlp import Mlp
from .residual import Residual


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
