"""The reward stage on labels whose noise is known: it comes down to their entropy and up to the Bayes ceiling.

A response is four words; its true strength is the sum of its words' worths, and labels are drawn from Bradley-Terry.
Nobody can predict such a label better than its own probability p: the log-loss is at least the mean entropy of p, and
the accuracy at most the mean of max(p, 1 - p).
"""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest

from reward_model import train
from reward_model.model import RewardModel
from rlhf.data.templates import prompt_tokens, response_tokens
from rlhf.runs import RunOptions

VOCABULARY = "sun star light moon sea sky blue red water rain cloud wind tree leaf bird fish"
WORDS = VOCABULARY.split()
WORTH = {word: 1.5 * math.cos(math.pi * i / (len(WORDS) - 1)) for i, word in enumerate(WORDS)}
LENGTH, HELDOUT = 4, 2000


def strength(response: str) -> float:
    return sum(WORTH[word] for word in response.split())


def probability(row: dict[str, Any]) -> float:
    """That `chosen` is chosen."""
    return 1 / (1 + math.exp(strength(row["rejected"]) - strength(row["chosen"])))


def noisy_pairs(count: int, seed: int) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    rows = []
    for i in range(count):
        a, b = (" ".join(rng.choices(WORDS, k=LENGTH)) for _ in range(2))
        row = {"prompt": f"explain {WORDS[i % 16]}", "chosen": a, "rejected": b}
        rows.append(row if rng.random() < probability(row) else {**row, "chosen": b, "rejected": a})
    return rows


def figures(rows: list[dict[str, Any]], reward_model: str, tokenizer: Any, runtime: Any) -> dict[str, float]:
    """Log-losses in nats and accuracies over `rows`, of the model and of one that knew p."""
    model = RewardModel.load(reward_model, runtime, tokenizer=tokenizer, micro_batch_size=256)
    std = json.loads((Path(reward_model) / "reward_normalisation.json").read_text())["std"]
    tokens = [
        prompt_tokens(tokenizer, row["prompt"], chat=True) + response_tokens(tokenizer, row[side], finished=True)
        for row in rows
        for side in ("chosen", "rejected")
    ]
    scores = iter(model.score_tokens(tokens))
    sums = dict.fromkeys(("floor", "expected_loss", "loss", "ceiling", "accuracy"), 0.0)
    for row, chosen, rejected in zip(rows, scores, scores, strict=True):
        p, q = probability(row), 1 / (1 + math.exp(std * (rejected - chosen)))
        sums["floor"] += entropy(p, p)
        sums["expected_loss"] += entropy(p, q)
        sums["loss"] -= math.log(q)
        sums["ceiling"] += max(p, 1 - p)
        sums["accuracy"] += q > 0.5
    return {name: total / len(rows) for name, total in sums.items()}


def entropy(p: float, q: float) -> float:
    """Cross-entropy of two coins; the entropy, where both are one."""
    return -p * math.log(q) - (1 - p) * math.log(1 - q)


def study(stage_config: Any, jsonl: Any, tiny: Any, runtime: Any, *, pairs: int, **changes: Any) -> dict[str, float]:
    heldout = noisy_pairs(HELDOUT, seed=2)
    data = {
        "dataset": {"path": jsonl("train.jsonl", noisy_pairs(pairs, seed=1))},
        "eval_dataset": {"path": jsonl("heldout.jsonl", heldout)},
        "batch_size": 32,
        "micro_batch_size": 32,
        "save_every": 0,
        **changes,
    }
    result = train.main(stage_config("reward", **data), RunOptions())
    found = figures(heldout, result.outputs["reward_model"], tiny.tokenizer, runtime)
    return {**found, "low": result.summary["accuracy_low"], "high": result.summary["accuracy_high"]}


def check(found: dict[str, float], *, excess: float) -> None:
    """Within `excess` nats of the floor; the accuracy at the ceiling, within the stage's own interval."""
    assert found["floor"] < 0.36  # that of a coin is 0.69: there is something to learn
    assert found["floor"] <= found["expected_loss"] <= found["floor"] + excess
    # The labels that were drawn scatter around their expectation: sd below 0.5 per pair.
    assert found["loss"] == pytest.approx(found["expected_loss"], abs=3 * 0.5 / math.sqrt(HELDOUT))
    assert found["low"] <= found["ceiling"] <= found["high"]


def test_log_loss_comes_to_the_entropy_floor_and_accuracy_to_the_ceiling(
    stage_config: Any, jsonl: Any, tiny: Any, runtime: Any, record_property: Any
) -> None:
    found = study(stage_config, jsonl, tiny, runtime, pairs=2000, epochs=2, optim={"lr": 3e-3})
    record_property("floor", found)
    check(found, excess=0.02)


@pytest.mark.slow
def test_with_more_pairs_the_excess_goes_to_zero(
    stage_config: Any, jsonl: Any, tiny: Any, runtime: Any, record_property: Any
) -> None:
    found = study(stage_config, jsonl, tiny, runtime, pairs=32_000, epochs=2, optim={"lr": 3e-3})
    record_property("floor", found)
    check(found, excess=0.003)
