"""`rlhf label CONFIG` with `labeler: ai`: a judge model compares all responses of each prompt, pair by pair.

Wins and ranks come out as from any other labeler. A prompt of which one pair has no label is left out and counted: to
leave the pair out alone would state it as a tie.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from reward_model.labeling.groups import Group, LabelResult, comparable, group_rollouts, split
from reward_model.labeling.judge import Contest, Judged, open_judge
from reward_model.labeling.judge_backend import Failure
from reward_model.labeling.judge_report import judge_report, write_report
from rlhf.config_schema import LabelStage
from rlhf.errors import JudgeError
from rlhf.progress import Progress
from rlhf.types import Rollout

NOTICE = (
    "Labels in this folder were made by a JUDGE, the language model {model}: no person has judged anything. "
    "judge_report.json says how far its preferences can be believed."
)
README = """Labels in this folder were made by a judge, the language model {model}. No person has judged anything.

It compared the responses of each prompt in pairs, each pair in both orders. Where the orders contradict each other
the pair is a tie. What it did not answer is not labeled.

  rankings.train.jsonl    one prompt a line: its responses, their wins and ranks, for training the reward model
  rankings.heldout.jsonl  the same for the prompts kept for testing; no prompt is in both files
  judgments.jsonl         one comparison a line: P(the first response is better), or why there is no answer
  labels_report.json      counts
  judge_report.json       place bias, length bias, controls, failures, cost
  judge_cache.sqlite      every answer of the judge, so that nothing is asked twice
"""


def judge_rollouts(
    rollouts: Sequence[Rollout], cfg: LabelStage, heldout_rollouts: Sequence[Rollout] = ()
) -> LabelResult:
    """Labels by the judge of the configuration; writes its cache and judge_report.json.

    Raises:
        ConfigError: it cannot be asked.
        DataError: there is nothing to compare.
        JudgeError: it fails too often, the budget does not reach to the end, or no prompt got a label.
    """
    assert cfg.judge is not None
    everyone = group_rollouts(rollouts, heldout_rollouts)
    groups = comparable(everyone)
    contests = [Contest(group.prompt, tuple(r.response for r in group.rollouts)) for group in groups]
    began, judge = time.monotonic(), open_judge(cfg.judge, cfg.run_dir, cfg.seed)
    try:
        with Progress("label") as progress:
            try:
                judged = [one for batch in judge.batches(contests, progress) for one in batch]
            finally:
                report = judge_report(judge, wanted=len(contests), seconds=time.monotonic() - began)
                write_report(report, cfg.run_dir, progress.console)
    finally:
        judge.close()
    result = _result(groups, judged, report, cfg, heldout_rollouts)
    result.report["counts"]["duplicates_dropped"] = sum(group.duplicates for group in everyone)
    result.report["counts"]["prompts_without_choice"] = len(everyone) - len(groups)
    return result


def _result(
    groups: Sequence[Group],
    judged: Sequence[Judged],
    report: dict[str, Any],
    cfg: LabelStage,
    heldout_rollouts: Sequence[Rollout],
) -> LabelResult:
    """Rankings of the prompts that have a label for each pair.

    Raises:
        JudgeError: there is none.
    """
    assert cfg.judge is not None
    model = cfg.judge.model
    labeler = f"judge: {model}, both orders of every pair"
    rankings, lines = [], []
    for group, one in zip(groups, judged, strict=False):  # judged ends where the budget did
        lines += _lines(group, one, model)
        if one.labels is not None:
            rankings.append(group.ranking(one.labels, {"labels": "judge", "labeler": labeler}))
    if not rankings:
        raise JudgeError(
            f"none of {len(groups)} prompts has a label from the judge {model}",
            fix="read judge_report.json in the run folder: it says why, by kind",
        )
    train, heldout = split(rankings, heldout_rollouts, cfg.heldout_fraction, cfg.seed)
    counts = {"prompts": len(rankings), "prompts_train": len(train), "prompts_heldout": len(heldout)}
    left = report["counts"]["items_not_asked"]
    unfinished = JudgeError(
        f"the budget is used up with {left} of {len(groups)} prompts to go; what is labeled is in {cfg.run_dir}",
        fix="raise judge.budget and run the same command again: answers are kept",
    )
    report = {"notice": NOTICE.format(model=model), "labels": "judge", "counts": {**report["counts"], **counts}}
    summary = {"labels": "judge", "model": model, **report["counts"]}
    readme = README.format(model=model)
    return LabelResult(train, heldout, lines, report, readme, summary, unfinished if left else None)


def _lines(group: Group, one: Judged, model: str) -> list[dict[str, Any]]:
    """judgments.jsonl: one comparison a line, in the order in which it was shown."""
    lines = []
    for (i, j), pair in one.pairs.items():
        for first, second, said in ((i, j, pair.shown), (j, i, pair.swapped)):
            found = {"failure": said.kind} if isinstance(said, Failure) else {"p_first": said.p_first}
            lines.append({"judge": model, "prompt_id": group.prompt_id, "first": first, "second": second, **found})
    return lines
