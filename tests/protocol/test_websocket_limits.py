"""How much a WebSocket peer may take: of message sizes, of time, of memory."""

from __future__ import annotations

import random
import time
import tracemalloc

import pytest

from protocol.errors import CloseCode
from protocol.websocket import Binary, DeflateParameters, Ping, Text, WebSocketError, WebSocketReader
from tests.protocol.client_frames import CLIENT_CLOSE, DEFLATE, MIB, big_frame, deflated, each_byte, frame, read

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
