"""Updates that workers publish to Redis itself: each is accepted once, whichever nodes there are and whatever befalls them."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import redis as redis_py
import trio

from server.brokers.redis_client import parse_redis_url
from server.ingest.redis_channels import CHANNELS, RedisChannels
from server.ingest.redis_stream import DEAD, GROUP, STREAM
from tests.redis_servers import RedisServer, eventually, running_server
from tests.support import InProcess, server

LONG_S = 60.0


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    with running_server(tmp_path) as running:
        yield running


@pytest.fixture
def oracle(redis: RedisServer) -> Iterator[redis_py.Redis]:
    with redis.oracle() as client:
        yield client


@asynccontextmanager
async def nodes(url: str, count: int = 2, **tables: Any) -> AsyncIterator[list[InProcess]]:
    """Some nodes that hear everything, and one of them takes it up."""
    async with AsyncExitStack() as stack:
        running = []
        for _ in range(count):
            running.append(await stack.enter_async_context(server(store={"url": url}, **tables)))
            await running[-1].node.broker.follow(["*"])
        await eventually(lambda: all(each.node.ingest.channels.listening for each in running), within=LONG_S)
        await eventually(lambda: any(each.node.ingest.channels.takes for each in running), within=LONG_S)
        yield running


def channels_of(at: InProcess) -> RedisChannels:
    ingest = at.node.ingest
    assert ingest is not None
    assert ingest.channels is not None
    return ingest.channels


def version(at: InProcess, job_id: str) -> int:
    """How many updates of a job are shown."""
    job = at.node.jobs.get(job_id)
    return 0 if job is None else job.latest.version


def record(at: InProcess, job_id: str) -> dict[str, Any]:
    job = at.node.jobs.get(job_id)
    assert job is not None
    body = json.loads(job.latest.body)
    assert isinstance(body, dict)
    return body


def text(**fields: object) -> str:
    return json.dumps(fields)


@pytest.mark.parametrize("count", [1, 3])
async def test_each_message_is_accepted_once(redis: RedisServer, oracle: redis_py.Redis, count: int) -> None:
    async with nodes(redis.url, count) as running:
        for number in range(60):
            channel = CHANNELS[number % 2]
            more = {"eventId": f"e{number}"} if number % 3 else {}
            oracle.publish(channel, text(jobId="a", userId="u", progress=number, message=f"step {number}", **more))
        oracle.publish("job_completion_updates", text(jobId="a", result={"rows": 3}))
        await eventually(lambda: all(version(each, "a") == 61 for each in running), within=LONG_S)
        ended = record(running[0], "a")
        assert (ended["status"], ended["progress"], ended["result"]) == ("completed", 100, {"rows": 3})
        # A later one comes behind everything: nothing was accepted a second time.
        oracle.publish("job_status_updates", text(jobId="b", userId="u"))
        await eventually(lambda: version(running[0], "b") == 1)
        assert version(running[0], "a") == 61
        counted = [each.node.ingest.counters.channels for each in running]
        assert sum(each.accepted for each in counted) == 62
        assert sum(each.received for each in counted) == 62


async def test_stream(redis: RedisServer, oracle: redis_py.Redis) -> None:
    oracle.xadd(STREAM, {"data": text(jobId="early", userId="u")})
    async with nodes(redis.url) as running:
        await eventually(lambda: version(running[0], "early") == 1, within=LONG_S)
        for number in range(1, 51):
            oracle.xadd(STREAM, {"data": text(jobId="a", userId="u", progress=number)})
        oracle.xadd(STREAM, {"data": f"[{text(jobId='a', status='completed')}, {text(jobId='b', userId='u')}]"})
        await eventually(lambda: all(version(each, "a") == 51 for each in running), within=LONG_S)
        await eventually(lambda: version(running[1], "b") == 1)
        await eventually(lambda: oracle.xlen(STREAM) == 0)
        assert oracle.xpending(STREAM, GROUP)["pending"] == 0
        assert oracle.xlen(DEAD) == 0
