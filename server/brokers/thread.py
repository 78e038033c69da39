"""One thread that does what waits for the disk, one thing after the other."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, Final, Generic, TypeVar

import trio

_T = TypeVar("_T")
_NAME: Final = "statuswire-store"


class _Call(Generic[_T]):
    """One call and what came of it."""

    __slots__ = ("error", "function", "value")

    value: _T

    def __init__(self, function: Callable[[], _T]) -> None:
        self.function = function
        self.error: BaseException | None = None

    def __call__(self) -> None:
        try:
            self.value = self.function()
        except BaseException as error:
            self.error = error


class StoreThread:
    """A thread of one task loop, from the first call to ``stop``. It has one call at a time: that is for its user to
    see to.

    A call costs a third of what one through ``trio.to_thread`` does (18 µs against 60), which has a limiter, a context
    and a name to set for each, and comes back by way of a task of Trio's own. Here both sides wait for a descriptor,
    and who makes it readable has given the GIL back while it does: a queue would wake the thread and then have it wait
    for the GIL. The thread is a daemon: whatever it is at when the process ends is nothing that was answered.
    """

    def __init__(self) -> None:
        self._thread: _Thread | None = None

    async def run(self, function: Callable[[], _T]) -> _T:
        """Call a function there. Cannot be cancelled. Raises what it raises."""
        thread = self._thread
        if thread is None:
            thread = self._thread = _Thread()
        call = _Call(function)
        thread.ask(call)
        with trio.CancelScope(shield=True):
            await trio.lowlevel.wait_readable(thread.over)
        os.eventfd_read(thread.over)
        if call.error is not None:
            try:
                raise call.error
            finally:
                call.error = None  # it has this frame in its traceback
        return call.value

    def stop(self) -> None:
        """Let it end, after what was asked for before."""
        if self._thread is not None:
            self._thread.ask(None)
            self._thread = None


class _Thread:
    """The thread itself, which closes its two descriptors at its end."""

    def __init__(self) -> None:
        self.over = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)  # what was asked for is done
        self._asked = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_SEMAPHORE)
        self._calls: deque[_Call[Any] | None] = deque()
        threading.Thread(target=self._work, name=_NAME, daemon=True).start()

    def ask(self, call: _Call[Any] | None) -> None:
        """Have this called next; None: the end."""
        self._calls.append(call)
        os.eventfd_write(self._asked, 1)

    def _work(self) -> None:
        while True:
            os.eventfd_read(self._asked)
            call = self._calls.popleft()
            if call is None:
                break
            call()
            del call  # what it was about need not stay until the next one comes
            os.eventfd_write(self.over, 1)
        os.close(self._asked)
        os.close(self.over)
