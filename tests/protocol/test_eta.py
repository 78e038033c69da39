"""The estimate of the remaining time."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.eta import advance, remaining_s
from protocol.update import Eta


def run(*reports: tuple[int, float]) -> Eta:
    eta = None
    for at_ms, progress in reports:
        eta = advance(eta, progress, at_ms)
    assert eta is not None
    return eta


def test_nothing_is_known_from_one_report_or_from_no_time() -> None:
    assert run((0, 50)).done_ms is None
    assert run((0, 0), (0, 50)).done_ms is None


def test_steady_progress_is_extrapolated() -> None:
    assert run((0, 0), (10_000, 10)).done_ms == 100_000
    assert run(*((second * 1000, second) for second in range(60))).done_ms == 100_000


def test_how_often_a_worker_reports_does_not_matter() -> None:
    often = run(*((tenth * 100, tenth / 10) for tenth in range(500)))
    assert often.done_ms == pytest.approx(100_000, abs=1)
    assert run((0, 0), (49_900, 49.9)).done_ms == pytest.approx(100_000, abs=1)


def test_recent_pace_outweighs_old() -> None:
    fast_then_slow = run((0, 0), (1_000, 50), (31_000, 53), (61_000, 56))
    assert fast_then_slow.done_ms is not None
    assert remaining_s(fast_then_slow.done_ms, 61_000) > 60


def test_no_progress_keeps_the_time_of_completion() -> None:
    eta = run((0, 0), (10_000, 50))
    assert advance(eta, 50, 15_000) is eta
    assert eta.done_ms is not None
    assert (remaining_s(eta.done_ms, 15_000), remaining_s(eta.done_ms, 15_001), remaining_s(eta.done_ms, 30_000)) == (
        5,
        5,
        0,
    )


def test_falling_progress_keeps_the_pace() -> None:
    assert run((0, 0), (10_000, 50), (10_000, 25)).done_ms == 25_000


def test_an_estimate_beyond_ten_years_is_none() -> None:
    assert run((0, 0), (86_400_000, 0.0001)).done_ms is None


@given(st.lists(st.tuples(st.integers(0, 10**9), st.floats(0, 100, allow_subnormal=True)), min_size=1, max_size=30))
def test_any_history_gives_none_or_a_time_that_can_be_shown(steps: list[tuple[int, float]]) -> None:
    eta, now_ms = None, 0
    for waited, progress in steps:
        now_ms += waited
        eta = advance(eta, progress, now_ms)
        assert eta.done_ms is None or 0 <= eta.done_ms - eta.at_ms <= 10 * 365 * 86_400_000
        assert eta.done_ms is None or progress > 0
