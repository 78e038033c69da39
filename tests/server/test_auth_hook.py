"""The auth hook: a real application is asked over HTTP who the callers of a real server are."""

from __future__ import annotations

import json
import logging
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import pytest
import trio

from protocol.errors import ApiError
from server import auth_hook
from server.auth import Identity
from server.auth_hook import AuthHook
from server.config import Auth
from tests.streams import running_out, websocket
from tests.support import AUTH, Answer, InProcess, answering, bearer, server, spawned, until

NOW: Final = 1_750_000_000.0
JOBS: Final = "/api/v2/jobs"
COOKIE: Final = {"Cookie": "session=abc; theme=dark"}

Reply = tuple[int, object]


class Application:
    """An application that knows its sessions. ``reply`` is what it answers; ``asked`` the headers it was asked with."""

    def __init__(self) -> None:
        self.port = 0
        self.asked: list[dict[str, str]] = []
        self.reply: Callable[[dict[str, str]], Reply] = lambda headers: (200, {"userId": "alice"})
        self.before: Callable[[], Awaitable[object]] = trio.lowlevel.checkpoint
        self.open = 0
        self.most = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/who?from=statuswire"

    async def serve(self, stream: trio.SocketStream) -> None:
        received = b""
        while data := await stream.receive_some():
            received += bytes(data)
            while b"\r\n\r\n" in received:
                head, _, received = received.partition(b"\r\n\r\n")
                line, *fields = head.decode("latin-1").split("\r\n")
                assert line == "GET /who?from=statuswire HTTP/1.1"
                headers = {name.lower(): value for name, _, value in (field.partition(": ") for field in fields)}
                self.asked.append(headers)
                self.open += 1
                self.most = max(self.most, self.open)
                await self.before()
                self.open -= 1
                status, body = self.reply(headers)
                content = body if isinstance(body, bytes) else json.dumps(body).encode()
                more = "Location: /elsewhere\r\nSet-Cookie: session=stolen\r\n"
                answer = f"HTTP/1.1 {status} X\r\nContent-Length: {len(content)}\r\n{more}\r\n"
                await stream.send_all(answer.encode() + content)


@asynccontextmanager
async def application() -> AsyncIterator[Application]:
    app = Application()
    async with answering(app.serve) as app.port:
        yield app


@asynccontextmanager
async def asking(app: Application, clock: Callable[[], float] = lambda: NOW, **keys: Any) -> AsyncIterator[AuthHook]:
    hook = AuthHook(Auth(hook_url=app.url, **keys), clock=clock)
    async with trio.open_nursery() as nursery:
        await nursery.start(hook.run)
        yield hook
        nursery.cancel_scope.cancel()


async def refused(hook: AuthHook, **credentials: str) -> ApiError:
    with pytest.raises(ApiError) as caught:
        await hook.ask(credentials or {"cookie": "a=b"})
    return caught.value


# --- over the real server ---


async def test_the_first_caller_of_all_is_asked_about_and_the_log_has_no_address_of_secrets(tmp_path: Path) -> None:
    async with application() as app, spawned(tmp_path, auth={"hook_url": app.url}, log={"level": "debug"}) as at:
        answer = await at.get("/api/v2/me", COOKIE)
        assert (answer.status, len(app.asked)) == (200, 1), answer
        at.signal(signal.SIGINT)
        assert await at.exit_status() == 0
        assert "path=/api/v2/me status=200" in at.log()
        for secret in ("from=statuswire", "session=", "theme=dark"):
            assert secret not in at.log()


async def test_the_application_says_who_its_callers_are() -> None:
    def who(headers: dict[str, str]) -> Reply:
        if "admin" in headers.get("cookie", ""):
            return 200, {"userId": "root", "admin": True, "name": "whatever else the application says"}
        if headers.get("authorization") == "Basic d29ya2VyOng=":
            return 200, {"userId": "worker", "capabilities": ["publish", "unheard-of"]}
        return 200, {"userId": "alice"}

    async with application() as app, server(auth={"hook_url": app.url}) as at:
        app.reply = who
        await at.publish("j1", {"Authorization": "Basic d29ya2VyOng="}, userId="alice")
        await at.publish("j2", {"Authorization": "Basic d29ya2VyOng="}, userId="bob")
        assert await listed(at, COOKIE) == ["j1"]
        assert await listed(at, {"Cookie": "admin=1"}) == ["j2", "j1"]
        assert (await at.get(f"{JOBS}/j2", COOKIE)).error == "job_not_found"
        assert (await at.post(JOBS, {"userId": "alice"}, COOKIE)).status == 403
        asked = next(headers for headers in app.asked if headers.get("cookie") == COOKIE["Cookie"])
        assert "authorization" not in asked


async def listed(at: InProcess, headers: dict[str, str]) -> list[str]:
    return [job["jobId"] for job in (await at.get(JOBS, headers)).json["jobs"]]


@pytest.mark.parametrize(("status", "code"), [(401, "unauthorized"), (403, "forbidden")])
async def test_a_refusal_is_final(status: int, code: str) -> None:
    async with application() as app, server(auth={"hook_url": app.url}) as at:
        app.reply = lambda headers: (status, {"error": "whatever"})
        answer = await at.get(JOBS, COOKIE)
        assert (answer.status, answer.error) == (status, code)
        async with websocket(at, headers={"Cookie": "a=b"}) as ws:
            assert (await ws.closed()).code == 4401


async def test_nothing_to_know_a_caller_by_is_401_without_asking() -> None:
    async with application() as app, server(auth={"hook_url": app.url}) as at:
        assert (await at.get(JOBS)).error == "unauthorized"
        assert (await at.get("/health", COOKIE)).status == 200
        assert not app.asked


@pytest.mark.parametrize(
    "reply",
    [
        (500, {}),
        (404, {}),
        (302, {}),
        (204, b""),
        (200, b"<html>"),
        (200, {}),
        (200, {"userId": "a b"}),
        (200, {"userId": 7}),
        (200, {"userId": "alice", "admin": "yes"}),
        (200, {"userId": "alice", "expiresAt": "tomorrow"}),
        (200, {"userId": "alice", "expiresAt": "2030-01-01T00:00:00"}),
        (200, {"userId": "alice", "jobs": ["*"]}),
        (200, b"[" * 100_000),
        (200, b" " * (auth_hook.MAX_ANSWER + 1)),
    ],
    ids=lambda reply: f"{reply[0]} {str(reply[1])[:40]}",
)
async def test_an_odd_answer_is_503(reply: Reply, caplog: pytest.LogCaptureFixture) -> None:
    async with application() as app, server(auth={"hook_url": app.url}) as at:
        app.reply = lambda headers: reply
        answer = await at.get(JOBS, COOKIE)
        assert (answer.status, answer.error, answer.headers["retry-after"]) == (503, "auth_unavailable", "2")
        # Not remembered: the next one may find it mended. Said once in the log, without anything of the caller's.
        app.reply = lambda headers: (200, {"userId": "alice"})
        assert (await at.get(JOBS, COOKIE)).status == 200
        assert caplog.text.count("auth_hook_failed") == 1
        assert "abc" not in caplog.text
        assert "from=statuswire" not in caplog.text


async def test_an_application_that_is_away_or_slow_is_503() -> None:
    async with application() as app:
        url = app.url
        async with server(auth={"hook_url": url, "hook_timeout": 0.2}) as at:
            app.before = trio.sleep_forever
            assert (await at.get(JOBS, COOKIE)).error == "auth_unavailable"
    async with server(auth={"hook_url": url}) as at:
        assert (await at.get(JOBS, COOKIE)).error == "auth_unavailable"
        stream = await at.get(f"{JOBS}/stream", {**COOKIE, "Accept": "text/event-stream"})
        assert stream.status == 200  # what ends an EventSource for good must not be said for a passing condition
        assert b'"code":"try_later"' in stream.body
        async with websocket(at, headers={"Cookie": "a=b"}) as ws:
            assert (await ws.closed()).code == 1013
        health = await at.get("/api/brand-monitor/health", {"Cookie": "a=b"})
        assert (health.status, health.json) == (200, {"status": "healthy"})


async def test_tokens_come_first_where_there_is_a_key() -> None:
    async with application() as app, server(auth={**AUTH, "hook_url": app.url}) as at:
        app.reply = lambda headers: (200, {"userId": "bob"})
        await at.publish("j1", bearer("w", capabilities=["publish"]), userId="alice")
        assert await listed(at, bearer("alice")) == ["j1"]
        assert not app.asked
        assert (await at.get(JOBS, {**COOKIE, "Authorization": "Bearer x.y.z"})).error == "invalid_token"
        assert not app.asked
        assert await listed(at, COOKIE) == []
        assert len(app.asked) == 1


async def test_without_a_key_the_application_is_asked_about_tokens_wherever_they_come() -> None:
    def who(headers: dict[str, str]) -> Reply:
        return (200, {"userId": "alice"}) if headers.get("authorization") == "Bearer opaque" else (401, {})

    async with application() as app, server(auth={"hook_url": app.url}) as at:
        app.reply = who
        for target, headers in (
            (JOBS, {"Authorization": "Bearer opaque"}),
            (f"{JOBS}?access_token=opaque", {}),
            (JOBS, {"Cookie": "statuswire_token=opaque"}),
        ):
            assert (await at.get(target, headers)).status == 200
        assert (await at.get(f"{JOBS}?access_token=other")).status == 401
        asked = len(app.asked)
        assert (await at.get(f"{JOBS}?access_token=a%0d%0aHost:%20b")).error == "invalid_token"
        assert len(app.asked) == asked
        async with websocket(at) as ws:
            await ws.send("auth", token="opaque")
            assert (await ws.receive())["userId"] == "alice"


async def test_the_application_sees_cookies_beside_tokens() -> None:
    async with application() as app, server(auth={"hook_url": app.url}) as at:
        assert (await at.get(JOBS, {**COOKIE, "Authorization": "Bearer opaque"})).status == 200
        assert (await at.get(f"{JOBS}?access_token=opaque", COOKIE)).status == 200
        assert (await at.get(JOBS, {"Authorization": "Bearer opaque"})).status == 200
        seen = [(headers.get("authorization"), headers.get("cookie")) for headers in app.asked]
        # The first two are one question; without the cookie it may be somebody else's session.
        assert seen == [("Bearer opaque", COOKIE["Cookie"]), ("Bearer opaque", None)]


async def test_a_live_connection_ends_with_the_session_and_may_renew_it() -> None:
    async with application() as app, server(auth={"hook_url": app.url, "hook_cache": 0}) as at:
        with running_out() as end:
            app.reply = lambda headers: (200, {"userId": "alice", "expiresAt": end})
            async with websocket(at, headers={"Cookie": "a=b"}) as ws:
                assert (await ws.receive())["type"] == "connected"
                assert (await ws.closed()).code == 4401
        app.reply = lambda headers: (200, {"userId": "alice", "expiresAt": "2999-01-01T00:00:00Z"})
        async with websocket(at, headers={"Cookie": "a=b"}) as ws:
            await ws.receive()
            app.reply = lambda headers: (503, {})
            await ws.send("auth", token="next")
            assert (await ws.receive())["code"] == "auth_unavailable"  # and the connection lives
            app.reply = lambda headers: (200, {"userId": "alice", "expiresAt": "2999-01-02T00:00:00Z"})
            await ws.send("auth", token="next")
            assert (await ws.receive())["expiresAt"] == "2999-01-02T00:00:00.000Z"


async def test_whoever_is_sent_away_is_asked_about_anew() -> None:
    ended: set[str] = set()

    def who(headers: dict[str, str]) -> Reply:
        cookie = headers["cookie"]
        return (401, {}) if cookie in ended else (200, {"userId": cookie.partition("-")[0], "admin": cookie == "root"})

    async with application() as app, server(auth={"hook_url": app.url, "hook_cache": 60}) as at:
        app.reply = who
        for cookie in ("ann-1", "ann-2", "ben-1"):
            assert (await at.get(JOBS, {"Cookie": cookie})).status == 200
        async with websocket(at, headers={"Cookie": "ann-1"}) as ws:
            await ws.receive()
            ended.add("ann-1")
            assert (await at.get(JOBS, {"Cookie": "ann-1"})).status == 200  # as it is remembered
            answer = await at.ask("DELETE", "/api/sse/users/ann", headers={"Cookie": "root"})
            assert answer.json == {"disconnected": 1}
            assert (await ws.closed()).code == 1008
        assert (await at.get(JOBS, {"Cookie": "ann-1"})).status == 401
        asked = len(app.asked)
        assert (await at.get(JOBS, {"Cookie": "ann-2"})).status == 200
        assert len(app.asked) == asked + 1
        assert (await at.get(JOBS, {"Cookie": "ben-1"})).status == 200
        assert len(app.asked) == asked + 1, "of others it is remembered"


async def test_an_answer_that_was_on_its_way_then_is_for_those_who_waited_only() -> None:
    async with application() as app, asking(app, hook_cache=60) as hook, trio.open_nursery() as nursery:
        release = trio.Event()
        app.before = release.wait
        nursery.start_soon(hook.ask, {"cookie": "a=b"})
        await until(lambda: app.open == 1)
        hook.forget("alice")
        app.before = trio.lowlevel.checkpoint
        app.reply = lambda headers: (401, {})
        assert (await refused(hook)).status == 401
        app.reply = lambda headers: (200, {"userId": "alice"})
        release.set()
        await until(lambda: app.open == 0)
        assert (await refused(hook)).status == 401


async def test_credentials_are_never_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    async with application() as app, server(auth={"hook_url": app.url}) as at:
        for status in (200, 401, 500):
            app.reply = lambda headers, status=status: (status, {"userId": "alice"})  # type: ignore[misc]
            headers = {"Cookie": f"session=hidden{status}", "Authorization": "Basic hiddentoo"}
            answer: Answer = await at.get(JOBS, headers)
            assert answer.status == {200: 200, 401: 401, 500: 503}[status]
    assert "hidden" not in caplog.text


async def test_another_application_from_a_reload_on() -> None:
    async with application() as app, application() as other, server(auth={"hook_url": app.url}) as at:
        other.reply = lambda headers: (200, {"userId": "bob"})
        assert (await at.get(JOBS, COOKIE)).status == 200
        at.node.authenticator.reload(Auth(hook_url=other.url))
        assert (await at.get(JOBS, COOKIE)).status == 200
        assert (len(app.asked), len(other.asked)) == (1, 1)


# --- what is remembered, and how much is asked ---


async def test_an_answer_is_remembered_for_a_while_but_not_longer_than_it_holds() -> None:
    now = NOW
    async with application() as app, asking(app, lambda: now, hook_cache=10) as hook:
        for _ in range(3):
            assert (await hook.ask({"cookie": "a=b"})).user == "alice"
        assert len(app.asked) == 1
        await hook.ask({"cookie": "a=c"})
        await hook.ask({"cookie": "a=b", "authorization": "Basic x"})
        assert len(app.asked) == 3
        now += 10
        app.reply = lambda headers: (200, {"userId": "alice", "expiresAt": NOW + 15})
        assert (await hook.ask({"cookie": "a=b"})).expires_at == NOW + 15
        assert len(app.asked) == 4
        now += 4
        await hook.ask({"cookie": "a=b"})
        assert len(app.asked) == 4
        now += 1
        assert (await refused(hook)).status == 401  # it says that the session is over already


async def test_a_refusal_is_remembered_for_a_moment_only() -> None:
    now = NOW
    async with application() as app, asking(app, lambda: now, hook_cache=10) as hook:
        app.reply = lambda headers: (401, {})
        for _ in range(3):
            assert (await refused(hook)).status == 401
        assert len(app.asked) == 1
        now += auth_hook.REFUSED_S
        app.reply = lambda headers: (200, {"userId": "alice"})  # logged in, with the same cookie
        assert (await hook.ask({"cookie": "a=b"})).user == "alice"


async def test_callers_with_one_cookie_are_one_request_and_a_crowd_waits_its_turn() -> None:
    async with application() as app, asking(app, hook_concurrency=3, hook_timeout=20) as hook:
        gate = trio.Event()
        app.before = gate.wait
        found: list[Identity] = []

        async def ask(cookie: str) -> None:
            found.append(await hook.ask({"cookie": cookie}))

        async with trio.open_nursery() as nursery:
            for number in range(100):
                nursery.start_soon(ask, f"a={number % 20}")
            await until(lambda: app.open == 3)
            gate.set()
        assert (len(found), len(app.asked), app.most) == (100, 20, 3)


async def test_whoever_asked_first_may_go_away() -> None:
    async with application() as app, asking(app) as hook:
        gate = trio.Event()
        app.before = gate.wait
        async with trio.open_nursery() as nursery:
            with trio.CancelScope() as first:
                nursery.start_soon(hook.ask, {"cookie": "a=b"})
                await until(lambda: app.open == 1)
                with trio.move_on_after(0):
                    await hook.ask({"cookie": "a=b"})
                first.cancel()
            gate.set()
        assert (await hook.ask({"cookie": "a=b"})).user == "alice"
        assert len(app.asked) == 1
        assert not hook._waiting
        assert not hook._asking


async def test_there_is_an_end_to_waiting_and_to_remembering(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auth_hook, "MAX_WAITING", 2)
    monkeypatch.setattr(auth_hook, "REMEMBERED", 5)
    async with application() as app, asking(app) as hook:
        gate = trio.Event()
        app.before = gate.wait
        async with trio.open_nursery() as nursery:
            for number in range(2):
                nursery.start_soon(hook.ask, {"cookie": str(number)})
            await until(lambda: hook._waiting == 2)
            assert (await refused(hook)).code == "auth_unavailable"
            gate.set()
        for number in range(20):
            await hook.ask({"cookie": str(number)})
        assert len(hook._remembered) == 5


async def test_the_applications_own_cookies_are_not_given_to_the_next_caller() -> None:
    async with application() as app, asking(app) as hook:
        await hook.ask({"cookie": "a=b"})
        await hook.ask({"authorization": "Basic x"})
        assert "cookie" not in app.asked[1]


async def test_header_text_is_passed_on_as_it_came() -> None:
    async with application() as app, asking(app) as hook:
        await hook.ask({"cookie": "name=J\xfcrgen"})
        assert app.asked[0]["cookie"] == "name=J\xfcrgen"
        assert app.asked[0]["accept"] == "application/json"
