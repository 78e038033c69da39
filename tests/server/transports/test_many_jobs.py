"""Very many jobs: what is made for one reader gives way to others, and is of one moment all the same."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio

from server import connection, jobs, limits, reader, reading, turns
from server.transports import longpoll, websocket, websocket_messages
from tests.streams import connect, cursor, event_stream, put, session
from tests.support import InProcess, request_bytes, until

COUNT = 400
PORTION = 8
PORTIONS = COUNT // PORTION


@pytest.fixture(autouse=True)
def short_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """A turn is over after eight jobs."""
    for module in (jobs, longpoll, turns):
        monkeypatch.setattr(module, "PORTION", PORTION)
    for module in (reading, websocket):
        monkeypatch.setattr(module, "LOOK_EVERY", PORTION)
    for module in (reader, connection):
        monkeypatch.setattr(module, "TURN_S", -1.0)
    monkeypatch.setattr(websocket_messages, "FILTERED_AT_ONCE", PORTION)


@pytest.fixture
def many(server: InProcess) -> InProcess:
    for number in range(COUNT):
        put(server, f"job_{number}", status="processing", progress=1)
    return server


@asynccontextmanager
async def others() -> AsyncIterator[list[int]]:
    """How often others had a turn."""
    turns = [0]

    async def take_turns() -> None:
        while True:
            await trio.lowlevel.checkpoint()
            turns[0] += 1

    async with trio.open_nursery() as nursery:
        nursery.start_soon(take_turns)
        yield turns
        nursery.cancel_scope.cancel()


async def listed(at: InProcess, query: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = (await at.get(f"/api/v2/jobs?{query}")).json["jobs"]
    return found


async def polled(at: InProcess, query: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = (await at.get(f"/api/v2/jobs/poll?timeout=0&{query}")).json["updates"]
    return found


async def streamed(at: InProcess, query: str) -> list[dict[str, Any]]:
    async with event_stream(at, **dict(part.split("=") for part in query.split("&"))) as stream:
        while True:
            event = await stream.event()
            if event.type in ("snapshot", "status_update"):
                return event.data.get("jobs") or [event.data]


async def subscribed(at: InProcess, query: str) -> list[dict[str, Any]]:
    async with session(at) as ws:
        answer = await ws.subscribe(all=True, **dict(part.split("=") for part in query.split("&")))
        return answer["snapshot"] or [await ws.receive()]


WAYS = pytest.mark.parametrize("read", [listed, polled, streamed, subscribed])


@WAYS
async def test_others_have_turns_while_many_are_looked_through(read: Any, many: InProcess) -> None:
    put(many, "rare", kind="rare")
    async with others() as taken:
        (found,) = await read(many, "kind=rare")
        assert found["jobId"] == "rare"
        assert taken[0] > PORTIONS


@pytest.mark.parametrize("read", [polled, streamed, subscribed])
async def test_others_have_turns_while_many_are_replayed(read: Any, many: InProcess) -> None:
    beginning = f"{many.node.history.epoch}:0"
    put(many, "rare", kind="rare")
    async with others() as taken:
        (found,) = await read(many, f"kind=rare&last_seen={beginning}")
        assert found["jobId"] == "rare"
        assert taken[0] > (PORTIONS if read is polled else COUNT // 64)


async def test_what_changes_while_a_snapshot_is_made_comes_after_it_once(many: InProcess) -> None:
    """Half of the jobs change meanwhile, before and behind where the snapshot is at."""
    before = cursor(many)
    async with event_stream(many, fields="progress") as stream, session(many) as ws:
        hello = await stream.event()
        assert hello.type == "connected"
        await ws.send("subscribe", all=True, fields=["progress"])
        async with others() as taken:
            while not taken[0]:
                await trio.lowlevel.checkpoint()
            for number in range(0, COUNT, 2):
                put(many, f"job_{number}", progress=2)
        snapshot = await stream.event()
        assert snapshot.id == before
        told = [snapshot.data["jobs"], [(await stream.event()).data for _ in range(COUNT // 2)]]
        answer = await ws.receive()
        told_ws = [answer["snapshot"], await ws.messages(COUNT // 2)]
        await ws.quiet()
    for first, then in (told, told_ws):
        assert [record["version"] for record in first] == [1] * COUNT
        assert [(record["jobId"], record["version"]) for record in then] == [
            (f"job_{number}", 2) for number in range(0, COUNT, 2)
        ]


async def test_a_poll_in_which_nothing_was_found_misses_nothing_that_came_meanwhile(many: InProcess) -> None:
    async with others() as taken, trio.open_nursery() as nursery:
        answers: list[list[dict[str, Any]]] = []

        async def ask() -> None:
            answer = await many.get("/api/v2/jobs/poll?timeout=30&kind=rare")
            answers.append(answer.json["updates"])

        nursery.start_soon(ask)
        start = taken[0]
        while not many.node.counters.opened["poll"] or taken[0] < start + 10:
            await trio.lowlevel.checkpoint()
        assert not many.node.polls, "it is still looking"
        put(many, "rare", kind="rare")
    assert [[update["jobId"] for update in updates] for updates in answers] == [["rare"]]


async def test_a_poll_gives_many_jobs_in_the_order_of_the_log(many: InProcess) -> None:
    for number in range(0, COUNT, 3):
        put(many, f"job_{number}", progress=2)
    found = await polled(many, "all=1")
    assert len(found) == COUNT
    offsets = [int(update["id"].partition(":")[2]) for update in found]
    assert offsets == sorted(offsets)


async def test_others_have_turns_while_polls_are_told_that_the_log_is_lost(many: InProcess) -> None:
    answers: list[list[dict[str, Any]]] = []

    async def ask() -> None:
        answer = await many.get(f"/api/v2/jobs/poll?timeout=60&last_seen={cursor(many)}&client_id=c")
        assert answer.json["reset"] is True
        assert many.node.cursors._cursors
        answers.append(answer.json["updates"])

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask)
        await until(lambda: many.node.polls)
        many.node.history.restart("newepoch", COUNT)
        async with others() as taken:
            many.node.log_lost("newepoch")
            await until(lambda: answers)
            assert taken[0] > PORTIONS
    assert len(answers[0]) == COUNT
    assert many.node.limits.unfinished == 0


@pytest.mark.parametrize("read", [polled, listed])
async def test_what_is_looked_through_for_many_at_once_is_bounded(
    read: Any, many: InProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With copies of 100,000 jobs for each of a thousand admins there would be no memory left."""
    monkeypatch.setattr(limits, "UNFINISHED_FREE", 0)
    monkeypatch.setattr(many.node.limits, "max_unfinished", 10 * COUNT * longpoll.JOB_BYTES)
    path = "/api/v2/jobs/poll?timeout=0" if read is polled else "/api/v2/jobs?kind=rare"
    statuses: list[int] = []

    async def ask() -> None:
        answer = await many.get(path)
        statuses.append(answer.status)
        if answer.status == 503:
            assert (answer.error, answer.headers["retry-after"]) == ("try_later", "1")

    async with trio.open_nursery() as nursery:
        for _ in range(100):
            nursery.start_soon(ask)
    assert len(statuses) == 100
    assert set(statuses) == {200, 503}
    assert many.node.limits.unfinished == 0
    assert len(await polled(many, "all=1")) == COUNT


async def test_a_poll_that_waits_holds_nothing_of_what_it_looked_through(
    many: InProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "UNFINISHED_FREE", 0)
    hold, held = many.node.limits.hold, [0]

    def holding(before: int, after: int) -> None:
        hold(before, after)
        held.append(many.node.limits.unfinished)

    monkeypatch.setattr(many.node.limits, "hold", holding)
    async with connect(many) as http:
        await http.send(request_bytes("GET", "/api/v2/jobs/poll?timeout=60&kind=rare"))
        await until(lambda: many.node.polls)
        assert max(held) > 0, "it did hold something"
        assert many.node.limits.unfinished == 0


async def test_a_poll_for_which_there_is_no_room_when_the_log_is_lost_is_refused(
    many: InProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "UNFINISHED_FREE", 0)
    async with connect(many) as http:
        await http.send(request_bytes("GET", f"/api/v2/jobs/poll?timeout=60&last_seen={cursor(many)}"))
        await until(lambda: many.node.polls)
        monkeypatch.setattr(many.node.limits, "max_unfinished", 10)
        many.node.history.restart("newepoch", COUNT)
        many.node.log_lost("newepoch")
        answer = await http.answer()
        assert (answer.status, answer.json["error"]["code"]) == (503, "try_later")
    assert many.node.limits.unfinished == 0
