"""``/api/v2/jobs`` and ``/api/v2/updates``: publishing, and reading without waiting."""

from __future__ import annotations

from functools import partial
from hashlib import blake2b, sha256
from typing import Final, TypeVar

import msgspec
import trio

from protocol.errors import ApiError, invalid_field, invalid_parameter, job_not_found
from protocol.fields import MAX_UPDATE, check_json, is_id
from protocol.update import STATUS_UPDATE, STATUSES, TYPE_OF_STATUS, Job
from protocol.watch import EVERYTHING, parse_fields, parse_filter, user_channel, wants_all
from protocol.wire import json_list, select_fields, update_message
from server.answers import JSON, NO_STORE, Response, json_answer
from server.brokers.base import Accepted, Cancel, Claim, Delete, Publish
from server.exchange import Deferred, Exchange
from server.publishing import HELD_PER_UPDATE, PORTION, Batch, check_count, check_kept, summary, take_in, wait_kept
from server.reading import channel_of_job
from server.routes.intake import (
    JSON_TYPES,
    answered,
    check_body,
    idempotency_key,
    position,
    read_body,
    read_fields,
    spooled,
    unsupported,
    updated,
    when_kept,
)
from server.turns import in_turns

MAX_BATCH: Final = 8 * 1024 * 1024
# What one of the jobs that are looked through for a page takes, if it is copied.
COPY_BYTES: Final = 8
DEFAULT_PAGE: Final = 100
MAX_PAGE: Final = 1000

_T = TypeVar("_T")
_NDJSON_TYPES: Final = frozenset({"application/x-ndjson", "application/ndjson", "application/jsonl"})


# Publishing


async def create(exchange: Exchange) -> Response | Deferred:
    """``POST /api/v2/jobs``: 201 with the record, 200 with the same job for a repeat, 409 for a taken id."""
    fields = await read_fields(exchange)
    operation = Publish(None, fields, "must", exchange.caller.user, idempotency_key(exchange))
    return await answered(exchange, operation, _created)


def _created(exchange: Exchange, accepted: Accepted) -> Response:
    if accepted.spooled:
        return spooled(exchange, accepted)
    job = accepted.job
    if accepted.duplicate:
        shown = None if job is None else msgspec.Raw(_readable(exchange, job))
        answer = {"job": shown, "id": position(exchange, accepted), "version": accepted.version, "duplicate": True}
        return json_answer(200, answer)
    assert job is not None
    base = exchange.node.config.server.base_path
    answer = {"job": msgspec.Raw(job.latest.body), "id": position(exchange, accepted)}
    return json_answer(201, answer, ("Location", f"{base}/api/v2/jobs/{job.latest.job_id}"))


def _readable(exchange: Exchange, job: Job) -> bytes:
    """What the caller may see of a job that was there already: to publish is not to read."""
    latest = job.latest
    if exchange.caller.may_read(latest.job_id, latest.user_id):
        return latest.body
    return select_fields(latest.body, frozenset())


async def update(exchange: Exchange) -> Response | Deferred:
    """``POST /api/v2/jobs/{jobId}/updates``: one update."""
    job_id = _job_id(exchange)
    fields = await read_fields(exchange)
    if fields.job_id is not msgspec.UNSET and fields.job_id != job_id:
        raise invalid_field("jobId", f"{fields.job_id!r} is not the job of the path, {job_id!r}")
    operation = Publish(job_id, fields, "may", exchange.caller.user, idempotency_key(exchange))
    return await answered(exchange, operation, updated)


async def publish_batch(exchange: Exchange) -> Response | Deferred:
    """``POST /api/v2/updates``: a JSON array, or NDJSON taken in as it comes."""
    content_type = exchange.request.content_type
    key = idempotency_key(exchange)
    batches: list[Batch] = []
    if content_type in _NDJSON_TYPES:
        await _publish_lines(exchange, batches, key)
    elif content_type in JSON_TYPES:
        body = await read_body(exchange, MAX_BATCH)
        try:
            items = msgspec.json.decode(body, type=list[msgspec.Raw])
        except msgspec.ValidationError:
            check_json(body)
            raise ApiError(422, "invalid_field", "the batch must be a JSON array of updates") from None
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ApiError(400, "malformed_json", f"the batch is not JSON: {error}") from None
        check_count(len(items))
        if items:
            await exchange.node.limits.check_publish(exchange.caller.user, trio.current_time(), len(items))
        if key is not None:  # lines of NDJSON are taken before their body is known: there each has the key for itself
            fingerprint = blake2b(body, digest_size=16).digest()
            claim = exchange.node.broker.submit([Claim(exchange.caller.user, key, fingerprint)])
            await wait_kept(claim)
            (claimed,) = claim.results
            if isinstance(claimed, ApiError):
                raise claimed
        for start in range(0, len(items), PORTION):
            await _publish_portion(exchange, batches, [bytes(item) for item in items[start : start + PORTION]], key)
    else:
        raise unsupported(content_type, "application/json or application/x-ndjson")
    return when_kept(exchange, [batch.submission for batch in batches], partial(_summed, exchange, batches))


def _summed(exchange: Exchange, batches: list[Batch]) -> Response:
    for batch in batches:
        check_kept(batch.submission)
    answer = summary(batches, exchange.node)
    return json_answer(202 if "spooled" in answer else 200, answer)


async def _publish_lines(exchange: Exchange, batches: list[Batch], key: str | None) -> None:
    """Take NDJSON in line by line while it comes: a worker may keep one such request open for long.

    Raises:
        ApiError: also 503, if the server goes away before its end.
    """
    check_body(exchange)
    connection, intakes = exchange.connection, exchange.node.intakes
    connection.http.limit_body(MAX_BATCH)
    rest = b""
    with trio.CancelScope() as scope:
        intakes.add(scope)
        try:
            while piece := await connection.next_piece():
                lines = (rest + piece).split(b"\n")
                # Of a line that is too long, more than it takes to refuse it is not kept.
                rest = lines.pop()[: MAX_UPDATE + 1]
                await _publish_some(exchange, batches, lines, key)
            await _publish_some(exchange, batches, [rest], key)
        finally:
            intakes.discard(scope)
    if scope.cancelled_caught:
        for batch in batches:
            await wait_kept(batch.submission)
        read = batches[-1].next_index if batches else 0
        raise ApiError(
            503, "try_later", f"this server is going away; {read} updates of this request were read", retry_after=1
        )


async def _publish_some(exchange: Exchange, batches: list[Batch], lines: list[bytes], key: str | None) -> None:
    items = [line for line in lines if line.strip()]
    for start in range(0, len(items), PORTION):
        portion = items[start : start + PORTION]
        check_count((batches[-1].next_index if batches else 0) + len(portion))
        await _wait_rate(exchange, len(portion), first=not batches)
        await _publish_portion(exchange, batches, portion, key)


async def _wait_rate(exchange: Exchange, count: int, *, first: bool) -> None:
    """Keep within the caller's rate: refuse a stream at its beginning, slow it down later.

    Raises:
        ApiError: 429, if it is the ``first`` of its request: nothing was taken, so all of it can be sent again.
    """
    limits, user = exchange.node.limits, exchange.caller.user
    while True:
        try:
            await limits.check_publish(user, trio.current_time(), count)
        except ApiError as error:
            if first:
                raise
            await trio.sleep(error.retry_after or 1)
        else:
            return


async def _publish_portion(exchange: Exchange, batches: list[Batch], items: list[bytes], key: str | None) -> None:
    exchange.connection.hold(len(items) * HELD_PER_UPDATE)
    await take_in(exchange.node, exchange.caller, batches, items, key=key, source="http")


async def delete(exchange: Exchange) -> Response | Deferred:
    """``DELETE /api/v2/jobs/{jobId}``: 204."""
    return await answered(exchange, Delete(_job_id(exchange)), _deleted)


def _deleted(exchange: Exchange, accepted: Accepted) -> Response:
    return Response(204)


async def cancel(exchange: Exchange) -> Response | Deferred:
    """``POST /api/v2/jobs/{jobId}/cancel``, by the owner or an admin: 202 with the record."""
    await exchange.connection.read_body(MAX_UPDATE)  # means nothing, but would be in the way of the next request
    job = await _visible(exchange)
    caller = exchange.caller
    if job.latest.user_id != caller.user and not caller.admin:
        raise ApiError(403, "forbidden", "only the job's owner or an admin may cancel it")
    return await answered(exchange, Cancel(job.latest.job_id, job.latest.user_id), _cancelled)


def _cancelled(exchange: Exchange, accepted: Accepted) -> Response:
    assert accepted.job is not None
    return json_answer(202, {"job": msgspec.Raw(accepted.job.latest.body)})


# Reading


async def show(exchange: Exchange) -> Response:
    """``GET /api/v2/jobs/{jobId}``: the record, with an ETag."""
    job = await _visible(exchange)
    fields = parse_fields(exchange.request.query)
    latest = job.latest
    tag = f"{exchange.node.history.epoch}:{latest.offset}"
    body = latest.body
    if fields is not None:
        body = select_fields(body, fields)
        tag += "-" + sha256(",".join(sorted(fields)).encode()).hexdigest()[:8]
    headers = [
        JSON,
        ("ETag", f'"{tag}"'),
        ("Cache-Control", "private, no-cache"),
        ("X-Job-Status", latest.status),
        ("X-Job-Version", str(latest.version)),
    ]
    progress = msgspec.json.decode(latest.body, type=_Progress).progress
    if progress is not None:
        headers.append(("X-Job-Progress", str(progress)))
    if _matches(exchange.request.header("if-none-match"), tag):
        return Response(304, headers)
    return Response(200, headers, body)


class _Progress(msgspec.Struct):
    progress: int | float | None = None


async def list_jobs(exchange: Exchange) -> Response:
    """``GET /api/v2/jobs``: newest first, in pages."""
    query, caller, node = exchange.request.query, exchange.caller, exchange.node
    wanted, fields = parse_filter(query), parse_fields(query)
    user_id = query.get("userId")
    if user_id is not None and not is_id(user_id):
        raise invalid_parameter("userId", f"{user_id[:128]!r} is not an id")
    if user_id is not None and user_id != caller.user and not caller.admin:
        raise ApiError(403, "forbidden", "userId: only an admin may read another user's jobs", field="userId")
    if wants_all(query) and not caller.admin:
        raise ApiError(403, "forbidden", "all: only an admin may read all jobs", field="all")
    if user_id is None and not caller.admin:
        user_id = caller.user
    statuses = wanted.statuses
    if wanted.types is not None:  # a record's type follows from its status
        of_types = {status for status in STATUSES if TYPE_OF_STATUS.get(status, STATUS_UPDATE) in wanted.types}
        statuses = frozenset(of_types if statuses is None else of_types & statuses)
    await node.broker.follow((EVERYTHING if user_id is None else user_channel(user_id),))
    cursor = f"{node.history.epoch}:{node.history.last}"
    work = node.jobs.page(
        user_id=user_id,
        status=statuses,
        kind=wanted.kinds,
        limit=whole_number(query, "limit", DEFAULT_PAGE, 1, MAX_PAGE),
        after=whole_number(query, "after", None, 0, 2**63),
    )
    # Few are copied, unless few of them fit.
    copied = (len(node.jobs) if user_id is None else len(node.jobs.by_user.get(user_id, ()))) * COPY_BYTES
    exchange.connection.hold(copied)
    jobs, following = await in_turns(work)
    exchange.connection.hold(-copied)
    rest = msgspec.json.encode({"next": None if following is None else str(following), "id": cursor})
    records = (job.latest.body if fields is None else select_fields(job.latest.body, fields) for job in jobs)
    return Response(200, (JSON, NO_STORE), json_list(records, b'{"jobs":', b"," + rest[1:]))


async def history(exchange: Exchange) -> Response:
    """``GET /api/v2/jobs/{jobId}/history``: kept updates of this incarnation of the id, oldest first."""
    job = await _visible(exchange)
    node = exchange.node
    wanted, fields = parse_filter(exchange.request.query), parse_fields(exchange.request.query)
    epoch = node.history.epoch
    updates = filter(wanted.passes, node.history.of_job(job.latest.job_id, job.created - 1))
    messages = (update_message(update, f"{epoch}:{update.offset}", fields) for update in updates)
    tail = msgspec.json.encode({"id": f"{epoch}:{node.history.last}"})
    return Response(200, (JSON, NO_STORE), json_list(messages, b'{"updates":', b"," + tail[1:]))


def _job_id(exchange: Exchange) -> str:
    job_id = exchange.params["jobId"]
    if not is_id(job_id):
        raise invalid_parameter("jobId", f"{job_id[:128]!r} is not an id: 1 to 128 of A-Z a-z 0-9 _ . : @ -")
    return job_id


async def _visible(exchange: Exchange) -> Job:
    """The path's job as shown now, if the caller may see it; else it does not exist."""
    job_id = _job_id(exchange)
    await exchange.node.broker.follow((channel_of_job(exchange.caller, job_id),))
    job = exchange.node.jobs.get(job_id)
    # Asked of a job that is not there as well, so that the one takes as long as the other.
    may_read = exchange.caller.may_read(job_id, "" if job is None else job.latest.user_id)
    if job is None or not may_read:
        raise job_not_found(job_id)
    return job


def whole_number(query: dict[str, str], name: str, default: _T, low: int, high: int) -> int | _T:
    """Read a whole number of a query string. Raises ApiError 400 naming the parameter."""
    text = query.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) < 20 and low <= int(text) <= high):
        raise invalid_parameter(name, f"{text[:32]!r} is not a whole number from {low} to {high}")
    return int(text)


def _matches(header: str | None, tag: str) -> bool:
    """Weak comparison of ``If-None-Match`` with our tag (RFC 9110 section 13.1.2)."""
    if header is None:
        return False
    return header.strip() == "*" or any(part.strip().removeprefix("W/") == f'"{tag}"' for part in header.split(","))
