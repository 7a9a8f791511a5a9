"""Labels in rounds against the same number of labels at once: gold by KL, in the world of `gold_world.py`.

    python tests/benchmarks/online_rounds.py
    python tests/benchmarks/online_rounds.py --draw-only

Every arm gets as many labels and as many steps of PPO, by the same stages (`rlhf reward`, `rlhf ppo`):

    at once    all labels on answers of the reference policy, one reward model, PPO in one run
    rounds     as `rlhf pipeline` does with `rounds: 3`: labels on answers of the policy reached and the one before,
               the reward model trained anew on all labels so far, PPO goes on with policy and critic

and variants of the latter, for the decisions that `rlhf/stages/pipeline.py` states: `newest` labels answers of the
policy reached alone, `archive` those that PPO sampled in the last third of the round, `warm` goes on with the reward
model on the new labels. Gold's mean is 0 and its deviation 1 over the reference policy's answers.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import patch

import torch
from gold_world import (
    World,
    build,
    differ,
    noisy_label,
    over_seeds,
    train_policy,
    train_proxy,
    write_heldout,
)
from harness import RESULTS, ROOT, Report, save
from reward_curves import STYLE

from rlhf.eval.charts import Series, line_chart, smooth
from rlhf.models.load import load_causal_lm
from rlhf.types import Rollout

ARMS = ("at once", "rounds", "newest", "archive", "warm")
ROUNDS = 3
LAST_STEPS = 3
"""Of PPO, whose mean is where a round ends."""
PER_PROMPT = 1024
"""Answers of a policy, per prompt, out of which pairs are drawn."""
Curve = list[tuple[float, float]]
"""(KL to the reference, mean gold) of each step of PPO."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--labels", type=int, default=300, help="pairs, in all")
    parser.add_argument("--steps", type=int, default=60, help="of PPO, in all")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "online_rounds")
    parser.add_argument("--draw-only", action="store_true", help="compare and draw what is there, run nothing")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.draw_only:
        for seed in args.seeds:
            experiment(args.out, seed, args.arms, labels=args.labels, steps=args.steps)
    reports = [json.loads(file.read_text()) for file in sorted(args.out.glob("*.json"))]
    found = {arm: {r["seed"]: r for r in reports if r["arm"] == arm} for arm in ARMS}
    if not found["at once"]:
        parser.error(f"nothing to compare in {args.out}")
    compared = {arm: at_equal_kl(found[arm], found["at once"]) for arm in ARMS[1:] if found[arm]}
    save("online_rounds", {"at_equal_kl": compared, "runs": reports}, [])
    picture = RESULTS / "online_rounds.svg"
    picture.write_text(draw(found))
    print(json.dumps(compared, indent=1), picture, sep="\n")


def experiment(out: Path, seed: int, arms: Sequence[str], *, labels: int, steps: int) -> None:
    """Every arm in the world of `seed`, unless its file is there."""
    folder = out / f"seed-{seed}"
    missing = [arm for arm in arms if not file_of(out, arm, seed).is_file()]
    if not missing:
        return
    shutil.rmtree(folder, ignore_errors=True)
    world = build(folder, seed, proxies=1)
    write_heldout(world, world.sample(250, seed=3))
    for arm in missing:
        began = time.perf_counter()
        rounds = 1 if arm == "at once" else ROUNDS
        report = Arm(world, arm, seed).run(rounds, labels=labels // rounds, steps=steps // rounds)
        report |= {"seed": seed, "arm": arm, "labels": labels, "steps": steps}
        file_of(out, arm, seed).write_text(json.dumps(report))
        print(f"seed {seed}, {arm}: {time.perf_counter() - began:.0f} s, ends at {report['curve'][-1]}", flush=True)


def file_of(out: Path, arm: str, seed: int) -> Path:
    """What an arm came to."""
    return out / f"{arm.replace(' ', '-')}-{seed}.json"


class Arm:
    """One way to spend the labels, in one world."""

    def __init__(self, world: World, name: str, seed: int) -> None:
        self._world, self._name, self._seed = world, name, seed
        self._policies = [str(world.folder / "policy")]
        self._rows: list[dict[str, str]] = []
        self._proxy = "proxy-0"
        self._archive: list[Rollout] = []

    def run(self, rounds: int, *, labels: int, steps: int) -> Report:
        """Label, train the reward model, run PPO, `rounds` times; the curve goes through all of them."""
        report: Report = {"curve": [], "accuracy": []}
        for number in range(rounds):
            new = self._label(labels, number)
            self._rows += new
            name = f"{self._name.replace(' ', '-')}-{number}"
            trained = train_proxy(
                self._world,
                new if self._name == "warm" else self._rows,
                start=self._proxy,
                name=f"rm-{name}",
                epochs=10,
                seed=number,
                optim={"lr": 1e-3},
            )
            if self._name == "warm":
                self._proxy = f"rm-{name}/final"
            report["accuracy"].append(trained.summary["accuracy"])
            report["curve"] += self._ppo(trained.outputs["reward_model"], number, steps, name=f"ppo-{name}")
        return report

    def _label(self, count: int, number: int) -> list[dict[str, str]]:
        """Noisy labels of pairs of answers to one prompt each."""
        rng = random.Random(f"labels/{self._seed}/{number}")
        pools: dict[str, list[Rollout]] = {}
        for answer in self._answers(number):
            pools.setdefault(str(answer.prompt), []).append(answer)
        rows = []
        while len(rows) < count:
            a, b = rng.sample(pools[rng.choice(sorted(pools))], 2)
            if differ(a, b):
                rows.append(noisy_label(rng, a, b))
        return rows

    def _answers(self, number: int) -> list[Rollout]:
        """Out of which the round's pairs are drawn."""
        if number == 0:
            return self._world.sample(PER_PROMPT, seed=2)
        if self._name == "archive":
            return self._archive
        policies = self._policies[-1:] if self._name == "newest" else self._policies[-2:]
        found = []
        for policy in policies:
            lm = load_causal_lm(policy, dtype=torch.float32).eval()
            with patch.object(self._world, "policy", lm):
                found += self._world.sample(PER_PROMPT // 2, seed=100 + number)
        return found

    def _ppo(self, reward_model: str, number: int, steps: int, *, name: str) -> Curve:
        """`rlhf ppo` from where the round before ended; keeps the last third of its answers."""
        archive: list[list[Rollout]] = []
        proxy = self._world.load_proxy(reward_model)

        def reward(rollouts: Sequence[Rollout]) -> Sequence[float | None]:
            archive.append(list(rollouts))
            return proxy(rollouts)

        before = Path(self._policies[-1]).parent if number else None
        lines = train_policy(
            self._world,
            reward,
            name=name,
            model=self._policies[-1],
            reference=self._policies[0],
            critic=str(before / "critic") if before else None,
            seed=1_000 * self._seed + number,
            steps=steps,
            epochs=2,
            lr=4e-4,
            critic_lr=1.5e-3,
        )
        self._policies.append(str(self._world.folder / name / "final"))
        self._archive = [rollout for step in archive[-max(1, steps // 3) :] for rollout in step]
        return [(round(line["objective/kl"], 4), round(line["objective/gold"], 4)) for line in lines]


# --- what came of it ----------------------------------------------------------------------------------------------


def gold_at(curve: Curve, kl: float) -> float:
    """Gold where the curve has this KL, its steps in order of KL and smoothed, since a step is a mean over 128 answers
    only; beyond its largest or below its smallest KL, gold there."""
    points = sorted(tuple(point) for point in curve)
    kls, golds = [point[0] for point in points], smooth([point[1] for point in points])
    if not kls[0] < kl < kls[-1]:
        return golds[0] if kl <= kls[0] else golds[-1]
    right = next(i for i, value in enumerate(kls) if value >= kl)
    share = (kl - kls[right - 1]) / (kls[right] - kls[right - 1])
    return golds[right - 1] + share * (golds[right] - golds[right - 1])


def end_of(curve: Curve, number: int) -> tuple[float, float]:
    """(KL, gold) where a round ends: means over its last steps."""
    last = curve[: len(curve) * number // ROUNDS][-LAST_STEPS:]
    return statistics.fmean(point[0] for point in last), statistics.fmean(point[1] for point in last)


def at_equal_kl(ours: dict[int, Report], theirs: dict[int, Report]) -> list[Report]:
    """By round: gold where it ends, less that of `theirs` at the same KL; by seed, and the mean over them with
    Student's 95% interval."""
    rows = []
    seeds = sorted(ours.keys() & theirs.keys())
    for number in range(1, ROUNDS + 1):
        ends = [end_of(ours[seed]["curve"], number) for seed in seeds]
        differences = [gold - gold_at(theirs[seed]["curve"], kl) for seed, (kl, gold) in zip(seeds, ends, strict=True)]
        rows.append(
            {
                "round": number,
                "kl": [round(kl, 1) for kl, _ in ends],
                "gold": [round(gold, 2) for _, gold in ends],
                "differences": [round(difference, 2) for difference in differences],
                "mean_low_high": over_seeds(differences),
            }
        )
    return rows


def draw(found: dict[str, dict[int, Report]]) -> str:
    """Gold by KL, a line per seed: all labels at once, and in rounds."""
    series = [
        Series(arm, sorted(tuple(point) for point in report["curve"]), tone)
        for arm, tone in (("at once", 2), ("rounds", 1))
        for report in found[arm].values()
    ]
    chart = line_chart(series, title="gold score", unit="", x_unit="KL to the reference, nats per answer")
    labels = next(iter(found["at once"].values()))["labels"]
    words = (("at once", 2, f"all {labels} labels at once"), ("rounds", 1, f"{labels} labels in {ROUNDS} rounds"))
    legend = "".join(
        f'<text class="tone{tone}" x="44" y="{36 + 16 * i}">{text}</text>' for i, (_, tone, text) in enumerate(words)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 360 268" width="900">'
        f'<style>{STYLE}</style><rect width="100%" height="100%" fill="#ffffff"/>'
        f'<text class="title" x="44" y="18">Gold score by KL, as many labels and steps</text>{legend}'
        f'<svg y="60" height="196" width="360">{chart}</svg></svg>\n'
    )


if __name__ == "__main__":
    main()
