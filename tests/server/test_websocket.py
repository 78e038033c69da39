"""The WebSocket over real sockets: every message a client may send, every way a connection may end."""

from __future__ import annotations

import json
import re
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import trio
import trio_websocket
from trio.testing import wait_all_tasks_blocked
from wsproto.events import BytesMessage, CloseConnection, Ping, TextMessage
from wsproto.frame_protocol import FrameProtocol, Opcode

from protocol.frames import close_frame
from protocol.messages import ClientMessage, Get, Subscribe, Unsubscribe
from server.app import drain
from server.transports import websocket as transport
from tests.streams import (
    NO_PATIENCE,
    WebSocket,
    clean_server,
    cursor,
    handshake_bytes,
    lose_log,
    narrow,
    put,
    remove,
    reset_connection,
    session,
    traces,
    versions,
    websocket,
)
from tests.support import AUTH, InProcess, in_seconds, token, until

FEW = {"fields": ["progress"]}


@pytest.fixture
async def server() -> AsyncIterator[InProcess]:
    async with clean_server() as running:
        yield running


@pytest.fixture
async def guarded() -> AsyncIterator[InProcess]:
    async with clean_server(auth=AUTH) as running:
        yield running


def seen(messages: list[dict[str, Any]]) -> list[tuple[str, int]]:
    return [(message["jobId"], message["version"]) for message in messages]


async def received(ws: WebSocket, count: int) -> list[dict[str, Any]]:
    return [await ws.receive() for _ in range(count)]


# Subscribing


async def test_connected_says_who_where_and_how_often(guarded: InProcess) -> None:
    put(guarded, "a")
    async with websocket(guarded, token=token("alice"), headers={"X-Request-Id": "my-id"}) as ws:
        hello = await ws.receive()
        assert hello.pop("clientId") != "my-id"  # clients must not be able to take each other's name
        assert hello == {
            "type": "connected", "userId": "alice", "heartbeat": 30, "id": cursor(guarded),
        }  # fmt: skip
        assert isinstance(hello["heartbeat"], int)


async def test_snapshot_then_every_update(server: InProcess) -> None:
    put(server, "a", status="processing")
    async with session(server) as ws:
        answer = await ws.subscribe(jobIds=["a", "b"], ref="r1")
        assert [job["jobId"] for job in answer.pop("snapshot")] == ["a"]
        assert answer == {
            "type": "subscribed", "ref": "r1", "jobIds": ["a", "b"], "denied": [], "id": cursor(server),
            "recovered": False,
        }  # fmt: skip
        put(server, "other")
        put(server, "a", progress=7)
        update = await ws.receive()
        assert update["type"] == "status_update"
        assert update["id"] == cursor(server)
        assert (update["jobId"], update["progress"], update["version"], update["userId"]) == ("a", 7, 2, "alice")
        put(server, "b", status="completed")
        remove(server, "b")
        assert [message["type"] for message in await received(ws, 2)] == ["job_completed", "job_deleted"]
        await ws.quiet()


async def test_every_ending_has_its_own_type(server: InProcess) -> None:
    async with session(server) as ws:
        await ws.subscribe(all=True)
        for status in ("completed", "failed", "cancelled", "processing"):
            put(server, status, status=status)
        types = [message["type"] for message in await received(ws, 4)]
        assert types == ["job_completed", "job_failed", "job_cancelled", "status_update"]


async def test_what_is_watched_without_names(guarded: InProcess) -> None:
    put(guarded, "mine")
    put(guarded, "theirs", user="bob")
    async with (
        session(guarded, token=token("alice")) as alice,
        session(guarded, token=token("root", admin=True)) as root,
        session(guarded, token=token("root", admin=True)) as narrowed,
    ):
        assert seen((await alice.subscribe())["snapshot"]) == [("mine", 1)]
        assert seen((await root.subscribe())["snapshot"]) == [("mine", 1), ("theirs", 1)]
        assert seen((await narrowed.subscribe(userId="bob"))["snapshot"]) == [("theirs", 1)]
        put(guarded, "theirs", user="bob")
        put(guarded, "mine")
        assert seen(await received(alice, 1)) == [("mine", 2)]
        assert seen(await received(root, 2)) == [("theirs", 2), ("mine", 2)]
        assert seen(await received(narrowed, 1)) == [("theirs", 2)]
        await narrowed.quiet()


async def test_foreign_and_unknown_ids_look_alike_and_stay_silent(guarded: InProcess) -> None:
    put(guarded, "theirs", user="bob")
    async with session(guarded, token=token("alice")) as ws:
        answer = await ws.subscribe(jobIds=["theirs", "unknown"])
        assert (answer["jobIds"], answer["denied"], answer["snapshot"]) == (["theirs", "unknown"], [], [])
        put(guarded, "theirs", user="bob", status="completed")
        put(guarded, "unknown", user="bob")
        await ws.quiet()
        remove(guarded, "unknown")
        put(guarded, "unknown", user="alice")
        assert seen([await ws.receive()]) == [("unknown", 1)]
        remove(guarded, "unknown")
        assert (await ws.receive())["type"] == "job_deleted"
        put(guarded, "unknown", user="bob")
        await ws.quiet()
        assert (await ws.ask("get", jobIds=["theirs", "unknown"]))["jobs"] == []


async def test_forbidden_questions(guarded: InProcess) -> None:
    async with session(guarded, token=token("alice")) as ws:
        for fields in ({"userId": "bob"}, {"all": True}, {"userId": "bob", "jobIds": ["x"]}):
            answer = await ws.ask("subscribe", ref=1, **fields)
            assert (answer["type"], answer["code"], answer["ref"]) == ("error", "forbidden", 1)
        assert (await ws.subscribe(userId="alice"))["snapshot"] == []


async def test_delegated_jobs(guarded: InProcess) -> None:
    put(guarded, "export-1", user="bob")
    async with session(guarded, token=token("alice", jobs=["export-*"])) as ws:
        answer = await ws.subscribe(jobIds=["export-1", "import-1"])
        assert seen(answer["snapshot"]) == [("export-1", 1)]
        put(guarded, "import-1", user="bob")
        put(guarded, "export-1", user="bob")
        assert seen([await ws.receive()]) == [("export-1", 2)]
        assert seen((await ws.ask("get", jobIds=["export-1", "import-1"]))["jobs"]) == [("export-1", 2)]


async def test_denied_lists_malformed_ids(server: InProcess) -> None:
    async with session(server) as ws:
        answer = await ws.subscribe(jobIds=["good", "a/b", "", "good", "x" * 129, "ä"])
        assert answer["jobIds"] == ["good"]
        assert answer["denied"] == ["a/b", "", "x" * 128, "ä"]


async def test_filters_and_fields(server: InProcess) -> None:
    put(server, "a", kind="export", status="processing")
    put(server, "b", kind="import", status="processing")
    async with session(server) as kinds, session(server) as types, session(server) as status, session(server) as fields:
        assert seen((await kinds.subscribe(kind="export,other"))["snapshot"]) == [("a", 1)]
        assert seen((await types.subscribe(types=["job_failed"]))["snapshot"]) == []
        assert seen((await status.subscribe(status=["failed", "stalled"]))["snapshot"]) == []
        (record,) = (await fields.subscribe(jobIds=["a"], fields=["kind", "progress"]))["snapshot"]
        assert record == {"jobId": "a", "kind": "export", "status": "processing", "progress": 0, "version": 1}
        put(server, "a", progress=1)
        put(server, "b", status="failed")
        assert seen([await kinds.receive()]) == [("a", 2)]
        assert seen([await types.receive()]) == [("b", 2)]
        assert seen([await status.receive()]) == [("b", 2)]
        assert set(await fields.receive()) == {"type", "id", "jobId", "kind", "status", "progress", "version"}
        for ws in (kinds, types, status, fields):
            await ws.quiet()


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"types": ["job_started"]}, "types"),
        ({"status": "done"}, "status"),
        ({"fields": ["secret"]}, "fields"),
        ({"minInterval": -1}, "minInterval"),
        ({"minInterval": 60_001}, "minInterval"),
        ({"minInterval": "1"}, "minInterval"),
        ({"userId": "a/b"}, "userId"),
        ({"jobIds": "a"}, "jobIds"),
        ({"jobIds": [1]}, "jobIds[0]"),
        ({"last_seen": 1.5}, "last_seen"),
        ({"unknown": 1}, "unknown"),
        ({"all": "yes"}, "all"),
    ],
)
async def test_a_bad_field_is_named_and_changes_nothing(server: InProcess, fields: dict[str, Any], field: str) -> None:
    put(server, "a")
    async with session(server) as ws:
        answer = await ws.ask("subscribe", ref="r", **fields)
        assert (answer["type"], answer["code"], answer["field"], answer["ref"]) == (
            "error",
            "invalid_field",
            field,
            "r",
        )
        assert field.partition("[")[0] in answer["message"]
        put(server, "a")
        await ws.quiet()
        assert not server.node.hub.channels


@pytest.mark.parametrize("ref", [0, -1, "", "text", 2**70, None])
async def test_the_ref_comes_back_as_it_was(server: InProcess, ref: object) -> None:
    async with session(server) as ws:
        fields = {} if ref is None else {"ref": ref}
        for answer in (
            await ws.subscribe(jobIds=["a"], **fields),
            await ws.ask("unsubscribe", **fields),
            await ws.ask("get", jobIds=["a"], **fields),
            await ws.ask("ping", **fields),
            await ws.ask("publish", updates=[], **fields),
            await ws.ask("auth", token="any", **fields),
            await ws.ask("get", **fields),  # an error
            await ws.ask("dance", **fields),  # another
        ):
            assert answer.get("ref") == ref
            assert ("ref" in answer) == (ref is not None), answer


async def test_an_update_that_fits_several_subscriptions_comes_once(server: InProcess) -> None:
    put(server, "a")
    async with session(server) as ws:
        await ws.subscribe(jobIds=["a", "b"])
        await ws.subscribe(userId="alice")
        await ws.subscribe(all=True)
        put(server, "a")
        put(server, "b")
        put(server, "c")
        assert seen(await received(ws, 3)) == [("a", 2), ("b", 1), ("c", 1)]
        await ws.quiet()
        # One by one, in separate flushes, too.
        for version in (3, 4):
            put(server, "a")
            assert seen([await ws.receive()]) == [("a", version)]
        await ws.ask("unsubscribe", all=True)
        put(server, "a")
        put(server, "z", user="bob")
        assert seen([await ws.receive()]) == [("a", 5)]
        await ws.quiet()


async def test_the_last_subscription_to_the_same_jobs_wins(server: InProcess) -> None:
    async with session(server) as ws:
        await ws.subscribe(jobIds=["a"], fields=["progress"])
        await ws.subscribe(jobIds=["a"], types=["job_completed"])
        put(server, "a")
        await ws.quiet()
        put(server, "a", status="completed")
        assert "createdAt" in await ws.receive()


async def test_unsubscribe(server: InProcess) -> None:
    async with session(server) as ws:
        await ws.subscribe(jobIds=["a", "b"])
        await ws.subscribe(userId="carol")
        assert await ws.ask("unsubscribe", jobIds=["a", "zzz", "a/b"], ref=5) == {
            "type": "unsubscribed", "jobIds": ["a", "zzz", "a/b"], "ref": 5,
        }  # fmt: skip
        put(server, "a")
        put(server, "b")
        put(server, "c", user="carol")
        assert seen(await received(ws, 2)) == [("b", 1), ("c", 1)]
        await ws.ask("unsubscribe", userId="carol")
        put(server, "c", user="carol")
        await ws.quiet()
        assert (await ws.ask("unsubscribe")) == {"type": "unsubscribed"}
        put(server, "b")
        await ws.quiet()
        assert not server.node.hub.channels


def with_update_before(
    monkeypatch: pytest.MonkeyPatch, server: InProcess, kind: type[ClientMessage], job_id: str
) -> None:
    """Publish in the very turn of the loop in which such a message is taken, before the flusher has its turn."""
    handler = transport.HANDLERS[kind]

    async def publish_first(session: Any, message: Any) -> None:
        put(server, job_id)
        await handler(session, message)

    monkeypatch.setitem(transport.HANDLERS, kind, publish_first)


async def test_what_is_pending_comes_before_the_answer_that_ends_it(
    server: InProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_update_before(monkeypatch, server, Unsubscribe, "a")
    async with session(server) as ws:
        await ws.subscribe(jobIds=["a", "b"])
        await ws.send("unsubscribe", jobIds=["a"])
        assert [message["type"] for message in await received(ws, 2)] == ["status_update", "unsubscribed"]
        await ws.subscribe(jobIds=["a"])
        await ws.send("unsubscribe")
        assert [message["type"] for message in await received(ws, 2)] == ["status_update", "unsubscribed"]
        await ws.quiet()


async def test_what_is_pending_comes_before_a_further_snapshot(
    server: InProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_update_before(monkeypatch, server, Subscribe, "a")
    async with session(server) as ws:
        await ws.subscribe(jobIds=["a"])
        await ws.send("subscribe", all=True)
        update, answer = await received(ws, 2)
        assert (update["type"], update["version"]) == ("status_update", 2)
        assert seen(answer["snapshot"]) == [("a", 2)]
        put(server, "a")
        assert seen([await ws.receive()]) == [("a", 3)]


async def test_get_is_never_followed_by_something_older(server: InProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    with_update_before(monkeypatch, server, Get, "a")
    async with session(server) as ws:
        await ws.subscribe(jobIds=["a"])
        await ws.send("get", jobIds=["a"])
        update, answer = await received(ws, 2)
        assert (update["type"], update["version"]) == ("status_update", 1)
        assert seen(answer["jobs"]) == [("a", 1)]
        await ws.quiet()


async def test_get(server: InProcess) -> None:
    put(server, "a", progress=1)
    async with session(server) as ws:
        answer = await ws.ask("get", jobIds=["a", "none", "a/b"], ref="g")
        assert (answer["type"], answer["ref"], seen(answer["jobs"])) == ("jobs", "g", [("a", 1)])
        assert set(answer) == {"type", "ref", "jobs"}
        put(server, "a")
        await ws.quiet()  # it is no subscription


async def test_ten_thousand_jobs_a_connection(server: InProcess) -> None:
    names = [f"j{number}" for number in range(10_001)]
    async with session(server) as ws:
        answer = await ws.subscribe(jobIds=names)
        assert (len(answer["jobIds"]), answer["denied"]) == (10_000, ["j10000"])
        # What is watched already takes no room, and what is let go makes some.
        answer = await ws.subscribe(jobIds=["j0", "j9999", "more"], **FEW)
        assert (answer["jobIds"], answer["denied"]) == (["j0", "j9999"], ["more"])
        await ws.ask("unsubscribe", jobIds=["j1"])
        assert (await ws.subscribe(jobIds=["more", "evenmore"]))["denied"] == ["evenmore"]
        put(server, "j9999")
        put(server, "j10000")
        put(server, "more")
        assert seen(await received(ws, 2)) == [("j9999", 1), ("more", 1)]
        await ws.quiet()


async def test_a_large_snapshot_comes_in_parts(server: InProcess) -> None:
    for number in range(30):
        put(server, f"job{number}", metadata={"text": "x" * 30_000})
    async with session(server) as ws:
        await ws.send("subscribe", all=True, ref="big")
        put(server, "job0", progress=1)
        parts = [await ws.receive()]
        while parts[-1].get("more"):
            parts.append(await ws.receive())
        assert len(parts) > 2
        assert all(part["type"] == "subscribed" and part["ref"] == "big" for part in parts)
        assert all("id" not in part and "recovered" not in part for part in parts[:-1])
        assert "more" not in parts[-1]
        assert [job["jobId"] for part in parts for job in part["snapshot"]] == [f"job{n}" for n in range(30)]
        known = parts[0]["snapshot"][0]["version"]
        if known == 1:
            assert seen([await ws.receive()]) == [("job0", 2)]
        await ws.send("get", jobIds=[f"job{number}" for number in range(30)])
        parts = [await ws.receive()]
        while parts[-1].get("more"):
            parts.append(await ws.receive())
        assert sum(len(part["jobs"]) for part in parts) == 30


# Resuming


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
        messages = await received(ws, 2)
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
            assert seen(await received(ws, 2)) == [("a", 1), ("a", 2)]


async def test_a_lost_log_is_told_by_reset_with_a_snapshot(server: InProcess) -> None:
    put(server, "a")
    put(server, "a")
    put(server, "b")
    async with session(server) as ws, session(server) as idle, websocket(server, deflate=True) as deflated:
        await deflated.receive()
        await ws.subscribe(jobIds=["a"], **FEW)
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
        await ws.subscribe(jobIds=["a", "b"], minInterval=200)
        put(server, "a", progress=1)
        assert seen([await ws.receive()]) == [("a", 2)]
        started = trio.current_time()
        for number in range(2, 10):
            put(server, "a", progress=number)
            put(server, "b", progress=number)
            await wait_all_tasks_blocked()
        messages = await received(ws, 2)
        assert trio.current_time() - started >= 0.15
        assert seen(messages) == [("a", 10), ("b", 9)]
        await ws.subscribe(jobIds=["a"], minInterval=0)
        for number in range(10, 13):
            put(server, "a", progress=number)
        assert seen(await received(ws, 3)) == [("a", 11), ("a", 12), ("a", 13)]


async def test_min_interval_never_holds_a_status_change(server: InProcess) -> None:
    async with session(server) as ws:
        await ws.subscribe(userId="alice", minInterval=60_000)
        put(server, "a")
        assert seen([await ws.receive()]) == [("a", 1)]
        put(server, "a", message="held")
        put(server, "b", message="new")
        put(server, "a", status="processing")
        put(server, "a", progress=50)  # same flush: held, and does not hide the change before it
        assert seen(await received(ws, 2)) == [("b", 1), ("a", 3)]
        put(server, "b", progress=1)
        put(server, "a", status="completed")
        put(server, "b", status="failed")
        assert seen(await received(ws, 2)) == [("a", 5), ("b", 3)]
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
        assert seen(await received(ws, 5)) == [("a", version) for version in range(1, 6)]


async def test_spaced_out_cursors_lose_nothing(server: InProcess) -> None:
    """Whatever message is the last one received: resuming from its id misses nothing."""
    put(server, "a", status="processing")
    put(server, "b", status="processing")
    put(server, "c", status="processing")
    log: list[tuple[str, int]] = []
    ids: list[tuple[str, int]] = []
    async with session(server) as ws:
        await ws.subscribe(userId="alice", minInterval=80)

        async def take(count: int) -> None:
            for message in await received(ws, count):
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
        beats = await received(ws, 3)
        assert [beat["type"] for beat in beats] == ["heartbeat"] * 3
        assert len(ws.pings) >= 2
        # The held update is still to come: no cursor passes it.
        assert {beat["id"] for beat in beats} == {before}


# Publishing


async def test_publish_is_answered_when_kept_with_what_was_rejected(guarded: InProcess) -> None:
    put(guarded, "done", status="completed")
    async with session(guarded, token=token("w", capabilities=["publish"])) as ws:
        answer = await ws.ask(
            "publish",
            ref=1,
            updates=[
                {"jobId": "a", "userId": "alice", "seq": 1},
                {"jobId": "a", "seq": 1},
                {"jobId": "a", "progress": "much"},
                {"jobId": "done", "progress": 1},
                5,
                {"jobId": "a", "status": "processing"},
            ],
        )
        rejected = answer.pop("rejected")
        assert answer == {"type": "published", "ref": 1, "accepted": 2, "duplicates": 1, "id": cursor(guarded)}
        assert [(refusal["index"], refusal["code"]) for refusal in rejected] == [
            (2, "invalid_field"), (3, "job_ended"), (4, "invalid_update"),
        ]  # fmt: skip
        assert guarded.node.jobs.jobs["a"].latest.version == 2


async def test_a_worker_learns_that_it_shall_stop(server: InProcess) -> None:
    put(server, "a", status="processing")
    put(server, "b", status="processing")
    assert (await server.post("/api/v2/jobs/a/cancel", {})).status == 202
    async with session(server) as ws:
        answer = await ws.ask("publish", updates=[{"jobId": "a", "progress": 1}, {"jobId": "b", "progress": 1}])
        assert (answer["accepted"], answer["cancelRequested"]) == (2, ["a"])


async def test_publishing_needs_the_capability(guarded: InProcess) -> None:
    async with session(guarded, token=token("alice")) as ws:
        answer = await ws.ask("publish", ref="p", updates=[{"jobId": "a", "userId": "alice"}])
        assert (answer["type"], answer["code"], answer["ref"]) == ("error", "forbidden", "p")
        assert not guarded.node.jobs.jobs


async def test_many_publishes_are_answered_in_order(tmp_path: Any) -> None:
    async with clean_server(store={"url": f"sqlite:{tmp_path}/jobs.db"}) as server, session(server) as ws:
        for number in range(100):
            await ws.send("publish", ref=number, updates=[{"jobId": f"job{number}", "userId": "u"}])
        answers = await received(ws, 100)
        assert [(answer["ref"], answer["accepted"]) for answer in answers] == [(number, 1) for number in range(100)]
        assert len(server.node.jobs.jobs) == 100


async def test_publishing_during_a_drain_is_refused(server: InProcess) -> None:
    async with session(server) as ws:
        server.node.start_drain()
        answer = await ws.ask("publish", updates=[{"jobId": "a", "userId": "u"}])
        assert (answer["type"], answer["code"]) == ("error", "try_later")
        assert not server.node.jobs.jobs


# Tokens


async def test_a_connection_without_token_may_say_auth_first(guarded: InProcess) -> None:
    put(guarded, "mine")
    async with websocket(guarded) as ws:
        answer = await ws.ask("subscribe", ref=1)
        assert (answer["type"], answer["code"], answer["ref"]) == ("error", "unauthorized", 1)
        await ws.send("auth", token=token("alice"), ref=2)
        hello = await ws.receive()
        assert (hello["type"], hello["userId"], hello["ref"]) == ("connected", "alice", 2)
        assert seen((await ws.subscribe())["snapshot"]) == [("mine", 1)]


async def test_silence_is_closed_with_4408() -> None:
    async with clean_server(auth=AUTH, limits={"auth_timeout": 0.05}) as at:
        async with websocket(at) as ws:
            assert (await ws.closed()).code == 4408
        async with websocket(at) as ws:
            await ws.ask("auth", token=token("alice"))
            assert len(at.node.wheel) == 1  # nothing but the heartbeat is left


@pytest.mark.parametrize("bad", ["nonsense", token("alice", exp=1), token("alice") + "x", ""])
async def test_a_bad_token_is_accepted_and_closed_with_4401(guarded: InProcess, bad: str) -> None:
    async with websocket(guarded, f"/ws/jobs?access_token={bad}") as ws:
        assert (await ws.closed()).code == 4401
        assert ws.left == []
    async with websocket(guarded) as ws:
        await ws.send("auth", token=bad)
        assert (await ws.closed()).code == 4401


async def test_tokens_come_in_every_way(guarded: InProcess) -> None:
    mine = token("alice")
    for options in (
        {"token": mine},
        {"headers": {"Sec-WebSocket-Protocol": f"bearer.{mine}"}},
        {"target": f"/ws/jobs?access_token={mine}"},
        {"headers": {"Cookie": f"statuswire_token={mine}"}},
    ):
        async with websocket(guarded, **options) as ws:  # type: ignore[arg-type]
            assert (await ws.receive())["userId"] == "alice"
            if "Sec-WebSocket-Protocol" in str(options):
                assert ws.answer["sec-websocket-protocol"] == f"bearer.{mine}"
    headers = {"Sec-WebSocket-Protocol": f"bearer.{mine}, statuswire.v1"}
    async with websocket(guarded, headers=headers) as ws:
        assert ws.answer["sec-websocket-protocol"] == "statuswire.v1"
        assert (await ws.receive())["userId"] == "alice"


async def test_an_expired_token_closes_with_4401(guarded: InProcess) -> None:
    async with session(guarded, token=token("alice", exp=in_seconds(0.2))) as ws:
        await ws.subscribe()
        put(guarded, "a")
        closed = await ws.closed()
        assert (closed.code, seen(ws.left)) == (4401, [("a", 1)])


async def test_auth_renews(guarded: InProcess) -> None:
    first = in_seconds(0.2)
    async with session(guarded, token=token("alice", exp=first)) as ws:
        await ws.subscribe()
        until_then = in_seconds(100)
        answer = await ws.ask("auth", token=token("alice", exp=until_then), ref="a")
        assert (answer["type"], answer["userId"], answer["ref"]) == ("authenticated", "alice", "a")
        assert answer["expiresAt"].endswith("Z")
        while time.time() < first:
            await ws.quiet()
        put(guarded, "a")
        assert seen([await ws.receive()]) == [("a", 1)]
        assert "expiresAt" not in await ws.ask("auth", token=token("alice"))


async def test_auth_of_another_user_closes_with_4401(guarded: InProcess) -> None:
    async with session(guarded, token=token("alice")) as ws:
        await ws.send("auth", token=token("bob"))
        assert (await ws.closed()).code == 4401


async def test_auth_with_less_rights_takes_what_they_gave(guarded: InProcess) -> None:
    async with (
        session(guarded, token=token("alice", admin=True)) as everything,
        session(guarded, token=token("alice", admin=True)) as named,
        session(guarded, token=token("alice", jobs=["export-*"])) as delegated,
    ):
        await everything.subscribe(all=True)
        await named.subscribe(jobIds=["mine", "theirs"])
        await named.subscribe(userId="bob")
        await delegated.subscribe(jobIds=["export-1", "import-1", "mine"])
        for ws in (everything, named, delegated):
            assert (await ws.ask("auth", token=token("alice", jobs=["import-*"])))["type"] == "authenticated"
        put(guarded, "theirs", user="bob")
        put(guarded, "export-1", user="bob")
        put(guarded, "import-1", user="bob")
        put(guarded, "mine", user="alice")
        for ws in (everything, named, delegated):
            # What the newer token allows as well goes on without a gap.
            assert seen([await ws.receive()]) == [("mine", 1)]
            await ws.quiet()
        assert (await everything.ask("publish", updates=[]))["code"] == "forbidden"


async def test_in_open_mode_any_token_is_welcome(server: InProcess) -> None:
    async with session(server, token="whatever") as ws:
        assert (await ws.ask("auth", token="else"))["userId"] == "anonymous"


# Wrong messages


async def test_wrong_messages_get_errors_and_ten_in_a_row_a_close(server: InProcess) -> None:
    wrong = ["", "{", "[]", "5", '"x"', "null", "{}", '{"type":1}', '{"type":"dance"}']
    async with session(server) as ws:
        for _ in range(2):
            for text in wrong:  # nine
                await ws.send_text(text)
                answer = await ws.receive()
                assert answer["type"] == "error"
                assert answer["code"] in ("malformed_json", "invalid_field"), answer
                assert answer["message"]
            await ws.quiet()  # a good one in between: counted from the start again
        for _ in range(10):
            await ws.send_text("{")
        closed = await ws.closed()
        assert closed.code == 1008
        assert len(ws.left) == 10


async def test_deep_nesting_is_an_error(server: InProcess) -> None:
    async with session(server) as ws:
        for text in ('{"a":' * 20_000, "[" * 100_000, '{"type":"ping","ref":' + "[" * 100_000):
            await ws.send_text(text)
            answer = await ws.receive()
            assert (answer["type"], answer["code"] in ("malformed_json", "invalid_field")) == ("error", True)
        await ws.quiet()


async def test_binary_is_unsupported_and_counts_as_malformed(server: InProcess) -> None:
    async with session(server) as ws:
        await ws.send_event(BytesMessage(b'{"type":"ping"}'))
        answer = await ws.receive()
        assert (answer["type"], answer["code"]) == ("error", "unsupported_data")
        await ws.quiet()
        for _ in range(10):
            await ws.send_event(BytesMessage(b""))
        assert (await ws.closed()).code == 1008


async def test_strangers_get_ten_mistakes_too(guarded: InProcess) -> None:
    async with websocket(guarded) as ws:
        for _ in range(10):
            await ws.send("ping")
        closed = await ws.closed()
        assert (closed.code, {error["code"] for error in ws.left}) == (1008, {"unauthorized"})


async def test_too_fast_is_an_error_then_4429() -> None:
    async with clean_server(auth=AUTH, limits={"messages_per_second": 0.5}) as server:
        async with session(server, token=token("alice")) as ws:
            await ws.quiet()
            for number in range(10):
                await ws.send("ping", ref=number)
            closed = await ws.closed()
            assert closed.code == 4429
            assert [(error["code"], error["ref"]) for error in ws.left] == [("rate_limited", n) for n in range(10)]
        async with session(server, token=token("bob")) as ws:  # each user has a rate of its own
            await ws.quiet()
        server.node.limits.sweep(trio.current_time() + 1000)


async def test_publishing_too_fast_is_an_error() -> None:
    async with clean_server(limits={"publishes_per_second": 1}) as server, session(server) as ws:
        updates = [{"jobId": "a", "userId": "u"}]
        assert (await ws.ask("publish", updates=updates))["type"] == "published"
        answer = await ws.ask("publish", updates=updates, ref=7)
        assert (answer["type"], answer["code"], answer["ref"]) == ("error", "rate_limited", 7)
        server.node.limits.sweep(trio.current_time() + 1000)


async def test_too_many_connections_of_a_user_is_an_error_then_4429() -> None:
    async with clean_server(auth=AUTH, limits={"connections_per_user": 1}) as server:
        async with session(server, token=token("alice")):
            async with websocket(server, token=token("alice")) as ws:
                assert (await ws.closed()).code == 4429
                assert [(m["type"], m["code"]) for m in ws.left] == [("error", "rate_limited")]
            async with websocket(server) as ws:
                await ws.send("auth", token=token("alice"))
                assert (await ws.closed()).code == 4429
            async with session(server, token=token("bob")):
                pass
        await until(lambda: not server.node.streams)
        async with session(server, token=token("alice")) as ws:
            await ws.quiet()


async def test_ack_and_ping(server: InProcess) -> None:
    async with session(server) as ws:
        await ws.send("ack", id=cursor(server))
        pong = await ws.ask("ping", ref="p")
        assert (pong["type"], pong["ref"]) == ("pong", "p")
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", pong["timestamp"])
        assert (await ws.ask("ack"))["field"] == "id"


# Frames


async def test_fragments_with_a_ping_inside(server: InProcess) -> None:
    async with session(server) as ws:
        text = json.dumps({"type": "ping", "ref": "ü" * 10})
        for position, letter in enumerate(text):
            await ws.send_event(TextMessage(letter, message_finished=position == len(text) - 1))
            if position == 5:
                await ws.send_event(Ping(b"inside"))
        assert (await ws.receive())["ref"] == "ü" * 10
        assert ws.pongs == [b"inside"]


async def test_a_handshake_with_messages_right_behind_it(server: InProcess) -> None:
    frames = FrameProtocol(client=True, extensions=[])
    early = frames.send_data('{"type":"ping","ref":"early"}')
    async with server.connect() as http:
        await http.send(handshake_bytes() + early)
        status, answer = await http.head()
        assert status == 101
        ws = WebSocket(http, answer, None)
        assert [(await ws.receive())["type"], (await ws.receive())["ref"]] == ["connected", "early"]


async def test_a_message_of_one_mebibyte_and_one_more(server: InProcess) -> None:
    limit = 1024 * 1024
    async with session(server) as ws:
        text = '{"type":"ping","ref":"' + "x" * (limit - 24) + '"}'
        assert len(text) == limit
        await ws.send_text(text)
        assert len((await ws.receive())["ref"]) == limit - 24
        await ws.send_text(text + " ")
        assert (await ws.closed()).code == 1009
    async with session(server, deflate=True) as ws:
        await ws.send_text(text + " ")
        assert (await ws.closed()).code == 1009


async def test_a_length_that_nobody_has_is_refused_at_once(server: InProcess) -> None:
    async with session(server) as ws:
        await ws.http.send(b"\x81\xff" + (2**62).to_bytes(8, "big") + bytes(4))
        assert (await ws.closed()).code == 1009


@pytest.mark.parametrize(
    ("opcode", "data", "code"),
    [
        (Opcode.TEXT, b"\xff", 1007),
        (Opcode.TEXT, b'"\xc3', 1007),
        (3, b"", 1002),
        (Opcode.CONTINUATION, b"x", 1002),
    ],
)
async def test_bad_frames(server: InProcess, opcode: int, data: bytes, code: int) -> None:
    async with session(server) as ws:
        mask = bytes(4)
        await ws.http.send(bytes([0x80 | opcode, 0x80 | len(data)]) + mask + data)
        assert (await ws.closed()).code == code


async def test_large_messages_under_way_are_bounded_together() -> None:
    async with clean_server(limits={"unfinished": 100_000}) as at:
        async with session(at) as first, session(at) as second:
            await first.send_event(TextMessage(" " * 150_000, message_finished=False))
            await until(lambda: at.node.limits.unfinished > 80_000)
            await second.send_event(TextMessage(" " * 150_000, message_finished=False))
            assert (await second.closed()).code == 1013
            await first.send_event(TextMessage('{"type":"ping"}', message_finished=True))
            assert (await first.receive())["type"] == "pong"
        await until(lambda: at.node.limits.unfinished == 0)


async def test_unmasked_frames_are_a_protocol_error(server: InProcess) -> None:
    async with session(server) as ws:
        await ws.http.send(b"\x81\x0f" + b'{"type":"ping"}')
        assert (await ws.closed()).code == 1002


async def test_good_messages_before_a_bad_frame_are_answered(server: InProcess) -> None:
    async with session(server) as ws:
        good = ws.connection.send(TextMessage('{"type":"ping","ref":"good"}'))
        await ws.http.send(good + b"\x83\x80" + bytes(4))
        closed = await ws.closed()
        assert (closed.code, [message["ref"] for message in ws.left]) == (1002, ["good"])


async def test_publishes_that_come_together_are_answered_together_and_before_what_follows(server: InProcess) -> None:
    async with session(server) as ws:
        (reader,) = server.node.streams
        sends: list[int] = []
        send = reader.sock_send  # type: ignore[attr-defined]

        def counted(data: bytes) -> int:
            sends.append(len(data))
            return int(send(data))

        reader.sock_send = counted  # type: ignore[attr-defined]
        publish = '{"type":"publish","ref":%d,"updates":[{"jobId":"a","userId":"alice","progress":%d}]}'
        publishes = b"".join(ws.connection.send(TextMessage(publish % (n, n))) for n in range(5))
        await ws.http.send(publishes)
        answers = await received(ws, 5)
        assert [(answer["type"], answer["ref"]) for answer in answers] == [("published", n) for n in range(5)]
        assert len(sends) == 1
        ping = ws.connection.send(TextMessage('{"type":"ping","ref":9}'))
        await ws.http.send(publishes + ping + publishes)
        answers = await received(ws, 11)
        assert [answer["ref"] for answer in answers] == [0, 1, 2, 3, 4, 9, 0, 1, 2, 3, 4]
        await ws.http.send(publishes + b"\x83\x80" + bytes(4))
        closed = await ws.closed()
        assert (closed.code, [message["ref"] for message in ws.left]) == (1002, [0, 1, 2, 3, 4])


async def test_publishes_that_are_kept_together_are_answered_together(tmp_path: Path) -> None:
    async with clean_server(store={"url": f"sqlite:{tmp_path}/s.db"}) as at, session(at) as ws:
        publish = '{"type":"publish","ref":%d,"updates":[{"jobId":"a%d","userId":"alice"}]}'
        for start in range(0, 200, 40):
            await ws.http.send(
                b"".join(ws.connection.send(TextMessage(publish % (n, n))) for n in range(start, start + 40))
            )
            answers = await received(ws, 40)
            assert sorted(answer["ref"] for answer in answers) == list(range(start, start + 40))
        (reader,) = at.node.streams
        assert not reader.corked  # type: ignore[attr-defined]


@pytest.mark.parametrize("code", [1000, 1001, 3000, 4999])
async def test_the_close_handshake(server: InProcess, code: int) -> None:
    async with session(server) as ws:
        await ws.subscribe()
        await ws.send_event(CloseConnection(code, "bye"))
        assert (await ws.closed()).code == code
        assert await ws.http.closed()  # and then the connection: the server closes first (section 7.1.1)


async def test_a_close_without_a_code_is_answered_without_one(server: InProcess) -> None:
    async with session(server) as ws:
        await ws.http.send(b"\x88\x80" + bytes(4))
        assert await ws.http.rest() == b"\x88\x00"


async def test_a_flood_of_pings_is_answered_a_few_times(server: InProcess) -> None:
    async with session(server) as ws:
        ping = ws.connection.send(Ping(b"x" * 125))
        await ws.http.send(ping * 5000)
        await ws.quiet()
        assert 1 <= len(ws.pongs) < 1000
        assert set(ws.pongs) == {b"x" * 125}


async def test_a_flood_whose_pongs_are_not_read_is_bounded(server: InProcess) -> None:
    async with session(server, receive_buffer=1) as ws:
        narrow(server)
        (reader,) = server.node.streams
        ping = ws.connection.send(Ping(b"x" * 125))
        with trio.move_on_after(0.5):
            while True:
                await ws.http.stream.send_all(ping * 100)
        assert len(reader.queue or ()) <= 2  # type: ignore[attr-defined]
        assert len(reader.tail) < 1000  # type: ignore[attr-defined]
        reset_connection(ws.http)


async def test_a_client_may_ask_no_faster_than_it_reads(server: InProcess) -> None:
    """Each question is a few bytes, each answer many kilobytes."""
    put(server, "a", metadata={"text": "x" * 10_000})
    async with session(server, receive_buffer=1) as ws:
        narrow(server)
        (reader,) = server.node.streams
        question = ws.connection.send(TextMessage('{"type":"subscribe","ref":1}'))
        await ws.http.send(question * 40)
        await until(lambda: reader.tail)  # type: ignore[attr-defined]
        await wait_all_tasks_blocked()
        assert len(reader.queue or ()) <= 1  # type: ignore[attr-defined]
        answers = await received(ws, 40)
        assert {answer["type"] for answer in answers} == {"subscribed"}


async def test_compression_is_agreed_on_and_used_for_what_is_worth_it(server: InProcess) -> None:
    async with session(server, deflate=True) as ws:
        agreed = ws.answer["sec-websocket-extensions"]
        assert agreed.startswith("permessage-deflate")
        assert "server_no_context_takeover" in agreed
        assert "client_no_context_takeover" in agreed
        await ws.subscribe()
        ws.raw = b""
        put(server, "a", message="same " * 400)
        assert (await ws.receive())["message"] == "same " * 400
        assert ws.raw[0] == 0xC1
        assert len(ws.raw) < 600
        ws.raw = b""
        put(server, "b")
        await ws.receive()
        assert ws.raw[0] == 0x81
        # Both sides begin anew with each message: a second one is understood as well.
        for _ in range(3):
            await ws.send("ping", ref="again " * 100)
            assert (await ws.receive())["ref"] == "again " * 100


async def test_without_compression_nothing_is_compressed(server: InProcess) -> None:
    async with session(server) as ws:
        await ws.subscribe()
        ws.raw = b""
        put(server, "a", message="same " * 400)
        await ws.receive()
        assert ws.raw[0] == 0x81


async def test_what_goes_out_together_comes_in_one_frame_to_who_reads_lines(server: InProcess) -> None:
    for job_id in "abc":
        put(server, job_id)
    async with trio_websocket.open_websocket_url(
        f"{server.ws_url}/ws/jobs", subprotocols=["statuswire.v1", "statuswire.v1.lines"]
    ) as connection:
        assert connection.subprotocol == "statuswire.v1.lines"
        assert json.loads(await connection.get_message())["type"] == "connected"
        await connection.send_message('{"type":"subscribe","jobIds":["a","b","c"]}')
        assert len(json.loads(await connection.get_message())["snapshot"]) == 3
        updates = [{"jobId": job_id, "progress": 5} for job_id in "abca"]
        assert (await server.post("/api/v2/updates", updates)).status == 200
        with trio.fail_after(5):
            lines = (await connection.get_message()).split("\n")
        assert [json.loads(line)["jobId"] for line in lines] == ["a", "b", "c", "a"]


async def test_another_client_library_gets_along(server: InProcess) -> None:
    put(server, "a")
    async with trio_websocket.open_websocket_url(
        f"{server.ws_url}/ws/jobs", subprotocols=["statuswire.v1"]
    ) as connection:
        assert connection.subprotocol == "statuswire.v1"
        assert json.loads(await connection.get_message())["type"] == "connected"
        await connection.send_message('{"type":"subscribe"}')
        assert len(json.loads(await connection.get_message())["snapshot"]) == 1
        put(server, "a", status="completed")
        assert json.loads(await connection.get_message())["type"] == "job_completed"
        with trio.fail_after(5):
            await connection.ping(b"hello")


# Heartbeats


async def test_heartbeats_carry_the_cursor_and_a_ping() -> None:
    async with clean_server(server={"heartbeat": 0.04}) as server, session(server) as ws:
        await ws.subscribe(jobIds=["quiet"])
        put(server, "busy")
        beat = await ws.receive()
        while beat["id"] != cursor(server):
            beat = await ws.receive()
        assert set(beat) == {"type", "timestamp", "id"}
        assert beat["type"] == "heartbeat"
        assert ws.pings
        # A client that answers stays.
        for _ in range(8):
            assert (await ws.receive())["type"] == "heartbeat"
        await ws.send("ping")
        while (await ws.receive())["type"] != "pong":
            pass


async def test_a_client_that_answers_no_ping_is_stale_and_closed() -> None:
    async with clean_server(server={"heartbeat": 0.03}, health=NO_PATIENCE) as server, session(server) as ws:
        await ws.subscribe()
        received = b""
        with suppress(trio.BrokenResourceError):
            while data := await ws.http.stream.receive_some():  # reads, and never answers
                received += data
        assert close_frame(1008, "no ping was answered") in received
        await until(lambda: not server.node.streams)


async def test_a_slow_reader_that_reads_is_not_stale() -> None:
    """It is so far behind that no ping reaches it; that it takes something is sign of life enough."""
    async with (
        clean_server(server={"heartbeat": 0.05}, health=NO_PATIENCE) as server,
        session(server, receive_buffer=1) as ws,
    ):
        await ws.subscribe()
        narrow(server)
        (reader,) = server.node.streams
        put(server, "a", metadata={"text": "x" * 60_000})
        put(server, "b", metadata={"text": "x" * 60_000})
        started = trio.current_time()
        while trio.current_time() < started + 0.4:
            if not reader.tail:  # type: ignore[attr-defined]
                put(server, "a")
            await ws.http.stream.receive_some(1000)
            await trio.sleep(0.005)
        assert reader in server.node.streams
        reset_connection(ws.http)


async def test_channels_alone_ask_for_no_jobs(server: InProcess) -> None:
    put(server, "a")
    async with session(server) as ws:
        answer = await ws.subscribe(channels=["team-1"])
        assert (answer["jobIds"], answer["snapshot"]) == ([], [])
        answer = await ws.subscribe(jobIds=["a"], channels=["team-1"], types="status_update", fields="progress")
        assert (answer["jobIds"], [set(job) for job in answer["snapshot"]]) == (
            ["a"],
            [{"jobId", "status", "progress", "version"}],
        )


# Going away


async def test_a_drain_closes_with_1001_and_a_delay(server: InProcess) -> None:
    delays = set()
    async with session(server) as one, session(server) as two, session(server) as three, trio.open_nursery() as nursery:
        await one.subscribe()
        nursery.start_soon(drain, server.node, 0.0)
        for ws in (one, two, three):
            closed = await ws.closed()
            await ws.http.aclose()
            assert closed.code == 1001
            (digits,) = re.findall(r"\d+", closed.reason)
            delays.add(int(digits))
            assert 500 <= int(digits) <= 5000
        assert len(delays) > 1
    async with server.connect() as http:
        await http.send(handshake_bytes())
        status, headers = await http.head()
        assert status == 503
        assert int(headers["retry-after"]) >= 1


async def test_a_drain_is_spread_over_its_time(server: InProcess) -> None:
    async with session(server) as one, session(server) as two, trio.open_nursery() as nursery:
        ends: list[tuple[float, int]] = []

        async def wait(ws: WebSocket) -> None:
            await ws.closed()
            ends.append((trio.current_time() - started, len(server.node.streams)))
            await ws.http.aclose()

        started = trio.current_time()
        nursery.start_soon(wait, one)
        nursery.start_soon(wait, two)
        await drain(server.node, 0.4)
        assert trio.current_time() - started >= 0.4
    (first, others), (second, _) = ends
    assert others == 1
    assert first >= 0.09
    assert second >= 0.29


# Slow and vanishing readers


async def test_a_reader_that_never_reads_is_closed_past_its_bound_with_1013() -> None:
    async with clean_server(limits={"backlog": 20_000}) as server, session(server) as other:
        await other.subscribe()
        async with session(server, receive_buffer=1) as never:
            await never.subscribe()
            narrow(server)
            for number in range(100):
                put(server, f"job{number}", metadata={"text": "x" * 2000})
                assert (await other.receive())["jobId"] == f"job{number}"
            assert len(server.node.hub.readers) == 1  # it has left already; the rest is its goodbye
            closed = await never.closed()
            assert closed.code == 1013
            got = [message["jobId"] for message in never.left]
            assert got == [f"job{number}" for number in range(len(got))]
        async with session(server) as again:
            answer = await again.subscribe(last_seen=never.left[-1]["id"])
            assert answer["recovered"]
            rest = [message["jobId"] for message in await received(again, 100 - len(got))]
            assert got + rest == [f"job{number}" for number in range(100)]


async def test_a_healthy_reader_is_not_conflated_however_large_the_flush() -> None:
    async with clean_server(limits={"backlog": 50_000}) as server, session(server) as filtered, session(server) as two:
        await filtered.subscribe(kind="k")
        await two.subscribe(jobIds=["a"])
        await two.subscribe(jobIds=["b"])
        for number in range(60):
            put(server, "a", kind="k", progress=number)
            put(server, "b", kind="k", progress=number, metadata={"text": "x" * 1000})
        for ws in (filtered, two):
            messages = await received(ws, 120)
            assert versions(messages, "a") == versions(messages, "b") == list(range(1, 61))


async def test_a_connection_that_breaks_at_any_moment_leaves_nothing() -> None:
    async with clean_server(auth=AUTH, limits={"connections_per_user": 3}) as server:
        for number in range(20):
            put(server, f"job{number}", metadata={"text": "x" * 30_000})
        for step in range(8):
            async with websocket(server, token=token("alice"), receive_buffer=None if step % 2 else 1) as ws:
                if step > 0:
                    await ws.receive()
                if step > 2:
                    await ws.send("subscribe", minInterval=0 if step < 5 else 1000)
                if step > 4:
                    await ws.receive()
                if step > 5:
                    put(server, "job1", progress=step)
                    put(server, "job2", progress=step)
                if step > 6:
                    await ws.http.send(b"\x81\xfe")  # half a frame
                reset_connection(ws.http)
        await until(lambda: not traces(server))


async def test_the_server_ends_with_readers_in_every_state() -> None:
    """Stopping at once cancels them all; nothing hangs, nothing raises."""
    with trio.fail_after(10):
        async with (
            clean_server() as server,
            session(server, receive_buffer=1) as slow,
            session(server) as fine,
            websocket(server) as new,
        ):
            await slow.subscribe()
            await fine.subscribe(minInterval=60_000)
            await new.receive()
            narrow(server)
            for number in range(100):
                put(server, "a", progress=number, metadata={"text": "x" * 5000})
                await wait_all_tasks_blocked()
            for stream in list(server.node.streams):
                stream.abandon()  # type: ignore[attr-defined]
            await until(lambda: not server.node.streams)
