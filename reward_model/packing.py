"""The responses to one prompt in one row: the prompt is read once for all of them.

    tokens     p p p  a a a  b b  c c c c
    positions  0 1 2  3 4 5  3 4  3 4 5 6

A token sees its prompt and its own response up to itself, never another response: the attention mask says so, and
the positions say where it stands. For a model whose attention obeys both, every score is what the response alone
would get, for `prompt + K responses` tokens instead of K times both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Packed:
    """A batch of R packed rows with N responses in all; S is the longest packed row.

    `mask_B1SS[b, 0, i, j]`: token i of row b sees token j. `row_N`, `last_N`: where response n ends.
    """

    tokens_BS: Tensor
    positions_BS: Tensor
    mask_B1SS: Tensor
    row_N: Tensor
    last_N: Tensor

    def to(self, device: torch.device | str) -> Packed:
        """The same on `device`."""
        return Packed(*(t.to(device) for t in vars(self).values()))


def pack(items: Sequence[Sequence[Sequence[int]]]) -> Packed:
    """Pack the token rows (prompt + response) of every item; responses are numbered item by item.

    What the rows of an item begin with in common is read once, be it the prompt, less of it where rows were cut,
    or more where responses start alike; at least one token of each row stays its own.
    """
    rows = [_pack_item(rows) for rows in items]
    width = max(len(tokens) for tokens, _, _, _ in rows)
    tokens_BS = torch.zeros(len(rows), width, dtype=torch.long)
    positions_BS = torch.zeros(len(rows), width, dtype=torch.long)
    # Padding sees itself, for a softmax over nothing is NaN.
    mask_B1SS = torch.eye(width, dtype=torch.bool).expand(len(rows), 1, width, width).clone()
    row, last = [], []
    for b, (tokens, positions, owners, ends) in enumerate(rows):
        n = len(tokens)
        tokens_BS[b, :n] = torch.tensor(tokens)
        positions_BS[b, :n] = torch.tensor(positions)
        owner_N = torch.tensor(owners)
        visible_NN = (owner_N[None, :] == owner_N[:, None]) | (owner_N[None, :] == 0)
        mask_B1SS[b, 0, :n, :n] = visible_NN.tril()
        row += [b] * len(ends)
        last += ends
    return Packed(tokens_BS, positions_BS, mask_B1SS, torch.tensor(row), torch.tensor(last))


def _pack_item(rows: Sequence[Sequence[int]]) -> tuple[list[int], list[int], list[int], list[int]]:
    """(tokens, positions, owner of each token: 0 the prompt, k + 1 response k, index of each response's last token)."""
    shared = common_prefix(rows)
    tokens, positions, owners, ends = list(rows[0][:shared]), list(range(shared)), [0] * shared, []
    for k, row in enumerate(rows):
        tokens += row[shared:]
        positions += range(shared, len(row))
        owners += [k + 1] * (len(row) - shared)
        ends.append(len(tokens) - 1)
    return tokens, positions, owners, ends


def common_prefix(rows: Sequence[Sequence[int]]) -> int:
    """Length of the longest common beginning that leaves every row a token of its own."""
    limit = min(len(row) for row in rows) - 1
    for i in range(limit):
        if any(row[i] != rows[0][i] for row in rows):
            return i
    return limit
