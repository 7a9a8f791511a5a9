"""Data order as a stateless function of (seed, index): the same for any number of ranks, resumed by one integer."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch


def seed_of(*key: object) -> int:
    """63 bits that depend on what they are for, e.g. (seed, "sample", position)."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big") >> 1


def generator_for(*key: object) -> torch.Generator:
    """A generator seeded by what it is for. Nothing to save, nothing to restore."""
    return torch.Generator().manual_seed(seed_of(*key))


def row_at(index: int, rows: int, seed: int) -> int:
    """Row that stands at position `index` of an endless stream; each epoch is a fresh permutation."""
    epoch, position = divmod(index, rows)
    return int(_permutation(rows, seed, epoch)[position])


def share_of(count: int, *, rank: int, world_size: int) -> range:
    """This rank's part of `count` things: the ranks' parts one behind the other are all of them in order."""
    return range(count * rank // world_size, count * (rank + 1) // world_size)


def positions_of_step(step: int, size: int, *, rank: int = 0, world_size: int = 1) -> range:
    """This rank's `size` positions in 0-based `step`; all ranks together take `size * world_size` consecutive ones."""
    first = (step * world_size + rank) * size
    return range(first, first + size)


def rows_for_step(step: int, size: int, rows: int, *, seed: int, rank: int = 0, world_size: int = 1) -> list[int]:
    """The rows that stand at `positions_of_step`."""
    return [row_at(i, rows, seed) for i in positions_of_step(step, size, rank=rank, world_size=world_size)]


def rows_of_batch(index: int, size: int, rows: int, *, seed: int, epoch: int) -> list[int]:
    """Rows of the 0-based batch `index` of an epoch, each row once an epoch; the last batch may be short."""
    start = epoch * rows
    return [row_at(start + i, rows, seed) for i in range(index * size, min(rows, (index + 1) * size))]


def deal(rows: Sequence[int], *, micro_batch_size: int, rank: int = 0, world_size: int = 1) -> list[list[int]]:
    """This rank's micro-batches of one batch: every row goes to one rank, and all ranks get as many micro-batches.

    Where rows are short a micro-batch may be empty: the ranks exchange gradients in step.
    """
    largest_share = -(-len(rows) // world_size)
    mine = list(rows[rank::world_size])
    return [mine[i : i + micro_batch_size] for i in range(0, largest_share, micro_batch_size)]


_cache: dict[tuple[int, int, int], list[int]] = {}


def _permutation(rows: int, seed: int, epoch: int) -> list[int]:
    key = (rows, seed, epoch)
    if key not in _cache:
        if len(_cache) > 8:  # a few epochs at most are in use at a time
            _cache.clear()
        _cache[key] = torch.randperm(rows, generator=generator_for(seed, "order", epoch)).tolist()
    return _cache[key]
