"""One connection from accept to close: HTTP cycles, until it ends or becomes a stream.

Nothing that goes wrong here leaves here: an exception ends this connection and no other.
"""

from __future__ import annotations

import logging
import math
import select
from collections.abc import Callable
from enum import Enum, auto
from functools import cache
from time import perf_counter
from types import ModuleType
from typing import Any, Final, NamedTuple

import trio

from protocol.errors import ApiError
from protocol.http1 import BodyData, EndOfBody, HttpConnection, PeerClosed
from protocol.request import Request
from server.answers import Response, error_answer
from server.exchange import Deferred, Disconnected, Exchange
from server.ids import new_id
from server.logs import log_event
from server.node import LOG, Node
from server.poller import Peer
from server.socketio import RECEIVE_BYTES, Socket, condition, linger, receive, send_all
from server.turns import TURN_S, next_turn
from server.wheel import Timer

# A body that comes in pieces is sent in portions of this much at least, its head with the first.
SEND_BYTES: Final = 16384


@cache
def _routes() -> ModuleType:
    """Imported late: routes know transports, which know connections."""
    from server import routes

    return routes


class _Outcome(Enum):
    """What is to be done after a turn."""

    WAIT = auto()
    AGAIN = auto()
    CLOSE = auto()


_WAIT, _AGAIN, _CLOSE = _Outcome.WAIT, _Outcome.AGAIN, _Outcome.CLOSE


class _Owed(NamedTuple):
    """What a turn has to send of an answer: the rest, or all of it; and what is to be done when that is done."""

    rest: bytes | tuple[Exchange, Response]
    then: Callable[[], object] | None = None


class Connection(Peer):
    """The shell round ``HttpConnection``: reads, deadlines, answers.

    Requests are served in order until either side ends the connection, or one of them begins a stream: that takes its
    place with the poller, and this object, the parser and the request need not idle along with it. A request that waits
    for news is set aside (``Deferred``) and answered by whoever brings them; only what the socket does not take then,
    or what comes behind the answer, has a turn.

    Args:
        node: the server.
        sock: accepted, non-blocking.
        peer: address at the other end, ``unix`` for a Unix socket.
        refusal: the connection came over a limit: what every request on it but health checks is told.
        early: what was read of the first request already.

    Attributes:
        place: the address whose ``connections_per_address`` this one takes, "" for none.
        memory: for a handler that answers the same request again and again: what it wants to know then.
    """

    __slots__ = (
        "_closed",
        "_deadline",
        "_deferred",
        "_due",
        "_first",
        "_held",
        "_listens_for",
        "_over",
        "_owed",
        "_timer",
        "_turned_away",
        "http",
        "memory",
        "node",
        "peer",
        "place",
        "refusal",
        "sock",
    )

    def __init__(
        self, node: Node, sock: Socket, peer: str, refusal: ApiError | None, place: str, early: bytes = b""
    ) -> None:
        self.node = node
        self.sock = sock
        self.peer = peer
        self.refusal = refusal
        self.place = place
        self.http = HttpConnection()
        if early:
            self.http.receive(early)
        self.memory: Any = None
        self._turned_away = refusal is not None
        self._held = 0
        self._first = True
        self._over = False
        self._closed = False
        self._deferred: Deferred | None = None
        self._owed: _Owed | None = None
        self._listens_for = select.EPOLLIN  # of what the poller tells while a request waits
        # Until when the next head, or more of it, has to be there; and the timer that will have a look, later at times:
        # it is not made anew for each request.
        self._deadline = math.inf
        self._due = math.inf
        self._timer: Timer | None = None

    async def turn(self) -> bool:
        """Serve the next request, if it is there. Nothing that goes wrong leaves here."""
        outcome = _CLOSE
        try:
            if self._deferred is not None:
                outcome = self._overhear(self._deferred)
            elif self._owed is not None:
                outcome = await self._send_owed(self._owed)
            else:
                outcome = await self._serve()
        except (OSError, Disconnected):
            pass  # the peer may go at any time
        except Exception as error:
            self._failed(error)
        finally:
            if outcome is _CLOSE:
                self.abandon()
        return outcome is _AGAIN

    async def _serve(self) -> _Outcome:
        request = await self._next_request()
        if not isinstance(request, Request):
            return request
        self._deadline = math.inf  # a handler has deadlines of its own
        exchange = Exchange(self, request)
        node = self.node
        proxied = node.proxies.trusts(self.peer)
        if proxied:
            self._count_behind_proxy(exchange.address, self._first)
        self._first = False
        node.begin()
        try:
            stream = await _routes().answer(exchange)
            if isinstance(stream, Deferred):
                self._deferred = stream
                self._expect(stream.patience_s)
                return _WAIT
        finally:
            if self._deferred is None:
                self.let_go()
                node.end()
        if stream is not None:
            if self._timer is not None:
                self._timer.cancel()
            return _AGAIN if stream.adopt(self.place) else _WAIT
        return self._go_on() or await self._linger()

    def _go_on(self) -> _Outcome | None:
        """What is to be done after an answer; None: read what still comes, and close."""
        if self.place and self.node.proxies.trusts(self.peer):
            self._leave()
        if self._over:
            return _CLOSE
        if not self.http.next_request():
            return None
        if self.http.begun:  # pipelined: others have their turn first
            self._expect(self.node.config.limits.head_timeout)
            return _AGAIN
        self._expect(self.node.config.limits.idle_timeout)
        return _WAIT

    async def _linger(self) -> _Outcome:
        await linger(self.sock)
        return _CLOSE

    # A request that waits

    def wake(self, deferred: Deferred, *, late: bool = False) -> None:
        """Answer a request that has waited. Again, or when nobody waits for it any more, does nothing. Never waits."""
        if self._deferred is not deferred:
            return
        self._deferred = None
        self._deadline = math.inf
        self.let_go()
        owed: _Owed | None = None
        try:
            deferred.leave()
            owed = self._owed = self._answer(deferred, late)
        except (OSError, Disconnected):
            self.abandon()
        except Exception as error:
            self._failed(error)
            self.abandon()
        if owed is None:
            self.node.end()
        else:
            self.node.poller.call(self.sock.fileno())

    def _answer(self, deferred: Deferred, late: bool) -> _Owed | None:
        """Answer it as far as the socket takes that now; what is left for a turn."""
        exchange, http = deferred.exchange, self.http
        response = _routes().late_answer(exchange, deferred, late)
        if self._listens_for != select.EPOLLIN:
            self._listen_for(select.EPOLLIN)
        if not http.pending and response.status != 200:
            raise Disconnected  # a 200 has begun: all that can be said is that it ends
        body = response.body
        if not isinstance(body, bytes):
            return _Owed((exchange, response))
        data = self._encode(exchange, response, body) if http.pending else http.stream_chunk(body) + http.end_stream()
        try:
            sent = self.sock.send(data)
        except BlockingIOError:
            sent = 0
        if sent < len(data):
            return _Owed(data[sent:], response.then)
        if response.then is not None:
            response.then()
        outcome = self._go_on()
        if outcome is _AGAIN:
            self.node.poller.call(self.sock.fileno())
        return None if outcome in (_WAIT, _AGAIN) else _Owed(b"")

    async def _send_owed(self, owed: _Owed) -> _Outcome:
        """Send the rest of an answer, and go on."""
        try:
            if isinstance(owed.rest, tuple):
                await self.respond(*owed.rest)
            elif owed.rest:
                await self.send(owed.rest)
            if owed.then is not None:
                owed.then()
        finally:
            self._owed = None
            self.let_go()
            self.node.end()
        return self._go_on() or await self._linger()

    def _overhear(self, deferred: Deferred) -> _Outcome:
        """The peer has said something while its request waits, or that it says no more, or it is gone."""
        if self._listens_for == select.EPOLLIN:
            if not self.http.begun:
                try:
                    data = self.sock.recv(RECEIVE_BYTES)
                except BlockingIOError:
                    return _WAIT
                self.http.receive(data)
            if self.http.begun:  # for after the answer; no more of it is taken before
                self._listen_for(select.EPOLLRDHUP)
                return _WAIT
        else:
            is_now = condition(self.sock)
            if is_now & (select.POLLHUP | select.POLLERR):
                return _CLOSE
            if not self._listens_for or not is_now & select.POLLRDHUP:
                return _WAIT
        # It waits for its answer, or nobody is there any more: that shows only when something is sent. So the answer
        # begins now, unless something is on its way still; who is gone resets the connection.
        self._listen_for(0)
        if deferred.headers is None or not condition(self.sock) & select.POLLOUT:
            return _WAIT
        headers = [*deferred.exchange.headers(), *deferred.headers]
        head = self.http.start_stream(200, headers, close=self.node.draining)
        return _WAIT if self.sock.send(head) == len(head) else _CLOSE

    def _listen_for(self, events: int) -> None:
        self._listens_for = events
        self.node.poller.listen_for(self.sock.fileno(), events)

    async def _next_request(self) -> Request | _Outcome:
        """The next request if it is there, else what is to be done now."""
        http = self.http
        begun = http.begun
        try:
            while True:
                if begun:
                    event = http.next_event()
                    if isinstance(event, Request):
                        return event
                    if isinstance(event, PeerClosed):
                        return _CLOSE
                try:
                    data = self.sock.recv(RECEIVE_BYTES)
                except BlockingIOError:
                    if self._deadline is math.inf:
                        self._expect(self.node.config.limits.head_timeout)
                    return _WAIT
                http.receive(data)
                if not begun:
                    begun = True
                    self._deadline = math.inf  # a head has its time from its first byte on
        except ApiError as error:
            refusal = error
        self._deadline = math.inf
        await self.refuse(refusal)
        return _CLOSE

    def _expect(self, patience_s: float) -> None:
        """Something has to come within this time."""
        now = self.node.wheel.now()
        self._deadline = now + patience_s
        if self._timer is None or self._deadline < self._due:
            self._look_in(patience_s)

    def _look_in(self, seconds: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._due = self.node.wheel.now() + seconds
        self._timer = self.node.wheel.after(seconds, self._look)

    def _look(self) -> None:
        """End it if nothing came in time."""
        self._timer = None
        left = self._deadline - trio.current_time()
        if left == math.inf:
            return
        if left > 0:
            self._look_in(left)
        elif self._deferred is not None:
            self.wake(self._deferred, late=True)
        elif self.http.begun:
            self.node.poller.release(self.sock.fileno(), self._time_out)
        else:
            self.abandon()

    async def _time_out(self) -> None:
        try:
            patience_s = self.node.config.limits.head_timeout
            await self.refuse(ApiError(408, "request_timeout", f"the head took more than {patience_s:g} s"))
        except OSError:
            pass
        except Exception as error:
            self._failed(error)
        finally:
            self.abandon()

    def _failed(self, error: Exception) -> None:
        self.node.counters.failed += 1
        log_event(LOG, logging.ERROR, "connection_failed", address=self.peer, exc_info=error)

    def abandon(self) -> None:
        """Close it, whatever it is at. Again does nothing."""
        if not self._closed:
            self._closed = True
            if self._deferred is not None:
                self._deferred.leave()
            if self._deferred is not None or self._owed is not None:
                self._deferred = self._owed = None
                self.node.end()
            self.let_go()
            if self._timer is not None:
                self._timer.cancel()
            self.node.poller.peers.pop(self.sock.fileno(), None)
            self.sock.close()
            self.node.forget_socket(self.place, turned_away=self._turned_away)

    def _count_behind_proxy(self, address: str, first: bool) -> None:
        """A trusted proxy's connection is a connect of the client whose request it brings first, not of the proxy; and
        an open one of each client while that one's request is answered: proxies keep connections for whoever comes."""
        node = self.node
        if self.place:  # of its own: its peer was not trusted yet when it came
            self._leave()
        if self.refusal is None and not node.proxies.trusts(address):
            try:
                if first:
                    node.limits.check_connect(address, trio.current_time())
                self.place = node.limits.enter(address)
            except ApiError as error:
                self.refusal = error
                node.counters.refused[error.code] += 1

    def _leave(self) -> None:
        place, self.place = self.place, ""
        self.node.limits.leave(place)

    def hold(self, size: int) -> None:
        """The request under way takes this many bytes more, until it is answered. Raises ApiError 503."""
        self.node.limits.hold(self._held, self._held + size)
        self._held += size

    def let_go(self) -> None:
        """What the request under way took it takes no more."""
        if self._held:
            self.hold(-self._held)

    async def refuse(self, error: ApiError, level: int = logging.INFO) -> None:
        """Answer what never became a request, and close."""
        request_id = new_id()
        self.node.counters.request(("", ""), error.status, error.code)
        log_event(
            LOG,
            level,
            "request",
            status=error.status,
            code=error.code,
            message=error.message,
            requestId=request_id,
            address=self.peer,
        )
        response = error_answer(error, request_id)
        headers = [("Date", self.node.http_date()), ("X-Request-Id", request_id), *response.headers]
        assert isinstance(response.body, bytes)
        await self.send(self.http.respond(error.status, headers, response.body, close=True))
        await linger(self.sock)

    def _piece_here(self) -> bytes | None:
        """What has come of the request's body: its next piece, ``b""`` at its end, None if more has to come first.

        Raises what ``next_piece`` raises, but for 408.
        """
        event = self.http.next_event()
        if isinstance(event, BodyData):
            return event.data
        if isinstance(event, EndOfBody):
            return b""
        if isinstance(event, PeerClosed):
            raise Disconnected
        return None

    async def next_piece(self) -> bytes:
        """The next piece of the request's body as it comes, ``b""`` at its end. Before the first, ``limit_body``.

        Raises:
            ApiError: 413 over the limit, 408 if it stops coming, 400 if it is malformed.
            Disconnected: the peer went away before its end.
        """
        while (piece := self._piece_here()) is None:
            if self.http.expects_continue:
                await self.send(self.http.send_continue())
            body_timeout = self.node.config.limits.body_timeout
            with trio.move_on_after(body_timeout) as patience:
                data = await receive(self.sock)
            if patience.cancelled_caught:
                raise ApiError(408, "request_timeout", f"no more of the body came for {body_timeout:g} s")
            self.http.receive(data)
        return piece

    async def read_body(self, limit: int) -> bytes:
        """The whole body, of at most ``limit`` bytes; raises what ``next_piece`` raises,
        and 503 if too much is under way."""
        self.http.limit_body(limit)
        pieces = []
        while piece := self._piece_here():  # nearly always all of it is there, and needs no deadline
            self.hold(len(piece))
            pieces.append(piece)
        if piece is None:
            upload_timeout = self.node.config.limits.upload_timeout
            with trio.move_on_after(upload_timeout) as patience:
                while piece := await self.next_piece():
                    self.hold(len(piece))
                    pieces.append(piece)
            if patience.cancelled_caught:
                raise ApiError(408, "request_timeout", f"the body took more than {upload_timeout:g} s")
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    async def respond(self, exchange: Exchange, response: Response) -> None:
        """Send an answer whole, or in pieces if its body comes in pieces."""
        http = self.http
        if isinstance(response.body, bytes):
            await self.send(self._encode(exchange, response, response.body))
        else:
            data = b""
            if http.pending:
                headers = [*exchange.headers(), *response.headers]
                data = http.start_stream(response.status, headers, close=self._closes)
            until = perf_counter() + TURN_S
            for piece in response.body:
                data += http.stream_chunk(piece)
                if len(data) >= SEND_BYTES:
                    await self.send(data)
                    data = b""
                if perf_counter() > until:
                    await next_turn()
                    until = perf_counter() + TURN_S
            await self.send(data + http.end_stream())
        if response.then is not None:
            response.then()

    def _encode(self, exchange: Exchange, response: Response, body: bytes) -> bytes:
        headers = [*exchange.headers(), *response.headers]
        return self.http.respond(response.status, headers, body, close=self._closes)

    @property
    def _closes(self) -> bool:
        """Whether this connection's next answer is its last."""
        return self.node.draining or self.refusal is not None

    async def send(self, data: bytes) -> None:
        """Send bytes as they are. Raises OSError, also for a peer that takes nothing."""
        await send_all(self.sock, data, self.node.config.limits.send_timeout)

    @property
    def can_answer(self) -> bool:
        """Whether the request under way has had no answer yet, not even the head of one."""
        return self.http.pending

    def take_over(self) -> None:
        """No more HTTP on this connection: it is closed when the request's handler returns."""
        self._over = True
