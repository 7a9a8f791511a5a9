"""K-way ranking against pairs: the same rankings of 4, read as rankings or taken apart into their 6 pairs.

    python tests/benchmarks/kway_against_pairs.py             about ten minutes

Equal labels: every side sees what the annotator said of the same answers, as often, in as many optimizer steps.
`rankings` reads a prompt's 4 answers in one packed row (Plackett-Luce, or Bradley-Terry over all pairs of the row);
`pairs` is `loss: bradley_terry` on the same file, 6 items per ranking. `pairs, small steps` has 6 times as many steps.
`disjoint pairs` asks less of the annotator: only 2 of the 6 comparisons, each answer in one. The world is that of
`gold_world.py`; an annotator ranks by gold plus Gumbel noise, which is Plackett-Luce.

Accuracy is against gold, on held-out pairs of answers; time is the CPU time of the training steps on one thread,
which neighbours on the machine do not change, the sides by turns.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

from gold_world import PROMPTS, World, build, gold_of, over_seeds, train_proxy, write_heldout
from harness import ROOT, Report, row, save

from reward_model import train
from rlhf.types import Rollout

K, RANKINGS, EPOCHS, STEP, SAMPLES, NOISE = 4, 600, 5, 16, 2048, 0.5
SIDES: dict[str, Report] = {
    "rankings, Plackett-Luce": {"loss": "plackett_luce", "batch_size": STEP},
    "rankings, all pairs": {"loss": "all_pairs", "batch_size": STEP},
    "pairs": {"loss": "bradley_terry", "batch_size": 6 * STEP},
    "pairs, small steps": {"loss": "bradley_terry", "batch_size": STEP},
    "disjoint pairs": {"loss": "bradley_terry", "batch_size": 2 * STEP},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "kway_against_pairs")
    args = parser.parse_args()
    found: dict[str, list[Report]] = {name: [] for name in SIDES}
    for seed in args.seeds:
        for name, report in one_world(args.out / f"seed-{seed}", seed).items():
            found[name].append(report)
            print(seed, name, report, flush=True)
    setting = {"k": K, "rankings": RANKINGS, "epochs": EPOCHS, "noise": NOISE, "seeds": args.seeds}
    figures = {name: summary(reports, found["pairs"]) for name, reports in found.items()}
    save("kway_against_pairs", {**setting, "sides": figures, "reports": found}, rows(figures))


def one_world(folder: Path, seed: int) -> dict[str, Report]:
    """Every side once, in the world of `seed`."""
    shutil.rmtree(folder, ignore_errors=True)
    world = build(folder, seed, proxies=1)
    write_heldout(world, world.sample(1000, seed=3))
    rankings = ranked(world.sample(SAMPLES, seed=2), RANKINGS, seed)
    return {name: one_side(world, name, rankings, seed) for name in SIDES}


def ranked(rollouts: Sequence[Rollout], count: int, seed: int) -> list[Report]:
    """`count` rankings of K different answers to one prompt, in the order of gold plus Gumbel noise."""
    rng = random.Random(f"rankings/{seed}")
    rankings = []
    while len(rankings) < count:
        start = rng.randrange(PROMPTS) * SAMPLES
        answers = [rollouts[start + i] for i in rng.sample(range(SAMPLES), K)]
        texts = [a.response for a in answers]
        if all(texts) and len(set(texts)) == K:
            felt = [gold_of(a) - NOISE * math.log(-math.log(rng.random())) for a in answers]
            ranks = [1 + sum(other > own for other in felt) for own in felt]
            rankings.append({"prompt": answers[0].prompt, "responses": texts, "ranks": ranks})
    return rankings


def taken_apart(ranking: Report) -> list[Report]:
    """The first two answers as a ranking, and the last two."""
    halves = [(ranking["responses"][i : i + 2], ranking["ranks"][i : i + 2]) for i in (0, 2)]
    return [
        {"prompt": ranking["prompt"], "responses": texts, "ranks": [1 + (a > b), 1 + (b > a)]}
        for texts, (a, b) in halves
    ]


def one_side(world: World, name: str, rankings: Sequence[Report], seed: int) -> Report:
    """Accuracy and CPU seconds of training."""
    rows = [half for r in rankings for half in taken_apart(r)] if name == "disjoint pairs" else rankings
    seconds: list[float] = []
    fit = train.fit

    def timed(*args: Any, **kwargs: Any) -> None:
        began = time.process_time()
        fit(*args, **kwargs)
        seconds.append(time.process_time() - began)

    with patch.object(train, "fit", timed):
        changes = {"optim": {"lr": 1e-3}, "epochs": EPOCHS, "seed": seed, "micro_batch_size": 192, **SIDES[name]}
        result = train_proxy(world, rows, start="proxy-0", name=name.replace(", ", "-"), **changes)
    lines = [json.loads(line) for line in (Path(result.run_dir) / "metrics.jsonl").read_text().splitlines()]
    figures = {key: result.summary[key] for key in ("accuracy", "accuracy_low", "accuracy_high", "pairs")}
    return {**figures, "cpu_s": seconds[0], "steps": len(lines)}


def summary(reports: Sequence[Report], pairs: Sequence[Report]) -> Report:
    """Over the worlds: mean accuracy and its lead over `pairs`, with 95% intervals; median time."""
    leads = [ours["accuracy"] - theirs["accuracy"] for ours, theirs in zip(reports, pairs, strict=True)]
    seconds = statistics.median(r["cpu_s"] for r in reports)
    accuracy = over_seeds([r["accuracy"] for r in reports])
    return {"accuracy": accuracy, "lead": over_seeds(leads), "cpu_s": round(seconds, 2)}


def rows(figures: dict[str, Report]) -> list[Report]:
    """Rankings beside pairs: held-out accuracy, and comparisons per second of CPU time."""
    pairs = figures["pairs"]
    table = []
    for name in list(SIDES)[:2]:
        speeds = [RANKINGS * 6 * EPOCHS / side["cpu_s"] for side in (figures[name], pairs)]
        table.append(row(f"{name}, speed", "comparisons/s", *speeds, group="labels"))
        accuracies = [side["accuracy"][0] for side in (figures[name], pairs)]
        table.append(row(f"{name}, held-out accuracy", "share", *accuracies, group="labels"))
    return table


if __name__ == "__main__":
    main()
