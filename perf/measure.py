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
ADDRESS = re.compile(r"(127\.\d+\.\d+\.\d+|localhost):(\d+)")


@dataclass(frozen=True)
class Target:
    """A running server: the real one or the bare loop."""

    name: str
    pid: int
    port: int

    def cpu_seconds(self) -> float:
        """CPU time of the whole process, ended threads too, in nanoseconds (the clock of clock_getcpuclockid(3))."""
        return time.clock_gettime((~self.pid << 3) | 2)

    def resident_bytes(self) -> int:
        """Memory that is in RAM, from smaps_rollup (exact, where /proc/<pid>/statm lags behind)."""
        text = Path(f"/proc/{self.pid}/smaps_rollup").read_text()
        found = re.search(r"^Rss:\s+(\d+) kB", text, re.MULTILINE)
        assert found
        return int(found[1]) * 1024

    def ask(self, method: str, path: str, body: bytes = b"") -> Any:
        """One HTTP request; the decoded answer. Raises OSError if it is not a 2xx."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request(method, path, body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            data = response.read()
            if response.status // 100 != 2:
                raise OSError(f"{method} {path}: {response.status} {data[:200]!r}")
            return json.loads(data)
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
def _process(name: str, arguments: Sequence[str], directory: Path) -> Iterator[Target]:
    """Starts a server in `directory` and reads its address from what it prints. Raises OSError if it prints none."""
    # Output goes to a file: nobody needs to read it for the server to go on.
    log = directory / f"{name}.log"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("STATUSWIRE_")}
    environment["PYTHONPATH"] = str(ROOT)
    environment["PYTHONUNBUFFERED"] = "1"
    with log.open("wb") as out:
        process = subprocess.Popen(
            arguments,
            stdout=out,
            stderr=subprocess.STDOUT,
            cwd=directory,
            env=environment,
            preexec_fn=lambda: os.sched_setaffinity(0, {SERVER_CORE}),
        )
    try:
        deadline = time.monotonic() + 15
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
def server(store: str, program: str | None = None) -> Iterator[Target]:
    """The real server in open mode; `store` may be `sqlite:` for a fresh file."""
    directory = Path(tempfile.mkdtemp(prefix="statuswire-bench-"))
    try:
        if store == "sqlite:":
            store = f"sqlite:{directory / 'bench.db'}"
        command = [program or str(ROOT / ".venv/bin/statuswire"), "serve", "--port", "0", "--store", store]
        with _process("statuswire", command, directory) as target:
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
    load: list[float] = field(default_factory=list)  # share of the load core used by the load side, server rounds

    def ratio(self) -> float | None:
        """Median of the ratios of the pairs: what disturbed the machine disturbed both of a pair."""
        ratios = [ours / theirs for ours, theirs in zip(self.server, self.bare, strict=False) if theirs]
        return statistics.median(ratios) if ratios else None

    def verdict(self) -> str:
        """`ok`, `MISSED` or nothing when nothing was promised."""
        measure, value, ratio = self.measure, statistics.median(self.server), self.ratio()
        promises = []
        if measure.ratio_most is not None and ratio is not None:
            promises.append(ratio <= measure.ratio_most)
        if measure.value_most is not None:
            promises.append(value <= measure.value_most)
        if measure.value_least is not None:
            promises.append(value >= measure.value_least)
        return "" if not promises else "ok" if all(promises) else "MISSED"


def in_pairs(
    scenario: str,
    measures: Sequence[Measure],
    rounds: int,
    ours: Callable[[], dict[str, float]],
    theirs: Callable[[], dict[str, float]],
) -> list[Row]:
    """Runs both by turns, who is first changing, and collects the numbers. A result also has `load`, as of `Watch`."""
    rows = [Row(scenario, measure) for measure in measures]
    for number in range(rounds):
        turns = [(ours, True), (theirs, False)]
        for run, is_server in turns if number % 2 == 0 else reversed(turns):
            result = run()
            for row in rows:
                if is_server:
                    row.server.append(result[row.measure.key])
                    row.load.append(result["load"])
                else:
                    row.bare.append(result[row.measure.key])
    return rows


class Watch:
    """CPU time of a target and of the load side between its making and `stop`."""

    def __init__(self, target: Target, *load_pids: int) -> None:
        self._target = target
        self._load = [Target("load", pid, 0) for pid in load_pids]
        self._began = time.monotonic(), target.cpu_seconds(), core_busy_seconds(SERVER_CORE), self._load_seconds()

    def _load_seconds(self) -> float:
        return sum(process.cpu_seconds() for process in self._load)

    def stop(self) -> dict[str, float]:
        """`seconds`, `cpu` (of the target), `core` and `load` (shares of their cores, 0 to 100)."""
        began, cpu, core, load = self._began
        seconds = time.monotonic() - began
        return {
            "seconds": seconds,
            "cpu": self._target.cpu_seconds() - cpu,
            "core": 100 * (core_busy_seconds(SERVER_CORE) - core) / seconds,
            "load": 100 * (self._load_seconds() - load) / seconds,
        }
