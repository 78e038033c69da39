"""The auth hook: who a caller is, is asked of the application, with the caller's own cookies and authorization.

For applications that have sessions already. The answer is remembered for some seconds, callers with the same
credentials wait for one request, and only so many are under way at once: a crowd that reconnects must not become a
crowd at the application's door. httpx is imported when a hook is configured.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from hashlib import sha256
from math import isfinite
from typing import TYPE_CHECKING, Final

import msgspec
import trio

from protocol.errors import ApiError
from protocol.fields import is_id
from protocol.queues.payload import is_reserved
from server.auth import CAPABILITIES, Identity, patterns_of
from server.config import Auth
from server.logs import log_event

if TYPE_CHECKING:
    import httpx

    from protocol.request import Request

LOG: Final = logging.getLogger("statuswire.auth")

REMEMBERED: Final = 10_000  # answers, the oldest out
# A refusal is remembered just long enough to take the edge off a flood: many applications keep the session cookie's
# value when its owner logs in, and nobody shall wait for that to be noticed.
REFUSED_S: Final = 1.0
# Callers that wait for answers, beyond which the next one is told to come again at once.
MAX_WAITING: Final = 5000
MAX_ANSWER: Final = 64 * 1024  # bytes
# A hook that is down is said once in so many seconds, not once a caller.
LOG_EVERY_S: Final = 10.0
CLOSE_S: Final = 1.0


class _Answer(msgspec.Struct, rename="camel"):
    """What the application says of a caller; what else it says is not for us."""

    user_id: str
    admin: bool = False
    capabilities: list[str] = []
    expires_at: str | int | float | None = None
    jobs: list[str] = []
    channels: list[str] | None = None


_DECODER: Final = msgspec.json.Decoder(_Answer)


class _Asked:
    """One request under way, and who waits for it."""

    __slots__ = ("done", "outcome")

    def __init__(self) -> None:
        self.done = trio.Event()
        self.outcome: Identity | ApiError | None = None


class AuthHook:
    """Asks the application who a caller is.

    Args:
        config: ``hook_url``, ``hook_timeout``, ``hook_cache`` and ``hook_concurrency`` of it.
        clock: unix seconds.

    Attributes:
        asked: requests made so far.
        failed: those of them without a usable answer.
    """

    def __init__(self, config: Auth, *, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._nursery: trio.Nursery | None = None
        self._client: httpx.AsyncClient | None = None
        self._remembered: dict[bytes, tuple[float, Identity | ApiError]] = {}
        self._asking: dict[bytes, _Asked] = {}
        self._waiting = 0
        self._logged_at = float("-inf")
        self.asked = 0
        self.failed = 0
        self._config = config
        self._slots = trio.CapacityLimiter(config.hook_concurrency)

    def reload(self, config: Auth) -> None:
        """Ask another address from now on, or with other bounds; everybody is asked about anew."""
        self._config = config
        self._slots.total_tokens = config.hook_concurrency
        self._remembered.clear()

    def forget(self, user: str) -> None:
        """Ask about a user anew: some session of theirs may have ended. Nobody new gets what is being asked now."""
        remembered = self._remembered
        for digest in [
            key for key, (_, kept) in remembered.items() if isinstance(kept, Identity) and kept.user == user
        ]:
            del remembered[digest]
        # Of those that are under way nobody knows yet whom they are about.
        self._asking.clear()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Be able to ask, once ``started`` and until cancelled: requests outlive the callers that wait for them."""
        import httpx

        # Cookies of callers go to the configured address and nowhere else: no proxy from the environment, no redirect.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=self._config.hook_concurrency)
        self._client = httpx.AsyncClient(trust_env=False, limits=limits)
        try:
            async with trio.open_nursery() as self._nursery:
                task_status.started()
                await trio.sleep_forever()
        finally:
            with trio.move_on_after(CLOSE_S, shield=True):  # cancelled, it would leave its sockets open
                await self._client.aclose()

    async def identify(self, request: Request) -> Identity | None:
        """The caller's identity, or None if the request carries nothing to know it by.

        Raises:
            ApiError: as ``ask``.
        """
        credentials = {name: request.headers[name] for name in ("authorization", "cookie") if request.headers.get(name)}
        return await self.ask(credentials) if credentials else None

    async def ask(self, credentials: Mapping[str, str]) -> Identity:
        """The identity behind these request headers.

        Raises:
            ApiError: 401 ``unauthorized`` or 403 ``forbidden`` as the application said; 503 ``auth_unavailable`` if it
                is away, slow, or answers oddly.
        """
        digest = sha256(repr(sorted(credentials.items())).encode()).digest()
        kept = self._remembered.get(digest)
        if kept is not None and self._clock() < kept[0]:
            outcome = kept[1]
        else:
            outcome = await self._wait(digest, credentials)
        if isinstance(outcome, ApiError):
            # A fresh one: an exception that is raised again and again gathers tracebacks.
            raise ApiError(
                outcome.status,
                outcome.code,
                outcome.message,
                retry_after=outcome.retry_after,
                headers=outcome.headers,
            )
        return outcome

    async def _wait(self, digest: bytes, credentials: Mapping[str, str]) -> Identity | ApiError:
        if self._nursery is None or self._waiting >= MAX_WAITING:
            return _unavailable()
        asked = self._asking.get(digest)
        if asked is None:
            asked = self._asking[digest] = _Asked()
            self._nursery.start_soon(self._ask, digest, asked, dict(credentials))
        self._waiting += 1
        try:
            await asked.done.wait()
        finally:
            self._waiting -= 1
        assert asked.outcome is not None
        return asked.outcome

    async def _ask(self, digest: bytes, asked: _Asked, credentials: dict[str, str]) -> None:
        config = self._config
        outcome: Identity | ApiError = _unavailable()
        reason = f"no answer within {config.hook_timeout:g} s"
        try:
            with trio.move_on_after(config.hook_timeout):
                async with self._slots:
                    outcome, reason = await self._request(credentials)
        except Exception as error:  # whatever the application or the library does, its callers are answered
            reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        finally:
            is_current = self._asking.get(digest) is asked
            if is_current:
                del self._asking[digest]
            asked.outcome = outcome
            asked.done.set()
        now = self._clock()
        if isinstance(outcome, ApiError) and outcome.status == 503:
            self.failed += 1
            if now - self._logged_at >= LOG_EVERY_S:
                self._logged_at = now
                log_event(LOG, logging.WARNING, "auth_hook_failed", url=config.shown_hook_url, reason=reason)
            return
        if isinstance(outcome, Identity):
            until = now + config.hook_cache
            if outcome.expires_at is not None:
                until = min(until, outcome.expires_at)
        else:
            until = now + min(config.hook_cache, REFUSED_S)
        if is_current and config is self._config:  # else the answer is older than `forget`, or another application's
            self._remember(digest, until, outcome, now)

    def _remember(self, digest: bytes, until: float, outcome: Identity | ApiError, now: float) -> None:
        remembered = self._remembered
        remembered.pop(digest, None)
        while remembered:  # in the order of asking, so those that are over stand in front, nearly all of them
            first = next(iter(remembered))
            if remembered[first][0] > now and len(remembered) < REMEMBERED:
                break
            del remembered[first]
        if until > now:
            remembered[digest] = (until, outcome)

    async def _request(self, credentials: dict[str, str]) -> tuple[Identity | ApiError, str]:
        """One request; what became of it, and why, should it be no answer."""
        assert self._client is not None
        self.asked += 1
        # As they came: header text is Latin-1 (RFC 9110 section 5.5), and httpx would take anything else for UTF-8.
        headers = {name.encode(): value.encode("latin-1") for name, value in credentials.items()}
        headers[b"accept"] = b"application/json"
        self._client.cookies.clear()  # callers' cookies are sent as headers; the application's are nobody's here
        timeout = self._config.hook_timeout
        async with self._client.stream("GET", self._config.hook_url, headers=headers, timeout=timeout) as answer:
            status = answer.status_code
            if status == 401:
                return _refused(), ""
            if status == 403:
                return ApiError(403, "forbidden", "the application refuses this caller"), ""
            if status != 200:
                return _unavailable(), f"status {status}"
            body = bytearray()
            async for piece in answer.aiter_bytes():  # to its end, so that the connection can be used again
                if len(body) <= MAX_ANSWER:
                    body += piece
        if len(body) > MAX_ANSWER:
            return _unavailable(), f"its answer is longer than {MAX_ANSWER} bytes"
        try:
            identity = _identity(_DECODER.decode(body))
        except (ValueError, RecursionError, ApiError) as error:
            return _unavailable(), f"its answer is not understood: {error}"
        if identity.expires_at is not None and identity.expires_at <= self._clock():
            return _refused(), ""
        return identity, ""


def _identity(answer: _Answer) -> Identity:
    """Read an answer; raises ValueError or ApiError for one that makes no sense."""
    if not is_id(answer.user_id):
        raise ValueError("userId must be 1 to 128 characters of A-Z a-z 0-9 _ . : @ -")
    if is_reserved(answer.user_id):
        raise ValueError("userId must not begin with queue:, which owns what has no owner")
    expires = answer.expires_at
    if isinstance(expires, str):
        moment = datetime.fromisoformat(expires)
        if moment.tzinfo is None:
            raise ValueError("expiresAt has no time zone")
        expires = moment.timestamp()
    if expires is not None and not isfinite(expires):
        raise ValueError("expiresAt is not a time")
    return Identity(
        user=answer.user_id,
        admin=answer.admin,
        capabilities=CAPABILITIES.intersection(answer.capabilities),
        jobs=patterns_of(answer.jobs, "jobs"),
        expires_at=None if expires is None else float(expires),
        channels=None if answer.channels is None else patterns_of(answer.channels, "channels"),
    )


def _refused() -> ApiError:
    return ApiError(
        401, "unauthorized", "the application does not know this caller", headers=(("WWW-Authenticate", "Bearer"),)
    )


def _unavailable() -> ApiError:
    return ApiError(503, "auth_unavailable", "who you are cannot be checked at the moment; try again", retry_after=2)
