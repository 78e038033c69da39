"""Event streams (WHATWG HTML 9.2): snapshot, then every update, each with the reader's cursor as its ``id``."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Final

from protocol.errors import ApiError
from protocol.http1 import LAST_CHUNK
from protocol.messages import snapshot_parts, whole
from protocol.update import Job, Update, format_time
from protocol.view import View, control
from protocol.views.jobs import VIEW as JOBS
from protocol.watch import ANY, Filter, Watch, parse_watch, wants_all
from protocol.wire import Framing, WireForm, wire_form
from server.answers import Response
from server.channel import Want
from server.exchange import Exchange
from server.ids import new_id
from server.node import Node, Stream
from server.reading import Start, channels_for, live, missed_updates, over, records, snapshot, start_from
from server.socketio import RECEIVE_BYTES, all_acknowledged
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
    watch = parse_watch(exchange.request.query)
    names = channels_for(exchange.caller, watch, all_jobs=wants_all(exchange.request.query))
    return await begin_stream(exchange, watch, names, JOBS)


async def begin_stream(
    exchange: Exchange, watch: Watch, names: list[str], view: View, kind: str = "", min_interval_s: float = 0.0
) -> Response | Stream:
    """Begin a stream of what is watched, or answer 204 if nothing of it is left to be told.

    Args:
        names: the channels of ``watch``, in its order.
        view: how it is worded.
        kind: jobs of other kinds do not exist in the view; "" for any.
        min_interval_s: at most one update per job in so many seconds, the newest; 0 for all of them.
    """
    node, request, identity = exchange.node, exchange.request, exchange.caller
    cursor = request.header("last-event-id") or request.query.get("last_seen")
    await node.broker.follow(names, cursor)
    begin = start_from(node.history, cursor)
    if watch.job_ids is not None and begin.after is not None and _nothing_left(node, watch, names, kind, begin.after):
        return Response(204)  # the one answer after which EventSource stays away
    connection = exchange.connection
    client_id = new_id()
    await node.presence.admit(client_id, identity.user)
    begin = start_from(node.history, cursor)  # the log may have moved on meanwhile
    head = connection.http.start_stream(200, [*exchange.headers(), *HEADERS], close=True)
    form = wire_form(_framing(exchange), watch.fields, view, kind)
    reader = EventStream(exchange, watch, names, form, client_id)
    reader.min_interval_s = min_interval_s
    try:
        reader.enter(identity)
        reader.begin(head, begin)
    except Exception:
        reader.close()  # nobody has taken it over yet
        raise
    return reader


def _framing(exchange: Exchange) -> Framing:
    return Framing.SSE_CHUNKED if exchange.connection.http.chunked else Framing.SSE


def _nothing_left(node: Node, watch: Watch, names: list[str], kind: str, after: int) -> bool:
    return all(over(node.jobs, node.history, name, kind) for name in names) and not any(
        watch.filter.passes(update) for update in missed_updates(node.history, names, after)
    )


def say(form: WireForm, name: str, cursor: str | None = None, retry_ms: int | None = None, **facts: object) -> bytes:
    """One of the server's own messages, framed, with the time; b"" if the view has no such message."""
    now_ms = int(time.time() * 1000)
    message = control(form.view, name, {"now": now_ms if form.view.unix_ms else format_time(now_ms), **facts})
    return b"" if message is None else form.message(message.text, cursor, retry_ms, message.event)


# Ends of which the client is told: code and message of the error.
_REASONS: Final = {
    "expired": ("token_expired", "the token has expired"),
    "disconnected": ("disconnected", DISCONNECTED),
    "drain": ("try_later", "this server is going away; reconnect"),
}


class SseReader(LiveReader):
    """One event stream, whatever it tells of."""

    __slots__ = ("_chatter", "_drain_delay_ms")

    transport = "sse"

    def __init__(self, exchange: Exchange, form: WireForm, client_id: str) -> None:
        connection = exchange.connection
        super().__init__(exchange.node, connection.sock, form, client_id=client_id, address=exchange.address)
        self._drain_delay_ms = 0
        self._chatter = 0

    def _say(self, name: str, cursor: str | None, retry_ms: int | None = None, **facts: object) -> bytes:
        """One of the server's own messages, framed."""
        return say(self.form, name, cursor, retry_ms, **facts)

    async def serve(self) -> bool:
        """Read until the client closes; what it says meanwhile means nothing."""
        data = self.sock.recv(RECEIVE_BYTES)
        self._chatter += len(data)
        if not data or self._chatter >= CHATTER_BYTES:
            self.finish("closed")
        return False

    def alive(self) -> bool:
        """An event stream has no answers; that its kernel acknowledged everything has to do."""
        return self.caught_up and all_acknowledged(self.sock)

    def heartbeat(self) -> None:
        """With the reader's cursor, so that a quiet reader's cursor moves with the log."""
        self.post(self._say("heartbeat", self.cursor(), **self.node.liveness()))

    def drain(self, delay_ms: int) -> None:
        """The server goes away: end, and have the client come back after ``delay_ms``."""
        self._drain_delay_ms = delay_ms
        self.finish("drain")

    async def goodbye(self) -> None:
        """Say why the stream ends, if the client can still hear it, and end it."""
        if self.ended == "finished":
            last = b""
        elif self.ended in _REASONS:
            code, message = _REASONS[self.ended]
            delay_ms = self._drain_delay_ms if self.ended == "drain" else None
            last = self._say("error", self.final_cursor, delay_ms, code=code, message=message)
        else:
            return  # gone, stalled, or too far behind: nothing more would arrive
        await self.say_last(last + (LAST_CHUNK if self.form.framing is Framing.SSE_CHUNKED else b""), GOODBYE_S)


class EventStream(SseReader):
    """The event stream of some jobs."""

    __slots__ = ("_names", "_watch")

    takes_notices = False

    def __init__(self, exchange: Exchange, watch: Watch, names: list[str], form: WireForm, client_id: str) -> None:
        super().__init__(exchange, form, client_id)
        self._watch = watch
        self._names = names

    def begin(self, head: bytes, start: Start) -> None:
        """Register and queue the beginning, in one step: nothing can fall between snapshot and tail."""
        node, watch = self.node, self._watch
        # Of another kind: that is settled by the form, so that all updates may take the direct way.
        wanted = ANY if self.form.kind else watch.filter
        node.hub.attach(self, self._names, Want(wanted, self.form))
        self.wants_changed()
        self.offset = node.history.last
        if watch.job_ids is not None:
            self.open_jobs = self._still_open()
        node.counters.begin(resumed=start.after is not None, lost=start.lost)
        heartbeat = whole(node.config.server.heartbeat)
        facts = {"userId": self.user, "heartbeat": heartbeat, **node.liveness()}
        connected = self._say("connected", start.given, RETRY_MS, **facts)
        first = head + connected
        if start.lost:
            self.post(*self._snapshot(first + self._reset(start.given)))
        elif start.after is None:
            self.post(*self._snapshot(first))
        else:
            missed = missed_updates(node.history, self._names, start.after)
            self.post(first, replay(node, self.form, missed, watch.filter))

    def _say(self, name: str, cursor: str | None, retry_ms: int | None = None, **facts: object) -> bytes:
        view = self.form.view
        if view.render is not None and self._watch.job_ids is not None:
            facts["id"] = view.id_of(self._watch.job_ids[0])
        return super()._say(name, cursor, retry_ms, clientId=self.client_id, **facts)

    def _still_open(self) -> set[str]:
        assert self._watch.job_ids is not None
        node = self.node
        return {
            job_id
            for job_id, name in zip(self._watch.job_ids, self._names, strict=True)
            if not over(node.jobs, node.history, name, self.form.kind)
        }

    def reopened(self) -> set[str]:
        """A higher attempt may have reopened jobs that had ended on this stream; those of another kind never did."""
        assert self._watch.job_ids is not None
        if self.form.kind:
            return self._still_open()
        named = zip(self._watch.job_ids, self._names, strict=True)
        return {job_id for job_id, name in named if live(self.node.jobs, name)}

    def _reset(self, cursor: str | None) -> bytes:
        return self._say("reset", cursor, message="the log no longer reaches back to your cursor")

    def _snapshot(self, before: bytes) -> list[bytes | Iterator[bytes]]:
        """Snapshot events as of now, behind what comes before them; the jobs are picked at once, the text of several is
        made as the socket takes it."""
        jobs = snapshot(self.node.jobs, self._names)
        events = self._snapshot_events(jobs, f"{self.node.history.epoch}:{self.node.history.last}")
        return [before, events] if len(jobs) > 1 else [before + b"".join(events)]

    def _snapshot_events(self, jobs: list[Job], cursor: str) -> Iterator[bytes]:
        wanted, fields = self._watch.filter, self._watch.fields
        if self.form.view.render is not None:
            yield from (self.form.update(job.latest, cursor) for job in jobs if wanted.passes(job.latest))
            return
        for message, is_last in snapshot_parts(records(jobs, wanted, fields), "jobs", b'{"type":"snapshot"}', b"{}"):
            yield self.form.message(message, cursor if is_last else None) if message else b""

    def on_log_lost(self) -> None:
        """Tell the client with the reset that its cursor is void, and begin anew."""
        if self._watch.job_ids is not None:
            self.open_jobs = self._still_open()
        lost = self._reset(None)
        if self.form.view.render is not None and not any(
            self._watch.filter.passes(job.latest) for job in snapshot(self.node.jobs, self._names)
        ):
            lost = self._say("error", None, code="lost", message="the store has lost what was known of it")
        self.post(*self._snapshot(lost))


def replay(node: Node, form: WireForm, missed: Iterable[Update], wanted: Filter) -> Iterator[bytes]:
    """What was missed and is wanted, or is a notification, in pieces as ``PushReader.post`` takes them."""
    return _replayed(node, form, iter(missed), wanted, node.history.epoch)


def _replayed(node: Node, form: WireForm, updates: Iterator[Update], wanted: Filter, epoch: str) -> Iterator[bytes]:
    while portion := list(islice(updates, REPLAY_UPDATES)):
        if not wanted.is_any:
            portion = [update for update in portion if update.targets is not None or wanted.passes(update)]
        node.counters.replayed += len(portion)
        yield form.updates(portion, epoch) if portion else b""


async def try_later(exchange: Exchange, error: ApiError, view: View, view_id: str | None = None) -> None:
    """Turn an ``EventSource`` away for now: it would never come back after a 429 or 503, but obeys ``retry:``.

    Args:
        view_id: the job that it asked for, in the view's words.
    """
    connection = exchange.connection
    head = connection.http.start_stream(200, [*exchange.headers(), *HEADERS], close=True)
    delay_ms = max(exchange.node.retry_delay_ms(), 1000 * (error.retry_after or 0))
    form = wire_form(_framing(exchange), None, view)
    event = say(form, "error", None, delay_ms, id=view_id, code="try_later", message=error.message)
    await connection.send(head + event + connection.http.end_stream())
