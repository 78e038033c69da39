"""Long works beside each other: however many there are, together they have one turn each time."""

from __future__ import annotations

from collections.abc import Generator

import pytest
import trio

from server.turns import in_turns

WORKS = 20
STEPS = 5


async def test_of_many_long_works_one_goes_on_each_time() -> None:
    steps: list[int] = []
    results: list[int] = []

    def work(number: int) -> Generator[None, None, int]:
        for _ in range(STEPS):
            steps.append(number)
            yield
        return number

    async def do(number: int) -> None:
        results.append(await in_turns(work(number)))

    async with trio.open_nursery() as nursery:
        for number in range(WORKS):
            nursery.start_soon(do, number)
        while len(set(steps)) < WORKS:
            await trio.lowlevel.checkpoint()
        most = 0
        while len(results) < WORKS:
            before = len(steps)
            await trio.lowlevel.checkpoint()
            most = max(most, len(steps) - before)
    assert most <= 2, "one, and perhaps another as the order of tasks in a pass is random"
    assert sorted(results) == list(range(WORKS))


async def test_a_work_that_fails_or_is_given_up_holds_nobody_up() -> None:
    def fails() -> Generator[None, None, None]:
        yield
        raise ValueError("a bug")

    def endless() -> Generator[None, None, None]:
        while True:
            yield

    def ends() -> Generator[None, None, str]:
        yield
        return "done"

    with pytest.raises(ValueError, match="a bug"):
        await in_turns(fails())
    with trio.CancelScope() as scope:
        scope.cancel()
        await in_turns(endless())
    assert await in_turns(ends()) == "done"
