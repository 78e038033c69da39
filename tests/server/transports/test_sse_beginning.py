"""Event streams as they begin: a snapshot or a replay, then every update; and anew when a log was lost."""

from __future__ import annotations

import time
from typing import Any

import pytest
import trio

from server.transports import sse
from tests.streams import (
    Stream,
    clean_server,
    connect,
    cursor,
    event_stream,
    lose_log,
    parse_events,
    put,
    remove,
    versions,
    websocket,
)
from tests.support import InProcess, request_bytes, until

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


async def test_pipelined_bytes_after_the_request_do_not_spoil_the_stream(server: InProcess) -> None:
    async with connect(server) as http:
        request = request_bytes("GET", "/api/v2/jobs/stream")
        await http.send(request + request)
        stream = Stream(http, *await http.head())
        assert [event.type for event in await stream.events(2)] == ["connected", "snapshot"]
        put(server, "a")
        assert (await stream.event()).data["jobId"] == "a"


async def test_head_and_post_are_not_for_streams(server: InProcess) -> None:
    for method in ("HEAD", "POST"):
        answer = await server.ask(method, "/api/v2/jobs/stream")
        assert answer.status == 405
        assert "GET" in answer.headers["allow"]


async def test_a_stream_is_no_websocket(server: InProcess) -> None:
    with pytest.raises(AssertionError, match="200"):
        async with websocket(server, "/api/v2/jobs/stream"):
            pass


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
