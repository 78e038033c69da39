"""What every broker promises of updates, one by one and in batches, once for each store."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing

from protocol.errors import ApiError
from server.brokers.base import Accepted, Cancel, Claim, Delete, Expire
from server.brokers.local import LocalBroker
from tests.contract.harness import Rig, publish, running
from tests.support import PATIENCE_S


@pytest.fixture(params=["memory", "sqlite"])
async def local_rig(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Rig]:
    async with running(request.param, tmp_path / "test.db") as rig:
        yield rig


async def test_what_is_accepted_is_shown_and_counted(rig: Rig) -> None:
    first = await rig.accept(publish("a", userId="u", progress=10))
    second = await rig.accept(publish("a", progress=20))
    assert (first.offset, first.version, first.duplicate, first.cancel_requested) == (1, 1, False, False)
    assert (second.offset, second.version) == (2, 2)
    assert second.job is rig.jobs.get("a")
    assert rig.record("a")["progress"] == 20
    assert [update.offset for update in rig.history.everything(0)] == [1, 2]
    assert rig.broker.epoch == rig.history.epoch
    assert re.fullmatch("[a-z0-9]{12}", rig.broker.epoch)
    assert rig.broker.available is None


async def test_nothing_is_shown_before_it_is_kept(rig: Rig) -> None:
    order: list[str] = []
    submission = rig.broker.submit([publish("a", userId="u")])
    submission.when_kept(lambda error: order.append(f"kept with {len(rig.delivered)} shown"))
    await submission.wait_kept()
    assert submission.kept
    assert order == ["kept with 1 shown"]
    submission.when_kept(lambda error: order.append(f"at once: {error}"))
    assert order[1:] == ["at once: None"]
    await submission.wait_kept()


async def test_submit_never_waits(rig: Rig) -> None:
    with trio.testing.assert_no_checkpoints():
        submission = rig.broker.submit([publish("a", userId="u")])
    await submission.wait_kept()
    assert isinstance(submission.results[0], Accepted)


async def test_creating(rig: Rig) -> None:
    made = await rig.accept(publish(None, create="must", sub="alice"))
    assert made.job is not None
    assert re.fullmatch("job_[0-9a-f]{20}", made.job.latest.job_id)
    assert made.job.latest.user_id == "alice"
    await rig.accept(publish("a", create="must", userId="bob"))
    assert rig.record("a")["userId"] == "bob"
    taken = await rig.refuse(publish("a", create="must"))
    assert (taken.status, taken.code) == (409, "job_exists")
    assert (await rig.refuse(publish("b"))).code == "job_not_found"
    assert (await rig.refuse(publish("b", create="never", userId="u"))).code == "job_not_found"
    assert (await rig.refuse(publish(None, userId="u"))).field == "jobId"
    assert (await rig.refuse(publish("b", userId="u", jobId="c"))).status == 422
    assert (await rig.refuse(publish("b c", userId="u"))).status == 400
    bad_sub = await rig.refuse(publish(None, create="must", sub="no good id"))
    assert (bad_sub.status, bad_sub.field) == (422, "userId")
    assert (await rig.accept(publish(None, jobId="d", userId="u"))).version == 1
    assert len(rig.jobs) == 3


async def test_refusals_change_nothing(rig: Rig) -> None:
    await rig.accept(publish("a", userId="u", status="completed", attempt=2))
    codes = [
        (await rig.refuse(publish("a", progress=5))).code,
        (await rig.refuse(publish("a", attempt=1))).code,
        (await rig.refuse(publish("a", userId="v"))).code,
        (await rig.refuse(publish("a", parentId="p"))).code,
        (await rig.refuse(Cancel("a", "u"))).code,
        (await rig.refuse(Cancel("b", "u"))).code,
        (await rig.refuse(Delete("b"))).code,
        (await rig.refuse(publish("b", userId="u", parentId="p"))).code,
    ]
    assert codes == [
        "job_ended",
        "stale_attempt",
        "owner_fixed",
        "parent_fixed",
        "job_ended",
        "job_not_found",
        "job_not_found",
        "parent_not_found",
    ]
    assert (rig.record("a")["version"], rig.history.last, len(rig.jobs)) == (1, 1, 1)


async def test_a_batch_is_decided_in_order_and_one_by_one(rig: Rig) -> None:
    results = await rig.decide(
        publish("a", userId="u"),
        publish("a", status="processing"),
        publish("a", status="queued"),
        publish("b", status="processing"),
        publish("a", status="completed"),
        publish("a", progress=1),
        Delete("a"),
        publish("a", userId="other"),
    )
    assert [result.offset if isinstance(result, Accepted) else result.code for result in results] == [
        1,
        2,
        "bad_transition",
        "job_not_found",
        3,
        "job_ended",
        4,
        5,
    ]
    assert [update.type for update, _ in rig.delivered] == [
        "status_update",
        "status_update",
        "job_completed",
        "job_deleted",
        "status_update",
    ]
    assert rig.record("a")["userId"] == "other"


async def test_a_repeated_seq_is_a_duplicate_and_wins_over_conflicts(rig: Rig) -> None:
    await rig.accept(publish("a", userId="u", seq=1))
    last = await rig.accept(publish("a", seq=4, status="completed"))
    for again in (
        publish("a", seq=4, status="completed"),
        publish("a", seq=2, status="queued", userId="other"),
        publish("a", seq=4, create="must"),
    ):
        repeated = await rig.accept(again)
        assert (repeated.duplicate, repeated.offset, repeated.version) == (True, last.offset, last.version)
        assert repeated.job is rig.jobs.get("a")
    assert rig.history.last == 2
    assert (await rig.refuse(publish("a", seq=5))).code == "job_ended"
    assert not (await rig.accept(publish("a", seq=1, attempt=2))).duplicate


async def test_an_idempotency_key_repeats_the_first_answer(rig: Rig) -> None:
    first = await rig.accept(publish("a", userId="u", key="k", progress=1))
    await rig.accept(publish("a", progress=2))
    again = await rig.accept(publish("a", userId="u", key="k", progress=1))
    assert (again.duplicate, again.offset, again.version) == (True, first.offset, first.version)
    assert again.job is rig.jobs.get("a")
    reused = await rig.refuse(publish("a", userId="u", key="k", progress=3))
    assert (reused.status, reused.code) == (422, "idempotency_key_reused")
    assert (await rig.refuse(publish("b", userId="u", key="k", progress=1))).code == "idempotency_key_reused"
    assert not (await rig.accept(publish("a", sub="other", key="k", progress=3))).duplicate
    assert rig.history.last == 3


async def test_an_event_id_is_a_key(rig: Rig) -> None:
    await rig.accept(publish("a", userId="u", eventId="e"))
    assert (await rig.accept(publish("a", userId="u", eventId="e"))).duplicate
    assert (await rig.accept(publish("a", userId="u", key="e"))).duplicate  # however the key was sent
    assert not (await rig.accept(publish("a", userId="u", eventId="f"))).duplicate


async def test_a_key_can_be_claimed_for_a_whole_batch(rig: Rig) -> None:
    first = await rig.accept(Claim("w", "k", b"one"))
    assert (first.duplicate, first.job) == (False, None)
    assert (await rig.accept(Claim("w", "k", b"one"))).duplicate
    assert (await rig.refuse(Claim("w", "k", b"other"))).code == "idempotency_key_reused"
    assert not (await rig.accept(Claim("v", "k", b"other"))).duplicate
    assert (await rig.refuse(publish("a", userId="u", key="k"))).code == "idempotency_key_reused"
    assert (rig.history.last, len(rig.jobs)) == (0, 0)


async def test_a_repeated_create_gives_the_same_job(rig: Rig) -> None:
    first = await rig.accept(publish(None, create="must", key="k", stage="s"))
    again = await rig.accept(publish(None, create="must", key="k", stage="s"))
    assert first.job is not None
    assert again.duplicate
    assert again.job is rig.jobs.get(first.job.latest.job_id)
    await rig.accept(Delete(first.job.latest.job_id))
    gone = await rig.accept(publish(None, create="must", key="k", stage="s"))
    assert (gone.duplicate, gone.job, len(rig.jobs)) == (True, None, 0)


async def test_a_refused_publish_leaves_its_key_free(rig: Rig) -> None:
    await rig.refuse(publish("a", key="k"))
    await rig.accept(publish("a", userId="u"))
    assert not (await rig.accept(publish("a", key="k"))).duplicate


async def test_a_duplicate_in_flight_is_kept_no_earlier_than_the_first(rig: Rig) -> None:
    settled: list[str] = []
    submissions = []

    def note(name: str, error: ApiError | None) -> None:
        settled.append(f"{name}: {len(rig.delivered)}")

    for name, operation in (
        ("first", publish("a", userId="u", key="k", seq=1)),
        ("same key", publish("a", userId="u", key="k", seq=1)),
        ("same seq", publish("a", seq=1)),
        ("conflict", publish("a", create="must")),
    ):
        submission = rig.broker.submit([operation])
        submission.when_kept(partial(note, name))
        submissions.append(submission)
    for submission in submissions:
        await submission.wait_kept()
    assert settled == ["first: 1", "same key: 1", "same seq: 1", "conflict: 1"]
    assert [getattr(submission.results[0], "duplicate", None) for submission in submissions] == [
        False,
        True,
        True,
        None,
    ]


async def test_cancel(rig: Rig) -> None:
    await rig.accept(publish("a", userId="u"))
    asked = await rig.accept(Cancel("a", "u"))
    assert (asked.version, asked.cancel_requested, asked.duplicate) == (2, True, False)
    assert rig.delivered[-1][0].type == "status_update"
    assert rig.record("a")["cancelRequested"] is True
    repeated = await rig.accept(Cancel("a", "u"))
    assert (repeated.version, repeated.duplicate, rig.history.last) == (2, True, 2)
    assert (await rig.accept(publish("a", progress=3))).cancel_requested
    assert (await rig.accept(publish("a", status="cancelled"))).cancel_requested
    assert not (await rig.accept(publish("a", attempt=2))).cancel_requested


async def test_a_cancel_is_for_the_job_of_one_owner(rig: Rig) -> None:
    await rig.accept(publish("a", userId="u"))
    # Decided at once, so what the caller saw of the job is two operations old when the cancel is.
    results = await rig.decide(Delete("a"), publish("a", userId="v"), Cancel("a", "u"))
    assert [getattr(result, "code", None) for result in results] == [None, None, "job_not_found"]
    assert "cancelRequested" not in rig.record("a")
    assert (await rig.accept(Cancel("a", "v"))).cancel_requested


async def test_delete_frees_the_id(rig: Rig) -> None:
    await rig.accept(publish("a", userId="u", kind="k", seq=9))
    gone = await rig.accept(Delete("a"))
    assert (gone.version, gone.job, rig.jobs.get("a"), rig.jobs.by_user) == (2, None, None, {})
    update, job = rig.delivered[-1]
    assert (update.type, update.body, job) == ("job_deleted", b'{"jobId":"a","userId":"u"}', None)
    again = await rig.accept(publish("a", userId="v", seq=1))
    assert (again.version, again.duplicate) == (1, False)
    assert again.job is not None
    assert again.job.created == again.offset == 3


async def test_parts_and_parents_stand_together_in_the_log(rig: Rig) -> None:
    await rig.accept(publish("p", userId="u"))
    await rig.accept(publish("q", userId="u", parentId="p"))
    accepted = await rig.accept(publish("r", userId="u", parentId="q", status="processing", progress=50))
    assert accepted.offset == 4
    assert [(update.job_id, update.version, update.offset) for update, _ in rig.delivered] == [
        ("p", 1, 1),
        ("q", 1, 2),
        ("p", 2, 3),
        ("r", 1, 4),
        ("q", 2, 5),
        ("p", 3, 6),
    ]
    assert (rig.record("p")["progress"], rig.record("p")["status"]) == (50, "processing")
    await rig.accept(publish("r", message="nothing that shows above"))
    assert rig.history.last == 7
    await rig.accept(publish("r", progress=50.0001))
    assert rig.history.last == 8
    parts = rig.jobs.get("q").private.parts  # type: ignore[union-attr]
    assert parts is not None
    assert parts.weighted == 50_000_100 * 1_000_000
    await rig.accept(Delete("r"))
    assert (rig.record("q")["progress"], rig.record("p")["progress"]) == (0, 0)
    assert (await rig.refuse(publish("x", userId="v", parentId="p"))).code == "parent_not_found"


async def test_parts_of_the_largest_weight(rig: Rig) -> None:
    """Their sums have more bits than a number of msgpack's."""
    await rig.accept(publish("p", userId="u"))
    await rig.accept(publish("q", userId="u", parentId="p", weight=1e9, status="completed"))
    await rig.accept(publish("r", userId="u", parentId="p", weight=1e9, progress=50))
    assert rig.record("p")["progress"] == 75
    await rig.accept(Delete("q"))
    assert rig.record("p")["progress"] == 50
    await rig.accept(Delete("r"))
    assert rig.jobs.jobs["p"].private.parts is None


async def test_a_parent_that_is_made_again_in_the_same_batch(rig: Rig) -> None:
    results = await rig.decide(
        publish("p", userId="u", stage="first"),
        publish("q", userId="u", parentId="p", progress=10),
        Delete("p"),
        publish("p", userId="u", stage="second"),
        publish("p", stage="third"),
        publish("r", userId="u", parentId="p", progress=30),
        publish("q", progress=90),
    )
    assert all(isinstance(result, Accepted) for result in results), results
    parent, part = rig.jobs.jobs["p"], rig.jobs.jobs["r"]
    assert part.private.link is not None
    assert part.private.link.parent_created == parent.created
    assert (rig.record("p")["progress"], rig.record("p")["steps"]["total"]) == (30, 1)  # q's parent was the first one


async def test_old_ended_jobs_make_room(store: str, tmp_path: Path) -> None:
    async with running(store, tmp_path / "room.db", max_jobs=3) as rig:
        for name in "abc":
            await rig.accept(publish(name, userId=f"u-{name}"))
        full = await rig.refuse(publish("d", userId="u"))
        assert (full.status, full.code, full.retry_after) == (503, "too_many_jobs", 10)
        await rig.accept(publish("b", status="completed"))
        await rig.accept(publish("a", status="failed"))
        await rig.accept(publish("d", userId="u"))  # b ended first, so it goes
        assert sorted(rig.jobs.jobs) == ["a", "c", "d"]
        assert "u-b" not in rig.jobs.by_user
        await rig.accept(publish("a", attempt=2))  # alive again
        assert (await rig.refuse(publish("e", userId="u"))).code == "too_many_jobs"
        await rig.accept(Delete("c"))
        await rig.accept(publish("b", userId="u"))
        assert sorted(rig.jobs.jobs) == ["a", "b", "d"]
        assert [update.type for update, _ in rig.delivered].count("job_deleted") == 1
        await rig.accept(publish("d", status="completed"))
        # In one batch: reopening the only candidate leaves none.
        results = await rig.decide(publish("d", attempt=2), publish("f", userId="u"))
        assert isinstance(results[1], ApiError)


async def test_an_ended_parent_makes_room_while_its_parts_go_on(store: str, tmp_path: Path) -> None:
    async with running(store, tmp_path / "room.db", max_jobs=2) as rig:
        await rig.accept(publish("p", userId="u"))
        await rig.accept(publish("q", userId="u", parentId="p"))
        await rig.accept(publish("p", status="completed"))
        # p has other sums, and then goes.
        results = await rig.decide(publish("q", progress=5), publish("r", userId="u"))
        assert all(isinstance(result, Accepted) for result in results), results
        assert sorted(rig.jobs.jobs) == ["q", "r"]


async def test_leases_stall_then_fail(rig: Rig) -> None:
    shown = trio.Event()
    statuses: list[str] = []
    deliver = rig.deliver

    def watch(kept):  # type: ignore[no-untyped-def]
        deliver(kept)
        statuses.extend(update.status for update, _ in kept)
        if statuses[-1] == "failed":
            shown.set()

    rig.broker._deliver = watch
    started = trio.current_time()
    await rig.accept(publish("a", userId="u", ttl=0.1, status="processing"))
    with trio.fail_after(PATIENCE_S):
        await shown.wait()
    assert trio.current_time() - started >= 0.2
    assert statuses == ["processing", "stalled", "failed"]
    assert rig.record("a")["error"] == "lost"
    assert len(rig.wheel) == 0


async def test_an_expiry_that_was_overtaken_changes_nothing(rig: Rig) -> None:
    first = await rig.accept(publish("a", userId="u", ttl=100))
    await rig.accept(publish("a", progress=1))
    assert (await rig.accept(Expire("a", first.version))).duplicate
    await rig.accept(Cancel("a", "u"))  # is no sign of life
    stalled = await rig.accept(Expire("a", 2))
    assert (stalled.duplicate, stalled.cancel_requested, rig.record("a")["status"]) == (False, True, "stalled")
    await rig.accept(publish("a", ttl=None))
    assert (await rig.accept(Expire("a", 5))).duplicate
    assert (await rig.refuse(Expire("b", 1))).code == "job_not_found"
    await rig.accept(Delete("a"))
    assert len(rig.wheel) == 0


async def test_the_clock_may_step_back(rig: Rig) -> None:
    for now in (2000.0, 1000.0, 3000.0):
        rig.broker._clock = partial(float, now)
        await rig.decide(publish("a", userId="u"), publish("b", userId="u"))
    times = [update.at_ms for update, _ in rig.delivered]
    assert times == [2_000_000, 2_000_000, 2_000_000, 2_000_000, 3_000_000, 3_000_000]


async def test_keys_expire(local_rig: Rig) -> None:
    rig = local_rig
    assert isinstance(rig.broker, LocalBroker)
    rig.broker._clock = lambda: 5000.0
    await rig.accept(publish("a", userId="u", key="k"))
    rig.broker._clock = lambda: 5000.0 + 599
    assert (await rig.accept(publish("a", userId="u", key="k"))).duplicate
    rig.broker._clock = lambda: 5000.0 + 601
    assert not (await rig.accept(publish("a", userId="u", key="k"))).duplicate
    rig.broker._clock = lambda: 5000.0 + 1300
    rig.broker._housekeep()
    assert len(rig.broker._keys) == 0


async def test_closed_is_closed(rig: Rig) -> None:
    await rig.accept(publish("a", userId="u", ttl=50))
    await rig.broker.close()
    late = rig.broker.submit([publish("a")])
    (error,) = late.results
    assert isinstance(error, ApiError)
    assert (error.status, error.code) == (503, "shutting_down")
    await late.wait_kept()
    assert rig.broker.available == "closed"
    assert len(rig.wheel) == 0
