"""From sightings to the log: each is settled against the record there is, published, and waited for.

Nothing is remembered beside the records but which jobs of the source have not ended: whoever goes on, after a crash or
on another node, goes on from the same place.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Final

import msgspec
import trio
from msgspec import UNSET, Raw

from protocol.errors import ApiError
from protocol.job import Record, record_of
from protocol.queues.sighting import Known, Sighting, adopts, inherit, job_id, known_of, moved, settle, skipped
from protocol.update import ENDED, PROCESSING, STALLED, Job
from server.brokers.base import Accepted, Broker, Delete, Operation, Publish, Submission
from server.ingest.intake import AT_ONCE, Complaints, Counters, TurnLostError
from server.node import Node

# Who publishes: no id, so nobody's keys.
SUB: Final = "(queue)"
# Jobs of one source that have not ended; beyond, the longest unheard are not looked after any more.
MAX_OPEN: Final = 100_000
_AGAIN_S: Final = 0.25


_decode = msgspec.json.Decoder().decode


class Open(msgspec.Struct, gc=False):
    """A job that has not ended.

    Attributes:
        queue, job: its names there.
        processing: whether a worker has it.
        worker: which one, if it says.
        silent_since: when its worker was first found missing, in Trio's seconds; 0.0 while it is there.
    """

    queue: str
    job: str
    processing: bool = False
    worker: str | None = None
    silent_since: float = 0.0


class Taker:
    """One source's way into the log.

    Args:
        node: whose broker takes the updates.
        source: the source's name.
        prefix: of the ids of its jobs here.
        is_turn: whether it is certainly this node that takes the source in.

    Attributes:
        open: jobs that have not ended, by their ids here.
        counters: what came of it on this node.
    """

    def __init__(self, node: Node, source: str, prefix: str, is_turn: Callable[[], bool]) -> None:
        self.counters = Counters()
        self.open: dict[str, Open] = {}
        self._node = node
        self._source = source
        self._prefix = prefix
        self._is_turn = is_turn
        self._complaints = Complaints(source)

    def name(self, queue: str, job: str) -> str:
        """The id of a job of the queue here."""
        return job_id(queue, job, self._prefix)

    def known(self, queue: str, job: str) -> Known | None:
        """What is known of a job of the queue."""
        return self._known(self.name(queue, job))

    def _known(self, name: str) -> Known | None:
        job = self._node.jobs.get(name)
        return None if job is None else known_of(job)

    def is_known(self, queue: str, job: str) -> bool:
        """Whether a job of the queue has a record."""
        return self._node.jobs.get(self.name(queue, job)) is not None

    def has_ended(self, queue: str, job: str) -> bool:
        """Whether it has one that says that it is over."""
        found = self._node.jobs.get(self.name(queue, job))
        return found is not None and found.latest.ended

    def is_silent(self, queue: str, job: str) -> bool:
        """Whether its worker is believed dead: that the queue still has it as being worked on is no sign of life."""
        known = self.known(queue, job)
        return known is not None and (known.status == STALLED or known.lost)

    async def begin(self) -> None:
        """Find the jobs of this source among the records. Every record has to be shown here."""
        self.open.clear()
        mark = b'"source":' + msgspec.json.encode(self._source)
        for count, job in enumerate(list(self._node.jobs.jobs.values())):
            if not job.latest.ended and mark in job.latest.body:
                self._look(job)
            if count % 1000 == 999:
                await trio.lowlevel.checkpoint()

    async def take(self, sightings: Sequence[Sighting]) -> None:
        """Publish what is new in them, and wait until it is kept. While the store is away, it waits for it.

        Raises:
            TurnLostError: it is another node's turn.
        """
        for start in range(0, len(sightings), AT_ONCE):
            part = sightings[start : start + AT_ONCE]
            self.counters.received += len(part)
            while not await self._take(part):  # noqa: ASYNC110  # it is the store that comes back
                await trio.sleep(_AGAIN_S)
        if not sightings:
            await trio.lowlevel.checkpoint()

    async def _take(self, sightings: Sequence[Sighting]) -> bool:
        """False if it has to be done again: what was accepted then is found to be old."""
        await self._node.hub.wait_room()
        ahead: dict[str, Known] = {}
        queue_of: dict[str, str] = {}
        new: set[str] = set()
        operations: list[Operation] = []
        names: list[str] = []
        for seen in sightings:
            name = self.name(seen.queue, seen.job)
            known = ahead.get(name)
            job = self._node.jobs.get(name) if known is None else None
            record = None if job is None else record_of(job)
            # Two queues may give out the same id, to jobs of different people.
            if queue_of.get(name, seen.queue) != seen.queue or (record and not self._is_ours(record, seen.queue)):
                self.counters.rejected += 1
                self._complaints.add("queue_refused", "another queue's job has this id", job=name)
                continue
            queue_of[name] = seen.queue
            if job is not None:
                known = known_of(job, record)
            if known is not None and adopts(known, seen, self._source):
                operations.append(Delete(name))
                names.append("")
                seen, known = inherit(known, seen), None
            step = skipped(known, seen)
            for one in (seen,) if step is None else (step, seen):
                fields = settle(known, one, self._source, self._prefix)
                if fields is None:
                    self.counters.duplicates += 1
                    continue
                if known is None:
                    new.add(name)
                elif name in new and fields.user_id is UNSET:
                    fields.user_id = known.owner  # its id may turn out to be taken, and by somebody else's job
                if one is step:
                    fields.seq = UNSET  # its number is that of what comes next
                known = ahead[name] = moved(known, fields, self._source)
                operations.append(Publish(name, fields, "may", SUB))
                names.append(name)
        if not operations:
            return True
        submission = self._submit(operations)
        try:
            await submission.wait_kept()
        except ApiError as error:
            self._complaints.add("queue_postponed", error.message)
            return False
        for name, outcome in zip(names, submission.results, strict=True):
            if isinstance(outcome, ApiError):
                if outcome.status == 503:
                    self._complaints.add("queue_postponed", outcome.message)
                    return False
                if name:
                    self.counters.rejected += 1
                    self._complaints.refused(outcome, job=name)
            elif isinstance(outcome, Accepted) and name and outcome.job is not None:
                if outcome.duplicate:
                    self.counters.duplicates += 1
                else:
                    self.counters.accepted += 1
        for name, known in ahead.items():
            self._update(name, known.worker)
        return True

    async def report_silent(self, silent: Sequence[str], stalled_after: float) -> None:
        """The workers of these jobs are gone: they are stalled, and after as long again they have failed."""
        now_ms = round(time.time() * 1000)
        operations: list[Operation] = []
        for name in silent:
            known = self._known(name)
            if known is None or known.status != PROCESSING:
                continue
            told = Sighting(job=name, at_ms=now_ms, status=STALLED, error="its worker is gone")
            fields = settle(known, told, self._source)
            if fields is not None:
                fields.ttl = stalled_after
                # Its number must not be in the way of what the queue says next.
                fields.seq = UNSET
                operations.append(Publish(name, fields, "never", SUB))
        if operations:
            # As above: what is only believed now must not be published later.
            submission = self._submit(operations)
            try:
                await submission.wait_kept()
            except ApiError as error:
                self._complaints.add("queue_postponed", error.message)
        for name in silent:
            self._update(name, None)

    def _submit(self, operations: Sequence[Operation]) -> Submission:
        """Past the spool: what a queue keeps is not to be moved to a local disk."""
        # A node that was frozen wakes with what was said in the meantime, and others have gone on from there.
        if not self._is_turn():
            raise TurnLostError("it is another server's turn")
        broker: Broker = self._node.broker if self._node.shared is None else self._node.shared
        return broker.submit(operations)

    def _is_ours(self, record: Record, queue: str) -> bool:
        """Whether a job is that queue's.

        What workers have put into ``metadata`` themselves, or a source that there is no more, is no reason to doubt.
        """
        metadata = _metadata(record)
        source = metadata.get("source", self._source)
        if source == self._source:
            return bool(metadata.get("queue", queue) == queue)
        return source not in self._node.config.queues

    def _update(self, name: str, worker: str | None) -> None:
        job = self._node.jobs.get(name)
        found = self.open.pop(name, None)
        if job is None:
            return
        status = job.latest.status
        if status in ENDED:
            return
        if found is None:
            self._look(job)
            return
        found.processing = status == PROCESSING
        found.silent_since = 0.0
        found.worker = worker if found.processing else None
        self.open[name] = found

    def _look(self, job: Job) -> None:
        record = record_of(job)
        metadata = _metadata(record)
        if metadata.get("source") != self._source:
            return
        name, queue = record.job_id, str(metadata.get("queue", ""))
        own = str(metadata.get("jobId", name[len(self._prefix) + (len(queue) + 1 if queue else 0) :]))
        if self.name(queue, own) != name:
            return  # too long to be kept whole, or of another prefix: what is asked of the queue would be another job
        self.open[name] = Open(queue, own, record.status == PROCESSING, record.worker_id)
        if len(self.open) > MAX_OPEN:
            del self.open[next(iter(self.open))]


def _metadata(record: Record) -> dict[str, Any]:
    """What a record has of it; nothing if it is of another form than here."""
    metadata = _decode(record.metadata) if isinstance(record.metadata, Raw) else None
    return metadata if isinstance(metadata, dict) else {}
