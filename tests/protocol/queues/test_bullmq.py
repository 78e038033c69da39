"""BullMQ and Bull 4: what was captured of them comes to the right records."""

from __future__ import annotations

import json
from typing import Any, cast

import msgspec
import pytest

from protocol.queues.bull4 import read_message, split_channel
from protocol.queues.bullmq import describe, read_event, read_hash, seq_of
from protocol.queues.sighting import settle
from tests.protocol.queues.replaying import Replay, at, captured

BULLMQ = captured("bullmq")
HASHES = BULLMQ["bullmq6"]["job_hashes"]
CHILD = "3bb9f570-7da8-48c8-a1a9-9d46c867cf96"
OF_JOB = {
    "1": "transcode:completed", "2": "bad:failed", "job_123": "custom:completed", "8": "transcode:active",
    CHILD: "child:active",
}  # fmt: skip


def replay(entries: list[dict[str, Any]], *, hashes: bool = True, results: bool = False) -> Replay:
    done = Replay("bull")
    for entry in entries:
        seen = read_event("video", entry["id"], entry["fields"], results=results)
        if seen is not None and hashes and seen.job in OF_JOB:
            describe(seen, HASHES[OF_JOB[seen.job]], "data.userId")
        done.see(seen)
    return done


def test_events_come_to_the_records_of_the_table() -> None:
    done = replay(BULLMQ["bullmq6"]["stream"])
    assert [row for row in done.rows if row[0] == "video:1"] == [
        ("video:1", "queued", 0, None, at(1795295739094)),
        ("video:1", "queued", 0, None, at(1795295739094)),
        ("video:1", "processing", 0, None, at(1795295739105)),
        ("video:1", "processing", 25, None, at(1795295739108)),
        ("video:1", "processing", 60, "Encoding pass 2", at(1795295739109)),
        ("video:1", "completed", 100, "Encoding pass 2", at(1795295739116)),
    ]
    assert [row for row in done.rows if row[0] == "video:2"] == [
        ("video:2", "queued", 0, None, at(1795295739120)),
        ("video:2", "queued", 0, None, at(1795295739120)),
        ("video:2", "processing", 0, None, at(1795295739122)),
        ("video:2", "processing", 10, None, at(1795295739122)),
        ("video:2", "queued", 10, "retry", at(1795295739126)),
        ("video:2", "queued", 10, "retry", at(1795295739377)),
        ("video:2", "processing", 10, None, at(1795295739377)),
        ("video:2", "processing", 10, None, at(1795295739378)),
        ("video:2", "failed", 10, "ffmpeg exited with code 1", at(1795295739379)),
    ]
    assert done.of("video:job_123")[:2] == [("queued", 0, None), ("queued", 0, None)]
    assert done.of("video:job_123")[-1] == ("completed", 100, "Encoding pass 2")
    assert done.of("video:5") == [("queued", 0, None), ("queued", 0, None), ("cancelled", 0, None)]
    parent = "video:912bb599-e3fb-443a-b43f-f2dddb3fc082"
    assert [row[0] for row in done.of(parent)] == ["queued"] * 3 + ["processing"] * 3 + ["completed"]
    assert {job.latest.status for job in done.jobs.values()} == {"completed", "failed", "cancelled"}
    (child,) = [name for name in done.jobs if "parent" in done.shown(name)["metadata"]]
    assert child == f"video:{CHILD}"
    assert done.shown(child)["metadata"] == {"source": "bull", "queue": "video", "parent": parent}
    assert "parentId" not in done.shown(child)


@pytest.mark.parametrize(
    ("parent", "name"),
    [
        ('{"id":"7","queueKey":"{tag}:books"}', "app-books:7"),
        ('{"id":"a b","queueKey":"{tag}:books"}', "app-books:a-b.4492eca0ca6f22a5"),
        ('{"id":"7","queueKey":"bull:books"}', None),
        ('{"id":7,"queueKey":"{tag}:books"}', None),
        ('{"id":"","queueKey":"{tag}:books"}', None),
        ('["7"]', None),
        ("{", None),
        ("", None),
    ],
)
def test_a_child_names_its_parent(parent: str, name: str | None) -> None:
    seen = read_event("pages", "5-0", {"event": "added", "jobId": "1"})
    assert seen is not None
    describe(seen, {"name": "page", "data": "{}", "parent": parent}, "data.userId", "{tag}")
    fields = settle(None, seen, "bull", "app-")
    assert fields is not None
    assert msgspec.json.decode(cast("msgspec.Raw", fields.metadata)).get("parent") == name


def test_records_have_owner_kind_attempt_and_error_and_nothing_that_jobs_carry() -> None:
    done = replay(BULLMQ["bullmq6"]["stream"])
    first, second, third = done.shown("video:1"), done.shown("video:2"), done.shown("video:5")
    assert (first["userId"], first["kind"], first["stage"]) == ("user_789", "transcode", "encode")
    assert first["metadata"] == {"source": "bull", "queue": "video"}
    assert "result" not in first
    assert (second["attempt"], second["error"]) == (2, "ffmpeg exited with code 1")
    # It says nothing of an owner, so it has the one that nobody can be.
    assert third["userId"] == "queue:bull"
    text = json.dumps([done.shown(name) for name in done.jobs])
    assert "a.mov" not in text
    assert "/app/" not in text
    assert done.shown("video:job_123")["userId"] == "user_1"


def test_results_come_if_they_are_wanted() -> None:
    done = replay(BULLMQ["bullmq6"]["stream"], results=True)
    assert done.shown("video:1")["result"] == {"url": "/out/1.mp4", "frames": 7200}


def test_what_was_taken_in_before_counts_once_from_wherever_it_is_read_again() -> None:
    entries = BULLMQ["bullmq6"]["stream"]
    once = replay(entries)
    for start in range(0, len(entries), 5):
        again = replay(entries)
        for entry in entries[start:]:
            assert not again.see(read_event("video", entry["id"], entry["fields"]))
        assert again.rows == once.rows


def test_version_five_says_the_same_and_stalls() -> None:
    done = replay(BULLMQ["bullmq5"]["stream"], hashes=False)
    assert done.of("video:5")[-6:] == [
        ("queued", 0, None),
        ("processing", 0, None),
        ("queued", 0, "retry"),
        ("queued", 0, "stalled"),
        ("processing", 0, None),
        ("completed", 100, None),
    ]
    assert done.shown("video:5")["attempt"] == 2
    assert done.shown("video:3")["attempt"] == 3
    assert {job.latest.status for job in done.jobs.values()} <= {"completed", "failed", "cancelled"}


@pytest.mark.parametrize(
    ("name", "place", "status", "progress", "message", "time"),
    [
        ("transcode:added", "wait", "queued", 0, None, 1795295739086),
        ("transcode:active", "active", "processing", 0, None, 1795295739836),
        ("transcode:progress", "active", "processing", 60, "Encoding pass 2", 1795295739836),
        ("transcode:completed", "completed", "completed", 100, "Encoding pass 2", 1795295739111),
        ("bad:failed", "failed", "failed", 10, "ffmpeg exited with code 1", 1795295739378),
    ],
)
def test_a_hash_says_what_the_missed_events_would_have(
    name: str, place: str, status: str, progress: float, message: str | None, time: int
) -> None:
    done = Replay()
    seen = read_hash("video", "9", HASHES[name], place, seq_of("1795295740000-3"), results=False)
    describe(seen, HASHES[name], "data.userId")
    assert done.see(seen)
    assert done.rows == [("video:9", status, progress, message, at(time))]
    assert done.shown("video:9")["attempt"] == (2 if status == "failed" else 1)
    # What is in the stream from before that is not news any more.
    assert not done.see(read_event("video", "1795295739999-0", {"event": "waiting", "jobId": "9", "prev": "active"}))
    assert not done.see(read_hash("video", "9", HASHES[name], place, seq_of("1795295740000-3"), results=False))


def test_a_missed_retry_is_known_from_the_hash() -> None:
    done = Replay()
    entry = "1795295739001-"
    for number, event in enumerate(("added", "active", "progress")):
        assert done.see(read_event("video", f"{entry}{number}", {"event": event, "jobId": "2", "data": "10"}))
    data = {key: value for key, value in HASHES["bad:failed"].items() if key != "finishedOn"} | {"progress": "5"}
    assert done.see(read_hash("video", "2", data, "active", seq_of("1795295739002-0"), results=False))
    record = done.shown("video:2")
    assert (record["status"], record["attempt"], record["progress"]) == ("processing", 2, 5)
    assert "error" not in record


@pytest.mark.parametrize(
    ("fields", "entry"),
    [
        ({"event": "drained"}, "1-1"),
        ({"event": "progress", "jobId": ""}, "1-1"),
        ({"event": "nonsense", "jobId": "1"}, "1-1"),
        ({}, "1-1"),
        ({"event": "active", "jobId": "1"}, "soon"),
    ],
)
def test_what_is_about_no_job_is_passed_over(fields: dict[str, str], entry: str) -> None:
    assert read_event("video", entry, fields) is None


@pytest.mark.parametrize(
    ("data", "progress", "message", "stage"),
    [
        ("40", 40, None, None),
        ("140", 100, None, None),
        ("-1", 0, None, None),
        ('{"progress":12.5,"message":"m"}', 12.5, "m", None),
        ('{"pct":7}', 7, None, None),
        ('{"current":3,"total":4,"stage":"encode"}', 75, "encode", "encode"),
        ('{"current":3,"total":0}', None, None, None),
        ('{"percent":true}', None, None, None),
        ('"half"', None, None, None),
        ("[1]", None, None, None),
        ("{", None, None, None),
        ("1e999", None, None, None),
    ],
)
def test_progress_in_all_the_forms_people_give_it(
    data: str, progress: float | None, message: str | None, stage: str | None
) -> None:
    seen = read_event("video", "5-0", {"event": "progress", "jobId": "1", "data": data})
    assert seen is not None
    assert (seen.progress, seen.message, seen.stage) == (progress, message, stage)


def test_a_job_that_is_removed_unseen_does_not_come_into_being() -> None:
    done = Replay()
    assert not done.see(read_event("video", "5-0", {"event": "removed", "jobId": "1", "prev": "wait"}))
    assert not done.jobs


def test_a_job_that_is_retried_by_hand_begins_again() -> None:
    done = replay(BULLMQ["bullmq6"]["stream"])
    assert done.see(read_event("video", "1795295750000-0", {"event": "waiting", "jobId": "2", "prev": "failed"}))
    record = done.shown("video:2")
    assert (record["status"], record["attempt"]) == ("queued", 3)
    assert "error" not in record
    assert "message" not in record


def test_bull_four_publishes_the_same_without_numbers() -> None:
    done = Replay("bull4")
    hashes = BULLMQ["bull4"]["job_hashes"]
    for number, message in enumerate(BULLMQ["bull4"]["messages"]):
        where = split_channel("bull", message["channel"])
        if where is None:
            continue
        queue, event = where
        seen = read_message(queue, event, message["data"], 1795295740000 + number)
        if seen is not None:
            describe(seen, hashes["added" if seen.job == "1" else "failed"], "data.userId")
        done.see(seen)
    assert done.of("report:1") == [
        ("queued", 0, None),
        ("processing", 0, None),
        ("processing", 25, None),
        ("processing", 60, "Encoding"),
        ("completed", 100, "Encoding"),
    ]
    assert done.of("report:2") == [("queued", 0, None), ("processing", 0, None), ("failed", 0, "boom")]
    assert done.of("report:job_123")[-1] == ("completed", 100, "Encoding")
    record = done.shown("report:2")
    assert (record["userId"], record["kind"], record["error"]) == ("user_789", "report", "boom")
    # The hash agrees, so reading it brings nothing new.
    assert not done.see(read_hash("report", "2", hashes["failed"], "failed", 0, results=False))


@pytest.mark.parametrize("data", ["", "{", '{"jobId":[1]}', '{"job":1}', "[]{", '{"jobId":""}'])
def test_bull_four_messages_that_are_not_in_form(data: str) -> None:
    seen = read_message("report", "progress", data, 1)
    assert seen is None or seen.job == data
