"""The count of operations: by hand on numbers small enough to follow, and against torch's own counter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from rlhf.functional.flops import Load, Shape, causal_load, forward_flops, sampling_flops, training_flops
from rlhf.models.shape import shape_of

SMALL = Shape(layers=2, layer_weights=10, query_width=4, head_weights=30)


def test_pairs_are_what_a_causal_mask_lets_through() -> None:
    lengths = [1, 2, 5]
    pairs = sum(int(torch.ones(n, n).tril().sum()) for n in lengths)
    assert causal_load(lengths) == Load(tokens=8, pairs=pairs)
    assert causal_load([3]) + causal_load([4]) == causal_load([3, 4])


def test_a_forward_by_hand() -> None:
    """3 tokens, 6 pairs: 2 layers x (2 x 10 x 3 + 4 x 4 x 6) = 312; the head at 2 positions 2 x 30 x 2 = 120."""
    assert forward_flops(SMALL, causal_load([3]), head_positions=2) == 432
    assert forward_flops(SMALL, causal_load([3]), head_positions=0, layers=1) == 156


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 3 * 432),  # forward, inputs, weights; attention has two inputs for one product
        ({"trains_weights": False}, 3 * 432 - 2 * 60),
        ({"trains_weights": False, "trains_head": False}, 3 * 432 - 2 * 60 - 120),
        ({"trained_layers": 1}, 3 * (156 + 120)),
        ({"trained_layers": 0}, 3 * 120),
    ],
)
def test_a_backward_by_hand(changes: dict[str, Any], expected: int) -> None:
    assert training_flops(SMALL, causal_load([3]), head_positions=2, **changes) == expected


def test_sampling_reads_all_but_the_last_token_once() -> None:
    """Token by token with a cache is the same work as one forward over what was read."""
    prompt, sampled = 4, 3
    by_step = forward_flops(SMALL, causal_load([prompt]), head_positions=1)
    for step in range(1, sampled):
        by_step += forward_flops(SMALL, Load(tokens=1, pairs=prompt + step), head_positions=1)
    assert sampling_flops(SMALL, [(prompt, sampled)]) == by_step
    assert sampling_flops(SMALL, [(prompt, sampled)] * 3) == 3 * by_step


# --- against torch's counter ------------------------------------------------------------------------------


@pytest.fixture
def lm(tiny: Any) -> Any:
    """Eager attention: its products are plain ones, all pairs of them."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny.path, dtype=torch.float32, attn_implementation="eager").eval()


def counted(lm: Any, *, rows: int, length: int, backward: bool) -> int:
    tokens = torch.randint(0, 40, (rows, length))
    embedded = lm.get_input_embeddings()(tokens).detach().requires_grad_(True)
    with FlopCounterMode(display=False) as counter:
        logits = lm(inputs_embeds=embedded, use_cache=False).logits
        if backward:
            logits.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize(("rows", "length"), [(1, 7), (3, 12)])
def test_the_count_is_torch_s(lm: Any, rows: int, length: int) -> None:
    """All pairs, since eager attention masks after its product."""
    shape, load = shape_of(lm), Load(rows * length, rows * length * length)
    forward = forward_flops(shape, load, head_positions=rows * length)
    assert counted(lm, rows=rows, length=length, backward=False) == forward
    training = training_flops(shape, load, head_positions=rows * length)
    assert counted(lm, rows=rows, length=length, backward=True) == training


def test_the_count_with_frozen_weights_is_torch_s(lm: Any) -> None:
    lm.requires_grad_(False)
    shape, load = shape_of(lm), Load(2 * 9, 2 * 9 * 9)
    frozen = training_flops(shape, load, head_positions=18, trains_weights=False, trains_head=False)
    assert counted(lm, rows=2, length=9, backward=True) == frozen
