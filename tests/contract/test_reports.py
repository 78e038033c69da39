"""Report status over every store: each request, message and field of the view, on a real server."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.pacing import for_a_while
from tests.streams import SseEvent, Stream, clean_server, parse_events, running_out, stream_at
from tests.support import ADMIN, ALICE, AUTH, BOB, WORKER, Answer, InProcess, bearer

PROJECT = "/api/projects/p1"
STATUS = f"{PROJECT}/initial-report-status"
NOT_STARTED = {"projectId": "p1", "reportExists": False, "status": "not_started", "progress": 0}


async def register(at: InProcess, project: str = "p1", user: str = "alice", headers: Any = ()) -> Answer:
    answer = await at.ask("PUT", f"/api/projects/{project}", {"userId": user}, headers)
    assert answer.status in (200, 201), answer
    return answer


async def publish(at: InProcess, headers: Any = (), **fields: object) -> Answer:
    answer = await at.post(STATUS, fields, headers)
    assert answer.status == 200, answer
    return answer


async def status(at: InProcess, headers: Any = ()) -> dict[str, Any]:
    """The report's state; its time is checked and left out."""
    answer = await at.get(STATUS, headers)
    assert answer.status == 200, answer
    return without_time(answer.json)


def without_time(state: dict[str, Any]) -> dict[str, Any]:
    assert datetime.fromisoformat(state["timestamp"])
    assert state["timestamp"].endswith("Z")
    return {name: value for name, value in state.items() if name not in ("timestamp", "estimatedCompletionTime")}


@asynccontextmanager
async def watching(at: InProcess, headers: Any = ()) -> AsyncIterator[Stream]:
    async with stream_at(at, f"{STATUS}/stream", headers=headers) as stream:
        assert stream.status == 200, stream.headers
        assert stream.headers["content-type"] == "text/event-stream"
        yield stream


async def state_of(stream: Stream) -> SseEvent:
    """The next event that a page's ``onmessage`` gets; all others have names."""
    while (event := await stream.event()).name is not None:
        assert event.name == event.type
    return event


async def test_a_report_from_its_registration_to_its_end(at: InProcess) -> None:
    answer = await at.get(STATUS)
    assert (answer.status, answer.error) == (404, "project_not_found")
    assert "'p1'" in answer.json["error"]["message"]
    registered = await register(at)
    assert (registered.status, registered.headers["location"]) == (201, PROJECT)
    assert without_time(registered.json["project"]) == NOT_STARTED
    assert await status(at) == NOT_STARTED
    async with watching(at) as stream:
        connected = await stream.event()
        assert (connected.name, connected.data["projectId"], connected.id) == ("connected", "p1", None)
        assert connected.retry is not None
        first = await state_of(stream)
        assert without_time(first.data) == NOT_STARTED
        assert first.id == registered.json["id"]
        for phase, fields, progress in (
            ("validation", {"message": "Checking the project"}, 5),
            ("snapshot_capture", {}, 10),
            (
                "snapshot_capture",
                {"competitorSnapshotsStatus": {"captured": 1, "total": 4, "current": "a.eu"}},
                20,
            ),
            ("snapshot_capture", {"competitorSnapshotsStatus": {"captured": 4}}, 50),
            ("data_collection", {"dataFreshness": "mixed"}, 55),
            ("analysis", {"dataCompletenessScore": 87}, 75),
            ("report_generation", {"reportId": "r-9"}, 90),
        ):
            answer = await publish(at, phase=phase, **fields)
            event = await state_of(stream)
            assert event.id == answer.json["id"]
            assert (event.data["status"], event.data["phase"]) == ("generating", phase)
            assert event.data["progress"] == progress, event.data
            assert event.data["reportExists"] is True
        await publish(at, phase="completed", message="Done")
        (last,) = await stream.rest()
    done = {
        "projectId": "p1", "reportExists": True, "reportId": "r-9", "status": "completed", "phase": "completed",
        "progress": 100, "message": "Done", "dataCompletenessScore": 87, "generatedAt": last.data["generatedAt"],
        "competitorSnapshotsStatus": {"captured": 4, "total": 4, "current": "a.eu"}, "dataFreshness": "mixed",
    }  # fmt: skip
    assert without_time(last.data) == done
    assert await status(at) == done
    assert datetime.fromisoformat(done["generatedAt"])
    again = await at.get(f"{STATUS}/stream", {"Last-Event-ID": str(last.id), "Accept": "text/event-stream"})
    assert (again.status, again.body) == (204, b"")


async def test_registering_is_idempotent_and_the_owner_fixed(at: InProcess) -> None:
    first = await register(at)
    again = await register(at)
    assert (first.status, again.status) == (201, 200)
    assert again.json["duplicate"] is True
    assert again.json["project"] == first.json["project"]
    other = await at.ask("PUT", PROJECT, {"userId": "bob"})
    assert (other.status, other.error) == (409, "owner_fixed")
    await publish(at, phase="analysis")
    assert (await register(at)).json["project"]["phase"] == "analysis"  # nothing was taken back
    assert (await at.ask("PUT", "/api/projects/p2")).json["project"]["projectId"] == "p2"  # the caller's own
    await at.publish("report:p3", userId="alice", kind="something-else")
    taken = await at.ask("PUT", "/api/projects/p3", {"userId": "alice"})
    assert (taken.status, taken.error) == (409, "job_exists")
    assert (await at.get("/api/projects/p3/initial-report-status")).status == 404


async def test_many_register_at_once_and_one_makes_it(at: InProcess) -> None:
    statuses: list[int] = []

    async def ask() -> None:
        statuses.append((await register(at)).status)

    async with trio.open_nursery() as nursery:
        for _ in range(8):
            nursery.start_soon(ask)
    assert sorted(statuses) == [200] * 7 + [201]


async def test_what_is_left_out_stays_whoever_publishes_at_the_same_time(at: InProcess) -> None:
    await register(at)
    details = {
        "dataFreshness": "new", "dataCompletenessScore": 55.5, "reportId": "r", "queuePosition": 3,
        "generatedAt": "2025-01-31T13:00:00+01:00",
    }  # fmt: skip

    async def send(**fields: object) -> None:
        await publish(at, **fields)

    async with trio.open_nursery() as nursery:
        for name, value in details.items():
            nursery.start_soon(lambda fields: send(**fields), {name: value})
        nursery.start_soon(lambda: send(competitorSnapshotsStatus={"total": 3}))
        nursery.start_soon(lambda: send(competitorSnapshotsStatus={"captured": 2}))
        nursery.start_soon(lambda: send(competitorSnapshotsStatus={"capturedAt": "2025-01-31T12:00:00Z"}))
    state = await status(at)
    assert state == {
        "projectId": "p1", "reportExists": True, "status": "not_started", "progress": 0, **details,
        "generatedAt": "2025-01-31T12:00:00.000Z",
        "competitorSnapshotsStatus": {"captured": 2, "total": 3, "capturedAt": "2025-01-31T12:00:00.000Z"},
    }  # fmt: skip
    await publish(at, dataFreshness=None, phase="validation", competitorSnapshotsStatus=None)
    state = await status(at)
    assert not {"dataFreshness", "competitorSnapshotsStatus", "queuePosition"} & set(state)  # no queue any more
    assert state["reportId"] == "r"


async def test_progress_follows_from_the_phase_unless_it_is_given(at: InProcess) -> None:
    await register(at)
    await publish(at, phase="snapshot_capture", competitorSnapshotsStatus={"captured": 0, "total": 0})
    assert (await status(at))["progress"] == 10
    await publish(at, competitorSnapshotsStatus={"captured": 1, "total": 3})
    assert (await status(at))["progress"] == pytest.approx(10 + 40 / 3)
    record = (await at.get("/api/v2/jobs/report:p1")).json
    assert (record["kind"], record["stage"], record["steps"]) == (
        "initial-report", "snapshot_capture", {"done": 1, "total": 3},
    )  # fmt: skip
    await publish(at, phase="data_collection", progress=61)
    assert (await status(at))["progress"] == 61
    await publish(at, competitorSnapshotsStatus={"captured": 2})
    assert (await status(at))["progress"] == 61  # capturing is over
    await publish(at, phase="validation")
    assert (await status(at))["progress"] == 61  # never back, but for another attempt
    await publish(at, status="failed", error="no\nroom")
    state = await status(at)
    assert (state["status"], state["error"], state["progress"]) == ("failed", "no", 61)
    late = await at.post(STATUS, {"phase": "analysis"})
    assert (late.status, late.error) == (409, "job_ended")
    await publish(at, attempt=2, phase="snapshot_capture")
    state = await status(at)
    assert (state["status"], state["progress"]) == ("generating", 10)
    assert not {"error", "competitorSnapshotsStatus"} & set(state)  # another report
    await publish(at, status="completed")
    assert (await status(at))["phase"] == "completed"


async def test_how_many_are_captured_may_stand_beside_the_phase(at: InProcess) -> None:
    await register(at)
    await publish(at, phase="snapshot_capture", captured=1, total=4)
    state = await status(at)
    assert (state["progress"], state["competitorSnapshotsStatus"]) == (20, {"captured": 1, "total": 4})
    await publish(at, captured=2, competitorSnapshotsStatus={"current": "acme"})
    state = await status(at)
    assert state["progress"] == 30
    assert state["competitorSnapshotsStatus"] == {"captured": 2, "total": 4, "current": "acme"}


async def test_the_time_of_completion_is_45_s_at_first_then_what_progress_tells(at: InProcess) -> None:
    await register(at)
    assert "estimatedCompletionTime" not in (await at.get(STATUS)).json
    await publish(at, phase="validation")
    state = (await at.get(STATUS)).json
    began = datetime.fromisoformat((await at.get("/api/v2/jobs/report:p1")).json["startedAt"])
    assert datetime.fromisoformat(state["estimatedCompletionTime"]) - began == timedelta(seconds=45)
    assert state["estimatedCompletionTime"].endswith("Z")
    await for_a_while(0.1)  # progress in no time tells nothing
    await publish(at, phase="data_collection")
    told = (await at.get("/api/v2/jobs/report:p1")).json["estimatedCompletionTime"]
    assert (await at.get(STATUS)).json["estimatedCompletionTime"] == told
    given = "2031-01-01T00:00:00.000Z"
    await publish(at, estimatedCompletionTime=given)
    assert (await at.get(STATUS)).json["estimatedCompletionTime"] == given
    await publish(at, phase="completed")
    assert "estimatedCompletionTime" not in (await at.get(STATUS)).json


async def test_workers_of_jobs_are_read_as_reports(at: InProcess) -> None:
    await at.publish(
        "report:p1", userId="alice", kind="initial-report", status="processing", stage="snapshot_capture",
        steps={"done": 1, "total": 2, "current": "b"}, progress=30,
    )  # fmt: skip
    state = await status(at)
    assert (state["status"], state["phase"], state["progress"]) == ("generating", "snapshot_capture", 30)
    assert state["competitorSnapshotsStatus"] == {"captured": 1, "total": 2, "current": "b"}
    async with watching(at) as stream:
        await at.publish("report:p1", ttl=0.1)
        while not (shown := (await state_of(stream)).data).get("stalled"):
            assert (shown["status"], shown["phase"]) == ("generating", "snapshot_capture")
        assert shown["status"] == "generating"
    # Soon it is lost, and stays so until somebody tries again.
    state = await status(at)
    assert (state["status"], state.get("stalled"), state.get("error")) in (
        ("generating", True, "no update for 0.1 s"), ("failed", None, "lost"),
    )  # fmt: skip
    await at.publish("report:p1", attempt=2, status="cancelled")
    state = await status(at)
    assert (state["status"], state["error"]) == ("failed", "cancelled")


async def test_bad_fields_are_named(at: InProcess) -> None:
    answer = await at.post(STATUS, {"phase": "validation"})
    assert (answer.status, answer.error) == (404, "project_not_found")
    await register(at)
    for fields, name in (
        ({"phase": "lunch"}, "phase"),
        ({"phase": {}}, "phase"),
        ({"status": "processing"}, "status"),
        ({"stage": "validation"}, "stage"),
        ({"dataFreshness": "old"}, "dataFreshness"),
        ({"dataCompletenessScore": 101}, "dataCompletenessScore"),
        ({"dataCompletenessScore": "x"}, "dataCompletenessScore"),
        ({"generatedAt": "yesterday"}, "generatedAt"),
        ({"queuePosition": -1}, "queuePosition"),
        ({"reportId": 5}, "reportId"),
        ({"competitorSnapshotsStatus": 5}, "competitorSnapshotsStatus"),
        ({"competitorSnapshotsStatus": {"captured": -1}}, "competitorSnapshotsStatus.captured"),
        ({"competitorSnapshotsStatus": {"capture": 1}}, "competitorSnapshotsStatus.capture"),
        ({"captured": -1}, "competitorSnapshotsStatus.captured"),
        ({"captured": 1, "competitorSnapshotsStatus": 5}, "competitorSnapshotsStatus"),
        ({"metadata": {}}, "metadata"),
    ):
        answer = await at.post(STATUS, fields)
        assert answer.status == 422, (fields, answer)
        assert answer.json["error"]["field"] == name, (fields, answer)
        assert answer.json["error"]["message"].startswith(f"{name}:"), answer
    for project in ("a%20b", "x" * 122):
        answer = await at.get(f"/api/projects/{project}/initial-report-status")
        assert (answer.status, answer.error) == (400, "invalid_parameter")
        assert answer.json["error"]["field"] == "projectId"
    assert await status(at) == NOT_STARTED
    created = await at.post("/api/projects/p4/initial-report-status", {"userId": "bob", "phase": "validation"})
    assert (created.status, created.json["version"]) == (200, 1)


async def test_projects_are_their_owners(guarded: InProcess) -> None:
    at = guarded
    assert (await at.get(STATUS)).status == 401
    for method, target in (("PUT", PROJECT), ("POST", STATUS)):
        answer = await at.ask(method, target, {"userId": "alice"}, ALICE)
        assert (answer.status, answer.error) == (403, "forbidden")
    await register(at, headers=WORKER)
    again = await register(at, headers=WORKER)
    assert (again.status, again.json["project"]) == (200, None)  # to publish is not to read
    await publish(at, WORKER, phase="validation")
    for headers in (ALICE, ADMIN, bearer("bob", jobs=["report:p1"])):
        assert (await status(at, headers))["phase"] == "validation"
    for headers in (BOB, WORKER):
        for target in (STATUS, f"{STATUS}/stream"):
            foreign, nothing = await at.get(target, headers), await at.get(target.replace("p1", "p9"), headers)
            assert foreign.status == nothing.status == 404
            assert foreign.error == nothing.error == "project_not_found"
            assert foreign.json["error"]["message"].replace("p1", "p9") == nothing.json["error"]["message"]
    async with watching(at, ALICE) as stream:
        assert (await state_of(stream)).data["phase"] == "validation"
        await publish(at, WORKER, phase="analysis")
        assert (await state_of(stream)).data["phase"] == "analysis"
        await at.ask("DELETE", "/api/v2/jobs/report:p1", headers=WORKER)
        gone = (await stream.rest())[-1]
        assert (gone.name, gone.data["code"]) == ("error", "project_not_found")


async def test_a_token_that_expires_ends_the_stream() -> None:
    async with clean_server(auth=AUTH) as at:
        await register(at, headers=WORKER)
        with running_out() as exp:
            async with watching(at, bearer("alice", exp=exp)) as stream:
                error = (await stream.rest())[-1]
        assert (error.name, error.data["code"], error.data["projectId"]) == ("error", "token_expired", "p1")


async def test_resuming_gives_what_was_missed(at: InProcess) -> None:
    cursor = (await register(at)).json["id"]
    for phase in ("validation", "analysis"):
        await publish(at, phase=phase)
    async with watching(at, {"Last-Event-ID": cursor}) as stream:
        assert (await stream.event()).id == cursor
        assert [event.data["phase"] for event in await stream.events(2)] == ["validation", "analysis"]


@pytest.mark.slow
async def test_two_nodes_at_once_lose_nothing_of_each_other(redis_url: str) -> None:
    """What is left out stays, although each node decides on what it knew; and whatever it was is seen at both."""
    store = {"url": redis_url}
    details = {
        "dataFreshness": "new", "dataCompletenessScore": 55, "reportId": "r", "queuePosition": 3,
        "generatedAt": "2025-01-31T12:00:00.000Z", "message": "m", "phase": "snapshot_capture",
    }  # fmt: skip
    async with clean_server(store=store) as one, clean_server(store=store) as two:
        statuses: list[int] = []

        async def put(at: InProcess) -> None:
            statuses.append((await register(at)).status)

        async def post(at: InProcess, fields: dict[str, object]) -> None:
            await publish(at, **fields)

        async with trio.open_nursery() as nursery:
            for at in (one, two) * 4:
                nursery.start_soon(put, at)
        assert sorted(statuses) == [200] * 7 + [201]
        async with watching(one) as here, watching(two) as there:
            async with trio.open_nursery() as nursery:
                for round_ in range(1, 6):
                    for index, (name, value) in enumerate(details.items()):
                        nursery.start_soon(post, (one, two)[(index + round_) % 2], {name: value})
                    snapshots = {"captured": round_} if round_ % 2 else {"total": 5}
                    nursery.start_soon(post, (one, two)[round_ // 2 % 2], {"competitorSnapshotsStatus": snapshots})
            states = [await status(at) for at in (one, two)]
            expected = details | {"projectId": "p1", "reportExists": True, "status": "generating"}
            del expected["queuePosition"]
            for state in states:
                captured = state.pop("competitorSnapshotsStatus")
                assert (captured["captured"] in (1, 3, 5), captured["total"]) == (True, 5)
                assert 10 <= state.pop("progress") <= 50
                assert state == expected
            last = (await one.get("/api/v2/jobs/report:p1")).json["version"]
            assert last == 1 + 5 * (len(details) + 1)
            # Each stream had every one of them once, in the same order.
            seen = [[(await state_of(stream)).id for _ in range(last)] for stream in (here, there)]
            assert seen[0] == seen[1]
            assert len(set(seen[0])) == last


async def test_a_project_is_known_after_a_restart(tmp_path: Path) -> None:
    store = {"url": f"sqlite:{tmp_path / 'store.db'}"}
    async with clean_server(store=store) as at:
        await register(at)
        cursor = (await publish(at, phase="validation", dataFreshness="new")).json["id"]
    async with clean_server(store=store) as at:
        assert (await status(at))["dataFreshness"] == "new"
        assert (await register(at)).status == 200
        async with watching(at, {"Last-Event-ID": cursor}) as stream:
            assert (await stream.event()).type == "connected"
            await publish(at, phase="analysis")
            assert (await stream.event()).data["phase"] == "analysis"


async def test_an_idempotency_key_makes_it_once(at: InProcess) -> None:
    await register(at)
    key = {"Idempotency-Key": "k"}
    body = {"dataFreshness": "new", "phase": "validation"}
    first = (await at.post(STATUS, body, key)).json
    assert (await at.post(STATUS, body, key)).json == first | {"duplicate": True}
    other = await at.post(STATUS, body | {"dataFreshness": "mixed"}, key)
    assert (other.status, other.error) == (422, "idempotency_key_reused")


async def test_base_path_methods_and_heartbeats() -> None:
    async with clean_server(server={"base_path": "/sw", "heartbeat": 0.2}) as at:
        assert (await at.ask("PUT", f"/sw{PROJECT}", {})).status == 201
        for target, allowed in (
            (PROJECT, "PUT, OPTIONS"), (STATUS, "GET, POST, HEAD, OPTIONS"), (f"{STATUS}/stream", "GET, OPTIONS"),
        ):  # fmt: skip
            answer = await at.ask("DELETE", f"/sw{target}")
            assert (answer.status, answer.headers["allow"]) == (405, allowed)
        head = await at.ask("HEAD", f"/sw{STATUS}")
        assert (head.status, head.body) == (200, b"")
        async with stream_at(at, f"/sw{STATUS}/stream") as stream:
            assert (await state_of(stream)).data["projectId"] == "p1"
            beat = await stream.event()
            assert (beat.name, beat.type, beat.data["projectId"]) == ("heartbeat", "heartbeat", "p1")
            assert beat.id is not None


async def test_who_is_turned_away_is_told_in_the_words_of_reports() -> None:
    async with clean_server(limits={"connections_per_user": 1}) as at:
        await register(at)
        async with watching(at) as stream:
            await stream.event()
            answer = await at.get(f"{STATUS}/stream", {"Accept": "text/event-stream"})
            (later,) = parse_events(answer.body)
            assert (later.name, later.data["code"], later.data["projectId"]) == ("error", "try_later", "p1")
