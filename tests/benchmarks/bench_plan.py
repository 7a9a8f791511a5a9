"""What `rlhf plan` predicts against what runs take: peak resident memory of `rlhf ppo` on CPU processes.

    make bench-plan

Models with random weights, made here; each setting is a run of two steps in processes of its own, every answer as long
as the budget allows. With several processes it is the first one that is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import BUILD, ROOT, Report, row, save

TOLERANCE = 0.15
WORDS = [f"word{i}" for i in range(40)]
SPECIAL = ["<unk>", "<|im_start|>", "<|im_end|>"]
LLAMAS: dict[str, dict[str, Any]] = {
    "46M": {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 12, "num_attention_heads": 8}
    | {"num_key_value_heads": 4, "vocab_size": 16384},
    "135M": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
    | {"num_key_value_heads": 3, "vocab_size": 49152},
}
OWN_LAYERS = {"46M": 4, "135M": 8}
"""Top layers of the reward model that are not the policy's, so that it can stand on a trunk."""
PROMPT = 32
"""Words, each a token."""


@dataclass(frozen=True)
class Setting:
    """A run: its model, what it overrides, and how it is launched ("" alone)."""

    model: str
    overrides: str = ""
    launcher: str = ""
    stage: int = 0
    ranks: int = 1


_HYDRA = "sharing=hydra tuning.layers={} critic_init=policy critic_layers=2"
_LORA = "sharing=lora tuning.kind=lora"
_DDP = "launch/cpu.yaml --num_processes 2"
SETTINGS = {
    "separate": Setting("46M"),
    "separate, fp32, 4 rows": Setting("46M", "precision=fp32 micro_batch_size=4"),
    "separate, 16 rows": Setting("46M", "micro_batch_size=16"),
    "separate, 16 rows, checkpointing": Setting("46M", "micro_batch_size=16 gradient_checkpointing=true"),
    "separate, 160 new tokens": Setting("46M", "sampling.max_new_tokens=160"),
    "separate, 4 layers": Setting("46M", "tuning.layers=4"),
    "lora": Setting("46M", _LORA),
    "lora, 160 new tokens, checkpointing": Setting(
        "46M", f"{_LORA} sampling.max_new_tokens=160 gradient_checkpointing=true"
    ),
    "lora, 16 rows, 160 new tokens": Setting("46M", f"{_LORA} sampling.max_new_tokens=160 micro_batch_size=16"),
    "hydra": Setting("46M", _HYDRA.format(4)),
    "hydra, the reward model's critic": Setting("46M", "sharing=hydra tuning.layers=4"),
    "separate, 135M": Setting("135M"),
    "hydra, 135M": Setting("135M", _HYDRA.format(8)),
    "DDP x 2, separate": Setting("46M", "", _DDP, ranks=2),
    "DDP x 2, hydra": Setting("46M", _HYDRA.format(4), _DDP, ranks=2),
    "ZeRO-2 x 2, separate, fp32": Setting("46M", "precision=fp32", "launch/cpu_zero2.yaml", stage=2, ranks=2),
    "ZeRO-2 x 2, hydra": Setting("46M", _HYDRA.format(4), "launch/cpu_zero2.yaml", stage=2, ranks=2),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    args = parser.parse_args()
    rows = [compared(name, SETTINGS[name], BUILD / "plan") for name in args.settings]
    save("plan_memory", {"tolerance": TOLERANCE, "settings": {n: vars(SETTINGS[n]) for n in args.settings}}, rows)


def compared(name: str, setting: Setting, folder: Path) -> Report:
    """One line of the table: the prediction as `ours`, the measured peak as `peer`, their ratio."""
    predicted, peak = predict(setting, folder), measure(setting, folder)
    found = row(f"peak memory, {name}", "GB", predicted, peak, group="plan")
    print(json.dumps(found), flush=True)
    return found


def measure(setting: Setting, folder: Path) -> float:
    """GB, of a run in processes of its own.

    Raises:
        RuntimeError: it failed; with the end of its output.
    """
    file, run_dir = configuration(setting, folder)
    shutil.rmtree(run_dir, ignore_errors=True)
    program = [sys.executable, "-m", "rlhf"]
    if setting.launcher:
        program = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", *shlex.split(setting.launcher)]
        program += ["-m", "rlhf"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
    env |= {"DS_ACCELERATOR": "cpu", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "HF_HUB_OFFLINE": "1"}
    command = [*program, "ppo", str(file), *setting.overrides.split()]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return json.loads((run_dir / "result.json").read_text())["peak_rss_gb"]


def predict(setting: Setting, folder: Path) -> float:
    """GB, by `rlhf plan`."""
    from rlhf.footprint import Models, Setup, of_ppo
    from rlhf.plan import load, models_of

    file, _ = configuration(setting, folder)
    _, cfg = load(str(file), setting.overrides.split())
    models, _ = models_of(cfg)
    assert isinstance(models, Models)
    setup = Setup(setting.stage, setting.ranks)
    return of_ppo(cfg, models, setup).resident(setup) / 1e9


# --- inputs -----------------------------------------------------------------------------------------------------


def configuration(setting: Setting, folder: Path) -> tuple[Path, Path]:
    """(file, run folder) of two steps of 16 answers, models and prompts beside it."""
    model, reward = models(setting.model, folder)
    prompts = folder / "prompts.jsonl"
    texts = [" ".join(WORDS[(i + j) % len(WORDS)] for j in range(PROMPT)) for i in range(64)]
    prompts.write_text("".join(f"{json.dumps({'prompt': text})}\n" for text in texts))
    run_dir = folder / "run"
    keys: dict[str, Any] = {
        "run_dir": str(run_dir),
        "model": model,
        "reward_model": reward,
        "prompts": {"path": str(prompts), "chat": False},
        "max_prompt_tokens": PROMPT,
        "sampling": {"max_new_tokens": 32, "batch_size": 16},
        "steps": 2,
        "batch_size": 16,
        "micro_batch_size": 8,
        "epochs": 1,
        "optim": {"lr": 1e-6},
        "save_every": 0,
        "tracking": {"wandb": "off"},
    }
    file = folder / "ppo.json"
    file.write_text(json.dumps(keys))
    return file, run_dir


def models(name: str, folder: Path) -> tuple[str, str]:
    """(policy, reward model) in bf16, as our stages write them, made once."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from reward_model.model import save_reward_model
    from rlhf.models.load import load_sequence_classifier

    lm, reward = folder / name / "lm", folder / name / "reward"
    if not reward.exists():
        torch.manual_seed(0)
        tokenizer = word_tokenizer(WORDS)
        config = LlamaConfig(**LLAMAS[name], eos_token_id=2, pad_token_id=2, tie_word_embeddings=True)
        language_model: Any = LlamaForCausalLM(config)
        language_model.to(torch.bfloat16).save_pretrained(lm)
        tokenizer.save_pretrained(lm)
        classifier = load_sequence_classifier(str(lm), dtype=torch.bfloat16, new_head=True)
        with torch.no_grad():
            for layer in classifier.model.layers[-OWN_LAYERS[name] :]:
                for parameter in layer.parameters():
                    parameter.mul_(1.02)
        save_reward_model(reward, classifier, tokenizer, {"mean": 0.0, "std": 1.0})
    return str(lm), str(reward)


def word_tokenizer(words: Sequence[str]) -> Any:
    """A token per word; a model with random weights hardly ever draws its EOS."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*SPECIAL, *words])}, unk_token=SPECIAL[0]))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"unk_token": SPECIAL[0], "bos_token": SPECIAL[1], "eos_token": SPECIAL[2], "pad_token": SPECIAL[2]}
    return PreTrainedTokenizerFast(tokenizer_object=raw, clean_up_tokenization_spaces=False, **names)


if __name__ == "__main__":
    main()
