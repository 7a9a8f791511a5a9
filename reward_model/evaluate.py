"""`rlhf reward eval MODEL FILE...`: any reward model on files of comparisons, by its own tokenizer and template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

from reward_model.calibrate import Units
from reward_model.data import RankedTokens, tokenize_rankings
from reward_model.measure import PAGE, Measured, judge, score
from reward_model.model import RewardModel
from rlhf.config_reward import RewardEval
from rlhf.config_schema import DatasetConfig
from rlhf.data.records import read_rankings
from rlhf.eval.panels import DASH, show_fixed, show_number, show_percent
from rlhf.models.load import load_tokenizer
from rlhf.progress import Progress
from rlhf.runtime import Runtime


def main(cfg: RewardEval) -> Measured:
    """Print a table with a row per file; leaves `reward_report.json` and `reward_report.html` on all files together.

    Raises:
        DataError: a file has no comparisons, or only ties.
        ModelError: not a trained one-label classifier.
        ConfigError: an aggregate for a model that is no ensemble.
    """
    runtime = Runtime.start(seed=0, precision=cfg.precision)
    tokenizer = load_tokenizer(cfg.model)
    with Progress(stage="reward eval", enabled=runtime.is_main) as progress:
        parts = {file: read(file, cfg, tokenizer, progress) for file in cfg.files}
        scorer = RewardModel.load(cfg.model, runtime, tokenizer=tokenizer, micro_batch_size=cfg.micro_batch_size)
        scorer.aggregate_by(cfg.aggregate, cfg.std_coef)
        units = Units(std=scorer.std)
        scored = {file: score(scorer, items, progress) for file, items in parts.items()}
        found = {file: judge(of_file, units, scorer.aggregate) for file, of_file in scored.items()}
        whole = judge([one for of_file in scored.values() for one in of_file], units, scorer.aggregate)
        if len(found) > 1:
            whole.report["files"] = {file: measured.summary for file, measured in found.items()}
            found["all"] = whole
        progress.console.print(table(found))
        progress.say(f"writing {Path(cfg.run_dir) / PAGE}")
    if runtime.is_main:
        whole.write(Path(cfg.run_dir), title=f"{cfg.model} on {', '.join(cfg.files)}")
    return whole


def read(file: str, cfg: RewardEval, tokenizer: Any, progress: Progress) -> list[RankedTokens]:
    """The comparisons of one file as token rows; what was cut or tokenised anew is said."""
    source = DatasetConfig(
        path=file, format=cfg.format, limit=cfg.limit, chat=cfg.chat, max_bad_fraction=cfg.max_bad_fraction
    )
    rankings = read_rankings(source)
    progress.say(f"{file}: format {rankings.format}, {len(rankings)} rows")
    tokenized = tokenize_rankings(
        rankings, tokenizer, chat=cfg.chat, max_length=cfg.max_length, truncation=cfg.truncation
    )
    for line in tokenized.remarks(cfg.max_length):
        progress.say(f"{file}: {line}")
    return tokenized.items


def table(found: dict[str, Measured]) -> Table:
    """One row per file: pairs, accuracy with its 95% interval, calibration, length."""
    shown = Table(box=None, pad_edge=False)
    for name in ("file", "pairs", "accuracy", "ECE", "temp.", "length r", "longer wins"):
        shown.add_column(name, justify="left" if name == "file" else "right", no_wrap=True)
    for name, measured in found.items():
        summary, labels = measured.summary, measured.report["accuracy"]
        shown.add_row(
            Path(name).name,
            f"{labels['pairs']:,}",
            f"{show_percent(labels['value'])} [{100 * labels['low']:.0f}{DASH}{show_percent(labels['high'])}]",
            show_percent(summary["ece"]),
            show_number(summary.get("temperature")),
            show_fixed(summary.get("length_correlation_within"), 2),
            f"{show_percent(summary.get('longer_wins_model'))} ({show_percent(summary.get('longer_wins_labels'))})",
        )
    shown.caption = "length r: of score and length, within prompts; longer wins: by the model (by the labels)"
    shown.caption_justify = "left"
    return shown
