"""Clients for the live ways of reading, and a server that must be left without a trace.

The WebSocket client is wsproto's connection, the event-stream client cuts the text by hand: neither shares code with
what it tests.
"""

from __future__ import annotations

import base64
import hashlib
import json
import socket
import ssl
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from types import SimpleNamespace
from typing import Any, Final, NamedTuple
from unittest.mock import patch
from urllib.parse import urlencode

import trio
from wsproto.connection import Connection, ConnectionType
from wsproto.events import BytesMessage, CloseConnection, Message, Ping, Pong, TextMessage
from wsproto.extensions import PerMessageDeflate

from protocol.errors import ApiError
from protocol.fields import decode_fields
from server.brokers.base import Accepted, Delete, Publish
from server.transports import live, longpoll
from tests.support import PATIENCE_S, Address, Ended, Headers, Http, InProcess, in_seconds, request_bytes, server, until

KEY: Final = base64.b64encode(bytes(16)).decode()
ACCEPT: Final = base64.b64encode(hashlib.sha1(KEY.encode() + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest()).decode()

# What says that a request is EventSource's.
EVENT_SOURCE: Final = {"Accept": "text/event-stream"}

# Table [health]: as little patience as there can be, which is that of four heartbeats.
NO_PATIENCE: Final = {"check_interval": 0.02, "stale_after": 0.001}


# Servers and updates


@asynccontextmanager
async def clean_server(
    *, tls: ssl.SSLContext | None = None, **tables: Mapping[str, object]
) -> AsyncIterator[InProcess]:
    """A server that must have forgotten everything about its readers once the last one has gone."""
    async with server(tls=tls, **tables) as running:
        yield running
        await until(lambda: not traces(running))


def traces(running: InProcess) -> dict[str, object]:
    """What there is of readers in any table."""
    node = running.node
    found: dict[str, object] = {
        "channels": list(node.hub.channels),
        "readers": list(node.hub.readers),
        "streams": list(node.streams),
        "polls": list(node.polls),
        "connections": node.connections,
        "timers": len(node.wheel),
        "clients": node.presence.clients,
        "users": node.presence.users,
        "named": node.presence.channels,
        "busy": node._busy,
    }
    return {name: value for name, value in found.items() if value}


def put(running: InProcess, job_id: str, user: str = "alice", **fields: object) -> Accepted:
    """Publish one update, past HTTP; it is kept and on its way when this returns."""
    data = decode_fields(json.dumps({"userId": user} | fields).encode())
    (result,) = running.node.broker.submit([Publish(job_id, data, "may", user)]).results
    if isinstance(result, ApiError):
        raise result
    return result


def remove(running: InProcess, job_id: str) -> Accepted:
    """Delete a job, past HTTP."""
    (result,) = running.node.broker.submit([Delete(job_id)]).results
    assert isinstance(result, Accepted), result
    return result


def cursor(running: InProcess) -> str:
    """The end of the log."""
    history = running.node.history
    return f"{history.epoch}:{history.last}"


def offset_of(cursor: str) -> int:
    """Where in its log a cursor stands."""
    return int(cursor.rpartition(":")[2])


def lose_log(running: InProcess, last: int = 0) -> None:
    """What a store does that cannot vouch for its tail: the same records, a new epoch."""
    node = running.node
    node.history.restart(f"{node.history.epoch[:-1]}{'a' if node.history.epoch[-1] != 'a' else 'b'}", last)
    node.log_lost(node.history.epoch)


def narrow(running: InProcess, size: int = 1) -> None:
    """Give the live connections the smallest send buffers there are, so that a reader is soon slow."""
    for stream in running.node.streams:
        stream.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, size)  # type: ignore[attr-defined]


@contextmanager
def running_out(after_s: float = 0.2) -> Iterator[float]:
    """The ``exp`` of tokens that are good for any request, and run out so soon after it for what lasts.

    Requests go by another clock than what lasts, so a slow machine is not too late with one.
    """
    ahead_s = 1000.0
    clock = SimpleNamespace(time=lambda: time.time() + ahead_s)
    with patch.object(live, "time", clock), patch.object(longpoll, "time", clock):
        yield in_seconds(ahead_s + after_s)


# WebSocket


class Closed(Exception):
    """The server closed the WebSocket; ``code`` is 1006 where it did so without a close frame."""

    def __init__(self, code: int, reason: str = "") -> None:
        super().__init__(f"{code} {reason}")
        self.code = code
        self.reason = reason


class WebSocket:
    """One client. ``pings`` and ``pongs`` collect what came; pings are answered."""

    def __init__(self, http: Http, answer: dict[str, str], deflate: PerMessageDeflate | None) -> None:
        self.http = http
        self.answer = answer
        self.connection = Connection(ConnectionType.CLIENT, [] if deflate is None else [deflate])
        self.pings: list[bytes] = []
        self.pongs: list[bytes] = []
        self.raw = b""
        self._messages: list[dict[str, Any]] = []
        self._text = ""
        self._closed: Closed | None = None
        if http.received:
            data, http.received = http.received, b""
            self._take(data)

    async def send(self, type_: str, **fields: object) -> None:
        """Send one message."""
        await self.send_text(json.dumps({"type": type_} | fields))

    async def send_text(self, text: str) -> None:
        """Send text as it is."""
        await self.http.send(self.connection.send(TextMessage(text)))

    async def send_event(self, event: Message | Ping | Pong | CloseConnection | BytesMessage) -> None:
        """Send any frame."""
        await self.http.send(self.connection.send(event))

    async def receive(self) -> dict[str, Any]:
        """The next message. Raises Closed."""
        with trio.fail_after(PATIENCE_S):
            while not self._messages:
                if self._closed is not None:
                    raise self._closed
                await self._more()
        return self._messages.pop(0)

    async def messages(self, count: int) -> list[dict[str, Any]]:
        """The next so many messages."""
        return [await self.receive() for _ in range(count)]

    async def ask(self, type_: str, **fields: object) -> dict[str, Any]:
        """Send one message and give the next one that comes."""
        await self.send(type_, **fields)
        return await self.receive()

    async def subscribe(self, **fields: object) -> dict[str, Any]:
        """Subscribe; the answer, its parts joined. It must be what comes next, but for heartbeats."""
        answer = await self.ask("subscribe", **fields)
        while answer["type"] == "heartbeat":
            answer = await self.receive()
        assert answer["type"] == "subscribed", answer
        while answer.pop("more", False):
            part = await self.receive()
            part["snapshot"] = answer["snapshot"] + part["snapshot"]
            answer = part
        return answer

    async def quiet(self) -> None:
        """Make sure that nothing is on its way: the answer to a ping is what comes next."""
        answer = await self.ask("ping", ref="quiet")
        assert (answer["type"], answer.get("ref")) == ("pong", "quiet"), answer

    async def updates(self, job_id: str, version: int) -> list[dict[str, Any]]:
        """All messages up to this version of this job."""
        found = []
        while True:
            message = await self.receive()
            found.append(message)
            if message.get("jobId") == job_id and message.get("version") == version:
                return found

    async def closed(self) -> Closed:
        """Read to the end; how it ended. Messages on the way are kept in ``left``."""
        self.left: list[dict[str, Any]] = []
        try:
            while True:
                self.left.append(await self.receive())
        except Closed as closed:
            return closed

    async def _more(self) -> None:
        try:
            data = bytes(await self.http.stream.receive_some())
        except trio.BrokenResourceError:
            data = b""
        if not data:
            self._closed = Closed(1006)
            return
        for answer in self._take(data):
            with suppress(trio.BrokenResourceError):
                await self.http.stream.send_all(answer)

    def _take(self, data: bytes) -> list[bytes]:
        self.raw += data
        self.connection.receive_data(data)
        answers = []
        for event in self.connection.events():
            if isinstance(event, TextMessage):
                self._text += event.data
                if event.message_finished:
                    self._messages.append(json.loads(self._text))
                    self._text = ""
            elif isinstance(event, Ping):
                self.pings.append(bytes(event.payload))
                answers.append(self.connection.send(event.response()))
            elif isinstance(event, Pong):
                self.pongs.append(bytes(event.payload))
            elif isinstance(event, CloseConnection):
                self._closed = Closed(event.code, event.reason or "")
            else:
                raise AssertionError(event)
        return answers


def handshake_bytes(target: str = "/ws/jobs", headers: Headers = ()) -> bytes:
    """The request that opens a WebSocket."""
    pairs = [
        ("Upgrade", "websocket"),
        ("Connection", "Upgrade"),
        ("Sec-WebSocket-Version", "13"),
        ("Sec-WebSocket-Key", KEY),
        *(headers.items() if isinstance(headers, Mapping) else headers),
    ]
    return request_bytes("GET", target, headers=pairs)


@asynccontextmanager
async def websocket(
    where: Address,
    target: str = "/ws/jobs",
    *,
    token: str | None = None,
    headers: Headers = (),
    deflate: bool = False,
    receive_buffer: int | None = None,
) -> AsyncIterator[WebSocket]:
    """Open a WebSocket; its ``connected`` is left to read."""
    pairs = list(headers.items() if isinstance(headers, Mapping) else headers)
    if token is not None:
        pairs.append(("Authorization", f"Bearer {token}"))
    extension = PerMessageDeflate() if deflate else None
    if extension is not None:
        pairs.append(("Sec-WebSocket-Extensions", f"permessage-deflate; {extension.offer()}"))
    async with connect(where, receive_buffer) as http:
        await http.send(handshake_bytes(target, pairs))
        status, answer = await http.head()
        assert status == 101, (status, answer, http.received)
        assert answer["sec-websocket-accept"] == ACCEPT
        if extension is not None:
            extension.finalize(answer["sec-websocket-extensions"])
        else:
            assert "sec-websocket-extensions" not in answer
        yield WebSocket(http, answer, extension)


@asynccontextmanager
async def session(where: Address, **options: Any) -> AsyncIterator[WebSocket]:
    """Open a WebSocket that is let in, and read its ``connected``."""
    async with websocket(where, **options) as ws:
        hello = await ws.receive()
        assert hello["type"] == "connected", hello
        yield ws


@asynccontextmanager
async def connect(where: Address, receive_buffer: int | None = None) -> AsyncIterator[Http]:
    """One connection; a small ``receive_buffer`` makes a slow reader of it."""
    sock = trio.socket.socket()
    if receive_buffer is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    with sock:
        with trio.fail_after(PATIENCE_S):
            await sock.connect(("127.0.0.1", where.port))
        stream = where.secured(trio.SocketStream(sock))
        try:
            yield Http(stream)
        finally:
            await trio.aclose_forcefully(stream)


def reset_connection(http: Http) -> None:
    """Break the connection with a TCP reset, now."""
    assert isinstance(http.stream, trio.SocketStream)
    http.stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    http.stream.socket.close()


# Event streams


class SseEvent(NamedTuple):
    """One event as it stood in the stream; None where a field was not there."""

    data: Any
    id: str | None
    retry: int | None
    name: str | None = None

    @property
    def type(self) -> str:
        """The ``type`` of its JSON."""
        kind = self.data["type"]
        assert isinstance(kind, str)
        return kind


class Stream:
    """One event stream, read strictly: unnamed one-line events, LF only, each whole in its chunk.

    Args:
        proxied: a proxy in between cuts chunks of its own, so an event may end in another one than it began in.
    """

    def __init__(self, http: Http, status: int, headers: dict[str, str], *, proxied: bool = False) -> None:
        self._begun: bytes | None = b"" if proxied else None
        self.http = http
        self.status = status
        self.headers = headers
        self._events: list[SseEvent] = []
        self._size: int | None = None  # of the chunk under way
        self.last_id: str | None = None
        self.chunk_sizes: list[int] = []  # events in each chunk

    async def event(self) -> SseEvent:
        """The next event. Raises Ended at the end of the stream, and what trio raises at a broken connection."""
        with trio.fail_after(PATIENCE_S):
            while not self._events:
                assert self.headers["transfer-encoding"] == "chunked"
                if self._size is None:  # kept, so that a reader may be cancelled here and come back
                    self._size = int(await self.http._until(b"\r\n"), 16)
                chunk = await self.http._exactly(self._size + 2)
                assert chunk.endswith(b"\r\n"), chunk
                if not self._size:
                    raise Ended
                self._size = None
                text = chunk[:-2]
                if self._begun is not None:
                    whole, end, self._begun = (self._begun + text).rpartition(b"\n\n")
                    if not end:
                        continue
                    text = whole + end
                events = parse_events(text)
                self.chunk_sizes.append(len(events))
                self._events += events
        event = self._events.pop(0)
        if event.id is not None:
            self.last_id = event.id
        return event

    async def events(self, count: int) -> list[SseEvent]:
        """The next so many events."""
        return [await self.event() for _ in range(count)]

    async def until(self, type_: str) -> list[SseEvent]:
        """All events up to the first of this type."""
        found = [await self.event()]
        while found[-1].type != type_:
            found.append(await self.event())
        return found

    async def updates(self, job_id: str, version: int) -> list[SseEvent]:
        """All events up to this version of this job."""
        found = [await self.event()]
        while (found[-1].data.get("jobId"), found[-1].data.get("version")) != (job_id, version):
            found.append(await self.event())
        return found

    async def rest(self) -> list[SseEvent]:
        """All events to the proper end, which has no bytes before it and none after it."""
        found = []
        broken_off: tuple[object, ...] = ()
        try:
            while True:
                found.append(await self.event())
        except Ended as ended:
            broken_off = ended.args
        assert not broken_off, "the stream ended without its last chunk"
        assert await self.http.closed()
        return found


def parse_events(text: bytes) -> list[SseEvent]:
    """Cut whole events; anything that is not exactly of our form fails."""
    assert b"\r" not in text, text
    assert text.endswith(b"\n\n"), text
    events = []
    for block in text[:-2].split(b"\n\n"):
        fields: dict[str, str] = {}
        for line in block.decode().split("\n"):
            name, colon, value = line.partition(": ")
            assert colon, line
            assert name not in fields, block
            fields[name] = value
        assert list(fields) == [name for name in ("retry", "id", "event", "data") if name in fields], block
        retry = None if "retry" not in fields else int(fields["retry"])
        events.append(SseEvent(json.loads(fields["data"]), fields.get("id"), retry, fields.get("event")))
    return events


@asynccontextmanager
async def event_stream(
    where: Address,
    *,
    headers: Headers = (),
    receive_buffer: int | None = None,
    **query: object,
) -> AsyncIterator[Stream]:
    """Open an event stream of jobs; ``query`` without its Nones."""
    pairs = {name: value for name, value in query.items() if value is not None}
    target = f"/api/v2/jobs/stream?{urlencode(pairs, safe=',:')}"
    async with stream_at(where, target, headers=headers, receive_buffer=receive_buffer) as stream:
        yield stream


@asynccontextmanager
async def stream_at(
    where: Address, target: str, *, headers: Headers = (), receive_buffer: int | None = None
) -> AsyncIterator[Stream]:
    """Open the event stream of any path."""
    async with connect(where, receive_buffer) as http:
        await http.send(request_bytes("GET", target, headers=headers))
        status, answer = await http.head()
        yield Stream(http, status, answer)


async def poll(where: Address, *, headers: Headers = (), **query: object) -> dict[str, Any]:
    """One poll; without ``timeout`` it does not wait."""
    pairs = {"timeout": 0} | {name: value for name, value in query.items() if value is not None}
    answer = await where.get(f"/api/v2/jobs/poll?{urlencode(pairs, safe=',:')}", headers)
    assert answer.status == 200, answer
    body = answer.json
    assert isinstance(body, dict)
    return body


def versions(messages: Sequence[Mapping[str, Any]], job_id: str) -> list[int]:
    """The versions of one job in these messages, in order."""
    return [message["version"] for message in messages if message.get("jobId") == job_id and "version" in message]


def seen(messages: Sequence[Mapping[str, Any]]) -> list[tuple[str, int]]:
    """What these messages or records tell of: job and version of each, in order."""
    return [(message["jobId"], message["version"]) for message in messages]
