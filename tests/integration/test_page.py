"""The dashboard's jobs in a real Chromium, against the real server: what is shown, and that it is never a lie."""

from __future__ import annotations

import json
import os
import signal
import socket
from pathlib import Path

import pytest
import trio

from tests.integration.browser import NewPage
from tests.integration.pages import (
    ALL_NAMES,
    DOWN,
    ENTER,
    ESCAPE,
    NOTICE,
    ROWS,
    SECRET,
    STATE,
    TAB,
    TIMELINE,
    action,
    choose,
    click,
    enter_token,
    job,
    open_live,
    open_timeline,
    publish,
    say,
    sign,
    text_of,
)
from tests.integration.running import STATUSWIRE, Running, clean_environment, running

pytestmark = [pytest.mark.slow, pytest.mark.long]


@pytest.mark.parametrize("transport", ["websocket", "sse", "longpoll"])
async def test_jobs_appear_move_and_end(new_page: NewPage, server: Running, transport: str) -> None:
    await publish(server, "before", progress=5)
    page = await new_page()
    await open_live(page, server, transport)
    await page.wait(job("before"))

    await publish(
        server,
        "export-1",
        kind="export",
        userId="alice",
        progress=45.9,
        stage="pages",
        currentOperation="Processing page 120/300",
        steps={"done": 120, "total": 300},
        estimatedTimeRemaining=93,
    )
    await page.wait(f"{job('export-1', '.percent')} === '45 %'")
    assert await page.run(job("export-1", ".badge")) == "processing"
    assert await page.run(job("export-1", ".who")) == "export · alice"
    assert await page.run(job("export-1", ".what")) == "pages · Processing page 120/300"
    assert await page.run(f"{job('export-1')}.querySelector('.fill').style.transform") == "scaleX(0.459)"
    assert await page.run(ALL_NAMES) == ["export-1", "before"]
    # It counts down between two updates.
    first = await page.run(job("export-1", ".when"))
    assert first.startswith("1 min 3")
    await page.wait(f"{job('export-1', '.when')} !== {json.dumps(first)}")

    await publish(server, "export-1", userId="alice", status="completed", message="ready")
    await page.wait(f"{job('export-1', '.badge')} === 'completed'")
    assert await page.run(job("export-1", ".percent")) == "100 %"
    assert await page.run(job("export-1", ".what")) == "ready"

    await say(server, "DELETE", "jobs/before")
    await page.wait(f"!{job('before')}")
    await page.wait(f"{text_of('counts')} === '1 job'")
    assert page.problems == []


async def test_nothing_comes_from_elsewhere(new_page: NewPage, server: Running) -> None:
    page = await new_page()
    await open_live(page, server)
    sent = {url for _, url in page.sent if not url.startswith("data:")}
    assert all(url.startswith((server.url, server.url.replace("http", "ws"))) for url in sent)
    assert {f"{server.url}/{name}" for name in ("", "dashboard.css", "dashboard.js", "client.js")} <= sent
    page.sent.clear()
    await choose(page, "transport", "sse")
    await page.wait(f"{text_of('state-text')} === 'Live by SSE'")
    assert [url for kind, url in page.sent if kind == "WEBSOCKET" or "/poll" in url] == []
    assert page.problems == []


async def test_changing_the_transport_keeps_what_is_shown(new_page: NewPage, server: Running) -> None:
    page = await new_page()
    await open_live(page, server)
    await publish(server, "one", progress=10)
    await page.wait(f"{job('one', '.percent')} === '10 %'")
    for progress, transport in ((20, "sse"), (30, "poll"), (40, "websocket")):
        # While nothing is connected an update goes by.
        await choose(page, "transport", transport)
        assert await page.run(ALL_NAMES) == ["one"]
        await publish(server, "one", progress=progress)
        await page.wait(f"{job('one', '.percent')} === '{progress} %' && {STATE} === 'live'")
    assert page.problems == []


async def test_text_of_jobs_is_never_markup(new_page: NewPage, server: Running) -> None:
    evil = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
    page = await new_page()
    await open_live(page, server)
    await publish(server, "evil", kind=evil, stage=evil, currentOperation=evil, message=evil, metadata={"x": evil})
    await publish(server, "worse", status="failed", error=evil, userId="<b>"[1])
    await page.wait(f"{job('worse')} && {job('evil')}")
    assert await page.run(job("evil", ".what")) == f"{evil} · {evil}"
    assert await page.run(job("worse", ".what")) == evil
    for name in ("evil", "worse"):
        await open_timeline(page, name)
        assert evil in await page.run(f"{TIMELINE}.textContent")
    await click(page, "document.getElementById('tab-playground')")
    await click(page, "document.getElementById('wire-all')")
    await page.wait(f"{text_of('wires')}.includes('onerror')")
    assert await page.run("document.querySelectorAll('#everything img, #everything script, #everything b').length") == 0
    assert "owned" not in await page.run("document.title")
    assert page.problems == []


async def test_text_of_jobs_stays_in_its_place(new_page: NewPage, server: Running) -> None:
    """Text that turns the direction of writing, and text without end, disturb nothing beside them."""
    turned = "\u202etxet eht snrut taht redro\u2066 abc"
    await publish(server, "plain", kind="export", progress=50, message="short")
    page = await new_page()
    await page.look(width=1200, height=700)
    await open_live(page, server)
    boxes = f"""((id) => {{
        const row = {ROWS}.find((one) => one.querySelector('.name').textContent === id);
        return [...row.children].map((part) => {{
            const {{ left, right }} = part.getBoundingClientRect();
            const fits = part.className === 'badge' || !part.textContent;
            return [part.className, left, fits ? 0 : right, row.offsetHeight];
        }});
    }})"""
    await page.wait(job("plain"))
    usual = await page.run(f"{boxes}('plain')")
    long = "w" * 1500 + " and more " * 50
    await publish(server, "turned", kind=turned, progress=50, message=turned)
    await publish(server, "x" * 128, kind="k" * 200, progress=50, message=long, currentOperation=long, stage=long)
    for name in ("turned", "x" * 128):
        await page.wait(job(name))
        assert await page.run(f"{boxes}('{name}')") == usual
        assert await page.run(f"getComputedStyle({job(name)}.querySelector('.what')).unicodeBidi") == "isolate"
    # Nothing of a kind reaches over to the user that stands behind it.
    who = await page.run(job("turned", ".who"))
    assert "\u202e" not in who
    assert who.endswith(" · anonymous")
    await open_timeline(page, "x" * 128)
    assert await page.run("document.documentElement.scrollWidth") <= 1200
    assert await page.run(f"{TIMELINE}.scrollWidth <= {TIMELINE}.clientWidth")
    assert page.problems == []


async def test_many_jobs_are_few_rows(new_page: NewPage, server: Running) -> None:
    await say(server, "POST", "updates", [{"jobId": f"old-{n}", "userId": "u", "status": "queued"} for n in range(150)])
    page = await new_page()
    await page.look(width=1200, height=700)
    await open_live(page, server)
    await page.wait(f"{text_of('counts')} === '150 jobs'")
    await say(server, "POST", "updates", [{"jobId": f"new-{n}", "userId": "u", "status": "queued"} for n in range(150)])
    await page.wait(f"{text_of('counts')} === '300 jobs'")
    names = await page.run(ALL_NAMES)
    assert 5 < len(names) < 30
    assert all(name.startswith("new-") for name in names)  # the newest are on top
    # Wherever one scrolls there are rows, and the right ones.
    await page.run("document.getElementById('jobs').scrollTop = 1e9")
    await page.wait(f"{ALL_NAMES}.at(-1)?.startsWith('old-') && {ALL_NAMES}.length < 30")
    seen = "document.getElementById('jobs').getBoundingClientRect()"
    last = "[...document.querySelectorAll('.job')].find((row) => row.getAttribute('aria-posinset') === '300')"
    assert await page.run(f"Math.abs({last}.getBoundingClientRect().bottom - {seen}.bottom) < 3")

    # The focus never left: a row that is not there can have none.
    await publish(server, "new-7", userId="u", status="completed")
    await page.wait("document.querySelector('.chip[data-status=completed]').textContent === 'completed 1'")
    await click(page, "document.querySelector('.chip[data-status=completed]')")
    await page.wait(f"{text_of('counts')} === '1 of 300 jobs' && {ALL_NAMES}.join() === 'new-7'")
    assert page.problems == []


async def test_filters_and_orders(new_page: NewPage, server: Running) -> None:
    await publish(server, "b-export", kind="export", userId="alice", progress=20, message="Reading the ledger")
    await publish(server, "a-export", kind="export", userId="bob", progress=80)
    await publish(server, "video", kind="video", userId="bob", progress=50, estimatedTimeRemaining=5)
    await publish(server, "done", kind="video", userId="alice", status="completed")
    page = await new_page()
    await open_live(page, server)

    async def shown(*names: str) -> None:
        await page.wait(f"{ALL_NAMES}.join() === '{','.join(names)}'")

    async def search(text: str) -> None:
        await page.run("document.getElementById('text').value = ''; document.getElementById('text').focus()")
        await page.write(text)
        await page.run("document.getElementById('text').dispatchEvent(new Event('input'))")

    await shown("done", "video", "a-export", "b-export")
    await choose(page, "sort", "name")
    await shown("a-export", "b-export", "done", "video")
    await choose(page, "sort", "progress")
    await shown("done", "a-export", "video", "b-export")
    await publish(server, "b-export", userId="alice", progress=90)  # and goes on by itself
    await shown("done", "b-export", "a-export", "video")
    await choose(page, "sort", "left")
    await page.wait(f"{ALL_NAMES}.at(-1) === 'done'")
    await choose(page, "sort", "updated")
    await page.wait(f"{ALL_NAMES}[0] === 'b-export'")
    await choose(page, "sort", "status")
    await shown("video", "a-export", "b-export", "done")
    await choose(page, "kind", "export")
    await shown("a-export", "b-export")
    await choose(page, "user", "bob")
    await shown("a-export")
    await choose(page, "kind", "")
    await choose(page, "user", "")
    await search("LEDGER")
    await shown("b-export")
    await search("nothing like it")
    await page.wait(f"{text_of('empty')} === 'No job fits these filters.' && !document.getElementById('empty').hidden")
    await search("")
    await click(page, "document.querySelector('.chip[data-status=processing]')")
    await shown("video", "a-export", "b-export")
    await publish(server, "video", userId="bob", status="failed")
    await shown("a-export", "b-export")
    await click(page, "document.querySelector('.chip[data-status=failed]')")
    await shown("a-export", "b-export", "video")
    assert page.problems == []


async def test_a_flood_is_drawn_once_per_frame(new_page: NewPage, server: Running) -> None:
    page = await new_page()
    await open_live(page, server)
    await publish(server, "busy", progress=0, steps={"done": 0, "total": 2000})
    await page.wait(job("busy"))
    await page.run(
        f"""(() => {{
            window.frames_ = 0;
            window.changes = 0;
            const count = () => {{ window.frames_ += 1; requestAnimationFrame(count); }};
            count();
            new MutationObserver((records) => {{ window.changes += records.length; }})
                .observe({job("busy")}.querySelector(".what"), {{ childList: true }});
        }})()"""
    )
    updates = [{"jobId": "busy", "steps": {"done": n, "total": 2000}} for n in range(1, 2001)]
    await say(server, "POST", "updates", updates)
    await page.wait(f"{job('busy', '.what')} === '2000/2000'")
    changes, frames = await page.run("[window.changes, window.frames_]")
    assert 0 < changes <= frames < 2000


async def test_a_timeline_is_history_and_then_live(new_page: NewPage, server: Running) -> None:
    await publish(server, "long-one", progress=10, stage="reading", message="first")
    await publish(server, "long-one", progress=40, stage="writing")
    page = await new_page()
    await open_live(page, server)
    await open_timeline(page, "long-one")
    updates = f"[...{TIMELINE}.querySelectorAll('.updates li')].map((one) => one.textContent)"
    told = await page.run(updates)
    assert len(told) == 2
    assert "40 %" in told[0]
    assert "writing" in told[0]
    assert "processing" in told[1]  # a status is told when it changes
    assert "processing" not in told[0]
    await publish(server, "long-one", status="failed", error="no room", result={"left": 7})
    await page.wait(f"{updates}.length === 3 && {updates}[0].includes('no room')")
    assert '{"left":7}' in await page.run(f"{TIMELINE}.textContent")
    points = await page.run(f"{TIMELINE}.querySelector('polyline').getAttribute('points')")
    await page.wait(f"{TIMELINE}.querySelector('polyline').getAttribute('points').split(' ').length === 3")
    assert points

    # Another attempt goes on in the same timeline; a job deleted and made anew begins another one.
    await publish(server, "long-one", attempt=2, progress=1)
    await page.wait(f"{updates}.length === 4 && {updates}[0].includes('attempt 2')")
    await say(server, "DELETE", "jobs/long-one")
    await page.wait(f"{TIMELINE}.textContent.includes('was deleted')")
    await publish(server, "long-one", message="again")
    await page.wait(f"{updates}.length === 1 && {updates}[0].includes('again')")

    # More than is kept in the page: bounded, and said.
    many = [{"jobId": "long-one", "message": f"step {n}"} for n in range(700)]
    await say(server, "POST", "updates", many)
    await page.wait(f"{updates}[0].includes('step 699') && {updates}.length === 300")
    await page.wait(f"{TIMELINE}.textContent.includes('earlier ones are not shown')")
    # So it is with what comes while another part is looked at.
    await click(page, "document.getElementById('tab-playground')")
    await say(server, "POST", "updates", [{"jobId": "long-one", "message": f"late {n}"} for n in range(2000)])
    await publish(server, "later")
    await click(page, "document.getElementById('tab-jobs')")
    await page.wait(f"{job('later')} && {updates}[0].includes('late 1999') && {updates}.length === 300")
    assert "late 1700" in await page.run(f"{updates}[299]")
    assert page.problems == []


async def test_a_job_is_cancelled_and_deleted_with_the_keyboard(new_page: NewPage, server: Running) -> None:
    await publish(server, "other", progress=3)
    await publish(server, "long-one", progress=3)
    page = await new_page()
    await open_live(page, server)
    await page.wait(job("long-one"))
    await page.run("document.querySelector('.chip:last-child').focus()")
    await page.press(*TAB)
    chosen = "document.getElementById(document.getElementById('jobs').getAttribute('aria-activedescendant'))"
    await page.wait(
        f"document.activeElement.id === 'jobs' && {chosen}?.querySelector('.name').textContent === 'long-one'"
    )
    await page.press(*DOWN)
    await page.wait(f"{chosen}.querySelector('.name').textContent === 'other'")
    # What comes in above moves the row, not the choice.
    await publish(server, "newer", progress=1)
    await page.wait(f"{job('newer')} && {chosen}.querySelector('.name').textContent === 'other'")
    await page.press(*ENTER)
    await page.wait(f"document.activeElement.id === 'timeline-name' && {action('Cancel job')}")
    await page.press(*TAB)
    await page.press(*TAB)
    assert await page.run("document.activeElement.textContent") == "Cancel job"
    await page.press(*ENTER)
    await page.wait("document.getElementById('confirm').open")
    assert await page.run("document.activeElement.textContent") == "Back"  # the harmless one comes first
    await page.press(*ESCAPE)
    await page.wait("!document.getElementById('confirm').open")
    assert not await page.run(f"{TIMELINE}.hidden")
    assert "cancelRequested" not in await say(server, "GET", "jobs/other")
    assert await page.run("document.activeElement.textContent") == "Cancel job"
    await page.press(*ENTER)
    await page.wait("document.getElementById('confirm').open")
    await page.press(*TAB)
    await page.press(*ENTER)
    await page.wait(f"{job('other', '.badge')} === 'cancelling' && {action('Cancelling')}.disabled")
    answer = await publish(server, "other", progress=4)
    assert answer["cancelRequested"] is True
    await publish(server, "other", status="cancelled")
    await page.wait(f"{job('other', '.badge')} === 'cancelled' && {action('Cancelling')}.hidden")

    await click(page, action("Delete job"))
    await page.wait("document.getElementById('confirm').open")
    await click(page, "document.getElementById('confirm-yes')")
    await page.wait(f"!{job('other')} && {TIMELINE}.textContent.includes('was deleted')")
    await page.press(*ESCAPE)
    await page.wait(f"{TIMELINE}.hidden && document.activeElement.id === 'jobs'")
    assert page.problems == []


async def test_nobody_is_offered_what_would_be_refused(new_page: NewPage, tmp_path: Path) -> None:
    async with running(tmp_path, "--store", "memory:", "--jwt-key", SECRET) as server:
        worker = await sign(tmp_path, "--sub", "worker", "--capability", "publish")
        await publish(server, "hers", worker, userId="alice", progress=1)
        await publish(server, "ended", worker, userId="alice", status="completed")
        page = await new_page()
        await page.open(server.url + "/")
        await enter_token(page, await sign(tmp_path, "--sub", "alice"))
        await open_timeline(page, "hers")
        await page.wait(f"!{action('Cancel job')}.hidden")
        assert await page.run(f"{action('Delete job')}.hidden")
        await open_timeline(page, "ended")
        await page.wait(f"{action('Cancel job')}.hidden")

        await click(page, "document.getElementById('tab-server')")
        await page.wait(f"{text_of('stats-why')}.includes('capability “ops”, which alice does not have')")
        assert await page.run(
            "document.getElementById('stats').hidden && document.getElementById('connections').hidden"
        )
        await click(page, "document.getElementById('tab-playground')")
        assert await page.run("[...document.getElementById('publish').elements].every((one) => one.disabled)")
        assert "“publish”" in await page.run(text_of("publish-why"))
        # Nothing was asked for that is not hers.
        assert not [url for _, url in page.sent if "stats" in url.rpartition("/")[2].split(".")[0] and "api" in url]

        # Its token runs out of the server's favour between showing the button and pressing it.
        await click(page, "document.getElementById('tab-jobs')")
        await open_timeline(page, "hers")
        await page.run("sessionStorage.setItem('statuswire.token', 'not.a.token')")
        await click(page, action("Cancel job"))
        await page.wait("document.getElementById('confirm').open")
        await click(page, "document.getElementById('confirm-yes')")
        await page.wait(f"{NOTICE}.textContent.startsWith('hers was not cancelled: ') && !{NOTICE}.hidden")


@pytest.mark.parametrize("transport", ["websocket", "sse"])
async def test_each_token_sees_its_own(new_page: NewPage, tmp_path: Path, transport: str) -> None:
    async with running(tmp_path, "--store", "memory:", "--jwt-key", SECRET) as server:
        worker = await sign(tmp_path, "--sub", "worker", "--capability", "publish")
        await say(server, "POST", "jobs", {"jobId": "hers", "userId": "alice"}, worker)
        await say(server, "POST", "jobs", {"jobId": "his", "userId": "bob"}, worker)
        page = await new_page()
        await page.open(server.url + "/")
        await page.wait(f"{STATE} === 'token'")

        await enter_token(page, "nonsense")
        await page.wait(f"{text_of('token-why')}.startsWith('The last one was refused: ')")
        alice = await sign(tmp_path, "--sub", "alice")
        await enter_token(page, alice)
        await page.wait(f"{STATE} === 'live' && {job('hers')}")
        await choose(page, "transport", transport)
        await page.wait(f"{STATE} === 'live'")
        assert await page.run(ALL_NAMES) == ["hers"]
        assert await page.run("document.getElementById('token-form').hidden")
        assert await page.run(text_of("me")) == "alice"
        assert await page.run("Object.values(localStorage).length + document.cookie.length") == 0
        assert all(alice not in url for _, url in page.sent)  # addresses end up in logs
        # Another of her jobs, and none of his, live.
        await say(server, "POST", "jobs", {"jobId": "his-2", "userId": "bob"}, worker)
        await say(server, "POST", "jobs", {"jobId": "hers-2", "userId": "alice"}, worker)
        await page.wait(job("hers-2"))
        assert await page.run(ALL_NAMES) == ["hers-2", "hers"]
        # A reload of the tab keeps the token.
        await page.call("Page.reload")
        await page.wait(job("hers-2"))

        await click(page, "document.getElementById('forget')")
        await page.wait(f"{STATE} === 'token' && document.getElementById('everything').hidden")
        await enter_token(page, await sign(tmp_path, "--sub", "bob"))
        await page.wait(job("his-2"))
        assert await page.run(ALL_NAMES) == ["his-2", "his"]


@pytest.mark.parametrize("transport", ["websocket", "sse"])
async def test_a_token_that_ends_is_asked_for_anew(new_page: NewPage, tmp_path: Path, transport: str) -> None:
    async with running(tmp_path, "--store", "memory:", "--jwt-key", SECRET) as server:
        page = await new_page()
        await page.open(server.url + "/")
        await enter_token(page, await sign(tmp_path, "--sub", "alice", "--ttl", "3"))
        await page.wait(f"{STATE} === 'live'")
        await choose(page, "transport", transport)
        await page.wait(f"{STATE} === 'token'")
        assert "expired" in await page.run(text_of("token-why"))
        await enter_token(page, await sign(tmp_path, "--sub", "alice"))
        await page.wait(f"{STATE} === 'live'")


async def test_a_token_left_over_does_no_harm_in_open_mode(new_page: NewPage, server: Running) -> None:
    page = await new_page()
    await page.open(server.url + "/")
    await page.run("sessionStorage.setItem('statuswire.token', 'of.another.server')")
    await page.call("Page.reload")
    await publish(server, "one")
    await page.wait(f"{STATE} === 'live' && {job('one')}")


@pytest.mark.parametrize("transport", ["websocket", "sse", "longpoll"])
async def test_a_restart_is_told_and_survived(new_page: NewPage, tmp_path: Path, transport: str) -> None:
    page = await new_page()
    stale = "document.getElementById('split').classList.contains('stale')"
    async with running(tmp_path) as server:
        await publish(server, "steady", progress=10, estimatedTimeRemaining=500)
        await open_live(page, server, transport)
        await page.wait(f"{job('steady', '.when')} && !{stale}")
    await page.wait(f"{STATE} !== 'live' && {stale} && {text_of('state-more')}.includes('not live since')")
    assert await page.run(ALL_NAMES) == ["steady"]  # shown, but not as if it were live
    assert await page.run(job("steady", ".when")) == ""  # nothing counts down
    await page.wait(f"{STATE} === 'offline'")

    async with running(tmp_path, "--port", str(server.port)) as again:
        await click(page, "document.getElementById('retry')")
        await publish(again, "steady", progress=20)
        await page.wait(f"{STATE} === 'live' && {job('steady', '.percent')} === '20 %'")
        await publish(again, "steady", progress=30)
        await page.wait(f"{job('steady', '.percent')} === '30 %' && !{stale}")


async def test_a_new_log_replaces_what_was_shown(new_page: NewPage, tmp_path: Path) -> None:
    page = await new_page()
    async with running(tmp_path, "--store", "memory:") as server:
        await publish(server, "forgotten")
        await open_live(page, server)
        await page.wait(job("forgotten"))
    async with running(tmp_path, "--store", "memory:", "--port", str(server.port)) as again:
        await publish(again, "known")
        await page.wait(f"{STATE} === 'live' && {job('known')} && !{job('forgotten')}")


async def test_a_gateway_without_its_server_is_told(new_page: NewPage, tmp_path: Path) -> None:
    page = await new_page()
    async with running(tmp_path) as server:
        await open_live(page, server, "sse")
    asked = trio.Event()

    async def bad_gateway(stream: trio.SocketStream) -> None:
        async with stream:
            await stream.receive_some()
            await stream.send_all(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            asked.set()

    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(server.port, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, bad_gateway, listeners)
        await click(page, "document.getElementById('retry')")
        with trio.fail_after(20):
            await asked.wait()
        await page.wait(f"{text_of('state-more')}.includes('502')")
        nursery.cancel_scope.cancel()
    async with running(tmp_path, "--port", str(server.port)) as again:
        await publish(again, "after")
        await click(page, "document.getElementById('retry')")
        await page.wait(f"{STATE} === 'live' && {job('after')}")


@pytest.mark.parametrize("transport", ["websocket", "sse"])
async def test_a_silent_connection_is_given_up(new_page: NewPage, tmp_path: Path, transport: str) -> None:
    """A server that hangs, or a network that swallows everything: nothing is closed, heartbeats just stay away."""
    page = await new_page()
    async with running(tmp_path, environ={"STATUSWIRE_SERVER_HEARTBEAT": "0.5"}) as server:
        await open_live(page, server, transport)
        os.kill(server.process.pid, signal.SIGSTOP)
        try:
            await page.wait(f"{STATE} !== 'live'")
        finally:
            os.kill(server.process.pid, signal.SIGCONT)
        await publish(server, "after")
        await page.wait(f"{STATE} === 'live' && {job('after')}")


async def test_it_is_honest_while_the_device_is_offline(new_page: NewPage, server: Running) -> None:
    page = await new_page()
    await open_live(page, server)
    condition = {"latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
    await page.call("Network.emulateNetworkConditions", offline=True, **condition)
    await page.wait(f"{STATE} === 'offline'")
    assert "this device is offline" in await page.run(text_of("state-more"))
    await page.call("Network.emulateNetworkConditions", offline=False, **condition)
    await page.wait(f"{STATE} === 'live'")


async def test_a_port_that_is_taken_is_no_page(tmp_path: Path) -> None:
    """The start line only comes from a server that listens: what the page and the demo rely on."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = await trio.run_process(
            [str(STATUSWIRE), "serve", "--store", "memory:", "--port", str(port)],
            capture_stdout=True,
            capture_stderr=True,
            check=False,
            cwd=tmp_path,
            env=clean_environment(),
        )
    assert done.returncode != 0
    assert done.stdout == b""
    assert b"another program listens there" in done.stderr
    assert b"Traceback" not in done.stderr
