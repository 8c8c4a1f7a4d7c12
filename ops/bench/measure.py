"""Checks that peers agree, and times them in turn."""

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from .cases import Call, flops
from .contest import Contest, Peer, Tensors

MODES = ("forward", "forward+backward")
# allowed difference between results, relative to their norm: rounding of sums over a map, not of a single matmul
APART = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
APART_TF32 = APART[torch.float16]  # both round to 10 bits
TURN = 0.01  # seconds
CACHE = 2**30  # bytes that evict everything else from a GPU's cache
AHEAD = 0.004  # seconds for which the GPU is kept busy while a run is launched


@dataclass
class Row:
    """The measurements of one call in one mode.

    ms, mib    milliseconds and peak MiB of each peer, including its result
    missing    why a peer was not timed
    gb, gflop  what the call has to move and to compute, in 1e9 bytes and 1e9 operations
    """

    op: str
    call: str
    models: list[str]
    image: str
    batch: int
    dtype: str
    mode: str
    gb: float = 0.0
    gflop: float = 0.0
    ms: dict[str, float] = field(default_factory=dict)
    mib: dict[str, float] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    @property
    def best(self) -> str | None:
        """The fastest peer besides ours."""
        others = {name: ms for name, ms in self.ms.items() if name != "ours"}
        return min(others, key=others.__getitem__) if others else None


def leaves(inputs: Tensors, mode: str) -> Tensors:
    """The inputs as leaves of a graph, requiring gradients only in a mode with a backward (for FlexAttention)."""
    return {name: t.detach().requires_grad_(mode != "forward") for name, t in inputs.items()}


def results(out: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    return [out] if isinstance(out, Tensor) else list(out)


def step(run: Callable, inputs: Tensors, probes: list[Tensor] | None) -> list[Tensor]:
    """One run: its results and, if `probes` gives their gradients, the gradients of all inputs."""
    if probes is None:
        with torch.no_grad():
            return results(run(**inputs))
    out = results(run(**inputs))
    return out + list(torch.autograd.grad(out, list(inputs.values()), probes, materialize_grads=True))


def answer(peer: Peer, contest: Contest, mode: str) -> list[Tensor]:
    """The peer's answer on the op's own inputs, through its arrangement: results, and gradients of these inputs."""
    inputs = leaves(contest.inputs, mode)
    if peer.without_bias:
        inputs["bias"] = torch.zeros_like(contest.inputs["bias"])
    with torch.set_grad_enabled(mode != "forward"):
        out = results(peer.run(**peer.arrange(**inputs)))[: contest.results]
    if mode == "forward":
        return out
    learned = [t for t in inputs.values() if t.requires_grad]
    return out + list(torch.autograd.grad(out, learned, [probe(t) for t in out], materialize_grads=True))


def probe(like: Tensor) -> Tensor:
    """A gradient for a result, the same for the same shape."""
    generator = torch.Generator(like.device).manual_seed(like.numel())
    return torch.randn(like.shape, generator=generator, device=like.device, dtype=like.dtype)


def disagreement(got: list[Tensor], want: list[Tensor], dtype: torch.dtype) -> str | None:
    """How far two answers differ if by more than rounding; None if they agree."""
    errors = [
        float((a.detach().float() - b.detach().float()).norm() / b.detach().float().norm().clamp(min=1e-30))
        for a, b in zip(got, want, strict=True)
    ]
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    allowed = APART_TF32 if tf32 else APART[dtype]
    # written so that a NaN disagrees
    return None if max(errors) < allowed else f"disagrees: relative error {max(errors):.1e}"


def measure(
    call: Call,
    contest: Contest,
    row: Row,
    *,
    repeats: int,
    device: str,
    dtype: torch.dtype,
    asked: Callable[[str], bool],
) -> Row:
    """Fills `row`: peers that fail, or disagree with the first that runs, are missing; the others are timed."""
    wanted: dict[bool, list[Tensor]] = {}
    runs = {}
    for name, peer in contest.all_peers(device).items():
        if name == "ours" or asked(name):
            outcome = attempt(peer, contest, row.mode, dtype, wanted)
            if isinstance(outcome, str):
                row.missing[name] = outcome
            else:
                runs[name] = outcome
    forward, backward = flops(call, row.batch)
    row.gflop = (forward + backward * (row.mode != "forward")) / 1e9
    row.gb = traffic(contest, next(iter(wanted.values())), row.mode) / 1e9 if wanted else 0.0
    wanted.clear()  # freed before memory is measured
    if runs:
        row.ms, row.mib = timings(runs, repeats, device)
    return row


def attempt(
    peer: Peer, contest: Contest, mode: str, dtype: torch.dtype, wanted: dict[bool, list[Tensor]]
) -> Callable[[], list[Tensor]] | str:
    """A run of the peer, or why it cannot be timed. `wanted` keeps the expected answers, with and without the bias."""
    try:
        got = answer(peer, contest, mode)
        without_bias = peer.without_bias
        if without_bias not in wanted:
            wanted[without_bias] = answer(Peer(contest.op, without_bias=True), contest, mode) if without_bias else got
        reason = disagreement(got, wanted[without_bias], dtype)
        if reason is not None:
            return reason
        run = runner(peer, contest, mode)
        run()
        return run
    except Exception as error:  # a peer may fail in any way; the table says which and why
        return told(error)


def told(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"


def runner(peer: Peer, contest: Contest, mode: str) -> Callable[[], list[Tensor]]:
    """A run of the peer on inputs in its own arrangement."""
    with torch.no_grad():
        inputs = leaves(peer.arrange(**contest.inputs), mode)
    if mode == "forward":
        return partial(step, peer.run, inputs, None)
    return partial(step, peer.run, inputs, [probe(t) for t in results(peer.run(**inputs))])


def traffic(contest: Contest, answer: list[Tensor], mode: str) -> int:
    """The least traffic: inputs and results once; for gradients also inputs, and the gradients of both."""
    out = answer[: contest.results]
    given, made = (sum(t.numel() * t.element_size() for t in ts) for ts in (contest.inputs.values(), out))
    return given + made + (2 * given + made) * (mode != "forward")


def timings(runs: dict[str, Callable], repeats: int, device: str) -> tuple[dict[str, float], dict[str, float]]:
    """Median milliseconds of each run, measured in turn, and the peak MiB that it holds."""
    for _ in range(2):
        for run in runs.values():
            run()
    turns = on_gpu(runs, repeats) if device == "cuda" else on_cpu(runs, repeats)
    ms = {name: statistics.median(turn[name] for turn in turns) for name in runs}
    return ms, {name: held(run, device) for name, run in runs.items()}


def on_cpu(runs: dict[str, Callable], repeats: int) -> list[dict[str, float]]:
    """A turn repeats each run as often as the fastest fits into TURN. Every second turn goes backwards, so that no run
    always follows the same other one, which may have loaded their common inputs into the cache."""
    count = max(1, round(TURN / min(seconds(run) for run in runs.values())))
    turns = []
    for turn in range(repeats):
        order = list(runs)[:: -1 if turn % 2 else 1]
        turns.append({name: 1000 * seconds(runs[name], count) for name in order})
    return turns


def seconds(run: Callable, count: int = 1) -> float:
    """Seconds per run, over `count` runs."""
    start = time.perf_counter()
    for _ in range(count):
        kept = run()
    taken = time.perf_counter() - start
    del kept
    return taken / count


def on_gpu(runs: dict[str, Callable], repeats: int) -> list[dict[str, float]]:
    """Timed by events on the stream. Before each run more memory than the cache holds is overwritten, for long enough
    that all launches of the run are queued when it begins, so that CPU time is not included."""
    filler = torch.empty(CACHE, dtype=torch.int8, device="cuda")
    once = elapsed(lambda: [filler.zero_() for _ in range(10)]) / 10
    turns = []
    for _ in range(repeats):
        events = {}
        for name, run in runs.items():
            for _ in range(1 + round(1000 * AHEAD / once)):
                filler.zero_()
            events[name] = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            events[name][0].record()
            run()
            events[name][1].record()
        torch.cuda.synchronize()
        turns.append({name: start.elapsed_time(end) for name, (start, end) in events.items()})
    return turns


def elapsed(run: Callable) -> float:
    """Milliseconds of a run on the stream."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def held(run: Callable, device: str = "cpu") -> float:
    """The peak MiB that a run asks torch's allocator for beyond what was held before, including its results."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_stats()["requested_bytes.all.current"]
        kept = run()
        torch.cuda.synchronize()
        del kept
        return (torch.cuda.memory_stats()["requested_bytes.all.peak"] - before) / 2**20
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # otherwise the profiler logs each of its stages
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    del kept
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most / 2**20


@dataclass(frozen=True)
class Machine:
    """What the machine itself reaches in one dtype: bytes per second of a copy, operations per second of a matmul."""

    copy: float
    product: float


def machine(device: str, dtype: torch.dtype, repeats: int) -> Machine:
    """Measured on buffers that no cache holds, and on square matrices of size 2048 (8192 on a GPU)."""
    product, operations = large_product(device, dtype)
    source = torch.empty(2**30 if device == "cuda" else 2**27, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    ms, _ = timings({"copy": lambda: target.copy_(source), "product": product}, repeats, device)
    return Machine(2 * source.numel() / (ms["copy"] / 1000), operations / (ms["product"] / 1000))


def large_product(device: str, dtype: torch.dtype) -> tuple[Callable[[], Tensor], int]:
    """A matmul of square matrices of size 2048 (8192 on a GPU), and its number of operations."""
    side = 8192 if device == "cuda" else 2048
    a, b = torch.randn(2, side, side, device=device, dtype=dtype)
    return lambda: a @ b, 2 * side**3
