"""trio-websocket."""

from __future__ import annotations

from functools import partial

import trio
from trio_websocket import ConnectionClosed, WebSocketConnection, WebSocketRequest, serve_websocket

from perf.peers.servers.common import GREETING, Lines, arguments, channels

CHANNELS = channels()


async def handler(request: WebSocketRequest) -> None:
    """One reader."""
    connection: WebSocketConnection = await request.accept()
    readers = CHANNELS[request.path.rpartition("/")[2]]
    try:
        await connection.send_message(GREETING)
        readers[connection] = None
        while True:
            await connection.get_message()
    except ConnectionClosed:
        pass
    finally:
        readers.pop(connection, None)


async def publish(stream: trio.SocketStream) -> None:
    """Passes on what comes on the feed."""
    lines = Lines()
    async for data in stream:
        for channel, message in lines.feed(bytes(data)):
            text = message.decode()
            for connection in tuple(CHANNELS[channel]):
                try:
                    await connection.send_message(text)
                except ConnectionClosed:
                    continue


async def main() -> None:
    """Serves until killed."""
    options = arguments()
    async with trio.open_nursery() as nursery:
        await nursery.start(partial(trio.serve_tcp, publish, options.feed, host="127.0.0.1"))
        await serve_websocket(handler, "127.0.0.1", options.port, ssl_context=None)


if __name__ == "__main__":
    trio.run(main)
