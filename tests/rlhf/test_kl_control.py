import math

import pytest

from rlhf.errors import InvariantError
from rlhf.kl_control import AdaptiveKL, FixedKL


def test_fixed_stays():
    control = FixedKL(0.05)
    control.update(100.0, 64)
    assert control.coef == 0.05
    assert FixedKL(0.0).coef == 0


@pytest.mark.parametrize(
    ("mean_kl", "factor"),
    [
        (6.0, 1.0),
        (6.6, 1 + 0.1 * 0.064),
        (5.4, 1 - 0.1 * 0.064),
        (60.0, 1 + 0.2 * 0.064),
        (0.0, 1 - 0.2 * 0.064),
        (-1.0, 1 - 0.2 * 0.064),
    ],
)
def test_adaptive_follows_the_equation(mean_kl, factor):
    control = AdaptiveKL(0.1, target=6.0, horizon=1000)
    control.update(mean_kl, 64)
    assert control.coef == pytest.approx(0.1 * factor, rel=1e-12)


def test_adaptive_reaches_its_target_when_the_kl_answers_to_the_coefficient():
    control = AdaptiveKL(1.0, target=6.0, horizon=640)
    for _ in range(500):
        control.update(1.5 / control.coef, 64)
    assert 1.5 / control.coef == pytest.approx(6.0, rel=1e-3)


def test_a_resumed_control_continues_where_it_stopped():
    whole, first = AdaptiveKL(0.1, 6.0, 1000), AdaptiveKL(0.1, 6.0, 1000)
    for control in (whole, first):
        control.update(9.0, 64)
    second = AdaptiveKL(0.1, 6.0, 1000)
    second.load_state_dict(first.state_dict())
    for control in (whole, second):
        control.update(3.0, 64)
    assert second.coef == whole.coef != 0.1
    fixed = FixedKL(1.0)
    fixed.load_state_dict(FixedKL(0.25).state_dict())
    assert fixed.coef == 0.25


@pytest.mark.parametrize("bad", [0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("name", ["coef", "target", "horizon"])
def test_adaptive_refuses_numbers_that_are_not_positive_and_finite(name, bad):
    with pytest.raises(ValueError, match=f"^{name} of the adaptive KL control"):
        AdaptiveKL(**{"coef": 0.1, "target": 6.0, "horizon": 1000, name: bad})


@pytest.mark.parametrize("bad", [-0.1, math.nan, math.inf])
def test_fixed_refuses_negative_and_infinite_coefficients(bad):
    with pytest.raises(ValueError, match="KL coefficient"):
        FixedKL(bad)


@pytest.mark.parametrize("control", [FixedKL(0.1), AdaptiveKL(0.1, 6.0, 1000)])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_kl_that_is_not_finite_is_an_error(control, bad):
    with pytest.raises(InvariantError, match="mean KL is"):
        control.update(bad, 64)
    assert control.coef == 0.1


def test_a_damaged_checkpoint_is_refused():
    with pytest.raises(ValueError, match="coef"):
        AdaptiveKL(0.1, 6.0, 1000).load_state_dict({"coef": math.nan})
    with pytest.raises(ValueError, match="KL coefficient"):
        FixedKL(0.1).load_state_dict({"coef": -1.0})


def test_episodes_that_could_turn_the_coefficient_negative_are_refused():
    control = AdaptiveKL(0.1, 6.0, horizon=100)
    control.update(0.0, 499)
    assert control.coef > 0
    with pytest.raises(ValueError, match="set the horizon above 100"):
        control.update(6.0, 500)
    with pytest.raises(ValueError, match="at least one episode, not 0"):
        control.update(6.0, 0)
