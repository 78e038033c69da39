"""What an HTTP/1.1 peer may fill: lines, heads, bodies, chunks; and what its leaving leaves."""

from __future__ import annotations

import time

import pytest

from protocol.errors import ApiError
from protocol.http1 import END_OF_BODY, NEED_DATA, PAUSED, PEER_CLOSED, BodyData, HttpConnection
from protocol.http1_head import MAX_HEADERS
from protocol.request import Request
from tests.protocol.http1_talk import (
    CHUNKED,
    GET,
    JSON,
    answered,
    body_of,
    error_of,
    head_of,
    opened,
    request,
    transcript,
    waits,
)

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
