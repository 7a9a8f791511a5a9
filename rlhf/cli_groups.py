"""A stage that has tools beside it: `rlhf label CONFIG` is the stage, `rlhf label serve CONFIG` a tool."""

from __future__ import annotations

from typing import Any

from typer.core import TyperGroup

STAGE = "run"
"""The command that stands for no command: `rlhf label CONFIG`."""


class StageOrTool(TyperGroup):
    """A first word that is no command is the stage's CONFIG."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As the base class, with the stage's command put in front of anything else."""
        if args and args[0] not in self.commands and args[0] != "--help":
            args = [STAGE, *args]
        return super().parse_args(ctx, args)
