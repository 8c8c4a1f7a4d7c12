"""STViT: Vision Transformer with Super Token Sampling, https://arxiv.org/abs/2211.11167

Early stages have too many pixels, and too similar ones, for full attention: each pixel is shared among the 3 x 3 cells
of a coarse grid around it, the averages of the cells (super tokens) attend to each other over the whole image, and each
pixel gets back the results of its cells, in the same shares.
"""

from collections import OrderedDict
from collections.abc import Collection, Sequence

from timm.models import register_notrace_function
from torch import Tensor, fx, nn

from ops import pooled_attention, scatter_super_tokens, super_tokens

from .backbone import Backbone, Head, Stage
from .blocks import (
    ChainStem,
    ConvPosition,
    Halve,
    Mlp,
    Nhwc,
    Residual,
    check_count,
    check_heads,
    check_model,
    drop_path_rates,
    init_linear,
    window_sides,
)
from .registry import register

for op in (pooled_attention, scatter_super_tokens, super_tokens):
    fx.wrap(op)
    register_notrace_function(op)

# Table 1 and the authors' code; all cells (8, 4, 1, 1), also for 384 pixels
VARIANTS = {
    "stvit_s": {
        "dims": (64, 128, 320, 512),
        "depths": (3, 5, 9, 3),
        "heads": (1, 2, 5, 8),
        "img_size": 224,
    },
    "stvit_b": {
        "dims": (96, 192, 384, 512),
        "depths": (4, 6, 14, 6),
        "heads": (2, 3, 6, 8),
        "layer_scale_stages": (2, 3),
        "img_size": 224,
    },
    "stvit_l": {
        "dims": (96, 192, 448, 640),
        "depths": (4, 7, 19, 8),
        "heads": (2, 3, 7, 10),
        "layer_scale_stages": (2, 3),
        "img_size": 224,
    },
}

HEAD_WIDTH = 1024
LAYER_SCALE = 1e-6


class Stem(ChainStem):
    """Four 3 x 3 convolutions, the first and third of stride 2; the activation comes before the norm."""

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        widths = (in_chans, dim // 2, dim // 2, dim, dim)
        for i, stride in enumerate((2, 1, 2, 1)):
            self.add_module(f"conv{i + 1}", nn.Conv2d(widths[i], widths[i + 1], 3, stride, 1))
            self.add_module(f"act{i + 1}", nn.GELU())
            self.add_module(f"norm{i + 1}", nn.BatchNorm2d(widths[i + 1]))


class SelfAttention(nn.Module):
    """Multi-head self-attention over the whole map; q, k and v of a head are adjacent in the projection."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        check_heads(dim, heads)
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:  # (B, H, W, C)
        b, h, w, c = x.shape
        q, k, v = self.qkv(x).view(b, h, w, self.heads, 3, c // self.heads).unbind(4)  # (B, H, W, heads, D)
        return self.proj(pooled_attention(q, k, v).reshape(b, h, w, c))


class SuperTokenAttention(nn.Module):
    """Figure 2: pixels to super tokens, attention among these, and back. With cells of one pixel, plain attention."""

    def __init__(
        self, dim: int, heads: int, cell: int | tuple[int, int], iterations: int, differentiable: bool
    ) -> None:
        super().__init__()
        check_count("iterations", iterations, "rounds of averaging")
        self.cell = window_sides(cell, "cell", "pixel")
        self.iterations = iterations
        self.differentiable = differentiable
        self.refine = SelfAttention(dim, heads)

    def forward(self, x: Tensor) -> Tensor:  # (B, H, W, C)
        if self.cell == (1, 1):
            return self.refine(x)
        tokens, affinity = super_tokens(x, self.cell, self.iterations, self.differentiable)
        return scatter_super_tokens(self.refine(tokens), affinity, self.cell)


class ConvFfn(Mlp):
    """An MLP that adds positions to the hidden units after the activation."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__(dim, hidden)
        self.pos = ConvPosition(hidden)

    def forward(self, x: Tensor) -> Tensor:  # (B, H, W, C)
        return self.fc2(self.pos(self.act(self.fc1(x))))


class Block(nn.Sequential):
    """Figure 2: position, attention, MLP; the norm of the MLP is a batch norm."""

    def __init__(self, dim: int, attention: nn.Module, drop_path: float, scale: float | None) -> None:
        branch = {"dim": dim, "drop_path": drop_path, "scale": scale}
        super().__init__(
            OrderedDict(
                pos=ConvPosition(dim),
                attn=Residual(nn.LayerNorm(dim, 1e-6), attention, **branch),
                mlp=Residual(Nhwc(nn.BatchNorm2d(dim)), ConvFfn(dim, 4 * dim), **branch),
            )
        )


class STViT(Backbone):
    """Input (B, in_chans, H, W), output (B, num_classes).

    dims, depths, heads  channels, blocks and attention heads of each stage
    cells               pixels a side of a super token's cell in each stage; 1: all pixels attend to each other
    iterations          rounds of association and averaging
    differentiable      False, as published: no gradient flows through the association; True: gradients flow through it
    layer_scale_stages  numbers of the stages, from 0, whose branches have learned factors, which start at 1e-6
    img_size            image that the model is meant for, pixels a side or (height, width). Nothing in it depends on
                        that: it runs at any size, as the authors' code does. Normed maps are padded with zeros to whole
                        cells, and these zeros count in the averages
    drop_path_rate      a linear ramp from 0 over all blocks
    global_pool         "avg", "max", "avgmax" or "", see `Head`
    drop_rate           probability of dropout before the classifier
    feature_norms       see `Backbone`; the authors published no version for dense prediction

    Raises ValueError for arguments that fit no layer, or not each other.
    """

    def __init__(
        self,
        dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (3, 5, 9, 3),
        heads: Sequence[int] = (1, 2, 5, 8),
        cells: Sequence[int | tuple[int, int]] = (8, 4, 1, 1),
        *,
        iterations: int = 1,
        differentiable: bool = False,
        layer_scale_stages: Sequence[int] = (),
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        feature_norms: bool = False,
    ) -> None:
        check_model(in_chans, num_classes, dims=dims, depths=depths, heads=heads, cells=cells)
        several = isinstance(layer_scale_stages, Collection)
        if not several or not all(stage in range(len(dims)) for stage in layer_scale_stages):
            given = f"layer_scale_stages is {layer_scale_stages}"
            raise ValueError(f"{given}: expected numbers of stages, from 0 to {len(dims) - 1}")
        rates = drop_path_rates(drop_path_rate, depths)
        stages = []
        for i, (dim, count, cell, ramp) in enumerate(zip(dims, heads, cells, rates, strict=True)):
            scale = LAYER_SCALE if i in layer_scale_stages else None
            blocks = [
                Block(dim, SuperTokenAttention(dim, count, cell, iterations, differentiable), rate, scale)
                for rate in ramp
            ]
            stages.append(Stage(blocks, downsample=Halve(dims[i - 1], dim) if i else None))
        super().__init__(
            Stem(in_chans, dims[0]),
            stages,
            Head(HEAD_WIDTH, num_classes, before=widen(dims[-1]), pool=global_pool, drop_rate=drop_rate),
            dims=dims,
            num_classes=num_classes,
            in_chans=in_chans,
            img_size=img_size,
            feature_norms=feature_norms,
        )
        self.init_layers()

    def init_layers(self) -> None:
        """Only the classifier: torch's initialisation is the published one of convolutions."""
        init_linear(self.head.fc)


def widen(dim: int) -> Nhwc:
    """The layers before the pooling: a 1 x 1 convolution, norm, activation."""
    layers = OrderedDict(proj=nn.Conv2d(dim, HEAD_WIDTH, 1), norm=nn.BatchNorm2d(HEAD_WIDTH), act=nn.SiLU())
    return Nhwc(layers)


register(STViT, VARIANTS)
