"""Each guard on histories made by hand: its alarm begins and ends exactly when it should."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from rlhf import config_ppo
from rlhf.config_schema import PPOStage
from rlhf.eval.guards import GUARDS, Guards, Limits, predicted_peak_kl
from rlhf.eval.notes import WORDS, Note
from rlhf.eval.trends import fit_overoptimization, overoptimization_peak, project, trend

LIMITS = Limits(kl_target=6.0)


def rows_of(**columns: Sequence[float | None]) -> list[dict[str, Any]]:
    """One row per step; `__` stands for the slash of a metric's name."""
    named = {name.replace("__", "/"): values for name, values in columns.items()}
    length = len(next(iter(named.values())))
    return [{"step": i + 1, **{name: values[i] for name, values in named.items()}} for i in range(length)]


def changes(guards: Guards, rows: Sequence[dict[str, Any]]) -> list[tuple[int, str, bool]]:
    """(step, guard, whether all is well) of every alarm that began or ended."""
    return [(row["step"], note.name, note.ok) for row in rows for note in guards.add(row)]


@pytest.mark.parametrize(
    ("name", "metric", "start", "edge", "bad"),
    [
        ("kl_high", "objective/kl", 1.0, 12.0, 12.01),
        ("kl_negative", "objective/kl", 1.0, -0.1, -0.11),
        ("distinct", "response/distinct_2", 0.5, 0.375, 0.37),
        ("duplicates", "response/duplicate_frac", 0.25, 0.5, 0.51),
        ("eos", "response/eos_frac", 1.0, 0.9, 0.89),
        ("length", "response/length_mean", 40.0, 60.0, 60.1),
        ("length", "response/length_mean", 60.0, 40.0, 39.9),
        ("length_reward", "response/score_length_corr", 0.0, 0.5, 0.51),
        ("length_reward", "response/score_length_corr", 0.0, -0.5, -0.51),
        ("disagreement", "objective/reward_std", 0.2, 0.4, 0.41),
        ("critic", "val/explained_var", 0.5, 0.0, -0.01),
        ("clip", "policy/clipfrac_avg", 0.1, 0.3, 0.31),
        ("sampler", "val/sampler_gap", 0.05, 0.1, 0.11),
    ],
)
def test_an_alarm_begins_with_the_third_bad_step_in_a_row_and_ends_with_the_third_good_one(
    name: str, metric: str, start: float, edge: float, bad: float
) -> None:
    values = [start] * 12 + [edge] * 3 + [bad, bad, start] + [bad] * 4 + [start, start, bad] + [start] * 3
    rows = [{"step": i, metric: value} for i, value in enumerate(values, 1)]
    guards = Guards(LIMITS)
    assert changes(guards, rows) == [(21, name, False), (28, name, True)]
    assert [(n.ok, n.since, n.earlier) for n in guards.notes() if n.name == name] == [(True, None, ((19, 25),))]
    during = Guards(LIMITS, rows[:21]).notes()
    assert [(n.name, n.since) for n in during if not n.ok] == [(name, 19)]
    assert during[0].name == name, "alarms stand first"


def test_an_alarm_that_is_on_keeps_the_numbers_that_speak_for_it() -> None:
    guards = Guards(LIMITS, rows_of(objective__kl=[18.0, 18.0, 18.0, 6.0]))
    (note, _) = guards.notes()
    assert note.measured == "KL is 3 times its target of 6 nats per answer"
    assert note.line == (
        "KL is 3 times its target of 6 nats per answer since step 1 - lower optim.lr, raise kl.coef, "
        "or shorten kl.horizon"
    )
    guards.add({"step": 5, "objective/kl": 6.0})
    guards.add({"step": 6, "objective/kl": 6.0})
    assert guards.notes()[0].sentence == (
        "KL is 1 times its target of 6 nats per answer. An alarm from step 1 to 3 is over."
    )


def test_what_was_not_recorded_is_not_judged() -> None:
    assert Guards(LIMITS, rows_of(episode=[1.0] * 30)).notes() == []
    assert "kl_high" not in {n.name for n in Guards(Limits(), rows_of(objective__kl=[99.0] * 9)).notes()}, "no target"
    gap = rows_of(response__eos_frac=[0.5, 0.5, None, math.nan, 0.5])
    assert changes(Guards(LIMITS), gap) == [(5, "eos", False)], "a gap neither adds nor interrupts"


def test_a_start_of_zero_is_no_measure() -> None:
    rows = rows_of(response__distinct_2=[0.0] * 9, response__length_mean=[0.0] * 9)
    assert Guards(LIMITS, rows).notes() == []


def test_the_critic_is_judged_after_its_warm_up_and_ten_steps() -> None:
    rows = rows_of(val__explained_var=[-1.0] * 20)
    assert changes(Guards(LIMITS), rows) == [(13, "critic", False)]
    assert changes(Guards(Limits(critic_warmup_steps=4)), rows) == [(17, "critic", False)]


def test_patience_and_ignore() -> None:
    rows = rows_of(response__eos_frac=[0.5] * 9, objective__kl=[-1.0] * 9)
    assert changes(Guards(Limits(patience=1)), rows[:2]) == [(1, "kl_negative", False), (1, "eos", False)]
    assert changes(Guards(Limits(patience=7, ignore=frozenset({"eos"}))), rows) == [(7, "kl_negative", False)]


def test_entropy_is_judged_by_where_it_heads() -> None:
    """By numpy's line through the last ten steps, read off ten steps ahead; the alarm comes before the collapse."""
    entropy = [2.0] * 12 + [2.0 - 0.043 * i for i in range(1, 19)]
    heads = [np.polyval(np.polyfit(range(n - 9, n + 1), entropy[n - 9 : n + 1], 1), n + 10) for n in range(9, 30)]
    first = next(i for i, ahead in enumerate(heads) if ahead < 1.0) + 10
    assert changes(Guards(LIMITS), rows_of(policy__entropy_avg=entropy)) == [(first + 2, "entropy", False)]
    assert entropy[first + 1] > 1.2
    assert changes(Guards(LIMITS), rows_of(policy__entropy_avg=[2.0, 1.2] * 20)) == [], "up and down is no trend"
    low = rows_of(policy__entropy_avg=[2.0] * 3 + [0.9] * 20)
    assert [(name, ok) for _, name, ok in changes(Guards(LIMITS), low)] == [("entropy", False)], "low and level"


# --- the gold score -----------------------------------------------------------------------------------------


def test_the_gold_guard_wants_a_rise_and_a_fall() -> None:
    up, down, level = [0.1 * i for i in range(12)], [-0.2 * i for i in range(12)], [0.0] * 12

    def judged(scores: list[float], gold: list[float]) -> list[tuple[int, str, bool]]:
        return changes(Guards(LIMITS), rows_of(objective__scores=scores, objective__gold=gold))

    assert judged(up, down) == [(8, "gold", False)], "6 steps make a trend, 3 in a row an alarm"
    assert judged(down, down) == judged(up, up) == judged(down, up) == judged(up, level) == []


@pytest.mark.parametrize(("fall", "alarms"), [(0.02, False), (0.2, True)])
def test_noise_is_no_fall_of_the_gold_score(fall: float, alarms: bool) -> None:
    """Zigzag of height 1 over 20 steps: the slope's error is about 0.04 by the textbook's formula."""
    scores = [0.1 * i for i in range(20)]
    gold = [(0.5 if i % 2 else -0.5) - fall * i for i in range(20)]
    guards = Guards(LIMITS, rows_of(objective__scores=scores, objective__gold=gold))
    assert trend(gold)[1] == pytest.approx(0.5 * math.sqrt(20 / 18) / math.sqrt(665), rel=0.02)
    assert bool([n for n in guards.notes() if not n.ok]) == alarms


def test_the_fit_finds_the_coefficients_that_made_the_points() -> None:
    a, b = 0.9, 0.45
    points = [(d, d * (a - b * math.log(d))) for d in (0.3, 0.7, 1.0, 1.6, 2.2)]
    assert fit_overoptimization(points) == pytest.approx((a, b))
    peak = overoptimization_peak(a, b)
    grid = np.linspace(0.01, 10, 100_000)
    assert peak == pytest.approx(grid[np.argmax(grid * (a - b * np.log(grid)))], abs=1e-3)
    noisy = [(d, gain + random.Random(i).gauss(0, 0.1)) for i, (d, gain) in enumerate(points * 4)]
    design = np.array([[d, -d * math.log(d)] for d, _ in noisy])
    expected = np.linalg.lstsq(design, np.array([gain for _, gain in noisy]), rcond=None)[0]
    assert fit_overoptimization(noisy) == pytest.approx(tuple(expected))


def test_what_cannot_be_told_is_none() -> None:
    assert fit_overoptimization([]) is None
    assert fit_overoptimization([(1.5, 0.2), (1.5, 0.4), (1.5, 0.3)]) is None
    assert overoptimization_peak(1.0, 0.0) is overoptimization_peak(1.0, -0.5) is None
    assert overoptimization_peak(1e9, 1.0) is None


def test_the_predicted_peak_is_a_kl_and_is_told() -> None:
    """a = 2 b: the peak is at d = e, a KL of e^2. Gains are over the first step; a KL of 0 or less is passed over."""
    kls = [0.0, -0.05, *(0.5 * i for i in range(1, 31))]
    gain = [math.sqrt(kl) * (1.0 - 0.5 * math.log(math.sqrt(kl))) if kl > 0 else 0.0 for kl in kls]
    gold = [g - 7.0 for g in gain]
    rows = rows_of(objective__kl=kls, objective__scores=[0.1 * i for i in range(32)], objective__gold=gold)
    assert predicted_peak_kl(rows) == pytest.approx(math.e**2)
    note = next(n for n in Guards(Limits(), rows).notes() if n.name == "gold")
    assert "at a KL of 7.39" in note.measured
    assert not note.ok
    assert predicted_peak_kl(rows[:1]) is predicted_peak_kl([]) is None
    rows[0]["objective/gold"] = None
    assert predicted_peak_kl(rows) is None, "scored from a later step on: the gain is not known"


def test_lines_by_hand() -> None:
    assert trend([1.0, 3.0, 5.0]) == (2.0, 0.0)
    slope, error = trend([0.0, 0.0, 3.0, 1.0])
    assert slope == pytest.approx(0.6)
    assert error == pytest.approx(math.sqrt((6 - 0.6**2 * 5) / 2 / 5))
    assert project([1.0, 3.0, 5.0]) == 11.0
    with pytest.raises(ValueError, match="needs 3"):
        trend([1.0, 2.0])


# --- the whole ----------------------------------------------------------------------------------------------


def test_a_resume_at_any_step_raises_the_same_alarms() -> None:
    """The history goes through JSON, as metrics.jsonl does; NaN is null there."""
    chance = random.Random(3)
    metrics = ["objective/kl", "objective/scores", "objective/gold", "policy/entropy_avg", "response/eos_frac"]
    metrics += ["response/distinct_2", "response/duplicate_frac", "response/length_mean", "val/explained_var"]
    rows = [{"step": s, **{m: chance.uniform(-0.5, 1.5) for m in metrics}} for s in range(1, 61)]
    rows[7]["objective/kl"] = math.nan
    whole = Guards(Limits(kl_target=0.3, patience=2))
    all_changes = changes(whole, rows)
    assert len(all_changes) > 20
    for cut in range(61):
        written = json.loads(json.dumps(rows[:cut]).replace("NaN", "null"))
        resumed = Guards(Limits(kl_target=0.3, patience=2), written)
        assert changes(resumed, rows[cut:]) == [change for change in all_changes if change[0] > cut]
        assert resumed.notes() == whole.notes()


def test_limits_come_from_a_configuration_old_or_new(stage_config: Any) -> None:
    guards = {"patience": 5, "ignore": ["eos"]}
    cfg = stage_config("ppo", critic_warmup_steps=2, kl={"target": 4.0}, guards=guards)
    assert Limits.of(cfg.model_dump(mode="json")) == Limits(4.0, 2, 5, frozenset({"eos"}))
    assert Limits.of({}) == Limits(None, 0, config_ppo.GuardsConfig().patience, frozenset())
    assert Limits.of({"kl": {"kind": "fixed", "target": 4.0}}).kl_target is None


def test_names_and_keys_are_those_of_the_configuration() -> None:
    """What `guards.ignore` takes; and every key that an alarm advises to change."""
    assert config_ppo.GUARDS.split("|") == list(GUARDS) == list(WORDS)
    keys = re.findall("`(.+?)`", " ".join(words.next_step + words.cause for words in WORDS.values()))
    assert len(keys) > 10
    for key in keys:
        model: Any = PPOStage
        for part in key.partition(":")[0].split("."):
            model = model.model_fields[part].annotation if part in getattr(model, "model_fields", {}) else None
            assert model is not None, key


def test_a_number_that_is_no_alarm_yet_is_not_praised() -> None:
    (critic,) = Guards(LIMITS, rows_of(val__explained_var=[0.2] * 12 + [-0.4] * 2)).notes()
    assert critic.ok
    assert critic.measured.endswith("; out of range now, for 2 of the 3 steps that make an alarm")
    (critic,) = Guards(LIMITS, rows_of(val__explained_var=[0.2] * 12 + [-0.4] * 3)).notes()
    assert not critic.ok
    assert "out of range" not in critic.measured


def test_a_note_survives_json() -> None:
    guards = Guards(LIMITS, rows_of(objective__kl=[13.0] * 4 + [1.0] * 4 + [13.0] * 4))
    for note in guards.notes():
        assert Note.from_json(json.loads(json.dumps(vars(note)))) == note
    assert guards.notes()[0].earlier == ((1, 4),)
