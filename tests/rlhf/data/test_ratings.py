"""Rated answers: what a row may look like, and that they never stand beside comparisons."""

from __future__ import annotations

from typing import Any

import pytest

from rlhf.config_schema import DatasetConfig
from rlhf.data.records import prompt_id, read_prompts, read_rankings, read_ratings
from rlhf.errors import DataError
from rlhf.types import Rating

GOOD = {"prompt": "why", "response": "so", "rating": 4}
PAIR = {"prompt": "why", "chosen": "so", "rejected": "no"}
RANKING = {"prompt": "why", "responses": ["so", "no"], "ranks": [1, 2]}


def test_a_rating_per_row_and_several_per_prompt(jsonl: Any) -> None:
    turns = [{"role": "user", "content": "why"}]
    answer = [{"role": "assistant", "content": "because"}]
    path = jsonl(
        "r.jsonl", [GOOD, {**GOOD, "response": "no", "rating": -1.5}, {**GOOD, "prompt": turns, "response": answer}]
    )
    found = read_ratings(DatasetConfig(path=path))
    same = prompt_id("why")
    assert list(found) == [
        Rating("why", "so", 4.0, same),
        Rating("why", "no", -1.5, same),
        Rating(turns, "because", 4.0, prompt_id(turns)),
    ]
    assert (found.format, found.places[1]) == ("rating", f"{path}:2")
    assert [record.prompt for record in read_prompts(DatasetConfig(path=path))] == ["why", turns]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"rating": "high"}, "key 'rating' is 'high', not a number"),
        ({"rating": True}, "key 'rating' is True, not a number"),
        ({"rating": None}, "key 'rating' is missing"),
        ({"response": ""}, "key 'response' is empty"),
        ({"prompt": 3}, "key 'prompt' is int"),
    ],
)
def test_a_malformed_rating_is_named_by_file_line_and_key(jsonl: Any, changes: dict[str, Any], problem: str) -> None:
    path = jsonl("r.jsonl", [GOOD, {**GOOD, **changes}])
    with pytest.raises(DataError, match=rf"(?s)r\.jsonl:2.*{problem}"):
        read_ratings(DatasetConfig(path=path))


@pytest.mark.parametrize("other", [PAIR, RANKING, {**PAIR, "rating": 3}], ids=["pair", "ranking", "pair with rating"])
def test_ratings_and_comparisons_are_never_mixed(jsonl: Any, other: dict[str, Any]) -> None:
    """Not even where malformed rows are tolerated."""
    ratings = DatasetConfig(path=jsonl("a.jsonl", [GOOD, GOOD, other]), max_bad_fraction=0.5)
    with pytest.raises(DataError, match=r"a\.jsonl:3: comparisons among ratings"):
        read_ratings(ratings)
    comparisons = DatasetConfig(path=jsonl("b.jsonl", [other, other, GOOD]), max_bad_fraction=0.5)
    with pytest.raises(DataError, match=r"b\.jsonl:3: ratings among comparisons"):
        read_rankings(comparisons)


def test_each_reader_refuses_the_others_file_and_names_the_loss(jsonl: Any) -> None:
    with pytest.raises(DataError, match="pointwise"):
        read_rankings(DatasetConfig(path=jsonl("a.jsonl", [GOOD])))
    with pytest.raises(DataError, match="set another loss"):
        read_ratings(DatasetConfig(path=jsonl("b.jsonl", [PAIR])))
