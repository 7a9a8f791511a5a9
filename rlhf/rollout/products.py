"""Products with the weights of linear layers, packed once for many small batches.

A decoding step multiplies a few rows with every weight of the model. oneDNN keeps weights in blocks; from a plain
matrix it makes the blocks anew in every call, which at 16 to 64 rows costs as much as the product. `product` packs
them once where that is possible (bf16 on a CPU that has bf16 products), several layers of one input as one matrix,
with what follows the product done in its registers. A packed copy is as large as the weights and does not follow
them: make it anew when they change. Elsewhere the layers themselves are called.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

_ROWS = 64
"""Rows for which the blocks are chosen; others work too, a little slower."""


class Product(Protocol):
    """`x_BI` times the transposed weights of some linear layers, side by side; then perhaps an activation."""

    def __call__(self, x_BI: Tensor) -> Tensor:
        """[B, O], O the sum of the layers' outputs; a new tensor."""
        ...

    def plus(self, x_BI: Tensor, other_BO: Tensor) -> Tensor:
        """The product and `other_BO` added up."""
        ...

    def times(self, x_BI: Tensor, other_BO: Tensor) -> Tensor:
        """The product, element by element times `other_BO`."""
        ...


def product(*layers: Any, activation: Any = None) -> Product:
    """The fastest product with these layers' present weights, `activation` applied to it."""
    kind = _Packed if all(map(_packable, layers)) else _Plain
    return kind(layers, activation)


def _packable(layer: Any) -> bool:
    return (
        type(layer) is nn.Linear  # a subclass may compute something else
        and layer.weight.dtype == torch.bfloat16
        and layer.weight.device.type == "cpu"
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def _is_silu(activation: Any) -> bool:
    """Told by its values: transformers has a class of its own for it."""
    x = torch.linspace(-9, 9, 37)
    return torch.equal(activation(x), nn.functional.silu(x))


class _Plain:
    """The layers, called one by one."""

    def __init__(self, layers: tuple[Any, ...], activation: Any) -> None:
        self._layers, self._activation = layers, activation

    def __call__(self, x_BI: Tensor) -> Tensor:
        parts = [layer(x_BI) for layer in self._layers]
        out_BO = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        return self._activation(out_BO) if self._activation else out_BO

    def plus(self, x_BI: Tensor, other_BO: Tensor) -> Tensor:
        return self(x_BI).add_(other_BO)

    def times(self, x_BI: Tensor, other_BO: Tensor) -> Tensor:
        return self(x_BI).mul_(other_BO)


class _Packed:
    """One packed matrix."""

    def __init__(self, layers: tuple[Any, ...], activation: Any) -> None:
        weights = [layer.weight.detach() for layer in layers]
        weight = weights[0] if len(weights) == 1 else torch.cat(weights)
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS)
        self._bias = None
        if any(layer.bias is not None for layer in layers):
            parts = [
                layer.weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias for layer in layers
            ]
            self._bias = torch.cat([part.detach() for part in parts])
        fused = activation is not None and _is_silu(activation)
        self._fused, self._activation = "swish" if fused else "none", None if fused else activation

    def __call__(self, x_BI: Tensor) -> Tensor:
        out_BO = torch.ops.mkldnn._linear_pointwise(x_BI, self._weight, self._bias, self._fused, [], "")
        return self._activation(out_BO) if self._activation else out_BO

    def plus(self, x_BI: Tensor, other_BO: Tensor) -> Tensor:
        return self._with(x_BI, other_BO, "add")

    def times(self, x_BI: Tensor, other_BO: Tensor) -> Tensor:
        return self._with(x_BI, other_BO, "mul")

    def _with(self, x_BI: Tensor, other_BO: Tensor, how: str) -> Tensor:
        assert self._fused == "none", "an activation stands alone"
        assert self._activation is None, "an activation stands alone"
        return torch.ops.mkldnn._linear_pointwise.binary(x_BI, other_BO, self._weight, self._bias, how)
