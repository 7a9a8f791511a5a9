"""The agreement report as one page: no script, nothing loaded, readable in light and dark."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf.eval.pages import clean, page_environment
from rlhf.eval.panels import DASH

_TEMPLATES = Path(__file__).resolve().parent / "templates"

COEFFICIENTS = {
    "pairs": {
        "raw": ("Raw agreement", "Of two answers to one pair, how often they choose the same. A coin reaches 50%."),
        "alpha_nominal": (
            "Krippendorff's alpha, side",
            "Corrected for chance: 1 agreement, 0 chance. Any number of gaps.",
        ),
        "alpha_ordinal": (
            "Krippendorff's alpha, strength",
            "The same of the seven points; near answers disagree less.",
        ),
        "fleiss_kappa": ("Fleiss' kappa", "Corrected for chance; of the items with the commonest number of answers."),
    },
    "rankings": {
        "kendall_tau": ("Kendall's tau", "Of two rankings of one item: 1 the same order, 0 unrelated, -1 reversed."),
        "kendall_w": ("Kendall's W", "Concordance of all rankings of one item: 1 the same, 0 none."),
    },
}
ANNOTATOR_COLUMNS = {
    "gold_accuracy": "gold right",
    "left_rate": "chose left",
    "self_consistency": "same when swapped",
    "agreement_with_others": "agrees with others",
    "dawid_skene_accuracy": "Dawid-Skene accuracy",
    "tie_share": "ties",
    "skip_share": "skipped",
    "flag_share": "flagged",
    "both_bad_share": "both bad",
    "too_fast_share": "too fast",
}
MODELS = {
    ("dawid_skene", "accuracy"): "Dawid-Skene, no prior",
    ("mace", "competence"): "MACE",
    ("noisy_bradley_terry", "skill"): "noisy Bradley-Terry",
}
MAX_ANNOTATOR_PAIRS = 60
SUSPICIOUS = 0.01
"""p-value of a left rate from which on it is pointed out."""

GOLD_EXPECTED = 0.75
"""A share of right gold answers whose whole interval lies below this is pointed out."""

WITH_INTERVAL = tuple(ANNOTATOR_COLUMNS)[:4]


def render(report: Mapping[str, Any], title: str) -> str:
    """The whole page.

    Args:
        report: of `reliability.agreement_report`, with `exported` and `left_out` of the export.
    """
    env = page_environment(_TEMPLATES)
    env.filters.update(share=_share, decimal=_decimal, seconds=_seconds)
    pairs = sorted(report["annotator_pairs"], key=lambda row: -row["raw"]["n"])
    page = env.get_template("agreement.html.j2").render(
        title=title,
        report=report,
        coefficients=COEFFICIENTS,
        columns=ANNOTATOR_COLUMNS,
        with_interval=WITH_INTERVAL,
        models=MODELS,
        annotator_pairs=pairs[:MAX_ANNOTATOR_PAIRS],
        pairs_left_out=max(0, len(pairs) - MAX_ANNOTATOR_PAIRS),
        remarks=remarks(report),
        dash=DASH,
    )
    return clean(page)


def remarks(report: Mapping[str, Any]) -> list[str]:
    """What a reader should look at first, in words."""
    found = []
    for name, record in report["annotators"].items():
        left, gold, fast = record["left_rate"], record["gold_accuracy"], record["too_fast_share"]
        if left["p_value"] is not None and left["p_value"] < SUSPICIOUS:
            found.append(
                f"{name} chooses the left side in {_share(left['value'])} of {left['n']} comparisons "
                f"(p = {left['p_value']:.1g}); the sides are counterbalanced, so this is a habit."
            )
        if gold["high"] is not None and gold["high"] < GOLD_EXPECTED:
            found.append(f"{name} answers {_share(gold['value'])} of {gold['n']} gold questions right.")
        if fast["low"] is not None and fast["low"] > 0.1:
            found.append(f"{name} answers {_share(fast['value'])} of the items faster than they can be read.")
    return found


def _share(value: float | None) -> str:
    return DASH if value is None else f"{value:.0%}" if value in (0.0, 1.0) else f"{value:.1%}"


def _decimal(value: float | None) -> str:
    return DASH if value is None else f"{value:.2f}".replace("-0.00", "0.00")


def _seconds(ms: float | None) -> str:
    return DASH if ms is None else f"{ms / 1000:.1f} s"
