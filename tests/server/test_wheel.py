"""The timer wheel, on virtual time."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator

import pytest
import trio
from trio.testing import MockClock

from server.wheel import RESOLUTION, Wheel
from tests.pacing import for_a_while, virtual_time


@pytest.fixture
async def wheel() -> AsyncIterator[Wheel]:
    wheel = Wheel()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(wheel.run)
        yield wheel
        nursery.cancel_scope.cancel()


async def test_timers_fire_in_order_and_never_early(autojump_clock: MockClock, wheel: Wheel) -> None:
    start = trio.current_time()
    fired: list[tuple[str, float]] = []

    def mark(name: str) -> None:
        fired.append((name, trio.current_time() - start))

    wheel.after(5, lambda: mark("late"))
    wheel.after(0.5, lambda: mark("early"))  # wakes the sleeping wheel
    wheel.after(5, lambda: mark("same slot"))
    wheel.after(-1, lambda: mark("at once"))
    assert len(wheel) == 4
    await virtual_time(10)
    assert [name for name, _ in fired] == ["at once", "early", "late", "same slot"]
    for (_, at), due in zip(fired, [0, 0.5, 5, 5], strict=True):
        assert due - 1e-9 <= at <= due + RESOLUTION + 1e-9
    assert len(wheel) == 0


def stand_still(seconds: float) -> None:
    """The whole process does nothing for so long."""
    time.sleep(seconds)


async def test_after_a_stop_others_come_first(wheel: Wheel) -> None:
    fired: list[str] = []
    late = trio.Event()
    wheel.after(0.1, late.set)
    assert wheel.resumed < 0
    stand_still(2.5)

    async def read() -> None:
        fired.append("read")

    async with trio.open_nursery() as nursery:
        wheel.after(0, lambda: fired.append("timer"))
        nursery.start_soon(read)
        await late.wait()
    assert fired == ["read", "timer"]
    assert trio.current_time() - wheel.resumed < 1


async def test_cancelled_timers_do_not_fire_and_leave_nothing(autojump_clock: MockClock, wheel: Wheel) -> None:
    fired: list[int] = []
    timers = [wheel.after(seconds, lambda: fired.append(1)) for seconds in (1, 1, 2)]
    assert [timer.pending for timer in timers] == [True, True, True]
    for timer in timers:
        timer.cancel()
        timer.cancel()
    assert [timer.pending for timer in timers] == [False, False, False]
    assert len(wheel) == 0
    again = wheel.after(1, lambda: fired.append(2))  # into a slot that was emptied
    await virtual_time(3)
    assert fired == [2]
    assert not again.pending
    again.cancel()
    assert (wheel._slots, wheel._due, wheel._empty) == ({}, [], 0)


async def test_many_cancelled_timers_do_not_pile_up(autojump_clock: MockClock, wheel: Wheel) -> None:
    keep: list[int] = []
    wheel.after(50, lambda: keep.append(1))
    for number in range(5000):
        wheel.after(1000 + number, lambda: None).cancel()
    assert len(wheel._slots) < 2100
    assert len(wheel._due) == len(wheel._slots)
    await virtual_time(60)
    assert keep == [1]


async def test_callbacks_may_set_and_cancel_timers(autojump_clock: MockClock, wheel: Wheel) -> None:
    fired: list[str] = []

    def first() -> None:
        fired.append("first")
        second.cancel()
        wheel.after(1, lambda: fired.append("later"))
        wheel.after(0, lambda: fired.append("at once"))

    wheel.after(1, first)
    second = wheel.after(1, lambda: fired.append("second"))
    await virtual_time(1.1)
    assert fired == ["first", "at once"]
    await virtual_time(2)
    assert fired == ["first", "at once", "later"]
    assert wheel._empty == 0


async def test_a_failing_callback_is_logged_and_stops_nothing(
    autojump_clock: MockClock, wheel: Wheel, caplog: pytest.LogCaptureFixture
) -> None:
    fired: list[int] = []

    def fail() -> None:
        raise ValueError("mine")

    wheel.after(1, fail)
    wheel.after(1, lambda: fired.append(1))
    await virtual_time(2)
    assert fired == [1]
    assert "a timer's callback failed" in caplog.text


async def test_a_full_slot_leaves_the_loop_its_turns() -> None:
    wheel = Wheel()
    order: list[str] = []

    def busy() -> None:
        until = trio.current_time() + 0.002
        while trio.current_time() < until:
            pass
        order.append("timer")

    async def other() -> None:
        while len(order) < 20:
            order.append("other")
            await trio.lowlevel.checkpoint()

    for _ in range(5):
        wheel.after(0, busy)
    await for_a_while(0.02)  # until they are due together
    async with trio.open_nursery() as nursery:
        nursery.start_soon(wheel.run)
        await other()
        nursery.cancel_scope.cancel()
    first, last = order.index("timer"), len(order) - order[::-1].index("timer")
    assert "other" in order[first:last]
