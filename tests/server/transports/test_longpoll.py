"""Long-poll and plain polling against a real server."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import trio

from protocol.polling import parse_timeout
from server import cursors
from server.app import drain
from server.cursors import Client, Cursors
from tests.streams import running_out
from tests.support import ADMIN, AUTH, WORKER, Answer, InProcess, bearer, server, until

POLL = "/api/v2/jobs/poll"


def versions(answer: Answer) -> list[tuple[str, int]]:
    assert answer.status == 200, answer
    assert set(answer.json) == {"updates", "last_seen", "reset", "timedOut", "done"}
    return [(update["jobId"], update["version"]) for update in answer.json["updates"]]


def seen(answer: Answer) -> str:
    cursor = answer.json["last_seen"]
    assert isinstance(cursor, str)
    return cursor


async def poll(at: InProcess, query: str, headers: dict[str, str] | None = None) -> Answer:
    return await at.get(f"{POLL}?{query}", headers or {})


async def waiting(at: InProcess, query: str, act: Callable[[], Any], headers: dict[str, str] | None = None) -> Answer:
    """Poll, and act once the poll waits."""
    answers: list[Answer] = []

    async def ask() -> None:
        answers.append(await poll(at, query, headers))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask)
        await until(lambda: at.node.polls)
        await act()
    assert not at.node.polls
    assert not at.node.hub.readers
    return answers[0]


# --- snapshot, then what is new -----------------------------------------------------------------------------------


async def test_without_a_cursor_the_snapshot_comes_at_once_then_only_what_is_new() -> None:
    async with server() as at:
        await at.publish("a", userId="alice")
        last = await at.publish("b", userId="alice", progress=5)
        first = await poll(at, "timeout=60")
        assert versions(first) == [("a", 1), ("b", 1)]
        assert seen(first) == last.json["id"]
        assert [first.json[name] for name in ("reset", "timedOut", "done")] == [False, False, False]
        assert first.headers["cache-control"] == "no-store"
        assert {"type", "id", "progress", "timestamp"} <= set(first.json["updates"][1])
        await at.publish("b", progress=6)
        await at.publish("b", progress=7)
        second = await poll(at, f"timeout=60&last_seen={seen(first)}")
        assert versions(second) == [("b", 2), ("b", 3)], "every update, not only the newest"
        third = await poll(at, f"timeout=0&last_seen={seen(second)}")
        assert (versions(third), seen(third)) == ([], seen(second))


async def test_it_waits_for_an_update_and_answers_at_once() -> None:
    async with server() as at:
        start = seen(await poll(at, "timeout=0"))
        answer = await waiting(at, f"timeout=60&last_seen={start}", lambda: at.publish("a", userId="alice"))
        assert versions(answer) == [("a", 1)]
        assert answer.json["timedOut"] is False
        fresh = await waiting(at, "jobIds=b&timeout=60", lambda: at.publish("b", userId="alice"))
        assert versions(fresh) == [("b", 1)], "nothing to show is nothing newer"


async def test_a_timeout_answers_empty_with_a_cursor_that_moves_with_the_log() -> None:
    async with server() as at:
        await at.publish("a", userId="alice")
        start = seen(await poll(at, "jobIds=a&timeout=0"))
        await at.publish("other", userId="alice")
        began = trio.current_time()
        answer = await poll(at, f"jobIds=a&timeout=0.05&last_seen={start}")
        assert trio.current_time() - began >= 0.05
        assert (versions(answer), answer.json["timedOut"]) == ([], True)
        assert seen(answer) == f"{at.node.history.epoch}:2"


async def test_what_is_not_watched_does_not_wake_it() -> None:
    async with server(auth=AUTH) as at:
        await at.publish("a", WORKER, userId="alice", kind="export")

        async def others() -> None:
            await at.publish("b", WORKER, userId="bob")
            await at.publish("a", WORKER, progress=5)
            assert at.node.polls
            await at.publish("a", WORKER, status="failed")

        start = seen(await poll(at, "timeout=0", bearer("alice")))
        answer = await waiting(at, f"types=job_failed&timeout=60&last_seen={start}", others, bearer("alice"))
        assert versions(answer) == [("a", 3)]


async def test_filters_and_fields() -> None:
    async with server() as at:
        await at.publish("a", userId="alice", kind="export", progress=5)
        await at.publish("b", userId="bob", kind="import", status="completed")
        for query, expected in {
            "kind=export": ["a"],
            "status=completed": ["b"],
            "types=job_completed": ["b"],
            "userId=bob": ["b"],
            "jobIds=a,none": ["a"],
            "jobIds=b,b,a": ["a", "b"],  # in log order
            "all=1": ["a", "b"],
            "last_seen=0&kind=import": ["b"],
        }.items():
            assert [job for job, _ in versions(await poll(at, f"timeout=0&{query}"))] == expected, query
        answer = await poll(at, "timeout=0&fields=progress&jobIds=a")
        assert set(answer.json["updates"][0]) == {"type", "id", "jobId", "status", "version", "progress"}


async def test_done_is_not_said_before_the_endings_are_given() -> None:
    async with server() as at:
        first = await at.publish("a", userId="alice", status="processing")
        for progress in range(30):
            await at.publish("a", progress=progress, metadata={"text": "x" * 60_000})
        await at.publish("a", status="completed")
        cursor, seen_versions = first.json["id"], []
        while True:
            answer = await poll(at, f"jobIds=a&timeout=0&last_seen={cursor}")
            seen_versions += [version for _, version in versions(answer)]
            cursor = seen(answer)
            if answer.json["done"]:
                break
        assert answer.json["updates"][-1]["type"] == "job_completed"
        assert seen_versions == list(range(2, 33))


async def test_done_when_every_named_job_has_ended() -> None:
    async with server() as at:
        await at.publish("a", userId="alice", status="completed")
        await at.publish("b", userId="alice")
        for query, done in {"jobIds=a": True, "jobIds=a,b": False, "jobIds=a,none": False, "": False}.items():
            assert (await poll(at, f"timeout=0&{query}")).json["done"] is done, query
        answer = await waiting(
            at,
            f"jobIds=a,b&timeout=60&last_seen={at.node.history.epoch}:2",
            lambda: at.publish("b", status="cancelled"),
        )
        assert (versions(answer), answer.json["done"]) == ([("b", 2)], True)
        assert answer.json["updates"][0]["type"] == "job_cancelled"
        gone = await waiting(
            at,
            f"jobIds=a&timeout=60&last_seen={at.node.history.epoch}:3",
            lambda: at.ask("DELETE", "/api/v2/jobs/a"),
        )
        assert gone.json["updates"][0]["type"] == "job_deleted"
        assert gone.json["updates"][0]["jobId"] == "a"
        assert gone.json["done"] is True


async def test_several_polls_wait_together_and_a_client_that_left_is_forgotten() -> None:
    async with server() as at:
        answers: list[Answer] = []

        async def ask() -> None:
            answers.append(await poll(at, "jobIds=a&timeout=60"))

        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(ask)
            async with at.connect() as gone:
                await gone.send(b"GET /api/v2/jobs/poll?jobIds=a&timeout=60 HTTP/1.1\r\nHost: localhost\r\n\r\n")
                await until(lambda: len(at.node.polls) == 6)
            await at.publish("a", userId="alice")
        assert [versions(answer) for answer in answers] == [[("a", 1)]] * 5
        await until(lambda: not at.node.connections)
        assert not at.node.polls
        assert not at.node.hub.channels


# --- cursors ------------------------------------------------------------------------------------------------------


async def test_a_cursor_the_log_cannot_serve_is_a_reset_and_a_snapshot() -> None:
    async with server(history={"max_updates": 2}) as at:
        for number in range(5):
            await at.publish("a", userId="alice", progress=number)
        epoch = at.node.history.epoch
        for cursor in (f"{epoch}:2", f"{epoch}:6", "other:5", "nonsense", f"{epoch}:", f"{epoch}:05", ":", "-1", "%00"):
            answer = await poll(at, f"timeout=60&last_seen={cursor}")
            assert (versions(answer), answer.json["reset"]) == ([("a", 5)], True), cursor
            assert seen(answer) == f"{epoch}:5"
        kept = await poll(at, f"timeout=0&last_seen={epoch}:3")
        assert (versions(kept), kept.json["reset"]) == ([("a", 4), ("a", 5)], False)


async def test_unix_time_is_everything_since_then_that_is_still_kept() -> None:
    async with server(history={"max_updates": 3}) as at:
        for number in range(5):
            await at.publish("a", userId="alice", progress=number)
        now = int(time.time())
        for moment, expected in {
            str(now - 3600): [("a", 3), ("a", 4), ("a", 5)],
            str((now - 3600) * 1000): [("a", 3), ("a", 4), ("a", 5)],
            "0": [("a", 3), ("a", 4), ("a", 5)],
            str(now + 3600): [],
            str((now + 3600) * 1000): [],
        }.items():
            answer = await poll(at, f"timeout=0&last_seen={moment}")
            assert (versions(answer), answer.json["reset"]) == (expected, False), moment


async def test_a_poll_overtaken_while_it_waits_gets_a_reset() -> None:
    """The log may be trimmed past the poll's place before its task runs again."""
    async with server(history={"max_updates": 2}) as at:
        await at.publish("a", userId="alice", progress=0)
        batch = [{"jobId": "a", "progress": number} for number in range(1, 10)]
        for query in (f"last_seen={at.node.history.epoch}:1", "types=job_failed"):
            if query == "types=job_failed":
                batch = [{"jobId": f"f{number}", "userId": "alice", "status": "failed"} for number in range(5)]
            answer = await waiting(at, f"timeout=60&{query}", lambda: at.post("/api/v2/updates", batch))  # noqa: B023
            assert answer.json["reset"] is True
            assert versions(answer)[-1] == (("a", 10) if "last_seen" in query else ("f4", 1))
            assert seen(answer) == f"{at.node.history.epoch}:{at.node.history.last}"


async def test_a_poll_that_wants_nothing_of_what_the_log_is_trimmed_of_misses_nothing() -> None:
    async with server(history={"max_updates": 2}) as at:
        history = at.node.history

        async def go_on() -> None:
            for number in range(10):
                await at.publish(job_id, userId="alice", message=str(number))
                await until(lambda: at.node.hub.given() == history.last)
            await at.publish(job_id, status="failed")

        for types in ("job_failed", "job_failed,notification"):
            job_id = types.replace(",", ".")
            await at.publish("a", userId="alice")
            answer = await waiting(at, f"timeout=60&types={types}&last_seen={history.epoch}:{history.last}", go_on)
            assert (versions(answer), answer.json["reset"]) == ([(job_id, 11)], False)


@pytest.mark.parametrize("name", ["newepoch", "the same"])
async def test_a_log_that_began_anew_while_a_poll_waits_is_a_reset(name: str) -> None:
    """Also under its name, as it does where a node has missed so much that it loads everything again."""
    async with server() as at:
        await at.publish("a", userId="alice")
        old = at.node.history.epoch
        new = old if name == "the same" else name

        async def lose() -> None:
            at.node.history.restart(new, 7)
            at.node.log_lost(new)

        answer = await waiting(at, f"timeout=60&last_seen={old}:1", lose)
        assert (versions(answer), answer.json["reset"], seen(answer)) == ([("a", 1)], True, f"{new}:7")


async def test_a_large_backlog_comes_in_several_answers_without_a_hole() -> None:
    async with server() as at:
        text = "x" * 2000
        batch = [{"jobId": "a", "userId": "alice", "message": f"{number}{text}"} for number in range(1200)]
        await at.post("/api/v2/updates", batch)
        cursor, got, answers = f"{at.node.history.epoch}:0", [], 0
        while True:
            answer = await poll(at, f"timeout=0&last_seen={cursor}")
            if not versions(answer):
                break
            got += [version for _, version in versions(answer)]
            cursor = seen(answer)
            answers += 1
        assert got == list(range(1, 1201))
        assert answers > 1


# --- client_id ----------------------------------------------------------------------------------------------------


async def test_the_server_remembers_the_cursor_of_a_client() -> None:
    async with server(auth=AUTH) as at:
        await at.publish("a", WORKER, userId="alice")
        alice = bearer("alice")
        assert versions(await poll(at, "timeout=0&client_id=c1", alice)) == [("a", 1)]
        assert versions(await poll(at, "timeout=0&client_id=c1", alice)) == []
        await at.publish("a", WORKER, progress=5)
        assert versions(await poll(at, "timeout=60&client_id=c1", alice)) == [("a", 2)]
        assert versions(await poll(at, "timeout=0&client_id=c2", alice)) == [("a", 2)]
        assert versions(await poll(at, "timeout=0&client_id=c1", ADMIN)) == [("a", 2)], "another user's c1 is another"
        again = await poll(at, f"timeout=0&client_id=c1&last_seen={at.node.history.epoch}:1", alice)
        assert versions(again) == [("a", 2)], "a cursor that is sent wins"


async def test_what_a_client_watched_says_nothing_about_what_else_it_missed() -> None:
    async with server() as at:
        await at.publish("a", userId="alice")
        await at.publish("b", userId="alice")
        assert versions(await poll(at, "timeout=0&client_id=c&jobIds=a")) == [("a", 1)]
        assert versions(await poll(at, "timeout=0&client_id=c&jobIds=a,b")) == [("a", 1), ("b", 1)]
        assert versions(await poll(at, "timeout=0&client_id=c&jobIds=b,a")) == []


async def test_an_answer_that_was_not_sent_was_not_seen() -> None:
    async with server() as at:
        await at.publish("a", userId="alice")
        text = "m" * 2000
        for part in range(3):  # more than any two socket buffers hold
            batch = [{"jobId": f"j{part}.{number}", "userId": "alice", "message": text} for number in range(3500)]
            await at.post("/api/v2/updates", batch)
        async with at.connect() as http:
            await http.send(f"GET {POLL}?timeout=0&client_id=c HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            await http.head()
        await until(lambda: at.node.connections == 0)
        answer = await poll(at, "timeout=0&client_id=c")
        assert len(versions(answer)) == 10_501


def test_remembered_cursors_are_bounded_in_number_and_age(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cursors, "MAX_CURSORS", 2)
    kept = Cursors()
    one, two, three = (Client("u", name, 0) for name in ("one", "two", "three"))
    kept.put(one, "e:1", 0.0)
    kept.put(two, "e:2", 1.0)
    kept.put(one, "e:3", 2.0)
    kept.put(three, "e:4", 3.0)
    assert [kept.get(client, 3.0) for client in (one, two, three)] == ["e:3", None, "e:4"]
    late = 2.0 + cursors.KEPT_S
    assert [kept.get(client, late) for client in (one, three)] == [None, "e:4"]
    kept.put(two, "e:5", late)
    assert len(kept._cursors) == 2


# --- who and what -------------------------------------------------------------------------------------------------


async def test_foreign_jobs_stay_silent_like_unknown_ones() -> None:
    async with server(auth=AUTH) as at:
        await at.publish("theirs", WORKER, userId="alice", status="completed")
        bob = bearer("bob")
        answers = [await poll(at, f"timeout=0&jobIds={job_id}", bob) for job_id in ("theirs", "nobodys")]
        assert answers[0].body == answers[1].body
        assert (versions(answers[0]), answers[0].json["done"]) == ([], False)
        assert versions(await poll(at, "timeout=0&jobIds=theirs", bearer("bob", jobs=["their?", "th*"][1:]))) == [
            ("theirs", 1)
        ]
        for query in ("userId=alice", "all=1"):
            refused = await poll(at, f"timeout=0&{query}", bob)
            assert (refused.status, refused.error) == (403, "forbidden")
        own = await waiting(at, "jobIds=mine&timeout=60", lambda: at.publish("mine", WORKER, userId="bob"), bob)
        assert versions(own) == [("mine", 1)]


async def test_a_token_that_expires_while_waiting_is_401() -> None:
    async with server(auth=AUTH) as at:
        with running_out() as exp:
            answer = await poll(at, "timeout=30", bearer("alice", exp=exp))
        assert (answer.status, answer.error) == (401, "token_expired")
        assert "invalid_token" in answer.headers["www-authenticate"]


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("timeout=-1", "timeout"),
        ("timeout=soon", "timeout"),
        ("timeout=nan", "timeout"),
        ("timeout=", "timeout"),
        ("client_id=a%20b", "client_id"),
        ("jobIds=a,,b", "jobIds"),
        ("jobIds=", "jobIds"),
        ("jobIds=a%20b", "jobIds"),
        ("jobIds=" + ",".join(f"j{number}" for number in range(1001)), "jobIds"),
        ("types=x", "types"),
        ("all=maybe", "all"),
        ("timeout=0&timeout=1", "timeout"),
    ],
    ids=lambda value: value[:20],
)
async def test_bad_parameters_are_400_and_named(query: str, field: str) -> None:
    async with server() as at:
        answer = await poll(at, query)
        assert (answer.status, answer.error, answer.json["error"]["field"]) == (400, "invalid_parameter", field)


async def test_a_thousand_job_ids_are_fine() -> None:
    async with server() as at:
        await at.publish("j999", userId="alice")
        names = ",".join(f"j{number}" for number in range(1000))
        assert versions(await poll(at, f"timeout=0&jobIds={names}")) == [("j999", 1)]


@pytest.mark.parametrize("seconds", ["61", "1e9", "1e999"])
async def test_a_timeout_above_60_counts_as_60(seconds: str) -> None:
    assert parse_timeout({"timeout": seconds}) == 60
    async with server() as at:
        answer = await waiting(at, f"jobIds=a&timeout={seconds}", lambda: at.publish("a", userId="alice"))
        assert versions(answer) == [("a", 1)]


async def test_a_poll_is_no_resource_for_head() -> None:
    async with server() as at:
        answer = await at.ask("HEAD", POLL)
        assert (answer.status, answer.headers["allow"]) == (405, "GET, OPTIONS")


async def test_draining_answers_what_waits() -> None:
    async with server() as at:
        await at.publish("a", userId="alice")

        async def leave() -> None:
            await drain(at.node, 0)

        answer = await waiting(at, f"timeout=60&last_seen={at.node.history.epoch}:1", leave)
        assert (versions(answer), answer.json["timedOut"], answer.json["reset"]) == ([], False, False)
        assert answer.headers["connection"] == "close"
        assert (await poll(at, "timeout=0")).status == 503
