"""The contest of each op."""

from . import neighborhoods, plain, routing, tokens, windows

CONTESTS = {
    "window_attention": windows.contest,
    "neighborhood_attention": neighborhoods.contest,
    "routed_attention": routing.contest,
    "channel_attention": plain.channel_contest,
    "super_token_attention": tokens.super_contest,
    "token_reallocation": tokens.reallocation_contest,
    "significance": tokens.significance_contest,
    "pooled_attention": plain.pooled_contest,
}
