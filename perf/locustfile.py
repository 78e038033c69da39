"""Users for Locust: what readers and publishers do, over every transport, as they do it.

    make load                                      # scenarios headless, with what must hold (perf/scenarios.py)
    make locust                                    # web UI; choose the classes there

Readers watch one of `--jobs` jobs each, and come again now and then with their cursor, half of the times after a
connection that was cut without a word. Besides, `--cut` has the server end all of them in the same moment. They report
as Locust events: `connect` (up to the snapshot), `reconnect`, `delivery` (from the publisher's clock to the reader's),
`catch-up` (the same of what was published while they were away), for every update that did not come a failed
`delivery`, `cut`, and `stream` where a connection ended that nobody had cut. Publishers stamp each update with the time
since this machine was started.
"""

from __future__ import annotations

import base64
import itertools
import json
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPException
from typing import Any, ClassVar
from urllib.parse import urlsplit

import gevent
from locust import User, events, task
from locust.argument_parser import LocustArgumentParser
from locust.env import Environment
from locust.runners import MasterRunner

from perf.transports import EVERY, TIMEOUT_S, TROUBLE, Asking, Cut, Poll, Refused, Stream, Transport, WebSocket

# Those that were all cut in one moment come again within so long.
SPREAD_S = 3.0
LATE_EVERY_S = 0.05
TURNS = itertools.count()


class Lost(Exception):
    """Updates that a reader should have had."""


@events.init_command_line_parser.add_listener
def options(parser: LocustArgumentParser) -> None:
    """What all users share."""
    parser.add_argument("--jobs", type=int, default=100, help="jobs that are published to and watched")
    parser.add_argument("--updates", type=float, default=100.0, help="updates per second of one publisher")
    parser.add_argument("--batch", type=int, default=1, help="updates in one request of a publisher")
    parser.add_argument("--stay", type=float, default=60.0, help="seconds, about, until a reader comes again")
    parser.add_argument("--cut", type=float, default=0.0, help="seconds from one cut of all connections to the next")
    parser.add_argument("--token", default="", help="for servers that want one")


def parts(url: str) -> tuple[str, int]:
    """Host and port."""
    found = urlsplit(url)
    return found.hostname or "127.0.0.1", found.port or 80


def report(environment: Environment, kind: str, name: str, ms: float, error: Exception | None = None) -> None:
    """One Locust event."""
    environment.events.request.fire(
        request_type=kind, name=name, response_time=ms, response_length=0, exception=error, context={}
    )


@events.test_start.add_listener
def watch_oneself(environment: Environment, **_: object) -> None:
    """How late Locust itself is, where there are users: what is below that was not measured of the server."""

    def look() -> None:
        while True:
            began = time.perf_counter()
            gevent.sleep(LATE_EVERY_S)
            late = max(0.0, time.perf_counter() - began - LATE_EVERY_S)
            report(environment, "LOCUST", "late", late * 1e3)

    if not isinstance(environment.runner, MasterRunner):
        gevent.spawn(look)


class Reader(User):
    """Watches one job, and comes again now and then where it left off."""

    abstract = True
    transport: ClassVar[Transport]

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        given = environment.parsed_options
        assert given is not None
        self.address = parts(self.host or "http://127.0.0.1:3000")
        self.headers = {"Authorization": f"Bearer {given.token}"} if given.token else {}
        self.stay_s = float(given.stay)
        self.job = f"load-{next(TURNS) % given.jobs}"
        self.cursor = ""
        self.version: int | None = None
        self.since_ns = 0
        self.blocked = False

    @contextmanager
    def connected(self, transport: Transport) -> Iterator[WebSocket | Stream | Poll | None]:
        """A connection with its snapshot, or None if there is none to be had."""
        kind, name = transport.type, "reconnect" if self.cursor else "connect"
        began = time.perf_counter()
        try:
            connection = transport(self)
        except TROUBLE as error:
            if not self.blocked:
                report(self.environment, kind, name, (time.perf_counter() - began) * 1e3, error)
            yield None
            return
        report(self.environment, kind, name, (time.perf_counter() - began) * 1e3)
        self.since_ns = time.monotonic_ns()
        try:
            yield connection
        finally:
            random.choice((connection.close, connection.cut))()

    def read(self, transport: Transport) -> bool:
        """Reads until it is time to come again; False if there was no connection."""
        with self.connected(transport) as connection:
            if connection is None:
                return False
            # Where nothing comes, nobody looks at the time either: a timer ends the wait.
            with gevent.Timeout(random.uniform(0.5, 1.5) * self.stay_s, False):
                try:
                    for message in connection.messages():
                        self.take(transport.type, message)
                except Cut:
                    report(self.environment, transport.type, "cut", 0)
                    gevent.sleep(random.uniform(0, SPREAD_S))
                except TROUBLE as error:
                    report(self.environment, transport.type, "stream", 0, error)
        return True

    def take(self, kind: str, message: dict[str, Any]) -> None:
        """One message: how late it is, and whether one before it is missing."""
        what = message["type"]
        if message.get("id") and what != "connected":
            self.cursor = str(message["id"])
        if what in ("subscribed", "snapshot"):
            for record in message.get("snapshot") or message.get("jobs") or ():
                self.follow(kind, record["version"] + 1)
        elif what in ("status_update", "job_completed"):
            self.follow(kind, message["version"])
            self.version = message["version"]
            sent = int(message["message"].removeprefix("t="))
            name = "delivery" if sent >= self.since_ns else "catch-up"
            report(self.environment, kind, name, max(0.0, (time.monotonic_ns() - sent) / 1e6))

    def follow(self, kind: str, version: int) -> None:
        """The next version; those that were left out are lost."""
        if self.version is not None:
            for missing in range(self.version + 1, version):
                report(self.environment, kind, "delivery", 0, Lost(f"version {missing} of {self.job}"))
        self.version = max(self.version or 0, version - 1)

    def on_start(self) -> None:
        """Not all in the same moment: Locust starts a second's users at once."""
        gevent.sleep(random.random())

    @task
    def watch(self) -> None:
        """Reads, for a while."""
        if not self.read(self.transport):
            gevent.sleep(1)


class WebSocketReader(Reader):
    """Over WebSocket."""

    transport = WebSocket
    weight = 6


class StreamReader(Reader):
    """Over SSE."""

    transport = Stream
    weight = 6


class LongPollReader(Reader):
    """By long-poll."""

    transport = Poll
    weight = 4


class PollReader(Reader):
    """By plain polling."""

    transport = Asking
    weight = 2


class FallbackReader(Reader):
    """Somebody behind something that lets none, some or all of the better transports through."""

    transport = WebSocket
    weight = 2

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        self.lets_through = next(TURNS) % len(EVERY)

    @task
    def watch(self) -> None:
        """Tries one after another; what is blocked is not reported, as nobody else is to blame."""
        for number, transport in enumerate(EVERY):
            self.blocked = number < self.lets_through
            if self.read(transport):
                return
        gevent.sleep(1)


class Publisher(User):
    """Publishes to all jobs in turn, on a schedule."""

    fixed_count = 1

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        given = environment.parsed_options
        assert given is not None
        self.given = given
        self.connection = HTTPConnection(*parts(self.host or "http://127.0.0.1:3000"), timeout=TIMEOUT_S)
        self.headers = {"Content-Type": "application/json"}
        if given.token:
            self.headers["Authorization"] = f"Bearer {given.token}"
        self.number = 0
        self.due = time.monotonic()

    @task
    def publish(self) -> None:
        """One request, when it is due."""
        self.due += self.given.batch / self.given.updates
        gevent.sleep(max(0.0, self.due - time.monotonic()))
        batch = []
        for _ in range(self.given.batch):
            self.number += 1
            job = f"load-{self.number % self.given.jobs}"
            stamp = f"t={time.monotonic_ns()}"
            batch.append({"jobId": job, "userId": "load", "status": "processing", "message": stamp})
        began = time.perf_counter()
        error: Exception | None = None
        try:
            self.connection.request("POST", "/api/v2/updates", json.dumps(batch), self.headers)
            response = self.connection.getresponse()
            answer = json.loads(response.read())
            if response.status != 200 or answer["accepted"] != len(batch):
                error = Refused(f"status {response.status}: {str(answer)[:200]}")
        except (OSError, HTTPException, ValueError) as trouble:
            error = trouble
            self.connection.close()
        report(self.environment, "HTTP", "publish", (time.perf_counter() - began) * 1e3, error)


class Cutter(User):
    """Has the server end all connections of the user that all readers are, now and then."""

    fixed_count = 1

    @task
    def cut(self) -> None:
        """Once."""
        given = self.environment.parsed_options
        assert given is not None
        gevent.sleep(given.cut or 3600.0)
        headers = {"Authorization": f"Bearer {given.token}"} if given.token else {}
        error: Exception | None = None
        began = time.perf_counter()
        connection = HTTPConnection(*parts(self.host or "http://127.0.0.1:3000"), timeout=TIMEOUT_S)
        try:
            connection.request("DELETE", f"/api/sse/users/{user_of(given.token)}", headers=headers)
            response = connection.getresponse()
            answer = response.read()
            if response.status != 200:
                error = Refused(f"status {response.status}: {answer[:200]!r}")
        except (OSError, HTTPException) as trouble:
            error = trouble
        finally:
            connection.close()
        report(self.environment, "HTTP", "cut all", (time.perf_counter() - began) * 1e3, error)


def user_of(token: str) -> str:
    """Whose a token is; without one everybody is anonymous."""
    if not token:
        return "anonymous"
    claims = token.split(".")[1]
    return str(json.loads(base64.urlsafe_b64decode(claims + "=" * (-len(claims) % 4)))["sub"])
