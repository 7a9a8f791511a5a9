"""Bytes: by hand, against the figures of the papers, and against what autograd keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_models import LLAMA_SHAPE
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf.config_schema import TuningConfig
from rlhf.functional.flops import Shape
from rlhf.functional.memory import (
    Dimensions,
    Forward,
    Memory,
    activations,
    converted_weights,
    head_tile,
    kept_per_token,
    kv_cache,
    sampling_logits,
    sharded,
    trained_state,
    working_set,
)
from rlhf.models.packed_forward import packed_hidden_states
from rlhf.models.shape import dimensions_of
from rlhf.models.tuning import apply_tuning

SHAPE = Shape(layers=2, layer_weights=12, query_width=8, head_weights=40, matrices=((2, 3), (3, 2)))
DIMS = Dimensions(
    shape=SHAPE,
    hidden=4,
    heads=2,
    key_width=4,
    mlp_width=6,
    layer_parameters=20,
    embedding=40,
    outputs=0,
    further=4,
    vocabulary=10,
)


@pytest.mark.parametrize(("stage", "gigabytes"), [(0, 120.0), (1, 31.4), (2, 16.6), (3, 1.9)])
def test_the_figure_of_the_zero_paper(stage: int, gigabytes: float) -> None:
    """arXiv:1910.02054, figure 1: 7.5B parameters, 64 ranks; 2 + 2 + 12 bytes per parameter."""
    p = 7.5e9
    assert round(sum(sharded(2 * p, 2 * p, 12 * p, stage=stage, ranks=64)) / 1e9, 1) == gigabytes


def test_there_is_no_fourth_stage() -> None:
    with pytest.raises(ValueError, match="0 to 3"):
        sharded(1, 1, 1, stage=4, ranks=2)


def test_the_state_of_a_trained_parameter_by_hand() -> None:
    """float32 weight, gradient and two moments; DDP's buckets 4; DeepSpeed's copies of weight and gradient 8."""
    assert trained_state(10, stage=0, ranks=1) == Memory(40, 40, 80)
    assert trained_state(10, stage=0, ranks=4) == Memory(40, 80, 80)
    assert trained_state(10, stage=1, ranks=4) == Memory(40, 40, 40)
    assert trained_state(10, stage=2, ranks=4) == Memory(40, 10, 40)
    assert trained_state(10, stage=3, ranks=4) == Memory(10, 10, 40)


def test_the_third_stage_on_n_ranks_is_an_nth_of_it_on_one() -> None:
    assert trained_state(700, stage=3, ranks=7).total * 7 == trained_state(700, stage=3, ranks=1).total


def test_parameters_by_hand() -> None:
    assert DIMS.parameters == 2 * 20 + 40 + 4
    assert DIMS.top(1) == 24
    assert DIMS.adapters(rank=5, layers=2) == 2 * 5 * (5 + 5)


def test_decoding_by_hand() -> None:
    """Keys and values of 2 layers x 4 numbers; 10 logits, in 2 bytes and three times in 4."""
    assert kv_cache(DIMS, rows=3, width=5, size=2) == 2 * 2 * 4 * 3 * 5 * 2
    assert sampling_logits(DIMS, rows=3, size=2) == 3 * 10 * (2 + 12)
    assert head_tile(DIMS, (512, 2048), actions=3, size=2) == 3 * 10 * (2 + 12)
    assert head_tile(DIMS, (2, 4), actions=3, size=2) == 2 * 4 * (2 + 12)


def test_what_a_layer_keeps_by_hand() -> None:
    """H 4, E 8, K 4, F 6, two heads; bf16 products over float32 states."""
    how = Forward(size=2, stream=4, packed=True)
    kept = 2 * (4 * 4 + 2 * 4) + 2 * (2 * 8 + 2 * 4) + 4 * 2 + 3 * 2 * 6
    assert kept_per_token(DIMS, how) == kept
    assert activations(DIMS, how, rows=3, width=5, layers=2) == 15 * (2 * kept + 3 * 16)
    recomputed = Forward(size=2, stream=4, packed=True, recomputes=True)
    assert activations(DIMS, recomputed, rows=3, width=5, layers=2) == 15 * (2 * 16 + kept + 3 * 16)


def test_weights_are_converted_where_they_are_float32() -> None:
    assert converted_weights(DIMS, Forward(2, 4, packed=True), layers=2) == 2 * 2 * 12
    assert converted_weights(DIMS, Forward(4, 4, packed=True), layers=2) == 0
    assert converted_weights(DIMS, Forward(2, 2, packed=True, trains_weights=False, rank=4), layers=2) == 0


def test_attention_grows_with_the_square_of_the_width_where_its_scores_are_kept() -> None:
    packed, flash = (Forward(2, 4, packed=packed) for packed in (True, False))
    assert working_set(DIMS, packed, rows=2, width=1000) == 3 * 4 * 2 * 2 * 1000**2
    assert working_set(DIMS, flash, rows=2, width=1000) == 4 * 2 * 6 * 2000 + (2 + 4) * 6


def kept_by_autograd(model: Any, forward: Any) -> int:
    """Bytes of all storages that a forward saves, but for those of parameters."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, Any] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    assert output.requires_grad
    return sum(storage.nbytes() for storage in found.values())


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_layer_keeps_what_autograd_says(packed: bool, precision: str, kind: Any) -> None:
    """The difference between four layers and two, to 2%: norms also keep one number per token."""
    measured, how, dims = [], None, None
    for layers in (2, 4):
        size = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 8, "num_hidden_layers": layers}
        config = LlamaConfig(**{**LLAMA_SHAPE, **size})
        model = LlamaForCausalLM(config)
        if kind == "lora" and precision == "bf16":
            model = model.bfloat16()
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        apply_tuning(model, TuningConfig(kind=kind, rank=4), dtype)
        tokens_BT = torch.randint(0, 60, (4, 48), generator=torch.Generator().manual_seed(0))

        def forward(model: Any = model, tokens_BT: torch.Tensor = tokens_BT) -> torch.Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
                if packed:
                    return packed_hidden_states(model.model, tokens_BT, torch.ones_like(tokens_BT).bool())
                return model.model(input_ids=tokens_BT, use_cache=False).last_hidden_state

        full, number = kind == "full", 2 if precision == "bf16" else 4
        stream = 4 if full or precision == "fp32" else 2
        how = Forward(number, stream, packed=packed, trains_weights=full, rank=0 if full else 4)
        dims = dimensions_of(config)
        measured.append(kept_by_autograd(model, forward) - converted_weights(dims, how, layers=layers))
    assert how is not None
    assert dims is not None
    assert kept_per_token(dims, how) * 4 * 48 == pytest.approx((measured[1] - measured[0]) / 2, rel=0.02)
