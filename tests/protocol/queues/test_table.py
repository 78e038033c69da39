"""Every payload that was captured of real queues comes to the record that the table of docs/queues.md has for it.

The tables here are written down a second time, as plainly as can be, and know nothing of what they check: an update is
``(status, progress, message)``, None where it does not say.
"""

from __future__ import annotations

import base64
import json
import pickle
import zlib
from dataclasses import dataclass, field
from typing import Any

import pytest

from protocol.queues import bull4, bullmq, rq
from protocol.queues.celery import Attempts, Beat, Told, read_events, read_result
from protocol.queues.sighting import Sighting
from tests.protocol.queues.replaying import Replay, at, captured

BULLMQ, CELERY, RQ = captured("bullmq"), captured("celery"), captured("rq")
Update = tuple[str | None, float | None, str | None]
ENDS = ("completed", "failed", "cancelled")


@dataclass
class Expected:
    """What the records must say after each update, by job."""

    records: dict[str, tuple[str, float, str | None]] = field(default_factory=dict)

    def take(self, job: str, update: Update) -> None:
        status, progress, message = update
        before = self.records.get(job, ("queued", 0, None))
        status = status or before[0]
        if before[0] == "processing" and status == "queued":
            before = ("queued", before[1], None)
        if before[0] in ENDS and status != before[0]:
            before = ("queued", before[1], None)
        if before[0] == "queued" and status == "processing":
            before = ("queued", before[1], None)  # why it waited is over
        done = 100 if status == "completed" else before[1] if progress is None else progress
        self.records[job] = (status, done, message or before[2])


def percent(report: Any) -> float | None:
    if isinstance(report, int | float):
        return report
    if "percent" in report or "progress" in report:
        found: float = report.get("percent", report.get("progress"))
        return found
    return 100 * report["current"] / report["total"] if "current" in report else None


def words(report: Any, *names: str) -> str | None:
    if isinstance(report, dict):
        for name in names:
            if name in report:
                return str(report[name])
    return None


def of_bullmq(fields: dict[str, str], before: str | None) -> Update | None:
    event, prev = fields["event"], fields.get("prev")
    if event in ("added", "waiting-children"):
        return "queued", None, None
    if event == "waiting":
        return "queued", None, "retry" if prev == "active" else None
    if event == "delayed":
        return "queued", None, "retry" if before == "processing" else None
    if event == "active":
        return "processing", None, None
    if event == "progress":
        report = json.loads(fields["data"])
        return "processing", percent(report), words(report, "message", "stage")
    if event == "completed":
        return "completed", 100, None
    if event == "failed":
        return "failed", None, fields["failedReason"]
    if event == "removed":
        return "cancelled", None, None
    if event == "stalled":
        return "queued", None, "stalled"
    return None


@pytest.mark.parametrize("version", ["bullmq6", "bullmq5"])
def test_bullmq(version: str) -> None:
    done, expected, told = Replay(), Expected(), 0
    for entry in BULLMQ[version]["stream"]:
        fields, seen = entry["fields"], bullmq.read_event("video", entry["id"], entry["fields"])
        job = f"video:{fields.get('jobId')}"
        update = of_bullmq(fields, expected.records.get(job, (None,))[0])
        assert (seen is None) is (update is None), fields
        if update is None:
            continue
        done.see(seen)
        expected.take(job, update)
        told += 1
        time = at(int(entry["id"].partition("-")[0]))
        assert done.rows[-1] == (job, *expected.records[job], time), fields
    assert len(done.rows) == told
    assert len(expected.records) == {"bullmq6": 7, "bullmq5": 5}[version]


def test_a_bullmq_job_that_was_put_off_says_until_when() -> None:
    done, until = Replay(), {}
    for entry in BULLMQ["bullmq6"]["stream"]:
        done.see(bullmq.read_event("video", entry["id"], entry["fields"]))
        if entry["fields"]["event"] == "delayed":
            until[f"video:{entry['fields']['jobId']}"] = at(int(entry["fields"]["delay"]))
    found = {name: done.shown(name)["metadata"].get("runAt") for name in done.jobs}
    assert found == {
        # A job that comes back after an attempt is no scheduled one.
        name: until[name] if name in ("video:job_123", "video:5") else None
        for name in done.jobs
    }
    assert done.shown("video:5")["metadata"]["queue"] == "video"


def test_bull_four() -> None:
    done, expected = Replay(), Expected()
    for number, message in enumerate(BULLMQ["bull4"]["messages"]):
        event = message["channel"].split(":")[2].partition("@")[0]
        data = json.loads(message["data"]) if message["data"].startswith("{") else {"jobId": message["data"]}
        fields = {
            "event": event, "data": json.dumps(data.get("progress")), "failedReason": data.get("val", ""),
        }  # fmt: skip
        where = bull4.split_channel("bull", message["channel"])
        seen = where and bull4.read_message(*where, message["data"], number)
        update = None if event == "delayed" else of_bullmq(fields, None)
        assert (seen is None) is (update is None), message
        if update is not None:
            name = f"report:{data['jobId']}"
            done.see(seen or None)
            expected.take(name, update)
            assert done.of(name)[-1] == expected.records[name], message
    assert len(expected.records) == 3


def of_result(document: dict[str, Any]) -> Update:
    state, report = document["status"], document["result"]
    if state == "STARTED":
        return "processing", None, None
    if state == "SUCCESS":
        return "completed", 100, None
    if state == "RETRY":
        return "queued", None, " ".join(report["exc_message"])
    if state in ("FAILURE", "REVOKED"):
        status = "failed" if state == "FAILURE" else "cancelled"
        return status, None, f"{report['exc_type']}: {' '.join(report['exc_message'])}"
    return "processing", percent(report), words(report, "message", "status")


def of_event(event: dict[str, Any]) -> Update | None:
    word = event["type"]
    if word in ("task-sent", "task-received"):
        return "queued", 0, None
    if word == "task-started":
        return "processing", None, None
    if word == "task-retried":
        return "queued", None, event["exception"].partition("('")[2].removesuffix("')")
    if word == "task-progress":
        return "processing", percent(event), words(event, "message", "status")
    return None  # an end, of which the result has told


@pytest.mark.parametrize("capture", ["with_events_flag_E", "without_E", "with_E_result_extended_and_sent_event"])
def test_celery(capture: str) -> None:
    done, expected, attempts, said = Replay(), Expected(), Attempts(), 0

    def take(told: Told | Beat | None, task: str, update: Update | None, times: set[str]) -> None:
        nonlocal said
        assert isinstance(told, Told)
        before = len(done.rows)
        done.see(attempts.place(done.known(task), told))
        if update is not None and expected.records.get(task, ("",))[0] not in ENDS:
            expected.take(task, update)
        assert done.of(task)[-1] == expected.records[task], told
        assert len(done.rows) == before or done.rows[-1][4] in times
        said += len(done.rows) - before

    for number, message in enumerate(CELERY[capture]):
        arrival = 1_795_295_790_000 + number
        if "celery-task-meta-" in message["channel"]:
            document = json.loads(message["data"])
            over = document["status"] in ("SUCCESS", "FAILURE", "REVOKED")
            time = f"{document['date_done'][:23]}Z" if over else at(arrival)
            take(read_result(message["data"], arrival), document["task_id"], of_result(document), {time})
            continue
        body = message["decoded_body"]
        events = [event for event in (body if isinstance(body, list) else [body]) if event["type"].startswith("task-")]
        told = [one for one in read_events(message["data"], arrival) if isinstance(one, Told)]
        for one, event in zip(told, events, strict=True):
            time = at(arrival if event["type"] == "task-retried" else int(event["timestamp"] * 1000))
            take(one, event["uuid"], of_event(event), {time})
    assert (len(expected.records), said) == {
        "with_events_flag_E": (5, 24), "without_E": (5, 18), "with_E_result_extended_and_sent_event": (1, 6),
    }[capture]  # fmt: skip


def raw(value: Any) -> bytes:
    return base64.b64decode(value["b64"]) if isinstance(value, dict) else str(value).encode()


def of_rq(data: dict[str, bytes], result: dict[str, bytes]) -> Update:
    word = data["status"].decode()
    meta = pickle.loads(data["meta"]) if "meta" in data else {}
    status = {"queued": "queued", "started": "processing", "finished": "completed", "failed": "failed"}[word]
    message = meta.get("message")
    if status == "failed":
        message = zlib.decompress(base64.b64decode(result["exc_string"])).decode().strip().splitlines()[-1]
    return status, meta.get("progress"), message


def test_rq() -> None:
    done, expected = Replay(), Expected()
    hashes: dict[str, dict[str, bytes]] = {}
    results: dict[str, dict[str, bytes]] = {}
    for number, command in enumerate(RQ["redis_write_commands_in_order"]):
        name, key, *arguments = command["args"]
        job = str(key).rpartition(":")[2]
        if name == "HSET" and key == f"rq:job:{job}":
            pairs = zip(arguments[::2], arguments[1::2], strict=True)
            hashes.setdefault(job, {}).update((str(field), raw(value)) for field, value in pairs)
        elif name == "XADD":
            told = arguments[arguments.index("*") + 1 :]
            results[job] = {str(field): raw(value) for field, value in zip(told[::2], told[1::2], strict=True)}
        data = hashes.get(job, {})
        over = data.get("status") in (b"finished", b"failed")
        # It ends in one transaction, and is read after that.
        if "created_at" not in data or (over and job not in results):
            continue
        before = len(done.rows)
        done.see(rq.read_job(job, data, results.get(job), number))
        expected.take(job, of_rq(data, results.get(job, {})))
        assert done.of(job)[-1] == expected.records[job], command
        if len(done.rows) > before:
            ended = f"{data['ended_at'].decode()[:23]}Z"
            assert done.rows[-1][4] == (ended if over else at(number))
    assert [status for status, _, _ in expected.records.values()] == ["completed", "failed"]
    assert len(done.rows) == 10


@pytest.mark.parametrize(
    ("word", "status"),
    [
        ("created", "queued"), ("queued", "queued"), ("deferred", "queued"), ("scheduled", "queued"),
        ("ready_to_enqueue", "queued"), ("rate_limited", "queued"), ("started", "processing"),
        ("finished", "completed"), ("failed", "failed"), ("stopped", "cancelled"), ("canceled", "cancelled"),
    ],
)  # fmt: skip
def test_every_word_of_rq(word: str, status: str) -> None:
    seen = rq.read_job("j", {"status": word.encode(), "created_at": b""}, None, 5)
    assert isinstance(seen, Sighting)
    assert seen.status == status
