"""The rollout buffer: padding by masks, Parquet there and back, minibatches that lose and repeat nothing."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from rlhf.data.order import generator_for, row_at, rows_for_step
from rlhf.errors import DataError
from rlhf.rollout.buffer import RolloutBuffer, cut_into, micro_batch_rows, minibatch_rows, pad_right
from rlhf.types import Rollout, StopReason

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": 'Why? \u2603 "quoted"'}]


def rollouts() -> list[Rollout]:
    return [
        Rollout(
            "why",
            "so",
            [5, 6, 3],
            [False, True, True],
            [0.0, -0.5, -1.25],
            StopReason.EOS,
            "a",
            -2.5,
            1.5,
            "sft",
            4,
            0.25,
        ),
        Rollout(CHAT, "", [5, 6, 7, 8], [False, False, False, True], [0.0, 0.0, 0.0, -3.0], StopReason.LENGTH),
    ]


def test_a_batch_is_padded_on_the_right_under_its_masks() -> None:
    batch = RolloutBuffer(rollouts()).batch()
    assert batch.tokens_BT.shape == (2, 4)
    assert batch.attention_mask_BT.tolist() == [[True, True, True, False], [True] * 4]
    assert batch.action_mask_BT.tolist() == [[False, True, True, False], [False, False, False, True]]
    assert batch.sampler_logprobs_BT.tolist() == [[0, -0.5, -1.25, 0], [0, 0, 0, -3]]
    assert batch.tokens_BT[batch.attention_mask_BT].tolist() == [5, 6, 3, 5, 6, 7, 8]
    assert batch.scores_B.tolist() == pytest.approx([-2.5, float("nan")], nan_ok=True), "a 0 would be a reward"
    assert batch.truncated_B.tolist() == [False, True]


def test_a_selection_is_cut_to_its_longest_row() -> None:
    part = RolloutBuffer(rollouts()).batch().select(torch.tensor([0]))
    assert part.tokens_BT.tolist() == [[5, 6, 3]]
    assert (part.action_mask_BT.shape, part.scores_B.tolist()) == ((1, 3), [-2.5])


def test_an_empty_buffer_has_no_batch() -> None:
    with pytest.raises(DataError, match="empty"):
        RolloutBuffer().batch()


def test_parquet_brings_everything_back(tmp_path: Path) -> None:
    buffer = RolloutBuffer(rollouts())
    buffer.to_parquet(tmp_path / "deep" / "r.parquet")
    assert RolloutBuffer.from_parquet(tmp_path / "deep" / "r.parquet").rollouts == buffer.rollouts
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["r.parquet"]


def test_a_state_dict_brings_everything_back() -> None:
    again = RolloutBuffer()
    again.load_state_dict(RolloutBuffer(rollouts()).state_dict())
    assert again.rollouts == rollouts()


def test_a_file_of_version_1_has_no_disagreement(tmp_path: Path) -> None:
    path = tmp_path / "r.parquet"
    RolloutBuffer(rollouts()).to_parquet(path)
    table = pq.read_table(path).drop_columns("score_std")
    pq.write_table(table.replace_schema_metadata({"rlhf_schema": "1"}), path)
    old = RolloutBuffer.from_parquet(path).rollouts
    assert [(r.score, r.score_std, r.tokens) for r in old] == [(-2.5, None, [5, 6, 3]), (None, None, [5, 6, 7, 8])]


def test_another_schema_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.parquet"
    RolloutBuffer(rollouts()).to_parquet(path)
    table = pq.read_table(path)
    pq.write_table(table.replace_schema_metadata({"rlhf_schema": "99"}), path)
    with pytest.raises(DataError, match="schema 99, this program reads 1 and 2"):
        RolloutBuffer.from_parquet(path)


def test_a_parquet_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"x": [1]}), tmp_path / "r.parquet")
    with pytest.raises(DataError, match="schema 0"):
        RolloutBuffer.from_parquet(tmp_path / "r.parquet")


def test_what_is_not_parquet_is_refused(tmp_path: Path) -> None:
    (tmp_path / "r.parquet").write_text("no")
    with pytest.raises(DataError, match="not a Parquet file"):
        RolloutBuffer.from_parquet(tmp_path / "r.parquet")
    with pytest.raises(DataError, match="no rollouts at"):
        RolloutBuffer.from_parquet(tmp_path / "absent.parquet")


def test_pad_right() -> None:
    assert pad_right([[1], [2, 3]], 9, torch.long).tolist() == [[1, 9], [2, 3]]


# --- minibatches ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "parts"), [(8, 1), (8, 4), (10, 5), (3, 3)])
def test_minibatches_partition_the_rows_evenly(rows: int, parts: int) -> None:
    cut = minibatch_rows(rows, parts, torch.Generator().manual_seed(0))
    assert sorted(torch.cat(cut).tolist()) == list(range(rows))
    assert [len(part) for part in cut] == [rows // parts] * parts


def test_minibatches_are_chosen_anew_each_epoch() -> None:
    generator = torch.Generator().manual_seed(0)
    epochs = [torch.cat(minibatch_rows(16, 2, generator)).tolist() for _ in range(3)]
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_any_row_may_come_into_any_minibatch() -> None:
    generator = torch.Generator().manual_seed(0)
    assert {int(minibatch_rows(8, 4, generator)[0][1]) for _ in range(100)} == {4, 5, 6, 7}


@pytest.mark.parametrize("world_size", [2, 4])
def test_minibatches_hold_the_same_rows_for_any_number_of_ranks(world_size: int) -> None:
    def draws() -> torch.Generator:
        return torch.Generator().manual_seed(3)

    size = 16 // world_size
    alone = [set(rows.tolist()) for rows in minibatch_rows(16, 4, draws())]
    together: list[set[int]] = [set() for _ in alone]
    for rank in range(world_size):
        for found, rows in zip(
            together, minibatch_rows(size, 4, draws(), rank=rank, world_size=world_size), strict=True
        ):
            found |= {rank * size + row for row in rows.tolist()}
    assert together == alone


LENGTHS = torch.tensor([9, 2, 7, 4, 4, 1, 8])


@pytest.mark.parametrize("size", [1, 2, 3, 5, 100])
def test_micro_batches_partition_a_minibatch_by_length(size: int) -> None:
    rows = torch.tensor([6, 0, 3, 1, 4])
    cut = micro_batch_rows(rows, LENGTHS, size)
    flat = torch.cat(cut)
    assert sorted(flat.tolist()) == [0, 1, 3, 4, 6]
    assert LENGTHS[flat].tolist() == [2, 4, 4, 8, 9]
    assert [len(part) for part in cut] == [size] * (5 // size) + [5 % size] * (5 % size > 0)


@pytest.mark.parametrize(
    ("size", "max_tokens", "lengths"),
    [
        (100, 16, [[2, 4, 4], [8], [9]]),  # 4 x 8 are too many, as are 2 x 9
        (2, 16, [[2, 4], [4, 8], [9]]),
        (100, 1, [[2], [4], [4], [8], [9]]),
        (100, 45, [[2, 4, 4, 8, 9]]),
        (100, 44, [[2, 4, 4, 8], [9]]),
    ],
)
def test_micro_batches_keep_to_a_number_of_tokens(size: int, max_tokens: int, lengths: list[list[int]]) -> None:
    """Padding counts; a row that is longer than the limit goes alone."""
    found = micro_batch_rows(torch.tensor([6, 0, 3, 1, 4]), LENGTHS, size, max_tokens)
    assert [LENGTHS[part].tolist() for part in found] == lengths


def test_no_rows_are_no_micro_batch() -> None:
    assert micro_batch_rows(torch.tensor([], dtype=torch.long), LENGTHS, 4, None) == []


def test_ranks_agree_on_a_number_of_parts() -> None:
    parts = cut_into([torch.tensor([3, 1, 2]), torch.tensor([0]), torch.tensor([4, 5, 6, 7])], 5)
    assert [part.tolist() for part in parts] == [[3, 1], [2], [0], [4, 5], [6, 7]]
    assert len(cut_into(parts, 8)) == 8
    assert [len(part) for part in cut_into(parts, 3)] == [2, 1, 1, 2, 2], "never fewer"


# --- data order -----------------------------------------------------------------------------------------------


def test_each_epoch_of_the_stream_is_a_permutation_of_its_own() -> None:
    epochs = [[row_at(i, 7, seed=3) for i in range(e * 7, e * 7 + 7)] for e in range(4)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert epochs[0] != [row_at(i, 7, seed=4) for i in range(7)]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_ranks_together_read_one_stream(world_size: int) -> None:
    per_rank = 8 // world_size
    stream = [row_at(i, 11, seed=5) for i in range(48)]
    for step in (0, 5, 2):  # in any order: a resumed run needs the step alone
        ranks = [rows_for_step(step, per_rank, 11, seed=5, rank=r, world_size=world_size) for r in range(world_size)]
        assert [row for rank in ranks for row in rank] == stream[8 * step : 8 * step + 8]


def test_generators_depend_on_their_whole_key() -> None:
    keys = [(0, "sample", 1), (0, "sample", 2), (0, "epochs", 1), (1, "sample", 1), (0, "sample", 11)]
    firsts = {float(torch.rand((), generator=generator_for(*key))) for key in keys}
    assert len(firsts) == len(keys)
    again = torch.rand((), generator=generator_for(0, "sample", 1))
    assert float(again) == float(torch.rand((), generator=generator_for(0, "sample", 1)))
