"""`rlhf label CONFIG` with `labeler: people`: the answers go into a labeling project, and the stage ends until enough
is labeled; then the same command takes the labels and goes on.

What is queued depends on the rollouts and the configuration alone, and the project knows its items by their content, so
the command may be repeated, or killed, at any time.

An item that everybody skipped who may label it, admins included, is done without a label: nobody is left to wait for.
One that some judged and the others skipped waits on, since it was to have more judgments; the stage says which. What is
a gold question of the project is left out: its answer was known before.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from reward_model.labeling import history
from reward_model.labeling.groups import LabelResult, comparable, group_rollouts, split
from reward_model.labeling.history import Left
from reward_model.labeling.preferences import label_items, ranking_of
from reward_model.labeling.queue import choose_items, read_pools, score
from reward_model.labeling.records import Item, Judgment
from reward_model.labeling.store import LabelStore
from rlhf import config
from rlhf.config_labeling import ExportConfig, LabelingStage
from rlhf.config_schema import LabelStage
from rlhf.errors import LabelsPending
from rlhf.types import Rollout

SHOWN = 10
"""Items that are named of many."""

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
    comparable(group_rollouts(rollouts, heldout_rollouts))  # for its errors
    project: LabelingStage = config.load(cfg.project, "labeling", [])
    wanted = items_of(cfg, project)
    with LabelStore.open(project) as store:
        store.add_items(wanted)
        asked = {item.key: item for item in wanted}
        # As first queued, with the prompt_id of these rollouts: it says which prompts are held out.
        items = {
            item.key: replace(item, prompt_id=asked[item.key].prompt_id) for item in store.items() if item.key in asked
        }
        states = store.item_states()
        found = [judgment for judgment in store.judgments() if judgment.item_key in items and _by_person(judgment)]
        with store.read() as session:
            left = history.left_to(session)
    judgments = [judgment for judgment in found if judgment.decides]
    given = Counter(judgment.item_key for judgment in judgments)
    skipped = {judgment.item_key for judgment in found if judgment.answer.choice == "skip"}
    gold = {key for key, item in items.items() if item.gold_ranks is not None}
    held = {key for key in items if states[key] in ("flagged", "retired")} - gold
    undecided = {key for key in skipped - held - gold if not given[key] and not left[key].people}
    aside = gold | held | undecided
    ready = [key for key, item in items.items() if given[key] >= item.wanted and key not in aside]
    waiting = [key for key in items if key not in aside and given[key] < items[key].wanted]
    if waiting or not ready:
        said = f"{len(ready)} of {len(items)} items are labeled"
        said += f", {len(gold)} are gold questions" * bool(gold)
        said += f", {len(held)} are flagged or retired" * bool(held)
        said += f", {len(undecided)} were skipped by everybody" * bool(undecided)
        raise _pending(said, {key: left[key] for key in waiting}, skipped, cfg.project)
    kept = [judgment for judgment in judgments if judgment.item_key not in aside]
    rules = ExportConfig(aggregate=cfg.aggregate, ties="keep")
    labeled, _ = label_items([items[key] for key in ready], states, kept, rules)
    rankings = [ranking_of(label) for label in labeled]
    train, heldout = split(rankings, heldout_rollouts, cfg.heldout_fraction, cfg.seed)
    counts = {
        "prompts": len({ranking.prompt_id for ranking in rankings}),
        "rankings_train": len(train),
        "rankings_heldout": len(heldout),
        "items_left_out": len(aside),
        "items_skipped_by_all": len(undecided),
        "judgments": len(kept),
        "annotators": len({judgment.annotator for judgment in kept}),
    }
    report = {"labels": "people", "project": cfg.project, "aggregate": cfg.aggregate, "counts": counts}
    lines = [_line(judgment, items[judgment.item_key]) for judgment in kept]
    return LabelResult(
        train, heldout, lines, report, README.format(project=cfg.project), {"labels": "people", **counts}
    )


def items_of(cfg: LabelStage, project: LabelingStage) -> list[Item]:
    """What is asked about the rollouts, by the rules of the project's queue; a batch of its own for each round."""
    batch = project.queue.batch or "/".join(Path(cfg.run_dir).parts[-2:])[-64:]
    queue = project.queue.model_copy(update={"batch": batch})
    pools, _ = read_pools([cfg.rollouts, *([cfg.heldout_rollouts] if cfg.heldout_rollouts else [])])
    pools = [pool for pool in pools if len(pool.responses) >= 2]
    scores_MN = score(queue.reward_models, pools, seed=project.seed) if queue.reward_models else None
    return choose_items(pools, project.model_copy(update={"queue": queue}), scores_MN)


def _by_person(judgment: Judgment) -> bool:
    """Given by a person, and not as a repeat."""
    return judgment.labeler == "person" and judgment.presentation == 0


def _pending(said: str, waiting: dict[str, Left], skipped: set[str], project: str) -> LabelsPending:
    """What holds the stage up, and who can end that."""
    if not waiting:
        fix = f"invite another annotator with `rlhf label invite {project}`, or reopen flagged items on the admin page"
        return LabelsPending(f"{said}; no item has a label to go on with.", fix=f"{fix}; then run this command again")
    said += "; the others wait for people."
    fix = f"label on with `rlhf label serve {project}`, then run the same command again"
    by_people: dict[str, list[int]] = defaultdict(list)
    for key, left in waiting.items():
        if key in skipped and left.people:
            by_people[", ".join(left.people)].append(left.item_id)
    for people, ids in by_people.items():
        said += f" Skipped so far, and not yet seen by {people}: {_numbers(ids)}."
    if exhausted := [left.item_id for left in waiting.values() if not left.people]:
        said += f" Answered by everybody, with fewer judgments than asked for: {_numbers(exhausted)}."
        fix += f"; for what everybody has answered, invite another annotator with `rlhf label invite {project}`"
    return LabelsPending(said, fix=fix)


def _numbers(ids: Sequence[int]) -> str:
    """Items as the admin page calls them, the first few."""
    more = f" and {len(ids) - SHOWN} more" if len(ids) > SHOWN else ""
    return ("item " if len(ids) == 1 else "items ") + ", ".join(map(str, ids[:SHOWN])) + more


def _line(judgment: Judgment, item: Item) -> dict[str, Any]:
    answer = {key: value for key, value in asdict(judgment.answer).items() if value not in (None, "")}
    shown = {"annotator": judgment.annotator, "order": judgment.order, "ranks_by_response": judgment.ranks}
    return {"prompt_id": item.prompt_id, "item": judgment.item_key, **shown, **answer}
