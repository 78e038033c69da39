"""Two servers on one Redis: what is published on one is seen on the other, whatever befalls Redis meanwhile."""

from __future__ import annotations

import itertools
import json
import shutil
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from protocol.errors import ApiError
from protocol.fields import decode_fields
from server.app import StartError
from server.brokers import redis_broker, redis_follower
from server.brokers.base import Accepted, Cancel, Delete, Publish
from server.brokers.redis_client import RedisClientError, Script
from server.brokers.redis_keys import AFTER, CHANNELS, LOAD, NOTICES_SHARD, SHARDS, shard_of
from server.transports import live
from tests.redis_servers import (
    RedisServer,
    running_cluster,
    running_proxy,
    running_sentinels,
    running_server,
)
from tests.streams import Stream, WebSocket, event_stream, poll, session, stream_at, websocket
from tests.support import ADMIN, AUTH, InProcess, bearer, server, spawned, token, until, until_answered

pytestmark = pytest.mark.slow

LONG_S = 60.0  # for everything of a test with failures; reached only by what would never end
RESUMED_S = 10.0  # promised: with Redis back, every node's readers get updates again


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    with running_server(tmp_path) as running:
        yield running


@asynccontextmanager
async def two_nodes(url: str, **tables: Any) -> AsyncIterator[tuple[InProcess, InProcess]]:
    store = {"store": {"url": url}}
    async with server(**store, **tables) as one, server(**store, **tables) as two:
        yield one, two


async def publish(
    at: InProcess, job_id: str, *, key: str | None = None, tries: list[int] | None = None, **fields: object
) -> Accepted:
    """Publish past HTTP, and again while the store is away; ``tries`` gets how often it took."""
    data = decode_fields(json.dumps(fields).encode())
    for count in itertools.count(1):
        if tries is not None:
            tries[:] = [count]
        submission = at.node.broker.submit([Publish(job_id, data, "may", "worker", key)])
        try:
            await submission.wait_kept()
        except ApiError as error:
            if error.code != "store_unavailable":
                raise
            await trio.sleep(0.05)
            continue
        (result,) = submission.results
        assert isinstance(result, Accepted), result
        return result
    raise AssertionError


class Watcher:
    """Reads all that one node says of all jobs."""

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []
        self.ready = trio.Event()

    async def run(self, at: InProcess) -> None:
        async with session(at) as ws:
            await ws.subscribe()
            self.ready.set()
            while True:
                message = await self._next(ws)
                if message["type"] not in ("heartbeat", "pong"):
                    self.messages.append(message)

    async def _next(self, ws: WebSocket) -> dict[str, Any]:
        while True:
            try:
                return await ws.receive()
            except trio.TooSlowError:  # while Redis is away it is quiet
                pass

    @property
    def resets(self) -> int:
        return sum(message["type"] == "reset" for message in self.messages)

    def has(self, job_id: str, version: int) -> bool:
        return any(
            message.get("jobId") == job_id and message.get("version") == version for message in reversed(self.messages)
        )

    def check(self, answered: list[tuple[str, int]], once: set[str]) -> None:
        """Nothing was lost, repeated or out of order, and everything that was answered is there."""
        texts = Counter(message["message"] for message in self.messages)
        assert {texts[text] for text in once} <= {1}  # nor was anything done twice
        assert not self.resets
        offsets = [int(message["id"].partition(":")[2]) for message in self.messages]
        assert offsets == sorted(set(offsets))
        versions: dict[str, list[int]] = {}
        for message in self.messages:
            versions.setdefault(message["jobId"], []).append(message["version"])
        for job_id, seen in versions.items():
            assert seen == list(range(1, len(seen) + 1)), job_id
        told = {(job_id, version) for job_id, seen in versions.items() for version in seen}
        assert set(answered) <= told


@asynccontextmanager
async def under_load(nodes: tuple[InProcess, ...], *, jobs: int = 8) -> AsyncIterator[tuple[list[Watcher], Any]]:
    """Publish to some jobs on all nodes, as fast as answers come, and watch on all. Checks everything at the end.

    Every job has a worker at every node, so they contend all the time.
    """
    answered: list[tuple[str, int]] = []
    once: set[str] = set()
    watchers = [Watcher() for _ in nodes]
    stopping = trio.Event()

    async def work(at: InProcess, job_id: str, name: str) -> None:
        count = 0
        while not stopping.is_set():
            count += 1
            text = f"{name} {job_id} {count}"
            key = text if count % 2 else None
            tries: list[int] = []
            accepted = await publish(at, job_id, key=key, tries=tries, userId=f"owner-{job_id}", message=text)
            if not accepted.duplicate:
                answered.append((job_id, accepted.version))
            if key is not None or tries == [1]:
                once.add(text)

    with trio.fail_after(LONG_S):
        async with trio.open_nursery() as nursery:
            for at, watcher in zip(nodes, watchers, strict=True):
                nursery.start_soon(watcher.run, at)
                await watcher.ready.wait()
            async with trio.open_nursery() as workers:
                for number, at in enumerate(nodes):
                    for job in range(jobs):
                        workers.start_soon(work, at, f"job-{job}", f"w{number}")
                await until(lambda: len(answered) > 50)

                async def more() -> None:
                    """Return when so much has been published since that all is well again."""
                    had = [len(watcher.messages) for watcher in watchers]
                    await until(
                        lambda: all(len(each.messages) > old for each, old in zip(watchers, had, strict=True)),
                        within=RESUMED_S,
                    )
                    goal = len(answered) + 100
                    await until(lambda: len(answered) >= goal, within=LONG_S)

                yield watchers, more
                await more()
                stopping.set()
            newest: dict[str, int] = {}
            for job_id, version in answered:
                newest[job_id] = max(version, newest.get(job_id, 0))
            for watcher in watchers:
                if not watcher.resets:
                    for job_id, version in newest.items():
                        await until(partial(watcher.has, job_id, version), within=LONG_S)
                    watcher.check(answered, once)
            nursery.cancel_scope.cancel()


# All ways of reading


async def test_published_on_one_seen_on_the_other_with_the_same_cursors(redis: RedisServer) -> None:
    async with two_nodes(redis.url, auth=AUTH) as (one, two):
        alice, worker = bearer("alice"), bearer("worker", capabilities=["publish"])
        async with (
            session(two, token=token("alice")) as ws,
            event_stream(two, headers=alice) as sse,
        ):
            await ws.subscribe(jobIds=["a"])
            assert [(await sse.event()).type for _ in range(2)] == ["connected", "snapshot"]
            made = await one.post("/api/v2/jobs", {"jobId": "a", "userId": "alice"}, worker)
            assert made.status == 201
            cursor = made.json["id"]
            told = await ws.receive()
            event = await sse.event()
            assert (told["id"], told["jobId"], told["version"]) == (cursor, "a", 1)
            assert (event.id, event.data["version"]) == (cursor, 1)
            polled = await two.get(f"/api/v2/jobs/poll?jobIds=a&timeout=0&last_seen={cursor}", alice)
            assert (polled.json["updates"], polled.json["last_seen"], polled.json["reset"]) == ([], cursor, False)

            async with trio.open_nursery() as nursery:
                answers: list[Any] = []

                async def long_poll() -> None:
                    answers.append(await two.get(f"/api/v2/jobs/poll?timeout=20&last_seen={cursor}", alice))

                nursery.start_soon(long_poll)
                await until(lambda: two.node.polls)
                second = await one.post("/api/v2/jobs/a/updates", {"status": "completed"}, worker)
            assert [update["id"] for update in answers[0].json["updates"]] == [second.json["id"]]
            assert (await ws.receive())["type"] == "job_completed"
            assert (await sse.event()).id == second.json["id"]
        shown = await two.get("/api/v2/jobs/a", alice)
        assert (shown.status, shown.json["status"]) == (200, "completed")
        assert shown.headers["etag"] == (await one.get("/api/v2/jobs/a", alice)).headers["etag"]
        assert (await two.get("/api/v2/jobs/a", bearer("bob"))).status == 404
        history = await one.get("/api/v2/jobs/a/history", alice)
        assert [update["id"] for update in history.json["updates"]] == [cursor, second.json["id"]]


async def test_a_reader_resumes_on_the_other_node(redis: RedisServer) -> None:
    async with two_nodes(redis.url, auth=AUTH) as (one, two):
        alice = bearer("alice")
        first = await publish(one, "a", userId="alice")
        epoch = one.node.history.epoch
        # Node two has never heard of alice, and so far knows the log's end as of its start.
        async with session(two, token=token("alice")) as ws:
            begun = await ws.subscribe(last_seen=f"{epoch}:{first.offset}")
            assert begun["recovered"], begun
            assert begun["snapshot"] == []
        for progress in range(5):
            await publish(one, "a", progress=progress)
        # What others publish moves the log for everybody.
        foreign = await publish(one, "b", userId="bob")
        async with event_stream(two, headers=alice | {"Last-Event-ID": f"{epoch}:{first.offset}"}) as sse:
            events = [await sse.event() for _ in range(6)]
            assert [event.type for event in events] == ["connected", *["status_update"] * 5]
            assert [event.data["version"] for event in events[1:]] == [2, 3, 4, 5, 6]
        answer = await two.get(f"/api/v2/jobs/poll?timeout=0&last_seen={epoch}:{foreign.offset}", alice)
        assert (answer.json["updates"], answer.json["reset"]) == ([], False)
        ahead = await two.get(f"/api/v2/jobs/poll?timeout=0&last_seen={epoch}:{foreign.offset + 9}", alice)
        assert ahead.json["reset"]


async def test_a_quiet_readers_cursor_moves_with_the_log(redis: RedisServer) -> None:
    async with two_nodes(redis.url, auth=AUTH) as (one, two):
        async with session(two, token=token("alice")) as ws:
            await ws.subscribe()
            for _ in range(20):
                accepted = await publish(one, "b", userId="bob")
            await until(lambda: two.node.history.last >= accepted.offset)
        assert two.node.jobs.get("b") is None


async def test_polling_clients_cursors_are_known_everywhere(redis: RedisServer) -> None:
    async with two_nodes(redis.url) as (one, two):
        await publish(one, "a", userId="u")
        first = await one.get("/api/v2/jobs/poll?timeout=0&client_id=c&jobIds=a,b")
        assert len(first.json["updates"]) == 1
        await publish(one, "a", progress=7)
        second = await two.get("/api/v2/jobs/poll?timeout=0&client_id=c&jobIds=b,a")
        assert [update["progress"] for update in second.json["updates"]] == [7]
        other = await two.get("/api/v2/jobs/poll?timeout=0&client_id=c&jobIds=a")
        assert other.json["last_seen"] == second.json["last_seen"]
        with redis.oracle() as oracle:
            (key, *_) = oracle.keys("{statuswire}:cursor:*")
            assert 0 < oracle.ttl(key) <= 3600


async def test_a_node_follows_only_what_its_readers_watch(redis: RedisServer) -> None:
    async with two_nodes(redis.url, auth=AUTH) as (one, two):
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
    async with two_nodes(redis.url) as (one, two):
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
    async with two_nodes(redis.url, auth=AUTH) as (one, two):
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
                    with trio.move_on_after(0.5):
                        while one.node.history.last < last:  # noqa: ASYNC110  # it need not
                            await trio.sleep(0.01)
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
    async with two_nodes(redis.url) as (one, two), session(one) as ws:
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
    async with two_nodes(redis.url, auth=AUTH) as (one, two):
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
    async with two_nodes(redis.url, auth=AUTH) as (one, two):
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
    async with two_nodes(redis.url, auth=AUTH) as (one, two):
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


async def test_the_log_in_redis_is_bounded_by_age(redis: RedisServer) -> None:
    async with two_nodes(redis.url, auth=AUTH, history={"max_age": 60}) as (one, two):
        old = one.node.shared
        assert old is not None
        old._clock = lambda: time.time() - 7200
        for number in range(300):
            last_old = await publish(one, f"job-{number % 40}", userId=f"user-{number % 40}")
        old._clock = time.time
        with redis.oracle() as oracle:
            logs = oracle.keys("{statuswire}:log:*")

            def length() -> int:
                return sum(oracle.xlen(key) for key in logs)

            assert length() == 300
            # Each log keeps its newest entry: those who have read it know by it that they missed nothing.
            await until(lambda: length() == len(logs), within=LONG_S)
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


async def test_what_grew_old_while_a_node_was_away_is_not_lost(redis: RedisServer) -> None:
    async with running_proxy(redis.port) as proxy:
        behind = {"store": {"url": f"redis://127.0.0.1:{proxy.port}"}, "history": {"max_age": 60}}
        async with (
            server(store={"url": redis.url}, history={"max_age": 60}) as one,
            server(**behind) as two,
            session(two) as ws,
        ):
            shared = one.node.shared
            assert shared is not None
            shared._clock = lambda: time.time() - 7200
            await ws.subscribe()
            await publish(one, "a", userId="u")
            assert (await ws.receive())["version"] == 1
            proxy.stop_passing()
            proxy.cut()
            await until_answered(two, "/ready", 503)
            for _ in range(20):
                await publish(one, "a")
            shared._clock = time.time
            await publish(one, "a")
            with redis.oracle() as oracle:
                log = f"{{statuswire}}:log:{shard_of('u')}"
                await until(lambda: oracle.xlen(log) == 1, within=LONG_S)
            proxy.pass_again()
            reset = await ws.receive()
            assert (reset["type"], [job["version"] for job in reset["snapshot"]]) == ("reset", [22])
            assert one.node.history.epoch == two.node.history.epoch


async def test_a_cancel_does_not_reach_the_next_owners_job(redis: RedisServer) -> None:
    async with two_nodes(redis.url) as (one, two):
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


# Publishing on several nodes


async def test_all_contend_and_every_version_is_given_once(redis: RedisServer) -> None:
    async with two_nodes(redis.url) as nodes, under_load(nodes, jobs=3) as (_, more):
        await more()


async def test_a_key_counts_on_every_node(redis: RedisServer) -> None:
    async with two_nodes(redis.url) as (one, two):
        outcomes: list[Accepted] = []

        async def send(at: InProcess) -> None:
            outcomes.append(await publish(at, "a", key="k", userId="u", progress=1))

        async with trio.open_nursery() as nursery:
            for at in (one, two) * 10:
                nursery.start_soon(send, at)
        assert Counter(outcome.duplicate for outcome in outcomes) == {False: 1, True: 19}
        assert {(outcome.offset, outcome.version) for outcome in outcomes} == {(1, 1)}


async def test_refusals_rest_on_what_redis_has(redis: RedisServer) -> None:
    async with two_nodes(redis.url) as (one, two):
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


async def test_parents_add_up_from_all_nodes(redis: RedisServer) -> None:
    async with two_nodes(redis.url) as (one, two):
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
    async with two_nodes(redis.url) as (one, _):
        lines: list[dict[str, object]] = [{"jobId": "p", "userId": "u"}, {"jobId": "p", "stage": "s"}]
        lines += [{"jobId": f"q{number}", "userId": "u", "parentId": "p", "progress": 50} for number in range(20)]
        answer = await one.post("/api/v2/updates", lines)
        assert (answer.json["accepted"], answer.json["rejected"]) == (22, [])
        assert (await one.get("/api/v2/jobs/p")).json["progress"] == 50


async def test_one_node_declares_a_lease(redis: RedisServer) -> None:
    async with two_nodes(redis.url) as (one, two), session(one) as first, session(two) as second:
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
        await until(lambda: one.node.jobs.by_status["failed"] == 100, within=LONG_S / 2)
        assert one.node.jobs.by_status["queued"] == 7


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


async def test_a_redis_that_drops_keys_is_warned_of(redis: RedisServer, caplog: pytest.LogCaptureFixture) -> None:
    with redis.oracle() as oracle:
        oracle.config_set("maxmemory-policy", "allkeys-lru")
        async with server(store={"url": redis.url}) as one:
            await publish(one, "a", userId="u")
            assert "noeviction" not in caplog.text  # without a bound it drops nothing
        oracle.config_set("maxmemory", "1gb")
        async with server(store={"url": redis.url}) as one:
            await publish(one, "a", userId="u")
            assert "set its maxmemory-policy to noeviction" in caplog.text


async def test_a_clock_that_is_ahead_does_not_stop_the_others(
    redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    async with two_nodes(redis.url) as (one, two):
        shared = one.node.shared
        assert shared is not None
        shared._clock = lambda: time.time() + 3600
        await until(lambda: "this machine's clock differs" in caplog.text)
        for at in (one, two):
            await publish(at, "a", userId="u")
            record = (await at.get("/api/v2/jobs/a")).json
            stamp = datetime.fromisoformat(record["timestamp"])
            assert abs(stamp.timestamp() - time.time()) < LONG_S
        shared._clock = time.time
        await until(lambda: shared._clock_off_s == 0.0)


async def test_room_is_made_on_all_nodes(redis: RedisServer) -> None:
    async with two_nodes(redis.url, history={"max_jobs": 10}) as (one, two):
        for at in (one, two):
            await at.get("/api/v2/jobs")
        for number in range(30):
            await publish(one, f"job-{number}", userId=f"u{number}")
            await publish(two, f"job-{number}", status="completed")
        for at in (one, two):
            await until(lambda at=at: at.node.history.last == two.node.history.last)  # type: ignore[misc]
            assert sorted(at.node.jobs.jobs) == sorted(f"job-{number}" for number in range(20, 30))


# Failures


async def killed(redis: RedisServer) -> None:
    await trio.to_thread.run_sync(redis.kill)
    await trio.to_thread.run_sync(redis.start)


async def frozen(redis: RedisServer) -> None:
    redis.freeze()
    await trio.sleep(4)  # longer than the client's patience
    redis.thaw()


async def full(redis: RedisServer) -> None:
    with redis.oracle() as oracle:
        oracle.config_set("maxmemory", "1mb")
        await trio.sleep(1)
        oracle.config_set("maxmemory", "0")


async def scripts_flushed(redis: RedisServer) -> None:
    with redis.oracle() as oracle:
        oracle.script_flush()


async def subscriptions_cut(redis: RedisServer) -> None:
    with redis.oracle() as oracle:
        oracle.execute_command("CLIENT", "KILL", "TYPE", "pubsub")


async def connections_cut(redis: RedisServer) -> None:
    with redis.oracle() as oracle:
        oracle.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")


@pytest.mark.parametrize(
    "mishap",
    [killed, frozen, pytest.param(full, marks=pytest.mark.slow), scripts_flushed, subscriptions_cut, connections_cut],
)
async def test_nothing_is_lost(tmp_path: Path, mishap: Callable[[RedisServer], Awaitable[None]]) -> None:
    with running_server(tmp_path, "--appendonly", "yes", "--appendfsync", "always") as redis:
        async with two_nodes(redis.url) as nodes, under_load(nodes) as (_, more):
            for _ in range(1 if mishap is frozen else 3):
                await mishap(redis)
                await more()


async def test_a_dead_network(redis: RedisServer) -> None:
    async with (
        running_proxy(redis.port) as proxy,
        two_nodes(f"redis://127.0.0.1:{proxy.port}") as nodes,
        under_load(nodes) as (_, more),
    ):
        proxy.cut()
        await more()
        proxy.stop_passing()
        await until_answered(nodes[0], "/ready", 503)
        refused = await nodes[0].post("/api/v2/jobs", {"jobId": "x"})
        assert (refused.status, refused.error) == (503, "store_unavailable")
        assert "retry-after" in refused.headers
        assert (await nodes[0].get("/api/v2/jobs/job-1")).status == 200  # what is known can be read
        proxy.pass_again()
        await until_answered(nodes[0], "/ready", 200)
        await more()


async def test_a_node_that_is_cut_off_says_so(redis: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its readers stay, know that others may know more, and need not wait for a heartbeat to know that it is over."""
    beat = 3.0
    monkeypatch.setattr(live, "NOT_LIVE_BEAT_S", 0.2)
    async with (
        running_proxy(redis.port) as proxy,
        server(store={"url": redis.url}) as one,
        server(store={"url": f"redis://127.0.0.1:{proxy.port}"}, server={"heartbeat": beat}) as two,
        session(two) as ws,
        event_stream(two, jobIds="a") as events,
        stream_at(two, "/api/sse") as notices,
        stream_at(two, "/api/export/progress/a") as task,
    ):
        readers: list[Callable[[], Awaitable[dict[str, Any]]]] = [ws.receive]

        def reads(stream: Stream) -> None:
            async def receive() -> dict[str, Any]:
                event = await stream.event()
                return event.data

            readers.append(receive)

        for stream in (events, notices, task):
            reads(stream)

        async def until_beat(*, says: bool | None) -> None:
            """Of each reader, until one says so; those of another kind before it come from before it changed."""
            for receive in readers:
                while (message := await receive())["type"] != "heartbeat" or message.get("live") is not says:
                    assert message["type"] != "connected" or "live" not in message

        await ws.subscribe(jobIds=["a"])
        await publish(one, "a", userId="anonymous", kind="export")
        await until_beat(says=None)
        assert "live" not in await poll(two, jobIds="a")
        proxy.stop_passing()
        proxy.cut()
        await until_answered(two, "/ready", 503)
        await publish(one, "a", progress=50)
        await until_beat(says=False)
        with trio.fail_after(2 * beat):  # five usual ones would take twice that
            for _ in range(5):
                await until_beat(says=False)
        assert (await poll(two, jobIds="a"))["live"] is False
        async with websocket(two) as late, event_stream(two, jobIds="a") as later:
            assert (await late.receive())["live"] is False
            assert (await later.event()).data["live"] is False
        proxy.pass_again()
        assert (await events.updates("a", 2))[-1].data["progress"] == 50
        await until_beat(says=None)
        assert "live" not in await poll(two, jobIds="a")
        assert len(two.node.streams) == 4  # whoever was there has stayed


async def test_a_full_redis(redis: RedisServer) -> None:
    async with two_nodes(redis.url) as (one, two):
        await publish(one, "a", userId="u")
        with redis.oracle() as oracle:
            oracle.config_set("maxmemory", "1mb")
        refused = await one.post("/api/v2/jobs/a/updates", {"progress": 1})
        assert (refused.status, refused.error) == (503, "store_unavailable")
        not_ready = await one.get("/ready")
        assert not_ready.status == 503
        assert "OOM" in not_ready.json["reason"]
        assert (await two.get("/api/v2/jobs/a")).json["version"] == 1
        with redis.oracle() as oracle:
            oracle.config_set("maxmemory", "0")
        await until_answered(one, "/ready", 200)  # without anybody having to try
        assert (await one.post("/api/v2/jobs/a/updates", {"progress": 1})).status == 200


async def test_a_node_that_was_away_for_too_long_begins_anew(redis: RedisServer) -> None:
    short: dict[str, dict[str, object]] = {"store": {"url": redis.url}, "history": {"max_updates": 50}}
    async with running_proxy(redis.port) as proxy:
        behind = short | {"store": {"url": f"redis://127.0.0.1:{proxy.port}"}}
        async with server(**short) as one, server(**behind) as two, session(two) as ws:
            await ws.subscribe()
            await publish(one, "a", userId="u")
            assert (await ws.receive())["version"] == 1
            proxy.stop_passing()
            proxy.cut()
            await until_answered(two, "/ready", 503)
            # Streams are trimmed by whole nodes of 100 entries.
            for _ in range(400):
                await publish(one, "a")
            proxy.pass_again()
            reset = await ws.receive()
            assert (reset["type"], [job["version"] for job in reset["snapshot"]]) == ("reset", [401])
            await publish(one, "a")
            assert (await ws.receive())["version"] == 402
            assert one.node.history.epoch == two.node.history.epoch


async def test_what_is_not_followed_cannot_be_read_while_redis_is_away(redis: RedisServer) -> None:
    async with server(store={"url": redis.url}, auth=AUTH) as one:
        await publish(one, "a", userId="alice")
        assert (await one.get("/api/v2/jobs/a", bearer("alice"))).status == 200
        redis.kill()
        await until_answered(one, "/ready", 503)
        assert (await one.get("/api/v2/jobs/a", bearer("alice"))).status == 200
        refused = await one.get("/api/v2/jobs", ADMIN)
        assert (refused.status, refused.error) == (503, "store_unavailable")


async def test_workers_get_their_lease_anew_when_redis_comes_back(tmp_path: Path) -> None:
    with running_server(tmp_path, "--appendonly", "yes", "--appendfsync", "always") as redis:
        async with server(store={"url": redis.url}) as one, session(one) as ws:
            await ws.subscribe()
            await publish(one, "a", userId="u", ttl=1.0)
            await trio.to_thread.run_sync(redis.kill)
            await trio.sleep(1.5)  # the lease's time
            await trio.to_thread.run_sync(redis.start)
            await publish(one, "a", progress=1)
            assert [(await ws.receive())["status"] for _ in range(4)] == ["queued", "queued", "stalled", "failed"]


async def test_a_killed_nodes_readers_go_on_at_another(redis: RedisServer, tmp_path: Path) -> None:
    async with server(store={"url": redis.url}) as two:
        async with spawned(tmp_path, store={"url": redis.url}) as one, session(one) as ws:
            begun = await ws.subscribe()
            assert begun["snapshot"] == []
            await publish(two, "a", userId="u")
            cursor = (await ws.receive())["id"]
            one.process.kill()
            for progress in range(3):
                await publish(two, "a", progress=progress)
        async with session(two) as ws:
            begun = await ws.subscribe(last_seen=cursor)
            assert begun["recovered"]
            assert [(await ws.receive())["version"] for _ in range(3)] == [2, 3, 4]


@pytest.mark.parametrize("how", ["older", "flushed"])
async def test_a_log_that_went_back_is_another_epoch(tmp_path: Path, how: str) -> None:
    with running_server(tmp_path) as redis:
        async with two_nodes(redis.url) as (one, two):
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
        async with two_nodes(redis.url) as (one, two), session(one) as ws:
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


async def test_sentinels_replace_a_master_under_load(tmp_path: Path) -> None:
    with running_sentinels(tmp_path) as sentinels:
        async with two_nodes(sentinels.url) as nodes:
            async with under_load(nodes) as (watchers, more):
                await trio.to_thread.run_sync(sentinels.master().kill)
                await more()
            epochs = {at.node.history.epoch for at in nodes}
            assert len(epochs) == 1
            # What the replica had not got was lost by Redis: then, and only then, everybody is told.
            assert len({watcher.resets > 0 for watcher in watchers}) == 1


async def test_a_cluster_loses_a_master_under_load(tmp_path: Path) -> None:
    with running_cluster(tmp_path, replicas=True) as cluster:
        with cluster.masters[0].oracle() as oracle:
            slot = int(oracle.execute_command("CLUSTER", "KEYSLOT", "{statuswire}"))
        async with two_nodes(cluster.url) as nodes:
            async with under_load(nodes) as (_, more):
                await trio.to_thread.run_sync(cluster.owner(slot).kill)
                await more()
            assert nodes[0].node.history.epoch == nodes[1].node.history.epoch


async def test_start_errors_say_what_to_do(tmp_path: Path) -> None:
    with running_server(tmp_path) as redis:
        with redis.oracle() as oracle:
            oracle.config_set("requirepass", "secret")
        redis.password = "secret"
        for url, words in [
            (redis.url, "password"),
            (f"redis://:wrong@127.0.0.1:{redis.port}", "password"),
            (f"redis://:secret@127.0.0.1:{redis.port}/99", "database"),
        ]:
            with pytest.raises(StartError, match=words):
                async with server(store={"url": url}):
                    pass
        with redis.oracle() as oracle:
            oracle.hset("{statuswire}:meta", mapping={"epoch": "e", "schema": 99, "shards": 16, "offset": 0, "at": 0})
        with pytest.raises(StartError, match="format 99"):
            async with server(store={"url": f"redis://:secret@127.0.0.1:{redis.port}"}):
                pass
