"""A server under attack, and ordinary readers whose delivery is measured before, meanwhile and afterwards.

The server and the attackers are processes of their own. ``siege`` is the one way to measure: whoever attacks, the
readers get every update once and in order, the server's memory stays within what is promised, and when it is over,
descriptors, sockets and tasks are as many as before and newcomers are served.
"""

from __future__ import annotations

import json
import os
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import trio

from perf.crowded import LoopClock, slowed, waits_of
from server.poller import MAX_PARKED
from tests.hostility.attacks import ATTACKS, MIB, SCARCITIES, TLS_ATTACKS
from tests.pacing import for_a_while
from tests.streams import event_stream, session
from tests.support import (
    ADMIN,
    PATIENCE_S,
    ROOT,
    WORKER,
    Spawned,
    bearer,
    start,
    stop,
    token,
    until,
    until_so,
    write_config,
)

SECONDS = float(os.environ.get("HOSTILITY_SECONDS", "0.5"))
# An ordinary page hardly notices what takes less.
NOTICEABLE_S = 1.5
RECOVERY_S = 30.0
EVERY_S = 0.02
JOB = "watched"


@dataclass
class Ground:
    """Where it happens: a server, and what attacks it."""

    at: Spawned
    attacker: subprocess.Popen[bytes]

    async def order(self, **order: object) -> dict[str, Any]:
        """Give the attacker one line and read its answer."""

        def ask() -> bytes:
            assert self.attacker.stdin is not None
            assert self.attacker.stdout is not None
            self.attacker.stdin.write(json.dumps(order).encode() + b"\n")
            self.attacker.stdin.flush()
            return self.attacker.stdout.readline()

        with trio.fail_after(3 * PATIENCE_S):
            answer = json.loads(await trio.to_thread.run_sync(ask))
        assert isinstance(answer, dict)
        return answer

    @asynccontextmanager
    async def attacked(self, name: str, source: str = "127.0.0.1") -> AsyncIterator[dict[str, Any]]:
        """Attack in this block; what it had come to at its beginning, and at its end, is in the yielded dict."""
        mallory = token("mallory", capabilities=["publish"])
        found = await self.order(attack=name, port=self.at.port, source=source, token=mallory)
        try:
            yield found
        finally:
            with trio.CancelScope(shield=True):
                found.update(await self.order())

    def memory(self) -> int:
        """Bytes of the server that are resident."""
        for line in Path(f"/proc/{self.at.process.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
        raise AssertionError("the server is gone")

    def descriptors(self) -> int:
        """Open descriptors of the server."""
        return len(os.listdir(f"/proc/{self.at.process.pid}/fd"))

    async def standing(self) -> tuple[int, int, int]:
        """Descriptors, sockets and tasks."""
        stats = (await self.at.get("/api/v2/stats", ADMIN)).json
        return self.descriptors(), stats["sockets"], stats["process"]["tasks"]


@contextmanager
def ground(directory: Path, trust: ssl.SSLContext | None = None, **tables: Mapping[str, object]) -> Iterator[Ground]:
    """Start a server configured like this, and an attacker. ``trust``: what its readers trust, if it speaks TLS."""
    write_config(directory, tables)
    process, line = start(directory)
    attacker = subprocess.Popen(
        [sys.executable, "-m", "tests.hostility.attacker"], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        port = int(line.split("://127.0.0.1:")[1].split()[0])
        at = Spawned(port, None, trust, process=process, start_line=line, log_file=directory / "server.log")
        yield Ground(at, attacker)
    finally:
        for pipe in (attacker.stdin, attacker.stdout):
            assert pipe is not None
            pipe.close()
        attacker.terminate()
        attacker.wait()
        stop(process)


@dataclass
class Readers:
    """Ordinary readers, one of each kind, and who publishes what they watch. Their ``clock`` stands still with them."""

    delays: dict[str, list[float]] = field(default_factory=dict)
    versions: dict[str, list[int]] = field(default_factory=dict)
    published: int = 0
    on: bool = True
    clock: LoopClock = field(default_factory=LoopClock)

    def take(self, kind: str, message: Mapping[str, Any]) -> None:
        """Note one update."""
        if message.get("jobId") == JOB and "message" in message:
            self.delays.setdefault(kind, []).append(self.clock() - float(message["message"]))
            self.versions.setdefault(kind, []).append(message["version"])

    def p99(self) -> float:
        """Of the reader that was served worst since the last time this was asked, in seconds."""
        taken, self.delays = self.delays, {}
        return max((sorted(delays)[int(0.99 * len(delays))] for delays in taken.values()), default=0.0)

    async def given(self) -> None:
        """Wait until all that has been published by now has been read, and what is just being published."""
        version = self.published + int(self.on)
        await until(lambda: all(versions[-1] >= version for versions in self.versions.values()), within=RECOVERY_S)

    async def publish(self, at: Spawned) -> None:
        """Publish at a steady rate; each update has the time at which it was sent."""
        async with at.connect() as http:
            while self.on:
                body = {"userId": "alice", "message": repr(self.clock())}
                answer = await http.request("POST", f"/api/v2/jobs/{JOB}/updates", body=body, headers=WORKER)
                assert answer.status == 200, answer
                self.published = answer.json["version"]
                await for_a_while(EVERY_S)

    async def websocket(self, at: Spawned, ready: trio.Event) -> None:
        """Read over a WebSocket."""
        async with session(at, token=token("alice")) as ws:
            await ws.subscribe(jobIds=[JOB])
            ready.set()
            while True:
                self.take("websocket", await ws.receive())

    async def sse(self, at: Spawned, ready: trio.Event) -> None:
        """Read an event stream."""
        async with event_stream(at, jobIds=JOB, headers=bearer("alice")) as stream:
            await stream.until("snapshot")
            ready.set()
            while True:
                self.take("sse", (await stream.event()).data)

    async def poll(self, at: Spawned, ready: trio.Event) -> None:
        """Poll, each time for what comes next."""
        async with at.connect() as http:
            seen = ""
            while True:
                target = f"/api/v2/jobs/poll?jobIds={JOB}&timeout={20 if seen else 0}&last_seen={seen}"
                body = (await http.request("GET", target, headers=bearer("alice"))).json
                if seen:
                    for update in body["updates"]:
                        self.take("poll", update)
                seen = body["last_seen"]
                ready.set()


@asynccontextmanager
async def readers(at: Spawned) -> AsyncIterator[Readers]:
    """Readers that read all through this block; at its end they must have everything."""
    found = Readers()
    await at.publish(JOB, WORKER, userId="alice")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(found.clock.run)
        for kind in (found.websocket, found.sse, found.poll):
            ready = trio.Event()
            nursery.start_soon(kind, at, ready)
            await ready.wait()
        async with trio.open_nursery() as publishing:
            publishing.start_soon(found.publish, at)
            yield found
            found.on = False
        await found.given()
        nursery.cancel_scope.cancel()
    assert found.versions.keys() == {"websocket", "sse", "poll"}
    for kind, versions in found.versions.items():
        steps = [(one, after) for one, after in pairwise(versions) if after != one + 1]
        assert not steps, f"{kind}: a hole, or something twice: {steps}"
        assert versions[-1] == found.published


async def newcomers_are_served(at: Spawned) -> None:
    """Who comes now gets a snapshot and an update, each way."""
    async with session(at, token=token("bob")) as ws, event_stream(at, headers=bearer("bob")) as stream:
        await ws.subscribe()
        await stream.until("snapshot")
        version = (await at.publish("new", WORKER, userId="bob")).json["version"]
        await ws.updates("new", version)
        await stream.updates("new", version)
    assert (await at.get("/api/v2/jobs/new", bearer("bob"))).status == 200


@dataclass(frozen=True)
class Report:
    """What a siege came to; times in seconds, memory in bytes."""

    name: str
    before: float
    under: float
    growth: int
    recovery: float
    connects: int

    def row(self) -> str:
        """A row of a table."""
        return (
            f"| {self.name} | {self.connects} | {1000 * self.before:.0f} | {1000 * self.under:.0f} "
            f"| {self.growth / MIB:.0f} | {self.recovery:.1f} |"
        )


REPORTS: list[Report] = []


async def siege(
    ground: Ground,
    name: str,
    memory: int,
    attack: Callable[[], Awaitable[int]] | None = None,
    source: str = "127.0.0.1",
    title: str = "",
) -> Report:
    """Measure one attack, see that all holds that must, and report.

    Args:
        name: in the table of attacks, or of ``attack``.
        memory: bytes by which the server may grow.
        attack: does it, instead of the attacker; returns how many connections it made.
        title: what it is called in the report, if not by its name.
    """
    async with readers(ground.at) as victims:
        await for_a_while(SECONDS / 2)
        victims.p99()
        await for_a_while(SECONDS / 2)
        before, start_memory, start_standing = victims.p99(), ground.memory(), await ground.standing()
        start_waits = waits_of(ground.at.process.pid)
        peak = 0

        async def watch() -> None:
            nonlocal peak
            while True:
                peak = max(peak, ground.memory())
                await for_a_while(0.02)

        async with trio.open_nursery() as watching:
            watching.start_soon(watch)
            if attack is not None:
                connects = await attack()
            else:
                clients = (ATTACKS | TLS_ATTACKS)[name].clients
                async with ground.attacked(name, source) as attacked:
                    # All of them, unless they were thrown out and come again, or the machine has no time for them.
                    assert attacked["standing"] >= clients / 2, attacked
                    await for_a_while(SECONDS)
                connects = attacked["connects"]
                assert connects >= clients, attacked
            await victims.given()  # with what was held up by the attack and came only now
            under, factor = victims.p99(), slowed(start_waits, waits_of(ground.at.process.pid))
            watching.cancel_scope.cancel()

        ended = trio.current_time()
        standing = start_standing

        async def recovered() -> bool:
            nonlocal standing
            standing = await ground.standing()
            return _back(standing, start_standing)

        with suppress(trio.TooSlowError):
            await until_so(recovered, within=RECOVERY_S, every=0.05)
        assert _back(standing, start_standing), f"{name}: {standing} is left of {start_standing}"
        recovery = trio.current_time() - ended
        await newcomers_are_served(ground.at)
    assert (title or name) in (*ATTACKS, *SCARCITIES), "that is in no table of docs/limits.md"
    report = Report(title or name, before, under, peak - start_memory, recovery, connects)
    assert under <= factor * NOTICEABLE_S, (report, factor)
    assert report.growth <= memory, report
    assert "Traceback" not in ground.at.log()
    assert "connection_failed" not in ground.at.log()
    REPORTS.append(report)
    return report


def _back(now: tuple[int, int, int], before: tuple[int, int, int]) -> bool:
    return now[0] <= before[0] and now[1] <= before[1] and now[2] <= before[2] + MAX_PARKED + 1
