"""The reward model of configs/reward/hh_local.yaml on human labels: accuracy, calibration, length, time.

    python tests/benchmarks/hh_reward.py                                   about a quarter of an hour on two cores
    python tests/benchmarks/hh_reward.py --name full tuning.layers=null optim.lr=1e-5    all layers

The data is not part of this repository (the configuration says where to get it); without it the script says so and
ends. Each `--name` keeps its run folder and is not trained twice. The temperature is fitted on one half of the test
pairs and applied to the other, both ways round, so that the error after it is not an error of fit.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from harness import RESULTS, ROOT, Report, save

from reward_model import train
from reward_model.calibrate import JudgedPair, accuracy, best_temperature, calibration, judged_pairs, reliability
from reward_model.data import tokenize_rankings
from reward_model.measure import attach
from reward_model.model import RewardModel
from rlhf import config
from rlhf.config_schema import RewardStage
from rlhf.data.records import read_rankings
from rlhf.models.load import load_tokenizer
from rlhf.runs import RunOptions
from rlhf.runtime import Runtime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="further keys, a.b=c")
    parser.add_argument("--name", default="config", help="of the setting, in the result file")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "hh_reward")
    args = parser.parse_args()
    folder = args.out / args.name
    keys = [f"run_dir={folder}", "tracking.wandb=off", *args.overrides]
    cfg = config.load(str(ROOT / "configs" / "reward" / "hh_local.yaml"), "reward", keys)
    if not Path(cfg.dataset.path).is_file():
        sys.exit(f"{cfg.dataset.path} is not there: nothing to measure")
    if not (folder / "final").is_dir():
        train.main(cfg, RunOptions())
    figures = measured(cfg, str(folder / "final"))
    file = RESULTS / "hh_reward.json"
    setting = [key for key in args.overrides if "dataset.path" not in key]  # no paths of the machine
    runs = json.loads(file.read_text())["setting"]["runs"] if file.is_file() else {}
    save("hh_reward", {"runs": {**runs, args.name: {"overrides": setting, **figures}}}, [])
    print(json.dumps(figures, indent=1))


def measured(cfg: RewardStage, model: str) -> Report:
    """Figures of a trained model on the test pairs."""
    assert cfg.eval_dataset is not None
    runtime = Runtime.start(seed=0, precision=cfg.precision)
    tokenizer = load_tokenizer(model)
    rankings = read_rankings(cfg.eval_dataset)
    items = tokenize_rankings(
        rankings, tokenizer, chat=True, max_length=cfg.max_length, truncation=cfg.truncation
    ).items
    scorer = RewardModel.load(model, runtime, tokenizer=tokenizer, micro_batch_size=8)
    std = json.loads((Path(model) / "reward_normalisation.json").read_text())["std"]
    scores_MN = scorer.score_members([row for item in items for row in item.rows])
    scored = attach(scores_MN, scorer.aggregate(scores_MN), items)
    pairs = judged_pairs(scored, std)
    found = calibration(pairs)
    stacked = torch.tensor([[n for item in items for n in item.response_lengths], scores_MN[0].tolist()])
    return {
        "accuracy": accuracy(pairs),
        **{key: found[key] for key in ("ece", "log_loss", "temperature")},
        **{f"{key}_at_temperature": value for key, value in at_cross_fitted_temperature(pairs).items()},
        "length_correlation": float(torch.corrcoef(stacked)[0, 1]),
    }


def at_cross_fitted_temperature(pairs: Sequence[JudgedPair]) -> Report:
    """Calibration error and log-loss, each half of the pairs at the temperature that suits the other half."""
    logit_N = torch.tensor([pair.logit for pair in pairs], dtype=torch.float64)
    target_N = torch.tensor([pair.target for pair in pairs], dtype=torch.float64)
    even_N = torch.arange(len(pairs)) % 2 == 0
    fitted = [best_temperature(logit_N[half_N], target_N[half_N]) or 1.0 for half_N in (~even_N, even_N)]
    logit_N = torch.where(even_N, logit_N / fitted[0], logit_N / fitted[1])
    bins = reliability(logit_N, target_N)
    loss_N = torch.nn.functional.binary_cross_entropy_with_logits(logit_N, target_N)
    ece = sum(b["pairs"] * abs(b["confidence"] - b["accuracy"]) for b in bins) / len(pairs)
    return {"ece": ece, "log_loss": float(loss_N)}


if __name__ == "__main__":
    main()
