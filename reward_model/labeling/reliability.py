"""How far annotators agree, and how far each of them can be trusted: `agreement_report`, ready for JSON.

What counts: the first look at an item (`presentation` 0) that decides something. Gold questions and swapped repeats
say something about an annotator, not about the items, and stay out of the coefficients. A judge looks in both orders at
once: what they say together is its answer, and one that follows the place says "neither". Of a pair, the side that was
chosen is one of three categories: response 0, response 1, neither (a tie, or both bad).

Where people have judged, the coefficients are theirs; judges and simulated annotators appear beside them in
`annotators` and `annotator_pairs`. `labels` names everybody whose answers are in the report.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from typing import Any

import numpy as np

from reward_model.labeling.aggregation import by_item, fit_dawid_skene, shares
from reward_model.labeling.agreement import ranks_from_wins
from reward_model.labeling.coefficients import (
    NO_OVERLAP,
    NOTHING,
    ONE_ANNOTATOR,
    Figure,
    alpha,
    bootstrap,
    cohen_kappa,
    fleiss_kappa,
    item_kendall_w,
    item_tau,
    mean_of_items,
    raw_agreement,
    share,
)
from reward_model.labeling.crowd import crowd_models
from reward_model.labeling.design import gold_is_right
from reward_model.labeling.records import STRONGEST, Answer, Item, Judgment

LABELS = {"person": "people", "judge": "a judge model", "simulated": "SIMULATED annotators"}
"""How files and pages call those who labeled."""

SIDES = 3
WORDS_PER_SECOND = 20
"""1,200 words a minute: who answers faster cannot have read the responses. Skilled readers reach 300."""


@dataclass
class _Pairs:
    """First looks at pairs: item, annotator, side (0, 1, 2 neither) and value (-3 .. 3, NaN without) of each."""

    items: int
    item_N: np.ndarray
    annotator_N: np.ndarray
    side_N: np.ndarray
    value_N: np.ndarray

    @property
    def sides_IC(self) -> np.ndarray:
        """Answers by item and side."""
        return _counts(self.item_N, self.side_N, self.items, SIDES)

    @property
    def values_IC(self) -> np.ndarray:
        """Answers by item and strength."""
        known_N = ~np.isnan(self.value_N)
        steps_N = self.value_N[known_N].astype(int) + STRONGEST
        return _counts(self.item_N[known_N], steps_N, self.items, 2 * STRONGEST + 1)


def agreement_report(
    items: Sequence[Item], judgments: Sequence[Judgment], *, seed: int, resamples: int = 0, models: bool = False
) -> dict[str, Any]:
    """Coefficients of agreement, and a record of every annotator. Fast without intervals and models.

    Every figure is {value, low, high, n, note}; an undefined one has value None, and `note` says why.

    Args:
        items: the queue; judgments of other items are not looked at.
        judgments: the effective ones, by anybody.
        seed: of the bootstrap.
        resamples: of the bootstrap over items; 0: the coefficients get no interval.
        models: fit `crowd.crowd_models` too, which takes seconds.
    """
    known = {item.key: item for item in items}
    judgments = [judgment for judgment in judgments if judgment.item_key in known]
    shown = [j for j in looks(judgments) if known[j.item_key].gold_ranks is None]
    first = one_each(shown)
    people = [j for j in first if j.labeler == "person"]
    chosen = people or first
    names = sorted({j.annotator for j in judgments})
    return {
        "labels": [LABELS[labeler] for labeler in LABELS if any(j.labeler == labeler for j in judgments)],
        "coefficients_of": "people" if people else "all",
        "counts": counts(items, judgments),
        "pairs": _pair_figures(chosen, seed, resamples),
        "rankings": _ranking_figures(chosen, seed, resamples),
        "annotator_pairs": _annotator_pairs(first, names),
        "annotators": annotator_records(known, judgments, shown),
        "models": crowd_models(shown, seed=seed) if models else {},
    }


def looks(judgments: Sequence[Judgment]) -> list[Judgment]:
    """The last deciding judgment of each annotator and item, as it was shown; of a judge, that of each order."""
    counted = (j for j in judgments if j.decides and (j.presentation == 0 or j.labeler == "judge"))
    return list({(j.annotator, j.item_key, j.presentation): j for j in counted}.values())


def one_each(shown: Sequence[Judgment]) -> list[Judgment]:
    """One judgment per annotator and item: a judge's orders as the one answer that the export makes of them."""
    own: dict[tuple[str, str], list[Judgment]] = defaultdict(list)
    for judgment in shown:
        own[judgment.annotator, judgment.item_key].append(judgment)
    return [orders[0] if len(orders) == 1 else _together(orders) for orders in own.values()]


def _together(orders: Sequence[Judgment]) -> Judgment:
    """Canonical ranks by majority; of a pair the mean strength, which is 0 for a tie alone."""
    ranks = order_of(ranks_from_wins(shares(orders)))
    values = [j.value for j in orders if j.value is not None]
    answer = Answer("rank", ranks=[1 + place for place in ranks])
    if len(values) == len(orders):
        answer = Answer("compare", value=(ranks[0] - ranks[1]) * max(1, round(abs(sum(values)) / len(values))))
    return replace(orders[0], order=list(range(len(ranks))), answer=answer, presentation=0)


def counts(items: Sequence[Item], judgments: Sequence[Judgment]) -> dict[str, int]:
    """What there is, as numbers of items and judgments."""
    gold = {item.key for item in items if item.gold_ranks is not None}
    deciding = [j for j in judgments if j.decides]
    return {
        "items": len(items) - len(gold),
        "gold_questions": len(gold),
        "items_judged": len({j.item_key for j in deciding} - gold),
        "judgments": len(judgments),
        "deciding": len(deciding),
        "on_gold": sum(j.item_key in gold for j in deciding),
        "repeats": sum(j.presentation > 0 for j in deciding),
        "ties": sum(_is_tie(j) for j in deciding),
        **{choice: sum(j.answer.choice == choice for j in judgments) for choice in ("both_bad", "skip", "flag")},
        "annotators": len({j.annotator for j in judgments}),
    }


def side(judgment: Judgment) -> int:
    """Of a pair: the response that was chosen, or 2 for neither."""
    ranks = judgment.ranks or [1, 1]
    return 2 if ranks[0] == ranks[1] else int(ranks[1] < ranks[0])


def _is_tie(judgment: Judgment) -> bool:
    return judgment.answer.choice != "both_bad" and len(set(judgment.ranks or [])) == 1


def _pairs(judgments: Sequence[Judgment]) -> _Pairs:
    pairs = [j for j in judgments if j.kind == "pair"]
    number = {key: n for n, key in enumerate(by_item(pairs))}
    annotators = {name: n for n, name in enumerate(dict.fromkeys(j.annotator for j in pairs))}
    values = [np.nan if j.value is None else j.value for j in pairs]
    return _Pairs(
        items=len(number),
        item_N=np.array([number[j.item_key] for j in pairs], dtype=int),
        annotator_N=np.array([annotators[j.annotator] for j in pairs], dtype=int),
        side_N=np.array([side(j) for j in pairs], dtype=int),
        value_N=np.array(values, dtype=float),
    )


def _counts(item_N: np.ndarray, category_N: np.ndarray, items: int, categories: int) -> np.ndarray:
    return np.bincount(item_N * categories + category_N, minlength=items * categories).reshape(items, categories)


def _pair_figures(judgments: Sequence[Judgment], seed: int, resamples: int) -> dict[str, Any]:
    pairs = _pairs(judgments)
    sides_IC, values_IC = pairs.sides_IC, pairs.values_IC
    annotators = len(set(pairs.annotator_N.tolist()))
    statistics = {
        "raw": lambda rows: raw_agreement(sides_IC[rows]),
        "alpha_nominal": lambda rows: alpha(sides_IC[rows], "nominal"),
        "alpha_ordinal": lambda rows: alpha(values_IC[rows], "ordinal"),
        "fleiss_kappa": lambda rows: fleiss_kappa(sides_IC[rows]),
    }
    if annotators < 2:
        note = ONE_ANNOTATOR if annotators else NOTHING
        return {name: Figure(None, note=note).json() for name in statistics}
    return {
        name: bootstrap(statistic, pairs.items, resamples=resamples, seed=seed).json()
        for name, statistic in statistics.items()
    }


def _ranking_figures(judgments: Sequence[Judgment], seed: int, resamples: int) -> dict[str, Any]:
    rankings = [j for j in judgments if j.kind == "ranking"]
    tables = [np.array([j.ranks for j in own]) for own in by_item(rankings).values() if len(own) > 1]
    figures = {}
    for name, of in (("kendall_tau", item_tau), ("kendall_w", item_kendall_w)):
        values_I = np.array([of(ranks_MK) for ranks_MK in tables])
        if len(values_I):
            statistic = partial(_mean_of_rows, values_I)
            mean = bootstrap(statistic, len(values_I), resamples=resamples, seed=seed)
        else:
            annotators = len({j.annotator for j in rankings})
            mean = Figure(None, note=(NOTHING, ONE_ANNOTATOR, NO_OVERLAP)[min(annotators, 2)])
        figures[name] = mean.json()
    return figures


def _mean_of_rows(values_I: np.ndarray, rows: np.ndarray) -> Figure:
    return mean_of_items(values_I[rows])


def _annotator_pairs(first: Sequence[Judgment], names: Sequence[str]) -> list[dict[str, Any]]:
    """Cohen's kappa and raw agreement of any two annotators with a pair in common."""
    sides: dict[str, dict[str, int]] = {name: {} for name in names}
    values: dict[str, dict[str, int]] = {name: {} for name in names}
    for judgment in first:
        if judgment.kind == "pair":
            sides[judgment.annotator][judgment.item_key] = side(judgment)
            if judgment.value is not None:
                values[judgment.annotator][judgment.item_key] = judgment.value + STRONGEST
    rows = []
    for a, b in combinations(names, 2):
        sides_CC = _confusion(sides[a], sides[b], SIDES)
        if not sides_CC.any():
            continue
        values_CC = _confusion(values[a], values[b], 2 * STRONGEST + 1)
        n = int(sides_CC.sum())
        rows.append(
            {
                "annotators": [a, b],
                "raw": Figure(float(np.trace(sides_CC)) / n, n=n).json(),
                "kappa": cohen_kappa(sides_CC).json(),
                "weighted_kappa": cohen_kappa(values_CC, "quadratic").json(),
            }
        )
    return rows


def _confusion(one: Mapping[str, int], other: Mapping[str, int], categories: int) -> np.ndarray:
    common = one.keys() & other.keys()
    cells = np.array([one[key] * categories + other[key] for key in common], dtype=int)
    return np.bincount(cells, minlength=categories**2).reshape(categories, categories)


# --- one annotator --------------------------------------------------------------------------------------------


def annotator_records(
    items: Mapping[str, Item], judgments: Sequence[Judgment], shown: Sequence[Judgment]
) -> dict[str, dict[str, Any]]:
    """By name, what each annotator's answers look like; see the keys of `_record`.

    Args:
        judgments: all effective ones.
        shown: those that count for agreement, as they were shown.
    """
    fit = fit_dawid_skene(shown)
    others = _agreement_with_others(one_each(shown))
    own: dict[str, list[Judgment]] = defaultdict(list)
    for judgment in judgments:
        own[judgment.annotator].append(judgment)
    words = {key: sum(len(response.text.split()) for response in item.responses) for key, item in items.items()}
    records = {}
    for name in sorted(own):
        confusion = fit.confusions.get(name) if fit else None
        accuracy = Figure(None, note="undefined (no untied comparison)")
        if confusion:
            accuracy = Figure((confusion[0][0] + confusion[1][1]) / 2, n=sum(j.annotator == name for j in shown))
        records[name] = {
            **_record(items, own[name], words),
            "agreement_with_others": share(*others.get(name, (0, 0)), "nobody else judged the same").json(),
            "dawid_skene_accuracy": accuracy.json(),
        }
    return records


def _record(items: Mapping[str, Item], own: Sequence[Judgment], words: Mapping[str, int]) -> dict[str, Any]:
    """`left_rate`: of the untied comparisons, with the p-value of 1/2 (binomial test); sides are counterbalanced."""
    deciding = [j for j in own if j.decides]
    gold = [(j.ranks, known) for j in deciding if (known := items[j.item_key].gold_ranks)]
    lefts = [j.answer.value < 0 for j in deciding if j.answer.choice == "compare" and j.answer.value]
    left = share(sum(lefts), len(lefts), "no untied comparison")
    repeats = _repeats(deciding)
    times = [j.answer.ms_active for j in own if j.answer.ms_active > 0 and j.decides]
    fast = [1000 * words[j.item_key] > j.answer.ms_active * WORDS_PER_SECOND for j in deciding if j.answer.ms_active]
    return {
        "labeler": own[0].labeler,
        "judgments": len(own),
        "deciding": len(deciding),
        "gold_accuracy": share(
            sum(gold_is_right(ranks or [], known) for ranks, known in gold), len(gold), "none asked"
        ).json(),
        "left_rate": left.json() | {"p_value": _p_value(sum(lefts), len(lefts))},
        "self_consistency": share(sum(repeats), len(repeats), "no swapped repeat").json(),
        "tie_share": share(sum(map(_is_tie, deciding)), len(own), "no judgments").json(),
        **{
            f"{choice}_share": share(sum(j.answer.choice == choice for j in own), len(own), "no judgments").json()
            for choice in ("both_bad", "skip", "flag")
        },
        "ms_median": float(np.median(times)) if times else None,
        "ms_p90": float(np.quantile(times, 0.9)) if times else None,
        "too_fast_share": share(sum(fast), len(fast), "no times").json(),
    }


def _p_value(successes: int, n: int) -> float | None:
    from scipy.stats import binomtest

    return float(binomtest(successes, n).pvalue) if n else None


def _repeats(deciding: Sequence[Judgment]) -> list[bool]:
    """For every item that came back: whether it was ranked the same."""
    first = {j.item_key: j.ranks for j in deciding if j.presentation == 0}
    return [
        order_of(first[j.item_key]) == order_of(j.ranks) for j in deciding if j.presentation and j.item_key in first
    ]


def order_of(ranks: Sequence[int] | None) -> list[int]:
    """Ranks counted without gaps: [1, 1, 3] and [1, 1, 2] say the same."""
    places = sorted(set(ranks or []))
    return [places.index(rank) for rank in ranks or []]


def _agreement_with_others(first: Sequence[Judgment]) -> dict[str, tuple[int, int]]:
    """(equal answers, answers by others) to the same items, by annotator; of rankings, the same order of all."""
    agreement: dict[str, tuple[int, int]] = {}
    for own in by_item(first).values():
        answers = [tuple(order_of(j.ranks)) for j in own]
        for judgment, answer in zip(own, answers, strict=True):
            equal, n = agreement.get(judgment.annotator, (0, 0))
            agreement[judgment.annotator] = (equal + answers.count(answer) - 1, n + len(answers) - 1)
    return agreement
