"""Initial values of parameters."""

from timm.layers import trunc_normal_
from torch import Tensor, nn

STD, MOST = 0.02, 0.12


def init_normal(tensor: Tensor) -> None:
    """Normal, of standard deviation 0.02, in place; skipped on the meta device, where it is slow and useless.

    Of 17 million values, timm draws about one that is infinite: it is cut off at six standard deviations, which no
    other reaches.
    """
    if not tensor.is_meta:
        trunc_normal_(tensor, std=STD, a=-MOST, b=MOST)


def init_linear(module: nn.Module) -> None:
    """For `Module.apply`: linear layers get a truncated normal of 0.02 and zero biases, others torch's defaults."""
    if isinstance(module, nn.Linear):
        init_normal(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def init_fan_out(module: nn.Module) -> None:
    """For `Module.apply`: linear layers as in `init_linear`, convolutions normal by fan-out, with zero biases."""
    init_linear(module)
    if isinstance(module, nn.Conv2d):
        kh, kw = module.kernel_size
        nn.init.normal_(module.weight, std=(2 * module.groups / (kh * kw * module.out_channels)) ** 0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
