"""Notifications over the real server: every target on every way of reading, stored ones, permissions, bounds."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any
from urllib.parse import urlencode

import pytest
import trio

from protocol.fields import decode_fields
from protocol.notice import decode_notice
from server.brokers.base import Accepted, Notify, Publish
from tests.streams import (
    SseEvent,
    Stream,
    WebSocket,
    clean_server,
    cursor,
    event_stream,
    lose_log,
    narrow,
    offset_of,
    parse_events,
    poll,
    session,
    stream_at,
    websocket,
)
from tests.support import ADMIN, AUTH, Address, Answer, Headers, InProcess, bearer, server, spawned, token, until

SENDER = bearer("app", capabilities=["notify"])


@pytest.fixture
async def at(store_url: str) -> AsyncIterator[InProcess]:
    async with clean_server(auth=AUTH, store={"url": store_url}) as running:
        yield running


async def put(to: InProcess, job_id: str, user: str = "ann", **fields: object) -> None:
    """Publish one update, past HTTP, and wait until it is shown."""
    data = decode_fields(json.dumps({"userId": user} | fields).encode())
    submission = to.node.broker.submit([Publish(job_id, data, "may", user)])
    await submission.wait_kept()
    assert isinstance(submission.results[0], Accepted), submission.results


async def send(
    to: Address, target: str, name: Any = None, event: str = "note", headers: Headers = SENDER, **more: Any
) -> dict[str, Any]:
    """Send a notification, which must be taken."""
    answer = await post(to, target, name, event, headers, **more)
    assert answer.status == 200, answer
    body = answer.json
    assert isinstance(body, dict)
    return body


async def post(
    to: Address, target: str, name: Any = None, event: str = "note", headers: Headers = SENDER, **more: Any
) -> Answer:
    message: dict[str, Any] = {"target": target, "event": event, "data": {"n": 1}} | more
    if name is not None:
        message["targetIds" if isinstance(name, list) else "targetId"] = name
    return await to.post("/api/sse/message", message, headers)


@asynccontextmanager
async def notified(to: Address, headers: Headers = (), **query: object) -> AsyncIterator[tuple[Stream, SseEvent]]:
    """A stream of notifications and its first event."""
    async with stream_at(to, f"/api/sse?{urlencode(query, safe=',:')}", headers=headers) as stream:
        assert stream.status == 200, (stream.status, await stream.http.rest())
        hello = await stream.event()
        assert hello.name == "connected", hello
        yield stream, hello


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
        got = [await ws.receive() for _ in range(4)]
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
        assert {(await silent.receive())["event"] for _ in range(200)} == {"e"}
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


# Channels


async def test_channels_are_joined_and_left_on_a_live_connection(at: InProcess) -> None:
    async with session(at, token=token("ann")) as ws:
        await send(at, "channel", "news")
        await ws.subscribe(channels=["news"], ref="r")
        first = await send(at, "channel", "news")
        assert (await ws.receive())["id"] == first["id"]
        left = await ws.ask("unsubscribe", channels=["news"], ref="u")
        assert (left["type"], left["channels"], left["ref"]) == ("unsubscribed", ["news"], "u")
        assert (await send(at, "channel", "news"))["delivered"] == 0
        await ws.quiet()
        assert at.node.presence.channels == {}


async def test_joining_with_a_cursor_replays_what_was_missed_and_nothing_twice(at: InProcess) -> None:
    start = cursor(at)
    ids = [
        (await send(at, "channel", "a"))["id"],
        (await send(at, "channels", ["a", "b"]))["id"],
        (await send(at, "channel", "b"))["id"],
        (await send(at, "user", "ann"))["id"],
        (await send(at, "channel", "c"))["id"],
    ]
    async with session(at, token=token("ann")) as ws:
        await ws.subscribe(channels=["a"], last_seen=start)
        assert [(await ws.receive())["id"] for _ in range(3)] == [ids[0], ids[1], ids[3]]
        await ws.subscribe(channels=["b"], last_seen=start)
        assert (await ws.receive())["id"] == ids[2]
        await ws.subscribe(channels=["a", "b"], last_seen=start)
        await ws.subscribe(channels=["c"])
        live = await send(at, "channels", ["a", "b", "c"])
        assert (await ws.receive())["id"] == live["id"]
        await ws.subscribe(channels=["c"], last_seen=start)
        assert (await ws.receive())["id"] == ids[4]
        await ws.quiet()


async def test_a_cursor_without_channels_replays_what_was_for_the_user(at: InProcess) -> None:
    start = cursor(at)
    await put(at, "a", "ann", progress=1)
    first = await send(at, "user", "ann")
    await put(at, "a", "ann", progress=2)
    await send(at, "user", "bob")
    async with session(at, token=token("ann")) as ws:
        live = await send(at, "broadcast")
        assert (await ws.receive())["id"] == live["id"]
        answer = await ws.subscribe(jobIds=["a"], last_seen=start)
        assert answer["recovered"] is True
        assert answer["id"] == start
        got = [await ws.receive() for _ in range(3)]
        assert [message["type"] for message in got] == ["status_update", "notification", "status_update"]
        assert got[1]["id"] == first["id"]
        await ws.quiet()


async def test_unsubscribing_from_everything_leaves_the_channels_and_not_what_is_for_the_user(at: InProcess) -> None:
    async with session(at, token=token("ann")) as ws:
        await ws.subscribe(channels=["a", "b"])
        await ws.ask("unsubscribe")
        assert (await send(at, "channels", ["a", "b"]))["delivered"] == 0
        sent = await send(at, "user", "ann")
        assert (await ws.receive())["id"] == sent["id"]


async def test_channels_are_bounded(at: InProcess) -> None:
    names = [f"c{number}" for number in range(1001)]
    async with session(at, token=token("ann")) as ws:
        answer = await ws.subscribe(channels=[*names, "not ok", "c0"])
        assert len(answer["channels"]) == 1000
        assert answer["denied"] == ["c1000", "not ok"] or answer["denied"] == ["not ok", "c1000"]
    refused = await at.get(f"/api/sse?channels={','.join(names)}", bearer("ann"))
    assert (refused.status, refused.json["error"]["field"]) == (400, "channels")


# Permissions


async def test_channels_by_claim_and_by_default(tmp_path: Path) -> None:
    auth = AUTH | {"default_channels": ["public-*"]}
    async with clean_server(auth=auth) as at:
        cases = [
            (bearer("ann", channels=["team-*"]), "team-1", 200),
            (bearer("ann", channels=["team-*"]), "public-1", 403),
            (bearer("ann", channels=["*"]), "secret", 200),
            (bearer("ann", channels=[]), "public-1", 403),
            (bearer("ann"), "public-1", 200),
            (bearer("ann"), "team-1", 403),
            (ADMIN, "secret", 200),
            (bearer("ann", channels=["team-*"]), "presence:team-1", 200),
            (bearer("ann", channels=["team-*"]), "presence:secret", 403),
            (bearer("ann", channels=["team-*"]), "presence:user:ann", 200),
            (bearer("ann", channels=["*"]), "presence:user:bob", 403),
            (bearer("ann", capabilities=["ops"]), "presence:user:bob", 200),
            (bearer("ann", channels=["*"]), "presence:presence:user:bob", 403),
            (bearer("ann", channels=["team-*"]), "presence:presence:team-1", 200),
        ]
        for headers, channel, status in cases:
            async with stream_at(at, f"/api/sse?channels={channel}", headers=headers) as stream:
                assert stream.status == status, (channel, headers)
            answer = await at.get(f"/api/v2/jobs/poll?timeout=0&channels={channel}", headers)
            assert answer.status == status, (channel, headers)
            async with session(at, headers=headers) as ws:
                joined = await ws.subscribe(channels=[channel])
                assert (joined["channels"], joined["denied"]) == (([channel], []) if status == 200 else ([], [channel]))


async def test_a_renewed_token_that_allows_less_leaves_channels(at: InProcess) -> None:
    async with session(at, token=token("ann", channels=["a", "b"])) as ws:
        await ws.subscribe(channels=["a", "b"])
        await ws.ask("auth", token=token("ann", channels=["b"]))
        assert (await send(at, "channel", "a"))["delivered"] == 0
        assert (await send(at, "channel", "b"))["delivered"] == 1
        await ws.receive()
        await ws.quiet()


async def test_who_may_do_what(at: InProcess) -> None:
    async with notified(at, bearer("ann")) as (_, hello):
        client = f"/api/sse/clients/{hello.data['clientId']}"
        ann, bob, ops = bearer("ann"), bearer("bob"), bearer("op", capabilities=["ops"])
        message = {"target": "broadcast", "event": "e", "data": None}
        cases: list[tuple[str, str, object, Any, int]] = [
            ("POST", "/api/sse/message", message, ann, 403),
            ("POST", "/api/sse/message", message, ops, 403),
            ("POST", "/api/sse/message", message, {}, 401),
            ("POST", "/api/sse/message", message, SENDER, 200),
            ("POST", "/api/sse/message", message, ADMIN, 200),
            ("GET", "/api/sse/connections", None, ann, 403),
            ("GET", "/api/sse/connections", None, ops, 200),
            ("GET", "/api/sse/users/ann", None, ann, 200),
            ("GET", "/api/sse/users/ann", None, bob, 403),
            ("GET", "/api/sse/users/ann", None, ops, 200),
            ("GET", client, None, ann, 200),
            ("GET", client, None, ops, 200),
            ("DELETE", client, None, ann, 403),
            ("DELETE", "/api/sse/users/ann", None, ann, 403),
            ("GET", "/api/sse/users/a%20b", None, ops, 400),
            ("PUT", "/api/sse/message", message, ADMIN, 405),
            ("HEAD", "/api/sse", None, ann, 405),
        ]
        for method, path, body, headers, status in cases:
            async with at.connect() as http:
                answer = await http.request(method, path, body=body, headers=headers)
            assert answer.status == status, (method, path, headers)
        foreign = (await at.get(client, bob)).json
        assert foreign == {"clientId": hello.data["clientId"], "connected": False}
    for query, status in (("userId=bob", 403), ("userId=ann", 200), ("userId=a%20b", 400), ("username=%0A", 400)):
        async with stream_at(at, f"/api/sse?{query}", headers=bearer("ann")) as stream:
            assert stream.status == status, query
    async with stream_at(at, "/api/sse") as stream:
        assert stream.status == 401


async def test_an_admin_may_be_notified_for_another_user(at: InProcess) -> None:
    async with notified(at, ADMIN, userId="bob") as (stream, hello):
        assert hello.data["userId"] == "bob"
        sent = await send(at, "user", "bob")
        assert (await stream.event()).id == sent["id"]


async def test_in_open_mode_anyone_says_who_they_are() -> None:
    async with clean_server() as at, notified(at, userId="ann", username="Ann") as (stream, hello):
        assert hello.data["userId"] == "ann"
        assert (await send(at, "user", "ann", headers=()))["delivered"] == 1
        assert (await stream.event()).name == "note"
        user = (await at.get("/api/sse/users/ann")).json
        assert user == {"userId": "ann", "online": True, "connections": 1}
        await send(at, "user", "ann", headers=(), store=True)
        assert (await at.post("/api/sse/ack?userId=ann", {"id": cursor(at)}, ())).status == 204
        assert at.node.broker.inboxes.places == 0
        assert (await poll(at, userId="ann", channels="", last_seen=f"{at.node.broker.epoch}:0"))["updates"]


# Who is there


async def test_who_is_connected_and_ending_connections(at: InProcess) -> None:
    async with (
        notified(at, bearer("ann"), username="Ann", channels="news") as (stream, hello),
        session(at, token=token("ann")) as ws,
        event_stream(at, headers=bearer("bob")) as jobs,
    ):
        await jobs.event()
        listed = (await at.get("/api/sse/connections", ADMIN)).json
        assert listed["total"] == 2
        assert listed["next"] is None
        shown = {entry["clientId"]: entry for entry in listed["connections"]}
        assert len(shown) == 3
        mine = shown[hello.data["clientId"]]
        assert mine == {
            "clientId": hello.data["clientId"],
            "userId": "ann",
            "username": "Ann",
            "transport": "sse",
            "address": "127.0.0.1",
            "connectedAt": mine["connectedAt"],
            "notifications": True,
            "channels": ["news"],
        }
        page = (await at.get("/api/sse/connections?limit=1", ADMIN)).json
        assert len(page["connections"]) == 1
        rest = (await at.get(f"/api/sse/connections?after={page['next']}", ADMIN)).json
        assert {entry["clientId"] for entry in page["connections"] + rest["connections"]} == set(shown)
        user = (await at.get("/api/sse/users/ann", bearer("ann"))).json
        assert user == {"userId": "ann", "online": True, "connections": 2}

        client = f"/api/sse/clients/{hello.data['clientId']}"
        assert (await at.get(client, bearer("ann"))).json == mine | {"connected": True}
        assert (await at.ask("DELETE", client, headers=ADMIN)).status == 204
        event = await stream.event()
        assert (event.name, event.data["code"]) == ("error", "disconnected")
        assert await stream.rest() == []
        await until(lambda: hello.data["clientId"] not in at.node.presence.clients)
        assert (await at.get(client, bearer("ann"))).json == {"clientId": hello.data["clientId"], "connected": False}
        gone = await at.ask("DELETE", client, headers=ADMIN)
        assert (gone.status, gone.error) == (404, "client_not_found")

        assert (await at.ask("DELETE", "/api/sse/users/ann", headers=ADMIN)).json == {"disconnected": 1}
        assert (await ws.closed()).code == 1008
        assert (await at.get("/api/sse/users/ann", ADMIN)).json["online"] is False


# Stored notifications


async def test_a_stored_one_waits_for_its_user_and_comes_until_it_is_acknowledged(at: InProcess) -> None:
    assert (await send(at, "user", "ann", "first", store=True))["delivered"] == 0
    await send(at, "user", "ann", "not stored")
    second = await send(at, "users", ["ann", "bob"], "second", store=True)
    async with notified(at, bearer("ann")) as (stream, hello):
        assert hello.id is None  # no cursor runs ahead of what is still to come
        got = [await stream.event(), await stream.event()]
        assert [event.name for event in got] == ["first", "second"]
        assert got[1].id == cursor(at)
    async with websocket(at, token=token("ann")) as ws:
        hello_ws = await ws.receive()
        messages = [await ws.receive(), await ws.receive()]
        assert [message["event"] for message in messages] == ["first", "second"]
        assert messages[1]["id"] == second["id"]
        before = offset_of(messages[0]["id"]) - 1
        assert hello_ws["id"] == f"{at.node.broker.epoch}:{before}"
        await ws.send("ack", id=messages[0]["id"])
        await ws.quiet()
    async with notified(at, bearer("ann")) as (stream, _):
        assert (await stream.event()).name == "second"
    polled = await poll(at, headers=bearer("ann"), channels="")
    assert [update["event"] for update in polled["updates"]] == ["second"]
    # A cursor at or beyond it acknowledges. That may have an entry of its own in the log, which comes when it comes.
    async with notified(at, bearer("ann") | {"Last-Event-ID": second["id"]}) as (_, hello):
        assert offset_of(second["id"]) <= offset_of(hello.id) <= offset_of(cursor(at))
    await until(lambda: not at.node.broker.inboxes.of_user("ann"))
    async with notified(at, bearer("ann")) as (_, hello):
        assert offset_of(second["id"]) <= offset_of(hello.id) <= offset_of(cursor(at))
    assert [notice.kind for notice in at.node.broker.inboxes.of_user("bob")] == ["second"]


async def test_acknowledging_over_http_and_by_polling(at: InProcess) -> None:
    first = await send(at, "user", "ann", store=True)
    second = await send(at, "user", "ann", store=True)
    assert (await at.post("/api/sse/ack", {"id": first["id"]}, bearer("bob"))).status == 204
    assert (await at.post("/api/sse/ack", {"id": first["id"]}, bearer("ann"))).status == 204
    assert len(at.node.broker.inboxes.of_user("ann")) == 1
    other = await at.post("/api/sse/ack?userId=ann", {"id": second["id"]}, bearer("bob"))
    assert (other.status, other.json["error"]["field"]) == (403, "userId")
    for bad in ("", "x", "abc:1", 5):
        refused = await at.post("/api/sse/ack", {"id": bad}, bearer("ann"))
        assert (refused.status, refused.json["error"]["field"]) == (422, "id")
    polled = await poll(at, headers=bearer("ann"), types="notification")
    assert [update["id"] for update in polled["updates"]] == [second["id"]]
    again = await poll(at, headers=bearer("ann"), types="notification", last_seen=polled["last_seen"])
    assert again["updates"] == []
    await until(lambda: at.node.broker.inboxes.places == 0)


async def test_a_stored_one_comes_to_who_is_there_at_once_and_again_until_acknowledged(at: InProcess) -> None:
    async with session(at, token=token("ann")) as ws:
        sent = await send(at, "user", "ann", store=True)
        assert sent["delivered"] == 1
        assert (await ws.receive())["id"] == sent["id"]
        await ws.quiet()
    async with session(at, token=token("ann")) as ws:
        assert (await ws.receive())["id"] == sent["id"]
        await ws.subscribe(last_seen=sent["id"])  # never twice on one connection
        await ws.quiet()
    async with session(at, token=token("ann")) as ws:
        await ws.quiet()


async def test_a_cursor_replays_and_what_was_stored_comes_once_with_it(at: InProcess) -> None:
    start = cursor(at)
    stored = await send(at, "user", "ann", "stored", store=True)
    await send(at, "user", "ann", "passing")
    async with notified(at, bearer("ann"), last_seen=start) as (stream, hello):
        assert hello.id == start
        assert [(await stream.event()).name for _ in range(2)] == ["stored", "passing"]
    async with session(at, token=token("ann")) as ws:
        assert (await ws.receive())["event"] == "stored"
        await ws.subscribe(jobIds=[], last_seen=start)
        assert (await ws.receive())["event"] == "passing"
        await ws.quiet()
    assert stored["id"]


async def test_a_lost_cursor_is_told_and_stored_ones_come(at: InProcess) -> None:
    await send(at, "user", "ann", "passing")
    await send(at, "user", "ann", "stored", store=True)
    async with notified(at, bearer("ann"), last_seen="abc:7") as (stream, hello):
        assert hello.id == "abc:7"
        reset = await stream.event()
        assert (reset.name, reset.id) == ("reset", None)
        event = await stream.event()
        assert (event.name, event.id) == ("stored", cursor(at))


async def test_a_lost_log_resets_live_readers(at: InProcess) -> None:
    async with notified(at, bearer("ann")) as (stream, _), session(at, token=token("ann")) as ws:
        await ws.subscribe(channels=["c"])
        lose_log(at, at.node.history.last)
        reset = await stream.event()
        assert (reset.name, reset.id) == ("reset", cursor(at))
        assert (await ws.receive())["type"] == "reset"
        await ws.quiet()


async def test_stored_ones_survive_a_restart(tmp_path: Path) -> None:
    store = {"url": f"sqlite:{tmp_path / 'test.db'}"}
    async with clean_server(auth=AUTH, store=store) as at:
        first = await send(at, "user", "ann", "first", store=True)
        await send(at, "users", ["ann", "bob"], "second", store=True)
        third = await send(at, "channel", "news", "third")
        await at.post("/api/sse/ack", {"id": first["id"]}, bearer("ann"))
        ends = cursor(at)
    async with clean_server(auth=AUTH, store=store) as at:
        assert cursor(at) == ends
        async with notified(at, bearer("ann")) as (stream, _):
            event = await stream.event()
            assert (event.name, event.data["data"]) == ("second", {"n": 1})
        # The log itself replays, too.
        async with notified(at, bearer("carl"), channels="news", last_seen=first["id"]) as (stream, _):
            event = await stream.event()
            assert (event.name, event.id) == ("third", third["id"])
        for user in ("ann", "bob"):
            assert (await at.post("/api/sse/ack", {"id": ends}, bearer(user))).status == 204
    async with clean_server(auth=AUTH, store=store) as at:
        assert at.node.broker.inboxes.places == 0


# Sending


async def test_sending_over_websocket(at: InProcess) -> None:
    async with (
        session(at, token=token("app", capabilities=["notify"])) as ws,
        session(at, token=token("ann")) as ann,
    ):
        answer = await ws.ask("notification", target="user", targetId="ann", event="e", data=[1], ref=7)
        assert answer == {
            "type": "published",
            "accepted": 1,
            "duplicates": 0,
            "rejected": [],
            "delivered": 1,
            "id": cursor(at),
            "ref": 7,
        }
        assert (await ann.receive())["data"] == [1]
        refused = await ann.ask("notification", target="user", targetId="app", event="e", data=1, ref=8)
        assert (refused["code"], refused["ref"]) == ("forbidden", 8)
        wrong = await ws.ask("notification", target="user", event="e", data=1, ref=9)
        assert (wrong["code"], wrong["field"], wrong["ref"]) == ("invalid_field", "targetId", 9)


async def test_an_idempotency_key_sends_once(at: InProcess) -> None:
    key = {**SENDER, "Idempotency-Key": "k"}
    async with session(at, token=token("ann")) as ws:
        first = await send(at, "user", "ann", headers=key)
        again = await send(at, "user", "ann", headers=key)
        assert again == {"delivered": 1, "id": first["id"], "duplicate": True}
        other = await post(at, "user", "ann", "another", headers=key)
        assert (other.status, other.error) == (422, "idempotency_key_reused")
        assert (await ws.receive())["id"] == first["id"]
        in_body = await send(at, "user", "ann", eventId="e-1")
        assert (await send(at, "user", "ann", eventId="e-1"))["duplicate"] is True
        assert (await ws.receive())["id"] == in_body["id"]
        await ws.quiet()


@pytest.mark.parametrize(
    ("message", "field"),
    [
        ({}, "target"),
        ({"target": "everyone"}, "target"),
        ({"target": "user"}, "targetId"),
        ({"target": "user", "targetIds": ["a"]}, "targetIds"),
        ({"target": "users", "targetId": "a"}, "targetId"),
        ({"target": "users", "targetIds": []}, "targetIds"),
        ({"target": "users", "targetIds": ["a", "b c"]}, "targetIds"),
        ({"target": "users", "targetIds": [f"u{n}" for n in range(1001)]}, "targetIds"),
        ({"target": "users", "targetIds": "a"}, "targetIds"),
        ({"target": "channel", "targetId": "presence:x"}, "targetId"),
        ({"target": "channel", "targetId": "a/b"}, "targetId"),
        ({"target": "broadcast", "targetId": "a"}, "targetId"),
        ({"target": "broadcast", "targetIds": ["a"]}, "targetIds"),
        ({"target": "broadcast", "event": ""}, "event"),
        ({"target": "broadcast", "event": "a\nb"}, "event"),
        ({"target": "broadcast", "event": "x" * 129}, "event"),
        ({"target": "broadcast", "event": "connected"}, "event"),
        ({"target": "broadcast", "event": 5}, "event"),
        ({"target": "broadcast", "data": "x" * 65536}, "data"),
        ({"target": "broadcast", "metadata": []}, "metadata"),
        ({"target": "broadcast", "metadata": {"x": "y" * 65536}}, "data"),
        ({"target": "broadcast", "store": True}, "store"),
        ({"target": "channel", "targetId": "a", "store": True}, "store"),
        ({"target": "broadcast", "store": 1}, "store"),
        ({"target": "broadcast", "sotre": True}, "sotre"),
        ({"target": "broadcast", "eventId": ""}, "eventId"),
    ],
    ids=repr,
)
async def test_bad_ones_are_refused_with_the_field_and_change_nothing(message: dict[str, Any], field: str) -> None:
    async with server() as at:
        given = {"event": "e", "data": 1} | message if message else {"event": "e", "data": 1}
        refused = await at.post("/api/sse/message", given)
        assert (refused.status, refused.error, refused.json["error"]["field"]) == (422, "invalid_field", field)
        assert at.node.history.last == 0


async def test_what_is_no_notification_at_all() -> None:
    async with server() as at:
        for body, status in (
            (b"{", 400),
            (b"[]", 422),
            (b'"x"', 422),
            (b'{"data":' + b"[" * 5000, 400),
            (b" " * 300_000, 413),
        ):
            answer = await at.ask("POST", "/api/sse/message", body, {"Content-Type": "application/json"})
            assert answer.status == status, body[:10]
        deep = json.loads("[" * 65 + "]" * 65)
        answer = await at.post("/api/sse/message", {"target": "broadcast", "event": "e", "data": deep})
        assert (answer.status, answer.json["error"]["field"]) == (422, "data")
        answer = await at.ask("POST", "/api/sse/message", b"{}", {"Content-Type": "text/plain"})
        assert answer.status == 415
        assert (await at.post("/api/sse/message", {"target": "broadcast", "event": "e"})).json["error"][
            "field"
        ] == "data"


async def test_sending_is_limited_like_publishing() -> None:
    async with clean_server(limits={"publishes_per_second": 1}) as at:
        await send(at, "broadcast", headers=())
        refused = await post(at, "broadcast", headers=())
        assert (refused.status, refused.error) == (429, "rate_limited")


# Going away, and too slow


async def test_draining_ends_the_stream_with_a_way_back(at: InProcess) -> None:
    async with notified(at, bearer("ann")) as (stream, _):
        at.node.start_drain()
        await at.node.drain_streams(0)
        event = await stream.event()
        assert (event.name, event.data["code"], event.id) == ("error", "try_later", cursor(at))
        assert event.retry is not None
        assert await stream.rest() == []
        turned_away = await at.get("/api/sse", {"Accept": "text/event-stream"} | bearer("ann"))
        assert turned_away.status == 200
        (away,) = parse_events(turned_away.body)
        assert (away.name, away.data["code"], away.id) == ("error", "try_later", None)
        assert away.retry is not None


async def test_a_token_that_expires_ends_the_stream(at: InProcess) -> None:

    async with notified(at, bearer("ann", exp=time.time() + 0.3)) as (stream, _):
        event = await stream.event()
        assert (event.name, event.data["code"]) == ("error", "token_expired")
        assert await stream.rest() == []


async def test_connections_per_user_count_these_as_well() -> None:
    async with clean_server(limits={"connections_per_user": 1}) as at, notified(at, userId="ann"):
        refused = await at.get("/api/sse?userId=ann")
        assert (refused.status, refused.error) == (429, "rate_limited")
        async with notified(at, userId="bob"):
            pass


async def test_a_slow_reader_loses_none_of_them_and_is_closed_past_the_bound() -> None:
    async with clean_server(limits={"backlog": 200_000}) as at:
        async with session(at, receive_buffer=1024) as ws:
            narrow(at)
            sent = 0
            while at.node.streams and sent < 2000:
                await send(at, "broadcast", headers=(), data="x" * 8000)
                await put(at, "a", "ann", progress=sent % 100)
                sent += 1
            closed = await ws.closed()
            assert closed.code == 1013
            ids = [offset_of(message["id"]) for message in ws.left]
            assert ids == sorted(ids)
            last = ws.left[-1]["id"]
        # It resumes from its cursor, without a hole.
        async with notified(at, last_seen=last) as (stream, _):
            expected = at.node.history.notices(offset_of(last))
            got = [await stream.event() for _ in expected]
            assert [event.id for event in got][:-1] == [
                f"{at.node.broker.epoch}:{notice.offset}" for notice in expected
            ][:-1]


async def test_a_slow_reader_that_catches_up_has_all_of_them_and_the_newest_of_a_job() -> None:
    async with clean_server(limits={"backlog": 2_000_000}) as at, session(at, receive_buffer=1024) as ws:
        await ws.subscribe()
        narrow(at)
        for number in range(100):
            await send(at, "broadcast", event=f"e{number}", headers=(), data="x" * 10_000)
            await put(at, "a", "ann", progress=number / 2, message="y" * 2000)
        await put(at, "a", "ann", status="completed")
        got = await ws.updates("a", 101)
        names = [message["event"] for message in got if message["type"] == "notification"]
        assert names == [f"e{number}" for number in range(100)]


# Whatever comes in whatever order


class Model:
    """What one WebSocket of a user is owed: every notification for it, once, in the order of the log at each step."""

    def __init__(self, ws: WebSocket, hello: dict[str, Any]) -> None:
        self.ws = ws
        self.client = hello["clientId"]
        self.channels: set[str] = set()
        self.given: set[int] = set()

    def hears(self, targets: set[str], channels: set[str]) -> bool:
        names = {"broadcast", "user/ann", f"client/{self.client}", *(f"channel/{name}" for name in channels)}
        return not names.isdisjoint(targets)

    async def gets(self, offsets: list[int]) -> None:
        """These come next and nothing else."""
        got = [offset_of((await self.ws.receive())["id"]) for _ in offsets]
        assert got == offsets
        assert self.given.isdisjoint(offsets)
        self.given.update(offsets)


@pytest.mark.parametrize("seed", range(8))
async def test_any_interleaving_gives_each_connection_each_notification_once(seed: int) -> None:
    random = Random(seed)
    async with clean_server(auth=AUTH) as at, AsyncExitStack() as stack:
        log: dict[int, set[str]] = {}
        stored: dict[int, None] = {}  # and not acknowledged
        open_: list[Model] = []

        def acknowledge(offset: int) -> None:
            for kept in [kept for kept in stored if kept <= offset]:
                del stored[kept]

        for _ in range(80):
            step = random.choice(["send", "send", "send", "connect", "subscribe", "subscribe", "ack", "job"])
            end = at.node.history.last
            if step == "connect" and len(open_) < 4:
                ws = await stack.enter_async_context(websocket(at, token=token("ann")))
                model = Model(ws, await ws.receive())
                await model.gets(list(stored))
                open_.append(model)
            elif step == "send":
                kind = random.choice(["user", "users", "channel", "channels", "broadcast", "client"])
                names = random.sample("abc", random.randint(1, 3))
                if kind == "client":
                    names = [random.choice(open_).client if open_ else "nobody"]
                elif kind.startswith("user"):
                    names = ["ann", "bob"] if kind == "users" else ["ann"]
                store = kind.startswith("user") and random.random() < 0.5
                name: Any = None if kind == "broadcast" else names if kind.endswith("s") else names[0]
                sent = await send(at, kind, name, store=store)
                offset = offset_of(sent["id"])
                assert offset == end + 1
                singular = kind.removesuffix("s")
                listed = names if kind.endswith("s") else names[:1]
                log[offset] = {"broadcast"} if kind == "broadcast" else {f"{singular}/{one}" for one in listed}
                if store:
                    stored[offset] = None
                reached = [model for model in open_ if model.hears(log[offset], model.channels)]
                assert sent["delivered"] == len(reached)
                for model in reached:
                    await model.gets([offset])
            elif step == "subscribe" and open_:
                model = random.choice(open_)
                channels = set(random.sample("abc", random.randint(0, 3)))
                cursor_at = random.randint(0, end) if random.random() < 0.6 else None
                more = {} if cursor_at is None else {"last_seen": f"{at.node.history.epoch}:{cursor_at}"}
                answer = await model.ws.subscribe(jobIds=[], channels=sorted(channels), **more)
                assert answer["channels"] == sorted(channels)
                if cursor_at is not None:
                    acknowledge(cursor_at)
                    missed = [
                        offset
                        for offset, targets in log.items()
                        if offset > cursor_at and offset not in model.given and model.hears(targets, channels)
                    ]
                    await model.gets(missed)
                model.channels |= channels
            elif step == "ack" and open_ and log:
                acked = random.choice(list(log))
                await random.choice(open_).ws.send("ack", id=f"{at.node.history.epoch}:{acked}")
                acknowledge(acked)
            elif step == "job":
                await put(at, "job", "ann", progress=random.random())
            for model in open_:
                await model.ws.quiet()
            assert [notice.offset for notice in at.node.broker.inboxes.of_user("ann")] == list(stored)


async def test_what_was_answered_is_there_after_a_sudden_death(tmp_path: Path) -> None:
    async with spawned(tmp_path) as at:
        sent = await send(at, "user", "ann", "kept", headers=(), store=True)
        at.signal(signal.SIGKILL)
        await at.exit_status()
    async with spawned(tmp_path) as at:
        async with notified(at, userId="ann") as (stream, _):
            assert (await stream.event()).name == "kept"
        async with notified(at, userId="bob", last_seen=sent["id"]) as (_, hello):
            assert hello.id == sent["id"]  # the log goes on under its name
        assert (await at.post("/api/sse/ack?userId=ann", {"id": sent["id"]})).status == 204
        at.signal(signal.SIGKILL)
        await at.exit_status()
    async with spawned(tmp_path) as at, notified(at, userId="ann") as (_, hello):
        assert hello.id == sent["id"]
