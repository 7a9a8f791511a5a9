"""The configuration of a judge: a language model that labels in people's place. No torch import."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from rlhf.config_base import EnvName, Positive, Probability, Strict, Url

Price = Annotated[float, Field(ge=0)]


class JudgeEndpointConfig(Strict):
    """A server that speaks OpenAI's protocol: OpenAI itself, vLLM, SGLang, Ollama, llama.cpp."""

    url: Url = Field(description="with its version, e.g. http://localhost:8000/v1")
    key_env: EnvName | None = Field(default=None, description="environment variable that holds the API key")
    allow_private: bool = Field(default=False, description="the address may be private, loopback or link-local")
    timeout_s: Annotated[float, Field(gt=0, le=86_400)] = Field(default=60.0, description="of one request, whole")
    attempts: Annotated[int, Field(ge=1, le=10)] = Field(default=4, description="per question")
    wait_s: Annotated[float, Field(ge=0)] = Field(default=1.0, description="before the second attempt; then doubles")
    max_wait_s: Annotated[float, Field(ge=0)] = Field(
        default=60.0, description="between two attempts, at most, also where the server asks for more (Retry-After)"
    )
    parallel: Positive = Field(default=8, description="requests at once")
    logprobs: bool = Field(default=True, description="ask for the letters' log-probabilities, and use what comes")
    structured: bool = Field(default=True, description="ask for an answer of the right JSON schema; letters need none")
    max_answer_tokens: Positive = Field(default=32, description="a judge that thinks first needs hundreds")
    request: dict[str, Any] = Field(
        default={}, description="further fields of every request, or others in place of ours; null leaves one out"
    )

    @field_validator("request")
    @classmethod
    def _one_whole_answer(cls, request: dict[str, Any]) -> dict[str, Any]:
        if ours := {"model", "messages", "stream", "n"} & request.keys():
            raise ValueError(f"{', '.join(sorted(ours))} cannot be set here; remove it")
        return request


class JudgeBudgetConfig(Strict):
    """What the judge may use in this run folder, all its runs together. Prices are per million tokens."""

    max_requests: Positive | None = Field(default=None, description="of a local model: comparisons")
    max_tokens: Positive | None = Field(default=None, description="read and written")
    max_cost: Annotated[float, Field(gt=0)] | None = None
    input_price: Price = 0.0
    output_price: Price = 0.0

    @model_validator(mode="after")
    def _prices_for_a_limit(self) -> JudgeBudgetConfig:
        if self.max_cost is not None and not (self.input_price or self.output_price):
            raise ValueError("max_cost needs prices; set input_price and output_price, per million tokens")
        return self


class JudgeControlsConfig(Strict):
    """Pairs with a known answer in every batch: a real response against an empty, a meaningless or a cut one."""

    per_batch: Annotated[int, Field(ge=0)] = Field(default=3, description="pairs; 0: none")
    max_failed: Probability = Field(default=0.2, description="share of the controls that may fail without an alarm")
    on_alarm: Literal["warn", "stop"] = Field(default="stop", description="stop: the batch's labels are not kept")


class JudgeConfig(Strict):
    """A model that compares two responses, in both orders. What both orders contradict is a tie."""

    model: str = Field(description="as the endpoint names it; without an endpoint: a folder, a hub id, a short name")
    endpoint: JudgeEndpointConfig | None = Field(default=None, description="null: the model is loaded here")
    name: Annotated[str, Field(pattern=r"^[\w.-]{1,50}$")] | None = Field(
        default=None, description="the annotator is called judge:NAME; default: the end of `model`"
    )
    answer: Literal["letter", "json", "strength"] = Field(
        default="letter", description="letter: A or B; json: a tie, too; strength: with one of three strengths"
    )
    criteria: str = Field(default="", description="Markdown: what is better; default: helpful, honest, harmless")
    batch_size: Positive = Field(default=32, description="items whose labels are kept together, with their controls")
    local_batch_size: Positive = Field(default=8, description="prompts read at once by a local model")
    precision: Literal["bf16", "fp32"] = Field(default="bf16", description="of a local model")
    max_failures: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.2, description="share of unanswered questions above which the run stops; of the first 20: of 20"
    )
    budget: JudgeBudgetConfig = JudgeBudgetConfig()
    controls: JudgeControlsConfig = JudgeControlsConfig()

    @model_validator(mode="after")
    def _local_letters(self) -> JudgeConfig:
        if self.endpoint is None and self.answer != "letter":
            raise ValueError(f"a local model answers by a letter; remove answer: {self.answer}, or set endpoint")
        return self

    @property
    def annotator(self) -> str:
        """Under which name its judgments are stored."""
        end = self.model.rstrip("/").split("/")[-1]
        return "judge:" + (self.name or "".join(c if c.isalnum() or c in "._-" else "-" for c in end)[:50])
