"""Which sockets have something to read, and the few tasks that serve them.

A task per connection is most of what an idle connection takes, and waking one most of what a message costs. So all
sockets are in one epoll set, and one task, the *leader*, waits for the set. Whatever is readable has a *turn*, which
the leader runs itself, without any switch. A turn that has to wait keeps its task, with its cancel scopes and its
deadlines, and another task becomes leader: so a turn may await anything, and who never waits pays nothing for it.

The set is level-triggered: what a turn leaves unread comes again. A socket is taken out of it only if it is readable
while its turn waits. All turns are begun by the leader: between two of them nothing is under way.
"""

from __future__ import annotations

import logging
import os
import select
import types
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Coroutine, Generator
from contextlib import suppress
from time import perf_counter
from typing import Any, Final

import trio

from server.logs import log_event

LOG: Final = logging.getLogger("statuswire")

# The leader lets the flusher run after about this long, if that has something to do, and others after three times as
# long: a pass through Trio's loop costs more than its own 20 µs, since the caches are cold after it.
YIELD_AFTER_S: Final = 0.001
YIELD_ALWAYS_S: Final = 0.003
# Looked at in one go: enough to share the cost of asking, few enough for the others to have their turn.
MAX_EVENTS: Final = 64
# Tasks that wait to become leader; more of them end. Making one costs 15 µs, and one takes 3 KB.
MAX_PARKED: Final = 64


class Peer(ABC):
    """Whoever serves a socket. Its methods are the poller's to call."""

    __slots__ = ()

    @abstractmethod
    async def turn(self) -> bool:
        """Read what is there, and do what it asks for; there may be nothing. Raises nothing but cancellation.

        Returns:
            Whether it wants another turn at once, though there may be nothing more to read.
        """

    def waits(self) -> None:  # noqa: B027  # most have nothing to do then
        """A turn has to wait, perhaps not for the first time: what it has held back must not wait with it. Must not
        raise."""

    @abstractmethod
    def abandon(self) -> None:
        """The server stops: close, and leave no trace. Must not wait."""


def _always() -> bool:
    return True


class Poller:
    """The sockets of one server.

    Attributes:
        peers: who serves which descriptor. Taken out here, a socket is served no more.
        urgent: whether somebody else has something to do that should not wait.
        tasks: where whatever outlives a turn runs.
    """

    tasks: trio.Nursery

    def __init__(self) -> None:
        self.peers: dict[int, Peer] = {}
        self.urgent: Callable[[], bool] = _always
        self._set = select.epoll()
        # A dict for its order: who wants another turn and has more to read has one, or it would gain one each round.
        self._ready: dict[int, None] = {}
        self._running: Peer | None = None
        self._waiting: dict[Peer, trio.CancelScope] = {}
        self._masked: set[int] = set()
        self._parked: list[trio.lowlevel.Task] = []
        self._bell: int | None = None

    def start(self, nursery: trio.Nursery) -> None:
        """Serve in this nursery, until it is cancelled; ``close`` then."""
        self.tasks = nursery
        # Always readable: put into the set, it wakes the leader.
        self._bell = os.eventfd(1, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        nursery.start_soon(self._work)

    def close(self) -> None:
        """Abandon whoever is left."""
        while self.peers:
            _, peer = self.peers.popitem()
            peer.abandon()
        self._set.close()
        if self._bell is not None:
            os.close(self._bell)
            self._bell = None

    def add(self, fd: int, peer: Peer) -> None:
        """Serve a socket from now on. Added by a turn that has not waited, it has one next, whatever is there.

        Raises:
            OSError: the kernel has no room for it.
        """
        self._set.register(fd, select.EPOLLIN)
        self.peers[fd] = peer
        self._ready[fd] = None

    def listen_for(self, fd: int, events: int) -> None:
        """Give a peer its turns for these events only, until this is said again. Errors and hang-ups always count."""
        self._set.modify(fd, events)

    def call(self, fd: int) -> None:
        """Give a peer a turn soon, whatever is there."""
        self._ready[fd] = None
        self._wake_leader()

    def release(self, fd: int, farewell: Callable[[], Awaitable[object]]) -> None:
        """Serve a socket no more that has no turn under way; what is left to be done with it has a task of its own.

        If the server is being stopped, nothing happens: its peer will be abandoned.
        """
        if not self.tasks.cancel_scope.cancel_called:
            del self.peers[fd]
            self.tasks.start_soon(farewell)

    def wanted(self) -> bool:
        """Whether somebody has a turn to come: what may be asked before others are let run."""
        return bool(self._ready) or (not self._set.closed and bool(self._set.poll(0, 1)))

    def unbroken(self, peer: Peer) -> bool:
        """Whether a turn of it is under way that has not waited yet."""
        return peer is self._running

    def interrupt(self, peer: Peer) -> bool:
        """Whether a turn of it is under way. If that waits, it is cancelled."""
        if peer is self._running:
            return True
        scope = self._waiting.get(peer)
        if scope is None:
            return False
        scope.cancel()
        return True

    async def _work(self) -> None:
        """Lead, and again when it is this task's turn."""
        while True:
            with trio.CancelScope() as scope:
                await self._lead(scope)
            if len(self._parked) >= MAX_PARKED:
                return
            await self._park()

    async def _park(self) -> None:
        task = trio.lowlevel.current_task()
        self._parked.append(task)

        def abort(_: object) -> trio.lowlevel.Abort:
            self._parked.remove(task)
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)

    async def _lead(self, scope: trio.CancelScope) -> None:
        """Serve what is ready, until a turn has to wait; return when that turn is over."""
        peers, ready, poll = self.peers, self._ready, self._set.poll
        began = looked = perf_counter()
        ask = not ready  # what the last leader has left comes first
        while True:
            if ask:
                for fd, _ in poll(0, MAX_EVENTS):
                    ready[fd] = None
            ask = True
            if not ready:
                await trio.lowlevel.wait_readable(self._set.fileno())
                began = looked = perf_counter()
                continue
            for fd in list(ready):
                del ready[fd]
                peer = peers.get(fd)
                if peer is None or peer in self._waiting:
                    self._mask(fd, peer)
                    continue
                self._running = peer
                turn = peer.turn()
                try:
                    trap = turn.send(None)
                except StopIteration as end:
                    self._running = None
                    if end.value:
                        ready[fd] = None
                except Exception as error:
                    self._running = None
                    self._failed(fd, peer, error)
                else:
                    self._running = None
                    await self._wait(fd, peer, scope, turn, trap)
                    return
                now = perf_counter()
                if now - looked > YIELD_AFTER_S:
                    looked = now
                    if now - began > YIELD_ALWAYS_S or self.urgent():
                        await trio.lowlevel.checkpoint()
                        began = looked = perf_counter()

    async def _wait(
        self, fd: int, peer: Peer, scope: trio.CancelScope, turn: Coroutine[Any, Any, bool], trap: object
    ) -> None:
        """See a turn through that has to wait; somebody else leads meanwhile."""
        self._waiting[peer] = scope
        if self._parked:
            trio.lowlevel.reschedule(self._parked.pop())
        else:
            self.tasks.start_soon(self._work)
        again = False
        try:
            again = await _rest(turn, trap, peer.waits)
        except Exception as error:
            self._failed(fd, peer, error)
        finally:
            del self._waiting[peer]
            self._unmask(fd)
        if again and fd in self.peers:
            self.call(fd)

    def _wake_leader(self) -> None:
        """Have it look at what is ready, though it may be asleep; it takes the bell out again, as nobody's."""
        assert self._bell is not None
        with suppress(FileExistsError):
            self._set.register(self._bell, select.EPOLLIN)

    def _mask(self, fd: int, peer: Peer | None) -> None:
        """It is nobody's to read now, and would be reported for ever."""
        try:
            self._set.unregister(fd)
        except OSError:
            return  # it is closed, or was masked before
        if peer is not None:
            self._masked.add(fd)

    def _unmask(self, fd: int) -> None:
        if fd in self._masked:
            self._masked.discard(fd)
            peer = self.peers.get(fd)
            if peer is not None:
                try:
                    self._set.register(fd, select.EPOLLIN)
                except OSError as error:  # the kernel has no room for it any more
                    self._failed(fd, peer, error)

    def _failed(self, fd: int, peer: Peer, error: Exception) -> None:
        """A turn should not have raised; nobody but its peer shall suffer."""
        log_event(LOG, logging.ERROR, "connection_failed", exc_info=error)
        if self.peers.get(fd) is peer:
            del self.peers[fd]
            peer.abandon()


@types.coroutine
def _rest(turn: Coroutine[Any, Any, bool], trap: object, waits: Callable[[], object]) -> Generator[Any, Any, bool]:
    """Go on with a coroutine that has begun elsewhere in this task, and has asked Trio for this."""
    try:
        while True:
            waits()
            try:
                answer = yield trap
            except BaseException as error:
                trap = turn.throw(error)
            else:
                trap = turn.send(answer)
    except StopIteration as end:
        return bool(end.value)
