"""Several nodes publish about the same jobs and see to the same leases: each thing happens once."""

from __future__ import annotations

import json
import time
from collections import Counter
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from protocol.errors import ApiError
from protocol.fields import decode_fields
from server.brokers import redis_broker
from server.brokers.base import Accepted, Cancel, Delete, Publish
from server.brokers.redis_client import Client, Reply, Script
from tests.pacing import for_a_while
from tests.redis_nodes import nodes, publish, under_load
from tests.redis_servers import RedisServer, running_server
from tests.streams import session
from tests.support import PATIENCE_S, InProcess, server, until

pytestmark = pytest.mark.slow


async def test_all_contend_and_every_version_is_given_once(redis: RedisServer) -> None:
    async with nodes(redis.url) as running, under_load(running, jobs=3) as (_, more):
        await more()


async def test_a_key_counts_on_every_node(redis: RedisServer) -> None:
    async with nodes(redis.url) as (one, two):
        outcomes: list[Accepted] = []

        async def send(at: InProcess) -> None:
            outcomes.append(await publish(at, "a", key="k", userId="u", progress=1))

        async with trio.open_nursery() as nursery:
            for at in (one, two) * 10:
                nursery.start_soon(send, at)
        assert Counter(outcome.duplicate for outcome in outcomes) == {False: 1, True: 19}
        assert {(outcome.offset, outcome.version) for outcome in outcomes} == {(1, 1)}


async def test_refusals_rest_on_what_redis_has(redis: RedisServer) -> None:
    async with nodes(redis.url) as (one, two):
        for at in (one, two):
            await at.get("/api/v2/jobs")
        for attempt in range(1, 30):
            # At once on the other node, whatever that one has been told so far.
            await publish(one, "a", userId="u", attempt=attempt, status="completed")
            ended = await two.post("/api/v2/jobs/a/updates", {"progress": 1})
            assert (ended.status, ended.error) == (409, "job_ended")
            assert (await two.post("/api/v2/jobs", {"jobId": "a"})).error == "job_exists"
            await two.ask("DELETE", "/api/v2/jobs/a")
            assert (await one.post("/api/v2/jobs/a/updates", {"progress": 1})).error == "job_not_found"


async def test_a_cancel_does_not_reach_the_next_owners_job(redis: RedisServer) -> None:
    async with nodes(redis.url) as (one, two):
        await one.get("/api/v2/jobs")
        for _ in range(20):
            await publish(one, "a", userId="alice")
            gone = two.node.broker.submit([Delete("a")])
            await gone.wait_kept()
            await publish(two, "a", userId="bob")
            late = one.node.broker.submit([Cancel("a", "alice")])
            await late.wait_kept()
            (refused,) = late.results
            assert isinstance(refused, ApiError)
            assert refused.code == "job_not_found"
            assert "cancelRequested" not in (await two.get("/api/v2/jobs/a")).json
            await one.ask("DELETE", "/api/v2/jobs/a")


async def test_parents_add_up_from_all_nodes(redis: RedisServer) -> None:
    async with nodes(redis.url) as (one, two):
        await publish(one, "parent", userId="u", autoComplete=True)

        async def part(at: InProcess, job_id: str) -> None:
            await publish(at, job_id, userId="u", parentId="parent")
            for progress in (20, 40, 60, 80):
                await publish(at, job_id, progress=progress)
            await publish(at, job_id, status="failed" if job_id == "part-3" else "completed")

        async with session(two) as ws:
            await ws.subscribe(jobIds=["parent"])
            # The first part is made while nothing else is under way, or the parent could end with what there is.
            for number in range(10):
                await publish(one, f"part-{number}", userId="u", parentId="parent")
            async with trio.open_nursery() as nursery:
                for number in range(10):
                    nursery.start_soon(part, (one, two)[number % 2], f"part-{number}")
            while (message := await ws.receive())["type"] != "job_failed":
                pass
        assert message["steps"] == {"done": 9, "total": 10, "failed": 1}
        assert message["error"] == "1 of 10 parts failed"
        for at in (one, two):
            job = at.node.jobs.get("parent")
            assert job is None or job.private.parts == two.node.jobs.jobs["parent"].private.parts


async def test_a_parent_and_its_parts_in_one_batch(redis: RedisServer) -> None:
    async with nodes(redis.url) as (one, _):
        lines: list[dict[str, object]] = [{"jobId": "p", "userId": "u"}, {"jobId": "p", "stage": "s"}]
        lines += [{"jobId": f"q{number}", "userId": "u", "parentId": "p", "progress": 50} for number in range(20)]
        answer = await one.post("/api/v2/updates", lines)
        assert (answer.json["accepted"], answer.json["rejected"]) == (22, [])
        assert (await one.get("/api/v2/jobs/p")).json["progress"] == 50


async def test_a_clock_that_is_ahead_does_not_stop_the_others(
    redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    async with nodes(redis.url) as (one, two):
        shared = one.node.shared
        assert shared is not None
        shared._clock = lambda: time.time() + 3600
        await until(lambda: "this machine's clock differs" in caplog.text)
        for at in (one, two):
            await publish(at, "a", userId="u")
            record = (await at.get("/api/v2/jobs/a")).json
            stamp = datetime.fromisoformat(record["timestamp"])
            assert abs(stamp.timestamp() - time.time()) < PATIENCE_S
        shared._clock = time.time
        await until(lambda: shared._clock_off_s == 0.0)


# Leases


async def test_one_node_declares_a_lease(redis: RedisServer) -> None:
    async with nodes(redis.url) as (one, two), session(one) as first, session(two) as second:
        await first.subscribe()
        await second.subscribe()
        for number in range(20):
            await publish((one, two)[number % 2], f"job-{number}", userId=f"u{number}", ttl=0.2)
        for ws in (first, second):
            told: list[tuple[str, str]] = []
            while len(told) < 60:
                message = await ws.receive()
                told.append((message["jobId"], message["status"]))
            counts = Counter(told)
            for number in range(20):
                for status in ("queued", "stalled", "failed"):
                    assert counts[f"job-{number}", status] == 1
            await ws.quiet()


async def test_a_dead_nodes_leases_are_declared_by_another(redis: RedisServer) -> None:
    async with server(store={"url": redis.url}) as two, session(two) as ws:
        await ws.subscribe()
        async with server(store={"url": redis.url}) as one:
            await publish(one, "a", userId="u", ttl=1.0, status="processing")
        assert [(await ws.receive())["status"] for _ in range(3)] == ["processing", "stalled", "failed"]


async def test_leases_that_are_not_to_be_declared_yet_hold_up_no_others(
    redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many ran out while no server could be reached: each worker has the length of its lease to come back."""
    monkeypatch.setattr(redis_broker, "_LEASES_AT_ONCE", 4)
    async with server(store={"url": redis.url}) as one:
        await one.node.broker.follow(["*"])
        for number in range(7):
            await publish(one, f"long-{number}", userId="u", ttl=600)
            with redis.oracle() as oracle:
                oracle.zadd("{statuswire}:leases", {f"long-{number}": 1})
        # As many as it would take a minute to declare, if only some were looked at each second.
        for number in range(100):
            await publish(one, f"short-{number}", userId="u", ttl=0.2)
        await until(lambda: one.node.jobs.by_status["failed"] == 100, within=PATIENCE_S / 2)
        assert one.node.jobs.by_status["queued"] == 7


async def test_workers_get_their_lease_anew_when_redis_comes_back(tmp_path: Path) -> None:
    with running_server(tmp_path, "--appendonly", "yes", "--appendfsync", "always") as redis:
        async with server(store={"url": redis.url}) as one, session(one) as ws:
            await ws.subscribe()
            await publish(one, "a", userId="u", ttl=1.0)
            await trio.to_thread.run_sync(redis.kill)
            await for_a_while(1.5)  # longer than the lease, which is all that is left of it when Redis is back
            await trio.to_thread.run_sync(redis.start)
            await publish(one, "a", progress=1)
            told = [message["status"] for message in await ws.updates("a", 4) if "status" in message]
            assert told == ["queued", "queued", "stalled", "failed"]


async def test_what_cannot_be_read_in_redis_ends_no_server(
    redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    async with server(store={"url": redis.url}) as one:
        with redis.oracle() as oracle:
            oracle.hset("{statuswire}:jobs:0", "x", "somebody else's")
            oracle.hset("{statuswire}:where", "x", 0)
            oracle.zadd("{statuswire}:leases", {"x": 1})
        await until(lambda: "cannot be looked at" in caplog.text)
        await publish(one, "a", userId="u")
        assert (await one.get("/ready")).status == 200
        # Whoever asks for it is told so, at once, and nobody else.
        bodies: list[dict[str, Any]] = [{"userId": "u"}, {"progress": 1}]
        for body in bodies:
            assert await outcomes(one, "x", "a", **body) == ["internal", "accepted"]
        assert one.node.broker.figures()["waiting"] == 0


async def outcomes(at: InProcess, *job_ids: str, **fields: object) -> list[str]:
    """What becomes of the same update of several jobs: accepted, or the code of the refusal."""
    data = decode_fields(json.dumps(fields).encode())
    submission = at.node.broker.submit([Publish(job_id, data, "may", "worker") for job_id in job_ids])
    with trio.fail_after(PATIENCE_S):
        await submission.wait_kept()
    return [result.code if isinstance(result, ApiError) else "accepted" for result in submission.results]


async def test_a_mistake_of_ours_is_the_trouble_of_one_operation(
    redis: RedisServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with server(store={"url": redis.url}) as one:
        await publish(one, "a", userId="u")
        send_script = Client.send_script

        def mistaken(client: Client, script: Script, keys: Any, arguments: Any, **more: Any) -> Reply:
            if "bad" in arguments:
                raise TypeError("a mistake")
            return send_script(client, script, keys, arguments, **more)

        monkeypatch.setattr(Client, "send_script", mistaken)
        assert await outcomes(one, "a", "bad", "b", userId="u") == ["accepted", "internal", "accepted"]
        assert "TypeError: a mistake" in caplog.text
        monkeypatch.undo()
        assert await outcomes(one, "bad", "a", userId="u") == ["accepted", "accepted"]
        assert one.node.broker.figures()["waiting"] == 0
