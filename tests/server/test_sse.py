"""Event streams over real sockets: what ``EventSource`` and curl are told, and when."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from server.app import drain
from server.transports import live, sse
from tests.streams import (
    NO_PATIENCE,
    Stream,
    clean_server,
    connect,
    cursor,
    event_stream,
    lose_log,
    narrow,
    parse_events,
    put,
    remove,
    reset_connection,
    traces,
    versions,
    websocket,
)
from tests.support import ADMIN, AUTH, Ended, InProcess, bearer, in_seconds, request_bytes, until

ALICE, BOB = bearer("alice"), bearer("bob")
EVENT_SOURCE = {"Accept": "text/event-stream"}


@pytest.fixture
async def server() -> AsyncIterator[InProcess]:
    async with clean_server() as running:
        yield running


@pytest.fixture
async def guarded() -> AsyncIterator[InProcess]:
    async with clean_server(auth=AUTH) as running:
        yield running


# Beginning


async def test_a_fresh_stream_is_connected_then_snapshot_then_every_update(server: InProcess) -> None:
    put(server, "a", status="processing", progress=10)
    put(server, "b", kind="export")
    async with event_stream(server) as stream:
        assert stream.status == 200
        assert stream.headers["content-type"] == "text/event-stream"
        assert stream.headers["cache-control"] == "no-cache, no-transform"
        assert stream.headers["x-accel-buffering"] == "no"
        connected, snapshot = await stream.events(2)
        assert connected.type == "connected"
        assert connected.data["userId"] == "anonymous"
        assert connected.data["heartbeat"] == 30
        assert isinstance(connected.data["heartbeat"], int)
        assert connected.data["clientId"]
        # Nothing has been given yet, so there is no id; and the retry stands in the first event, not alone.
        assert connected.id is None
        assert connected.retry is not None
        assert 500 <= connected.retry <= 10_000
        assert snapshot.type == "snapshot"
        assert "more" not in snapshot.data
        assert [job["jobId"] for job in snapshot.data["jobs"]] == ["a", "b"]
        assert snapshot.id == cursor(server)
        put(server, "a", progress=20)
        put(server, "c")
        for job_id, version in (("a", 2), ("c", 1)):
            event = await stream.event()
            assert event.type == "status_update"
            assert (event.data["jobId"], event.data["version"]) == (job_id, version)
            assert event.id == event.data["id"]
        assert stream.last_id == cursor(server)
        assert event.retry is None


async def test_every_ending_has_its_own_type(server: InProcess) -> None:
    async with event_stream(server) as stream:
        await stream.until("snapshot")
        for job_id, status in (("a", "completed"), ("b", "failed"), ("c", "cancelled"), ("d", "queued")):
            put(server, job_id, status=status)
        remove(server, "d")
        events = await stream.events(5)
        assert [event.type for event in events] == [
            "job_completed", "job_failed", "job_cancelled", "status_update", "job_deleted",
        ]  # fmt: skip
        assert events[-1].data == {"type": "job_deleted", "id": events[-1].id, "jobId": "d", "userId": "alice"}


async def test_snapshot_and_tail_meet_without_gap_whenever_updates_come(server: InProcess) -> None:
    """Updates go on while connections begin, at any moment of their beginning."""
    put(server, "a", status="processing")
    done = trio.Event()

    async def publish() -> None:
        while not done.is_set():
            put(server, "a", message="m")
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(publish)
        for _ in range(10):
            async with event_stream(server) as stream:
                (record,) = (await stream.until("snapshot"))[-1].data["jobs"]
                seen = [record["version"], *versions([event.data for event in await stream.events(20)], "a")]
                assert seen == list(range(seen[0], seen[0] + 21))
        done.set()


async def test_what_is_pending_while_a_stream_begins_is_not_given_twice(
    server: InProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Updates in the very turn of the loop in which a stream begins, before the flusher has its turn."""
    async with event_stream(server) as witness:
        await witness.events(2)
        begin = sse.EventStream.begin

        def begin_late(self: sse.EventStream, *args: Any) -> None:
            put(server, "a")
            begin(self, *args)
            put(server, "a")

        monkeypatch.setattr(sse.EventStream, "begin", begin_late)
        for last_seen in (None, cursor(server)):
            async with event_stream(server, last_seen=last_seen) as stream:
                data = [event.data for event in (await stream.events(3))[1:]]
                records = data.pop(0)["jobs"] if last_seen is None else []
                seen = versions([*records, *data], "a")
                assert seen == [seen[0], seen[0] + 1]
                put(server, "a")
                assert (await stream.event()).data["version"] == seen[1] + 1


async def test_a_resumed_stream_gets_what_came_after_its_cursor(server: InProcess) -> None:
    put(server, "a")
    put(server, "b")
    since = cursor(server)
    put(server, "a", status="processing")
    put(server, "b", status="processing")
    put(server, "a", progress=50)
    async with event_stream(server, last_seen=since) as stream:
        connected, *missed = await stream.events(4)
        # The client's own cursor: nothing later has been given.
        assert (connected.type, connected.id) == ("connected", since)
        assert [(event.data["jobId"], event.data["version"]) for event in missed] == [("a", 2), ("b", 2), ("a", 3)]
        assert [event.id for event in missed] == [event.data["id"] for event in missed]
        put(server, "b", progress=1)
        assert (await stream.event()).data["version"] == 3


async def test_a_long_replay_is_whole(server: InProcess) -> None:
    put(server, "a")
    since = cursor(server)
    for _ in range(200):
        put(server, "a", message="x" * 500)
    async with event_stream(server, last_seen=since) as stream:
        await stream.event()
        events = await stream.events(200)
        assert versions([event.data for event in events], "a") == list(range(2, 202))
        put(server, "a")
        assert (await stream.event()).data["version"] == 202


async def test_the_header_wins_over_the_parameter(server: InProcess) -> None:
    put(server, "a")
    early = cursor(server)
    put(server, "a")
    put(server, "a")
    late = cursor(server)
    put(server, "a")
    async with event_stream(server, headers={"Last-Event-ID": late}, last_seen=early) as stream:
        connected, update = await stream.events(2)
        assert connected.id == late
        assert update.data["version"] == 4
    async with event_stream(server, headers={"Last-Event-ID": early}, last_seen=late) as stream:
        assert versions([event.data for event in await stream.events(4)], "a") == [2, 3, 4]


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("epochgone123:1", "epochgone123:1"),  # another log
        ("{epoch}:99", "{epoch}:99"),  # ahead of the log
        ("{epoch}:1", "{epoch}:1"),  # trimmed
        ("nonsense", None),  # nothing that could be an id of ours
        ("{epoch}:-1", None),
    ],
)
async def test_a_lost_cursor_is_answered_by_reset_and_snapshot(given: str, shown: str | None) -> None:
    async with clean_server(history={"max_updates": 3}) as server:
        for _ in range(10):
            put(server, "a")
        epoch = server.node.history.epoch
        given = given.format(epoch=epoch)
        async with event_stream(server, last_seen=given) as stream:
            connected, reset, snapshot = await stream.events(3)
            expected = shown and shown.format(epoch=epoch)
            assert (connected.type, connected.id) == ("connected", expected)
            assert (reset.type, reset.id) == ("reset", expected)
            assert (snapshot.type, snapshot.id) == ("snapshot", cursor(server))
            assert versions(snapshot.data["jobs"], "a") == [10]
        kept = f"{epoch}:7"  # the oldest cursor from which nothing is missing
        async with event_stream(server, last_seen=kept) as stream:
            assert versions([event.data for event in await stream.events(4)], "a") == [8, 9, 10]


@pytest.mark.parametrize("unit", [1, 1000])
async def test_a_unix_time_is_a_cursor_too(server: InProcess, unit: int) -> None:
    put(server, "old")
    # The log's time is milliseconds; in seconds, "since" is rounded down to before the first entry.
    since = int(time.time()) - 1 if unit == 1 else server.node.history.everything(0)[0].at_ms
    put(server, "new")
    async with event_stream(server, last_seen=since) as stream:
        connected, *events = await stream.events(3)
        assert connected.id is None  # a time is no cursor to repeat
        assert [event.data["jobId"] for event in events] == ["old", "new"]
    async with event_stream(server, last_seen=(int(time.time()) + 60) * unit) as stream:
        assert (await stream.event()).type == "connected"
        put(server, "newer")
        assert (await stream.event()).data["jobId"] == "newer"


async def test_a_large_snapshot_comes_in_parts_of_which_only_the_last_has_an_id(server: InProcess) -> None:
    for number in range(30):
        put(server, f"job{number}", metadata={"text": "x" * 30_000})
    async with event_stream(server) as stream:
        connected, *parts = [await stream.event()]
        while not parts or "more" in parts[-1].data:
            parts.append(await stream.event())
        assert connected.id is None
        assert len(parts) > 2
        assert all(part.type == "snapshot" and part.data["more"] is True and part.id is None for part in parts[:-1])
        assert parts[-1].id == cursor(server)
        assert [job["jobId"] for part in parts for job in part.data["jobs"]] == [f"job{n}" for n in range(30)]


async def test_one_event_is_in_one_send_and_a_batch_in_one(server: InProcess) -> None:
    async with event_stream(server) as stream:
        await stream.events(2)
        for _ in range(5):
            put(server, "a")  # without a checkpoint: one flush
        await stream.events(5)
        # ``Stream`` itself checks that every chunk holds whole events.
        assert stream.chunk_sizes == [1, 1, 5]


async def test_over_http_1_0_the_stream_is_ended_by_the_close(server: InProcess) -> None:
    put(server, "a", status="processing")
    async with connect(server) as http:
        target = b"/api/v2/jobs/stream?jobIds=a"
        await http.send(b"GET " + target + b" HTTP/1.0\r\nHost: localhost\r\n\r\n")
        status, headers = await http.head()
        assert status == 200
        assert "transfer-encoding" not in headers
        await until(lambda: server.node.streams)
        put(server, "a", status="completed")
        events = parse_events(await http.rest())
        assert [event.type for event in events] == ["connected", "snapshot", "job_completed"]


async def test_line_ends_in_what_a_worker_sends_do_not_end_an_event(server: InProcess) -> None:
    async with event_stream(server) as stream:
        await stream.events(2)
        body = b'{"userId":"u",\r\n"message":"a\\r\\nb\\n\\nc",\n"metadata":{"x":\n[1,\r\n2]},"result":\n"a\\u2028b"}'
        answer = await server.post("/api/v2/jobs/a/updates", body, {"Content-Type": "application/json"})
        assert answer.status == 200, answer
        event = await stream.event()
        assert event.data["message"] == "a\r\nb\n\nc"
        assert event.data["metadata"] == {"x": [1, 2]}
        assert event.data["result"] == "a\u2028b"


# What is watched


async def test_filters_apply_to_snapshot_replay_and_tail(server: InProcess) -> None:
    put(server, "a", kind="export", status="processing")
    put(server, "b", kind="import", status="processing")
    since = cursor(server)

    async def seen(**query: object) -> list[tuple[str, int]]:
        """From a resumed and from a fresh stream: everything they are shown."""
        async with event_stream(server, last_seen=since, **query) as replayed:
            await replayed.event()
            return [(e.data["jobId"], e.data["version"]) for e in await replayed.events(1)]

    async def record(**query: object) -> list[str]:
        async with event_stream(server, **query) as stream:
            return [job["jobId"] for job in (await stream.until("snapshot"))[-1].data["jobs"]]

    put(server, "a", progress=1)
    put(server, "b", progress=1)
    put(server, "b", status="failed")
    assert await seen(kind="import", types="status_update") == [("b", 2)]
    assert await seen(types="job_failed,job_completed") == [("b", 3)]
    assert await seen(status="failed") == [("b", 3)]
    assert await record(kind="export") == ["a"]
    assert await record(status="failed,queued") == ["b"]
    assert await record(types="status_update") == ["a"]
    assert await record(kind="other") == []
    async with event_stream(server, kind="export", status="completed") as stream:
        await stream.events(2)
        put(server, "c", kind="import", status="completed")
        put(server, "a", progress=50)
        put(server, "a", status="completed")
        event = await stream.event()
        assert (event.data["jobId"], event.data["version"], event.id) == ("a", 4, cursor(server))


async def test_fields_select_record_fields(server: InProcess) -> None:
    put(server, "a", progress=1, message="m", metadata={"x": 1})
    since = cursor(server)
    put(server, "a", progress=2)
    async with event_stream(server, fields="progress") as stream:
        (record,) = (await stream.events(2))[1].data["jobs"]
        assert record == {"jobId": "a", "status": "queued", "progress": 2, "version": 2}
        put(server, "a", progress=3)
        update = await stream.event()
        assert set(update.data) == {"type", "id", "jobId", "status", "progress", "version"}
    async with event_stream(server, fields="message,metadata", last_seen=since) as stream:
        update = (await stream.events(2))[1]
        assert update.data["metadata"] == {"x": 1}
        assert "progress" not in update.data


@pytest.mark.parametrize(
    "query",
    ["types=job_started", "status=done", "fields=secret", "jobIds=a,,b", "jobIds=a/b", "userId=", "all=maybe"],
)
async def test_a_wrong_parameter_is_400_and_named(server: InProcess, query: str) -> None:
    answer = await server.get(f"/api/v2/jobs/stream?{query}")
    assert (answer.status, answer.error) == (400, "invalid_parameter")
    assert query.partition("=")[0] in answer.json["error"]["message"]


async def test_a_thousand_jobs_may_be_named_and_no_more(server: InProcess) -> None:
    names = ",".join(f"j{number}" for number in range(1001))
    assert (await server.get(f"/api/v2/jobs/stream?jobIds={names}")).status == 400
    async with event_stream(server, jobIds=names.rpartition(",")[0]) as stream:
        await stream.events(2)
        put(server, "j999")
        assert (await stream.event()).data["jobId"] == "j999"


async def test_a_job_that_does_not_exist_yet_is_given_when_it_does(guarded: InProcess) -> None:
    async with event_stream(guarded, headers=ALICE, jobIds="later") as stream:
        assert (await stream.events(2))[1].data["jobs"] == []
        put(guarded, "later", user="alice")
        assert (await stream.event()).data["version"] == 1


async def test_foreign_jobs_are_silent(guarded: InProcess) -> None:
    put(guarded, "theirs", user="bob")
    async with (
        event_stream(guarded, headers=ALICE, jobIds="theirs,unknown,mine") as named,
        event_stream(guarded, headers=ALICE) as own,
        event_stream(guarded, headers=ADMIN) as everything,
        event_stream(guarded, headers=ADMIN, userId="bob") as bobs,
    ):
        assert (await named.events(2))[1].data["jobs"] == []
        assert (await own.events(2))[1].data["jobs"] == []
        assert len((await everything.events(2))[1].data["jobs"]) == 1
        assert len((await bobs.events(2))[1].data["jobs"]) == 1
        put(guarded, "theirs", user="bob", status="completed")
        put(guarded, "unknown", user="bob")
        put(guarded, "mine", user="alice")
        assert [(await stream.event()).data["jobId"] for stream in (named, own)] == ["mine", "mine"]
        assert [e.data["jobId"] for e in await everything.events(3)] == ["theirs", "unknown", "mine"]
        assert [e.data["jobId"] for e in await bobs.events(2)] == ["theirs", "unknown"]


async def test_another_users_jobs_are_for_admins(guarded: InProcess) -> None:
    for query in ("userId=bob", "all=1", "userId=bob&jobIds=x"):
        answer = await guarded.get(f"/api/v2/jobs/stream?{query}", ALICE)
        assert (answer.status, answer.error) == (403, "forbidden")
    assert (await guarded.get("/api/v2/jobs/stream")).status == 401
    async with event_stream(guarded, headers=ALICE, userId="alice") as stream:
        await stream.events(2)
        put(guarded, "mine")
        assert (await stream.event()).data["jobId"] == "mine"


async def test_delegated_jobs_are_readable_by_id(guarded: InProcess) -> None:
    put(guarded, "export-1", user="bob")
    put(guarded, "import-1", user="bob")
    headers = bearer("alice", jobs=["export-*"])
    async with event_stream(guarded, headers=headers, jobIds="export-1,import-1,export-2") as stream:
        assert [job["jobId"] for job in (await stream.events(2))[1].data["jobs"]] == ["export-1"]
        put(guarded, "import-1", user="bob", progress=1)
        put(guarded, "export-2", user="carol")
        assert (await stream.event()).data["jobId"] == "export-2"


async def test_an_id_that_comes_to_belong_to_another_falls_silent(guarded: InProcess) -> None:
    put(guarded, "x", user="alice")
    put(guarded, "y", user="alice")
    async with (
        event_stream(guarded, headers=ALICE, jobIds="x,y") as alice,
        event_stream(guarded, headers=BOB, jobIds="x,y") as bob,
    ):
        assert len((await alice.events(2))[1].data["jobs"]) == 2
        assert (await bob.events(2))[1].data["jobs"] == []
        remove(guarded, "x")
        assert (await alice.event()).type == "job_deleted"
        put(guarded, "x", user="bob", status="processing")
        put(guarded, "y", user="alice", status="processing")
        assert (await alice.event()).data["jobId"] == "y"
        event = await bob.event()
        assert (event.data["jobId"], event.data["version"]) == ("x", 1)
    # Nor is the replay of the former owner's time, or of the new one's, for the other.
    async with event_stream(guarded, headers=BOB, jobIds="x", last_seen=f"{guarded.node.history.epoch}:0") as stream:
        assert versions([event.data for event in await stream.events(2)], "x") == [1]
    async with event_stream(guarded, headers=ALICE, jobIds="x", last_seen=f"{guarded.node.history.epoch}:0") as stream:
        assert [event.type for event in await stream.events(3)] == ["connected", "status_update", "job_deleted"]


# The end


@pytest.mark.parametrize("names", [["a"], ["a", "b"], ["a", "b", "c"]])
async def test_the_stream_ends_after_the_last_named_job_ended(server: InProcess, names: list[str]) -> None:
    put(server, "a", status="processing")
    async with event_stream(server, jobIds=",".join(names)) as stream:
        await stream.events(2)
        for name in names:
            put(server, name, status="failed")
        events = await stream.rest()
        assert [event.data["jobId"] for event in events] == names
        await until(lambda: not traces(server))
    # A reconnect with that cursor has nothing to wait for; 204 stops EventSource.
    for headers in ({"Last-Event-ID": stream.last_id or ""}, {}):
        async with event_stream(server, jobIds=",".join(names), headers=headers, last_seen=stream.last_id) as again:
            assert again.status == 204
    # One without a cursor still gets the snapshot.
    async with event_stream(server, jobIds=",".join(names)) as again:
        events = await again.rest()
        assert [event.type for event in events] == ["connected", "snapshot"]
        assert len(events[1].data["jobs"]) == len(names)


async def test_endings_one_by_one_in_separate_flushes(server: InProcess) -> None:
    async with event_stream(server, jobIds="a,b") as stream:
        await stream.events(2)
        put(server, "a", status="completed")
        assert (await stream.event()).type == "job_completed"
        put(server, "b", progress=5)
        assert (await stream.event()).data["progress"] == 5
        put(server, "b", status="cancelled")
        assert [event.type for event in await stream.rest()] == ["job_cancelled"]


async def test_a_deletion_ends_a_stream_too(server: InProcess) -> None:
    put(server, "a")
    async with event_stream(server, jobIds="a") as stream:
        await stream.events(2)
        remove(server, "a")
        assert [event.type for event in await stream.rest()] == ["job_deleted"]
    async with event_stream(server, jobIds="a", last_seen=stream.last_id) as again:
        assert again.status == 204


async def test_a_filtered_ending_ends_the_stream_all_the_same(server: InProcess) -> None:
    put(server, "a")
    async with event_stream(server, jobIds="a", types="status_update") as stream:
        await stream.events(2)
        put(server, "a", status="completed")
        assert await stream.rest() == []
    async with event_stream(server, jobIds="a", types="status_update", last_seen=stream.last_id) as again:
        assert again.status == 204


async def test_a_reopened_job_keeps_the_stream_open(server: InProcess) -> None:
    async with event_stream(server, jobIds="a,b") as stream:
        await stream.events(2)
        put(server, "a", status="failed")
        put(server, "a", attempt=2, status="processing")
        put(server, "b", status="completed")
        assert [event.type for event in await stream.events(3)] == ["job_failed", "status_update", "job_completed"]
        put(server, "a", attempt=2, status="completed")
        assert [event.type for event in await stream.rest()] == ["job_completed"]


async def test_a_replay_that_contains_the_end_ends_the_stream(server: InProcess) -> None:
    put(server, "a")
    since = cursor(server)
    put(server, "a", status="completed")
    async with event_stream(server, jobIds="a", last_seen=since) as stream:
        events = await stream.rest()
        assert [event.type for event in events] == ["connected", "job_completed"]


async def test_without_names_a_stream_does_not_end(server: InProcess) -> None:
    async with event_stream(server, last_seen=cursor(server)) as stream:
        put(server, "a", status="completed")
        assert [event.type for event in await stream.events(2)] == ["connected", "job_completed"]
        put(server, "b")
        assert (await stream.event()).data["jobId"] == "b"


# Heartbeats, health, tokens


async def test_heartbeats_carry_the_cursor_of_a_quiet_reader() -> None:
    async with clean_server(server={"heartbeat": 0.05}) as server:
        put(server, "a")
        async with event_stream(server, jobIds="quiet") as stream:
            assert (await stream.event()).data["heartbeat"] == 0.05
            await stream.event()
            put(server, "a")
            put(server, "a")
            event = await stream.event()
            while event.id != cursor(server):
                event = await stream.event()
            assert event.type == "heartbeat"
            assert set(event.data) == {"type", "timestamp"}
            assert event.retry is None
            last = stream.last_id
        # Resumed from there nothing comes again.
        async with event_stream(server, jobIds="quiet,a", last_seen=last) as stream:
            assert (await stream.event()).type == "connected"
            assert (await stream.event()).type == "heartbeat"


async def test_a_reader_that_takes_nothing_becomes_stale_and_is_closed() -> None:
    async with (
        clean_server(server={"heartbeat": 0.03}, health=NO_PATIENCE) as server,
        event_stream(server, receive_buffer=1) as stream,
    ):
        await stream.events(2)
        narrow(server)
        for _ in range(40):
            put(server, "a", metadata={"text": "x" * 10_000})
        # It is there, its socket is open, and its kernel acknowledges nothing.
        await until(lambda: not server.node.streams)


async def test_acknowledging_is_sign_of_life_enough() -> None:
    async with clean_server(server={"heartbeat": 0.02}, health=NO_PATIENCE) as server, event_stream(server) as stream:
        await stream.events(2)
        (reader,) = server.node.streams
        begun = trio.current_time()
        while trio.current_time() - begun < 0.02 * (live.STALE_HEARTBEATS + 2):
            assert (await stream.event()).type == "heartbeat"
        assert reader in server.node.streams


async def test_an_expired_token_ends_the_stream_with_an_error(guarded: InProcess) -> None:
    put(guarded, "a")
    headers = bearer("alice", exp=in_seconds(0.2))
    async with event_stream(guarded, headers=headers) as stream:
        await stream.events(2)
        (error,) = await stream.rest()
        assert (error.type, error.data["code"], error.id) == ("error", "token_expired", cursor(guarded))


# Going away, limits


def assert_turned_away(stream: Stream) -> None:
    assert stream.status == 200
    assert stream.headers["content-type"] == "text/event-stream"
    assert stream.headers["cache-control"] == "no-cache, no-transform"


async def test_a_drain_ends_streams_with_a_spread_retry(server: InProcess) -> None:
    delays = []
    put(server, "a")
    async with event_stream(server) as one, event_stream(server) as two, event_stream(server) as three:
        for stream in (one, two, three):
            await stream.events(2)
        await drain(server.node, 0)
        for stream in (one, two, three):
            (error,) = await stream.rest()
            assert (error.type, error.data["code"], error.id) == ("error", "try_later", cursor(server))
            assert error.retry is not None
            delays.append(error.retry)
        assert len(set(delays)) > 1
        assert all(500 <= delay <= 3000 for delay in delays)
        # A new one is told the same way, if it says that it is an event source; its retry is spread, too.
        async with event_stream(server, headers=EVENT_SOURCE) as late:
            assert_turned_away(late)
            (error,) = await late.rest()
            assert (error.type, error.data["code"]) == ("error", "try_later")
            assert error.retry is not None
        answer = await server.get("/api/v2/jobs/stream")
        assert (answer.status, answer.error) == (503, "try_later")
        assert int(answer.headers["retry-after"]) >= 1


async def test_too_many_connections_of_a_user_are_told_to_try_later() -> None:
    async with clean_server(auth=AUTH, limits={"connections_per_user": 1}) as server:
        async with event_stream(server, headers=ALICE) as first:
            await first.events(2)
            async with event_stream(server, headers=ALICE | EVENT_SOURCE) as second:
                assert_turned_away(second)
                (error,) = await second.rest()
                assert error.data["code"] == "try_later"
            assert (await server.get("/api/v2/jobs/stream", ALICE)).status == 429
            async with event_stream(server, headers=BOB) as other:
                assert other.status == 200
        await until(lambda: not server.node.streams)
        async with event_stream(server, headers=ALICE) as again:
            await again.events(2)


async def test_too_many_sockets_are_told_to_try_later() -> None:
    async with clean_server(server={"max_connections": 1}) as server, event_stream(server) as first:
        await first.events(2)
        async with event_stream(server, headers=EVENT_SOURCE) as second:
            assert_turned_away(second)
            (error,) = await second.rest()
            assert error.data["code"] == "try_later"
        assert (await server.get("/api/v2/jobs/stream")).status == 503


# Slow and vanishing readers


async def test_a_reader_that_never_reads_is_bounded_and_disturbs_nobody() -> None:
    backlog = 256 * 1024
    async with (
        clean_server(limits={"backlog": backlog}) as server,
        event_stream(server, receive_buffer=1) as never,
        event_stream(server) as other,
    ):
        await never.event()
        await other.events(2)
        narrow(server)
        for number in range(1, 300):
            put(server, f"job{number % 50}", progress=number / 3, metadata={"text": "x" * 1000})
            if number % 20 == 0:
                assert (await other.events(20))[-1].data["jobId"] == f"job{number % 50}"
        held = [reader.held_bytes for reader in server.node.streams]  # type: ignore[attr-defined]
        assert 0 < max(held) <= backlog
        assert min(held) == 0
        # Every job once, the newest: 50 records of about 1.3 KB.
        slow = max(server.node.streams, key=lambda reader: reader.held_bytes)  # type: ignore[attr-defined]
        assert slow.conflating  # type: ignore[attr-defined]
        assert len(slow.held) <= 50  # type: ignore[attr-defined]


async def test_a_slow_reader_misses_steps_but_no_end_and_catches_up() -> None:
    async with (
        clean_server(limits={"backlog": 100_000}) as server,
        event_stream(server, receive_buffer=1) as stream,
    ):
        await stream.events(2)
        narrow(server)
        (reader,) = server.node.streams
        text = {"text": "x" * 2000}
        for number in range(200):
            put(server, "busy", progress=number / 2, metadata=text)
            await wait_all_tasks_blocked()
        for number in range(5):
            put(server, f"ended{number}", status="completed")
            put(server, f"ended{number}", attempt=2)
        put(server, "busy", status="completed")
        await until(lambda: reader.conflating)  # type: ignore[attr-defined]
        data = [event.data for event in await stream.updates("busy", 201)]
        seen = versions(data, "busy")
        assert seen == sorted(set(seen))
        assert len(seen) < 200
        assert seen[-1] == 201
        for number in range(5):
            assert [d["type"] for d in data if d["jobId"] == f"ended{number}"] == ["job_completed", "status_update"]
        # Offsets go up: its cursor at any moment is where it stands.
        offsets = [int(d["id"].partition(":")[2]) for d in data]
        assert offsets == sorted(set(offsets))
        await until(lambda: reader.direct)  # type: ignore[attr-defined]
        for number in range(5):
            put(server, "after", progress=number)
        assert versions([e.data for e in await stream.events(5)], "after") == [1, 2, 3, 4, 5]


async def test_past_the_bound_the_stream_breaks_and_its_cursor_resumes() -> None:
    async with clean_server(limits={"backlog": 20_000}) as server:
        async with event_stream(server, receive_buffer=1) as stream:
            await stream.events(2)
            narrow(server)
            given = []
            for number in range(200):
                put(server, f"job{number}", metadata={"text": "x" * 2000})
                if number < 20:
                    given.append((await stream.event()).data["jobId"])
                await wait_all_tasks_blocked()  # one flush each
            await until(lambda: not server.node.streams)
            with suppress(Ended):
                while True:
                    given.append((await stream.event()).data["jobId"])
            assert 20 <= len(given) < 200
        async with event_stream(server, last_seen=stream.last_id) as again:
            await again.event()
            rest = [event.data["jobId"] for event in await again.events(200 - len(given))]
            assert given + rest == [f"job{number}" for number in range(200)]


async def test_a_reader_stalls_in_a_large_snapshot_and_gets_the_rest_and_the_tail_later(server: InProcess) -> None:
    for number in range(12):
        put(server, f"job{number}", metadata={"text": "x" * 60_000})
    async with event_stream(server, receive_buffer=1) as stream, event_stream(server, jobIds="job0") as other:
        await stream.event()
        narrow(server)
        await other.events(2)
        for number in range(12):
            put(server, f"job{number}", status="processing")
        assert (await other.event()).data["version"] == 2
        parts = [await stream.event()]
        while "more" in parts[-1].data:
            parts.append(await stream.event())
        jobs = [job for part in parts for job in part.data["jobs"]]
        # The snapshot is as of the moment it began, the updates since follow.
        assert [(job["jobId"], job["version"]) for job in jobs] == [(f"job{n}", 1) for n in range(12)]
        events = await stream.events(12)
        assert [(e.data["jobId"], e.data["version"]) for e in events] == [(f"job{n}", 2) for n in range(12)]


async def test_a_connection_that_breaks_at_any_moment_leaves_nothing(server: InProcess) -> None:
    for number in range(20):
        put(server, f"job{number}", metadata={"text": "x" * 50_000})

    async def break_off(after: int, buffer: int | None) -> None:
        async with event_stream(server, receive_buffer=buffer) as stream:
            await stream.events(after)
            put(server, "job0", progress=after)
            reset_connection(stream.http)

    for buffer in (None, 1):
        for after in range(4):
            await break_off(after, buffer)
    put(server, "job0")  # into closed sockets
    await until(lambda: not traces(server))


async def test_a_client_that_talks_is_heard_out_and_cut_off(server: InProcess) -> None:
    async with event_stream(server) as stream:
        await stream.events(2)
        await stream.http.send(b"hello?\r\n" * 100)
        put(server, "a")
        assert (await stream.event()).data["jobId"] == "a"
        with suppress(trio.BrokenResourceError):
            while True:
                await stream.http.stream.send_all(b"x" * 65536)
        await until(lambda: not server.node.streams)


async def test_pipelined_bytes_after_the_request_do_not_spoil_the_stream(server: InProcess) -> None:
    async with connect(server) as http:
        request = request_bytes("GET", "/api/v2/jobs/stream")
        await http.send(request + request)
        stream = Stream(http, *await http.head())
        assert [event.type for event in await stream.events(2)] == ["connected", "snapshot"]
        put(server, "a")
        assert (await stream.event()).data["jobId"] == "a"


# A lost log


async def test_a_lost_log_is_answered_by_reset_and_snapshot(server: InProcess) -> None:
    put(server, "a", status="processing")
    for _ in range(5):
        put(server, "a")
    async with event_stream(server) as stream, event_stream(server, jobIds="a,b") as named:
        await stream.events(2)
        await named.events(2)
        before = stream.last_id
        put(server, "a")  # pending when the log is lost: the snapshot has it
        lose_log(server)
        for reader in (stream, named):
            reset, snapshot = await reader.events(2)
            assert (reset.type, reset.id) == ("reset", None)
            assert (snapshot.type, snapshot.id) == ("snapshot", cursor(server))
            assert versions(snapshot.data["jobs"], "a") == [7]
        server.node.broker._offset = server.node.broker._kept_offset = 0  # type: ignore[attr-defined]
        put(server, "a", progress=50)
        for reader in (stream, named):
            event = await reader.event()
            assert (event.data["version"], event.id) == (8, cursor(server))
        put(server, "a", status="completed")
        put(server, "b", status="completed")
        assert len(await named.rest()) == 2
    async with event_stream(server, last_seen=before) as again:
        assert [event.type for event in await again.events(3)] == ["connected", "reset", "snapshot"]


async def test_head_and_post_are_not_for_streams(server: InProcess) -> None:
    for method in ("HEAD", "POST"):
        answer = await server.ask(method, "/api/v2/jobs/stream")
        assert answer.status == 405
        assert "GET" in answer.headers["allow"]


async def test_a_stream_is_no_websocket(server: InProcess) -> None:
    with pytest.raises(AssertionError, match="200"):
        async with websocket(server, "/api/v2/jobs/stream"):
            pass
