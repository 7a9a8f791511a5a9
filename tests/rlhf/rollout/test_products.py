"""Packed products against the layers themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from rlhf.rollout.products import _Packed, _Plain, product


def layers(dtype: torch.dtype, *, bias: bool = True) -> list[nn.Linear]:
    torch.manual_seed(0)
    return [nn.Linear(32, n, bias=bias and n != 16).to(dtype) for n in (48, 16)]


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", [None, nn.SiLU(), nn.GELU()])
def test_layers_side_by_side(dtype: torch.dtype, activation: Any) -> None:
    mine, x = layers(dtype), torch.randn(5, 32, dtype=dtype)
    wanted = torch.cat([layer.float()(x.float()) for layer in layers(dtype)], 1)
    out = product(*mine, activation=activation)(x)
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), activation(wanted) if activation else wanted, atol=0.02, rtol=0.01)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_follows_the_product(dtype: torch.dtype) -> None:
    (layer, _), x, other = layers(dtype), torch.randn(5, 32, dtype=dtype), torch.randn(5, 48, dtype=dtype)
    kept, wanted = other.clone(), layers(dtype)[0].float()(x.float())
    torch.testing.assert_close(product(layer).plus(x, other).float(), wanted + other.float(), atol=0.02, rtol=0.01)
    torch.testing.assert_close(product(layer).times(x, other).float(), wanted * other.float(), atol=0.02, rtol=0.01)
    assert torch.equal(other, kept)


def test_only_plain_linear_layers_in_bf16_are_packed() -> None:
    class Adapted(nn.Linear):
        pass

    packed = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert isinstance(product(*layers(torch.bfloat16)), _Packed if packed else _Plain)
    assert isinstance(product(*layers(torch.float32)), _Plain)
    assert isinstance(product(Adapted(4, 4).to(torch.bfloat16)), _Plain)
