"""What gets past the samples for nginx and HAProxy: no request that they have not seen, and nothing that they guard."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio

from server.answers import Response
from server.exchange import Exchange
from server.routes import ROUTES, Route
from tests.conformance.http1_corpus import GROUPS, HIDDEN, MAX_BODY, get
from tests.hostility.attacks import UPGRADE, message
from tests.integration.test_proxies import KNOWN, PROXIES, calling_from, proxy
from tests.pacing import for_a_while
from tests.support import ADMIN, AUTH, PATIENCE_S, Address, InProcess, bearer, server

pytestmark = pytest.mark.slow

# What each adds to every request that it has read, and none of those here brings along: the mark of having been seen.
MARKS = {"nginx": "x-forwarded-proto", "haproxy": "x-request-id"}
# Heads that never end are the proxies' to give up, after minutes: nobody waits for that here.
ENOUGH_S = 3.0
SENTINEL = get(b"Connection: close", line=b"GET /health?sentinel HTTP/1.1")


@dataclass(frozen=True)
class Front:
    """A proxy, the server behind it, and what that has heard: target and whether the proxy has seen it."""

    at: Address
    behind: InProcess
    heard: list[tuple[str, bool]]


@asynccontextmanager
async def front(kind: str, directory: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Front]:
    """All paths but those of WebSockets and metrics answer with what they heard."""
    heard: list[tuple[str, bool]] = []

    async def tell(exchange: Exchange) -> Response:
        request = exchange.request
        heard.append((request.target, request.header(MARKS[kind]) is not None))
        await exchange.connection.read_body(MAX_BODY)
        said = base64.b64encode(json.dumps([request.method, request.target]).encode()).decode()
        return Response(200, (("X-Heard", said),), b"")

    for path, methods in ROUTES.items():
        if path not in ("/ws/jobs", "/metrics", "/ready"):
            told = {method: Route(tell, public=True, head=route.head) for method, route in methods.items()}
            monkeypatch.setitem(ROUTES, path, told)
    hurried = {"head_timeout": 1, "body_timeout": 1}
    async with (
        server(auth=AUTH, limits=hurried, server=KNOWN[kind]) as behind,
        proxy(kind, directory / "proxy", [f"127.0.0.1:{behind.port}"]) as at,
    ):
        yield Front(at, behind, heard)


async def say(at: Address, wire: bytes) -> bytes:
    """Send it, and read for as long as is reasonable."""
    received = b""
    stream = await trio.open_tcp_stream("127.0.0.1", at.port)
    with trio.move_on_after(ENOUGH_S):
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(stream.send_all, wire)
                while data := await stream.receive_some():
                    received += data
                nursery.cancel_scope.cancel()
        except* (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
    await trio.aclose_forcefully(stream)
    return received


async def innocent(at: Address, over: trio.Event) -> None:
    """Ask for something of one's own again and again; each answer must be to that."""
    number = 0
    async with at.connect() as http:
        while number < 20 or not over.is_set():
            target = f"/health?innocent={number}"
            answer = await http.request("GET", target, host=f"127.0.0.1:{at.port}")
            assert answer.status == 200
            assert json.loads(base64.b64decode(answer.headers["x-heard"])) == ["GET", target]
            number += 1
            await for_a_while(0.01)


@pytest.mark.parametrize("kind", PROXIES)
async def test_no_request_is_smuggled(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole corpus, with others' requests on the same connections between proxy and server."""
    wires = [case.wire + SENTINEL for table in GROUPS.values() for case in table]
    room = trio.CapacityLimiter(64)

    async def strike(at: Address, wire: bytes) -> None:
        async with room:
            await say(at, wire)

    async with front(kind, tmp_path, monkeypatch) as found:
        over = trio.Event()
        async with trio.open_nursery() as others:
            for _ in range(4):
                others.start_soon(innocent, found.at, over)
            async with trio.open_nursery() as strikes:
                for wire in wires:
                    strikes.start_soon(strike, found.at, wire)
            over.set()
        assert sum(target == "/health?sentinel" for target, _ in found.heard) > 50, "what is good has come through"
        assert all(seen for _, seen in found.heard), [target for target, seen in found.heard if not seen]
        async with found.behind.connect() as http:
            if kind == "haproxy":
                await http.send(b"PROXY UNKNOWN\r\n")
            await http.request("GET", "/health")
        assert found.heard[-1] == ("/health", False), "what comes past the proxy is noticed"


@pytest.mark.parametrize("kind", PROXIES)
async def test_who_is_refused_a_websocket_gets_no_tunnel(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = f"Authorization: {bearer('alice')['Authorization']}"
    good = [token, *UPGRADE]
    refused = {
        "wrong version": [line.replace("Version: 13", "Version: 8") for line in good],
        "no version": [line for line in good if "Version" not in line],
        "no key": [line for line in good if "Key" not in line],
        "short key": [line.replace("AAAAAA", "AA") for line in good],
        "another origin": [*good, "Origin: https://evil.example"],
        "h2c": [token, "Upgrade: h2c", "Connection: Upgrade, HTTP2-Settings", "HTTP2-Settings: AAMAAABk"],
        "two protocols": [line.replace(": websocket", ": h2c, x") for line in good],
        "a body": [*good, f"Content-Length: {len(HIDDEN)}"],
    }
    async with front(kind, tmp_path, monkeypatch) as found:
        host = f"Host: 127.0.0.1:{found.at.port}"
        for name, lines in refused.items():
            head = "\r\n".join(["GET /ws/jobs HTTP/1.1", host, *lines, "", ""]).encode()
            answer = await say(found.at, head + HIDDEN + SENTINEL)
            assert answer.startswith(b"HTTP/1.1 "), name
            assert b" 101 " not in answer.partition(b"\r\n")[0], (name, answer)
            assert all(seen for _, seen in found.heard), name

        # And what comes right behind a good one is for the WebSocket, and not lost.
        head = "\r\n".join(["GET /ws/jobs HTTP/1.1", host, *good, "", ""]).encode()
        stream = await trio.open_tcp_stream("127.0.0.1", found.at.port)
        await stream.send_all(head + message("subscribe", ref="early"))
        received = b""
        with trio.fail_after(PATIENCE_S):
            while b'"ref":"early"' not in received:
                data = await stream.receive_some()
                assert data, received
                received += data
        await trio.aclose_forcefully(stream)


@pytest.mark.parametrize("kind", PROXIES)
@pytest.mark.parametrize(
    "target",
    ["/metrics", "/%6detrics", "/metric%73?a=b", "//metrics", "/./metrics", "/a/../metrics", "/a%2f..%2fmetrics"],
)
async def test_metrics_are_for_the_own_network(
    kind: str, target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with front(kind, tmp_path, monkeypatch) as found:
        if target == "/metrics":
            assert (await found.at.get(target, ADMIN)).status == 200
        for form in (target, f"http://127.0.0.1:{found.at.port}{target}"):
            async with calling_from("127.0.0.5", found.at) as http:
                answer = await http.request("GET", form, headers=ADMIN, host=f"127.0.0.1:{found.at.port}")
            assert answer.status in (400, 403, 404), form
            assert b"statuswire_" not in answer.body
