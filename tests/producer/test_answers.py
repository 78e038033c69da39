"""What a server, or something in front of one, may answer; none of it disturbs the worker."""

from __future__ import annotations

import json
import logging
import time
from typing import Any

import pytest
import trio

from statuswire import Client, Unavailable, complete_task, job, update_task
from statuswire.outbox import BASE_DELAY
from tests.producer.workers import settled, worker
from tests.server.commands.scripted import Answer, ScriptedServer, as_json, error, scripted
from tests.support import PATIENCE_S, until

pytestmark = pytest.mark.slow

TAKEN = as_json(200, {"accepted": 1, "duplicates": 0, "rejected": [], "id": "e:1"})


def bodies(server: ScriptedServer) -> list[list[dict[str, Any]]]:
    return [json.loads(seen.body) for seen in server.seen]


@pytest.mark.parametrize(
    "answer",
    [
        error(503, "try_later", "going away"),
        error(429, "rate_limited", "too fast", Retry_After="0"),
        error(500, "internal", "oops"),
        error(401, "token_expired", "expired"),
        error(403, "forbidden", "no publish"),
        error(404, "not_found", "another application"),
        Answer(302, {"Location": "/login"}),
        Answer(502, {"Content-Type": "text/html"}, b"<html>Bad Gateway</html>"),
        Answer(200, {"Content-Type": "text/html"}, b"<html>Welcome</html>"),
        Answer(None),
        Answer(200, pieces=[b'{"accepted'], drop=True),
        as_json(200, {"rejected": [{"index": 0, "code": "overloaded", "message": "again"}]}),
    ],
    ids=lambda answer: f"{answer.status} {answer.body[:40].decode()}",
)
async def test_passing_trouble(answer: Answer) -> None:
    with scripted(answer, TAKEN) as server:
        async with worker(server.url) as client:
            complete_task("a", user="u", client=client)
            await settled(client)
        (first,), (second,) = bodies(server)
        assert first["eventId"]
        assert first == second  # the same again: it counts once


async def test_retry_after_is_waited_for() -> None:
    with scripted(error(503, "try_later", "x", Retry_After="1"), TAKEN) as server:
        async with worker(server.url) as client:
            started = time.monotonic()
            update_task("a", 1, user="u", client=client)
            await until(lambda: len(server.seen) == 2)
            assert time.monotonic() - started >= 1


async def test_news_goes_on_to_be_merged_while_the_server_is_away() -> None:
    with scripted(error(503, "try_later", "x", Retry_After="1"), TAKEN, TAKEN) as server:
        async with worker(server.url) as client:
            j = job("a", user="u", client=client)
            await until(lambda: len(server.seen) == 1)
            for percent in range(50):
                j.progress(percent, stage="x")
            await settled(client)
            j.cancel()
            await settled(client)
        sent = bodies(server)
        assert [len(batch) for batch in sent] == [1] * len(sent)
        last_news, end = sent[-2][0], sent[-1][0]
        assert {**last_news, "seq": 0} == {
            "jobId": "a",
            "userId": "u",
            "status": "processing",
            "progress": 49,
            "stage": "x",
            "seq": 0,
        }
        assert (end["status"], "userId" in end) == ("cancelled", False)


async def test_a_batch_that_is_refused_as_a_whole(caplog: pytest.LogCaptureFixture) -> None:
    malformed = error(400, "malformed_json", "not JSON")
    with scripted(error(503, "x", "y", Retry_After="1"), malformed, TAKEN, malformed, malformed, TAKEN) as server:
        async with worker(server.url) as client:
            update_task("good", 1, user="u", client=client)
            await until(lambda: len(server.seen) == 1)
            complete_task("bad", user="u", result={"x": 1}, client=client)
            await settled(client)
        assert [[one["jobId"] for one in batch] for batch in bodies(server)[1:]] == [
            ["good", "bad"],
            ["good"],
            ["bad"],
            ["bad"],
        ]
        assert "result" not in bodies(server)[4][0]
    assert [one.message for one in caplog.records if one.levelno == logging.WARNING][-1] == (
        "job bad: refused: not JSON (malformed_json)"
    )


async def test_a_server_that_hangs_never_holds_up_the_worker() -> None:
    with scripted(Answer(200, pieces=[b"{"], hold=True)) as server:
        async with worker(server.url) as client:
            j = job("a", user="u", ttl=1, client=client)
            await trio.to_thread.run_sync(server.held.wait, PATIENCE_S)
            started = time.perf_counter()
            for percent in range(20_000):
                j.progress(percent / 200, "message", stage=f"{percent}")
            j.complete()
            assert time.perf_counter() - started < 2
            assert len(client._outbox._queue) == 1
            server.stopping.set()


async def test_an_outage_is_logged_once_and_its_end_too(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "statuswire")
    with scripted(*[error(503, "try_later", "going away")] * 2, TAKEN) as server:
        async with worker(server.url, token="secret-token") as client:
            complete_task("a", user="u", client=client)
            for _ in range(4):
                await settled(client)
    texts = [one.message for one in caplog.records if one.name.startswith("statuswire")]
    assert len(texts) == 2
    assert "answered 503: going away" in texts[0]
    assert "answers again" in texts[1]
    assert "secret" not in "".join(texts)


async def test_a_token_that_cannot_be_had_is_an_outage() -> None:
    calls: list[int] = []

    def flaky() -> str:
        calls.append(1)
        if len(calls) < 3:
            raise RuntimeError("the vault is sealed")
        return "t"

    with scripted(TAKEN) as server:
        async with worker(server.url, token=flaky) as client:
            update_task("a", 1, user="u", client=client)
            await settled(client)
        assert server.seen[0].headers["authorization"] == "Bearer t"


async def test_strict_says_when_there_is_no_answer() -> None:
    with scripted() as server:
        async with worker(server.url, strict=True, timeout=0.2) as client:
            with pytest.raises(Unavailable, match="not answered"):
                complete_task("a", user="u", client=client)
            with pytest.raises(ValueError, match="mine"), job("b", user="u", client=client):
                raise ValueError("mine")  # not replaced by what the server says


async def test_a_large_batch_goes_in_parts() -> None:
    with scripted(*[TAKEN] * 60) as server:
        async with worker(server.url) as client:
            for number in range(450):
                update_task(f"{number}", 1, user="u", metadata={"text": "x" * 10_000}, client=client)
            await settled(client)
        assert sum(len(batch) for batch in bodies(server)) == 450
        assert max(len(seen.body) for seen in server.seen) <= 1024 * 1024
        assert max(len(batch) for batch in bodies(server)) <= 200


def test_progress_costs_the_worker_microseconds() -> None:
    client = Client("http://127.0.0.1:9", spool_dir="")
    j = job("a", user="u", client=client)
    calls = 20_000
    best = min(_seconds(j.progress, calls) for _ in range(5)) / calls
    client.close(0)
    # Compared with as much of plain Python on the same machine: some 20 dictionaries made and merged.
    plain = min(_seconds(_merge, calls) for _ in range(5)) / calls
    assert best < 20 * plain
    assert BASE_DELAY > 0


def _seconds(call: Any, times: int) -> float:
    started = time.thread_time()
    for number in range(times):
        call(number, "message")
    return time.thread_time() - started


def _merge(progress: float, message: str) -> dict[str, object]:
    found: dict[str, object] = {}
    found.update({"progress": progress, "message": message})
    return found
