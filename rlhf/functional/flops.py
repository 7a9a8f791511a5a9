"""Floating-point operations that a decoder-only transformer needs: counted from shapes, not from what was run.

    product of [M, K] and [K, N]        2 M K N
    layer, per token                    2 x weights of its matrices
    attention, per (query, key) pair    4 x width of all query heads: one product for the scores, one for the values
    head, per position it is read at    2 x weights of the head
    backward                            as much again for the inputs, and as much again for the weights that learn

These are model FLOPs: work that the result needs. Not counted are padding, keys to the right of a query, products
made a second time to save memory, embeddings, norms, and adapters (some percent of their layer).
The convention is that of model FLOP utilisation, Chowdhery et al. 2022 (arXiv:2204.02311), appendix B.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """What decides the work of a transformer whose layers are alike.

    Attributes:
        layers: number of layers.
        layer_weights: entries of all matrices of one layer.
        query_width: query heads x size of a head.
        head_weights: entries of the head; H x V for a language model, H for a scalar model.
        matrices: (out, in) of one layer's matrices.
    """

    layers: int
    layer_weights: int
    query_width: int
    head_weights: int
    matrices: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Load:
    """What is read: counts over the rows of a batch, which add up."""

    tokens: int = 0
    pairs: int = 0

    def __add__(self, other: Load) -> Load:
        return Load(self.tokens + other.tokens, self.pairs + other.pairs)


def causal_load(lengths: Iterable[int]) -> Load:
    """Rows of the given lengths, unpadded; every token sees itself and those before: n (n + 1) / 2 pairs per row."""
    rows = list(lengths)
    return Load(sum(rows), sum(n * (n + 1) // 2 for n in rows))


def forward_flops(shape: Shape, load: Load, *, head_positions: int, layers: int | None = None) -> int:
    """One forward over `load`, with the head at `head_positions` of it; `layers`: of so many only, default all."""
    per_layer = 2 * shape.layer_weights * load.tokens + 4 * shape.query_width * load.pairs
    return (shape.layers if layers is None else layers) * per_layer + 2 * shape.head_weights * head_positions


def training_flops(
    shape: Shape,
    load: Load,
    *,
    head_positions: int,
    trained_layers: int | None = None,
    trains_weights: bool = True,
    trains_head: bool = True,
) -> int:
    """One forward and one backward.

    Args:
        trained_layers: only the top ones run, forward and backward (what lies below them was computed before);
            None: all.
        trains_weights: False for adapters over frozen weights, whose backward makes no gradient of the weights.
        trains_head: False for a frozen head; its input's gradient is made all the same.

    The gradient of the lowest layer's input is counted, whether or not anything below it learns.
    """
    layers = shape.layers if trained_layers is None else trained_layers
    forward = forward_flops(shape, load, head_positions=head_positions, layers=layers)
    weights = 2 * layers * shape.layer_weights * load.tokens if trains_weights else 0
    head = 2 * shape.head_weights * head_positions if trains_head else 0
    # Queries, keys and values are all inputs: attention's backward is twice its forward, whatever learns.
    attention = 4 * layers * shape.query_width * load.pairs
    return 2 * forward + attention + weights + head


def sampling_flops(shape: Shape, rows: Iterable[tuple[int, int]]) -> int:
    """Drawing answers with a cache of keys and values.

    Args:
        rows: (prompt tokens, sampled tokens) of every answer. The last sampled token need not be read; every sampled
            token needs the head once. Prompts are counted once per answer.
    """
    pairs = list(rows)
    read = causal_load(prompt + sampled - 1 for prompt, sampled in pairs)
    return forward_flops(shape, read, head_positions=sum(sampled for _, sampled in pairs))
