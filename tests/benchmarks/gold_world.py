"""A small world in which the truth is known: a language, a policy that speaks it, and a gold scorer to be approximated.

Sentences of 24 words come from a random Markov chain; the policy is a small transformer trained on them from nothing.
Gold is a larger transformer with random weights that stay as they are, read at the last token, with mean 0 and
deviation 1 over the policy's own answers. Reward models (proxies) are smaller than gold and start from nothing, each
from weights of its own; they and the policy are trained by the stages themselves, `rlhf reward` and `rlhf ppo`.

After Gao et al. 2022 (arXiv:2210.10760), where people are replaced by a larger reward model.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from scipy.stats import t as student
from torch import Tensor

from reward_model import train
from reward_model.model import RewardModel
from rlhf import config
from rlhf.data.records import PromptRecord
from rlhf.data.templates import TokenizedPrompt
from rlhf.models.value import ScalarModel
from rlhf.rollout.collect import collect
from rlhf.rollout.engines import NativeEngine
from rlhf.rollout.generate import GenerationSettings
from rlhf.runs import RunOptions
from rlhf.runtime import Runtime
from rlhf.stages import ppo
from rlhf.types import Rollout, RunResult

WORDS = [f"w{i}" for i in range(24)]
EOS = 0
BUDGET, PROMPT_WORDS, PROMPTS = 16, 3, 4
POLICY = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2}
PROXY = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2}
GOLD = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
GOLD_RANGE = 0.05
"""Spread of gold's weights: the larger, the less of it is a sum over single words."""
NOISE = {"noise": 0.3, "careless": 0.3}
"""Labels: Bradley-Terry on gold / noise, and 30% of them by a coin."""


@dataclass
class World:
    """The policy before any PPO and gold; folders `policy` and `proxy-<i>` (untrained) for the stages."""

    folder: Path
    tokenizer: Any
    runtime: Runtime
    policy: Any
    gold: ScalarModel
    prompts: list[TokenizedPrompt]

    def sample(self, per_prompt: int, seed: int) -> list[Rollout]:
        """Answers of the reference policy with their gold scores, prompt by prompt."""
        settings = GenerationSettings(eos_ids=(EOS,), max_new_tokens=BUDGET, batch_size=512)
        rollouts = collect(
            NativeEngine(self.policy),
            self.prompts,
            settings,
            decode=lambda tokens: self.tokenizer.decode(tokens, skip_special_tokens=True),
            seeds=[seed * 10_000_019 + i for i in range(per_prompt * PROMPTS)],
            copies=per_prompt,
        )
        self.add_gold(rollouts)
        return rollouts

    def add_gold(self, rollouts: Sequence[Rollout]) -> None:
        """Write what gold says on each of them."""
        scores = RewardModel(self.gold, self.runtime, micro_batch_size=512).score_tokens(rows_of(rollouts))
        for rollout, gold in zip(rollouts, scores, strict=True):
            rollout.gold_score = gold

    def load_proxy(self, folder: str) -> RewardModel:
        """A trained one."""
        return RewardModel.load(folder, self.runtime, tokenizer=self.tokenizer, micro_batch_size=512)


def rows_of(rollouts: Sequence[Rollout]) -> list[list[int]]:
    """Tokens as reward models are trained on them: an answer that ran into the budget is closed with EOS."""
    return [r.tokens if r.tokens[-1] == EOS else [*r.tokens, EOS] for r in rollouts]


def config_of(stage: str, folder: Path, **changes: Any) -> Any:
    """A configuration of `stage` in fp32 without tracking."""
    shared = {"precision": "fp32", "tracking": {"wandb": "off"}, "model": str(folder / "policy")}
    return config.validate({**shared, **changes}, stage, source="experiment")


def build(folder: Path, seed: int, *, proxies: int) -> World:
    """The world of `seed`: language, policy, gold, and untrained reward models."""
    folder.mkdir(parents=True, exist_ok=True)
    runtime = Runtime.start(seed=seed, precision="fp32")
    tokenizer = build_tokenizer()
    language = Language(seed)
    policy = speak(language, seed)
    for name, model in {
        "policy": policy,
        **{f"proxy-{i}": llama(PROXY, 1000 * seed + i) for i in range(proxies)},
    }.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    rng = random.Random(f"prompts/{seed}")
    texts = [language.sentence(rng)[:PROMPT_WORDS] for _ in range(PROMPTS)]
    records = [PromptRecord(" ".join(WORDS[i - 1] for i in tokens), str(n)) for n, tokens in enumerate(texts)]
    prompts = [TokenizedPrompt(*pair) for pair in zip(records, texts, strict=True)]
    lines = [json.dumps({"prompt": p.record.prompt}) for p in prompts]
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    gold = ScalarModel(llama(GOLD, 77 + seed, initializer_range=GOLD_RANGE, classifier=True)).eval()
    world = World(folder, tokenizer, runtime, policy, gold, prompts)
    scores = torch.tensor([r.gold_score for r in world.sample(512, seed=1)])
    gold.set_normalisation(float(scores.mean()), float(scores.std()))
    return world


class Language:
    """Sentences: a Markov chain over the words, from 6 to 18 of them."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        logits_VV = 1.5 * torch.randn(len(WORDS), len(WORDS), generator=generator)
        self._next_VV = torch.softmax(logits_VV, 1).tolist()

    def sentence(self, rng: random.Random) -> list[int]:
        """Token ids, without EOS."""
        words = [rng.randrange(len(WORDS))]
        for _ in range(rng.randint(6, 18) - 1):
            words += rng.choices(range(len(WORDS)), self._next_VV[words[-1]])
        return [word + 1 for word in words]


def build_tokenizer() -> Any:
    """One token per word; id 0 ends an answer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<eos>", *WORDS, "<pad>"])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>", pad_token="<pad>")


def llama(shape: dict[str, int], seed: int, *, initializer_range: float = 0.02, classifier: bool = False) -> Any:
    """A Llama with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    torch.manual_seed(seed)
    kind = LlamaForSequenceClassification if classifier else LlamaForCausalLM
    cfg = LlamaConfig(
        vocab_size=len(WORDS) + 2,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=initializer_range,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=len(WORDS) + 1,
        num_labels=1,
        **shape,
    )
    return kind(cfg).eval()


def speak(language: Language, seed: int, *, steps: int = 200, size: int = 64) -> Any:
    """A policy trained on sentences of the language."""
    lm, rng = llama(POLICY, seed), random.Random(f"speak/{seed}")
    optimizer = torch.optim.AdamW(lm.parameters(), lr=3e-3)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (1 - step / steps)
        tokens_BT, labels_BT = padded([[*language.sentence(rng), EOS] for _ in range(size)])
        loss = lm(input_ids=tokens_BT, labels=labels_BT).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return lm.eval()


def padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """(tokens_BT, labels_BT): padding is not learned."""
    longest = max(map(len, rows))
    tokens = torch.tensor([[*row, *[EOS] * (longest - len(row))] for row in rows])
    labels = torch.tensor([[*row, *[-100] * (longest - len(row))] for row in rows])
    return tokens, labels


def choice(rng: random.Random, gold_a: float, gold_b: float, noise: float, careless: float) -> bool:
    """Whether an annotator prefers a: Bradley-Terry with `noise` in units of gold, or a coin."""
    p = 0.5 * (1 + math.tanh(0.5 * (gold_a - gold_b) / noise))
    return rng.random() < (1 - careless) * p + careless / 2


def write_heldout(world: World, rollouts: Sequence[Rollout]) -> None:
    """Pairs in gold's order, for the reward stage to test on."""
    pairs = [sorted(pair, key=gold_of) for pair in zip(rollouts[::2], rollouts[1::2], strict=True)]
    rows = [pair_row(better, worse) for worse, better in pairs if differ(better, worse)]
    (world.folder / "heldout.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def gold_of(rollout: Rollout) -> float:
    """Its gold score, which `World.add_gold` wrote."""
    assert rollout.gold_score is not None
    return rollout.gold_score


def differ(a: Rollout, b: Rollout) -> bool:
    """Two answers that can stand in a file of preferences."""
    return bool(a.response and b.response) and a.response != b.response


def pair_row(better: Rollout, worse: Rollout) -> dict[str, str]:
    """A line of a preference file."""
    return {"prompt": better.prompt, "chosen": better.response, "rejected": worse.response}


def noisy_label(rng: random.Random, a: Rollout, b: Rollout) -> dict[str, str]:
    """A line of a preference file as an annotator with `NOISE` would have it."""
    wins = choice(rng, gold_of(a), gold_of(b), **NOISE)
    return pair_row(*((a, b) if wins else (b, a)))


def train_proxy(world: World, rows: Sequence[dict[str, Any]], *, start: str, name: str, **changes: Any) -> RunResult:
    """`rlhf reward` on preference rows."""
    data = world.folder / f"{name}.jsonl"
    data.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    cfg = config_of(
        "reward",
        world.folder,
        **{
            "run_dir": str(world.folder / name),
            "model": str(world.folder / start),
            "dataset": {"path": str(data)},
            "eval_dataset": {"path": str(world.folder / "heldout.jsonl")},
            "batch_size": 32,
            "micro_batch_size": 32,
            "max_length": 64,
            "save_every": 0,
            **changes,
        },
    )
    with contextlib.redirect_stdout(io.StringIO()):
        return train.main(cfg, RunOptions(resume="never"))


def train_policy(
    world: World, reward: Callable[[Sequence[Rollout]], Sequence[float | None]], *, name: str, lr: float, **changes: Any
) -> list[dict[str, Any]]:
    """`rlhf ppo` without a KL penalty, where `reward` stands for the reward model; the metrics of every step."""

    def judged(rollouts: Sequence[Rollout]) -> Sequence[float | None]:
        world.add_gold(rollouts)
        return reward(rollouts)

    cfg = config_of(
        "ppo",
        world.folder,
        **{
            "run_dir": str(world.folder / name),
            "prompts": {"path": str(world.folder / "prompts.jsonl")},
            "scorer": "readability",  # the stage asks for a reward; `judged` takes its place
            "critic_init": "policy",
            "sampling": {"max_new_tokens": BUDGET, "batch_size": 128},
            "batch_size": 128,
            "micro_batch_size": 128,
            "minibatches": 2,
            "optim": {"lr": lr, "schedule": "constant"},
            "kl": {"kind": "fixed", "coef": 0.0},
            "missing_eos": {"kind": "none"},
            "save_every": 0,
            "samples_per_step": 1,
            **changes,
        },
    )
    with patch.object(ppo, "build_reward", lambda *_: judged), contextlib.redirect_stdout(io.StringIO()):
        ppo.main(cfg, RunOptions(resume="never"))
    return [json.loads(line) for line in (world.folder / name / "metrics.jsonl").read_text().splitlines()]


def over_seeds(values: Sequence[float]) -> tuple[float, float, float]:
    """(mean, low, high): Student's 95% interval over a few worlds."""
    mean, n = statistics.fmean(values), len(values)
    half = float(student.ppf(0.975, n - 1)) * statistics.stdev(values) / math.sqrt(n)
    return round(mean, 4), round(mean - half, 4), round(mean + half, 4)
