"""What `ops.bench` writes: tables in Markdown, numbers in JSON, and a chart."""

import datetime
import json
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from ..tool import command, overwrite
from .measure import Machine, Row

ABOUT = """Every call of an op that a stage of these models makes, without the projections around it. `ours` is what
`auto` selects on this device. Cells show milliseconds (peak MiB). GB/s and TFLOP/s are those of ours, with their share
of a copy and of a matmul measured in the same run in brackets; they count the least possible traffic (inputs and
results once; for gradients also inputs, their gradients and those of the results) and the op's own matmuls. The last
column is our time divided by that of the fastest peer. A peer must agree in results and gradients before it is timed.

`torch compiled` is our PyTorch path, compiled. `products` is two matmuls with a softmax between them, for windows on
copies of all three maps. `sdpa`, `flex` (FlexAttention, compiled, with the bias in its score_mod) and `timm` (timm's
module without its projections) get windows as if the map had been partitioned before its projection, and copy one map
into windows and one back. `unfold`, `gather`, `gathered` and `softmax` follow the authors' code step by step.
"""


def circumstances(device: str, module: str) -> dict[str, str]:
    """Device, versions, date and command of this run of `module`; on a CPU also the load of the machine."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("timm", "torchvision", "triton", "natten"):
        if name in sys.modules:
            versions[name] = sys.modules[name].__version__
    cpu = f"{platform.machine()} CPU ({torch.backends.cpu.get_cpu_capability()}), {torch.get_num_threads()} threads"
    cpu += f", load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    return {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu,
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "command": command(module),
    }


def render(rows: Sequence[Row], facts: dict[str, str], machines: dict[str, Machine | None]) -> str:
    lines = ["# Ops", "", ABOUT, *(f"- {name}: {value}" for name, value in facts.items())]
    for dtype, machine in machines.items():
        if machine is None:
            lines.append(f"- {dtype}: copy and matmul were not timed")
            continue
        lines.append(f"- {dtype}: copy {machine.copy / 1e9:.1f} GB/s, matmul {machine.product / 1e12:.3g} TFLOP/s")
    for op in dict.fromkeys(row.op for row in rows):
        lines += ["", f"## {op}", "", table([row for row in rows if row.op == op], machines)]
    return "\n".join(lines) + "\n"


def table(rows: Sequence[Row], machines: dict[str, Machine | None]) -> str:
    """A Markdown table with a row per call and a column per peer; below it, which peers were not timed and why."""
    peers = list(dict.fromkeys(name for row in rows for name in row.ms if name != "ours"))
    head = ["call", "of", "image", "batch", "dtype", "mode", "ours", "GB/s", "TFLOP/s", *peers, "ours / best"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        cells = [row.call, ", ".join(row.models), row.image, str(row.batch), row.dtype, row.mode, cell(row, "ours")]
        cells += rates(row, machines[row.dtype])
        cells += [cell(row, name) for name in peers]
        cells.append(f"{row.ms['ours'] / row.ms[row.best]:.2f}" if row.best and "ours" in row.ms else "-")
        lines.append("| " + " | ".join(cells) + " |")
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for name, why in row.missing.items():
            reasons.setdefault((name, why), []).append(f"{row.call} {row.mode}")
    lines += [""] * bool(reasons)
    lines += [
        f"- {name}: not timed in {len(where)} (first {where[0]}): {why}" for (name, why), where in reasons.items()
    ]
    return "\n".join(lines)


def cell(row: Row, name: str) -> str:
    return f"{row.ms[name]:.3g} ({row.mib[name]:.0f})" if name in row.ms else "-"


def rates(row: Row, machine: Machine | None) -> list[str]:
    """GB/s and TFLOP/s of ours, with their share of what the machine reaches if that is known."""
    if "ours" not in row.ms:
        return ["-", "-"]
    seconds = row.ms["ours"] / 1000
    gb, tflop = row.gb / seconds, row.gflop / 1000 / seconds
    if machine is None:
        return [f"{gb:.3g}", f"{tflop:.3g}"]
    return [f"{gb:.3g} ({1e9 * gb / machine.copy:.0%})", f"{tflop:.3g} ({1e12 * tflop / machine.product:.0%})"]


def chart(path: Path, rows: Sequence[Row], device: str) -> None:
    """Plots the speedup of each call over its best peer: a dot per call, a line per op, a colour per mode.

    Next to calls in half precision, those in float32 are hollow circles.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    timed = [row for row in rows if row.best and "ours" in row.ms]
    ops = list(dict.fromkeys(row.op for row in timed))
    figure = Figure(figsize=(9, 1.2 + 0.6 * len(ops)), layout="constrained")
    axes = figure.subplots()
    dtypes = list(dict.fromkeys(row.dtype for row in timed))
    for shift, mode, colour in ((-0.14, "forward", "C0"), (0.14, "forward+backward", "C1")):
        for dtype in dtypes:
            some = [row for row in timed if (row.mode, row.dtype) == (mode, dtype)]
            dots = [(row.ms[row.best] / row.ms["ours"], ops.index(row.op) + shift) for row in some]
            if dots:
                hollow = len(dtypes) > 1 and dtype == "float32"
                label = f"{mode}, {dtype}" if len(dtypes) > 1 else mode
                face = "none" if hollow else colour
                axes.scatter(*zip(*dots, strict=True), label=label, alpha=0.6, s=24, facecolors=face, edgecolors=colour)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_yticks(range(len(ops)), ops)
    axes.invert_yaxis()
    axes.grid(alpha=0.3, which="both", axis="x")
    axes.set_xlabel(f"times faster than the best peer in the same run, {device}")
    if timed:
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=4, frameon=False)  # above, where no dot is
    FigureCanvasAgg(figure).print_png(path)


def write(stem: Path, rows: Sequence[Row], facts: dict[str, str], machines: dict[str, Machine | None]) -> None:
    """The table as <stem>.md and the numbers as <stem>.json."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    overwrite(stem.with_suffix(".md"), render(rows, facts, machines))
    overwrite(stem.with_suffix(".json"), numbers(rows, facts, machines))


def numbers(rows: Sequence[Row], facts: dict[str, str], machines: dict[str, Machine | None]) -> str:
    """JSON with one line per row."""
    rates = {dtype: machine and asdict(machine) for dtype, machine in machines.items()}
    head = json.dumps({**facts, "bytes_and_operations_a_second": rates}, indent=1).removesuffix("\n}")
    return head + ',\n "rows": [\n  ' + ",\n  ".join(json.dumps(asdict(row)) for row in rows) + "\n ]\n}\n"
