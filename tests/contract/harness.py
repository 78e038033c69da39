"""A broker with everything round it, for the tests of all stores."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from protocol.errors import ApiError
from protocol.fields import Fields, decode_fields
from protocol.update import Job, Update
from server.brokers.base import Accepted, Broker, Operation, Publish, Result
from server.brokers.local import LocalBroker
from server.brokers.memory import MemoryBroker
from server.brokers.redis_broker import RedisBroker
from server.brokers.sqlite import SqliteBroker
from server.history import History
from server.jobs import Jobs
from server.wheel import Wheel


def fields(**given: Any) -> Fields:
    """An update as published."""
    return decode_fields(json.dumps(given).encode())


def publish(
    job_id: str | None, *, sub: str = "w", key: str | None = None, create: Any = "may", **given: Any
) -> Publish:
    """A publish operation; ``create`` and ``key`` as in ``Publish``, the rest are fields."""
    return Publish(job_id, fields(**given), create, sub, key)


class Rig:
    """A started broker, what it shows, and all it ever delivered."""

    def __init__(self, store: str, path: Path, *, max_jobs: int, max_updates: int, max_age: float) -> None:
        self.jobs = Jobs(max_jobs=max_jobs)
        self.history = History(max_updates=max_updates, max_age=max_age, max_bytes=2**26)
        self.wheel = Wheel()
        self.delivered: list[tuple[Update, Job | None]] = []
        self.epochs: list[str] = []
        self.broker: LocalBroker | RedisBroker
        if store.startswith("redis:"):
            self.broker = RedisBroker(store, self.jobs, self.history, self.deliver, on_new_epoch=self.epochs.append)
        elif store == "memory":
            self.broker = MemoryBroker(self.jobs, self.history, self.deliver, self.wheel)
        else:
            self.broker = SqliteBroker(
                str(path), self.jobs, self.history, self.deliver, self.wheel, on_new_epoch=self.epochs.append
            )
        _: Broker = self.broker  # it has the whole interface

    def deliver(self, kept: Sequence[tuple[Update, Job | None]]) -> None:
        for update, job in kept:
            self.delivered.append((update, job))
            self.jobs.show(update, job)
            self.history.append(update)

    async def decide(self, *operations: Operation) -> list[Result]:
        """Submit and wait until kept."""
        submission = self.broker.submit(operations)
        await submission.wait_kept()
        return submission.results

    async def accept(self, operation: Operation) -> Accepted:
        (result,) = await self.decide(operation)
        assert isinstance(result, Accepted), result
        return result

    async def refuse(self, operation: Operation) -> ApiError:
        (result,) = await self.decide(operation)
        assert isinstance(result, ApiError), result
        return result

    def record(self, job_id: str) -> dict[str, Any]:
        job = self.jobs.get(job_id)
        assert job is not None, job_id
        body = json.loads(job.latest.body)
        assert isinstance(body, dict)
        return body


@asynccontextmanager
async def running(
    store: str,
    path: Path,
    *,
    max_jobs: int = 1000,
    max_updates: int = 10_000,
    max_age: float = 3600.0,
    close: bool = True,
) -> AsyncIterator[Rig]:
    """A started broker whose tasks run."""
    rig = Rig(store, path, max_jobs=max_jobs, max_updates=max_updates, max_age=max_age)
    await rig.broker.start()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(rig.broker.run)
        nursery.start_soon(rig.wheel.run)
        try:
            await rig.broker.follow(["*"])
            yield rig
        finally:
            nursery.cancel_scope.cancel()
    if close:
        await rig.broker.close()
