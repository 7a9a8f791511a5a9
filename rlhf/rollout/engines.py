"""What samples answers, behind one interface: our own decoding, transformers' `generate`, or a vLLM server.

engine = engine_for(cfg.sampling, lm, name)
completions = engine.generate(prompts, settings, seeds=seeds, copies=4)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from rlhf.config_schema import SamplingConfig
from rlhf.rollout.generate import Completion, GenerationSettings, Rows, Tap, generate
from rlhf.rollout.vllm import VllmEngine


class Engine(Protocol):
    """Samples from one language model."""

    @property
    def context(self) -> int | None:
        """Tokens that prompt and answer may have together, where that is known."""
        ...

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        settings: GenerationSettings,
        *,
        seeds: Sequence[int],
        copies: int = 1,
        on_tokens: Callable[[int], None] = lambda n: None,
    ) -> list[Completion]:
        """`copies` completions of each prompt; `[i * copies + k]` is the k-th of prompt i.

        All chance of a completion comes from `seeds`, one per completion; `on_tokens` is told how many tokens are new.
        """
        ...


def engine_for(sampling: SamplingConfig, lm: Any, name: str, *, tap: Tap | None = None) -> Engine:
    """The engine that the configuration asks for.

    Args:
        lm: the model, for engines in this process.
        name: under which a server knows it.
        tap: see `rlhf.rollout.generate`; the native engine alone has states to give.
    """
    if sampling.engine == "vllm":
        server = sampling.server[name] if isinstance(sampling.server, dict) else sampling.server
        assert server is not None, "checked with the configuration"
        return VllmEngine(server, name, context=_context(lm))
    return NativeEngine(lm, tap) if sampling.engine == "native" else TransformersEngine(lm)


def _context(lm: Any) -> int | None:
    return getattr(lm.config, "max_position_embeddings", None)


class NativeEngine:
    """`rlhf.rollout.generate`."""

    def __init__(self, lm: Any, tap: Tap | None = None) -> None:
        self._lm, self.context, self._tap = lm, _context(lm), tap

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        settings: GenerationSettings,
        *,
        seeds: Sequence[int],
        copies: int = 1,
        on_tokens: Callable[[int], None] = lambda n: None,
    ) -> list[Completion]:
        """See `Engine`."""
        return generate(self._lm, prompts, settings, seeds=seeds, copies=copies, on_tokens=on_tokens, tap=self._tap)


class TransformersEngine:
    """transformers' `generate` as it is: slow, for models that must run in its own code, and the reference in tests."""

    def __init__(self, lm: Any) -> None:
        self._lm, self.context = lm, _context(lm)

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        settings: GenerationSettings,
        *,
        seeds: Sequence[int],
        copies: int = 1,
        on_tokens: Callable[[int], None] = lambda n: None,
    ) -> list[Completion]:
        """See `Engine`."""
        rows = [list(prompt) for prompt in prompts for _ in range(copies)]
        results = [Completion() for _ in rows]
        for begin in range(0, len(rows), settings.batch_size):
            end = begin + settings.batch_size
            self._batch(rows[begin:end], results[begin:end], settings, seeds[begin], on_tokens)
        return results

    def _batch(
        self,
        prompts: list[list[int]],
        results: list[Completion],
        settings: GenerationSettings,
        seed: int,
        on_tokens: Callable[[int], None],
    ) -> None:
        from transformers import GenerationConfig

        from rlhf.rollout.decode import left_padded

        device = self._lm.device
        tokens_BT, mask_BT = left_padded(prompts, device)
        watch = _Watch(settings, results, on_tokens)
        # transformers draws for all rows at once with torch's global generator: it is set by the first one's seed, and
        # put back.
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            self._lm.generate(
                tokens_BT,
                attention_mask=mask_BT.long(),
                generation_config=GenerationConfig(
                    do_sample=True,
                    temperature=settings.temperature,
                    top_k=0,
                    top_p=1.0,
                    max_new_tokens=settings.max_new_tokens,
                    eos_token_id=list(settings.eos_ids),
                    pad_token_id=settings.eos_ids[0],
                ),
                logits_processor=[watch.before_draw],
                stopping_criteria=[watch.after_draw],
            )


class _Watch:
    """Sees the logits before each draw and the tokens after it."""

    def __init__(
        self, settings: GenerationSettings, results: list[Completion], on_tokens: Callable[[int], None]
    ) -> None:
        self._rows = Rows(settings)
        self._rows.join(results)
        self._temperature, self._on_tokens = settings.temperature, on_tokens

    def before_draw(self, tokens_BT: Tensor, logits_BV: Tensor) -> Tensor:
        """The constraint; transformers divides by the temperature afterwards."""
        given_BV = self._rows.constrained(logits_BV)
        self._logprobs_BV = (given_BV.float() / self._temperature).log_softmax(-1)
        return given_BV

    def after_draw(self, tokens_BT: Tensor, scores: Any, **_: Any) -> Tensor:
        """Whether each row has ended."""
        tokens_B = tokens_BT[:, -1]
        logprobs_B = self._logprobs_BV.gather(1, tokens_B[:, None]).squeeze(1)
        entropies_B = -(self._logprobs_BV.exp() * self._logprobs_BV).sum(1)
        self._on_tokens(self._rows.record(tokens_B, logprobs_B, entropies_B))
        return torch.tensor(self._rows.ended, device=tokens_B.device)
