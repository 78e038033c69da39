"""Long work in portions: a generator that pauses, with a bare ``yield``, wherever others may have a turn.

What it works on must not change meanwhile: it is copied at its beginning, or nobody else has it yet.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from heapq import merge
from itertools import islice
from typing import Final, TypeVar

import trio

_T = TypeVar("_T")

# What takes its time is done for so long before others have a turn.
TURN_S: Final = 0.002
# Of plain things, compared and put somewhere, so many make a turn.
PORTION: Final = 2048
_turn: Final = trio.Lock()


async def next_turn() -> None:
    """Let others run. Of all who ask for it one goes on in each pass through Trio's loop, first come, first served:
    else a pass, and whoever waits for the next one, would take as long as a turn of each of them."""
    async with _turn:
        pass


def steps(work: Generator[None, None, _T], result: list[_T]) -> Generator[None, None, None]:
    """The same work and its pauses; what comes of it is added to ``result``."""
    result.append((yield from work))


async def in_turns(work: Generator[None, None, _T]) -> _T:
    """Do it, and let others run where it pauses. It begins at once."""
    result: list[_T] = []
    for _ in steps(work, result):
        await next_turn()
    return result[0]


def at_once(work: Generator[None, None, _T]) -> _T:
    """Do it without a pause."""
    result: list[_T] = []
    for _ in steps(work, result):
        pass
    return result[0]


def portions(items: Sequence[_T]) -> Iterable[Sequence[_T]]:
    """Cut into what makes a turn each."""
    return (items[start : start + PORTION] for start in range(0, len(items), PORTION))


def sort(runs: Iterable[Sequence[_T]], key: Callable[[_T], int]) -> Generator[None, None, list[_T]]:
    """All that is in these portions, in order."""
    ordered: list[list[_T]] = []
    for run in runs:
        if ordered:
            yield
        ordered.append(sorted(run, key=key))
    if len(ordered) <= 1:
        return ordered[0] if ordered else []
    result: list[_T] = []
    merged = merge(*ordered, key=key)
    while portion := list(islice(merged, PORTION)):
        result += portion
        yield
    return result
