"""Peers that go, or stop, in the middle of a turn: none of them keeps the server busy, and nothing of them is left."""

from __future__ import annotations

import socket
from collections.abc import Callable

import pytest
import trio

from server.transports.live import LiveReader
from server.transports.notices import NoticeStream
from server.transports.sse import EventStream
from server.transports.websocket import Session
from tests.pacing import for_a_while
from tests.streams import (
    Closed,
    clean_server,
    connect,
    event_stream,
    handshake_bytes,
    narrow,
    put,
    reset_connection,
    session,
)
from tests.support import Http, request_bytes, until

# For so long the loop is watched, and may turn so often for its own sake. A socket that is reported for ever makes it
# turn thousands of times.
WATCHED_S = 0.2
TURNS = 60


class Passes(trio.abc.Instrument):
    """Counts how often the loop goes round."""

    def __init__(self) -> None:
        self.count = 0

    def before_io_wait(self, timeout: float) -> None:
        self.count += 1


async def passes() -> int:
    """How often the loop goes round while nothing happens."""
    counter = Passes()
    trio.lowlevel.add_instrument(counter)
    await for_a_while(WATCHED_S)
    trio.lowlevel.remove_instrument(counter)
    return counter.count


def half_close(http: Http) -> None:
    assert isinstance(http.stream, trio.SocketStream)
    http.stream.socket.shutdown(socket.SHUT_WR)


GOING = pytest.mark.parametrize("go", [half_close, reset_connection, lambda http: None], ids=["fin", "rst", "stays"])


@GOING
async def test_a_poll_that_waits_for_one_who_went(go: Callable[[Http], None]) -> None:
    async with clean_server() as at, connect(at) as http:
        await http.send(request_bytes("GET", "/api/v2/jobs/poll?timeout=60"))
        await until(lambda: at.node.polls)
        await http.send(request_bytes("GET", "/health"))  # pipelined: the socket is readable from here on
        go(http)
        assert await passes() < TURNS
        put(at, "job_1")
        await until(lambda: not at.node.polls)


@GOING
@pytest.mark.parametrize("asks", [True, False])
async def test_a_socket_that_is_full(go: Callable[[Http], None], asks: bool) -> None:
    async with clean_server() as at, session(at, receive_buffer=1) as ws:
        narrow(at)
        await ws.send("subscribe", all=True)
        assert (await ws.receive())["type"] == "subscribed"
        (stream,) = at.node.streams
        # Asking, its turn waits in the end.
        while not (at.node.poller._waiting if asks else stream._draining):  # type: ignore[attr-defined]
            put(at, "job_1", message="x" * 2000)
            if asks:
                await ws.send("ping")
            await trio.lowlevel.checkpoint()
        if asks:
            await ws.send("ping")
        go(ws.http)
        assert await passes() < TURNS


@GOING
async def test_heads_and_bodies_that_stop(go: Callable[[Http], None]) -> None:
    async with clean_server() as at, connect(at) as head, connect(at) as body, connect(at) as idle:
        await head.send(b"GET / HTTP/1.1\r\nHost: local")
        await body.send(b"POST /api/v2/jobs HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n\r\n{")
        await idle.request("GET", "/health")
        await until(lambda: at.node.poller._waiting)
        for http in (head, body, idle):
            go(http)
        assert await passes() < TURNS


async def test_streams_whose_clients_went() -> None:
    async with clean_server() as at, event_stream(at) as stream, session(at) as ws:
        half_close(stream.http)
        half_close(ws.http)
        await until(lambda: at.node.connections == 0)
        assert await passes() < TURNS


async def test_who_is_ended_while_the_server_stops_is_left_to_it() -> None:
    """Between the end of the tasks and that of the connections the flusher may still come upon a broken one."""
    async with clean_server() as at, session(at) as ws:
        (stream,) = at.node.streams
        tasks = at.node.poller.tasks
        async with trio.open_nursery() as stopped:
            stopped.cancel_scope.cancel()
        at.node.poller.tasks = stopped
        stream.disconnect()  # type: ignore[attr-defined]
        assert at.node.poller.peers[stream.sock.fileno()] is stream  # type: ignore[attr-defined]
        at.node.poller.tasks = tasks
        stream.abandon()  # type: ignore[attr-defined]
        with pytest.raises(Closed):
            await ws.receive()


@pytest.mark.parametrize("kind", [Session, EventStream, NoticeStream])
@pytest.mark.parametrize("late", [False, True], ids=["before anything is sent", "after"])
async def test_a_stream_that_fails_as_it_begins_leaves_nothing(
    kind: type[LiveReader], late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody has taken its connection over by then, so nobody else would part it."""
    begin = kind.welcome if kind is Session else kind.begin  # type: ignore[attr-defined]

    def fail(*arguments: object, **named: object) -> None:
        if late:
            begin(*arguments, **named)
        raise ValueError("oops")

    monkeypatch.setattr(kind, begin.__name__, fail)
    said = {
        Session: handshake_bytes(),
        EventStream: request_bytes("GET", "/api/v2/jobs/stream"),
        NoticeStream: request_bytes("GET", "/api/sse?channels=news"),
    }
    async with clean_server() as at, connect(at) as http:
        await http.send(said[kind])
        await http.rest()
        await until(lambda: at.node.connections == 0)
