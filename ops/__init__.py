"""Attention without its projections: the public functions of all ops. Needs only torch."""

from .channel_attention import channel_attention
from .dispatch import implementation
from .neighborhood_attention import neighborhood_attention
from .packing import unpack
from .pooled_attention import pooled_attention
from .routed_attention import route_regions, routed_attention
from .super_token_attention import scatter_super_tokens, super_tokens
from .token_reallocation import rank_tokens, reallocate_tokens, significance
from .window_attention import window_attention

__all__ = [
    "channel_attention",
    "implementation",
    "neighborhood_attention",
    "pooled_attention",
    "rank_tokens",
    "reallocate_tokens",
    "route_regions",
    "routed_attention",
    "scatter_super_tokens",
    "significance",
    "super_tokens",
    "unpack",
    "window_attention",
]
