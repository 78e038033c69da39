"""How ``watch`` shows jobs: bars on a terminal, lines into a file or pipe, JSON for programs.

Job texts come from whoever publishes; control characters in them never reach the terminal.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self, TextIO, TypeAlias

import msgspec

from server.logs import printable

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

Record: TypeAlias = dict[str, Any]  # a job record, as the server sends it

ENDED = frozenset({"completed", "failed", "cancelled", "deleted"})
COLOURS = {
    "queued": "cyan",
    "processing": "blue",
    "stalled": "magenta",
    "completed": "green",
    "failed": "red",
    "cancelled": "yellow",
    "deleted": "bright_black",
}
# Smooth to the eye, and nothing against what drawing costs.
REFRESHES_PER_SECOND = 8


class Display(Protocol):
    """What ``watch`` tells; each of its events in the order they came."""

    def event(self, data: str) -> None:
        """One event as received."""

    def show(self, changed: Sequence[Record], jobs: Mapping[str, Record]) -> None:
        """Records that changed by the last events, and all there are."""

    def note(self, text: str | None) -> None:
        """Why what is shown is not live at the moment, or None: it is (again)."""


def open_display(stream: TextIO, *, json: bool) -> AbstractContextManager[Display]:
    """The display that suits ``stream``; leaving it leaves a terminal as it was."""
    if json:
        return JsonLines(stream)
    if stream.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown"):
        return Bars(stream)
    return Lines(stream)


class _Printed:
    """Common to the line displays: output at once, notes on stderr, each only once, and when their reason is over."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._noted: str | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def note(self, text: str | None) -> None:
        if text != self._noted:
            print(f"statuswire: {'live' if text is None else printable(text)}", file=sys.stderr, flush=True)
        self._noted = text


class JsonLines(_Printed):
    """Every event as it came, one JSON object per line."""

    def event(self, data: str) -> None:
        line = data if "\n" not in data else msgspec.json.encode(msgspec.json.decode(data)).decode()
        self._stream.write(line + "\n")

    def show(self, changed: Sequence[Record], jobs: Mapping[str, Record]) -> None:
        self._stream.flush()


class Lines(_Printed):
    """One line per change: ``2026-01-31T12:00:00Z job_1 processing 45% pages: page 9/20, 1:33 left``."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._last: dict[str, str] = {}

    def event(self, data: str) -> None:
        pass

    def show(self, changed: Sequence[Record], jobs: Mapping[str, Record]) -> None:
        for record in changed:
            line = describe(record)
            # A snapshot after a reconnect repeats what has been said.
            if self._last.get(record["jobId"]) != line:
                self._stream.write(line + "\n")
                self._last[record["jobId"]] = line
        if len(self._last) > len(jobs):
            self._last = {job_id: line for job_id, line in self._last.items() if job_id in jobs}
        self._stream.flush()


class Bars:
    """One bar per job, redrawn in place; those that run come first when the terminal is too small for all."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console
        from rich.live import Live

        self._jobs: dict[str, Record] = {}
        self._note: str | None = None
        # rich draws in a thread of its own.
        self._lock = threading.Lock()
        self._console = Console(file=stream, highlight=False, markup=False, emoji=False)
        self._live = Live(console=self._console, get_renderable=self._draw, refresh_per_second=REFRESHES_PER_SECOND)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._note = None
        self._live.stop()

    def event(self, data: str) -> None:
        pass

    def show(self, changed: Sequence[Record], jobs: Mapping[str, Record]) -> None:
        with self._lock:
            for record in changed:
                self._jobs[record["jobId"]] = record
            if self._jobs.keys() != jobs.keys():  # a snapshot dropped some
                self._jobs = dict(jobs)

    def note(self, text: str | None) -> None:
        with self._lock:
            self._note = text

    def _draw(self) -> RenderableType:
        from rich.console import Group
        from rich.text import Text

        with self._lock:
            records, note = list(self._jobs.values()), self._note
        room = max(self._console.height - 3, 1)
        shown = _most_alive(records, room)
        below = []
        if len(shown) < len(records):
            below.append(Text(f"… and {len(records) - len(shown)} more", style="bright_black"))
        if not records and note is None:
            below.append(Text("waiting for jobs", style="bright_black"))
        if note is not None:
            below.append(Text(printable(note), style="yellow", no_wrap=True, overflow="ellipsis"))
        return Group(_table(shown), *below)


def _most_alive(records: list[Record], room: int) -> list[Record]:
    """Those that run, then the latest that ended, at most ``room`` of them and in their old order."""
    if len(records) <= room:
        return records
    running = [index for index, record in enumerate(records) if record.get("status") not in ENDED]
    ended = [index for index, record in enumerate(records) if record.get("status") in ENDED]
    chosen = sorted((running + ended[::-1])[:room])
    return [records[index] for index in chosen]


def _table(records: Iterable[Record]) -> Table:
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 1), expand=True)
    table.add_column(no_wrap=True, overflow="ellipsis", ratio=3)
    table.add_column(ratio=4)
    table.add_column(justify="right", no_wrap=True, width=4)
    table.add_column(no_wrap=True, width=10)
    table.add_column(no_wrap=True, overflow="ellipsis", ratio=5)
    table.add_column(justify="right", no_wrap=True, width=8)
    for record in records:
        status = str(record.get("status", ""))
        colour = COLOURS.get(status, "white")
        progress = _progress(record)
        bar = ProgressBar(
            total=100,
            completed=progress or 0,
            # No number yet: show that something moves.
            pulse=progress is None and status == "processing",
            complete_style=colour,
            finished_style=colour,
        )
        table.add_row(
            Text(printable(str(record.get("jobId")))),
            bar,
            Text("" if progress is None else f"{progress:.0f}%"),
            Text(printable(status), style=colour),
            Text(_doing(record)),
            Text(_remaining(record), style="bright_black"),
        )
    return table


def describe(record: Record) -> str:
    """One job on one line."""
    progress = _progress(record)
    remaining = _remaining(record)
    words = [
        str(record.get("timestamp") or ""),
        str(record.get("jobId")),
        str(record.get("status") or ""),
        "" if progress is None else f"{progress:.0f}%",
        _doing(record),
    ]
    line = " ".join(word for word in words if word)
    return printable(f"{line}, {remaining} left" if remaining else line)


def _progress(record: Record) -> float | None:
    progress = record.get("progress")
    if isinstance(progress, int | float) and 0 <= progress <= 100:
        return float(progress)
    return None


def _doing(record: Record) -> str:
    """Stage and operation; of a failed job its error."""
    error = record.get("error")
    if error and record.get("status") in ("failed", "stalled"):
        return printable(error if isinstance(error, str) else msgspec.json.encode(error).decode())
    operation = record.get("currentOperation") or record.get("message")
    return printable(": ".join(str(part) for part in (record.get("stage"), operation) if part))


def _remaining(record: Record) -> str:
    """``1:33`` or ``2:01:33``, or nothing when the job is over or nobody knows."""
    seconds = record.get("estimatedTimeRemaining")
    if not isinstance(seconds, int | float) or not 0 < seconds < 1e7 or record.get("status") in ENDED:
        return ""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
