"""DaViT: Dual Attention Vision Transformers, https://arxiv.org/abs/2204.03645

A layer attends twice, each time followed by an MLP: between the tokens of 7 x 7 windows, then between the channels over
the whole map, which costs no more and sees everything. Depthwise convolutions give tokens their positions.
"""

from collections import OrderedDict
from collections.abc import Sequence

from timm.models import register_notrace_function
from torch import Tensor, fx, nn

from ops import channel_attention, unpack

from .backbone import Backbone, Head, Stage
from .blocks import (
    ConvPosition,
    Mlp,
    PatchStem,
    Residual,
    WindowAttention,
    check_model,
    drop_path_rates,
    pad_to_multiple,
)
from .registry import register

for op in (channel_attention, unpack, pad_to_multiple):
    fx.wrap(op)
    register_notrace_function(op)

# Table 1 and Appendix A; a head has 32 channels in all of them
VARIANTS = {
    #           channels of each stage               layers of each stage      tokens a side
    "davit_t": {"dims": (96, 192, 384, 768),         "depths": (1, 1, 3, 1),   "window_size": 7,  "img_size": 224},
    "davit_s": {"dims": (96, 192, 384, 768),         "depths": (1, 1, 9, 1),   "window_size": 7,  "img_size": 224},
    "davit_b": {"dims": (128, 256, 512, 1024),       "depths": (1, 1, 9, 1),   "window_size": 7,  "img_size": 224},
    "davit_l": {"dims": (192, 384, 768, 1536),       "depths": (1, 1, 9, 1),   "window_size": 7,  "img_size": 224},
    "davit_h": {"dims": (256, 512, 1024, 2048),      "depths": (1, 1, 9, 1),   "window_size": 7,  "img_size": 224},
    "davit_g": {"dims": (384, 768, 1536, 3072),      "depths": (1, 1, 12, 3),  "window_size": 7,  "img_size": 224},
    "davit_l_384": {"dims": (192, 384, 768, 1536),   "depths": (1, 1, 9, 1),   "window_size": 12, "img_size": 384},
}  # fmt: skip


class Merge(nn.Module):
    """A norm, then a convolution over 2 x 2 patches."""

    def __init__(self, dim: int, dim_out: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.conv = nn.Conv2d(dim, dim_out, 2, 2)

    def forward(self, x: Tensor) -> Tensor:  # (B, H, W, C) -> (B, ceil(H / 2), ceil(W / 2), C')
        x = self.norm(x).permute(0, 3, 1, 2)
        return self.conv(pad_to_multiple(x, 2)).permute(0, 2, 3, 1)


class ChannelAttention(nn.Module):
    """Section 3.2: the channels of a head attend to each other, over all tokens; they mix q."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:  # (B, H, W, C)
        b, h, w, c = x.shape
        q, k, v = unpack(self.qkv(x).view(b, h, w, 3, self.heads, c // self.heads))  # (B, H, W, heads, D)
        return self.proj(channel_attention(q, k, v).reshape(b, h, w, c))


class Half(nn.Sequential):
    """Figure 3: position, attention of either kind, position, MLP."""

    def __init__(self, dim: int, attention: nn.Module, drop_path: float) -> None:
        super().__init__(
            OrderedDict(
                pos1=ConvPosition(dim),
                attn=Residual(nn.LayerNorm(dim), attention, drop_path=drop_path),
                pos2=ConvPosition(dim),
                mlp=Residual(nn.LayerNorm(dim), Mlp(dim, 4 * dim), drop_path=drop_path),
            )
        )


class DualBlock(nn.Sequential):
    """A layer: windows of tokens, then channels."""

    def __init__(self, dim: int, window: int | tuple[int, int], drop_path: Sequence[float]) -> None:
        heads = dim // 32
        tokens = WindowAttention(dim, heads, window, rel_pos_bias=False, attend_padding=True)
        channels = ChannelAttention(dim, heads)
        super().__init__(OrderedDict(window=Half(dim, tokens, drop_path[0]), channel=Half(dim, channels, drop_path[1])))


class DaViT(Backbone):
    """Input (B, in_chans, H, W), output (B, num_classes).

    dims, depths    channels and layers of each stage; a layer is two blocks
    window_size     tokens a side of a window, or (vertical, horizontal)
    img_size        image that the model is meant for, pixels a side or (height, width). Nothing in it depends on that:
                    it runs at any size, as the authors' code does. Zeros pad the image to a multiple of 4, normed maps
                    to a multiple of 2 before they are merged, and to whole windows before the projection of q, k, v:
                    tokens attend to these zeros. Channel attention and the convolutions only see the map
    drop_path_rate  a linear ramp from 0 over all blocks, two per layer
    global_pool     "avg", "max", "avgmax" or "", see `Head`
    drop_rate       probability of dropout before the classifier
    feature_norms   see `Backbone`

    Raises ValueError for arguments that fit no layer, or not each other.
    """

    def __init__(
        self,
        dims: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (1, 1, 3, 1),
        window_size: int | tuple[int, int] = 7,
        *,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        feature_norms: bool = False,
    ) -> None:
        check_model(in_chans, num_classes, dims=dims, depths=depths)
        rates = drop_path_rates(drop_path_rate, [2 * depth for depth in depths])
        stages = []
        for i, (dim, ramp) in enumerate(zip(dims, rates, strict=True)):
            blocks = [DualBlock(dim, window_size, ramp[j : j + 2]) for j in range(0, len(ramp), 2)]
            stages.append(Stage(blocks, downsample=Merge(dims[i - 1], dim) if i else None))
        super().__init__(
            PatchStem(in_chans, dims[0], kernel=7),
            stages,
            Head(dims[-1], num_classes, after=nn.LayerNorm(dims[-1]), pool=global_pool, drop_rate=drop_rate),
            dims=dims,
            num_classes=num_classes,
            in_chans=in_chans,
            img_size=img_size,
            feature_norms=feature_norms,
        )
        self.init_layers()


register(DaViT, VARIANTS)
