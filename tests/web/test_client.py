"""The client in a real Chromium: every transport, and everything that can happen to it."""

from __future__ import annotations

import os
import signal
import time
from functools import partial
from pathlib import Path

import pytest

from tests.integration.browser import NewPage
from tests.integration.running import running
from tests.redis_servers import running_proxy
from tests.support import AUTH, WORKER, Address, in_seconds, server, token, until
from tests.web.pages import (
    TRANSPORTS,
    busy,
    cut_fifty_times,
    cut_off,
    publish,
    saw_all,
    share_one,
    start,
    unexpected,
    until_live,
    versions,
    watch_to_the_end,
)

pytestmark = [pytest.mark.slow, pytest.mark.long]


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_every_version_once_and_the_end(new_page: NewPage, transport: str) -> None:
    async with server() as at:
        page = await new_page()
        await watch_to_the_end(page, at, at.url, transport)
        assert await page.run("client.state") == ("open" if transport in ("websocket", "sse") else "polling")
        assert await page.run("errors") == []
        assert unexpected(page) == []


@pytest.mark.parametrize("transport", ["websocket", "sse", "longpoll"])
async def test_cut_at_random_fifty_times(new_page: NewPage, transport: str) -> None:
    async with server() as at, running_proxy(at.port) as proxy:
        # What the server asks of EventSource is longer than this test has.
        proxy.replace = (b"retry: 3000", b"retry: 0010")
        await publish(at, status="processing")
        page = await new_page()
        await start(page, f"http://127.0.0.1:{proxy.port}", transports=[transport], reconnectDelay=10)
        async with busy(lambda number: publish(at, message=str(number))):
            await cut_fifty_times(partial(until_live, page), proxy)
        ended = await publish(at, status="completed")
        await page.wait("seen.at(-1)?.status === 'completed'")
        assert await page.run("missed") == []
        first, *_ = seen = await versions(page)
        assert seen == list(range(first, ended["version"] + 1))
        assert proxy.connections >= 50


@pytest.mark.parametrize("transport", ["websocket", "sse", "longpoll"])
async def test_a_restart_is_told_and_survived(new_page: NewPage, tmp_path: Path, transport: str) -> None:
    page = await new_page()
    async with running(tmp_path) as first:
        at = Address(first.port)
        await publish(at, progress=10)
        await start(page, at.url, transports=[transport])
        await until_live(page, transport)
        assert await page.run("watched.live")
    await page.wait("client.state === 'offline'")
    assert not await page.run("watched.live")
    assert await page.run("watched.jobs[0].progress") == 10  # known, but not as if it were so now
    async with running(tmp_path, "--port", str(at.port)):
        await publish(at, progress=20)
        await page.wait(f"client.live && client.transport === '{transport}' && watched.jobs[0].progress === 20")
        assert await versions(page) == [1, 2]


async def test_a_drain_says_when_to_come_back(new_page: NewPage, tmp_path: Path) -> None:
    page = await new_page()
    async with running(tmp_path, environ={"STATUSWIRE_SERVER_DRAIN": "1"}) as first:
        at = Address(first.port)
        await start(page, at.url, transports=["websocket"])
        await until_live(page)
        first.process.send_signal(signal.SIGTERM)
        await page.wait("!client.live")
        assert await page.run("client.error.delay > 0 && client.error.message.includes('ms')")
    async with running(tmp_path, "--port", str(at.port)):
        await until_live(page)


async def test_a_log_that_is_lost_replaces_what_was_known(new_page: NewPage, tmp_path: Path) -> None:
    page = await new_page()
    async with running(tmp_path, "--store", "memory:") as first:
        at = Address(first.port)
        await publish(at, "gone", progress=1)
        for _ in range(5):
            await publish(at, "back", progress=1)
        await start(page, at.url, {"all": True})
        await page.wait("client.live && watched.jobs.length === 2")
    async with running(tmp_path, "--store", "memory:", "--port", str(at.port)):
        await publish(at, "back", progress=3)
        await page.wait("client.live && watched.jobs.length === 1 && watched.jobs[0].progress === 3")
        assert await page.run(
            "seen.at(-2).type + seen.at(-2).jobId === 'job_deletedgone' || seen.at(-1).jobId === 'gone'"
        )


@pytest.mark.parametrize("transport", ["websocket", "sse"])
async def test_a_silent_connection_is_replaced(new_page: NewPage, tmp_path: Path, transport: str) -> None:
    page = await new_page()
    async with running(tmp_path, environ={"STATUSWIRE_SERVER_HEARTBEAT": "0.5"}) as first:
        at = Address(first.port)
        await start(page, at.url, transports=[transport])
        await until_live(page)
        os.kill(first.process.pid, signal.SIGSTOP)
        try:
            await page.wait("!client.live && client.error.code === 'timeout'")
        finally:
            os.kill(first.process.pid, signal.SIGCONT)
        await publish(at, progress=3)
        await page.wait("client.live && watched.jobs[0]?.progress === 3")


@pytest.mark.parametrize("transport", ["websocket", "sse"])
async def test_a_frozen_page_catches_up(new_page: NewPage, transport: str) -> None:
    async with server() as at:
        await publish(at, progress=1)
        page = await new_page()
        await start(page, at.url, transports=[transport])
        await page.wait("client.live && seen.length === 1")
        await page.call("Page.setWebLifecycleState", state="frozen")
        await until(lambda: not at.node.streams)
        for progress in (2, 3, 4):
            await publish(at, progress=progress)
        await page.call("Page.setWebLifecycleState", state="active")
        await page.wait("client.live && seen.length === 4")
        assert await page.run("states.some((state) => state.startsWith('connecting'))")
        assert await versions(page) == [1, 2, 3, 4]


async def test_it_is_offline_and_says_so(new_page: NewPage) -> None:
    async with server() as at:
        page = await new_page()
        await start(page, at.url)
        await until_live(page)
        await cut_off(page, True)
        await page.wait("client.state === 'offline' && client.error.code === 'offline'")
        await publish(at, progress=1)
        await cut_off(page, False)
        await page.wait("client.live && seen.length === 1")


@pytest.mark.parametrize("transport", ["websocket", "sse"])
async def test_a_token_is_renewed_before_it_ends(new_page: NewPage, transport: str) -> None:
    async with server(auth=AUTH) as at:
        page = await new_page()
        ends = in_seconds(4)
        tokens = [token("alice", exp=ends), token("alice", exp=in_seconds(600))]
        await start(
            page,
            at.url,
            token=f"(() => {{ const left = {tokens!r}; window.asked = 0; return () => left[asked++ && 1]; }})()",
            transports=[transport],
        )
        await until_live(page)
        await page.wait("asked === 2")
        await until(lambda: time.time() > ends)  # from then on the first one is of no use
        await at.publish("job-1", WORKER, userId="alice", progress=5)
        await page.wait("seen.at(-1)?.progress === 5 && client.live")
        states = await page.run("states")
        assert states == [states[0]], "it was never interrupted"


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_a_refused_token_is_asked_for_once_more_and_no_more(new_page: NewPage, transport: str) -> None:
    async with server(auth=AUTH) as at:
        page = await new_page()
        await start(
            page,
            at.url,
            token="(window.asked = [], ({ refused }) => (asked.push(refused), 'not.a.token'))",
            transports=[transport],
        )
        await page.wait("client.state === 'closed'")
        assert await page.run("asked") == [False, True]
        assert await page.run("client.error.status") == 401
        assert await page.run("client.done('job-1').catch(({ code }) => code)") in ("unauthorized", "invalid_token")


async def test_one_connection_for_all_tabs(new_page: NewPage) -> None:
    async with server() as at:
        pages = await share_one(new_page, at.url, 3)
        (stream,) = at.node.streams
        await publish(at, progress=1)
        for page in pages:
            await page.wait("seen.length === 1")
        # What a second tab alone watches comes over the same connection.
        await pages[1].run("client.watch('job-2', (job) => (window.other = job.version))")
        await publish(at, "job-2", progress=1)
        await pages[1].wait("window.other === 1")
        await pages[0].call("Page.close")
        async with busy(lambda number: publish(at, message=str(number))):
            await until(lambda: stream not in at.node.streams and len(at.node.streams) == 1)
        last = await publish(at, status="completed")
        for page in pages[1:]:
            await saw_all(page, last["version"])
        assert len(at.node.streams) == 1


@pytest.mark.parametrize("transport", ["websocket", "sse"])
async def test_a_page_that_goes_into_the_cache_lets_go_and_comes_back(new_page: NewPage, transport: str) -> None:
    async with server() as at:
        await publish(at, progress=1)
        page = await new_page()
        await start(page, at.url, transports=[transport])
        await page.wait("client.live && seen.length === 1")
        await page.run("dispatchEvent(new PageTransitionEvent('pagehide', { persisted: true })), 0")
        await until(lambda: not at.node.streams)
        assert not await page.run("client.live")
        await publish(at, progress=2)
        await page.run("dispatchEvent(new PageTransitionEvent('pageshow', { persisted: true })), 0")
        await page.wait("client.live && seen.length === 2")


async def test_a_hidden_page_may_pause(new_page: NewPage) -> None:
    async with server() as at:
        page = await new_page()
        await start(page, at.url, visibility="pause")
        await until_live(page)
        # Half a minute passes at once.
        await page.run(
            """(() => {
                const wait = setTimeout;
                window.setTimeout = (call, ms, ...rest) => wait(call, ms === 30_000 ? 10 : ms, ...rest);
                window.hide = (hidden) => {
                    Object.defineProperty(document, "hidden", { value: hidden, configurable: true });
                    document.dispatchEvent(new Event("visibilitychange"));
                };
                hide(true);
            })()"""
        )
        await until(lambda: not at.node.streams)
        assert await page.run("client.state") == "offline"
        await publish(at, progress=2)
        await page.run("hide(false)")
        await page.wait("client.live && seen.length === 1")
        # Whoever has disconnected is not told later that it is offline.
        await page.run("hide(true), client.disconnect(), states.splice(0), 0")
        await page.run("new Promise((done) => setTimeout(done, 100))")
        assert await page.run("[client.state, ...states]") == ["closed"]
        await page.run("hide(false), client.reconnect(), 0")
        await until_live(page)


async def test_a_socket_that_died_meanwhile_is_found_out_when_the_page_is_looked_at(new_page: NewPage) -> None:
    async with server() as at, running_proxy(at.port) as proxy:
        page = await new_page()
        await start(page, f"http://127.0.0.1:{proxy.port}", transports=["websocket"])
        await until_live(page)
        proxy.stop_passing()
        await page.run("document.dispatchEvent(new Event('visibilitychange')), 0")
        await page.wait("!client.live && client.error.code === 'timeout'")
        proxy.pass_again()
        await until_live(page)


async def test_whoever_disconnects_hears_nothing_until_reconnect(new_page: NewPage) -> None:
    async with server() as at:
        page = await new_page()
        await start(page, at.url)
        await until_live(page)
        await page.run("client.disconnect()")
        await until(lambda: not at.node.streams)
        assert await page.run("client.state") == "closed"
        await publish(at, progress=1)
        await page.run("client.reconnect()")
        await page.wait("client.live && seen.length === 1")


async def test_a_mistake_in_one_callback_is_told_and_spoils_no_other(new_page: NewPage) -> None:
    async with server() as at:
        page = await new_page()
        await start(page, at.url)
        await page.run("client.watch('job-1', () => { throw new Error('my mistake'); }), 0")
        await page.run("client.watch('job-1', (job) => (window.after = job.version)), 0")
        await until_live(page)
        await publish(at, progress=1)
        await page.wait("window.after === 1 && seen.length === 1")
        await until(lambda: any("my mistake" in problem for problem in page.problems))
