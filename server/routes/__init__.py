"""Every path this server answers, as one table, and the way a request takes to its handler."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Final, NamedTuple

from protocol.errors import ApiError
from protocol.notice_view import VIEW as NOTICES
from protocol.view import View
from protocol.views import all_views
from protocol.views.jobs import VIEW as JOBS
from server.answers import Response, error_answer
from server.auth import unauthorized
from server.exchange import Deferred, Disconnected, Exchange
from server.node import Stream
from server.origins import check_host, check_origin, preflight_headers
from server.routes import descriptions, health, jobs, notices, operations, page, webhooks
from server.routes.views import handlers_of
from server.transports.echo import echo_socket
from server.transports.longpoll import poll
from server.transports.notices import notice_stream
from server.transports.sse import stream, try_later
from server.transports.websocket import jobs_socket

Handler = Callable[[Exchange], Awaitable[Response | Stream | Deferred | None]]


class Route(NamedTuple):
    """How one method of one path is answered.

    Attributes:
        handler: gives the answer, or what waits for it, or a stream that has begun, or None if all is said already.
        capability: what the caller must be allowed, "" if being known is enough.
        public: nobody is asked who they are.
        always: answered while draining and over connection limits, too.
        view: in whose words.
        head: HEAD is answered like GET, without the body; streams and polls are no resource that it could describe.
    """

    handler: Handler
    capability: str = ""
    public: bool = False
    always: bool = False
    view: View = JOBS
    head: bool = True


# A segment in braces matches any one segment that is not empty; a literal one is preferred. The paths of the views
# are added below.
ROUTES: Final[dict[str, dict[str, Route]]] = {
    "/": {"GET": Route(page.index, public=True)},
    **{f"/{name}": {"GET": Route(page.file, public=True)} for name in page.FILES},
    "/openapi.json": {"GET": Route(descriptions.openapi, public=True)},
    "/asyncapi.json": {"GET": Route(descriptions.asyncapi, public=True)},
    "/health": {"GET": Route(health.health, public=True, always=True)},
    "/ready": {"GET": Route(health.ready, public=True, always=True)},
    "/metrics": {"GET": Route(operations.metrics, "ops", always=True)},
    "/api/v2/stats": {"GET": Route(operations.stats, "ops")},
    "/api/v2/me": {"GET": Route(operations.me)},
    "/api/v2/jobs": {"GET": Route(jobs.list_jobs), "POST": Route(jobs.create, "publish")},
    "/api/v2/jobs/poll": {"GET": Route(poll, head=False)},
    "/api/v2/jobs/stream": {"GET": Route(stream, head=False)},
    "/api/v2/jobs/{jobId}": {"GET": Route(jobs.show), "DELETE": Route(jobs.delete, "publish")},
    "/api/v2/jobs/{jobId}/updates": {"POST": Route(jobs.update, "publish")},
    "/api/v2/jobs/{jobId}/history": {"GET": Route(jobs.history)},
    "/api/v2/jobs/{jobId}/cancel": {"POST": Route(jobs.cancel)},
    "/api/v2/updates": {"POST": Route(jobs.publish_batch, "publish")},
    "/api/sse": {"GET": Route(notice_stream, head=False, view=NOTICES)},
    "/api/sse/message": {"POST": Route(notices.send_message, "notify")},
    "/api/sse/ack": {"POST": Route(notices.acknowledge)},
    "/api/sse/connections": {"GET": Route(notices.list_connections, "ops")},
    "/api/sse/users/{userId}": {
        "GET": Route(notices.show_user),
        "DELETE": Route(notices.disconnect_user, "ops"),
    },
    "/api/sse/clients/{clientId}": {
        "GET": Route(notices.show_client),
        "DELETE": Route(notices.disconnect_client, "ops"),
    },
    # Who sends it shows in its signature.
    "/api/webhooks/{name}": {"POST": Route(webhooks.receive, public=True)},
    # Says who it is after the handshake, if not in it.
    "/ws/jobs": {"GET": Route(jobs_socket, public=True, head=False)},
}
_ALWAYS: Final = frozenset(path for path, methods in ROUTES.items() if any(route.always for route in methods.values()))
_ECHO: Final = {"GET": Route(echo_socket, public=True, head=False)}


async def answer(exchange: Exchange) -> Stream | Deferred | None:
    """Answer one request, whatever happens, and log it. Gives the stream that it began, if it did, or what waits for
    an answer: for that there is ``late_answer``.

    Raises:
        OSError: the connection failed while the answer was sent.
        Disconnected: the peer went away while its request was read.
    """
    connection, request = exchange.connection, exchange.request
    code: str | None = None
    failure: Exception | None = None
    try:
        response = await _route(exchange)
    except ApiError as error:
        if error.status in (429, 503) and request.method == "GET" and request.accepts_event_stream:
            exchange.log(error.status, "try_later")
            connection.take_over()
            await try_later(exchange, error, *_worded(exchange))
            return None
        code = error.code
        response = error_answer(error, exchange.request_id)
    except (OSError, Disconnected):
        raise
    except Exception as error:
        failure, code = error, "internal_error"
        response = _internal_error(exchange)
    if isinstance(response, Deferred):
        return response
    if not isinstance(response, Response):
        exchange.log(200, client_id=None if response is None else response.client_id)
        return response
    exchange.log(response.status, code, failure)
    if failure is not None and not connection.can_answer:
        connection.take_over()  # a stream had begun: all that can be said is that it ends
        return None
    await connection.respond(exchange, response)
    return None


def late_answer(exchange: Exchange, deferred: Deferred, late: bool) -> Response:
    """The answer to a request that has waited, whatever happens; logged. Does not wait."""
    code: str | None = None
    failure: Exception | None = None
    try:
        response = deferred.answer(late=late)
        if exchange.request.method in ("GET", "HEAD"):
            _note_seen(exchange)
    except ApiError as error:
        code = error.code
        response = error_answer(error, exchange.request_id)
    except Exception as error:
        failure, code = error, "internal_error"
        response = _internal_error(exchange)
    exchange.log(response.status, code, failure)
    return response


def _internal_error(exchange: Exchange) -> Response:
    message = "something went wrong here; the log has it under this request id"
    return error_answer(ApiError(500, "internal_error", message), exchange.request_id)


def _note_seen(exchange: Exchange) -> None:
    """Its user has been shown something. Said then and not before: what a poll shows it may have waited for."""
    if exchange.identity is not None:
        exchange.node.seen.note(exchange.identity.user)


async def _route(exchange: Exchange) -> Response | Stream | Deferred | None:
    node, request = exchange.node, exchange.request
    if request.path.removeprefix(node.config.server.base_path) not in _ALWAYS:
        if exchange.connection.refusal is not None:
            raise exchange.connection.refusal
        node.check_accepting()
    check_host(request, node.authenticator.open)
    check_origin(request, node.origins, websocket=False)
    path, methods = _find(exchange)
    exchange.route = ("OPTIONS" if request.method == "OPTIONS" else "", path)
    if request.method == "OPTIONS":
        allow = ("Allow", ", ".join(_methods(methods)))
        return Response(204, [allow, *preflight_headers(request, _methods(methods))])
    route = methods.get(request.method)
    if route is None and request.method in _methods(methods):  # HEAD, where GET says what to answer
        route = methods["GET"]
    if route is None:
        allowed = ", ".join(_methods(methods))
        raise ApiError(405, "method_not_allowed", f"{request.path} takes {allowed}", headers=(("Allow", allowed),))
    exchange.route = (request.method, path)
    if not route.public:
        exchange.identity = await node.authenticator.identify(request)
        if exchange.identity is None:
            raise unauthorized()
        if route.capability and not exchange.identity.can(route.capability):
            raise ApiError(403, "forbidden", f"this needs the capability {route.capability!r}")
    response = await route.handler(exchange)
    if request.method in ("GET", "HEAD") and not isinstance(response, Deferred):
        _note_seen(exchange)
    return response


def _find(exchange: Exchange) -> tuple[str, Mapping[str, Route]]:
    """The table entry for a request's path; sets the exchange's params.

    Raises:
        ApiError: 404.
    """
    path = exchange.request.path
    base = exchange.node.config.server.base_path
    if path == "*":
        return path, {}
    if base:
        if not (path == base or path.startswith(base + "/")):
            raise _not_found(path)
        path = path[len(base) :] or "/"
    methods = ROUTES.get(path)
    if methods is not None:
        return path, methods
    if path == "/ws/echo" and exchange.node.config.debug.echo:
        return path, _ECHO
    segments = path.split("/")
    for template, names in _TEMPLATES.get(len(segments), ()):
        if all(map(_fits, names, segments)) and not (template.startswith("/api/{") and segments[2] in _TAKEN):
            exchange.params = {
                name: segment for (_, name), segment in zip(names, segments, strict=True) if name is not None
            }
            return template, ROUTES[template]
    raise _not_found(path)


def _fits(part: tuple[str, str | None], segment: str) -> bool:
    text, name = part
    return text == segment if name is None else segment not in ("", ".", "..")


def _worded(exchange: Exchange) -> tuple[View, str | None]:
    """The view that a request asked for, and the job in its words, however far the request came."""
    try:
        _, methods = _find(exchange)
    except ApiError:
        return JOBS, None
    route = methods.get("GET")
    view = JOBS if route is None else route.view
    return view, exchange.params.get(view.variable)


def add_view(view: View) -> None:
    """Answer a view's calls.

    Raises:
        ValueError: one of them is another's already.
    """
    for call, handler, handled in handlers_of(view):
        methods = ROUTES.setdefault(call.path, {})
        if call.method in methods:
            raise ValueError(f"view {view.name!r}: {call.method} {call.path} is taken")
        head = call.does != "stream"
        methods[call.method] = Route(handler, handled.capability, handled.public, view=view, head=head)


def _templates() -> dict[int, list[tuple[str, list[tuple[str, str | None]]]]]:
    """The paths with variable segments by their number of segments; each segment as (text, name or None).

    In the order in which they are tried: where two begin alike, the one whose next segment is literal comes first.
    """
    templates: dict[int, list[tuple[str, list[tuple[str, str | None]]]]] = {}
    for path in sorted(ROUTES, key=lambda path: [part.startswith("{") for part in path.split("/")]):
        if "{" in path:
            parts = [(part, part[1:-1] if part.startswith("{") else None) for part in path.split("/")]
            templates.setdefault(len(parts), []).append((path, parts))
    return templates


for _view in all_views().values():
    add_view(_view)
_TEMPLATES: Final = _templates()
# What has paths of its own below /api is no app: ``/api/v2/progress/x`` is nothing, and will stay free.
_TAKEN: Final = frozenset(path.split("/")[2] for path in ROUTES if path.startswith("/api/") and path[5] != "{")


def _methods(methods: Mapping[str, Route]) -> list[str]:
    head = ["HEAD"] if "GET" in methods and "HEAD" not in methods and methods["GET"].head else []
    return [*methods, *head, "OPTIONS"]


def _not_found(path: str) -> ApiError:
    return ApiError(404, "not_found", f"there is nothing at {path[:200]}")
