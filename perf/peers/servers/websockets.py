"""websockets: its `broadcast`, on uvloop, without compression."""

from __future__ import annotations

import asyncio

import uvloop
from websockets.asyncio.server import ServerConnection, broadcast, serve

from perf.peers.servers.common import GREETING, arguments, channels, feed

CHANNELS = channels()


async def handler(connection: ServerConnection) -> None:
    """One reader."""
    assert connection.request
    readers = CHANNELS[connection.request.path.rpartition("/")[2]]
    readers[connection] = None
    try:
        await connection.send(GREETING)
        await connection.wait_closed()
    finally:
        del readers[connection]


def publish(channel: str, message: bytes) -> None:
    """One message to all."""
    broadcast(CHANNELS[channel], message.decode())


async def main() -> None:
    """Serves until killed."""
    options = arguments()
    await feed(options.feed, publish)
    async with serve(handler, "127.0.0.1", options.port, compression=None, backlog=4096):
        await asyncio.Future()


if __name__ == "__main__":
    uvloop.run(main())
