"""The log that several nodes share in Redis: how far back it goes, and what they do where it has lost something."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from server.brokers import redis_broker
from server.brokers.redis_keys import shard_of
from tests.redis_nodes import nodes, publish
from tests.redis_servers import Proxy, RedisServer, running_proxy, running_server
from tests.streams import WebSocket, event_stream, session
from tests.support import ADMIN, AUTH, InProcess, bearer, server, token, until, until_answered

pytestmark = pytest.mark.slow


def two_hours_ago() -> float:
    return time.time() - 7200


@pytest.fixture
def own_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes go by their own clocks, however far off those are and however long it takes them to publish."""
    monkeypatch.setattr(redis_broker, "_CLOCK_OFF_S", math.inf)


@pytest.mark.usefixtures("own_time")
async def test_the_log_in_redis_is_bounded_by_age(redis: RedisServer) -> None:
    async with nodes(redis.url, auth=AUTH, history={"max_age": 60}) as (one, two):
        old = one.node.shared
        assert old is not None
        old._clock = two_hours_ago
        for number in range(300):
            last_old = await publish(one, f"job-{number % 40}", userId=f"user-{number % 40}")
        old._clock = time.time
        with redis.oracle() as oracle:
            logs = oracle.keys("{statuswire}:log:*")

            def length() -> int:
                return sum(oracle.xlen(key) for key in logs)

            # Each log keeps its newest entry: those who have read it know by it that they missed nothing.
            await until(lambda: length() == len(logs))
        fresh = await publish(one, "job-3", progress=3)
        epoch = one.node.history.epoch
        # To node two all of it is new.
        assert len((await two.get("/api/v2/jobs", ADMIN)).json["jobs"]) == 40
        for cursor, recovered in [(f"{epoch}:{last_old.offset - 200}", False), (f"{epoch}:{last_old.offset}", True)]:
            async with session(two, token=token("user-3")) as ws:
                begun = await ws.subscribe(last_seen=cursor)
                assert begun["recovered"] is recovered
                if recovered:
                    assert (await ws.receive())["id"] == f"{epoch}:{fresh.offset}"
                else:
                    assert [job["progress"] for job in begun["snapshot"]] == [3]
        async with event_stream(two, headers=bearer("user-3"), last_seen=f"{epoch}:1") as sse:
            assert [(await sse.event()).type for _ in range(3)] == ["connected", "reset", "snapshot"]
        # Who followed a log from before does not take what grew old for lost.
        assert one.node.history.epoch == two.node.history.epoch == epoch


@asynccontextmanager
async def one_is_cut_off(
    redis: RedisServer, clock: Callable[[], float] = time.time, **tables: Any
) -> AsyncIterator[tuple[InProcess, InProcess, WebSocket, Proxy]]:
    """Two nodes, and the second's reader; that one was cut off from Redis after job ``a`` was made, by this clock."""
    async with (
        running_proxy(redis.port) as proxy,
        server(store={"url": redis.url}, **tables) as one,
        server(store={"url": f"redis://127.0.0.1:{proxy.port}"}, **tables) as two,
        session(two) as ws,
    ):
        assert one.node.shared is not None
        one.node.shared._clock = clock
        await ws.subscribe()
        await publish(one, "a", userId="u")
        assert (await ws.receive())["version"] == 1
        proxy.stop_passing()
        proxy.cut()
        await until_answered(two, "/ready", 503)
        yield one, two, ws, proxy


@pytest.mark.usefixtures("own_time")
async def test_what_grew_old_while_a_node_was_away_is_not_lost(redis: RedisServer) -> None:
    async with one_is_cut_off(redis, two_hours_ago, history={"max_age": 60}) as (one, two, ws, proxy):
        for _ in range(20):
            await publish(one, "a")
        assert one.node.shared is not None
        one.node.shared._clock = time.time
        await publish(one, "a")
        with redis.oracle() as oracle:
            log = f"{{statuswire}}:log:{shard_of('u')}"
            await until(lambda: oracle.xlen(log) == 1)
        proxy.pass_again()
        reset = await ws.receive()
        assert (reset["type"], [job["version"] for job in reset["snapshot"]]) == ("reset", [22])
        assert one.node.history.epoch == two.node.history.epoch


async def test_a_node_that_was_away_for_too_long_begins_anew(redis: RedisServer) -> None:
    async with one_is_cut_off(redis, history={"max_updates": 50}) as (one, two, ws, proxy):
        # Streams are trimmed by whole nodes of 100 entries.
        for _ in range(400):
            await publish(one, "a")
        proxy.pass_again()
        reset = await ws.receive()
        assert (reset["type"], [job["version"] for job in reset["snapshot"]]) == ("reset", [401])
        await publish(one, "a")
        assert (await ws.receive())["version"] == 402
        assert one.node.history.epoch == two.node.history.epoch


async def test_room_is_made_on_all_nodes(redis: RedisServer) -> None:
    async with nodes(redis.url, history={"max_jobs": 10}) as (one, two):
        for at in (one, two):
            await at.get("/api/v2/jobs")
        for number in range(30):
            await publish(one, f"job-{number}", userId=f"u{number}")
            await publish(two, f"job-{number}", status="completed")
        for at in (one, two):
            await until(lambda at=at: at.node.history.last == two.node.history.last)  # type: ignore[misc]
            assert sorted(at.node.jobs.jobs) == sorted(f"job-{number}" for number in range(20, 30))


@pytest.mark.parametrize("how", ["older", "flushed"])
async def test_a_log_that_went_back_is_another_epoch(tmp_path: Path, how: str) -> None:
    with running_server(tmp_path) as redis:
        async with nodes(redis.url) as (one, two):
            before = await publish(one, "a", userId="u")
            with redis.oracle() as oracle:
                oracle.save()
            saved = tmp_path / "saved.rdb"
            shutil.copy(redis.directory / "dump.rdb", saved)
            async with session(one) as first, session(two) as second:
                for ws in (first, second):
                    await ws.subscribe()
                lost = await publish(one, "a", progress=50)
                await publish(one, "b", userId="u")
                for ws in (first, second):
                    await ws.updates("b", 1)
                epoch = one.node.history.epoch
                await trio.to_thread.run_sync(redis.kill)
                if how == "older":
                    shutil.copy(saved, redis.directory / "dump.rdb")
                else:
                    (redis.directory / "dump.rdb").unlink()
                await trio.to_thread.run_sync(redis.start)
                for ws in (first, second):
                    reset = await ws.receive()
                    assert reset["type"] == "reset", reset
                    assert [job["version"] for job in reset["snapshot"]] == ([1] if how == "older" else [])
                    assert not reset["id"].startswith(epoch)
                assert one.node.history.epoch == two.node.history.epoch != epoch
                accepted = await publish(two, "a", userId="u", progress=70)
                assert accepted.version == (2 if how == "older" else 1)
                for ws in (first, second):
                    told = await ws.receive()
                    assert (told["jobId"], told["progress"], told["version"]) == ("a", 70, accepted.version)
            for offset in (before.offset, lost.offset):
                answer = await two.get(f"/api/v2/jobs/poll?timeout=0&last_seen={epoch}:{offset}")
                assert answer.json["reset"]


async def test_an_epoch_that_was_over_does_not_come_back(tmp_path: Path) -> None:
    """An empty Redis for a while, then an old copy: its log goes on otherwise than those who read it know."""
    with running_server(tmp_path) as redis:
        async with nodes(redis.url) as (one, two), session(one) as ws:
            await ws.subscribe()
            await publish(one, "a", userId="u")
            with redis.oracle() as oracle:
                oracle.save()
            saved = tmp_path / "saved.rdb"
            shutil.copy(redis.directory / "dump.rdb", saved)
            read = (await publish(one, "a", progress=10)).offset
            await ws.updates("a", 2)
            epochs = [one.node.history.epoch]
            for copy in (None, saved):
                await trio.to_thread.run_sync(redis.kill)
                (redis.directory / "dump.rdb").unlink(missing_ok=True)
                if copy is not None:
                    shutil.copy(copy, redis.directory / "dump.rdb")
                await trio.to_thread.run_sync(redis.start)
                await until(
                    lambda: one.node.history.epoch == two.node.history.epoch and one.node.history.epoch not in epochs
                )
                epochs.append(one.node.history.epoch)
            for progress in (20, 30):
                await publish(two, "a", progress=progress)
            answer = await one.get(f"/api/v2/jobs/poll?timeout=0&last_seen={epochs[0]}:{read}")
            assert answer.json["reset"]
