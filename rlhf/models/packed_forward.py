"""The forward pass of a Llama-shaped model over packed tokens: what training and scoring run on a CPU.

transformers computes padding along and composes norms, rotary embedding and attention out of dozens of small
operations. Here the real tokens of all rows stand in one matrix, the model's own linear modules (adapters included)
are applied to it, and the rest is `functional/blocks.py`. Whether a model has the shape is tried, not read off its
name; every other model, and every GPU, goes through transformers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rlhf.functional.blocks import AttentionLayout, add_lora, attention, rms_norm, swiglu
from rlhf.models.tuning import plain_adapter
from rlhf.sharding import is_partitioned

MAX_WIDTH = 512
"""Tokens of the longest row up to which attention with all scores in memory is the faster one."""
_checked: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


@dataclass(frozen=True)
class Packing:
    """Rows that hold several answers: what each token sees (0 or -inf), and where it stands."""

    bias_B1TT: Tensor
    positions_BT: Tensor


def packed_hidden_states(
    backbone: Any,
    tokens_BT: Tensor,
    mask_BT: Tensor,
    *,
    packing: Packing | None = None,
    inputs_BTH: Tensor | None = None,
) -> Tensor:
    """Last hidden state of every real token; shape [B, T, H], zeros on padding.

    Args:
        mask_BT: which tokens are real; the rest is never computed.
        packing: None: a token sees those before it.
        inputs_BTH: goes into the first layer instead of the tokens' embeddings.
    """
    place_N = mask_BT.flatten().nonzero().squeeze(1)
    layout = _layout(backbone, mask_BT, place_N, packing)
    if inputs_BTH is None:
        x_NH = backbone.embed_tokens(tokens_BT.flatten()[place_N])
    else:
        x_NH = inputs_BTH.flatten(0, 1)[place_N]
    for layer in backbone.layers:
        x_NH = _layer(layer, x_NH, layout)
    if not isinstance(backbone.norm, nn.Identity):
        x_NH = rms_norm(x_NH, backbone.norm.weight, backbone.norm.variance_epsilon, x_NH.dtype)
    return x_NH.new_zeros(mask_BT.numel(), x_NH.shape[1]).index_copy(0, place_N, x_NH).unflatten(0, mask_BT.shape)


def _layout(backbone: Any, mask_BT: Tensor, place_N: Tensor, packing: Packing | None) -> AttentionLayout:
    """Rows without gaps: a token's column is its position, wherever the padding stood, unless a bias names columns."""
    rows, width = mask_BT.shape
    column_BT = (mask_BT.long().cumsum(1) - 1).clamp(min=0) if packing is None else packing.positions_BT
    position_N = column_BT.flatten()[place_N]
    cos_1ND, sin_1ND = backbone.rotary_emb(torch.zeros(1, device=mask_BT.device), position_N[None])
    if packing is None:
        place_N = place_N // width * width + position_N
    full = len(place_N) == rows * width
    bias_B1TT = None if packing is None else packing.bias_B1TT
    return AttentionLayout(rows, width, cos_1ND[0], sin_1ND[0], None if full else place_N, bias_B1TT)


def _layer(layer: Any, x_NH: Tensor, layout: AttentionLayout) -> Tensor:
    if getattr(layer, "gradient_checkpointing", False) and layer.training and torch.is_grad_enabled():
        return checkpoint(_compute_layer, layer, x_NH, layout, use_reentrant=False)
    return _compute_layer(layer, x_NH, layout)


def _compute_layer(layer: Any, x_NH: Tensor, layout: AttentionLayout) -> Tensor:
    attn, mlp = layer.self_attn, layer.mlp
    h_NH = _norm(layer.input_layernorm, x_NH)
    q_NE, k_NE, v_NE = (_product(module, h_NH) for module in (attn.q_proj, attn.k_proj, attn.v_proj))
    if hasattr(attn, "q_norm"):
        q_NE, k_NE = (_head_norm(n, x, attn.head_dim) for n, x in ((attn.q_norm, q_NE), (attn.k_norm, k_NE)))
    x_NH = x_NH + _product(attn.o_proj, attention(q_NE, k_NE, v_NE, layout, attn.scaling))
    h_NH = _norm(layer.post_attention_layernorm, x_NH)
    gated_NF = swiglu(_product(mlp.gate_proj, h_NH), _product(mlp.up_proj, h_NH))
    return x_NH + _product(mlp.down_proj, gated_NF)


def _product(module: Any, x_NH: Tensor) -> Tensor:
    """A linear layer; its adapter, if it has one, in the dtype of the products: peft's goes through float32."""
    adapter = plain_adapter(module)
    if adapter is None:
        return module(x_NH)
    base, a_RH, b_ER, scale = adapter
    return add_lora(base(x_NH), x_NH, a_RH, b_ER, scale)


def _norm(norm: Any, x_NH: Tensor) -> Tensor:
    """In the dtype of the products that follow: under autocast each of them would convert it anew."""
    device = x_NH.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x_NH.dtype
    return rms_norm(x_NH, norm.weight, norm.variance_epsilon, dtype)


def _head_norm(norm: Any, x_NE: Tensor, head_dim: int) -> Tensor:
    return norm(x_NE.unflatten(1, (-1, head_dim))).flatten(1)


def runs_packed(backbone: Any, width: int) -> bool:
    """Whether `packed_hidden_states` is to be used: on a CPU, for rows of at most `MAX_WIDTH`, if the model agrees.

    Not under ZeRO-3, which brings weights to the modules that are called: here some are read without a call.
    """
    if not isinstance(getattr(backbone, "layers", None), nn.ModuleList) or width > MAX_WIDTH:
        return False
    if backbone.device.type != "cpu" or any(map(is_partitioned, backbone.parameters())):
        return False
    if backbone not in _checked:
        _checked[backbone] = _agrees(backbone)
    return _checked[backbone]


@torch.no_grad()
def _agrees(backbone: Any) -> bool:
    """Tried once per model, on a few tokens of ragged rows."""
    if not len(backbone.layers) or has_window(backbone.config):
        return False
    if getattr(backbone.layers[0].mlp, "act_fn", None).__class__.__name__ not in ("SiLU", "SiLUActivation"):
        return False
    size = backbone.config.vocab_size
    # From all over the vocabulary: on a few special tokens bf16 itself is far from float32.
    tokens_BT = (torch.arange(10).view(2, 5) * 7919 + 11) % size
    mask_BT = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    with agreed_precision(backbone) as tolerance:
        try:
            ours = packed_hidden_states(backbone, tokens_BT, mask_BT)[mask_BT].float()
        except (AttributeError, TypeError, ValueError, RuntimeError, IndexError):
            return False
        theirs = backbone(input_ids=tokens_BT, use_cache=False).last_hidden_state[mask_BT].float()
    return float((theirs - ours).norm()) <= tolerance * float(theirs.norm())


@contextlib.contextmanager
def agreed_precision(backbone: Any) -> Iterator[float]:
    """To compare two ways through a model; yields by how much they may differ, relative to the states' norm.

    Trained layers may be float32 over frozen ones in bf16: those multiply in bf16, as they will in the run.
    """
    dtypes = {p.dtype for p in backbone.parameters()}
    with torch.autocast(backbone.device.type, dtype=torch.bfloat16, enabled=len(dtypes) > 1):
        yield 1e-3 if dtypes == {torch.float32} else 0.1


def has_window(config: Any) -> bool:
    """Layers that see a window only would need their own masks."""
    return any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or []) or bool(
        getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    )
