"""The controls of DiNAT's paper, https://arxiv.org/abs/2209.15001: its attention in other architectures.

DiNAT-s is Swin with neighborhoods instead of windows. The isotropic models have ViT's shape, one map of 16 x 16 patches
throughout, with neighborhoods, dilated ones, or full attention and the same table of relative positions (vitrpb).
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle, islice
from typing import Any

import torch
from timm.models._input import update_model_input_size
from torch import Tensor, fx, nn

from .backbone import Backbone, Head, Stage
from .blocks import (
    Block,
    PatchStem,
    WindowAttention,
    check_model,
    drop_path_rates,
    image_sides,
    map_sides,
    pad_to_multiple,
    plain,
    windows_of,
)
from .dinat import PRESETS, DiNAT, NeighborhoodAttention, window_shown
from .registry import register

fx.wrap(pad_to_multiple)

# Table VI of the paper, and its code; a head has 32 channels in all of them
SIZES = {
    "t": {"dims": (96, 192, 384, 768),   "depths": (2, 2, 6, 2)},
    "s": {"dims": (96, 192, 384, 768),   "depths": (2, 2, 18, 2)},
    "b": {"dims": (128, 256, 512, 1024), "depths": (2, 2, 18, 2)},
    "l": {"dims": (192, 384, 768, 1536), "depths": (2, 2, 18, 2)},
}  # fmt: skip
VARIANTS = {
    f"dinats_{size}": {**args, "mlp_ratio": 4, "dilations": "classification", "img_size": 224}
    for size, args in SIZES.items()
}
VARIANTS["dinats_l_384"] = {**VARIANTS["dinats_l"], "dilations": "classification_384", "img_size": 384}
ISOTROPIC_VARIANTS = {
    "nat_iso_s":   {"dim": 384, "depths": (3, 3, 3, 3), "dilations": 1,      "img_size": 224},
    "nat_iso_b":   {"dim": 768, "depths": (3, 3, 3, 3), "dilations": 1,      "img_size": 224},
    "dinat_iso_s": {"dim": 384, "depths": (3, 3, 3, 3), "dilations": (1, 2), "img_size": 224},
    "dinat_iso_b": {"dim": 768, "depths": (3, 3, 3, 3), "dilations": (1, 2), "img_size": 224},
}  # fmt: skip
FULL_VARIANTS = {
    "vitrpb_s": {"dim": 384, "depths": (3, 3, 3, 3), "img_size": 224},
    "vitrpb_b": {"dim": 768, "depths": (3, 3, 3, 3), "img_size": 224},
}


class PatchMerging(nn.Module):
    """Swin's: the 2 x 2 tokens of a patch are concatenated, column by column, then a norm and a projection."""

    def __init__(self, dim: int, dim_out: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, dim_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # (B, H, W, C) -> (B, ceil(H / 2), ceil(W / 2), C')
        x = pad_to_multiple(x.permute(0, 3, 1, 2), 2)
        b, c, h, w = x.shape
        x = x.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 5, 3, 1)
        return self.reduction(self.norm(x.reshape(b, h // 2, w // 2, 4 * c)))


class DiNATs(DiNAT):
    """DiNAT with Swin's stem and merging; arguments as in `DiNAT`. Zeros pad images to a multiple of 4, maps of 2."""

    presets = PRESETS | {
        "detection":        ((1, 28), (1, 14), PRESETS["detection"][2],        (1, 3)),
        "segmentation":     ((1, 16), (1, 8),  PRESETS["segmentation"][2],     (1, 2)),
        "segmentation_640": ((1, 20), (1, 10), PRESETS["segmentation_640"][2], (1, 2)),
    }  # fmt: skip
    stem_type = PatchStem
    merge_type = PatchMerging


class Isotropic(Backbone):
    """One map of 16 x 16 patches throughout. Input (B, in_chans, H, W), output (B, num_classes).

    dim             channels
    depths          blocks of each stage; all stages have the same map: they only define where features are taken
    mlp_ratio       width of an MLP divided by that of its block
    window_size     neighbors a side, odd
    dilations       one number for all blocks, or a list that is repeated over them
    img_size        image that the model is meant for, pixels a side or (height, width). The authors' code only takes
                    224. Here zeros pad an image of any size to whole patches, and a map smaller than
                    window_size * dilation is padded as in DiNAT
    drop_path_rate  a linear ramp from 0 over all blocks
    global_pool     "avg", "max", "avgmax" or "", see `Head`
    drop_rate       probability of dropout before the classifier
    feature_norms   see `Backbone`

    Raises ValueError for arguments that fit no layer, or not each other.
    """

    reduction = 16

    def __init__(
        self,
        dim: int = 384,
        depths: Sequence[int] = (3, 3, 3, 3),
        mlp_ratio: float = 4,
        *,
        window_size: int | tuple[int, int] = 7,
        dilations: int | Sequence[int] = 1,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        feature_norms: bool = False,
    ) -> None:
        check_model(in_chans, num_classes, depths=depths)
        several = isinstance(dilations, Iterable) and not isinstance(dilations, str)
        repeated = list(dilations) if several else [dilations]
        if not repeated:
            raise ValueError("dilations is empty: expected one or more numbers, which are repeated over the blocks")
        spread = cycle(repeated)
        stages = []
        for rates in drop_path_rates(drop_path_rate, depths):
            attentions = [self.attention(dim, window_size, dilation) for dilation in islice(spread, len(rates))]
            stages.append(Stage([Block(dim, a, mlp_ratio, r) for a, r in zip(attentions, rates, strict=True)]))
        super().__init__(
            PatchStem(in_chans, dim, self.reduction),
            stages,
            Head(dim, num_classes, norm=nn.LayerNorm(dim), pool=global_pool, drop_rate=drop_rate),
            dims=(dim,) * len(depths),
            reductions=(self.reduction,) * len(depths),
            num_classes=num_classes,
            in_chans=in_chans,
            img_size=img_size,
            feature_norms=feature_norms,
        )
        self.init_layers()

    def attention(self, dim: int, window: int | tuple[int, int], dilation: int) -> nn.Module:
        return NeighborhoodAttention(dim, dim // 32, window, dilation)

    @staticmethod
    def args_from_shapes(shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
        """As in `DiNAT`."""
        return window_shown(shapes)


class ViTRPB(Isotropic):
    """The isotropic model with full attention: one window, as large as the map of `img_size`, and its table.

    Arguments as in `Isotropic`, but for `window_size` and `dilations`. A built model runs at any size with the window
    that it has: a smaller map is attended as a whole, a larger one in windows; positions beyond the border are never
    attended.
    """

    def __init__(
        self,
        dim: int = 384,
        depths: Sequence[int] = (3, 3, 3, 3),
        mlp_ratio: float = 4,
        *,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        feature_norms: bool = False,
    ) -> None:
        super().__init__(
            dim,
            depths,
            mlp_ratio,
            window_size=map_sides(image_sides(img_size), self.reduction),
            img_size=img_size,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            feature_norms=feature_norms,
        )

    def attention(self, dim: int, window: int | tuple[int, int], dilation: int) -> nn.Module:
        return WindowAttention(dim, dim // 32, window)

    @staticmethod
    def args_from_shapes(shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
        """The image size, in whole patches, whose map is the window that tables of relative positions show."""
        tables = {tuple(shape[1:]) for key, shape in shapes.items() if key.endswith(".rpb")}
        windows = windows_of([*tables])
        if windows is None or len(windows) != 1:
            return {}
        return {"img_size": plain([ViTRPB.reduction * side for side in windows[0]])}

    @torch.jit.ignore
    def set_input_size(self, img_size: int | tuple[int, int] | None = None) -> None:
        """Change the window for another image size; the table is interpolated."""
        self.img_size = self.img_size if img_size is None else image_sides(img_size)
        for module in self.modules():
            if isinstance(module, WindowAttention):
                module.set_window(map_sides(self.img_size, self.reduction))
        update_model_input_size(self, self.img_size)


register(DiNATs, VARIANTS)
register(Isotropic, ISOTROPIC_VARIANTS)
register(ViTRPB, FULL_VARIANTS)
