"""Readers and publishers that know all nodes and come back at another one, as clients do; see ``check``.

Each reader watches one user's jobs over one transport for as long as it lasts, through as many connections as it takes.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import urlencode

import trio

from tests.pacing import for_a_while
from tests.streams import Closed, Stream, WebSocket, connect, handshake_bytes
from tests.support import Address, Ended, bearer, request_bytes

# Longer waits than this are cut short: how long a server asks its clients to wait is not what is tested here.
_LONGEST_WAIT_S: Final = 1.0
_UNREACHABLE: Final = (OSError, Ended, trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError)
TRANSPORTS: Final = ("ws", "sse", "poll")


class ComeAgainError(Exception):
    """The server asks to come again, after so many seconds."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds


@dataclass
class Reader:
    """One user's reader.

    Attributes:
        offsets: of the updates that it was given, over all its connections.
        versions: of each job, in the order they came.
        texts: their messages.
        resets: how often it was told that its cursor does not hold.
        connections: how many it took.
        proxied: there is a proxy in between.
        sent_away: when a server ended a connection of its own accord (``trio.current_time``), and for how long it asked
            to stay away.
        started: set once it has its first snapshot.
    """

    transport: str
    nodes: Sequence[Address]
    user: str
    at: int = 0
    cursor: str | None = None
    offsets: list[int] = field(default_factory=list)
    versions: dict[str, list[int]] = field(default_factory=dict)
    texts: Counter[str] = field(default_factory=Counter)
    resets: int = 0
    connections: int = 0
    proxied: bool = False
    sent_away: list[tuple[float, float]] = field(default_factory=list)
    started: trio.Event = field(default_factory=trio.Event)

    async def run(self) -> None:
        """Read until cancelled."""
        read = {"ws": self._websocket, "sse": self._event_stream, "poll": self._polls}[self.transport]
        while True:
            wait = 0.05
            try:
                await read(self.nodes[self.at % len(self.nodes)])
            except ComeAgainError as again:
                wait = min(again.seconds, _LONGEST_WAIT_S)
            except _UNREACHABLE:
                pass
            self.at += 1
            await for_a_while(wait)

    def _take(self, message: dict[str, Any], cursor: str) -> None:
        self.cursor = cursor
        self.offsets.append(int(cursor.partition(":")[2]))
        self.versions.setdefault(message["jobId"], []).append(message["version"])
        self.texts[message.get("message", "")] += 1

    def _begun(self, cursor: str | None, *, reset: bool) -> None:
        self.cursor = cursor
        self.resets += reset
        self.started.set()

    async def _websocket(self, where: Address) -> None:
        async with connect(where) as http:
            await http.send(handshake_bytes("/ws/jobs", bearer(self.user)))
            status, answer = await http.head()
            if status != 101:
                raise ComeAgainError(0.1)
            self.connections += 1
            ws = WebSocket(http, answer, None)
            try:
                await ws.receive()
                begun = await ws.ask("subscribe", **({} if self.cursor is None else {"last_seen": self.cursor}))
                if begun["type"] != "subscribed":
                    raise ComeAgainError(0.1)
                self._begun(begun["id"], reset=self.cursor is not None and not begun["recovered"])
                while True:
                    message = await ws.receive()
                    if "jobId" in message:
                        self._take(message, message["id"])
                    elif message["type"] == "reset":
                        self._begun(message["id"], reset=True)
            except Closed as closed:
                delay = re.search(r"(\d+) ms", closed.reason)
                if delay:
                    self.sent_away.append((trio.current_time(), int(delay[1]) / 1000))
                raise ComeAgainError(int(delay[1]) / 1000 if delay else 0.05) from None

    async def _event_stream(self, where: Address) -> None:
        async with connect(where) as http:
            headers = bearer(self.user) | {"Accept": "text/event-stream"}
            if self.cursor is not None:
                headers["Last-Event-ID"] = self.cursor
            await http.send(request_bytes("GET", "/api/v2/jobs/stream", headers=headers))
            status, answer = await http.head()
            if status != 200:
                raise ComeAgainError(0.1)
            self.connections += 1
            stream = Stream(http, status, answer, proxied=self.proxied)
            retry_ms = 50
            while True:
                try:
                    event = await stream.event()
                except Ended:
                    raise ComeAgainError(retry_ms / 1000) from None
                if event.type == "error":
                    retry_ms = event.retry or retry_ms
                    self.sent_away.append((trio.current_time(), retry_ms / 1000))
                elif "jobId" in event.data:
                    assert event.id is not None
                    self._take(event.data, event.id)
                elif event.type == "reset":
                    self.resets += 1
                elif event.type == "snapshot" and event.id is not None:
                    self._begun(event.id, reset=False)
                self.cursor = event.id or self.cursor

    async def _polls(self, where: Address) -> None:
        async with connect(where) as http:
            while True:
                query: dict[str, object] = {"timeout": 0 if self.cursor is None else 10}
                if self.cursor is not None:
                    query["last_seen"] = self.cursor
                target = f"/api/v2/jobs/poll?{urlencode(query, safe=':')}"
                answer = await http.request("GET", target, headers=bearer(self.user))
                if answer.status != 200:
                    raise ComeAgainError(float(answer.headers.get("retry-after", 0.1)))
                self.connections += 1
                body = answer.json
                for update in body["updates"]:
                    self._take(update, update["id"])
                self._begun(body["last_seen"], reset=body["reset"])
                if answer.headers.get("connection") == "close":
                    raise ComeAgainError(0)

    def has(self, newest: dict[str, int]) -> bool:
        """Whether it has these versions."""
        return all(self.versions.get(job_id, [0])[-1] >= version for job_id, version in newest.items())

    def check(self, newest: dict[str, int]) -> None:
        """It was given every update of its jobs up to these versions exactly once, and all in log order."""
        whom = f"{self.transport} reader of {self.user}"
        assert not self.resets, whom
        assert self.offsets == sorted(set(self.offsets)), whom
        for job_id, version in newest.items():
            assert self.versions.get(job_id) == list(range(1, version + 1)), f"{whom}: {job_id}"
        assert set(self.texts.values()) <= {1}, whom


@dataclass
class Publisher:
    """Publishes to one user's job, a batch at a time, and again with the same key until it is answered.

    Attributes:
        published: updates that were answered; versions are given from 1 on, so this is also the newest one.
        repeated: batches that had to be sent more than once.
    """

    nodes: Sequence[Address]
    user: str
    job_id: str
    at: int = 0
    batch: int = 5
    pause_s: float = 0.0
    published: int = 0
    repeated: int = 0

    async def run(self, stopping: trio.Event) -> None:
        """Publish until it is to stop."""
        headers = bearer(self.user, capabilities=["publish"])
        for number in itertools.count(1):
            if stopping.is_set():
                return
            text = f"{self.job_id} {number}"
            lines = [
                {"jobId": self.job_id, "userId": self.user, "message": f"{text}.{index}"} for index in range(self.batch)
            ]
            tries = 0
            while not await taken(self.nodes[self.at % len(self.nodes)], lines, headers | {"Idempotency-Key": text}):
                tries += 1
                self.at += 1
                await for_a_while(0.05)
            self.repeated += tries > 0
            self.published += self.batch
            await for_a_while(self.pause_s)


async def taken(where: Address, lines: list[dict[str, str]], headers: dict[str, str]) -> bool:
    """Publish a batch; whether all of it was taken. Nobody may be there to do it."""
    try:
        answer = await where.post("/api/v2/updates", lines, headers)
    except _UNREACHABLE:
        return False
    if answer.status in (502, 503, 504):  # a proxy, too, may find nobody
        return False
    assert answer.status == 200, answer
    return bool(answer.json["accepted"] + answer.json["duplicates"] == len(lines))
