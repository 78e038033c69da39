"""Of what goes wrong in a job people see what it was, and nothing of where: no line of a stack, wherever it stands."""

from __future__ import annotations

import base64
import json
import traceback
import zlib
from collections.abc import Callable

import pytest

from protocol.queues.bull4 import read_message
from protocol.queues.bullmq import read_event, read_hash
from protocol.queues.celery import Told, read_events, read_result
from protocol.queues.payload import reason, text
from protocol.queues.rq import read_job

# What stands in stacks alone.
HIDDEN = ("Traceback", "File", ".py", ".js", "hunter2", "most recent", "raise ", "During handling")


def raised(by: Callable[[], object]) -> str:
    try:
        by()
    except BaseException:
        return traceback.format_exc()
    raise AssertionError("it did not raise")


def plain() -> None:
    password = "hunter2"
    raise ValueError("bad input") if password == "hunter2" else KeyError


def chained() -> None:
    try:
        plain()
    except ValueError as error:
        raise RuntimeError("it went wrong") from error


def group() -> None:
    errors: list[Exception] = []
    for _ in range(2):
        try:
            plain()
        except ValueError as error:
            errors.append(error)
    raise ExceptionGroup("two of two", [ExceptionGroup("inner", errors)])


def group_after_another() -> None:
    try:
        group()
    except ExceptionGroup:
        raise ExceptionGroup("the last", [KeyError("hunter2")]) from None


def last_of_groups() -> None:
    try:
        group()
    except ExceptionGroup:
        group_after_another()


NODE = "it went wrong\n    at login (/srv/hunter2/jobs.js:7:3)\n    at async run (file:///srv/hunter2/jobs.js:9:1)"
ERRORS = [
    ("it went wrong", "it went wrong"),
    ("two lines\nof a message", "two lines\nof a message"),
    ("at least one file is needed\nat most ten", "at least one file is needed\nat most ten"),
    (raised(plain), "ValueError: bad input"),
    (raised(chained), "RuntimeError: it went wrong"),
    (raised(group), "ExceptionGroup: two of two (1 sub-exception)"),
    (raised(group_after_another), "ExceptionGroup: the last (1 sub-exception)"),
    (raised(last_of_groups), "ExceptionGroup: the last (1 sub-exception)"),
    (f"export failed: {raised(plain)}", "export failed:"),
    (f"export failed\n{raised(chained)}", "export failed"),
    (f"export failed\n{raised(group)}", "export failed"),
    ("export failed\n" + "".join(traceback.format_stack()), "export failed"),
    (f"   {raised(plain)}".replace("\n", "\n   "), "ValueError: bad input"),
    (NODE, "it went wrong"),
    (f"Error: {NODE}\n  [cause]: Error: hunter2\n      at x (/srv/hunter2.js:1:1)", "Error: it went wrong"),
    ("at Object.run (/srv/hunter2/jobs.js:7:3)\n    at y (/srv/hunter2/jobs.js:8:3)", None),
    ('  File "/srv/hunter2/tasks.py", line 7, in run\n    login()', None),
    (raised(chained).rpartition("\n    ")[0] + "\n    login(password='hunter2')", None),
    ("", None),
]


@pytest.mark.parametrize(("said", "shown"), ERRORS)
def test_what_is_left_of_an_error(said: str, shown: str | None) -> None:
    assert reason(said) == shown
    assert not [word for word in HIDDEN if word in (shown or "")]


def test_the_same_from_every_queue() -> None:
    for said, _ in ERRORS:
        of_event = read_event("q", "1-1", {"event": "failed", "jobId": "1", "failedReason": said, "stacktrace": said})
        of_hash = read_hash("q", "1", {"failedReason": said, "stacktrace": said}, "failed", 1, results=True)
        of_bull = read_message("q", "failed", json.dumps({"jobId": "1", "val": said, "stacktrace": said}), 1)
        trace = zlib.compress(said.encode())
        data = {"status": b"failed", "created_at": b"x", "exc_info": trace}
        of_rq = read_job("1", data, None, 1, results=True)
        of_rq_result = read_job("1", data, {"exc_string": base64.b64encode(trace)}, 1, results=True)
        for seen in (of_event, of_hash, of_bull, of_rq, of_rq_result):
            assert seen is not None
            assert seen.error
            assert seen.message == seen.error
            assert not [word for word in HIDDEN if word in seen.error], (said, seen.error)


@pytest.mark.parametrize("said", ["null", "undefined", "", None])
def test_what_was_thrown_says_nothing(said: str | None) -> None:
    fields = {"event": "failed", "jobId": "1"} | ({} if said is None else {"failedReason": said})
    for seen in (read_event("q", "1-1", fields), read_hash("q", "1", fields, "failed", 1, results=False)):
        assert seen is not None
        assert seen.error == seen.message == "failed"


@pytest.mark.parametrize("state", ["FAILURE", "RETRY", "REVOKED", "REJECTED"])
def test_of_celery_what_an_exception_was_given(state: str) -> None:
    for said, _ in ERRORS:
        for given in ([said], ["export", said], [7, said, {"password": "hunter2"}], said):
            report = {"exc_type": "Broken", "exc_message": given, "exc_module": "tasks"}
            told = read_result(json.dumps({"task_id": "t", "status": state, "result": report, "traceback": said}), 1)
            assert told is not None
            for shown in (told.seen.error, told.seen.message):
                assert not [word for word in HIDDEN if word in (shown or "")], (said, shown)


@pytest.mark.parametrize(
    ("exception", "shown"),
    [
        ("ValueError('bad input')", "ValueError: bad input"),
        ("ValueError('bad input',)", "ValueError: bad input"),
        ("ValueError()", "ValueError"),
        ("FileNotFoundError(2, 'No such file or directory')", "FileNotFoundError: 2 No such file or directory"),
        ("HTTPError(<Response [404]>)", "HTTPError(<Response [404]>)"),
        ("<Broken: what it says>", "<Broken: what it says>"),
        (repr(RuntimeError(f"export failed\n{raised(chained)}")), "RuntimeError: export failed"),
        (f"Broken(<object>, {raised(chained)!r})", "Broken"),
        (f"Broken({'x' * 20_000 + raised(chained)!r})", "Broken"),
    ],
)
def test_of_celery_what_repr_makes_of_an_exception(exception: str, shown: str) -> None:
    event = {"type": "task-failed", "uuid": "t", "exception": exception, "traceback": raised(chained)}
    envelope = {"content-type": "application/json", "body": json.dumps(event), "properties": {}}
    (told,) = read_events(json.dumps(envelope), 1)
    assert isinstance(told, Told)
    assert told.seen.error == told.seen.message == shown
    event["type"] = "task-retried"
    (told,) = read_events(json.dumps(envelope | {"body": json.dumps(event)}), 1)
    assert isinstance(told, Told)
    assert not [word for word in HIDDEN if word in (told.seen.message or "")]


def test_many_blanks_before_a_traceback_take_no_time() -> None:
    """So many took minutes, when they were looked for by a pattern that begins anew at each of them."""
    assert reason("boom" + " |+" * 100_000 + "x Traceback (most recent call last):\n  File") == text(
        "boom" + " |+" * 100_000 + "x"
    )
