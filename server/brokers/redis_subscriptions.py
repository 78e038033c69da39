"""The subscriptions at one Redis node, on a connection of their own: asked for, confirmed, lost, asked for again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Final

import trio
from trio.abc import Stream

from protocol.resp import RedisError, Value, encode
from server.brokers.redis_connection import NodeInfo, Wire
from server.brokers.redis_link import PING, Connect, Link, guarded, log
from server.brokers.redis_url import Options

# Channels per SUBSCRIBE command: enough to amortise it, few enough that Redis does not stall others.
_CHANNELS: Final = 500
# Seconds until channels that were refused (a slot on the move, no master yet) are asked for again.
_ASK_AGAIN_S: Final = 0.1
# The same where Redis' user may not: somebody has to change that first.
_ASK_AGAIN_FORBIDDEN_S: Final = 10.0


class SubscriptionLink(Link):
    """The subscriptions at one node.

    Attributes:
        prefix: of the commands, where it is not that of sharded channels.
        place: of the channel in a message; behind it comes the payload.

    Args:
        sharded: SSUBSCRIBE, for a cluster.
        group: splits channels into lists that one command may name together.
        on_message: channel and payload, synchronously and in order. The hot path.
        on_subscribed: channels whose messages come from now on: confirmed for the first time, or again.
        on_lost: channels that were confirmed and whose messages do not come any more.
        on_refused: the node would not take channels, or gave some up: the cluster has changed.
    """

    prefix = ""
    place = 1

    def __init__(
        self,
        connect: Connect,
        options: Options,
        *,
        on_down: Callable[[str], object],
        sharded: bool,
        group: Callable[[Iterable[bytes]], Iterable[Sequence[bytes]]],
        on_message: Callable[[bytes, bytes], object],
        on_subscribed: Callable[[frozenset[bytes]], object],
        on_lost: Callable[[frozenset[bytes]], object],
        on_refused: Callable[[], object],
    ) -> None:
        super().__init__(connect, options, on_up=lambda node: None, on_down=on_down)
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
        self._wire.write(PING)

    def _take(self, values: list[Value]) -> None:
        """Measured: see ``Replies.feed`` for parsing; 0.2 µs more per message until the callback."""
        iterator = iter(values)
        message, on_message, fresh = self._message, self._on_message, self._fresh
        channel, payload = self.place, self.place + 1
        while True:
            try:
                for value in iterator:
                    if value.__class__ is list and value[0] == message:
                        if fresh:
                            self._announce()
                        on_message(value[channel], value[payload])
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
    place = 2
