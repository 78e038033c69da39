"""One parsed request: target, query, headers, cookies. What it asks for is decided elsewhere."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from urllib.parse import unquote

from protocol.errors import ApiError, invalid_parameter

# No call of ours takes more than a dozen; each one costs a dict entry and two decodings.
MAX_PARAMETERS = 100

_NO_HEADERS: Mapping[str, str] = MappingProxyType({})
_BAD_ESCAPE = re.compile("%(?![0-9A-Fa-f]{2})")
_CONTROL = re.compile("[\x00-\x1f\x7f]")
# RFC 3986 section 3.2, without user information (RFC 9110 section 4.2.4) and narrowed to names that exist:
# letters, digits and "-._~", or an IPv6 address in brackets. Sub-delimiters such as "," only serve confusion.
_AUTHORITY = re.compile(
    r"(?:[A-Za-z0-9_~-]+(?:\.[A-Za-z0-9_~-]+)*\.?|\[[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*\])(?::[0-9]{0,5})?"
)
_ABSOLUTE_FORM = re.compile(r"https?://([^/?]*)([^?]*)", re.IGNORECASE)


class Request:
    """The head of one HTTP request. Immutable by convention.

    Attributes:
        method: as sent; methods are case-sensitive (RFC 9110 section 9.1).
        target: the request-target as sent, ASCII. May carry ``access_token``: never log it, log ``path``.
        path: the percent-decoded path, or ``*`` for ``OPTIONS *``.
        headers: lower-case name to value (Latin-1); repeated ones are joined with ``", "``, cookies with ``"; "``.
        http_version: ``"1.1"`` or ``"1.0"``.
    """

    __slots__ = ("_query", "headers", "http_version", "method", "path", "target")

    def __init__(
        self,
        method: str,
        target: str,
        path: str,
        query: dict[str, str] | None = None,
        headers: Mapping[str, str] = _NO_HEADERS,
        http_version: str = "1.1",
    ) -> None:
        self.method = method
        self.target = target
        self.path = path
        self._query = query
        self.headers = headers
        self.http_version = http_version

    def __repr__(self) -> str:
        return f"<Request {self.method} {self.path} HTTP/{self.http_version}>"

    @property
    def query(self) -> dict[str, str]:
        """The query parameters, parsed at the first use and remembered.

        Parsed here and not with the head, so that a bad query is an ordinary answer that keeps the connection.

        Raises:
            ApiError: 400 ``invalid_parameter`` for a repeated or malformed parameter, or more than ``MAX_PARAMETERS``.
        """
        if self._query is None:
            self._query = parse_query(self.target.partition("?")[2])
        return self._query

    def header(self, name: str) -> str | None:
        """The value of a header, whatever the case of ``name``; None if it was not sent."""
        return self.headers.get(name.lower())

    @property
    def cookies(self) -> dict[str, str]:
        """The cookies by name. Never fails: what is not ``name=value`` is passed over (RFC 6265 section 5.4).

        Of equal names the first counts: browsers send the one with the longest path first.
        """
        cookies: dict[str, str] = {}
        for pair in self.headers.get("cookie", "").split(";"):
            name, equals, value = pair.partition("=")
            name, value = name.strip(" \t"), value.strip(" \t")
            if len(value) >= 2 and value[0] == value[-1] == '"':
                value = value[1:-1]
            if equals and name:
                cookies.setdefault(name, value)
        return cookies

    @property
    def content_type(self) -> str:
        """The media type of the body in lower case, without parameters; ``""`` if none is given."""
        return self.headers.get("content-type", "").partition(";")[0].strip(" \t").lower()

    @property
    def has_body(self) -> bool:
        """Whether a body was announced, be it of unknown length (RFC 9112 section 6)."""
        return "transfer-encoding" in self.headers or self.headers.get("content-length", "0").strip("0") != ""

    def accepts(self, media_type: str) -> bool:
        """Whether ``Accept`` names ``media_type`` itself with a weight above 0; wildcards do not count.

        Used to tell apart clients that ask for one format on purpose (RFC 9110 section 12.5.1).
        """
        for element in self.headers.get("accept", "").lower().split(","):
            name, *parameters = (part.strip(" \t") for part in element.split(";"))
            if name == media_type:
                return not any(re.fullmatch(r"q=0(\.0*)?", parameter) for parameter in parameters)
        return False

    @property
    def accepts_event_stream(self) -> bool:
        """Whether the client is an ``EventSource`` or asks like one."""
        return self.accepts("text/event-stream")


def parse_query(text: str) -> dict[str, str]:
    """Decode ``application/x-www-form-urlencoded`` (WHATWG URL, section 5.1), strictly.

    Args:
        text: what follows the ``?``, ASCII.

    Returns:
        Values by name; a parameter without ``=`` is the empty string, an empty pair (``&&``) is nothing.

    Raises:
        ApiError: 400 ``invalid_parameter``, naming the parameter.
    """
    query: dict[str, str] = {}
    if not text:
        return query
    pairs = [pair for pair in text.split("&") if pair]
    if len(pairs) > MAX_PARAMETERS:
        raise ApiError(400, "invalid_parameter", f"there are more than {MAX_PARAMETERS} query parameters")
    for pair in pairs:
        raw_name, _, raw_value = pair.partition("=")
        name = _decode_parameter(raw_name, raw_name)
        if name in query:
            raise invalid_parameter(name[:64], "given more than once; join several values with commas")
        query[name] = _decode_parameter(name, raw_value)
    return query


def _decode_parameter(name: str, raw: str) -> str:
    if "%" not in raw and "+" not in raw:
        return raw
    try:
        return percent_decode(raw.replace("+", " "))
    except ValueError as error:
        raise invalid_parameter(name[:64], str(error)) from error


def percent_decode(text: str) -> str:
    """Undo percent-encoding of UTF-8 (RFC 3986 section 2.1).

    Raises:
        ValueError: an incomplete escape, or bytes that are not UTF-8; the message says which.
    """
    if _BAD_ESCAPE.search(text):
        raise ValueError("a % must be followed by two hexadecimal digits")
    try:
        return unquote(text, errors="strict")
    except UnicodeDecodeError as error:
        raise ValueError("percent-encoded bytes must be UTF-8") from error


def valid_authority(text: str) -> bool:
    """Whether ``text`` is ``host[:port]`` as a ``Host`` header or an absolute URL may carry it."""
    return _AUTHORITY.fullmatch(text) is not None


def parse_target(method: str, target: str) -> tuple[str, str | None]:
    """Split a request-target (RFC 9112 section 3.2).

    Args:
        method: the request's method; it decides which forms are allowed.
        target: visible ASCII, as sent.

    Returns:
        The decoded path, and the authority if the target is in absolute-form (it replaces ``Host``, section 3.2.2).

    Raises:
        ApiError: 405 ``method_not_allowed`` for CONNECT, else 400 ``bad_request``.
    """
    if method == "CONNECT":
        allow = (("Allow", "GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS"),)
        raise ApiError(405, "method_not_allowed", "this is not a proxy: CONNECT is not possible", headers=allow)
    if "#" in target:
        raise ApiError(400, "bad_request", "a request target has no fragment: leave out # and what follows it")
    authority: str | None = None
    if target[0] == "/":
        raw_path = target.partition("?")[0]
    elif target == "*" and method == "OPTIONS":
        return "*", None
    else:
        match = _ABSOLUTE_FORM.match(target)
        if match is None:
            raise ApiError(400, "bad_request", "the request target must be a path that begins with /")
        authority, raw_path = match[1], match[2] or "/"
        if not valid_authority(authority):
            raise ApiError(400, "bad_request", "the request target has a malformed host")
    if "%" not in raw_path:
        return raw_path, authority
    try:
        path = percent_decode(raw_path)
    except ValueError as error:
        raise ApiError(400, "bad_request", f"the path is malformed: {error}") from error
    if _CONTROL.search(path):
        raise ApiError(400, "bad_request", "the path must not contain control characters")
    return path, authority
