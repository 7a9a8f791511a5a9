"""Over-optimisation as in Gao et al. 2022 (arXiv:2210.10760): gold against the square root of the KL, d = sqrt(KL).

    python tests/benchmarks/overoptimisation.py               about half an hour on two cores
    python tests/benchmarks/overoptimisation.py --draw-only

In the world of `gold_world.py` reward models are trained on 200, 800 and 3,200 noisy pairs (`rlhf reward`), and the
policy is optimised against them, by best-of-n and by PPO without a KL penalty (`rlhf ppo`). What it is optimised
against is one reward model, or four trained on the same pairs from different weights: their mean, their minimum, or
their mean less one, four or ten standard deviations (Coste et al. 2023, arXiv:2310.02743).

    best-of-n  R(d) = d (alpha - beta d)           KL = log n - (n - 1) / n
    PPO        R(d) = d (alpha - beta log d)       KL as measured in every step

R is gold's gain over the unoptimised policy, in deviations of gold over that policy's answers.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from gao_curves import Fit, Points, best_curve, fit, gain_at, peak_of, picture, ppo_points
from gold_world import (
    NOISE,
    PROMPTS,
    World,
    build,
    differ,
    noisy_label,
    rows_of,
    train_policy,
    train_proxy,
    write_heldout,
)
from harness import RESULTS, ROOT, Report, save
from torch import Tensor

from rlhf.types import Rollout

SIZES = {200: 10, 800: 5, 3200: 3}
"""Pairs -> epochs over them."""
MEMBERS = 4
SAMPLES, LARGEST_N = 4096, 1024
Panel = dict[str, tuple[Points, Fit]]

RULES: dict[str, Callable[[Tensor], Tensor]] = {
    "single": lambda scores_MB: scores_MB[0],
    "mean": lambda scores_MB: scores_MB.mean(0),
    "min": lambda scores_MB: scores_MB.amin(0),
    "mean - std": lambda scores_MB: scores_MB.mean(0) - scores_MB.std(0),
    "mean - 4 std": lambda scores_MB: scores_MB.mean(0) - 4 * scores_MB.std(0),
    "mean - 10 std": lambda scores_MB: scores_MB.mean(0) - 10 * scores_MB.std(0),
}


class Proxies:
    """Reward models trained on the same pairs; every one has mean 0 and deviation 1 over the policy's answers."""

    def __init__(self, world: World, folders: Sequence[str], reference: Sequence[Rollout]) -> None:
        self._members = [world.load_proxy(folder) for folder in folders]
        raw_MB = self.raw(reference)
        self._mean_M1, self._std_M1 = raw_MB.mean(1, keepdim=True), raw_MB.std(1, keepdim=True)

    def raw(self, rollouts: Sequence[Rollout]) -> Tensor:
        """Scores of every member, [M, B]."""
        return torch.tensor([member.score_tokens(rows_of(rollouts)) for member in self._members])

    def __call__(self, rollouts: Sequence[Rollout]) -> Tensor:
        """Scores of every member, [M, B], in one unit."""
        return (self.raw(rollouts) - self._mean_M1) / self._std_M1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=36, help="of PPO")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "overoptimisation")
    parser.add_argument("--draw-only", action="store_true", help="fit and draw what is there, run nothing")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.draw_only:
        for seed in args.seeds:
            file = args.out / f"seed-{seed}.json"
            if not file.is_file():
                file.write_text(json.dumps(experiment(args.out / f"seed-{seed}", seed, args.steps)))
    found = [json.loads(file.read_text()) for file in sorted(args.out.glob("seed-*.json"))]
    if not found:
        parser.error(f"no seed in {args.out} has finished")
    curves = all_curves(found)
    (RESULTS / "overoptimisation.svg").write_text(picture(curves))
    setting = {"pairs": SIZES, "members": MEMBERS, **NOISE, "seeds": [r["seed"] for r in found], "steps": args.steps}
    fits = {
        way: {n: {k: asdict(f) for k, (_, f) in p.items()} for n, p in sizes.items()} for way, sizes in curves.items()
    }
    save("overoptimisation", {**setting, "fits": fits, "runs": found}, [])
    print(tables(found))


# --- all seeds --------------------------------------------------------------------------------------------------


def best_of_n_curves(found: Sequence[Report], size: str) -> Panel:
    """Rule -> mean over the worlds, and its fit."""
    curves = {rule: best_curve([r["sizes"][size]["best_of_n"][rule] for r in found]) for rule in RULES}
    return {rule: (points, fit("bon", points)) for rule, points in curves.items()}


def ppo_curves(report: Report, size: str) -> Panel:
    """Rule -> every step in one world, and their fit. Worlds differ too much in gold's range for a common one."""
    curves = {}
    for rule in RULES:
        start = report["sizes"][size]["best_of_n"][rule][0][2]  # the best of one is the unoptimised policy
        points = ppo_points(report["sizes"][size]["ppo"][rule], start)
        curves[rule] = points, fit("rl", points)
    return curves


def all_curves(found: Sequence[Report]) -> dict[str, dict[str, Panel]]:
    """By way of optimising, and world, and by size."""
    curves = {"best of n": {size: best_of_n_curves(found, size) for size in map(str, SIZES)}}
    for report in found:
        name = f"PPO, world {report['seed']}"
        curves[name] = {size: ppo_curves(report, size) for size in map(str, SIZES)}
    return curves


def tables(found: Sequence[Report]) -> str:
    """Two tables in Markdown: best-of-n over all worlds; PPO in each, as mean (least to most)."""
    lines = ["| pairs | best of n by | alpha | beta | R^2 | gold at n = 1,024 |", "|---" * 6 + "|"]
    for size in map(str, SIZES):
        for rule, (points, f) in best_of_n_curves(found, size).items():
            lines.append(f"| {size} | {rule} | {f.alpha:.2f} | {f.beta:.3f} | {f.r2:.3f} | {points[-1][1]:.2f} |")
    columns = ("R^2", "d at the peak", "gold there", "gold at d = 2", "gold at d = 4", "gold at the end")
    lines += ["", f"| pairs | PPO against | {' | '.join(columns)} |", "|---" * 8 + "|"]
    for size in map(str, SIZES):
        panels = [ppo_curves(report, size) for report in found]
        for rule in RULES:
            runs = [panel[rule] for panel in panels]
            peaks = zip(*(peak_of(points) for points, _ in runs), strict=True)
            d, there, end = (list(column) for column in peaks)
            near, far = ([gain_at(points, x) for points, _ in runs] for x in (2, 4))
            cells = map(spread, ([f.r2 for _, f in runs], d, there, near, far, end))
            lines.append(f"| {size} | {rule} | {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(values: Sequence[float | None]) -> str:
    """mean (least to most) over the worlds that got there."""
    known = [value for value in values if value is not None]
    if not known:
        return "not reached"
    return f"{statistics.fmean(known):.2f} ({min(known):.2f} to {max(known):.2f})"


# --- one seed ---------------------------------------------------------------------------------------------------


def experiment(folder: Path, seed: int, steps: int) -> Report:
    """All that is measured in the world of `seed`."""
    shutil.rmtree(folder, ignore_errors=True)
    world = build(folder, seed, proxies=MEMBERS)
    reference = world.sample(SAMPLES, seed=2)
    heldout = world.sample(500, seed=3)
    write_heldout(world, heldout)
    report: Report = {"seed": seed, "sizes": {}}
    for size, epochs in SIZES.items():
        began = time.perf_counter()
        rows = labelled_pairs(reference, size, seed)
        trained = [
            train_proxy(
                world, rows, start=f"proxy-{m}", name=f"rm-{size}-{m}", epochs=epochs, seed=m, optim={"lr": 1e-3}
            )
            for m in range(MEMBERS)
        ]
        proxies = Proxies(world, [result.outputs["reward_model"] for result in trained], reference)
        scores_MB, gold_B = proxies(reference), torch.tensor([r.gold_score for r in reference])
        found: Report = {
            "pairs": len(rows),
            "accuracy": [result.summary["accuracy"] for result in trained],
            "best_of_n": {rule: best_of_n(combine(scores_MB), gold_B) for rule, combine in RULES.items()},
            "ppo": {},
        }
        for rule, combine in RULES.items():
            found["ppo"][rule] = run_ppo(world, proxies, combine, name=f"ppo-{size}-{rule}", seed=seed, steps=steps)
        report["sizes"][str(size)] = found
        print(f"seed {seed}, {size} pairs: {time.perf_counter() - began:.0f} s", flush=True)
    return report


def labelled_pairs(rollouts: Sequence[Rollout], count: int, seed: int) -> list[Report]:
    """Noisy labels of `count` pairs of answers to one prompt each; the first ones are the same for any `count`."""
    rng = random.Random(f"labels/{seed}")
    rows = []
    while len(rows) < count:
        start = rng.randrange(PROMPTS) * SAMPLES
        a, b = (rollouts[start + rng.randrange(SAMPLES)] for _ in range(2))
        if differ(a, b):
            rows.append(noisy_label(rng, a, b))
    return rows


def best_of_n(scores_B: Tensor, gold_B: Tensor) -> list[tuple[float, float, float]]:
    """(KL, mean proxy, mean gold) of the best of n = 1, 2, 4, ... answers to a prompt, over the prompts."""
    points = []
    for n in (2**i for i in range(LARGEST_N.bit_length())):
        parts = zip(scores_B.view(PROMPTS, -1), gold_B.view(PROMPTS, -1), strict=True)
        means = [expected_best(scores, gold, n) for scores, gold in parts]
        points.append((math.log(n) - (n - 1) / n, *(statistics.fmean(column) for column in zip(*means, strict=True))))
    return points


def expected_best(scores_N: Tensor, gold_N: Tensor, n: int) -> tuple[float, float]:
    """(proxy, gold) of the best by proxy of n drawn without replacement from N: exact, not one draw.

    The i-th smallest of N is the best of n with probability C(i - 1, n - 1) / C(N, n).
    Source: Nakano et al. 2021 (arXiv:2112.09332), appendix I; Gao et al. 2022.
    """
    order_N = scores_N.argsort()
    count = len(order_N)
    i_N = torch.arange(1, count + 1, dtype=torch.float64)
    total = torch.tensor([count, n], dtype=torch.float64)
    log_all = torch.lgamma(total[0] + 1) - torch.lgamma(total[1] + 1) - torch.lgamma(total[0] - n + 1)
    log_N = torch.lgamma(i_N) - torch.lgamma(total[1]) - torch.lgamma((i_N - n + 1).clamp(min=1)) - log_all
    weight_N = log_N.exp().masked_fill(i_N < n, 0.0)
    return float(weight_N @ scores_N[order_N].double()), float(weight_N @ gold_N[order_N].double())


def run_ppo(
    world: World, proxies: Proxies, combine: Callable[[Tensor], Tensor], *, name: str, seed: int, steps: int
) -> list[tuple[float, float, float]]:
    """(KL, mean proxy, mean gold) of every step of `rlhf ppo`, where the ensemble stands for the reward model."""

    def reward(rollouts: Sequence[Rollout]) -> list[float]:
        return combine(proxies(rollouts)).tolist()

    lines = train_policy(world, reward, name=name, seed=seed, steps=steps, epochs=1, lr=6e-4, critic_lr=2e-3)
    return [tuple(round(line[f"objective/{key}"], 4) for key in ("kl", "scores", "gold")) for line in lines]


if __name__ == "__main__":
    main()
