"""``statuswire serve --workers N``: several processes as one server, with real Redis and real signals."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.redis_servers import RedisServer, free_ports
from tests.streams import WebSocket, event_stream, session, websocket
from tests.support import Spawned, command, spawned, until, until_answered, until_so, write_config

pytestmark = pytest.mark.slow

WORKERS = 3


@asynccontextmanager
async def workers(redis: RedisServer, home: Path, **server: Any) -> AsyncIterator[Spawned]:
    os.makedirs(home, exist_ok=True)
    async with spawned(
        home, server={"workers": WORKERS, **server}, store={"url": redis.url}, log={"format": "json"}
    ) as running:
        yield running


def children(running: Spawned) -> set[int]:
    """The workers' process ids."""
    pid = running.process.pid
    return {int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


async def sessions(stack: AsyncExitStack, at: Spawned) -> dict[str, WebSocket]:
    """One connection to each worker. The first digits of a client id name the process."""
    found: dict[str, WebSocket] = {}
    with trio.fail_after(60):
        while len(found) < WORKERS:
            ws = await stack.enter_async_context(websocket(at))
            process = (await ws.receive())["clientId"][:8]
            if process not in found:
                await ws.subscribe()
                found[process] = ws
    return found


async def test_connections_are_spread_and_what_one_takes_all_show(redis: RedisServer, tmp_path: Path) -> None:
    async with workers(redis, tmp_path / "home") as at, AsyncExitStack() as stack:
        assert f"{WORKERS} workers" in at.start_line
        assert at.port > 0
        assert len(children(at)) == WORKERS
        found = await sessions(stack, at)
        for number in range(WORKERS):
            await at.publish(f"job-{number}", userId="ann", message=str(number))
        for ws in found.values():
            seen = [(await ws.receive())["jobId"] for _ in range(WORKERS)]
            assert seen == [f"job-{number}" for number in range(WORKERS)]


async def test_a_worker_that_was_killed_is_replaced_and_its_readers_resume(redis: RedisServer, tmp_path: Path) -> None:
    async with workers(redis, tmp_path / "home") as at, AsyncExitStack() as stack:
        await sessions(stack, at)
        before = children(at)
        await at.publish("job-1", userId="ann", progress=1)
        streams = [await stack.enter_async_context(event_stream(at, jobIds="job-1")) for _ in range(12)]
        for stream in streams:
            await stream.until("snapshot")
        cursors = {stream.last_id for stream in streams}
        victim = min(before)
        os.kill(victim, signal.SIGKILL)
        await at.logged('"event":"worker_ended"')
        await until(lambda: len(children(at)) == WORKERS and victim not in children(at))
        assert len(children(at) & before) == WORKERS - 1
        await at.publish("job-1", progress=2)
        assert len(cursors) == 1
        (cursor,) = cursors
        for _ in range(12):
            async with event_stream(at, jobIds="job-1", last_seen=cursor) as resumed:
                events = await resumed.updates("job-1", 2)
                assert [event.type for event in events] == ["connected", "status_update"]
        second = min(children(at))
        os.kill(second, signal.SIGKILL)
        await until(lambda: len(children(at)) == WORKERS and second not in children(at))
    assert at.process.returncode == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_drains_all_workers(redis: RedisServer, tmp_path: Path, number: int) -> None:
    async with workers(redis, tmp_path / "home", drain=1) as at, AsyncExitStack() as stack:
        found = await sessions(stack, at)
        pids = children(at)
        at.signal(number)
        await until_answered(at, "/ready", 503)
        assert (await at.get("/health")).status == 200
        for ws in found.values():
            assert (await ws.closed()).code == 1001
        assert await at.exit_status() == 0
        assert all(gone(pid) for pid in pids)
        assert at.log().count('"event":"draining"') == WORKERS
        assert {f'"worker":{number}}}' in at.log() for number in range(1, WORKERS + 1)} == {True}


async def test_signals_that_every_process_gets_are_no_second_ones(redis: RedisServer, tmp_path: Path) -> None:
    """Some supervisors and every terminal signal the workers as well."""
    async with workers(redis, tmp_path / "home", drain=1) as at, AsyncExitStack() as stack:
        found = await sessions(stack, at)
        for pid in (*children(at), at.process.pid):
            os.kill(pid, signal.SIGTERM)
        for ws in found.values():
            assert (await ws.closed()).code == 1001
        assert await at.exit_status() == 0
        assert "second signal" not in at.log()


async def test_a_second_signal_ends_all_at_once(redis: RedisServer, tmp_path: Path) -> None:
    async with workers(redis, tmp_path / "home", drain=600) as at, AsyncExitStack() as stack:
        await sessions(stack, at)
        at.signal(signal.SIGTERM)
        await until_answered(at, "/ready", 503)
        at.signal(signal.SIGTERM)
        assert await at.exit_status() == 0
        assert at.log().count("second signal") == WORKERS


async def test_no_worker_outlives_its_supervisor(redis: RedisServer, tmp_path: Path) -> None:
    async with workers(redis, tmp_path / "home") as at:
        pids = children(at)
        at.process.kill()
        await until(lambda: all(gone(pid) for pid in pids))
        assert at.log().count('"event":"supervisor_lost"') == WORKERS


async def test_sighup_reaches_all_workers_and_those_to_come(redis: RedisServer, tmp_path: Path) -> None:
    home = tmp_path / "home"
    async with workers(redis, home) as at:
        text = (home / "statuswire.toml").read_text()
        (home / "statuswire.toml").write_text(text.replace("json", "yaml"))
        at.signal(signal.SIGHUP)
        await at.logged('"event":"reload_failed"')
        (home / "statuswire.toml").write_text(text + "[limits]\nconnections_per_user = 1\n")
        at.signal(signal.SIGHUP)
        await at.logged('"event":"reloaded"', WORKERS)
        assert at.log().count('"event":"reload_failed"') == 1
        victim = min(children(at))
        os.kill(victim, signal.SIGKILL)
        await until(lambda: len(children(at)) == WORKERS and victim not in children(at))
        async with session(at):
            for _ in range(10):
                answer = await at.get("/api/v2/jobs/stream")
                assert (answer.status, answer.error) == (429, "rate_limited")


async def test_a_unix_socket_is_shared(redis: RedisServer, tmp_path: Path) -> None:
    path = tmp_path / "home" / "socket"
    async with workers(redis, tmp_path / "home", unix_socket=str(path), drain=0.2) as at:
        for _ in range(20):
            assert (await at.get("/health")).status == 200
        at.signal(signal.SIGTERM)
        assert await at.exit_status() == 0
    assert not path.exists()


async def refused(home: Path, **tables: Any) -> tuple[int, str]:
    """Start what cannot start; its status and what it said."""
    os.makedirs(home)
    write_config(home, tables)
    process = command(home)
    assert process.stdout is not None
    with process.stdout:
        await until(lambda: process.poll() is not None)
        assert process.stdout.read() == b""
    return process.returncode, (home / "server.log").read_text()


async def test_what_prevents_the_start_is_said_once(redis: RedisServer, tmp_path: Path) -> None:
    store = {"url": redis.url.replace("//", "//:wrong@")}
    status, said = await refused(tmp_path / "password", server={"workers": WORKERS}, store=store)
    assert (status, said.count("\n")) == (2, 1)
    assert "password" in said
    store = {"url": f"redis://127.0.0.1:{free_ports(1)[0]}"}
    status, said = await refused(tmp_path / "nowhere", server={"workers": WORKERS}, store=store)
    assert (status, said.count("\n")) == (2, 1)
    status, said = await refused(tmp_path / "sqlite", server={"workers": WORKERS})
    assert (status, said.count("\n")) == (2, 1)
    assert "several workers need a Redis store" in said


async def test_a_port_that_others_share_is_taken(redis: RedisServer, tmp_path: Path) -> None:
    async with workers(redis, tmp_path / "home") as at:
        tables = {"server": {"workers": WORKERS, "port": at.port}, "store": {"url": redis.url}}
        status, said = await refused(tmp_path / "other", **tables)
        assert (status, said.count("\n")) == (2, 1)
        assert "another program listens there" in said


async def test_the_numbers_are_those_of_all_workers(redis: RedisServer, tmp_path: Path) -> None:
    async with workers(redis, tmp_path / "home") as at, AsyncExitStack() as stack:
        found = await sessions(stack, at)
        for ws in found.values():
            await ws.quiet()

        async def told() -> bool:
            stats = (await at.get("/api/v2/stats")).json
            text = (await at.get("/metrics")).body.decode()
            return (
                len(stats.get("nodes", ())) == WORKERS
                and stats["byTransport"]["websocket"] >= WORKERS
                and all(node["byTransport"]["websocket"] > 0 for node in stats["nodes"])
                and f"\nstatuswire_processes {float(WORKERS)}\n" in text
            )

        await until_so(told, every=0.1)


async def test_a_worker_that_cannot_be_replaced_keeps_nobody_waiting(redis: RedisServer, tmp_path: Path) -> None:
    async with workers(redis, tmp_path / "home") as at, AsyncExitStack() as stack:
        await sessions(stack, at)
        redis.kill()
        victim = min(children(at))
        os.kill(victim, signal.SIGKILL)
        await until_logged(at, '"event":"worker_ended"', 3)  # and twice because it cannot start without Redis
        for _ in range(30):
            assert (await at.get("/health")).status == 200
        redis.start()
        await until_so(partial(spread, at), every=0.1)
    assert at.process.returncode == 0


async def until_logged(at: Spawned, text: str, times: int) -> None:
    """For what takes longer than anything else here."""
    await until(lambda: at.log().count(text) >= times, within=90)


async def spread(at: Spawned) -> bool:
    """Whether connections go to all workers."""
    found = set()
    for _ in range(40):
        async with websocket(at) as ws:
            found.add((await ws.receive())["clientId"][:8])
    return len(found) == WORKERS
