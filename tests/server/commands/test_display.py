"""What ``watch`` draws: one line for a job, bars on a real terminal."""

from __future__ import annotations

import codecs
import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from server.commands.display import _most_alive, describe
from server.commands.watch import NOT_LIVE
from tests.server.commands.scripted import error, scripted, sse, stream
from tests.server.commands.watching import CONNECTED, HEARTBEAT, environment, job, on_gate, snapshot, update
from tests.support import PATIENCE_S

pytestmark = pytest.mark.slow


# --- words --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "line"),
    [
        ({"jobId": "j"}, "j"),
        (job(progress=150), "j processing"),
        (job(progress="12"), "j processing"),
        (job(estimatedTimeRemaining=7293), "j processing, 2:01:33 left"),
        (job(estimatedTimeRemaining=0), "j processing"),
        (job(estimatedTimeRemaining=1e300), "j processing"),
        (job(status="completed", estimatedTimeRemaining=5), "j completed"),
        (job(status="failed", error={"code": 1}, message="m"), 'j failed {"code":1}'),
        (job(message="only this"), "j processing only this"),
        (job(message="a\n\x1b[2Jb"), r"j processing a\u000a\u001b[2Jb"),
    ],
)
def test_one_job_on_one_line(record: dict[str, Any], line: str) -> None:
    assert describe(record) == line


def test_those_that_run_have_the_room() -> None:
    records = [job(str(index), "completed" if index % 2 else "processing") for index in range(10)]
    assert [record["jobId"] for record in _most_alive(records, 3)] == ["0", "2", "4"]
    assert [record["jobId"] for record in _most_alive(records, 7)] == ["0", "2", "4", "6", "7", "8", "9"]
    assert _most_alive(records, 10) is records


# --- a real terminal ----------------------------------------------------------------------------------------------


class Terminal:
    """A process on a pseudo terminal of 100 columns, and what it has written to it."""

    def __init__(self, master: int, process: subprocess.Popen[bytes]) -> None:
        self.master = master
        self.process = process
        self.output = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")()

    def read_until(self, pattern: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not re.search(pattern, self.output):
            ready, _, _ = select.select([self.master], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"{pattern!r} did not appear in {self.output!r}"
            assert self._read(), f"ended without {pattern!r}: {self.output!r}"

    def finish(self) -> int:
        while self._read():
            pass
        return self.process.wait(timeout=PATIENCE_S)

    def _read(self) -> bool:
        try:
            data = os.read(self.master, 65536)
        except OSError:  # EIO: the other end is closed
            return False
        self.output += self._decoder.decode(data)
        return bool(data)


@contextmanager
def on_terminal(*arguments: str, rows: int = 10, term: str = "xterm-256color") -> Iterator[Terminal]:
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, 100, 0, 0))
    command = [sys.executable, "-m", "server", "watch", *arguments]
    env = environment(TERM=term)
    for name in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR"):
        env.pop(name, None)
    process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=env, start_new_session=True)
    os.close(slave)
    try:
        yield Terminal(master, process)
    finally:
        process.kill()
        process.wait()
        os.close(master)


def test_bars_on_a_terminal() -> None:
    with on_gate() as gate:
        running = job("job_1", progress=40, stage="pages", estimatedTimeRemaining=75)
        script = stream(
            CONNECTED,
            sse(snapshot(running, job("job_2", "queued")), "e:1"),
            gate.wait,
            sse(update("job_1", "completed", progress=100), "e:2"),
            sse(update("job_2", "failed", error="disk \x1b[2Jfull"), "e:3"),
        )
        with scripted(script) as server, on_terminal("job_1", "job_2", "--url", server.url) as terminal:
            terminal.read_until(r"job_1.*━.*40%.*processing.*pages.*1:15")
            terminal.read_until(r"job_2.*queued")
            assert "\x1b[?25l" in terminal.output  # the cursor hides while bars move
            gate.open()
            terminal.read_until(r"job_1.*100%.*completed")
            assert terminal.finish() == 1
    assert re.search(r"\x1b\[[0-9;]*3[41]m", terminal.output)  # colours
    assert "disk \\u001b[2Jfull" in terminal.output
    assert "\x1b[2J" not in terminal.output
    assert terminal.output.rstrip().endswith("\x1b[?25h")  # and is back


def test_more_jobs_than_the_terminal_has_lines() -> None:
    jobs = [job(f"job_{index}") for index in range(30)]
    with (
        scripted(stream(CONNECTED, sse(snapshot(*jobs), "e:1"), hold=True)) as server,
        on_terminal("--all", "--url", server.url, rows=10) as terminal,
    ):
        terminal.read_until(r"job_6")
        terminal.read_until(r"… and 23 more")
        assert "job_7 " not in terminal.output
        os.killpg(terminal.process.pid, signal.SIGINT)
        assert terminal.finish() == 130
    assert "Traceback" not in terminal.output
    assert terminal.output.rstrip().endswith("\x1b[?25h")


def test_a_reset_and_trouble_are_shown_below_the_bars() -> None:
    with on_gate() as gate:
        first = stream(CONNECTED, sse(snapshot(job("old")), "e:1"))
        again = stream(CONNECTED, gate.wait, sse({"type": "reset"}), sse(snapshot(job("new", "completed")), "f:1"))
        busy = error(503, "draining", "the server drains", Retry_After="1")
        with scripted(first, busy, again) as server, on_terminal("--all", "--exit", "--url", server.url) as terminal:
            terminal.read_until("old")
            terminal.read_until("the server drains")
            gate.open()
            assert terminal.finish() == 0
    last = terminal.output.rpartition("new")[0].rpartition("\x1b[2K")[2]
    assert "old" not in last


def test_bars_that_are_not_live_say_so() -> None:
    with on_gate() as gate:
        cut_off = sse(HEARTBEAT | {"live": False}, "e:1")
        script = stream(
            CONNECTED, sse(snapshot(job()), "e:1"), cut_off, gate.wait, sse(HEARTBEAT, "e:1"), sse(update("k"), "e:2")
        )
        over = stream(CONNECTED, sse(update(status="completed"), "e:3"))
        with scripted(script, over) as server, on_terminal("j", "--url", server.url) as terminal:
            terminal.read_until(r"j .*processing(.|\n)*not live: ")
            gate.open()
            terminal.read_until(r"k .*processing")
            assert terminal.finish() == 0
    assert NOT_LIVE in terminal.output
    assert "not live" not in terminal.output.rpartition("k ")[2]


def test_waiting_is_shown() -> None:
    with (
        scripted(stream(CONNECTED, sse(snapshot(), "e:1"), hold=True)) as server,
        on_terminal("j", "--url", server.url) as terminal,
    ):
        terminal.read_until("waiting for jobs")


def test_a_dumb_terminal_gets_lines() -> None:
    with (
        scripted(stream(CONNECTED, sse(snapshot(job(status="completed")), "e:1"))) as server,
        on_terminal("j", "--url", server.url, term="dumb") as terminal,
    ):
        assert terminal.finish() == 0
    assert terminal.output == "j completed\r\n"
