"""``statuswire run -- command…``: a command as a job. Its exit status is how it ends, its output how far it is."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from argparse import Namespace
from collections.abc import Iterator, Sequence
from typing import IO, Final, TextIO
from uuid import uuid4

from statuswire.client import configure
from statuswire.hooks.reporting import MAX_CLIMBS, job_id
from statuswire.jobs import Job, job

# What commands usually print: 45%, 45.5 %, 120/300, [120/300], 3 of 8.
PATTERN: Final = r"(?P<percent>\d{1,3}(?:\.\d+)?)\s?%|\b(?P<done>\d+)\s?(?:/|of)\s?(?P<total>\d+)\b"
EXIT_NOT_FOUND: Final = 127
EXIT_NOT_EXECUTABLE: Final = 126
# A line without an end is looked at in pieces.
_LINE: Final = 8192
# Progress bars write over themselves with carriage returns.
_END: Final = re.compile(rb"[\r\n]")
_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_CANCEL_EVERY_S: Final = 0.5


def progress_in(line: str, pattern: re.Pattern[str]) -> float | None:
    """How far a line says it is, 0 to 100; None if it does not. The last match counts.

    The pattern has a group ``percent``, or ``done`` and ``total``, or one group that is a percentage.
    """
    found: float | None = None
    for match in pattern.finditer(line):
        groups = match.groupdict()
        try:
            if groups.get("done") is not None and groups.get("total") is not None:
                percent = 100 * float(groups["done"]) / float(groups["total"])
            else:
                text = groups.get("percent") or (match[1] if match.re.groups and not groups else "")
                percent = float(text)
        except (ValueError, ZeroDivisionError, OverflowError, TypeError):
            continue
        if 0 <= percent <= 100:
            found = percent
    return found


def run(arguments: Namespace) -> int:
    """Run the command and report on it; returns its exit status, as a shell gives it.

    Whether the server is there does not matter to the command.
    """
    command = arguments.command[1:] if arguments.command[:1] == ["--"] else arguments.command
    if not command:
        print("statuswire: nothing to run; see `statuswire run --help`", file=sys.stderr)
        return 2
    try:
        pattern = re.compile(arguments.pattern or PATTERN)
    except re.error as error:
        print(f"statuswire: --pattern is no regular expression: {error}", file=sys.stderr)
        return 2
    _have_outlets()
    started: list[subprocess.Popen[bytes]] = []
    stopped = _pass_signals_on(started)
    configure(arguments.url, arguments.token)
    name = os.path.basename(command[0])
    # Its arguments may be secret, so only its name is told.
    handle = job(arguments.job or job_id(f"{name}-{uuid4().hex[:12]}"), user=arguments.user,
                 kind=arguments.kind or name, attempt=arguments.attempt, ttl=arguments.ttl or None)  # fmt: skip
    # It may have been run before, or be believed dead because the server was not reached for long.
    handle.may_climb(MAX_CLIMBS)
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    except OSError as error:
        handle.fail(f"{name}: {error.strerror}")
        print(f"statuswire: {command[0]}: {error.strerror}", file=sys.stderr)
        return EXIT_NOT_FOUND if isinstance(error, FileNotFoundError) else EXIT_NOT_EXECUTABLE
    started.append(process)
    for number in stopped:  # they came too early
        process.send_signal(number)
    last = _Last()
    readers = [
        threading.Thread(target=_read, args=(stream, out, handle, pattern, said), daemon=True)
        for stream, out, said in (
            (process.stdout, _bytes_of(sys.stdout), None),
            (process.stderr, _bytes_of(sys.stderr), last),
        )
    ]
    for reader in readers:
        reader.start()
    status = _wait(process, handle)
    for reader in readers:
        # What it has started may have its output still, and live on.
        reader.join(1.0)
    _end(handle, status, stopped, last.line)
    return status if status >= 0 else 128 - status


class _Last:
    """The last line of standard error: why it failed, as a rule."""

    line = ""


def _have_outlets() -> None:
    """What this process was started without is nowhere; a pipe to the command must not get its number."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


def _bytes_of(out: TextIO | None) -> IO[bytes]:
    """Where bytes can be written; nowhere if this process was started without."""
    return open(os.devnull, "wb") if out is None else out.buffer


def _read(stream: IO[bytes] | None, out: IO[bytes], handle: Job, pattern: re.Pattern[str], last: _Last | None) -> None:
    assert stream is not None
    for line in _lines(stream.fileno(), out):
        words = line.decode("utf-8", "replace").strip()
        if not words:
            continue
        percent = progress_in(words, pattern)
        if percent is not None:
            handle.progress(percent, words[:200])
        elif last is not None:
            last.line = words[:500]


def _lines(descriptor: int, out: IO[bytes]) -> Iterator[bytes]:
    """The lines that are written there. All of it goes on as it comes: a prompt has no end."""
    held = b""
    while data := os.read(descriptor, 65536):
        try:
            out.write(data)
            out.flush()
        except (OSError, ValueError):
            pass  # nobody reads it any more; the command goes on
        *lines, held = _END.split(held + data)
        yield from lines
        if len(held) > _LINE:
            yield held
            held = b""
    yield held


def _pass_signals_on(started: Sequence[subprocess.Popen[bytes]]) -> list[int]:
    """Signals to this process are the command's, once it is started. Returns those that came.

    Those that are ignored here (by ``nohup``, say) stay so, for the command too.
    """
    came: list[int] = []

    def handle(number: int, _: object) -> None:
        came.append(number)
        for process in started:
            # Of several, one is certainly not the terminal's, or the first did not help.
            given = number == signal.SIGINT and came.count(number) == 1 and _in_foreground()
            if process.poll() is None and not given:
                process.send_signal(number)

    for number in _SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handle)
    return came


def _in_foreground() -> bool:
    """Whether a terminal gives Ctrl-C to this process and to the command: many take the second one for an order."""
    try:
        with open("/dev/tty", "rb", buffering=0) as terminal:
            return os.tcgetpgrp(terminal.fileno()) == os.getpgrp()
    except OSError:
        return False


def _wait(process: subprocess.Popen[bytes], handle: Job) -> int:
    """Until it has ended; it is asked to, once, when somebody cancels the job."""
    asked = False
    while True:
        try:
            return process.wait(_CANCEL_EVERY_S)
        except subprocess.TimeoutExpired:
            if handle.cancel_requested and not asked:
                asked = True
                process.terminate()


def _end(handle: Job, status: int, stopped: list[int], last: str) -> None:
    if status == 0:
        handle.complete()
    elif handle.cancel_requested or (stopped and (status == -stopped[-1] or status == 128 + stopped[-1])):
        handle.cancel("stopped by request" if handle.cancel_requested else f"stopped by {_name(stopped[-1])}")
    else:
        why = f"killed by {_name(-status)}" if status < 0 else f"exit status {status}"
        handle.fail(f"{why}: {last}" if last else why)


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
