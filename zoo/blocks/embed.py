"""Stems: from an NCHW image to a (B, H, W, C) map."""

from torch import Tensor, nn

from .conv import Conv2dSame


class ConvStem(nn.Module):
    """Two 3 x 3 convolutions, the first of stride 2; a batch norm and an activation between them, nothing after."""

    def __init__(
        self,
        in_chans: int,
        dim: int,
        *,
        conv: type[nn.Conv2d] = nn.Conv2d,
        act: type[nn.Module] = nn.GELU,
        bias: bool = True,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        padding = 0 if conv is Conv2dSame else 1
        self.conv1 = conv(in_chans, dim, 3, 2, padding, bias=bias)
        self.norm1 = nn.BatchNorm2d(dim, eps)
        self.act = act()
        self.conv2 = conv(dim, dim, 3, 1, padding)

    def forward(self, x: Tensor) -> Tensor:  # (B, in_chans, H, W) -> (B, ceil(H / 2), ceil(W / 2), dim)
        return self.conv2(self.act(self.norm1(self.conv1(x)))).permute(0, 2, 3, 1)
