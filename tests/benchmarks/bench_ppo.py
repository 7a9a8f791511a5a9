"""PPO against TRL 1.12: same model, prompts, budget, epochs and dtype of the matrix products; full fine-tuning.

    make bench-ppo

Both sides train policy and critic (135M each, bf16 products) with a frozen reference and reward model, 32 rollouts a
step, one optimizer step per epoch, and stop at EOS. Ours keeps float32 master weights, TRL trains bf16 weights.
"""

from __future__ import annotations

import argparse
import json
import shutil

from harness import BUILD, HERE, Report, alternate, median, peer, python, row, save

SETTING = {"batch": 32, "micro": 8, "budget": 48, "epochs": 2, "updates": 3}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=2)
    rounds = parser.parse_args().rounds
    model, prompts = prepare()
    flags = [part for name, value in SETTING.items() for part in (f"--{name}", value)]
    trl = peer("trl==1.12.0")

    def ours() -> Report:
        return python(HERE / "ours_ppo.py", "--model", model, *flags)

    def theirs() -> Report:
        return python(HERE / "peers" / "trl_ppo.py", "--model", model, "--prompts", prompts, *flags, path=trl)

    reports = alternate({"ours": ours, "peer": theirs}, rounds)
    a, b = reports["ours"], reports["peer"]
    save(
        "ppo",
        {**SETTING, "model": "SmolLM2-135M", "peer": b[0]["version"], "rounds": rounds, "reports": reports},
        [
            row("PPO, four models, full", "samples/s", median(a, "samples_per_s"), median(b, "samples_per_s")),
            row("PPO, peak memory", "GB", median(a, "peak_rss_gb"), median(b, "peak_rss_gb"), lower_is_better=True),
        ],
    )


def prepare() -> tuple[str, str]:
    """(model folder, file of prompts as token ids)."""
    from rlhf.config import resolve_path
    from rlhf.config_schema import DatasetConfig
    from rlhf.data.records import read_prompts
    from rlhf.data.templates import prompt_tokens
    from rlhf.models.load import load_tokenizer, resolve_model

    model = resolve_model("smollm2-135m")
    tokenizer = load_tokenizer(model)
    source = DatasetConfig(path="shipped:data/plain_language/prompts.train.jsonl")
    rows = [prompt_tokens(tokenizer, record.prompt, chat=True) for record in read_prompts(source)]
    BUILD.mkdir(parents=True, exist_ok=True)
    file = BUILD / "prompts.jsonl"
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    shutil.copy(resolve_path(source.path), BUILD / "prompts.text.jsonl")
    return model, str(file)


if __name__ == "__main__":
    main()
