"""One timer wheel for everything that must happen later: leases, heartbeats, timeouts. No task per timer."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from heapq import heapify, heappop, heappush
from typing import Final

import trio

_log = logging.getLogger("statuswire.wheel")

# Seconds per slot. All timers of a slot fire on one wake-up of the loop: fine enough for heartbeats and leases,
# which are given in seconds, and coarse enough that 10,000 connections do not mean 10,000 wake-ups.
RESOLUTION: Final = 0.01
# How long callbacks may hold the loop before it gets a turn: a full slot of heartbeats must not delay deliveries.
_TURN: Final = 0.001
# Later than this nothing is unless the whole process stood still: it was stopped, or its machine was. What came
# meanwhile waits in the sockets, and its senders are not to be given up unheard: so it is read first, for so long.
STOOD_STILL: Final = 2.0
_CATCH_UP: Final = 0.2
# Empty slots are dropped together once there are this many and they are the majority.
_EMPTY_FROM: Final = 1024


class Timer:
    """One pending callback. ``cancel`` is idempotent and leaves nothing behind."""

    __slots__ = ("_callback", "_slot", "_wheel")

    def __init__(self, wheel: Wheel, slot: int, callback: Callable[[], object]) -> None:
        self._wheel = wheel
        self._slot = slot
        self._callback: Callable[[], object] | None = callback

    @property
    def pending(self) -> bool:
        """Neither fired nor cancelled."""
        return self._callback is not None

    def cancel(self) -> None:
        """Make it not fire."""
        if self._callback is not None:
            self._callback = None
            self._wheel._remove(self, self._slot)

    def _fire(self) -> None:
        callback, self._callback = self._callback, None
        if callback is not None:
            callback()


class Wheel:
    """Timers in slots of 10 ms, the next due slot on top of a heap. Times are ``trio.current_time()`` seconds.

    Attributes:
        now: the time.
        resumed: when the process last went on after it had stood still; at first, long ago.
    """

    def __init__(self) -> None:
        # ``trio.current_time``, found once: that looks for the clock anew each time, for 0.3 µs more.
        self.now = trio.lowlevel.current_clock().current_time
        self.resumed = -math.inf
        self._slots: dict[int, dict[Timer, None]] = {}
        self._due: list[int] = []  # heap of the keys of _slots
        self._empty = 0
        self._wake: trio.Event | None = None  # set while run() sleeps
        self._sleeping_until = math.inf

    def __len__(self) -> int:
        """Number of pending timers."""
        return sum(map(len, self._slots.values()))

    def after(self, seconds: float, callback: Callable[[], object]) -> Timer:
        """Call back in so many seconds, at most 10 ms late. What the callback raises is logged and goes no further."""
        slot = math.ceil((self.now() + (seconds if seconds > 0.0 else 0.0)) / RESOLUTION)
        timer = Timer(self, slot, callback)
        timers = self._slots.get(slot)
        if timers is None:
            self._slots[slot] = {timer: None}
            heappush(self._due, slot)
            if self._wake is not None and slot * RESOLUTION < self._sleeping_until:
                self._wake.set()
        else:
            if not timers:
                self._empty -= 1
            timers[timer] = None
        return timer

    async def run(self) -> None:
        """Fire what is due, until cancelled."""
        while True:
            if self._due and trio.current_time() - self._due[0] * RESOLUTION > STOOD_STILL:
                self.resumed = trio.current_time()
                await trio.sleep(_CATCH_UP)
            turn_ends = trio.current_time() + _TURN
            while self._due and self._due[0] * RESOLUTION <= trio.current_time():
                timers = self._slots.pop(heappop(self._due))
                if not timers:
                    self._empty -= 1
                for timer in timers:
                    self._fire(timer)
                    if trio.current_time() > turn_ends:
                        await trio.lowlevel.checkpoint()
                        turn_ends = trio.current_time() + _TURN
            self._wake = trio.Event()
            self._sleeping_until = self._due[0] * RESOLUTION if self._due else math.inf
            try:
                with trio.move_on_at(self._sleeping_until):
                    await self._wake.wait()
            finally:
                self._wake = None

    def _fire(self, timer: Timer) -> None:
        try:
            timer._fire()
        except Exception:
            _log.exception("a timer's callback failed")

    def _remove(self, timer: Timer, slot: int) -> None:
        timers = self._slots.get(slot)
        if timers is None or timer not in timers:
            return  # its slot is being fired at this moment
        del timers[timer]
        if not timers:
            self._empty += 1
            if self._empty >= _EMPTY_FROM and self._empty * 2 > len(self._slots):
                self._slots = {slot: timers for slot, timers in self._slots.items() if timers}
                self._due = list(self._slots)
                heapify(self._due)
                self._empty = 0
