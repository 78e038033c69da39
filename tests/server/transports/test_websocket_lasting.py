"""WebSockets as they last: heartbeats, floods, slow and vanishing readers, a server that drains or ends."""

from __future__ import annotations

import re
import time
from contextlib import suppress

import trio
from trio.testing import wait_all_tasks_blocked
from wsproto.events import Ping, TextMessage

from protocol.frames import close_frame
from server.app import drain
from server.transports import live
from server.wheel import STOOD_STILL
from tests.pacing import for_a_while
from tests.streams import (
    NO_PATIENCE,
    WebSocket,
    clean_server,
    cursor,
    handshake_bytes,
    narrow,
    put,
    reset_connection,
    session,
    traces,
    versions,
    websocket,
)
from tests.support import AUTH, PATIENCE_S, InProcess, token, until

# Heartbeats


async def test_heartbeats_carry_the_cursor_and_a_ping() -> None:
    async with clean_server(server={"heartbeat": 0.04}) as server, session(server) as ws:
        await ws.subscribe(jobIds=["quiet"])
        put(server, "busy")
        beat = await ws.receive()
        while beat["id"] != cursor(server):
            beat = await ws.receive()
        assert set(beat) == {"type", "timestamp", "id"}
        assert beat["type"] == "heartbeat"
        assert ws.pings
        # A client that answers stays.
        for _ in range(8):
            assert (await ws.receive())["type"] == "heartbeat"
        await ws.send("ping")
        while (await ws.receive())["type"] != "pong":
            pass


async def test_a_client_that_answers_no_ping_is_stale_and_closed() -> None:
    async with clean_server(server={"heartbeat": 0.03}, health=NO_PATIENCE) as server, session(server) as ws:
        await ws.subscribe()
        received = b""
        with suppress(trio.BrokenResourceError):
            while data := await ws.http.stream.receive_some():  # reads, and never answers
                received += data
        assert close_frame(1008, "no ping was answered") in received
        await until(lambda: not server.node.streams)


async def test_a_server_that_was_stopped_ends_nobody_for_it() -> None:
    """A machine that sleeps hears nobody: that time does not count."""

    def stop() -> None:
        time.sleep(STOOD_STILL + 0.5)

    async with clean_server(server={"heartbeat": 0.1}, health=NO_PATIENCE) as server, session(server) as ws:
        await ws.subscribe()
        (reader,) = server.node.streams
        stop()
        for _ in range(2):
            assert (await ws.receive())["type"] == "heartbeat"
        assert reader in server.node.streams


async def test_a_slow_reader_that_reads_is_not_stale() -> None:
    """It is so far behind that no ping reaches it; that it takes something is sign of life enough."""
    async with (
        clean_server(server={"heartbeat": 0.1}, health=NO_PATIENCE) as server,
        session(server, receive_buffer=1) as ws,
    ):
        await ws.subscribe()
        narrow(server)
        (reader,) = server.node.streams
        put(server, "a", metadata={"text": "x" * 60_000})
        put(server, "b", metadata={"text": "x" * 60_000})
        started = trio.current_time()
        while trio.current_time() < started + 0.1 * (live.STALE_HEARTBEATS + 3):
            if not reader.tail:  # type: ignore[attr-defined]
                put(server, "a")
            await ws.http.stream.receive_some(1000)
            await for_a_while(0.005)  # it reads slowly
        assert reader in server.node.streams
        reset_connection(ws.http)


# Going away


async def test_a_drain_closes_with_1001_and_a_delay(server: InProcess) -> None:
    delays = set()
    async with session(server) as one, session(server) as two, session(server) as three, trio.open_nursery() as nursery:
        await one.subscribe()
        nursery.start_soon(drain, server.node, 0.0)
        for ws in (one, two, three):
            closed = await ws.closed()
            await ws.http.aclose()
            assert closed.code == 1001
            (digits,) = re.findall(r"\d+", closed.reason)
            delays.add(int(digits))
            assert 500 <= int(digits) <= 5000
        assert len(delays) > 1
    async with server.connect() as http:
        await http.send(handshake_bytes())
        status, headers = await http.head()
        assert status == 503
        assert int(headers["retry-after"]) >= 1


async def test_a_drain_is_spread_over_its_time(server: InProcess) -> None:
    async with session(server) as one, session(server) as two, trio.open_nursery() as nursery:
        ends: list[tuple[float, int]] = []

        async def wait(ws: WebSocket) -> None:
            await ws.closed()
            ends.append((trio.current_time() - started, len(server.node.streams)))
            await ws.http.aclose()

        started = trio.current_time()
        nursery.start_soon(wait, one)
        nursery.start_soon(wait, two)
        await drain(server.node, 0.4)
        assert trio.current_time() - started >= 0.4
    (first, others), (second, _) = ends
    assert others == 1
    assert first >= 0.09
    assert second >= 0.29


# Floods


async def test_a_flood_of_pings_is_answered_a_few_times(server: InProcess) -> None:
    async with session(server) as ws:
        ping = ws.connection.send(Ping(b"x" * 125))
        await ws.http.send(ping * 5000)
        await ws.quiet()
        assert 1 <= len(ws.pongs) < 1000
        assert set(ws.pongs) == {b"x" * 125}


async def test_a_flood_whose_pongs_are_not_read_is_bounded(server: InProcess) -> None:
    async with session(server, receive_buffer=1) as ws:
        narrow(server)
        (reader,) = server.node.streams
        ping = ws.connection.send(Ping(b"x" * 125))

        async def flood() -> None:
            while True:
                await ws.http.stream.send_all(ping * 100)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(flood)
            await until(lambda: reader.tail)  # type: ignore[attr-defined]
            await wait_all_tasks_blocked(0.05)  # nothing more is taken of it
            assert len(reader.queue or ()) <= 2  # type: ignore[attr-defined]
            assert len(reader.tail) < 1000  # type: ignore[attr-defined]
            nursery.cancel_scope.cancel()
        reset_connection(ws.http)


async def test_a_client_may_ask_no_faster_than_it_reads(server: InProcess) -> None:
    """Each question is a few bytes, each answer many kilobytes."""
    put(server, "a", metadata={"text": "x" * 10_000})
    async with session(server, receive_buffer=1) as ws:
        narrow(server)
        (reader,) = server.node.streams
        question = ws.connection.send(TextMessage('{"type":"subscribe","ref":1}'))
        await ws.http.send(question * 40)
        await until(lambda: reader.tail)  # type: ignore[attr-defined]
        await wait_all_tasks_blocked()
        assert len(reader.queue or ()) <= 1  # type: ignore[attr-defined]
        answers = await ws.messages(40)
        assert {answer["type"] for answer in answers} == {"subscribed"}


# Slow and vanishing readers


async def test_a_reader_that_never_reads_is_closed_past_its_bound_with_1013() -> None:
    async with clean_server(limits={"backlog": 20_000}) as server, session(server) as other:
        await other.subscribe()
        async with session(server, receive_buffer=1) as never:
            await never.subscribe()
            narrow(server)
            for number in range(100):
                put(server, f"job{number}", metadata={"text": "x" * 2000})
                assert (await other.receive())["jobId"] == f"job{number}"
            assert len(server.node.hub.readers) == 1  # it has left already; the rest is its goodbye
            closed = await never.closed()
            assert closed.code == 1013
            got = [message["jobId"] for message in never.left]
            assert got == [f"job{number}" for number in range(len(got))]
        async with session(server) as again:
            answer = await again.subscribe(last_seen=never.left[-1]["id"])
            assert answer["recovered"]
            rest = [message["jobId"] for message in await again.messages(100 - len(got))]
            assert got + rest == [f"job{number}" for number in range(100)]


async def test_a_healthy_reader_is_not_conflated_however_large_the_flush() -> None:
    async with clean_server(limits={"backlog": 50_000}) as server, session(server) as filtered, session(server) as two:
        await filtered.subscribe(kind="k")
        await two.subscribe(jobIds=["a"])
        await two.subscribe(jobIds=["b"])
        for number in range(60):
            put(server, "a", kind="k", progress=number)
            put(server, "b", kind="k", progress=number, metadata={"text": "x" * 1000})
        for ws in (filtered, two):
            messages = await ws.messages(120)
            assert versions(messages, "a") == versions(messages, "b") == list(range(1, 61))


async def test_a_connection_that_breaks_at_any_moment_leaves_nothing() -> None:
    async with clean_server(auth=AUTH, limits={"connections_per_user": 3}) as server:
        for number in range(20):
            put(server, f"job{number}", metadata={"text": "x" * 30_000})
        for step in range(8):
            async with websocket(server, token=token("alice"), receive_buffer=None if step % 2 else 1) as ws:
                if step > 0:
                    await ws.receive()
                if step > 2:
                    await ws.send("subscribe", minInterval=0 if step < 5 else 1000)
                if step > 4:
                    await ws.receive()
                if step > 5:
                    put(server, "job1", progress=step)
                    put(server, "job2", progress=step)
                if step > 6:
                    await ws.http.send(b"\x81\xfe")  # half a frame
                reset_connection(ws.http)
        await until(lambda: not traces(server))


async def test_the_server_ends_with_readers_in_every_state() -> None:
    """Stopping at once cancels them all; nothing hangs, nothing raises."""
    with trio.fail_after(PATIENCE_S):
        async with (
            clean_server() as server,
            session(server, receive_buffer=1) as slow,
            session(server) as fine,
            websocket(server) as new,
        ):
            await slow.subscribe()
            await fine.subscribe(minInterval=60_000)
            await new.receive()
            narrow(server)
            for number in range(100):
                put(server, "a", progress=number, metadata={"text": "x" * 5000})
                await wait_all_tasks_blocked()
            for stream in list(server.node.streams):
                stream.abandon()  # type: ignore[attr-defined]
            await until(lambda: not server.node.streams)
