"""Our side of bench_ppo: some steps of `rlhf ppo`; prints one JSON line with its speed. The first step warms up."""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

from harness import BUILD


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompts", required=True, help="JSON lines with texts")
    parser.add_argument("--profile", action="store_true", help="put profile.json into the report")
    for name in ("batch", "micro", "budget", "epochs", "updates"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("overrides", nargs="*", help="further keys of the configuration, a.b=c")
    return parser.parse_args()


REWARD_LAYERS = 8
"""Top layers of the reward model that are not the policy's: with `sharing: hydra` it has them for itself."""


def reward_model(model: str) -> str:
    """A reward model with a random head and other top layers, made once; what it says does not change the time."""
    import torch

    from reward_model.model import save_reward_model
    from rlhf.models.load import load_sequence_classifier, load_tokenizer

    folder = BUILD / f"reward_model_{REWARD_LAYERS}"
    if not folder.exists():
        torch.manual_seed(0)
        classifier = load_sequence_classifier(model, dtype=torch.bfloat16, new_head=True)
        with torch.no_grad():
            for layer in classifier.model.layers[-REWARD_LAYERS:]:
                for parameter in layer.parameters():
                    parameter.mul_(1.01)
        save_reward_model(folder, classifier, load_tokenizer(model), {"mean": 0.0, "std": 1.0})
    return str(folder)


def configuration(args: argparse.Namespace, run_dir: Path) -> Any:
    from rlhf import config

    plain = {
        "run_dir": str(run_dir),
        "model": args.model,
        "reward_model": reward_model(args.model),
        "prompts": {"path": args.prompts},
        "sampling": {"max_new_tokens": args.budget, "batch_size": args.batch},
        "steps": args.updates + 1,
        "batch_size": args.batch,
        "micro_batch_size": args.micro,
        "minibatches": 1,
        "epochs": args.epochs,
        "optim": {"lr": 1e-6},
        "precision": "bf16",
        "save_every": 0,
        "tracking": {"wandb": "off"},
    }
    file = run_dir.with_suffix(".yaml")
    file.write_text(json.dumps(plain))
    return config.load(str(file), "ppo", args.overrides)


def main() -> None:
    args = arguments()
    import torch

    from rlhf.runs import RunOptions, peak_rss_gb
    from rlhf.stages import ppo

    run_dir = BUILD / "ours_ppo"
    shutil.rmtree(run_dir, ignore_errors=True)
    with contextlib.redirect_stdout(sys.stderr):
        ppo.main(configuration(args, run_dir), RunOptions(resume="never", profile=args.profile))
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()][1:]

    def mean(key: str) -> float:
        return statistics.fmean(line[key] for line in lines)

    report = {
        "samples_per_s": args.batch / mean("time/step"),
        "tokens_per_s": args.batch * mean("response/length_mean") / mean("time/step"),
        "length_mean": mean("response/length_mean"),
        "seconds": {name: mean(f"time/{name}") for name in ("generate", "score", "update", "step")},
        "peak_rss_gb": peak_rss_gb(),
        "peak_gpu_gb": torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else None,
    }
    if args.profile:
        report["profile"] = json.loads((run_dir / "profile.json").read_text())
    print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
