"""Heads of HTTP/1.1 requests, with their framing: what is taken, what is refused and how, however the bytes are cut."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import h11
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import ApiError
from protocol.http1 import END_OF_BODY, MAX_KNOWN, PAUSED, PEER_CLOSED, HttpConnection, encode_chunk
from protocol.request import Request
from tests.protocol.http1_talk import CHUNKED, GET, body_of, error_of, head_of, opened, request, transcript

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


# Beside h11


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


_SECTIONS = [
    b"Host: a\r\n\r\n",
    b"X: y\r\nHost: a\r\n\r\n",
    b"Host: a\r\nContent-Length: 0\r\n\r\n",
    b"Host: a\r\nContent-Length: 3\r\n\r\nabc",
    b"Host: a\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n\r\n",
    b"Host: a\r\nExpect: 100-continue\r\nContent-Length: 1\r\n\r\nx",
    b"Host: a\r\nConnection: keep-alive\r\n\r\n",
    b"Host: a\r\nConnection: close\r\n\r\n",
    b"Host: a\r\nX: " + b"x" * MAX_KNOWN + b"\r\n\r\n",
    b"\r\n",
]
_LINES = [
    *(b"GET / HTTP/1.1", b"POST /a?b=c HTTP/1.1", b"GET http://other/ HTTP/1.1", b"GET / HTTP/1.0", b"HEAD / HTTP/1.1"),
    *(
        b"GET /",
        b"GET  / HTTP/1.1",
        b"GET / HTTP/1.1\nX: y",
        b"GET / HTTP/1.1\0",
        b"GET / HTTP/1.1\r\nX: y",
        b"CONNECT a HTTP/1.1",
    ),
]


@pytest.mark.parametrize("section", _SECTIONS, ids=range(len(_SECTIONS)))
def test_what_was_said_before_on_a_connection_changes_nothing(section: bytes) -> None:
    """The header section of the request before is remembered; each means what it means on its own."""
    for other in _SECTIONS:
        for line in _LINES:
            before, after = b"GET http://first/ HTTP/1.1\r\n" + section, line + b"\r\n" + other
            alone, both = transcript([before]), transcript([before, after])
            goes_on = alone[-1] is PEER_CLOSED
            assert both == (alone[:-1] + transcript([after]) if goes_on else alone)
