"""Typed errors. Each one that a user can cause names the value at fault and the fix.

The command line shows a `RlhfError` as one panel and exits with code 2; any other exception is a bug of ours
and keeps its traceback.
"""

from __future__ import annotations


class RlhfError(Exception):
    """What went wrong, and what to do about it.

    Args:
        message: what is wrong, naming the file, line, key or value.
        fix: the next step for the user, in the imperative.
    """

    def __init__(self, message: str, *, fix: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.message}\n  fix: {self.fix}" if self.fix else self.message


class ConfigError(RlhfError):
    """A configuration file or an override is not valid."""


class DataError(RlhfError):
    """A dataset is missing, or one of its rows is malformed."""


class ModelError(RlhfError):
    """A model cannot be found or does not fit what the stage asks of it."""


class CheckpointError(RlhfError):
    """A checkpoint is damaged, or does not belong to this run."""


class StageError(RlhfError):
    """A pipeline stage failed; its own error was printed before."""


class GuardError(RlhfError):
    """A guard raised an alarm, and the configuration says that alarms stop the run."""


class InvariantError(RlhfError):
    """A run-time assertion on the algorithm failed: going on would train on wrong numbers."""


class RewardError(RlhfError):
    """Too many rollouts of a step got no score."""


class JudgeError(RlhfError):
    """A judge model leaves too many questions unanswered, or prefers what no one could prefer."""


class MemoryLimitError(RlhfError):
    """Memory ran out; names the phase and the settings to lower."""


class LabelError(RlhfError):
    """The labeling store refuses: an answer does not fit its item, or something is unknown or not allowed."""


class LeaseError(LabelError):
    """The item is no longer this annotator's: the lease ran out, and the place has gone to somebody else."""


class LabelsPending(RlhfError):
    """People have still to label. Nothing is wrong: once they have, the same command goes on."""

    exit_code = 75
    """EX_TEMPFAIL of sysexits.h: try again later."""
