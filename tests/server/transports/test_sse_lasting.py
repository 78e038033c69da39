"""Event streams as they last: heartbeats, tokens that end, drains, limits, slow and vanishing readers."""

from __future__ import annotations

from contextlib import suppress

import trio
from trio.testing import wait_all_tasks_blocked

from server.app import drain
from server.transports import live
from tests.streams import (
    EVENT_SOURCE,
    NO_PATIENCE,
    Stream,
    clean_server,
    cursor,
    event_stream,
    narrow,
    put,
    reset_connection,
    running_out,
    traces,
    versions,
)
from tests.support import ALICE, AUTH, BOB, Ended, InProcess, bearer, until

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
    with running_out() as exp:
        async with event_stream(guarded, headers=bearer("alice", exp=exp)) as stream:
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
