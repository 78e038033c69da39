"""Taking in a job queue: what an event of BullMQ costs, at 5,000 a second and as fast as they are taken."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from functools import partial

from perf.measure import Measure, Row, Target, Watch, alone, server
from perf.nodes import redis_server
from protocol.resp import Replies, encode

RATE = 5_000  # events per second
MOST_US = 60.0  # of CPU for an event
QUEUES = ("video", "mail")
# Of each job: added, waiting, active, sixteen reports, completed.
REPORTS = 16
EVENTS = REPORTS + 4
USERS = 20

PACED = (
    Measure("each", "server CPU per event", "µs", 1, value_most=MOST_US),
    Measure("behind", "taken in after the last event was written", "ms", 0, value_most=1_000),
    Measure("core", "of the server's core", "%", 0),
)
CATCHING_UP = (
    Measure("each", "server CPU per event", "µs", 1, value_most=MOST_US),
    Measure("rate", "events/s", "/s", 0, value_least=RATE),
)


class Writer:
    """What BullMQ's scripts write, by hand: BullMQ itself would need the other core for half of these events."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), 10)
        self._replies = Replies()
        self.jobs = 0

    def close(self) -> None:
        """Closes the connection."""
        self._socket.close()

    def ask(self, commands: list[tuple[str | int, ...]]) -> None:
        """Sends all of these, and waits for their answers."""
        self._socket.sendall(b"".join(encode(command) for command in commands))
        left = len(commands)
        while left:
            data = self._socket.recv(65536)
            if not data:
                raise OSError("Redis has closed the connection")
            left -= len(self._replies.feed(data))

    def describe(self) -> None:
        """Makes the queues known."""
        self.ask([("HSET", f"bull:{queue}:meta", "version", "bullmq:6.7.0") for queue in QUEUES])

    def job(self) -> list[tuple[str | int, ...]]:
        """The commands of one job's life, in order."""
        self.jobs += 1
        queue, job = QUEUES[self.jobs % len(QUEUES)], str(self.jobs)
        data = json.dumps({"userId": f"user-{self.jobs % USERS}", "file": "a.mov", "pad": "x" * 100})
        stream = ("XADD", f"bull:{queue}:events", "MAXLEN", "~", 10_000_000, "*")
        progress: list[tuple[str | int, ...]] = []
        for number in range(REPORTS):
            report = {"percent": 6 * number, "message": f"Encoding {number}", "stage": "encode"}
            progress.append((*stream, "event", "progress", "jobId", job, "data", json.dumps(report)))
        return [
            ("HSET", f"bull:{queue}:{job}", "name", "encode", "data", data, "timestamp", 1),
            (*stream, "event", "added", "jobId", job, "name", "encode"),
            (*stream, "event", "waiting", "jobId", job),
            (*stream, "event", "active", "jobId", job, "prev", "waiting"),
            *progress,
            (*stream, "event", "completed", "jobId", job, "returnvalue", '{"url":"/out/1.mp4"}', "prev", "active"),
        ]


def interleaved(writer: Writer, jobs: int) -> list[tuple[str | int, ...]]:
    """The commands of as many jobs that are worked on side by side."""
    lives = [writer.job() for _ in range(jobs)]
    return [life[step] for step in range(len(lives[0])) for life in lives]


def accepted(target: Target) -> int:
    """How many events the server has taken in."""
    with urllib.request.urlopen(f"http://127.0.0.1:{target.port}/metrics", timeout=10) as answer:
        found = re.search(r'published_total\{outcome="accepted",source="bench"\} ([\d.e+]+)', answer.read().decode())
    return int(float(found[1])) if found else 0


def wait_accepted(target: Target, count: int) -> None:
    """Returns when so many were taken in. Raises OSError if that takes too long."""
    deadline = time.monotonic() + 120
    while accepted(target) < count:
        if time.monotonic() > deadline:
            raise OSError(f"only {accepted(target)} of {count} events were taken in")
        time.sleep(0.05)


@contextlib.contextmanager
def taking_in(store: str, program: str | None) -> Iterator[tuple[Target, Writer]]:
    """A Redis with queues, the server that takes them in, and who writes to them."""
    with redis_server() as redis, contextlib.closing(Writer(redis.port)) as writer:
        writer.describe()
        url = f"redis://127.0.0.1:{redis.port}"
        settings = f'[queues.bench]\nkind = "bullmq"\nurl = "{url}/0"\n'
        with tempfile.NamedTemporaryFile("w", suffix=".toml") as file:
            file.write(settings)
            file.flush()
            where = f"{url}/1" if store == "redis:" else store
            with server(where, program, flags=("--config", file.name)) as target:
                yield target, writer


def paced(target: Target, writer: Writer, seconds: float) -> dict[str, float]:
    """At `RATE`, on a schedule that waits for nobody."""
    batch = 2 * EVENTS
    count = max(1, int(RATE * seconds / batch))
    before = accepted(target)
    watch = Watch(target)
    began = time.monotonic()
    for number in range(count):
        time.sleep(max(0.0, began + number * batch / RATE - time.monotonic()))
        writer.ask(interleaved(writer, batch // EVENTS))
    written = time.monotonic()
    wait_accepted(target, before + count * batch)
    behind = time.monotonic() - written
    result = watch.stop()
    return result | {
        "each": 1e6 * result["cpu"] / (count * batch),
        "behind": 1000 * behind,
        "core": 100 * result["cpu"] / result["seconds"],
    }


def catching_up(target: Target, writer: Writer, events: int) -> dict[str, float]:
    """What was written while the server did not look."""
    before = accepted(target)
    jobs = events // EVENTS
    commands = interleaved(writer, jobs)
    watch = Watch(target)
    for start in range(0, len(commands), 5_000):
        writer.ask(commands[start : start + 5_000])
    wait_accepted(target, before + jobs * EVENTS)
    result = watch.stop()
    events = jobs * EVENTS
    return result | {"each": 1e6 * result["cpu"] / events, "rate": events / result["seconds"]}


def run(program: str | None, *, quick: bool) -> list[Row]:
    """The lines of all stores."""
    rows: list[Row] = []
    for store in ("memory:", "sqlite:", "redis:"):
        with taking_in(store, program) as (target, writer):
            catching_up(target, writer, 1_000)
            name = f"BullMQ, {store.rstrip(':')}"
            rounds = 1 if quick else 2
            rows += alone(
                f"{name}, {RATE:,} events/s", PACED, rounds, partial(paced, target, writer, 0.5 if quick else 3.0)
            )
            rows += alone(
                f"{name}, as fast as they are taken in", CATCHING_UP, rounds,
                partial(catching_up, target, writer, 2_000 if quick else 10_000),
            )  # fmt: skip
    return rows
