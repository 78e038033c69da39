"""The routes of the views in ``protocol.views``: one handler for each thing that a view's calls can do."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from typing import Final, Literal, NamedTuple
from urllib.parse import quote

import msgspec
from msgspec import UNSET, Raw

from protocol.errors import ApiError
from protocol.update import Job
from protocol.view import Call, Target, View, in_words, read_update, target_of
from protocol.watch import Filter, Watch, check_parameter_id, job_channel
from server.answers import JSON, NO_STORE, Response, json_answer
from server.brokers.base import Accepted, Publish
from server.exchange import Deferred, Exchange
from server.node import Stream
from server.reading import channel_of_job
from server.routes import intake
from server.stats import stats
from server.transports.sse import begin_stream

Handler = Callable[[Exchange], Awaitable[Response | Stream | Deferred | None]]

# Characters of a text in a header: with all of them escaped still less than proxies take.
MAX_HEADER: Final = 200
# Of what may stand in a field value (RFC 9110 section 5.5) all but %, which escapes the rest.
_PRINTABLE: Final = "".join(chr(code) for code in range(0x20, 0x7F) if chr(code) != "%")


async def stream(view: View, call: Call, exchange: Exchange) -> Response | Stream:
    """An event stream of one job; it ends with the job."""
    target = target_of(view, exchange.params)
    if not view.waits:
        await _visible(view, target, exchange)
    kinds = frozenset({target.kind}) if target.kind else None
    watch = Watch(job_ids=(target.job_id,), filter=Filter(kinds=kinds))
    names = [channel_of_job(exchange.caller, target.job_id)]
    interval = exchange.node.config.views.progress_interval
    return await begin_stream(exchange, watch, names, view, target.kind, interval)


async def show(view: View, call: Call, exchange: Exchange) -> Response:
    """The state of one job."""
    job = await _visible(view, target_of(view, exchange.params), exchange)
    return Response(200, (JSON, NO_STORE), view.state(job.latest))


async def head(view: View, call: Call, exchange: Exchange) -> Response:
    """The same as headers alone."""
    job = await _visible(view, target_of(view, exchange.params), exchange)
    state = msgspec.json.decode(view.state(job.latest))
    headers = [(name, _header_value(state.get(member, ""))) for name, member in view.headers.items()]
    return Response(200, (JSON, NO_STORE, *headers))


def _header_value(value: object) -> str:
    """Texts are the publisher's: what a header cannot carry is percent-encoded, and what it should not is cut."""
    return quote(str(value)[:MAX_HEADER], safe=_PRINTABLE)


async def create(view: View, call: Call, exchange: Exchange) -> Response | Deferred:
    """A job that must be new: 201, or 200 for a repeat."""
    target, operation = await _publish(view, call, exchange, "must")
    refused = partial(in_words, view, job_id=target.job_id)
    return await intake.answered(exchange, operation, partial(_created, view), refused)


async def update(view: View, call: Call, exchange: Exchange) -> Response | Deferred:
    """One update of a job; ``publish`` creates it, if ``userId`` is given."""
    target, operation = await _publish(view, call, exchange, "may" if call.does == "publish" else "never")
    refused = partial(in_words, view, job_id=target.job_id)
    return await intake.answered(exchange, operation, intake.updated, refused)


async def register(view: View, call: Call, exchange: Exchange) -> Response:
    """A job that is made unless it is there: 201, then 200.

    Raises:
        ApiError: 409 ``owner_fixed`` if it is another user's.
    """
    target, operation = await _publish(view, call, exchange, "must")
    owner = exchange.caller.user if operation.fields.user_id is UNSET else operation.fields.user_id
    try:
        accepted = await _decide(view, target, exchange, operation)
    except ApiError as error:
        if error.code != "job_exists":
            raise
        job = await _shown(view, target, exchange, job_channel(target.job_id))
        if job is None:  # of another kind, or gone again
            raise
        if job.latest.user_id != owner:
            message = f"{view.noun} {view.id_of(target.job_id)!r} has another owner, and the owner never changes"
            raise ApiError(409, "owner_fixed", message) from None
        accepted = Accepted(job.latest.offset, job.latest.version, True, False, job)
    return _created(view, exchange, accepted)


async def health(view: View, call: Call, exchange: Exchange) -> Response:
    """Whether the server works; how its connections are, for those who may know."""
    node = exchange.node
    for name, value in exchange.params.items():
        check_parameter_id(name, value)
    answer: dict[str, object] = {"status": "healthy" if node.broker.available is None else "unhealthy"}
    try:
        identity = await node.authenticator.identify(exchange.request)
    except ApiError as error:
        if error.status != 503:
            raise
        identity = None  # the application cannot say who asks: it is not its health that is asked for
    if identity is not None and identity.can("ops"):
        answer |= await stats(node)
    return json_answer(200, answer)


async def _publish(
    view: View, call: Call, exchange: Exchange, create: Literal["must", "may", "never"]
) -> tuple[Target, Publish]:
    target = target_of(view, exchange.params)
    decode = partial(read_update, view, target, call.sets)
    fields = await intake.read_fields(exchange, decode, optional=bool(call.sets))
    key = intake.idempotency_key(exchange)
    return target, Publish(target.job_id, fields, create, exchange.caller.user, key, view.name)


async def _decide(view: View, target: Target, exchange: Exchange, operation: Publish) -> Accepted:
    try:
        return await intake.decide(exchange, operation)
    except ApiError as error:
        raise in_words(view, error, target.job_id) from None


def _created(view: View, exchange: Exchange, accepted: Accepted) -> Response:
    status = 200 if accepted.duplicate else 201
    if accepted.spooled:
        return intake.spooled(exchange, accepted)
    job = accepted.job
    shown = None
    # To publish is not to read: what was there before is shown to those who may see it.
    if job is not None and (status == 201 or exchange.caller.may_read(job.latest.job_id, job.latest.user_id)):
        shown = Raw(view.state(job.latest))
    answer = {view.noun: shown} | intake.receipt(exchange, accepted)
    return json_answer(status, answer, ("Location", exchange.request.path))


async def _visible(view: View, target: Target, exchange: Exchange) -> Job:
    """The job as shown now, if the caller may see it; else it does not exist."""
    job = await _shown(view, target, exchange, channel_of_job(exchange.caller, target.job_id))
    # Asked of a job that is not there as well, so that the one takes as long as the other.
    may_read = exchange.caller.may_read(target.job_id, "" if job is None else job.latest.user_id)
    if job is None or not may_read:
        raise in_words(view, ApiError(404, "job_not_found", ""), target.job_id)
    return job


async def _shown(view: View, target: Target, exchange: Exchange, channel: str) -> Job | None:
    """The job as its channel has it now, if it is of the view's kind."""
    node = exchange.node
    await node.broker.follow((channel,))
    job = node.jobs.get(target.job_id)
    return None if job is None or (target.kind and job.latest.kind != target.kind) else job


class Handled(NamedTuple):
    """What a call needs: its handler, the capability, and whether anybody may make it."""

    handler: Callable[[View, Call, Exchange], Awaitable[Response | Stream | Deferred | None]]
    capability: str = ""
    public: bool = False


_DOES: Final = {
    "stream": Handled(stream),
    "show": Handled(show),
    "head": Handled(head),
    "create": Handled(create, "publish"),
    "update": Handled(update, "publish"),
    "publish": Handled(update, "publish"),
    "register": Handled(register, "publish"),
    "health": Handled(health, public=True),
}


def handlers_of(view: View) -> Iterator[tuple[Call, Handler, Handled]]:
    """Every call of a view with what answers it."""
    for call in view.calls:
        handled = _DOES[call.does]
        yield call, partial(handled.handler, view, call), handled
