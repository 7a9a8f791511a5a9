"""What was clicked is what is stored, through undo, swap and ranking: random sessions beside a model of the rules.

The model knows tasks by their texts alone, as an annotator does; it has no orders, no rows and no locks.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from sqlalchemy import delete, select

from reward_model.labeling import moderation
from reward_model.labeling.records import Answer, Item, Task
from reward_model.labeling.schema import AssignmentRow, Base, ItemRow, UserRow
from reward_model.labeling.store import LabelStore
from rlhf.config_labeling import LabelingStage
from rlhf.errors import LabelError, LeaseError

LEASE_MINUTES, REPEAT_AFTER = 20, 2
ITEMS = 7
"""p0 and p1 once, p2 and p3 twice, p4 (more urgent) three times, p5 a ranking of 3 (twice), p6 a gold question."""

Click = tuple[str, Any, str]
"""What was meant, of texts and not of places: choice; who beats whom, and by how much, or the ranks; notes."""


def meaning(task: Task, answer: Answer) -> Click:
    if answer.choice == "compare":
        left, right = task.responses
        value = int(answer.value or 0)
        better, worse = (left, right) if value < 0 else (right, left)
        return ("compare", (better, worse, abs(value)) if value else (*sorted(task.responses), 0), answer.notes)
    ranks = dict(zip(task.responses, answer.ranks or [], strict=False))
    return (answer.choice, tuple(sorted(ranks.items())), answer.notes)


def admin(store: LabelStore) -> int:
    return store.ensure_user("admin", role="admin")


@dataclass
class Shown:
    """A task that an annotator was shown, and what became of it."""

    task: Task
    user: int
    item: int
    repeat: bool
    state: str
    expires_ms: int
    shown_ms: int
    clicked_at: int = 0  # how many first-time items this user had been served
    submission: str = ""
    judgment: int = 0


@dataclass
class Model:
    """The rules, said once more and without a database."""

    clock: Any
    repeats: bool
    wanted: list[int]
    shown: dict[int, Shown] = field(default_factory=dict)
    held: dict[int, str] = field(default_factory=dict)  # item -> flagged or retired
    settled: dict[int, int] = field(default_factory=dict)  # item -> how many rows there were when it was reopened
    stands: dict[int, tuple[int, Click]] = field(default_factory=dict)  # assignment -> when, what
    rows: int = 0
    served: Counter[int] = field(default_factory=Counter)
    planned: dict[tuple[int, int], int] = field(default_factory=dict)  # user, item -> due

    def is_gold(self, item: int) -> bool:
        return item == 6

    def counted(self, s: Shown) -> bool:
        return not s.repeat and not self.is_gold(s.item)

    def taken(self, item: int) -> int:
        return sum(s.item == item and self.counted(s) and s.state in ("leased", "done") for s in self.shown.values())

    def free(self, s: Shown) -> bool:
        """Whether a lease that ran out, or was given back, can be had again."""
        if self.held.get(s.item) == "retired":
            return False
        return not self.counted(s) or self.taken(s.item) < self.wanted[s.item]

    def sweep(self) -> None:
        for s in self.shown.values():
            if s.state == "leased" and s.expires_ms <= self.clock():
                s.state = "expired"

    def of(self, user: int) -> list[Shown]:
        return [s for s in self.shown.values() if s.user == user]

    def eligible(self, user: int) -> list[int]:
        had = {s.item for s in self.of(user) if not s.repeat and s.state != "expired"}
        order = sorted(range(ITEMS - 1), key=lambda item: (item != 4, item))
        return [i for i in order if i not in had and i not in self.held and self.taken(i) < self.wanted[i]]

    def due(self, user: int) -> set[int]:
        waiting = {item: due for (owner, item), due in self.planned.items() if owner == user}
        left = {s.item: s.clicked_at for s in self.of(user) if s.repeat and s.state == "expired"}
        return {i for i, due in (waiting | left).items() if due <= self.served[user] and i not in self.held}


class Session:
    """Plays a random script on the store and on the model."""

    def __init__(self, store: LabelStore, clock: Any, items: list[Item], repeats: bool) -> None:
        self.store, self.clock = store, clock
        self.users = [store.ensure_user(name, role="annotator") for name in "abc"]
        self.model = Model(clock, repeats, [item.wanted for item in items])
        self.keys = [item.key for item in items]
        with store.read() as session:
            self.ids = list(session.scalars(select(ItemRow.id).order_by(ItemRow.id)))
        self.submissions = 0

    def next(self, user: int, _: Any = None) -> None:
        m = self.model
        m.sweep()
        live = [s for s in m.of(user) if s.state == "leased"]
        task = self.store.next_task(user)
        if live:
            current = max(live, key=lambda s: s.shown_ms)
            assert task is not None
            assert (task.assignment_id, task.responses) == (current.task.assignment_id, current.task.responses)
            current.expires_ms = task.lease_expires_ms
        elif task is None:
            assert not m.eligible(user)
            assert not m.due(user)
        else:
            self._served(user, task)

    def _served(self, user: int, task: Task) -> None:
        m, item = self.model, int(task.prompt[1:])  # type: ignore[arg-type]
        assert item not in m.held
        assert task.lease_expires_ms == self.clock() + LEASE_MINUTES * 60_000
        first = next((s for s in m.of(user) if s.item == item and not s.repeat), None)
        again = m.shown.get(task.assignment_id)
        if again is not None:
            assert again.state == "expired"
            assert again.task.responses == task.responses
        repeat = again.repeat if again else first is not None
        if repeat:
            assert item in m.due(user)
            assert first is not None
            assert first.task.responses == task.responses[::-1]
        else:
            assert not m.due(user)
            assert m.is_gold(item) or item == m.eligible(user)[0]
            m.served[user] += again is None
        due = m.planned.pop((user, item), 0) if repeat else 0
        made = again or Shown(task, user, item, repeat, "", 0, 0, clicked_at=due)
        made.state, made.shown_ms, made.expires_ms = "leased", self.clock(), task.lease_expires_ms
        m.shown[task.assignment_id] = made

    def pick(self, user: int, number: int) -> Shown | None:
        """0: what is before the user; above: something older."""
        known = sorted(self.model.of(user), key=lambda s: (s.state == "leased", s.shown_ms), reverse=True)
        return known[number % len(known)] if known else None

    def submit(self, user: int, number: int, draw: int) -> None:
        s = self.pick(user, number)
        if s is None:
            return
        answer = self.answer(s.task, draw)
        decides = answer.choice in ("compare", "rank", "both_bad")
        submission = f"s{self.submissions}"
        self.submissions += 1
        call = (user, s.task.assignment_id, answer, submission)
        if s.state in ("done", "passed"):
            with pytest.raises(LeaseError, match="judged this item already"):
                self.store.submit(*call)
        elif s.state == "expired" and decides and not self.model.free(s):
            with pytest.raises(LeaseError):
                self.store.submit(*call)
        else:
            receipt = self.store.submit(*call)
            assert not receipt.repeated
            assert receipt.policies == ["ABC"[int(text[-1])] for text in s.task.responses]
            self._accepted(s, answer, decides)
            s.submission, s.judgment = submission, receipt.judgment_id

    def _accepted(self, s: Shown, answer: Answer, decides: bool) -> None:
        m = self.model
        s.state = "done" if decides else "passed"
        m.rows += 1
        m.stands[s.task.assignment_id] = (m.rows, meaning(s.task, answer))
        if answer.choice == "flag" and m.held.get(s.item) != "retired":
            m.held[s.item] = "flagged"
        had_again = any(other.repeat and other.item == s.item for other in m.of(s.user))
        if decides and m.repeats and m.counted(s) and s.task.kind == "pair" and not had_again:
            m.planned.setdefault((s.user, s.item), m.served[s.user] + REPEAT_AFTER)

    def answer(self, task: Task, draw: int) -> Answer:
        notes = f"note {draw}" if draw % 3 else ""
        if draw % 10 == 0:
            return Answer(("skip", "flag", "both_bad")[draw // 10 % 3], notes=notes)
        if task.kind == "ranking":
            return Answer("rank", ranks=[[1, 2, 3], [3, 1, 2], [1, 1, 2], [2, 1, 1], [1, 1, 1]][draw % 5], notes=notes)
        return Answer("compare", value=draw % 7 - 3, notes=notes)

    def resend(self, user: int, number: int, draw: int) -> None:
        s = self.pick(user, number)
        if s is not None and s.submission:
            receipt = self.store.submit(user, s.task.assignment_id, self.answer(s.task, draw), s.submission)
            assert receipt.repeated
            assert receipt.judgment_id == s.judgment

    def undo(self, user: int, _: int = 0) -> None:
        m = self.model
        own = [(when, click, m.shown[a]) for a, (when, click) in m.stands.items() if m.shown[a].user == user]
        if not own:
            assert self.store.undo(user) is None
            return
        own.sort(key=lambda entry: entry[0], reverse=True)
        gone = next((n for n, (_, _, s) in enumerate(own) if s.state == "done" or m.free(s)), None)
        if gone is None:
            with pytest.raises(LeaseError, match="cannot come back"):
                self.store.undo(user)
            return
        _, click, s = own[gone]
        if click[0] == "flag" and m.held.get(s.item) == "flagged":
            others = [
                c
                for a, (when, c) in m.stands.items()
                if m.shown[a].item == s.item and m.shown[a] is not s and when > m.settled.get(s.item, 0)
            ]
            if not any(other[0] == "flag" for other in others):
                del m.held[s.item]
        task = self.store.undo(user)
        assert task is not None
        assert (task.assignment_id, task.responses) == (s.task.assignment_id, s.task.responses)
        assert task.passed_over == gone
        assert task.previous is not None
        assert meaning(task, task.previous) == click
        if s.state == "done" and not s.repeat:
            m.planned.pop((user, s.item), None)
        del m.stands[task.assignment_id]
        m.rows += 1
        s.state, s.shown_ms, s.expires_ms = "leased", self.clock(), task.lease_expires_ms

    def renew(self, user: int, number: int) -> None:
        s = self.pick(user, number)
        if s is None:
            return
        if s.state == "leased" or (s.state == "expired" and self.model.free(s)):
            s.state, s.expires_ms = "leased", self.store.renew(user, s.task.assignment_id)
            assert s.expires_ms == self.clock() + LEASE_MINUTES * 60_000
        else:
            with pytest.raises(LabelError):
                self.store.renew(user, s.task.assignment_id)

    def decide(self, item: int, retire: bool) -> None:
        if retire:
            moderation.retire(self.store, admin(self.store), self.ids[item])
            self.model.held[item] = "retired"
        else:
            moderation.reopen(self.store, admin(self.store), self.ids[item])
            self.model.held.pop(item, None)
            self.model.settled[item] = self.model.rows

    def check(self) -> None:
        """Nothing lost, nothing doubled, nothing beyond what was wanted."""
        m = self.model
        meant = {(s.user, s.item, s.repeat): m.stands[a][1] for a, s in m.shown.items() if a in m.stands}
        names = dict(zip("abc", self.users, strict=True))
        stored = {}
        for j in self.store.judgments():
            item = self.keys.index(j.item_key)
            texts = [f"p{item}/{k}" for k in range(len(j.order))]
            content: Any = ()
            if j.answer.choice == "compare":
                assert j.value is not None
                assert j.ranks is not None
                best, worst = (texts[::-1] if j.value > 0 else texts) if j.value else texts
                content = (best, worst, abs(j.value))
                assert j.ranks == ([1, 1] if not j.value else [2, 1] if j.value > 0 else [1, 2])
            elif j.answer.choice == "rank":
                content = tuple(sorted(zip(texts, j.ranks or [], strict=True)))
            key = (names[j.annotator], item, j.presentation == 1)
            assert key not in stored
            stored[key] = (j.answer.choice, content, j.answer.notes)
        assert stored == meant
        assert len(self.store.judgments(effective=False)) == m.rows
        with self.store.read() as session:
            rows = list(session.scalars(select(ItemRow).order_by(ItemRow.id)))
            judged = {
                user.id: user.judged for user in session.scalars(select(UserRow).where(UserRow.role == "annotator"))
            }
            live = session.scalars(select(AssignmentRow.id).where(AssignmentRow.state == "leased"))
            assert set(live) == {a for a, s in m.shown.items() if s.state == "leased"}
        for item, row in enumerate(rows):
            assert row.taken == m.taken(item) <= m.wanted[item]
            full = not m.is_gold(item) and row.taken == row.wanted
            assert row.state == m.held.get(item, "full" if full else "open")
        decided = Counter(s.user for a, s in m.shown.items() if a in m.stands and s.state == "done")
        assert judged == {user: decided[user] for user in self.users}


OFTEN, SELDOM = ["judge"] * 8 + ["undo", "wait"] * 2, ["next", "submit", "resend", "renew", "reopen", "retire"]
SCRIPTS = st.lists(
    st.tuples(
        st.sampled_from(OFTEN + SELDOM),
        st.integers(0, 2),  # who
        st.sampled_from([0, 0, 0, 0, 1, 2, 5]),  # which of their tasks
        st.integers(0, 69),  # what is answered; how long; which item
    ),
    min_size=10,
    max_size=70,
)


def play(project: Any, store: LabelStore, items: list[Item], script: list[Any], repeats: bool) -> None:
    with store.begin() as session:
        for table in reversed(Base.metadata.sorted_tables):
            session.execute(delete(table))
    rules = {"lease_minutes": LEASE_MINUTES, "repeat_after": REPEAT_AFTER, "repeat_fraction": float(repeats)}
    cfg = LabelingStage.model_validate({**project.keys, **rules, "gold": {"fraction": 0.25, "after": 1000}})
    store = LabelStore(store.engine, cfg, project.clock)
    store.add_items(items)
    session = Session(store, project.clock, items, repeats)
    for action, who, number, draw in script:
        project.clock.ms += 1
        user = session.users[who]
        if action == "judge":
            session.next(user)
            session.submit(user, 0, draw)
        elif action in ("submit", "resend"):
            getattr(session, action)(user, number, draw)
        elif action in ("next", "undo", "renew"):
            getattr(session, action)(user, number)
        elif action == "wait":
            project.clock.minutes(draw % 25)
        else:
            session.decide(draw % ITEMS, action == "retire")
    session.check()


@pytest.fixture
def items(make_items: Any) -> list[Item]:
    wanted = {0: 1, 1: 1, 2: 2, 3: 2}
    made = [make_items(1, start=number, wanted=n)[0] for number, n in wanted.items()]
    made += make_items(1, start=4, wanted=3, priority=1.0) + make_items(1, start=5, K=3, wanted=2)
    return made + make_items(1, start=6, gold_ranks=[1, 2])


def explore(project: Any, items: list[Item], examples: int, *, derandomize: bool) -> None:
    store = project.open()

    @settings(
        max_examples=examples,
        derandomize=derandomize,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(script=SCRIPTS, repeats=st.booleans())
    def run(script: list[Any], repeats: bool) -> None:
        play(project, store, items, script, repeats)

    run()


def test_what_was_clicked_is_what_is_stored(project: Any, items: list[Item]) -> None:
    explore(project, items, 12, derandomize=True)


@pytest.mark.slow
def test_what_was_clicked_is_what_is_stored_in_many_sessions(project: Any, items: list[Item]) -> None:
    explore(project, items, 250, derandomize=False)
