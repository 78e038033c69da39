"""What the commands that talk to a server share: addresses, headers, waiting before another try, error messages."""

from __future__ import annotations

import ssl
import time
from email.utils import parsedate_to_datetime
from random import random
from urllib.parse import urlsplit

import httpx
import msgspec

from server.cli import EXIT_USAGE, CommandError
from server.config import is_loopback

# A delay that a server asks for is obeyed up to this many seconds; beyond it a person would rather know.
MAX_ASKED_DELAY = 300.0
# Passing conditions: too fast, a server or a proxy before it that is restarting or overloaded.
PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})


def open_client(url: str, token: str | None, *, read_timeout: float, trusting: bool = False) -> httpx.Client:
    """A client whose relative paths are below ``url``, which may have a base path.

    Args:
        url: ``http://host:port/base``.
        token: access token, or None.
        read_timeout: seconds without a byte after which an answer counts as lost.
        trusting: this machine's own certificates need not be for that name, nor of a known authority.

    Raises:
        CommandError: not an HTTP URL, or a token that no header can hold.
    """
    try:
        parts = urlsplit(url)
        host = parts.hostname
        _ = parts.port  # raises for one that is no port
        valid = parts.scheme in ("http", "https") and bool(host) and not parts.query and not parts.fragment
        parsed = httpx.URL(url.rstrip("/") + "/")
    except (ValueError, httpx.InvalidURL):
        valid, host = False, None
    if not valid or host is None:
        raise CommandError(f"--url {url!r}: expected something like http://127.0.0.1:3000", EXIT_USAGE)
    headers = {"User-Agent": "statuswire"}
    if token is not None:
        if not token.isascii() or not token.isprintable() or " " in token:
            raise CommandError("--token: this is not an access token", EXIT_USAGE)
        headers["Authorization"] = f"Bearer {token}"
    return httpx.Client(
        base_url=parsed,
        headers=headers,
        timeout=timeouts(read_timeout),
        # A proxy of the environment cannot reach our own loopback. What certificates it trusts counts there, too
        # (SSL_CERT_FILE, SSL_CERT_DIR).
        trust_env=not is_loopback(host),
        verify=_trust(parts.scheme, own=trusting and is_loopback(host)),
    )


def _trust(scheme: str, *, own: bool) -> ssl.SSLContext | bool:
    if scheme != "https":
        return True
    return False if own else httpx.create_ssl_context()


def timeouts(read: float) -> httpx.Timeout:
    """Ten seconds to connect or to send, ``read`` seconds without a byte of the answer."""
    return httpx.Timeout(10.0, read=read)


def jittered(attempt: int, *, base: float, cap: float) -> float:
    """Seconds to wait before try number ``attempt`` (0 is the first retry): "full jitter", anything up to a bound.

    The bound doubles from ``base`` to ``cap``; the spread keeps clients that failed together from coming back together.
    """
    return random() * min(cap, base * 2.0 ** min(attempt, 32))


def retry_after(response: httpx.Response) -> float | None:
    """Seconds that ``Retry-After`` asks for (RFC 9110 section 10.2.3: a number or a date), or None."""
    text = response.headers.get("retry-after", "").strip()
    if text.isascii() and text.isdigit() and len(text) <= 9:
        return min(float(text), MAX_ASKED_DELAY)
    try:
        seconds = parsedate_to_datetime(text).timestamp() - time.time()
    except ValueError:
        return None
    return min(max(seconds, 0.0), MAX_ASKED_DELAY)


def message_of(response: httpx.Response) -> str:
    """The server's own words about an answer that is not a success, read already; the status where it has none."""
    try:
        error = msgspec.json.decode(response.content)["error"]
        message, request_id = error["message"], error.get("requestId")
    except (msgspec.DecodeError, UnicodeDecodeError, LookupError, TypeError, AttributeError):
        message, request_id = None, None
    if not isinstance(message, str) or not message:
        where = response.headers.get("location")
        message = f"answered {response.status_code} {response.reason_phrase}" + (f" to {where}" if where else "")
    return f"{message} (request {request_id})" if isinstance(request_id, str) else message


def reason_of(error: httpx.HTTPError) -> str:
    """Why there was no answer, in words."""
    return str(error) or type(error).__name__


def is_hopeless(error: httpx.HTTPError) -> bool:
    """Whether trying again cannot help: the server's certificate is not trusted."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return True
        cause = cause.__cause__ or cause.__context__
    return False
