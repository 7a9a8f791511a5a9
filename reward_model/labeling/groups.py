"""Sampled rollouts by prompt, and labeled prompts parted into those to train on and those kept for testing.

No prompt is on both sides: a reward model tested on a prompt that it was trained on looks better than it is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from reward_model.labeling.agreement import ranks_from_wins, wins_matrix
from rlhf.errors import DataError, JudgeError
from rlhf.types import Prompt, Ranking, Rollout


@dataclass
class LabelResult:
    """What labeling yields, before anything is written: `readme` says who judged, `summary` the headline numbers.

    `unfinished`, to be raised once all is written: labels are missing that a further run can make.
    """

    train: list[Ranking]
    heldout: list[Ranking]
    judgments: list[dict[str, Any]]
    report: dict[str, Any]
    readme: str
    summary: dict[str, Any]
    unfinished: JudgeError | None = None


@dataclass
class Group:
    """The distinct responses to one prompt; `duplicates` counts those dropped."""

    prompt: Prompt
    prompt_id: str
    rollouts: list[Rollout] = field(default_factory=list)
    duplicates: int = 0

    def ranking(
        self,
        posteriors: Mapping[tuple[int, int], float],
        meta: dict[str, Any],
        gold_scores: list[float] | None = None,
    ) -> Ranking:
        """The responses with their wins and ranks, by P(i is better) of the pairs (i, j) of them, i < j."""
        wins = wins_matrix(posteriors, len(self.rollouts))
        return Ranking(
            prompt=self.prompt,
            responses=[rollout.response for rollout in self.rollouts],
            ranks=ranks_from_wins(wins),
            wins=wins,
            tokens=[rollout.tokens for rollout in self.rollouts],
            gold_scores=gold_scores,
            prompt_id=self.prompt_id,
            meta=meta,
        )


def group_rollouts(rollouts: Sequence[Rollout], heldout_rollouts: Sequence[Rollout] = ()) -> list[Group]:
    """Rollouts by prompt, in order of appearance. Of identical texts to one prompt, the first is kept.

    Raises:
        DataError: a prompt has a single response or is on both sides, or an id stands for two prompts.
    """
    if both := {r.prompt_id for r in heldout_rollouts} & {r.prompt_id for r in rollouts}:
        raise DataError(
            f"{len(both)} prompts are in rollouts and in heldout_rollouts, {min(both)!r} for one",
            fix="sample held-out prompts that are not in the training prompts",
        )
    groups: dict[str, Group] = {}
    for rollout in [*rollouts, *heldout_rollouts]:
        group = groups.setdefault(rollout.prompt_id, Group(rollout.prompt, rollout.prompt_id))
        if group.prompt != rollout.prompt:
            raise DataError(
                f"prompt_id {rollout.prompt_id!r} stands for two different prompts",
                fix="sample all rollouts of this file in one run",
            )
        if any(rollout.response == kept.response for kept in group.rollouts):
            group.duplicates += 1
        else:
            group.rollouts.append(rollout)
    for group in groups.values():
        if len(group.rollouts) + group.duplicates < 2:
            raise DataError(
                f"prompt {group.prompt_id!r} has a single response; a preference needs two",
                fix="sample with completions_per_prompt of 2 or more",
            )
    return list(groups.values())


def comparable(everyone: Sequence[Group]) -> list[Group]:
    """The prompts with two different responses or more.

    Raises:
        DataError: there is none.
    """
    groups = [group for group in everyone if len(group.rollouts) >= 2]
    if not groups:
        raise DataError(
            f"none of {len(everyone)} prompts has two different responses: there is nothing to compare",
            fix="sample with completions_per_prompt of 2 or more and a higher temperature",
        )
    return groups


def split(
    rankings: Sequence[Ranking], heldout_rollouts: Sequence[Rollout], heldout_fraction: float, seed: int
) -> tuple[list[Ranking], list[Ranking]]:
    """(train, held-out): held out are the prompts of `heldout_rollouts`, else a share."""
    if heldout_rollouts:
        return split_off(rankings, {rollout.prompt_id for rollout in heldout_rollouts})
    return split_by_prompt(rankings, heldout_fraction, seed)


def split_by_prompt(
    rankings: Sequence[Ranking], heldout_fraction: float, seed: int
) -> tuple[list[Ranking], list[Ranking]]:
    """Train and held-out rankings, each in the given order; no prompt is in both.

    Prompts are sorted by a hash of (seed, prompt_id) and the first round(fraction * n) are held out: the
    share is exact, the order of the input plays no part. With a fraction above 0, of two prompts or more at
    least one is held out, and at least one is always left to train on.
    """
    ids = {ranking.prompt_id for ranking in rankings}
    order = sorted(ids, key=lambda prompt_id: hashlib.sha256(f"{seed}/{prompt_id}".encode()).digest())
    n = round(heldout_fraction * len(order))
    if heldout_fraction > 0:
        n = min(max(n, 1), len(order) - 1)
    return split_off(rankings, set(order[:n]))


def split_off(rankings: Sequence[Ranking], held_ids: set[str]) -> tuple[list[Ranking], list[Ranking]]:
    """(train, held-out), each in the given order."""
    train = [ranking for ranking in rankings if ranking.prompt_id not in held_ids]
    return train, [ranking for ranking in rankings if ranking.prompt_id in held_ids]
