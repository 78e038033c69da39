"""Event streams (WHATWG HTML 9.2): snapshot, then every update, each with the reader's cursor as its ``id``."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Final

from protocol.errors import ApiError
from protocol.http1 import LAST_CHUNK
from protocol.messages import server_message, snapshot_parts, whole
from protocol.update import Job, format_time
from protocol.watch import Watch, parse_watch, wants_all
from protocol.wire import Framing, WireForm, select_fields, wire_form
from server.answers import Response
from server.connection import Exchange
from server.hub import Want
from server.ids import new_id
from server.node import Stream
from server.reading import Start, channels_for, live, missed_updates, over, snapshot, start_from
from server.socketio import all_acknowledged, receive, send_all
from server.transports.live import DISCONNECTED, LiveReader

HEADERS: Final = (
    ("Content-Type", "text/event-stream"),
    ("Cache-Control", "no-cache, no-transform"),
    ("X-Accel-Buffering", "no"),
)
# What EventSource waits before it reconnects, in milliseconds; browsers' own default is about the same.
RETRY_MS: Final = 3000
# A replay is framed in pieces of this many updates, some tens of kilobytes.
REPLAY_UPDATES: Final = 64
# A client has nothing to say on an event stream; one that talks all the same is cut off after this much.
CHATTER_BYTES: Final = 65536
GOODBYE_S: Final = 5.0


async def stream(exchange: Exchange) -> Response | Stream:
    """``GET /api/v2/jobs/stream``: begins the stream."""
    node, request, identity = exchange.node, exchange.request, exchange.caller
    watch = parse_watch(request.query)
    names = channels_for(identity, watch, all_jobs=wants_all(request.query))
    cursor = request.header("last-event-id") or request.query.get("last_seen")
    await node.broker.follow(names, cursor)
    begin = start_from(node.history, cursor)
    if watch.job_ids is not None and begin.after is not None and _nothing_left(exchange, watch, names, begin.after):
        return Response(204)  # the one answer after which EventSource stays away
    connection = exchange.connection
    client_id = new_id()
    await node.presence.admit(client_id, identity.user)
    head = connection.http.start_stream(200, [*exchange.headers(), *HEADERS], close=True)
    framing = Framing.SSE_CHUNKED if connection.http.chunked else Framing.SSE
    reader = EventStream(exchange, watch, names, wire_form(framing, watch.fields), client_id)
    reader.enter(identity)
    connected = server_message(
        "connected",
        clientId=client_id,
        userId=identity.user,
        heartbeat=whole(node.config.server.heartbeat),
        timestamp=format_time(int(time.time() * 1000)),
    )
    reader.begin(head, connected, begin)
    return reader


def _nothing_left(exchange: Exchange, watch: Watch, names: list[str], after: int) -> bool:
    node = exchange.node
    return all(over(node.jobs, node.history, name) for name in names) and not missed_updates(
        node.history, ((name, watch.filter) for name in names), after
    )


class EventStream(LiveReader):
    """One event stream."""

    __slots__ = ("_drain_delay_ms", "_names", "_watch")

    transport = "sse"
    takes_notices = False

    def __init__(self, exchange: Exchange, watch: Watch, names: list[str], form: WireForm, client_id: str) -> None:
        connection = exchange.connection
        super().__init__(
            exchange.node,
            connection.sock,
            connection.nursery,
            form,
            client_id=client_id,
            address=exchange.address,
        )
        self._watch = watch
        self._names = names
        self._drain_delay_ms = 0

    def begin(self, head: bytes, connected: bytes, start: Start) -> None:
        """Register and queue the beginning, in one step: nothing can fall between snapshot and tail."""
        node, watch = self.node, self._watch
        node.hub.attach(self, [(name, Want(watch.filter, self.form)) for name in self._names])
        self.settle()
        self.offset = node.history.last
        if watch.job_ids is not None:
            self.open_jobs = self._still_open()
        node.counters.begin(resumed=start.after is not None, lost=start.lost)
        first = head + self.form.message(connected, start.given, RETRY_MS)
        if start.lost:
            self.post(first + self._reset(start.given), self._snapshot())
        elif start.after is None:
            self.post(first, self._snapshot())
        else:
            missed = missed_updates(node.history, ((name, watch.filter) for name in self._names), start.after)
            node.counters.replayed += len(missed)
            epoch = node.history.epoch
            pieces = (
                self.form.updates(missed[start : start + REPLAY_UPDATES], epoch)
                for start in range(0, len(missed), REPLAY_UPDATES)
            )
            self.post(first, pieces)

    def _still_open(self) -> set[str]:
        assert self._watch.job_ids is not None
        node = self.node
        return {
            job_id
            for job_id, name in zip(self._watch.job_ids, self._names, strict=True)
            if not over(node.jobs, node.history, name)
        }

    def reopened(self) -> set[str]:
        """A higher attempt may have reopened jobs that had ended on this stream."""
        assert self._watch.job_ids is not None
        named = zip(self._watch.job_ids, self._names, strict=True)
        return {job_id for job_id, name in named if live(self.node.jobs, name)}

    def _reset(self, cursor: str | None) -> bytes:
        return self.form.message(
            server_message("reset", reason="the log no longer reaches back to your cursor"), cursor
        )

    def _snapshot(self) -> Iterator[bytes]:
        """Snapshot events as of now; the jobs are picked at once, the text is made as the socket takes it."""
        jobs = snapshot(self.node.jobs, self._names, self._watch.filter)
        return self._snapshot_events(jobs, f"{self.node.history.epoch}:{self.node.history.last}")

    def _snapshot_events(self, jobs: list[Job], cursor: str) -> Iterator[bytes]:
        fields = self._watch.fields
        records = (job.latest.body if fields is None else select_fields(job.latest.body, fields) for job in jobs)
        for message, is_last in snapshot_parts(records, "jobs", b'{"type":"snapshot"}', b"{}"):
            yield self.form.message(message, cursor if is_last else None)

    def on_log_lost(self) -> None:
        """Tell the client with the reset that its cursor is void, and begin anew."""
        if self._watch.job_ids is not None:
            self.open_jobs = self._still_open()
        self.post(self._reset(None), self._snapshot())

    async def serve(self) -> None:
        """Read until the client closes; what it says meanwhile means nothing."""
        left = CHATTER_BYTES
        while left > 0 and (data := await receive(self.sock)):
            left -= len(data)

    def alive(self) -> bool:
        """An event stream has no answers; that its kernel acknowledged everything has to do."""
        return self.caught_up and all_acknowledged(self.sock)

    def heartbeat(self, message: bytes) -> None:
        """With the reader's cursor, so that a quiet reader's cursor moves with the log."""
        self.post(self.form.message(message, self.cursor()))

    def drain(self, delay_ms: int) -> None:
        """The server goes away: end, and have the client come back after ``delay_ms``."""
        self._drain_delay_ms = delay_ms
        self.finish("drain")

    async def goodbye(self) -> None:
        """Say why the stream ends, if the client can still hear it, and end it."""
        last = b""
        if self.ended == "expired":
            error = server_message("error", code="token_expired", message="the token has expired")
            last = self.form.message(error, self.final_cursor)
        elif self.ended == "disconnected":
            error = server_message("error", code="disconnected", message=DISCONNECTED)
            last = self.form.message(error, self.final_cursor)
        elif self.ended == "drain":
            error = server_message("error", code="try_later", message="this server is going away; reconnect")
            last = self.form.message(error, self.final_cursor, self._drain_delay_ms)
        elif self.ended != "finished":
            return  # gone, stalled, or too far behind: nothing more would arrive
        await self.say_last(last + (LAST_CHUNK if self.form.framing is Framing.SSE_CHUNKED else b""), GOODBYE_S)


async def try_later(exchange: Exchange, error: ApiError) -> None:
    """Turn an ``EventSource`` away for now: it would never come back after a 429 or 503, but obeys ``retry:``."""
    connection = exchange.connection
    head = connection.http.start_stream(200, [*exchange.headers(), *HEADERS], close=True)
    framing = Framing.SSE_CHUNKED if connection.http.chunked else Framing.SSE
    delay_ms = max(exchange.node.retry_delay_ms(), 1000 * (error.retry_after or 0))
    message = server_message("error", code="try_later", message=error.message)
    event = wire_form(framing).message(message, None, delay_ms)
    await send_all(connection.sock, head + event + connection.http.end_stream())
