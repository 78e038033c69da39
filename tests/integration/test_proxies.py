"""The samples for nginx and HAProxy in front of two servers: every transport, restarts, addresses, request ids."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
import trio

from tests import certificates
from tests.fleet import TRANSPORTS, Publisher, Reader
from tests.integration.running import ROOT, free_port
from tests.redis_servers import running_server
from tests.streams import session
from tests.support import (
    ADMIN,
    AUTH,
    Address,
    Http,
    Spawned,
    bearer,
    request_bytes,
    spawned,
    start,
    stop,
    until,
    until_so,
)
from tools.examples.nginx_example import NGINX, configure

pytestmark = pytest.mark.slow

# `make system` only unpacks it where it is not installed, and what it needs beside it.
UNPACKED = ROOT / ".venv" / "haproxy" / "usr"
HAPROXY = shutil.which("haproxy", path=f"{os.environ['PATH']}:/usr/sbin:{UNPACKED}/sbin")
LONG_S = 120.0
PROXIES = ("nginx", "haproxy")
# What the server has to know of the one in front of it.
KNOWN = {
    "nginx": {"trusted_proxies": ["127.0.0.1", "unix"]},
    "haproxy": {"trusted_proxies": ["127.0.0.1", "unix"], "proxy_protocol": True},
}


def nginx_command(directory: Path, port: int, servers: list[str]) -> list[str]:
    assert NGINX, "nginx is not there: run `make system`"
    configuration = configure(directory, "site-own-host.conf", f"127.0.0.1:{port}", servers[0])
    upstream = directory / "statuswire.conf"
    first = f"server {servers[0]};"
    text = upstream.read_text()
    assert first in text
    upstream.write_text(text.replace(first, "".join(f"server {server};" for server in servers), 1))
    return [NGINX, "-e", "stderr", "-p", str(directory), "-c", str(configuration)]


def haproxy_command(directory: Path, port: int, servers: list[str]) -> list[str]:
    assert HAPROXY, "HAProxy is not there: run `make system`"
    text = (ROOT / "tools" / "haproxy" / "haproxy.cfg").read_text()
    for old, new in (
        ("bind :80\n", f"bind 127.0.0.1:{port}\n"),
        ("maxconn 40000\n", "maxconn 400\n"),  # more than machines for tests have descriptors
        ("maxconn 20000\n", "maxconn 200\n"),
        (
            "    server one 127.0.0.1:3000\n",
            "".join(f"    server s{n} {at.replace('unix:', 'unix@')}\n" for n, at in enumerate(servers)),
        ),
    ):
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    configuration = directory / "haproxy.cfg"
    configuration.write_text(text)
    return [HAPROXY, "-db", "-f", str(configuration)]


COMMANDS: dict[str, Callable[[Path, int, list[str]], list[str]]] = {"nginx": nginx_command, "haproxy": haproxy_command}


@asynccontextmanager
async def proxy(kind: str, directory: Path, servers: list[str]) -> AsyncIterator[Address]:
    """The sample as it stands, in front of these servers, once it passes requests on."""
    directory.mkdir()  # noqa: ASYNC240  # of our own
    at = Address(free_port())
    environ = {"LD_LIBRARY_PATH": ":".join(map(str, UNPACKED.glob("lib/*-linux-gnu")))} if kind == "haproxy" else {}
    with (directory / "log").open("wb") as log:
        process = await trio.lowlevel.open_process(
            COMMANDS[kind](directory, at.port, servers), env=os.environ | environ, stdout=log, stderr=log
        )
    try:

        async def passes_on() -> bool:
            assert process.poll() is None, (directory / "log").read_text()
            with suppress(OSError):
                return (await at.get("/ready")).status == 200
            return False

        await until_so(passes_on)
        yield at
    finally:
        with trio.CancelScope(shield=True):
            process.send_signal(signal.SIGTERM if kind == "nginx" else signal.SIGKILL)
            await process.wait()


@asynccontextmanager
async def calling_from(address: str, at: Address) -> AsyncIterator[Http]:
    """A client of another address of this machine."""
    sock = trio.socket.socket()
    await sock.bind((address, 0))
    await sock.connect(("127.0.0.1", at.port))
    stream = trio.SocketStream(sock)
    try:
        yield Http(stream)
    finally:
        await trio.aclose_forcefully(stream)


@pytest.mark.parametrize("kind", PROXIES)
async def test_two_servers_and_no_stickiness(tmp_path: Path, kind: str) -> None:
    """Readers know the proxy alone. Both servers are restarted one after the other, and nobody misses a thing."""
    with running_server(tmp_path) as redis:
        keys = {"drain": 0.5, **KNOWN[kind]}
        tables = [{"port": free_port(), **keys}, {"port": free_port(), **keys}]
        async with (
            restartable(tmp_path / "one", server=tables[0], auth=AUTH, store={"url": redis.url}) as one,
            restartable(tmp_path / "two", server=tables[1], auth=AUTH, store={"url": redis.url}) as two,
            proxy(kind, tmp_path / "proxy", [f"127.0.0.1:{one.port}", f"127.0.0.1:{two.port}"]) as at,
        ):
            readers = [Reader(way, [at], user, proxied=True) for user in ("ann", "ben") for way in TRANSPORTS]
            publishers = [Publisher([at], user, f"job-{user}", pause_s=0.02) for user in ("ann", "ben")]
            stopping = trio.Event()
            with trio.fail_after(LONG_S):
                async with trio.open_nursery() as reading:
                    for reader in readers:
                        reading.start_soon(reader.run)
                        await reader.started.wait()
                    async with trio.open_nursery() as publishing:
                        for publisher in publishers:
                            publishing.start_soon(publisher.run, stopping)
                        for node in (one, two):
                            await _more(publishers)
                            await _restart(node)
                        await _more(publishers)
                        stopping.set()
                    newest = {each.user: {each.job_id: each.published} for each in publishers}
                    await until(lambda: all(each.has(newest[each.user]) for each in readers), within=LONG_S)
                    reading.cancel_scope.cancel()
            for reader in readers:
                reader.check(newest[reader.user])
                assert reader.connections > 1


async def _more(publishers: list[Publisher]) -> None:
    goals = [(each, each.published + 20) for each in publishers]
    await until(lambda: all(each.published >= goal for each, goal in goals), within=LONG_S)


async def _restart(node: Spawned) -> None:
    def again() -> None:
        stop(node.process)
        node.process, node.start_line = start(node.log_file.parent)

    await trio.to_thread.run_sync(again)
    assert "http" in node.start_line


@asynccontextmanager
async def restartable(directory: Path, **tables: Mapping[str, object]) -> AsyncIterator[Spawned]:
    """A server; what it is at the end is stopped, too."""
    directory.mkdir()  # noqa: ASYNC240  # of our own
    async with spawned(directory, **tables) as node:
        try:
            yield node
        finally:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(stop, node.process)


@pytest.mark.parametrize("way", ["tcp", "unix"])
@pytest.mark.parametrize("kind", PROXIES)
async def test_each_way_to_the_server(tmp_path: Path, kind: str, way: str) -> None:
    """Updates come when they are made, whatever the transport; the server knows whose requests they are."""
    path = str(tmp_path / "s.sock")
    where = {"unix_socket": path} if way == "unix" else {}
    async with spawned(
        tmp_path,
        server={**KNOWN[kind], **where},
        auth=AUTH,
        store={"url": "memory:"},
        log={"format": "json", "level": "debug"},
    ) as server:
        target = f"unix:{path}" if way == "unix" else f"127.0.0.1:{server.port}"
        async with proxy(kind, tmp_path / "proxy", [target]) as at:
            # One after the other: a proxy that held anything back would hold this up for ever.
            readers = [Reader(transport, [at], "ann", proxied=True) for transport in TRANSPORTS]
            async with trio.open_nursery() as reading:
                for reader in readers:
                    reading.start_soon(reader.run)
                    await reader.started.wait()
                for version in range(1, 11):
                    answer = await at.post(
                        "/api/v2/jobs/j/updates",
                        {"userId": "ann", "progress": version, "message": f"step {version}"},
                        bearer("w", capabilities=["publish"]),
                    )
                    assert answer.status == 200
                    await until(
                        lambda version=version: all(each.has({"j": version}) for each in readers), within=LONG_S
                    )
                reading.cancel_scope.cancel()
            for reader in readers:
                reader.check({"j": 10})
            async with session(at, token=None, headers=ADMIN) as ws:
                await ws.quiet()

            async with calling_from("127.0.0.5", at) as http:
                await http.send(
                    request_bytes(
                        "GET",
                        "/nowhere",
                        headers={"X-Request-Id": "asked-by-me", "X-Forwarded-For": "198.51.100.9", **ADMIN},
                        host=f"127.0.0.1:{at.port}",
                    )
                )
                answer = await http.answer()
            assert answer.headers["x-request-id"] == "asked-by-me"
            assert answer.error == "not_found"
            await server.logged("asked-by-me")
            (line,) = [
                line for line in map(json.loads, server.log().splitlines()) if line.get("requestId") == "asked-by-me"
            ]
            assert line["address"] == "127.0.0.5", "what the client claims is not believed"
            made = (await at.get("/nowhere", ADMIN)).headers["x-request-id"]
            assert re.fullmatch(r"[A-Za-z0-9_.:@-]{8,128}", made)
            await server.logged(made)


def test_the_samples_are_good(tmp_path: Path) -> None:
    """As they stand, with HTTPS."""
    assert HAPROXY, "HAProxy is not there: run `make system`"
    text = (ROOT / "tools" / "haproxy" / "haproxy.cfg").read_text()
    made = certificates.make(tmp_path)
    both = tmp_path / "both.pem"
    both.write_bytes(made.cert.read_bytes() + made.key.read_bytes())
    for line in ("bind :443", "http-request redirect", "http-response set-header", "server two", "server one unix"):
        assert text.count(f"# {line}") == 1, line
        text = text.replace(f"# {line}", line)
    text = text.replace("/etc/haproxy/status.example.com.pem", str(both)).replace(
        "server one unix", "server three unix"
    )
    (tmp_path / "haproxy.cfg").write_text(text)
    checked = subprocess.run(
        [HAPROXY, "-c", "-f", str(tmp_path / "haproxy.cfg")],
        env=os.environ | {"LD_LIBRARY_PATH": ":".join(map(str, UNPACKED.glob("lib/*-linux-gnu")))},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert checked.returncode == 0, checked.stderr
    assert "warning" not in checked.stderr.lower(), checked.stderr
