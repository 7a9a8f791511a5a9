"""`rlhf label ...`: the commands of a labeling project, and `rlhf label CONFIG`, the stage, as it always was."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from rlhf import config

STAGE = "run"
"""The command that stands for no command: `rlhf label CONFIG`."""

ConfigArgument = Annotated[
    str, typer.Argument(metavar="CONFIG", help="a labeling project's YAML file, or the name of a shipped one")
]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[a.b=c]...", help="override single keys")]


class StageOrTool(TyperGroup):
    """A first word that is no command is the stage's CONFIG."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As the base class, with the stage's command put in front of anything else."""
        if args and args[0] not in self.commands and args[0] != "--help":
            args = [STAGE, *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=StageOrTool,
    no_args_is_help=True,
    help="Preference labels: `rlhf label CONFIG` is the pipeline's stage; the commands belong to a labeling project.",
)


def add_tools(shielded: Callable[[Callable[[], None]], None]) -> None:
    """The commands of a labeling project; `shielded` turns users' errors into a panel."""

    def tool(module: str, config_name: str, overrides: list[str] | None, *arguments: Any) -> None:
        def action() -> None:
            cfg = config.load(config_name, "labeling", overrides or [])
            importlib.import_module(f"reward_model.labeling.{module}").main(cfg, *arguments)

        shielded(action)

    @app.command(help="The labeling app: a web server for annotators.")
    def serve(config_name: ConfigArgument, overrides: Overrides = None) -> None:
        tool("serve", config_name, overrides)

    @app.command(help="An invite link for a new account (accounts: the first one must be an admin's).")
    def invite(
        config_name: ConfigArgument,
        overrides: Overrides = None,
        role: Annotated[Literal["admin", "annotator", "viewer"], typer.Option(help="of the new account")] = "annotator",
    ) -> None:
        tool("invite", config_name, overrides, role)

    @app.command(help="Put responses from rollout buffers before the annotators.")
    def queue(config_name: ConfigArgument, overrides: Overrides = None) -> None:
        tool("queue", config_name, overrides)

    @app.command("import", help="Put the pairs or rankings of a file before the annotators, with its labels if wanted.")
    def import_(
        config_name: ConfigArgument,
        file: Annotated[str, typer.Argument(help="a file of preferences, Label Studio or Argilla")],
        overrides: Overrides = None,
        format: Annotated[str, typer.Option(help="hh, preference, ranking, tldr, ultrafeedback, ...")] = "auto",
        with_labels: Annotated[bool, typer.Option("--with-labels", help="store the file's labels, too")] = False,
        gold: Annotated[bool, typer.Option("--gold", help="its labels are the answers of gold questions")] = False,
        max_bad_fraction: Annotated[float, typer.Option(min=0, max=1, help="malformed rows to leave out")] = 0.0,
    ) -> None:
        tool("importing", config_name, overrides, file, format, with_labels, gold, max_bad_fraction)

    @app.command(help="Preference files for training, raw judgments, and the agreement report.")
    def export(config_name: ConfigArgument, overrides: Overrides = None) -> None:
        tool("export", config_name, overrides)

    @app.command(help="A judge model labels the queue, both orders of every item.")
    def ai(config_name: ConfigArgument, overrides: Overrides = None) -> None:
        tool("ai", config_name, overrides)
