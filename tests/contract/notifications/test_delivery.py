"""What notifications go through: drains, tokens that end, slow readers, and any order of everything."""

from __future__ import annotations

from contextlib import AsyncExitStack
from random import Random
from typing import Any

import pytest

from tests.notifying import notified, put, send
from tests.streams import (
    WebSocket,
    clean_server,
    cursor,
    narrow,
    offset_of,
    parse_events,
    running_out,
    session,
    websocket,
)
from tests.support import AUTH, InProcess, bearer, token

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
    with running_out() as exp:
        async with notified(at, bearer("ann", exp=exp)) as (stream, _):
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
    # No heartbeat comes in between, however long it takes.
    async with clean_server(auth=AUTH, server={"heartbeat": 3600}) as at, AsyncExitStack() as stack:
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
