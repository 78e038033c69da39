"""How a server ends: signals, streams and requests that are under way, and those that come meanwhile."""

from __future__ import annotations

import re
import signal
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import trio

from server.app import drain
from tests.streams import EVENT_SOURCE
from tests.support import PATIENCE_S, request_bytes, server, spawned, until_answered

pytestmark = pytest.mark.slow
JOBS = "/api/v2/jobs"


async def test_sigterm_drains(tmp_path: Path) -> None:
    async with spawned(tmp_path, server={"drain": 3}) as at, AsyncExitStack() as stack:
        last = await at.publish("j1", userId="alice")
        idle, poll, stream, slow = [await stack.enter_async_context(at.connect()) for _ in range(4)]
        await idle.request("GET", "/health")
        await stream.send(request_bytes("GET", f"{JOBS}/stream"))
        assert (await stream.head())[0] == 200
        await poll.send(request_bytes("GET", f"{JOBS}/poll?timeout=60&last_seen={last.json['id']}"))
        body = b'{"jobId":"j2"}'
        await slow.send(
            request_bytes("POST", JOBS, headers={"Content-Length": str(len(body)), "Expect": "100-continue"})
        )
        assert (await slow.head())[0] == 100

        started = trio.current_time()
        at.signal(signal.SIGTERM)
        answer = await until_answered(at, "/ready", 503)
        assert (answer.status, answer.json["reason"], "retry-after" in answer.headers) == (503, "draining", True)
        assert (await at.get("/health")).status == 200
        for method, target in (
            ("GET", JOBS),
            ("POST", JOBS),
            ("GET", "/"),
            ("GET", f"{JOBS}/poll"),
            ("GET", "/ws/jobs"),
            ("GET", "/nowhere"),
            ("PUT", JOBS),
        ):
            refused = await at.ask(method, target, {} if method == "POST" else None)
            assert (refused.status, refused.error, refused.headers["connection"]) == (503, "try_later", "close"), target
            assert int(refused.headers["retry-after"]) >= 1
        later = await at.get(f"{JOBS}/stream", EVENT_SOURCE)
        assert later.status == 200
        assert re.match(rb'retry: \d+\ndata: \{"type":"error","code":"try_later"', later.body)
        assert (await idle.request("GET", JOBS)).status == 503, "on a connection that was there, too"

        polled = await poll.answer()
        assert (polled.status, polled.json["updates"], polled.json["timedOut"]) == (200, [], False)
        await slow.send(body)
        assert (await slow.answer()).status == 201, "what was under way is finished"
        with trio.fail_after(PATIENCE_S):
            text = b"".join([piece async for piece in stream.chunks()])
        assert re.search(rb'retry: \d+\nid: \w+:\d+\ndata: \{"type":"error","code":"try_later"', text)
        assert await stream.closed()
        assert await at.exit_status() == 0
        assert trio.current_time() - started >= 3, "streams are closed over `drain` seconds, the rest waits"
        assert "drained" in at.log()
    async with spawned(tmp_path) as at:
        assert (await at.get(f"{JOBS}/j2")).status == 200


async def test_a_second_sigterm_ends_at_once(tmp_path: Path) -> None:
    async with spawned(tmp_path, server={"drain": 600}) as at, at.connect() as stream:
        await stream.send(request_bytes("GET", f"{JOBS}/stream"))
        await stream.head()
        at.signal(signal.SIGTERM)
        await until_answered(at, "/ready", 503)
        at.signal(signal.SIGTERM)
        assert await at.exit_status() == 0
        assert "second signal" in at.log()


async def test_an_interrupt_with_nobody_there_does_not_wait(tmp_path: Path) -> None:
    async with spawned(tmp_path, server={"drain": 600}) as at:
        at.signal(signal.SIGINT)
        assert await at.exit_status() == 0


async def test_accepted_updates_are_flushed_though_their_request_never_ends(tmp_path: Path) -> None:
    async with spawned(tmp_path) as at, at.connect() as http:
        headers = {"Content-Type": "application/x-ndjson", "Content-Length": "100000"}
        lines = b"".join(b'{"jobId":"j%d","userId":"alice"}\n' % number for number in range(300))
        await http.send(request_bytes("POST", "/api/v2/updates", headers=headers) + lines)
        await until_answered(at, f"{JOBS}/j299", 200)
        await http.aclose()
        at.signal(signal.SIGTERM)
        assert await at.exit_status() == 0
    async with spawned(tmp_path) as at:
        assert len((await at.get(f"{JOBS}?limit=1000")).json["jobs"]) == 300


async def test_lines_that_go_on_are_answered_when_the_drain_is_over(tmp_path: Path) -> None:
    async with spawned(tmp_path, server={"drain": 1}) as at, at.connect() as http:
        headers = {"Content-Type": "application/x-ndjson", "Content-Length": "100000"}
        await http.send(request_bytes("POST", "/api/v2/updates", headers=headers))
        for number in range(3):
            await http.send(b'{"jobId":"j%d","userId":"alice"}\n' % number)
            await until_answered(at, f"{JOBS}/j{number}", 200)
        at.signal(signal.SIGTERM)
        await until_answered(at, "/ready", 503)
        await http.send(b'{"jobId":"j0","progress":7}\n{"jobId":"j1","progr')
        answer = await http.answer()
        assert (answer.status, answer.error, answer.headers["retry-after"]) == (503, "try_later", "1")
        assert "4 updates of this request were read" in answer.json["error"]["message"]
        assert await at.exit_status() == 0
    async with spawned(tmp_path) as at:
        assert (await at.get(f"{JOBS}/j0")).json["progress"] == 7


async def test_streams_that_are_opened_while_draining_are_ended_too() -> None:
    async with server() as at:
        drained: list[int] = []

        class Late:
            def drain(self, delay_ms: int) -> None:
                drained.append(delay_ms)

        class Early(Late):
            def drain(self, delay_ms: int) -> None:
                super().drain(delay_ms)
                del at.node.streams[self]
                at.node.streams[late] = None

        late = Late()
        at.node.streams[Early()] = None
        await drain(at.node, 0)
        assert len(drained) == 2
