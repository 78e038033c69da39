"""Batches over HTTP, against a real server: arrays and lines, whole and broken off, slowed down and repeated."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import trio

from protocol.fields import MAX_UPDATE
from server import publishing
from server.routes import jobs as routes
from tests.server.updates import JOBS, NDJSON, UPDATES, lines, offset, record
from tests.support import Answer, Http, request_bytes, server, until


async def test_one_bad_update_never_spoils_the_others() -> None:
    async with server() as at:
        batch = [
            {"jobId": "a", "userId": "alice"},
            {"jobId": "b", "progress": 5},
            {"jobId": "c", "userId": "alice", "progress": 500},
            "text",
            {"userId": "alice"},
            {"jobId": "a", "progress": 5, "seq": 1},
            {"jobId": "a", "progress": 6, "seq": 1},
            {"jobId": "d", "userId": "alice", "eventId": "e"},
            {"jobId": "d", "userId": "alice", "eventId": "e"},
        ]
        for body, headers in ((json.dumps(batch).encode(), {"Content-Type": "application/json"}),):
            answer = await at.ask("POST", UPDATES, body, headers)
        assert answer.status == 200
        assert (answer.json["accepted"], answer.json["duplicates"]) == (3, 2)
        rejected = answer.json["rejected"]
        assert [(item["index"], item["code"]) for item in rejected] == [
            (1, "job_not_found"),
            (2, "invalid_field"),
            (3, "invalid_update"),
            (4, "invalid_field"),
        ]
        assert (rejected[1]["field"], rejected[3]["field"]) == ("progress", "jobId")
        assert all(item["message"] for item in rejected)
        assert offset(answer) == 3
        assert {job["jobId"] for job in (await at.get(JOBS)).json["jobs"]} == {"a", "d"}


async def test_ndjson_is_taken_like_an_array_whatever_its_line_ends() -> None:
    async with server() as at:
        body = b'\n{"jobId":"a","userId":"alice"}\r\n\r\n{"jobId":\n{"jobId":"b","userId":"alice"}'
        for content_type in ("application/x-ndjson", "application/ndjson; charset=utf-8", "application/jsonl"):
            answer = await at.ask("POST", UPDATES, body, {"Content-Type": content_type})
            assert answer.status == 200
            assert answer.json["accepted"] == 2
            assert [(item["index"], item["code"]) for item in answer.json["rejected"]] == [(1, "malformed_json")]


async def test_ndjson_is_shown_while_it_still_comes() -> None:
    async with server() as at, at.connect() as http:
        await http.send(
            b"POST /api/v2/updates HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/x-ndjson\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n"
        )
        first, rest = b'{"jobId":"a","userId":"alice"}\n{"jobId":"a","pro', b'gress":40}\n{"jobId":"a","progress":41}'
        await chunk(http, first)
        await until(lambda: at.node.jobs.get("a") is not None)
        assert (await record(at, "a"))["progress"] == 0
        for position in range(len(rest)):
            await chunk(http, rest[position : position + 1])
        await until(lambda: at.node.history.last == 2)
        assert at.node.counters.updates["http", "accepted"] == 2
        await http.send(b"0\r\n\r\n")
        answer = await http.answer()
        assert at.node.counters.updates["http", "accepted"] == 3
        assert (answer.json["accepted"], answer.json["rejected"], offset(answer)) == (3, [], 3)
        assert (await record(at, "a"))["progress"] == 41
        assert (await http.request("GET", "/health")).status == 200, "the connection goes on"


async def chunk(http: Http, data: bytes) -> None:
    await http.send(b"%x\r\n%b\r\n" % (len(data), data))


async def test_ndjson_that_breaks_off_keeps_what_was_whole() -> None:
    async with server() as at:
        async with at.connect() as http:
            headers = NDJSON | {"Content-Length": "1000"}
            await http.send(
                request_bytes("POST", UPDATES, headers=headers)
                + lines({"jobId": "a", "userId": "alice"})
                + b'{"jobId":"b","userId":"a"}'
            )
            await until(lambda: at.node.jobs.get("a") is not None)
        await until(lambda: at.node.connections == 0)
        assert [job["jobId"] for job in (await at.get(JOBS)).json["jobs"]] == ["a"]


@pytest.mark.parametrize("whole", [True, False])
async def test_a_line_that_is_too_long_is_refused_alone_however_it_is_cut(whole: bool) -> None:
    async with server() as at, at.connect() as http:
        good = {"jobId": "a", "userId": "alice"}
        long = b'{"jobId":"b","userId":"alice","message":"' + b"x" * (3 * MAX_UPDATE) + b'"}\n'
        body = lines(good) + long + lines({"jobId": "c", "userId": "alice"})
        await http.send(
            b"POST /api/v2/updates HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/x-ndjson\r\n"
            b"Content-Length: %d\r\n\r\n" % len(body)
        )
        size = len(body) if whole else 50_000
        for start in range(0, len(body), size):
            await http.send(body[start : start + size])
        answer = await http.answer()
        assert answer.json["accepted"] == 2
        assert [(item["index"], item["code"]) for item in answer.json["rejected"]] == [(1, "payload_too_large")]


async def test_a_repeated_batch_is_all_duplicates() -> None:
    async with server() as at:
        batch = [{"jobId": "a", "userId": "alice"}, {"jobId": "a", "progress": 5}, {"jobId": "a", "progress": 5}]
        headers = {"Idempotency-Key": "k"}
        first = await at.post(UPDATES, batch, headers)
        again = await at.ask("POST", UPDATES, lines(*batch), headers | NDJSON)
        assert (first.json["accepted"], first.json["duplicates"]) == (3, 0)
        assert (again.json["accepted"], again.json["duplicates"], again.json["id"]) == (0, 3, first.json["id"])
        assert (await record(at, "a"))["version"] == 3


async def test_an_empty_batch_is_fine() -> None:
    async with server() as at:
        await at.publish("a", userId="alice")
        for body, headers in ((b"[]", {}), (b"", NDJSON), (b"\n", NDJSON)):
            answer = await at.ask("POST", UPDATES, body, headers)
            assert answer.status == 200
            assert (answer.json["accepted"], answer.json["rejected"], offset(answer)) == (0, [], 1)


@pytest.mark.parametrize(
    ("body", "content_type", "status", "code"),
    [
        (b"[{}", "application/json", 400, "malformed_json"),
        (b"[" * 5000, "application/json", 400, "malformed_json"),
        (b'{"jobId":', "application/json", 400, "malformed_json"),
        (b'{"jobId":"a"}', "application/json", 422, "invalid_field"),
        (b"[]", "text/plain", 415, "unsupported_media_type"),
        (b" " * (routes.MAX_BATCH + 1), "application/json", 413, "payload_too_large"),
        (b"\n" * (routes.MAX_BATCH + 1), "application/x-ndjson", 413, "payload_too_large"),
        (b"[" + b"0," * publishing.MAX_UPDATES + b"0]", "application/json", 413, "payload_too_large"),
    ],
    ids=["cut", "deep", "cut-object", "object", "type", "large", "large-lines", "many"],
)
async def test_a_batch_that_is_none(body: bytes, content_type: str, status: int, code: str) -> None:
    async with server() as at, at.connect() as http:
        # The body of the largest is never sent: its announced length is enough.
        head = request_bytes("POST", UPDATES, headers={"Content-Type": content_type, "Content-Length": str(len(body))})
        await http.send(head if len(body) > routes.MAX_BATCH else head + body)
        answer = await http.answer()
        assert (answer.status, answer.error) == (status, code)


async def test_more_lines_than_a_batch_may_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publishing, "MAX_UPDATES", 3)
    async with server() as at:
        body = lines({"jobId": "a", "userId": "alice"}, *[{"jobId": "a"}] * 3)
        answer = await at.ask("POST", UPDATES, body, NDJSON)
        assert (answer.status, answer.error) == (413, "payload_too_large")


async def test_a_large_batch_lets_others_in_between() -> None:
    async with server() as at:
        batch = [{"jobId": f"j{number}", "userId": "alice"} for number in range(3000)]
        health: list[Answer] = []

        async def look() -> None:
            await until(lambda: at.node.history.last > 0)
            assert at.node.history.last < 3000
            health.append(await at.get("/health"))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(look)
            answer = await at.post(UPDATES, batch)
        assert answer.json["accepted"] == 3000
        assert health[0].status == 200


async def test_a_batch_larger_than_the_rate_passes_whole() -> None:
    async with server(limits={"publishes_per_second": 10}) as at:
        batch = [{"jobId": f"j{number}", "userId": "alice"} for number in range(2 * publishing.PORTION + 1)]
        answer = await at.post(UPDATES, batch)
        assert (answer.status, answer.json["accepted"]) == (200, len(batch))
        debt = await at.post(UPDATES, batch[:1])
        assert (debt.status, int(debt.headers["retry-after"]) > 10) == (429, True)


async def test_a_stream_of_lines_is_slowed_down_to_the_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "PORTION", 10)
    async with server(limits={"publishes_per_second": 10}) as at:
        body = lines({"jobId": "a", "userId": "alice"}, *[{"jobId": "a"}] * 10)
        started = trio.current_time()
        answer = await at.ask("POST", UPDATES, body, NDJSON)
        assert (answer.status, answer.json["accepted"], answer.json["rejected"]) == (200, 11, [])
        assert trio.current_time() - started >= 0.1, "the eleventh comes a tenth of a second after the first ten"


@pytest.mark.parametrize("store", ["memory:", "sqlite"])
async def test_a_batch_s_key_is_for_the_whole_batch(store: str, tmp_path: Path) -> None:
    url = store if store == "memory:" else f"sqlite:{tmp_path / 'jobs.db'}"
    async with server(store={"url": url}) as at:
        key = {"Idempotency-Key": "batch-1"}
        batch = [{"jobId": "a", "userId": "alice"}, {"jobId": "a", "progress": 5}]
        first = await at.post("/api/v2/updates", batch, key)
        assert (first.json["accepted"], first.json["duplicates"]) == (2, 0)
        again = await at.post("/api/v2/updates", batch, key)
        assert again.json == {"accepted": 0, "duplicates": 2, "rejected": [], "id": first.json["id"]}
        for other in ([*batch, {"jobId": "b", "userId": "alice"}], batch[:1], []):
            answer = await at.post("/api/v2/updates", other, key)
            assert (answer.status, answer.error) == (422, "idempotency_key_reused"), other
        assert (await at.get("/api/v2/jobs/b")).status == 404
        assert (await at.get("/api/v2/jobs/a")).json["version"] == 2
        # Another batch without a key, or with one of its own, is another batch.
        assert (await at.post("/api/v2/updates", batch[1:])).json["accepted"] == 1
