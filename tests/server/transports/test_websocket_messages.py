"""Messages of WebSocket clients: publishes and their answers, and what is wrong, or too much."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import trio
from wsproto.events import BytesMessage, TextMessage

from server import publishing
from server.limits import Limits
from server.transports import websocket_messages
from tests.streams import clean_server, cursor, put, session, websocket
from tests.support import AUTH, InProcess, token, until

# Publishing


async def test_publish_is_answered_when_kept_with_what_was_rejected(guarded: InProcess) -> None:
    put(guarded, "done", status="completed")
    async with session(guarded, token=token("w", capabilities=["publish"])) as ws:
        answer = await ws.ask(
            "publish",
            ref=1,
            updates=[
                {"jobId": "a", "userId": "alice", "seq": 1},
                {"jobId": "a", "seq": 1},
                {"jobId": "a", "progress": "much"},
                {"jobId": "done", "progress": 1},
                5,
                {"jobId": "a", "status": "processing"},
            ],
        )
        rejected = answer.pop("rejected")
        assert answer == {"type": "published", "ref": 1, "accepted": 2, "duplicates": 1, "id": cursor(guarded)}
        assert [(refusal["index"], refusal["code"]) for refusal in rejected] == [
            (2, "invalid_field"), (3, "job_ended"), (4, "invalid_update"),
        ]  # fmt: skip
        assert guarded.node.jobs.jobs["a"].latest.version == 2


async def test_a_worker_learns_that_it_shall_stop(server: InProcess) -> None:
    put(server, "a", status="processing")
    put(server, "b", status="processing")
    assert (await server.post("/api/v2/jobs/a/cancel", {})).status == 202
    async with session(server) as ws:
        answer = await ws.ask("publish", updates=[{"jobId": "a", "progress": 1}, {"jobId": "b", "progress": 1}])
        assert (answer["accepted"], answer["cancelRequested"]) == (2, ["a"])


async def test_publishing_needs_the_capability(guarded: InProcess) -> None:
    async with session(guarded, token=token("alice")) as ws:
        answer = await ws.ask("publish", ref="p", updates=[{"jobId": "a", "userId": "alice"}])
        assert (answer["type"], answer["code"], answer["ref"]) == ("error", "forbidden", "p")
        assert not guarded.node.jobs.jobs


async def test_many_publishes_are_answered_in_order(tmp_path: Any) -> None:
    async with clean_server(store={"url": f"sqlite:{tmp_path}/jobs.db"}) as server, session(server) as ws:
        for number in range(100):
            await ws.send("publish", ref=number, updates=[{"jobId": f"job{number}", "userId": "u"}])
        answers = await ws.messages(100)
        assert [(answer["ref"], answer["accepted"]) for answer in answers] == [(number, 1) for number in range(100)]
        assert len(server.node.jobs.jobs) == 100


async def test_publishing_during_a_drain_is_refused(server: InProcess) -> None:
    async with session(server) as ws:
        server.node.start_drain()
        answer = await ws.ask("publish", updates=[{"jobId": "a", "userId": "u"}])
        assert (answer["type"], answer["code"]) == ("error", "try_later")
        assert not server.node.jobs.jobs


async def test_publishes_that_come_together_are_answered_together_and_before_what_follows(server: InProcess) -> None:
    async with session(server) as ws:
        (reader,) = server.node.streams
        sends: list[int] = []
        send = reader.sock_send  # type: ignore[attr-defined]

        def counted(data: bytes) -> int:
            sends.append(len(data))
            return int(send(data))

        reader.sock_send = counted  # type: ignore[attr-defined]
        publish = '{"type":"publish","ref":%d,"updates":[{"jobId":"a","userId":"alice","progress":%d}]}'
        publishes = b"".join(ws.connection.send(TextMessage(publish % (n, n))) for n in range(5))
        await ws.http.send(publishes)
        answers = await ws.messages(5)
        assert [(answer["type"], answer["ref"]) for answer in answers] == [("published", n) for n in range(5)]
        assert len(sends) == 1
        ping = ws.connection.send(TextMessage('{"type":"ping","ref":9}'))
        await ws.http.send(publishes + ping + publishes)
        answers = await ws.messages(11)
        assert [answer["ref"] for answer in answers] == [0, 1, 2, 3, 4, 9, 0, 1, 2, 3, 4]
        await ws.http.send(publishes + b"\x83\x80" + bytes(4))
        closed = await ws.closed()
        assert (closed.code, [message["ref"] for message in ws.left]) == (1002, [0, 1, 2, 3, 4])


async def test_publishes_that_are_kept_together_are_answered_together(tmp_path: Path) -> None:
    async with clean_server(store={"url": f"sqlite:{tmp_path}/s.db"}) as at, session(at) as ws:
        publish = '{"type":"publish","ref":%d,"updates":[{"jobId":"a%d","userId":"alice"}]}'
        for start in range(0, 200, 40):
            await ws.http.send(
                b"".join(ws.connection.send(TextMessage(publish % (n, n))) for n in range(start, start + 40))
            )
            answers = await ws.messages(40)
            assert sorted(answer["ref"] for answer in answers) == list(range(start, start + 40))
        (reader,) = at.node.streams
        assert not reader.corked  # type: ignore[attr-defined]


async def test_publishes_that_come_together_are_taken_or_refused_each_by_itself(server: InProcess) -> None:
    """They are decided in one go; each has its own answer, and a message that is none is answered in its place."""
    texts = [
        '{"type":"publish","ref":1,"updates":[{"jobId":"a","userId":"u","progress":1},{"jobId":"b"},{"jobId":"!"}]}',
        '{"type":"publish","updates":[{"jobId":"a","progress":2}]}',
        '{"type":"publish","ref":"three","updates":[{"jobId":"a","seq":5},{"jobId":"a","seq":5}]}',
        '{"type":"publish","ref":4,"updates":[]}',
        '{"type":"publish","ref":5,"updates":7}',
        '{"type":"publish","ref":6,"updates":[{"jobId":"a","status":"nothing"}]}',
        '{"type":"publish","ref":"sé\\"ven","updates":[{"jobId":"a","status":"completed"}]}',
        '{"type":"publish","ref":8,"updates":[{"jobId":"a","progress":3}]}',
    ]
    async with session(server) as ws:
        await ws.http.send(b"".join(ws.connection.send(TextMessage(text)) for text in texts))
        answers = await ws.messages(len(texts))
        epoch = server.node.broker.epoch
        assert [(answer["type"], answer.get("ref")) for answer in answers] == [
            ("published", 1),
            ("published", None),
            ("published", "three"),
            ("published", 4),
            ("error", 5),
            ("published", 6),
            ("published", 'sé"ven'),
            ("published", 8),
        ]
        assert [refusal["index"] for refusal in answers[0]["rejected"]] == [1, 2]
        assert answers[1] == {
            "type": "published",
            "accepted": 1,
            "duplicates": 0,
            "rejected": [],
            "id": f"{epoch}:2",
        }
        assert (answers[2]["accepted"], answers[2]["duplicates"], answers[2]["id"]) == (1, 1, f"{epoch}:3")
        assert (answers[3]["accepted"], answers[3]["rejected"]) == (0, [])
        assert [answer["accepted"] for answer in answers[5:]] == [0, 1, 0]
        assert [answers[n]["rejected"][0]["code"] for n in (5, 7)] == ["invalid_field", "job_ended"]
        counted = {outcome: n for (source, outcome), n in server.node.counters.updates.items() if source == "websocket"}
        assert counted == {"accepted": 4, "duplicate": 1, "rejected": 4}


async def test_publishes_do_not_wait_with_a_turn_that_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """What came before a message that has to wait for something is not held up by it."""
    go = trio.Event()
    checks: list[int] = []

    async def slow(self: Limits, user: str, now: float, count: int = 1) -> None:
        checks.append(count)
        if len(checks) == 3:
            await go.wait()

    monkeypatch.setattr(Limits, "check_publish", slow)
    async with clean_server(limits={"publishes_per_second": 100}) as server, session(server) as ws:
        publish = '{"type":"publish","ref":%d,"updates":[{"jobId":"a","userId":"u"}]}'
        await ws.http.send(b"".join(ws.connection.send(TextMessage(publish % n)) for n in range(5)))
        assert [answer["ref"] for answer in await ws.messages(2)] == [0, 1]
        assert server.node.history.last == 2
        go.set()
        assert [answer["ref"] for answer in await ws.messages(3)] == [2, 3, 4]


async def test_many_updates_in_a_message_are_taken_in_portions_between_which_others_have_turns(
    server: InProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = 0
    begun: list[int] = []
    take_in = websocket_messages.take_in

    async def count() -> None:
        nonlocal passes
        while True:
            passes += 1
            await trio.lowlevel.checkpoint()

    async def noting(*arguments: Any, **keywords: Any) -> None:
        await take_in(*arguments, **keywords)
        begun.append(passes)

    monkeypatch.setattr(websocket_messages, "PORTION", 5)
    monkeypatch.setattr(websocket_messages, "take_in", noting)
    updates = [{"jobId": f"a{n}", "userId": "u"} if n % 4 else {"jobId": "b"} for n in range(17)]
    async with session(server) as ws, trio.open_nursery() as nursery:
        nursery.start_soon(count)
        before = {"type": "publish", "ref": 1, "updates": [{"jobId": "b1", "userId": "u"}]}
        many = {"type": "publish", "ref": 2, "updates": updates}
        after = {"type": "publish", "ref": 3, "updates": [{"jobId": "a1", "userId": "u"}]}
        texts = [json.dumps(message) for message in (before, many, after)]
        await ws.http.send(b"".join(ws.connection.send(TextMessage(text)) for text in texts))
        answers = await ws.messages(3)
        nursery.cancel_scope.cancel()
    assert [answer["ref"] for answer in answers] == [1, 2, 3]
    assert (answers[1]["accepted"], answers[1]["id"].rpartition(":")[2]) == (12, "13")
    assert [refusal["index"] for refusal in answers[1]["rejected"]] == [0, 4, 8, 12, 16]
    assert len(begun) == 4
    assert begun[-1] - begun[0] >= 2, "in each pass of the loop one portion, and everybody else"
    assert server.node.limits.unfinished == 0


async def test_what_is_known_of_many_updates_is_bounded_until_they_are_answered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with clean_server(limits={"unfinished": 100_000}) as at, session(at) as ws:
        for count, code in ((200, None), (300, None), (400, "try_later")):
            answer = await ws.ask("publish", updates=[5] * count)
            assert answer.get("code") == code
            assert len(answer.get("rejected", ())) == (0 if code else count)
            assert at.node.limits.unfinished == 0
        monkeypatch.setattr(publishing, "MAX_UPDATES", 250)
        assert (await ws.ask("publish", updates=[5] * 251))["code"] == "payload_too_large"
        assert at.node.history.last == 0


async def test_publishes_that_the_store_loses_together_are_refused_one_by_one(tmp_path: Path) -> None:
    async with clean_server(store={"url": f"sqlite:{tmp_path}/s.db"}) as at, session(at) as ws:
        database: Any = at.node.broker._file._db  # type: ignore[attr-defined]
        assert (await ws.ask("publish", updates=[{"jobId": "a", "userId": "u"}]))["accepted"] == 1
        (pages,) = database.execute("PRAGMA page_count").fetchone()
        database.execute(f"PRAGMA max_page_count = {pages}")
        publish = '{"type":"publish","ref":%d,"updates":[{"jobId":"a","metadata":{"m":"' + "m" * 5000 + '"}}]}'
        await ws.http.send(b"".join(ws.connection.send(TextMessage(publish % n)) for n in range(3)))
        answers = await ws.messages(3)
        assert [(answer["code"], answer["ref"]) for answer in answers] == [("store_unavailable", n) for n in range(3)]
        assert at.node.history.last == 1
        many = [{"jobId": "a", "metadata": {"m": "m" * 1000}}] * 300
        assert (await ws.ask("publish", ref="many", updates=many))["code"] == "store_unavailable"
        assert at.node.counters.updates["websocket", "rejected"] == 3 + len(many)
        database.execute("PRAGMA max_page_count = 1000000")
        assert (await ws.ask("publish", updates=[{"jobId": "a", "progress": 5}]))["accepted"] == 1
        (job,) = at.node.jobs.jobs.values()
        assert job.latest.version == 2


# Wrong messages


async def test_wrong_messages_get_errors_and_ten_in_a_row_a_close(server: InProcess) -> None:
    wrong = ["", "{", "[]", "5", '"x"', "null", "{}", '{"type":1}', '{"type":"dance"}']
    async with session(server) as ws:
        for _ in range(2):
            for text in wrong:  # nine
                await ws.send_text(text)
                answer = await ws.receive()
                assert answer["type"] == "error"
                assert answer["code"] in ("malformed_json", "invalid_field"), answer
                assert answer["message"]
            await ws.quiet()  # a good one in between: counted from the start again
        for _ in range(10):
            await ws.send_text("{")
        closed = await ws.closed()
        assert closed.code == 1008
        assert len(ws.left) == 10


async def test_deep_nesting_is_an_error(server: InProcess) -> None:
    async with session(server) as ws:
        for text in ('{"a":' * 20_000, "[" * 100_000, '{"type":"ping","ref":' + "[" * 100_000):
            await ws.send_text(text)
            answer = await ws.receive()
            assert (answer["type"], answer["code"] in ("malformed_json", "invalid_field")) == ("error", True)
        await ws.quiet()


async def test_binary_is_unsupported_and_counts_as_malformed(server: InProcess) -> None:
    async with session(server) as ws:
        await ws.send_event(BytesMessage(b'{"type":"ping"}'))
        answer = await ws.receive()
        assert (answer["type"], answer["code"]) == ("error", "unsupported_data")
        await ws.quiet()
        for _ in range(10):
            await ws.send_event(BytesMessage(b""))
        assert (await ws.closed()).code == 1008


async def test_strangers_get_ten_mistakes_too(guarded: InProcess) -> None:
    async with websocket(guarded) as ws:
        for _ in range(10):
            await ws.send("ping")
        closed = await ws.closed()
        assert (closed.code, {error["code"] for error in ws.left}) == (1008, {"unauthorized"})


async def test_ack_and_ping(server: InProcess) -> None:
    async with session(server) as ws:
        await ws.send("ack", id=cursor(server))
        pong = await ws.ask("ping", ref="p")
        assert (pong["type"], pong["ref"]) == ("pong", "p")
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", pong["timestamp"])
        assert (await ws.ask("ack"))["field"] == "id"


# Rates


async def test_too_fast_is_an_error_then_4429() -> None:
    async with clean_server(auth=AUTH, limits={"messages_per_second": 0.5}) as server:
        async with session(server, token=token("alice")) as ws:
            await ws.quiet()
            for number in range(10):
                await ws.send("ping", ref=number)
            closed = await ws.closed()
            assert closed.code == 4429
            assert [(error["code"], error["ref"]) for error in ws.left] == [("rate_limited", n) for n in range(10)]
        async with session(server, token=token("bob")) as ws:  # each user has a rate of its own
            await ws.quiet()
        server.node.limits.sweep(trio.current_time() + 1000)


async def test_publishing_too_fast_is_an_error() -> None:
    async with clean_server(limits={"publishes_per_second": 1}) as server, session(server) as ws:
        updates = [{"jobId": "a", "userId": "u"}]
        assert (await ws.ask("publish", updates=updates))["type"] == "published"
        answer = await ws.ask("publish", updates=updates, ref=7)
        assert (answer["type"], answer["code"], answer["ref"]) == ("error", "rate_limited", 7)
        server.node.limits.sweep(trio.current_time() + 1000)


async def test_too_many_connections_of_a_user_is_an_error_then_4429() -> None:
    async with clean_server(auth=AUTH, limits={"connections_per_user": 1}) as server:
        async with session(server, token=token("alice")):
            async with websocket(server, token=token("alice")) as ws:
                assert (await ws.closed()).code == 4429
                assert [(m["type"], m["code"]) for m in ws.left] == [("error", "rate_limited")]
            async with websocket(server) as ws:
                await ws.send("auth", token=token("alice"))
                assert (await ws.closed()).code == 4429
            async with session(server, token=token("bob")):
                pass
        await until(lambda: not server.node.streams)
        async with session(server, token=token("alice")) as ws:
            await ws.quiet()
