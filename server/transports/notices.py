"""``/api/sse``: an event stream of notifications, with named events."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from protocol.messages import whole
from protocol.notice import parse_channels, parse_username
from protocol.notice_view import VIEW as NOTICES
from protocol.update import Update
from protocol.wire import Framing, WireForm, wire_form
from server.exchange import Exchange
from server.ids import new_id
from server.node import Stream
from server.notices import check_join, notified_user, owed
from server.reading import Start, start_from
from server.transports.sse import HEADERS, REPLAY_UPDATES, RETRY_MS, SseReader


async def notice_stream(exchange: Exchange) -> Stream:
    """``GET /api/sse?userId=&username=&channels=&last_seen=``: begins the stream."""
    node, request, identity = exchange.node, exchange.request, exchange.caller
    user = notified_user(exchange)
    channels = parse_channels(request.query) or []
    for channel in channels:
        check_join(node, identity, channel)
    username = parse_username(request.query)
    cursor = request.header("last-event-id") or request.query.get("last_seen")
    await node.broker.follow((), cursor)
    if user != identity.user:
        identity = replace(identity, user=user)
    client_id = new_id()
    await node.presence.admit(client_id, identity.user)
    connection = exchange.connection
    head = connection.http.start_stream(200, [*exchange.headers(), *HEADERS], close=True)
    framing = Framing.SSE_CHUNKED if connection.http.chunked else Framing.SSE
    reader = NoticeStream(exchange, wire_form(framing, None, NOTICES), client_id)
    reader.username = username
    try:
        reader.enter(identity)
        for channel in channels:
            node.presence.join(reader, channel)
        reader.begin(head, start_from(node.history, cursor))
    except Exception:
        reader.close()  # nobody has taken it over yet
        raise
    return reader


class NoticeStream(SseReader):
    """One stream of notifications."""

    __slots__ = ()

    takes_notices = True

    def begin(self, head: bytes, start: Start) -> None:
        """Greet, and queue what it is owed. It is in ``presence`` by now, so what comes later comes live."""
        node = self.node
        node.hub.enter(self)
        self.offset = node.history.last
        notices, _ = owed(node, start, self.user, self.heard())
        node.counters.begin(resumed=start.after is not None, lost=start.lost)
        node.counters.replayed += len(notices)
        # No cursor runs ahead of what is still to come; without that, the stream stands at the log's end.
        cursor = start.given if notices or start.lost else self.cursor()
        connected = self._say(
            "connected",
            cursor,
            RETRY_MS,
            clientId=self.client_id,
            userId=self.user,
            username=self.username,
            channels=list(self.channels),
            heartbeat=whole(node.config.server.heartbeat),
            **node.liveness(),
        )
        first = head + connected
        if start.lost:
            first += self._reset(None if notices else self.cursor())
        self.post(first, self._replay(notices))

    def _reset(self, cursor: str | None) -> bytes:
        reason = "the log no longer reaches back to your cursor: notifications that were not stored may be missing"
        return self._say("reset", cursor, message=reason)

    def _replay(self, notices: list[Update]) -> Iterator[bytes]:
        """What it is owed as of now, in pieces; the last one has the cursor behind all of it."""
        return _pieces(self.form, notices, self.hub.history.epoch, self.hub.history.last)

    def on_log_lost(self) -> None:
        """Tell the client that its cursor is void, and what is stored for it."""
        notices = self.node.broker.inboxes.of_user(self.user)
        self.post(self._reset(None if notices else self.cursor()), self._replay(notices))


def _pieces(form: WireForm, notices: list[Update], epoch: str, end: int) -> Iterator[bytes]:
    for start in range(0, len(notices) - 1, REPLAY_UPDATES):
        yield form.updates(notices[start : min(start + REPLAY_UPDATES, len(notices) - 1)], epoch)
    if notices:
        yield form.update(notices[-1], f"{epoch}:{end}")
