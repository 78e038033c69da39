"""Connections: how many a second, how soon the first snapshot, how many bytes while idle."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

from perf.fanout import NAMES, reader_options
from perf.load import LoadClient, LoadError
from perf.measure import LOAD_CORE, Measure, Row, Start, Target, Watch, bare, in_pairs

SOURCES = 200  # addresses the load comes from: ports of a closed connection rest for a minute
CHURN = (
    Measure("rate", "connections/s, up to the first snapshot", "/s", 0),
    Measure("each", "server CPU per connection", "µs", 1),
)
ARRIVALS = (
    Measure("setup_p99", "1,000 arriving in a second: answered, p99", "ms", 2),
    Measure("first_p50", "connection to first snapshot p50", "ms", 2),
    Measure("first_p99", "connection to first snapshot p99", "ms", 2, value_most=100),
    Measure("first_max", "connection to first snapshot max", "ms", 2),
)


def churn(target: Target, client: LoadClient, transport: str, seconds: float) -> dict[str, float]:
    """64 clients that connect, wait for the snapshot, leave and come again."""
    watch = Watch(target, client.pid)
    client.send(
        "start",
        port=target.port,
        connections=64,
        window=64,
        sources=SOURCES,
        churn_seconds=seconds,
        **reader_options(transport),
    )
    time.sleep(seconds)
    deadline = time.monotonic() + 10
    while (report := client.report())["pending"] and time.monotonic() < deadline:
        time.sleep(0.02)
    result = watch.stop()
    client.ask("close", "closed")
    if report["failed"] or report["errors"] or report["pending"]:
        raise LoadError(f"connections failed: {report}")
    return result | {"rate": report["finished"] / result["seconds"], "each": result["cpu"] / report["finished"] * 1e6}


def arrivals(target: Target, client: LoadClient, transport: str, number: int) -> dict[str, float]:
    """So many new readers, a thousand a second."""
    watch = Watch(target, client.pid)
    client.start(port=target.port, connections=number, rate=1000, sources=SOURCES, **reader_options(transport))
    result = watch.stop()
    report = client.report()
    client.ask("close", "closed")
    first = report["first_snapshot"]
    return result | {
        "setup_p99": report["setup"]["p99_ms"],
        "first_p50": first["p50_ms"],
        "first_p99": first["p99_ms"],
        "first_max": first["max_ms"],
    }


def grown(target: Target, client: LoadClient, transport: str, number: int, settle: float) -> dict[str, float]:
    """Resident memory that so many subscribed connections take, all of it after them, and what making them took."""
    options = reader_options(transport)
    client.ask("publish", "published", port=target.port, requests=1)
    # What is loaded or grown once only is not a connection's.
    client.start(port=target.port, connections=100, sources=SOURCES, **options)
    client.ask("close", "closed")
    time.sleep(settle)  # closing is not answered: nothing tells when the server is done with it
    before = target.resident_bytes()
    watch = Watch(target, client.pid)
    client.start(port=target.port, connections=number, sources=SOURCES, **options)
    result = watch.stop()
    time.sleep(settle)
    report = client.report()
    if report["connections"] != number or report["errors"]:
        raise LoadError(f"not all stayed: {report}")
    after = target.resident_bytes()
    return result | {"grown": after - before, "after": after}


def idle(
    begin: Callable[[], AbstractContextManager[Target]], transport: str, number: int, settle: float
) -> dict[str, float]:
    """Bytes of each connection, in a process of its own: memory kept from earlier would hide what they take."""
    with begin() as target, LoadClient(LOAD_CORE) as client:
        result = grown(target, client, transport, number, settle)
        return result | {"bytes": result["grown"] / number}


def run(start: Start, transport: str, *, quick: bool) -> list[Row]:
    """The lines of one transport."""
    name = NAMES[transport]
    rows: list[Row] = []
    seconds, rounds = (0.3, 1) if quick else (0.8, 3)
    arriving = 300 if quick else 1000
    with start("memory:") as real, bare() as loop, LoadClient(LOAD_CORE) as client:
        client.ask("publish", "published", port=real.port, requests=1)
        churn(real, client, transport, 0.1)
        rows += in_pairs(
            f"{name}, coming and going",
            CHURN,
            rounds,
            partial(churn, real, client, transport, seconds),
            partial(churn, loop, client, transport, seconds),
        )
        rows += in_pairs(
            f"{name}, coming",
            ARRIVALS,
            rounds,
            partial(arrivals, real, client, transport, arriving),
            partial(arrivals, loop, client, transport, arriving),
        )
    number, settle = (1000, 0.2) if quick else (10_000, 1.0)
    bytes_each = Measure("bytes", "bytes per idle connection", "B", 0, value_most=10_000)
    rows += in_pairs(
        f"{name}, {number:,} idle",
        (bytes_each,),
        1,
        partial(idle, partial(start, "memory:"), transport, number, settle),
        partial(idle, bare, transport, number, settle),
    )
    return rows
