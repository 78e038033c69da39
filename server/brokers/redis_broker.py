"""The broker of several nodes: the log, the records and all that must agree are in Redis; see ``redis_keys``.

Every node decides by itself (``redis_publisher``) and shows what Redis tells it, its own updates too
(``redis_follower``). Nothing here depends on another node being there.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from typing import Any, Final

import trio

from protocol.errors import ApiError
from protocol.resp import RedisError
from protocol.update import Job, Update
from server.brokers.base import Deliver, Expire, Operation, StoreError, Submission
from server.brokers.local import new_epoch
from server.brokers.redis_calls import Doubt
from server.brokers.redis_client import (
    Client,
    NodeInfo,
    Options,
    RedisClientError,
    RedisStartError,
    make_client,
    open_client,
    parse_redis_url,
)
from server.brokers.redis_doubts import find_written
from server.brokers.redis_follower import Follower, unavailable
from server.brokers.redis_keys import (
    BEGIN,
    LEASES,
    META,
    PROBE,
    SCHEMA,
    SHARDS,
    TICK,
    WHERE,
    cursor_key,
    mark_key,
    stored_of,
)
from server.brokers.redis_notices import drop
from server.brokers.redis_presence import CONTROL
from server.brokers.redis_publisher import Publisher
from server.cluster import Cluster
from server.history import History
from server.inbox import Inboxes, Place
from server.jobs import Jobs

log = logging.getLogger("statuswire.broker")

# What a user in Redis has to be given.
NEEDED: Final = "+@all -@dangerous +info ~{statuswire}:* &{statuswire}:* ~statuswire:ingest* &job_*_updates"
# How often a node looks for leases that ran out, and whether it missed anything.
TICK_S: Final = 1.0
# Leases that run out are looked at this much later at most: not all nodes at once, so that most find it done.
_LEASE_JITTER_S: Final = 0.05
_LEASES_AT_ONCE: Final = 500
# A clock that differs less from Redis' is left as it is.
_CLOCK_OFF_S: Final = 1.0
# How often those who wait are looked through for some that have waited too long.
_PATIENCE_STEP_S: Final = 0.25
# No entry is taken out of Redis for its age sooner, however short ``history.max_age`` is.
_LEAST_KEPT_S: Final = 3600.0
# After being cancelled, for what is under way to be answered.
_FINISH_S: Final = 2.0


class RedisBroker:
    """One node's share of a log in Redis.

    Args:
        url: see ``redis_url.parse_redis_url``.
        jobs: the shown records of what is followed; filled through ``deliver`` and by ``follow``.
        history: likewise. Its bounds of count and age hold in Redis too, so they must be the same on all nodes.
        deliver: see ``base.Deliver``.
        on_new_epoch: called with the epoch when everything had to be loaded anew: every reader needs a snapshot.
        watched: the channels that readers are on just now: their part of the log goes on being followed.
        options: how patient the client is.
        clock: unix time in seconds.

    Attributes:
        cluster: shares the connections, and is run along with this; set before ``start``.
    """

    def __init__(
        self,
        url: str,
        jobs: Jobs,
        history: History,
        deliver: Deliver,
        *,
        on_new_epoch: Callable[[str], object] | None = None,
        watched: Callable[[], Iterable[str]] = tuple,
        options: Options | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._url = url
        self._history = history
        self._deliver = deliver
        self._on_new_epoch = on_new_epoch
        self._options = options
        self._clock = clock
        # Calls whose answer was lost are looked for in the log once Redis is back.
        self._keep_s = max(history.max_age, _LEAST_KEPT_S)
        self.inboxes = Inboxes()
        self.follower = Follower(
            jobs,
            history,
            self._show,
            on_new_epoch=self._new_epoch,
            on_shown=lambda shard: self._publisher.answers.on_shown(shard),
            watched=watched,
            on_other=self._take_other,
            inboxes=self.inboxes,
            on_evicted=self._drop,
        )
        self._publisher = Publisher(
            jobs, history, self.follower, self.inboxes, clock=self._now, on_lease=self._expect_lease
        )
        self.cluster: Cluster | None = None
        self._client: Client | None = None
        self._clock_off_s = 0.0
        self._next_tick = 0.0
        self._up_since = 0.0
        self._connects = 0
        self._leases_from = 0  # so many that have run out are passed over
        self._hurry = trio.Event()

    @property
    def epoch(self) -> str:
        """Names this incarnation of the log."""
        return self._history.epoch

    @property
    def client(self) -> Client:
        """For other commands of this node; there from ``start`` on."""
        assert self._client is not None
        return self._client

    @property
    def available(self) -> str | None:
        """None while Redis takes writes, else why it does not."""
        if self._publisher.closing:
            return "closed"
        away = self._client.away if self._client is not None else "not connected yet"
        return away if away is not None else self._publisher.refusing

    @property
    def live(self) -> bool:
        """See ``base.Broker``. A Redis that takes no writes takes nobody's, so nothing is missed by reading it."""
        return self._client is not None and self._client.away is None

    @property
    def refusing(self) -> str | None:
        """Why an operation would be refused now, None if it would be tried. Before the first connection it waits."""
        away = self._client.away if self._client is not None and self.follower.arrived else None
        return away if away is not None else self._publisher.refusing

    async def wait_up(self) -> None:
        """Return when Redis can be reached."""
        assert self._client is not None
        await self._client.wait_up()

    async def executed(self, doubts: Collection[Doubt]) -> set[str]:
        """The tokens of those calls that Redis has executed, as far as its logs reach back.

        Raises:
            RedisClientError, RedisError: Redis does not say.
        """
        floors: dict[int, int] = {}
        for doubt in doubts:
            # Under another name the log may have gone on from an earlier place.
            floor = doubt.floor if doubt.epoch == self.epoch else 0
            floors[doubt.shard] = min(floor, floors.get(doubt.shard, floor))
        return set(await find_written(self.client, floors, {doubt.rev for doubt in doubts}))

    async def start(self) -> None:
        """Check that Redis can be used, and see where its log stands. Raises StoreError with what to do."""
        problem: RedisError | RedisClientError | None = None
        begin: Any = None
        try:
            url = parse_redis_url(self._url)
            async with open_client(url, options=self._options) as client:
                try:
                    begin = await client.call_script(BEGIN, [META], [new_epoch(), SCHEMA, SHARDS])
                    await self._compare_clocks(client)
                except (RedisError, RedisClientError) as error:  # beyond the client's nursery it would be a group
                    problem = error
        except RedisStartError as error:
            raise StoreError(f"store.url: {error}") from error
        if problem is not None:
            hint = ""
            if isinstance(problem, RedisError) and (problem.code == "NOPERM" or "ACL" in problem.message):
                hint = f"; its user needs: ACL SETUSER {url.username or 'default'} {NEEDED}"
            raise StoreError(f"store.url: {url} does not take the first command ({problem}){hint}")
        epoch, offset, _, schema, shards = begin
        if epoch is None:
            raise StoreError(
                f"store.url: an import into {url} is under way or broke off; let it finish, or run it again"
            )
        if int(schema) != SCHEMA or int(shards) != SHARDS:
            raise StoreError(
                f"store.url: what is kept at {url} has format {int(schema)} with {int(shards)} shards, this version "
                f"uses format {SCHEMA} with {SHARDS}; use the version that wrote it, or another database"
            )
        self.follower.begin(epoch.decode(), int(offset))
        self._client = self._publisher.client = self.follower.client = make_client(
            url,
            options=self._options,
            on_up=self._went_up,
            on_message=self.follower.take,
            on_subscribed=self.follower.resubscribed,
            on_lost=lambda channels: self._publisher.answers.release_all(),
        )
        if self.cluster is not None:
            self.cluster.begin(self._client)

    async def run(self) -> None:
        """Be connected, until cancelled; then finish what is under way, if Redis lets it."""
        services = trio.CancelScope(shield=True)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._serve, services)
            try:
                await trio.sleep_forever()
            finally:
                with trio.move_on_after(_FINISH_S, shield=True):
                    await self._publisher.answers.wait_idle()
                    if self.cluster is not None:
                        await self.cluster.finish()
                services.cancel()

    async def _serve(self, scope: trio.CancelScope) -> None:
        assert self._client is not None
        with scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._client.run)
                nursery.start_soon(self.follower.run)
                nursery.start_soon(self._publisher.run)
                nursery.start_soon(self._tick_for_ever)
                if self.cluster is not None:
                    nursery.start_soon(self.cluster.run)
                while True:
                    await trio.sleep(_PATIENCE_STEP_S)
                    self._publisher.give_up(trio.current_time())

    def figures(self) -> dict[str, int]:
        """See ``base.Broker``; ``commands`` wait for Redis' answer, ``connects`` counts connections made to it."""
        commands = self._client.pending if self._client is not None else 0
        return {"waiting": self._publisher.waiting, "commands": commands, "connects": self._connects}

    def submit(self, operations: Sequence[Operation]) -> Submission:
        """See ``base.Broker``; the results are there once it is kept."""
        return self._publisher.submit(operations)

    async def follow(self, names: Iterable[str], cursor: str | None = None) -> None:
        """See ``base.Broker``."""
        await self.follower.follow(names, cursor)

    async def recall(self, client: str) -> str | None:
        """The cursor that a polling client was given last, on any node; None if Redis does not say."""
        if self._client is None:
            return None
        try:
            cursor = await self._client.call("GET", cursor_key(client))
        except (RedisClientError, RedisError):
            return None  # a snapshot then, which is never wrong
        return None if cursor is None else cursor.decode()

    def remember(self, client: str, cursor: str, seconds: float) -> None:
        """See ``recall``."""
        if self._client is not None:
            with suppress(RedisClientError):
                self._client.send("SET", cursor_key(client), cursor, "EX", int(seconds))

    async def load_mark(self, name: str) -> str | None:
        """See ``base.Broker``."""
        text = await self._ask("GET", mark_key(name))
        return None if text is None else text.decode()

    async def save_mark(self, name: str, text: str) -> None:
        """See ``base.Broker``."""
        await self._ask("SET", mark_key(name), text)

    async def _ask(self, *command: bytes | str) -> bytes | None:
        try:
            text: bytes | None = await self.client.call(*command)
            return text
        except (RedisClientError, RedisError) as error:
            raise unavailable(f"Redis is away: {error}") from error

    async def close(self) -> None:
        """Refuse what comes later, and what could not be finished."""
        self._publisher.close()
        await trio.lowlevel.checkpoint()

    # What the parts tell each other

    def _show(self, kept: Sequence[tuple[Update, Job | None]]) -> None:
        self._deliver(kept)

    def _new_epoch(self, epoch: str) -> None:
        self._publisher.forget()
        if self._on_new_epoch is not None:
            self._on_new_epoch(epoch)

    def _went_up(self, node: NodeInfo) -> None:
        self._connects += 1
        if node.evicts is not None:
            log.warning("Redis at %s drops keys when it is full: set its maxmemory-policy to noeviction", node.address)
        assert self._client is not None
        if self._client.away is None:  # a cluster has several connections to wait for
            self.follower.arrived = True
        self._up_since = trio.current_time()
        self.follower.wake()
        self._publisher.wake()
        if self.cluster is not None:
            self.cluster.went_up()

    def _take_other(self, channel: bytes, data: bytes) -> None:
        if channel == CONTROL and self.cluster is not None:
            self.cluster.requests.take(data)

    def _drop(self, places: Sequence[Place]) -> None:
        """Stored notifications that every node lets go of by itself: what is left of them in Redis is of no use."""
        if places and self._client is not None:
            with suppress(RedisClientError):
                drop(self._client, self.epoch, places)

    # Leases

    def _expect_lease(self, seconds: float) -> None:
        due = trio.current_time() + seconds
        if due < self._next_tick:
            self._next_tick = due
            self._hurry.set()

    async def _tick_for_ever(self) -> None:
        assert self._client is not None
        while True:
            self._next_tick = trio.current_time() + TICK_S * random.uniform(0.75, 1.0)
            if self._client.away is None:
                try:
                    await self._tick()
                    await self._compare_clocks(self._client)
                except (RedisClientError, RedisError):
                    pass  # the next one will tell
                except Exception:
                    # Something in Redis that is not ours, say.
                    log.exception("what Redis has cannot be looked at")
                if self._publisher.refusing is not None:
                    await self._probe()
            while trio.current_time() < self._next_tick:
                self._hurry = trio.Event()
                with trio.move_on_at(self._next_tick):
                    await self._hurry.wait()
            await trio.lowlevel.checkpoint()

    async def _compare_clocks(self, client: Client) -> None:
        """Where this machine's clock is off, Redis' counts.

        Times in the log never go back: one server that is an hour ahead would stop the clock of all others for as long.
        """
        before = self._clock()
        seconds, micros = await client.call("TIME", key=META)
        after = self._clock()
        redis_s = int(seconds) + int(micros) / 1e6
        off = max(redis_s - after, 0.0) or min(redis_s - before, 0.0)
        if abs(off) < _CLOCK_OFF_S:
            off = 0.0
        if abs(off - self._clock_off_s) >= _CLOCK_OFF_S:
            log.warning("this machine's clock differs from Redis' by %.1f s; updates get Redis' time", off)
        self._clock_off_s = off

    def _now(self) -> float:
        """Unix time in seconds, as all nodes have it."""
        return self._clock() + self._clock_off_s

    async def _probe(self) -> None:
        """See if Redis takes writes again: while this node is not ready nobody may come whose update would show it."""
        assert self._client is not None
        with suppress(RedisClientError, RedisError):
            await self._client.call("SET", PROBE, "", "PX", 1000)
            self._publisher.refusing = None

    async def _tick(self) -> None:
        """Look if anything was missed, and at the leases that ran out."""
        assert self._client is not None
        meta, left_ms, *due = await self._client.call_script(
            TICK, [META, WHERE, LEASES], [_LEASES_AT_ONCE, self._keep_s, SHARDS + 1, self._leases_from]
        )
        self.follower.check(dict(zip(meta[::2], meta[1::2], strict=True)))
        now_ms = int(self._now() * 1000)
        self._history.trim(now_ms)
        self._drop(self.inboxes.trim(now_ms))
        if left_ms >= 0:
            self._expect_lease(left_ms / 1000 + random.uniform(0.001, _LEASE_JITTER_S))
        up_for = trio.current_time() - self._up_since
        operations: list[Operation] = []
        for blob in due:
            job = stored_of(blob, 0).job
            # While Redis was away no worker could report: each gets the length of its lease anew.
            if job is not None and up_for >= (job.private.ttl or 0.0):
                # With what Redis has: a lease that was renewed since has another ``heard``, and is left alone.
                operations.append(Expire(job.latest.job_id, job.private.heard))
        submission = self._publisher.submit(operations) if operations else None
        if len(due) < _LEASES_AT_ONCE:
            self._leases_from = 0
            return
        # There may be more behind those that are not to be declared yet.
        self._leases_from += len(due) - len(operations)
        if submission is not None:
            with trio.move_on_after(TICK_S), suppress(ApiError):
                await submission.wait_kept()
        self._expect_lease(_LEASE_JITTER_S)
