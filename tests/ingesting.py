"""Nodes that take updates in from Redis, and what they show, for the tests of that."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from server.ingest.redis_channels import RedisChannels
from server.ingest.redis_stream import RedisStream
from tests.support import InProcess, server, until


@asynccontextmanager
async def nodes(url: str, count: int = 2, **tables: Any) -> AsyncIterator[list[InProcess]]:
    """Some nodes that hear everything, and one of them takes it up."""
    async with AsyncExitStack() as stack:
        running = []
        for _ in range(count):
            running.append(await stack.enter_async_context(server(store={"url": url}, **tables)))
            await running[-1].node.broker.follow(["*"])
        await until(lambda: all(channels_of(each).listening for each in running))
        await until(lambda: any(channels_of(each).takes for each in running))
        await until(lambda: any(stream_of(each).takes for each in running))
        yield running


def channels_of(at: InProcess) -> RedisChannels:
    assert at.node.ingest is not None
    assert at.node.ingest.channels is not None
    return at.node.ingest.channels


def stream_of(at: InProcess) -> RedisStream:
    assert at.node.ingest is not None
    assert at.node.ingest.stream is not None
    return at.node.ingest.stream


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


def steps(at: InProcess, job_id: str) -> list[str]:
    """The messages of a job's updates in the order of the log."""
    return [json.loads(update.body)["message"] for update in at.node.history.of_job(job_id, 0)]


def text(**fields: object) -> str:
    return json.dumps(fields)


@asynccontextmanager
async def node_beside(url: str) -> AsyncIterator[InProcess]:
    """One more node, that hears everything but may have to wait for its turn."""
    async with server(store={"url": url}) as one:
        await one.node.broker.follow(["*"])
        await until(lambda: channels_of(one).listening)
        yield one
