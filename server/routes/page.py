"""What browsers are given: the page at ``/`` and the client. Files, read once, that load nothing from elsewhere."""

from __future__ import annotations

from functools import cache
from hashlib import sha256
from importlib.resources import files

from server.answers import Response
from server.exchange import Exchange

_SECURITY = (
    (
        "Content-Security-Policy",
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
    ("X-Content-Type-Options", "nosniff"),
    ("Referrer-Policy", "no-referrer"),
)

_SCRIPT = "text/javascript; charset=utf-8"
# By all that comes after the first dot.
_TYPES = {
    "css": "text/css; charset=utf-8",
    "js": _SCRIPT,
    "iife.js": _SCRIPT,
    "cjs": _SCRIPT,
    "d.ts": "text/plain; charset=utf-8",
}
# The page's own, and those that pages of others load; see docs/client.md.
FILES = (
    *("dashboard.css", "dashboard.js", "dom.js", "jobs.js", "list.js", "playground.js"),
    *("session.js", "stats.js", "timeline.js", "wire.js"),
    *("client.js", "client.cjs", "client.iife.js", "client.d.ts", "share.js"),
    *("react.js", "react.d.ts", "job-progress.js"),
)


@cache
def _file(name: str) -> tuple[bytes, str]:
    data = (files("server") / "web" / name).read_bytes()
    return data, f'"{sha256(data).hexdigest()[:16]}"'


def _static(exchange: Exchange, name: str, content_type: str) -> Response:
    data, tag = _file(name)
    headers = (("Content-Type", content_type), ("ETag", tag), ("Cache-Control", "no-cache"), *_SECURITY)
    if exchange.request.header("if-none-match") == tag:
        return Response(304, headers)
    return Response(200, headers, data)


async def index(exchange: Exchange) -> Response:
    """``GET /``. Without the slash, where a base path allows it, the page's relative links would lead elsewhere."""
    path, question, query = exchange.request.target.partition("?")
    if not path.endswith("/"):
        base = exchange.node.config.server.base_path
        return Response(308, (("Location", f"{base}/{question}{query}"),))
    return _static(exchange, "index.html", "text/html; charset=utf-8")


async def file(exchange: Exchange) -> Response:
    """``GET /client.js`` and the like: the file of that name."""
    name = exchange.request.path.rpartition("/")[2]
    return _static(exchange, name, _TYPES[name.partition(".")[2]])
