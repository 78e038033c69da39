"""The server side of one HTTP/1.1 connection (RFC 9112): bytes in, events out; answers in, bytes out.

A head is read strictly by ``protocol.http1_head``, chunks by ``protocol.http1_chunks``; what fails is answered once and
the connection closed, never guessed at. Where smuggling begins, with a body in chunks, h11 reads the head as well, and
what it does not take is refused.

One cycle: ``next_event`` gives a ``Request``, its ``BodyData`` pieces and ``EndOfBody``; then one ``respond``, or
``start_stream``, ``stream_chunk`` …, ``end_stream``; then ``next_request``. An ``ApiError`` out of ``next_event`` or
``limit_body`` can still be answered with ``respond``, which then says ``Connection: close``.

Measured on CPython 3.11 on a shared core, a GET with six headers and a 100-byte answer: 9.4 µs per cycle, 7.2 of them
the head. With every head read by a fresh ``h11.Connection`` it was 42 and 37.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Final

import h11

from protocol.errors import ApiError
from protocol.http1_chunks import ChunkedBody
from protocol.http1_head import bad_request, body_too_large, check_lines, encode_head, read_fields
from protocol.request import Request, parse_target, valid_authority

# A thousand job ids of 36 characters in a query, with their commas percent-encoded, are 39 KiB.
MAX_REQUEST_LINE = 65536
# nginx and Node take 16 to 32 KiB; big cookies are the usual reason to need that much.
MAX_HEADER_SECTION = 32768
# A header section of at most this is remembered: so much more an idle connection may take.
MAX_KNOWN = 2048
# Holds until the caller names a limit of its own with ``limit_body``.
DEFAULT_BODY_LIMIT = 1024 * 1024
# RFC 9112 section 2.2: at least one empty line before a request line is skipped; old clients send one after a body.
_MAX_EMPTY_LINES = 2

CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"
LAST_CHUNK: Final = b"0\r\n\r\n"

_HEAD_END = re.compile(rb"\n\r?\n")
_REQUEST_LINE = re.compile(rb"([-!#$%&'*+.^_`|~0-9A-Za-z]+) ([\x21-\x7e]+) HTTP/([0-9]+)(?:\.([0-9]+))?")
_METHOD_START = frozenset(b"-!#$%&'*+.^_`|~0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz")
_BODILESS = frozenset({204, 304})


@dataclass(frozen=True, slots=True)
class BodyData:
    """A piece of the request's body; where it was cut means nothing."""

    data: bytes


@dataclass(frozen=True, slots=True)
class EndOfBody:
    """The request is complete: answer it."""


@dataclass(frozen=True, slots=True)
class NeedData:
    """Nothing more to say before ``receive`` is called again."""


@dataclass(frozen=True, slots=True)
class Paused:
    """The request is complete and bytes of the next one wait: stop reading until ``next_request``."""


@dataclass(frozen=True, slots=True)
class PeerClosed:
    """The peer has stopped sending. In the middle of a request there is nothing to answer."""


Event = Request | BodyData | EndOfBody | NeedData | Paused | PeerClosed

END_OF_BODY: Final = EndOfBody()
NEED_DATA: Final = NeedData()
PAUSED: Final = Paused()
PEER_CLOSED: Final = PeerClosed()


class _Reading(Enum):
    """Where we are in what the peer sends."""

    HEAD = auto()
    LENGTH = auto()  # in a body of known length, zero included
    CHUNKED = auto()
    COMPLETE = auto()
    FAILED = auto()  # never read again: where the next message begins is unknown
    SWITCHED = auto()  # another protocol has taken over


class _Answer(Enum):
    """Where we are in what we send."""

    PENDING = auto()
    STREAMING = auto()
    SENT = auto()


class HttpConnection:
    """One connection; see the module for the cycle.

    Calls out of order are bugs of the caller and raise RuntimeError.

    Args:
        max_line: longest request line, in bytes; beyond it 414.
        max_head: largest header section after it, in bytes; beyond it 431.

    Attributes:
        chunked: the stream under way is framed in chunks; then ``encode_chunk`` frames may be written as they are.
    """

    __slots__ = (
        "_answer",
        "_body_limit",
        "_buffer",
        "_chunks",
        "_empty_lines",
        "_eof",
        "_error",
        "_expects_continue",
        "_http_10",
        "_keep_alive",
        "_known",
        "_max_head",
        "_max_line",
        "_method",
        "_no_body",
        "_reading",
        "_received",
        "_remaining",
        "_searched",
        "chunked",
    )

    def __init__(self, *, max_line: int = MAX_REQUEST_LINE, max_head: int = MAX_HEADER_SECTION) -> None:
        self._max_line = max_line
        self._max_head = max_head
        self._buffer = bytearray()
        self._eof = False
        # The last header section and what it said: most clients send the same with every request.
        self._known: tuple[bytes, dict[str, str]] | None = None
        self._reset()

    def _reset(self) -> None:
        self._reading = _Reading.HEAD
        self._answer = _Answer.PENDING
        self._empty_lines = 0
        self._searched = 0  # no head ends before this index
        self._error: ApiError | None = None
        self._method = ""
        self._http_10 = False
        # Until a whole head is understood there is no telling where a next request would begin.
        self._keep_alive = False
        self._expects_continue = False
        self._body_limit = DEFAULT_BODY_LIMIT
        self._remaining = 0
        self._received = 0  # bytes of a body of known length
        self._chunks: ChunkedBody | None = None
        self._no_body = False
        self.chunked = False

    # What the peer sends

    def receive(self, data: bytes) -> None:
        """Take in what was read; ``b""`` means the peer has stopped sending (half-close)."""
        if not data:
            self._eof = True
        elif self._reading is not _Reading.FAILED:
            self._buffer += data

    def next_event(self) -> Event:
        """The next thing the peer said.

        After ``EndOfBody`` it gives ``NeedData``, ``Paused`` or ``PeerClosed`` until ``next_request``: a stream under
        way can so watch for the peer's leaving.

        Raises:
            ApiError: the request is bad (400, 405, 413, 414, 417, 431, 501, 505). Raised again by every later call;
                answer it with ``respond`` and close.
        """
        if self._error is not None:
            raise self._error
        try:
            match self._reading:
                case _Reading.HEAD:
                    return self._next_in_head()
                case _Reading.LENGTH:
                    return self._next_in_length()
                case _Reading.CHUNKED:
                    return self._next_in_chunked()
                case _:
                    if self._buffer:
                        return PAUSED
                    return PEER_CLOSED if self._eof else NEED_DATA
        except ApiError as error:
            self._fail(error)
            raise

    def _fail(self, error: ApiError) -> None:
        self._error = error
        self._reading = _Reading.FAILED
        self._keep_alive = False
        self._expects_continue = False
        self._chunks = None
        self._buffer.clear()

    def _waiting(self) -> NeedData | PeerClosed:
        return PEER_CLOSED if self._eof else NEED_DATA

    def _next_in_head(self) -> Request | NeedData | PeerClosed:
        buffer = self._buffer
        while buffer.startswith(b"\r\n") and self._empty_lines < _MAX_EMPTY_LINES:
            del buffer[:2]
            self._empty_lines += 1
        if not buffer or buffer == b"\r":
            return self._waiting()
        if buffer[0] not in _METHOD_START:
            # 0x16 opens a TLS handshake. Said at once, for such a peer may never send a line end.
            hint = "; this port speaks plain HTTP, not TLS" if buffer[0] == 0x16 else ""
            raise bad_request(f"a request begins with a method{hint}")
        end = _HEAD_END.search(buffer, self._searched)
        length = end.end() if end else len(buffer)
        # All limits are judged in the same way for a part and for the whole, so that it never matters how the
        # bytes were cut on their way here.
        line_end = buffer.find(b"\n", 0, length)
        if (line_end if line_end >= 0 else length) > self._max_line:
            raise ApiError(414, "uri_too_long", f"the request line is longer than {self._max_line} bytes")
        if line_end >= 0 and length - line_end > self._max_head:
            raise ApiError(431, "header_too_large", f"the header section is larger than {self._max_head} bytes")
        if end is None:
            self._searched = max(0, length - 2)
            return self._waiting()
        head = bytes(buffer[:length])
        del buffer[:length]
        return self._parse_head(head)

    def _parse_head(self, head: bytes) -> Request:
        end = head.find(b"\r\n")
        line, section, known = head[:end], head[end:], self._known
        if known is not None and section == known[0] and b"\n" not in line and b"\r" not in line and b"\0" not in line:
            method, target = self._parse_request_line(line)
            headers = known[1]
        else:
            lines = check_lines(head)
            method, target = self._parse_request_line(line)
            headers = read_fields(head.decode("latin-1"), end + 2, lines - 2)
            self._known = (section, headers) if len(section) <= MAX_KNOWN else None
        self._check_framing(headers, head)
        path, authority = parse_target(method, target)
        if authority is not None:
            # RFC 9112 section 3.2.2: the absolute-form's host replaces what Host says.
            headers = headers | {"host": authority}
        self._keep_alive = self._wants_keep_alive(headers)
        return Request(method, target, path, None, headers, "1.0" if self._http_10 else "1.1")

    def _parse_request_line(self, line: bytes) -> tuple[str, str]:
        match = _REQUEST_LINE.fullmatch(line)
        if match is None:
            if not line.isascii():
                raise bad_request("the request line must be ASCII: percent-encode other characters as UTF-8")
            raise bad_request("the request line is malformed: it must be METHOD SP target SP HTTP/1.1")
        method, target, major, minor = match.groups()
        # Known from here on even if the rest is refused: the answer to a bad HEAD has no body either.
        self._method = method.decode("ascii")
        if major != b"1":
            raise ApiError(505, "http_version_not_supported", "this server speaks HTTP/1.1 and HTTP/1.0")
        if minor is None or len(minor) != 1:
            raise bad_request("the HTTP version is malformed: it must be HTTP/1.1 or HTTP/1.0")
        self._http_10 = minor == b"0"
        return self._method, target.decode("ascii")

    def _check_framing(self, headers: dict[str, str], head: bytes) -> None:
        host = headers.get("host")
        if host is None:
            if not self._http_10:
                raise bad_request("an HTTP/1.1 request needs a Host header")
        elif not valid_authority(host):
            raise bad_request("the Host header is malformed: it must be host or host:port")
        if "transfer-encoding" in headers:
            # RFC 9112 section 6.1: both together "ought to be handled as an error", and the connection closed; in
            # HTTP/1.0 a Transfer-Encoding means faulty framing.
            if "content-length" in headers:
                raise bad_request("Transfer-Encoding and Content-Length exclude each other")
            if self._http_10:
                raise bad_request("HTTP/1.0 has no Transfer-Encoding")
            self._reading = _Reading.CHUNKED
            _second_opinion(head)
            self._chunks = ChunkedBody(self._max_head)
        else:
            self._reading = _Reading.LENGTH
            self._remaining = int(headers.get("content-length", "0"))
        expect = headers.get("expect")
        # RFC 9110 section 10.1.1: HTTP/1.0 never gets a 100.
        if expect is not None and not self._http_10:
            if expect.lower() != "100-continue":
                raise ApiError(417, "expectation_failed", "the only expectation known here is 100-continue")
            self._expects_continue = self._remaining > 0 or self._chunks is not None

    def _wants_keep_alive(self, headers: dict[str, str]) -> bool:
        # RFC 9112 section 9.3
        connection = headers.get("connection")
        if connection is None:
            return not self._http_10
        options = [option.strip(" \t") for option in connection.lower().split(",")]
        if "close" in options:
            return False
        return not self._http_10 or "keep-alive" in options

    def limit_body(self, limit: int) -> None:
        """Set the largest acceptable body of this request, in bytes; call it right after the ``Request``.

        Raises:
            ApiError: 413 ``payload_too_large`` at once if a larger body was announced; a chunked one as it is read.
        """
        if self._reading not in (_Reading.LENGTH, _Reading.CHUNKED, _Reading.COMPLETE):
            raise RuntimeError("there is no request whose body could be limited")
        self._body_limit = limit
        try:
            self._check_announced()
        except ApiError as error:
            self._fail(error)
            raise

    def _check_announced(self) -> None:
        if self._reading is _Reading.LENGTH and self._remaining > self._body_limit:
            raise body_too_large(self._body_limit)

    def _next_in_length(self) -> BodyData | EndOfBody | NeedData | PeerClosed:
        if self._remaining == 0:
            self._reading = _Reading.COMPLETE
            return END_OF_BODY
        if not self._received:
            self._check_announced()
        buffer = self._buffer
        if not buffer:
            return self._waiting()
        data = bytes(buffer[: self._remaining])
        del buffer[: len(data)]
        self._remaining -= len(data)
        self._received += len(data)
        self._expects_continue = False
        return BodyData(data)

    def _next_in_chunked(self) -> BodyData | EndOfBody | NeedData | PeerClosed:
        assert self._chunks is not None
        if self._buffer:
            self._expects_continue = False
        data = self._chunks.read(self._buffer, self._body_limit)
        if data is None:
            self._reading = _Reading.COMPLETE
            self._chunks = None
            return END_OF_BODY
        return BodyData(data) if data else self._waiting()

    @property
    def expects_continue(self) -> bool:
        """Whether the peer waits for ``100 Continue`` before it sends its body (RFC 9110 section 10.1.1)."""
        return self._expects_continue and not self._buffer and not self._eof

    @property
    def begun(self) -> bool:
        """Between two requests: whether bytes of the next one have come already."""
        return bool(self._buffer)

    @property
    def pending(self) -> bool:
        """Whether nothing of an answer has been sent to the request under way."""
        return self._answer is _Answer.PENDING

    def send_continue(self) -> bytes:
        """The interim answer that asks for the body; ``b""`` if nobody waits for it."""
        if not self.expects_continue or self._answer is not _Answer.PENDING:
            return b""
        self._expects_continue = False
        return CONTINUE

    # What we answer

    def respond(
        self, status: int, headers: Sequence[tuple[str, str]], body: bytes = b"", *, close: bool = False
    ) -> bytes:
        """The whole answer, to be sent in one piece.

        Adds ``Content-Length`` and, where it says something, ``Connection``; ``Date`` is the caller's. The body of an
        answer to HEAD is left out but counted; 204 and 304 have none. 101 hands the connection to another protocol:
        go on with ``hand_over``. Without a request (a timeout, a full server) the answer announces the close.

        Args:
            status: a final status, or 101.
            headers: pairs without framing headers; a ``Connection`` among them is merged with ours.
            body: what a GET would get.
            close: announce the end of the connection although it could go on.

        Raises:
            ValueError: a header with CR, LF, NUL or characters outside Latin-1, or a framing header.
        """
        self._check_pending()
        if status == 101:
            if not self._is_complete() or self._http_10:
                raise RuntimeError("only a complete HTTP/1.1 request can switch protocols")
            wire = encode_head(101, headers, [])
            self._reading = _Reading.SWITCHED
            self._answer = _Answer.SENT
            return wire
        extra = self._connection_options(close)
        if status in _BODILESS:
            wire = encode_head(status, headers, extra)
        else:
            wire = encode_head(status, headers, extra, f"Content-Length: {len(body)}\r\n")
            if self._method != "HEAD":
                wire += body
        self._answer = _Answer.SENT
        return wire

    def start_stream(self, status: int, headers: Sequence[tuple[str, str]], *, close: bool = False) -> bytes:
        """The head of an answer of unknown length: chunked, or until the close for HTTP/1.0 (RFC 9112 section 6.3).

        Takes and raises the same as ``respond``. For HEAD, 204 and 304 the rest of the stream is empty.
        """
        self._check_pending()
        if status < 200:
            raise ValueError(f"{status} is not a final status")
        self._no_body = self._method == "HEAD" or status in _BODILESS
        chunked = not self._http_10 and status not in _BODILESS
        # Only the close ends a stream to HTTP/1.0.
        extra = self._connection_options(close or (self._http_10 and not self._no_body))
        wire = encode_head(status, headers, extra, "Transfer-Encoding: chunked\r\n" if chunked else "")
        self.chunked = chunked and not self._no_body
        self._answer = _Answer.STREAMING
        return wire

    def stream_chunk(self, data: bytes) -> bytes:
        """The bytes that carry ``data``; empty for empty data, since an empty chunk would end the stream."""
        if self._answer is not _Answer.STREAMING:
            raise RuntimeError("no stream is under way")
        if self._no_body:
            return b""
        return encode_chunk(data) if self.chunked else data

    def end_stream(self) -> bytes:
        """The bytes that end the stream; none if the close does."""
        if self._answer is not _Answer.STREAMING:
            raise RuntimeError("no stream is under way")
        self._answer = _Answer.SENT
        return LAST_CHUNK if self.chunked else b""

    def _check_pending(self) -> None:
        if self._answer is not _Answer.PENDING:
            raise RuntimeError("this request has its answer already")

    def _is_complete(self) -> bool:
        """Whether the whole request was read; one without a body is so before ``EndOfBody`` was asked for."""
        return self._reading is _Reading.COMPLETE or (self._reading is _Reading.LENGTH and self._remaining == 0)

    def _connection_options(self, close: bool) -> list[str]:
        """Decide whether the connection goes on, and say so (RFC 9112 section 9.6)."""
        # After a half-close only what was pipelined before it is still to be answered.
        if close or not self._is_complete() or (self._eof and not self._buffer):
            self._keep_alive = False
        if not self._keep_alive:
            return ["close"]
        return ["keep-alive"] if self._http_10 else []

    def next_request(self) -> bool:
        """Whether the connection goes on, and if so, make ready for the next request; False: close it.

        What was received beyond the request is kept, in order; after a ``Connection: close`` it is dropped.
        """
        if self._answer is not _Answer.SENT or self._reading is _Reading.SWITCHED:
            raise RuntimeError("the answer is not complete")
        if not self._keep_alive:
            self._buffer.clear()
            return False
        self._reset()
        return True

    def hand_over(self) -> bytes:
        """After a 101: what was received beyond the request, the first bytes of the other protocol."""
        if self._reading is not _Reading.SWITCHED:
            raise RuntimeError("the connection was not switched to another protocol")
        data = bytes(self._buffer)
        self._buffer.clear()
        return data


def encode_chunk(data: bytes) -> bytes:
    """One chunk (RFC 9112 section 7.1): depends on the data only, so many streams can share it. Empty for no data."""
    return b"%x\r\n%b\r\n" % (len(data), data) if data else b""


def _second_opinion(head: bytes) -> None:
    """Have h11 read a head. Raises ApiError 400 if it does not take it."""
    parser = h11.Connection(h11.SERVER, len(head))
    parser.receive_data(head)
    try:
        parser.next_event()
    except h11.RemoteProtocolError as error:
        raise bad_request("the head is not well-formed") from error
