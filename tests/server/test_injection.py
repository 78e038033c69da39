"""What others write never becomes a header, a log line or somebody else's connection."""

from __future__ import annotations

import io
import json
import logging
import re
from collections.abc import Iterator
from typing import Any

import pytest

from server.config import Log
from server.logs import configure
from tests.streams import handshake_bytes
from tests.support import ADMIN, AUTH, WORKER, InProcess, bearer, server, token

JOBS = "/api/v2/jobs"
TASKS = "/api/brand-monitor/progress"
EVIL = (
    "\r\nX-Evil: 1",
    "\nX-Evil: 1",
    "\rX-Evil: 1",
    "\u2028X-Evil: 1",
    "\x85X-Evil: 1",
    "\x0bX-Evil: 1",
    "\x00X-Evil: 1",
    "\x1b[2J",
    "嘊嘍X-Evil: 1",  # whose low bytes are a line break
    "\u202egnp.exe",
    '" status=200 user="root',
    "%0d%0aX-Evil:%201",
)


@pytest.fixture(params=["json", "plain"])
def log(request: pytest.FixtureRequest) -> Iterator[io.StringIO]:
    """Everything that is logged, at the level that says most."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    stream = io.StringIO()
    configure(Log(format=request.param, level="debug"), stream)
    yield stream
    logging.captureWarnings(False)
    root.handlers[:], root.level = handlers, level


def check(log: io.StringIO) -> None:
    """Each line is one of ours, and printable."""
    text = log.getvalue()
    assert text
    for line in text.splitlines():
        assert all(character.isprintable() for character in line), ascii(line)
        if text.startswith("{"):
            assert {"time", "level", "event"} <= set(json.loads(line)), line
        else:
            assert re.match(r"\d{4}-\d\d-\d\dT\S+Z? \w+ +\S", line), line


@pytest.mark.parametrize("evil", EVIL, ids=ascii)
async def test_texts_of_jobs_in_headers_and_log_lines(log: io.StringIO, evil: str) -> None:
    async with server(auth=AUTH) as at:
        fields = {"stage": evil, "message": evil, "status": "processing", "workerId": evil, "kind": "brand-monitor"}
        made = await at.post(JOBS, {"jobId": "t1", "userId": "alice", **fields}, WORKER)
        assert made.status == 201, made
        for target in (f"{TASKS}/t1", f"{JOBS}/t1"):
            head = await at.ask("HEAD", target, headers=bearer("alice"))  # its parser takes no odd header
            assert head.status == 200
            assert not any("evil" in name.lower() for name in head.headers)
        # Where an id or a name is wanted it is refused, and repeated as JSON only.
        for method, target, body in (
            ("POST", JOBS, {"jobId": f"a{evil}", "userId": "alice"}),
            ("POST", JOBS, {"jobId": "a", "userId": f"alice{evil}"}),
            ("POST", f"{JOBS}/t1/updates", {"parentId": f"t1{evil}"}),
            ("POST", "/api/sse/message", {"target": "user", "targetId": f"alice{evil}", "event": "x"}),
            ("POST", "/api/sse/message", {"target": "user", "targetId": "alice", "event": f"x{evil}"}),
            ("GET", f"{JOBS}/a{quoted(evil)}", None),
            ("GET", f"{TASKS}/a{quoted(evil)}", None),
            ("GET", f"/api/projects/a{quoted(evil)}/initial-report-status", None),
            ("GET", f"/api/sse/users/a{quoted(evil)}", None),
            ("GET", f"/{quoted(evil)}", None),
            ("GET", f"{JOBS}?kind={quoted(evil)}&limit=x", None),
            ("GET", f"{JOBS}/poll?timeout=0&client_id={quoted(evil)}", None),
            ("GET", f"{JOBS}?userId={quoted(evil)}", None),
        ):
            answer = await at.ask(method, target, body, ADMIN)
            assert 400 <= answer.status < 500, (target, answer)
            assert not any("evil" in name.lower() for name in answer.headers)
            assert answer.error
    check(log)


def quoted(text: str) -> str:
    return "".join(f"%{byte:02x}" for byte in text.encode())


async def test_header_values_of_others_are_not_repeated_as_they_are(log: io.StringIO) -> None:
    async with server(auth=AUTH, cors={"origins": ["https://app.example"]}) as at:
        for name in ("X-Request-Id", "Origin", "Idempotency-Key", "If-None-Match", "User-Agent", "Referer", "Host"):
            for value in ("a b", "a\tb", "\x80\x85", "x" * 300, '"><script>', "a=b status=200", "é", "a,b"):
                answer = await at.ask("GET", f"{JOBS}/none", headers={**bearer("alice"), name: value})
                said = {one for key, one in answer.headers.items() if key not in ("content-type", "vary")}
                assert value not in said, (name, value, answer)
                assert re.fullmatch(r"[A-Za-z0-9_.:@-]+", answer.headers["x-request-id"])
    check(log)


async def test_a_location_is_of_our_own_making() -> None:
    async with server(auth=AUTH) as at:
        answer = await at.ask("POST", JOBS, {"jobId": "a:b@c", "userId": "alice"}, WORKER, host="evil.example")
        assert answer.headers["location"] == f"{JOBS}/a:b@c"
        answer = await at.post(f"{TASKS}/t1?x=%0d%0aX-Evil:1", {"userId": "alice"}, WORKER)
        assert answer.headers["location"] == f"{TASKS}/t1"


# Cross-site WebSocket hijacking: a page elsewhere makes the browser connect, with the user's cookie.

FOREIGN = (
    "https://evil.example",
    "https://app.example.evil.example",
    "https://evilapp.example",
    "https://app.example:444",
    "http://app.example",
    "https://app.example/",
    "https://app.example@evil.example",
    "https://user@app.example",
    "null",
    "",
    "file://",
    "https://app.example, https://evil.example",
    "https://app.example\x85",
)


async def upgraded(at: InProcess, headers: list[tuple[str, str]], target: str = "/ws/jobs") -> tuple[int, bytes]:
    async with at.connect() as http:
        await http.send(handshake_bytes(target, headers))
        status, answer = await http.head()
        body = b"" if status == 101 else await http._exactly(int(answer["content-length"]))
        return status, body


@pytest.mark.parametrize("origin", FOREIGN, ids=ascii)
async def test_a_websocket_from_another_site_is_refused(origin: str) -> None:
    cookie = ("Cookie", f"statuswire_token={token('alice')}")
    tables: dict[str, Any] = {"debug": {"echo": True}}
    async with server(auth=AUTH, cors={"origins": ["https://app.example"]}, **tables) as at:
        assert (await upgraded(at, [cookie, ("Origin", "https://app.example")]))[0] == 101
        for target in ("/ws/jobs", "/ws/echo", f"/ws/jobs?access_token={token('alice')}"):
            status, body = await upgraded(at, [cookie, ("Origin", origin)], target)
            assert status in (400, 403), (target, status)
            assert b"alice" not in body
    async with server(**tables) as at:
        assert (await upgraded(at, [("Origin", origin)]))[0] in (400, 403)


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:{port}", 101),
        ("LOCALHOST.:{port}", 101),
        ("[::1]:{port}", 101),
        ("rebound.example:{port}", 403),
        ("localhost@rebound.example", 400),
        ("localhost.rebound.example.", 403),
        ("[::ffff:203.0.113.7]", 403),
        ("0", 403),
    ],
)
async def test_a_rebound_name_is_refused_in_open_mode(host: str, status: int) -> None:
    """To its browser a page of a rebound name is of the same origin: Origin and Host agree."""
    async with server() as at:
        name = host.format(port=at.port)
        found, _ = await upgraded(at, [("Host", name), ("Origin", f"http://{name}")])
        assert found == status
        answer = await at.ask("POST", JOBS, {"jobId": "j"}, {"Origin": f"http://{name}"}, host=name)
        assert answer.status == (201 if status == 101 else status)
