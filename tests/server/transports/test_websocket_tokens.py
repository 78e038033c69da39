"""Who speaks on a WebSocket: tokens in every way they come, their end, their renewal, and less rights than before."""

from __future__ import annotations

import time

import pytest

from tests.streams import clean_server, put, running_out, seen, session, websocket
from tests.support import AUTH, InProcess, in_seconds, token


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
    with running_out(0.5) as exp:
        async with session(guarded, token=token("alice", exp=exp)) as ws:
            await ws.subscribe()
            put(guarded, "a")
            closed = await ws.closed()
            assert (closed.code, seen(ws.left)) == (4401, [("a", 1)])


async def test_auth_renews(guarded: InProcess) -> None:
    with running_out(0.5) as exp:
        async with session(guarded, token=token("alice", exp=exp)) as ws:
            first = in_seconds(0.5)
            await ws.subscribe()
            answer = await ws.ask("auth", token=token("alice", exp=exp + 1000), ref="a")
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
