"""What the peers in Python share: arguments, the greeting, the feed. Nothing of it is there for each delivery."""

from __future__ import annotations

import argparse
import asyncio
from collections import defaultdict
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
