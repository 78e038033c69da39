"""Task progress over every store: each request, message and field of the view, on a real server."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from tests.streams import EVENT_SOURCE, Stream, clean_server, event_stream, parse_events, running_out, stream_at
from tests.support import (
    ADMIN,
    ALICE,
    AUTH,
    BOB,
    WORKER,
    Answer,
    InProcess,
    bearer,
    request_bytes,
    until_answered,
)

BASE = "/api/brand-monitor/progress"


async def create(at: InProcess, task: str = "t1", headers: Any = (), **fields: object) -> Answer:
    answer = await at.post(f"{BASE}/{task}", {"userId": "alice"} | fields, headers)
    assert answer.status == 201, answer
    return answer


async def patch(at: InProcess, task: str = "t1", headers: Any = (), **fields: object) -> Answer:
    answer = await at.ask("PATCH", f"{BASE}/{task}", fields, headers)
    assert answer.status == 200, answer
    return answer


@asynccontextmanager
async def watching(at: InProcess, task: str = "t1", headers: Any = (), base: str = BASE) -> AsyncIterator[Stream]:
    async with stream_at(at, f"{base}/{task}", headers=headers) as stream:
        assert stream.status == 200, stream.headers
        assert stream.headers["content-type"] == "text/event-stream"
        yield stream


def is_now(timestamp: object) -> bool:
    """Unix milliseconds, of about now."""
    return isinstance(timestamp, int) and abs(timestamp - time.time() * 1000) < 60_000


# Reading


async def test_a_task_from_its_creation_to_its_end(at: InProcess) -> None:
    created = await create(at, stage="starting", message="Looking", progress=1)
    assert created.headers["location"] == f"{BASE}/t1"
    assert created.json["task"] == {
        "taskId": "t1", "status": "pending", "stage": "starting", "progress": 1, "message": "Looking",
    }  # fmt: skip
    assert created.json["version"] == 1
    async with watching(at) as stream:
        connected, state = await stream.events(2)
        assert connected.data == {"type": "connected", "taskId": "t1", "timestamp": connected.data["timestamp"]}
        assert is_now(connected.data["timestamp"])
        assert (connected.name, connected.id) == (None, None)
        assert connected.retry is not None
        assert state.data == {
            "type": "progress", "taskId": "t1", "progress": created.json["task"],
            "timestamp": state.data["timestamp"],
        }  # fmt: skip
        assert is_now(state.data["timestamp"])
        assert state.id == created.json["id"]
        patched = await patch(at, status="running", stage="pages", progress=45, message="Page 9")
        assert patched.json == {"id": patched.json["id"], "version": 2}
        event = await stream.event()
        assert event.id == patched.json["id"]
        assert event.data["progress"] == {
            "taskId": "t1", "status": "running", "stage": "pages", "progress": 45, "message": "Page 9",
        }  # fmt: skip
        await patch(at, estimatedTimeRemaining=30)
        assert (await stream.event()).data["progress"]["estimatedTimeRemaining"] == 30
        done = await at.post(f"{BASE}/t1/complete", {"results": {"pages": 12}})
        assert (done.status, done.json["version"]) == (200, 4)
        (last,) = await stream.rest()
        assert last.data["progress"] == {
            "taskId": "t1", "status": "completed", "stage": "pages", "progress": 100, "message": "Page 9",
            "results": {"pages": 12},
        }  # fmt: skip
    # What EventSource does then: it comes back with the cursor, and stays away after 204.
    again = await at.get(f"{BASE}/t1", {"Last-Event-ID": done.json["id"]} | EVENT_SOURCE)
    assert (again.status, again.body) == (204, b"")


async def test_a_failed_task_is_told_as_progress_and_as_an_error(at: InProcess) -> None:
    first = await create(at, status="running")
    async with watching(at) as stream:
        await stream.until("progress")
        failed = await at.post(f"{BASE}/t1/fail", {"error": "no\nfile /srv/x.py, line 3"})
        assert failed.status == 200
        progress, error = await stream.rest()
        assert progress.data["progress"]["status"] == "failed"
        assert progress.data["progress"]["error"] == "no"
        assert error.data == {
            "type": "error", "taskId": "t1", "message": "no", "timestamp": progress.data["timestamp"],
        }  # fmt: skip
        # Whoever got but the first of the two gets both again.
        assert (progress.id, error.id) == (first.json["id"], failed.json["id"])
    async with watching(at, headers={"Last-Event-ID": progress.id}) as stream:
        assert [event.type for event in await stream.rest()] == ["connected", "progress", "error"]
    async with watching(at) as stream:  # without a cursor the state comes, and the end
        assert [event.type for event in await stream.rest()] == ["connected", "progress", "error"]


async def test_a_task_that_does_not_exist_yet_is_waited_for(at: InProcess) -> None:
    async with watching(at) as stream:
        assert (await stream.event()).type == "connected"
        await at.post(f"{BASE}/t2", {"userId": "alice"})
        await create(at, stage="now")
        event = await stream.event()
        assert (event.type, event.data["progress"]["stage"]) == ("progress", "now")


async def test_the_cursor_is_the_same_as_everywhere(at: InProcess) -> None:
    await create(at)
    async with event_stream(at, jobIds="t1") as jobs:
        cursor = (await jobs.until("snapshot"))[-1].id
    await patch(at, progress=10)
    await patch(at, progress=20)
    async with watching(at, headers={"Last-Event-ID": str(cursor)}) as stream:
        connected, *progress = await stream.events(3)
        assert connected.id == cursor
        assert [event.data["progress"]["progress"] for event in progress] == [10, 20]
    async with stream_at(at, f"{BASE}/t1?last_seen={cursor}") as stream:
        assert [event.type for event in await stream.events(3)] == ["connected", "progress", "progress"]
    async with watching(at, headers={"Last-Event-ID": "zzz:99"}) as stream:
        connected, state = await stream.events(2)  # lost: the state is all there is to be told
        assert state.data["progress"]["progress"] == 20


async def test_stalled_and_cancelled_in_the_words_of_tasks(at: InProcess) -> None:
    await create(at, status="running", progress=30)
    async with watching(at) as stream:
        await stream.until("progress")
        await at.publish("t1", ttl=0.2)
        assert "stalled" not in (await stream.event()).data["progress"]
        stalled = (await stream.event()).data["progress"]
        assert (stalled["status"], stalled["stalled"], stalled["progress"]) == ("running", True, 30)
    await create(at, "t2", status="running")
    async with watching(at, "t2") as stream:
        await stream.until("progress")
        await at.publish("t2", status="cancelled", error="by hand")
        progress, error = await stream.rest()
        assert (progress.data["progress"]["status"], progress.data["progress"]["error"]) == ("failed", "cancelled")
        assert error.data["message"] == "cancelled"


async def test_a_deleted_task_ends_the_stream_with_an_error(at: InProcess) -> None:
    await create(at)
    async with watching(at) as stream:
        await stream.until("progress")
        assert (await at.ask("DELETE", "/api/v2/jobs/t1")).status == 204
        (gone,) = await stream.rest()
        assert (gone.type, gone.data["message"]) == ("error", "the task was deleted")


async def test_head_says_it_in_headers(at: InProcess) -> None:
    await create(at, status="running", progress=45.5, stage="Seite für Seite 50%\r\nX-Evil: 1")
    answer = await at.ask("HEAD", f"{BASE}/t1")
    assert (answer.status, answer.body) == (200, b"")
    assert answer.headers["x-task-status"] == "running"
    assert answer.headers["x-task-progress"] == "45.5"
    assert answer.headers["x-task-stage"] == "Seite f%C3%BCr Seite 50%25%0D%0AX-Evil: 1"
    assert "x-evil" not in answer.headers
    assert (await at.ask("HEAD", f"{BASE}/t9")).status == 404


async def test_under_another_app_it_does_not_exist(at: InProcess) -> None:
    await create(at)
    other = "/api/other/progress"
    assert (await at.ask("HEAD", f"{other}/t1")).status == 404
    for method, target in (("PATCH", f"{other}/t1"), ("POST", f"{other}/t1/complete"), ("POST", f"{other}/t1/fail")):
        answer = await at.ask(method, target, {})
        assert (answer.status, answer.error) == (404, "task_not_found"), target
    # One id space all the same.
    answer = await at.post(f"{other}/t1", {})
    assert (answer.status, answer.error) == (409, "job_exists")
    async with watching(at, base=other) as stream:
        assert (await stream.event()).type == "connected"
        await patch(at, progress=50)
        await at.post(f"{BASE}/t1/complete", {})
        # Not even the end shows; and another task of that app is in its place once it exists.
        await at.ask("DELETE", "/api/v2/jobs/t1")
        await at.post(f"{other}/t1", {"stage": "mine"})
        assert (await stream.event()).data["progress"]["stage"] == "mine"


# Publishing


async def test_publishing_has_the_words_of_tasks(at: InProcess) -> None:
    await create(at, results={"a": 1}, error=None, metadata={"m": 1}, workerId="w", taskId="t1")
    assert (await at.get("/api/v2/jobs/t1")).json["result"] == {"a": 1}
    for fields, name, text in (
        ({"status": "processing"}, "status", "pending, running, completed, failed"),
        ({"status": 3}, "status", "must be one of"),
        ({"result": 1}, "result", "did you mean results?"),
        ({"kind": "x"}, "kind", "no such field"),
        ({"taskId": "t2"}, "taskId", "of the path"),
        ({"progress": 101}, "progress", "<= 100"),
        ({"results": "x" * 70_000}, "results", "65536"),
    ):
        answer = await at.ask("PATCH", f"{BASE}/t1", fields)
        assert answer.status == 422, (fields, answer)
        error = answer.json["error"]
        assert error["field"] == name, error
        assert text in error["message"], error
        assert error["message"].startswith(f"{name}:"), error
    for body, status, code in (
        (b"{", 400, "malformed_json"),
        *((b'{"%b":"\xff"}' % name, 400, "malformed_json") for name in (b"message", b"status", b"taskId", b"\xff")),
        (b"[]", 422, "invalid_update"),
        (b'{"message":"' + b"x" * 140_000 + b'"}', 413, "payload_too_large"),
    ):
        answer = await at.ask("PATCH", f"{BASE}/t1", body, {"Content-Type": "application/json"})
        assert (answer.status, answer.error) == (status, code)
    answer = await at.ask("PATCH", f"{BASE}/t1", b"{}", {"Content-Type": "text/plain"})
    assert (answer.status, answer.error) == (415, "unsupported_media_type")
    assert (await at.ask("PATCH", f"{BASE}/t1")).status == 411
    assert (await at.get("/api/v2/jobs/t1")).json["version"] == 1


async def test_the_rules_of_jobs_hold(at: InProcess) -> None:
    for method, target in (("PATCH", ""), ("POST", "/complete"), ("POST", "/fail")):
        answer = await at.ask(method, f"{BASE}/t1{target}", {"userId": "alice"})
        assert (answer.status, answer.error) == (404, "task_not_found")
        assert "'t1'" in answer.json["error"]["message"]
    await create(at, status="running", progress=50, seq=1)
    answer = await at.post(f"{BASE}/t1", {})
    assert (answer.status, answer.error) == (409, "job_exists")
    assert answer.json["error"]["field"] == "taskId"
    assert (await patch(at, progress=60, seq=1)).json["duplicate"] is True
    answer = await at.ask("PATCH", f"{BASE}/t1", {"userId": "bob"})
    assert (answer.status, answer.error) == (409, "owner_fixed")
    answer = await at.ask("PATCH", f"{BASE}/t1", {"status": "pending"})
    assert (answer.status, answer.error) == (409, "bad_transition")
    await at.post("/api/v2/jobs/t1/cancel", {})
    assert (await patch(at, progress=70)).json["cancelRequested"] is True
    assert (await at.ask("POST", f"{BASE}/t1/complete")).status == 200  # the body may be left out
    answer = await at.post(f"{BASE}/t1/fail", {"error": "late"})
    assert (answer.status, answer.error) == (409, "job_ended")
    assert (await patch(at, attempt=2, progress=5)).status == 200
    await create(at, "t2")
    assert (await at.ask("POST", f"{BASE}/t2/fail")).status == 200
    async with watching(at, "t2") as stream:
        assert (await stream.rest())[1].data["progress"]["error"] == "the task failed"


async def test_an_idempotency_key_makes_it_once(at: InProcess) -> None:
    key = {"Idempotency-Key": "k1"}
    first = await at.post(f"{BASE}/t1", {"userId": "alice"}, key)
    again = await at.post(f"{BASE}/t1", {"userId": "alice"}, key)
    assert (first.status, again.status) == (201, 200)
    assert again.json == first.json | {"duplicate": True}
    ends = [await at.post(f"{BASE}/t1/complete", {"results": 1}, {"Idempotency-Key": "k2"}) for _ in range(2)]
    assert [end.json.get("duplicate") for end in ends] == [None, True]
    reused = await at.post(f"{BASE}/t1/fail", {"error": "x"}, {"Idempotency-Key": "k2"})
    assert (reused.status, reused.error) == (422, "idempotency_key_reused")
    assert (await patch_with_event_id(at)).json.get("duplicate") is None


async def patch_with_event_id(at: InProcess) -> Answer:
    await create(at, "t3")
    assert (await patch(at, "t3", eventId="e1", progress=1)).json["version"] == 2
    assert (await patch(at, "t3", eventId="e1", progress=1)).json["duplicate"] is True
    return await patch(at, "t3", eventId="e2", progress=2)


async def test_ids_are_checked(at: InProcess) -> None:
    for target in (f"{BASE}/a%20b", f"{BASE}/{'x' * 129}", "/api/a%20b/progress/t1", f"{BASE}/%3Cscript%3E"):
        for method in ("GET", "POST", "PATCH"):
            answer = await at.ask(method, target, None if method == "GET" else {})
            assert (answer.status, answer.error) == (400, "invalid_parameter"), target
            assert "is not an id" in answer.json["error"]["message"]


async def test_errors_are_one_harmless_line(at: InProcess) -> None:
    trace = 'Traceback (most recent call last):\n  File "/srv/app.py", line 3, in run\nValueError: bad <b>\x1b[31mpage'
    await create(at, status="running")
    await at.post(f"{BASE}/t1/fail", {"error": trace})
    raw = await at.get(f"{BASE}/t1")
    assert b"<" not in raw.body
    assert b"/srv" not in raw.body
    error = parse_events(raw.body)[-1]
    assert error.data["message"] == "ValueError: bad <b> [31mpage"
    await create(at, "t2", status="running")
    await at.post(f"{BASE}/t2/fail", {"error": "x" * 2000})
    assert len(parse_events((await at.get(f"{BASE}/t2")).body)[-1].data["message"]) == 500


# Who may


async def test_owners_foreigners_admins_and_publishers(guarded: InProcess) -> None:
    at = guarded
    assert (await at.ask("HEAD", f"{BASE}/t1")).status == 401
    for method in ("POST", "PATCH"):
        answer = await at.ask(method, f"{BASE}/t1", {}, ALICE)
        assert (answer.status, answer.error) == (403, "forbidden")
    await create(at, headers=WORKER)
    assert (await at.ask("HEAD", f"{BASE}/t1", headers=ALICE)).status == 200
    assert (await at.ask("HEAD", f"{BASE}/t1", headers=ADMIN)).status == 200
    assert (await at.ask("HEAD", f"{BASE}/t1", headers=bearer("bob", jobs=["t*"]))).status == 200
    foreign = await at.ask("HEAD", f"{BASE}/t1", headers=BOB)
    nothing = await at.ask("HEAD", f"{BASE}/t9", headers=BOB)
    assert foreign.status == nothing.status == 404
    assert (await at.ask("HEAD", f"{BASE}/t1", headers=WORKER)).status == 404  # to publish is not to read
    async with watching(at, headers=BOB) as bob, watching(at, headers=ALICE) as alice:
        await bob.event()
        await alice.until("progress")
        await patch(at, headers=WORKER, progress=5)
        assert (await alice.event()).data["progress"]["progress"] == 5
        await at.ask("DELETE", "/api/v2/jobs/t1", headers=WORKER)
        assert (await at.post(f"{BASE}/t1", {"userId": "bob"}, WORKER)).status == 201
        event = await bob.event()
        assert event.data["progress"]["progress"] == 0  # the first that bob hears of it is his own


async def test_a_token_that_expires_ends_the_stream_with_an_error() -> None:
    with running_out() as exp:
        async with clean_server(auth=AUTH) as at, watching(at, headers=bearer("alice", exp=exp)) as stream:
            error = (await stream.rest())[-1]
        assert (error.type, error.data["code"], error.data["taskId"]) == ("error", "token_expired", "t1")


async def test_health_says_more_to_those_who_operate(guarded: InProcess) -> None:
    at = guarded
    await until_answered(at, "/ready", 200)
    for headers in ((), ALICE, WORKER):
        answer = await at.get("/api/brand-monitor/health", headers)
        assert (answer.status, answer.json) == (200, {"status": "healthy"})
    for headers in (ADMIN, bearer("carol", capabilities=["ops"])):
        stats = (await at.get("/api/brand-monitor/health", headers)).json
        assert stats["status"] == "healthy"
        assert {
            "totalConnections", "activeConnections", "byTransport", "connectionHealth", "averageConnectionTime",
            "connectionErrors", "messagesDelivered", "deliveryLatencyMs", "broker",
        } <= set(stats)  # fmt: skip
    assert (await at.get("/api/brand-monitor/health", {"Authorization": "Bearer x"})).status == 401


# The rest of HTTP


async def test_base_path_methods_and_cors() -> None:
    page = "https://app.example"
    async with clean_server(server={"base_path": "/sw"}, auth=AUTH, cors={"origins": [page]}) as at:
        target = f"/sw{BASE}/t1"
        created = await at.post(target, {"userId": "alice"}, WORKER)
        assert (created.status, created.headers["location"]) == (201, target)
        assert (await at.get(f"{BASE}/t1", ALICE)).status == 404
        for path, allowed in ((target, "GET, HEAD, POST, PATCH, OPTIONS"), (f"{target}/complete", "POST, OPTIONS")):
            answer = await at.ask("DELETE", path, headers=ADMIN)
            assert (answer.status, answer.headers["allow"]) == (405, allowed)
        preflight = {"Origin": page, "Access-Control-Request-Method": "PATCH"}
        answer = await at.ask("OPTIONS", target, headers=preflight)
        assert answer.status == 204
        assert "PATCH" in answer.headers["access-control-allow-methods"]
        assert answer.headers["access-control-allow-origin"] == page
        answer = await at.ask("HEAD", target, headers={"Origin": page} | ALICE)
        assert "x-task-status" in answer.headers["access-control-expose-headers"]
        foreign = await at.ask("PATCH", target, {}, {"Origin": "https://evil.example"} | WORKER)
        assert (foreign.status, foreign.error) == (403, "origin_not_allowed")


async def test_heartbeats_move_the_cursor() -> None:
    async with clean_server(server={"heartbeat": 0.2}) as at:
        await create(at)
        async with watching(at) as stream:
            await stream.until("progress")
            beat = await stream.event()
            assert beat.data == {"type": "heartbeat", "taskId": "t1", "timestamp": beat.data["timestamp"]}
            assert is_now(beat.data["timestamp"])
            elsewhere = (await at.post(f"{BASE}/t2", {})).json["id"]
            while (await stream.event()).id != elsewhere:
                pass


async def test_who_is_turned_away_is_told_in_the_words_of_tasks() -> None:
    async with clean_server(limits={"connections_per_user": 1}) as at, watching(at) as stream:
        await stream.event()
        (later,) = parse_events((await at.get(f"{BASE}/t1", EVENT_SOURCE)).body)
        assert (later.type, later.data["code"], later.data["taskId"]) == ("error", "try_later", "t1")
        assert later.retry is not None
        assert is_now(later.data["timestamp"])
        answer = await at.get(f"{BASE}/t1")
        assert (answer.status, answer.error) == (429, "rate_limited")
        assert "retry-after" in answer.headers


async def test_progress_may_be_looked_at_in_intervals() -> None:
    async with clean_server(views={"progress_interval": 60.0}) as at:
        await create(at, status="running")
        async with watching(at) as stream:
            await stream.until("progress")
            for progress in range(10):
                await patch(at, progress=progress)
            await at.post(f"{BASE}/t1/complete", {"results": "all"})
            shown = [event.data["progress"]["progress"] for event in await stream.rest()]
            assert shown[-1] == 100  # an end is never held back
            assert len(shown) <= 3


async def test_a_pipelined_request_after_a_stream_is_not_answered(at: InProcess) -> None:
    async with at.connect() as http:
        await http.send(request_bytes("GET", f"{BASE}/t1") + request_bytes("GET", "/health"))
        status, headers = await http.head()
        assert (status, headers["connection"]) == (200, "close")
        await create(at)
        await at.post(f"{BASE}/t1/complete", {"results": 1})
        rest = await http.rest()
        assert b'"completed"' in rest
        assert b"HTTP/1.1" not in rest
