"""PPO against TRL 1.12: same model, prompts, budget, epochs and dtype of the matrix products.

    make bench-ppo                                               full fine-tuning, equal prompts, two epochs
    python tests/benchmarks/bench_ppo.py --prompts ragged --epochs 4 --sides separate hydra

Both train policy and critic (135M each, bf16 products) with a frozen reference and reward model, 32 rollouts a step,
one optimizer step per epoch, and stop at EOS. Ours keeps float32 master weights, TRL trains bf16 weights. Answers
need not have the same length on both sides; tokens per second do not depend on it.
"""

from __future__ import annotations

import argparse

from harness import Report, alternate, median, row, save
from sides import SIDES, arguments, recorded, runners


def main() -> None:
    args = arguments(__doc__, rounds=2)
    reports = alternate(runners(args), args.rounds)
    save(f"ppo_{args.prompts}_E{args.epochs}", recorded(args, reports), rows(args, reports))


def rows(args: argparse.Namespace, reports: dict[str, list[Report]]) -> list[Report]:
    """Samples and tokens per second of every side against TRL's."""
    found = []
    for name in args.sides:
        side = SIDES[name]
        for key, unit in (("samples_per_s", "samples/s"), ("tokens_per_s", "tokens/s")):
            measure = f"PPO, {side.label}; {args.prompts} prompts, E = {args.epochs}"
            ours, theirs = (median(reports[who], key) for who in (name, "peer"))
            found.append(row(measure, unit, ours, theirs, group=side.group))
    return found


if __name__ == "__main__":
    main()
