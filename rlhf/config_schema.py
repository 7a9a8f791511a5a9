"""The configuration of every stage: one pydantic model each, strict, documented per field. No torch import.

Sizes are in rows (`B`) or tokens, learning rates per optimizer step, KL in nats.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, field_validator, model_validator

from rlhf.config_base import Beta, Positive, Probability, Seed, Strict, check_url
from rlhf.config_judge import JudgeConfig
from rlhf.config_labeling import AnnotatorConfig, LabelingStage
from rlhf.config_ppo import GuardsConfig, KLConfig, MissingEOSConfig, RewardEndpointConfig
from rlhf.config_reward import Aggregate, EnsembleConfig, StdCoef


class DatasetConfig(Strict):
    """A hub id or a local file (`.json`, `.jsonl`, `.jsonl.gz`, `.parquet`); `shipped:` names one of ours."""

    path: str
    split: str = "train"
    subset: str | None = Field(default=None, description="the hub's configuration name")
    format: Literal[
        "auto", "prompt", "prompt_completion", "messages", "text", "preference", "hh", "ranking", "rating", "rollouts"
    ] = "auto"
    limit: Positive | None = Field(default=None, description="use the first rows only")
    chat: bool = Field(
        True, description="wrap plain-text prompts as a user turn when the tokenizer has a chat template"
    )
    max_bad_fraction: Probability = Field(default=0.0, description="malformed rows tolerated, quarantined and counted")


class TuningConfig(Strict):
    """Which parameters are trained."""

    kind: Literal["full", "lora"] = "full"
    layers: Positive | None = Field(default=None, description="train only so many layers, counted from the top")
    rank: Positive = 16
    alpha: Positive = 32
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: str | list[str] = "all-linear"


class SamplingConfig(Strict):
    """How responses are drawn. top-k and top-p do not exist here: a truncated sampler makes PPO's ratio wrong."""

    temperature: Annotated[float, Field(gt=0)] = 1.0
    max_new_tokens: Positive = 64
    batch_size: Positive = Field(default=32, description="rows decoded together")
    stop: list[Annotated[str, Field(min_length=1)]] = Field(
        default=[], description="strings that end an answer; its text leaves them out, its tokens do not"
    )
    engine: Literal["native", "transformers", "vllm"] = Field(
        default="native", description="`transformers`: its own generate, slower; `vllm`: a server, not for PPO"
    )
    server: str | dict[str, str] | None = Field(
        default=None, description="URL of the vllm server, e.g. http://localhost:8000; or model -> URL"
    )

    @model_validator(mode="after")
    def _server_for_vllm(self) -> SamplingConfig:
        if self.engine == "vllm" and not self.server:
            raise ValueError("engine vllm needs a server; set sampling.server to its URL")
        if self.engine != "vllm" and self.server:
            raise ValueError(f"engine {self.engine} uses no server; remove sampling.server or set engine: vllm")
        for url in [self.server] if isinstance(self.server, str) else (self.server or {}).values():
            check_url(url)
        return self

    def require_server_for(self, models: Iterable[str]) -> None:
        """Every model has a server, where there is one for each.

        Raises:
            ValueError: one has none.
        """
        for model in models:
            if isinstance(self.server, dict) and model not in self.server:
                raise ValueError(f"sampling.server has no URL for {model!r}; it has {sorted(self.server)}")


class TrackingConfig(Strict):
    """W&B beside the always-written metrics.jsonl. `auto`: online if logged in, else offline."""

    wandb: Literal["auto", "online", "offline", "off"] = "auto"
    project: str = "rlhf"
    group: str | None = None
    tags: list[str] = []


class StageConfig(Strict):
    """What all stages share."""

    run_dir: str = Field(description="everything this stage writes goes here")
    seed: Seed = 0
    precision: Literal["bf16", "fp32"] = Field("bf16", description="of matrix products; trained weights stay fp32")
    tracking: TrackingConfig = TrackingConfig()


class OptimConfig(Strict):
    """AdamW. Norms, biases and scalar heads get no weight decay."""

    lr: Annotated[float, Field(gt=0)]
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    eps: Annotated[float, Field(gt=0)] = 1e-5
    schedule: Literal["linear", "constant", "cosine"] = "linear"
    warmup_fraction: Probability = 0.0
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0


class SFTStage(StageConfig):
    """Supervised fine-tuning on demonstrations, by `trl.SFTTrainer`."""

    model: str
    dataset: DatasetConfig
    eval_dataset: DatasetConfig | None = None
    tuning: TuningConfig = TuningConfig()
    epochs: Annotated[float, Field(gt=0)] = 1.0
    batch_size: Positive = Field(default=8, description="rows per optimizer step and process")
    micro_batch_size: Positive = 8
    lr: Annotated[float, Field(gt=0)] = 2e-5
    max_length: Positive = 1024
    packing: bool = False
    completion_only_loss: bool = True
    save_every: Annotated[int, Field(ge=0)] = Field(default=100, description="in steps; 0: only the end")
    keep_checkpoints: Annotated[int, Field(ge=2)] = 2
    save_in_background: bool = Field(
        default=False, description="train on while a checkpoint is written; takes its size in CPU memory"
    )
    trainer: dict[str, Any] = Field({}, description="passed through to trl.SFTConfig, whose keys are checked")

    @model_validator(mode="after")
    def _whole_micro_batches(self) -> SFTStage:
        if self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of micro_batch_size {self.micro_batch_size}; "
                f"set micro_batch_size to a divisor of {self.batch_size}"
            )
        return self


class SampleStage(StageConfig):
    """K completions per prompt into the rollout buffer."""

    model: str
    prompts: DatasetConfig
    heldout_prompts: DatasetConfig | None = Field(default=None, description="sampled too, for testing a reward model")
    completions_per_prompt: Positive = Field(default=4, description="K")
    further_models: list[str] = Field(default=[], description="the K completions are shared out evenly")
    sampling: SamplingConfig = SamplingConfig()
    max_prompt_tokens: Positive = 512
    overlong: Literal["error", "skip"] = "error"

    @model_validator(mode="after")
    def _even_shares(self) -> SampleStage:
        models, k = 1 + len(self.further_models), self.completions_per_prompt
        if k % models:
            raise ValueError(f"completions_per_prompt {k} cannot be shared out evenly among {models} models")
        self.sampling.require_server_for([self.model, *self.further_models])
        return self


class LabelStage(StageConfig):
    """Preference labels for sampled rollouts."""

    rollouts: str = Field(description="Parquet file that `sample` wrote")
    heldout_rollouts: str | None = Field(default=None, description="the same of held-out prompts: nothing is split off")
    labeler: Literal["simulated", "ai", "people"] = "simulated"
    scorer: Literal["readability"] = "readability"
    annotators: list[AnnotatorConfig] = Field(default=[], description="the simulated ones")
    aggregate: Literal["majority", "dawid_skene"] = "dawid_skene"
    judge: JudgeConfig | None = Field(default=None, description="the model that labels, with `labeler: ai`")
    project: str | None = Field(
        default=None, description="with `labeler: people`, configuration of the labeling project that gets the answers"
    )
    heldout_fraction: Annotated[float, Field(ge=0, lt=1)] = Field(default=0.15, description="prompts kept for testing")
    earlier: str | None = Field(
        default=None,
        description="label folder of the round before: its rankings come first in the new files, and its prompts stay "
        "on the side, trained on or held out, where they are",
    )

    @model_validator(mode="after")
    def _labeler_described(self) -> LabelStage:
        if self.labeler == "simulated" and not self.annotators:
            raise ValueError("labeler: simulated needs annotators; list at least one")
        for labeler, key in (("ai", "judge"), ("people", "project")):
            if (self.labeler == labeler) != (getattr(self, key) is not None):
                raise ValueError(f"labeler: {labeler} and {key} go together; set both or neither")
        return self


class RewardStage(StageConfig):
    """Reward model from preferences, trained by our own loop."""

    model: str
    dataset: DatasetConfig
    eval_dataset: DatasetConfig | None = None
    heldout_fraction: Annotated[float, Field(ge=0, lt=1)] = Field(default=0.1, description="by prompt")
    normalise_on: DatasetConfig | None = Field(default=None, description="demonstrations whose mean score becomes 0")
    loss: Literal["bradley_terry", "all_pairs", "plackett_luce", "pointwise"] = Field(
        default="bradley_terry", description="pointwise: squared error of ratings; the others learn from comparisons"
    )
    centering: Annotated[float, Field(ge=0)] = 0.0
    ensemble: EnsembleConfig | None = Field(default=None, description="several reward models in one, e.g. {members: 4}")
    tuning: TuningConfig = TuningConfig()
    optim: OptimConfig = OptimConfig(lr=1e-5)
    epochs: Positive = 1
    batch_size: Positive = Field(default=16, description="pairs or rankings per optimizer step and process")
    micro_batch_size: Positive = 8
    share_prompts: bool = Field(default=True, description="read a prompt once for all of its responses")
    max_length: Positive = 1024
    truncation: Literal["keep_end", "error"] = Field(default="keep_end", description="drop the oldest tokens")

    save_every: Annotated[int, Field(ge=0)] = Field(default=100, description="in steps; 0: only the end")
    keep_checkpoints: Annotated[int, Field(ge=2)] = 2
    save_in_background: bool = Field(
        default=False, description="train on while a checkpoint is written; takes its size in CPU memory"
    )

    @model_validator(mode="after")
    def _consistent(self) -> RewardStage:
        if self.tuning.dropout:
            raise ValueError(
                "tuning.dropout must be 0 in reward training: scores must not depend on chance; set it to 0"
            )
        if self.loss == "pointwise" and self.centering:
            raise ValueError("centering is for comparisons, ratings have a centre of their own; set it to 0")
        if self.ensemble is not None and self.ensemble.kind == "adapters" and self.tuning.kind != "lora":
            raise ValueError("ensemble.kind: adapters needs tuning.kind: lora; set it, or ensemble.kind: heads")
        return self


class PPOStage(StageConfig):
    """PPO with KL control against the frozen reference."""

    model: str = Field(description="the policy to start from")
    reference: str | None = Field(default=None, description="frozen reference; default: `model`")
    reward_model: str | None = Field(default=None, description="a sequence classifier with one label")
    scorer: Literal["readability"] | None = Field(default=None, description="a programmatic reward instead of a model")
    reward_aggregate: Aggregate | None = Field(
        default=None, description="of an ensemble's scores; default: as its reward_model says"
    )
    reward_std_coef: StdCoef | None = Field(default=None, description="k of mean_minus_std; default: as it says")
    reward_endpoint: RewardEndpointConfig | None = Field(default=None, description="a served reward instead of both")
    prompts: DatasetConfig
    tuning: TuningConfig = TuningConfig()
    sharing: Literal["separate", "lora", "hydra"] = Field(
        default="separate", description="lora: one frozen base, adapters per role; hydra: one frozen trunk, top layers"
    )
    sampling: SamplingConfig = SamplingConfig()
    max_prompt_tokens: Positive = 512
    overlong: Literal["error", "skip"] = "error"

    steps: Positive = Field(default=20, description="rollout-and-update rounds")
    batch_size: Positive = Field(default=32, description="rollouts per step and process")
    epochs: Positive = 2
    minibatches: Positive = Field(default=1, description="optimizer steps per epoch")
    micro_batch_size: Positive = Field(default=8, description="rows per forward and backward, at most")
    micro_batch_tokens: Positive | None = Field(
        default=None,
        description="tokens per forward and backward, padding included, at most; a longer row goes alone. The reward "
        "model, without a backward, takes twice as many; texts of ptx keep to micro_batch_size",
    )
    optim: OptimConfig = OptimConfig(lr=1e-6)
    critic_lr: Annotated[float, Field(gt=0)] | None = Field(default=None, description="default: optim.lr")
    critic_init: Literal["reward_model", "policy"] = Field(
        default="reward_model", description="weights that the critic starts from; policy: with a head of zeros"
    )
    critic: str | None = Field(
        default=None, description="`critic/` of an earlier run to go on with, in place of critic_init's"
    )
    critic_layers: Positive | None = Field(
        default=None, description="of the critic only so many top layers are trained; default: tuning.layers"
    )
    critic_warmup_steps: Annotated[int, Field(ge=0)] = Field(default=0, description="train only the critic first")
    gradient_checkpointing: bool = False

    kl: KLConfig = KLConfig()
    gamma: Probability = 1.0
    lam: Probability = 0.95
    clip_range: Annotated[float, Field(gt=0)] = 0.2
    dual_clip: Annotated[float, Field(gt=1)] | None = None
    value_clip_range: Annotated[float, Field(gt=0, allow_inf_nan=True)] = Field(
        default=0.2, description=".inf: no clipping"
    )
    value_coef: Annotated[float, Field(ge=0)] = 0.1
    entropy_coef: Annotated[float, Field(ge=0)] = 0.0
    missing_eos: MissingEOSConfig = MissingEOSConfig()
    score_clip: Annotated[float, Field(gt=0)] | None = None
    whiten_rewards: bool = False
    whiten_advantages: bool = True
    bootstrap_truncated: bool = Field(default=False, description="a truncated answer's next value: V, not 0")
    target_kl: Annotated[float, Field(gt=0)] | None = Field(default=None, description="ends the epochs early")
    ptx: DatasetConfig | None = Field(default=None, description="pretraining text mixed into the loss (PPO-ptx)")
    ptx_coef: Annotated[float, Field(ge=0)] = 0.0

    save_every: Annotated[int, Field(ge=0)] = Field(default=10, description="in steps; 0: only the end")
    keep_checkpoints: Annotated[int, Field(ge=2)] = 2
    save_in_background: bool = Field(
        default=False, description="train on while a checkpoint is written; takes its size in CPU memory"
    )
    samples_per_step: Annotated[int, Field(ge=0)] = Field(default=4, description="rollouts written to samples.jsonl")
    archive_rollouts: bool = Field(default=False, description="keep every step's rollouts as Parquet")
    guards: GuardsConfig = GuardsConfig()

    @model_validator(mode="after")
    def _consistent(self) -> PPOStage:
        if self.sampling.engine == "vllm":
            raise ValueError(
                "sampling.engine vllm serves fixed weights, but PPO changes the policy's in every step; "
                "set engine: native (vllm is for `sample` and `evaluate`)"
            )
        if sum(reward is not None for reward in (self.reward_model, self.scorer, self.reward_endpoint)) != 1:
            raise ValueError("exactly one of reward_model, scorer and reward_endpoint must be set")
        if self.critic_init == "reward_model" and self.reward_model is None and self.critic is None:
            raise ValueError("critic_init: reward_model needs reward_model; set critic_init: policy")
        if self.batch_size % self.minibatches:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of minibatches {self.minibatches}; "
                f"set minibatches to a divisor of {self.batch_size}"
            )
        if (self.ptx is None) != (self.ptx_coef == 0):
            raise ValueError("ptx and ptx_coef go together; set both or neither")
        if self.kl.kind == "adaptive" and self.kl.coef == 0:
            raise ValueError("kl.coef 0 stays 0 under adaptive control; set kl.coef > 0 or kl.kind: fixed")
        shortest = 0.2 * self.batch_size  # from there on one step of the controller could turn the sign
        if self.kl.kind == "adaptive" and self.kl.horizon <= shortest:
            raise ValueError(
                f"kl.horizon {self.kl.horizon} is too short; set it above {shortest:g}, a fifth of batch_size"
            )
        if self.sharing == "lora" and self.tuning.kind != "lora":
            raise ValueError("sharing: lora needs tuning.kind: lora")
        if self.sharing == "hydra" and self.tuning.layers is None:
            raise ValueError("sharing: hydra needs tuning.layers, the number of top layers that are trained")
        if self.sharing == "hydra" and (self.critic_layers or 0) > (self.tuning.layers or 0):
            raise ValueError(
                f"critic_layers {self.critic_layers} is more than tuning.layers {self.tuning.layers}: with sharing: "
                "hydra what lies below those is not trained; set critic_layers lower"
            )
        if self.tuning.dropout:
            raise ValueError(
                "tuning.dropout must be 0 in PPO: dropout makes the first ratio differ from 1; set it to 0"
            )
        return self

    @model_validator(mode="after")
    def _aggregate_of_a_model(self) -> PPOStage:
        if self.reward_model is None and (self.reward_aggregate or self.reward_std_coef is not None):
            raise ValueError("reward_aggregate and reward_std_coef need an ensemble as reward_model; remove them")
        return self


class EvaluateStage(StageConfig):
    """Policies side by side on held-out prompts."""

    policies: dict[str, str] = Field(description="name -> model; e.g. base, sft, ppo")
    reference: str = Field(description="KL is measured against this model")
    base: str = Field(description="perplexity of the answers is measured under this model")
    candidate: str = Field(default="ppo", description="policy whose win rate is reported")
    baseline: str = Field(default="sft", description="against this policy")
    reward_model: str | None = None
    scorer: Literal["readability"] = "readability"
    prompts: DatasetConfig
    samples_per_prompt: Positive = 2
    sampling: SamplingConfig = SamplingConfig()
    max_prompt_tokens: Positive = 512
    overlong: Literal["error", "skip"] = "error"

    @model_validator(mode="after")
    def _names_known(self) -> EvaluateStage:
        for key in ("candidate", "baseline"):
            if getattr(self, key) not in self.policies:
                raise ValueError(f"{key} {getattr(self, key)!r} is not among policies {sorted(self.policies)}")
        self.sampling.require_server_for(self.policies.values())
        return self


class ReportStage(StageConfig):
    """One self-contained report.html and summary.json from the folders of the other stages."""

    title: str = "RLHF report"
    evaluate_dir: str
    sft_dir: str | None = None
    sample_dir: str | None = None
    label_dir: str | None = None
    reward_dir: str | None = None
    ppo_dir: str | None = None
    round_dirs: list[str] = Field(
        default=[], description="of a run in rounds, where each has its sample, label, reward and ppo folder"
    )


class PipelineStage(Strict):
    """All stages in one file. A stage's inputs that come from earlier stages are filled in by the pipeline."""

    run_dir: str
    title: str = "RLHF report"
    model: str
    seed: Seed = 0
    precision: Literal["bf16", "fp32"] = "bf16"
    tracking: TrackingConfig = TrackingConfig()
    rounds: Positive = Field(
        default=1,
        description="of labels; each further one samples the policy that PPO has reached, labels its answers, trains "
        "the reward model anew on all labels so far, and goes on with PPO",
    )
    later_rounds: dict[Literal["sample", "label", "reward", "ppo"], dict[str, Any]] = Field(
        default={}, description="keys of these blocks that are others from the second round on: {ppo: {steps: 7}}"
    )
    launcher: str = Field(
        "", description='e.g. "accelerate launch --config_file launch/zero2.yaml"; empty: plain python'
    )
    sft: dict[str, Any]
    sample: dict[str, Any]
    label: dict[str, Any]
    reward: dict[str, Any]
    ppo: dict[str, Any]
    evaluate: dict[str, Any]
    report: dict[str, Any] = {}

    @field_validator("launcher")
    @classmethod
    def _whole_words(cls, value: str) -> str:
        try:
            shlex.split(value)
        except ValueError as error:
            raise ValueError(f"{error} in {value!r}; close the quote") from None
        return value


STAGES: dict[str, type[BaseModel]] = {
    "sft": SFTStage,
    "sample": SampleStage,
    "label": LabelStage,
    "labeling": LabelingStage,
    "reward": RewardStage,
    "ppo": PPOStage,
    "evaluate": EvaluateStage,
    "report": ReportStage,
    "pipeline": PipelineStage,
}
