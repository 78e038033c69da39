"""One source: whose turn it is to take it in, what becomes of it when its Redis is away, and where it goes on.

A *session* is one connection's life: it ends with any trouble, and the next one begins by finding out what was missed.
"""

from __future__ import annotations

import logging
import math
import random
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final

import trio

from protocol.errors import ApiError
from protocol.resp import Argument, RedisError
from protocol.watch import EVERYTHING
from server.brokers.redis_client import Client, RedisClientError, RedisStartError, open_client, parse_redis_url
from server.brokers.redis_lease import Lease
from server.brokers.redis_listener import PatternListener
from server.config import Queue
from server.ids import new_id
from server.ingest.intake import TurnLostError
from server.ingest.queues.taker import Taker
from server.logs import log_event
from server.node import Node

LEASE_S: Final = 3.0
_ASK_S: Final = 0.75
# What is shown here stays so for minutes after the last asking.
_FOLLOW_S: Final = 60.0
_BACKOFF_BASE_S: Final = 0.1
_BACKOFF_CAP_S: Final = 5.0
_MARK_EVERY_S: Final = 1.0
# Messages that were heard and not taken yet; beyond, what they were about is read from the queue.
MAX_HEARD: Final = 50_000
MAX_HEARD_BYTES: Final = 32 * 1024 * 1024

_LOG: Final = logging.getLogger("statuswire.ingest")


class GapError(Exception):
    """Something was missed: begin again with what the queue keeps."""


class Source(ABC):
    """One ``[queues.NAME]``.

    Args:
        node: with a store that was started.
        name: of the table.
        config: what is in it.

    Attributes:
        taker: the way into the log.
        trouble: why nothing is taken in just now, None while all is well.
        standby: another node has its turn.
    """

    def __init__(self, node: Node, name: str, config: Queue) -> None:
        self.name = name
        self.config = config
        self.taker = Taker(node, name, config.id_prefix, self._is_turn)
        self.trouble: str | None = "not connected yet"
        self.standby = False
        self._node = node
        self._lease: Lease | None = None
        if node.shared is not None:
            from server.brokers.redis_keys import PREFIX

            self._lease = Lease(node.shared.client, f"{PREFIX}queue:{name}".encode(), new_id(), LEASE_S)
        self._scope: trio.CancelScope | None = None
        self._turn = trio.Event()
        self._saved: str | None = None
        self._next_mark = 0.0

    @abstractmethod
    async def session(self, client: Client) -> None:
        """Take in until something goes wrong. Raises what the client does, or GapError."""

    async def run(self) -> None:
        """Take in whenever it is this node's turn, until cancelled."""
        async with trio.open_nursery() as nursery:
            if self._lease is not None:
                nursery.start_soon(self._keep_lease, self._lease)
            failures = 0
            while True:
                await self._wait_turn()
                began = trio.current_time()
                with trio.CancelScope() as self._scope:
                    try:
                        await self._one_session()
                    except* (RedisStartError, RedisClientError, RedisError, GapError, ApiError, TurnLostError) as group:
                        self._say(str(_first(group)))
                    except* Exception:
                        _LOG.exception("a queue's session failed")
                        self.trouble = "an internal error"
                self._scope = None
                failures = 0 if trio.current_time() - began > 2 * _BACKOFF_CAP_S else min(failures + 1, 8)
                await trio.sleep(random.uniform(0, min(_BACKOFF_CAP_S, _BACKOFF_BASE_S * 2**failures)))

    def stop(self) -> None:
        """Give the turn to another node at once."""
        if self._lease is not None and self._lease.held:
            self._lease.release()

    async def _one_session(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._follow)
            # Every record has to be here before anything is settled against it.
            await self._node.broker.follow([EVERYTHING])
            await self.taker.begin()
            async with open_client(self.config.url) as client:
                await self.session(client)
            nursery.cancel_scope.cancel()

    async def _follow(self) -> None:
        while True:
            await trio.sleep(_FOLLOW_S)
            await self._node.broker.follow([EVERYTHING])

    def well(self) -> None:
        """A session has caught up."""
        if self.trouble is not None:
            self.trouble = None
            log_event(_LOG, logging.INFO, "queue_up", source=self.name)

    def _say(self, reason: str) -> None:
        if reason != self.trouble:
            log_event(_LOG, logging.WARNING, "queue_away", source=self.name, reason=reason)
        self.trouble = reason

    # Turns

    def _is_turn(self) -> bool:
        return self._lease is None or self._lease.held

    async def _wait_turn(self) -> None:
        while not self._is_turn():
            self.standby = True
            self._turn = trio.Event()
            await self._turn.wait()
        self.standby = False

    async def _keep_lease(self, lease: Lease) -> None:
        while True:
            try:
                if not self._node.draining:
                    await lease.hold()
            except (RedisClientError, RedisError):
                pass  # ours until it runs out
            if lease.held:
                self._turn.set()
            elif self._scope is not None:
                self._scope.cancel()
            await trio.sleep(_ASK_S)

    # Marks

    async def load_mark(self) -> str | None:
        """How far the last session came, whichever node's."""
        self._saved = await self._node.broker.load_mark(f"queue:{self.name}")
        return self._saved

    async def save_mark(self, text: str) -> None:
        """Note how far this one is, now and then. After a crash a second's worth is read again."""
        if text != self._saved and trio.current_time() >= self._next_mark:
            self._next_mark = trio.current_time() + _MARK_EVERY_S
            await self._node.broker.save_mark(f"queue:{self.name}", text)
            self._saved = text


class Heard:
    """What is published on patterns of channels, in order, as long as everything is heard.

    Args:
        url: of the Redis.
        patterns: of channels.
    """

    def __init__(self, url: str, patterns: Sequence[str]) -> None:
        self._patterns = frozenset(pattern.encode() for pattern in patterns)
        self._listener = PatternListener(
            self._patterns, parse_redis_url(url), on_message=self._hear, on_lost=self._deafened
        )
        self._held: deque[tuple[str, bytes]] = deque()
        self._bytes = 0
        self._gap = False
        self._wake = trio.Event()

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[None]:
        """Hear everything within the block. Raises RedisStartError if that cannot be."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._listener.run)
            with trio.move_on_after(self._listener.options.connect_timeout_s) as late:
                await self._listener.wait_subscribed(self._patterns)
            if late.cancelled_caught:
                nursery.cancel_scope.cancel()
            else:
                self._gap = False
                yield
                nursery.cancel_scope.cancel()
        if late.cancelled_caught:
            raise RedisStartError(f"Redis at {self._listener.url} takes no subscriptions: may its user PSUBSCRIBE?")

    async def take(self, seconds: float) -> list[tuple[str, bytes]]:
        """What was heard, channel and message; nothing after so many seconds. Raises GapError."""
        if not self._held and not self._gap:
            self._wake = trio.Event()
            with trio.move_on_after(seconds):
                await self._wake.wait()
        else:
            await trio.lowlevel.checkpoint()
        if self._gap:
            raise GapError("messages were missed")
        taken: list[tuple[str, bytes]] = []
        while self._held and len(taken) < 1000:
            taken.append(self._held.popleft())
            self._bytes -= len(taken[-1][1])
        return taken

    def _hear(self, channel: bytes, payload: bytes) -> None:
        self._held.append((channel.decode("utf-8", "replace"), payload))
        self._bytes += len(payload)
        if len(self._held) > MAX_HEARD or self._bytes > MAX_HEARD_BYTES:
            self._gap = True
            self._held.clear()
            self._bytes = 0
        self._wake.set()

    def _deafened(self, channels: frozenset[bytes]) -> None:
        self._gap = True
        self._wake.set()


def _first(group: BaseException) -> BaseException:
    while isinstance(group, BaseExceptionGroup):
        group = group.exceptions[0]
    return group


async def ask(client: Client, commands: Sequence[Sequence[Argument]]) -> list[Any]:
    """Send all of these and wait for the answers; one that is an error is None: another program's key, say."""
    replies = [client.send(*command) for command in commands]
    answers = []
    for reply in replies:
        try:
            answers.append(await reply.wait())
        except RedisError as error:
            if error.code not in ("WRONGTYPE", "ERR"):
                raise
            answers.append(None)
    return answers


class Search:
    """Looks for keys, a bit at a time: among millions of others it takes long.

    Args:
        pattern: that they match.
        limit: about so many are enough.
        key: in a cluster those are found that are where this one is.

    Attributes:
        done: there is no more to look at.
        took_s: how long all bits have taken.
    """

    def __init__(self, client: Client, pattern: str, limit: int, key: str | None = None) -> None:
        self.done = False
        self.took_s = 0.0
        self._client = client
        self._pattern = pattern
        self._limit = limit
        self._key = key
        self._cursor = b"0"
        self._found: set[str] = set()

    async def look(self, seconds: float) -> list[str]:
        """Go on for so long; what was found now and not before."""
        fresh: dict[str, None] = {}
        began = trio.current_time()
        while not self.done and trio.current_time() - began < seconds:
            command = ("SCAN", self._cursor, "MATCH", self._pattern, "COUNT", 1000)
            self._cursor, keys = await self._client.call(*command, key=self._key)
            fresh.update((name, None) for key in keys if (name := key.decode("utf-8", "replace")) not in self._found)
            self._found.update(fresh)
            self.done = self._cursor == b"0" or len(self._found) >= self._limit
        self.took_s += trio.current_time() - began
        return list(fresh)


async def scan(client: Client, pattern: str, limit: int, key: str | None = None) -> list[str]:
    """All that a search finds."""
    return await Search(client, pattern, limit, key).look(math.inf)


def texts(values: Sequence[bytes | None]) -> dict[str, str]:
    """Pairs of names and values, as a hash or an entry of a stream has them."""
    pairs = zip(values[::2], values[1::2], strict=False)
    return {
        name.decode("utf-8", "replace"): value.decode("utf-8", "replace")
        for name, value in pairs
        if name is not None and value is not None
    }


def escaped(text: str) -> str:
    """Text in a pattern that stands for itself."""
    return "".join(f"\\{letter}" if letter in "*?[]\\^" else letter for letter in text)
