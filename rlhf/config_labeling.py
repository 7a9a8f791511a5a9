"""The configuration of a labeling project: one file for its server, queue, judge and export. No torch import."""

from __future__ import annotations

from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from rlhf.config_base import EnvName, Positive, Probability, Seed, Strict, Url
from rlhf.config_judge import JudgeConfig


class AnnotatorConfig(Strict):
    """One simulated annotator: P(left) = sigmoid((gold_left - gold_right) / noise + left_bias), else a coin."""

    name: str
    noise: Annotated[float, Field(gt=0)] = Field(default=1.0, description="in units of the gold score")
    left_bias: float = 0.0
    careless: Probability = Field(default=0.0, description="share of judgments given by a coin flip")


class GoldConfig(Strict):
    """Questions whose answer is known, mixed in unseen; who fails too many of them gets no further items."""

    fraction: Probability = Field(default=0.05, description="of the items that an annotator gets, where there are any")
    pause_below: Probability = Field(default=0.6, description="share of right answers under which items stop")
    after: Positive = Field(default=8, description="gold answers before that is judged, and how many of the last count")


class ServeConfig(Strict):
    """The web server."""

    host: str = Field(default="127.0.0.1", description="another one than loopback needs accounts")
    port: Annotated[int, Field(ge=0, lt=65536)] = 8420
    accounts: bool = Field(default=False, description="log in by name and password; false: one user, without login")
    public_url: Url | None = Field(default=None, description="as browsers see it, e.g. https://labels.example.org")

    @field_validator("public_url")
    @classmethod
    def _no_path(cls, url: str | None) -> str | None:
        """The pages' links begin at the root: under a path of a shared name none of them would lead anywhere."""
        if url is not None and urlsplit(url)[2:] not in (("", "", ""), ("/", "", "")):
            raise ValueError(f"{url!r} has a path; give the app a host name or a port of its own")
        return url


class QueueConfig(Strict):
    """What `rlhf label queue` puts before the annotators, out of rollout buffers."""

    rollouts: list[str] = Field(default=[], description="Parquet files that `sample` or PPO wrote")
    kind: Literal["pair", "ranking"] = "pair"
    responses_per_item: Annotated[int, Field(ge=2)] = Field(default=4, description="K of a ranking, at most")
    pairs_per_prompt: Positive = 1
    limit: Positive | None = Field(default=None, description="items, at most")
    reward_models: list[str] = Field(default=[], description="active sampling: one ensemble, or several models")
    random_fraction: Probability = Field(default=0.3, description="of the items, drawn blindly beside active sampling")
    batch: str = Field(default="", description="name of this delivery, e.g. round-2")


class ExportConfig(Strict):
    """What `rlhf label export` writes."""

    format: Literal["auto", "standard", "conversational"] = Field(
        default="auto", description="of TRL's files: text or turns; auto: turns where a prompt is a chat"
    )
    prompt: Literal["explicit", "implicit"] = "explicit"
    aggregate: Literal["majority", "dawid_skene"] = "majority"
    ties: Literal["drop", "keep"] = Field(default="drop", description="of pairs; keep: probability 0.5")
    heldout_fraction: Annotated[float, Field(ge=0, lt=1)] = Field(default=0.1, description="by prompt")
    also: list[Literal["label_studio", "argilla"]] = Field(default=[], description="files for these tools as well")
    resamples: Annotated[int, Field(ge=0)] = Field(
        default=500, description="of the bootstrap behind the intervals of the agreement report; 0: none"
    )


class LabelingStage(Strict):
    """A labeling project: its database, its rules, and the settings of the commands around it."""

    run_dir: str = Field(description="database, exports and reports go here")
    database_env: EnvName | None = Field(
        default=None, description="environment variable with a PostgreSQL URL; default: SQLite in run_dir"
    )
    seed: Seed = 0
    title: str = "Which answer is better?"
    instructions: str = Field(default="", description="Markdown, shown to annotators")
    judgments_per_item: Positive = Field(default=1, description="by different people")
    lease_minutes: Annotated[float, Field(gt=0, le=525_600)] = Field(
        default=20.0, description="an item is kept for its annotator"
    )
    repeat_fraction: Probability = Field(default=0.05, description="of the pairs, shown once more with sides swapped")
    repeat_after: Positive = Field(default=10, description="items between a pair and its repeat, at least")
    gold: GoldConfig = GoldConfig()
    serve: ServeConfig = ServeConfig()
    queue: QueueConfig = QueueConfig()
    export: ExportConfig = ExportConfig()
    judge: JudgeConfig | None = Field(default=None, description="the model of `rlhf label ai`")
