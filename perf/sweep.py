"""How the cost of a delivery depends on how many readers, channels and slow readers there are: it should not."""

from __future__ import annotations

import json
import os
import signal
import time
from functools import partial

from perf.fanout import NAMES, Watched, both, check, complete, lockstep, reader_options
from perf.load import LoadClient
from perf.measure import LOAD_CORE, Measure, Row, Start, Target, Watch, alone, in_pairs

READERS = (1, 10, 100, 1_000, 10_000)
ONE_BY_ONE = (
    Measure("update", "server CPU per update, publish included", "µs", 0),
    Measure("net", "server CPU per delivery, against the loop alone", "µs", 2),
    Measure("p99", "latency p99, one update in flight", "ms", 2),
)
SPREAD = (
    Measure("rate", "deliveries/s", "/s", 0),
    Measure("p50", "latency p50", "ms", 2),
    Measure("p99", "latency p99", "ms", 2),
    Measure("process", "server process, share of its core", "%", 0),
    Measure("slip", "publisher behind its schedule at most", "ms", 1),
)
SLOW = (
    Measure("each", "server CPU per delivery", "µs", 2),
    Measure("p50", "latency p50 of the others", "ms", 2),
    Measure("p99", "latency p99 of the others", "ms", 2),
    Measure("rss", "resident memory of the server", "MiB", 0),
)
# Channels, readers of each, updates a second, of them in a batch.
CHANNELS = ((1_000, 1, 5_000, 5), (100, 10, 10_000, 10))
READING, STUCK, SLOW_RATE = 900, 100, 1_000


def one_by_one(watched: Watched, seconds: float) -> dict[str, float]:
    """One update in flight, to however many readers there are."""
    result = lockstep(watched, seconds)
    return result | {
        "update": result["gross"] * watched.connections,
        "p99": watched.readers.report()["latency"]["p99_ms"],
    }


def spread(
    target: Target,
    readers: LoadClient,
    publisher: LoadClient,
    channels: int,
    rate: int,
    batch: int,
    seconds: float,
    spin: bool = False,
) -> dict[str, float]:
    """Updates on a schedule, by turns to all channels.

    With `spin` the readers, who must be the publisher then, look for bytes all the time: a reader that sleeps is woken
    by the server's `send`, at the server's cost.
    """
    readers.mark()
    watch = Watch(target, *{readers.pid, publisher.pid})
    published = publisher.ask(
        "publish",
        "published",
        seconds + 30,
        port=target.port,
        rate=rate,
        batch=batch,
        depth=128,
        jobs=channels,
        seconds=seconds,
        spin=spin,
    )
    each = readers.report()["connections"] / channels
    deadline = time.monotonic() + 10
    while (report := readers.report())["deliveries"] < published["accepted"] * each and time.monotonic() < deadline:
        time.sleep(0.02)
    result = watch.stop()
    check(published, report)
    complete(report)
    result["load"] = max(0.0, result["load"] - 100 * published["idle_seconds"] / result["seconds"])
    return result | {
        "rate": report["deliveries"] / report["delivered_seconds"],
        "process": 100 * result["cpu"] / result["seconds"],
        "slip": published["latest_slip_ms"],
        **{key: report["latency"][f"{key}_ms"] for key in ("p50", "p99")},
    }


def beside_slow(
    target: Target, readers: LoadClient, stuck: LoadClient, publisher: LoadClient, stop: bool, seconds: float
) -> dict[str, float]:
    """1,000 updates a second to those that read; with `stop` a tenth of all readers does not read meanwhile."""
    version = readers.report()["highest_version"]
    readers.mark()
    if stop:
        os.kill(stuck.pid, signal.SIGSTOP)
    try:
        watch = Watch(target, readers.pid, publisher.pid)
        published = publisher.ask(
            "publish", "published", seconds + 30, port=target.port, rate=SLOW_RATE, batch=10, depth=128, seconds=seconds
        )
        report = readers.wait_version(version + published["accepted"])
        result = watch.stop()
    finally:
        os.kill(stuck.pid, signal.SIGCONT)
    check(published, report)
    complete(report)
    stuck.wait_version(version + published["accepted"])
    return result | {
        "each": result["cpu"] / (report["deliveries"] * (READING + STUCK) / READING) * 1e6,
        "rss": target.resident_bytes() / 2**20,
        **{key: report["latency"][f"{key}_ms"] for key in ("p50", "p99")},
    }


def run(start: Start, transport: str, *, quick: bool) -> list[Row]:
    """The lines of one transport."""
    name = NAMES[transport]
    rows: list[Row] = []
    seconds, rounds = (0.3, 1) if quick else (0.5, 3)
    for number in READERS[: 4 if quick else None]:
        with both(start, transport, number, 200 if quick else 1000) as (ours, theirs):
            lockstep(ours, 0.2)
            lockstep(theirs, 0.2)
            rows += in_pairs(
                f"{name}, {number:,} reader{'s' * (number > 1)}",
                # To a few readers an update is its publish, and nothing can be said of what is left.
                ONE_BY_ONE if number >= 100 else (ONE_BY_ONE[0], ONE_BY_ONE[2]),
                rounds,
                partial(one_by_one, ours, seconds),
                partial(one_by_one, theirs, seconds),
            )
    for channels, each, rate, batch in CHANNELS:
        with start("memory:") as target, LoadClient(LOAD_CORE) as readers, LoadClient(LOAD_CORE) as publisher:
            # Every job has an update before its readers come: they wait for a snapshot.
            publisher.ask("publish", "published", port=target.port, jobs=channels, requests=channels)
            readers.start(port=target.port, connections=channels * each, turn=channels, **_own(transport))
            rows += alone(
                f"{name}, {channels:,} channels of {each} reader{'s' * (each > 1)}, {rate:,} updates/s",
                SPREAD,
                rounds,
                partial(spread, target, readers, publisher, channels, rate, batch, 3 * seconds),
            )
    with (
        start("memory:") as target,
        LoadClient(LOAD_CORE) as readers,
        LoadClient(LOAD_CORE) as stuck,
        LoadClient(LOAD_CORE) as publisher,
    ):
        publisher.ask("publish", "published", port=target.port, requests=1)
        readers.start(port=target.port, connections=READING, **reader_options(transport))
        stuck.start(port=target.port, connections=STUCK, rcvbuf=4096, **reader_options(transport))
        run_ = partial(beside_slow, target, readers, stuck, publisher, seconds=4 * seconds)
        rows += in_pairs(
            f"{name}, a tenth of 1,000 readers does not read (second column: all read)",
            SLOW,
            rounds,
            partial(run_, True),
            partial(run_, False),
        )
    return rows


def _own(transport: str) -> dict[str, object]:
    """What a reader of one of many jobs asks for."""
    if transport == "ws":
        return {
            "transport": "ws",
            "path": "/ws/jobs",
            "subscribe": json.dumps({"type": "subscribe", "jobIds": ["bench-{n}"]}),
        }
    return {"transport": "sse", "path": "/api/v2/jobs/stream?jobIds=bench-{n}"}
