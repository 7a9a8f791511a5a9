"""Parts of PPO's configuration: KL control, missing EOS, a served reward, guards. No torch import."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from rlhf.config_base import EnvName, Positive, Strict, Url


class KLConfig(Strict):
    """KL control. `k1` in the reward reaches the reverse-KL optimum (ppo.md, checklist 9)."""

    kind: Literal["fixed", "adaptive"] = "adaptive"
    coef: Annotated[float, Field(ge=0)] = 0.05
    target: Annotated[float, Field(gt=0)] = Field(default=6.0, description="nats per sequence")
    horizon: Positive = Field(default=10_000, description="episodes")
    place: Literal["reward", "loss"] = "reward"
    estimator: Literal["k1", "k2", "k3"] = "k1"

    @model_validator(mode="after")
    def _known_optimum(self) -> KLConfig:
        if self.place == "reward" and self.estimator != "k1":
            raise ValueError(f"estimator {self.estimator} inside the reward has no KL optimum; set estimator: k1")
        if self.place == "loss" and self.estimator == "k1":
            raise ValueError("k1 as a loss has zero expected gradient and does not regularise; set estimator: k2")
        return self


class MissingEOSConfig(Strict):
    """What an answer without EOS costs. `set`: score := value (N+); `subtract`: score -= value (TRL)."""

    kind: Literal["none", "set", "subtract"] = Field(
        default="set", description="`set` replaces every score, so it also raises those below the value"
    )
    value: float = Field(default=-1.0, description="for `set`, below nearly all scores of finished answers")


class RewardEndpointConfig(Strict):
    """A reward that another program gives over HTTP; its protocol stands in `rlhf/rollout/endpoint.py`."""

    url: Url = Field(description="e.g. https://rewards.example.org/score; requests are posted to it")
    token_env: EnvName | None = Field(default=None, description="environment variable that holds the bearer token")
    timeout_s: Annotated[float, Field(gt=0, le=86_400)] = Field(
        default=60.0, description="of one request, answer included"
    )
    attempts: Annotated[int, Field(ge=1, le=10)] = Field(
        default=3, description="per request; between two of them the wait doubles, from 1 s on"
    )
    batch_size: Positive = Field(default=16, description="rollouts per request")
    parallel: Positive = Field(default=4, description="requests at once, of each process")
    max_invalid: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.1, description="share of a step's rollouts that may go without a score; above it the run ends"
    )
    allow_private: bool = Field(
        default=False, description="the address may be private, loopback or link-local (http://localhost:8080)"
    )


GUARDS = (
    "kl_high|kl_negative|entropy|distinct|duplicates|eos|length|length_reward|disagreement|critic|clip|sampler|gold"
)


class GuardsConfig(Strict):
    """What watches a PPO run and says, in words and in health.json, when something goes wrong (`eval/guards.py`)."""

    on_alarm: Literal["warn", "stop"] = Field(default="warn", description="stop ends the run, after a checkpoint")
    patience: Positive = Field(default=3, description="steps in a row that begin an alarm, and that end it")
    ignore: list[Annotated[str, Field(pattern=f"^({GUARDS})$")]] = Field(default=[], description="guards to leave out")
    gold_scorer: Literal["readability"] | None = Field(default=None, description="logged each step, not trained on")
