"""Packed rows: what sees what, and the same scores and gradients as rows by themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from reward_model.packing import common_prefix, pack
from rlhf.models.value import load_scalar_model


def test_one_item_by_hand() -> None:
    packed = pack([[[5, 6, 7, 8], [5, 6, 9]]])
    assert packed.tokens_BS.tolist() == [[5, 6, 7, 8, 9]]
    assert packed.positions_BS.tolist() == [[0, 1, 2, 3, 2]]
    assert packed.mask_B1SS[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 0, 0, 1],  # the second response sees the prompt and itself
    ]
    assert (packed.row_N.tolist(), packed.last_N.tolist()) == ([0, 0], [3, 4])


def test_a_shorter_item_is_padded_and_its_padding_sees_itself() -> None:
    packed = pack([[[1, 2], [1, 3]], [[1, 2, 3, 4], [1, 2, 3, 5]]])
    assert packed.tokens_BS.tolist() == [[1, 2, 3, 0, 0], [1, 2, 3, 4, 5]]
    assert packed.mask_B1SS[0, 0, 3:].int().tolist() == [[0, 0, 0, 1, 0], [0, 0, 0, 0, 1]]
    assert (packed.row_N.tolist(), packed.last_N.tolist()) == ([0, 0, 1, 1], [1, 2, 3, 4])


@pytest.mark.parametrize(
    ("rows", "length"),
    [
        ([[1, 2, 3], [1, 2, 4]], 2),
        ([[1, 2, 3], [1, 2, 3, 4]], 2),  # one response begins another: its last token stays its own
        ([[1, 2], [1, 2]], 1),
        ([[1, 2], [3, 2]], 0),  # cut from the left
        ([[1], [1, 2]], 0),
        ([[1, 2, 3]], 2),
    ],
)
def test_common_prefix(rows: list[list[int]], length: int) -> None:
    assert common_prefix(rows) == length


def test_scores_and_gradients_are_those_of_separate_rows(tiny: Any) -> None:
    scalar = load_scalar_model(tiny.reward, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)

    def random_tokens(n: int) -> list[int]:
        return torch.randint(4, 30, (n,), generator=generator).tolist()

    items = []
    for prompt, responses in ((7, (5, 2, 9)), (3, (4, 4)), (1, (6,)), (0, (3, 8))):
        shared = random_tokens(prompt)
        items.append([shared + random_tokens(n) for n in responses])
    packed = pack(items)
    scores_N = scalar(packed.tokens_BS, packed.mask_B1SS, packed.positions_BS)[packed.row_N, packed.last_N]
    rows = [row for rows in items for row in rows]
    alone_N = torch.cat([scalar(torch.tensor([r]), torch.ones(1, len(r), dtype=torch.bool))[0, -1:] for r in rows])
    torch.testing.assert_close(scores_N, alone_N, atol=1e-5, rtol=1e-5)

    weights_N = torch.randn(len(rows), generator=generator)
    parameters = [p for p in scalar.parameters() if p.requires_grad]
    ours = torch.autograd.grad((scores_N * weights_N).sum(), parameters, allow_unused=True)
    theirs = torch.autograd.grad((alone_N * weights_N).sum(), parameters, allow_unused=True)
    for mine, other in zip(ours, theirs, strict=True):
        if mine is not None and other is not None:
            torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-4)
