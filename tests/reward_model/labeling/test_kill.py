"""The labeling server is killed in the middle, again and again: what it acknowledged is there, and there once."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest
from annotators import Annotator, Server, lost_or_doubled, over_assigned

from reward_model.labeling.store import LabelStore


async def killed_while_they_label(server: Server, people: list[Annotator], kills: int) -> None:
    """Each start lives for some ten judgments; the kill comes up to 20 ms later, wherever the server then is."""
    rng, running = random.Random(kills), True
    tasks = [asyncio.create_task(person.label(lambda: running, 0)) for person in people]
    for _ in range(kills):
        await asyncio.to_thread(server.start)
        before = sum(len(person.acknowledged) for person in people)
        while sum(len(person.acknowledged) for person in people) < before + 20:
            if failed := [task for task in tasks if task.done()]:
                await asyncio.gather(*failed)
                raise AssertionError("the items ran out")
            await asyncio.sleep(0.005)
        await asyncio.sleep(rng.random() * 0.02)
        server.kill()
    running = False
    await asyncio.to_thread(server.start)
    await asyncio.gather(*tasks)


def run(folder: Path, items: Any, keys: dict[str, Any], *, annotators: int, kills: int) -> list[Annotator]:
    server = Server(folder, repeat_fraction=0.2, **keys)
    with LabelStore.open(server.cfg) as store:
        store.add_items(items)
        people = [Annotator.of(store, f"annotator-{number}", server.port) for number in range(annotators)]
        try:
            asyncio.run(killed_while_they_label(server, people, kills))
        finally:
            server.kill()
        assert lost_or_doubled(store, people) == []
        assert over_assigned(store) == []
        assert len(store.judgments()) > 20 * kills
    assert "Traceback" not in server.log
    return people


def test_a_killed_server_loses_nothing(tmp_path: Path, make_items: Any) -> None:
    run(tmp_path, make_items(500, wanted=2), {}, annotators=8, kills=2)


@pytest.mark.slow
@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_a_server_killed_twenty_times_loses_nothing(
    tmp_path: Path, make_items: Any, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, database: str
) -> None:
    keys: dict[str, Any] = {}
    if database == "postgresql":
        monkeypatch.setenv("LABELS_DATABASE", request.getfixturevalue("postgres").database())
        keys["database_env"] = "LABELS_DATABASE"
    people = run(tmp_path, make_items(10_000, wanted=2), keys, annotators=50, kills=20)
    assert sum(person.repeated for person in people) > 0, "no kill fell between a commit and its answer"
