"""Language models that decode token by token: through transformers, or leaner where the model has Llama's shape.

    decoder = decoder_for(lm)
    logits_BV = decoder.prefill(prompts, copies, budget)
    logits_BV = decoder.step(tokens_B)         # as often as needed, at most `budget` times
    decoder.keep(alive)                        # rows that go on

In a step of one token transformers spends more time on bookkeeping than on products: a longer cache is allocated and
copied for every layer and token, keys are repeated for grouped heads, masks are rebuilt. `LlamaDecoder` runs the
model's own modules over a cache of fixed size. Whether a model has that shape is not read off its name: it is tried.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

_checked: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


class Decoder(Protocol):
    """A batch of rows in the middle of decoding."""

    def prefill(self, prompts: Sequence[Sequence[int]], copies: int, budget: int) -> Tensor:
        """Read every prompt once, for `copies` rows each; logits [B, V] of the first token of the B rows."""
        ...

    def step(self, tokens_B: Tensor) -> Tensor:
        """Append one token to every row; logits [B, V] of the next."""
        ...

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows alone."""
        ...


def decoder_for(lm: Any) -> Decoder:
    """The fastest decoder that this model's logits agree with."""
    return LlamaDecoder(lm) if has_llama_shape(lm) else TransformersDecoder(lm)


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
    """Any causal language model of transformers."""

    def __init__(self, lm: Any) -> None:
        self._lm = lm

    def prefill(self, prompts: Sequence[Sequence[int]], copies: int, budget: int) -> Tensor:
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
        self._cache.batch_select_indices(rows)
        self._mask_BT = self._mask_BT[rows]


class LlamaDecoder:
    """Models of Llama's shape: pre-norm layers of rotary, grouped attention and an MLP, then a norm and the head.

    Columns of the cache are shared by all rows: row b's prompt ends where every other prompt ends, and token n of all
    answers stands in one column. So a step writes one column and reads a slice, whatever the rows' lengths.
    """

    def __init__(self, lm: Any) -> None:
        self._lm = lm
        self._backbone, self._head = getattr(lm, lm.base_model_prefix), lm.get_output_embeddings()
        attention = self._backbone.layers[0].self_attn
        self._head_dim, self._scale = attention.head_dim, attention.scaling

    def prefill(self, prompts: Sequence[Sequence[int]], copies: int, budget: int) -> Tensor:
        """See `Decoder`."""
        tokens_BT, mask_BT = left_padded(prompts, self._lm.device)
        output = self._backbone(**_inputs(self._lm, tokens_BT, mask_BT))
        logits_BV, cache = self._head(output.last_hidden_state[:, -1].contiguous()), output.past_key_values
        rows, self._column = len(prompts) * copies, mask_BT.shape[1]
        self._keys, self._values = [], []
        for layer in cache.layers:
            for mine, theirs in ((self._keys, layer.keys), (self._values, layer.values)):
                full = theirs.new_zeros(rows, theirs.shape[1], self._column + budget, theirs.shape[3])
                full[:, :, : self._column] = theirs.repeat_interleave(copies, 0)
                mine.append(full)
        self._positions_B = mask_BT.long().sum(1).repeat_interleave(copies, 0)
        self._bias_BT = self._keys[0].new_zeros(rows, self._column + budget)
        self._bias_BT[:, : self._column].masked_fill_(~mask_BT.repeat_interleave(copies, 0), -torch.inf)
        return logits_BV.repeat_interleave(copies, 0)

    def step(self, tokens_B: Tensor) -> Tensor:
        """See `Decoder`."""
        x_B1H = self._backbone.embed_tokens(tokens_B[:, None])
        cos, sin = self._backbone.rotary_emb(x_B1H, self._positions_B[:, None])
        for i, layer in enumerate(self._backbone.layers):
            attended = self._attend(i, layer.self_attn, layer.input_layernorm(x_B1H), cos, sin)
            x_B1H = x_B1H + attended
            x_B1H = x_B1H + layer.mlp(layer.post_attention_layernorm(x_B1H))
        self._column += 1
        self._positions_B = self._positions_B + 1
        return self._head(self._backbone.norm(x_B1H)[:, 0])

    def keep(self, rows: Tensor) -> None:
        """See `Decoder`."""
        self._keys = [keys[rows] for keys in self._keys]
        self._values = [values[rows] for values in self._values]
        self._positions_B, self._bias_BT = self._positions_B[rows], self._bias_BT[rows]

    def _attend(self, i: int, attention: Any, x_B1H: Tensor, cos_B1D: Tensor, sin_B1D: Tensor) -> Tensor:
        """One new token per row against its row's cache; the G heads that share a key are rows of one product."""
        rows, end = len(x_B1H), self._column + 1
        q, k, v = (
            project(x_B1H).view(rows, -1, self._head_dim)
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        if hasattr(attention, "q_norm"):
            q, k = attention.q_norm(q), attention.k_norm(k)
        q, k = _rotated(q, cos_B1D, sin_B1D), _rotated(k, cos_B1D, sin_B1D)
        keys, values = self._keys[i], self._values[i]
        keys[:, :, self._column], values[:, :, self._column] = k, v
        groups = keys.shape[1]
        attended_BKGD = torch.nn.functional.scaled_dot_product_attention(
            q.view(rows, groups, -1, self._head_dim),
            keys[:, :, :end],
            values[:, :, :end],
            attn_mask=self._bias_BT[:, None, None, :end],
            scale=self._scale,
        )
        return attention.o_proj(attended_BKGD.reshape(rows, 1, -1))


def _rotated(x_BHD: Tensor, cos_B1D: Tensor, sin_B1D: Tensor) -> Tensor:
    """Rotary embedding with halves rotated, as Llama's (arXiv:2104.09864)."""
    first, second = x_BHD.chunk(2, -1)
    return x_BHD * cos_B1D + torch.cat((-second, first), -1) * sin_B1D


@torch.no_grad()
def has_llama_shape(lm: Any) -> bool:
    """Whether `LlamaDecoder` gives this model's own logits; tried once per model, on a few tokens of ragged rows."""
    if lm not in _checked:
        _checked[lm] = _agrees(lm)
    return _checked[lm]


def _agrees(lm: Any) -> bool:
    layers = getattr(getattr(lm, getattr(lm, "base_model_prefix", ""), None), "layers", None)
    if layers is None or _has_window(lm.config):
        return False
    size = lm.config.vocab_size
    prompts, tokens_B = [[1 % size, 2 % size, 3 % size], [4 % size]], torch.tensor([5 % size, 6 % size]).to(lm.device)
    logits = []
    for kind in (TransformersDecoder, LlamaDecoder):
        try:
            decoder = kind(lm)
            first = decoder.prefill(prompts, 1, 2)
            logits.append(torch.cat((first, decoder.step(tokens_B), decoder.step(tokens_B))).float())
        except (AttributeError, TypeError, ValueError, RuntimeError, IndexError):
            return False
    theirs, ours = logits
    tolerance = 1e-3 if lm.dtype == torch.float32 else 0.05
    return float((theirs - ours).abs().max()) <= tolerance * float(theirs.abs().max())


def _has_window(config: Any) -> bool:
    """Layers that see a window only would need their own masks."""
    return any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or []) or bool(
        getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    )
