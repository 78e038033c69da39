"""Times that leave out what else a machine does."""

from __future__ import annotations

import os
import time

import trio

from perf.crowded import TICK_S, LoopClock, slowed, waits_of
from tests.support import until


def test_how_much_others_slow_it_down() -> None:
    before = {"": 100.0, "a": 1.0, "b": 5.0, "gone": 3.0}
    assert slowed(before, {"": 110.0, "a": 6.0, "b": 5.0, "new": 9.0}) == 2.0
    assert slowed(before, {"": 110.0, "a": 6.0, "b": 10.0}) == 4.0
    assert slowed({}, before) == 1.0


def test_a_process_is_looked_at_thread_by_thread() -> None:
    waits = waits_of(os.getpid())
    assert len(waits) >= 2
    assert all(seconds >= 0 for seconds in waits.values())


def stand_still(seconds: float) -> None:
    """The whole loop does nothing for so long."""
    time.sleep(seconds)


async def test_the_clock_of_a_loop_stands_still_with_it() -> None:
    clock = LoopClock()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(clock.run)
        begun = clock()
        await until(lambda: clock() > begun + 3 * TICK_S)  # it goes
        before = clock()
        stand_still(1.0)
        assert clock() - before <= TICK_S * 1.01
        await until(lambda: clock() > before + 3 * TICK_S)
        assert clock() - before < 0.9
        nursery.cancel_scope.cancel()
