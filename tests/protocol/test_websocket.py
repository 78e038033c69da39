"""The handshake by table; incoming frames against wsproto's client, by hand and by property."""

from __future__ import annotations

import contextlib
import random
import struct
import time
import tracemalloc
import zlib
from collections.abc import Iterable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from wsproto import ConnectionType, WSConnection
from wsproto.connection import Connection
from wsproto.events import AcceptConnection, BytesMessage, CloseConnection, RejectConnection, TextMessage
from wsproto.events import Ping as WsprotoPing
from wsproto.events import Pong as WsprotoPong
from wsproto.events import Request as WsprotoRequest
from wsproto.extensions import PerMessageDeflate

from protocol import websocket
from protocol.errors import ApiError, CloseCode
from protocol.frames import SMALL_WINDOW_BITS, WINDOW_BITS, close_frame, deflated_text_frame, pong_frame, text_frame
from protocol.request import Request
from protocol.websocket import (
    Binary,
    CloseReceived,
    DeflateParameters,
    Event,
    Handshake,
    Ping,
    Pong,
    Text,
    WebSocketError,
    WebSocketReader,
    accept_handshake,
    close_reply,
)

MIB = 1024 * 1024
DEFLATE = DeflateParameters()

GOOD = {
    "host": "localhost",
    "upgrade": "websocket",
    "connection": "Upgrade",
    "sec-websocket-key": "dGhlIHNhbXBsZSBub25jZQ==",
    "sec-websocket-version": "13",
}


def shake(
    changes: dict[str, str | None] | None = None,
    *,
    method: str = "GET",
    http_version: str = "1.1",
    protocols: Sequence[str] = ("statuswire.v1",),
    echo_prefix: str | None = None,
    deflate: bool = True,
) -> Handshake:
    headers = {name: value for name, value in (GOOD | (changes or {})).items() if value is not None}
    request = Request(method, "/ws/jobs", "/ws/jobs", {}, headers, http_version)
    return accept_handshake(request, protocols=protocols, echo_prefix=echo_prefix, deflate=deflate)


# --- the handshake


def test_the_example_of_the_rfc() -> None:
    assert shake() == Handshake(
        headers=[
            ("Upgrade", "websocket"),
            ("Connection", "Upgrade"),
            ("Sec-WebSocket-Accept", "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="),
        ],
        protocol=None,
        offered=(),
        deflate=None,
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"upgrade": "WebSocket"},
        {"upgrade": "h2c, websocket"},
        {"connection": "keep-alive, Upgrade"},
        {"connection": "UPGRADE,keep-alive"},
        {"content-length": "0"},
        {"content-length": "00"},
    ],
)
def test_accepted(changes: dict[str, str | None]) -> None:
    assert shake(changes).headers[0] == ("Upgrade", "websocket")


@pytest.mark.parametrize(
    ("changes", "status", "words"),
    [
        ({"upgrade": None}, 426, "Upgrade: websocket"),
        ({"upgrade": "h2c"}, 426, "Upgrade: websocket"),
        ({"upgrade": "websocket2"}, 426, "Upgrade: websocket"),
        ({"connection": None}, 426, "Connection: Upgrade"),
        ({"connection": "keep-alive"}, 426, "Connection: Upgrade"),
        ({"sec-websocket-version": None}, 426, "must be 13, not None"),
        ({"sec-websocket-version": "8"}, 426, "must be 13, not '8'"),
        ({"sec-websocket-version": "013"}, 426, "must be 13"),
        ({"sec-websocket-version": "13, 13"}, 426, "must be 13"),
        ({"sec-websocket-version": "abc"}, 426, "must be 13"),
        ({"sec-websocket-key": None}, 400, "Sec-WebSocket-Key"),
        ({"sec-websocket-key": ""}, 400, "Sec-WebSocket-Key"),
        ({"sec-websocket-key": "c2hvcnQ="}, 400, "Sec-WebSocket-Key"),
        ({"sec-websocket-key": "dGhlIHNhbXBsZSBub25jZSE="}, 400, "Sec-WebSocket-Key"),  # 17 bytes
        ({"sec-websocket-key": "dGhlIHNhbXBsZSBub25jZQ"}, 400, "Sec-WebSocket-Key"),
        ({"sec-websocket-key": "dGhlIHNhbXBsZSBub25j*Q=="}, 400, "Sec-WebSocket-Key"),
        ({"sec-websocket-key": "dGhlIHNhbXBsZSBub25jé==="}, 400, "Sec-WebSocket-Key"),
        ({"sec-websocket-key": "dGhlIHNhbXBsZSBub25jZQ==, dGhlIHNhbXBsZSBub25jZQ=="}, 400, "Sec-WebSocket-Key"),
        ({"content-length": "1"}, 400, "no body"),
        ({"content-length": "10"}, 400, "no body"),
        ({"transfer-encoding": "chunked"}, 400, "no body"),
        ({"sec-websocket-protocol": ""}, 400, "list of tokens"),
        ({"sec-websocket-protocol": ",,"}, 400, "list of tokens"),
        ({"sec-websocket-protocol": "a b"}, 400, "list of tokens"),
        ({"sec-websocket-protocol": 'a, "b"'}, 400, "list of tokens"),
    ],
)
def test_refused(changes: dict[str, str | None], status: int, words: str) -> None:
    with pytest.raises(ApiError, match=words) as caught:
        shake(changes)
    assert caught.value.status == status
    if status == 426:
        assert set(caught.value.headers) == {
            ("Sec-WebSocket-Version", "13"),
            ("Upgrade", "websocket"),
            ("Connection", "Upgrade"),
        }
        assert caught.value.code in ("upgrade_required", "unsupported_version")
    else:
        assert caught.value.code == "bad_handshake"


@pytest.mark.parametrize("method", ["POST", "HEAD", "OPTIONS", "get"])
def test_only_get(method: str) -> None:
    with pytest.raises(ApiError) as caught:
        shake(method=method)
    assert (caught.value.status, caught.value.headers) == (405, (("Allow", "GET"),))


def test_only_http_1_1() -> None:
    with pytest.raises(ApiError, match=r"not HTTP/1\.0") as caught:
        shake(http_version="1.0")
    assert caught.value.status == 400


@pytest.mark.parametrize(
    ("offer", "chosen"),
    [
        (None, None),
        ("statuswire.v1", "statuswire.v1"),
        ("other", None),
        ("bearer.a.b.c, statuswire.v1", "statuswire.v1"),
        ("statuswire.v1, statuswire.v2", "statuswire.v2"),  # our order decides
        ("other, bearer.a.b.c", "bearer.a.b.c"),
        ("bearer.a,bearer.b,,", "bearer.a"),
        ("STATUSWIRE.V1", None),
        ("statuswire.v1, statuswire.v1", "statuswire.v1"),
    ],
)
def test_subprotocols(offer: str | None, chosen: str | None) -> None:
    result = shake(
        {"sec-websocket-protocol": offer}, protocols=("statuswire.v2", "statuswire.v1"), echo_prefix="bearer."
    )
    assert result.protocol == chosen
    assert dict(result.headers).get("Sec-WebSocket-Protocol") == chosen
    assert set(result.offered) == {name.strip() for name in (offer or "").split(",")} - {""}


def test_nothing_is_echoed_unasked() -> None:
    result = shake({"sec-websocket-protocol": "bearer.a, bearer.b"})
    assert (result.protocol, result.offered) == (None, ("bearer.a", "bearer.b"))


PLAIN_ANSWER = "permessage-deflate; server_no_context_takeover; client_no_context_takeover"
LIMITED_ANSWER = f"{PLAIN_ANSWER}; server_max_window_bits={WINDOW_BITS}"
SMALL_ANSWER = f"{PLAIN_ANSWER}; server_max_window_bits={SMALL_WINDOW_BITS}"


@pytest.mark.parametrize(
    ("offer", "answer"),
    [
        ("permessage-deflate", PLAIN_ANSWER),
        ("Permessage-Deflate", PLAIN_ANSWER),
        ("permessage-deflate; client_max_window_bits", PLAIN_ANSWER),  # Chrome
        ("permessage-deflate; client_max_window_bits=15; server_max_window_bits=15", LIMITED_ANSWER),  # wsproto
        ("permessage-deflate; server_max_window_bits=12; client_max_window_bits=12", LIMITED_ANSWER),  # websockets
        ("permessage-deflate ;client_max_window_bits = 8 ; server_no_context_takeover", PLAIN_ANSWER),
        ('permessage-deflate; client_max_window_bits="10"', PLAIN_ANSWER),
        ('permessage-deflate; server_max_window_bits="13"', LIMITED_ANSWER),
        ("permessage-deflate; client_no_context_takeover; server_no_context_takeover", PLAIN_ANSWER),
        ("permessage-deflate; CLIENT_NO_CONTEXT_TAKEOVER", PLAIN_ANSWER),
        # The first acceptable one.
        ("permessage-deflate; server_max_window_bits=8, permessage-deflate", PLAIN_ANSWER),
        ("permessage-deflate; server_max_window_bits=9, permessage-deflate", SMALL_ANSWER),
        ("permessage-deflate; server_max_window_bits=10", SMALL_ANSWER),
        ('permessage-deflate; server_no_context_takeover; server_max_window_bits="11"', SMALL_ANSWER),
        ("x-webkit-deflate-frame, permessage-deflate; server_max_window_bits=14, permessage-deflate", LIMITED_ANSWER),
        ('x; a="b, permessage-deflate; x=1", permessage-deflate', PLAIN_ANSWER),
        # Declined: RFC 7692 section 7.
        ("permessage-deflate; client_max_window_bits=abc", None),
        ("permessage-deflate; client_max_window_bits=7", None),
        ("permessage-deflate; client_max_window_bits=16", None),
        ("permessage-deflate; client_max_window_bits=09", None),
        ("permessage-deflate; client_max_window_bits=-8", None),
        ("permessage-deflate; client_max_window_bits=1_0", None),
        ("permessage-deflate; client_max_window_bits=", None),
        ("permessage-deflate; client_max_window_bits=\u0661\u0662", None),
        ("permessage-deflate; server_max_window_bits", None),
        ("permessage-deflate; server_max_window_bits=7", None),
        ("permessage-deflate; server_max_window_bits=8", None),
        ("permessage-deflate; server_max_window_bits=16", None),
        ("permessage-deflate; server_max_window_bits=12; unknown", None),
        ("permessage-deflate; unknown", None),
        ("permessage-deflate; unknown=1; client_max_window_bits", None),
        ("permessage-deflate; client_no_context_takeover=1", None),
        ("permessage-deflate; server_no_context_takeover=true", None),
        ("permessage-deflate; client_max_window_bits; client_max_window_bits=10", None),
        ("permessage-deflate; server_no_context_takeover; Server_No_Context_Takeover", None),
        ("permessage-deflate;", None),
        ("permessage-deflate; =", None),
        ('permessage-deflate; client_max_window_bits="1', None),
        ('permessage-deflate; client_max_window_bits="1\\0"', None),
        ("permessage-deflate-2", None),
        ("x-permessage-deflate", None),
        ("x", None),
        ("", None),
        (",,;", None),
    ],
)
def test_permessage_deflate(offer: str, answer: str | None) -> None:
    result = shake({"sec-websocket-extensions": offer})
    assert dict(result.headers).get("Sec-WebSocket-Extensions") == answer
    assert (result.deflate is None) == (answer is None)
    assert result.deflate is None or result.deflate.header() == answer


def test_permessage_deflate_switched_off() -> None:
    result = shake({"sec-websocket-extensions": "permessage-deflate"}, deflate=False)
    assert result == shake()


@given(st.text(max_size=60), st.text(max_size=30))
def test_odd_lists_are_refused_or_declined_but_never_break(extensions: str, protocols: str) -> None:
    shake({"sec-websocket-extensions": "permessage-deflate" + extensions})
    shake({"sec-websocket-extensions": extensions})
    with contextlib.suppress(ApiError):
        result = shake({"sec-websocket-protocol": protocols}, echo_prefix="")
        assert result.protocol == result.offered[0]


@pytest.mark.parametrize("filler", [",", '"', '",', " ", ";", "permessage-deflate;x,", 'permessage-deflate;a="'])
def test_long_lists_take_linear_time(filler: str) -> None:
    value = "permessage-deflate; a" + filler * (32768 // len(filler))
    start = time.process_time()
    assert shake({"sec-websocket-extensions": value}).deflate is None
    assert time.process_time() - start < 0.5  # a few milliseconds


@pytest.mark.parametrize("extension", [None, PerMessageDeflate(), PerMessageDeflate(server_max_window_bits=12)])
def test_wsprotos_client_takes_our_answer(extension: PerMessageDeflate | None) -> None:
    client = WSConnection(ConnectionType.CLIENT)
    sent = client.send(
        WsprotoRequest(
            host="localhost",
            target="/ws/jobs",
            subprotocols=["bearer.a", "statuswire.v1"],
            extensions=[extension] if extension else [],
        )
    )
    head, *lines = sent.decode().split("\r\n")
    assert head == "GET /ws/jobs HTTP/1.1"
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines if line)}
    result = shake(dict.fromkeys(GOOD) | headers)
    answer = "".join(f"{name}: {value}\r\n" for name, value in result.headers)
    client.receive_data(f"HTTP/1.1 101 Switching Protocols\r\n{answer}\r\n".encode())
    (event,) = client.events()
    assert isinstance(event, AcceptConnection), event
    assert not isinstance(event, RejectConnection)
    assert event.subprotocol == "statuswire.v1"

    # And both ways through it.
    reader = WebSocketReader(result.deflate, MIB)
    words = "status " * 50
    frame = client.send(TextMessage(words))
    assert (len(frame) < len(words)) == (extension is not None)
    assert reader.receive(frame) == [Text(words)]
    client.receive_data((deflated_text_frame if extension else text_frame)(words.encode()))
    assert [event.data for event in client.events() if isinstance(event, TextMessage)] == [words]


# --- incoming frames


def mask(data: bytes, key: bytes) -> bytes:
    return bytes(byte ^ key[index % 4] for index, byte in enumerate(data))


def header(first: int, size: int, key: bytes | None = b"\1\2\3\4") -> bytes:
    masked = 0x80 if key else 0
    if size < 126:
        head = struct.pack("!BB", first, masked | size)
    elif size < 65536:
        head = struct.pack("!BBH", first, masked | 126, size)
    else:
        head = struct.pack("!BBQ", first, masked | 127, size)
    return head + (key or b"")


def frame(first: int, payload: bytes = b"", key: bytes = b"\1\2\3\4") -> bytes:
    return header(first, len(payload), key) + mask(payload, key)


def big_frame(first: int, payload: bytes) -> bytes:
    """Masked with zeros, which masks nothing: quick to make."""
    return header(first, len(payload), bytes(4)) + payload


def deflated(payload: bytes, level: int = 9, memory: int = 8) -> bytes:
    compressor = zlib.compressobj(level, zlib.DEFLATED, -15, memory)
    return (compressor.compress(payload) + compressor.flush(zlib.Z_SYNC_FLUSH))[:-4]


def read(
    chunks: Iterable[bytes], deflate: DeflateParameters | None = None, max_message: int = MIB
) -> tuple[list[Event], int | None]:
    """All events and the code of the failure that ended them, or None."""
    reader = WebSocketReader(deflate, max_message)
    events: list[Event] = []
    for chunk in chunks:
        try:
            events += reader.receive(chunk)
        except WebSocketError as error:
            assert reader.receive(frame(0x81, b"later")) == []
            return events + error.events, error.code
    return events, None


def each_byte(data: bytes) -> Iterable[bytes]:
    return (data[index : index + 1] for index in range(len(data)))


CLIENT_CLOSE = frame(0x88, b"\x03\xe8bye")


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", []),
        (frame(0x81, b"Hello"), [Text("Hello")]),
        (frame(0x81), [Text("")]),
        (frame(0x82, b"\0\xff"), [Binary(b"\0\xff")]),
        (frame(0x82), [Binary(b"")]),
        (frame(0x89, b"p"), [Ping(b"p")]),
        (frame(0x8A), [Pong(b"")]),
        (frame(0x89, bytes(125)), [Ping(bytes(125))]),
        (frame(0x01, b"Hel") + frame(0x80, b"lo"), [Text("Hello")]),
        (frame(0x01) + frame(0x00) + frame(0x80), [Text("")]),
        (frame(0x02, b"a") + frame(0x89, b"p") + frame(0x00) + frame(0x8A) + frame(0x80, b"b"),
         [Ping(b"p"), Pong(b""), Binary(b"ab")]),
        (frame(0x01, b"\xe2\x82") + frame(0x89) + frame(0x80, b"\xac"), [Ping(b""), Text("€")]),
        (frame(0x81, b"x" * 126) + frame(0x81, b"y" * 70000), [Text("x" * 126), Text("y" * 70000)]),
        (CLIENT_CLOSE, [CloseReceived(1000, "bye")]),
        (frame(0x88), [CloseReceived(1005, "")]),
        (frame(0x88, b"\x11\x31"), [CloseReceived(4401, "")]),
        (CLIENT_CLOSE + b"anything" + frame(0x81, b"x"), [CloseReceived(1000, "bye")]),
        (frame(0x01, b"half") + CLIENT_CLOSE, [CloseReceived(1000, "bye")]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("deflate", [None, DEFLATE])
def test_read(data: bytes, expected: list[Event], deflate: DeflateParameters | None) -> None:
    assert read([data], deflate) == (expected, None)
    if len(data) < 1000:
        assert read(each_byte(data), deflate) == (expected, None)


BAD = [
    (header(0x81, 5, None), 1002, "unmasked"),
    (header(0x89, 0, None), 1002, "unmasked"),
    (header(0xA1, 1), 1002, "reserved bit 2"),
    (header(0x91, 1), 1002, "reserved bit 3"),
    (header(0xC9, 1), 1002, "compressed ping"),
    (header(0xC8, 2), 1002, "compressed close"),
    *((header(0x80 | opcode, 0), 1002, f"opcode {opcode}") for opcode in (3, 4, 5, 6, 7, 11, 12, 13, 14, 15)),
    (header(0x80, 1), 1002, "continuation of nothing"),
    (header(0x00, 0), 1002, "continuation of nothing"),
    (frame(0x01, b"a") + header(0x81, 1), 1002, "text within a message"),
    (frame(0x01, b"a") + header(0x02, 1), 1002, "binary within a message"),
    (frame(0x01) + header(0x81, 1), 1002, "text within an empty start"),
    (header(0x09, 0), 1002, "fragmented ping"),
    (header(0x08, 0), 1002, "fragmented close"),
    (header(0x89, 126), 1002, "long ping"),
    (header(0x8A, 1000), 1002, "long pong"),
    (header(0x88, 70000), 1002, "long close"),
    (b"\x81\xfe\x00\x7d", 1002, "125 in 16 bits"),
    (b"\x81\xff" + (65535).to_bytes(8, "big"), 1002, "65535 in 64 bits"),
    (b"\x81\xff" + (1 << 63).to_bytes(8, "big"), 1002, "length with its highest bit"),
    (frame(0x88, b"\x03"), 1002, "close of one byte"),
    *((frame(0x88, code.to_bytes(2, "big")), 1002, f"close code {code}")
      for code in (0, 999, 1004, 1005, 1006, 1015, 1016, 1100, 2000, 2999, 5000, 65535)),
    (frame(0x88, b"\x03\xe8\xff"), 1007, "close reason not UTF-8"),
    (frame(0x81, b"\xff"), 1007, "not UTF-8"),
    (frame(0x81, b"\xc3"), 1007, "UTF-8 cut short"),
    (frame(0x81, b"\xed\xa0\x80"), 1007, "surrogate"),
    (frame(0x01, b"a\xff"), 1007, "not UTF-8 in a fragment"),
    (frame(0x01, b"\xe2\x82") + frame(0x00, b"x"), 1007, "not UTF-8 over two fragments"),
    (header(0x81, 100) + mask(b"ab\xff", b"\1\2\3\4"), 1007, "not UTF-8, frame not complete"),
    (b"\x81\xff" + (1 << 62).to_bytes(8, "big"), 1009, "announced 2**62"),
    (b"\x82\xff" + (MIB + 1).to_bytes(8, "big"), 1009, "announced a byte too many"),
    (frame(0x01, b"a") + b"\x80\xff" + MIB.to_bytes(8, "big"), 1009, "announced too many with what was before"),
]  # fmt: skip


@pytest.mark.parametrize(("data", "code"), [row[:2] for row in BAD], ids=[row[2] for row in BAD])
@pytest.mark.parametrize("deflate", [None, DEFLATE])
def test_bad_frames_fail_at_once(data: bytes, code: int, deflate: DeflateParameters | None) -> None:
    """None of these needs a byte more than it has, and what came before is not lost."""
    good = frame(0x81, b"good") + frame(0x89, b"p")
    expected = ([Text("good"), Ping(b"p")], code)
    assert read([good + data], deflate) == expected
    assert read(each_byte(good + data), deflate) == expected
    assert read([good, data], deflate) == expected


def test_compression_that_was_not_agreed_on() -> None:
    data = frame(0xC1, deflated(b"Hello"))
    assert read([data], DEFLATE) == ([Text("Hello")], None)
    assert read([data], None) == ([], 1002)


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (frame(0xC1, b"\x07"), 1007),  # a reserved block type
        (frame(0xC1, deflated(b"\xff\xff")), 1007),
        (frame(0x41, deflated(b"Hello")) + header(0xC0, 1), 1002),  # only the first frame says so
        (frame(0x01, b"a") + header(0xC0, 1), 1002),
        (header(0xC1, 1 << 62), 1009),
    ],
)
def test_bad_compressed_frames(data: bytes, code: int) -> None:
    assert read([data], DEFLATE) == ([], code)
    assert read(each_byte(data), DEFLATE) == ([], code)


# RFC 7692 section 7.2.3: the same message in all the ways it shows.
@pytest.mark.parametrize(
    "payload",
    [
        "f248cdc9c90700",
        "000500faff48656c6c6f00",  # a stored block
        "f348cdc9c9070000",  # a final block
        "f348cdc9c90700",  # a final block without the byte that should follow it
        "f248050000 00ffff cac9c90700",  # two blocks
    ],
)
def test_ways_to_compress(payload: str) -> None:
    data = bytes.fromhex(payload)
    assert read([frame(0xC1, data)] * 2, DEFLATE) == ([Text("Hello")] * 2, None)
    parts = b"".join(frame(0x00, bytes((byte,))) for byte in data[1:])
    assert read([frame(0x41, data[:1]) + parts + frame(0x80)], DEFLATE) == ([Text("Hello")], None)


@pytest.mark.parametrize("payload", ["f348cdc9c90700f348cdc9c90700", "f348cdc9c90700000000ffff", "f348cdc9c907"])
def test_data_after_a_final_block_is_not_lost_in_silence(payload: str) -> None:
    """Nor is half a final block taken for a whole one."""
    stream = frame(0xC1, bytes.fromhex(payload))
    assert read([stream], DEFLATE) == ([], 1007)
    assert read(each_byte(stream), DEFLATE) == ([], 1007)


def test_a_compressed_message_with_control_frames_in_between() -> None:
    data = deflated(b"Hello, world")
    stream = frame(0x41, data[:4]) + frame(0x89, b"p") + frame(0x00, data[4:7]) + frame(0x8A) + frame(0x80, data[7:])
    expected = ([Ping(b"p"), Pong(b""), Text("Hello, world")], None)
    assert read([stream], DEFLATE) == expected
    assert read(each_byte(stream), DEFLATE) == expected


def test_compressed_and_plain_messages_mix() -> None:
    stream = frame(0xC1, deflated(b"a")) + frame(0x81, b"b") + frame(0xC2, deflated(b"c")) + frame(0xC1, deflated(b""))
    assert read([stream], DEFLATE) == ([Text("a"), Text("b"), Binary(b"c"), Text("")], None)


# --- limits


def test_the_largest_message() -> None:
    exact = "é" * 50
    for stream in (
        frame(0x81, exact.encode()),
        frame(0x01, exact.encode()[:51]) + frame(0x00) + frame(0x80, exact.encode()[51:]),
        frame(0xC1, deflated(exact.encode())),
        frame(0xC1, deflated(exact.encode(), level=0)),
        frame(0x41, deflated(exact.encode())) + frame(0x80),
    ):
        assert read([stream * 3], DEFLATE, 100) == ([Text(exact)] * 3, None)
        assert read([stream], DEFLATE, 99) == ([], 1009)


def test_incompressible_messages_of_the_largest_size_pass_compressed() -> None:
    noise = random.Random(7692).randbytes(100_000)
    for level, memory in ((0, 1), (9, 1), (1, 9)):
        stream = big_frame(0xC2, deflated(noise, level, memory))
        assert len(stream) > len(noise)
        assert read([stream], DEFLATE, len(noise)) == ([Binary(noise)], None)


def test_an_announced_frame_over_the_limit_needs_no_payload() -> None:
    reader = WebSocketReader(None, 1000)
    with pytest.raises(WebSocketError, match="1009 a message of more than 1000 bytes") as caught:
        reader.receive(b"\x81\xfe\x03\xe9")
    assert (caught.value.code, caught.value.reason) == (CloseCode.TOO_BIG, "a message of more than 1000 bytes")


@pytest.mark.parametrize("pieces", [1, 50])
def test_a_bomb_does_not_unfold(pieces: int) -> None:
    bomb = deflated(bytes(64 * MIB))
    assert len(bomb) < MIB // 8
    size = len(bomb) // pieces + 1
    tracemalloc.start()
    try:
        stream = big_frame(0xC2, bomb)
        chunks = [stream[start : start + size] for start in range(0, len(stream), size)]
        assert read(chunks, DEFLATE, MIB) == ([], 1009)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 6 * MIB


def test_a_bomb_in_fragments_does_not_unfold() -> None:
    bomb = deflated(bytes(4 * MIB))
    parts = b"".join(frame(0x00, bytes((byte,))) for byte in bomb[1:])
    assert read([frame(0x42, bomb[:1]) + parts], DEFLATE, MIB) == ([], 1009)


def test_the_flush_at_the_end_counts() -> None:
    """zlib may hold output back until the four bytes that the receiver adds."""
    data = deflated(b"a" * 300)
    for limit in range(295, 300):
        assert read([frame(0xC1, data)], DEFLATE, limit) == ([], 1009)
    assert read([frame(0xC1, data)], DEFLATE, 300) == ([Text("a" * 300)], None)


@pytest.mark.slow
@pytest.mark.parametrize("agreed", [None, DEFLATE])
def test_65536_fragments_take_linear_time(agreed: DeflateParameters | None) -> None:
    part = b"x" * 256
    stream = big_frame(0x01, part) + (big_frame(0x00, part) + big_frame(0x00, b"")) * 65534 + big_frame(0x80, part)
    start = time.process_time()
    events, code = read((stream[i : i + 65536] for i in range(0, len(stream), 65536)), agreed, 16 * MIB)
    # About a second. Copying what there is for every fragment would be 512 GiB of copies.
    assert time.process_time() - start < 15
    assert code is None
    assert events == [Text("x" * 16 * MIB)]


def test_empty_fragments_leave_nothing_behind() -> None:
    reader = WebSocketReader(None, 1000)
    reader.receive(frame(0x01))
    tracemalloc.start()
    try:
        for _ in range(20):
            reader.receive(frame(0x00) * 500)
        assert tracemalloc.get_traced_memory()[0] < 20_000
    finally:
        tracemalloc.stop()
    assert reader.receive(frame(0x80, b"end")) == [Text("end")]


# --- memory


def holds_wsproto(reader: WebSocketReader) -> bool:
    return reader._connection is not None


def test_nothing_is_made_before_the_first_byte_or_kept_after_the_last() -> None:
    reader = WebSocketReader(DEFLATE, MIB)
    assert not hasattr(reader, "__dict__")
    assert reader.receive(b"") == []
    assert not holds_wsproto(reader)
    assert reader.receive(frame(0x81, b"a") + frame(0x81, b"b")) == [Text("a"), Text("b")]
    assert not holds_wsproto(reader)
    assert reader.receive(frame(0x89, b"a")[:-1]) == []
    assert holds_wsproto(reader)
    assert reader.receive(frame(0x89, b"a")[-1:]) == [Ping(b"a")]
    assert not holds_wsproto(reader)
    reader.receive(CLIENT_CLOSE)
    assert not holds_wsproto(reader)
    assert reader.receive(frame(0x81, b"a")) == []


def test_what_is_half_received_is_kept() -> None:
    data = deflated(b"Hello")
    stream = frame(0x41, data[:3]) + frame(0x89, b"p") + frame(0x00) + frame(0x80, data[3:]) + frame(0x81, b"x" * 200)
    reader = WebSocketReader(DEFLATE, MIB)
    events = []
    for byte in each_byte(stream):
        events += reader.receive(byte)
    assert events == [Ping(b"p"), Text("Hello"), Text("x" * 200)]


# --- texts that are all there, which wsproto does not see


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just(0x81), st.text(max_size=140).map(str.encode)),
            st.tuples(st.sampled_from([0x81, 0x01, 0x80, 0x82, 0x89, 0xC1, 0x91]), st.binary(max_size=8)),
        ),
        max_size=5,
    ),
    st.binary(max_size=3),
)
def test_frames_in_one_piece_are_read_as_byte_by_byte(frames: list[tuple[int, bytes]], end: bytes) -> None:
    stream = b"".join(frame(first, payload) for first, payload in frames) + end
    assert read([stream], None, 130) == read(each_byte(stream), None, 130)


@pytest.mark.parametrize("size", [0, 1, 125, 126, 127, 65535, 65536])
def test_texts_of_any_size(size: int) -> None:
    text = ("ä" + "x" * size)[: max(0, size - 1)] if size else ""
    data = frame(0x81, text.encode())
    assert WebSocketReader(None, MIB).receive(data + data) == [Text(text), Text(text)]
    assert WebSocketReader(None, MIB).receive(data[:-1] + data[-1:] + data[:3]) == [Text(text)]


# --- errors


def test_whatever_wsproto_raises_is_the_clients_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no input known that makes wsproto raise here; older releases had some."""

    def broken(*_: object) -> bytes:
        raise ValueError("Window size must be between 9 and 15 inclusive")

    reader = WebSocketReader(DEFLATE, MIB)
    assert reader.receive(frame(0x89)) == [Ping(b"")]
    monkeypatch.setattr(websocket._Intake, "frame_inbound_payload_data", broken)
    with pytest.raises(WebSocketError, match="Window size") as caught:
        reader.receive(frame(0x82, b"a"))
    assert caught.value.code is CloseCode.PROTOCOL_ERROR
    assert isinstance(caught.value.__cause__, ValueError)
    assert reader.receive(frame(0x89)) == []


def test_the_reason_fits_a_close_frame() -> None:
    for data, code, _ in BAD:
        with pytest.raises(WebSocketError) as caught:
            WebSocketReader(None, MIB).receive(data)
        assert caught.value.reason
        assert close_frame(caught.value.code, caught.value.reason)[2:4] == code.to_bytes(2, "big")


@given(st.binary(max_size=200))
def test_garbage_is_refused_or_read_but_never_breaks(data: bytes) -> None:
    assert read([data], None, 100) == read(each_byte(data), None, 100)


@given(st.binary(max_size=60), st.sampled_from([0x41, 0xC1, 0x42, 0xC2]))
def test_compressed_garbage_is_refused_or_read_but_never_breaks(data: bytes, first: int) -> None:
    stream = frame(first, data) + frame(0x80, b"")
    events, code = read([stream], DEFLATE, 100)
    bytewise, bytewise_code = read(each_byte(stream), DEFLATE, 100)
    # What is wrong in several ways (too big, not UTF-8, not deflate) may show another of them first.
    assert (events, code is None) == (bytewise, bytewise_code is None)


# --- the closing handshake


@pytest.mark.parametrize(("code", "reason"), [(1000, "bye"), (1001, ""), (3000, "x"), (4999, "é")])
def test_our_close_answers_with_the_same_code(code: int, reason: str) -> None:
    client = Connection(ConnectionType.CLIENT)
    (event,) = WebSocketReader(None, MIB).receive(client.send(CloseConnection(code, reason)))
    assert event == CloseReceived(code, reason)
    client.receive_data(close_reply(event))
    assert list(client.events()) == [CloseConnection(code, "")]


def test_a_close_without_a_code_is_answered_without_one() -> None:
    assert close_reply(CloseReceived(1005, "")) == b"\x88\x00"


# --- against wsproto's client, in any split

messages = st.lists(
    st.tuples(
        st.text(max_size=100) | st.binary(max_size=100),
        st.lists(st.integers(0, 100), max_size=3).map(sorted),  # where it is cut into fragments
        st.lists(st.sampled_from("PQ"), max_size=2),  # a ping or pong after each fragment
    ),
    max_size=5,
)


def from_client(content: list[tuple[str | bytes, list[int], list[str]]], agreed: bool) -> tuple[bytes, list[Event]]:
    """What wsproto's client sends for these messages, and what we should read."""
    client = Connection(ConnectionType.CLIENT)
    if agreed:
        extension = PerMessageDeflate()
        extension.finalize(PLAIN_ANSWER)
        client = Connection(ConnectionType.CLIENT, [extension])
    stream, expected = b"", list[Event]()
    for message, cuts, controls in content:
        pieces = [message[a:b] for a, b in zip([0, *cuts], [*cuts, len(message)], strict=True)]
        # Cuts beyond the end give pieces that are empty, and the last one must not repeat the start.
        pieces = pieces if cuts == [] or cuts[-1] <= len(message) else [message, *([message[:0]] * len(cuts))]
        for index, piece in enumerate(pieces):
            last = index == len(pieces) - 1
            if isinstance(piece, str):
                stream += client.send(TextMessage(piece, message_finished=last))
            else:
                stream += client.send(BytesMessage(piece, message_finished=last))
            if last:
                expected.append(Text(message) if isinstance(message, str) else Binary(message))
            for control in controls:
                payload = bytes((index,)) * index
                stream += client.send(WsprotoPing(payload) if control == "P" else WsprotoPong(payload))
                expected.append(Ping(payload) if control == "P" else Pong(payload))
    stream += client.send(CloseConnection(1000, "done"))
    return stream, [*expected, CloseReceived(1000, "done")]


@given(messages, st.booleans(), st.data())
def test_any_split_gives_the_events_the_client_sent(
    content: list[tuple[str | bytes, list[int], list[str]]], agreed: bool, draw: st.DataObject
) -> None:
    stream, expected = from_client(content, agreed)
    deflate = DEFLATE if agreed else None
    cuts = sorted(draw.draw(st.lists(st.integers(0, len(stream)), max_size=12)))
    chunks = [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    assert read(chunks, deflate) == (expected, None)
    assert read([stream], deflate) == (expected, None)


def test_the_client_reads_what_we_send() -> None:
    client = Connection(ConnectionType.CLIENT)
    reader = WebSocketReader(None, MIB)
    (ping,) = reader.receive(client.send(WsprotoPing(b"are you there")))
    assert isinstance(ping, Ping)
    client.receive_data(pong_frame(ping.payload) + text_frame("ä".encode()) + close_frame(1001, "2500"))
    assert list(client.events()) == [
        WsprotoPong(b"are you there"),
        TextMessage("ä"),
        CloseConnection(1001, "2500"),
    ]
    assert reader.receive(client.send(CloseConnection(1001))) == [CloseReceived(1001, "")]
