"""Rounds by turns, and what is kept of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from perf.measure import PATIENCE, UNDISTURBED, Measure

Results = tuple[dict[str, float] | None, dict[str, float]]


@dataclass(frozen=True)
class Cell:
    """One number of one peer: every round's, ours beside it, and how far they can be trusted.

    Attributes:
        ours: none where there was nothing to pair with.
        load: the load side's own share of its core, in percent, in our rounds.
        their_load: the same in the peer's.
        others: the largest share of a core, in percent, that was somebody else's.
    """

    ours: list[float]
    theirs: list[float]
    load: list[float]
    their_load: list[float]
    others: list[float]

    def median(self) -> float:
        """The peer's number."""
        return statistics.median(self.theirs)

    def ratio(self) -> float | None:
        """The peer's in ours: above 1, ours is less."""
        found = (
            [theirs / ours for ours, theirs in zip(self.ours, self.theirs, strict=True) if ours] if self.ours else []
        )
        return statistics.median(found) if found else None

    def disturbed(self) -> bool:
        """Whether somebody else had too much of a core."""
        return max(self.others) >= UNDISTURBED


def pairs(
    measures: Sequence[Measure],
    rounds: int,
    ours: Callable[[], dict[str, float]] | None,
    theirs: Callable[[], dict[str, float]],
) -> dict[str, Cell]:
    """Runs both by turns, who is first changing; disturbed rounds are repeated while there is patience."""
    done: list[Results] = []
    while len(done) < rounds or (sum(_others(pair) < UNDISTURBED for pair in done) < rounds and PATIENCE.left > 0):
        PATIENCE.wait_quiet()
        began = time.monotonic()
        if len(done) % 2 == 0:
            first = ours() if ours else None
            done.append((first, theirs()))
        else:
            second = theirs()
            done.append((ours() if ours else None, second))
        if len(done) > rounds:
            PATIENCE.left -= time.monotonic() - began
    best = sorted(done, key=_others)[:rounds]
    return {
        measure.key: Cell(
            ours=[_kept(mine[measure.key]) for mine, _ in best if mine is not None],
            theirs=[_kept(other[measure.key]) for _, other in best],
            load=[_kept(mine["load"]) for mine, _ in best if mine is not None],
            their_load=[_kept(other["load"]) for _, other in best],
            others=[_kept(_others(pair)) for pair in best],
        )
        for measure in measures
    }


def _others(pair: Results) -> float:
    return max(result["others"] for result in pair if result is not None)


def _kept(value: float) -> float:
    return round(value, 4)
