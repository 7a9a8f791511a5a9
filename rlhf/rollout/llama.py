"""Decoding with models of Llama's shape: a cache of fixed places, a few fused operations per layer.

Every row has a place in the cache. Its tokens stand there from column 0 on, so a row that joins disturbs no other,
and one that leaves frees its place. Columns that a row has not reached yet are hidden by its bias. What all prompts
begin with is read once; its keys and values are copied to every row.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf.rollout.buffer import pad_right
from rlhf.rollout.products import product

_GROWTH = 1.25
"""Wider caches are at least this much wider: prompts come shortest first, and every widening copies the cache."""
_spare: list[Tensor] = []
"""On a CPU: the memory of the last decoder's caches, flat. glibc would give the next one fresh pages, for it fits no
aligned block into a hole of its own size; and the kernel clears fresh pages ten times slower than we do old ones."""


class LlamaDecoder:
    """See `rlhf.rollout.decode.Decoder`.

    The shape: pre-norm layers of rotary, grouped attention and an MLP, then a norm and the head. The cache of a layer
    is [places, columns, 2 x key heads, D], keys in the first half. Weights are packed when the decoder is made.

    Args:
        prefix: tokens with which every prompt begins; each has at least one more.
        tap: also cache the states that go into this layer, for `states`.
    """

    can_admit = True

    def __init__(
        self, lm: Any, places: int, budget: int, prefix: Sequence[int] = (), *, tap: int | None = None
    ) -> None:
        self._backbone = getattr(lm, lm.base_model_prefix)
        self._norm = _Norm(self._backbone.norm)
        self._head = product(lm.get_output_embeddings())
        self._layers = [_Layer(layer) for layer in self._backbone.layers]
        self._places, self._budget, self._like = places, budget, self._backbone.embed_tokens.weight
        self._tap = tap
        self._shapes = [(2 * layer.key_heads, layer.head_dim) for layer in self._layers]
        self._shapes += [] if tap is None else [(self._like.shape[1],)]
        self._caches: list[Tensor] = []
        self._blocks: list[Tensor] = []
        weakref.finalize(self, _give_back, self._blocks)
        self._bias_BT = self._like.new_empty(0, 0)
        self._positions_B = torch.zeros(0, dtype=torch.long, device=self._like.device)
        self._prefix: list[int] = []
        self._prefix_caches: dict[int, Tensor] = {}
        if prefix:
            self._read_prefix(list(prefix))

    @property
    def rows(self) -> int:
        """Rows that are decoded."""
        return len(self._positions_B)

    def admit(self, prompts: Sequence[Sequence[int]], copies: int) -> Tensor:
        """See `Decoder`."""
        shared = len(self._prefix)
        assert all(list(p[:shared]) == self._prefix and len(p) > shared for p in prompts), "prompts begin otherwise"
        device = self._like.device
        tokens_PT = pad_right([prompt[shared:] for prompt in prompts], 0, torch.long).to(device)
        own_P = torch.tensor([len(prompt) - shared for prompt in prompts], device=device)
        begin, end = self.rows, self.rows + len(prompts) * copies
        longest = tokens_PT.shape[1]
        self._reserve(end, shared + longest + self._budget)

        def write(i: int, new_PT: Tensor) -> Tensor:
            cache = self._caches[i][begin:end, : shared + longest]
            if shared:
                cache[:, :shared] = self._prefix_caches[i]
            cache[:, shared:] = new_PT.repeat_interleave(copies, 0) if copies > 1 else new_PT
            return cache[::copies]

        x_NH = self._read(tokens_PT, write)
        last_PH = x_NH[torch.arange(len(prompts), device=device) * longest + own_P - 1]
        lengths_B = (own_P + shared).repeat_interleave(copies)
        hidden_BT = torch.arange(self._bias_BT.shape[1], device=device) >= lengths_B[:, None]
        self._bias_BT[begin:end] = torch.zeros_like(self._bias_BT[begin:end]).masked_fill_(hidden_BT, -torch.inf)
        self._positions_B = torch.cat((self._positions_B, lengths_B))
        self._end = int(self._positions_B.max())
        return self._head(self._norm(last_PH)).repeat_interleave(copies, 0)

    def _read_prefix(self, prefix: list[int]) -> None:
        def write(i: int, new_PT: Tensor) -> Tensor:
            self._prefix_caches[i] = new_PT[0].clone()
            return new_PT

        self._read(torch.tensor([prefix], device=self._like.device), write)
        self._prefix = prefix

    def _read(self, tokens_PT: Tensor, write: Callable[[int, Tensor], Tensor]) -> Tensor:
        """All layers on tokens that stand behind the prefix: [P x T, H].

        Args:
            write: stores what is new in a cache, of a layer keys and values [P, T, 2K, D]; gives all that is to be
                looked at, the prefix's before it.
        """
        shared, (prompts, longest) = len(self._prefix), tokens_PT.shape
        columns_T = torch.arange(shared, shared + longest, device=tokens_PT.device)
        # Padding stands behind the prompt, where causal attention does not look.
        seen_TW = torch.arange(shared + longest, device=tokens_PT.device) <= columns_T[:, None]

        def attend(i: int, q_NHD: Tensor, kv_NHD: Tensor) -> Tensor:
            keys, values = write(i, kv_NHD.unflatten(0, (prompts, longest))).transpose(1, 2).chunk(2, 1)
            attended_PHTD = torch.nn.functional.scaled_dot_product_attention(
                q_NHD.unflatten(0, (prompts, longest)).transpose(1, 2),
                keys,
                values,
                attn_mask=seen_TW if shared else None,
                is_causal=not shared,
                scale=self._layers[i].scale,
                enable_gqa=True,
            )
            return attended_PHTD.transpose(1, 2).flatten(2).flatten(0, 1)

        def keep(i: int, x_NH: Tensor) -> None:
            write(i, x_NH.unflatten(0, (prompts, longest)))

        return self._run(tokens_PT, columns_T.expand(tokens_PT.shape), attend, keep)

    def step(self, tokens_B: Tensor) -> Tensor:
        """See `Decoder`."""
        self._end = min(self._end + 1, self._bias_BT.shape[1])
        logits_BV = self._decode(tokens_B, self._positions_B, self._end)
        self._positions_B = self._positions_B + 1
        return logits_BV

    def _decode(self, tokens_B: Tensor, positions_B: Tensor, end: int) -> Tensor:
        """One token per row, the rows being the first places and `end` the columns read. Nothing here waits."""
        rows, width = len(tokens_B), self._bias_BT.shape[1]
        # A row that ended at the last column may still be here; where it writes then does not matter.
        columns_B = positions_B.clamp(max=width - 1)
        flat_B = torch.arange(rows, device=columns_B.device) * width + columns_B
        self._bias_BT.view(-1).index_fill_(0, flat_B, 0.0)
        bias_B11T = self._bias_BT[:rows, None, None, :end]

        def write(i: int, new_B: Tensor) -> None:
            self._caches[i].view(-1, *self._shapes[i]).index_copy_(0, flat_B, new_B)

        def attend(i: int, q_NHD: Tensor, kv_NHD: Tensor) -> Tensor:
            write(i, kv_NHD)
            keys, values = self._caches[i][:rows, :end].transpose(1, 2).chunk(2, 1)
            # The heads that share a key are rows of one product.
            return torch.nn.functional.scaled_dot_product_attention(
                q_NHD.unflatten(1, (keys.shape[1], -1)), keys, values, attn_mask=bias_B11T, scale=self._layers[i].scale
            ).flatten(1)

        return self._head(self._norm(self._run(tokens_B[:, None], columns_B[:, None], attend, write)))

    def states(self, row: int) -> Tensor | None:
        """See `Decoder`."""
        return None if self._tap is None else self._caches[-1][row, : int(self._positions_B[row])].clone()

    def keep(self, rows: Tensor) -> None:
        """See `Decoder`."""
        moved = (rows != torch.arange(len(rows), device=rows.device)).nonzero().squeeze(1)
        self._positions_B = self._positions_B[rows]
        if not len(rows):
            return
        self._end = int(self._positions_B.max())
        if len(moved):
            sources = rows[moved]
            for cache in self._caches:
                cache[moved, : self._end] = cache[sources, : self._end]
            self._bias_BT[moved] = self._bias_BT[sources]

    def _run(
        self,
        tokens_BT: Tensor,
        positions_BT: Tensor,
        attend: Callable[[int, Tensor, Tensor], Tensor],
        keep: Callable[[int, Tensor], None],
    ) -> Tensor:
        """All layers on N = B x T tokens: [N, H].

        Args:
            attend: (layer, queries [N, heads, D], keys and values [N, 2K, D]) -> [N, E].
            keep: is given the states [N, H] at `tap`, with the index of their cache.
        """
        x_BTH = self._backbone.embed_tokens(tokens_BT)
        cos, sin = self._backbone.rotary_emb(x_BTH, positions_BT)
        first, second = sin.chunk(2, -1)
        cos_N1D, sin_N1D = cos.flatten(0, 1)[:, None], torch.cat((-first, second), -1).flatten(0, 1)[:, None]
        x_NH = x_BTH.flatten(0, 1)
        # Without version counters an operation is cheaper. The embeddings stand outside: what they keep (a rotary
        # embedding may make itself new buffers) would be of no use to training afterwards.
        with torch.inference_mode():
            for i, layer in enumerate(self._layers):
                if i == self._tap:
                    keep(len(self._layers), x_NH)
                x_NH = layer.mlp(layer.attention(x_NH, cos_N1D, sin_N1D, lambda q, kv, i=i: attend(i, q, kv)))
        return x_NH

    def _reserve(self, rows: int, width: int) -> None:
        """At least this many places and columns; what is in use stays."""
        old_rows, old_width = self._bias_BT.shape
        if rows <= old_rows and width <= old_width:
            return
        rows = max(rows, old_rows, self._places)
        width = old_width if width <= old_width else max(width, int(old_width * _GROWTH))
        old, self._bias_BT = self._bias_BT, self._like.new_full((rows, width), -torch.inf)
        self._bias_BT[: self.rows, :old_width] = old[: self.rows]
        for i, shape in enumerate(self._shapes):
            # zeros, not whatever was there: a hidden column has weight 0, and 0 times NaN is NaN
            count = rows * width * math.prod(shape)
            block = _zeros(self._like, count)
            new = block[:count].view(rows, width, *shape)
            if i < len(self._caches):
                new[: self.rows, :old_width] = self._caches[i][: self.rows]
                self._caches[i], self._blocks[i] = new, block
            else:
                self._caches.append(new)
                self._blocks.append(block)


def _zeros(like: Tensor, count: int) -> Tensor:
    """A flat tensor of at least `count` elements, the first `count` zeros; out of `_spare` if there is one."""
    for i, block in enumerate(_spare):
        if like.device == block.device and like.dtype == block.dtype and len(block) >= count:
            block[:count].zero_()
            return _spare.pop(i)
    return like.new_zeros(count)


def _give_back(blocks: list[Tensor]) -> None:
    if blocks and blocks[0].device.type == "cpu":  # a GPU has a caching allocator
        _spare[:] = blocks


class _Layer:
    """One layer's operations, on N tokens."""

    def __init__(self, layer: Any) -> None:
        self._norms = _Norm(layer.input_layernorm), _Norm(layer.post_attention_layernorm)
        attention, mlp = layer.self_attn, layer.mlp
        self.head_dim, self.scale = attention.head_dim, attention.scaling
        self.key_heads = attention.k_proj.out_features // self.head_dim
        self._heads = attention.q_proj.out_features // self.head_dim
        self._head_norms = (attention.q_norm, attention.k_norm) if hasattr(attention, "q_norm") else ()
        self._qkv = product(attention.q_proj, attention.k_proj, attention.v_proj)
        self._out = product(attention.o_proj)
        self._experts = None if hasattr(mlp, "gate_proj") else mlp
        if self._experts is None:
            self._gate, self._up = product(mlp.gate_proj, activation=mlp.act_fn), product(mlp.up_proj)
            self._down = product(mlp.down_proj)

    def attention(
        self, x_NH: Tensor, cos_N1D: Tensor, sin_N1D: Tensor, attend: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        """`x` and the attention's output, added up."""
        qkv_NHD = self._qkv(self._norms[0](x_NH)).unflatten(1, (-1, self.head_dim))
        q_NHD, rest = qkv_NHD.split((self._heads, 2 * self.key_heads), 1)
        if self._head_norms:
            keys = rest[:, : self.key_heads]
            q_NHD.copy_(self._head_norms[0](q_NHD))
            keys.copy_(self._head_norms[1](keys))
        _rotate(qkv_NHD[:, : self._heads + self.key_heads], cos_N1D, sin_N1D)
        return self._out.plus(attend(q_NHD, rest), x_NH)

    def mlp(self, x_NH: Tensor) -> Tensor:
        """`x` and the MLP's output, added up."""
        normed_NH = self._norms[1](x_NH)
        if self._experts is not None:
            return self._experts(normed_NH[:, None])[:, 0] + x_NH
        return self._down.plus(self._up.times(normed_NH, self._gate(normed_NH)), x_NH)


def _rotate(x_NHD: Tensor, cos_N1D: Tensor, sin_N1D: Tensor) -> None:
    """Rotary embedding with halves rotated, as Llama's (arXiv:2104.09864), in place; `sin`'s first half is negated."""
    swapped_NHD = x_NHD.roll(x_NHD.shape[2] // 2, 2)
    x_NHD.mul_(cos_N1D).addcmul_(swapped_NHD, sin_N1D)


class _Norm:
    """Llama's RMSNorm in fewer operations, to the bit; every other norm as it is."""

    def __init__(self, module: Any) -> None:
        self._module = module
        self._eps = getattr(module, "variance_epsilon", None)  # Llama's name for it
        if self._eps is not None:
            self._eps = torch.tensor(self._eps, device=module.weight.device)

    def __call__(self, x_NH: Tensor) -> Tensor:
        if self._eps is None:
            return self._module(x_NH)
        x32_NH = x_NH.to(torch.float32, copy=True)
        norm_N1 = torch.linalg.vector_norm(x32_NH, 2, -1, keepdim=True)
        scale_N1 = torch.addcmul(self._eps, norm_N1, norm_N1, value=1 / x_NH.shape[-1]).rsqrt_()
        return x32_NH.mul_(scale_N1).to(x_NH.dtype).mul_(self._module.weight)
