"""The reading half of the Redis broker: follows shards of the log and shows what they say, in order and without holes.

A shard is followed in this order: subscribe, load its jobs and its part of the log, read what came meanwhile, then go
on with the messages. A message names the one before it, so a hole is noticed with the next message (or within two
seconds, by ``Follower.check``) and filled from the streams. Every reading from the streams begins at the newest entry
that was shown: if that is not there any more, Redis has lost something, and the log begins anew as another epoch.
"""

from __future__ import annotations

import logging
import random
from collections import deque
from collections.abc import Callable, Collection, Iterable
from time import perf_counter
from typing import Final, Literal

import trio

from protocol.errors import ApiError
from protocol.position import Position, parse_cursor
from protocol.resp import RedisError
from protocol.update import Update
from protocol.watch import NOTICES
from server.brokers.base import Deliver
from server.brokers.local import new_epoch
from server.brokers.redis_client import Client, RedisClientError
from server.brokers.redis_keys import (
    AFTER,
    BEGIN,
    CHANNELS,
    JOBS,
    LOAD,
    LOGS,
    META,
    NOTICES_SHARD,
    RENEW,
    SCHEMA,
    SHARD_OF_CHANNEL,
    SHARDS,
    Message,
    Stored,
    decode_message,
    shard_of,
)
from server.brokers.redis_notices import load_stored
from server.brokers.redis_reading import cut_of, decode_jobs, read_log
from server.brokers.redis_shown import Loaded, LogLostError, OutOfStepError, Shown
from server.history import History
from server.inbox import Inboxes, Place
from server.jobs import Jobs
from server.turns import TURN_S, in_turns

log = logging.getLogger("statuswire.broker")

# How long a reader waits for a shard to be loaded before it is told to come again.
FOLLOW_S: Final = 10.0
# Messages that may wait while a hole is being filled; beyond, they are read from the stream as well.
_MAX_BUFFERED: Final = 20_000
# Entries read from one log at a time: some hundred kilobytes.
_PAGE: Final = 500
_RETRY_S: Final = 0.2
# A shard of which nobody has asked or watched anything for so long is not followed any more.
IDLE_S: Final = 300.0
# Epochs remembered that are over.
_MAX_OVER: Final = 1000


class Follower:
    """Keeps ``Jobs`` and ``History`` in step with the followed shards.

    Args:
        jobs, history: what is shown.
        deliver: shows entries, see ``base.Deliver``.
        on_new_epoch: called with the new epoch when the log began anew and everything has been loaded again.
        on_shown: called with a shard after messages of it were shown, or when none will be any more.
        watched: the channels that readers are on just now.
        on_other: called with channel and payload of a message that is not of the log.
        inboxes: stored notifications; kept in step as well.
        on_evicted: called with those that had no room any more.

    Attributes:
        client: set before ``run``.
        followed: shards that are shown.
        seen: of each shard, the stamp of its newest message that was shown.
        arrived: there has been a connection; before the first one everybody waits for it.
        revs: of each shown job, the token of its state.
    """

    client: Client

    def __init__(
        self,
        jobs: Jobs,
        history: History,
        deliver: Deliver,
        *,
        on_new_epoch: Callable[[str], object],
        on_shown: Callable[[int], object],
        watched: Callable[[], Iterable[str]],
        on_other: Callable[[bytes, bytes], object] = lambda channel, data: None,
        inboxes: Inboxes,
        on_evicted: Callable[[list[Place]], object],
    ) -> None:
        self._history = history
        self._shown = Shown(jobs, history, deliver, inboxes, on_evicted)
        self._on_new_epoch = on_new_epoch
        self._on_shown = on_shown
        self._watched = watched
        self._on_other = on_other
        self.followed: frozenset[int] = frozenset()
        self.seen = self._shown.seen
        self.revs = self._shown.revs
        self.arrived = False
        self._behind = [0] * (SHARDS + 1)  # what ``check`` found in Redis a second ago
        self._wanted: set[int] = {NOTICES_SHARD}
        self._loaded: set[int] = set()  # of the followed ones: their records are ahead of what is shown
        self._asked = [0.0] * (SHARDS + 1)  # when a reader was last known to need it (Trio's clock)
        self._buffer: deque[tuple[int, bytes]] | None = None  # messages that wait while the streams are read
        self._overflowed = False
        self._gap = False  # messages may be missing: until the streams were read, none that came later is shown
        self._reload: Literal["", "load", "renew"] = ""
        self._over: dict[str, None] = {}  # epochs that were followed before, oldest first
        self._work = trio.Event()
        self._waiters: list[trio.Event] = []

    # Asking for more

    def shards_of(self, names: Iterable[str]) -> set[int]:
        """The shards on which these channels can have something."""
        shards = {NOTICES_SHARD}
        for name in names:
            kind, _, rest = name.partition("/")
            if name == NOTICES:
                continue
            if kind == "u":
                shards.add(shard_of(rest))
            elif kind == "j" and "/" in rest:
                shards.add(shard_of(rest.partition("/")[2]))
            else:  # all jobs, or one that may belong to anyone, or come to
                return set(range(SHARDS + 1))
        return shards

    def ahead(self, cursor: str | None) -> bool:
        """Whether a reader has been further, on another node, than what is shown here."""
        position = parse_cursor(cursor) if cursor else None
        return (
            isinstance(position, Position)
            and position.epoch == self._history.epoch
            and position.offset > self._history.last
        )

    async def follow(self, names: Iterable[str], cursor: str | None = None) -> None:
        """Return when all that these channels have is shown, and as far as ``cursor``.

        Raises:
            ApiError: 503 ``store_unavailable`` if Redis is away and it is not, or the cursor is ahead of what is.
        """
        shards = self.shards_of(names)
        now = trio.current_time()
        for shard in shards:
            self._asked[shard] = now
        missing = self._missing(shards)
        if not missing and not self.ahead(cursor):
            return
        if self.client.away is not None and self.arrived:
            # Nor is a reader who has been further given an older state for a newer one.
            raise unavailable(f"Redis is away: {self.client.away}")
        with trio.move_on_after(FOLLOW_S):
            while True:
                self._wanted |= missing
                await self.synchronise()
                # All of them: while it took long, one that was there at first may have been let go of.
                missing = self._missing(shards)
                if not missing:
                    return
        raise unavailable("Redis does not answer in time")

    def _missing(self, shards: set[int]) -> set[int]:
        return {shard for shard in shards if shard not in self.followed or shard in self._loaded}

    async def synchronise(self) -> None:
        """Return when everything that is in Redis by now is shown, as far as it is followed."""
        done = trio.Event()
        self._waiters.append(done)
        self.wake()
        try:
            await done.wait()
        finally:
            if done in self._waiters:
                self._waiters.remove(done)

    def wake(self) -> None:
        """Read from the streams soon."""
        self._work.set()

    # Messages

    def take(self, channel: bytes, data: bytes) -> None:
        """A message came: show it if it is the next one. Called in log order; the hot path."""
        try:
            shard = SHARD_OF_CHANNEL[channel]
        except KeyError:
            self._on_other(channel, data)
            return
        self._take(shard, data)

    def _take(self, shard: int, data: bytes) -> None:
        if self._buffer is not None:
            if len(self._buffer) < _MAX_BUFFERED:
                self._buffer.append((shard, data))
            else:
                self._overflowed = True
        else:
            self._take_next(shard, data)

    def _take_next(self, shard: int, data: bytes) -> None:
        if shard not in self.followed:
            return
        message = decode_message(data)
        if message.epoch != self._history.epoch:
            self.wake()  # what Redis has now decides: it may be an old one that was under way
        elif message.stamp > self.seen[shard]:
            if message.prev != self.seen[shard] or message.first <= self._history.last:
                self._hold()
            else:
                self._shown.show(shard, message, data)
                self._on_shown(shard)

    def resubscribed(self, channels: Collection[bytes]) -> None:
        """Messages of these channels come from now on; what was published before may have been missed."""
        if any(SHARD_OF_CHANNEL.get(channel) in self.followed for channel in channels):
            self._hold()

    def _hold(self) -> None:
        """Show nothing until the streams were read: other shards must not get past what this one has missed."""
        self._gap = True
        if self._buffer is None:
            self._buffer = deque()
        self.wake()

    # Reading from Redis

    async def run(self) -> None:
        """Load, fill holes and begin anew as needed, until cancelled."""
        while True:
            await self._work.wait()
            self._work = trio.Event()
            waiters, self._waiters = self._waiters, []
            try:
                await self._read()
            except LogLostError as error:
                log.warning("what was shown is not in Redis any more: %s", error)
                self._reload = "renew"
                self._again(waiters)
            except OutOfStepError as error:
                log.warning("the log has to be loaded again: %s", error)
                self._reload = self._reload or "load"
                self._again(waiters)
            except (RedisClientError, RedisError) as error:
                log.info("reading from Redis failed, trying again: %s", error)
                self._again(waiters)
                with trio.move_on_after(5 * _RETRY_S):
                    await self.client.wait_up()
                await trio.sleep(random.uniform(0, _RETRY_S))
            except Exception:
                # Something in Redis that is not ours, say; what is known goes on being served.
                log.exception("what Redis has cannot be taken in, trying again")
                self._again(waiters)
                await trio.sleep(5 * _RETRY_S)
            else:
                for waiter in waiters:
                    waiter.set()

    def _again(self, waiters: list[trio.Event]) -> None:
        self._waiters = waiters + self._waiters
        self._work.set()

    async def _read(self) -> None:
        try:
            await self._unfollow_idle()
            if self._reload:
                await self._begin_anew()
            if self._gap:
                await self._catch_up()  # should loading fail, what is followed goes on
            missing = self._wanted - self.followed
            if missing:
                await self._subscribe(missing)
                await self._load(missing)
            await self._catch_up()
            self._loaded.clear()
        finally:
            if self._buffer is not None and not self._gap:
                await self._drain()

    async def _unfollow_idle(self) -> None:
        """Let go of shards that nobody needs here, so that their updates cost nothing.

        Their entries stay in the ring until they are too old: they are true, and places of later ones stay empty.
        """
        now = trio.current_time()
        idle = self._idle(now)
        if not idle:
            return
        self.followed -= idle
        self._wanted -= idle
        self.client.unsubscribe([CHANNELS[shard] for shard in idle])
        for shard in idle:
            self._behind[shard] = 0
        letting_go = self._shown.let_go(idle)
        for shard in idle:
            self._on_shown(shard)
        await in_turns(letting_go)

    def _idle(self, now: float) -> set[int]:
        """Followed shards that nobody has asked for lately, nor watches."""
        if self.client.away is not None:
            return set()  # what is known here is all that there is to be read
        candidates = {shard for shard in self.followed if shard != NOTICES_SHARD and now - self._asked[shard] > IDLE_S}
        idle = set(candidates)
        if idle:
            for name in self._watched():
                idle -= self.shards_of((name,))
                if not idle:
                    break
        for shard in candidates - idle:
            self._asked[shard] = now
        return idle

    async def _subscribe(self, shards: set[int]) -> None:
        channels = [CHANNELS[shard] for shard in shards]
        self.client.subscribe(channels)
        with trio.move_on_after(FOLLOW_S) as patience:
            await self.client.wait_subscribed(channels)
        if patience.cancelled_caught:
            raise RedisClientError("subscribing takes too long")

    async def _load(self, shards: set[int]) -> None:
        """Take shards in: their jobs as they are now, their part of the log as far as others have been shown."""
        # From here on nothing else is shown: no record may be older than the place in the log that it is read at.
        if self._buffer is None:
            self._buffer = deque()
        limit = self._history.last
        loaded: list[Stored] = []
        for shard in sorted(shards):  # one by one: Redis does nothing else meanwhile
            epoch, offset, _, table = await self.client.call_script(LOAD, [META, JOBS[shard]], [], patience=FOLLOW_S)
            self._check_epoch(epoch)
            loaded += await decode_jobs([table], offset)
        entries: list[Update] = []
        newest: dict[int, tuple[int, bytes | None]] = {}
        for shard in shards:
            read, newest[shard] = await read_log(self.client, shard, self._history.first, limit)
            entries += read
        inboxes = await load_stored(self.client) if NOTICES_SHARD in shards else None
        cut = await cut_of(self.client, shards)
        # Nothing of these shards was shown before and nobody may read it yet: the rest is shown by _catch_up, among it
        # what is in these records already.
        await self._shown.add(Loaded(limit, loaded, entries, newest, cut, inboxes))
        self._loaded |= shards
        self.followed |= shards
        self._gap = True  # others' messages that wait here may be later than what these have not shown yet

    async def _catch_up(self) -> None:
        """Show what came after the newest that was shown, over all followed shards, in log order."""
        gap, self._gap = self._gap, False
        try:
            await self._show_what_came()
        except BaseException:
            self._gap = self._gap or gap
            raise

    async def _show_what_came(self) -> None:
        shards = sorted(self.followed)
        while True:
            if self._buffer is None:
                self._buffer = deque()
            keys = [META, *(LOGS[shard] for shard in shards)]
            stamps = [self.seen[shard] for shard in shards]
            epoch, offset, *found = await self.client.call_script(AFTER, keys, [_PAGE, *stamps], patience=FOLLOW_S)
            self._check_epoch(epoch)
            if offset < self._history.last:
                raise LogLostError(f"offset {self._history.last} was shown, Redis is at {offset}")
            bound = offset
            fresh: list[tuple[int, Message, bytes]] = []
            until = perf_counter() + TURN_S
            for shard, cut, page in zip(shards, found[::2], found[1::2], strict=True):
                if perf_counter() > until:
                    await trio.lowlevel.checkpoint()
                    until = perf_counter() + TURN_S
                messages = self._shown.following(shard, page, offset, cut)
                fresh += [(shard, message, data) for message, data in messages]
                if len(page) == _PAGE:
                    bound = min(bound, decode_message(page[-1][1][1]).stamp)
            fresh.sort(key=lambda item: item[1].stamp)
            for shard, message, data in fresh:
                if message.stamp <= bound:
                    if message.first <= self._history.last:
                        raise LogLostError(f"offset {message.first} is another one's now")
                    self._shown.show(shard, message, data)
                if perf_counter() > until:
                    await trio.lowlevel.checkpoint()
                    until = perf_counter() + TURN_S
            self._history.skip(bound)
            for shard in shards:
                self._on_shown(shard)
            if bound == offset:
                return

    async def _drain(self) -> None:
        """Go on with the messages that came while the streams were read, and come while they are shown."""
        assert self._buffer is not None
        until = perf_counter() + TURN_S
        while self._buffer:
            shard, data = self._buffer.popleft()
            self._take_next(shard, data)
            if self._gap:
                return
            if perf_counter() > until:
                await trio.lowlevel.checkpoint()
                until = perf_counter() + TURN_S
        self._buffer = None
        if self._overflowed:
            self._overflowed = False
            self._hold()

    # Epochs

    def _check_epoch(self, epoch: bytes | None) -> None:
        if epoch is None or epoch.decode() != self._history.epoch:
            raise OutOfStepError(f"epoch {self._history.epoch} is over")

    async def _begin_anew(self) -> None:
        """Load everything again; before that, if our epoch lost a part of its log, replace it by another one."""
        begin = await self.client.call_script(BEGIN, [META], [new_epoch(), SCHEMA, SHARDS], patience=FOLLOW_S)
        if begin[0] is None:
            raise RedisClientError("something is being imported")
        epoch: bytes = begin[0]
        # One that was over already has come back: an old copy, whose next entries will be others than those it had.
        if epoch.decode() in self._over or (self._reload == "renew" and epoch.decode() == self._history.epoch):
            epoch = await self.client.call_script(RENEW, [META], [epoch, new_epoch()])
        shards = sorted(self.followed)
        found, offset, _, *tables = await self.client.call_script(LOAD, [META, *(JOBS[shard] for shard in shards)], [])
        if found != epoch:
            raise RedisClientError("the epoch changed while it was being loaded")
        loaded = await decode_jobs(tables, offset)
        first = max(1, offset - self._history.max_updates + 2)
        entries: list[Update] = []
        newest: dict[int, tuple[int, bytes | None]] = {}
        for shard in shards:
            read, newest[shard] = await read_log(self.client, shard, first, offset)
            entries += read
        cut = await cut_of(self.client, shards)
        inboxes = await load_stored(self.client)
        # Entries of the old epoch count in the new one: nobody resumes behind them with an old cursor.
        fresh = await self._shown.beside(epoch.decode(), Loaded(offset, loaded, entries, newest, cut, inboxes))
        self._reload = ""
        if epoch.decode() != self._history.epoch:
            self._over[self._history.epoch] = None
            if len(self._over) > _MAX_OVER:
                del self._over[next(iter(self._over))]
        self._gap = True  # what was published while it was loaded
        self._shown.become(fresh)
        self._behind = [0] * (SHARDS + 1)
        log.warning("the log starts anew as epoch %s", epoch.decode())
        self._on_new_epoch(epoch.decode())

    def begin(self, epoch: str, offset: int) -> None:
        """Nothing is shown, nothing is followed, and the log stands at ``offset``."""
        self._shown.begin(epoch, offset)

    # Once a second

    def check(self, meta: dict[bytes, bytes]) -> None:
        """Compare with Redis' ``meta``: what was missing a second ago and still is, was missed."""
        if meta.get(b"epoch", b"").decode() != self._history.epoch:
            self.wake()
            return
        level = True
        for shard in self.followed:
            if self.seen[shard] < self._behind[shard]:
                self.wake()
            self._behind[shard] = int(meta.get(b"last:%d" % shard, b"0"))
            level = level and self.seen[shard] >= self._behind[shard]
        if self._idle(trio.current_time()):
            self.wake()
        offset = int(meta[b"offset"])
        if offset < self._history.last:
            self.wake()
        elif level and self._buffer is None:
            self._history.skip(offset)  # a quiet reader's cursor moves with the log


def unavailable(reason: str) -> ApiError:
    """503: the store is away."""
    return ApiError(503, "store_unavailable", f"the store is away ({reason}); try again", retry_after=2)
