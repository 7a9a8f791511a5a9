"""`rlhf label queue`: responses out of rollout buffers before the annotators, the most telling ones first.

Of every prompt the distinct responses of all files are compared, also those of different steps or policies. A prompt
gets at most `pairs_per_prompt` pairs, or one ranking. Without reward models they are drawn blindly. With some,
`random_fraction` of the items is drawn blindly all the same, over prompts first and over their pairs second: figures
from those (`meta.sampling` is "random") are unbiased. The others are those on which the models disagree most.
Priorities mix both evenly, so that any beginning of the queue has both. Nothing depends on chance but the seed;
queueing the same files again adds nothing.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from reward_model.labeling.records import Candidate, Item, neutral_order
from reward_model.labeling.store import LabelStore
from rlhf.config import resolve_path
from rlhf.config_labeling import LabelingStage, QueueConfig
from rlhf.errors import ConfigError, DataError
from rlhf.rollout.buffer import RolloutBuffer
from rlhf.types import Prompt, Rollout, RunResult


@dataclass
class Pool:
    """The distinct responses to one prompt, and the files that they come from."""

    prompt: Prompt
    prompt_id: str
    responses: list[Candidate] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Option:
    """Responses of one pool that could be put side by side; `value` is how much the reward models disagree."""

    pool: int
    members: tuple[int, ...]
    value: float | None = None


def main(cfg: LabelingStage) -> RunResult:
    """Queue pairs or rankings, and print what was added.

    Raises:
        ConfigError: no rollouts are named.
        DataError: they cannot be read, or hold nothing to compare.
    """
    if not cfg.queue.rollouts:
        raise ConfigError(
            "queue.rollouts names no files", fix="set queue.rollouts=[runs/NAME/rollouts/samples.parquet]"
        )
    pools, duplicates = read_pools(cfg.queue.rollouts)
    comparable = [pool for pool in pools if len(pool.responses) >= 2]
    if not comparable:
        raise DataError(
            f"none of {len(pools)} prompts has two different responses: there is nothing to compare",
            fix="sample with completions_per_prompt of 2 or more and a higher temperature",
        )
    scores_MN = score(cfg.queue.reward_models, comparable, seed=cfg.seed) if cfg.queue.reward_models else None
    items = choose_items(comparable, cfg, scores_MN)
    with LabelStore.open(cfg) as store:
        added = store.add_items(items)
    blind = sum(item.meta["sampling"] == "random" for item in items)
    summary = {
        "added": added.new,
        "known": added.known,
        "random": blind,
        "active": len(items) - blind,
        "prompts": len(comparable),
        "prompts_left_out": len(pools) - len(comparable),
        "duplicates_dropped": duplicates,
    }
    print(f"{added.new} new items ({cfg.queue.kind}), {added.known} known; {blind} drawn blindly")
    print(f"  from {len(comparable)} prompts; {summary['prompts_left_out']} more have no two different responses")
    print(f"  {duplicates} responses were there before, to the same prompt, and were dropped")
    return RunResult(cfg.run_dir, summary)


def read_pools(files: Sequence[str]) -> tuple[list[Pool], int]:
    """Responses by prompt, in order of appearance, and how many repeated one that was there.

    Raises:
        DataError: a file cannot be read, or an id stands for two prompts.
    """
    pools: dict[str, Pool] = {}
    duplicates = 0
    for file in files:
        for rollout in RolloutBuffer.from_parquet(resolve_path(file)).rollouts:
            pool = pools.setdefault(rollout.prompt_id, Pool(rollout.prompt, rollout.prompt_id))
            if pool.prompt != rollout.prompt:
                raise DataError(
                    f"{file}: prompt_id {rollout.prompt_id!r} stands for two different prompts",
                    fix="queue files that were sampled from one set of prompts",
                )
            if any(rollout.response == response.text for response in pool.responses):
                duplicates += 1
                continue
            pool.responses.append(_candidate(rollout))
            if file not in pool.sources:
                pool.sources.append(file)
    return list(pools.values()), duplicates


def _candidate(rollout: Rollout) -> Candidate:
    policy = rollout.policy + (f", step {rollout.step}" if rollout.step else "")
    score = rollout.score if rollout.score is not None and math.isfinite(rollout.score) else None
    return Candidate(rollout.response, policy, rollout.tokens, score)


# --- which ones -----------------------------------------------------------------------------------------------


def choose_items(pools: Sequence[Pool], cfg: LabelingStage, scores_MN: Tensor | None = None) -> list[Item]:
    """The items to add, first those to be judged first.

    Args:
        scores_MN: of M reward models, for the responses of all pools one after the other.
    """
    queue = cfg.queue
    per_prompt = queue.pairs_per_prompt if queue.kind == "pair" else 1
    blind = blind_order(pools, queue, per_prompt, cfg.seed)
    n = min(len(blind), queue.limit or len(blind))
    if scores_MN is None:
        picked = [("random", option) for option in blind[:n]]
    else:
        random_part = valued(blind[: round(queue.random_fraction * n)], pools, scores_MN)
        options = valued(all_options(pools, queue, cfg.seed), pools, scores_MN)
        active = most_valued(options, random_part, n - len(random_part), per_prompt)
        picked = interleave([("random", o) for o in random_part], [("active", o) for o in active])
    return [
        item_of(option, pools[option.pool], cfg, sampling, 1 - place / len(picked))
        for place, (sampling, option) in enumerate(picked)
    ]


def all_options(pools: Sequence[Pool], queue: QueueConfig, seed: int) -> list[Option]:
    """Every pair of every pool; or of every pool one ranking, of as many responses as may be, drawn blindly."""
    if queue.kind == "pair":
        return [Option(p, pair) for p, pool in enumerate(pools) for pair in combinations(range(len(pool.responses)), 2)]
    options = []
    for p, pool in enumerate(pools):
        drawn = sorted(range(len(pool.responses)), key=lambda i: _draw(seed, pool.prompt_id, i))
        options.append(Option(p, tuple(sorted(drawn[: queue.responses_per_item]))))
    return options


def blind_order(pools: Sequence[Pool], queue: QueueConfig, per_prompt: int, seed: int) -> list[Option]:
    """`per_prompt` options of every pool, in an order in which every prompt comes once before one comes twice."""
    by_pool: dict[int, list[Option]] = {}
    for option in all_options(pools, queue, seed):
        by_pool.setdefault(option.pool, []).append(option)
    for p, options in by_pool.items():
        options.sort(key=lambda option, name=pools[p].prompt_id: _draw(seed, name, *option.members))
    order = sorted(by_pool, key=lambda p: _draw(seed, pools[p].prompt_id))
    return [by_pool[p][turn] for turn in range(per_prompt) for p in order if turn < len(by_pool[p])]


def _draw(seed: int, *parts: Any) -> bytes:
    """A place in a random order that depends on nothing but the seed and the name.

    Not the order that decides what is held out, or the beginning of the queue would be the held-out side.
    """
    return hashlib.sha256("/".join(map(str, ("queue", seed, *parts))).encode()).digest()


def most_valued(options: Sequence[Option], taken: Sequence[Option], n: int, per_prompt: int) -> list[Option]:
    """The `n` options of highest value that are not taken, at most `per_prompt` of a pool with the taken ones."""
    used: dict[int, int] = {}
    for option in taken:
        used[option.pool] = used.get(option.pool, 0) + 1
    gone = {(option.pool, option.members) for option in taken}
    chosen: list[Option] = []
    for option in sorted(options, key=lambda option: -(option.value or 0.0)):
        if len(chosen) == n:
            break
        if (option.pool, option.members) not in gone and used.get(option.pool, 0) < per_prompt:
            used[option.pool] = used.get(option.pool, 0) + 1
            chosen.append(option)
    return chosen


def interleave(one: Sequence[Any], other: Sequence[Any]) -> list[Any]:
    """Both, each in its order, so that every beginning holds them in about their shares."""
    placed = [
        ((i + 0.5) / len(part), turn, entry) for turn, part in enumerate((one, other)) for i, entry in enumerate(part)
    ]
    return [entry for *_, entry in sorted(placed, key=lambda row: row[:2])]


def item_of(option: Option, pool: Pool, cfg: LabelingStage, sampling: str, priority: float) -> Item:
    """The item of these responses."""
    value = {} if option.value is None else {"disagreement": round(option.value, 6)}
    responses = [pool.responses[i] for i in option.members]
    return Item(
        prompt=pool.prompt,
        responses=[responses[i] for i in neutral_order(responses)],
        kind=cfg.queue.kind,
        prompt_id=pool.prompt_id,
        source=", ".join(pool.sources),
        batch=cfg.queue.batch,
        wanted=cfg.judgments_per_item,
        priority=priority,
        meta={"sampling": sampling, **value},
    )


# --- what reward models say -----------------------------------------------------------------------------------


def doubts(scores_MK: Tensor) -> Tensor:
    """How unsure M reward models are about every pair of K responses: [K, K], 0 .. 1/2.

    Several: the standard deviation over models of the probability that i beats j, sigmoid(s_i - s_j) (Christiano
    et al. 2017, section 2.2.4). One: how close to 1/2 that probability is, so the smallest differences come first.
    """
    p_MKK = torch.sigmoid(scores_MK[:, :, None] - scores_MK[:, None, :])
    return p_MKK.std(0, correction=0) if len(p_MKK) > 1 else 0.5 - (p_MKK[0] - 0.5).abs()


def valued(options: Sequence[Option], pools: Sequence[Pool], scores_MN: Tensor) -> list[Option]:
    """The options with their values: the mean doubt about the pairs of their responses."""
    of_pools = scores_MN.split([len(pool.responses) for pool in pools], dim=1)
    tables = [doubts(scores_MK).tolist() for scores_MK in of_pools]
    found = []
    for option in options:
        pairs = [tables[option.pool][i][j] for i, j in combinations(option.members, 2)]
        found.append(replace(option, value=math.fsum(pairs) / len(pairs)))
    return found


def score(models: Sequence[str], pools: Sequence[Pool], *, seed: int) -> Tensor:
    """Scores of all responses of all pools, in order: [M, N], M the members of all models together.

    In log odds, as the models were trained, and not in units of their spread: differences are preferences.

    Raises:
        ModelError: a model cannot be loaded, or its tokens mean something else than the first one's.
        DataError: a response has tokens that no such model knows.
    """
    from reward_model.model import RewardModel
    from rlhf.models.load import load_tokenizer
    from rlhf.runtime import Runtime

    runtime = Runtime.start(seed=seed, precision="fp32")
    tokenizer = load_tokenizer(models[0])
    rows = [response.tokens or [] for pool in pools for response in pool.responses]
    if max(max(row, default=-1) for row in rows) >= len(tokenizer):
        raise DataError(
            f"the rollouts hold tokens that {models[0]} does not know",
            fix="name reward models that were trained on the base of the policy",
        )
    parts = []
    for name in models:
        model = RewardModel.load(name, runtime, tokenizer=tokenizer)
        parts.append(model.score_members(rows) * model.std)
    return torch.cat(parts)
