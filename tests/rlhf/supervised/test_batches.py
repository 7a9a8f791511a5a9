"""Batches of supervised fine-tuning: the same rows in every optimizer step, however they are split."""

from __future__ import annotations

from itertools import chain
from typing import Any

import pytest

from rlhf.data.order import deal, row_at, rows_of_batch
from rlhf.supervised.batches import GlobalBatches, Split, loader


def test_rows_are_dealt_like_cards() -> None:
    rows = [10, 11, 12, 13, 14, 15, 16]
    assert deal(rows, micro_batch_size=3) == [[10, 11, 12], [13, 14, 15], [16]]
    assert deal(rows, micro_batch_size=2, rank=0, world_size=2) == [[10, 12], [14, 16]]
    assert deal(rows, micro_batch_size=2, rank=1, world_size=2) == [[11, 13], [15]]


def test_every_rank_gets_as_many_micro_batches_though_some_are_empty() -> None:
    assert [deal([7], micro_batch_size=4, rank=r, world_size=3) for r in range(3)] == [[[7]], [[]], [[]]]
    assert [deal([5, 6, 7], micro_batch_size=1, rank=r, world_size=2) for r in range(2)] == [[[5], [7]], [[6], []]]


def test_a_batch_is_a_stretch_of_the_epochs_order() -> None:
    order = [row_at(11 + i, 11, seed=3) for i in range(11)]  # epoch 1 of 11 rows
    assert [rows_of_batch(i, 4, 11, seed=3, epoch=1) for i in range(3)] == [order[:4], order[4:8], order[8:]]
    assert sorted(order) == list(range(11))


@pytest.mark.parametrize("rows", [8, 11, 13])
@pytest.mark.parametrize(("micro", "ranks"), [(8, 1), (2, 1), (3, 1), (4, 2), (1, 2), (2, 4), (1, 8)])
def test_every_split_reads_the_same_rows_in_every_step(rows: int, micro: int, ranks: int) -> None:
    def passes(split: Split, epoch: int) -> list[list[int]]:
        batches = GlobalBatches(rows, split, seed=5)
        batches.set_epoch(epoch)
        assert len(batches) == len(list(batches))
        return list(batches)

    accumulation = -(-8 // (micro * ranks))
    for epoch in (0, 1):
        of_rank = [passes(Split(8, micro, rank, ranks), epoch) for rank in range(ranks)]
        assert len({len(batches) for batches in of_rank}) == 1
        for step in range(-(-rows // 8)):
            stretch = slice(step * accumulation, (step + 1) * accumulation)
            read = list(chain.from_iterable(chain.from_iterable(batches[stretch] for batches in of_rank)))
            assert sorted(read) == sorted(rows_of_batch(step, 8, rows, seed=5, epoch=epoch))


def test_without_a_seed_rows_come_as_they_stand() -> None:
    assert list(GlobalBatches(5, Split(4, 2, rank=1, world_size=2), seed=None)) == [[1, 3], []]


def test_an_empty_micro_batch_is_a_row_that_trains_nothing() -> None:
    from datasets import Dataset

    dataset = Dataset.from_dict({"input_ids": [[4, 5], [6, 7]], "labels": [[-100, 5], [-100, 7]]})

    def collate(rows: list[Any]) -> list[Any]:
        return rows

    batches = list(loader(dataset, GlobalBatches(1, Split(2, 1, rank=1, world_size=2), seed=None), collate))
    assert batches == [[{"input_ids": [0, 0], "labels": [-100, -100]}]]
