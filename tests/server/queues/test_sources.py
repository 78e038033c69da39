"""What queues keep in a real Redis becomes records: once, whoever goes on, whatever was missed."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import redis as redis_py
import trio

from server.ingest.queues import bull, bull4, bullmq, celery
from tests.queueing import captured, put_stream, raw, shown, status, steps, until_status, until_up
from tests.redis_servers import RedisServer, running_server
from tests.support import ADMIN, AUTH, PATIENCE_S, bearer, server, until

BULLMQ = captured("bullmq")["bullmq6"]
STREAM = BULLMQ["stream"]
ENDS = {"video:1": "completed", "video:2": "failed", "video:job_123": "completed", "video:5": "cancelled"}


@pytest.fixture
def redis(shared_redis: RedisServer) -> RedisServer:
    with shared_redis.oracle() as oracle:
        oracle.flushall()
        oracle.config_set("notify-keyspace-events", "")
    return shared_redis


@pytest.fixture
def oracle(redis: RedisServer) -> Iterator[redis_py.Redis]:
    with redis.oracle() as client:
        yield client


def put_hashes(oracle: redis_py.Redis) -> None:
    hashes = BULLMQ["job_hashes"]
    for job, name in {"1": "transcode:completed", "2": "bad:failed", "job_123": "custom:completed"}.items():
        oracle.hset(f"bull:video:{job}", mapping=hashes[name])
    oracle.zadd("bull:video:completed", {"1": 1, "job_123": 2})
    oracle.zadd("bull:video:failed", {"2": 1})
    oracle.hset("bull:video:meta", mapping=BULLMQ["meta_hash"])


def table(redis: RedisServer, kind: str, **more: Any) -> dict[str, Any]:
    return {"queues.src": {"kind": kind, "url": f"{redis.url}/0", **more}}


async def test_bullmq_from_the_beginning_of_its_stream(redis: RedisServer, oracle: redis_py.Redis) -> None:
    put_hashes(oracle)
    put_stream(oracle, "bull:video:events", STREAM)
    async with server(auth=AUTH, store={"url": "memory:"}, **table(redis, "bullmq")) as one:
        await until_up(one.node)
        await until(lambda: all(status(one.node, name) == end for name, end in ENDS.items()))
        assert shown(one.node, "video:2")["error"] == "ffmpeg exited with code 1"
        assert steps(one.node, "video:2") == ["queued", "processing", "queued", "processing", "failed"]
        # Its owner sees it, nobody else does; what has no owner is the admins'.
        mine = await one.ask("GET", "/api/v2/jobs/video:1", headers=bearer("user_789"))
        assert (mine.status, mine.json["progress"]) == (200, 100)
        assert (await one.ask("GET", "/api/v2/jobs/video:1", headers=bearer("user_1"))).status == 404
        assert (await one.ask("GET", "/api/v2/jobs/video:5", headers=bearer("user_789"))).status == 404
        assert (await one.ask("GET", "/api/v2/jobs/video:5", headers=ADMIN)).status == 200
        refused = await one.ask("GET", "/api/v2/jobs/video:5", headers=bearer("queue:src"))
        assert refused.status == 401
        ready = await one.ask("GET", "/ready")
        assert ready.json == {"status": "ready", "queues": {"src": {"state": "up"}}}
        metrics = (await one.ask("GET", "/metrics", headers=ADMIN)).body.decode()
        assert 'statuswire_queue_up{source="src"} 1' in metrics
        assert 'statuswire_updates_published_total{outcome="accepted",source="src"}' in metrics


async def test_it_goes_on_where_it_was_and_finds_what_happened_meanwhile(
    redis: RedisServer, oracle: redis_py.Redis, tmp_path: Path
) -> None:
    store = {"url": f"sqlite:{tmp_path / 'store.db'}"}
    queues = table(redis, "bullmq", queues=["video"])
    put_hashes(oracle)
    put_stream(oracle, "bull:video:events", STREAM[:12])
    async with server(store=store, **queues) as one:
        await until_status(one.node, "video:2", "queued", "processing", "failed")
        await until_up(one.node)
    put_stream(oracle, "bull:video:events", STREAM[12:])
    async with server(store=store, **queues) as one:
        await until(lambda: all(status(one.node, name) == end for name, end in ENDS.items()))
        assert one.node.queues is not None
        source = one.node.queues.sources["src"]
        await until(lambda: shown(one.node, "video:1").get("version") == 6)
        mark = await one.node.broker.load_mark("queue:src")
        await until(lambda: source.trouble is None)
        assert mark is None or "video" in json.loads(mark)
        versions = {name: shown(one.node, name)["version"] for name in ENDS}
    # All of it once more, as after a crash before the mark was kept.
    async with server(store=store) as one:  # which takes nothing in, and so moves no mark
        await one.node.broker.save_mark("queue:src", json.dumps({"video": "0-0"}))
    async with server(store=store, **queues) as one:
        await until_up(one.node)
        assert one.node.queues is not None
        counters = one.node.queues.sources["src"].taker.counters
        await until(lambda: counters.received >= 40)
        assert counters.accepted == 0
        assert {name: shown(one.node, name)["version"] for name in ENDS} == versions


async def test_what_the_stream_has_lost_is_in_the_hashes(
    redis: RedisServer, oracle: redis_py.Redis, tmp_path: Path
) -> None:
    store = {"url": f"sqlite:{tmp_path / 'store.db'}"}
    put_stream(oracle, "bull:video:events", STREAM[:9])
    for job in "12":
        oracle.hset(f"bull:video:{job}", mapping=BULLMQ["job_hashes"]["transcode:active"])
    oracle.hset("bull:video:meta", mapping=BULLMQ["meta_hash"])
    async with server(store=store, **table(redis, "bullmq")) as one:
        await until_status(one.node, "video:2", "queued")
        await until_up(one.node)
    put_hashes(oracle)
    put_stream(oracle, "bull:video:events", STREAM[9:])
    oracle.xtrim("bull:video:events", maxlen=1, approximate=False)
    async with server(store=store, **table(redis, "bullmq")) as one:
        record = await until_status(one.node, "video:2", "failed")
        assert (record["attempt"], record["error"]) == (2, "ffmpeg exited with code 1")
        assert (await until_status(one.node, "video:job_123", "completed"))["userId"] == "user_1"


async def test_what_jobs_carry_is_not_read_if_it_is_too_large(redis: RedisServer, oracle: redis_py.Redis) -> None:
    large = json.dumps({"userId": "user_789", "file": "x" * 2_000_000})
    oracle.hset("bull:video:meta", mapping=BULLMQ["meta_hash"])
    for job, place in (("1", None), ("2", "failed"), ("3", "completed")):
        fields = {"name": "transcode", "data": large, "stacktrace": large, "returnvalue": large, "timestamp": "1"}
        oracle.hset(f"bull:video:{job}", mapping={**fields, "processedOn": "2", "finishedOn": "3", "ats": "1"})
        if place:
            oracle.zadd(f"bull:video:{place}", {job: 1})
    put_stream(oracle, "bull:video:events", STREAM[:6])
    before = oracle.info("stats")["total_net_output_bytes"]
    async with server(store={"url": "memory:"}, **table(redis, "bullmq", results=True)) as one:
        ends = {"video:1": "completed", "video:2": "failed", "video:3": "completed"}
        await until(lambda: all(status(one.node, name) == end for name, end in ends.items()))
        assert {shown(one.node, name)["userId"] for name in ends} == {"queue:src"}
    assert oracle.info("stats")["total_net_output_bytes"] - before < 200_000


async def test_jobs_that_are_gone_without_an_event_are_cancelled(
    redis: RedisServer, oracle: redis_py.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A queue that is drained, cleaned or obliterated says nothing of its jobs."""
    monkeypatch.setattr(bullmq, "_CHECK_EVERY_S", 0.01)
    monkeypatch.setattr(bullmq, "_CHECKED", 2)
    oracle.hset("bull:video:meta", mapping=BULLMQ["meta_hash"])
    jobs = [f"{number}" for number in range(7)]
    for job in jobs:
        oracle.hset(f"bull:video:{job}", mapping={"name": "encode", "data": '{"userId":"user_789"}'})
        oracle.xadd("bull:video:events", {"event": "waiting", "jobId": job})
    oracle.xadd("bull:video:events", {"event": "active", "jobId": "6", "prev": "waiting"})
    async with server(store={"url": "memory:"}, **table(redis, "bullmq")) as one:
        await until_status(one.node, "video:6", "processing")
        await until_up(one.node)
        # One that has ended tells so in the same step as its hash goes.
        with oracle.pipeline() as together:
            together.xadd("bull:video:events", {"event": "completed", "jobId": "0", "prev": "active"})
            together.delete("bull:video:0")
            together.execute()
        oracle.delete("bull:video:1", "bull:video:2", "bull:video:6")
        for job in ("1", "2", "6"):
            await until_status(one.node, f"video:{job}", "cancelled")
        assert status(one.node, "video:0") == "completed"
        assert {status(one.node, f"video:{job}") for job in ("3", "4", "5")} == {"queued"}
        assert one.node.queues is not None
        source = one.node.queues.sources["src"]
        assert {one.job for one in source.taker.open.values()} == {"3", "4", "5"}


async def test_a_job_whose_id_is_used_again_is_not_gone(
    redis: RedisServer, oracle: redis_py.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its hash is missing for a moment, and the event of its end has not been read then."""
    looks = 0

    async def slow(client: Any, commands: Any) -> Any:
        nonlocal looks
        answers = await ask(client, commands)
        if commands and commands[0][0] == "EXISTS":
            looks += 1
            if not answers[0]:
                with oracle.pipeline() as together:
                    together.xadd("bull:video:events", {"event": "completed", "jobId": "0", "prev": "active"})
                    together.hset("bull:video:0", mapping={"name": "encode", "data": '{"userId":"user_789"}'})
                    for event in ("added", "waiting", "active"):
                        together.xadd("bull:video:events", {"event": event, "jobId": "0"})
                    together.execute()
        return answers

    ask = bullmq.ask
    monkeypatch.setattr(bullmq, "ask", slow)
    monkeypatch.setattr(bullmq, "_CHECK_EVERY_S", 0.01)
    oracle.hset("bull:video:meta", mapping=BULLMQ["meta_hash"])
    oracle.hset("bull:video:0", mapping={"name": "encode", "data": '{"userId":"user_789"}'})
    for event in ("waiting", "active"):
        oracle.xadd("bull:video:events", {"event": event, "jobId": "0"})
    async with server(store={"url": "memory:"}, **table(redis, "bullmq")) as one:
        await until_status(one.node, "video:0", "processing")
        await until_up(one.node)
        oracle.delete("bull:video:0")
        await until(lambda: shown(one.node, "video:0")["attempt"] == 2)
        before = looks
        await until(lambda: looks > before + 2)
        assert status(one.node, "video:0") == "processing"


@pytest.mark.slow
async def test_a_job_whose_worker_has_died_is_stalled_and_then_failed(
    redis: RedisServer, oracle: redis_py.Redis
) -> None:
    oracle.hset("bull:video:meta", mapping=BULLMQ["meta_hash"])
    oracle.hset("bull:video:1", mapping=BULLMQ["job_hashes"]["transcode:active"])
    oracle.lpush("bull:video:active", "1")
    oracle.set("bull:video:1:lock", "token")
    put_stream(oracle, "bull:video:events", STREAM[:3])
    queues = table(redis, "bullmq", stalled_after=2.0)
    async with server(store={"url": "memory:"}, **queues) as one:
        await until_status(one.node, "video:1", "processing")
        await until_up(one.node)
        oracle.delete("bull:video:1:lock")
        assert (await until_status(one.node, "video:1", "stalled"))["error"] == "its worker is gone"
        assert (await until_status(one.node, "video:1", "failed"))["error"] == "lost"
        # The queue gives it to another one.
        entry = {"event": "waiting", "jobId": "1", "prev": "active"}
        oracle.xadd("bull:video:events", entry)
        oracle.xadd("bull:video:events", {"event": "active", "jobId": "1", "prev": "waiting"})
        record = await until_status(one.node, "video:1", "processing")
        assert record["attempt"] == 2
        assert "error" not in record


async def test_bull_four_from_its_channels_and_its_hashes(redis: RedisServer, oracle: redis_py.Redis) -> None:
    traffic = captured("bullmq")["bull4"]
    hashes = traffic["job_hashes"]
    oracle.set("bull:report:id", 3)
    oracle.hset("bull:report:9", mapping=hashes["completed"])
    oracle.zadd("bull:report:completed", {"9": 1})
    async with server(store={"url": "memory:"}, **table(redis, "bull4")) as one:
        # It was over before anybody looked.
        assert (await until_status(one.node, "report:9", "completed"))["userId"] == "user_789"
        await until_up(one.node)
        oracle.hset("bull:report:1", mapping=hashes["added"])
        oracle.hset("bull:report:2", mapping=hashes["added"])
        for message in traffic["messages"]:
            oracle.publish(message["channel"], message["data"])
        assert (await until_status(one.node, "report:1", "completed"))["message"] == "Encoding"
        assert (await until_status(one.node, "report:2", "failed"))["error"] == "boom"
        assert steps(one.node, "report:1") == ["queued", "processing", "completed"]


async def test_of_bull_what_was_published_before_its_hashes_were_read_is_older(
    redis: RedisServer, oracle: redis_py.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a second attempt, where progress may go back: not because a message comes behind what it has led to."""

    def publish(event: str, text: str) -> None:
        oracle.publish(f"bull:video:{event}", text)

    def report(percent: int) -> None:
        oracle.hset("bull:video:1", mapping={"progress": percent, "attemptsMade": 1})
        publish("progress", json.dumps({"jobId": "1", "progress": percent}))

    async def late(client: Any, taker: Any, config: Any, queue: str, seq: int) -> Any:
        if reports:
            for percent in reports:
                report(percent)
            reports.clear()
        return await look(client, taker, config, queue, seq)

    look, reports = bull.look, list[int]()
    monkeypatch.setattr(bull4, "look", late)
    oracle.hset("bull:video:1", mapping={"name": "__default__", "data": "{}", "timestamp": 5, "attemptsMade": 0})
    async with server(store={"url": "memory:"}, **table(redis, "bull4", queues=["video"])) as at:
        await until_up(at.node)
        oracle.lpush("bull:video:active", "1")
        publish("active", "1")
        publish("progress", '{"jobId":"1","progress":50}')
        await until(lambda: shown(at.node, "video:1").get("progress") == 50)
        oracle.hset("bull:video:1", "attemptsMade", 1)
        publish("waiting", "1")
        publish("active", "1")
        await until(lambda: shown(at.node, "video:1").get("attempt") == 2)
        reports += [25, 30, 60]
        publish("delayed", "1795295739086")  # some job: so the hashes are read
        await until(lambda: shown(at.node, "video:1")["progress"] == 60)
        publish("progress", '{"jobId":"1","progress":70}')
        await until(lambda: shown(at.node, "video:1")["progress"] == 70)
        updates = [json.loads(update.body) for update in at.node.history.of_job("video:1", 0)]
        seen = [update["progress"] for update in updates if update["attempt"] == 2]
        assert [number for number, _ in itertools.groupby(seen)] == [50, 25, 30, 60, 70]


async def test_celery_from_results_and_events(redis: RedisServer, oracle: redis_py.Redis) -> None:
    capture = captured("celery")
    messages = capture["with_events_flag_E"]
    tasks = [key.removeprefix("celery-task-meta-") for key in capture["result_keys"]]
    async with server(auth=AUTH, store={"url": "memory:"}, **table(redis, "celery")) as one:
        await until_up(one.node)
        for message in messages:
            oracle.publish(message["channel"], message["data"])
        await until(lambda: all(status(one.node, t) in ENDS.values() for t in tasks))
        found = [shown(one.node, task) for task in tasks]
        assert sorted(record["status"] for record in found) == [
            "cancelled", "completed", "completed", "failed", "failed",
        ]  # fmt: skip
        assert {record["userId"] for record in found} == {"user_789", "queue:src"}
        assert "Traceback" not in json.dumps(found)


async def test_of_celery_what_was_said_before_a_result_was_read_is_older(
    redis: RedisServer, oracle: redis_py.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A retry and what came behind it, published and kept in the moment before the kept results are looked at."""

    def say(state: str, value: dict[str, object]) -> None:
        result = {"status": state, "result": value, "traceback": None, "children": [], "task_id": "a"}
        oracle.set("celery-task-meta-a", json.dumps(result))
        oracle.publish("celery-task-meta-a", json.dumps(result))

    async def late(client: Any, commands: Any) -> Any:
        while reports:
            say(*reports.pop(0))
        return await ask(client, commands)

    ask, reports = celery.ask, list[tuple[str, dict[str, object]]]()
    monkeypatch.setattr(celery, "ask", late)
    monkeypatch.setattr(celery, "_REPAIR_S", 0.1)
    async with server(store={"url": "memory:"}, **table(redis, "celery")) as at:
        await until_up(at.node)
        say("STARTED", {})
        say("PROGRESS", {"current": 50, "total": 100})
        await until(lambda: shown(at.node, "a").get("progress") == 50)
        retry = ("RETRY", {"exc_type": "ValueError", "exc_message": ["once more"]})
        reports += [
            retry,
            ("STARTED", {}),
            ("PROGRESS", {"percent": 25}),
            ("PROGRESS", {"percent": 60}),
            ("SUCCESS", {}),
        ]
        await until_status(at.node, "a", "completed")
        updates = [json.loads(update.body) for update in at.node.history.of_job("a", 0)]
        seen = [update["progress"] for update in updates if update["attempt"] == 2]
        assert [number for number, _ in itertools.groupby(seen)] == [50, 25, 60, 100]


async def test_of_celery_what_was_said_after_a_result_was_read_is_newer(
    redis: RedisServer, oracle: redis_py.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A task is revoked in the moment after what is kept of it was read: it had begun, which is no new attempt."""

    def say(state: str) -> None:
        result = {"status": state, "result": {}, "traceback": None, "children": [], "task_id": "a"}
        oracle.set("celery-task-meta-a", json.dumps(result))
        oracle.publish("celery-task-meta-a", json.dumps(result))

    async def early(client: Any, commands: Any) -> Any:
        answers = await ask(client, commands)
        if any(answers):
            say("REVOKED")
            revoked.set()
        return answers

    ask, revoked = celery.ask, trio.Event()
    monkeypatch.setattr(celery, "_REPAIR_S", 0.1)
    async with server(store={"url": "memory:"}, **table(redis, "celery")) as at:
        await until_up(at.node)
        say("STARTED")
        await until_status(at.node, "a", "processing")
        monkeypatch.setattr(celery, "ask", early)
        await revoked.wait()
        await until_status(at.node, "a", "cancelled")
        oracle.publish("celery-task-meta-b", json.dumps({"status": "STARTED", "result": {}, "task_id": "b"}))
        await until_status(at.node, "b", "processing")  # so all before it has been taken in
        assert (shown(at.node, "a")["status"], shown(at.node, "a")["attempt"]) == ("cancelled", 1)


async def test_celery_results_that_came_while_nobody_listened(
    redis: RedisServer, oracle: redis_py.Redis, tmp_path: Path
) -> None:
    store = {"url": f"sqlite:{tmp_path / 'store.db'}"}
    messages = captured("celery")["without_E"]
    started = next(m for m in messages if m["channel"].startswith("celery-task-meta-"))
    task = started["channel"].removeprefix("celery-task-meta-")
    async with server(store=store, **table(redis, "celery")) as one:
        await until_up(one.node)
        oracle.publish(started["channel"], started["data"])
        await until_status(one.node, task, "processing")
    async with server(store=store) as one:  # one that takes nothing in, and so moves no mark
        await one.node.broker.save_mark("queue:src", '{"at_ms":1000000000000}')
    for message in messages:
        if message["channel"].startswith("celery-task-meta-"):
            oracle.set(message["channel"], message["data"])
    async with server(store=store, **table(redis, "celery")) as one:
        await until_status(one.node, task, "completed")
        await until(lambda: len(one.node.jobs) == 5)
        assert {job.latest.ended for job in one.node.jobs.jobs.values()} == {True}


@pytest.mark.parametrize("notices", ["Kh", "AKE", ""])
async def test_rq_told_by_notices_and_polled(redis: RedisServer, oracle: redis_py.Redis, notices: str) -> None:
    rq = captured("rq")
    oracle.config_set("notify-keyspace-events", notices)
    queues = table(redis, "rq", poll=0.02)
    async with server(store={"url": "memory:"}, **queues) as one:
        await until_up(one.node)
        oracle.sadd("rq:queues", "rq:queue:video")
        previous = 0.0
        with oracle.pipeline() as pipeline:
            for command in rq["redis_write_commands_in_order"]:
                # What was sent together was one transaction.
                if command["t"] - previous > 0.002:
                    pipeline.execute()
                    wanted = command["args"][1]
                    if previous and isinstance(wanted, str):
                        await until(lambda: len(one.node.jobs) > 0)
                previous = command["t"]
                pipeline.execute_command(*(raw(argument) for argument in command["args"]))
            pipeline.execute()
        ok = await until_status(one.node, rq["job_ok"], "completed")
        failed = await until_status(one.node, rq["job_failed_after_retry"], "failed")
        assert (ok["userId"], ok["kind"], ok["progress"]) == ("user_789", "jobs.encode", 100)
        assert failed["message"] == failed["error"]
        assert failed["userId"] == "queue:src"


# What ``docs/queues.md`` says that a user of the queue's Redis needs, with the keys of each queue.
ALLOWED = ("+@read", "+@connection", "+info", "+subscribe", "+psubscribe", "&*")


async def test_rq_is_polled_where_notices_may_not_be_asked_for(redis: RedisServer, oracle: redis_py.Redis) -> None:
    oracle.config_set("notify-keyspace-events", "Kgh")  # they are there, but nobody says so
    oracle.execute_command("ACL", "SETUSER", "shown", "on", ">pass", "~rq:*", *ALLOWED)
    url = f"redis://shown:pass@127.0.0.1:{redis.port}/0"
    common = {"created_at": "2026-01-01T00:00:00.000001Z", "origin": "video", "meta": '{"user_id": "alice"}'}
    async with server(store={"url": "memory:"}, **{"queues.src": {"kind": "rq", "url": url, "poll": 0.02}}) as one:
        await until_up(one.node)
        oracle.hset("rq:job:a", mapping={**common, "status": "queued"})
        oracle.sadd("rq:queues", "rq:queue:video")
        oracle.rpush("rq:queue:video", "a")
        await until_status(one.node, "a", "queued")
        oracle.hset("rq:job:a", mapping={"status": "started", "meta": '{"user_id": "alice", "progress": 40}'})
        oracle.zadd("rq:wip:video", {"a:1": 1})
        oracle.delete("rq:queue:video")
        assert (await until_status(one.node, "a", "processing"))["progress"] == 40
        oracle.hset("rq:job:a", "status", "finished")
        oracle.delete("rq:wip:video")
        assert (await until_status(one.node, "a", "completed"))["userId"] == "alice"
        assert steps(one.node, "a") == ["queued", "processing", "completed"]


@pytest.mark.parametrize(
    ("kind", "keys"), [("bullmq", "~bull:*"), ("bull4", "~bull:*"), ("celery", "~celery-task-meta-*")]
)
async def test_a_user_who_may_only_read_is_enough(
    kind: str, keys: str, redis: RedisServer, oracle: redis_py.Redis
) -> None:
    oracle.execute_command("ACL", "SETUSER", "shown", "on", ">pass", "resetkeys", keys, "+config|get", *ALLOWED)
    oracle.execute_command("ACL", "LOG", "RESET")
    put_hashes(oracle)
    oracle.set("bull:video:id", 3)
    url = f"redis://shown:pass@127.0.0.1:{redis.port}/0"
    async with server(store={"url": "memory:"}, **{"queues.src": {"kind": kind, "url": url}}) as one:
        await until_up(one.node)
        if kind == "celery":
            oracle.publish("celery-task-meta-a", '{"task_id":"a","status":"SUCCESS","result":null}')
            await until_status(one.node, "a", "completed")
        else:
            await until_status(one.node, "video:job_123", "completed")
    log = oracle.execute_command("ACL", "LOG")
    assert [entry for entry in log if b"shown" in entry] == []


@pytest.mark.slow
async def test_an_rq_job_whose_worker_is_silent_and_one_that_vanishes(
    redis: RedisServer, oracle: redis_py.Redis
) -> None:
    common = {"created_at": "2026-01-01T00:00:00.000001Z", "status": "started", "origin": "video"}
    oracle.hset("rq:job:a", mapping={**common, "last_heartbeat": "2026-01-01T00:00:00.000001Z"})
    oracle.hset("rq:job:b", mapping=common)
    oracle.hset("rq:job:c", mapping={**common, "origin": "other"})
    oracle.sadd("rq:queues", "rq:queue:video", "rq:queue:other")
    oracle.zadd("rq:wip:video", {"a:x": 1, "b:x": 1})
    oracle.zadd("rq:wip:other", {"c:x": 1})
    queues = table(redis, "rq", poll=0.05, stalled_after=0.5, queues=["video"])
    async with server(store={"url": "memory:"}, **queues) as one:
        await until_status(one.node, "a", "stalled")
        assert (await until_status(one.node, "a", "failed"))["error"] == "lost"
        oracle.hset("rq:job:a", mapping={"status": "queued", "enqueued_at": "2026-01-01T00:01:00.000001Z"})
        assert (await until_status(one.node, "a", "queued"))["attempt"] == 2
        await until_status(one.node, "b", "processing")
        oracle.delete("rq:job:b")
        await until_status(one.node, "b", "completed")
        assert status(one.node, "c") is None


@pytest.mark.slow
async def test_a_source_that_is_away_is_told_and_comes_back(tmp_path: Path) -> None:
    with running_server(tmp_path) as redis:
        async with server(store={"url": "memory:"}, **table(redis, "bullmq", queues=["video"])) as one:
            await until_up(one.node)
            redis.kill()
            assert one.node.queues is not None
            queues = one.node.queues
            await until(lambda: queues.states()["src"]["state"] == "away")
            ready = await one.ask("GET", "/ready")
            assert ready.status == 200
            assert ready.json["queues"]["src"]["reason"]
            redis.start()
            await until_up(one.node)
            with redis.oracle() as oracle:
                put_stream(oracle, "bull:video:events", STREAM[:6])
            await until_status(one.node, "video:1", "completed")


@pytest.mark.slow
async def test_of_several_nodes_one_takes_in_and_another_goes_on(redis: RedisServer, oracle: redis_py.Redis) -> None:
    tables: dict[str, Any] = {"store": {"url": f"{redis.url}/1"}, **table(redis, "bullmq", queues=["video"])}
    async with server(**tables) as first:
        await until_up(first.node)
        oracle.hset("bull:video:1", mapping=BULLMQ["job_hashes"]["transcode:active"])
        put_stream(oracle, "bull:video:events", STREAM[:3])
        await until_status(first.node, "video:1", "processing")
        async with server(**tables) as second:
            assert second.node.queues is not None
            theirs = second.node.queues
            await until(lambda: theirs.states()["src"]["state"] == "standby")
            first.node.start_drain()
            await until_up(second.node)
            put_stream(oracle, "bull:video:events", STREAM[3:6])
            record = await until_status(second.node, "video:1", "completed")
            assert record["version"] == 6


async def test_many_queues_are_found_as_they_come(
    redis: RedisServer, oracle: redis_py.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bullmq, "_DISCOVER_S", 0.05)
    async with server(store={"url": "memory:"}, **table(redis, "bullmq")) as one:
        await until_up(one.node)
        for number in range(5):
            oracle.hset(f"bull:q{number}:meta", mapping=BULLMQ["meta_hash"])
            put_stream(oracle, f"bull:q{number}:events", STREAM[:6])
        for number in range(5):
            await until_status(one.node, f"q{number}:1", "completed")


async def test_celery_results_that_are_too_large_end_their_tasks_nevertheless(
    redis: RedisServer, oracle: redis_py.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(celery, "_REPAIR_S", 0.1)

    def result(state: str, value: object) -> str:
        return json.dumps({"status": state, "result": value, "traceback": None, "children": [], "task_id": "a"})

    async with server(store={"url": "memory:"}, **table(redis, "celery", results=True)) as one:
        await until_up(one.node)
        for task in "ab":
            oracle.publish(f"celery-task-meta-{task}", result("STARTED", {}).replace('"a"', f'"{task}"'))
            await until_status(one.node, task, "processing")
        oracle.publish("celery-task-meta-a", result("SUCCESS", "x" * 2_000_000))
        assert "result" not in await until_status(one.node, "a", "completed")
        # What nobody heard is found where it is kept.
        oracle.set("celery-task-meta-b", result("FAILURE", {"exc_message": "x" * 2_000_000}))
        assert (await until_status(one.node, "b", "failed"))["error"] == "failed"


async def test_events_are_read_while_queues_are_looked_for(
    redis: RedisServer, oracle: redis_py.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    oracle.hset("bull:video:meta", mapping=BULLMQ["meta_hash"])
    monkeypatch.setattr(bullmq, "_DISCOVER_S", 0.05)
    looks = 0

    async def look(self: object, seconds: float) -> list[str]:
        nonlocal looks
        looks += 1
        await trio.lowlevel.checkpoint()
        return []

    async with server(store={"url": "memory:"}, **table(redis, "bullmq")) as one:
        await until_up(one.node)
        # From here on it never comes to an end of that, as among a billion of other keys.
        monkeypatch.setattr(bullmq.Search, "look", look)
        await until(lambda: looks > 2)
        put_stream(oracle, "bull:video:events", STREAM[:6])
        await until_status(one.node, "video:1", "completed")


async def test_a_job_is_not_taken_for_a_queue(redis: RedisServer, oracle: redis_py.Redis) -> None:
    for queue in ("video", "video:x:y", "later"):
        oracle.hset(f"bull:{queue}:meta", mapping=BULLMQ["meta_hash"])
    put_stream(oracle, "bull:video:events", STREAM[:6])
    async with server(store={"url": "memory:"}, **table(redis, "bullmq")) as one:
        await until_status(one.node, "video:1", "completed")
        await until_up(one.node)
        mark: dict[str, str] = {}
        with trio.fail_after(PATIENCE_S):
            while len(mark) < 2:
                mark = json.loads(await one.node.broker.load_mark("queue:src") or "{}")
        assert mark.keys() == {"video", "later"}


async def test_large_events_are_read_a_few_at_a_time(
    redis: RedisServer, oracle: redis_py.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bullmq, "_HELD", 4000)
    oracle.hset("bull:video:meta", mapping=BULLMQ["meta_hash"])
    for job in range(100):
        oracle.xadd("bull:video:events", {"event": "completed", "jobId": job, "returnvalue": json.dumps("x" * 2000)})
    oracle.config_resetstat()
    async with server(store={"url": "memory:"}, **table(redis, "bullmq")) as one:
        await until(lambda: len(one.node.jobs) == 100)
        # The first fifty are read together, before anybody knows; of the others two at most.
        assert oracle.info("commandstats")["cmdstat_xread"]["calls"] > 50 / 2


@pytest.mark.slow
@pytest.mark.parametrize("hours", [-1, 1])
async def test_an_rq_worker_whose_clock_is_wrong(hours: int, redis: RedisServer, oracle: redis_py.Redis) -> None:
    def beat() -> None:
        now = (datetime.now(UTC) + timedelta(hours=hours)).isoformat()
        told = {"status": "started", "origin": "video", "created_at": now, "last_heartbeat": now}
        oracle.hset("rq:job:a", mapping=told)

    oracle.sadd("rq:queues", "rq:queue:video")
    oracle.zadd("rq:wip:video", {"a:x": 1})
    beat()
    async with server(store={"url": "memory:"}, **table(redis, "rq", poll=0.02)) as one:
        assert one.node.queues is not None
        counters = one.node.queues.sources["src"].taker.counters
        for looks in range(1, 10):
            await until(lambda looks=looks: counters.received > looks)
            beat()
        assert steps(one.node, "a") == ["processing"]
    async with server(store={"url": "memory:"}, **table(redis, "rq", poll=0.02, stalled_after=1.0)) as one:
        assert (await until_status(one.node, "a", "stalled"))["attempt"] == 1
        beat()  # it was only slow
        again = await until_status(one.node, "a", "processing")
        assert again["attempt"] in (1, 2), "it may have been given up by then"
        assert (await until_status(one.node, "a", "failed"))["error"] == "lost"
