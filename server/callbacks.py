"""Callbacks: the application is told when jobs end, so that it can send an e-mail to someone who is not there.

A callback is one more reader of the log, with a mark in the store of how far it has come. So nothing is forgotten
when a server dies, nothing else waits while the application is away, and what the log does not reach any more is found
among the records. One node does it, by lease. The application may hear of the same ending twice (after a crash, or if
its answer was lost): ``Idempotency-Key`` tells.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from heapq import heappop, heappush
from typing import TYPE_CHECKING, Final, NamedTuple

import trio

from protocol.errors import ApiError
from protocol.position import Position, parse_cursor
from protocol.resp import RedisError
from protocol.signatures import sign
from protocol.update import Update, format_time
from protocol.watch import EVERYTHING
from protocol.wire import update_message
from server.brokers.redis_errors import RedisClientError
from server.config import Callback
from server.history import History
from server.logs import log_event
from server.seen import Seen

if TYPE_CHECKING:
    import httpx

    from server.brokers.base import Broker
    from server.brokers.redis_lease import Lease
    from server.jobs import Jobs

LOG: Final = logging.getLogger("statuswire.callbacks")

# Endings that wait for their time or for another try; beyond, they wait in the log.
MAX_WAITING: Final = 50_000
# Read from the log at a time, before others have a turn.
TAKE: Final = 1000
# Another try after about this long, twice as long each time, up to ten minutes; spread over all of it.
RETRY_S: Final = 1.0
MAX_RETRY_S: Final = 600.0
# What may pass besides all that is the application's own fault (5xx): too fast, too early, timeouts.
PASSING: Final = frozenset({408, 425, 429})
# After a crash up to so much is told a second time.
MARK_EVERY_S: Final = 1.0
CLOSE_S: Final = 1.0
# A node that dies is followed by another one within this time.
LEASE_S: Final = 5.0


class Ending(NamedTuple):
    """One that is to be told, when it is due. Ordered by that."""

    due: float  # seconds of trio's clock
    offset: int
    update: Update
    tries: int


class Source(NamedTuple):
    """What callbacks read from."""

    broker: Broker
    history: History
    jobs: Jobs
    seen: Seen


class Counts:
    """What became of endings: plain counters of one callback."""

    __slots__ = ("failed", "given_up", "seen", "told")

    def __init__(self) -> None:
        self.told = 0
        self.failed = 0  # tries
        self.given_up = 0
        self.seen = 0


class Teller:
    """Tells one URL.

    Args:
        name: of the callback.
        config: of the callback.
        source: where endings come from.
        clock: unix seconds.

    Attributes:
        counts: what became of endings so far.
    """

    def __init__(self, name: str, config: Callback, source: Source, *, clock: Callable[[], float] = time.time) -> None:
        self.name = name
        self.counts = Counts()
        self._config = config
        self._source = source
        self._clock = clock
        self._wake = trio.Event()
        self._work = trio.Event()
        self._due: list[Ending] = []  # a heap
        self._open: dict[int, int] = {}  # offsets that are not settled, lowest first, and their times
        self._after = source.history.last  # taken from the log up to here
        self._epoch = ""
        self._at_ms = 0  # the time up to which everything is settled or waits

    @property
    def waiting(self) -> int:
        """Endings that wait for their time, or for the application."""
        return len(self._open)

    def wake(self) -> None:
        """The log has more. Never waits."""
        self._wake.set()

    async def run(self, client: httpx.AsyncClient) -> None:
        """Tell, until cancelled; go on where the mark is."""
        try:
            await self._begin()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._save_marks)
                for _ in range(self._config.concurrency):
                    nursery.start_soon(self._tell_for_ever, client)
                await self._take_for_ever()
        finally:
            self._due, self._open = [], {}  # they are the next node's now

    # What is to be told

    async def _begin(self) -> None:
        """Find out where to go on. Retries until the store answers."""
        broker, history = self._source.broker, self._source.history
        while True:
            try:
                await broker.follow([EVERYTHING])
                mark = await broker.load_mark(self._mark_name)
                break
            except ApiError:
                await trio.sleep(RETRY_S)
        cursor, _, at_ms = (mark or "").partition(" ")
        position = parse_cursor(cursor) if cursor else None
        self._epoch, self._at_ms = history.epoch, int(at_ms or 0)
        if position is None:  # for the first time: what had ended before this server began is known by now
            self._at_ms = int(self._clock() * 1000)
        elif isinstance(position, Position) and history.reaches(position):
            self._after = position.offset
        else:
            self._begin_anew()

    def _begin_anew(self) -> None:
        """The log does not reach back to where we were: the records tell what ended since."""
        history, settled_ms = self._source.history, self._settled_ms
        missed = [job.latest for job in self._source.jobs.jobs.values() if job.latest.at_ms > settled_ms]
        missed.sort(key=lambda update: update.offset)
        log_event(LOG, logging.WARNING, "callback_log_lost", callback=self.name, epoch=history.epoch)
        self._epoch, self._after = history.epoch, history.last
        self._due.clear()
        self._open.clear()
        for update in missed:
            self._add(update)

    async def _take_for_ever(self) -> None:
        history = self._source.history
        while True:
            self._wake = trio.Event()
            if history.epoch != self._epoch or self._after < history.first - 1:
                self._begin_anew()
            while self._after < history.last and len(self._open) < MAX_WAITING:
                self._take(history)
                await trio.lowlevel.checkpoint()
            await self._wake.wait()

    def _take(self, history: History) -> None:
        upto = min(self._after + TAKE, history.last)
        for update in history.between(self._after, upto):
            self._at_ms = update.at_ms
            self._add(update)
        self._after = upto

    def _add(self, update: Update) -> None:
        config = self._config
        if update.type in config.types and (not config.kinds or update.kind in config.kinds):
            wait = update.at_ms / 1000 + config.unseen_after - self._clock()
            self._open[update.offset] = update.at_ms
            self._put(Ending(trio.current_time() + max(0.0, wait), update.offset, update, 0))

    def _put(self, ending: Ending) -> None:
        heappush(self._due, ending)
        if self._due[0] is ending:
            self._work.set()
            self._work = trio.Event()

    # Telling it

    async def _tell_for_ever(self, client: httpx.AsyncClient) -> None:
        while True:
            due = self._due
            if due and due[0].due <= trio.current_time():
                ending = heappop(due)
                if ending.offset in self._open:
                    await self._settle(client, ending)
                continue
            with trio.move_on_at(due[0].due if due else float("inf")):
                await self._work.wait()

    async def _settle(self, client: httpx.AsyncClient, ending: Ending) -> None:
        config, update, epoch = self._config, ending.update, self._epoch
        if config.unseen_after and not ending.tries and await self._source.seen.since(update.user_id, update.at_ms):
            self.counts.seen += 1
        else:
            trouble, asked = await self._post(client, update)
            if trouble is None:
                self.counts.told += 1
            else:
                self.counts.failed += 1
                age = self._clock() - update.at_ms / 1000 - config.unseen_after
                if asked >= 0 and age < config.give_up_after:
                    if epoch == self._epoch:
                        self._retry(ending, asked)
                    return
                self.counts.given_up += 1
                log_event(
                    LOG, logging.ERROR, "callback_given_up", callback=self.name, jobId=update.job_id, reason=trouble
                )
        if epoch == self._epoch:
            self._open.pop(ending.offset, None)
        if len(self._open) == MAX_WAITING - 1:
            self.wake()

    def _retry(self, ending: Ending, asked: float) -> None:
        """Full jitter, so that what failed together does not come again together."""
        if not ending.tries:
            log_event(LOG, logging.WARNING, "callback_failed", callback=self.name, jobId=ending.update.job_id)
        bound = min(MAX_RETRY_S, RETRY_S * 2 ** min(ending.tries, 16))
        wait = max(random.uniform(0.0, bound), min(asked, MAX_RETRY_S))
        self._put(ending._replace(due=trio.current_time() + wait, tries=ending.tries + 1))

    async def _post(self, client: httpx.AsyncClient, update: Update) -> tuple[str | None, float]:
        """Tell it once.

        Returns:
            What went wrong, None if nothing; and how many seconds the application asks for, -1 to try no more.
        """
        config = self._config
        cursor = f"{self._epoch}:{update.offset}"
        body = update_message(update, cursor)[:-1] + b',"callback":"%b","unseen":%b,"sentAt":"%b"}' % (
            self.name.encode(),
            b"true" if config.unseen_after else b"false",
            format_time(int(self._clock() * 1000)).encode(),
        )
        now = int(self._clock())
        headers = {
            "Content-Type": "application/json; charset=utf-8",
            # Not the cursor: a log that begins anew tells the same ending under another.
            "Idempotency-Key": f"{self.name}:{update.job_id}:{update.version}:{update.at_ms}",
            "X-Timestamp": str(now),
        }
        if config.secret:
            headers["X-Signature-256"] = sign(config.secret, now, body)
        answer: httpx.Response | None = None
        try:
            with trio.fail_after(config.timeout):
                async with client.stream(
                    "POST", config.url, content=body, headers=headers, timeout=config.timeout
                ) as answer:
                    async for _ in answer.aiter_raw():  # to its end, so that the connection can be used again
                        pass  # only the status counts, and nobody knows how long it is
        except trio.TooSlowError:
            if answer is None:
                return f"no answer within {config.timeout:g} s", 0.0
        except Exception as error:  # whatever the application or the library does, the others are told
            return f"{type(error).__name__}: {error}", 0.0
        if answer.is_success:
            return None, 0.0
        passing = answer.is_server_error or answer.status_code in PASSING
        return f"status {answer.status_code}", _retry_after(answer.headers.get("retry-after")) if passing else -1.0

    # The mark

    @property
    def _mark_name(self) -> str:
        return f"callback:{self.name}"

    @property
    def _mark(self) -> str:
        """Everything up to here is settled."""
        settled = next(iter(self._open), self._after + 1) - 1
        return f"{self._epoch}:{settled} {self._settled_ms}"

    @property
    def _settled_ms(self) -> int:
        return next(iter(self._open.values()), self._at_ms + 1) - 1

    async def _save_marks(self) -> None:
        saved = ""
        try:
            while True:
                saved = await self._save_mark(saved)
                await trio.sleep(MARK_EVERY_S)
        finally:
            with trio.move_on_after(CLOSE_S, shield=True):
                await self._save_mark(saved)

    async def _save_mark(self, saved: str) -> str:
        mark = self._mark
        if mark != saved:
            try:
                await self._source.broker.save_mark(self._mark_name, mark)
            except ApiError:
                return saved  # the store is away; the next one will say more
        return mark


class Callbacks:
    """All callbacks of a node.

    Attributes:
        tellers: one for every callback that is configured.
        active: it is this node that tells.
    """

    def __init__(self, callbacks: Mapping[str, Callback], source: Source, lease: Lease | None) -> None:
        self.tellers = [Teller(name, config, source) for name, config in callbacks.items()]
        self.active = False
        self._lease = lease

    def wake(self) -> None:
        """A job has ended. Never waits."""
        for teller in self.tellers:
            teller.wake()

    async def run(self) -> None:
        """Tell while it is this node's turn, until cancelled."""
        import httpx

        # No proxy from the environment, no redirect: what is told goes to the configured address and nowhere else.
        client = httpx.AsyncClient(trust_env=False, limits=httpx.Limits(max_connections=None))
        lease = self._lease
        try:
            while lease is not None:
                if await self._hold(lease):
                    await self._tell(client, lease)
                else:
                    await trio.sleep(LEASE_S / 3)
            await self._tell(client, None)
        finally:
            with trio.move_on_after(CLOSE_S, shield=True):  # cancelled, it would leave its sockets open
                await client.aclose()
            if lease is not None:
                lease.release()

    async def _tell(self, client: httpx.AsyncClient, lease: Lease | None) -> None:
        self.active = True
        try:
            async with trio.open_nursery() as nursery:
                for teller in self.tellers:
                    nursery.start_soon(teller.run, client)
                while lease is not None:
                    await trio.sleep(LEASE_S / 3)
                    if not await self._hold(lease):
                        nursery.cancel_scope.cancel()
                        break
        finally:
            self.active = False

    async def _hold(self, lease: Lease) -> bool:
        with suppress(RedisClientError, RedisError):
            await lease.hold()
        return lease.held


def _retry_after(text: str | None) -> float:
    """Seconds that an answer asks to wait (RFC 9110 section 10.2.3); dates are not worth the trouble here."""
    return float(text) if text is not None and text.isdecimal() else 0.0
