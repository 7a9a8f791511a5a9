"""Stores of labeling projects on both databases, with a clock that tests move."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from faulty_server import serving
from judge_server import JudgeServer
from postgres_server import PostgresServer, binaries

from reward_model.labeling.judge import Judge
from reward_model.labeling.judge import open_judge as open_judge_of
from reward_model.labeling.records import Answer, Candidate, Item, Judgment, Task
from reward_model.labeling.store import LabelStore
from rlhf.config_judge import JudgeConfig
from rlhf.config_labeling import LabelingStage


class Clock:
    """Milliseconds; stands still until a test moves it."""

    def __init__(self) -> None:
        self.ms = 1_700_000_000_000

    def __call__(self) -> int:
        return self.ms

    def minutes(self, minutes: float) -> None:
        self.ms += round(minutes * 60_000)


class Project:
    """A labeling project on one database; `open` opens its store, as often as wanted.

    Attributes:
        keys: of the configuration; gold questions and repeats are off.
    """

    def __init__(self, keys: dict[str, Any]) -> None:
        self.clock = Clock()
        self.keys = {"gold": {"fraction": 0}, "repeat_fraction": 0, **keys}
        self._numbers = itertools.count()
        self._opened: list[LabelStore] = []

    def open(self, **keys: Any) -> LabelStore:
        store = LabelStore.open(LabelingStage.model_validate({**self.keys, **keys}), self.clock)
        self._opened.append(store)
        return store

    def close(self) -> None:
        for store in self._opened:
            store.close()

    def judge(self, store: LabelStore, user: int, answer: Answer | None = None) -> tuple[Task, int]:
        """The next task, and the id of the judgment that answers it: the left one is better, if nothing is said."""
        task = store.next_task(user)
        assert task is not None
        answer = answer or Answer("compare", value=-1)
        self.clock.ms += 1
        return task, store.submit(user, task.assignment_id, answer, f"s{next(self._numbers)}").judgment_id


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    if binaries() is None:
        pytest.skip("PostgreSQL is not installed")
    with PostgresServer() as server:
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
def project(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Project]:
    """An empty project, on SQLite and on PostgreSQL."""
    keys: dict[str, Any] = {"run_dir": str(tmp_path / "labels")}
    if request.param == "postgresql":
        server: PostgresServer = request.getfixturevalue("postgres")
        monkeypatch.setenv("LABELS_DATABASE", server.database())
        keys["database_env"] = "LABELS_DATABASE"
    made = Project(keys)
    yield made
    made.close()


@pytest.fixture
def make_items() -> Callable[..., list[Item]]:
    """`make_items(3, wanted=2)`: pairs "p0", "p1", "p2" of responses "p0/0", "p0/1" by policies A and B."""

    def make(n: int, *, K: int = 2, start: int = 0, **fields: Any) -> list[Item]:
        prompts = [f"p{number}" for number in range(start, start + n)]
        kind: Any = "pair" if K == 2 else "ranking"
        return [
            Item(prompt, [Candidate(f"{prompt}/{k}", "ABCDEFG"[k]) for k in range(K)], **{"kind": kind, **fields})
            for prompt in prompts
        ]

    return make


@pytest.fixture
def standing() -> Callable[[LabelStore], list[Judgment]]:
    """`standing(store)`: the judgments that stand, after a check that none is lost or counted twice in `taken`."""
    from sqlalchemy import select

    from reward_model.labeling.schema import AssignmentRow, ItemRow

    def check(store: LabelStore) -> list[Judgment]:
        judgments = store.judgments()
        with store.read() as session:
            items = {row.key: row for row in session.scalars(select(ItemRow))}
            leases = session.execute(
                select(ItemRow.key)
                .join(AssignmentRow, AssignmentRow.item_id == ItemRow.id)
                .where(AssignmentRow.state == "leased", AssignmentRow.presentation == 0)
            )
            held = [key for (key,) in leases]
        for key, item in items.items():
            deciding = [j for j in judgments if j.item_key == key and j.decides and j.presentation == 0]
            people = [j for j in deciding if j.labeler == "person"]
            if not item.is_gold:
                assert item.taken == len(people) + held.count(key) <= item.wanted
        return judgments

    return check


@pytest.fixture
def judge_server() -> Iterator[JudgeServer]:
    """A judge model's server that fails as told."""
    with serving(JudgeServer()) as server:
        yield server


@pytest.fixture
def judge_settings(judge_server: JudgeServer) -> Callable[..., dict[str, Any]]:
    """`judge_settings(answer="json", endpoint={...})`: of a judge that waits little and tolerates nearly all."""

    def build(**changes: Any) -> dict[str, Any]:
        endpoint = {"url": judge_server.url, "allow_private": True, "timeout_s": 5.0, "wait_s": 0.001, "parallel": 2}
        settings: dict[str, Any] = {"model": "m/judge-1", "max_failures": 0.99, "controls": {"per_batch": 0}}
        return settings | changes | {"endpoint": endpoint | changes.get("endpoint", {})}

    return build


@pytest.fixture
def open_judge(judge_settings: Callable[..., dict[str, Any]], tmp_path: Path) -> Iterator[Callable[..., Judge]]:
    """`open_judge("run", answer="json", ...)`: a judge in a folder of the test's own, with `judge_settings`."""
    judges = []

    def build(folder: str = "run", **changes: Any) -> Judge:
        cfg = JudgeConfig.model_validate(judge_settings(**changes))
        judges.append(open_judge_of(cfg, str(tmp_path / folder), seed=3))
        return judges[-1]

    yield build
    for judge in judges:
        judge.close()
