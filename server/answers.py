"""Answers that are not streams: a status, headers, and a body that is at hand or made piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import msgspec

from protocol.errors import ApiError

JSON = ("Content-Type", "application/json; charset=utf-8")
# Answers depend on who asks: shared caches must keep none, and nobody may keep them without asking again.
NO_STORE = ("Cache-Control", "no-store")


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
