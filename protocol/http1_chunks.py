"""A request's body in chunks (RFC 9112 section 7.1), read to the letter.

Not h11's reader: that one takes a bare CR or a NUL for part of an extension, spaces behind a size, folded trailers, and
says nothing of a size before its data comes. Where a message ends must be what everybody in front takes it to be.
"""

from __future__ import annotations

import re
from enum import Enum, auto
from typing import Final

from protocol.errors import ApiError
from protocol.http1_head import bad_request, body_too_large

# A size and its extensions, which nobody sends.
MAX_SIZE_LINE = 4096
# The smallest legal chunk takes six bytes on the wire for one byte of content. What is far beyond that is not
# content but extensions, which cost us work and never reach a body limit.
_WIRE_BYTES_PER_BYTE = 8
_WIRE_SLACK = 16384

# Nothing in here can match in two ways, and nothing is tried again: linear, whatever is sent.
_TOKEN = rb"[-!#$%&'*+.^_`|~0-9A-Za-z]++"
_QUOTED = rb'"(?:[\t !\x23-\x5b\x5d-\x7e\x80-\xff]|\\[\t -\x7e\x80-\xff])*+"'
_EXTENSION = rb"[ \t]*+;[ \t]*+%b(?:[ \t]*+=[ \t]*+(?:%b|%b))?" % (_TOKEN, _TOKEN, _QUOTED)
# Sixteen digits are 64 bits.
_SIZE_LINE: Final = re.compile(rb"([0-9A-Fa-f]{1,16})(?:%b)*+\r\n" % _EXTENSION)
_TRAILER_LINE: Final = re.compile(rb"%b:[\t -\x7e\x80-\xff]*+\r\n" % _TOKEN)


class _At(Enum):
    SIZE = auto()
    DATA = auto()
    DATA_END = auto()
    TRAILER = auto()


class ChunkedBody:
    """One body. It takes what it has understood from the front of the caller's buffer, and nothing beyond its end.

    Args:
        max_trailer: largest trailer section, in bytes; it is checked and dropped.
    """

    __slots__ = ("_at", "_left", "_max_trailer", "_overhead", "_received", "_searched", "_trailer")

    def __init__(self, max_trailer: int) -> None:
        self._max_trailer = max_trailer
        self._at = _At.SIZE
        self._left = 0  # of the chunk under way
        self._received = 0  # bytes of content
        self._overhead = 0  # bytes of size lines
        self._trailer = 0
        self._searched = 0  # no line ends before this index

    def read(self, buffer: bytearray, limit: int) -> bytes | None:
        """The next piece of content; ``b""`` if more must come first, None at the end.

        Args:
            limit: the most content there may be in all, in bytes.

        Raises:
            ApiError: 400, 431, or 413 as soon as a size says so.
        """
        while True:
            match self._at:
                case _At.SIZE:
                    line = self._line(buffer, MAX_SIZE_LINE, bad_request("a chunk's size is not one line"))
                    if line is None:
                        return b""
                    self._begin_chunk(line, limit)
                case _At.DATA:
                    data = bytes(buffer[: self._left])
                    del buffer[: len(data)]
                    self._left -= len(data)
                    self._received += len(data)
                    if not self._left:
                        self._at = _At.DATA_END
                    return data
                case _At.DATA_END:
                    if not b"\r\n".startswith(buffer[:2]):
                        raise bad_request("a chunk is longer than it says, or does not end in CR LF")
                    if len(buffer) < 2:
                        return b""
                    del buffer[:2]
                    self._at = _At.SIZE
                case _At.TRAILER:
                    too_large = ApiError(431, "header_too_large", "the trailer section is too large")
                    line = self._line(buffer, self._max_trailer - self._trailer, too_large)
                    if line is None:
                        return b""
                    if line == b"\r\n":
                        return None
                    if _TRAILER_LINE.fullmatch(line) is None:
                        raise bad_request("a trailer field is malformed: it must be Name: value and end in CR LF")
                    self._trailer += len(line)

    def _line(self, buffer: bytearray, longest: int, too_long: ApiError) -> bytes | None:
        """Take a line off the buffer, its end included; None if it is not there yet."""
        end = buffer.find(b"\n", self._searched)
        # Judged alike for a part and for the whole, however the bytes were cut.
        if (len(buffer) if end < 0 else end) > longest:
            raise too_long
        if end < 0:
            self._searched = len(buffer)
            return None
        line = bytes(buffer[: end + 1])
        del buffer[: end + 1]
        self._searched = 0
        return line

    def _begin_chunk(self, line: bytes, limit: int) -> None:
        match = _SIZE_LINE.fullmatch(line)
        if match is None:
            raise bad_request("a chunk's size is malformed: it must be hexadecimal digits and CR LF")
        self._overhead += len(line)
        if self._overhead > self._received * _WIRE_BYTES_PER_BYTE + _WIRE_SLACK:
            raise bad_request("the chunked body is nearly all chunk headers")
        self._left = int(match[1], 16)
        if self._received + self._left > limit:
            raise body_too_large(limit)
        self._at = _At.DATA if self._left else _At.TRAILER
