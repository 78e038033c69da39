"""Fan-out: what a delivery costs and how late it is, with 1,000 readers, over WebSocket and SSE."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from urllib.parse import quote

from perf.load import LoadClient
from perf.measure import LOAD_CORE, Measure, Row, Start, Target, Watch, bare, in_pairs

JOB = "bench"
NAMES = {"ws": "WebSocket", "sse": "SSE"}
SATURATED_RATE = 10_000  # updates per second
LOCKSTEP = (
    Measure("rate", "deliveries/s, one update in flight", "/s", 0),
    Measure("gross", "server CPU per delivery, publish included", "µs", 2),
    Measure("net", "server CPU per delivery, against the loop alone", "µs", 2, ratio_most=1.3),
    Measure("joined", "updates per read of a reader", "", 2),
)
POLLED = (Measure("net", "the same, to readers that never sleep", "µs", 2, ratio_most=1.3),)
LATENCY = (
    Measure("p50", "latency p50 at 10 updates/s", "ms", 2),
    Measure("p99", "latency p99 at 10 updates/s", "ms", 2, ratio_most=1.3),
    Measure("max", "latency max at 10 updates/s", "ms", 2),
)
SATURATED = (
    Measure("rate", "deliveries/s at 10,000 updates/s", "/s", 0, value_least=0.98 * 1000 * SATURATED_RATE),
    Measure("p50", "latency p50", "ms", 1),
    Measure("p99", "latency p99", "ms", 1, value_most=100),
    Measure("max", "latency max", "ms", 1),
    Measure("missing", "deliveries missing or lost", "", 0, value_most=0),
    Measure("repeated", "deliveries repeated", "", 0, value_most=0),
    Measure("process", "server process, share of its core", "%", 0),
    Measure("core", "the whole core, kernel threads included", "%", 0),
    Measure("bytes", "bytes per delivery", "B", 0),
    Measure("joined", "updates per read of a reader", "", 1),
    Measure("slip", "publisher behind its schedule at most", "ms", 1),
)


def reader_options(transport: str, fields: str = "") -> dict[str, object]:
    """What a reader of the job asks for; `fields` is a comma list."""
    if transport == "ws":
        subscribe: dict[str, object] = {"type": "subscribe", "jobIds": [JOB]}
        if fields:
            subscribe["fields"] = fields.split(",")
        return {"transport": "ws", "path": "/ws/jobs", "subscribe": json.dumps(subscribe)}
    suffix = f"&fields={quote(fields)}" if fields else ""
    return {"transport": "sse", "path": f"/api/v2/jobs/stream?jobIds={JOB}{suffix}"}


@dataclass
class Watched:
    """A target with its readers."""

    target: Target
    readers: LoadClient
    connections: int
    publish_cpu: float = 0.0  # server CPU seconds of one publish nobody watches

    def pids(self) -> tuple[int, ...]:
        """Of the load side."""
        return (self.readers.pid,)

    def open(self, transport: str, *, fields: str = "", sample: int = 1) -> None:
        """Opens the readers anew and waits for their snapshots."""
        self.readers.ask("close", "closed")
        options = reader_options(transport, fields)
        self.readers.start(port=self.target.port, connections=self.connections, sample=sample, full_every=50, **options)


def measure_publish(watched: Watched, requests: int) -> None:
    """Finds the CPU cost of a publish alone. Creates the job, too."""
    client, port = watched.readers, watched.target.port
    client.ask("publish", "published", port=port, requests=20)
    watch = Watch(watched.target)
    client.ask("publish", "published", port=port, requests=requests)
    watched.publish_cpu = watch.stop()["cpu"] / requests


def same_bytes(ours: Watched, theirs: Watched, transport: str) -> None:
    """Shows the bare loop an update of the real server, so that it sends the same bytes."""
    client = ours.readers
    version = client.report()["highest_version"]
    client.ask("publish", "published", port=ours.target.port, requests=1)
    client.wait_version(version + 1)
    sample = client.ask("sample", "sample")
    theirs.target.ask("POST", "/bare", json.dumps({**sample, "transport": transport}).encode())


def lockstep(watched: Watched, seconds: float, spin: bool = False) -> dict[str, float]:
    """One update in flight: published when the one before has reached everybody, so deliveries are sends.

    With `spin` the readers look for bytes all the time instead of sleeping until some come.
    """
    is_bare = watched.target.name == "bare"
    loop = watched.target.ask("GET", "/bare") if is_bare else None
    watched.readers.mark()
    watch = Watch(watched.target, *watched.pids())
    published = watched.readers.ask(
        "publish", "published", seconds + 30, port=watched.target.port, seconds=seconds, lockstep=True, spin=spin
    )
    result = watch.stop()
    report = watched.readers.report()
    check(published, report)
    complete(report)
    result["load"] = max(0.0, result["load"] - 100 * published["idle_seconds"] / result["seconds"])
    deliveries = report["deliveries"]
    result["joined"] = deliveries / report["reads"]
    result["rate"] = deliveries / published["seconds"]
    result["gross"] = result["cpu"] / deliveries * 1e6
    result["net"] = (result["cpu"] - published["requests"] * watched.publish_cpu) / deliveries * 1e6
    if loop is not None:
        after = watched.target.ask("GET", "/bare")
        result["net"] = (after["loop_cpu_ns"] - loop["loop_cpu_ns"]) / (after["sends"] - loop["sends"]) / 1e3
    return result


def latency(watched: Watched, publisher: LoadClient, seconds: float) -> dict[str, float]:
    """Ten updates a second, one by one: how long after its writing an update reached a reader."""
    version = watched.readers.report()["highest_version"]
    watched.readers.mark()
    watch = Watch(watched.target, *watched.pids(), publisher.pid)
    published = publisher.ask("publish", "published", seconds + 30, port=watched.target.port, rate=10, seconds=seconds)
    report = watched.readers.wait_version(version + published["accepted"])
    result = watch.stop()
    check(published, report)
    complete(report)
    return result | {key: report["latency"][f"{key}_ms"] for key in ("p50", "p99", "max")}


def saturated(watched: Watched, publisher: LoadClient, seconds: float) -> dict[str, float]:
    """10,000 updates a second for one job, in batches of 100 every 10 ms, on a schedule that waits for no answer."""
    version = watched.readers.report()["highest_version"]
    watched.readers.mark()
    watch = Watch(watched.target, *watched.pids(), publisher.pid)
    published = publisher.ask(
        "publish",
        "published",
        seconds + 30,
        port=watched.target.port,
        rate=SATURATED_RATE,
        batch=100,
        depth=128,
        seconds=seconds,
    )
    report = watched.readers.wait_version(version + published["accepted"])
    result = watch.stop()
    check(published, report)
    expected = published["accepted"] * watched.connections
    return result | {
        "rate": report["deliveries"] / report["delivered_seconds"],
        "missing": expected - report["deliveries"] + report["repeated"],
        "repeated": report["repeated"],
        "process": 100 * result["cpu"] / result["seconds"],
        "bytes": report["bytes"] / max(1, report["deliveries"]),
        "joined": report["deliveries"] / max(1, report["reads"]),
        "slip": published["latest_slip_ms"],
        **{key: report["latency"][f"{key}_ms"] for key in ("p50", "p99", "max")},
    }


def check(published: dict[str, object], report: dict[str, object]) -> None:
    """A number that was got with errors is no number. Raises OSError."""
    if published["failed"] or published["unanswered"] or published["error"]:
        raise OSError(f"publishing failed: {published}")
    if report["errors"] or report["closed"]:
        raise OSError(f"readers had errors: {report}")


def complete(report: dict[str, object]) -> None:
    """At rates that anybody can keep up with nothing may be missing. Raises OSError."""
    if report["lost"] or report["repeated"]:
        raise OSError(f"deliveries were lost or repeated: {report}")


@contextlib.contextmanager
def both(start: Start, transport: str, connections: int, publishes: int) -> Iterator[tuple[Watched, Watched]]:
    """The real server and the bare loop, each with its readers, all connected; only one is driven at a time."""
    with (
        start("memory:") as real,
        bare() as loop,
        LoadClient(LOAD_CORE) as real_load,
        LoadClient(LOAD_CORE) as loop_load,
    ):
        ours, theirs = Watched(real, real_load, connections), Watched(loop, loop_load, connections)
        for watched in (ours, theirs):
            measure_publish(watched, publishes)
            watched.open(transport)
        same_bytes(ours, theirs, transport)
        yield ours, theirs


def run(start: Start, transport: str, *, quick: bool) -> list[Row]:
    """All fan-out lines of one transport."""
    connections = 1000
    name = NAMES[transport]
    rows: list[Row] = []
    publishes = 200 if quick else 2000
    with both(start, transport, connections, publishes) as (ours, theirs), LoadClient(LOAD_CORE) as publisher:
        seconds, rounds = (0.3, 1) if quick else (0.8, 3)
        lockstep(ours, 0.2)
        lockstep(theirs, 0.2)
        scenario = f"{name}, 1,000 readers"
        rows += in_pairs(
            scenario, LOCKSTEP, rounds, partial(lockstep, ours, seconds), partial(lockstep, theirs, seconds)
        )
        alike = partial(lockstep, spin=True)
        rows += in_pairs(scenario, POLLED, rounds, partial(alike, ours, seconds), partial(alike, theirs, seconds))
        pause, times = (0.5, 1) if quick else (2.0, 4)
        rows += in_pairs(
            scenario,
            LATENCY,
            times,
            partial(latency, ours, publisher, pause),
            partial(latency, theirs, publisher, pause),
        )
        for fields, what in (("", "whole record"),) if quick else (("", "whole record"), ("message", "fields=message")):
            for watched in (ours, theirs):
                watched.open(transport, fields=fields, sample=16)
            same_bytes(ours, theirs, transport)
            long, turns = (0.5, 1) if quick else (2.0, 2)
            rows += in_pairs(
                f"{name}, 1,000 readers, {what}",
                SATURATED,
                turns,
                partial(saturated, ours, publisher, long),
                partial(saturated, theirs, publisher, long),
            )
    return rows
