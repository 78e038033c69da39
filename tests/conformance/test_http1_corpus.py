"""Every case of the corpus against this server and against a real nginx: never more lenient, never out of step."""

from __future__ import annotations

import base64
import json
import subprocess
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import trio

from server.answers import Response
from server.exchange import Exchange
from server.routes import ROUTES, Route
from tests.conformance.http1_corpus import GROUPS, MAX_BODY, MAX_LINE, OK, SENTINEL, Case
from tests.conformance.report import DOCUMENT
from tests.conformance.results import Results
from tests.integration.running import free_port
from tests.nginx import running_nginx, write_configuration
from tests.support import AUTH, PATIENCE_S, server
from tools.examples.nginx_example import NGINX

pytestmark = pytest.mark.slow

# Both wait for so long for the rest of a request.
HURRY_S = 1


class Heard(NamedTuple):
    """What a server took a request to be."""

    method: str
    path: str
    query: str
    host: str
    body: bytes


# An accepted request, or the status of a refusal.
Heeded = Heard | int


def plain_host(host: str) -> str:
    """Without what nginx leaves out of ``$host``."""
    name, colon, port = host.rpartition(":")
    return (name if colon and not port.endswith("]") else host).lower().rstrip(".")


# --- this server


async def tell(exchange: Exchange) -> Response:
    """Answer with what was heard."""
    request = exchange.request
    body = await exchange.connection.read_body(MAX_BODY)
    heard = [request.method, request.path, request.target.partition("?")[2], request.header("host") or ""]
    said = json.dumps([*heard, body.decode("latin-1")]).encode()
    # In a header, so that an answer to HEAD says it as well.
    return Response(200, (("X-Heard", base64.b64encode(said).decode()),), b"")


def read_answers(data: bytes) -> list[Heeded]:
    """All answers in what came on a connection; they are ours, so they are read strictly."""
    answers: list[Heeded] = []
    while data:
        head, end, data = data.partition(b"\r\n\r\n")
        assert end, head
        status_line, *lines = head.decode("ascii").split("\r\n")
        version, status, _ = status_line.split(" ", 2)
        assert version == "HTTP/1.1"
        if status == "100":
            continue
        headers = dict(line.split(": ", 1) for line in lines)
        if "X-Heard" in headers:
            method, path, query, host, body = json.loads(base64.b64decode(headers["X-Heard"]))
            answers.append(Heard(method, path, query, plain_host(host), body.encode("latin-1")))
        else:
            answers.append(int(status))
        data = data[int(headers.get("Content-Length", 0)) :]
    return answers


@asynccontextmanager
async def our_server(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[int]:
    """This server, all of whose paths say what they heard; which methods they have is as ever."""
    for path, methods in ROUTES.items():
        told = {method: Route(tell, public=True, head=route.head) for method, route in methods.items()}
        monkeypatch.setitem(ROUTES, path, told)
    hurried = {"head_timeout": HURRY_S, "body_timeout": HURRY_S, "idle_timeout": HURRY_S}
    # With access control any Host is welcome: which ones are malformed is what is asked here.
    async with server(auth=AUTH, limits=hurried) as at:
        yield at.port


# --- nginx


@asynccontextmanager
async def nginx(directory: Path) -> AsyncIterator[int]:
    """An nginx that passes everything on, and writes down what it heard."""
    port, behind = free_port(), free_port()
    configuration = write_configuration(
        directory,
        f"""
            log_format heard escape=json '["$remote_port","$status","$request_method","$uri","$args","$host",'
                '"$request_body"]';
            client_header_timeout {HURRY_S}s; client_body_timeout {HURRY_S}s; keepalive_timeout {HURRY_S}s;
            client_header_buffer_size {MAX_LINE}; large_client_header_buffers 8 {MAX_LINE};
            client_max_body_size {MAX_BODY}; client_body_buffer_size 1m; lingering_timeout 1s; lingering_time 1s;
            keepalive_requests 10000;
            server {{ listen 127.0.0.1:{behind}; return 200; }}
            server {{
                listen 127.0.0.1:{port};
                access_log {directory}/heard.log heard;
                location / {{
                    proxy_pass http://127.0.0.1:{behind}/;
                    proxy_set_header Host behind;
                    proxy_set_header Expect "";
                    proxy_pass_request_headers off;
                }}
            }}""",
        main="worker_processes 1;",
        events="worker_connections 2048;",
    )
    async with running_nginx(configuration):
        yield port


def heard_by_nginx(log: bytes) -> dict[int, list[Heeded]]:
    """What is in its log, by the port of the client."""
    found: dict[int, list[Heeded]] = {}
    for line in log.splitlines():
        port, status, method, path, query, host, body = json.loads(line.decode("latin-1"))
        heeded: Heeded = int(status)
        if heeded == OK:
            heeded = Heard(
                method,
                path.encode("latin-1").decode("utf-8", "replace"),
                query,
                plain_host(host),
                body.encode("latin-1"),
            )
        found.setdefault(int(port), []).append(heeded)
    return found


# --- both


async def converse(port: int, wire: bytes) -> tuple[int, bytes]:
    """Send bytes, read to the end; our own port, and what came."""
    with trio.fail_after(PATIENCE_S):
        stream = await trio.open_tcp_stream("127.0.0.1", port)
        async with stream:
            local: int = stream.socket.getsockname()[1]
            received = b""
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_send, stream, wire)
                try:
                    while data := await stream.receive_some():
                        received += data
                except trio.BrokenResourceError:
                    pass  # a reset, as there was more to read
                nursery.cancel_scope.cancel()
    return local, received


async def _send(stream: trio.SocketStream, wire: bytes) -> None:
    with suppress(trio.BrokenResourceError):
        await stream.send_all(wire)


async def ask_all(port: int, cases: dict[str, Case]) -> dict[str, tuple[int, bytes]]:
    """Send every case over a connection of its own, some at a time."""
    found: dict[str, tuple[int, bytes]] = {}
    room = trio.CapacityLimiter(32)

    async def ask(name: str, case: Case) -> None:
        async with room:
            found[name] = await converse(port, case.wire + SENTINEL)

    async with trio.open_nursery() as nursery:
        for name, case in cases.items():
            nursery.start_soon(ask, name, case)
    return found


def compare(ours: list[Heeded], theirs: list[Heeded]) -> str:
    """``same``, ``stricter`` or ``more lenient``: whether we took what they did not, or took it for something else."""
    for number, heeded in enumerate(ours):
        refused = isinstance(heeded, int) and heeded >= 400
        if not refused and theirs[number : number + 1] != [heeded]:
            return "more lenient"
    return "same" if [type(heeded) for heeded in ours] == [type(heeded) for heeded in theirs] else "stricter"


ONE = Heard("GET", "/a", "", "a", b"")
OTHER = Heard("GET", "/b", "", "a", b"")


@pytest.mark.parametrize(
    ("ours", "theirs", "verdict"),
    [
        ([ONE, OTHER], [ONE, OTHER], "same"),
        ([400], [501], "same"),
        ([400], [ONE, OTHER], "stricter"),
        ([404, OTHER], [ONE, OTHER], "stricter"),
        ([ONE], [400], "more lenient"),
        ([ONE], [], "more lenient"),
        ([ONE], [OTHER], "more lenient"),
        ([ONE, OTHER], [ONE], "more lenient"),
        ([ONE, ONE, OTHER], [ONE, OTHER], "more lenient"),
        ([404, OTHER], [400], "more lenient"),
        ([204, OTHER], [400], "more lenient"),
    ],
)
def test_what_is_more_lenient(ours: list[Heeded], theirs: list[Heeded], verdict: str) -> None:
    assert compare(ours, theirs) == verdict


def test_the_page_is_about_this_corpus() -> None:
    page = DOCUMENT.read_text(encoding="utf-8")
    for group, table in GROUPS.items():
        assert f"| {group} | {len(table)} |" in page, "`make conformance` writes it anew"


async def test_http1_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, results: Results) -> None:
    began = time.monotonic()
    cases = {f"{group}: {case.name}": case for group, table in GROUPS.items() for case in table}
    assert len(cases) == sum(map(len, GROUPS.values())), "two cases have one name"
    async with our_server(monkeypatch) as port:
        ours = {name: read_answers(data) for name, (_, data) in (await ask_all(port, cases)).items()}
    async with nginx(tmp_path) as port:
        asked = await ask_all(port, cases)
    log = heard_by_nginx((tmp_path / "heard.log").read_bytes())
    wrong: list[Any] = []
    verdicts: dict[str, Counter[str]] = {}
    for name, case in cases.items():
        theirs = log.get(asked[name][0], [])
        statuses = tuple(heeded if isinstance(heeded, int) else OK for heeded in ours[name])
        verdict = compare(ours[name], theirs)
        if statuses != case.answers:
            wrong.append((name, "answers", statuses, "expected", case.answers, theirs))
        elif (verdict == "more lenient") != bool(case.lenient):
            wrong.append((name, verdict, ours[name], theirs))
        group = name.partition(":")[0]
        verdicts.setdefault(group, Counter())["more lenient, on purpose" if case.lenient else verdict] += 1
    assert not wrong, "\n".join(str(each)[:600] for each in wrong)
    suite = f"HTTP/1.1 corpus, beside {nginx_version()}"
    for group, count in verdicts.items():
        results.add(suite, group, dict(count))
    results.took(suite, time.monotonic() - began)


def nginx_version() -> str:
    assert NGINX
    said = subprocess.run([NGINX, "-v"], capture_output=True, text=True, check=True).stderr
    return said.split()[-1].replace("/", " ")
