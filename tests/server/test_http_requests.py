"""HTTP requests at their edges, against a real server: methods, paths, bodies, what is none, what all answers have."""

from __future__ import annotations

import logging
import re

import pytest
import trio

from protocol.errors import ApiError
from protocol.fields import MAX_UPDATE
from protocol.http1 import MAX_HEADER_SECTION, MAX_REQUEST_LINE
from server.answers import JSON, Response
from server.exchange import Exchange
from server.routes import ROUTES, Route
from tests.support import AUTH, Ended, bearer, request_bytes, server, until

JOBS = "/api/v2/jobs"
GET = request_bytes("GET", "/health")


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
        assert await http.alive()


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
        assert await http.alive()
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
            assert await http.alive()
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
            assert await http.alive()
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
