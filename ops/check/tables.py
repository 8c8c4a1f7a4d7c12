"""The table of calls that are checked: an op takes part by having rows here.

CASES cover what an op promises. RELEASED are the windows, channels, dilations, numbers of regions, runs and cells of
the released models, each on the smallest map that has a border and an interior; SIMILAR are more of them, which differ
little from those. A test compares both with the models. EXTREME are the limits of what kernels support.
"""

from .cases import (
    Case,
    channel_case,
    channels_first_case,
    neighborhood_case,
    pooled_case,
    reallocate_case,
    routed_case,
    significance_case,
    super_case,
    window_case,
)

CASES = [
    window_case("block", 14, 14, (7, 7)),
    window_case("grid", 14, 14, (7, 7), partition="grid"),
    window_case("one_window", 7, 7, (7, 7)),
    window_case("no_bias", 8, 12, (4, 4), bias=False),
    window_case("block_odd", 33, 97, (7, 7), D=4, B=1),
    window_case("grid_odd", 33, 97, (7, 7), partition="grid", D=4, B=1),
    window_case("odd_no_bias", 9, 10, (4, 4), bias=False),
    window_case("rectangular", 9, 13, (4, 3)),
    window_case("rectangular_grid", 9, 13, (4, 3), partition="grid", heads=3),
    window_case("small_map", 3, 5, (7, 7)),
    window_case("small_map_grid", 3, 5, (7, 7), partition="grid"),
    window_case("one_pixel", 1, 1, (7, 7)),
    window_case("one_token", 5, 4, (1, 1)),
    window_case("outside", 9, 13, (4, 3), outside=True),
    window_case("outside_grid", 9, 13, (4, 3), partition="grid", outside=True),
    window_case("outside_no_bias", 6, 5, (4, 4), outside=True, bias=False),
    window_case("shared", 8, 12, (4, 4), shared=True),
    window_case("shared_odd", 9, 13, (4, 3), shared=True),
    window_case("shared_outside", 9, 13, (4, 3), shared=True, outside=True, partition="grid"),
    window_case("large", 18, 20, (9, 9), D=4),  # more than 64 tokens: the other branch of the torch path
    window_case("large_no_bias", 18, 20, (9, 9), D=4, bias=False),
    window_case("large_grid", 17, 20, (9, 9), D=4, partition="grid", bias=False),
    channels_first_case(),
    neighborhood_case("k3", 7, 9, (3, 3), 1),
    neighborhood_case("k7_dilated", 15, 14, (7, 7), 2),
    neighborhood_case("mixed", 11, 10, (5, 3), (2, 3)),
    neighborhood_case("no_bias", 7, 9, (3, 5), 1, bias=False),
    neighborhood_case("exact", 15, 10, (5, 5), (3, 2)),
    neighborhood_case("tiles", 20, 33, (5, 7), (1, 2)),
    neighborhood_case("outside", 4, 18, (5, 3), (2, 5), outside=True),
    neighborhood_case("outside_far", 3, 2, (3, 5), 9, bias=False, outside=True),
    routed_case("top1", 6, 9, (3, 3), 1),
    routed_case("top4", 8, 6, (4, 3), 4),
    routed_case("pixels", 5, 7, (5, 7), 3),
    routed_case("all", 9, 10, (3, 2), 6),
    routed_case("blocks", 44, 36, (4, 3), 5),  # more than one block in every dtype of the torch path
    channel_case("small", 5, 7, 2, 8),
    channel_case("wide", 9, 6, 1, 24),
    channel_case("groups", 47, 53, 1, 8),  # more groups of tokens than a kernel adds up at a time
    pooled_case("map", 6, 9, (3, 4)),
    pooled_case("sequence", 5, 7, (11,)),
    super_case("divides", 8, 12, (4, 4)),
    super_case("odd", 9, 10, (4, 3)),
    super_case("iterations", 8, 8, (2, 4), iterations=3),
    super_case("differentiable", 7, 8, (3, 4), iterations=2, differentiable=True),
    reallocate_case("thirds", 8, 6, [4, 3, 1], [1, 2, 1]),
    reallocate_case("halves_odd", 7, 5, [2, 1], [1, 1]),
    reallocate_case("empty_groups", 1, 1, [3, 2, 1], [1, 2, 1]),
    significance_case("map", 6, 9, (3, 4)),
    significance_case("large", 40, 50, (20, 20)),  # more than one block of queries in the torch path
    significance_case("windows", 8, 6, (8, 6), window=(4, 3)),
    significance_case("windows_odd", 7, 10, (7, 10), window=(3, 4)),
]

# (window, rows, columns) of a map with a border, and with an interior unless that would be large
WINDOWS = ((7, 15, 15), (12, 13, 12), (14, 15, 14), (16, 16, 15), (24, 24, 23), (32, 32, 31))

RELEASED = [
    *(
        window_case(f"maxvit_{w}_{partition}", H, W, (w, w), partition=partition, D=32, heads=1, B=1)
        for w, H, W in ((7, 15, 15), (12, 13, 12), (16, 16, 15))
        for partition in ("block", "grid")
    ),
    *(window_case(f"gcvit_{w}", H, W, (w, w), D=32, heads=1, B=1, outside=True) for w, H, W in WINDOWS),
    *(
        window_case(f"gcvit_{w}_shared", H, W, (w, w), D=32, heads=1, B=1, outside=True, shared=True)
        for w, H, W in WINDOWS
        if w < 32
    ),
    # windows that divide the map: one and a half tiles of keys, two tiles, and two or three tiles plus a few keys
    *(window_case(f"whole_{n}", 2 * n, n, (n, n), D=32, heads=1, B=1, partition="grid") for n in (9, 11, 12)),
    window_case("whole_14", 14, 14, (14, 14), D=32),
    window_case("whole_12_shared", 12, 24, (12, 12), D=32, heads=1, B=1, shared=True),
    window_case("whole_14_shared", 14, 28, (14, 14), D=17, heads=1, B=1, outside=True, shared=True),
    window_case("davit", 15, 15, (7, 7), D=32, heads=3, B=1, bias=False, outside=True),
    window_case("davit_12", 13, 12, (12, 12), D=32, heads=1, B=1, bias=False, outside=True),
    *(window_case(f"hilo_{w}", 9, 15, (w, w), D=32, bias=False, outside=True) for w in (2, 4)),
    window_case("sgformer", 15, 15, (7, 7), D=32, heads=1, bias=False),
    window_case("sgformer_24", 15, 15, (7, 7), D=24, bias=False),
    channel_case("davit", 13, 14, 3, 32),
    # regions of a tile of 64 queries, of more, of a tile of 16, and of 32
    routed_case("biformer_1", 14, 16, (2, 2), 1, D=32, heads=1, B=1),
    routed_case("biformer_1_large", 18, 9, (2, 1), 1, D=32, heads=1, B=1),
    routed_case("biformer_4", 14, 14, (7, 7), 4, D=32, heads=1, B=1),
    routed_case("biformer_4_large", 10, 15, (2, 3), 4, D=32, heads=1, B=1),
    routed_case("biformer_16", 7, 14, (7, 7), 16, D=32, heads=1, B=1),
    reallocate_case("sgformer_1", 21, 28, [196, 56, 28], [1, 2, 1]),
    reallocate_case("sgformer_2", 15, 14, [49, 14, 7], [1, 2, 1]),
    reallocate_case("sgformer_3", 7, 6, [2, 1], [1, 1]),
    *(significance_case(f"sgformer_{D}", 14, 14, (7, 7), D=D) for D in (24, 32)),
    *(significance_case(f"sgformer_{D}_windows", 14, 15, (14, 15), (7, 7), D=D) for D in (24, 32)),
    *(super_case(f"stvit_8_{C}", 20, 25, (8, 8), C=C) for C in (64, 96)),
    *(super_case(f"stvit_4_{C}", 10, 13, (4, 4), C=C) for C in (128, 192)),
    neighborhood_case("nat_7", 17, 19, (7, 7), 1, D=32, heads=1, B=1),
    # dilated on one axis, so that maps stay small: each line is a window plus one position
    *(neighborhood_case(f"dinat_7_{d}", 8 * d + 1, 8, (7, 7), (d, 1), D=32, heads=1, B=1) for d in (2, 3, 4, 6, 8, 13)),
    neighborhood_case("dinat_11", 13, 12, (11, 11), 1, D=32, heads=1, B=1),
    *(neighborhood_case(f"dinat_11_{d}", 11, 12 * d, (11, 11), (1, d), D=32, heads=1, B=1) for d in (2, 4, 8)),
    neighborhood_case("dinat_dense_28", 197, 7, (7, 7), (28, 1), D=32, heads=1, B=1),
    neighborhood_case("dinat_every_line_a_window", 14, 28, (7, 7), (2, 4), D=32, heads=1, B=1),
    neighborhood_case("dinat_small_map", 13, 14, (7, 7), 2, D=32, heads=1, B=1, outside=True),
    neighborhood_case("dinat_small_rows", 9, 15, (7, 7), 2, D=32, heads=1, outside=True),
    neighborhood_case("dinat_small_both", 5, 8, (7, 7), 2, D=32, heads=1, outside=True),
]

# interpreted, these are run in one precision
SIMILAR = [
    # what is outside is masked, or there is nothing outside, since windows divide the map
    window_case("vitrpb_14", 14, 13, (14, 14), D=32, heads=1, B=1),
    *(window_case(f"whole_{n}", n, n, (n, n), D=32, heads=1, B=1) for n in (7, 16, 24, 32)),
    *(window_case(f"whole_{n}_no_bias", n, n, (n, n), D=32, heads=1, B=1, bias=False) for n in (2, 4, 7, 12)),
    *(window_case(f"whole_{n}_shared", n, 2 * n, (n, n), D=32, heads=1, B=1, shared=True) for n in (7, 16)),
    window_case("whole_7_narrow", 7, 7, (7, 7), D=24, heads=1, B=1, bias=False),
    window_case("gcvit_32_shared", 32, 31, (32, 32), D=32, heads=1, B=1, outside=True, shared=True),
]

# the largest and most unusual sizes that kernels support, and rows with one large weight
EXTREME = [
    window_case("sharp", 7, 7, (7, 7), D=32, heads=1, B=1, sharp=40),
    window_case("sharp_large", 14, 14, (14, 14), D=32, heads=1, B=1, sharp=10),
    neighborhood_case("sharp", 13, 14, (7, 7), 1, D=32, heads=1, B=1, sharp=10),
    routed_case("sharp", 14, 14, (7, 7), 4, D=32, heads=1, B=1, sharp=10),
    window_case("widest", 5, 9, (4, 4), D=128, heads=1, B=1),
    window_case("narrow", 5, 9, (4, 4), D=17, heads=1, B=1),
    window_case("long_rows", 4, 40, (3, 33), D=16, heads=1, B=1),
    window_case("longer_rows", 2, 286, (1, 286), D=16, heads=1, B=1),
    channel_case("widest", 5, 6, 1, 128),
    channel_case("narrow", 5, 6, 2, 17),
    routed_case("larger_than_a_tile", 22, 9, (2, 1), 2),
    super_case("large_cells", 21, 12, (10, 11)),
    neighborhood_case("dilated_both", 17, 15, (7, 7), 2, D=32, B=1),
    neighborhood_case("k13", 14, 17, (13, 13), 1, heads=1, B=1),
    neighborhood_case("large_table", 17, 18, (17, 17), 1, heads=1, B=1),
    neighborhood_case("one_key", 5, 9, (1, 1), 2, bias=False),
    neighborhood_case("widest", 5, 9, (3, 3), 1, D=128, heads=1, B=1),
    neighborhood_case("narrow", 5, 9, (3, 3), 1, D=17, heads=1, B=1),
]

# slow when interpreted, and of no use for kernels: blocks of the torch path, and many equal windows
LARGE = {
    *("routed_attention-blocks", "significance-large", "neighborhood_attention-tiles", "window_attention-large"),
    *("window_attention-large_no_bias", "window_attention-large_grid", "window_attention-block_odd"),
    "window_attention-grid_odd",
}

BY_NAME = {str(case): case for case in (*CASES, *RELEASED, *SIMILAR, *EXTREME)}


def with_kernels(case: Case) -> bool:
    """Whether a case is used for kernels."""
    return case.op != "pooled_attention" and str(case) not in LARGE
