"""Several queues that give out the same ids, and several nodes of which one has its turn: nothing gets mixed up."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any, cast

import pytest
import redis as redis_py

from protocol.queues.sighting import Sighting
from server.ingest.intake import TurnLostError
from tests.queueing import shown, until_status, until_up
from tests.redis_servers import RedisServer
from tests.support import InProcess, server, until


def add(oracle: redis_py.Redis, queue: str, job: str, user: str | None = None) -> None:
    """A job that is worked on, as BullMQ has it."""
    data = {} if user is None else {"userId": user}
    oracle.hset(f"bull:{queue}:meta", "version", "bullmq:6.7.0")
    oracle.hset(f"bull:{queue}:{job}", mapping={"name": "encode", "data": json.dumps(data)})
    tell(oracle, queue, job, event="active")


def tell(oracle: redis_py.Redis, queue: str, job: str, **event: str) -> None:
    oracle.xadd(f"bull:{queue}:events", {"jobId": job, **event})


def rejected(at: InProcess, name: str) -> int:
    assert at.node.queues is not None
    return at.node.queues.sources[name].taker.counters.rejected


def tables(redis: RedisServer, **more: Any) -> dict[str, Any]:
    """Two databases with a queue of the same name in each."""
    return {
        "store": {"url": "memory:"},
        "queues.one": {"kind": "bullmq", "url": f"{redis.url}/0", "queues": ["video"]},
        "queues.two": {"kind": "bullmq", "url": f"{redis.url}/1", "queues": ["video"], **more},
    }


@pytest.mark.parametrize("owner", ["bob", "alice", None])
async def test_a_job_of_another_source_with_the_same_id_is_left_alone(
    owner: str | None, redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    with redis.oracle() as one, redis.oracle(db=1) as two:
        async with server(**tables(redis)) as at:
            add(one, "video", "1", "alice")
            before = await until_status(at.node, "video:1", "processing")
            add(two, "video", "1", owner)
            tell(two, "video", "1", event="progress", data='{"percent": 50, "message": "not for alice"}')
            tell(two, "video", "1", event="completed")
            await until(lambda: rejected(at, "two") == 3)
            assert shown(at.node, "video:1") == before
            assert "queue_refused" in caplog.messages


async def test_what_came_into_being_meanwhile_is_left_alone_too(redis: RedisServer) -> None:
    async with server(**tables(redis)) as at:
        assert at.node.queues is not None
        one, two = (at.node.queues.sources[name].taker for name in ("one", "two"))
        mine = [Sighting(job="1", queue="video", at_ms=1, seq=1, status="processing", owner="alice")]
        theirs = [
            Sighting(job="1", queue="video", at_ms=1, seq=2, status="queued", owner="bob"),
            Sighting(job="1", queue="video", at_ms=1, seq=3, status="processing", message="not for alice"),
        ]
        await one.take(mine)
        # What is decided on is older than what it is applied to, as with another node's.
        real = at.node
        late = SimpleNamespace(jobs={}, hub=real.hub, config=real.config, broker=real.broker, shared=None)
        two._node = cast("Any", late)
        await two.take(theirs)
        assert two.counters.rejected == 2
        assert (shown(at.node, "video:1")["userId"], shown(at.node, "video:1")["version"]) == ("alice", 1)


async def test_a_prefix_keeps_them_apart(redis: RedisServer) -> None:
    with redis.oracle() as one, redis.oracle(db=1) as two:
        async with server(**tables(redis, id_prefix="staging:")) as at:
            add(one, "video", "1", "alice")
            add(two, "video", "1", "bob")
            assert (await until_status(at.node, "video:1", "processing"))["userId"] == "alice"
            assert (await until_status(at.node, "staging:video:1", "processing"))["userId"] == "bob"
            tell(two, "video", "1", event="completed")
            await until_status(at.node, "staging:video:1", "completed")
            assert shown(at.node, "video:1")["status"] == "processing"
            # Another session finds the job by its own name.
            assert at.node.queues is not None
            add(two, "video", "x" * 120, "bob")
            taker = at.node.queues.sources["two"].taker
            await until(lambda: taker.is_known("video", "x" * 120))
            await taker.begin()
            assert {(one.queue, one.job) for one in taker.open.values()} == {("video", "x" * 120)}


async def test_jobs_whose_own_names_are_not_known_are_not_looked_after(redis: RedisServer) -> None:
    async with server(**tables(redis, id_prefix="staging:")) as at:
        assert at.node.queues is not None
        taker = at.node.queues.sources["two"].taker
        names = ["1", "a b", "x" * 5000]
        await taker.take([Sighting(job=name, queue="video", at_ms=1, seq=1, status="processing") for name in names])
        await taker.begin()
        assert {one.job for one in taker.open.values()} == {"1", "a b"}
        taker._prefix = "production:"  # somebody has changed it
        await taker.begin()
        assert taker.open == {}


async def test_queues_whose_names_and_ids_read_alike(redis: RedisServer) -> None:
    queues = {"kind": "bullmq", "url": redis.url, "queues": ["a", "a:b"]}
    with redis.oracle() as oracle:
        async with server(store={"url": "memory:"}, **{"queues.one": queues}) as at:
            add(oracle, "a:b", "c", "alice")
            before = await until_status(at.node, "a:b:c", "processing")
            add(oracle, "a", "b:c", "bob")
            tell(oracle, "a", "b:c", event="progress", data='{"percent": 50, "message": "not for alice"}')
            await until(lambda: rejected(at, "one") == 2)
            assert shown(at.node, "a:b:c") == before


async def test_who_has_lost_its_turn_says_nothing_more(redis: RedisServer) -> None:
    store = {"url": f"{redis.url}/1"}
    async with server(store=store, **{"queues.one": {"kind": "celery", "url": redis.url}}) as at:
        await until_up(at.node)
        assert at.node.queues is not None
        source = at.node.queues.sources["one"]
        sighting = Sighting(job="a", at_ms=1, status="processing", owner="alice")
        await source.taker.take([sighting])
        assert source._lease is not None
        source._lease.release()  # another node may have it from now on
        with pytest.raises(TurnLostError):
            await source.taker.take([Sighting(job="a", at_ms=2, status="processing", stage="of the past")])
        with pytest.raises(TurnLostError):
            await source.taker.report_silent(["a"], 1.0)
        assert (source.taker.counters.accepted, shown(at.node, "a")["version"]) == (1, 1)
