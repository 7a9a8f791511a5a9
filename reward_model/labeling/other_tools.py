"""Label Studio and Argilla: files that they import, and files that they export, without either of them installed.

Written with responses in the order of the queue (the sides as shown are not kept), and read back to the same items
and answers; how each tool's rows look stands in its own module.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from reward_model.labeling.argilla import argilla, write_argilla
from reward_model.labeling.imports import Imported
from reward_model.labeling.label_studio import label_studio, write_label_studio
from reward_model.labeling.records import Item, Judgment
from rlhf.data.fields import Fields

WRITERS: dict[str, Callable[[Path, Sequence[Item], Sequence[Judgment]], None]] = {
    "label_studio": write_label_studio,
    "argilla": write_argilla,
}
READERS: dict[str, Callable[[Fields], Imported]] = {"label_studio": label_studio, "argilla": argilla}
