"""What each phase of our PPO reaches of the products that this machine can do; by `rlhf ppo --profile`.

    make bench-flops
    ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 make bench-flops      as on a CPU without AMX; has a result file of its own

`peer` is no other tool here but the rate of the policy's own layers as plain products, measured when the run ends.
Where matrix units make products ten times as fast and memory stays as it is, the share of the whole falls.
"""

from __future__ import annotations

import argparse
import os
import statistics

from harness import Report, alternate, row, save
from sides import SIDES, arguments, recorded, runners


def main() -> None:
    args = arguments(__doc__, rounds=1)
    reports = alternate(runners(args, with_peer=False, profile=True), args.rounds)
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "").lower()
    name = f"flops_{args.prompts}_E{args.epochs}" + (f"_{limit}" if limit else "")
    save(name, recorded(args, reports), rows(args, reports))


def rows(args: argparse.Namespace, reports: dict[str, list[Report]]) -> list[Report]:
    """GFLOP/s of every phase against the layers' products."""
    found = []
    for name in args.sides:
        profiles = [report["profile"] for report in reports[name]]
        bound = statistics.median(p["gemm_flops_per_s"]["layer"] for p in profiles)
        for phase in ("generate", "score", "update", "step"):
            reached = statistics.median(r["flops_per_s"] for p in profiles for r in p["phases"] if r["phase"] == phase)
            measure = f"{phase}, {SIDES[name].label}; {args.prompts} prompts, E = {args.epochs}"
            found.append(row(measure, "GFLOP/s", reached / 1e9, bound / 1e9, group="machine"))
    return found


if __name__ == "__main__":
    main()
