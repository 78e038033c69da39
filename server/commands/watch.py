"""``statuswire watch``: follow jobs over SSE, through restarts and lost connections, without a hole.

The loop here keeps the stream alive and the cursor; ``Watched`` holds what is known of the jobs; how that is shown is
for ``display`` to say.
"""

from __future__ import annotations

import sys
import time
from argparse import Namespace
from collections.abc import Generator, Iterator
from contextlib import ExitStack, closing
from typing import Any

import httpx
import msgspec

from protocol.sse import Event, EventParser, EventTooLarge
from server.cli import EXIT_FAILED, EXIT_OK, EXIT_USAGE, CommandError
from server.commands.client import (
    MAX_ASKED_DELAY,
    PASSING,
    is_hopeless,
    jittered,
    message_of,
    open_client,
    reason_of,
    retry_after,
    timeouts,
)
from server.commands.display import ENDED, Display, Record, open_display

PATH = "api/v2/jobs/stream"
BASE_DELAY = 0.5
MAX_DELAY = 20.0
# A connection without this many heartbeats is dead; their interval is 30 s unless the server says otherwise.
HEARTBEATS = 3
READ_TIMEOUT = HEARTBEATS * 30.0
MAX_READ_TIMEOUT = 3600.0

NOT_LIVE = "not live: the server is cut off from its store, so this may be old"

_UPDATES = frozenset({"status_update", "job_completed", "job_failed", "job_cancelled", "job_deleted"})


class Watched:
    """The jobs as the stream has told them so far.

    Attributes:
        jobs: job id to its latest record, in the order they were first seen; a deleted one has status ``deleted``.
        complete: whether a whole snapshot has been seen, so that ``jobs`` is all there is.
    """

    def __init__(self, names: tuple[str, ...]) -> None:
        self.jobs: dict[str, Record] = {}
        self.complete = False
        self._names = names
        self._parts: dict[str, Record] | None = None

    def connected(self) -> None:
        """A new stream begins: a snapshot that was cut off does not count."""
        self._parts = None

    def take(self, message: dict[str, Any]) -> list[Record]:
        """Take one event; returns the records that it changed. A snapshot replaces everything known."""
        kind = message.get("type")
        if kind == "snapshot":
            return self._snapshot(message)
        job_id = message.get("jobId")
        if kind not in _UPDATES or not isinstance(job_id, str):
            return []
        record = {name: value for name, value in message.items() if name not in ("type", "id")}
        if kind == "job_deleted":
            before = self.jobs.get(job_id, {})
            # What has ended stays as it ended: tidying up afterwards does not undo success.
            record = before if before.get("status") in ENDED else {**before, **record, "status": "deleted"}
        self.jobs[job_id] = record
        return [record]

    def _snapshot(self, message: dict[str, Any]) -> list[Record]:
        parts = self._parts if self._parts is not None else {}
        listed = message.get("jobs")
        for record in listed if isinstance(listed, list) else []:
            if isinstance(record, dict) and isinstance(record.get("jobId"), str):
                parts[record["jobId"]] = record
        if message.get("more") is True:
            self._parts = parts
            return []
        self._parts = None
        self.jobs = parts
        self.complete = True
        return list(parts.values())

    @property
    def ended(self) -> bool:
        """Whether every named job has ended; without names, whether all there are have."""
        known = [self.jobs.get(name) for name in self._names] if self._names else list(self.jobs.values())
        return self.complete and all(record is not None and record.get("status") in ENDED for record in known)

    @property
    def all_completed(self) -> bool:
        """Whether no job failed: every named one completed, of the others those that ended."""
        if self._names:
            return all(self.jobs.get(name, {}).get("status") == "completed" for name in self._names)
        return all(record.get("status") not in ENDED - {"completed"} for record in self.jobs.values())


def run(arguments: Namespace) -> int:
    """Follow until the named jobs have ended; returns 0 if all of them completed, else 1.

    Raises:
        CommandError: (2) the server refuses for good, or the arguments make no sense.
    """
    names = tuple(dict.fromkeys(arguments.jobs))
    if bool(names) == bool(arguments.all or arguments.user):
        raise CommandError("watch: name jobs, or give --all or --user; see `statuswire watch --help`", EXIT_USAGE)
    if any("," in name for name in names):
        raise CommandError("watch: separate jobs by spaces; no job id has a comma", EXIT_USAGE)
    watched = Watched(names)
    query = {"jobIds": ",".join(names)} if names else {}
    if arguments.user:
        query["userId"] = arguments.user
    with ExitStack() as stack:
        client = stack.enter_context(open_client(arguments.url, arguments.token, read_timeout=READ_TIMEOUT))
        display = stack.enter_context(open_display(sys.stdout, json=arguments.json))
        stream = _Stream(client, arguments.url, query, display)
        batches = stack.enter_context(closing(stream.batches()))
        for events in batches:
            if events is None:
                watched.connected()
                continue
            changed: list[Record] = []
            for event in events:
                message = _decode(event.data)
                if message is not None:
                    display.event(event.data)
                    changed += watched.take(message)
                    stream.take(message)
            display.show(changed, watched.jobs)
            stream.all_ended = bool(names) and watched.ended
            if arguments.exit and not names and watched.ended:
                break
    return EXIT_OK if watched.all_completed else EXIT_FAILED


def _decode(data: str) -> dict[str, Any] | None:
    try:
        message = msgspec.json.decode(data)
    except (msgspec.DecodeError, RecursionError):
        return None  # not ours; a stream is no place to give up over one event
    return message if isinstance(message, dict) else None


class _Stream:
    """The event stream, connected again whenever it ends, from where it ended."""

    def __init__(self, client: httpx.Client, url: str, query: dict[str, str], display: Display) -> None:
        self.all_ended = False  # told from outside: the end of the stream is the end of everything
        self._client = client
        self._url = url
        self._query = query
        self._display = display
        self._cursor = ""
        self._retry: float | None = None  # seconds the server asked to wait before the next connection
        self._failures = 0  # connections in a row that brought nothing
        self._live = True  # as the server said last: it knows all that other servers know

    def batches(self) -> Generator[list[Event] | None, None, None]:
        """What arrived together, and None for each new stream; ends when the server says that it is all over.

        Raises:
            CommandError: the server refuses for good.
        """
        while True:
            problem = None
            asked = None
            try:
                with self._client.stream("GET", PATH, params=self._query, headers=self._headers()) as answer:
                    if answer.status_code == 204:
                        return
                    if answer.status_code in PASSING:
                        answer.read()
                        asked = retry_after(answer)
                        problem = message_of(answer)
                    else:
                        self._check(answer)
                        yield None
                        yield from self._events(answer)
            except httpx.RequestError as error:
                problem = f"no connection to {self._url}: {reason_of(error)}"
                if is_hopeless(error):
                    raise CommandError(problem, EXIT_USAGE) from error
            except EventTooLarge as error:
                raise CommandError(f"{self._url}: {error}", EXIT_USAGE) from error
            if self.all_ended:
                return
            delay = self._delay(asked)
            self._failures += 1
            if problem is not None:
                self._display.note(f"{problem}; trying again")
            time.sleep(delay)

    def take(self, message: dict[str, Any]) -> None:
        """What an event says about the stream itself."""
        kind, heartbeat = message.get("type"), message.get("heartbeat")
        if kind == "error":
            self._display.note(str(message.get("message") or message.get("code")))
            return
        if kind in ("connected", "heartbeat"):
            self._live = message.get("live") is not False
        self._display.note(None if self._live else NOT_LIVE)
        if kind == "connected" and isinstance(heartbeat, int | float):
            # For the next connection; on this one a longer interval costs one reconnection.
            self._client.timeout = timeouts(min(max(READ_TIMEOUT, HEARTBEATS * heartbeat), MAX_READ_TIMEOUT))

    def _headers(self) -> dict[str, str]:
        headers = {"Accept": "text/event-stream", "Cache-Control": "no-cache"}
        if self._cursor:
            headers["Last-Event-ID"] = self._cursor
        return headers

    def _check(self, answer: httpx.Response) -> None:
        if answer.status_code != 200:
            answer.read()
            raise CommandError(message_of(answer), EXIT_USAGE)
        content_type = answer.headers.get("content-type", "")
        if content_type.partition(";")[0].strip().lower() != "text/event-stream":
            what = content_type or "no content type"
            raise CommandError(f"{self._url} answered with {what}: no statuswire server?", EXIT_USAGE)

    def _events(self, answer: httpx.Response) -> Iterator[list[Event]]:
        parser = EventParser(last_event_id=self._cursor)
        for chunk in answer.iter_bytes():
            events = parser.feed(chunk)
            self._cursor = parser.last_event_id
            if parser.retry_ms is not None:
                self._retry = min(parser.retry_ms / 1000, MAX_ASKED_DELAY)
            if any(event.event == "message" and '"try_later"' not in event.data for event in events):
                self._failures = 0
            if events:
                yield events

    def _delay(self, asked: float | None) -> float:
        """Seconds until the next connection: what the server asked for at least, longer with each failure in a row."""
        spread = jittered(self._failures, base=BASE_DELAY, cap=MAX_DELAY)
        if asked is not None:
            return asked + spread
        return max(self._retry or 0.0, spread)
