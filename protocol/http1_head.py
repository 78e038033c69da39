"""Heads of HTTP/1.1 messages (RFC 9112): a request's, checked before and after h11; a response's, as bytes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from http import HTTPStatus
from typing import Final

import h11

from protocol.errors import ApiError

MAX_HEADERS = 100

_CONTENT_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*([^\r]*)")
# RFC 9110 section 5.5 permits a tab around any value, but not everybody in front takes one for a space.
_TAB_AROUND_FRAMING = re.compile(rb"\r\n(?:host|content-length|transfer-encoding):[^\r\t]*\t")
# More digits than this is an exabyte: too large whatever the limit, and never handed to int().
_MAX_LENGTH_DIGITS = 18
# Two of these would leave it to chance which one counts. (Two of the others joined fail their own syntax.)
_SINGLE = frozenset({"authorization", "content-type", "origin"})
_STATUS_LINES: Final = {
    status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n"
    for status in HTTPStatus
    if status == 101 or status >= 200
}
_FRAMING = frozenset({"content-length", "transfer-encoding"})


def bad_request(message: str) -> ApiError:
    """400: this is no HTTP."""
    return ApiError(400, "bad_request", message)


def body_too_large(limit: int) -> ApiError:
    """413: more than there may be, in bytes."""
    return ApiError(413, "payload_too_large", f"the body is larger than {limit} bytes")


def check_lines(head: bytes) -> int:
    """How many lines a request head has. Raises ApiError 400 for line ends that h11 would take and others would not."""
    # h11 would take a bare LF for a line end and unfold obs-fold (RFC 9112 sections 2.2 and 5.2).
    lines = head.count(b"\r\n")
    if head.count(b"\n") != lines or head.count(b"\r") != lines or b"\0" in head:
        raise bad_request("lines of a request head end in CR LF, and CR, LF and NUL appear nowhere else")
    if b"\r\n " in head or b"\r\n\t" in head:
        raise bad_request("a header field must not be continued on a second line")
    return lines


def check_fields(head: bytes, count: int) -> None:
    """Check the fields of a head before h11 does. Raises ApiError 400, 413, 431."""
    if count > MAX_HEADERS:
        raise ApiError(431, "header_too_large", f"there are more than {MAX_HEADERS} header fields")
    lower = head.lower()
    if b"\t" in lower and _TAB_AROUND_FRAMING.search(lower):
        raise bad_request("there must be no tab in Host, Content-Length and Transfer-Encoding")
    lengths = _CONTENT_LENGTH.findall(lower)
    if lengths:
        _check_content_length(lengths)


def _check_content_length(values: list[bytes]) -> None:
    # h11 takes several equal ones for one (RFC 9110 section 8.6 permits it, but does not demand it).
    value = values[0].rstrip(b" \t")
    if len(values) > 1 or not value.isdigit():
        raise bad_request("Content-Length must be one decimal number, given once")
    if len(value) > _MAX_LENGTH_DIGITS:
        raise ApiError(413, "payload_too_large", "the announced body is too large")


def read_headers(parser: h11.Connection, head: bytes) -> dict[str, str]:
    """Let h11 read the head; lower-case names, Latin-1 values."""
    parser.receive_data(head)
    try:
        parsed = parser.next_event()
    except h11.RemoteProtocolError as error:
        if error.error_status_hint == 501:
            message = "chunked is the only Transfer-Encoding possible here, once"
            raise ApiError(501, "not_supported", message) from error
        # h11 quotes a malformed line: that could be somebody's token, and messages are logged.
        text = str(error)
        message = "a header field is malformed: it must be Name: value" if text.startswith("illegal") else text
        raise bad_request(message) from error
    assert isinstance(parsed, h11.Request)
    headers: dict[str, str] = {}
    for raw_name, raw_value in parsed.headers:
        name, value = raw_name.decode("ascii"), raw_value.decode("latin-1")
        if name in headers:
            if name in _SINGLE:
                raise bad_request(f"the header {name} must not be repeated")
            value = f"{headers[name]}{'; ' if name == 'cookie' else ', '}{value}"
        headers[name] = value
    return headers


def encode_head(status: int, headers: Sequence[tuple[str, str]], connection: list[str], framing: str = "") -> bytes:
    """A response head. One line per header, counted: a header that brings its own line end is found out (section 11.1).

    Raises:
        ValueError: see ``HttpConnection.respond``.
    """
    status_line = _STATUS_LINES.get(status)
    if status_line is None:
        raise ValueError(f"{status} is not a final status")
    lines = [status_line]
    for name, value in headers:
        lower = name.lower()
        if lower == "connection":
            connection = [value, *connection]
            continue
        if lower in _FRAMING:
            raise ValueError(f"{name} is set by the connection itself")
        lines.append(f"{name}: {value}\r\n")
    if connection:
        lines.append(f"Connection: {', '.join(connection)}\r\n")
    expected = len(lines)
    if framing:
        lines.append(framing)
        expected += 1
    text = "".join(lines)
    if text.count("\r") != expected or text.count("\n") != expected or "\0" in text:
        raise ValueError("a response header contains CR, LF or NUL")
    return f"{text}\r\n".encode("latin-1")
