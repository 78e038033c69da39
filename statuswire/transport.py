"""HTTP to the server: one request, and what its answer means."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from ipaddress import ip_address
from typing import TYPE_CHECKING, Final, TypeVar
from urllib.parse import urlsplit

import msgspec

from statuswire import process
from statuswire.items import Answer, Refusal

if TYPE_CHECKING:
    import httpx

_T = TypeVar("_T")
Token = str | Callable[[], str] | None

CONNECT_S: Final = 5.0
# Answers that are about the request itself: the same one again would be answered the same.
_REFUSED: Final = frozenset((400, 409, 411, 413, 415, 422))


class Away(Exception):
    """There was no answer that settles anything: try again later.

    Attributes:
        retry_after: seconds that the server asked for, None if it did not.
    """

    def __init__(self, reason: str, retry_after: float | None = None) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


class Refused(Exception):
    """The request as a whole will never be taken."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(f"{refusal.message} ({refusal.code})")
        self.refusal = refusal


class _Rejected(msgspec.Struct):
    index: int
    code: str
    message: str


class _Published(msgspec.Struct, rename="camel"):
    rejected: list[_Rejected] = []
    duplicates: int = 0
    cancel_requested: list[str] = []


class _Delivered(msgspec.Struct):
    delivered: int = 0


class _Error(msgspec.Struct):
    code: str
    message: str


class _Failure(msgspec.Struct):
    error: _Error


class Transport:
    """A server's address and the connection to it.

    Args:
        url: ``http://host:port/base``.
        token: access token, or what is called for one before each request.
        timeout: seconds without a byte of the answer.

    Raises:
        ValueError: not an HTTP address.
    """

    def __init__(self, url: str, token: Token, timeout: float) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise ValueError(f"url {url!r}: expected something like http://127.0.0.1:3000")
        if parts.username is not None:  # it would stand in every log and in the spool's name
            raise ValueError("url: identify yourself by a token, not in the address")
        _ = parts.port  # raises for one that is no port
        self.url = url.rstrip("/")
        self._host = parts.hostname
        self._token = token
        self._timeout = timeout
        self._client: httpx.Client | None = None
        self._lock = threading.Lock()

    def publish(self, updates: bytes) -> Answer:
        """Send a batch, a JSON array. Raises Away or Refused."""
        found = _decoded(self._post("/api/v2/updates", updates, None), _Published)
        rejected = {refusal.index: Refusal(refusal.code, refusal.message) for refusal in found.rejected}
        return Answer(rejected, found.duplicates, found.cancel_requested)

    def notify(self, notification: bytes, key: str) -> int:
        """Send a notification; how many connections got it. Raises Away or Refused."""
        return _decoded(self._post("/api/sse/message", notification, key), _Delivered).delivered

    def close(self) -> None:
        """Close the connection; the next request opens another."""
        with self._lock:
            client, self._client = self._client, None
        if client is not None:
            client.close()

    def abandon(self) -> None:
        """In a child process: leave the parent's connection alone."""
        self._lock = threading.Lock()
        if self._client is not None:
            _parents.append(self._client)
            self._client = None

    def _post(self, path: str, body: bytes, key: str | None) -> bytes:
        httpx = process.import_httpx()
        headers = {"Content-Type": "application/json", "User-Agent": "statuswire-worker"}
        if key is not None:
            headers["Idempotency-Key"] = key
        try:
            token = self._token() if callable(self._token) else self._token
        except Exception as error:
            raise Away(f"no token: {type(error).__name__}: {error}") from error
        if token:
            headers["Authorization"] = f"Bearer {token}"
        try:
            response = self._open().post(self.url + path, content=body, headers=headers)
        except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError, RuntimeError) as error:
            # RuntimeError: closed by another thread just now.
            raise Away(f"no answer from {self.url}: {error or type(error).__name__}") from error
        if response.status_code == 200:
            return response.content
        refusal = _refusal(response)
        if response.status_code in _REFUSED:
            raise Refused(refusal)
        # A wrong token or address too: the worker cannot mend it, but somebody may.
        reason = f"{self.url}{path} answered {response.status_code}: {refusal.message}"
        raise Away(reason, _retry_after(response.headers.get("retry-after", "")))

    def _open(self) -> httpx.Client:
        httpx = process.import_httpx()
        with self._lock, process.opening:
            if self._client is None:
                timeout = httpx.Timeout(self._timeout, connect=min(CONNECT_S, self._timeout))
                self._client = httpx.Client(
                    timeout=timeout,
                    # A proxy of the environment cannot reach our own loopback. SSL_CERT_FILE counts there, too.
                    trust_env=not _is_loopback(self._host),
                    verify=httpx.create_ssl_context() if self.url.startswith("https:") else True,
                )
            return self._client


# Connections of parent processes, held so that they are not closed here.
_parents: list[object] = []


def _decoded(body: bytes, type: type[_T]) -> _T:
    try:
        return msgspec.json.decode(body, type=type)
    except (msgspec.MsgspecError, UnicodeError) as error:
        raise Away(f"the answer is not one of statuswire: {error}") from error


def _refusal(response: httpx.Response) -> Refusal:
    try:
        error = msgspec.json.decode(response.content, type=_Failure).error
    except (msgspec.MsgspecError, UnicodeError):
        return Refusal(f"http_{response.status_code}", response.reason_phrase or "no reason given")
    return Refusal(error.code, error.message)


def _retry_after(text: str) -> float | None:
    """Seconds that ``Retry-After`` asks for (RFC 9110 section 10.2.3: a number or a date), or None."""
    if text.isascii() and text.isdigit() and len(text) <= 9:
        return float(text)
    try:
        return max(parsedate_to_datetime(text).timestamp() - time.time(), 0.0)
    except ValueError:
        return None


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
