"""Answers that are not streams: a status, headers, and a body that is at hand or made piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, NamedTuple

import msgspec

from protocol.errors import ApiError

JSON = ("Content-Type", "application/json; charset=utf-8")
# Answers depend on who asks: shared caches must keep none, and nobody may keep them without asking again.
NO_STORE = ("Cache-Control", "no-store")
# What is kept for others of what was told at a moment; more is made anew.
SHARED_BYTES: Final = 4 * 1024 * 1024


class Response(NamedTuple):
    """One answer.

    Attributes:
        status: HTTP status code.
        headers: without those that every answer has (Date, X-Request-Id, CORS, framing).
        body: bytes, or pieces for a body too large to build at once.
        then: called when all of it has been sent; must not wait.
    """

    status: int
    headers: Sequence[tuple[str, str]] = ()
    body: bytes | Iterable[bytes] = b""
    then: Callable[[], object] | None = None


def json_answer(status: int, value: Any, *headers: tuple[str, str]) -> Response:
    """A JSON answer that nobody caches."""
    return Response(status, (JSON, NO_STORE, *headers), msgspec.json.encode(value))


def error_answer(error: ApiError, request_id: str) -> Response:
    """The answer to a refused request: ``{"error":{"code","message","requestId"}}``."""
    headers = [JSON, NO_STORE, *error.headers]
    if error.retry_after is not None:
        headers.append(("Retry-After", str(error.retry_after)))
    return Response(error.status, headers, msgspec.json.encode(error.body(request_id)))


class Shared:
    """What one was told and others are told, too, who ask for the same at the same moment; then it is forgotten."""

    __slots__ = ("_kept", "_moment", "_size")

    def __init__(self) -> None:
        self._moment: object = None
        self._kept: dict[object, Any] = {}
        self._size = 0

    def get(self, moment: object, key: object) -> Any:
        """What was kept, None if nothing was."""
        return self._kept.get(key) if moment == self._moment else None

    def keep(self, moment: object, key: object, told: object, size: int) -> None:
        """Keep it; ``size`` in bytes, with that of its key."""
        self._size += size
        if moment != self._moment or self._size > SHARED_BYTES:
            self._moment = moment
            self._kept.clear()
            self._size = size
        self._kept[key] = told
