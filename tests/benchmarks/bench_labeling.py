"""The labeling server under annotators at once, on SQLite and PostgreSQL: how long the next item takes.

The server is a process of its own, `rlhf label serve` with accounts; the annotators are one process more, over
loopback, so that both share the machine's cores. Two loads: `paced`, where a person thinks before the click, far
faster than people do, and `flat out`, where nobody thinks at all and the server's capacity shows. Afterwards the
database is read: an item with too many judgments, a judgment lost or doubled, and the run is an error.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from harness import HERE, Report, row, save

sys.path.insert(0, str(HERE.parent))

from annotators import Annotator, Server, lost_or_doubled, over_assigned
from postgres_server import PostgresServer

from reward_model.labeling.records import Candidate, Item
from reward_model.labeling.store import LabelStore

P95_MS = 100.0
"""What is asked for: the next item within this time, for 95 of 100 clicks."""

PARAGRAPH = "The **sun** is a star; it gives us `energy`. It is very big and very hot, and the moon is neither. " * 3
VARIABLE = "BENCH_LABELS_DATABASE"


def items(n: int) -> list[Item]:
    """Pairs of two paragraphs each in Markdown, for two annotators, and a gold question for every hundred."""

    def candidates(number: int) -> list[Candidate]:
        return [Candidate(f"## Answer {number}.{k}\n\n{PARAGRAPH}\n\n- {PARAGRAPH}", f"policy-{k}") for k in range(2)]

    ordinary = [Item(f"Question {number}: {PARAGRAPH}", candidates(number), wanted=2) for number in range(n)]
    gold = [Item(f"Control {k}", candidates(n + k), gold_ranks=[1, 2]) for k in range(n // 100)]
    return ordinary + gold


async def load(people: list[Annotator], seconds: float, think: float) -> float:
    """All of them label for `seconds`; how long it took."""
    start = time.perf_counter()
    await asyncio.gather(*(person.label(lambda: time.perf_counter() - start < seconds, think) for person in people))
    return time.perf_counter() - start


def summary(seconds: list[float], wall: float) -> Report:
    """Milliseconds from a click to the next item, and judgments per second."""
    ms = sorted(1000 * one for one in seconds)
    cuts = statistics.quantiles(ms, n=100, method="inclusive")
    measured = {"p50_ms": cuts[49], "p95_ms": cuts[94], "p99_ms": cuts[98], "max_ms": ms[-1], "per_s": len(ms) / wall}
    return {"judgments": len(ms), **{name: float(f"{value:.4g}") for name, value in measured.items()}}


def run(args: argparse.Namespace, keys: dict[str, Any]) -> Report:
    """Both loads on one database."""
    with ExitStack() as ends:
        folder = Path(ends.enter_context(tempfile.TemporaryDirectory(prefix="labels-")))
        # Scripts fail gold questions; here nobody is paused for it.
        server = Server(folder, gold={"fraction": 0.05, "pause_below": 0.0}, **keys)
        store = ends.enter_context(LabelStore.open(server.cfg))
        store.add_items(items(args.items))
        people = [Annotator.of(store, f"annotator-{number}", server.port) for number in range(args.annotators)]
        ends.callback(server.kill)
        server.start()
        report: Report = {}
        for name, think in (("paced", args.think), ("flat out", 0.0)):
            for person in people:
                person.seconds.clear()
            wall = asyncio.run(load(people, args.seconds, think))
            report[name] = summary([one for person in people for one in person.seconds], wall)
            print(name, report[name], flush=True)
        wrong = lost_or_doubled(store, people) + over_assigned(store)
        if wrong or sum(person.refused for person in people):
            raise RuntimeError(f"lost, doubled, over-assigned or refused: {wrong[:10]}")
        return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--annotators", type=int, default=50)
    parser.add_argument("--items", type=int, default=20_000)
    parser.add_argument("--seconds", type=float, default=30.0, help="of each load")
    parser.add_argument("--think", type=float, default=2.0, help="seconds before a click, on average")
    args = parser.parse_args()
    found = {"SQLite": run(args, {})}
    with PostgresServer(durable=True) as server:
        os.environ[VARIABLE] = server.database()
        found["PostgreSQL"] = run(args, {"database_env": VARIABLE})
    rows = [
        row(f"next item, {name}, {load}; p95", "ms", report["p95_ms"], P95_MS, lower_is_better=True, group="labeling")
        for name, reports in found.items()
        for load, report in reports.items()
    ]
    save("labeling", {**vars(args), "measured": found}, rows)


if __name__ == "__main__":
    main()
