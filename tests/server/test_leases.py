"""Leases, on virtual time and without a broker."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from protocol.job import apply, create, expire, request_cancel
from protocol.update import Job
from server.leases import Leases
from server.wheel import Wheel
from tests.contract.harness import fields
from tests.pacing import virtual_time


class Scene:
    def __init__(self) -> None:
        self.wheel = Wheel()
        self.expired: list[tuple[float, str, int]] = []
        self.leases = Leases(self.wheel, self.note)
        self.start = trio.current_time()

    def note(self, job_id: str, heard: int) -> None:
        self.expired.append((round(trio.current_time() - self.start, 1), job_id, heard))

    def show(self, job: Job) -> Job:
        self.leases.follow([(job.latest, job)])
        return job

    def make(self, **given: Any) -> Job:
        return self.show(create(fields(**given), job_id="a", user_id="u", offset=1, now_ms=0))

    def then(self, job: Job, **given: Any) -> Job:
        return self.show(apply(job, fields(**given), offset=job.latest.offset + 1, now_ms=0))


@pytest.fixture
async def scene() -> AsyncIterator[Scene]:
    scene = Scene()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(scene.wheel.run)
        yield scene
        nursery.cancel_scope.cancel()


async def test_silence_expires_and_is_told_until_something_is_shown(autojump_clock: MockClock, scene: Scene) -> None:
    job = scene.make(ttl=10)
    await virtual_time(12.5)
    assert scene.expired == [(10.0, "a", 1), (11.0, "a", 1), (12.0, "a", 1)]
    scene.show(expire(job, offset=2, now_ms=0))
    await virtual_time(10.2)
    assert scene.expired[3:] == [(22.5, "a", 2)]


async def test_every_update_renews_with_one_timer(autojump_clock: MockClock, scene: Scene) -> None:
    job = scene.make(ttl=10)
    for _ in range(8):
        await virtual_time(5)
        job = scene.then(job)
        assert len(scene.wheel) == 1
    assert scene.expired == []
    await virtual_time(10.5)
    assert scene.expired == [(50.0, "a", 9)]


async def test_a_shorter_lease_counts_at_once_and_a_longer_one_too(autojump_clock: MockClock, scene: Scene) -> None:
    job = scene.then(scene.make(ttl=100), ttl=2)
    await virtual_time(2.5)
    assert scene.expired == [(2.0, "a", 2)]
    scene.then(job, ttl=50)
    await virtual_time(49)
    assert len(scene.expired) == 1
    await virtual_time(2)
    assert scene.expired[1] == (52.5, "a", 3)


async def test_a_cancel_request_is_no_sign_of_life(autojump_clock: MockClock, scene: Scene) -> None:
    job = scene.make(ttl=10)
    await virtual_time(6)
    asked = request_cancel(job, offset=2, now_ms=0)
    assert asked is not None
    scene.show(asked)
    await virtual_time(4.5)
    assert scene.expired == [(10.0, "a", 1)]


@pytest.mark.parametrize("how", ["ended", "deleted", "no more ttl"])
async def test_a_lease_that_is_over_leaves_nothing(autojump_clock: MockClock, scene: Scene, how: str) -> None:
    job = scene.make(ttl=10)
    if how == "deleted":
        scene.leases.follow([(job.latest, None)])
    else:
        scene.then(job, **({"status": "completed"} if how == "ended" else {"ttl": None}))
    assert (len(scene.leases), len(scene.wheel)) == (0, 0)


async def test_restart_begins_anew(autojump_clock: MockClock, scene: Scene) -> None:
    job = scene.make(ttl=10)
    await virtual_time(8)
    scene.leases.restart([job])
    await virtual_time(8)
    assert scene.expired == []
    assert len(scene.wheel) == 1
    scene.leases.clear()
    assert (len(scene.leases), len(scene.wheel)) == (0, 0)
