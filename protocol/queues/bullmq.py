"""BullMQ 4 to 6: the stream of a queue's events, and the hashes of its jobs.

The stream is ``<prefix>:<queue>:events``, an entry's fields are ``event``, ``jobId`` and what belongs to the event. It
names no user and no time: the time is in the entry's id, the user in the job's hash ``<prefix>:<queue>:<id>``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from protocol.queues.payload import failure, message_of, owner_at, percent_of, read_json, result_of, stage_of, text
from protocol.queues.sighting import RETRY, Sighting
from protocol.update import CANCELLED, COMPLETED, FAILED, PROCESSING, QUEUED

PREFIX: Final = "bull"
USER: Final = "data.userId"
# Fields of a job's hash that say whose it is, what kind it is, and which job of a flow waits for it.
DESCRIBES: Final = ("name", "data", "parent")

# Fields of it that say how far the job is. What else there is, data, options, traces, may be of any size.
TELLS: Final = (
    "timestamp", "delay", "processedOn", "finishedOn", "progress", "failedReason", "ats", "atm", "attemptsMade",
)  # fmt: skip

# What an event makes of a job; those that are not here say nothing about one (drained, paused, duplicated…).
EVENTS: Final[dict[str, str | None]] = {
    "added": QUEUED,
    "waiting": QUEUED,
    "waiting-children": QUEUED,
    "prioritized": QUEUED,
    "delayed": QUEUED,
    "active": PROCESSING,
    "progress": None,
    "completed": COMPLETED,
    "failed": FAILED,
    "removed": CANCELLED,
    "stalled": QUEUED,
}
# The places of a queue in which a job's id can be, and what that makes of it. Each is ``<prefix>:<queue>:<place>``.
PLACES: Final[dict[str, str]] = {
    "active": PROCESSING,
    "wait": QUEUED,
    "paused": QUEUED,
    "prioritized": QUEUED,
    "delayed": QUEUED,
    "waiting-children": QUEUED,
    "completed": COMPLETED,
    "failed": FAILED,
}
_NAMELESS: Final = "__default__"


def seq_of(entry_id: str) -> int:
    """An entry's id as one number in the same order. Raises ValueError for what is no id."""
    time, _, number = entry_id.partition("-")
    return (int(time) << 20) + min(int(number or 0), (1 << 20) - 1)


def stream_key(prefix: str, queue: str) -> str:
    """Where a queue's events are."""
    return f"{prefix}:{queue}:events"


def job_key(prefix: str, queue: str, job: str) -> str:
    """Where a job's hash is."""
    return f"{prefix}:{queue}:{job}"


def read_event(queue: str, entry_id: str, fields: Mapping[str, str], *, results: bool = False) -> Sighting | None:
    """What an entry says of a job; None if it is about none.

    Args:
        queue: the queue's name.
        entry_id: the entry's.
        fields: the entry's.
        results: whether to take in what jobs return.
    """
    event, job = fields.get("event", ""), fields.get("jobId", "")
    if event not in EVENTS or not job:
        return None
    try:
        seq = seq_of(entry_id)
    except ValueError:
        return None
    seen = Sighting(job=job, queue=queue, at_ms=seq >> 20, seq=seq, status=EVENTS[event])
    if event == "progress":
        _take_report(seen, read_json(fields.get("data")))
    elif event == "delayed":
        seen.run_at_ms, seen.taken_back = _ms(fields.get("delay")), RETRY
    elif event == "prioritized":
        seen.taken_back = RETRY
    elif event == "waiting" and fields.get("prev") == "active":
        seen.message, seen.again = RETRY, True
    elif event == "stalled":
        seen.message, seen.again = "stalled", True
    elif event == "failed":
        seen.error = seen.message = failure(fields.get("failedReason"))
    elif event == "completed" and results:
        seen.result = result_of(read_json(fields.get("returnvalue")))
    elif event == "removed":
        seen.removed = True
    elif event == "added":
        seen.kind = kind_of(fields.get("name"), queue)
    return seen


def describe(seen: Sighting, job: Mapping[str, str], user: str, prefix: str = PREFIX) -> None:
    """Add what the job's hash says of owner, kind and parent; ``user`` is a path into ``{"data", "name"}``."""
    seen.owner = owner_at({"data": read_json(job.get("data")), "name": job.get("name")}, user)
    seen.kind = kind_of(job.get("name"), seen.queue)
    seen.parent = _parent_of(job.get("parent"), prefix)


def _parent_of(value: str | None, prefix: str) -> tuple[str, str] | None:
    parent = read_json(value)
    if not isinstance(parent, dict):
        return None
    key, job = parent.get("queueKey"), parent.get("id")
    if not isinstance(key, str) or not key.startswith(f"{prefix}:") or not isinstance(job, str) or not job:
        return None
    return key[len(prefix) + 1 :], job


def read_hash(queue: str, job: str, data: Mapping[str, str], place: str, seq: int, *, results: bool) -> Sighting:
    """What a job's hash says, when events were missed.

    Args:
        queue, job: whose it is.
        data: the hash.
        place: in which of ``PLACES`` the job is.
        seq: of the newest event that there was before the hash was read; 0 in a queue without.
        results: whether to take in what jobs return.
    """
    status = PLACES[place]
    started = _count(data.get("ats", data.get("attemptsMade", data.get("atm"))))
    seen = Sighting(job=job, queue=queue, at_ms=_time_of(data, status), seq=seq or None, status=status)
    _take_report(seen, read_json(data.get("progress")))
    seen.begun_ms = _ms(data.get("processedOn"))
    seen.taken_back = RETRY if status == QUEUED else None
    if "ats" in data:
        seen.attempt = max(1, started + 1 if status == QUEUED else started)
    else:
        # It counts the attempts that are over: one that failed for good is among them.
        seen.attempt = max(1, started + (status not in (COMPLETED, FAILED)) if started else 1)
    if status == FAILED:
        seen.error = seen.message = failure(data.get("failedReason"))
    elif status == COMPLETED and results:
        seen.result = result_of(read_json(data.get("returnvalue")))
    if place == "delayed":
        added, delay = _ms(data.get("timestamp")), _ms(data.get("delay"))
        seen.run_at_ms = None if added is None or delay is None else added + delay
    return seen


def kind_of(name: str | None, queue: str) -> str | None:
    """A job's kind: its name, or that of its queue."""
    return text(queue if not name or name == _NAMELESS else name)


def _take_report(seen: Sighting, report: Any) -> None:
    seen.progress = percent_of(report)
    seen.message = message_of(report)
    seen.stage = stage_of(report)


def _time_of(data: Mapping[str, str], status: str) -> int:
    names = {PROCESSING: ("processedOn",), COMPLETED: ("finishedOn",), FAILED: ("finishedOn",)}
    for name in (*names.get(status, ()), "timestamp"):
        found = _ms(data.get(name))
        if found is not None:
            return found
    return 0


def _ms(value: str | None) -> int | None:
    try:
        found = int(float(value)) if value else -1
    except (ValueError, OverflowError):
        return None
    return found if 0 <= found < 1 << 43 else None


def _count(value: str | None) -> int:
    return int(value) if value and value.isdecimal() and len(value) < 10 else 0
