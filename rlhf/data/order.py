"""Data order as a stateless function of (seed, index): the same for any number of ranks, resumed by one integer."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch


def generator_for(*key: object, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator seeded by what it is for, e.g. (seed, "sample", step, rank). Nothing to save, nothing to restore."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator(device=device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def row_at(index: int, rows: int, seed: int) -> int:
    """Row that stands at position `index` of an endless stream; each epoch is a fresh permutation."""
    epoch, position = divmod(index, rows)
    return int(_permutation(rows, seed, epoch)[position])


def rows_for_step(step: int, size: int, rows: int, *, seed: int, rank: int = 0, world_size: int = 1) -> list[int]:
    """This rank's `size` rows of 0-based `step`; all ranks together take `size * world_size` consecutive positions."""
    first = (step * world_size + rank) * size
    return [row_at(i, rows, seed) for i in range(first, first + size)]


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
