"""Annotators as scripts, over HTTP, and the labeling server as a process that they work on, and that can be killed."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from reward_model.labeling import accounts
from reward_model.labeling.store import LabelStore
from rlhf.config_labeling import LabelingStage

ROOT = Path(__file__).resolve().parents[1]

Answer = tuple[int, dict[str, Any]]


class Server:
    """`rlhf label serve` with accounts, at the same port after every start.

    Args:
        folder: gets the configuration, the database and the server's log.
        keys: of the configuration.
    """

    def __init__(self, folder: Path, **keys: Any) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        serve = {"port": self.port, "accounts": True}
        self.cfg = LabelingStage.model_validate({"run_dir": str(folder / "labels"), "serve": serve, **keys})
        self._config = folder / "project.yaml"
        self._config.write_text(yaml.safe_dump(self.cfg.model_dump(exclude_unset=True)), encoding="utf-8")
        self._log = folder / "server.log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, timeout: float = 60) -> None:
        """Until it answers."""
        said = self._log.stat().st_size if self._log.exists() else 0
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "rlhf", "label", "serve", str(self._config)],
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
                stdout=log,
                stderr=log,
            )
        end = time.monotonic() + timeout
        while b"labeling at" not in self._log.read_bytes()[said:]:
            assert self._process.poll() is None, self._log.read_text()
            assert time.monotonic() < end, self._log.read_text()
            time.sleep(0.02)

    def kill(self) -> None:
        """SIGKILL, as when the power goes."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    @property
    def log(self) -> str:
        return self._log.read_text(encoding="utf-8")


@dataclass
class Annotator:
    """One person's browser. `acknowledged`: by submission id, what was clicked and which judgment the server named."""

    name: str
    port: int
    cookie: str
    csrf: str
    acknowledged: dict[str, tuple[int, int]] = field(default_factory=dict)
    repeated: int = 0
    refused: int = 0
    seconds: list[float] = field(default_factory=list)
    """From a click until the next item is here, with what a server that was away cost."""

    @classmethod
    def of(cls, store: LabelStore, name: str, port: int) -> Annotator:
        """A user who is logged in: a session by the server's own means, without the time of hashing a password."""
        token = accounts.start_session(store, store.ensure_user(name, role="annotator"), "127.0.0.1")
        visitor = accounts.visitor_of(store, token)
        assert visitor is not None
        return cls(name, port, f"rlhf_{port}_session={token}", visitor.csrf_token)

    async def label(self, going: Callable[[], bool], think_seconds: float) -> None:
        """Judges one item after the other; a click that gets no answer is sent again, with its submission id."""
        rng = random.Random(self.name)
        browser = _Connection(self)
        _, state = await browser.surely("GET", "/api/task")
        while going() and (task := state["task"]) is not None:
            if think_seconds:
                await asyncio.sleep(rng.expovariate(1 / think_seconds))
            submission = f"{self.name.replace('-', '')}x{len(self.acknowledged):06}"
            value = rng.choice([-3, -2, -1, 1, 2, 3])
            body = {"assignment_id": task["assignment_id"], "submission_id": submission, "choice": "compare"}
            start = time.perf_counter()
            status, state = await browser.surely("POST", "/api/judgments", {**body, "value": value, "ms_active": 5})
            self.seconds.append(time.perf_counter() - start)
            if status == 200:
                self.acknowledged[submission] = (value, state["judgment_id"])
                self.repeated += state["repeated"]
            else:
                assert status == 409, (status, state)
                self.refused += 1
                _, state = await browser.surely("GET", "/api/task")
        browser.close()


class _Connection:
    """HTTP/1.1 with keep-alive and nothing else: fifty full clients would take the cores that the server needs."""

    def __init__(self, person: Annotator) -> None:
        host = f"127.0.0.1:{person.port}"
        self._port = person.port
        self._headers = f"Host: {host}\r\nOrigin: http://{host}\r\nCookie: {person.cookie}\r\n"
        self._headers += f"X-CSRF-Token: {person.csrf}\r\nContent-Type: application/json\r\n"
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self._answered = False

    async def surely(self, method: str, path: str, body: dict[str, Any] | None = None) -> Answer:
        """The answer, from whichever start of the server it comes."""
        end = time.monotonic() + 300
        while True:
            try:
                return await self._ask(method, path, body)
            except (OSError, EOFError):
                assert time.monotonic() < end, "the server does not come back"
                kept = self._answered
                self.close()
                if not kept:  # else the server closed an idle connection: browsers open another at once
                    await asyncio.sleep(0.05)

    async def _ask(self, method: str, path: str, body: dict[str, Any] | None) -> Answer:
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self._port)
        reader, writer = self._streams
        content = b"" if body is None else json.dumps(body).encode()
        head = f"{method} {path} HTTP/1.1\r\n{self._headers}Content-Length: {len(content)}\r\n\r\n"
        writer.write(head.encode() + content)
        answer = (await reader.readuntil(b"\r\n\r\n")).decode()
        length = re.search(r"content-length: (\d+)", answer, re.IGNORECASE)
        assert length, answer
        said = json.loads(await reader.readexactly(int(length[1])))
        self._answered = True
        return int(answer.split()[1]), said

    def close(self) -> None:
        self._answered = False
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


def over_assigned(store: LabelStore) -> list[str]:
    """Keys of the items with more deciding judgments by people than they ask for, and of those judged twice by one."""
    wanted = {item.key: item.wanted for item in store.items() if item.gold_ranks is None}
    by_item: dict[str, list[str]] = {key: [] for key in wanted}
    for judgment in store.judgments():
        if judgment.decides and judgment.presentation == 0 and judgment.item_key in wanted:
            by_item[judgment.item_key].append(judgment.annotator)
    return [key for key, names in by_item.items() if len(names) > wanted[key] or len(set(names)) < len(names)]


def lost_or_doubled(store: LabelStore, people: list[Annotator]) -> list[str]:
    """Submissions that the server acknowledged and that are not stored as clicked, and those it has beyond them."""
    from sqlalchemy import select

    from reward_model.labeling.schema import JudgmentRow

    with store.read() as session:
        rows = [(row.submission_id, row.value, row.id) for row in session.scalars(select(JudgmentRow))]
    sent = [(submission, *click) for person in people for submission, click in person.acknowledged.items()]
    return sorted({submission for submission, *_ in {*rows} ^ {*sent}})
