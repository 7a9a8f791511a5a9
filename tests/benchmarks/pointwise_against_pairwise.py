"""Why not point-wise? Ratings from 1 to 7 against comparisons, both given by the same noisy annotators.

    python tests/benchmarks/pointwise_against_pairwise.py     about ten minutes

What an annotator feels about an answer is gold plus noise, anew at every look. Asked for a comparison, they name the
answer that feels better. Asked for a rating, they say what they feel on a scale of their own:

    rating = round(4 + offset + mood + 1.5 slope (gold + noise)), from 1 to 7

`mood` is where the scale stands today: drawn anew for every rating, 0 in all settings but one. A comparison shows two
answers in one mood, and asks of neither how good it is.

Two budgets: as many ratings as comparisons (a rating is one judgment), or twice as many (a comparison shows two
answers). `standardised` takes each annotator's mean and deviation out of their ratings first: a fair repair, where
one knows who rated. The world is that of `gold_world.py`; all models start from the same weights, take as many
optimizer steps, and see each answer they were given as often. Accuracy is against gold, on held-out pairs of answers.
"""

from __future__ import annotations

import argparse
import random
import shutil
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from gold_world import PROMPTS, World, build, differ, gold_of, over_seeds, rows_of
from harness import ROOT, Report, save
from torch import Tensor

from reward_model.data import RankedTokens
from reward_model.losses import bradley_terry, pointwise
from reward_model.train import forward
from rlhf.config_schema import OptimConfig
from rlhf.data.order import rows_for_step
from rlhf.models.tuning import build_optimizer, parameter_groups, set_lr
from rlhf.models.value import load_scalar_model
from rlhf.types import Rollout

JUDGMENTS, SAMPLES, STEPS, BATCH = 800, 2048, 120, 32


@dataclass(frozen=True)
class Annotators:
    """How many and how unlike: `noise` in deviations of gold, `offset` and `mood` in points, `slope` in log units."""

    count: int
    noise: float
    offset: float = 0.0
    slope: float = 0.0
    mood: float = 0.0


SETTINGS = {
    "one, precise": Annotators(1, noise=0.2),
    "one, noisy": Annotators(1, noise=1.0),
    "20 with one scale": Annotators(20, noise=0.5),
    "20 with scales of their own": Annotators(20, noise=0.5, offset=1.0, slope=0.4),
    "the same, noisy": Annotators(20, noise=1.0, offset=1.0, slope=0.4),
    "20 with very different scales": Annotators(20, noise=0.5, offset=2.0, slope=0.8),
    "20 whose scales also drift": Annotators(20, noise=0.5, offset=1.0, slope=0.4, mood=2.0),
}
SIDES = ("comparisons", "ratings", "ratings x 2", "ratings x 2, standardised")


class Crowd:
    """Annotators of one setting; every look draws its noise anew."""

    def __init__(self, kind: Annotators, seed: int) -> None:
        self._rng = random.Random(f"crowd/{seed}")
        self._kind = kind
        people = range(kind.count)
        self._offsets = [self._rng.gauss(0, kind.offset) for _ in people]
        self._slopes = [self._rng.lognormvariate(0, kind.slope) for _ in people]

    def anyone(self) -> int:
        """Who judges next."""
        return self._rng.randrange(self._kind.count)

    def feels(self, gold: float) -> float:
        """One look at an answer."""
        return gold + self._rng.gauss(0, self._kind.noise)

    def prefers_first(self, gold_a: float, gold_b: float) -> bool:
        """A comparison: nobody's scale plays a part in it."""
        return self.feels(gold_a) > self.feels(gold_b)

    def rating(self, who: int, gold: float) -> int:
        """1 to 7."""
        mood = self._rng.gauss(0, self._kind.mood)
        felt = 4 + self._offsets[who] + mood + 1.5 * self._slopes[who] * self.feels(gold)
        return min(7, max(1, round(felt)))


def standardised(ratings: Sequence[float], people: Sequence[int]) -> list[float]:
    """Each rating in deviations of its annotator from their own mean; of someone who always says the same, 0."""
    by_person = {who: [r for r, p in zip(ratings, people, strict=True) if p == who] for who in set(people)}
    means = {who: statistics.fmean(values) for who, values in by_person.items()}
    deviations = {who: statistics.pstdev(values) or 1.0 for who, values in by_person.items()}
    return [(r - means[who]) / deviations[who] for r, who in zip(ratings, people, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "pointwise_against_pairwise")
    args = parser.parse_args()
    found: dict[str, dict[str, list[float]]] = {name: {side: [] for side in SIDES} for name in SETTINGS}
    for seed in args.seeds:
        folder = args.out / f"seed-{seed}"
        shutil.rmtree(folder, ignore_errors=True)
        world = build(folder, seed, proxies=1)
        answers, heldout = world.sample(SAMPLES, seed=2), world.sample(1000, seed=3)
        for name, kind in SETTINGS.items():
            for side in SIDES:
                found[name][side].append(accuracy(world, answers, heldout, side=side, crowd=Crowd(kind, seed)))
            print(seed, name, {side: round(values[-1], 4) for side, values in found[name].items()}, flush=True)
    setting = {"judgments": JUDGMENTS, "steps": STEPS, "batch": BATCH, "seeds": args.seeds}
    figures = {n: {side: over_seeds(values) for side, values in sides.items()} for n, sides in found.items()}
    save("pointwise_against_pairwise", {**setting, "accuracy": figures, "runs": found}, [])
    print(table(figures))


def accuracy(world: World, answers: Sequence[Rollout], heldout: Sequence[Rollout], *, side: str, crowd: Crowd) -> float:
    """Share of held-out pairs in gold's order, after training on one side's labels."""
    rng = random.Random("which answers")  # the same for all sides
    if side == "comparisons":
        score = train_on(world, *compared(answers, crowd, rng))
    else:
        count = JUDGMENTS * (2 if "x 2" in side else 1)
        score = train_on(world, *rated(answers, crowd, rng, count, own_scales="standardised" in side))
    scores_B, gold_B = score(heldout), torch.tensor([gold_of(r) for r in heldout])
    right = (scores_B[::2] - scores_B[1::2]) * (gold_B[::2] - gold_B[1::2]) > 0
    return float(right.double().mean())


Loss = Callable[[Tensor, Sequence[int]], Tensor]


def compared(answers: Sequence[Rollout], crowd: Crowd, rng: random.Random) -> tuple[list[RankedTokens], Loss]:
    """Pairs with the preferred one first, and Bradley-Terry."""
    items = []
    while len(items) < JUDGMENTS:
        start = rng.randrange(PROMPTS) * SAMPLES
        a, b = (answers[start + i] for i in rng.sample(range(SAMPLES), 2))
        if differ(a, b):
            items.append(item((a, b) if crowd.prefers_first(gold_of(a), gold_of(b)) else (b, a)))
    return items, lambda scores_BK, _: bradley_terry(*scores_BK.unbind(1))


def rated(
    answers: Sequence[Rollout], crowd: Crowd, rng: random.Random, count: int, *, own_scales: bool
) -> tuple[list[RankedTokens], Loss]:
    """Single answers, and the squared error of their ratings in deviations, of all or of each annotator."""
    chosen = [answers[i] for i in rng.sample(range(len(answers)), count)]
    people = [crowd.anyone() for _ in chosen]
    ratings = [float(crowd.rating(who, gold_of(a))) for who, a in zip(people, chosen, strict=True)]
    targets = torch.tensor(standardised(ratings, people if own_scales else [0] * count))
    return [item((a,)) for a in chosen], lambda scores_BK, rows: pointwise(scores_BK.squeeze(1), targets[rows])


def item(answers: Sequence[Rollout]) -> RankedTokens:
    """As the trainer's forward pass takes it."""
    rows = rows_of(answers)
    return RankedTokens(rows, list(range(1, len(rows) + 1)), [], "", [len(r.response_tokens) for r in answers])


def train_on(world: World, items: Sequence[RankedTokens], loss: Loss) -> Callable[[Sequence[Rollout]], Tensor]:
    """The trained model's scores. A step takes 32 pairs, or 64 single answers: as many answers."""
    torch.manual_seed(0)
    scalar = load_scalar_model(str(world.folder / "proxy-0"), dtype=torch.float32, new_head=True).eval()
    cfg = OptimConfig(lr=1e-3)
    optimizer = build_optimizer(parameter_groups(scalar, lr=cfg.lr, weight_decay=0.0), cfg)
    size = 2 * BATCH // len(items[0].rows)
    for step in range(STEPS):
        set_lr(optimizer, cfg, step, STEPS)
        rows = rows_for_step(step, size, len(items), seed=0, rank=0, world_size=1)
        scores_BK, _ = forward(scalar, [items[i] for i in rows], world.runtime, share_prompts=False)
        optimizer.zero_grad()
        loss(scores_BK, rows).backward()
        torch.nn.utils.clip_grad_norm_(scalar.parameters(), cfg.max_grad_norm)
        optimizer.step()

    @torch.no_grad()
    def score(rollouts: Sequence[Rollout]) -> Tensor:
        parts = [rollouts[i : i + 256] for i in range(0, len(rollouts), 256)]
        return torch.cat(
            [forward(scalar, [item((r,)) for r in p], world.runtime, share_prompts=False)[0] for p in parts]
        )[:, 0]

    return score


def table(figures: Report) -> str:
    """In Markdown: accuracy with its 95% interval over the worlds."""
    lines = [f"| annotators | {' | '.join(SIDES)} |", "|---" * (len(SIDES) + 1) + "|"]
    for name, sides in figures.items():
        cells = [f"{mean:.3f} ({low:.3f} to {high:.3f})" for mean, low, high in (sides[side] for side in SIDES)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
