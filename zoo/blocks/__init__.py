"""The shared block library. Maps are (B, H, W, C) between modules; what is unique to a family lives in its own file."""

from .attention import PaddedAttention, WindowAttention, is_plain, resize_table
from .block import Block
from .checks import check_classes, check_heads, check_stages, image_sides, window_sides
from .conv import (
    AvgPool2dSame,
    Conv2dSame,
    ConvPosition,
    FusedMBConv,
    FusedReduce,
    Halve,
    MBConv,
    Nhwc,
    pad_to_multiple,
)
from .embed import ConvStem, PatchStem, PositionTable, resize_positions
from .init import init_fan_out, init_linear, init_normal
from .mlp import Mlp
from .query import QueryGenerator
from .residual import Residual, drop_path_rates

__all__ = [
    "AvgPool2dSame",
    "Block",
    "Conv2dSame",
    "ConvPosition",
    "ConvStem",
    "FusedMBConv",
    "FusedReduce",
    "Halve",
    "MBConv",
    "Mlp",
    "Nhwc",
    "PaddedAttention",
    "PatchStem",
    "PositionTable",
    "QueryGenerator",
    "Residual",
    "WindowAttention",
    "check_classes",
    "check_heads",
    "check_stages",
    "drop_path_rates",
    "image_sides",
    "init_fan_out",
    "init_linear",
    "init_normal",
    "is_plain",
    "pad_to_multiple",
    "resize_positions",
    "resize_table",
    "window_sides",
]
