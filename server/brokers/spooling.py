"""A Redis broker with a spool: what is published while Redis is away waits on this machine's disk.

Every operation has a number from the moment it is submitted. As long as the spool is empty and Redis is there,
operations go straight on; those that come back with "the store is away" go into the spool under their numbers. As soon
as one is there, all that come later queue up behind it. What waits is passed on once nothing is under way that could
still land in front of it. With the last of it on its way to Redis, what has come meanwhile and is not on disk yet goes
straight on behind it, and so does everything after that. So nothing overtakes anything: the publisher keeps the calls
to one job in order, and gives up those behind one that it gave up.

Passing on is idempotent. Each operation has a key that Redis remembers for a day, so a server that is killed half-way
begins again where it was; one whose first try may have been executed is looked for in the log before.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from typing import Final, TypeGuard

import msgspec
import trio

from protocol.errors import ApiError
from protocol.resp import RedisError
from server.brokers.base import Accepted, Cancel, Claim, Delete, Operation, Publish, StoreError, Submission
from server.brokers.redis_broker import RedisBroker
from server.brokers.redis_calls import Batch, Doubt
from server.brokers.redis_client import RedisClientError
from server.brokers.redis_follower import unavailable
from server.brokers.spool_entry import Entry, decode_entry, encode_entry, entry_of, operation_of, target_of, with_id
from server.brokers.spool_file import SpoolFile
from server.inbox import Inboxes

log = logging.getLogger("statuswire.spool")

# Operations passed on together, and their bytes.
_AT_ONCE: Final = 500
_BYTES_AT_ONCE: Final = 8 * 1024 * 1024
# What is not on disk yet; more is more than a disk that works can have left.
_MAX_UNWRITTEN: Final = 64 * 1024 * 1024
_RETRY_S: Final = 1.0
_LATER: Final = ApiError(500, "internal", "there is no answer yet")
# Refusals that pass. All others are final: one update that can never be accepted must not hold up those behind it.
_PASSING: Final = frozenset(("store_unavailable", "overloaded", "shutting_down"))


class _Submitted(Submission):
    """A submission on its way; ``direct`` while Redis has it."""

    __slots__ = ("direct", "first", "operations")

    def __init__(self, operations: Sequence[Publish | Claim], first: int) -> None:
        super().__init__([_LATER] * len(operations))
        self.operations = operations
        self.first = first
        self.direct = False

    def finish(self) -> None:
        """All results are there. The store being away is no answer to one of several: see ``redis_calls.Batch``."""
        away = [result for result in self.results if isinstance(result, ApiError) and result.code in _PASSING]
        self.settle(away[0] if len(away) == len(self.results) else None)


class SpoolingBroker:
    """See the module; a ``base.Broker``.

    Args:
        inner: Redis.
        path: of the spool's file.
        max_bytes: most bytes that wait in it; beyond, publishes are refused.
        left: files that nobody uses any more: what waits in them is passed on too.

    Attributes:
        pending: operations that wait, on disk or on their way there, or that are being passed on.
        bytes: theirs.
        spooled: operations that were ever taken in, by this process.
        replayed: of all that waited, those that Redis has accepted since.
        rejected: those that were refused then.
    """

    def __init__(self, inner: RedisBroker, path: str, max_bytes: int, left: Sequence[str] = ()) -> None:
        self._inner = inner
        self._file = SpoolFile(path)
        self._max_bytes = max_bytes
        self._left = left
        self.pending = self.bytes = 0
        self.spooled = self.replayed = self.rejected = 0
        self._next = 1  # number of the next operation
        self._waiting = False  # something waits that is not on its way to Redis: queue up behind it
        self._direct = 0  # submissions that Redis has
        self._written = 0  # operations on disk
        self._rows: list[tuple[int, bytes]] = []  # to be written
        self._unwritten: list[tuple[_Submitted, list[int]]] = []  # whose, and which of their operations
        self._unwritten_bytes = 0
        self._gathered = trio.Event()
        self._changed = trio.Event()  # replaced whenever what the replay waits for may have changed
        self._using_file = trio.Lock()
        self._open = self._closing = self._failing = False

    @property
    def epoch(self) -> str:
        """Names this incarnation of the log."""
        return self._inner.epoch

    @property
    def available(self) -> str | None:
        """None while Redis takes writes, else why it does not."""
        return self._inner.available

    @property
    def live(self) -> bool:
        """See ``base.Broker``."""
        return self._inner.live

    @property
    def inboxes(self) -> Inboxes:
        """See ``base.Broker``. Notifications do not wait for Redis: they are refused while it is away."""
        return self._inner.inboxes

    def figures(self) -> dict[str, int]:
        """See ``base.Broker``."""
        return self._inner.figures() | {
            "spoolPending": self.pending,
            "spoolBytes": self.bytes,
            "spooled": self.spooled,
            "spoolReplayed": self.replayed,
            "spoolRejected": self.rejected,
        }

    async def load_mark(self, name: str) -> str | None:
        """See ``base.Broker``."""
        return await self._inner.load_mark(name)

    async def save_mark(self, name: str, text: str) -> None:
        """See ``base.Broker``."""
        await self._inner.save_mark(name, text)

    async def follow(self, names: Iterable[str], cursor: str | None = None) -> None:
        """See ``base.Broker``."""
        await self._inner.follow(names, cursor)

    async def start(self) -> None:
        """Open the file, see what waits in it, and reach Redis. Raises StoreError with what to do."""
        await trio.to_thread.run_sync(self._file.open)
        self._open = True
        try:
            for path in self._left:
                await self._take_over(path)
            held = await trio.to_thread.run_sync(self._file.held)
            await self._inner.start()
        except BaseException:
            await self._close_file()
            raise
        self.pending = self._written = held.operations
        self.bytes, self._next = held.bytes, held.last + 1
        if held.operations:
            self._waiting = True
            log.warning("%d updates of an earlier run wait in %s for Redis", held.operations, self._file.path)

    async def _take_over(self, path: str) -> None:
        try:
            moved = await trio.to_thread.run_sync(self._file.take_over, path)
        except (StoreError, sqlite3.Error) as error:
            log.error("what may wait in %s is not passed on: %s", path, error)
        else:
            if moved:
                log.warning("%d updates that waited in %s, which nobody uses, wait here now", moved, path)

    async def run(self) -> None:
        """Keep and pass on, until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._inner.run)
            nursery.start_soon(self._write_forever)
            nursery.start_soon(self._replay_forever)

    async def close(self) -> None:
        """Refuse what comes later; keep what could not be finished."""
        self._closing = True
        await self._inner.close()
        with trio.CancelScope(shield=True):  # bounded by the disk
            while self._rows:
                await self._write()
            await self._close_file()

    async def _close_file(self) -> None:
        with trio.CancelScope(shield=True):
            async with self._using_file:
                if self._open:
                    self._open = False
                    await trio.to_thread.run_sync(self._file.close)

    # Taking operations

    def submit(self, operations: Sequence[Operation]) -> Submission:
        """See ``base.Broker``; ``results`` are there once it is kept, here or in Redis."""
        if self._closing or not operations or not _can_wait(operations):
            if self._waiting and any(isinstance(operation, Cancel | Delete) for operation in operations):
                return self._refused(operations)
            return self._inner.submit(operations)
        submitted = _Submitted([with_id(operation) for operation in operations], self._next)
        self._next += len(operations)
        if self._waiting or self._inner.refusing is not None:
            self._spool(submitted, range(len(operations)), {})
        else:
            self._go_on(submitted, range(len(operations)))
        return submitted

    def _go_on(self, submitted: _Submitted, indexes: Sequence[int]) -> None:
        """Let Redis have some of the operations."""
        self._direct += 1
        submitted.direct = True
        batch = self._inner.submit([submitted.operations[index] for index in indexes])
        batch.when_kept(lambda _: self._answered(submitted, indexes, batch))

    def _refused(self, operations: Sequence[Operation]) -> Submission:
        """What cannot wait must not overtake either."""
        away = self._inner.refusing
        error = (
            unavailable(away)
            if away is not None
            else ApiError(503, "store_unavailable", "what waited for the store is passed on first", retry_after=2)
        )
        submission = Submission([error] * len(operations))
        submission.settle(error)
        return submission

    def _answered(self, submitted: _Submitted, indexes: Sequence[int], batch: Submission) -> None:
        """Redis has answered, or was given up."""
        doubts = batch.doubts if isinstance(batch, Batch) else {}
        away: dict[int, Doubt | None] = {}
        for place, (index, result) in enumerate(zip(indexes, batch.results, strict=True)):
            submitted.results[index] = result
            if isinstance(result, ApiError) and result.code == "store_unavailable":
                away[index] = doubts.get(place)
        if away:
            self._spool(submitted, away, away)
        else:
            self._landed(submitted)
            submitted.finish()

    def _landed(self, submitted: _Submitted) -> None:
        if submitted.direct:
            submitted.direct = False
            self._direct -= 1
            self._change()

    def _spool(self, submitted: _Submitted, indexes: Iterable[int], doubts: Mapping[int, Doubt | None]) -> None:
        """Let some of the operations wait on disk."""
        taken: list[int] = []
        for index in indexes:
            operation = submitted.operations[index]
            try:
                job_id = target_of(operation)
                data = encode_entry(entry_of(operation, doubts.get(index)))
                self._make_room(len(data))
            except ApiError as error:
                submitted.results[index] = error
                continue
            self._rows.append((submitted.first + index, data))
            self._unwritten_bytes += len(data)
            self.pending += 1
            self.bytes += len(data)
            taken.append(index)
            submitted.results[index] = Accepted(0, 0, False, False, None, job_id)
        if not taken:
            self._landed(submitted)
            submitted.finish()
            return
        if not self._waiting:
            log.warning("Redis is away (%s): updates wait in %s", self._inner.refusing, self._file.path)
        self._waiting = True
        self._unwritten.append((submitted, taken))
        self._gathered.set()

    def _make_room(self, size: int) -> None:
        """Raises ApiError 503 if there is none."""
        if self.bytes + size > self._max_bytes or self._unwritten_bytes + size > _MAX_UNWRITTEN:
            raise ApiError(
                503,
                "store_unavailable",
                f"the store is away, and {self.pending} updates wait for it already: there is no room for more",
                retry_after=10,
            )

    # Writing

    async def _write_forever(self) -> None:
        while True:
            await self._gathered.wait()
            self._gathered = trio.Event()
            await self._write()

    async def _write(self) -> None:
        """Put what has gathered on disk, then answer it."""
        async with self._using_file:
            rows, self._rows = self._rows, []
            unwritten, self._unwritten = self._unwritten, []
            self._unwritten_bytes = 0
            if not rows:
                return
            with trio.CancelScope(shield=True):  # a commit under way cannot be taken back
                try:
                    await trio.to_thread.run_sync(self._file.append, rows)
                except Exception as error:
                    self._not_written(rows, unwritten, error)
                else:
                    self._failing = False
                    self.spooled += len(rows)
                    self._written += len(rows)
            for submitted, _ in unwritten:
                self._landed(submitted)
                submitted.finish()
            self._change()

    def _not_written(
        self, rows: list[tuple[int, bytes]], unwritten: list[tuple[_Submitted, list[int]]], error: Exception
    ) -> None:
        if not self._failing:
            # A sqlite3 error is the disk's; anything else is a mistake of ours and worth a traceback.
            log.error("updates cannot be kept: %s", error, exc_info=not isinstance(error, sqlite3.Error))
        self._failing = True
        self._take_back(rows)
        refusal = ApiError(
            503,
            "store_unavailable",
            f"the store is away, and the update could not be kept for it ({error})",
            retry_after=2,
        )
        for submitted, taken in unwritten:
            for index in taken:
                submitted.results[index] = refusal

    # Passing on

    def _change(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def _replay_forever(self) -> None:
        while True:
            # While something waits nothing goes straight on, so what is under way ends; what of it fails goes in front.
            while not self._waiting or self._direct:
                await self._changed.wait()
            await self._inner.wait_up()
            try:
                through = await self._replay_some()
            except (RedisClientError, RedisError, sqlite3.Error) as error:
                log.info("what waits cannot be passed on yet: %s", error)
                through = False
            except Exception:
                log.exception("what waits cannot be passed on")
                through = False
            self._waiting = self.pending > 0
            if not through:
                await trio.sleep(_RETRY_S)

    async def _replay_some(self) -> bool:
        """Pass on what waits first. False if Redis did not take all of it."""
        settled: dict[int, int] = {}  # number -> bytes
        try:
            async with self._using_file:  # nothing is written meanwhile
                rows = await trio.to_thread.run_sync(self._file.first, _AT_ONCE, _BYTES_AT_ONCE)
                sizes = {number: len(data) for number, data in rows}
                waiting = await self._read(rows, settled)
                submission = self._inner.submit(list(waiting.values()))
                if len(rows) == self._written:
                    self._go_on_behind()
            away = None
            try:
                await submission.wait_kept()
            except ApiError as error:
                away = error
            for (number, operation), result in zip(waiting.items(), submission.results, strict=True):
                if isinstance(result, ApiError) and result.code in _PASSING:
                    away = result
                    continue
                settled[number] = sizes[number]
                if isinstance(result, ApiError):
                    self._drop(operation, result)
                else:
                    self.replayed += 1
            self._waiting = self._waiting or away is not None
            return away is None
        finally:
            if settled:
                with trio.CancelScope(shield=True):
                    await self._forget(settled)

    async def _read(self, rows: Sequence[tuple[int, bytes]], settled: dict[int, int]) -> dict[int, Publish | Claim]:
        """The operations of some rows, but those that Redis has already."""
        entries: dict[int, Entry] = {}
        operations: dict[int, Publish | Claim] = {}
        for number, data in rows:
            try:
                entries[number] = decode_entry(data)
                operations[number] = operation_of(entries[number])
            except (msgspec.MsgspecError, UnicodeError, ApiError) as error:
                log.error("entry %d of %s cannot be read and is dropped: %s", number, self._file.path, error)
                self.rejected += 1
                settled[number] = len(data)
        doubts = [entry.doubt for entry in entries.values() if entry.doubt is not None]
        executed = await self._inner.executed(doubts) if doubts else set()
        for number, data in rows:
            entry = entries.get(number)
            if entry is not None and entry.doubt is not None and entry.doubt.rev in executed:
                operations.pop(number, None)
                settled[number] = len(data)
                self.replayed += 1
        return operations

    def _go_on_behind(self) -> None:
        """All that is on disk is on its way: what has gathered since goes straight on, and what comes from now on."""
        self._waiting = False
        rows, self._rows = self._rows, []
        unwritten, self._unwritten = self._unwritten, []
        self._unwritten_bytes = 0
        self._take_back(rows)
        for submitted, taken in unwritten:
            self._go_on(submitted, taken)

    def _take_back(self, rows: Sequence[tuple[int, bytes]]) -> None:
        self.pending -= len(rows)
        self.bytes -= sum(len(data) for _, data in rows)

    def _drop(self, operation: Publish | Claim, error: ApiError) -> None:
        self.rejected += 1
        job_id = (operation.job_id or operation.fields.job_id) if isinstance(operation, Publish) else "-"
        log.warning(
            "an update of job %s by %s, answered while Redis was away, is refused by now: %s (%s)",
            job_id,
            operation.sub,
            error.message,
            error.code,
        )

    async def _forget(self, settled: Mapping[int, int]) -> None:
        """Redis has these, or will never have them."""
        async with self._using_file:
            await trio.to_thread.run_sync(self._file.remove, list(settled))
            self._written -= len(settled)
            self.pending -= len(settled)
            self.bytes -= sum(settled.values())
            if not self._written:
                log.warning("all that waited for Redis has been passed on (%d refused so far)", self.rejected)
                await trio.to_thread.run_sync(self._file.shrink)


def _can_wait(operations: Sequence[Operation]) -> TypeGuard[Sequence[Publish | Claim]]:
    return all(isinstance(operation, Publish | Claim) for operation in operations)
