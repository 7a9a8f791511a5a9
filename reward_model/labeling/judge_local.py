"""A judge whose model is loaded here: the probabilities of its two answers, without generating any."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from reward_model.labeling.judge_backend import UNASKED, Failure, NoVerdict
from reward_model.labeling.judge_ledger import Ledger, Size
from reward_model.labeling.judge_prompt import Question, Verdict, messages, strength_of
from rlhf.config_judge import JudgeConfig
from rlhf.data.templates import prompt_tokens
from rlhf.errors import DataError, ModelError
from rlhf.files import content_digest
from rlhf.models.load import load_causal_lm, load_tokenizer, resolve_model
from rlhf.runtime import Runtime


class LocalJudge:
    """See `Backend`. The judge's probability that the first response is better is that of the token A against B:

        P(first) = p(A | prompt) / (p(A | prompt) + p(B | prompt)) = sigmoid(logit_A - logit_B)

    Raises:
        ModelError: the model cannot be loaded, or A and B are no single tokens of it.
    """

    parallel = 1

    def __init__(self, cfg: JudgeConfig, seed: int) -> None:
        self.chunk = cfg.local_batch_size
        self._cfg, self._seed = cfg, seed
        self._runtime = Runtime.start(seed=seed, precision=cfg.precision)
        self._tokenizer = load_tokenizer(cfg.model)
        self._letters = _letter_tokens(self._tokenizer, cfg.model)
        self._lm = self._runtime.freeze(load_causal_lm(cfg.model, dtype=self._runtime.dtype))
        self._longest: int = getattr(self._lm.config, "max_position_embeddings", None) or 2**31
        self._weights = content_digest(Path(resolve_model(cfg.model)), exact=False)

    def identity(self) -> list[Any]:
        """See `Backend`."""
        return ["local", self._cfg.model, self._weights, self._cfg.precision, self._seed]

    def stop(self) -> None:
        """See `Backend`."""

    def ask(self, questions: Sequence[Question], keys: Sequence[str], ledger: Ledger) -> list[dict[str, Any] | Failure]:
        """See `Backend`."""
        prompts = [self._tokens(question) for question in questions]
        sizes = [Size(0 if isinstance(tokens, Failure) else len(tokens), 0) for tokens in prompts]
        rows = ledger.reserve(keys, sizes)
        readable = {i: tokens for i in range(len(rows)) if not isinstance(tokens := prompts[i], Failure)}
        answers: list[dict[str, Any] | Failure] = [UNASKED] * len(questions)
        for i in range(len(rows)):
            if isinstance(failure := prompts[i], Failure):
                answers[i] = {"failure": [failure.kind, failure.detail]}
        for i, (p_first, mass) in zip(readable, self._probabilities([*readable.values()]), strict=True):
            answers[i] = {"p_first": p_first, "mass": mass}
        for i, row in enumerate(rows):
            ledger.settle(row, None, answers[i])
        return answers

    def verdict(self, answer: dict[str, Any]) -> Verdict:
        """See `Backend`."""
        if "failure" in answer:
            raise NoVerdict(*answer["failure"])
        return Verdict(answer["p_first"], strength_of(answer["p_first"]))

    def _tokens(self, question: Question) -> list[int] | Failure:
        """The judge's prompt, if it can be read whole: a cut one would hide a response's end."""
        turns = messages(question, form="letter", criteria=self._cfg.criteria, seed=self._seed)
        try:
            tokens = prompt_tokens(self._tokenizer, turns, chat=True)
        except DataError as error:
            return Failure("control_token", error.message)
        if len(tokens) > self._longest:
            return Failure("too_long", f"{len(tokens)} tokens, of {self._longest} that the model reads")
        return tokens

    @torch.no_grad()
    def _probabilities(self, prompts: list[list[int]]) -> list[tuple[float, float]]:
        """P(first is better), and the probability mass that the two letters have of all tokens, by prompt."""
        if not prompts:
            return []
        longest = max(map(len, prompts))
        tokens_BT = torch.tensor([[*tokens, *[0] * (longest - len(tokens))] for tokens in prompts])
        lengths_B = torch.tensor([len(tokens) for tokens in prompts])
        mask_BT = torch.arange(longest)[None] < lengths_B[:, None]
        device = self._runtime.device
        backbone = getattr(self._lm, self._lm.base_model_prefix)
        hidden_BTH = backbone(
            input_ids=tokens_BT.to(device), attention_mask=mask_BT.long().to(device), use_cache=False
        ).last_hidden_state
        last_BH = hidden_BTH[torch.arange(len(prompts)), lengths_B.to(device) - 1]
        logprobs_BV = self._lm.get_output_embeddings()(last_BH).float().log_softmax(-1)
        first_B, second_B = logprobs_BV[:, self._letters].double().unbind(1)
        p_first_B, mass_B = torch.sigmoid(first_B - second_B), first_B.exp() + second_B.exp()
        return list(zip(p_first_B.tolist(), mass_B.tolist(), strict=True))


def _letter_tokens(tokenizer: Any, name: str) -> list[int]:
    """The tokens A and B.

    Raises:
        ModelError: the tokenizer has no such tokens.
    """
    spelled = [tokenizer(letter, add_special_tokens=False)["input_ids"] for letter in "AB"]
    if any(len(ids) != 1 for ids in spelled) or spelled[0] == spelled[1]:
        raise ModelError(f"A and B are no single tokens of {name}", fix="use another model as the judge")
    return [ids[0] for ids in spelled]
