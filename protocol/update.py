"""The two values everything else passes around: one accepted update, and the state of one job.

Both are msgspec structs outside the garbage collector: they hold no cycles, there may be a million of them, and a
collection that does not have to visit them is one that nobody notices. They are packed as arrays (the file of sqlite
has them so): a new field goes to the end, with a default. A job with a record of 307 bytes takes 974 bytes in all
(tracemalloc, CPython 3.11: structs, texts, and its places in ``Jobs``).
"""

from __future__ import annotations

from datetime import UTC, datetime
from functools import lru_cache
from typing import Final

import msgspec

QUEUED: Final = "queued"
PROCESSING: Final = "processing"
STALLED: Final = "stalled"
COMPLETED: Final = "completed"
FAILED: Final = "failed"
CANCELLED: Final = "cancelled"

STATUSES: Final = (QUEUED, PROCESSING, STALLED, COMPLETED, FAILED, CANCELLED)
ENDED: Final = frozenset((COMPLETED, FAILED, CANCELLED))

STATUS_UPDATE: Final = "status_update"
JOB_COMPLETED: Final = "job_completed"
JOB_FAILED: Final = "job_failed"
JOB_CANCELLED: Final = "job_cancelled"
JOB_DELETED: Final = "job_deleted"
NOTIFICATION: Final = "notification"

# Any status that is not named here goes out as a plain status_update.
TYPE_OF_STATUS: Final = {COMPLETED: JOB_COMPLETED, FAILED: JOB_FAILED, CANCELLED: JOB_CANCELLED}


class Update(msgspec.Struct, array_like=True, gc=False, eq=False):
    """One entry of the log. Immutable by convention; encoded once, when it was accepted.

    Attributes:
        offset: position in the log, from 1, without gaps within an epoch.
        at_ms: when it was accepted, unix milliseconds; never lower than that of the entry before.
        type: ``status_update``, ``job_completed``, ``job_failed``, ``job_cancelled``, ``job_deleted`` or
            ``notification``.
        job_id: the job it belongs to.
        user_id: that job's owner.
        kind: the job's kind, or None.
        status: the job's status after this update (for ``job_deleted``: the last one it had).
        version: the job's version after this update (for ``job_deleted``: one more than the last).
        body: the job's record after this update as a JSON object, UTF-8, no whitespace;
            for ``job_deleted`` only ``{"jobId", "userId"}``.
        ended: a terminal status or a deletion; such an update is never conflated away.
        urgent: ended, or another status than the entry before it: never held back by a minimum interval.
        targets: whom a notification is for (see ``protocol.notice``), None for an update of a job. A notification
            has no job and no owner (empty texts), its event's name as ``kind``, and is ``ended`` and ``urgent``.
    """

    offset: int
    at_ms: int
    type: str
    job_id: str
    user_id: str
    kind: str | None
    status: str
    version: int
    body: bytes
    ended: bool
    urgent: bool
    targets: tuple[str, ...] | None = None


class Eta(msgspec.Struct, array_like=True, gc=False, frozen=True):
    """What the estimate of the remaining time is made from; see ``protocol.eta``.

    Attributes:
        at_ms: when progress last moved, unix milliseconds.
        progress: the progress it moved to.
        gained: recent percentage points, older ones fading.
        spent_ms: the milliseconds those points took, fading alike.
        done_ms: estimated completion, unix milliseconds, or None without an estimate.
    """

    at_ms: int
    progress: float
    gained: float = 0.0
    spent_ms: float = 0.0
    done_ms: int | None = None


class Link(msgspec.Struct, array_like=True, gc=False, frozen=True):
    """A part's tie to its parent.

    Attributes:
        parent_id: the parent's id.
        parent_created: the parent's first offset: a later job that reuses the parent's id is another job.
        weight: this part's share among its siblings, in millionths (see ``protocol.rollup``).
        depth: number of ancestors.
    """

    parent_id: str
    parent_created: int
    weight: int
    depth: int


class Parts(msgspec.Struct, array_like=True, gc=False, frozen=True):
    """Sums over a parent's parts; whole numbers, so that adding and removing is exact in any order.

    Attributes:
        weight: sum of the weights, in millionths; its lower 62 bits.
        weighted: sum of weight times progress, in millionths of each; likewise.
        total: number of parts.
        done: completed parts.
        failed: failed and cancelled parts.
        weight_high, weighted_high: the bits above: the largest weight makes 77 of them, and stores have 64 in a number.
    """

    weight: int = 0
    weighted: int = 0
    total: int = 0
    done: int = 0
    failed: int = 0
    weight_high: int = 0
    weighted_high: int = 0


class Private(msgspec.Struct, array_like=True, gc=False, frozen=True):
    """What the server knows about a job beyond its record.

    Attributes:
        heard: version of the last update that its publisher sent (or that the server made of a missed
            lease): it tells a lease that was renewed from one that was not.
        seq: the publisher's last ``seq`` within the attempt, -1 before the first.
        ttl: lease in seconds, or None.
        eta: state of the estimate, or None before the first progress.
        link: the tie to the parent, or None.
        parts: sums over its own parts, or None without parts.
        auto_complete: end by itself when all parts have ended.
        stall_error: the record's ``error`` was set by a missed lease and goes when the job revives.
        cancel_requested: as in the record; every answer to the publisher repeats it.
    """

    heard: int = 1
    seq: int = -1
    ttl: float | None = None
    eta: Eta | None = None
    link: Link | None = None
    parts: Parts | None = None
    auto_complete: bool = False
    stall_error: bool = False
    cancel_requested: bool = False


class Job(msgspec.Struct, array_like=True, gc=False, eq=False, frozen=True):
    """The state of one job, shown or being worked on. Replaced, never mutated.

    Attributes:
        latest: its newest update; ``latest.body`` is the record.
        created: offset of its first entry: identifies this incarnation of the id, and orders jobs by age.
        private: what is not shown.
    """

    latest: Update
    created: int
    private: Private


@lru_cache(maxsize=64)  # accepted times come in runs of the same second; a restart or a replay brings a few more
def _second(unix_s: int) -> str:
    return datetime.fromtimestamp(unix_s, UTC).isoformat()[:19]


@lru_cache(maxsize=64)  # a batch has one time of acceptance, which is in each record twice
def format_time(unix_ms: int) -> str:
    """Unix milliseconds as RFC 3339 in UTC with milliseconds: ``2025-01-31T12:00:00.250Z``."""
    seconds, millis = divmod(unix_ms, 1000)
    return f"{_second(seconds)}.{millis:03d}Z"
