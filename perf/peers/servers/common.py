"""What the peers in Python share: arguments, the greeting, the feed. Nothing of it is there for each delivery."""

from __future__ import annotations

import argparse
import asyncio
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable
from typing import Any

GREETING = '{"type":"subscribed"}'
GREETING_EVENT = b'data: {"type":"snapshot"}\n\n'
Channels = defaultdict[str, dict[Any, None]]


def arguments() -> argparse.Namespace:
    """`port` for readers, `feed` for what they are to be sent."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--feed", type=int, required=True)
    return parser.parse_args()


def channels() -> Channels:
    """Who watches what."""
    return defaultdict(dict)


class Lines:
    """Cuts what has come into channel and message."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[tuple[str, bytes]]:
        """The whole lines that are there now."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        found = []
        for line in lines:
            channel, _, message = line.partition(b"\t")
            found.append((channel.decode(), message))
        return found


class Kept:
    """A channel for long-polls: its newest messages, and who waits for the next."""

    def __init__(self) -> None:
        self.last = 0
        self.waiting: list[Any] = []
        self._messages: deque[bytes] = deque(maxlen=64)

    def add(self, message: bytes) -> list[Any]:
        """Keeps one; who has waited for it."""
        self.last += 1
        self._messages.append(message)
        waiting, self.waiting = self.waiting, []
        return waiting

    def since(self, seen: int) -> bytes:
        """The answer for somebody who has seen so many."""
        new = list(self._messages)[max(0, len(self._messages) - (self.last - seen)) :] if seen < self.last else []
        return b'{"updates":[%b],"last_seen":"%d"}' % (b",".join(new), self.last)


def kept() -> defaultdict[str, Kept]:
    """Channels for long-polls."""
    return defaultdict(Kept)


async def polled(channel: Kept, seen: str | None) -> bytes:
    """The answer to a long-poll, once there is one; without `last_seen` at once."""
    if seen is None:
        return channel.since(channel.last)
    if int(seen) == channel.last:
        future = asyncio.get_running_loop().create_future()
        channel.waiting.append(future)
        await future
    return channel.since(int(seen))


def wake(waiting: list[Any]) -> None:
    """Goes on with polls that have waited."""
    for future in waiting:
        if not future.done():
            future.set_result(None)


class _Feed(asyncio.Protocol):
    def __init__(self, publish: Callable[[str, bytes], None]) -> None:
        self._publish = publish
        self._lines = Lines()

    def data_received(self, data: bytes) -> None:
        for channel, message in self._lines.feed(data):
            self._publish(channel, message)


async def feed(port: int, publish: Callable[[str, bytes], None]) -> None:
    """Listens for messages that are passed on at once."""
    await asyncio.get_running_loop().create_server(lambda: _Feed(publish), "127.0.0.1", port)


async def awaiting_feed(port: int, publish: Callable[[str, bytes], Awaitable[None]]) -> None:
    """The same where sending has to be awaited; meanwhile the feed waits, too."""

    async def serve(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        lines = Lines()
        while data := await reader.read(65536):
            for channel, message in lines.feed(data):
                await publish(channel, message)

    await asyncio.start_server(serve, "127.0.0.1", port)
