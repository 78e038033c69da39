"""Real workers of BullMQ, Bull, Celery and RQ: every job ends right here, for its owner alone, whatever else ends.

``make test`` runs the cases of ``SHORT``, ``make queues-long`` all there are.
"""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from server.ingest.queues.source import Source
from tests.fleet import TRANSPORTS
from tests.integration.processes import Start, processes
from tests.integration.queue_runs import (
    HERE,
    LONG_S,
    SECRETS,
    Load,
    Watcher,
    bull_load,
    celery_load,
    expected,
    keep_up,
    rq_load,
    steps,
)
from tests.pacing import for_a_while
from tests.redis_servers import RedisServer, running_server
from tests.support import ADMIN, AUTH, PATIENCE_S, Address, server, spawned, until, until_so

pytestmark = [pytest.mark.slow, pytest.mark.long]

HANDOVER_S = 5.0
LOADS: dict[str, Callable[[RedisServer, Start], Load]] = {
    "bullmq": partial(bull_load, library="bullmq"),
    "bullmq5": partial(bull_load, library="bullmq5"),
    "bull": partial(bull_load, library="bull"),
    "celery": partial(celery_load, events=False),
    "celery-E": partial(celery_load, events=True),
    "rq": partial(rq_load, two=False),
    "rq2": partial(rq_load, two=True),
}
TROUBLES = ("none", "server restarted", "node killed", "Redis restarted")
SHORT = [
    ("bullmq", "node killed"), ("bullmq5", "server restarted"), ("bullmq", "Redis restarted"), ("bull", "none"),
    ("celery-E", "none"), ("celery", "server restarted"), ("rq", "none"), ("rq2", "node killed"),
]  # fmt: skip
CASES = [(kind, trouble) for kind in LOADS for trouble in TROUBLES] if os.environ.get("QUEUES") == "all" else SHORT


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    """As people run it who would not lose what it has."""
    directory = tmp_path / "redis"
    directory.mkdir()
    with running_server(directory, "--notify-keyspace-events", "Kgh", "--appendonly", "yes") as running:
        yield running


async def records(at: Address) -> dict[str, dict[str, Any]]:
    """All jobs, as an admin sees them."""
    answer = await at.ask("GET", "/api/v2/jobs?limit=1000", headers=ADMIN)
    assert answer.status == 200, answer
    return {job["jobId"]: job for job in answer.json["jobs"]}


async def until_some_ended(where: list[Address], count: int) -> None:
    """Wait until so many jobs have ended."""

    async def enough() -> bool:
        return sum("endedAt" in job for job in (await records(where[0])).values()) >= count

    await until_so(enough, every=0.05)


async def until_ended(where: list[Address], load: Load, names: dict[str, tuple[str, str]]) -> dict[str, dict[str, Any]]:
    """Wait until all jobs have ended that end at all, as one server has them."""
    left: dict[str, Any] = {}
    found: dict[str, dict[str, Any]] = {}

    async def none_left() -> bool:
        nonlocal left, found
        try:
            found = await records(where[0])
        except OSError:
            return False
        left = {name: does for name, (does, _) in names.items() if "endedAt" not in found.get(name, {})}
        if left and all(does in load.forgotten for does in left.values()):
            before = len(left), sum(job["version"] for job in found.values())
            await for_a_while(6)  # what is still looked after would have moved by then
            found = await records(where[0])
            left = {name: does for name, does in left.items() if "endedAt" not in found.get(name, {})}
            if before == (len(left), sum(job["version"] for job in found.values())):
                left = {name: does for name, does in left.items() if load.truth(name, does) is not None}
        return not left

    with suppress(trio.TooSlowError):
        await until_so(none_left, within=LONG_S, every=0.1)
    assert found
    assert not left, [(name, does, found.get(name), load.truth(name, does)) for name, does in left.items()][:20]
    return found


def logs(directory: Path) -> str:
    """What the servers have logged."""
    return "".join(log.read_text() for log in directory.glob("*/server.log"))


class Trouble:
    """Servers that take a load in, and what befalls them."""

    def __init__(self, kind: str, redis: RedisServer, directory: Path, tables: dict[str, Any]) -> None:
        self.kind = kind
        self.nodes: list[Address] = []
        self.handover_s: float | None = None
        self._redis = redis
        self._directory = directory
        self._tables = tables | {"auth": AUTH}

    @asynccontextmanager
    async def servers(self) -> AsyncIterator[Callable[[], Any]]:
        """Run them. Gives what brings the trouble about."""
        async with {
            "none": self._calm, "server restarted": self._restarted, "node killed": self._killed,
            "Redis restarted": self._redis_restarted,
        }[self.kind]() as cause:  # fmt: skip
            yield cause

    def _spawned(self, name: str, **tables: Any) -> Any:
        directory = self._directory / name
        directory.mkdir(exist_ok=True)
        return spawned(directory, **self._tables, **tables)

    @asynccontextmanager
    async def _calm(self) -> AsyncIterator[Callable[[], Any]]:
        async with self._spawned("one") as one:
            self.nodes.append(one)
            await ready(one)

            async def nothing() -> None:
                await trio.lowlevel.checkpoint()

            yield nothing

    @asynccontextmanager
    async def _restarted(self) -> AsyncIterator[Callable[[], Any]]:
        async with self._spawned("one") as first, trio.open_nursery() as nursery:
            self.nodes.append(first)
            await ready(first)

            async def again() -> None:
                async with self._spawned("one") as second:
                    self.nodes[:] = [second]
                    await trio.sleep_forever()

            async def restart() -> None:
                first.signal(signal.SIGKILL)
                await first.exit_status()
                await for_a_while(0.5)  # jobs go on meanwhile
                nursery.start_soon(again)
                await until(lambda: self.nodes[0] is not first)
                await ready(self.nodes[0])

            yield restart
            nursery.cancel_scope.cancel()

    @asynccontextmanager
    async def _killed(self) -> AsyncIterator[Callable[[], Any]]:
        store = {"url": f"{self._redis.url}/7"}
        async with self._spawned("one", store=store) as victim:
            await ready(victim)
            async with server(**self._tables, store=store) as other:
                assert other.node.queues is not None
                source: Source = other.node.queues.sources["q"]
                await until(lambda: source.standby)
                self.nodes += [other, victim]

                async def kill() -> None:
                    # Some, if the victim was starved for so long that its turn ran out.
                    before = source.taker.counters.accepted
                    victim.signal(signal.SIGKILL)
                    self.handover_s = await own_time_until(lambda: source.taker.counters.accepted > before)
                    await victim.exit_status()
                    self.nodes[:] = [other]

                yield kill

    @asynccontextmanager
    async def _redis_restarted(self) -> AsyncIterator[Callable[[], Any]]:
        async with self._spawned("one", store={"url": f"{self._redis.url}/7"}) as one:
            self.nodes.append(one)
            await ready(one)

            async def restart() -> None:
                self._redis.kill()
                await for_a_while(0.5)  # so that workers and server find it gone
                await trio.to_thread.run_sync(self._redis.start)
                await ready(one)

            yield restart


async def own_time_until(condition: Callable[[], bool]) -> float:
    """Wait until a condition holds; the seconds it took, without those for which this process had no turn."""
    took = 0.0
    with trio.fail_after(PATIENCE_S):
        while not condition():
            began, used = time.monotonic(), time.process_time()
            await for_a_while(0.02)
            took += min(time.monotonic() - began, 0.05 + time.process_time() - used)
    return took


async def ready(at: Address) -> None:
    """Wait until the queue is taken in there."""

    async def up() -> bool:
        state: object = (await at.get("/ready")).json.get("queues", {}).get("q", {}).get("state")
        return state == "up"

    await until_so(up)


@pytest.mark.parametrize(("kind", "trouble"), CASES)
async def test_real_workers(kind: str, trouble: str, redis: RedisServer, tmp_path: Path) -> None:
    with processes(tmp_path, PYTHONPATH=str(HERE)) as start:
        load = LOADS[kind](redis, start)
        befalls = Trouble(trouble, redis, tmp_path, load.tables)
        async with befalls.servers() as cause, trio.open_nursery() as nursery:
            readers = [
                Watcher(transport, befalls.nodes, f"user_{number}", at=number)
                for number, transport in enumerate(TRANSPORTS)
            ]
            for reader in readers:
                nursery.start_soon(reader.run)
                await reader.started.wait()
            nursery.start_soon(keep_up, load)
            names = await trio.to_thread.run_sync(load.send)
            await until_some_ended(befalls.nodes, len(names) // 5)
            await cause()
            if trouble == "Redis restarted":
                # What a worker had in hand may be forgotten by the queue, or kept for an hour.
                load.forgotten = frozenset(does for does, _ in names.values())
                for worker in load.running if load.deaf else ():
                    os.killpg(worker.pid, signal.SIGKILL)
            found = await until_ended(befalls.nodes, load, names)
            assert found.keys() <= names.keys()
            assert all(load.truth(name, names[name][0]) is None for name in names.keys() - found.keys())
            names = {name: names[name] for name in found}
            newest = {name: job["version"] for name, job in found.items()}
            for reader in readers:
                mine = {name: version for name, version in newest.items() if found[name]["userId"] == reader.user}
                await until(partial(reader.has, mine))
            nursery.cancel_scope.cancel()
    shown = json.dumps([found, [reader.seen for reader in readers]]) + logs(tmp_path)
    assert not [secret for secret in SECRETS if secret in shown]
    check(load, names, found, readers, trouble)
    if befalls.handover_s is not None:
        print("handed over after", befalls.handover_s)
        assert befalls.handover_s < HANDOVER_S


def check(
    load: Load,
    names: dict[str, tuple[str, str]],
    found: dict[str, dict[str, Any]],
    readers: list[Watcher],
    trouble: str,
) -> None:
    """Every record ended as the queue says, and its owner alone saw every step of it in order."""
    # Whose it was may have been said while no node listened.
    unnamed = load.nameless if trouble == "none" else load.nameless | {"removed"}
    nameless = {name for name in names if names[name][0] in unnamed and found[name]["userId"] == "queue:q"}
    names = {name: (does, "queue:q" if name in nameless else user) for name, (does, user) in names.items()}
    for name in names.keys() - nameless:
        parent, child, _ = name.partition("-part-")
        assert found[name]["metadata"].get("parent") == (parent if child else None), name
    stores_lost = trouble == "Redis restarted"
    taken = {name for name in names if load.taken_away(name)}
    paths: dict[str, Counter[str]] = {}
    wrong: dict[str, Any] = {}
    for reader in readers:
        reader.check_order(shared=names.keys() if stores_lost else taken)
        assert reader.seen.keys() == {name for name, (_, user) in names.items() if user == reader.user}, reader.user
        for name, messages in reader.seen.items():
            does = names[name][0]
            path = steps(messages)
            paths.setdefault(does, Counter())[path] += 1
            pattern = expected(load, does, calm=trouble == "none", stores_lost=stores_lost, taken=name in taken)
            truth = load.truth(name, does)
            if does in load.forgotten and truth is None:
                pattern = "[QPSF]*"
            if does == "removed" and trouble != "none" and found[name]["status"] == "cancelled":
                # Nobody looks again at a job that is gone. What a worker that had it already makes of it may come while
                # no node listens.
                truth = None
            if not re.fullmatch(pattern, path) or truth not in (None, found[name]["status"]):
                wrong[name] = (does, pattern, path, truth, found[name])
    print(trouble, {does: dict(counts) for does, counts in paths.items()})
    assert not wrong, "\n".join(map(repr, wrong.items()))
    assert {name: job["userId"] for name, job in found.items()} == {name: user for name, (_, user) in names.items()}
    if stores_lost:
        return
    for name, (does, _) in names.items():
        job = found[name]
        if name in taken:
            continue
        if does == "ok":
            assert job["progress"] == 100, job
        if does == "bad":
            assert job["error"].endswith("bad went wrong"), job
        if does == "flaky" and (load.exact or (trouble == "none" and not load.sampled)):
            assert job["attempt"] == 2, job
    if trouble == "none":
        # What can only be looked at is looked at in time nearly always.
        attempts = [found[name]["attempt"] for name, (does, _) in names.items() if does == "flaky"]
        assert attempts.count(2) > 0.8 * len(attempts), attempts
        usual = paths["ok"]
        assert usual["QPC" if load.announced else "PC"] > 0.8 * usual.total(), usual
