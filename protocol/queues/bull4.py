"""Bull 3 and 4: what a queue publishes, and nothing keeps. The hashes of jobs are like BullMQ's.

Channels are ``<prefix>:<queue>:<event>``, with ``@<token>`` behind it for some events, so the queue is known by the
rest. A message is JSON with ``jobId`` or the bare id; ``delayed`` carries only a time: which job it was must be read
from the queue.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from protocol.queues.bullmq import EVENTS
from protocol.queues.payload import failure, message_of, percent_of, read_json, result_of, stage_of
from protocol.queues.sighting import RETRY, Sighting

TAKEN: Final = frozenset(("waiting", "active", "progress", "completed", "failed", "stalled", "removed"))
# Some job is waiting for its time now.
UNNAMED: Final = "delayed"


def split_channel(prefix: str, channel: str) -> tuple[str, str] | None:
    """Queue and event of a channel; None if it is no queue's."""
    if not channel.startswith(f"{prefix}:"):
        return None
    queue, colon, event = channel[len(prefix) + 1 :].rpartition(":")
    event = event.partition("@")[0]
    return (queue, event) if colon and queue and (event in TAKEN or event == UNNAMED) else None


def read_message(queue: str, event: str, data: str, at_ms: int, *, results: bool = False) -> Sighting | None:
    """What a message says of a job; None if it is about none, or not in the form it should have."""
    if event not in TAKEN:
        return None
    document = read_json(data) if data.startswith("{") else {"jobId": data}
    if not isinstance(document, Mapping):
        return None
    job = document.get("jobId")
    if isinstance(job, int) and not isinstance(job, bool):
        job = str(job)
    if not isinstance(job, str) or not job:
        return None
    seen = Sighting(job=job, queue=queue, at_ms=at_ms, status=EVENTS[event])
    if event == "progress":
        report = document.get("progress")
        seen.progress, seen.message, seen.stage = percent_of(report), message_of(report), stage_of(report)
    elif event == "failed":
        seen.error = seen.message = failure(document.get("val"))
    elif event == "completed" and results:
        value = document.get("val")
        seen.result = result_of(read_json(value) if isinstance(value, str) else value)
    elif event == "waiting":
        seen.taken_back = RETRY
    elif event == "stalled":
        seen.message, seen.again = "stalled", True
    elif event == "removed":
        seen.removed = True
    return seen
