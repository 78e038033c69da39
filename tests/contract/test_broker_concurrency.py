"""What every broker promises when many submit at once, waiters leave, callbacks fail, and in any order."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import ApiError
from protocol.update import ENDED
from server.brokers.base import Accepted, Cancel, Delete, Expire, Operation, Publish, Submission
from server.brokers.local import LocalBroker
from tests.contract.harness import Rig, fields, publish, running


async def test_concurrent_submitters_get_their_own_answers_in_log_order(rig: Rig) -> None:
    answers: list[tuple[int, str]] = []

    async def worker(name: str) -> None:
        await rig.accept(publish(name, userId="u"))
        for progress in range(10):
            accepted = await rig.accept(publish(name, progress=progress))
            assert accepted.job is not None
            assert accepted.job.latest.job_id == name
            assert accepted.version == progress + 2
            answers.append((accepted.offset, name))

    async with trio.open_nursery() as nursery:
        for number in range(20):
            nursery.start_soon(worker, f"job{number}")
    assert [update.offset for update, _ in rig.delivered] == list(range(1, 221))
    assert {(update.offset, update.job_id) for update, _ in rig.delivered} >= set(answers)
    at = [update.at_ms for update, _ in rig.delivered]
    assert at == sorted(at)


async def test_a_cancelled_waiter_takes_nothing_back(rig: Rig) -> None:
    submission = rig.broker.submit([publish("a", userId="u")])
    with trio.CancelScope() as scope:
        scope.cancel()
        await submission.wait_kept()
    assert scope.cancelled_caught
    await submission.wait_kept()
    assert rig.record("a")["version"] == 1


async def test_a_callback_that_fails_harms_nobody(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    submission = rig.broker.submit([publish("a", userId="u")])

    def fail(error: ApiError | None) -> None:
        raise ValueError("mine")

    submission.when_kept(fail)
    await submission.wait_kept()
    await rig.accept(publish("a"))
    assert "a callback of a kept submission failed" in caplog.text


async def test_an_abandoned_wait_leaves_no_callback() -> None:
    submission = Submission([])
    with trio.move_on_after(0):
        await submission.wait_kept()
    assert submission._callbacks == []
    assert not submission.kept


names = st.sampled_from("abc")


operations = st.one_of(
    st.builds(Delete, names),
    st.builds(Cancel, names),
    st.builds(Expire, names, st.integers(1, 8)),
    st.builds(
        lambda name, given, create, key: Publish(name, fields(**given), create, "w", key),
        names,
        st.fixed_dictionaries(
            {"userId": st.sampled_from(["u", "u", "u", "v"])},
            optional={
                "status": st.sampled_from(["queued", "processing", "stalled", "completed", "failed", "cancelled"]),
                "progress": st.integers(0, 100),
                "attempt": st.integers(1, 3),
                "seq": st.integers(0, 5),
                "reset": st.booleans(),
                "ttl": st.just(3600),
                "parentId": names,
                "autoComplete": st.booleans(),
            },
        ),
        st.sampled_from(["must", "may", "never"]),
        st.none() | st.sampled_from(["k1", "k2"]),
    ),
)


@given(st.lists(st.lists(operations, max_size=4), max_size=12))
def test_any_interleaving_keeps_the_laws(batches: list[list[Operation]]) -> None:
    async def main() -> Rig:
        async with running("memory", Path("unused")) as rig:
            for batch in batches:
                before = rig.history.last
                results = await rig.decide(*batch)
                own = [result for result in results if isinstance(result, Accepted) and not result.duplicate]
                assert [result.offset for result in own] == sorted({result.offset for result in own})
                assert all(result.offset > before for result in own)
                assert own or rig.history.last == before  # duplicates and refusals change nothing
            assert isinstance(rig.broker, LocalBroker)
            assert len(rig.broker._leases) == sum(
                job.private.ttl is not None and not job.latest.ended for job in rig.jobs.jobs.values()
            )
            assert rig.broker._working == {}
            assert rig.broker._count == len(rig.jobs)
        return rig

    rig = trio.run(main)
    assert [update.offset for update, _ in rig.delivered] == list(range(1, len(rig.delivered) + 1))
    last: dict[str, tuple[int, int, str]] = {}
    for update, job in rig.delivered:
        version, attempt, status = last.get(update.job_id, (0, 0, ""))
        assert update.version == version + 1
        assert update.urgent == (update.ended or update.status != status)
        if job is None:
            del last[update.job_id]
            continue
        record = json.loads(update.body)
        assert record["version"] == update.version
        assert record["status"] == update.status
        assert record["attempt"] >= attempt
        if record["attempt"] == attempt:
            assert status not in ENDED
            assert (status, update.status) != ("processing", "queued")
        assert ("endedAt" in record) == (update.status in ENDED) == update.ended
        assert update.status != "completed" or record["progress"] == 100
        last[update.job_id] = (update.version, record["attempt"], update.status)
    assert set(last) == set(rig.jobs.jobs)
