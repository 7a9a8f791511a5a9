"""Batches of supervised fine-tuning: the rows of an optimizer step are the same for any split over ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch.utils.data import DataLoader, Sampler

from rlhf.data.order import deal, rows_of_batch


@dataclass(frozen=True)
class Split:
    """How a batch is shared out: `size` rows of all ranks, read in micro-batches."""

    size: int
    micro_batch_size: int
    rank: int = 0
    world_size: int = 1


class GlobalBatches(Sampler[list[int]]):
    """One rank's micro-batches of an epoch, row numbers each, as a function of (seed, epoch) alone.

    Args:
        seed: of the order; None reads the rows as they stand.
    """

    def __init__(self, rows: int, split: Split, *, seed: int | None) -> None:
        self._rows, self._split, self._seed = rows, split, seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """The next pass is that of `epoch`."""
        self._epoch = epoch

    def __len__(self) -> int:
        full, rest = divmod(self._rows, self._split.size)
        return full * len(self._dealt(range(self._split.size))) + len(self._dealt(range(rest)))

    def __iter__(self) -> Iterator[list[int]]:
        for index in range(-(-self._rows // self._split.size)):
            yield from self._dealt(self._batch(index))

    def _batch(self, index: int) -> list[int] | range:
        size = self._split.size
        if self._seed is None:
            return range(index * size, min(self._rows, (index + 1) * size))
        return rows_of_batch(index, size, self._rows, seed=self._seed, epoch=self._epoch)

    def _dealt(self, rows: list[int] | range) -> list[list[int]]:
        split = self._split
        return deal(rows, micro_batch_size=split.micro_batch_size, rank=split.rank, world_size=split.world_size)


class EpochLoader(DataLoader):
    """A loader whose order `transformers.Trainer` sets by epoch; resuming skips row numbers, and reads no row."""

    batch_sampler: Any

    def set_epoch(self, epoch: int) -> None:
        """The next pass is that of `epoch`."""
        self.batch_sampler.set_epoch(epoch)


def loader(dataset: Any, batches: GlobalBatches, collate: Callable[[Any], Any], **settings: Any) -> EpochLoader:
    """Micro-batches of `dataset`, a tokenized one of TRL's; an empty one is a row that trains nothing."""
    filler = {"input_ids": [0, 0], "labels": [-100, -100], "seq_lengths": [2]}
    row = {name: filler[name] for name in dataset.column_names}
    return EpochLoader(dataset, batch_sampler=batches, collate_fn=partial(_collated, collate, row), **settings)


def _collated(collate: Callable[[Any], Any], filler: dict[str, list[int]], rows: list[Any]) -> Any:
    return collate(rows or [filler])
