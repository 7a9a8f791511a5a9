"""PPO with KL control against a frozen reference: Ziegler 2019, Stiennon 2020, Ouyang 2022.

`main` is the loop; every numbered line is one function, in this file or in `functional/`. Deviations from the papers:
    - Advantages are Ouyang's: gamma 1, lambda .95, whitened over the global batch (`gae` itself never whitens).
    - The critic is its own network, initialised from the reward model, with its own learning rate.
    - Losses are global token means per optimizer step (denominator rule in `Runtime.denominator`).
    - No top-k or top-p: a truncated sampler has another distribution than the one whose ratio is trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from reward_model.model import RewardModel
from rlhf.config_schema import PPOStage
from rlhf.data.order import generator_for, positions_of_step, row_at, seed_of
from rlhf.data.records import read_prompts
from rlhf.data.templates import TokenizedPrompt, check_prompt_lengths, show_prompts
from rlhf.errors import InvariantError
from rlhf.functional.advantages import clip_scores, gae, penalised_rewards
from rlhf.functional.kl import k1
from rlhf.functional.losses import kl_loss, max_ratio_deviation, policy_loss, value_loss
from rlhf.functional.masked import masked_sum, moments, whiten
from rlhf.kl_control import kl_control_for
from rlhf.models.roles import Roles, build_roles
from rlhf.models.tuning import build_optimizer, set_lr
from rlhf.resume import Resume
from rlhf.rollout.assertions import assert_common_start, assert_first_ratio
from rlhf.rollout.buffer import RolloutBuffer, cut_into, micro_batch_rows, minibatch_rows
from rlhf.rollout.collect import collect, missing_eos_penalty, settings_from
from rlhf.rollout.endpoint import RewardEndpoint
from rlhf.rollout.engines import engine_for
from rlhf.rollout.ppo_run import PPORun
from rlhf.rollout.ptx import add_ptx_gradients, load_ptx, ptx_texts
from rlhf.rollout.scorers import SCORERS, write_gold_scores
from rlhf.rollout.statistics import step_metrics
from rlhf.rollout.work import StepWork
from rlhf.runs import RunOptions
from rlhf.runtime import Runtime
from rlhf.types import RewardFn, Rollout, RolloutBatch, RunResult

MAX_SKIPPED_IN_A_ROW = 3


def main(cfg: PPOStage, options: RunOptions) -> RunResult:
    """Train the policy; leaves `final/` (policy), `critic/`, metrics.jsonl and samples.jsonl."""
    runtime = Runtime.start(seed=cfg.seed, precision=cfg.precision)
    resume = Resume.open(cfg, options, runtime, say=print)
    roles = build_roles(cfg, runtime)
    reward_fn = build_reward(cfg, roles, runtime)
    prompts, title = load_prompts(cfg, roles.tokenizer)
    ptx = load_ptx(cfg, roles.tokenizer)
    resume.load_weights(roles.actor_critic)
    actor_critic, optimizer = runtime.prepare(
        roles.actor_critic,
        build_optimizer(roles.parameter_groups(cfg), cfg.optim),
        micro_batch_size=cfg.micro_batch_size,
        max_grad_norm=cfg.optim.max_grad_norm,
    )
    kl_control = kl_control_for(cfg.kl, cfg.batch_size * runtime.world_size, resume.state.get("kl_control"))
    resume.attach(roles.actor_critic, optimizer, state=lambda: {"kl_control": kl_control.state_dict()})

    with PPORun.open(
        cfg,
        options,
        runtime,
        resume=resume,
        work=StepWork.of(cfg, roles.begins(reward_fn), reward_passes=getattr(reward_fn, "passes", 1)),
    ) as run:
        if runtime.is_main:
            show_prompts(run.progress.console, roles.tokenizer, title, prompts)
        for step in run.steps():
            with run.phase("generate"):
                # 1. Sample responses to this step's prompts.
                rollouts = sample_rollouts(step, prompts, roles, cfg, runtime, on_tokens=run.on_tokens)
            run.end_if_asked(step)
            with run.phase("score"):
                # 2. Scores; then old and reference logprobs, and values.
                batch = score_rollouts(rollouts, reward_fn, cfg, runtime)
                epochs = plan_epochs(len(batch), step, cfg, runtime)
                learner = Learner(actor_critic, optimizer, cfg, runtime, step, kl_control.coef)
                kept = evaluate_rollouts(learner, batch, epochs[0], roles.reference)
            if step == 0:
                assert_common_start(batch, runtime, same_reference=cfg.reference in (None, cfg.model))
            # 3. Rewards: -coef * KL on every action, the score on the last one.
            shape_rewards(batch, cfg, runtime, kl_coef=kl_control.coef)
            # 4. Generalised advantages, then whitened over the global batch.
            estimate_advantages(batch, cfg, runtime, bootstrap_B=bootstrap_values(batch, actor_critic, cfg, runtime))
            run.end_if_asked(step)
            with run.phase("update"), run.keeping_on_failure(step, rollouts):
                # 5. Epochs of minibatches on the clipped objective.
                lr = set_lr(optimizer, cfg.optim, step, cfg.steps, delay={"policy": cfg.critic_warmup_steps})
                sums = train(learner, batch, epochs, ptx, kept=kept)
            metrics = step_metrics(batch, rollouts, sums, runtime, kl_coef=kl_control.coef)
            # 6. The KL controller answers to the KL that was measured.
            if step >= cfg.critic_warmup_steps:
                kl_control.update(metrics["objective/kl"], n=cfg.batch_size * runtime.world_size)
            # 7. Metrics, samples, checkpoint.
            run.log(step, {**metrics, "lr": lr}, batch, rollouts)
            run.save_if_due(step)
        return run.finish(roles)


# --- inputs -----------------------------------------------------------------------------------------------


def build_reward(cfg: PPOStage, roles: Roles, runtime: Runtime) -> RewardFn:
    """The reward model, a programmatic scorer, or a served reward.

    Raises:
        ConfigError: `reward_aggregate` for a reward model that is no ensemble.
    """
    if cfg.reward_endpoint is not None:
        return RewardEndpoint(cfg.reward_endpoint, runtime)
    if cfg.reward_model is None:
        assert cfg.scorer is not None, "config_schema.PPOStage checks this"
        return SCORERS[cfg.scorer]
    model = RewardModel.load(
        cfg.reward_model,
        runtime,
        tokenizer=roles.tokenizer,
        micro_batch_size=2 * cfg.micro_batch_size,
        micro_batch_tokens=2 * cfg.micro_batch_tokens if cfg.micro_batch_tokens else None,
        share=roles.share,
    )
    model.aggregate_by(cfg.reward_aggregate, cfg.reward_std_coef)
    return model


def load_prompts(cfg: PPOStage, tokenizer: Any) -> tuple[list[TokenizedPrompt], str]:
    """(tokenized prompts, over-long ones handled as `overlong` says; the file and the format that was found)."""
    records = read_prompts(cfg.prompts)
    prompts = check_prompt_lengths(
        records, tokenizer, chat=cfg.prompts.chat, max_tokens=cfg.max_prompt_tokens, overlong=cfg.overlong
    )
    return prompts, f"{cfg.prompts.path}: format {records.format}"


def sample_rollouts(
    step: int, prompts: Sequence[TokenizedPrompt], roles: Roles, cfg: PPOStage, runtime: Runtime, *, on_tokens: Any
) -> list[Rollout]:
    """This rank's rollouts of `step`; a prompt and its draws depend on the seed and its position in the run alone."""
    positions = positions_of_step(step, cfg.batch_size, rank=runtime.rank, world_size=runtime.world_size)
    decode = partial(roles.tokenizer.decode, skip_special_tokens=True)
    settings = settings_from(cfg.sampling, roles.eos_ids, decode)
    with roles.sampler.ready() as lm:
        rollouts = collect(
            engine_for(cfg.sampling, lm, cfg.model, tap=roles.trunk),
            [prompts[row_at(position, len(prompts), cfg.seed)] for position in positions],
            settings,
            decode=decode,
            seeds=[seed_of(cfg.seed, "sample", position) for position in positions],
            policy="ppo",
            on_tokens=on_tokens,
        )
    for rollout in rollouts:
        rollout.step = step
    return rollouts


# --- the batch --------------------------------------------------------------------------------------------


def score_rollouts(rollouts: Sequence[Rollout], reward_fn: RewardFn, cfg: PPOStage, runtime: Runtime) -> RolloutBatch:
    """Write the raw score, None where none could be had, and the gold score if there is one; and make the batch."""
    for rollout, score in zip(rollouts, reward_fn(rollouts), strict=True):
        rollout.score = score
    write_gold_scores(rollouts, cfg.guards.gold_scorer)
    return make_batch(rollouts, cfg, runtime)


def make_batch(rollouts: Sequence[Rollout], cfg: PPOStage, runtime: Runtime) -> RolloutBatch:
    """Padded tensors; scores clipped, then penalised where the answer has no EOS. Rows without a score have no actions,
    and so no part in any reward, advantage, loss or mean."""
    batch = RolloutBuffer(rollouts).batch(runtime.device)
    batch.action_mask_BT &= torch.tensor([[r.score is not None] for r in rollouts], device=runtime.device)
    scores_B = batch.scores_B if cfg.score_clip is None else clip_scores(batch.scores_B, cfg.score_clip)
    penalised = missing_eos_penalty(scores_B.tolist(), rollouts, cfg.missing_eos)
    batch.scores_B = torch.tensor(penalised, device=runtime.device)
    return batch


def plan_epochs(rows: int, step: int, cfg: PPOStage, runtime: Runtime) -> list[list[Tensor]]:
    """Rows of every optimizer step: `epochs` lists of `minibatches` index tensors, each epoch freshly chosen."""
    generator = generator_for(cfg.seed, "epochs", step)
    ranks = {"rank": runtime.rank, "world_size": runtime.world_size}
    return [minibatch_rows(rows, cfg.minibatches, generator, **ranks) for _ in range(cfg.epochs)]


def evaluate_rollouts(
    learner: Learner, batch: RolloutBatch, minibatches: list[Tensor], reference: Any
) -> tuple[Tensor, ...] | None:
    """Fill in old and reference logprobs, entropies and values.

    The rows are read in the very micro-batches of the first epoch: same shapes, same kernels, same rounding, so
    that the first ratio is exactly 1 and `assert_first_ratio` can be strict.

    Returns:
        The outputs of the first micro-batch with their graph, where it is the whole first minibatch: the first update
        then needs no forward of its own. Not in step 0, whose update computes them anew for `assert_first_ratio`.
    """
    cfg, runtime = learner.cfg, learner.runtime
    for name in ("logprobs_BT", "ref_logprobs_BT", "entropy_BT", "values_BT"):
        setattr(batch, name, torch.zeros_like(batch.sampler_logprobs_BT))
    keeps = learner.step > 0 and runtime.is_alone and len(micro_batches(batch, minibatches[:1], cfg, runtime)) == 1
    kept = None
    for i, rows in enumerate(micro_batches(batch, minibatches, cfg, runtime)):
        part = batch.select(rows)
        width = part.tokens_BT.shape[1]
        inputs = (part.tokens_BT, part.attention_mask_BT, part.action_mask_BT)
        with runtime.autocast():
            with torch.set_grad_enabled(keeps and i == 0):
                outputs = learner.actor_critic(*inputs, temperature=cfg.sampling.temperature)
            with torch.no_grad():
                ref_logprobs_BT, _ = reference(*inputs, temperature=cfg.sampling.temperature, with_entropy=False)
        kept = outputs if keeps and i == 0 else kept
        for name, values_BT in zip(("logprobs_BT", "entropy_BT", "values_BT"), outputs, strict=True):
            getattr(batch, name)[rows, :width] = values_BT.detach().float()
        batch.ref_logprobs_BT[rows, :width] = ref_logprobs_BT.float()
    return kept


def micro_batches(batch: RolloutBatch, minibatches: Sequence[Tensor], cfg: PPOStage, runtime: Runtime) -> list[Tensor]:
    """The rows of every forward pass over `minibatches`; as many on every rank, for they exchange gradients in each."""
    lengths_B = batch.attention_mask_BT.sum(1).cpu()
    found = []
    for rows in minibatches:
        parts = micro_batch_rows(rows, lengths_B, cfg.micro_batch_size, cfg.micro_batch_tokens)
        if cfg.micro_batch_tokens and runtime.world_size > 1:
            parts = cut_into(parts, int(runtime.max(len(parts))))
        found += parts
    return found


def shape_rewards(batch: RolloutBatch, cfg: PPOStage, runtime: Runtime, *, kl_coef: float) -> None:
    """Per-token rewards: -coef (log pi - log pi_ref), and the score on the last action."""
    kl_BT = k1(batch.logprobs_BT, batch.ref_logprobs_BT)
    in_reward = cfg.kl.place == "reward"
    batch.rewards_BT = penalised_rewards(
        batch.scores_B, kl_BT, batch.action_mask_BT, kl_coef=kl_coef if in_reward else 0.0
    )
    if cfg.whiten_rewards:
        global_moments = runtime.sum(moments(batch.rewards_BT, batch.action_mask_BT))
        batch.rewards_BT = whiten(batch.rewards_BT, batch.action_mask_BT, global_moments, center=False)


def estimate_advantages(
    batch: RolloutBatch, cfg: PPOStage, runtime: Runtime, *, bootstrap_B: Tensor | None = None
) -> None:
    """GAE; returns are the unwhitened advantages plus the old values; then whitening over the global batch."""
    mask_BT = batch.action_mask_BT
    advantages_BT = gae(
        batch.rewards_BT, batch.values_BT, mask_BT, gamma=cfg.gamma, lam=cfg.lam, bootstrap_B=bootstrap_B
    )
    batch.returns_BT = (advantages_BT + batch.values_BT).masked_fill(~mask_BT, 0.0)
    if cfg.whiten_advantages:
        advantages_BT = whiten(advantages_BT, mask_BT, runtime.sum(moments(advantages_BT, mask_BT)), center=True)
    batch.advantages_BT = advantages_BT


@torch.no_grad()
def bootstrap_values(batch: RolloutBatch, actor_critic: Any, cfg: PPOStage, runtime: Runtime) -> Tensor | None:
    """What a truncated answer would still have earned: the value after its last token; 0 for a finished one."""
    if not cfg.bootstrap_truncated:
        return None
    values_B = torch.zeros_like(batch.scores_B)
    scalar = runtime.unwrap(actor_critic).critic.scalar
    truncated = batch.truncated_B.nonzero().squeeze(1).cpu()
    lengths_B = batch.attention_mask_BT.sum(1).cpu()
    parts = micro_batch_rows(truncated, lengths_B, cfg.micro_batch_size, cfg.micro_batch_tokens)
    for rows in runtime.in_step(parts, filler=torch.zeros(1, dtype=torch.long)):
        part = batch.select(rows)
        with runtime.autocast():
            values_B[rows] = scalar.score_last(part.tokens_BT, part.attention_mask_BT).float()
    return values_B * batch.truncated_B


# --- the update -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Learner:
    """What is trained, and what holds during one step's updates."""

    actor_critic: Any
    optimizer: Any
    cfg: PPOStage
    runtime: Runtime
    step: int
    kl_coef: float


def train(
    learner: Learner,
    batch: RolloutBatch,
    epochs: list[list[Tensor]],
    ptx: Sequence[Rollout] = (),
    *,
    kept: tuple[Tensor, ...] | None = None,
) -> dict[str, float]:
    """`epochs x minibatches` optimizer steps; returns global sums of statistics over all of them.

    Args:
        kept: what `evaluate_rollouts` returned.
    """
    cfg, runtime, step = learner.cfg, learner.runtime, learner.step
    totals: dict[str, float] = {}
    for epoch, minibatches in enumerate(epochs):
        epoch_sums: dict[str, float] = {}
        for index, rows in enumerate(minibatches):
            nth = (step * len(epochs) + epoch) * len(minibatches) + index
            # While the critic warms up, gradients would only fill the frozen policy's moments.
            mixed = ptx if step >= cfg.critic_warmup_steps else ()
            texts = ptx_texts(mixed, nth, len(rows), cfg, runtime)
            sums = update(learner, batch, rows, texts, outputs=kept)
            kept = None
            deviation = sums.pop("max_ratio_deviation")
            if epoch == 0 and index == 0:
                assert_first_ratio(deviation, runtime)
            if runtime.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
                raise InvariantError(
                    f"step {step}: the gradient was not finite {runtime.skipped_in_a_row} times in a row",
                    fix="lower optim.lr or max_grad_norm, and look at samples.jsonl of this step",
                )
            add_into(epoch_sums, sums)
        add_into(totals, epoch_sums)
        approx_kl = epoch_sums["approxkl"] / max(1.0, epoch_sums["tokens"])
        if cfg.target_kl is not None and approx_kl > cfg.target_kl:
            break
    return totals


def update(
    learner: Learner,
    batch: RolloutBatch,
    rows: Tensor,
    texts: Sequence[Rollout],
    *,
    outputs: tuple[Tensor, ...] | None = None,
) -> dict[str, float]:
    """One optimizer step on `rows`, through as many micro-batches as memory asks for, and on pretraining `texts`.

    Args:
        outputs: the forward's, where `rows` are one micro-batch that has been through it already.
    """
    actor_critic, cfg, runtime = learner.actor_critic, learner.cfg, learner.runtime
    parts = micro_batches(batch, [rows], cfg, runtime)
    denominator = runtime.denominator(int(batch.action_mask_BT[rows].sum()))
    sums: dict[str, Tensor] = {}
    deviation = 0.0
    for i, part_rows in enumerate(parts):
        part = batch.select(part_rows)
        is_last = i + 1 == len(parts) and not texts
        with runtime.accumulate(actor_critic, last=is_last):
            loss, stats = ppo_loss(learner, part, outputs or forward(learner, part), denominator=denominator)
            deviation = max(deviation, float(stats.pop("max_ratio_deviation")))
            runtime.backward(loss)
        for name, value in stats.items():
            sums[name] = sums.get(name, 0) + value.detach()
    if texts:
        add_ptx_gradients(actor_critic, texts, cfg, runtime)
    norm = runtime.step(actor_critic, learner.optimizer, max_grad_norm=cfg.optim.max_grad_norm)
    finite = norm == norm and norm != float("inf")
    reduced = reduce_sums(sums, runtime)
    return {
        **reduced,
        "updates": 1.0,
        "reused_forwards": float(outputs is not None),
        "skipped": 0.0 if finite else 1.0,
        "grad_norm": norm if finite else 0.0,
        "max_ratio_deviation": deviation,
    }


def forward(learner: Learner, part: RolloutBatch) -> tuple[Tensor, ...]:
    """(logprobs_BT, entropy_BT, values_BT) of a micro-batch, for an update."""
    with learner.runtime.autocast():
        return learner.actor_critic(
            part.tokens_BT,
            part.attention_mask_BT,
            part.action_mask_BT,
            temperature=learner.cfg.sampling.temperature,
            with_entropy=learner.cfg.entropy_coef > 0,
        )


def ppo_loss(
    learner: Learner, part: RolloutBatch, outputs: tuple[Tensor, ...], *, denominator: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped policy loss + value loss (+ KL loss - entropy bonus) of one micro-batch; and sums of statistics."""
    cfg, mask_BT = learner.cfg, part.action_mask_BT
    logprobs_BT, entropy_BT, values_BT = (output.float() for output in outputs)
    policy, policy_stats = policy_loss(
        logprobs_BT,
        part.logprobs_BT,
        part.advantages_BT,
        mask_BT,
        clip_range=cfg.clip_range,
        denominator=denominator,
        dual_clip=cfg.dual_clip,
    )
    value, value_stats = value_loss(
        values_BT, part.values_BT, part.returns_BT, mask_BT, clip_range=cfg.value_clip_range, denominator=denominator
    )
    actor = policy
    if cfg.kl.place == "loss":
        kl = kl_loss(logprobs_BT, part.ref_logprobs_BT, mask_BT, estimator=cfg.kl.estimator, denominator=denominator)
        actor = actor + learner.kl_coef * kl
    if cfg.entropy_coef:
        actor = actor - cfg.entropy_coef * masked_sum(entropy_BT, mask_BT) / denominator
    if learner.step < cfg.critic_warmup_steps:
        actor = 0.0 * actor  # not left out: every parameter must take part in the ranks' gradient exchange
    stats = {
        **policy_stats,
        **{f"value_{k}": v for k, v in value_stats.items()},
        "policy_loss": policy * denominator,
        "value_loss": value * denominator,
        "max_ratio_deviation": max_ratio_deviation(logprobs_BT, part.logprobs_BT, mask_BT),
    }
    return actor + cfg.value_coef * value, stats


# --- small helpers ----------------------------------------------------------------------------------------


def add_into(totals: dict[str, float], more: dict[str, float]) -> None:
    """`totals[k] += more[k]`."""
    for name, value in more.items():
        totals[name] = totals.get(name, 0.0) + value


def reduce_sums(sums: dict[str, Tensor], runtime: Runtime) -> dict[str, float]:
    """Sums over ranks, in one message."""
    names = sorted(sums)
    reduced = runtime.sum(torch.stack([sums[name].double() for name in names]))
    return dict(zip(names, reduced.tolist(), strict=True))
