"""WebSocket frames over real sockets: fragments, limits, broken ones, closing, compression, other libraries."""

from __future__ import annotations

import json

import pytest
import trio
import trio_websocket
from wsproto.events import CloseConnection, Ping, TextMessage
from wsproto.frame_protocol import FrameProtocol, Opcode

from tests.streams import WebSocket, clean_server, handshake_bytes, put, session
from tests.support import PATIENCE_S, InProcess, until


async def test_fragments_with_a_ping_inside(server: InProcess) -> None:
    async with session(server) as ws:
        text = json.dumps({"type": "ping", "ref": "ü" * 10})
        for position, letter in enumerate(text):
            await ws.send_event(TextMessage(letter, message_finished=position == len(text) - 1))
            if position == 5:
                await ws.send_event(Ping(b"inside"))
        assert (await ws.receive())["ref"] == "ü" * 10
        assert ws.pongs == [b"inside"]


async def test_a_handshake_with_messages_right_behind_it(server: InProcess) -> None:
    frames = FrameProtocol(client=True, extensions=[])
    early = frames.send_data('{"type":"ping","ref":"early"}')
    async with server.connect() as http:
        await http.send(handshake_bytes() + early)
        status, answer = await http.head()
        assert status == 101
        ws = WebSocket(http, answer, None)
        assert [(await ws.receive())["type"], (await ws.receive())["ref"]] == ["connected", "early"]


async def test_a_message_of_one_mebibyte_and_one_more(server: InProcess) -> None:
    limit = 1024 * 1024
    async with session(server) as ws:
        text = '{"type":"ping","ref":"' + "x" * (limit - 24) + '"}'
        assert len(text) == limit
        await ws.send_text(text)
        assert len((await ws.receive())["ref"]) == limit - 24
        await ws.send_text(text + " ")
        assert (await ws.closed()).code == 1009
    async with session(server, deflate=True) as ws:
        await ws.send_text(text + " ")
        assert (await ws.closed()).code == 1009


async def test_a_length_that_nobody_has_is_refused_at_once(server: InProcess) -> None:
    async with session(server) as ws:
        await ws.http.send(b"\x81\xff" + (2**62).to_bytes(8, "big") + bytes(4))
        assert (await ws.closed()).code == 1009


@pytest.mark.parametrize(
    ("opcode", "data", "code"),
    [
        (Opcode.TEXT, b"\xff", 1007),
        (Opcode.TEXT, b'"\xc3', 1007),
        (3, b"", 1002),
        (Opcode.CONTINUATION, b"x", 1002),
    ],
)
async def test_bad_frames(server: InProcess, opcode: int, data: bytes, code: int) -> None:
    async with session(server) as ws:
        mask = bytes(4)
        await ws.http.send(bytes([0x80 | opcode, 0x80 | len(data)]) + mask + data)
        assert (await ws.closed()).code == code


async def test_large_messages_under_way_are_bounded_together() -> None:
    async with clean_server(limits={"unfinished": 100_000}) as at:
        async with session(at) as first, session(at) as second:
            await first.send_event(TextMessage(" " * 150_000, message_finished=False))
            await until(lambda: at.node.limits.unfinished > 80_000)
            await second.send_event(TextMessage(" " * 150_000, message_finished=False))
            assert (await second.closed()).code == 1013
            await first.send_event(TextMessage('{"type":"ping"}', message_finished=True))
            assert (await first.receive())["type"] == "pong"
        await until(lambda: at.node.limits.unfinished == 0)


async def test_unmasked_frames_are_a_protocol_error(server: InProcess) -> None:
    async with session(server) as ws:
        await ws.http.send(b"\x81\x0f" + b'{"type":"ping"}')
        assert (await ws.closed()).code == 1002


async def test_good_messages_before_a_bad_frame_are_answered(server: InProcess) -> None:
    async with session(server) as ws:
        good = ws.connection.send(TextMessage('{"type":"ping","ref":"good"}'))
        await ws.http.send(good + b"\x83\x80" + bytes(4))
        closed = await ws.closed()
        assert (closed.code, [message["ref"] for message in ws.left]) == (1002, ["good"])


# Closing


@pytest.mark.parametrize("code", [1000, 1001, 3000, 4999])
async def test_the_close_handshake(server: InProcess, code: int) -> None:
    async with session(server) as ws:
        await ws.subscribe()
        await ws.send_event(CloseConnection(code, "bye"))
        assert (await ws.closed()).code == code
        assert await ws.http.closed()  # and then the connection: the server closes first (section 7.1.1)


async def test_a_close_without_a_code_is_answered_without_one(server: InProcess) -> None:
    async with session(server) as ws:
        await ws.http.send(b"\x88\x80" + bytes(4))
        assert await ws.http.rest() == b"\x88\x00"


# Compression, lines, another library


async def test_compression_is_agreed_on_and_used_for_what_is_worth_it(server: InProcess) -> None:
    async with session(server, deflate=True) as ws:
        agreed = ws.answer["sec-websocket-extensions"]
        assert agreed.startswith("permessage-deflate")
        assert "server_no_context_takeover" in agreed
        assert "client_no_context_takeover" in agreed
        await ws.subscribe()
        ws.raw = b""
        put(server, "a", message="same " * 400)
        assert (await ws.receive())["message"] == "same " * 400
        assert ws.raw[0] == 0xC1
        assert len(ws.raw) < 600
        ws.raw = b""
        put(server, "b")
        await ws.receive()
        assert ws.raw[0] == 0x81
        # Both sides begin anew with each message: a second one is understood as well.
        for _ in range(3):
            await ws.send("ping", ref="again " * 100)
            assert (await ws.receive())["ref"] == "again " * 100


async def test_without_compression_nothing_is_compressed(server: InProcess) -> None:
    async with session(server) as ws:
        await ws.subscribe()
        ws.raw = b""
        put(server, "a", message="same " * 400)
        await ws.receive()
        assert ws.raw[0] == 0x81


async def test_what_goes_out_together_comes_in_one_frame_to_who_reads_lines(server: InProcess) -> None:
    for job_id in "abc":
        put(server, job_id)
    async with trio_websocket.open_websocket_url(
        f"{server.ws_url}/ws/jobs", subprotocols=["statuswire.v1", "statuswire.v1.lines"]
    ) as connection:
        assert connection.subprotocol == "statuswire.v1.lines"
        assert json.loads(await connection.get_message())["type"] == "connected"
        await connection.send_message('{"type":"subscribe","jobIds":["a","b","c"]}')
        assert len(json.loads(await connection.get_message())["snapshot"]) == 3
        updates = [{"jobId": job_id, "progress": 5} for job_id in "abca"]
        assert (await server.post("/api/v2/updates", updates)).status == 200
        with trio.fail_after(PATIENCE_S):
            lines = (await connection.get_message()).split("\n")
        assert [json.loads(line)["jobId"] for line in lines] == ["a", "b", "c", "a"]


async def test_another_client_library_gets_along(server: InProcess) -> None:
    put(server, "a")
    async with trio_websocket.open_websocket_url(
        f"{server.ws_url}/ws/jobs", subprotocols=["statuswire.v1"]
    ) as connection:
        assert connection.subprotocol == "statuswire.v1"
        assert json.loads(await connection.get_message())["type"] == "connected"
        await connection.send_message('{"type":"subscribe"}')
        assert len(json.loads(await connection.get_message())["snapshot"]) == 1
        put(server, "a", status="completed")
        assert json.loads(await connection.get_message())["type"] == "job_completed"
        with trio.fail_after(PATIENCE_S):
            await connection.ping(b"hello")
