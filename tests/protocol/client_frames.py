"""Frames as clients send them, and what a reader makes of them."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable

from protocol.websocket import DeflateParameters, Event, WebSocketError, WebSocketReader

MIB = 1024 * 1024
DEFLATE = DeflateParameters()
PLAIN_ANSWER = "permessage-deflate; server_no_context_takeover; client_no_context_takeover"


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
