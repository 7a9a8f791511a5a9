"""Peak memory of PPO's four roles, ours and TRL 1.12's, each in a process of its own.

    make bench-memory

The most memory that the process held at any time (on a GPU: that its tensors held there). Where bench_ppo has been
run with the same setting on this commit, its reports are used; otherwise each side runs two steps.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from harness import RESULTS, Report, alternate, machine, median, row, save
from sides import SIDES, arguments, recorded, runners, setting


def main() -> None:
    args = arguments(__doc__, rounds=1)
    args.updates = 1  # the warm-up already holds everything
    reports = reusable(args) or alternate(runners(args), args.rounds)
    save(f"memory_E{args.epochs}", recorded(args, reports), rows(args, reports))


def reusable(args: argparse.Namespace, folder: Path = RESULTS) -> dict[str, list[Report]] | None:
    """The reports of bench_ppo if they speak of this commit, this setting and these sides."""
    file = folder / f"ppo_{args.prompts}_E{args.epochs}.json"
    if not file.is_file():
        return None
    record = json.loads(file.read_text())
    wanted = {k: v for k, v in setting(args).items() if k != "updates"}
    same = all(record["setting"].get(k) == v for k, v in wanted.items())
    reports = record["setting"]["reports"]
    commit = machine()["commit"]
    same = same and record["commit"] == commit and not commit.endswith("-dirty")
    return reports if same and {*args.sides} <= {*reports} else None


def rows(args: argparse.Namespace, reports: dict[str, list[Report]]) -> list[Report]:
    """Gigabytes of every side against TRL's."""
    key = "peak_gpu_gb" if reports["peer"][0].get("peak_gpu_gb") else "peak_rss_gb"
    theirs = median(reports["peer"], key)
    found = []
    for name in args.sides:
        measure, group = f"PPO, {SIDES[name].label}; peak memory", SIDES[name].group
        found.append(row(measure, "GB", median(reports[name], key), theirs, lower_is_better=True, group=group))
    return found


if __name__ == "__main__":
    main()
