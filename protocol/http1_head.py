"""Heads of HTTP/1.1 messages (RFC 9112): a request's, read strictly; a response's, as bytes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from http import HTTPStatus
from typing import Final

from protocol.errors import ApiError

MAX_HEADERS = 100

# One field and its line end. No whitespace before the colon (RFC 9112 section 5.1); that nothing is passed over shows
# in the number of lines.
_FIELD = re.compile(r"^([-!#$%&'*+.^_`|~0-9A-Za-z]+):[ \t]*+([^\r]*+)\r\n", re.MULTILINE)
# RFC 9110 section 5.5 permits a tab around any value, but not everybody in front takes one for a space.
_TAB_AROUND_FRAMING = re.compile(r"\r\n(?:host|content-length|transfer-encoding):[^\r\t]*\t")
# More digits than this is an exabyte: too large whatever the limit, and never handed to int().
_MAX_LENGTH_DIGITS = 18
# Two of these would leave it to chance which one counts. (Two of the others joined fail their own syntax.)
_SINGLE = frozenset({"authorization", "content-length", "content-type", "host", "origin", "transfer-encoding"})
_STATUS_LINES: Final = {
    status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n"
    for status in HTTPStatus
    if status == 101 or status >= 200
}
_FRAMING = frozenset({"content-length", "transfer-encoding"})
_SPECIAL_LENGTHS = frozenset(map(len, (*_FRAMING, "connection")))


def bad_request(message: str) -> ApiError:
    """400: this is no HTTP."""
    return ApiError(400, "bad_request", message)


def body_too_large(limit: int) -> ApiError:
    """413: more than there may be, in bytes."""
    return ApiError(413, "payload_too_large", f"the body is larger than {limit} bytes")


def check_lines(head: bytes) -> int:
    """How many lines a request head has. Raises ApiError 400 for line ends that not everybody takes for such."""
    # Neither a bare LF for a line end nor obs-fold (RFC 9112 sections 2.2 and 5.2).
    lines = head.count(b"\r\n")
    if head.count(b"\n") != lines or head.count(b"\r") != lines or b"\0" in head:
        raise bad_request("lines of a request head end in CR LF, and CR, LF and NUL appear nowhere else")
    if b"\r\n " in head or b"\r\n\t" in head:
        raise bad_request("a header field must not be continued on a second line")
    return lines


def read_fields(head: str, start: int, count: int) -> dict[str, str]:
    """The fields of a request head whose lines are in order, checked (RFC 9110 section 5, RFC 9112 sections 5 and 6).

    Args:
        head: all of it, as Latin-1.
        start: where its first field begins.
        count: how many there must be.

    Returns:
        Values by lower-case name; repeated ones joined.

    Raises:
        ApiError: 400, 413, 431, 501.
    """
    if count > MAX_HEADERS:
        raise ApiError(431, "header_too_large", f"there are more than {MAX_HEADERS} header fields")
    found = _FIELD.findall(head, start)
    if len(found) != count or "\v" in head or "\f" in head:
        raise bad_request("a header field is malformed: it must be Name: value")
    if "\t" in head and _TAB_AROUND_FRAMING.search(head.lower()):
        raise bad_request("there must be no tab in Host, Content-Length and Transfer-Encoding")
    headers: dict[str, str] = {}
    for raw_name, value in found:
        name = raw_name.lower()
        value = value.rstrip(" \t")
        if name in headers:
            if name in _SINGLE:
                raise _repeated(name)
            value = f"{headers[name]}{'; ' if name == 'cookie' else ', '}{value}"
        headers[name] = value
    length = headers.get("content-length")
    if length is not None:
        if not (length.isascii() and length.isdigit()):
            raise bad_request("Content-Length must be one decimal number, given once")
        if len(length) > _MAX_LENGTH_DIGITS:
            raise ApiError(413, "payload_too_large", "the announced body is too large")
    if headers.get("transfer-encoding", "chunked").lower() != "chunked":
        raise _unknown_coding()
    return headers


def _repeated(name: str) -> ApiError:
    # Several equal lengths may be taken for one (RFC 9110 section 8.6), but need not be.
    if name == "content-length":
        return bad_request("Content-Length must be one decimal number, given once")
    if name == "transfer-encoding":
        return _unknown_coding()
    return bad_request(f"the header {name} must not be repeated")


def _unknown_coding() -> ApiError:
    return ApiError(501, "not_supported", "chunked is the only Transfer-Encoding possible here, once")


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
        if len(name) in _SPECIAL_LENGTHS:
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
