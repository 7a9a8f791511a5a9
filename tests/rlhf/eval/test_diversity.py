"""Diversity: hand-counted n-grams and the invariances of a share."""

import pytest

from rlhf.eval.diversity import distinct_n, duplicate_share, words


def test_words_are_lower_case_and_keep_inner_apostrophes():
    assert words("Don't STOP, don\u2019t -- 'now'!") == ["don't", "stop", "don\u2019t", "now"]


def test_distinct_by_hand():
    # the cat the dog: 3 of 4 words; the-cat cat-the the-dog: 3 of 3 pairs.
    assert distinct_n(["The cat the dog"], 1) == 3 / 4
    assert distinct_n(["The cat the dog"], 2) == 1.0
    # a b | a b: two pairs of which one is new, because pairs do not cross texts (b-a is none).
    assert distinct_n(["a b", "A, B!"], 2) == 1 / 2


def test_distinct_is_zero_when_no_text_is_long_enough():
    assert distinct_n([], 1) == 0.0
    assert distinct_n(["", "one"], 2) == 0.0


def test_distinct_does_not_depend_on_the_order_of_texts():
    texts = ["a b c", "b c d", "a b"]
    assert distinct_n(texts, 2) == distinct_n(texts[::-1], 2) == 3 / 5


def test_distinct_falls_with_the_size_of_the_corpus():
    texts = ["a b c d", "e f g h"]
    assert distinct_n(texts * 5, 1) == distinct_n(texts, 1) / 5


def test_distinct_refuses_an_empty_gram():
    with pytest.raises(ValueError, match="n is 0"):
        distinct_n(["a"], 0)


def test_duplicate_share_by_hand():
    assert duplicate_share([]) == 0.0
    assert duplicate_share(["a", "b", "c"]) == 0.0
    assert duplicate_share(["Yes.", " yes. ", "No.", "yes.\n"]) == 1 / 2
    assert duplicate_share(["", "  "]) == 1 / 2
