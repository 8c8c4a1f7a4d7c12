"""GC ViT: Global Context Vision Transformers, https://arxiv.org/abs/2206.09959

Blocks attend inside windows, alternately with their own queries and with those of the image: a generator shrinks the
map of the whole stage to a single window of queries, which every window uses.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.layers import SqueezeExcite
from timm.models import register_notrace_function
from timm.models._input import update_model_args, update_model_input_size
from torch import Tensor, fx, nn

from ops import unpack, window_attention
from ops.sizes import surely

from .backbone import Backbone, Head, Stage
from .blocks import (
    Block,
    Residual,
    WindowAttention,
    bicubic,
    check_model,
    drop_path_rates,
    image_sides,
    map_sides,
    plain,
    recomputed,
    window_sides,
    windows_of,
)
from .registry import register

for op in (unpack, window_attention):
    fx.wrap(op)

Size = int | tuple[int, int]
Windows = Size | Sequence[Size]

# Appendix; a head has 32 channels in all of them
SIZES = {
    #            channels of the first stage, blocks of each, width of the MLPs
    "gcvit_xxt": {"dim": 64,  "depths": (2, 2, 6, 2),  "mlp_ratio": 3},
    "gcvit_xt":  {"dim": 64,  "depths": (3, 4, 6, 5),  "mlp_ratio": 3},
    "gcvit_t":   {"dim": 64,  "depths": (3, 4, 19, 5), "mlp_ratio": 3},
    "gcvit_t2":  {"dim": 64,  "depths": (3, 4, 29, 5), "mlp_ratio": 3},
    "gcvit_s":   {"dim": 96,  "depths": (3, 4, 19, 5), "mlp_ratio": 2, "layer_scale": 1e-5},
    "gcvit_s2":  {"dim": 96,  "depths": (3, 4, 23, 5), "mlp_ratio": 3, "layer_scale": 1e-5},
    "gcvit_b":   {"dim": 128, "depths": (3, 4, 19, 5), "mlp_ratio": 2, "layer_scale": 1e-5},
    "gcvit_l":   {"dim": 192, "depths": (3, 4, 19, 5), "mlp_ratio": 2, "layer_scale": 1e-5},
}  # fmt: skip
VARIANTS = {name: {**size, "img_size": 224} for name, size in SIZES.items()}
VARIANTS |= {f"gcvit_l_{pixels}": {**SIZES["gcvit_l"], "img_size": pixels} for pixels in (384, 512)}

# a row per stage: pixels of the image per token of a window, along a side; convolutions of the query generator; whether
# each of them halves the map, which shrinks it to one window
STAGES = ((32, 3, True), (32, 2, True), (16, 1, False), (32, 1, False))
# the third stage's window for 224 pixels. The detection code, which takes windows as arguments, also halves that
# stage's map unless its window is this one, whatever image the weights were trained for
UNHALVED = (14, 14)


class FusedMBConv(nn.Module):
    """x + project(gate(act(depthwise(x)))), without norms, on an NCHW map."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(dim, dim, 3, 1, 1, groups=dim, bias=False)
        self.act = nn.GELU()
        self.se = SqueezeExcite(dim, rd_channels=dim // 4, act_layer=nn.GELU, bias=False)
        self.project = nn.Conv2d(dim, dim, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W)
        return x + self.project(self.se(self.act(self.depthwise(x))))


class FusedReduce(nn.Module):
    """Norm, convolutions, norm, on a (B, H, W, C) map; half the size."""

    def __init__(self, dim: int, dim_out: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.conv = FusedMBConv(dim)
        self.reduction = nn.Conv2d(dim, dim_out, 3, 2, 1, bias=False)
        self.norm2 = nn.LayerNorm(dim_out)

    def forward(self, x: Tensor) -> Tensor:  # (B, H, W, C) -> (B, ceil(H / 2), ceil(W / 2), C')
        x = self.conv(self.norm1(x).permute(0, 3, 1, 2))
        return self.norm2(self.reduction(x).permute(0, 2, 3, 1))


@fx.wrap
@register_notrace_function
def fit(x: Tensor, window: tuple[int, int]) -> Tensor:
    """An NCHW map of queries as one window: interpolated if it is not, as in the published detection code."""
    is_one = surely(x.shape[2] == window[0]) and surely(x.shape[3] == window[1])
    return x if is_one else bicubic(x, window)


class QueryGenerator(nn.Module):
    """Figure 3: one window of queries for all global blocks of a stage, from its map, by `steps` convolutions.

    A head has 32 channels.
    """

    def __init__(self, dim: int, window: tuple[int, int], steps: int) -> None:
        super().__init__()
        self.heads = dim // 32
        self.convs = nn.ModuleList(FusedMBConv(dim) for _ in range(steps))
        self.set_window(window, False)

    @torch.jit.ignore
    def set_window(self, window: tuple[int, int], pool: bool) -> None:
        """Set the size of a window, and whether every step halves the map."""
        self.window = window
        self.pool = (nn.MaxPool2d(3, 2, 1) if pool else nn.Identity()).train(self.training)

    def forward(self, x: Tensor) -> Tensor:  # (B, H, W, C) -> (B, wh, ww, heads, D)
        x = x.permute(0, 3, 1, 2)
        for conv in self.convs:
            x = self.pool(conv(x))
        return fit(x, self.window).permute(0, 2, 3, 1).unflatten(-1, [self.heads, -1])


class Stem(nn.Module):
    """A strided convolution and a reduction."""

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, dim, 3, 2, 1)
        self.down = FusedReduce(dim, dim)

    def forward(self, x: Tensor) -> Tensor:  # (B, in_chans, H, W) -> (B, ceil(H / 4), ceil(W / 4), dim)
        return self.down(self.conv1(x).permute(0, 2, 3, 1))


class GlobalAttention(WindowAttention):
    """Window attention whose queries, one window of them, are given; it only projects keys and values."""

    def __init__(self, dim: int, window: tuple[int, int], rel_pos_bias: bool = True) -> None:
        super().__init__(dim, dim // 32, window, rel_pos_bias=rel_pos_bias, attend_padding=True)
        self.qkv = nn.Linear(dim, 2 * dim)

    def forward(self, x: Tensor, query: Tensor) -> Tensor:  # (B, H, W, C), (B, wh, ww, heads, D)
        b, h, w, c = x.shape
        tokens, outside = self.project(x, 2)
        k, v = unpack(tokens.view(b, h, w, 2, self.heads, c // self.heads))  # (B, H, W, heads, D)
        x = window_attention(query, k, v, self.rpb, window=self.window, scale=self.scale, outside=outside)
        return self.proj(x.reshape(b, h, w, c))


class QueriedResidual(Residual):
    """A residual branch whose function also takes the stage's queries."""

    def forward(self, x: Tensor, query: Tensor) -> Tensor:
        return x + self.drop_path(self.scale(self.fn(self.norm(x), query)))


class LocalBlock(Block):
    """Figure 4: attention inside windows, then an MLP; the stage's queries are not used."""

    def forward(self, x: Tensor, query: Tensor) -> Tensor:  # (B, H, W, C), (B, wh, ww, heads, D)
        return self.mlp(self.attn(x))


class GlobalBlock(Block):
    """The same with the stage's queries instead of the windows' own."""

    branch = QueriedResidual

    def forward(self, x: Tensor, query: Tensor) -> Tensor:  # (B, H, W, C), (B, wh, ww, heads, D)
        return self.mlp(self.attn(x, query))


class GlobalStage(Stage):
    """A stage whose queries are computed once, from the map that its first block sees; None: no block uses any."""

    def __init__(self, blocks: Sequence[nn.Module], query: QueryGenerator | None, downsample: nn.Module | None) -> None:
        super().__init__((), downsample=downsample)
        self.blocks = nn.ModuleList(blocks)
        self.query = query

    def forward(self, x: Tensor) -> Tensor:  # (B, H, W, C)
        x = self.downsample(x)
        query = x if self.query is None else self.query(x)
        for block in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = recomputed(block, x, query)
            else:
                x = block(x, query)
        return x


class GCViT(Backbone):
    """Input (B, in_chans, H, W), output (B, num_classes).

    dim, depths     channels of the first stage, doubled in each of the next; blocks of each
    mlp_ratio       hidden units of an MLP per channel
    layer_scale     initial value of the factors on the branches; None: no such factors
    img_size        image that the windows are made for, pixels a side or (height, width): a window has
                    ceil(img_size / 32) tokens a side, in the third stage ceil(img_size / 16)
    window_size     tokens a side, or (vertical, horizontal), of all windows (24 in detection), or four of these. With
                    it the third stage's query generator also halves the map, unless that stage's window is 14 x 14: the
                    rule of the published detection code
    rel_pos_bias    False: attention without a bias per relative position, an option of the published detection code
    drop_path_rate  a linear ramp from 0 over all blocks
    global_pool     "avg", "max", "avgmax" or "", see `Head`
    drop_rate       probability of dropout before the classifier
    feature_norms   see `Backbone`

    A built model runs at any size with the windows it has, by the rules of the published detection code (the published
    classification code only takes one size). Normed maps are padded with zeros to whole windows before the projection
    of k and v, and tokens attend to these zeros. Queries that do not form one window are interpolated to one.

    Raises ValueError for arguments that fit no layer, or not each other.
    """

    def __init__(
        self,
        dim: int = 64,
        depths: Sequence[int] = (2, 2, 6, 2),
        mlp_ratio: float = 3,
        layer_scale: float | None = None,
        *,
        img_size: Size = 224,
        window_size: Windows | None = None,
        rel_pos_bias: bool = True,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        feature_norms: bool = False,
    ) -> None:
        check_model(in_chans, num_classes, depths=depths)
        if len(depths) != len(STAGES):
            raise ValueError(f"depths is {tuple(depths)}: expected a number for each of {len(STAGES)} stages")
        windows = windows_for(image_sides(img_size), window_size)
        dims = [dim * 2**i for i in range(len(STAGES))]
        stages = []
        for i, rates in enumerate(drop_path_rates(drop_path_rate, depths)):
            options = {"rel_pos_bias": rel_pos_bias, "mlp_ratio": mlp_ratio, "layer_scale": layer_scale}
            blocks = [block(dims[i], windows[i], j, drop_path=rate, **options) for j, rate in enumerate(rates)]
            # the first block is local: weights of a generator that no other block uses would get no gradient
            query = QueryGenerator(dims[i], windows[i], STAGES[i][1]) if len(blocks) > 1 else None
            stages.append(GlobalStage(blocks, query, FusedReduce(dims[i - 1], dims[i]) if i else None))
        super().__init__(
            Stem(in_chans, dim),
            stages,
            Head(dims[-1], num_classes, norm=nn.LayerNorm(dims[-1]), pool=global_pool, drop_rate=drop_rate),
            dims=dims,
            num_classes=num_classes,
            in_chans=in_chans,
            img_size=img_size,
            feature_norms=feature_norms,
        )
        self.set_input_size(window_size=window_size)
        self.init_layers()

    @staticmethod
    def args_from_shapes(shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
        """The windows, as tables of relative positions show them; without tables they are None.

        Windows that fit an image are returned as its `img_size`. Not so for weights of the detection code, which have
        norms on features: windows are arguments there, and determine the third stage's queries. A classifier that was
        built here with such windows, as `window_size=(12, 12, 24, 12)`, is taken for one for 384 pixels: no weight
        tells the two apart.
        """
        tables = {(key.split(".")[1], tuple(shape[1:])) for key, shape in shapes.items() if key.endswith(".rpb")}
        if not tables:
            return {"rel_pos_bias": False, "window_size": None}
        windows = windows_of([sides for _, sides in sorted(tables)])
        if windows is None or len(windows) != len(STAGES):
            return {}
        pixels = tuple(STAGES[2][0] * side for side in windows[2])
        dense = any(key.startswith("feature_norms.") for key in shapes)
        if windows == windows_for(pixels) and (not dense or windows[2] == UNHALVED):
            return {"img_size": plain(pixels)}
        return {"window_size": plain(windows[0]) if len(set(windows)) == 1 else [plain(window) for window in windows]}

    @torch.jit.ignore
    def set_input_size(self, img_size: Size | None = None, window_size: Windows | None = None) -> None:
        """Change the windows for another image size, or as given (see the class); the tables are interpolated.

        Windows that are not given are those for the image, also if the model was built with others. Raises ValueError,
        and changes nothing, for sizes that there are not.
        """
        img_size = self.img_size if img_size is None else image_sides(img_size)
        windows = windows_for(img_size, window_size)
        self.img_size = img_size
        for i, stage in enumerate(self.stages):
            for module in stage.modules():
                if isinstance(module, WindowAttention):
                    module.set_window(windows[i])
            halved = i == 2 and window_size is not None and windows[i] != UNHALVED
            if stage.query is not None:
                stage.query.set_window(windows[i], STAGES[i][2] or halved)
        update_model_input_size(self, img_size)
        update_model_args(self, window_size=window_size)


def windows_for(img_size: tuple[int, int], window_size: Windows | None = None) -> list[tuple[int, int]]:
    """The window of each stage."""
    if window_size is None:
        return [map_sides(img_size, ratio) for ratio, _, _ in STAGES]
    if not isinstance(window_size, Sequence) or len(window_size) == 2:
        window_size = [window_size] * len(STAGES)
    if len(window_size) != len(STAGES):
        raise ValueError(f"window_size is {window_size}: expected one number, (vertical, horizontal), or one per stage")
    return [window_sides(window) for window in window_size]


def block(
    dim: int,
    window: tuple[int, int],
    index: int,
    *,
    rel_pos_bias: bool,
    mlp_ratio: float,
    layer_scale: float | None,
    drop_path: float,
) -> Block:
    """Blocks with even numbers are local, those with odd numbers global."""
    if index % 2:
        return GlobalBlock(dim, GlobalAttention(dim, window, rel_pos_bias), mlp_ratio, drop_path, layer_scale)
    attention = WindowAttention(dim, dim // 32, window, rel_pos_bias=rel_pos_bias, attend_padding=True)
    return LocalBlock(dim, attention, mlp_ratio, drop_path, layer_scale)


register(GCViT, VARIANTS)
