"""Channels: joined and left on live connections, with a cursor and without, by claim and by default."""

from __future__ import annotations

from pathlib import Path

from tests.notifying import put, send
from tests.streams import clean_server, cursor, session, stream_at
from tests.support import ADMIN, AUTH, InProcess, bearer, token


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
        got = await ws.messages(3)
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
