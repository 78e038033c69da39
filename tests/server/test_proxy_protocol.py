"""PROXY headers on real connections: whose they count for, who may send them, before TLS, over a Unix socket."""

from __future__ import annotations

import socket
import struct
from contextlib import AsyncExitStack, suppress
from pathlib import Path

import pytest
import trio

from protocol.proxy import SIGNATURE
from server import node
from tests import certificates
from tests.streams import clean_server, session
from tests.support import PATIENCE_S, Http, request_bytes, server, until

TRUSTED = {"proxy_protocol": True, "trusted_proxies": ["127.0.0.1", "unix"]}
LINE = b"PROXY TCP4 203.0.113.7 192.0.2.1 4711 443\r\n"
ADDRESSES = socket.inet_aton("203.0.113.7") + socket.inet_aton("192.0.2.1") + struct.pack(">HH", 4711, 443)
BINARY = SIGNATURE + struct.pack(">BBH", 0x21, 0x11, 12) + ADDRESSES
EXTENDED = SIGNATURE + struct.pack(">BBH", 0x21, 0x11, 12 + 7) + ADDRESSES + b"\x04\0\x04abcd"
LOCAL = SIGNATURE + struct.pack(">BBH", 0x20, 0, 0)


@pytest.mark.parametrize("header", [LINE, BINARY, EXTENDED], ids=["line", "binary", "extended"])
@pytest.mark.parametrize("cut", [1, 20, 10_000])
async def test_the_client_is_whom_the_header_names(header: bytes, cut: int) -> None:
    async with clean_server(server=TRUSTED) as at, at.connect() as http:
        said = header + request_bytes("GET", "/api/v2/jobs/stream")
        for start in range(0, len(said), cut):
            await http.send(said[start : start + cut])
            await trio.lowlevel.checkpoint()
        assert (await http.head())[0] == 200
        await until(lambda: at.node.streams)
        (stream,) = at.node.streams
        assert stream.address == "203.0.113.7"  # type: ignore[attr-defined]


@pytest.mark.parametrize("header", [LOCAL, b"PROXY UNKNOWN\r\n"], ids=["local", "unknown"])
async def test_a_proxy_may_come_for_itself(header: bytes) -> None:
    async with clean_server(server=TRUSTED) as at, at.connect() as http:
        await http.send(header)
        assert (await http.request("GET", "/health")).status == 200


async def test_forwarded_addresses_are_believed_of_a_trusted_source_only() -> None:
    forwarded = {"X-Forwarded-For": "198.51.100.1"}
    trusted = {**TRUSTED, "trusted_proxies": ["127.0.0.1", "203.0.113.7"]}
    for table, address in ((TRUSTED, "203.0.113.7"), (trusted, "198.51.100.1")):
        async with clean_server(server=table) as at, at.connect() as http:
            await http.send(LINE + request_bytes("GET", "/api/v2/jobs/stream", headers=forwarded))
            assert (await http.head())[0] == 200
            (stream,) = at.node.streams
            assert stream.address == address  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "said", [b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n", b"PROXY TCP4 x\r\n", b"\x16\x03\x01"]
)
async def test_a_trusted_proxy_has_to_say_it(said: bytes) -> None:
    async with clean_server(server=TRUSTED) as at, at.connect() as http:
        await http.send(said)
        with suppress(trio.BrokenResourceError):
            assert await http.rest() == b""
        await until(lambda: at.node.connections == 0)
        assert at.node.counters.refused["proxy_failed"] == 1
        assert at.node.counters.failed == 0


async def test_a_header_has_a_time() -> None:
    async with clean_server(server=TRUSTED, limits={"head_timeout": 0.05}) as at, at.connect() as http:
        await http.send(LINE[:-2])
        with suppress(trio.BrokenResourceError):
            assert await http.rest() == b""
        await until(lambda: at.node.counters.refused["proxy_failed"] == 1)


async def test_others_are_not_heard_with_it() -> None:
    """Who is no trusted proxy speaks for itself: with a header it is a bad request, without one a client."""
    async with clean_server(server={"proxy_protocol": True, "trusted_proxies": ["192.0.2.1"]}) as at:
        assert (await at.get("/health")).status == 200
        async with at.connect() as http:
            await http.send(LINE + request_bytes("GET", "/health"))
            assert (await http.answer()).status == 400


async def test_without_the_setting_it_is_no_header() -> None:
    async with clean_server(server={"trusted_proxies": ["127.0.0.1"]}) as at, at.connect() as http:
        await http.send(LINE + request_bytes("GET", "/health"))
        assert (await http.answer()).status == 400


async def test_over_a_unix_socket(tmp_path: Path) -> None:
    async with clean_server(server={**TRUSTED, "unix_socket": str(tmp_path / "s")}) as at, at.connect() as http:
        await http.send(BINARY + request_bytes("GET", "/api/v2/jobs/stream"))
        assert (await http.head())[0] == 200
        (stream,) = at.node.streams
        assert stream.address == "203.0.113.7"  # type: ignore[attr-defined]


async def test_before_tls(tmp_path: Path) -> None:
    made = certificates.make(tmp_path)
    async with server(server={**TRUSTED, **made.table}) as at:
        for header in (LINE, BINARY):
            with trio.fail_after(PATIENCE_S):
                stream = await trio.open_tcp_stream("127.0.0.1", at.port)
                await stream.send_all(header)
                encrypted = trio.SSLStream(stream, made.trust, server_hostname="127.0.0.1", https_compatible=True)
                assert (await Http(encrypted).request("GET", "/health")).status == 200
                await trio.aclose_forcefully(encrypted)


async def test_connects_count_for_the_client() -> None:
    async with clean_server(server=TRUSTED, limits={"connects_per_second": 2}) as at:
        statuses = []
        for header in (LINE, LINE, LINE, LINE.replace(b"203.0.113.7", b"203.0.113.8"), LOCAL):
            async with at.connect() as http:
                await http.send(header)
                statuses.append((await http.request("GET", "/api/v2/jobs")).status)
        assert statuses == [200, 200, 429, 200, 200]
        await until(lambda: at.node.turned_away == 0)


async def test_of_those_that_come_over_a_limit_so_many_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node, "REFUSED_SOCKETS", 1)
    async with clean_server(server=TRUSTED, limits={"connections_per_address": 1}) as at, AsyncExitStack() as stack:
        inside, told, unheard = [await stack.enter_async_context(at.connect()) for _ in range(3)]
        await inside.send(LINE)
        await until(lambda: at.node.limits.entries == 1)
        await told.send(LINE)
        await until(lambda: at.node.turned_away == 1)
        await unheard.send(LINE)
        assert await unheard.closed()
        assert (await told.request("GET", "/api/v2/jobs")).status == 429
        assert (await inside.request("GET", "/api/v2/jobs")).status == 200
        assert at.node.counters.refused["unheard"] == 1


async def test_websockets_too() -> None:
    async with clean_server(server={"proxy_protocol": True, "trusted_proxies": ["192.0.2.1"]}) as at, session(at) as ws:
        await ws.quiet()
