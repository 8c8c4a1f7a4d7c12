"""How fast an op is beside its peers, with the same weights, in one run.

    python -m ops.bench window_attention --device cpu --threads 2 --out benchmarks


Before anything is timed all peers must agree, in the result and in the gradients. Timings alternate between the peers
and are medians, so that a busy moment of the machine hits all of them. OPS is the table: an op joins by one row.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from . import bench_peers, bench_tokens

MODES = ("forward", "forward+backward")


@dataclass(frozen=True)
class Op:
    """One row of the table: `cases` by name are the arguments of `peers`, which returns functions of `inputs`.

    A case that names no batch is run with the one of the command line.
    """

    cases: dict[str, dict]
    peers: Callable[..., tuple[Tensor, nn.Module, dict[str, Callable[[Tensor], Tensor]]]]
    about: str


OPS = {
    "window_attention": Op(
        cases={
            f"{partition} {size}x{size}x{dim} window 7": dict(size=size, dim=dim, window=7, grid=partition == "grid")
            for size, dim in ((56, 64), (28, 128), (14, 256), (7, 512))
            for partition in ("block", "grid")
        },
        peers=bench_peers.window_attention,
        about="qkv projection, attention with a bias table, output projection, as in MaxViT; head dim 32. `ours` is "
        "ops.window_attention; `timm` is timm's partition, AttentionCl and reverse; `sdpa` is "
        "scaled_dot_product_attention on materialised windows with the bias as a mask for every window; `flex` is "
        "the same with FlexAttention, compiled, the bias read by its score_mod.",
    ),
    "neighborhood_attention": Op(
        cases={
            f"{size}x{size}x{dim} window 7 dilation {dilation}": dict(size=size, dim=dim, window=7, dilation=dilation)
            for size, dim, dilation in (
                (56, 64, 1),
                (56, 64, 8),
                (28, 128, 1),
                (28, 128, 4),
                (14, 256, 1),
                (14, 256, 2),
                (7, 512, 1),
                (64, 64, 4),
            )
        },
        peers=bench_peers.neighborhood_attention,
        about="qkv projection, attention with a bias table, output projection, as in NAT and DiNAT; head dim 32. "
        "`ours` is ops.neighborhood_attention; `unfold` copies the 49 keys and values of every query; `natten` is the "
        "CPU kernels of NATTEN 0.17, the last that had any.",
    ),
    "super_token_attention": Op(
        cases={
            f"{H}x{W}x{C} cell {cell}": dict(shape=(H, W, C), cell=cell)
            for H, W, C, cell in ((56, 56, 64, 8), (28, 28, 128, 4), (150, 125, 64, 8), (75, 63, 128, 4))
        },
        peers=bench_tokens.super_token_attention,
        about="Pixels to super tokens, attention among these, and back, as in STViT; at 224 pixels and at 600 x 500. "
        "`ours` is ops.super_tokens and ops.scatter_super_tokens; `unfold` copies nine tokens for every cell, as the "
        "authors' code.",
    ),
    "token_reallocation": Op(
        cases={
            f"{H}x{W}x{C} runs {runs}": dict(shape=(H, W, C), runs=runs, shares=shares)
            for H, W, C, runs, shares in (
                (56, 56, 64, (196, 56, 28), (1, 2, 1)),
                (28, 28, 128, (49, 14, 7), (1, 2, 1)),
                (14, 14, 256, (2, 1), (1, 1)),
                (112, 112, 64, (196, 56, 28), (1, 2, 1)),
            )
        },
        peers=bench_tokens.token_reallocation,
        about="Tokens merged by the rank of a given map, and attention to them, as in SG-Former; the last case is that "
        "of 448 pixels. `ours` is ops.rank_tokens and ops.reallocate_tokens; `gather` sorts and gathers the whole map "
        "twice, as the authors' code.",
    ),
    "significance": Op(
        cases={
            f"{H}x{W}x{C} keys {H // side}x{W // side}": dict(shape=(H, W, C), reduction=side, window=7)
            for H, W, C, side in ((56, 56, 64, 8), (28, 28, 128, 4), (14, 14, 256, 2), (154, 126, 64, 8))
        },
        peers=bench_tokens.received,
        about="The attention that tokens receive, over a reduced map and in windows of 7, as in SG-Former; the last "
        "case is that of 616 x 504 pixels. `ours` is ops.significance; `softmax` holds the whole softmax.",
    ),
    "routed_attention": Op(
        cases={
            f"{height}x{width}x{dim} top {topk}{', one image' if batch else ''}": dict(
                size=(height, width), dim=dim, topk=topk, **batch
            )
            for sizes, batch in (
                (((56, 56), (28, 28), (14, 14)), {}),
                (((154, 126), (77, 63), (42, 35)), {"batch": 1}),
            )
            for (height, width), dim, topk in zip(sizes, (64, 128, 256), (1, 4, 16), strict=True)
        },
        peers=bench_peers.routed_attention,
        about="qkv projection, routing, attention, output projection, as in the stages of BiFormer-T with 7 x 7 "
        "regions: at 224 pixels, and for an image of 600 x 500, whose maps are filled up to whole regions; head dim "
        "32. `ours` is ops.routed_attention; `gathered` copies the chosen keys and values of every region, then "
        "multiplies, softmax, multiplies; `sdpa` is scaled_dot_product_attention on the same copies.",
    ),
}


@dataclass
class Row:
    """What one case in one mode measured: milliseconds, peak MiB, and why a peer is missing."""

    case: str
    mode: str
    ms: dict[str, float] = field(default_factory=dict)
    mib: dict[str, float] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)


def step(peer: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor, probe: Tensor, mode: str) -> list[Tensor]:
    """One run of a peer: its output and, in the mode that has a backward, the gradients of x and all parameters."""
    if mode == "forward":
        with torch.no_grad():
            return [peer(x)]
    x = x.detach().requires_grad_()
    out = peer(x)
    return [out, *torch.autograd.grad(out, [x, *module.parameters()], probe)]


def agree(got: list[Tensor], want: list[Tensor], dtype: torch.dtype) -> str | None:
    """Why two results differ by more than rounding; None where they agree."""
    limit = 1000 * torch.finfo(dtype).eps
    errors = [
        float((a.detach().double() - b.detach().double()).abs().max() / b.detach().abs().max().double())
        for a, b in zip(got, want, strict=True)
    ]
    return None if max(errors) < limit else f"disagrees: relative error {max(errors):.1e}, limit {limit:.1e}"


def measure(
    op: Op, case: str, mode: str, *, batch: int, repeats: int, device: str, dtype: torch.dtype, only: list[str] | None
) -> Row:
    """Checks that the peers agree, then times them in turn. Raises RuntimeError if `ours` cannot run."""
    torch.manual_seed(0)
    x, module, peers = op.peers(device=device, dtype=dtype, **{"batch": batch, **op.cases[case]})
    peers = {name: peer for name, peer in peers.items() if only is None or name in ("ours", *only)}
    probe = torch.randn_like(x)
    row, want = Row(case, mode), None
    for name, peer in list(peers.items()):
        try:
            got = step(peer, module, x, probe, mode)
            want = got if want is None else want
            reason = agree(got, want, dtype)
        except Exception as error:  # a peer may fail in any way; which and why belongs in the table
            reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        if reason is not None:
            row.missing[name] = reason
            del peers[name]
    if "ours" not in peers:
        raise RuntimeError(f"{case}, {mode}: ours cannot be timed, it {row.missing['ours']}")
    runs = {name: partial(step, peer, module, x, probe, mode) for name, peer in peers.items()}
    row.ms, row.mib = timings(runs, repeats, device)
    return row


def timings(runs: dict[str, Callable], repeats: int, device: str) -> tuple[dict[str, float], dict[str, float]]:
    """Median milliseconds of each, taken in turn, and the most MiB that one run holds."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    peak: dict[str, float] = {}
    for turn in range(repeats + 2):
        for name, run in runs.items():
            wait(device)
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            start = time.perf_counter()
            run()
            wait(device)
            if turn >= 2:  # the first two warm up
                seconds[name].append(time.perf_counter() - start)
            if device == "cuda":
                peak[name] = (torch.cuda.max_memory_allocated() - before) / 2**20
    if device == "cpu":
        peak = {name: held(run) for name, run in runs.items()}
    return {name: 1000 * statistics.median(times) for name, times in seconds.items()}, peak


def held(run: Callable) -> float:
    """The most MiB that a run holds at a time on the CPU, its results among them, of what torch's allocator gave it."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler would announce each of its stages
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    del kept
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most / 2**20


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def table(rows: list[Row]) -> str:
    """Markdown: ours in ms, and for each peer its ms and ours divided by it; what is in brackets is memory."""
    peers = sorted({name for row in rows for name in (*row.ms, *row.missing)} - {"ours"})
    memory = any(row.mib for row in rows)
    lines = ["| case | mode | ours, ms | " + " | ".join(f"{p}, ms | ours / {p}" for p in peers) + " |"]
    lines.append("|---|---|---|" + "---|---|" * len(peers))
    for row in rows:
        cells = [row.case, row.mode, mark(row, "ours", memory)]
        for p in peers:
            cells += [mark(row, p, memory), ratio(row, p, memory)] if p in row.ms else ["-", "-"]
        lines.append("| " + " | ".join(cells) + " |")
    reasons = {(p, row.mode, why) for row in rows for p, why in row.missing.items()}
    lines += [""] * bool(reasons) + [f"- {p}, {mode}: not timed, {why}" for p, mode, why in sorted(reasons)]
    return "\n".join(lines)


def mark(row: Row, name: str, memory: bool) -> str:
    return f"{row.ms[name]:.2f}" + (f" ({row.mib[name]:.0f} MiB)" if memory else "")


def ratio(row: Row, name: str, memory: bool) -> str:
    memory = memory and row.mib[name] > 0
    return f"{row.ms['ours'] / row.ms[name]:.2f}" + (f" ({row.mib['ours'] / row.mib[name]:.2f})" if memory else "")


def circumstances(args: argparse.Namespace, module: str = "ops.bench") -> dict[str, str]:
    """Device, versions, date and command of this run of `module`."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("timm", "triton"):
        if name in sys.modules:
            versions[name] = sys.modules[name].__version__
    cpu = f"{platform.machine()} CPU ({torch.backends.cpu.get_cpu_capability()}), {torch.get_num_threads()} threads"
    return {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if args.device == "cuda" else cpu,
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "settings": f"batch {args.batch}, {args.dtype}, medians of {args.repeats} alternating runs",
        "command": f"python -m {module} " + " ".join(sys.argv[1:]),
    }


def report(name: str, facts: dict[str, str], rows: list[Row]) -> str:
    lines = [f"# {name}", "", OPS[name].about, "", *(f"- {key}: {value}" for key, value in facts.items()), "", ""]
    return "\n".join(lines) + table(rows) + "\n"


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m ops.bench", description="An op beside its peers, in one run.")
    parser.add_argument("op", choices=list(OPS))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, help="CPU threads; default: as torch finds them")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--cases", default="", help="only cases whose name contains this")
    parser.add_argument("--peers", nargs="+", help="only these besides ours; default: all")
    parser.add_argument("--json", type=Path, help="a file for the numbers")
    parser.add_argument("--out", type=Path, help="a folder for <op>_<device>.md and .json")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    op, dtype = OPS[args.op], getattr(torch, args.dtype)
    names = [name for name in op.cases if args.cases in name]
    settings = dict(batch=args.batch, repeats=args.repeats, device=args.device, dtype=dtype, only=args.peers)
    rows = []
    for case in names:
        for mode in MODES:
            row = measure(op, case, mode, **settings)
            rows.append(row)
            print(f"{case}, {mode}: " + ", ".join(f"{n} {ms:.2f} ms" for n, ms in row.ms.items()), flush=True)
    facts = circumstances(args)
    text = report(args.op, facts, rows)
    print("\n" + text)
    numbers = json.dumps({"op": args.op, **facts, "rows": [asdict(row) for row in rows]}, indent=1) + "\n"
    if args.json is not None:
        args.json.write_text(numbers)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / f"{args.op}_{args.device}.md").write_text(text)
        (args.out / f"{args.op}_{args.device}.json").write_text(numbers)


if __name__ == "__main__":
    main()
