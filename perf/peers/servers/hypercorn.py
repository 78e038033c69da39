"""Hypercorn on Trio: a plain ASGI application, WebSocket and events."""

from __future__ import annotations

from functools import partial
from typing import Any

import trio
from hypercorn.config import Config
from hypercorn.trio import serve

from perf.peers.servers.common import GREETING, GREETING_EVENT, Lines, arguments, channels

SOCKETS = channels()
STREAMS = channels()


async def application(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """One reader."""
    if scope["type"] == "lifespan":
        while True:
            message = await receive()
            await send({"type": f"{message['type']}.complete"})
    channel = scope["path"].rpartition("/")[2]
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.accept"})
        readers = SOCKETS[channel]
        greeting: dict[str, Any] = {"type": "websocket.send", "text": GREETING}
        end = "websocket.disconnect"
    else:
        headers = [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-cache")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        readers = STREAMS[channel]
        greeting = {"type": "http.response.body", "body": GREETING_EVENT, "more_body": True}
        end = "http.disconnect"
    await send(greeting)
    readers[send] = None
    try:
        while (await receive())["type"] != end:
            pass
    finally:
        del readers[send]


async def publish(stream: trio.SocketStream) -> None:
    """Passes on what comes on the feed."""
    lines = Lines()
    async for data in stream:
        for channel, message in lines.feed(bytes(data)):
            frame = {"type": "websocket.send", "text": message.decode()}
            for send in tuple(SOCKETS[channel]):
                await send(frame)
            event: dict[str, Any] = {"type": "http.response.body", "body": b"data: %b\n\n" % message, "more_body": True}
            for send in tuple(STREAMS[channel]):
                await send(event)


async def main() -> None:
    """Serves until killed."""
    options = arguments()
    config = Config()
    config.bind = [f"127.0.0.1:{options.port}"]
    config.backlog = 4096
    async with trio.open_nursery() as nursery:
        await nursery.start(partial(trio.serve_tcp, publish, options.feed, host="127.0.0.1"))
        await serve(application, config)  # type: ignore[arg-type]


if __name__ == "__main__":
    trio.run(main)
