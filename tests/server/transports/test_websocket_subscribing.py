"""A WebSocket's subscriptions: what is watched, what comes of it, in which order, and what is let go."""

from __future__ import annotations

from typing import Any

import pytest

from protocol.messages import ClientMessage, Get, Subscribe, Unsubscribe
from server.transports import websocket_messages as transport
from tests.streams import cursor, put, remove, seen, session, websocket
from tests.support import InProcess, token


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
        assert [message["type"] for message in await ws.messages(2)] == ["job_completed", "job_deleted"]
        await ws.quiet()


async def test_every_ending_has_its_own_type(server: InProcess) -> None:
    async with session(server) as ws:
        await ws.subscribe(all=True)
        for status in ("completed", "failed", "cancelled", "processing"):
            put(server, status, status=status)
        types = [message["type"] for message in await ws.messages(4)]
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
        assert seen(await alice.messages(1)) == [("mine", 2)]
        assert seen(await root.messages(2)) == [("theirs", 2), ("mine", 2)]
        assert seen(await narrowed.messages(1)) == [("theirs", 2)]
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
        assert seen(await ws.messages(3)) == [("a", 2), ("b", 1), ("c", 1)]
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
        assert seen(await ws.messages(2)) == [("b", 1), ("c", 1)]
        await ws.ask("unsubscribe", userId="carol")
        put(server, "c", user="carol")
        await ws.quiet()
        assert (await ws.ask("unsubscribe")) == {"type": "unsubscribed"}
        put(server, "b")
        await ws.quiet()
        assert not server.node.hub.channels


# What is pending


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
        assert [message["type"] for message in await ws.messages(2)] == ["status_update", "unsubscribed"]
        await ws.subscribe(jobIds=["a"])
        await ws.send("unsubscribe")
        assert [message["type"] for message in await ws.messages(2)] == ["status_update", "unsubscribed"]
        await ws.quiet()


async def test_what_is_pending_comes_before_a_further_snapshot(
    server: InProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_update_before(monkeypatch, server, Subscribe, "a")
    async with session(server) as ws:
        await ws.subscribe(jobIds=["a"])
        await ws.send("subscribe", all=True)
        update, answer = await ws.messages(2)
        assert (update["type"], update["version"]) == ("status_update", 2)
        assert seen(answer["snapshot"]) == [("a", 2)]
        put(server, "a")
        assert seen([await ws.receive()]) == [("a", 3)]


async def test_get_is_never_followed_by_something_older(server: InProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    with_update_before(monkeypatch, server, Get, "a")
    async with session(server) as ws:
        await ws.subscribe(jobIds=["a"])
        await ws.send("get", jobIds=["a"])
        update, answer = await ws.messages(2)
        assert (update["type"], update["version"]) == ("status_update", 1)
        assert seen(answer["jobs"]) == [("a", 1)]
        await ws.quiet()


# Questions, and much at once


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
        answer = await ws.subscribe(jobIds=["j0", "j9999", "more"], fields=["progress"])
        assert (answer["jobIds"], answer["denied"]) == (["j0", "j9999"], ["more"])
        await ws.ask("unsubscribe", jobIds=["j1"])
        assert (await ws.subscribe(jobIds=["more", "evenmore"]))["denied"] == ["evenmore"]
        put(server, "j9999")
        put(server, "j10000")
        put(server, "more")
        assert seen(await ws.messages(2)) == [("j9999", 1), ("more", 1)]
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
