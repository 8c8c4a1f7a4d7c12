"""NAT and DiNAT: Neighborhood Attention, https://arxiv.org/abs/2204.07143, dilated, https://arxiv.org/abs/2209.15001

Every token attends to its own nearest neighbors, so the window slides with it and there are no partition borders. DiNAT
spreads the window of every second block over the whole map, NAT never does.
"""

from collections.abc import Mapping, Sequence
from itertools import cycle, islice
from numbers import Integral
from typing import Any

import torch
from timm.models import register_notrace_function
from torch import Tensor, fx, nn

from ops import neighborhood_attention, unpack
from ops.sizes import surely

from .backbone import Backbone, Head, Stage
from .blocks import (
    Block,
    PaddedAttention,
    check_heads,
    check_model,
    drop_path_rates,
    init_normal,
)
from .registry import register

for op in (neighborhood_attention, unpack):
    fx.wrap(op)
    register_notrace_function(op)

Dilations = int | str | Sequence[Sequence[int]]

# Table 1 of both papers, and their code; a head has 32 channels in all of them
SIZES = {
    "m": {"dims": (64, 128, 256, 512),   "depths": (3, 4, 6, 5),  "mlp_ratio": 3},
    "t": {"dims": (64, 128, 256, 512),   "depths": (3, 4, 18, 5), "mlp_ratio": 3},
    "s": {"dims": (96, 192, 384, 768),   "depths": (3, 4, 18, 5), "mlp_ratio": 2},
    "b": {"dims": (128, 256, 512, 1024), "depths": (3, 4, 18, 5), "mlp_ratio": 2},
    "l": {"dims": (192, 384, 768, 1536), "depths": (3, 4, 18, 5), "mlp_ratio": 2},
}  # fmt: skip
VARIANTS = {
    "nat_m":   {**SIZES["m"], "dilations": 1, "img_size": 224},
    "nat_t":   {**SIZES["t"], "dilations": 1, "img_size": 224},
    "nat_s":   {**SIZES["s"], "dilations": 1, "img_size": 224, "layer_scale": 1e-5},
    "nat_b":   {**SIZES["b"], "dilations": 1, "img_size": 224, "layer_scale": 1e-5},
    "dinat_m": {**SIZES["m"], "dilations": "classification", "img_size": 224},
    "dinat_t": {**SIZES["t"], "dilations": "classification", "img_size": 224},
    "dinat_s": {**SIZES["s"], "dilations": "classification", "img_size": 224},
    "dinat_b": {**SIZES["b"], "dilations": "classification", "img_size": 224, "layer_scale": 1e-5},
    "dinat_l": {**SIZES["l"], "dilations": "classification", "img_size": 224},
    "dinat_l_384":     {**SIZES["l"], "dilations": "classification_384", "img_size": 384},
    "dinat_l_384_k11": {**SIZES["l"], "dilations": "classification", "img_size": 384, "window_size": 11},
}  # fmt: skip

# a pattern per stage, repeated over its blocks
PRESETS = {
    "classification":     ((1, 8),  (1, 4),        (1, 2),             (1,)),
    "classification_384": ((1, 13), (1, 6),        (1, 3),             (1,)),
    "detection":          ((1, 28), (1, 7, 1, 14), (1, 3, 1, 5, 1, 7), (1, 3)),
    "segmentation":       ((1, 16), (1, 4, 1, 8),  (1, 2, 1, 3, 1, 4), (1, 2)),
    "segmentation_640":   ((1, 20), (1, 5, 1, 10), (1, 2, 1, 3, 1, 4, 1, 5) * 2 + (1, 5), (1, 2)),
    "mask2former":        ((1, 14), (1, 4, 1, 7),  (1, 2, 1, 3) * 4 + (1, 3), (1,)),
}  # fmt: skip


class Stem(nn.Module):
    """Two 3 x 3 convolutions of stride 2 with nothing between them, then a norm."""

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, dim // 2, 3, 2, 1)
        self.conv2 = nn.Conv2d(dim // 2, dim, 3, 2, 1)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:  # (B, in_chans, H, W) -> (B, ceil(H / 4), ceil(W / 4), dim)
        return self.norm(self.conv2(self.conv1(x)).permute(0, 2, 3, 1))


class Downsample(nn.Module):
    """A 3 x 3 convolution of stride 2, then a norm."""

    def __init__(self, dim: int, dim_out: int) -> None:
        super().__init__()
        self.reduction = nn.Conv2d(dim, dim_out, 3, 2, 1, bias=False)
        self.norm = nn.LayerNorm(dim_out)

    def forward(self, x: Tensor) -> Tensor:  # (B, H, W, C) -> (B, ceil(H / 2), ceil(W / 2), C')
        return self.norm(self.reduction(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class NeighborhoodAttention(PaddedAttention):
    """Self-attention of every token to its `window` x `window` nearest, `dilation` apart, with a learned bias.

    A map smaller than window * dilation is padded at the bottom and right as if the input were zero there: the padding
    is attended, with keys and values that are the projection's bias.
    """

    def __init__(self, dim: int, heads: int, window: int, dilation: int) -> None:
        super().__init__()
        check_heads(dim, heads)
        counts = isinstance(window, Integral) and isinstance(dilation, Integral)
        if not counts or window < 1 or window % 2 == 0 or dilation < 1:
            raise ValueError(
                f"window is {window}, dilation is {dilation!r}: expected an odd window and a dilation of 1 or more"
            )
        self.heads = heads
        self.window = window
        self.resize = "bicubic"  # how a table for another window is interpolated
        self.dilation = dilation
        self.qkv = nn.Linear(dim, 3 * dim)
        self.rpb = nn.Parameter(torch.empty(heads, 2 * window - 1, 2 * window - 1))
        self.proj = nn.Linear(dim, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the table; the projections are modules of their own."""
        init_normal(self.rpb)

    def covers(self, x: Tensor) -> bool:
        side = self.window * self.dilation
        return surely(x.shape[1] >= side) and surely(x.shape[2] >= side)

    def forward(self, x: Tensor) -> Tensor:  # (B, H, W, C)
        b, h, w, c = x.shape
        tokens, outside = self.project(x)
        q, k, v = unpack(tokens.view(b, h, w, 3, self.heads, c // self.heads))  # (B, H, W, heads, D)
        x = neighborhood_attention(q, k, v, self.rpb, window=self.window, dilation=self.dilation, outside=outside)
        return self.proj(x.reshape(b, h, w, c))


class DiNAT(Backbone):
    """NAT is DiNAT with dilations of 1. Input (B, in_chans, H, W), output (B, num_classes).

    dims, depths    channels and blocks of each stage
    mlp_ratio       width of an MLP divided by that of its block
    layer_scale     initial value of the factor on every branch; None: no factor
    window_size     neighbors a side, odd
    dilations       one number for all blocks; a list per stage, repeated over its blocks; or the authors' for a task:
                    "classification", "detection" or "segmentation" (which at 192 channels is "segmentation_640"), or
                    "classification_384", "segmentation_640" for images of these sizes, or "mask2former", of the large
                    model with window_size=11
    img_size        image that the model is meant for, pixels a side or (height, width). Nothing in it depends on that:
                    it runs at any size. Convolutions round up; maps smaller than window_size * dilation are padded as
                    in the authors' code, see `NeighborhoodAttention`
    drop_path_rate  a linear ramp from 0 over all blocks
    global_pool     "avg", "max", "avgmax" or "", see `Head`
    drop_rate       probability of dropout before the classifier
    feature_norms   see `Backbone`

    The authors meant to exempt tables of relative positions from weight decay, but trained classifiers with it: here
    they decay.

    Raises ValueError for arguments that fit no layer, or not each other.
    """

    presets: Mapping[str, Sequence[Sequence[int]]] = PRESETS
    stem_type: type[nn.Module] = Stem
    merge_type: type[nn.Module] = Downsample

    def __init__(
        self,
        dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (3, 4, 6, 5),
        mlp_ratio: float = 3,
        layer_scale: float | None = None,
        *,
        window_size: int = 7,
        dilations: Dilations = "classification",
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        feature_norms: bool = False,
    ) -> None:
        check_model(in_chans, num_classes, dims=dims, depths=depths)
        if dilations == "segmentation" and dims[0] == 192:
            dilations = "segmentation_640"
        spread = expand(dilations, depths, self.presets)
        rates = drop_path_rates(drop_path_rate, depths)
        stages = []
        for i, dim in enumerate(dims):
            attentions = [NeighborhoodAttention(dim, dim // 32, window_size, dilation) for dilation in spread[i]]
            blocks = [Block(dim, a, mlp_ratio, r, layer_scale) for a, r in zip(attentions, rates[i], strict=True)]
            stages.append(Stage(blocks, downsample=self.merge_type(dims[i - 1], dim) if i else None))
        super().__init__(
            self.stem_type(in_chans, dims[0]),
            stages,
            Head(dims[-1], num_classes, norm=nn.LayerNorm(dims[-1]), pool=global_pool, drop_rate=drop_rate),
            dims=dims,
            num_classes=num_classes,
            in_chans=in_chans,
            img_size=img_size,
            feature_norms=feature_norms,
        )
        self.dilations = dilations
        self.init_layers()

    @staticmethod
    def args_from_shapes(shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
        """The window, as tables of relative positions show it; dilations have no weights."""
        return window_shown(shapes)


def window_shown(shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """`window_size`, as tables of neighborhoods show it: square, and of an odd window, the same in all blocks."""
    tables = {tuple(shape[1:]) for key, shape in shapes.items() if key.endswith(".rpb")}
    sides = {side for table in tables for side in table}
    if any(len(table) != 2 for table in tables) or len(sides) != 1:
        return {}
    (side,) = sides
    return {"window_size": (side + 1) // 2} if side % 4 == 1 else {}


def expand(
    dilations: Dilations, depths: Sequence[int], presets: Mapping[str, Sequence[Sequence[int]]]
) -> list[list[int]]:
    """One list per stage, with one dilation per block."""
    if isinstance(dilations, Integral):
        patterns = [[dilations]] * len(depths)
    elif isinstance(dilations, str):
        if dilations not in presets:
            raise ValueError(
                f"dilations is {dilations!r}: expected a number, a list per stage or one of {list(presets)}"
            )
        patterns = presets[dilations]
        if len(patterns) != len(depths):
            given = f"dilations is {dilations!r}, for {len(patterns)} stages: the model has {len(depths)}"
            raise ValueError(f"{given}. Give a number, or a list per stage")
    else:
        patterns = dilations
        lists = isinstance(patterns, Sequence) and len(patterns) == len(depths)
        lists = lists and all(isinstance(pattern, Sequence) for pattern in patterns)
        if not lists or not all(0 < len(pattern) <= n for pattern, n in zip(patterns, depths, strict=True)):
            raise ValueError(f"dilations is {dilations}: expected a list per stage, of at most {tuple(depths)} numbers")
    return [list(islice(cycle(pattern), depth)) for pattern, depth in zip(patterns, depths, strict=True)]


register(DiNAT, VARIANTS)
