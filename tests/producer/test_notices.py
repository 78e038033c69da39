"""Notifications sent by the package, as those see them who are connected."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio

import statuswire
from statuswire import Client, Rejected, Unavailable, aio
from statuswire.notices import KINDS
from tests.producer.workers import settled, worker
from tests.streams import Stream, stream_at
from tests.support import AUTH, Address, bearer, server, token


@asynccontextmanager
async def notified(to: Address, user: str, channels: str = "") -> AsyncIterator[tuple[Stream, str]]:
    """A stream of a user's notifications, and its client id."""
    async with stream_at(to, f"/api/sse?userId={user}&channels={channels}") as stream:
        hello = await stream.event()
        yield stream, hello.data["clientId"]


async def call(function: Callable[..., int], *arguments: Any, **options: Any) -> int:
    """Call in a thread what waits for the server of this one."""
    return await trio.to_thread.run_sync(lambda: function(*arguments, **options))


async def test_every_target() -> None:
    async with (
        server() as at,
        worker(at.url) as client,
        notified(at, "ann", "news,sports") as (ann, ann_id),
        notified(at, "bob", "news") as (bob, _),
    ):
        only, both = [ann], [ann, bob]
        cases: list[tuple[str, Any, list[Stream]]] = [
            ("client", ann_id, only),
            ("user", "ann", only),
            ("users", ["ann", "bob", "carl"], both),
            ("channel", "sports", only),
            ("channels", ("sports", "news"), both),
            ("broadcast", None, both),
        ]
        for target, to, expected in cases:
            name = target if target == "broadcast" else f"send_to_{target}"
            to_whom = [] if to is None else [to]
            data, metadata = {"n": [1, "ü"]}, {"m": 1}
            sync = getattr(statuswire, name)
            delivered = await call(sync, *to_whom, f"{target}.sync", data, metadata=metadata, client=client)
            assert delivered == len(expected), target
            asynchronous = getattr(aio, name)
            assert await asynchronous(*to_whom, f"{target}.aio", data, client=client) == len(expected)
            assert sync(*to_whom, f"{target}.later", data, client=client, wait=False) == 0
            await settled(client)
            for stream in expected:
                events = await stream.events(3)
                assert [event.name for event in events] == [f"{target}.sync", f"{target}.aio", f"{target}.later"]
                assert [event.data["data"] for event in events] == [data] * 3
                assert events[0].data["metadata"] == metadata


async def test_one_name_where_several_belong_is_refused_and_not_taken_apart() -> None:
    async with server() as at, worker(at.url, strict=True) as client, notified(at, "a") as (stream, _):
        for send in (statuswire.send_to_users, statuswire.send_to_channels):
            with pytest.raises(statuswire.Rejected, match="targetIds"):
                await call(send, "ann", "oops", client=client)
        with pytest.raises(statuswire.Rejected, match="targetIds"):
            await aio.send_to_users("ann", "oops", client=client)
        assert await aio.broadcast("fine", client=client) == 1
        assert (await stream.event()).name == "fine"


async def test_every_kind_and_what_is_kept_for_later() -> None:
    async with server() as at, worker(at.url) as client:
        data = {name: "x" for kind in KINDS.values() for name in kind.fields}
        async with notified(at, "other", "system,post:1") as (other, _):
            for name, kind in KINDS.items():
                notify = getattr(statuswire, f"notify_{name}")
                to = {"user": ["ann"], "channel": ["post:1"] if kind.to is None else []}.get(kind.target, [])
                assert await call(notify, *to, data, client=client) == (kind.target != "user")
                with pytest.raises(ValueError, match=f"{kind.event}: .*{kind.fields[0]}"):
                    notify(*to, {}, client=client)
            names = [(await other.event()).name for kind in KINDS.values() if kind.target != "user"]
            assert names == [kind.event for kind in KINDS.values() if kind.target != "user"]
        async with notified(at, "ann") as (ann, _):
            stored = [kind.event for kind in KINDS.values() if kind.store]
            assert [(await ann.event()).name for _ in stored] == stored


async def test_a_server_that_refuses_or_is_away(caplog: pytest.LogCaptureFixture) -> None:
    secret = token("app", capabilities=["publish"])
    async with server(auth=AUTH) as at, worker(at.url, token=secret) as client:
        assert await call(statuswire.send_to_user, "ann", "x", client=client) == 0
        assert "needs" in caplog.messages[-1] or "capability" in caplog.messages[-1]
        assert (await at.get("/api/sse/users/ann", bearer("ann"))).status == 200
    async with server() as at, worker(at.url, strict=True) as client:
        with pytest.raises(Rejected, match="event"):
            await call(statuswire.send_to_user, "ann", "", client=client)
    async with worker("http://127.0.0.1:9", strict=True) as client:
        with pytest.raises(Unavailable):
            await call(statuswire.send_to_user, "ann", "x", client=client)


async def test_what_is_sent_in_the_background_waits_for_the_server() -> None:
    async with server() as at:
        port = at.port
    async with worker(at.url) as client:
        statuswire.send_to_user("ann", "later", {"n": object}, store=True, wait=False, client=client)
        statuswire.send_to_user("ann", "", wait=False, client=client)
        assert not await trio.to_thread.run_sync(client.flush, 0.2)
        async with server(server={"port": port}) as again:
            await settled(client)
            async with notified(again, "ann") as (stream, _):
                event = await stream.event()
                assert (event.name, event.data["data"]) == ("later", {"n": "<class 'object'>"})


def test_too_many_that_wait_are_dropped(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("statuswire.outbox.MAX_NOTICES", 2)
    client = Client("http://127.0.0.1:9", spool_dir="")
    for _ in range(3):
        statuswire.broadcast("x", wait=False, client=client)
    client.close(0)
    assert any("too many notifications" in text for text in caplog.messages)
