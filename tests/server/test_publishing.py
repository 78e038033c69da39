"""Publishing over HTTP, against a real server: a new job, one update, deletion, cancellation, rates."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from protocol.fields import MAX_UPDATE
from tests.server.updates import JOBS, NDJSON, UPDATES, lines, offset, record
from tests.support import ADMIN, AUTH, WORKER, bearer, server

# --- a new job ----------------------------------------------------------------------------------------------------


async def test_create_answers_201_with_the_record_and_its_place() -> None:
    async with server() as at:
        answer = await at.post(JOBS, {"jobId": "j1", "userId": "alice", "kind": "export", "metadata": {"a": [1]}})
        assert answer.status == 201
        assert set(answer.json) == {"job", "id"}
        job = answer.json["job"]
        assert job == await record(at, "j1")
        assert (job["status"], job["progress"], job["version"], job["attempt"]) == ("queued", 0, 1, 1)
        assert job["metadata"] == {"a": [1]}
        assert "message" not in job, "absent optional fields are omitted"
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", job["createdAt"])
        assert answer.headers["location"] == f"{JOBS}/j1"
        assert (await at.get(answer.headers["location"])).status == 200


@pytest.mark.parametrize(("tables", "headers", "owner"), [({}, {}, "anonymous"), ({"auth": AUTH}, WORKER, "worker")])
async def test_create_makes_an_id_and_takes_the_caller_for_the_owner(
    tables: dict[str, Any], headers: dict[str, str], owner: str
) -> None:
    async with server(**tables) as at:
        first = (await at.post(JOBS, {}, headers)).json["job"]
        second = (await at.post(JOBS, {}, headers)).json["job"]
        assert first["userId"] == owner
        assert first["jobId"] != second["jobId"]


async def test_create_refuses_a_taken_id() -> None:
    async with server() as at:
        await at.post(JOBS, {"jobId": "j1", "message": "first"})
        answer = await at.post(JOBS, {"jobId": "j1", "message": "second"})
        assert (answer.status, answer.error) == (409, "job_exists")
        assert (await record(at, "j1"))["message"] == "first"


async def test_a_repeated_create_is_200_and_the_same_job() -> None:
    async with server() as at:
        body = {"kind": "export"}
        first = await at.post(JOBS, body, {"Idempotency-Key": "k1"})
        again = await at.post(JOBS, body, {"Idempotency-Key": "k1"})
        assert (first.status, again.status) == (201, 200)
        assert again.json == {"job": first.json["job"], "id": first.json["id"], "version": 1, "duplicate": True}
        other = await at.post(JOBS, {"kind": "import"}, {"Idempotency-Key": "k1"})
        assert (other.status, other.error) == (422, "idempotency_key_reused")
        assert len((await at.get(JOBS)).json["jobs"]) == 1


async def test_a_repeated_create_shows_nothing_of_a_foreign_job() -> None:
    async with server(auth=AUTH) as at:
        await at.post(JOBS, {"jobId": "j1", "userId": "alice", "seq": 5, "message": "secret"}, WORKER)
        nosy = bearer("nosy", capabilities=["publish"])
        answer = await at.post(JOBS, {"jobId": "j1", "seq": 0}, nosy)
        assert (answer.status, answer.json["duplicate"]) == (200, True)
        assert answer.json["job"] == {"jobId": "j1", "status": "queued", "version": 1}
        own = await at.post(JOBS, {"jobId": "j1", "seq": 0}, bearer("alice", capabilities=["publish"]))
        assert own.json["job"]["message"] == "secret"


# --- one update ---------------------------------------------------------------------------------------------------


async def test_an_update_answers_with_its_place_and_version() -> None:
    async with server() as at:
        first = await at.publish("j1", userId="alice")
        second = await at.publish("j1", status="processing", progress=12.5)
        assert set(second.json) == {"id", "version"}
        assert (first.json["version"], second.json["version"]) == (1, 2)
        assert offset(second) == offset(first) + 1
        job = await record(at, "j1")
        assert (job["userId"], job["status"], job["progress"], job["version"]) == ("alice", "processing", 12.5, 2)


async def test_an_update_of_an_unknown_job_needs_an_owner() -> None:
    async with server() as at:
        answer = await at.post(f"{JOBS}/j1/updates", {"progress": 1})
        assert (answer.status, answer.error) == (404, "job_not_found")
        assert (await at.get(f"{JOBS}/j1")).status == 404


async def test_the_ids_of_path_and_body_must_agree() -> None:
    async with server() as at:
        answer = await at.post(f"{JOBS}/j1/updates", {"jobId": "j2", "userId": "alice"})
        assert (answer.status, answer.json["error"]["field"]) == (422, "jobId")
        assert (await at.post(f"{JOBS}/j1/updates", {"jobId": "j1", "userId": "alice"})).status == 200


async def test_a_repeated_seq_changes_nothing() -> None:
    async with server() as at:
        await at.publish("j1", userId="alice", seq=7, message="one")
        again = await at.publish("j1", seq=7, message="two")
        assert again.json["duplicate"] is True
        assert ((await record(at, "j1"))["message"], again.json["version"]) == ("one", 1)
        await at.publish("j1", seq=8, status="completed")
        late = await at.publish("j1", seq=8, status="completed")
        assert late.json["duplicate"] is True, "a repeat wins over job_ended"


@pytest.mark.parametrize("way", ["header", "eventId"])
async def test_an_idempotency_key_gives_the_first_answer_again(way: str) -> None:
    async with server(auth=AUTH) as at:
        key: dict[str, str] = {"Idempotency-Key": "k"} if way == "header" else {}
        event: dict[str, Any] = {"eventId": "k"} if way == "eventId" else {}
        await at.publish("j1", WORKER, userId="alice")
        first = await at.publish("j1", WORKER | key, message="m", **event)
        await at.publish("j1", WORKER, status="completed")
        again = await at.publish("j1", WORKER | key, message="m", **event)
        assert again.json == first.json | {"duplicate": True}
        other = bearer("other", capabilities=["publish"])
        refused = await at.post(f"{JOBS}/j1/updates", {"message": "m", **event}, other | key)
        assert refused.error == "job_ended", "keys are scoped to the publisher"


@pytest.mark.parametrize("key", ["", "k" * 256, "schl\u00fcssel"])
async def test_an_unfit_idempotency_key_is_refused(key: str) -> None:
    async with server() as at:
        answer = await at.post(JOBS, {"jobId": "j1"}, {"Idempotency-Key": key})
        assert (answer.status, answer.error) == (400, "invalid_header")
        assert (await at.get(f"{JOBS}/j1")).status == 404


async def test_conflicts_change_nothing() -> None:
    async with server() as at:
        await at.publish("j1", userId="alice", status="processing", attempt=2)
        for body, code in (
            ({"attempt": 1}, "stale_attempt"),
            ({"status": "queued"}, "bad_transition"),
            ({"userId": "bob"}, "owner_fixed"),
        ):
            answer = await at.post(f"{JOBS}/j1/updates", body)
            assert (answer.status, answer.error) == (409, code)
        await at.publish("j1", status="failed", error="e")
        answer = await at.post(f"{JOBS}/j1/updates", {"progress": 5})
        assert (answer.status, answer.error) == (409, "job_ended")
        assert (await record(at, "j1"))["version"] == 2
        await at.publish("j1", attempt=3)
        reopened = await record(at, "j1")
        assert (reopened["status"], reopened["attempt"], "error" in reopened) == ("processing", 3, False)


@pytest.mark.parametrize(
    ("body", "status", "code", "field"),
    [
        (b"{", 400, "malformed_json", None),
        (b"", 400, "malformed_json", None),
        (b'{"procress":', 400, "malformed_json", None),
        (b'{"status":"done",}', 400, "malformed_json", None),
        (b'[{"status":', 400, "malformed_json", None),
        (b'{"message":"\xff"}', 400, "malformed_json", None),
        (b'{"metadata":' + b'{"a":' * 3000 + b"1" + b"}" * 3001, 400, "malformed_json", None),
        (b"[]", 422, "invalid_update", None),
        (b'{"progress":101}', 422, "invalid_field", "progress"),
        (b'{"progress":"50"}', 422, "invalid_field", "progress"),
        (b'{"status":"done"}', 422, "invalid_field", "status"),
        (b'{"userId":"a b"}', 422, "invalid_field", "userId"),
        (b'{"message":"' + b"x" * 2049 + b'"}', 422, "invalid_field", "message"),
        (b'{"result":"' + b"x" * 65536 + b'"}', 422, "invalid_field", "result"),
        (b'{"procress":1}', 422, "unknown_field", "procress"),
        (b'{"version":1}', 422, "unknown_field", "version"),
        (b'{"parentId":"nobody"}', 404, "parent_not_found", None),
    ],
    ids=lambda value: repr(value)[:24] if isinstance(value, bytes) else None,
)
async def test_bad_bodies_are_refused_by_name(body: bytes, status: int, code: str, field: str | None) -> None:
    async with server() as at:
        for target in (JOBS, f"{JOBS}/j1/updates"):
            if code == "parent_not_found":
                body = b'{"userId":"alice","parentId":"nobody"}'
            answer = await at.ask("POST", target, body, {"Content-Type": "application/json"})
            assert (answer.status, answer.error) == (status, code), answer
            assert answer.json["error"].get("field") == field
            if field is not None:
                assert field in answer.json["error"]["message"]
        assert (await at.get(JOBS)).json["jobs"] == []


@pytest.mark.parametrize("target", [f"{JOBS}/a%20b/updates", f"{JOBS}/{'x' * 129}/updates"])
async def test_a_malformed_id_in_the_path_is_400(target: str) -> None:
    async with server() as at:
        answer = await at.post(target, {"userId": "alice"})
        assert (answer.status, answer.json["error"]["field"]) == (400, "jobId")


async def test_an_update_may_have_128_kib_and_no_more() -> None:
    async with server() as at:
        # As whitespace: what counts is what came.
        fits = b'{"userId":"alice"}'.ljust(MAX_UPDATE)
        assert (await at.ask("POST", f"{JOBS}/j1/updates", fits)).status == 200
        async with at.connect() as http:
            answer = await http.request("POST", f"{JOBS}/j1/updates", body=fits + b" ")
            assert (answer.status, answer.error) == (413, "payload_too_large")
            assert answer.headers["connection"] == "close"
            assert await http.closed()
        assert (await record(at, "j1"))["version"] == 1


@pytest.mark.parametrize(
    ("content_type", "status"),
    [
        (None, 200),
        ("application/json", 200),
        ("Application/JSON; charset=utf-8", 200),
        ("text/plain", 415),
        ("application/x-www-form-urlencoded", 415),
        ("application/x-ndjson", 415),
    ],
)
async def test_the_content_type_of_an_update(content_type: str | None, status: int) -> None:
    async with server() as at:
        headers = {} if content_type is None else {"Content-Type": content_type}
        answer = await at.ask("POST", f"{JOBS}/j1/updates", b'{"userId":"alice"}', headers)
        assert answer.status == status
        if status == 415:
            assert answer.error == "unsupported_media_type"


async def test_a_compressed_body_is_415_and_says_what_is_taken() -> None:
    async with server() as at:
        for target in (JOBS, UPDATES):
            answer = await at.ask("POST", target, b"\x1f\x8b", {"Content-Encoding": "gzip"})
            assert (answer.status, answer.error) == (415, "unsupported_media_type")
            assert answer.headers["accept-encoding"] == "identity"
        assert (await at.ask("POST", JOBS, b"{}", {"Content-Encoding": "identity"})).status == 201


# --- deletion and cancellation ------------------------------------------------------------------------------------


async def test_a_deleted_job_is_gone_and_its_id_is_free() -> None:
    async with server() as at:
        first = await at.publish("j1", userId="alice", message="old")
        answer = await at.ask("DELETE", f"{JOBS}/j1")
        assert (answer.status, answer.body) == (204, b"")
        assert "content-length" not in answer.headers
        for target in (f"{JOBS}/j1", f"{JOBS}/j1/history"):
            assert (await at.get(target)).error == "job_not_found"
        assert (await at.ask("DELETE", f"{JOBS}/j1")).error == "job_not_found"
        await at.publish("j1", userId="bob")
        job = await record(at, "j1")
        assert (job["version"], job["userId"], "message" in job) == (1, "bob", False)
        history = (await at.get(f"{JOBS}/j1/history")).json["updates"]
        assert [update["version"] for update in history] == [1]
        assert offset(first) == 1


async def test_cancel_is_recorded_and_reaches_the_worker_with_its_next_answer() -> None:
    async with server(auth=AUTH) as at:
        await at.publish("j1", WORKER, userId="alice", status="processing")
        answer = await at.ask("POST", f"{JOBS}/j1/cancel", headers=bearer("alice"))
        assert answer.status == 202
        assert set(answer.json) == {"job"}
        assert (answer.json["job"]["cancelRequested"], answer.json["job"]["version"]) == (True, 2)
        update = await at.publish("j1", WORKER, progress=10)
        assert update.json["cancelRequested"] is True
        batch = await at.post(UPDATES, [{"jobId": "j1", "progress": 11}], WORKER)
        assert batch.json["cancelRequested"] == ["j1"]
        again = await at.ask("POST", f"{JOBS}/j1/cancel", headers=ADMIN)
        assert (again.status, again.json["job"]["version"]) == (202, 4)
        await at.publish("j1", WORKER, status="cancelled")
        ended = await at.ask("POST", f"{JOBS}/j1/cancel", headers=ADMIN)
        assert (ended.status, ended.error) == (409, "job_ended")


async def test_only_owner_and_admin_may_cancel() -> None:
    async with server(auth=AUTH) as at:
        await at.publish("j1", WORKER, userId="alice")
        for headers, status, code in (
            (bearer("bob"), 404, "job_not_found"),
            (WORKER, 404, "job_not_found"),
            (bearer("bob", jobs=["j*"]), 403, "forbidden"),
        ):
            answer = await at.ask("POST", f"{JOBS}/j1/cancel", headers=headers)
            assert (answer.status, answer.error) == (status, code)
        assert (await record(at, "j1"))["version"] == 1
        unknown = await at.ask("POST", f"{JOBS}/none/cancel", headers=ADMIN)
        assert (unknown.status, unknown.error) == (404, "job_not_found")


# --- rates --------------------------------------------------------------------------------------------------------


async def test_publishes_over_the_rate_are_429_and_change_nothing() -> None:
    async with server(auth=AUTH, limits={"publishes_per_second": 0.01}) as at:
        await at.publish("j1", WORKER, userId="alice")
        calls: list[tuple[str, str, Any, dict[str, str]]] = [
            ("POST", JOBS, {"jobId": "j2"}, {}),
            ("POST", f"{JOBS}/j1/updates", {"progress": 1}, {}),
            ("POST", UPDATES, [{"jobId": "j1", "progress": 1}], {}),
            ("POST", UPDATES, lines({"jobId": "j1", "progress": 1}), NDJSON),
            ("DELETE", f"{JOBS}/j1", None, {}),
        ]
        for method, target, body, headers in calls:
            answer = await at.ask(method, target, body, WORKER | headers)
            assert (answer.status, answer.error) == (429, "rate_limited"), target
            assert 1 <= int(answer.headers["retry-after"]) <= 100
        assert (await record(at, "j1"))["version"] == 1
        assert (await at.post(JOBS, {"jobId": "j2"}, bearer("other", capabilities=["publish"]))).status == 201


# --- the store ----------------------------------------------------------------------------------------------------


async def test_sqlite_answers_the_same_and_keeps_it(tmp_path: Path) -> None:
    store = {"url": f"sqlite:{tmp_path}/s.db"}
    async with server(store=store) as at:
        created = await at.post(JOBS, {"jobId": "j1", "userId": "alice"}, {"Idempotency-Key": "k"})
        updated = await at.publish("j1", progress=5, seq=1)
        kept = await record(at, "j1")
    async with server(store=store) as at:
        assert await record(at, "j1") == kept
        again = await at.post(JOBS, {"jobId": "j1", "userId": "alice"}, {"Idempotency-Key": "k"})
        assert (again.status, again.json["id"]) == (200, created.json["id"])
        assert (await at.publish("j1", progress=5, seq=1)).json == updated.json | {"duplicate": True}
        assert offset(await at.publish("j1", progress=6, seq=2)) == 3
