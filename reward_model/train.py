"""Train the reward model: `rlhf reward`. Bradley-Terry on pairs, or K-way ranking from K forwards.

Ouyang 2022, section 3.5: all comparisons of one prompt share its K forward passes and weigh as one item.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reward_model.data import (
    RankedTokens,
    pad_scores,
    pairs_of,
    refuse_mixed_sources,
    split_by_prompt,
    targets,
    tokenize_rankings,
)
from reward_model.ensemble import Ensemble, disagreement, member_weights, start_ensemble
from reward_model.losses import all_pairs, bradley_terry, centering, plackett_luce
from reward_model.model import RewardModel, pad_tokens, save_reward_model
from reward_model.packing import common_prefix, pack
from rlhf.config_schema import DatasetConfig, RewardStage
from rlhf.data.order import rows_for_step
from rlhf.data.records import read_demonstrations, read_rankings
from rlhf.data.templates import located, prompt_tokens, response_tokens, show_examples
from rlhf.errors import CheckpointError, DataError, InvariantError
from rlhf.eval.winrate import share_interval
from rlhf.models.adapters import save_adapter
from rlhf.models.load import load_tokenizer
from rlhf.models.tuning import apply_tuning, build_optimizer, merge_tuning, parameter_groups, set_lr, storage_dtype
from rlhf.models.value import NORMALISATION_FILE, ScalarModel, at_last_token, load_scalar_model
from rlhf.progress import Progress
from rlhf.resume import Resume
from rlhf.runs import RunOptions
from rlhf.runtime import Runtime, explaining_memory
from rlhf.tracking import Tracker
from rlhf.types import RunResult

NORMALISATION_ROWS = 160
"""Training responses, at most, whose deviation becomes the unit of the score: known to 6% (1 / sqrt(2 * 160))."""

MAX_PACKED_TOKENS = 2048
"""Longest packed row; its attention mask takes 4 MB."""


def main(cfg: RewardStage, options: RunOptions) -> RunResult:
    """Leaves `final/` (AutoModelForSequenceClassification with its normalisation), with LoRA also `adapter/`, and
    metrics.jsonl."""
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
        model, handle = start(cfg, runtime.dtype)
        with runtime.minding_sigterm():
            fit(model, train, cfg, runtime, resume, progress, tracker)
        keep_adapter(handle, model, train, cfg, runtime, tokenizer, progress)
        # What is measured from here on is what `final/` holds: adapters folded in, in the run's precision.
        classifier = finish(model, handle, runtime.dtype)
        scorer = RewardModel(model, runtime, micro_batch_size=2 * cfg.micro_batch_size)
        normalisation = normalise(scorer, model, train, cfg, tokenizer, progress)
        summary = {**evaluate(scorer, heldout, progress), **normalisation, "train_items": len(train)}
        tracker.summary(summary)
    final = Path(cfg.run_dir) / "final"
    if runtime.is_main:
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


def finish(model: ScalarModel | Ensemble, handle: Any, dtype: torch.dtype) -> Any:
    """End training; the plain transformers model in `dtype`, adapters folded in."""
    if not isinstance(model, ScalarModel):
        return model.plain(dtype)
    model.classifier = merge_tuning(handle).to(dtype)
    return model.classifier


def load_items(cfg: RewardStage, tokenizer: Any, progress: Progress) -> tuple[list[RankedTokens], list[RankedTokens]]:
    """(train, held-out) rankings; pairs when the loss is on pairs.

    Raises:
        DataError: nothing to train on or to test on.
    """

    def read(source: DatasetConfig) -> list[RankedTokens]:
        rankings = read_rankings(source)
        progress.say(f"{source.path}: format {rankings.format}, {len(rankings)} rows")
        refuse_mixed_sources(rankings, source.path)
        tokenized = tokenize_rankings(
            rankings, tokenizer, chat=source.chat, max_length=cfg.max_length, truncation=cfg.truncation
        )
        if tokenized.truncated:
            progress.say(
                f"{source.path}: {tokenized.truncated} responses longer than {cfg.max_length} tokens keep their end"
            )
        if tokenized.retokenized:
            progress.say(f"{source.path}: {tokenized.retokenized} responses tokenised anew for this model")
        return tokenized.items

    if cfg.eval_dataset is not None:
        train, heldout = read(cfg.dataset), read(cfg.eval_dataset)
    else:
        train, heldout = split_by_prompt(read(cfg.dataset), cfg.heldout_fraction, cfg.seed)
    if cfg.loss != "bradley_terry" and any(item.margin for item in train):
        progress.say(f"margins are used by loss: bradley_terry only, not by {cfg.loss}")
    if cfg.loss == "bradley_terry":
        train = [pair for item in train for pair in pairs_of(item)]
    if not train or not heldout:
        raise DataError(
            f"{cfg.dataset.path}: {len(train)} items to train on, {len(heldout)} held out",
            fix="give rankings without only ties, and eval_dataset or heldout_fraction > 0",
        )
    examples = [(row, [i == len(row) - 1 for i in range(len(row))]) for row in train[0].rows[:2]]
    show_examples(progress.console, tokenizer, "reward (scored at the last token; best first)", examples)
    return train, heldout


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
    longest = max((item for item in train if is_packable(item)), key=packed_length, default=None)
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
        progress.advance(1, loss=metrics["loss/train"], accuracy=metrics["train/accuracy"])
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
    return {
        "loss/train": loss_sum / (denominator * runtime.world_size),
        "train/accuracy": right / max(1.0, pairs),
        "train/grad_norm": norm,
    }


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


def outcomes_of(scores: Sequence[float], ranks: Sequence[float]) -> list[float]:
    """1 for every untied pair whose scores are in the order of `ranks` (low is best), 0 if not, .5 at equal scores."""
    outcomes = []
    for i, j in combinations(range(len(ranks)), 2):
        if ranks[i] != ranks[j]:
            difference = (scores[i] - scores[j]) * (1 if ranks[i] < ranks[j] else -1)
            outcomes.append(0.5 if difference == 0 else float(difference > 0))
    return outcomes


def keep_adapter(
    handle: Any,
    model: ScalarModel | Ensemble,
    train: Sequence[RankedTokens],
    cfg: RewardStage,
    runtime: Runtime,
    tokenizer: Any,
    progress: Progress,
) -> None:
    """With LoRA write `adapter/`: adapter and head, unrounded, with a normalisation of their own, and an ensemble's
    members; else take away an earlier run's."""
    folder = Path(cfg.run_dir) / "adapter"
    if cfg.tuning.kind != "lora":
        if runtime.is_main:
            save_adapter(None, folder)
        return
    scorer = RewardModel(model, runtime, micro_batch_size=2 * cfg.micro_batch_size)
    moments = normalise(scorer, model, train, cfg, tokenizer, progress)

    def write(staging: Path) -> None:
        (staging / NORMALISATION_FILE).write_text(json.dumps(moments, indent=1), encoding="utf-8")
        if not isinstance(model, ScalarModel):
            model.save(staging)

    if runtime.is_main:
        head = model.classifier.score if isinstance(model, ScalarModel) else model.plain_head()
        save_adapter(handle, folder, head=head, further=write)
    set_moments(model, [0.0] * scorer.members, 1.0)


def set_moments(model: ScalarModel | Ensemble, means: Sequence[float], std: float) -> None:
    """From now on member m's scores are (raw - means[m]) / std."""
    if isinstance(model, ScalarModel):
        model.set_normalisation(means[0], std)
    else:
        model.set_normalisation(means, std)


def normalise(
    scorer: RewardModel,
    model: ScalarModel | Ensemble,
    train: Sequence[RankedTokens],
    cfg: RewardStage,
    tokenizer: Any,
    progress: Progress,
) -> dict[str, Any]:
    """Set and return mean (of demonstrations, else of training responses) and std (of training responses).

    An ensemble's members get a mean each and one std, that of their mean score; what is returned is the plain model's.
    """
    responses = [row for item in train for row in item.rows]
    responses = responses[:: math.ceil(len(responses) / NORMALISATION_ROWS)]
    if cfg.normalise_on is not None:
        zero = [
            located(d.where, prompt_tokens, tokenizer, d.prompt, chat=cfg.normalise_on.chat)
            + response_tokens(tokenizer, d.completion, finished=True)
            for d in read_demonstrations(cfg.normalise_on)
        ]
    else:
        zero = responses
    progress.phase("normalise", total=len(zero) + len(responses), unit="rows")
    zero_MN = scorer.score_members([row[-cfg.max_length :] for row in zero], progress.advance)
    response_N = scorer.score_members(responses, progress.advance).mean(0)
    means, std = zero_MN.mean(1).tolist(), max(float(response_N.std(correction=0)), 1e-6)
    set_moments(model, means, std)
    mean = means[0] if isinstance(model, ScalarModel) else model.plain_mean
    return {"mean": mean, "std": std, "zero_is": cfg.normalise_on.path if cfg.normalise_on else "training responses"}


def evaluate(scorer: RewardModel, heldout: Sequence[RankedTokens], progress: Progress) -> dict[str, Any]:
    """Held-out pair accuracy with a 95% interval over prompts, against gold scores where known, else the labels."""
    progress.phase("evaluate", total=sum(len(item.rows) for item in heldout), unit="rows")
    scores_MN = scorer.score_members([row for item in heldout for row in item.rows], progress.advance)
    flat = iter(scorer.aggregate(scores_MN).tolist())
    outcomes: dict[str, list[float]] = {"label": [], "gold": []}
    groups: dict[str, list[str]] = {"label": [], "gold": []}
    lengths, all_scores = [], []
    for item in heldout:
        scores = [next(flat) for _ in item.rows]
        all_scores += scores
        lengths += item.response_lengths
        orders = {"label": [float(r) for r in item.ranks], "gold": [-g for g in item.gold or []]}
        for name, ranks in orders.items():
            new = outcomes_of(scores, ranks)
            outcomes[name] += new
            groups[name] += [item.group] * len(new)
    against = "gold" if outcomes["gold"] else "label"
    accuracy = share_interval(outcomes[against], groups[against])
    summary = {
        "accuracy": accuracy[0],
        "accuracy_low": accuracy[1],
        "accuracy_high": accuracy[2],
        "accuracy_against": against,
        "pairs": len(outcomes[against]),
        "prompts": len(set(groups[against])),
        "label_accuracy": sum(outcomes["label"]) / max(1, len(outcomes["label"])),
    }
    if scorer.members > 1:
        summary |= evaluate_members(scores_MN, heldout)
    stacked = torch.tensor([lengths, all_scores], dtype=torch.float64)
    if len(lengths) > 2 and bool((stacked.std(dim=1) > 0).all()):
        summary["length_correlation"] = float(torch.corrcoef(stacked)[0, 1])
    return summary


def evaluate_members(scores_MN: Tensor, heldout: Sequence[RankedTokens]) -> dict[str, Any]:
    """Each member's accuracy against the labels, and how far the members disagree."""
    counts = [len(item.rows) for item in heldout]
    accuracies = []
    for scores_N in scores_MN:
        rows = zip(scores_N.split(counts), heldout, strict=True)
        outcomes = [x for scores, item in rows for x in outcomes_of(scores.tolist(), item.ranks)]
        accuracies.append(sum(outcomes) / max(1, len(outcomes)))
    return {"member_accuracies": accuracies, "disagreement": float(disagreement(scores_MN).mean())}
