"""Celery: what was captured of it, with events and without, comes to the right records."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest

from protocol.queues.celery import Attempts, Beat, Told, read_events, read_result
from tests.protocol.queues.replaying import Replay, captured

CELERY = captured("celery")
ENCODE, FLAKY, BAD, SLOW, LATE = (
    "702ec824-0f5f-405e-8fc8-f9b327a5ec90",
    "a10222d0-3fe1-4306-ab27-81451ee74a07",
    "f871f54d-39af-4c73-96b1-af69a96f6ccb",
    "9080f04b-0c7c-44e9-9820-2e444346fa35",
    "3e4f3f2d-63cb-4fdc-8cec-040300bb4ad9",
)
HEARD = 1_795_295_798_000


def hear(done: Replay, attempts: Attempts, message: dict[str, Any], at_ms: int = HEARD, **more: Any) -> list[bool]:
    channel, data = message["channel"], message["data"]
    told: list[Told | Beat]
    if channel.startswith("celery-task-meta-"):
        one = read_result(data, at_ms, **more)
        told = [] if one is None else [one]
    else:
        told = read_events(data, at_ms, **({"user": more["user"]} if "user" in more else {}))
    return [done.see(attempts.place(done.known(one.seen.job), one)) for one in told if isinstance(one, Told)]


def replay(messages: list[dict[str, Any]], **more: Any) -> Replay:
    done, attempts = Replay("celery"), Attempts()
    for number, message in enumerate(messages):
        hear(done, attempts, message, HEARD + number, **more)
    return done


def test_events_and_results_together() -> None:
    done = replay(CELERY["with_events_flag_E"])
    assert done.of(ENCODE) == [
        ("queued", 0, None),
        ("processing", 0, None),
        # The published state names the process too; the status was known from the event.
        ("processing", 25, "Encoding"),
        ("processing", 60, "Encoding pass 2"),
        ("processing", 60, "via send_event"),
        ("completed", 100, "via send_event"),
    ]
    assert done.of(FLAKY) == [
        ("queued", 0, None),
        ("processing", 0, None),
        ("queued", 0, None),
        ("queued", 0, "ffmpeg exited with code 1"),
        ("processing", 0, None),
        ("failed", 0, "ValueError: ffmpeg exited with code 1"),
    ]
    assert done.of(BAD)[-1] == ("failed", 0, "RuntimeError: boom")
    assert done.of(SLOW)[-1] == ("cancelled", 0, "TaskRevokedError: terminated")
    assert done.of(LATE)[-1] == ("completed", 100, "via send_event")
    assert {name: done.shown(name)["attempt"] for name in done.jobs} == {ENCODE: 1, FLAKY: 2, BAD: 1, SLOW: 1, LATE: 1}
    first = done.shown(ENCODE)
    assert (first["userId"], first["kind"], first["workerId"]) == ("user_789", "tasks.encode", "celery@worker1")
    assert first["timestamp"] == "2026-11-21T21:16:38.351Z"
    assert done.shown(BAD)["userId"] == "queue:celery"


def test_results_alone() -> None:
    done = replay(CELERY["without_E"])
    encode, flaky, bad, revoked, late = done.jobs
    assert done.of(encode) == [
        ("processing", 0, None),
        ("processing", 25, "Encoding"),
        ("processing", 60, "Encoding pass 2"),
        ("processing", 60, "via send_event"),
        ("completed", 100, "via send_event"),
    ]
    assert done.of(flaky) == [
        ("processing", 0, None),
        ("queued", 0, "ffmpeg exited with code 1"),
        ("processing", 0, None),
        ("failed", 0, "ValueError: ffmpeg exited with code 1"),
    ]
    assert [done.shown(name)["status"] for name in (bad, revoked, late)] == ["failed", "cancelled", "completed"]
    assert done.shown(flaky)["attempt"] == 2
    text = json.dumps([done.shown(name) for name in done.jobs])
    assert "Traceback" not in text
    assert ".py" not in text
    assert "/out/" not in text


def test_extended_results_name_the_owner_by_themselves() -> None:
    messages = CELERY["with_E_result_extended_and_sent_event"]
    done = replay([message for message in messages if message["channel"].startswith("celery-task-meta-")])
    (name,) = done.jobs
    record = done.shown(name)
    assert (record["userId"], record["kind"], record["workerId"]) == ("user_789", "tasks.encode", "celery@worker1")
    assert done.of(name)[-1] == ("completed", 100, "Encoding pass 2")
    assert "a.mov" not in json.dumps(record)
    both = replay(messages, results=True)
    assert both.shown(name)["result"] == {"url": "/out/1.mp4"}
    assert both.of(name)[0] == ("queued", 0, None)


@pytest.mark.parametrize("which", ["with_events_flag_E", "without_E"])
def test_said_twice_is_said_once_and_another_node_may_go_on_anywhere(which: str) -> None:
    messages = CELERY[which]
    once = replay(messages)
    for cut in range(0, len(messages), 3):
        done, attempts = Replay("celery"), Attempts()
        for number, message in enumerate(messages):
            if number == cut:
                attempts = Attempts()
            hear(done, attempts, message, HEARD + number)
            if "RETRY" not in message["data"] and "retried" not in json.dumps(message.get("decoded_body")):
                assert not any(hear(done, attempts, message, HEARD + number))
        ends = {name: done.of(name)[-1] for name in done.jobs}
        assert ends == {name: once.of(name)[-1] for name in once.jobs}


def test_a_state_of_the_tasks_own_is_a_stage() -> None:
    done = Replay()
    data = {"task_id": "t", "status": "TRANSCODING", "result": {"current": 1, "total": 8, "status": "first"}}
    told = read_result(json.dumps(data), HEARD)
    assert told is not None
    assert done.see(told.seen)
    record = done.shown("t")
    assert (record["status"], record["progress"], record["message"], record["stage"]) == (
        "processing",
        12.5,
        "first",
        "TRANSCODING",
    )


def test_retries_without_any_start_are_counted() -> None:
    done, attempts = Replay(), Attempts()
    for state in ("RETRY", "RETRY", "SUCCESS"):
        data = {"task_id": "t", "status": state, "result": {"exc_type": "E", "exc_message": ["again"]}}
        told = read_result(json.dumps(data), HEARD)
        assert told is not None
        assert done.see(attempts.place(done.known("t"), told))
    record = done.shown("t")
    assert (record["status"], record["attempt"]) == ("completed", 3)


def test_late_events_of_an_attempt_that_is_over_change_nothing() -> None:
    messages = CELERY["with_events_flag_E"]
    done, attempts = Replay("celery"), Attempts()
    for message in messages:
        if message["channel"].startswith("celery-task-meta-"):
            hear(done, attempts, message, user="kwargs.nobody")
    before = list(done.rows)
    for message in messages:
        if not message["channel"].startswith("celery-task-meta-"):
            hear(done, attempts, message, user="kwargs.nobody")
    assert done.rows == before


def test_an_owner_who_is_named_after_the_end_is_given_the_job_as_it_ended() -> None:
    """Results are told at once, events a moment later: a task that was revoked at once ends before it is announced."""
    messages = CELERY["with_events_flag_E"]
    done, attempts = Replay("celery"), Attempts()
    for results in (True, False):
        for message in messages:
            if message["channel"].startswith("celery-task-meta-") is results:
                hear(done, attempts, message)
    known = done.known(ENCODE)
    assert known is not None
    assert (known.owner, known.status, known.progress, known.attempt) == ("user_789", "completed", 100, 1)


def test_a_task_that_was_delivered_again_after_its_worker_was_lost() -> None:
    done, attempts = Replay(), Attempts()

    def say(state: str) -> bool:
        told = read_result(json.dumps({"task_id": "t", "status": state, "result": None}), HEARD)
        assert told is not None
        return done.see(attempts.place(done.known("t"), told))

    assert say("STARTED")
    assert say("SUCCESS")
    assert say("STARTED")
    assert (done.shown("t")["status"], done.shown("t")["attempt"]) == ("processing", 2)
    assert say("SUCCESS")
    assert done.shown("t")["status"] == "completed"


def envelope(body: bytes, kind: str = "application/json") -> str:
    properties = {"body_encoding": "base64"}
    return json.dumps({"body": base64.b64encode(body).decode(), "content-type": kind, "properties": properties})


@pytest.mark.parametrize(
    "data",
    [
        "",
        "[]",
        "{}",
        '{"content-type":"application/json","body":1,"properties":{}}',
        '{"content-type":"application/json","body":"%%%","properties":{"body_encoding":"base64"}}',
        envelope(b"{"),
        envelope(b"7"),
        envelope(b'[7,{"type":7},{"type":"task-started"},{"type":"task-started","uuid":7},{"type":"x","uuid":"1"}]'),
        envelope(b'{"type":"task-started","uuid":"1"}', "application/x-python-serialize"),
        "[" * 100_000,
    ],
)
def test_events_that_are_not_in_form_are_passed_over(data: str) -> None:
    assert read_events(data, HEARD) == []


@pytest.mark.parametrize(
    "data", ["", "x", "[]", "{}", '{"task_id":"t"}', '{"task_id":"","status":"STARTED"}', '{"task_id":"t","status":1}']
)
def test_results_that_are_not_in_form_are_passed_over(data: str) -> None:
    assert read_result(data, HEARD) is None


def test_heartbeats_are_told_apart() -> None:
    beats = [
        beat
        for message in CELERY["without_E"]
        if "worker." in message["channel"]
        for beat in read_events(message["data"], HEARD)
    ]
    assert [(beat.worker, beat.leaves) for beat in beats if isinstance(beat, Beat)] == [
        ("celery@worker1", False),
        ("celery@worker1", False),
        ("celery@worker1", True),
    ]


@pytest.mark.parametrize(
    "kwargs", ["{'user_id': ['x']}", "{'user_id': 'a b'}", "{'user_id': __import__('os')}", "...", "(" * 500]
)
def test_arguments_that_name_no_owner(kwargs: str) -> None:
    body = {"type": "task-received", "uuid": "t", "kwargs": kwargs, "retries": 0}
    (told,) = read_events(envelope(json.dumps(body).encode()), HEARD)
    assert isinstance(told, Told)
    assert told.seen.owner is None
