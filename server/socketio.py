"""A connected, non-blocking socket: try first, wait only if it must.

``send`` on a non-blocking socket is synchronous, so it can never be half done by a cancellation; only waiting
for readiness can be cancelled, and then nothing was lost. Each ``wait_readable`` costs about 7 µs on Trio, a
``recv`` that finds nothing 1 µs: so trying first is right wherever data is likely.
"""

from __future__ import annotations

import fcntl
import select
import socket
import struct
import termios
from typing import Final, Protocol

import trio

RECEIVE_BYTES: Final = 65536
# After a final answer: read on for so long and so much, so that unread input does not turn the close into a reset
# that takes the answer with it (RFC 9112 section 9.6). Twice the largest body that is taken anywhere: who sends one
# somewhat too large hears so.
LINGER_S: Final = 2.0
LINGER_BYTES: Final = 16 * 1024 * 1024
# The kernel gives a peer up that has not acknowledged data for this long: the same two minutes as "stale".
UNACKNOWLEDGED_MS: Final = 120_000


class Socket(Protocol):
    """What is used of a connection's socket: one of the system's, or one behind TLS (``server.tls``)."""

    def fileno(self) -> int:
        """What the kernel calls it."""

    def recv(self, size: int, /) -> bytes:
        """See ``socket.recv``."""

    def send(self, data: bytes | memoryview, /) -> int:
        """See ``socket.send``."""

    def shutdown(self, how: int, /) -> None:
        """See ``socket.shutdown``. Raises BlockingIOError if it has to be called again."""

    def close(self) -> None:
        """See ``socket.close``."""


def prepare(listener: socket.socket) -> None:
    """Set what every accepted socket needs: they have it of their listener (tcp(7)), for no call of their own."""
    if listener.family != socket.AF_UNIX:
        # One message is one send; waiting to join it with the next (Nagle) would only add delay.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNACKNOWLEDGED_MS)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


async def receive(sock: Socket, size: int = RECEIVE_BYTES) -> bytes:
    """The next bytes, ``b""`` at the end of the peer's sending.

    Raises:
        OSError: the connection failed.
    """
    while True:
        try:
            return sock.recv(size)
        except BlockingIOError:
            await trio.lowlevel.wait_readable(sock)


async def send_all(sock: Socket, data: bytes, patience_s: float) -> None:
    """Send everything, waiting while the socket is full.

    Raises:
        OSError: the connection failed, or the peer took nothing for ``patience_s`` seconds (``TimeoutError``).
    """
    rest: bytes | memoryview = data
    while True:
        try:
            sent = sock.send(rest)
        except BlockingIOError:
            sent = 0
        if sent == len(rest):
            return
        rest = memoryview(rest)[sent:]
        with trio.move_on_after(patience_s) as patience:
            await trio.lowlevel.wait_writable(sock)
        if patience.cancelled_caught:
            raise TimeoutError(f"the peer took nothing for {patience_s} s")


async def linger(sock: Socket) -> None:
    """Half-close, and read what still comes, within bounds, so that our last answer arrives."""
    try:
        with trio.move_on_after(LINGER_S):
            await _say_no_more(sock)
            left = LINGER_BYTES
            while left > 0 and (data := await receive(sock)):
                left -= len(data)
    except OSError:
        pass


async def _say_no_more(sock: Socket) -> None:
    while True:
        try:
            return sock.shutdown(socket.SHUT_WR)
        except BlockingIOError:  # TLS has a word of its own for it
            await trio.lowlevel.wait_writable(sock)


def all_acknowledged(sock: Socket) -> bool:
    """Whether the peer's kernel has acknowledged all we sent (``SIOCOUTQ``, see tcp(7))."""
    try:
        (unsent,) = struct.unpack("i", fcntl.ioctl(sock, termios.TIOCOUTQ, b"\0\0\0\0"))
    except OSError:
        return False
    return bool(unsent == 0)


def condition(sock: Socket) -> int:
    """What the kernel says of a connection: ``POLLRDHUP`` if the peer says no more, ``POLLHUP`` or ``POLLERR`` if it
    is gone, ``POLLOUT`` if there is room for some kilobytes (see poll(2))."""
    asked = select.poll()
    asked.register(sock.fileno(), select.POLLRDHUP | select.POLLOUT)
    return next((events for _, events in asked.poll(0)), 0)
