"""What comes before HTTP on a connection: a PROXY header, the TLS handshake."""

from __future__ import annotations

import logging
import socket
import ssl

import trio

from protocol.errors import ApiError
from protocol.proxy import ProxyError, parse_header
from server.connection import Connection
from server.logs import log_event
from server.node import LOG, Node
from server.poller import Peer
from server.tls import HANDSHAKE_RECORD, PIECE_BYTES, TlsSocket


class Opening(Peer):
    """A connection until its first request; then a ``Connection`` takes its place with the poller.

    All of it has the time of a request's head (``limits.head_timeout``).

    Args:
        node, sock, peer, refusal, place: see ``Connection``.
    """

    __slots__ = ("_closed", "_node", "_peer", "_place", "_proxied", "_refusal", "_said", "_sock", "_timer", "_tls")

    def __init__(self, node: Node, sock: socket.SocketType, peer: str, refusal: ApiError | None, place: str) -> None:
        self._node = node
        self._sock = sock
        self._peer = peer
        self._refusal = refusal
        self._place = place
        self._proxied = node.config.server.proxy_protocol and node.proxies.trusts(peer)
        self._said = b""  # of a PROXY header
        self._tls: TlsSocket | None = None
        self._closed = False
        self._timer = node.wheel.after(node.config.limits.head_timeout, self._late)

    async def turn(self) -> bool:
        """Take in what came. Nothing that goes wrong leaves here."""
        over = True
        try:
            over = await self._advance()
        except BlockingIOError:
            over = False
        except (OSError, ProxyError) as error:
            self._failed(error)
        except Exception as error:
            self._node.counters.failed += 1
            log_event(LOG, logging.ERROR, "connection_failed", address=self._peer, exc_info=error)
        finally:
            if over:
                self.abandon()
        return self._closed and not over

    async def _advance(self) -> bool:
        """Whether it is over; that is not said where a ``Connection`` goes on."""
        data = self._sock.recv(PIECE_BYTES)
        if not data:
            raise ConnectionError("the client closed the connection")
        if self._proxied:
            self._said += data
            header = parse_header(self._said)
            if header is None:
                return False
            data, self._said, self._proxied = self._said[header.size :], b"", False
            if header.source is not None and not self._is_for(header.source):
                return True
        context = self._node.tls if self._sock.family != socket.AF_UNIX else None
        if context is None:
            self._begin(data)
            return False
        if not data:
            return False
        if self._tls is None:
            if data[:1].isalpha() and data[0] != HANDSHAKE_RECORD:
                error = ApiError(400, "tls_required", "this port speaks TLS: use https or wss")
                connection = self._connection()
                try:
                    await connection.refuse(error, logging.DEBUG)
                finally:
                    connection.abandon()
                return False
            self._tls = TlsSocket(self._sock, context)
        done = self._tls.shake_hands(data)
        while True:
            try:
                self._tls.push()
                break
            except BlockingIOError:
                await trio.lowlevel.wait_writable(self._sock)
        if done:
            self._begin()
        return False

    def _begin(self, early: bytes = b"") -> None:
        """From here on it is HTTP."""
        self._node.poller.peers[self._sock.fileno()] = self._connection(early)

    def _is_for(self, source: str) -> bool:
        """The connection counts for the client that it is passed on for. Whether it goes on, if only to be refused."""
        node = self._node
        self._peer = source
        if self._refusal is None and not node.proxies.trusts(source):
            try:
                node.limits.check_connect(source, trio.current_time())
                self._place = node.limits.enter(source)
            except ApiError as error:
                if not node.turn_away(error):
                    return False
                self._refusal = error
        return True

    def _connection(self, early: bytes = b"") -> Connection:
        """Who closes the socket from here on; it has no turns before ``_begin``."""
        connection = Connection(self._node, self._tls or self._sock, self._peer, self._refusal, self._place, early)
        self._closed = True
        self._timer.cancel()
        return connection

    def _late(self) -> None:
        if not self._closed:
            self._failed(TimeoutError("it took too long"))
            if not self._node.poller.interrupt(self):
                self.abandon()

    def _failed(self, error: Exception) -> None:
        what = "proxy_failed" if self._proxied else "tls_failed"
        self._node.counters.refused[what] += 1
        reason = error.reason or str(error) if isinstance(error, ssl.SSLError) else str(error)
        log_event(LOG, logging.DEBUG, what, address=self._peer, reason=reason)

    def abandon(self) -> None:
        """Close it. Again, and after HTTP has begun, it does nothing."""
        if not self._closed:
            self._closed = True
            self._timer.cancel()
            self._node.poller.peers.pop(self._sock.fileno(), None)
            self._sock.close()
            self._node.forget_socket(self._place, turned_away=self._refusal is not None)
