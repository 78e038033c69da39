"""Celery: what its result backend publishes of each task, and what its workers tell of them (``-E``); both merged.

Each is in order of itself, and neither counts attempts but for ``retries`` in some messages. So attempts are counted
along each of the two, and what one says of an attempt that the other is past is late.
"""

from __future__ import annotations

import ast
import base64
import binascii
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal

import msgspec

from protocol.queues.payload import (
    MAX_READ,
    iso_ms,
    message_of,
    owner_at,
    percent_of,
    read_json,
    reason,
    result_of,
    stage_of,
    text,
)
from protocol.queues.sighting import Known, Sighting
from protocol.update import CANCELLED, COMPLETED, ENDED, FAILED, PROCESSING, QUEUED

USER: Final = "kwargs.user_id"
RESULT_PREFIX: Final = "celery-task-meta-"
EVENT_MARK: Final = ".celeryev/"
HEARTBEATS: Final = frozenset(("worker-heartbeat", "worker-online"))
GOODBYE: Final = "worker-offline"

# States of the result backend; any other is one that the task made up, such as PROGRESS.
STATES: Final = {
    "PENDING": QUEUED,
    "RECEIVED": QUEUED,
    "STARTED": PROCESSING,
    "RETRY": QUEUED,
    "SUCCESS": COMPLETED,
    "FAILURE": FAILED,
    "REJECTED": FAILED,
    "IGNORED": COMPLETED,
    "REVOKED": CANCELLED,
}
# Events about a task; any other ``task-…`` is one that the task sends itself.
EVENTS: Final = {
    "task-sent": QUEUED,
    "task-received": QUEUED,
    "task-started": PROCESSING,
    "task-retried": QUEUED,
    "task-succeeded": COMPLETED,
    "task-failed": FAILED,
    "task-rejected": FAILED,
    "task-revoked": CANCELLED,
}
_RETRIED: Final = frozenset(("RETRY", "task-retried"))
_ANNOUNCED: Final = frozenset(("task-sent", "task-received"))
# How the JSON of a result begins. What a task returned comes next, and may be of any size.
_HEAD: Final = re.compile(rb'\s*\{\s*"status"\s*:\s*"([^"\\]{1,100})"')
# Of one argument list, as text; longer ones are not looked into.
_MAX_REPR: Final = 16 * 1024
# Of an exception's arguments so many are told, and of its name so many letters where the rest cannot be read.
_MAX_ARGUMENTS: Final = 8
_MAX_NAME: Final = 100
# Numbers as arguments of exceptions.
_MAX_SHOWN: Final = 10**30
# Tasks whose attempts are counted; the longest unheard go first.
MAX_COUNTED: Final = 100_000


class Told(msgspec.Struct, gc=False):
    """One thing that was said about a task.

    Attributes:
        by: where: ``results`` or ``events``.
        word: the state or the type of the event.
        retries: how often it was tried before, None if it does not say.
        seen: the rest.
    """

    by: Literal["results", "events"]
    word: str
    retries: int | None
    seen: Sighting


class Beat(msgspec.Struct, gc=False):
    """A worker's sign of life, or its goodbye."""

    worker: str
    leaves: bool


def read_result(
    data: bytes | str, at_ms: int, user: str = USER, *, results: bool = False, large: str = ""
) -> Told | None:
    """What is published on ``celery-task-meta-<id>``, or kept under that key; None if it cannot be read.

    Args:
        data: JSON.
        at_ms: when it was heard.
        user: path to the owner's id in ``{"kwargs", "args", "result"}``.
        results: whether to take in what tasks return.
        large: the task's id, for data of more than ``MAX_READ`` bytes: of that only the state is read.
    """
    if large and len(data) > MAX_READ and isinstance(data, bytes):
        head = _HEAD.match(data)
        document = {"task_id": large, "status": head[1].decode("utf-8", "replace")} if head else None
    else:
        document = read_json(data)
    if not isinstance(document, Mapping):
        return None
    task, state, report = document.get("task_id"), document.get("status"), document.get("result")
    if not isinstance(task, str) or not task or not isinstance(state, str):
        return None
    custom = state not in STATES
    seen = Sighting(job=task, at_ms=at_ms, status=STATES.get(state, PROCESSING), kind=text(document.get("name")))
    if seen.status in ENDED:
        seen.at_ms = iso_ms(document.get("date_done")) or at_ms
    if custom:
        seen.progress, seen.message, seen.stage = percent_of(report), message_of(report), stage_of(report)
        if seen.stage is None and state != "PROGRESS":
            seen.stage = text(state)
    elif state == "RETRY":
        seen.message = _exception_text(report) or "retry"
        seen.again = True
    elif seen.status in (FAILED, CANCELLED):
        seen.message = _exception(report)
        seen.error = (seen.message or "failed") if seen.status == FAILED else None
    elif seen.status == COMPLETED and results:
        seen.result = result_of(report)
    if state == "STARTED" and isinstance(report, Mapping):
        seen.worker = text(report.get("hostname"))
    seen.worker = seen.worker or text(document.get("worker"))
    told_of = {"kwargs": document.get("kwargs"), "args": document.get("args"), "result": report if custom else None}
    seen.owner = owner_at(told_of, user)
    return Told("results", state, _retries(document.get("retries")), seen)


def read_events(data: bytes | str, at_ms: int, user: str = USER) -> list[Told | Beat]:
    """What is published on ``/<db>.celeryev/…``: an event, or a list of them, in an envelope. Only JSON is read."""
    envelope = read_json(data)
    if not isinstance(envelope, Mapping) or envelope.get("content-type") != "application/json":
        return []
    body = envelope.get("body")
    properties = envelope.get("properties")
    if not isinstance(body, str) or not isinstance(properties, Mapping):
        return []
    content: bytes | str = body
    if properties.get("body_encoding") == "base64":
        try:
            content = base64.b64decode(body)
        except (binascii.Error, ValueError):
            return []
    document = read_json(content)
    events = document if isinstance(document, list) else [document]
    found = (_event(event, at_ms, user) for event in events if isinstance(event, Mapping))
    return [one for one in found if one is not None]


def _event(event: Mapping[str, Any], at_ms: int, user: str) -> Told | Beat | None:
    kind, task, worker = event.get("type"), event.get("uuid"), text(event.get("hostname"))
    if not isinstance(kind, str):
        return None
    if worker is not None and (kind in HEARTBEATS or kind == GOODBYE):
        return Beat(worker, kind == GOODBYE)
    if not kind.startswith("task-") or not isinstance(task, str) or not task:
        return None
    stamp = event.get("timestamp")
    if kind not in _RETRIED and isinstance(stamp, int | float) and 0 < stamp < 1e11:
        at_ms = int(stamp * 1000)
    seen = Sighting(job=task, at_ms=at_ms, status=EVENTS.get(kind), kind=text(event.get("name")))
    if kind not in EVENTS:
        seen.status = PROCESSING
        seen.progress, seen.message, seen.stage = percent_of(event), message_of(event), stage_of(event)
    elif kind == "task-retried":
        seen.message, seen.again = _from_repr(event.get("exception")) or "retry", True
    elif seen.status == FAILED:
        seen.error = seen.message = _named(event.get("exception")) or "failed"
    elif kind == "task-revoked":
        seen.message = f"TaskRevokedError: {_why_revoked(event)}"
    if kind == "task-started":
        seen.worker = worker
    if kind in _ANNOUNCED:
        told_of = {"kwargs": _literal(event.get("kwargs")), "args": _literal(event.get("args"))}
        seen.owner = owner_at(told_of, user)
        seen.run_at_ms = iso_ms(event.get("eta"))
    return Told("events", kind, _retries(event.get("retries")), seen)


def _why_revoked(event: Mapping[str, Any]) -> str:
    """The word that the result has for it, which may be published before this or after."""
    return "terminated" if event.get("terminated") else "expired" if event.get("expired") else "revoked"


class Attempts:
    """Counts the attempts of tasks along what results and what events say.

    It may forget, or begin in the middle, as another node does: then both are at the record's attempt.
    """

    def __init__(self) -> None:
        self._counts: OrderedDict[str, list[int]] = OrderedDict()

    def place(self, known: Known | None, told: Told) -> Sighting | None:
        """The sighting with its attempt; None if it is about one that is over."""
        seen, status = told.seen, told.seen.status
        current = 0 if known is None else known.attempt
        counts = self._counts.get(seen.job)
        fresh = counts is None
        if counts is None:
            counts = self._counts[seen.job] = [max(1, current), max(1, current)]
            if len(self._counts) > MAX_COUNTED:
                self._counts.popitem(last=False)
        else:
            self._counts.move_to_end(seen.job)
        if told.word in _ANNOUNCED:
            seen.attempt = (told.retries or 0) + 1
            return seen
        side = 0 if told.by == "results" else 1
        if told.retries is not None:
            counts[side] = max(counts[side], told.retries + 1)
        if told.word in _RETRIED:
            waits = fresh and known is not None and known.status == QUEUED and current > 1
            if told.retries is not None:
                counts[side] = told.retries + 2
            elif not waits:  # else it is what the other one has announced already
                counts[side] += 1
        if known is not None and known.lost:
            return seen
        if status in ENDED and side == 0:
            return seen  # nothing comes after it
        seen.attempt = counts[side]
        if known is not None and known.status in ENDED and seen.attempt == current and status == PROCESSING:
            # A task that begins anew after its end was delivered twice. Events come late; results do not.
            seen.attempt = current + 1 if side == 0 and told.word == "STARTED" else seen.attempt
            counts[0] = max(counts[0], seen.attempt)
        return seen

    def forget(self, task: str) -> None:
        """The task has ended."""
        self._counts.pop(task, None)


def _exception(report: object) -> str | None:
    """``type: message`` of what a result backend says of an exception."""
    if not isinstance(report, Mapping):
        return reason(report)
    words = _exception_text(report)
    name = text(report.get("exc_type"))
    if name is None:
        return words
    return text(name if words is None else f"{name}: {words}")


def _exception_text(report: object) -> str | None:
    if not isinstance(report, Mapping):
        return None
    message = report.get("exc_message")
    return _joined(message) if isinstance(message, list) else reason(message)


def _joined(arguments: Sequence[object]) -> str | None:
    """What an exception was given, as one text."""
    words = (reason(_word(argument)) for argument in arguments[:_MAX_ARGUMENTS])
    return text(" ".join(word for word in words if word is not None))


def _call(value: object) -> tuple[str, str | None] | None:
    """Name and arguments of what ``repr`` makes of an exception, such as ``ValueError('bad')``."""
    if not isinstance(value, str) or len(value) > _MAX_REPR:
        return None
    name, bracket, rest = value.partition("(")
    if not bracket or not rest.endswith(")") or not name.replace(".", "").replace("_", "").isalnum():
        return None
    given = rest[:-1].rstrip(",")
    arguments = _literal(f"({given},)") if given else ()
    return (name, _joined(arguments)) if isinstance(arguments, tuple) else None


def _word(value: object) -> str | None:
    """A text, or a number as one; None for what is neither, or a number that is too long to be read."""
    if isinstance(value, int) and abs(value) >= _MAX_SHOWN:
        return None
    return str(value) if isinstance(value, str | int | float) else None


def _from_repr(value: object) -> str | None:
    found = _call(value)
    return _unread(value) if found is None else found[1]


def _named(value: object) -> str | None:
    found = _call(value)
    if found is None:
        return _unread(value)
    return text(found[0] if found[1] is None else f"{found[0]}: {found[1]}")


def _unread(value: object) -> str | None:
    """What may be shown of a ``repr`` that is of no form we know: with lines in it, only what it is called."""
    if isinstance(value, str) and "\\n" in value:
        return text(value.partition("(")[0][:_MAX_NAME])
    return reason(value)


def _literal(value: object) -> Any:
    """What arguments were, as far as ``repr`` tells; it cuts long ones short, and those cannot be read."""
    if not isinstance(value, str) or len(value) > _MAX_REPR:
        return None
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None


def _retries(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 31 else None
