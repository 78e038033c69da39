"""HTTP at its edges, against a real server: methods, paths, framing, limits, slow and vanishing peers."""

from __future__ import annotations

import logging
import re
import socket

import pytest
import trio

from protocol.errors import ApiError
from protocol.fields import MAX_UPDATE
from protocol.http1 import MAX_HEADER_SECTION, MAX_REQUEST_LINE
from server import socketio
from server.answers import JSON, Response
from server.connection import Exchange
from server.routes import ROUTES, Route
from tests.support import AUTH, Ended, Http, InProcess, bearer, request_bytes, server, until

JOBS = "/api/v2/jobs"
GET = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"


async def alive(http: Http) -> bool:
    """Whether the connection goes on, in step."""
    return (await http.request("GET", "/health")).json == {"status": "ok"}


# --- methods and paths --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "target", "allow"),
    [
        ("PUT", JOBS, "GET, POST, HEAD, OPTIONS"),
        ("DELETE", JOBS, "GET, POST, HEAD, OPTIONS"),
        ("PATCH", f"{JOBS}/j1", "GET, DELETE, HEAD, OPTIONS"),
        ("POST", f"{JOBS}/j1", "GET, DELETE, HEAD, OPTIONS"),
        ("GET", f"{JOBS}/j1/updates", "POST, OPTIONS"),
        ("HEAD", f"{JOBS}/j1/updates", "POST, OPTIONS"),
        ("GET", f"{JOBS}/j1/cancel", "POST, OPTIONS"),
        ("POST", f"{JOBS}/poll", "GET, OPTIONS"),
        ("HEAD", f"{JOBS}/stream", "GET, OPTIONS"),
        ("GET", "/api/v2/updates", "POST, OPTIONS"),
        ("POST", "/health", "GET, HEAD, OPTIONS"),
        ("POST", "/ws/jobs", "GET, OPTIONS"),
        ("get", "/health", "GET, HEAD, OPTIONS"),
        ("BREW", "/", "GET, HEAD, OPTIONS"),
    ],
)
async def test_a_method_that_a_path_lacks_is_405_with_allow(method: str, target: str, allow: str) -> None:
    async with server() as at, at.connect() as http:
        answer = await http.request(method, target)
        assert (answer.status, answer.headers["allow"]) == (405, allow)
        if method != "HEAD":
            assert answer.error == "method_not_allowed"
        options = await http.request("OPTIONS", target)
        assert (options.status, options.headers["allow"], options.body) == (204, allow, b"")


async def test_options_of_the_whole_server_and_connect() -> None:
    async with server() as at, at.connect() as http:
        assert (await http.request("OPTIONS", "*")).status == 204
        answer = await http.request("CONNECT", "example.com:443")
        assert (answer.status, answer.error) == (405, "method_not_allowed")
        assert await http.closed()


@pytest.mark.parametrize(
    "target",
    [
        "/nowhere",
        "/health/",
        "//health",
        "/Health",
        "/api/v2/jobs/",
        "/api/v2/jobs//updates",
        "/api/v2/jobs/a/b/c",
        "/api/v2/jobs/a%2Fb/c",
        "/ws/echo",
        "/api/../health",
    ],
)
async def test_what_is_not_there_is_404(target: str) -> None:
    async with server() as at, at.connect() as http:
        answer = await http.request("GET", target)
        assert (answer.status, answer.error) == (404, "not_found")
        assert await alive(http)


async def test_paths_are_percent_decoded() -> None:
    async with server() as at:
        await at.publish("a@b:c", userId="alice")
        assert (await at.get(f"{JOBS}/a%40b%3ac")).status == 200
        assert (await at.get("/%68ealth")).status == 200
        for target in (f"{JOBS}/%", f"{JOBS}/%zz", f"{JOBS}/%ff", f"{JOBS}/%00"):
            assert (await at.get(target)).status == 400, target


async def test_head_of_everything_that_can_be_got() -> None:
    async with server() as at, at.connect() as http:
        for target in ("/", "/health", "/ready", JOBS):
            head = await http.request("HEAD", target)
            get = await http.request("GET", target)
            assert head.status == get.status == 200
            assert head.headers["content-type"] == get.headers["content-type"]


async def test_the_page_is_cached_by_etag() -> None:
    async with server() as at:
        page = await at.get("/")
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        again = await at.get("/", {"If-None-Match": page.headers["etag"]})
        assert (again.status, again.body) == (304, b"")
        assert "default-src 'none'" in page.headers["content-security-policy"]


# --- base path ----------------------------------------------------------------------------------------------------


async def test_a_base_path_moves_everything() -> None:
    async with server(server={"base_path": "/status/wire/"}) as at:
        base = "/status/wire"
        assert (await at.get(f"{base}/health")).status == 200
        assert (await at.get(f"{base}/ready")).status == 200
        created = await at.post(f"{base}{JOBS}", {"jobId": "j1"})
        assert created.headers["location"] == f"{base}{JOBS}/j1"
        assert (await at.get(created.headers["location"])).status == 200
        for target in ("/health", "/", JOBS, "/status", "/status/wirex/health", "/status/wire2"):
            assert (await at.get(target)).error == "not_found", target
        assert b"<html" in (await at.get(f"{base}/")).body
        bare = await at.get(f"{base}?jobs=a")
        assert (bare.status, bare.headers["location"]) == (308, f"{base}/?jobs=a")


# --- bodies -------------------------------------------------------------------------------------------------------


async def test_a_body_of_unknown_length_must_say_so() -> None:
    async with server() as at, at.connect() as http:
        for target, content_type in (
            (JOBS, "application/json"),
            (f"{JOBS}/j1/updates", "application/json"),
            ("/api/v2/updates", "application/json"),
            ("/api/v2/updates", "application/x-ndjson"),
        ):
            answer = await http.request("POST", target, headers={"Content-Type": content_type})
            assert (answer.status, answer.error) == (411, "length_required")
        assert await alive(http)
        await at.publish("j1", userId="anonymous")
        assert (await http.request("POST", f"{JOBS}/j1/cancel")).status == 202, "no body is needed here"


async def test_a_chunked_body_with_extensions_and_trailers() -> None:
    async with server() as at, at.connect() as http:
        await http.send(
            b"POST /api/v2/jobs HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
            b"A;ext=1\r\n" + b'{"jobId":"' + b"\r\n" + b'4\r\nj1"}\r\n0\r\nX-Trailer: 1\r\n\r\n' + GET
        )
        assert (await http.answer()).json["job"]["jobId"] == "j1"
        assert (await http.answer()).json == {"status": "ok"}


@pytest.mark.parametrize("framing", ["length", "chunked"])
async def test_a_body_that_is_too_large_is_413_as_soon_as_that_is_known(framing: str) -> None:
    async with server() as at, at.connect() as http:
        head = f"POST {JOBS} HTTP/1.1\r\nHost: localhost\r\n".encode()
        if framing == "length":
            await http.send(head + b"Content-Length: %d\r\n\r\n" % (MAX_UPDATE + 1))
        else:
            size = MAX_UPDATE // 2 + 1
            piece = b"%x\r\n%b\r\n" % (size, b" " * size)
            await http.send(head + b"Transfer-Encoding: chunked\r\n\r\n" + piece + piece)
        answer = await http.answer()
        assert (answer.status, answer.error, answer.headers["connection"]) == (413, "payload_too_large", "close")
        assert await http.closed()


async def test_who_sends_far_too_much_still_hears_so() -> None:
    async with server() as at, at.connect() as http:
        size = 10 * 1024 * 1024
        await http.send(b"POST /api/v2/updates HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % size)
        await http.send(b" " * size)
        assert (await http.answer()).status == 413


async def test_expect_100_continue() -> None:
    async with server(auth=AUTH) as at:
        expect = {"Content-Length": "14", "Expect": "100-Continue"}
        async with at.connect() as http:
            await http.send(request_bytes("POST", JOBS, headers=expect | bearer("root", admin=True)))
            assert await http.head() == (100, {})
            await http.send(b'{"jobId":"j1"}')
            assert (await http.answer()).status == 201
            assert await alive(http)
        async with at.connect() as http:
            await http.send(request_bytes("POST", JOBS, headers=expect | bearer("bob")))
            status, headers = await http.head()
            assert (status, headers["connection"]) == (403, "close"), "a refusal comes instead of the 100"
        async with at.connect() as http:
            whole = request_bytes("POST", JOBS, headers=expect | bearer("root", admin=True)) + b'{"jobId":"j2"}'
            await http.send(whole)
            status, _ = await http.head()
            assert status == 201, "who did not wait needs no 100"
        answer = await at.ask("POST", JOBS, b"{}", {"Expect": "201-created"})
        assert (answer.status, answer.error) == (417, "expectation_failed")


async def test_a_body_nobody_reads_ends_the_connection_in_step() -> None:
    async with server() as at, at.connect() as http:
        await http.send(request_bytes("GET", "/health", body=b"GET / HTTP/1.1\r\n\r\n") + GET)
        answer = await http.answer()
        assert (answer.status, answer.headers["connection"]) == (200, "close")
        assert await http.closed(), "nothing after it was taken for a request"


# --- what is no request -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a b\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n", 400),
        (b"GET /\r\n\r\n", 400),
        (b"GET / HTTP/1.1\nHost: localhost\n\n", 400),
        (b"GET /\xc3\xa4 HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nA b: c\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nA: b\r\n c\r\n\r\n", 400),
        (b"GET /#x HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
        (b"GET x HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
        (b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: +1\r\n\r\n", 400),
        (b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
        (b"POST /api/v2/jobs HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999999999999\r\n\r\n", 413),
        (b"GET /" + b"a" * MAX_REQUEST_LINE, 414),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nA: " + b"a" * MAX_HEADER_SECTION, 431),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"A: b\r\n" * 101 + b"\r\n", 431),
        (b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: gzip\r\n\r\n", 501),
        (b"GET / HTTP/2.0\r\nHost: localhost\r\n\r\n", 505),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
    ],
    ids=lambda value: repr(value)[2:50] if isinstance(value, bytes) else None,
)
async def test_what_is_no_request_is_answered_once_and_ends_the_connection(data: bytes, status: int) -> None:
    async with server() as at:
        async with at.connect() as http:
            await http.send(data)
            answer = await http.answer()
            assert answer.status == status
            assert re.fullmatch(r"[a-z_]+", answer.error)
            assert answer.headers["connection"] == "close"
            assert await http.closed()
        await until(lambda: at.node.connections == 0)


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
    async with server(limits={"head_timeout": 0.2}) as at, at.connect() as http, at.connect() as silent:
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
    monkeypatch.setattr(socketio, "LINGER_S", 0.3)
    async with server(limits={"head_timeout": 0.1}) as at, at.connect() as http:
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
            with trio.move_on_after(20):
                while not answered.is_set():
                    try:
                        await http.send(b"x")
                    except trio.BrokenResourceError:
                        return
                    await trio.sleep(0.01)

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
            assert [await alive(http) for http in (one, two)] == [True, True]
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


async def test_an_idle_connection_is_closed_in_the_end() -> None:
    async with server(limits={"idle_timeout": 0.1}) as at, at.connect() as http:
        assert await alive(http)
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


# --- every answer -------------------------------------------------------------------------------------------------


async def test_every_answer_has_a_date_and_a_request_id() -> None:
    async with server() as at, at.connect() as http:
        seen = set()
        for target in ("/health", "/nowhere", f"{JOBS}?limit=x", f"{JOBS}/poll?timeout=0"):
            answer = await http.request("GET", target)
            assert re.fullmatch(r"\w{3}, \d\d \w{3} \d{4} \d\d:\d\d:\d\d GMT", answer.headers["date"])
            seen.add(answer.headers["x-request-id"])
            assert "server" not in answer.headers
        assert len(seen) == 4
        refused = await http.request("GET", "x")
        assert refused.headers["x-request-id"] not in seen
        assert refused.error == "bad_request"


@pytest.mark.parametrize(
    ("given", "honoured"),
    [
        ("abc-123", True),
        ("A.b_c:d@e", True),
        ("x" * 128, True),
        ("x" * 129, False),
        ("", False),
        ("a b", False),
        ("a,b", False),
        ("a\u00e4", False),
        ("<script>", False),
    ],
)
async def test_a_request_id_is_honoured_if_it_is_one(
    given: str, honoured: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with server() as at:
        answer = await at.get("/nowhere", {"X-Request-Id": given})
        request_id = answer.headers["x-request-id"]
        assert (request_id == given) is honoured
        assert answer.json["error"]["requestId"] == request_id
        (fields,) = [vars(record)["fields"] for record in caplog.records if record.getMessage() == "request"]
        assert (fields["requestId"], fields["status"], fields["path"]) == (request_id, 404, "/nowhere")


async def test_a_mistake_of_ours_is_a_500_that_says_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail(exchange: Exchange) -> Response:
        raise ValueError("the password is hunter2")

    async def group(exchange: Exchange) -> Response:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fail, exchange)
        return Response(200)

    monkeypatch.setitem(ROUTES, "/fail", {"GET": Route(fail, public=True)})
    monkeypatch.setitem(ROUTES, "/group", {"GET": Route(group, public=True)})
    async with server() as at, at.connect() as http:
        for target in ("/fail", "/group"):
            answer = await http.request("GET", target, headers={"X-Request-Id": f"r{target[1:]}"})
            assert (answer.status, answer.error) == (500, "internal_error")
            assert b"hunter2" not in answer.body
            assert b"ValueError" not in answer.body
            assert answer.json["error"]["requestId"] == f"r{target[1:]}"
            assert await alive(http)
    failures = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert [vars(record)["fields"]["requestId"] for record in failures] == ["rfail", "rgroup"]
    assert all(record.exc_info for record in failures), "the log has it all"


async def test_a_mistake_in_the_middle_of_an_answer_cuts_it_off(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def pieces() -> object:
        yield b'{"half":'
        raise ValueError("broken")

    async def half(exchange: Exchange) -> Response:
        return Response(200, (JSON,), pieces())  # type: ignore[arg-type]

    monkeypatch.setitem(ROUTES, "/half", {"GET": Route(half, public=True)})
    async with server() as at:
        async with at.connect() as http:
            await http.send(request_bytes("GET", "/half"))
            with pytest.raises(Ended):
                await http.answer()
        assert (await at.get("/health")).status == 200
        assert at.node.connections <= 1
    assert "connection_failed" in caplog.text


async def test_a_stream_that_asks_is_told_to_try_later_and_others_429(monkeypatch: pytest.MonkeyPatch) -> None:
    async def busy(exchange: Exchange) -> Response:
        raise ApiError(503, "overloaded", "too much", retry_after=7)

    monkeypatch.setitem(ROUTES, "/busy", {"GET": Route(busy, public=True), "POST": Route(busy, public=True)})
    async with server() as at:
        for method, accept, streamed in (
            ("GET", "text/event-stream", True),
            ("GET", "application/json, Text/Event-Stream;q=0.9", True),
            ("GET", "text/event-stream;q=0", False),
            ("GET", "*/*", False),
            ("POST", "text/event-stream", False),
        ):
            answer = await at.ask(method, "/busy", headers={"Accept": accept})
            if streamed:
                assert (answer.status, answer.headers["content-type"]) == (200, "text/event-stream")
                match = re.fullmatch(rb"retry: (\d+)\ndata: (\{.*\})\n\n", answer.body)
                assert match
                assert int(match[1]) >= 7000
                assert b'"code":"try_later"' in match[2]
            else:
                assert (answer.status, answer.headers["retry-after"]) == (503, "7")


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
