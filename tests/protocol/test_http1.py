from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

import h11
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import ApiError
from protocol.http1 import (
    CONTINUE,
    END_OF_BODY,
    NEED_DATA,
    PAUSED,
    PEER_CLOSED,
    BodyData,
    Event,
    HttpConnection,
    encode_chunk,
)
from protocol.http1_head import MAX_HEADERS
from protocol.request import Request

GET = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
JSON = [("Content-Type", "application/json")]


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


# What is accepted


@pytest.mark.parametrize(
    ("wire", "expected"),
    [
        (GET, ("GET", "/", "/", {"host": "a"}, "1.1")),
        (b"GET / HTTP/1.0\r\n\r\n", ("GET", "/", "/", {}, "1.0")),
        (b"GET / HTTP/1.7\r\nHost: a\r\n\r\n", ("GET", "/", "/", {"host": "a"}, "1.1")),
        (b"\r\n" + GET, ("GET", "/", "/", {"host": "a"}, "1.1")),
        (b"\r\n\r\n" + GET, ("GET", "/", "/", {"host": "a"}, "1.1")),
        (
            b"OPTIONS * HTTP/1.1\r\nhOST:[::1]:80\r\nX:  a b \t\r\nX:c\r\nEmpty:\r\n\r\n",
            ("OPTIONS", "*", "*", {"host": "[::1]:80", "x": "a b, c", "empty": ""}, "1.1"),
        ),
        (
            b"get /%C3%A4?q=%zz HTTP/1.1\r\nHost: a:80\r\nCookie: a=1\r\nCookie: b=\xe4\x01\r\n\r\n",
            ("get", "/%C3%A4?q=%zz", "/ä", {"host": "a:80", "cookie": "a=1; b=\xe4\x01"}, "1.1"),
        ),
        (
            b"GET http://b:1/x?y HTTP/1.1\r\nHost: a\r\n\r\n",
            ("GET", "http://b:1/x?y", "/x", {"host": "b:1"}, "1.1"),
        ),
        (
            b"GET / HTTP/1.1\r\nHost: a\r\nSec-WebSocket-Key: k1\r\nSec-WebSocket-Key: k2\r\n\r\n",
            ("GET", "/", "/", {"host": "a", "sec-websocket-key": "k1, k2"}, "1.1"),
        ),
        (
            b"GET / HTTP/1.0\r\nExpect: nonsense\r\n\r\n",
            ("GET", "/", "/", {"expect": "nonsense"}, "1.0"),
        ),
    ],
)
def test_good_heads(wire: bytes, expected: tuple[object, ...]) -> None:
    assert transcript([wire])[:2] == [expected, END_OF_BODY]


@pytest.mark.parametrize(
    ("framing", "wire", "body"),
    [
        (b"Content-Length: 5", b"hello", b"hello"),
        (b"Content-Length:  5 ", b"hello", b"hello"),
        (b"content-length:00005", b"hello", b"hello"),
        (b"Content-Length: 0", b"", b""),
        (b"Transfer-Encoding: chunked", b"5\r\nhello\r\n0\r\n\r\n", b"hello"),
        (b"transfer-encoding: Chunked", b"05\r\nhello\r\n000\r\n\r\n", b"hello"),
        (b"Transfer-Encoding: chunked", b"2;ext=1\r\nhe\r\n3\r\nllo\r\n0;x\r\n\r\n", b"hello"),
        (b"Transfer-Encoding: chunked", b"A\r\n0123456789\r\n0\r\nTrailer: 1\r\nMore: 2\r\n\r\n", b"0123456789"),
        (b"Transfer-Encoding: chunked", b"0\r\n\r\n", b""),
        (b"Transfer-Encoding: chunked", b'5 ; a = b;c="d;\\"e" ; f\r\nhello\r\n0\r\nA:\r\n\r\n', b"hello"),
    ],
)
@pytest.mark.parametrize("method", [b"POST", b"GET", b"OPTIONS"])
def test_bodies(method: bytes, framing: bytes, wire: bytes, body: bytes) -> None:
    data = method + b" / HTTP/1.1\r\nHost: a\r\n" + framing + b"\r\n\r\n" + wire
    connection = opened(data + GET)
    head_of(connection)
    assert body_of(connection) == body
    assert connection.next_event() is PAUSED
    connection.respond(204, [])
    assert connection.next_request()
    assert head_of(connection).method == "GET"
    assert transcript([data + GET]) == transcript(bytes([byte]) for byte in data + GET)


# What is refused


def request(*lines: bytes, line: bytes = b"GET / HTTP/1.1", host: bytes = b"Host: a\r\n") -> bytes:
    return line + b"\r\n" + host + b"".join(each + b"\r\n" for each in lines) + b"\r\n"


CHUNKED = b"Transfer-Encoding: chunked"
REFUSED = [
    # the request line
    (request(line=b"GET /a b HTTP/1.1"), 400, "bad_request"),
    (request(line=b"GET  / HTTP/1.1"), 400, "bad_request"),
    (request(line=b"GET / HTTP/1.1 "), 400, "bad_request"),
    (request(line=b"GET /"), 400, "bad_request"),
    (request(line=b"GET / http/1.1"), 400, "bad_request"),
    (request(line=b"GET / HTTP/1"), 400, "bad_request"),
    (request(line=b"GET / HTTP/1.11"), 400, "bad_request"),
    (request(line=b"GET / HTTP/"), 400, "bad_request"),
    (request(line=b"G\x00T / HTTP/1.1"), 400, "bad_request"),
    (request(line=b"G(T / HTTP/1.1"), 400, "bad_request"),
    (request(line=b" GET / HTTP/1.1"), 400, "bad_request"),
    (request(line="GET /ä HTTP/1.1".encode()), 400, "bad_request"),
    (request(line=b"GET /\x7f HTTP/1.1"), 400, "bad_request"),
    (request(line=b"GET /\x01 HTTP/1.1"), 400, "bad_request"),
    (request(line=b"GET /%zz HTTP/1.1"), 400, "bad_request"),
    (request(line=b"GET /%00 HTTP/1.1"), 400, "bad_request"),
    (request(line=b"GET /%0d%0a HTTP/1.1"), 400, "bad_request"),
    (request(line=b"GET /%ff HTTP/1.1"), 400, "bad_request"),
    (request(line=b"GET /#f HTTP/1.1"), 400, "bad_request"),
    (request(line=b"GET * HTTP/1.1"), 400, "bad_request"),
    (request(line=b"GET a:80 HTTP/1.1"), 400, "bad_request"),
    (request(line=b"GET http://u@a/ HTTP/1.1"), 400, "bad_request"),
    (request(line=b"CONNECT a:80 HTTP/1.1"), 405, "method_not_allowed"),
    (request(line=b"GET / HTTP/2.0"), 505, "http_version_not_supported"),
    (request(line=b"GET / HTTP/0.9"), 505, "http_version_not_supported"),
    (request(line=b"GET / HTTP/3"), 505, "http_version_not_supported"),
    (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505, "http_version_not_supported"),
    (b"\x16\x03\x01\x02\x00\x01", 400, "bad_request"),
    (b"\r\n\r\n\r\n" + GET, 400, "bad_request"),
    (b"\n" + GET, 400, "bad_request"),
    (b"\rGET / HTTP/1.1\r\nHost: a\r\n\r\n", 400, "bad_request"),
    # line ends
    (b"GET / HTTP/1.1\nHost: a\n\n", 400, "bad_request"),
    (b"GET / HTTP/1.1\r\nHost: a\n\r\n", 400, "bad_request"),
    (b"GET / HTTP/1.1\r\nHost: a\r\n\n", 400, "bad_request"),
    (b"GET / HTTP/1.1\nHost: a\r\n\r\n", 400, "bad_request"),
    (request(b"X: a\rb"), 400, "bad_request"),
    (request(b"X: a\nb"), 400, "bad_request"),
    (request(b"X: a\r\r\nY: b"), 400, "bad_request"),
    (request(b"X: a\x00b"), 400, "bad_request"),
    (request(b"X: a", b" b"), 400, "bad_request"),
    (request(b"X: a", b"\tb"), 400, "bad_request"),
    (request(b" X: a", host=b""), 400, "bad_request"),
    # header fields
    (request(b"X : a"), 400, "bad_request"),
    (request(b"X"), 400, "bad_request"),
    (request(b": a"), 400, "bad_request"),
    (request(b"X\xe4: a"), 400, "bad_request"),
    (request(b"X(: a"), 400, "bad_request"),
    (request(b"X: a\x0bb"), 400, "bad_request"),
    (request(b"Authorization: a", b"Authorization: a"), 400, "bad_request"),
    (request(b"Content-Type: a", b"content-type: b"), 400, "bad_request"),
    (request(b"Origin: a", b"Origin: b"), 400, "bad_request"),
    # Host
    (request(host=b""), 400, "bad_request"),
    (request(host=b"", line=b"GET http://a/ HTTP/1.1"), 400, "bad_request"),
    (request(host=b"", line=b"GET / HTTP/1.7"), 400, "bad_request"),
    (request(b"Host: a"), 400, "bad_request"),
    (request(b"Host: b", line=b"GET / HTTP/1.0"), 400, "bad_request"),
    (request(host=b"Host:\r\n"), 400, "bad_request"),
    (request(host=b"Host: a b\r\n"), 400, "bad_request"),
    (request(host=b"Host: a,b\r\n"), 400, "bad_request"),
    (request(host=b"Host: u@a\r\n"), 400, "bad_request"),
    (request(host=b"Host: a\x01\r\n"), 400, "bad_request"),
    (request(host=b"Host: a/\r\n"), 400, "bad_request"),
    (request(host=b"Host: a:port\r\n"), 400, "bad_request"),
    (request(host=b"Host: a b\r\n", line=b"GET http://a/ HTTP/1.1"), 400, "bad_request"),
    # framing
    (request(b"Content-Length: 1", b"Content-Length: 1"), 400, "bad_request"),
    (request(b"Content-Length: 1", b"Content-Length: 2"), 400, "bad_request"),
    (request(b"Content-Length: 1, 1"), 400, "bad_request"),
    (request(b"Content-Length:"), 400, "bad_request"),
    (request(b"Content-Length: -1"), 400, "bad_request"),
    (request(b"Content-Length: +1"), 400, "bad_request"),
    (request(b"Content-Length:\t1"), 400, "bad_request"),
    (request(b"Transfer-Encoding: chunked\t"), 400, "bad_request"),
    (request(host=b"Host: a \t\r\n"), 400, "bad_request"),
    (request(host=b"Host: a..b\r\n"), 400, "bad_request"),
    (request(host=b"Host: .\r\n"), 400, "bad_request"),
    (request(b"Content-Length: 0x1"), 400, "bad_request"),
    (request(b"Content-Length: 1_0"), 400, "bad_request"),
    (request(b"Content-Length: 1 0"), 400, "bad_request"),
    (request(b"Content-Length: \xb2"), 400, "bad_request"),
    (request(b"Content-Length: " + b"9" * 19), 413, "payload_too_large"),
    (request(b"Content-Length: " + b"9" * 5000), 413, "payload_too_large"),
    (request(b"Content-Length: 5", CHUNKED), 400, "bad_request"),
    (request(CHUNKED, b"Content-Length: 5"), 400, "bad_request"),
    (request(CHUNKED, CHUNKED), 501, "not_supported"),
    (request(b"Transfer-Encoding: gzip, chunked"), 501, "not_supported"),
    (request(b"Transfer-Encoding: chunked, identity"), 501, "not_supported"),
    (request(b"Transfer-Encoding: identity"), 501, "not_supported"),
    (request(b"Transfer-Encoding:"), 501, "not_supported"),
    (request(b"Transfer-Encoding: xchunked"), 501, "not_supported"),
    (request(CHUNKED, line=b"GET / HTTP/1.0"), 400, "bad_request"),
    (request(b"Expect: 200-ok"), 417, "expectation_failed"),
    (request(b"Expect: 100-continue, other"), 417, "expectation_failed"),
]
CHUNK_ERRORS = [
    b"x\r\n",
    b"-1\r\n",
    b"0x1\r\na\r\n0\r\n\r\n",
    b"1\na\r\n0\r\n\r\n",
    b"1;a\nb\r\na\r\n0\r\n\r\n",
    b"1\r\nab\r\n0\r\n\r\n",
    b"1\r\na\n0\r\n\r\n",
    b"1" * 21 + b"\r\n",
    b"\r\n",
    b"0\r\nX : 1\r\n\r\n",
    b"0\r\n\n",
    b"0\r\nX: 1\n\r\n",
    b"0\r\nX: 1\r\n\n",
    b"1 \r\na\r\n0\r\n\r\n",
    b"1\t\r\na\r\n0\r\n\r\n",
    b"1;\r\na\r\n0\r\n\r\n",
    b"1;a\rb\r\na\r\n0\r\n\r\n",
    b"1;a\x00\r\na\r\n0\r\n\r\n",
    b'1;a="b\r\na\r\n0\r\n\r\n',
    b"1;" + b"a" * 5000,
    b"0\r\nX: 1\r\n 2\r\n\r\n",
    b"0\r\nX\r\n\r\n",
    b"0\r\nX: \x00\r\n\r\n",
    b"0\r\nX: a\rb\r\n\r\n",
]


@pytest.mark.parametrize(("wire", "status", "code"), REFUSED)
def test_bad_heads(wire: bytes, status: int, code: str) -> None:
    connection = opened(wire + GET)
    error = error_of(connection.next_event)
    assert (error.status, error.code) == (status, code)
    # It stays refused, is answered once, and nothing behind it is ever read.
    assert error_of(connection.next_event) is error
    assert b"\r\nConnection: close\r\n" in connection.respond(error.status, [], b"{}")
    connection.receive(GET)
    assert not connection.next_request()
    assert error_of(connection.next_event) is error
    # However the bytes were cut.
    assert transcript([wire + GET]) == transcript(bytes([byte]) for byte in wire + GET)


@pytest.mark.parametrize("wire", CHUNK_ERRORS)
def test_bad_chunks(wire: bytes) -> None:
    connection = opened(request(CHUNKED) + wire + GET)
    head_of(connection)
    error = error_of(lambda: body_of(connection))
    assert (error.status, error.code) == (400, "bad_request")
    assert b"\r\nConnection: close\r\n" in connection.respond(400, [], b"{}")
    assert not connection.next_request()


def test_a_refused_peer_cannot_fill_memory_or_switch_protocols() -> None:
    connection = opened(request(line=b"GET /%zz HTTP/1.1") + GET)
    error_of(connection.next_event)
    connection.receive(b"x" * 100_000)
    assert len(connection._buffer) == 0
    with pytest.raises(RuntimeError):
        connection.respond(101, [])


def test_a_refusal_never_repeats_a_malformed_line() -> None:
    error = error_of(opened(request(b"Authorization : Bearer secret")).next_event)
    assert "secret" not in error.message
    assert error.message


def test_tls_to_a_plain_port_is_named() -> None:
    assert "TLS" in error_of(opened(b"\x16").next_event).message


def test_405_names_the_methods() -> None:
    assert dict(error_of(opened(request(line=b"CONNECT a:1 HTTP/1.1")).next_event).headers)["Allow"]


# Limits


def test_the_request_line_is_bounded() -> None:
    # 20 bytes: "GET /xxxxxx HTTP/1.1" is 20 long with six x, the CR makes 21.
    at_limit = request(line=b"GET /xxxxxx HTTP/1.1")
    assert isinstance(opened(at_limit, max_line=21).next_event(), Request)
    assert error_of(opened(at_limit, max_line=20).next_event).status == 414
    endless = opened(b"GET /", max_line=20)
    for _ in range(15):
        endless.receive(b"x")
        assert endless.next_event() is NEED_DATA
    endless.receive(b"x")
    error = error_of(endless.next_event)
    assert (error.status, error.code) == (414, "uri_too_long")


def test_the_header_section_is_bounded() -> None:
    wire = request(b"X: " + b"x" * 50)
    section = len(wire) - wire.index(b"\n")
    assert isinstance(opened(wire, max_head=section).next_event(), Request)
    assert error_of(opened(wire, max_head=section - 1).next_event).code == "header_too_large"
    slow = HttpConnection(max_head=section - 1)
    for byte in wire[:-1]:
        slow.receive(bytes([byte]))
        assert slow.next_event() is NEED_DATA
    slow.receive(wire[-1:])
    assert error_of(slow.next_event).status == 431


def test_defaults_take_a_thousand_ids_but_not_everything() -> None:
    ids = b"%2C".join([b"x" * 36] * 1000)
    assert len(head_of(opened(request(line=b"GET /?jobIds=" + ids + b" HTTP/1.1"))).query["jobIds"]) == 36999
    assert error_of(opened(b"GET /" + b"x" * 100_000).next_event).status == 414
    assert error_of(opened(request(b"X: " + b"x" * 100_000)).next_event).status == 431


def test_the_number_of_headers_is_bounded() -> None:
    fields = [b"X: 1"] * (MAX_HEADERS - 1)
    assert isinstance(opened(request(*fields)).next_event(), Request)
    error = error_of(opened(request(*fields, b"X: 1")).next_event)
    assert (error.status, error.code) == (431, "header_too_large")


def test_an_announced_body_is_bounded_before_it_is_read() -> None:
    connection = opened(request(b"Content-Length: 11", b"Expect: 100-continue"))
    head_of(connection)
    connection.limit_body(11)
    assert waits(connection)
    error = error_of(lambda: connection.limit_body(10))
    assert (error.status, error.code) == (413, "payload_too_large")
    assert not waits(connection)
    assert b"\r\nConnection: close\r\n" in connection.respond(413, [], b"{}")
    assert not connection.next_request()


def test_a_body_is_bounded_without_being_asked() -> None:
    connection = opened(request(b"Content-Length: 1000000000"))
    head_of(connection)
    assert error_of(connection.next_event).status == 413


def test_a_chunked_body_is_bounded_as_it_is_read() -> None:
    connection = opened(request(CHUNKED) + b"a\r\n0123456789\r\n")
    head_of(connection)
    connection.limit_body(10)
    assert connection.next_event() == BodyData(b"0123456789")
    assert connection.next_event() is NEED_DATA
    connection.receive(b"1\r\nx\r\n0\r\n\r\n")
    error = error_of(connection.next_event)
    assert (error.status, error.code) == (413, "payload_too_large")


@pytest.mark.parametrize("size", [b"b", b"ffffffff", b"f" * 16])
def test_a_chunk_is_too_large_before_it_comes(size: bytes) -> None:
    connection = opened(request(CHUNKED) + size + b"\r\n")
    head_of(connection)
    connection.limit_body(10)
    assert error_of(connection.next_event).status == 413


@pytest.mark.parametrize("filler", [b";a", b" ", b"\t;", b";a=", b';a="', b';a="\\"', b"a", b"; ;"])
def test_long_extensions_take_linear_time(filler: bytes) -> None:
    start = time.process_time()
    for _ in range(20):
        connection = opened(request(CHUNKED) + b"1" + filler * (4000 // len(filler)) + b"\x00\r\n")
        head_of(connection)
        assert error_of(connection.next_event).status == 400
    assert time.process_time() - start < 1  # some milliseconds


def test_a_limit_may_come_after_the_body_was_read() -> None:
    connection = opened(GET)
    head_of(connection)
    assert connection.next_event() is END_OF_BODY
    connection.limit_body(0)


def test_chunk_headers_are_bounded() -> None:
    connection = opened(request(CHUNKED))
    head_of(connection)
    error: ApiError | None = None
    for _ in range(1000):
        connection.receive(b"1;" + b"x" * 1000 + b"\r\na\r\n")
        try:
            while connection.next_event() is not NEED_DATA:
                pass
        except ApiError as caught:
            error = caught
            break
    assert error is not None
    assert error.status == 400


def test_one_byte_chunks_are_legal() -> None:
    connection = opened(request(CHUNKED))
    head_of(connection)
    for _ in range(10_000):
        connection.receive(b"1\r\na\r\n")
        assert connection.next_event() == BodyData(b"a")
        assert connection.next_event() is NEED_DATA


def test_an_endless_trailer_is_refused() -> None:
    connection = opened(request(CHUNKED) + b"0\r\n", max_line=100, max_head=100)
    head_of(connection)
    connection.receive(b"X: " + b"x" * 300)
    error = error_of(connection.next_event)
    assert (error.status, error.code) == (431, "header_too_large")


# The peer's leaving


@pytest.mark.parametrize(
    "wire",
    [b"", b"\r\n", b"\r", b"G", GET[:-1], request(b"Content-Length: 2") + b"a", request(CHUNKED) + b"5\r\nab"],
)
def test_an_end_in_the_middle_leaves_nothing_to_answer(wire: bytes) -> None:
    said = transcript([wire] if wire else [])
    assert said[-1] is PEER_CLOSED
    assert END_OF_BODY not in said


def test_half_close_after_a_request_is_answered() -> None:
    connection = opened(GET + GET)
    connection.receive(b"")
    assert b"Connection: close" not in answered(connection)
    assert connection.next_request()
    assert b"\r\nConnection: close\r\n" in answered(connection)
    assert connection.next_event() is PEER_CLOSED
    assert not connection.next_request()


def test_a_stream_sees_its_reader_leave() -> None:
    connection = opened(GET)
    head_of(connection)
    body_of(connection)
    connection.start_stream(200, [])
    assert connection.next_event() is NEED_DATA
    connection.receive(b"")
    assert connection.next_event() is PEER_CLOSED


def test_bytes_after_connection_close_are_ignored() -> None:
    connection = opened(request(b"Connection: close") + b"\x00garbage")
    assert connection.next_event() is not None
    assert connection.next_event() is END_OF_BODY
    assert connection.next_event() is PAUSED
    assert connection.respond(200, JSON, b"{}").endswith(b"\r\nConnection: close\r\nContent-Length: 2\r\n\r\n{}")
    assert not connection.next_request()


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


# Any cut of the bytes

_TOKENS = st.text("abcXYZ019-_.", min_size=1, max_size=12)
_BODIES = st.binary(max_size=40)


@st.composite
def _requests(draw: st.DrawFn) -> tuple[bytes, bytes]:
    """One valid request on the wire, and its body."""
    method = draw(st.sampled_from(["GET", "POST", "HEAD", "OPTIONS", "PATCH"]))
    body = draw(_BODIES)
    lines = [f"{method} /{draw(_TOKENS)}?a={draw(_TOKENS)} HTTP/1.1", "Host: a"]
    lines += [f"X-{name}: {value}" for name, value in draw(st.dictionaries(_TOKENS, _TOKENS, max_size=3)).items()]
    if draw(st.booleans()):
        cuts = sorted({0, len(body), *draw(st.lists(st.integers(0, len(body)), max_size=4))})
        wire = b"".join(encode_chunk(body[start:end]) for start, end in pairwise(cuts))
        wire += b"0\r\n" + draw(st.sampled_from([b"", b"Trailer: x\r\n"])) + b"\r\n"
        lines.append("Transfer-Encoding: chunked")
    else:
        wire = body
        if body or draw(st.booleans()):
            lines.append(f"Content-Length: {len(body)}")
    empty = draw(st.sampled_from(["", "", "\r\n", "\r\n\r\n"]))
    return (empty + "\r\n".join(lines) + "\r\n\r\n").encode() + wire, body


def _pieces(wire: bytes, cuts: Iterable[int]) -> list[bytes]:
    edges = sorted({0, len(wire), *(cut % (len(wire) + 1) for cut in cuts)})
    return [wire[start:end] for start, end in pairwise(edges)]


@given(st.lists(_requests(), min_size=1, max_size=4), st.lists(st.integers(0, 2000), max_size=12))
def test_any_cut_gives_the_same_events(requests: list[tuple[bytes, bytes]], cuts: list[int]) -> None:
    wire = b"".join(data for data, _ in requests)
    whole = transcript([wire])
    assert [said for said in whole if isinstance(said, bytes)] == [body for _, body in requests if body]
    assert whole.count(END_OF_BODY) == len(requests)
    assert transcript(_pieces(wire, cuts)) == whole
    assert transcript(bytes([byte]) for byte in wire) == whole


_PARTS = [
    b"GET / HTTP/1.1",
    b"\r\n",
    b"\n",
    b"\r",
    b"Host: a",
    CHUNKED,
    b"Content-Length: 3",
    b"abc",
    b"3",
    b"0",
    b" ",
    b";",
]


@given(
    st.lists(st.sampled_from(_PARTS) | st.binary(max_size=2), max_size=25).map(b"".join),
    st.lists(st.integers(0, 200), max_size=8),
)
def test_any_cut_of_rubbish_gives_the_same_end(wire: bytes, cuts: list[int]) -> None:
    for stream in (wire, GET + wire, request(CHUNKED) + wire):
        assert transcript(_pieces(stream, cuts)) == transcript([stream] if stream else [])


# --- heads beside h11 ---------------------------------------------------------------------------------------------

FIELD_BYTES = b"aZ09-_.:, \t;=\"'()\x01\x0b\x0c\x1f\x7f\x80\x85\xa0\xff"
FIELD_NAMES = (
    b"x",
    b"X-A",
    b"cookie",
    b"Accept",
    b"host",
    b"content-length",
    b"transfer-encoding",
    b"x y",
    b"",
    b"\xe4",
)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(FIELD_NAMES),
            st.sampled_from((b":", b": ", b" : ", b":\t ", b"")),
            st.lists(st.sampled_from([bytes([byte]) for byte in FIELD_BYTES]), max_size=8).map(b"".join),
        ),
        max_size=5,
    )
)
def test_a_head_that_is_taken_is_one_for_h11_and_says_the_same(lines: list[tuple[bytes, bytes, bytes]]) -> None:
    head = b"GET / HTTP/1.1\r\nHost: a\r\n" + b"".join(b"".join(line) + b"\r\n" for line in lines) + b"\r\n"
    connection = HttpConnection()
    connection.receive(head)
    try:
        event = connection.next_event()
    except ApiError:
        return
    assert isinstance(event, Request)
    oracle = h11.Connection(h11.SERVER)
    oracle.receive_data(head)
    parsed = oracle.next_event()
    assert isinstance(parsed, h11.Request)
    expected: dict[str, str] = {}
    for raw_name, raw_value in parsed.headers:
        name, value = raw_name.decode(), raw_value.decode("latin-1")
        expected[name] = f"{expected[name]}{'; ' if name == 'cookie' else ', '}{value}" if name in expected else value
    expected["transfer-encoding"] = event.headers.get("transfer-encoding", "").lower()
    assert {**event.headers, "transfer-encoding": event.headers.get("transfer-encoding", "").lower()} == expected
    again = HttpConnection()
    again.receive(b"GET / HTTP/1.1\r\n" + b"".join(b"%b: %b\r\n" % field for field in parsed.headers) + b"\r\n")
    assert isinstance(again.next_event(), Request)


@pytest.mark.parametrize("value", [b"a\x0bb", b"\x0c", b"a \x0b"])
def test_a_field_has_no_other_white_space_than_blanks_and_tabs(value: bytes) -> None:
    connection = HttpConnection()
    connection.receive(b"GET / HTTP/1.1\r\nHost: a\r\nX: " + value + b"\r\n\r\n")
    with pytest.raises(ApiError, match="malformed"):
        connection.next_event()
