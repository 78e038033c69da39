"""What the memory and the sqlite broker have in common: deciding operations in order, on one node.

There are two states of a job. The *shown* one (``Jobs``) is kept and may be told to anyone; the *working* one, an
overlay, has what was accepted since. Decisions are made on the working state, so submissions need not wait for each
other; if the store fails, the overlay is thrown away and with it the offsets it used, which nobody has seen.
"""

from __future__ import annotations

import logging
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Final

import trio
from msgspec import UNSET

from protocol import job as rules
from protocol.errors import ApiError, job_not_found
from protocol.update import Job, Update
from server.brokers.base import (
    Accepted,
    Acknowledge,
    Cancel,
    Claim,
    Delete,
    Deliver,
    Expire,
    Notify,
    Operation,
    Publish,
    Result,
    Submission,
)
from server.brokers.deciding import (
    ancestors_of,
    create,
    fields_for,
    identify,
    job_exists,
    key_reused,
    new_target,
    owned,
    too_many_jobs,
)
from server.brokers.keys import Kept, Keys, digest_of, fingerprint_of, fingerprint_of_notice
from server.history import History
from server.inbox import Inboxes, Place
from server.jobs import Jobs
from server.leases import Leases
from server.wheel import Wheel

log = logging.getLogger("statuswire.broker")

HOUSEKEEPING_S: Final = 30.0  # how often an idle broker looks for what has grown too old

_EPOCH_ALPHABET: Final = "abcdefghijklmnopqrstuvwxyz0123456789"


def new_epoch() -> str:
    """A name for a new incarnation of the log: 12 random letters and digits, 62 bits."""
    return "".join(secrets.choice(_EPOCH_ALPHABET) for _ in range(12))


class Group:
    """What is kept together or not at all: the outcome of all submissions since the last group was taken."""

    __slots__ = (
        "bytes",
        "deleted",
        "entries",
        "forgotten",
        "gone",
        "keys",
        "newest",
        "silent",
        "stored",
        "submissions",
        "taken",
    )

    def __init__(self) -> None:
        self.entries: list[tuple[Update, Job | None]] = []
        self.newest: dict[str, Job | None] = {}  # state of every touched job; None: gone
        self.silent: set[str] = set()  # of these, the ones whose newest state has no entry of its own
        self.deleted: dict[int, int] = {}  # by offset of the deletion: ``Job.created`` of what was deleted
        self.forgotten: list[int] = []  # ``Job.created`` of those that went without an entry
        self.keys: list[Kept] = []
        self.stored: list[Update] = []  # of the entries, the notifications that are kept for their users
        self.gone: list[Place] = []  # stored ones that need not be kept any more
        self.taken: list[Job] = []  # old jobs that make room for new ones
        self.submissions: list[Submission] = []
        self.bytes = 0

    @property
    def empty(self) -> bool:
        """Nothing to write; there may be submissions that wait for earlier groups."""
        return not (self.entries or self.newest or self.gone)


class LocalBroker(ABC):
    """Decides; a subclass says when a group is kept.

    Args:
        jobs: the shown records; filled by ``start``, then through ``deliver``.
        history: the ring of shown updates; likewise.
        deliver: shows what was kept, see ``base.Deliver``.
        wheel: for leases.
        clock: unix time in seconds.
    """

    # Bounds of what was accepted and is not yet kept. 64 MiB or 100,000 entries are seconds of a disk's work;
    # beyond that it is kinder to say so than to let everyone wait longer and longer.
    max_waiting_bytes = 64 * 1024 * 1024
    max_waiting_entries = 100_000

    def __init__(
        self, jobs: Jobs, history: History, deliver: Deliver, wheel: Wheel, *, clock: Callable[[], float] = time.time
    ) -> None:
        self._jobs = jobs
        self._history = history
        self._deliver = deliver
        self._clock = clock
        self._leases = Leases(wheel, self._lease_ended)
        self._keys = Keys()
        self.inboxes = Inboxes()
        self._working: dict[str, Job | None] = {}
        self._group = Group()
        self._offset = 0  # highest offset given
        self._kept_offset = 0  # highest offset kept
        self._at_ms = 0  # time of the newest entry: the log's time never goes back, whatever the wall clock does
        self._count = 0  # number of jobs in the working state
        self._waiting_bytes = 0
        self._on_unkept = False  # the operation at hand was decided on something that is not kept yet
        self._closing = False
        self._away: str | None = None
        self._marks: dict[str, str] = {}

    @property
    def epoch(self) -> str:
        """Names this incarnation of the log."""
        return self._history.epoch

    @property
    def available(self) -> str | None:
        """None while the store works, else why it does not."""
        return "closed" if self._closing else self._away

    @property
    def live(self) -> bool:
        """See ``base.Broker``: nobody else has the store."""
        return True

    def figures(self) -> dict[str, int]:
        """See ``base.Broker``."""
        return {"waiting": self._waiting_entries, "waitingBytes": self._waiting_bytes}

    @property
    def _waiting_entries(self) -> int:
        return self._offset - self._kept_offset

    async def load_mark(self, name: str) -> str | None:
        """See ``base.Broker``."""
        await trio.lowlevel.checkpoint()
        return self._marks.get(name)

    async def save_mark(self, name: str, text: str) -> None:
        """See ``base.Broker``; here as short-lived as the log."""
        await trio.lowlevel.checkpoint()
        self._marks[name] = text

    def submit(self, operations: Sequence[Operation]) -> Submission:
        """Decide operations in order, now; see ``base.Broker``."""
        self._on_unkept = False
        before = self._group
        entries = len(before.entries)
        # All that comes together is accepted at one time: the log's never goes back, whatever the wall clock does.
        now_ms = max(int(self._clock() * 1000), self._at_ms)
        decide = self._decide
        results = [decide(operation, now_ms) for operation in operations]
        submission = Submission(results)
        if self._on_unkept or len(before.entries) > entries or before.silent or before.gone:
            before.submissions.append(submission)
            self._gathered()
        else:
            submission.settle()
        return submission

    async def follow(self, names: Iterable[str], cursor: str | None = None) -> None:
        """Everything is here: returns at once, without a checkpoint; see ``base.Broker``."""
        return None  # noqa: RET501  # ruff takes a method without a statement for a forgotten abstract one

    @abstractmethod
    def _gathered(self) -> None:
        """Something was added to the current group."""

    @abstractmethod
    async def start(self) -> None:
        """Fill ``Jobs`` and ``History``; see ``base.Broker``."""

    @abstractmethod
    async def close(self) -> None:
        """Keep what still waits; see ``base.Broker``."""

    # Deciding

    def _decide(self, operation: Operation, now_ms: int) -> Result:
        try:
            if self._closing:
                raise ApiError(503, "shutting_down", "the server is shutting down", retry_after=5)
            waiting = self._offset - self._kept_offset
            if waiting >= self.max_waiting_entries or self._waiting_bytes >= self.max_waiting_bytes:
                raise ApiError(503, "overloaded", "the store cannot keep up, try again in a moment", retry_after=1)
            if isinstance(operation, Publish):  # nearly always
                return self._publish(operation, now_ms)
            match operation:
                case Cancel():
                    return self._cancel(operation, now_ms)
                case Delete():
                    return self._delete(operation, now_ms)
                case Expire():
                    return self._expire(operation, now_ms)
                case Claim():
                    return self._claim(operation, now_ms)
                case Notify():
                    return self._notify(operation, now_ms)
                case Acknowledge():
                    return self._acknowledge(operation)
        except ApiError as error:
            return error

    def _publish(self, operation: Publish, now_ms: int) -> Accepted:
        fields = operation.fields
        job_id, key = identify(operation)
        digest = fingerprint = b""
        if key is not None:
            digest = digest_of(operation.sub, key)
            fingerprint = fingerprint_of(job_id, operation.create, fields)
            first = self._keys.find(digest, now_ms)
            if first is not None:
                return self._first_answer(first, fingerprint)
        if job_id is None:
            job_id = new_target(operation)
        before = self._get(job_id)
        offset = self._offset + 1
        if before is not None:
            if operation.view is not None:
                fields = fields_for(operation, before)
            if fields.seq is not UNSET and rules.is_repeat(before, fields):
                return self._unchanged(before)
            if operation.create == "must":
                raise job_exists(job_id)
        if key is not None:
            self._keys.make_room(now_ms)
        if before is not None:
            after = rules.apply(before, fields, offset=offset, now_ms=now_ms)
        else:
            after = create(operation, job_id, self._get, offset=offset, now_ms=now_ms)
            if self._count >= self._jobs.max_jobs:
                self._forget_oldest_ended()
            self._count += 1
        latest = after.latest
        self._stage(before, after, latest)
        if key is not None:
            kept = Kept(digest, fingerprint, latest.job_id, latest.offset, latest.version, now_ms)
            self._keys.add(kept)
            self._group.keys.append(kept)
        return Accepted(latest.offset, latest.version, False, after.private.cancel_requested, after)

    def _cancel(self, operation: Cancel, now_ms: int) -> Accepted:
        before = owned(self._must_get(operation.job_id), operation.owner)
        after = rules.request_cancel(before, offset=self._offset + 1, now_ms=now_ms)
        if after is None:
            return self._unchanged(before)
        self._stage(before, after, after.latest)
        return Accepted(after.latest.offset, after.latest.version, False, True, after)

    def _delete(self, operation: Delete, now_ms: int) -> Accepted:
        before = self._must_get(operation.job_id)
        update = rules.delete(before, offset=self._offset + 1, now_ms=now_ms)
        self._count -= 1
        self._stage(before, None, update)
        self._group.deleted[update.offset] = before.created
        return Accepted(update.offset, update.version, False, False, None)

    def _expire(self, operation: Expire, now_ms: int) -> Accepted:
        before = self._must_get(operation.job_id)
        private = before.private
        if before.latest.ended or private.ttl is None or private.heard != operation.heard:
            return self._unchanged(before)
        after = rules.expire(before, offset=self._offset + 1, now_ms=now_ms)
        self._stage(before, after, after.latest)
        return Accepted(after.latest.offset, after.latest.version, False, private.cancel_requested, after)

    def _claim(self, operation: Claim, now_ms: int) -> Accepted:
        digest = digest_of(operation.sub, operation.key)
        first = self._keys.find(digest, now_ms)
        if first is not None:
            return self._first_answer(first, operation.fingerprint)
        self._keys.make_room(now_ms)
        kept = Kept(digest, operation.fingerprint, "", self._offset, 0, now_ms)
        self._keys.add(kept)
        self._group.keys.append(kept)
        return Accepted(self._offset, 0, False, False, None)

    def _notify(self, operation: Notify, now_ms: int) -> Accepted:
        notice, key = operation.notice, operation.key
        if key is not None:
            digest, fingerprint = digest_of(operation.sub, key), fingerprint_of_notice(notice)
            first = self._keys.find(digest, now_ms)
            if first is not None:
                return self._first_answer(first, fingerprint)
            self._keys.make_room(now_ms)
        entry = notice.entry(self._offset + 1, now_ms)
        self._at_ms = now_ms
        self._offset = entry.offset
        self._group.entries.append((entry, None))
        self._group.bytes += len(entry.body)
        self._waiting_bytes += len(entry.body)
        if notice.store:
            self._group.stored.append(entry)
        if key is not None:
            kept = Kept(digest, fingerprint, "", entry.offset, 0, now_ms)
            self._keys.add(kept)
            self._group.keys.append(kept)
        return Accepted(entry.offset, 0, False, False, None)

    def _acknowledge(self, operation: Acknowledge) -> Accepted:
        # What is not kept yet has not been shown to anyone, so there is nothing to look for beyond what is. It goes at
        # once: if the store then fails to let go of it, it comes once more after a restart, which does no harm.
        places = self.inboxes.up_to(operation.user, operation.offset)
        self.inboxes.remove(places)
        self._group.gone += places
        return Accepted(operation.offset, 0, not places, False, None)

    def _unchanged(self, job: Job) -> Accepted:
        return Accepted(job.latest.offset, job.latest.version, True, job.private.cancel_requested, job)

    def _first_answer(self, first: Kept, fingerprint: bytes) -> Accepted:
        if first.fingerprint != fingerprint:
            raise key_reused()
        if first.offset > self._kept_offset:
            self._on_unkept = True
        job = self._get(first.job_id)
        return Accepted(first.offset, first.version, True, job is not None and job.private.cancel_requested, job)

    # The working state

    def _get(self, job_id: str) -> Job | None:
        if job_id in self._working:
            self._on_unkept = True
            return self._working[job_id]
        return self._jobs.jobs.get(job_id)

    def _must_get(self, job_id: str) -> Job:
        job = self._get(job_id)
        if job is None:
            raise job_not_found(job_id)
        return job

    def _stage(self, before: Job | None, after: Job | None, update: Update) -> None:
        """Take a decided change into the current group, and carry it up to the job's ancestors."""
        some = after or before
        ancestors: Sequence[Job] = ()
        if some is not None and some.private.link is not None:
            ancestors = ancestors_of(before, after, self._get, update)
        self._at_ms = update.at_ms
        self._add_entry(update, after)
        if not ancestors:
            return
        for job in ancestors:
            if job.latest.offset > self._offset:
                self._add_entry(job.latest, job)
            else:
                self._add_silent(job.latest.job_id, job)

    def _add_entry(self, update: Update, job: Job | None) -> None:
        group, job_id, size = self._group, update.job_id, len(update.body)
        self._offset = update.offset
        group.entries.append((update, job))
        group.bytes += size
        self._waiting_bytes += size
        group.newest[job_id] = self._working[job_id] = job
        if group.silent:
            group.silent.discard(job_id)

    def _add_silent(self, job_id: str, job: Job | None) -> None:
        self._group.newest[job_id] = self._working[job_id] = job
        self._group.silent.add(job_id)

    def _forget_oldest_ended(self) -> None:
        """Make room for a new job. Raises ApiError 503 ``too_many_jobs`` when none has ended."""
        while True:
            oldest = self._jobs.take_oldest_ended()
            if oldest is None:
                raise too_many_jobs(self._jobs.max_jobs)
            self._group.taken.append(oldest)
            job_id = oldest.latest.job_id
            job = self._working.get(job_id, oldest)
            if job is not None and job.latest is oldest.latest:  # else it was reopened or deleted since
                self._add_silent(job_id, None)
                self._group.forgotten.append(oldest.created)
                self._count -= 1
                return

    # What became of a group

    def _kept(self, group: Group) -> None:
        """The store has it: show it, then answer."""
        working = self._working
        if not self._group.newest:  # nothing was decided since
            working.clear()
        else:
            for job_id, job in group.newest.items():
                if working.get(job_id) is job:
                    working.pop(job_id, None)
        self._waiting_bytes -= group.bytes
        if group.entries:
            self._kept_offset = group.entries[-1][0].offset
            for notice in group.stored:
                self._let_go(self.inboxes.add(notice))
            self._deliver(group.entries)
            self._leases.follow(group.entries)
        for job_id in group.silent:
            job = group.newest[job_id]
            if job is None:
                self._jobs.forget(job_id)
            else:
                self._jobs.put(job)
        for submission in group.submissions:
            submission.settle()

    def _lost(self, groups: Sequence[Group], error: ApiError) -> None:
        """The store does not have it: back to what is shown. ``groups`` are all that are not kept, in order."""
        for group in reversed(groups):
            for job in reversed(group.taken):
                self._jobs.give_back(job)
            self._keys.remove(group.keys)
        self._group = Group()
        self._working.clear()
        self._offset = self._kept_offset
        self._count = len(self._jobs)
        self._waiting_bytes = 0
        for group in groups:
            for submission in group.submissions:
                submission.settle(error)

    def _started(self, *, at_ms: int) -> None:
        """``Jobs`` and ``History`` are filled: go on from there."""
        self._offset = self._kept_offset = self._history.last
        self._at_ms = at_ms
        self._count = len(self._jobs)
        self._leases.restart(self._jobs.jobs.values())

    def _lease_ended(self, job_id: str, heard: int) -> None:
        self.submit([Expire(job_id, heard)])

    def _let_go(self, places: Sequence[Place]) -> None:
        """These have left the inboxes by themselves: the store is told with the group that gathers now."""
        if places:
            self._group.gone += places
            self._gathered()

    def _housekeep(self) -> None:
        now_ms = max(self._at_ms, int(self._clock() * 1000))
        self._history.trim(now_ms)
        self._keys.prune(now_ms)
        self._let_go(self.inboxes.trim(now_ms))

    async def run(self) -> None:
        """Look after what grows old, until cancelled."""
        while True:
            await trio.sleep(HOUSEKEEPING_S)
            self._housekeep()
