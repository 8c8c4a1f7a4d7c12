"""The shared block library. Maps are (B, H, W, C) between modules; what is unique to a family lives in its own file."""

from .attention import WindowAttention, resize_table
from .conv import AvgPool2dSame, Conv2dSame, ConvPosition, FusedMBConv, MBConv, Nhwc, SqueezeExcite, pad_to_multiple
from .embed import ConvStem
from .init import init_linear, init_normal
from .mlp import Mlp
from .residual import Residual, drop_path_rates

__all__ = [
    "AvgPool2dSame",
    "Conv2dSame",
    "ConvPosition",
    "ConvStem",
    "FusedMBConv",
    "MBConv",
    "Mlp",
    "Nhwc",
    "Residual",
    "SqueezeExcite",
    "WindowAttention",
    "drop_path_rates",
    "init_linear",
    "init_normal",
    "pad_to_multiple",
    "resize_table",
]
