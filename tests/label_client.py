"""A labeling project on the web, without a network: its store, its app, and browsers that log in and send forms."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from starlette.testclient import TestClient

from reward_model.labeling import accounts
from reward_model.labeling.app import make_app
from reward_model.labeling.records import Candidate, Item
from reward_model.labeling.store import LabelStore
from rlhf.config_labeling import LabelingStage

ORIGIN = "http://127.0.0.1:8420"
PASSWORD = "correct horse battery"


class Clock:
    """A store's clock that stands still until it is told otherwise."""

    def __init__(self, ms: int = 1_800_000_000_000) -> None:
        self.ms = ms

    def __call__(self) -> int:
        return self.ms


class Browser:
    """Cookies, the last page's CSRF token, and the Origin that a browser would send."""

    def __init__(self, app: Any, base: str = ORIGIN, *, raise_server_exceptions: bool = True) -> None:
        self.http = TestClient(
            app, base_url=base, follow_redirects=False, raise_server_exceptions=raise_server_exceptions
        )
        self.origin = base

    def get(self, path: str) -> Any:
        return self.http.get(path)

    def csrf(self, path: str = "/") -> str:
        found = re.search(r'name="csrf-token" content="([^"]+)"', self.http.get(path).text)
        return found[1] if found else ""

    def form(self, path: str, fields: dict[str, str] | None = None, *, seen: str = "/") -> Any:
        """Send a form of the page `seen`."""
        fields = {"csrf_token": self.csrf(seen), **(fields or {})}
        return self.http.post(path, data=fields, headers={"Origin": self.origin})

    def json(self, path: str, body: Any, *, seen: str = "/") -> Any:
        """POST as a script of the page `seen` does."""
        return self.http.post(path, json=body, headers={"Origin": self.origin, "X-CSRF-Token": self.csrf(seen)})

    def judge(self, choice: str = "compare", **answer: Any) -> Any:
        """Answer the item that this browser's user has before them, +2 unless told otherwise."""
        task = self.get("/api/task").json()["task"]
        answer = {"value": 2, **answer} if choice == "compare" else answer
        key = f"submission{task['assignment_id']}"
        return self.json(
            "/api/judgments", {"assignment_id": task["assignment_id"], "submission_id": key, "choice": choice, **answer}
        )


class Web:
    """One project; `settings` are keys of the configuration."""

    def __init__(self, folder: Path, *, serve: dict[str, Any] | None = None, **settings: Any) -> None:
        values = {"run_dir": str(folder), "repeat_fraction": 0.0, "serve": {"accounts": True, **(serve or {})}}
        self.cfg = LabelingStage.model_validate({**values, **settings})
        self.clock = Clock()
        self.store = LabelStore.open(self.cfg, self.clock)
        self.app = make_app(self.store, self.cfg)
        self.app.state.site.agreement.patience = 120.0

    def add_pairs(self, n: int, **fields: Any) -> None:
        self.store.add_items(
            Item([{"role": "user", "content": f"question {i}"}], candidates("worse", "better"), **fields)
            for i in range(n)
        )

    def browser(self, **options: Any) -> Browser:
        return Browser(self.app, **options)

    def invited(self, name: str, role: str = "annotator", **options: Any) -> Browser:
        """A browser whose user took an invite and is logged in."""
        browser, path = self.browser(**options), f"/invite/{accounts.create_invite(self.store, role, None)}"
        response = browser.form(path, {"name": name, "password": PASSWORD}, seen=path)
        where = "/admin" if role == "admin" else "/"
        assert (response.status_code, response.headers["location"]) == (303, where), response.text
        return browser


def candidates(*texts: str) -> list[Candidate]:
    return [Candidate(text, policy=f"policy-{text}") for text in texts]


def log_in(browser: Browser, name: str, password: str = PASSWORD) -> Any:
    return browser.form("/login", {"name": name, "password": password}, seen="/login")


def kinds(events: Sequence[Any]) -> list[str]:
    return [event.kind for event in events]
