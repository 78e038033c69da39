"""Kept-up connections to one Redis node, which come back by themselves; the one for commands."""

from __future__ import annotations

import logging
import random
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
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

PING: Final = encode(("PING",))
_ASKING: Final = encode(("ASKING",))


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
    """Keeps one connection up until cancelled or retired. Base of those for commands and for subscriptions.

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
            ping=lambda: self._put(wire, Reply(PING)),
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
