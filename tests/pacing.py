"""Time that passes because it is what a test is about: a peer that stalls, a lease that runs out, a steady load,
or the time of a clock that jumps.

What happens at some time or other is waited for, see ``tests.support.until``.
"""

from __future__ import annotations

import math

import trio
from trio.testing import MockClock


async def for_a_while(seconds: float) -> None:
    """Let things go on as they are, for so many seconds."""
    await trio.sleep(seconds)


async def virtual_time(seconds: float) -> None:
    """Let so much time pass of a clock that jumps (``autojump_clock``), which takes none."""
    assert isinstance(trio.lowlevel.current_clock(), MockClock), "real time is not for waiting"
    await trio.sleep(seconds)


class Paced:
    """Numbers from 0 on, so many in a second, ``count`` in all; what is late is caught up with. For ``async for``."""

    # No async generator: those must not be left in the middle, as a cancelled task leaves them.
    def __init__(self, per_second: float, count: float = math.inf) -> None:
        self._begun = trio.current_time()
        self._per_second = per_second
        self._count = count
        self._number = -1

    def __aiter__(self) -> Paced:
        return self

    async def __anext__(self) -> int:
        self._number += 1
        if self._number >= self._count:
            raise StopAsyncIteration
        await trio.sleep_until(self._begun + self._number / self._per_second)
        return self._number
