"""What is measured of each: the same load, the same client, the same clock."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final
from urllib.request import Request, urlopen

from perf.load import LoadClient, LoadError
from perf.measure import LOAD_CORE, Measure, Target, Watch
from perf.peers.catalog import Running

# So long that an update of ours with `fields=message` is 150 bytes, as the others' are.
JOB: Final = "benchmark-job"
READERS: Final = 1000
CHANNELS: Final = 100
SOURCES: Final = 200
# So many come at the same time: pushpin refuses some of those that come with a hundred others.
WINDOW: Final = 8
# Who has not delivered everything so long after the last update was written has not kept up.
LATE_S: Final = 2.0

SATURATED: Final = (
    Measure("cpu8", "CPU per delivery, at most 8 updates in flight", "µs", 2),
    Measure("joined8", "updates per read of a reader", "", 1),
)
SINGLE: Final = (Measure("cpu1", "CPU per delivery, 1 update in flight", "µs", 2),)
PACED: Final = (Measure("p99", "1,000 readers, 10 updates/s: p99", "ms", 1),)
SPREAD: Final = (
    Measure("spread_p99", "100 channels, 10,000 updates/s: p99", "ms", 1),
    Measure("spread_core", "100 channels, 10,000 updates/s: core used", "", 2),
)
SETUP: Final = (Measure("setup", "CPU per connection set up", "µs", 0),)
IDLE: Final = (Measure("idle", "memory per idle connection", "B", 0),)


class Failed(Exception):
    """It did not do what was asked of it; the message says how far it came."""


@dataclass
class Side:
    """A server with its load client."""

    target: Target
    client: LoadClient
    transport: str
    running: Running | None  # None: ours

    @property
    def ours(self) -> bool:
        """Whether this server is on it, fed in whatever way."""
        return self.running is None or self.running.peer.runs == "statuswire"

    def options(self, channels: int) -> dict[str, object]:
        """What a reader asks for."""
        name = f"{JOB}-{{n}}" if channels > 1 else JOB
        common: dict[str, object] = {
            "transport": self.transport,
            "port": self.target.port,
            "turn": channels,
            "check": False,
            "sources": SOURCES,
        }
        if self.running is None or self.ours:
            if self.transport != "ws":
                way = "stream" if self.transport == "sse" else "poll"
                return common | {"path": f"/api/v2/jobs/{way}?jobIds={name}&fields=message"}
            subscribe = {"type": "subscribe", "jobIds": [name], "fields": ["message"]}
            return common | {"path": "/ws/jobs", "subscribe": json.dumps(subscribe)}
        if self.running.peer.name == "socket.io":
            path = f"/socket.io/?EIO=4&transport=websocket&channel={name}"
            return common | {"path": path, "subscribe": "40"}
        # The load client adds to the query.
        return common | {"path": f"/{self.transport}/{name}{'?watch=1' if self.transport == 'poll' else ''}"}

    def open(self, number: int, channels: int = 1) -> None:
        """Readers, each with its greeting."""
        self.client.ask("close", "closed")
        self.prepare(channels)
        for patience in (1.0, 3.0, 0.0):  # some are busy for a while with those who have gone
            try:
                self.client.start(connections=number, window=WINDOW, **self.options(channels))
                return
            except LoadError as error:
                if not patience:
                    raise Failed(f"readers: {error}") from None
                self.client.ask("close", "closed")
                time.sleep(patience)

    def prepare(self, channels: int) -> None:
        """What has to be there before a reader comes."""
        if self.running is not None and self.running.peer.feed == "post":
            # It has no greeting of its own, but gives a reader the message that its channel keeps.
            for n in range(channels):
                name = f"{JOB}-{n}" if channels > 1 else JOB
                with contextlib.suppress(OSError):
                    self._channel(name, "DELETE")
                kind = "subscribed" if self.transport == "ws" else "snapshot"
                self._channel(name, "POST", b'{"type":"%b"}' % kind.encode())
        if self.ours:
            many = {"jobs": channels, "requests": channels} if channels > 1 else {"requests": 1}
            self.client.ask("publish", "published", port=self.target.port, job=JOB, **many)

    def _channel(self, name: str, method: str, body: bytes | None = None) -> None:
        with urlopen(
            Request(f"http://127.0.0.1:{self.target.port}/pub/{name}", body, method=method), timeout=5
        ) as answer:
            answer.read()

    def publish(self, seconds: float, **more: object) -> dict[str, Any]:
        """Updates on their way in, by whatever way there is; done when they are in."""
        if self.running is None:
            more = {"port": self.target.port, "depth": 64} | more
        else:
            feed = self.running.peer.feed
            more = {"port": self.running.feed_port, "feed": feed} | more
            if feed == "messages":
                more |= {"depth": 64}
            if feed == "post":
                more |= {"batch": 0, "connections": 2, "depth": 128}
        return self.client.ask("publish", "published", seconds + 30, job=JOB, seconds=seconds, **more)

    def delivered(self, expected: int) -> dict[str, Any]:
        """The report once everything has come. Raises Failed if it does not."""
        deadline = time.monotonic() + LATE_S
        while (report := self.client.report())["deliveries"] < expected:
            if time.monotonic() > deadline:
                share = 100 * report["deliveries"] / expected
                raise Failed(f"{share:.0f} % delivered in time{', ' + report['error'] if report['error'] else ''}")
            time.sleep(0.02)
        if report["deliveries"] > expected or report["errors"] or report["closed"]:
            raise Failed(f"{report['deliveries']} deliveries of {expected}: {report['error']}")
        return report


def _checked(published: dict[str, Any]) -> None:
    if published["failed"] or published["unanswered"] or published["error"]:
        raise Failed(
            f"publishing: {published['unanswered']} unanswered, {published['failed']} failed {published['error']}"
        )


def in_flight(side: Side, seconds: float, number: int) -> dict[str, float]:
    """As fast as it goes with so many updates that have not reached every reader."""
    side.client.mark()
    watch = Watch(side.target, side.client.pid)
    published = side.publish(seconds, lockstep=number)
    result = watch.stop()
    report = side.client.report()
    if published["accepted"] * READERS != report["deliveries"]:
        raise Failed(f"{report['deliveries']} deliveries of {published['accepted'] * READERS}: {report['error']}")
    _checked(published)
    cost = result["cpu"] / report["deliveries"] * 1e6
    return result | {f"cpu{number}": cost, f"joined{number}": report["deliveries"] / report["reads"]}


def paced(side: Side, seconds: float) -> dict[str, float]:
    """Ten updates a second to all readers."""
    side.client.mark()
    watch = Watch(side.target, side.client.pid)
    published = side.publish(seconds, rate=10)
    _checked(published)
    report = side.delivered(published["accepted"] * READERS)
    return watch.stop() | {"p99": report["latency"]["p99_ms"]}


def spread(side: Side, seconds: float) -> dict[str, float]:
    """10,000 updates a second over all channels in turn, ten every millisecond."""
    side.client.mark()
    watch = Watch(side.target, side.client.pid)
    published = side.publish(seconds, rate=10_000, batch=10, jobs=CHANNELS)
    _checked(published)
    report = side.delivered(published["accepted"] * READERS // CHANNELS)
    result = watch.stop()
    return result | {
        "spread_p99": report["latency"]["p99_ms"],
        "spread_core": result["cpu"] / report["delivered_seconds"],
    }


def setup(side: Side, seconds: float) -> dict[str, float]:
    """64 clients that connect, are greeted, leave and come again."""
    side.prepare(1)
    watch = Watch(side.target, side.client.pid)
    side.client.send("start", connections=64, window=64, churn_seconds=seconds, **side.options(1))
    time.sleep(seconds)
    deadline = time.monotonic() + LATE_S
    while (report := side.client.report())["pending"] and time.monotonic() < deadline:
        time.sleep(0.02)
    result = watch.stop()
    side.client.ask("close", "closed")
    if report["failed"] or report["errors"] or report["pending"] or not report["finished"]:
        raise Failed(f"connections: {report['failed']} failed, {report['pending']} pending: {report['error']}")
    return result | {"setup": result["cpu"] / report["finished"] * 1e6}


def idle(side: Side, number: int) -> dict[str, float]:
    """Resident memory of so many readers, each; on a process without a past."""
    side.open(100)
    side.client.ask("close", "closed")
    time.sleep(0.3)
    before = side.target.resident_bytes()
    watch = Watch(side.target, side.client.pid)
    side.open(number)
    result = watch.stop()
    time.sleep(0.5)
    if (report := side.client.report())["connections"] != number:
        raise Failed(f"{report['connections']} of {number} connections stayed: {report['error']}")
    after = side.target.resident_bytes()
    side.client.ask("close", "closed")
    return result | {"idle": (after - before) / number}


@contextlib.contextmanager
def side(target: Target, transport: str, running: Running | None) -> Iterator[Side]:
    """With a load client of its own."""
    with LoadClient(LOAD_CORE) as client:
        yield Side(target, client, transport, running)


Round = Callable[[Side], dict[str, float]]
