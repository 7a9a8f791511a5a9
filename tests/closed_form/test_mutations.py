"""Which injected bugs does the tabular experiment see?

A mutant is caught when training stops with an error, or ends farther from pi* than `TABLE_TOLERANCE`, the tolerance
that the unmutated run has to meet. Every mutant's distance is a property of the JUnit report, and the table is printed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
from mutants import BUGS, HARMLESS, Mutant
from token_mdp import TABLE_TOLERANCE, ppo_config, run_table

from rlhf.errors import InvariantError


def outcome(mutant: Mutant) -> float | str:
    """Distance to the optimum of the unmutated problem, or the error that ended the run."""
    with pytest.MonkeyPatch.context() as patch:
        for apply in mutant.patches:
            apply(patch)
        try:
            run = run_table(**mutant.changes)
        except (InvariantError, ValueError) as error:
            return type(error).__name__
    return dataclasses.replace(run, cfg=ppo_config()).distance


def is_caught(result: float | str) -> bool:
    """NaN counts as caught: it is not within the tolerance."""
    return isinstance(result, str) or not result <= TABLE_TOLERANCE


def report(results: dict[str, float | str], record: Callable[[str, object], None]) -> str:
    """The table as text; every line also a property of the test."""
    lines = []
    for name, result in results.items():
        shown = result if isinstance(result, str) else f"TV {result:.4f}"
        record(name, shown)
        lines.append(f"{name:40s} {shown:16s} {'caught' if is_caught(result) else 'at the optimum'}")
    print("\n" + "\n".join(lines))
    return "\n".join(lines)


def test_bugs_that_move_the_optimum_are_caught(record_property: Callable[[str, object], None]) -> None:
    results = {bug.name: outcome(bug) for bug in BUGS}
    table = report(results, record_property)
    assert len(results) >= 20
    assert sum(map(is_caught, results.values())) >= 0.95 * len(results), table


def test_changes_that_leave_the_optimum_still_reach_it(record_property: Callable[[str, object], None]) -> None:
    results = {change.name: outcome(change) for change in HARMLESS}
    table = report(results, record_property)
    assert not any(map(is_caught, results.values())), table
