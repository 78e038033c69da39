"""The page at `/` in a real Chromium, against the real server."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, TypeAlias

import httpx
import pytest
import trio

from tests.integration.browser import Page, open_browser
from tests.integration.running import STATUSWIRE, Running, clean_environment, running

pytestmark = pytest.mark.slow

NewPage: TypeAlias = Callable[[], Awaitable[Page]]
SECRET = "a-secret-of-thirty-two-bytes-or-more"
ENTER, SPACE, TAB = ("Enter", 13, "\r"), (" ", 32, " "), ("Tab", 9)
STATE = "document.getElementById('state').dataset.state"
ALL_NAMES = "[...document.querySelectorAll('.job .name')].map((name) => name.textContent)"


@pytest.fixture
async def new_page(tmp_path: Path) -> AsyncIterator[NewPage]:
    async with open_browser(tmp_path / "profile") as opened:
        yield opened


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Running]:
    async with running(tmp_path, "--store", "memory:") as started:
        yield started


def job(job_id: str, part: str = "") -> str:
    """The row of a job, or the text of one part of it, as a JavaScript expression; undefined while there is no row."""
    row = f"[...document.querySelectorAll('.job')].find((row) => row.querySelector('.name').textContent === '{job_id}')"
    return f"{row}?.querySelector('{part}').textContent" if part else row


async def say(server: Running, method: str, path: str, body: object = None, token: str = "") -> Any:
    """One request to the API."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    async with httpx.AsyncClient(base_url=server.url, timeout=10) as client:
        response = await client.request(method, f"/api/v2/{path}", json=body, headers=headers)
    assert response.is_success, response.text
    return response.json() if response.content else None


async def publish(server: Running, job_id: str, **fields: object) -> Any:
    """Create or update a job."""
    return await say(server, "POST", f"jobs/{job_id}/updates", {"userId": "anonymous", "status": "processing"} | fields)


async def choose(page: Page, transport: str) -> None:
    """Click a transport."""
    await page.run(f"document.querySelector('input[value={transport}]').click()")


async def open_live(page: Page, server: Running, transport: str = "websocket") -> None:
    """Open the page, and wait until it says that it is live."""
    await page.open(server.url + "/")
    await choose(page, transport)
    await page.wait(f"{STATE} === 'live'")


async def sign(directory: Path, *arguments: str) -> str:
    """A token made by the command line."""
    done = await trio.run_process(
        [str(STATUSWIRE), "token", "--jwt-key", SECRET, *arguments],
        capture_stdout=True,
        cwd=directory,
        env=clean_environment(),
    )
    return done.stdout.decode().strip()


async def enter_token(page: Page, token: str) -> None:
    """Type a token into the form that has asked for it, with the keyboard alone."""
    await page.wait("document.activeElement.id === 'token'")
    await page.write(token)
    await page.press(*ENTER)


@pytest.mark.parametrize("transport", ["websocket", "sse"])
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
    assert await page.run(f"{job('export-1')}.querySelector('progress').value") == 45.9
    assert await page.run(ALL_NAMES) == ["export-1", "before"]
    # It counts down between two updates.
    first = await page.run(job("export-1", ".when"))
    assert first.startswith("1 min 3")
    await page.wait(f"{job('export-1', '.when')} !== {json.dumps(first)}")

    await publish(server, "export-1", userId="alice", status="completed", message="ready")
    await page.wait(f"{job('export-1', '.badge')} === 'completed'")
    assert await page.run(job("export-1", ".percent")) == "100 %"
    assert await page.run(job("export-1", ".what")) == "ready"
    assert await page.run(f"{job('export-1')}.querySelector('button').hidden")

    await say(server, "DELETE", "jobs/before")
    await page.wait(f"!{job('before')}")
    assert await page.run("document.getElementById('counts').textContent") == "1 completed"
    assert page.problems == []


@pytest.mark.parametrize("transport", ["websocket", "sse"])
async def test_it_uses_nothing_but_its_transport(new_page: NewPage, server: Running, transport: str) -> None:
    page = await new_page()
    await open_live(page, server, transport)
    page.sent.clear()
    await page.open(server.url + "/?again")
    await choose(page, transport)
    await page.wait(f"{STATE} === 'live'")
    socket_url = server.url.replace("http", "ws") + "/ws/jobs"
    files = [("GET", f"{server.url}/{name}") for name in ("?again", "page.css", "page.js")]
    sent = [one for one in page.sent if not one[1].startswith("data:")]
    expected = {*files, ("WEBSOCKET", socket_url)} | ({("GET", f"{server.url}/api/v2/jobs/stream")} & set(sent))
    assert set(sent) == expected
    assert (("GET", f"{server.url}/api/v2/jobs/stream") in sent) == (transport == "sse")
    assert page.problems == []


async def test_changing_the_transport_goes_on_where_it_was(new_page: NewPage, server: Running) -> None:
    page = await new_page()
    await open_live(page, server)
    await publish(server, "one", progress=10)
    await page.wait(f"{job('one', '.percent')} === '10 %'")
    page.sent.clear()
    # While nothing is connected an update goes by: the stream resumes behind the last one that was shown.
    await choose(page, "sse")
    await publish(server, "one", progress=20)
    await page.wait(f"{job('one', '.percent')} === '20 %' && {STATE} === 'live'")
    streams = [url for _, url in page.sent if "/stream" in url]
    assert len(streams) == 1
    assert "last_seen=" in streams[0]
    await choose(page, "websocket")
    await publish(server, "one", progress=30)
    await page.wait(f"{job('one', '.percent')} === '30 %' && {STATE} === 'live'")
    assert page.problems == []


async def test_text_of_jobs_is_never_markup(new_page: NewPage, server: Running) -> None:
    evil = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
    page = await new_page()
    await open_live(page, server)
    await publish(server, "evil", kind=evil, stage=evil, currentOperation=evil, message=evil)
    await publish(server, "worse", status="failed", error=evil)
    await page.wait(f"{job('worse')} && {job('evil')}")
    assert await page.run(job("evil", ".what")) == f"{evil} · {evil}"
    assert await page.run(job("worse", ".what")) == evil
    assert await page.run("document.querySelectorAll('main img, main script').length") == 0
    assert "owned" not in await page.run("document.title")
    assert page.problems == []


async def test_many_jobs_stay_few_rows(new_page: NewPage, server: Running) -> None:
    await say(server, "POST", "updates", [{"jobId": f"old-{n}", "userId": "u", "status": "queued"} for n in range(150)])
    page = await new_page()
    await open_live(page, server)
    await page.wait("document.querySelectorAll('.job').length === 150")
    await say(server, "POST", "updates", [{"jobId": f"new-{n}", "userId": "u", "status": "queued"} for n in range(150)])
    await page.wait(f"document.querySelectorAll('.job').length === 200 && {ALL_NAMES}.includes('new-149')")
    names = await page.run(ALL_NAMES)
    assert sum(name.startswith("new-") for name in names) == 150
    assert all(name.startswith("new-") for name in names[:150])  # the newest are on top
    assert await page.run("document.getElementById('more').textContent") == "The newest 200 of 300 jobs are shown."

    await publish(server, "new-7", userId="u", status="completed")
    await page.run("document.getElementById('unfinished').click()")
    await page.wait(f"!{job('new-7')}")
    assert await page.run("document.getElementById('more').textContent") == "The newest 200 of 299 jobs are shown."


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


async def test_a_job_is_cancelled_with_the_keyboard(new_page: NewPage, server: Running) -> None:
    await publish(server, "long-one", progress=3)
    page = await new_page()
    await open_live(page, server)
    await page.wait(job("long-one"))
    await page.run("document.getElementById('unfinished').focus()")
    await page.press(*TAB)
    assert await page.run("document.activeElement.getAttribute('aria-label')") == "Cancel long-one"
    await page.press(*SPACE)
    await page.wait(f"{job('long-one', 'button')} === 'Cancelling'")
    # Rows that come in above must not take the focus away.
    await publish(server, "newer", progress=1)
    await page.wait(job("newer"))
    assert await page.run("document.activeElement.getAttribute('aria-label')") == "Cancel long-one"

    answer = await publish(server, "long-one", progress=4)
    assert answer["cancelRequested"] is True
    await publish(server, "long-one", status="cancelled")
    await page.wait(f"{job('long-one', '.badge')} === 'cancelled'")
    assert page.problems == []


async def test_a_cancel_that_is_refused_is_explained(new_page: NewPage, tmp_path: Path) -> None:
    async with running(tmp_path, "--store", "memory:", "--jwt-key", SECRET) as server:
        worker = await sign(tmp_path, "--sub", "worker", "--capability", "publish")
        await say(server, "POST", "jobs", {"jobId": "hers", "userId": "alice"}, worker)
        page = await new_page()
        await page.open(server.url + "/")
        await enter_token(page, await sign(tmp_path, "--sub", "alice"))
        await page.wait(job("hers"))
        # Its token runs out of the server's favour between showing the button and pressing it.
        await page.run("sessionStorage.setItem('statuswire.token', 'not.a.token')")
        await page.run(f"{job('hers')}.querySelector('button').click()")
        await page.wait("!document.getElementById('notice').hidden")
        assert (await page.run("document.getElementById('notice').textContent")).startswith("hers was not cancelled: ")
        await page.wait(f"{job('hers', 'button')} === 'Cancel'")


@pytest.mark.parametrize("transport", ["websocket", "sse"])
async def test_each_token_sees_its_own(new_page: NewPage, tmp_path: Path, transport: str) -> None:
    async with running(tmp_path, "--store", "memory:", "--jwt-key", SECRET) as server:
        worker = await sign(tmp_path, "--sub", "worker", "--capability", "publish")
        await say(server, "POST", "jobs", {"jobId": "hers", "userId": "alice"}, worker)
        await say(server, "POST", "jobs", {"jobId": "his", "userId": "bob"}, worker)
        page = await new_page()
        await page.open(server.url + "/")
        await choose(page, transport)
        await page.wait(f"{STATE} === 'token'")

        await enter_token(page, "nonsense")
        await page.wait("document.getElementById('token-why').textContent.startsWith('The last one was refused: ')")
        alice = await sign(tmp_path, "--sub", "alice")
        await enter_token(page, alice)
        await page.wait(f"{STATE} === 'live' && {job('hers')}")
        assert await page.run(ALL_NAMES) == ["hers"]
        assert await page.run("document.getElementById('token-form').hidden")
        assert await page.run("Object.values(localStorage).length + document.cookie.length") == 0
        assert all(alice not in url for kind, url in page.sent if kind == "WEBSOCKET")
        # Another of her jobs, and none of his, live.
        await say(server, "POST", "jobs", {"jobId": "his-2", "userId": "bob"}, worker)
        await say(server, "POST", "jobs", {"jobId": "hers-2", "userId": "alice"}, worker)
        await page.wait(job("hers-2"))
        assert await page.run(ALL_NAMES) == ["hers-2", "hers"]
        # A reload of the tab keeps the token.
        await page.call("Page.reload")
        await page.wait(job("hers-2"))

        await page.run("document.getElementById('forget').click()")
        await page.wait(f"{STATE} === 'token' && {ALL_NAMES}.length === 0")
        await enter_token(page, await sign(tmp_path, "--sub", "bob"))
        await page.wait(job("his-2"))
        assert await page.run(ALL_NAMES) == ["his-2", "his"]


@pytest.mark.parametrize("transport", ["websocket", "sse"])
async def test_a_token_that_ends_is_asked_for_anew(new_page: NewPage, tmp_path: Path, transport: str) -> None:
    async with running(tmp_path, "--store", "memory:", "--jwt-key", SECRET) as server:
        page = await new_page()
        await page.open(server.url + "/")
        await choose(page, transport)
        await enter_token(page, await sign(tmp_path, "--sub", "alice", "--ttl", "2"))
        await page.wait(f"{STATE} === 'live'")
        await page.wait(f"{STATE} === 'token'")
        assert "expired" in await page.run("document.getElementById('token-why').textContent")
        await enter_token(page, await sign(tmp_path, "--sub", "alice"))
        await page.wait(f"{STATE} === 'live'")


async def test_a_token_left_over_does_no_harm_in_open_mode(new_page: NewPage, server: Running) -> None:
    page = await new_page()
    await page.open(server.url + "/")
    await page.run("sessionStorage.setItem('statuswire.token', 'of.another.server')")
    await page.call("Page.reload")
    await publish(server, "one")
    await page.wait(f"{STATE} === 'live' && {job('one')}")


@pytest.mark.parametrize("transport", ["websocket", "sse"])
async def test_a_restart_is_told_and_survived(new_page: NewPage, tmp_path: Path, transport: str) -> None:
    page = await new_page()
    async with running(tmp_path) as server:
        await publish(server, "steady", progress=10)
        await open_live(page, server, transport)
        await page.wait(job("steady"))
    await page.wait(f"{STATE} === 'offline'")
    more = await page.run("document.getElementById('state-more').textContent")
    assert "shown as of" in more
    assert await page.run("document.getElementById('jobs').classList.contains('stale')")
    assert await page.run(ALL_NAMES) == ["steady"]  # shown, but not as if it were live
    page.sent.clear()

    async with running(tmp_path, "--port", str(server.port)) as again:
        await publish(again, "steady", progress=20)
        await page.wait(f"{STATE} === 'live' && {job('steady', '.percent')} === '20 %'")
        await publish(again, "steady", progress=30)
        await page.wait(f"{job('steady', '.percent')} === '30 %'")
        assert not await page.run("document.getElementById('jobs').classList.contains('stale')")


async def test_a_new_log_replaces_what_was_shown(new_page: NewPage, tmp_path: Path) -> None:
    page = await new_page()
    async with running(tmp_path, "--store", "memory:") as server:
        await publish(server, "forgotten")
        await open_live(page, server)
        await page.wait(job("forgotten"))
    async with running(tmp_path, "--store", "memory:", "--port", str(server.port)) as again:
        await publish(again, "known")
        await page.wait(f"{STATE} === 'live' && {job('known')}")
        assert await page.run(ALL_NAMES) == ["known"]


async def test_event_source_gives_up_but_the_page_does_not(new_page: NewPage, tmp_path: Path) -> None:
    """A proxy whose server is away answers 502, after which EventSource never comes back by itself."""
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
        with trio.fail_after(20):
            await asked.wait()
        await page.wait("document.getElementById('state-more').textContent.includes('It answers 502')")
        nursery.cancel_scope.cancel()
    async with running(tmp_path, "--port", str(server.port)) as again:
        await publish(again, "after")
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
    assert "This device is offline" in await page.run("document.getElementById('state-more').textContent")
    await page.call("Network.emulateNetworkConditions", offline=False, **condition)
    await page.wait(f"{STATE} === 'live'")


async def test_light_dark_and_small_screens(new_page: NewPage, server: Running) -> None:
    await publish(server, "x" * 128, kind="k" * 200, currentOperation="w" * 2000, progress=50)
    await publish(server, "short", status="failed", error="no room")
    page = await new_page()
    await page.look(width=1200, height=800, scheme="light")
    await open_live(page, server)
    await page.wait(job("short"))
    ground = "getComputedStyle(document.body).backgroundColor"
    light = await page.run(ground)
    await page.look(width=360, height=640, scheme="dark")
    assert await page.run(ground) != light
    for width in (320, 360, 768, 1200):
        await page.look(width=width, height=640)
        assert await page.run("document.documentElement.scrollWidth") <= width
        heights = await page.run("[...document.querySelectorAll('.job')].map((row) => row.offsetHeight)")
        assert max(heights) < 320  # a long text does not push the others off the screen
    assert page.problems == []


async def test_text_is_readable_in_both_schemes(new_page: NewPage, server: Running) -> None:
    """WCAG 2.1, 1.4.3: a contrast of 4.5 or more for every text of a row and of the state."""
    for status in ("queued", "processing", "completed", "failed", "cancelled"):
        await publish(server, status, status=status, message="text", error="text")
    page = await new_page()
    await open_live(page, server)
    await page.wait(job("cancelled"))
    script = """(() => {
        const rgb = (color) => color.match(/[0-9.]+/g).slice(0, 3).map((part) => {
            const value = part / 255;
            return value <= 0.03928 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
        });
        const light = (color) => { const [r, g, b] = rgb(color); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
        const ground = (element) => {
            const color = getComputedStyle(element).backgroundColor;
            return color !== "rgba(0, 0, 0, 0)" ? color : ground(element.parentElement);
        };
        return [...document.querySelectorAll(".job span, .job button, #state, fieldset span, #counts")]
            .filter((element) => element.textContent)
            .map((element) => {
                const [one, other] = [light(getComputedStyle(element).color), light(ground(element))];
                return [(Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05), element.className];
            })
            .sort((one, other) => one[0] - other[0])[0];
    })()"""
    for scheme in ("light", "dark"):
        await page.look(width=1200, height=800, scheme=scheme)
        worst = await page.run(script)
        assert worst[0] >= 4.5, (scheme, worst)


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
