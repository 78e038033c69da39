"""The C load client from Python: building it, giving it commands, reading its answers."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SOURCES = ("load.c", "common.h", "histogram.h", "publisher.h", "readers.h", "report.h")


class LoadError(Exception):
    """The load client could not be built, ended, or did not answer in time."""


def build() -> Path:
    """Compiles the client into perf/build/ if it is missing or older than its sources. Returns the program's path."""
    program = HERE / "build" / "load"
    newest = max((HERE / name).stat().st_mtime for name in SOURCES)
    if program.exists() and program.stat().st_mtime >= newest:
        return program
    program.parent.mkdir(exist_ok=True)
    fresh = program.with_suffix(f".{os.getpid()}")
    compiler = os.environ.get("CC", "gcc")
    arguments = ["-O3", "-std=gnu11", "-Wall", "-Wextra", "-D_GNU_SOURCE", "-o", str(fresh), str(HERE / "load.c")]
    result = subprocess.run([compiler, *arguments], capture_output=True, text=True, check=False)
    if result.returncode:
        raise LoadError(f"{compiler} could not build the load client:\n{result.stderr}")
    fresh.rename(program)  # atomic: two benchmarks may build at once
    return program


class LoadClient:
    """One running load client, pinned to a core. A context manager; its end kills the client."""

    def __init__(self, core: int | None = None, *, nice: int = 0) -> None:
        program = build()

        def prepare() -> None:
            if core is not None:
                os.sched_setaffinity(0, {core})
            if nice:
                os.nice(nice)

        self.process = subprocess.Popen(
            [program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, preexec_fn=prepare
        )
        self.pid = self.process.pid
        self._text = b""
        self._selector = selectors.DefaultSelector()
        assert self.process.stdout is not None
        self._selector.register(self.process.stdout, selectors.EVENT_READ)

    def __enter__(self) -> LoadClient:
        return self

    def __exit__(self, *exc: object) -> None:
        self.process.kill()
        self.process.wait()
        self._selector.close()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()

    def send(self, cmd: str, **arguments: object) -> None:
        """Gives a command; its answer, if it has one, is read with `wait`."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"cmd": cmd, **arguments}).encode() + b"\n")

    def wait(self, event: str, timeout: float = 30.0) -> dict[str, Any]:
        """The next answer, which must be `event`. Raises LoadError if another or none comes in `timeout` seconds."""
        deadline = time.monotonic() + timeout
        assert self.process.stdout is not None
        while b"\n" not in self._text:
            if not self._selector.select(max(0.0, deadline - time.monotonic())):
                raise LoadError(f"no {event!r} from the load client within {timeout} s")
            data = os.read(self.process.stdout.fileno(), 65536)
            if not data:
                raise LoadError("the load client ended")
            self._text += data
        line, self._text = self._text.split(b"\n", 1)
        answer: dict[str, Any] = json.loads(line)
        if answer["event"] != event:
            raise LoadError(f"expected {event!r} from the load client, got {answer}")
        return answer

    def ask(self, cmd: str, event: str, timeout: float = 30.0, **arguments: object) -> dict[str, Any]:
        """A command and its answer."""
        self.send(cmd, **arguments)
        return self.wait(event, timeout)

    def start(self, **arguments: object) -> dict[str, Any]:
        """Opens readers and waits until each has its first snapshot. Raises LoadError if one failed."""
        answer = self.ask("start", "ready", 120.0, **arguments)
        if answer["failed"]:
            raise LoadError(f"{answer['failed']} readers failed: {answer['error']}")
        return answer

    def report(self) -> dict[str, Any]:
        """Everything counted since the last mark."""
        return self.ask("report", "report")

    def mark(self) -> None:
        """Sets all counters to zero."""
        self.ask("mark", "marked")

    def wait_version(self, version: int, timeout: float = 20.0) -> dict[str, Any]:
        """Reports once every reader has seen `version`, or as it is after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while True:
            report = self.report()
            if report["lowest_version"] >= version or time.monotonic() > deadline:
                return report
            time.sleep(0.02)
