"""Load as users make it, by Locust, and what must hold under it: `python -m perf.scenarios [--seconds 300]`.

Starts a server of its own, unless `--url` names one that runs, and Locust from `.venv/load` (`make load` installs it).
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from perf.load import LoadClient, LoadError
from perf.measure import LOAD_CORE, ROOT, server

LOCUST: Final = ROOT / ".venv/load/bin/locust"
READERS: Final = ("WebSocketReader", "StreamReader", "LongPollReader", "PollReader", "FallbackReader")
NAMES: Final = {"WS": "WebSocket", "SSE": "SSE", "POLL": "long-poll", "GET": "polling"}
# Of all that is delivered and set up, so much has to be in time.
QUANTILE: Final = 0.95
SETUP_MS: Final = {"WS": 100.0}
DELIVERY_MS: Final = {"WS": 500.0, "SSE": 2000.0, "POLL": 5000.0}
SETUP_SHARE: Final = 0.98
PUBLISHED_SHARE: Final = 0.99
RECONNECT_SHARE: Final = 0.95
DELIVERY_SHARE: Final = 0.999
# Locust, or the machine, is what is measured when it wakes up so late.
LATE_MS: Final = 10.0
MOST_REASONS: Final = 10


@dataclass(frozen=True)
class Scenario:
    """One load.

    Attributes:
        readers: user classes and how many of each.
        jobs: how many there are, published to by turns.
        updates: a second, in requests of `batch`.
        native: further WebSocket readers, which are of the C client, as the publisher is then: more than Locust can.
    """

    name: str
    readers: dict[str, int]
    jobs: int = 100
    updates: float = 100.0
    batch: int = 1
    native: int = 0

    def publishers(self) -> int:
        """Of Locust's users."""
        return 0 if self.native else 1


SCENARIOS: Final = (
    Scenario("1,000 connections", {"WebSocketReader": 1000}),
    Scenario("10,000 updates/s", {"WebSocketReader": 50, "StreamReader": 50}, 1000, 10_000.0, 100, native=900),
    Scenario(
        "500 over all methods",
        {"WebSocketReader": 150, "StreamReader": 150, "LongPollReader": 100, "PollReader": 50, "FallbackReader": 50},
        updates=50.0,
    ),
)
TINY: Final = Scenario("a few of each", dict.fromkeys(READERS, 4), jobs=5, updates=20.0, batch=2)


class LoadFailed(Exception):
    """Locust did not run; the message says why."""


@dataclass(frozen=True)
class Check:
    """One thing that must hold, or that one should know."""

    what: str
    value: str
    limit: str = ""
    passed: bool | None = None  # None: for information


@dataclass
class Kind:
    """All events of one name, over one transport or several."""

    requests: int = 0
    failures: int = 0
    times: dict[float, int] = field(default_factory=dict)

    def add(self, entry: dict[str, Any]) -> None:
        """One line of Locust's statistics."""
        self.requests += entry["num_requests"]
        self.failures += entry["num_failures"]
        for ms, number in entry["response_times"].items():
            self.times[float(ms)] = self.times.get(float(ms), 0) + number

    def succeeded(self) -> float:
        """As a share of 1."""
        return 1 - self.failures / self.requests if self.requests else 0.0

    def with_all_of(self, other: Kind) -> Kind:
        """The numbers of both; the times are this one's."""
        return Kind(self.requests + other.requests, self.failures + other.failures, self.times)

    def quantile(self, share: float) -> float:
        """Milliseconds within which that share was; Locust rounds them to two digits."""
        left = share * sum(self.times.values())
        for ms in sorted(self.times):
            left -= self.times[ms]
            if left <= 0:
                return ms
        return float("inf")


def checks(statistics: list[dict[str, Any]]) -> list[Check]:
    """What must hold of one run. What nobody did is not looked at, but somebody must have had something delivered."""
    kinds: dict[tuple[str, str], Kind] = {}
    for entry in statistics:
        for method in (entry["method"], ""):
            kinds.setdefault((method, entry["name"]), Kind()).add(entry)
    found = []
    for name, limits, what in (("connect", SETUP_MS, "set-up"), ("delivery", DELIVERY_MS, "delivery")):
        for method, most in limits.items():
            if (kind := kinds.get((method, name))) is not None:
                ms = kind.quantile(QUANTILE)
                found.append(Check(f"{NAMES[method]} {what}, p95", f"{ms:.0f} ms", f"< {most:.0f} ms", ms < most))
    shares = {"connect": (SETUP_SHARE, "set-up"), "reconnect": (RECONNECT_SHARE, "reconnection")}
    for name, (least, what) in (shares | {"delivery": (DELIVERY_SHARE, "delivery")}).items():
        kind = kinds.get(("", name), Kind())
        if name == "delivery" and ("", "catch-up") in kinds:
            kind = kind.with_all_of(kinds["", "catch-up"])
        if kind.requests or name != "reconnect":
            share = kind.succeeded()
            passed = share >= least if name == "delivery" else share > least
            limit = f"{'≥' if name == 'delivery' else '>'} {least * 100:g} %"
            found.append(Check(f"{what}, {kind.requests:,} in all", f"{share * 100:.2f} %", limit, passed))
    if ("", "stream") in kinds:
        found.append(Check("connections that broke off uncut", f"{kinds['', 'stream'].failures}", "0", False))
    for name, what in (("publish", "publishes"), ("cut all", "cuts of all connections")):
        if (done := kinds.get(("", name))) is not None:
            found.append(Check(f"{what} that failed, of {done.requests:,}", f"{done.failures}", "0", not done.failures))
    if ("", "cut all") in kinds:
        number = kinds.get(("", "cut"), Kind()).requests
        found.append(Check("connections ended by these cuts", f"{number:,}", "> 0", number > 0))
    if ("LOCUST", "late") in kinds:
        late = kinds["LOCUST", "late"].quantile(QUANTILE)
        why = "so a time above its limit is no proof" if late > LATE_MS else ""
        found.append(Check("Locust itself was late by, p95", f"{late:.0f} ms", why))
    return found


def run(
    scenario: Scenario, url: str, seconds: float, processes: int, token: str, cut: bool
) -> tuple[list[dict[str, Any]], list[str]]:
    """One scenario; Locust's statistics, and what failed and why. Raises LoadFailed.

    `cut` has the server end all connections three times.
    """
    if not LOCUST.exists():
        raise LoadFailed(f"{LOCUST} is not there (make load)")
    with tempfile.TemporaryDirectory(prefix="statuswire-load-") as directory:
        few = ({"Cutter": 1} if cut else {}) | ({"Publisher": 1} if scenario.publishers() else {})
        # Those of a fixed number come first; the others are by weight, which makes as many of each as the weights say.
        users = [json.dumps({"user_class_name": name, "fixed_count": number}) for name, number in few.items()]
        users += [json.dumps({"user_class_name": name, "weight": number}) for name, number in scenario.readers.items()]
        number = sum(scenario.readers.values()) + sum(few.values())
        # Users arrive in the first third.
        command = [str(LOCUST), "-f", str(ROOT / "perf/locustfile.py"), "--headless", "--only-summary", "--host", url]
        command += ["--users", str(number), "--spawn-rate", str(math.ceil(3 * number / seconds))]
        command += ["--run-time", f"{seconds:.0f}s", "--stop-timeout", "0", "--exit-code-on-error", "0"]
        command += ["--json-file", str(Path(directory) / "stats"), "--csv", str(Path(directory) / "csv")]
        command += ["--loglevel", "WARNING"]
        command += ["--jobs", str(scenario.jobs), "--updates", str(scenario.updates), "--batch", str(scenario.batch)]
        # Everybody comes again once or twice, however long it lasts, and all are cut three times.
        command += ["--stay", f"{min(60.0, seconds / 3):.1f}", "--cut", f"{seconds / 3.5:.1f}"]
        command += ["--token", token] if token else []
        command += ["--processes", str(processes)] if processes > 1 else []
        command += ["--config-users", *users, "--", *few, *scenario.readers]
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("COVERAGE_", "LOCUST_"))}
        environment["PYTHONPATH"] = str(ROOT)
        result = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=seconds + 120, env=environment, cwd=directory
        )
        files = list(Path(directory).glob("stats*"))
        if result.returncode or not files:
            raise LoadFailed(
                f"locust ended with {result.returncode}:\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}"
            )
        found: list[dict[str, Any]] = json.loads(files[0].read_text())
        return found, failures(Path(directory) / "csv_failures.csv")


def failures(path: Path) -> list[str]:
    """What failed, how often and why, the most frequent first; of Locust's table."""
    with path.open(newline="") as file:
        lines = sorted(csv.DictReader(file), key=lambda line: -int(line["Occurrences"]))
    return [f"{int(line['Occurrences']):,} x {line['Method']} {line['Name']}: {line['Error']}" for line in lines]


@contextlib.contextmanager
def published(scenario: Scenario, url: str, seconds: float, token: str) -> Iterator[Callable[[], list[Check]]]:
    """The C client publishes on its schedule, if it is to; whether all of it was taken."""
    if scenario.publishers():
        yield list
        return
    where = urlsplit(url)
    with LoadClient(LOAD_CORE) as client:
        client.send(
            "publish",
            host=where.hostname,
            port=where.port,
            headers=f"Authorization: Bearer {token}\r\n" if token else "",
            job="load",
            jobs=scenario.jobs,
            fields='"userId":"load","status":"processing",',
            rate=scenario.updates,
            batch=scenario.batch,
            connections=4,
            depth=64,
            seconds=seconds,
        )

        def judge() -> list[Check]:
            return published_checks(client.wait("published", seconds + 30), scenario.updates)

        yield judge


def published_checks(report: dict[str, Any], wanted: float) -> list[Check]:
    """What must hold of the C client's updates, of which so many a second were wanted."""
    rate, failed = report["accepted"] / report["seconds"], report["failed"] + report["unanswered"]
    return [
        Check(
            "updates taken a second",
            f"{rate:,.0f}",
            f"> {PUBLISHED_SHARE * wanted:,.0f}",
            rate > PUBLISHED_SHARE * wanted,
        ),
        Check(f"publishes that failed, of {report['requests']:,}", f"{failed}", "0", not failed),
    ]


@contextlib.contextmanager
def native(scenario: Scenario, url: str, number: int, seconds: float) -> Iterator[Callable[[], list[Check]]]:
    """More WebSocket readers by the C client, where Locust itself would be the limit; what must hold of them."""
    number += scenario.native
    if not number:
        yield list
        return
    where = urlsplit(url)
    subscribe = json.dumps({"type": "subscribe", "jobIds": ["load-{n}"]})
    with LoadClient(LOAD_CORE) as client:
        client.send(
            "start",
            transport="ws",
            host=where.hostname,
            port=where.port,
            path="/ws/jobs",
            subscribe=subscribe,
            connections=number,
            turn=scenario.jobs,
            rate=max(1.0, 3 * number / seconds),
        )

        def judge() -> list[Check]:
            client.wait("ready")
            return native_checks(client.report(), number)

        yield judge


def native_checks(report: dict[str, Any], number: int) -> list[Check]:
    """The same of the C client's readers."""
    ms, late, there = report["setup"]["p95_ms"], report["latency"]["p95_ms"], report["connections"] / number
    whole = report["deliveries"] / max(1, report["deliveries"] + report["lost"])
    return [
        Check("native WebSocket set-up, p95", f"{ms:.0f} ms", "< 100 ms", ms < SETUP_MS["WS"]),
        Check("native WebSocket delivery, p95", f"{late:.0f} ms", "< 500 ms", late < DELIVERY_MS["WS"]),
        Check(f"native set-up, {number:,} in all", f"{there * 100:.2f} %", "> 98 %", there > SETUP_SHARE),
        Check(
            f"native delivery, {report['deliveries']:,} in all",
            f"{whole * 100:.2f} %",
            "≥ 99.9 %",
            whole >= DELIVERY_SHARE and report["deliveries"] > 0,
        ),
    ]


@contextlib.contextmanager
def served(url: str) -> Iterator[str]:
    """Where the server is: the one given, or one of our own."""
    if url:
        yield url
        return
    with server("memory:", core=0) as target:
        yield f"http://127.0.0.1:{target.port}"


def main() -> int:
    """Exit status 1 when something did not hold, 2 when Locust did not run."""
    parser = argparse.ArgumentParser(prog="perf.scenarios", description=__doc__)
    parser.add_argument("--seconds", type=float, default=300, help="of each scenario (%(default)s)")
    parser.add_argument("--only", default="", help="a part of a scenario's name")
    parser.add_argument("--tiny", action="store_true", help="a few users of each kind instead: does it run?")
    parser.add_argument("--processes", type=int, default=1, help="Locust workers (%(default)s)")
    parser.add_argument(
        "--native", type=int, default=0, help="more WebSocket readers, by the C client (open mode only)"
    )
    parser.add_argument("--url", default="", help="a server that runs already")
    parser.add_argument("--token", default="", help="for one that wants it: an admin's")
    options = parser.parse_args()
    passed = True
    for scenario in (TINY,) if options.tiny else SCENARIOS:
        if options.only not in scenario.name:
            continue
        print(f"{scenario.name}, {options.seconds:.0f} s", flush=True)
        try:
            with (
                served(options.url) as url,
                published(scenario, url, options.seconds, options.token) as of_publisher,
                native(scenario, url, options.native, options.seconds) as of_readers,
            ):
                # The C client's readers are the same user's and do not come again.
                cut = not (scenario.native or options.native)
                statistics, trouble = run(scenario, url, options.seconds, options.processes, options.token, cut)
                found = checks(statistics) + of_readers() + of_publisher()
        except (LoadFailed, LoadError, OSError, subprocess.TimeoutExpired) as error:
            print(f"perf.scenarios: {error}", file=sys.stderr)
            return 2
        for check in found:
            verdict = "    " if check.passed is None else "pass" if check.passed else "FAIL"
            print(f"  {verdict}  {check.what:<42} {check.value:>10}  {check.limit}".rstrip(), flush=True)
        if not all(check.passed in (True, None) for check in found):
            passed = False
            for why in trouble[:MOST_REASONS]:
                print(f"        {why[:200]}", flush=True)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
