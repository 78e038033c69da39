"""Several servers on one Redis, many readers on every transport: whatever befalls a server, nobody misses a thing."""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import trio

from tests.fleet import TRANSPORTS, Publisher, Reader
from tests.pacing import for_a_while
from tests.redis_servers import RedisServer, free_ports, running_server
from tests.support import AUTH, Spawned, start, stop, until, until_answered, write_config

pytestmark = [pytest.mark.slow, pytest.mark.long]

LONG_S = 180.0  # reached only by what would never end


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    with running_server(tmp_path, "--appendonly", "yes", "--appendfsync", "always") as running:
        yield running


class Fleet:
    """Servers in processes of their own, each of which comes back on the port that it had."""

    def __init__(self, directory: Path, url: str, count: int, **settings: object) -> None:
        self.nodes: list[Spawned] = []
        try:
            self._start_all(directory, url, count, settings)
        except BaseException:
            self.stop()
            raise

    def _start_all(self, directory: Path, url: str, count: int, settings: dict[str, object]) -> None:
        for number, port in enumerate(free_ports(count)):
            home = directory / f"node-{number}"
            home.mkdir()
            write_config(home, {"server": {"port": port} | settings, "store": {"url": url}, "auth": AUTH})
            process, line = start(home)
            self.nodes.append(Spawned(port, process=process, start_line=line, log_file=home / "server.log"))

    def stop(self) -> None:
        """End all."""
        for node in self.nodes:
            stop(node.process)

    def start(self, node: Spawned) -> None:
        """Start one again after its end."""
        stop(node.process)
        node.process, node.start_line = start(node.log_file.parent)

    async def restart(self, node: Spawned) -> None:
        """The way an operator does: SIGTERM, its drain, start, wait until it is ready."""
        node.signal(signal.SIGTERM)
        await trio.to_thread.run_sync(node.process.wait)
        assert node.process.returncode == 0, node.log()
        await trio.to_thread.run_sync(self.start, node)
        await until_answered(node, "/ready", 200)


@asynccontextmanager
async def fleet(
    directory: Path, url: str, count: int = 2, drain: float = 1.0, **settings: object
) -> AsyncIterator[Fleet]:
    """So many servers, with these keys in their ``[server]``."""
    running = await trio.to_thread.run_sync(partial(Fleet, directory, url, count, drain=drain, **settings))
    try:
        yield running
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(running.stop)


@asynccontextmanager
async def under_load(
    running: Fleet, *, users: int, readers: int, pause_s: float
) -> AsyncIterator[tuple[list[Reader], list[Publisher], Callable[[], Awaitable[None]]]]:
    """Readers on all nodes and transports, a publisher for each user; checks all of it at the end."""
    names = [f"user-{number}" for number in range(users)]
    watching = [
        Reader(TRANSPORTS[number % 3], running.nodes, names[number // 3 % users], at=number)
        for number in range(readers)
    ]
    publishers = [
        Publisher(running.nodes, user, f"job-{user}", at=number, pause_s=pause_s) for number, user in enumerate(names)
    ]
    stopping = trio.Event()
    with trio.fail_after(LONG_S):
        async with trio.open_nursery() as nursery:
            for reader in watching:
                nursery.start_soon(reader.run)
            for reader in watching:
                await reader.started.wait()

            async def more() -> None:
                """Return when each publisher has got on."""
                goals = [(publisher, publisher.published + 5 * publisher.batch) for publisher in publishers]
                await until(lambda: all(publisher.published >= goal for publisher, goal in goals), within=LONG_S)

            async with trio.open_nursery() as working:
                for publisher in publishers:
                    working.start_soon(publisher.run, stopping)
                await more()
                yield watching, publishers, more
                await more()
                stopping.set()
            newest = {publisher.user: {publisher.job_id: publisher.published} for publisher in publishers}
            for reader in watching:
                await until(lambda reader=reader: reader.has(newest[reader.user]), within=LONG_S)  # type: ignore[misc]
            nursery.cancel_scope.cancel()
    for reader in watching:
        reader.check(newest[reader.user])


async def test_a_rolling_restart_loses_nothing(redis: RedisServer, tmp_path: Path) -> None:
    async with (
        fleet(tmp_path, redis.url, count=3) as running,
        under_load(running, users=10, readers=60, pause_s=0.05) as (readers, publishers, more),
    ):
        for node in running.nodes:
            await running.restart(node)
            await more()
        for transport in TRANSPORTS:
            assert any(reader.connections > 1 for reader in readers if reader.transport == transport)
        assert any(publisher.repeated for publisher in publishers)


async def test_killed_servers_lose_nothing(redis: RedisServer, tmp_path: Path) -> None:
    async with (
        fleet(tmp_path, redis.url) as running,
        under_load(running, users=10, readers=60, pause_s=0.05) as (readers, publishers, more),
    ):
        for node in running.nodes * 2:
            node.process.kill()
            await more()
            await trio.to_thread.run_sync(running.start, node)
            await more()
        assert all(reader.connections > 1 for reader in readers)
        assert any(publisher.repeated for publisher in publishers)


async def test_redis_restarts_under_mixed_load(redis: RedisServer, tmp_path: Path) -> None:
    async with (
        fleet(tmp_path, redis.url) as running,
        under_load(running, users=10, readers=60, pause_s=0.05) as (_, _, more),
    ):
        for _ in range(2):
            await trio.to_thread.run_sync(redis.kill)
            await trio.to_thread.run_sync(redis.start)
            await more()


async def test_two_hundred_readers_on_two_servers(redis: RedisServer, tmp_path: Path) -> None:
    async with (
        fleet(tmp_path, redis.url) as running,
        under_load(running, users=20, readers=200, pause_s=0.1) as (readers, _, _),
    ):
        await for_a_while(5)  # under load
        # No server failed, so nobody had a reason to leave; polls count each answer.
        assert all(reader.connections == 1 for reader in readers if reader.transport != "poll")
