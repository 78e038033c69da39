"""Processes under measurement: starting them on their core, their CPU time, their memory; rounds in pairs."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
SERVER_CORE, LOAD_CORE = 0, 1
START_S = 60.0
# Percent of a core. The kernel's own threads come to 5 or so; a second busy process to 50.
UNDISTURBED = 12.0
ADDRESS = re.compile(r"(127\.\d+\.\d+\.\d+|localhost):(\d+)")


@dataclass(frozen=True)
class Target:
    """A running server: the real one or the bare loop, or what is measured beside them, with all its processes."""

    name: str
    pid: int
    port: int
    further: tuple[int, ...] = ()

    def cpu_seconds(self) -> float:
        """CPU time of whole processes, ended threads too, in nanoseconds (the clock of clock_getcpuclockid(3))."""
        return sum(time.clock_gettime((~pid << 3) | 2) for pid in (self.pid, *self.further))

    def resident_bytes(self) -> int:
        """Memory that is in RAM, from smaps_rollup (exact, where /proc/<pid>/statm lags behind)."""
        total = 0
        for pid in (self.pid, *self.further):
            text = Path(f"/proc/{pid}/smaps_rollup").read_text()
            found = re.search(r"^Rss:\s+(\d+) kB", text, re.MULTILINE)
            assert found
            total += int(found[1]) * 1024
        return total

    def ask(self, method: str, path: str, body: bytes = b"") -> Any:
        """One HTTP request; the decoded answer. Raises OSError if it is not a 2xx."""
        return json.loads(self.fetch(path, method, body))

    def fetch(self, path: str, method: str = "GET", body: bytes = b"") -> bytes:
        """The same, as it came."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request(method, path, body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            data = response.read()
            if response.status // 100 != 2:
                raise OSError(f"{method} {path}: {response.status} {data[:200]!r}")
            return data
        finally:
            connection.close()


def core_busy_seconds(core: int) -> float:
    """Time a core was not idle since boot: everybody's, the kernel's own threads too, in 10 ms steps."""
    for line in Path("/proc/stat").read_text().splitlines():
        if line.startswith(f"cpu{core} "):
            user, nice, system, _idle, _iowait, irq, softirq, steal, *_ = map(int, line.split()[1:])
            return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    raise OSError(f"no cpu{core} in /proc/stat")


@contextlib.contextmanager
def _process(name: str, arguments: Sequence[str], directory: Path, core: int | None = SERVER_CORE) -> Iterator[Target]:
    """Starts a server in `directory` and reads its address from what it prints. Raises OSError if it prints none."""
    # Output goes to a file: nobody needs to read it for the server to go on.
    log = directory / f"{name}.log"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("STATUSWIRE_")}
    if name == "bare":  # an installation has its own sources, which these would hide
        environment["PYTHONPATH"] = str(ROOT)
    environment["PYTHONUNBUFFERED"] = "1"
    with log.open("wb") as out:
        process = subprocess.Popen(
            arguments,
            stdout=out,
            stderr=subprocess.STDOUT,
            cwd=directory,
            env=environment,
            preexec_fn=None if core is None else lambda: os.sched_setaffinity(0, {core}),
        )
    try:
        deadline = time.monotonic() + START_S
        while not (found := ADDRESS.search(log.read_text(errors="replace"))):
            if process.poll() is not None or time.monotonic() > deadline:
                raise OSError(f"{name} did not start:\n{log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.02)
        yield Target(name, process.pid, int(found[2]))
        if process.poll() is not None:
            raise OSError(f"{name} ended by itself:\n{log.read_text(errors='replace')[-2000:]}")
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def server(
    store: str, program: str | None = None, core: int | None = SERVER_CORE, flags: Sequence[str] = ()
) -> Iterator[Target]:
    """The real server, in open mode unless `flags` say otherwise; `store` may be `sqlite:` for a fresh file."""
    directory = Path(tempfile.mkdtemp(prefix="statuswire-bench-"))
    try:
        if store == "sqlite:":
            store = f"sqlite:{directory / 'bench.db'}"
        command = [program or str(ROOT / ".venv/bin/statuswire"), "serve", "--port", "0", "--store", store, *flags]
        with _process("statuswire", command, directory, core) as target:
            yield target
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@contextlib.contextmanager
def bare() -> Iterator[Target]:
    """The bare loop."""
    with (
        tempfile.TemporaryDirectory(prefix="bare-bench-") as directory,
        _process("bare", [sys.executable, "-m", "perf.bare"], Path(directory)) as target,
    ):
        yield target


Start = Callable[[str], contextlib.AbstractContextManager[Target]]  # starts what is measured on the given store


@dataclass(frozen=True)
class Measure:
    """One line of the table: which number of a round, its words, and what must hold."""

    key: str
    label: str
    unit: str
    digits: int = 1
    ratio_most: float | None = None  # the server may cost so many times the bare loop
    value_most: float | None = None
    value_least: float | None = None


@dataclass
class Row:
    """One line of the table, with what it was made of."""

    scenario: str
    measure: Measure
    server: list[float] = field(default_factory=list)
    bare: list[float] = field(default_factory=list)
    load: list[float] = field(default_factory=list)  # share of its core used by the load side, server rounds
    others: list[float] = field(default_factory=list)  # largest share of a core somebody else used

    def ratio(self) -> float | None:
        """Median of the ratios of the pairs: what disturbed the machine disturbed both of a pair."""
        ratios = [ours / theirs for ours, theirs in zip(self.server, self.bare, strict=False) if theirs]
        return statistics.median(ratios) if ratios else None

    def verdict(self) -> str:
        """`ok`, `MISSED`, `disturbed` (missed while others used the cores), or nothing when nothing was promised."""
        measure, value, ratio = self.measure, statistics.median(self.server), self.ratio()
        promises = []
        if measure.ratio_most is not None and ratio is not None:
            promises.append(ratio <= measure.ratio_most)
        if measure.value_most is not None:
            promises.append(value <= measure.value_most)
        if measure.value_least is not None:
            promises.append(value >= measure.value_least)
        if not promises:
            return ""
        return "ok" if all(promises) else "MISSED" if max(self.others) < UNDISTURBED else "disturbed"


Pair = tuple[dict[str, float], dict[str, float]]  # a round of the server and one of the bare loop


@dataclass
class Patience:
    """How many seconds a whole run may still spend on waiting for a quiet machine and on repeating disturbed rounds."""

    left: float

    def wait_quiet(self) -> None:
        """Returns when both cores were idle for a moment, or patience is at its end."""
        while self.left > 0:
            before = core_busy_seconds(SERVER_CORE), core_busy_seconds(LOAD_CORE)
            time.sleep(0.1)
            after = core_busy_seconds(SERVER_CORE), core_busy_seconds(LOAD_CORE)
            if max(late - early for early, late in zip(before, after, strict=True)) < 0.025:
                return
            self.left -= 0.1


PATIENCE = Patience(60.0)


def take_core(program: str, patience: float) -> None:
    """Keep this process off the server's core, and set how much of a disturbed machine's time may be lost.

    Raises:
        SystemExit: with 2, where there is one core only.
    """
    if (os.cpu_count() or 1) < 2:
        print(f"{program}: needs two cores, one for servers and one for the load", file=sys.stderr)
        raise SystemExit(2)
    os.sched_setaffinity(0, {LOAD_CORE})
    PATIENCE.left = patience


def in_pairs(
    scenario: str,
    measures: Sequence[Measure],
    rounds: int,
    ours: Callable[[], dict[str, float]],
    theirs: Callable[[], dict[str, float]],
) -> list[Row]:
    """Runs both by turns, who is first changing, and collects the numbers. Results hold those of `Watch`, too.

    When other processes took more than `UNDISTURBED` of a core, rounds are run again as long as there is patience
    left, and those least disturbed count; those that failed are run again likewise.
    """
    pairs = _patiently(rounds, lambda index: _pair(index, ours, theirs))
    return [
        Row(
            scenario,
            measure,
            server=[pair[0][measure.key] for pair in pairs],
            bare=[pair[1][measure.key] for pair in pairs],
            load=[pair[0]["load"] for pair in pairs],
            others=[disturbed(pair) for pair in pairs],
        )
        for measure in measures
    ]


def alone(scenario: str, measures: Sequence[Measure], rounds: int, ours: Callable[[], dict[str, float]]) -> list[Row]:
    """The same where there is nothing to compare with."""
    pairs = _patiently(rounds, lambda _: (ours(), {"others": 0.0}))
    return [
        Row(
            scenario,
            measure,
            server=[result[measure.key] for result, _ in pairs],
            load=[result["load"] for result, _ in pairs],
            others=[result["others"] for result, _ in pairs],
        )
        for measure in measures
    ]


def _pair(index: int, ours: Callable[[], dict[str, float]], theirs: Callable[[], dict[str, float]]) -> Pair:
    if index % 2 == 0:
        first = ours()
        return first, theirs()
    second = theirs()
    return ours(), second


def _patiently(rounds: int, run: Callable[[int], Pair]) -> list[Pair]:
    pairs: list[Pair] = []
    while len(pairs) < rounds or (sum(disturbed(pair) < UNDISTURBED for pair in pairs) < rounds and PATIENCE.left > 0):
        PATIENCE.wait_quiet()
        began = time.monotonic()
        try:
            pairs.append(run(len(pairs)))
        except OSError:  # nobody was answered in time, or not everything came: that, too, may be the machine's
            if PATIENCE.left <= 0:
                raise
            PATIENCE.left -= 1.0 + time.monotonic() - began
            continue
        if len(pairs) > rounds:
            PATIENCE.left -= time.monotonic() - began
    return sorted(pairs, key=disturbed)[:rounds]


def disturbed(pair: Pair) -> float:
    """The largest share of a core (0 to 100) that was not ours in a pair of rounds."""
    return max(result["others"] for result in pair)


class Watch:
    """CPU time of a target and of the load side between its making and `stop`."""

    def __init__(self, target: Target, *load_pids: int) -> None:
        self._target = target
        self._load = [Target("load", pid, 0) for pid in load_pids]
        self._began = self._now()

    def _now(self) -> tuple[float, float, float, float, float]:
        load = sum(process.cpu_seconds() for process in self._load)
        cores = core_busy_seconds(SERVER_CORE), core_busy_seconds(LOAD_CORE)
        return time.monotonic(), self._target.cpu_seconds(), load, *cores

    def stop(self) -> dict[str, float]:
        """`seconds`, `cpu` (of the target); shares of a core (0 to 100): `load`, `core` (the server's), `others`."""
        seconds, cpu, load, core, load_core = (now - began for now, began in zip(self._now(), self._began, strict=True))
        return {
            "seconds": seconds,
            "cpu": cpu,
            "load": 100 * load / seconds,
            "core": 100 * core / seconds,
            "others": 100 * max(core - cpu, load_core - load, 0.0) / seconds,
        }
