"""What is published on one node is read on another: by every transport, and on with a cursor from elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from tests.redis_nodes import nodes, publish
from tests.redis_servers import RedisServer, running_proxy
from tests.streams import event_stream, session
from tests.support import AUTH, bearer, server, spawned, token, until, until_answered

pytestmark = pytest.mark.slow


async def test_published_on_one_seen_on_the_other_with_the_same_cursors(redis: RedisServer) -> None:
    async with nodes(redis.url, auth=AUTH) as (one, two):
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
    async with nodes(redis.url, auth=AUTH) as (one, two):
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
    async with nodes(redis.url, auth=AUTH) as (one, two):
        async with session(two, token=token("alice")) as ws:
            await ws.subscribe()
            for _ in range(20):
                accepted = await publish(one, "b", userId="bob")
            await until(lambda: two.node.history.last >= accepted.offset)
        assert two.node.jobs.get("b") is None


async def test_polling_clients_cursors_are_known_everywhere(redis: RedisServer) -> None:
    async with nodes(redis.url) as (one, two):
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


async def test_a_node_that_is_cut_off_shows_nobody_an_older_state(redis: RedisServer) -> None:
    """Whoever has been further on another node is refused, on every way of reading; its own readers are served."""
    async with (
        running_proxy(redis.port) as to_redis,
        server(store={"url": redis.url}) as one,
        server(store={"url": f"redis://127.0.0.1:{to_redis.port}"}) as two,
    ):
        first = (await one.publish("job-1", userId="anonymous", progress=1)).json["id"]
        await until_answered(two, "/api/v2/jobs/job-1", 200)
        to_redis.stop_passing()
        to_redis.cut()
        await until_answered(two, "/ready", 503)
        further = (await one.publish("job-1", userId="anonymous", progress=2)).json["id"]
        for path in ("poll?timeout=0&", "stream?"):
            answer = await two.get(f"/api/v2/jobs/{path}jobIds=job-1&last_seen={further}")
            assert answer.status == 503, path
        answer = await two.get(f"/api/v2/jobs/poll?timeout=0&jobIds=job-1&last_seen={first}")
        assert (answer.status, answer.json["reset"], answer.json["live"]) == (200, False, False)
        to_redis.pass_again()
        await until_answered(two, "/ready", 200)
        answer = await two.get(f"/api/v2/jobs/poll?timeout=0&jobIds=job-1&last_seen={further}")
        assert (answer.status, answer.json["reset"], answer.json["updates"]) == (200, False, [])
