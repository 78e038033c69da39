"""Incoming frames, by table and by property: good ones, bad ones, compressed ones, closes; against wsproto's client."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from wsproto import ConnectionType
from wsproto.connection import Connection
from wsproto.events import BytesMessage, CloseConnection, TextMessage
from wsproto.events import Ping as WsprotoPing
from wsproto.events import Pong as WsprotoPong
from wsproto.extensions import PerMessageDeflate

from protocol import websocket
from protocol.errors import CloseCode
from protocol.frames import close_frame, pong_frame, text_frame
from protocol.websocket import (
    Binary,
    CloseReceived,
    DeflateParameters,
    Event,
    Ping,
    Pong,
    Text,
    WebSocketError,
    WebSocketReader,
    close_reply,
)
from tests.protocol.client_frames import (
    CLIENT_CLOSE,
    DEFLATE,
    MIB,
    PLAIN_ANSWER,
    deflated,
    each_byte,
    frame,
    header,
    mask,
    read,
)


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
