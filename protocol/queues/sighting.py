"""From what a queue said of a job to an update of it: attempts, what comes late, and what brings nothing new.

A queue says what happens, again and again and at times twice or in another order; a record has rules (see
``protocol.job``). In between stands what is known of the job, which is always its record: nothing here is kept
anywhere else, so another node goes on from it.

``seq`` makes each thing count once. A source with numbered events (BullMQ) gives it theirs: one that is not higher than
the record's was taken in before. For the others it is the record's plus one: of two nodes that take in the same thing
from the same state, one is a repetition.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from functools import lru_cache
from hashlib import blake2b
from typing import Any, Final, Literal, TypeVar, cast

import msgspec
from msgspec import UNSET, Raw, UnsetType

from protocol.fields import Fields, is_id
from protocol.job import Record, record_of
from protocol.queues.payload import reserved_owner, text
from protocol.update import COMPLETED, ENDED, FAILED, PROCESSING, QUEUED, STALLED, STATUSES, Job, format_time

# The error of a job whose worker was not heard of any more, as the server gives it when a lease runs out twice.
LOST: Final = "lost"
RETRY: Final = "retry"

_END_MS: Final = 253_402_300_800_000  # of the year 9999
_MAX_HELD: Final = 128
_UNFIT: Final = re.compile(r"[^A-Za-z0-9_.:@-]")


class Sighting(msgspec.Struct, kw_only=True, gc=False):
    """What a queue says of one job at one moment. None: it does not say.

    Attributes:
        job: the job's id in the queue's own words.
        queue: the queue's name, "" where ids are unique over all queues.
        at_ms: when, unix milliseconds.
        status: as in records.
        progress: 0 to 100.
        stage, message, error, worker, kind: texts as they go into the record.
        result: encoded, only if results are wanted.
        owner: the id of its owner.
        run_at_ms: when it is to begin.
        begun_ms: when a worker began with it, where something that comes after that says so.
        attempt: which attempt this is about, where the queue counts them: what is about an earlier one is late.
        again: if nothing is known of the job: this is not its first attempt.
        taken_back: the message if a worker has had it until now.
        seq: the number of the event, in a source that numbers them.
        lap: when this attempt was put into the queue, in microseconds, where that is what tells attempts apart.
        removed: it is gone from the queue: an unknown job does not come into being by that.
        parent: queue and id of the job that waits for this one.
        unsure: it may be older than what was told before it: no reason to take progress back.
    """

    job: str
    queue: str = ""
    at_ms: int
    status: str | None = None
    progress: float | None = None
    stage: str | None = None
    message: str | None = None
    error: str | None = None
    worker: str | None = None
    kind: str | None = None
    result: Raw | None = None
    owner: str | None = None
    run_at_ms: int | None = None
    begun_ms: int | None = None
    attempt: int | None = None
    again: bool = False
    taken_back: str | None = None
    seq: int | None = None
    lap: int | None = None
    removed: bool = False
    parent: tuple[str, str] | None = None
    unsure: bool = False


class Known(msgspec.Struct, kw_only=True, gc=False):
    """What is known of a job: its record, as far as it matters here."""

    owner: str
    status: str = QUEUED
    attempt: int = 1
    progress: float = 0
    stage: str | None = None
    message: str | None = None
    error: str | None = None
    worker: str | None = None
    started: bool = False
    leased: bool = False
    seq: int = -1
    metadata: Raw | UnsetType = UNSET

    @property
    def begun(self) -> bool:
        """Whether a worker has it now, or had it until it fell silent."""
        return self.status == PROCESSING or (self.status == STALLED and self.started)

    @property
    def lost(self) -> bool:
        """Whether it ended only because nothing was heard of its worker."""
        return self.status == FAILED and self.error == LOST


def known_of(job: Job, record: Record | None = None) -> Known:
    """What a job's state says; ``record`` is its record, if that was read already."""
    record = record or record_of(job)
    return Known(
        owner=record.user_id,
        status=record.status,
        attempt=record.attempt,
        progress=record.progress,
        stage=record.stage,
        message=record.message,
        error=record.error,
        worker=record.worker_id,
        started=record.started_at is not None,
        leased=job.private.ttl is not None,
        seq=job.private.seq,
        metadata=record.metadata,
    )


def job_id(queue: str, job: str, prefix: str = "") -> str:
    """The id of a job's record: its own, behind the queue's name where each queue counts for itself.

    What an id may not have is replaced, and then a digest keeps it apart from others. In front of all stands the
    prefix, which keeps sources apart that have the same ids.
    """
    return (_same_id if len(job) <= _MAX_HELD else _id)(queue, job, prefix)


def _id(queue: str, job: str, prefix: str) -> str:
    name = _name(queue, job, prefix)
    if is_id(name):
        return name
    digest = blake2b(name.encode("utf-8", "replace"), digest_size=8).hexdigest()
    return f"{_UNFIT.sub('-', name)[:100]}.{digest}"


# Of a job there are many events, and each asks for its id several times.
_same_id = lru_cache(maxsize=4096)(_id)


def _name(queue: str, job: str, prefix: str) -> str:
    return f"{prefix}{queue}:{job}" if queue else f"{prefix}{job}"


def settle(known: Known | None, seen: Sighting, source: str, prefix: str = "") -> Fields | None:
    """The update that a sighting comes to, or None if there is nothing new in it.

    Args:
        known: what is known of the job; None if it has no record.
        seen: what its queue says.
        source: the name of the source: it owns what has no owner.
        prefix: of the ids of its jobs.
    """
    if known is None:
        return None if seen.removed else _first(seen, source, prefix)
    seq = _seq(known, seen)
    if seq is None:
        return None
    new = _is_new_attempt(known, seen)
    if new is None:
        return None
    fields = _told(seen)
    fields.seq = seq
    if seen.run_at_ms is not None and not known.started:
        _put_off(fields, known.metadata, seen.run_at_ms)
    if seen.owner is not None and seen.owner != known.owner:
        fields.user_id = seen.owner
    if new:
        fields.attempt = max(seen.attempt or 0, known.attempt + 1)
        fields.status = _status(seen.status or PROCESSING)
        if fields.progress is UNSET:
            fields.progress = known.progress
        if seen.message is None:
            fields.message = seen.taken_back if known.begun else None
    else:
        before = known.progress
        if seen.progress is not None and seen.progress < before:
            if known.attempt > 1 and not seen.unsure:
                fields.reset = True
            else:
                fields.progress = UNSET
        if known.attempt > 1 and known.status == QUEUED and seen.status == PROCESSING and seen.message is None:
            fields.message = None  # why it came back is over
        if seen.seq is None and not _says_more(known, fields):
            return None
    if known.leased:
        fields.ttl = None
    return fields


def skipped(known: Known | None, seen: Sighting) -> Sighting | None:
    """The step that nobody saw, if there is one: a job that waited and has ended was worked on in between."""
    if known is None or known.status != QUEUED or (seen.seq is not None and seen.seq <= known.seq):
        return None
    if seen.status != COMPLETED and (seen.status != FAILED or seen.begun_ms is None):
        return None  # it may have failed of what it waited for
    return Sighting(
        job=seen.job,
        queue=seen.queue,
        at_ms=seen.at_ms if seen.begun_ms is None else seen.begun_ms,
        status=PROCESSING,
        attempt=seen.attempt,
        lap=seen.lap,
        worker=seen.worker,
    )


def adopts(known: Known | None, seen: Sighting, source: str) -> bool:
    """Whether a job that seemed to have no owner turns out to have one.

    An owner never changes, so its record has to go, and another one takes its place: ``settle(None, inherit(…), …)``.
    """
    return (
        known is not None
        and seen.owner is not None
        and known.owner == reserved_owner(source)
        and (seen.seq is None or seen.seq > known.seq)
    )


def inherit(known: Known, seen: Sighting) -> Sighting:
    """The sighting with all that was known before it, for the first update of the record that takes the place."""
    heir = msgspec.structs.replace(seen)
    # What ended before anybody knew whose it was stays as it is.
    heir.status = known.status if known.status in ENDED else seen.status or known.status
    heir.error = known.error if known.status in ENDED else seen.error
    heir.attempt = max(seen.attempt or 1, known.attempt)
    heir.progress = known.progress if seen.progress is None else seen.progress
    heir.stage = seen.stage or known.stage
    heir.message = seen.message or known.message
    heir.worker = seen.worker or known.worker
    heir.lap = max(known.seq + 1, seen.lap or 0)
    return heir


def moved(known: Known | None, fields: Fields, source: str) -> Known:
    """What is known once this update of ``settle`` was taken."""
    after = Known(owner=reserved_owner(source)) if known is None else msgspec.structs.replace(known)
    if fields.user_id is not UNSET:
        after.owner = fields.user_id
    if fields.attempt is not UNSET and fields.attempt != after.attempt:
        after.attempt = fields.attempt
        after.error = None
    if fields.status is not UNSET:
        after.status = fields.status
    elif after.status == STALLED:
        after.status = PROCESSING
    after.started = after.started or after.status == PROCESSING or after.status in ENDED
    after.progress = 100 if after.status == COMPLETED else _or(fields.progress, after.progress)
    after.stage = _or(fields.stage, after.stage)
    after.message = _or(fields.message, after.message)
    after.error = _or(fields.error, after.error)
    after.worker = _or(fields.worker_id, after.worker)
    after.leased = after.leased and fields.ttl is UNSET
    after.seq = _or(fields.seq, after.seq)
    if fields.metadata is not UNSET:
        after.metadata = cast("Raw", fields.metadata)
    return after


def _first(seen: Sighting, source: str, prefix: str) -> Fields:
    fields = _told(seen)
    fields.user_id = seen.owner or reserved_owner(source)
    fields.status = _status(seen.status or PROCESSING)
    attempt = seen.attempt or (2 if seen.again else 1)
    if attempt > 1:
        fields.attempt = attempt
    fields.kind = seen.kind
    fields.seq = seen.seq if seen.seq is not None else seen.lap or 0
    metadata = {"source": source}
    if seen.queue:
        metadata["queue"] = seen.queue
    if not is_id(_name(seen.queue, seen.job, prefix)):
        metadata["jobId"] = text(seen.job) or ""
    if seen.parent is not None:
        metadata["parent"] = job_id(*seen.parent, prefix)
    if seen.run_at_ms is not None:
        metadata["runAt"] = format_time(seen.run_at_ms)
    _hold(fields, metadata)
    return fields


def _put_off(fields: Fields, metadata: Raw | UnsetType, run_at_ms: int) -> None:
    """It is to begin later, or at another time than was said before. Metadata are replaced as a whole."""
    found = None if metadata is UNSET else msgspec.json.decode(metadata)
    told = found if isinstance(found, dict) else {}
    run_at = format_time(run_at_ms)
    if told.get("runAt") != run_at:
        _hold(fields, told | {"runAt": run_at})


def _hold(fields: Fields, metadata: dict[str, Any]) -> None:
    # Encoded, as ``decode_fields`` leaves it.
    fields.metadata = Raw(msgspec.json.encode(metadata))  # type: ignore[assignment]


def _seq(known: Known, seen: Sighting) -> int | None:
    """The update's; None if this was taken in before."""
    if seen.seq is not None:
        return seen.seq if seen.seq > known.seq else None
    return max(known.seq + 1, seen.lap or 0)


def _is_new_attempt(known: Known, seen: Sighting) -> bool | None:
    """Whether it begins another attempt; None if it is late, and to be passed over."""
    status, ended = seen.status, known.status in ENDED
    if seen.attempt is not None:
        if seen.attempt < known.attempt:
            return None
        if seen.attempt > known.attempt:
            return True
    if seen.lap is not None and seen.lap > known.seq and (known.begun or ended) and known.seq >= 0:
        return True
    counted = seen.attempt is not None
    if known.lost:
        # Believed dead, and here it is.
        return None if seen.removed or (counted and status == QUEUED) else True
    if ended:
        return None if counted or status is None or status in ENDED else True
    if status == QUEUED and known.begun:
        return None if counted else True
    return False


def _told(seen: Sighting) -> Fields:
    """What is in a sighting, whatever is known of the job."""
    fields = Fields()
    if seen.status is not None:
        fields.status = _status(seen.status)
    if seen.progress is not None:
        fields.progress = seen.progress
    if seen.stage is not None:
        fields.stage = seen.stage
    if seen.message is not None:
        fields.message = seen.message
    if seen.error is not None:
        fields.error = seen.error
    if seen.worker is not None:
        fields.worker_id = seen.worker
    if seen.result is not None:
        fields.result = seen.result
    if 0 <= seen.at_ms < _END_MS:
        fields.timestamp = _moment(seen.at_ms)
    return fields


@lru_cache(maxsize=16)
def _moment(at_ms: int) -> datetime:
    return datetime.fromtimestamp(at_ms // 1000, UTC).replace(microsecond=at_ms % 1000 * 1000)


def _says_more(known: Known, fields: Fields) -> bool:
    """Whether an update changes anything that is shown."""
    told: tuple[tuple[object, object], ...] = (
        (fields.status, known.status),
        (fields.progress, known.progress),
        (fields.stage, known.stage),
        (fields.message, known.message),
        (fields.error, known.error),
        (fields.worker_id, known.worker),
        (fields.user_id, known.owner),
        (fields.metadata, known.metadata),
    )
    return any(value is not UNSET and value != before for value, before in told)


_Status = Literal["queued", "processing", "stalled", "completed", "failed", "cancelled"]


def _status(word: str) -> _Status:
    assert word in STATUSES
    return cast("_Status", word)


_T = TypeVar("_T")


def _or(value: _T | UnsetType, before: _T) -> _T:
    return before if isinstance(value, UnsetType) else value
