"""What each feature costs: the same server with and without it, by turns."""

from __future__ import annotations

import contextlib
import json
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import jwt

from perf.connect import churn
from perf.fanout import Watched, lockstep
from perf.load import LoadClient
from perf.measure import LOAD_CORE, Measure, Row, Target, in_pairs, server
from perf.nodes import redis_server
from perf.publish import publish

SECRET = "a secret for a benchmark, 32 bytes or more"
SCRAPES_PER_S = 1.0
# Jobs, those of them that have not ended, and how many are published at once.
KEPT, LIVE, AT_ONCE = 1_000_000, 100_000, 1000
PUBLISH: dict[str, dict[str, object]] = {
    "publish, one by one": {"connections": 16, "depth": 1},
    "publish, in batches of 100": {"connections": 2, "depth": 1, "batch": 100},
}
DELIVERY = (Measure("gross", "server CPU per delivery, 1,000 readers, publish included", "µs", 2),)
CONNECTION = (Measure("each", "server CPU per connection", "µs", 1),)


@dataclass(frozen=True)
class Feature:
    """One thing that is switched on, everything else as in `statuswire serve --store memory:`."""

    name: str
    store: str = "memory:"
    flags: tuple[str, ...] = ()
    token: bool = False
    scraped: bool = False
    kept: int = 0


FEATURES = (
    Feature("nothing (how far two alike stray)"),
    Feature("auth", flags=("--jwt-key", SECRET), token=True),
    Feature("store sqlite", "sqlite:"),
    Feature("store Redis", "redis:"),
    Feature("metrics, scraped every second", scraped=True),
    Feature("log level debug", flags=("--log-level", "debug")),
    Feature(f"{KEPT:,} jobs kept, {LIVE:,} of them live", kept=KEPT),
)
PLAIN = Feature("plain")


class Client(LoadClient):
    """A load client whose requests carry a header."""

    header = ""

    def send(self, cmd: str, **arguments: object) -> None:
        """Gives a command, with the header where there is a request in it."""
        super().send(cmd, **({"headers": self.header} if cmd in ("start", "publish") else {}), **arguments)


@contextlib.contextmanager
def started(feature: Feature, program: str | None) -> Iterator[tuple[Target, Client]]:
    """The server with this feature and a load client for it."""
    with ExitStack() as stack:
        store = feature.store
        if store == "redis:":
            store = f"redis://127.0.0.1:{stack.enter_context(redis_server()).port}"
        flags = feature.flags
        if feature.kept:
            config = stack.enter_context(tempfile.NamedTemporaryFile("w", suffix=".toml"))
            config.write(f"[history]\nmax_jobs = {2 * feature.kept}\n")
            config.flush()
            flags = ("--config", config.name)
        target = stack.enter_context(server(store, program, flags=flags))
        client = Client(LOAD_CORE)
        stack.enter_context(client)
        if feature.token:
            token = jwt.encode({"sub": "bench", "admin": True}, SECRET, algorithm="HS256")
            client.header = f"Authorization: Bearer {token}\r\n"
        for start in range(0, feature.kept, AT_ONCE):
            jobs = (_job(number) for number in range(start, start + AT_ONCE))
            target.ask("POST", "/api/v2/updates", json.dumps(list(jobs)).encode())
        if feature.scraped:
            stack.enter_context(_scraping(target))
        yield target, client


def _job(number: int) -> dict[str, object]:
    """One of those that are kept; every tenth is still at work."""
    status = "processing" if number % (KEPT // LIVE) == 0 else "completed"
    return {"jobId": f"kept-{number}", "userId": f"user-{number % 10_000}", "status": status, "message": "encoding"}


@contextlib.contextmanager
def _scraping(target: Target) -> Iterator[None]:
    """What Prometheus does, more often than it would."""
    over = threading.Event()

    def scrape() -> None:
        while not over.wait(1 / SCRAPES_PER_S):
            target.fetch("/metrics")

    thread = threading.Thread(target=scrape)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def run(program: str | None, *, quick: bool) -> list[Row]:
    """Four lines of each feature; the second column is the server without it."""
    seconds, rounds = (0.2, 1) if quick else (0.3, 3)
    rows: list[Row] = []
    for feature in FEATURES:
        with started(feature, program) as (target, client), started(PLAIN, program) as (plain, plain_client):
            for way, options in PUBLISH.items():
                for each, its_client in ((target, client), (plain, plain_client)):
                    publish(each, its_client, 0.1, options)
                rows += in_pairs(
                    f"{feature.name} (second column: without)",
                    (Measure("each", f"server CPU per {way}", "µs", 2),),
                    rounds,
                    partial(publish, target, client, seconds, options),
                    partial(publish, plain, plain_client, seconds, options),
                )
            with_, without = Watched(target, client, 1000), Watched(plain, plain_client, 1000)
            for watched in (with_, without):
                watched.readers.ask("publish", "published", port=watched.target.port, requests=1)
                watched.open("ws")
                lockstep(watched, 0.2)
            rows += in_pairs(
                f"{feature.name} (second column: without)",
                DELIVERY,
                rounds,
                partial(lockstep, with_, seconds),
                partial(lockstep, without, seconds),
            )
            for watched in (with_, without):
                watched.readers.ask("close", "closed")
                churn(watched.target, watched.readers, "ws", 0.1)
            rows += in_pairs(
                f"{feature.name} (second column: without)",
                CONNECTION,
                rounds,
                partial(churn, target, client, "ws", seconds),
                partial(churn, plain, plain_client, "ws", seconds),
            )
    return rows
