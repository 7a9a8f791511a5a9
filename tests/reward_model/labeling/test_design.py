"""Orders, gold questions and repeats: counted over whole series, not against drawn values."""

from __future__ import annotations

from collections import Counter

import pytest

from reward_model.labeling.design import choose_order, gold_is_due, gold_is_right, repeat_is_drawn, rotations


@pytest.mark.parametrize("K", [2, 3, 5])
def test_the_rotations_of_an_item_are_a_latin_square(K: int) -> None:
    orders = rotations(K, seed=1, key="abc")
    for line in (*orders, *zip(*orders, strict=True)):
        assert sorted(line) == list(range(K))


def test_which_order_comes_first_is_drawn_by_the_item_and_is_fair() -> None:
    first = Counter(tuple(rotations(2, 0, str(key))[0]) for key in range(1000))
    assert abs(first[0, 1] - 500) < 80  # five standard deviations
    assert rotations(2, 0, "x") == rotations(2, 0, "x")
    assert {tuple(rotations(4, 0, str(key))[0]) for key in range(500)} > {(0, 1, 2, 3), (3, 2, 1, 0), (1, 0, 2, 3)}


def test_orders_alternate_over_the_annotators_of_an_item() -> None:
    orders, used = rotations(2, 0, "x"), []
    for _ in range(6):
        used.append(choose_order(orders, used, balance=0))
    assert used == orders * 3
    assert choose_order(orders, used[:1], balance=9) == choose_order(orders, used[:1], balance=-9) == orders[1]


def test_a_fresh_item_evens_out_its_annotators_balance() -> None:
    for orders in ([[0, 1], [1, 0]], [[1, 0], [0, 1]]):
        assert choose_order(orders, [], balance=1) == [1, 0]
        assert choose_order(orders, [], balance=-1) == [0, 1]
        assert choose_order(orders, [], balance=0) == orders[0]


def test_a_ranking_takes_the_rotation_that_was_used_least() -> None:
    orders = rotations(3, 0, "x")
    assert choose_order(orders, [orders[0], orders[2]], balance=5) == orders[1]


@pytest.mark.parametrize(("fraction", "block"), [(0.05, 20), (0.25, 4), (0.5, 2), (1.0, 1)])
def test_every_block_of_items_has_one_gold_question(fraction: float, block: int) -> None:
    due = [n for n in range(60 * block) if gold_is_due(n, fraction, seed=3, user_id=7)]
    assert [n // block for n in due] == list(range(60))
    assert len({n % block for n in due}) > min(block, 13) - 1  # at no fixed place


def test_a_share_that_divides_nothing_is_kept_too() -> None:
    assert sum(gold_is_due(n, 0.3, 0, 1) for n in range(1000)) == 300
    assert sum(gold_is_due(n, 0.75, 0, 1) for n in range(1000)) == 750
    assert not any(gold_is_due(n, 0.0, 0, 1) for n in range(100))


def test_annotators_get_gold_questions_at_different_places() -> None:
    places = {tuple(n for n in range(100) if gold_is_due(n, 0.05, 0, user)) for user in range(50)}
    assert len(places) == 50


def test_the_share_of_repeats() -> None:
    drawn = sum(repeat_is_drawn(0.05, 0, user, str(item)) for user in range(20) for item in range(500))
    assert abs(drawn - 500) < 110  # five standard deviations
    assert not any(repeat_is_drawn(0.0, 0, 1, str(item)) for item in range(100))
    assert all(repeat_is_drawn(1.0, 0, 1, str(item)) for item in range(100))


@pytest.mark.parametrize(
    ("ranks", "gold", "right"),
    [
        ([1, 2], [1, 2], True),
        ([2, 1], [1, 2], False),
        ([1, 1], [1, 2], False),
        ([1, 2, 3], [1, 2, 2], True),
        ([1, 3, 2], [1, 2, 2], True),
        ([1, 1, 2], [1, 2, 2], False),
        ([2, 1, 1], [2, 1, 1], True),
    ],
)
def test_a_gold_answer_keeps_apart_what_gold_keeps_apart(ranks: list[int], gold: list[int], right: bool) -> None:
    assert gold_is_right(ranks, gold) == right
