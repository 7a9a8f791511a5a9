"""Ensembles of reward models, and the settings of the commands that put a reward model to work. No torch import."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from rlhf.config_base import Positive, Probability, Strict

Aggregate = Literal["mean", "min", "mean_minus_std"]
StdCoef = Annotated[float, Field(ge=0)]


class EnsembleConfig(Strict):
    """Several reward models in one. Each member starts elsewhere and weighs the prompts in its own way."""

    members: Annotated[int, Field(ge=2)] = 4
    kind: Literal["heads", "adapters"] = Field(
        default="heads",
        description="heads: linear ones over one trunk, at the cost of one model; adapters: LoRA adapters over one "
        "frozen base, as dear as so many models, but for memory (needs tuning.kind: lora)",
    )
    aggregate: Aggregate = Field(default="mean", description="the members' scores as one")
    coef: StdCoef = Field(default=1.0, description="k of mean_minus_std: mean - k * standard deviation over members")


class AtWork(Strict):
    """How a reward model is run on files."""

    model: str = Field(description="a sequence classifier with one label: a folder, an adapter's, or a hub id")
    precision: Literal["bf16", "fp32"] = "bf16"
    micro_batch_size: Positive = Field(default=16, description="rows read together")
    aggregate: Aggregate | None = Field(default=None, description="of an ensemble's scores; default: as the model says")
    std_coef: StdCoef | None = Field(default=None, description="k of mean_minus_std; default: as the model says")


class RewardEval(AtWork):
    """`rlhf reward eval MODEL FILE...`"""

    files: Annotated[list[str], Field(min_length=1)]
    run_dir: str = Field(default="runs/reward_eval", description="reward_report.json and reward_report.html go here")
    format: Literal["auto", "preference", "hh", "ranking"] = "auto"
    limit: Positive | None = Field(default=None, description="use the first rows only, of each file")
    chat: bool = Field(True, description="wrap plain-text prompts as a user turn when there is a chat template")
    max_bad_fraction: Probability = Field(default=0.0, description="malformed rows tolerated, quarantined and counted")
    max_length: Positive = Field(default=1024, description="tokens of a row; as in training")
    truncation: Literal["keep_end", "error"] = Field(default="keep_end", description="drop the oldest tokens")


class RolloutsScore(AtWork):
    """`rlhf rollouts score MODEL BUFFER.parquet`"""

    rollouts: str
    out: str | None = Field(default=None, description="default: the file itself")
    retokenize: bool = Field(
        default=False,
        description="score the texts as the model tokenises them; false: the very tokens that were sampled, refused "
        "where they mean something else to the model",
    )
    chat: bool = Field(True, description="for retokenize: wrap plain-text prompts as a user turn")
