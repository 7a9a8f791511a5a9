"""Every format is read from a file written here; every error names file, line, key and fix."""

from __future__ import annotations

import gzip
import json
import logging
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from rlhf.config_schema import DatasetConfig
from rlhf.data.records import (
    as_chat,
    detect_format,
    prompt_id,
    read_demonstrations,
    read_prompts,
    read_rankings,
    read_rows,
    write_rankings,
)
from rlhf.errors import DataError
from rlhf.types import Ranking

USER = {"role": "user", "content": "Why is the sky blue?"}
GOOD = {"role": "assistant", "content": "Air scatters blue light most."}
POOR = {"role": "assistant", "content": "Because."}
SYSTEM = {"role": "system", "content": "Be brief."}
HH_START = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: Why is the sky blue?\n\nAssistant:"
HH = {"chosen": f"{HH_START} Air scatters blue light most.", "rejected": f"{HH_START} Because."}

ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "prompt text": ("prompt", {"prompt": "The sky is"}),
    "prompt turns": ("prompt", {"prompt": [USER]}),
    "completion text": ("prompt_completion", {"prompt": "The sky is", "completion": " blue."}),
    "completion turns": ("prompt_completion", {"prompt": [USER], "completion": [GOOD]}),
    "messages": ("messages", {"messages": [SYSTEM, USER, GOOD]}),
    "preference text": ("preference", {"prompt": "The sky is", "chosen": " blue.", "rejected": " red."}),
    "preference turns": ("preference", {"prompt": [USER], "chosen": [GOOD], "rejected": [POOR]}),
    "implicit text": ("preference", {"chosen": "The sky is blue.", "rejected": "The sky is black."}),
    "implicit turns": ("preference", {"chosen": [USER, GOOD], "rejected": [USER, POOR]}),
    "ultrafeedback": (
        "preference",
        {
            "prompt": USER["content"],
            "prompt_id": "abc",
            "chosen": [USER, GOOD],
            "rejected": [USER, POOR],
            "messages": [USER, GOOD],
            "score_chosen": 8.5,
            "score_rejected": 3.0,
        },
    ),
    "hh": ("hh", HH),
    "text": ("text", {"text": "The sky is blue."}),
    "ranking": ("ranking", {"prompt": "p", "responses": ["a", "b"], "ranks": [2, 1]}),
}


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def config(path: Path | str, **settings: Any) -> DatasetConfig:
    return DatasetConfig(path=str(path), **settings)


def refused(read: Any, cfg: DatasetConfig, *words: str) -> DataError:
    """The error of `read`, after checking that it has a fix and says all `words`."""
    with pytest.raises(DataError) as caught:
        read(cfg)
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in: {caught.value}"
    assert caught.value.fix
    return caught.value


# --- formats --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ROWS)
def test_every_format_is_detected(name: str) -> None:
    expected, fields = ROWS[name]
    assert detect_format(fields) == expected


def test_a_parquet_column_full_of_nulls_does_not_count() -> None:
    assert detect_format({"prompt": "p", "completion": None, "chosen": None}) == "prompt"


def test_rollouts_are_detected_and_sent_to_labeling(tmp_path: Path) -> None:
    row = {"prompt": "p", "response": "r", "tokens": [1], "action_mask": [True], "logprobs": [-1.0]}
    path = write(tmp_path / "r.jsonl", row)
    refused(read_rankings, config(path), f"{path}:1", "'rollouts'", "stage `label`")


@pytest.mark.parametrize(
    ("fields", "key", "other"),
    [
        ({"prompt": "p", "chosen": "c"}, "rejected", "chosen"),
        ({"prompt": "p", "rejected": "r"}, "chosen", "rejected"),
        ({"completion": "c"}, "prompt", "completion"),
        ({"prompt": "p", "responses": ["a", "b"]}, "ranks", "responses"),
    ],
)
def test_half_a_pair_names_the_missing_key(fields: dict[str, Any], key: str, other: str) -> None:
    with pytest.raises(DataError, match=f"key '{key}' is missing beside '{other}'"):
        detect_format(fields)


def test_unknown_columns_are_listed() -> None:
    with pytest.raises(DataError, match="found: answer, question"):
        detect_format({"question": "q", "answer": "a"})


@pytest.mark.parametrize(
    ("name", "prompt"),
    [
        ("prompt text", "The sky is"),
        ("prompt turns", [USER]),
        ("completion text", "The sky is"),
        ("messages", [SYSTEM, USER]),
        ("preference turns", [USER]),
        ("implicit text", "The sky is"),
        ("implicit turns", [USER]),
        ("ultrafeedback", [USER]),
        ("hh", [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}, USER]),
        ("ranking", "p"),
    ],
)
def test_prompts_come_from_any_format(tmp_path: Path, name: str, prompt: Any) -> None:
    path = write(tmp_path / "d.jsonl", ROWS[name][1])
    records = read_prompts(config(path))
    assert [record.prompt for record in records] == [prompt]
    assert records[0].where == f"{path}:1"
    assert records[0].prompt_id == prompt_id(prompt)
    assert records.format == ROWS[name][0]


@pytest.mark.parametrize(
    ("name", "completion"),
    [
        ("completion text", " blue."),
        ("completion turns", GOOD["content"]),
        ("messages", GOOD["content"]),
        ("preference text", " blue."),
        ("ultrafeedback", GOOD["content"]),
        ("hh", GOOD["content"]),
        ("text", "The sky is blue."),
    ],
)
def test_demonstrations_keep_the_text_of_the_answer(tmp_path: Path, name: str, completion: str) -> None:
    path = write(tmp_path / "d.jsonl", ROWS[name][1])
    (demonstration,) = read_demonstrations(config(path))
    assert (demonstration.completion, demonstration.where) == (completion, f"{path}:1")


def test_a_plain_text_is_a_demonstration_without_a_prompt(tmp_path: Path) -> None:
    """TRL's language-modelling format; a column beside it, as of a corpus, changes nothing."""
    rows = [{"text": " The sky is blue.\n", "source": "web"}, {"text": "Grass is green."}]
    records = read_demonstrations(config(write(tmp_path / "d.jsonl", *rows)))
    assert records.format == "text"
    assert [(d.prompt, d.completion) for d in records] == [("", rows[0]["text"]), ("", rows[1]["text"])]


def test_a_text_beside_a_prompt_or_an_answer_is_no_plain_text() -> None:
    assert detect_format({"prompt": "p", "text": "t"}) == "prompt"
    assert detect_format({"prompt": "p", "completion": "c", "text": "t"}) == "prompt_completion"
    assert detect_format({"chosen": "c", "rejected": "r", "text": "t"}) == "preference"


@pytest.mark.parametrize(
    ("name", "responses"),
    [
        ("preference text", [" blue.", " red."]),
        ("preference turns", [GOOD["content"], POOR["content"]]),
        ("implicit text", [" blue.", " black."]),  # "bl" is shared, but a word is not divided
        ("implicit turns", [GOOD["content"], POOR["content"]]),
        ("ultrafeedback", [GOOD["content"], POOR["content"]]),
        ("hh", [GOOD["content"], POOR["content"]]),
    ],
)
def test_a_pair_is_a_ranking_of_two(tmp_path: Path, name: str, responses: list[str]) -> None:
    (ranking,) = read_rankings(config(write(tmp_path / "d.jsonl", ROWS[name][1])))
    assert (ranking.responses, ranking.ranks, ranking.wins) == (responses, [1, 2], None)
    assert ranking.prompt_id == prompt_id(ranking.prompt)


def test_ultrafeedback_has_its_single_values_as_meta(tmp_path: Path) -> None:
    (ranking,) = read_rankings(config(write(tmp_path / "d.jsonl", ROWS["ultrafeedback"][1])))
    assert ranking.meta == {"prompt_id": "abc", "score_chosen": 8.5, "score_rejected": 3.0}


def test_ultrafeedback_keeps_a_system_turn(tmp_path: Path) -> None:
    row = {"prompt": USER["content"], "chosen": [SYSTEM, USER, GOOD], "rejected": [SYSTEM, USER, POOR]}
    (ranking,) = read_rankings(config(write(tmp_path / "d.jsonl", row)))
    assert ranking.prompt == [SYSTEM, USER]


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [("Q? yes", "Q?\nno", "Q?"), ("Q: a b", "Q: a", "Q:"), ("one two  x", "one two  y", "one two")],
)
def test_the_implicit_prompt_ends_at_a_word(tmp_path: Path, chosen: str, rejected: str, prompt: str) -> None:
    (ranking,) = read_rankings(config(write(tmp_path / "d.jsonl", {"chosen": chosen, "rejected": rejected})))
    assert ranking.prompt == prompt
    assert [prompt + response for response in ranking.responses] == [chosen, rejected]


def test_a_probability_becomes_the_matrix_of_wins(tmp_path: Path) -> None:
    row = {**ROWS["preference text"][1], "probability": 0.75}
    (ranking,) = read_rankings(config(write(tmp_path / "d.jsonl", row)))
    assert ranking.wins == [[0.5, 0.75], [0.25, 0.5]]


@pytest.mark.parametrize("name", ["preference text", "ultrafeedback", "hh", "ranking"])
@pytest.mark.parametrize(("value", "margin"), [(1.5, 1.5), (2, 2.0), (0, 0.0), (None, None)])
def test_a_margin_is_read_as_a_number(tmp_path: Path, name: str, value: Any, margin: float | None) -> None:
    row = {**ROWS[name][1], "margin": value}
    (ranking,) = read_rankings(config(write(tmp_path / "d.jsonl", row)))
    assert ranking.margin == margin
    assert type(ranking.margin) is type(margin)


def test_hh_joins_turns_of_one_speaker(tmp_path: Path) -> None:
    row = {side: f"\n\nHuman: a\n\nHuman: b\n\nAssistant: {side}\n\nAssistant: end" for side in ("chosen", "rejected")}
    (ranking,) = read_rankings(config(write(tmp_path / "d.jsonl", row)))
    assert ranking.prompt == [{"role": "user", "content": "a\n\nb"}]
    assert ranking.responses == ["chosen\n\nend", "rejected\n\nend"]


def test_one_prompt_of_many_pairs_is_one_record_but_a_prompt_file_keeps_repetitions(tmp_path: Path) -> None:
    pair = ROWS["preference text"][1]
    pairs = write(tmp_path / "pairs.jsonl", pair, {**pair, "rejected": " grey."}, {**pair, "prompt": "Grass is"})
    assert [(r.prompt, r.where) for r in read_prompts(config(pairs))] == [
        ("The sky is", f"{pairs}:1"),
        ("Grass is", f"{pairs}:3"),
    ]
    prompts = write(tmp_path / "prompts.jsonl", {"prompt": "p"}, {"prompt": "p"})
    assert len(read_prompts(config(prompts))) == 2


def test_the_prompt_id_is_stable_and_depends_on_the_prompt_alone(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", {"prompt": "The sky is", "topic": "sky", "n": 3, "tags": ["a"]})
    (record,) = read_prompts(config(path))
    assert record.prompt_id == "4bd0263155f3"  # printf '"The sky is"' | sha1sum | cut -c1-12
    assert record.meta == {"topic": "sky", "n": 3}
    turned = [{"content": USER["content"], "role": "user"}]
    assert prompt_id(turned) == prompt_id([USER]) != prompt_id(USER["content"])


def test_as_chat() -> None:
    assert as_chat("hi") == [{"role": "user", "content": "hi"}]
    assert as_chat([USER]) == [USER]


# --- malformed rows -------------------------------------------------------------------------------------------

PAIR = ROWS["preference text"][1]
RANKING = {"prompt": "p", "responses": ["a", ""], "ranks": [1, 2]}


@pytest.mark.parametrize(
    ("read", "good", "bad", "key", "problem"),
    [
        (read_rankings, PAIR, {"prompt": "p", "chosen": "c"}, "rejected", "is missing"),
        (read_rankings, PAIR, {**PAIR, "chosen": None}, "chosen", "is missing"),
        (read_rankings, PAIR, {**PAIR, "rejected": PAIR["chosen"]}, "rejected", "equals 'chosen'"),
        (read_rankings, PAIR, {**PAIR, "rejected": 3}, "rejected", "is int, not a string"),
        (read_rankings, PAIR, {**PAIR, "rejected": [POOR]}, "rejected", "is not of the kind of 'chosen'"),
        (read_rankings, PAIR, {**PAIR, "probability": 1.5}, "probability", "not a number from 0 to 1"),
        (read_rankings, PAIR, {**PAIR, "probability": "high"}, "probability", "not a number from 0 to 1"),
        (read_rankings, PAIR, {**PAIR, "probability": 0.2}, "probability", "rejected wins"),
        (read_rankings, PAIR, {**PAIR, "margin": "significantly"}, "margin", "is 'significantly', not a number"),
        (read_rankings, PAIR, {**PAIR, "margin": True}, "margin", "is True, not a number"),
        (read_rankings, PAIR, {**PAIR, "margin": [1.0]}, "margin", "is [1.0], not a number"),
        (read_rankings, PAIR, {**PAIR, "margin": -1}, "margin", "is -1, not a number"),
        (read_rankings, PAIR, {**PAIR, "margin": float("nan")}, "margin", "is nan, not a number"),
        (read_rankings, PAIR, {**PAIR, "margin": float("inf")}, "margin", "is inf, not a number"),
        (read_rankings, PAIR, {**PAIR, "margin": 10**400}, "margin", "not a number"),
        (read_rankings, HH, {**HH, "margin": "x"}, "margin", "is 'x', not a number"),
        (read_rankings, RANKING, {**RANKING, "margin": "x"}, "margin", "is 'x', not a number"),
        (read_demonstrations, {"text": "t"}, {"text": " "}, "text", "is empty"),
        (read_demonstrations, {"text": "t"}, {"text": 3}, "text", "is int, not a string"),
        (read_demonstrations, {"text": "t"}, {"txt": "t"}, "text", "is missing"),
        (read_rankings, PAIR, {"chosen": "same", "rejected": "same"}, "rejected", "equals 'chosen'"),
        (read_rankings, PAIR, {"chosen": "yes", "rejected": "no"}, "prompt", "share no first word"),
        (read_rankings, PAIR, {"chosen": [SYSTEM, GOOD], "rejected": [USER, POOR]}, "prompt", "share no turn"),
        (
            read_rankings,
            PAIR,
            {"chosen": [USER, GOOD, USER, GOOD], "rejected": [USER, POOR, USER, POOR]},
            "chosen",
            "has assistant, user, assistant after the prompt",
        ),
        (read_rankings, HH, {**HH, "chosen": "no turns"}, "chosen", "does not start with"),
        (read_rankings, HH, {**HH, "rejected": HH["rejected"] + "\n\nHuman: ?"}, "rejected", "ends with a Human"),
        (read_rankings, HH, {**HH, "rejected": HH["rejected"].replace("hi", "yo")}, "rejected", "the same dialogue"),
        (read_rankings, HH, {**HH, "chosen": HH_START}, "chosen[3].content", "is empty"),
        (read_rankings, RANKING, {**RANKING, "ranks": [1]}, "ranks", "is 1 items for 2 responses"),
        (read_rankings, RANKING, {**RANKING, "ranks": [1, True]}, "ranks[1]", "is True"),
        (read_rankings, RANKING, {**RANKING, "ranks": [0, 1]}, "ranks", "the best rank is not 1"),
        (read_rankings, RANKING, {**RANKING, "responses": ["a"]}, "responses", "two or more"),
        (read_rankings, RANKING, {**RANKING, "wins": [[0.5, 0.9], [0.9, 0.5]]}, "wins[0][1]", "is 0.9 beside"),
        (read_rankings, RANKING, {**RANKING, "wins": [[0.5], [0.5]]}, "wins[0]", "is [0.5]"),
        (read_rankings, RANKING, {**RANKING, "tokens": [[1], ["a"]]}, "tokens[1]", "is ['a']"),
        (read_rankings, RANKING, {**RANKING, "gold_scores": 2}, "gold_scores", "is int for 2 responses"),
        (read_rankings, RANKING, {**RANKING, "gold_scores": [1, float("nan")]}, "gold_scores[1]", "is nan"),
        (read_rankings, RANKING, {**RANKING, "gold_scores": [float("-inf"), 1]}, "gold_scores[0]", "is -inf"),
        (read_rankings, RANKING, {**RANKING, "tokens": [[1, -7], [1]]}, "tokens[0]", "is [1, -7]"),
        (read_rankings, RANKING, {**RANKING, "responses": ["", ""]}, "responses[1]", "equals responses[0]"),
        (read_rankings, RANKING, {**RANKING, "responses": ["a", "b\ud800"]}, "responses[1]", "lone surrogate"),
        (read_rankings, RANKING, {**RANKING, "meta": [1]}, "meta", "is list, not an object"),
        (read_prompts, {"prompt": "p"}, {"prompt": "\ud800 sun"}, "prompt", "lone surrogate '\\ud800' at character 1"),
        (
            read_demonstrations,
            {"prompt": "p", "completion": "c"},
            {"prompt": "p", "completion": "c \udc41"},
            "completion",
            "lone surrogate '\\udc41' at character 3",
        ),
        (read_prompts, {"prompt": "p"}, {"prompt": " \n"}, "prompt", "is empty"),
        (read_prompts, {"prompt": "p"}, {"prompt": []}, "prompt", "is an empty list"),
        (read_prompts, {"prompt": "p"}, {"prompt": 7}, "prompt", "is int, not a string"),
        (read_prompts, {"prompt": "p"}, {"prompt": ["hi"]}, "prompt[0]", "is str, not a turn"),
        (read_prompts, {"prompt": "p"}, {"prompt": [{"role": "user"}]}, "prompt[0].content", "is missing"),
        (read_prompts, {"prompt": "p"}, {"prompt": [{"content": "x"}]}, "prompt[0].role", "is missing"),
        (read_prompts, {"prompt": "p"}, {"prompt": [USER, SYSTEM]}, "prompt[1].role", "after the first turn"),
        (read_prompts, {"prompt": "p"}, {"prompt": [USER, GOOD]}, "prompt[1].role", "'assistant' at the end"),
        (read_prompts, {"prompt": "p"}, {"prompt": [{**USER, "role": "human"}]}, "prompt[0].role", "write 'user'"),
        (read_demonstrations, {"messages": [USER, GOOD]}, {"messages": "hi"}, "messages", "not a list of turns"),
        (read_demonstrations, {"messages": [USER, GOOD]}, {"messages": [USER]}, "messages[0].role", "assistant turn"),
        (read_demonstrations, {"messages": [USER, GOOD]}, {"messages": [GOOD]}, "messages", "without a question"),
        (
            read_demonstrations,
            {"prompt": "p", "completion": "c"},
            {"prompt": "p", "completion": [USER, GOOD]},
            "completion",
            "has user, assistant after the prompt",
        ),
    ],
)
def test_a_malformed_row_names_file_line_and_key(
    tmp_path: Path, read: Any, good: dict[str, Any], bad: dict[str, Any], key: str, problem: str
) -> None:
    path = write(tmp_path / "d.jsonl", good, bad, good)
    error = refused(read, config(path), f"{path}:2: key '{key}'", problem, "1 of 3 rows", "max_bad_fraction: 0.34")
    assert f"{path}:1" not in str(error)
    tolerated = read(config(path, max_bad_fraction=0.34))
    assert [row.where for row in tolerated.quarantined] == [f"{path}:2"]


def test_empty_responses_may_be_tied_or_differ_in_their_tokens(tmp_path: Path) -> None:
    """EOS at once and unknown tokens up to the budget are two answers without a text."""
    tied = {"prompt": "p", "responses": ["", "", "b"], "ranks": [1, 1, 2]}
    sampled = {"prompt": "p", "responses": ["", ""], "ranks": [1, 2], "tokens": [[5, 1], [5, 0, 0]]}
    assert len(read_rankings(config(write(tmp_path / "d.jsonl", tied, sampled)))) == 2


def test_a_null_first_row_names_the_key_and_not_the_columns() -> None:
    with pytest.raises(DataError, match="key 'prompt' is null") as caught:
        detect_format({"prompt": None, "source": "web"})
    assert "rename" not in str(caught.value)


def test_rankings_know_where_they_stand(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", PAIR, {**PAIR, "rejected": ""}, PAIR)
    assert read_rankings(config(path, max_bad_fraction=0.5)).places == [f"{path}:1", f"{path}:3"]


def test_a_first_row_without_a_side_does_not_change_the_format(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", {"prompt": "p", "chosen": "c"}, PAIR)
    refused(read_rankings, config(path), f"{path}:1", "key 'rejected' is missing beside 'chosen'")


@pytest.mark.parametrize(
    ("read", "row", "format"),
    [
        (read_rankings, {"prompt": "p"}, "prompt"),
        (read_demonstrations, {"prompt": "p"}, "prompt"),
        (read_rankings, {"messages": [USER, GOOD]}, "messages"),
        (read_rankings, {"text": "t"}, "text"),
        (read_prompts, {"text": "t"}, "text"),
    ],
)
def test_a_format_without_the_wanted_part_is_refused(
    tmp_path: Path, read: Any, row: dict[str, Any], format: str
) -> None:
    path = write(tmp_path / "d.jsonl", row)
    refused(read, config(path), f"{path}:1", f"rows of format '{format}'", "preference, hh")


def test_a_set_format_wins_over_detection(tmp_path: Path) -> None:
    row = {**ROWS["ultrafeedback"][1], "messages": [USER, POOR]}
    cfg = config(write(tmp_path / "d.jsonl", row), format="messages")
    (demonstration,) = read_demonstrations(cfg)
    assert demonstration.completion == POOR["content"]


# --- quarantine -----------------------------------------------------------------------------------------------


def test_tolerated_rows_are_left_out_counted_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "d.jsonl", {"prompt": "a"}, "{broken\n", {"prompt": ""}, {"prompt": "b"})
    with caplog.at_level(logging.WARNING):
        records = read_prompts(config(path, max_bad_fraction=0.5))
    assert [record.prompt for record in records] == ["a", "b"]
    assert [row.where for row in records.quarantined] == [f"{path}:2", f"{path}:3"]
    assert "2 of 4 rows are malformed (50.00%) and were left out" in caplog.text


def test_too_many_bad_rows_name_the_first_three(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", {"prompt": "a"}, *["nonsense\n"] * 5, *[{"prompt": "a"}] * 6)
    error = refused(
        read_rows,
        config(path, max_bad_fraction=0.25),
        "5 of 12 rows",
        "tolerated are 25.00%",
        f"{path}:4: not JSON",
        "2 more",
        "max_bad_fraction: 0.42",
    )
    assert f"{path}:5" not in str(error)
    assert len(read_rows(config(path, max_bad_fraction=0.42)).quarantined) == 5  # what the fix proposes


@pytest.mark.parametrize("rows", [["nonsense\n"], [{"prompt": "a"}, "nonsense\n"]])
def test_half_of_the_rows_or_more_are_not_proposed_to_be_left_out(tmp_path: Path, rows: list[Any]) -> None:
    error = refused(read_rows, config(write(tmp_path / "d.jsonl", *rows)), "set `format:`")
    assert "max_bad_fraction" not in str(error)


def test_nothing_left_is_an_error_even_if_all_is_tolerated(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", {"prompt": ""})
    refused(read_prompts, config(path, max_bad_fraction=1.0), f"{path}:1", "nothing is left")


# --- sources --------------------------------------------------------------------------------------------------


def test_lines_are_counted_with_blank_ones_and_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n\r\n{"prompt": "b\xe2\x80\xa8c"}')
    rows = read_rows(config(path))
    assert [(row.where, row.fields["prompt"]) for row in rows] == [(f"{path}:1", "a"), (f"{path}:3", "b\u2028c")]


def test_gzip_and_limit(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"prompt": "a"}\n{"prompt": "b"}\nnot read\n'))
    assert [row.where for row in read_rows(config(path, limit=2))] == [f"{path}:1", f"{path}:2"]


def test_a_cut_gzip_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"prompt": "a"}\n' * 50)[:-9])
    refused(read_rows, config(path), str(path), "cannot be read to its end")


def test_a_json_array_has_line_numbers(tmp_path: Path) -> None:
    path = tmp_path / "d.json"
    path.write_text('[\n {"prompt": "a"},\n {"prompt":\n  "b, ]"},\n 5\n]\n')
    rows = read_rows(config(path, max_bad_fraction=0.5))
    assert [(row.where, row.fields["prompt"]) for row in rows] == [(f"{path}:2", "a"), (f"{path}:3", "b, ]")]
    assert str(rows.quarantined[0]).startswith(f"{path}:5: a int, not keys and values")


def test_a_json_file_may_hold_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "d.json", {"prompt": "a"}, {"prompt": "b"})
    assert [row.where for row in read_rows(config(path))] == [f"{path}:1", f"{path}:2"]


def test_a_broken_json_array_names_its_line(tmp_path: Path) -> None:
    path = tmp_path / "d.json"
    path.write_text('[{"prompt": "a"},\n {"prompt" "b"}]')
    refused(read_rows, config(path), f"{path}:2: not JSON")


@pytest.mark.parametrize("text", ["[" * 100_000, '[{"prompt": ' + "9" * 5000 + "}]"])
def test_a_json_array_that_python_cannot_read_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "d.json"
    path.write_text(text)
    refused(read_rows, config(path), f"{path}: not usable JSON")


def test_parquet_rows_are_numbered_from_one(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "d.parquet"
    pq.write_table(pa.Table.from_pylist([{"messages": [USER, GOOD]}, {"messages": [USER]}]), path)
    refused(read_demonstrations, config(path), f"{path}, row 2: key 'messages[0].role'")
    assert len(read_prompts(config(path))) == 2


def test_a_damaged_parquet_file_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "d.parquet"
    path.write_bytes(b"PAR1 nonsense")
    refused(read_rows, config(path), str(path), "damaged")


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"prompt": "a"\n', "not JSON"),
        (b'["a"]\n', "a list, not keys and values"),
        (b'{"prompt": "\xff"}\n', "not UTF-8"),
        (b"[" * 100_000 + b"\n", "nested too deeply"),
        (b'{"prompt": ' + b"9" * 5000 + b"}\n", "thousands of digits"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, line: bytes, problem: str) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'{"prompt": "a"}\n' + line)
    refused(read_rows, config(path), f"{path}:2", problem)


def test_a_missing_file_proposes_its_neighbour(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", {"prompt": "a"})
    refused(read_rows, config(tmp_path / "trian.jsonl"), "no file", "did you mean 'train.jsonl'?")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("absent/train.jsonl", ("its folder", "does not exist")),
        ("", ("is a folder", "train.jsonl")),
        ("train.csv", ("not a kind of file", ".parquet")),
        ("empty.jsonl", ("has no rows",)),
        ("d.parquet.gz", ("not a kind of file",)),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str, words: tuple[str, ...]) -> None:
    write(tmp_path / "train.jsonl", {"prompt": "a"})
    for empty in ("train.csv", "empty.jsonl", "d.parquet.gz"):
        write(tmp_path / empty)
    refused(read_rows, config(tmp_path / name), str(tmp_path), *words)


def test_shipped_files_are_found() -> None:
    records = read_prompts(config("shipped:data/plain_language/prompts.heldout.jsonl", limit=3))
    assert len(records) == 3
    refused(read_rows, config("shipped:data/plain_language/prompts.held.jsonl"), "did you mean 'prompts.heldout.jsonl'")


# --- the hub --------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What `load_dataset` answers (or raises) next; its calls are appended."""
    state: list[Any] = []

    class NotFound(FileNotFoundError):
        pass

    def load_dataset(path: str, subset: str | None, *, split: str) -> Any:
        answer = state[0]
        state.append((path, subset, split))
        if isinstance(answer, Exception):
            raise answer
        return answer

    exceptions = types.ModuleType("datasets.exceptions")
    exceptions.DatasetsError = type("DatasetsError", (Exception,), {})  # type: ignore[attr-defined]
    exceptions.DatasetNotFoundError = NotFound  # type: ignore[attr-defined]
    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    monkeypatch.setitem(sys.modules, "datasets.exceptions", exceptions)
    return state


def test_a_hub_row_is_named_by_id_and_number(hub: list[Any]) -> None:
    hub.append([PAIR, {**PAIR, "rejected": ""}])
    cfg = config("trl-lib/tldr-preference", subset="s", split="validation")
    refused(read_rankings, cfg, "trl-lib/tldr-preference, row 2: key 'rejected' is empty")
    assert hub[1] == ("trl-lib/tldr-preference", "s", "validation")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ValueError("Unknown split \"trian\". Should be one of ['train', 'test']."), ("`split:`", "'train'?")),
        (ValueError("BuilderConfig 'x' not found. Available: ['plain', 'xl']"), ("`subset:`", "plain, xl")),
        (ConnectionError("Couldn't reach 'a/b' on the Hub"), ("check the network", "local copy")),
        (OSError("401 Client Error: gated repo"), ("accept its terms", "hf auth login")),
        (RuntimeError("Dataset scripts are no longer supported"), ("scripts are no longer",)),
    ],
)
def test_hub_failures_say_what_to_do(hub: list[Any], error: Exception, words: tuple[str, ...]) -> None:
    hub.append(error)
    refused(read_rows, config("owner/data", split="trian"), "owner/data, split trian", *words)


def test_an_unknown_hub_id_asks_for_its_spelling(hub: list[Any]) -> None:
    hub.append(sys.modules["datasets.exceptions"].DatasetNotFoundError("Dataset 'a/b' doesn't exist"))
    refused(read_rows, config("a/b"), "doesn't exist", "check the spelling")


def test_our_hub_names_are_those_of_the_library() -> None:
    exceptions = pytest.importorskip("datasets.exceptions")
    assert issubclass(exceptions.DatasetNotFoundError, exceptions.DatasetsError)


# --- writing --------------------------------------------------------------------------------------------------


def test_rankings_are_read_back_equal(tmp_path: Path) -> None:
    rankings = [
        Ranking([USER], ["a", "", "ä"], [1, 3, 1], prompt_id="x", meta={"by": ["ann"]}),
        Ranking("p", ["a", "b"], [2, 1], [[0.5, 0.2], [0.8, 0.5]], [[1, 2], [3]], [0.1, 2.0], "y"),
        Ranking("p", ["a", "b"], [1, 2], prompt_id="z", margin=0.5),
    ]
    path = tmp_path / "new" / "rankings.jsonl"
    write_rankings(path, rankings)
    assert read_rankings(config(path)) == rankings
    assert [p.name for p in path.parent.iterdir()] == ["rankings.jsonl"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "rankings.jsonl"
    write_rankings(path, [Ranking("p", ["a", "b"], [1, 2])])
    before = path.read_text()
    with pytest.raises(DataError, match=r"rankings\.jsonl:2: this ranking cannot be written"):
        write_rankings(
            path, [Ranking("q", ["a", "b"], [1, 2]), Ranking("p", ["a", "b"], [1, 2], gold_scores=[float("nan"), 1.0])]
        )
    assert path.read_text() == before
    assert [p.name for p in tmp_path.iterdir()] == ["rankings.jsonl"]
