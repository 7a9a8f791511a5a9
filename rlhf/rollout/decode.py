"""Language models that decode token by token: through transformers, or leaner where the model has Llama's shape.

    decoder = decoder_for(lm, places, budget)
    logits_BV = decoder.admit(prompts, copies)   # at any time: new rows join those that are there
    logits_BV = decoder.step(tokens_B)           # `budget` times a row; what later steps give it has no meaning
    decoder.keep(rows)                           # those that go on

In a step of one token transformers spends more time on bookkeeping than on products: a longer cache is allocated and
copied for every layer and token, keys are repeated for grouped heads, masks are rebuilt. `LlamaDecoder` runs the
model's weights over a cache of fixed places. Whether a model has that shape is not read off its name: it is tried.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from rlhf.models.packed_forward import has_window
from rlhf.rollout.cuda_graph import GraphDecoder
from rlhf.rollout.llama import LlamaDecoder

_checked: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()
_PREFIX_PAYS = 64
"""Tokens that must be saved: reading a prefix is one more pass over the weights."""


class Decoder(Protocol):
    """Rows in the middle of decoding."""

    @property
    def can_admit(self) -> bool:
        """Whether rows may join now."""
        ...

    def admit(self, prompts: Sequence[Sequence[int]], copies: int) -> Tensor:
        """Read every prompt once, for `copies` new rows each, behind those that are there; logits [new rows, V]."""
        ...

    def step(self, tokens_B: Tensor) -> Tensor:
        """Append one token to every row; logits [B, V] of the next."""
        ...

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows alone, in this order: row i is what row `rows[i]` was."""
        ...

    def states(self, row: int) -> Tensor | None:
        """Hidden states at the tap of all tokens that the row has read, [T, H]; None where none are kept."""
        ...


def decoder_for(lm: Any, places: int, budget: int, prefix: Sequence[int] = (), *, tap: int | None = None) -> Decoder:
    """The fastest decoder that this model's logits agree with, for about `places` rows of up to `budget` new tokens.

    It holds a copy of the weights where packing them pays: make it anew when they have changed.

    Args:
        prefix: what all prompts begin with, see `shared_prefix`.
        tap: keep the states that go into this layer, if the decoder can.
    """
    if not has_llama_shape(lm):
        return TransformersDecoder(lm)
    if lm.device.type == "cuda":  # there a pass over a few tokens costs as much as one over all prompts
        return GraphDecoder(lm, places, budget, tap=tap)
    return LlamaDecoder(lm, places, budget, prefix, tap=tap)


def shared_prefix(prompts: Sequence[Sequence[int]]) -> list[int]:
    """The longest common beginning that leaves every prompt a token of its own; none where reading it does not pay."""
    if not prompts:
        return []
    low, high = list(min(prompts, key=list)), list(max(prompts, key=list))  # all others stand between the two
    length = min(map(len, prompts)) - 1
    differing = (i for i in range(length) if low[i] != high[i])
    prefix = low[: next(differing, max(length, 0))]
    return prefix if (len(prompts) - 1) * len(prefix) >= _PREFIX_PAYS else []


def left_padded(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """(tokens_BT, mask_BT): prompts end in the same column."""
    longest = max(len(p) for p in prompts)
    tokens_BT = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask_BT = torch.zeros(len(prompts), longest, dtype=torch.bool)
    for i, prompt in enumerate(prompts):
        tokens_BT[i, longest - len(prompt) :] = torch.tensor(prompt)
        mask_BT[i, longest - len(prompt) :] = True
    return tokens_BT.to(device), mask_BT.to(device)


def _inputs(lm: Any, tokens_BT: Tensor, mask_BT: Tensor) -> dict[str, Any]:
    """What transformers' forward takes to read left-padded prompts into a new cache."""
    from transformers import DynamicCache

    return {
        "input_ids": tokens_BT,
        "attention_mask": mask_BT.long(),
        "position_ids": (mask_BT.long().cumsum(1) - 1).clamp(min=0),
        "past_key_values": DynamicCache(config=lm.config),
        "use_cache": True,
    }


def _contiguous(module: Any, inputs: tuple[Tensor]) -> tuple[Tensor]:
    """A hook: of a strided [B, 1, H] torch makes a batched product, for which it copies the weight B times."""
    return (inputs[0].contiguous(),)


class TransformersDecoder:
    """Any causal language model of transformers; rows join when there are none."""

    def __init__(self, lm: Any) -> None:
        self._lm = lm
        self.can_admit = True

    def admit(self, prompts: Sequence[Sequence[int]], copies: int) -> Tensor:
        """See `Decoder`."""
        tokens_BT, mask_BT = left_padded(prompts, self._lm.device)
        hook = self._lm.get_output_embeddings().register_forward_pre_hook(_contiguous)
        try:
            output = self._lm(**_inputs(self._lm, tokens_BT, mask_BT), logits_to_keep=1)
        finally:
            hook.remove()
        logits_BV, self._cache = output.logits[:, -1], output.past_key_values
        if copies > 1:
            self._cache.batch_repeat_interleave(copies)
        self._mask_BT = mask_BT.repeat_interleave(copies, 0)
        self.can_admit = False
        return logits_BV.repeat_interleave(copies, 0)

    def step(self, tokens_B: Tensor) -> Tensor:
        """See `Decoder`."""
        self._mask_BT = torch.nn.functional.pad(self._mask_BT, (0, 1), value=True)
        return self._lm(
            input_ids=tokens_B[:, None],
            attention_mask=self._mask_BT.long(),
            position_ids=self._mask_BT.long().sum(1, keepdim=True) - 1,
            past_key_values=self._cache,
            use_cache=True,
        ).logits[:, -1]

    def keep(self, rows: Tensor) -> None:
        """See `Decoder`."""
        self.can_admit = len(rows) == 0
        if not self.can_admit:
            self._cache.batch_select_indices(rows)
            self._mask_BT = self._mask_BT[rows]

    def states(self, row: int) -> None:
        """See `Decoder`."""
        return None


@torch.no_grad()
def has_llama_shape(lm: Any) -> bool:
    """Whether `LlamaDecoder` gives this model's own logits; tried once per model, on a few tokens of ragged rows."""
    if lm not in _checked:
        _checked[lm] = _agrees(lm)
    return _checked[lm]


def _agrees(lm: Any) -> bool:
    layers = getattr(getattr(lm, getattr(lm, "base_model_prefix", ""), None), "layers", None)
    if layers is None or has_window(lm.config):
        return False
    # From all over the vocabulary: after special tokens alone, bf16 is off by more than a wrong decoder would be.
    tokens = [(i + 1) * lm.config.vocab_size // 12 for i in range(10)]
    prompts, tokens_B = [tokens[:6], tokens[6:8]], torch.tensor(tokens[8:], device=lm.device)
    logits = []
    for make in (lambda: TransformersDecoder(lm), lambda: LlamaDecoder(lm, 2, 2)):
        try:
            decoder = make()
            first = decoder.admit(prompts, 1)
            logits.append(torch.cat((first, decoder.step(tokens_B), decoder.step(tokens_B))).float())
        except (AttributeError, TypeError, ValueError, RuntimeError, IndexError):
            return False
    theirs, ours = (x - x.mean(1, keepdim=True) for x in logits)  # a shift of all logits changes nothing
    tolerance = 1e-3 if lm.dtype == torch.float32 else 0.1
    return float((theirs - ours).norm()) <= tolerance * float(theirs.norm())
