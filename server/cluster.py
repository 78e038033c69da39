"""This node among the others on one Redis: its lease, its connections' entries, and what is asked of other nodes.

Everything a node has in Redis follows from its own tables (``server.presence``). A connection that comes, goes, joins
or parts is only marked; the next batch writes what is then true of it. So what comes and goes within one pass costs
nothing, and nothing is written twice or in the wrong order. Each batch has a number, and Redis takes none but the
next: at the next heartbeat a node knows whether all that it wrote is there. If it is not (the connection broke,
Redis was flushed, or lost its last writes in a failover, or another node has taken this one for dead), it reads its
entries back in pieces and writes what differs.

While Redis is away, answers are about this node alone; nothing here raises because of that.
"""

from __future__ import annotations

import logging
import math
import random
import secrets
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import trio

from protocol.errors import ApiError
from protocol.presence import ClientInfo, PresenceEvent, Target
from protocol.resp import Argument, RedisError, Value
from server.brokers.base import Submission
from server.brokers.redis_client import Client, RedisClientError, Reply, Script
from server.brokers.redis_limits import TAKE, rate_key
from server.brokers.redis_presence import (
    ADMIT,
    BEAT,
    CLIENTS,
    COUNT,
    NODES,
    OF_USER,
    OUTBOX,
    PAGE,
    PEERS,
    REAP,
    WRITE,
    PeerInfo,
    decode_client,
    decode_event,
    decode_peer,
    encode,
)
from server.cluster_requests import Requests
from server.logs import log_event

if TYPE_CHECKING:
    from server.metrics import Sample
    from server.presence import Presence

LOG: Final = logging.getLogger("statuswire.cluster")

BEAT_S: Final = 1.0
# How often a node tells its numbers: they are read from every connection (10 ms with 20,000).
STATS_S: Final = 5.0
# Long enough for a pause of the loop or of Redis, short enough that nobody is shown for long who is gone.
LEASE_MS: Final = 5000
# Heartbeats further apart than this are not one behind the other.
STEADY_S: Final = 2.5
# States per batch: a millisecond or two of Redis' time.
BATCH: Final = 100
# Batches on their way before the writer waits for the first answers.
BATCHES: Final = 10
# Entries per piece that is read back.
PIECE: Final = 500
# Of a dead node in one go, and how long one heartbeat may spend on it.
REAP_PIECE: Final = 200
REAP_S: Final = 0.5
EVENTS_AT_ONCE: Final = 100
# A question to Redis.
ANSWER_S: Final = 2.0
# Tokens are waited for less long; where they did not come, each node counts for itself for a while.
TOKENS_S: Final = 0.5
SLOW_S: Final = 5.0
# A user's connections that are told of at most.
OF_USER_MOST: Final = 10_000
# A place that was asked for and not taken by then is given back.
PLACE_S: Final = 10.0


class Peer(NamedTuple):
    """A live node.

    Attributes:
        node_id: names its process.
        host: name of its machine.
        group: shared by the workers of one ``statuswire serve``.
        stats: its numbers of a few seconds ago.
    """

    node_id: str
    host: str
    group: str
    stats: Sample


class _Away(Exception):
    """Redis does not answer."""


class Cluster:
    """One node's share in what all nodes know of each other.

    Args:
        presence: the node's own tables.
        group: see ``Peer``.
        stats: the node's numbers, for the others.

    Attributes:
        node_id: names this process.
        requests: from node to node.
    """

    def __init__(self, presence: Presence, *, group: str = "", stats: Callable[[], Sample] = dict) -> None:
        self.node_id = secrets.token_hex(6)
        self.group = group or self.node_id
        self.stats = stats
        self._presence = presence
        self._host = socket.gethostname()
        self._client: Client | None = None
        self._number = 0  # of the last batch
        self._marked: dict[str, None] = {}
        self._stale = True  # what Redis has of this node has to be compared
        self._ours = False  # this node has its lease, for all it knows
        self._beaten = self._steady_since = -math.inf  # the last heartbeat, and the first of those without a gap
        self._places: dict[str, float] = {}
        self._slow_until = -math.inf
        self._tell_at = -math.inf
        self.requests = Requests(self.node_id, presence.disconnect_here)
        self._entered = trio.Event()
        self._outbox = trio.Event()
        self._wake = trio.Event()
        self._hurry = trio.Event()
        self._scope = trio.CancelScope()

    # Life

    def begin(self, client: Client) -> None:
        """Take the client, which is run by somebody else, and listen to the other nodes."""
        self._client = client
        self.requests.begin(client)

    def went_up(self) -> None:
        """Redis is back."""
        self._hurry.set()

    async def run(self) -> None:
        """Keep lease and entries, until cancelled."""
        with self._scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._write_for_ever)
                nursery.start_soon(self._publish_for_ever)
                await self._beat_for_ever()

    async def finish(self) -> None:
        """This node goes: take back what it has in Redis, as far as the caller's patience reaches."""
        self._scope.cancel()
        if self._client is None or not self._ours:
            return
        self._ours = False
        with suppress(_Away):
            while (await self._ask(REAP, self.node_id, REAP_PIECE, 1))[0]:
                pass

    @property
    def joined(self) -> bool:
        """Whether this node has its lease and all its entries in Redis, as far as it can know."""
        return self._ours and not self._stale and self._client is not None and self._client.away is None

    async def wait_joined(self, patience_s: float) -> None:
        """Return when this node is one of the others for the first time, or after so long."""
        with trio.move_on_after(patience_s):
            await self._entered.wait()

    # What has changed

    def touch(self, client_id: str) -> None:
        """Something about this connection has changed. Never waits."""
        if self._stale:
            return  # everything will be looked at
        self._marked[client_id] = None
        self._wake.set()
        if self._places:
            self._places.pop(client_id, None)

    def _state(self, client_id: str) -> bytes:
        connected = self._presence.clients.get(client_id)
        return b"" if connected is None else encode(self._presence.info_of(connected))

    def _flush(self, batches: int) -> Reply | None:
        """Send what is marked. Later questions on the same connection are answered behind it."""
        last: Reply | None = None
        while self._marked and not self._stale and batches > 0:
            batches -= 1
            names = list(self._marked)[:BATCH]
            states: list[Argument] = []
            for name in names:
                del self._marked[name]
                states += (name, self._state(name))
            self._number += 1
            try:
                last = self._send(WRITE, self.node_id, self._number, *states)
            except RedisClientError:
                self._lost()
                return None
            last.when_settled(self._written)
        return last

    def _written(self, reply: Reply) -> None:
        outcome = reply.outcome
        if not isinstance(outcome, list) or not outcome[0]:
            self._lost()
        elif outcome[1]:
            self._outbox.set()

    def _lost(self) -> None:
        """Redis may not have what this node wrote."""
        self._stale = True
        self._marked.clear()

    async def _write_for_ever(self) -> None:
        while True:
            await self._wake.wait()
            self._wake = trio.Event()
            while self._marked and not self._stale:
                last = self._flush(BATCHES)
                if last is not None:
                    with suppress(RedisClientError, RedisError):
                        await last.wait()
                await trio.lowlevel.checkpoint()

    # Heartbeats

    async def _beat_for_ever(self) -> None:
        while True:
            next_beat = trio.current_time() + BEAT_S * random.uniform(0.9, 1.0)
            self._hurry = trio.Event()
            if self._client is not None and self._client.away is None:
                try:
                    await self._beat()
                except _Away:
                    pass
                except Exception:  # what another version has left in Redis must not end this server
                    LOG.exception("a heartbeat failed")
            with trio.move_on_at(next_beat):
                await self._hurry.wait()
            await trio.sleep(random.uniform(0.0, 0.02))  # hurried or not: at most so often

    async def _beat(self) -> None:
        self._give_back_places()
        self._flush(BATCHES)
        now = trio.current_time()
        info = b""
        if now >= self._tell_at:
            self._tell_at = now + STATS_S
            info = encode(PeerInfo(self._host, self.group, self._numbers()))
        known, events, *dead = await self._ask(BEAT, self.node_id, LEASE_MS, self._number, info)
        self._ours = True
        now = trio.current_time()
        if now - self._beaten > STEADY_S:
            self._steady_since = now
        self._beaten = now
        if not known and not info:
            self._tell_at = -math.inf
        if not known or self._stale:
            await self._compare()
            self._entered.set()
        if events:
            self._outbox.set()
        # Where this node could not renew its lease, others could not either: each gets the length of a lease anew.
        if dead and now - self._steady_since > LEASE_MS / 1000:
            await self._reap([node.decode() for node in dead])

    def _numbers(self) -> Sample:
        try:
            return self.stats()
        except Exception:  # a file that cannot be opened just now must not cost the lease
            LOG.exception("this node's numbers cannot be read")
            return {}

    async def _compare(self) -> None:
        """Read this node's entries back, and mark what is not as it should be."""
        self._stale = False  # what changes from here on is marked
        self._marked.clear()
        theirs: dict[str, bytes] = {}
        after: tuple[str, str] = ("", "")
        try:
            while True:
                page = await self._ask(PAGE, PIECE, self.node_id if after[1] else "", *after, self.node_id)
                for name, blob in zip(page[::2], page[1::2], strict=True):
                    theirs[name.decode()] = blob or b"\0"  # listed, but not there: to be written
                if len(page) < 2 * PIECE:
                    break
                after = (_kind(page[-1]), page[-2].decode())
        except BaseException:
            self._lost()
            raise
        ours = self._presence.clients
        for count, name in enumerate([*ours, *(name for name in theirs if name not in ours)]):
            if self._state(name) != theirs.get(name, b""):
                self.touch(name)
            if count % PIECE == PIECE - 1:
                await trio.lowlevel.checkpoint()

    async def _reap(self, nodes: list[str]) -> None:
        """Take back what dead nodes have left, a piece at a time; others do the same."""
        until = trio.current_time() + REAP_S
        for node in nodes:
            if node == self.node_id:
                continue
            log_event(LOG, logging.WARNING, "node_lost", node=node)
            more = 1
            while more and trio.current_time() < until:
                more, waiting = await self._ask(REAP, node, REAP_PIECE, 0)
                if waiting:
                    self._outbox.set()

    async def _publish_for_ever(self) -> None:
        """Publish who came and went. Several nodes may do it at once: the events' own keys let each count once."""
        while True:
            await self._outbox.wait()
            self._outbox = trio.Event()
            # What cannot be kept now is there at the next heartbeat too.
            with suppress(RedisClientError, RedisError, ApiError):
                assert self._client is not None
                while blobs := await self._client.call("LRANGE", OUTBOX, 0, EVENTS_AT_ONCE - 1):
                    for blob in blobs:
                        kept = self._publish(blob)
                        if kept is not None:
                            await kept.wait_kept()
                        self._client.send("LREM", OUTBOX, 1, blob)

    def _publish(self, blob: bytes) -> Submission | None:
        if self._presence.on_event is None:
            return None
        try:
            event = decode_event(blob)
            return self._presence.on_event(
                PresenceEvent(event.kind, event.user, event.channel or None, event.count), f"presence:{event.id}"
            )
        except Exception:
            LOG.exception("a presence event could not be published")
            return None

    # Questions

    def _send(self, script: Script, *arguments: Argument) -> Reply:
        assert self._client is not None
        return self._client.send_script(script, [NODES], arguments)

    async def _ask(self, script: Script, *arguments: Argument) -> Any:
        """Raises _Away."""
        try:
            with trio.fail_after(ANSWER_S):
                return await self._send(script, *arguments).wait()
        except (RedisClientError, RedisError, trio.TooSlowError) as error:
            raise _Away from error

    async def _question(self, script: Script, *arguments: Argument) -> Any:
        """``_ask`` behind all that has changed here so far."""
        if not self._ours or self._client is None or self._client.away is not None:
            raise _Away
        self._flush(BATCHES)
        return await self._ask(script, *arguments)

    async def admit(self, client_id: str, user: str, limit: int) -> int | None:
        """Take a place for one more connection of a user, if it has less than ``limit`` on all nodes.

        Returns:
            How many it has if there is no place; 0 if there is, None if only this node can say.
        """
        info = ClientInfo(client_id, user, None, "websocket", "", 0, takes_notices=False, node=self.node_id)
        try:
            self._places[client_id] = trio.current_time()
            others, taken = await self._question(ADMIT, self.node_id, client_id, user, limit, encode(info))
        except _Away:
            return None
        except trio.Cancelled:
            self._places.pop(client_id, None)
            self.touch(client_id)
            raise
        if taken < 0:
            return None
        if not taken:
            self._places.pop(client_id, None)
            return int(others)
        return 0

    def _give_back_places(self) -> None:
        before = trio.current_time() - PLACE_S
        for client_id, since in list(self._places.items()):
            if since > before:
                break
            del self._places[client_id]
            self.touch(client_id)

    async def take_tokens(self, what: str, user: str, rate: float, n: int) -> tuple[float, float] | None:
        """See ``limits.Common``. In blocks of a tenth of a second's worth, so that few messages have to wait for it."""
        client = self._client
        if client is None or client.away is not None or trio.current_time() < self._slow_until:
            return None
        try:
            with trio.fail_after(TOKENS_S):
                taken, wait_ms = await client.send_script(
                    TAKE, [rate_key(what, user)], [rate, max(rate, 1.0), n, max(1, int(rate / 10))]
                ).wait()
        except trio.TooSlowError:
            self._slow_until = trio.current_time() + SLOW_S  # not each message is to wait as long
            return None
        except (RedisClientError, RedisError):
            return None
        return float(taken), wait_ms / 1000

    async def count(self, target: Target) -> int:
        """See ``Presence.count``."""
        here = len(self._presence.here(target))
        try:
            everywhere = int(await self._question(COUNT, target.kind, *dict.fromkeys(target.ids)))
        except _Away:
            return here
        # Where Redis does not have all of this node's entries yet, it may say too little.
        return max(here, everywhere) if self._stale or self._marked else everywhere

    async def find(self, client_id: str) -> ClientInfo | None:
        """A connection of another node."""
        if self._client is None:
            return None
        try:
            with trio.fail_after(ANSWER_S):
                blob: Value = await self._client.call("HGET", CLIENTS, client_id)
        except (RedisClientError, RedisError, trio.TooSlowError):
            return None
        info = None if blob is None else decode_client(blob)
        return None if info is None or info.node == self.node_id else info

    async def of_user(self, user: str) -> list[ClientInfo]:
        """A user's connections at other nodes."""
        try:
            blobs = await self._question(OF_USER, user, OF_USER_MOST)
        except _Away:
            return []
        infos = [decode_client(blob) for blob in blobs if blob is not None]
        return [info for info in infos if info.node != self.node_id]

    async def everyone(self, limit: int, after: str | None) -> tuple[list[ClientInfo], str | None] | None:
        """See ``Presence.everyone``; None if only this node's can be told."""
        node, kind, client = "", "", ""
        if after:
            node, _, rest = after.partition("/")
            kind, _, client = rest.partition("/")
        try:
            page = await self._question(PAGE, limit + 1, node, kind, client, "")
        except _Away:
            return None
        infos = [decode_client(blob) for blob in page[1::2] if blob is not None]
        if len(infos) <= limit:
            return infos, None
        last = infos[limit - 1]
        return infos[:limit], f"{last.node}/{'t:' if last.takes_notices else 'r:'}/{last.client_id}"

    async def peers(self) -> list[Peer]:
        """The live nodes, this one among them; this one alone while Redis is away."""
        try:
            found = await self._question(PEERS)
        except _Away:
            return [Peer(self.node_id, self._host, self.group, self._numbers())]
        peers = []
        for node, blob in zip(found[::2], found[1::2], strict=True):
            info = decode_peer(blob)
            peers.append(Peer(node.decode(), info.host, info.group, info.stats))
        return peers


def _kind(blob: bytes | None) -> str:
    return "t:" if blob is None or decode_client(blob).takes_notices else "r:"
