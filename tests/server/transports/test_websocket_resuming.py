"""A WebSocket that comes back: cursors, a log that was lost, and updates spaced out by ``minInterval``."""

from __future__ import annotations

from typing import Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.streams import clean_server, cursor, lose_log, narrow, put, remove, seen, session, websocket
from tests.support import InProcess, token, until

# Cursors


async def test_a_kept_cursor_is_recovered_from(server: InProcess) -> None:
    put(server, "a")
    put(server, "b")
    since = cursor(server)
    put(server, "a")
    put(server, "b")
    put(server, "a")
    async with session(server) as ws:
        answer = await ws.subscribe(jobIds=["a"], last_seen=since)
        # Its own cursor is no further than what has been given so far: the replay comes behind it.
        assert (answer["recovered"], answer["snapshot"], answer["id"]) == (True, [], since)
        messages = await ws.messages(2)
        assert seen(messages) == [("a", 2), ("a", 3)]
        assert messages[-1]["id"] == cursor(server)
        put(server, "b")
        answer = await ws.subscribe(jobIds=["b"], last_seen=messages[-1]["id"])
        assert seen([await ws.receive()]) == [("b", 3)]
        answer = await ws.subscribe(jobIds=["c"], last_seen=cursor(server))
        assert (answer["recovered"], answer["id"]) == (True, cursor(server))
        await ws.quiet()


@pytest.mark.parametrize("given", ["otherepoch12:1", "{epoch}:1", "{epoch}:99", "nonsense"])
async def test_a_lost_cursor_is_answered_by_the_snapshot(given: str) -> None:
    async with clean_server(history={"max_updates": 3}) as server, session(server) as ws:
        for _ in range(10):
            put(server, "a")
        answer = await ws.subscribe(jobIds=["a"], last_seen=given.format(epoch=server.node.history.epoch))
        assert (answer["recovered"], seen(answer["snapshot"]), answer["id"]) == (False, [("a", 10)], cursor(server))
        await ws.quiet()


async def test_a_unix_time_recovers_what_is_kept(server: InProcess) -> None:
    put(server, "a")
    put(server, "a")
    at_ms = server.node.history.everything(0)[0].at_ms
    async with session(server) as ws:
        for since in (at_ms, at_ms // 1000, str(at_ms)):
            answer = await ws.subscribe(jobIds=["a"], last_seen=since)
            assert answer["recovered"]
            assert seen(await ws.messages(2)) == [("a", 1), ("a", 2)]


# A lost log


async def test_a_lost_log_is_told_by_reset_with_a_snapshot(server: InProcess) -> None:
    put(server, "a")
    put(server, "a")
    put(server, "b")
    async with session(server) as ws, session(server) as idle, websocket(server, deflate=True) as deflated:
        await deflated.receive()
        await ws.subscribe(jobIds=["a"], fields=["progress"])
        await ws.subscribe(userId="bob")
        await deflated.subscribe()
        put(server, "a", progress=3)
        lose_log(server)
        reset = await ws.receive()
        assert (reset["type"], reset["id"]) == ("reset", cursor(server))
        assert reset["snapshot"] == [{"jobId": "a", "status": "queued", "progress": 3, "version": 3}]
        assert seen((await deflated.receive())["snapshot"]) == [("a", 3), ("b", 1)]
        assert (await idle.receive())["snapshot"] == []
        server.node.broker._offset = server.node.broker._kept_offset = 0  # type: ignore[attr-defined]
        put(server, "a")
        assert [(m["version"], m["id"]) for m in [await ws.receive()]] == [(4, cursor(server))]
        # The cursor of one who had not subscribed is of the new log, too.
        answer = await idle.subscribe(jobIds=["a"], last_seen=reset["id"])
        assert answer["recovered"]
        assert seen([await idle.receive()]) == [("a", 4)]


async def test_a_lost_log_keeps_the_answers_that_are_on_their_way(server: InProcess) -> None:
    for number in range(30):
        put(server, f"job{number}", metadata={"text": "x" * 30_000})
    async with session(server, receive_buffer=1) as ws:
        narrow(server)
        await ws.send("subscribe", all=True, ref="first")
        (reader,) = server.node.streams
        await until(lambda: reader.queue)  # type: ignore[attr-defined]
        lose_log(server)
        answers = [await ws.receive()]
        while answers[-1].get("more") or answers[-1]["type"] != "reset":
            answers.append(await ws.receive())
        last = {answer["type"]: answer for answer in answers}
        assert "more" not in last["subscribed"]
        assert sum(len(answer["snapshot"]) for answer in answers if answer["type"] == "reset") == 30


async def test_a_stranger_is_told_nothing_of_the_log(guarded: InProcess) -> None:
    async with websocket(guarded) as ws:
        await until(lambda: guarded.node.streams)
        lose_log(guarded)
        await ws.send("auth", token=token("alice"))
        hello = await ws.receive()
        assert (hello["type"], hello["id"]) == ("connected", cursor(guarded))


# minInterval


async def test_min_interval_gives_the_newest_of_each_job_once_per_interval(server: InProcess) -> None:
    put(server, "a", status="processing")
    put(server, "b", status="processing")
    async with session(server) as ws:
        await ws.subscribe(jobIds=["a", "b"], minInterval=500)
        put(server, "a", progress=1)
        assert seen([await ws.receive()]) == [("a", 2)]
        started = trio.current_time()
        for number in range(2, 10):
            put(server, "a", progress=number)
            put(server, "b", progress=number)
            await wait_all_tasks_blocked()
        messages = await ws.messages(2)
        assert trio.current_time() - started >= 0.4
        assert seen(messages) == [("a", 10), ("b", 9)]
        await ws.subscribe(jobIds=["a"], minInterval=0)
        for number in range(10, 13):
            put(server, "a", progress=number)
        assert seen(await ws.messages(3)) == [("a", 11), ("a", 12), ("a", 13)]


async def test_min_interval_never_holds_a_status_change(server: InProcess) -> None:
    async with session(server) as ws:
        await ws.subscribe(userId="alice", minInterval=60_000)
        put(server, "a")
        assert seen([await ws.receive()]) == [("a", 1)]
        put(server, "a", message="held")
        put(server, "b", message="new")
        put(server, "a", status="processing")
        put(server, "a", progress=50)  # same flush: held, and does not hide the change before it
        assert seen(await ws.messages(2)) == [("b", 1), ("a", 3)]
        put(server, "b", progress=1)
        put(server, "a", status="completed")
        put(server, "b", status="failed")
        assert seen(await ws.messages(2)) == [("a", 5), ("b", 3)]
        await ws.quiet()
        remove(server, "a")
        assert (await ws.receive())["type"] == "job_deleted"


async def test_min_interval_survives_a_slow_flush_of_status_changes(server: InProcess) -> None:
    """Several changes of one job in one flush come all, in order."""
    async with session(server) as ws:
        await ws.subscribe(userId="alice", minInterval=60_000)
        put(server, "warm-up")
        await ws.receive()
        put(server, "a")
        put(server, "a", status="processing")
        put(server, "a", status="failed")
        put(server, "a", attempt=2)
        put(server, "a", status="completed")
        assert seen(await ws.messages(5)) == [("a", version) for version in range(1, 6)]


async def test_spaced_out_cursors_lose_nothing(server: InProcess) -> None:
    """Whatever message is the last one received: resuming from its id misses nothing."""
    put(server, "a", status="processing")
    put(server, "b", status="processing")
    put(server, "c", status="processing")
    log: list[tuple[str, int]] = []
    ids: list[tuple[str, int]] = []
    async with session(server) as ws:
        await ws.subscribe(userId="alice", minInterval=250)

        async def take(count: int) -> None:
            for message in await ws.messages(count):
                log.append((message["jobId"], message["version"]))
                ids.append((message["id"], len(log)))

        put(server, "a", progress=1)
        await take(1)
        put(server, "a", progress=2)
        put(server, "b", progress=2)
        put(server, "c", status="completed")  # overtakes both
        await take(1)
        put(server, "a", progress=3)
        await take(2)
        put(server, "b", progress=4)
        await take(1)
        await ws.send("ping")
        assert (await ws.receive())["type"] == "pong"
    final = {"a": 4, "b": 3, "c": 2}
    for position, (last_id, count) in enumerate(ids):
        known: dict[str, int] = {}
        for job_id, version in log[:count]:
            known[job_id] = max(known.get(job_id, 0), version)
        async with session(server) as ws:
            answer = await ws.subscribe(userId="alice", last_seen=last_id)
            assert answer["recovered"]
            put(server, "end", progress=position)
            replayed: list[dict[str, Any]] = []
            while (message := await ws.receive())["jobId"] != "end" or message["progress"] != position:
                if message["jobId"] != "end":
                    replayed.append(message)
            for job_id, version in seen(replayed):
                # Only an update that overtook others can come again: its id had to stay behind them.
                assert version > known.get(job_id, 0) or job_id == "c"
                known[job_id] = max(known.get(job_id, 0), version)
            assert {job_id: known.get(job_id) for job_id in final} == final
    assert len(ids) == 5


async def test_heartbeats_and_pings_go_on_while_an_interval_holds_updates() -> None:
    async with clean_server(server={"heartbeat": 0.05}) as server, session(server) as ws:
        put(server, "a", status="processing")
        await ws.subscribe(jobIds=["a"], minInterval=60_000)
        put(server, "a", progress=1)
        before = cursor(server)
        assert (await ws.receive())["version"] == 2
        put(server, "a", progress=2)
        beats = await ws.messages(3)
        assert [beat["type"] for beat in beats] == ["heartbeat"] * 3
        assert len(ws.pings) >= 2
        # The held update is still to come: no cursor passes it.
        assert {beat["id"] for beat in beats} == {before}
