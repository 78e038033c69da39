"""One server process: what all its connections share, and how an update passes through it."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Iterable, Sequence
from email.utils import formatdate
from typing import TYPE_CHECKING, Final, Protocol, cast

import trio

from protocol.errors import ApiError
from protocol.notice import presence_notice, target_of
from protocol.presence import PresenceEvent
from protocol.update import Job, Update
from protocol.watch import EVERYTHING
from server.answers import Shared
from server.auth import Authenticator
from server.brokers.base import Broker, Notify, Submission
from server.brokers.memory import MemoryBroker
from server.brokers.sqlite import SqliteBroker
from server.channel import Reader
from server.config import Config
from server.counters import Counters
from server.cursors import KEPT_S, Client, Cursors
from server.history import History
from server.hub import Hub
from server.jobs import Jobs
from server.limits import Limits, parse_proxies
from server.logs import log_event
from server.origins import parse_origins
from server.poller import Poller
from server.presence import Presence
from server.seen import Seen
from server.tls import load_context
from server.wheel import Wheel

if TYPE_CHECKING:
    from server.brokers.redis_broker import RedisBroker
    from server.brokers.spooling import SpoolingBroker
    from server.callbacks import Callbacks
    from server.cluster import Cluster
    from server.exchange import Deferred
    from server.ingest.queues.service import Queues
    from server.ingest.service import Ingest

LOG: Final = logging.getLogger("statuswire")

# A drain answers so many polls that wait before others have their turn: some 2 ms.
POLLS_AT_ONCE: Final = 64
# Who comes over a limit is still told so, on this many sockets more; beyond, it is closed unheard.
REFUSED_SOCKETS: Final = 256
# Reconnects after a drain come back spread over at least this long.
MIN_SPREAD_S: Final = 2.0


class Stream(Protocol):
    """A live connection: it has left HTTP behind, and must be told when the server goes away."""

    def adopt(self, place: str) -> bool:
        """Take its socket over from the connection that it began on, and the place that this has among those of its
        address. Whether it wants a turn at once."""

    client_id: str
    heard_at: float  # when the peer last gave a sign of life, in Trio's seconds

    @property
    def transport(self) -> str:
        """``websocket`` or ``sse``."""

    def check_health(self) -> None:
        """End it if there has been no sign of life for too long. Must not wait."""

    def drain(self, delay_ms: int) -> None:
        """End it now, asking the client to come back after ``delay_ms``. Must not wait."""


class Node:
    """Everything with the lifetime of the process.

    Attributes:
        streams: live WebSocket and event-stream connections.
        connections: open sockets.
        turned_away: those of them that came over a limit.
        presence: who is connected.
        poller: serves the sockets.
        polls: those that wait.
        told: answers to polls, for others that ask for the same.
        intakes: the reading of lines of NDJSON.
        counters: what has happened so far.
        started: when, in unix seconds.
        cluster: what this node and those others know of each other.
        seen: which users were there lately.
        callbacks: tells the application of jobs that end; None if nobody wants that.
        ingest: what takes updates in from Redis, None without that.
        queues: what takes the jobs of job queues in, None without any.
        shared: the broker again (without its spool), if other nodes use its store too.
        spool: the broker again, if it keeps on disk what is published while its store is away.
        draining: set from SIGTERM on.
        handed_over: descriptors of listeners that others keep open and accept from after this process.
        worker: the number of this process if it is one of several, else 0.
        tls: certificate and key for TCP connections, None without TLS.
        plain: a connection begins with HTTP, without TLS or a PROXY header before it.
    """

    def __init__(self, config: Config, *, group: str = "", worker: int | None = None) -> None:
        """``group`` is shared by the workers of one ``statuswire serve``; ``worker`` is the number of this one."""
        self.wheel = Wheel()
        self.poller = Poller()
        self.limits = Limits(config.limits)
        self.presence = Presence(self.limits)
        self.presence.on_event = self._tell_presence
        self.jobs = Jobs(max_jobs=config.history.max_jobs)
        self.history = History(
            "",
            max_updates=config.history.max_updates,
            max_age=config.history.max_age,
            max_bytes=config.history.max_bytes,
        )
        self.counters = Counters()
        self.hub = Hub(self.history, self.counters, self._audience, self.poller.wanted)
        self.poller.urgent = self.hub.urgent
        self.broker: Broker
        self.shared: RedisBroker | None = None
        self.cluster: Cluster | None = None
        self.ingest: Ingest | None = None
        self.queues: Queues | None = None
        self.spool: SpoolingBroker | None = None
        if config.store.kind == "memory":
            self.broker = MemoryBroker(self.jobs, self.history, self.deliver, self.wheel)
        elif config.store.kind == "redis":
            # Imported here: who needs no Redis does without its client.
            from server.brokers.redis_broker import RedisBroker
            from server.cluster import Cluster
            from server.metrics import sample  # which knows what counts connections of this node

            self.shared = RedisBroker(
                config.store.url,
                self.jobs,
                self.history,
                self.deliver,
                on_new_epoch=self.log_lost,
                watched=self.watched,
            )
            self.broker = self.shared
            self.cluster = self.presence.cluster = self.shared.cluster = Cluster(
                self.presence, group=group, stats=lambda: sample(self)
            )
            self.limits.common = self.cluster
            if config.store.spool:
                from server.brokers.spool_file import left_by_others
                from server.brokers.spooling import SpoolingBroker

                self.broker = self.spool = SpoolingBroker(
                    self.shared,
                    config.store.spool_file(worker),
                    config.store.spool_max_bytes,
                    left_by_others(config.store.spool_path, worker, config.server.workers),
                )
        else:
            self.broker = SqliteBroker(
                config.store.path, self.jobs, self.history, self.deliver, self.wheel, on_new_epoch=self.log_lost
            )
        self.authenticator = Authenticator(config.auth)
        self.presence.on_sent_away = self._sent_away
        self.cursors = Cursors()
        unseen = any(callback.unseen_after for callback in config.callbacks.values())
        self.seen = Seen(self.presence, self.shared, wanted=unseen)
        self.callbacks: Callbacks | None = None
        self.streams: dict[Stream, None] = {}
        self.polls: dict[Deferred, None] = {}
        self.told = Shared()
        self.intakes: set[trio.CancelScope] = set()
        self.connections = 0
        self.turned_away = 0
        self.handed_over: list[int] = []
        self.worker = worker or 0
        self._heavy = trio.Lock()
        self._busy = 0
        self._quiet: trio.Event | None = None
        self.draining = False
        self.started = time.time()
        self._date = (0, "")
        self.tls = load_context(config.server)
        self.plain = self.tls is None and not config.server.proxy_protocol
        self._apply(config)

    def _apply(self, config: Config) -> None:
        self.origins = parse_origins(config.cors.origins)
        self.proxies = parse_proxies(config.server.trusted_proxies)
        self.config = config

    def reload(self, config: Config) -> None:
        """Take new keys, certificates, limits and origins; what only a restart can change stays as it is.

        Raises:
            ConfigError: a new key or certificate is unfit; nothing was changed.
        """
        # The two steps that can fail: lists were checked with the file.
        tls = load_context(config.server)
        self.authenticator.reload(config.auth)
        if self.tls is not None and tls is not None:
            self.tls = tls
        self.limits.reload(config.limits)
        self._apply(config)

    # Updates

    def deliver(self, kept: Sequence[tuple[Update, Job | None]]) -> None:
        """Show what the broker kept, in order: records, history, readers. Never waits."""
        self.history.extend([update for update, _ in kept])
        show, offer = self.jobs.show, self.hub.deliver
        for update, job in kept:
            show(update, job)
            offer(update)
            if update.ended and self.callbacks is not None:
                self.callbacks.wake()
        self.counters.shown += len(kept)

    def watched(self) -> Iterable[str]:
        """The channels that somebody here reads."""
        if self.callbacks is not None and self.callbacks.active:
            return (EVERYTHING,)
        return self.hub.channels

    def log_lost(self, epoch: str) -> None:
        """The broker began a new epoch: tell every reader."""
        log_event(LOG, logging.WARNING, "log_lost", epoch=epoch)
        if self.callbacks is not None:
            self.callbacks.wake()
        self.counters.logs_lost += 1
        self.hub.log_lost()

    def _tell_presence(self, event: PresenceEvent, key: str | None) -> Submission | None:
        """Somebody came or went, and somebody wants to know; not every time of one who does nothing else."""
        if not self.limits.may_tell(event.user, trio.current_time()):
            return None
        return self.broker.submit([Notify(presence_notice(event), "", key)])

    def _audience(self, notice: Update) -> Iterable[Reader]:
        """The connections here that a notification is for: what has entered ``presence`` and takes them is a reader."""
        return cast("Iterable[Reader]", self.presence.here(target_of(notice.targets or ())))

    def _sent_away(self, user: str) -> None:
        """A user's connections are ended: it has logged out, maybe. What is remembered of its sessions must not let it
        in again, and polls that wait must not tell it more."""
        if self.authenticator.hook is not None:
            self.authenticator.hook.forget(user)
        for poll in [poll for poll in self.polls if poll.exchange.caller.user == user]:
            poll.exchange.connection.wake(poll)

    async def recall(self, client: Client) -> str | None:
        """The cursor that was last given to a polling client, by whichever node."""
        if self.shared is not None:
            return await self.shared.recall(client.name)
        return self.cursors.get(client, trio.current_time())

    def remember(self, client: Client, cursor: str) -> None:
        """A polling client was given this cursor."""
        if self.shared is not None:
            self.shared.remember(client.name, cursor, KEPT_S)
        else:
            self.cursors.put(client, cursor, trio.current_time())

    # Small things every answer needs

    def liveness(self) -> dict[str, bool]:
        """What heartbeats and polls say besides: nothing, or ``{"live": False}`` while others may know more."""
        return {} if self.broker.live else {"live": False}

    def http_date(self) -> str:
        """The time for ``Date`` (RFC 9110 section 6.6.1), formatted once a second."""
        now = int(time.time())
        if self._date[0] != now:
            self._date = (now, formatdate(now, usegmt=True))
        return self._date[1]

    def retry_delay_ms(self) -> int:
        """How long a client that is turned away should wait: spread, so that not all come back at once."""
        return int(1000 * random.uniform(0.5, max(MIN_SPREAD_S, self.config.server.drain)))

    def turn_away(self, refusal: ApiError) -> bool:
        """A socket came over a limit. Whether it is to be told so; else it is to be closed unheard."""
        if self.turned_away >= REFUSED_SOCKETS:
            self.counters.refused["unheard"] += 1
            return False
        self.turned_away += 1
        self.counters.refused[refusal.code] += 1
        return True

    def forget_socket(self, place: str, *, turned_away: bool = False) -> None:
        """A socket was closed: it gives its ``place`` among those of its address back, if it has one."""
        self.connections -= 1
        if turned_away:
            self.turned_away -= 1
        if place:
            self.limits.leave(place)

    def begin(self) -> None:
        """A request is being answered, or a stream is live, until ``end``."""
        self._busy += 1

    def end(self) -> None:
        """See ``begin``."""
        self._busy -= 1
        if self._quiet is not None and not self._busy:
            self._quiet.set()

    async def heavy_turn(self, seconds: float) -> None:
        """Wait until somebody may have another turn whose last one took so long: however many there are, together they
        leave half of the loop's time to everybody else."""
        async with self._heavy:
            await trio.sleep(seconds)

    # Going away

    def start_drain(self) -> None:
        """From now on only health is answered."""
        self.draining = True
        if self.ingest is not None:
            self.ingest.stop()
        if self.queues is not None:
            self.queues.stop()

    async def answer_polls(self) -> None:
        """Answer all polls that wait, with nothing if there is nothing."""
        for count, poll in enumerate(list(self.polls), 1):
            poll.exchange.connection.wake(poll)
            if count % POLLS_AT_ONCE == 0:
                await trio.lowlevel.checkpoint()

    async def drain_streams(self, seconds: float) -> None:
        """End the live streams evenly over so many seconds, in random order."""
        streams = list(self.streams)
        random.shuffle(streams)
        started = trio.current_time()
        for position, stream in enumerate(streams):
            await trio.sleep_until(started + seconds * (position + 0.5) / len(streams))
            if stream in self.streams:
                stream.drain(self.retry_delay_ms())
        for stream in list(self.streams.keys() - streams):  # those whose handshake was under way
            stream.drain(self.retry_delay_ms())

    def end_intakes(self) -> None:
        """Stop reading lines of NDJSON, which may come for ever; their requests are answered."""
        for scope in self.intakes:
            scope.cancel()

    async def wait_quiet(self) -> None:
        """Wait until no request is being answered and no stream is live."""
        while self._busy:  # a request that ends may go on as a stream
            self._quiet = trio.Event()
            await self._quiet.wait()

    def check_accepting(self) -> None:
        """Refuse new work while draining.

        Raises:
            ApiError: 503 ``try_later``.
        """
        if self.draining:
            raise ApiError(503, "try_later", "this server is going away; try again", retry_after=1)
