"""Attention modules that more than one family uses; the arithmetic itself is in `ops`."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.models import register_notrace_function
from torch import Tensor, fx, nn
from torch.nn.modules import module as all_modules
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ops import unpack, window_attention
from ops.dispatch import wide
from ops.sizes import surely

from .checks import check_heads, window_sides
from .init import init_normal

# torch.fx keeps the op as one call, so that tracing does not depend on which implementation runs; it looks for wrapped
# functions in the module that calls them, timm's and torchvision's tracers for registered ones
for op in (window_attention, unpack):
    fx.wrap(op)
    register_notrace_function(op)


def resize_table(table: Tensor, size: tuple[int, int], mode: str = "bicubic") -> Tensor:
    """A table of relative positions (heads, 2h-1, 2w-1) for another window: (heads, *size), with half-pixel centres."""
    if tuple(table.shape[1:]) == tuple(size):
        return table
    resized = F.interpolate(table[None].to(wide(table.dtype)), size=size, mode=mode, align_corners=False)
    return resized[0].to(table.dtype)


def windows_of(tables: Sequence[Sequence[int]]) -> list[tuple[int, int]] | None:
    """The windows of tables of relative positions, given the sides of each, (2h-1, 2w-1).

    None if one of them is flat: these do not show their sides.
    """
    if not all(len(sides) == 2 and sides[0] % 2 and sides[1] % 2 for sides in tables):
        return None
    return [((height + 1) // 2, (width + 1) // 2) for height, width in tables]


def is_plain(layer: nn.Module) -> bool:
    """Whether a layer computes only with weight and bias: a linear one without hooks or a `forward` of its own.

    Hooks that `register_module_forward_hook` and its like set for all modules count as well, as do weights that are
    no ordinary tensors, such as torchao's quantised ones.
    """
    everywhere = all_modules._global_forward_pre_hooks or all_modules._global_forward_hooks
    hooked = everywhere or layer._forward_pre_hooks or layer._forward_hooks or "forward" in vars(layer)
    linear = type(layer) is nn.Linear and layer.bias is not None
    return linear and not hooked and not is_traceable_wrapper_subclass(layer.weight)


class PaddedAttention(nn.Module):
    """Base of attention whose windows may reach over the border of the map, as if the input were zero there.

    A subclass has `heads`, the layer `qkv` that projects the map, and the sides `window` of windows that tile it.
    """

    def covers(self, x: Tensor) -> bool:
        """Whether the map x, (B, H, W, C), contains all that is attended; in a compiled graph, at any of its sizes."""
        return surely(x.shape[1] % self.window[0] == 0) and surely(x.shape[2] % self.window[1] == 0)

    def project(self, x: Tensor, parts: int = 3) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """`qkv(x)` of a map (B, H, W, C); and the key and the value, each (heads, D), of a position that is padded with
        zeros, which are the layer's bias if it is plain. None: the map needs no padding.

        parts  what `qkv` returns per head: 3 for queries, keys and values, 2 without queries
        """
        # graphs always call the layer, which may be replaced later: after the map, since torch.fx names the first call
        # after the layer
        if torch.jit.is_scripting():  # noqa: SIM114 (TorchScript would compile what stands behind an `or`)
            tokens, zero = self.qkv(x), self.of_zeros(x)
        elif isinstance(x, fx.Proxy):
            tokens, zero = self.qkv(x), self.of_zeros(x)
        elif is_plain(self.qkv):
            tokens, zero = self.qkv(x), self.qkv.bias
        elif self.covers(x):
            return self.qkv(x), None
        else:  # the map last: hooks that record the layer's last output keep the map's
            zero, tokens = self.of_zeros(x), self.qkv(x)
        zero = zero.reshape(parts, self.heads, -1)
        return tokens, (zero[-2], zero[-1])

    def of_zeros(self, x: Tensor) -> Tensor:
        """What the layer makes of a position that is zero."""
        return self.qkv(x.new_zeros([1, 1, 1, x.shape[-1]]))[0, 0, 0]


class WindowAttention(PaddedAttention):
    """Multi-head self-attention inside windows, with a learned bias per head and relative position.

    dim             width; a head has dim / heads channels
    window          tokens per side, or (vertical, horizontal)
    partition       "block": neighbours share a window; "grid": tokens spaced evenly over the whole map do
    scale           factor on the logits; default: (dim / heads) ** -0.5
    resize          how `set_window` interpolates the table of biases: a mode of torch.nn.functional.interpolate
    rel_pos_bias    False: no bias per relative position
    attend_padding  if a window reaches over the border of the map. False: positions outside are not attended. True:
                    they are attended as if the input were zero there, so that keys and values are the projection's bias

    Raises ValueError if the heads do not divide `dim`, and for windows without tokens.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        window: int | tuple[int, int],
        *,
        partition: str = "block",
        scale: float | None = None,
        resize: str = "bicubic",
        rel_pos_bias: bool = True,
        attend_padding: bool = False,
    ) -> None:
        super().__init__()
        check_heads(dim, heads)  # families whose heads have 32 channels get 0 heads for a smaller dim
        self.heads = heads
        self.window = window_sides(window)
        self.partition = partition
        self.scale = (dim // heads) ** -0.5 if scale is None else scale
        self.resize = resize
        self.attend_padding = attend_padding
        self.qkv = nn.Linear(dim, 3 * dim)
        rpb = nn.Parameter(torch.empty(heads, 2 * self.window[0] - 1, 2 * self.window[1] - 1)) if rel_pos_bias else None
        self.register_parameter("rpb", rpb)
        self.proj = nn.Linear(dim, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the table; the projections are modules of their own."""
        if self.rpb is not None:
            init_normal(self.rpb)

    @torch.jit.ignore
    def set_window(self, window: tuple[int, int]) -> None:
        """Change the size of the windows; the table is interpolated, and is then a new parameter."""
        self.window = window_sides(window)
        size = (2 * self.window[0] - 1, 2 * self.window[1] - 1)
        if self.rpb is not None and tuple(self.rpb.shape[1:]) != size:
            self.rpb = nn.Parameter(resize_table(self.rpb.detach(), size, self.resize), self.rpb.requires_grad)

    def forward(self, x: Tensor) -> Tensor:  # (B, H, W, C)
        b, h, w, c = x.shape
        if self.attend_padding:
            tokens, outside = self.project(x)
        else:
            tokens, outside = self.qkv(x), None
        q, k, v = unpack(tokens.view(b, h, w, 3, self.heads, c // self.heads))  # (B, H, W, heads, D)
        x = window_attention(
            q,
            k,
            v,
            self.rpb,
            window=self.window,
            partition=self.partition,
            scale=self.scale,
            outside=outside,
        )
        return self.proj(x.reshape(b, h, w, c))
