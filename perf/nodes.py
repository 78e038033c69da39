"""Two servers on one Redis: what every reader gets, how late, and what it costs each of the processes."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from perf.fanout import NAMES, check
from perf.load import LoadClient
from perf.measure import LOAD_CORE, SERVER_CORE, Measure, Row, Target, alone, core_busy_seconds, server

CORES = (SERVER_CORE, LOAD_CORE)
# Readers at each node. A long-poll that is answered with one update costs as much as many deliveries.
MIX = {"ws": 225, "sse": 225, "poll": 50}
JOBS = len(CORES) * sum(MIX.values())
RATE = 10_000  # updates per second, half of them published at each node
BATCH = 50
TRANSPORTS = NAMES | {"poll": "long-poll"}
PATHS: dict[str, dict[str, object]] = {
    "ws": {"path": "/ws/jobs", "subscribe": json.dumps({"type": "subscribe", "userId": "user-{n}"})},
    "sse": {"path": "/api/v2/jobs/stream?jobIds=load-{n}"},
    "poll": {"path": "/api/v2/jobs/poll?jobIds=load-{n}"},
}
FIELDS = '"userId":"user-{n}","status":"processing","progress":45,'
COSTS = (
    Measure("node", "CPU per update and node", "µs", 1),
    Measure("redis", "CPU of Redis per update", "µs", 1),
    Measure("busy", "busiest server process", "% of a core", 0),
    Measure("redis_busy", "Redis", "% of a core", 0),
)
SPREAD = (
    Measure("rate", "deliveries/s, each update to one reader", "/s", 0, value_least=0.98 * RATE),
    Measure("lost", "lost", "", 0, value_most=0),
    Measure("repeated", "repeated", "", 0, value_most=0),
    *(
        Measure(f"{key}_{transport}", f"latency {key} over {name}", "ms", 1, value_most=100 if key == "p99" else None)
        for transport, name in TRANSPORTS.items()
        for key in ("p50", "p99")
    ),
    *COSTS,
    Measure("slip", "publishers behind their schedule at most", "ms", 1),
)
EVERYTHING = (
    Measure("rate", "deliveries/s, as fast as publishes are answered", "/s", 0),
    Measure("updates", "updates/s", "/s", 0),
    Measure("lost", "missing", "", 0),
    Measure("repeated", "repeated", "", 0, value_most=0),
    Measure("p50_ws", "latency p50", "ms", 1),
    Measure("p99_ws", "latency p99", "ms", 1),
    *COSTS,
)


@dataclass
class Fleet:
    """The processes of a run: two servers, Redis, and on the load side a client per node and transport."""

    nodes: list[Target]
    redis: Target
    readers: dict[tuple[int, str], LoadClient]
    publishers: list[LoadClient]

    def open(self) -> None:
        """Connects the readers, each to a job or a user of its own, and waits for their snapshots."""
        first = 0
        for (node, transport), client in self.readers.items():
            count = MIX[transport]
            client.start(
                port=self.nodes[node].port, transport=transport, connections=count, first=first, **PATHS[transport]
            )
            first += count

    def open_all(self, connections: int) -> None:
        """Connects as many WebSocket readers at each node, all to one job."""
        for client in self.readers.values():
            client.ask("close", "closed")
        subscribe = json.dumps({"type": "subscribe", "jobIds": ["all"]})
        for (node, transport), client in self.readers.items():
            if transport == "ws":
                options = {"path": "/ws/jobs", "subscribe": subscribe, "sample": 16, "full_every": 50}
                client.start(port=self.nodes[node].port, transport="ws", connections=connections, **options)

    def publish(self, **options: object) -> list[dict[str, Any]]:
        """Publishes half of the jobs at each node; what became of it."""
        for node, client in enumerate(self.publishers):
            client.send(
                "publish",
                port=self.nodes[node].port,
                job="load",
                jobs=JOBS // len(self.nodes),
                first=node,
                step=len(self.nodes),
                fields=FIELDS,
                connections=2,
                **options,
            )
        return [client.wait("published", 120.0) for client in self.publishers]

    def mark(self) -> None:
        """Sets all counters of the readers to zero."""
        for client in self.readers.values():
            client.mark()

    def reports(self, deliveries: int) -> dict[tuple[int, str], dict[str, Any]]:
        """What the readers counted, once there are so many deliveries, or as it is after ten seconds."""
        deadline = time.monotonic() + 10
        while True:
            reports = {key: client.report() for key, client in self.readers.items()}
            if sum(report["deliveries"] for report in reports.values()) >= deliveries or time.monotonic() > deadline:
                return reports
            time.sleep(0.02)


class Watch:
    """CPU time of all processes between its making and `stop`."""

    def __init__(self, fleet: Fleet) -> None:
        load = [*fleet.readers.values(), *fleet.publishers]
        self._nodes = fleet.nodes
        self._redis = fleet.redis
        self._load = [Target("load", client.pid, 0) for client in load]
        self._began = self._now()

    def _now(self) -> list[float]:
        return [
            time.monotonic(),
            sum(core_busy_seconds(core) for core in CORES),
            self._redis.cpu_seconds(),
            sum(process.cpu_seconds() for process in self._load),
            *(node.cpu_seconds() for node in self._nodes),
        ]

    def stop(self, updates: int) -> dict[str, float]:
        """The `COSTS`; shares of a core (0 to 100): `load`, `others`."""
        now = [now - began for now, began in zip(self._now(), self._began, strict=True)]
        seconds, cores, redis, load, *nodes = now
        return {
            "node": sum(nodes) / len(nodes) / updates * 1e6,
            "redis": redis / updates * 1e6,
            "busy": 100 * max(nodes) / seconds,
            "redis_busy": 100 * redis / seconds,
            "load": 100 * load / seconds,
            "others": max(0.0, 100 * (cores - redis - load - sum(nodes)) / seconds),
        }


def summed(reports: dict[tuple[int, str], dict[str, Any]]) -> dict[str, float]:
    """Over all groups of readers: counts, and of each transport the latencies of the slower node."""
    result: dict[str, float] = {
        "deliveries": sum(report["deliveries"] for report in reports.values()),
        "repeated": sum(report["repeated"] for report in reports.values()),
        "rate": sum(report["deliveries"] for report in reports.values())
        / max(report["delivered_seconds"] for report in reports.values()),
    }
    for (_, transport), report in reports.items():
        for key in ("p50", "p99"):
            name = f"{key}_{transport}"
            result[name] = max(result.get(name, 0.0), report["latency"][f"{key}_ms"])
    return result


def spread(fleet: Fleet, seconds: float) -> dict[str, float]:
    """Each reader gets its own share of the updates."""
    fleet.mark()
    watch = Watch(fleet)
    rate = RATE // len(fleet.nodes)
    # A number of requests and not of seconds: on a disturbed machine they come late, but all of them count.
    published = fleet.publish(rate=rate, batch=BATCH, depth=64, requests=int(rate * seconds / BATCH))
    accepted = sum(one["accepted"] for one in published)
    reports = fleet.reports(accepted)
    costs = watch.stop(accepted)
    for one in published:
        for report in reports.values():
            check(one, report)
    result = summed(reports)
    return (
        costs
        | result
        | {
            "lost": accepted - (result["deliveries"] - result["repeated"]),
            "slip": max(one["latest_slip_ms"] for one in published),
        }
    )


def everything(fleet: Fleet, connections: int, seconds: float) -> dict[str, float]:
    """Each reader gets each update."""
    fleet.mark()
    watch = Watch(fleet)
    published = fleet.publishers[0].ask(
        "publish",
        "published",
        seconds + 30,
        port=fleet.nodes[0].port,
        job="all",
        batch=100,
        depth=2,
        seconds=seconds,
    )
    updates = published["accepted"]
    readers = connections * len(fleet.nodes)
    reports = {key: report for key, report in fleet.reports(updates * readers).items() if key[1] == "ws"}
    costs = watch.stop(updates)
    result = summed(reports)
    for report in reports.values():
        check(published, report)
    return (
        costs
        | result
        | {
            "updates": updates / published["seconds"],
            "lost": updates * readers - (result["deliveries"] - result["repeated"]),
        }
    )


@contextlib.contextmanager
def redis_server() -> Iterator[Target]:
    """A Redis of our own that keeps nothing on disk. Raises OSError if there is none."""
    program = shutil.which("redis-server")
    if program is None:
        raise OSError("redis-server is not installed")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="redis-bench-") as directory:
        log = Path(directory) / "log"
        arguments = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--dir", directory]
        with log.open("wb") as out:
            process = subprocess.Popen([program, *arguments], stdout=out, stderr=subprocess.STDOUT)
        try:
            deadline = time.monotonic() + 10
            while b"Ready to accept connections" not in log.read_bytes():
                if process.poll() is not None or time.monotonic() > deadline:
                    raise OSError(f"Redis did not start:\n{log.read_text(errors='replace')[-2000:]}")
                time.sleep(0.02)
            yield Target("redis", process.pid, port)
        finally:
            process.kill()
            process.wait()


@contextlib.contextmanager
def fleet(program: str | None) -> Iterator[Fleet]:
    """All processes: each server on a core, Redis and the load wherever there is time."""
    bench = os.sched_getaffinity(0)
    os.sched_setaffinity(0, CORES)
    try:
        with contextlib.ExitStack() as stack:
            redis = stack.enter_context(redis_server())
            store = f"redis://127.0.0.1:{redis.port}"
            nodes = [stack.enter_context(server(store, program, core)) for core in CORES]
            readers = {
                (node, transport): stack.enter_context(LoadClient()) for node in range(len(nodes)) for transport in MIX
            }
            yield Fleet(nodes, redis, readers, [stack.enter_context(LoadClient()) for _ in nodes])
    finally:
        os.sched_setaffinity(0, bench)


def run(program: str | None, *, quick: bool) -> list[Row]:
    """All lines."""
    with fleet(program) as running:
        running.publish(requests=JOBS // len(running.nodes) // BATCH, batch=BATCH)  # now every job exists
        running.open()
        spread(running, 0.5)
        seconds = 2.0 if quick else 10.0
        rows = alone(
            "2 servers on Redis, 10,000 updates/s, 1,000 readers of one job each",
            SPREAD,
            1,
            partial(spread, running, seconds),
        )
        connections = 500
        running.publishers[0].ask("publish", "published", port=running.nodes[0].port, job="all", requests=1)
        running.open_all(connections)
        everything(running, connections, 0.3)
        rows += alone(
            "2 servers on Redis, 1,000 WebSocket readers of the same",
            EVERYTHING,
            1 if quick else 2,
            partial(everything, running, connections, 1.0 if quick else 3.0),
        )
        return rows
