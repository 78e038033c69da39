"""How Locust's readers come by their updates: WebSocket, event stream, long-poll, polling. gevent moves the bytes."""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.client import HTTPConnection, HTTPException
from typing import Any, Protocol

import gevent
import h11
import msgspec
from gevent.exceptions import LoopExit
from wsproto import ConnectionType, WSConnection
from wsproto.events import CloseConnection, Ping, RejectConnection, Request, TextMessage

from protocol.messages import Subscribe
from protocol.sse import EventParser

TIMEOUT_S = 30.0
DISCONNECTED = "disconnected by the application"
# The server says something every 30 s.
QUIET_S = 75.0


class Refused(Exception):
    """The server did not do what was asked; the message is its answer."""


class Cut(Exception):
    """The server ended the connection because it was told to."""


class Asker(Protocol):
    """Who wants to read: which job, where the server is, the headers that it wants, and the cursor where it stood.

    `blocked` asks for what is not there, as somebody does behind something that lets this transport not through.
    """

    address: tuple[str, int]
    headers: dict[str, str]
    job: str
    cursor: str
    blocked: bool


def hang_up(connection: socket.socket | None) -> None:
    """Ends a connection without a word: what has not been read is gone, and the other side is reset."""
    if connection is not None:
        with suppress(OSError):
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()


class WebSocket:
    """One connection; `open` returns once it is subscribed and has its snapshot."""

    type = "WS"

    def __init__(self, user: Asker) -> None:
        self._connection = WSConnection(ConnectionType.CLIENT)
        self._socket = socket.create_connection(user.address, TIMEOUT_S)
        self._waiting: list[dict[str, Any]] = []
        target = "/ws/jobs" if not user.blocked else "/blocked"
        headers = [(name.encode(), value.encode()) for name, value in user.headers.items()]
        request = Request(host="localhost", target=target, extra_headers=headers)
        self._socket.sendall(self._connection.send(request))
        self._read(lambda: self._connection.state.name == "OPEN")
        subscribe = Subscribe(job_ids=[user.job], last_seen=user.cursor or None)
        self._socket.sendall(self._connection.send(TextMessage(msgspec.json.encode(subscribe).decode())))
        self._text = ""
        self._read(lambda: any(message["type"] == "subscribed" for message in self._waiting))
        self._socket.settimeout(QUIET_S)

    def _read(self, done: Callable[[], bool]) -> None:
        while not done():
            data = self._socket.recv(65536)
            self._connection.receive_data(data or None)
            for event in self._connection.events():
                if isinstance(event, RejectConnection):
                    raise Refused(f"status {event.status_code}")
                if isinstance(event, CloseConnection):
                    if event.reason == DISCONNECTED:
                        raise Cut
                    raise Refused(f"closed: {event.code} {event.reason}")
                if isinstance(event, Ping):
                    self._socket.sendall(self._connection.send(event.response()))
                if isinstance(event, TextMessage):
                    self._text += event.data
                    if event.message_finished:
                        text, self._text = self._text, ""
                        self._take(json.loads(text))
            if not data:
                raise Refused("the connection ended")

    _text = ""

    def _take(self, message: dict[str, Any]) -> None:
        if message["type"] == "error":
            raise Refused(str(message.get("message")))
        self._waiting.append(message)

    def messages(self) -> Iterator[dict[str, Any]]:
        """What comes, for ever."""
        while True:
            waiting, self._waiting = self._waiting, []
            yield from waiting
            self._read(lambda: bool(self._waiting))

    def close(self) -> None:
        """Goodbye."""
        with suppress(OSError, Exception):
            self._socket.sendall(self._connection.send(CloseConnection(code=1000)))
        self._socket.close()

    def cut(self) -> None:
        """No goodbye."""
        hang_up(self._socket)


class Stream:
    """One event stream."""

    type = "SSE"

    def __init__(self, user: Asker) -> None:
        self._connection = h11.Connection(h11.CLIENT)
        self._socket = socket.create_connection(user.address, TIMEOUT_S)
        self._parser = EventParser(last_event_id=user.cursor)
        headers = [("Host", "localhost"), ("Accept", "text/event-stream"), *user.headers.items()]
        if user.cursor:
            headers.append(("Last-Event-ID", user.cursor))
        target = f"/api/v2/jobs/stream?jobIds={user.job}" if not user.blocked else "/blocked"
        self._socket.sendall(self._connection.send(h11.Request(method="GET", target=target, headers=headers)) or b"")
        self._events = self._read()
        self._ready: list[dict[str, Any]] = [next(self._events)]
        while not user.cursor and self._ready[-1]["type"] != "snapshot":
            self._ready.append(next(self._events))
        self._socket.settimeout(QUIET_S)

    def _read(self) -> Iterator[dict[str, Any]]:
        while True:
            event = self._connection.next_event()
            if event is h11.NEED_DATA:
                self._connection.receive_data(self._socket.recv(65536))
            elif isinstance(event, h11.Response) and event.status_code != 200:
                raise Refused(f"status {event.status_code}")
            elif isinstance(event, h11.Data):
                for found in self._parser.feed(bytes(event.data)):
                    message = json.loads(found.data)
                    if message["type"] == "error":
                        raise Cut if message["message"] == DISCONNECTED else Refused(message["message"])
                    yield {**message, "id": found.id}
            elif isinstance(event, (h11.EndOfMessage, h11.ConnectionClosed)):
                raise Refused("the stream ended")

    def messages(self) -> Iterator[dict[str, Any]]:
        """What comes, for ever."""
        yield from self._ready
        yield from self._events

    def close(self) -> None:
        """Goodbye."""
        self._socket.close()

    def cut(self) -> None:
        """No goodbye."""
        hang_up(self._socket)


class Poll:
    """Questions one after another, each waiting for something new."""

    type = "POLL"
    timeout_s, pause_s = 20, 0.0

    def __init__(self, user: Asker) -> None:
        self._user = user
        host, port = user.address
        self._connection = HTTPConnection(host, port, timeout=TIMEOUT_S + self.timeout_s)
        self._path = f"/api/v2/jobs/poll?jobIds={user.job}" if not user.blocked else "/blocked?"
        self._cursor = user.cursor
        self._ready = self._ask(0)

    def _ask(self, timeout_s: int) -> list[dict[str, Any]]:
        cursor = f"&last_seen={self._cursor}" if self._cursor else ""
        self._connection.request("GET", f"{self._path}&timeout={timeout_s}{cursor}", headers=self._user.headers)
        response = self._connection.getresponse()
        data = response.read()
        if response.status != 200:
            raise Refused(f"status {response.status}")
        answer = json.loads(data)
        first, self._cursor = not self._cursor, answer["last_seen"]
        if first or answer.get("reset"):
            return [{"type": "snapshot", "jobs": answer["updates"], "id": self._cursor}]
        return [{**update, "id": self._cursor} for update in answer["updates"]]

    def messages(self) -> Iterator[dict[str, Any]]:
        """What comes, for ever."""
        yield from self._ready
        while True:
            gevent.sleep(self.pause_s)
            yield from self._ask(self.timeout_s)

    def close(self) -> None:
        """Goodbye."""
        self._connection.close()

    def cut(self) -> None:
        """No goodbye."""
        hang_up(self._connection.sock)
        self._connection.close()


class Asking(Poll):
    """The same without waiting, once in two seconds."""

    type = "GET"
    timeout_s, pause_s = 0, 2.0


Transport = type[WebSocket] | type[Stream] | type[Poll]
EVERY: tuple[Transport, ...] = (WebSocket, Stream, Poll, Asking)
# What can go wrong with a connection. LoopExit: gevent has nothing left to wait for.
TROUBLE = (
    OSError,
    Refused,
    HTTPException,
    h11.ProtocolError,
    LoopExit,
    StopIteration,
    RuntimeError,
    ValueError,
    KeyError,
)
