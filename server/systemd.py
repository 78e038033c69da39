"""What systemd and a service say to each other: sockets that are handed over, and how the service is.

The interfaces are those of sd_listen_fds(3) and sd_notify(3). Without systemd none of it does anything.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, MutableMapping
from contextlib import suppress
from typing import Final

import trio

from server.config import ConfigError

FIRST_FD: Final = 3


class HandedOver(socket.socket):
    """A listening socket that somebody else has opened, and keeps open: what queues there waits for whoever is next."""


def take_sockets(environ: MutableMapping[str, str] = os.environ) -> list[HandedOver]:
    """The sockets that were opened for this process; none if it was not started like that. Once only.

    Raises:
        ConfigError: one is not a listening stream socket.
    """
    pid, count = environ.pop("LISTEN_PID", ""), environ.pop("LISTEN_FDS", "")
    environ.pop("LISTEN_FDNAMES", None)
    if pid != str(os.getpid()) or not count.isascii() or not count.isdigit():
        return []
    sockets: list[HandedOver] = []
    for fd in range(FIRST_FD, FIRST_FD + int(count)):
        try:
            os.set_inheritable(fd, False)
            sock = HandedOver(fileno=fd)
            listens = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        except OSError as error:
            raise ConfigError(f"descriptor {fd}, which was handed over, is no socket ({error.strerror})") from error
        if not listens or sock.family not in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX):
            raise ConfigError(
                f"descriptor {fd}, which was handed over, is no listening stream socket: use ListenStream= and "
                "Accept=no in the socket unit"
            )
        sock.setblocking(False)
        sockets.append(sock)
    return sockets


def notify(*facts: str) -> None:
    """Tell systemd, if it wants to hear: ``notify("READY=1", "STATUS=…")``. Never waits, and never fails."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if not path:
        return
    if path.startswith("@"):  # in Linux' abstract namespace
        path = "\0" + path[1:]
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock:
        sock.connect(path)
        sock.send("\n".join(facts).encode())


def reloading() -> None:
    """The configuration is about to be read again; ``notify("READY=1")`` when that is done."""
    notify("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")


def stopping(seconds: float) -> None:
    """The service ends, and may take so long for it, whatever ``TimeoutStopSec`` says."""
    notify("STOPPING=1", "STATUS=Draining", f"EXTEND_TIMEOUT_USEC={round(seconds * 1e6)}")


def watchdog_s() -> float | None:
    """Seconds within which systemd wants a sign of life, None if it does not watch this process."""
    limit = os.environ.get("WATCHDOG_USEC", "")
    pid = os.environ.get("WATCHDOG_PID", "")
    if not limit.isascii() or not limit.isdigit() or not int(limit) or pid not in ("", str(os.getpid())):
        return None
    return int(limit) / 1e6


async def keep_alive(limit_s: float, say: Callable[[], None]) -> None:
    """Give signs of life from within the loop, so that there are none when it hangs."""
    while True:
        say()
        await trio.sleep(limit_s / 3)
