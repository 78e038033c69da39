"""One connection from accept to close: HTTP cycles, until it ends or becomes a stream.

Nothing that goes wrong here leaves here: an exception ends this connection and no other.
"""

from __future__ import annotations

import logging
import re
import socket
from contextlib import suppress

import trio

from protocol.errors import ApiError
from protocol.http1 import BodyData, EndOfBody, HttpConnection, PeerClosed
from protocol.request import Request
from server.answers import Response, error_answer
from server.auth import Identity
from server.ids import new_id
from server.limits import client_address
from server.logs import log_event
from server.node import LOG, Node, Stream
from server.origins import cors_headers
from server.socketio import linger, prepare, receive, send_all

_REQUEST_ID = re.compile(r"[A-Za-z0-9_.:@-]{1,128}", re.ASCII)


class Disconnected(Exception):
    """The peer went away in the middle of a request: there is nobody to answer."""


class Exchange:
    """One request and what is known about it while it is answered.

    Attributes:
        connection: where it came in.
        request: its head.
        request_id: the client's ``X-Request-Id`` if it is usable, else one of ours.
        address: the client's address as far as our proxies vouch for it.
        identity: who asks; set once that is known.
        params: the variable segments of its path, by name.
        route: method and path in the table of routes, "" for what is not there.
    """

    __slots__ = ("address", "connection", "identity", "node", "params", "request", "request_id", "route")

    def __init__(self, connection: Connection, request: Request) -> None:
        self.connection = connection
        self.node = connection.node
        self.request = request
        given = request.headers.get("x-request-id", "")
        self.request_id = given if _REQUEST_ID.fullmatch(given) else new_id()
        self.address = client_address(connection.peer, request, connection.node.proxies)
        self.identity: Identity | None = None
        self.params: dict[str, str] = {}
        self.route = ("", "")

    @property
    def caller(self) -> Identity:
        """Who asks, on routes that need to know."""
        assert self.identity is not None
        return self.identity

    def headers(self) -> list[tuple[str, str]]:
        """The headers that every answer has."""
        return [
            ("Date", self.node.http_date()),
            ("X-Request-Id", self.request_id),
            *cors_headers(self.request, self.node.origins),
        ]

    def log(
        self,
        status: int,
        code: str | None = None,
        exc_info: BaseException | None = None,
        client_id: str | None = None,
    ) -> None:
        """Count an answer and log it: refusals always, others at debug level."""
        self.node.counters.request(self.route, status, code)
        log_event(
            LOG,
            logging.ERROR if status == 500 else logging.INFO if status >= 400 else logging.DEBUG,
            "request",
            method=self.request.method,
            path=self.request.path,
            status=status,
            code=code,
            requestId=self.request_id,
            clientId=client_id,
            jobId=self.params.get("jobId"),
            user=self.identity.user if self.identity else None,
            address=self.address,
            exc_info=exc_info,
        )


class Connection:
    """The shell round ``HttpConnection``: reads, deadlines, answers.

    Args:
        node: the server.
        sock: accepted, non-blocking.
        peer: address at the other end, ``unix`` for a Unix socket.
        nursery: ends with the connection.
        refusal: the connection came over a limit: what every request on it but health checks is told.

    Attributes:
        place: the address whose ``connections_per_address`` this one takes, "" for none.
    """

    __slots__ = ("_held", "_over", "http", "node", "nursery", "peer", "place", "refusal", "sock")

    def __init__(
        self,
        node: Node,
        sock: socket.socket,
        peer: str,
        nursery: trio.Nursery,
        refusal: ApiError | None,
        place: str,
    ) -> None:
        self.node = node
        self.sock = sock
        self.peer = peer
        self.nursery = nursery
        self.refusal = refusal
        self.place = place
        self.http = HttpConnection()
        self._held = 0
        self._over = False

    async def run(self) -> Stream | None:
        """Serve requests in order until either side ends the connection, or one of them begins a stream.

        Returns:
            The stream, for the caller to run: this object, the parser and the request need not idle along with it.
        """
        from server.routes import answer  # imported late: routes know transports, which know connections

        first = True
        proxied = self.node.proxies.trusts(self.peer)
        while not self._over:
            limits = self.node.config.limits
            request = await self._next_request(limits.head_timeout if first else limits.idle_timeout)
            if request is None:
                return None
            exchange = Exchange(self, request)
            if proxied:
                self._count_behind_proxy(exchange.address, first)
            first = False
            self.node.begin()
            try:
                stream = await answer(exchange)
            finally:
                if self._held:
                    self.hold(-self._held)
                self.node.end()
            if stream is not None:
                return stream
            if proxied:
                self._leave()
            if not self._over and not self.http.next_request():
                await linger(self.sock)
                return None
            # Pipelined requests that never wait must not keep the loop to themselves.
            await trio.lowlevel.checkpoint()
        return None

    def _count_behind_proxy(self, address: str, first: bool) -> None:
        """A trusted proxy's connection is a connect of the client whose request it brings first, not of the proxy; and
        an open one of each client while that one's request is answered: proxies keep connections for whoever comes."""
        node = self.node
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

    async def _next_request(self, patience_s: float) -> Request | None:
        """The next request; None when there is none to answer any more."""
        begun = self.http.begun  # pipelined, in part
        head_timeout = self.node.config.limits.head_timeout
        refusal: ApiError | None = None
        with trio.move_on_after(head_timeout if begun else patience_s) as patience:
            try:
                while True:
                    event = self.http.next_event()
                    if isinstance(event, Request):
                        return event
                    if isinstance(event, PeerClosed):
                        return None
                    data = await receive(self.sock)
                    if not begun and data:
                        begun = True
                        patience.deadline = trio.current_time() + head_timeout
                    self.http.receive(data)
            except ApiError as error:
                refusal = error
        if refusal is None and begun:
            refusal = ApiError(408, "request_timeout", f"the head took more than {head_timeout:g} s")
        if refusal is not None:
            await self._refuse(refusal)
        return None

    async def _refuse(self, error: ApiError) -> None:
        """Answer what never became a request, and close."""
        request_id = new_id()
        self.node.counters.request(("", ""), error.status, error.code)
        log_event(
            LOG,
            logging.INFO,
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

    async def next_piece(self) -> bytes:
        """The next piece of the request's body as it comes, ``b""`` at its end. Before the first, ``limit_body``.

        Raises:
            ApiError: 413 over the limit, 408 if it stops coming, 400 if it is malformed.
            Disconnected: the peer went away before its end.
        """
        while True:
            event = self.http.next_event()
            if isinstance(event, BodyData):
                return event.data
            if isinstance(event, EndOfBody):
                return b""
            if isinstance(event, PeerClosed):
                raise Disconnected
            if self.http.expects_continue:
                await self.send(self.http.send_continue())
            body_timeout = self.node.config.limits.body_timeout
            with trio.move_on_after(body_timeout) as patience:
                data = await receive(self.sock)
            if patience.cancelled_caught:
                raise ApiError(408, "request_timeout", f"no more of the body came for {body_timeout:g} s")
            self.http.receive(data)

    async def read_body(self, limit: int) -> bytes:
        """The whole body, of at most ``limit`` bytes; raises what ``next_piece`` raises,
        and 503 if too much is under way."""
        self.http.limit_body(limit)
        pieces = []
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
        headers = [*exchange.headers(), *response.headers]
        close = self.node.draining or self.refusal is not None
        if isinstance(response.body, bytes):
            await self.send(self.http.respond(response.status, headers, response.body, close=close))
            return
        await self.send(self.http.start_stream(response.status, headers, close=close))
        for piece in response.body:
            await self.send(self.http.stream_chunk(piece))
        await self.send(self.http.end_stream())

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


async def serve_connection(
    node: Node, sock: socket.socket, peer: str, refusal: ApiError | None = None, place: str = ""
) -> None:
    """Serve one accepted socket and close it, and leave its ``place``. Raises nothing but cancellation."""
    try:
        prepare(sock)
        async with trio.open_nursery() as nursery:
            with suppress(OSError, Disconnected):  # the peer may go at any time
                connection = Connection(node, sock, peer, nursery, refusal, place)
                try:
                    stream = await connection.run()
                finally:
                    place = connection.place
                    del connection
                if stream is not None:
                    await stream.run()
            nursery.cancel_scope.cancel()
    except OSError:
        pass
    except Exception as error:
        node.counters.failed += 1
        log_event(LOG, logging.ERROR, "connection_failed", address=peer, exc_info=error)
    finally:
        sock.close()
        node.connections -= 1
        if refusal is not None:
            node.turned_away -= 1
        if place:
            node.limits.leave(place)
