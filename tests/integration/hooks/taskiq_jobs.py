"""Tasks and workers of Taskiq."""

from __future__ import annotations

import asyncio
import os

import behaviours
from taskiq import SimpleRetryMiddleware
from taskiq_redis import ListQueueBroker

from statuswire import flush
from statuswire.hooks import progress
from statuswire.hooks.taskiq import StatusMiddleware

broker = ListQueueBroker(os.environ["QUEUE_URL"], queue_name=os.environ.get("QUEUE", "tests")).with_middlewares(
    SimpleRetryMiddleware(default_retry_count=3),
    StatusMiddleware(ttl=2, raise_on_cancel=True, results=True),
)


@broker.task
async def ok(user_id: str, secret: str) -> object:
    progress(1)
    await asyncio.sleep(0)
    return behaviours.ok()


@broker.task
async def bad(user_id: str, secret: str) -> None:
    behaviours.bad()


@broker.task(retry_on_error=True)
def flaky(user_id: str, secret: str) -> None:
    if behaviours.first_time(f"flaky-{user_id}"):
        behaviours.bad()


@broker.task(timeout=0.2)
async def revoked(user_id: str, secret: str) -> None:
    await asyncio.sleep(60)


@broker.task
def asked(user_id: str, secret: str) -> None:
    behaviours.asked()


@broker.task
def die(user_id: str, secret: str) -> None:
    behaviours.die()


@broker.task
async def nobodys(secret: str) -> None:
    pass


async def send() -> None:
    await broker.startup()
    for user in ("alice", "bob"):
        for task in (ok, bad, flaky, revoked, asked):
            sent = await task.kiq(user_id=user, secret="not for everybody")
            print(f"{task.task_name.rpartition(':')[2]}-{user}", sent.task_id)
    sent = await nobodys.kiq(secret="not for everybody")
    print("nobodys", sent.task_id)
    await broker.shutdown()
    broker.queue_name = "fragile"
    await broker.startup()
    print("die-alice", (await die.kiq(user_id="alice", secret="not for everybody")).task_id)
    await broker.shutdown()


if __name__ == "__main__":
    # Whoever runs this file imports it under its own name, which the tasks have, too.
    import taskiq_jobs

    asyncio.run(taskiq_jobs.send())
    assert flush(30)
