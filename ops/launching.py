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

from .dispatch import NARROW, interprets
from .recording import is_recording, write_down


@dataclass(frozen=True)
class Choices:
    """The configurations of a kernel, by the precision of its data."""

    half: tuple[triton.Config, ...]
    float32: tuple[triton.Config, ...]

    def of(self, values: Iterable[Any], constants: Mapping[str, Any]) -> tuple[triton.Config, ...]:
        """The configurations for these arguments; tensors may be given as dtypes.

        Drops those that cannot work: more than two stages for heads of more than 32 channels D, and in half precision
        more than one for more than 64 in windows that end beyond the map, EDGE, whose keys may be given (both for lack
        of shared memory); fewer than four warps for tiles of more than 64 keys BLOCK_N, or for tiles BLOCK_M of a
        region whose heads have more than 64 channels (registers); more than one stage for tiles of more than 64 keys
        with more than 64 channels, or 32 in a region (both); register limits with three matmuls in the place of one.
        """
        dtypes = [value.dtype if isinstance(value, Tensor) else value for value in values]
        found = self.half if torch.float16 in dtypes or torch.bfloat16 in dtypes else self.float32
        if found is self.float32 and constants.get("PRECISION") == "tf32x3":
            alone = (config for config in (*self.half, *self.float32, choice(8, 1)) if config.maxnreg is None)
            found = tuple({str(config): config for config in alone}.values())
        channels = constants.get("D", NARROW + 1)
        stages = 3 if channels <= NARROW else 2
        if channels > 2 * NARROW and constants.get("EDGE") and found is self.half:
            stages = 1
        regions, many = "BLOCK_M" in constants, constants.get("BLOCK_N", 0) > 64
        if many and channels > (NARROW if regions else 2 * NARROW):
            stages = 1
        warps = 4 if many or (regions and channels > 2 * NARROW) else 1
        return tuple(config for config in found if config.num_stages <= stages and config.num_warps >= warps)


def choice(warps: int, stages: int, registers: int | None = None) -> triton.Config:
    """A configuration; `registers` limits the registers of a thread, which only CUDA's compiler supports."""
    return triton.Config({}, num_warps=warps, num_stages=stages, maxnreg=None if torch.version.hip else registers)


# The first of each runs where nothing is measured; most were the fastest on an H200, in calls at 224 x 224.
# float32 matmuls are computed from registers, one element at a time, and need eight warps; without a limit the compiler
# would rather spill than use all available registers. In half precision, fewer registers let one more program share a
# multiprocessor; heads with many channels need eight warps.
FORWARD = Choices(half=(choice(4, 1), choice(4, 2, 128), choice(8, 1)), float32=(choice(8, 1, 128),))
# Where a limit is usually better: more is computed for each token that is read.
LIMITED = Choices(half=(choice(4, 2, 128), choice(4, 1), choice(8, 1), choice(4, 3)), float32=(choice(8, 1, 128),))
# Where a limit would leave too few registers: windows of several tiles.
TILES = Choices(half=(choice(4, 1), choice(4, 2), choice(8, 1)), float32=(choice(8, 1),))
# For programs that loop over windows, the next of which can be loaded ahead.
AHEAD = Choices(half=(choice(4, 3), choice(4, 2), choice(4, 2, 128), choice(8, 1)), float32=(choice(8, 2),))
# The same, where most registers hold values that were looked up once.
KEPT = Choices(half=(choice(4, 2),), float32=(choice(8, 2),))
# For backward passes with too many live matmuls for a second stage; a third program is worth some spilling.
BACKWARD = Choices(half=(choice(4, 1, 168), choice(4, 1), choice(8, 1)), float32=(choice(8, 1),))
# For backward passes that gain nothing from a third program.
EASY = Choices(half=(choice(4, 1), choice(4, 1, 168), choice(8, 1)), float32=(choice(8, 1),))
# Where a tile may have few tokens: then two warps are faster.
FEW = Choices(half=(choice(4, 1), choice(2, 2), choice(4, 2), choice(4, 3)), float32=(choice(8, 1, 128),))
# Where two warps are faster for many tokens too.
PAIR = Choices(half=(choice(2, 2), choice(4, 2), choice(4, 1), choice(4, 3)), float32=(choice(8, 1),))
# Where no other was faster.
PLAIN = Choices(half=(choice(4, 1),), float32=(choice(8, 1, 128),))
# For tiles with little computation.
SMALL = Choices(half=(choice(2, 2), choice(4, 1)), float32=(choice(4, 1),))
# FILLED: how many programs per multiprocessor make a launch worth measuring. CHANCE: the first configuration is kept if
# it takes at most this many times as long as the fastest. With few programs every configuration takes about as long as
# the launch itself: the choice would be random, and kept for large maps too.
FILLED, CHANCE = 3, 1.05


def unlimited(choices: Choices) -> Choices:
    """The same choices, but without a register limit for float32: for kernels whose registers mostly hold matmuls."""
    return Choices(choices.half, (choice(8, 1),))


_defined: list[Choices] = []  # of each kernel


def tuned(sizes: Sequence[str], choices: Choices) -> Callable[[Callable], Any]:
    """Decorator that makes a function a Triton kernel with a few configurations to choose from.

    The fastest configuration is measured once per set of constants and dtypes, independently of the map size, and kept
    on disk. The first launch that fills the GPU and leaves memory for it measures it; until then the first
    configuration runs.
    `sizes` names arguments that change with the map, and may name some that the kernel does not have. Binaries are not
    specialised to their values; otherwise a new map size might have to wait for a compiler. (Values in a tuple are
    specialised: tuples hold numbers that belong to the model, and strides of maps whose channels are a multiple of 16,
    which makes strides multiples too.) Blocks may still depend on sizes, rounded to a power of two: those of tokens
    that one program sorts, and of a region's pixels.
    """

    def decorate(function: Callable) -> Any:
        kernel = triton.jit(function, do_not_specialize=list(sizes))
        if interpreted():
            return kernel
        _defined.append(choices)
        constants = [parameter.name for parameter in kernel.params if parameter.is_constexpr]
        prune = {
            "early_config_prune": lambda configs, values, **constants: list(choices.of(values.values(), constants))
        }
        configs = list({str(config): config for config in choices.half + choices.float32}.values())
        options = {"prune_configs_by": prune, "do_bench": brief, "cache_results": True}
        tuner = triton.autotune(configs, key=constants, **options)(kernel)
        # looking up its own choice takes the tuner longer than a launch
        tuner.choices, tuner.chosen = choices, {}
        return tuner

    return decorate


def most(dtype: torch.dtype, how: str) -> int:
    """The most configurations that a kernel has for data of this dtype, with float32 multiplied as `how` says."""
    from . import operators  # noqa: F401  defines all kernels

    return max(len(choices.of([dtype], {"D": NARROW, "PRECISION": how})) for choices in _defined)


def brief(call: Callable[[], Any], quantiles: Sequence[float]) -> Any:
    """Milliseconds of a call, measured in a third of Triton's default time. Small differences may be misjudged."""
    return triton.testing.do_bench(call, warmup=10, rep=30, quantiles=quantiles)


_fixed: int | None = None  # the configuration that runs, if none is to be measured
_tuning = Lock()  # a tuner stores only its latest choice


@contextmanager
def configuration(place: int) -> Iterator[None]:
    """Context in which every kernel is launched in its configuration number `place`, or its last if it has fewer."""
    global _fixed
    before, _fixed = _fixed, place
    try:
        yield
    finally:
        _fixed = before


@cache
def interpreted() -> bool:
    """Whether kernels run on CPU tensors, slowly: the variable has to be set before kernels are imported."""
    return interprets()


def launch(kernel: Any, programs: int, *values: Any, **constants: Any) -> None:
    """Runs `programs` programs of a kernel on the device of its first argument, a tensor; strides are passed as tuples.

    Under torch.use_deterministic_algorithms this is always the first configuration, and nothing is measured.
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
    """Runs a kernel in the configuration that is set or that its tuner chose; the choice is cached for each key."""
    # deterministic mode: the fastest configuration may change from run to run, and with it the order of summation
    place = 0 if torch.are_deterministic_algorithms_enabled() else _fixed
    options = None
    if place is None:
        key = (values[0].device, *constants.values(), *[value.dtype for value in values if isinstance(value, Tensor)])
        options = kernel.chosen.get(key)
    if options is None:
        choices = kernel.choices.of(values, constants)
        measurable = place is None and len(choices) > 1 and programs >= FILLED * multiprocessors(values[0].device)
        # while a CUDA graph is captured, launches are recorded and cannot be timed
        if measurable and not torch.cuda.is_current_stream_capturing():
            with _tuning:
                kernel.configs_timings = {}  # of an earlier key: of one known from another device, nothing is measured
                try:
                    kernel[(programs,)](*values, **constants)
                    kernel.chosen[key] = preferred(kernel, choices[0]).all_kwargs()
                    return
                except torch.OutOfMemoryError:  # measuring takes 256 MiB: a later launch may have them, this one runs
                    kernel.nargs = None  # else the tuner would keep these tensors
        options = choices[min(place or 0, len(choices) - 1)].all_kwargs()
        if place is None and len(choices) == 1:  # a tuner with one configuration has no timings
            kernel.chosen[key] = options
    kernel.fn[(programs,)](*values, **constants, **options)


def preferred(tuner: Any, first: triton.Config) -> triton.Config:
    """The configuration that a tuner measured as fastest, or the first if it was measured too and is hardly slower."""
    best, times = tuner.best_config, tuner.configs_timings
    known = first in times and best in times
    return first if known and times[first][0] <= CHANCE * times[best][0] else best


@cache
def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors a GPU has."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n >= 1. (On the host triton.next_power_of_2 is many times slower.)"""
    return 1 << (n - 1).bit_length()
