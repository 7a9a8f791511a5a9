"""`reward_report.html`: what held-out labels say of a reward model, on one page without script or external file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from rlhf.eval import charts
from rlhf.eval.pages import clean
from rlhf.eval.panels import DASH, show_fixed, show_number, show_percent
from rlhf.eval.report import template_environment

Report = Mapping[str, Any]


def render_reward_page(title: str, report: Report) -> str:
    """The page as HTML.

    Args:
        report: what `reward_report.json` holds.
    """
    page = (
        template_environment()
        .get_template("reward_report.html.j2")
        .render(
            title=title,
            verdict=verdict(report),
            numbers=numbers(report),
            sections=[section for section in (_trust(report), _length(report), _picking(report)) if section["figures"]],
            size=f"{report['responses']:,} responses to {report['prompts']:,} prompts",
        )
    )
    return clean(page)


def verdict(report: Report) -> dict[str, str]:
    """What came out: `tone` (good, even, bad, none), a headline and one sentence with its numbers."""
    found = report.get("accuracy")
    if found is None:
        return {"tone": "none", "headline": "Ratings, no two of one prompt.", "sentence": "No pair can be compared."}
    span = f"{100 * found['low']:.0f}{DASH}{show_percent(found['high'])}"
    sentence = f"{show_percent(found['value'])} of {found['pairs']:,} held-out pairs are in the labels' order [{span}]"
    if gold := report.get("gold_accuracy"):
        sentence += f", and {show_percent(gold['value'])} of {gold['pairs']:,} in that of the gold scores"
    if found["low"] > 0.5:
        return {"tone": "good", "headline": "Better than a coin.", "sentence": f"{sentence}."}
    if found["high"] < 0.5:
        return {"tone": "bad", "headline": "Worse than a coin.", "sentence": f"{sentence}."}
    return {"tone": "even", "headline": "Not told apart from a coin.", "sentence": f"{sentence}."}


def numbers(report: Report) -> list[dict[str, str]]:
    """The strip of headline numbers: name, value, what it means."""
    found = []

    def add(name: str, value: str, meaning: str) -> None:
        found.append({"name": name, "value": value, "meaning": meaning})

    if calibration := report.get("calibration"):
        add("Calibration error", show_percent(calibration["ece"]), "between confidence and accuracy; 0 is perfect")
        floor = show_number(calibration["entropy_floor"])
        add("Log-loss", show_number(calibration["log_loss"]), f"nats per pair; a coin 0.693, the labels' floor {floor}")
        add("Temperature", show_number(calibration["temperature"]), "that would calibrate; above 1: too sure of itself")
    length = report["length"]
    add("Score and length", show_fixed(length["correlation_within_prompts"], 2), "their correlation within prompts")
    if ratings := report.get("ratings"):
        guess = show_number(ratings["mse_of_a_constant"])
        add("Squared error", show_number(ratings["mse"]), f"of the rating; a constant guess {guess}")
        add("Rating and score", show_fixed(ratings["correlation"], 2), "their correlation")
    if ensemble := report.get("ensemble"):
        means = f"deviation over {report['members']} members, in units of the score"
        add("Disagreement", show_number(ensemble["disagreement"]), means)
    return found


def _section(title: str, lead: str, *figures: dict[str, Any]) -> dict[str, Any]:
    return {"title": title, "lead": lead, "figures": [figure for figure in figures if figure["svg"]]}


def _figure(title: str, svg: Markup, reading: str) -> dict[str, Any]:
    return {"title": title, "svg": svg, "reading": reading}


def _trust(report: Report) -> dict[str, Any]:
    bins = (report.get("calibration") or {}).get("reliability", [])
    points = [(b["confidence"], b["accuracy"]) for b in bins]
    curve = charts.point_chart(
        [charts.Series("accuracy", points)] if points else [], title="Reliability", x_unit="confidence", diagonal=True
    )
    by_disagreement = (report.get("ensemble") or {}).get("by_disagreement", [])
    return _section(
        "How far to trust it",
        "A calibrated model is right as often as it says it is.",
        _figure("Reliability", curve, "On the dashed line: calibrated. Below it: too sure of itself."),
        _figure(
            "Accuracy by confidence",
            _parts(report.get("by_confidence", []), ["unsure", "2nd", "3rd", "sure"]),
            "Quarters of the pairs by score difference. Rises, where the difference means something.",
        ),
        _figure(
            "Accuracy by disagreement",
            _parts(by_disagreement, ["agree", "2nd", "3rd", "differ"]),
            "Quarters of the pairs by the members' disagreement. Falls, where disagreement is worth a label.",
        ),
    )


def _length(report: Report) -> dict[str, Any]:
    length = report["length"]
    rows = [
        charts.Row(name, found["value"], found["low"], found["high"], tone)
        for tone, name in enumerate(("labels", "model"), start=1)
        if (found := length[f"longer_wins_in_{name}"])
    ]
    gaps = report.get("by_length_gap", [])
    return _section(
        "Does it follow length?",
        f"The correlation of score and length is {show_fixed(length['correlation'], 2)} over all responses and "
        f"{show_fixed(length['correlation_within_prompts'], 2)} within prompts.",
        _figure(
            "Share of pairs that the longer wins",
            charts.interval_chart(rows, title="Share that the longer wins", unit="share"),
            "Length bias of the model is what goes beyond that of the labels.",
        ),
        _figure(
            "Accuracy by length gap",
            _parts(gaps, [f"to {show_fixed(part['to'], 0)}" for part in gaps]),
            "Quarters of the pairs by tokens that the better one is longer. Low at the top: it misses short good ones.",
        ),
    )


def _picking(report: Report) -> dict[str, Any]:
    rows = report["best_of_n"]
    figures = []
    for tone, (key, name) in enumerate((("proxy", "Score"), ("gold", "Gold score")), start=1):
        points = [(row["kl"], row[key]["value"]) for row in rows if key in row]
        svg = charts.point_chart([charts.Series(name, points, tone)], title=f"{name} of the best of n", x_unit="nats")
        reading = "Of the pick, by its KL to the sampler. " + (
            "Rises by construction." if key == "proxy" else "Where it falls, the score is no longer worth following."
        )
        figures.append(_figure(f"{name} of the best of n", svg, reading))
    return _section("Best of n", f"Picking by score among n of the held-out responses, n up to {len(rows)}.", *figures)


def _parts(parts: Sequence[Mapping[str, Any]], labels: Sequence[str]) -> Markup:
    rows = [
        charts.Row(label, part["value"], part["low"], part["high"]) for label, part in zip(labels, parts, strict=False)
    ]
    return charts.interval_chart(rows, title="Accuracy", unit="share of pairs")
