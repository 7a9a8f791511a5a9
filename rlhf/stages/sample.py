"""Sample K completions per prompt into the rollout buffer's Parquet file: what labelers will see."""

from __future__ import annotations

from pathlib import Path

from rlhf.config_schema import SampleStage
from rlhf.data.order import generator_for
from rlhf.data.records import read_prompts
from rlhf.data.templates import check_prompt_lengths
from rlhf.models.load import eos_token_ids, load_causal_lm, load_tokenizer
from rlhf.progress import Progress
from rlhf.rollout.buffer import RolloutBuffer
from rlhf.rollout.collect import collect
from rlhf.rollout.generate import GenerationSettings
from rlhf.runs import RunOptions
from rlhf.runtime import Runtime
from rlhf.types import Rollout, RunResult, StopReason


def main(cfg: SampleStage, options: RunOptions) -> RunResult:
    """Write `rollouts/samples.parquet`; every rank samples its share of the prompts."""
    runtime = Runtime.start(seed=cfg.seed, precision=cfg.precision)
    tokenizer = load_tokenizer(cfg.model)
    prompts = check_prompt_lengths(
        read_prompts(cfg.prompts),
        tokenizer,
        chat=cfg.prompts.chat,
        max_tokens=cfg.max_prompt_tokens,
        overlong=cfg.overlong,
    )
    lm = runtime.freeze(load_causal_lm(cfg.model, dtype=runtime.dtype))
    settings = GenerationSettings(
        tuple(eos_token_ids(lm, tokenizer)),
        cfg.sampling.max_new_tokens,
        cfg.sampling.temperature,
        cfg.sampling.batch_size,
    )
    mine = prompts[runtime.rank :: runtime.world_size]
    k = cfg.completions_per_prompt
    with Progress(stage="sample", enabled=runtime.is_main) as progress:
        progress.phase("generate", total=len(mine) * k * settings.max_new_tokens, unit="tokens")
        rollouts = collect(
            lm,
            mine,
            settings,
            decode=lambda tokens: tokenizer.decode(tokens, skip_special_tokens=True),
            generator=generator_for(cfg.seed, "sample", runtime.rank, device=runtime.device),
            copies=k,
            policy=cfg.model,
            on_tokens=progress.advance,
        )
    rollouts = runtime.gather_objects(rollouts)
    path = Path(cfg.run_dir) / "rollouts" / "samples.parquet"
    if runtime.is_main:
        RolloutBuffer(rollouts).to_parquet(path)
    return RunResult(cfg.run_dir, summarise(rollouts, len(prompts)), {"rollouts": str(path), "model": cfg.model})


def summarise(rollouts: list[Rollout], prompts: int) -> dict[str, float]:
    """Counts, mean length in tokens, share that ended by EOS."""
    count = max(1, len(rollouts))
    return {
        "prompts": prompts,
        "rollouts": len(rollouts),
        "length_mean": sum(len(r.response_tokens) for r in rollouts) / count,
        "eos_frac": sum(r.stop is StopReason.EOS for r in rollouts) / count,
    }
