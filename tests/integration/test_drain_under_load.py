"""Two servers behind nginx while everybody reads: both are reloaded, which nobody notices; then one is stopped: nobody
misses an update, and they do not come back all at once. ``STATUSWIRE_TEST_READERS=1000`` is the long form (make
drain-long), which says how much load there was."""

from __future__ import annotations

import itertools
import os
import signal
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import pytest
import trio

from tests.fleet import Reader, taken
from tests.integration.test_redis_fleet import fleet
from tests.nginx import running_nginx
from tests.pacing import for_a_while
from tests.redis_servers import RedisServer, free_ports
from tests.support import Address, Spawned, bearer, until
from tools.examples.nginx_example import configure

pytestmark = pytest.mark.slow

READERS: Final = int(os.environ.get("STATUSWIRE_TEST_READERS", "240"))
# Each reader has a job of its own: 1,000 of them have 5,000 updates a second.
ROUNDS_PER_S: Final = 5
DRAIN_S: Final = 6.0
LONG_S: Final = 240.0
PAGE: Final = {"Origin": "https://app.example.com"}
MIX: Final = ("ws", "sse", "ws", "sse", "ws", "sse", "ws", "sse", "ws", "poll")


@dataclass
class Rounds:
    """An update for every user's job, again and again, each round as one batch.

    Attributes:
        published: rounds that were answered.
    """

    where: Address
    users: list[str]
    published: int = 0
    stopping: trio.Event = field(default_factory=trio.Event)

    async def run(self) -> None:
        """Publish until it is to stop, each round until it is answered."""
        headers = bearer("worker", capabilities=["publish"])
        due = trio.current_time()
        for number in itertools.count(1):
            if self.stopping.is_set():
                return
            lines = [{"jobId": f"job-{user}", "userId": user, "message": f"{user} {number}"} for user in self.users]
            while not await taken(self.where, lines, headers | {"Idempotency-Key": f"round {number}"}):
                await for_a_while(0.05)
            self.published += 1
            # A machine that is too slow for the rate is not asked for more to make up for it.
            due = max(due + 1 / ROUNDS_PER_S, trio.current_time())
            await trio.sleep_until(due)

    async def more(self, rounds: int) -> None:
        """Return when there have been so many more."""
        goal = self.published + rounds
        await until(lambda: self.published >= goal, within=LONG_S)


async def reload(node: Spawned) -> None:
    """Other limits and origins by SIGHUP."""
    file = node.log_file.with_name("statuswire.toml")
    file.write_text(f'{file.read_text()}[limits]\nmax_message = 65536\n[cors]\norigins = ["{PAGE["Origin"]}"]\n')
    node.signal(signal.SIGHUP)
    await node.logged("reloaded")
    assert (await node.get("/health", PAGE)).headers["access-control-allow-origin"] == PAGE["Origin"]


async def test_a_server_is_stopped_while_everybody_reads(redis: RedisServer, tmp_path: Path) -> None:
    (port,) = free_ports(1)
    proxy = Address(port)
    users = [f"user-{number}" for number in range(READERS)]
    readers = [Reader(MIX[number % len(MIX)], [proxy], user, proxied=True) for number, user in enumerate(users)]
    rounds = Rounds(proxy, users)
    place = tmp_path / "nginx"
    place.mkdir()
    with trio.fail_after(LONG_S):
        async with fleet(tmp_path, redis.url, drain=DRAIN_S, trusted_proxies=["127.0.0.1"]) as running:
            first, second = running.nodes
            both = f"127.0.0.1:{first.port}; server 127.0.0.1:{second.port}"
            configuration = configure(place, "site-own-host.conf", f"127.0.0.1:{port}", both)
            configuration.write_text(
                configuration.read_text().replace("events {", f"events {{ worker_connections {4 * READERS + 100};")
            )
            async with running_nginx(configuration), trio.open_nursery() as reading, trio.open_nursery() as publishing:
                for reader in readers:
                    reading.start_soon(reader.run)
                for reader in readers:
                    await reader.started.wait()
                publishing.start_soon(rounds.run)
                await rounds.more(2 * ROUNDS_PER_S)

                streams = [reader for reader in readers if reader.transport != "poll"]
                connections = [reader.connections for reader in streams]
                for node in running.nodes:
                    await reload(node)
                began, before = trio.current_time(), rounds.published
                await rounds.more(2 * ROUNDS_PER_S)
                rate = READERS * (rounds.published - before) / (trio.current_time() - began)
                assert [reader.connections for reader in streams] == connections, "nobody has had to come again"

                stopped = trio.current_time()
                first.signal(signal.SIGTERM)
                await trio.to_thread.run_sync(first.process.wait)
                lasted = trio.current_time() - stopped

                await rounds.more(2 * ROUNDS_PER_S)
                rounds.stopping.set()
                await until(
                    lambda: all(reader.has({f"job-{reader.user}": rounds.published}) for reader in readers),
                    within=LONG_S,
                )
                reading.cancel_scope.cancel()

    assert first.process.returncode == 0, first.log()
    assert DRAIN_S <= lasted < DRAIN_S + 15
    for reader in readers:
        reader.check({f"job-{reader.user}": rounds.published})

    # About half of the live streams were there. They are ended evenly over the window, and asked to stay away for times
    # that are spread as well; so when they come back, no quarter of the time has more than half of them.
    sent_away = [place for reader in readers for place in reader.sent_away]
    assert len(streams) * 0.25 < len(sent_away) < len(streams) * 0.75
    print(f"\n{READERS} readers, {rate:.0f} updates/s, ended within {lasted:.1f} s, {len(sent_away)} were sent away")
    for moments in ([at for at, _ in sent_away], [at + delay for at, delay in sent_away]):
        begin, end = min(moments), max(moments)
        assert end - begin > DRAIN_S / 2
        quarters = Counter(min(3, int(4 * (at - begin) / (end - begin))) for at in moments)
        assert max(quarters.values()) < len(moments) / 2, quarters
        assert len(quarters) == 4, quarters
