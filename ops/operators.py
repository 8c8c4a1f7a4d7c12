"""The kernels as torch operators: importing this module registers those of all ops. Needs triton.

An op registers its own operators when its kernel first runs. Programs that `torch.export` saved where kernels run refer
to them, so another process has to import `ops.operators` before `torch.export.load`. On CPU tensors the operators
compute their references.
"""

from .channel_attention import triton_path as channel_attention
from .neighborhood_attention import triton_path as neighborhood_attention
from .routed_attention import triton_path as routed_attention
from .super_token_attention import triton_path as super_token_attention
from .token_reallocation import triton_path as token_reallocation
from .window_attention import triton_path as window_attention

__all__ = [
    "channel_attention",
    "neighborhood_attention",
    "routed_attention",
    "super_token_attention",
    "token_reallocation",
    "window_attention",
]
