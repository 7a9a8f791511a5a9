"""The JSON routes of the labeling page. What goes wrong is {"error", "fix"}, with HTTP's status."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from reward_model.labeling.access import Annotator, Site, SiteOf
from reward_model.labeling.records import STRONGEST, Answer
from reward_model.labeling.rendering import task_json
from reward_model.labeling.store import Task

router = APIRouter(prefix="/api")

Id = Annotated[int, Field(ge=1, lt=2**31)]
MAX_ACTIVE_MS = 24 * 3_600_000


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Submission(_Body):
    """One answer, in the shown orientation; see `records.Answer`.

    `submission_id` is the browser's, one per click. It has no hyphen: the server's own ("undo-7") do, and who sent one
    of those in advance would keep others from undoing.
    """

    assignment_id: Id
    submission_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9]{8,64}$")]
    choice: Literal["compare", "rank", "both_bad", "skip", "flag"]
    value: Annotated[int, Field(ge=-STRONGEST, le=STRONGEST)] | None = None
    ranks: Annotated[list[Annotated[int, Field(ge=1, le=100)]], Field(max_length=100)] | None = None
    confidence: Annotated[int, Field(ge=1, le=5)] | None = None
    # No database stores a null character as text, and nobody types one.
    notes: Annotated[str, Field(max_length=2000, pattern=r"^[^\x00]*$")] = ""
    ms_active: Annotated[int, Field(ge=0, le=MAX_ACTIVE_MS)] = 0

    def answer(self) -> Answer:
        """Without the ids."""
        return Answer(self.choice, self.value, self.ranks, self.confidence, self.notes, self.ms_active)


class Lease(_Body):
    """An item that is before its annotator."""

    assignment_id: Id


class Nothing(_Body):
    """An empty body, {}."""


@router.get("/task")
def task(site: SiteOf, visitor: Annotator) -> JSONResponse:
    """The item that the visitor has, or else the next one."""
    return JSONResponse(_state(site, visitor.user_id, site.store.next_task(visitor.user_id)))


@router.post("/judgments")
def judge(site: SiteOf, visitor: Annotator, body: Submission) -> JSONResponse:
    """Store an answer, then hand out the next item; only now the policies' names are told."""
    receipt, following = site.store.submit_and_next(
        visitor.user_id, body.assignment_id, body.answer(), body.submission_id
    )
    stored = {"judgment_id": receipt.judgment_id, "repeated": receipt.repeated, "policies": receipt.policies}
    return JSONResponse(stored | _state(site, visitor.user_id, following))


@router.post("/undo")
def undo(site: SiteOf, visitor: Annotator, body: Nothing) -> JSONResponse:
    """Withdraw the visitor's last answer; its item comes back."""
    return JSONResponse(_state(site, visitor.user_id, site.store.undo(visitor.user_id)))


@router.post("/renew")
def renew(site: SiteOf, visitor: Annotator, body: Lease) -> JSONResponse:
    """The visitor is still at work on the item."""
    return JSONResponse({"lease_expires_ms": site.store.renew(visitor.user_id, body.assignment_id)})


def _state(site: Site, user_id: int, task: Task | None) -> dict[str, Any]:
    progress = site.store.progress(user_id)
    return {"task": task_json(task) if task else None, "progress": asdict(progress), "paused": progress.paused}
