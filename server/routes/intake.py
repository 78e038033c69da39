"""What requests that publish have in common: reading them, deciding them, and the answer's members."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Final, TypeAlias

import trio

from protocol.errors import ApiError
from protocol.fields import MAX_UPDATE, Fields, decode_fields
from server import publishing
from server.answers import Response, json_answer
from server.brokers.base import Accepted, Operation, Submission
from server.exchange import Deferred, Exchange
from server.publishing import check_kept, wait_kept

MAX_KEY: Final = 255
JSON_TYPES: Final = frozenset({"", "application/json"})

Then: TypeAlias = Callable[[Exchange, Accepted], Response]
Refused: TypeAlias = Callable[[ApiError], ApiError]
Say: TypeAlias = Callable[[], Response]


class _Unkept(Deferred):
    """A request whose operations are on their way to the disk. ``say`` makes the answer, once all are settled."""

    __slots__ = ("_rest", "_say", "exchange", "patience_s")

    headers = None

    def __init__(self, exchange: Exchange, submissions: Iterable[Submission], say: Say) -> None:
        """Not all of ``submissions`` are settled."""
        self.exchange = exchange
        self.patience_s = publishing.PATIENCE_S
        self._rest = iter(submissions)
        self._say = say
        self._look(None)

    def _look(self, _: ApiError | None) -> None:
        for submission in self._rest:
            if not submission.settled:
                submission.when_kept(self._look)
                return
        self.exchange.connection.wake(self)

    def answer(self, *, late: bool) -> Response:
        """See ``Deferred``."""
        return self._say()

    def leave(self) -> None:
        """See ``Deferred``; what is kept, is kept."""


def when_kept(exchange: Exchange, submissions: Sequence[Submission], say: Say) -> Response | Deferred:
    """What ``say`` answers when all of these are settled, or when nobody knows after ``PATIENCE_S`` seconds: it looks
    what became of them, and what it raises is answered.

    No task waits for that: a store with a disk is behind in each of these, so nearly all of them wait.
    """
    if all(submission.settled for submission in submissions):
        return say()
    return _Unkept(exchange, submissions, say)


async def answered(
    exchange: Exchange, operation: Operation, then: Then, refused: Refused | None = None
) -> Response | Deferred:
    """Submit one operation; the answer that ``then`` makes of what became of it goes out as soon as it is kept.

    Raises:
        ApiError: see ``decide``; in the words of ``refused``, if it is given.
    """
    submission = await _submitted(exchange, operation)
    return when_kept(exchange, (submission,), partial(_answer, exchange, submission, then, refused))


def _answer(exchange: Exchange, submission: Submission, then: Then, refused: Refused | None) -> Response:
    try:
        return then(exchange, _accepted(exchange, submission))
    except ApiError as error:
        if refused is None:
            raise
        raise refused(error) from None


async def decide(exchange: Exchange, operation: Operation) -> Accepted:
    """Submit one operation and wait until it is kept.

    Raises:
        ApiError: why it was refused, 429 over the caller's rate, 503 if the store lost it or does not say.
    """
    submission = await _submitted(exchange, operation)
    with suppress(ApiError):  # raised again below
        await wait_kept(submission)
    return _accepted(exchange, submission)


async def _submitted(exchange: Exchange, operation: Operation) -> Submission:
    node = exchange.node
    if node.limits.on_publishes:
        await node.limits.check_publish(exchange.caller.user, trio.current_time())
    if node.hub.full:
        await node.hub.wait_room()
    return node.broker.submit([operation])


def _accepted(exchange: Exchange, submission: Submission) -> Accepted:
    counters = exchange.node.counters
    try:
        check_kept(submission)  # first, because a refusal too can rest on something that is not kept yet
        result = submission.results[0]
        if isinstance(result, ApiError):
            raise result
    except ApiError:
        counters.publishes("http", 0, 0, 1)
        raise
    counters.publishes("http", int(not result.duplicate), int(result.duplicate), 0)
    return result


def spooled(exchange: Exchange, accepted: Accepted) -> Response:
    """202: it is on this server's disk; what becomes of it is seen when the store is back (RFC 9110 section 15.3.3)."""
    base = exchange.node.config.server.base_path
    location = ("Location", f"{base}/api/v2/jobs/{accepted.spooled}")
    return json_answer(202, {"spooled": True, "jobId": accepted.spooled}, location)


def receipt(exchange: Exchange, accepted: Accepted) -> dict[str, Any]:
    """What a publisher is told of one update: ``{"id","version","duplicate"?,"cancelRequested"?}``."""
    answer: dict[str, Any] = {"id": position(exchange, accepted), "version": accepted.version}
    if accepted.duplicate:
        answer["duplicate"] = True
    if accepted.cancel_requested:
        answer["cancelRequested"] = True
    return answer


def updated(exchange: Exchange, accepted: Accepted) -> Response:
    """The answer to one update."""
    return spooled(exchange, accepted) if accepted.spooled else json_answer(200, receipt(exchange, accepted))


def position(exchange: Exchange, accepted: Accepted) -> str:
    """The cursor behind what was accepted."""
    return f"{exchange.node.broker.epoch}:{accepted.offset}"


async def read_fields(
    exchange: Exchange, decode: Callable[[bytes], Fields] = decode_fields, *, optional: bool = False
) -> Fields:
    """The body as one update.

    Args:
        decode: reads it; raises ApiError.
        optional: it may be left out, which is to ``decode`` as if it were empty.

    Raises:
        ApiError: 411, 413, 415, and those of ``decode``.
    """
    headers = exchange.request.headers
    if optional and "transfer-encoding" not in headers and headers.get("content-length", "0") == "0":
        body = b""
    elif exchange.request.content_type not in JSON_TYPES:
        raise unsupported(exchange.request.content_type, "application/json")
    else:
        body = await read_body(exchange, MAX_UPDATE)
    try:
        return decode(body)
    except ApiError:
        exchange.node.counters.publishes("http", 0, 0, 1)
        raise


async def read_body(exchange: Exchange, limit: int) -> bytes:
    """A body that must be there, of at most ``limit`` bytes. Raises ApiError 411, 413, 415."""
    check_body(exchange)
    return await exchange.connection.read_body(limit)


def check_body(exchange: Exchange) -> None:
    """Before a body that must be there is read.

    Raises:
        ApiError: 411 if nothing is said of one (RFC 9110 section 15.5.12), 415 if it is compressed (15.5.16).
    """
    headers = exchange.request.headers
    if "content-length" not in headers and "transfer-encoding" not in headers:
        raise ApiError(411, "length_required", "a body is needed here, with Content-Length or in chunks")
    coding = headers.get("content-encoding", "identity")
    if coding.lower() != "identity":
        message = f"the body must come as it is, without Content-Encoding {coding[:100]!r}"
        raise ApiError(415, "unsupported_media_type", message, headers=(("Accept-Encoding", "identity"),))


def idempotency_key(exchange: Exchange) -> str | None:
    """The request's ``Idempotency-Key``. Raises ApiError 400 for one that cannot be used."""
    key = exchange.request.header("idempotency-key")
    if key is not None and not (0 < len(key) <= MAX_KEY and key.isascii() and key.isprintable()):
        raise ApiError(400, "invalid_header", f"Idempotency-Key must be 1 to {MAX_KEY} ASCII characters")
    return key


def unsupported(content_type: str, wanted: str) -> ApiError:
    """415: the body is of a type that is not taken here."""
    return ApiError(415, "unsupported_media_type", f"the Content-Type must be {wanted}, not {content_type[:100]!r}")
