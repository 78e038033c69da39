"""The token bucket: by table and by property, against a plain simulation."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.ratelimit import SHARE_S, Share, TokenBucket


def test_burst_then_rate() -> None:
    bucket = TokenBucket(rate=10, burst=3)
    assert [bucket.take(100.0) for _ in range(3)] == [0.0, 0.0, 0.0]
    assert bucket.take(100.0) == pytest.approx(0.1)
    assert bucket.take(100.05) == pytest.approx(0.05)  # a refusal takes nothing
    assert bucket.take(100.1) == 0.0
    assert bucket.take(100.1) > 0


def test_refills_up_to_burst_only() -> None:
    bucket = TokenBucket(rate=10, burst=2)
    assert bucket.take(0.0, 2) == 0.0
    assert bucket.take(1000.0, 2) == 0.0
    assert bucket.take(1000.0) > 0


def test_a_batch_over_the_burst_passes_when_full_and_is_paid_back() -> None:
    bucket = TokenBucket(rate=10, burst=5)
    assert bucket.take(0.0, 25) == 0.0
    assert bucket.take(0.0, 1) == pytest.approx(2.1)  # 20 in debt, and the one asked for
    assert bucket.take(2.0) > 0
    assert bucket.take(2.1) == 0.0


def test_a_batch_over_the_burst_waits_for_a_full_bucket() -> None:
    bucket = TokenBucket(rate=10, burst=5)
    assert bucket.take(0.0) == 0.0
    assert bucket.take(0.0, 25) == pytest.approx(0.1)
    assert bucket.take(0.1, 25) == 0.0


def test_a_clock_that_steps_back_neither_refills_nor_blocks() -> None:
    bucket = TokenBucket(rate=1, burst=1)
    assert bucket.take(1000.0) == 0.0
    assert bucket.take(10.0) == pytest.approx(1.0)
    assert bucket.take(10.5) == pytest.approx(0.5)
    assert bucket.take(11.0) == 0.0


def test_full_means_forgettable() -> None:
    bucket = TokenBucket(rate=2, burst=4)
    assert bucket.full(0.0)
    bucket.take(0.0, 4)
    assert not bucket.full(1.9)
    assert bucket.full(2.0)


def test_new_rates_hold_at_once() -> None:
    bucket = TokenBucket(rate=1, burst=100)
    bucket.rate, bucket.burst = 10, 1
    assert bucket.take(0.0) == 0.0
    assert bucket.take(0.0) == pytest.approx(0.1)


def test_nothing_costs_nothing() -> None:
    bucket = TokenBucket(rate=1, burst=1)
    bucket.take(0.0)
    assert bucket.take(0.0, 0) == 0.0


@pytest.mark.parametrize(
    ("rate", "burst"), [(0, 1), (-1, 1), (math.inf, 1), (math.nan, 1), (1, 0), (1, 0.5), (1, math.inf), (1, math.nan)]
)
def test_senseless_limits_are_refused(rate: float, burst: float) -> None:
    with pytest.raises(ValueError, match="must be a number"):
        TokenBucket(rate, burst)


def test_small() -> None:
    assert not hasattr(TokenBucket(1, 1), "__dict__")


rates = st.floats(0.01, 1e5)
bursts = st.floats(1, 1e5)


@given(rates, bursts, st.floats(0, 1e7), st.integers(1, 10_000), st.integers(1, 10_000))
def test_waiting_as_long_as_told_is_enough(rate: float, burst: float, now: float, first: int, second: int) -> None:
    bucket = TokenBucket(rate, burst)
    assert bucket.take(now, first) == 0.0
    wait = bucket.take(now, second)
    assert bucket.take(now + wait, second if wait else 0) == 0.0


@given(rates, bursts, st.lists(st.tuples(st.floats(-1, 5), st.integers(1, 50)), max_size=50))
def test_never_more_than_burst_and_rate_allow(rate: float, burst: float, steps: list[tuple[float, int]]) -> None:
    bucket = TokenBucket(rate, burst)
    now, forward, taken, largest = 0.0, 0.0, 0, 0
    for step, n in steps:
        now += step
        forward += max(step, 0.0)
        if bucket.take(now, n) == 0.0:
            taken += n
            largest = max(largest, n)
        assert taken <= burst + forward * rate * (1 + 1e-9) + largest + 1e-3


def test_a_share_is_spent_here_and_asked_for_when_it_is_used_up() -> None:
    share = Share()
    assert share.take(0.0) is None
    share.put(0.0, 2.0)
    assert [share.take(0.1), share.take(0.2), share.take(0.3)] == [0.0, 0.0, None]
    share.put(0.3, 3.0)
    assert share.take(0.4, 4) is None
    assert share.take(0.4, 3) == 0.0


def test_a_share_that_was_not_spent_is_no_longer_good() -> None:
    share = Share()
    share.put(0.0, 5.0)
    assert share.take(SHARE_S) is None
    share.put(2.0, 1.0)
    assert [share.take(2.0), share.take(2.0)] == [0.0, None]
    assert not share.idle(2.0)
    assert share.idle(2.0 + SHARE_S)


def test_a_refusal_is_remembered_until_it_is_over() -> None:
    share = Share()
    share.refuse(1.0, 0.5)
    assert share.take(1.25) == 0.25
    assert not share.idle(1.25)
    assert share.take(1.5) is None
    assert share.idle(1.5)
