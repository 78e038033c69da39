"""Which web pages may talk to this server: Host and Origin checks, and CORS (WHATWG Fetch, section 3.2).

A browser sends cookies, and reaches loopback, on behalf of any page it shows. So a request that changes something,
or a WebSocket (which CORS does not cover), must come from this server's own pages or from a listed origin. Programs
that are not browsers send no ``Origin`` and are not concerned.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from protocol.errors import ApiError
from protocol.views import all_views
from server.config import ConfigError, is_loopback

if TYPE_CHECKING:
    from protocol.request import Request

SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})

# Compared without case; browsers always send request headers of a preflight in lower case.
ALLOWED_HEADERS = "authorization, content-type, idempotency-key, last-event-id, if-none-match"
EXPOSED_HEADERS = ", ".join(
    (
        *("etag", "retry-after", "x-request-id", "x-job-status", "x-job-progress", "x-job-version", "location"),
        *(name.lower() for view in all_views().values() for name in view.headers),
    )
)
PREFLIGHT_SECONDS = 600

# Origins that stand for pages nobody can name: any page, and any sandboxed frame or local file. See ``allowed_as``.
_ANYBODY = ("*", "null")

_AUTHORITY = re.compile(r"(\[[0-9a-f:.]+\]|[^\s\[\]:/@?#,]+)(?::([0-9]{0,5}))?")
_ORIGIN = re.compile(r"([a-z][a-z0-9+.-]*)://(\[[0-9a-f:.]+\]|[^\s\[\]:/@?#,]+)(?::([0-9]{1,5}))?")
_DEFAULT_PORTS = {"http": "80", "https": "443"}


def parse_origins(entries: Iterable[str]) -> frozenset[str]:
    """The configured origins in the form browsers send them: lower case, no default port, no slash at the end.

    ``*`` and ``null`` may be among them; they allow only requests without cookies.

    Raises:
        ConfigError: an entry that no ``Origin`` header could ever equal.
    """
    origins = set()
    for entry in entries:
        origin = entry.strip().lower()
        if origin not in _ANYBODY:
            parts = _ORIGIN.fullmatch(origin.removesuffix("/"))
            if parts is None:
                raise ConfigError(f"cors.origins: {entry!r} is not an origin such as https://app.example.com")
            scheme, host, port = parts.groups()
            origin = f"{scheme}://{host}" + (f":{port}" if port and port != _DEFAULT_PORTS.get(scheme) else "")
        origins.add(origin)
    return frozenset(origins)


def check_host(request: Request, open_mode: bool) -> None:
    """In open mode, refuse a ``Host`` that is not loopback.

    A page whose name was made to resolve to 127.0.0.1 (DNS rebinding) is same-origin to its browser; only the name
    in ``Host`` gives it away. A request without the header (HTTP/1.0) comes from no browser.

    Raises:
        ApiError: 403 ``host_not_allowed``.
    """
    if not open_mode:
        return
    host = request.headers.get("host")
    if host is None:
        return
    if not _is_local(host):
        raise ApiError(
            403,
            "host_not_allowed",
            f"without authentication this server only answers to localhost, not to {host[:255]!r}; "
            "use http://localhost or configure auth",
        )


@lru_cache(maxsize=256)  # of all those that could be sent, few are
def _is_local(host: str) -> bool:
    match = _AUTHORITY.fullmatch(host.lower())
    return match is not None and is_loopback(match[1])


def origin_allowed(request: Request, allowed: frozenset[str]) -> bool:
    """Whether the page behind a request may have it carried out: no page, one of ours, or a listed one."""
    origin = request.headers.get("origin")
    return origin is None or allowed_as(request, allowed) != "" or _same_origin(origin, request.headers.get("host", ""))


def check_origin(request: Request, allowed: frozenset[str], websocket: bool) -> None:
    """Refuse what a foreign page must not do: a method that changes something, or a WebSocket (RFC 6455 section 10.2).

    Reading is left to CORS: without its headers the browser keeps the answer from the page.

    Raises:
        ApiError: 403 ``origin_not_allowed``.
    """
    if (websocket or request.method not in SAFE_METHODS) and not origin_allowed(request, allowed):
        raise ApiError(
            403,
            "origin_not_allowed",
            f"pages of {request.headers['origin'][:255]!r} may not do this; "
            "add the origin to cors.origins, or have the proxy pass on the Host it was asked for",
        )


def allowed_as(request: Request, allowed: frozenset[str]) -> str:
    """The ``Access-Control-Allow-Origin`` for a request's origin; '' if it is not listed.

    A listed origin is trusted with the user's cookies. ``*`` and ``null`` (which any page can become, in a sandboxed
    frame) cannot be: they hold only for requests without a ``Cookie``, whose page has to bring a token of its own.
    """
    origin = request.headers.get("origin")
    if origin is None or not allowed:
        return ""
    if origin != "null" and origin.lower() in allowed:
        return origin
    if "cookie" in request.headers:
        return ""
    if origin == "null" and "null" in allowed:
        return "null"
    return "*" if "*" in allowed else ""


def cors_headers(request: Request, allowed: frozenset[str]) -> list[tuple[str, str]]:
    """The CORS headers that go with any answer, a preflight's and an error's too."""
    if not allowed:
        return []
    # Always, even without an Origin: a cache must not serve one page's answer to another.
    headers = [("Vary", "Origin")]
    origin = allowed_as(request, allowed)
    if origin:
        headers.append(("Access-Control-Allow-Origin", origin))
        if origin not in _ANYBODY:
            headers.append(("Access-Control-Allow-Credentials", "true"))
        headers.append(("Access-Control-Expose-Headers", EXPOSED_HEADERS))
    return headers


def is_preflight(request: Request) -> bool:
    """Whether this is a CORS preflight and no other OPTIONS request."""
    return (
        request.method == "OPTIONS"
        and "origin" in request.headers
        and "access-control-request-method" in request.headers
    )


def preflight_headers(request: Request, methods: Sequence[str]) -> list[tuple[str, str]]:
    """What a preflight's answer needs besides ``cors_headers``; nothing for another request.

    Args:
        methods: those of the path. It does not matter here whether the origin is allowed: without the
            ``Access-Control-Allow-Origin`` of ``cors_headers`` the browser stops.
    """
    if not is_preflight(request):
        return []
    return [
        ("Access-Control-Allow-Methods", ", ".join(methods)),
        ("Access-Control-Allow-Headers", ALLOWED_HEADERS),
        ("Access-Control-Max-Age", str(PREFLIGHT_SECONDS)),
    ]


def _same_origin(origin: str, host: str) -> bool:
    """Whether host and port of an origin are those the request was sent to.

    The scheme is left out: behind a proxy that ends TLS, this server cannot know it.
    """
    page = _ORIGIN.fullmatch(origin.lower())
    here = _AUTHORITY.fullmatch(host.lower())
    if page is None or here is None or page[1] not in _DEFAULT_PORTS:
        return False
    page_port = "" if page[3] == _DEFAULT_PORTS[page[1]] else page[3] or ""
    here_port = "" if here[2] in _DEFAULT_PORTS.values() else here[2] or ""
    return page[2] == here[1] and page_port == here_port
