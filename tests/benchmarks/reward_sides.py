"""One side of bench_reward: `rankings`, `pairs` (ours) or `trl`; prints one JSON line with its speed."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from itertools import combinations
from typing import Any

import torch
from harness import BUILD
from sides import prepare

PROMPTS, K, MODEL_SEED = 16, 4, 0


def rankings(model: str) -> list[dict[str, Any]]:
    """Rankings of 4 answers of 20 to 50 tokens each, the same for all sides."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    draw = torch.Generator().manual_seed(0)
    rows = []
    for line in (BUILD / "prompts.text.jsonl").read_text().splitlines()[:PROMPTS]:
        lengths = torch.randint(20, 51, (K,), generator=draw).tolist()
        answers = [tokenizer.decode(torch.randint(1000, 40000, (n,), generator=draw)) for n in lengths]
        prompt = json.loads(line)["prompt"]
        prompt = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
        rows.append({"prompt": prompt, "responses": answers, "ranks": [1, 2, 3, 4]})
    return rows


def as_pairs(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All 6 pairs of every ranking, in TRL's conversational preference format."""

    def turn(text: str) -> list[dict[str, str]]:
        return [{"role": "assistant", "content": text}]

    return [
        {"prompt": r["prompt"], "chosen": turn(r["responses"][i]), "rejected": turn(r["responses"][j])}
        for r in rows
        for i, j in combinations(range(K), 2)
    ]


def ours(model: str, rows: list[dict[str, Any]], *, pairs: bool) -> float:
    """Seconds per epoch of our training steps, after one step to warm up."""
    from reward_model import train
    from reward_model.data import pairs_of, tokenize_rankings
    from rlhf import config
    from rlhf.data.records import read_rankings
    from rlhf.models.load import load_tokenizer
    from rlhf.models.tuning import build_optimizer, parameter_groups
    from rlhf.models.value import load_scalar_model
    from rlhf.runtime import Runtime

    file = BUILD / "rankings.jsonl"
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    size = {"batch_size": 24, "micro_batch_size": 12} if pairs else {"batch_size": 4, "micro_batch_size": 4}
    plain = {
        "run_dir": str(BUILD / "reward"),
        "model": model,
        "dataset": {"path": str(file)},
        "max_length": 160,
        **size,
    }
    plain["loss"] = "bradley_terry" if pairs else "all_pairs"
    (BUILD / "reward.yaml").write_text(json.dumps(plain))
    cfg = config.load(str(BUILD / "reward.yaml"), "reward", [])
    runtime = Runtime.start(seed=0, precision="bf16")
    items = tokenize_rankings(
        read_rankings(cfg.dataset), load_tokenizer(model), chat=True, max_length=160, truncation="keep_end"
    ).items
    items = [pair for item in items for pair in pairs_of(item)] if pairs else items
    scalar = load_scalar_model(model, dtype=torch.float32, new_head=True).eval()
    optimizer = build_optimizer(parameter_groups(scalar, lr=1e-6, weight_decay=0.0), cfg.optim)
    module, optimizer = runtime.prepare(scalar, optimizer, micro_batch_size=cfg.micro_batch_size)
    steps = [items[i : i + cfg.batch_size] for i in range(0, len(items), cfg.batch_size)]
    train.train_step(module, optimizer, steps[0], cfg, runtime, share_prompts=True)
    began = time.perf_counter()
    for part in steps:
        train.train_step(module, optimizer, part, cfg, runtime, share_prompts=True)
    return time.perf_counter() - began


def trl(model: str, rows: list[dict[str, Any]]) -> float:
    """Seconds per epoch of TRL's RewardTrainer, after its first step."""
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
    from trl import RewardConfig, RewardTrainer

    marks: list[float] = []

    class Mark(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            marks.append(time.perf_counter())

    args = RewardConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=12,
        gradient_accumulation_steps=2,
        max_steps=5,
        learning_rate=1e-6,
        max_length=160,
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        report_to=[],
        save_strategy="no",
        gradient_checkpointing=False,
        disable_tqdm=True,
    )
    classifier = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model)
    classifier.config.pad_token_id = tokenizer.pad_token_id
    data = Dataset.from_list(as_pairs(rows))
    trainer = RewardTrainer(
        model=classifier, args=args, processing_class=tokenizer, train_dataset=data, callbacks=[Mark()]
    )
    trainer.train()
    return marks[-1] - marks[0]


def main() -> None:
    name = sys.argv[1]
    model, _ = prepare()
    rows = rankings(model)
    comparisons = PROMPTS * K * (K - 1) // 2
    out, sys.stdout = sys.stdout, sys.stderr
    seconds = trl(model, rows) if name == "trl" else ours(model, rows, pairs=name == "pairs")
    sys.stdout = out
    shutil.rmtree(BUILD / "reward", ignore_errors=True)
    from importlib.metadata import version

    report = {"comparisons_per_s": comparisons / seconds, "seconds": seconds, "version": f"trl {version('trl')}"}
    print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
