"""Labels of several rounds in one file: what comes first, and that no prompt changes its side."""

from __future__ import annotations

import pytest

from reward_model.labeling.rounds import Sides, joined
from rlhf.errors import DataError
from rlhf.types import Ranking


def sides(train: str, heldout: str, answer: str = "a") -> Sides:
    """Rankings of the prompts that are named by a letter each."""

    def of(letters: str) -> list[Ranking]:
        return [Ranking(letter, [answer, "b"], [1, 2], prompt_id=letter) for letter in letters]

    return of(train), of(heldout)


def spelt(found: Sides) -> list[str]:
    return ["".join(f"{ranking.prompt_id}{ranking.responses[0]}" for ranking in side) for side in found]


def test_a_known_prompt_stays_on_its_side_whatever_the_new_split_says() -> None:
    found = joined(sides("pq", "r", "1"), sides("pry", "qz", "2"), chosen=False)
    assert spelt(found) == ["p1q1p2y2q2", "r1r2z2"]


def test_rankings_of_one_prompt_are_not_merged() -> None:
    assert spelt(joined(sides("p", "", "1"), sides("p", "", "1"), chosen=False)) == ["p1p1", ""]


def test_what_was_trained_on_cannot_be_held_out_by_hand_later() -> None:
    with pytest.raises(DataError, match="1 held-out prompts were trained on in an earlier round, 'q'"):
        joined(sides("pq", "r"), sides("s", "q"), chosen=True)
    assert spelt(joined(sides("pq", "r", "1"), sides("p", "rs", "2"), chosen=True)) == ["p1q1p2", "r1r2s2"]
