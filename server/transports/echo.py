"""``/ws/echo``: every message comes back, through the same WebSocket code; for compliance suites."""

from __future__ import annotations

from typing import Final

import trio

from protocol.frames import binary_frame, close_frame, deflated_text_frame, pong_frame, text_frame
from protocol.websocket import Binary, CloseReceived, Ping, Text, WebSocketError, WebSocketReader, close_reply
from server.exchange import Exchange
from server.socketio import linger, receive
from server.transports.websocket import accept, switch_protocol

MAX_ECHO: Final = 16 * 1024 * 1024


async def echo_socket(exchange: Exchange) -> None:
    """``GET /ws/echo``: returns every message, for compliance suites."""
    connection, sock = exchange.connection, exchange.connection.sock
    handshake = accept(exchange)
    await connection.send(switch_protocol(exchange, handshake))
    deflate = handshake.deflate
    incoming = WebSocketReader(deflate, MAX_ECHO)
    data = connection.http.hand_over()
    while True:
        failure: WebSocketError | None = None
        try:
            events = incoming.receive(data)
        except WebSocketError as error:
            events, failure = error.events, error
        for event in events:
            if isinstance(event, Text):
                text = event.data.encode()
                await connection.send(deflated_text_frame(text, deflate.window_bits) if deflate else text_frame(text))
            elif isinstance(event, Binary):
                await connection.send(binary_frame(event.data))
            elif isinstance(event, Ping):
                await connection.send(pong_frame(event.payload))
            elif isinstance(event, CloseReceived):
                await connection.send(close_reply(event))
                await linger(sock)
                return
        if failure is not None:
            await connection.send(close_frame(failure.code, failure.reason))
            await linger(sock)
            return
        await trio.lowlevel.checkpoint()
        data = await receive(sock)
        if not data:
            return
