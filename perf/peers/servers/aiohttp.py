"""aiohttp on uvloop: WebSocket, a streamed response, long-polls; frames and events are handed to its own writers."""

from __future__ import annotations

import asyncio

import uvloop
from aiohttp import WSMsgType, web

from perf.peers.servers.common import GREETING, GREETING_EVENT, arguments, awaiting_feed, channels, kept, polled, wake

SOCKETS = channels()
STREAMS = channels()
POLLS = kept()


async def websocket(request: web.Request) -> web.WebSocketResponse:
    """One reader."""
    socket = web.WebSocketResponse(compress=False)
    await socket.prepare(request)
    readers = SOCKETS[request.match_info["channel"]]
    readers[socket] = None
    try:
        await socket.send_str(GREETING)
        async for _ in socket:
            pass
    finally:
        del readers[socket]
    return socket


async def stream(request: web.Request) -> web.StreamResponse:
    """One reader of events."""
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
    await response.prepare(request)
    readers = STREAMS[request.match_info["channel"]]
    readers[response] = None
    try:
        await response.write(GREETING_EVENT)
        await asyncio.Future()
    finally:
        del readers[response]
    return response


async def poll(request: web.Request) -> web.Response:
    """One question."""
    answer = await polled(POLLS[request.match_info["channel"]], request.query.get("last_seen"))
    return web.Response(body=answer, content_type="application/json")


async def publish(channel: str, message: bytes) -> None:
    """One message to all."""
    for socket in tuple(SOCKETS[channel]):
        await socket.send_frame(message, WSMsgType.TEXT)
    if STREAMS[channel]:
        event = b"data: %b\n\n" % message
        for response in tuple(STREAMS[channel]):
            await response.write(event)
    wake(POLLS[channel].add(message))


WAYS = {"ws": websocket, "sse": stream, "poll": poll}


async def main() -> None:
    """Serves until killed."""
    options = arguments()
    app = web.Application()
    app.add_routes([web.get(f"/{way}/{{channel}}", serve) for way, serve in WAYS.items()])
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", options.port, backlog=4096).start()
    await awaiting_feed(options.feed, publish)
    await asyncio.Future()


if __name__ == "__main__":
    uvloop.run(main())
