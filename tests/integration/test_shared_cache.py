"""Behind a real nginx that caches whatever it may: nobody gets an answer that was another's."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from server.routes import ROUTES
from server.routes.page import FILES
from tests.integration.running import free_port
from tests.nginx import running_nginx, write_configuration
from tests.support import AUTH, WORKER, Address, Answer, InProcess, bearer, request_bytes, server, token

pytestmark = pytest.mark.slow

JOBS = "/api/v2/jobs"
STREAM = "no-cache, no-transform"


@asynccontextmanager
async def caching(directory: Path, target: Address) -> AsyncIterator[Address]:
    """nginx as carelessly as it can be set up without overruling its upstream: by address, everything, for long."""
    port = free_port()
    configuration = write_configuration(
        directory,
        f"""
            proxy_cache_path {directory}/cache keys_zone=all:1m;
            server {{
                listen 127.0.0.1:{port};
                location / {{
                    proxy_pass http://127.0.0.1:{target.port};
                    proxy_http_version 1.1;
                    proxy_set_header Host $http_host;
                    proxy_cache all;
                    proxy_cache_key $uri$is_args$args;
                    proxy_cache_valid any 10m;
                    proxy_cache_methods GET HEAD POST;
                    add_header X-Cache $upstream_cache_status always;
                }}
            }}""",
        main="master_process off;",
    )
    async with running_nginx(configuration):
        yield Address(port)


# Everything that is read, in the words of alice; whoever asks next must not get her answer.
PERSONAL = [
    JOBS,
    f"{JOBS}/hers",
    f"{JOBS}/hers?fields=status",
    f"{JOBS}/hers/history",
    f"{JOBS}/nothing",
    f"{JOBS}/poll?timeout=0",
    f"{JOBS}/poll?timeout=0&jobIds=hers",
    f"{JOBS}?limit=x",
    "/api/v2/me",
    "/api/v2/stats",
    "/metrics",
    "/api/sse/connections",
    "/api/sse/users/alice",
    "/api/sse/clients/none",
    "/api/brand-monitor/health",
    "/api/projects/p1/initial-report-status",
    "/health",
    "/ready",
    "/nowhere",
]


# Other ones each time.
NUMBERS = ("/metrics", "/api/v2/stats", "/api/brand-monitor/health", "/api/sse/connections")
CHANGING = re.compile(r'"(requestId|timestamp|id|last_seen|next)":"[^"]*"')


def bare(answer: Answer) -> tuple[int, str]:
    """An answer without what differs each time."""
    return answer.status, CHANGING.sub("", answer.body.decode())


def ways(user: str, *, ops: bool = False) -> list[dict[str, str]]:
    """How a user may identify itself without the address telling."""
    claims = {"capabilities": ["ops"]} if ops else {}
    return [bearer(user, **claims), {"Cookie": f"statuswire_token={token(user, **claims)}"}]


async def prepared(at: InProcess) -> None:
    await at.publish("hers", WORKER, userId="alice", message="confidential")
    await at.publish("his", WORKER, userId="bob", message="other")
    assert (await at.ask("PUT", "/api/projects/p1", {"userId": "alice"}, WORKER)).status == 201


async def test_nobody_gets_what_was_made_for_another(tmp_path: Path) -> None:
    async with server(auth=AUTH, cors={"origins": ["https://app.example"]}) as at, caching(tmp_path, at) as proxy:
        await prepared(at)
        for target in PERSONAL:
            for headers in (*ways("alice", ops=True), *ways("bob"), {}):
                for method in ("GET", "HEAD"):
                    if method == "HEAD" and "/poll" in target:
                        continue
                    answer = await proxy.ask(method, target, headers=headers)
                    assert answer.headers["x-cache"] in ("MISS", "BYPASS"), (target, answer)
                    if method == "GET":
                        direct = await at.get(target, headers)
                        if target in NUMBERS:
                            assert answer.status == direct.status, target
                        else:
                            assert bare(answer) == bare(direct), target
                        if headers not in ways("alice", ops=True):
                            assert b"confidential" not in answer.body
            again = await proxy.get(target, {**bearer("bob"), "Origin": "https://app.example"})
            assert again.headers["access-control-allow-origin"] == "https://app.example"
            assert "Origin" in again.headers["vary"]


async def test_a_record_that_was_asked_for_with_its_tag(tmp_path: Path) -> None:
    async with server(auth=AUTH) as at, caching(tmp_path, at) as proxy:
        await prepared(at)
        hers = await proxy.get(f"{JOBS}/hers", bearer("alice"))
        tag = {"If-None-Match": hers.headers["etag"]}
        assert (await at.get(f"{JOBS}/hers", bearer("alice") | tag)).status == 304
        # A proxy that caches asks for all of it in any case.
        assert (await proxy.get(f"{JOBS}/hers", bearer("alice") | tag)).status == 200
        assert (await proxy.get(f"{JOBS}/hers", bearer("bob") | tag)).status == 404
        assert (await proxy.get(f"{JOBS}/hers", tag)).status == 401


async def test_streams_are_nobody_elses(tmp_path: Path) -> None:
    async with server(auth=AUTH) as at, caching(tmp_path, at) as proxy:
        await prepared(at)
        await at.publish("hers", WORKER, status="completed")
        await at.publish("his", WORKER, status="completed")
        target = f"{JOBS}/stream?jobIds=hers"
        # One that has ended is whole, and could be kept.
        assert b"confidential" in (await proxy.get(target, bearer("alice"))).body
        async with proxy.connect() as http:
            await http.send(request_bytes("GET", target, headers=bearer("bob")))
            status, headers = await http.head()
            assert (status, headers["x-cache"]) == (200, "MISS")
            assert b"confidential" not in http.received


async def test_what_is_the_same_for_all_may_be_kept_but_is_asked_after(tmp_path: Path) -> None:
    async with server(auth=AUTH) as at, caching(tmp_path, at) as proxy:
        for target in ("/", *(f"/{name}" for name in FILES), "/openapi.json", "/asyncapi.json"):
            for _ in range(2):
                answer = await proxy.get(target)
                assert answer.status == 200
                assert answer.headers["cache-control"] == "no-cache", "a new version is seen at once"
            again = await at.get(target, {"If-None-Match": answer.headers["etag"]})
            assert again.status == 304, target


async def test_every_way_of_reading_says_how_it_may_be_kept() -> None:
    async with server(auth=AUTH) as at:
        await prepared(at)
        for path, methods in ROUTES.items():
            if "GET" not in methods or path.startswith("/ws/"):
                continue
            target = re.sub(r"\{[^}]+\}", "hers", path)
            for headers in ({}, bearer("alice"), bearer("root", admin=True)):
                async with at.connect() as http:
                    await http.send(request_bytes("GET", target, headers=headers))
                    status, answer = await http.head()
                assert answer["cache-control"] in ("no-store", "private, no-cache", "no-cache", STREAM), (path, status)
                public = methods["GET"].public and not path.startswith("/api/") and status == 200
                assert (answer["cache-control"] == "no-cache") <= public, (path, answer)
