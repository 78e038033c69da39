"""Requests whose update is on its way to the disk: no task waits for it, and nothing is told before it is there."""

from __future__ import annotations

import socket
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing

from server import publishing
from server.brokers.sqlite import SqliteBroker
from server.transports.websocket_messages import MAX_UNANSWERED
from tests.server.brokers.disks import BIG, Held
from tests.streams import clean_server, connect, put, reset_connection, session
from tests.support import Http, InProcess, request_bytes, until

TARGET = "/api/v2/jobs/{}/updates"


class Slow:
    """A server whose disk takes nothing until ``go`` is set."""

    def __init__(self, at: InProcess) -> None:
        assert isinstance(at.node.broker, SqliteBroker)
        self.at = at
        self.broker = at.node.broker
        file = self.broker._file
        file.__class__ = Held
        assert isinstance(file, Held)
        self.go = file.go = threading.Event()

    async def begin(self, http: Http, job_id: str, target: str = TARGET, **fields: object) -> None:
        """Send a publish, and see it waiting for the disk."""
        busy = self.at.node._busy
        await http.send(request_bytes("POST", target.format(job_id), body=fields))
        await until(lambda: self.at.node._busy == busy + 1)
        await until(lambda: self.broker._waiting_entries)


@asynccontextmanager
async def slow(path: Path) -> AsyncIterator[Slow]:
    async with clean_server(store={"url": f"sqlite:{path}/jobs.db"}) as at:
        it = Slow(at)
        try:
            yield it
        finally:
            it.go.set()


def half_close(http: Http) -> None:
    assert isinstance(http.stream, trio.SocketStream)
    http.stream.socket.shutdown(socket.SHUT_WR)


def close(http: Http) -> None:
    assert isinstance(http.stream, trio.SocketStream)
    http.stream.socket.close()


@pytest.mark.parametrize(
    ("target", "status"),
    [(TARGET, 200), ("/api/v2/jobs", 201), ("/api/brand-monitor/progress/{}", 201)],
    ids=["update", "create", "view"],
)
async def test_it_takes_no_task_and_is_answered_when_it_is_kept(tmp_path: Path, target: str, status: int) -> None:
    async with slow(tmp_path) as it, connect(it.at) as one, connect(it.at) as two:
        await it.begin(one, "a", target, userId="u")
        await it.begin(two, "b", target, userId="u")
        assert not it.at.node.poller._waiting
        assert not it.at.node.jobs.jobs
        it.go.set()
        for http in (one, two):
            answer = await http.answer()
            assert (answer.status, "transfer-encoding" in answer.headers) == (status, False)
            assert await http.alive()
        assert len(it.at.node.jobs.jobs) == 2
        assert it.at.node.counters.updates["http", "accepted"] == 2


@asynccontextmanager
async def waiting_batch(path: Path) -> AsyncIterator[tuple[Slow, Http]]:
    """A batch of several portions, of which the first is under way."""
    async with slow(path) as it, connect(it.at) as http:
        updates = [{"jobId": f"job-{number}", "userId": "u"} for number in range(500)]
        await http.send(request_bytes("POST", "/api/v2/updates", body=updates))
        await until(lambda: it.broker._waiting_entries == 500)
        await until(lambda: not it.at.node.poller._waiting)
        assert it.at.node.limits.unfinished > 100_000, "it counts until it is answered"
        yield it, http


async def test_a_batch_that_waits_for_several_commits_takes_no_task_either(tmp_path: Path) -> None:
    async with waiting_batch(tmp_path) as (it, http):
        await trio.testing.wait_all_tasks_blocked()
        assert not it.at.node.jobs.jobs
        it.go.set()
        answer = await http.answer()
        assert (answer.status, answer.json["accepted"], len(it.at.node.jobs.jobs)) == (200, 500, 500)
        assert answer.json["id"].endswith(":500")
        assert it.at.node.limits.unfinished == 0
        assert await http.alive()


async def test_a_batch_whose_publisher_is_gone_leaves_nothing_behind_but_its_updates(tmp_path: Path) -> None:
    async with waiting_batch(tmp_path) as (it, http):
        reset_connection(http)
        await until(lambda: not it.at.node.connections)
        assert (it.at.node.limits.unfinished, it.at.node._busy) == (0, 0)
        it.go.set()
        await until(lambda: len(it.at.node.jobs.jobs) == 500)


async def test_a_batch_of_which_a_portion_is_lost_is_a_503(tmp_path: Path) -> None:
    async with waiting_batch(tmp_path) as (it, http):
        database = it.broker._file._db
        (pages,) = database.execute("PRAGMA page_count").fetchone()
        database.execute(f"PRAGMA max_page_count = {pages}")
        it.go.set()
        answer = await http.answer()
        assert (answer.status, answer.json["error"]["code"]) == (503, "store_unavailable")
        assert (it.at.node.limits.unfinished, it.at.node.jobs.jobs) == (0, {})
        assert await http.alive()


async def test_a_refusal_that_rests_on_what_is_not_kept_yet_waits_with_it(tmp_path: Path) -> None:
    async with slow(tmp_path) as it, connect(it.at) as one, connect(it.at) as two, connect(it.at) as three:
        await it.begin(one, "a", userId="u", status="completed")
        await it.begin(two, "a", progress=5)
        await it.begin(three, "a", "/api/brand-monitor/progress/{}/complete")
        it.go.set()
        assert (await one.answer()).status == 200
        refused = await two.answer()
        assert (refused.status, refused.json["error"]["code"]) == (409, "job_ended")
        in_words = await three.answer()  # the job is none of this view's
        assert (in_words.status, in_words.json["error"]["code"]) == (404, "task_not_found")
        assert await two.alive()


@pytest.mark.parametrize("accepted", [True, False])
async def test_who_has_half_closed_gets_the_answer(tmp_path: Path, accepted: bool) -> None:
    """Whatever it is: nothing of it has been said before."""
    async with slow(tmp_path) as it, connect(it.at) as one, connect(it.at) as http:
        await it.begin(one, "a", userId="u", status="completed")
        await it.begin(http, "a", **({"attempt": 2} if accepted else {"progress": 1}))
        half_close(http)
        await until(
            lambda: [peer for peer in it.at.node.poller.peers.values() if getattr(peer, "_listens_for", 1) == 0]
        )
        it.go.set()
        assert (await http.answer()).status == (200 if accepted else 409)
        assert await http.closed()


async def test_what_was_pipelined_behind_it_is_answered_after_it(tmp_path: Path) -> None:
    async with slow(tmp_path) as it, connect(it.at) as http:
        await it.begin(http, "a", userId="u")
        await http.send(request_bytes("GET", "/api/v2/jobs/a") + request_bytes("GET", "/health"))
        await trio.testing.wait_all_tasks_blocked()
        it.go.set()
        assert (await http.answer()).json["version"] == 1
        assert (await http.answer()).json["jobId"] == "a"
        assert (await http.answer()).json == {"status": "ok"}


@pytest.mark.parametrize("go", [close, reset_connection])
async def test_who_is_gone_leaves_nothing_behind_but_the_update(tmp_path: Path, go: Callable[[Http], object]) -> None:
    async with slow(tmp_path) as it, connect(it.at) as http:
        await it.begin(http, "a", userId="u")
        go(http)
        it.go.set()
        await until(lambda: it.at.node.jobs.get("a"))
        await until(lambda: not it.at.node.connections)
        assert not it.at.node._busy


async def test_a_commit_that_fails_is_a_503_for_each(tmp_path: Path) -> None:
    async with slow(tmp_path) as it, connect(it.at) as one, connect(it.at) as two:
        await it.begin(one, "a", userId="u", metadata=BIG)
        await it.begin(two, "b", userId="u", metadata=BIG)
        database = it.broker._file._db
        (pages,) = database.execute("PRAGMA page_count").fetchone()
        database.execute(f"PRAGMA max_page_count = {pages}")
        it.go.set()
        for http in (one, two):
            answer = await http.answer()
            assert (answer.status, answer.json["error"]["code"]) == (503, "store_unavailable")
            assert answer.headers["retry-after"]
        assert it.at.node.counters.updates["http", "rejected"] == 2
        assert not it.at.node.jobs.jobs
        database.execute("PRAGMA max_page_count = 1000000")
        await one.send(request_bytes("POST", TARGET.format("a"), body={"userId": "u"}))
        assert (await one.answer()).json["version"] == 1


async def test_a_websocket_that_is_ahead_of_a_disk_that_fails_is_told_once_of_each(tmp_path: Path) -> None:
    async with slow(tmp_path) as it, session(it.at) as ws:
        (reader,) = it.at.node.streams

        def is_ahead(by: int) -> bool:
            return reader.unanswered == by  # type: ignore[attr-defined,no-any-return]

        for number in range(MAX_UNANSWERED + 1):  # the last of them waits
            await ws.send("publish", ref=number, updates=[{"jobId": "a", "userId": "u", "metadata": BIG}])
            await until(partial(is_ahead, number + 1))
        await ws.send("ping", ref="last")
        database = it.broker._file._db
        (pages,) = database.execute("PRAGMA page_count").fetchone()
        database.execute(f"PRAGMA max_page_count = {pages}")
        it.go.set()
        answers = await ws.messages(MAX_UNANSWERED + 2)
        assert [answer["ref"] for answer in answers] == [*range(MAX_UNANSWERED + 1), "last"]
        assert {answer["type"] for answer in answers[:-1]} == {"error"}


async def test_a_websocket_whose_answers_are_long_gets_no_further_ahead_of_the_disk(tmp_path: Path) -> None:
    """Else as many of them would be held as may be without an answer."""
    async with slow(tmp_path) as it, session(it.at) as ws, trio.open_nursery() as nursery:

        async def publish() -> None:  # which may find the socket full: the second is not read yet
            for name in "ab":
                await ws.send("publish", ref=name * 100_000, updates=[{"jobId": name, "userId": "u"}])

        nursery.start_soon(publish)
        await until(lambda: it.broker._waiting_entries)
        await trio.testing.wait_all_tasks_blocked()
        assert it.broker._waiting_entries == 1
        it.go.set()
        assert [answer["ref"] for answer in await ws.messages(2)] == ["a" * 100_000, "b" * 100_000]


@pytest.mark.parametrize(
    ("method", "target", "body"),
    [
        ("POST", TARGET.format("b"), {"userId": "u"}),
        ("DELETE", "/api/v2/jobs/a", None),
        ("POST", "/api/v2/jobs/a/cancel", {}),
        ("PUT", "/api/projects/p", {"userId": "u"}),
        ("POST", "/api/v2/updates", [{"jobId": "b", "userId": "u"}]),
        ("POST", "/api/sse/message", {"target": "broadcast", "event": "e", "data": 1}),
    ],
)
async def test_a_disk_that_takes_too_long_is_a_503(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, target: str, body: object
) -> None:
    monkeypatch.setattr(publishing, "PATIENCE_S", 0.1)
    async with slow(tmp_path) as it, connect(it.at) as http:
        it.go.set()
        put(it.at, "a")
        await until(lambda: it.at.node.jobs.get("a"))
        it.go.clear()
        answer = await http.request(method, target, body=body)
        assert (answer.status, answer.json["error"]["code"]) == (503, "store_unavailable")
        assert "0.1 s" in answer.json["error"]["message"]
        counters = it.at.node.counters
        if target != "/api/v2/updates":  # a batch is counted when it is known what became of it
            assert counters.updates["http", "rejected"] + counters.notices["rejected"] == 1
        it.go.set()
        await until(lambda: it.at.node.history.last == 2)  # which it could not know
        assert await http.alive()


async def test_a_server_that_stops_meanwhile_keeps_it(tmp_path: Path) -> None:
    async with clean_server(store={"url": f"sqlite:{tmp_path}/jobs.db"}) as at:
        it = Slow(at)
        async with connect(at) as http:
            await it.begin(http, "a", userId="u")
            it.go.set()
    async with clean_server(store={"url": f"sqlite:{tmp_path}/jobs.db"}) as at:
        assert at.node.jobs.get("a") is not None
