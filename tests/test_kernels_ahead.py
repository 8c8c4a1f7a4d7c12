"""Kernels build for GPUs that this machine does not have, and fit into their registers and shared memory."""

import functools
import os
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.torch_version import TorchVersion

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels cannot be compiled", allow_module_level=True)

import triton

import ops
from ops.ahead import TARGETS, Absent, Cost, compile, configurations, distinct, name, specialised, table
from ops.dispatch import SHARED, SHARED_AMD
from ops.precision import multiply_float32
from ops.recording import recording
from zoo import kernels
from zoo.registry import class_of, variants

FAST = ["biformer_t", "davit_t", "gcvit_xxt", "maxvit_t", "nat_m", "sgformer_s", "stvit_s"]
DTYPES = (torch.float32, torch.bfloat16)


@functools.cache
def launched_in(dtype):
    return kernels.launches(FAST, dtype=dtype)


@pytest.fixture(scope="module")
def launches():
    return launched_in("bfloat16")


def test_every_kernel_of_a_model_is_written_down(launches):
    found = {name(launch) for launch in launches}
    assert {"window_attention.forward_kernel", "window_attention.backward_kernel"} < found
    assert {"channel_attention.gram_kernel", "super_token_attention.collect_kernel"} < found
    assert "ops.backward_table_kernel" in found


@pytest.mark.parametrize("dtype", kernels.DTYPES)
def test_no_forward_spills(dtype):
    forward = [launch for launch in launched_in(dtype) if "backward" not in name(launch)]
    costs = kernels.compile_all(kernels.binaries(forward, ["sm_90"], every=True))
    assert all(cost.fits for cost in costs), table(costs)
    # compilers leave some bytes of two kernels that need every register: Triton 3.5's 8 and 40, Triton 3.9's 8 and 16
    version = TorchVersion(triton.__version__)
    left = 40 if version < "3.6" else 16 if version >= "3.9" else 0
    assert max(cost.spilled for cost in costs) <= left, table(costs)


@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_builds(launches, target):
    """One binary of each kernel; `python -m zoo.kernels` builds them all."""
    costs = [compile(launch, target) for launch in {name(launch): launch for launch in launches}.values()]
    assert all(cost.fits for cost in costs), table(costs)


def test_float32_as_three_matmuls_in_tf32(monkeypatch):
    """With eight warps and all registers, no forward pass of windows spills."""
    monkeypatch.setattr("ops.precision._float32", "tf32x3")
    launch = next(launch for launch in windows(8, torch.float32) if "forward" in name(launch))
    costs = [compile(launch, "sm_90", config) for config in configurations(launch) if config.num_warps == 8]
    assert costs and all(cost.fits and not cost.spilled for cost in costs), table(costs)


@pytest.mark.slow
@pytest.mark.parametrize("model", sorted(variants()))
def test_two_blocks_a_stage_launch_what_all_do(model):
    shallow, whole = (distinct(kernels.launches([model], most)) for most in (2, None))
    assert {str(specialised(launch)) for launch in shallow} == {str(specialised(launch)) for launch in whole}


@pytest.mark.slow
@pytest.mark.parametrize("model", sorted(variants()))
def test_all_kernels_of_all_models(model):
    written = [launch for dtype in kernels.DTYPES for launch in kernels.launches([model], dtype=dtype)]
    costs = kernels.compile_all(kernels.binaries(distinct(written), ["sm_90"], every=True))
    assert not [cost for cost in costs if not cost.fits or cost.spills_forward], table(costs)


def recorded(channels, dtype):
    """Attention in windows of one tile and in neighborhoods, both with a table and with keys outside or without, then
    between channels, routed, and received in windows of a whole tile."""
    q, bias, key = (
        torch.empty(shape, device="meta", dtype=dtype, requires_grad=True)
        for shape in ((1, 9, 9, 2, channels), (2, 13, 13), (2, channels))
    )
    with recording() as written, ops.implementation("triton"):
        for outside, few in ((None, q), ((key, key), q[:, :6])):
            ops.window_attention(q, q, q, bias, 7, outside=outside).sum().backward()
            ops.neighborhood_attention(few, few, few, bias, 7, outside=outside).sum().backward()
        ops.channel_attention(q, q, q).sum().backward()
        ops.routed_attention(q, q, q, 3, 2).sum().backward()
        ops.significance(q.detach(), q.detach(), (8, 16))
    return written


@pytest.mark.slow
@pytest.mark.parametrize("how, channels, held", [(how, *row) for how in SHARED for row in SHARED[how]])
def test_shared_memory_is_what_dispatch_expects(how, channels, held, monkeypatch):
    """Where it is the most, for sm_80; the GPUs of the other two have enough for every kernel."""
    dtype = torch.bfloat16 if how == "half" else torch.float32
    monkeypatch.setattr("ops.precision._float32", None if how == "half" else how)
    written = distinct([*windows(13, dtype, (12, 12), channels), *recorded(channels, dtype)])
    costs = [compile(launch, "sm_80", c) for launch in written for c in configurations(launch)]
    assert max(cost.shared for cost in costs) <= held * 1024, table(costs)
    costs = [compile(launch, target) for launch in written for target in ("sm_90", "sm_100")]
    assert all(cost.fits for cost in costs), table(costs)


def test_tf32_takes_the_shared_memory_that_dispatch_expects(monkeypatch):
    """More than exact products, and than an A100 has: with those it would be found out in a backward pass."""
    monkeypatch.setattr("ops.precision._float32", "tf32")
    wanted = "neighborhood_attention.backward_keys_kernel"
    launch = next(launch for launch in recorded(128, torch.float32) if name(launch) == wanted)
    cost = compile(launch, "sm_80")
    assert dict(SHARED["ieee"])[128] * 1024 < cost.shared <= dict(SHARED["tf32"])[128] * 1024 and not cost.fits


def test_halves_take_the_shared_memory_that_dispatch_expects():
    """Most of all in backward passes with keys outside, of which a GPU with too little would not say so forward."""
    wanted = ("window_attention.backward_kernel", "neighborhood_attention.backward_queries_kernel")
    for channels, held in SHARED["half"]:
        launches = [launch for launch in recorded(channels, torch.bfloat16) if name(launch) in wanted]
        costs = [compile(launch, "sm_80") for launch in launches]
        assert max(cost.shared for cost in costs) <= held * 1024, table(costs)


def test_wide_heads_take_the_shared_memory_of_amd_gpus_that_dispatch_expects():
    most = "window_attention.forward_kernel"
    for channels, held in SHARED_AMD["ieee"]:
        cost = compile(next(one for one in recorded(channels, torch.float32) if name(one) == most), "gfx942")
        assert cost.shared == held * 1024 and cost.fits == (held <= 64), table([cost])


def test_only_what_spilled_is_explained():
    fields = {"dtype": "bfloat16", "target": "sm_90", "warps": 4, "stages": 1, "registers": 255, "shared": 0}
    spilled = Cost("routed_attention.backward_keys_kernel", spilled=40, **fields)
    fine = Cost("window_attention.backward_kernel", spilled=0, **fields | {"dtype": "float32"})
    heading, _, reason, _ = kernels._reasons([spilled, fine])
    assert heading == "Known reasons for spilling:" and reason.startswith(f"- {spilled.kernel}: two warps")
    assert kernels._reasons([fine]) == []


def test_matmuls_are_no_reason_for_kernels_without_any():
    fields = {"dtype": "float32", "warps": 4, "stages": 1, "registers": 72, "spilled": 8, "shared": 0}
    kernel = "token_reallocation.backward_tokens_kernel"
    without, with_some, elsewhere = (
        Cost(kernel, target, multiplies=multiplies, **fields)
        for target, multiplies in (("sm_90", False), ("sm_90", True), ("sm_80", False))
    )
    assert kernels.unexplained([without, with_some, elsewhere]) == [without]
    assert kernels._reasons([without]) == []


@pytest.mark.parametrize("place", [0, -1])
def test_a_spill_needs_a_reason_where_nothing_is_measured(place, monkeypatch):
    """In the first configuration, that is. No kernel is compiled: the costs are made up."""
    kernel = "window_attention.backward_bias_kernel"
    fields = {"target": "sm_90", "dtype": "bfloat16", "warps": 4, "stages": 1, "registers": 72, "shared": 0}

    def costs(work, jobs):
        spills = [name(launch) == kernel and config == configurations(launch)[place] for launch, _, config in work]
        assert any(spills) and len(set(map(str, (config for *_, config in work)))) > 1
        return [
            Cost(name(launch), spilled=8 * spill, **fields) for (launch, *_), spill in zip(work, spills, strict=True)
        ]

    monkeypatch.setattr(kernels, "compile_all", costs)
    given = ["maxvit_t_384", "--targets", "sm_90", "--dtypes", "bfloat16", "--all"]
    if place == -1:
        return kernels.main(given)
    with pytest.raises(SystemExit, match=f"spill on sm_90 for no known reason.*{kernel}"):
        kernels.main(given)


def test_explained_kernels_exist(launches):
    words = {name(launch) for launch in launches} | {*TARGETS, *kernels.DTYPES}
    assert set(kernels.SPILLS) <= words


@pytest.mark.parametrize("model", ["davit_t", "gcvit_xxt", "stvit_s"])
def test_training_under_autocast_launches_what_is_compiled_ahead(model, monkeypatch):
    """A CPU stands in for the GPU, and no tensor has data: parameters stay float32, and so do results of norms."""
    ahead = {str(specialised(launch)) for dtype in ("bfloat16", "float32") for launch in launched_in(dtype)}
    monkeypatch.setattr("ops.dispatch.interprets", lambda: True)
    monkeypatch.setattr("ops.registration.interpreted", lambda: True)
    args = variants()[model]
    with FakeTensorMode(allow_non_fake_inputs=True), recording() as written:
        built = class_of(model)(**args | {"depths": [2] * len(args["depths"])})
        for side in (args["img_size"], args["img_size"] + 13):
            with torch.autocast("cpu", torch.bfloat16):
                out = built(torch.empty(2, 3, side, side))
            out.float().sum().backward()
    assert written and {str(specialised(launch)) for launch in written} <= ahead


def every_op(dtype):
    """The launches of kernels with matmuls, of every op."""
    x, few = (torch.empty(1, side, side, 64, device="meta", dtype=dtype, requires_grad=True) for side in (16, 2))
    heads, keys = (t.detach().unflatten(3, (2, 32)) for t in (x, few))
    with recording() as written, ops.implementation("triton"):
        ops.scatter_super_tokens(*ops.super_tokens(x, (8, 8)), (8, 8)).sum().backward()
        ops.significance(heads, heads, (8, 8))
        ops.significance(heads, keys)
    return [launch for launch in [*recorded(32, dtype), *written] if "PRECISION" in dict(launch.constants)]


@pytest.mark.parametrize(("dtype", "same"), [(torch.bfloat16, True), (torch.float16, True), (torch.float32, False)])
def test_allowing_tf32_changes_the_binaries_of_float32_alone(dtype, same):
    exact = every_op(dtype)
    try:
        multiply_float32("tf32")
        allowed = every_op(dtype)
    finally:
        multiply_float32("ieee")
    assert len({name(launch).split(".")[0] for launch in exact}) == 6
    assert {str(here) == str(there) for here, there in zip(exact, allowed, strict=True)} == {same}


@pytest.mark.parametrize("how", ["ieee", "tf32"])
def test_float32_is_compiled_ahead_as_the_command_says(how, monkeypatch):
    """No kernel is compiled: the costs are made up."""
    found = set()

    def costs(work, jobs):
        found.update(dict(launch.constants).get("PRECISION") for launch, *_ in work)
        return [Cost(name(launch), target, "float32", 8, 1, 128, 0, 0) for launch, target, _ in work]

    monkeypatch.setattr(kernels, "compile_all", costs)
    try:
        kernels.main(["gcvit_xxt", "--targets", "sm_90", "--dtypes", "float32", "--float32", how])
    finally:
        multiply_float32("ieee")
    assert found - {None} == {how}


def test_models_released_with_other_arguments_are_compiled_too():
    builds = kernels.built_as(["litv2_s", "davit_t"])
    assert list(builds) == ["litv2_s", "litv2_s with windows=(0, 0, 4, 1)", "davit_t"]
    written = kernels.launches(["litv2_s"])
    assert {dict(launch.constants)["WH"] for launch in written if name(launch).startswith("window")} == {2, 4}
    assert len(distinct(written)) == len(written)


def test_processes_find_and_compile_the_same():
    alone, shared = (kernels.launches(["biformer_t", "davit_t"], jobs=jobs) for jobs in (1, 2))
    assert [str(launch) for launch in shared] == [str(launch) for launch in alone]
    assert all(there.kernel is here.kernel for here, there in zip(alone, shared, strict=True))
    alone, shared = (kernels.compile_all(kernels.binaries(alone, ["sm_90"], every=False), jobs) for jobs in (1, 2))
    assert shared == alone


def windows(size, dtype=torch.bfloat16, window=(7, 7), channels=32):
    """The launches of one call, forward and backward."""
    q = torch.empty(1, size, size, 2, channels, device="meta", dtype=dtype, requires_grad=True)
    with recording() as written:
        ops.window_attention(q, q, q, None, window=window).sum().backward()
    assert q.grad.shape == q.shape and q.grad.is_meta
    return written


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_what_is_compiled_ahead_is_where_a_launch_looks_for_it(target, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for launch in windows(9):
        compile(launch, target)
    there = set(tmp_path.iterdir())
    assert len(there) == 2
    # what a launch passes: tensors, in the tuner's own words
    monkeypatch.setattr(triton.runtime.driver, "_active", Absent(TARGETS[target]))
    for launch in windows(9):
        values = [torch.empty(16, dtype=v) if isinstance(v, torch.dtype) else v for v in launch.values]
        options = configurations(launch)[0].all_kwargs()
        launch.kernel.fn.run(*values, grid=(1,), warmup=True, **dict(launch.constants), **options)
    assert set(tmp_path.iterdir()) == there


def test_the_driver_is_as_before():
    before = triton.runtime.driver._active
    compile(windows(9)[0], "sm_90")
    assert triton.runtime.driver._active is before


def test_what_cannot_be_imported_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ops.ahead", None)
    with pytest.raises(SystemExit, match="needs the package triton, which cannot be imported here"):
        kernels.main(["--help"])


def test_recording_runs_nothing():
    assert [name(launch) for launch in windows(9)] == [
        "window_attention.forward_kernel",
        "window_attention.backward_kernel",
    ]


def test_models_launch_what_their_dtype_asks_for():
    """Windows of several tiles: the table is kept in registers where its numbers are halves."""
    for dtype, several in (("bfloat16", "forward_kept_kernel"), ("float32", "forward_tiles_kernel")):
        found = {launch.kernel.fn.__name__ for launch in kernels.launches(["maxvit_t_384"], dtype=dtype)}
        assert several in found


@pytest.mark.parametrize("window", [(8, 16), (11, 11)])
def test_significance_in_large_windows_has_registers(window):
    """Two warps spilled 680 bytes a thread and more. Triton 3.5's compiler leaves 56 with one stage, others none."""
    q = torch.empty(1, 22, 32, 2, 64, device="meta", dtype=torch.bfloat16)
    with recording() as written:
        ops.significance(q, q, window, impl="triton")
    (launch,) = written
    costs = [compile(launch, "sm_90", config) for config in configurations(launch)]
    left = 56 if TorchVersion(triton.__version__) < "3.6" else 0
    assert len(costs) > 1 and all(cost.fits and cost.spilled <= left for cost in costs), table(costs)


@pytest.mark.parametrize(("window", "channels"), [((8, 16), 96), ((11, 11), 128)])
def test_significance_of_wide_heads_in_large_windows_fits_every_gpu(window, channels):
    """With a second stage it took 65 KiB, and the GPUs of gfx942 have 64."""
    q = torch.empty(1, 22, 32, 2, channels, device="meta", dtype=torch.bfloat16)
    with recording() as written:
        ops.significance(q, q, window, impl="triton")
    costs = [compile(written[0], target, config) for target in TARGETS for config in configurations(written[0])]
    assert all(cost.fits for cost in costs), table(costs)
    assert max(cost.shared for cost in costs if cost.target == "sm_80") <= dict(SHARED["half"])[128] * 1024


@pytest.mark.parametrize("channels", [64, 128])
def test_routing_with_wide_heads_has_registers(channels):
    """Regions of more pixels than a tile has. Two warps left 1,760 bytes a thread for 128 channels in a backward pass,
    and two stages took more shared memory for 64 than dispatch expects."""
    q = torch.empty(1, 27, 27, 2, channels, device="meta", dtype=torch.bfloat16, requires_grad=True)
    with recording() as written:
        ops.routed_attention(q, q, q, 3, 2, impl="triton").sum().backward()
    routed = [launch for launch in distinct(written) if name(launch).startswith("routed")]
    costs = [compile(launch, target) for launch in routed for target in ("sm_80", "sm_90")]
    held = min(kib for most, kib in SHARED["half"] if channels <= most)
    assert len(costs) == 6 and all(cost.shared <= held * 1024 for cost in costs), table(costs)
    spilled = max(cost.spilled for cost in costs if cost.target == "sm_90")
    assert spilled <= (384 if TorchVersion(triton.__version__) < "3.6" else 256), table(costs)  # 336; 104 with 3.8


def ranks(*shape, dtype=torch.float32):
    """The launches that rank the tokens of a map."""
    with recording() as written:
        ops.rank_tokens(torch.empty(shape, device="meta", dtype=dtype), impl="triton")
    return written


@pytest.mark.parametrize(
    "shape, launched",
    [
        ((128, 32, 32), ["sort_kernel"]),
        ((1, 25, 42), ["count_kernel"]),
        ((2, 50, 84), ["count_kernel"]),
        ((1, 64, 128), ["count_kernel"]),  # 2**26 pairs
        ((1, 64, 129), ["lay_kernel", "number_kernel"]),
        ((128, 56, 56), ["lay_kernel", "number_kernel"]),
    ],
)
def test_how_tokens_are_ranked_depends_on_their_number(shape, launched):
    """One program sorts few, each is compared with all others, or torch sorts, where that would take too long."""
    assert [launch.kernel.fn.__name__ for launch in ranks(*shape)] == launched


@pytest.mark.parametrize("target", TARGETS)
def test_ranking_builds_without_spills(target):
    """Every way of it, which models at one size and batch do not all launch."""
    shapes = ((1, 28, 28), (2, 50, 84), (2, 200, 336))
    written = distinct(launch for dtype in DTYPES for shape in shapes for launch in ranks(*shape, dtype=dtype))
    costs = [compile(launch, target) for launch in written]
    assert {cost.kernel for cost in costs} >= {f"token_reallocation.{k}_kernel" for k in ("sort", "count", "lay")}
    assert all(cost.fits and not cost.spilled for cost in costs), table(costs)


def test_no_binary_is_special_to_a_map():
    """Sizes of 1 and multiples of 16 included, which Triton makes binaries of their own for."""
    for here, there in zip(windows(9), windows(16 * 7 + 1), strict=True):
        assert str(specialised(here)) == str(specialised(there))
    assert len(distinct([launch for size in (3, 9, 20, 128) for launch in windows(size)])) == 2


def on_tokens(H, W):
    """The launches of the ops on super tokens, and of those that merge tokens, forward and backward."""
    x = torch.empty(2, H, W, 64, device="meta", dtype=torch.bfloat16, requires_grad=True)
    weights, biases = [x.new_empty(1, 4), x.new_empty(1, 1)], [x.new_empty(1), x.new_empty(1)]
    with recording() as written, ops.implementation("triton"):
        ops.scatter_super_tokens(*ops.super_tokens(x, (8, 8)), (8, 8)).sum().backward()
        merged = ops.reallocate_tokens(x, torch.empty(2, H, W, device="meta"), weights, biases, [1, 1])
        torch.cat(merged, 1).sum().backward()
    return written


@pytest.mark.parametrize(
    ("launched", "sizes"),
    [
        (on_tokens, ((33, 37), (40, 48), (64, 48), (56, 60))),
        (functools.partial(ranks, 2), ((28, 28), (29, 31), (32, 32))),  # which one program sorts, in as many lanes
        (functools.partial(ranks, 2), ((200, 336), (171, 401))),
    ],
)
def test_strides_that_follow_the_map_make_no_binary_special(launched, sizes):
    found = [{str(specialised(launch)) for launch in launched(*size)} for size in sizes]
    assert found[0] and all(binaries == found[0] for binaries in found)


def test_float32_takes_eight_warps():
    for launch in windows(9):
        assert [config.num_warps for config in configurations(launch)] == [4, 4, 4, 8]
    for launch in windows(9, torch.float32):
        assert [config.num_warps for config in configurations(launch)] == [8]
