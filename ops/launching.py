"""How kernels are launched: on the right device, or under Triton's interpreter."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from threading import Lock
from typing import Any

import torch
import triton
from torch import Tensor

from .dispatch import NARROW
from .recording import is_recording, write_down


@dataclass(frozen=True)
class Choices:
    """The configurations of a kernel, by the precision of its data."""

    half: tuple[triton.Config, ...]
    float32: tuple[triton.Config, ...]

    def of(self, values: Iterable[Any], constants: Mapping[str, Any]) -> tuple[triton.Config, ...]:
        """Those for arguments, or for dtypes in the place of tensors.

        A third stage is half as much again of shared memory: not every GPU has so much for heads of many channels D.
        Two warps have no room for a product with so many keys BLOCK_N.
        """
        dtypes = [value.dtype if isinstance(value, Tensor) else value for value in values]
        found = self.half if torch.float16 in dtypes or torch.bfloat16 in dtypes else self.float32
        stages = 3 if constants.get("D", NARROW + 1) <= NARROW else 2
        warps = 4 if constants.get("BLOCK_N", 0) > 64 else 1
        return tuple(config for config in found if config.num_stages <= stages and config.num_warps >= warps)


def choice(warps: int, stages: int, registers: int | None = None) -> triton.Config:
    """A configuration; `registers` is the most that a thread may have, which only CUDA's compiler is told."""
    return triton.Config({}, num_warps=warps, num_stages=stages, maxnreg=None if torch.version.hip else registers)


# The first of each runs where nothing is measured; most were the fastest on an H200, in calls at 224 x 224.
# Products of float32 are computed from registers, one number at a time, and need eight warps; without a limit the
# compiler would rather spill than use all registers there are. In half precision fewer of them let one more program
# share a multiprocessor; heads of many channels need eight warps.
FORWARD = Choices(half=(choice(4, 1), choice(4, 2, 128), choice(8, 1)), float32=(choice(8, 1, 128),))
# Where a limit is the better rule: more is computed for each token that is read.
LIMITED = Choices(half=(choice(4, 2, 128), choice(4, 1), choice(8, 1), choice(4, 3)), float32=(choice(8, 1, 128),))
# Where a limit would leave too few: windows of several tiles.
TILES = Choices(half=(choice(4, 1), choice(4, 2), choice(8, 1)), float32=(choice(8, 1),))
# For programs that loop over windows, the next of which can be loaded ahead.
AHEAD = Choices(half=(choice(4, 3), choice(4, 2), choice(4, 2, 128), choice(8, 1)), float32=(choice(8, 2),))
# The same, where most registers hold what was looked up once.
KEPT = Choices(half=(choice(4, 2),), float32=(choice(8, 2),))
# For backward passes that have too many products alive for a second stage; a third program is worth some spilling.
BACKWARD = Choices(half=(choice(4, 1, 168), choice(4, 1), choice(8, 1)), float32=(choice(8, 1),))
# For those that gain nothing from a third program.
EASY = Choices(half=(choice(4, 1), choice(4, 1, 168), choice(8, 1)), float32=(choice(8, 1),))
# Where there may be few tokens in a tile: then two warps are faster.
FEW = Choices(half=(choice(4, 1), choice(2, 2), choice(4, 2), choice(4, 3)), float32=(choice(8, 1, 128),))
# Where they are faster for many tokens too.
PAIR = Choices(half=(choice(2, 2), choice(4, 2), choice(4, 1), choice(4, 3)), float32=(choice(8, 1),))
# Where no other was faster.
PLAIN = Choices(half=(choice(4, 1),), float32=(choice(8, 1, 128),))
# For tiles of which little is computed.
SMALL = Choices(half=(choice(2, 2), choice(4, 1)), float32=(choice(4, 1),))
# How many programs a multiprocessor must have for a launch to be worth measuring, and how much longer than the fastest
# the first may take and still run. Of few programs all configurations take about as long as the launch itself: what was
# fastest by chance would be kept, for large maps too.
FILLED, CHANCE = 3, 1.05


def unlimited(choices: Choices) -> Choices:
    """The same, but for float32 without a limit on registers: where most of them hold products."""
    return Choices(choices.half, (choice(8, 1),))


def tuned(sizes: Sequence[str], choices: Choices) -> Callable[[Callable], Any]:
    """Makes a function a kernel that exists in a few configurations.

    Which of them runs is measured once for its constants and dtypes, never for the size of a map, and kept on disk. It
    is measured by the first launch that fills the GPU; until then the first runs.
    `sizes` names arguments that change with the map, perhaps also some that the kernel does not have: no binary is
    special to their values, else every other map might have to wait for a compiler. (In a tuple they would be: there
    stand strides, and numbers that are the model's.)
    """

    def decorate(function: Callable) -> Any:
        kernel = triton.jit(function, do_not_specialize=list(sizes))
        if interpreted():
            return kernel
        constants = [parameter.name for parameter in kernel.params if parameter.is_constexpr]
        prune = {
            "early_config_prune": lambda configs, values, **constants: list(choices.of(values.values(), constants))
        }
        configs = list({str(config): config for config in choices.half + choices.float32}.values())
        options = {"prune_configs_by": prune, "do_bench": brief, "cache_results": True}
        tuner = triton.autotune(configs, key=constants, **options)(kernel)
        # finding again what it chose takes the tuner longer than a launch does
        tuner.choices, tuner.chosen = choices, {}
        return tuner

    return decorate


def brief(call: Callable[[], Any], quantiles: Sequence[float]) -> Any:
    """Milliseconds of a call: a third of the time that Triton takes by default. What differs little may be mistaken."""
    return triton.testing.do_bench(call, warmup=10, rep=30, quantiles=quantiles)


_fixed: int | None = None  # which configuration runs, where none is to be measured
_tuning = Lock()  # a tuner has one place for what it chose last


@contextmanager
def configuration(place: int) -> Iterator[None]:
    """Within it every kernel is launched in the configuration of this place among its own, or in its last."""
    global _fixed
    before, _fixed = _fixed, place
    try:
        yield
    finally:
        _fixed = before


@cache
def interpreted() -> bool:
    """Whether kernels run on CPU tensors, slowly: TRITON_INTERPRET=1 has to be set before kernels are imported."""
    return bool(triton.knobs.runtime.interpret)


def launch(kernel: Any, programs: int, *values: Any, **constants: Any) -> None:
    """Runs `programs` programs of a kernel on the device of its first argument, a tensor; strides pass as tuples.

    Under torch.use_deterministic_algorithms always the first of its configurations, which is never measured then.
    """
    if is_recording():
        return write_down(kernel, values, constants)
    index = values[0].device.index
    # Triton launches on the current device, whatever device the tensors are on
    with nullcontext() if index is None or index == torch.cuda.current_device() else torch.cuda.device(index):
        if interpreted():
            kernel[(programs,)](*values, **constants)
        else:
            configured(kernel, programs, values, constants)


def configured(kernel: Any, programs: int, values: tuple, constants: dict[str, Any]) -> None:
    """Runs a kernel in the configuration that is set, or that its tuner chose, which is asked once for each dtype."""
    # what was fastest on one day may not be on another, and adds up in another order
    place = 0 if torch.are_deterministic_algorithms_enabled() else _fixed
    options = None
    if place is None:
        key = (*constants.values(), *[value.dtype for value in values if isinstance(value, Tensor)])
        options = kernel.chosen.get(key)
    if options is None:
        choices = kernel.choices.of(values, constants)
        measurable = place is None and len(choices) > 1 and programs >= FILLED * multiprocessors(values[0].device)
        # a graph that is captured records launches, and nothing can wait for one to be timed
        if measurable and not torch.cuda.is_current_stream_capturing():
            with _tuning:
                kernel[(programs,)](*values, **constants)
                kernel.chosen[key] = preferred(kernel, choices[0]).all_kwargs()
            return
        options = choices[min(place or 0, len(choices) - 1)].all_kwargs()
        if place is None and len(choices) == 1:  # a tuner of one configuration has no times to be asked for
            kernel.chosen[key] = options
    kernel.fn[(programs,)](*values, **constants, **options)


def preferred(tuner: Any, first: triton.Config) -> triton.Config:
    """What a tuner measured fastest, or the first where that is hardly slower."""
    best, times = tuner.best_config, tuner.configs_timings
    # its times are of its last measurement: another, where a launch failed after its own
    known = first in times and best in times
    return first if known and times[first][0] <= CHANCE * times[best][0] else best


def precision() -> str:
    """How `tl.dot` multiplies float32: exactly, unless the user allows TF32 for torch's own matrix products.

    Asked so, torch knows whichever of its two ways the user took; the older question is an error after the newer way.
    """
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" and has_tf32() else "ieee"


@cache
def multiprocessors(device: torch.device) -> int:
    """How many a GPU has."""
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def has_tf32() -> bool:
    """Whether Triton multiplies in TF32 on this GPU: of AMD's on gfx942 alone."""
    return torch.version.hip is None or "gfx942" in torch.cuda.get_device_properties().gcnArchName


def power_of_two(n: int) -> int:
    """The first that is not below n >= 1. (Called on the host, triton.next_power_of_2 takes many times as long.)"""
    return 1 << (n - 1).bit_length()
