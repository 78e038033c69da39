"""What happens to a page that is not the server's fault nor its own: no network, no sleep undisturbed, no Redis."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import trio

from tests.integration.browser import NewPage, Page
from tests.integration.running import running
from tests.pacing import for_a_while
from tests.redis_servers import RedisServer, running_proxy, running_sentinels
from tests.support import AUTH, PATIENCE_S, WORKER, Address, in_seconds, server, token, until, until_answered, until_so
from tests.web.pages import (
    busy,
    cut_off,
    publish,
    saw_all,
    share_one,
    start,
    start_all,
    unexpected,
    until_all,
    until_live,
    versions,
)

pytestmark = [pytest.mark.slow, pytest.mark.long]

# How long the network is away. `make test-offline` for the whole minute, in which waits grow as long as they get.
OFFLINE_S = float(os.environ.get("OFFLINE_S", "2"))


async def go_on(page: Page, at: Address, away: Callable[[bool], Awaitable[object]]) -> None:
    """Four clients, one of each transport, lose the network, know it, and have all that they missed once it is back."""
    for job_id in ("job-1", "ends", "goes"):
        await publish(at, job_id, progress=1)
    await until_all(page, "one.client.live && one.seen.length === 3")
    await away(True)
    await until_all(page, "!one.client.live && !one.watched.live && one.client.state === 'offline'")
    await publish(at, progress=20)
    await publish(at, progress=30)
    await publish(at, "ends", status="completed")
    await at.ask("DELETE", "/api/v2/jobs/goes")
    await for_a_while(OFFLINE_S)
    await until_all(page, "!one.client.live && one.watched.jobs.length === 3")
    await away(False)
    await until_all(page, "one.client.live && one.watched.jobs.length === 2")
    await publish(at, progress=40)
    await until_all(page, "one.watched.jobs.find((job) => job.jobId === 'job-1').progress === 40")
    seen = await page.run(
        "clients.map((one) => one.seen.map((job) => `${job.jobId} ${job.type === 'job_deleted' ? 'x' : job.version}`))"
    )
    for one in seen:
        assert [step for step in one if step.startswith("job-1")] == [f"job-1 {version}" for version in (1, 2, 3, 4)]
        assert [step for step in one if step.startswith("ends")] == ["ends 1", "ends 2"]
        assert [step for step in one if step.startswith("goes")] == ["goes 1", "goes x"]
    assert await page.run("clients.flatMap((one) => one.missed)") == []


async def test_offline_for_a_while(new_page: NewPage) -> None:
    async with server() as at:
        page = await new_page()
        await start_all(page, at.url, {"all": True})

        await go_on(page, at, partial(cut_off, page))


async def test_a_network_that_is_gone_without_a_word(new_page: NewPage, tmp_path: Path) -> None:
    # The clients find out by the heartbeats that stay away.
    async with (
        running(tmp_path, environ={"STATUSWIRE_SERVER_HEARTBEAT": "0.5"}) as started,
        running_proxy(started.port) as proxy,
    ):
        page = await new_page()
        # Polls have none: theirs is the time that an answer may take.
        await start_all(page, f"http://127.0.0.1:{proxy.port}", {"all": True}, reconnectDelay=500)

        async def away(yes: bool) -> None:
            if yes:
                proxy.stop_passing()
                proxy.cut()
            else:
                proxy.pass_again()

        await go_on(page, Address(started.port), away)


async def test_redis_fails_over_under_a_page(new_page: NewPage, tmp_path: Path) -> None:
    bar = "document.querySelector('job-progress')"
    with running_sentinels(tmp_path) as sentinels:
        async with running(tmp_path, "--store", sentinels.url) as started:
            at = Address(started.port)
            await publish(at, progress=1)
            page = await new_page()
            await start_all(page, at.url)
            await page.run(
                f"import('{at.url}/job-progress.js').then(() => "
                "document.body.append(Object.assign(document.createElement('job-progress'))))"
            )
            await page.run(f"{bar}.setAttribute('job', 'job-1')")
            await until_all(page, "one.client.live && one.seen.length === 1")
            await page.wait(f"{bar}.ariaValueText === '1 %, queued'")
            master = sentinels.master()
            # What it has answered must be with the replica, or it would be right to take it back.
            with master.oracle() as oracle:
                await trio.to_thread.run_sync(oracle.wait, 1, 5000)
            master.kill()

            async def accepted(progress: int) -> bool:
                answer = await at.post("/api/v2/jobs/job-1/updates", {"userId": "anonymous", "progress": progress})
                assert answer.status in (200, 503), answer
                return answer.status == 200

            for progress in range(2, 7):
                await until_so(partial(accepted, progress))
            assert sentinels.master() is not master
            await publish(at, status="completed")
            await until_all(page, "one.client.live && one.seen.at(-1).status === 'completed'")
            await page.wait(f"{bar}.ariaValueText === '100 %, completed'")
            for one in await page.run("clients.slice(0, 3).map((one) => one.seen.map((job) => job.version))"):
                assert one == list(range(1, 8))
            assert await page.run("clients.flatMap((one) => one.missed)") == []


async def test_a_server_that_is_cut_off_from_its_store(new_page: NewPage, redis: RedisServer) -> None:
    """Its pages say that they are not live, and go on at a server that is not cut off, if there is one."""
    async with (
        running_proxy(redis.port) as to_redis,
        server(store={"url": redis.url}) as one,
        # Whoever waits in a poll hears of it with the answer.
        server(
            store={"url": f"redis://127.0.0.1:{to_redis.port}"},
            server={"heartbeat": 0.5},
            limits={"poll_timeout": 1.0},
        ) as two,
        running_proxy(two.port) as balancer,
    ):
        await publish(one, progress=1)
        page = await new_page()
        await start_all(page, f"http://127.0.0.1:{balancer.port}")
        await until_all(page, "one.client.live && one.seen.length === 1")
        to_redis.stop_passing()
        to_redis.cut()
        await until_answered(two, "/ready", 503)
        await publish(one, progress=20)
        await until_all(page, "!one.client.live && !one.watched.live && one.client.error.code === 'store_unavailable'")
        # A WebSocket looks for another server, which is the same one yet, and no better.
        tried = balancer.connections
        await until(lambda: balancer.connections > tried)
        assert await page.run("clients.every((one) => !one.client.live && one.seen.length === 1)")
        balancer.target = one.port
        await page.wait("clients[0].client.live && clients[0].seen.length === 2")
        to_redis.pass_again()  # polls go over connections that the browser has, to where they were
        await publish(one, status="completed")
        await until_all(page, "one.client.live && one.seen.at(-1).status === 'completed'")
        assert await page.run("clients.flatMap((one) => one.missed)") == []


async def test_a_log_that_is_lost_while_a_page_looks_on(new_page: NewPage, redis: RedisServer) -> None:
    """Redis comes back empty: what it knows now replaces what was known, in every client, and none is loaded anew."""
    async with server(store={"url": redis.url}, limits={"poll_timeout": 1.0}) as at:
        for job_id in ("stays", "goes"):
            for progress in (10, 20, 30):
                await publish(at, job_id, progress=progress)
        page = await new_page()
        await start_all(page, at.url, {"all": True})
        await until_all(page, "one.client.live && one.watched.jobs.length === 2")
        await trio.to_thread.run_sync(redis.kill)
        await trio.to_thread.run_sync(redis.start)
        await until_answered(at, "/ready", 200)
        await publish(at, "stays", progress=5)
        now = "one.client.live && one.watched.live && one.watched.jobs.map((job) => job.progress).join() === '5'"
        await until_all(page, now)
        await until_all(page, "one.seen.some((job) => job.type === 'job_deleted' && job.jobId === 'goes')")
        await publish(at, "stays", progress=50)
        await until_all(page, "one.seen.at(-1).progress === 50 && one.seen.at(-1).version === 2")


@asynccontextmanager
async def stopped(page: Page) -> AsyncIterator[None]:
    """The process of a page stands still, as all do when a laptop is closed: no event tells it."""
    pid = await process_of(page)
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


async def process_of(page: Page) -> int:
    """The one that is busy when the page is."""
    assert page.browser is not None
    processes = (await page.browser.call("SystemInfo.getProcessInfo"))["processInfo"]
    pids = [process["id"] for process in processes if process["type"] == "renderer"]

    def ticks(pid: int) -> int:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])

    before = {pid: ticks(pid) for pid in pids}
    await page.run("(() => { const begun = performance.now(); while (performance.now() - begun < 400); })()")
    return max(pids, key=lambda pid: ticks(pid) - before[pid])


async def test_a_suspended_page_goes_on(new_page: NewPage) -> None:
    async with server() as at, running_proxy(at.port) as proxy:
        await publish(at, progress=1)
        page = await new_page()
        await start_all(page, f"http://127.0.0.1:{proxy.port}")
        await until_all(page, "one.client.live && one.seen.length === 1")
        async with stopped(page):
            # The sockets are gone by the time it wakes, and nothing has told it.
            proxy.stop_passing()
            await publish(at, progress=20)
            await publish(at, progress=30)
            await publish(at, status="completed")
            await for_a_while(7)  # so long that, awake, they would have known
        await until_all(page, "!one.client.live || one.client.transport.includes('poll')")
        proxy.cut()
        proxy.pass_again()
        await until_all(page, "one.client.live && one.seen.at(-1).status === 'completed'")
        for one in await page.run("clients.slice(0, 3).map((one) => one.seen.map((job) => job.version))"):
            assert one == [1, 2, 3, 4]
        assert await page.run("clients.flatMap((one) => one.missed)") == []


@pytest.mark.parametrize("how", ["frozen", "stopped"])
async def test_the_tab_that_leads_falls_asleep(new_page: NewPage, how: str) -> None:
    async with server() as at:
        leader, *others = pages = await share_one(new_page, at.url, 3)
        (stream,) = at.node.streams

        async def awake_ones_go_on() -> None:
            async with busy(lambda number: publish(at, message=str(number))):
                # Without the tab whose connection it was: another one is made.
                await until(lambda: any(one is not stream for one in at.node.streams))
                for page in others:
                    await until_live(page)
            last = await publish(at, message="last")
            for page in others:
                await page.wait("client.live && seen.at(-1).message === 'last'")
                assert await versions(page) == list(range(1, last["version"] + 1))

        if how == "frozen":
            await leader.call("Page.setWebLifecycleState", state="frozen")
            await awake_ones_go_on()
            await leader.call("Page.setWebLifecycleState", state="active")
        else:
            async with stopped(leader):
                await awake_ones_go_on()
        last = await publish(at, status="completed")
        for page in pages:
            await saw_all(page, last["version"])
        await until(lambda: len(at.node.streams) == 1)


async def test_the_tab_that_leads_crashes(new_page: NewPage) -> None:
    async with server() as at:
        leader, *others = await share_one(new_page, at.url, 3)
        (stream,) = at.node.streams
        async with busy(lambda number: publish(at, message=str(number))):
            os.kill(await process_of(leader), signal.SIGKILL)
            await until(lambda: len(at.node.streams) == 1 and stream not in at.node.streams)
        last = await publish(at, status="completed")
        for page in others:
            await saw_all(page, last["version"])


@pytest.mark.parametrize("share", [False, True], ids=["alone", "shared"])
async def test_back_from_the_back_forward_cache(new_page: NewPage, share: bool) -> None:
    async with server() as at:
        await publish(at, progress=1)
        page = await new_page()
        await start(page, at.url, share=share)
        await page.wait("client.live && seen.length === 1")
        await page.run(
            "window.shown = [], addEventListener('pageshow', ({ persisted }) => shown.push(persisted, client.live)), 0"
        )
        await page.open(f"{at.url}/react.d.ts")
        await until(lambda: not at.node.streams)
        await publish(at, progress=2)
        await publish(at, progress=3)
        await page.call("Runtime.evaluate", expression="history.back()")
        await page.wait("location.href.endsWith('client.d.ts') && document.readyState === 'complete'")
        # It is the same page as before, which knew that it was not up to date.
        assert await page.run("window.shown") == [True, False]
        await page.wait("client.live && seen.length === 3")
        assert await versions(page) == [1, 2, 3]


async def test_two_tabs_are_closed_at_once(new_page: NewPage) -> None:
    async with server() as at:
        pages = await share_one(new_page, at.url, 4)
        async with busy(lambda number: publish(at, message=str(number)), pause=0.005):
            async with trio.open_nursery() as nursery:
                # Among them the one that leads, in the middle of passing on, and the one that would be next.
                for page in pages[:2]:
                    nursery.start_soon(page.call, "Page.close")
            await until(lambda: len(at.node.streams) == 1)
            for page in pages[2:]:
                await until_live(page)
        last = await publish(at, status="completed")
        for page in pages[2:]:
            await saw_all(page, last["version"])


async def test_a_tab_that_disconnects_wants_nothing_more(new_page: NewPage) -> None:
    async with server() as at:
        first = await new_page()
        second = await new_page(first)
        await start(first, at.url, share=True)
        await until_live(first)
        await start(second, at.url, "job-2", share=True)
        await until_live(second)
        (stream,) = at.node.streams
        await until(lambda: len(stream.wants) == 2)
        await second.run("client.disconnect()")
        await until(lambda: len(stream.wants) == 1)
        await second.run("client.reconnect()")
        await publish(at, "job-2", progress=1)
        await second.wait("client.live && seen.length === 1")
        # Whoever leads and disconnects hands over.
        await first.run("client.disconnect()")
        await until(lambda: bool(at.node.streams) and stream not in at.node.streams)
        await publish(at, "job-2", progress=2)
        await second.wait("client.live && seen.length === 2")
        assert unexpected(first) + unexpected(second) == []


async def test_disconnected_before_the_token_is_there(new_page: NewPage) -> None:
    async with server(auth=AUTH) as at:
        page = await new_page()
        good = token("alice", exp=in_seconds(600))
        await start(
            page, at.url, token=f"() => new Promise((give) => (window.give = () => give({good!r})))", share=True
        )
        await page.wait("window.give")
        before = len(page.sent)
        # Nor may it be told of what is watched meanwhile by errors.
        await page.run("client.watch('job-2', () => {}), client.disconnect(), give(), 0")
        marks = [f"{at.url}/health?mark={number}" for number in range(5)]
        for mark in marks:
            await page.run(f"fetch({mark!r}).then(() => 0)")
        assert [url for _, url in page.sent[before:]] == marks, "it has not tried to connect before any of them"
        assert await page.run("client.state") == "closed"
        await page.run("client.reconnect()")
        await until_live(page)
        assert unexpected(page) == []


async def test_all_tabs_are_refused_and_one_logs_in(new_page: NewPage) -> None:
    async with server(auth=AUTH) as at:
        pages = [await new_page()]
        pages.append(await new_page(pages[0]))
        good = token("alice", exp=in_seconds(600))
        bad = good.rpartition(".")[0] + "." + "A" * 43
        for page in pages:
            await start(page, at.url, token=f"() => localStorage.token ?? {bad!r}", share=True)
        for page in pages:
            await page.wait("client.state === 'closed' && client.error?.status === 401")
            assert await page.run("client.error instanceof Error && client.error.code")
        await pages[1].run(f"localStorage.token = {good!r}, client.reconnect()")
        for page in pages:
            await until_live(page)
        await at.publish("job-1", WORKER, userId="alice", progress=5)
        for page in pages:
            await page.wait("seen.length === 1")


@pytest.mark.parametrize("transport", ["websocket", "sse", "longpoll", "poll"])
async def test_a_token_ends_unnoticed(new_page: NewPage, transport: str) -> None:
    """By a clock that is an hour behind it was to last: the server says that it is over, and one more is asked for."""
    async with server(auth=AUTH) as at:
        page = await new_page()
        await page.call(
            "Page.addScriptToEvaluateOnNewDocument",
            source="const now = Date.now; Date.now = () => now() - 3_600_000;",
        )
        tokens = [token("alice", exp=in_seconds(2)), token("alice", exp=in_seconds(600))]
        await start(
            page,
            at.url,
            token=f"(window.asked = [], ({{ refused }}) => {tokens!r}[asked.push(refused) - 1])",
            transports=[transport],
        )
        await until_live(page)
        await page.wait("asked.length === 2 && client.live")
        assert await page.run("asked") == [False, True]
        await at.publish("job-1", WORKER, userId="alice", progress=5)
        await page.wait("seen.length === 1 && client.live")
        assert await page.run("asked.length") == 2


async def test_a_clock_that_is_set(new_page: NewPage, tmp_path: Path) -> None:
    """Back by an hour: silence is noticed all the same."""
    async with (
        running(tmp_path, environ={"STATUSWIRE_SERVER_HEARTBEAT": "0.5"}) as started,
        running_proxy(started.port) as proxy,
    ):
        page = await new_page()
        await start(page, f"http://127.0.0.1:{proxy.port}", transports=["websocket"])
        await until_live(page)
        await page.run("(() => { const now = Date.now; Date.now = () => now() - 3_600_000; })()")
        proxy.stop_passing()
        await page.wait("!client.live && client.error.code === 'timeout'")
        proxy.pass_again()
        await until_live(page)


async def test_callbacks_that_throw_stop_nothing(new_page: NewPage, tmp_path: Path) -> None:
    page = await new_page()
    async with running(tmp_path) as started:
        at = Address(started.port)
        for number in range(3):
            await publish(at, f"job-{number}", progress=1)
        await page.open(f"{at.url}/client.d.ts")
        await page.run(
            f"""(async () => {{
                const {{ connect }} = await import("{at.url}/client.js");
                const broken = () => {{ throw new Error("my mistake"); }};
                window.client = connect({{ reconnectDelay: 50, transports: ["websocket"],
                    onProgress: broken, onError: broken, onConnect: broken, onDisconnect: broken }});
                client.onState(broken);
                window.watched = client.watch({{ all: true }});
                window.seen = [];
                client.watch({{ all: true }}, (job) => seen.push(job));
            }})()"""
        )
        await page.wait("client.live && seen.length === 3")
    await page.wait("client.state === 'offline'")
    async with running(tmp_path, "--port", str(at.port)):
        await publish(at, "job-1", progress=2)
        await page.wait("client.live && seen.length === 4")
    assert any("my mistake" in problem for problem in page.problems)


@pytest.mark.parametrize("transport", ["websocket", "sse", "longpoll", "poll"])
async def test_any_text_comes_through(new_page: NewPage, transport: str) -> None:
    # What JavaScript and event streams once took for ends of lines, other directions, and letters of two units.
    text = "a\u2028b\u2029c\x85d\re\nf\tg data: id: 1 \U0001f600\u202egnirts\u202c \u05e9\u05dc\u05d5\u05dd \x00 \"'\\"
    async with server() as at:
        page = await new_page()
        await start(page, at.url, transports=[transport])
        await until_live(page)
        await publish(at, message=text)
        await page.wait("seen.length === 1")
        assert await page.run("seen[0].message") == text


@pytest.mark.parametrize("transport", ["sse", "longpoll", "poll"])
async def test_another_job_is_watched_while_one_is_deleted(new_page: NewPage, transport: str) -> None:
    """More to watch means other requests: what happens between two of them is not missed."""
    async with server() as at:
        page = await new_page()
        await start(page, at.url, transports=[transport])
        await publish(at, progress=1)
        await page.wait("client.live && seen.length === 1")
        for number in range(2):
            job_id = f"kept-{number}"
            await publish(at, job_id, progress=1)
            await page.run(f"window.heard = 0, client.watch({job_id!r}, () => (heard += 1)), 0")
            step = await publish(at, progress=2 + number)
            await page.wait(f"seen.at(-1).version === {step['version']} && heard")
        assert await versions(page) == [1, 2, 3]
        await page.run("client.watch('another', () => {}), 0")
        assert (await at.ask("DELETE", "/api/v2/jobs/job-1")).status == 204
        await page.wait("watched.jobs.length === 0 && seen.at(-1).type === 'job_deleted'")


async def test_loops_outlive_a_reconnection(new_page: NewPage) -> None:
    async with server() as at:
        page = await new_page()
        await start(page, at.url)
        await until_live(page)
        await page.run(
            """(async () => {
                window.looped = [];
                window.ended = client.done('job-1').then((job) => job.version);
                for await (const job of client.watch('job-1')) looped.push(job.version);
                looped.push('end');
            })(), 0"""
        )
        await publish(at, progress=1)
        await page.wait("looped.length === 1")
        await page.run("client.reconnect()")
        await until_live(page)
        await publish(at, status="completed")
        await page.wait("looped.length === 3")
        assert await page.run("looped") == [1, 2, "end"]
        with trio.fail_after(PATIENCE_S):
            assert await page.run("ended") == 2
