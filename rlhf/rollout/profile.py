"""`rlhf ppo --profile`: a trace of one step, and what each phase achieved of what this machine can do.

Two bounds are measured when the run ends, on the run's device and in its dtype: the rate of large square products,
and the rate of products with the model's own matrices and one micro-batch's tokens. A small model's matrices cannot
reach the first; the second is the fairer bound for it.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from rlhf.files import atomic_write
from rlhf.functional.flops import Shape
from rlhf.runs import peak_rss_gb
from rlhf.runtime import Runtime

TRACE, PROFILE = "trace.json.gz", "profile.json"


@dataclass(frozen=True)
class StepRecord:
    """One step: seconds per phase and in all; rows, tokens and model FLOPs of all ranks, FLOPs {} if uncounted."""

    step: int
    seconds: dict[str, float]
    total_s: float
    rows: int
    read_tokens: float
    action_tokens: float
    flops: dict[str, float]


@dataclass
class StepProfile:
    """Collects the steps of a run, traces one of them, and reports at the end.

    Attributes:
        traced_step: 0-based. Tracing slows its step down, so that step is left out of the numbers, as is the first,
            which warms up; a run too short for that reports what it has.
        micro_batch_size: rows of one forward of the update.
        micro_batch_tokens: its tokens, where they are limited.
        shape: of the policy; None where its work cannot be counted.
    """

    run_dir: Path
    runtime: Runtime
    traced_step: int
    micro_batch_size: int
    micro_batch_tokens: int | None
    shape: Shape | None
    records: list[StepRecord] = field(default_factory=list)

    @contextlib.contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Around one step. The one to be traced leaves trace.json.gz, in Chrome's format, of the main rank."""
        if step != self.traced_step or not self.runtime.is_main:
            yield
            return
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else its own notes stand between ours
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.runtime.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        with torch.profiler.profile(activities=activities) as trace:
            yield
        temporary = self.run_dir / f".{os.getpid()}.{TRACE}"  # its ending makes torch compress it
        trace.export_chrome_trace(str(temporary))
        os.replace(temporary, self.run_dir / TRACE)

    def report(self) -> dict[str, Any]:
        """Measure the bounds; writes and returns the content of profile.json. For the main rank, after the steps."""
        used = _steady(self.records, self.traced_step)
        length = statistics.median(r.read_tokens / r.rows for r in used)
        tokens = max(1, round(length * self.micro_batch_size))
        tokens = min(tokens, self.micro_batch_tokens or tokens)
        device, dtype = self.runtime.device, self.runtime.dtype
        layer = None if self.shape is None else layer_rate(self.shape, tokens, device, dtype)
        bounds = {"square": square_rate(device, dtype), "layer": layer}
        report = {
            "device": str(device),
            "precision": self.runtime.precision,
            "processes": self.runtime.world_size,
            "steps": [r.step + 1 for r in used],
            "traced_step": self.traced_step + 1,
            "gemm_flops_per_s": {**bounds, "layer_tokens": tokens},
            "peak_memory_gb": {"resident": peak_rss_gb(), "device": self.runtime.peak_device_memory_gb()},
            "phases": phase_rows(used, bounds, processes=self.runtime.world_size),
        }
        atomic_write(self.run_dir / PROFILE, json.dumps(report, indent=1))
        return report


def _steady(records: Sequence[StepRecord], traced_step: int) -> Sequence[StepRecord]:
    """Those whose times mean something, as far as there are any."""
    return [r for r in records[1:] if r.step != traced_step] or records[1:] or records


def phase_rows(
    records: Sequence[StepRecord], bounds: dict[str, float | None], *, processes: int = 1
) -> list[dict[str, Any]]:
    """One row per phase, then `rest` and `step`: medians over the steps.

    `tokens_per_s` are sampled tokens of the step over the phase's seconds. `flops` and what follows from it are None
    for the rest, which makes no products that are counted. Shares are of the bound x processes.
    """
    names = [*records[0].seconds, "rest", "step"]
    return [_phase_row(name, records, bounds, processes) for name in names]


def _phase_row(
    name: str, records: Sequence[StepRecord], bounds: dict[str, float | None], processes: int
) -> dict[str, Any]:
    seconds = statistics.median(_seconds(r, name) for r in records)
    row: dict[str, Any] = {
        "phase": name,
        "seconds": seconds,
        "tokens_per_s": statistics.median(r.action_tokens / max(_seconds(r, name), 1e-9) for r in records),
    }
    counted = [(_flops(r, name), _seconds(r, name)) for r in records]
    known = [(flops, s) for flops, s in counted if flops is not None]
    achieved = statistics.median(flops / s for flops, s in known) if known else None
    row["flops"] = statistics.median(flops for flops, _ in known) if known else None
    row["flops_per_s"] = achieved
    for bound, rate in bounds.items():
        row[f"share_of_{bound}"] = achieved / (rate * processes) if achieved and rate else None
    return row


def _seconds(record: StepRecord, name: str) -> float:
    if name == "step":
        return record.total_s
    return record.total_s - sum(record.seconds.values()) if name == "rest" else record.seconds[name]


def _flops(record: StepRecord, name: str) -> float | None:
    if not record.flops:
        return None
    return sum(record.flops.values()) if name == "step" else record.flops.get(name)


# --- what the machine can do --------------------------------------------------------------------------------


def square_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square product. A GPU needs larger ones before it is busy."""
    size = 2048 if device.type == "cpu" else 8192
    return 2 * size**3 / product_seconds(size, size, size, device, dtype)


def layer_rate(shape: Shape, tokens: int, device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of one layer's products with `tokens` rows, one after the other."""
    seconds = {(n, k): product_seconds(tokens, k, n, device, dtype) for n, k in set(shape.matrices)}
    work = sum(2 * tokens * n * k for n, k in shape.matrices)
    return work / sum(seconds[matrix] for matrix in shape.matrices)


def product_seconds(
    m: int, k: int, n: int, device: torch.device, dtype: torch.dtype, *, repeats: int = 5, least_s: float = 0.02
) -> float:
    """Median seconds of `[m, k] @ [k, n]`; each of the `repeats` measures as many products as fill `least_s`."""
    # Random, for a GPU multiplies zeros and ones faster than numbers.
    draw = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(rows, k, generator=draw, device=device, dtype=dtype) for rows in (m, n))
    linear = torch.nn.functional.linear

    def timed(count: int) -> float:
        _wait(device)
        began = time.perf_counter()
        for _ in range(count):
            linear(a, b)
        _wait(device)
        return (time.perf_counter() - began) / count

    with torch.no_grad():
        timed(2)
        count = max(1, round(least_s / max(timed(2), 1e-9)))
        return statistics.median(timed(count) for _ in range(repeats))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# --- the table ----------------------------------------------------------------------------------------------


def table(report: dict[str, Any]) -> Table:
    """profile.json for people."""
    bounds, memory = report["gemm_flops_per_s"], report["peak_memory_gb"]
    parts = [f"products of this size: {_giga(bounds['square'])} GFLOP/s square"]
    if bounds["layer"]:
        parts.append(f"{_giga(bounds['layer'])} with the policy's layers and {bounds['layer_tokens']} tokens")
    parts.append(f"peak memory {memory['resident']:.1f} GB")
    if memory["device"] is not None:
        parts.append(f"on the device {memory['device']:.1f} GB")
    shown = Table(title=f"profile, {report['precision']} on {report['device']}", caption=", ".join(parts))
    shown.add_column("phase")
    for column in ("s", "tokens/s", "GFLOP/s", "of square", "of layers"):
        shown.add_column(column, justify="right")
    for row in report["phases"]:
        shares = [_percent(row["share_of_square"]), _percent(row["share_of_layer"])]
        rate = _giga(row["flops_per_s"]) if row["flops_per_s"] else ""
        shown.add_row(row["phase"], f"{row['seconds']:.3g}", f"{row['tokens_per_s']:,.0f}", rate, *shares)
    return shown


def _giga(rate: float) -> str:
    return f"{rate / 1e9:,.3g}" if rate < 1e12 else f"{rate / 1e9:,.0f}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f}%"
