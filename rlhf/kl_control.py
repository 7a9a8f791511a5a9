"""The coefficient of the KL penalty: fixed, or steered towards a target.

Call `update` once per PPO step, after the step's rewards were computed with `coef`. The coefficient moves, so
it belongs into the checkpoint: `state_dict` holds it; target and horizon are configuration and are not
stored.
"""

from __future__ import annotations

import math

from rlhf.config_schema import KLConfig
from rlhf.errors import ConfigError, InvariantError
from rlhf.types import KLController

MAX_ERROR = 0.2  # clip of the proportional error: one batch with an extreme KL must not jerk the coefficient


class FixedKL:
    """A constant coefficient; 0 turns the penalty off."""

    def __init__(self, coef: float) -> None:
        """Raises ValueError for a coefficient that is negative or not finite."""
        if not (math.isfinite(coef) and coef >= 0):
            raise ValueError(f"the KL coefficient must be finite and not negative, not {coef}")
        self.coef = coef

    def update(self, mean_kl: float, n: int) -> None:
        """Change nothing; raises InvariantError for a KL that is not finite."""
        _check_kl(mean_kl)

    def state_dict(self) -> dict[str, float]:
        """What a resume needs."""
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue with the saved coefficient. Raises ValueError if it is not one that this class accepts."""
        self.coef = FixedKL(state["coef"]).coef


class AdaptiveKL:
    """A proportional controller in log space that holds the KL per sequence near `target` nats.

        coef <- coef * (1 + clip(KL / target - 1, -0.2, 0.2) * n / horizon)

    `target` is in nats per sequence (about 6 in the source), `horizon` in episodes.
    Source: Ziegler et al. 2019 (arXiv:1909.08593), section 2.2.
    """

    def __init__(self, coef: float, target: float, horizon: float) -> None:
        """Raises ValueError unless all are positive and finite (a coefficient of 0 could never move)."""
        for name, value in {"coef": coef, "target": target, "horizon": horizon}.items():
            _check_positive(name, value)
        self.coef = coef
        self.target = target
        self.horizon = horizon

    def update(self, mean_kl: float, n: int) -> None:
        """Move the coefficient after `n` episodes (over all ranks) with a mean KL of `mean_kl` nats.

        Raises InvariantError for a KL that is not finite, and ValueError for n below 1 or so large against the
        horizon that a single step could turn the coefficient negative.
        """
        _check_kl(mean_kl)
        if n < 1:
            raise ValueError(f"n must be at least one episode, not {n}")
        if MAX_ERROR * n >= self.horizon:
            raise ValueError(
                f"{n} episodes per step against a horizon of {self.horizon} could turn the KL coefficient "
                f"negative; set the horizon above {MAX_ERROR * n:g}, better to many steps' worth of episodes"
            )
        error = min(max(mean_kl / self.target - 1, -MAX_ERROR), MAX_ERROR)
        self.coef *= 1 + error * n / self.horizon

    def state_dict(self) -> dict[str, float]:
        """What a resume needs."""
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue with the saved coefficient. Raises ValueError if it is not positive and finite."""
        _check_positive("coef", state["coef"])
        self.coef = state["coef"]


def kl_control_for(cfg: KLConfig, rollouts: int, state: dict[str, float] | None = None) -> KLController:
    """Fixed or adaptive, by the configuration.

    Args:
        rollouts: per step, of all processes.
        state: of the checkpoint from which the run goes on.

    Raises:
        ConfigError: with so many rollouts one step could turn the coefficient negative.
    """
    if cfg.kind == "fixed":
        return FixedKL(cfg.coef)
    if cfg.horizon <= MAX_ERROR * rollouts:
        raise ConfigError(
            f"kl.horizon {cfg.horizon} is too short for {rollouts} rollouts per step",
            fix=f"set it above {MAX_ERROR * rollouts:g}, better to many steps' worth of episodes",
        )
    adaptive = AdaptiveKL(cfg.coef, cfg.target, cfg.horizon)
    adaptive.load_state_dict(state or adaptive.state_dict())
    return adaptive


def _check_positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} of the adaptive KL control must be positive and finite, not {value}")


def _check_kl(mean_kl: float) -> None:
    if not math.isfinite(mean_kl):
        raise InvariantError(
            f"the mean KL is {mean_kl}: the policy diverged or its log-probabilities are broken",
            fix="lower optim.lr, and look at samples.jsonl of the last steps",
        )
