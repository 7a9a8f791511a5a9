"""Parts of the reward model's configuration: ensembles. No torch import."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from rlhf.config_base import Strict

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
