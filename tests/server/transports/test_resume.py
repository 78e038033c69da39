"""The promise of the whole: whatever happens to readers and updates, everybody ends up with the same, once."""

from __future__ import annotations

import json
import socket
from collections import defaultdict
from collections.abc import Mapping
from contextlib import AsyncExitStack
from typing import Any, Final, Literal

import pytest
import trio
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from trio.testing import wait_all_tasks_blocked

from protocol.errors import ApiError
from tests.streams import (
    Closed,
    Stream,
    WebSocket,
    clean_server,
    cursor,
    event_stream,
    lose_log,
    narrow,
    poll,
    put,
    remove,
    session,
)
from tests.support import AUTH, PATIENCE_S, Ended, InProcess, bearer, token, until

USERS: Final = ("alice", "bob")
JOBS: Final = ("one", "two", "three")

WIDE: Final = 1024 * 1024

Transport = Literal["websocket", "sse", "poll", "long-poll"]


class Reader:
    """A client that keeps its cursor and what it knows, and may change the way it reads whenever it reconnects.

    ``known`` maps jobs to their newest record, ``seen`` has every version in the order of arrival. A reader that is
    never slow must be shown every version; one that was may have missed steps, but nothing twice, nothing backwards.
    """

    def __init__(self, server: InProcess, user: str, *, by_name: bool = False) -> None:
        self.server = server
        self.user = user
        # The same jobs by their names: several channels, and event streams that end.
        self.names = [f"{user}-{job_id}" for job_id in (*JOBS, "storm")] if by_name else None
        self.cursor: str | None = None
        self.known: dict[str, dict[str, Any]] = {}
        self.seen: dict[str, list[tuple[int, int]]] = defaultdict(list)  # (incarnation, version)
        self.incarnation: dict[str, int] = defaultdict(int)
        self.gaps_allowed = False
        self._stack: AsyncExitStack | None = None
        self._client: WebSocket | Stream | None = None

    async def connect(self, transport: Transport, receive_buffer: int | None = None) -> None:
        """Leave the connection there is, and go on in another way from the same cursor."""
        await self.disconnect()
        if transport == "poll" or transport == "long-poll":
            await self.poll(0 if transport == "poll" else 5)
            return
        self._stack = AsyncExitStack()
        if transport == "websocket":
            opened = session(self.server, token=token(self.user), receive_buffer=receive_buffer)
            ws: WebSocket = await self._stack.enter_async_context(opened)
            self._client = ws
            fields: dict[str, Any] = {} if self.cursor is None else {"last_seen": self.cursor}
            if self.names is not None:
                fields["jobIds"] = self.names
            answer = await ws.subscribe(**fields)
            assert answer["recovered"] is (self.cursor is not None)
            self._snapshot(answer["snapshot"], answer["recovered"])
            self._move(answer["id"])
        else:
            stream: Stream = await self._stack.enter_async_context(
                event_stream(
                    self.server,
                    headers=bearer(self.user),
                    last_seen=self.cursor,
                    jobIds=self.names and ",".join(self.names),
                    receive_buffer=receive_buffer,
                )
            )
            if stream.status == 204:  # all have ended, and nothing is new
                assert self.cursor is not None
                assert not self.behind(cursor(self.server))
                await self.disconnect()
                return
            self._client = stream
            hello = await stream.event()
            assert (hello.type, hello.id) == ("connected", self.cursor)

    async def disconnect(self) -> None:
        """Break the connection off, whatever is on its way."""
        if self._stack is not None:
            stack, self._stack, self._client = self._stack, None, None
            await stack.aclose()

    async def read(self, count: int) -> None:
        """Take so many messages, if they come; a poll takes what there is."""
        for _ in range(count):
            if self._client is None:
                await self.poll(0)
                return
            if self.cursor is not None and not self.behind(cursor(self.server)):
                return
            with trio.move_on_after(0.05):
                await self._read_one()

    async def read_all(self) -> None:
        """Read until nothing is left to read."""
        if self._client is not None:
            narrow(self.server, WIDE)
            self._client.http.stream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, WIDE)
        goal = cursor(self.server)
        while self.cursor is None or self.behind(goal):
            if self._client is None:
                await self.poll(0)
                continue
            try:
                await self._read_one()
            except (Ended, Closed):
                await self.connect("websocket")

    def behind(self, goal: str) -> bool:
        """Whether something of this user's is still to come up to ``goal``."""
        assert self.cursor is not None
        offset = int(self.cursor.partition(":")[2])
        return any(self.server.node.history.of_user(self.user, offset))

    async def poll(self, wait_s: float) -> None:
        """One poll."""
        owned = self.server.node.jobs.by_user.get(self.user)
        if not (owned if self.cursor is None else self.behind(cursor(self.server))):
            wait_s = 0  # nothing would come: do not wait for it
        body = await poll(
            self.server,
            headers=bearer(self.user),
            last_seen=self.cursor,
            jobIds=self.names and ",".join(self.names),
            timeout=wait_s,
        )
        assert not body["reset"]
        if self.cursor is None:
            self._snapshot(body["updates"], False)
        else:
            for message in body["updates"]:
                self._update(message)
        self._move(body["last_seen"])

    async def _read_one(self) -> None:
        client = self._client
        assert client is not None
        if isinstance(client, WebSocket):
            message: Mapping[str, Any] = await client.receive()
            event_id = message["id"]
        else:
            event = await client.event()
            message, event_id = event.data, event.id
        if message["type"] == "snapshot":
            self._snapshot(message["jobs"], "more" in message)
        else:
            self._update(message)
        if event_id is not None:
            self._move(event_id)

    def _move(self, cursor: str) -> None:
        """Cursors never go back."""
        if self.cursor is not None:
            assert self.cursor.partition(":")[0] == cursor.partition(":")[0]
            assert int(cursor.partition(":")[2]) >= int(self.cursor.partition(":")[2])
        self.cursor = cursor

    def _snapshot(self, records: list[dict[str, Any]], goes_on: bool) -> None:
        if not goes_on:
            assert not self.known
        for record in records:
            self.known[record["jobId"]] = _record(record)
            self.seen[record["jobId"]].append((self.incarnation[record["jobId"]], record["version"]))

    def _update(self, message: Mapping[str, Any]) -> None:
        job_id = message["jobId"]
        assert message["userId"] == self.user
        if message["type"] == "job_deleted":
            assert job_id in self.known or self.gaps_allowed
            self.known.pop(job_id, None)
            self.incarnation[job_id] += 1
            return
        history = self.seen[job_id]
        now = (self.incarnation[job_id], message["version"])
        if history and history[-1][0] == now[0]:
            assert now > history[-1], "a repeat, or a step back"
            assert self.gaps_allowed or now[1] == history[-1][1] + 1, "a gap"
        else:
            assert self.gaps_allowed or now[1] == 1, "a gap at the beginning"
        history.append(now)
        self.known[job_id] = _record(message)


def _record(message: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in message.items() if name not in ("type", "id")}


transports = st.sampled_from(["websocket", "sse", "poll", "long-poll"])
who = st.integers(0, 3)
steps = st.one_of(
    st.tuples(st.just("put"), st.sampled_from(JOBS), st.sampled_from(USERS), st.integers(1, 4)),
    st.tuples(st.just("put"), st.sampled_from(JOBS), st.sampled_from(USERS), st.integers(1, 4)),
    st.tuples(st.just("end"), st.sampled_from(JOBS), st.sampled_from(["completed", "failed"])),
    st.tuples(st.just("delete"), st.sampled_from(JOBS)),
    st.tuples(st.just("connect"), who, transports),
    st.tuples(st.just("connect"), who, transports),
    st.tuples(st.just("leave"), who),
    st.tuples(st.just("read"), who, st.integers(1, 5)),
    st.tuples(st.just("block"), who),
    st.tuples(st.just("settle")),
)


def publish(server: InProcess, job_id: str, user: str, **fields: object) -> None:
    """An update, or nothing where the rules do not allow it (an ended job, another's job)."""
    job = server.node.jobs.get(f"{user}-{job_id}")
    if job is not None and job.latest.ended:
        fields |= {"attempt": json.loads(job.latest.body)["attempt"] + 1}
    put(server, f"{user}-{job_id}", user, **fields)


async def play(script: list[tuple[Any, ...]]) -> None:
    """Run one interleaving, and compare in the end."""
    async with clean_server(auth=AUTH, limits={"backlog": 30_000}) as server:
        readers = [Reader(server, "alice"), Reader(server, "bob", by_name=True), Reader(server, "bob")]
        readers.append(Reader(server, "alice", by_name=True))
        try:
            await follow(server, readers, script)
        finally:
            with trio.CancelScope(shield=True):
                for reader in readers:
                    await reader.disconnect()


async def follow(server: InProcess, readers: list[Reader], script: list[tuple[Any, ...]]) -> None:
    """Do what the script says, let everybody read to the end, and compare."""
    for step in script:
        match step:
            case ("put", job_id, user, count):
                for number in range(count):
                    publish(server, job_id, user, progress=number, metadata={"text": "x" * 500})
            case ("end", job_id, status):
                for user in USERS:
                    publish(server, job_id, user, status=status)
            case ("delete", job_id):
                if server.node.jobs.get(f"alice-{job_id}") is not None:
                    remove(server, f"alice-{job_id}")
            case ("connect", number, transport):
                await readers[number].connect(transport)
            case ("leave", number):
                await readers[number].disconnect()
            case ("read", number, count):
                try:
                    await readers[number].read(count)
                except (Ended, Closed):
                    await readers[number].disconnect()
            case ("block", number):
                # A socket that takes nothing, and a storm: enough to collapse what is held.
                reader = readers[number]
                await reader.connect("sse" if number % 2 else "websocket", receive_buffer=1)
                narrow(server)
                for live in readers:
                    live.gaps_allowed |= live._client is not None
                for round_ in range(12):
                    for user in USERS:
                        publish(server, "storm", user, progress=round_, metadata={"text": "x" * 4000})
                    await wait_all_tasks_blocked()
            case ("settle",):
                await wait_all_tasks_blocked()
    for reader in readers:
        with trio.fail_after(PATIENCE_S):
            if reader.cursor is None:
                await reader.connect("poll")
            await reader.read_all()
        await reader.disconnect()
    for reader in readers:
        records = {
            job.latest.job_id: json.loads(job.latest.body)
            for job in server.node.jobs.by_user.get(reader.user, {}).values()
        }
        assert reader.known == records
    # A reader that comes anew is shown the same.
    fresh = Reader(server, "alice")
    await fresh.connect("poll")
    assert fresh.known == readers[0].known


@pytest.mark.slow
@settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)
@given(st.lists(steps, min_size=5, max_size=40))
def test_any_interleaving_gives_everyone_the_same_once(script: list[tuple[Any, ...]]) -> None:
    trio.run(play, script)


@pytest.mark.parametrize("first", ["websocket", "sse", "poll", "long-poll"])
@pytest.mark.parametrize("second", ["websocket", "sse", "poll", "long-poll"])
async def test_a_cursor_of_one_transport_goes_on_in_any_other(first: Transport, second: Transport) -> None:
    async with clean_server(auth=AUTH) as server:
        publish(server, "one", "alice")
        reader = Reader(server, "alice")
        await reader.connect(first)
        publish(server, "one", "alice", status="processing")
        await reader.read_all()
        publish(server, "one", "alice", progress=50)
        publish(server, "two", "alice")
        await reader.connect(second)
        await reader.read_all()
        publish(server, "one", "alice", status="completed")
        remove(server, "alice-two")
        await reader.read_all()
        await reader.disconnect()
        assert [version for _, version in reader.seen["alice-one"]] == [1, 2, 3, 4]
        assert set(reader.known) == {"alice-one"}


async def test_every_cursor_on_the_way_resumes_exactly_behind_it() -> None:
    """Broken off after any message, on either push transport: the rest comes, once."""
    async with clean_server(auth=AUTH) as server:
        for number in range(6):
            publish(server, "one", "alice", progress=number)
        origin = f"{server.node.history.epoch}:1"
        for transport in ("websocket", "sse"):
            for taken in range(6):
                reader = Reader(server, "alice")
                reader.cursor = origin
                reader.known["alice-one"] = {}
                reader.seen["alice-one"].append((0, 1))
                await reader.connect(transport)  # type: ignore[arg-type]
                for _ in range(taken):
                    if reader.behind(cursor(server)):
                        await reader._read_one()
                await reader.connect("sse" if transport == "websocket" else "websocket")
                await reader.read_all()
                await reader.disconnect()
                assert [version for _, version in reader.seen["alice-one"]] == [1, 2, 3, 4, 5, 6]


async def test_a_lost_log_reaches_everyone_who_reads_or_waits() -> None:
    async with clean_server() as server:
        for number in range(5):
            put(server, "a", progress=number)
        old = cursor(server)
        answers: list[dict[str, Any]] = []

        async def wait() -> None:
            answers.append(await poll(server, last_seen=old, timeout=20))

        async with (
            session(server) as ws,
            event_stream(server) as stream,
            trio.open_nursery() as nursery,
        ):
            await ws.subscribe()
            await stream.events(2)
            nursery.start_soon(wait)
            await until(lambda: server.node.polls)
            lose_log(server, last=2)
            new = cursor(server)
            reset = await ws.receive()
            assert (reset["type"], reset["id"], len(reset["snapshot"])) == ("reset", new, 1)
            assert [(event.type, event.id) for event in await stream.events(2)] == [("reset", None), ("snapshot", new)]
        (answer,) = answers
        assert (answer["reset"], answer["timedOut"], answer["last_seen"]) == (True, False, new)
        assert [update["version"] for update in answer["updates"]] == [5]
        # The old cursor is lost for whoever comes later, on every transport.
        assert (await poll(server, last_seen=old))["reset"]
        async with session(server) as ws, event_stream(server, last_seen=old) as stream:
            assert not (await ws.subscribe(last_seen=old))["recovered"]
            assert [event.type for event in await stream.events(3)] == ["connected", "reset", "snapshot"]


async def test_a_restart_on_the_same_store_is_no_reset(tmp_path: Any) -> None:
    store = {"url": f"sqlite:{tmp_path}/jobs.db"}
    async with clean_server(store=store) as server:
        for number in range(3):
            await server.publish("a", userId="u", progress=number)
        async with session(server) as ws:
            answer = await ws.subscribe()
            last = answer["id"]
        await server.publish("a", progress=50)
    async with (
        clean_server(store=store) as server,
        session(server) as ws,
        event_stream(server, last_seen=last) as stream,
    ):
        assert (await ws.subscribe(last_seen=last))["recovered"]
        assert (await ws.receive())["version"] == 4
        assert [event.type for event in await stream.events(2)] == ["connected", "status_update"]
        await server.publish("a", status="completed")
        assert (await ws.receive())["version"] == 5


async def test_a_store_that_fails_shows_nothing_and_takes_nothing_back(tmp_path: Any) -> None:
    """Readers see an update only once it is kept."""
    async with clean_server(store={"url": f"sqlite:{tmp_path}/jobs.db"}) as server, session(server) as ws:
        await ws.subscribe()
        with pytest.raises(ApiError):
            put(server, "a", progress=-1)
        before = cursor(server)
        put(server, "a")
        assert cursor(server) == before  # decided, not kept
        update = await ws.receive()
        assert update["version"] == 1
        assert update["id"] == cursor(server) != before
