"""Labels of several rounds in one file: those of the round before come first, and no prompt changes its side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rlhf.config_schema import DatasetConfig
from rlhf.data.records import read_rankings
from rlhf.errors import DataError
from rlhf.runs import HELDOUT_RANKINGS, RANKINGS
from rlhf.types import Ranking

Sides = tuple[list[Ranking], list[Ranking]]
"""Rankings to train on, and held-out ones."""


def read_sides(folder: str | Path) -> Sides:
    """The rankings of a label folder.

    Raises:
        DataError: there are none to train on, or they cannot be read.
    """
    train, heldout = Path(folder) / RANKINGS, Path(folder) / HELDOUT_RANKINGS
    files = [train, heldout] if heldout.is_file() and heldout.stat().st_size > 0 else [train]
    sources = [DatasetConfig.model_validate({"path": str(file), "format": "ranking"}) for file in files]
    found = [list(read_rankings(source)) for source in sources]
    return found[0], found[1] if len(found) > 1 else []


def joined(earlier: Sides, new: Sides, *, chosen: bool) -> Sides:
    """Earlier rankings, then new ones; a prompt that is known stays on its side, or a reward model would be tested on
    prompts that it, or the policy's last reward model, was trained on. Rankings of one prompt are not merged: answers
    of two rounds have not been compared with each other.

    Args:
        chosen: the new held-out prompts were chosen by hand, not by lot.

    Raises:
        DataError: one of those has been trained on.
    """
    trained, held = _ids(earlier[0]), _ids(earlier[1])
    if chosen and (both := trained & _ids(new[1])):
        raise DataError(
            f"{len(both)} held-out prompts were trained on in an earlier round, {min(both)!r} for one",
            fix="hold out the same prompts in all rounds",
        )
    stays = [ranking for ranking in new[0] if ranking.prompt_id not in held]
    moves = [ranking for ranking in new[0] if ranking.prompt_id in held]
    back = [ranking for ranking in new[1] if ranking.prompt_id in trained]
    kept = [ranking for ranking in new[1] if ranking.prompt_id not in trained]
    return [*earlier[0], *stays, *back], [*earlier[1], *moves, *kept]


def _ids(rankings: Sequence[Ranking]) -> set[str]:
    return {ranking.prompt_id for ranking in rankings}
