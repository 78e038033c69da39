"""A node follows the shards that its readers watch: nothing is missed or shown early when one comes or goes."""

from __future__ import annotations

import itertools
from contextlib import suppress
from typing import Any

import pytest
import trio
import trio.testing

from server import history, jobs, turns
from server.brokers import redis_follower, redis_reading, redis_shown
from server.brokers.redis_client import RedisClientError, Script
from server.brokers.redis_keys import AFTER, CHANNELS, LOAD, NOTICES_SHARD, SHARDS, shard_of
from tests.redis_nodes import nodes, publish
from tests.redis_servers import RedisServer
from tests.streams import session
from tests.support import ADMIN, AUTH, InProcess, bearer, server, token, until, until_answered

pytestmark = pytest.mark.slow


async def test_a_node_follows_only_what_its_readers_watch(redis: RedisServer) -> None:
    async with nodes(redis.url, auth=AUTH) as (one, two):
        for number in range(40):
            await publish(one, f"job-{number}", userId=f"user-{number}")
        assert len(one.node.jobs) == len(two.node.jobs) == 0
        assert (await two.get("/api/v2/jobs", bearer("user-3"))).json["jobs"][0]["jobId"] == "job-3"
        some = len(two.node.jobs)
        assert 0 < some < 40
        root = bearer("root", admin=True)
        everything = (await two.get("/api/v2/jobs", root)).json["jobs"]
        assert [job["jobId"] for job in everything] == [f"job-{number}" for number in reversed(range(40))]
        # What was skipped until then has its place in the log.
        history = two.node.history
        assert [update.offset for update in history.everything(0)] == list(range(1, 41))
        assert [update.job_id for update in history.of_user("user-3", 0)] == ["job-3"]


async def test_what_is_being_loaded_is_read_when_all_of_it_is_shown(redis: RedisServer) -> None:
    """Updates that come while a shard is loaded are in its records before they are shown."""
    async with nodes(redis.url) as (one, two):
        shared = one.node.shared
        assert shared is not None
        await until(lambda: shared.follower.followed)
        client = shared.client
        call_script = client.call_script
        loaded, go_on = trio.Event(), trio.Event()
        tries = itertools.count(2)

        async def slowly(script: Script, keys: Any, arguments: Any, **options: Any) -> Any:
            if script is LOAD and not loaded.is_set():
                await publish(two, "a", progress=next(tries))
            elif script is AFTER and len(keys) > 2:
                loaded.set()
                await go_on.wait()
            return await call_script(script, keys, arguments, **options)

        async def read(at: InProcess, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
            async with session(at) as ws:
                task_status.started()
                versions = [job["version"] for job in (await ws.subscribe())["snapshot"]]
                newest = (await publish(two, "a", progress=99)).version
                while versions[-1] < newest:
                    versions.append((await ws.receive())["version"])
                assert versions == sorted(set(versions))

        made = await publish(two, "a", userId="u", progress=1)
        await until(lambda: one.node.history.last >= made.offset)
        client.call_script = slowly  # type: ignore[method-assign]
        async with trio.open_nursery() as readers:
            readers.start_soon(read, one)
            await loaded.wait()
            await readers.start(read, one)
            await trio.testing.wait_all_tasks_blocked(0.05)
            go_on.set()


async def test_records_are_not_older_than_the_place_that_they_are_read_at(redis: RedisServer) -> None:
    """While a shard is loaded the node shows what others have, and so comes past an update of the loaded one."""
    assert shard_of("u") != shard_of("v")
    async with nodes(redis.url, auth=AUTH) as (one, two):
        shared = one.node.shared
        assert shared is not None
        client = shared.client
        call_script = client.call_script
        async with session(one, token=token("v")) as other:
            await other.subscribe()
            made = await publish(two, "a", userId="u")
            await until(lambda: one.node.history.last >= made.offset)

            async def behind(script: Script, keys: Any, arguments: Any, **options: Any) -> Any:
                answer = await call_script(script, keys, arguments, **options)
                if script is LOAD:
                    await publish(two, "a", progress=50)
                    last = (await publish(two, "b", userId="v")).offset
                    with suppress(trio.TooSlowError):  # it need not come past it, but may
                        await until(lambda: one.node.history.last >= last, within=0.5)
                return answer

            client.call_script = behind  # type: ignore[method-assign]
            async with session(one, token=token("u")) as ws:
                (job,) = (await ws.subscribe())["snapshot"]
                newest = (await publish(two, "a", progress=99)).version
                versions = [job["version"]]
                while versions[-1] < newest:
                    versions.append((await ws.receive())["version"])
                assert versions == list(range(versions[0], newest + 1))


async def test_what_comes_after_a_gap_waits_until_it_is_filled(redis: RedisServer) -> None:
    """A subscription that is back may bring the next message at once; what was missed before it may be of others."""
    missed, next_one = CHANNELS[shard_of("u")], CHANNELS[shard_of("v")]
    assert missed != next_one
    async with nodes(redis.url) as (one, two), session(one) as ws:
        await ws.subscribe()
        assert one.node.shared is not None
        client = one.node.shared.client
        link = client._subscription
        assert link is not None
        pass_on = link._on_message

        def come_back(channel: bytes, data: bytes) -> None:
            if channel == next_one:
                client._confirmed(frozenset((missed, next_one)))
            if channel != missed:
                pass_on(channel, data)

        link._on_message = come_back
        for job_id, user in (("a", "u"), ("b", "v")):
            await publish(two, job_id, userId=user)
        assert [(await ws.receive())["jobId"] for _ in range(2)] == ["a", "b"]
        link._on_message = pass_on
        await publish(two, "a", progress=1)
        assert (await ws.receive())["version"] == 2


async def test_a_node_lets_go_of_what_nobody_watches_any_more(
    redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_follower, "IDLE_S", 0.5)
    async with nodes(redis.url, auth=AUTH) as (one, two):
        follower = two.node.shared.follower  # type: ignore[union-attr]
        users = ["alice", *(f"user-{number}" for number in range(40))]
        first = await publish(one, "a", userId="alice")
        for user in users[1:]:
            await publish(one, f"of-{user}", userId=user)
        async with session(two, token=token("alice")) as ws:
            assert len((await ws.subscribe())["snapshot"]) == 1
            assert len((await two.get("/api/v2/jobs", ADMIN)).json["jobs"]) == len(users)
            assert len(follower.followed) == SHARDS + 1  # notifications have one of their own
            await until(lambda: len(follower.followed) == 2)
            its = {f"of-{user}" for user in users[1:] if shard_of(user) == shard_of("alice")} | {"a"}
            await until(lambda: set(two.node.jobs.jobs) == its == set(follower.revs))
            # What is watched goes on, in order and without the others'.
            for progress in range(5):
                await publish(one, "a", progress=progress)
                await publish(one, "of-user-1", progress=progress)
            assert [(await ws.receive())["version"] for _ in range(5)] == [2, 3, 4, 5, 6]
            assert two.node.jobs.get("of-user-1") is None
        # Followed again it is whole: what came before, what nobody followed, and what comes now.
        cursor = f"{one.node.history.epoch}:{first.offset}"
        await until(lambda: follower.followed == {NOTICES_SHARD})
        async with session(two, token=token("user-1")) as ws:
            begun = await ws.subscribe(last_seen=cursor)
            assert begun["recovered"]
            assert [(await ws.receive())["version"] for _ in range(6)] == [1, 2, 3, 4, 5, 6]
            await publish(two, "of-user-1", status="completed")
            assert (await ws.receive())["version"] == 7
        everything = (await two.get("/api/v2/jobs", ADMIN)).json["jobs"]
        versions = {job["jobId"]: job["version"] for job in everything}
        assert versions == {f"of-{user}": 1 for user in users[1:]} | {"a": 6, "of-user-1": 7}
        offsets = [update.offset for update in two.node.history.everything(0)]
        assert offsets == list(range(1, two.node.history.last + 1))


async def test_what_was_let_go_of_while_a_reader_waited_is_followed_again(
    redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader that was further on another node waits until this one has caught up, and that may take long."""
    async with nodes(redis.url, auth=AUTH) as (one, two):
        follower = two.node.shared.follower  # type: ignore[union-attr]
        synchronise = follower.synchronise
        waits = 0

        async def long() -> None:
            nonlocal waits
            waits += 1
            if waits == 1:
                await publish(one, "b", userId="bob")
            with monkeypatch.context() as patch:
                if waits == 1:
                    patch.setattr(redis_follower, "IDLE_S", 0.0)
                await synchronise()

        first = await publish(one, "a", userId="alice")
        assert (await two.get("/api/v2/jobs/a", bearer("alice"))).status == 200
        assert shard_of("alice") in follower.followed
        monkeypatch.setattr(follower, "synchronise", long)
        async with session(two, token=token("alice")) as ws:
            begun = await ws.subscribe(last_seen=f"{one.node.history.epoch}:{first.offset + 1}")
            assert begun["recovered"]
            await publish(one, "a", progress=1)
            assert (await ws.receive())["version"] == 2
            assert waits == 2


async def test_nothing_is_shown_between_loading_and_reading_what_came_meanwhile(redis: RedisServer) -> None:
    """Redis goes away in between: other shards must not get past what the loaded one has not shown yet."""
    async with nodes(redis.url, auth=AUTH) as (one, two):
        follower = two.node.shared.follower  # type: ignore[union-attr]
        subscribe, call_script = follower._subscribe, follower.client.call_script
        failed = False

        async def late(shards: set[int]) -> None:
            await publish(one, "a", progress=1)  # no message of it comes here
            await subscribe(shards)

        async def failing(script: Script, keys: Any, arguments: Any, **options: Any) -> Any:
            nonlocal failed
            if script is AFTER and not failed:
                failed = True
                await publish(one, "b", progress=1)
                await until(lambda: follower._buffer)
                raise RedisClientError("away")
            return await call_script(script, keys, arguments, **options)

        await publish(one, "a", userId="alice")
        await publish(one, "b", userId="bob")
        async with session(two, token=token("bob")) as bobs, session(two, token=token("alice")) as alices:
            await bobs.subscribe()
            epoch = two.node.history.epoch
            follower._subscribe = late  # type: ignore[method-assign]
            follower.client.call_script = failing  # type: ignore[method-assign]
            assert [job["version"] for job in (await alices.subscribe())["snapshot"]] == [2]
            update = await bobs.receive()
            assert (update["jobId"], update["version"]) == ("b", 2)
            assert (failed, two.node.history.epoch) == (True, epoch)


async def test_what_is_not_followed_cannot_be_read_while_redis_is_away(redis: RedisServer) -> None:
    async with server(store={"url": redis.url}, auth=AUTH) as one:
        await publish(one, "a", userId="alice")
        assert (await one.get("/api/v2/jobs/a", bearer("alice"))).status == 200
        redis.kill()
        await until_answered(one, "/ready", 503)
        assert (await one.get("/api/v2/jobs/a", bearer("alice"))).status == 200
        refused = await one.get("/api/v2/jobs", ADMIN)
        assert (refused.status, refused.error) == (503, "store_unavailable")


async def test_many_jobs_are_followed_in_turns(redis: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of one shard while those of another are read and published: nobody misses anything or gets it twice."""
    assert shard_of("u") != shard_of("v")
    async with nodes(redis.url) as (one, two), session(one) as ws:
        await ws.subscribe(userId="v")
        for number in range(200):
            await publish(two, f"job-{number}", userId="u")
        for module in (turns, history, jobs, redis_shown):
            monkeypatch.setattr(module, "PORTION", 4)
        monkeypatch.setattr(redis_follower, "TURN_S", -1.0)
        monkeypatch.setattr(redis_reading, "_TURN", 4)
        passes, enough, over = 0, trio.Event(), trio.Event()

        async def others() -> None:
            nonlocal passes
            while True:
                await trio.lowlevel.checkpoint()
                passes += 1

        async def more() -> None:
            for number in itertools.count():
                await publish(two, f"job-{number % 200}", message=str(number))
                await publish(two, "v-job", userId="v", message=str(number))
                if enough.is_set():
                    break
            over.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(others)
            nursery.start_soon(more)
            async with session(one) as reader:
                before = passes
                answer = await reader.subscribe(userId="u")
                assert passes - before > 200 // 4 * 4  # decoded, filled in, sorted and shown, each in turns
                enough.set()
                await over.wait()  # one that is given up may still come, behind the end
                versions = {job["jobId"]: [job["version"]] for job in answer["snapshot"]}
                assert len(versions) == 200
                await publish(two, "job-0", status="completed")
                while (message := await reader.receive())["type"] != "job_completed":
                    if message["type"] != "heartbeat":
                        versions[message["jobId"]].append(message["version"])
            nursery.cancel_scope.cancel()
        versions["job-0"].append(message["version"])
        for job_id, seen in versions.items():
            job = two.node.jobs.get(job_id) or one.node.jobs.get(job_id)
            assert job is not None
            assert seen == list(range(seen[0], job.latest.version + 1))
        seen = []
        await publish(two, "v-job", status="completed")
        while (message := await ws.receive())["type"] != "job_completed":
            if message["type"] != "heartbeat":
                seen.append(message["version"])
        assert seen == list(range(1, message["version"]))
