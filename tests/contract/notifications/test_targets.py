"""Notifications over the real server: every target on every way of reading, and the order in which they come."""

from __future__ import annotations

import json
from typing import Any

import trio

from protocol.fields import decode_fields
from protocol.notice import decode_notice
from server.brokers.base import Notify, Publish
from tests.notifying import notified, put, send
from tests.streams import clean_server, cursor, event_stream, offset_of, poll, session, websocket
from tests.support import ADMIN, InProcess, bearer, token, until

# What a stream looks like


async def test_a_stream_begins_with_the_client_id_and_has_named_events(at: InProcess) -> None:
    async with notified(at, bearer("ann"), username="Ann B.", channels="news,team-1") as (stream, hello):
        assert stream.headers["content-type"] == "text/event-stream"
        assert stream.headers["cache-control"] == "no-cache, no-transform"
        assert hello.retry == 3000
        assert hello.data["clientId"]
        assert hello.data["userId"] == "ann"
        assert hello.data["username"] == "Ann B."
        assert hello.data["channels"] == ["news", "team-1"]
        assert hello.id == cursor(at)
        sent = await send(at, "user", "ann", "payment.done", data={"sum": [1, None, "ü"]}, metadata={"k": "v"})
        assert sent["delivered"] == 1
        event = await stream.event()
        assert event.name == "payment.done"
        assert event.id == sent["id"] == cursor(at)
        assert event.data == {
            "data": {"sum": [1, None, "ü"]},
            "metadata": {"k": "v"},
            "timestamp": event.data["timestamp"],
        }
        assert event.data["timestamp"].endswith("Z")


async def test_a_heartbeat_is_an_event_with_the_cursor() -> None:
    async with clean_server(server={"heartbeat": 0.05}) as at, notified(at, userId="ann") as (stream, _):
        await put(at, "a")
        while (event := await stream.event()).id != cursor(at):
            assert event.name == "heartbeat"
        assert event.data["timestamp"]


# Targets and ways of reading


async def test_each_target_reaches_its_readers_on_each_way(at: InProcess) -> None:
    async with (
        notified(at, bearer("ann"), channels="news") as (stream, hello),
        session(at, token=token("ann")) as ws,
        session(at, token=token("bob")) as other,
    ):
        joined = await ws.subscribe(channels=["news"])
        assert joined["channels"] == ["news"]
        assert joined["denied"] == []
        cases: list[tuple[str, Any, int]] = [
            ("user", "ann", 2),
            ("users", ["ann", "carl", "bob"], 3),
            ("channel", "news", 2),
            ("channels", ["news", "sports"], 2),
            ("broadcast", None, 3),
            ("client", hello.data["clientId"], 1),
        ]
        seen_by_other = 0
        for target, name, delivered in cases:
            before = cursor(at)
            sent = await send(at, target, name, f"to.{target}", metadata={"m": 1})
            assert sent["delivered"] == delivered, target
            event = await stream.event()
            assert (event.name, event.id, event.data["metadata"]) == (f"to.{target}", sent["id"], {"m": 1})
            if target != "client":
                message = await ws.receive()
                assert message == {
                    "type": "notification",
                    "id": sent["id"],
                    "event": f"to.{target}",
                    "data": {"n": 1},
                    "metadata": {"m": 1},
                    "timestamp": event.data["timestamp"],
                }
                polled = await poll(at, headers=bearer("ann"), channels="news", last_seen=before)
                assert polled["updates"] == [message]
                assert polled["last_seen"] == sent["id"]
            if target in ("users", "broadcast"):
                assert (await other.receive())["event"] == f"to.{target}"
                seen_by_other += 1
        await ws.quiet()
        await other.quiet()
        assert seen_by_other == 2


async def test_a_client_s_own_over_websocket(at: InProcess) -> None:
    async with websocket(at, token=token("ann")) as ws, session(at, token=token("ann")):
        hello = await ws.receive()
        sent = await send(at, "client", hello["clientId"])
        assert sent["delivered"] == 1
        assert (await ws.receive())["id"] == sent["id"]
        assert (await send(at, "client", "nobody"))["delivered"] == 0
        await ws.quiet()


async def test_a_poll_that_waits_is_woken_by_what_it_asked_for(at: InProcess) -> None:
    answers: list[dict[str, Any]] = []

    async def wait(**query: object) -> None:
        answers.append(await poll(at, headers=bearer("ann"), timeout=20, last_seen=cursor(at), **query))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: wait(channels="news"))
        await until(lambda: at.node.polls)
        await send(at, "user", "bob")
        await send(at, "channel", "sports")
        sent = await send(at, "channel", "news", "hit")
    assert [update["event"] for update in answers[0]["updates"]] == ["hit"]
    assert answers[0]["last_seen"] == sent["id"]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: wait(types="notification"))
        await until(lambda: at.node.polls)
        await put(at, "job", "ann")
        sent = await send(at, "broadcast", event="all")
    assert [update["event"] for update in answers[1]["updates"]] == ["all"]
    # Both kinds in log order; by default none of these.
    both = await poll(
        at, headers=bearer("ann"), types="status_update,notification", last_seen=f"{at.node.broker.epoch}:0"
    )
    assert [update["type"] for update in both["updates"]] == ["status_update", "notification"]
    plain = await poll(at, headers=bearer("ann"), last_seen=f"{at.node.broker.epoch}:0")
    assert [update["type"] for update in plain["updates"]] == ["status_update"]


async def test_one_entry_for_several_targets_comes_once_and_between_updates_in_order(at: InProcess) -> None:
    async with session(at, token=token("ann")) as ws:
        await ws.subscribe(jobIds=["a"], channels=["x", "y"])
        await put(at, "a", "ann", progress=1)
        await send(at, "channels", ["x", "y", "z"])
        await put(at, "a", "ann", progress=2)
        await send(at, "users", ["ann", "bob"])
        got = await ws.messages(4)
        assert [message["type"] for message in got] == ["status_update", "notification"] * 2
        offsets = [offset_of(message["id"]) for message in got]
        assert offsets == sorted(set(offsets))
        await ws.quiet()


async def test_a_burst_of_both_kinds_comes_in_log_order_to_every_reader(at: InProcess) -> None:
    async with (
        session(at, token=token("ann")) as plain,
        session(at, token=token("ann")) as filtered,
        session(at, token=token("ann")) as silent,
    ):
        await plain.subscribe()
        await filtered.subscribe(types="job_completed", fields="progress")
        notice, _ = decode_notice(b'{"target":"user","targetId":"ann","event":"e","data":1}')
        for number in range(200):
            fields = decode_fields(json.dumps({"userId": "ann", "progress": number / 4}).encode())
            at.node.broker.submit([Publish("a", fields, "may", "ann"), Notify(notice, "app")])
        await put(at, "a", "ann", status="completed")
        got = await plain.updates("a", 201)
        assert len(got) == 401
        assert [message["type"] for message in got] == ["status_update", "notification"] * 200 + ["job_completed"]
        got = await filtered.updates("a", 201)
        assert [message["type"] for message in got] == ["notification"] * 200 + ["job_completed"]
        heard: list[str] = []
        while len(heard) < 200:
            if (message := await silent.receive())["type"] != "heartbeat":
                heard.append(message["event"])
        assert set(heard) == {"e"}
        await silent.quiet()


async def test_job_streams_and_histories_have_no_notifications(at: InProcess) -> None:
    await put(at, "a", "ann", progress=1)
    await send(at, "broadcast")
    async with event_stream(at, headers=ADMIN, last_seen=f"{at.node.broker.epoch}:0") as everything:
        assert (await everything.event()).type == "connected"
        assert (await everything.event()).data["jobId"] == "a"
        await send(at, "broadcast")
        await put(at, "a", "ann", progress=2)
        assert (await everything.event()).data["progress"] == 2
    history = (await at.get("/api/v2/jobs/a/history", ADMIN)).json
    assert [update["type"] for update in history["updates"]] == ["status_update"] * 2
    assert len((await at.get("/api/v2/jobs", ADMIN)).json["jobs"]) == 1
    refused = await at.get("/api/v2/jobs/stream?types=notification", ADMIN)
    assert (refused.status, refused.error) == (400, "invalid_parameter")
