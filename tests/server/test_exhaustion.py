"""Descriptors, connections, disk: what a server does when there are no more."""

from __future__ import annotations

import errno
import resource
import signal
import socket
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import trio

from server import listener, node
from server.poller import Peer
from tests.streams import EVENT_SOURCE
from tests.support import AUTH, PATIENCE_S, WORKER, Address, Http, bearer, server, spawned, until, until_answered

pytestmark = pytest.mark.slow
JOBS = "/api/v2/jobs"


# --- too many -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
async def test_running_out_of_descriptors_is_survived(tmp_path: Path) -> None:
    async with spawned(tmp_path, descriptors=64) as at, at.connect() as first:
        assert (await first.request("GET", "/health")).status == 200
        async with AsyncExitStack() as stack:
            for _ in range(80):
                await stack.enter_async_context(at.connect())
            await at.logged("accept_paused")
            assert (await first.request("POST", f"{JOBS}/j/updates", body={"userId": "a"})).status == 200
        assert (await at.get(f"{JOBS}/j")).status == 200, "it accepts again"
        assert at.log().count("accept_paused") < 5
        assert "few_descriptors" in at.log()
        at.signal(signal.SIGTERM)
        assert await at.exit_status() == 0


class Scarce(socket.socket):
    """A listener that finds no free descriptor the first times."""

    left = 3

    def _accept(self) -> tuple[int, Any]:
        if self.left:
            self.left -= 1
            raise OSError(errno.EMFILE, "Too many open files")
        return super()._accept()


async def test_a_pause_in_accepting_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(listener, "EXHAUSTED_PAUSE_S", 0.01)
    with Scarce() as scarce:
        scarce.bind(("127.0.0.1", 0))
        scarce.listen()
        scarce.setblocking(False)
        async with server() as at:
            at.node.poller.add(scarce.fileno(), listener.Listener(at.node, scarce))
            assert (await Address(scarce.getsockname()[1]).get("/health")).status == 200
    assert (scarce.left, caplog.text.count("accept_paused")) == (0, 1)


async def test_who_cannot_be_served_leaves_nothing_and_others_are(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The kernel has no room for one more socket to wait for, or there is no memory: neither ends accepting."""
    monkeypatch.setattr(listener, "EXHAUSTED_PAUSE_S", 0.01)
    async with server(limits={"connections_per_address": 10}) as at, at.connect() as first:
        assert (await first.request("GET", "/health")).status == 200
        left: list[Exception] = [OSError(errno.ENOSPC, "No space left on device"), MemoryError()]

        def add(fd: int, peer: Peer, really: Callable[[int, Peer], None] = at.node.poller.add) -> None:
            if left:
                raise left.pop()
            really(fd, peer)

        monkeypatch.setattr(at.node.poller, "add", add)
        while left:
            async with at.connect() as refused:
                assert await gone(refused)
        assert (await at.get("/health")).status == 200
        assert (await first.request("GET", "/health")).status == 200
        await until(lambda: at.node.connections == 1)
        assert at.node.limits.entries == 1
        assert caplog.text.count("accept_paused") == 1
        assert "connection_failed" not in caplog.text


async def test_over_max_connections_a_client_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node, "REFUSED_SOCKETS", 1)
    async with server(server={"max_connections": 2}) as at, AsyncExitStack() as stack:
        held = [await stack.enter_async_context(at.connect()) for _ in range(2)]
        for http in held:
            assert (await http.request("GET", JOBS)).status == 200
        refused = await at.get(JOBS)
        assert (refused.status, refused.error) == (503, "too_many_connections")
        assert int(refused.headers["retry-after"]) >= 1
        await until(lambda: at.node.connections == 2)
        stream = await at.get(f"{JOBS}/stream", EVENT_SOURCE)
        assert (stream.status, b'"code":"try_later"' in stream.body) == (200, True)
        await until(lambda: at.node.connections == 2)
        assert (await at.get("/health")).status == 200
        await until(lambda: at.node.connections == 2)
        async with at.connect() as one, at.connect() as unheard:
            await until(lambda: at.node.connections == 3)
            assert await gone(unheard), "beyond a bound it is closed unheard"
            assert (await one.request("GET", JOBS)).status == 503
        assert (await held[0].request("GET", JOBS)).status == 200, "who is in stays in"
        await held[1].aclose()
        await until(lambda: at.node.connections == 1)
        assert (await at.get(JOBS)).status == 200


async def gone(http: Http) -> bool:
    with trio.fail_after(PATIENCE_S):
        try:
            return await http.stream.receive_some() == b""
        except trio.BrokenResourceError:
            return True


# --- disk full ----------------------------------------------------------------------------------------------------


async def test_a_full_disk_refuses_publishes_and_nothing_else(tmp_path: Path) -> None:
    async with server(auth=AUTH, store={"url": f"sqlite:{tmp_path}/s.db"}) as at:
        alice = bearer("alice")
        first = await at.publish("j1", WORKER, userId="alice", progress=1)
        database: Any = at.node.broker._file._db  # type: ignore[attr-defined]
        (pages,) = database.execute("PRAGMA page_count").fetchone()
        database.execute(f"PRAGMA max_page_count = {pages}").fetchone()
        # As large as an update may be, so that free pages do not help.
        large = {"metadata": {"text": "x" * 60_000}, "userId": "alice"}
        for method, target, body in (
            ("POST", f"{JOBS}/j1/updates", large),
            ("POST", JOBS, large | {"jobId": "j2"}),
            ("POST", "/api/v2/updates", [large | {"jobId": "j1", "progress": 2}, {"jobId": "j1", "progress": 3}]),
        ):
            answer = await at.ask(method, target, body, WORKER)
            assert (answer.status, answer.error) == (503, "store_unavailable"), target
            assert int(answer.headers["retry-after"]) >= 1
        answer = await at.get("/ready")
        assert (answer.status, "full" in answer.json["reason"], "retry-after" in answer.headers) == (503, True, True)
        assert (await at.get("/health")).status == 200
        assert (await at.get(f"{JOBS}/j1", alice)).json["version"] == 1, "nothing of it shows"
        assert (await at.get(f"{JOBS}/j2", alice)).status == 404
        polled = (await at.get(f"{JOBS}/poll?timeout=0&last_seen={first.json['id']}", alice)).json
        assert (polled["updates"], polled["reset"]) == ([], False)

        database.execute(f"PRAGMA max_page_count = {pages + 10_000}").fetchone()
        await until_answered(at, "/ready", 200)
        again = await at.publish("j1", WORKER, **large)
        assert again.json["id"] == f"{at.node.history.epoch}:2", "positions were not used up"
    async with server(auth=AUTH, store={"url": f"sqlite:{tmp_path}/s.db"}) as at:
        assert (await at.get(f"{JOBS}/j1", alice)).json["version"] == 2


@pytest.mark.slow
async def test_a_really_full_disk(tmp_path: Path) -> None:
    """The kernel's own limit on the size of a file: what SQLite meets is a write that fails."""
    async with spawned(tmp_path, store={"url": "sqlite:s.db"}) as at:
        await at.publish("j1", userId="alice")
        # Half a megabyte is more than what there is, and less than what comes.
        resource.prlimit(at.process.pid, resource.RLIMIT_FSIZE, (512 * 1024, resource.RLIM_INFINITY))
        accepted = 0
        while True:
            answer = await at.post(f"{JOBS}/j1/updates", {"metadata": {"text": "x" * 60_000}})
            if answer.status != 200:
                break
            accepted += 1
            assert accepted < 100
        assert (answer.status, answer.error) == (503, "store_unavailable")
        assert (await at.get("/ready")).status == 503
        assert (await at.get(f"{JOBS}/j1")).json["version"] == 1 + accepted
        resource.prlimit(at.process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        await until_answered(at, "/ready", 200)
        assert (await at.publish("j1", progress=5)).json["version"] == 2 + accepted
        at.signal(signal.SIGTERM)
        assert await at.exit_status() == 0
    async with spawned(tmp_path, store={"url": "sqlite:s.db"}) as at:
        assert (await at.get(f"{JOBS}/j1")).json["version"] == 2 + accepted
