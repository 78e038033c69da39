"""What an event stream shows, to whom, and when it has nothing more to show."""

from __future__ import annotations

import pytest

from tests.streams import cursor, event_stream, put, remove, traces, versions
from tests.support import ADMIN, ALICE, BOB, InProcess, bearer, until

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
