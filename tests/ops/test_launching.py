"""Which configuration of a kernel is launched."""

import os

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels have one configuration", allow_module_level=True)

import triton

from flags import deterministic
from ops.dispatch import interprets
from ops.launching import choice, configuration, launch, power_of_two
from ops.precision import multiply_float32, precision
from ops.routed_attention import kernels as routed
from ops.token_reallocation import kernels as tokens
from ops.window_attention.kernels import SIZES, forward_kernel


class Kernel:
    """Notes how it is launched, in the place of a kernel and of its tuner."""

    def __init__(self, choices=None, fn=None):
        self.choices, self.fn, self.launched, self.chosen = choices, fn, [], {}
        self.best_config, self.configs_timings = choice(2, 3), {}
        self.timings = {
            choice(4, 3): [2.0, 2.0, 2.0],
            choice(4, 2): [2.0, 2.0, 2.0],
            choice(8, 2): [2.0, 2.0, 2.0],
            choice(2, 3): [1.0, 1.0, 1.0],
        }

    def __getitem__(self, grid):
        return lambda *values, **constants: self.launch(grid, values, constants)

    def launch(self, grid, values, constants):
        known = constants in [before for *_, before in self.launched]
        self.launched.append((grid, values, constants))
        if not known:  # as a tuner does, whatever device its tensors are on
            self.configs_timings = self.timings


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr("ops.launching.multiprocessors", lambda device: 0)  # any launch fills it
    monkeypatch.setattr("torch.cuda.is_current_stream_capturing", lambda: False)  # which asks a driver
    return Kernel(forward_kernel.choices, Kernel())


def test_of_one_configuration_nothing_is_measured(kernel):
    x = torch.zeros(2)
    for _ in range(2):
        launch(kernel, 3, x, D=32)
    (only,) = kernel.choices.float32
    with deterministic():
        launch(kernel, 3, x, D=32)
    assert kernel.fn.launched == [((3,), (x,), {"D": 32} | only.all_kwargs())] * 3 and not kernel.launched
    assert only.num_warps == 8
    assert list(kernel.chosen.values()) == [only.all_kwargs()]


@pytest.mark.parametrize(("dtype", "warps"), [(torch.bfloat16, 4), (torch.float16, 4)])
def test_deterministic_algorithms_leave_nothing_to_the_tuner(kernel, dtype, warps):
    x = torch.zeros(2, dtype=dtype)
    launch(kernel, 3, x, D=32)
    assert kernel.launched == [((3,), (x,), {"D": 32})] and not kernel.fn.launched
    with deterministic():
        launch(kernel, 3, x, D=32)
    ((grid, _, constants),) = kernel.fn.launched
    assert grid == (3,) and constants["D"] == 32 and constants["num_warps"] == warps
    assert len(kernel.launched) == 1


@pytest.mark.parametrize(("place", "warps"), [(0, 4), (3, 8), (9, 8)])
def test_a_configuration_can_be_fixed(kernel, place, warps):
    x = torch.zeros(2, dtype=torch.bfloat16)
    with configuration(0), configuration(place):
        launch(kernel, 3, x, D=32)
    ((_, _, constants),) = kernel.fn.launched
    assert constants["num_warps"] == warps and not kernel.launched
    launch(kernel, 3, x, D=32)
    assert len(kernel.launched) == 1


def test_the_tuner_is_asked_once_for_constants_and_dtypes(kernel):
    x, y = torch.zeros(2, dtype=torch.float16), torch.zeros(2, dtype=torch.bfloat16)
    for values, constants in [((x, None, 5), {"D": 32}), ((x, y, 5), {"D": 32}), ((x, y, 5), {"D": 16})]:
        before = len(kernel.launched), len(kernel.fn.launched)
        launch(kernel, 3, *values, **constants)
        assert (len(kernel.launched), len(kernel.fn.launched)) == (before[0] + 1, before[1])
        kernel.best_config = None  # of some other launch
        launch(kernel, 7, *values, **constants)
        assert kernel.fn.launched[-1] == ((7,), values, constants | choice(2, 3).all_kwargs())
        assert (len(kernel.launched), len(kernel.fn.launched)) == (before[0] + 1, before[1] + 1)
        kernel.best_config = choice(2, 3)


@pytest.mark.parametrize(("constants", "stages"), [({"D": 32}, 3), ({"D": 33}, 2), ({"D": 128}, 2), ({}, 2)])
def test_heads_of_many_channels_have_no_third_stage(constants, stages):
    of = forward_kernel.choices.of([torch.bfloat16], constants)
    assert max(config.num_stages for config in of) == stages and of[0].num_stages == stages


@pytest.mark.parametrize(
    ("dtype", "channels", "edge", "stages"),
    [
        (torch.float16, 64, True, 2),
        (torch.float16, 65, True, 1),
        (torch.float16, 65, False, 2),
        (torch.float32, 65, True, 2),
    ],
)
def test_windows_beyond_the_map_have_no_second_stage_for_wide_heads(dtype, channels, edge, stages):
    of = forward_kernel.choices.of([dtype], {"D": channels, "EDGE": edge})
    assert max(config.num_stages for config in of) == stages


@pytest.mark.parametrize(
    ("channels", "keys", "warps", "stages"),
    [(32, 64, 2, 3), (32, 128, 4, 3), (64, 64, 2, 2), (64, 128, 4, 1), (65, 64, 4, 2)],
)
def test_regions_with_wide_heads_have_more_warps_and_fewer_stages(channels, keys, warps, stages):
    of = routed.backward_keys_kernel.choices.of([torch.bfloat16], {"D": channels, "BLOCK_M": 64, "BLOCK_N": keys})
    assert min(config.num_warps for config in of) == warps and max(config.num_stages for config in of) == stages
    # windows, whose tiles have BLOCK_N too
    of = routed.backward_keys_kernel.choices.of([torch.bfloat16], {"D": channels, "BLOCK_N": 64})
    assert min(config.num_warps for config in of) == 2


@pytest.mark.parametrize(("channels", "keys", "stages"), [(32, 128, 3), (64, 128, 2), (65, 128, 1), (65, 64, 2)])
def test_large_windows_of_wide_heads_have_one_stage(channels, keys, stages):
    of = tokens.receive_window_kernel.choices.of([torch.bfloat16], {"D": channels, "BLOCK_N": keys})
    assert max(config.num_stages for config in of) == stages


def test_nothing_is_measured_by_a_launch_that_does_not_fill_the_gpu(kernel, monkeypatch):
    monkeypatch.setattr("ops.launching.multiprocessors", lambda device: 100)
    x = torch.zeros(2, dtype=torch.bfloat16)
    launch(kernel, 299, x, D=32)
    ((_, _, constants),) = kernel.fn.launched
    assert constants == {"D": 32} | forward_kernel.choices.half[0].all_kwargs()
    assert not kernel.launched and not kernel.chosen
    launch(kernel, 300, x, D=32)
    assert len(kernel.launched) == 1
    launch(kernel, 1, x, D=32)  # what is known serves launches of any size
    assert kernel.fn.launched[-1][2] == {"D": 32} | choice(2, 3).all_kwargs()


def test_nothing_is_measured_while_a_graph_is_captured(kernel, monkeypatch):
    x = torch.zeros(2, dtype=torch.bfloat16)
    monkeypatch.setattr("torch.cuda.is_current_stream_capturing", lambda: True)
    launch(kernel, 3, x, D=32)
    ((_, _, constants),) = kernel.fn.launched
    assert constants == {"D": 32} | forward_kernel.choices.half[0].all_kwargs()
    assert not kernel.launched and not kernel.chosen
    monkeypatch.setattr("torch.cuda.is_current_stream_capturing", lambda: False)
    launch(kernel, 3, x, D=32)
    assert len(kernel.launched) == 1


def test_a_launch_that_leaves_no_memory_for_a_measurement_runs_the_first_configuration(kernel, monkeypatch):
    """And a later one measures; where the launch itself finds no memory, its error is raised."""
    x, tuner, itself = torch.zeros(2, dtype=torch.bfloat16), Kernel.launch, torch.OutOfMemoryError("of the launch")

    def fail(self, grid, values, constants):
        self.nargs = values  # which a tuner keeps until it has launched
        raise torch.OutOfMemoryError("256 MiB") if self is kernel else itself

    monkeypatch.setattr(Kernel, "launch", fail)
    with pytest.raises(torch.OutOfMemoryError, match="of the launch"):
        launch(kernel, 3, x, D=32)
    kernel.fn.launch = lambda *given: tuner(kernel.fn, *given)
    launch(kernel, 3, x, D=32)
    assert kernel.fn.launched[-1][2] == {"D": 32} | forward_kernel.choices.half[0].all_kwargs()
    assert not kernel.chosen and kernel.nargs is None
    monkeypatch.setattr(Kernel, "launch", tuner)
    launch(kernel, 3, x, D=32)
    assert len(kernel.launched) == len(kernel.chosen) == 1


@pytest.mark.parametrize(("times", "warps"), [([1.04, 1.0, 1.0], 4), ([1.06, 1.0, 1.0], 2)])
def test_the_first_configuration_runs_unless_another_is_clearly_faster(kernel, times, warps):
    kernel.timings[choice(4, 3)] = times
    x = torch.zeros(2, dtype=torch.bfloat16)
    launch(kernel, 3, x, D=32)
    launch(kernel, 3, x, D=32)
    assert kernel.fn.launched[-1][2]["num_warps"] == warps


def test_what_is_known_from_another_gpu_is_not_judged_by_later_times(kernel):
    here = torch.zeros(2, dtype=torch.bfloat16)
    launch(kernel, 3, here, D=32)
    kernel.timings = {choice(4, 3): [1.0, 1.0, 1.0], choice(2, 3): [1.0, 1.0, 1.0]}
    launch(kernel, 3, here, D=16)
    there = here.to("meta")
    for _ in range(2):
        launch(kernel, 3, there, D=32)
    assert kernel.fn.launched[-1][2]["num_warps"] == 2


def test_the_tuner_is_asked_by_constants_alone_and_remembers():
    assert set(forward_kernel.keys) == {p.name for p in forward_kernel.fn.params if p.is_constexpr}
    assert not set(forward_kernel.keys) & set(SIZES)
    assert forward_kernel.cache_results


def test_float32_is_exact_unless_tf32_is_allowed():
    assert precision() == "ieee"
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        assert precision() == "tf32"
    finally:
        torch.set_float32_matmul_precision(before)
    torch.backends.cuda.matmul.fp32_precision = "tf32"  # after which torch refuses to answer the older way
    try:
        assert precision() == "tf32"
    finally:
        torch.set_float32_matmul_precision(before)
    assert precision() == "ieee"


def test_benchmarks_and_checks_say_how_float32_is_multiplied():
    try:
        multiply_float32("tf32")
        assert precision() == "tf32" == torch.backends.cuda.matmul.fp32_precision
        assert torch.get_float32_matmul_precision() == "high"  # torch's compiler asks so
        multiply_float32("tf32x3")  # torch has no such matmuls
        assert precision() == "tf32x3" and torch.backends.cuda.matmul.fp32_precision == "ieee"
    finally:
        multiply_float32("ieee")
    assert precision() == "ieee" == torch.backends.cuda.matmul.fp32_precision


def test_three_matmuls_in_the_place_of_one_have_all_registers():
    choices, given = forward_kernel.choices, {"D": 32, "PRECISION": "tf32x3"}
    several = choices.of([torch.float32], given)
    assert len(several) == len(set(map(str, several))) > len(choices.float32)
    assert {config.maxnreg for config in several} == {None} and 8 in {config.num_warps for config in several}
    assert choices.of([torch.bfloat16], given) == choices.of([torch.bfloat16], {"D": 32})


@pytest.mark.parametrize("word", ["1", "true", "TRUE", "on", "yes", "y", "0", "2", "", "false", "no"])
def test_the_variable_is_read_as_triton_reads_it(word, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", word)
    assert interprets() == triton.knobs.runtime.interpret


def test_rows_of_tokens_without_a_division():
    """As `locate` of window attention finds them where windows are not larger."""
    for width in range(1, 65):
        assert all(token * (65536 // width + 1) >> 16 == token // width for token in range(1024))


def test_powers_of_two_are_triton_s():
    assert [power_of_two(n) for n in range(1, 300)] == [triton.next_power_of_2(n) for n in range(1, 300)]
