"""Updates published to Redis while nodes, connections and Redis itself die: none is lost or accepted twice."""

from __future__ import annotations

import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
import redis as redis_py
import trio
from trio.abc import Stream

from server.brokers.redis_broker import NEEDED
from server.brokers.redis_client import NodeInfo
from server.brokers.redis_link import Connect
from server.ingest import redis_channels
from server.ingest.redis_channels import CHANNELS
from server.ingest.redis_stream import DEAD, STREAM
from tests.ingesting import channels_of, node_beside, nodes, record, steps, stream_of, text, version
from tests.pacing import for_a_while
from tests.redis_servers import RedisServer, running_cluster, running_sentinels, running_server
from tests.support import InProcess, spawned, until, until_so

pytestmark = pytest.mark.slow


@pytest.fixture
def oracle(redis: RedisServer) -> Iterator[redis_py.Redis]:
    with redis.oracle() as client:
        yield client


async def test_who_takes_up_may_lose_its_ears(redis: RedisServer, oracle: redis_py.Redis) -> None:
    """What one node missed while its subscription was away, another one has heard."""
    async with nodes(redis.url, 3) as running:
        for number in range(1, 301):
            oracle.publish(CHANNELS[0], text(jobId="a", userId="u", message=f"step {number}"))
            if number in (50, 150):
                holder = next(each for each in running if channels_of(each).takes)
                link = channels_of(holder)._listener._subscriptions()
                connect = link._connect

                async def late(connect: Connect = connect) -> tuple[Stream, NodeInfo]:
                    await for_a_while(0.2)  # some hundred messages
                    return await connect()

                link._connect = late
                link.drop("for a test")
            await for_a_while(0.002)  # or all would be sent before the first cut
        await until(lambda: version(running[0], "a") >= 300)
        assert Counter(steps(running[0], "a")) == Counter(f"step {number}" for number in range(1, 301))


async def test_a_killed_node_takes_nothing_with_it(redis: RedisServer, oracle: redis_py.Redis, tmp_path: Path) -> None:
    async with spawned(tmp_path, store={"url": redis.url}) as victim:
        await until(lambda: oracle.get("{statuswire}:ingest:channels"))
        async with node_beside(redis.url) as two, node_beside(redis.url):
            assert not channels_of(two).takes
            total = 6000

            def publish() -> None:
                """All at once, so that it has thousands in hand."""
                with redis.oracle() as client, client.pipeline(transaction=False) as pipeline:
                    for n in range(total):
                        pipeline.publish(CHANNELS[n % 2], text(jobId=f"j{n % 5}", userId="u", message=f"step {n}"))
                    pipeline.execute()

            def shown() -> int:
                return sum(version(two, f"j{job}") for job in range(5))

            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.to_thread.run_sync, publish)
                await until(lambda: shown() > 500)
                victim.process.kill()
            await until(lambda: shown() >= total)
            for job in range(5):
                assert steps(two, f"j{job}") == [f"step {n}" for n in range(job, total, 5)]


async def test_a_node_that_was_frozen_accepts_nothing_twice(
    redis: RedisServer, oracle: redis_py.Redis, tmp_path: Path
) -> None:
    """It reads messages long after the window, and nobody is there to tell it that they are settled."""
    async with spawned(tmp_path, store={"url": redis.url}) as frozen:
        await until(lambda: oracle.get("{statuswire}:ingest:channels"))
        async with node_beside(redis.url) as two:
            frozen.signal(signal.SIGSTOP)
            for number in range(100):
                oracle.publish(CHANNELS[0], text(jobId="a", userId="u", message=f"step {number}"))
            await until(lambda: version(two, "a") == 100)
        await for_a_while(6)  # longer than the window
        frozen.signal(signal.SIGCONT)
        await until(lambda: oracle.get("{statuswire}:ingest:channels"))
        async with node_beside(redis.url) as three:
            oracle.publish(CHANNELS[0], text(jobId="a", message="last"))
            await until(lambda: version(three, "a") > 100)
            assert version(three, "a") == 101
            assert record(three, "a")["message"] == "last"


class Feed:
    """Publishes through Redis from threads, again and again until Redis has it; each update once by its ``eventId``."""

    def __init__(self, connect: Callable[[], Any]) -> None:
        self._connect = connect
        self.sent: set[str] = set()
        self._count = 0
        self.stopping = False

    def _run(self) -> None:
        client = self._connect()
        while not self.stopping:
            self._count += 1
            name = f"step {self._count}"
            update = text(jobId=f"j{self._count % 5}", userId="u", message=name, eventId=name)
            while not self.stopping:
                try:
                    client.xadd(STREAM, {"data": update})
                except redis_py.exceptions.RedisError:
                    time.sleep(0.05)  # as a client does before it tries again
                    client.close()
                    client = self._connect()
                else:
                    self.sent.add(name)
                    break
            time.sleep(0.001)  # some hundred a second
        client.close()

    async def run(self) -> None:
        """Until ``stopping``."""
        await trio.to_thread.run_sync(self._run)

    async def more(self, count: int = 200) -> None:
        """Wait until more was sent."""
        goal = len(self.sent) + count
        await until(lambda: len(self.sent) >= goal)


async def check_fed(feed: Feed, at: InProcess) -> None:
    """All that was sent is there, once, in order within each job."""

    def told() -> list[list[str]]:
        return [steps(at, f"j{job}") for job in range(5)]

    await until(lambda: feed.sent <= {step for job in told() for step in job})
    for job in told():
        numbers = [int(step.split()[1]) for step in job]
        assert numbers == sorted(set(numbers))


async def test_a_killed_reader_of_the_stream_is_followed_by_another(redis: RedisServer, tmp_path: Path) -> None:
    async with spawned(tmp_path, store={"url": redis.url}) as victim:
        with redis.oracle() as oracle:
            await until(lambda: oracle.get("{statuswire}:ingest:stream"))
            async with node_beside(redis.url) as two, trio.open_nursery() as nursery:
                feed = Feed(redis.oracle)
                nursery.start_soon(feed.run)
                await feed.more()
                assert not stream_of(two).takes
                assert version(two, "j1") > 0
                victim.process.kill()
                await feed.more(1000)
                feed.stopping = True
                await check_fed(feed, two)
                await until(lambda: oracle.xlen(STREAM) == 0)
                assert oracle.xlen(DEAD) == 0
                assert stream_of(two).takes


async def test_a_frozen_reader_of_the_stream_accepts_nothing_twice(redis: RedisServer, tmp_path: Path) -> None:
    async with spawned(tmp_path, store={"url": redis.url}) as frozen:
        with redis.oracle() as oracle:
            await until(lambda: oracle.get("{statuswire}:ingest:stream"))
            async with node_beside(redis.url) as two:
                with oracle.pipeline(transaction=False) as pipeline:
                    for n in range(3000):
                        pipeline.xadd(STREAM, {"data": text(jobId=f"j{n % 5}", userId="u", message=f"step {n}")})
                    pipeline.execute()
                await until(lambda: version(two, "j1") > 20)
                frozen.signal(signal.SIGSTOP)
                await until(lambda: oracle.xlen(STREAM) == 0)
                assert stream_of(two).takes
                frozen.signal(signal.SIGCONT)
                await for_a_while(2)  # nothing tells when it has given up what it had in hand
                for job in range(5):
                    assert steps(two, f"j{job}") == [f"step {n}" for n in range(job, 3000, 5)]
                assert oracle.xlen(DEAD) == 0


async def test_redis_restarts_under_load(tmp_path: Path) -> None:
    with running_server(tmp_path, "--appendonly", "yes", "--appendfsync", "always") as redis:
        async with nodes(redis.url) as running, trio.open_nursery() as nursery:
            feed = Feed(redis.oracle)
            nursery.start_soon(feed.run)
            for _ in range(3):
                await feed.more()
                await trio.to_thread.run_sync(redis.kill)
                await trio.to_thread.run_sync(redis.start)
            await feed.more()
            feed.stopping = True
            await check_fed(feed, running[0])
            with redis.oracle() as oracle:
                await until(lambda: oracle.xlen(STREAM) == 0)
                assert oracle.xlen(DEAD) == 0
                # The channels are heard again, too.
                await until(lambda: oracle.publish(CHANNELS[0], text(jobId="a", userId="u")) == 2)
                await until(lambda: all(version(each, "a") == 1 for each in running))


async def test_a_full_redis_takes_up_what_was_heard_when_it_has_room(
    redis: RedisServer, oracle: redis_py.Redis
) -> None:
    async with nodes(redis.url) as running:
        oracle.xadd(STREAM, {"data": text(jobId="a", userId="u", message="before")})
        await until(lambda: version(running[0], "a") == 1)
        oracle.config_set("maxmemory", "1mb")
        for number in range(20):
            oracle.publish(CHANNELS[0], text(jobId="a", message=f"step {number}"))
        await until(lambda: all(len(channels_of(each)._held) == 20 for each in running))
        assert version(running[0], "a") == 1
        oracle.config_set("maxmemory", "0")
        await until(lambda: version(running[0], "a") == 21)
        assert steps(running[0], "a") == ["before", *(f"step {number}" for number in range(20))]


async def test_what_cannot_be_held_is_counted(
    redis: RedisServer, oracle: redis_py.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with nodes(redis.url, 1) as (one,):
        oracle.publish(CHANNELS[0], text(jobId="a", userId="u", message="before"))
        await until(lambda: version(one, "a") == 1)
        monkeypatch.setattr(redis_channels, "MAX_HELD", 10)
        oracle.config_set("maxmemory", "1mb")
        for number in range(30):
            oracle.publish(CHANNELS[0], text(jobId="a", message=f"step {number}"))
        await until(lambda: channels_of(one).counters.dropped > 0)
        oracle.config_set("maxmemory", "0")
        oracle.publish(CHANNELS[0], text(jobId="a", message="last"))
        await until(lambda: record(one, "a")["message"] == "last")
        counters = channels_of(one).counters
        assert version(one, "a") + counters.dropped == 32


async def test_what_is_held_has_a_bound_of_bytes(
    redis: RedisServer, oracle: redis_py.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large message takes the place of many small ones, also of those that wait to be tried again."""
    async with nodes(redis.url, 1) as (one,):
        oracle.publish(CHANNELS[0], text(jobId="a", userId="u", message="before"))
        await until(lambda: version(one, "a") == 1)
        channels = channels_of(one)
        monkeypatch.setattr(redis_channels, "MAX_HELD_BYTES", 100_000)
        oracle.config_set("maxmemory", "1mb")
        for number in range(200):
            oracle.publish(CHANNELS[0], text(jobId="a", message=f"step {number}"))
        await until(lambda: channels.counters.received == 201)
        most = 0
        for number in range(20):
            oracle.publish(CHANNELS[0], text(jobId="a", message=f"large {number}", metadata={"x": "x" * 45_000}))
            await until(lambda number=number: channels.counters.received + channels.counters.dropped > 201 + number)  # type: ignore[misc]
            most = max(most, channels._held_bytes)
        assert most <= 100_000
        oracle.config_set("maxmemory", "0")

        async def arrives() -> bool:
            """What waits for too long is left out, on a machine that is slow."""
            oracle.publish(CHANNELS[0], text(jobId="a", message="last"))
            return bool(record(one, "a")["message"] == "last")

        await until_so(arrives, every=0.1)
        await until(lambda: not channels._held)
        assert channels._held_bytes == 0


async def test_a_user_of_redis_may_do_what_the_documentation_says(redis: RedisServer, oracle: redis_py.Redis) -> None:
    oracle.execute_command("ACL", "SETUSER", "app", "on", ">secret", *NEEDED.split())
    async with nodes(redis.url.replace("//", "//app:secret@"), 1) as (one,):
        oracle.publish(CHANNELS[0], text(jobId="a", userId="u"))
        oracle.xadd(STREAM, {"data": text(jobId="a", userId="u")})
        oracle.xadd(STREAM, {"data": "nonsense"})
        await until(lambda: version(one, "a") == 2)
        await until(lambda: (oracle.xlen(STREAM), oracle.xlen(DEAD)) == (0, 1))


async def test_sentinels_replace_a_master(tmp_path: Path) -> None:
    with running_sentinels(tmp_path) as sentinels:
        async with nodes(sentinels.url) as running:
            old = sentinels.master()
            await trio.to_thread.run_sync(old.kill)
            other = next(each for each in sentinels.servers if each is not old)
            with other.oracle() as oracle:
                await until(lambda: oracle.pubsub_numsub(CHANNELS[0]) == [(CHANNELS[0], 2)])
                await until(lambda: oracle.info("replication")["role"] == "master")
                oracle.publish(CHANNELS[0], text(jobId="a", userId="u"))
                oracle.xadd(STREAM, {"data": text(jobId="b", userId="u")})
                await until(lambda: all(version(each, job) == 1 for each in running for job in ("a", "b")))


async def test_cluster(tmp_path: Path) -> None:
    with running_cluster(tmp_path, replicas=True) as cluster, ExitStack() as stack:
        clients = [stack.enter_context(master.oracle()) for master in cluster.masters]
        with cluster.masters[0].oracle() as oracle:
            owner = cluster.owner(int(oracle.execute_command("CLUSTER", "KEYSLOT", STREAM)))
        async with nodes(cluster.url, 3) as running:
            for number in range(60):  # whichever node a worker is connected to
                clients[number % 3].publish(CHANNELS[0], text(jobId="a", userId="u", message=f"step {number}"))
            await until(lambda: version(running[0], "a") == 60)
            with owner.oracle() as oracle:
                for number in range(60):
                    oracle.xadd(STREAM, {"data": text(jobId="b", userId="u", message=f"step {number}")})
                oracle.xadd(STREAM, {"data": "nonsense"})
                await until(lambda: version(running[0], "b") == 60)
                await until(lambda: oracle.xlen(STREAM) == 0)
            # One dies that somebody listens to.
            victim = next(master for master, client in zip(cluster.masters, clients, strict=True) if _heard(client))
            await trio.to_thread.run_sync(victim.kill)
            alive = next(
                client for master, client in zip(cluster.masters, clients, strict=True) if master is not victim
            )
            await until(lambda: all(channels_of(each).listening for each in running))
            number = 0

            async def arrives() -> bool:
                """Pub/sub may lose some meanwhile, but not from now on."""
                nonlocal number
                number += 1
                alive.publish(CHANNELS[0], text(jobId="c", userId="u", message=f"try {number}"))
                with suppress(trio.TooSlowError):
                    await until(lambda: version(running[0], "c") > 0, within=0.1)
                return version(running[0], "c") > 0

            await until_so(arrives)
            told = steps(running[0], "c")
            assert len(told) == len(set(told))


def _heard(client: Any) -> bool:
    ((_, count),) = client.pubsub_numsub(CHANNELS[0])
    return bool(count)
