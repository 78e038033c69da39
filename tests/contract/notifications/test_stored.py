"""Stored notifications: they wait for their user, come until they are acknowledged, and outlast the server."""

from __future__ import annotations

import signal
from pathlib import Path

from tests.notifying import notified, send
from tests.streams import clean_server, cursor, lose_log, offset_of, poll, session, websocket
from tests.support import AUTH, InProcess, bearer, spawned, token, until


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
