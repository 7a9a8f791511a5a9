"""`rlhf label ai CONFIG`: a judge model labels the queue, as the annotator judge:NAME.

Each item gets two judgments, one per order: presentation 0 shows the responses as they were queued, presentation 1
the other way round. What they say together is `soft_label`, which `judge_votes.soft_wins` finds again for the export.
Of a ranking every pair is compared in both orders; presentation 0 ranks by the comparisons that showed the earlier
response first, presentation 1 by the others. The notes hold the probabilities of all pairs, beside the order.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from reward_model.labeling.aggregation import aggregate
from reward_model.labeling.agreement import ranks_from_wins, wins_matrix
from reward_model.labeling.answers import MAX_NOTES
from reward_model.labeling.history import Shown, record_answer
from reward_model.labeling.judge import Contest, Judge, Judged, open_judge
from reward_model.labeling.judge_prompt import Verdict
from reward_model.labeling.judge_report import People, judge_report, write_report
from reward_model.labeling.records import Answer, Item, Judgment
from reward_model.labeling.store import LabelStore
from rlhf.config_labeling import LabelingStage
from rlhf.errors import ConfigError, DataError
from rlhf.progress import Progress

NOTHING = Answer("skip")
"""What a judge without a verdict says of an item."""


def main(cfg: LabelingStage) -> None:
    """Judge every item of the project; write judge_report.json into `cfg.run_dir`.

    The same command goes on where an earlier one stopped, and asks nothing twice.

    Raises:
        ConfigError: the project has no judge, or it cannot be asked.
        DataError: there are no items.
        JudgeError: it fails too often. The labels of the batches before are kept.
    """
    if cfg.judge is None:
        raise ConfigError("the labeling project has no judge", fix="add a block `judge:` with a model")
    with LabelStore.open(cfg) as store:
        states = store.item_states()
        items = [item for item in store.items() if states[item.key] != "retired"]
        if not items:
            raise DataError("there are no items to judge", fix="queue some: rlhf label queue CONFIG")
        judge = open_judge(cfg.judge, cfg.run_dir, cfg.seed)
        try:
            judge_items(store, items, judge)
        finally:
            judge.close()


def judge_items(store: LabelStore, items: Sequence[Item], judge: Judge) -> dict[str, Any]:
    """Ask the judge, store what it says batch by batch, write the report; the report."""
    began, done = time.monotonic(), 0
    standing = {(j.item_key, j.presentation): j for j in store.judgments() if j.annotator == judge.cfg.annotator}
    contests = [Contest(item.prompt, tuple(r.text for r in item.responses)) for item in items]
    with Progress("label") as progress:
        try:
            for batch in judge.batches(contests, progress):
                for item, judged in zip(items[done:], batch, strict=False):
                    _record(store, item, judged, judge.cfg.annotator, standing)
                done += len(batch)
        finally:
            people = people_on(store.judgments(), items[: len(judge.work.judged)])
            report = judge_report(judge, wanted=len(items), seconds=time.monotonic() - began, people=people)
            write_report(report, store.cfg.run_dir, progress.console)
    return report


def _record(
    store: LabelStore, item: Item, judged: Judged, annotator: str, standing: Mapping[tuple[str, int], Judgment]
) -> None:
    """Both presentations of an item that has all of its verdicts; of any other, a line in the log.

    `standing`: this judge's judgments from before. One that says the same is left alone, another one is superseded:
    where the judge fails by a skip, for what it said by other criteria, or as another model, is no answer to these.
    """
    verdicts = {key: pair.both for key, pair in judged.pairs.items()}
    complete = {key: both for key, both in verdicts.items() if both is not None}
    if len(complete) < len(verdicts):
        if judged.unasked:
            return
        store.log_event(None, "judge_failed", {"annotator": annotator, "item": item.key})
    K = len(item.responses)
    user_id = store.ensure_user(annotator, role="annotator", labeler="judge")
    with store.begin() as session:  # both or none: one order alone is no label
        for presentation, order in enumerate(([*range(K)], [*reversed(range(K))])):
            answer = NOTHING
            if len(complete) == len(verdicts):
                shown = {key: both[presentation] for key, both in complete.items()}
                answer = _pair_answer(shown[0, 1]) if item.kind == "pair" else _ranking_answer(shown, K, presentation)
            before = standing.get((item.key, presentation))
            if answer == (before.answer if before else NOTHING):
                continue
            said = [annotator, item.key, presentation, answer.value, answer.ranks, answer.notes, before and before.id]
            submission_id = "judge-" + hashlib.sha256(json.dumps(said).encode()).hexdigest()[:40]
            as_shown = Shown(item.key, order, presentation)
            record_answer(session, user_id, as_shown, answer, submission_id, store.clock())


def _pair_answer(said: Verdict) -> Answer:
    """A verdict in the shown orientation; the notes hold its probability, as JSON."""
    sign = (said.p_first < 0.5) - (said.p_first > 0.5)
    return Answer("compare", value=sign * said.strength, notes=json.dumps({"p_first": said.p_first}))


def noted(p_first: Sequence[float]) -> str:
    """The probabilities of a ranking's pairs as JSON; "" where no note is long enough, of more than 21 responses."""
    text = json.dumps({"p_first": [round(p, 6) for p in p_first]}, separators=(",", ":"))
    return text if len(text) <= MAX_NOTES else ""


def _ranking_answer(shown: dict[tuple[int, int], Verdict], K: int, presentation: int) -> Answer:
    """Ranks by place. Of presentation 1 the verdicts speak of the later response, which was shown first."""
    labels = {key: 1 - said.p_first if presentation else said.p_first for key, said in shown.items()}
    ranks = ranks_from_wins(wins_matrix(labels, K))
    dense = {rank: place for place, rank in enumerate(sorted(set(ranks)), 1)}
    by_place = [dense[rank] for rank in (reversed(ranks) if presentation else ranks)]
    places = combinations(reversed(range(K)) if presentation else range(K), 2)
    p_first = [shown[min(pair), max(pair)].p_first for pair in places]
    return Answer("rank", ranks=by_place, notes=noted(p_first))


def people_on(judgments: Sequence[Judgment], items: Sequence[Item]) -> list[People]:
    """By item: the share of people's judgments for the lower-indexed response of each pair, a tie counting half.

    Presentation 0 alone counts: a repeat is no further opinion.
    """
    theirs = [one for one in judgments if one.labeler == "person" and one.presentation == 0 and one.decides]
    wins = aggregate({item.key: item for item in items}, theirs, "majority")
    return [
        {(i, j): wins[item.key][i][j] for i, j in combinations(range(len(item.responses)), 2)}
        if item.key in wins
        else {}
        for item in items
    ]
