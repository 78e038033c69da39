"""The client through nginx: with everything let through, and with one transport after the other blocked."""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import trio

from tests.integration.browser import NewPage
from tests.integration.running import free_port
from tests.nginx import running_nginx, write_configuration
from tests.redis_servers import running_proxy
from tests.support import Address, server
from tests.web.pages import (
    TRANSPORTS,
    busy,
    cut_fifty_times,
    publish,
    start,
    start_all,
    until_all,
    until_live,
    versions,
    watch_to_the_end,
)

pytestmark = pytest.mark.slow

# How proxies and firewalls keep something out: an answer of their own, or none at all.
REFUSED = "return 403;"
CUT_OFF = "return 444;"
WEBSOCKET = "location = /ws/jobs {{ {} }}"
SSE = "location = /api/v2/jobs/stream {{ {} }}"
# Those that are open when the configuration is another.
CUT_OLD = "worker_shutdown_timeout 100ms;"
LONG_POLL = "if ($arg_timeout ~ [1-9]) {{ {} }}"


class Nginx(Address):
    """An nginx in front of a server."""

    def __init__(self, directory: Path, target: int, port: int, main: str, location: str) -> None:
        super().__init__(port)
        self._main = main
        self._location = location
        self._directory = directory
        self._target = target
        self.process: trio.Process | None = None

    def configure(self, *blocked: str) -> Path:
        """Write the configuration; what is running takes it up when told to."""
        return write_configuration(
            self._directory,
            f"""
                map $http_upgrade $connection_upgrade {{ default upgrade; "" ""; }}
                server {{
                    listen 127.0.0.1:{self.port};
                    {" ".join(blocked)}
                    location / {{
                        proxy_pass http://127.0.0.1:{self._target};
                        proxy_http_version 1.1;
                        proxy_set_header Host $http_host;
                        proxy_set_header Upgrade $http_upgrade;
                        proxy_set_header Connection $connection_upgrade;
                        proxy_read_timeout 120s;
                        {self._location}
                    }}
                }}""",
            main=self._main,
        )

    def reconfigure(self, *blocked: str) -> None:
        """The same while it runs."""
        assert self.process is not None
        self.configure(*blocked)
        self.process.send_signal(signal.SIGHUP)


@asynccontextmanager
async def nginx(
    directory: Path, target: Address, *blocked: str, main: str = "", location: str = ""
) -> AsyncIterator[Nginx]:
    """Run nginx in front of a server, with some locations blocked."""
    proxy = Nginx(directory, target.port, free_port(), main, location)
    async with running_nginx(proxy.configure(*blocked)) as proxy.process:
        yield proxy


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_every_transport_through_nginx(new_page: NewPage, tmp_path: Path, transport: str) -> None:
    async with server() as at, nginx(tmp_path, at) as proxy:
        await watch_to_the_end(await new_page(), at, proxy.url, transport)


@pytest.mark.parametrize("how", [REFUSED, CUT_OFF], ids=["refused", "cut-off"])
@pytest.mark.parametrize(
    ("blocked", "left"),
    [((WEBSOCKET,), "sse"), ((WEBSOCKET, SSE), "longpoll"), ((WEBSOCKET, SSE, LONG_POLL), "poll")],
    ids=["websocket", "and-sse", "and-longpoll"],
)
async def test_what_is_let_through_is_used(
    new_page: NewPage, tmp_path: Path, blocked: tuple[str, ...], left: str, how: str
) -> None:
    async with server() as at, nginx(tmp_path, at, *(place.format(how) for place in blocked)) as proxy:
        await publish(at, status="processing")
        page = await new_page()
        await start(page, proxy.url)
        await until_live(page, left)
        await publish(at, progress=50)
        await publish(at, status="completed")
        await page.wait("seen.at(-1)?.status === 'completed'")
        assert await page.run("missed") == []
        # The next page of the session begins with what worked.
        page.sent.clear()
        await start(page, proxy.url)
        await until_live(page, left)
        assert not [url for kind, url in page.sent if kind == "WEBSOCKET"]
        path = "/api/v2/jobs/" + ("stream" if left == "sse" else "poll")
        assert [url for _, url in page.sent if url.startswith(proxy.url + path)]


async def test_it_comes_back_to_the_best_without_a_gap(new_page: NewPage, tmp_path: Path) -> None:
    async with server() as at, nginx(tmp_path, at, WEBSOCKET.format(REFUSED)) as proxy:
        page = await new_page()
        await start(page, proxy.url)
        await until_live(page, "sse")
        proxy.reconfigure()
        async with busy(lambda number: publish(at, message=str(number))):
            await page.wait("client.transport === 'websocket'")
        last = await publish(at, status="completed")
        await page.wait("seen.at(-1).status === 'completed'")
        assert await versions(page) == list(range(1, last["version"] + 1))
        assert await page.run("missed") == []
        assert await page.run("states") == ["open sse", "open websocket"]


async def test_one_way_after_the_other_is_closed_during_a_job(new_page: NewPage, tmp_path: Path) -> None:
    async with server() as at, nginx(tmp_path, at, main=CUT_OLD) as proxy:
        page = await new_page()
        await start(page, proxy.url)
        await until_live(page, "websocket")
        blocked: list[str] = []
        async with busy(lambda number: publish(at, message=str(number))):
            for place, left in ((WEBSOCKET, "sse"), (SSE, "longpoll"), (LONG_POLL, "poll")):
                blocked.append(place.format(REFUSED))
                proxy.reconfigure(*blocked)
                await until_live(page, left)
        last = await publish(at, status="completed")
        await page.wait("seen.at(-1).status === 'completed'")
        assert await versions(page) == list(range(1, last["version"] + 1))
        assert await page.run("missed") == []


async def test_cut_fifty_times_before_and_behind_nginx(new_page: NewPage, tmp_path: Path) -> None:
    """Four clients, one of each transport, and a network that fails on either side of the proxy."""
    async with server() as at, running_proxy(at.port) as behind, nginx(tmp_path, Address(behind.port)) as proxy:
        # What the server asks of EventSource is longer than this test has.
        behind.replace = (b"retry: 3000", b"retry: 0010")
        async with running_proxy(proxy.port) as before:
            await publish(at, status="processing")
            page = await new_page()
            await start_all(page, f"http://127.0.0.1:{before.port}", reconnectDelay=10)
            await until_all(page, "one.seen.length")
            async with busy(lambda number: publish(at, message=str(number))):
                await cut_fifty_times(partial(until_all, page, "one.client.live"), before, behind)
            last = await publish(at, status="completed")
            await until_all(page, "one.client.live && one.seen.at(-1).status === 'completed'")
            assert await page.run("clients.flatMap((one) => one.missed)") == []
            for seen in await page.run("clients.map((one) => one.seen.map((job) => job.version))"):
                assert seen == list(range(seen[0], last["version"] + 1))


async def test_a_proxy_that_holds_streams_back(new_page: NewPage, tmp_path: Path) -> None:
    """It connects, answers, and says nothing: as good as blocked."""
    holding = (
        "proxy_ignore_headers X-Accel-Buffering; gzip on; gzip_proxied any; gzip_min_length 0; "
        "gzip_types text/event-stream;"
    )
    async with server() as at, nginx(tmp_path, at, WEBSOCKET.format(REFUSED), location=holding) as proxy:
        page = await new_page()
        await start(page, proxy.url)
        await until_live(page, "longpoll")
        await publish(at, progress=50)
        await page.wait("seen.length === 1")
        assert await page.run("states") == ["polling longpoll"], "it has never said that it was live by a stream"


async def test_a_captive_portal_is_no_server(new_page: NewPage, tmp_path: Path) -> None:
    """Whatever is asked, a page comes with status 200: nobody takes that for an answer."""
    async with server() as at, nginx(tmp_path, at, main=CUT_OLD) as proxy:
        page = await new_page()
        await start(page, proxy.url)
        # One that watches nothing has only the connection to judge by.
        await page.run(f"window.idle = connect({{ url: '{proxy.url}', transports: ['sse'], reconnectDelay: 50 }}), 0")
        await until_live(page)
        await page.wait("idle.live")
        proxy.reconfigure("default_type text/html; return 200 '<h1>Welcome</h1>';")
        await page.wait("client.state === 'offline' && errors.length")
        await page.run("idle.reconnect()")
        await page.wait("idle.state === 'offline'")
        await publish(at, progress=50)
        proxy.reconfigure()
        await page.wait("client.live && idle.live && seen.length === 1")
