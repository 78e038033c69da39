"""Starlette on uvicorn (uvloop, httptools): WebSocket, events by sse-starlette, long-polls."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping

import uvicorn
import uvloop
from sse_starlette import EventSourceResponse
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

from perf.peers.servers.common import GREETING, Channels, arguments, awaiting_feed, channels, kept, polled, wake

SOCKETS = channels()
QUEUES: Channels = channels()  # sse-starlette sends what an iterator of each response yields
POLLS = kept()


async def websocket(socket: WebSocket) -> None:
    """One reader."""
    await socket.accept()
    readers = SOCKETS[socket.path_params["channel"]]
    readers[socket] = None
    try:
        await socket.send_text(GREETING)
        async for _ in socket.iter_text():
            pass
    finally:
        del readers[socket]


async def events(channel: str) -> AsyncIterator[Mapping[str, str]]:
    """What one reader gets."""
    queue: asyncio.Queue[str] = asyncio.Queue()
    QUEUES[channel][queue] = None
    try:
        yield {"data": '{"type":"snapshot"}'}
        while True:
            yield {"data": await queue.get()}
    finally:
        del QUEUES[channel][queue]


async def stream(request: Request) -> EventSourceResponse:
    """One reader of events."""
    return EventSourceResponse(events(request.path_params["channel"]), sep="\n")


async def poll(request: Request) -> Response:
    """One question."""
    answer = await polled(POLLS[request.path_params["channel"]], request.query_params.get("last_seen"))
    return Response(answer, media_type="application/json")


async def publish(channel: str, message: bytes) -> None:
    """One message to all."""
    text = message.decode()
    for socket in tuple(SOCKETS[channel]):
        await socket.send_text(text)
    for queue in QUEUES[channel]:
        queue.put_nowait(text)
    wake(POLLS[channel].add(message))


async def main() -> None:
    """Serves until killed."""
    options = arguments()
    routes = [
        WebSocketRoute("/ws/{channel}", websocket),
        Route("/sse/{channel}", stream),
        Route("/poll/{channel}", poll),
    ]
    app = Starlette(routes=routes)
    config = uvicorn.Config(
        app,
        port=options.port,
        backlog=4096,
        http="httptools",
        ws="websockets-sansio",
        ws_per_message_deflate=False,
        log_level="warning",
        access_log=False,
    )
    await awaiting_feed(options.feed, publish)
    await uvicorn.Server(config).serve()


if __name__ == "__main__":
    uvloop.run(main())
