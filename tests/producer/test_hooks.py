"""What hooks share: attempts that nobody counted, owners, ids; and that nothing of it breaks a job."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import trio

from statuswire import job
from statuswire.hooks.futures import JobExecutor
from statuswire.hooks.reporting import Call, Settings, at_path, begin, contained, end, job_id
from statuswire.items import Answer, Refusal
from statuswire.outbox import Outbox
from tests.producer.workers import history, record, settled, worker
from tests.support import server, until


def call(attempt: int = 1, **told: Any) -> Call:
    return Call("a", "export", told, told, "video", attempt)


async def test_a_job_that_is_given_to_another_worker_is_its_next_attempt() -> None:
    async with server() as at, worker(at.url, interval=0) as client:
        settings = Settings("test", client=client, ttl=60)
        await at.publish("a", userId="alice", status="failed", attempt=3)
        again = settings.begin(call(kwargs={"user_id": "alice"}))
        again.progress(50)
        await settled(client)
        found = await record(at, "a")
        assert (found["status"], found["attempt"], found["progress"]) == ("processing", 4, 50)
        assert again.attempt == 4
        again.progress(60)
        settings.ended(again, None, ValueError("no"))
        await settled(client)
        found = await record(at, "a")
        assert (found["status"], found["attempt"], found["progress"]) == ("failed", 4, 60)
        # So fast that its first word is its last.
        end(settings.begin(call(kwargs={"user_id": "alice"})), None, None)
        await settled(client)
        found = await record(at, "a")
        assert (found["status"], found["attempt"]) == ("completed", 5)
        assert [one["version"] for one in await history(at, "a")] == list(range(1, found["version"] + 1))


async def test_one_that_was_believed_dead_goes_on() -> None:
    async with server() as at, worker(at.url, interval=0) as client:
        going = Settings("test", client=client, ttl=None).begin(call(kwargs={"user_id": "alice"}))
        await settled(client)
        await at.publish("a", status="failed", error="lost")
        going.progress(70)
        await settled(client)
        found = await record(at, "a")
        assert (found["status"], found["attempt"], found["progress"]) == ("processing", 2, 70)
        going.complete()
        await settled(client)
        found = await record(at, "a")
        assert (found["status"], found["attempt"]) == ("completed", 2)


async def test_of_two_workers_with_one_job_the_later_goes_on() -> None:
    async with server() as at, worker(at.url, interval=0) as client:
        first = Settings("test", client=client, ttl=None).begin(call(kwargs={"user_id": "alice"}))
        await settled(client)
        await at.publish("a", status="processing", attempt=2)
        first.progress(70)
        first.complete()
        await settled(client)
        found = await record(at, "a")
        assert (found["status"], found["attempt"], found["progress"]) == ("processing", 2, 0)


async def test_a_handle_that_a_user_made_does_not_climb() -> None:
    async with server() as at, worker(at.url) as client:
        await at.publish("a", userId="alice", status="completed")
        job("a", user="alice", client=client).complete()
        await settled(client)
        assert (await record(at, "a"))["version"] == 1


def test_an_end_without_an_answer_does_not_begin_another_attempt() -> None:
    outbox = Outbox(lambda: 0.0, 0.0)
    state = outbox.hold("a", 1, {}, 0.0)
    state.climbs = 100
    outbox.put(state, {"status": "processing"}, urgent=True)
    outbox.put_end(state, "key", 1, b"{}", None)
    sent = outbox.take(0.0, 1)
    assert [item.is_end for item in sent] == [True]
    outbox.failed(1.0, None)
    assert outbox.take(100.0, 1) == sent
    outcome = outbox.done(Answer({0: Refusal("job_ended", "it is over")}, 0, ()), 100.0)
    assert (outcome.done, state.attempt) == (sent, 1)
    assert outbox.is_settled(outbox.ticket)


async def test_a_late_word_that_it_waits_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    async with server() as at, worker(at.url, interval=0) as client:
        settings = Settings("test", client=client)
        handle = settings.begin(call(kwargs={"user_id": "alice"}))
        settings.queued(call(kwargs={"user_id": "alice"}))
        await settled(client)
        assert (await record(at, "a"))["status"] == "processing"
        handle.complete()
        settings.queued(call(kwargs={"user_id": "alice"}))
        await settled(client)
        assert (await record(at, "a"))["status"] == "completed"
    assert [one for one in caplog.records if one.levelno >= logging.WARNING] == []


async def test_a_retry_gives_up_the_lease() -> None:
    async with server() as at, worker(at.url, interval=0) as client:
        settings = Settings("test", client=client, ttl=0.5)
        settings.begin(call(kwargs={"user_id": "alice"})).leave()
        settings.queued(call(2, kwargs={"user_id": "alice"}))
        await settled(client)
        assert (await record(at, "a"))["message"] == "retry"
        waiting = at.node.jobs.get("a")
        assert waiting is not None
        assert (waiting.latest.status, waiting.private.ttl) == ("queued", None)
        again = settings.begin(call(2, kwargs={"user_id": "alice"}))
        await settled(client)
        assert "message" not in await record(at, "a")
        again.complete()


@pytest.mark.parametrize(
    ("told", "user", "owner"),
    [
        ({"kwargs": {"user_id": "alice"}}, None, "alice"),
        ({"kwargs": {"user_id": 7}}, None, "7"),
        ({"kwargs": {"user_id": True}}, None, "queue:test"),
        ({"kwargs": {"user_id": "a b"}}, None, "queue:test"),
        ({"kwargs": {"user_id": "queue:other"}}, None, "queue:test"),
        ({"kwargs": {"user_id": "x" * 129}}, None, "queue:test"),
        ({"args": ["x", {"id": "bob"}]}, "args.1.id", "bob"),
        ({"args": ["x"]}, "args.1", "queue:test"),
        ({"args": "alice"}, "args.0", "queue:test"),
        ({}, None, "queue:test"),
        ({"meta": "carol"}, lambda message: message["meta"], "carol"),
        ({}, lambda message: message["meta"], "queue:test"),
    ],
)
def test_whose_it_is(told: dict[str, Any], user: Any, owner: str) -> None:
    assert Settings("test", user=user).owner(call(**told)) == owner


def test_ids_are_made_to_fit_and_stay_apart() -> None:
    assert job_id("3f-4.a:b@c_d") == "3f-4.a:b@c_d"
    one, other = job_id("ä b"), job_id("ö b")
    assert one != other
    assert one.startswith("--b.")
    assert len(job_id("x" * 1000)) <= 128
    assert job_id("") != ""


async def test_whatever_a_queue_calls_it_all_is_said_of_one_job() -> None:
    name = "daily report: ä" + "x" * 200
    async with server() as at, worker(at.url, interval=0) as client:
        settings = Settings("test", client=client)
        one = Call(name, "export", {"kwargs": {"user_id": "alice"}}, None)
        settings.queued(one)
        await settled(client)
        settings.begin(one).complete()
        # As where jobs run in other processes, and know no more than this.
        settings.queued(replace(one, attempt=2))
        await settled(client)
        end(begin(name, settings.first(replace(one, attempt=2)), False, client), None, None)
        await settled(client)
        with ThreadPoolExecutor() as threads:
            future = JobExecutor(threads, user="alice", client=client).submit_as("two words", len, "ab")
            await trio.to_thread.run_sync(future.result)
        await settled(client)
        assert {job.latest.job_id: job.latest.status for job in at.node.jobs.jobs.values()} == {
            job_id(name): "completed", future.job_id: "completed",
        }  # fmt: skip


def test_paths() -> None:
    document = {"a": [{"b": 1}], "c": "text"}
    assert at_path(document, "a.0.b") == 1
    for path in ("a.1.b", "a.x", "c.0", "a.0.b.c", "d", "a.-1"):
        assert at_path(document, path) is None


def test_what_goes_wrong_in_a_hook_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    @contained
    def hook() -> None:
        raise OSError("no")

    hook()
    assert "OSError: no" in caplog.text


@pytest.mark.parametrize("attempt", [1, 2])
async def test_what_a_worker_says_first(attempt: int) -> None:
    async with server() as at, worker(at.url, interval=0) as client:
        first = Settings("test", client=client).first(call(attempt, kwargs={"user_id": "alice", "secret": "x"}))
        handle = begin("a", first, False, client)
        await until(lambda: at.node.jobs.get("a") is not None)
        found = await record(at, "a")
        assert (found["status"], found["kind"], found["attempt"]) == ("processing", "export", attempt)
        assert found["metadata"] == {"source": "test", "queue": "video"}
        handle.complete()
