"""From prompts to scored rollouts, and from rollouts to the tensors that PPO compares."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from rlhf.config_schema import MissingEOSConfig, SamplingConfig
from rlhf.data.templates import TokenizedPrompt
from rlhf.errors import DataError
from rlhf.rollout.engines import Engine
from rlhf.rollout.generate import GenerationSettings
from rlhf.rollout.stops import before_stop
from rlhf.types import Rollout, StopReason


def settings_from(
    sampling: SamplingConfig, eos_ids: Iterable[int], decode: Callable[[list[int]], str]
) -> GenerationSettings:
    """What the configuration asks for."""
    return GenerationSettings(
        eos_ids=tuple(eos_ids),
        max_new_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        batch_size=sampling.batch_size,
        stop=tuple(sampling.stop),
        decode=decode,
    )


def collect(
    engine: Engine,
    prompts: Sequence[TokenizedPrompt],
    settings: GenerationSettings,
    *,
    decode: Callable[[list[int]], str],
    seeds: Sequence[int],
    copies: int = 1,
    policy: str = "",
    on_tokens: Callable[[int], None] = lambda n: None,
) -> list[Rollout]:
    """Sample `copies` responses per prompt; row `[i * copies + k]`, of the seed there, is the k-th of prompt i.

    They are not yet scored.

    `decode` makes the text that people and programs read; nothing downstream tokenises that text again. The text
    leaves out a sampled EOS or stop string, the tokens keep it: it is an action.
    """
    check_context(engine.context, prompts, settings)
    completions = engine.generate(
        [p.tokens for p in prompts], settings, seeds=seeds, copies=copies, on_tokens=on_tokens
    )
    rollouts = []
    for i, completion in enumerate(completions):
        prompt = prompts[i // copies]
        zeros = len(prompt.tokens)
        text = decode(completion.tokens[:-1] if completion.stop is StopReason.EOS else completion.tokens)
        rollouts.append(
            Rollout(
                prompt=prompt.record.prompt,
                prompt_id=prompt.record.prompt_id,
                response=before_stop(text, settings.stop) if completion.stop is StopReason.STOP else text,
                tokens=[*prompt.tokens, *completion.tokens],
                action_mask=[False] * zeros + [True] * len(completion.tokens),
                logprobs=[0.0] * zeros + completion.logprobs,
                stop=completion.stop,
                policy=policy,
            )
        )
    return rollouts


def check_context(limit: int | None, prompts: Sequence[TokenizedPrompt], settings: GenerationSettings) -> None:
    """Every prompt and its longest answer fit into what the model can read.

    Raises:
        DataError: one does not; names it, its length and the limit.
    """
    for prompt in prompts:
        length = len(prompt.tokens)
        if limit is not None and length + settings.max_new_tokens > limit:
            raise DataError(
                f"{prompt.record.where}: {length} prompt tokens and up to {settings.max_new_tokens} new do not fit "
                f"into the model's context of {limit}",
                fix=_fitting(limit - settings.max_new_tokens),
            )


def _fitting(room: int) -> str:
    if room <= 0:
        return "lower sampling.max_new_tokens"
    return f"set max_prompt_tokens: {room} with overlong: skip, or shorten it"


def missing_eos_penalty(scores: Sequence[float], rollouts: Sequence[Rollout], cfg: MissingEOSConfig) -> list[float]:
    """Scores after the penalty for answers that ran into the budget (checklist 7), judged by their stop reason."""
    penalised = []
    for score, rollout in zip(scores, rollouts, strict=True):
        if rollout.stop.finished or cfg.kind == "none":
            penalised.append(score)
        else:
            penalised.append(cfg.value if cfg.kind == "set" else score - cfg.value)
    return penalised
