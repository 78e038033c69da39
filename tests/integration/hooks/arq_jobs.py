"""Jobs and workers of arq."""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress
from typing import Any

import behaviours
from arq import Retry, create_pool, func
from arq.connections import RedisSettings

from statuswire import flush
from statuswire.hooks.arq import report, reporting

SETTINGS = RedisSettings.from_dsn(os.environ["QUEUE_URL"])


async def ok(ctx: dict[str, Any], user_id: str, secret: str) -> object:
    return behaviours.ok()


async def bad(ctx: dict[str, Any], user_id: str, secret: str) -> None:
    behaviours.bad()


async def flaky(ctx: dict[str, Any], user_id: str, secret: str) -> None:
    if ctx["job_try"] == 1:
        raise Retry(defer=0.1)


async def hopeless(ctx: dict[str, Any], user_id: str, secret: str) -> None:
    raise Retry


async def revoked(ctx: dict[str, Any], user_id: str, secret: str) -> None:
    await asyncio.sleep(60)


async def late(ctx: dict[str, Any], user_id: str, secret: str) -> None:
    await asyncio.sleep(60)


async def asked(ctx: dict[str, Any], user_id: str, secret: str) -> None:
    await asyncio.to_thread(behaviours.asked)


async def die(ctx: dict[str, Any], user_id: str, secret: str) -> None:
    if ctx["job_try"] == 1:
        await asyncio.to_thread(behaviours.die)


async def nobodys(ctx: dict[str, Any], secret: str) -> None:
    pass


@report(ttl=2, raise_on_cancel=True, results=True)
class WorkerSettings:
    functions = (ok, bad, flaky, func(hopeless, max_tries=2), revoked, func(late, timeout=0.2), asked, nobodys)
    redis_settings = SETTINGS
    allow_abort_jobs = True
    poll_delay = 0.05


@report(ttl=2)
class Fragile:
    functions = (die,)
    redis_settings = SETTINGS
    queue_name = "fragile"
    poll_delay = 0.05


async def send() -> None:
    redis = reporting(await create_pool(SETTINGS))
    early = []
    for user in ("alice", "bob"):
        for name in ("ok", "bad", "flaky", "hopeless", "revoked", "late", "asked"):
            job = await redis.enqueue_job(name, user_id=user, secret="not for everybody")
            assert job is not None
            print(f"{name}-{user}", job.job_id)
            if name == "revoked" and user == "alice":
                early.append(job)
    for name, queue in (("nobodys", None), ("die", "fragile")):
        owner = {} if queue is None else {"user_id": "alice"}
        job = await redis.enqueue_job(name, secret="not for everybody", _queue_name=queue, **owner)
        assert job is not None
        print(name if queue is None else "die-alice", job.job_id)
    for job in early:  # before any worker is there
        with suppress(TimeoutError):
            await job.abort(timeout=0)


async def abort(job_id: str) -> None:
    from arq.jobs import Job

    assert await Job(job_id, await create_pool(SETTINGS)).abort()


if __name__ == "__main__":
    import sys

    asyncio.run(abort(sys.argv[2]) if sys.argv[1] == "abort" else send())
    assert flush(30)
