"""Whatever stands in a queue's Redis, reading it raises nothing, and what it comes to is an update like any other.

One payload that could not be read would end the session of a whole source, again and again.
"""

from __future__ import annotations

import json
import pickle
import warnings
import zlib
from collections.abc import Iterable
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from protocol.fields import MAX_TEXT
from protocol.queues import bull4, bullmq, celery, rq
from protocol.queues.celery import Attempts, Told
from protocol.queues.sighting import Sighting
from tests.protocol.queues.replaying import Replay

WORDS = st.sampled_from([
    "jobId", "event", "data", "delay", "prev", "failedReason", "returnvalue", "name", "progress", "percent", "current",
    "total", "message", "stage", "status", "result", "task_id", "retries", "kwargs", "args", "exc_type", "exc_message",
    "date_done", "worker", "hostname", "uuid", "type", "timestamp", "exception", "eta", "userId", "user_id", "val",
    "meta", "ats", "atm", "attemptsMade", "processedOn", "finishedOn", "created_at", "ended_at", "started_at", "origin",
])  # fmt: skip
VALUES = st.sampled_from([
    "completed", "failed", "active", "waiting", "delayed", "stalled", "removed", "added", "progress", "PROGRESS",
    "SUCCESS", "FAILURE", "RETRY", "STARTED", "REVOKED", "task-started", "task-failed", "task-retried", "task-received",
    "task-x", "worker-heartbeat", "finished", "started", "queued", "canceled", "1", "-1", "1e400", "9" * 5000,
    "2026-01-01T00:00:00Z", "9999-12-31T23:59:59.999999-23:59", "0001-01-01T00:00:00+23:59", "\udcff", "\0", "a:b",
    f"E({'9' * 4000})", f"E(0x{'f' * 16000})", "E('\\d')", "E((((", "[" * 5000, '{"percent": 1e999}', "NaN",
])  # fmt: skip
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | VALUES
    | st.sampled_from([10**400, -(10**400), 1 << 80, -1]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(WORDS | st.text(max_size=3), inner, max_size=6),
    max_leaves=12,
)  # fmt: skip
TEXTS = st.dictionaries(WORDS, VALUES | ANYTHING.map(lambda value: json.dumps(value)[:3000]), max_size=8)


def check(seen: Iterable[Sighting | None]) -> None:
    """Each becomes an update that the rules take, or nothing."""
    done = Replay("src")
    for one in seen:
        if one is not None:
            done.see(one)
    for job in done.jobs.values():
        body = msgspec.json.decode(job.latest.body)
        assert 0 <= body["progress"] <= 100
        for name in ("message", "stage", "error", "kind", "workerId"):
            assert len(body.get(name, "").encode()) <= MAX_TEXT
        assert "userId" in body


@given(st.lists(TEXTS, max_size=6), TEXTS, st.booleans())
def test_bullmq_and_bull(entries: list[dict[str, str]], of_job: dict[str, str], results: bool) -> None:
    sightings = []
    for number, fields in enumerate(entries):
        seen = bullmq.read_event("q", f"{number}-1", {"jobId": "1", **fields}, results=results)
        if seen is not None:
            bullmq.describe(seen, of_job, "data.userId")
            sightings.append(seen)
    for place in bullmq.PLACES:
        sightings.append(bullmq.read_hash("q", "1", of_job, place, 0, results=results))
    for event in bull4.TAKEN:
        data = json.dumps({"jobId": "1", **of_job})
        seen = bull4.read_message("q", event, data, 5, results=results)
        if seen is not None:
            sightings.append(seen)
    check(sightings)


@given(st.lists(ANYTHING, max_size=6), st.booleans())
@example([{"status": "FAILURE", "result": {"exc_type": "E", "exc_message": [10**400, 1 << 80]}}], False)
@example([{"type": "task-failed", "exception": f"E(0x{'f' * 16000})"}], False)
@example([{"type": "task-received", "kwargs": "{'user_id': 0x" + "f" * 9000 + "}"}], True)
def test_celery(documents: list[Any], results: bool) -> None:
    told: list[Told] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of texts that look like Python
        for document in documents:
            document = {"task_id": "t", "uuid": "t", **document} if isinstance(document, dict) else document
            text = json.dumps(document)
            one = celery.read_result(text, 5, results=results)
            told += [] if one is None else [one]
            for properties in ({}, {"body_encoding": "base64"}, None, []):
                envelope = {"content-type": "application/json", "body": text, "properties": properties}
                told += [one for one in celery.read_events(json.dumps(envelope), 5) if isinstance(one, Told)]
    attempts, done = Attempts(), Replay("src")
    check(attempts.place(done.known("t"), one) for one in told)


@given(st.dictionaries(WORDS, VALUES | st.text()), ANYTHING, ANYTHING, st.booleans())
def test_rq(fields: dict[str, str], meta: Any, call: Any, results: bool) -> None:
    data = {name: text.encode("utf-8", "surrogateescape") for name, text in fields.items()}
    data |= {"created_at": b"x", "meta": pickle.dumps(meta), "data": zlib.compress(pickle.dumps(call))}
    for status in rq.STATUSES:
        for result in ({}, {"exc_string": data["meta"], "return_value": data["data"]}):
            check([rq.read_job("j", data | {"status": status.encode()}, result, 5, results=results)])


@pytest.mark.parametrize("number", ["9" * 5000, "0x" + "f" * 16000])
def test_a_number_beyond_all_measure_is_no_text(number: str) -> None:
    told = celery.read_events(
        json.dumps({
            "content-type": "application/json", "properties": {},
            "body": json.dumps({"type": "task-failed", "uuid": "t", "exception": f"Broken({number})"}),
        }),
        5,
    )  # fmt: skip
    assert isinstance(told[0], Told)
    assert told[0].seen.error is not None
    assert len(told[0].seen.error) <= MAX_TEXT
