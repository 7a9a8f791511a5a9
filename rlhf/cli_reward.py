"""`rlhf reward CONFIG`, the stage; `rlhf reward eval` and `rlhf rollouts score`, a reward model at work on files."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from rlhf import config
from rlhf.cli_groups import StageOrTool
from rlhf.config_reward import RewardEval, RolloutsScore

app = typer.Typer(
    cls=StageOrTool,
    no_args_is_help=True,
    help="Reward models: `rlhf reward CONFIG` trains one; `rlhf reward eval MODEL FILE` measures one.",
)
rollouts_app = typer.Typer(no_args_is_help=True, help="Files of rollouts.")

ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="a folder, an adapter's folder, or a hub id")]
FILES_HELP = "files of comparisons; and settings, see config_reward.py"


@rollouts_app.callback()
def _rollouts() -> None:
    """Files of rollouts."""


def add_tools(shielded: Callable[[Callable[[], None]], None]) -> None:
    """The commands; `shielded` turns users' errors into a panel."""

    def tool(module: str, settings: Any, given: dict[str, Any], overrides: list[str], command: str) -> None:
        def action() -> None:
            cfg = config.from_arguments(settings, given, overrides, command=command)
            importlib.import_module(f"reward_model.{module}").main(cfg)

        shielded(action)

    @app.command("eval", help="Measure a reward model on labeled comparisons: accuracy, calibration, length bias.")
    def evaluate(
        model: ModelArgument,
        files: Annotated[list[str], typer.Argument(metavar="FILE... [a.b=c]...", help=FILES_HELP)],
    ) -> None:
        overrides = [word for word in files if "=" in word and not Path(word).exists()]
        named = [word for word in files if word not in overrides]
        tool("evaluate", RewardEval, {"model": model, "files": named}, overrides, "rlhf reward eval")

    @rollouts_app.command(help="Write a reward model's scores into a file of rollouts.")
    def score(
        model: ModelArgument,
        buffer: Annotated[str, typer.Argument(metavar="BUFFER.parquet", help="what `rlhf sample` or PPO wrote")],
        overrides: Annotated[list[str] | None, typer.Argument(metavar="[a.b=c]...", help="settings")] = None,
        out: Annotated[str | None, typer.Option(help="another file; default: the scores go into BUFFER")] = None,
    ) -> None:
        given = {"model": model, "rollouts": buffer, "out": out}
        tool("score_rollouts", RolloutsScore, given, overrides or [], "rlhf rollouts score")
