"""Sampling 64 answers at once: our `generate` against transformers' `generate`; same model, prompts and budget.

    make bench-generate

Counted are sampled tokens up to and including EOS. Rows that have ended cost the peer as much as those that have not.
"""

from __future__ import annotations

import argparse
import json
import time

import torch
from harness import Report, alternate, median, row, save
from sides import prepare
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf.rollout.generate import GenerationSettings, generate
from rlhf.runtime import keep_freed_memory

SETTING = {"batch": 64, "budget": 64, "temperature": 1.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    model, file = prepare()
    keep_freed_memory()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval().to(device)
    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    with open(file) as lines:
        prompts = [json.loads(line) for line in lines][: SETTING["batch"]]
    seeds = iter(range(1000))
    eos = tokenizer.eos_token_id

    def ours() -> Report:
        first = 1000 * next(seeds)
        settings = GenerationSettings((eos,), SETTING["budget"], SETTING["temperature"], batch_size=SETTING["batch"])
        began = time.perf_counter()
        rows = generate(lm, prompts, settings, seeds=range(first, first + len(prompts)))
        return report(sum(len(r.tokens) for r in rows), time.perf_counter() - began)

    def theirs() -> Report:
        torch.manual_seed(next(seeds))
        batch = tokenizer.pad({"input_ids": prompts}, return_tensors="pt").to(device)
        began = time.perf_counter()
        with torch.no_grad():
            out = lm.generate(
                **batch,
                do_sample=True,
                temperature=SETTING["temperature"],
                top_k=0,
                top_p=1.0,
                max_new_tokens=SETTING["budget"],
                pad_token_id=eos,
                eos_token_id=eos,
            )
        answers = out[:, batch["input_ids"].shape[1] :]
        ended = (answers == eos).cumsum(1)
        return report(int((ended - (answers == eos).long() == 0).sum()), time.perf_counter() - began)

    ours(), theirs()  # both sides warm
    reports = alternate({"ours": ours, "peer": theirs}, rounds)
    a, b = reports["ours"], reports["peer"]
    rows = [row("sampling, batch 64", "tokens/s", median(a, "tokens_per_s"), median(b, "tokens_per_s"))]
    save("generate", {**SETTING, "model": "SmolLM2-135M", "rounds": rounds, "reports": reports}, rows)


def report(tokens: int, seconds: float) -> Report:
    """Tokens, seconds and their ratio."""
    return {"tokens": tokens, "seconds": seconds, "tokens_per_s": tokens / seconds}


if __name__ == "__main__":
    main()
