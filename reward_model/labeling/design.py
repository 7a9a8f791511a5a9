"""The design of the experiment: who sees which order, and when gold questions and repeats come. Pure functions.

What is random here is drawn from strings, so that it is the same in every process and after every restart, and no
annotator can foresee it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from fractions import Fraction

Order = list[int]


def rotations(K: int, seed: int, key: str) -> list[Order]:
    """The `K` orders in which an item's responses are shown: the rotations of one permutation, drawn by the item.

    Over `K` annotators every response stands at every place once: a Latin square. A pair has both its orders.
    """
    rng = random.Random(f"sides/{seed}/{key}")
    # Sorting by random() and not shuffle(): Python promises that random() alone stays the same over versions.
    permutation = [index for _, index in sorted((rng.random(), index) for index in range(K))]
    return [permutation[place:] + permutation[:place] for place in range(K)]


def choose_order(orders: Sequence[Order], used: Sequence[Order], balance: int) -> Order:
    """The order for the next annotator of an item: of those used least, the first.

    So orders alternate over an item's annotators. Where both orders of a pair were used as often, the one is taken
    that evens out the annotator's own balance.

    Args:
        orders: all of the item's orders.
        used: the orders in which it stands before its annotators, or was judged.
        balance: of this annotator, pairs shown as [0, 1] minus pairs shown as [1, 0].
    """
    counts = [used.count(order) for order in orders]
    fewest = [order for order, count in zip(orders, counts, strict=True) if count == min(counts)]
    if len(orders) == 2 and len(fewest) == 2 and balance:
        return [1, 0] if balance > 0 else [0, 1]
    return fewest[0]


def gold_is_due(n: int, fraction: float, seed: int, user_id: int) -> bool:
    """Whether the `n`-th item of an annotator, from 0, is a gold question.

    One item of every block of 1 / `fraction` is, at a place drawn for this block: the share is exact, and nobody
    can foresee which one it is.
    """
    share = Fraction(fraction).limit_denominator(10_000)
    if not share:
        return False
    block = math.floor(n * share)
    first, after = math.ceil(block / share), math.ceil((block + 1) / share)
    drawn = random.Random(f"gold/{seed}/{user_id}/{block}").random()
    return n == first + int(drawn * (after - first))


def repeat_is_drawn(fraction: float, seed: int, user_id: int, key: str) -> bool:
    """Whether an item that this annotator judged is shown to them once more."""
    return random.Random(f"repeat/{seed}/{user_id}/{key}").random() < fraction


def gold_is_right(ranks: Sequence[int], gold_ranks: Sequence[int]) -> bool:
    """Whether ranks keep apart, and in the same order, all responses that gold ranks apart; a tie is then wrong."""
    pairs = [(i, j) for i, gold_i in enumerate(gold_ranks) for j, gold_j in enumerate(gold_ranks) if gold_i < gold_j]
    return all(ranks[i] < ranks[j] for i, j in pairs)
