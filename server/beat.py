"""How long a busy flusher puts its next flush off, so that more goes together: a rule over times, without a clock.

A flush has costs of its own, and those of the pass through the loop that begins it; and its first sends wake readers
that have gone to sleep since the last. Many channels with a few readers each, and a thousand batches of updates a
second, would have it begin a thousand times. So while sending is much of what the process does, flushes to several
channels begin no more often than the *beat*. With little to do, with so much that a flush takes longer than that, and
for one channel alone there is no waiting.

Whoever goes on only when what is on its way has arrived gains nothing by a delay, and would lose a beat each time. This
shows: nothing more comes while the flush is put off. Then it is tried again less and less often.
"""

from __future__ import annotations

from typing import Final

# Flushes begin no more often than this, in seconds.
BEAT_S: Final = 0.003
# Below this it is not worth a timer.
LEAST_S: Final = 0.0005
# Share of the time that goes into flushes from which on they keep the beat.
BUSY: Final = 0.35
# Over about this long that share is taken.
MEMORY_S: Final = 0.02
# After a delay that has brought nothing, one in so many flushes is put off again at the least.
MOST_SKIPPED: Final = 1024


class Beat:
    """What is remembered of the last flushes."""

    __slots__ = ("_began", "_next_skipped", "_share", "_skip", "_spent")

    def __init__(self) -> None:
        self._began = 0.0
        self._spent = 0.0
        self._share = 0.0
        self._skip = 0
        self._next_skipped = 1

    def flushed(self, began: float, ended: float) -> None:
        """A flush took place then (seconds of any clock)."""
        interval = began - self._began
        if interval > 0:
            weight = min(1.0, interval / MEMORY_S)
            self._share += weight * (self._spent / interval - self._share)
        self._began = began
        self._spent = ended - began

    def left(self, now: float) -> float:
        """How many seconds the next flush is to be put off; 0.0 for not at all."""
        if self._share < BUSY:
            return 0.0
        left = self._began + BEAT_S - now
        if left < LEAST_S:
            return 0.0
        if self._skip:
            self._skip -= 1
            return 0.0
        return left

    def put_off(self, before: int, after: int) -> None:
        """One was put off. What is to be sent was so much before that, and is so much now."""
        if after >= 2 * before:
            self._next_skipped = 1
        else:
            self._skip = self._next_skipped
            self._next_skipped = min(2 * self._next_skipped, MOST_SKIPPED)
