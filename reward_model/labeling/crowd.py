"""Models of the crowd: who is reliable, found out from the answers alone.

Dawid-Skene and MACE are crowd-kit's. Of its noisy Bradley-Terry model (1.4.2) only the likelihood is right: the
gradient of the annotators' parameters keeps the last judgment in place of their sum, and it starts one place too
early. The same model is fitted here with its true gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import expit, log_expit

from reward_model.labeling.aggregation import votes_of
from reward_model.labeling.records import Judgment
from reward_model.labeling.simulate import Judgment as Vote

MACE_RESTARTS, MACE_ITERATIONS = 5, 30
ITERATIONS = 200
PRECISION = 0.1
"""Of the prior of a score, 1 / 3.2^2: most merits are clear, so that who contradicts them is found to guess."""


@dataclass(frozen=True)
class NoisyBradleyTerry:
    """`scores` by (item, response), in logits; by annotator `skills`, the share of answers that follow the scores,
    and `lefts`, how often the other answers are "left"."""

    scores: dict[tuple[int, int], float]
    skills: dict[str, float]
    lefts: dict[str, float]


def crowd_models(judgments: Sequence[Judgment], *, seed: int) -> dict[str, Any]:
    """What each model says of each annotator, from all untied comparisons of two responses; ready for JSON.

    `dawid_skene`: the probability of naming the better response. `mace`: that of knowing and not guessing
    (Hovy et al. 2013). `noisy_bradley_terry`: that of following the responses' merits, with `left_when_guessing`.
    """
    votes = votes_of(judgments)
    if not votes:
        return {"note": "undefined (no untied comparison)"}
    if len({vote.annotator for vote in votes}) < 2:
        return {"note": "undefined (one annotator)"}
    fit = noisy_bradley_terry(votes)
    return {
        "comparisons": len(votes),
        "dawid_skene": {"accuracy": _dawid_skene_accuracy(votes)},
        "mace": {"competence": _mace_competence(votes, seed)},
        "noisy_bradley_terry": {"skill": fit.skills, "left_when_guessing": fit.lefts},
    }


def noisy_bradley_terry(votes: Sequence[Vote]) -> NoisyBradleyTerry:
    """Bradley-Terry with annotators who sometimes guess, by maximum a posteriori.

        P(left) = skill_a sigmoid(s_left - s_right) + (1 - skill_a) left_a

    The prior is normal, of the scores with the precision `PRECISION`, of the logits of skill (its mean 1: annotators
    mostly follow the merits) and of left with 1. It keeps finite what few comparisons of one response leave open.

    Source: Chen et al. 2013, Pairwise ranking aggregation in a crowdsourced setting, with a side in place of a flip.
    """
    from scipy.optimize import minimize

    responses = {key: n for n, key in enumerate(dict.fromkeys((v.item, r) for v in votes for r in (v.left, v.right)))}
    annotators = {name: n for n, name in enumerate(dict.fromkeys(v.annotator for v in votes))}
    R, A = len(responses), len(annotators)
    left_N = np.array([responses[v.item, v.left] for v in votes])
    right_N = np.array([responses[v.item, v.right] for v in votes])
    annotator_N = np.array([annotators[v.annotator] for v in votes])
    sign_N = np.array([1.0 if v.choice == "left" else -1.0 for v in votes])
    precision_X = np.where(np.arange(R + 2 * A) < R, PRECISION, 1.0)
    mean_X = np.concatenate([np.zeros(R), np.ones(A), np.zeros(A)])

    def objective(x_X: np.ndarray) -> tuple[float, np.ndarray]:
        gap_N = sign_N * (x_X[left_N] - x_X[right_N])
        skill_N, side_N = x_X[R + annotator_N], sign_N * x_X[R + A + annotator_N]
        merit_N = log_expit(skill_N) + log_expit(gap_N)
        log_p_N = np.logaddexp(merit_N, log_expit(-skill_N) + log_expit(side_N))
        by_merit_N = np.exp(merit_N - log_p_N)  # the probability that this answer followed the merits
        slope_N = sign_N * by_merit_N * expit(-gap_N)
        gradient_X = np.bincount(left_N, slope_N, len(x_X)) - np.bincount(right_N, slope_N, len(x_X))
        gradient_X += np.bincount(R + annotator_N, by_merit_N - expit(skill_N), len(x_X))
        gradient_X += np.bincount(R + A + annotator_N, sign_N * (1 - by_merit_N) * expit(-side_N), len(x_X))
        away_X = x_X - mean_X
        return float(0.5 * (precision_X * away_X**2).sum() - log_p_N.sum()), precision_X * away_X - gradient_X

    x_X = minimize(objective, mean_X, jac=True, method="L-BFGS-B", options={"maxiter": ITERATIONS}).x
    return NoisyBradleyTerry(
        scores=dict(zip(responses, x_X[:R].tolist(), strict=True)),
        skills=dict(zip(annotators, expit(x_X[R : R + A]).tolist(), strict=True)),
        lefts=dict(zip(annotators, expit(x_X[R + A :]).tolist(), strict=True)),
    )


def _table(votes: Sequence[Vote]) -> Any:
    """crowd-kit's columns: a task is a pair of responses, its label the lower-numbered one or the other."""
    import pandas as pd

    tasks = [f"{v.item}/{min(v.left, v.right)}/{max(v.left, v.right)}" for v in votes]
    labels = ["lower" if (v.choice == "left") == (v.left < v.right) else "higher" for v in votes]
    return pd.DataFrame({"task": tasks, "worker": [v.annotator for v in votes], "label": labels})


def _dawid_skene_accuracy(votes: Sequence[Vote]) -> dict[str, float]:
    from crowdkit.aggregation import DawidSkene

    fit: Any = DawidSkene(n_iter=100).fit(_table(votes))
    priors, errors = fit.priors_, fit.errors_
    accuracy = {}
    for name in dict.fromkeys(vote.annotator for vote in votes):
        # errors_[annotator, said][truth]; a label that nobody ever gave has no row or column
        right = {t: errors.at[(name, t), t] if (name, t) in errors.index else 0.0 for t in priors.index}
        accuracy[name] = float(sum(priors[truth] * right[truth] for truth in priors.index))
    return accuracy


def _mace_competence(votes: Sequence[Vote], seed: int) -> dict[str, float]:
    from crowdkit.aggregation import MACE

    fit: Any = MACE(n_restarts=MACE_RESTARTS, n_iter=MACE_ITERATIONS, random_state=seed).fit(_table(votes))
    shares = fit.spamming_[:, 1] / fit.spamming_.sum(1)
    return dict(zip(dict.fromkeys(vote.annotator for vote in votes), shares.tolist(), strict=True))
