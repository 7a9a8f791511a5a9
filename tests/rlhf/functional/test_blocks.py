"""Parts of a transformer layer against the plain formulas, values and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf.functional.blocks import AttentionLayout, add_lora, attention, rms_norm, swiglu


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gradients(f: Any, *inputs: Tensor) -> tuple[Tensor, ...]:
    """(value, gradient of a random projection of it to each input)."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = f(*leaves)
    return (out, *torch.autograd.grad((out * drawn(*out.shape, seed=9)).sum(), leaves))


def test_rms_norm_by_hand() -> None:
    """x = (3, 4): mean square 12.5, so 3 / sqrt(12.5) = 0.848528 and 4 / sqrt(12.5) = 1.131371; weights 1 and 2."""
    out = rms_norm(torch.tensor([[3.0, 4.0]]), torch.tensor([1.0, 2.0]), 0.0, torch.float32)
    torch.testing.assert_close(out, torch.tensor([[0.848528, 2.262742]]), atol=1e-6, rtol=0)


def test_rms_norm_is_the_plain_formula() -> None:
    def plain(x: Tensor, w: Tensor) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-2).sqrt() * w

    given = (drawn(5, 7), drawn(7, seed=1))
    torch.testing.assert_close(
        gradients(lambda x, w: rms_norm(x, w, 1e-2, torch.float32), *given), gradients(plain, *given)
    )


def test_rms_norm_without_a_trained_weight_gives_it_no_gradient() -> None:
    weight = torch.ones(4)
    x = drawn(2, 4).requires_grad_()
    rms_norm(x, weight, 0.0, torch.float32).sum().backward()
    assert weight.grad is None
    assert x.grad is not None


def test_swiglu_is_the_plain_formula() -> None:
    given = (drawn(4, 6), drawn(4, 6, seed=1))
    torch.testing.assert_close(gradients(swiglu, *given), gradients(lambda g, u: g * torch.sigmoid(g) * u, *given))


def test_an_adapter_adds_its_product() -> None:
    given = (drawn(5, 4), drawn(5, 6, seed=1), drawn(2, 6, seed=2), drawn(4, 2, seed=3))
    ours = gradients(lambda out, x, a, b: add_lora(out, x, a, b, 0.7), *given)
    theirs = gradients(lambda out, x, a, b: out + 0.7 * (x @ a.t() @ b.t()), *given)
    torch.testing.assert_close(ours, theirs)


# --- attention ------------------------------------------------------------------------------------------------

HEADS, GROUPS, D = 4, 2, 6
LENGTHS = [5, 2, 4]


def angles(positions: Tensor) -> tuple[Tensor, Tensor]:
    rates = torch.tensor([1.0, 0.3, 0.1])
    angle = positions[:, None].float() * rates
    return torch.cat([angle, angle], 1).cos(), torch.cat([angle, angle], 1).sin()


def plain_rows(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, seen: list[Tensor], scale: float) -> Tensor:
    """Row by row and head by head, with complex rotations."""
    out, start = [], 0
    for mask in seen:
        stop = start + len(mask)
        heads = []
        for h in range(HEADS):
            g = h // (HEADS // GROUPS)
            part = slice(start, stop)
            turn = torch.complex(cos[part, : D // 2], sin[part, : D // 2])

            def turned(x: Tensor, turn: Tensor = turn) -> Tensor:
                return torch.complex(x[:, : D // 2], x[:, D // 2 :]) * turn

            query, key = turned(q[part, h * D : (h + 1) * D]), turned(k[part, g * D : (g + 1) * D])
            scores = (query @ key.conj().t()).real * scale
            heads.append(scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v[part, g * D : (g + 1) * D])
        out.append(torch.cat(heads, 1))
        start = stop
    return torch.cat(out)


def packed_inputs(lengths: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    n = sum(lengths)
    return drawn(n, HEADS * D), drawn(n, GROUPS * D, seed=1), drawn(n, GROUPS * D, seed=2)


@pytest.mark.parametrize("lengths", [LENGTHS, [4, 4, 4]], ids=["ragged", "full"])
def test_attention_is_rotated_softmax_attention_within_each_row(lengths: list[int]) -> None:
    width = max(lengths)
    positions = torch.cat([torch.arange(n) for n in lengths])
    place = torch.cat([b * width + torch.arange(n) for b, n in enumerate(lengths)])
    full = len(set(lengths)) == 1
    layout = AttentionLayout(len(lengths), width, *angles(positions), None if full else place)
    seen = [torch.ones(n, n).tril().bool() for n in lengths]
    given = packed_inputs(lengths)
    ours = gradients(lambda q, k, v: attention(q, k, v, layout, 0.4), *given)
    theirs = gradients(lambda q, k, v: plain_rows(q, k, v, *angles(positions), seen, 0.4), *given)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_attention_sees_what_the_bias_leaves() -> None:
    """Two answers behind a common prompt of two tokens, as the reward model packs them."""
    owners = torch.tensor([0, 0, 1, 1, 2])
    positions = torch.tensor([0, 1, 2, 3, 2])
    seen = ((owners[:, None] == owners) | (owners == 0)).tril()
    bias = torch.zeros(1, 1, 5, 5).masked_fill(~seen, -torch.inf)
    layout = AttentionLayout(1, 5, *angles(positions), None, bias)
    given = packed_inputs([5])
    ours = gradients(lambda q, k, v: attention(q, k, v, layout, 0.4), *given)
    theirs = gradients(lambda q, k, v: plain_rows(q, k, v, *angles(positions), [seen], 0.4), *given)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_attention_in_bf16_is_that_of_float32_to_its_rounding() -> None:
    positions = torch.cat([torch.arange(n) for n in LENGTHS])
    place = torch.cat([b * 5 + torch.arange(n) for b, n in enumerate(LENGTHS)])
    layout = AttentionLayout(3, 5, *angles(positions), place)
    exact, rounded = (
        gradients(lambda q, k, v: attention(q, k, v, layout, 0.4), *(x.to(dtype) for x in packed_inputs(LENGTHS)))
        for dtype in (torch.float32, torch.bfloat16)
    )
    for a, b in zip(exact, rounded, strict=True):
        assert bool(((a - b.float()).abs() < 0.02 * a.abs().max()).all())
