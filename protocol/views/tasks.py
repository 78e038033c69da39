"""Task progress: ``/api/{app}/progress/{taskId}``. A task is a job whose kind is the app."""

from __future__ import annotations

from typing import Any, Final

import msgspec
from msgspec import UNSET

from protocol.job import Record
from protocol.update import CANCELLED, COMPLETED, FAILED, JOB_DELETED, PROCESSING, QUEUED, STALLED, Update
from protocol.view import Call, Control, Message, View, encode_safe, job_fields, one_line

PATH: Final = "/api/{app}/progress/{taskId}"

STATUSES: Final = {
    QUEUED: "pending",
    PROCESSING: "running",
    STALLED: "running",
    COMPLETED: "completed",
    FAILED: "failed",
    CANCELLED: "failed",
}

_decode = msgspec.json.Decoder(Record).decode


def _progress(update: Update) -> dict[str, Any]:
    record = _decode(update.body)
    progress: dict[str, Any] = {
        "taskId": record.job_id,
        "status": STATUSES[record.status],
        "stage": record.stage or "",
        "progress": record.progress,
        "message": record.message or "",
    }
    if record.status == STALLED:
        progress["stalled"] = True
    if record.estimated_time_remaining is not None:
        progress["estimatedTimeRemaining"] = record.estimated_time_remaining
    if record.result is not UNSET:
        progress["results"] = record.result
    error = "cancelled" if record.status == CANCELLED else one_line(record.error or "")
    if error or record.status == FAILED:
        progress["error"] = error or "the task failed"
    return progress


def _state(update: Update) -> bytes:
    return encode_safe(_progress(update))


def _messages(update: Update) -> list[Message]:
    """The progress; behind that of a failed task its error once more, for clients that listen for errors only."""
    if update.type == JOB_DELETED:
        return [_error(update, "the task was deleted")]
    progress = _progress(update)
    message = {"type": "progress", "taskId": update.job_id, "progress": progress, "timestamp": update.at_ms}
    first = Message(encode_safe(message))
    return [first, _error(update, progress["error"])] if progress["status"] == "failed" else [first]


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
        "connected": Control({"taskId": "id", "timestamp": "now"}),
        "heartbeat": Control({"taskId": "id", "timestamp": "now"}),
        "error": Control({"taskId": "id", "code": "code", "message": "message", "timestamp": "now"}),
    },
    unix_ms=True,
    render=_messages,
    state=_state,
    headers={"X-Task-Status": "status", "X-Task-Progress": "progress", "X-Task-Stage": "stage"},
    fields=job_fields({"results": "result"}),
    statuses={"pending": QUEUED, "running": PROCESSING, "completed": COMPLETED, "failed": FAILED},
    not_found="task_not_found",
)
