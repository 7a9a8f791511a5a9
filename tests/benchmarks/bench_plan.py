"""What `rlhf plan` predicts against what runs take: peak resident memory of `rlhf ppo` on CPU processes.

    make bench-plan

Models with random weights, made here; each setting is a run of two steps in processes of its own, every answer as long
as the budget allows. With several processes it is the first one that is measured. `--tables` measures nothing: it
writes the tables of launch/README.md anew.
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


LARGE: dict[str, dict[str, Any]] = {
    "7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
    | {"num_key_value_heads": 32, "vocab_size": 32000},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
    | {"num_key_value_heads": 8, "vocab_size": 128256},
}
"""The shapes of Llama 2 7B and Llama 3 70B."""
NODES = (1, 8, 64)
PLANNED = (
    "configs/ppo/ultrafeedback.yaml model=FOLDER gradient_checkpointing=true micro_batch_size=2 --gpu=h100 --gpus=8"
)
TABLES_BEGIN, TABLES_END = "<!-- plan -->", "<!-- end of plan -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", action="store_true")
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    args = parser.parse_args()
    if args.tables:
        write_tables(ROOT / "launch" / "README.md", BUILD / "plan")
        return
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


# --- the tables of launch/README.md -------------------------------------------------------------------------------


def write_tables(readme: Path, folder: Path) -> None:
    """One table for each of `LARGE`, by `rlhf plan --json`, between the marks."""
    text = readme.read_text()
    before, after = text.split(TABLES_BEGIN)[0], text.split(TABLES_END)[1]
    tables = "\n\n".join(table(name, folder) for name in LARGE)
    readme.write_text(f"{before}{TABLES_BEGIN}\n{tables}\n{TABLES_END}{after}")


def table(name: str, folder: Path) -> str:
    """GB per GPU and seconds per step, bold where it fits."""
    shape = folder / name
    shape.mkdir(parents=True, exist_ok=True)
    (shape / "config.json").write_text(json.dumps({"model_type": "llama", "tie_word_embeddings": False, **LARGE[name]}))
    arguments = [word.replace("FOLDER", str(shape)) for word in PLANNED.split()]
    arguments[0] = str(ROOT / arguments[0])
    found = [json.loads(planned([*arguments, f"--nodes={nodes}", "--json"])) for nodes in NODES]
    size = found[0]["parameters"] / 1e9
    lines = [
        f"| {size:.3g}B | " + " | ".join(f"{8 * nodes} GPUs" for nodes in NODES) + " |",
        "|---|" + "---|" * len(NODES),
    ]
    for ways in zip(*(part["plans"] for part in found), strict=True):
        cells = [f"{p['peak'] / 1e9:,.0f} GB, {sum(p['seconds'].values()):,.0f} s" for p in ways]
        cells = [f"**{cell}**" if p["fits"] else cell for cell, p in zip(cells, ways, strict=True)]
        stage = f"ZeRO-{ways[0]['zero_stage']}" if ways[0]["zero_stage"] else "DDP"
        lines.append(f"| {ways[0]['sharing']}, {stage} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def planned(arguments: Sequence[str]) -> str:
    """What `rlhf plan` prints.

    Raises:
        RuntimeError: it is refused.
    """
    from typer.testing import CliRunner

    from rlhf.cli import app

    done = CliRunner().invoke(app, ["plan", *arguments])
    if done.exit_code:
        raise RuntimeError(done.output)
    return done.stdout


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
