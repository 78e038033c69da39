"""``/ws/jobs``: everything over one connection (RFC 6455), JSON text messages both ways."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from typing import Any, Final

import trio
from msgspec.json import encode

from protocol.errors import ApiError, CloseCode
from protocol.frames import SMALL_WINDOW_BITS, WINDOW_BITS, close_frame, ping_frame, pong_frame
from protocol.messages import (
    AuthMessage,
    PublishMessage,
    Ref,
    decode_client_message,
    error_message,
    ref_of,
    server_message,
    snapshot_parts,
    whole,
)
from protocol.update import Job, Update, format_time
from protocol.watch import ANY
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
from protocol.wire import Framing, select_fields, wire_form
from server.auth import Identity
from server.channel import Want
from server.exchange import Exchange
from server.ids import new_id
from server.logs import log_event
from server.node import LOG, Stream
from server.notices import owed
from server.origins import check_origin
from server.reading import FRESH, LOOK_EVERY, snapshot
from server.socketio import linger
from server.transports.live import DISCONNECTED, LiveReader
from server.transports.sse import replay
from server.transports.websocket_messages import HANDLERS, Gathered, hand_over
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
        "_heavy_s",
        "_held",
        "_incoming",
        "_mistakes",
        "_too_fast",
        "framing",
        "from_inbox",
        "gathered",
        "joined",
        "notices_from",
        "unanswered",
    )

    transport = "websocket"
    takes_notices = True

    def __init__(self, exchange: Exchange, handshake: Handshake, early: bytes, client_id: str) -> None:
        window_bits = None if handshake.deflate is None else handshake.deflate.window_bits
        self.framing = _FRAMINGS[handshake.protocol == LINES, window_bits]
        connection = exchange.connection
        super().__init__(
            exchange.node,
            connection.sock,
            wire_form(self.framing),
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
        self.unanswered = 0
        self.gathered: Gathered | None = None  # publishes that are handed over together, at the end of the turn
        # Notifications behind these offsets have been given: those for the client itself, and those of channels.
        self.notices_from = 0
        self.joined: dict[str, int] | None = None
        self.from_inbox: frozenset[int] = _NONE  # and these besides

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
        self.hub.enter(self)
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

    def framed(self, parts: Iterable[tuple[bytes, bool]]) -> Iterator[bytes]:
        """The messages of a snapshot, framed as the socket takes them."""
        form = self.form
        return (form.message(message) if message else b"" for message, _ in parts)

    def _give_stored(self, notices: list[Update]) -> None:
        """Notifications that were stored for this user; from here on all others come live."""
        self.notices_from = self.hub.history.last
        if notices or self.from_inbox:
            self.from_inbox = frozenset([notice.offset for notice in notices])
        if notices:
            self.post(replay(self.node, self.form, notices, ANY))

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
        now = self.wheel.now
        self.heard_at = began = now()
        try:
            events = self._incoming.receive(data)
            failure = None
        except WebSocketError as error:
            events, failure = error.events, error
        spent_s = now() - began
        if len(events) > 1:
            self.corked = True  # the answers to publishes, which are short, go out together
        await self._take_events(events)
        self.uncork()
        if slowed or self.node.poller.unbroken(self):  # else it has waited, and others have had the time
            spent_s = now() - began
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
            hand_over(self)
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
                break
            if isinstance(event, Text):
                await self._take_text(event.data)
                continue
            hand_over(self)
            if isinstance(event, Ping):
                pong = event  # of several the last is answered (RFC 6455 section 5.5.3): a flood buys no flood
            elif isinstance(event, Binary):
                self._mistake(ApiError(415, "unsupported_data", "messages are JSON in text frames, not binary"))
            elif isinstance(event, CloseReceived):
                self._farewell = close_reply(event)
                self.finish("closed")
        hand_over(self)
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
            if not isinstance(message, PublishMessage):
                hand_over(self)
                if self.corked:
                    self.uncork()
            if self.identity is None and not isinstance(message, AuthMessage):
                raise ApiError(401, "unauthorized", 'send {"type":"auth","token":…} first')
            await HANDLERS[type(message)](self, message)
            self._mistakes = self._too_fast = 0
        except ApiError as error:
            hand_over(self)
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

    def known(self) -> Identity:
        """Whose it is, in a handler: nobody else's messages come so far."""
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
        watched = [(snapshot(self.node.jobs, [name]), want) for name, want in self.wants.items()]
        stored = owed(self.node, FRESH, self.user, set())
        last = encode({"id": f"{history.epoch}:{stored.before}"})
        self.post(self.framed(snapshot_parts(_each_once(watched), "snapshot", encode({"type": "reset"}), last)))
        self.joined = dict.fromkeys(self.channels, history.last) or None
        self._give_stored(stored.notices)


def _each_once(watched: list[tuple[list[Job], Want]]) -> Iterator[bytes]:
    """The records of several subscriptions, as ``reading.records`` gives those of one."""
    seen: set[str] = set()
    for count, (job, want) in enumerate(((job, want) for jobs, want in watched for job in jobs), 1):
        latest, fields = job.latest, want.form.fields
        if latest.job_id not in seen and want.filter.passes(latest):
            seen.add(latest.job_id)
            yield latest.body if fields is None else select_fields(latest.body, fields)
        if count % LOOK_EVERY == 0:
            yield b""
