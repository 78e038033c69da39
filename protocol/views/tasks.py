"""Task progress: ``/api/{app}/progress/{taskId}``. A task is a job whose kind is the app."""

from __future__ import annotations

from typing import Any, Final, Literal

import msgspec
from msgspec import UNSET

from protocol.job import Record
from protocol.update import CANCELLED, COMPLETED, FAILED, JOB_DELETED, PROCESSING, QUEUED, STALLED, Update
from protocol.view import Call, Control, Message, View, encode_safe, job_fields, one_line

PATH: Final = "/api/{app}/progress/{taskId}"

STATUSES: Final[dict[str, Literal["pending", "running", "completed", "failed"]]] = {
    QUEUED: "pending",
    PROCESSING: "running",
    STALLED: "running",
    COMPLETED: "completed",
    FAILED: "failed",
    CANCELLED: "failed",
}

_decode = msgspec.json.Decoder(Record).decode


class Progress(msgspec.Struct, rename="camel", omit_defaults=True, kw_only=True):
    """A task's state. A stalled one is running, a cancelled one failed."""

    task_id: str
    status: Literal["pending", "running", "completed", "failed"]
    stage: str
    progress: int | float
    message: str
    stalled: bool = False
    estimated_time_remaining: int | float | None = None
    results: Any = UNSET
    error: str | None = None


def _progress(update: Update) -> Progress:
    record = _decode(update.body)
    error = "cancelled" if record.status == CANCELLED else one_line(record.error or "")
    return Progress(
        task_id=record.job_id,
        status=STATUSES[record.status],
        stage=record.stage or "",
        progress=record.progress,
        message=record.message or "",
        stalled=record.status == STALLED,
        estimated_time_remaining=record.estimated_time_remaining,
        results=record.result,
        error=error or ("the task failed" if record.status == FAILED else None),
    )


def _state(update: Update) -> bytes:
    return encode_safe(_progress(update))


def _messages(update: Update) -> list[Message]:
    """The progress; behind that of a failed task its error once more, for clients that listen for errors only."""
    if update.type == JOB_DELETED:
        return [_error(update, "the task was deleted")]
    progress = _progress(update)
    message = {"type": "progress", "taskId": update.job_id, "progress": progress, "timestamp": update.at_ms}
    first = Message(encode_safe(message))
    return [first, _error(update, progress.error or "")] if progress.status == "failed" else [first]


def _error(update: Update, message: str) -> Message:
    return Message(
        encode_safe({"type": "error", "taskId": update.job_id, "message": message, "timestamp": update.at_ms})
    )


VIEW: Final = View(
    name="tasks",
    noun="task",
    calls=(
        Call("GET", PATH, "stream"),
        Call("HEAD", PATH, "head"),
        Call("POST", PATH, "create"),
        Call("PATCH", PATH, "update"),
        Call("POST", PATH + "/complete", "update", {"status": COMPLETED}),
        Call("POST", PATH + "/fail", "update", {"status": FAILED}),
        Call("GET", "/api/{app}/health", "health"),
    ),
    variable="taskId",
    kind="{app}",
    controls={
        "connected": Control({"taskId": "id", "timestamp": "now", "live": "live"}),
        "heartbeat": Control({"taskId": "id", "timestamp": "now", "live": "live"}),
        "error": Control({"taskId": "id", "code": "code", "message": "message", "timestamp": "now"}),
    },
    unix_ms=True,
    render=_messages,
    state=_state,
    shape=Progress,
    headers={"X-Task-Status": "status", "X-Task-Progress": "progress", "X-Task-Stage": "stage"},
    fields=job_fields({"results": "result"}),
    statuses={"pending": QUEUED, "running": PROCESSING, "completed": COMPLETED, "failed": FAILED},
    not_found="task_not_found",
)
