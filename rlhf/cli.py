"""The command line: `rlhf <stage> CONFIG [a.b=c ...]`. A stage's module is imported only when it is asked for."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from rlhf import config, runs
from rlhf.errors import RlhfError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="RLHF: sft, sample, label, reward, ppo, evaluate, report; or all of them: pipeline.",
)

MODULES = {
    "sft": "rlhf.stages.sft",
    "sample": "rlhf.stages.sample",
    "label": "rlhf.stages.label",
    "reward": "reward_model.train",
    "ppo": "rlhf.stages.ppo",
    "evaluate": "rlhf.stages.evaluate",
    "report": "rlhf.stages.report",
    "pipeline": "rlhf.stages.pipeline",
}

HELP = {
    "sft": "Supervised fine-tuning on demonstrations.",
    "sample": "Sample K completions per prompt into the rollout buffer.",
    "label": "Preference labels for sampled completions.",
    "reward": "Train the reward model on preferences.",
    "ppo": "PPO with KL control against the frozen reference.",
    "evaluate": "Compare policies on held-out prompts.",
    "report": "One self-contained report.html and summary.json.",
    "pipeline": "All stages one after the other, each in its own process; finished ones are skipped.",
}

ConfigArgument = Annotated[str, typer.Argument(metavar="CONFIG", help="a YAML file, or the name of a shipped one")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[a.b=c]...", help="override single keys")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="check everything, print what would run, write nothing")]
Resume = Annotated[str, typer.Option(help="auto: go on from the newest checkpoint; never: start anew")]


def _command(stage: str) -> None:
    @app.command(stage, help=HELP[stage])
    def command(
        config_name: ConfigArgument, overrides: Overrides = None, dry_run: DryRun = False, resume: Resume = "auto"
    ) -> None:
        _shielded(lambda: run_stage(stage, config_name, overrides or [], dry_run=dry_run, resume=resume))


for _stage in MODULES:
    _command(_stage)


@app.command(help="What this machine has, and what is missing.")
def doctor() -> None:
    from rlhf.doctor import report

    _shielded(report)


def run_stage(stage: str, config_name: str, overrides: list[str], *, dry_run: bool, resume: str) -> None:
    """Load the configuration, run one stage, write its result.json."""
    from rlhf.errors import ConfigError

    if resume not in ("auto", "never"):
        raise ConfigError(f"--resume {resume!r} is not known", fix="use auto or never")
    cfg = config.load(config_name, stage, overrides)
    if dry_run:
        from rlhf.dry_run import describe

        describe(stage, cfg)
        return
    module = importlib.import_module(MODULES[stage])
    options = runs.RunOptions(resume=resume)
    if stage == "pipeline":
        module.main(cfg, options)
        return
    if int(os.environ.get("RANK", "0")) == 0:
        with runs.recorded(cfg, stage) as record:
            record(module.main(cfg, options))
    else:
        module.main(cfg, options)


def _shielded(action) -> None:  # type: ignore[no-untyped-def]
    """Users' errors become one panel and exit code 2; our bugs keep their traceback."""
    try:
        action()
    except RlhfError as error:
        body = Text(error.message)
        if error.fix:
            body.append("\n\nfix: ", style="bold green").append(error.fix)
        Console(stderr=True).print(Panel(body, title=type(error).__name__, title_align="left", border_style="red"))
        sys.stderr.flush()
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted; run the same command again to go on")
        raise typer.Exit(130) from None
