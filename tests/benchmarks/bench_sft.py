"""`rlhf sft` against plain `trl.SFTTrainer` with its default settings, on the same rows. For the record.

    make bench-sft

Ours is TRL's trainer with settings of its own: bf16 products, the loss on the completion alone, no recomputation of
activations. Plain TRL is what its documentation shows: a model name, a data set, the defaults.
"""

from __future__ import annotations

import argparse

from harness import HERE, alternate, median, python, row, save

SETTING = {"rows": 64, "micro_batch": 8}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=2)
    rounds = parser.parse_args().rounds
    sides = {name: lambda name=name: python(HERE / "sft_sides.py", name) for name in ("ours", "trl")}
    reports = alternate(sides, rounds)
    speeds = [median(reports[name], "samples_per_s") for name in ("ours", "trl")]
    setting = {**SETTING, "model": "SmolLM2-135M", "peer": reports["trl"][0]["version"], "rounds": rounds}
    save("sft", {**setting, "reports": reports}, [row("SFT, TRL's defaults as the peer", "samples/s", *speeds)])


if __name__ == "__main__":
    main()
