"""Each event of a queue counts once, although who takes it in is killed between the log and the mark, or is two."""

from __future__ import annotations

import json
import random
import re
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import redis as redis_py
import trio

from tests.pacing import for_a_while
from tests.redis_servers import RedisServer
from tests.support import Address, server, spawned, until, until_so

pytestmark = [pytest.mark.slow, pytest.mark.long]

LONG_S = 90.0  # reached only by what would never end
JOBS = 150
REPORTS = 20
# added, waiting, active, the reports, completed
EVENTS = REPORTS + 4


def write(oracle: redis_py.Redis, step: int) -> None:
    """The events of all jobs up to the next step of theirs."""
    with oracle.pipeline(transaction=False) as pipeline:
        if step == 0:
            pipeline.hset("bull:video:meta", "version", "bullmq:6.7.0")
        for job in range(JOBS):
            event: dict[str, Any] = {"jobId": str(job)}
            if step == 0:
                data = json.dumps({"userId": f"user_{job % 3}"})
                pipeline.hset(f"bull:video:{job}", mapping={"name": "encode", "data": data})
                event |= {"event": "added", "name": "encode"}
            elif step < 3:
                event["event"] = ("waiting", "active")[step - 1]
            elif step < EVENTS - 1:
                event |= {"event": "progress", "data": str(step)}
            else:
                event |= {"event": "completed", "prev": "active"}
            pipeline.xadd("bull:video:events", event)
        pipeline.execute()


async def versions(at: Address) -> dict[str, int]:
    answer = await at.get("/api/v2/jobs?limit=1000")
    return {job["jobId"]: job["version"] for job in answer.json["jobs"]}


async def taken_in(at: Address, outcome: str) -> int:
    text = (await at.get("/metrics")).body.decode()
    found = re.search(rf'published_total{{outcome="{outcome}",source="q"}} ([\d.e+]+)', text)
    return int(float(found[1])) if found else 0


async def accepted(at: Address, wanted: int) -> bool:
    return await taken_in(at, "accepted") >= wanted


async def all_there(at: Address) -> bool:
    return sum((await versions(at)).values()) >= JOBS * EVENTS


@pytest.mark.parametrize("store", ["sqlite", "redis"])
async def test_a_server_that_is_killed_again_and_again(store: str, redis: RedisServer, tmp_path: Path) -> None:
    directory = tmp_path / "server"
    directory.mkdir()
    tables: dict[str, Any] = {"queues.q": {"kind": "bullmq", "url": redis.url}}
    if store == "redis":
        tables["store"] = {"url": f"{redis.url}/1"}
    generator = random.Random(store)
    steps = iter(range(EVENTS))
    repeated = 0
    with redis.oracle() as oracle:
        for _ in range(5):
            async with spawned(directory, **tables) as at:
                before = await taken_in(at, "accepted")
                for step in [next(steps) for _ in range(3)]:
                    await trio.to_thread.run_sync(write, oracle, step)
                wanted = before + generator.randrange(1, 3 * JOBS)
                await until_so(partial(accepted, at, wanted), within=LONG_S, every=0.001)
                repeated += await taken_in(at, "duplicate")
                at.signal(signal.SIGKILL)
                await at.exit_status()
        for step in steps:
            write(oracle, step)
        async with spawned(directory, **tables) as at:
            await until_so(partial(all_there, at), within=LONG_S, every=0.05)
            repeated += await taken_in(at, "duplicate")
            assert await versions(at) == {f"video:{job}": EVENTS for job in range(JOBS)}
            for job in (0, JOBS - 1):
                history = (await at.get(f"/api/v2/jobs/video:{job}/history")).json["updates"]
                assert [update["version"] for update in history] == list(range(1, EVENTS + 1))
                assert [update["progress"] for update in history][3:-1] == list(range(3, EVENTS - 1))
                assert history[-1]["status"] == "completed"
    # They were killed with events in the log that the mark did not know of: those have been read again.
    assert repeated > 0


async def test_two_that_both_believe_it_is_their_turn(redis: RedisServer) -> None:
    tables: dict[str, Any] = {"store": {"url": f"{redis.url}/1"}, "queues.q": {"kind": "bullmq", "url": redis.url}}
    with redis.oracle() as oracle:
        async with server(**tables) as one, server(**tables) as two:
            assert one.node.queues is not None
            assert two.node.queues is not None
            first, second = one.node.queues.sources["q"], two.node.queues.sources["q"]

            assert second._lease is not None
            second._lease._key = b"{statuswire}:queue:another"  # so nobody else has it
            await until(lambda: first.trouble is None and second.trouble is None, within=LONG_S)
            for step in range(EVENTS):
                await trio.to_thread.run_sync(write, oracle, step)
                await for_a_while(0.02)  # each is read by itself
            counters = [source.taker.counters for source in (first, second)]
            await until_so(partial(all_there, two), within=LONG_S, every=0.05)
            await until(lambda: all(each.received >= JOBS * EVENTS for each in counters), within=LONG_S)
            await until(
                lambda: sum(each.accepted + each.duplicates for each in counters) == 2 * JOBS * EVENTS, within=LONG_S
            )
            assert await versions(one) == await versions(two) == {f"video:{job}": EVENTS for job in range(JOBS)}
            assert sum(each.accepted for each in counters) == JOBS * EVENTS
            assert sum(each.rejected for each in counters) == 0
