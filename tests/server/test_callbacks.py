"""Callbacks: a real application is told by a real server which jobs have ended, whatever happens to either."""

from __future__ import annotations

import hashlib
import hmac
import json
import signal
import time
import tracemalloc
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Final

import httpx
import pytest
import trio

from server import callbacks
from server.config import Callback
from server.seen import Seen
from tests.redis_servers import RedisServer
from tests.streams import event_stream, lose_log, put, session
from tests.support import ADMIN, AUTH, InProcess, answering, bearer, server, spawned, until, until_so

pytestmark = pytest.mark.slow

SECRET: Final = "a secret that is shared"
MIB: Final = 1024 * 1024
USER: Final = bearer("alice")


class Application:
    """Gets callbacks.

    ``statuses`` are its answers in turn, the last of them for ever. With ``hang`` it never answers, with ``down`` it
    closes the connection instead. ``size`` is the length of its answers, with ``endless`` they have no end.
    """

    def __init__(self) -> None:
        self.port = 0
        self.got: list[tuple[dict[str, str], dict[str, Any]]] = []
        self.statuses = [200]
        self.retry_after = ""
        self.size = 0
        self.hang = False
        self.down = False
        self.endless = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/ended"

    @property
    def jobs(self) -> list[str]:
        return [body["jobId"] for _, body in self.got]

    async def serve(self, stream: trio.SocketStream) -> None:
        with suppress(trio.BrokenResourceError):  # the server was killed
            await self._serve(stream)

    async def _serve(self, stream: trio.SocketStream) -> None:
        received = b""
        while data := await stream.receive_some():
            received += bytes(data)
            head, end, rest = received.partition(b"\r\n\r\n")
            if not end:
                continue
            line, *fields = head.decode().split("\r\n")
            assert line == "POST /ended HTTP/1.1"
            headers = {name.lower(): value for name, _, value in (field.partition(": ") for field in fields)}
            size = int(headers["content-length"])
            if len(rest) < size:
                continue
            body, received = rest[:size], rest[size:]
            if self.hang:
                await trio.sleep_forever()
            if self.down:
                return
            if "x-signature-256" in headers:
                text = headers["x-timestamp"].encode() + b"." + body
                good = hmac.new(SECRET.encode(), text, hashlib.sha256).hexdigest()
                assert headers["x-signature-256"] == f"sha256={good}"
            self.got.append((headers, json.loads(body)))
            status = self.statuses[0] if len(self.statuses) == 1 else self.statuses.pop(0)
            more = f"Retry-After: {self.retry_after}\r\n" if self.retry_after else ""
            if self.endless:
                await stream.send_all(b"HTTP/1.1 200 X\r\n\r\n")
                while True:
                    await stream.send_all(bytes(MIB))
            await stream.send_all(f"HTTP/1.1 {status} X\r\nContent-Length: {self.size}\r\n{more}\r\n".encode())
            for start in range(0, self.size, MIB):
                await stream.send_all(bytes(min(MIB, self.size - start)))


@asynccontextmanager
async def application() -> AsyncIterator[Application]:
    app = Application()
    async with answering(app.serve) as app.port:
        yield app


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(callbacks, "RETRY_S", 0.01)
    monkeypatch.setattr(callbacks, "MARK_EVERY_S", 0.01)


def mail(app: Application, **keys: object) -> dict[str, Any]:
    return {"callbacks.mail": {"url": app.url, **keys}}


def teller(at: InProcess) -> callbacks.Teller:
    assert at.node.callbacks is not None
    return at.node.callbacks.tellers[0]


async def settled(at: InProcess) -> None:
    """Everything that has ended so far is settled."""
    mark = teller(at)
    await until(lambda: mark._epoch == at.node.history.epoch and mark._after == at.node.history.last)
    await until(lambda: not mark.waiting)


async def test_endings_are_told_once_and_signed() -> None:
    async with application() as app, server(**mail(app, secret=SECRET)) as at:
        put(at, "j1", status="processing", progress=5)
        put(at, "j1", status="completed", result={"file": "a.csv"}, kind="export")
        put(at, "j2", status="failed", error="no disk")
        put(at, "j3", status="cancelled")
        put(at, "j4", status="queued")
        await settled(at)
        assert sorted(app.jobs) == ["j1", "j2", "j3"]
        headers, body = next(each for each in app.got if each[1]["jobId"] == "j1")
        assert headers["content-type"] == "application/json; charset=utf-8"
        assert headers["idempotency-key"].startswith("mail:j1:2:")
        record = json.loads((await at.get("/api/v2/jobs/j1")).body)
        extra = {"type": "job_completed", "callback": "mail", "unseen": False}
        assert body == record | extra | {"id": f"{at.node.history.epoch}:2", "sentAt": body["sentAt"]}
        assert teller(at).counts.told == 3


async def test_of_an_answer_without_end_only_the_status_counts() -> None:
    async with application() as app, server(**mail(app, timeout=1)) as at:
        app.endless = True
        put(at, "j1", status="completed")
        await settled(at)
        assert (teller(at).counts.told, app.jobs) == (1, ["j1"])


async def test_only_what_was_asked_for_is_told() -> None:
    async with application() as app, server(**mail(app, types="job_failed", kinds="export,import")) as at:
        put(at, "j1", status="failed", kind="export")
        put(at, "j2", status="failed", kind="video")
        put(at, "j3", status="failed")
        put(at, "j4", status="completed", kind="export")
        await settled(at)
        assert app.jobs == ["j1"]
        assert "x-signature-256" not in app.got[0][0]


async def test_what_fails_in_passing_is_tried_again_and_readers_do_not_wait() -> None:
    async with application() as app, server(**mail(app, concurrency=1, timeout=0.05)) as at, session(at) as ws:
        await ws.subscribe()
        app.hang = True
        put(at, "j1", status="completed")
        assert (await ws.receive())["type"] == "job_completed"
        await until(lambda: teller(at).counts.failed)
        app.hang = False
        app.statuses = [500, 503, 429, 522, 204]  # 522: a proxy that does not reach it
        await settled(at)
        assert set(app.jobs) == {"j1"}
        assert not app.statuses[1:]  # every one of them was heard; on a slow machine the last one was, too late
        assert len({headers["idempotency-key"] for headers, _ in app.got}) == 1
        assert teller(at).counts.told == 1


@pytest.mark.parametrize("status", [301, 400, 404, 410])
async def test_what_will_not_pass_is_given_up(status: int, caplog: pytest.LogCaptureFixture) -> None:
    async with application() as app, server(**mail(app)) as at:
        app.statuses = [status, 200]
        put(at, "j1", status="completed")
        await settled(at)
        put(at, "j2", status="completed")
        await settled(at)
        assert app.jobs == ["j1", "j2"]
        assert (teller(at).counts.told, teller(at).counts.given_up) == (1, 1)
        assert "callback_given_up" in caplog.text


async def test_an_answer_may_be_as_long_as_it_likes() -> None:
    async with application() as app, server(**mail(app)) as at:
        app.size = 32 * MIB
        tracemalloc.start()
        try:
            put(at, "a", status="completed")
            await until(lambda: teller(at).counts.told)
            _, most = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert most < 16 * MIB
        assert app.jobs == ["a"]


async def test_there_is_an_end_to_trying() -> None:
    async with application() as app, server(**mail(app, give_up_after=0.05)) as at:
        app.statuses = [500]
        put(at, "j1", status="completed")
        await settled(at)
        assert teller(at).counts.given_up == 1


async def test_the_application_says_when_to_come_again() -> None:
    async with application() as app, server(**mail(app)) as at:
        app.statuses, app.retry_after = [503, 200], "1"
        before = trio.current_time()
        put(at, "j1", status="completed")
        await settled(at)
        assert trio.current_time() - before >= 1.0
        assert app.jobs == ["j1", "j1"]


async def test_more_than_can_wait_waits_in_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(callbacks, "MAX_WAITING", 3)
    monkeypatch.setattr(callbacks, "TAKE", 2)
    async with application() as app, server(**mail(app)) as at:
        app.down = True
        for number in range(20):
            put(at, f"j{number}", status="completed")
        await until(lambda: teller(at).counts.failed > 5)
        assert teller(at).waiting <= 4  # no more than one reading of the log above the bound
        app.down = False
        await settled(at)
        assert Counter(app.jobs) == Counter(f"j{number}" for number in range(20))


async def test_whose_turn_is_over_holds_nothing() -> None:
    async with application() as app, server() as at, httpx.AsyncClient() as client:
        app.down = True
        node = at.node
        source = callbacks.Source(node.broker, node.history, node.jobs, node.seen)
        one = callbacks.Teller("mail", Callback(url=app.url), source)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one.run, client)
            await until(lambda: one._epoch)
            put(at, "a", status="completed")
            one.wake()
            await until(lambda: one.counts.failed)
            assert one.waiting == 1
            nursery.cancel_scope.cancel()
        assert one.waiting == 0
        assert not one._due


async def test_when_the_log_is_lost_the_records_tell() -> None:
    async with application() as app, server(**mail(app)) as at:
        put(at, "j1", status="completed")
        await settled(at)
        app.down = True
        put(at, "j2", status="completed")
        await until(lambda: teller(at).waiting)
        put(at, "j3", status="processing")
        lose_log(at)
        app.down = False
        await settled(at)
        # A try that was under way when the log was lost may have told one of them already.
        assert set(app.jobs) == {"j1", "j2"}
        assert len({headers["idempotency-key"] for headers, _ in app.got}) == 2


# --- nobody saw it ---


async def test_only_what_nobody_saw_is_told() -> None:
    async with application() as app, server(auth=AUTH, **mail(app, unseen_after=0.3)) as at:
        async with session(at, headers=USER), event_stream(at, headers=bearer("carol")):
            put(at, "online", user="alice", status="completed")
            put(at, "stream", user="carol", status="completed")
            put(at, "nobody", user="bob", status="completed")
            put(at, "left", user="carol", status="completed")
        put(at, "polled", user="dave", status="completed")
        put(at, "watched-by-another", user="erin", status="completed")
        assert (await at.get("/api/v2/jobs/poll?timeout=0", bearer("dave"))).status == 200
        assert (await at.get("/api/v2/jobs", ADMIN)).status == 200
        await settled(at)
        assert sorted(app.jobs) == ["nobody", "watched-by-another"]
        assert all(body["unseen"] for _, body in app.got)
        assert teller(at).counts.seen == 4


async def test_who_comes_in_time_has_seen_it() -> None:
    async with application() as app, server(auth=AUTH, **mail(app, unseen_after=0.5)) as at:
        put(at, "j1", user="alice", status="completed")
        assert (await at.get("/api/v2/jobs/j1", USER)).status == 200
        await until(lambda: time.time() * 1000 > at.node.seen._last["alice"][0] + 1)
        put(at, "j2", user="alice", status="completed")
        await settled(at)
        assert app.jobs == ["j2"]


# --- restarts, and several nodes ---


async def test_a_restart_forgets_nothing_and_repeats_nothing(tmp_path: Path) -> None:
    store = {"store": {"url": f"sqlite:{tmp_path / 'jobs.db'}"}}
    async with application() as app:
        async with server(**store) as at:
            put(at, "before", status="completed")  # nobody was to be told then
        async with server(**store, **mail(app)) as at:
            await at.publish("told", userId="alice", status="completed")
            await settled(at)
            app.down = True
            await at.publish("not-told", userId="alice", status="completed")
            await until(lambda: teller(at).waiting)
        app.down = False
        async with server(**store) as at:
            await at.publish("meanwhile", userId="alice", status="completed")
        async with server(**store, **mail(app)) as at:
            await until(lambda: teller(at)._epoch)
            await settled(at)
        assert Counter(app.jobs) == Counter(["told", "not-told", "meanwhile"])


async def test_killed_before_it_told(tmp_path: Path) -> None:
    async with application() as app:
        app.statuses = [503]
        async with spawned(tmp_path, **mail(app)) as at:
            await at.publish("j1", userId="alice", status="completed")
            await until(lambda: app.got)
            at.signal(signal.SIGKILL)
            await at.exit_status()
        app.statuses = [200]
        app.got.clear()
        async with spawned(tmp_path, **mail(app)) as at:
            await until(lambda: app.got)
        assert app.jobs == ["j1"]


async def test_of_several_nodes_one_tells(redis: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(callbacks, "LEASE_S", 1.0)
    store = {"store": {"url": redis.url}}
    async with application() as app, trio.open_nursery() as nursery:
        first = await nursery.start(_node, {**store, **mail(app, unseen_after=0.2)})
        await until(lambda: teller(first)._epoch)
        async with server(**store, **mail(app, unseen_after=0.2)) as second:
            for number in range(20):
                at = second if number % 2 else first
                await at.publish(f"a{number}", userId=f"user{number}", status="completed")
            await until(lambda: len(app.got) == 20)
            # Who read it on the other node has seen it, too.
            await first.publish("seen", userId="zoe", status="completed")
            async with session(second) as ws:
                await ws.subscribe(jobIds=["seen"])
            await second.publish("last", userId="yann", status="completed")
            nursery.cancel_scope.cancel()  # the first goes, the other takes over
            for number in range(20):
                await second.publish(f"b{number}", userId=f"user{number}", status="completed")
            wanted = {f"{letter}{number}" for letter in "ab" for number in range(20)} | {"last"}
            await until(lambda: wanted <= set(app.jobs))
            assert max(Counter(app.jobs).values()) <= 2


async def test_who_asks_again_and_again_is_seen_by_other_nodes_all_the_time(redis: RedisServer) -> None:
    store = {"store": {"url": redis.url}}
    async with application() as app, server(**store, **mail(app, unseen_after=60)) as at, server(**store) as other:
        assert at.node.shared is not None
        assert other.node.shared is not None
        now = 1000.0
        seen = Seen(at.node.presence, at.node.shared, wanted=True, clock=lambda: now)
        elsewhere = Seen(other.node.presence, other.node.shared, wanted=True)
        for _ in range(10):
            now += 0.6
            seen.note("ann")
            await until_so(partial(elsewhere.since, "ann", int(now * 1000)))  # it is on its way


async def _node(tables: dict[str, Any], task_status: trio.TaskStatus[InProcess]) -> None:
    async with server(**tables) as at:
        task_status.started(at)
        await trio.sleep_forever()
