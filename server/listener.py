"""Accepting connections: TCP and Unix sockets, limits, and what to do when descriptors run out."""

from __future__ import annotations

import errno
import logging
import os
import socket
import stat
from pathlib import Path
from typing import Final

import trio

from protocol.errors import ApiError
from server.connection import Connection
from server.limits import UNIX
from server.logs import log_event
from server.node import LOG, Node
from server.opening import Opening
from server.poller import Peer
from server.socketio import prepare
from server.systemd import HandedOver

# Connections that may queue in the kernel: as many as arrive while the loop is busy elsewhere for a moment. The
# kernel caps it at net.core.somaxconn.
BACKLOG: Final = 4096
# Accepted per wake-up: enough to share the cost of waking, few enough to let others in between.
ACCEPT_BATCH: Final = 32
# Without descriptors there is nothing to accept; each wait gives connections the time to end.
EXHAUSTED_PAUSE_S: Final = 0.1
# ENOSPC is what epoll says when its user watches too much already.
_EXHAUSTED: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.ENOSPC})


class ListenError(Exception):
    """The address cannot be listened on; the message says why and what to do."""


def open_tcp(host: str, port: int) -> list[socket.socket]:
    """Listen on every address that ``host`` names; with port 0 on the first one only.

    Raises:
        ListenError: the name is unknown, or the port is taken or forbidden.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except socket.gaierror as error:
        raise ListenError(f"server.host: {host!r} is no address of this machine ({error.strerror})") from error
    sockets: list[socket.socket] = []
    for family, kind, protocol, _, address in found[: 1 if port == 0 else None]:
        sock = socket.socket(family, kind, protocol)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.bind(address)
            sock.listen(BACKLOG)
            sock.setblocking(False)
        except OSError as error:
            sock.close()
            for other in sockets:
                other.close()
            hint = {
                errno.EADDRINUSE: "another program listens there; stop it, or choose another --port",
                errno.EACCES: "ports below 1024 need privileges; choose another --port",
                errno.EADDRNOTAVAIL: "this machine does not have that address",
            }.get(error.errno or 0, error.strerror)
            raise ListenError(f"cannot listen on {host} port {port}: {hint}") from error
        sockets.append(sock)
    return sockets


def is_common(listener: socket.socket) -> bool:
    """Whether all workers accept from this one socket: it cannot be opened once more."""
    return listener.family == socket.AF_UNIX or isinstance(listener, HandedOver)


def share(listener: socket.socket) -> socket.socket:
    """Another listener on the same address, for another process: the kernel spreads what comes over all of them.

    One that is common to all of them is given as it is.

    Raises:
        ListenError: the system does not let us.
    """
    if is_common(listener):
        return listener
    sock = socket.socket(listener.family, listener.type, listener.proto)
    try:
        # Only now, so that the first was refused where somebody else listened. From here on our own user may join in.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if listener.family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(listener.getsockname())  # it gets nothing before ``begin``
        sock.setblocking(False)
    except OSError as error:
        sock.close()
        raise ListenError(f"cannot share {describe(listener)} among several workers: {error.strerror}") from error
    return sock


def begin(listener: socket.socket) -> None:
    """From now on connections may wait here. Again does nothing."""
    prepare(listener)
    listener.listen(BACKLOG)


def open_unix(path: str) -> socket.socket:
    """Listen on a Unix socket; one left behind by a dead server is replaced.

    Raises:
        ListenError: another server listens there, something else is in the way, or the directory is not writable.
    """
    try:
        _clear_path(path)
        sock = socket.socket(socket.AF_UNIX)
    except OSError as error:
        raise _unusable(path, error) from error
    try:
        sock.bind(path)
        # Whoever may reach the socket may ask; the group is how a proxy is let in.
        os.chmod(path, 0o660)
        sock.listen(BACKLOG)
        sock.setblocking(False)
    except OSError as error:
        sock.close()
        raise _unusable(path, error) from error
    return sock


def _clear_path(path: str) -> None:
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ListenError(f"server.unix_socket: {path} exists and is no socket")
    with socket.socket(socket.AF_UNIX) as probe:
        if probe.connect_ex(path) == 0:
            raise ListenError(f"server.unix_socket: another server listens on {path}")
    os.unlink(path)


def _unusable(path: str, error: OSError) -> ListenError:
    # "AF_UNIX path too long" comes without a number, so without its words in strerror.
    return ListenError(f"server.unix_socket: cannot listen on {path}: {error.strerror or error}")


def close_listener(sock: socket.socket) -> None:
    """Stop listening; the path of a Unix socket of our own goes with it."""
    if sock.family == socket.AF_UNIX and not isinstance(sock, HandedOver):
        path = sock.getsockname()
        sock.close()
        Path(path).unlink(missing_ok=True)
    else:
        sock.close()


def describe(sock: socket.socket, *, tls: bool = False) -> str:
    """The address of a listener as one would type it into a client."""
    if sock.family == socket.AF_UNIX:
        return f"unix:{sock.getsockname()}"
    host, port, *_ = sock.getsockname()
    scheme = "https" if tls else "http"
    return f"{scheme}://[{host}]:{port}" if sock.family == socket.AF_INET6 else f"{scheme}://{host}:{port}"


class Listener(Peer):
    """Accepts connections and has them served. Survives every failing accept."""

    __slots__ = ("_exhausted", "_family", "_node", "_sock")

    def __init__(self, node: Node, sock: socket.socket) -> None:
        self._node = node
        self._sock = sock
        self._family = int(sock.family)
        self._exhausted = False

    async def turn(self) -> bool:
        """Accept some of those that wait."""
        for _ in range(ACCEPT_BATCH):
            try:
                # What ``accept`` itself does, less a class in Python round each socket, with two enums to make for it:
                # 3 % of a connection. ``_accept`` is no part of the documented interface, but as old as Python 3.
                fd, address = self._sock._accept()  # type: ignore[attr-defined]
                accepted = socket.SocketType(self._family, socket.SOCK_STREAM, 0, fd)
                self._serve(accepted, UNIX if self._family == socket.AF_UNIX else address[0])
            except BlockingIOError:
                break
            except (OSError, MemoryError) as error:
                if isinstance(error, OSError) and error.errno not in _EXHAUSTED:
                    continue  # this one was gone before it was accepted
                if not self._exhausted:  # said once, not ten times a second
                    reason = error.strerror if isinstance(error, OSError) else "Out of memory"
                    log_event(LOG, logging.WARNING, "accept_paused", reason=reason)
                self._exhausted = True
                await trio.sleep(EXHAUSTED_PAUSE_S)
                break
            self._exhausted = False
        return False

    def _serve(self, accepted: socket.SocketType, peer: str) -> None:
        """Have it served, or told why not. Where that fails it is closed, and leaves nothing behind."""
        node = self._node
        refusal, place = _admit(node, peer)
        if refusal is not None and not node.turn_away(refusal):
            accepted.close()
            return
        node.connections += 1
        node.counters.sockets += 1
        served: Connection | Opening | None = None
        try:
            accepted.setblocking(False)
            served = (Connection if node.plain else Opening)(node, accepted, peer, refusal, place)
            node.poller.add(accepted.fileno(), served)
        except (OSError, MemoryError):
            if served is not None:
                served.abandon()
            else:
                accepted.close()
                node.forget_socket(place, turned_away=refusal is not None)
            raise

    def abandon(self) -> None:
        """Accept no more; the socket is somebody else's to close."""


def _admit(node: Node, peer: str) -> tuple[ApiError | None, str]:
    """Why a new connection is not to be served, or None; and the place that it has taken."""
    if node.connections - node.turned_away >= node.config.server.max_connections:
        return ApiError(503, "too_many_connections", "the server is full; try again", retry_after=5), ""
    if not node.proxies.trusts(peer):  # behind a proxy the client is known only with its request
        try:
            if node.limits.on_connects:
                node.limits.check_connect(peer, trio.current_time())
            return None, node.limits.enter(peer)
        except ApiError as error:
            return error, ""
    return None, ""
