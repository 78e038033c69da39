"""Frames built directly equal wsproto's, and wsproto's client reads them."""

from __future__ import annotations

import random
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from wsproto.connection import Connection, ConnectionType
from wsproto.events import BytesMessage, CloseConnection, Message, Ping, Pong, TextMessage
from wsproto.extensions import PerMessageDeflate
from wsproto.frame_protocol import CloseReason

from protocol.errors import CloseCode
from protocol.frames import (
    MAX_CONTROL,
    SMALL_WINDOW_BITS,
    WINDOW_BITS,
    binary_frame,
    close_frame,
    deflated_text_frame,
    ping_frame,
    pong_frame,
    text_frame,
)

SIZES = [0, 1, 125, 126, 127, 65535, 65536, 70000]


def server() -> Connection:
    return Connection(ConnectionType.SERVER)


def deflate_client(window_bits: int) -> Connection:
    extension = PerMessageDeflate()
    extension.finalize(
        f"permessage-deflate; server_no_context_takeover; client_no_context_takeover; "
        f"server_max_window_bits={window_bits}"
    )
    return Connection(ConnectionType.CLIENT, [extension])


def read_text(client: Connection, data: bytes) -> list[str]:
    client.receive_data(data)
    messages, parts = [], []
    for event in client.events():
        assert isinstance(event, TextMessage)
        parts.append(event.data)
        if event.message_finished:
            messages.append("".join(parts))
            parts = []
    assert not parts
    return messages


@pytest.mark.parametrize("size", SIZES)
def test_data_frames_equal_wsprotos(size: int) -> None:
    text = "x" * size
    assert text_frame(text.encode()) == server().send(TextMessage(text))
    assert binary_frame(text.encode()) == server().send(BytesMessage(text.encode()))


@given(st.text(max_size=300))
def test_text_frame_equals_wsprotos(text: str) -> None:
    assert text_frame(text.encode()) == server().send(TextMessage(text))


@given(st.binary(max_size=300))
def test_binary_frame_equals_wsprotos(data: bytes) -> None:
    assert binary_frame(data) == server().send(BytesMessage(data))


@given(st.binary(max_size=MAX_CONTROL))
def test_ping_and_pong_equal_wsprotos(payload: bytes) -> None:
    assert ping_frame(payload) == server().send(Ping(payload))
    assert pong_frame(payload) == server().send(Pong(payload))


def test_empty_ping_and_pong() -> None:
    assert ping_frame() == b"\x89\x00"
    assert pong_frame() == b"\x8a\x00"


@pytest.mark.parametrize("make", [ping_frame, pong_frame])
def test_control_frames_over_125_bytes_are_refused(make: object) -> None:
    assert callable(make)
    with pytest.raises(ValueError, match="at most 125 bytes, not 126"):
        make(bytes(126))


@given(st.sampled_from([*CloseCode, 3000, 4999]), st.text(max_size=200))
def test_close_frame_equals_wsprotos(code: int, reason: str) -> None:
    frame = close_frame(code, reason)
    assert frame == server().send(CloseConnection(code, reason))
    assert len(frame) <= 2 + MAX_CONTROL


def test_close_frame_cuts_the_reason_between_characters() -> None:
    assert close_frame(1000, "é" * 100) == b"\x88\x7c\x03\xe8" + "é".encode() * 61
    assert close_frame(1000, "a" + "é" * 100) == b"\x88\x7d\x03\xe8" + b"a" + "é".encode() * 61
    assert close_frame(1000, "x" * 123) == b"\x88\x7d\x03\xe8" + b"x" * 123
    assert close_frame(1000, "x" * 124) == close_frame(1000, "x" * 123)


@pytest.mark.parametrize("code", [None, 1005])
def test_close_frame_without_a_code(code: int | None) -> None:
    assert close_frame(code) == b"\x88\x00" == server().send(CloseConnection(CloseReason.NO_STATUS_RCVD))


def test_close_frame_with_a_lone_surrogate_in_the_reason() -> None:
    assert close_frame(1008, "a\udc80") == b"\x88\x04\x03\xf0a?"


@pytest.mark.parametrize("code", [0, 999, 1004, 1006, 1015, 5000, 70000])
def test_codes_that_must_not_be_sent(code: int) -> None:
    with pytest.raises(ValueError, match=f"{code} must not be sent"):
        close_frame(code)


def test_a_reason_needs_a_code() -> None:
    with pytest.raises(ValueError, match="needs a close code"):
        close_frame(None, "why")


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("window_bits", [WINDOW_BITS, 15])
def test_deflated_frames_are_read_by_wsproto(size: int, window_bits: int) -> None:
    text = "".join(chr(32 + (i * i + i // 7) % 900) for i in range(size))
    assert read_text(deflate_client(window_bits), deflated_text_frame(text.encode())) == [text]
    assert read_text(deflate_client(window_bits), deflated_text_frame(text.encode(), SMALL_WINDOW_BITS)) == [text]


def test_a_window_is_kept_to() -> None:
    # What repeats only at a distance of 2,000 bytes is out of a small window's sight.
    text = random.Random(1).randbytes(1000).hex() * 10
    frames = {bits: deflated_text_frame(text.encode(), bits) for bits in (SMALL_WINDOW_BITS, WINDOW_BITS)}
    assert len(frames[SMALL_WINDOW_BITS]) > 3 * len(frames[WINDOW_BITS])
    for bits, frame in frames.items():
        # zlib's inflate refuses what reaches back further than its window.
        payload = frame[4:] + b"\x00\x00\xff\xff"
        assert zlib.decompressobj(-bits).decompress(payload) == text.encode()


@given(st.lists(st.text(max_size=200), max_size=5))
def test_deflated_frames_stand_alone(texts: list[str]) -> None:
    """Any mix in any order, compressed or not: the receiver keeps no context between them."""
    frames = [deflated_text_frame(text.encode()) for text in texts] + [text_frame(text.encode()) for text in texts]
    assert read_text(deflate_client(WINDOW_BITS), b"".join(reversed(frames))) == [*reversed(texts)] * 2


def test_deflated_frame_of_a_known_text() -> None:
    assert deflated_text_frame(b"Hello") == bytes.fromhex("c107f248cdc9c90700")  # RFC 7692 section 7.2.3.1
    assert deflated_text_frame(b"") == bytes.fromhex("c10100")  # RFC 7692 section 7.2.3.6


def test_deflated_frame_is_smaller() -> None:
    payload = b'{"type":"status_update","jobId":"job_1","status":"processing","progress":45}' * 5
    assert len(deflated_text_frame(payload)) < len(payload) / 3


def test_wsprotos_compressed_frame_is_the_same_message() -> None:
    extension = PerMessageDeflate(server_no_context_takeover=True, server_max_window_bits=WINDOW_BITS)
    extension.finalize("permessage-deflate")
    message: Message[str] = TextMessage("status " * 100)
    theirs = Connection(ConnectionType.SERVER, [extension]).send(message)
    ours = deflated_text_frame(message.data.encode())
    assert theirs[0] == ours[0] == 0xC1
    assert read_text(deflate_client(WINDOW_BITS), theirs + ours) == [message.data] * 2
