"""Views as pure functions: targets, words for fields, errors that people may see."""

from __future__ import annotations

import json
from typing import Any, get_args

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import UNSET, Raw

from protocol.errors import ApiError
from protocol.fields import FIELD_NAMES, decode_fields, is_id
from protocol.job import apply, create, record_of
from protocol.update import Job
from protocol.view import MAX_ERROR, View, control, encode_safe, in_words, one_line, read_update, target_of
from protocol.views import all_views, reports

TASKS, REPORTS = all_views()["tasks"], all_views()["reports"]
TASK = target_of(TASKS, {"app": "a", "taskId": "t"})
REPORT = target_of(REPORTS, {"projectId": "p"})


def settled(job: Job | None, **given: object) -> Job:
    """What one update makes of a report, as a broker would have it."""
    fields = REPORTS.settle(job, read_update(REPORTS, REPORT, {}, json.dumps(given).encode()))
    if job is None:
        return create(fields, job_id=REPORT.job_id, user_id="u", offset=1, now_ms=1000)
    return apply(job, fields, offset=job.latest.offset + 1, now_ms=2000)


def state(job: Job) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(REPORTS.state(job.latest))
    return found


def test_all_are_found() -> None:
    assert {"jobs", "tasks", "reports"} <= set(all_views())
    for name, view in all_views().items():
        assert view.name == name
        for word in view.fields.values():
            assert word == "" or word in FIELD_NAMES, (name, word)


def test_a_path_names_a_job() -> None:
    assert TASK == ("t", "a")
    assert REPORT == ("report:p", "initial-report")
    for view, params in (
        (TASKS, {"app": "a", "taskId": "a/b"}),
        (TASKS, {"app": "", "taskId": "t"}),
        (REPORTS, {"projectId": "x" * 122}),
    ):
        with pytest.raises(ApiError) as refused:
            target_of(view, params)
        assert (refused.value.status, refused.value.code) == (400, "invalid_parameter")
    assert is_id(target_of(REPORTS, {"projectId": "x" * 121}).job_id)


def test_an_update_is_read_in_the_views_words() -> None:
    fields = read_update(TASKS, TASK, {}, b'{"status":"running","results":[1],"taskId":"t"}')
    assert (fields.status, bytes(fields.result), fields.kind, fields.progress) == ("processing", b"[1]", "a", UNSET)
    assert read_update(TASKS, TASK, {"status": "failed"}, b"").status == "failed"
    assert read_update(TASKS, TASK, {"status": "failed"}, b'{"status":"running"}').status == "failed"


def test_refusals_have_the_views_words() -> None:
    plain = ApiError(409, "job_ended", "the job is over")
    assert in_words(TASKS, plain) is plain
    gone = in_words(REPORTS, ApiError(404, "job_not_found", ""), "report:p")
    assert (gone.code, gone.message) == ("project_not_found", "there is no project 'p' that you may see")
    inner = in_words(TASKS, ApiError(422, "invalid_field", "result.x: bad", field="result.x"))
    assert (inner.field, inner.message) == ("results.x", "results.x: bad")


@given(st.text(max_size=3 * MAX_ERROR))
def test_an_error_is_one_line_whatever_it_was(text: str) -> None:
    line = one_line(text)
    assert len(line) <= MAX_ERROR
    assert len(line.splitlines()) <= 1
    assert line == line.strip()
    assert not any(ord(char) < 32 or 0x7F <= ord(char) < 0xA0 for char in line)
    assert one_line(line) == line


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", ""),
        ("\n\t\n", ""),
        ("plain", "plain"),
        ("\n first \nsecond", "first"),
        ("Traceback (most recent call last):\n  File 'x'\nKeyError: 'a'\n", "KeyError: 'a'"),
        ("red \x1b[31mtext\x00", "red  [31mtext"),
        ("left\u202eright", "left right"),
    ],
)
def test_errors_for_people(text: str, line: str) -> None:
    assert one_line(text) == line


@given(st.recursive(st.text() | st.integers(-(2**53), 2**53), st.lists, max_leaves=8))
def test_safe_json_means_the_same(value: object) -> None:
    text = encode_safe(value)
    assert b"<" not in text
    assert json.loads(text) == value


def test_control_messages_show_the_facts_there_are() -> None:
    error = control(TASKS, "error", {"id": "t", "now": 5, "message": "m"})
    assert error is not None
    assert json.loads(error.text) == {"type": "error", "taskId": "t", "message": "m", "timestamp": 5}
    assert control(TASKS, "reset", {}) is None
    beat = control(REPORTS, "heartbeat", {})
    assert beat is not None
    assert beat.event == "heartbeat"


PUBLISHED = st.fixed_dictionaries(
    {},
    optional={
        "dataFreshness": st.sampled_from(["new", "existing", "mixed", None]),
        "reportId": st.sampled_from(["r1", "r2", None]),
        "dataCompletenessScore": st.integers(0, 100),
        "competitorSnapshotsStatus": st.none()
        | st.fixed_dictionaries({}, optional={"captured": st.integers(0, 9), "total": st.integers(0, 9)}),
    },
)


@given(st.lists(PUBLISHED, min_size=1, max_size=8))
def test_details_add_up_like_updates_of_an_object(updates: list[dict[str, Any]]) -> None:
    """A merge by field; of the snapshots by field, too. Null clears."""
    job: Job | None = None
    expected: dict[str, Any] = {}
    for update in updates:
        job = settled(job, **update)
        for name, value in update.items():
            if isinstance(value, dict):
                expected[name] = expected.get(name, {}) | value
            elif value is None:
                expected.pop(name, None)
            else:
                expected[name] = value
    assert job is not None
    shown = state(job)
    for name in ("dataFreshness", "reportId", "dataCompletenessScore"):
        assert shown.get(name) == expected.get(name)
    snapshots = expected.get("competitorSnapshotsStatus")
    assert shown.get("competitorSnapshotsStatus") == (
        None if snapshots is None else {"captured": 0, "total": 0} | snapshots
    )


@pytest.mark.parametrize(
    ("captured", "total", "progress"), [(0, 0, 10), (0, 4, 10), (1, 4, 20), (4, 4, 50), (9, 4, 50), (1, 3, 10 + 40 / 3)]
)
def test_capturing_goes_from_10_to_50(captured: int, total: int, progress: float) -> None:
    job = settled(None, phase="snapshot_capture", competitorSnapshotsStatus={"captured": captured, "total": total})
    assert state(job)["progress"] == pytest.approx(progress)


@pytest.mark.parametrize(
    ("phase", "progress", "status"),
    [
        ("validation", 5, "generating"), ("snapshot_capture", 10, "generating"), ("data_collection", 55, "generating"),
        ("analysis", 75, "generating"), ("report_generation", 90, "generating"), ("completed", 100, "completed"),
    ],
)  # fmt: skip
def test_each_phase_has_its_progress(phase: str, progress: float, status: str) -> None:
    shown = state(settled(None, phase=phase))
    assert (shown["phase"], shown["progress"], shown["status"]) == (phase, progress, status)


def test_the_usual_time_is_shown_until_it_is_over() -> None:
    job = settled(None, phase="validation")
    assert state(job)["estimatedCompletionTime"] == "1970-01-01T00:00:46.000Z"
    late = apply(job, read_update(REPORTS, REPORT, {}, b'{"message":"still"}'), offset=2, now_ms=47_000)
    assert "estimatedCompletionTime" not in state(late)


def test_what_is_kept_of_a_report_is_bounded() -> None:
    job = settled(None)
    odd = apply(
        job,
        read_update(
            TASKS,
            target_of(TASKS, {"app": "initial-report", "taskId": "report:p"}),
            {},
            json.dumps({"metadata": {"mine": "x" * 65_000}}).encode(),
        ),
        offset=2,
        now_ms=1,
    )
    with pytest.raises(ApiError) as refused:
        settled(odd, reportId="r" * 512)
    assert refused.value.status == 422
    assert state(settled(odd, message="fine"))["message"] == "fine"


NUMBERS = st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False)
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["captured", "total", "a"]), inner),
    max_leaves=5,
)


@given(st.dictionaries(st.sampled_from([*REPORTS.fields, "mine"]), JSON_VALUES), st.text(max_size=9), JSON_VALUES)
def test_whatever_others_put_there_is_shown_or_left_out_and_spoils_nothing(
    metadata: dict[str, Any], stage: str, result: object
) -> None:
    """Published in the words of jobs, which know nothing of a report's details."""
    jobs = decode_fields({"kind": "initial-report", "metadata": metadata, "stage": stage, "result": result})
    job = create(jobs, job_id="report:p", user_id="u", offset=1, now_ms=1)
    shown = state(job)
    assert shown.get("dataFreshness", "new") in ("new", "existing", "mixed")
    after = settled(job, phase="snapshot_capture", competitorSnapshotsStatus={"captured": 1, "total": 2})
    assert state(after)["progress"] == 30
    kept = record_of(after).metadata
    assert isinstance(kept, Raw)
    assert json.loads(bytes(kept)).get("mine") == metadata.get("mine")
    for view in all_views().values():
        json.loads(view.state(job.latest))
        for message in view.render(job.latest) if view.render is not None else ():
            json.loads(message.text)


def test_what_is_described_is_what_is_taken() -> None:
    """The types for the API's description name the fields and words that are read and shown."""
    described = msgspec.structs.fields(reports.Published)
    assert {field.encode_name for field in described} <= set(REPORTS.fields)
    (phases,) = (field.type for field in described if field.name == "phase")
    assert get_args(get_args(phases)[0]) == tuple(reports.PHASES)
    assert set(reports.STATUSES.values()) == set(get_args(reports.Words)) == set(REPORTS.statuses)


def test_a_view_is_compared_by_identity() -> None:
    assert isinstance(TASKS, View)
    assert TASKS != REPORTS
    assert len({TASKS, REPORTS, TASKS}) == 2
