"""Reading without waiting, against a real server: one record, lists in pages, the history of a job."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support import ADMIN, AUTH, WORKER, Address, bearer, server

JOBS = "/api/v2/jobs"


async def ids(at: Address, query: str, headers: dict[str, str] | None = None) -> list[str]:
    answer = await at.get(f"{JOBS}?{query}", headers or {})
    assert answer.status == 200, answer
    return [job["jobId"] for job in answer.json["jobs"]]


# --- one record ---------------------------------------------------------------------------------------------------


async def test_a_record_has_what_was_published_and_what_the_server_adds() -> None:
    async with server() as at:
        await at.publish(
            "j1",
            userId="alice",
            kind="export",
            status="processing",
            progress=45,
            stage="pages",
            currentOperation="Processing page 120/300",
            steps={"done": 120, "total": 300, "current": "p120"},
            workerId="w3",
            message="m",
        )
        answer = await at.get(f"{JOBS}/j1")
        job = answer.json
        assert {name: job[name] for name in ("jobId", "userId", "kind", "status", "progress", "stage", "version")} == {
            "jobId": "j1",
            "userId": "alice",
            "kind": "export",
            "status": "processing",
            "progress": 45,
            "stage": "pages",
            "version": 1,
        }
        assert job["steps"] == {"done": 120, "total": 300, "current": "p120"}
        assert job["createdAt"] == job["startedAt"] == job["timestamp"]
        assert not {"result", "error", "endedAt", "seq", "ttl", "id", "type"} & set(job)
        assert answer.headers["cache-control"] == "private, no-cache"
        await at.publish("j1", status="completed", result={"url": "u"})
        job = (await at.get(f"{JOBS}/j1")).json
        assert (job["progress"], job["status"], job["result"], "endedAt" in job) == (
            100,
            "completed",
            {"url": "u"},
            True,
        )


async def test_an_etag_holds_until_the_record_changes() -> None:
    async with server() as at:
        await at.publish("j1", userId="alice")
        await at.publish("j2", userId="alice")
        first = await at.get(f"{JOBS}/j1")
        tag = first.headers["etag"]
        assert tag.startswith('"')
        assert tag.endswith('"')
        for value in (tag, f"W/{tag}", f'"x", {tag}', "*"):
            answer = await at.get(f"{JOBS}/j1", {"If-None-Match": value})
            assert (answer.status, answer.body, answer.headers["etag"]) == (304, b"", tag), value
            assert "content-length" not in answer.headers
        other = (await at.get(f"{JOBS}/j2")).headers["etag"]
        for value in (other, tag.strip('"'), '"x"', ""):
            assert (await at.get(f"{JOBS}/j1", {"If-None-Match": value})).status == 200, value
        part = await at.get(f"{JOBS}/j1?fields=progress", {"If-None-Match": tag})
        assert part.status == 200, "another representation has another tag"
        assert (await at.get(f"{JOBS}/j1?fields=progress", {"If-None-Match": part.headers["etag"]})).status == 304
        await at.publish("j2", progress=5)
        assert (await at.get(f"{JOBS}/j1", {"If-None-Match": tag})).status == 304, "another job's update is not ours"
        await at.publish("j1", progress=5)
        changed = await at.get(f"{JOBS}/j1", {"If-None-Match": tag})
        assert (changed.status, changed.json["progress"]) == (200, 5)
        missing = await at.get(f"{JOBS}/none", {"If-None-Match": "*"})
        assert missing.status == 404


@pytest.mark.parametrize(("progress", "shown"), [(0, "0"), (45, "45"), (33.25, "33.25"), (0.00001, "1e-05")])
async def test_head_says_it_in_headers(progress: float, shown: str) -> None:
    async with server() as at:
        await at.publish("j1", userId="alice", status="processing", progress=progress)
        async with at.connect() as http:
            answer = await http.request("HEAD", f"{JOBS}/j1")
            headers = answer.headers
            assert (answer.status, headers["x-job-status"], headers["x-job-version"]) == (200, "processing", "1")
            assert headers["x-job-progress"] == shown
            get = await http.request("GET", f"{JOBS}/j1")
            assert headers["content-length"] == str(len(get.body))
            assert headers["etag"] == get.headers["etag"]
            again = await http.request("HEAD", f"{JOBS}/j1", headers={"If-None-Match": headers["etag"]})
            assert again.status == 304
            missing = await http.request("HEAD", f"{JOBS}/none")
            assert (missing.status, missing.body) == (404, b"")
            assert (await http.request("GET", f"{JOBS}/j1")).status == 200, "the connection is in step"


async def test_fields_cut_a_record_down() -> None:
    async with server() as at:
        await at.publish("j1", userId="alice", progress=5, message="m")
        assert (await at.get(f"{JOBS}/j1?fields=progress,kind")).json == {
            "jobId": "j1",
            "status": "queued",
            "progress": 5,
            "version": 1,
        }
        for query in ("fields=nope", "fields=", "fields=progress,"):
            answer = await at.get(f"{JOBS}/j1?{query}")
            assert (answer.status, answer.json["error"]["field"]) == (400, "fields")


async def test_foreign_and_unknown_jobs_look_the_same() -> None:
    async with server(auth=AUTH) as at:
        await at.publish("theirs", WORKER, userId="alice")
        bob = bearer("bob")
        for target in ("", "/history"):
            answers = [await at.get(f"{JOBS}/{job_id}{target}", bob) for job_id in ("theirs", "nobodys")]
            texts = []
            for answer, job_id in zip(answers, ("theirs", "nobodys"), strict=True):
                assert (answer.status, answer.error) == (404, "job_not_found")
                texts.append(answer.json["error"]["message"].replace(job_id, "…"))
            assert texts[0] == texts[1]
            assert set(answers[0].headers) == set(answers[1].headers)
        assert (await at.get(f"{JOBS}/theirs", bearer("alice"))).status == 200
        assert (await at.get(f"{JOBS}/theirs", bearer("bob", jobs=["the*"]))).status == 200


# --- lists --------------------------------------------------------------------------------------------------------


async def test_a_list_is_newest_first_in_pages() -> None:
    async with server() as at:
        for number in range(7):
            await at.publish(f"j{number}", userId="alice")
        await at.publish("j3", progress=5)
        pages, after = [], ""
        while True:
            answer = await at.get(f"{JOBS}?limit=3{after}")
            assert set(answer.json) == {"jobs", "next", "id"}
            assert answer.json["id"] == f"{at.node.history.epoch}:{at.node.history.last}"
            pages.append([job["jobId"] for job in answer.json["jobs"]])
            if answer.json["next"] is None:
                break
            assert isinstance(answer.json["next"], str)
            after = f"&after={answer.json['next']}"
            # What comes and goes meanwhile moves no page.
            await at.publish(f"new{len(pages)}", userId="alice")
            await at.ask("DELETE", f"{JOBS}/{pages[-1][-1]}")
        # In the order of creation, whatever was updated last.
        assert pages == [["j6", "j5", "j4"], ["j3", "j2", "j1"], ["j0"]]


async def test_a_list_takes_filters() -> None:
    async with server() as at:
        await at.publish("a", userId="alice", kind="export")
        await at.publish("b", userId="bob", kind="export", status="completed")
        await at.publish("c", userId="bob", kind="import", status="failed")
        await at.publish("d", userId="bob", status="processing")
        for query, expected in {
            "": "dcba",
            "status=completed,failed": "cb",
            "status=stalled": "",
            "kind=export": "ba",
            "kind=export,import&status=completed": "b",
            "userId=bob": "dcb",
            "userId=bob&kind=import": "c",
            "userId=nobody": "",
            "types=job_completed": "b",
            "types=status_update": "da",
            "types=status_update,job_failed&status=failed,queued": "ca",
            "types=job_deleted": "",
        }.items():
            assert await ids(at, query) == list(expected), query
        assert [*(await at.get(f"{JOBS}?fields=kind&userId=alice")).json["jobs"]] == [
            {"jobId": "a", "kind": "export", "status": "queued", "version": 1}
        ]


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("limit=0", "limit"),
        ("limit=1001", "limit"),
        ("limit=ten", "limit"),
        ("limit=-1", "limit"),
        ("limit=%D9%A3", "limit"),
        ("after=x", "after"),
        ("after=99999999999999999999", "after"),
        ("status=done", "status"),
        ("types=progress", "types"),
        ("kind=", "kind"),
        ("userId=a%20b", "userId"),
        ("fields=secret", "fields"),
        ("limit=1&limit=2", "limit"),
        ("limit=%zz", "limit"),
    ],
)
async def test_bad_parameters_of_a_list_are_400_and_named(query: str, field: str) -> None:
    async with server() as at, at.connect() as http:
        answer = await http.request("GET", f"{JOBS}?{query}")
        assert (answer.status, answer.error) == (400, "invalid_parameter")
        assert answer.json["error"]["field"] == field
        assert (await http.request("GET", "/health")).status == 200, "it was an ordinary answer"


async def test_everyone_lists_their_own_and_an_admin_all() -> None:
    async with server(auth=AUTH) as at:
        await at.publish("a", WORKER, userId="alice")
        await at.publish("b", WORKER, userId="bob")
        assert await ids(at, "", ADMIN) == ["b", "a"]
        assert await ids(at, "userId=bob", ADMIN) == ["b"]
        assert await ids(at, "", bearer("alice")) == ["a"]
        assert await ids(at, "userId=alice", bearer("alice")) == ["a"]
        assert await ids(at, "", WORKER) == [], "to publish is not to read"
        answer = await at.get(f"{JOBS}?userId=bob", bearer("alice"))
        assert (answer.status, answer.error) == (403, "forbidden")


async def test_a_large_list_comes_in_chunks() -> None:
    async with server() as at:
        batch = [{"jobId": f"j{number}", "userId": "alice", "message": "m" * 500} for number in range(1000)]
        await at.post("/api/v2/updates", batch)
        answer = await at.get(f"{JOBS}?limit=1000")
        assert answer.headers["transfer-encoding"] == "chunked"
        assert len(answer.json["jobs"]) == 1000
        assert answer.json["next"] is None
        assert len((await at.get(JOBS)).json["jobs"]) == 100
        async with at.connect() as http:
            await http.send(f"GET {JOBS}?limit=1000 HTTP/1.0\r\n\r\n".encode())
            old = await http.answer()
            assert "transfer-encoding" not in old.headers
            assert old.json["jobs"] == answer.json["jobs"]
            head = await at.ask("HEAD", JOBS)
            assert (head.status, head.body) == (200, b"")


# --- history ------------------------------------------------------------------------------------------------------


async def test_history_is_every_kept_update_oldest_first() -> None:
    async with server() as at:
        first = await at.publish("j1", userId="alice")
        await at.publish("j2", userId="alice")
        await at.publish("j1", status="processing", progress=5)
        last = await at.publish("j1", status="completed")
        answer = (await at.get(f"{JOBS}/j1/history")).json
        assert set(answer) == {"updates", "id"}
        updates: list[dict[str, Any]] = answer["updates"]
        assert [(update["version"], update["type"], update["status"]) for update in updates] == [
            (1, "status_update", "queued"),
            (2, "status_update", "processing"),
            (3, "job_completed", "completed"),
        ]
        assert (updates[0]["id"], updates[2]["id"]) == (first.json["id"], last.json["id"])
        assert answer["id"] == last.json["id"]
        assert {update["jobId"] for update in updates} == {"j1"}
        for query, versions in {
            "types=job_completed": [3],
            "status=queued,processing": [1, 2],
            "kind=export": [],
        }.items():
            found = (await at.get(f"{JOBS}/j1/history?{query}")).json["updates"]
            assert [update["version"] for update in found] == versions, query
        (update,) = (await at.get(f"{JOBS}/j1/history?fields=progress&types=job_completed")).json["updates"]
        assert set(update) == {"type", "id", "jobId", "status", "version", "progress"}
        assert (await at.get(f"{JOBS}/j1/history?types=x")).status == 400


async def test_history_has_only_what_is_kept() -> None:
    async with server(history={"max_updates": 3}) as at:
        for number in range(6):
            await at.publish("j1", userId="alice", progress=number)
        updates = (await at.get(f"{JOBS}/j1/history")).json["updates"]
        assert [update["version"] for update in updates] == [4, 5, 6]
        for number in range(3):
            await at.publish("j2", userId="alice", progress=number)
        empty = await at.get(f"{JOBS}/j1/history")
        assert (empty.status, empty.json["updates"]) == (200, [])
        assert (await at.get(f"{JOBS}/j1")).json["version"] == 6
