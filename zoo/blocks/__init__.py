"""The shared block library. Maps are (B, H, W, C) between modules.

What only one family uses lives in its own file, except for `PositionTable`, which the loading of weights knows too, and
`GELUTanh`, an activation like torch's.
"""

from .activation import GELUTanh
from .attention import PaddedAttention, WindowAttention, is_plain, resize_table, windows_of
from .block import Block, Mlp, Residual, drop_path_rates, hidden_units
from .checks import (
    check_classes,
    check_count,
    check_heads,
    check_model,
    check_stages,
    image_sides,
    number,
    plain,
    window_sides,
)
from .conv import ConvPosition, Halve, Nhwc, pad_to_multiple
from .embed import ChainStem, PatchStem, PositionTable, map_sides, resize_positions
from .init import init_fan_out, init_linear, init_normal
from .recompute import recomputed
from .resize import bicubic

__all__ = [
    "Block",
    "ChainStem",
    "ConvPosition",
    "GELUTanh",
    "Halve",
    "Mlp",
    "Nhwc",
    "PaddedAttention",
    "PatchStem",
    "PositionTable",
    "Residual",
    "WindowAttention",
    "bicubic",
    "check_classes",
    "check_count",
    "check_heads",
    "check_model",
    "check_stages",
    "drop_path_rates",
    "hidden_units",
    "image_sides",
    "init_fan_out",
    "init_linear",
    "init_normal",
    "is_plain",
    "map_sides",
    "number",
    "pad_to_multiple",
    "plain",
    "recomputed",
    "resize_positions",
    "resize_table",
    "window_sides",
    "windows_of",
]
