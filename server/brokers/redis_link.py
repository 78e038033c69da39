"""Kept-up connections to one Redis node: one for commands, one for subscriptions. They come back by themselves."""

from __future__ import annotations

import logging
import random
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from hashlib import sha1
from typing import Final, TypeAlias

import trio
from trio.abc import Stream

from protocol.resp import Argument, RedisError, Value, encode
from server.brokers.redis_connection import NodeInfo, Wire
from server.brokers.redis_errors import (
    ConnectionLostError,
    NotConnectedError,
    OverloadedError,
    RedisClientError,
    RedisStartError,
)
from server.brokers.redis_url import Options

log = logging.getLogger("statuswire.redis")

Outcome: TypeAlias = "Value | RedisError | RedisClientError"
Connect: TypeAlias = Callable[[], Awaitable[tuple[Stream, NodeInfo]]]

_PING: Final = encode(("PING",))
_ASKING: Final = encode(("ASKING",))
# Channels per SUBSCRIBE command: enough to amortise it, few enough that Redis does not stall others.
_CHANNELS: Final = 500
# Seconds until channels that were refused (a slot on the move, no master yet) are asked for again.
_ASK_AGAIN_S: Final = 0.1
# The same where Redis' user may not: somebody has to change that first.
_ASK_AGAIN_FORBIDDEN_S: Final = 10.0


def guarded(callback: Callable[..., object] | None, *arguments: object) -> None:
    """Call a user's callback; its error must not break the connection."""
    if callback is not None:
        try:
            callback(*arguments)
        except Exception:
            log.exception("A callback of the Redis client failed")


class Script:
    """A Lua script, called by its SHA-1."""

    __slots__ = ("body", "sha")

    def __init__(self, body: str) -> None:
        self.body: Final = body.encode()
        self.sha: Final = sha1(self.body, usedforsecurity=False).hexdigest()


class Reply:
    """The outcome of one command, there at once or later. Dropping it is fine: the pipeline goes on without."""

    __slots__ = ("_callbacks", "_event", "_outcome", "data", "rest", "script", "settled", "slot", "tries")

    def __init__(self, data: bytes, slot: int = -1) -> None:
        self.data = data  # kept until settled, to be sent again elsewhere
        self.slot = slot
        self.tries = 0
        self.script: Script | None = None
        self.rest: Sequence[Argument] = ()  # what follows the script's hash
        self.settled = False
        self._outcome: Outcome = None
        self._event: trio.Event | None = None
        self._callbacks: list[Callable[[Reply], object]] | None = None

    @property
    def outcome(self) -> Outcome:
        """The value, or the error as a value; None while not ``settled``."""
        return self._outcome

    def result(self) -> Value:
        """The value. Raises RedisError, ConnectionLostError, NotConnectedError; RuntimeError if not ``settled``."""
        if not self.settled:
            raise RuntimeError("the reply has not come yet")
        if isinstance(self._outcome, Exception):
            raise self._outcome
        return self._outcome

    async def wait(self) -> Value:
        """Wait for it; see ``result``. Being cancelled takes nothing back: the command runs, its reply is dropped."""
        if not self.settled:
            if self._event is None:
                self._event = trio.Event()
            await self._event.wait()
        return self.result()

    def when_settled(self, callback: Callable[[Reply], object]) -> None:
        """Call synchronously on the Trio thread once settled, in the order of the replies; at once if it is already."""
        if self.settled:
            callback(self)
        elif self._callbacks is None:
            self._callbacks = [callback]
        else:
            self._callbacks.append(callback)

    def settle(self, outcome: Outcome) -> None:
        """Called once by the pipeline."""
        self._outcome = outcome
        self.settled = True
        self.data = b""
        self.rest = ()
        if self._event is not None:
            self._event.set()
        if self._callbacks is not None:
            callbacks, self._callbacks = self._callbacks, None
            for callback in callbacks:
                guarded(callback, self)


class Link(ABC):
    """Keeps one connection up until cancelled or retired. Base of the two below.

    Args:
        connect: makes a connection to where the node is now.
        on_up: synchronously, once commands can be sent.
        on_down: synchronously, each time an established connection was lost or a first one failed.
    """

    def __init__(
        self,
        connect: Connect,
        options: Options,
        *,
        on_up: Callable[[NodeInfo], object],
        on_down: Callable[[str], object],
    ) -> None:
        self._connect = connect
        self._options = options
        self._on_up = on_up
        self._on_down = on_down
        self._hurry = trio.Event()
        self._changed = trio.Event()
        self._wire: Wire | None = None
        self._retired = False
        self.node: NodeInfo | None = None  # while up
        self.reason = "not connected yet"  # why it is down, while it is

    @property
    def up(self) -> bool:
        """Whether there is a connection."""
        return self.node is not None

    async def wait_up(self) -> None:
        """Return when there is a connection."""
        while self.node is None:
            await self._changed.wait()

    def drop(self, reason: str) -> None:
        """Break the connection, if there is one, and make the next one at once: the node is not what it was."""
        self._hurry.set()
        if self._wire is not None:
            self._wire.end(reason)

    def retire(self) -> None:
        """End for good once nothing is owed."""
        self._retired = True
        self._hurry.set()
        if self._wire is not None:
            self._wire.retiring = True

    async def run(self) -> None:
        """Connect, serve, wait, again."""
        options = self._options
        failures = 0
        reported = False
        while not self._retired:
            self._hurry = trio.Event()
            try:
                stream, node = await self._connect()
            except RedisStartError as error:
                self.reason = str(error)
                if not reported:
                    guarded(self._on_down, self.reason)
            else:
                began = trio.current_time()
                await self._serve(stream, node)
                if trio.current_time() - began > options.backoff_cap_s:
                    failures = 0  # it was a good one, not one of a row that are cut at once
            reported = True
            if not self._hurry.is_set():
                with trio.move_on_after(
                    random.uniform(0, min(options.backoff_cap_s, options.backoff_base_s * 2**failures))
                ):
                    await self._hurry.wait()
            failures = min(failures + 1, 16)

    async def _serve(self, stream: Stream, node: NodeInfo) -> None:
        wire = self._wire = self._begin(stream)
        wire.retiring = self._retired
        self.node = node
        self._changed.set()
        self._changed = trio.Event()
        guarded(self._on_up, node)
        try:
            await wire.run()
        finally:  # when cancelled too: whoever waits for a reply must not wait for ever
            self._wire = None
            self.node = None
            self.reason = f"Redis at {node.address}: {wire.reason}"
            self._lost(wire)
            if not self._retired:
                guarded(self._on_down, self.reason)

    @abstractmethod
    def _begin(self, stream: Stream) -> Wire:
        """What is to run on a new connection."""

    @abstractmethod
    def _lost(self, wire: Wire) -> None:
        """Clear what belonged to a connection that has ended."""


class CommandLink(Link):
    """Pipelined commands to one node: replies come in the order of the commands.

    Args:
        scripts: loaded on every new connection, so that NOSCRIPT is rare. Shared with the client, which adds to it.
        on_error: sees a command's error first; True if it has taken the command over (sent it again somewhere).
    """

    def __init__(
        self,
        connect: Connect,
        options: Options,
        *,
        on_up: Callable[[NodeInfo], object],
        on_down: Callable[[str], object],
        scripts: dict[str, Script],
        on_error: Callable[[CommandLink, Reply, RedisError], bool],
    ) -> None:
        super().__init__(connect, options, on_up=on_up, on_down=on_down)
        self._scripts = scripts
        self._on_error = on_error
        self._pending: deque[Reply] = deque()
        self._held = 0  # bytes of the commands in _pending
        self._answered = 0

    @property
    def pending(self) -> int:
        """Commands without an answer."""
        return len(self._pending)

    def put(self, reply: Reply) -> None:
        """Queue a command.

        Raises:
            NotConnectedError, OverloadedError: it was not queued.
        """
        if self._wire is None:
            raise NotConnectedError(self.reason)
        if self._held + len(reply.data) > self._options.max_bytes or len(self._pending) >= self._options.max_commands:
            raise OverloadedError(
                f"{len(self._pending)} commands with {self._held} bytes wait for their answers from Redis"
            )
        self._put(self._wire, reply)

    def put_again(self, reply: Reply, *, asking: bool = False) -> None:
        """Queue a command that was accepted before: no bounds; without a connection it is settled."""
        if self._wire is None:
            reply.settle(NotConnectedError(self.reason))
            return
        if asking:
            self._put(self._wire, Reply(_ASKING))
        self._put(self._wire, reply)

    def _put(self, wire: Wire, reply: Reply) -> None:
        self._held += len(reply.data)
        self._pending.append(reply)
        wire.write(reply.data)

    def _begin(self, stream: Stream) -> Wire:
        wire = Wire(
            stream,
            self._options,
            take=self._take,
            owed=self._pending.__len__,
            answered=lambda: self._answered,
            ping=lambda: self._put(wire, Reply(_PING)),
        )
        for script in self._scripts.values():
            self._put(wire, Reply(encode(("SCRIPT", "LOAD", script.body))))
        return wire

    def _take(self, values: list[Value]) -> None:
        pending = self._pending
        self._answered += len(values)
        for value in values:
            if not pending:
                assert self._wire is not None
                self._wire.end(f"it said {value!r} unasked")  # such as an error before it hangs up
                return
            reply = pending.popleft()
            self._held -= len(reply.data)
            if value.__class__ is RedisError and self._on_error(self, reply, value):
                continue
            reply.settle(value)

    def _lost(self, wire: Wire) -> None:
        pending = list(self._pending)
        self._pending.clear()  # before anybody is told: a callback may look, or send elsewhere
        self._held = 0
        sent = len(pending) - wire.unsent
        for index, reply in enumerate(pending):
            reply.settle(ConnectionLostError(self.reason, sent=index < sent))


class SubscriptionLink(Link):
    """The subscriptions at one node.

    Attributes:
        prefix: of the commands, where it is not that of sharded channels.

    Args:
        sharded: SSUBSCRIBE, for a cluster.
        group: splits channels into lists that one command may name together.
        on_message: channel and payload, synchronously and in order. The hot path.
        on_subscribed: channels whose messages come from now on: confirmed for the first time, or again.
        on_lost: channels that were confirmed and whose messages do not come any more.
        on_refused: the node would not take channels, or gave some up: the cluster has changed.
    """

    prefix = ""

    def __init__(
        self,
        connect: Connect,
        options: Options,
        *,
        on_up: Callable[[NodeInfo], object],
        on_down: Callable[[str], object],
        sharded: bool,
        group: Callable[[Iterable[bytes]], Iterable[Sequence[bytes]]],
        on_message: Callable[[bytes, bytes], object],
        on_subscribed: Callable[[frozenset[bytes]], object],
        on_lost: Callable[[frozenset[bytes]], object],
        on_refused: Callable[[], object],
    ) -> None:
        super().__init__(connect, options, on_up=on_up, on_down=on_down)
        prefix = "s" if sharded else self.prefix
        self._subscribe, self._unsubscribe = f"{prefix}subscribe", f"{prefix}unsubscribe"
        self._message = f"{prefix}message".encode()
        self._group = group
        self._on_message = on_message
        self._on_subscribed = on_subscribed
        self._on_lost = on_lost
        self._on_refused = on_refused
        self.wanted: set[bytes] = set()
        self.confirmed: set[bytes] = set()
        self._asked: set[bytes] = set()
        self._unanswered: dict[bytes, int] = {}  # channel -> confirmations of (un)subscribing that are still to come
        self._fresh: set[bytes] = set()  # confirmed, but on_subscribed was not called yet
        self._pings = 0
        self._answered = 0
        self._refused = trio.Event()
        self._ask_again_s = _ASK_AGAIN_S

    def want(self, channels: Iterable[bytes]) -> None:
        """Subscribe to more channels; kept across connections."""
        self.wanted.update(channels)
        self._ask()

    def unwant(self, channels: Iterable[bytes]) -> None:
        """Unsubscribe. A few more messages may come."""
        gone = self.wanted.intersection(channels)
        self.wanted -= gone
        self.confirmed -= gone
        self._fresh -= gone
        asked = self._asked & gone
        self._asked -= gone
        self._tell(self._unsubscribe, asked)

    def _ask(self) -> None:
        if self._wire is None:
            return  # the next connection begins with all that is wanted
        missing = self.wanted - self._asked
        self._asked |= missing
        self._tell(self._subscribe, missing)

    def _tell(self, command: str, channels: Iterable[bytes]) -> None:
        wire = self._wire
        if wire is None or not channels:
            return
        unanswered = self._unanswered
        for group in self._group(channels):
            for start in range(0, len(group), _CHANNELS):
                part = group[start : start + _CHANNELS]
                for channel in part:
                    unanswered[channel] = unanswered.get(channel, 0) + 1
                wire.write(encode((command, *part)))

    def _begin(self, stream: Stream) -> Wire:
        self._pings = 0
        self._unanswered.clear()
        return Wire(
            stream,
            self._options,
            take=self._take,
            owed=lambda: self._pings + len(self._unanswered),
            answered=lambda: self._answered,
            ping=self._ping,
        )

    async def _serve(self, stream: Stream, node: NodeInfo) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._ask_again)
            await super()._serve(stream, node)
            nursery.cancel_scope.cancel()

    async def _ask_again(self) -> None:
        self._ask()  # all that is wanted, on the new connection
        while True:
            self._refused = trio.Event()
            await self._refused.wait()
            await trio.sleep(self._ask_again_s)
            self._ask()

    def _ping(self) -> None:
        assert self._wire is not None
        self._pings += 1
        self._wire.write(_PING)

    def _take(self, values: list[Value]) -> None:
        """Measured: see ``Replies.feed`` for parsing; 0.2 µs more per message until the callback."""
        iterator = iter(values)
        message, on_message, fresh = self._message, self._on_message, self._fresh
        while True:
            try:
                for value in iterator:
                    if value.__class__ is list and value[0] == message:
                        if fresh:
                            self._announce()
                        on_message(value[1], value[2])
                    else:
                        self._take_other(value)
                break
            except Exception:  # the callback's; the others must still get their messages
                log.exception("A callback of the Redis client failed")
        if fresh:
            self._announce()

    def _take_other(self, value: Value) -> None:
        self._answered += 1
        if isinstance(value, RedisError):
            # SSUBSCRIBE was refused: MOVED, CLUSTERDOWN, NOPERM. Which command it was does not matter, since
            # asking for a channel twice does no harm.
            log.warning("Redis refuses a subscription: %s", value)
            self._unanswered.clear()
            self._asked &= self.confirmed
            self._ask_again_s = _ASK_AGAIN_FORBIDDEN_S if value.code == "NOPERM" else _ASK_AGAIN_S
            self._refused.set()
            guarded(self._on_refused)
        elif value == b"PONG" or (isinstance(value, list) and value[0] == b"pong"):
            self._pings -= 1
        elif isinstance(value, list) and value[0] in (self._subscribe.encode(), self._unsubscribe.encode()):
            channel = value[1]
            left = self._unanswered.pop(channel, 0) - 1
            if left > 0:
                self._unanswered[channel] = left  # a later word of ours about this channel is under way
            elif channel in self.wanted:
                if value[0] == self._subscribe.encode():
                    self._fresh.add(channel)
                elif left < 0:  # unasked: the slot has moved to another node
                    self._asked.discard(channel)
                    self.confirmed.discard(channel)
                    self._fresh.discard(channel)
                    guarded(self._on_lost, frozenset((channel,)))
                    self._refused.set()
                    guarded(self._on_refused)

    def _announce(self) -> None:
        fresh = frozenset(self._fresh)
        self._fresh.clear()
        self.confirmed |= fresh
        guarded(self._on_subscribed, fresh)

    def _lost(self, wire: Wire) -> None:
        lost = frozenset(self.confirmed)
        self.confirmed.clear()
        self._fresh.clear()
        self._asked.clear()
        self._unanswered.clear()
        if lost:
            guarded(self._on_lost, lost)


class PatternLink(SubscriptionLink):
    """The same with patterns (PSUBSCRIBE): ``on_message`` is told the channel, not the pattern. Not for clusters."""

    prefix = "p"

    def _take(self, values: list[Value]) -> None:
        fresh = self._fresh
        for value in values:
            if value.__class__ is list and value[0] == self._message:
                if fresh:
                    self._announce()
                guarded(self._on_message, value[2], value[3])
            else:
                self._take_other(value)
        if fresh:
            self._announce()
