"""Updates that workers publish to Redis itself: each is accepted once, in order, or set aside."""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis as redis_py

from server.ingest import redis_channels, redis_stream
from server.ingest.redis_channels import CHANNELS
from server.ingest.redis_stream import DEAD, GROUP, MAX_DELIVERIES, STREAM
from tests.ingesting import channels_of, nodes, record, steps, stream_of, text, version
from tests.redis_servers import RedisServer
from tests.support import server, spawned, until

pytestmark = pytest.mark.slow


@pytest.fixture
def oracle(redis: RedisServer) -> Iterator[redis_py.Redis]:
    with redis.oracle() as client:
        yield client


# Channels


@pytest.mark.parametrize("count", [1, 3])
async def test_each_message_is_accepted_once(redis: RedisServer, oracle: redis_py.Redis, count: int) -> None:
    async with nodes(redis.url, count) as running:
        for number in range(60):
            more = {"eventId": f"e{number}"} if number % 3 else {}
            update = text(jobId="a", userId="u", progress=number, message=f"step {number}", **more)
            oracle.publish(CHANNELS[number % 2], update)
        oracle.publish("job_completion_updates", text(jobId="a", result={"rows": 3}))
        await until(lambda: all(version(each, "a") == 61 for each in running))
        ended = record(running[0], "a")
        assert (ended["status"], ended["progress"], ended["result"]) == ("completed", 100, {"rows": 3})
        # A later one comes behind everything: nothing was accepted a second time.
        oracle.publish("job_status_updates", text(jobId="b", userId="u"))
        await until(lambda: version(running[0], "b") == 1)
        assert version(running[0], "a") == 61
        counted = [channels_of(each).counters for each in running]
        await until(lambda: sum(each.accepted for each in counted) == 62)
        assert sum(each.received for each in counted) == 62


async def test_a_message_like_that_of_an_existing_publisher(redis: RedisServer, oracle: redis_py.Redis) -> None:
    async with nodes(redis.url, 1) as (one,):
        update = (
            '{"jobId":"job_123","userId":"user_789","status":"processing","progress":45,"currentOperation":"Processing '
            'page 120/300","timestamp":"2025-01-31T12:00:00Z","workerId":"worker_3"}'
        )
        assert oracle.publish("job_progress_updates", update) == 1
        await until(lambda: version(one, "job_123") == 1)
        shown = record(one, "job_123")
        assert (shown["progress"], shown["workerId"], shown["timestamp"]) == (
            45,
            "worker_3",
            "2025-01-31T12:00:00.000Z",
        )
        # What this server has no field for, or a time that it cannot read, does not cost the update.
        odd = {"type": "job", "timestamp": "2025-01-31 12:00:00", "steps": {"done": 1, "left": 2}, "queue": {"a": [1]}}
        oracle.publish("job_progress_updates", text(jobId="job_123", progress=50, **odd))
        await until(lambda: version(one, "job_123") == 2)
        assert record(one, "job_123")["steps"] == {"done": 1}
        assert channels_of(one).counters.trimmed == 1
        oracle.publish("job_completion_updates", text(jobId="job_123", error="disk full"))
        await until(lambda: version(one, "job_123") == 3)
        assert record(one, "job_123")["status"] == "failed"


async def test_bad_messages_are_counted_and_harm_nobody(
    redis: RedisServer, oracle: redis_py.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    async with nodes(redis.url) as running:
        bad = [
            b"",
            b"nonsense",
            b'\xff{"jobId":"a"}',
            b"[]",
            b"[" * 5000,
            b"{" * 5000,
            b'{"x":' + b"[" * 5000,
            b"{}",
            text(jobId="nobody's", userId="u").encode(),
            text(jobId="unknown", progress=1).encode(),
            text(jobId="a", userId="u", message="secret " * 50_000).encode(),
            text(jobId="a", userId="u", progress=101, extra=1).encode(),
        ]
        for message in bad:
            oracle.publish("job_status_updates", message)
        oracle.publish("job_status_updates", text(jobId="good", userId="u"))
        await until(lambda: version(running[1], "good") == 1)
        counted = [channels_of(each).counters for each in running]
        await until(lambda: sum(each.rejected for each in counted) == len(bad))
        await until(lambda: sum(each.accepted for each in counted) == 1)
    refused = [line for line in caplog.messages if line == "ingest_refused"]
    assert len(refused) == 1  # not one for each
    assert "secret" not in caplog.text


async def test_equal_messages_within_the_window_count_as_one(redis: RedisServer, oracle: redis_py.Redis) -> None:
    async with nodes(redis.url) as running:

        async def window_passes() -> None:
            """By the beats, which date all that is heard."""
            now_ms = max(channels_of(each)._beat_ms for each in running)
            for each in running:
                channels_of(each).window_ms = 300
            await until(lambda: all(channels_of(each)._beat_ms > now_ms + 300 for each in running))

        update = text(jobId="a", userId="u", progress=1)
        for channel in (*CHANNELS[:2], CHANNELS[0]):
            oracle.publish(channel, update)
        # What the holder may not have heard, so soon after it became that, the other one takes up as well.
        await until(lambda: sum(channels_of(each).counters.duplicates for each in running) >= 2)
        assert version(running[0], "a") == 1
        await window_passes()
        oracle.publish(CHANNELS[0], update)
        await until(lambda: version(running[0], "a") == 2)
        # What the completion channel adds to equal bytes makes another update of them.
        oracle.publish("job_completion_updates", update)
        await until(lambda: record(running[0], "a")["status"] == "completed")
        # An event id holds for longer.
        named = text(jobId="b", userId="u", eventId="e")
        oracle.publish(CHANNELS[0], named)
        await until(lambda: version(running[0], "b") == 1)
        await window_passes()
        duplicates = sum(channels_of(each).counters.duplicates for each in running)
        oracle.publish(CHANNELS[1], named)
        oracle.publish(CHANNELS[1], text(jobId="b", message="the next one"))
        await until(lambda: record(running[0], "b").get("message") == "the next one")
        assert version(running[0], "b") == 2
        # Counted when it is answered, which may be after the next one is shown.
        await until(lambda: sum(channels_of(each).counters.duplicates for each in running) > duplicates)


# The stream


async def test_stream(redis: RedisServer, oracle: redis_py.Redis) -> None:
    oracle.xadd(STREAM, {"data": text(jobId="early", userId="u")})  # waits for the first node
    async with nodes(redis.url) as running:
        await until(lambda: version(running[0], "early") == 1)
        for number in range(1, 51):
            oracle.xadd(STREAM, {"data": text(jobId="a", userId="u", message=f"step {number}")})
        oracle.xadd(STREAM, {"data": f"[{text(jobId='a', message='last')}, {text(jobId='b', userId='u')}]"})
        await until(lambda: all(version(each, "a") == 51 for each in running))
        assert steps(running[0], "a") == [*(f"step {number}" for number in range(1, 51)), "last"]
        await until(lambda: version(running[1], "b") == 1)
        await until(lambda: oracle.xlen(STREAM) == 0)
        assert oracle.xpending(STREAM, GROUP)["pending"] == 0
        assert oracle.xlen(DEAD) == 0
        await until(lambda: sum(stream_of(each).counters.accepted for each in running) == 53)


async def test_poison_is_set_aside(redis: RedisServer, oracle: redis_py.Redis) -> None:
    async with nodes(redis.url, 1) as (one,):
        entries = [
            oracle.xadd(STREAM, fields)
            for fields in (
                {"data": "nonsense"},
                {"data": text(jobId="a", userId="u")},
                {"data": f"[{text(jobId='b', userId='u')}, 7, {text(jobId='b', progress=-1)}]"},
                {"data": "[1,"},
                {"update": text(jobId="c", userId="u")},
                {"data": text(jobId="unknown", progress=1)},
                {"data": text(jobId="a", progress=1, unknown=2)},
            )
        ]
        await until(lambda: oracle.xlen(DEAD) == 6)
        await until(lambda: version(one, "a") == 2)
        assert version(one, "b") == 1
        dead = [fields for _, fields in oracle.xrange(DEAD)]
        assert [(fields[b"entry"], fields[b"code"]) for fields in dead if fields[b"code"] != b"job_not_found"] == [
            (entries[0], b"malformed_json"),
            (entries[2], b"invalid_update"),
            (entries[2], b"invalid_field"),
            (entries[3], b"malformed_json"),
            (entries[4], b"no_data"),
        ]
        assert dead[0][b"data"] == b"nonsense"
        (late,) = (fields for fields in dead if fields[b"code"] == b"job_not_found")
        assert (late[b"entry"], late[b"data"]) == (entries[5], text(jobId="unknown", progress=1).encode())
        assert b"unknown" in late[b"message"]
        await until(lambda: oracle.xlen(STREAM) == 0)
        counters = stream_of(one).counters
        assert (counters.received, counters.accepted, counters.dead, counters.trimmed) == (9, 3, 6, 1)


async def test_what_dead_consumers_left_is_taken_over(redis: RedisServer, oracle: redis_py.Redis) -> None:
    oracle.xgroup_create(STREAM, GROUP, "0", mkstream=True)
    ids = [oracle.xadd(STREAM, {"data": text(jobId="a", userId="u", message=f"step {n}")}) for n in range(6)]
    oracle.xreadgroup(GROUP, "dead", {STREAM: ">"}, count=4)
    oracle.xclaim(STREAM, GROUP, "dead", 0, ids[:1], retrycount=MAX_DELIVERIES)  # killed all who took it
    oracle.xclaim(STREAM, GROUP, "dead", 0, ids[1:2], retrycount=MAX_DELIVERIES - 2)
    oracle.xdel(STREAM, ids[2])
    async with nodes(redis.url, 1) as (one,):
        await until(lambda: version(one, "a") == 4)
        assert steps(one, "a") == ["step 1", "step 3", "step 4", "step 5"]
        ((_, dead),) = oracle.xrange(DEAD)
        assert (dead[b"entry"], dead[b"code"]) == (ids[0], b"redelivered")
        await until(lambda: oracle.xlen(STREAM) == 0)
        assert oracle.xpending(STREAM, GROUP)["pending"] == 0
        assert len(oracle.xinfo_consumers(STREAM, GROUP)) == 1


async def test_an_entry_that_was_accepted_but_not_acknowledged_counts_once(
    redis: RedisServer, oracle: redis_py.Redis
) -> None:
    async with nodes(redis.url, 1) as (one,):
        for _ in range(2):
            oracle.xadd(STREAM, {"data": text(jobId="a", userId="u")}, id="5-1")
            await until(lambda: oracle.xlen(STREAM) == 0)
            oracle.delete(STREAM)  # it comes again as it was
        await until(lambda: stream_of(one).counters.duplicates == 1)
        assert version(one, "a") == 1
        # The channels' event ids are the same ones.
        for _ in range(2):
            oracle.xadd(STREAM, {"data": text(jobId="b", userId="u", eventId="e")})
        oracle.publish(CHANNELS[0], text(jobId="b", userId="u", eventId="e"))
        await until(lambda: stream_of(one).counters.duplicates + channels_of(one).counters.duplicates == 3)
        assert version(one, "b") == 1


async def test_what_will_pass_is_waited_for(redis: RedisServer, oracle: redis_py.Redis) -> None:
    """Entries are acknowledged after they were accepted, and those of a job stay in order."""
    async with nodes(redis.url, 1, history={"max_jobs": 1}) as (one,):
        oracle.xadd(STREAM, {"data": text(jobId="a", userId="u")})
        oracle.xadd(STREAM, {"data": text(jobId="b", userId="u", message="first")})
        oracle.xadd(STREAM, {"data": text(jobId="b", message="second")})
        await until(lambda: version(one, "a") == 1)
        oracle.xadd(STREAM, {"data": text(jobId="b", message="third")})
        # The first entry is shown a moment before it is acknowledged and deleted.
        await until(lambda: oracle.xlen(STREAM) == oracle.xpending(STREAM, GROUP)["pending"] == 3)
        oracle.xadd(STREAM, {"data": text(jobId="a", status="completed")})  # makes room
        await until(lambda: version(one, "b") == 3)
        assert steps(one, "b") == ["first", "second", "third"]
        await until(lambda: oracle.xlen(STREAM) == 0)
        assert oracle.xlen(DEAD) == 0


async def test_keys_that_have_served_are_taken_away(
    redis: RedisServer, oracle: redis_py.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_stream, "_SPENT_S", 0.1)
    monkeypatch.setattr(redis_channels, "_SPENT_S", 0.1)
    async with nodes(redis.url, 1) as (one,):
        for number in range(5):
            oracle.xadd(STREAM, {"data": text(jobId="a", userId="u", message=f"step {number}")})
            oracle.publish(CHANNELS[0], text(jobId="a", userId="u", message=f"other step {number}"))
        await until(lambda: version(one, "a") == 10)
        await until(lambda: not oracle.keys("{statuswire}:key:*"))


async def test_other_groups_keep_their_entries(redis: RedisServer, oracle: redis_py.Redis) -> None:
    oracle.xgroup_create(STREAM, "others", "0", mkstream=True)
    async with nodes(redis.url, 1) as (one,):
        oracle.xadd(STREAM, {"data": text(jobId="a", userId="u")})
        await until(lambda: version(one, "a") == 1)
        await until(lambda: oracle.xpending(STREAM, GROUP)["pending"] == 0)
        assert oracle.xlen(STREAM) == 1


async def test_a_stream_that_is_lost_or_something_else(redis: RedisServer, oracle: redis_py.Redis) -> None:
    oracle.set(STREAM, "no stream")
    async with nodes(redis.url, 1) as (one,):
        oracle.publish(CHANNELS[0], text(jobId="a", userId="u"))
        await until(lambda: version(one, "a") == 1)  # the channels do not mind
        oracle.delete(STREAM)
        oracle.xadd(STREAM, {"data": text(jobId="b", userId="u")})
        await until(lambda: version(one, "b") == 1)
        oracle.flushall()
        oracle.xadd(STREAM, {"data": text(jobId="c", userId="u")})
        await until(lambda: version(one, "c") == 1)
        await until(lambda: oracle.xlen(STREAM) == 0)


async def test_sources_can_be_off(redis: RedisServer, oracle: redis_py.Redis) -> None:
    async with server(store={"url": redis.url}, ingest={"channels": False}) as one:
        await one.node.broker.follow(["*"])
        oracle.publish(CHANNELS[0], text(jobId="a", userId="u"))
        oracle.xadd(STREAM, {"data": text(jobId="b", userId="u")})
        await until(lambda: version(one, "b") == 1)
        assert version(one, "a") == 0
        assert oracle.pubsub_numsub(*CHANNELS) == [(channel, 0) for channel in CHANNELS]


async def test_a_drain_finishes_what_was_taken(redis: RedisServer, oracle: redis_py.Redis, tmp_path: Path) -> None:
    async with spawned(tmp_path, store={"url": redis.url}) as going:
        await until(lambda: oracle.get("{statuswire}:ingest:stream"))
        total = 2000
        for number in range(total):
            oracle.xadd(STREAM, {"data": text(jobId=f"j{number % 7}", userId="u", message=f"step {number}")})
            if number == total // 2:
                going.signal(signal.SIGTERM)
        assert await going.exit_status() == 0
        group = oracle.xinfo_groups(STREAM)[0]
        assert (group["pending"], group["consumers"]) == (0, 0)
        assert oracle.get("{statuswire}:ingest:stream") is None
        assert oracle.get("{statuswire}:ingest:channels") is None
        async with nodes(redis.url, 1) as (one,):
            await until(lambda: oracle.xlen(STREAM) == 0)
            told = Counter(step for job in range(7) for step in steps(one, f"j{job}"))
            assert told == Counter(f"step {number}" for number in range(total))
