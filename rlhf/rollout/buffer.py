"""The rollout buffer: one structure from sampling to PPO, in memory and as Parquet."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf.errors import DataError
from rlhf.files import atomic_write
from rlhf.types import Rollout, RolloutBatch, StopReason

SCHEMA_VERSION = 2
READABLE = (1, 2)
"""Version 1 has no `score_std`."""


def pad_right(rows: Sequence[Sequence[Any]], value: Any, dtype: torch.dtype) -> Tensor:
    """Rows of different length as one tensor [B, T]; the padding is whatever `value` says, masks tell it apart."""
    longest = max(len(row) for row in rows)
    out = torch.full((len(rows), longest), value, dtype=dtype)
    for i, row in enumerate(rows):
        out[i, : len(row)] = torch.tensor(row, dtype=dtype)
    return out


class RolloutBuffer:
    """Rollouts in the order in which they were added."""

    def __init__(self, rollouts: Iterable[Rollout] = ()) -> None:
        self.rollouts: list[Rollout] = list(rollouts)

    def __len__(self) -> int:
        return len(self.rollouts)

    def add(self, rollouts: Iterable[Rollout]) -> None:
        """Append."""
        self.rollouts.extend(rollouts)

    def batch(self, device: torch.device | str = "cpu") -> RolloutBatch:
        """All rollouts as padded tensors; the score of a rollout without one is NaN.

        Raises:
            DataError: the buffer is empty.
        """
        if not self.rollouts:
            raise DataError("the rollout buffer is empty", fix="check the number of prompts and of rollouts per step")
        rows = self.rollouts
        return RolloutBatch(
            tokens_BT=pad_right([r.tokens for r in rows], 0, torch.long),
            attention_mask_BT=pad_right([[True] * len(r.tokens) for r in rows], False, torch.bool),
            action_mask_BT=pad_right([r.action_mask for r in rows], False, torch.bool),
            sampler_logprobs_BT=pad_right([r.logprobs for r in rows], 0.0, torch.float32),
            scores_B=torch.tensor([math.nan if r.score is None else r.score for r in rows]),
            truncated_B=torch.tensor([not r.stop.finished for r in rows]),
        ).to(device)

    def state_dict(self) -> dict[str, Any]:
        """Plain data from which `load_state_dict` rebuilds the buffer."""
        return {"version": SCHEMA_VERSION, "columns": self._columns()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replace the content with that of `state_dict`."""
        self.rollouts = _rollouts_from(state["columns"])

    def to_parquet(self, path: str | Path) -> None:
        """Write all rollouts, atomically."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        table = pa.table(self._columns(), schema=_schema())
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd")
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        atomic_write(Path(path), sink.getvalue().to_pybytes())

    @classmethod
    def from_parquet(cls, path: str | Path) -> RolloutBuffer:
        """Read what `to_parquet` wrote.

        Raises:
            DataError: no such file, not Parquet, or of another schema version.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        if not Path(path).is_file():
            raise DataError(f"no rollouts at {path}", fix="run `rlhf sample` first, or correct the path")
        try:
            table = pq.read_table(path)
        except pa.ArrowInvalid as error:
            raise DataError(f"{path} is not a Parquet file ({error})", fix="sample the rollouts again") from None
        version = int((table.schema.metadata or {}).get(b"rlhf_schema", b"0"))
        if version not in READABLE:
            raise DataError(
                f"{path} has rollout schema {version}, this program reads {' and '.join(map(str, READABLE))}",
                fix="sample the rollouts again",
            )
        return cls(_rollouts_from(table.to_pydict()))

    def _columns(self) -> dict[str, list[Any]]:
        columns: dict[str, list[Any]] = {f.name: [getattr(r, f.name) for r in self.rollouts] for f in fields(Rollout)}
        # A prompt is text or turns: one column cannot hold both, JSON can.
        columns["prompt"] = [json.dumps(p, ensure_ascii=False) for p in columns["prompt"]]
        columns["stop"] = [s.value for s in columns["stop"]]
        return columns


def _schema() -> Any:
    import pyarrow as pa

    types = {
        "prompt": pa.string(),
        "response": pa.string(),
        "tokens": pa.list_(pa.int32()),
        "action_mask": pa.list_(pa.bool_()),
        "logprobs": pa.list_(pa.float32()),
        "stop": pa.string(),
        "prompt_id": pa.string(),
        "score": pa.float64(),
        "gold_score": pa.float64(),
        "policy": pa.string(),
        "step": pa.int64(),
        "score_std": pa.float64(),
    }
    return pa.schema(list(types.items()), metadata={"rlhf_schema": str(SCHEMA_VERSION)})


def _rollouts_from(columns: dict[str, list[Any]]) -> list[Rollout]:
    names = list(columns)
    rows = []
    for values in zip(*columns.values(), strict=True):
        row = dict(zip(names, values, strict=True))
        row["prompt"] = json.loads(row["prompt"])
        row["stop"] = StopReason(row["stop"])
        rows.append(Rollout(**row))
    return rows


def minibatch_rows(
    rows: int, minibatches: int, generator: torch.Generator, *, rank: int = 0, world_size: int = 1
) -> list[Tensor]:
    """This rank's rows of every optimizer step of one epoch, chosen anew from `generator`, which all ranks share.

    Of each `minibatches` neighbours in the global batch one goes into each minibatch. So a minibatch holds the same
    answers for any number of ranks, though none is exchanged: ranks hold blocks of neighbours.

    Args:
        rows: of this rank, a multiple of `minibatches`.
    """
    groups = rows // minibatches
    draws_GM = torch.rand(world_size * groups, minibatches, generator=generator)
    place_GM = draws_GM[rank * groups : (rank + 1) * groups].argsort(1)
    return list((torch.arange(groups)[:, None] * minibatches + place_GM).T)


def micro_batch_rows(rows: Tensor, lengths_B: Tensor, size: int, max_tokens: int | None = None) -> list[Tensor]:
    """A minibatch cut into parts of at most `size` rows, neighbours in length together to waste little padding.

    Args:
        max_tokens: of a part, its rows x the longest of them; a single row may be longer.
    """
    ordered = rows[torch.argsort(lengths_B[rows], stable=True)]
    cuts, begin = [], 0
    for end, longest in enumerate(lengths_B[ordered].tolist()):
        count = end + 1 - begin
        if count > 1 and (count > size or count * longest > (max_tokens or torch.inf)):
            cuts.append(end)
            begin = end
    return list(ordered.tensor_split(cuts)) if len(rows) else []


def cut_into(parts: Sequence[Tensor], count: int) -> list[Tensor]:
    """The same rows in `count` parts, no fewer than before: those with most rows are halved."""
    parts = list(parts)
    while len(parts) < count:
        largest = max(range(len(parts)), key=lambda i: len(parts[i]))
        parts[largest : largest + 1] = parts[largest].tensor_split(2)
    return parts
