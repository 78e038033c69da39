"""Several processes as one server: ``statuswire serve --workers N``.

One process supervises and serves nothing. It listens, forks the workers, and starts again those that crash. Each
worker has a TCP socket of its own on the same port (SO_REUSEPORT), so that the kernel spreads connections evenly and
wakes one of them only; a Unix socket is shared by all. The supervisor keeps a descriptor of every socket: while a
worker is being replaced its connections wait instead of being refused.

Supervisor and worker talk over a socket pair: ``r`` (ready) or an error one way, orders the other way. The end of it
says that the other one is gone, however it went: no worker outlives its supervisor.

The supervisor runs no loop of Trio's and no thread, so it may fork.
"""

from __future__ import annotations

import gc
import logging
import math
import os
import secrets
import selectors
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import IO, Final

import trio

from server import logs, systemd
from server.app import READY, STOP_S, StartError, Worker, listen, serve
from server.config import Config, ConfigError
from server.listener import ListenError, close_listener, describe, is_common, share
from server.logs import log_event

LOG: Final = logging.getLogger("statuswire.workers")

# Before a worker that crashed is started again: at once the first time, then after so long, doubling.
BACKOFF_S: Final = 0.2
BACKOFF_CAP_S: Final = 5.0
# One that lived this long crashed for another reason than the one before.
STEADY_S: Final = 30.0
# After the drain and what a worker needs to finish: it hangs.
GRACE_S: Final = STOP_S
MAX_ERROR: Final = 4096

_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)


@dataclass(eq=False)
class _Child:
    """One worker, seen from its supervisor.

    Attributes:
        number: from 1.
        listeners: its sockets; the supervisor has them open too.
        pid: 0 while it does not run.
        link: the supervisor's end.
        ready: it has said that it serves.
        since: when it was started, monotonic seconds.
        crashes: in a row.
        due: when it is to be started again, if it does not run.
        heard_at: its last sign of life, if those are asked for.
        aborted: it hangs, and was told to say where.
    """

    number: int
    listeners: list[socket.socket]
    pid: int = 0
    link: socket.socket | None = None
    ready: bool = False
    since: float = 0.0
    crashes: int = 0
    due: float = 0.0
    heard_at: float = 0.0
    aborted: bool = False
    said: bytes = field(default=b"", repr=False)

    def order(self, what: bytes) -> None:
        """Tell it something; one that is gone need not hear it."""
        if self.link is not None:
            with suppress(OSError):
                self.link.send(what)


class Supervisor:
    """The workers of one server.

    Args:
        config: of all of them.
        reload: reads it again.
    """

    def __init__(self, config: Config, reload: Callable[[], Config]) -> None:
        self._config = config
        self._reload = reload
        self._group = secrets.token_hex(6)
        self._selector = selectors.DefaultSelector()
        self._children: list[_Child] = []
        self._log_lock: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  # as long as the process
        self._stopping = 0
        self._deadline = 0.0
        self._status = 0
        self._serving = False
        self._signalled: list[int] = []
        self._watchdog_s = systemd.watchdog_s()
        self._beat_due = 0.0

    def run(self) -> int:
        """Serve until a signal says otherwise, as ``server.app.serve`` does.

        Returns:
            The exit status: 0, or 1 if a worker did not end well.

        Raises:
            StartError: an address or the store cannot be used.
        """
        server = self._config.server
        first = listen(self._config)
        try:
            for number in range(1, server.workers + 1):
                self._children.append(_Child(number, first if number == 1 else [share(each) for each in first]))
            addresses = [describe(listener, tls=bool(server.tls_cert)) for listener in first]
            logs.configure(self._config.log, lock=self._log_lock.fileno())
            gc.collect()
            gc.freeze()  # what is here is shared with the workers as long as nobody writes to it
            with self._signals():
                try:
                    self._start_all()
                    if not self._stopping:
                        self._serving = True
                        where = ", ".join(address + server.base_path for address in addresses)
                        label = self._config.store.label
                        print(f"statuswire listening on {where} (store {label}, {server.workers} workers)", flush=True)
                        systemd.notify("READY=1", f"STATUS=Serving on {where} with {server.workers} workers")
                    self._supervise()
                finally:
                    self._kill()
        except ListenError as error:
            raise StartError(str(error)) from error
        finally:
            for child in self._children:
                _close_own(child)
            for listener in first:
                close_listener(listener)
        return self._status

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Signals are noted, and wake the selector."""
        reading, writing = socket.socketpair()
        for end in (reading, writing):
            end.setblocking(False)
        self._selector.register(reading, selectors.EVENT_READ)
        wakeup = signal.set_wakeup_fd(writing.fileno(), warn_on_full_buffer=False)
        before = {number: signal.signal(number, lambda n, _: self._signalled.append(n)) for number in _SIGNALS}
        self._wakeup = reading
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(wakeup)
            self._selector.close()
            reading.close()
            writing.close()

    # Starting

    def _start_all(self) -> None:
        """Raises StartError."""
        try:
            for child in self._children:
                self._start(child)
        except OSError as error:
            raise StartError(f"{len(self._children)} workers cannot be started: {error.strerror}") from error
        self._wait_ready()

    def _start(self, child: _Child) -> None:
        """Raises OSError if the system has no room for it."""
        self._listen_again(child)
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        child.ready, child.said, child.since, child.aborted = False, b"", time.monotonic(), False
        try:
            child.pid = os.fork()
        except OSError:
            ours.close()
            theirs.close()
            raise
        if not child.pid:
            self._be_worker(child, ours, theirs)
        theirs.close()
        child.link = ours
        self._selector.register(ours, selectors.EVENT_READ, child)

    def _be_worker(self, child: _Child, ours: socket.socket, theirs: socket.socket) -> None:
        """What the new process does; it never returns."""
        status = 1
        try:
            signal.set_wakeup_fd(-1)
            for number in _SIGNALS:
                signal.signal(number, signal.SIG_DFL)
            # Whoever holds an end of a pair keeps it open: each worker holds its own alone.
            ours.close()
            self._selector.close()
            self._wakeup.close()
            for other in self._children:
                if other.link is not None:
                    other.link.close()
                if other is not child:
                    _close_own(other)
            logs.configure(self._config.log, worker=child.number, lock=self._log_lock.fileno())
            theirs.setblocking(False)
            worker = Worker(child.number, self._group, child.listeners, theirs, self._watchdog_s)
            try:
                status = trio.run(serve, self._config, self._reload, worker)
            except ConfigError as error:
                status = 2
                with suppress(OSError):
                    theirs.send(str(error).encode()[:MAX_ERROR])
            except KeyboardInterrupt:
                status = 130
            except BaseException as error:
                log_event(LOG, logging.ERROR, "worker_failed", exc_info=error)
        finally:
            with suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(status)  # not through what the supervisor has open

    def _wait_ready(self) -> None:
        """Until all serve; the first that cannot start ends the others.

        Raises:
            StartError: with its reason.
        """
        while not self._stopping and not all(child.ready for child in self._children):
            self._turn(None)
            for child in self._children:
                if not child.pid and not self._stopping:
                    self._kill()
                    reason = child.said.decode(errors="replace")
                    raise StartError(reason or f"worker {child.number} ended while it was starting")

    # Supervising

    def _supervise(self) -> None:
        while True:
            self._beat()
            now = time.monotonic()
            running = [child for child in self._children if child.pid]
            if self._stopping:
                if not running:
                    return
                if now >= self._deadline:
                    log_event(LOG, logging.ERROR, "workers_killed", workers=[child.number for child in running])
                    self._status = 1
                    self._kill()
                    return
                self._turn(min(self._deadline, self._beat_due or math.inf) - now)
                continue
            waiting = [child for child in self._children if not child.pid]
            for child in waiting:
                if child.due <= now:
                    self._restart(child)
            dues = [child.due for child in waiting if not child.pid]
            if self._watchdog_s is not None:
                dues.append(self._beat_due)
            self._turn(min(dues) - now if dues else None)

    def _beat(self) -> None:
        """Where systemd watches: give it a sign of life, and end workers that have given none."""
        now = time.monotonic()
        if self._watchdog_s is None or now < self._beat_due:
            return
        self._beat_due = now + self._watchdog_s / 3
        for child in self._children:
            if child.pid and child.ready and now - child.heard_at > self._watchdog_s:
                log_event(LOG, logging.ERROR, "worker_hangs", worker=child.number)
                os.kill(child.pid, signal.SIGKILL if child.aborted else signal.SIGABRT)
                child.aborted = True
        systemd.notify("WATCHDOG=1")

    def _restart(self, child: _Child) -> None:
        try:
            self._start(child)
        except (OSError, ListenError) as error:
            child.due = time.monotonic() + BACKOFF_CAP_S
            log_event(LOG, logging.ERROR, "worker_not_started", worker=child.number, reason=str(error))

    def _listen_again(self, child: _Child) -> None:
        """Open again what was closed while it crashed again and again."""
        for index, listener in enumerate(child.listeners):
            if listener.fileno() < 0:
                others = (other.listeners[index] for other in self._children)
                child.listeners[index] = share(next(other for other in others if other.fileno() >= 0))

    def _turn(self, patience_s: float | None) -> None:
        """Wait for one thing to happen, and do what it asks for."""
        for key, _ in self._selector.select(None if patience_s is None else max(0.0, patience_s)):
            if key.data is None:
                with suppress(BlockingIOError):
                    while self._wakeup.recv(64):
                        pass
            else:
                self._hear(key.data)
        signalled, self._signalled[:] = list(self._signalled), []
        for number in signalled:
            if number == signal.SIGHUP:
                self._take_config()
            elif number != signal.SIGCHLD:
                self._stop(number)
        self._reap()

    def _hear(self, child: _Child) -> None:
        assert child.link is not None
        try:
            data = child.link.recv(MAX_ERROR)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if data[:1] == READY or (child.ready and data):
            child.ready = True
            child.heard_at = time.monotonic()
        elif data:
            child.said += data
        else:
            self._unlink(child)

    def _unlink(self, child: _Child) -> None:
        if child.link is not None:
            self._selector.unregister(child.link)
            child.link.close()
            child.link = None

    def _reap(self) -> None:
        for child in self._children:
            if not child.pid:
                continue
            pid, status = os.waitpid(child.pid, os.WNOHANG)
            if not pid:
                continue
            child.pid = 0
            if child.link is not None:
                self._hear(child)  # its last words
                self._unlink(child)
            self._ended(child, os.waitstatus_to_exitcode(status))

    def _ended(self, child: _Child, status: int) -> None:
        if self._stopping:
            _close_own(child)
            if status and child.ready:
                self._status = 1
                log_event(LOG, logging.ERROR, "worker_ended", worker=child.number, status=status)
            return
        now = time.monotonic()
        child.crashes = 0 if not status or now - child.since > STEADY_S else child.crashes + 1
        delay = min(BACKOFF_CAP_S, BACKOFF_S * 2.0 ** (child.crashes - 2)) if child.crashes > 1 else 0.0
        child.due = now + delay
        if delay and any(other.ready and other.pid for other in self._children):
            _close_own(child)  # what waited there for a moment should not wait for long
        if self._serving:  # else it is a start error, which is told once
            reason = child.said.decode(errors="replace") or None
            log_event(
                LOG,
                logging.ERROR if status else logging.WARNING,
                "worker_ended",
                worker=child.number,
                status=status,
                reason=reason,
                restartIn=delay,
            )

    def _take_config(self) -> None:
        systemd.reloading()
        try:
            self._config = self._reload()
        except ConfigError as error:
            log_event(LOG, logging.ERROR, "reload_failed", reason=str(error))
        else:
            for child in self._children:
                child.order(b"H")
        systemd.notify("READY=1")

    def _stop(self, number: int) -> None:
        self._stopping += 1
        drain = self._config.server.drain if self._stopping == 1 else 0.0
        self._deadline = time.monotonic() + drain + GRACE_S
        systemd.stopping(drain + GRACE_S)
        for child in self._children:
            if not child.pid:
                _close_own(child)
            elif not child.ready:
                os.kill(child.pid, signal.SIGKILL)  # it serves nobody
            elif self._stopping > 1:
                child.order(b"Q")
            else:
                child.order(b"I" if number == signal.SIGINT else b"T")

    def _kill(self) -> None:
        for child in self._children:
            if child.pid:
                os.kill(child.pid, signal.SIGKILL)
                os.waitpid(child.pid, 0)
                child.pid = 0
            self._unlink(child)


def _close_own(child: _Child) -> None:
    """Close its own sockets: what queued there would wait for ever."""
    for listener in child.listeners:
        if not is_common(listener):
            listener.close()


def supervise(config: Config, reload: Callable[[], Config]) -> int:
    """Run ``config.server.workers`` workers; see ``Supervisor.run``."""
    return Supervisor(config, reload).run()
