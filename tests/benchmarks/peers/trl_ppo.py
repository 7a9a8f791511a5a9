"""TRL 1.12's PPOTrainer on given prompts; prints one JSON line with its speed. Runs with TRL 1.12 on PYTHONPATH.

TRL 1.12.0 is the last release with PPO. Policy and critic are fine-tuned, reference and reward model are frozen: four
models of one size. The first update warms up and is not counted.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompts", required=True, help="JSON lines, each a list of token ids")
    parser.add_argument("--batch", type=int, required=True, help="rollouts per update")
    parser.add_argument("--micro", type=int, required=True, help="rows per forward of the update")
    parser.add_argument("--budget", type=int, required=True, help="response tokens at most")
    parser.add_argument("--epochs", type=int, required=True)
    parser.add_argument("--updates", type=int, required=True, help="counted ones")
    return parser.parse_args()


class Clock:
    """Seconds per phase and sampled tokens since the warm-up ended."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self.seconds: dict[str, float] = {}
        self.tokens, self.began = 0, time.perf_counter()

    def timed(self, name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            result = function(*args, **kwargs)
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began
            return result

        return call


def build_trainer(args: argparse.Namespace) -> Any:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    torch.manual_seed(0)

    def load(auto_class: Any, **kwargs: Any) -> Any:
        return auto_class.from_pretrained(args.model, dtype=torch.bfloat16, **kwargs)

    config = PPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=args.micro,
        gradient_accumulation_steps=args.batch // args.micro,
        num_mini_batches=1,
        num_ppo_epochs=args.epochs,
        response_length=args.budget,
        temperature=1.0,  # its default, 0.7, gives other answers, of another length
        total_episodes=args.batch * (args.updates + 1),
        local_rollout_forward_batch_size=args.batch,
        learning_rate=1e-6,
        stop_token="eos",
        missing_eos_penalty=1.0,
        report_to=[],
        num_sample_generations=0,
        save_strategy="no",
        bf16=False,
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=False,
    )
    return PPOTrainer(
        args=config,
        processing_class=AutoTokenizer.from_pretrained(args.model, padding_side="left"),
        model=load(AutoModelForCausalLM),
        ref_model=load(AutoModelForCausalLM),
        reward_model=load(AutoModelForSequenceClassification, num_labels=1),
        value_model=load(AutoModelForSequenceClassification, num_labels=1),
        train_dataset=Dataset.from_dict(
            {"input_ids": [json.loads(line) for line in Path(args.prompts).read_text().splitlines()]}
        ),
    )


def main() -> None:
    args = arguments()
    import torch
    import trl
    from trl.experimental.ppo import ppo_trainer

    trainer, clock = build_trainer(args), Clock()
    generate, eos = ppo_trainer.batch_generation, trainer.processing_class.eos_token_id

    def counted(*a: Any, **k: Any) -> Any:
        out, logits = generate(*a, **k)
        is_eos = out[:, a[1].shape[1] :] == eos
        clock.tokens += int((is_eos.cumsum(1) - is_eos.long() == 0).sum())  # up to and including the first EOS
        return out, logits

    ppo_trainer.batch_generation = clock.timed("generate", counted)
    ppo_trainer.forward = clock.timed("forward", ppo_trainer.forward)
    ppo_trainer.get_reward = clock.timed("score", ppo_trainer.get_reward)
    trainer.accelerator.backward = clock.timed("backward", trainer.accelerator.backward)
    log = trainer.log

    def log_and_mark(*a: Any, **k: Any) -> Any:
        if trainer.state.global_step == 1:
            clock.restart()
        return log(*a, **k)

    trainer.log = log_and_mark
    trainer.train()
    total = time.perf_counter() - clock.began
    episodes = args.batch * args.updates
    report = {
        "version": f"trl {trl.__version__}, torch {torch.__version__}",
        "samples_per_s": episodes / total,
        "tokens_per_s": clock.tokens / total,
        "length_mean": clock.tokens / episodes,
        "seconds": {name: value / args.updates for name, value in clock.seconds.items()},
        "peak_rss_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        "peak_gpu_gb": torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else None,
    }
    print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
