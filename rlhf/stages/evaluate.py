"""Policies side by side on held-out prompts: quality, distance from the reference, diversity, win rate."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from reward_model.model import RewardModel
from rlhf.config_schema import EvaluateStage
from rlhf.data.order import seed_of, share_of
from rlhf.data.records import read_prompts
from rlhf.data.templates import TokenizedPrompt, check_prompt_lengths, show_prompts
from rlhf.eval.diversity import distinct_n
from rlhf.eval.winrate import mean_interval, win_rate
from rlhf.files import atomic_write
from rlhf.models.load import eos_token_ids, load_causal_lm, load_tokenizer, require_same_tokens
from rlhf.models.policy import Policy
from rlhf.progress import Progress
from rlhf.rollout.buffer import RolloutBuffer, micro_batch_rows
from rlhf.rollout.collect import collect, settings_from
from rlhf.rollout.engines import engine_for
from rlhf.rollout.scorers import SCORERS
from rlhf.runs import RunOptions
from rlhf.runtime import Runtime
from rlhf.types import Rollout, RolloutBatch, RunResult

MICRO_BATCH_SIZE = 16


@dataclass
class Answers:
    """One policy's rollouts and what each of them measures (lists of the same length, KL in nats)."""

    rollouts: list[Rollout]
    kl: list[float]
    entropy: list[float]
    base_nll: list[float]
    reward: list[float] | None = None


def main(cfg: EvaluateStage, options: RunOptions) -> RunResult:
    """Write evaluation.json and rollouts/<policy>.parquet."""
    runtime = Runtime.start(seed=cfg.seed, precision=cfg.precision)
    tokenizer = load_tokenizer(cfg.policies[cfg.candidate])
    for role, name in [*cfg.policies.items(), ("reference", cfg.reference), ("base", cfg.base)]:
        require_same_tokens(name, tokenizer, role=role)
    records = read_prompts(cfg.prompts)
    prompts = check_prompt_lengths(
        records, tokenizer, chat=cfg.prompts.chat, max_tokens=cfg.max_prompt_tokens, overlong=cfg.overlong
    )
    with Progress(stage="evaluate", enabled=runtime.is_main) as progress:
        if runtime.is_main:
            show_prompts(progress.console, tokenizer, f"{cfg.prompts.path}: format {records.format}", prompts)
        steps = progress.phase("policies", total=len(cfg.policies), outer=True, unit="policies")
        reference = runtime.freeze(Policy(load_causal_lm(cfg.reference, dtype=runtime.dtype)))
        base = runtime.freeze(Policy(load_causal_lm(cfg.base, dtype=runtime.dtype)))
        reward = RewardModel.load(cfg.reward_model, runtime, tokenizer=tokenizer) if cfg.reward_model else None
        answers = {}
        for name, model in cfg.policies.items():
            policy = runtime.freeze(Policy(load_causal_lm(model, dtype=runtime.dtype)))
            rollouts = sample(name, policy, prompts, cfg, runtime, tokenizer, progress)
            others = Others(
                reference=policy if model == cfg.reference else reference,
                base=policy if model == cfg.base else base,
                reward=reward,
            )
            answers[name] = measure(rollouts, policy, others, cfg, runtime)
            steps.advance(1)
    answers = {name: gather(part, runtime) for name, part in answers.items()}
    record = evaluation_record(answers, cfg)
    if runtime.is_main:
        for name, part in answers.items():
            RolloutBuffer(part.rollouts).to_parquet(Path(cfg.run_dir) / "rollouts" / f"{name}.parquet")
        atomic_write(Path(cfg.run_dir) / "evaluation.json", json.dumps(record, indent=1))
    runtime.barrier()
    summary = {"policies": record["policies"], "win_rate": record["win_rate"]}
    return RunResult(cfg.run_dir, summary, {"evaluation": str(Path(cfg.run_dir) / "evaluation.json")})


def sample(
    name: str,
    policy: Policy,
    prompts: Sequence[TokenizedPrompt],
    cfg: EvaluateStage,
    runtime: Runtime,
    tokenizer: Any,
    progress: Progress,
) -> list[Rollout]:
    """`samples_per_prompt` answers of one policy to this rank's prompts; all policies draw with the same numbers."""
    k = cfg.samples_per_prompt
    mine = share_of(len(prompts), rank=runtime.rank, world_size=runtime.world_size)
    decode = partial(tokenizer.decode, skip_special_tokens=True)
    settings = settings_from(cfg.sampling, eos_token_ids(policy.lm, tokenizer), decode)
    total = len(mine) * k * settings.max_new_tokens
    with progress.phase(name, total=total, unit="tokens"):
        return collect(
            engine_for(cfg.sampling, policy.lm, cfg.policies[name]),
            [prompts[i] for i in mine],
            settings,
            decode=decode,
            seeds=[seed_of(cfg.seed, "evaluate", i, copy) for i in mine for copy in range(k)],
            copies=k,
            policy=name,
            on_tokens=progress.advance,
        )


@dataclass(frozen=True)
class Others:
    """The models that a policy's answers are held against; a role that it has itself is the policy."""

    reference: Policy
    base: Policy
    reward: RewardModel | None


def measure(rollouts: list[Rollout], policy: Policy, others: Others, cfg: EvaluateStage, runtime: Runtime) -> Answers:
    """Log-probabilities of the answers under policy, reference and base; gold and reward-model scores."""
    scores = others.reward(rollouts) if others.reward else None
    if not rollouts:  # there are fewer prompts than processes
        return Answers([], [], [], [], scores)
    for rollout, gold in zip(rollouts, SCORERS[cfg.scorer](rollouts), strict=True):
        rollout.gold_score = gold
    batch = RolloutBuffer(rollouts).batch(runtime.device)
    temperature = cfg.sampling.temperature
    mine, entropy = _sequence_sums(policy, batch, runtime, temperature=temperature, with_entropy=True)
    theirs = under_base = mine
    if others.reference is not policy:
        theirs, _ = _sequence_sums(others.reference, batch, runtime, temperature=temperature)
    if others.base is not policy or temperature != 1.0:  # perplexity knows no temperature
        under_base, _ = _sequence_sums(others.base, batch, runtime, temperature=1.0)
    for i, rollout in enumerate(rollouts):
        rollout.score = scores[i] if scores else None
    return Answers(rollouts, (mine - theirs).tolist(), entropy.tolist(), (-under_base).tolist(), scores)


@torch.no_grad()
def _sequence_sums(
    model: Policy, batch: RolloutBatch, runtime: Runtime, *, temperature: float, with_entropy: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """(log-probability, entropy or 0) of each answer, summed over its tokens, in nats: [B], [B]."""
    logprob_B, entropy_B = torch.zeros(len(batch)), torch.zeros(len(batch))
    for rows in micro_batch_rows(torch.arange(len(batch)), batch.attention_mask_BT.sum(1).cpu(), MICRO_BATCH_SIZE):
        part = batch.select(rows)
        with runtime.autocast():
            logprobs_BT, entropy_BT = model(
                part.tokens_BT,
                part.attention_mask_BT,
                part.action_mask_BT,
                temperature=temperature,
                with_entropy=with_entropy,
            )
        logprob_B[rows] = logprobs_BT.float().sum(1).cpu()
        entropy_B[rows] = entropy_BT.float().sum(1).cpu()
    return logprob_B, entropy_B


def gather(part: Answers, runtime: Runtime) -> Answers:
    """All ranks' answers."""
    if runtime.world_size == 1:
        return part
    columns: dict[str, Any] = {
        name: getattr(part, name) for name in ("rollouts", "kl", "entropy", "base_nll", "reward")
    }
    gathered: dict[str, Any] = {k: v if v is None else runtime.gather_objects(v) for k, v in columns.items()}
    return Answers(**gathered)


def evaluation_record(answers: dict[str, Answers], cfg: EvaluateStage) -> dict[str, Any]:
    """What the report reads: numbers per policy, the win rate, and answers side by side."""
    candidate, baseline = answers[cfg.candidate].rollouts, answers[cfg.baseline].rollouts
    won = win_rate(
        [r.gold_score or 0.0 for r in candidate],
        [r.gold_score or 0.0 for r in baseline],
        [r.prompt_id for r in candidate],
    )
    return {
        "policies": {name: policy_record(part) for name, part in answers.items()},
        "win_rate": {"candidate": cfg.candidate, "baseline": cfg.baseline, **asdict(won)},
        "samples": side_by_side(answers),
        "scorer": cfg.scorer,
        "temperature": cfg.sampling.temperature,
        "seed": cfg.seed,
    }


def policy_record(part: Answers) -> dict[str, Any]:
    """One policy's row: means over answers, with 95% intervals over prompts where they matter."""
    rollouts, groups = part.rollouts, [r.prompt_id for r in part.rollouts]
    grades = [-(r.gold_score or 0.0) for r in rollouts]
    lengths = [len(r.response_tokens) for r in rollouts]
    tokens = max(1, sum(lengths))
    grade, kl = mean_interval(grades, groups), mean_interval(part.kl, groups)
    texts = [r.response for r in rollouts]
    return {
        "answers": len(rollouts),
        "prompts": len(set(groups)),
        "grade": grade.value,
        "grade_interval": [grade.low, grade.high],
        "gold_score": -grade.value,
        "reward_score": sum(part.reward) / len(part.reward) if part.reward else None,
        "kl": kl.value,
        "kl_interval": [kl.low, kl.high],
        "length_mean": tokens / len(rollouts),
        "eos_frac": sum(r.stop.finished for r in rollouts) / len(rollouts),
        "distinct_1": distinct_n(texts, 1),
        "distinct_2": distinct_n(texts, 2),
        "entropy": sum(part.entropy) / tokens,
        "perplexity": float(torch.tensor(sum(part.base_nll) / tokens).exp()),
    }


def side_by_side(answers: dict[str, Answers]) -> list[dict[str, Any]]:
    """Every prompt with the answers of all policies."""
    prompts: dict[str, dict[str, Any]] = {}
    for name, part in answers.items():
        for rollout in part.rollouts:
            entry = prompts.setdefault(rollout.prompt_id, {"prompt": last_user_text(rollout), "answers": {}})
            entry["answers"].setdefault(name, []).append(
                {
                    "text": rollout.response,
                    "grade": -(rollout.gold_score or 0.0),
                    "reward_score": rollout.score,
                    "finished": rollout.stop.finished,
                }
            )
    return list(prompts.values())


def last_user_text(rollout: Rollout) -> str:
    """The prompt as a reader wants to see it."""
    return rollout.prompt if isinstance(rollout.prompt, str) else rollout.prompt[-1]["content"]
