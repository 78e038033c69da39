"""A short run of the long one: whatever clients did, nothing of them is left."""

from __future__ import annotations

import pytest
import trio

from perf.soak import WINDOWS, grown, leftovers, run, soaked

pytestmark = pytest.mark.slow
NAMES = ("memory", "descriptors", "tasks", "sockets", "connections", "channels", "pending", "p99", "slowed")


@pytest.mark.parametrize("store", ["memory:", "sqlite:"])
def test_nothing_is_left_of_clients_that_came_and_went(store: str) -> None:
    with soaked(store) as target:
        result = trio.run(run, target, 8.0, 40, 0)
    assert result.left == []
    assert result.done["updates"] > 100
    for kind in ("by_websocket", "by_events", "by_polls", "by_requests", "probes"):
        assert result.done[kind] > 3, result.done


def test_what_grows_is_said() -> None:
    flat = [dict.fromkeys(NAMES, 10.0) | {"memory": 100.0, "p99": 50.0, "slowed": 1.0} for _ in range(WINDOWS)]
    assert grown(flat) == []
    late = [*flat[:9], *[window | {"memory": 120.0} for window in flat[9:]]]
    assert grown(late) == ["memory grew from 100.0 to 120.0"]
    early = [window | {"memory": 50.0} for window in flat[:2]] + flat[2:]
    assert grown(early) == [], "until its bounds are full it may grow"
    crowded = [*flat[:9], *[window | {"descriptors": 60.0, "sockets": 60.0} for window in flat[9:]]]
    assert grown(crowded) == [], "more clients are no growth"
    leaking = [*flat[:9], *[window | {"descriptors": 60.0} for window in flat[9:]]]
    assert grown(leaking) == ["descriptors grew from 0.0 to 50.0"]
    for others, found in ((1.0, ["p99 grew from 50.0 to 200.0"]), (2.0, [])):
        slow = [*flat[:9], *[window | {"p99": 200.0, "slowed": others} for window in flat[9:]]]
        assert grown(slow) == found, "what others do on this machine is not the server's"


def test_what_is_left_is_said() -> None:
    before = dict.fromkeys(NAMES, 1.0)
    assert leftovers(before, before) == []
    assert leftovers(before, before | {"channels": 2.0}) == ["channels: 2 left, 1 before"]
