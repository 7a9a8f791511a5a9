"""Foreign files: hand-written rows of each format, malformed ones named by place and key, and round trips."""

from __future__ import annotations

import copy
import gzip
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reward_model.labeling import export, importing
from reward_model.labeling.importing import FORMATS, detect, gold_ranks, merge, read, reordered
from reward_model.labeling.other_tools import WRITERS
from reward_model.labeling.preferences import label_items
from reward_model.labeling.records import Answer, Candidate, Item, Judgment, canonical_ranks
from reward_model.labeling.store import LabelStore
from rlhf.config_labeling import LabelingStage
from rlhf.data.fields import FieldError
from rlhf.errors import ConfigError, DataError

CHAT: Any = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Why?"},
]
HH = {"chosen": "\n\nHuman: Why?\n\nAssistant: Because.", "rejected": "\n\nHuman: Why?\n\nAssistant: No."}
TLDR: dict[str, Any] = {
    "info": {"id": "t3", "post": "I lost my keys.", "title": "Keys", "subreddit": "help"},
    "summaries": [{"text": " Lost keys.", "policy": "sup4"}, {"text": " Found keys.", "policy": "ref"}],
    "choice": 1,
    "worker": "w7",
    "batch": "batch3",
}
ULTRA: dict[str, Any] = {
    "instruction": "Name a colour.",
    "completions": [
        {"model": "a", "response": "Blue", "overall_score": 8.5},
        {"model": "b", "response": "Seven", "overall_score": 1.0},
        {"model": "c", "response": "Red", "overall_score": 8.5},
    ],
}
STUDIO: dict[str, Any] = {
    "id": 1,
    "data": {"prompt": "Why?", "answer1": "So.", "answer2": "No."},
    "annotations": [
        {
            "completed_by": 4,
            "lead_time": 3.5,
            "was_cancelled": False,
            "result": [{"type": "pairwise", "from_name": "pw", "to_name": "x", "value": {"selected": "right"}}],
        }
    ],
}
STUDIO_MIN = {"id": 1, "text1": "So.", "text2": "No.", "prompt": "Why?", "pw": [{"selected": "left"}],
              "annotator": 2, "annotation_id": 9, "lead_time": 1.0}  # fmt: skip
ARGILLA: dict[str, Any] = {
    "id": "r1",
    "fields": {"instruction": "Why?", "response-1": "So.", "response-2": "No.", "response-3": "Ask."},
    "metadata": {},
    "suggestions": {"ranking": {"value": ["response-3", "response-1", "response-2"], "score": None, "agent": "gpt"}},
    "responses": {"ranking": [{"value": ["response-2", "response-1", "response-3"], "user_id": "u1"}]},
}
ARGILLA_V1: dict[str, Any] = {
    "fields": {"prompt": "Why?", "reply_1": "So.", "reply_2": "No."},
    "responses": [
        {
            "user_id": "u1",
            "status": "submitted",
            "values": {"preference": {"value": [{"value": "reply_2", "rank": 1}, {"value": "reply_1", "rank": 1}]}},
        },
        {"user_id": "u2", "status": "discarded", "values": {}},
        {"user_id": "u3", "status": "draft", "values": {}},
    ],
    "suggestions": [{"question_name": "preference", "value": "reply_1", "agent": "m"}],
}
ROWS: dict[str, dict[str, Any]] = {
    "hh": HH,
    "preference": {"prompt": CHAT, "chosen": "a", "rejected": "b", "margin": 2, "labels": "people"},
    "ranking": {"prompt": "q", "responses": ["a", "b", "c"], "ranks": [2, 1, 1], "meta": {"labels": "simulated"}},
    "tldr": TLDR,
    "ultrafeedback": ULTRA,
    "label_studio": STUDIO,
    "argilla": ARGILLA,
}


def write(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def one(row: dict[str, Any]) -> Any:
    return FORMATS[detect(row)](row)


def heard(entry: Any) -> list[tuple[str, str, str, Any]]:
    return [(s.annotator, s.labeler, s.answer.choice, s.answer.ranks or s.answer.value) for s in entry.said]


@pytest.mark.parametrize("name", ROWS)
def test_every_format_is_detected(name: str) -> None:
    assert detect(ROWS[name]) == name


def test_the_formats_by_hand() -> None:
    hh = one(HH)
    assert (hh.item.kind, hh.item.prompt) == ("pair", [{"role": "user", "content": "Why?"}])
    assert heard(hh) == [("imported hh", "person", "rank", [1, 2])]
    assert heard(one(ROWS["preference"])) == [("imported preference", "person", "compare", -2)]
    ranking = one(ROWS["ranking"])
    assert (ranking.item.kind, heard(ranking)) == ("ranking", [("imported ranking", "simulated", "rank", [2, 1, 1])])
    tldr = one(TLDR)
    assert tldr.item.prompt == "SUBREDDIT: r/help\n\nTITLE: Keys\n\nPOST: I lost my keys.\n\nTL;DR:"
    assert [(r.text, r.policy) for r in tldr.item.responses] == [("Lost keys.", "sup4"), ("Found keys.", "ref")]
    assert (heard(tldr), tldr.item.batch) == ([("w7", "person", "rank", [2, 1])], "batch3")
    ultra = one(ULTRA)
    assert (ultra.item.kind, heard(ultra)) == ("ranking", [("ratings of gpt-4", "judge", "rank", [1, 2, 1])])
    binarised = {"prompt": "q", "chosen": "a", "rejected": "b", "score_chosen": 7.0, "score_rejected": 7.0}
    assert heard(one(binarised)) == [("ratings of imported", "judge", "rank", [1, 1])]
    assert heard(one(STUDIO)) == [("4", "person", "rank", [2, 1])]
    assert one(STUDIO).said[0].answer.ms_active == 3500
    assert heard(one(STUDIO_MIN)) == [("2", "person", "rank", [1, 2])]
    assert heard(one(ARGILLA)) == [("u1", "person", "rank", [2, 1, 3]), ("gpt", "judge", "rank", [2, 3, 1])]
    assert heard(one(ARGILLA_V1)) == [
        ("u1", "person", "rank", [1, 1]),
        ("u2", "person", "skip", None),
        ("m", "judge", "rank", [1, 2]),
    ]


def test_label_studios_plain_ranker_and_buckets() -> None:
    row = {"data": {"prompt": "q", "items": [{"id": n, "body": n} for n in "xyz"]}, "annotations": []}
    for ranker, ranks in (
        ({"rank": ["z", "x", "y"]}, [2, 3, 1]),
        ({"1": ["y"], "2": ["x", "z"], "3": []}, [2, 1, 2]),
        ({"2": ["y"], "10": ["x", "z"]}, [2, 1, 2]),
    ):
        result = [{"type": "ranker", "from_name": "rank", "to_name": "items", "value": {"ranker": ranker}}]
        entry = FORMATS["label_studio"]({**row, "annotations": [{"completed_by": "a", "result": result}]})
        assert entry.said[0].answer.ranks == ranks
        assert entry.item.kind == "ranking"
    result = [{"type": "ranker", "value": {"ranker": {"_": ["x"], "good": ["y", "z"]}}}]
    with pytest.raises(FieldError, match="name the buckets 1, 2"):
        FORMATS["label_studio"]({**row, "annotations": [{"completed_by": "a", "result": result}]})


# --- malformed rows -------------------------------------------------------------------------------------------


def ranker(value: dict[str, Any]) -> dict[str, Any]:
    return {"type": "ranker", "from_name": "rank", "value": {"ranker": value}}


def rated(value: Any) -> list[dict[str, Any]]:
    strength = {"type": "rating", "from_name": "strength", "value": {"rating": value}}
    return [{"type": "pairwise", "value": {"selected": "left"}}, strength]


@pytest.mark.parametrize(
    ("name", "path", "value", "key"),
    [
        ("tldr", ["choice"], 2, "choice"),
        ("tldr", ["summaries", 0, "text"], None, r"summaries\[0\].text"),
        ("tldr", ["summaries"], [], "summaries"),
        ("tldr", ["info", "post"], 3, "info.post"),
        ("ultrafeedback", ["completions", 1, "overall_score"], "N/A", r"completions\[1\].overall_score"),
        ("ultrafeedback", ["completions", 1, "response"], "Blue", r"responses\[1\]"),
        ("ultrafeedback", ["instruction"], 5, "instruction"),
        ("label_studio", ["data", "answer2"], None, "responses"),
        ("label_studio", ["data", "prompt"], None, "prompt"),
        ("label_studio", ["annotations", 0, "result", 0, "value", "selected"], "up", r"annotations\[0\].result"),
        ("label_studio", ["annotations", 0, "result"], [], r"annotations\[0\].result"),
        ("argilla", ["responses", "ranking", 0, "value"], ["response-1"], "responses.ranking"),
        ("argilla", ["fields"], [], "fields"),
        ("ultrafeedback", ["instruction"], " ", "prompt"),
        ("ultrafeedback", ["completions", 0, "response"], "half \ud800", r"responses\[0\]"),
        ("ultrafeedback", ["completions", 0, "overall_score"], 10**400, r"completions\[0\].overall_score"),
        ("label_studio", ["annotations", 0, "result", 0], {"type": "choices", "value": {"choices": 5}}, r"\S*choices"),
        ("label_studio", ["annotations", 0, "result", 0], {"type": "textarea", "value": {"text": [5]}}, r"\S*text"),
        (
            "label_studio",
            ["annotations", 0, "result", 0],
            ranker({"\u00b2": ["answer1"], "1": ["answer2"]}),
            r"\S*result",
        ),
        ("label_studio", ["annotations", 0, "result", 0], ranker({"_": 5}), r"\S*result"),
        ("label_studio", ["annotations", 0, "result"], rated([1]), r"\S*strength"),
        ("label_studio", ["annotations", 0, "result"], rated(-2), r"\S*strength"),
        ("label_studio", ["annotations", 0, "result"], rated(math.inf), r"\S*strength"),
        ("ranking", ["ranks"], [1, 2], "ranks"),
        ("hh", ["rejected"], "\n\nHuman: Else?\n\nAssistant: No.", "rejected"),
    ],
)
def test_malformed_rows_are_named_by_file_line_and_key(
    tmp_path: Path, name: str, path: list[Any], value: Any, key: str
) -> None:
    bad = copy.deepcopy(ROWS[name])
    node: Any = bad
    for part in path[:-1]:
        node = node[part]
    node[path[-1]] = value
    file = write(tmp_path / "rows.jsonl", ROWS[name], bad)
    with pytest.raises(DataError, match=rf"read as {name}: 1 of 2 rows are malformed\n  - .*rows.jsonl:2: key '{key}'"):
        read(file)


def test_tolerated_rows_are_left_out_and_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = write(tmp_path / "rows.jsonl", TLDR, TLDR | {"choice": 5}, TLDR | {"worker": "w8"})
    assert len(read(file, max_bad_fraction=0.34)) == 2
    assert "1 of 3 rows are malformed and left out" in (out := capsys.readouterr().out)
    assert "rows.jsonl:2: key 'choice' is 5" in out
    with pytest.raises(DataError, match="1 of 3 rows are malformed"):
        read(file, max_bad_fraction=0.3)


def test_what_holds_no_comparison_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no comparison"):
        read(write(tmp_path / "a.jsonl", {"prompt": "q", "completion": "a"}))
    with pytest.raises(ConfigError, match="did you mean 'argilla'"):
        read(write(tmp_path / "b.jsonl", HH), "argila")
    with pytest.raises(DataError, match="has no rows"):
        read(write(tmp_path / "c.jsonl"))
    with pytest.raises(DataError, match="no file"):
        read(str(tmp_path / "d.jsonl"))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 9) | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=5,
)


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_whatever_stands_at_a_key_a_row_is_read_or_named(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from([*ROWS, "argilla v1"]))
    row = copy.deepcopy(ROWS.get(name, ARGILLA_V1))
    node: Any = row
    while True:
        key = data.draw(st.sampled_from(list(node) if isinstance(node, dict) else list(range(len(node)))))
        if isinstance(node[key], dict | list) and node[key] and data.draw(st.booleans()):
            node = node[key]
            continue
        node[key] = data.draw(json_values)
        break
    try:
        entry = FORMATS[name.split()[0]](row)
    except FieldError:
        return
    for said in entry.said:
        if said.answer.choice in ("compare", "rank", "both_bad"):
            canonical_ranks(said.answer, list(range(len(entry.item.responses))))


# --- merging, labels, gold ------------------------------------------------------------------------------------


def best_of(entry: Any) -> list[tuple[str, set[str]]]:
    """Who said which texts to be the best."""
    texts = [response.text for response in entry.item.responses]
    return [
        (said.annotator, {t for t, rank in zip(texts, said.answer.ranks or [], strict=True) if rank == 1})
        for said in entry.said
    ]


def test_rows_about_the_same_responses_are_one_item_whatever_their_order() -> None:
    other = copy.deepcopy(TLDR) | {"summaries": TLDR["summaries"][::-1], "worker": "w8"}  # picks what stood first
    for rows in ((TLDR, other), (other, TLDR)):
        (entry,) = merge([one(row) for row in rows])
        assert sorted(best_of(entry)) == [("w7", {"Found keys."}), ("w8", {"Lost keys."})]
    assert reordered(Answer("compare", 2), [1, 0]).value == -2
    assert reordered(Answer("rank", ranks=[1, 2, 3]), [2, 0, 1]).ranks == [3, 1, 2]


def test_chosen_ones_are_not_always_the_first_response() -> None:
    rows = [{"prompt": str(i), "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(400)]
    entries = merge([one(row) for row in rows])
    assert [best_of(entry)[0][1] for entry in entries] == [{f"good {i}"} for i in range(400)]
    first = sum(entry.item.responses[0].text.startswith("good") for entry in entries)
    assert abs(first - 200) < 4 * math.sqrt(100)


def test_what_is_called_chosen_at_probability_one_half_is_a_tie() -> None:
    """So our own export writes the ties that it keeps."""
    row = {"prompt": "q", "chosen": "one", "rejected": "two"}
    assert best_of(one(row | {"probability": 0.5, "margin": 0.0}))[0][1] == {"one", "two"}
    assert one(row | {"probability": 0.5, "margin": 2.0}).said[0].answer.value == 0
    assert best_of(one(row | {"probability": 0.6}))[0][1] == {"one"}


def test_rows_without_a_name_are_answers_of_different_people(tmp_path: Path) -> None:
    """Two of three rows say "two"; one person's second and third answers would not count."""
    row = {"prompt": "q", "chosen": "one", "rejected": "two"}
    other = row | {"chosen": "two", "rejected": "one"}
    cfg = stage(tmp_path / "run")
    for _ in range(2):  # the second time, nothing is new
        importing.main(cfg, write(tmp_path / "rows.jsonl", row, other, other), with_labels=True)
    with LabelStore.open(cfg) as store:
        judgments = store.judgments(effective=False)
        assert [(j.annotator, j.presentation) for j in judgments] == [
            ("imported preference", 0),
            ("imported preference 2", 0),
            ("imported preference 3", 0),
        ]
        (label,), _ = label_items(store.items(), store.item_states(), store.judgments(), cfg.export)
    assert label.item.responses[label.ranks.index(1)].text == "two"
    assert sorted(label.wins[0] + label.wins[1]) == pytest.approx([1 / 3, 0.5, 0.5, 2 / 3])


def test_twelve_responses_stay_with_their_policies() -> None:
    """Their keys in the order of the alphabet would be 1, 10, 11, 12, 2."""
    texts = {f"response-{i}": f"answer {i}" for i in range(1, 13)}
    policies = json.dumps([f"policy {i}" for i in range(1, 13)])
    ranking = [{"value": key, "rank": i} for i, key in enumerate(texts, 1)]
    row = {"fields": {"prompt": "q", **texts}, "metadata": {"policies": policies}}
    entry = FORMATS["argilla"](row | {"responses": {"ranking": [{"value": ranking, "user_id": "u"}]}})
    assert [r.policy.replace("policy", "answer") for r in entry.item.responses] == list(texts.values())
    assert entry.said[0].answer.ranks == list(range(1, 13))


def stage(folder: Path, **export_keys: Any) -> LabelingStage:
    keys = {"heldout_fraction": 0.0, "resamples": 0, **export_keys}
    return LabelingStage.model_validate({"run_dir": str(folder), "judgments_per_item": 2, "export": keys})


def test_it_says_how_many_soft_labels_became_orders(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pair = {"prompt": "q", "chosen": "a", "rejected": "b"}
    rows = [{**pair, "prompt": f"q{i}", "probability": p} for i, p in enumerate([1.0, 0.8, 0.5])]
    rows[1]["margin"] = 2.0
    ranked = [{"prompt": f"r{p}", "responses": ["a", "b"], "ranks": [1, 2], "wins": [[0.5, p], [1 - p, 0.5]]}
              for p in (0.9, 0.6, 1.0)]  # fmt: skip
    cfg = LabelingStage(run_dir=str(tmp_path / "run"))
    for name, lines, soft in (("pairs", rows, 1), ("rankings", ranked, 2), ("hard", [rows[0], rows[2]], 0)):
        importing.main(cfg, write(tmp_path / f"{name}.jsonl", *lines), with_labels=True)
        out = capsys.readouterr().out
        said = f"{soft} of them came with probabilities, which are not stored: their order is, and a margin as"
        assert (said in out) == bool(soft)
    with LabelStore.open(cfg) as store:
        assert abs(store.judgments()[1].answer.value or 0) == 2, "on the side of the chosen one"


def test_items_come_with_or_without_their_labels_and_once(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = write(tmp_path / "tldr.jsonl", TLDR, TLDR | {"worker": "w8", "choice": 0})
    cfg = stage(tmp_path / "run")
    importing.main(cfg, file)
    with LabelStore.open(cfg) as store:
        assert ([item.wanted for item in store.items()], store.judgments()) == ([2], [])
    for _ in range(2):
        importing.main(cfg, file, with_labels=True)
        with LabelStore.open(cfg) as store:
            (item,), judgments = store.items(), store.judgments(effective=False)
            best = [item.responses[(j.ranks or []).index(1)].text for j in judgments]
            assert [j.annotator for j in judgments] == ["w7", "w8"]
            assert best == ["Found keys.", "Lost keys."]
    out = capsys.readouterr().out
    assert "1 new item, 0 known" in out
    assert "2 labels by 2 annotators: w7, w8" in out


def test_who_asks_for_gold_hears_which_items_are_none(tmp_path: Path, capsys: Any) -> None:
    """A known item stays what it was queued as."""
    cfg = LabelingStage(run_dir=str(tmp_path / "run"))
    row = {"prompt": "Why?", "chosen": "So.", "rejected": "No."}
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row) + "\n")
    importing.main(cfg, str(file))
    file.write_text(json.dumps(row) + "\n" + json.dumps(row | {"prompt": "How?"}) + "\n")
    capsys.readouterr()
    importing.main(cfg, str(file), gold=True)
    out = capsys.readouterr().out
    assert "1 new gold question, 1 known" in out
    assert "1 of the known ones was queued as an item before and stays one" in out
    importing.main(cfg, str(file), gold=True)
    importing.main(cfg, str(file))
    first, second = capsys.readouterr().out.split("0 new items")
    assert "1 of the known ones was queued as an item before and stays one" in first
    assert "1 of the known ones was queued as a gold question before and stays one" in second
    both = [json.dumps(row | {"prompt": prompt}) + "\n" for prompt in ("Why?", "When?")]
    file.write_text("".join(both))
    importing.main(cfg, str(file))
    importing.main(cfg, str(file), gold=True)
    assert "2 of the known ones were queued as items before and stay such" in capsys.readouterr().out
    file.write_text(json.dumps(row | {"prompt": "How?"}) + "\n")
    importing.main(cfg, str(file), gold=True)
    assert "stay" not in capsys.readouterr().out


def test_gold_questions_take_the_files_labels_as_known_answers(tmp_path: Path) -> None:
    cfg = stage(tmp_path / "run")
    file = write(tmp_path / "gold.jsonl", ROWS["ranking"])
    importing.main(cfg, file, gold=True)
    with LabelStore.open(cfg) as store:
        (item,) = store.items()
        assert {r.text: rank for r, rank in zip(item.responses, item.gold_ranks or [], strict=True)} == {
            "a": 2,
            "b": 1,
            "c": 1,
        }
    with pytest.raises(ConfigError, match="exclude each other"):
        importing.main(cfg, file, gold=True, with_labels=True)
    tied = {**ROWS["ranking"], "ranks": [1, 1, 1]}
    with pytest.raises(DataError, match=r"tied.jsonl:1: 1 labels, or a tie"):
        importing.main(cfg, write(tmp_path / "tied.jsonl", tied), gold=True)
    (entry,) = merge([one(TLDR), one({**TLDR, "choice": 0})])
    with pytest.raises(DataError, match="2 labels"):
        gold_ranks(entry)


# --- round trips ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["hh", "preference", "ranking", "tldr", "ultrafeedback"])
def test_import_export_import_gives_the_same_items_and_labels(tmp_path: Path, name: str) -> None:
    rows = [ROWS[name]]
    if name == "preference":
        rows.append({**ROWS[name], "prompt": "another", "margin": None})
    first = merge(read(write(tmp_path / "in.jsonl", *rows)))
    labeled, left_out = _stored_and_labeled(tmp_path / "run", first)
    assert not left_out
    files = export.write_labels(tmp_path, labeled, left_out, stage(tmp_path))
    ours = [file for file in files if not file.startswith("preferences")]
    again = [entry for file in ours for entry in merge(read(str(tmp_path / file)))]
    assert {entry.item.key for entry in again} == {entry.item.key for entry in first}
    by_key = {entry.item.key: entry for entry in again}
    for entry in first:
        (before,), (after,) = entry.said, by_key[entry.item.key].said
        assert (after.answer.value, after.answer.ranks) == (before.answer.value, before.answer.ranks)
        assert (after.labeler, after.annotator[:11] == "ratings of ") == (before.labeler, name == "ultrafeedback")
        assert [r.policy for r in by_key[entry.item.key].item.responses] == [r.policy for r in entry.item.responses]


def _stored_and_labeled(folder: Path, entries: list[Any]) -> Any:
    from reward_model.labeling.preferences import label_items

    cfg = stage(folder)
    with LabelStore.open(cfg) as store:
        store.add_items(entry.item for entry in entries)
        importing.record(store, entries)
        return label_items(store.items(), store.item_states(), store.judgments(), cfg.export)


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=8).filter(
    str.strip
)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("tool", WRITERS)
def test_other_tools_files_are_read_back_as_the_same_items_and_answers(
    tmp_path_factory: pytest.TempPathFactory, tool: str, data: st.DataObject
) -> None:
    """Any texts, orders and answers, of people and of a machine."""
    folder = tmp_path_factory.mktemp("tool")
    prompt = data.draw(TEXT | st.just(CHAT))
    texts = data.draw(st.lists(TEXT, min_size=2, max_size=4, unique=True))
    kind: Any = "pair" if len(texts) == 2 else "ranking"
    item = Item(prompt, [Candidate(text, f"policy {i}") for i, text in enumerate(texts)], kind, prompt_id="p")
    judgments = []
    for number, (name, labeler) in enumerate([("ann", "person"), ("bén", "person"), ("m: 1", "judge")], 1):
        order = data.draw(st.permutations(range(len(texts))))
        ranked = st.permutations(range(1, len(texts) + 1)) | st.just([1] * len(texts))
        answer = data.draw(
            (st.integers(-3, 3).map(lambda v: {"choice": "compare", "value": v}) if kind == "pair" else st.nothing())
            | ranked.map(lambda ranks: {"choice": "rank", "ranks": list(ranks)})
            | st.sampled_from([{"choice": "both_bad"}, {"choice": "flag"}, {"choice": "skip"}])
        )
        extra = {"notes": data.draw(TEXT), "confidence": data.draw(st.sampled_from([None, 1, 5]))}
        if answer["choice"] == "skip":
            extra = {}
        elif labeler == "person":
            extra["ms_active"] = data.draw(st.integers(0, 10**6))
        given = Answer(**answer, **extra)
        if answer["choice"] == "skip" and labeler == "judge":
            continue  # a machine that says nothing predicts nothing
        judgments.append(Judgment(number, item.key, kind, name, labeler, list(order), given))  # type: ignore[arg-type]
    WRITERS[tool](folder, [item], judgments)
    (entry,) = read(str(folder / f"{tool}.{kind}s.json"))
    assert entry.item.key == item.key
    assert [r.policy for r in entry.item.responses] == [r.policy for r in item.responses]
    assert entry.item.prompt_id == "p"
    assert len(entry.said) == len(judgments)
    for judgment, said in zip(judgments, entry.said, strict=True):
        assert (said.annotator, said.labeler) == (judgment.annotator, judgment.labeler)
        again = Judgment(0, item.key, kind, said.annotator, said.labeler, list(range(len(texts))), said.answer)
        assert (again.ranks, again.decides) == (judgment.ranks, judgment.decides)
        if judgment.ranks is None or len(set(judgment.ranks)) > 1:
            assert again.value == judgment.value
        wanted = judgment.answer
        assert (said.answer.confidence, said.answer.ms_active) == (wanted.confidence, wanted.ms_active)
        assert said.answer.notes == wanted.notes


def test_human_labels_of_a_real_data_set_are_imported(tmp_path: Path) -> None:
    """Compressed, as data sets come."""
    file = tmp_path / "hh.jsonl.gz"
    with gzip.open(file, "wt") as out:
        for i in range(3):
            out.write(json.dumps({key: text + f" {i}" for key, text in HH.items()}) + "\n")
    assert len(read(str(file))) == 3
