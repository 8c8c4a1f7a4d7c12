"""Feature Pyramid Networks, https://arxiv.org/abs/1612.03144: every level also gets the content of the coarser ones."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from ops.sizes import surely


class FPN(nn.Module):
    """Maps of a backbone, fine to coarse -> as many maps of `width` channels, and `extra` coarser ones.

    extra      levels after the last, each of half the size
    convolved  they are 3 x 3 convolutions of stride 2, the first of the last map of the backbone, each other of the
               level before (RetinaNet, FCOS); else each takes every second pixel of the level before
    """

    def __init__(self, channels: Sequence[int], width: int = 256, *, extra: int = 0, convolved: bool = False) -> None:
        super().__init__()
        self.extra, self.convolved = extra, convolved
        self.laterals = nn.ModuleList(nn.Conv2d(dim, width, 1) for dim in channels)
        self.outputs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in channels)
        if convolved:
            self.outputs.extend(nn.Conv2d(width if i else channels[-1], width, 3, 2, 1) for i in range(extra))
        for conv in (*self.laterals, *self.outputs):
            nn.init.xavier_uniform_(conv.weight)
            nn.init.zeros_(conv.bias)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:  # [(B, C, H, W)] -> [(B, width, H, W)]
        maps = [lateral(x) for lateral, x in zip(self.laterals, features, strict=True)]
        for i in reversed(range(len(maps) - 1)):
            maps[i] = maps[i] + F.interpolate(maps[i + 1], maps[i].shape[-2:], mode="nearest")
        outputs = [output(x) for output, x in zip(self.outputs, maps)]  # noqa: B905 (the extra levels follow)
        if not self.convolved:
            return outputs + [outputs[-1][..., :: 2**i, :: 2**i] for i in range(1, self.extra + 1)]
        last = features[-1]
        for conv in self.outputs[len(maps) :]:
            last = halved(last, conv)
            outputs.append(last)
        return outputs


def halved(x: Tensor, conv: nn.Conv2d) -> Tensor:  # (B, C, H, W) -> (B, width, ceil(H / 2), ceil(W / 2))
    """conv(x), a 3 x 3 convolution of stride 2, correct for maps of one or two columns too.

    On CPUs with bfloat16 instructions PyTorch (2.9 to 2.15) leaves results that are one column wide unwritten in part,
    and so it does gradients of weights that only meet its own padding. This pads for a second column, and crops it.
    """
    if not surely(x.shape[-1] <= 2):
        return conv(x)
    return F.conv2d(F.pad(x, (1, 3, 1, 1)), conv.weight, conv.bias, stride=2)[..., :1]
