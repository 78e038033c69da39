"""RQ 2 and 3: the hash of a job. It publishes nothing; Redis tells that a hash was written, or it is read in turn.

``rq:job:<id>`` has ``status`` and ``meta``, a pickle or JSON. How a job ended is in the stream ``rq:results:<id>``.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from typing import Any, Final

from protocol.queues.payload import (
    iso_ms,
    last_error,
    message_of,
    owner_at,
    percent_of,
    read_json,
    reason,
    result_of,
    stage_of,
    text,
    unpacked,
)
from protocol.queues.pickles import PickleRefusedError, read_pickle
from protocol.queues.sighting import Sighting
from protocol.update import CANCELLED, COMPLETED, ENDED, FAILED, PROCESSING, QUEUED

USER: Final = "meta.user_id"
JOB_PREFIX: Final = "rq:job:"
RESULT_PREFIX: Final = "rq:results:"
QUEUES: Final = "rq:queues"

STATUSES: Final = {
    "created": QUEUED,
    "queued": QUEUED,
    "deferred": QUEUED,
    "scheduled": QUEUED,
    "ready_to_enqueue": QUEUED,
    "rate_limited": QUEUED,
    "started": PROCESSING,
    "finished": COMPLETED,
    "failed": FAILED,
    "stopped": CANCELLED,
    "canceled": CANCELLED,
}


def read_job(
    job: str,
    data: Mapping[str, bytes],
    result: Mapping[str, bytes] | None,
    at_ms: int,
    user: str = USER,
    *,
    fresh: bool = True,
    results: bool = False,
) -> Sighting | None:
    """What a job's hash says; None if it is no job's, or not all of one.

    Args:
        job: the job's id.
        data: the hash ``rq:job:<id>``.
        result: the newest entry of ``rq:results:<id>``, if it was read.
        at_ms: when this was read.
        user: path to the owner's id in ``{"meta", "kwargs", "args"}``.
        fresh: whether nothing is known of it, so that its function and arguments are of interest.
        results: whether to take in what jobs return.
    """
    word = _text(data.get("status"))
    if word not in STATUSES or "created_at" not in data:
        return None
    status = STATUSES[word]
    meta = _plain(data.get("meta"))
    call = _call(data.get("data")) if fresh else None
    seen = Sighting(job=job, at_ms=at_ms, status=status)
    if isinstance(meta, Mapping):
        seen.progress, seen.message, seen.stage = percent_of(meta), message_of(meta), stage_of(meta)
    seen.begun_ms = iso_ms(_text(data.get("started_at")))
    seen.lap = _us(data.get("enqueued_at"))
    seen.worker = text(_text(data.get("worker_name")))
    told_of: dict[str, Any] = {"meta": meta}
    if call is not None:
        seen.kind = text(call[0])
        told_of |= {"args": call[2], "kwargs": call[3]}
    seen.owner = owner_at(told_of, user)
    if status in ENDED:
        seen.at_ms = iso_ms(_text(data.get("ended_at"))) or at_ms
    if status == FAILED:
        seen.error = seen.message = _error(data, result) or "failed"
    elif status == COMPLETED and results and result is not None:
        seen.result = result_of(_plain_base64(result.get("return_value")))
    return seen


def _error(data: Mapping[str, bytes], result: Mapping[str, bytes] | None) -> str | None:
    """The line of the traceback that names the exception: type and message."""
    trace = None
    if result is not None and result.get("exc_string"):
        try:
            trace = unpacked(base64.b64decode(result["exc_string"]))
        except (binascii.Error, ValueError):
            trace = None
    elif data.get("exc_info"):
        trace = unpacked(data["exc_info"])
    if trace is None:
        return None
    return reason(last_error(trace.decode("utf-8", "replace")))


def _call(data: bytes | None) -> list[Any] | None:
    """Function, instance, arguments and named arguments of a job."""
    packed = unpacked(data) if data else None
    call = _plain(packed)
    if isinstance(call, list | tuple) and len(call) == 4:
        return list(call)
    return None


def _plain(data: bytes | None) -> Any:
    """Data that was made with RQ's pickle or JSON serializer."""
    if not data:
        return None
    if data[:1] in (b"{", b"["):
        found = read_json(data)
        if found is not None:
            return found
    try:
        return read_pickle(data)
    except PickleRefusedError:
        return None


def _plain_base64(data: bytes | None) -> Any:
    try:
        return _plain(base64.b64decode(data)) if data else None
    except (binascii.Error, ValueError):
        return None


def _text(value: bytes | None) -> str:
    return value.decode("utf-8", "replace") if value else ""


def _us(value: bytes | None) -> int | None:
    """Microseconds: two attempts can begin within a millisecond."""
    written = _text(value)
    millis = iso_ms(written)
    if millis is None or millis < 0:
        return None
    fraction = written.rpartition(".")[2].rstrip("Z")
    return millis * 1000 + (int(fraction) % 1000 if fraction.isdecimal() and len(fraction) == 6 else 0)
