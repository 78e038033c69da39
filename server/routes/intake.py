"""What requests that publish have in common: reading them, deciding them, and the answer's members."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import trio

from protocol.errors import ApiError
from protocol.fields import MAX_UPDATE, Fields, decode_fields
from server.answers import Response, json_answer
from server.brokers.base import Accepted, Operation
from server.connection import Exchange

MAX_KEY: Final = 255
JSON_TYPES: Final = frozenset({"", "application/json"})


async def decide(exchange: Exchange, operation: Operation) -> Accepted:
    """Submit one operation and wait until it is kept.

    Raises:
        ApiError: why it was refused, 429 over the caller's rate, 503 if the store lost it.
    """
    node = exchange.node
    if node.limits.on_publishes:
        await node.limits.check_publish(exchange.caller.user, trio.current_time())
    await node.hub.wait_room()
    submission = node.broker.submit([operation])
    # First, because a refusal too can rest on something that is not kept yet.
    if not submission.kept:
        await submission.wait_kept()
    result = submission.results[0]
    if isinstance(result, ApiError):
        node.counters.publishes("http", 0, 0, 1)
        raise result
    node.counters.publishes("http", int(not result.duplicate), int(result.duplicate), 0)
    return result


def spooled(exchange: Exchange, accepted: Accepted) -> Response:
    """202: it is on this server's disk; what becomes of it is seen when the store is back (RFC 9110 section 15.3.3)."""
    base = exchange.node.config.server.base_path
    location = ("Location", f"{base}/api/v2/jobs/{accepted.spooled}")
    return json_answer(202, {"spooled": True, "jobId": accepted.spooled}, location)


def outcome(exchange: Exchange, accepted: Accepted) -> dict[str, Any]:
    """What a publisher is told of one update: ``{"id","version","duplicate"?,"cancelRequested"?}``."""
    answer: dict[str, Any] = {"id": position(exchange, accepted), "version": accepted.version}
    if accepted.duplicate:
        answer["duplicate"] = True
    if accepted.cancel_requested:
        answer["cancelRequested"] = True
    return answer


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
