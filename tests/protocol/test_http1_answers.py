"""Answers of HTTP/1.1: 100-continue, keep-alive, upgrades, streams; by hand and coupled with h11's client."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import h11
import pytest

from protocol.http1 import CONTINUE, NEED_DATA, HttpConnection, encode_chunk
from protocol.request import Request
from tests.protocol.http1_talk import CHUNKED, GET, JSON, answered, body_of, error_of, head_of, opened, request, waits

# 100-continue


@pytest.mark.parametrize("framing", [b"Content-Length: 2", CHUNKED])
def test_100_continue(framing: bytes) -> None:
    connection = opened(request(framing, b"Expect: 100-Continue"))
    head_of(connection)
    assert waits(connection)
    assert connection.next_event() is NEED_DATA
    assert connection.send_continue() == CONTINUE
    assert not waits(connection)
    assert connection.send_continue() == b""
    connection.receive(b"hi" if framing != CHUNKED else b"2\r\nhi\r\n0\r\n\r\n")
    assert body_of(connection) == b"hi"
    assert b"Connection" not in connection.respond(200, [], b"")
    assert connection.next_request()


@pytest.mark.parametrize(
    "wire",
    [
        request(b"Expect: 100-continue"),
        request(b"Expect: 100-continue", b"Content-Length: 0"),
        request(b"Content-Length: 2"),
        request(b"Expect: 100-continue", b"Content-Length: 2") + b"h",
        request(b"Expect: 100-continue", b"Content-Length: 2", line=b"POST / HTTP/1.0"),
    ],
)
def test_nobody_waits_for_100(wire: bytes) -> None:
    connection = opened(wire)
    head_of(connection)
    assert not waits(connection)
    assert connection.send_continue() == b""


def test_a_final_answer_instead_of_100_closes() -> None:
    connection = opened(request(b"Content-Length: 2", b"Expect: 100-continue"))
    head_of(connection)
    assert b"\r\nConnection: close\r\n" in connection.respond(401, [], b"{}")
    assert connection.send_continue() == b""
    assert not connection.next_request()


# Answers


@pytest.mark.parametrize(
    ("head", "persistent"),
    [
        (request(), True),
        (request(b"Connection: keep-alive"), True),
        (request(b"Connection: close"), False),
        (request(b"Connection: Upgrade, CLOSE"), False),
        (request(b"Connection: upgrade", b"Connection: close"), False),
        (request(line=b"GET / HTTP/1.0"), False),
        (request(b"Connection: keep-alive", line=b"GET / HTTP/1.0"), True),
        (request(b"Connection: keep-alive, close", line=b"GET / HTTP/1.0"), False),
    ],
)
def test_keep_alive(head: bytes, persistent: bool) -> None:
    connection = opened(head + GET)
    wire = answered(connection)
    assert (b"\r\nConnection: close\r\n" in wire) is not persistent
    assert (b"\r\nConnection: keep-alive\r\n" in wire) is (persistent and b"HTTP/1.0" in head)
    assert connection.next_request() is persistent
    assert isinstance(connection.next_event(), Request) is persistent


def test_the_caller_may_close() -> None:
    connection = opened(GET + GET)
    head_of(connection)
    body_of(connection)
    assert b"\r\nConnection: close\r\n" in connection.respond(503, [], b"{}", close=True)
    assert not connection.next_request()


def test_an_answer_before_the_body_was_asked_for_closes() -> None:
    connection = opened(request(b"Content-Length: 2") + b"hi" + GET)
    head_of(connection)
    assert b"\r\nConnection: close\r\n" in connection.respond(401, [], b"{}")
    assert not connection.next_request()


def test_an_answer_without_asking_for_a_body_that_is_not_there_keeps_the_connection() -> None:
    connection = opened(GET + GET)
    head_of(connection)
    assert b"Connection" not in connection.respond(200, [], b"{}")
    assert connection.next_request()
    head_of(connection)


def test_an_answer_without_a_request_closes() -> None:
    wire = opened(b"GET / HT").respond(408, [], b"{}")
    assert wire == b"HTTP/1.1 408 Request Timeout\r\nConnection: close\r\nContent-Length: 2\r\n\r\n{}"


def test_a_bad_head_request_is_answered_without_a_body() -> None:
    connection = opened(request(line=b"HEAD / HTTP/1.1", host=b""))
    assert error_of(connection.next_event).status == 400
    assert connection.respond(400, [], b"{}").endswith(b"\r\nContent-Length: 2\r\n\r\n")


def test_connection_options_are_merged() -> None:
    connection = opened(request(b"Connection: close"))
    head_of(connection)
    wire = connection.respond(426, [("Upgrade", "websocket"), ("connection", "Upgrade")], b"{}")
    assert wire.count(b"onnection:") == 1
    assert b"\r\nConnection: Upgrade, close\r\n" in wire


@pytest.mark.parametrize(
    ("status", "headers"),
    [
        (200, [("X", "a\r\nInjected: 1")]),
        (200, [("X", "a\nb")]),
        (200, [("X", "a\rb")]),
        (200, [("X", "a\0b")]),
        (200, [("X\r\nY", "a")]),
        (200, [("Connection", "a\r\nInjected: 1")]),
        (200, [("X", "snowman \N{SNOWMAN}")]),
        (200, [("Content-Length", "1")]),
        (200, [("transfer-encoding", "chunked")]),
        (100, []),
        (103, []),
        (299, []),
    ],
)
def test_bad_answers_are_our_bug(status: int, headers: list[tuple[str, str]]) -> None:
    steps: Sequence[Callable[[HttpConnection], bytes]] = (
        lambda connection: connection.respond(status, headers, b""),
        lambda connection: connection.start_stream(status, headers),
    )
    for step in steps:
        connection = opened(GET)
        head_of(connection)
        with pytest.raises(ValueError, match=r"header|status|latin-1|itself"):
            step(connection)
        # Nothing was said yet, so a bare 500 is still possible.
        assert connection.respond(500, [], b"").startswith(b"HTTP/1.1 500 ")


def test_calls_out_of_order_are_our_bug() -> None:
    connection = opened(GET)
    for early in (
        connection.next_request,
        connection.end_stream,
        connection.hand_over,
        lambda: connection.stream_chunk(b"x"),
        lambda: connection.limit_body(1),
        lambda: connection.respond(101, []),
    ):
        with pytest.raises(RuntimeError):
            early()
    head_of(connection)
    connection.start_stream(200, [])
    for late in (
        connection.next_request,
        lambda: connection.respond(200, []),
        lambda: connection.start_stream(200, []),
    ):
        with pytest.raises(RuntimeError):
            late()
    connection.end_stream()
    with pytest.raises(RuntimeError):
        connection.end_stream()
    assert connection.next_request()


# Upgrade


def test_upgrade_hands_over_what_is_not_http() -> None:
    connection = opened(request(b"Upgrade: websocket", b"Connection: Upgrade") + b"\x81\x00")
    head_of(connection)
    body_of(connection)
    wire = connection.respond(101, [("Upgrade", "websocket"), ("Connection", "Upgrade")])
    assert wire == b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n"
    assert connection.hand_over() == b"\x81\x00"
    assert connection.hand_over() == b""
    with pytest.raises(RuntimeError):
        connection.next_request()


def test_upgrade_without_asking_for_a_body_that_is_not_there() -> None:
    connection = opened(request(b"Upgrade: websocket") + b"\x81\x00")
    head_of(connection)
    connection.respond(101, [])
    assert connection.hand_over() == b"\x81\x00"


def test_upgrade_waits_for_the_whole_request() -> None:
    connection = opened(request(b"Upgrade: websocket", b"Content-Length: 2") + b"hi\x81\x00")
    head_of(connection)
    with pytest.raises(RuntimeError):
        connection.respond(101, [])
    assert body_of(connection) == b"hi"
    connection.respond(101, [])
    assert connection.hand_over() == b"\x81\x00"


def test_no_upgrade_for_http_10() -> None:
    connection = opened(request(line=b"GET / HTTP/1.0"))
    head_of(connection)
    body_of(connection)
    with pytest.raises(RuntimeError):
        connection.respond(101, [])


def test_an_upgrade_may_be_declined() -> None:
    connection = opened(request(b"Upgrade: h2c", b"Connection: Upgrade") + GET)
    assert b"Connection" not in answered(connection)
    assert connection.next_request()
    head_of(connection)


# Coupled with h11's client


class Client:
    """h11's client on the other end of one connection."""

    def __init__(self) -> None:
        self.server = HttpConnection()
        self.client = h11.Connection(h11.CLIENT)

    def ask(self, method: str, body: bytes = b"", *headers: tuple[str, str], version: str = "1.1") -> Request:
        wire = self.client.send(h11.Request(method=method, target="/", headers=[("Host", "a"), *headers])) or b""
        # h11's client does not speak 1.0: it believes that it asked in 1.1, and only the server hears otherwise.
        wire = wire.replace(b"HTTP/1.1", b"HTTP/" + version.encode())
        if body:
            wire += self.client.send(h11.Data(data=body)) or b""
        self.server.receive(wire + (self.client.send(h11.EndOfMessage()) or b""))
        request = head_of(self.server)
        assert body_of(self.server) == body
        return request

    def heard(self, wire: bytes, *, closed: bool = False) -> tuple[h11.Response, bytes]:
        """What the client makes of ``wire``, received byte by byte."""
        response: h11.Response | None = None
        content = b""
        for piece in [*(bytes([byte]) for byte in wire), *([b""] if closed else [])]:
            self.client.receive_data(piece)
            while True:
                event = self.client.next_event()
                if isinstance(event, h11.Response):
                    response = event
                elif isinstance(event, h11.Data):
                    content += bytes(event.data)
                elif isinstance(event, h11.EndOfMessage):
                    assert response is not None
                    return response, content
                else:
                    assert event is h11.NEED_DATA
                    break
        raise AssertionError("the answer has no end")

    def again(self) -> None:
        assert self.server.next_request()
        self.client.start_next_cycle()
        assert self.client.trailing_data == (b"", False)


def test_answers_of_all_kinds_on_one_connection() -> None:
    both = Client()
    for method, status, body, expected in [
        ("GET", 200, b"{}", b"{}"),
        ("HEAD", 200, b"{}", b""),
        ("GET", 204, b"", b""),
        ("GET", 304, b"{}", b""),
        ("DELETE", 404, b"", b""),
        ("OPTIONS", 200, b"x" * 1000, b"x" * 1000),
    ]:
        both.ask(method)
        response, content = both.heard(both.server.respond(status, [*JSON, ("ETag", '"1"')], body))
        assert (response.status_code, content) == (status, expected)
        headers = dict(response.headers)
        assert headers[b"etag"] == b'"1"'
        assert headers.get(b"content-length") == (None if status in (204, 304) else str(len(body)).encode())
        both.again()


def test_request_bodies_on_one_connection() -> None:
    both = Client()
    both.ask("POST", b"hello", ("Content-Length", "5"))
    both.heard(both.server.respond(200, [], b""))
    both.again()
    both.ask("POST", b"hello" * 1000, ("Transfer-Encoding", "chunked"))
    both.heard(both.server.respond(200, [], b""))
    both.again()


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_chunked_stream(method: str) -> None:
    both = Client()
    for _ in range(2):
        both.ask(method)
        head = both.server.start_stream(200, [("Content-Type", "text/event-stream")])
        assert both.server.chunked is (method == "GET")
        parts = [both.server.stream_chunk(data) for data in (b"data: 1\n\n", b"", b"data: 2\n\n" * 100)]
        response, content = both.heard(head + b"".join(parts) + both.server.end_stream())
        assert dict(response.headers)[b"transfer-encoding"] == b"chunked"
        assert content == (b"data: 1\n\n" + b"data: 2\n\n" * 100 if method == "GET" else b"")
        both.again()


def test_empty_stream() -> None:
    both = Client()
    both.ask("GET")
    wire = both.server.start_stream(204, []) + both.server.stream_chunk(b"never") + both.server.end_stream()
    response, content = both.heard(wire)
    assert (response.status_code, content) == (204, b"")
    assert b"transfer-encoding" not in dict(response.headers)
    both.again()


def test_a_stream_may_be_the_last() -> None:
    both = Client()
    both.ask("GET")
    wire = both.server.start_stream(200, [], close=True) + both.server.stream_chunk(b"x") + both.server.end_stream()
    response, content = both.heard(wire)
    assert dict(response.headers)[b"connection"] == b"close"
    assert content == b"x"
    assert not both.server.next_request()
    assert both.client.their_state is h11.MUST_CLOSE


@pytest.mark.parametrize("headers", [(), (("Connection", "keep-alive"),)])
def test_http_10_stream_ends_with_the_connection(headers: tuple[tuple[str, str], ...]) -> None:
    both = Client()
    assert both.ask("GET", b"", *headers, version="1.0").http_version == "1.0"
    head = both.server.start_stream(200, [])
    assert not both.server.chunked
    wire = head + both.server.stream_chunk(b"data: 1\n\n") + both.server.stream_chunk(b"data: 2\n\n")
    assert both.server.end_stream() == b""
    response, content = both.heard(wire, closed=True)
    assert b"transfer-encoding" not in dict(response.headers)
    assert content == b"data: 1\n\ndata: 2\n\n"
    assert not both.server.next_request()


def test_http_10_head_of_a_stream_may_go_on() -> None:
    connection = opened(request(b"Connection: keep-alive", line=b"HEAD / HTTP/1.0"))
    head_of(connection)
    assert b"\r\nConnection: keep-alive\r\n" in connection.start_stream(200, [])
    assert connection.stream_chunk(b"x") + connection.end_stream() == b""
    assert connection.next_request()


def test_chunks_can_be_shared() -> None:
    connection = opened(GET)
    head_of(connection)
    connection.start_stream(200, [])
    assert connection.stream_chunk(b"x" * 17) == encode_chunk(b"x" * 17) == b"11\r\n" + b"x" * 17 + b"\r\n"
    assert encode_chunk(b"") == b""
