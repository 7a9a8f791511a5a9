"""Metrics of a step that are taken over the answers of all ranks, against independent formulas."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from rlhf.rollout.buffer import RolloutBuffer
from rlhf.rollout.statistics import rollout_metrics
from rlhf.types import Rollout, StopReason

TEXTS = ["the sun is hot", "The sun is  hot", "rain", "the sky is blue and big"]
SCORES = [1.0, 2.5, -1.0, 0.5]


class Rank:
    """One rank's runtime: records what it sends, and adds what another rank sent."""

    def __init__(self, other: Rank | None = None) -> None:
        self.sent: list[Any] = []
        self._received = iter(other.sent if other else [])

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        self.sent.append(values)
        return values + next(self._received, torch.zeros(()))

    def gather_objects(self, values: list[Any]) -> list[Any]:
        self.sent.append(values)
        return [*values, *next(self._received, [])]


def rollouts(gold: Sequence[float | None] = (None, None, None, None)) -> list[Rollout]:
    made = []
    for text, score, gold_score in zip(TEXTS, SCORES, gold, strict=True):
        n = len(text.split())
        actions = [False, *[True] * n]
        row = Rollout("p", text, [1] * (n + 1), actions, [0.0] * (n + 1), StopReason.EOS)
        row.score, row.gold_score = score, gold_score
        made.append(row)
    return made


def metrics(rows: list[Rollout], runtime: Any) -> dict[str, float]:
    batch = RolloutBuffer(rows).batch()
    for name in ("logprobs_BT", "ref_logprobs_BT", "entropy_BT", "values_BT", "returns_BT"):
        setattr(batch, name, torch.zeros_like(batch.sampler_logprobs_BT))
    return rollout_metrics(batch, rows, runtime, kl_coef=0.1)


@pytest.mark.parametrize("cut", [1, 2, 4])
def test_correlation_and_diversity_are_those_of_all_ranks(cut: int) -> None:
    rows = rollouts([-1.0, -2.0, -3.0, 4.0])
    first = Rank()
    if rows[cut:]:
        metrics(rows[cut:], first)
    named = metrics(rows[:cut], Rank(first))
    assert named["response/score_length_corr"] == pytest.approx(np.corrcoef(SCORES, [4, 4, 1, 6])[0, 1])
    # of 15 words: the sun is hot rain sky blue and big
    assert named["response/distinct_1"] == pytest.approx(9 / 15)
    # of 3 + 3 + 0 + 5 pairs: three of the first answer, none of its copy, five of the last
    assert named["response/distinct_2"] == pytest.approx(8 / 11)
    assert named["response/duplicate_frac"] == 0.25, "case and spacing are equal"
    assert named["objective/gold"] == pytest.approx(-0.5)


def test_a_constant_has_no_correlation_and_no_gold_score_is_no_metric() -> None:
    rows = rollouts()
    for row in rows:
        row.score = 0.1
    named = metrics(rows, Rank())
    assert named["response/score_length_corr"] == 0.0
    assert "objective/gold" not in named
