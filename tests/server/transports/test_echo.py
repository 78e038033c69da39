"""``/ws/echo``: what compliance suites talk to."""

from __future__ import annotations

import pytest
from wsproto.events import BytesMessage, CloseConnection, Ping

from tests.streams import websocket
from tests.support import server, until


@pytest.mark.parametrize("deflate", [False, True])
async def test_every_message_comes_back(deflate: bool) -> None:
    async with server(debug={"echo": True}) as at, websocket(at, "/ws/echo", deflate=deflate) as ws:
        for size in (0, 125, 126, 65_536, 2_000_000):  # more than other messages may have
            assert await ws.ask("text", text="ä" * size) == {"type": "text", "text": "ä" * size}
        await ws.send_event(Ping(payload=b"are you there"))
        assert await ws.ask("more") == {"type": "more"}
        assert [bytes(payload) for payload in ws.pongs] == [b"are you there"]
        await ws.send_event(CloseConnection(code=3456, reason="enough"))
        assert (await ws.closed()).code == 3456
    async with server(debug={"echo": True}) as at:
        async with websocket(at, "/ws/echo", deflate=deflate) as ws:
            await ws.send_event(BytesMessage(data=b"bytes"))
            assert await ws.http._exactly(7) == b"\x82\x05bytes"
        await until(lambda: not at.node.connections)


async def test_broken_frames_end_it_with_the_reason() -> None:
    async with server(debug={"echo": True}) as at, websocket(at, "/ws/echo") as ws:
        await ws.http.send(b"\xf1\x80\0\0\0\0")  # reserved bits without an extension
        assert (await ws.closed()).code == 1002
