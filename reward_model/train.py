"""Train the reward model: `rlhf reward CONFIG`. Bradley-Terry on pairs, K-way ranking from K forwards, or ratings.

Ouyang 2022, section 3.5: all comparisons of one prompt share its K forward passes and weigh as one item.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reward_model.calibrate import Units, outcomes_of
from reward_model.data import (
    RankedTokens,
    RatingScale,
    merge_by_prompt,
    pad_scores,
    pairs_of,
    refuse_mixed_sources,
    split_by_prompt,
    targets,
    tokenize_rankings,
    tokenize_ratings,
)
from reward_model.ensemble import Ensemble, member_weights, start_ensemble
from reward_model.finish import end_training, keep_adapter, normalise
from reward_model.losses import all_pairs, bradley_terry, centering, plackett_luce, pointwise
from reward_model.measure import measure
from reward_model.model import RewardModel, pad_tokens, save_reward_model
from reward_model.packing import common_prefix, pack
from rlhf.config_schema import DatasetConfig, RewardStage
from rlhf.data.order import rows_for_step
from rlhf.data.records import Records, read_rankings, read_ratings
from rlhf.data.templates import show_examples
from rlhf.errors import CheckpointError, DataError, InvariantError
from rlhf.models.load import load_tokenizer
from rlhf.models.tuning import apply_tuning, build_optimizer, parameter_groups, set_lr, storage_dtype
from rlhf.models.value import ScalarModel, at_last_token, load_scalar_model
from rlhf.progress import Progress
from rlhf.resume import Resume
from rlhf.runs import RunOptions
from rlhf.runtime import Runtime, explaining_memory
from rlhf.tracking import Tracker
from rlhf.types import RunResult

MAX_PACKED_TOKENS = 2048
"""Longest packed row; its attention mask takes 4 MB."""


def main(cfg: RewardStage, options: RunOptions) -> RunResult:
    """Leaves `final/` (AutoModelForSequenceClassification with its normalisation, and an ensemble's members), with LoRA
    also `adapter/`; metrics.jsonl, reward_report.json and reward_report.html."""
    runtime = Runtime.start(seed=cfg.seed, precision=cfg.precision)
    resume = Resume.open(cfg, options, runtime, say=print)
    tokenizer = load_tokenizer(cfg.model)
    with (
        Progress(stage="reward", enabled=runtime.is_main) as progress,
        Tracker.open(
            cfg.run_dir,
            cfg.tracking,
            stage="reward",
            config=cfg.model_dump(mode="json"),
            enabled=runtime.is_main,
            resume_step=resume.first_step or None,
            say=progress.say,
        ) as tracker,
    ):
        train, heldout = load_items(cfg, tokenizer, progress)
        scale = None
        if cfg.loss == "pointwise":
            scale = RatingScale.of(train)
            scale.apply(train)
        model, handle = start(cfg, runtime.dtype)
        with runtime.minding_sigterm():
            fit(model, train, cfg, runtime, resume, progress, tracker)
        keep_adapter(handle, model, train, cfg, runtime, tokenizer, progress)
        # What is measured from here on is what `final/` holds: adapters folded in, in the run's precision.
        classifier = end_training(model, handle, runtime.dtype)
        scorer = RewardModel(model, runtime, micro_batch_size=2 * cfg.micro_batch_size)
        normalisation = normalise(scorer, model, train, cfg, tokenizer, progress)
        measured = measure(scorer, heldout, Units(scorer.mean, scorer.std, scale), progress)
        summary = {**measured.summary, **normalisation, "train_items": len(train)}
        tracker.summary(summary)
    final = Path(cfg.run_dir) / "final"
    if runtime.is_main:
        measured.write(Path(cfg.run_dir), title="Reward model")
        members = None if isinstance(model, ScalarModel) else model
        save_reward_model(final, classifier, tokenizer, normalisation, members)
    runtime.barrier()
    return RunResult(cfg.run_dir, summary, {"reward_model": str(final)})


def start(cfg: RewardStage, precision: torch.dtype) -> tuple[ScalarModel | Ensemble, Any]:
    """The model to train, with raw scores, and what `apply_tuning` gave for it (for an ensemble's first member)."""
    scalar = load_scalar_model(cfg.model, dtype=storage_dtype(cfg.tuning, precision), new_head=True)
    scalar.set_normalisation(0.0, 1.0)  # a further-trained reward model is normalised anew
    if cfg.ensemble is None:
        return scalar, apply_tuning(scalar.classifier, cfg.tuning, precision, head=scalar.classifier.score)
    ensemble = start_ensemble(scalar, cfg, precision)
    return ensemble, ensemble.handle


def load_items(cfg: RewardStage, tokenizer: Any, progress: Progress) -> tuple[list[RankedTokens], list[RankedTokens]]:
    """(train, held-out) rankings; what is trained on are pairs when the loss is on pairs, single rows when it is on
    ratings.

    Raises:
        DataError: nothing to train on or to test on.
    """
    if cfg.eval_dataset is not None:
        train, heldout = (read_items(source, cfg, tokenizer, progress) for source in (cfg.dataset, cfg.eval_dataset))
    else:
        items = read_items(cfg.dataset, cfg, tokenizer, progress)
        train, heldout = split_by_prompt(items, cfg.heldout_fraction, cfg.seed)
    if cfg.loss != "bradley_terry" and any(item.margin for item in train):
        progress.say(f"margins are used by loss: bradley_terry only, not by {cfg.loss}")
    if cfg.loss == "bradley_terry":
        train = [pair for item in train for pair in pairs_of(item)]
    elif cfg.loss == "pointwise":
        heldout = merge_by_prompt(heldout)
    if not train or not heldout:
        raise DataError(
            f"{cfg.dataset.path}: {len(train)} items to train on, {len(heldout)} held out",
            fix="give rankings without only ties, and eval_dataset or heldout_fraction > 0",
        )
    examples = [(row, [i == len(row) - 1 for i in range(len(row))]) for row in train[0].rows[:2]]
    show_examples(progress.console, tokenizer, "reward (scored at the last token; best first)", examples)
    return train, heldout


def read_items(source: DatasetConfig, cfg: RewardStage, tokenizer: Any, progress: Progress) -> list[RankedTokens]:
    """Rankings, or ratings where the loss is on them, as token rows; what was cut is said."""
    how = {"chat": source.chat, "max_length": cfg.max_length, "truncation": cfg.truncation}
    if cfg.loss == "pointwise":
        records: Records[Any] = read_ratings(source)
        tokenized = tokenize_ratings(records, tokenizer, **how)
    else:
        records = read_rankings(source)
        refuse_mixed_sources(records, source.path)
        tokenized = tokenize_rankings(records, tokenizer, **how)
    progress.say(f"{source.path}: format {records.format}, {len(records)} rows")
    for line in tokenized.remarks(cfg.max_length):
        progress.say(f"{source.path}: {line}")
    return tokenized.items


def fit(
    model: ScalarModel | Ensemble,
    train: Sequence[RankedTokens],
    cfg: RewardStage,
    runtime: Runtime,
    resume: Resume,
    progress: Progress,
    tracker: Tracker,
) -> None:
    """`epochs` passes over the rankings, in an order that depends on (seed, step) alone; ends training."""
    groups = parameter_groups(model, lr=cfg.optim.lr, weight_decay=cfg.optim.weight_decay)
    model.to(runtime.device).eval()  # eval: dropout off, for training too (its scores must not depend on chance)
    resume.load_weights(model)
    module, optimizer = runtime.prepare(
        model,
        build_optimizer(groups, cfg.optim),
        micro_batch_size=cfg.micro_batch_size,
        max_grad_norm=cfg.optim.max_grad_norm,
    )
    size = min(cfg.batch_size, max(1, len(train) // runtime.world_size))
    total = max(1, math.ceil(cfg.epochs * len(train) / (size * runtime.world_size)))
    longest = max((item for item in train if len(item.rows) > 1 and is_packable(item)), key=packed_length, default=None)
    share_prompts = resume.state.get("share_prompts")  # asked of the first weights: later ones might say otherwise
    if share_prompts is None:
        share_prompts = cfg.share_prompts and longest is not None and obeys_masks(module, longest, runtime)
    facts = {"rows_per_step": size * runtime.world_size, "share_prompts": share_prompts}
    refuse_other_rows(resume, facts["rows_per_step"])
    resume.attach(model, optimizer, state=lambda: facts)
    resume.begin()
    if cfg.share_prompts and not share_prompts and longest is not None:
        progress.say("this model does not score several responses in one row: each prompt is read once per response")
    progress.phase("train", total=total, unit="steps", done=resume.first_step)
    for step in range(resume.first_step, total):
        rows = rows_for_step(step, size, len(train), seed=cfg.seed, rank=runtime.rank, world_size=runtime.world_size)
        lr = set_lr(optimizer, cfg.optim, step, total)
        with explaining_memory("train", f"lower micro_batch_size, which is {cfg.micro_batch_size}"):
            metrics = train_step(module, optimizer, [train[i] for i in rows], cfg, runtime, share_prompts=share_prompts)
        tracker.log(step + 1, {**metrics, "lr": lr})
        shown = {"accuracy": metrics["train/accuracy"]} if "train/accuracy" in metrics else {}
        progress.advance(1, loss=metrics["loss/train"], **shown)
        resume.save_if_due(step, total)
    resume.finish()
    runtime.make_whole(model, everywhere=True)


def refuse_other_rows(resume: Resume, rows: int) -> None:
    """A few items are cut into other batches by another number of processes.

    Raises:
        CheckpointError: a step took another number of items before.
    """
    before = resume.state.get("rows_per_step", rows)
    if before != rows:
        raise CheckpointError(
            f"a step took {before} items of all processes when the checkpoint was written, now it would take {rows}",
            fix="go on with as many processes as before, or start anew with --resume never",
        )


def train_step(
    module: Any,
    optimizer: Any,
    items: Sequence[RankedTokens],
    cfg: RewardStage,
    runtime: Runtime,
    *,
    share_prompts: bool,
) -> dict[str, float]:
    """One optimizer step on this rank's `items`; micro-batches of about equal length."""
    ordered = sorted(items, key=lambda item: max(map(len, item.rows)))
    parts = [ordered[i : i + cfg.micro_batch_size] for i in range(0, len(ordered), cfg.micro_batch_size)]
    denominator = runtime.denominator(len(items))
    sums = torch.zeros(3, dtype=torch.float64, device=runtime.device)  # loss, right pairs, pairs
    for i, part in enumerate(parts):
        with runtime.accumulate(module, last=i + 1 == len(parts)):
            scores_BK, mask_BK = forward(module, part, runtime, share_prompts=share_prompts)
            if cfg.ensemble is None:
                loss = ranking_loss(scores_BK, mask_BK, part, cfg)
            else:
                loss = ensemble_loss(scores_BK, mask_BK, part, cfg)
                scores_BK = scores_BK.mean(2)
            runtime.backward(loss * len(part) / denominator)
        right, pairs = right_pairs(scores_BK.detach(), part)
        sums += torch.tensor([float(loss.detach()) * len(part), right, pairs], device=runtime.device)
    norm = runtime.step(module, optimizer, max_grad_norm=cfg.optim.max_grad_norm)
    if not math.isfinite(norm):
        raise InvariantError("the reward model's gradient is not finite", fix="lower optim.lr, or use precision: fp32")
    loss_sum, right, pairs = runtime.sum(sums).tolist()
    metrics = {"loss/train": loss_sum / (denominator * runtime.world_size), "train/grad_norm": norm}
    return metrics if cfg.loss == "pointwise" else {**metrics, "train/accuracy": right / max(1.0, pairs)}


def forward(
    module: Any, items: Sequence[RankedTokens], runtime: Runtime, *, share_prompts: bool
) -> tuple[Tensor, Tensor]:
    """Scores at the last token of every row: (scores_BK, mask_BK); of an ensemble (scores_BKM, mask_BK)."""
    if share_prompts and all(map(is_packable, items)):
        packed = pack([item.rows for item in items]).to(runtime.device)
        with runtime.autocast():
            scores_BS = module(packed.tokens_BS, packed.mask_B1SS, packed.positions_BS)
        return pad_scores(scores_BS[packed.row_N, packed.last_N], items)
    tokens_NT, mask_NT = pad_tokens([row for item in items for row in item.rows])
    tokens_NT, mask_NT = tokens_NT.to(runtime.device), mask_NT.to(runtime.device)
    with runtime.autocast():
        scores_NT = module(tokens_NT, mask_NT)
    return pad_scores(at_last_token(scores_NT, mask_NT), items)


def packed_length(item: RankedTokens) -> int:
    """Tokens of the packed row, or a few more."""
    return sum(map(len, item.rows)) - (len(item.rows) - 1) * common_prefix(item.rows)


def is_packable(item: RankedTokens) -> bool:
    """The mask of a packed row grows with its square: many long responses are better read one by one."""
    return packed_length(item) <= MAX_PACKED_TOKENS


@torch.no_grad()
def obeys_masks(module: Any, item: RankedTokens, runtime: Runtime) -> bool:
    """Whether packed rows score like separate ones, on every rank; to be asked about the longest.

    Not so where attention takes no mask (flash attention), has a sliding window that ends within the row, or knows
    no positions but the order of tokens.
    """
    separate_1K, _ = forward(module, [item], runtime, share_prompts=False)
    try:
        packed_1K, _ = forward(module, [item], runtime, share_prompts=True)
        error = float((packed_1K - separate_1K).abs().max() / separate_1K.abs().max().clamp(min=1.0))
    except (ValueError, TypeError, RuntimeError):
        error = math.inf
    return runtime.max(error) <= (1e-3 if runtime.precision == "fp32" else 0.05)


def ensemble_loss(scores_BKM: Tensor, mask_BK: Tensor, items: Sequence[RankedTokens], cfg: RewardStage) -> Tensor:
    """Mean over the members of their losses, in each of which the items have weights of mean 1 (`member_weights`)."""
    weights_BM = member_weights([item.group for item in items], scores_BKM.shape[2], cfg.seed).to(scores_BKM.device)
    losses = [
        # A weighted mean in a small batch would undo the weights: alone, an item would always weigh 1.
        ranking_loss(scores_BK, mask_BK, items, cfg, weight_B=weight_B) * weight_B.mean()
        for scores_BK, weight_B in zip(scores_BKM.unbind(2), weights_BM.unbind(1), strict=True)
    ]
    return torch.stack(losses).mean()


def ranking_loss(
    scores_BK: Tensor,
    mask_BK: Tensor,
    items: Sequence[RankedTokens],
    cfg: RewardStage,
    *,
    weight_B: Tensor | None = None,
) -> Tensor:
    """Mean loss of the items, by `cfg.loss`; with `weight_B` a weighted mean."""
    ranks_BK, wins_BKK = targets(items, scores_BK.device)
    if cfg.loss == "bradley_terry":
        chosen_B, rejected_B = scores_BK.unbind(1)
        margin_B = torch.tensor([item.margin for item in items], device=scores_BK.device)
        loss = bradley_terry(chosen_B, rejected_B, margin_B=margin_B, target_B=wins_BKK[:, 0, 1], weight_B=weight_B)
    elif cfg.loss == "pointwise":
        ratings_B = torch.tensor([rating for item in items for rating in item.ratings or []], device=scores_BK.device)
        loss = pointwise(scores_BK.squeeze(1), ratings_B, weight_B=weight_B)
    elif cfg.loss == "all_pairs":
        loss = all_pairs(scores_BK, wins_BKK, mask_BK[:, :, None] & mask_BK[:, None, :], weight_B=weight_B)
    else:
        loss = plackett_luce(scores_BK, ranks_BK, mask_BK, weight_B=weight_B)
    if cfg.centering:
        loss = loss + cfg.centering * centering(scores_BK, mask_BK, weight_B=weight_B)
    return loss


def right_pairs(scores_BK: Tensor, items: Sequence[RankedTokens]) -> tuple[float, float]:
    """(pairs ordered as labelled, untied pairs)."""
    outcomes = [x for row, item in zip(scores_BK.tolist(), items, strict=True) for x in outcomes_of(row, item.ranks)]
    return sum(outcomes), float(len(outcomes))
