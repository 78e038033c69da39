"""When flushes are put off, and for how long."""

from __future__ import annotations

from itertools import pairwise

import pytest

from server.beat import BEAT_S, LEAST_S, MEMORY_S, MOST_SKIPPED, Beat


def busy(spent: float = 0.6, *, times: int = 100) -> tuple[Beat, float]:
    """A flush a millisecond, which takes this share of it. Returns when the last one began."""
    beat = Beat()
    for number in range(times):
        beat.flushed(10 + number / 1000, 10 + (number + spent) / 1000)
    return beat, 10 + (times - 1) / 1000


def test_whoever_has_little_to_send_waits_for_nothing() -> None:
    assert Beat().left(5.0) == 0.0
    for spent in (0.05, 0.2, 0.3):
        beat, began = busy(spent)
        assert beat.left(began + 0.001) == 0.0


@pytest.mark.parametrize("spent", [0.45, 0.6, 0.95])
def test_who_is_busy_with_flushes_keeps_the_beat(spent: float) -> None:
    beat, began = busy(spent)
    assert beat.left(began + 0.001) == pytest.approx(BEAT_S - 0.001)
    assert beat.left(began + BEAT_S - LEAST_S / 2) == 0.0  # so little is not waited for
    assert beat.left(began + BEAT_S) == beat.left(began + 1.0) == 0.0


def test_the_beat_lasts_while_it_is_kept_and_ends_with_the_load() -> None:
    beat, began = busy()
    for _ in range(100):  # as much is sent in fewer flushes
        assert beat.left(began + 0.002) > 0.0
        beat.put_off(10, 40)
        began += BEAT_S
        beat.flushed(began, began + 0.5 * BEAT_S)
    beat.flushed(began + MEMORY_S, began + MEMORY_S + 0.0001)
    beat.flushed(began + 2 * MEMORY_S, began + 2 * MEMORY_S + 0.0001)
    assert beat.left(began + 2 * MEMORY_S + 0.001) == 0.0


def test_a_moment_of_load_is_none() -> None:
    beat, began = busy(times=3)
    assert beat.left(began + 0.001) == 0.0


def test_a_delay_that_brings_nothing_is_tried_less_and_less_often() -> None:
    beat, began = busy()
    delays = []
    for number in range(4 * MOST_SKIPPED):
        if beat.left(began + 0.001):
            delays.append(number)
            beat.put_off(100, 199)
    gaps = [after - before for before, after in pairwise(delays)]
    assert gaps[:4] == [2, 3, 5, 9]
    assert gaps[-1] == MOST_SKIPPED + 1
    # One that pays makes up for all that did not.
    while not beat.left(began + 0.001):
        pass
    beat.put_off(100, 200)
    assert beat.left(began + 0.001)
    beat.put_off(100, 100)
    assert [beat.left(began + 0.001) > 0 for _ in range(3)] == [False, True, True]
