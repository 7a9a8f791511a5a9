"""Decoding steps as CUDA graphs: one launch for what are otherwise about a thousand small kernels.

A graph replays the same kernels on the same memory, so a step needs fixed shapes. Rows and columns are rounded up to
buckets; each pair of buckets is captured when it first occurs. Rows that fill a bucket decode garbage in places that
nobody uses. Weights are read where they lie, but a decoder and its graphs live for one call of `generate`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf.rollout.llama import LlamaDecoder

_log = logging.getLogger(__name__)
_LEAST_ROWS, _COLUMNS = 8, 128
"""The smallest bucket of rows, from which they double; the step between buckets of columns."""
_WARM_UPS = 2
"""Runs before a capture: libraries allocate their workspaces in the first ones."""

Run = Callable[[], Tensor]
Capture = Callable[[Run], Run]


class CudaCapture:
    """Captures functions without arguments; what they return is overwritten by every replay."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Run) -> Run:
        """A function that replays `run`."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UPS):
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            out = run()

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay


@dataclass
class _Step:
    """One captured step and the memory from which it reads."""

    tokens_B: Tensor
    positions_B: Tensor
    replay: Run


class GraphDecoder(LlamaDecoder):
    """`LlamaDecoder` with captured steps; without them, once a capture has failed."""

    def __init__(
        self,
        lm: Any,
        places: int,
        budget: int,
        prefix: Sequence[int] = (),
        *,
        tap: int | None = None,
        capture: Capture | None = None,
    ) -> None:
        super().__init__(lm, rows_bucket(places), budget, prefix, tap=tap)
        self._capture: Capture | None = capture or CudaCapture()
        self._steps: dict[tuple[int, int], _Step] = {}

    def step(self, tokens_B: Tensor) -> Tensor:
        """See `Decoder`."""
        if self._capture is None:
            return super().step(tokens_B)
        rows, width = self.rows, self._bias_BT.shape[1]
        end = min(self._end + 1, width)
        try:
            step = self._captured(rows_bucket(rows), columns_bucket(end))
        except RuntimeError as error:
            _log.warning("no CUDA graph (%s); decoding goes on without", error)
            self._capture = None
            self._steps.clear()
            return super().step(tokens_B)
        step.tokens_B[:rows].copy_(tokens_B)
        step.positions_B[:rows].copy_(self._positions_B)
        step.positions_B[rows:].zero_()
        logits_BV = step.replay()[:rows].clone()
        self._end = end
        self._positions_B = self._positions_B + 1
        return logits_BV

    def _captured(self, rows: int, end: int) -> _Step:
        key = rows, end
        if key not in self._steps:
            assert self._capture is not None, "asked before"
            tokens_B, positions_B = torch.zeros(2, rows, dtype=torch.long, device=self._like.device)
            # Capturing runs the step: in the last column, which no row has reached, or which is its next anyway.
            positions_B.fill_(self._bias_BT.shape[1] - 1)
            bias_BT = self._bias_BT.clone()
            try:
                replay = self._capture(lambda: self._decode(tokens_B, positions_B, end))
            finally:
                self._bias_BT.copy_(bias_BT)
            self._steps[key] = _Step(tokens_B, positions_B, replay)
        return self._steps[key]

    def _reserve(self, rows: int, width: int) -> None:
        before = self._bias_BT
        super()._reserve(rows_bucket(rows), columns_bucket(width))
        if self._bias_BT is not before:
            self._steps.clear()  # they read the old cache


def rows_bucket(rows: int) -> int:
    """The next power of two, at least 8."""
    return max(_LEAST_ROWS, 1 << max(0, rows - 1).bit_length())


def columns_bucket(columns: int) -> int:
    """The next multiple of 128."""
    return -(-columns // _COLUMNS) * _COLUMNS
