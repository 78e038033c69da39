"""Polls that wait have no task: who goes away meanwhile, who says more, and what is left of an answer to send."""

from __future__ import annotations

import json
import logging
import socket
from collections.abc import Sequence
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
import trio

from protocol.update import Update
from server import answers, hub
from server.app import drain
from server.connection import Connection
from server.history import History
from server.socketio import RECEIVE_BYTES
from server.transports import longpoll
from server.transports.longpoll import WaitingPoll
from tests.streams import clean_server, connect, put, reset_connection, running_out
from tests.support import AUTH, Answer, Ended, Http, InProcess, bearer, configure, request_bytes, until

POLL = "/api/v2/jobs/poll"
# Far below what the polls here wait for.
SOON_S = 30.0


async def begin(at: InProcess, http: Http, query: str = "jobIds=j", **headers: str) -> None:
    """Send a poll that waits, and see it wait."""
    before = len(at.node.polls)
    await http.send(request_bytes("GET", f"{POLL}?timeout=60&{query}", headers=headers))
    await until(lambda: len(at.node.polls) == before + 1)


def half_close(http: Http) -> None:
    assert isinstance(http.stream, trio.SocketStream)
    http.stream.socket.shutdown(socket.SHUT_WR)


def close(http: Http) -> None:
    assert isinstance(http.stream, trio.SocketStream)
    http.stream.socket.close()


def jobs(answer: Answer) -> list[str]:
    assert answer.status == 200, answer
    return [update["jobId"] for update in answer.json["updates"]]


async def test_it_takes_no_task_and_its_connection_goes_on() -> None:
    async with clean_server() as at, connect(at) as http:
        for number in range(3):
            await begin(at, http, f"jobIds=j{number}")
            assert not at.node.poller._waiting
            put(at, f"j{number}")
            answer = await http.answer()
            assert jobs(answer) == [f"j{number}"]
            assert "transfer-encoding" not in answer.headers, "in one piece"
        assert (await http.request("GET", "/health")).status == 200


@pytest.mark.parametrize("go", [close, reset_connection])
@pytest.mark.parametrize("more", [b"", b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"], ids=["", "pipelined"])
async def test_who_is_gone_is_let_go_at_once(go: object, more: bytes) -> None:
    async with clean_server() as at, connect(at) as http:
        await begin(at, http)
        if more:
            (waiting,) = at.node.polls
            await http.send(more)
            await until(lambda: waiting.exchange.connection.http.begun)
        go(http)  # type: ignore[operator]
        await until(lambda: not at.node.connections, within=SOON_S)
        assert not at.node.polls
        assert not at.node.hub.channels
        assert not at.node._busy


async def test_who_is_gone_from_a_unix_socket_is_let_go_at_once(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    async with clean_server(server={"unix_socket": path}) as at:
        sock = trio.socket.socket(socket.AF_UNIX)
        await sock.connect(path)
        await begin(at, Http(trio.SocketStream(sock)))
        sock.close()
        await until(lambda: not at.node.connections, within=SOON_S)
        assert not at.node.polls


@pytest.mark.parametrize("version", ["1.1", "1.0"])
async def test_who_has_half_closed_gets_the_answer(version: str) -> None:
    async with clean_server() as at, connect(at) as http:
        head = request_bytes("GET", f"{POLL}?jobIds=j&timeout=60").replace(b"HTTP/1.1", f"HTTP/{version}".encode())
        await http.send(head)
        half_close(http)
        await until(lambda: at.node.polls)
        status, headers = await http.head()
        assert (status, headers["connection"], headers["cache-control"]) == (200, "close", "no-store")
        assert ("transfer-encoding" in headers) is (version == "1.1")
        put(at, "j", progress=5)
        if version == "1.1":
            body = b"".join([piece async for piece in http.chunks()])
            assert await http.closed()
        else:
            body = await http.rest()
        assert [update["progress"] for update in json.loads(body)["updates"]] == [5]


async def test_what_was_pipelined_before_a_half_close_is_answered_too() -> None:
    async with clean_server() as at, connect(at) as http:
        await begin(at, http)
        (waiting,) = at.node.polls
        await http.send(request_bytes("GET", "/health"))
        await until(lambda: waiting.exchange.connection.http.begun)
        half_close(http)
        assert (await http.head())[0] == 200
        put(at, "j")
        assert json.loads(b"".join([piece async for piece in http.chunks()]))["updates"][0]["jobId"] == "j"
        assert (await http.answer()).json == {"status": "ok"}
        assert await http.closed()


async def test_what_is_pipelined_behind_many_that_wait_is_read_as_they_are_answered() -> None:
    """Not as much as there is with each of them: that would have no bound."""
    poll = request_bytes("GET", f"{POLL}?jobIds=j&timeout=0.01")
    async with clean_server() as at, connect(at) as http, trio.open_nursery() as nursery:
        nursery.start_soon(_send_for_ever, http, poll * 1000)
        sizes: list[int] = []
        for _ in range(20):
            assert (await http.answer()).json["timedOut"] is True
            sizes += [len(peer.http._buffer) for peer in at.node.poller.peers.values() if isinstance(peer, Connection)]
        nursery.cancel_scope.cancel()
    assert 0 < max(sizes) <= 2 * RECEIVE_BYTES, sizes


async def _send_for_ever(http: Http, data: bytes) -> None:
    with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
        while True:
            await http.stream.send_all(data)


async def test_a_token_that_expires_cuts_off_an_answer_that_has_begun() -> None:
    with running_out(1) as exp:
        async with clean_server(auth=AUTH) as at, connect(at) as http:
            await http.send(request_bytes("GET", f"{POLL}?jobIds=j&timeout=60", headers=bearer("alice", exp=exp)))
            half_close(http)
            with pytest.raises(Ended):
                await http.answer()


async def test_an_answer_that_the_socket_does_not_take_is_sent_as_it_is_read() -> None:
    async with clean_server() as at, connect(at, receive_buffer=1) as http:
        # Some in one piece, one that comes in several.
        for size in (60_000, 63_000, 1000):
            await begin(at, http, f"last_seen={at.node.history.epoch}:{at.node.history.last}")
            (waiting,) = at.node.polls
            waiting.exchange.connection.sock.setsockopt(  # type: ignore[attr-defined]
                socket.SOL_SOCKET, socket.SO_SNDBUF, 1
            )
            many = 1 if size > 1000 else 200
            batch = [
                {"jobId": f"{size}.{number}", "userId": "a", "metadata": {"text": "x" * size}} for number in range(many)
            ]
            assert (await at.post("/api/v2/updates", batch)).status == 200
            await until(lambda: at.node.poller._waiting)
            assert at.node._busy
            first = jobs(await http.answer())
            assert first == [f"{size}.{number}" for number in range(len(first))]
            await until(lambda: not at.node._busy)
        assert (await http.request("GET", "/health")).status == 200


async def test_who_reads_nothing_of_a_late_answer_is_given_up() -> None:
    limits = {"send_timeout": 0.2}
    async with clean_server(limits=limits) as at, connect(at, receive_buffer=1) as http:
        await begin(at, http, f"last_seen={at.node.history.epoch}:0&client_id=c")
        (waiting,) = at.node.polls
        waiting.exchange.connection.sock.setsockopt(  # type: ignore[attr-defined]
            socket.SOL_SOCKET, socket.SO_SNDBUF, 1
        )
        put(at, "j", metadata={"text": "x" * 60_000})
        await until(lambda: not at.node.connections)
        assert not at.node._busy
        assert not at.node.cursors._cursors, "what was not sent was not seen"


async def test_who_half_closes_while_the_socket_is_full_gets_the_answer() -> None:
    """There is no room for the head that would show who is gone; that is no reason to let go of who is not."""
    async with clean_server() as at, connect(at) as http:
        await begin(at, http)
        (waiting,) = at.node.polls
        connection = waiting.exchange.connection
        sock: socket.socket = connection.sock  # type: ignore[assignment]
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 32768)
        filled = 0
        with suppress(BlockingIOError):
            while True:
                filled += sock.send(bytes(1024))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)  # what is acknowledged a moment later makes no room
        half_close(http)
        await until(lambda: connection._listens_for == 0 or not at.node.polls)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 32768)
        put(at, "j", progress=5)
        await until(lambda: not at.node.polls)
        text = await http.rest()
        assert text[:filled] == bytes(filled)
        head, _, body = text[filled:].partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 "), text[filled:]
        assert json.loads(body)["updates"][0]["progress"] == 5


async def test_the_last_answer_of_a_connection_closes_it() -> None:
    async with clean_server() as at, connect(at) as http:
        await begin(at, http, Connection="close")
        put(at, "j")
        answer = await http.answer()
        assert (jobs(answer), answer.headers["connection"]) == (["j"], "close")
        assert await http.closed()


async def test_a_drain_answers_many() -> None:
    async with clean_server() as at:
        async with trio.open_nursery() as nursery:
            answers: list[Answer] = []

            async def ask() -> None:
                answers.append(await at.get(f"{POLL}?jobIds=j&timeout=60"))

            for _ in range(20):
                nursery.start_soon(ask)
            await until(lambda: len(at.node.polls) == 20)
            await drain(at.node, 0)
        assert [(jobs(answer), answer.headers["connection"]) for answer in answers] == [([], "close")] * 20


async def test_a_mistake_of_ours_is_a_500_and_the_connection_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(self: WaitingPoll, *, late: bool) -> None:
        raise ValueError("the password is hunter2")

    async with clean_server() as at, connect(at) as http:
        await begin(at, http)
        with monkeypatch.context() as patch:
            patch.setattr(WaitingPoll, "answer", fail)
            put(at, "j")
            answer = await http.answer()
        assert (answer.status, answer.error) == (500, "internal_error")
        assert b"hunter2" not in answer.body
        assert (await http.request("GET", "/health")).status == 200
    (failure,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert failure.exc_info


# What is kept from one poll for the next


async def test_polls_that_wait_for_the_same_are_told_the_same_and_others_what_is_theirs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each is what it would be alone; the same question from the same place on is answered from the log once."""
    collected: list[object] = []
    collect = longpoll._collect

    def counting(*arguments: Any) -> Any:
        collected.append(arguments)
        return collect(*arguments)

    async with clean_server(auth=AUTH) as at, AsyncExitStack() as stack:
        put(at, "j", "alice")
        put(at, "j", "alice", progress=1)
        epoch = at.node.history.epoch
        asked = [
            *(("jobIds=j", "alice", 2),) * 3,
            ("jobIds=j", "bob", 2),
            ("jobIds=j&fields=progress", "alice", 2),
            ("jobIds=j&kind=other", "alice", 2),
            ("", "alice", 2),
            ("jobIds=j&client_id=c", "alice", 2),
        ]
        polls = []
        for query, user, offset in asked:
            http = await stack.enter_async_context(connect(at))
            await begin(at, http, f"{query}&last_seen={epoch}:{offset}", **bearer(user))
            polls.append(http)
        monkeypatch.setattr(longpoll, "_collect", counting)
        put(at, "j", "alice", progress=5, message="m")
        answers = [await polls[index].answer() for index in (0, 1, 2, 4, 6, 7)]
        assert len(at.node.polls) == 2
        assert len(collected) == 3, "the first three, the fields and all jobs: the client asks what the first did"
        put(at, "k", "bob")  # not the one that bob has asked for
        await drain(at.node, 0)
        answers += [await polls[index].answer() for index in (3, 5)]
    assert [jobs(answer) for answer in answers] == [["j"]] * 6 + [[], []]
    assert answers[0].body == answers[1].body == answers[2].body == answers[5].body
    assert answers[0].headers["x-request-id"] != answers[1].headers["x-request-id"]
    assert "message" in answers[0].json["updates"][0]
    assert set(answers[3].json["updates"][0]) == {"type", "id", "jobId", "status", "version", "progress"}


async def test_a_filter_makes_the_work_no_more_however_long_it_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """What came meanwhile and is not wanted is neither looked through again nor a loss when it is trimmed, and who came
    later is told the same."""
    looked_from: list[int] = []
    missed_updates = longpoll.missed_updates

    def noting(history: History, names: Sequence[str], after: int) -> list[Update]:
        looked_from.append(after)
        return missed_updates(history, names, after)

    async with clean_server(history={"max_updates": 50}) as at, AsyncExitStack() as stack:
        epoch = at.node.history.epoch
        polls = []
        for _ in range(3):
            http = await stack.enter_async_context(connect(at))
            await begin(at, http, f"kind=rare&last_seen={epoch}:{at.node.history.last}")
            polls.append(http)
            for number in range(40):
                put(at, f"job_{number}")
            await until(lambda: at.node.hub.given() == at.node.history.last)
        monkeypatch.setattr(longpoll, "missed_updates", noting)
        put(at, "rare", kind="rare")
        for http in polls:
            answer = await http.answer()
            assert (jobs(answer), answer.json["reset"]) == (["rare"], False)
            assert answer.json["last_seen"] == f"{epoch}:121"
        assert looked_from == [120]
        # Nor when the time is over.
        at.node.reload(configure({"limits": {"poll_timeout": 0.05}}))
        answer = await polls[0].request("GET", f"{POLL}?kind=rare&last_seen={epoch}:121")
        assert (jobs(answer), answer.json["timedOut"]) == ([], True)


async def test_a_log_that_is_lost_answers_many_in_turns(impatient: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "YIELD_ALWAYS_S", -1.0)
    async with clean_server() as at, AsyncExitStack() as stack:
        put(at, "j")
        polls = []
        for _ in range(20):
            http = await stack.enter_async_context(connect(at))
            await begin(at, http, f"last_seen={at.node.history.epoch}:1")
            polls.append(http)
        at.node.history.restart("newepoch", 7)
        at.node.log_lost("newepoch")
        most, before = 0, len(at.node.polls)
        assert before == 20
        while at.node.polls:
            await trio.lowlevel.checkpoint()
            most, before = max(most, before - len(at.node.polls)), len(at.node.polls)
        assert most <= 2, "one, and perhaps another as the order of tasks in a pass is random"
        for http in polls:
            answer = await http.answer()
            assert (jobs(answer), answer.json["reset"], answer.json["last_seen"]) == (["j"], True, "newepoch:7")


async def test_what_is_kept_for_others_is_bounded_with_the_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer of a hundred bytes may be to a question of a hundred kilobytes."""
    bound = 300_000
    monkeypatch.setattr(answers, "SHARED_BYTES", bound)
    async with clean_server() as at, connect(at) as http:
        put(at, "j")
        await http.request("GET", f"{POLL}?timeout=0&last_seen={at.node.history.epoch}:1&jobIds=j")
        kept = at.node.told._kept
        assert kept
        for number in range(20):
            for name in ("jobIds", "kind"):
                words = ",".join(f"{number}.{count}.{'x' * 50}" for count in range(500))
                target = f"{POLL}?timeout=0&last_seen={at.node.history.epoch}:1&{name}={words}"
                assert jobs(await http.request("GET", target)) == []
                assert sum(len(repr(key)) for key in kept) <= bound


async def test_the_same_connection_may_ask_for_something_else() -> None:
    async with clean_server(auth=AUTH) as at, connect(at) as http:
        put(at, "a", "alice")
        put(at, "b", "alice")
        put(at, "c", "bob")
        epoch = at.node.history.epoch

        async def ask(query: str, user: str = "alice") -> list[str]:
            return jobs(await http.request("GET", f"{POLL}?{query}", headers=bearer(user)))

        for _ in range(2):
            assert await ask(f"timeout=0&last_seen={epoch}:0&jobIds=a") == ["a"]
            assert await ask(f"timeout=0&last_seen={epoch}:0&jobIds=a") == ["a"]
            assert await ask(f"timeout=0&last_seen={epoch}:1&jobIds=a") == []
            assert await ask(f"timeout=0&last_seen={epoch}%3A0&jobIds=b") == ["b"]
            assert await ask(f"timeout=0&last_seen={epoch}:0&jobIds=b") == ["b"]
            assert await ask(f"timeout=0&last_seen={epoch}:0") == ["a", "b"]
            assert await ask(f"timeout=0&last_seen={epoch}:0", "bob") == ["c"]
            assert await ask("timeout=0&last_seen=&jobIds=b") == ["b"]
            assert await ask(f"timeout=0&jobIds=a,b&x_last_seen={epoch}:1") == ["a", "b"]
        twice = await http.request("GET", f"{POLL}?timeout=0&last_seen={epoch}:0&last_seen=0", headers=bearer("alice"))
        assert (twice.status, twice.json["error"]["field"]) == (400, "last_seen")


async def test_a_reload_holds_for_the_next_poll_of_a_connection() -> None:
    async with clean_server() as at, connect(at) as http:
        put(at, "j")
        target = f"{POLL}?timeout=60&last_seen={at.node.history.epoch}:1"
        await begin(at, http, f"last_seen={at.node.history.epoch}:1")
        put(at, "j")
        assert jobs(await http.answer()) == ["j"]
        at.node.reload(configure({"limits": {"poll_timeout": 0.05}}))
        target = target.replace(":1", ":2")
        assert (await http.request("GET", target)).json["timedOut"] is True
