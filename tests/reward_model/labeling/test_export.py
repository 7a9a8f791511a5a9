"""What was clicked is what is exported, and what is exported can be read: by us, by datasets, by TRL."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reward_model.data import refuse_mixed_sources
from reward_model.labeling import export
from reward_model.labeling.preferences import (
    RATED,
    is_held_out,
    label_items,
    preference_row,
    ranking_of,
)
from reward_model.labeling.records import Answer, Candidate, Item, Judgment
from reward_model.labeling.store import LabelStore
from rlhf.config_labeling import ExportConfig, LabelingStage
from rlhf.config_schema import DatasetConfig
from rlhf.data.records import read_rankings, write_rankings
from rlhf.errors import DataError

CHAT: Any = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Why?"},
]
NUMBER = iter(range(1, 10**6))


def said(item: Item, annotator: str, answer: Answer, order: list[int] | None = None, **more: Any) -> Judgment:
    order = order or list(range(len(item.responses)))
    more = {"labeler": "person", **more}
    return Judgment(next(NUMBER), item.key, item.kind, annotator, order=order, answer=answer, **more)


def pair(prompt: Any = "q", texts: tuple[str, str] = ("good one", "bad one"), **more: Any) -> Item:
    return Item(prompt, [Candidate(texts[0], "sft"), Candidate(texts[1], "ppo")], **more)


def labels(items: list[Item], judgments: list[Judgment], **cfg: Any) -> tuple[list[Any], Counter[str]]:
    return label_items(items, {}, judgments, ExportConfig(**cfg))


# --- what was clicked -----------------------------------------------------------------------------------------


def clicks(k: int) -> st.SearchStrategy[Answer]:
    """Any answer to `k` responses."""
    others = st.sampled_from([Answer("both_bad"), Answer("skip"), Answer("flag")])
    if k == 2:
        return st.integers(-3, 3).map(lambda value: Answer("compare", value)) | others
    dense = st.lists(st.integers(1, k), min_size=k, max_size=k).map(
        lambda ranks: [1 + sorted(set(ranks)).index(rank) for rank in ranks]
    )
    return dense.map(lambda ranks: Answer("rank", ranks=ranks)) | others


def order_of_texts(texts: list[str], answer: Answer) -> list[set[str]]:
    """Groups of texts, best first, from what stood where on the screen."""
    if answer.choice == "both_bad" or answer.value == 0:
        return [set(texts)]
    if answer.choice == "compare":
        left_is_better = (answer.value or 0) < 0
        return [{texts[0]}, {texts[1]}] if left_is_better else [{texts[1]}, {texts[0]}]
    ranks = answer.ranks or []
    return [{text for text, r in zip(texts, ranks, strict=True) if r == rank} for rank in sorted(set(ranks))]


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_what_was_clicked_is_what_is_exported(tmp_path: Path, data: st.DataObject) -> None:
    """Through the store: sides swapped, answers undone, items that come back, gold questions between them."""
    folder = tmp_path / str(next(NUMBER))
    cfg = LabelingStage(run_dir=str(folder), repeat_fraction=0.5, repeat_after=1, seed=data.draw(st.integers(0, 99)))
    items = [pair(f"pair {i}", (f"one {i}", f"other {i}")) for i in range(3)]
    items += [Item(f"rank {i}", [Candidate(f"{c} {i}") for c in "abc"], kind="ranking") for i in range(2)]
    items.append(pair("gold", ("right", "wrong"), gold_ranks=[1, 2]))
    clicked: dict[str, tuple[list[str], Answer]] = {}
    with LabelStore.open(cfg) as store:
        store.add_items(items)
        user = store.ensure_user("ann", role="annotator")
        seen: Counter[str] = Counter()
        last: str | None = None
        for step in range(25):
            if last is not None and data.draw(st.integers(0, 3)) == 0:
                store.undo(user)
                clicked.pop(last, None)
                seen[last] -= 1
                last = None
            task = store.next_task(user)
            if task is None:
                break
            prompt = str(task.prompt)
            answer = data.draw(clicks(len(task.responses)))
            store.submit(user, task.assignment_id, answer, f"s{step}")
            first_look = not seen[prompt]
            seen[prompt] += 1
            last = prompt if first_look else None  # an undone repeat changes nothing that is exported
            if first_look:
                clicked[prompt] = (task.responses, answer)
        states, judgments = store.item_states(), store.judgments()
    found, _ = label_items(items, states, judgments, ExportConfig(ties="keep"))
    decided = {p: c for p, c in clicked.items() if c[1].choice not in ("skip", "flag") and p != "gold"}
    held_back = {item.prompt for item in items if states[item.key] == "flagged"}
    assert {label.item.prompt for label in found} == decided.keys() - held_back
    for label in found:
        texts, answer = clicked[str(label.item.prompt)]
        ranking = ranking_of(label)
        by_rank = [
            {text for text, r in zip(ranking.responses, ranking.ranks, strict=True) if r == rank}
            for rank in sorted(set(ranking.ranks))
        ]
        assert by_rank == order_of_texts(texts, answer)
        if label.item.kind == "pair" and len(by_rank) == 2:
            row = preference_row(label, cfg.export, conversational=False, margins=True)
            assert [{row["chosen"]}, {row["rejected"]}] == by_rank
            assert row["margin"] == abs(answer.value or 0)
            assert row["probability"] == 1.0


# --- which judgments count ------------------------------------------------------------------------------------


def test_what_is_left_out_is_counted() -> None:
    items = [pair(str(i)) for i in range(6)]
    items[0].gold_ranks = [1, 2]
    judgments = [
        said(items[0], "a", Answer("compare", 1)),
        said(items[2], "a", Answer("skip")),
        said(items[3], "a", Answer("compare", -1)),
        said(items[3], "b", Answer("flag")),
        said(items[4], "a", Answer("compare", 0)),
        said(items[5], "a", Answer("compare", 2)),
        said(items[5], "a", Answer("compare", 2), [1, 0], presentation=1),  # the other side this time: left out
    ]
    found, left_out = label_items(items, {items[3].key: "flagged"}, judgments, ExportConfig())
    assert left_out == {"gold questions": 1, "not judged": 1, "skipped by all": 1, "flagged": 1, "tied": 1}
    assert [(label.item.prompt, label.wins, label.margin) for label in found] == [("5", [[0.5, 0.0], [1.0, 0.5]], 2.0)]
    kept, left_out = label_items(items, {items[3].key: "flagged"}, judgments, ExportConfig(ties="keep"))
    assert len(kept) == 2
    assert "tied" not in left_out
    row = preference_row(kept[0], ExportConfig(ties="keep"), conversational=False, margins=True)
    assert (row["probability"], row["margin"]) == (0.5, 0.0)


def test_wins_margin_and_agreement_by_hand() -> None:
    """Of three people one says the left (the other response) by 3, two prefer it by 1 and 2; one tie beside them."""
    item = pair()
    judgments = [
        said(item, "a", Answer("compare", -3)),
        said(item, "b", Answer("compare", -1), [1, 0]),
        said(item, "c", Answer("compare", 2)),
        said(item, "d", Answer("compare", 0)),
    ]
    (label,), _ = labels([item], judgments, ties="keep")
    assert label.wins == [[0.5, 1.5 / 4], [2.5 / 4, 0.5]]
    assert label.margin == 0.0  # (-3 + 1 + 2 + 0) / 4
    assert label.agreement == 0.5
    (label,), _ = labels([item], judgments[:2], ties="keep")
    assert (label.tied, label.margin) == (True, 0.0)  # -3 and 1, but one vote each: neither leads
    (label,), _ = labels([item], judgments[1:], ties="keep")
    assert label.margin == pytest.approx(1.0)
    assert label.ranks == [2, 1]


def test_people_count_before_a_judge_whose_two_orders_are_averaged() -> None:
    judged, both = pair("judged"), pair("both")
    judge: Any = {"labeler": "judge"}
    judgments = [
        said(judged, "m", Answer("compare", -2), **judge),
        said(judged, "m", Answer("compare", -2), [1, 0], presentation=1, **judge),  # left again: contradicts itself
        said(both, "m", Answer("compare", 2), **judge),
        said(both, "m", Answer("compare", -2), [1, 0], presentation=1, **judge),
        said(both, "ann", Answer("compare", -1)),
    ]
    found, _ = labels([judged, both], judgments, ties="keep")
    assert [(label.labels, label.ranks) for label in found] == [("judge model", [1, 1]), ("people", [1, 2])]
    assert ranking_of(found[0]).meta["labels"] == "judge model"


def test_labels_from_ratings_do_not_count_beside_comparisons_and_have_files_of_their_own(tmp_path: Path) -> None:
    rated, both = pair("rated"), pair("both")
    ratings = [said(item, f"{RATED}gpt-4", Answer("rank", ranks=[1, 2]), labeler="judge") for item in (rated, both)]
    judgments = [*ratings, said(both, "model", Answer("compare", 3), labeler="judge")]
    found, left_out = labels([rated, both], judgments)
    assert [(label.source, label.ranks) for label in found] == [("ratings", [1, 2]), ("comparisons", [2, 1])]
    cfg = LabelingStage(run_dir="unused", export=ExportConfig(heldout_fraction=0))
    written = export.write_labels(tmp_path, found, left_out, cfg)
    assert sorted(written) == [
        "pairs.train.jsonl",
        "pairs_from_ratings.train.jsonl",
        "preferences.train.jsonl",
        "preferences_from_ratings.train.jsonl",
    ]
    mixed = [*read(tmp_path / "pairs.train.jsonl"), *read(tmp_path / "pairs_from_ratings.train.jsonl")]
    with pytest.raises(DataError, match=r"x\.jsonl: 1 of 2 rankings were derived from ratings"):
        refuse_mixed_sources(mixed, "x.jsonl")
    trl = [*read(tmp_path / "preferences.train.jsonl"), *read(tmp_path / "preferences_from_ratings.train.jsonl")]
    with pytest.raises(DataError, match="derived from ratings"):
        refuse_mixed_sources(trl, "x.jsonl")
    refuse_mixed_sources(mixed[:1], "x.jsonl")


def read(path: Path) -> Any:
    return read_rankings(DatasetConfig.model_validate({"path": str(path)}))


# --- formats --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["What is\nit?", CHAT], ids=["text", "chat"])
@pytest.mark.parametrize("format", ["auto", "standard", "conversational"])
@pytest.mark.parametrize("implicit", [False, True])
def test_every_trl_format_is_read_back_as_the_same_pair(
    tmp_path: Path, prompt: Any, format: Any, implicit: bool
) -> None:
    """Both answers begin alike: where the prompt ends must not be guessed from that."""
    from trl.data_utils import is_conversational, maybe_extract_prompt

    item = pair(prompt, ("The sun is far.", "The sun is near."))
    export_cfg = ExportConfig(format=format, prompt="implicit" if implicit else "explicit", heldout_fraction=0)
    cfg = LabelingStage(run_dir="unused", export=export_cfg)
    found, left_out = label_items([item], {}, [said(item, "a", Answer("compare", 2))], export_cfg)
    written = export.write_labels(tmp_path, found, left_out, cfg)
    if format == "standard" and prompt is CHAT and not implicit:
        assert "preferences.train.jsonl" not in written
        assert left_out == {
            "preferences: a chat of several turns is no plain text (set export.format: conversational)": 1
        }
        return
    assert not left_out
    (ranking,) = read(tmp_path / "preferences.train.jsonl")
    assert ranking.responses == ["The sun is near.", "The sun is far."]
    asked = ranking.prompt if isinstance(ranking.prompt, list) else [{"role": "user", "content": ranking.prompt}]
    assert asked == (CHAT if prompt is CHAT else [{"role": "user", "content": prompt}])
    row = json.loads((tmp_path / "preferences.train.jsonl").read_text())
    turns = format == "conversational" or (format == "auto" and prompt is CHAT)
    assert is_conversational(row) == turns
    assert ("prompt" in row) != implicit
    assert {"prompt", "chosen", "rejected"} <= maybe_extract_prompt(row).keys()
    assert row["labels"] == "people"


def test_what_cannot_be_read_back_is_left_out_and_named() -> None:
    """A response that contains a dialogue's marker, and an empty one, which TRL's formats cannot hold."""
    cfg = ExportConfig(format="standard", prompt="implicit")
    marked, empty = pair("q", ("a\n\nHuman: b", "c")), pair("p", ("", "c"))
    judgments = [said(item, "a", Answer("compare", -1)) for item in (marked, empty)]
    found, left_out = label_items([marked, empty], {}, judgments, cfg)
    with pytest.raises(DataError, match=r"Human turn|another one|same dialogue"):
        preference_row(found[0], cfg, conversational=False, margins=False)
    rows = export._preference_rows(found, found, left_out, LabelingStage(run_dir="unused", export=cfg))
    assert not rows
    assert sum(left_out.values()) == 2


def test_tokens_and_policies_of_the_buffer_stay(tmp_path: Path) -> None:
    item = Item("q", [Candidate("a", "sft", [5, 6, 7]), Candidate("b", "ppo, step 3", [5, 8])], prompt_id="p1")
    (label,), _ = labels([item], [said(item, "x", Answer("compare", 3))])
    write_rankings(tmp_path / "r.jsonl", [ranking_of(label)])
    (ranking,) = read(tmp_path / "r.jsonl")
    assert ranking.tokens == [[5, 6, 7], [5, 8]]
    assert (ranking.ranks, ranking.wins, ranking.margin) == ([2, 1], [[0.5, 0.0], [1.0, 0.5]], 3.0)
    assert (ranking.prompt_id, ranking.meta["policies"]) == ("p1", ["sft", "ppo, step 3"])
    assert asdict(ranking)["meta"]["labels"] == "people"
    item.responses[1].tokens = None
    assert ranking_of(label).tokens is None


def test_a_text_and_the_chat_of_that_turn_are_on_one_side() -> None:
    sides = [is_held_out(f"prompt {i}", 0.5, 0) for i in range(40)]
    chats: list[Any] = [[{"role": "user", "content": f"prompt {i}"}] for i in range(40)]
    assert [is_held_out(chat, 0.5, 0) for chat in chats] == sides
    assert 8 < sum(sides) < 32


def test_no_prompt_changes_sides_as_labels_grow() -> None:
    held = [is_held_out(f"prompt {i}", 0.3, seed=1) for i in range(2000)]
    assert 0.26 < sum(held) / 2000 < 0.34  # three standard errors
    assert held != [is_held_out(f"prompt {i}", 0.3, seed=2) for i in range(2000)]
    assert not any(is_held_out(f"prompt {i}", 0.0, seed=1) for i in range(100))
    assert all(is_held_out(f"prompt {i}", 0.6, seed=1) for i, h in enumerate(held) if h)


# --- the whole command ----------------------------------------------------------------------------------------


def test_the_folder_appears_whole_and_other_libraries_read_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    import datasets

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    export_cfg = {"heldout_fraction": 0.3, "also": ["label_studio", "argilla"], "resamples": 5}
    cfg = LabelingStage.model_validate({"run_dir": str(tmp_path / "run"), "title": "<b>Bold</b>", "export": export_cfg})
    with pytest.raises(DataError, match="nothing to export: the queue is empty"):
        export.main(cfg)
    items = [pair(f"prompt {i}", (f"good {i}", f"bad {i}")) for i in range(8)]
    items += [Item(CHAT, [Candidate(c) for c in "abc"], kind="ranking")]
    with LabelStore.open(cfg) as store:
        store.add_items(items)
        user = store.ensure_user("<i>ann</i>", role="annotator")
        while task := store.next_task(user):
            good = 0 if task.responses[0].startswith("good") else 1
            answer = Answer("compare", 2 * good - 1) if task.kind == "pair" else Answer("rank", ranks=[1, 2, 2])
            store.submit(user, task.assignment_id, answer, f"s{task.assignment_id}")
        store.undo(user)
        again = store.next_task(user)
        assert again
        last = Answer("compare", 3 if again.responses[1].startswith("good") else -3)
        store.submit(user, again.assignment_id, last if again.kind == "pair" else Answer("both_bad"), "again")
        store.record("sim", "simulated", items[0].key, [0, 1], Answer("compare", 1), presentation=0, submission_id="m")
    result = export.main(cfg)
    folder = tmp_path / "run" / "export"
    out = capsys.readouterr().out
    assert "labeled by people, SIMULATED annotators" in out
    assert "held-out side" not in out
    loaded = {
        name: datasets.load_dataset("json", data_files=path, split="train") for name, path in result.outputs.items()
    }
    pairs = [row for name in ("preferences_train", "preferences_heldout") for row in loaded[name]]
    assert sorted((row["chosen"], row["rejected"]) for row in pairs) == [(f"good {i}", f"bad {i}") for i in range(8)]
    assert {row["labels"] for row in pairs} == {"people"}
    assert not {r["prompt"] for r in loaded["preferences_train"]} & {r["prompt"] for r in loaded["preferences_heldout"]}
    raw = [json.loads(line) for line in (folder / "judgments.jsonl").read_text().splitlines()]
    assert [row["choice"] for row in raw].count("undo") == 1
    assert sum(not row["effective"] for row in raw) == 2  # the withdrawn answer, and the row that withdrew it
    assert {row["labels"] for row in raw} == {"people", "simulated"}
    page = (folder / "agreement.html").read_text()
    assert "&lt;i&gt;ann&lt;/i&gt;" in page
    assert "&lt;b&gt;Bold" in page
    assert "<script" not in page
    assert "SIMULATED" in page
    assert "SIMULATED" in (folder / "README.txt").read_text()
    report = json.loads((folder / "agreement.json").read_text())
    assert report["pairs"]["alpha_nominal"]["note"] == "undefined (one annotator)"
    assert report["exported"]["preferences.train.jsonl"] == len(loaded["preferences_train"])
    assert (folder / "label_studio.pairs.json").is_file()
    assert (folder / "argilla.pairs.json").is_file()
    kept = {path.name for path in folder.iterdir()}
    export.main(cfg)
    assert {path.name for path in folder.iterdir()} == kept


@pytest.mark.parametrize(("fraction", "note"), [(0.01, True), (0.0, False)])
def test_an_empty_held_out_side_is_said_unless_none_was_wanted(
    tmp_path: Path, capsys: pytest.CaptureFixture, fraction: float, note: bool
) -> None:
    cfg = LabelingStage.model_validate({"run_dir": str(tmp_path), "export": {"heldout_fraction": fraction}})
    item = pair()
    with LabelStore.open(cfg) as store:
        store.add_items([item])
        store.record("ann", "person", item.key, [0, 1], Answer("compare", 1), presentation=0, submission_id="a")
    assert [*export.main(cfg).outputs] == ["pairs_train", "preferences_train"]
    assert ("no prompt fell to the held-out side" in capsys.readouterr().out) == note


def test_an_imported_name_cannot_turn_the_agreement_report_around(tmp_path: Path) -> None:
    cfg = LabelingStage.model_validate({"run_dir": str(tmp_path)})
    item = pair()
    with LabelStore.open(cfg) as store:
        store.add_items([item])
        store.record("ann\u202e", "person", item.key, [0, 1], Answer("compare", 1), presentation=0, submission_id="a")
    export.main(cfg)
    page = (tmp_path / "export" / "agreement.html").read_text(encoding="utf-8")
    assert "ann\ufffd" in page
    assert "\u202e" not in page
