"""Reward model training: ours on rankings of 4 and on plain pairs against TRL's `RewardTrainer` on the same pairs.

    make bench-reward

A ranking of 4 is 6 comparisons from one packed row; TRL reads each of its 6 pairs by itself, so that every response
is read three times and every prompt twelve times. Both fine-tune the whole model with bf16 products.
"""

from __future__ import annotations

import argparse

from harness import BUILD, HERE, Report, alternate, median, python, row, save

SETTING = {"prompts": 16, "responses": 4, "rankings_per_step": 4, "pairs_per_step": 24}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=2)
    rounds = parser.parse_args().rounds
    BUILD.mkdir(parents=True, exist_ok=True)

    def side(name: str) -> Report:
        return python(HERE / "reward_sides.py", name)

    names = ("rankings", "pairs", "trl")
    reports = alternate({name: lambda name=name: side(name) for name in names}, rounds)
    speed = {name: median(reports[name], "comparisons_per_s") for name in names}
    rows = [
        row("reward model, rankings of 4", "comparisons/s", speed["rankings"], speed["trl"]),
        row("reward model, plain pairs", "comparisons/s", speed["pairs"], speed["trl"]),
    ]
    peer = reports["trl"][0]["version"]
    save("reward", {**SETTING, "model": "SmolLM2-135M", "peer": peer, "rounds": rounds, "reports": reports}, rows)


if __name__ == "__main__":
    main()
