"""The rules of a job, one by one."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given as given_any
from hypothesis import strategies as st

from protocol import job as job_rules
from protocol.errors import ApiError
from protocol.fields import Fields, decode_fields
from protocol.job import MAX_ANCESTORS, TRANSITIONS, apply, create, delete, expire, is_repeat, record_of, request_cancel
from protocol.update import ENDED, STATUSES, Job, Private, format_time

START_MS = 1_700_000_000_000
START = "2023-11-14T22:13:20.000Z"


def fields(**given: Any) -> Fields:
    return decode_fields(json.dumps(given).encode())


def new(now_ms: int = START_MS, offset: int = 1, parent: Job | None = None, **given: Any) -> Job:
    return create(fields(**given), job_id="job_1", user_id="u1", parent=parent, offset=offset, now_ms=now_ms)


def then(job: Job, seconds: float = 1, **given: Any) -> Job:
    now_ms = job.latest.at_ms + round(seconds * 1000)
    return apply(job, fields(**given), offset=job.latest.offset + 1, now_ms=now_ms)


def shown(job: Job) -> dict[str, Any]:
    body = json.loads(job.latest.body)
    assert isinstance(body, dict)
    return body


def refused(job: Job, **given: Any) -> str:
    with pytest.raises(ApiError) as caught:
        then(job, **given)
    assert caught.value.status == 409
    return caught.value.code


UPDATES = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "status": st.sampled_from(("processing", "completed", "failed")),
            "progress": st.sampled_from((0, 12.5, 45.0, 99)),
            "message": st.sampled_from(("said", "", "ä" * 20, None)),
            "attempt": st.integers(1, 3),
            "reset": st.booleans(),
            "steps": st.sampled_from(({"done": 1, "total": 2}, None)),
            "result": st.sampled_from(({"rows": [1, 2.0]}, None)),
            "metadata": st.sampled_from(({"k": "v" * 3000}, {})),
            "estimatedTimeRemaining": st.sampled_from((30, 7.5, None)),
            "kind": st.sampled_from(("export", None)),
            "ttl": st.just(5),
        },
    ),
    max_size=12,
)


def followed(updates: list[dict[str, Any]], *, forget: bool) -> list[tuple[bytes, Private] | str]:
    """What becomes of a job, one update after the other."""
    job = new()
    outcomes: list[tuple[bytes, Private] | str] = []
    for given in updates:
        if forget:
            job_rules._recent.clear()
        try:
            job = then(job, **given)
            outcomes.append((job.latest.body, job.private))
        except ApiError as error:
            outcomes.append(error.code)
    return outcomes


@given_any(UPDATES)
def test_a_record_that_is_remembered_is_the_one_that_would_be_read(updates: list[dict[str, Any]]) -> None:
    assert followed(updates, forget=False) == followed(updates, forget=True)


def test_what_is_remembered_is_not_taken_for_another_state_of_the_job() -> None:
    first = new(message="first")
    second = then(first, message="second", stage="s")
    assert "stage" not in shown(then(first, progress=1))  # the store has lost the second one
    assert shown(then(second, progress=1))["stage"] == "s"


def test_few_records_are_remembered_and_no_large_ones() -> None:
    for number in range(job_rules._MOST_RECENT + 50):
        create(fields(), job_id=f"many{number}", user_id="u", offset=number + 1, now_ms=START_MS)
    assert len(job_rules._recent) == job_rules._MOST_RECENT
    new(metadata={"k": "v" * job_rules._RECENT_BYTES})
    assert "job_1" not in job_rules._recent
    assert then(new(), status="completed").latest.job_id not in job_rules._recent


def test_first_update_is_queued_with_everything_that_is_always_shown() -> None:
    job = new()
    assert shown(job) == {
        "jobId": "job_1",
        "userId": "u1",
        "status": "queued",
        "progress": 0,
        "attempt": 1,
        "version": 1,
        "createdAt": START,
        "timestamp": START,
    }
    update = job.latest
    assert (update.offset, update.at_ms, update.type, update.version) == (1, START_MS, "status_update", 1)
    assert (update.ended, update.urgent, job.created) == (False, True, 1)


def test_an_update_is_a_merge_by_top_level_field() -> None:
    job = new(stage="a", metadata={"x": 1, "y": 2}, steps={"done": 1, "total": 3}, result={"r": 1}, kind="export")
    job = then(job, message="hello", metadata={"z": 3}, steps={"done": 2})
    record = shown(job)
    assert (record["stage"], record["message"], record["metadata"], record["steps"], record["result"]) == (
        "a",
        "hello",
        {"z": 3},
        {"done": 2},
        {"r": 1},
    )
    assert (record["version"], job.latest.kind, job.created) == (2, "export", 1)


def test_null_clears_and_is_omitted() -> None:
    everything: dict[str, Any] = {
        "kind": "k",
        "stage": "s",
        "message": "m",
        "currentOperation": "o",
        "workerId": "w",
        "error": "e",
        "steps": {"done": 1},
        "metadata": {},
        "result": 0,
        "estimatedTimeRemaining": 5,
        "ttl": 5,
    }
    job = new(status="processing", **everything)
    assert set(everything) - {"ttl"} < set(shown(job))
    assert job.private.ttl == 5
    nothing: dict[str, Any] = dict.fromkeys(everything)
    cleared = then(job, **nothing)
    assert not (set(everything) | {"estimatedCompletionTime"}) & set(shown(cleared))
    assert cleared.private.ttl is None
    assert cleared.latest.kind is None


def test_whole_numbers_stay_whole() -> None:
    assert b'"progress":45,' in new(progress=45.0).latest.body
    assert b'"progress":45.5,' in new(progress=45.5).latest.body
    assert b'"progress":0,' in new(progress=-0.0).latest.body


def test_progress_never_goes_back_unless_reset() -> None:
    job = then(new(progress=50, status="processing"), progress=40, message="still applies")
    assert (shown(job)["progress"], shown(job)["message"], shown(job)["version"]) == (50, "still applies", 2)
    job = then(job, progress=10, reset=True)
    assert shown(job)["progress"] == 10
    assert shown(then(job, progress=12))["progress"] == 12


def test_completed_implies_100() -> None:
    job = then(new(progress=50), status="completed", progress=70)
    record = shown(job)
    assert (record["progress"], record["endedAt"], record["startedAt"]) == (
        100,
        record["timestamp"],
        record["timestamp"],
    )
    assert (job.latest.type, job.latest.ended, job.latest.urgent) == ("job_completed", True, True)


@pytest.mark.parametrize(("status", "type_"), [("failed", "job_failed"), ("cancelled", "job_cancelled")])
def test_other_ends_keep_their_progress(status: str, type_: str) -> None:
    job = then(new(progress=50), status=status, error="boom")
    assert (shown(job)["progress"], shown(job)["error"], job.latest.type) == (50, "boom", type_)


@pytest.mark.parametrize(("before", "after"), list(itertools.product(STATUSES, STATUSES)))
def test_every_transition_within_an_attempt(before: str, after: str) -> None:
    job = new(status=before)
    if before in ENDED:
        assert refused(job, status=after) == "job_ended"
    elif before == "processing" and after == "queued":
        assert refused(job, status=after) == "bad_transition"
    else:
        job = then(job, status=after)
        assert job.latest.status == after
        assert job.latest.urgent == (after != before or after in ENDED)
    assert set(TRANSITIONS) == set(STATUSES) - {"stalled"}


@pytest.mark.parametrize(("before", "after"), list(itertools.product(STATUSES, STATUSES)))
def test_a_new_attempt_may_start_anywhere(before: str, after: str) -> None:
    assert then(new(status=before), status=after, attempt=2).latest.status == after


def test_a_stalled_job_that_had_started_cannot_be_queued_again() -> None:
    job = then(new(status="processing"), status="stalled")
    assert refused(job, status="queued") == "bad_transition"


def test_an_ended_job_is_final_even_for_an_empty_update() -> None:
    assert refused(new(status="failed")) == "job_ended"
    assert refused(new(status="failed"), attempt=1, status="failed") == "job_ended"


def test_a_new_attempt_starts_over() -> None:
    job = new(status="processing", progress=80, seq=7, stage="pages", ttl=9)
    asked = request_cancel(job, offset=2, now_ms=START_MS + 1)
    assert asked is not None
    job = then(asked, status="failed", error="boom", result={"partial": 1}, estimatedTimeRemaining=9)
    job = then(job, attempt=3, seq=0)
    record = shown(job)
    assert (record["status"], record["attempt"], record["progress"], record["stage"]) == ("processing", 3, 0, "pages")
    assert not {"error", "result", "endedAt", "estimatedTimeRemaining", "cancelRequested"} & set(record)
    assert (job.private.seq, job.private.ttl, job.private.cancel_requested) == (0, 9, False)
    assert then(job, attempt=4).private.seq == -1
    assert refused(job, attempt=2, status="completed") == "stale_attempt"
    assert shown(then(job, attempt=9, progress=30, error="again"))["error"] == "again"


def test_a_new_attempt_of_a_live_job_keeps_its_status() -> None:
    assert then(new(), attempt=2).latest.status == "queued"
    assert then(new(status="processing"), attempt=2).latest.status == "processing"
    assert then(new(status="stalled"), attempt=2).latest.status == "processing"


def test_owner_and_parent_are_fixed() -> None:
    job = new()
    assert refused(job, userId="other") == "owner_fixed"
    assert refused(job, parentId="other") == "parent_fixed"
    assert then(job, userId="u1").latest.version == 2


def test_owner_comes_before_every_other_conflict() -> None:
    job = then(new(attempt=3), status="completed", attempt=3)
    assert refused(job, userId="other", attempt=1) == "owner_fixed"
    assert refused(job, attempt=1, status="queued") == "stale_attempt"
    assert refused(job, status="queued") == "job_ended"


def test_seq_counts_within_an_attempt() -> None:
    job = new(seq=5)
    assert is_repeat(job, fields(seq=5))
    assert is_repeat(job, fields(seq=4, attempt=1, userId="other", status="completed"))
    assert not is_repeat(job, fields(seq=6))
    assert not is_repeat(job, fields(seq=5, attempt=2))
    assert not is_repeat(job, fields(progress=1))
    assert then(job, progress=3).private.seq == 5


def test_nothing_new_still_counts() -> None:
    job = then(new())
    assert (job.latest.version, job.latest.urgent) == (2, False)


def test_times() -> None:
    job = new(timestamp="2020-02-29T23:59:59.9996-01:00")
    assert shown(job)["timestamp"] == "2020-03-01T00:59:59.999Z"
    assert shown(job)["createdAt"] == START
    job = then(job, status="processing")
    assert shown(job)["startedAt"] == shown(job)["timestamp"] == "2023-11-14T22:13:21.000Z"
    job = then(job, seconds=60)
    assert (shown(job)["startedAt"], "endedAt" in shown(job)) == ("2023-11-14T22:13:21.000Z", False)
    assert format_time(-1) == "1969-12-31T23:59:59.999Z"


def test_cancel_is_recorded_once() -> None:
    job = request_cancel(new(ttl=5), offset=2, now_ms=START_MS)
    assert job is not None
    assert (shown(job)["cancelRequested"], job.latest.version, job.latest.type) == (True, 2, "status_update")
    assert job.private.heard == 1  # no sign of life of the worker
    assert request_cancel(job, offset=3, now_ms=START_MS) is None
    job = then(job, progress=5)
    assert job.private.cancel_requested
    assert shown(job)["cancelRequested"] is True
    with pytest.raises(ApiError, match="cannot be cancelled"):
        request_cancel(then(job, status="cancelled"), offset=9, now_ms=START_MS)


def test_cancel_lets_the_estimate_shrink() -> None:
    job = then(new(status="processing"), seconds=10, progress=50)
    assert shown(job)["estimatedTimeRemaining"] == 10
    asked = request_cancel(job, offset=3, now_ms=job.latest.at_ms + 4000)
    assert asked is not None
    assert shown(asked)["estimatedTimeRemaining"] == 6


def test_a_missed_lease_stalls_and_a_second_one_loses() -> None:
    job = then(new(ttl=2.5, status="processing"), seconds=10, progress=50)
    stalled = expire(job, offset=3, now_ms=START_MS + 20000)
    record = shown(stalled)
    assert (record["status"], record["error"], record["version"]) == ("stalled", "no update for 2.5 s", 3)
    assert "estimatedTimeRemaining" not in record
    assert (stalled.private.heard, stalled.latest.urgent, stalled.latest.ended) == (3, True, False)
    lost = expire(stalled, offset=4, now_ms=START_MS + 30000)
    record = shown(lost)
    assert (record["status"], record["error"], record["endedAt"]) == ("failed", "lost", record["timestamp"])
    assert lost.latest.type == "job_failed"
    assert "startedAt" in record
    # One that never began is not said to have begun when it was given up.
    assert "startedAt" not in shown(expire(expire(new(ttl=1), offset=2, now_ms=START_MS), offset=3, now_ms=START_MS))


def test_a_stalled_job_revives() -> None:
    stalled = expire(new(ttl=2), offset=2, now_ms=START_MS + 2000)
    revived = then(stalled, message="here")
    assert (revived.latest.status, "error" in shown(revived), revived.private.stall_error) == (
        "processing",
        False,
        False,
    )
    assert shown(then(stalled, error="my own"))["error"] == "my own"
    assert shown(then(stalled, status="failed", error="boom"))["error"] == "boom"
    still = then(stalled, status="stalled")
    assert shown(still)["error"] == "no update for 2 s"
    assert "error" not in shown(then(still))
    own = then(stalled, status="stalled", error="mine")
    assert shown(then(own))["error"] == "mine"  # an error of the publisher stays
    assert then(stalled, status="queued").latest.status == "queued"
    assert "error" not in shown(then(stalled, attempt=2))


def test_the_servers_estimate() -> None:
    job = new(status="processing")
    assert "estimatedTimeRemaining" not in shown(job)
    job = then(job, seconds=10, progress=25)
    assert shown(job)["estimatedTimeRemaining"] == 30
    assert shown(job)["estimatedCompletionTime"] == "2023-11-14T22:14:00.000Z"
    job = then(job, seconds=10, message="no progress")
    assert shown(job)["estimatedTimeRemaining"] == 20
    assert shown(job)["estimatedCompletionTime"] == "2023-11-14T22:14:00.000Z"
    job = then(job, seconds=60)
    assert shown(job)["estimatedTimeRemaining"] == 0
    assert "estimatedTimeRemaining" not in shown(then(job, status="stalled"))
    assert not {"estimatedTimeRemaining", "estimatedCompletionTime"} & set(shown(then(job, status="failed")))
    assert then(job, status="failed").private.eta is None


def test_a_given_estimate_wins_for_that_update() -> None:
    job = then(new(status="processing"), seconds=10, progress=25, estimatedTimeRemaining=1.5)
    assert shown(job)["estimatedTimeRemaining"] == 1.5
    assert shown(job)["estimatedCompletionTime"] == "2023-11-14T22:13:31.500Z"
    assert shown(then(job, seconds=1))["estimatedTimeRemaining"] == 1
    assert shown(then(job, seconds=10, progress=50))["estimatedTimeRemaining"] == 20
    job = then(job, estimatedCompletionTime="2023-11-14T22:20:00Z")
    assert shown(job)["estimatedTimeRemaining"] == 389
    job = then(job, estimatedCompletionTime="2023-11-14T22:20:00Z", estimatedTimeRemaining=7)
    assert shown(job)["estimatedTimeRemaining"] == 7
    assert shown(job)["estimatedCompletionTime"] == "2023-11-14T22:20:00.000Z"
    assert "estimatedCompletionTime" not in shown(then(job, estimatedTimeRemaining=None))
    assert shown(new(estimatedTimeRemaining=60))["estimatedTimeRemaining"] == 60  # a queue knows its wait
    assert "estimatedTimeRemaining" not in shown(new(status="completed", estimatedTimeRemaining=60))


def test_reset_restarts_the_estimate() -> None:
    job = then(new(status="processing"), seconds=10, progress=90)
    job = then(job, progress=0, reset=True)
    assert "estimatedTimeRemaining" not in shown(job)
    assert shown(then(job, seconds=1, progress=50))["estimatedTimeRemaining"] == 1


def test_deletion_says_who_and_nothing_else() -> None:
    update = delete(new(kind="k"), offset=7, now_ms=START_MS + 5)
    assert json.loads(update.body) == {"jobId": "job_1", "userId": "u1"}
    assert (update.offset, update.type, update.version, update.ended, update.urgent, update.kind) == (
        7,
        "job_deleted",
        2,
        True,
        True,
        "k",
    )


def test_a_parent_must_be_there_and_have_the_same_owner() -> None:
    with pytest.raises(ApiError) as missing:
        new(parentId="p")
    foreign = create(fields(), job_id="p", user_id="other", offset=1, now_ms=START_MS)
    with pytest.raises(ApiError) as hidden:
        new(parentId="p", parent=foreign)
    assert (missing.value.status, missing.value.code) == (404, "parent_not_found")
    assert (hidden.value.code, hidden.value.message) == (missing.value.code, missing.value.message)


def test_parts_nest_so_deep_and_no_deeper() -> None:
    job = new()
    for depth in range(MAX_ANCESTORS):
        job = new(parent=job, parentId="job_1")
        assert job.private.link is not None
        assert job.private.link.depth == depth + 1
    with pytest.raises(ApiError) as caught:
        new(parent=job, parentId="job_1")
    assert (caught.value.status, caught.value.field) == (422, "parentId")
    assert shown(job)["parentId"] == "job_1"
    assert then(job, parentId="job_1", weight=3).private.link.weight == 3_000_000  # type: ignore[union-attr]


def test_records_read_back_typed() -> None:
    job = new(progress=1.5, metadata={"a": 1})
    assert (record_of(job).progress, bytes(record_of(job).metadata)) == (1.5, b'{"a":1}')  # type: ignore[arg-type]


@given_any(
    st.lists(
        st.fixed_dictionaries(
            {},
            optional={
                "status": st.sampled_from(STATUSES),
                "progress": st.floats(0, 100),
                "attempt": st.integers(1, 4),
                "seq": st.integers(0, 6),
                "reset": st.booleans(),
            },
        ),
        max_size=20,
    )
)
def test_any_updates_keep_the_laws(updates: list[dict[str, Any]]) -> None:
    job = new()
    for given in updates:
        before = shown(job)
        try:
            after = then(job, **given)
        except ApiError:
            continue
        record = shown(after)
        assert record["version"] == before["version"] + 1
        assert record["attempt"] >= before["attempt"]
        if record["attempt"] == before["attempt"]:
            assert before["status"] not in ENDED
            assert record["progress"] >= before["progress"] or given.get("reset") is True
        assert record["createdAt"] == before["createdAt"]
        assert ("endedAt" in record) == (record["status"] in ENDED)
        job = after
