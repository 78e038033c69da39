"""One thread that does what waits for the disk, one thing after the other."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from typing import Final, Generic, TypeVar

import trio

_T = TypeVar("_T")
_NAME: Final = "statuswire-store"


class _Call(Generic[_T]):
    """One call and what came of it."""

    __slots__ = ("error", "function", "task", "value")

    value: _T

    def __init__(self, function: Callable[[], _T], task: trio.lowlevel.Task) -> None:
        self.function = function
        self.task = task
        self.error: BaseException | None = None

    def __call__(self) -> None:
        try:
            self.value = self.function()
        except BaseException as error:
            self.error = error


class StoreThread:
    """A thread of one task loop, from the first call to ``stop``.

    A call costs half of what one through ``trio.to_thread`` does, which has a limiter, a context and a name to set for
    each. The thread is a daemon: whatever it is at when the process ends is nothing that was answered.
    """

    def __init__(self) -> None:
        self._calls: SimpleQueue[_Call[object] | None] = SimpleQueue()
        self._running = False

    async def run(self, function: Callable[[], _T]) -> _T:
        """Call a function there, after what was asked for before. Cannot be cancelled. Raises what it raises."""
        if not self._running:
            self._running = True
            token = trio.lowlevel.current_trio_token()
            threading.Thread(target=self._work, args=(token,), name=_NAME, daemon=True).start()
        call = _Call(function, trio.lowlevel.current_task())
        self._calls.put(call)  # type: ignore[arg-type]  # what it gives back goes to nobody else
        await trio.lowlevel.wait_task_rescheduled(lambda _: trio.lowlevel.Abort.FAILED)
        if call.error is not None:
            try:
                raise call.error
            finally:
                call.error = None  # it has this frame in its traceback
        return call.value

    def stop(self) -> None:
        """Let it end, after what was asked for before."""
        if self._running:
            self._running = False
            self._calls.put(None)

    def _work(self, token: trio.lowlevel.TrioToken) -> None:
        while (call := self._calls.get()) is not None:
            call()
            with suppress(trio.RunFinishedError):
                token.run_sync_soon(trio.lowlevel.reschedule, call.task)
            del call  # what it was about need not stay until the next one comes
