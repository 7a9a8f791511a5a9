"""`rlhf label CONFIG` with `labeler: people`: the answers go into a labeling project, and the stage ends until enough
is labeled; then the same command takes the labels and goes on.

What is queued depends on the rollouts and the configuration alone, and the project knows its items by their content, so
the command may be repeated, or killed, at any time.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import Any

from reward_model.labeling.aggregation import aggregate
from reward_model.labeling.agreement import ranks_from_wins
from reward_model.labeling.groups import Group, LabelResult, comparable, group_rollouts, split
from reward_model.labeling.records import Candidate, Item, Judgment
from reward_model.labeling.store import LabelStore
from rlhf import config
from rlhf.config_labeling import LabelingStage
from rlhf.config_schema import LabelStage
from rlhf.errors import LabelsPending
from rlhf.types import Ranking, Rollout

README = """Labels in this folder were given by people, in the labeling project {project}.

  rankings.train.jsonl    one item a line: its responses, their wins and ranks, for training the reward model
  rankings.heldout.jsonl  the same for the prompts kept for testing; no prompt is in both files
  judgments.jsonl         one judgment a line; ranks are by response, 1 the best
  labels_report.json      counts; `rlhf label export {project}` reports on agreement
"""


def people_rollouts(
    rollouts: Sequence[Rollout], cfg: LabelStage, heldout_rollouts: Sequence[Rollout] = ()
) -> LabelResult:
    """Labels that people gave in the project of the configuration, where their answers are queued first.

    Raises:
        ConfigError: the project's configuration is not valid, or its database cannot be reached.
        DataError: there is nothing to compare.
        LabelsPending: items have still to be labeled.
    """
    assert cfg.project is not None, "config_schema.LabelStage checks this"
    project: LabelingStage = config.load(cfg.project, "labeling", [])
    groups = comparable(group_rollouts(rollouts, heldout_rollouts))
    items = {item.key: item for group in groups for item in items_of(group, cfg, project)}
    with LabelStore.open(project) as store:
        store.add_items(items.values())
        states = store.item_states()
        judgments = [found for found in store.judgments() if found.item_key in items and _counts(found)]
    given = Counter(judgment.item_key for judgment in judgments)
    aside = [key for key in items if states[key] in ("flagged", "retired")]
    ready = [key for key, item in items.items() if given[key] >= item.wanted and key not in aside]
    if len(ready) + len(aside) < len(items) or not ready:
        held = f", {len(aside)} are flagged or retired" if aside else ""
        raise LabelsPending(
            f"{len(ready)} of {len(items)} items are labeled{held}; the others wait for people.",
            fix=f"label on with `rlhf label serve {cfg.project}`, then run the same command again",
        )
    kept = [judgment for judgment in judgments if judgment.item_key in set(ready)]
    wins = aggregate(items, kept, cfg.aggregate)
    rankings = [ranking_of(items[key], wins[key], cfg) for key in ready]
    train, heldout = split(rankings, heldout_rollouts, cfg.heldout_fraction, cfg.seed)
    counts = {
        "prompts": len({ranking.prompt_id for ranking in rankings}),
        "rankings_train": len(train),
        "rankings_heldout": len(heldout),
        "items_left_out": len(aside),
        "judgments": len(kept),
        "annotators": len({judgment.annotator for judgment in kept}),
    }
    report = {"labels": "people", "project": cfg.project, "aggregate": cfg.aggregate, "counts": counts}
    lines = [_line(judgment, items[judgment.item_key]) for judgment in kept]
    return LabelResult(
        train, heldout, lines, report, README.format(project=cfg.project), {"labels": "people", **counts}
    )


def items_of(group: Group, cfg: LabelStage, project: LabelingStage) -> list[Item]:
    """What is asked about one prompt: a ranking of its first answers, or some of its pairs, chosen by hash."""
    wanted, queue = project.judgments_per_item, project.queue
    if queue.kind == "ranking":
        chosen = [tuple(range(min(len(group.rollouts), queue.responses_per_item)))]
    else:
        pairs = combinations(range(len(group.rollouts)), 2)
        chosen = sorted(pairs, key=lambda pair: _lot(cfg.seed, group.prompt_id, pair))[: queue.pairs_per_prompt]
    return [
        Item(
            prompt=group.prompt,
            responses=[
                Candidate(rollout.response, policy=rollout.policy, tokens=rollout.tokens, score=rollout.score)
                for rollout in (group.rollouts[index] for index in indices)
            ],
            kind=queue.kind,
            prompt_id=group.prompt_id,
            source=cfg.rollouts,
            batch=queue.batch or "/".join(Path(cfg.run_dir).parts[-2:])[-64:],
            wanted=wanted,
        )
        for indices in chosen
    ]


def ranking_of(item: Item, wins: list[list[float]], cfg: LabelStage) -> Ranking:
    """An item with what people say of it."""
    tokens = [response.tokens for response in item.responses]
    return Ranking(
        prompt=item.prompt,
        responses=[response.text for response in item.responses],
        ranks=ranks_from_wins(wins),
        wins=wins,
        tokens=[row for row in tokens if row is not None],
        prompt_id=item.prompt_id,
        meta={"labels": "people", "labeler": f"people, {cfg.aggregate}"},
    )


def _counts(judgment: Judgment) -> bool:
    """Given by a person, about the responses, and not as a repeat."""
    return judgment.decides and judgment.labeler == "person" and judgment.presentation == 0


def _lot(seed: int, prompt_id: str, pair: tuple[int, ...]) -> bytes:
    return hashlib.sha256(f"{seed}/{prompt_id}/{pair}".encode()).digest()


def _line(judgment: Judgment, item: Item) -> dict[str, Any]:
    answer = {key: value for key, value in asdict(judgment.answer).items() if value not in (None, "")}
    shown = {"annotator": judgment.annotator, "order": judgment.order, "ranks_by_response": judgment.ranks}
    return {"prompt_id": item.prompt_id, "item": judgment.item_key, **shown, **answer}
