"""HTTP connections over their lives, against a real server: several requests, slow and vanishing peers, limits."""

from __future__ import annotations

import logging
import socket

import pytest
import trio

from server import socketio
from tests.pacing import for_a_while
from tests.support import Ended, InProcess, configure, request_bytes, server, until

JOBS = "/api/v2/jobs"
GET = request_bytes("GET", "/health")


# --- several requests on a connection -----------------------------------------------------------------------------


async def test_pipelined_requests_are_answered_in_order() -> None:
    async with server() as at, at.connect() as http:
        requests = [request_bytes("POST", f"{JOBS}/j/updates", body={"userId": "a", "seq": n}) for n in range(20)]
        requests += [
            request_bytes("GET", "/nowhere"),
            request_bytes("HEAD", f"{JOBS}/j"),
            request_bytes("GET", f"{JOBS}?limit=x"),
            request_bytes("DELETE", f"{JOBS}/j"),
            request_bytes("GET", f"{JOBS}/j"),
        ]
        await http.send(b"".join(requests))
        assert [(await http.answer()).json["version"] for _ in range(20)] == list(range(1, 21))
        methods = ("GET", "HEAD", "GET", "DELETE", "GET")
        assert [(await http.answer(method)).status for method in methods] == [404, 200, 400, 204, 404]


async def test_a_poll_that_waits_holds_up_what_was_pipelined_behind_it() -> None:
    async with server() as at, at.connect() as http:
        await http.send(request_bytes("GET", f"{JOBS}/poll?jobIds=j&timeout=60") + GET)
        await until(lambda: at.node.polls)
        await at.publish("j", userId="alice")
        assert len((await http.answer()).json["updates"]) == 1
        assert (await http.answer()).json == {"status": "ok"}


async def test_keep_alive_and_close() -> None:
    async with server() as at:
        async with at.connect() as http:
            for _ in range(3):
                answer = await http.request("GET", "/health")
                assert "connection" not in answer.headers
            answer = await http.request("GET", "/health", headers={"Connection": "close"})
            assert answer.headers["connection"] == "close"
            assert await http.closed()
        async with at.connect() as http:
            await http.send(b"GET /health HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
            assert (await http.answer()).headers["connection"] == "keep-alive"
            await http.send(b"GET /health HTTP/1.0\r\n\r\n")
            assert (await http.answer()).headers["connection"] == "close"
            assert await http.closed()


async def test_bytes_after_a_close_spoil_nothing() -> None:
    async with server() as at, at.connect() as http:
        await http.send(request_bytes("GET", "/health", headers={"Connection": "close"}) + b"\x00garbage" * 1000)
        assert (await http.answer()).json == {"status": "ok"}
        assert await http.closed()


async def test_who_has_half_closed_is_answered() -> None:
    async with server() as at, at.connect() as http:
        await http.send(request_bytes("POST", JOBS, body={"jobId": "j1"}) + GET)
        await http.stream.send_eof()
        assert (await http.answer()).status == 201
        assert (await http.answer()).json == {"status": "ok"}
        assert await http.closed()


async def test_half_a_request_is_not_answered() -> None:
    async with server() as at:
        for data in (b"GET / HT", request_bytes("POST", JOBS, headers={"Content-Length": "20"}) + b'{"jobId":'):
            async with at.connect() as http:
                await http.send(data)
                await http.stream.send_eof()
                assert await http.closed()
        assert (await at.get(JOBS)).json["jobs"] == []
        await until(lambda: at.node.connections == 0)


async def test_empty_lines_before_a_request_are_skipped() -> None:
    async with server() as at, at.connect() as http:
        await http.send(b"\r\n" + GET + b"\r\n" + GET)
        assert (await http.answer()).status == (await http.answer()).status == 200


# --- slow and vanishing peers -------------------------------------------------------------------------------------


async def test_a_head_that_does_not_come_to_its_end_is_408() -> None:
    async with server(limits={"head_timeout": 0.5}) as at, at.connect() as http, at.connect() as silent:
        await http.send(GET)
        assert (await http.answer()).status == 200
        await http.send(b"GET /health HTTP/1.1\r\n")
        answer = await http.answer()
        assert (answer.status, answer.error, answer.headers["connection"]) == (408, "request_timeout", "close")
        assert await http.closed()
        async with at.connect() as pipelining:
            await pipelining.send(GET + GET[:20])
            assert [(await pipelining.answer()).status for _ in range(2)] == [200, 408]
        assert await silent.closed(), "who never said anything is owed nothing"


async def test_a_refused_head_that_lingers_is_no_mistake_of_ours(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(socketio, "LINGER_S", 0.7)
    async with server(limits={"head_timeout": 0.4}) as at, at.connect() as http:
        await http.send(b"\0")
        assert (await http.answer()).status == 400
        # The server reads on for a moment, beyond the time that a head may take.
        await until(lambda: at.node.connections == 0)
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


@pytest.mark.parametrize(
    ("limit", "begin"),
    [
        ("head_timeout", b"GET /health HTTP/1.1\r\nX: "),
        ("upload_timeout", request_bytes("POST", JOBS, headers={"Content-Length": "100000"})),
    ],
)
async def test_trickling_prolongs_nothing(limit: str, begin: bytes) -> None:
    async with server(limits={limit: 0.3}) as at, at.connect() as http:
        answered = trio.Event()

        async def trickle() -> None:
            await http.send(begin)
            while not answered.is_set():
                try:
                    await http.send(b"x")
                except trio.BrokenResourceError:
                    return
                await for_a_while(0.01)  # a byte now and then

        async with trio.open_nursery() as nursery:
            nursery.start_soon(trickle)
            assert (await http.answer()).status == 408
            answered.set()


async def test_a_body_that_stops_coming_is_408() -> None:
    async with server(limits={"body_timeout": 0.1}) as at, at.connect() as http:
        await http.send(request_bytes("POST", JOBS, headers={"Content-Length": "14"}) + b'{"jobId"')
        answer = await http.answer()
        assert (answer.status, answer.error, answer.headers["connection"]) == (408, "request_timeout", "close")
        assert await http.closed()
        assert (await at.get(JOBS)).json["jobs"] == []


async def test_large_bodies_under_way_are_bounded_together() -> None:
    async with server(limits={"unfinished": 140_000}) as at, at.connect() as first, at.connect() as second:
        head = request_bytes("POST", "/api/v2/updates", headers={"Content-Length": "200000"})
        await first.send(head + b"[" + b" " * 149_999)
        await until(lambda: at.node.limits.unfinished > 84_000)
        await second.send(head + b"[" + b" " * 149_999)
        answer = await second.answer()
        assert (answer.status, answer.error, answer.headers["retry-after"]) == (503, "try_later", "1")
        assert (await at.publish("small", userId="a", message="m" * 2000)).status == 200, "ordinary ones go on"
        await first.send(b" " * 10_000 + b"]" + b" " * 39_999)
        assert (await first.answer()).status == 200
        assert at.node.limits.unfinished == 0


async def test_what_is_known_of_a_batch_is_bounded_until_it_is_answered() -> None:
    async with server(limits={"unfinished": 500_000}) as at:
        lines = b"x\n" * 5000
        answer = await at.ask("POST", "/api/v2/updates", lines, {"Content-Type": "application/x-ndjson"})
        assert (answer.status, answer.error) == (503, "try_later")
        answer = await at.ask("POST", "/api/v2/updates", lines[:2000], {"Content-Type": "application/x-ndjson"})
        assert (answer.status, len(answer.json["rejected"])) == (200, 1000)
        assert at.node.limits.unfinished == 0


async def test_an_address_cannot_take_all_the_places() -> None:
    async with server(limits={"connections_per_address": 2}, server={"trusted_proxies": ["127.0.0.2/32"]}) as at:
        async with at.connect() as one, at.connect() as two:
            assert [await http.alive() for http in (one, two)] == [True, True]
            refused = await at.get(JOBS)
            assert (refused.status, refused.error) == (429, "rate_limited")
            assert (await at.get("/health")).status == 200
            await one.aclose()
            await until(lambda: at.node.connections == 1)
            assert (await at.get(JOBS)).status == 200
        await until(lambda: at.node.connections == 0)
        assert at.node.limits.entries == 0


async def test_behind_a_proxy_it_is_the_clients_whose_requests_are_counted() -> None:
    proxied = {"trusted_proxies": ["127.0.0.1/32"]}
    async with server(limits={"connections_per_address": 1}, server=proxied) as at:
        poll = request_bytes("GET", f"{JOBS}/poll?jobIds=j&timeout=20", headers={"X-Forwarded-For": "192.0.2.1"})
        async with at.connect() as waiting, at.connect() as kept:
            await waiting.send(poll)
            await until(lambda: at.node.polls)
            for _ in range(2):  # a connection that the proxy keeps takes no place between requests
                assert (await kept.request("GET", JOBS, headers={"X-Forwarded-For": "192.0.2.2"})).status == 200
            assert (await at.get(JOBS, {"X-Forwarded-For": "192.0.2.2"})).status == 200
            assert (await at.get(JOBS, {"X-Forwarded-For": "192.0.2.1"})).status == 429
            await at.publish("j", userId="a")
            assert (await waiting.answer()).status == 200
            assert (await at.get(JOBS, {"X-Forwarded-For": "192.0.2.1"})).status == 200
        assert at.node.limits.entries == 0


async def test_a_peer_that_becomes_a_trusted_proxy_gives_its_place_back() -> None:
    limits, proxied = {"connections_per_address": 5}, {"trusted_proxies": ["127.0.0.1/32"]}
    async with server(limits=limits) as at, at.connect() as http:
        assert await http.alive()
        assert at.node.limits.entries == 1
        at.node.reload(configure({"limits": limits, "server": proxied}))
        for _ in range(2):
            assert (await http.request("GET", JOBS, headers={"X-Forwarded-For": "192.0.2.1"})).status == 200
            assert at.node.limits.entries == 0


async def test_an_idle_connection_is_closed_in_the_end() -> None:
    async with server(limits={"idle_timeout": 0.1}) as at, at.connect() as http:
        assert await http.alive()
        assert await http.closed()


async def test_who_never_reads_is_given_up() -> None:
    async with server(limits={"send_timeout": 0.2}) as at, at.connect() as http:
        text = "m" * 2000
        for part in range(3):
            batch = [{"jobId": f"{part}.{number}", "userId": "a", "message": text} for number in range(3500)]
            await at.post("/api/v2/updates", batch)
        await http.send(request_bytes("GET", f"{JOBS}/poll?timeout=0"))
        await until(lambda: at.node.connections == 0)
        assert await at.get("/health")
        with pytest.raises(Ended):
            await http.answer()


async def test_a_reset_at_any_moment_disturbs_nobody(caplog: pytest.LogCaptureFixture) -> None:
    whole = request_bytes("POST", f"{JOBS}/j/updates", body={"userId": "a"}) + request_bytes(
        "GET", f"{JOBS}/poll?jobIds=x&timeout=0.01"
    )
    async with server() as at:
        for size in range(0, len(whole) + 1, 7):
            async with at.connect() as http:
                if size:
                    await http.send(whole[:size])
                # A close with SO_LINGER 0 is a reset.
                http.stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        await until(lambda: at.node.connections == 0)
        assert not at.node.polls
        assert (await at.get("/health")).status == 200
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


async def test_nothing_is_left_behind_by_any_of_this() -> None:
    async with server() as at:
        async with trio.open_nursery() as nursery:
            for _ in range(50):
                nursery.start_soon(_use, at)
        await until(lambda: at.node.connections == 0)
        assert not at.node.polls
        assert not at.node.hub.readers
        assert not at.node.streams
        assert at.node._busy == 0


async def _use(at: InProcess) -> None:
    async with at.connect() as http:
        await http.request("GET", f"{JOBS}/poll?timeout=0")
        await http.send(request_bytes("GET", f"{JOBS}/poll?timeout=0.01&last_seen={at.node.history.epoch}:0"))
