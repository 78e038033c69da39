"""A crowd that only listens: what 100,000 connections take, and how soon 10,000 have their snapshot."""

from __future__ import annotations

import resource
import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from pathlib import Path
from typing import Protocol

from perf.connect import grown
from perf.fanout import NAMES
from perf.load import LoadClient
from perf.measure import LOAD_CORE, Measure, Row, Target, alone

CROWD, SPARE = 100_000, 2000  # connections; descriptors besides
FEWER = 10_000
SETTLE_S = 2.0


class Start(Protocol):
    """Starts the server on a store, with more flags."""

    def __call__(self, store: str, *, flags: Sequence[str]) -> AbstractContextManager[Target]: ...


def measures(number: int) -> tuple[Measure, ...]:
    """The lines for so many connections, with what must hold."""
    return (
        Measure("processes", "processes", "", 0),
        Measure("seconds", "all have their snapshot after", "s", 1, value_most=5 if number == FEWER else None),
        Measure("cpu_each", "server CPU per connection", "µs", 0),
        Measure("bytes", "bytes per idle connection", "B", 0, value_most=6144),
        Measure("megabytes", "resident memory, all of it", "MB", 0, value_most=1000 if number == CROWD else None),
    )


def room(number: int) -> int:
    """How many connections one process has descriptors for, after asking for as many as are wanted."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = number + SPARE
    if soft < wanted:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, max(hard, wanted)))
        except (ValueError, OSError):  # it takes a privilege to raise the hard limit
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return min(number, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - SPARE)


def crowd(start: Start, transport: str, number: int) -> dict[str, float]:
    """So many subscribed readers as fast as they come in, and then at rest; on several servers if they are more than
    one process may have descriptors."""
    total = {"seconds": 0.0, "cpu": 0.0, "load": 0.0, "others": 0.0, "grown": 0.0, "megabytes": 0.0, "processes": 0.0}
    with ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="statuswire-crowd-"))
        config = Path(directory) / "statuswire.toml"
        config.write_text(f"[server]\nmax_connections = {number + 1000}\n")
        left = number
        while left:
            here = room(left)
            left -= here
            target = stack.enter_context(start("memory:", flags=("--config", str(config))))
            client = stack.enter_context(LoadClient(LOAD_CORE))
            result = grown(target, client, transport, here, SETTLE_S)
            result |= {"megabytes": result["after"] / 1e6, "processes": 1.0}
            for key in total:
                total[key] = max(total[key], result[key]) if key in ("load", "others") else total[key] + result[key]
    return total | {"cpu_each": total["cpu"] / number * 1e6, "bytes": total["grown"] / number}


def run(start: Start, *, quick: bool) -> list[Row]:
    """The lines of both transports."""
    rows: list[Row] = []
    for number in (500,) if quick else (FEWER, CROWD):
        for transport in ("ws", "sse"):
            name = f"{NAMES[transport]}, {number:,} at once, then idle"
            rows += alone(name, measures(number), 1, partial(crowd, start, transport, number))
    return rows
