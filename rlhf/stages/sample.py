"""Sample K completions per prompt into the rollout buffer's Parquet file: what labelers will see."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rlhf.config_schema import DatasetConfig, SampleStage
from rlhf.data.order import seed_of, share_of
from rlhf.data.records import read_prompts
from rlhf.data.templates import TokenizedPrompt, check_prompt_lengths, show_prompts
from rlhf.models.load import eos_token_ids, load_causal_lm, load_tokenizer, require_same_tokens
from rlhf.progress import Progress
from rlhf.rollout.buffer import RolloutBuffer
from rlhf.rollout.collect import collect, settings_from
from rlhf.rollout.engines import engine_for
from rlhf.runs import RunOptions
from rlhf.runtime import Runtime
from rlhf.types import Rollout, RunResult


def main(cfg: SampleStage, options: RunOptions) -> RunResult:
    """Write `rollouts/samples.parquet` and, of held-out prompts, `rollouts/heldout.parquet`."""
    runtime = Runtime.start(seed=cfg.seed, precision=cfg.precision)
    tokenizer = load_tokenizer(cfg.model)
    for name in cfg.further_models:
        require_same_tokens(name, tokenizer, role="further model")
    sources = {"samples": cfg.prompts, "heldout": cfg.heldout_prompts}
    with Progress(stage="sample", enabled=runtime.is_main) as progress:
        prompts = {
            name: load_prompts(source, tokenizer, cfg, runtime, progress) for name, source in sources.items() if source
        }
        drawn: dict[str, list[Rollout]] = {name: [] for name in prompts}
        for model in (cfg.model, *cfg.further_models):
            lm = runtime.freeze(load_causal_lm(model, dtype=runtime.dtype))
            for name, given in prompts.items():
                drawn[name] += sample(name, model, lm, given, tokenizer, cfg, runtime, progress)
    outputs, summary = {"model": cfg.model}, {}
    for name, rollouts in drawn.items():
        rollouts.sort(key=position_in(prompts[name]))  # stable: a prompt's completions stand together, model by model
        path = Path(cfg.run_dir) / "rollouts" / f"{name}.parquet"
        if runtime.is_main:
            RolloutBuffer(rollouts).to_parquet(path)
        outputs["rollouts" if name == "samples" else "heldout_rollouts"] = str(path)
        summary[name] = summarise(rollouts, len(prompts[name]))
    return RunResult(cfg.run_dir, {**summary.pop("samples"), **summary}, outputs)


def position_in(prompts: Sequence[TokenizedPrompt]) -> Callable[[Rollout], int]:
    """A rollout's prompt as its index."""
    index = {prompt.record.prompt_id: i for i, prompt in enumerate(prompts)}
    return lambda rollout: index[rollout.prompt_id]


def load_prompts(
    source: DatasetConfig, tokenizer: Any, cfg: SampleStage, runtime: Runtime, progress: Progress
) -> list[TokenizedPrompt]:
    """Tokenized prompts of one file, two of them shown."""
    records = read_prompts(source)
    prompts = check_prompt_lengths(
        records, tokenizer, chat=source.chat, max_tokens=cfg.max_prompt_tokens, overlong=cfg.overlong
    )
    if runtime.is_main:
        show_prompts(progress.console, tokenizer, f"{source.path}: format {records.format}", prompts)
    return prompts


def sample(
    name: str,
    model: str,
    lm: Any,
    prompts: Sequence[TokenizedPrompt],
    tokenizer: Any,
    cfg: SampleStage,
    runtime: Runtime,
    progress: Progress,
) -> list[Rollout]:
    """One model's completions from all ranks; every rank samples its share of the prompts."""
    k = cfg.completions_per_prompt // (1 + len(cfg.further_models))
    mine = share_of(len(prompts), rank=runtime.rank, world_size=runtime.world_size)
    decode = partial(tokenizer.decode, skip_special_tokens=True)
    settings = settings_from(cfg.sampling, eos_token_ids(lm, tokenizer), decode)
    key = ["sample" if name == "samples" else name, *([model] if model != cfg.model else [])]
    progress.phase(" ".join(key), total=len(mine) * k * settings.max_new_tokens, unit="tokens")
    rollouts = collect(
        engine_for(cfg.sampling, lm, model),
        [prompts[i] for i in mine],
        settings,
        decode=decode,
        seeds=[seed_of(cfg.seed, *key, i, copy) for i in mine for copy in range(k)],
        copies=k,
        policy=model,
        on_tokens=progress.advance,
    )
    return runtime.gather_objects(rollouts)


def summarise(rollouts: list[Rollout], prompts: int) -> dict[str, float]:
    """Counts, mean length in tokens, share that ended by EOS."""
    count = max(1, len(rollouts))
    return {
        "prompts": prompts,
        "rollouts": len(rollouts),
        "length_mean": sum(len(r.response_tokens) for r in rollouts) / count,
        "eos_frac": sum(r.stop.finished for r in rollouts) / count,
    }
