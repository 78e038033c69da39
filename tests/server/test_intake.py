"""What is published for a source of updates: a portion at a time, and only as long as it is this node's turn."""

from __future__ import annotations

import json

import pytest

from server.ingest.intake import AT_ONCE, TurnLostError, publish, read_item
from tests.support import server


async def test_who_loses_its_turn_half_way_publishes_no_more() -> None:
    async with server() as at:
        items = [
            read_item(json.dumps({"jobId": "a", "userId": "u", "message": str(number)}).encode())
            for number in range(3 * AT_ONCE)
        ]
        turns = iter([True, False])
        with pytest.raises(TurnLostError):
            await publish(at.node, items, lambda: next(turns))
        job = at.node.jobs.get("a")
        assert job is not None
        assert job.latest.version == AT_ONCE
        assert [item.outcome is None for item in items] == [False] * AT_ONCE + [True] * 2 * AT_ONCE
