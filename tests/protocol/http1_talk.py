"""Requests as bytes, and what a connection says of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest

from protocol.errors import ApiError
from protocol.http1 import END_OF_BODY, NEED_DATA, PEER_CLOSED, BodyData, Event, HttpConnection
from protocol.request import Request

GET = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
JSON = [("Content-Type", "application/json")]
CHUNKED = b"Transfer-Encoding: chunked"


def request(*lines: bytes, line: bytes = b"GET / HTTP/1.1", host: bytes = b"Host: a\r\n") -> bytes:
    return line + b"\r\n" + host + b"".join(each + b"\r\n" for each in lines) + b"\r\n"


def opened(data: bytes, **limits: int) -> HttpConnection:
    connection = HttpConnection(**limits)
    connection.receive(data)
    return connection


def head_of(connection: HttpConnection) -> Request:
    event = connection.next_event()
    assert isinstance(event, Request)
    return event


def error_of(step: Callable[[], object]) -> ApiError:
    with pytest.raises(ApiError) as caught:
        step()
    return caught.value


def body_of(connection: HttpConnection) -> bytes:
    pieces = []
    while isinstance(event := connection.next_event(), BodyData):
        pieces.append(event.data)
    assert event is END_OF_BODY
    return b"".join(pieces)


def waits(connection: HttpConnection) -> bool:
    # A call, for mypy takes a property that was true once to stay so.
    return connection.expects_continue


def answered(connection: HttpConnection) -> bytes:
    """Read one request to its end and answer it; give the answer."""
    head_of(connection)
    body_of(connection)
    return connection.respond(200, JSON, b"{}")


def transcript(pieces: Iterable[bytes]) -> list[object]:
    """All that a connection says about a byte stream cut into ``pieces``, body pieces joined."""
    connection = HttpConnection()
    said: list[object] = []

    def say(event: Event) -> None:
        if isinstance(event, Request):
            said.append((event.method, event.target, event.path, dict(event.headers), event.http_version))
        elif isinstance(event, BodyData) and said and isinstance(said[-1], bytes):
            said[-1] += event.data
        elif isinstance(event, BodyData):
            said.append(event.data)
        else:
            said.append(event)

    for piece in [*pieces, b""]:
        connection.receive(piece)
        while True:
            try:
                event = connection.next_event()
            except ApiError as error:
                said.append((error.status, error.code, error.message))
                return said
            if event is NEED_DATA:
                break
            say(event)
            if event is PEER_CLOSED:
                return said
            if event is END_OF_BODY:
                connection.respond(200, [], b"")
                if not connection.next_request():
                    return said
    raise AssertionError("the end of the stream led to nothing")
