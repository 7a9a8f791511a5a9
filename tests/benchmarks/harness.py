"""What all benchmarks share: sides run by turns in one session, medians, the result file and the table.

Two timings of one thing on a shared machine differ by tens of percent, so nothing is compared with a number from
another day: A B A B in one run, the median of each, and their ratio.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
BUILD = ROOT / "build" / "benchmarks"
RESULTS = HERE / "results"

Report = dict[str, Any]


def alternate(sides: Mapping[str, Callable[[], Report]], rounds: int) -> dict[str, list[Report]]:
    """Every side once per round, in turn; prints what each reports."""
    reports: dict[str, list[Report]] = {name: [] for name in sides}
    for round_ in range(rounds):
        for name, run in sides.items():
            report = run()
            reports[name].append(report)
            print(f"round {round_ + 1} {name}: {json.dumps(report)}", flush=True)
    return reports


def median(reports: Sequence[Report], key: str) -> float:
    """Median of one number over the rounds."""
    return statistics.median(report[key] for report in reports)


def python(script: str | Path, *args: object, path: str | Path | None = None) -> Report:
    """Run a script in a process of its own; its last line of output is its report.

    Raises:
        RuntimeError: it failed; with the end of its output.
    """
    env = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "WANDB_MODE": "disabled"}
    env["PYTHONPATH"] = os.pathsep.join(str(p) for p in (path, ROOT) if p)
    done = subprocess.run(
        [sys.executable, str(script), *map(str, args)], capture_output=True, text=True, env=env, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{script} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def peer(requirement: str) -> Path:
    """A package in a folder of its own, without its dependencies; installed on the first call."""
    folder = BUILD / "peers" / requirement.replace("==", "-")
    if not folder.exists():
        partial = folder.with_name(f".{folder.name}.{os.getpid()}")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(partial)]
        subprocess.run([*command, requirement], check=True)
        partial.rename(folder)
    return folder


def machine() -> Report:
    """Where and from which code the numbers come."""
    import torch

    commit = _git("describe", "--always", "--abbrev=12")
    # What the benchmarks write themselves does not count.
    changed = _git("status", "--porcelain", "--", ".", ":!tests/benchmarks/results", ":!tests/benchmarks/README.md")
    commit += "-dirty" if changed else ""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"commit": commit, "cores": os.cpu_count(), "cpu": _cpu_name(), "gpu": gpu, "torch": torch.__version__}


def _git(*args: str) -> str:
    return subprocess.run(["git", "-C", str(ROOT), *args], capture_output=True, text=True, check=False).stdout.strip()


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def save(name: str, setting: Report, rows: Sequence[Report]) -> None:
    """Write `results/<name>.json` and make the tables of README.md anew.

    A row has `measure`, `ours`, `peer`, `ratio` (above 1: ours is better) and `unit`.
    """
    RESULTS.mkdir(exist_ok=True)
    record = {"benchmark": name, **machine(), "setting": setting, "rows": list(rows)}
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    write_table()


def row(
    measure: str, unit: str, ours: float, theirs: float, *, lower_is_better: bool = False, group: str = "same"
) -> Report:
    """One line of a table; `group` says of which, see `GROUPS`."""
    ratio = theirs / ours if lower_is_better else ours / theirs
    return {
        "measure": measure,
        "unit": unit,
        "ours": float(f"{ours:.4g}"),
        "peer": float(f"{theirs:.4g}"),
        "ratio": round(ratio, 2),
        "group": group,
    }


TABLE_BEGIN, TABLE_END = "<!-- results -->", "<!-- end of results -->"


GROUPS = {
    "same": "Same algorithm, same architecture",
    "other": "Other architecture: fewer weights trained, so the reward curves belong beside these",
    "processes": "Both sides ours: ZeRO-2 (left) beside DDP (right)",
    "labels": "Reward models on the same labels: read as rankings (ours) beside pairs (peer)",
    "machine": "Against this machine: plain products with the policy's layers, what a phase could reach at most",
    "plan": "`rlhf plan` (ours) against the peak of the run itself (peer); a ratio of 1 is right",
}


def write_table(readme: Path = HERE / "README.md", results: Path = RESULTS) -> None:
    """The tables of README.md, one per group, from all result files."""
    lines: dict[str, list[str]] = {group: [] for group in GROUPS}
    for file in sorted(results.glob("*.json")):
        record = json.loads(file.read_text())
        for r in record["rows"]:
            numbers = [f"{r[key]:g}" for key in ("ours", "peer", "ratio")]
            cells = [record["benchmark"], r["measure"], r["unit"], *numbers, f"`{record['commit']}`"]
            lines[r.get("group", "same")].append(f"| {' | '.join(cells)} |")
    head = "| benchmark | measure | unit | ours | peer | ratio | commit |\n|---|---|---|---|---|---|---|"
    tables = [f"**{GROUPS[group]}**\n\n{head}\n" + "\n".join(found) for group, found in lines.items() if found]
    text = readme.read_text()
    before, after = text.split(TABLE_BEGIN)[0], text.split(TABLE_END)[1]
    readme.write_text(f"{before}{TABLE_BEGIN}\n" + "\n\n".join(tables) + f"\n{TABLE_END}{after}")
