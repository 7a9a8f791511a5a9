"""Reward against episodes for every way of sharing weights, some seeds each, in one picture (SVG).

    python tests/benchmarks/reward_curves.py runs/plain_language/ppo/config.yaml tuning.layers=8 --modes hydra
    python tests/benchmarks/reward_curves.py runs/plain_language/ppo/config.yaml --draw-only

The first argument is the configuration of a PPO run: here the demo's, after `make demo`. Further keys hold for all
modes of a call; a mode that wants a learning rate of its own gets a call of its own (README.md). Each mode and seed
gets a run folder `<out>/<mode>-<seed>`; one that is finished is not run again. What is there is drawn into
`results/reward_curves.svg`, with its numbers beside it. A faster architecture is worth its speed only if its curve ends
where that of the full one ends: this picture belongs beside the second table of README.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml
from harness import RESULTS, ROOT, Report, save
from sides import SIDES, existing

from rlhf.eval.charts import Series, line_chart, number, smoothed_last

REWARD, KL = "objective/scores", "objective/kl"
CRITIC = ("critic_init", "critic_layers", "critic_lr")
SETTING = ("tuning", "sharing", "optim", *CRITIC, "kl", "batch_size", "minibatches", "epochs")
"""Of a run's configuration, what stands beside its numbers; and the reward model, without where it lay."""
TONES = {name: tone for tone, name in enumerate(SIDES, start=1)}

# What the report's page gives its charts; a picture by itself brings its own.
STYLE = """
svg { font-family: system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
text { fill: #6f6b64; font-size: 11px; } .title { fill: #1d1c1a; font-size: 13px; font-weight: 600; }
.grid { stroke: #e4e1da; } .axis { stroke: #6f6b64; }
.line { fill: none; stroke: currentColor; stroke-width: 1.6; stroke-linejoin: round; stroke-linecap: round; }
.dots circle { fill: currentColor; fill-opacity: .22; }
.tone1 { color: #0b7a6b; } .tone2 { color: #b4530a; } .tone3 { color: #5b4bb7; }
text.tone1, text.tone2, text.tone3 { fill: currentColor; font-weight: 600; }
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="configuration of a PPO run")
    parser.add_argument("overrides", nargs="*", help="further keys for all runs, a.b=c")
    parser.add_argument("--modes", nargs="+", choices=list(SIDES), default=existing())
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "reward_curves")
    parser.add_argument("--draw-only", action="store_true", help="draw what is there, run nothing")
    args = parser.parse_args()
    if not args.draw_only:
        for mode in args.modes:
            for seed in args.seeds:
                run(args.config, mode, seed, args.out, args.overrides)
    curves = {mode: found for mode in SIDES if (found := read(mode, args.out))}
    if not curves:
        parser.error(f"no run in {args.out} has finished")
    picture = RESULTS / "reward_curves.svg"
    kl = {mode: read(mode, args.out, KL) for mode in curves}
    picture.write_text(draw(curves, kl))
    save("reward_curves", {"runs": recorded(args.out)}, [])
    print(picture)


def run(config: str, mode: str, seed: int, out: Path, overrides: Sequence[str]) -> None:
    """One PPO run, unless its result.json says that it is done; an interrupted one goes on."""
    folder = out / f"{mode}-{seed}"
    if (folder / "result.json").is_file():
        return
    keys = [f"run_dir={folder}", f"seed={seed}", "tracking.wandb=off", *SIDES[mode].overrides, *overrides]
    subprocess.run([sys.executable, "-m", "rlhf", "ppo", config, *keys], check=True, cwd=ROOT)


Curve = list[tuple[float, float]]


def read(mode: str, out: Path, metric: str = REWARD) -> list[Curve]:
    """(episodes, metric) of every step, one curve per seed that has finished."""
    return [[(line["episode"], line[metric]) for line in lines] for _, lines in finished(out, f"{mode}-*")]


def finished(out: Path, pattern: str) -> list[tuple[Path, list[Report]]]:
    """(folder, lines of metrics.jsonl) of the runs that have come to their end."""
    folders = sorted(file.parent for file in out.glob(f"{pattern}/result.json"))
    return [(f, [json.loads(line) for line in (f / "metrics.jsonl").read_text().splitlines()]) for f in folders]


def recorded(out: Path) -> Report:
    """Of every run: its commit, what of its configuration matters, reward and KL of every step."""
    runs = {}
    for folder, lines in finished(out, "*"):
        config = yaml.safe_load((folder / "config.yaml").read_text())
        runs[folder.name] = {
            "commit": json.loads((folder / "environment.json").read_text())["git"],
            "setting": {key: config[key] for key in SETTING},
            "reward_model": "/".join(Path(config["reward_model"]).parts[-2:]),
            **{name: [round(line[key], 4) for line in lines] for name, key in (("reward", REWARD), ("kl", KL))},
        }
    return runs


def draw(curves: Mapping[str, Sequence[Curve]], kl: Mapping[str, Sequence[Curve]]) -> str:
    """One line per seed, one colour per mode; the legend says where the modes end, and at which KL."""
    series = [Series(mode, curve, TONES[mode]) for mode, seeds in curves.items() for curve in seeds]
    chart = line_chart(series, title="reward", unit="score", x_unit="episodes")
    legend, top = [], 20
    for mode, seeds in curves.items():
        top += 16
        legend.append(f'<text class="tone{TONES[mode]}" x="44" y="{top}">{ends(mode, seeds, kl[mode])}</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 360 {top + 208}" width="900">'
        f'<style>{STYLE}</style><rect width="100%" height="100%" fill="#ffffff"/>'
        f'<text class="title" x="44" y="18">Reward during PPO; where it ends</text>{"".join(legend)}'
        f'<svg y="{top + 8}" height="196" width="360">{chart}</svg></svg>\n'
    )


def ends(mode: str, seeds: Sequence[Curve], kl: Sequence[Curve]) -> str:
    """The smoothed lines' last values: mean over the seeds, of the reward also the range."""
    last = [smoothed_last(curve) for curve in seeds]
    spread = f", {_short(min(last))} to {_short(max(last))}" if len(last) > 1 else ""
    count = f"{len(last)} seed{'s' if len(last) > 1 else ''}"
    nats = f"{statistics.fmean(map(smoothed_last, kl)):.1f}"
    return f"{mode}: {_short(statistics.fmean(last))} ({count}{spread}), KL {nats}"


def _short(value: float) -> str:
    return number(round(value, 2))


if __name__ == "__main__":
    main()
