"""``/ws/jobs``: everything over one connection (RFC 6455), JSON text messages both ways."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from typing import Any, Final

import trio
from msgspec.json import encode

from protocol.errors import ApiError, CloseCode
from protocol.fields import is_id
from protocol.frames import SMALL_WINDOW_BITS, WINDOW_BITS, close_frame, ping_frame, pong_frame
from protocol.messages import (
    Ack,
    AuthMessage,
    ClientMessage,
    Get,
    NotifyMessage,
    PingMessage,
    PublishMessage,
    Ref,
    Subscribe,
    Unsubscribe,
    decode_client_message,
    error_message,
    min_interval_s,
    ref_of,
    server_message,
    snapshot_parts,
    split_ids,
    subscribe_fields,
    subscribe_filter,
    whole,
)
from protocol.notice import check_key, check_notice, heard
from protocol.update import Job, Update, format_time
from protocol.watch import ANY, Watch, job_channel, user_channel
from protocol.websocket import (
    Binary,
    CloseReceived,
    Event,
    Handshake,
    Ping,
    Text,
    WebSocketError,
    WebSocketReader,
    accept_handshake,
    close_reply,
)
from protocol.wire import Framing, WireForm, select_fields, wire_form
from server.auth import Identity
from server.connection import Exchange
from server.hub import Want
from server.ids import new_id
from server.logs import log_event
from server.node import LOG, Stream
from server.notices import acknowledge, may_join, offset_of, owed, send, split_channels
from server.origins import check_origin
from server.publishing import Batch, summary
from server.reading import (
    FRESH,
    Start,
    channel_of_job,
    channels_for,
    missed_notices,
    missed_updates,
    narrowed,
    snapshot,
    start_from,
)
from server.socketio import linger
from server.transports.live import DISCONNECTED, LiveReader
from server.transports.sse import REPLAY_UPDATES
from server.wheel import Timer

PROTOCOL: Final = "statuswire.v1"
# The same, but what goes out together comes in one frame, a message a line.
LINES: Final = "statuswire.v1.lines"
# By whether the client reads lines, and the window that messages are compressed with, if they are.
_FRAMINGS: Final = {
    (False, None): Framing.WEBSOCKET,
    (False, WINDOW_BITS): Framing.WEBSOCKET_DEFLATE,
    (False, SMALL_WINDOW_BITS): Framing.WEBSOCKET_DEFLATE_SMALL,
    (True, None): Framing.WEBSOCKET_LINES,
    (True, WINDOW_BITS): Framing.WEBSOCKET_LINES_DEFLATE,
    (True, SMALL_WINDOW_BITS): Framing.WEBSOCKET_LINES_DEFLATE_SMALL,
}
# Malformed or rate-limited messages in a row after which the client is not one of ours.
MAX_MISTAKES: Final = 10
# Publishes whose answer is still on its way; a client further ahead of the store waits.
MAX_UNANSWERED: Final = 64
# Answers to publishes that came together are sent together, so many at most.
CORKED_ANSWERS: Final = 64
GOODBYE_S: Final = 5.0
# Read at most this much before others have a turn: some 10 µs a frame, of six bytes at worst, is 30 ms.
TURN_BYTES: Final = 16384
# Whose last turn took this long is read in smaller portions and let in more slowly (``Node.heavy_turn``).
HEAVY_TURN_S: Final = 0.002
HEAVY_TURN_BYTES: Final = 2048
HEAVY_PAUSE_S: Final = 0.05
_NONE: Final[frozenset[int]] = frozenset()
# Why a session ended, where its close code says so; the others are about broken frames.
_ENDS: Final = {
    CloseCode.NORMAL: "closed",
    CloseCode.GOING_AWAY: "drain",
    CloseCode.POLICY_VIOLATION: "policy",
    CloseCode.TRY_LATER: "try_later",
    CloseCode.UNAUTHORIZED: "unauthorized",
    CloseCode.AUTH_TIMEOUT: "auth_timeout",
    CloseCode.RATE_LIMITED: "rate_limited",
}


async def jobs_socket(exchange: Exchange) -> Stream:
    """``GET /ws/jobs``: shake hands and greet; what follows is messages."""
    node, connection = exchange.node, exchange.connection
    handshake = accept(exchange)
    client_id = new_id()
    identity: Identity | None = None
    refusal: ApiError | None = None
    try:
        identity = await node.authenticator.identify(exchange.request)
        if identity is not None:
            await node.presence.admit(client_id, identity.user)
    except ApiError as error:  # a browser cannot read a refused handshake, but it can read a close code
        refusal = error
    switch = switch_protocol(exchange, handshake)
    session = Session(exchange, handshake, connection.http.hand_over(), client_id)
    try:
        if refusal is None and identity is not None:
            session.welcome(identity, before=switch)
            return session
        session.post(switch)
        if refusal is not None:
            session.refuse(refusal)
        else:
            session.await_auth()
    except Exception:
        session.close()  # nobody has taken it over yet
        raise
    return session


def accept(exchange: Exchange) -> Handshake:
    """Check a handshake. Raises ApiError 400, 403, 405, 426."""
    check_origin(exchange.request, exchange.node.origins, websocket=True)
    return accept_handshake(exchange.request, protocols=(LINES, PROTOCOL), echo_prefix="bearer.", deflate=True)


def switch_protocol(exchange: Exchange, handshake: Handshake) -> bytes:
    """The 101 answer; from here on the connection is no longer HTTP."""
    exchange.connection.take_over()
    return exchange.connection.http.respond(101, [*exchange.headers(), *handshake.headers])


class Session(LiveReader):
    """One WebSocket client."""

    __slots__ = (
        "_auth_timer",
        "_early",
        "_farewell",
        "_framing",
        "_from_inbox",
        "_heavy_s",
        "_held",
        "_incoming",
        "_joined",
        "_mistakes",
        "_notices_from",
        "_too_fast",
        "_unanswered",
    )

    transport = "websocket"
    takes_notices = True

    def __init__(self, exchange: Exchange, handshake: Handshake, early: bytes, client_id: str) -> None:
        window_bits = None if handshake.deflate is None else handshake.deflate.window_bits
        self._framing = _FRAMINGS[handshake.protocol == LINES, window_bits]
        connection = exchange.connection
        super().__init__(
            exchange.node,
            connection.sock,
            wire_form(self._framing),
            client_id=client_id,
            address=exchange.address,
        )
        self._incoming = WebSocketReader(handshake.deflate, self.node.config.limits.max_message)
        self._early = early
        self._auth_timer: Timer | None = None
        self._farewell: bytes | None = None
        self._heavy_s = -1.0  # seconds of the last turn if it was a heavy one; nothing is known of it yet
        self._held = 0  # bytes of a message that is not whole yet
        self._mistakes = 0
        self._too_fast = 0
        self._unanswered = 0
        # Notifications behind these offsets have been given: those for the client itself, and those of channels.
        self._notices_from = 0
        self._joined: dict[str, int] | None = None
        self._from_inbox: frozenset[int] = _NONE  # and these besides

    # Beginning and end

    def await_auth(self) -> None:
        """Give the client some time to say who it is."""
        self._auth_timer = self.wheel.after(
            self.node.config.limits.auth_timeout,
            lambda: self.close_with(CloseCode.AUTH_TIMEOUT, "no auth message came in time"),
        )

    def welcome(self, identity: Identity, ref: Ref = None, before: bytes = b"") -> None:
        """The client is known now, and was admitted. ``before`` goes out in front of the greeting, with it."""
        if self._auth_timer is not None:
            self._auth_timer.cancel()
            self._auth_timer = None
        self.enter(identity)
        # Known to the hub from here on, though on no channel yet: should the log be lost, it is told.
        self.hub.attach(self, ())
        self.offset = self.hub.history.last
        stored = owed(self.node, FRESH, identity.user, set())
        greeting = server_message(
            "connected",
            clientId=self.client_id,
            userId=identity.user,
            heartbeat=whole(self.node.config.server.heartbeat),
            id=f"{self.hub.history.epoch}:{stored.before}",
            ref=ref,
            **self.node.liveness(),
        )
        self.post(before + self.form.message(greeting))
        self._give_stored(stored.notices)

    def _give_stored(self, notices: list[Update]) -> None:
        """Notifications that were stored for this user; from here on all others come live."""
        self._notices_from = self.hub.history.last
        self._from_inbox = frozenset([notice.offset for notice in notices])
        if notices:
            self.post(self._replayed(self.form, notices))

    def _replayed(self, form: WireForm, updates: list[Update]) -> Iterator[bytes]:
        epoch = self.hub.history.epoch
        return (
            form.updates(updates[start : start + REPLAY_UPDATES], epoch)
            for start in range(0, len(updates), REPLAY_UPDATES)
        )

    def refuse(self, error: ApiError, ref: Ref = None) -> None:
        """The client is not let in: a bad token, or too many connections."""
        if error.status in (401, 403):
            self.close_with(CloseCode.UNAUTHORIZED, error.message)
            return
        self.post(self.form.message(error_message(error, ref)))
        self.close_with(CloseCode.RATE_LIMITED if error.status == 429 else CloseCode.TRY_LATER, error.message)

    def close_with(self, code: CloseCode, reason: str) -> None:
        """End the connection with a close frame. Must not wait."""
        if not self.ended:
            self._farewell = close_frame(code, reason)
            self.finish(_ENDS.get(code, "protocol"))

    def drain(self, delay_ms: int) -> None:
        """The server goes away; the digits in the reason are the reconnect delay in milliseconds."""
        self.close_with(CloseCode.GOING_AWAY, f"going away, reconnect in {delay_ms} ms")

    def close(self) -> None:
        super().close()
        if self._held:
            self._account(0)
        if self._auth_timer is not None:
            self._auth_timer.cancel()

    async def goodbye(self) -> None:
        """Send the close frame this end calls for, if the peer can still take it, and let it arrive."""
        frame = self._farewell
        if self.ended == "expired":
            frame = close_frame(CloseCode.UNAUTHORIZED, "the token has expired")
        elif self.ended == "disconnected":
            frame = close_frame(CloseCode.POLICY_VIOLATION, DISCONNECTED)
        elif self.ended == "overflow":
            frame = close_frame(CloseCode.TRY_LATER, "too far behind; resume from your cursor")
        elif self.ended == "stale":
            frame = close_frame(CloseCode.POLICY_VIOLATION, "no ping was answered")
        if frame is not None:
            await self.say_last(frame, GOODBYE_S)
            with trio.CancelScope(shield=True):
                await linger(self.sock)

    # Incoming

    def adopt(self, place: str) -> bool:
        """See ``Stream``; what came right behind the handshake has its turn at once."""
        return super().adopt(place) or self._early != b""

    async def serve(self) -> bool:
        """Answer what the client says."""
        slowed = self._heavy_s > 0.0
        if slowed:
            await self.node.heavy_turn(min(self._heavy_s, HEAVY_PAUSE_S))
        size = HEAVY_TURN_BYTES if self._heavy_s else TURN_BYTES
        data, self._early = self._early, b""
        if not data:
            data = self.sock.recv(size)
            if not data:
                self.finish("closed")
                return False
        self.heard_at = trio.current_time()
        try:
            events = self._incoming.receive(data)
            failure = None
        except WebSocketError as error:
            events, failure = error.events, error
        spent_s = trio.current_time() - self.heard_at
        if len(events) > 1:
            self.corked = True  # the answers to publishes, which are short, go out together
        await self._take_events(events)
        self.uncork()
        if slowed or self.node.poller.unbroken(self):  # else it has waited, and others have had the time
            spent_s = trio.current_time() - self.heard_at
        self._heavy_s = spent_s if spent_s > HEAVY_TURN_S else 0.0
        if failure is not None:
            self.close_with(failure.code, failure.reason)
            return False
        if self._incoming.unfinished != self._held:
            self._account(self._incoming.unfinished)
        # One client must not keep the loop to itself by never letting its socket run dry.
        return len(data) == size

    def waits(self) -> None:
        """See ``Peer``."""
        try:
            self.uncork()
        except Exception as error:
            self._failed(error)

    def _account(self, size: int) -> None:
        try:
            self.node.limits.hold(self._held, size)
        except ApiError as error:
            self.close_with(CloseCode.TRY_LATER, error.message)
        else:
            self._held = size

    async def _take_events(self, events: list[Event]) -> None:
        pong: Ping | None = None
        for event in events:
            if self.ended:
                return
            if isinstance(event, Text):
                await self._take_text(event.data)
            elif isinstance(event, Ping):
                pong = event  # of several the last is answered (RFC 6455 section 5.5.3): a flood buys no flood
            elif isinstance(event, Binary):
                self._mistake(ApiError(415, "unsupported_data", "messages are JSON in text frames, not binary"))
            elif isinstance(event, CloseReceived):
                self._farewell = close_reply(event)
                self.finish("closed")
        if pong is not None and not self.ended:
            await self.wait_drained()
            self.post(pong_frame(pong.payload))

    async def _take_text(self, text: str) -> None:
        self.node.counters.messages += 1
        # A peer may ask no faster than it reads the answers: a short question can have a long one.
        if self.corked and self.queue is not None and len(self.queue) >= CORKED_ANSWERS:
            self.uncork()
            self.corked = not self._draining
        if self._draining:
            await self.wait_drained()
        try:
            if self.identity is not None and self.node.limits.on_messages:
                await self.node.limits.check_message(self.identity.user, trio.current_time())
            message = decode_client_message(text)
            if self.corked and not isinstance(message, PublishMessage):
                self.uncork()
            if self.identity is None and not isinstance(message, AuthMessage):
                raise ApiError(401, "unauthorized", 'send {"type":"auth","token":…} first')
            await _HANDLERS[type(message)](self, message)
            self._mistakes = self._too_fast = 0
        except ApiError as error:
            ref = ref_of(text)
            self.node.counters.error(error.code)
            log_event(LOG, logging.DEBUG, "refused", clientId=self.client_id, code=error.code, message=error.message)
            if error.code == "rate_limited":
                self._too_fast += 1
                self.post(self.form.message(error_message(error, ref)))
                if self._too_fast >= MAX_MISTAKES:
                    self.close_with(CloseCode.RATE_LIMITED, error.message)
            elif error.status in (400, 401, 422):
                self._mistake(error, ref)
            else:
                self._mistakes = 0
                self.post(self.form.message(error_message(error, ref)))

    def _mistake(self, error: ApiError, ref: Ref = None) -> None:
        self._mistakes += 1
        self.post(self.form.message(error_message(error, ref)))
        if self._mistakes >= MAX_MISTAKES:
            self.close_with(CloseCode.POLICY_VIOLATION, f"{MAX_MISTAKES} malformed messages in a row")

    def say(self, type_: str, **fields: Any) -> None:
        """Send one message of our own."""
        self.post(self.form.message(server_message(type_, **fields)))

    # One handler per client message; ApiErrors are answered by the caller

    async def _auth(self, message: AuthMessage) -> None:
        known = self.identity
        try:
            identity = await self.node.authenticator.introduce(message.token)
            if known is None:
                await self.node.presence.admit(self.client_id, identity.user)
        except ApiError as error:
            if error.status == 503:
                raise  # nothing is known against this token: the client may say it again
            self.refuse(error, message.ref)
            return
        if known is None:
            self.welcome(identity, message.ref)
            return
        if identity.user != known.user:
            self.close_with(CloseCode.UNAUTHORIZED, "the token is another user's")
            return
        self.identity = identity
        self.expire_with(identity)
        # A newer token may allow less. What is pending came under the old one.
        self.catch_up()
        for name, want in list(self.wants.items()):
            allowed = narrowed(identity, name)
            if allowed != name:
                self.hub.detach(self, [name])
                if allowed is not None and allowed not in self.wants:
                    self.hub.attach(self, [(allowed, want)])
        self._leave([channel for channel in self.channels if not may_join(self.node, identity, channel)])
        self.settle()
        expires = None if identity.expires_at is None else format_time(int(identity.expires_at * 1000))
        self.say("authenticated", userId=identity.user, expiresAt=expires, ref=message.ref)

    async def _subscribe(self, message: Subscribe) -> None:
        identity = self._known()
        wanted, fields = subscribe_filter(message), subscribe_fields(message)
        interval = min_interval_s(message)
        if message.user_id is not None and not is_id(message.user_id):
            raise ApiError(422, "invalid_field", "userId: not an id", field="userId")
        named = message.job_ids
        if named is None and message.channels is not None and message.user_id is None and not message.all:
            named = []  # channels alone ask for no jobs
        job_ids: list[str] | None = None
        denied: list[str] = []
        if named is not None:
            job_ids, denied = split_ids(
                named,
                self.node.config.limits.jobs_per_connection - len(self.wants),
                lambda job_id: channel_of_job(identity, job_id, message.user_id) in self.wants,
            )
        channels: list[str] = []
        if message.channels is not None:
            channels, refused = split_channels(self.node, identity, message.channels, self.channels)
            denied += refused
        watch = Watch(None if job_ids is None else tuple(job_ids), message.user_id, wanted, fields)
        names = channels_for(identity, watch, all_jobs=message.all)
        last_seen = None if message.last_seen is None else str(message.last_seen)
        await self.node.broker.follow(names, last_seen)
        history = self.hub.history
        begin = start_from(history, last_seen)
        form = wire_form(self._framing, fields)

        # All that this reader is owed so far goes out first: from here on one offset stands for all its channels.
        self.catch_up()
        if interval is not None:
            self.min_interval_s = interval
        self.hub.attach(self, [(name, Want(wanted, form)) for name in names])
        self.node.counters.begin(resumed=begin.after is not None, lost=begin.lost)
        head = {"type": "subscribed", "ref": message.ref} if message.ref is not None else {"type": "subscribed"}
        scope: dict[str, Any] = {"jobIds": job_ids or [], "denied": denied}
        if message.channels is not None:
            scope["channels"] = channels
        notices = self._join(channels, begin)
        if begin.after is None:
            jobs = snapshot(self.node.jobs, names, wanted)
            self._post_snapshot(
                jobs, fields, head, scope | {"id": f"{history.epoch}:{history.last}", "recovered": False}
            )
        else:
            missed = missed_updates(history, ((name, wanted) for name in names), begin.after)
            if notices:
                missed = sorted(missed + notices, key=lambda update: update.offset)
            # Not further than what the client has: the replay behind it takes the cursor on from there.
            cursor = f"{history.epoch}:{begin.after if missed else history.last}"
            self._post_snapshot([], None, head, scope | {"id": cursor, "recovered": True})
            self.node.counters.replayed += len(missed)
            self.post(self._replayed(form, missed))
        self.settle()

    def _join(self, channels: list[str], start: Start) -> list[Update]:
        """Join channels. Returns the notifications that came after the cursor and have not been given here."""
        history, joined = self.hub.history, self._joined or {}
        after = history.last if start.after is None else start.after
        notices: list[Update] = []
        if start.given is not None and start.after is not None:
            acknowledge(self.node, self.user, after)
        if after < history.last:
            for notice in missed_notices(history, heard(self.client_id, self.user, channels), after):
                if not self._was_given(notice, joined):
                    notices.append(notice)
            self._notices_from = min(self._notices_from, after)
        for channel in channels:
            self.node.presence.join(self, channel)
            joined[channel] = min(joined.get(channel, after), after)
        self._joined = joined or None
        return notices

    def _was_given(self, notice: Update, joined: Mapping[str, int]) -> bool:
        targets, offset = notice.targets or (), notice.offset
        if targets[0].startswith("channel/"):
            return any(joined.get(target[8:], offset) < offset for target in targets)
        return offset > self._notices_from or offset in self._from_inbox

    def _leave(self, channels: Iterable[str]) -> None:
        for channel in channels:
            self.node.presence.part(self, channel)
            if self._joined is not None:
                self._joined.pop(channel, None)

    def _post_snapshot(
        self, jobs: list[Job], fields: frozenset[str] | None, head: dict[str, Any], last: dict[str, Any]
    ) -> None:
        records = (job.latest.body if fields is None else select_fields(job.latest.body, fields) for job in jobs)
        parts = snapshot_parts(records, "snapshot", encode(head), encode(last))
        messages = (self.form.message(message) for message, _ in parts)
        if len(jobs) <= 1:
            self.post(next(messages))
        else:
            self.post(messages)

    async def _unsubscribe(self, message: Unsubscribe) -> None:
        identity = self._known()
        if not (message.job_ids or message.user_id or message.all or message.channels):
            names = list(self.wants)
            channels = tuple(self.channels)
        else:
            channels = tuple(message.channels or ())
            names = ["*"] if message.all else []
            if message.user_id is not None and message.job_ids is None:
                names.append(user_channel(message.user_id))
            for job_id in message.job_ids or ():
                names += [job_channel(job_id), job_channel(job_id, message.user_id or identity.user)]
        self.catch_up()  # nothing of it may come after the answer
        self.hub.detach(self, names)
        self._leave(channels)
        self.settle()
        self.say("unsubscribed", jobIds=message.job_ids, channels=message.channels, ref=message.ref)

    async def _get(self, message: Get) -> None:
        identity = self._known()
        good, _ = split_ids(message.job_ids, self.node.config.limits.jobs_per_connection)
        names = channels_for(identity, Watch(tuple(good)))
        await self.node.broker.follow(names)
        self.catch_up()  # no update that comes after the answer is older than it
        jobs = snapshot(self.node.jobs, names, ANY)
        head: dict[str, Any] = {"type": "jobs"} if message.ref is None else {"type": "jobs", "ref": message.ref}
        parts = snapshot_parts((job.latest.body for job in jobs), "jobs", encode(head), b"{}")
        self.post(self.form.message(part) for part, _ in parts)

    async def _publish(self, message: PublishMessage) -> None:
        identity = self._known()
        if not identity.can("publish"):
            raise ApiError(403, "forbidden", "publishing needs the capability 'publish'")
        self.node.check_accepting()
        if self.node.limits.on_publishes:
            await self.node.limits.check_publish(identity.user, trio.current_time(), len(message.updates))
        await self.hub.wait_room()
        batch = Batch(self.node, identity, [bytes(update) for update in message.updates], source="websocket")
        self._unanswered += 1

        def answer(error: ApiError | None) -> None:
            self._unanswered -= 1
            if self._unanswered and not self.corked:  # others were kept with it, most likely
                self.corked = True
                self.hub.soon(self.uncork)
            if error is not None:
                self.post(self.form.message(error_message(error, message.ref)))
            else:
                self.say("published", ref=message.ref, **summary([batch], self.node))

        # Answered in order of commit without stopping the reading of further messages.
        batch.submission.when_kept(answer)
        if self._unanswered > MAX_UNANSWERED:
            await batch.submission.wait_kept()

    async def _ack(self, message: Ack) -> None:
        """Everything up to this cursor has arrived. A cursor that is not of this log is a sign of life and no more."""
        offset = offset_of(self.node, message.id)
        if offset is not None:
            acknowledge(self.node, self.user, offset)

    async def _notify(self, message: NotifyMessage) -> None:
        self.node.check_accepting()
        notice, key = check_notice(message), check_key(message)
        delivered, accepted = await send(self.node, self._known(), notice, key)
        self.say(
            "published",
            accepted=0 if accepted.duplicate else 1,
            duplicates=1 if accepted.duplicate else 0,
            rejected=[],
            delivered=delivered,
            id=f"{self.node.broker.epoch}:{accepted.offset}",
            ref=message.ref,
        )

    async def _ping(self, message: PingMessage) -> None:
        self.say("pong", ref=message.ref, timestamp=format_time(int(time.time() * 1000)))

    def _known(self) -> Identity:
        assert self.identity is not None
        return self.identity

    # Timers and the log

    def heartbeat(self) -> None:
        """A message for the page and a ping for its browser: only the latter is answered by itself."""
        if self.identity is not None:
            now = format_time(int(time.time() * 1000))
            message = server_message("heartbeat", timestamp=now, id=self.cursor(), **self.node.liveness())
            self.post(self.form.message(message) + ping_frame())

    def on_log_lost(self) -> None:
        """The log began anew: void what the client has and send everything it watches again."""
        if self.identity is None:
            return
        history = self.hub.history
        found = {
            job.latest.job_id: (job, want.form.fields)
            for name, want in self.wants.items()
            for job in snapshot(self.node.jobs, [name], want.filter)
        }
        records = (
            job.latest.body if fields is None else select_fields(job.latest.body, fields)
            for job, fields in found.values()
        )
        stored = owed(self.node, FRESH, self.user, set())
        last = encode({"id": f"{history.epoch}:{stored.before}"})
        parts = snapshot_parts(records, "snapshot", encode({"type": "reset"}), last)
        self.post(self.form.message(message) for message, _ in parts)
        self._joined = dict.fromkeys(self.channels, history.last) or None
        self._give_stored(stored.notices)


_Handler = Callable[[Session, Any], Awaitable[None]]
_HANDLERS: Final[dict[type[ClientMessage], _Handler]] = {
    Subscribe: Session._subscribe,
    Unsubscribe: Session._unsubscribe,
    Get: Session._get,
    PublishMessage: Session._publish,
    NotifyMessage: Session._notify,
    Ack: Session._ack,
    AuthMessage: Session._auth,
    PingMessage: Session._ping,
}
